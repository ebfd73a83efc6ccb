//! `monitoring.adaptiveSampling` and `monitoring.preAggregation`: the runtime watches itself, at a fixed interval or
//! when something changes, and records single values or what it saw in between.
//!
//! Reads this process's entries below `/proc` and the experts' latencies, and writes points to a bounded store; never
//! touches a request. The recorded points are what costs (storage, network, rules that look at them), so they are what
//! the optimization saves; `/metrics` always shows every series.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, time::sleep_until};

use crate::{
    config::{AdaptiveSampling, Config},
    metrics::{self, COMPONENTS, Latency},
    state::Runtime,
};

pub(crate) mod cardinality;
mod sampler;
pub mod virtual_time;
mod window;

use sampler::{Intervals, Series, Tolerance};
pub(crate) use window::{Summary, Window};

/// Points kept of each series: a day of heartbeats, or 21 minutes at the baseline's 5 s.
const KEPT: usize = 256;

/// The seed's stability thresholds, and below which differences are no change at all: 256 KiB, a hundredth of a
/// processor, 4 KiB/s, 1 KiB/s, a millisecond. In the order of [`COMPONENTS`].
const TOLERANCES: [Tolerance; 5] = [
    Tolerance { relative: 0.02, absolute: 262_144.0 },
    Tolerance { relative: 0.10, absolute: 0.01 },
    Tolerance { relative: 0.01, absolute: 4096.0 },
    Tolerance { relative: 0.05, absolute: 1024.0 },
    Tolerance { relative: 0.10, absolute: 0.001 },
];

/// Place of the experts' latencies in [`COMPONENTS`].
const UPSTREAM: usize = 4;

/// One recorded point: an entry of the store, as a sample of a native histogram is one of Prometheus.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Point {
    /// Seconds since the epoch.
    pub(crate) time: f64,
    /// The value that was recorded; with `preAggregation` the last one seen.
    pub(crate) value: f64,
    /// What was seen since the last point.
    pub(crate) summary: Option<Summary>,
}

/// The newest recorded points of each series.
#[derive(Debug, Default)]
pub(crate) struct Store(Mutex<BTreeMap<String, VecDeque<Point>>>);

impl Store {
    fn record(&self, series: &str, value: f64, summary: Option<Summary>) {
        let time = SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |age| age.as_millis() as f64 / 1e3);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let points = match all.get_mut(series) {
            Some(points) => points,
            None => all.entry(series.to_owned()).or_default(),
        };
        if points.len() == KEPT {
            points.pop_front();
        }
        points.push_back(Point { time, value, summary });
    }

    /// Forgets the series that are not watched any more.
    fn retain(&self, watched: &[Watched]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|series, _| watched.iter().any(|w| w.name == *series));
    }

    /// Every series with its points, oldest first.
    pub(crate) fn points(&self) -> BTreeMap<String, Vec<Point>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|(series, points)| (series.clone(), points.iter().cloned().collect())).collect()
    }

    /// Every series with its newest point.
    pub(crate) fn newest(&self) -> Vec<(String, Point)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(|(series, points)| Some((series.clone(), points.back()?.clone()))).collect()
    }
}

/// A file below `/proc` that stays open: reading it again gives what is so now, for the price of one system call.
#[derive(Debug)]
struct ProcFile(File);

impl ProcFile {
    fn open(path: &str) -> Option<Self> {
        File::open(path).ok().map(Self)
    }

    fn read<T>(&self, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        // Enough for some 60 network interfaces; the files of one process are far smaller.
        let mut buffer = [0; 8192];
        let length = self.0.read_at(&mut buffer, 0).ok()?;
        parse(std::str::from_utf8(&buffer[..length]).ok()?)
    }
}

/// What a series' value is read from. Memory is bytes; processor is the processors in use; disk and network are
/// bytes a second, both ways; an expert's latency is the mean of its calls since the last look, in seconds.
#[derive(Debug)]
enum Source {
    Memory(Option<ProcFile>),
    Cpu(Rate),
    Disk(Option<ProcFile>, Rate),
    Network(Option<ProcFile>, Rate),
    /// The calls and their seconds at the last look.
    Upstream(Latency, (u64, f64)),
}

/// The counter at the last look.
#[derive(Debug, Default)]
struct Rate(Option<(Instant, f64)>);

impl Rate {
    /// Change a second since the last look; none at the first.
    fn of(&mut self, now: Instant, counter: f64) -> Option<f64> {
        let (since, old) = self.0.replace((now, counter))?;
        let seconds = now.duration_since(since).as_secs_f64();
        (seconds > 0.0).then(|| (counter - old).max(0.0) / seconds)
    }
}

impl Source {
    /// The value now, if the system tells it; a rate needs two looks, a latency a call.
    fn read(&mut self, now: Instant) -> Option<f64> {
        match self {
            Self::Memory(file) => file.as_ref()?.read(metrics::parse_resident).map(|bytes| bytes as f64),
            Self::Cpu(rate) => rate.of(now, metrics::process_cpu_seconds()),
            Self::Disk(file, rate) => rate.of(now, file.as_ref()?.read(disk_bytes)?),
            Self::Network(file, rate) => rate.of(now, file.as_ref()?.read(network_bytes)?),
            Self::Upstream(latency, before) => {
                let total = latency.total();
                let (calls, seconds) = (total.0 - before.0, total.1 - before.1);
                *before = total;
                (calls > 0).then(|| seconds / calls as f64)
            }
        }
    }
}

fn disk_bytes(text: &str) -> Option<f64> {
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    Some(field("read_bytes:")? + field("write_bytes:")?)
}

fn network_bytes(text: &str) -> Option<f64> {
    let both = |line: &str| {
        let (_, counters) = line.split_once(':')?;
        let mut counters = counters.split_ascii_whitespace().map(str::parse::<f64>);
        Some(counters.next()?.ok()? + counters.nth(7)?.ok()?)
    };
    Some(text.lines().filter_map(both).sum())
}

/// How a configuration wants the process watched.
#[derive(Debug, Clone, PartialEq)]
struct Mode {
    /// `None`: a look every `interval`, and each is a point.
    adaptive: Option<AdaptiveSampling>,
    interval: Duration,
    /// The time that a point sums up.
    window: Option<Duration>,
    /// Names of the experts.
    upstream: Vec<String>,
}

impl Mode {
    fn of(config: &Config) -> Self {
        let monitoring = &config.optimizations.monitoring;
        Self {
            adaptive: monitoring.adaptive_sampling.enabled.then(|| monitoring.adaptive_sampling.clone()),
            interval: config.baseline.sample_interval,
            window: monitoring.pre_aggregation.enabled.then_some(monitoring.pre_aggregation.window),
            upstream: config.experts.iter().map(|expert| expert.name.clone()).collect(),
        }
    }

    fn series(&self, component: usize) -> Option<Series> {
        let adaptive = self.adaptive.as_ref()?;
        let (_, wanted) = adaptive.overrides.each()[component];
        let intervals = Intervals {
            base: wanted.base.unwrap_or(adaptive.base),
            min: adaptive.min,
            probe_max: wanted.probe_max.unwrap_or(adaptive.probe_max),
            heartbeat: adaptive.heartbeat,
        };
        let relative = wanted.threshold.unwrap_or(TOLERANCES[component].relative);
        Some(Series::new(intervals, Tolerance { relative, ..TOLERANCES[component] }))
    }
}

/// One series that is watched.
struct Watched {
    name: String,
    component: usize,
    source: Source,
    /// `None`: a look every interval.
    series: Option<Series>,
    window: Option<Window>,
    next: Instant,
    /// When the next window closes, where the clock says so.
    closes: Instant,
}

impl Watched {
    /// All series of a mode; experts' latencies are summed up from now on if it says so.
    fn all(runtime: &Runtime, mode: &Mode, now: Instant) -> Vec<Self> {
        let open = ProcFile::open;
        let own = [
            Source::Memory(open("/proc/self/statm")),
            Source::Cpu(Rate::default()),
            Source::Disk(open("/proc/self/io"), Rate::default()),
            Source::Network(open("/proc/self/net/dev"), Rate::default()),
        ];
        let own = own.into_iter().zip(COMPONENTS).map(|(source, name)| (name.to_owned(), source));
        let experts = mode.upstream.iter().map(|name| {
            let latency = runtime.metrics.service(name).duration;
            latency.sum_up(mode.window.is_some());
            let total = latency.total();
            (format!("upstream/{name}"), Source::Upstream(latency, total))
        });
        let all = own.chain(experts).enumerate().map(|(i, (name, source))| {
            let component = i.min(UPSTREAM);
            Self {
                name,
                component,
                source,
                series: mode.series(component),
                window: None,
                next: now,
                closes: now + mode.window.unwrap_or_default(),
            }
        });
        all.collect()
    }

    /// What was seen since the last point.
    fn summary(&mut self) -> Option<Summary> {
        match &self.source {
            // Of calls, not of looks: a mean of means would hide the slow ones.
            Source::Upstream(latency, _) => latency.take_window(),
            _ => self.window.take(),
        }
        .map(|window| window.close())
    }

    /// Takes one look, and gives the value to record, if it is time for a point.
    fn look(&mut self, mode: &Mode, started: Instant, now: Instant) -> Option<f64> {
        let value = self.source.read(now);
        if let Some(value) = value.filter(|_| mode.window.is_some() && self.component != UPSTREAM) {
            Window::add(&mut self.window, value);
        }
        match (&mut self.series, value) {
            (Some(series), Some(value)) => {
                let decision = series.probe(now - started, value);
                self.next = now + decision.next;
                decision.record
            }
            // The first look at a rate, no call since the last look, or a system that does not tell.
            (Some(series), None) => {
                self.next = now + series.nothing(now - started);
                None
            }
            (None, value) => {
                self.next = now + mode.interval;
                match mode.window {
                    None => value,
                    Some(_) if now < self.closes => None,
                    Some(window) => {
                        self.closes = now + window;
                        value.or(self.window.as_ref().map(|window| window.last))
                    }
                }
            }
        }
    }
}

/// Watches until `changed` closes; a new configuration that wants it otherwise begins afresh.
pub(crate) async fn run(runtime: Arc<Runtime>, mut changed: watch::Receiver<u64>) {
    let started = Instant::now();
    let mut mode = Mode::of(&runtime.snapshot().config);
    let mut watched = Watched::all(&runtime, &mode, started);
    loop {
        let next = watched.iter().map(|w| w.next).min().unwrap_or(started);
        tokio::select! {
            () = sleep_until(next.into()) => {}
            news = changed.changed() => match news {
                Err(_) => return,
                Ok(()) => {
                    let wanted = Mode::of(&runtime.snapshot().config);
                    if wanted != mode {
                        watched = Watched::all(&runtime, &wanted, Instant::now());
                        runtime.metrics.store.retain(&watched);
                        mode = wanted;
                    } else if mode.adaptive.is_some() {
                        // What a new configuration does to the process is worth a look at once.
                        watched.iter_mut().for_each(|w| w.next = Instant::now());
                    }
                }
            }
        }
        // No await between the two readings, so the thread is the same and all its time is the monitor's.
        let cpu = metrics::thread_cpu_seconds();
        let now = Instant::now();
        for w in watched.iter_mut().filter(|w| w.next <= now) {
            let counters = &runtime.metrics.components[w.component];
            counters.probes.inc();
            if let Some(value) = w.look(&mode, started, now) {
                counters.points.inc();
                let summary = mode.window.and_then(|_| w.summary());
                runtime.metrics.store.record(&w.name, value, summary);
            }
        }
        runtime.metrics.monitor_cpu.inc_by((metrics::thread_cpu_seconds() - cpu).max(0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "experts: [{name: alpha, url: \"http://127.0.0.1:1/\"}]";

    fn runtime(monitoring: &str) -> (Arc<Runtime>, Mode) {
        let file = format!("{ONE}\noptimizations: {{monitoring: {monitoring}}}");
        let runtime = Runtime::new(file.as_bytes(), "test", None).expect("valid");
        let mode = Mode::of(&runtime.snapshot().config);
        (runtime, mode)
    }

    /// Looks at every series for `seconds` of a clock of its own; gives the points by series.
    fn watch(
        monitoring: &str,
        seconds: u64,
        mut each: impl FnMut(&Runtime, u64),
    ) -> BTreeMap<String, Vec<Point>> {
        let (runtime, mode) = runtime(monitoring);
        let started = Instant::now();
        let mut watched = Watched::all(&runtime, &mode, started);
        for second in 0..seconds {
            each(&runtime, second);
            let now = started + Duration::from_secs(second);
            for w in watched.iter_mut().filter(|w| w.next <= now) {
                if let Some(value) = w.look(&mode, started, now) {
                    let summary = mode.window.and_then(|_| w.summary());
                    runtime.metrics.store.record(&w.name, value, summary);
                }
            }
        }
        runtime.metrics.store.points()
    }

    #[test]
    fn the_store_is_bounded() {
        let store = Store::default();
        for i in 0..3 * KEPT {
            store.record("memory", i as f64, None);
        }
        let points = &store.points()["memory"];
        assert_eq!(points.len(), KEPT);
        assert_eq!(points.last().map(|p| p.value), Some((3 * KEPT - 1) as f64));
    }

    #[test]
    fn every_series_is_read_on_linux() {
        let called = |runtime: &Runtime, _| runtime.metrics.service("alpha").duration.observe(0.25);
        let points = watch("{}", 11, called);
        let names: Vec<&str> = points.keys().map(String::as_str).collect();
        assert_eq!(names, ["cpu", "disk", "memory", "network", "upstream/alpha"]);
        // At 0, 5 and 10 s; the first look at a rate has no value yet.
        assert_eq!(points.values().map(Vec::len).collect::<Vec<_>>(), [2, 2, 3, 2, 3]);
        assert!(
            points["upstream/alpha"].iter().all(|p| (p.value - 0.25).abs() < 1e-9 && p.summary.is_none())
        );
        assert!(points["memory"][0].value > 1e5);
    }

    #[test]
    fn a_window_sums_up_every_call_and_every_look() {
        let called = |runtime: &Runtime, second: u64| {
            for _ in 0..10 {
                runtime.metrics.service("alpha").duration.observe(if second == 30 { 9.0 } else { 0.1 });
            }
        };
        let points = watch("{preAggregation: {enabled: true, window: 60s}}", 121, called);
        let [first, second] = &points["upstream/alpha"][..] else { panic!("{points:?}") };
        let [first, second] = [first, second].map(|point| point.summary.clone().expect("a window"));
        // Calls at 0 to 60 s, then 61 to 120 s: the peak in between two looks is there, and only once.
        assert_eq!((first.count, first.min, first.max), (610, 0.1, 9.0));
        assert_eq!((second.count, second.min, second.max), (600, 0.1, 0.1));
        assert!((first.p50 / 0.1 - 1.0).abs() < 0.02 && first.p99 > 8.0, "{first:?}");
        assert_eq!(points["memory"].len(), 2);
        assert_eq!(points["memory"][1].summary.as_ref().map(|s| s.count), Some(12));
    }

    #[test]
    fn an_adaptive_point_sums_up_since_the_last() {
        let monitoring = "{preAggregation: {enabled: true}, adaptiveSampling: {enabled: true}}";
        let points = watch(monitoring, 300, |_, _| {});
        let looks: u64 = points["memory"].iter().filter_map(|p| p.summary.as_ref()).map(|s| s.count).sum();
        // A heartbeat at 240 s at the latest, and as many looks as the longest interval makes in that time.
        assert!(points["memory"].len() >= 2 && looks >= 240 / 15, "{points:?}");
    }

    #[test]
    fn overrides_reach_their_component() {
        let overrides = "{memory: {base: 10s, threshold: 0.5}, disk: {probeMax: 60s}}";
        let (_, mode) = runtime(&format!("{{adaptiveSampling: {{enabled: true, overrides: {overrides}}}}}"));
        let bases: Vec<u64> =
            (0..5).filter_map(|i| Some(mode.series(i)?.nothing(Duration::ZERO).as_secs())).collect();
        assert_eq!(bases, [10, 5, 5, 5, 5]);
        // Half as much again is no change where half is the threshold; it is one elsewhere.
        for (component, points) in [(0, 1), (3, 2)] {
            let mut series = mode.series(component).expect("adaptive");
            let seen = (0..60_u32).filter(|t| {
                let value = if *t < 30 { 1e9 } else { 1.4e9 };
                series.probe(Duration::from_secs(u64::from(*t)), value).record.is_some()
            });
            assert_eq!(seen.count(), points, "{component}");
        }
    }
}
