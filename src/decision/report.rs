//! From decisions to what users read: conditions, weight, summary. Pure.

use std::cmp::Reverse;

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use super::{
    judge::pooled,
    render::{Target, Variant},
    resolve::{Place, Refusal, Rollout},
    snapshot::Snapshot,
};
use crate::api::{
    Benefit, Change, Expect, KpiStatus, OptimizationState, Phase, RolloutStatus, StageChange, Step, Track,
    Verdict,
};

/// Ticks between two checkpoints of the evidence in status: 5 minutes at the default interval.
const CHECKPOINT_TICKS: i64 = 20;

/// Reason and message of the `Stalled` condition, while it is True.
pub fn stalled(status: &RolloutStatus) -> Option<(&str, &str)> {
    let condition = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Stalled" && condition.status == "True")?;
    Some((&condition.reason, &condition.message))
}

/// Conditions of a rollout that moves, has ended, or is stalled on the way.
pub fn progress(status: &mut RolloutStatus, stall: Option<&Refusal>, note: &str, now: Timestamp) {
    let phase = status.phase;
    let ended = matches!(phase, Phase::Completed | Phase::RolledBack);
    let reason = format!("{phase:?}");
    set(status, "Ready", ended, &reason, note, now);
    set(status, "Reconciling", !ended && stall.is_none(), &reason, note, now);
    let (why, message) = stall.map_or(("AsExpected", ""), |stall| (stall.reason, &stall.message));
    set(status, "Stalled", stall.is_some(), why, message, now);
    let failing = of_verdict(status, &[Verdict::Fail]);
    let (why, message) = match failing.as_str() {
        "" => ("NoAlarm", String::new()),
        _ => ("Alarm", format!("failing: {failing}")),
    };
    set(status, "Healthy", failing.is_empty(), why, &message, now);
    let blind = of_verdict(status, &[Verdict::TelemetryDown, Verdict::NoData]);
    let (why, message) = match blind.as_str() {
        "" => ("AsExpected", String::new()),
        _ => ("CannotRead", format!("cannot be read: {blind}; .status.kpis says why and what to change")),
    };
    set(status, "TelemetryAvailable", blind.is_empty(), why, &message, now);
    set(status, "Conflict", false, "AsExpected", "", now);
}

/// Conditions of a rollout whose specification cannot be followed.
pub fn refused(status: &mut RolloutStatus, refusal: &Refusal, now: Timestamp) {
    set(status, "Ready", false, "Stalled", &refusal.message, now);
    set(status, "Reconciling", false, "Stalled", &refusal.message, now);
    set(status, "Stalled", true, refusal.reason, &refusal.message, now);
    let conflict = refusal.reason == "Conflict";
    set(
        status,
        "Conflict",
        conflict,
        if conflict { "Conflict" } else { "AsExpected" },
        if conflict { &refusal.message } else { "" },
        now,
    );
}

fn of_verdict(status: &RolloutStatus, verdicts: &[Verdict]) -> String {
    let names: Vec<_> = status
        .kpis
        .iter()
        .filter(|kpi| verdicts.contains(&kpi.verdict))
        .map(|kpi| kpi.name.as_str())
        .collect();
    names.join(", ")
}

/// Sets a condition; the transition time moves only with the status.
fn set(status: &mut RolloutStatus, kind: &str, is: bool, reason: &str, message: &str, now: Timestamp) {
    let text = if is { "True" } else { "False" };
    let old = status.conditions.iter().position(|condition| condition.type_ == kind);
    let since = match old.map(|at| &status.conditions[at]) {
        Some(condition) if condition.status == text => condition.last_transition_time.clone(),
        _ => Time(now),
    };
    let condition = Condition {
        type_: kind.to_owned(),
        status: text.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: Some(status.observed_generation),
        last_transition_time: since,
    };
    match old {
        Some(at) => status.conditions[at] = condition,
        None => status.conditions.push(condition),
    }
}

/// The weight that is asked for and the one that the serving pods give.
pub fn weight(status: &mut RolloutStatus, rollout: &Rollout, snapshot: &Snapshot, targets: &[Target]) {
    let serving = |variant: &Variant| snapshot.variants.get(variant).map_or(0, |seen| seen.serving());
    let all: i32 = Variant::PRODUCTION.iter().map(serving).sum();
    let share = |pods: i32| if all == 0 { 0.0 } else { 100.0 * f64::from(pods) / f64::from(all) };
    let planned = status
        .stage
        .as_ref()
        .and_then(|stage| rollout.stages.iter().find(|planned| planned.name == stage.name));
    let (desired, effective) = match (&status.stage, planned.map(|planned| &planned.place)) {
        (None, _) if status.phase == Phase::Completed => (100, share(all)),
        (Some(stage), _) if stage.step == Step::Promoting => {
            let stable = targets.iter().find(|target| target.variant == Variant::Stable);
            let seen = snapshot.variants.get(&Variant::Stable);
            let taken = stable.zip(seen).map_or(0, |(target, seen)| seen.taken(target));
            (100, share(serving(&Variant::Canary) + taken))
        }
        (Some(stage), Some(Place::Weight(weight))) if stage.step != Step::Restoring => {
            (*weight, share(serving(&Variant::Canary)))
        }
        _ => (0, 0.0),
    };
    status.weight.desired = desired;
    status.weight.effective = format!("{effective:.0}%");
}

/// What the columns of `kubectl get` show.
pub fn summary(status: &mut RolloutStatus) {
    let on = |state| matches!(state, OptimizationState::Active | OptimizationState::Promoted);
    let active = status.optimizations.iter().filter(|o| on(o.state)).count();
    status.summary.active = format!("{active}/{}", status.optimizations.len());
    status.summary.worst_kpi = status
        .kpis
        .iter()
        .min_by_key(|kpi| (severity(kpi.verdict), Reverse(nearness(kpi))))
        .map(|kpi| format!("{} {:?}", kpi.name, kpi.verdict))
        .unwrap_or_default();
    let rolled_back: Vec<_> = status
        .optimizations
        .iter()
        .filter(|o| o.state == OptimizationState::RolledBack)
        .map(|o| o.name.as_str())
        .collect();
    status.summary.rolled_back = rolled_back.join(",");
}

fn severity(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Fail => 0,
        Verdict::TelemetryDown => 1,
        Verdict::NoData => 2,
        Verdict::Inconclusive => 3,
        Verdict::Pass => 4,
    }
}

/// How near a KPI is to its alarm, in tenths, so that the summary does not change at each tick.
fn nearness(kpi: &KpiStatus) -> i64 {
    match (kpi.log_evidence, kpi.alarm_at) {
        (Some(evidence), Some(alarm)) if alarm > 0.0 => (10.0 * evidence / alarm) as i64,
        _ => 0,
    }
}

/// Why a promised benefit is missed: the whole interval of what was measured falls short of it. `None` while it may be kept.
pub fn missed(expect: &Expect, known: &KpiStatus) -> Option<String> {
    let change = known.change?;
    let short = match expect.change < 0.0 {
        true => change.low > expect.change,
        false => change.high < expect.change,
    };
    short.then(|| format!("{} was promised, {} was measured", percent(expect.change), described(change)))
}

/// Such as `-38 % (-41 to -35)`.
pub fn described(change: Change) -> String {
    let number = |share: f64| format!("{:+.0}", 100.0 * share);
    format!("{} ({} to {})", percent(change.estimate), number(change.low), number(change.high))
}

fn percent(share: f64) -> String {
    format!("{:+.0} %", 100.0 * share)
}

/// Notes a stage's measurement of a KPI's change, in the place of an earlier one of the same stage. Measurements with other
/// optimizations on are of something else and are dropped.
pub fn credit(
    benefits: &mut Vec<Benefit>,
    kpi: &str,
    optimizations: Vec<String>,
    stage: &str,
    track: Track,
    change: Change,
) {
    let mut stages = match benefits.iter().position(|known| known.kpi == kpi) {
        Some(at) => {
            let known = benefits.remove(at);
            if known.optimizations == optimizations { known.stages } else { vec![] }
        }
        None => vec![],
    };
    stages.retain(|known| known.stage != stage);
    stages.push(StageChange { stage: stage.to_owned(), track, change });
    let overall = pooled(&stages).unwrap_or(change);
    benefits.push(Benefit { kpi: kpi.to_owned(), optimizations, stages, overall });
}

/// Tells each optimization of the pass what it alone has brought.
pub fn benefits(status: &mut RolloutStatus) {
    for optimization in status.optimizations.iter_mut().filter(|o| o.state == OptimizationState::Active) {
        let own =
            status.benefits.iter().filter(|benefit| benefit.optimizations == [optimization.name.clone()]);
        let told: Vec<_> =
            own.map(|benefit| format!("{} {}", benefit.kpi, described(benefit.overall))).collect();
        optimization.benefit = told.join(", ");
    }
}

/// What the pass has brought, for its last decision: by optimization, and jointly where it cannot be told apart.
pub fn brought(status: &RolloutStatus) -> String {
    let told: Vec<_> = status
        .benefits
        .iter()
        .map(|benefit| {
            let jointly = if benefit.optimizations.len() > 1 { " jointly" } else { "" };
            let by = benefit.optimizations.join(", ");
            format!("{} {} by {by}{jointly}", benefit.kpi, described(benefit.overall))
        })
        .collect();
    if told.is_empty() { String::new() } else { format!("; measured: {}", told.join("; ")) }
}

/// Whether a status is worth a write: something that users or a restart depend on has changed, or the evidence has run
/// `CHECKPOINT_TICKS` ahead of what is stored. Ticks alone cause no writes.
pub fn worth_writing(stored: &RolloutStatus, new: &RolloutStatus, step: i64) -> bool {
    let last_tick = |status: &RolloutStatus| {
        status.kpis.iter().filter_map(|kpi| kpi.evidence.as_ref()).map(|evidence| evidence.last_tick).min()
    };
    let ahead = match (last_tick(stored), last_tick(new)) {
        (Some(stored), Some(new)) => new - stored >= CHECKPOINT_TICKS * step,
        (stored, new) => stored.is_some() != new.is_some(),
    };
    ahead || without_ticks(stored) != without_ticks(new)
}

/// A status without what changes at each tick.
fn without_ticks(status: &RolloutStatus) -> RolloutStatus {
    let mut status = status.clone();
    status.next_decision_at = None;
    // Numbers change with each tick, and the API server gives several faults in any order.
    for condition in &mut status.conditions {
        let mut letters: Vec<char> = condition.message.chars().filter(|c| c.is_alphabetic()).collect();
        letters.sort_unstable();
        condition.message = letters.into_iter().collect();
    }
    if let Some(stage) = &mut status.stage {
        stage.observed = crate::api::Duration::default();
    }
    for kpi in &mut status.kpis {
        *kpi = KpiStatus {
            name: std::mem::take(&mut kpi.name),
            owner: kpi.owner.take(),
            verdict: kpi.verdict,
            reason: kpi.reason,
            reads: std::mem::take(&mut kpi.reads),
            since: kpi.since.take(),
            message: String::new(),
            canary: None,
            baseline: None,
            change: None,
            log_evidence: None,
            alarm_at: None,
            tolerated: None,
            detectable: None,
            doubling_found_in: None,
            evidence: None,
        };
    }
    status
}
