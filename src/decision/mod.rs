//! The functional core: every decision is a pure function of a snapshot and a time.
//!
//! Nothing here is async, holds a client, reads a clock or does I/O; `tests/layering.rs` holds that.

pub mod judge;
pub mod machine;
pub mod render;
pub mod replicas;
pub mod report;
pub mod resolve;
pub mod snapshot;
pub mod writes;
