//! The part of Kubernetes that a rollout sees: Deployments that roll surge-first, pods that start, serve, drain and break,
//! ConfigMaps that reach pods late, nodes that go away; and the traffic on the pods. One step is one second.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use synthex_operator::decision::{
    render::{PROMOTED_ANNOTATION, ROLLED_BACK_ANNOTATION, TEMPLATE_ANNOTATION, VARIANT_LABEL, Variant},
    snapshot::{self, Observed},
    writes::{Objects, Write, key},
};

use super::{prometheus::Counters, rng::Rng};

const NODES: usize = 3;
/// Seconds after which pods of a node that is away are given up.
const GIVEN_UP: i64 = 60;

/// What an optimization does to the pods on which it is on.
#[derive(Clone, Debug, Default)]
pub struct Effect {
    /// Factor on the rate of upstream errors, which fail queries too.
    pub upstream: f64,
    /// Factor on the rate of query errors.
    pub query: f64,
    /// Crashes per pod and second.
    pub crash: f64,
    /// Seconds of running until the pod is killed for want of memory; 0: never.
    pub oom_after: i64,
    /// Never Ready again after this many seconds of running; 0: always Ready.
    pub unready_after: i64,
    /// Value of the gauge.
    pub gauge: f64,
    /// Does harm in production only, as under its heavier load.
    pub production_only: bool,
}

impl Effect {
    pub fn none() -> Self {
        Self { upstream: 1.0, query: 1.0, ..Self::default() }
    }
}

/// An optimization as the world knows it: one entry for each configuration that it may have.
#[derive(Clone, Debug)]
pub struct Known {
    pub name: String,
    /// What stands in the runtime's configuration while it is on.
    pub patch: Value,
    pub effect: Effect,
}

/// Traffic on production and staging.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// Queries per second on all of production.
    pub rate: f64,
    /// Queries per second on each arm of staging.
    pub staging_rate: f64,
    pub query_errors: f64,
    pub upstream_errors: f64,
    /// Standard deviation of the logarithm of the error rate between pods.
    pub heterogeneity: f64,
    /// Amplitude of the common drift of error rates, as a share.
    pub drift: f64,
    /// Chance per second that a burst of errors begins, common to all pods.
    pub bursts: f64,
}

#[derive(Clone)]
pub struct Deployment {
    pub body: Value,
    pub name: String,
    pub variant: Variant,
    uid: u64,
    pub replicas: i32,
    template: String,
    /// What the controller has seen of the specification.
    seen: Option<(i32, String)>,
    /// When it sees what stands there now.
    due: i64,
    /// ReplicaSets: template and size, the oldest first.
    sets: Vec<(String, i32)>,
}

#[derive(Clone)]
pub struct Pod {
    pub name: String,
    deployment: String,
    owner: u64,
    pub variant: Variant,
    template: String,
    pub node: usize,
    born: i64,
    start_at: i64,
    pub started: Option<i64>,
    ready_at: i64,
    pub ready: bool,
    unready_since: Option<i64>,
    touched: String,
    /// Told to end; the time at which it is gone.
    pub terminating: Option<i64>,
    pub failed: bool,
    pub restarts: i32,
    oom: bool,
    pub config: Option<String>,
    config_due: Option<i64>,
    /// Indices of the known optimizations that are on.
    pub on: Vec<usize>,
    /// When a leak that has begun kills the container; switching off what leaks does not bring the memory back.
    leak: Option<i64>,
    unevenness: f64,
    share: f64,
    pub counters: Counters,
    /// Stopped serving without our doing.
    broken: bool,
}

impl Pod {
    pub fn running(&self, now: i64) -> bool {
        self.started.is_some_and(|at| at <= now) && !self.failed
    }
}

pub struct Cluster {
    pub deployments: BTreeMap<String, Deployment>,
    pub config_maps: BTreeMap<String, Value>,
    pub services: BTreeMap<String, Value>,
    pub pods: BTreeMap<String, Pod>,
    pub down: BTreeSet<usize>,
    down_since: BTreeMap<usize, i64>,
    pub known: Vec<Known>,
    pub traffic: Traffic,
    /// Of each configuration file: its hash and what it switches on.
    masks: BTreeMap<String, (String, Vec<usize>)>,
    seed: u64,
    rng: Rng,
    next: u64,
    burst_until: i64,
    /// Pods that cannot be scheduled before this time.
    pub full_until: i64,
    /// Losses of serving production pods by their own fault, with the time.
    pub own_losses: Vec<i64>,
    /// When the operator last wrote a Deployment, and the production pods that served when it read what it decided upon: a pod that
    /// comes back in between is not known to it.
    pub read: (i64, i32),
    /// Faults that the checks found here: serving pods taken below the user's replicas.
    pub faults: Vec<String>,
    /// Serving production pods that must not be taken away by the operator.
    pub floor: i32,
    /// Something changed that a watch would tell.
    pub changed: bool,
}

impl Cluster {
    pub fn new(seed: u64, known: Vec<Known>, traffic: Traffic) -> Self {
        Self {
            deployments: BTreeMap::new(),
            config_maps: BTreeMap::new(),
            services: BTreeMap::new(),
            pods: BTreeMap::new(),
            down: BTreeSet::new(),
            down_since: BTreeMap::new(),
            known,
            traffic,
            masks: BTreeMap::new(),
            seed,
            rng: Rng::new(seed, 1),
            next: 0,
            burst_until: 0,
            full_until: 0,
            own_losses: vec![],
            read: (0, 0),
            faults: vec![],
            floor: 0,
            changed: false,
        }
    }

    // ---- what the API server does

    pub fn write(&mut self, write: &Write<'_>, now: i64) {
        match write {
            Write::Apply(body) => self.apply(body, now),
            Write::Scale { deployment, replicas } => {
                if let Some(there) = self.deployments.get(deployment) {
                    let mut body = there.body.clone();
                    body["spec"]["replicas"] = serde_json::json!(replicas);
                    self.apply(&body, now);
                }
            }
            Write::Touch { pod, value } => {
                // Now and then the kubelet's own watch lags, and the touch remounts what was there before.
                let lost = self.rng.chance(0.05);
                let due = now + self.rng.range(0, 1);
                if let Some(pod) = self.pods.get_mut(*pod)
                    && pod.touched != *value
                {
                    pod.touched.clone_from(value);
                    self.changed = true;
                    if !lost {
                        pod.config_due = Some(due);
                    }
                }
            }
            Write::Delete { kind, name } => self.delete(kind, name),
        }
    }

    pub fn delete(&mut self, kind: &str, name: &str) {
        match kind {
            "Deployment" => drop(self.deployments.remove(name)),
            "ConfigMap" => drop(self.config_maps.remove(name)),
            _ => drop(self.services.remove(name)),
        }
        self.changed = true;
    }

    fn apply(&mut self, body: &Value, now: i64) {
        let (kind, name) = key(body);
        self.changed = true;
        match kind.as_str() {
            "ConfigMap" => {
                let old = self.config_maps.insert(name.clone(), body.clone());
                if old.is_some_and(|old| old["data"] != body["data"]) {
                    for pod in self.pods.values_mut().filter(|pod| pod.deployment == name) {
                        let natural = now + self.rng.range(20, 90);
                        pod.config_due.get_or_insert(natural);
                    }
                }
            }
            "Service" => drop(self.services.insert(name, body.clone())),
            _ => {
                let replicas = body["spec"]["replicas"].as_i64().unwrap_or(1) as i32;
                let template = body["spec"]["template"]["metadata"]["annotations"][TEMPLATE_ANNOTATION]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                let label = body["metadata"]["labels"][VARIANT_LABEL].as_str().unwrap_or_default();
                let lag = self.rng.range(0, 2);
                self.next += 1;
                let uid = self.next;
                let deployment = self.deployments.entry(name.clone()).or_insert_with(|| Deployment {
                    body: Value::Null,
                    name,
                    variant: Variant::from_label(label).unwrap_or(Variant::Stable),
                    uid,
                    replicas,
                    template: template.clone(),
                    seen: None,
                    due: now + lag,
                    sets: vec![],
                });
                if deployment.replicas != replicas || deployment.template != template {
                    deployment.due = deployment.due.max(now + lag);
                }
                deployment.body = body.clone();
                deployment.replicas = replicas;
                deployment.template = template;
            }
        }
    }

    pub fn objects(&self) -> Objects {
        let mut objects = Objects::new();
        for (name, deployment) in &self.deployments {
            objects.insert(("Deployment".into(), name.clone()), deployment.body.clone());
        }
        for (name, body) in &self.config_maps {
            objects.insert(("ConfigMap".into(), name.clone()), body.clone());
        }
        for (name, body) in &self.services {
            objects.insert(("Service".into(), name.clone()), body.clone());
        }
        objects
    }

    /// What `effects::observe` would give.
    pub fn deployments_seen(&self, variants: &mut BTreeMap<Variant, Observed>) {
        for deployment in self.deployments.values() {
            let names = |annotation: &str| {
                let text =
                    deployment.body["metadata"]["annotations"][annotation].as_str().unwrap_or_default();
                text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
            };
            let seen = variants.entry(deployment.variant).or_default();
            seen.replicas = deployment.replicas;
            seen.verdicts = (names(PROMOTED_ANNOTATION), names(ROLLED_BACK_ANNOTATION));
        }
    }

    pub fn pods_seen(
        &mut self,
        variants: &mut BTreeMap<Variant, Observed>,
        asks: bool,
        now: impl Fn(i64) -> k8s_openapi::jiff::Timestamp,
        at: i64,
    ) {
        for pod in self.pods.values().filter(|pod| !pod.failed) {
            let node_up = !self.down.contains(&pod.node);
            let answers = asks && pod.running(at) && node_up && !self.rng.chance(0.02);
            let config = pod.config.as_ref().filter(|_| answers && pod.variant.has_config());
            variants.entry(pod.variant).or_default().pods.push(snapshot::Pod {
                name: pod.name.clone(),
                ready: pod.ready && node_up,
                not_ready_since: pod.unready_since.filter(|_| node_up && !pod.ready).map(&now),
                terminating: pod.terminating.is_some(),
                template: pod.template.clone(),
                config: config.map(|file| self.masks[file].0.clone()),
                restarts: pod.restarts,
                oom_killed: pod.oom,
            });
        }
    }

    // ---- what the controllers, the kubelet and the users do

    /// One second.
    pub fn tick(&mut self, now: i64) {
        self.nodes(now);
        let names: Vec<_> = self.deployments.keys().cloned().collect();
        for name in names {
            self.deployment(&name, now);
        }
        self.collect_garbage(now);
        self.kubelet(now);
        self.traffic(now);
        if self.serving() >= self.floor {
            self.own_losses.clear();
        }
    }

    fn is_serving(&self, pod: &Pod) -> bool {
        pod.variant.serves()
            && pod.ready
            && pod.terminating.is_none()
            && !pod.failed
            && !self.down.contains(&pod.node)
    }

    /// Pods of a Deployment that serve.
    pub fn serving_of(&self, deployment: &str) -> i32 {
        let serving = |pod: &&Pod| pod.deployment == deployment && self.is_serving(pod);
        self.pods.values().filter(serving).count() as i32
    }

    /// Production pods that serve.
    pub fn serving(&self) -> i32 {
        self.pods.values().filter(|pod| self.is_serving(pod)).count() as i32
    }

    /// Production pods that would serve, had they not broken by themselves.
    pub fn broken(&self) -> i32 {
        let broken = |pod: &&Pod| {
            pod.variant.serves()
                && pod.terminating.is_none()
                && !pod.failed
                && (pod.broken || self.down.contains(&pod.node))
                && !self.is_serving(pod)
        };
        self.pods.values().filter(broken).count() as i32
    }

    fn deployment(&mut self, name: &str, now: i64) {
        let Some(mut deployment) = self.deployments.remove(name) else { return };
        let wanted = (deployment.replicas, deployment.template.clone());
        if now >= deployment.due && deployment.seen.as_ref() != Some(&wanted) {
            let scaled = deployment.seen.as_ref().is_some_and(|(replicas, _)| *replicas != wanted.0);
            deployment.seen = Some(wanted);
            if scaled {
                self.scale(&mut deployment);
            } else {
                self.roll(&mut deployment);
            }
        } else if deployment.seen.is_some() {
            self.roll(&mut deployment);
        }
        self.replica_sets(&deployment, now);
        deployment.sets.retain(|(_, size)| *size > 0);
        self.deployments.insert(name.to_owned(), deployment);
    }

    fn available(&self, uid: u64, template: Option<&str>) -> i32 {
        let is = |pod: &&Pod| {
            pod.owner == uid
                && pod.ready
                && !self.down.contains(&pod.node)
                && pod.terminating.is_none()
                && !pod.failed
                && template.is_none_or(|template| pod.template == template)
        };
        self.pods.values().filter(is).count() as i32
    }

    fn surge(replicas: i32) -> i32 {
        (replicas + 3) / 4
    }

    /// A change of `replicas`: to the one set there is, or in proportion over several.
    fn scale(&mut self, deployment: &mut Deployment) {
        let Some((replicas, _)) = deployment.seen.clone() else { return };
        match deployment.sets.len() {
            0 => self.roll(deployment),
            1 => deployment.sets[0].1 = replicas,
            _ => {
                let allowed = if replicas > 0 { replicas + Self::surge(replicas) } else { 0 };
                let all: i32 = deployment.sets.iter().map(|(_, size)| size).sum();
                let mut to_add = allowed - all;
                // The larger set first; what is left goes to it.
                let mut order: Vec<usize> = (0..deployment.sets.len()).collect();
                order.sort_by_key(|index| -deployment.sets[*index].1);
                for index in &order {
                    let size = deployment.sets[*index].1;
                    let share = f64::from(size) * f64::from(allowed) / f64::from(all.max(1));
                    let change = (share.round() as i32 - size).clamp(to_add.min(0), to_add.max(0));
                    deployment.sets[*index].1 = (size + change).max(0);
                    to_add -= change;
                }
                let first = order[0];
                deployment.sets[first].1 = (deployment.sets[first].1 + to_add).max(0);
            }
        }
    }

    /// The rolling update of the Deployment controller, maxSurge 25 %, maxUnavailable 0.
    fn roll(&mut self, deployment: &mut Deployment) {
        let Some((replicas, template)) = deployment.seen.clone() else { return };
        if !deployment.sets.iter().any(|(of, _)| *of == template) {
            deployment.sets.push((template.clone(), 0));
        }
        let total: i32 = deployment.sets.iter().map(|(_, size)| size).sum();
        let max = replicas + Self::surge(replicas);
        let new_available = self.available(deployment.uid, Some(&template));
        let available = self.available(deployment.uid, None);
        let uid = deployment.uid;
        let Some(new) = deployment.sets.iter_mut().find(|(of, _)| *of == template) else { return };
        if new.1 > replicas {
            new.1 = replicas;
            return;
        }
        if new.1 < replicas && total < max {
            new.1 += (max - total).min(replicas - new.1);
            return;
        }
        let new_unavailable = new.1 - new_available;
        let mut spare = total - replicas - new_unavailable;
        if spare <= 0 {
            return;
        }
        for index in 0..deployment.sets.len() {
            let (of, size) = deployment.sets[index].clone();
            if of == template {
                continue;
            }
            let unhealthy = (size - self.available(uid, Some(&of))).clamp(0, spare);
            deployment.sets[index].1 -= unhealthy;
            spare -= unhealthy;
        }
        let mut down = available - replicas;
        for (of, size) in &mut deployment.sets {
            if *of != template && down > 0 {
                let less = down.min(*size);
                *size -= less;
                down -= less;
            }
        }
    }

    fn replica_sets(&mut self, deployment: &Deployment, now: i64) {
        for (template, size) in &deployment.sets {
            let mut active: Vec<_> = self
                .pods
                .values()
                .filter(|pod| {
                    pod.owner == deployment.uid
                        && pod.template == *template
                        && pod.terminating.is_none()
                        && !pod.failed
                })
                .map(|pod| (pod.ready && !self.down.contains(&pod.node), -pod.ready_at, pod.name.clone()))
                .collect();
            // Not Ready first, then the youngest.
            active.sort();
            let surplus = active.len() as i32 - size;
            for (_, _, name) in active.iter().take(surplus.max(0) as usize) {
                self.end(name, now);
            }
            for _ in surplus..0 {
                self.start(deployment, template, now);
            }
        }
    }

    /// Tells a pod to end, by an act of the operator.
    fn end(&mut self, name: &str, now: i64) {
        let drain = self.rng.range(4, 9);
        let Some(pod) = self.pods.get(name) else { return };
        let served = self.is_serving(pod);
        self.changed = true;
        if let Some(pod) = self.pods.get_mut(name) {
            pod.terminating = Some(now + drain);
        }
        if served {
            let (serving, excused) = (self.serving(), self.broken() + self.own_losses.len() as i32);
            let floor = if now - self.read.0 <= 8 { self.floor.min(self.read.1) } else { self.floor };
            if serving + excused < self.floor {
                // It did not serve when it was given up.
                self.own_losses.push(now);
            }
            if serving + excused < floor {
                self.faults.push(format!(
                    "I4: {name} was taken away and {serving} pods serve ({excused} broke by themselves), {} are the user's",
                    self.floor
                ));
            }
        }
    }

    fn start(&mut self, deployment: &Deployment, template: &str, now: i64) {
        self.next += 1;
        self.changed = true;
        let alphabet = b"bcdfghjklmnpqrstvwxz2456789";
        let suffix: String = (0..5).map(|_| char::from(self.rng.pick(alphabet))).collect();
        // As Kubernetes does, which wants no words in names.
        let safe = |byte: u8| char::from(alphabet[usize::from(byte) % alphabet.len()]);
        let set: String = template.bytes().take(10).map(safe).collect();
        let name = format!("{}-{set}-{suffix}", deployment.name);
        let start_at = now.max(self.full_until) + self.rng.range(1, 3);
        let mut own = Rng::new(self.seed ^ 0x77, self.next);
        let up: Vec<usize> = (0..NODES).filter(|node| !self.down.contains(node)).collect();
        let node = if up.is_empty() { 0 } else { own.pick(&up) };
        let pod = Pod {
            name: name.clone(),
            deployment: deployment.name.clone(),
            owner: deployment.uid,
            variant: deployment.variant,
            template: template.to_owned(),
            node,
            born: now,
            start_at,
            started: None,
            ready_at: i64::MAX,
            ready: false,
            unready_since: None,
            touched: String::new(),
            terminating: None,
            failed: false,
            restarts: 0,
            oom: false,
            config: None,
            config_due: None,
            on: vec![],
            leak: None,
            unevenness: (self.traffic.heterogeneity * own.normal()).exp(),
            share: (0.2 * own.normal()).exp(),
            counters: [0; 4],
            broken: false,
        };
        self.pods.insert(name, pod);
    }

    fn collect_garbage(&mut self, now: i64) {
        let alive: BTreeSet<u64> = self.deployments.values().map(|deployment| deployment.uid).collect();
        let orphans: Vec<_> = self
            .pods
            .values()
            .filter(|pod| pod.terminating.is_none() && !alive.contains(&pod.owner))
            .map(|pod| pod.name.clone())
            .collect();
        for name in orphans {
            // The collector takes its time.
            if self.rng.chance(0.6) {
                self.end(&name, now);
            }
        }
        let down = self.down.clone();
        let before = self.pods.len();
        self.pods.retain(|_, pod| {
            let ended = pod.terminating.is_some_and(|end| end <= now && !down.contains(&pod.node));
            let swept = pod.failed && now - pod.born > 600;
            !ended && !swept
        });
        self.changed |= self.pods.len() != before;
    }

    fn on(&mut self, file: &str) -> Vec<usize> {
        if let Some((_, on)) = self.masks.get(file) {
            return on.clone();
        }
        let config: Value = serde_json::from_str(file).unwrap_or_default();
        let mut best: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (index, known) in self.known.iter().enumerate() {
            if let Some(leaves) = contained(&config, &known.patch)
                && best.get(known.name.as_str()).is_none_or(|(_, others)| leaves > *others)
            {
                best.insert(&known.name, (index, leaves));
            }
        }
        let on: Vec<usize> = best.into_values().map(|(index, _)| index).collect();
        let hash = synthex_runtime::config::hash(file.as_bytes());
        self.masks.insert(file.to_owned(), (hash, on.clone()));
        on
    }

    /// The known optimizations that a ConfigMap body switches on.
    pub fn on_in(&mut self, body: &Value) -> Vec<usize> {
        let file = body["data"]["config.yaml"].as_str().unwrap_or_default().to_owned();
        self.on(&file)
    }

    fn kubelet(&mut self, now: i64) {
        let names: Vec<_> = self.pods.keys().cloned().collect();
        for name in names {
            let Some(mut pod) = self.pods.remove(&name) else { continue };
            if !self.down.contains(&pod.node) && !pod.failed {
                self.run(&mut pod, now);
            }
            self.pods.insert(name, pod);
        }
    }

    fn run(&mut self, pod: &mut Pod, now: i64) {
        let file = |cluster: &Self| {
            let map = cluster.config_maps.get(&pod.deployment)?;
            map["data"]["config.yaml"].as_str().map(str::to_owned)
        };
        if pod.started.is_none() {
            if now < pod.start_at || pod.terminating.is_some() {
                return;
            }
            if pod.variant.has_config() {
                // Without its ConfigMap the container is not created.
                let Some(file) = file(self) else { return };
                pod.on = self.on(&file);
                pod.config = Some(file);
            }
            pod.started = Some(now);
            pod.config_due = None;
            pod.unready_since = Some(now);
            pod.ready_at = now + self.rng.range(2, 6);
            pod.counters = [0; 4];
        }
        let Some(started) = pod.started else { return };
        if pod.config_due.is_some_and(|due| due <= now)
            && let Some(file) = file(self)
        {
            pod.config_due = None;
            if pod.config.as_ref() != Some(&file) {
                pod.on = self.on(&file);
                pod.config = Some(file);
            }
        }
        let effects: Vec<_> = pod.on.iter().map(|index| self.known[*index].effect.clone()).collect();
        let felt = |effect: &&Effect| !effect.production_only || pod.variant.serves();
        let unready = effects
            .iter()
            .filter(felt)
            .any(|effect| effect.unready_after > 0 && now - started > effect.unready_after);
        let ready = now >= pod.ready_at && !unready && pod.terminating.is_none();
        if ready != pod.ready && pod.terminating.is_none() {
            self.changed = true;
            pod.ready = ready;
            pod.unready_since = (!ready).then_some(now);
            pod.broken = !ready;
            if !ready && pod.variant.serves() {
                self.own_losses.push(now);
            }
        }
        if pod.terminating.is_some() || started > now {
            return;
        }
        let crash: f64 = effects.iter().filter(felt).map(|effect| effect.crash).sum();
        let leak = effects.iter().filter(felt).map(|effect| effect.oom_after).find(|after| *after > 0);
        pod.leak = pod.leak.or(leak.map(|after| started + after));
        let oom = pod.leak.is_some_and(|at| at <= now);
        if oom || (crash > 0.0 && self.rng.chance(crash)) {
            self.crash(pod, oom, now);
        }
    }

    fn crash(&mut self, pod: &mut Pod, oom: bool, now: i64) {
        self.changed = true;
        if pod.ready && pod.variant.serves() {
            self.own_losses.push(now);
        }
        pod.restarts += 1;
        pod.oom = oom;
        pod.leak = None;
        pod.broken = true;
        pod.ready = false;
        pod.unready_since = Some(now);
        let back_off = (5 << pod.restarts.min(5)).min(60);
        pod.start_at = now + if pod.restarts > 1 { i64::from(back_off) } else { 1 };
        pod.started = None;
        pod.ready_at = i64::MAX;
    }

    /// A pod breaks by chance.
    pub fn crash_one(&mut self, name: &str, now: i64) {
        if let Some(mut pod) = self.pods.remove(name) {
            if pod.started.is_some() && pod.terminating.is_none() && !pod.failed {
                self.crash(&mut pod, false, now);
            }
            self.pods.insert(name.to_owned(), pod);
        }
    }

    /// A pod is evicted: its record stays, and another takes its place.
    pub fn evict(&mut self, name: &str, now: i64) {
        let Some(pod) = self.pods.get(name) else { return };
        if self.is_serving(pod) {
            self.own_losses.push(now);
        }
        if let Some(pod) = self.pods.get_mut(name) {
            pod.failed = true;
            pod.ready = false;
            self.changed = true;
        }
    }

    pub fn node(&mut self, node: usize, up: bool, now: i64) {
        self.changed = true;
        if up {
            self.down.remove(&node);
            self.down_since.remove(&node);
        } else {
            let lost = self.pods.values().filter(|pod| pod.node == node && self.is_serving(pod)).count();
            self.own_losses.extend(std::iter::repeat_n(now, lost));
            self.down.insert(node);
            self.down_since.insert(node, now);
        }
    }

    fn nodes(&mut self, now: i64) {
        let given_up: Vec<usize> = self
            .down_since
            .iter()
            .filter(|(_, since)| now - **since == GIVEN_UP)
            .map(|(node, _)| *node)
            .collect();
        for node in given_up {
            let lost: Vec<_> =
                self.pods.values_mut().filter(|pod| pod.node == node && pod.terminating.is_none()).collect();
            for pod in lost {
                pod.terminating = Some(now + 5);
                if pod.variant.serves() {
                    self.own_losses.push(now);
                }
            }
            self.changed = true;
        }
    }

    // ---- traffic

    fn traffic(&mut self, now: i64) {
        let traffic = self.traffic.clone();
        let mut common = Rng::new(self.seed ^ 0x33, now as u64);
        if now >= self.burst_until && common.chance(traffic.bursts) {
            self.burst_until = now + common.range(5, 40);
        }
        let burst = if now < self.burst_until { 4.0 } else { 1.0 };
        let drift = 1.0 + traffic.drift * (now as f64 / 300.0).sin();
        let mut arms: BTreeMap<Variant, Vec<String>> = BTreeMap::new();
        let loaded = self.pods.values().any(|pod| pod.variant == Variant::StagingLoad && pod.ready);
        for pod in self.pods.values() {
            let takes = pod.ready
                && pod.terminating.is_none()
                && !pod.failed
                && !self.down.contains(&pod.node)
                && pod.started.is_some();
            let arm = match pod.variant {
                Variant::Stable | Variant::Baseline | Variant::Canary => Variant::Stable,
                arm @ (Variant::StagingBaseline | Variant::StagingCanary) if loaded => arm,
                _ => continue,
            };
            if takes {
                arms.entry(arm).or_default().push(pod.name.clone());
            }
        }
        for (arm, names) in arms {
            let rate = if arm == Variant::Stable { traffic.rate } else { traffic.staging_rate };
            let shares: f64 = names.iter().map(|name| self.pods[name].share).sum();
            for name in names {
                let Some(pod) = self.pods.get_mut(&name) else { continue };
                let felt: Vec<&Effect> = pod
                    .on
                    .iter()
                    .map(|index| &self.known[*index].effect)
                    .filter(|effect| !effect.production_only || pod.variant.serves())
                    .collect();
                let common_rate = drift * burst * pod.unevenness;
                let factor = |of: fn(&Effect) -> f64| felt.iter().map(|effect| of(effect)).product::<f64>();
                let upstream =
                    (traffic.upstream_errors * common_rate * factor(|effect| effect.upstream)).min(0.9);
                let query = (traffic.query_errors * common_rate * factor(|effect| effect.query)).min(0.9);
                let queries = common.poisson(rate * pod.share / shares);
                let failed_upstream = common.poisson(queries as f64 * upstream).min(queries);
                let failed = (common.poisson(queries as f64 * query) + failed_upstream).min(queries);
                pod.counters[0] += queries - failed;
                pod.counters[1] += failed;
                pod.counters[2] += queries - failed_upstream;
                pod.counters[3] += failed_upstream;
            }
        }
    }

    /// What is on, on the Ready pods of a Deployment.
    pub fn masks_of(&self, deployment: &str) -> Vec<Vec<usize>> {
        self.pods
            .values()
            .filter(|pod| pod.deployment == deployment && pod.ready)
            .map(|pod| {
                let felt =
                    |index: &&usize| !self.known[**index].effect.production_only || pod.variant.serves();
                pod.on.iter().filter(felt).copied().collect()
            })
            .collect()
    }

    /// Value of the gauge over pods.
    pub fn gauge(&self, masks: &[Vec<usize>]) -> f64 {
        masks.iter().flatten().map(|index| self.known[*index].effect.gauge).fold(0.5, f64::max)
    }
}

/// How many leaves of `patch` stand in `config`; `None` unless all do.
fn contained(config: &Value, patch: &Value) -> Option<usize> {
    match patch {
        Value::Object(fields) => fields.iter().map(|(name, inner)| contained(config.get(name)?, inner)).sum(),
        leaf => (config == leaf).then_some(1),
    }
}
