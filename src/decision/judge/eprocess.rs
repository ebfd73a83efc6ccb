//! A one-sided conditional-binomial mixture e-process on counts of events among requests, canary against baseline. Pure arithmetic.
//!
//! Given the events of both arms in a tick, those of the canary are binomial with a share that depends on the requests of both
//! arms and on the ratio of the rates, but not on the common rate: drift and bursts that both arms see cancel. The evidence
//! is a mixture of likelihood ratios, a supermartingale while the ratio is within the tolerance, so that by Ville's inequality it
//! ever reaches 1/alpha with a probability of at most alpha, however often one looks.
//!
//! The mixture is over the ratio and over the tick at which harm begins. With the first tick alone, a day without harm would weigh
//! against harm that begins in the evening: in a long stage the weights fall without end.

use crate::api::{Carry, Counts, ShareEvidence};

/// Alternatives of the mixture, as multiples of the tolerated ratio; equal prior weights.
const ALTERNATIVES: [f64; 7] = [1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 30.0];

/// Prior probability that harm begins with the first tick, as what a change does mostly does. The rest is spread over the later ones: tick n has the share
/// 1/((n-1)n) of it, so that 1/n is left after tick n, and all of it together is no more than 1.
const FROM_THE_START: f64 = 0.8;

/// What the mixture costs against the one alternative that is true from the first tick on, in nats.
pub(super) fn mixture_cost() -> f64 {
    (ALTERNATIVES.len() as f64 / FROM_THE_START).ln()
}

/// Share of the recent counts that is left after one more tick: about the last twenty ticks weigh.
const MEMORY: f64 = 0.95;

/// Standard deviations of the difference between arms of unlike pods that are tolerated. The spread is learned from minutes, and from
/// tick to tick pods differ more: with 3.3, among very unlike pods under much traffic, 0.38 % of 10,000 healthy rollouts were rolled
/// back in the bench, with this 0.22 %.
pub const Z: f64 = 3.5;

/// Log evidence at which a KPI alarms: ln(1/alpha), where alpha is this KPI's share in this stage and attempt.
///
/// `probability`, that a healthy rollout is ever rolled back, is spent evenly over stages and over KPIs by their weight (`share`, all
/// together 1). The first attempt at a stage has nine tenths of it, since most stages need no other; all that there may ever be after
/// it have the rest.
pub fn alarm_at(probability: f64, share: f64, stages: usize, attempt: i32) -> f64 {
    (stages.max(1) as f64 / (probability * share * mostly_first(attempt))).ln()
}

/// Nine tenths for the first of a row without end, 1/((n-1)n) of the rest for number n after it: together 1.
pub(super) fn mostly_first(n: i32) -> f64 {
    let n = f64::from(n);
    if n <= 1.0 { 0.9 } else { 0.1 / ((n - 1.0) * n) }
}

/// The ratio of rates that is called equal: the user's tolerance `r0`, or what `kc` canary and `kb` baseline pods differ by
/// when the log rates of single pods have the standard deviation `tau`, whichever is more.
pub fn effective_tolerance(r0: f64, tau: f64, kc: i32, kb: i32) -> f64 {
    let (kc, kb) = (f64::from(kc.max(1)), f64::from(kb.max(1)));
    r0.ln().max(Z * tau * (1.0 / kc + 1.0 / kb).sqrt()).exp()
}

/// Makes evidence ready for a tick. A checkpoint that does not fit (another version's, or edited by hand) starts afresh.
pub(super) fn prepare(evidence: &mut ShareEvidence) {
    if evidence.log_weights.len() != ALTERNATIVES.len() || !evidence.log_weights.iter().all(|w| w.is_finite())
    {
        evidence.log_weights = vec![FROM_THE_START.ln(); ALTERNATIVES.len()];
    }
}

/// Adds to each alternative the prior weight of harm that begins with this tick, counted from 1.
pub(super) fn begin(evidence: &mut ShareEvidence, tick: i64) {
    let tick = tick as f64;
    if tick > 1.0 {
        let weight = ((1.0 - FROM_THE_START) / ((tick - 1.0) * tick)).ln();
        for log_weight in &mut evidence.log_weights {
            *log_weight = log_sum(*log_weight, weight);
        }
    }
}

/// What of a tick may be taken as evidence after the tick before: the canary's events, and by what factor more is tolerated.
///
/// The arms' pods are scraped at different moments, so that a tick at the edge of a burst holds more of it for one arm than for the
/// other, and may look like any ratio up to the height of the edge. A canary's rate that rises by more than counting explains (two
/// standard errors) is counted up to there: if it lasts, it counts whole in the next tick. By what factor the baseline's rate changes
/// beyond the same, more is tolerated. Both can only lessen the evidence, so that what bounds false alarms still holds.
fn steady(before: &Carry, canary: Counts, baseline: Counts) -> (f64, f64) {
    let rate = |counts: Counts| (counts.events + 0.5) / (counts.total + 1.0);
    let beyond = |a: f64, b: f64| 2.0 * (1.0 / (a + 0.5) + 1.0 / (b + 0.5)).sqrt();
    let mut events = canary.events;
    if before.canary.total > 0.0 {
        let allowed = |after: f64| {
            let expected = rate(Counts { events: after, ..before.canary }) * canary.total;
            expected * beyond(after, expected).exp()
        };
        // A first few events leave less to chance than none, and would allow less: more of them never lessen the evidence.
        events = events.min(allowed(before.canary.events).max(allowed(0.0)));
    }
    let mut edge = 0.0;
    if before.baseline.total > 0.0 && baseline.total > 0.0 {
        let changed = (rate(baseline) / rate(before.baseline)).ln().abs();
        edge = (changed - beyond(before.baseline.events, baseline.events)).max(0.0);
    }
    (events, edge.exp())
}

/// Takes the counts of fresh tick number `tick` into the log weights. `r0` is the tolerated ratio, `minimum_effect` the smallest
/// difference of the two shares that matters, over the whole stage or over its latest ticks.
pub(super) fn weigh(
    evidence: &mut ShareEvidence,
    canary: Counts,
    baseline: Counts,
    r0: f64,
    minimum_effect: f64,
    tick: i64,
) {
    let (mut c, mut b) = (canary, baseline);
    let (events, edge) = steady(&evidence.latest, canary, baseline);
    (c.events, evidence.latest) = (events, Carry { canary, baseline });
    let r0 = r0 * edge;
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
    evidence.silence = match (canary.total > 0.0, baseline.total > 0.0) {
        (true, true) => 0.0,
        (false, true) => evidence.silence.max(0.0) + baseline.total,
        (true, false) => evidence.silence.min(0.0) - canary.total,
        (false, false) => evidence.silence,
    };
    for (recent, counts) in [(&mut evidence.recent.canary, canary), (&mut evidence.recent.baseline, baseline)]
    {
        recent.events *= MEMORY;
        recent.total *= MEMORY;
        add(recent, counts);
    }
    let matters = |canary: Counts, baseline: Counts| {
        canary.total > 0.0
            && baseline.total > 0.0
            && canary.events / canary.total - baseline.events / baseline.total >= minimum_effect
    };
    // Harm that begins late matters by its own size, not by that of the whole stage.
    if matters(evidence.canary, evidence.baseline)
        || matters(evidence.recent.canary, evidence.recent.baseline)
    {
        evidence.peak = evidence.peak.max(log_evidence(evidence, tick));
    }
}

/// Natural logarithm of the evidence after `ticks` fresh ticks: the mean of the alternatives' weights, and the weight of what is yet
/// to begin. 0 at the start.
pub(super) fn log_evidence(evidence: &ShareEvidence, ticks: i64) -> f64 {
    let weights = &evidence.log_weights;
    let highest = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !highest.is_finite() {
        return 0.0;
    }
    let sum: f64 = weights.iter().map(|weight| (weight - highest).exp()).sum();
    let begun = highest + (sum / weights.len() as f64).ln();
    let to_come = (1.0 - FROM_THE_START) / (ticks as f64).max(1.0);
    log_sum(begun, to_come.ln())
}

fn log_sum(a: f64, b: f64) -> f64 {
    a.max(b) + (-(a - b).abs()).exp().ln_1p()
}

pub(super) fn add(sum: &mut Counts, counts: Counts) {
    sum.events += counts.events;
    sum.total += counts.total;
}
