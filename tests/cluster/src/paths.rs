//! Where everything lives. Names only: nothing here touches the disk.
//!
//! Data is kept below `target/cluster` of the workspace. What must have a short or machine-wide name (sockets, the network
//! namespace, the record of what was started) is kept below `/run/synthex-cluster`, so that any checkout can take down
//! a cluster which another one left, even after its `target` was removed.

use std::path::{Path, PathBuf};

/// Machine-wide directory for sockets, namespaces and the record of what was started.
pub(crate) const RUN: &str = "/run/synthex-cluster";

/// How much of a Kubernetes is brought up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// etcd, kube-apiserver and kube-controller-manager on the loopback interface: the real API, but nothing runs.
    ControlPlane,
    /// A whole node in a closed network namespace, with DNS and Prometheus.
    Node,
}

impl Profile {
    /// Both profiles.
    pub const ALL: [Profile; 2] = [Profile::ControlPlane, Profile::Node];

    /// The name as it stands in paths and messages.
    pub fn name(self) -> &'static str {
        match self {
            Profile::ControlPlane => "control-plane",
            Profile::Node => "node",
        }
    }

    /// Where the kubeconfig for host programs is while the cluster is up.
    pub fn kubeconfig(self) -> PathBuf {
        match self {
            Profile::ControlPlane => target().join("control-plane.kubeconfig"),
            Profile::Node => target().join("kubeconfig"),
        }
    }

    /// Data of this profile: removed when the cluster goes down.
    pub(crate) fn data(self) -> PathBuf {
        target().join(self.name())
    }

    /// Sockets and records of this profile: removed when the cluster goes down.
    pub(crate) fn run(self) -> PathBuf {
        Path::new(RUN).join(self.name())
    }
}

/// The directory of this package.
pub(crate) fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    // The package is tests/cluster of the workspace; without two parents the package itself is as good as any.
    package().ancestors().nth(2).unwrap_or(package())
}

/// Everything that the harness keeps in the workspace.
pub(crate) fn target() -> PathBuf {
    workspace().join("target/cluster")
}

/// The Kubernetes programs.
pub(crate) fn bin(name: &str) -> PathBuf {
    target().join("bin").join(name)
}
