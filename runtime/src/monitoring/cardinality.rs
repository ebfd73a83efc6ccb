//! `monitoring.cardinalityLimit`: counts by a label whose values clients choose, within a bound.
//!
//! Pure counting. Only the label that explodes is folded, into `__other__`; the outcome beside it stays, so failures
//! are never under-counted and the sum over all series is always that of all queries.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use prometheus_client::metrics::counter::Counter;

/// What is counted beside the label: one slot per outcome of a query.
pub(crate) const OUTCOMES: usize = 5;

/// The label's value for all above the bound.
pub(crate) const OTHER: &str = "__other__";

/// The baseline has no bound in the measurements that it stands for. A service must not die of it, so it has this
/// cap, at which a scrape has some two megabytes.
pub(crate) const BASELINE_MAX_SERIES: usize = 20_000;

/// Longest label value, in bytes; a longer one is cut.
const MAX_VALUE: usize = 128;

/// Counts by label value and outcome.
#[derive(Debug)]
pub(crate) struct Limited {
    inner: Mutex<Inner>,
    pub(crate) updates: Counter,
    pub(crate) overflow: Counter,
}

#[derive(Debug, Default)]
struct Inner {
    max_series: usize,
    /// Series that are not zero, those of `other` not included.
    series: usize,
    known: HashMap<Box<str>, [u64; OUTCOMES]>,
    other: [u64; OUTCOMES],
}

fn used(counts: &[u64; OUTCOMES]) -> usize {
    counts.iter().filter(|count| **count > 0).count()
}

impl Inner {
    /// Whether so many series more leave room for those of `other`.
    fn has_room(&self, more: usize) -> bool {
        self.series + more + OUTCOMES <= self.max_series
    }

    fn fold(&mut self, counts: [u64; OUTCOMES]) {
        for (sum, count) in self.other.iter_mut().zip(counts) {
            *sum += count;
        }
    }
}

impl Limited {
    pub(crate) fn new(updates: Counter, overflow: Counter) -> Self {
        let inner = Inner { max_series: BASELINE_MAX_SERIES, ..Inner::default() };
        Self { inner: Mutex::new(inner), updates, overflow }
    }

    /// Counts one outcome of `value`.
    pub(crate) fn count(&self, value: &str, outcome: usize) {
        let value = &value[..value.floor_char_boundary(MAX_VALUE)];
        self.updates.inc();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let new = inner.known.get(value).is_none_or(|counts| counts[outcome] == 0);
        // A client that calls itself so is one of the others.
        if value == OTHER || (new && !inner.has_room(1)) {
            inner.other[outcome] += 1;
            self.overflow.inc();
            return;
        }
        inner.series += usize::from(new);
        match inner.known.get_mut(value) {
            Some(counts) => counts[outcome] += 1,
            None => {
                let mut counts = [0; OUTCOMES];
                counts[outcome] = 1;
                inner.known.insert(value.into(), counts);
            }
        }
    }

    /// Sets the bound. When it falls, the values that were counted least are folded, and nothing is lost.
    pub(crate) fn limit(&self, max_series: usize) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.max_series = max_series;
        if inner.has_room(0) {
            return;
        }
        let mut all: Vec<_> = std::mem::take(&mut inner.known).into_iter().collect();
        all.sort_unstable_by_key(|(_, counts)| std::cmp::Reverse(counts.iter().sum::<u64>()));
        inner.series = 0;
        for (value, counts) in all {
            if inner.has_room(used(&counts)) {
                inner.series += used(&counts);
                inner.known.insert(value, counts);
            } else {
                inner.fold(counts);
            }
        }
    }

    /// The series now, and their bound.
    pub(crate) fn size(&self) -> (usize, usize) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (inner.series + used(&inner.other), inner.max_series)
    }

    /// All series that are not zero: value, outcome, count.
    pub(crate) fn series(&self) -> Vec<(Box<str>, usize, u64)> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let other = (OTHER, &inner.other);
        let all = inner.known.iter().map(|(value, counts)| (&**value, counts)).chain([other]);
        all.flat_map(|(value, counts)| counts.iter().enumerate().map(move |(i, n)| (value, i, *n)))
            .filter(|(.., count)| *count > 0)
            .map(|(value, outcome, count)| (value.into(), outcome, count))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(max_series: usize) -> Limited {
        let limited = Limited::new(Counter::default(), Counter::default());
        limited.limit(max_series);
        limited
    }

    fn total(limited: &Limited, outcome: usize) -> u64 {
        limited.series().iter().filter(|(_, o, _)| *o == outcome).map(|(.., count)| count).sum()
    }

    #[test]
    fn the_bound_holds_and_no_outcome_is_lost() {
        for max in [10, 11, 100, 1000] {
            let limited = limited(max);
            for i in 0..5_000_usize {
                limited.count(&format!("requester {}", i * i % 701), i % OUTCOMES);
                assert!(limited.size().0 <= max, "{:?}", limited.size());
            }
            for outcome in 0..OUTCOMES {
                assert_eq!(total(&limited, outcome), 1_000, "{max}");
            }
            let other: u64 = limited.series().iter().filter(|s| &*s.0 == OTHER).map(|s| s.2).sum();
            assert_eq!(limited.overflow.get(), other);
            assert_eq!(limited.updates.get(), 5_000);
        }
    }

    #[test]
    fn a_lower_bound_folds_the_least_counted() {
        let limited = limited(1_000);
        for i in 0..100_usize {
            for _ in 0..=i {
                limited.count(&format!("{i:02}"), 0);
            }
        }
        limited.limit(15);
        let mut kept: Vec<_> = limited.series().into_iter().map(|(value, ..)| value).collect();
        kept.sort_unstable();
        let busiest: Vec<String> = (90..100).map(|i| i.to_string()).collect();
        assert_eq!(kept[..10].iter().map(|v| v.to_string()).collect::<Vec<_>>(), busiest);
        assert_eq!(&*kept[10], OTHER);
        assert_eq!(total(&limited, 0), 5_050);
        // A known value is still counted under its name when there is no room for a new one.
        limited.count("99", 0);
        assert_eq!(limited.overflow.get(), 0);
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let limited = limited(100);
        limited.count(&"é".repeat(1 << 20), 0);
        assert_eq!(limited.series()[0].0.len(), MAX_VALUE);
    }
}
