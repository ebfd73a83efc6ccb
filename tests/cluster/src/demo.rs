//! `cargo cluster demo`: the whole story on a node of its own. It changes only that cluster.

use anyhow::Result;

use crate::cluster::Cluster;
use crate::images;
use crate::lifecycle::{down, up};
use crate::paths::Profile;
use crate::progress::step;
use crate::story::{self, Then};

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

/// Builds the product, gives its images to the node and installs the operator.
///
/// # Errors
/// The build fails, or the operator does not become available.
pub fn install(cluster: &Cluster) -> Result<()> {
    images::import_product()?;
    step("install the operator", || cluster.install_operator())
}

/// The quickstart, live in the terminal, and what must hold at its end.
fn story(cluster: &Cluster) -> Result<()> {
    let account = story::tell(cluster, &story::quickstart()?, |_| Ok(Then::GoesOn))?;
    story::check_harmful(cluster, &account)?;
    println!();
    println!("connections was rolled back and the rest completed:");
    for why in account.reasons("OptimizationRolledBack") {
        println!("  {why}");
    }
    if let Some(after) = account.switched_off_after {
        println!(
            "  its configuration was off on every canary pod {:.2} s after the decision",
            after.as_secs_f64()
        );
    }
    for benefit in account.rollout["status"]["benefits"].as_array().into_iter().flatten() {
        let number = |field: &str| 100.0 * benefit["overall"][field].as_f64().unwrap_or_default();
        println!(
            "  {} {:+.0} % ({:+.0} to {:+.0}) by {}",
            benefit["kpi"].as_str().unwrap_or_default(),
            number("estimate"),
            number("low"),
            number("high"),
            benefit["optimizations"].as_array().map_or_else(String::new, |all| {
                all.iter().filter_map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
            })
        );
    }
    println!(
        "  requests: {} answered, {} failed, by variant: {:?}",
        account.load["ok"],
        account.load["failed"],
        account.failures()
    );
    println!("  Ready production pods never fell below {}", account.fewest_serving);
    Ok(())
}
