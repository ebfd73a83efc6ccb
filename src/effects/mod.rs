//! The imperative shell: thin, timed-out, idempotent effects. Everything that talks to Kubernetes, to Prometheus or to pods is
//! here, and nothing here decides.

pub mod apply;
pub mod clock;
pub mod observe;
pub mod prometheus;
pub mod report;

use std::{future::Future, time::Duration};

/// How long one call to the API server may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// An effect that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{verb}: {source}")]
    Kubernetes {
        /// What was tried.
        verb: &'static str,
        /// The client's error.
        source: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{0}: the API server did not answer within 15 s")]
    Timeout(&'static str),
}

impl Error {
    /// Whether somebody else has changed the object meanwhile, so that the decision must be taken again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Kubernetes { source, .. } if matches!(&**source, kube::Error::Api(status) if status.is_conflict()))
    }

    /// Kind of the error, as a closed set of metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            error if error.is_conflict() => "conflict",
            Self::Kubernetes { source, .. } if matches!(&**source, kube::Error::Api(_)) => "api",
            Self::Kubernetes { .. } => "transport",
        }
    }
}

pub(crate) async fn timed<T>(
    verb: &'static str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, Error> {
    tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .map_err(|_| Error::Timeout(verb))?
        .map_err(|source| Error::Kubernetes { verb, source: Box::new(source) })
}
