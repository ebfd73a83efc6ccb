//! The load program: mock experts, or clients that never wait for answers.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context;
use clap::{Parser, ValueEnum};
use hyper::Uri;
use synthex_runtime::{
    config::units,
    load::{
        experts::{self, Behaviour},
        run::{self, Arrivals, Connection, Plan, Totals},
    },
    process::{self, LogFormat},
};
use tokio::net::TcpListener;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc looks for this symbol before it makes its first allocation.
#[allow(
    unsafe_code,
    reason = "an exported symbol is unsafe for it could clash; this name is the allocator's own"
)]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static MALLOC_CONF: &[u8; process::MALLOC_CONF.len()] = process::MALLOC_CONF;

/// Mock experts and an open-loop load generator.
#[derive(Debug, Parser)]
#[command(version)]
enum Arguments {
    /// Serve mock experts: any path, answers that depend on path and body alone.
    Experts {
        /// Address to listen on.
        #[arg(long, default_value = "0.0.0.0:8000")]
        listen: SocketAddr,
        /// Mean time to an answer.
        #[arg(long, default_value = "20ms", value_parser = units::duration::parse)]
        latency: Duration,
        /// Share by which that time varies both ways, 0 to 1.
        #[arg(long, default_value_t = 0.2, value_parser = share)]
        jitter: f64,
        /// Share of requests that are answered 500, 0 to 1.
        #[arg(long, default_value_t = 0.0, value_parser = share)]
        error_rate: f64,
        /// Size of an answer's text.
        #[arg(long, default_value = "2KiB", value_parser = size)]
        size: usize,
        /// Makes jitter and errors the same in each run.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Send queries at a rate, whatever becomes of them, and report each second.
    Run {
        /// Where to send queries, such as http://host:8080; may be given several times.
        #[arg(long, required = true)]
        target: Vec<Uri>,
        /// Queries a second to each target.
        #[arg(long, value_parser = rate)]
        rate: f64,
        /// When queries arrive.
        #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
        arrivals: Arrivals,
        /// How long to wait for a target that accepts no connection yet, before the first query.
        #[arg(long, default_value = "0s", value_parser = units::duration::parse)]
        wait: Duration,
        /// How long to send; without it until SIGTERM.
        #[arg(long, value_parser = units::duration::parse)]
        duration: Option<Duration>,
        /// How long a query may take, from its planned arrival.
        #[arg(long, default_value = "5s", value_parser = units::duration::parse)]
        timeout: Duration,
        /// A connection for each query, or idle ones again.
        #[arg(long, value_enum, default_value_t = Connection::Fresh)]
        connection: Connection,
        /// Number of different queries; 0: every query is new.
        #[arg(long, default_value_t = 1000)]
        distinct: u64,
        /// Size of a query's content.
        #[arg(long, default_value = "1KiB", value_parser = size)]
        size: usize,
        /// Address for /metrics and /livez; without it there is none.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// Makes arrivals and queries the same in each run, but for queries that are all new.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How to report.
        #[arg(long, value_enum, default_value_t = Report::Jsonl)]
        report: Report,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Report {
    /// A JSON object a line.
    Jsonl,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "write a number from 0 to 1".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (0.001..=1e6).contains(rate));
    rate.ok_or_else(|| "write a number from 0.001 to 1000000".to_owned())
}

fn size(text: &str) -> Result<usize, String> {
    units::bytes::parse(text)?
        .try_into()
        .ok()
        .filter(|n| *n <= 64 << 20)
        .ok_or_else(|| "at most 64MiB".to_owned())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    process::init_logging(LogFormat::Text)?;
    let terminated = process::terminated()?;
    match arguments {
        Arguments::Experts { listen, latency, jitter, error_rate, size, seed } => {
            let listener = bind(listen).await?;
            let behaviour = Behaviour { latency, jitter, error_rate, size, seed };
            tokio::select! {
                () = experts::serve(listener, behaviour) => {}
                () = terminated => {}
            }
        }
        Arguments::Run {
            target: targets,
            rate,
            arrivals,
            wait,
            duration,
            timeout,
            connection,
            distinct,
            size,
            listen,
            seed,
            report: Report::Jsonl,
        } => {
            let totals = Totals::default();
            if let Some(listen) = listen {
                tokio::spawn(run::admin(bind(listen).await?, totals.clone()));
            }
            let plan =
                Plan { targets, rate, arrivals, wait, duration, timeout, connection, distinct, size, seed };
            run::run(plan, totals, terminated, |line| println!("{line}")).await?;
        }
    }
    Ok(())
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}
