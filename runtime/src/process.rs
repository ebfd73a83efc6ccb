//! What both programs need of their process: logs, signals, a name, the allocator's figures.
//!
//! The only module that installs signal handlers or global loggers; libraries' own code never calls it.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Settings of the allocator, nul-terminated, for the symbol that it looks for. Pages that are not used any more go back to the system
/// after five seconds, and a background thread does it, so that an idle process gives memory back too. Few arenas:
/// each holds memory of its own.
pub const MALLOC_CONF: &[u8; 83] =
    b"background_thread:true,dirty_decay_ms:5000,muzzy_decay_ms:5000,thp:never,narenas:4\0";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends logs to standard error, from `info` on, or from the level that the variable `LOG_LEVEL` names.
pub fn init_logging(format: LogFormat) -> anyhow::Result<()> {
    let level = match std::env::var("LOG_LEVEL") {
        Ok(name) => name
            .parse()
            .with_context(|| format!("LOG_LEVEL is {name:?}; write error, warn, info, debug or trace"))?,
        Err(_) => tracing::Level::INFO,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Completes at the first SIGTERM or SIGINT. Call it before anything that should survive those signals.
pub fn terminated() -> anyhow::Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// The pod's name: `HOSTNAME`, else what the system calls itself.
pub fn instance() -> String {
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Allocations that jemalloc has made so far, as its statistics tell: they lag by what the threads' caches hold.
/// `None` where jemalloc is not the allocator.
pub fn allocations() -> Option<u64> {
    tikv_jemalloc_ctl::epoch::advance().ok()?;
    // 4096 stands for all arenas together. Requests, not `nmalloc`, which leaves out what a thread's cache satisfied.
    let [small, large] =
        [c"stats.arenas.4096.small.nrequests", c"stats.arenas.4096.large.nrequests"].map(|name| {
            #[allow(
                unsafe_code,
                reason = "the names are nul-terminated and both values are 64 bits wide in jemalloc"
            )]
            // SAFETY: as the reason says; jemalloc checks the name and the width, and answers with an error.
            unsafe {
                tikv_jemalloc_ctl::raw::read::<u64>(name.to_bytes_with_nul())
            }
        });
    Some(small.ok()? + large.ok()?)
}
