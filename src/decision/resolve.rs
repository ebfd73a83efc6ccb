//! Parse, don't validate: turns the specification into a [`Rollout`] that cannot be wrong, or into a [`Refusal`] that says how
//! to mend it. Pure. What the CRD's own rules can refuse is refused there; here stands what they cannot see.

use std::collections::{BTreeMap, BTreeSet};

use kube::ResourceExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use synthex_runtime::config::Config;

use super::{judge::Kpi, replicas};
use crate::api::{
    Analysis, Approval, Comparison, DeletionPolicy, Duration, ErrorRatio, Object, OptimizationRollout,
    Staging, Track,
};

/// A specification that has been found sound, with the operator's defaults filled in.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// Name of the resource, and of the stable Deployment and the Service.
    pub name: String,
    /// Namespace of the resource and of all that it owns.
    pub namespace: String,
    /// Unique id of the resource.
    pub uid: String,
    /// Generation that was resolved.
    pub generation: i64,
    /// Image of the runtime.
    pub image: String,
    /// Production pods that must always serve.
    pub replicas: i32,
    /// Base configuration of the runtime, every optimization off.
    pub base: Object,
    /// Resources of the runtime's container.
    pub resources: Value,
    /// Merge patch of the pod template.
    pub pod_template: Object,
    /// The optimizations, in the user's order.
    pub optimizations: Vec<Optimization>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// KPIs that no single optimization owns.
    pub shared: Vec<Kpi>,
    /// Port of the Service.
    pub port: i32,
    /// Port on which the runtime serves.
    pub serving_port: u16,
    /// Port of the runtime's health, metrics and configuration hash.
    pub admin_port: u16,
    /// Base URL of Prometheus.
    pub prometheus_url: String,
    /// How long one query may take.
    pub prometheus_timeout: Duration,
    /// How the KPIs are judged.
    pub analysis: Analysis,
    /// What the canary is compared with.
    pub comparison: Comparison,
    /// Whether promotion is stopped.
    pub paused: bool,
    /// What becomes of the stable objects on deletion.
    pub deletion_policy: DeletionPolicy,
}

/// One optimization.
#[derive(Clone, Debug)]
pub struct Optimization {
    /// Name.
    pub name: String,
    /// Merge patch of the runtime's configuration while it is on.
    pub patch: Value,
    /// Hash of the patch.
    pub config_hash: String,
    /// KPIs that it alone can move.
    pub kpis: Vec<Kpi>,
}

/// One stage.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Name.
    pub name: String,
    /// Bake time.
    pub duration: Duration,
    /// Where it runs.
    pub place: Place,
    /// Whether the next stage waits for the user.
    pub approval: Approval,
    /// Canary requests that each required error ratio must have seen.
    pub min_requests: i64,
}

/// Where a stage runs.
#[derive(Clone, Debug)]
pub enum Place {
    /// Apart from production, under generated load.
    Staging(Staging),
    /// In production, with this percentage of traffic on the canary.
    Weight(i32),
}

impl Place {
    /// The track on which a stage at this place runs.
    pub fn track(&self) -> Track {
        match self {
            Self::Staging(_) => Track::Staging,
            Self::Weight(_) => Track::Production,
        }
    }
}

/// Why a specification cannot be followed, and what to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Reason of the `Stalled` condition, CamelCase.
    pub reason: &'static str,
    /// What is wrong, where, and the remedy.
    pub message: String,
}

/// What the operator fills in where the specification is silent.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Image of the runtime.
    pub runtime_image: String,
    /// Base URL of Prometheus.
    pub prometheus_url: String,
}

impl Rollout {
    /// The optimization of this name.
    pub fn optimization(&self, name: &str) -> Option<&Optimization> {
        self.optimizations.iter().find(|o| o.name == name)
    }

    /// Shared KPIs and those owned by the optimizations in `on`.
    pub fn kpis<'a>(&'a self, on: &'a BTreeSet<String>) -> impl Iterator<Item = &'a Kpi> {
        self.shared
            .iter()
            .chain(self.optimizations.iter().filter(|o| on.contains(&o.name)).flat_map(|o| &o.kpis))
    }

    /// Every KPI, whichever optimizations are on.
    pub fn all_kpis(&self) -> impl Iterator<Item = &Kpi> {
        self.shared.iter().chain(self.optimizations.iter().flat_map(|o| &o.kpis))
    }

    /// A KPI's share of the false-rollback probability: that among all KPIs, whichever are on, so that it is fixed at the start.
    pub fn alpha_share(&self, kpi: &Kpi) -> f64 {
        kpi.share_among(self.all_kpis())
    }

    /// The runtime's configuration with the optimizations `on`, as the file that the pods mount.
    pub fn config_file(&self, on: &BTreeSet<String>, overlay: Option<&Value>) -> String {
        let mut config = Value::Object(self.base.clone());
        for optimization in self.optimizations.iter().filter(|o| on.contains(&o.name)) {
            json_patch::merge(&mut config, &optimization.patch);
        }
        if let Some(overlay) = overlay {
            json_patch::merge(&mut config, overlay);
        }
        format!("{config:#}\n")
    }

    /// Whether bundled mock experts answer in this staging stage.
    pub fn mock_experts(staging: &Staging) -> bool {
        !staging.config.contains_key("experts")
    }

    /// What staging lays over the configuration: the user's patch, and the mock experts unless the patch names others.
    pub fn staging_overlay(&self, staging: &Staging) -> Value {
        let mut overlay = Value::Object(staging.config.clone());
        if Self::mock_experts(staging) {
            let experts: Vec<Value> =
                self.base.get("experts").and_then(Value::as_array).into_iter().flatten().cloned().collect();
            overlay["experts"] = experts
                .into_iter()
                .map(|mut expert| {
                    let name = expert["name"].as_str().unwrap_or_default().to_owned();
                    expert["url"] = json!(format!("http://{}-staging-experts:8000/{name}", self.name));
                    expert
                })
                .collect();
        }
        overlay
    }
}

/// First 16 hexadecimal digits of the SHA-256 of `text`.
pub fn hash(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Resolves a specification.
pub fn resolve(object: &OptimizationRollout, defaults: &Defaults) -> Result<Rollout, Refusal> {
    let spec = &object.spec;
    let runtime = &spec.workload.runtime;
    let optimizations = spec.optimizations.iter().map(optimization).collect::<Result<Vec<_>, _>>()?;
    let mut rollout = Rollout {
        name: object.name_any(),
        namespace: object.namespace().unwrap_or_default(),
        uid: object.uid().unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        image: runtime.image.clone().unwrap_or_else(|| defaults.runtime_image.clone()),
        replicas: runtime.replicas,
        base: runtime.config.clone(),
        resources: serde_json::to_value(&runtime.resources).unwrap_or_default(),
        pod_template: runtime.pod_template.clone(),
        optimizations,
        stages: spec.stages.iter().map(stage).collect::<Result<_, _>>()?,
        shared: spec.kpis.iter().map(|kpi| resolve_kpi(kpi, None)).collect::<Result<_, _>>()?,
        port: spec.service.port,
        serving_port: 0,
        admin_port: 0,
        prometheus_url: spec.prometheus.url.clone().unwrap_or_else(|| defaults.prometheus_url.clone()),
        prometheus_timeout: spec.prometheus.timeout,
        analysis: spec.analysis.clone(),
        comparison: spec.comparison,
        paused: spec.paused,
        deletion_policy: spec.deletion_policy,
    };
    unique_kpis(&rollout)?;
    no_overlap(&rollout.optimizations)?;
    no_nulls(&Value::Object(rollout.pod_template.clone()), "spec.workload.runtime.podTemplate")?;
    reachable_weights(&rollout)?;
    let server = runnable_configs(&rollout)?.server;
    (rollout.serving_port, rollout.admin_port) = (server.listen.port(), server.admin.port());
    Ok(rollout)
}

fn optimization(api: &crate::api::Optimization) -> Result<Optimization, Refusal> {
    let place = format!("spec.optimizations[{}].config", api.name);
    no_nulls(&Value::Object(api.config.clone()), &place)?;
    let patch = match bundled(&api.name) {
        Some(mut switches) => {
            json_patch::merge(&mut switches, &Value::Object(api.config.clone()));
            json!({ "optimizations": { &api.name: switches } })
        }
        None if api.config.is_empty() => {
            return Err(Refusal {
                reason: "InvalidOptimization",
                message: format!(
                    "{place}: {:?} is not a bundled optimization (memory, connections, monitoring) and sets nothing; give the \
                     configuration that it switches on, or correct the name",
                    api.name
                ),
            });
        }
        None => Value::Object(api.config.clone()),
    };
    let kpis = owned_kpis(api);
    Ok(Optimization {
        name: api.name.clone(),
        config_hash: hash(&patch.to_string()),
        patch,
        kpis: kpis.iter().map(|kpi| resolve_kpi(kpi, Some(&api.name))).collect::<Result<_, _>>()?,
    })
}

/// The KPIs under an optimization: the user's, or else the bundled ones of its name.
pub fn owned_kpis(api: &crate::api::Optimization) -> Vec<crate::api::Kpi> {
    api.kpis.clone().unwrap_or_else(|| bundled_kpis(&api.name))
}

/// What switches a bundled optimization on, below `optimizations.<name>` of the runtime's configuration.
fn bundled(name: &str) -> Option<Value> {
    match name {
        "memory" => Some(json!({
            "objectPool": { "enabled": true }, "cacheTtl": { "enabled": true },
            "evict": { "enabled": true }, "batchLimit": { "enabled": true },
        })),
        "connections" => Some(json!({ "unified": { "enabled": true } })),
        "monitoring" => Some(json!({
            "adaptiveSampling": { "enabled": true }, "preAggregation": { "enabled": true },
            "cardinalityLimit": { "enabled": true },
        })),
        _ => None,
    }
}

/// KPIs that a bundled optimization alone can move, with the benefits that the seed promises. Which can move which is measured; see
/// the runtime's README. Memory and monitoring cannot move an error rate of their own.
fn bundled_kpis(name: &str) -> Vec<crate::api::Kpi> {
    use crate::api::{Expect, Gauge, Kpi, OnMiss, Threshold};
    let promised = |change: f64| Some(Expect { change, on_miss: OnMiss::Warn });
    let gauge = |name: &str, query: &str, change: f64| Kpi {
        gauge: Some(Gauge::new(query)),
        expect: promised(change),
        ..Kpi::named(name).secondary()
    };
    match name {
        "memory" => vec![
            gauge("memory", "sum by (pod) (process_resident_memory_bytes{$arm})", -0.35),
            gauge(
                "allocations",
                "sum by (pod) (rate(synthex_runtime_allocator_allocations_total{$arm}[$window])) / sum by (pod) (rate(synthex_runtime_queries_total{$arm}[$window]))",
                -0.70,
            ),
            Kpi {
                error_ratio: Some(ErrorRatio {
                    minimum_effect: 0.02,
                    ..ErrorRatio::new(
                        r#"synthex_runtime_cache_requests_total{$arm,result="miss"}"#,
                        "synthex_runtime_cache_requests_total{$arm}",
                    )
                }),
                ..Kpi::named("cache-misses").secondary()
            },
            Kpi {
                observe_only: true,
                threshold: Some(Threshold {
                    query: r#"sum(synthex_runtime_pool_acquired_total{$arm,result="hit"}) / sum(synthex_runtime_pool_acquired_total{$arm})"#.into(),
                    max: None,
                    min: Some(0.80),
                    consecutive: 3,
                }),
                ..Kpi::named("pool-reuse").secondary()
            },
        ],
        "connections" => vec![
            Kpi {
                error_ratio: Some(ErrorRatio::new(
                    r#"synthex_runtime_upstream_requests_total{$arm,outcome!="ok"}"#,
                    "synthex_runtime_upstream_requests_total{$arm}",
                )),
                ..Kpi::named("upstream-errors")
            },
            Kpi {
                error_ratio: Some(ErrorRatio {
                    minimum_effect: 0.02,
                    ..ErrorRatio::new(
                        "synthex_runtime_upstream_connections_opened_total{$arm}",
                        "synthex_runtime_upstream_requests_total{$arm}",
                    )
                }),
                ..Kpi::named("new-connections").secondary()
            },
            // With HTTP/1.1 there may be more or fewer, by the load and by how long idle ones are kept.
            Kpi {
                observe_only: true,
                ..gauge(
                    "open-connections",
                    "sum by (pod) (synthex_runtime_upstream_connections_open{$arm})",
                    -0.65,
                )
            },
            gauge(
                "connection-wait",
                "sum by (pod) (rate(synthex_runtime_upstream_acquire_seconds_sum{$arm}[$window])) / sum by (pod) (rate(synthex_runtime_upstream_acquire_seconds_count{$arm}[$window]))",
                -0.30,
            ),
        ],
        // A monitor learns in its first minute what is noise.
        "monitoring" => vec![
            // Since the start of the pod: points are so rare that a rate over minutes would be none most of the time.
            Kpi {
                warm_up: Some(Duration::from_secs(60)),
                ..gauge(
                    "data-points",
                    "sum by (pod) (synthex_runtime_monitor_points_total{$arm}) / sum by (pod) (time() - process_start_time_seconds{$arm})",
                    -0.96,
                )
            },
            // Millionths of a processor: a benefit to be shown, no harm to act upon.
            Kpi {
                observe_only: true,
                warm_up: Some(Duration::from_secs(60)),
                ..gauge(
                    "monitoring-cpu",
                    "sum by (pod) (rate(synthex_runtime_monitor_cpu_seconds_total{$arm}[$window]))",
                    -0.80,
                )
            },
        ],
        _ => vec![],
    }
}

fn resolve_kpi(kpi: &crate::api::Kpi, owner: Option<&str>) -> Result<Kpi, Refusal> {
    Kpi::resolve(kpi, owner).map_err(|message| Refusal { reason: "InvalidKpi", message })
}

fn stage(api: &crate::api::Stage) -> Result<Stage, Refusal> {
    let place = match (&api.staging, api.weight) {
        (Some(staging), None) => Place::Staging(staging.clone()),
        (None, Some(weight)) => Place::Weight(weight),
        _ => {
            return Err(Refusal {
                reason: "InvalidStage",
                message: format!(
                    "spec.stages[{}]: give either weight or staging, not both and not neither",
                    api.name
                ),
            });
        }
    };
    Ok(Stage {
        name: api.name.clone(),
        duration: api.duration,
        place,
        approval: api.approval,
        min_requests: api.min_requests.unwrap_or_default(),
    })
}

fn unique_kpis(rollout: &Rollout) -> Result<(), Refusal> {
    let mut seen = BTreeMap::new();
    for kpi in rollout.shared.iter().chain(rollout.optimizations.iter().flat_map(|o| &o.kpis)) {
        let place = kpi
            .owner
            .as_ref()
            .map_or("spec.kpis".to_owned(), |owner| format!("spec.optimizations[{owner}].kpis"));
        if let Some(other) = seen.insert(&kpi.name, place.clone()) {
            return Err(Refusal {
                reason: "DuplicateKpi",
                message: format!(
                    "the KPI {:?} stands in {other} and in {place}; give each KPI a name of its own",
                    kpi.name
                ),
            });
        }
    }
    Ok(())
}

/// A null in a merge patch deletes a field, and a deletion cannot be switched off again by leaving the patch out of another's.
fn no_nulls(patch: &Value, place: &str) -> Result<(), Refusal> {
    match leaves(patch).into_iter().find(|(_, value)| value.is_null()) {
        None => Ok(()),
        Some((path, _)) => Err(Refusal {
            reason: "InvalidPatch",
            message: format!(
                "{place}.{path} is null; a patch may set fields but not delete them: give the value that is wanted"
            ),
        }),
    }
}

/// Two optimizations that set one field could not be switched independently, so no blame could be told apart.
fn no_overlap(optimizations: &[Optimization]) -> Result<(), Refusal> {
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for optimization in optimizations {
        for (path, _) in leaves(&optimization.patch) {
            let clash = owners.iter().find(|(other, owner)| {
                **owner != optimization.name
                    && (**other == path
                        || other.starts_with(&format!("{path}."))
                        || path.starts_with(&format!("{other}.")))
            });
            if let Some((other, owner)) = clash {
                return Err(Refusal {
                    reason: "OverlappingPatches",
                    message: format!(
                        "the optimizations {owner:?} and {:?} both set {}; let one of them set it, or make them one optimization",
                        optimization.name,
                        if other.len() > path.len() { other } else { &path }
                    ),
                });
            }
            owners.insert(path, &optimization.name);
        }
    }
    Ok(())
}

/// Dotted paths of everything a merge patch sets. A list is set as a whole.
fn leaves(patch: &Value) -> Vec<(String, &Value)> {
    match patch {
        Value::Object(fields) if !fields.is_empty() => fields
            .iter()
            .flat_map(|(name, value)| {
                leaves(value).into_iter().map(move |(path, leaf)| {
                    (if path.is_empty() { name.clone() } else { format!("{name}.{path}") }, leaf)
                })
            })
            .collect(),
        leaf => vec![(String::new(), leaf)],
    }
}

fn reachable_weights(rollout: &Rollout) -> Result<(), Refusal> {
    let n = rollout.replicas;
    for stage in &rollout.stages {
        let Place::Weight(weight) = stage.place else { continue };
        if replicas::exceeds(n, weight) {
            let needed = replicas::needed_for(weight);
            return Err(Refusal {
                reason: "WeightUnreachable",
                message: format!(
                    "stage {:?} asks for {weight} % of traffic, but the smallest canary of {n} replicas takes more than twice \
                     that; set spec.workload.runtime.replicas to {needed} or more, or raise the stage's weight",
                    stage.name
                ),
            });
        }
    }
    Ok(())
}

/// Every configuration that the rollout may deploy must be one that the runtime would accept. Returns the base configuration.
fn runnable_configs(rollout: &Rollout) -> Result<Config, Refusal> {
    let none = BTreeSet::new();
    let all: BTreeSet<String> = rollout.optimizations.iter().map(|o| o.name.clone()).collect();
    let alone = rollout.optimizations.iter().map(|o| BTreeSet::from([o.name.clone()]));
    let overlays = rollout.stages.iter().filter_map(|stage| match &stage.place {
        Place::Staging(staging) => Some((stage, rollout.staging_overlay(staging))),
        Place::Weight(_) => None,
    });
    let places: Vec<_> =
        std::iter::once((String::from("spec.workload.runtime.config"), None))
            .chain(overlays.map(|(stage, overlay)| {
                (format!("spec.stages[{}].staging.config", stage.name), Some(overlay))
            }))
            .collect();
    let parse = |place: &str, on: &BTreeSet<String>, overlay: Option<&Value>| {
        Config::parse(rollout.config_file(on, overlay).as_bytes()).map_err(|error| {
            let on = match on.len() {
                0 => String::new(),
                _ => format!(" with {} on", on.iter().map(String::as_str).collect::<Vec<_>>().join(", ")),
            };
            Refusal {
                reason: "InvalidConfig",
                message: format!("{place}{on}: the runtime would refuse this configuration: {error}"),
            }
        })
    };
    // The plain configuration first: what is wrong there is not to be blamed on an optimization.
    let base = parse("spec.workload.runtime.config", &none, None)?;
    for on in std::iter::once(none.clone()).chain(alone).chain([all]) {
        for (place, overlay) in &places {
            parse(place, &on, overlay.as_ref())?;
        }
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A specification that is sound, changed at some places: JSON pointer and value.
    fn resolved(changes: &[(&str, Value)]) -> Result<Rollout, Refusal> {
        let mut spec = json!({
            "workload": {"runtime": {"replicas": 10, "config": {
                "experts": [{"name": "alpha", "kind": "http", "url": "http://alpha:8000/query"}],
            }}},
            "optimizations": [{"name": "memory"}, {"name": "connections"}, {"name": "monitoring"}],
            "stages": [
                {"name": "staging", "duration": "1m", "staging": {"replicas": 2}},
                {"name": "canary", "duration": "1m", "weight": 10},
            ],
        });
        for (place, value) in changes {
            let (parent, name) = place.rsplit_once('/').unwrap();
            match spec.pointer_mut(parent).unwrap() {
                Value::Array(list) if name == "-" => list.push(value.clone()),
                Value::Array(list) => list[name.parse::<usize>().unwrap()] = value.clone(),
                parent => parent[name] = value.clone(),
            }
        }
        let mut object = OptimizationRollout::new("experts", serde_json::from_value(spec).unwrap());
        object.metadata.namespace = Some("shop".into());
        let defaults = Defaults {
            runtime_image: "synthex-runtime:dev".into(),
            prometheus_url: "http://prometheus.monitoring.svc:9090".into(),
        };
        resolve(&object, &defaults)
    }

    #[test]
    fn a_sound_specification_gets_the_defaults() {
        let rollout = resolved(&[]).unwrap();
        assert_eq!((rollout.serving_port, rollout.admin_port), (8080, 9090));
        assert_eq!(rollout.image, "synthex-runtime:dev");
        assert_eq!(rollout.all_kpis().count(), 13);
        let on = BTreeSet::from(["connections".to_owned()]);
        let names: Vec<_> = rollout.kpis(&on).map(|kpi| kpi.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "query-errors",
                "query-latency",
                "cpu-per-query",
                "upstream-errors",
                "new-connections",
                "open-connections",
                "connection-wait"
            ]
        );
        let shares: f64 = rollout
            .all_kpis()
            .filter(|kpi| kpi.is_tested() && !kpi.observe_only)
            .map(|kpi| rollout.alpha_share(kpi))
            .sum();
        assert!((shares - 1.0).abs() < 1e-12);
    }

    #[test]
    fn each_bad_input_has_its_reason_and_names_its_place() {
        let ratio =
            |name: &str| json!({"name": name, "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}"}});
        let custom = |name: &str, config: Value| json!({"name": name, "config": config});
        let unified = |unified: Value| json!({"optimizations": {"connections": {"unified": unified}}});
        /// Name, changes, reason, and what the message says.
        type Case<'a> = (&'a str, Vec<(&'a str, Value)>, &'a str, &'a [&'a str]);
        let cases: Vec<Case<'_>> = vec![
            (
                "null in a patch",
                vec![("/optimizations/0/config", json!({"cacheTtl": {"ttl": null}}))],
                "InvalidPatch",
                &["spec.optimizations[memory].config.cacheTtl.ttl"],
            ),
            (
                "null in the pod template",
                vec![("/workload/runtime/podTemplate", json!({"spec": {"nodeSelector": null}}))],
                "InvalidPatch",
                &["spec.workload.runtime.podTemplate.spec.nodeSelector"],
            ),
            (
                "two patches of one field",
                vec![
                    ("/optimizations/-", custom("a", json!({"dispatch": {"deadline": "20s"}}))),
                    ("/optimizations/-", custom("b", json!({"dispatch": {"deadline": "10s"}}))),
                ],
                "OverlappingPatches",
                &["\"a\"", "\"b\"", "dispatch.deadline"],
            ),
            (
                "a patch of a field below another's",
                vec![(
                    "/optimizations/-",
                    custom("a", json!({"optimizations": {"memory": {"cacheTtl": {"enabled": true}}}})),
                )],
                "OverlappingPatches",
                &["\"memory\"", "\"a\"", "optimizations.memory.cacheTtl.enabled"],
            ),
            (
                "an unknown name that sets nothing",
                vec![("/optimizations/-", json!({"name": "memroy"}))],
                "InvalidOptimization",
                &["spec.optimizations[memroy].config", "memory, connections, monitoring"],
            ),
            (
                "one KPI name with two owners",
                vec![("/optimizations/0/kpis", json!([ratio("upstream-errors")]))],
                "DuplicateKpi",
                &["spec.optimizations[memory].kpis", "spec.optimizations[connections].kpis"],
            ),
            (
                "one KPI name, shared and owned",
                vec![("/optimizations/0/kpis", json!([ratio("query-errors")]))],
                "DuplicateKpi",
                &["spec.kpis", "spec.optimizations[memory].kpis"],
            ),
            (
                "a query without $arm",
                vec![("/kpis", json!([{"name": "k", "errorRatio": {"errors": "e", "total": "t{$arm}"}}]))],
                "InvalidKpi",
                &["KPI k", "errorRatio.errors", "$arm"],
            ),
            (
                "a KPI that is nothing",
                vec![("/kpis", json!([{"name": "k"}]))],
                "InvalidKpi",
                &["KPI k", "errorRatio, latency, gauge or threshold"],
            ),
            (
                "a stage that is neither",
                vec![("/stages/1", json!({"name": "canary", "duration": "1m"}))],
                "InvalidStage",
                &["spec.stages[canary]"],
            ),
            (
                "a weight that the replicas cannot give",
                vec![("/workload/runtime/replicas", json!(4))],
                "WeightUnreachable",
                &["\"canary\"", "10 %", "4 replicas", "to 5 or more"],
            ),
            (
                "a configuration that the runtime refuses",
                vec![("/workload/runtime/config", json!({"experts": []}))],
                "InvalidConfig",
                &["spec.workload.runtime.config: ", "experts"],
            ),
            (
                "an unknown field of the configuration",
                vec![("/workload/runtime/config/speed", json!(1))],
                "InvalidConfig",
                &["spec.workload.runtime.config: ", "speed"],
            ),
            (
                "refused only with one optimization on",
                vec![("/optimizations/1/config", json!({"unified": {"perHost": 30, "total": 10}}))],
                "InvalidConfig",
                &["spec.workload.runtime.config with connections on", "total"],
            ),
            (
                "refused only with all on together",
                vec![
                    ("/optimizations/-", custom("hosts", unified(json!({"perHost": 50})))),
                    ("/optimizations/-", custom("total", unified(json!({"total": 40})))),
                ],
                "InvalidConfig",
                &["with connections, hosts, memory, monitoring, total on", "perHost"],
            ),
            (
                "refused only in staging",
                vec![("/stages/0/staging/config", json!({"dispatch": {"quorum": 7}}))],
                "InvalidConfig",
                &["spec.stages[staging].staging.config: ", "quorum"],
            ),
        ];
        for (name, changes, reason, places) in cases {
            let refusal = resolved(&changes).map(|_| ()).expect_err(name);
            assert_eq!(refusal.reason, reason, "{name}: {}", refusal.message);
            for place in places {
                assert!(refusal.message.contains(place), "{name}: {place:?} is not in: {}", refusal.message);
            }
        }
    }

    #[test]
    fn patches_side_by_side_do_not_overlap() {
        let patches = [
            ("/optimizations/-", json!({"name": "deadline", "config": {"dispatch": {"deadline": "20s"}}})),
            ("/optimizations/-", json!({"name": "quorum", "config": {"dispatch": {"quorum": 1}}})),
        ];
        let rollout = resolved(&patches).unwrap();
        let on = BTreeSet::from(["deadline".to_owned(), "quorum".to_owned()]);
        let config: Value = serde_json::from_str(&rollout.config_file(&on, None)).unwrap();
        assert_eq!(config["dispatch"], json!({"deadline": "20s", "quorum": 1}));
        assert_eq!(config.get("optimizations"), None);
    }

    #[test]
    fn staging_gets_mock_experts_unless_it_names_others() {
        let mock = resolved(&[]).unwrap();
        let Place::Staging(staging) = &mock.stages[0].place else { panic!("staging is first") };
        assert!(Rollout::mock_experts(staging));
        assert_eq!(
            mock.staging_overlay(staging)["experts"][0]["url"],
            json!("http://experts-staging-experts:8000/alpha")
        );
        let own = json!([{"name": "alpha", "kind": "http", "url": "http://other:80/"}]);
        let named = resolved(&[("/stages/0/staging/config", json!({"experts": own}))]).unwrap();
        let Place::Staging(staging) = &named.stages[0].place else { panic!("staging is first") };
        assert!(!Rollout::mock_experts(staging));
        assert_eq!(named.staging_overlay(staging)["experts"], own);
    }
}
