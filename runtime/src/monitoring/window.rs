//! `monitoring.preAggregation`: what was seen between two points, summed up.
//!
//! Pure. Every look counts, so a peak between two points is not lost. The sketch keeps the distribution within one
//! per cent and merges without loss, so the quantiles of an hour, or of all pods, come from the points themselves;
//! averages of averages are never taken.

use std::fmt;

use sketches_ddsketch::{Config, DDSketch};

/// Bins of a sketch at most, in steps of 128: enough for values from one to 10^17 times the least.
const MAX_BINS: u32 = 2048;
/// Values below count as zero in the sketch: far below a byte, a nanosecond or a thousandth of a processor.
const LEAST: f64 = 1e-9;
/// Largest error of a quantile, as a share of it.
const ERROR: f64 = 0.01;

/// The sum of some values.
#[derive(Clone)]
pub(crate) struct Window {
    pub(crate) last: f64,
    sketch: DDSketch,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("count", &self.sketch.count()).field("last", &self.last).finish()
    }
}

impl Window {
    /// Begins with one value; not finite ones are no values.
    pub(crate) fn new(value: f64) -> Option<Self> {
        value.is_finite().then(|| {
            let mut sketch = DDSketch::new(Config::new(ERROR, MAX_BINS, LEAST));
            sketch.add(value);
            Self { last: value, sketch }
        })
    }

    /// Adds a value to what may be there already.
    pub(crate) fn add(window: &mut Option<Self>, value: f64) {
        match window {
            Some(window) if value.is_finite() => {
                window.last = value;
                window.sketch.add(value);
            }
            Some(_) => {}
            None => *window = Self::new(value),
        }
    }

    /// As it is stored: small, and without the room that the sketch keeps for more.
    pub(crate) fn close(&self) -> Summary {
        // A window holds one value at least, so there is a least, a greatest and every quantile.
        let quantile = |q| self.sketch.quantile(q).ok().flatten().unwrap_or(self.last);
        Summary {
            count: self.sketch.count() as u64,
            sum: self.sketch.sum().unwrap_or(self.last),
            min: self.sketch.min().unwrap_or(self.last),
            max: self.sketch.max().unwrap_or(self.last),
            p50: quantile(0.5),
            p99: quantile(0.99),
            sketch: self.sketch.to_java_bytes().into(),
        }
    }
}

/// A closed window.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) sum: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// DDSketch's own binary form, which its libraries in other languages read too.
    pub(crate) sketch: Box<[u8]>,
}

impl Summary {
    /// The sketch as lower-case hexadecimal digits.
    pub(crate) fn hex(&self) -> String {
        self.sketch.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(values: impl IntoIterator<Item = f64>) -> Window {
        let mut window = None;
        values.into_iter().for_each(|value| Window::add(&mut window, value));
        window.expect("some value")
    }

    #[test]
    fn sums_are_exact_and_quantiles_within_one_per_cent() {
        let summary = window((1..=10_000).map(f64::from)).close();
        assert_eq!((summary.count, summary.sum), (10_000, 50_005_000.0));
        assert_eq!((summary.min, summary.max), (1.0, 10_000.0));
        for (seen, truth) in [(summary.p50, 5_000.0), (summary.p99, 9_900.0)] {
            assert!((seen / truth - 1.0).abs() <= ERROR + 1e-9, "{seen} is not {truth}");
        }
    }

    #[test]
    fn sketches_of_parts_merge_into_that_of_the_whole() {
        let decode =
            |window: &Window| DDSketch::from_java_bytes(&window.close().sketch).expect("its own form");
        let values: Vec<f64> = (0..2_000).map(|i| f64::from(i * i % 977) / 7.0).collect();
        let mut merged = decode(&window(values[..300].iter().copied()));
        merged.merge(&decode(&window(values[300..].iter().copied()))).expect("the same error");
        let whole = window(values);
        for q in [0.0, 0.25, 0.5, 0.9, 0.99, 1.0] {
            assert_eq!(merged.quantile(q).expect("valid"), decode(&whole).quantile(q).expect("valid"), "{q}");
        }
    }

    #[test]
    fn hostile_values_are_bounded() {
        let hostile = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, f64::MIN_POSITIVE, 1e300];
        let summary = window(hostile).close();
        assert_eq!((summary.count, summary.min, summary.max), (4, -1.0, 1e300));
        assert!(summary.sketch.len() < 8 * MAX_BINS as usize);
        assert!(Window::new(f64::NAN).is_none());
    }

    #[test]
    fn a_quiet_window_is_small() {
        let bytes = window((0..60).map(|i| 1e7 + f64::from(i))).close().sketch.len();
        assert!(bytes <= 96, "{bytes} bytes");
    }
}
