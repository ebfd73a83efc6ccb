//! The one place that talks HTTP to Prometheus. Every answer, however odd, becomes an [`Answer`] with a name.
//!
//! Must not judge, retry or remember: the next round asks again. Nothing here is without a bound: the time and the size of an
//! answer, its series, and the queries under way. No message shows the user and password of a URL.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error as StdError,
    sync::Arc,
    time::Duration,
};

use reqwest::{Response, StatusCode, Url, redirect};
use serde::{Deserialize, de::IgnoredAny};
use tokio::{sync::Semaphore, time::Instant};

use super::with_sources;
use crate::decision::judge::{Answer, MAX_TICKS, Samples, Series, Tick, excerpt, quote};

/// Most bytes of an answer that are read.
const MAX_BODY: usize = 8 << 20;

/// Most series of an answer that are taken.
const MAX_SERIES: usize = 50_000;

/// Most buckets of native histograms that are taken from an answer, in all samples together: a bucket that a sample does not name is
/// one all the same.
const MAX_POINTS: usize = 4_000_000;

/// Into how many pieces a range is cut whose answer is larger than [`MAX_BODY`]: 8 of them make some 40 MiB in memory at most.
const MAX_PIECES: i64 = 8;

/// Most queries under way at once; the others wait their turn.
const MAX_CONCURRENT: usize = 8;

/// A Prometheus server, or what speaks its HTTP API. Cheap to clone; clones share connections and the bound on queries under way.
#[derive(Clone)]
pub struct Prometheus {
    /// Knows the address, which may hold a user and a password.
    client: prometheus_http_query::Client,
    /// The server's address as it may be shown.
    shown: String,
    timeout: Duration,
    gate: Arc<Semaphore>,
    /// When the round of queries is over, answered or not.
    until: Option<Instant>,
}

/// What became of one request.
enum Fetched {
    /// An answer of Prometheus, whatever is in it.
    Reply(Reply),
    /// It is larger than [`MAX_BODY`].
    TooLong,
    /// None.
    Odd(Answer),
}

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is of no use.
    #[error("the address of Prometheus {0}: give a URL such as http://prometheus.monitoring.svc:9090")]
    Url(&'static str),
    /// TLS could not be set up.
    #[error(
        "the HTTP client for Prometheus cannot be built: {0}; an https address needs CA certificates in the image, or a file of them in SSL_CERT_FILE"
    )]
    Client(String),
}

impl Prometheus {
    /// A client for the server at `url`, of which each query takes `timeout` at most. A path in the URL is kept, as for a server
    /// behind a prefix; a user and a password in it are sent as basic authentication. Proxy settings of the environment are
    /// not followed, nor are redirects.
    ///
    /// # Errors
    /// When the URL is not an http or https URL with a host, or TLS cannot be set up.
    pub fn new(url: &str, timeout: Duration) -> Result<Self, Error> {
        let mut base = Url::parse(url).map_err(|_| Error::Url("is no URL"))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(Error::Url("is not an http or https URL"));
        }
        base.set_query(None);
        base.set_fragment(None);
        base.set_path(base.path().trim_end_matches('/').to_owned().as_str());
        let mut public = base.clone();
        // Setting these fails only on URLs without a host, and http URLs have one.
        let _ = (public.set_username(""), public.set_password(None));
        let shown = public.as_str().trim_end_matches('/').to_owned();

        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .connect_timeout(timeout)
            .timeout(timeout)
            .pool_max_idle_per_host(MAX_CONCURRENT);
        if base.scheme() == "http" {
            // Without this the client needs the system's CA certificates, which a minimal image does not have.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|error| Error::Client(causes(&error)))?;
        let client =
            prometheus_http_query::Client::from(http, base.as_str()).map_err(|_| Error::Url("is no URL"))?;
        Ok(Self { client, shown, timeout, gate: Arc::new(Semaphore::new(MAX_CONCURRENT)), until: None })
    }

    /// A client for one round of queries, all of which together take twice the timeout at most: a server that hangs must not keep the
    /// operator from what it can see without it.
    pub fn round(&self) -> Self {
        Self { until: Some(Instant::now() + 2 * self.timeout), ..self.clone() }
    }

    /// The samples of a query at `start`, `start + step` and so on to `end`: at most [`MAX_TICKS`] ticks, all multiples of `step`.
    pub async fn range(&self, query: &str, start: Tick, end: Tick, step: i64) -> Answer {
        self.range_within(query, start, end, step, None).await
    }

    /// The same, where a sample is given for `lookback` seconds after its time and no longer (Prometheus' own default is 5 minutes).
    pub async fn range_within(
        &self,
        query: &str,
        start: Tick,
        end: Tick,
        step: i64,
        lookback: Option<i64>,
    ) -> Answer {
        let Some(grid) = Grid::new(start, end, step) else {
            return malformed(
                query,
                format!("{start} to {end} by {step} s is not a range of 1 to {MAX_TICKS} ticks"),
            );
        };
        let mut ticks = grid.ticks();
        let least = (ticks + MAX_PIECES - 1) / MAX_PIECES;
        let mut whole: Option<Reply> = None;
        let mut from = start;
        while from <= end {
            let piece = Grid { start: from, end: end.min(from + (ticks - 1) * step), step };
            let fetched = self.fetch(query, piece, lookback);
            let fetched = match self.until {
                Some(until) => tokio::time::timeout_at(until, fetched).await,
                None => Ok(fetched.await),
            };
            match fetched {
                Ok(Fetched::Reply(reply)) => {
                    from = piece.end + step;
                    match &mut whole {
                        Some(whole) => whole.append(reply),
                        None => whole = Some(reply),
                    }
                }
                Ok(Fetched::TooLong) if ticks > least => ticks = least.max((ticks + 1) / 2),
                Ok(Fetched::TooLong) => {
                    return malformed(
                        query,
                        format!(
                            "the answer is larger than {} MiB: narrow the selectors, or aggregate labels away",
                            MAX_BODY >> 20
                        ),
                    );
                }
                Ok(Fetched::Odd(answer)) => return answer,
                Err(_) => return Answer::Down(self.late(query)),
            }
        }
        // The range has a tick at least.
        match whole.map_or_else(|| Err(String::new()), |reply| matrix(reply, grid)) {
            Ok(samples) => Answer::Series(samples),
            Err(why) => malformed(query, why),
        }
    }

    async fn fetch(&self, query: &str, Grid { start, end, step }: Grid, lookback: Option<i64>) -> Fetched {
        // The semaphore is never closed, so that this is always a permit.
        let _permit = self.gate.acquire().await;
        // POST, since a query may be longer than servers and proxies allow a URL to be; raw, since the library would read an
        // answer of any size. With the time-out Prometheus stops working on what nobody waits for any more.
        let timeout = i64::try_from(self.timeout.as_millis()).unwrap_or(i64::MAX);
        let mut asked = self.client.query_range(query, start, end, step as f64).timeout(timeout);
        if let Some(lookback) = lookback {
            asked = asked.query("lookback_delta", format!("{lookback}s"));
        }
        match asked.post_raw().await {
            Ok(response) => self.read(query, response).await,
            Err(error) => Fetched::Odd(self.unreached(query, &error)),
        }
    }

    async fn read(&self, query: &str, mut response: Response) -> Fetched {
        let status = response.status();
        let mut body = Vec::new();
        let mut too_long = response.content_length().is_some_and(|length| length > MAX_BODY as u64);
        while !too_long {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    too_long = body.len() + chunk.len() > MAX_BODY;
                    if !too_long {
                        body.extend_from_slice(&chunk);
                    }
                }
                Ok(None) => break,
                Err(error) => return Fetched::Odd(self.unreached(query, &error)),
            }
        }
        let reply = (!too_long).then(|| serde_json::from_slice::<Reply>(&body));
        // Prometheus says why it refuses in a body of JSON, whatever the status; anything else is from something in between.
        if let Some(Ok(Reply { status: Outcome::Error, error_type, error, .. })) = &reply {
            return Fetched::Odd(self.refused(query, status, error_type.as_deref(), error.as_deref()));
        }
        if !status.is_success() {
            let hint = match status.as_u16() {
                300..=399 => ": it redirects, which is not followed; give the final address",
                401 | 403 => ": it wants credentials; put a user and a password into the URL",
                404 | 405 => ": is this the address of Prometheus itself?",
                _ => "",
            };
            return Fetched::Odd(Answer::Down(format!("{} answers with {status}{hint}", self.shown)));
        }
        match reply {
            None => Fetched::TooLong,
            Some(Err(error)) => Fetched::Odd(malformed(
                query,
                format!(
                    "the answer of {} is not the JSON of Prometheus ({}): is this the address of Prometheus itself?",
                    self.shown,
                    excerpt(&error.to_string())
                ),
            )),
            Some(Ok(reply)) => Fetched::Reply(reply),
        }
    }

    /// Prometheus says that it will not or cannot answer.
    fn refused(&self, query: &str, status: StatusCode, kind: Option<&str>, error: Option<&str>) -> Answer {
        let error = excerpt(error.unwrap_or("without a reason"));
        match kind {
            Some("bad_data" | "execution") => {
                malformed(query, format!("Prometheus cannot evaluate the query: {error}"))
            }
            _ => Answer::Down(format!(
                "{} answers with {} ({status}): {error}",
                self.shown,
                excerpt(kind.unwrap_or("an error"))
            )),
        }
    }

    fn unreached(&self, query: &str, error: &(dyn StdError + 'static)) -> Answer {
        let timed_out = with_sources(error)
            .filter_map(|error| error.downcast_ref::<reqwest::Error>())
            .any(reqwest::Error::is_timeout);
        Answer::Down(if timed_out {
            self.late(query)
        } else {
            format!("{} cannot be reached: {}", self.shown, causes(error))
        })
    }

    fn late(&self, query: &str) -> String {
        format!(
            "{} did not answer within {:?}; if only this query is slow, simplify it: {}",
            self.shown,
            self.timeout,
            quote(query)
        )
    }
}

fn malformed(query: &str, what: String) -> Answer {
    Answer::Malformed(format!("{what}; the query is {}", quote(query)))
}

/// The causes of an error, without what reqwest itself says, since it names the URL, which may hold a password.
fn causes(error: &(dyn StdError + 'static)) -> String {
    let told: Vec<_> =
        with_sources(error).filter(|error| !error.is::<reqwest::Error>()).map(ToString::to_string).collect();
    told.join(": ")
}

/// The ticks that were asked for.
#[derive(Clone, Copy)]
struct Grid {
    start: Tick,
    end: Tick,
    step: i64,
}

impl Grid {
    fn new(start: Tick, end: Tick, step: i64) -> Option<Self> {
        let span = end.checked_sub(start)?;
        (step > 0 && span >= 0 && span / step < MAX_TICKS).then_some(Self { start, end, step })
    }

    fn ticks(self) -> i64 {
        (self.end - self.start) / self.step + 1
    }

    /// The tick of a time in an answer, if it was asked for.
    fn tick(self, time: f64) -> Option<Tick> {
        // Converting saturates, so that a huge or missing time is caught by the bounds.
        let tick = time as Tick;
        (tick as f64 == time
            && (self.start..=self.end).contains(&tick)
            && (tick - self.start) % self.step == 0)
            .then_some(tick)
    }
}

/// The series of a reply, sorted. Says what is wrong with any that cannot be taken as they stand.
fn matrix(reply: Reply, grid: Grid) -> Result<Samples, String> {
    // Up to version 2.5x Prometheus puts its remarks on style among the warnings.
    if let Some(warning) = reply.warnings.iter().find(|warning| !warning.starts_with("PromQL info")) {
        return Err(format!(
            "the answer may be incomplete, since Prometheus warns: {}; mend what it reads from, or the query",
            excerpt(warning)
        ));
    }
    if reply.is_partial {
        return Err("the answer is partial, since a part of what holds the samples did not answer".to_owned());
    }
    let result = match reply.data {
        Some(Data::Matrix(result)) => result,
        Some(Data::Vector(_)) => return Err(other("an instant vector")),
        Some(Data::Scalar(_)) => return Err(other("a scalar")),
        Some(Data::String(_)) => return Err(other("a string")),
        None => return Err("the answer holds no data: is this the address of Prometheus itself?".to_owned()),
    };
    if result.len() > MAX_SERIES {
        return Err(format!(
            "the answer has {} series, more than {MAX_SERIES}: narrow the selectors, or aggregate labels away",
            result.len()
        ));
    }
    let mut samples: Samples = vec![];
    let mut room = MAX_POINTS;
    for range in result {
        samples.extend(series(range, grid, &mut room)?);
        if samples.len() > MAX_SERIES {
            return Err(format!(
                "the answer's histograms have more than {MAX_SERIES} buckets: narrow the selectors, or aggregate labels away"
            ));
        }
    }
    samples.sort_unstable_by(|a, b| a.key().cmp(&b.key()));
    match samples.windows(2).find(|pair| pair[0].key() == pair[1].key()) {
        Some(twins) => Err(format!(
            "the answer has the series {} twice: is something between the operator and Prometheus joining two servers, or \
             replicas of one (then let it deduplicate them)?",
            excerpt(&twins[0].labels)
        )),
        None => Ok(samples),
    }
}

fn other(kind: &str) -> String {
    format!("the answer to a range query is {kind}, not a matrix: is this the address of Prometheus itself?")
}

/// The series of one range: itself, or the buckets of a native histogram, each as a series of its own.
fn series(range: Range, grid: Grid, room: &mut usize) -> Result<Samples, String> {
    if range.histograms.is_empty() {
        let values = range.values.into_iter().map(|(time, Value(value))| (time, value));
        let points = on_grid(values, grid)?;
        return Ok(vec![Series::new(&range.metric, points)]);
    }
    let histograms = on_grid(range.histograms, grid)?;
    let points: Vec<_> = histograms
        .into_iter()
        .map(|(tick, histogram)| {
            let mut buckets: Vec<(f64, f64, f64)> = histogram
                .buckets
                .into_iter()
                .map(|(_, Value(lower), Value(upper), Value(count))| (lower, upper, count))
                .collect();
            buckets.sort_by(|(_, a, _), (_, b, _)| a.total_cmp(b));
            (tick, histogram.count.0, buckets)
        })
        .collect();
    let bounds: BTreeSet<u64> = points
        .iter()
        .flat_map(|(_, _, buckets)| buckets.iter().map(|(_, bound, _)| bound.to_bits()))
        .collect();
    *room = room.checked_sub((bounds.len() + 1).saturating_mul(points.len())).ok_or_else(|| {
        format!(
            "the answer's histograms have more than {MAX_POINTS} buckets in all their samples: narrow the selectors, or aggregate \
             labels away"
        )
    })?;
    Ok(Series::of_native(&range.metric, &points))
}

/// Samples with the ticks of their times, rising.
fn on_grid<T>(samples: impl IntoIterator<Item = (f64, T)>, grid: Grid) -> Result<Vec<(Tick, T)>, String> {
    let mut points: Vec<(Tick, T)> = vec![];
    for (time, value) in samples {
        let Some(tick) = grid.tick(time) else {
            return Err(format!(
                "the answer has a sample at {time}, which was not asked for: is something between the operator and Prometheus \
                 rounding times?"
            ));
        };
        match points.last() {
            Some((last, _)) if *last > tick => {
                return Err(format!("the answer's samples are out of order at {tick}"));
            }
            // The first one counts: a time that is seen again tells nothing new.
            Some((last, _)) if *last == tick => {}
            _ => points.push((tick, value)),
        }
    }
    Ok(points)
}

/// What the HTTP API answers, of every kind.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reply {
    status: Outcome,
    data: Option<Data>,
    error_type: Option<String>,
    error: Option<String>,
    #[serde(default)]
    warnings: Vec<String>,
    /// What VictoriaMetrics says in place of a warning.
    #[serde(default)]
    is_partial: bool,
}

impl Reply {
    /// Takes what an answer to later ticks of the same query holds.
    fn append(&mut self, later: Self) {
        self.warnings.extend(later.warnings);
        self.is_partial |= later.is_partial;
        let (Some(Data::Matrix(known)), Some(Data::Matrix(later))) = (&mut self.data, later.data) else {
            return self.data = None;
        };
        let places: BTreeMap<_, _> =
            known.iter().enumerate().map(|(at, range)| (range.metric.clone(), at)).collect();
        for range in later {
            match places.get(&range.metric) {
                Some(&at) => {
                    known[at].values.extend(range.values);
                    known[at].histograms.extend(range.histograms);
                }
                None => known.push(range),
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Success,
    Error,
}

#[derive(Deserialize)]
#[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
enum Data {
    Matrix(Vec<Range>),
    Vector(IgnoredAny),
    Scalar(IgnoredAny),
    String(IgnoredAny),
}

#[derive(Deserialize)]
struct Range {
    metric: BTreeMap<String, String>,
    #[serde(default)]
    values: Vec<(f64, Value)>,
    #[serde(default)]
    histograms: Vec<(f64, Histogram)>,
}

/// A native histogram: the count of all values, and of those between two bounds (rule, lower, upper, count).
#[derive(Deserialize)]
struct Histogram {
    count: Value,
    #[serde(default)]
    buckets: Vec<(IgnoredAny, Value, Value, Value)>,
}

/// A value, which Prometheus writes as a string, since JSON has no NaN and no infinity.
struct Value(f64);

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse()
            .map(Self)
            .map_err(|_| serde::de::Error::custom(format!("{:?} is no number", excerpt(&text))))
    }
}
