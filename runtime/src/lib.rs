//! A small, fast fan-out gateway to experts in which every optimization is a run-time switch, with the
//! unoptimized baseline beside it.
//!
//! Without the `server` feature this crate is only [`config`]: what a configuration file may say, and its hash.
//! That part must not touch a socket, a clock or a file, since the operator judges users' configuration with it.

pub mod config;
