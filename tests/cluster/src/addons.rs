//! What runs in every node cluster: DNS and Prometheus. Their manifests stand in `manifests/`, as one would apply them anywhere.

use std::fs;
use std::os::unix::fs::chown;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::images::USER;
use crate::lifecycle::Build;
use crate::node;
use crate::paths::{Profile, package};

/// Applies the manifests and waits until their Deployments are available.
pub(crate) fn install(build: &Build, cluster: &Cluster) -> Result<()> {
    // Outside of the pod, so that samples outlive it.
    let samples = Profile::Node.data().join("prometheus");
    fs::create_dir_all(&samples)?;
    chown(&samples, Some(USER), Some(USER))?;
    for file in ["coredns.yaml", "prometheus.yaml"] {
        let text = fs::read_to_string(package().join("manifests").join(file))?;
        let text = text.replace("$(DNS_SERVICE)", node::DNS_SERVICE);
        cluster.apply(&text.replace("$(SAMPLES)", &samples.display().to_string()))?;
    }
    for (what, namespace, name) in
        [("DNS", "kube-system", "coredns"), ("Prometheus", "monitoring", "prometheus")]
    {
        build.ready(what, || {
            let deployment = format!("deployment/{name}");
            crate::control_plane::answer(cluster.kubectl(&[
                "--namespace",
                namespace,
                "wait",
                "--for=condition=Available",
                &deployment,
                "--timeout=2s",
            ]))
        })?;
    }
    Ok(())
}
