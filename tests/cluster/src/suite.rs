//! `cargo cluster test`: all tiers, each on the smallest cluster that shows what it must show.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::demo::install;
use crate::images;
use crate::lifecycle::{down, is_up, up};
use crate::paths::{Profile, workspace};

/// Runs every test. With KUBECONFIG set, those that need a cluster run against that one and none is brought up.
///
/// # Errors
/// Some test failed (all tiers are run all the same), or a cluster does not come up.
pub fn run() -> Result<()> {
    let given = std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty());
    let mut failed = Vec::new();
    let mut note = |tier: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("{tier}: {error:#}");
            failed.push(tier.to_owned());
        }
    };
    note("tests without a cluster", cargo(&["test", "--workspace"], None));
    for (test, profile) in [("api_server", Profile::ControlPlane), ("rollout", Profile::Node)] {
        let result = if given {
            Cluster::connect().and_then(|cluster| tests(test, &cluster))
        } else {
            on_own(test, profile)
        };
        note(test, result);
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs one file of tests on a cluster of ours. One that was up before stays up.
fn on_own(test: &str, profile: Profile) -> Result<()> {
    let found = is_up(profile)?;
    let result = up(profile).and_then(|cluster| tests(test, &cluster));
    if found { result } else { result.and(down(profile)) }
}

fn tests(file: &str, cluster: &Cluster) -> Result<()> {
    // Somebody else's cluster must be given the images, and the operator, in its own way.
    if cluster.kubeconfig() == Profile::Node.kubeconfig() {
        images::import_probe()?;
        install(cluster)?;
    }
    let args = ["test", "--workspace", "--test", file, "--", "--ignored", "--test-threads=1", "--nocapture"];
    cargo(&args, Some(cluster))
}

/// Runs cargo on this workspace, its output going to the terminal.
pub(crate) fn cargo(args: &[&str], cluster: Option<&Cluster>) -> Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(workspace());
    if let Some(cluster) = cluster {
        command.env("KUBECONFIG", cluster.kubeconfig());
    }
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("cargo {}: {status}", args.join(" "));
    }
    Ok(())
}
