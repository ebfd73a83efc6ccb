//! The runtime's program: reads its arguments, starts the server, waits for SIGTERM, drains.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use synthex_runtime::{
    config::Config,
    process::{self, LogFormat},
    server::{Options, Patience, Server},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc looks for this symbol before it makes its first allocation.
#[allow(
    unsafe_code,
    reason = "an exported symbol is unsafe for it could clash; this name is the allocator's own"
)]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; process::MALLOC_CONF.len()] = process::MALLOC_CONF;

/// A small, fast fan-out gateway to experts, in which every optimization is a run-time switch.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file (YAML or JSON); it is applied again whenever it changes.
    #[arg(long, required_unless_present = "schema")]
    config: Option<PathBuf>,
    /// Print the JSON schema of the configuration file, and end.
    #[arg(long)]
    schema: bool,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let Some(config) = arguments.config.filter(|_| !arguments.schema) else {
        println!("{}", Config::schema());
        return Ok(ExitCode::SUCCESS);
    };
    process::init_logging(arguments.log_format)?;
    let terminated = process::terminated()?;
    let server = Server::start(Options {
        config,
        instance: process::instance(),
        allocations: Some(process::allocations),
        patience: Patience::default(),
    })
    .await?;
    let (serving, admin) = server.addresses()?;
    tracing::info!(%serving, %admin, version = env!("CARGO_PKG_VERSION"), "ready");
    Ok(if server.run(terminated).await { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
