//! What is in force: one immutable snapshot of configuration, pools and cache, and how it is replaced.
//!
//! A query takes one snapshot at its entry and keeps it to its end. A new configuration builds a new snapshot around
//! the parts that it leaves as they are; the parts that it replaces live on until the last query that holds them ends.

use std::{
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
    connections::{self, Address, Limits},
    experts::{Expert, Upstream},
    metrics::Metrics,
    monitoring::Store,
    pool::{Buffer, BufferPool},
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
}

impl Snapshot {
    /// An empty buffer, from the pool where there is one.
    pub(crate) fn buffer(&self) -> Buffer {
        self.buffers.as_ref().map(BufferPool::take).unwrap_or_default()
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
    pub(crate) store: Store,
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
            metrics,
            store: Store::default(),
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
                for expert in &old.experts {
                    let pool = &expert.route.pool;
                    if !snapshot.experts.iter().any(|new| Arc::ptr_eq(&new.route.pool, pool)) {
                        pool.retire();
                    }
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
        let mut ticks = 0_u64;
        while !*stop.borrow() {
            tokio::select! {
                _ = tick.tick() => {}
                _ = stop.changed() => return,
            }
            ticks += 1;
            let snapshot = self.snapshot();
            for expert in &snapshot.experts {
                expert.route.pool.sweep();
            }
            snapshot.cache.sweep(Instant::now());
            if ticks.is_multiple_of(5) {
                refresh(snapshot.clone()).await;
            }
            if let Some(buffers) = snapshot.buffers.as_ref().filter(|_| ticks.is_multiple_of(30)) {
                buffers.trim();
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
            let (hit, miss) = (metrics.pool_hit.clone(), metrics.pool_miss.clone());
            Arc::new(BufferPool::new(pool.max_objects as usize, size(pool.retain_max), hit, miss))
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
    let cache = cache.unwrap_or_else(|| Arc::new(Cache::new(bounds)));

    let mut upstreams = Vec::with_capacity(config.experts.len());
    for (i, expert) in config.experts.iter().enumerate() {
        upstreams.push(Upstream::of(expert).ok_or_else(|| {
            config::Error::one(format!("experts[{i}].url"), format!("{:?} is not a URL", expert.url))
        })?);
    }
    let unified = &config.optimizations.connections.unified;
    let limits = match unified.enabled {
        true => Limits {
            per_host: unified.per_host as usize,
            total: Some(unified.total as usize),
            keep_alive: unified.keep_alive,
            acquire_timeout: Some(unified.acquire_timeout),
        },
        false => Limits {
            per_host: config.baseline.per_host as usize,
            total: None,
            keep_alive: config.baseline.keep_alive,
            acquire_timeout: None,
        },
    };
    let kept = old.filter(|old| {
        old.config.experts == config.experts
            && old.config.optimizations.connections.unified.enabled == unified.enabled
            && old.experts.first().is_some_and(|expert| *expert.route.pool.limits() == limits)
    });
    let routes = match kept {
        Some(old) => old.experts.iter().map(|expert| expert.route.clone()).collect(),
        None => {
            let addresses: Vec<Address> = upstreams.iter().map(|u| u.address.clone()).collect();
            connections::routes(&limits, unified.enabled, &addresses)
        }
    };

    let mut experts = Vec::with_capacity(config.experts.len());
    for (i, ((expert, upstream), route)) in config.experts.iter().zip(upstreams).zip(routes).enumerate() {
        let before = old.and_then(|old| old.experts.iter().find(|before| before.config == *expert));
        let service = metrics.service(&expert.name);
        let built = Expert::new(expert, &config.dispatch, upstream, route, service, before.map(|b| &**b));
        // All else that could be wrong was found before: only the credential is looked at here first.
        experts.push(Arc::new(
            built.map_err(|reason| config::Error::one(format!("experts[{i}].credential.from"), reason))?,
        ));
    }
    Ok(Snapshot { hash, generation, admission, experts, buffers, cache, config })
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
