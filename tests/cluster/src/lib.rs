//! A real Kubernetes on one bare Linux machine, without a registry and without the internet.
//!
//! Two shapes: the control plane alone (an API server to test against, seconds) and a whole node in a closed
//! network namespace (pods, Services, DNS, Prometheus). Nothing in here is part of the product; it may start
//! processes and change the machine, and must put back everything that it changed.

mod addons;
mod binaries;
mod cluster;
mod control_plane;
pub mod demo;
mod host;
mod images;
mod lifecycle;
mod node;
mod paths;
mod pki;
mod process;
pub mod progress;
pub mod relay;
mod state;
pub mod story;
pub mod suite;

pub use cluster::{Cluster, Namespace};
pub use lifecycle::{down, status, up};
pub use paths::Profile;
