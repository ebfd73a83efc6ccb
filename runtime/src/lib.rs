//! A small, fast fan-out gateway to experts in which every optimization is a run-time switch, with the
//! unoptimized baseline beside it.
//!
//! Without the `server` feature this crate is only [`config`]: what a configuration file may say, and its hash.
//! That part must not touch a socket, a clock or a file, since the operator judges users' configuration with it.
//!
//! With it, from the client inwards: [`server`] (sockets) → `api` (HTTP) → `dispatch` (fan-out) → `experts` (the
//! upstream protocols) → `cache`, `pool` and `connections` (the optimizations). `results` hands answers on. `state`
//! holds what is in force, `reload` replaces it, `monitoring` watches the process and `pressure` its memory limit,
//! `metrics` counts. [`load`] is the other side: mock experts and a load generator.

pub mod config;

#[cfg(feature = "server")]
mod api;
#[cfg(feature = "server")]
mod cache;
#[cfg(feature = "server")]
mod connections;
#[cfg(feature = "server")]
mod dispatch;
#[cfg(feature = "server")]
mod experts;
#[cfg(feature = "server")]
pub mod load;
#[cfg(feature = "server")]
mod metrics;
#[cfg(feature = "server")]
mod monitoring;
#[cfg(test)]
mod mutations;
#[cfg(feature = "server")]
#[doc(hidden)]
pub use monitoring::virtual_time;
#[cfg(feature = "server")]
mod pool;
#[cfg(feature = "server")]
mod pressure;
#[cfg(feature = "server")]
pub mod process;
#[cfg(feature = "server")]
mod query;
#[cfg(feature = "server")]
mod reload;
#[cfg(feature = "server")]
mod results;
#[cfg(feature = "server")]
mod secrets;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
mod state;
