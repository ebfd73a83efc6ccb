//! The imperative shell: thin, timed-out, idempotent effects. Everything that talks to Kubernetes, to Prometheus or to pods is
//! here, and nothing here decides.

pub mod apply;
pub mod clock;
pub mod observe;
pub mod prometheus;
pub mod report;

use std::{error::Error as StdError, future::Future, iter, time::Duration};

use kube::core::Status;

/// How long one call to the API server may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// An effect that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{verb}: {}", told(.error))]
    Kubernetes {
        /// What was tried.
        verb: &'static str,
        /// The client's error.
        error: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{0}: the API server did not answer within 15 s")]
    Timeout(&'static str),
}

impl Error {
    /// What the API server answered, where it refused.
    fn refusal(&self) -> Option<&Status> {
        match self {
            Self::Kubernetes { error, .. } => match &**error {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::Timeout(_) => None,
        }
    }

    /// Whether somebody else has changed the object meanwhile, so that the decision must be taken again.
    pub fn is_conflict(&self) -> bool {
        self.refusal().is_some_and(Status::is_conflict)
    }

    /// What the API server says where it refuses a request for what is in it, and will again until somebody changes something. It
    /// calls an unknown field in an apply, and a webhook that fails, its own error (500).
    pub fn refused(&self) -> Option<String> {
        let lasting = |status: &&Status| ![404, 408, 409, 429, 502, 503, 504].contains(&status.code);
        self.refusal().filter(lasting).map(|_| self.to_string())
    }

    /// Kind of the error, as a closed set of metric labels.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            error if error.is_conflict() => "conflict",
            error if error.refusal().is_some() => "api",
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
        .map_err(|error| Error::Kubernetes { verb, error: Box::new(error) })
}

/// What the API server says; or the error with its causes, each once, since some repeat what they stem from.
fn told(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error
        && !status.message.is_empty()
    {
        return status.message.clone();
    }
    let mut told = String::new();
    for cause in with_sources(error).map(ToString::to_string) {
        if !told.contains(&cause) {
            told = if told.is_empty() { cause } else { format!("{told}: {cause}") };
        }
    }
    told
}

/// An error and what it stems from.
fn with_sources<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    iter::successors(Some(error), |error| (*error).source())
}
