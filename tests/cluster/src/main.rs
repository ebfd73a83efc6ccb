//! The command `cargo cluster`. Parses arguments and prints errors; everything else is in the library.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use synthex_cluster::{Cluster, Profile};

/// A real Kubernetes on this machine, for tests and the demo. Needs root and Go; installs Debian packages that are missing.
#[derive(Parser)]
#[command(name = "cargo cluster", bin_name = "cargo cluster")]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring a cluster up, or find it up
    Up {
        /// Only the API server and its controllers: no node, no pods
        #[arg(long)]
        control_plane: bool,
    },
    /// Take down what is up, and put the machine back as it was
    Down,
    /// Show what is up
    Status,
    /// Build operator and runtime, give their images to the node and install the operator
    Install,
    /// Run kubectl on the cluster that is up: the node, or else the control plane
    #[command(disable_help_flag = true)]
    Kubectl {
        /// Arguments for kubectl
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run all tests, bringing up what they need
    Test,
    /// Show a whole rollout in a few minutes
    Demo {
        /// Leave the cluster up
        #[arg(long)]
        keep: bool,
    },
    /// Connect standard input, a listening socket, to an address (used by `up`)
    #[command(hide = true)]
    Relay {
        /// address:port
        target: String,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Up { control_plane } => {
            let profile = if control_plane { Profile::ControlPlane } else { Profile::Node };
            let cluster = synthex_cluster::up(profile)?;
            println!("export KUBECONFIG={}", cluster.kubeconfig().display());
        }
        Action::Down => Profile::ALL.into_iter().try_for_each(synthex_cluster::down)?,
        // A reader that has seen enough, such as `head`, is no error.
        Action::Status => drop(std::io::stdout().write_all(synthex_cluster::status()?.as_bytes())),
        Action::Install => synthex_cluster::demo::install(&synthex_cluster::up(Profile::Node)?)?,
        Action::Kubectl { args } => return kubectl(&args),
        Action::Test => synthex_cluster::suite::run()?,
        Action::Demo { keep } => synthex_cluster::demo::run(keep)?,
        Action::Relay { target } => synthex_cluster::relay::run(&target)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn kubectl(args: &[String]) -> Result<ExitCode> {
    let profiles = [Profile::Node, Profile::ControlPlane];
    let up = profiles.into_iter().find(|profile| profile.kubeconfig().exists());
    let cluster = Cluster::managed(up.context("no cluster is up: `cargo cluster up` brings one up")?);
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let status = cluster.command(&args).status().context("cannot start kubectl")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
