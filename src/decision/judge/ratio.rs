//! Errors among requests, canary against baseline: a one-sided conditional-binomial mixture e-process on raw counters. Pure.
//!
//! Given the errors of both arms in a tick, those of the canary are binomial with a share that depends on the requests of both
//! arms and on the ratio of the error rates, but not on the common rate: drift and bursts that both arms see cancel. The evidence
//! is a mixture of likelihood ratios, a supermartingale while the ratio is within the tolerance, so that by Ville's inequality it
//! ever reaches 1/alpha with a probability of at most alpha, however often one looks.
//!
//! The mixture is over the ratio and over the tick at which harm begins. With the first tick alone, a day without harm would weigh
//! against harm that begins in the evening: in a long stage the weights fall without end.

use std::f64::consts::PI;

use crate::api::{Carry, Counts, Evidence, Verdict};

use super::{AnswerHealth, Arm, Arms, Finding, Grid, Kpi, Series, queries, quote};

/// Alternatives of the mixture, as multiples of the tolerated ratio; equal prior weights.
const ALTERNATIVES: [f64; 7] = [1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 30.0];

/// Prior probability that harm begins with the first tick. The rest is spread over the later ones: tick n has the share
/// 1/((n-1)n) of it, so that 1/n is left after tick n, and all of it together is no more than 1.
const FROM_THE_START: f64 = 0.5;

/// Probability that any KPI of a healthy rollout ever alarms.
const ALPHA: f64 = 0.01;

/// Standard deviations of the difference between arms of unlike pods that are tolerated.
const Z: f64 = 3.0;

/// Standard deviation of the logarithm of the error rate between pods that do the same work.
///
/// Without a pre-flight on the running pods nothing is known of it, so that the cautious end of its range (0.10 to 0.5) is taken:
/// it costs delay, where too small a value would cost false rollbacks.
pub const HETEROGENEITY: f64 = 0.5;

/// Errors in both arms together that are enough for a pass.
const MINIMUM_EVENTS: f64 = 5.0;

/// Canary requests that are enough for a pass, as a multiple of 1/minimumEffect: had the canary failed at that rate, three
/// errors would be expected, and none at all has a probability of 5 %.
const MINIMUM_REQUESTS: f64 = 3.0;

/// Log evidence at which a KPI alarms: ln(1/alpha), where alpha is this KPI's share in this stage and attempt.
///
/// 1 % for the whole rollout is spread evenly over KPIs and stages; attempt a (from 1) of a stage has the share 6/(pi² a²), so that all
/// attempts there may ever be spend no more than one stage's share.
pub fn alarm_at(kpis: usize, stages: usize, attempt: i32) -> f64 {
    let cells = kpis.max(1) as f64 * stages.max(1) as f64;
    let attempt = f64::from(attempt.max(1));
    (cells * PI * PI * attempt * attempt / (6.0 * ALPHA)).ln()
}

/// The ratio of error rates that is called equal: the user's tolerance `r0`, or what `kc` canary and `kb` baseline pods differ by
/// when the log rates of single pods have the standard deviation `tau`, whichever is more.
pub fn effective_tolerance(r0: f64, tau: f64, kc: i32, kb: i32) -> f64 {
    let (kc, kb) = (f64::from(kc.max(1)), f64::from(kb.max(1)));
    r0.ln().max(Z * tau * (1.0 / kc + 1.0 / kb).sqrt()).exp()
}

/// An error ratio KPI that has a baseline.
pub(super) struct Ratio<'a> {
    pub(super) kpi: &'a Kpi,
    pub(super) arms: &'a Arms,
    pub(super) baseline: &'a Arm,
    pub(super) tolerance: f64,
    pub(super) minimum_effect: f64,
}

/// The answers to the three queries.
pub(super) struct Answers<'a> {
    pub(super) errors: &'a [Series],
    pub(super) total: &'a [Series],
    pub(super) times: &'a [Series],
}

/// Which arm, as an index.
const CANARY: usize = 0;
const BASELINE: usize = 1;

impl Ratio<'_> {
    /// Folds the ticks after `grid.from`.
    pub(super) fn fold(
        &self,
        mut evidence: Evidence,
        answers: &Answers<'_>,
        grid: Grid,
    ) -> (Evidence, AnswerHealth) {
        let read = Read::of(self, answers, grid);
        let r0 =
            effective_tolerance(self.tolerance, HETEROGENEITY, self.arms.canary.pods, self.baseline.pods);
        // A checkpoint that does not fit (another version's, or edited by hand) starts the evidence afresh.
        if evidence.log_weights.len() != ALTERNATIVES.len()
            || !evidence.log_weights.iter().all(|w| w.is_finite())
        {
            evidence.log_weights = vec![FROM_THE_START.ln(); ALTERNATIVES.len()];
        }
        for index in 1..grid.len() {
            let tick = grid.tick(index);
            if tick <= evidence.last_tick {
                continue;
            }
            evidence.last_tick = tick;
            if read.faults[index] {
                evidence.carry = None;
                continue;
            }
            let [canary, baseline] = read.counts[index].map(clamped);
            add(&mut evidence.canary, canary);
            add(&mut evidence.baseline, baseline);
            if read.fresh[CANARY][index] && read.fresh[BASELINE][index] {
                evidence.fresh_ticks += 1;
                begin(&mut evidence);
                self.weigh(&mut evidence, canary, baseline, r0);
            } else if canary.total > 0.0 || baseline.total > 0.0 {
                // After a gap one arm may be back a tick before the other. Its increase over the gap waits for the other's.
                let carry = evidence.carry.get_or_insert_default();
                add(&mut carry.canary, canary);
                add(&mut carry.baseline, baseline);
            }
        }
        let health = read.health(self, &evidence, grid);
        (evidence, health)
    }

    /// Takes the counts of one tick into the log weights.
    fn weigh(&self, evidence: &mut Evidence, canary: Counts, baseline: Counts, r0: f64) {
        let (mut c, mut b) = (canary, baseline);
        if let Some(carry) = evidence.carry.take() {
            add(&mut c, carry.canary);
            add(&mut b, carry.baseline);
        }
        if c.total <= 0.0 || b.total <= 0.0 {
            // One tick is carried and no more: what is compared must be of one time, or drift no longer cancels.
            let any = canary.total > 0.0 || baseline.total > 0.0;
            evidence.carry = any.then_some(Carry { canary, baseline });
        } else if c.events + b.events > 0.0 {
            let share = |ratio: f64| ratio * c.total / (ratio * c.total + b.total);
            let other = |ratio: f64| b.total / (ratio * c.total + b.total);
            for (weight, alternative) in evidence.log_weights.iter_mut().zip(ALTERNATIVES) {
                let r1 = r0 * alternative;
                *weight += c.events * (share(r1) / share(r0)).ln() + b.events * (other(r1) / other(r0)).ln();
            }
        }
        let (canary, baseline) = (evidence.canary, evidence.baseline);
        if canary.total > 0.0
            && baseline.total > 0.0
            && canary.events / canary.total - baseline.events / baseline.total >= self.minimum_effect
        {
            evidence.peak = evidence.peak.max(log_evidence(evidence));
        }
    }
}

/// Adds to each alternative the prior weight of harm that begins with this tick.
fn begin(evidence: &mut Evidence) {
    let tick = evidence.fresh_ticks as f64;
    if tick > 1.0 {
        let weight = ((1.0 - FROM_THE_START) / ((tick - 1.0) * tick)).ln();
        for log_weight in &mut evidence.log_weights {
            *log_weight = log_sum(*log_weight, weight);
        }
    }
}

fn log_sum(a: f64, b: f64) -> f64 {
    a.max(b) + (-(a - b).abs()).exp().ln_1p()
}

/// Natural logarithm of the evidence: the mean of the alternatives' weights, and the weight of what is yet to begin. 0 at the start.
pub(super) fn log_evidence(evidence: &Evidence) -> f64 {
    let weights = &evidence.log_weights;
    let highest = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !highest.is_finite() {
        return 0.0;
    }
    let sum: f64 = weights.iter().map(|weight| (weight - highest).exp()).sum();
    let begun = highest + (sum / weights.len() as f64).ln();
    let to_come = (1.0 - FROM_THE_START) / (evidence.fresh_ticks as f64).max(1.0);
    log_sum(begun, to_come.ln())
}

/// What the evidence says.
pub(super) fn find(arms: &Arms, minimum_effect: f64, evidence: &Evidence, alarm_at: f64) -> Finding {
    let (canary, baseline) = (evidence.canary, evidence.baseline);
    let failed = evidence.peak >= alarm_at;
    let now = if failed { evidence.peak } else { log_evidence(evidence) };
    let numbers = format!(
        "canary {} against baseline {}, evidence {now:.1} of {alarm_at:.1} needed",
        described(canary),
        described(baseline)
    );
    let requests = (MINIMUM_REQUESTS / minimum_effect).ceil() - canary.total;
    let events = MINIMUM_EVENTS - canary.events - baseline.events;
    let (verdict, message) = if failed {
        (Verdict::Fail, numbers)
    } else if arms.baseline.is_none() {
        (Verdict::Inconclusive, "there is no baseline to compare with".to_owned())
    } else if canary.total <= 0.0 || baseline.total <= 0.0 {
        let idle = match (canary.total > 0.0, baseline.total > 0.0) {
            (false, false) => "neither arm",
            (false, true) => "no canary pod",
            _ => "no baseline pod",
        };
        (Verdict::Inconclusive, format!("{idle} has had a request yet; {numbers}"))
    } else if requests > 0.0 && events > 0.0 {
        let more = format!("{requests:.0} more canary requests or {events:.0} more errors on either side");
        (Verdict::Inconclusive, format!("{numbers}; needs {more} before it can pass"))
    } else {
        (Verdict::Pass, numbers)
    };
    let rate = |counts: Counts| (counts.total > 0.0).then(|| counts.events / counts.total);
    Finding { verdict, message, canary: rate(canary), baseline: rate(baseline) }
}

/// The counts of a stretch of ticks, read from the answers.
struct Read {
    /// Increase of the counters in each tick, canary and baseline.
    counts: Vec<[Counts; 2]>,
    /// Whether there is a series of the total.
    present: [Vec<bool>; 2],
    /// Whether the last sample of the total is at most two intervals old.
    fresh: [Vec<bool>; 2],
    /// Ticks with series that must not be summed.
    faults: Vec<bool>,
    /// What is wrong at the last tick.
    fault: Option<String>,
    /// Whether the answer for errors has no series at all.
    no_errors: bool,
}

/// Which of the counters a series is.
#[derive(Clone, Copy, PartialEq)]
enum Counter {
    Errors,
    Total,
}

impl Read {
    fn of(ratio: &Ratio<'_>, answers: &Answers<'_>, grid: Grid) -> Self {
        let len = grid.len();
        let mut read = Self {
            counts: vec![[Counts::default(); 2]; len],
            present: [vec![false; len], vec![false; len]],
            fresh: [vec![false; len], vec![false; len]],
            faults: vec![false; len],
            fault: None,
            no_errors: answers.errors.is_empty(),
        };
        let counters = [(answers.errors, Counter::Errors), (answers.total, Counter::Total)];
        let mut sorted: Vec<(&Series, Counter)> = counters
            .into_iter()
            .flat_map(|(series, counter)| series.iter().map(move |series| (series, counter)))
            .collect();
        // In one order always, since sums of floating-point numbers depend on it; two sorted runs are merged in no time.
        sorted.sort_by(|(a, _), (b, _)| a.key().cmp(&b.key()));

        let (mut pod_up, mut target_up) = (vec![false; len], vec![false; len]);
        for pod in sorted.chunk_by(|(a, _), (b, _)| a.pod == b.pod) {
            if pod[0].0.pod.is_empty() {
                read.fault_at(pod, grid, || {
                    "series without the label pod: keep it in the result, as in sum by (pod, instance) (...)"
                        .to_owned()
                });
                continue;
            }
            let Some(arm) = ratio.arm_of(&pod[0].0.pod) else { continue };
            mark(&mut pod_up, pod, grid);
            for target in pod.chunk_by(|(a, _), (b, _)| a.instance == b.instance) {
                read.refuse_twins(target, grid);
                let up = if target[0].0.instance.is_empty() || target.len() == pod.len() {
                    &pod_up
                } else {
                    mark(&mut target_up, target, grid);
                    &target_up
                };
                for &(series, counter) in target {
                    read.count(series, counter, arm, up, grid);
                }
            }
        }
        for pod in answers.times.chunk_by(|a, b| a.pod == b.pod) {
            let Some(arm) = ratio.arm_of(&pod[0].pod) else { continue };
            for &(time, sampled) in pod.iter().flat_map(|series| &series.points) {
                if let Some(index) = grid.index(time) {
                    read.fresh[arm][index] |= time as f64 - sampled <= 2.0 * grid.step as f64;
                }
            }
        }
        read
    }

    /// Adds the increase of one counter to its arm. `up` says at which ticks its target was scraped.
    fn count(&mut self, series: &Series, counter: Counter, arm: usize, up: &[bool], grid: Grid) {
        let mut previous: Option<(usize, f64)> = None;
        for &(time, value) in &series.points {
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
            if counter == Counter::Total {
                self.present[arm][index] = true;
            }
            let Some(before) = before.filter(|before| is_count(*before)) else { continue };
            // A counter that fell has begun again from 0.
            let increase = if value < before { value } else { value - before };
            let counts = &mut self.counts[index][arm];
            match counter {
                Counter::Errors => counts.events += increase,
                Counter::Total => counts.total += increase,
            }
        }
    }

    /// Two scrape jobs that read the same port count every request twice, which would double the evidence for nothing.
    fn refuse_twins(&mut self, target: &[(&Series, Counter)], grid: Grid) {
        let first = target[0].0;
        if first.instance.is_empty() || target.iter().all(|(series, _)| series.job == first.job) {
            return;
        }
        for counter in [Counter::Errors, Counter::Total] {
            let mut jobs: Vec<Option<&str>> = vec![None; grid.len()];
            for (series, _) in target.iter().filter(|(_, kind)| *kind == counter) {
                for index in series.points.iter().filter_map(|(time, _)| grid.index(*time)) {
                    let job = *jobs[index].get_or_insert(&series.job);
                    if job != series.job {
                        let message = || {
                            format!(
                                "pod {} is scraped twice, by the jobs {job:?} and {:?}: name one in the selectors, as in {{$arm,job={job:?}}}",
                                series.pod, series.job
                            )
                        };
                        self.fault(index, grid, message);
                    }
                }
            }
        }
    }

    fn fault_at(&mut self, series: &[(&Series, Counter)], grid: Grid, message: impl Fn() -> String) {
        for (series, _) in series {
            for index in series.points.iter().filter_map(|(time, _)| grid.index(*time)) {
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

    /// How the answers stand at the last tick.
    fn health(self, ratio: &Ratio<'_>, evidence: &Evidence, grid: Grid) -> AnswerHealth {
        let last = grid.len() - 1;
        // The error ratio has these three queries whenever it has a baseline, as here.
        let queries = queries(ratio.kpi, ratio.arms);
        let query = |index: usize| queries.get(index).map(|query| quote(query)).unwrap_or_default();
        let which = |lacks: [bool; 2]| match lacks {
            [true, true] => Some("neither the canary's nor the baseline's pods"),
            [true, false] => Some("the baseline's pods, but not the canary's"),
            [false, true] => Some("the canary's pods, but not the baseline's"),
            [false, false] => None,
        };
        if let Some(fault) = self.fault {
            return AnswerHealth::Malformed(format!(
                "{fault}; the queries are {} and {}",
                query(0),
                query(1)
            ));
        }
        if let Some(which) = which(self.present.map(|present| !present[last])) {
            return AnswerHealth::NoData(format!(
                "Prometheus answers, but holds samples of {which}: check the metric's name, and that the pods are scraped with the \
                 labels namespace and pod, in {}",
                query(1)
            ));
        }
        if let Some(which) = which(self.fresh.map(|fresh| !fresh[last])) {
            return AnswerHealth::Blind(format!(
                "Prometheus holds recent samples of {which}: none is younger than {} s; the pods must be scraped at least every \
                 {} s, or analysis.interval be longer, for {}",
                2 * grid.step,
                2 * grid.step,
                query(1)
            ));
        }
        if self.no_errors && evidence.canary.events + evidence.baseline.events == 0.0 {
            return AnswerHealth::Remark(format!(
                "no error has been counted, which is right unless the query is wrong: {} gives no series",
                query(0)
            ));
        }
        AnswerHealth::Good
    }
}

impl Ratio<'_> {
    fn arm_of(&self, pod: &str) -> Option<usize> {
        if self.arms.canary.owns(pod) { Some(CANARY) } else { self.baseline.owns(pod).then_some(BASELINE) }
    }
}

/// Marks the ticks at which any of the series has a sample.
fn mark(up: &mut [bool], series: &[(&Series, Counter)], grid: Grid) {
    up.fill(false);
    for (series, _) in series {
        for &(time, value) in &series.points {
            if let Some(index) = grid.index(time) {
                up[index] |= is_count(value);
            }
        }
    }
}

/// Whether a sample can be that of a counter.
fn is_count(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

/// More errors than requests come from counters that do not belong together; beyond all requests there is nothing to learn.
fn clamped(counts: Counts) -> Counts {
    Counts { events: counts.events.min(counts.total), ..counts }
}

fn add(sum: &mut Counts, counts: Counts) {
    sum.events += counts.events;
    sum.total += counts.total;
}

/// Such as `37.2% (312 of 839)`.
fn described(Counts { events, total }: Counts) -> String {
    if total <= 0.0 {
        return "without requests".to_owned();
    }
    let percent = 100.0 * events / total;
    let digits = if percent == 0.0 || percent >= 1.0 { 1 } else { 3 };
    format!("{percent:.digits$}% ({events:.0} of {total:.0})")
}
