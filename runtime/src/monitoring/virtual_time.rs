//! A week of five made-up series, watched in virtual time by a fixed clock or by the adaptive sampler.
//!
//! What data points and blindness cost can only be told over days. The series are synthetic, the same in each run, and
//! of the shapes that the components have: memory with and without noise, a processor's day, bursts of traffic, a disk
//! that fills and is cleared. A step counts as seen at the first recorded point beyond half of it.

use std::time::Duration;

use super::{
    TOLERANCES,
    sampler::{Intervals, Series},
};
use crate::config::AdaptiveSampling;

/// Seconds of a week.
const WEEK: usize = 7 * 24 * 3600;
/// A step that is not seen in so many seconds, or before the next one, is missed.
const PATIENCE: usize = 600;

/// What watching gave.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// Points recorded, over all series.
    pub points: usize,
    /// Values read.
    pub looks: usize,
    /// Steps in the series.
    pub steps: usize,
    /// Steps that nobody saw.
    pub missed: usize,
    /// Seconds until each of the others was seen, in order.
    delays: Vec<usize>,
}

impl Sampled {
    /// A look every `every` seconds, and each is a point.
    pub fn fixed(every: usize) -> Self {
        Self::watch(|_| move |t: usize, value: f64| (Some(value), t + every))
    }

    /// The quantile `q` (0 to 1) of the seconds until a step was seen.
    pub fn delay(&self, q: f64) -> f64 {
        let i = ((self.delays.len() as f64 * q) as usize).min(self.delays.len().saturating_sub(1));
        self.delays.get(i).map_or(f64::NAN, |delay| *delay as f64)
    }

    fn watch<W: FnMut(usize, f64) -> (Option<f64>, usize)>(watcher: impl Fn(usize) -> W) -> Self {
        let mut sampled = Self { points: 0, looks: 0, steps: 0, missed: 0, delays: Vec::new() };
        for Truth { component, values, steps } in truths() {
            let (mut look, mut next, mut points) = (watcher(component), 0, Vec::new());
            while next < values.len() {
                let (point, then) = look(next, values[next]);
                points.extend(point.map(|value| (next, value)));
                sampled.looks += 1;
                next = then.max(next + 1);
            }
            sampled.points += points.len();
            for (i, &(at, before, after)) in steps.iter().enumerate() {
                let until = steps.get(i + 1).map_or(WEEK, |next| next.0).min(at + PATIENCE);
                let half = (before + after) / 2.0;
                let first = points.partition_point(|(t, _)| *t < at);
                let seen = points[first..].iter().take_while(|(t, _)| *t < until);
                let seen = seen.clone().find(|(_, value)| (*value > half) == (after > half));
                sampled.delays.extend(seen.map(|(t, _)| t - at));
                sampled.steps += 1;
                sampled.missed += usize::from(seen.is_none());
            }
        }
        sampled.delays.sort_unstable();
        sampled
    }
}

/// The adaptive sampler as it is by default.
pub fn adaptive() -> Sampled {
    let AdaptiveSampling { base, min, probe_max, heartbeat, .. } = AdaptiveSampling::default();
    Sampled::watch(|component| {
        let mut series = Series::new(Intervals { base, min, probe_max, heartbeat }, TOLERANCES[component]);
        move |t, value| {
            let decision = series.probe(Duration::from_secs(t as u64), value);
            (decision.record, t + decision.next.as_secs_f64().round() as usize)
        }
    })
}

/// What really happened: a value a second, and the steps in it as time, level before and level after.
struct Truth {
    component: usize,
    values: Vec<f64>,
    steps: Vec<(usize, f64, f64)>,
}

/// A random generator (SplitMix64), the same in each run.
struct Random(u64);

impl Random {
    /// Uniform, above 0 and up to 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Normal with mean 0 and deviation 1 (Box-Muller).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

fn truths() -> [Truth; 5] {
    let mut random = Random(7);
    [
        levels(0, &mut random, 4, 200e6, 0.003, |level, random| level * (1.0 + 0.1 + 0.2 * random.unit())),
        levels(0, &mut random, 4, 200e6, 0.01, |level, random| level * (1.0 - 0.1 - 0.2 * random.unit())),
        processor(&mut random),
        traffic(&mut random),
        levels(2, &mut random, 7, 50e9, 0.0, |level, _| level * 0.98),
    ]
}

/// A level with noise, a share of it, that changes a few times.
fn levels(
    component: usize,
    random: &mut Random,
    changes: usize,
    start: f64,
    noise: f64,
    change: impl Fn(f64, &mut Random) -> f64,
) -> Truth {
    let (mut level, mut values, mut steps) = (start, Vec::with_capacity(WEEK), Vec::new());
    let every = WEEK / (changes + 1);
    let mut next = every;
    for t in 0..WEEK {
        if t == next && steps.len() < changes {
            let new = change(level, random);
            steps.push((t, level, new));
            level = new;
            // Not at a multiple of anything.
            next += every - (random.unit() * 1000.0) as usize;
        }
        values.push(level * (1.0 + noise * random.normal()));
    }
    Truth { component, values, steps }
}

/// A day's wave of processors in use, with jobs that take a quarter of one more.
fn processor(random: &mut Random) -> Truth {
    let (mut job, mut values, mut steps) = (0.0, Vec::with_capacity(WEEK), Vec::new());
    let mut next = 30_000;
    for t in 0..WEEK {
        let wave = 0.40 + 0.15 * (std::f64::consts::TAU * t as f64 / 86_400.0).sin();
        if t == next {
            let new = 0.25 - job;
            steps.push((t, wave + job, wave + new));
            job = new;
            next += 20_000 + (random.unit() * 20_000.0) as usize;
        }
        values.push((wave + job + 0.01 * random.normal()).max(0.0));
    }
    Truth { component: 1, values, steps }
}

/// Traffic of log-normal size with bursts of many times as much, which last for 20 s at least.
fn traffic(random: &mut Random) -> Truth {
    let (mut values, mut steps) = (Vec::with_capacity(WEEK), Vec::new());
    let (mut next, mut ends, mut burst) = (3_000, 0, 0.0);
    for t in 0..WEEK {
        if t == next {
            // Pareto: a few are very large.
            burst = 2e6 * random.unit().powf(-1.0 / 1.5).min(50.0);
            ends = t + 20 + (random.unit() * 100.0) as usize;
            steps.push((t, 1e6, 1e6 + burst));
            next = ends + 1_000 + (random.unit() * 9_000.0) as usize;
        }
        let extra = if t < ends { burst } else { 0.0 };
        values.push(1e6 * (0.15 * random.normal()).exp() + extra);
    }
    Truth { component: 3, values, steps }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seed's figures for monitoring, which this keeps true without a clock: 96 % fewer points than both of its
    /// baselines, and no blindness for it.
    #[test]
    fn few_points_and_no_blindness() {
        let [one, five, adaptive] = [Sampled::fixed(1), Sampled::fixed(5), adaptive()];
        assert_eq!((one.points, one.looks), (5 * WEEK, 5 * WEEK));
        assert!(adaptive.points * 25 <= five.points, "{} of {}", adaptive.points, five.points);
        assert!(adaptive.delay(0.9) <= 15.0 && adaptive.delay(1.0) <= 16.0, "{adaptive:?}");
        assert!(adaptive.steps > 100 && adaptive.missed <= one.missed + adaptive.steps / 100, "{adaptive:?}");
    }
}
