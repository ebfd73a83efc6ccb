//! What users write and read: the custom resource, its schema and its status.
//!
//! Serde and schema only. Nothing here decides, reads a clock or does I/O; the rules that the API server enforces (OpenAPI and
//! CEL) stand beside the fields they guard, those that it cannot enforce stand in [`crate::decision::resolve`].

mod duration;
mod rollout;
mod status;

pub use duration::Duration;
pub use rollout::*;
pub use status::*;

/// API group of the resource, and prefix of every label and annotation.
pub const GROUP: &str = "synthex.io";
