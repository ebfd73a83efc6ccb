//! What clients and operators see: the routes of both ports, their answers and their errors (RFC 9457).
//!
//! Bounds everything that a client controls: body size, time to send it, queries at once. Sockets, and the time to
//! send a header, belong to `server`.

use std::{
    borrow::Cow,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER},
};
use serde::Serialize;
use serde_json::{json, value::RawValue};

use crate::{
    config::Config,
    dispatch::{self, Answer},
    experts::Expert,
    metrics::{self, Outcome, Verdict},
    monitoring::Point,
    pool::Buffer,
    query::Query,
    state::{Runtime, Snapshot},
};

/// An answer, whole in memory.
pub(crate) type Reply = Response<Full<Bytes>>;

/// An answer to a query. Fields that do not apply are left out.
#[derive(Serialize)]
struct Answers<'a> {
    id: &'a str,
    answers: Vec<Row<'a>>,
    partial: bool,
}

/// An error, as RFC 9457 has it.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers: Vec<Row<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    expert: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a str>,
    cached: bool,
    duration_ms: f64,
}

impl Row<'_> {
    /// Bytes that it takes when it is written, or somewhat more.
    fn room(&self) -> usize {
        self.expert.len()
            + self.answer.map_or(0, |json| json.get().len())
            + self.detail.map_or(0, str::len)
            + 128
    }
}

impl<'a> From<&'a Answer> for Row<'a> {
    fn from(answer: &'a Answer) -> Self {
        let (ok, failure) = match &answer.result {
            Ok(ok) => (Some(&**ok), None),
            Err(failure) => (None, Some(failure)),
        };
        Self {
            expert: &answer.expert.config.name,
            status: if failure.is_none() { "ok" } else { "error" },
            answer: ok,
            error: failure.map(|f| f.outcome.as_str()),
            detail: failure.map(|f| f.detail.as_str()),
            cached: answer.cached,
            duration_ms: answer.took.as_micros() as f64 / 1e3,
        }
    }
}

/// Why a query gets no answers.
struct Refusal {
    status: StatusCode,
    kind: &'static str,
    title: &'static str,
    detail: Cow<'static, str>,
    verdict: Verdict,
}

impl Refusal {
    fn invalid(status: StatusCode, kind: &'static str, title: &'static str, detail: String) -> Self {
        Self { status, kind, title, detail: detail.into(), verdict: Verdict::Invalid }
    }
}

/// One query in flight, until it is dropped.
struct InFlight<'a>(&'a Runtime);

impl<'a> InFlight<'a> {
    fn enter(runtime: &'a Runtime, max: u32) -> Option<Self> {
        let before = runtime.inflight.fetch_add(1, Ordering::Relaxed);
        runtime.metrics.inflight.inc();
        let entered = Self(runtime);
        (before < max as usize).then_some(entered)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.inflight.dec();
    }
}

/// Answers a request on the serving port. `body_timeout` is how long a client may take to send its body.
pub(crate) async fn serve(runtime: &Runtime, request: Request<Incoming>, body_timeout: Duration) -> Reply {
    match (request.uri().path(), request.method()) {
        ("/v1/queries", &Method::POST) => queries(runtime, request, body_timeout).await,
        ("/v1/queries", _) => not_allowed("POST"),
        _ => health(runtime, &request)
            .unwrap_or_else(|| not_found("POST /v1/queries, GET /livez, GET /readyz")),
    }
}

/// Answers a request on the admin port.
pub(crate) fn admin(runtime: &Runtime, request: &Request<Incoming>) -> Reply {
    if let Some(reply) = health(runtime, request) {
        return reply;
    }
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/config" | "/points" | "/schema") {
        return not_found("GET /metrics, GET /config, GET /schema, GET /points, GET /livez, GET /readyz");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return not_allowed("GET, HEAD");
    }
    match path {
        "/metrics" => reply(StatusCode::OK, metrics::CONTENT_TYPE, runtime.encode_metrics().into()),
        "/schema" => reply(StatusCode::OK, SCHEMA, Config::schema().into()),
        "/points" => {
            let points: serde_json::Map<_, _> = runtime
                .metrics
                .store
                .points()
                .into_iter()
                .map(|(series, points)| (series, points.iter().map(point).collect()))
                .collect();
            reply(StatusCode::OK, JSON, json!(points).to_string().into())
        }
        _ => {
            let snapshot = runtime.snapshot();
            let rejected = runtime.rejected();
            let rejected = rejected.map(|r| json!({"hash": r.hash, "reason": r.reason}));
            let shown = json!({
                "hash": snapshot.hash,
                "generation": snapshot.generation,
                "optimizations": snapshot.config.optimizations,
                "rejected": rejected,
            });
            reply(StatusCode::OK, JSON, shown.to_string().into())
        }
    }
}

/// A recorded point: seconds since the epoch, value and, with `preAggregation`, what was seen since the last one.
fn point(point: &Point) -> serde_json::Value {
    match &point.summary {
        None => json!([point.time, point.value]),
        Some(s) => json!([point.time, point.value, {
            "count": s.count, "sum": s.sum, "min": s.min, "max": s.max, "p50": s.p50, "p99": s.p99,
            "ddsketch": s.hex(),
        }]),
    }
}

/// Liveness says that the process answers at all; readiness, that it wants queries.
fn health(runtime: &Runtime, request: &Request<Incoming>) -> Option<Reply> {
    let ready = match request.uri().path() {
        "/livez" => true,
        "/readyz" => !runtime.draining.load(Ordering::Relaxed),
        _ => return None,
    };
    Some(match *request.method() {
        Method::GET | Method::HEAD if ready => reply(StatusCode::OK, TEXT, "ok\n".into()),
        Method::GET | Method::HEAD => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "draining\n".into()),
        _ => not_allowed("GET, HEAD"),
    })
}

async fn queries(runtime: &Runtime, request: Request<Incoming>, body_timeout: Duration) -> Reply {
    let started = Instant::now();
    let snapshot = runtime.snapshot();
    let Some(_in_flight) = InFlight::enter(runtime, snapshot.config.server.max_in_flight) else {
        runtime.metrics.count(Verdict::Shed);
        let mut reply = problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "overloaded",
            "Too many queries in flight",
            format!("{} queries are being served; try again", snapshot.config.server.max_in_flight).into(),
        );
        retry_later(&mut reply);
        // The body stays unread: the connection cannot be used again.
        close(&mut reply);
        return reply;
    };
    match query(runtime, &snapshot, request, body_timeout, started).await {
        Ok(reply) => reply,
        Err(refusal) => {
            runtime.metrics.count(refusal.verdict);
            let mut reply = problem(refusal.status, refusal.kind, refusal.title, refusal.detail);
            if matches!(refusal.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
                close(&mut reply);
            }
            reply
        }
    }
}

async fn query(
    runtime: &Runtime,
    snapshot: &Snapshot,
    request: Request<Incoming>,
    body_timeout: Duration,
    started: Instant,
) -> Result<Reply, Refusal> {
    let limit = usize::try_from(snapshot.config.server.body_limit).unwrap_or(usize::MAX);
    let read = read(snapshot, request.into_body(), limit);
    let body = tokio::time::timeout(body_timeout, read).await.map_err(|_| {
        Refusal::invalid(
            StatusCode::REQUEST_TIMEOUT,
            "slow-body",
            "The body came too slowly",
            format!("the whole body must arrive within {body_timeout:?}"),
        )
    })??;
    let query = Query::parse(&body).map_err(|detail| {
        Refusal::invalid(StatusCode::BAD_REQUEST, "invalid-query", "The query cannot be read", detail)
    })?;
    let experts = choose(snapshot, &query).map_err(|detail| {
        Refusal::invalid(StatusCode::BAD_REQUEST, "invalid-query", "The query cannot be served", detail)
    })?;

    let id = runtime.id();
    let quorum = snapshot.config.dispatch.quorum.map_or(experts.len(), |n| experts.len().min(n as usize));
    let answers = dispatch::ask(snapshot, &runtime.metrics, &query, experts, &id, started).await;
    let ok = answers.iter().filter(|answer| answer.result.is_ok()).count();
    let partial = ok < answers.len();
    let verdict = match (ok >= quorum, partial) {
        (false, _) => Verdict::Error,
        (true, true) => Verdict::Partial,
        (true, false) => Verdict::Ok,
    };
    let mut buffer = snapshot.buffer();
    let rows: Vec<Row<'_>> = answers.iter().map(Row::from).collect();
    // Growing by doubling would make most buffers too large for the pool to keep.
    buffer.reserve_exact(rows.iter().map(Row::room).sum::<usize>() + 256);
    let (status, body) = if verdict == Verdict::Error {
        missed(&id, &answers, rows, ok, quorum, buffer)
    } else {
        // Strings, numbers and raw JSON written to memory: serde_json has no error for these.
        let written = serde_json::to_writer(&mut *buffer, &Answers { id: &id, answers: rows, partial });
        debug_assert!(written.is_ok());
        (StatusCode::OK, buffer.freeze())
    };
    if let Some(collector) = &snapshot.collector {
        let (requester, outcome) = (&query.requester, verdict.as_str());
        runtime.results.push(collector, requester, outcome, started.elapsed(), &body);
    }
    let mut reply = reply(status, if status == StatusCode::OK { JSON } else { PROBLEM }, body);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        retry_later(&mut reply);
    }
    runtime.metrics.count_of(&query.requester, verdict);
    runtime.metrics.query_duration.observe(started.elapsed().as_secs_f64());
    Ok(reply)
}

/// The error for a missed quorum: the status tells what the failures have in common, the body has all answers.
fn missed(
    id: &str,
    answers: &[Answer],
    rows: Vec<Row<'_>>,
    ok: usize,
    quorum: usize,
    mut buffer: Buffer,
) -> (StatusCode, Bytes) {
    let failures = || answers.iter().filter_map(|answer| answer.result.as_ref().err().map(|f| f.outcome));
    let (status, kind, title) = if failures().all(|o| o == Outcome::Busy) {
        (StatusCode::SERVICE_UNAVAILABLE, "busy", "No connection to the experts was free in time")
    } else if failures().all(|o| matches!(o, Outcome::Busy | Outcome::Open)) {
        (StatusCode::SERVICE_UNAVAILABLE, "unwell", "The experts are left alone, since they failed")
    } else if failures().all(|o| matches!(o, Outcome::Busy | Outcome::Timeout)) {
        (StatusCode::GATEWAY_TIMEOUT, "timeout", "The experts did not answer in time")
    } else {
        (StatusCode::BAD_GATEWAY, "quorum", "Too few experts answered")
    };
    let detail = format!("{ok} of {} experts answered; the quorum is {quorum}", answers.len());
    let body = Problem {
        r#type: problem_type(kind),
        title,
        status: status.as_u16(),
        detail: detail.into(),
        id: Some(id),
        answers: rows,
    };
    let written = serde_json::to_writer(&mut *buffer, &body);
    debug_assert!(written.is_ok());
    (status, buffer.freeze())
}

/// Reads a body up to the limit.
async fn read(snapshot: &Snapshot, mut body: Incoming, limit: usize) -> Result<Bytes, Refusal> {
    let too_large = || {
        Refusal::invalid(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            "The body is too large",
            format!("at most {limit} bytes are read (server.bodyLimit)"),
        )
    };
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let mut first = Bytes::new();
    let mut whole: Option<Buffer> = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            Refusal::invalid(
                StatusCode::BAD_REQUEST,
                "broken-body",
                "The body cannot be read",
                format!("the connection or its encoding broke within the body: {error}"),
            )
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + whole.as_ref().map_or(0, |b| b.len()) + data.len() > limit {
            return Err(too_large());
        }
        // Most bodies come in one piece, which needs no copy.
        match &mut whole {
            None if first.is_empty() => first = data,
            None => {
                let mut buffer = snapshot.buffer();
                buffer.extend_from_slice(&first);
                buffer.extend_from_slice(&data);
                first = Bytes::new();
                whole = Some(buffer);
            }
            Some(buffer) => buffer.extend_from_slice(&data),
        }
    }
    Ok(whole.map_or(first, Buffer::freeze))
}

/// The experts that a query names, or all.
fn choose(snapshot: &Snapshot, query: &Query<'_>) -> Result<Vec<Arc<Expert>>, String> {
    let Some(names) = &query.experts else { return Ok(snapshot.experts.clone()) };
    if names.is_empty() {
        return Err("experts is empty; name at least one, or leave it out to ask all".to_owned());
    }
    if names.len() > snapshot.experts.len() {
        return Err(format!(
            "experts has {} names, and there are {} experts",
            names.len(),
            snapshot.experts.len()
        ));
    }
    let mut chosen: Vec<Arc<Expert>> = Vec::with_capacity(names.len());
    for name in names {
        let Some(expert) = snapshot.experts.iter().find(|expert| expert.config.name == **name) else {
            let known: Vec<&str> = snapshot.experts.iter().map(|e| e.config.name.as_str()).collect();
            return Err(format!("there is no expert {name:?}; there are: {}", known.join(", ")));
        };
        if chosen.iter().any(|other| Arc::ptr_eq(other, expert)) {
            return Err(format!("expert {name:?} is named twice"));
        }
        chosen.push(expert.clone());
    }
    Ok(chosen)
}

const JSON: &str = "application/json";
const SCHEMA: &str = "application/schema+json";
const PROBLEM: &str = "application/problem+json";
const TEXT: &str = "text/plain; charset=utf-8";

fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut reply = Response::new(Full::new(body));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}

fn problem_type(kind: &str) -> String {
    format!("urn:synthex:problem:{kind}")
}

fn problem(status: StatusCode, kind: &str, title: &str, detail: Cow<'_, str>) -> Reply {
    let problem = Problem {
        r#type: problem_type(kind),
        title,
        status: status.as_u16(),
        detail,
        id: None,
        answers: Vec::new(),
    };
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    reply(status, PROBLEM, body.into())
}

fn not_found(known: &str) -> Reply {
    problem(StatusCode::NOT_FOUND, "not-found", "There is nothing here", format!("there are: {known}").into())
}

fn not_allowed(allowed: &'static str) -> Reply {
    let detail = format!("allowed here: {allowed}");
    let mut reply =
        problem(StatusCode::METHOD_NOT_ALLOWED, "method", "The method does not fit the path", detail.into());
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}

fn retry_later(reply: &mut Reply) {
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
}

/// Makes the reply the last one on its connection.
pub(crate) fn close(reply: &mut Reply) {
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}

/// Names this process in a reply.
pub(crate) fn sign(reply: &mut Reply, instance: &HeaderValue) {
    reply.headers_mut().insert(HeaderName::from_static("x-synthex-instance"), instance.clone());
}
