//! What is in force: one immutable snapshot of configuration, pools and cache, and how it is replaced.
//!
//! A query takes one snapshot at its entry and keeps it to its end. A new configuration builds a new snapshot around
//! the parts that it leaves as they are; the parts that it replaces live on until the last query that holds them ends.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use hyper::header::HeaderValue;
use tokio::sync::watch;

use crate::{
    api::Admission,
    cache::{self, Bounds, Cache},
    config::{self, Config},
    connections::{self, Pool, Route, Target},
    experts::{Expert, Upstream},
    metrics::{Metrics, Service},
    pool::{self, Buffer, BufferPool},
    pressure::Reading,
    results::{Collector, Results},
};

/// A configuration in force, with all that belongs to it.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) config: Config,
    pub(crate) hash: String,
    /// 1 at the start, one more for each file applied.
    pub(crate) generation: u64,
    pub(crate) admission: Arc<Admission>,
    pub(crate) experts: Vec<Arc<Expert>>,
    /// Absent: the baseline path.
    pub(crate) buffers: Option<Arc<BufferPool>>,
    pub(crate) cache: Arc<Cache>,
    /// Absent: nobody collects results.
    pub(crate) collector: Option<Arc<Collector>>,
}

impl Snapshot {
    /// An empty buffer, from the pool where there is one.
    pub(crate) fn buffer(&self) -> Buffer {
        self.buffers.as_ref().map(BufferPool::take).unwrap_or_default()
    }

    /// Gives memory back if the container is short of it; says whether it was.
    fn relieve(&self, reading: &Reading, now: Instant) -> bool {
        let evict = &self.config.optimizations.memory.evict;
        let stall = reading.stall.unwrap_or(0.0);
        let short = reading.ratio() >= evict.threshold || (reading.limit.is_some() && stall >= evict.stall);
        if short {
            self.cache.evict(evict.fraction, now);
            if let Some(buffers) = &self.buffers {
                buffers.drain();
            }
            let (entries, _) = self.cache.size();
            tracing::warn!(
                ratio = reading.ratio(),
                stall,
                entries,
                "memory is short: part of the cache is gone"
            );
        }
        short
    }

    /// Closes and drops what is too old.
    fn sweep(&self, now: Instant) {
        let mut swept = HashSet::new();
        for pool in self.pools().filter(|pool| swept.insert(Arc::as_ptr(pool))) {
            pool.sweep();
        }
        self.cache.sweep(now);
    }

    /// Every way to another service.
    fn routes(&self) -> impl Iterator<Item = &Route> {
        self.experts.iter().map(|expert| &expert.route).chain(self.collector.iter().map(|c| &c.route))
    }

    /// The pools of all ways; one that several share comes several times.
    fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.routes().flat_map(Route::pools)
    }
}

/// A file that was refused.
#[derive(Debug, Clone)]
pub(crate) struct Rejected {
    pub(crate) hash: String,
    pub(crate) reason: String,
}

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// It is in force already.
    Same,
    /// It is in force now, as this generation.
    New(u64),
    /// It is refused, and was refused before.
    StillRejected,
    /// It is refused.
    Rejected(String),
}

/// All state of a running process.
#[derive(Debug)]
pub(crate) struct Runtime {
    current: ArcSwap<Snapshot>,
    /// Tells the generation to who does not look at each query.
    changed: watch::Sender<u64>,
    rejected: Mutex<Option<Rejected>>,
    /// One configuration at a time.
    applying: Mutex<()>,
    pub(crate) metrics: Metrics,
    pub(crate) results: Results,
    /// Queries being served.
    pub(crate) inflight: AtomicUsize,
    pub(crate) draining: AtomicBool,
    /// This process's name, for the answers' header.
    pub(crate) instance: HeaderValue,
    id_prefix: u32,
    next_id: AtomicU64,
}

impl Runtime {
    /// Starts with a configuration file's content, which must be valid.
    pub(crate) fn new(
        file: &[u8],
        instance: &str,
        allocations: Option<fn() -> Option<u64>>,
    ) -> Result<Arc<Self>, config::Error> {
        let config = Config::parse(file)?;
        let started = crate::metrics::start_time();
        let metrics = Metrics::new(allocations);
        let hash = config::hash(file);
        let snapshot = build(config, hash, 1, None, &metrics)?;
        metrics.configured(&snapshot.hash, None, &snapshot.config);
        Ok(Arc::new(Self {
            current: ArcSwap::from_pointee(snapshot),
            changed: watch::Sender::new(1),
            rejected: Mutex::default(),
            applying: Mutex::default(),
            results: Results::new(metrics.results.clone()),
            metrics,
            inflight: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            instance: HeaderValue::from_str(instance).unwrap_or(HeaderValue::from_static("unknown")),
            // Ids need to differ between processes, not to be secret.
            id_prefix: (started.to_bits() >> 8) as u32 ^ std::process::id().rotate_left(16),
            next_id: AtomicU64::new(0),
        }))
    }

    /// What is in force.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Sees each new generation, and the end of the process's work.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The file that was refused last, unless a good one came since.
    pub(crate) fn rejected(&self) -> Option<Rejected> {
        self.rejected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An id for a query, unlike any other of this process and most likely of all.
    pub(crate) fn id(&self) -> String {
        format!("{:08x}{:08x}", self.id_prefix, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Puts a changed file in force, or refuses it whole and keeps what is.
    pub(crate) fn apply(&self, file: &[u8]) -> Applied {
        let _one = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = config::hash(file);
        let old = self.snapshot();
        if hash == old.hash {
            *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = None;
            return Applied::Same;
        }
        let built = Config::parse(file)
            .and_then(|config| same_addresses(&old.config, &config).map(|()| config))
            .and_then(|config| build(config, hash.clone(), old.generation + 1, Some(&old), &self.metrics));
        match built {
            Err(error) => self.reject(hash, error.to_string()),
            Ok(snapshot) => {
                let snapshot = Arc::new(snapshot);
                self.metrics.configured(&hash, Some(&old.config), &snapshot.config);
                self.current.store(snapshot.clone());
                *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = None;
                for pool in old.pools() {
                    if !snapshot.pools().any(|new| Arc::ptr_eq(new, pool)) {
                        pool.retire();
                    }
                }
                if let Some(buffers) = &old.buffers
                    && !snapshot.buffers.as_ref().is_some_and(|new| Arc::ptr_eq(new, buffers))
                {
                    buffers.retire();
                }
                self.metrics.reload_applied.inc();
                self.changed.send_replace(snapshot.generation);
                Applied::New(snapshot.generation)
            }
        }
    }

    /// Notes that a file was refused; counted once for each content.
    pub(crate) fn reject(&self, hash: String, reason: String) -> Applied {
        let mut rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        if rejected.as_ref().is_some_and(|r| r.hash == hash && r.reason == reason) {
            return Applied::StillRejected;
        }
        *rejected = Some(Rejected { hash, reason: reason.clone() });
        self.metrics.reload_rejected.inc();
        Applied::Rejected(reason)
    }

    /// Closes, frees and forgets what is too old, once a second.
    pub(crate) async fn housekeep(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut refreshed, mut trimmed, mut evicted) = (Instant::now(), Instant::now(), None::<Instant>);
        while !*stop.borrow() {
            tokio::select! {
                _ = tick.tick() => {}
                _ = stop.changed() => return,
            }
            let (snapshot, now) = (self.snapshot(), Instant::now());
            snapshot.sweep(now);
            if refreshed.elapsed() >= REFRESH {
                refresh(snapshot.clone()).await;
                refreshed = now;
            }
            let memory = &snapshot.config.optimizations.memory;
            if let Some(buffers) = &snapshot.buffers
                && now.duration_since(trimmed) >= memory.object_pool.trim_every
            {
                buffers.trim();
                trimmed = now;
            }
            let rested = evicted.is_none_or(|last| now.duration_since(last) >= memory.evict.cooldown);
            if memory.evict.enabled
                && rested
                && self.metrics.cgroup.read().is_some_and(|reading| snapshot.relieve(&reading, now))
            {
                evicted = Some(now);
            }
        }
    }

    /// All metrics as text.
    pub(crate) fn encode_metrics(&self) -> String {
        let snapshot = self.snapshot();
        let now = Instant::now();
        for expert in &snapshot.experts {
            expert.show(now);
        }
        let (objects, bytes) = snapshot.buffers.as_ref().map_or((0, 0), |buffers| buffers.size());
        self.metrics.pool_objects.set(objects as i64);
        self.metrics.pool_held_bytes.set(bytes as i64);
        let (entries, bytes) = snapshot.cache.size();
        self.metrics.cache_entries.set(entries as i64);
        self.metrics.cache_bytes.set(bytes as i64);
        self.metrics.encode()
    }
}

/// How often secrets are read again.
const REFRESH: Duration = Duration::from_secs(5);

/// Reads secrets again, off the threads that serve.
async fn refresh(snapshot: Arc<Snapshot>) {
    let read = move || {
        snapshot.admission.refresh();
        for expert in &snapshot.experts {
            expert.refresh();
        }
    };
    // Fails only when the runtime is being shut down.
    let _ = tokio::task::spawn_blocking(read).await;
}

/// The sockets are bound at the start; a file that moves them is refused rather than half applied.
fn same_addresses(old: &Config, new: &Config) -> Result<(), config::Error> {
    let check = |field: &str, old: SocketAddr, new: SocketAddr| {
        if old == new {
            return Ok(());
        }
        let message =
            format!("cannot change from {old} to {new} in a running process; put {old} back, or restart it");
        Err(config::Error::one(field, message))
    };
    check("server.listen", old.server.listen, new.server.listen)?;
    check("server.admin", old.server.admin, new.server.admin)
}

/// Builds a snapshot, with the parts of `old` that the new configuration leaves as they are.
fn build(
    config: Config,
    hash: String,
    generation: u64,
    old: Option<&Snapshot>,
    metrics: &Metrics,
) -> Result<Snapshot, config::Error> {
    let same = |old: &&Snapshot| {
        (&old.config.server.api_keys, &old.config.server.rate_limit)
            == (&config.server.api_keys, &config.server.rate_limit)
    };
    let admission = match old.filter(same) {
        Some(old) => old.admission.clone(),
        None => Admission::new(&config.server, Instant::now())
            .map(Arc::new)
            .map_err(|reason| config::Error::one("server.apiKeys", reason))?,
    };

    let pool = &config.optimizations.memory.object_pool;
    let buffers = pool.enabled.then(|| {
        let kept = old.filter(|old| old.config.optimizations.memory.object_pool == *pool);
        kept.and_then(|old| old.buffers.clone()).unwrap_or_else(|| {
            let bounds = pool::Bounds {
                max_objects: pool.max_objects as usize,
                max_bytes: size(pool.max_bytes),
                retain_max: size(pool.retain_max),
            };
            Arc::new(BufferPool::new(&bounds, metrics.pool.clone()))
        })
    });

    let bounds = match &config.optimizations.memory.cache_ttl {
        cache if cache.enabled => Bounds {
            ttl: cache.ttl,
            max_entries: cache.max_entries as usize,
            max_bytes: size(cache.memory_limit),
        },
        _ => Bounds {
            ttl: config.baseline.cache_ttl,
            max_entries: cache::BASELINE_MAX_ENTRIES,
            max_bytes: cache::BASELINE_MAX_BYTES,
        },
    };
    let cache = old.map(|old| &old.cache).filter(|cache| cache.bounds == bounds).cloned();
    let cache = cache.unwrap_or_else(|| Arc::new(Cache::new(bounds, metrics.evictions.clone())));

    let mut upstreams = Vec::with_capacity(config.experts.len() + 1);
    for (i, expert) in config.experts.iter().enumerate() {
        upstreams.push(Upstream::of(expert).ok_or_else(|| no_url(format!("experts[{i}].url"), &expert.url))?);
    }
    if let Some(results) = &config.results {
        let upstream = Upstream::at(&results.url, str::to_owned);
        upstreams.push(upstream.ok_or_else(|| no_url("results.url".to_owned(), &results.url))?);
    }
    let names = config.experts.iter().map(|expert| expert.name.as_str()).chain(["results"]);
    let targets: Vec<Target> = names
        .zip(&upstreams)
        .map(|(name, upstream)| Target { name: name.to_owned(), address: upstream.address.clone() })
        .collect();
    let known: Vec<&Route> = old.into_iter().flat_map(Snapshot::routes).collect();
    let mut routes = upstreams.into_iter().zip(connections::routes(&config, &targets, &known)?);

    let mut experts = Vec::with_capacity(config.experts.len());
    for (i, (expert, (upstream, route))) in config.experts.iter().zip(&mut routes).enumerate() {
        let before = old.and_then(|old| old.experts.iter().find(|before| before.config == *expert));
        let service = metrics.service(&expert.name);
        let built = Expert::new(expert, &config.dispatch, upstream, route, service, before.map(|b| &**b));
        // All else that could be wrong was found before: only the credential is looked at here first.
        experts.push(Arc::new(
            built.map_err(|reason| config::Error::one(format!("experts[{i}].credential.from"), reason))?,
        ));
    }
    let collector = config.results.as_ref().zip(routes.next()).map(|(results, (upstream, route))| {
        let limit = &config.optimizations.memory.batch_limit;
        Arc::new(Collector {
            config: results.clone(),
            path: upstream.path,
            host: upstream.host,
            route,
            metrics: Service::default(),
            limit: limit.enabled.then(|| limit.clone()),
        })
    });
    Ok(Snapshot { hash, generation, admission, experts, buffers, cache, collector, config })
}

fn no_url(field: String, url: &str) -> config::Error {
    config::Error::one(field, format!("{url:?} is not a URL"))
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_when_the_container_is_short_of_it() {
        let file =
            "experts: [{name: a, url: \"http://a\"}]\noptimizations: {memory: {objectPool: {enabled: true}}}";
        for (used, limit, stall, short) in [
            (79, Some(100), None, false),
            (80, Some(100), None, true),
            (u64::MAX, None, None, false),
            (10, Some(100), Some(0.2), true),
            (10, Some(100), Some(0.19), false),
            // Others on the machine are short of memory, but nothing here is to blame.
            (10, None, Some(1.0), false),
            (5, Some(0), None, true),
        ] {
            let runtime = Runtime::new(file.as_bytes(), "test", None).expect("valid");
            let (snapshot, now) = (runtime.snapshot(), Instant::now());
            for i in 0..10 {
                let answer: Box<serde_json::value::RawValue> = serde_json::from_str("1").expect("valid");
                let key = cache::Key { expert: "a".into(), body: [i; 32] };
                snapshot.cache.put(key, answer.into(), now);
            }
            snapshot.buffer().push(1);
            assert_eq!(snapshot.relieve(&Reading { used, limit, stall }, now), short);
            let left = (snapshot.cache.size().0, snapshot.buffers.as_ref().map(|b| b.size().0));
            assert_eq!(left, if short { (8, Some(0)) } else { (10, Some(1)) }, "{used} of {limit:?}");
        }
    }
}
