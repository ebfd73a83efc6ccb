//! `monitoring.adaptiveSampling`: the runtime watches itself, at a fixed interval or when something changes.
//!
//! Reads this process's entries below `/proc` and writes points to a bounded store; never touches a request. The
//! recorded points are what costs (storage, network, rules that look at them), so they are what the optimization
//! saves; `/metrics` always shows every series.

use std::{
    collections::VecDeque,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, time::sleep_until};

use crate::{
    config::Config,
    metrics::{self, COMPONENTS},
    state::Runtime,
};

mod sampler;

use sampler::{Intervals, Series, Tolerance};

/// Points kept for each component: a day of heartbeats, or 21 minutes at the baseline's 5 s.
const KEPT: usize = 256;

/// The seed's stability thresholds, and below which differences are no change at all: 256 KiB, a hundredth of a
/// processor, 4 KiB/s, 1 KiB/s.
const TOLERANCES: [Tolerance; 4] = [
    Tolerance { relative: 0.02, absolute: 262_144.0 },
    Tolerance { relative: 0.10, absolute: 0.01 },
    Tolerance { relative: 0.01, absolute: 4096.0 },
    Tolerance { relative: 0.05, absolute: 1024.0 },
];

/// The newest recorded points of each component.
#[derive(Debug, Default)]
pub(crate) struct Store([Mutex<VecDeque<(f64, f64)>>; 4]);

impl Store {
    fn record(&self, component: usize, value: f64) {
        let time = SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |age| age.as_millis() as f64 / 1e3);
        let mut points = self.0[component].lock().unwrap_or_else(PoisonError::into_inner);
        if points.len() == KEPT {
            points.pop_front();
        }
        points.push_back((time, value));
    }

    /// For each component, pairs of seconds since the epoch and value, oldest first.
    pub(crate) fn points(&self) -> [(&'static str, Vec<(f64, f64)>); 4] {
        std::array::from_fn(|i| {
            let points = self.0[i].lock().unwrap_or_else(PoisonError::into_inner);
            (COMPONENTS[i], points.iter().copied().collect())
        })
    }
}

/// What a component's value is read from. Memory is bytes; processor is the processors in use; disk and network are
/// bytes a second, both ways.
#[derive(Debug)]
struct Reader {
    component: usize,
    /// The counter at the last look, for rates.
    before: Option<(Instant, f64)>,
}

impl Reader {
    /// The value now, if the system tells it; a rate needs two looks.
    fn read(&mut self, now: Instant) -> Option<f64> {
        let raw = match self.component {
            0 => return metrics::resident_bytes().map(|bytes| bytes as f64),
            1 => metrics::process_cpu_seconds(),
            2 => disk_bytes()?,
            _ => network_bytes()?,
        };
        let before = self.before.replace((now, raw));
        let (since, old) = before?;
        let seconds = now.duration_since(since).as_secs_f64();
        (seconds > 0.0).then(|| (raw - old).max(0.0) / seconds)
    }
}

fn disk_bytes() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/io").ok()?;
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    Some(field("read_bytes:")? + field("write_bytes:")?)
}

fn network_bytes() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/net/dev").ok()?;
    let both = |line: &str| {
        let (_, counters) = line.split_once(':')?;
        let mut counters = counters.split_ascii_whitespace().map(str::parse::<f64>);
        Some(counters.next()?.ok()? + counters.nth(7)?.ok()?)
    };
    Some(text.lines().filter_map(both).sum())
}

/// How a configuration wants the components watched.
#[derive(Debug, Clone, PartialEq)]
enum Mode {
    Fixed(Duration),
    Adaptive(Intervals),
}

impl Mode {
    fn of(config: &Config) -> Self {
        let adaptive = &config.optimizations.monitoring.adaptive_sampling;
        match adaptive.enabled {
            false => Self::Fixed(config.baseline.sample_interval),
            true => Self::Adaptive(Intervals {
                base: adaptive.base,
                min: adaptive.min,
                probe_max: adaptive.probe_max,
                heartbeat: adaptive.heartbeat,
            }),
        }
    }
}

struct Watched {
    reader: Reader,
    /// `None`: every probe is a point.
    series: Option<Series>,
    next: Instant,
}

impl Watched {
    fn all(mode: &Mode, now: Instant) -> [Self; 4] {
        std::array::from_fn(|component| Self {
            reader: Reader { component, before: None },
            series: match mode {
                Mode::Fixed(_) => None,
                Mode::Adaptive(intervals) => Some(Series::new(intervals.clone(), TOLERANCES[component])),
            },
            next: now,
        })
    }
}

/// Watches until `changed` closes; a new configuration that wants it otherwise begins afresh.
pub(crate) async fn run(runtime: Arc<Runtime>, mut changed: watch::Receiver<u64>) {
    let started = Instant::now();
    let mut mode = Mode::of(&runtime.snapshot().config);
    let mut watched = Watched::all(&mode, started);
    loop {
        let next = watched.iter().map(|w| w.next).min().unwrap_or(started);
        tokio::select! {
            () = sleep_until(next.into()) => {}
            news = changed.changed() => match news {
                Err(_) => return,
                Ok(()) => {
                    let wanted = Mode::of(&runtime.snapshot().config);
                    if wanted != mode {
                        watched = Watched::all(&wanted, Instant::now());
                        mode = wanted;
                    }
                    continue;
                }
            }
        }
        // No await between the two readings, so the thread is the same and all its time is the monitor's.
        let cpu = metrics::thread_cpu_seconds();
        let now = Instant::now();
        for w in watched.iter_mut().filter(|w| w.next <= now) {
            probe(&runtime, &mode, w, started, now);
        }
        runtime.metrics.monitor_cpu.inc_by((metrics::thread_cpu_seconds() - cpu).max(0.0));
    }
}

fn probe(runtime: &Runtime, mode: &Mode, watched: &mut Watched, started: Instant, now: Instant) {
    let component = watched.reader.component;
    let counters = &runtime.metrics.components[component];
    counters.probes.inc();
    let value = watched.reader.read(now);
    let record = match (&mut watched.series, value, mode) {
        (Some(series), Some(value), _) => {
            let decision = series.probe(now - started, value);
            watched.next = now + decision.next;
            decision.record
        }
        // The first look at a rate, or a system that does not tell.
        (Some(_), None, Mode::Adaptive(intervals)) => {
            watched.next = now + intervals.base;
            None
        }
        (_, value, Mode::Fixed(interval)) => {
            watched.next = now + *interval;
            value
        }
        // A series is there in the adaptive mode only.
        (None, _, Mode::Adaptive(_)) => None,
    };
    if let Some(value) = record {
        counters.points.inc();
        runtime.store.record(component, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_is_bounded() {
        let store = Store::default();
        for i in 0..3 * KEPT {
            store.record(0, i as f64);
        }
        let points = store.points();
        assert_eq!(points[0].1.len(), KEPT);
        assert_eq!(points[0].1.last().map(|p| p.1), Some((3 * KEPT - 1) as f64));
    }

    #[test]
    fn every_component_can_be_read_on_linux() {
        for (component, name) in COMPONENTS.into_iter().enumerate() {
            let mut reader = Reader { component, before: None };
            let now = Instant::now();
            let first = reader.read(now);
            let second = reader.read(now + Duration::from_secs(1));
            assert_eq!(first.is_some(), component == 0);
            assert!(second.is_some_and(|v| v >= 0.0), "{name}");
        }
    }
}
