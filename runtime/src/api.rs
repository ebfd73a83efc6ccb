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
use http_body_util::{BodyExt, Either, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{
        ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER,
        WWW_AUTHENTICATE,
    },
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

mod admission;
mod chat;

pub(crate) use admission::Admission;
use admission::Denied;

/// An answer: whole in memory, or an expert's on its way.
pub(crate) type Reply = Response<Either<Full<Bytes>, chat::Passing>>;

/// The two ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Port {
    Serving,
    Admin,
}

/// All that there is to be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Queries,
    ChatCompletions,
    OpenApi,
    Livez,
    Readyz,
    Metrics,
    Config,
    Schema,
    Points,
}

impl Route {
    pub(crate) const ALL: [Self; 9] = [
        Self::Queries,
        Self::ChatCompletions,
        Self::OpenApi,
        Self::Livez,
        Self::Readyz,
        Self::Metrics,
        Self::Config,
        Self::Schema,
        Self::Points,
    ];

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Queries => "/v1/queries",
            Self::ChatCompletions => "/v1/chat/completions",
            Self::OpenApi => "/openapi.json",
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
            Self::Metrics => "/metrics",
            Self::Config => "/config",
            Self::Schema => "/schema",
            Self::Points => "/points",
        }
    }

    pub(crate) fn is_on(self, port: Port) -> bool {
        match self {
            Self::Queries | Self::ChatCompletions | Self::OpenApi => port == Port::Serving,
            Self::Livez | Self::Readyz => true,
            Self::Metrics | Self::Config | Self::Schema | Self::Points => port == Port::Admin,
        }
    }

    /// What it may be asked with; where that is `GET`, also `HEAD`.
    pub(crate) fn method(self) -> Method {
        match self {
            Self::Queries | Self::ChatCompletions => Method::POST,
            _ => Method::GET,
        }
    }
}

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
pub(crate) struct Refusal {
    status: StatusCode,
    kind: &'static str,
    title: &'static str,
    detail: Cow<'static, str>,
    verdict: Verdict,
    /// When it is worth to ask again.
    after: Option<Duration>,
    /// The body stays unread: the connection cannot be used again.
    close: bool,
}

impl Refusal {
    fn invalid(status: StatusCode, kind: &'static str, title: &'static str, detail: String) -> Self {
        let close = matches!(
            status,
            StatusCode::PAYLOAD_TOO_LARGE
                | StatusCode::REQUEST_TIMEOUT
                | StatusCode::UNAUTHORIZED
                | StatusCode::TOO_MANY_REQUESTS
        );
        Self { status, kind, title, detail: detail.into(), verdict: Verdict::Invalid, after: None, close }
    }

    fn as_problem(&self) -> Reply {
        self.finish(problem(self.status, self.kind, self.title, Cow::Borrowed(&self.detail)))
    }

    fn in_openai_shape(&self) -> Reply {
        let body = chat::error(self.status, self.kind, &self.detail);
        self.finish(reply(self.status, JSON, body.into()))
    }

    fn finish(&self, mut reply: Reply) -> Reply {
        if let Some(after) = self.after {
            retry_after(&mut reply, after);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            reply.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            close(&mut reply);
        }
        reply
    }
}

/// One query in flight, until it is dropped.
pub(crate) struct InFlight(Arc<Runtime>);

impl InFlight {
    fn enter(runtime: &Arc<Runtime>, max: u32) -> Option<Self> {
        let before = runtime.inflight.fetch_add(1, Ordering::Relaxed);
        runtime.metrics.inflight.inc();
        let entered = Self(runtime.clone());
        (before < max as usize).then_some(entered)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.inflight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.inflight.dec();
    }
}

/// Lets a query in: by its key, its rate, and by how many there are already.
fn admit(
    runtime: &Arc<Runtime>,
    snapshot: &Snapshot,
    headers: &HeaderMap,
    now: Instant,
) -> Result<InFlight, Refusal> {
    snapshot.admission.admit(headers, now).map_err(|denied| match denied {
        Denied::Key => Refusal::invalid(
            StatusCode::UNAUTHORIZED,
            "key",
            "The API key is missing or not known",
            "send it as authorization: Bearer <key>, or as x-api-key: <key>".to_owned(),
        ),
        Denied::Rate(after) => Refusal {
            after: Some(after),
            verdict: Verdict::Shed,
            ..Refusal::invalid(
                StatusCode::TOO_MANY_REQUESTS,
                "rate",
                "Too many queries",
                "more queries came than server.rateLimit allows; ask again later".to_owned(),
            )
        },
    })?;
    let max = snapshot.config.server.max_in_flight;
    InFlight::enter(runtime, max).ok_or_else(|| Refusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        kind: "overloaded",
        title: "Too many queries in flight",
        detail: format!("{max} queries are being served; try again").into(),
        verdict: Verdict::Shed,
        after: Some(Duration::from_secs(1)),
        close: true,
    })
}

/// Answers a request. `body_timeout` is how long a client may take to send its body.
pub(crate) async fn serve(
    runtime: &Arc<Runtime>,
    port: Port,
    request: Request<Incoming>,
    body_timeout: Duration,
) -> Reply {
    let path = request.uri().path();
    let Some(route) = Route::ALL.into_iter().find(|route| route.is_on(port) && route.path() == path) else {
        return not_found(port);
    };
    match (route.method(), request.method()) {
        (Method::GET, &Method::GET | &Method::HEAD) => {}
        (Method::GET, _) => return not_allowed("GET, HEAD"),
        (method, asked) if method == *asked => {}
        _ => return not_allowed("POST"),
    }
    match route {
        Route::Queries => queries(runtime, request, body_timeout).await,
        Route::ChatCompletions => chat::completions(runtime, request, body_timeout).await,
        Route::OpenApi => reply(StatusCode::OK, JSON, Bytes::from_static(OPENAPI.as_bytes())),
        // Liveness says that the process answers at all; readiness, that it wants queries.
        Route::Livez => reply(StatusCode::OK, TEXT, "ok\n".into()),
        Route::Readyz => match runtime.draining.load(Ordering::Relaxed) {
            false => reply(StatusCode::OK, TEXT, "ok\n".into()),
            true => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, "draining\n".into()),
        },
        Route::Metrics => reply(StatusCode::OK, metrics::CONTENT_TYPE, runtime.encode_metrics().into()),
        Route::Config => config(runtime),
        Route::Schema => reply(StatusCode::OK, SCHEMA, Config::schema().into()),
        Route::Points => {
            let points: serde_json::Map<_, _> = runtime
                .metrics
                .store
                .points()
                .into_iter()
                .map(|(series, points)| (series, points.iter().map(point).collect()))
                .collect();
            reply(StatusCode::OK, JSON, json!(points).to_string().into())
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

/// What is in force.
fn config(runtime: &Runtime) -> Reply {
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

async fn queries(runtime: &Arc<Runtime>, request: Request<Incoming>, body_timeout: Duration) -> Reply {
    let snapshot = runtime.snapshot();
    match query(runtime, &snapshot, request, body_timeout).await {
        Ok(reply) => reply,
        Err(refusal) => {
            runtime.metrics.count(refusal.verdict);
            refusal.as_problem()
        }
    }
}

async fn query(
    runtime: &Arc<Runtime>,
    snapshot: &Snapshot,
    request: Request<Incoming>,
    body_timeout: Duration,
) -> Result<Reply, Refusal> {
    let started = Instant::now();
    let _in_flight = admit(runtime, snapshot, request.headers(), started)?;
    let body = read(snapshot, request.into_body(), body_timeout).await?;
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
        retry_after(&mut reply, Duration::from_secs(1));
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

/// Reads a body, up to the limit and within its time.
async fn read(snapshot: &Snapshot, body: Incoming, time: Duration) -> Result<Bytes, Refusal> {
    tokio::time::timeout(time, read_whole(snapshot, body)).await.unwrap_or_else(|_| {
        Err(Refusal::invalid(
            StatusCode::REQUEST_TIMEOUT,
            "slow-body",
            "The body came too slowly",
            format!("the whole body must arrive within {time:?}"),
        ))
    })
}

async fn read_whole(snapshot: &Snapshot, mut body: Incoming) -> Result<Bytes, Refusal> {
    let limit = usize::try_from(snapshot.config.server.body_limit).unwrap_or(usize::MAX);
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

/// The description of this API, which a test holds to it.
const OPENAPI: &str = include_str!("api/openapi.json");

const JSON: &str = "application/json";
const SCHEMA: &str = "application/schema+json";
const PROBLEM: &str = "application/problem+json";
const TEXT: &str = "text/plain; charset=utf-8";

fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut reply = Response::new(Either::Left(Full::new(body)));
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

fn not_found(port: Port) -> Reply {
    let known = Route::ALL.into_iter().filter(|route| route.is_on(port));
    let known: Vec<String> = known.map(|route| format!("{} {}", route.method(), route.path())).collect();
    let detail = format!("there are: {}", known.join(", "));
    problem(StatusCode::NOT_FOUND, "not-found", "There is nothing here", detail.into())
}

fn not_allowed(allowed: &'static str) -> Reply {
    let detail = format!("allowed here: {allowed}");
    let mut reply =
        problem(StatusCode::METHOD_NOT_ALLOWED, "method", "The method does not fit the path", detail.into());
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}

/// In whole seconds, and never "at once".
fn retry_after(reply: &mut Reply, after: Duration) {
    let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
}

/// Makes the reply the last one on its connection.
pub(crate) fn close(reply: &mut Reply) {
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}

/// Names this process in a reply.
pub(crate) fn sign(reply: &mut Reply, instance: &HeaderValue) {
    reply.headers_mut().insert(HeaderName::from_static("x-synthex-instance"), instance.clone());
}
