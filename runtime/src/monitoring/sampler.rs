//! When to look at a value, and when to record it: a pure function of time and value.
//!
//! Looking is cheap and recording is not, so the two are apart: a series is probed at an interval that grows while it
//! is quiet, and a point is recorded when a change is confirmed by a second probe, or as a heartbeat. So a lasting
//! step is recorded within `probe_max + min`, and no series is silent for longer than `heartbeat`.
//!
//! What a look costs is mostly that the thread woke up for it: a look that comes alone costs some four times one among
//! others. So looks come at multiples of their intervals, and series that are quiet share every wake.

use std::time::Duration;

/// Gain of the level's moving average.
const LEVEL_GAIN: f64 = 0.2;
/// Gain of the noise's moving average: slower, so that a burst does not pass for noise.
const NOISE_GAIN: f64 = 0.02;
/// Values that the first guess of the noise, none at all, stands for. A gain of `NOISE_GAIN` from the start would let a
/// new process take its noise for changes for a hundred looks.
const NOISE_PRIOR: f64 = 2.0;
/// Standard deviations of noise that are no change.
const NOISE_FACTOR: f64 = 4.0;
/// Probes in a row that make a change.
const CONFIRMATIONS: u32 = 2;
/// Points that may come at once, and the time in which as many become due again: a series that jumps for ever must
/// not record more than a fixed clock would.
const BURST: f64 = 30.0;
const REFILL: Duration = Duration::from_secs(300);

/// The intervals of an adaptive series.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Intervals {
    pub(crate) base: Duration,
    pub(crate) min: Duration,
    pub(crate) probe_max: Duration,
    pub(crate) heartbeat: Duration,
}

/// What counts as no change for a kind of value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    /// As a share of the last recorded value.
    pub(crate) relative: f64,
    /// In the value's own unit, for values near zero.
    pub(crate) absolute: f64,
}

/// What to do after a probe.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    /// The value to record, if any.
    pub(crate) record: Option<f64>,
    /// When to probe next, from now.
    pub(crate) next: Duration,
}

/// One adaptive series.
#[derive(Debug)]
pub(crate) struct Series {
    intervals: Intervals,
    tolerance: Tolerance,
    interval: Duration,
    /// `None` until there is a value.
    state: Option<State>,
}

#[derive(Debug)]
struct State {
    last: f64,
    recorded_at: Duration,
    level: f64,
    noise: f64,
    /// Looks that the noise comes from.
    values: f64,
    streak: u32,
    tokens: f64,
    refilled_at: Duration,
}

impl Series {
    pub(crate) fn new(intervals: Intervals, tolerance: Tolerance) -> Self {
        Self { interval: intervals.base, intervals, tolerance, state: None }
    }

    /// Takes a look at `now` that found no value, and gives the time until the next.
    pub(crate) fn nothing(&mut self, now: Duration) -> Duration {
        let next = self.next(now);
        self.interval = self.longer();
        next
    }

    /// Takes the value `x` seen at `now`, a time on any clock that never goes back.
    pub(crate) fn probe(&mut self, now: Duration, x: f64) -> Decision {
        let Intervals { base, min, heartbeat, .. } = self.intervals;
        let longer = self.longer();
        let Some(s) = &mut self.state else {
            self.state = Some(State {
                last: x,
                recorded_at: now,
                level: x,
                noise: 0.0,
                values: NOISE_PRIOR,
                streak: 0,
                tokens: BURST - 1.0,
                refilled_at: now,
            });
            self.interval = base;
            return Decision { record: Some(x), next: self.next(now) };
        };
        let residual = x - s.level;
        let dev = (self.tolerance.relative * s.last.abs())
            .max(NOISE_FACTOR * s.noise.sqrt())
            .max(self.tolerance.absolute);
        let big = (x - s.last).abs() > dev;
        s.streak = if big { s.streak + 1 } else { 0 };
        let confirmed = s.streak >= CONFIRMATIONS;
        // What awaits its confirmation is no noise yet, or a step would raise the bar before it. A change counts as the
        // most that is none: one step hardly raises the bar, a series that jumps for ever soon does.
        if confirmed || !big {
            s.values += 1.0;
            let seen = residual.abs().min(dev).powi(2);
            s.noise += NOISE_GAIN.max(s.values.recip()) * (seen - s.noise);
        }
        s.level += LEVEL_GAIN * residual;

        let refill = BURST * now.saturating_sub(s.refilled_at).as_secs_f64() / REFILL.as_secs_f64();
        s.tokens = (s.tokens + refill).min(BURST);
        s.refilled_at = now;
        // One `min` early, so that the heartbeat falls on a look that comes anyway and not just after it.
        let due = now.saturating_sub(s.recorded_at) + min >= heartbeat;
        let record = if confirmed && s.tokens >= 1.0 {
            s.tokens -= 1.0;
            (s.level, s.streak) = (x, 0);
            Some(x)
        } else {
            due.then_some(s.level)
        };
        if let Some(value) = record {
            (s.last, s.recorded_at) = (value, now);
        }

        self.interval = if confirmed {
            // Recorded, or waits for its turn to be: there is nothing left to confirm.
            base
        } else if big {
            min
        } else {
            longer
        };
        // No later than the heartbeat, which is not over here: what was due has just been recorded.
        let left = heartbeat.saturating_sub(now.saturating_sub(s.recorded_at));
        Decision { record, next: self.next(now).min(left) }
    }

    /// The interval after a quiet look: half as much again, and `base` at once after a `min`.
    fn longer(&self) -> Duration {
        let Intervals { base, probe_max, .. } = self.intervals;
        self.interval.mul_f64(1.5).max(base).min(probe_max)
    }

    /// Time from `now` to the last multiple of the interval within it; `min`, if that is too soon.
    fn next(&self, now: Duration) -> Duration {
        let Intervals { min, .. } = self.intervals;
        let into = (now + self.interval).as_nanos() % self.interval.as_nanos();
        let next = self.interval - Duration::from_nanos(into as u64);
        // Timers are a little late, and what was due a multiple ago is due at the next.
        if next < min.mul_f64(0.9) { min } else { next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVALS: Intervals = Intervals {
        base: Duration::from_secs(5),
        min: Duration::from_secs(1),
        probe_max: Duration::from_secs(15),
        heartbeat: Duration::from_secs(240),
    };
    const TOLERANCE: Tolerance = Tolerance { relative: 0.02, absolute: 0.0 };

    /// Drives a series for `seconds` over `value` of time; gives the points recorded and the number of probes.
    fn run(seconds: u64, value: impl Fn(f64) -> f64) -> (Vec<(f64, f64)>, usize) {
        let mut series = Series::new(INTERVALS, TOLERANCE);
        let (mut now, mut points, mut probes) = (Duration::ZERO, Vec::new(), 0);
        while now < Duration::from_secs(seconds) {
            let decision = series.probe(now, value(now.as_secs_f64()));
            points.extend(decision.record.map(|v| (now.as_secs_f64(), v)));
            probes += 1;
            assert!(decision.next > Duration::ZERO && decision.next <= INTERVALS.probe_max);
            now += decision.next;
        }
        (points, probes)
    }

    /// Uniform in -1 to 1, the same for the same `t`.
    fn noise(t: f64) -> f64 {
        let mut z = t.to_bits().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    #[test]
    fn a_step_is_recorded_within_the_longest_probe_interval_plus_the_shortest() {
        for at in (100..400).step_by(7) {
            for (before, after) in [(100.0, 110.0), (100.0, 50.0), (1.0, 1e9), (0.0, 1.0), (5.0, 0.0)] {
                let step = f64::from(at) + 0.25;
                let (points, _) = run(600, |t| if t < step { before } else { after });
                let seen = points.iter().find(|(t, v)| *t >= step && *v == after).map(|(t, _)| t - step);
                assert!(seen.is_some_and(|delay| delay <= 16.0), "{before} to {after} at {step}: {seen:?}");
            }
        }
    }

    #[test]
    fn a_step_out_of_noise_is_recorded_as_soon() {
        for at in (200..800).step_by(13) {
            let step = f64::from(at);
            let (points, _) = run(1200, |t| if t < step { 100.0 } else { 112.0 } + 0.3 * noise(t));
            let seen = points.iter().find(|(t, v)| *t >= step && *v > 106.0).map(|(t, _)| t - step);
            assert!(seen.is_some_and(|delay| delay <= 16.0), "at {step}: {seen:?}");
        }
    }

    #[test]
    fn a_step_in_the_first_minute_is_recorded_as_soon_though_barely_one() {
        for at in 6..60 {
            let step = f64::from(at) + 0.25;
            for after in [102.1, 97.5, 104.0] {
                let (points, _) = run(120, |t| if t < step { 100.0 } else { after });
                let seen = points.iter().find(|(t, v)| *t >= step && *v == after).map(|(t, _)| t - step);
                assert!(seen.is_some_and(|delay| delay <= 16.0), "to {after} at {step}: {seen:?}");
            }
        }
    }

    #[test]
    fn noise_is_learned_in_the_first_minute() {
        for share in [0.05, 0.1, 0.3, 0.9] {
            let value = |t: f64| 100.0 * (1.0 + share * noise(t));
            let [(points, looks), (_, later)] = [run(60, value), run(300, value)];
            // A fixed clock of 5 s: 12 of each in the first minute, 48 looks in the four after it.
            assert!(points.len() <= 8 && looks <= 20, "{share}: {} points, {looks} looks", points.len());
            assert!(later - looks <= 36, "{share}: {later} after {looks}");
        }
    }

    #[test]
    fn quiet_series_share_their_wakes() {
        for first in 0..15 {
            let mut series = Series::new(INTERVALS, TOLERANCE);
            // As late as a timer is.
            let mut now = Duration::from_millis(1000 * first + 2);
            for _ in 0..6 {
                now += series.probe(now, 1.0).next;
            }
            assert_eq!(now.as_millis() % 15_000, 0, "{first}");
        }
    }

    #[test]
    fn silence_ends_with_the_heartbeat() {
        let (points, _) = run(24 * 3600, |_| 42.0);
        let longest = points.windows(2).map(|w| w[1].0 - w[0].0).fold(0.0, f64::max);
        assert!(longest <= 240.0, "{longest}");
    }

    #[test]
    fn a_quiet_day_has_few_points_and_probes() {
        let (points, probes) = run(24 * 3600, |t| 100.0 + 0.3 * noise(t));
        let fixed = 24 * 3600 / 5;
        assert!(points.len() * 25 <= fixed, "{} points against {fixed}", points.len());
        assert!(probes * 2 <= fixed, "{probes} probes against {fixed}");
    }

    #[test]
    fn a_series_that_jumps_for_ever_records_less_than_a_fixed_clock() {
        let (points, _) = run(6 * 3600, |t| noise(t.floor()) * 1e6);
        assert!(points.len() <= 6 * 3600 / 5, "{}", points.len());
    }

    #[test]
    fn a_single_outlier_is_no_step() {
        let (points, _) = run(600, |t| if (100.0..100.9).contains(&(t % 300.0)) { 500.0 } else { 100.0 });
        assert!(points.iter().all(|(_, v)| (*v - 100.0).abs() < 90.0), "{points:?}");
    }

    #[test]
    fn hostile_values_do_not_end_the_series() {
        let mut series = Series::new(INTERVALS, TOLERANCE);
        for (i, x) in
            [f64::MAX, f64::MIN, 0.0, f64::MIN_POSITIVE, 1.0].into_iter().cycle().take(500).enumerate()
        {
            let next = series.probe(Duration::from_secs(i as u64), x).next;
            assert!(next >= INTERVALS.min && next <= INTERVALS.probe_max);
        }
    }
}
