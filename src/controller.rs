//! Watches and wiring: what wakes a reconciliation, and the order judge → observe → step → apply → report.
//!
//! Takes no decision of its own: those are in [`crate::decision`]. Keeps no memory but caches that a restart may lose.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, Client, ResourceExt,
    api::PartialObjectMeta,
    runtime::{
        Controller,
        controller::{Action, Config},
        reflector::ObjectRef,
        watcher,
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{DeletionPolicy, KpiStatus, OptimizationRollout, RolloutStatus},
    decision::{
        judge::{self, Trial},
        machine::{self, Plan},
        render::{MANAGED_BY, ROLLOUT_LABEL, Variant},
        report::worth_writing,
        resolve::{self, Defaults, Rollout},
        writes,
    },
    effects::{self, Error, apply, clock, observe, prometheus::Prometheus, report},
    metrics::Metrics,
};

/// Rollouts that are reconciled at the same time. Without a bound, a resync of many would starve the health server.
const CONCURRENCY: u16 = 8;
/// How soon a reconciliation that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Prometheus servers whose clients are kept.
const CLIENTS: usize = 64;

/// What every reconciliation shares.
pub struct Context {
    client: Client,
    http: reqwest::Client,
    defaults: Defaults,
    metrics: Arc<Metrics>,
    /// The KPIs of the last plan that was recorded, by uid: evidence since the last checkpoint. Lost at a restart, and then folded
    /// again from Prometheus.
    evidence: Mutex<HashMap<String, (String, Vec<KpiStatus>)>>,
    /// What the API server said against the last writes, where it refused one, by uid. Absent before the first.
    refused: Mutex<HashMap<String, Option<String>>>,
    /// Highest decision announced, by uid.
    announced: Mutex<HashMap<String, i64>>,
    prometheus: Mutex<BTreeMap<(String, Duration), Prometheus>>,
}

impl Context {
    /// A context for the cluster behind `client`.
    ///
    /// # Errors
    /// When the HTTP client that asks pods for their configuration cannot be built.
    pub fn new(client: Client, defaults: Defaults, metrics: Arc<Metrics>) -> Result<Self, reqwest::Error> {
        Ok(Self {
            client,
            // Pods are asked by address over plain HTTP: no proxy, no redirect that leads elsewhere, and no need of the system's
            // CA certificates, which a minimal image does not have.
            http: reqwest::Client::builder()
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                .tls_certs_only([])
                .build()?,
            defaults,
            metrics,
            evidence: Mutex::default(),
            refused: Mutex::default(),
            announced: Mutex::default(),
            prometheus: Mutex::default(),
        })
    }
}

/// Runs the controller until `stop`; reconciliations under way are finished.
pub async fn run(context: Arc<Context>, namespace: Option<String>, stop: CancellationToken) {
    let client = context.client.clone();
    let config = watcher::Config::default();
    let ours = watcher::Config::default().labels(&format!("{}={}", MANAGED_BY.0, MANAGED_BY.1));
    Controller::new(scoped::<OptimizationRollout>(&client, namespace.as_deref()), config)
        .watches(scoped::<Deployment>(&client, namespace.as_deref()), ours.clone(), rollout_of)
        .watches(scoped::<Pod>(&client, namespace.as_deref()), ours, rollout_of)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, retry, context)
        .for_each(|result| async {
            // A failed reconciliation has been counted and logged; here a watch that fails is heard.
            if let Err(error) = result
                && !matches!(error, kube::runtime::controller::Error::ReconcilerFailed(..))
            {
                tracing::warn!(%error, "watch");
            }
        })
        .await;
}

/// The objects of a kind in a namespace, or in all. Metadata only: what is decided upon is read afresh by each reconciliation.
pub fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<PartialObjectMeta<K>>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn rollout_of<K: kube::Resource<DynamicType = ()>>(
    child: PartialObjectMeta<K>,
) -> Option<ObjectRef<PartialObjectMeta<OptimizationRollout>>> {
    let name = child.labels().get(ROLLOUT_LABEL)?;
    Some(ObjectRef::new(name).within(&child.namespace()?))
}

fn retry(
    object: Arc<PartialObjectMeta<OptimizationRollout>>,
    error: &Error,
    context: Arc<Context>,
) -> Action {
    context.metrics.failure(error.kind());
    if error.is_conflict() {
        return Action::requeue(Duration::from_millis(100));
    }
    tracing::warn!(namespace = object.namespace(), name = object.name_any(), %error, "reconciliation failed; it is tried again");
    Action::requeue(RETRY)
}

async fn reconcile(
    meta: Arc<PartialObjectMeta<OptimizationRollout>>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let timer = context.metrics.reconciliation();
    let api =
        Api::<OptimizationRollout>::namespaced(context.client.clone(), &meta.namespace().unwrap_or_default());
    // The watch may lag behind our own writes; a decision on an old status would undo the last one.
    let Some(object) = effects::timed("get", api.get_opt(&meta.name_any())).await? else {
        context.forget(&meta.uid().unwrap_or_default());
        return Ok(Action::await_change());
    };
    if object.metadata.deletion_timestamp.is_none()
        && !object.finalizers().iter().any(|f| f == report::FINALIZER)
    {
        report::finalizer(&context.client, &object, true).await?;
        return Ok(Action::requeue(Duration::ZERO));
    }
    let resolved = resolve::resolve(&object, &context.defaults);
    let asks = resolved
        .as_ref()
        .ok()
        .filter(|_| object.status.as_ref().is_some_and(machine::asks_pods))
        .map(|rollout| rollout.admin_port);
    // Prometheus first, which may take its time: what is decided upon pods is to be as they are now.
    let mut status = object.status.clone().unwrap_or_default();
    let judged = match &resolved {
        Ok(rollout) => context.judge(rollout, &mut status, clock::now()).await,
        Err(_) => vec![],
    };
    let mut world = observe::observe(&context.client, &context.http, &object, asks).await?;
    world.snapshot.status = status;
    let uid = object.uid().unwrap_or_default();
    // After a restart what the status says of it stands until it is tried again.
    let refused = lock(&context.refused).get(&uid).cloned();
    world.snapshot.refused = refused.unwrap_or_else(|| machine::refused_before(&world.snapshot.status));
    let now = clock::now();
    let plan = match &resolved {
        Err(refusal) => machine::refuse(&object, &world.snapshot, refusal, now),
        Ok(rollout) => {
            let plan = machine::step(rollout, &world.snapshot, judged, now);
            let created = writes::creates(&world.objects, &plan);
            let foreign = observe::foreign(&context.client, &rollout.namespace, &created).await?;
            match foreign.is_empty() {
                true => plan,
                false => machine::refuse(&object, &world.snapshot, &machine::conflict(&foreign), now),
            }
        }
    };
    let deleting = object.metadata.deletion_timestamp.is_some();
    if !deleting {
        let step = resolved.as_ref().map_or(1, |rollout| rollout.analysis.interval.as_secs());
        // What was decided is written before it is done: nothing is done that a restart does not know, or that the user has
        // overruled meanwhile.
        context.record(&object, &plan, step).await?;
    }
    let name = object.name_any();
    let writes = match deleting && plan.release && object.spec.deletion_policy == DeletionPolicy::Delete {
        true => writes::removals(&name, &world.objects, &Variant::ALL),
        false => writes::writes(&name, &world.snapshot, &world.objects, &plan, now),
    };
    let applied = apply::apply(&context.client, &object.namespace().unwrap_or_default(), &writes).await;
    let refused = applied.as_ref().err().and_then(Error::refused);
    if applied.is_ok() || refused.is_some() {
        lock(&context.refused).insert(uid.clone(), refused);
    }
    // What was decided is told, though it could not be done yet.
    if !deleting {
        context.announce(&object, &plan).await?;
        report::answer(&context.client, &object, &plan.answered).await?;
    }
    applied?;
    if deleting && plan.release {
        report::finalizer(&context.client, &object, false).await?;
        context.forget(&uid);
    }
    drop(timer);
    // Nobody tells that what was refused has been accepted.
    if world.snapshot.refused.is_some() && !deleting {
        return Ok(Action::requeue(Duration::ZERO));
    }
    let wait = plan.wake.duration_since(clock::now());
    Ok(Action::requeue(Duration::try_from(wait).unwrap_or(Duration::ZERO)))
}

impl Context {
    /// Asks Prometheus for the ticks since the last ones judged, and judges. Puts the evidence gathered since the checkpoint
    /// into `status` first.
    async fn judge(
        &self,
        rollout: &Rollout,
        status: &mut RolloutStatus,
        now: k8s_openapi::jiff::Timestamp,
    ) -> Vec<KpiStatus> {
        let key = machine::evidence_key(status);
        if let Some((known, kpis)) = lock(&self.evidence).get(&rollout.uid)
            && *known == key
        {
            status.kpis.clone_from(kpis);
        }
        let prometheus = self.prometheus(rollout).map(|prometheus| prometheus.round());
        let unlearned = learn(&prometheus, rollout, status, now).await;
        let Some(mut inquiry) = machine::inquiry(rollout, status, now) else { return status.kpis.clone() };
        let mut judged = match &prometheus {
            Ok(prometheus) => {
                let mut rounds = vec![];
                for (trial, evidence) in &inquiry.trials {
                    let known = status.kpis.iter().find(|known| known.name == trial.kpi.name);
                    rounds.push(judge_one(prometheus, trial, evidence.clone(), inquiry.until, known));
                }
                stream::iter(rounds).buffered(4).collect::<Vec<_>>().await
            }
            Err(why) => {
                let health = judge::AnswerHealth::Down(why.clone());
                inquiry.trials.iter().map(|(trial, evidence)| trial.judge(evidence, &health)).collect()
            }
        };
        inquiry.waiting.retain(|kpi| !unlearned.iter().any(|unlearned| unlearned.name == kpi.name));
        judged.extend(inquiry.waiting);
        judged.extend(unlearned);
        for kpi in &judged {
            self.metrics.judged(kpi.verdict);
        }
        judged
    }

    fn prometheus(&self, rollout: &Rollout) -> Result<Prometheus, String> {
        let timeout = rollout.prometheus_timeout.std();
        let key = (rollout.prometheus_url.clone(), timeout);
        let mut clients = lock(&self.prometheus);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = Prometheus::new(&rollout.prometheus_url, timeout).map_err(|error| error.to_string())?;
        if clients.len() >= CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// Writes the status where that is worth a write, and keeps what of it is not.
    async fn record(&self, object: &OptimizationRollout, plan: &Plan, step: u64) -> Result<(), Error> {
        let stored = object.status.clone().unwrap_or_default();
        let step = i64::try_from(step).unwrap_or(1);
        if worth_writing(&stored, &plan.status, step) || object.status.is_none() {
            report::write_status(&self.client, object, plan.status.clone()).await?;
        }
        let known = (machine::evidence_key(&plan.status), plan.status.kpis.clone());
        lock(&self.evidence).insert(object.uid().unwrap_or_default(), known);
        Ok(())
    }

    /// Makes events of the decisions that have none yet.
    async fn announce(&self, object: &OptimizationRollout, plan: &Plan) -> Result<(), Error> {
        let uid = object.uid().unwrap_or_default();
        let announced = lock(&self.announced).get(&uid).copied();
        for decision in machine::unannounced(&plan.status, announced, clock::now()) {
            tracing::info!(
                namespace = object.namespace(),
                name = object.name_any(),
                id = decision.id,
                decision = ?decision.what,
                why = decision.why,
                "decided"
            );
            report::announce(&self.client, object, decision).await?;
            self.metrics.decided(decision.what);
        }
        lock(&self.announced).insert(uid, plan.status.decisions.last().map_or(0, |decision| decision.id));
        Ok(())
    }

    fn forget(&self, uid: &str) {
        lock(&self.evidence).remove(uid);
        lock(&self.refused).remove(uid);
        lock(&self.announced).remove(uid);
    }
}

/// Learns what is to be known of KPIs before their evidence begins, into the status. Gives back what is said of those of which nothing
/// can be learned yet.
async fn learn(
    prometheus: &Result<Prometheus, String>,
    rollout: &Rollout,
    status: &mut RolloutStatus,
    now: k8s_openapi::jiff::Timestamp,
) -> Vec<KpiStatus> {
    let rounds = machine::lessons(rollout, status, now).into_iter().map(|lesson| async move {
        let learned = match prometheus {
            Ok(prometheus) => {
                let queries = lesson.queries();
                let asked = queries
                    .iter()
                    .map(|query| prometheus.range(query, lesson.from(), lesson.until, lesson.block));
                lesson.learn(&futures::future::join_all(asked).await)
            }
            Err(why) => Err(judge::AnswerHealth::Down(why.clone())),
        };
        (lesson, learned)
    });
    let mut unlearned = vec![];
    for (lesson, learned) in stream::iter(rounds).buffered(4).collect::<Vec<_>>().await {
        unlearned.extend(machine::learn(status, &lesson, learned));
    }
    unlearned
}

/// Folds the ticks since the last one into the evidence of one KPI, and judges it.
async fn judge_one(
    prometheus: &Prometheus,
    trial: &Trial,
    mut evidence: crate::api::Evidence,
    until: judge::Tick,
    known: Option<&KpiStatus>,
) -> KpiStatus {
    // Woken between two ticks: what was said of the last one stands, its faults included.
    if let Some(known) = known.filter(|_| evidence.last_tick >= until) {
        return known.clone();
    }
    let mut health = judge::AnswerHealth::Good;
    let queries = trial.queries();
    for (from, until) in trial.ranges(&evidence, until) {
        let asked = queries
            .iter()
            .map(|query| prometheus.range_within(query, from, until, trial.step, trial.lookback()));
        let answers = futures::future::join_all(asked).await;
        (evidence, health) = trial.fold(evidence, &answers, from, until);
        if evidence.last_tick < until {
            break;
        }
    }
    trial.judge(&evidence, &health)
}

/// A lock whose data stays sound when a holder panics: every change is one insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
