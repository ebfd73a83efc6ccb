//! One simulated world: the rollout object in a fake API server, an operator that does what `controller.rs` does with the same
//! pure functions, faults, and the checks of the invariants I1 to I10.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};
use synthex_operator::{
    api::{
        DeletionPolicy, Duration, KpiStatus, Mode, Object, OptimizationRollout, OptimizationState, Phase,
        Promotion, RolloutStatus, Step, Verdict, What,
    },
    decision::{
        judge::{self, Trial},
        machine::{self, Plan},
        render::Variant,
        replicas::Replicas,
        report::worth_writing,
        resolve::{self, Defaults, Place, Refusal, Rollout},
        snapshot::{Snapshot, Verb},
        writes::{self, Objects, Write},
    },
};

use super::{
    cluster::{Cluster, Known, Traffic},
    prometheus::{Health, Prometheus},
    rng::Rng,
};

/// A multiple of every interval used, so that worlds begin on the grid.
pub const START: i64 = 1_800_000_000;

/// What happens to a world from outside.
#[derive(Clone, Debug)]
pub enum Act {
    /// The user puts an annotation; `{stage}` in the value becomes the stage that runs.
    Verb(&'static str, String),
    Pause(bool),
    Replicas(i32),
    /// Bake time of the stage at this index.
    Bake(usize, u64),
    RemoveStage(usize),
    Weight(usize, i32),
    Base(&'static str, serde_json::Value),
    Configure(String, Object),
    RemoveOptimization(String),
    AddOptimization(serde_json::Value),
    Mode(Mode),
    Tolerance(f64),
    Delete,
    Telemetry(Health),
    /// A pod of this Deployment's suffix crashes.
    CrashPod(&'static str),
    Evict(&'static str),
    Node(usize, bool),
    /// Somebody deletes a child.
    DeleteChild(&'static str, &'static str),
    /// Somebody scales a child.
    Scale(&'static str, i32),
    /// No room for new pods for so long.
    Full(i64),
    CrashOperator,
}

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub spec: serde_json::Value,
    pub known: Vec<Known>,
    pub traffic: Traffic,
    pub scrape: i64,
    /// Share of watch events that never come.
    pub lost: f64,
    /// Share of writes and reads that are slow.
    pub slow: f64,
    /// Share of writes that fail, half of them after they took effect.
    pub failing: f64,
    /// Chance per write that the operator crashes after it.
    pub crashes: f64,
    /// The operator crashes after exactly this write.
    pub crash_at: Option<u64>,
    pub script: Vec<(i64, Act)>,
    /// Seconds after which the world ends.
    pub horizon: i64,
    /// Objects of somebody else that are there before.
    pub foreign: Vec<(&'static str, &'static str)>,
}

/// Why a reconciliation ended early.
enum Stop {
    Crash,
    Conflict,
    Failed,
}

#[derive(Default)]
struct Operator {
    evidence: Option<(String, Vec<KpiStatus>)>,
    announced: Option<i64>,
}

/// What came of a world.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub status: RolloutStatus,
    pub gone: bool,
    /// What was decided, with times left out.
    pub decided: Vec<(What, String)>,
    pub writes: u64,
    pub seconds: i64,
    pub reconciliations: u64,
    pub status_writes: u64,
    pub trace: Vec<String>,
    pub trace_hash: u64,
    pub forced: bool,
    pub edited: bool,
}

pub struct World {
    setup: Setup,
    now: i64,
    pub cluster: Cluster,
    prometheus: Prometheus,
    object: Option<OptimizationRollout>,
    version: u64,
    events: BTreeMap<String, String>,
    operator: Operator,
    due: i64,
    up_at: i64,
    /// Serving production pods when the operator last read them.
    read: i32,
    /// Somebody else has taken capacity away; until then it is not measured.
    meddled_until: i64,
    resolved: Option<(i64, Result<Rollout, Refusal>)>,
    faults: Rng,
    script: Vec<(i64, Act)>,
    written: u64,
    reconciliations: u64,
    status_writes: u64,
    trace: Vec<String>,
    trace_hash: u64,
    violations: Vec<String>,
    checks: Checks,
}

#[derive(Default)]
struct Checks {
    /// Rolled back by a stored decision, and not allowed back since.
    banned: BTreeSet<String>,
    /// Highest weight at which exposure has been licensed by proof; 101 for promotion.
    license: i32,
    /// Whether specification or replicas were changed while the stage ran.
    edited: bool,
    edited_in_stage: bool,
    stages_removed: bool,
    forced: bool,
    stored: BTreeMap<i64, (What, String)>,
    decided: Vec<(What, String)>,
    /// Verbs that the user has put.
    verbs: usize,
    ever: bool,
    foreign: BTreeMap<(String, String), serde_json::Value>,
    deleting: bool,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let mut object = OptimizationRollout::new(
            "w",
            serde_json::from_value(setup.spec.clone()).expect("the world's specification reads"),
        );
        object.metadata.namespace = Some("shop".into());
        object.metadata.uid = Some("5e8a4c1e-0000-4000-8000-000000000001".into());
        object.metadata.generation = Some(1);
        object.metadata.resource_version = Some("1".into());
        let mut script = setup.script.clone();
        script.sort_by_key(|(at, _)| *at);
        let mut checks = Checks::default();
        let cluster = Cluster::new(setup.seed, setup.known.clone(), setup.traffic.clone());
        for (kind, name) in &setup.foreign {
            checks.foreign.insert(((*kind).into(), (*name).into()), serde_json::json!({"theirs": true}));
        }
        Self {
            now: START + (setup.seed % 60) as i64,
            cluster,
            prometheus: Prometheus::new(setup.seed, setup.scrape),
            object: Some(object),
            version: 1,
            events: BTreeMap::new(),
            operator: Operator::default(),
            due: 0,
            up_at: 0,
            read: 0,
            meddled_until: 0,
            resolved: None,
            faults: Rng::new(setup.seed, 3),
            script,
            written: 0,
            reconciliations: 0,
            status_writes: 0,
            trace: vec![],
            trace_hash: 0xcbf2_9ce4_8422_2325,
            violations: vec![],
            checks,
            setup,
        }
    }

    /// Lives the world to its end.
    pub fn run(mut self) -> Outcome {
        let begin = self.now;
        let mut quiet = 0;
        while self.now - begin < self.setup.horizon && self.violations.is_empty() {
            self.second();
            for _ in 0..3 {
                if self.due > self.now || self.up_at > self.now {
                    break;
                }
                self.reconcile_once();
            }
            // A world that has ended is watched for a while, and then left.
            let ended = match &self.object {
                None => true,
                Some(object) => object.status.as_ref().is_some_and(|status| {
                    matches!(status.phase, Phase::Completed | Phase::RolledBack) && status.stage.is_none()
                }),
            };
            quiet = if ended && self.script.is_empty() && !self.checks.deleting { quiet + 1 } else { 0 };
            if quiet > 60 || self.object.is_none() {
                break;
            }
        }
        self.last_checks();
        Outcome {
            violations: self.violations,
            status: self.object.as_ref().and_then(|object| object.status.clone()).unwrap_or_default(),
            gone: self.object.is_none(),
            decided: self.checks.decided,
            writes: self.written,
            seconds: self.now - begin,
            reconciliations: self.reconciliations,
            status_writes: self.status_writes,
            trace: self.trace,
            trace_hash: self.trace_hash,
            forced: self.checks.forced,
            edited: self.checks.edited,
        }
    }

    fn log(&mut self, line: String) {
        let line = format!("{:>5} {line}", self.now - START);
        for byte in line.bytes() {
            self.trace_hash = (self.trace_hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.trace.push(line);
    }

    fn violated(&mut self, what: String) {
        self.log(format!("VIOLATED {what}"));
        self.violations.push(what);
    }

    /// The clock as the operator reads it: never on a whole second.
    fn clock(&self) -> Timestamp {
        at(self.now)
    }

    // ---- time

    fn second(&mut self) {
        self.now += 1;
        while self.script.first().is_some_and(|(time, _)| START + time <= self.now) {
            let (_, act) = self.script.remove(0);
            self.act(act);
        }
        self.cluster.tick(self.now);
        self.prometheus.tick(&self.cluster, self.now);
        if std::mem::take(&mut self.cluster.changed) {
            self.wake();
        }
        self.every_second();
    }

    /// A watch event, unless it is lost.
    fn wake(&mut self) {
        if !self.faults.chance(self.setup.lost) {
            self.due = self.due.min(self.now);
        }
    }

    /// A call that takes long: the world goes on meanwhile.
    fn pass_time(&mut self) {
        if self.faults.chance(self.setup.slow) {
            for _ in 0..self.faults.range(1, 4) {
                self.second();
            }
        }
    }

    // ---- what comes from outside

    fn pod(&mut self, suffix: &str) -> Option<String> {
        let deployment = if suffix.is_empty() { "w".to_owned() } else { format!("w-{suffix}") };
        let arm = judge::Arm { deployment, pods: 1 };
        let names: Vec<_> = self.cluster.pods.keys().filter(|name| arm.owns(name)).cloned().collect();
        (!names.is_empty()).then(|| self.faults.pick(&names))
    }

    fn act(&mut self, act: Act) {
        self.log(format!("act {act:?}"));
        match act {
            Act::Telemetry(health) => self.prometheus.health = health,
            Act::CrashPod(suffix) => {
                if let Some(name) = self.pod(suffix) {
                    self.cluster.crash_one(&name, self.now);
                }
            }
            Act::Evict(suffix) => {
                if let Some(name) = self.pod(suffix) {
                    self.cluster.evict(&name, self.now);
                }
            }
            Act::Node(node, up) => self.cluster.node(node, up, self.now),
            Act::DeleteChild(kind, suffix) => {
                let name = if suffix.is_empty() { "w".to_owned() } else { format!("w-{suffix}") };
                if kind == "Deployment" && Variant::PRODUCTION.iter().any(|v| v.object_name("w") == name) {
                    // Somebody takes the capacity away, not the operator.
                    self.meddled_until = self.now + 60;
                    self.cluster.floor = 0;
                }
                self.cluster.delete(kind, &name);
            }
            Act::Scale(suffix, replicas) => {
                let name = if suffix.is_empty() { "w".to_owned() } else { format!("w-{suffix}") };
                if let Some(deployment) = self.cluster.deployments.get(&name) {
                    let mut body = deployment.body.clone();
                    body["spec"]["replicas"] = serde_json::json!(replicas);
                    self.meddled_until = self.now + 60;
                    self.cluster.floor = 0;
                    self.cluster.write(&Write::Apply(&body), self.now);
                }
            }
            Act::Full(seconds) => self.cluster.full_until = self.now + seconds,
            Act::CrashOperator => self.crash_operator(),
            edit => self.edit(edit),
        }
    }

    fn edit(&mut self, act: Act) {
        let Some(object) = &mut self.object else { return };
        self.version += 1;
        object.metadata.resource_version = Some(self.version.to_string());
        let spec = &mut object.spec;
        let mut changed = true;
        match act {
            Act::Verb(verb, value) => {
                let status = object.status.clone().unwrap_or_default();
                let stage = status.stage.map(|stage| stage.name).unwrap_or_default();
                let value = value.replace("{stage}", &stage);
                self.checks.verbs += 1;
                self.checks.forced |= value.starts_with("force:");
                object
                    .metadata
                    .annotations
                    .get_or_insert_default()
                    .insert(format!("synthex.io/{verb}"), value);
                changed = false;
            }
            Act::Pause(paused) => spec.paused = paused,
            Act::Replicas(n) => {
                // More must first be there before it can be kept.
                self.cluster.floor = self.cluster.floor.min(n);
                spec.workload.runtime.replicas = n;
            }
            Act::Bake(index, seconds) => {
                if let Some(stage) = spec.stages.get_mut(index) {
                    stage.duration = Duration::from_secs(seconds);
                }
            }
            Act::RemoveStage(index) => {
                if index < spec.stages.len() && spec.stages.len() > 1 {
                    spec.stages.remove(index);
                    self.checks.stages_removed = true;
                }
            }
            Act::Weight(index, weight) => {
                let below = spec.stages[..index.min(spec.stages.len())].iter().filter_map(|s| s.weight).max();
                let above = spec.stages.iter().skip(index + 1).filter_map(|stage| stage.weight).min();
                if let Some(stage) = spec.stages.get_mut(index)
                    && stage.weight.is_some()
                {
                    stage.weight = Some(weight.clamp(below.unwrap_or(1), above.unwrap_or(100)));
                }
            }
            Act::Base(field, value) => {
                spec.workload.runtime.config.insert(field.into(), value);
            }
            Act::Configure(name, config) => {
                if let Some(optimization) = spec.optimizations.iter_mut().find(|o| o.name == name)
                    && optimization.config != config
                {
                    optimization.config = config;
                    // The user's word lets it try again.
                    self.checks.banned.remove(&name);
                }
            }
            Act::RemoveOptimization(name) => {
                if spec.optimizations.len() > 1 {
                    spec.optimizations.retain(|optimization| optimization.name != name);
                }
            }
            Act::AddOptimization(value) => {
                let optimization: synthex_operator::api::Optimization =
                    serde_json::from_value(value).expect("an optimization reads");
                if !spec.optimizations.iter().any(|o| o.name == optimization.name) {
                    spec.optimizations.push(optimization);
                }
            }
            Act::Mode(mode) => spec.analysis.mode = mode,
            Act::Tolerance(tolerance) => {
                for kpi in &mut spec.kpis {
                    if let Some(ratio) = &mut kpi.error_ratio {
                        ratio.tolerance = tolerance;
                    }
                }
            }
            Act::Delete => {
                object.metadata.deletion_timestamp = Some(Time(at(self.now)));
                self.checks.deleting = true;
                if spec.deletion_policy == DeletionPolicy::Delete {
                    self.cluster.floor = 0;
                }
                changed = false;
            }
            _ => changed = false,
        }
        if changed {
            self.checks.edited = true;
            self.checks.edited_in_stage = true;
            let generation = object.metadata.generation.unwrap_or_default() + 1;
            object.metadata.generation = Some(generation);
        }
        self.wake();
    }

    fn crash_operator(&mut self) {
        self.operator = Operator::default();
        self.up_at = self.now + self.faults.range(1, 20);
        self.due = self.up_at;
        self.log(format!("the operator crashes; it is back at {}", self.up_at - START));
    }

    // ---- the operator, as controller.rs has it

    fn reconcile_once(&mut self) {
        self.reconciliations += 1;
        self.due = i64::MAX;
        match self.reconcile() {
            Ok(wake) => {
                // Watch events that came meanwhile count.
                self.due = self.due.min(wake);
            }
            Err(Stop::Crash) => self.crash_operator(),
            Err(Stop::Conflict) => self.due = self.due.min(self.now),
            Err(Stop::Failed) => self.due = self.due.min(self.now + 5),
        }
    }

    /// One write to the API server: it may be slow, fail, or be the operator's last.
    fn written<T>(
        &mut self,
        what: String,
        write: impl FnOnce(&mut Self) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        self.pass_time();
        self.written += 1;
        let fails = self.faults.chance(self.setup.failing);
        if fails && self.faults.chance(0.5) {
            self.log(format!("{what} fails"));
            return Err(Stop::Failed);
        }
        let result = write(self)?;
        self.log(what);
        if self.setup.crash_at == Some(self.written) || self.faults.chance(self.setup.crashes) {
            return Err(Stop::Crash);
        }
        if fails {
            self.log("the answer is lost".into());
            return Err(Stop::Failed);
        }
        Ok(result)
    }

    fn resolve(&mut self, object: &OptimizationRollout) -> Result<Rollout, Refusal> {
        let generation = object.metadata.generation.unwrap_or_default();
        if let Some((known, resolved)) = &self.resolved
            && *known == generation
        {
            return resolved.clone();
        }
        let defaults = Defaults {
            runtime_image: "synthex-runtime:dev".into(),
            prometheus_url: "http://prometheus.monitoring.svc:9090".into(),
        };
        let resolved = resolve::resolve(object, &defaults);
        self.resolved = Some((generation, resolved.clone()));
        resolved
    }

    fn observe(&mut self, object: &OptimizationRollout, asks: bool) -> (Snapshot, Objects) {
        let annotations = object.metadata.annotations.clone().unwrap_or_default();
        let mut snapshot = Snapshot {
            status: object.status.clone().unwrap_or_default(),
            verbs: annotations.iter().filter_map(|(key, value)| Verb::parse(key, value)).collect(),
            deleting_since: object.metadata.deletion_timestamp.as_ref().map(|time| time.0),
            refused: None,
            variants: BTreeMap::new(),
        };
        let objects = self.cluster.objects();
        self.cluster.deployments_seen(&mut snapshot.variants);
        // The lists are not of one moment.
        if self.faults.chance(self.setup.slow / 2.0) {
            self.second();
        }
        self.cluster.pods_seen(&mut snapshot.variants, asks, at, self.now);
        self.read = self.cluster.serving();
        self.pass_time();
        (snapshot, objects)
    }

    fn reconcile(&mut self) -> Result<i64, Stop> {
        let Some(object) = self.object.clone() else {
            self.operator = Operator::default();
            return Ok(i64::MAX);
        };
        let deleting = object.metadata.deletion_timestamp.is_some();
        let has_finalizer = object.metadata.finalizers.as_ref().is_some_and(|f| !f.is_empty());
        if !deleting && !has_finalizer {
            self.written("finalizer".into(), |world| {
                world.changes(&object, |stored| {
                    stored.metadata.finalizers = Some(vec!["synthex.io/rollout".into()]);
                })
            })?;
            return Ok(self.now);
        }
        let resolved = self.resolve(&object);
        let asks = resolved.is_ok() && object.status.as_ref().is_some_and(machine::asks_pods);
        let (mut status, judged_at) = (object.status.clone().unwrap_or_default(), self.clock());
        let judged = match &resolved {
            Ok(rollout) => self.judge(rollout, &mut status, judged_at),
            Err(_) => vec![],
        };
        let (mut snapshot, objects) = self.observe(&object, asks);
        snapshot.status = status;
        let now = self.clock();
        let plan = match &resolved {
            Err(refusal) => machine::refuse(&object, &snapshot, refusal, now),
            Ok(rollout) => {
                let plan = machine::step(rollout, &snapshot, judged.clone(), now);
                let foreign: Vec<_> = writes::creates(&objects, &plan)
                    .into_iter()
                    .filter(|key| self.checks.foreign.contains_key(key))
                    .map(|(kind, name)| format!("{kind} {name}"))
                    .collect();
                if foreign.is_empty() {
                    if !deleting {
                        self.check_step(
                            rollout,
                            &object.status.clone().unwrap_or_default(),
                            &judged,
                            &plan,
                            judged_at,
                        );
                    }
                    plan
                } else {
                    machine::refuse(&object, &snapshot, &machine::conflict(&foreign), now)
                }
            }
        };
        if !deleting {
            let step = resolved.as_ref().map_or(1, |rollout| rollout.analysis.interval.as_secs() as i64);
            self.record(&object, &plan, step)?;
        }
        let writes = match deleting && plan.release && object.spec.deletion_policy == DeletionPolicy::Delete {
            true => writes::removals("w", &objects, &Variant::ALL),
            false => writes::writes("w", &snapshot, &objects, &plan, now),
        };
        let applied = match self.apply(resolved.as_ref().ok(), &writes) {
            Err(Stop::Crash) => return Err(Stop::Crash),
            applied => applied,
        };
        if !deleting {
            self.announce(&plan)?;
            self.answer(&object, &plan)?;
        }
        applied?;
        if deleting && plan.release {
            self.written("finalizer removed".into(), |world| {
                world.changes(&object, |_| {})?;
                world.check_release(&object);
                world.object = None;
                Ok(())
            })?;
            self.operator = Operator::default();
        }
        // As Action::requeue does: from now, and never in the past.
        let wake = plan.wake.as_second() + i64::from(plan.wake.subsec_nanosecond() > 0);
        Ok(wake.max(self.now + 1))
    }

    fn judge(&mut self, rollout: &Rollout, status: &mut RolloutStatus, now: Timestamp) -> Vec<KpiStatus> {
        let key = machine::evidence_key(status);
        if let Some((known, kpis)) = &self.operator.evidence
            && *known == key
        {
            status.kpis.clone_from(kpis);
        }
        let mut unlearned = vec![];
        for lesson in machine::lessons(rollout, status, now) {
            let asked = lesson.queries().into_iter().map(|query| {
                self.prometheus.range(&query, lesson.from(), lesson.until, lesson.block, self.now)
            });
            let learned = lesson.learn(&asked.collect::<Vec<_>>());
            unlearned.extend(machine::learn(status, &lesson, learned));
        }
        let Some(mut inquiry) = machine::inquiry(rollout, status, now) else { return status.kpis.clone() };
        self.pass_time();
        inquiry.waiting.retain(|kpi| !unlearned.iter().any(|unlearned| unlearned.name == kpi.name));
        let mut judged = self.ask(&inquiry);
        judged.extend(inquiry.waiting);
        judged.extend(unlearned);
        judged
    }

    fn ask(&self, inquiry: &machine::Inquiry) -> Vec<KpiStatus> {
        inquiry
            .trials
            .iter()
            .map(|(trial, evidence)| {
                let mut evidence = evidence.clone();
                let mut health = judge::AnswerHealth::Good;
                let queries = trial.queries();
                for (from, until) in trial.ranges(&evidence, inquiry.until) {
                    let answers: Vec<_> = queries
                        .iter()
                        .map(|query| self.prometheus.range(query, from, until, inquiry.step, self.now))
                        .collect();
                    (evidence, health) = trial.fold(evidence, &answers, from, until);
                    if evidence.last_tick < until {
                        break;
                    }
                }
                trial.judge(&evidence, &health)
            })
            .collect()
    }

    fn apply(&mut self, rollout: Option<&Rollout>, writes: &[Write<'_>]) -> Result<(), Stop> {
        for write in writes {
            let what = match write {
                Write::Apply(body) => {
                    let (kind, name) = writes::key(body);
                    format!("apply {kind} {name} replicas {}", body["spec"]["replicas"])
                }
                Write::Scale { deployment, replicas } => format!("scale {deployment} to {replicas}"),
                Write::Touch { pod, .. } => format!("touch {pod}"),
                Write::Delete { kind, name } => format!("delete {kind} {name}"),
            };
            self.written(what, |world| {
                world.check_write(rollout, write);
                world.cluster.write(write, world.now);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn record(&mut self, object: &OptimizationRollout, plan: &Plan, step: i64) -> Result<(), Stop> {
        let stored = object.status.clone().unwrap_or_default();
        if worth_writing(&stored, &plan.status, step) || object.status.is_none() {
            let last = plan.status.decisions.last().map_or(0, |decision| decision.id);
            let stage = plan.status.stage.as_ref();
            let what = format!(
                "status {:?} {} {:?} decision {last}",
                plan.status.phase,
                stage.map(|stage| format!("{}#{}", stage.name, stage.attempt)).unwrap_or_default(),
                stage.map(|stage| stage.step),
            );
            self.written(what, |world| {
                // What is stored is what JSON holds.
                let text = serde_json::to_string(&plan.status).expect("a status is JSON");
                let status: RolloutStatus = serde_json::from_str(&text).expect("a status reads back");
                world.changes(object, |stored| stored.status = Some(status.clone()))?;
                world.status_writes += 1;
                world.check_status(&status);
                Ok(())
            })?;
        }
        self.operator.evidence = Some((machine::evidence_key(&plan.status), plan.status.kpis.clone()));
        Ok(())
    }

    fn announce(&mut self, plan: &Plan) -> Result<(), Stop> {
        for decision in machine::unannounced(&plan.status, self.operator.announced, self.clock()) {
            let name = format!("w.5e8a4c1e.{}", decision.id);
            let text = format!("{:?} {}", decision.what, decision.why);
            self.written(format!("event {name} {text}"), |world| {
                match world.events.get(&name) {
                    Some(other) if *other != text => {
                        world.violated(format!("I9: event {name} twice: {other:?}, then {text:?}"));
                    }
                    Some(_) => {}
                    None => drop(world.events.insert(name.clone(), text.clone())),
                }
                Ok(())
            })?;
        }
        self.operator.announced = Some(plan.status.decisions.last().map_or(0, |decision| decision.id));
        Ok(())
    }

    fn answer(&mut self, read: &OptimizationRollout, plan: &Plan) -> Result<(), Stop> {
        let read = read.metadata.annotations.clone().unwrap_or_default();
        for verb in &plan.answered {
            let annotation = verb.annotation();
            self.written(format!("remove {annotation}"), |world| {
                let Some(object) = &mut world.object else { return Err(Stop::Failed) };
                let annotations = object.metadata.annotations.get_or_insert_default();
                // A JSON patch with a test: another word that was put since stays.
                if annotations.get(annotation) == read.get(annotation) {
                    annotations.remove(annotation);
                    world.version += 1;
                    object.metadata.resource_version = Some(world.version.to_string());
                    world.wake();
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Replaces the object if nobody has changed it since it was read.
    fn changes(
        &mut self,
        read: &OptimizationRollout,
        change: impl FnOnce(&mut OptimizationRollout),
    ) -> Result<(), Stop> {
        let Some(stored) = &mut self.object else { return Err(Stop::Failed) };
        if stored.metadata.resource_version != read.metadata.resource_version {
            self.log("conflict".into());
            return Err(Stop::Conflict);
        }
        change(stored);
        self.version += 1;
        stored.metadata.resource_version = Some(self.version.to_string());
        self.wake();
        Ok(())
    }

    // ---- the checks

    fn every_second(&mut self) {
        let Some(object) = &self.object else { return };
        let n = object.spec.workload.runtime.replicas;
        let serving = self.cluster.serving();
        if self.now < self.meddled_until {
            self.cluster.floor = 0;
        } else if !self.checks.deleting || object.spec.deletion_policy == DeletionPolicy::Orphan {
            self.cluster.floor = if serving >= n { n } else { self.cluster.floor.min(n) };
        } else {
            self.cluster.floor = 0;
        }
        let excused = self.cluster.broken() + self.cluster.own_losses.len() as i32;
        if serving + excused < self.cluster.floor {
            let floor = self.cluster.floor;
            self.violated(format!(
                "I4: {serving} pods serve ({excused} broke by themselves), {floor} are the user's"
            ));
        }
        for fault in std::mem::take(&mut self.cluster.faults) {
            self.violated(fault);
        }
    }

    fn weight_of(rollout: &Rollout, name: &str) -> Option<i32> {
        let stage = rollout.stages.iter().find(|stage| stage.name == name)?;
        Some(match stage.place {
            Place::Staging(_) => 0,
            Place::Weight(weight) => weight,
        })
    }

    /// I1 and I6: a stage is left upwards only with proof, found again from nothing but Prometheus.
    fn check_step(
        &mut self,
        rollout: &Rollout,
        before: &RolloutStatus,
        judged: &[KpiStatus],
        plan: &Plan,
        now: Timestamp,
    ) {
        let last = before.decisions.last().map_or(0, |decision| decision.id);
        let new: Vec<_> = plan.status.decisions.iter().filter(|decision| decision.id > last).collect();
        let passed = new.iter().any(|decision| decision.what == What::StagePassed);
        if let Some(stage) = &before.stage {
            let licensed = match stage.step {
                Step::Promoting => 101,
                // The user's own edit of the weight is the user's word.
                _ => Self::weight_of(rollout, &stage.name).unwrap_or(self.checks.license),
            };
            self.checks.license = licensed;
        } else {
            self.checks.license = rollout.stages.first().map_or(0, |stage| match stage.place {
                Place::Staging(_) => 0,
                Place::Weight(weight) => weight,
            });
        }
        let Some(after) = &plan.status.stage else { return };
        let target = match after.step {
            Step::Promoting => 101,
            Step::Restoring => 0,
            _ => Self::weight_of(rollout, &after.name).unwrap_or_default(),
        };
        if target <= self.checks.license && !passed {
            return;
        }
        let Some(stage) = &before.stage else { return };
        // The user has removed every stage that exposes as little: the first of the rest begins, as in a new pass.
        let removed = !rollout.stages.iter().any(|planned| planned.name == stage.name);
        if !passed && self.checks.stages_removed && removed && after.index == 0 {
            let none_below = rollout.stages.iter().all(|planned| {
                Self::weight_of(rollout, &planned.name).unwrap_or_default() > self.checks.license
            });
            if none_below {
                self.checks.license = target;
                return;
            }
        }
        if !passed {
            let allowed = self.checks.license;
            return self.violated(format!(
                "I1: from stage {} at {allowed} % to {} at {target} % without a pass",
                stage.name, after.name
            ));
        }
        self.checks.license = target;
        let forced = stage.promoted == Some(Promotion::Forced)
            || new.iter().any(|decision| decision.what == What::PromotedByUser);
        self.check_proof(rollout, before, judged, forced, now);
        self.checks.edited_in_stage = false;
    }

    fn check_proof(
        &mut self,
        rollout: &Rollout,
        before: &RolloutStatus,
        live: &[KpiStatus],
        forced: bool,
        now: Timestamp,
    ) {
        let Some(stage) = before.stage.clone() else { return };
        let fresh = RolloutStatus { kpis: vec![], ..before.clone() };
        // Where the pass was planned on another grid point than now, the evidence is that of a moment ago; both must pass.
        let Some(inquiry) = machine::inquiry(rollout, &fresh, now) else {
            return self.violated(format!("I1: stage {} passes before anything could be judged", stage.name));
        };
        let judged = self.ask(&inquiry);
        for ((Trial { kpi, .. }, _), found) in inquiry.trials.iter().zip(&judged) {
            let bad = match found.verdict {
                Verdict::Pass => false,
                Verdict::Inconclusive => kpi.required && !forced,
                Verdict::NoData | Verdict::TelemetryDown => kpi.required,
                Verdict::Fail => true,
            };
            // An edit of a threshold counts for later evidence only: the whole judged by the new one may differ.
            if bad && !self.checks.edited_in_stage {
                self.violated(format!(
                    "I1: stage {} passes while {} is {:?}: {}",
                    stage.name, kpi.name, found.verdict, found.message
                ));
            }
            let live =
                live.iter().find(|known| known.name == kpi.name).and_then(|known| known.evidence.clone());
            if live.is_some() && live != found.evidence && !self.checks.edited_in_stage {
                self.violated(format!(
                    "I5: evidence of {} gathered step by step {live:?} is not that of one look {:?}",
                    kpi.name, found.evidence
                ));
            }
        }
        let counted = inquiry.trials.iter().zip(&judged);
        let counted: Vec<_> =
            counted.filter_map(|((trial, _), found)| Some((&trial.kpi, found.evidence.as_ref()?))).collect();
        let observed = judge::observed(counted, inquiry.step);
        let planned = rollout.stages.iter().find(|planned| planned.name == stage.name);
        let bake = planned.map_or(0, |planned| planned.duration.as_secs() as i64);
        let exposed = stage.exposed_at.as_ref().map_or(self.now, |time| time.0.as_second());
        let on_the_clock = self.now - exposed - rollout.analysis.warm_up.as_secs() as i64;
        if !forced && (observed < bake || on_the_clock < bake) {
            self.violated(format!(
                "I6: stage {} passes after {observed} s of samples and {on_the_clock} s on the clock, not {bake} s",
                stage.name
            ));
        }
    }

    /// I4 once the object is gone: what it owned goes with it, so that stable alone serves as many as are the user's.
    fn check_release(&mut self, object: &OptimizationRollout) {
        let since = object.metadata.deletion_timestamp.as_ref().map_or(self.now, |time| time.0.as_second());
        if object.spec.deletion_policy == DeletionPolicy::Delete
            || !self.cluster.deployments.contains_key("w")
            || self.now < self.meddled_until
            || self.now - since >= 600
        {
            return;
        }
        let serving = self.cluster.serving_of("w");
        let excused = self.cluster.broken() + self.cluster.own_losses.len() as i32;
        if serving + excused < self.cluster.floor {
            let floor = self.cluster.floor;
            self.violated(format!(
                "I4: the rollout is let go with {serving} pods of stable, {floor} are the user's"
            ));
        }
    }

    /// I1, I2 and I8 at every write to a child.
    fn check_write(&mut self, rollout: Option<&Rollout>, write: &Write<'_>) {
        match write {
            Write::Scale { deployment, .. } => {
                self.cluster.read = (self.now, self.read);
                if deployment != "w" || !self.checks.deleting {
                    self.violated(format!("I4: {deployment} is scaled, and the rollout does not end"));
                }
            }
            Write::Touch { pod, .. } => {
                let ours = Variant::ALL
                    .iter()
                    .any(|variant| judge::Arm { deployment: variant.object_name("w"), pods: 1 }.owns(pod));
                if !ours {
                    self.violated(format!("I8: pod {pod} of somebody else is touched"));
                }
            }
            Write::Delete { kind, name } => {
                self.cluster.read = (self.now, self.read);
                if self.checks.foreign.contains_key(&((*kind).to_owned(), name.clone())) {
                    self.violated(format!("I8: {kind} {name} of somebody else is deleted"));
                }
            }
            Write::Apply(body) => {
                let (kind, name) = writes::key(body);
                if self.checks.foreign.contains_key(&(kind.clone(), name.clone())) {
                    self.violated(format!("I8: {kind} {name} of somebody else is written"));
                }
                if kind == "ConfigMap" {
                    self.check_config(&name, body);
                }
                if let ("Deployment", Some(rollout)) = (kind.as_str(), rollout) {
                    self.cluster.read = (self.now, self.read);
                    self.check_replicas(rollout, &name, body);
                }
            }
        }
    }

    fn check_config(&mut self, name: &str, body: &serde_json::Value) {
        let on: Vec<String> =
            self.cluster.on_in(body).iter().map(|index| self.cluster.known[*index].name.clone()).collect();
        for optimization in &on {
            if self.checks.banned.contains(optimization) {
                self.violated(format!("I2: {optimization} was rolled back and is on again in {name}"));
            }
        }
        let status = self.object.as_ref().and_then(|object| object.status.clone()).unwrap_or_default();
        let promoted = machine::names(&status, OptimizationState::Promoted);
        if matches!(name, "w" | "w-baseline")
            && self.checks.license < 101
            && let Some(optimization) = on.iter().find(|name| !promoted.contains(*name))
            && !self.checks.edited
        {
            self.violated(format!("I1: {optimization} is on in {name} before it was promoted"));
        }
    }

    fn check_replicas(&mut self, rollout: &Rollout, name: &str, body: &serde_json::Value) {
        if name != "w-canary" {
            return;
        }
        let wanted = body["spec"]["replicas"].as_i64().unwrap_or_default() as i32;
        let there = self.cluster.deployments.get(name).map_or(0, |deployment| deployment.replicas);
        let license = self.checks.license.min(100);
        let allowed =
            if license == 0 { 0 } else { Replicas::at(rollout.replicas, license, rollout.comparison).canary };
        if wanted > there && wanted > allowed {
            self.violated(format!(
                "I1: the canary gets {wanted} pods where {license} % of proof allow {allowed}"
            ));
        }
    }

    /// I2, I7 and I9 at every stored status.
    fn check_status(&mut self, status: &RolloutStatus) {
        for decision in &status.decisions {
            let entry = (decision.what, decision.why.clone());
            match self.checks.stored.get(&decision.id) {
                Some(known) if *known != entry => {
                    self.violated(format!("I9: decision {} was {known:?} and is {entry:?}", decision.id));
                }
                Some(_) => {}
                None => {
                    if self.checks.stored.keys().last().is_some_and(|last| *last + 1 != decision.id) {
                        self.violated(format!("I9: decision {} does not follow the last one", decision.id));
                    }
                    if self.checks.decided.last() == Some(&entry) && entry.0 != What::VerbRefused {
                        self.violated(format!("I9: {entry:?} is decided twice"));
                    }
                    self.checks.stored.insert(decision.id, entry.clone());
                    self.checks.decided.push(entry);
                }
            }
        }
        let refusals = self.checks.decided.iter().filter(|(what, _)| *what == What::VerbRefused).count();
        if refusals > self.checks.verbs {
            self.violated(format!("I9: {refusals} refusals of {} verbs", self.checks.verbs));
        }
        for optimization in &status.optimizations {
            match optimization.state {
                OptimizationState::RolledBack => drop(self.checks.banned.insert(optimization.name.clone())),
                state if self.checks.banned.contains(&optimization.name) => {
                    let name = &optimization.name;
                    self.violated(format!(
                        "I2: {name} was rolled back and is {state:?} without a user's word"
                    ));
                }
                _ => {}
            }
        }
        let reason = status
            .conditions
            .iter()
            .find(|condition| condition.type_ == "Ready")
            .map(|condition| condition.message.clone())
            .unwrap_or_default();
        if status.next_decision_at.is_none() || (reason.is_empty() && self.checks.ever) {
            self.violated(format!("I7: {:?} without a reason or a wake time", status.phase));
        }
        self.checks.ever = true;
    }

    fn last_checks(&mut self) {
        if self.up_at <= self.now && self.object.is_some() && self.due == i64::MAX {
            self.violated("I7: nothing will ever wake the operator again".into());
        }
    }
}

/// A time as the operator's clock shows it.
fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap_or_default() + SignedDuration::from_millis(370)
}
