//! `/livez`, `/readyz` and `/metrics`. Cheap, so that a busy controller never looks dead.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Content type of the OpenMetrics text format.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the server shows.
#[derive(Clone, Default)]
pub struct Health {
    /// Whether the resource could be listed and the controller runs.
    pub ready: Arc<AtomicBool>,
    /// The operator's metrics.
    pub metrics: Arc<Metrics>,
}

/// Serves until `stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, health: Health, stop: CancellationToken) -> std::io::Result<()> {
    let app = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route(
            "/metrics",
            get(|State(health): State<Health>| async move {
                ([(CONTENT_TYPE, OPENMETRICS)], health.metrics.text())
            }),
        )
        .with_state(health);
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn ready(State(health): State<Health>) -> impl IntoResponse {
    match health.ready.load(Ordering::Relaxed) {
        true => (StatusCode::OK, "ok"),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the custom resource cannot be listed yet; is the CRD installed?",
        ),
    }
}
