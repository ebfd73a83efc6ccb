//! Counts of durations, for quantiles within two per cent. Pure.

use std::time::Duration;

/// Buckets for each doubling: quantiles are right within 1 / `STEPS`.
const STEPS: usize = 64;
/// Doublings above one microsecond × [`STEPS`]: more than a day.
const DOUBLINGS: usize = 32;

/// Counts of durations of 1 µs to days.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; STEPS * DOUBLINGS].into(), total: 0 }
    }
}

impl Histogram {
    pub(super) fn record(&mut self, value: Duration) {
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        // Below STEPS each value has a bucket; above, the highest bits say the doubling and the next ones the step.
        let doubling = (micros / STEPS as u64).checked_ilog2().map_or(0, |log| log as usize + 1);
        let step = if doubling == 0 { micros as usize } else { (micros >> (doubling - 1)) as usize - STEPS };
        let index = (doubling * STEPS + step).min(self.counts.len() - 1);
        self.counts[index] += 1;
        self.total += 1;
    }

    /// The upper end of the bucket of quantile `q` (0 to 1), in milliseconds; 0 when nothing was recorded.
    pub(super) fn quantile_ms(&self, q: f64) -> f64 {
        let rank = (q * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let (doubling, step) = (index / STEPS, index % STEPS);
                let micros =
                    if doubling == 0 { step as u64 } else { ((STEPS + step + 1) as u64) << (doubling - 1) };
                return micros as f64 / 1e3;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_two_per_cent() {
        for scale in [1_u64, 37, 1_000, 999_999] {
            let mut histogram = Histogram::default();
            for i in 1..=1_000 {
                histogram.record(Duration::from_micros(i * scale));
            }
            for (q, rank) in [(0.5, 500), (0.99, 990), (1.0, 1_000)] {
                let (expected, shown) = ((rank * scale) as f64 / 1e3, histogram.quantile_ms(q));
                assert!((shown / expected - 1.0).abs() < 0.02, "{q} of {scale}: {shown}, not {expected}");
            }
        }
        assert_eq!(Histogram::default().quantile_ms(0.5), 0.0);
    }
}
