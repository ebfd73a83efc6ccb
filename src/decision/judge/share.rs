//! Shares of requests, canary against baseline: failed ones, or those slower than a bound. From counts to evidence and to what it
//! says. Pure.

use crate::api::{Carry, Cause, Counts, Evidence, ShareEvidence, Verdict};

use super::{
    AnswerHealth, Arm, Finding, Grid, Test, Trial,
    counters::{BASELINE, CANARY, Cold, Counters, Read, Tally},
    eprocess::{self, add},
    power, quote,
};

/// Events in both arms together that are enough for a pass.
const MINIMUM_EVENTS: f64 = 5.0;

/// Canary requests that are enough for a pass, as a multiple of 1/minimumEffect: had the canary failed at that rate, three
/// errors would be expected, and none at all has a probability of 5 % (rule of three).
pub(super) const MINIMUM_REQUESTS: f64 = 3.0;

/// Requests that an arm must have been due since its last one before it is called idle.
const IDLE_AFTER: f64 = 20.0;

/// A share that is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Share {
    /// The ratio of odds that is called equal, as the user has it.
    pub(super) tolerance: f64,
    /// Smallest difference that matters.
    pub(super) minimum_effect: f64,
    /// How much pods differ.
    pub(super) spread: f64,
    /// The share of the baseline's requests that was learned.
    pub(super) usual: f64,
}

/// Folds the ticks after `grid.from`.
pub(super) fn fold(
    trial: &Trial,
    baseline: &Arm,
    mut evidence: Evidence,
    answers: &Counters<'_>,
    no_events: bool,
    grid: Grid,
) -> (Evidence, AnswerHealth) {
    // A cold pod is slow by nature; one that fails is not well, however young.
    let warm_up = if matches!(trial.kpi.test, Test::Latency { .. }) { trial.warm_up } else { 0 };
    let mut cold = Cold { began: std::mem::take(&mut evidence.cold), warm_up };
    let read = Read::of(&trial.arms.canary, baseline, answers, &mut cold, grid);
    evidence.cold = cold.began;
    let shares = trial.shares();
    evidence.shares.resize_with(shares.len(), ShareEvidence::default);
    evidence.shares.iter_mut().for_each(eprocess::prepare);
    for index in 1..grid.len() {
        let tick = grid.tick(index);
        let counted = |of: &[[Tally; 2]], kind: usize| {
            of[index].map(|tally| {
                // More events than requests come from counters that do not belong together.
                Counts { events: tally.events[kind].min(tally.total), total: tally.total }
            })
        };
        if tick <= evidence.last_tick {
            // Against the tick at which the evidence begins, a change of the rate in the first one can be told, also of pods that were
            // cold then.
            for (kind, seen) in evidence.shares.iter_mut().enumerate().filter(|_| evidence.fresh_ticks == 0) {
                let [mut canary, mut baseline] = counted(&read.counts, kind);
                let [cold_canary, cold_baseline] = counted(&read.cold, kind);
                add(&mut canary, cold_canary);
                add(&mut baseline, cold_baseline);
                seen.latest = Carry { canary, baseline };
            }
            continue;
        }
        evidence.last_tick = tick;
        if read.faults[index] {
            evidence.shares.iter_mut().for_each(|share| share.carry = None);
            continue;
        }
        let fresh = read.fresh[CANARY][index] && read.fresh[BASELINE][index];
        evidence.fresh_ticks += i64::from(fresh);
        for (kind, (seen, share)) in evidence.shares.iter_mut().zip(&shares).enumerate() {
            let [canary, baseline_counts] = counted(&read.counts, kind);
            add(&mut seen.canary, canary);
            add(&mut seen.baseline, baseline_counts);
            if fresh {
                let r0 = trial.tolerated_at(share, baseline, tick, evidence.fresh_ticks);
                eprocess::begin(seen, evidence.fresh_ticks);
                eprocess::weigh(seen, canary, baseline_counts, r0, share, evidence.fresh_ticks);
            } else if canary.total > 0.0 || baseline_counts.total > 0.0 {
                // After a gap one arm may be back a tick before the other. Its increase over the gap waits for the other's.
                let carry = seen.carry.get_or_insert_default();
                add(&mut carry.canary, canary);
                add(&mut carry.baseline, baseline_counts);
            }
        }
    }
    let health = health(trial, read, &evidence, no_events, grid);
    (evidence, health)
}

/// How the answers stand at the last tick.
fn health(trial: &Trial, read: Read, evidence: &Evidence, no_events: bool, grid: Grid) -> AnswerHealth {
    let last = grid.len() - 1;
    let query = |index: usize| trial.queries().get(index).map(|query| quote(query)).unwrap_or_default();
    // The one whose series are all requests.
    let total = usize::from(matches!(trial.kpi.test, Test::ErrorRatio { .. }));
    let which = |lacks: [bool; 2]| match lacks {
        [true, true] => Some((Cause::Missing, "neither the canary's nor the baseline's pods")),
        [true, false] => Some((Cause::CanaryMissing, "the baseline's pods, but not the canary's")),
        [false, true] => Some((Cause::BaselineMissing, "the canary's pods, but not the baseline's")),
        [false, false] => None,
    };
    if let Some(fault) = read.fault {
        let all: Vec<_> = (0..=total).map(query).collect();
        return AnswerHealth::Malformed(format!(
            "{fault}; the quer{} {}",
            if all.len() > 1 { "ies are" } else { "y is" },
            all.join(" and ")
        ));
    }
    if let Some((reason, which)) = which(read.present.map(|present| !present[last])) {
        return AnswerHealth::NoData(
            reason,
            format!(
                "Prometheus answers, but holds samples of {which}: check the metric's name, and that the pods are scraped with the \
                 labels namespace and pod, in {}",
                query(total)
            ),
        );
    }
    if let Some((_, which)) = which(read.fresh.map(|fresh| !fresh[last])) {
        return AnswerHealth::Blind(
            Cause::Stale,
            format!(
                "Prometheus holds recent samples of {which}: none is younger than {0} s; the pods must be scraped at least every \
                 {0} s, or analysis.interval be longer, and the operator's clock must agree with that of Prometheus, for {1}",
                2 * grid.step,
                query(total)
            ),
        );
    }
    let events = evidence.shares.iter().map(|share| share.canary.events + share.baseline.events).sum::<f64>();
    if no_events && events == 0.0 {
        return AnswerHealth::Remark(format!(
            "no error has been counted, which is right unless the query is wrong: {} gives no series",
            query(0)
        ));
    }
    AnswerHealth::Good
}

/// What the evidence says.
pub(super) fn find(trial: &Trial, baseline: &Arm, evidence: &Evidence) -> Finding {
    let shares = trial.shares();
    // Each share is tested with its part of the KPI's probability.
    let cost = (shares.len().max(1) as f64).ln();
    let ticks = evidence.fresh_ticks;
    let nothing = ShareEvidence::default();
    let seen = |kind: usize| evidence.shares.get(kind).unwrap_or(&nothing);
    let weight = |kind: usize| eprocess::log_evidence(seen(kind), ticks) - cost;
    let (mut worst, mut peak) = (0, f64::NEG_INFINITY);
    for kind in 0..shares.len() {
        if seen(kind).peak - cost > peak {
            (worst, peak) = (kind, seen(kind).peak - cost);
        }
    }
    let failed = peak >= trial.alarm_at;
    if !failed {
        worst = (0..shares.len()).max_by(|a, b| weight(*a).total_cmp(&weight(*b))).unwrap_or_default();
    }
    let log_evidence = if failed { peak } else { weight(worst) };
    let ShareEvidence { canary, baseline: base, .. } = seen(worst);
    let what = match trial.preflight.as_ref().and_then(|preflight| preflight.bounds.get(worst)) {
        Some(bound) => format!("slower than {bound} s: "),
        None => String::new(),
    };
    let numbers = format!(
        "{what}canary {} against baseline {}, evidence {log_evidence:.1} of {:.1} needed",
        described(*canary),
        described(*base),
        trial.alarm_at
    );
    let first = seen(0);
    let requests = shares.first().map_or(0.0, |share| (MINIMUM_REQUESTS / share.minimum_effect).ceil())
        - first.canary.total;
    let events = MINIMUM_EVENTS - first.canary.events - first.baseline.events;
    let (verdict, reason, message) = if failed {
        (Verdict::Fail, Cause::Judged, numbers)
    } else if let Some((reason, idle)) = idle(trial, baseline, seen(worst)) {
        (Verdict::Inconclusive, reason, format!("{idle}; {numbers}"))
    } else if requests > 0.0 && events > 0.0 {
        let event = if what.is_empty() { "errors" } else { "slow requests" };
        let more = format!("{requests:.0} more canary requests or {events:.0} more {event} on either side");
        (Verdict::Inconclusive, Cause::NeedsEvidence, format!("{numbers}; needs {more} before it can pass"))
    } else {
        (Verdict::Pass, Cause::Judged, numbers)
    };
    let rate = |counts: Counts| (counts.total > 0.0).then(|| counts.events / counts.total);
    let share = shares.get(worst).copied();
    let measured = share.filter(|_| ticks > 0).and_then(|share| {
        let rates = power::Rates::measured(*canary, *base, ticks)?;
        Some((trial.tolerated(&share, baseline), share, rates))
    });
    let (detectable, doubling) = match measured {
        None => (None, None),
        Some((r0, share, rates)) => {
            let needed = trial.alarm_at + cost;
            (
                power::detectable(r0, share.minimum_effect, needed, rates.over(trial.bake as f64)),
                power::ticks_to_find(2.0, r0, share.minimum_effect, needed, rates),
            )
        }
    };
    Finding {
        verdict,
        reason,
        message,
        canary: rate(*canary),
        baseline: rate(*base),
        change: share.and_then(|share| {
            power::share_change(*canary, *base, share.spread, trial.arms.canary.pods, baseline.pods)
        }),
        log_evidence: Some(log_evidence),
        tolerated: share.map(|share| trial.tolerated(&share, baseline)),
        detectable,
        doubling_ticks: doubling,
    }
}

/// Which arm has no requests, over the whole stage or since it was due some, by its pods.
fn idle(trial: &Trial, arm: &Arm, seen: &ShareEvidence) -> Option<(Cause, &'static str)> {
    let pods = |arm: &Arm| f64::from(arm.pods.max(1));
    let due = seen.silence * pods(&trial.arms.canary) / pods(arm);
    let due_baseline = -seen.silence * pods(arm) / pods(&trial.arms.canary);
    match (seen.canary.total > 0.0, seen.baseline.total > 0.0) {
        (false, false) => Some((Cause::Idle, "neither arm has had a request yet")),
        (false, true) => Some((Cause::CanaryIdle, "no canary pod has had a request yet")),
        (true, false) => Some((Cause::BaselineIdle, "no baseline pod has had a request yet")),
        _ if due >= IDLE_AFTER => {
            Some((Cause::CanaryIdle, "the canary gets no requests any more, though the baseline does"))
        }
        _ if due_baseline >= IDLE_AFTER => {
            Some((Cause::BaselineIdle, "the baseline gets no requests any more, though the canary does"))
        }
        _ => None,
    }
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
