//! What a stage can show, and what was brought: detectable changes, estimates of change with their intervals. Pure arithmetic.

use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::api::{Change, Counts, StageChange, Track};

use super::eprocess::{Rival, mixture_cost, odds_times};

/// Quantile of the normal distribution for a probability of 80 %.
pub(super) const EIGHTY: f64 = 0.8416;

/// Quantile of the normal distribution for a two-sided interval of 95 %.
const NINETY_FIVE: f64 = 1.96;

/// The largest ratio of odds of canary to baseline that is looked for.
const LARGEST: f64 = 1000.0;

/// Requests of both arms in some span, and the share of events among the baseline's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) canary: f64,
    pub(super) baseline: f64,
    pub(super) share: f64,
}

impl Rates {
    /// Per tick, as `ticks` ticks have shown; nothing while an arm has no requests.
    pub(super) fn measured(canary: Counts, baseline: Counts, ticks: i64) -> Option<Self> {
        let ticks = ticks as f64;
        (canary.total > 0.0 && baseline.total > 0.0 && ticks > 0.0).then(|| Self {
            canary: canary.total / ticks,
            baseline: baseline.total / ticks,
            // Half an event more, so that none seen is not none to come.
            share: (baseline.events + 0.5) / (baseline.total + 1.0),
        })
    }

    /// The same over a number of spans.
    pub(super) fn over(self, spans: f64) -> Self {
        Self { canary: self.canary * spans, baseline: self.baseline * spans, ..self }
    }

    /// By how much the canary's share is above the baseline's when the ratio of their odds is `ratio`.
    fn difference(self, ratio: f64) -> f64 {
        odds_times(ratio, self.share) - self.share
    }

    /// Mean and variance of the log evidence against the tolerated ratio of odds `r0` when the ratio is `ratio`: requests times the
    /// Kullback-Leibler divergence of the shares, and the variance of counting.
    fn evidence(self, r0: f64, ratio: f64) -> (f64, f64) {
        let Rival { null, alternative } =
            Rival::of(r0, ratio, self.share, self.canary / (self.canary + self.baseline));
        let (mut mean, mut variance) = (0.0, 0.0);
        for (arm, requests) in [self.canary, self.baseline].into_iter().enumerate() {
            let (p0, p1) = (null[arm], alternative[arm]);
            let (event, none) = ((p1 / p0).ln(), (-p1).ln_1p() - (-p0).ln_1p());
            mean += requests * (p1 * event + (1.0 - p1) * none);
            variance += requests * p1 * (1.0 - p1) * (event - none).powi(2);
        }
        (mean, variance)
    }
}

/// The smallest ratio of odds that evidence of `needed` nats finds with a probability of 80 % in what `rates` holds; `None` where
/// there is none up to a thousandfold. The normal approximation to the sum of the log likelihood ratios, and what the mixture costs.
pub(super) fn detectable(r0: f64, minimum_effect: f64, needed: f64, rates: Rates) -> Option<f64> {
    let found = |ratio: f64| {
        let (mean, variance) = rates.evidence(r0, ratio);
        mean - EIGHTY * variance.sqrt() >= needed + mixture_cost()
            && rates.difference(ratio) >= minimum_effect
    };
    if !(LARGEST > r0 && found(LARGEST)) {
        return None;
    }
    let (mut low, mut high) = (r0, LARGEST);
    for _ in 0..30 {
        let middle = (low * high).sqrt();
        if found(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

/// Ticks in which evidence of `needed` nats is to be expected when the ratio of odds is `ratio`; `None` where that is tolerated.
pub(super) fn ticks_to_find(
    ratio: f64,
    r0: f64,
    minimum_effect: f64,
    needed: f64,
    per_tick: Rates,
) -> Option<f64> {
    if ratio <= r0 || per_tick.difference(ratio) < minimum_effect {
        return None;
    }
    let (mean, _) = per_tick.evidence(r0, ratio);
    (mean > 0.0).then(|| (needed + mixture_cost()) / mean)
}

/// The relative change of a share of requests. The interval is that of the logarithm of a ratio of two counts, and of pods whose log
/// odds have the standard deviation `spread`.
pub(super) fn share_change(
    canary: Counts,
    baseline: Counts,
    spread: f64,
    kc: i32,
    kb: i32,
) -> Option<Change> {
    if canary.total <= 0.0 || baseline.total <= 0.0 || canary.events + baseline.events <= 0.0 {
        return None;
    }
    // Half an event more on each side, so that a side without events has a logarithm.
    let rate = |counts: Counts| (counts.events + 0.5) / (counts.total + 1.0);
    let difference = (rate(canary) / rate(baseline)).ln();
    let spread = spread * (1.0 - baseline.events / baseline.total);
    let pods = spread * spread * (1.0 / f64::from(kc.max(1)) + 1.0 / f64::from(kb.max(1)));
    let error = (1.0 / (canary.events + 0.5) + 1.0 / (baseline.events + 0.5) + pods).sqrt();
    Some(interval(difference, NINETY_FIVE * error))
}

/// A change from the difference of two logarithms and half the length of its interval.
pub(super) fn interval(difference: f64, half: f64) -> Change {
    let change = |log: f64| super::rounded(log.exp_m1());
    Change { estimate: change(difference), low: change(difference - half), high: change(difference + half) }
}

/// Several measurements of one change together, each weighted by the inverse of its variance on the log scale; those of production
/// where there are any, else those of staging. `None` without a measurement.
pub fn pooled(stages: &[StageChange]) -> Option<Change> {
    let production = stages.iter().any(|stage| stage.track == Track::Production);
    let track = if production { Track::Production } else { Track::Staging };
    let (mut weights, mut sum) = (0.0, 0.0);
    for StageChange { change, .. } in stages.iter().filter(|stage| stage.track == track) {
        let error = (change.high.ln_1p() - change.low.ln_1p()) / (2.0 * NINETY_FIVE);
        let weight = 1.0 / error.powi(2);
        // An interval without length, or one that reaches to nothing at all, has no weight of its own.
        if error > 0.0 && weight.is_normal() && change.estimate.ln_1p().is_finite() {
            weights += weight;
            sum += weight * change.estimate.ln_1p();
        }
    }
    (weights > 0.0).then(|| interval(sum / weights, NINETY_FIVE / weights.sqrt()))
}

/// Natural logarithm of 1/p, where p is the probability that Student's t with `df` degrees of freedom exceeds `t`.
pub(super) fn student_surprise(t: f64, df: f64) -> f64 {
    // Beyond what a floating-point number holds it is certain enough.
    const CERTAIN: f64 = 700.0;
    match StudentsT::new(0.0, 1.0, df) {
        Ok(student) => -student.sf(t).max((-CERTAIN).exp()).ln(),
        Err(_) => 0.0,
    }
}

/// The value that Student's t with `df` degrees of freedom exceeds with a surprise of `surprise` nats.
pub(super) fn student_quantile(surprise: f64, df: f64) -> f64 {
    let beyond = |t: f64| student_surprise(t, df) - surprise;
    let (mut low, mut high) = ((0.0, beyond(0.0)), (1.0, beyond(1.0)));
    while high.1 < 0.0 && high.0 < 1e9 {
        (low, high) = (high, (2.0 * high.0, beyond(2.0 * high.0)));
    }
    // False position, with the end that stays at half its weight (Illinois).
    let mut kept = 0;
    for _ in 0..30 {
        let middle = low.0 - low.1 * (high.0 - low.0) / (high.1 - low.1);
        let at = (middle, beyond(middle));
        if at.1.abs() < 1e-9 || !(low.0..=high.0).contains(&middle) {
            return if at.1.is_finite() { middle } else { high.0 };
        }
        if at.1 < 0.0 {
            low = at;
            high.1 *= if kept == -1 { 0.5 } else { 1.0 };
            kept = -1;
        } else {
            high = at;
            low.1 *= if kept == 1 { 0.5 } else { 1.0 };
            kept = 1;
        }
    }
    high.0
}
