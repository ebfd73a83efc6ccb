//! `cargo cluster demo`: the whole story on a node of its own. It changes only that cluster.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::images;
use crate::lifecycle::{down, up};
use crate::paths::{Profile, workspace};
use crate::progress::step;

/// Brings the node up with the product's images, installs the operator, and tells the story. With `keep` the cluster stays up.
///
/// # Errors
/// Something does not come up, or the story does not end as it must. The cluster is removed all the same, unless it is to be kept.
pub fn run(keep: bool) -> Result<()> {
    let result = up(Profile::Node).and_then(|cluster| {
        install(&cluster)?;
        story(&cluster)
    });
    if keep {
        let kubeconfig = Profile::Node.kubeconfig();
        println!("The cluster stays up. Look at it with\n\n  export KUBECONFIG={}\n", kubeconfig.display());
        println!(
            "  cargo cluster kubectl get pods --all-namespaces\n\nand remove it with `cargo cluster down`."
        );
        return result;
    }
    result.and(down(Profile::Node))
}

/// Builds the product, gives its images to the node and installs the operator. An operator that runs already is replaced if its image changed.
///
/// # Errors
/// The build fails, or the operator does not become available.
pub fn install(cluster: &Cluster) -> Result<()> {
    let changed = images::import_product()?;
    step("install the operator", || {
        cluster.install_operator()?;
        if changed {
            cluster.kubectl(&[
                "--namespace",
                "synthex-system",
                "rollout",
                "restart",
                "deployment/synthex-operator",
            ])?;
            cluster.rolled_out("synthex-system", "synthex-operator", Duration::from_secs(60))?;
        }
        Ok(())
    })
}

/// What is shown once the operator runs: experts and traffic first, then the rollout.
fn story(cluster: &Cluster) -> Result<()> {
    step("start experts and traffic", || {
        cluster.apply(&sample("traffic.yaml")?)?;
        cluster.rolled_out("shop", "upstream", Duration::from_secs(60))
    })
}

/// A file of the product's samples, as users have it.
fn sample(name: &str) -> Result<String> {
    let file = workspace().join("manifests/samples").join(name);
    fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
}
