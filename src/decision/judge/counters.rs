//! From raw counters, one or more series per pod, to what each arm has counted in each tick. Pure.
//!
//! Differences are taken per series and then summed, so that a restart of one pod is seen as such.

use std::collections::BTreeMap;

use super::{Arm, Grid, Series, Tick};

/// Which arm, as an index.
pub(super) const CANARY: usize = 0;
/// The other one.
pub(super) const BASELINE: usize = 1;

/// Most kinds of event that are counted among the same requests: the bounds of a latency.
pub(super) const KINDS: usize = 3;

/// A counter: whose it is, and what it counts.
pub(super) struct Counted<'a> {
    pub(super) of: &'a Series,
    pub(super) counter: Counter,
    /// What is taken off each point, where the counter is made of two buckets: the points of the lower one.
    under: Option<&'a [(Tick, f64)]>,
}

impl Counted<'_> {
    pub(super) fn points(&self) -> impl Iterator<Item = (Tick, f64)> {
        let mut under = self.under.map(|points| points.iter().peekable());
        self.of.points.iter().map(move |&(time, count)| {
            let Some(under) = &mut under else { return (time, count) };
            while under.next_if(|(at, _)| *at < time).is_some() {}
            let below = under.peek().filter(|(at, _)| *at == time).map_or(0.0, |(_, below)| *below);
            // Not the larger of the two, which of 0 and no number is 0.
            (time, if count < below { 0.0 } else { count - below })
        })
    }

    /// Whether both are made of the same series.
    fn same(&self, other: &Self) -> bool {
        std::ptr::eq(self.of, other.of)
    }
}

/// Series that are counters themselves.
pub(super) fn plain(counter: Counter, series: &[Series]) -> impl Iterator<Item = Counted<'_>> {
    series.iter().map(move |of| Counted { of, counter, under: None })
}

/// The answers of which counts are made.
pub(super) struct Counters<'a> {
    /// In any order.
    pub(super) counted: &'a [Counted<'a>],
    /// Time of the last sample of the counters of all requests.
    pub(super) times: &'a [Series],
}

/// What one arm has counted in one tick.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) events: [f64; KINDS],
    pub(super) total: f64,
}

/// The counts of a stretch of ticks, read from the answers.
pub(super) struct Read {
    /// Increase of the counters in each tick, canary and baseline.
    pub(super) counts: Vec<[Tally; 2]>,
    /// The same of the pods that were cold, which is no part of it.
    pub(super) cold: Vec<[Tally; 2]>,
    /// Whether there is a series of the total.
    pub(super) present: [Vec<bool>; 2],
    /// Whether the last sample of the total is at most two intervals old.
    pub(super) fresh: [Vec<bool>; 2],
    /// Ticks with series that must not be summed.
    pub(super) faults: Vec<bool>,
    /// What is wrong at the last tick.
    pub(super) fault: Option<String>,
}

/// Which pods are cold: what they are told apart by goes from one stretch of ticks to the next.
pub(super) struct Cold {
    /// Pods that began in mid-stage, each with the tick of its first sample.
    pub(super) began: BTreeMap<String, Tick>,
    /// How long they are cold, in seconds; 0 where that does not matter.
    pub(super) warm_up: i64,
}

impl Cold {
    /// Marks the ticks at which a pod is cold. `up` says at which it was scraped. A pod begins where it was not a tick ago, or where
    /// its count of requests fell.
    fn mark(&mut self, cold: &mut [bool], pod: &[&Counted<'_>], up: &[bool], grid: Grid) {
        cold.fill(false);
        let totals = || pod.iter().filter(|series| series.counter == Counter::Total);
        // Between neighbours only: what was before a gap is not seen by who looks tick by tick.
        let falls = |pair: &[(Tick, f64)]| pair[1].0 - pair[0].0 == grid.step && pair[1].1 < pair[0].1;
        let name = pod[0].of.pod.as_str();
        let whole = up.iter().all(|up| *up) && !totals().any(|series| series.of.points.windows(2).any(falls));
        if self.warm_up <= 0 || whole && !self.began.contains_key(name) {
            return;
        }
        let fell = |tick| {
            totals().any(|series| series.of.points.windows(2).any(|pair| pair[1].0 == tick && falls(pair)))
        };
        let mut began = self.began.remove(name);
        for index in 1..grid.len() {
            let tick = grid.tick(index);
            if up[index] && (!up[index - 1] || fell(tick)) {
                began = began.max(Some(tick));
            }
            cold[index] = began.is_some_and(|began| tick - began < self.warm_up);
        }
        if let Some(began) = began.filter(|began| grid.last() - began < self.warm_up) {
            self.began.insert(name.to_owned(), began);
        }
    }
}

/// What a counter counts: events of a kind, or all requests.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Counter {
    Event(usize),
    Total,
}

impl Read {
    pub(super) fn of(
        canary: &Arm,
        baseline: &Arm,
        answers: &Counters<'_>,
        cold: &mut Cold,
        grid: Grid,
    ) -> Self {
        let len = grid.len();
        let mut read = Self {
            counts: vec![[Tally::default(); 2]; len],
            cold: vec![[Tally::default(); 2]; len],
            present: [vec![false; len], vec![false; len]],
            fresh: [vec![false; len], vec![false; len]],
            faults: vec![false; len],
            fault: None,
        };
        let arm_of =
            |pod: &str| if canary.owns(pod) { Some(CANARY) } else { baseline.owns(pod).then_some(BASELINE) };
        // In one order always, since sums of floating-point numbers depend on it. By pod first: sorted runs are merged in no time.
        let mut sorted: Vec<&Counted<'_>> = answers.counted.iter().collect();
        sorted.sort_by(|a, b| match a.same(b) {
            true => std::cmp::Ordering::Equal,
            false => a.of.pod.cmp(&b.of.pod),
        });

        let [mut pod_up, mut target_up, mut is_cold] = [(); 3].map(|()| vec![false; len]);
        for pod in sorted.chunk_by_mut(|a, b| a.same(b) || a.of.pod == b.of.pod) {
            pod.sort_by(|a, b| match a.same(b) {
                true => std::cmp::Ordering::Equal,
                false => (&a.of.instance, &a.of.labels).cmp(&(&b.of.instance, &b.of.labels)),
            });
            let pod = &*pod;
            if pod[0].of.pod.is_empty() {
                read.fault_at(pod, grid, || {
                    "series without the label pod: keep it in the result, as in sum by (pod, instance) (...)"
                        .to_owned()
                });
                continue;
            }
            let Some(arm) = arm_of(&pod[0].of.pod) else { continue };
            mark(&mut pod_up, pod, grid);
            cold.mark(&mut is_cold, pod, &pod_up, grid);
            for target in pod.chunk_by(|a, b| a.same(b) || a.of.instance == b.of.instance) {
                read.refuse_twins(target, grid);
                let up = if target[0].of.instance.is_empty() || target.len() == pod.len() {
                    &pod_up
                } else {
                    mark(&mut target_up, target, grid);
                    &target_up
                };
                for series in target {
                    read.count(series, arm, (up, &is_cold), grid);
                }
            }
        }
        cold.began.retain(|_, began| grid.last() - *began < cold.warm_up);
        for pod in answers.times.chunk_by(|a, b| a.pod == b.pod) {
            let Some(arm) = arm_of(&pod[0].pod) else { continue };
            for &(time, sampled) in pod.iter().flat_map(|series| &series.points) {
                if let Some(index) = grid.index(time) {
                    read.fresh[arm][index] |= time as f64 - sampled <= 2.0 * grid.step as f64;
                }
            }
        }
        read
    }

    /// Adds the increase of one counter to its arm. `up` says at which ticks its target was scraped, and `cold` at which its pod
    /// was cold.
    fn count(&mut self, series: &Counted<'_>, arm: usize, (up, cold): (&[bool], &[bool]), grid: Grid) {
        increases(series.points(), up, grid, |index, increase| {
            let tallies = if cold[index] { &mut self.cold } else { &mut self.counts };
            let tally = &mut tallies[index][arm];
            match series.counter {
                Counter::Event(kind) => tally.events[kind] += increase,
                Counter::Total => tally.total += increase,
            }
        });
        if series.counter == Counter::Total {
            for &(time, value) in &series.of.points {
                if let Some(index) = grid.index(time).filter(|_| is_count(value)) {
                    self.present[arm][index] = true;
                }
            }
        }
    }

    /// Two scrape jobs that read the same port count every request twice, which would double the evidence for nothing.
    fn refuse_twins(&mut self, target: &[&Counted<'_>], grid: Grid) {
        let first = target[0].of;
        if first.instance.is_empty() || target.iter().all(|series| series.of.job == first.job) {
            return;
        }
        for counter in (0..KINDS).map(Counter::Event).chain([Counter::Total]) {
            let mut jobs: Vec<Option<&str>> = vec![None; grid.len()];
            for series in target.iter().filter(|series| series.counter == counter) {
                for index in series.of.points.iter().filter_map(|(time, _)| grid.index(*time)) {
                    let job = *jobs[index].get_or_insert(&series.of.job);
                    if job != series.of.job {
                        let message = || {
                            format!(
                                "pod {} is scraped twice, by the jobs {job:?} and {:?}: name one in the selectors, as in {{$arm,job={job:?}}}",
                                series.of.pod, series.of.job
                            )
                        };
                        self.fault(index, grid, message);
                    }
                }
            }
        }
    }

    fn fault_at(&mut self, series: &[&Counted<'_>], grid: Grid, message: impl Fn() -> String) {
        for series in series {
            for index in series.of.points.iter().filter_map(|(time, _)| grid.index(*time)) {
                self.fault(index, grid, &message);
            }
        }
    }

    /// Voids the increases up to and from this tick.
    fn fault(&mut self, index: usize, grid: Grid, message: impl Fn() -> String) {
        self.faults[index] = true;
        if let Some(next) = self.faults.get_mut(index + 1) {
            *next = true;
        }
        if index + 1 == grid.len() && self.fault.is_none() {
            self.fault = Some(message());
        }
    }
}

/// Tells each increase of a counter, with the index of the tick in which it was. `up` says at which ticks its target was scraped.
pub(super) fn increases(
    points: impl Iterator<Item = (Tick, f64)>,
    up: &[bool],
    grid: Grid,
    mut tell: impl FnMut(usize, f64),
) {
    let mut previous: Option<(usize, f64)> = None;
    for (time, value) in points {
        let Some(index) = grid.index(time) else { continue };
        let before = match previous {
            Some((at, before)) if at + 1 == index => Some(before),
            // A counter that its target did not have a tick ago began at 0: the first error is an error. A target that was
            // not there may have counted for long: its first sample is a base.
            _ if index > 0 && up[index - 1] => Some(0.0),
            _ => None,
        };
        previous = Some((index, value));
        if !is_count(value) {
            continue;
        }
        if let Some(before) = before.filter(|before| is_count(*before)) {
            // A counter that fell has begun again from 0.
            tell(index, if value < before { value } else { value - before });
        }
    }
}

/// The buckets of histograms as counters of what lies above each of `bounds`, and of all there is; by pod.
///
/// A native histogram has buckets only where it has values: it is counted up to its largest bound up to the wanted one. Of a classic one
/// that lacks a bound nothing is counted, since which of its requests lie above is not known; its series of all there is comes back
/// beside the counters.
pub(super) fn above<'a>(buckets: &'a [Series], bounds: &[f64]) -> (Vec<Counted<'a>>, Vec<&'a Series>) {
    let mut sorted: Vec<(&Series, &super::samples::Bucket)> =
        buckets.iter().filter_map(|series| Some((series, series.bucket.as_ref()?))).collect();
    sorted.sort_by(|(a, _), (b, _)| a.pod.cmp(&b.pod));
    let (mut counted, mut lacking) = (Vec::with_capacity(sorted.len()), vec![]);
    for pod in sorted.chunk_by_mut(|(a, _), (b, _)| a.pod == b.pod) {
        pod.sort_by(|(_, x), (_, y)| x.histogram.cmp(&y.histogram).then(x.le.total_cmp(&y.le)));
        for histogram in pod.chunk_by(|(_, x), (_, y)| x.histogram == y.histogram) {
            let Some((all, _)) = histogram.last().filter(|(_, bucket)| bucket.le == f64::INFINITY) else {
                continue;
            };
            if !bounds.iter().take(KINDS).all(|bound| knows(histogram, *bound)) {
                lacking.push(*all);
                continue;
            }
            for (kind, bound) in bounds.iter().take(KINDS).enumerate() {
                let below = histogram.iter().rev().find(|(_, bucket)| bucket.le <= *bound);
                let under = Some(below.map_or(&[][..], |(series, _)| &series.points));
                counted.push(Counted { of: all, counter: Counter::Event(kind), under });
            }
            counted.push(Counted { of: all, counter: Counter::Total, under: None });
        }
    }
    (counted, lacking)
}

/// Whether a histogram tells what lies above a bound.
fn knows(histogram: &[(&Series, &super::samples::Bucket)], bound: f64) -> bool {
    match histogram.iter().any(|(_, bucket)| bucket.native) {
        // Where its resolution was halved, a bucket may lie on both sides.
        true => !histogram
            .iter()
            .any(|(_, bucket)| bucket.above < bound && bound < bucket.le && bucket.le.is_finite()),
        false => histogram.iter().any(|(_, bucket)| bucket.le == bound),
    }
}

/// Marks the ticks at which any of the series has a sample.
fn mark(up: &mut [bool], series: &[&Counted<'_>], grid: Grid) {
    up.fill(false);
    for same in series.chunk_by(|a, b| a.same(b)) {
        for &(time, value) in &same[0].of.points {
            if let Some(index) = grid.index(time) {
                up[index] |= is_count(value);
            }
        }
    }
}

/// Whether a sample can be that of a counter.
pub(super) fn is_count(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}
