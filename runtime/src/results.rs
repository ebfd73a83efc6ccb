//! `memory.batchLimit`: hands the result of each query on to a collector, in batches.
//!
//! Knows queries' results and one collector; a query never waits for it. Optimized, a result shares the bytes of the
//! answer that the client got, batches are bounded by number and bytes, and one that is refused is split until the
//! results that the collector does not take are alone. The baseline copies each result, copies all pending ones once
//! more for each sending, since they must stay until they are confirmed, and loses a batch that is refused. What is
//! pending is bounded in both: results that find no room are dropped and counted.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, StatusCode, Uri,
    header::{CONTENT_TYPE, HOST, HeaderValue},
};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use serde::Serialize;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use crate::{config, connections::Route, metrics::Service, state::Runtime};

/// Results that wait at most: in number, and in bytes.
const MAX_PENDING: usize = 100_000;
const MAX_PENDING_BYTES: usize = 32 << 20;

/// How often a configuration without a collector is looked at.
const IDLE: Duration = Duration::from_secs(1);
/// Time for the last results when the process ends.
const LAST: Duration = Duration::from_secs(5);

/// What became of results.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// The collector took them.
    pub(crate) sent: Counter,
    /// The collector refused them.
    pub(crate) lost: Counter,
    /// There was no room for them.
    pub(crate) dropped: Counter,
    /// Batches that were refused and split.
    pub(crate) splits: Counter,
    pub(crate) pending: Gauge,
}

/// The collector of a configuration.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) config: config::Results,
    pub(crate) path: Uri,
    pub(crate) host: HeaderValue,
    pub(crate) route: Route,
    /// Not shown with those of the experts, since a collector that fails fails no query.
    pub(crate) metrics: Service,
    /// Absent: the baseline path.
    pub(crate) limit: Option<config::BatchLimit>,
}

/// What is told of a query.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Head<'a> {
    /// Seconds since the epoch.
    time: f64,
    requester: &'a str,
    outcome: &'static str,
    duration_ms: f64,
}

/// A result that waits.
#[derive(Debug, Clone, PartialEq)]
struct Item {
    /// A JSON object.
    head: String,
    /// A JSON document.
    response: Bytes,
}

/// What an item adds to the two: the field's name and the commas.
const GLUE: &str = r#","response":"#;

impl Item {
    fn size(&self) -> usize {
        self.head.len() + GLUE.len() + self.response.len() + 1
    }
}

/// Results on their way to the collector.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pending: Mutex<Pending>,
    /// A batch is full.
    full: Notify,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Pending {
    items: VecDeque<Item>,
    bytes: usize,
}

impl Pending {
    /// Takes the oldest items, as many as a batch may hold, and one at least.
    fn batch(&mut self, limit: &config::BatchLimit) -> Vec<Item> {
        let (mut count, mut bytes) = (0, 0);
        for item in self.items.iter().take(limit.max_items as usize) {
            bytes += item.size();
            if count > 0 && bytes as u64 > limit.max_bytes {
                break;
            }
            count += 1;
        }
        let batch: Vec<_> = self.items.drain(..count).collect();
        self.bytes -= batch.iter().map(Item::size).sum::<usize>();
        batch
    }
}

/// How a sending ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Taken,
    /// This batch will never be taken as it is.
    Refused,
    /// Nobody took it this time.
    Away,
}

impl Results {
    pub(crate) fn new(counts: Counts) -> Self {
        Self { counts, ..Self::default() }
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the result of a query. `response` is what the client is answered.
    pub(crate) fn push(
        &self,
        collector: &Collector,
        requester: &str,
        outcome: &'static str,
        took: Duration,
        response: &Bytes,
    ) {
        let head = Head {
            time: SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |age| age.as_millis() as f64 / 1e3),
            requester,
            outcome,
            duration_ms: took.as_micros() as f64 / 1e3,
        };
        // Strings and numbers written to memory: serde_json has no error for these.
        let mut head = serde_json::to_string(&head).unwrap_or_else(|_| "{}".to_owned());
        // The response goes in before the closing brace.
        head.pop();
        let response = match collector.limit {
            Some(_) => response.clone(),
            None => Bytes::copy_from_slice(response),
        };
        let item = Item { head, response };
        let size = item.size();
        let mut pending = self.pending();
        if pending.items.len() >= MAX_PENDING || pending.bytes + size > MAX_PENDING_BYTES {
            drop(pending);
            self.counts.dropped.inc();
            return;
        }
        pending.bytes += size;
        pending.items.push_back(item);
        let full = collector.limit.as_ref().is_some_and(|limit| {
            pending.items.len() >= limit.max_items as usize || pending.bytes as u64 >= limit.max_bytes
        });
        drop(pending);
        self.counts.pending.inc();
        if full {
            self.full.notify_one();
        }
    }

    /// Sends what is pending, until there is nothing or the collector is away.
    async fn flush(&self, collector: &Collector) -> Sent {
        let Some(limit) = &collector.limit else { return self.flush_all(collector).await };
        loop {
            let batch = self.pending().batch(limit);
            if batch.is_empty() {
                return Sent::Taken;
            }
            let mut parts = vec![batch];
            while let Some(mut part) = parts.pop() {
                match collector.send(&part).await {
                    Sent::Taken => self.done(&self.counts.sent, part.len()),
                    Sent::Refused if part.len() > 1 => {
                        let tail = part.split_off(part.len() / 2);
                        parts.extend([tail, part]);
                        self.counts.splits.inc();
                    }
                    Sent::Refused => self.done(&self.counts.lost, 1),
                    Sent::Away => {
                        // All goes back to the front, in its old order: the next part is the last of `parts`.
                        let mut pending = self.pending();
                        for item in parts.into_iter().chain([part]).flat_map(|part| part.into_iter().rev()) {
                            pending.bytes += item.size();
                            pending.items.push_front(item);
                        }
                        return Sent::Away;
                    }
                }
            }
        }
    }

    /// The baseline: everything at once.
    async fn flush_all(&self, collector: &Collector) -> Sent {
        let batch: Vec<Item> = self.pending().items.iter().cloned().collect();
        if batch.is_empty() {
            return Sent::Taken;
        }
        let sent = collector.send(&batch).await;
        let counter = match sent {
            Sent::Taken => &self.counts.sent,
            Sent::Refused => &self.counts.lost,
            Sent::Away => return sent,
        };
        let all = config::BatchLimit { max_items: batch.len() as u32, max_bytes: u64::MAX, enabled: true };
        drop(self.pending().batch(&all));
        self.done(counter, batch.len());
        sent
    }

    fn done(&self, counter: &Counter, count: usize) {
        counter.inc_by(count as u64);
        self.counts.pending.dec_by(count as i64);
    }
}

impl Collector {
    async fn send(&self, items: &[Item]) -> Sent {
        let mut body = Vec::with_capacity(items.iter().map(Item::size).sum::<usize>() + items.len() + 1);
        for (i, item) in items.iter().enumerate() {
            body.push(if i == 0 { b'[' } else { b',' });
            body.extend_from_slice(item.head.as_bytes());
            body.extend_from_slice(GLUE.as_bytes());
            body.extend_from_slice(&item.response);
            body.push(b'}');
        }
        body.push(b']');
        let mut request =
            Request::post(self.path.clone()).body(Full::new(Bytes::from(body))).unwrap_or_default();
        request.headers_mut().insert(HOST, self.host.clone());
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match timeout(self.config.timeout, self.route.send(request, &self.metrics)).await {
            Ok(Ok(answer)) if answer.status.is_success() => Sent::Taken,
            Ok(Ok(answer)) => {
                tracing::warn!(status = %answer.status, results = items.len(), "the collector did not take a batch of results");
                match answer.status {
                    StatusCode::BAD_REQUEST
                    | StatusCode::PAYLOAD_TOO_LARGE
                    | StatusCode::UNPROCESSABLE_ENTITY => Sent::Refused,
                    _ => Sent::Away,
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the collector of results cannot be reached");
                Sent::Away
            }
            Err(_) => {
                tracing::warn!("the collector of results gave no answer within {:?}", self.config.timeout);
                Sent::Away
            }
        }
    }
}

/// Sends results as they come, until `stop` says so, and then the last ones.
pub(crate) async fn run(runtime: Arc<Runtime>, mut stop: watch::Receiver<bool>) {
    let results = &runtime.results;
    let mut last = Sent::Taken;
    loop {
        let wait = runtime.snapshot().collector.as_ref().map_or(IDLE, |collector| collector.config.flush);
        let stopped = tokio::select! {
            // A collector that is away is left alone for a while, however much is pending.
            () = results.full.notified(), if last != Sent::Away => false,
            () = sleep(wait) => false,
            _ = stop.wait_for(|stop| *stop) => true,
        };
        // The newest configuration counts, also for results that came before it.
        last = match &runtime.snapshot().collector {
            Some(collector) if stopped => {
                let _ = timeout(LAST, results.flush(collector)).await;
                return;
            }
            Some(collector) => results.flush(collector).await,
            // Nobody wants them any more.
            None => {
                let left = std::mem::take(&mut *results.pending()).items.len();
                results.done(&results.counts.dropped, left);
                Sent::Taken
            }
        };
        if stopped {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use hyper::Response;
    use serde_json::Value;
    use tokio::net::TcpListener;

    use super::*;
    use crate::load;

    /// A collector that refuses batches of more than `most` results or with the word "poison", and keeps the others.
    async fn collector(most: usize) -> (String, Arc<Mutex<Vec<Vec<Value>>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/results", listener.local_addr().expect("bound"));
        let kept = Arc::new(Mutex::new(Vec::new()));
        let to = kept.clone();
        tokio::spawn(load::serve(listener, move |request| {
            let to = to.clone();
            async move {
                let body = request.into_body().collect().await.expect("whole").to_bytes();
                let batch: Vec<Value> = serde_json::from_slice(&body).expect("a JSON array");
                let poison = batch.iter().any(|item| item["requester"] == "poison");
                let mut reply = Response::new(Full::default());
                match batch.len() > most || poison {
                    true => *reply.status_mut() = StatusCode::PAYLOAD_TOO_LARGE,
                    false => to.lock().expect("no panic").push(batch),
                }
                reply
            }
        }));
        (url, kept)
    }

    fn runtime(url: &str, batch: &str) -> Arc<Runtime> {
        let file = format!(
            "experts: [{{name: a, url: \"http://127.0.0.1:1/\"}}]\nresults: {{url: \"{url}\", timeout: 1s}}\n\
             optimizations: {{memory: {{batchLimit: {batch}}}}}"
        );
        Runtime::new(file.as_bytes(), "test", None).expect("valid")
    }

    fn push(runtime: &Runtime, requester: &str) {
        let snapshot = runtime.snapshot();
        let collector = snapshot.collector.as_ref().expect("one is configured");
        let response = Bytes::from_static(b"{\"answers\": [1,\n2]}");
        runtime.results.push(collector, requester, "ok", Duration::from_micros(1500), &response);
    }

    async fn flush(runtime: &Runtime) -> Sent {
        let snapshot = runtime.snapshot();
        runtime.results.flush(snapshot.collector.as_ref().expect("one is configured")).await
    }

    /// Sent, lost, dropped, split, pending.
    fn counts(runtime: &Runtime) -> [u64; 5] {
        let Counts { sent, lost, dropped, splits, pending } = &runtime.results.counts;
        [sent.get(), lost.get(), dropped.get(), splits.get(), pending.get() as u64]
    }

    #[tokio::test]
    async fn batches_are_bounded_and_in_order() {
        let (url, kept) = collector(1_000).await;
        for (limit, sizes) in [
            ("{enabled: false}", vec![25]),
            ("{enabled: true, maxItems: 10}", vec![10, 10, 5]),
            ("{enabled: true, maxItems: 1000, maxBytes: 1KiB}", vec![9, 9, 7]),
        ] {
            kept.lock().expect("no panic").clear();
            let runtime = runtime(&url, limit);
            (0..25).for_each(|i| push(&runtime, &format!("requester {i:02}")));
            assert_eq!(flush(&runtime).await, Sent::Taken);
            assert_eq!(counts(&runtime), [25, 0, 0, 0, 0]);
            let kept = kept.lock().expect("no panic");
            assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), sizes, "{limit}");
            for (i, item) in kept.iter().flatten().enumerate() {
                assert_eq!(item["requester"], format!("requester {i:02}"));
                assert_eq!(item["response"]["answers"], serde_json::json!([1, 2]));
                assert_eq!((&item["outcome"], &item["durationMs"]), (&"ok".into(), &1.5.into()));
            }
        }
    }

    #[tokio::test]
    async fn a_refused_batch_is_split_and_the_baseline_loses_it() {
        let (url, kept) = collector(8).await;
        for (limit, expected) in [("{enabled: true}", [98, 2, 0]), ("{enabled: false}", [0, 100, 0])] {
            kept.lock().expect("no panic").clear();
            let runtime = runtime(&url, limit);
            (0..100).for_each(|i| push(&runtime, if i % 50 == 17 { "poison" } else { "good" }));
            assert_eq!(flush(&runtime).await, if expected[0] > 0 { Sent::Taken } else { Sent::Refused });
            let [sent, lost, dropped, _, pending] = counts(&runtime);
            assert_eq!(([sent, lost, dropped], pending), (expected, 0), "{limit}");
            assert_eq!(kept.lock().expect("no panic").iter().flatten().count() as u64, sent);
        }
    }

    #[tokio::test]
    async fn results_wait_for_a_collector_that_is_away() {
        let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", closed.local_addr().expect("bound"));
        drop(closed);
        for limit in ["{enabled: true, maxItems: 10}", "{enabled: false}"] {
            let runtime = runtime(&url, limit);
            (0..25).for_each(|i| push(&runtime, &i.to_string()));
            let before: Vec<Item> = runtime.results.pending().items.iter().cloned().collect();
            assert_eq!(flush(&runtime).await, Sent::Away);
            assert_eq!(counts(&runtime), [0, 0, 0, 0, 25]);
            let pending = runtime.results.pending();
            assert_eq!(pending.items.iter().cloned().collect::<Vec<_>>(), before);
            assert_eq!(pending.bytes, before.iter().map(Item::size).sum::<usize>());
        }
    }

    #[tokio::test]
    async fn what_finds_no_room_is_dropped_and_counted() {
        let runtime = runtime("http://127.0.0.1:1/", "{enabled: true}");
        (0..MAX_PENDING + 7).for_each(|_| push(&runtime, ""));
        let [_, _, dropped, _, pending] = counts(&runtime);
        assert_eq!(dropped + pending, MAX_PENDING as u64 + 7);
        assert!(dropped >= 7 && runtime.results.pending().bytes <= MAX_PENDING_BYTES);
    }
}
