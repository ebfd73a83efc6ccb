//! The state machine of a rollout: from what is observed and judged to what is wanted. A total, pure function.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};

use super::{
    judge::{self, Arm, Arms, Kpi, Lesson, Test, Tick, Trial},
    render::{
        PROMOTED_ANNOTATION, ROLLED_BACK_ANNOTATION, Target, Variant, Wanted, outline, render, subject,
    },
    replicas::Replicas,
    report,
    resolve::{Place, Refusal, Rollout, Stage, hash},
    snapshot::{Observed, Pod, Snapshot, Verb},
};
use crate::api::{
    Approval, Basis, Blame, Cause, Comparison, Decision, DeletionPolicy, Direction, KpiStatus, Mode, Numbers,
    OnInconclusive, OnMiss, OptimizationRollout, OptimizationState, OptimizationStatus, Phase, Preflight,
    Promotion, RolloutStatus, StageStatus, Step, Suffered, Track, Verdict, What,
};

/// How long a shared alarm waits for an owned one before everything is rolled back.
pub const BLAME_WINDOW: SignedDuration = SignedDuration::from_secs(60);
/// How long the pods of a stage may take to be exposed before the rollout is called stalled.
pub const PROGRESS_DEADLINE: SignedDuration = SignedDuration::from_secs(600);
/// How long a pod that runs may be not Ready before that is a signal.
pub const NOT_READY_LIMIT: SignedDuration = SignedDuration::from_secs(120);
/// How often pods that are being brought up are looked at, besides when an event tells of a change.
const POLL: SignedDuration = SignedDuration::from_secs(1);
/// How often a rollout that waits for nothing is looked at, against missed events.
const IDLE: SignedDuration = SignedDuration::from_secs(3600);
/// Reason of a refusal because of somebody else's objects.
const CONFLICT: &str = "Conflict";
/// How often it is looked whether somebody else's objects have gone.
const CONFLICT_POLL: SignedDuration = SignedDuration::from_secs(30);
/// Decisions older than this are not announced after a restart: their events have been made, or have expired.
const ANNOUNCE: SignedDuration = SignedDuration::from_secs(600);
/// Verdicts kept of optimizations that are no longer in the specification.
const REMEMBERED: usize = 16;
/// Decisions kept in status.
const DECISIONS: usize = 20;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The new status.
    pub status: RolloutStatus,
    /// Variants to apply, in order.
    pub targets: Vec<Target>,
    /// Replicas that stable gets at the rollout's end, where nothing else of it can be written.
    pub scale: Option<i32>,
    /// Variants to delete.
    pub remove: Vec<Variant>,
    /// Verbs that have been answered, whose annotations are to be removed.
    pub answered: Vec<Verb>,
    /// Whether the finalizer can go: nothing is left to be put back.
    pub release: bool,
    /// When to look again at the latest.
    pub wake: Timestamp,
}

/// What is to be asked of Prometheus.
#[derive(Clone, Debug)]
pub struct Inquiry {
    /// The KPIs that can be judged, each with its evidence so far.
    pub trials: Vec<(Trial, crate::api::Evidence)>,
    /// What is said of the others, which are not learned of yet or warm up still.
    pub waiting: Vec<KpiStatus>,
    /// Last tick of the grid that can be asked for now.
    pub until: Tick,
    /// Spacing of the grid, in seconds.
    pub step: i64,
}

/// What is to be asked of Prometheus now, or nothing while nothing may be judged.
pub fn inquiry(rollout: &Rollout, status: &RolloutStatus, now: Timestamp) -> Option<Inquiry> {
    let stage = status.stage.as_ref()?;
    let step = interval(rollout);
    let until = judge::settled(now.as_second(), step);
    if !judges(stage) || until <= evidence_from(rollout, stage, None)? {
        return None;
    }
    let (track, arms) = compared(rollout, stage)?;
    let bake = planned(rollout, stage).map(|planned| planned.duration).unwrap_or_default();
    let on = names(status, OptimizationState::Active);
    let (mut trials, mut waiting) = (vec![], vec![]);
    for kpi in judged(rollout, stage, &on) {
        let known = status.kpis.iter().find(|known| known.name == kpi.name);
        let preflight = learned(status, kpi, track);
        let from = begins(rollout, stage, kpi, preflight)?;
        if until <= from {
            waiting.push(Trial::waiting(
                kpi,
                &judge::AnswerHealth::Blind(Cause::NeedsEvidence, "the KPI warms up".to_owned()),
            ));
            continue;
        }
        if kpi.is_tested() && preflight.is_none() {
            waiting.push(known.cloned().unwrap_or_else(|| unlearned(kpi, None)));
            continue;
        }
        let trial = trial(rollout, stage, kpi, arms.clone(), preflight, bake);
        let evidence =
            known.filter(|known| is_of(&known.reads, kpi)).and_then(|known| known.evidence.clone());
        trials.push((trial.clone(), trial.resumed(evidence, from)));
    }
    Some(Inquiry { trials, waiting, until, step })
}

/// One KPI in a stage of this bake.
fn trial(
    rollout: &Rollout,
    stage: &StageStatus,
    kpi: &Kpi,
    arms: Arms,
    preflight: Option<&Preflight>,
    bake: crate::api::Duration,
) -> Trial {
    let step = interval(rollout);
    Trial {
        alarm_at: judge::alarm_at(
            rollout.analysis.false_rollback_probability,
            rollout.alpha_share(kpi),
            stages(rollout, stage.stages),
            stage.attempt,
        ),
        kpi: kpi.clone(),
        arms,
        preflight: preflight.cloned(),
        step,
        warm_up: seconds(warm_up(rollout, kpi)),
        bake: seconds(bake).saturating_add(step - 1) / step,
    }
}

/// Stages among which the false-rollback probability is shared: those that the pass began with, where that was noted.
pub fn stages(rollout: &Rollout, began_with: i32) -> usize {
    usize::try_from(began_with).ok().filter(|stages| *stages > 0).unwrap_or(rollout.stages.len())
}

/// The attempt with which a pass enters a stage. The first stages, as many as it began with, have a share of the probability each.
/// What is entered beyond those, again or after an edit of the list, goes on after the highest attempt so far: as if it were one more
/// at that stage, whose share allows for any number. So nothing is spent twice.
fn next_attempt(stage: &StageStatus, name: &str) -> i32 {
    let spent = || {
        stage
            .spent
            .iter()
            .map(|(name, attempt)| (name.as_str(), *attempt))
            .chain([(stage.name.as_str(), stage.attempt)])
    };
    let entered: BTreeSet<_> = spent().map(|(name, _)| name).collect();
    let share_left = usize::try_from(stage.stages).is_ok_and(|stages| entered.len() < stages);
    if share_left && !entered.contains(name) {
        1
    } else {
        spent().map(|(_, attempt)| attempt).max().unwrap_or(0) + 1
    }
}

/// Hash of what a KPI reads.
fn reads(kpi: &Kpi) -> String {
    let queries = match &kpi.test {
        Test::ErrorRatio { errors, total, .. } => format!("{errors}\n{total}"),
        Test::Latency { histogram, .. } => histogram.clone(),
        Test::Gauge { query, direction, .. } => format!("{query}\n{direction:?}"),
        Test::Threshold { query, .. } => query.clone(),
    };
    hash(&queries)
}

/// Whether what is known was read by this KPI's queries. That of an operator which did not note them counts.
pub fn is_of(known: &str, kpi: &Kpi) -> bool {
    is_same(known, &reads(kpi))
}

fn is_same(known: &str, reads: &str) -> bool {
    known.is_empty() || known == reads
}

/// What is to be learned from running pods before the evidence of a KPI can begin.
pub fn lessons(rollout: &Rollout, status: &RolloutStatus, now: Timestamp) -> Vec<Lesson> {
    let Some(stage) = status.stage.as_ref().filter(|stage| judges(stage) && stage.step != Step::Promoting)
    else {
        return vec![];
    };
    let Some((track, arms)) = compared(rollout, stage) else { return vec![] };
    let step = interval(rollout);
    let until = judge::settled(now.as_second(), step);
    let span = i64::try_from(rollout.analysis.preflight.as_secs()).unwrap_or(i64::MAX / 2);
    let mut off: Vec<String> = arms.baseline.iter().map(|arm| arm.deployment.clone()).collect();
    if track == Track::Production {
        off.push(Variant::Stable.object_name(&rollout.name));
        off.dedup();
    }
    let on = names(status, OptimizationState::Active);
    // Where there are pods enough to learn from, and only their past was too short, it is tried again while it grows.
    let place = planned(rollout, stage).map(|planned| &planned.place);
    let (pods, oldest) = match place {
        Some(Place::Weight(weight)) => {
            let replicas = Replicas::at(rollout.replicas, *weight, rollout.comparison);
            (replicas.stable + replicas.baseline, replicas.stable)
        }
        _ => arms.baseline.as_ref().map_or((0, 0), |arm| (arm.pods, arm.pods)),
    };
    let exposed = stage.exposed_at.as_ref().map_or(until, |time| time.0.as_second());
    let grows = pods >= judge::ENOUGH_PODS && until <= exposed + span + step;
    // All that are to be expected but one, which may have been replaced; at the end what there is.
    let enough = if grows && until <= exposed + span { oldest - 1 } else { 0 };
    let lesson = |kpi: &Kpi| {
        let begun = learned(status, kpi, track);
        let from = evidence_from(rollout, stage, Some(kpi))?;
        let due = match begun {
            None => until >= from,
            Some(begun) => grows && begun.pods == 0 && until > begun.until,
        };
        due.then(|| Lesson {
            begun: begun.cloned(),
            enough,
            ..Lesson::over(kpi, track, &rollout.namespace, off.clone(), until, span, step)
        })
    };
    judged(rollout, stage, &on).filter(|kpi| kpi.is_tested()).filter_map(lesson).collect()
}

/// Notes what a lesson has taught. Gives back what is said of a KPI of which nothing is known yet, so that it cannot be judged.
pub fn learn(
    status: &mut RolloutStatus,
    lesson: &Lesson,
    taught: Result<Option<Preflight>, judge::AnswerHealth>,
) -> Option<KpiStatus> {
    match taught {
        Ok(Some(preflight)) => {
            status.preflight.retain(|known| known.kpi != preflight.kpi || known.track != preflight.track);
            status.preflight.push(Preflight { reads: reads(&lesson.kpi), ..preflight });
            None
        }
        _ if lesson.begun.is_some() => None,
        Ok(None) => Some(unlearned(&lesson.kpi, None)),
        Err(health) => Some(unlearned(&lesson.kpi, Some(&health))),
    }
}

/// What is said of a KPI of which nothing could be learned yet.
fn unlearned(kpi: &Kpi, health: Option<&judge::AnswerHealth>) -> KpiStatus {
    let why = "no request has been counted yet from which to tell what is slow".to_owned();
    Trial::waiting(kpi, health.unwrap_or(&judge::AnswerHealth::Blind(Cause::Idle, why)))
}

/// Whether a stage is in a step in which KPIs are judged.
fn judges(stage: &StageStatus) -> bool {
    matches!(stage.step, Step::Observing | Step::AwaitingApproval | Step::Promoting)
}

/// The KPIs that are judged in a stage with these optimizations on.
fn judged<'a>(
    rollout: &'a Rollout,
    stage: &StageStatus,
    on: &'a BTreeSet<String>,
) -> impl Iterator<Item = &'a Kpi> {
    let promoting = stage.step == Step::Promoting;
    rollout.kpis(on).filter(move |kpi| !promoting || !kpi.is_tested())
}

/// What was learned of a KPI, if it fits.
fn learned<'a>(status: &'a RolloutStatus, kpi: &Kpi, track: Track) -> Option<&'a Preflight> {
    let of = |known: &&Preflight| known.kpi == kpi.name && known.track == track && is_of(&known.reads, kpi);
    let known = status.preflight.iter().find(of)?;
    let fits = match kpi.test {
        Test::Latency { .. } => !known.bounds.is_empty(),
        Test::ErrorRatio { .. } => known.bounds.is_empty() && known.spread.len() == 1,
        Test::Gauge { .. } => known.bounds.is_empty() && known.spread.len() != 1,
        Test::Threshold { .. } => false,
    };
    fits.then_some(known)
}

/// Where a stage runs and which pods it compares; none while its place in the specification is gone.
fn compared(rollout: &Rollout, stage: &StageStatus) -> Option<(Track, Arms)> {
    let arm = |variant: Variant, pods| Arm { deployment: variant.object_name(&rollout.name), pods };
    let place = planned(rollout, stage).map(|planned| &planned.place);
    let (track, canary, baseline) = match (stage.step, place) {
        (Step::Promoting, _) => (Track::Production, arm(Variant::Stable, rollout.replicas), None),
        (_, None) => return None,
        (_, Some(Place::Staging(staging))) => (
            Track::Staging,
            arm(Variant::StagingCanary, staging.replicas),
            Some(arm(Variant::StagingBaseline, staging.replicas)),
        ),
        (_, Some(Place::Weight(weight))) => {
            let replicas = Replicas::at(rollout.replicas, *weight, rollout.comparison);
            let baseline = match rollout.comparison {
                Comparison::Fresh => arm(Variant::Baseline, replicas.baseline),
                Comparison::Stable => arm(Variant::Stable, replicas.stable),
            };
            (Track::Production, arm(Variant::Canary, replicas.canary), Some(baseline))
        }
    };
    Some((track, Arms { namespace: rollout.namespace.clone(), canary, baseline }))
}

/// Whether the configuration in force is worth asking the pods for: only while pods are being brought to one.
pub fn asks_pods(status: &RolloutStatus) -> bool {
    status
        .stage
        .as_ref()
        .is_some_and(|stage| matches!(stage.step, Step::Deploying | Step::Promoting | Step::Restoring))
}

/// What evidence that is kept in memory belongs to: it is of no use to another stage, attempt or exposure.
pub fn evidence_key(status: &RolloutStatus) -> String {
    let stage = status.stage.as_ref();
    stage.map(|stage| format!("{}/{}/{:?}", stage.name, stage.attempt, stage.exposed_at)).unwrap_or_default()
}

/// The decisions to be announced, where `announced` is the id of the last one that was, as far as that is remembered.
pub fn unannounced(
    status: &RolloutStatus,
    announced: Option<i64>,
    now: Timestamp,
) -> impl Iterator<Item = &Decision> {
    status.decisions.iter().filter(move |decision| match announced {
        Some(id) => decision.id > id,
        None => now.duration_since(decision.time.0) < ANNOUNCE,
    })
}

/// Spacing of the tick grid, in seconds.
fn interval(rollout: &Rollout) -> i64 {
    i64::try_from(rollout.analysis.interval.as_secs()).unwrap_or(i64::MAX).max(1)
}

/// The grid tick that is the base of a stage's evidence: the first after exposure and warm-up, the KPI's own where it has one.
fn evidence_from(rollout: &Rollout, stage: &StageStatus, kpi: Option<&Kpi>) -> Option<Tick> {
    let warm_up = kpi.map_or(rollout.analysis.warm_up, |kpi| warm_up(rollout, kpi));
    let warm = stage.exposed_at.as_ref()?.0 + span(warm_up);
    let step = interval(rollout);
    let whole = warm.as_second() + i64::from(warm.subsec_nanosecond() > 0);
    Some((whole + step - 1).div_euclid(step) * step)
}

/// How long pods are cold: the KPI's own warm-up where it has one.
fn warm_up(rollout: &Rollout, kpi: &Kpi) -> crate::api::Duration {
    kpi.warm_up.unwrap_or(rollout.analysis.warm_up)
}

fn seconds(duration: crate::api::Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// The grid tick that is the base of a KPI's evidence: never before the end of what was learned of it.
fn begins(rollout: &Rollout, stage: &StageStatus, kpi: &Kpi, preflight: Option<&Preflight>) -> Option<Tick> {
    let from = evidence_from(rollout, stage, Some(kpi))?;
    Some(from.max(preflight.map_or(i64::MIN, |preflight| preflight.until)))
}

fn span(duration: crate::api::Duration) -> SignedDuration {
    SignedDuration::try_from(duration.std()).unwrap_or(SignedDuration::MAX)
}

/// The specification's stage that a running stage answers to; none while the user has removed it.
fn planned<'a>(rollout: &'a Rollout, stage: &StageStatus) -> Option<&'a Stage> {
    rollout.stages.iter().find(|planned| planned.name == stage.name)
}

/// Names of the optimizations in a state.
pub fn names(status: &RolloutStatus, state: OptimizationState) -> BTreeSet<String> {
    status.optimizations.iter().filter(|o| o.state == state).map(|o| o.name.clone()).collect()
}

/// Takes one step. `judged` is the judges' answer to [`inquiry`], or empty where nothing was asked.
pub fn step(rollout: &Rollout, snapshot: &Snapshot, judged: Vec<KpiStatus>, now: Timestamp) -> Plan {
    let mut machine =
        Machine { rollout, snapshot, now, status: snapshot.status.clone(), answered: vec![], stall: None };
    if !judged.is_empty() {
        machine.take(judged);
    }
    machine.status.observed_generation = rollout.generation;
    if snapshot.deleting_since.is_some() {
        return machine.delete();
    }
    machine.sync();
    machine.verbs();
    machine.advance();
    machine.plan()
}

/// The plan for a specification that cannot be followed: nothing is deployed, changed or removed, and the status says why. What a
/// running stage has brought up stays as it is. Only the end of the object is provided for: stable gets the user's replicas back
/// before the arms go with it.
pub fn refuse(object: &OptimizationRollout, snapshot: &Snapshot, refusal: &Refusal, now: Timestamp) -> Plan {
    let mut status = snapshot.status.clone();
    status.observed_generation = object.metadata.generation.unwrap_or_default();
    let refusal = &match &status.stage {
        None => refusal.clone(),
        Some(stage) => Refusal {
            message: format!(
                "{}; until that is mended stage {} stays as it is, its pods too, and nothing is judged, promoted or rolled back",
                refusal.message, stage.name
            ),
            ..*refusal
        },
    };
    let known = report::stalled(&status)
        .is_some_and(|(reason, message)| reason == refusal.reason && message == refusal.message);
    if !known {
        decide(&mut status, now, What::Stalled, format!("{}: {}", refusal.reason, refusal.message));
    }
    let before = std::mem::take(&mut status.answered);
    for verb in &snapshot.verbs {
        let word = verb.to_string();
        if !before.contains(&word) {
            let why = format!("{word} is refused: the specification cannot be followed: {}", refusal.message);
            decide(&mut status, now, What::VerbRefused, why);
        }
        status.answered.push(word);
    }
    status.phase = Phase::Stalled;
    let stable = snapshot.variants.get(&Variant::Stable);
    let (replicas, policy) = (object.spec.workload.runtime.replicas, object.spec.deletion_policy);
    let wanting = |since| {
        policy == DeletionPolicy::Orphan
            && now.duration_since(since) <= PROGRESS_DEADLINE
            && stable.is_some_and(|seen| seen.replicas != replicas || seen.serving() < replicas)
    };
    let put_back = snapshot.deleting_since.is_some_and(wanting);
    let wake = match refusal.reason {
        _ if put_back => now + POLL,
        // Nobody tells when what is in the way has gone.
        CONFLICT => now + CONFLICT_POLL,
        _ => now + IDLE,
    };
    status.next_decision_at = Some(Time(wake));
    report::refused(&mut status, refusal, now);
    Plan {
        status,
        targets: vec![],
        scale: stable.filter(|seen| put_back && seen.replicas != replicas).map(|_| replicas),
        remove: vec![],
        answered: snapshot.verbs.clone(),
        release: snapshot.deleting_since.is_some() && !put_back,
        wake,
    }
}

/// What follows what the API server says, in the message of a rollout whose writes it refuses.
const MEND: &str = "; mend what it names, and the rollout goes on by itself";

/// What a status tells of a write that the API server has refused.
pub fn refused_before(status: &RolloutStatus) -> Option<String> {
    let (_, message) = report::stalled(status).filter(|(reason, _)| *reason == "ApplyRefused")?;
    Some(message.strip_suffix(MEND).unwrap_or(message).to_owned())
}

/// Refusal because objects that bear names of ours belong to somebody else.
pub fn conflict(foreign: &[String]) -> Refusal {
    Refusal {
        reason: CONFLICT,
        message: format!(
            "already there and not this rollout's: {}; remove or rename what is there, or give the rollout another name",
            foreign.join(", ")
        ),
    }
}

fn decide(status: &mut RolloutStatus, now: Timestamp, what: What, why: String) {
    let id = status.decisions.last().map_or(0, |decision| decision.id) + 1;
    status.decisions.push(Decision { id, time: Time(now), what, why, basis: None });
    let surplus = status.decisions.len().saturating_sub(DECISIONS);
    status.decisions.drain(..surplus);
}

struct Machine<'a> {
    rollout: &'a Rollout,
    snapshot: &'a Snapshot,
    now: Timestamp,
    status: RolloutStatus,
    answered: Vec<Verb>,
    stall: Option<Refusal>,
}

impl Machine<'_> {
    fn decide(&mut self, what: What, why: impl Into<String>) {
        decide(&mut self.status, self.now, what, why.into());
    }

    /// A decision on evidence, with the numbers that it rests on.
    fn decide_on(&mut self, basis: Option<Basis>, what: What, why: impl Into<String>) {
        self.decide(what, why);
        if let Some(decision) = self.status.decisions.last_mut() {
            decision.basis = basis;
        }
    }

    /// The numbers as they stand; nothing where no KPI is judged.
    fn basis(&self) -> Option<Basis> {
        let stage = self.status.stage.as_ref()?;
        let (track, _) = compared(self.rollout, stage)?;
        let tick = |kpi: &KpiStatus| kpi.evidence.as_ref().map(|evidence| evidence.last_tick);
        let numbers = |known: &KpiStatus| {
            let begun = known.evidence.as_ref().and_then(|_| self.kpi(&known.name));
            let from =
                begun.and_then(|kpi| begins(self.rollout, stage, kpi, learned(&self.status, kpi, track)));
            Numbers { from, ..Numbers::from(known) }
        };
        Some(Basis {
            stage: stage.name.clone(),
            attempt: stage.attempt,
            stages: stage.stages,
            step: stage.step,
            from: evidence_from(self.rollout, stage, None)?,
            until: self.status.kpis.iter().filter_map(tick).max()?,
            on: self.active().into_iter().collect(),
            preflight: self.status.preflight.iter().filter(|known| known.track == track).cloned().collect(),
            kpis: self.status.kpis.iter().map(numbers).collect(),
        })
    }

    /// Takes what the judges say, and since when they give this reason. A query that must be mended is said at once, once.
    fn take(&mut self, judged: Vec<KpiStatus>) {
        let before = std::mem::replace(&mut self.status.kpis, judged);
        // In whole seconds, as it is stored: what is kept in memory beside it must not differ.
        let now = Timestamp::from_second(self.now.as_second()).unwrap_or(self.now);
        let (mut unreadable, mut edited) = (vec![], vec![]);
        for kpi in &mut self.status.kpis {
            let defined = self.rollout.all_kpis().find(|defined| defined.name == kpi.name);
            // What is carried over was read by the queries that it names.
            if kpi.reads.is_empty() {
                kpi.reads = defined.map(reads).unwrap_or_default();
            }
            let spends = defined.is_some_and(|kpi| kpi.is_tested() && !kpi.observe_only);
            let other = |known: &&KpiStatus| {
                known.name == kpi.name && !is_same(&known.reads, &kpi.reads) && known.evidence.is_some()
            };
            if spends && before.iter().any(|known| other(&known)) {
                edited.push(kpi.name.clone());
            }
            let known = before.iter().find(|known| known.name == kpi.name && known.reason == kpi.reason);
            kpi.since = known.and_then(|known| known.since.clone()).or(Some(Time(now)));
            if known.is_none() && kpi.reason == Cause::Malformed {
                unreadable
                    .push(format!("{} cannot be read, and the rollout holds: {}", kpi.name, kpi.message));
            }
        }
        if let Some(stage) = self.status.stage.as_mut().filter(|_| !edited.is_empty()) {
            stage.attempt += 1;
            let why = format!(
                "stage {} starts the evidence of {} afresh (attempt {}): its queries have been edited",
                stage.name,
                edited.join(", "),
                stage.attempt
            );
            self.decide(What::StageRestarted, why);
        }
        for why in unreadable {
            let said = |decision: &Decision| decision.what == What::KpiUnreadable && decision.why == why;
            if !self.status.decisions.iter().any(said) {
                self.decide(What::KpiUnreadable, why);
            }
        }
    }

    fn active(&self) -> BTreeSet<String> {
        names(&self.status, OptimizationState::Active)
    }

    /// The KPI of the specification, whichever optimizations are on.
    fn kpi(&self, name: &str) -> Option<&Kpi> {
        self.rollout.all_kpis().find(|kpi| kpi.name == name)
    }

    fn stage_name(&self) -> String {
        self.status.stage.as_ref().map(|stage| stage.name.clone()).unwrap_or_default()
    }

    fn set(&mut self, name: &str, state: OptimizationState, reason: &str) {
        let stage = self.stage_name();
        if let Some(entry) = self.status.optimizations.iter_mut().find(|o| o.name == name) {
            entry.state = state;
            entry.since = Time(self.now);
            entry.reason = reason.to_owned();
            if !stage.is_empty() {
                entry.stage = stage;
            }
        }
    }

    /// Brings the list of optimizations in line with the specification.
    fn sync(&mut self) {
        let (promoted, rolled_back) = self
            .snapshot
            .variants
            .get(&Variant::Stable)
            .map(|stable| stable.verdicts.clone())
            .unwrap_or_default();
        let known = std::mem::take(&mut self.status.optimizations);
        for optimization in &self.rollout.optimizations {
            let (name, config_hash) = (optimization.name.clone(), optimization.config_hash.clone());
            let new = |state, reason: &str| OptimizationStatus {
                name: name.clone(),
                state,
                stage: String::new(),
                since: Time(self.now),
                reason: reason.to_owned(),
                benefit: String::new(),
                config_hash: config_hash.clone(),
            };
            let entry = match known.iter().find(|entry| entry.name == name) {
                Some(entry) if entry.config_hash == config_hash => entry.clone(),
                Some(_) => new(OptimizationState::Pending, "its configuration has changed"),
                // An object restored from a backup, or applied again, loses no verdict.
                None if known.is_empty() && verdict_on(&promoted, &name, &config_hash) => {
                    new(OptimizationState::Promoted, "promoted before this object was created")
                }
                None if known.is_empty() && verdict_on(&rolled_back, &name, &config_hash) => {
                    new(OptimizationState::RolledBack, "rolled back before this object was created")
                }
                None => new(OptimizationState::Pending, ""),
            };
            self.status.optimizations.push(entry);
        }
        // Taking an optimization out of the list and putting it back is no word that it may try again.
        let listed = |entry: &OptimizationStatus| self.rollout.optimization(&entry.name).is_some();
        let removed = known.into_iter().filter(|o| o.state == OptimizationState::RolledBack && !listed(o));
        self.status.optimizations.extend(removed.take(REMEMBERED));
    }

    fn verbs(&mut self) {
        let mut verbs = self.snapshot.verbs.clone();
        verbs.sort();
        // An annotation may outlive its answer, when the operator ends before it could remove it.
        let before = std::mem::take(&mut self.status.answered);
        for verb in verbs {
            let word = verb.to_string();
            if !before.contains(&word) {
                match &verb {
                    Verb::Abort(stage) => self.abort(stage),
                    Verb::Rollback(name) => self.rollback_by_user(name),
                    Verb::Retry(name) => self.retry_by_user(name),
                    Verb::Promote(value) => self.promote_by_user(value),
                }
            }
            self.status.answered.push(word);
            self.answered.push(verb);
        }
    }

    fn abort(&mut self, stage: &str) {
        let running = self.stage_name();
        if running.is_empty() || running != stage {
            self.decide(What::VerbRefused, format!("abort={stage} is stale: {}", running_now(&running)));
        } else if self.active().is_empty() {
            let why = format!("abort={stage} changes nothing: every optimization of the pass is off");
            self.decide(What::VerbRefused, why);
        } else {
            self.decide(What::Aborted, format!("the user ended the pass in stage {stage}"));
            self.roll_back(&self.active(), "aborted by the user");
        }
    }

    fn rollback_by_user(&mut self, name: &str) {
        match self.status.optimizations.iter().find(|o| o.name == name).map(|o| o.state) {
            Some(OptimizationState::Active | OptimizationState::Promoted | OptimizationState::Pending) => {
                self.roll_back(&BTreeSet::from([name.to_owned()]), "the user asked for it");
            }
            Some(OptimizationState::RolledBack) => {
                self.decide(What::VerbRefused, format!("rollback={name} changes nothing: it is off"));
            }
            None => {
                let why = format!("rollback={name} is refused: {}", self.no_optimization());
                self.decide(What::VerbRefused, why);
            }
        }
    }

    fn retry_by_user(&mut self, name: &str) {
        let state = self.status.optimizations.iter().find(|o| o.name == name).map(|o| o.state);
        let listed = self.rollout.optimization(name).is_some();
        let why = match state {
            Some(OptimizationState::RolledBack) if listed => {
                self.set(name, OptimizationState::Pending, "the user lets it try again");
                let next = "it has a pass of its own, from the first stage";
                return self.decide(What::RetriedByUser, format!("{name} may try again: {next}"));
            }
            Some(OptimizationState::RolledBack) => "it is no longer in spec.optimizations".to_owned(),
            Some(_) => "it was not rolled back".to_owned(),
            None => self.no_optimization(),
        };
        self.decide(What::VerbRefused, format!("retry={name} is refused: {why}"));
    }

    fn no_optimization(&self) -> String {
        let all: Vec<_> = self.status.optimizations.iter().map(|o| o.name.as_str()).collect();
        format!("no optimization of this name; there are {}", all.join(", "))
    }

    fn promote_by_user(&mut self, value: &str) {
        let (wanted, name) = match value.strip_prefix("force:") {
            Some(name) => (Promotion::Forced, name),
            None => (Promotion::Approved, value),
        };
        let failing = self.failing();
        let refusal = match &mut self.status.stage {
            Some(stage)
                if stage.name == name
                    && matches!(stage.step, Step::Observing | Step::AwaitingApproval | Step::WarmingUp) =>
            {
                // Who skips the bake has approved as well.
                if stage.promoted == Some(wanted) || stage.promoted == Some(Promotion::Forced) {
                    let why = format!("promote={value} changes nothing: it was granted before");
                    return self.decide(What::VerbRefused, why);
                }
                if wanted == Promotion::Forced && !failing.is_empty() {
                    format!("{} fails; a failing KPI is never skipped", failing[0].name)
                } else {
                    stage.promoted = Some(wanted);
                    let what = if wanted == Promotion::Forced {
                        "skipped the rest of the bake of"
                    } else {
                        "approved"
                    };
                    self.decide(What::PromotedByUser, format!("the user {what} stage {name}"));
                    return;
                }
            }
            Some(stage) if stage.name == name => {
                "the stage's pods are not exposed yet, or it is already past its end".to_owned()
            }
            _ => running_now(&self.stage_name()),
        };
        self.decide(What::VerbRefused, format!("promote={value} is refused: {refusal}"));
    }

    /// KPIs that fail now and may act.
    fn failing(&self) -> Vec<KpiStatus> {
        let acts = |name: &str| self.kpi(name).is_none_or(|kpi| !kpi.observe_only);
        let failing = self.status.kpis.iter().filter(|kpi| kpi.verdict == Verdict::Fail && acts(&kpi.name));
        failing.cloned().collect()
    }

    /// The optimizations that are on and alone can move one of these KPIs.
    fn owners(&self, kpis: &[KpiStatus]) -> BTreeSet<String> {
        let active = self.active();
        kpis.iter().filter_map(|kpi| kpi.owner.clone()).filter(|owner| active.contains(owner)).collect()
    }

    fn advance(&mut self) {
        if self.status.stage.is_none() {
            self.begin_pass();
        }
        // A stage that another version of the operator has entered.
        if let Some(stage) = self.status.stage.as_mut().filter(|stage| stage.stages == 0) {
            stage.stages = i32::try_from(self.rollout.stages.len()).unwrap_or(i32::MAX);
        }
        let Some(stage) = self.status.stage.clone() else {
            if self.status.decisions.is_empty() {
                self.nothing_to_do();
            }
            return;
        };
        if self.active().is_empty() && stage.step != Step::Restoring {
            self.restore();
        }
        self.reseat();
        match self.status.stage.as_ref().map(|stage| stage.step) {
            None => {}
            Some(Step::Promoting) => self.promoting(),
            Some(Step::Restoring) => self.restoring(),
            Some(_) => self.stage(),
        }
        // What the user has added meanwhile has its pass at once.
        if self.status.stage.is_none() {
            self.begin_pass();
        }
    }

    /// When the user has removed the stage that runs, the last one that exposes no more takes its place, so that an edit of the
    /// list never raises exposure. Where every stage that is left exposes more, the first of them begins, as in a new pass.
    fn reseat(&mut self) {
        let exposed = self.status.weight.desired;
        let Some(stage) = &mut self.status.stage else { return };
        if matches!(stage.step, Step::Promoting | Step::Restoring) || planned(self.rollout, stage).is_some() {
            return;
        }
        let removed = stage.name.clone();
        let exposes_no_more = |planned: &&Stage| match planned.place {
            Place::Staging(_) => true,
            Place::Weight(weight) => weight <= exposed,
        };
        if let Some(planned) = self.rollout.stages.iter().rfind(exposes_no_more) {
            let attempt = next_attempt(stage, &planned.name);
            stage.spent.insert(std::mem::replace(&mut stage.name, planned.name.clone()), stage.attempt);
            stage.attempt = attempt;
            // What was seen of the removed stage is no proof of this one: its evidence starts afresh.
            "removed".clone_into(&mut stage.subject);
            return;
        }
        let failing = self.failing();
        if let Some(kpi) = failing.first() {
            let owners = self.owners(&failing);
            return self.harm(&kpi.name, &owners, &format!("{}: {}", kpi.name, kpi.message), true);
        }
        self.enter(0);
        let first = self.stage_name();
        let why = format!("stage {removed} was removed; stage {first} begins with {}", list(&self.active()));
        self.decide(What::StageStarted, why);
    }

    /// The one decision of an object whose optimizations all have a verdict from before it was created.
    fn nothing_to_do(&mut self) {
        let promoted = names(&self.status, OptimizationState::Promoted);
        let rolled_back = names(&self.status, OptimizationState::RolledBack);
        let what = if promoted.is_empty() { What::RolledBack } else { What::Completed };
        let told = |what: &str, names: &BTreeSet<String>| {
            if names.is_empty() { String::new() } else { format!("; {what}: {}", list(names)) }
        };
        let why = format!(
            "no optimization waits for a pass{}{}",
            told("on from before", &promoted),
            told("rolled back before", &rolled_back)
        );
        self.decide(what, why);
    }

    fn begin_pass(&mut self) {
        let pending = names(&self.status, OptimizationState::Pending);
        if pending.is_empty() {
            return;
        }
        self.status.preflight.clear();
        self.status.benefits.clear();
        self.enter(0);
        for name in &pending {
            self.set(name, OptimizationState::Active, "");
        }
        let first = self.stage_name();
        self.decide(What::StageStarted, format!("stage {first} begins with {}", list(&pending)));
    }

    fn enter(&mut self, index: usize) {
        let Some(planned) = self.rollout.stages.get(index) else { return };
        // What could not be learned is tried again; what was learned stays frozen, and so does what was said of it.
        self.status.preflight.retain(|known| known.pods > 0);
        self.status.preflight.iter_mut().for_each(|known| known.cautious_until = None);
        let before = self.status.stage.as_ref();
        let replaced = before.map_or(0, |stage| stage.replaced);
        let foretold = before.is_some_and(|stage| {
            let left = self::planned(self.rollout, stage);
            stage.foretold && left.is_some_and(|left| left.place.track() == planned.place.track())
        });
        let mut spent = before.map(|stage| stage.spent.clone()).unwrap_or_default();
        spent.extend(before.map(|stage| (stage.name.clone(), stage.attempt)));
        let began_with = i32::try_from(self.rollout.stages.len()).unwrap_or(i32::MAX);
        self.status.stage = Some(StageStatus {
            foretold,
            name: planned.name.clone(),
            index: i32::try_from(index).unwrap_or(i32::MAX),
            step: Step::Deploying,
            attempt: before.map_or(1, |stage| next_attempt(stage, &planned.name)),
            stages: before.map_or(began_with, |stage| stage.stages),
            spent,
            replaced,
            entered_at: Time(self.now),
            attempt_at: Time(self.now),
            subject: String::new(),
            exposed_at: None,
            observed: crate::api::Duration::default(),
            blame: None,
            promoted: None,
            before: None,
        });
        self.status.kpis.clear();
        for name in self.active() {
            let stage = planned.name.clone();
            if let Some(entry) = self.status.optimizations.iter_mut().find(|o| o.name == name) {
                entry.stage = stage;
            }
        }
    }

    /// A stage before the last step: deploy, warm up, observe.
    fn stage(&mut self) {
        let rollout = self.rollout;
        let Some(stage) = &mut self.status.stage else { return };
        let Some(index) = rollout.stages.iter().position(|planned| planned.name == stage.name) else {
            return;
        };
        let planned = &rollout.stages[index];
        stage.index = i32::try_from(index).unwrap_or(i32::MAX);
        self.settle_subject();
        self.bake_clock();
        if let Some(why) = self.signal() {
            return self.harm("kubernetes", &BTreeSet::new(), &why, true);
        }
        let deploying = self.status.stage.as_ref().is_some_and(|stage| stage.step == Step::Deploying);
        let missing = if deploying { self.unexposed() } else { String::new() };
        let Some(stage) = &mut self.status.stage else { return };
        match stage.step {
            Step::Deploying if missing.is_empty() => {
                stage.exposed_at = Some(Time(self.now));
                stage.step = Step::WarmingUp;
            }
            Step::Deploying => {
                let since = stage.attempt_at.0;
                self.late("its pods are brought up", since);
            }
            Step::WarmingUp => {
                let from = evidence_from(rollout, stage, None);
                if from.is_some_and(|from| self.now.as_second() >= from) {
                    stage.step = Step::Observing;
                }
            }
            Step::Observing | Step::AwaitingApproval => self.observe(planned, index),
            Step::Promoting | Step::Restoring => {}
        }
    }

    /// Starts the evidence afresh when what is compared has changed, by us or by the user.
    fn settle_subject(&mut self) {
        let wanted = self.wanted();
        let arm = |variants: [Variant; 2]| wanted.iter().find(|wanted| variants.contains(&wanted.variant));
        let canary = arm([Variant::Canary, Variant::StagingCanary]);
        let baseline = arm([Variant::Baseline, Variant::StagingBaseline])
            .or_else(|| wanted.iter().find(|w| w.variant == Variant::Stable));
        let (Some(canary), Some(baseline)) = (canary, baseline) else { return };
        let subject = subject(self.rollout, canary, baseline);
        let Some(stage) = &mut self.status.stage else { return };
        if stage.subject == subject {
            return;
        }
        let first = stage.subject.is_empty();
        stage.subject = subject;
        if first {
            return;
        }
        stage.attempt += 1;
        stage.replaced += 1;
        stage.step = Step::Deploying;
        stage.attempt_at = Time(self.now);
        stage.exposed_at = None;
        stage.observed = crate::api::Duration::default();
        stage.blame = None;
        stage.promoted = None;
        let why = format!(
            "stage {} starts its evidence afresh (attempt {}): what is compared has changed, and the arms' pods are replaced",
            stage.name, stage.attempt
        );
        self.status.kpis.clear();
        self.decide(What::StageRestarted, why);
    }

    fn bake_clock(&mut self) {
        let active = self.active();
        let counted = self.rollout.kpis(&active).filter_map(|kpi| {
            let known = self.status.kpis.iter().find(|known| known.name == kpi.name)?;
            Some((kpi, known.evidence.as_ref()?))
        });
        let seconds = u64::try_from(judge::observed(counted, interval(self.rollout))).unwrap_or_default();
        if let Some(stage) = &mut self.status.stage {
            stage.observed = crate::api::Duration::from_secs(seconds);
        }
    }

    fn observe(&mut self, planned: &Stage, index: usize) {
        self.foretell();
        let failing = self.failing();
        if !failing.is_empty() {
            let owners = self.owners(&failing);
            let why: Vec<_> = failing.iter().map(|kpi| format!("{}: {}", kpi.name, kpi.message)).collect();
            let catastrophe = failing.iter().any(|kpi| self.is_catastrophe(kpi));
            return self.harm(&failing[0].name, &owners, &why.join("; "), catastrophe);
        }
        // Under Observe an alarm stops promotion for good, also one of Kubernetes that is over.
        let observe_only = self.rollout.analysis.mode == Mode::Observe;
        if let Some(stage) = &mut self.status.stage
            && stage.blame.is_some()
        {
            if observe_only {
                return;
            }
            stage.blame = None;
        }
        if let Some((owners, why)) = self.overdue()
            && !observe_only
        {
            return self.roll_back(&owners, &why);
        }
        let forced =
            self.status.stage.as_ref().is_some_and(|stage| stage.promoted == Some(Promotion::Forced));
        if self.unproven(planned) && (!forced || self.blind()) && !self.inconclusive(planned) {
            return;
        }
        if let Some((owner, why)) = self.broken_promise()
            && !observe_only
        {
            return self.roll_back(&BTreeSet::from([owner]), &why);
        }
        let Some(stage) = &mut self.status.stage else { return };
        if planned.approval == Approval::Required && stage.promoted.is_none() {
            if stage.step != Step::AwaitingApproval {
                stage.step = Step::AwaitingApproval;
                let why = format!(
                    "stage {0} has passed and waits for you: kubectl annotate oro {1} -n {2} synthex.io/promote={0}",
                    planned.name, self.rollout.name, self.rollout.namespace
                );
                self.decide(What::ApprovalRequired, why);
            }
            return;
        }
        if self.rollout.paused {
            return;
        }
        self.pass(planned, index);
    }

    fn pass(&mut self, planned: &Stage, index: usize) {
        let proof: Vec<_> =
            self.status.kpis.iter().map(|kpi| format!("{}: {}", kpi.name, kpi.message)).collect();
        let observed = self.status.stage.as_ref().map(|stage| stage.observed).unwrap_or_default();
        let why =
            format!("stage {} passed after {observed} of observation; {}", planned.name, proof.join("; "));
        self.decide_on(self.basis(), What::StagePassed, why);
        self.credit(planned);
        if index + 1 < self.rollout.stages.len() {
            self.enter(index + 1);
            let next = self.stage_name();
            self.decide(What::StageStarted, format!("stage {next} begins with {}", list(&self.active())));
            return;
        }
        self.finish(Step::Promoting);
        self.decide(What::Promoting, format!("the stable Deployment takes {}", list(&self.active())));
    }

    /// Turns to one of the two last steps.
    fn finish(&mut self, step: Step) {
        let stable = self.snapshot.variants.get(&Variant::Stable);
        if let Some(stage) = &mut self.status.stage {
            stage.step = step;
            stage.attempt_at = Time(self.now);
            stage.exposed_at = None;
            stage.blame = None;
            stage.subject.clear();
            stage.before = Some(stable.map(suffered).unwrap_or_default());
        }
        self.status.kpis.clear();
    }

    fn restore(&mut self) {
        self.finish(Step::Restoring);
    }

    /// The last step of a pass that succeeds: stable is full and exposed, the arms go, one more warm-up is watched.
    fn promoting(&mut self) {
        if let Some(why) = self.signal() {
            return self.harm("kubernetes", &BTreeSet::new(), &why, true);
        }
        let failing = self.failing();
        if let Some(kpi) = failing.first() {
            let owners = self.owners(&failing);
            return self.harm(&kpi.name, &owners, &format!("{}: {}", kpi.name, kpi.message), true);
        }
        self.settle_stable();
        let (ready, gone) = (self.stable_exposed(), self.arms_gone());
        let watch = self.watch();
        let Some(stage) = &mut self.status.stage else { return };
        if ready && stage.exposed_at.is_none() {
            stage.exposed_at = Some(Time(self.now));
        }
        let exposed = stage.exposed_at.as_ref().map(|since| since.0);
        let watched = exposed.is_some_and(|since| self.now.duration_since(since) >= watch);
        if !ready || watched && !gone {
            let since = exposed.map_or(stage.attempt_at.0, |since| since + watch);
            self.late("stable takes the optimizations", since);
        }
        if !(ready && watched && gone) {
            return;
        }
        let active = self.active();
        for name in &active {
            self.set(name, OptimizationState::Promoted, "passed every stage");
        }
        let rolled_back = names(&self.status, OptimizationState::RolledBack);
        let without = if rolled_back.is_empty() {
            String::new()
        } else {
            format!("; rolled back: {}", list(&rolled_back))
        };
        let brought = report::brought(&self.status);
        self.decide(What::Completed, format!("{} on all pods{without}{brought}", list(&active)));
        self.status.stage = None;
        self.status.kpis.clear();
    }

    /// The last step of a pass that fails: stable is full, the arms go.
    fn restoring(&mut self) {
        if !(self.stable_exposed() && self.arms_gone()) {
            if let Some(since) = self.status.stage.as_ref().map(|stage| stage.attempt_at.0) {
                self.late("stable returns to full capacity", since);
            }
            return;
        }
        let why = match self
            .status
            .optimizations
            .iter()
            .filter(|o| o.state == OptimizationState::RolledBack)
            .count()
        {
            0 => "no optimization is left to roll out".to_owned(),
            _ => format!("rolled back: {}", list(&names(&self.status, OptimizationState::RolledBack))),
        };
        self.decide(What::RolledBack, format!("the pass ended with none of its optimizations on; {why}"));
        self.status.stage = None;
        self.status.kpis.clear();
    }

    /// Watches stable afresh where what it runs has been changed meanwhile, by a verb or an edit.
    fn settle_stable(&mut self) {
        let wanted = self.wanted();
        let stable = wanted.iter().find(|wanted| wanted.variant == Variant::Stable);
        let Some(subject) = stable.map(|stable| subject(self.rollout, stable, stable)) else { return };
        let known = self.status.stage.as_ref().map(|stage| stage.subject.clone()).unwrap_or_default();
        if known != subject && !known.is_empty() {
            self.finish(Step::Promoting);
        }
        if let Some(stage) = &mut self.status.stage {
            stage.subject = subject;
        }
    }

    /// How long stable is watched with what it has taken: one warm-up, and then as long as an absolute bound needs to be found crossed.
    fn watch(&self) -> SignedDuration {
        let interval = interval(self.rollout);
        let active = self.active();
        let acting = self.rollout.kpis(&active).filter(|kpi| !kpi.observe_only);
        let each = acting.filter_map(|kpi| match kpi.test {
            Test::Threshold { consecutive, .. } => {
                let ticks = SignedDuration::from_secs(interval.saturating_mul(i64::from(consecutive) + 2));
                Some(span(warm_up(self.rollout, kpi)) + ticks)
            }
            _ => None,
        });
        each.max().unwrap_or_default().max(span(self.rollout.analysis.warm_up))
    }

    /// Says what pods are wanting, where that has lasted for too long.
    fn late(&mut self, doing: &str, since: Timestamp) {
        let Some(stage) = &self.status.stage else { return };
        if self.now.duration_since(since) <= PROGRESS_DEADLINE {
            return;
        }
        let mut missing = self.unexposed();
        if missing.is_empty() {
            missing = match self.stable_exposed() {
                true => "pods of the other arms are still ending",
                false => "stable's pods do not all have their configuration in force",
            }
            .to_owned();
        }
        self.stall = Some(Refusal {
            reason: "ProgressDeadlineExceeded",
            message: format!(
                "stage {}, {doing}: the pods were not all Ready with their configuration within {} minutes: {missing}; the rollout \
                 goes on by itself once they are",
                stage.name,
                PROGRESS_DEADLINE.as_mins(),
            ),
        });
    }

    fn stable_exposed(&self) -> bool {
        let wanted = self.wanted();
        let Some(stable) = wanted.iter().find(|w| w.variant == Variant::Stable) else { return false };
        let target = outline(self.rollout, stable);
        self.snapshot.variants.get(&Variant::Stable).is_some_and(|seen| seen.exposed(&target))
    }

    fn arms_gone(&self) -> bool {
        self.snapshot
            .variants
            .iter()
            .all(|(variant, seen)| *variant == Variant::Stable || seen.replicas == 0 && seen.pods.is_empty())
    }

    /// An alarm: rolls back the owners; without any, waits one window for an owned alarm, then rolls back all.
    fn harm(&mut self, kpi: &str, owners: &BTreeSet<String>, why: &str, at_once: bool) {
        let active = self.active();
        let Some(stage) = &mut self.status.stage else { return };
        let window_over =
            stage.blame.as_ref().is_some_and(|blame| self.now.duration_since(blame.since.0) >= BLAME_WINDOW);
        let observe_only = self.rollout.analysis.mode == Mode::Observe;
        if !observe_only && !owners.is_empty() {
            self.roll_back(owners, why);
        } else if !observe_only && (at_once || window_over || active.len() == 1) {
            let all = if active.len() > 1 {
                "; no KPI names one optimization, so all are switched off"
            } else {
                ""
            };
            self.roll_back(&active, &format!("{why}{all}"));
        } else if stage.blame.is_none() {
            stage.blame = Some(Blame { kpi: kpi.to_owned(), since: Time(self.now) });
            let next = match observe_only {
                true => "analysis.mode is Observe: promotion stops, nothing is rolled back".to_owned(),
                false => {
                    let window = BLAME_WINDOW.as_secs();
                    format!(
                        "promotion is frozen, and an alarm that names one optimization is awaited for {window} s"
                    )
                }
            };
            self.decide_on(self.basis(), What::AlarmRaised, format!("{why}; {next}"));
        }
    }

    fn roll_back(&mut self, names: &BTreeSet<String>, why: &str) {
        let basis = self.basis();
        for name in names {
            self.set(name, OptimizationState::RolledBack, why);
        }
        let stage = self.stage_name();
        let place = if stage.is_empty() { String::new() } else { format!(" in stage {stage}") };
        let why = format!("{} switched off{place}: {why}", list(names));
        self.decide_on(basis, What::OptimizationRolledBack, why);
        if self.status.stage.is_some() {
            if self.active().is_empty() { self.restore() } else { self.settle_subject() }
        }
    }

    /// Whether the stage still lacks bake time or a required KPI its proof, or an optional one was to be seen and is waited for.
    fn unproven(&self, planned: &Stage) -> bool {
        let baked = self.status.stage.as_ref().is_some_and(|stage| stage.observed >= planned.duration);
        let proven = |kpi: &Kpi| {
            let known = self.status.kpis.iter().find(|known| known.name == kpi.name);
            if !kpi.required {
                let unseen =
                    |known: &&KpiStatus| matches!(known.verdict, Verdict::TelemetryDown | Verdict::NoData);
                return kpi.observe_only
                    || known.filter(unseen).is_none_or(|known| self.held(known) > self.brief_patience());
            }
            known.is_some_and(|known| {
                let shares = known.evidence.as_ref().and_then(|evidence| evidence.shares.first());
                let enough = shares.is_none_or(|share| share.canary.total >= planned.min_requests as f64);
                (known.verdict == Verdict::Pass || known.reason == Cause::NeedsPods) && enough
            })
        };
        !(baked && self.rollout.kpis(&self.active()).all(proven))
    }

    /// Whether a required KPI cannot be seen at all. Not even the user's word promotes then.
    fn blind(&self) -> bool {
        let required = |name: &str| self.kpi(name).is_none_or(|kpi| kpi.required);
        self.status.kpis.is_empty()
            || self.status.kpis.iter().any(|kpi| {
                matches!(kpi.verdict, Verdict::TelemetryDown | Verdict::NoData) && required(&kpi.name)
            })
    }

    /// How long a KPI has had its reason.
    fn held(&self, kpi: &KpiStatus) -> SignedDuration {
        kpi.since.as_ref().map_or(SignedDuration::ZERO, |since| self.now.duration_since(since.0))
    }

    /// How long is waited for what may only be late: a KPI that nothing depends on, the canary's first samples.
    fn brief_patience(&self) -> SignedDuration {
        span(self.rollout.analysis.no_data_deadline) / 3
    }

    /// How long a reason is borne before it has a consequence: `noDataDeadline`, a third of it where only the canary lacks samples
    /// or requests, twice as long where nobody asks for anything.
    fn patience(&self, reason: Cause) -> SignedDuration {
        let deadline = span(self.rollout.analysis.no_data_deadline);
        match reason {
            Cause::CanaryMissing | Cause::CanaryIdle => self.brief_patience(),
            Cause::Idle => deadline * 2,
            _ => deadline,
        }
    }

    /// What has been unreadable for too long. Samples that only the canary's Ready pods lack are the doing of what is on in them:
    /// the optimizations to be rolled back, and why. All else stops the rollout and says so, and is never held against them.
    fn overdue(&mut self) -> Option<(BTreeSet<String>, String)> {
        let active = self.active();
        let (mut guilty, mut why, mut stalled) = (BTreeSet::new(), vec![], vec![]);
        for known in &self.status.kpis {
            let required = self.kpi(&known.name).is_some_and(|kpi| kpi.required);
            if !required || self.held(known) < self.patience(known.reason) {
                continue;
            }
            match known.reason {
                Cause::Judged | Cause::NeedsEvidence | Cause::NeedsPods | Cause::NoBaseline => {}
                Cause::CanaryMissing if self.canary_is_ready() => {
                    match known.owner.as_ref().filter(|owner| active.contains(*owner)) {
                        Some(owner) => guilty.extend([owner.clone()]),
                        None => guilty.extend(active.clone()),
                    }
                    let minutes = self.held(known).as_secs() / 60;
                    why.push(format!(
                        "{}: for {minutes} minutes there are no samples of the canary's Ready pods, and of the baseline's there are: {}",
                        known.name, known.message
                    ));
                }
                _ => stalled.push(format!("{}: {}", known.name, known.message)),
            }
        }
        if !guilty.is_empty() {
            return Some((guilty, why.join("; ")));
        }
        if !stalled.is_empty() {
            let idle = self.status.kpis.iter().any(|kpi| {
                matches!(kpi.reason, Cause::CanaryIdle | Cause::BaselineIdle | Cause::Idle)
                    && self.held(kpi) >= self.patience(kpi.reason)
            });
            self.stall = Some(Refusal {
                reason: if idle { "NoTraffic" } else { "TelemetryUnavailable" },
                message: format!("{}; the rollout goes on by itself once that is mended", stalled.join("; ")),
            });
        }
        None
    }

    fn canary_is_ready(&self) -> bool {
        let seen = |variant: Variant| self.snapshot.variants.get(&variant);
        let canary = seen(Variant::Canary).or_else(|| seen(Variant::StagingCanary));
        canary.is_some_and(|seen| seen.serving() > 0 && seen.serving() >= seen.replicas)
    }

    /// What is done with a stage that has been observed for twice its duration and lacks nothing but evidence. Whether it may pass.
    fn inconclusive(&mut self, planned: &Stage) -> bool {
        let observed = self.status.stage.as_ref().map(|stage| stage.observed).unwrap_or_default();
        let wanting: Vec<_> = self
            .status
            .kpis
            .iter()
            .filter(|known| self.kpi(&known.name).is_some_and(|kpi| kpi.required))
            .filter(|known| known.verdict != Verdict::Pass && known.reason != Cause::NeedsPods)
            .collect();
        let only_evidence = wanting.iter().all(|known| known.reason == Cause::NeedsEvidence);
        if observed.std() < planned.duration.std() * 2 || wanting.is_empty() || !only_evidence {
            return false;
        }
        let within = wanting.iter().all(|known| match (known.change, known.tolerated) {
            (Some(change), Some(tolerated)) => match self.kpi(&known.name).map(|kpi| &kpi.test) {
                Some(Test::Gauge { direction: Direction::HigherIsBetter, .. }) => {
                    change.estimate >= tolerated - 1.0
                }
                _ => change.estimate <= tolerated - 1.0,
            },
            _ => true,
        });
        let names: Vec<_> =
            wanting.iter().map(|known| format!("{}: {}", known.name, known.message)).collect();
        let names = names.join("; ");
        match self.rollout.analysis.on_inconclusive {
            OnInconclusive::Advance if within => true,
            OnInconclusive::Rollback if self.rollout.analysis.mode == Mode::Enforce => {
                let why = format!("stage {} lacks evidence after {observed}: {names}", planned.name);
                self.roll_back(&self.active(), &why);
                false
            }
            OnInconclusive::Hold | OnInconclusive::Advance | OnInconclusive::Rollback => {
                self.stall = Some(Refusal {
                    reason: "EvidenceWanting",
                    message: format!(
                        "stage {} has been observed for {observed} and lacks evidence: {names}; it goes on until there is enough. \
                         Raise traffic or minimumEffect, make the KPI optional, or set analysis.onInconclusive",
                        planned.name
                    ),
                });
                false
            }
        }
    }

    /// Ten times the baseline's errors (and of the smallest share that matters, where the baseline has next to none), or 5 % of all
    /// requests and no such share of the baseline's: nobody waits to see whose doing it is. It is an alarm first, so that what looks
    /// like one in a handful of requests is none.
    fn is_catastrophe(&self, known: &KpiStatus) -> bool {
        let Some(&Test::ErrorRatio { minimum_effect, .. }) = self.kpi(&known.name).map(|kpi| &kpi.test)
        else {
            return false;
        };
        match (known.canary, known.baseline) {
            (Some(canary), Some(baseline)) => {
                let least = 10.0 * baseline.max(minimum_effect);
                canary >= least || canary >= 0.05 && baseline < 0.05
            }
            _ => false,
        }
    }

    /// The optimization that did not bring what was promised of it, where the user wants it gone for that; other broken promises
    /// are said when the stage passes.
    fn broken_promise(&self) -> Option<(String, String)> {
        let active = self.active();
        self.status.kpis.iter().find_map(|known| {
            let kpi = self.kpi(&known.name)?;
            let expect = kpi.expect.as_ref().filter(|expect| expect.on_miss == OnMiss::Rollback)?;
            let owner = kpi.owner.clone().filter(|owner| active.contains(owner))?;
            let why = report::missed(expect, known)?;
            Some((owner, format!("{}: {why}", known.name)))
        })
    }

    /// Notes what the stage has measured of each KPI's change, and what was promised and is missed.
    fn credit(&mut self, planned: &Stage) {
        let active = self.active();
        let track = planned.place.track();
        let mut missed = vec![];
        for known in &self.status.kpis {
            let Some(change) = known.change else { continue };
            // A KPI under an optimization is one that it alone can move; a shared one can be moved by each that is on.
            let movers = match &known.owner {
                Some(owner) => vec![owner.clone()],
                None => active.iter().cloned().collect(),
            };
            report::credit(&mut self.status.benefits, &known.name, movers, &planned.name, track, change);
            let expect = self
                .rollout
                .all_kpis()
                .find(|kpi| kpi.name == known.name)
                .and_then(|kpi| kpi.expect.as_ref());
            missed.extend(
                expect
                    .and_then(|expect| report::missed(expect, known))
                    .map(|why| format!("{}: {why}", known.name)),
            );
        }
        if !missed.is_empty() {
            self.decide(What::Warned, format!("stage {}: {}", planned.name, missed.join("; ")));
        }
        report::benefits(&mut self.status);
    }

    /// Says once on each track, before the evidence is looked at, which stages will be able to show little.
    fn foretell(&mut self) {
        let Some(stage) = self.status.stage.as_ref().filter(|stage| !stage.foretold) else { return };
        let Some((track, _)) = compared(self.rollout, stage) else { return };
        let active = self.active();
        let tested = || judged(self.rollout, stage, &active).filter(|kpi| kpi.is_tested() && kpi.required);
        if tested().any(|kpi| learned(&self.status, kpi, track).is_none()) {
            return;
        }
        let mut little = vec![];
        let later = self.rollout.stages.iter().skip_while(|planned| planned.name != stage.name);
        for planned in later {
            let attempt = match planned.name == stage.name {
                true => stage.attempt,
                false => next_attempt(stage, &planned.name),
            };
            let named = StageStatus { name: planned.name.clone(), attempt, ..stage.clone() };
            let Some((of, arms)) = compared(self.rollout, &named) else { continue };
            for kpi in tested().filter(|_| of == track) {
                let preflight = learned(&self.status, kpi, track);
                let trial = trial(self.rollout, &named, kpi, arms.clone(), preflight, planned.duration);
                if let Some(told) = trial.foretold()
                    && (told.falls_short() || told.detectable.is_none_or(|ratio| ratio > 10.0))
                {
                    let catch = told.detectable.map_or_else(
                        || "no change, however large".to_owned(),
                        |ratio| format!("no change below {ratio:.0}-fold"),
                    );
                    little.push(format!(
                        "{} in stage {}: about {:.0} canary requests are to come in {}, which can show {catch}{}",
                        kpi.name,
                        planned.name,
                        told.requests,
                        planned.duration,
                        if told.falls_short() {
                            format!("; {:.0} are needed to pass", told.wanted)
                        } else {
                            String::new()
                        }
                    ));
                }
            }
        }
        if let Some(stage) = &mut self.status.stage {
            stage.foretold = true;
        }
        if !little.is_empty() {
            let remedy =
                "longer stages, more traffic, more replicas or a larger minimumEffect would show more";
            self.decide(What::Warned, format!("{}; {remedy}", little.join("; ")));
        }
    }

    /// What Kubernetes itself tells against the candidate, and not as much against what it is compared with.
    fn signal(&self) -> Option<String> {
        let stage = self.status.stage.as_ref()?;
        let place = planned(self.rollout, stage).map(|planned| &planned.place);
        let (candidate, reference) = match (stage.step, place) {
            (Step::Promoting, _) => (Variant::Stable, None),
            (_, None) => return None,
            (_, Some(Place::Staging(_))) => (Variant::StagingCanary, Some(Variant::StagingBaseline)),
            (_, Some(Place::Weight(_))) => match self.rollout.comparison {
                Comparison::Fresh => (Variant::Canary, Some(Variant::Baseline)),
                Comparison::Stable => (Variant::Canary, Some(Variant::Stable)),
            },
        };
        let troubled = |pod: &Pod| pod.restarts > 0 || pod.oom_killed || pod.not_ready_since.is_some();
        if !self.snapshot.variants.get(&candidate)?.pods.iter().any(troubled) {
            return None;
        }
        // Pods of an older template are on their way out: what was switched off may go on to harm them.
        let current = |variant: Variant| {
            let wanted = self.wanted().into_iter().find(|wanted| wanted.variant == variant)?;
            let template = outline(self.rollout, &wanted).template;
            let mut seen = self.snapshot.variants.get(&variant)?.clone();
            seen.pods.retain(|pod| pod.template == template);
            Some(seen)
        };
        let seen = &current(candidate)?;
        let reference = &reference.and_then(current).unwrap_or_default();
        let (now, then) = (suffered(seen), stage.before.unwrap_or_else(|| suffered(reference)));
        // Arms are not of one size, so that their numbers do not compare; stable is what it was before.
        let more = match stage.before {
            Some(before) => now.oom_killed > before.oom_killed,
            None => now.oom_killed > 0 && then.oom_killed == 0,
        };
        if more {
            let others = if stage.before.is_some() { "" } else { ", none of the baseline's was" };
            return Some(format!(
                "kubernetes: a pod of {} was killed for want of memory{others}",
                candidate.label()
            ));
        }
        if now.restarts >= then.restarts + 2 {
            return Some(format!(
                "kubernetes: a pod of {} has restarted {} times, the baseline's {} times",
                candidate.label(),
                now.restarts,
                then.restarts
            ));
        }
        // What both arms have is not the candidate's doing, also where it came to the baseline later.
        let mut others = reference.pods.iter().filter(|pod| !pod.terminating).peekable();
        if stage.before.is_none() && (others.peek().is_none() || others.any(|pod| !pod.ready)) {
            return None;
        }
        let stuck = seen.pods.iter().find(|pod| {
            !pod.terminating
                && pod.not_ready_since.is_some_and(|since| self.now.duration_since(since) > NOT_READY_LIMIT)
        })?;
        let others = if stage.before.is_some() { "" } else { ", while the baseline is Ready" };
        Some(format!(
            "kubernetes: pod {} has been running without being Ready for more than {} s{others}",
            stuck.name,
            NOT_READY_LIMIT.as_secs()
        ))
    }

    /// The variants that are not exposed yet, in words; empty once every pod that is compared is exposed and production has the
    /// wanted replicas.
    fn unexposed(&self) -> String {
        let nothing = Observed::default();
        let missing: Vec<_> = self
            .wanted()
            .iter()
            .filter_map(|wanted| {
                let target = outline(self.rollout, wanted);
                let seen = self.snapshot.variants.get(&wanted.variant).unwrap_or(&nothing);
                let there = match wanted.variant {
                    Variant::Stable => seen.replicas == target.replicas && seen.serving() >= target.replicas,
                    Variant::StagingLoad | Variant::StagingExperts => seen.serving() >= 1,
                    _ => seen.exposed(&target),
                };
                (!there).then(|| {
                    let (label, serving, of) = (wanted.variant.label(), seen.serving(), target.replicas);
                    match wanted.variant.has_config() && serving >= of {
                        true => format!("{label} has {} of {of} pods with their configuration in force, and none too many", seen.taken(&target)),
                        false => format!("{label} has {serving} of {of} pods"),
                    }
                })
            })
            .collect();
        missing.join(", ")
    }

    /// The optimizations in a state with the hashes of their configurations, for whoever applies the object again.
    fn verdicts(&self, state: OptimizationState) -> String {
        let of = self.status.optimizations.iter().filter(|optimization| optimization.state == state);
        let words: BTreeSet<_> = of.map(|known| format!("{}={}", known.name, known.config_hash)).collect();
        list(&words)
    }

    /// The variants as the status wants them, before the order of additions and removals.
    fn wanted(&self) -> Vec<Wanted<'_>> {
        let promoted = names(&self.status, OptimizationState::Promoted);
        let with_active: BTreeSet<_> = promoted.union(&self.active()).cloned().collect();
        let n = self.rollout.replicas;
        let make = |variant, replicas, on: &BTreeSet<String>| Wanted {
            variant,
            replicas,
            on: on.clone(),
            staging: None,
            replaced: 0,
            annotations: BTreeMap::new(),
        };
        let stable = |replicas, on: &BTreeSet<String>| Wanted {
            annotations: BTreeMap::from([
                (PROMOTED_ANNOTATION, self.verdicts(OptimizationState::Promoted)),
                (ROLLED_BACK_ANNOTATION, self.verdicts(OptimizationState::RolledBack)),
            ]),
            ..make(Variant::Stable, replicas, on)
        };
        let Some(stage) = &self.status.stage else { return vec![stable(n, &promoted)] };
        let place = planned(self.rollout, stage).map(|planned| &planned.place);
        match (stage.step, place) {
            (Step::Promoting, _) => vec![stable(n, &with_active)],
            (Step::Restoring, _) | (_, None) => vec![stable(n, &promoted)],
            (_, Some(Place::Staging(staging))) => {
                let arm = |variant, replicas, on, replaced| Wanted {
                    staging: Some(staging),
                    replaced,
                    ..make(variant, replicas, on)
                };
                let mut wanted = vec![stable(n, &promoted)];
                if Rollout::mock_experts(staging) {
                    wanted.push(arm(Variant::StagingExperts, 1, &promoted, 0));
                }
                wanted.push(arm(Variant::StagingBaseline, staging.replicas, &promoted, stage.replaced));
                wanted.push(arm(Variant::StagingCanary, staging.replicas, &with_active, stage.replaced));
                wanted.push(arm(Variant::StagingLoad, 1, &promoted, 0));
                wanted
            }
            (_, Some(Place::Weight(weight))) => {
                let replicas = Replicas::at(n, *weight, self.rollout.comparison);
                let arm = |variant, replicas, on| Wanted {
                    replaced: stage.replaced,
                    ..make(variant, replicas, on)
                };
                let mut wanted = vec![arm(Variant::Canary, replicas.canary, &with_active)];
                if replicas.baseline > 0 {
                    wanted.push(arm(Variant::Baseline, replicas.baseline, &promoted));
                }
                wanted.push(stable(replicas.stable, &promoted));
                wanted
            }
        }
    }

    /// The order of additions and removals: serving capacity never falls below the user's replicas by our act.
    fn sequenced(&self) -> (Vec<Wanted<'_>>, Vec<Variant>) {
        let nothing = Observed::default();
        let seen = |variant: Variant| self.snapshot.variants.get(&variant).unwrap_or(&nothing);
        let mut wanted = self.wanted();
        let promoted = names(&self.status, OptimizationState::Promoted);
        let promoting = self.status.stage.as_ref().is_some_and(|stage| stage.step == Step::Promoting);
        let replaced = self.status.stage.as_ref().map_or(0, |stage| stage.replaced);
        // Arms that are to go keep serving, with the configuration that is to stay, until they can be spared.
        for variant in [Variant::Canary, Variant::Baseline] {
            if self.snapshot.variants.contains_key(&variant) && !wanted.iter().any(|w| w.variant == variant) {
                let mut on = promoted.clone();
                if promoting && variant == Variant::Canary {
                    on.extend(self.active());
                }
                wanted.push(Wanted {
                    variant,
                    replicas: 0,
                    on,
                    staging: None,
                    replaced,
                    annotations: BTreeMap::new(),
                });
            }
        }
        // A pod beyond its Deployment's replicas is about to go, though it still serves.
        let kept = |seen: &Observed| seen.serving().min(seen.replicas);
        let serving: i32 = Variant::PRODUCTION.iter().map(|variant| kept(seen(*variant))).sum();
        let mut spare = (serving - self.rollout.replicas).max(0);
        for variant in Variant::PRODUCTION {
            let Some(wanted) = wanted.iter_mut().find(|w| w.variant == variant) else { continue };
            let current = seen(variant);
            let surplus = (current.replicas - wanted.replicas).max(0);
            // Pods that do not serve can go at once; the ReplicaSet removes those first.
            let idle = (current.replicas - kept(current)).clamp(0, surplus);
            let served = (surplus - idle).min(spare);
            spare -= served;
            wanted.replicas += surplus - idle - served;
        }
        let gone = |variant: &Variant| match wanted.iter().find(|w| w.variant == *variant) {
            Some(w) => w.replicas == 0 && *variant != Variant::Stable,
            None => true,
        };
        let remove: Vec<_> = self.snapshot.variants.keys().copied().filter(gone).collect();
        wanted.retain(|w| !remove.contains(&w.variant) && (w.replicas > 0 || w.variant == Variant::Stable));
        (wanted, remove)
    }

    fn delete(mut self) -> Plan {
        let since = self.snapshot.deleting_since.unwrap_or(self.now);
        let stable = self.snapshot.variants.get(&Variant::Stable);
        let rest: Vec<_> = self.snapshot.variants.keys().copied().filter(|v| *v != Variant::Stable).collect();
        // Never hang on a stable Deployment that somebody has removed, or that cannot become Ready.
        let waited = self.now.duration_since(since) > PROGRESS_DEADLINE;
        let put_back = self.rollout.deletion_policy == DeletionPolicy::Orphan && stable.is_some() && !waited;
        let (targets, remove) = if put_back {
            for name in self.active() {
                self.set(&name, OptimizationState::Pending, "the rollout was deleted before it had passed");
            }
            if let Some(stage) = &mut self.status.stage {
                stage.step = Step::Restoring;
            }
            let (wanted, remove) = self.sequenced();
            (wanted.iter().map(|wanted| render(self.rollout, wanted)).collect(), remove)
        } else if self.rollout.deletion_policy == DeletionPolicy::Delete {
            (vec![], self.snapshot.variants.keys().copied().collect())
        } else {
            (vec![], rest.clone())
        };
        let release = rest.iter().all(|variant| remove.contains(variant));
        // Where the API server takes no other template, the one that stands serves.
        let wanting = |seen: &&Observed| seen.replicas != self.rollout.replicas;
        let scale = stable.filter(wanting).filter(|_| put_back && self.snapshot.refused.is_some());
        let scale = scale.map(|_| self.rollout.replicas);
        // The status is not written any more; what it said stays for whoever reads the object's last version.
        Plan {
            status: self.snapshot.status.clone(),
            targets,
            scale,
            remove,
            answered: vec![],
            release,
            wake: self.now + POLL,
        }
    }

    fn plan(mut self) -> Plan {
        if let Some(why) = &self.snapshot.refused {
            self.stall = Some(Refusal { reason: "ApplyRefused", message: format!("{why}{MEND}") });
        }
        let (wanted, remove) = self.sequenced();
        let targets: Vec<_> = wanted.iter().map(|wanted| render(self.rollout, wanted)).collect();
        let note = self.note();
        let wake = self.wake(&remove);
        if let Some(stall) = &self.stall
            && report::stalled(&self.status).is_none_or(|(reason, _)| reason != stall.reason)
        {
            let why = format!("{}: {}", stall.reason, stall.message);
            self.decide(What::Stalled, why);
        } else if self.stall.is_none() && report::stalled(&self.status).is_some() {
            self.decide(What::Resumed, "the rollout goes on");
        }
        self.status.next_decision_at = Some(Time(wake));
        self.status.phase = self.phase();
        report::weight(&mut self.status, self.rollout, self.snapshot, &targets);
        report::summary(&mut self.status);
        report::progress(&mut self.status, self.stall.as_ref(), &note, self.now);
        Plan {
            status: self.status,
            targets,
            scale: None,
            remove,
            answered: self.answered,
            release: false,
            wake,
        }
    }

    fn phase(&self) -> Phase {
        if self.stall.is_some() {
            return Phase::Stalled;
        }
        let Some(stage) = &self.status.stage else {
            return if names(&self.status, OptimizationState::Promoted).is_empty() {
                Phase::RolledBack
            } else {
                Phase::Completed
            };
        };
        match stage {
            stage if stage.blame.is_some() => Phase::Blaming,
            _ if self.rollout.paused => Phase::Paused,
            _ => Phase::Progressing,
        }
    }

    /// What the rollout does and waits for, without numbers that change at each tick.
    fn note(&self) -> String {
        let Some(stage) = &self.status.stage else {
            return self.status.decisions.last().map(|decision| decision.why.clone()).unwrap_or_default();
        };
        let planned = planned(self.rollout, stage);
        let bake = planned.map(|planned| planned.duration).unwrap_or_default();
        let doing = match stage.step {
            Step::Deploying => "its pods are brought up".to_owned(),
            Step::WarmingUp => "its pods warm up".to_owned(),
            Step::Observing if self.blind() && !self.status.kpis.is_empty() => {
                "held: a KPI cannot be read, and nothing is promoted or rolled back meanwhile".to_owned()
            }
            Step::Observing if stage.observed >= bake && self.rollout.paused => {
                "its bake is over; the rollout is paused".to_owned()
            }
            Step::Observing if stage.observed >= bake => {
                match planned.is_some_and(|planned| self.unproven(planned)) {
                    true => "its bake is over; more evidence is needed before it can pass".to_owned(),
                    false => "its bake is over".to_owned(),
                }
            }
            Step::Observing => format!("it is observed for {bake}"),
            Step::AwaitingApproval => {
                format!("it has passed and waits for synthex.io/promote={}", stage.name)
            }
            Step::Promoting => "it has passed, and the stable Deployment takes the optimizations".to_owned(),
            Step::Restoring => {
                "no optimization is left, and the stable Deployment returns to full capacity".to_owned()
            }
        };
        match &stage.blame {
            Some(blame) => format!("stage {}: {} alarms and promotion is frozen", stage.name, blame.kpi),
            None => format!("stage {}: {doing}", stage.name),
        }
    }

    fn wake(&self, remove: &[Variant]) -> Timestamp {
        let Some(stage) = &self.status.stage else {
            return self.now + if remove.is_empty() { IDLE } else { POLL };
        };
        let next_tick = judge::settles_next(self.now.as_second(), interval(self.rollout));
        let next_tick = Timestamp::from_second(next_tick).unwrap_or(self.now + POLL);
        match stage.step {
            Step::Deploying | Step::Promoting | Step::Restoring => self.now + POLL,
            Step::WarmingUp => evidence_from(self.rollout, stage, None)
                .and_then(|from| Timestamp::from_second(from).ok())
                .unwrap_or(next_tick)
                .min(next_tick)
                .max(self.now),
            Step::Observing | Step::AwaitingApproval => next_tick,
        }
    }
}

/// Whether a verdict from before is one on this configuration.
fn verdict_on(verdicts: &[String], name: &str, config_hash: &str) -> bool {
    verdicts.iter().any(|verdict| verdict.split_once('=') == Some((name, config_hash)))
}

/// What the pods of a variant have suffered: of the worst pod, so that arms of different size compare.
fn suffered(seen: &Observed) -> Suffered {
    let pods = || seen.pods.iter().filter(|pod| !pod.terminating);
    Suffered {
        restarts: pods().map(|pod| pod.restarts).max().unwrap_or_default(),
        oom_killed: i32::try_from(pods().filter(|pod| pod.oom_killed).count()).unwrap_or(i32::MAX),
    }
}

fn running_now(stage: &str) -> String {
    if stage.is_empty() { "no stage runs now".into() } else { format!("the stage that runs now is {stage}") }
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}
