//! One query to many experts: cache, call, deadline.
//!
//! Knows queries, caches and connections; knows nothing of the client's HTTP. Never fails as a whole: each expert has
//! an answer or a failure of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::join_all;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request,
    header::{ACCEPT, CONTENT_TYPE, HOST, HeaderName, HeaderValue},
};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use tokio::time::timeout_at;

use crate::{
    cache::Key,
    connections,
    metrics::{Metrics, Outcome},
    query::{Query, Tree},
    state::{Expert, Snapshot},
};

/// What one expert said to a query.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) expert: Arc<Expert>,
    pub(crate) result: Result<Arc<RawValue>, Failure>,
    pub(crate) cached: bool,
    pub(crate) took: Duration,
}

/// Why an expert has no answer.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    pub(crate) detail: String,
}

/// The bodies for the experts: one that all share, or a tree to be copied for each.
enum Bodies {
    Shared(Bytes, Option<[u8; 32]>),
    Copied(Box<Tree>, bool),
}

impl Bodies {
    /// The body for the next expert, and its digest if answers may be cached.
    fn next(&self) -> (Bytes, Option<[u8; 32]>) {
        match self {
            Self::Shared(body, digest) => (body.clone(), *digest),
            Self::Copied(tree, digest) => {
                let copy = tree.clone();
                let mut body = Vec::new();
                copy.render(&mut body);
                let digest = digest.then(|| Sha256::digest(&body).into());
                (Bytes::from(body), digest)
            }
        }
    }
}

/// Asks `experts`, all at once, and waits for each until it answers, fails or its time is over.
pub(crate) async fn ask(
    snapshot: &Snapshot,
    metrics: &Metrics,
    query: &Query<'_>,
    experts: Vec<Arc<Expert>>,
    id: &str,
    started: Instant,
) -> Vec<Answer> {
    let bodies = match &snapshot.buffers {
        Some(_) => {
            let mut body = snapshot.buffer();
            query.render(&mut body);
            let digest = (!query.no_cache).then(|| Sha256::digest(body.as_slice()).into());
            Bodies::Shared(body.freeze(), digest)
        }
        None => Bodies::Copied(Box::new(query.to_tree()), !query.no_cache),
    };
    let deadline = started + snapshot.config.dispatch.deadline;
    // Only visible characters, as our own ids have.
    let id = HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("-"));

    join_all(experts.into_iter().map(|expert| {
        let (body, digest) = bodies.next();
        let id = id.clone();
        async move {
            let started = Instant::now();
            let key = digest.map(|body| Key { expert: expert.identity.clone(), body });
            if let Some(key) = &key {
                let hit = snapshot.cache.get(key, started);
                if hit.is_some() { &metrics.cache_hit } else { &metrics.cache_miss }.inc();
                if let Some(answer) = hit {
                    return Answer { expert, result: Ok(answer), cached: true, took: started.elapsed() };
                }
            }
            let result = call(&expert, body, id, started, deadline).await;
            let took = started.elapsed();
            expert.metrics.count(result.as_ref().map_or_else(|failure| failure.outcome, |_| Outcome::Ok));
            expert.metrics.duration.observe(took.as_secs_f64());
            match (&result, key) {
                (Ok(answer), Some(key)) => snapshot.cache.put(key, answer.clone(), Instant::now()),
                (Ok(_), None) => {}
                (Err(failure), _) => {
                    tracing::debug!(
                        expert = expert.config.name,
                        outcome = failure.outcome.as_str(),
                        failure.detail
                    );
                }
            }
            Answer { expert, result, cached: false, took }
        }
    }))
    .await
}

/// One call, within the expert's time-out and the query's deadline.
async fn call(
    expert: &Expert,
    body: Bytes,
    id: HeaderValue,
    started: Instant,
    deadline: Instant,
) -> Result<Arc<RawValue>, Failure> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = expert.path.clone();
    let headers: &mut HeaderMap = request.headers_mut();
    headers.insert(HOST, expert.host.clone());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(HeaderName::from_static("x-request-id"), id);

    let limit = deadline.min(started + expert.config.timeout);
    let fail = |outcome, detail| Err(Failure { outcome, detail });
    let answer = match timeout_at(limit.into(), expert.route.send(request, &expert.metrics)).await {
        Ok(Ok(answer)) => answer,
        Err(_) => return fail(Outcome::Timeout, format!("no answer within {:?}", limit - started)),
        Ok(Err(error)) => {
            let outcome = match error {
                connections::Error::Busy(_) => Outcome::Busy,
                connections::Error::Connect(_) | connections::Error::Broken(_) => Outcome::Connect,
                connections::Error::TooLarge => Outcome::Invalid,
            };
            return fail(outcome, error.to_string());
        }
    };
    if !answer.status.is_success() {
        return fail(Outcome::Status, format!("the expert answered {}", answer.status));
    }
    match serde_json::from_slice::<Box<RawValue>>(&answer.body) {
        Ok(json) => Ok(Arc::from(json)),
        Err(error) => fail(Outcome::Invalid, format!("the answer is no JSON document: {error}")),
    }
}
