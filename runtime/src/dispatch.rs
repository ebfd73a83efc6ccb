//! One query to many experts: cache, call, deadline.
//!
//! Knows queries, caches and experts; knows nothing of the client's HTTP. Never fails as a whole: each expert has an
//! answer or a failure of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::join_all;
use hyper::header::HeaderValue;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::{
    cache::Key,
    experts::{Expert, Failure, Question},
    metrics::{Metrics, Outcome},
    query::{Query, Tree},
    state::Snapshot,
};

/// What one expert said to a query.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) expert: Arc<Expert>,
    pub(crate) result: Result<Arc<RawValue>, Failure>,
    pub(crate) cached: bool,
    pub(crate) took: Duration,
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
        let question = Question { query, body, id: id.clone() };
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
            let result = expert.ask(question, started, deadline).await;
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
