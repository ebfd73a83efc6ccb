//! Reads the samples of a stage from Prometheus again, by the queries that the operator asked. Decides nothing of its own: what
//! is asked follows from [`machine::inquiry`], given the status as it stood.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use super::dataset::{DataSet, MAX_SAMPLES, Query, Recorded, VERSION};
use crate::{
    api::{
        self, Basis, Duration, Numbers, OptimizationRollout, OptimizationState, OptimizationStatus,
        RolloutStatus, StageStatus, Step,
    },
    decision::{
        judge::{self, Answer, Tick, Trial},
        machine,
        resolve::{self, Defaults, Rollout},
    },
    effects::prometheus::Prometheus,
};

/// Which stage is meant.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice<'a> {
    /// Its name; absent: the one that runs, else the last one that was decided on.
    pub stage: Option<&'a str>,
    /// The attempt at it; absent: the last.
    pub attempt: Option<i32>,
    /// The KPIs, or all where there are none.
    pub kpis: &'a [String],
}

/// What was recorded, and what is to be said of it.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The data set.
    pub set: DataSet,
    /// What is missing from it, or may be otherwise than it was live.
    pub remarks: Vec<String>,
    /// Whether each KPI that was judged there could be read.
    pub whole: bool,
}

/// The rollout as the operator sees it. `prometheus` stands where the specification names none.
///
/// # Errors
/// When the specification cannot be followed.
pub fn resolved(object: &OptimizationRollout, prometheus: &str) -> Result<Rollout> {
    let defaults =
        Defaults { runtime_image: "synthex-runtime".to_owned(), prometheus_url: prometheus.to_owned() };
    resolve::resolve(object, &defaults)
        .map_err(|refusal| anyhow::anyhow!("the specification cannot be followed: {}", refusal.message))
}

/// Records a stage.
///
/// # Errors
/// When there is no such stage, or Prometheus does not answer.
pub async fn record(
    object: &OptimizationRollout,
    rollout: &Rollout,
    choice: Choice<'_>,
    prometheus: &Prometheus,
    now: Timestamp,
) -> Result<Recording> {
    let status =
        object.status.clone().context("the rollout has no status: the operator has not seen it yet")?;
    let definitions: Vec<api::Kpi> = object
        .spec
        .kpis
        .iter()
        .cloned()
        .chain(object.spec.optimizations.iter().flat_map(resolve::owned_kpis))
        .collect();
    if let Some(unknown) = choice.kpis.iter().find(|name| !definitions.iter().any(|kpi| kpi.name == **name)) {
        let all: Vec<_> = definitions.iter().map(|kpi| kpi.name.as_str()).collect();
        bail!("there is no KPI {unknown}; there are {}", all.join(", "));
    }
    let (mut remarks, mut whole) = (vec![], true);
    let (stood, basis, now) = match chosen(&status, choice)? {
        Some(basis) => {
            let step = i64::try_from(rollout.analysis.interval.as_secs()).unwrap_or(i64::MAX);
            // When the last tick had just settled.
            let then = moment(judge::settles_next(basis.until, step))?;
            (as_it_stood(rollout, basis), Some(basis), then)
        }
        None => (afresh(&status), None, now),
    };
    let inquiry = machine::inquiry(rollout, &stood, now).with_context(|| match basis {
        Some(basis) => format!("spec.stages has no stage {} any more", basis.stage),
        None => "nothing is judged now: the stage's pods are brought up or warm up; wait, or name a stage that is over with --stage".to_owned(),
    })?;
    let stage = stood.stage.as_ref().context("no stage runs now; name one that is over with --stage")?;
    let wanted = |name: &str| choice.kpis.is_empty() || choice.kpis.iter().any(|kpi| kpi == name);
    let edited = |name: &str| {
        let of = |known: &&api::Preflight| known.kpi == name;
        let known = basis.and_then(|basis| basis.preflight.iter().find(of));
        let kpi = rollout.all_kpis().find(|kpi| kpi.name == name);
        known.zip(kpi).is_some_and(|(known, kpi)| !machine::is_of(&known.reads, kpi))
    };
    for waiting in inquiry.waiting.iter().filter(|kpi| wanted(&kpi.name)) {
        let why = match edited(&waiting.name) {
            true => "its queries have been edited since the decision",
            false => &waiting.message,
        };
        remarks.push(format!("{} is left out: {why}", waiting.name));
    }
    let names = basis.iter().flat_map(|basis| &basis.kpis).map(|kpi| &kpi.name);
    for gone in names.filter(|name| wanted(name) && !rollout.all_kpis().any(|kpi| kpi.name == **name)) {
        remarks.push(format!("{gone} is left out: the specification does not have it any more"));
    }
    let mut set = DataSet {
        version: VERSION,
        rollout: format!("{}/{}", rollout.namespace, rollout.name),
        stage: stage.name.clone(),
        attempt: stage.attempt,
        stages: machine::stages(rollout, stage.stages),
        false_rollback_probability: rollout.analysis.false_rollback_probability,
        step: inquiry.step,
        bake: inquiry.trials.first().map(|(trial, _)| trial.bake),
        arms: match inquiry.trials.first() {
            Some((trial, _)) => trial.arms.clone(),
            None if remarks.is_empty() => bail!("no KPI is judged there"),
            None => bail!("no KPI can be judged: {}", remarks.join("; ")),
        },
        kpis: vec![],
    };
    let mut room = MAX_SAMPLES;
    for (trial, evidence) in inquiry.trials.iter().filter(|(trial, _)| wanted(&trial.kpi.name)) {
        let decided = basis.and_then(|basis| numbers(basis, &trial.kpi.name));
        let from = decided.and_then(|decided| decided.from).unwrap_or(evidence.last_tick);
        let until = decided.and_then(|decided| decided.until).unwrap_or(inquiry.until);
        if until <= from {
            remarks.push(format!("{} is left out: no tick of it was judged", trial.kpi.name));
            continue;
        }
        let queries = match read(trial, from, until, prometheus, &mut room).await? {
            Ok(queries) => queries,
            Err(why) => {
                remarks.push(format!("{} is left out: {why}", trial.kpi.name));
                whole = false;
                continue;
            }
        };
        set.kpis.push(Recorded {
            owner: trial.kpi.owner.clone(),
            definition: definitions
                .iter()
                .find(|kpi| kpi.name == trial.kpi.name)
                .cloned()
                .with_context(|| format!("the specification has no KPI {}", trial.kpi.name))?,
            alarm_at: Some(trial.alarm_at),
            preflight: trial.preflight.clone(),
            warm_up: trial.warm_up,
            from,
            until,
            queries,
            decided: decided.cloned(),
        });
    }
    ensure!(
        !set.kpis.is_empty(),
        "nothing was recorded: {}",
        match remarks.as_slice() {
            [] => "there is no KPI of that name".to_owned(),
            remarks => remarks.join("; "),
        }
    );
    Ok(Recording { set, remarks, whole })
}

/// What the choice means: a decision on evidence, or nothing for the stage that runs.
fn chosen<'a>(status: &'a RolloutStatus, choice: Choice<'_>) -> Result<Option<&'a Basis>> {
    let meant = |stage: &str, attempt: i32| {
        choice.stage.is_none_or(|name| name == stage) && choice.attempt.is_none_or(|wanted| wanted == attempt)
    };
    let judging = |stage: &&StageStatus| {
        matches!(stage.step, Step::Observing | Step::AwaitingApproval | Step::Promoting)
            && stage.exposed_at.is_some()
    };
    let running = status.stage.as_ref().filter(judging).filter(|stage| meant(&stage.name, stage.attempt));
    let mut bases = status.decisions.iter().filter_map(|decision| decision.basis.as_ref());
    let basis = bases.rfind(|basis| meant(&basis.stage, basis.attempt));
    match (running, basis) {
        // A named stage that has passed is meant, and not the promotion that follows it under its name.
        (Some(stage), Some(basis)) if stage.step == Step::Promoting && choice.stage.is_some() => {
            return Ok(Some(basis));
        }
        (Some(_), _) => return Ok(None),
        (None, Some(basis)) => return Ok(Some(basis)),
        (None, None) => {}
    }
    let mut known: Vec<_> = status
        .decisions
        .iter()
        .filter_map(|decision| decision.basis.as_ref())
        .map(|basis| format!("{} (attempt {})", basis.stage, basis.attempt))
        .collect();
    known.dedup();
    bail!(
        "{} is neither judged now nor among the last decisions on evidence{}",
        choice.stage.map_or("no stage".to_owned(), |stage| format!("stage {stage}")),
        if known.is_empty() { String::new() } else { format!("; these are: {}", known.join(", ")) }
    )
}

/// The status of a stage that runs, as it stood before its evidence was looked at.
fn afresh(status: &RolloutStatus) -> RolloutStatus {
    let mut status = status.clone();
    for kpi in &mut status.kpis {
        kpi.evidence = None;
    }
    status
}

/// The status as it stood when a decision was taken, as far as judgement depends on it.
pub fn as_it_stood(rollout: &Rollout, basis: &Basis) -> RolloutStatus {
    // Evidence begins one warm-up after exposure, on the grid: exposed just that long before, it begins at the same tick.
    let warm_up = i64::try_from(rollout.analysis.warm_up.as_secs()).unwrap_or(i64::MAX);
    let exposed = Time(moment(basis.from.saturating_sub(warm_up)).unwrap_or_default());
    let active = |name: &String| OptimizationStatus {
        name: name.clone(),
        state: OptimizationState::Active,
        stage: basis.stage.clone(),
        since: exposed.clone(),
        reason: String::new(),
        benefit: String::new(),
        config_hash: String::new(),
    };
    RolloutStatus {
        stage: Some(StageStatus {
            name: basis.stage.clone(),
            index: 0,
            step: basis.step,
            attempt: basis.attempt,
            stages: basis.stages,
            spent: BTreeMap::new(),
            replaced: 0,
            entered_at: exposed.clone(),
            attempt_at: exposed.clone(),
            subject: String::new(),
            exposed_at: Some(exposed.clone()),
            observed: Duration::default(),
            blame: None,
            promoted: None,
            foretold: true,
            before: None,
        }),
        optimizations: basis.on.iter().map(active).collect(),
        preflight: basis.preflight.clone(),
        ..RolloutStatus::default()
    }
}

/// What a decision says of a KPI.
fn numbers<'a>(basis: &'a Basis, kpi: &str) -> Option<&'a Numbers> {
    basis.kpis.iter().find(|numbers| numbers.name == kpi)
}

/// The answers to a trial's queries; the inner error is one of this KPI alone.
async fn read(
    trial: &Trial,
    from: Tick,
    until: Tick,
    prometheus: &Prometheus,
    room: &mut usize,
) -> Result<Result<Vec<Query>, String>> {
    let mut read = vec![];
    for query in trial.queries() {
        let mut whole: BTreeMap<(String, String, String), judge::Series> = BTreeMap::new();
        for (from, until) in trial.ranges(&judge::beginning(from), until) {
            let samples =
                match prometheus.range_within(&query, from, until, trial.step, trial.lookback()).await {
                    Answer::Series(samples) => samples,
                    Answer::Down(why) => bail!("{why}"),
                    Answer::Malformed(why) => return Ok(Err(why)),
                };
            for series in samples {
                let count = series.points.len();
                ensure!(
                    count <= *room,
                    "more than {MAX_SAMPLES} samples: record fewer KPIs at a time, with --kpi"
                );
                *room -= count;
                let (pod, instance, labels) = series.key();
                let key = (pod.to_owned(), instance.to_owned(), labels.to_owned());
                let known =
                    whole.entry(key).or_insert_with(|| judge::Series { points: vec![], ..series.clone() });
                // The first tick of a range is the last of the one before.
                let last = known.points.last().map(|(time, _)| *time);
                known.points.extend(
                    series.points.into_iter().filter(|(time, _)| last.is_none_or(|last| *time > last)),
                );
            }
        }
        read.push(Query { query, series: whole.into_values().map(Into::into).collect() });
    }
    Ok(Ok(read))
}

fn moment(tick: Tick) -> Result<Timestamp> {
    Timestamp::from_second(tick).with_context(|| format!("{tick} is no time"))
}
