//! The operator's command line: arguments, telemetry, wiring, signals.

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use kube::{Client, CustomResourceExt, api::ListParams};
use synthex_operator::{
    api::OptimizationRollout,
    controller::{self, Context},
    decision::resolve::Defaults,
    server::{self, Health},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How long reconciliations under way may take after SIGTERM.
const GRACE: Duration = Duration::from_secs(20);
/// How soon it is tried again to list the custom resource.
const RETRY: Duration = Duration::from_secs(5);

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the controller.
    Run(Run),
    /// Print the custom resource definition.
    Crd,
}

#[derive(clap::Args)]
struct Run {
    /// Prometheus from which KPIs are read, unless a rollout names another.
    #[arg(long, env = "PROMETHEUS_URL", default_value = "http://prometheus.monitoring.svc:9090")]
    prometheus_url: String,
    /// Image of the bundled runtime, unless a rollout names another.
    #[arg(long, env = "RUNTIME_IMAGE", default_value = "synthex-runtime:dev")]
    runtime_image: String,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Form of the logs.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Watch this namespace only.
    #[arg(long)]
    namespace: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Crd => crd(),
        Command::Run(run) => start(run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("synthex-operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn crd() -> anyhow::Result<()> {
    print!("{}", serde_saphyr::to_string(&OptimizationRollout::crd())?);
    Ok(())
}

#[tokio::main]
async fn start(run: Run) -> anyhow::Result<()> {
    telemetry(run.log_format);
    // An error here means that a provider is installed already, which is all that is wanted.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let stop = CancellationToken::new();
    let health = Health::default();
    let listener = tokio::net::TcpListener::bind(run.listen)
        .await
        .with_context(|| format!("cannot listen on {}", run.listen))?;
    let server = tokio::spawn(server::serve(listener, health.clone(), stop.clone()));

    let client = Client::try_default()
        .await
        .context("no way to the API server: neither a service account nor a kubeconfig")?;
    let defaults = Defaults { runtime_image: run.runtime_image, prometheus_url: run.prometheus_url };
    let context = Arc::new(Context::new(client.clone(), defaults, health.metrics.clone())?);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = installed(&client, run.namespace.as_deref()) => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    let work = tokio::spawn(controller::run(context, run.namespace, stop.clone()));
    health.ready.store(true, Ordering::Relaxed);
    tracing::info!("running");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: finishing what is under way"),
        _ = interrupt.recv() => tracing::info!("SIGINT: finishing what is under way"),
    }
    health.ready.store(false, Ordering::Relaxed);
    stop.cancel();
    if tokio::time::timeout(GRACE, work).await.is_err() {
        tracing::warn!(
            "reconciliations were still under way after {} s; the next start goes on from status",
            GRACE.as_secs()
        );
    }
    server.await??;
    Ok(())
}

/// Waits until the custom resource can be listed where it is to be watched.
async fn installed(client: &Client, namespace: Option<&str>) {
    let api = controller::scoped::<OptimizationRollout>(client, namespace);
    while let Err(error) = api.list(&ListParams::default().limit(1)).await {
        tracing::warn!(%error, "the custom resource cannot be listed; install crds/ or check the operator's RBAC");
        tokio::time::sleep(RETRY).await;
    }
}

fn telemetry(format: LogFormat) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,kube=warn".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
