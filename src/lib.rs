//! Rolls out a set of optimizations on Kubernetes, judges each stage by KPIs from Prometheus, and takes back the one that does
//! harm.
//!
//! - [`api`]: what users write and read; serde and schema only.
//! - [`decision`]: the functional core; pure functions of a snapshot and a time.
//! - [`effects`]: the imperative shell; thin, timed-out, idempotent.
//! - [`controller`]: watches and wiring.
//! - [`cli`]: `kubectl synthex`, which asks the same functions from outside the cluster.
//!
//! Invariant: an import never points from `decision` to `effects`, nor from `api` to either.

pub mod api;
pub mod cli;
pub mod controller;
pub mod decision;
pub mod effects;
pub mod metrics;
pub mod server;
