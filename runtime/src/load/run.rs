//! An open-loop load generator: arrivals follow a plan and never wait for answers.
//!
//! A latency is counted from the planned arrival, so an answer that keeps later requests waiting is paid for by each
//! of them (no coordinated omission). Requests in flight are bounded; an arrival above the bound counts as dropped.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    client::conn::http1::{self, SendRequest},
    header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use serde::Serialize;
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout_at},
};

use super::{Random, histogram::Histogram};

/// Answers of this process are counted under their own name for so many instances; the rest are "other".
const MAX_INSTANCES: usize = 200;
/// Requests in flight to one target, whatever rate and time-out ask for.
const MAX_IN_FLIGHT: usize = 10_000;
/// Idle connections kept to one target.
const MAX_IDLE: usize = 512;
/// How often a target that is waited for is tried.
const WAIT_STEP: Duration = Duration::from_millis(50);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// When requests arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// At random, independently of each other, as users do.
    Poisson,
    /// Evenly spaced.
    Uniform,
}

/// What a request is sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Connection {
    /// A connection of its own, so that a Service spreads requests evenly.
    Fresh,
    /// One that is idle, where there is one.
    Reuse,
}

/// What is sent where.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `http://host[:port]` of each target.
    pub targets: Vec<Uri>,
    /// Requests a second to each target; above zero.
    pub rate: f64,
    /// When requests arrive.
    pub arrivals: Arrivals,
    /// How long a target may take to accept a first connection before requests are sent all the same.
    pub wait: Duration,
    /// How long requests are sent; `None`: until stopped.
    pub duration: Option<Duration>,
    /// How long a request may take, from its planned arrival.
    pub timeout: Duration,
    /// What a request is sent on.
    pub connection: Connection,
    /// Number of different queries; 0: every query is new.
    pub distinct: u64,
    /// Bytes of content in a query.
    pub size: usize,
    /// Makes arrivals and queries the same in each run, but for queries that are all new.
    pub seed: u64,
}

/// Requests that were counted, by how they ended.
#[derive(Debug, Clone)]
pub struct Totals {
    family: Family<Vec<(&'static str, &'static str)>, Counter>,
    ok: Counter,
    failed: Counter,
    dropped: Counter,
}

impl Default for Totals {
    fn default() -> Self {
        let family = Family::<Vec<(&'static str, &'static str)>, Counter>::default();
        let counter = |outcome| family.get_or_create_owned(&vec![("outcome", outcome)]);
        Self { ok: counter("ok"), failed: counter("failed"), dropped: counter("dropped"), family }
    }
}

#[derive(Debug, Default, Clone, Serialize)]
struct Count {
    ok: u64,
    failed: u64,
}

#[derive(Debug, Default)]
struct Stats {
    sent: u64,
    ok: u64,
    failed: u64,
    dropped: u64,
    by_instance: BTreeMap<String, Count>,
    latency: Histogram,
}

impl Stats {
    /// Counts an answer. `instance` is who gave it, "-" for none.
    fn answered(&mut self, instance: &str, ok: bool, latency: Duration) {
        let known = self.by_instance.contains_key(instance) || self.by_instance.len() < MAX_INSTANCES;
        let count = self.by_instance.entry(if known { instance } else { "other" }.to_owned()).or_default();
        match ok {
            true => (self.ok, count.ok) = (self.ok + 1, count.ok + 1),
            false => (self.failed, count.failed) = (self.failed + 1, count.failed + 1),
        }
        self.latency.record(latency);
    }

    fn line(&self, target: &Uri, is_final: bool) -> String {
        let mut line = json!({
            "time": super::rfc3339(SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()),
            "target": target.to_string().trim_end_matches('/'),
            "sent": self.sent,
            "ok": self.ok,
            "failed": self.failed,
            "dropped": self.dropped,
            "byInstance": self.by_instance,
            "p50Ms": self.latency.quantile_ms(0.5),
            "p99Ms": self.latency.quantile_ms(0.99),
        });
        if is_final {
            line["final"] = true.into();
        }
        line.to_string()
    }
}

/// One target, its idle connections and its counts.
struct Target {
    base: Uri,
    host: String,
    port: u16,
    connection: Connection,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    stats: Mutex<Stats>,
    totals: Totals,
}

/// Sends requests until the plan's duration is over or `stop` completes, then waits for the last answers. `report`
/// is given a JSON line per target each second, and a last one. Errors only for targets that are no HTTP URL.
pub async fn run(
    plan: Plan,
    totals: Totals,
    stop: impl Future<Output = ()>,
    mut report: impl FnMut(String),
) -> anyhow::Result<()> {
    let targets = plan.targets.iter().map(|base| Target::new(base, plan.connection, totals.clone()));
    let targets: Vec<Arc<Target>> = targets.collect::<anyhow::Result<_>>()?;
    let started = Instant::now();
    let mut senders = tokio::task::JoinSet::new();
    for (i, target) in targets.iter().enumerate() {
        senders.spawn(send(target.clone(), plan.clone(), plan.seed.wrapping_add(i as u64)));
    }
    let mut seconds = interval_at(started + Duration::from_secs(1), Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            ended = senders.join_next() => if ended.is_none() { break },
            _ = seconds.tick() => targets.iter().for_each(|target| report(target.line(false))),
        }
    }
    senders.shutdown().await;
    // Requests hold their target; when only ours is left, all are answered or timed out.
    let patience = Instant::now() + plan.timeout + Duration::from_secs(1);
    while targets.iter().any(|target| Arc::strong_count(target) > 1) && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    targets.iter().for_each(|target| report(target.line(true)));
    Ok(())
}

/// Serves `/metrics` and `/livez` until the future is dropped.
pub async fn admin(listener: TcpListener, totals: Totals) {
    let mut registry = Registry::default();
    registry.register("load_requests", "Requests by how they ended", totals.family);
    let registry = Arc::new(registry);
    super::serve(listener, move |request| {
        let registry = registry.clone();
        async move {
            let mut reply = Response::new(Full::default());
            match request.uri().path() {
                "/livez" => *reply.body_mut() = "ok\n".into(),
                "/metrics" => {
                    let mut text = String::new();
                    if text::encode(&mut text, &registry).is_err() {
                        *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    }
                    let content_type = HeaderValue::from_static(crate::metrics::CONTENT_TYPE);
                    reply.headers_mut().insert(CONTENT_TYPE, content_type);
                    *reply.body_mut() = text.into();
                }
                _ => *reply.status_mut() = StatusCode::NOT_FOUND,
            }
            reply
        }
    })
    .await;
}

/// Waits until a target accepts connections, `patience` at most.
async fn reachable(target: &Target, patience: Duration) {
    let connected = async {
        while target.connect().await.is_err() {
            tokio::time::sleep(WAIT_STEP).await;
        }
    };
    if tokio::time::timeout(patience, connected).await.is_err() && !patience.is_zero() {
        tracing::warn!(target = %target.base, ?patience, "the target accepts no connection yet; requests are sent all the same");
    }
}

/// Follows the plan for one target.
async fn send(target: Arc<Target>, plan: Plan, seed: u64) {
    reachable(&target, plan.wait).await;
    let mut random = Random(seed);
    let bound = (plan.rate * plan.timeout.as_secs_f64()).ceil().max(1.0) as usize + 16;
    let slots = Arc::new(Semaphore::new(bound.min(MAX_IN_FLIGHT)));
    let end = plan.duration.map(|duration| Instant::now() + duration);
    let mut arrival = Instant::now();
    // Unlike those of every other run and target, which a cache may have seen.
    let run = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |age| age.as_nanos() as u64);
    let mut fresh = Random(run ^ seed.rotate_left(32) ^ u64::from(std::process::id()));
    loop {
        let gap = match plan.arrivals {
            Arrivals::Uniform => 1.0,
            Arrivals::Poisson => -random.unit().ln(),
        };
        arrival += Duration::from_secs_f64(gap / plan.rate);
        if end.is_some_and(|end| arrival >= end) {
            return;
        }
        let query = if plan.distinct == 0 { fresh.next() } else { random.next() % plan.distinct };
        // A plan that is late catches up without sleeping; the latencies tell.
        if arrival > Instant::now() {
            sleep_until(arrival).await;
        }
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            target.stats().dropped += 1;
            target.totals.dropped.inc();
            continue;
        };
        target.stats().sent += 1;
        let body = body(query, plan.size);
        let target = target.clone();
        tokio::spawn(async move {
            let answer = timeout_at(arrival + plan.timeout, target.ask(body)).await;
            let (instance, ok) = match answer {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    tracing::debug!(error = format!("{error:#}"), "no answer");
                    ("-".to_owned(), false)
                }
                Err(_) => ("-".to_owned(), false),
            };
            target.stats().answered(&instance, ok, arrival.elapsed());
            if ok { &target.totals.ok } else { &target.totals.failed }.inc();
            drop(slot);
        });
    }
}

/// A query as applications send it: a dozen fields and `size` bytes of content.
fn body(query: u64, size: usize) -> Bytes {
    let body = json!({
        "title": format!("Question {query}"),
        "content": super::filler(query, size),
        "requester": "synthex-load",
        "tags": ["latency", "staging", "question"],
        "metadata": {
            "type": "technical", "priority": "high", "deadline": "2026-11-24T12:00:00Z",
            "createdAt": "2026-11-24T11:00:00Z", "constraints": ["no downtime", "one region", "one page"],
            "service": "shop", "team": "platform", "cluster": "eu-1", "version": "1.4.2",
        },
    });
    Bytes::from(body.to_string())
}

impl Target {
    fn new(base: &Uri, connection: Connection, totals: Totals) -> anyhow::Result<Arc<Self>> {
        let authority = base.authority().filter(|_| base.scheme_str() == Some("http"));
        let authority =
            authority.with_context(|| format!("{base} is no target; write http://host[:port]"))?;
        Ok(Arc::new(Self {
            base: base.clone(),
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            connection,
            idle: Mutex::default(),
            stats: Mutex::default(),
            totals,
        }))
    }

    fn stats(&self) -> std::sync::MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, is_final: bool) -> String {
        self.stats().line(&self.base, is_final)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        if self.connection == Connection::Fresh {
            // Hundreds of connections a second would use up the local ports while they wait in TIME_WAIT.
            stream.set_zero_linger()?;
        }
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Sends one query; gives who answered, and whether with 200.
    async fn ask(&self, body: Bytes) -> anyhow::Result<(String, bool)> {
        let mut sender = None;
        if self.connection == Connection::Reuse {
            loop {
                let Some(mut candidate) = self.idle().pop() else { break };
                if candidate.ready().await.is_ok() {
                    sender = Some(candidate);
                    break;
                }
            }
        }
        let mut sender = match sender {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let mut request = Request::post("/v1/queries").body(Full::new(body))?;
        let authority = self.base.authority().map_or("", |authority| authority.as_str());
        request.headers_mut().insert(HOST, HeaderValue::from_str(authority)?);
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.connection == Connection::Fresh {
            request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let reply = sender.send_request(request).await.context("no answer")?;
        let instance = reply.headers().get("x-synthex-instance").and_then(|name| name.to_str().ok());
        let instance = instance.unwrap_or("-").to_owned();
        let ok = reply.status() == StatusCode::OK;
        let body = Limited::new(reply.into_body(), MAX_ANSWER).collect().await;
        body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?;
        if self.connection == Connection::Reuse && !sender.is_closed() {
            let mut idle = self.idle();
            if idle.len() < MAX_IDLE {
                idle.push(sender);
            }
        }
        Ok((instance, ok))
    }
}
