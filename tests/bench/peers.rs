//! The rules of the peers, as their sources state them (notes, section 1), on the same streams.

use statrs::distribution::{ContinuousCDF, Normal};

use super::world::{BASELINE, BOUNDS, CANARY, Pod, WARM_UP};

/// Names of the rules, in the order of [`Peers::alarms`].
pub const RULES: [&str; 5] = [
    "Argo errors: irate[5m] > 5 %, every 5 m, limit 3",
    "Flagger errors: success[1m] < 99 %, threshold 10",
    "Kayenta errors: Mann-Whitney 98 %, every 1 m",
    "Kayenta p99: Mann-Whitney 98 %, every 1 m",
    "Kayenta memory: Mann-Whitney 98 %, every 1 m",
];

/// What both arms have counted in one slot.
#[derive(Clone, Copy, Default)]
pub struct Slot {
    requests: [f64; 2],
    errors: [f64; 2],
    above: [[f64; BOUNDS.len()]; 2],
    memory: [f64; 2],
}

impl Slot {
    pub fn of(pods: &[&Pod], serving: [usize; 2]) -> Self {
        let mut slot = Self::default();
        let mut seen = [0.0; 2];
        for (index, pod) in pods.iter().enumerate() {
            // The baseline's pods come first.
            let arm = if index < serving[BASELINE] { BASELINE } else { CANARY };
            let (Some(now), Some(before)) = (pod.now, pod.before) else { continue };
            slot.requests[arm] += now.requests - before.requests;
            slot.errors[arm] += now.errors - before.errors;
            for (sum, (now, before)) in slot.above[arm].iter_mut().zip(now.above.iter().zip(before.above)) {
                *sum += now - before;
            }
            slot.memory[arm] += now.memory;
            seen[arm] += 1.0;
        }
        for arm in [CANARY, BASELINE] {
            slot.memory[arm] /= seen[arm];
        }
        slot
    }
}

/// The rules over one rollout.
#[derive(Default)]
pub struct Peers {
    /// Failed measurements so far of Argo's and of Flagger's check: both only grow.
    failed: [u32; 2],
    /// Which rules have alarmed already; these are followed no further.
    pub alarmed: [bool; RULES.len()],
}

impl Peers {
    /// For each rule the slot of its alarm in this stage, counted from the end of the warm-up.
    pub fn alarms(&mut self, slots: &[Slot]) -> [Option<i64>; RULES.len()] {
        let mut alarms = [None; RULES.len()];
        let ratio = |slots: &[Slot], arm: usize| {
            let sum = |of: fn(&Slot) -> [f64; 2]| slots.iter().map(|slot| of(slot)[arm]).sum::<f64>();
            sum(|slot| slot.errors) / sum(|slot| slot.requests)
        };
        let mut points: [[Vec<f64>; 2]; 3] = Default::default();
        let warm = WARM_UP as usize;
        for end in warm..slots.len() {
            let (minute, number) = (&slots[end - 3..=end], (end + 1 - warm) as i64);
            // No requests is NaN, for which no comparison with a limit holds: a failed measurement.
            let succeeds = |of: &[Slot], least: f64| 1.0 - ratio(of, CANARY) >= least;
            if number % 20 == 0 && !succeeds(&slots[end..=end], 0.95) {
                self.failed[0] += 1;
            }
            if number % 4 == 0 && !succeeds(minute, 0.99) {
                self.failed[1] += 1;
            }
            for (rule, limit) in [(0, 4), (1, 10)] {
                if self.failed[rule] >= limit {
                    alarms[rule].get_or_insert(number);
                }
            }
            for arm in [CANARY, BASELINE] {
                // NaN is replaced by 0.
                let finite = |value: f64| if value.is_finite() { value } else { 0.0 };
                points[0][arm].push(finite(ratio(minute, arm)));
                points[1][arm].push(finite(p99(minute, arm)));
                points[2][arm].push(finite(slots[end].memory[arm]));
            }
            if number % 4 == 0 {
                for (kpi, [canary, baseline]) in points.iter().enumerate() {
                    if !self.alarmed[2 + kpi] && alarms[2 + kpi].is_none() && high(canary, baseline) {
                        alarms[2 + kpi] = Some(number);
                    }
                }
            }
        }
        for (alarmed, alarm) in self.alarmed.iter_mut().zip(alarms) {
            *alarmed |= alarm.is_some();
        }
        alarms
    }
}

/// `histogram_quantile(0.99, …)`: linear within its bucket.
fn p99(slots: &[Slot], arm: usize) -> f64 {
    let all: f64 = slots.iter().map(|slot| slot.requests[arm]).sum();
    let (mut low, mut above_low) = (0.0, all);
    for (index, bound) in BOUNDS.iter().enumerate() {
        let above: f64 = slots.iter().map(|slot| slot.above[arm][index]).sum();
        let bound: f64 = bound.parse().unwrap_or(f64::NAN);
        if above <= 0.01 * all {
            return low + (bound - low) * (above_low - 0.01 * all) / (above_low - above);
        }
        (low, above_low) = (bound, above);
    }
    low
}

/// Kayenta's classifier with direction "increase": the 98 % interval of the shift (Mann-Whitney, normal approximation, ties,
/// continuity) lies above a quarter of the estimated shift, and the ratio of the means is no less than 1.
fn high(canary: &[f64], baseline: &[f64]) -> bool {
    let sorted = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values
    };
    let (canary, baseline) = (sorted(canary), sorted(baseline));
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let quantile = Normal::standard().inverse_cdf(0.99);
    // The standing falls with the shift that is taken off: where it is too low without any, the rest is spared.
    let stands = standing(&canary, &baseline, 0.0, 0.5) > quantile;
    if mean(&canary) < mean(&baseline) || !stands {
        return false;
    }
    let (mut low, mut high) =
        (canary[0] - baseline[baseline.len() - 1], canary[canary.len() - 1] - baseline[0]);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if standing(&canary, &baseline, middle, 0.0) > 0.0 { low = middle } else { high = middle }
    }
    let shift = 0.5 * (low + high);
    // The lower end lies above a point exactly when the standing at that point is beyond the quantile.
    standing(&canary, &baseline, 0.25 * shift.abs(), 0.5) > quantile
}

/// The Mann-Whitney statistic of `a` - `shift` against `b`, both sorted, in standard deviations.
fn standing(a: &[f64], b: &[f64], shift: f64, continuity: f64) -> f64 {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let (mut i, mut j, mut wins, mut ties) = (0, 0, 0.0, 0.0);
    // Runs of equal values over both, from the lowest.
    while i < a.len() || j < b.len() {
        let value = match (a.get(i).map(|x| x - shift), b.get(j)) {
            (Some(x), Some(&y)) => x.min(y),
            (Some(x), None) => x,
            (None, Some(&y)) => y,
            (None, None) => break,
        };
        let (i0, j0) = (i, j);
        while a.get(i).is_some_and(|x| x - shift == value) {
            i += 1;
        }
        while b.get(j).is_some_and(|y| *y == value) {
            j += 1;
        }
        let (of_a, of_b) = ((i - i0) as f64, (j - j0) as f64);
        wins += of_a * (j0 as f64 + 0.5 * of_b);
        let run = of_a + of_b;
        ties += run * run * run - run;
    }
    let variance = n * m / 12.0 * (n + m + 1.0 - ties / ((n + m) * (n + m - 1.0)));
    (wins - 0.5 * n * m - continuity) / variance.sqrt()
}
