//! Every metric of the runtime, under closed label sets, and their text form.
//!
//! Touches only counters and, at a scrape, this process's own entries below `/proc`. Names of experts are the only
//! labels that come from a configuration; they are dropped when the configuration drops the expert.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::SystemTime,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{
        MetricType, TypedMetric,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{
    cache::Evictions,
    config::Config,
    experts::breaker::State,
    monitoring::{
        Store, Window,
        cardinality::{self, Limited},
    },
    pool,
    pressure::Cgroup,
    results,
};

/// Media type of [`Metrics::encode`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How one call to one expert ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A JSON answer came.
    Ok,
    /// Neither the expert's time-out nor the query's deadline was kept.
    Timeout,
    /// No connection could be made, or it broke.
    Connect,
    /// The expert answered with a status outside 200 to 299, or that its tool failed.
    Status,
    /// No connection became free within the acquire time-out.
    Busy,
    /// The answer was no JSON document, or larger than the limit, or not what its protocol says.
    Invalid,
    /// The expert was not asked, since its breaker is open.
    Open,
}

impl Outcome {
    const ALL: [Self; 7] =
        [Self::Ok, Self::Timeout, Self::Connect, Self::Status, Self::Busy, Self::Invalid, Self::Open];

    /// The label value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Status => "status",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::Open => "open",
        }
    }
}

/// How one query ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Every expert answered.
    Ok,
    /// The quorum was met, and some expert failed.
    Partial,
    /// The quorum was missed.
    Error,
    /// Refused, since too many queries were in flight.
    Shed,
    /// The client's fault.
    Invalid,
}

impl Verdict {
    const ALL: [Self; cardinality::OUTCOMES] =
        [Self::Ok, Self::Partial, Self::Error, Self::Shed, Self::Invalid];

    /// The label value.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Partial => "partial",
            Self::Error => "error",
            Self::Shed => "shed",
            Self::Invalid => "invalid",
        }
    }
}

/// Whose pool a call's connection came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manager {
    /// The expert's own.
    Own,
    /// The one for all.
    Unified,
}

/// Whose pool, and whether the connection was open already.
const ACQUIRED: [(&str, &str); 4] =
    [("own", "false"), ("own", "true"), ("unified", "false"), ("unified", "true")];

/// The components that the monitor watches.
pub(crate) const COMPONENTS: [&str; 5] = ["memory", "cpu", "disk", "network", "upstream"];

type Labels = Vec<(&'static str, String)>;

/// `labels` and one more.
fn with(labels: &Labels, name: &'static str, value: &str) -> Labels {
    let mut labels = labels.clone();
    labels.push((name, value.to_owned()));
    labels
}

fn histogram() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0])
}

/// Finer at the low end: taking an idle connection costs microseconds.
fn acquire_histogram() -> Histogram {
    Histogram::new([
        0.000_01, 0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
    ])
}

/// How long an expert's calls take: a histogram and, while `monitoring.preAggregation` is on, their current window.
#[derive(Debug, Clone)]
pub(crate) struct Latency {
    histogram: Histogram,
    summed: Arc<Mutex<Summed>>,
}

#[derive(Debug, Default)]
struct Summed {
    calls: u64,
    seconds: f64,
    on: bool,
    window: Option<Window>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { histogram: histogram(), summed: Arc::default() }
    }
}

impl EncodeMetric for Latency {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.histogram.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        self.histogram.metric_type()
    }
}

impl TypedMetric for Latency {
    const TYPE: MetricType = <Histogram as TypedMetric>::TYPE;
}

impl Latency {
    pub(crate) fn observe(&self, seconds: f64) {
        self.histogram.observe(seconds);
        let mut summed = self.summed();
        summed.calls += 1;
        summed.seconds += seconds;
        if summed.on {
            Window::add(&mut summed.window, seconds);
        }
    }

    /// Calls so far, and their seconds.
    pub(crate) fn total(&self) -> (u64, f64) {
        let summed = self.summed();
        (summed.calls, summed.seconds)
    }

    /// Begins to sum up calls, or ends it.
    pub(crate) fn sum_up(&self, on: bool) {
        let mut summed = self.summed();
        (summed.on, summed.window) = (on, None);
    }

    /// The calls since the last time.
    pub(crate) fn take_window(&self) -> Option<Window> {
        self.summed().window.take()
    }

    fn summed(&self) -> std::sync::MutexGuard<'_, Summed> {
        self.summed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metrics of one expert; by default they are not shown to anybody.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    requests: [Counter; 7],
    pub(crate) duration: Latency,
    pub(crate) acquire: Histogram,
    acquired: [Counter; 4],
    pub(crate) opened: Counter,
    pub(crate) open: Gauge,
    pub(crate) lookups: Counter,
    pub(crate) retries: Counter,
    pub(crate) breaker_opened: Counter,
    breaker: [Gauge; 3],
}

impl Default for Service {
    fn default() -> Self {
        Self {
            requests: Default::default(),
            duration: Latency::default(),
            acquire: acquire_histogram(),
            acquired: Default::default(),
            opened: Counter::default(),
            open: Gauge::default(),
            lookups: Counter::default(),
            retries: Counter::default(),
            breaker_opened: Counter::default(),
            breaker: Default::default(),
        }
    }
}

/// The states of a breaker, and their label values.
const BREAKER: [(State, &str); 3] =
    [(State::Closed, "closed"), (State::Open, "open"), (State::HalfOpen, "half_open")];

impl Service {
    /// Counts a connection that a call has got.
    pub(crate) fn acquired(&self, manager: Manager, reused: bool) {
        self.acquired[2 * usize::from(manager == Manager::Unified) + usize::from(reused)].inc();
    }

    pub(crate) fn count(&self, outcome: Outcome) {
        self.requests[outcome as usize].inc();
    }

    /// Shows the state of the expert's breaker.
    pub(crate) fn breaker(&self, now: State) {
        for (gauge, (state, _)) in self.breaker.iter().zip(BREAKER) {
            gauge.set((state == now).into());
        }
    }
}

/// The metrics of one monitored component.
#[derive(Debug, Clone)]
pub(crate) struct Component {
    pub(crate) points: Counter,
    pub(crate) probes: Counter,
}

/// All metrics of a process.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    queries: [Counter; 5],
    pub(crate) query_duration: Histogram,
    pub(crate) inflight: Gauge,
    requests: Family<Labels, Counter>,
    duration: Family<Labels, Latency>,
    acquire: Family<Labels, Histogram, fn() -> Histogram>,
    acquired: Family<Labels, Counter>,
    opened: Family<Labels, Counter>,
    open: Family<Labels, Gauge>,
    lookups: Family<Labels, Counter>,
    retries: Family<Labels, Counter>,
    breaker_opened: Family<Labels, Counter>,
    breaker: Family<Labels, Gauge>,
    pub(crate) pool: pool::Counts,
    pub(crate) pool_objects: Gauge,
    pub(crate) pool_held_bytes: Gauge,
    pub(crate) cache_hit: Counter,
    pub(crate) cache_miss: Counter,
    pub(crate) cache_entries: Gauge,
    pub(crate) cache_bytes: Gauge,
    pub(crate) evictions: Evictions,
    pub(crate) results: results::Counts,
    /// What bounds this process's memory.
    pub(crate) cgroup: Cgroup,
    pub(crate) components: [Component; 5],
    pub(crate) monitor_cpu: Counter<f64, std::sync::atomic::AtomicU64>,
    /// Queries by who asked.
    pub(crate) requesters: Arc<Limited>,
    /// The monitor's points.
    pub(crate) store: Arc<Store>,
    config_info: Family<Labels, Gauge>,
    pub(crate) reload_applied: Counter,
    pub(crate) reload_rejected: Counter,
}

impl Metrics {
    /// `allocations` reads the allocator's count of allocations so far, where there is one.
    pub(crate) fn new(allocations: Option<fn() -> Option<u64>>) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process { allocations }));
        let own = registry.sub_registry_with_prefix("synthex_runtime");

        let counters = |own: &mut Registry, name: &str, help: &str, label: &'static str, values: &[&str]| {
            let family = Family::<Labels, Counter>::default();
            own.register(name, help, family.clone());
            values
                .iter()
                .map(|v| family.get_or_create_owned(&vec![(label, (*v).to_owned())]))
                .collect::<Vec<_>>()
        };

        let outcomes = Verdict::ALL.map(Verdict::as_str);
        let queries = counters(own, "queries", "Queries by how they ended", "outcome", &outcomes);
        let queries = std::array::from_fn(|i| queries[i].clone());
        let query_duration = histogram();
        own.register(
            "query_duration_seconds",
            "Time from a query's header to its answer",
            query_duration.clone(),
        );
        let inflight = Gauge::default();
        own.register("inflight_queries", "Queries being served", inflight.clone());

        let requests = Family::default();
        own.register("upstream_requests", "Calls to experts by how they ended", requests.clone());
        let duration = Family::<Labels, Latency>::default();
        own.register(
            "upstream_duration_seconds",
            "Time of a call to an expert, waiting included",
            duration.clone(),
        );
        let acquire = Family::new_with_constructor(acquire_histogram as fn() -> Histogram);
        let help = "Time until a call had a connection: waiting, name look-up and connecting";
        own.register("upstream_acquire_seconds", help, acquire.clone());
        let acquired = Family::default();
        let help =
            "Connections that calls got, by whose pool they came from and whether they were open already";
        own.register("upstream_acquired", help, acquired.clone());
        let opened = Family::default();
        own.register("upstream_connections_opened", "Connections opened to experts", opened.clone());
        let open = Family::default();
        own.register("upstream_connections_open", "Connections to experts that are open", open.clone());
        let lookups = Family::default();
        own.register("upstream_lookups", "Times that the system was asked for addresses", lookups.clone());
        let retries = Family::default();
        own.register("upstream_retries", "Further attempts of calls to experts", retries.clone());
        let breaker_opened = Family::default();
        own.register("breaker_opened", "Times that an expert's breaker opened", breaker_opened.clone());
        let breaker = Family::default();
        own.register("breaker_state", "1 for the state that an expert's breaker is in", breaker.clone());

        let taken =
            counters(own, "pool_acquired", "Buffers taken, from the pool or new", "result", &["hit", "miss"]);
        let results = ["kept", "dropped_full", "dropped_large"];
        let released =
            counters(own, "pool_released", "Buffers given back, kept or freed", "result", &results);
        let pool = pool::Counts {
            hit: taken[0].clone(),
            miss: taken[1].clone(),
            kept: released[0].clone(),
            full: released[1].clone(),
            large: released[2].clone(),
        };
        let pool_objects = Gauge::default();
        own.register("pool_objects", "Buffers that wait in the pool", pool_objects.clone());
        let pool_held_bytes = Gauge::default();
        own.register("pool_held_bytes", "Bytes that wait in the pool", pool_held_bytes.clone());
        let cache =
            counters(own, "cache_requests", "Look-ups in the answer cache", "result", &["hit", "miss"]);
        let cache_entries = Gauge::default();
        own.register("cache_entries", "Answers in the cache", cache_entries.clone());
        let cache_bytes = Gauge::default();
        own.register("cache_bytes", "Bytes of the cache, book-keeping included", cache_bytes.clone());
        let reasons = ["ttl", "capacity", "pressure"];
        let evicted = counters(own, "cache_evictions", "Answers dropped from the cache", "reason", &reasons);
        let evictions =
            Evictions { ttl: evicted[0].clone(), capacity: evicted[1].clone(), pressure: evicted[2].clone() };
        let cgroup = Cgroup::of_this_process();
        own.register_collector(Box::new(Pressure(cgroup.clone())));

        let kinds = ["sent", "lost", "dropped"];
        let handed = counters(own, "results", "Results by what became of them", "result", &kinds);
        let results = results::Counts {
            sent: handed[0].clone(),
            lost: handed[1].clone(),
            dropped: handed[2].clone(),
            ..results::Counts::default()
        };
        own.register("results_pending", "Results that wait for the collector", results.pending.clone());
        let help = "Batches of results that were refused and split";
        own.register("batch_splits", help, results.splits.clone());

        let points = counters(own, "monitor_points", "Points recorded", "component", &COMPONENTS);
        let probes = counters(own, "monitor_probes", "Values read", "component", &COMPONENTS);
        let components =
            std::array::from_fn(|i| Component { points: points[i].clone(), probes: probes[i].clone() });
        let monitor_cpu = Counter::default();
        own.register("monitor_cpu_seconds", "CPU time that the monitor itself used", monitor_cpu.clone());

        let updates = Counter::default();
        own.register("metric_updates", "Counts under labels that clients choose", updates.clone());
        let overflow = Family::<Labels, Counter>::default();
        let help = "Counts whose label was folded, since its family was full";
        own.register("metric_overflow", help, overflow.clone());
        let labels = vec![("family", REQUESTERS.to_owned()), ("label", "requester".to_owned())];
        let requesters = Arc::new(Limited::new(updates, overflow.get_or_create_owned(&labels)));
        own.register_collector(Box::new(Requesters(requesters.clone())));
        let store = Arc::<Store>::default();
        own.register_collector(Box::new(Newest(store.clone())));

        let config_info = Family::default();
        own.register("config_info", "Hash of the configuration in force", config_info.clone());
        let help = "Changed configuration files by what became of them";
        let reloads = counters(own, "config_reloads", help, "result", &["applied", "rejected"]);
        let build = Family::<Labels, Gauge>::default();
        build.get_or_create(&vec![("version", env!("CARGO_PKG_VERSION").to_owned())]).set(1);
        own.register("build_info", "Version of this program", build);

        Self {
            queries,
            query_duration,
            inflight,
            requests,
            duration,
            acquire,
            acquired,
            opened,
            open,
            lookups,
            retries,
            breaker_opened,
            breaker,
            pool,
            pool_objects,
            pool_held_bytes,
            cache_hit: cache[0].clone(),
            cache_miss: cache[1].clone(),
            cache_entries,
            cache_bytes,
            evictions,
            results,
            cgroup,
            components,
            monitor_cpu,
            requesters,
            store,
            config_info,
            reload_applied: reloads[0].clone(),
            reload_rejected: reloads[1].clone(),
            registry,
        }
    }

    pub(crate) fn count(&self, verdict: Verdict) {
        self.queries[verdict as usize].inc();
    }

    /// Counts a query that somebody is known to have asked.
    pub(crate) fn count_of(&self, requester: &str, verdict: Verdict) {
        self.count(verdict);
        self.requesters.count(requester, verdict as usize);
    }

    /// The metrics of one expert, made when they are new, with every outcome at zero, so that the first failure is
    /// already a difference between two scrapes.
    pub(crate) fn service(&self, name: &str) -> Service {
        let labels = vec![("service", name.to_owned())];
        Service {
            requests: Outcome::ALL.map(|outcome| {
                self.requests.get_or_create_owned(&with(&labels, "outcome", outcome.as_str()))
            }),
            duration: self.duration.get_or_create_owned(&labels),
            acquire: self.acquire.get_or_create_owned(&labels),
            acquired: ACQUIRED.map(|kind| self.acquired.get_or_create_owned(&acquired(name, kind))),
            opened: self.opened.get_or_create_owned(&labels),
            open: self.open.get_or_create_owned(&labels),
            lookups: self.lookups.get_or_create_owned(&labels),
            retries: self.retries.get_or_create_owned(&labels),
            breaker_opened: self.breaker_opened.get_or_create_owned(&labels),
            breaker: BREAKER.map(|(_, name)| self.breaker.get_or_create_owned(&with(&labels, "state", name))),
        }
    }

    /// Shows that `new` is in force, bounds what it bounds, and drops the series of experts that only `old` had.
    pub(crate) fn configured(&self, hash: &str, old: Option<&Config>, new: &Config) {
        let limit = &new.optimizations.monitoring.cardinality_limit;
        self.requesters.limit(match limit.enabled {
            true => limit.max_series as usize,
            false => cardinality::BASELINE_MAX_SERIES,
        });
        self.config_info.clear();
        self.config_info.get_or_create(&vec![("hash", hash.to_owned())]).set(1);
        for expert in old.map_or(&[][..], |old| &old.experts) {
            if new.experts.iter().any(|e| e.name == expert.name) {
                continue;
            }
            let labels = vec![("service", expert.name.clone())];
            for outcome in Outcome::ALL {
                self.requests.remove(&with(&labels, "outcome", outcome.as_str()));
            }
            for (_, state) in BREAKER {
                self.breaker.remove(&with(&labels, "state", state));
            }
            self.duration.remove(&labels);
            self.acquire.remove(&labels);
            for kind in ACQUIRED {
                self.acquired.remove(&acquired(&expert.name, kind));
            }
            self.opened.remove(&labels);
            self.open.remove(&labels);
            self.lookups.remove(&labels);
            self.retries.remove(&labels);
            self.breaker_opened.remove(&labels);
        }
    }

    /// All metrics in the OpenMetrics text format.
    pub(crate) fn encode(&self) -> String {
        let mut text = String::with_capacity(16 << 10);
        // Writing to a String cannot fail; a collector's own error would only cut the text short.
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            tracing::warn!(%error, "metrics could not be encoded whole");
        }
        text
    }
}

fn acquired(service: &str, (manager, reused): (&str, &str)) -> Labels {
    vec![("service", service.to_owned()), ("manager", manager.to_owned()), ("reused", reused.to_owned())]
}

const REQUESTERS: &str = "requester_queries";

/// Queries by who asked and how they ended, as far as `monitoring.cardinalityLimit` lets them apart.
#[derive(Debug)]
struct Requesters(Arc<Limited>);

impl Collector for Requesters {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let series = self.0.series();
        let help = "Queries by who asked and how they ended";
        let mut all = to.encode_descriptor(REQUESTERS, help, None, MetricType::Counter)?;
        for (requester, outcome, count) in &series {
            let labels = [("requester", &**requester), ("outcome", Verdict::ALL[*outcome].as_str())];
            ConstCounter::new(*count).encode(all.encode_family(&labels)?)?;
        }
        let (now, most) = self.0.size();
        let labels = [("family", REQUESTERS)];
        for (name, help, value) in [
            ("metric_series", "Series whose labels clients choose", now),
            ("metric_series_limit", "Most series that there can be", most),
        ] {
            let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value as i64).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// How close the container is to its memory limit.
#[derive(Debug)]
struct Pressure(Cgroup);

impl Collector for Pressure {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(reading) = self.0.read() else { return Ok(()) };
        let mut gauge = |name: &str, help: &str, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(to.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        if let Some(limit) = reading.limit {
            gauge("memory_limit_bytes", "Memory limit of the container", limit as f64)?;
            gauge("memory_pressure_ratio", "Share of that limit in use", reading.ratio())?;
        }
        if let Some(stall) = reading.stall {
            gauge("memory_stall_ratio", "Share of ten seconds in which a thread waited for memory", stall)?;
        }
        Ok(())
    }
}

/// The newest point of each monitored series, so that what is recorded can be seen without the points themselves.
#[derive(Debug)]
struct Newest(Arc<Store>);

impl Collector for Newest {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let help = "The newest recorded point, and what was seen since the one before";
        let mut family = to.encode_descriptor("monitor_value", help, None, MetricType::Gauge)?;
        for (series, point) in self.0.newest() {
            let mut gauge = |stat: &str, value: f64| {
                let labels = [("series", &*series), ("stat", stat)];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)
            };
            gauge("last", point.value)?;
            if let Some(s) = point.summary {
                gauge("min", s.min)?;
                gauge("max", s.max)?;
                gauge("mean", s.sum / s.count as f64)?;
                gauge("p50", s.p50)?;
                gauge("p99", s.p99)?;
            }
        }
        Ok(())
    }
}

/// Metrics of the process as a whole, read when they are asked for.
#[derive(Debug)]
struct Process {
    allocations: Option<fn() -> Option<u64>>,
}

impl Collector for Process {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(to.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        if let Some(bytes) = resident_bytes() {
            gauge("process_resident_memory_bytes", "Resident memory", bytes as f64)?;
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            gauge("process_open_fds", "Open file descriptors", entries.count() as f64)?;
        }
        gauge("process_start_time_seconds", "Start of the process since the epoch", start_time())?;
        let cpu = ConstCounter::new(process_cpu_seconds());
        cpu.encode(to.encode_descriptor("process_cpu_seconds", "CPU time used", None, cpu.metric_type())?)?;
        if let Some(count) = self.allocations.and_then(|read| read()) {
            let count = ConstCounter::new(count);
            let help = "Allocations made so far; lags by what the threads' own caches hold";
            let name = "synthex_runtime_allocator_allocations";
            count.encode(to.encode_descriptor(name, help, None, count.metric_type())?)?;
        }
        Ok(())
    }
}

/// Seconds since the epoch at which this process first asked, which [`Metrics::new`]'s caller does at start.
pub(crate) fn start_time() -> f64 {
    static START: OnceLock<f64> = OnceLock::new();
    *START.get_or_init(|| SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |age| age.as_secs_f64()))
}

/// Resident memory in bytes, where the system tells.
pub(crate) fn resident_bytes() -> Option<u64> {
    parse_resident(&std::fs::read_to_string("/proc/self/statm").ok()?)
}

/// Resident memory in bytes, from the text of `/proc/self/statm`.
pub(crate) fn parse_resident(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn seconds(clock: rustix::time::ClockId) -> f64 {
    let time = rustix::time::clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// CPU seconds of all threads of this process.
pub(crate) fn process_cpu_seconds() -> f64 {
    seconds(rustix::time::ClockId::ProcessCPUTime)
}

/// CPU seconds of the calling thread.
pub(crate) fn thread_cpu_seconds() -> f64 {
    seconds(rustix::time::ClockId::ThreadCPUTime)
}
