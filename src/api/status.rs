//! The status of a rollout: the operator's only memory. Serde and schema only.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Duration;

/// What the operator knows, has decided and waits for.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// Generation of the specification that this status answers to.
    #[serde(default)]
    pub observed_generation: i64,

    /// Where the rollout stands.
    #[serde(default)]
    pub phase: Phase,

    /// The stage that runs. Absent before the first and after the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<StageStatus>,

    /// Share of production traffic on the canary.
    #[serde(default)]
    pub weight: Weight,

    /// One entry per optimization.
    #[serde(default)]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]))]
    pub optimizations: Vec<OptimizationStatus>,

    /// One entry per KPI that is judged in this stage.
    #[serde(default)]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]))]
    pub kpis: Vec<KpiStatus>,

    /// What was learned from running pods before any evidence was looked at, and is frozen since: one entry per KPI and track.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preflight: Vec<Preflight>,

    /// What each KPI's change was measured to be, stage by stage and overall.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub benefits: Vec<Benefit>,

    /// The last 20 decisions, oldest first.
    #[serde(default)]
    pub decisions: Vec<Decision>,

    /// Verbs that have been answered and whose annotations still stand, so that none is answered twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answered: Vec<String>,

    /// When the operator will look again at the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_decision_at: Option<Time>,

    /// `Ready`, `Reconciling` and `Stalled` as kstatus defines them, and `Healthy`, `TelemetryAvailable`, `Conflict`.
    #[serde(default)]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["type".to_owned()]))]
    pub conditions: Vec<Condition>,

    /// What the columns of `kubectl get` show.
    #[serde(default)]
    pub summary: Summary,
}

/// Where a rollout stands.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing has been started yet.
    #[default]
    Pending,
    /// A stage runs.
    Progressing,
    /// A KPI alarms and the guilty optimization is being found. Promotion is frozen.
    Blaming,
    /// The user has paused promotion.
    Paused,
    /// At least one optimization runs on all pods of the stable Deployment.
    Completed,
    /// No optimization of this pass survived; the stable Deployment serves as before.
    RolledBack,
    /// The rollout cannot go on without the user; the `Stalled` condition says what to change.
    Stalled,
}

/// The stage that runs.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StageStatus {
    /// Name from the specification.
    pub name: String,
    /// Position in the list of stages, from 0.
    pub index: i32,
    /// What the stage does now.
    pub step: Step,
    /// How often the evidence of this stage has been started, from 1. Each start spends less of the false-rollback probability.
    pub attempt: i32,
    /// Stages that the pass began with: the first so many that it enters have an equal share of that probability each.
    #[serde(default)]
    pub stages: i32,
    /// The last attempts at the stages that this pass has left.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub spent: BTreeMap<String, i32>,
    /// How often in this pass the arms' pods have been replaced, so that evidence starts afresh. Stable's stay, also where the
    /// canary is compared with them.
    #[serde(default)]
    pub replaced: i32,
    /// When the stage was entered.
    pub entered_at: Time,
    /// When this attempt began to deploy.
    pub attempt_at: Time,
    /// Hash of what is compared (configuration and pod template of both arms). When it changes, the evidence starts afresh.
    #[serde(default)]
    pub subject: String,
    /// Since when every pod of both arms has been Ready with its configuration in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exposed_at: Option<Time>,
    /// Bake time counted so far: grid ticks with fresh samples of both arms.
    #[serde(default)]
    pub observed: Duration,
    /// The shared alarm whose guilty is being sought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blame: Option<Blame>,
    /// Whether the user has let the rest of the bake be skipped, or granted the approval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promoted: Option<Promotion>,
    /// Whether it has been said what this stage and those after it can show.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub foretold: bool,
    /// What the stable pods had suffered before they took the optimizations, which is not held against these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Suffered>,
}

/// What pods have suffered in their life.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Suffered {
    /// Restarts of the pod that has restarted most.
    pub restarts: i32,
    /// Pods that were killed for want of memory.
    pub oom_killed: i32,
}

/// A user's word on a stage.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promotion {
    /// The next stage may follow once this one has passed.
    Approved,
    /// The rest of the bake is skipped, unless a KPI fails.
    Forced,
}

/// What a stage does now.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Pods are brought to the stage's replicas and configuration.
    Deploying,
    /// Pods serve, nothing is judged yet.
    WarmingUp,
    /// Evidence is gathered.
    Observing,
    /// The stage has passed; the user's approval is missing.
    AwaitingApproval,
    /// The stable Deployment takes the surviving optimizations.
    Promoting,
    /// No optimization is left: the stable Deployment returns to full capacity, then the other arms go.
    Restoring,
}

/// A shared alarm whose guilty is being sought.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Blame {
    /// The KPI that alarmed.
    pub kpi: String,
    /// When it alarmed.
    pub since: Time,
}

/// Share of production traffic on the canary, in percent.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Weight {
    /// What the stage asks for.
    #[serde(default)]
    pub desired: i32,
    /// What the Ready pods give, rounded, such as `10%`.
    #[serde(default)]
    pub effective: String,
}

/// One optimization.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct OptimizationStatus {
    /// Name from the specification.
    pub name: String,
    /// Where it stands.
    pub state: OptimizationState,
    /// The last stage it has reached.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stage: String,
    /// Since when it has been in this state.
    pub since: Time,
    /// Why.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What it brought, in words and numbers: the changes of its own KPIs with their 95 % confidence intervals.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub benefit: String,
    /// Hash of its configuration: a rolled-back optimization is tried again only when this changes, or on `synthex.io/retry`.
    #[serde(default)]
    pub config_hash: String,
}

/// Where an optimization stands.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizationState {
    /// Waits for a pass through the stages.
    Pending,
    /// On in the canary.
    Active,
    /// On in the stable Deployment.
    Promoted,
    /// Off everywhere.
    RolledBack,
}

/// What is known of one KPI in this stage.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct KpiStatus {
    /// Name from the specification.
    pub name: String,
    /// The optimization that alone can move it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The verdict at the last grid tick.
    pub verdict: Verdict,
    /// Why the verdict is what it is, as one word.
    pub reason: Cause,
    /// Hash of the queries. When they are edited the KPI is learned of and judged afresh.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reads: String,
    /// Since when the reason has been this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// What the verdict rests on, in words and numbers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The canary's value: a share of requests, a gauge's mean over pods, or the value under a threshold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<f64>,
    /// The baseline's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// Relative change of the canary against the baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// Natural logarithm of the evidence against "no worse than tolerated"; the alarm is at `alarmAt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_evidence: Option<f64>,
    /// Value of `logEvidence` at which the KPI alarms: ln(1/alpha).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm_at: Option<f64>,
    /// Ratio of canary to baseline that is called equal: the tolerance, or what pods differ by. Of shares of requests it is the ratio
    /// of their odds, which is that of the shares where they are small; so are the ratios below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerated: Option<f64>,
    /// Smallest ratio of canary to baseline that the whole stage finds with a probability of 80 %, at the traffic seen so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detectable: Option<f64>,
    /// Time in which a doubling would be found, at the traffic seen so far.
    // Without the rule on durations: in a list it costs the API server more than all other rules together may.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub doubling_found_in: Option<Duration>,
    /// Checkpoint from which the same evidence is folded again after a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
}

/// The five answers of a judge.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// No alarm and the minimum evidence is there.
    Pass,
    /// The canary is worse than tolerated.
    Fail,
    /// Not enough evidence yet.
    Inconclusive,
    /// Prometheus answers, but holds nothing for these pods.
    NoData,
    /// Prometheus does not answer, or not in a form that can be read.
    TelemetryDown,
}

/// Why a verdict is what it is. Each has its own consequence; see the README's troubleshooting.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The evidence is enough for the verdict.
    Judged,
    /// More events, requests or samples are needed.
    NeedsEvidence,
    /// There are too few pods ever to judge this KPI in this stage: it is shown and stops nothing.
    NeedsPods,
    /// Nothing is compared in this step of the rollout.
    NoBaseline,
    /// The canary has no requests, the baseline has.
    CanaryIdle,
    /// The baseline has no requests, the canary has.
    BaselineIdle,
    /// Neither arm has requests.
    Idle,
    /// The newest samples are older than two intervals.
    Stale,
    /// The value is NaN or infinite.
    NotANumber,
    /// The baseline is beyond the bound as well, so that it is not the canary's doing.
    BaselineUnhealthy,
    /// Prometheus holds samples of the baseline's pods, but none of the canary's.
    CanaryMissing,
    /// Prometheus holds samples of the canary's pods, but none of the baseline's.
    BaselineMissing,
    /// Prometheus holds samples of neither.
    Missing,
    /// Prometheus cannot be reached, is unwell, or did not answer in time.
    Unreachable,
    /// Prometheus refuses the query, or its answer cannot be judged.
    Malformed,
}

/// A relative change with its 95 % confidence interval: -0.35 is 35 % less.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// The estimate.
    pub estimate: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// What one KPI's change was measured to be.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Benefit {
    /// Name of the KPI.
    pub kpi: String,
    /// The optimizations that may have brought the change: one, or several where they cannot be told apart.
    pub optimizations: Vec<String>,
    /// Each stage's own measurement, of the last attempt.
    pub stages: Vec<StageChange>,
    /// The measurements in production together, weighted by their precision; those of staging where there are no others.
    pub overall: Change,
}

/// A change as one stage measured it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StageChange {
    /// Name of the stage.
    pub stage: String,
    /// Where it was measured.
    pub track: Track,
    /// What was measured.
    pub change: Change,
}

/// Where pods run.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Apart from production, under generated load.
    Staging,
    /// In production.
    Production,
}

/// What was learned of one KPI from pods with every optimization of the pass off, before the evidence was looked at.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Preflight {
    /// Name of the KPI.
    pub kpi: String,
    /// Where it was learned; what staging's load teaches does not hold for production's.
    pub track: Track,
    /// Hash of the KPI's queries, of which it was learned.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reads: String,
    /// Unix time in seconds at which the span ended from which it was learned. Evidence begins no earlier.
    pub until: i64,
    /// Pods from which the spread was learned; 0 where they or their past were too few, so that the cautious end of the range is
    /// taken.
    pub pods: i32,
    /// Unix time in seconds of the tick up to which the cautious end was taken all the same, where the pods' past was too short at
    /// first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cautious_until: Option<i64>,
    /// How much pods that do the same work differ: the standard deviation of the log odds of the share (one for each bound of
    /// a latency), or of a gauge's logarithm and of its plain value.
    pub spread: Vec<f64>,
    /// The frozen bounds of a latency as the label `le` has them, the lower first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bounds: Vec<String>,
    /// Whether the histogram is a native one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub native: bool,
    /// Share of the requests that failed, or that were slower than each bound.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<f64>,
    /// Requests per second and pod.
    #[serde(default)]
    pub requests: f64,
}

/// Evidence of one KPI in one attempt at a stage: a fold over the samples on the tick grid.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Evidence {
    /// Unix time in seconds of the last grid tick that was folded.
    pub last_tick: i64,
    /// Grid ticks with fresh samples of both arms.
    #[serde(default)]
    pub fresh_ticks: i64,
    /// Evidence of each share of requests that is compared: one of an error ratio, one for each bound of a latency.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareEvidence>,
    /// Pods whose latency is not counted, since they began in mid-stage and are cold yet: each with the tick of its first sample.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cold: BTreeMap<String, i64>,
    /// Evidence of a gauge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gauge: Option<GaugeEvidence>,
    /// Samples in a row beyond a threshold.
    #[serde(default)]
    pub breaches: i32,
    /// Last value under a threshold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
}

/// Evidence of one share of requests.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ShareEvidence {
    /// Log weights of the mixture's alternatives.
    pub log_weights: Vec<f64>,
    /// Highest log evidence so far while the difference mattered: an alarm, once reached, stands.
    #[serde(default)]
    pub peak: f64,
    /// Events and requests of the canary.
    #[serde(default)]
    pub canary: Counts,
    /// Events and requests of the baseline.
    #[serde(default)]
    pub baseline: Counts,
    /// The same of the latest ticks, of which older ones weigh less.
    #[serde(default)]
    pub recent: Carry,
    /// The same of the latest tick alone.
    #[serde(default)]
    pub latest: Carry,
    /// Requests that one arm has had since the other's last: the baseline's while the canary is silent, and less than 0 the canary's.
    #[serde(default)]
    pub silence: f64,
    /// Counts that wait to be compared: of the last tick when only one arm had requests in it, or of a gap in the samples that
    /// only one arm has come back from. They are compared together with those of the next fresh tick.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carry: Option<Carry>,
}

/// Evidence of a gauge.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GaugeEvidence {
    /// Looks taken at the level.
    pub looks: i32,
    /// Highest log evidence so far: an alarm, once reached, stands.
    pub peak: f64,
    /// Sums over each pod's samples, canary and baseline. They grow with the pods and are not stored: after a restart they are
    /// folded again from the stage's first tick.
    #[serde(skip)]
    pub sums: Option<Box<GaugeSums>>,
}

/// Sums over the samples of a gauge since `from`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GaugeSums {
    /// First tick, against which times are taken.
    pub from: i64,
    /// By pod: of the canary, of the baseline.
    pub pods: [BTreeMap<String, PodSums>; 2],
    /// Samples that were no number, and all samples.
    pub dropped: (i64, i64),
}

/// Sums over one pod's samples: y is the logarithm of the value, t the time in hours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PodSums {
    /// Number of samples.
    pub n: f64,
    /// Whether a value was zero or less, so that only the plain values have a meaning.
    pub signed: bool,
    /// Sum of the plain values.
    pub plain: f64,
    /// Sum of their squares.
    pub plain_squares: f64,
    /// Sum of y.
    pub y: f64,
    /// Sum of y².
    pub yy: f64,
    /// Sum of t.
    pub t: f64,
    /// Sum of t².
    pub tt: f64,
    /// Sum of t·y.
    pub ty: f64,
}

/// Counts of both arms.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Carry {
    /// Events and requests of the canary.
    pub canary: Counts,
    /// Events and requests of the baseline.
    pub baseline: Counts,
}

/// Events among requests.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Events (errors).
    pub events: f64,
    /// Requests.
    pub total: f64,
}

/// One decision.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Counts up from 1 in each rollout; events are named by it.
    pub id: i64,
    /// When it was taken.
    pub time: Time,
    /// What was decided; the reason of the event.
    pub what: What,
    /// Why, with the numbers.
    pub why: String,
    /// What a decision on evidence rests on, to recompute it by hand or by `kubectl synthex record` and `backtest`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub basis: Option<Basis>,
}

/// What a decision on evidence rests on.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Basis {
    /// Name of the stage.
    pub stage: String,
    /// Attempt at it.
    pub attempt: i32,
    /// Stages among which the false-rollback probability was shared.
    #[serde(default)]
    pub stages: i32,
    /// What the stage did.
    pub step: Step,
    /// Unix time in seconds of the grid tick at which the evidence began; the first difference ends one interval later.
    pub from: i64,
    /// Unix time in seconds of the last grid tick that was folded.
    pub until: i64,
    /// The optimizations that were on in the canary.
    pub on: Vec<String>,
    /// What had been learned of the KPIs there, since `.status.preflight` holds that of later stages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preflight: Vec<Preflight>,
    /// The numbers of each KPI.
    pub kpis: Vec<Numbers>,
}

/// The numbers of one KPI at a decision.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Numbers {
    /// Name of the KPI.
    pub name: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Unix time in seconds of the grid tick at which this KPI's evidence began: that of all, its own warm-up and what was learned
    /// of it considered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<i64>,
    /// Unix time in seconds of the last grid tick that was folded into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
    /// Events and requests of both arms, for each share of requests that is compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<Carry>,
    /// The canary's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<f64>,
    /// The baseline's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<f64>,
    /// The relative change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The log evidence, at its peak where the KPI fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_evidence: Option<f64>,
    /// Where it alarms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm_at: Option<f64>,
    /// Ratio that is called equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerated: Option<f64>,
}

impl From<&KpiStatus> for Numbers {
    fn from(kpi: &KpiStatus) -> Self {
        let shares = kpi.evidence.iter().flat_map(|evidence| &evidence.shares);
        Self {
            name: kpi.name.clone(),
            verdict: kpi.verdict,
            from: None,
            until: kpi.evidence.as_ref().map(|evidence| evidence.last_tick),
            counts: shares.map(|share| Carry { canary: share.canary, baseline: share.baseline }).collect(),
            canary: kpi.canary,
            baseline: kpi.baseline,
            change: kpi.change,
            log_evidence: kpi.log_evidence,
            alarm_at: kpi.alarm_at,
            tolerated: kpi.tolerated,
        }
    }
}

/// Kinds of decision; each is the reason of its event.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A stage was entered.
    StageStarted,
    /// The evidence of a stage starts afresh because what is compared has changed.
    StageRestarted,
    /// A stage passed.
    StagePassed,
    /// A stage has passed and waits for the user.
    ApprovalRequired,
    /// A KPI alarms; nothing was rolled back yet.
    AlarmRaised,
    /// One or more optimizations were switched off.
    OptimizationRolledBack,
    /// A KPI cannot be read, through a query or an answer that must be mended.
    KpiUnreadable,
    /// What the stages can prove, where that is little, or a promised benefit that is missed.
    Warned,
    /// The user ended the pass.
    Aborted,
    /// The user lets an optimization that was rolled back try again.
    RetriedByUser,
    /// The user granted an approval or skipped the rest of a bake.
    PromotedByUser,
    /// A user's verb could not be followed.
    VerbRefused,
    /// The stable Deployment takes the surviving optimizations.
    Promoting,
    /// The pass ended with at least one optimization on.
    Completed,
    /// The pass ended with none on.
    RolledBack,
    /// The rollout cannot go on without the user.
    Stalled,
    /// What stalled the rollout is gone.
    Resumed,
}

/// What the columns of `kubectl get` show.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Optimizations that are on, of all, such as `2/3`.
    #[serde(default)]
    pub active: String,
    /// The KPI nearest to an alarm and its verdict.
    #[serde(default)]
    pub worst_kpi: String,
    /// Names of the optimizations that were rolled back.
    #[serde(default)]
    pub rolled_back: String,
}
