//! Rolls out a set of optimizations on Kubernetes, judges each stage by KPIs from Prometheus, and takes back the one that does
//! harm.

pub mod api;
pub mod decision;
pub mod effects;
