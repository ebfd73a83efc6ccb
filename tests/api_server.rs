//! Tier 3: the operator against a real API server, under the RBAC that manifests/ ships. No node, so no pod ever runs.
//!
//! Needs a cluster (KUBECONFIG); `cargo cluster test` brings one up.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use synthex_cluster::{Cluster, Namespace};

const SOON: Duration = Duration::from_secs(20);

fn rollout() -> Value {
    json!({
        "apiVersion": "synthex.io/v1alpha1",
        "kind": "OptimizationRollout",
        "metadata": { "name": "experts" },
        "spec": { "workload": { "runtime": { "replicas": 10, "config": { "experts": [
            { "name": "alpha", "kind": "http", "url": "http://alpha:8000/query" }
        ] } } } },
    })
}

/// The smallest rollout with one value set: `path` is a JSON pointer below `spec`.
fn with(path: &str, value: Value) -> Value {
    let mut object = rollout();
    set(&mut object["spec"], path, value);
    object
}

fn set(mut at: &mut Value, path: &str, value: Value) {
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at = &mut at[part];
    }
    *at = value;
}

fn ratio() -> Value {
    json!({ "errors": "e{$arm}", "total": "t{$arm}" })
}

/// What the API server refuses at once, and a part of what it says.
fn refused() -> Vec<(&'static str, Value, &'static str)> {
    let stages = |stages: Value| with("stages", stages);
    let kpis = |kpi: Value| with("kpis", json!([kpi]));
    let mut long_name = rollout();
    long_name["metadata"]["name"] = json!("a-name-that-is-too-long-for-pods");
    let mut no_workload = rollout();
    no_workload["spec"] = json!({});
    vec![
        ("unknown field", with("stagez", json!([])), "unknown field \"spec.stagez\""),
        ("no workload", no_workload, "spec.workload: Required value"),
        ("long name", long_name, "at most 29 characters"),
        (
            "weight and staging",
            stages(json!([{ "name": "a", "duration": "1m", "weight": 5, "staging": {} }])),
            "either weight",
        ),
        ("neither weight nor staging", stages(json!([{ "name": "a", "duration": "1m" }])), "either weight"),
        (
            "weight over 100",
            stages(json!([{ "name": "a", "duration": "1m", "weight": 101 }])),
            "less than or equal to 100",
        ),
        (
            "weight 0",
            stages(json!([{ "name": "a", "duration": "1m", "weight": 0 }])),
            "greater than or equal to 1",
        ),
        (
            "falling weights",
            stages(
                json!([{ "name": "a", "duration": "1m", "weight": 50 }, { "name": "b", "duration": "1m", "weight": 25 }]),
            ),
            "weights must not fall",
        ),
        (
            "staging after production",
            stages(
                json!([{ "name": "a", "duration": "1m", "weight": 50 }, { "name": "b", "duration": "1m", "staging": {} }]),
            ),
            "staging stages come before",
        ),
        ("no stages", stages(json!([])), "at least 1 items"),
        (
            "duplicate stage",
            stages(
                json!([{ "name": "a", "duration": "1m", "weight": 50 }, { "name": "a", "duration": "1m", "weight": 60 }]),
            ),
            "Duplicate value",
        ),
        (
            "duplicate optimization",
            with("optimizations", json!([{ "name": "memory" }, { "name": "memory" }])),
            "Duplicate value",
        ),
        (
            "negative duration",
            stages(json!([{ "name": "a", "duration": "-5m", "weight": 50 }])),
            "not negative",
        ),
        (
            "duration without unit",
            stages(json!([{ "name": "a", "duration": "90", "weight": 50 }])),
            "such as 90s",
        ),
        ("no KPIs", with("kpis", json!([])), "at least 1 items"),
        (
            "a promise of a threshold",
            kpis(
                json!({ "name": "k", "threshold": { "query": "q", "max": 1 }, "expect": { "change": -0.5 } }),
            ),
            "expect needs a comparison with the baseline",
        ),
        (
            "a gauge without $arm",
            kpis(json!({ "name": "k", "gauge": { "query": "up" } })),
            "must contain $arm",
        ),
        (
            "a latency without $arm",
            kpis(json!({ "name": "k", "latency": { "histogram": "h" } })),
            "must contain $arm",
        ),
        (
            "KPI without a kind",
            kpis(json!({ "name": "k" })),
            "exactly one of errorRatio, latency, gauge or threshold",
        ),
        (
            "KPI of two kinds",
            kpis(json!({ "name": "k", "errorRatio": ratio(), "threshold": { "query": "q", "max": 1 } })),
            "exactly one of errorRatio, latency, gauge or threshold",
        ),
        (
            "KPI without a query",
            kpis(json!({ "name": "k", "errorRatio": { "errors": "e{$arm}" } })),
            "total: Required value",
        ),
        (
            "KPI with an empty query",
            kpis(json!({ "name": "k", "threshold": { "query": "", "max": 1 } })),
            "at least 1 chars",
        ),
        (
            "ratio without arm",
            kpis(json!({ "name": "k", "errorRatio": { "errors": "e", "total": "t{$arm}" } })),
            "must contain $arm",
        ),
        (
            "threshold without bound",
            kpis(json!({ "name": "k", "threshold": { "query": "q" } })),
            "exactly one of max or min",
        ),
        (
            "two bounds",
            kpis(json!({ "name": "k", "threshold": { "query": "q", "max": 2, "min": 1 } })),
            "exactly one of max or min",
        ),
        (
            "tolerance below 1",
            kpis(
                json!({ "name": "k", "errorRatio": { "errors": "e{$arm}", "total": "t{$arm}", "tolerance": 0.5 } }),
            ),
            "greater than or equal to 1",
        ),
        (
            "optimizations in config",
            with("workload/runtime/config/optimizations", json!({ "memory": {} })),
            "list them under spec.optimizations",
        ),
        ("odd interval", with("analysis", json!({ "interval": "1500ms" })), "whole seconds"),
        (
            "Prometheus without scheme",
            with("prometheus", json!({ "url": "prometheus:9090" })),
            "must be an http or https URL",
        ),
        ("unknown mode", with("analysis", json!({ "mode": "Dream" })), "supported values"),
    ]
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn the_api_server_refuses_bad_input_and_says_how_to_mend_it() {
    let (_cluster, namespace) = start("refused");
    for (case, object, says) in refused() {
        let error = dry_run(&namespace, &object).expect_err(case).to_string();
        assert!(error.contains(says), "{case}: {error}");
    }
    dry_run(&namespace, &rollout()).unwrap();
    for sample in ["quickstart", "minimal"] {
        let file = format!("{}/manifests/samples/{sample}.yaml", env!("CARGO_MANIFEST_DIR"));
        let mut object: Value = serde_saphyr::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        object["metadata"]["namespace"] = json!(namespace.name());
        dry_run(&namespace, &object).unwrap();
    }
}

/// What only the operator can see: reported as `Stalled` with the remedy, and nothing is deployed.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn the_operator_refuses_what_the_api_server_cannot_see() {
    let (cluster, namespace) = start("stalled");
    let _operator = Operator::start(&cluster, &namespace);
    let patches = |list: Value| with("optimizations", list);
    let cases = [
        (
            "null",
            patches(json!([{ "name": "memory", "config": { "cacheTtl": { "ttl": null } } }])),
            "InvalidPatch",
            "cacheTtl.ttl is null",
        ),
        (
            "overlap",
            patches(json!([
                { "name": "a", "config": { "dispatch": { "deadline": "9s" } } },
                { "name": "b", "config": { "dispatch": { "deadline": "8s" } } }
            ])),
            "OverlappingPatches",
            "both set dispatch.deadline",
        ),
        ("weight", with("workload/runtime/replicas", json!(2)), "WeightUnreachable", "replicas to 5 or more"),
        (
            "config",
            with("workload/runtime/config/experts", json!([])),
            "InvalidConfig",
            "spec.workload.runtime.config",
        ),
        (
            "config of an optimization",
            patches(json!([{ "name": "connections", "config": { "unified": { "perHost": 0 } } }])),
            "InvalidConfig",
            "with connections on",
        ),
    ];
    for (case, mut object, reason, says) in cases {
        object["metadata"]["name"] = json!(format!("bad-{}", case.split(' ').next_back().unwrap()));
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        namespace.apply(&object.to_string()).unwrap();
        cluster
            .eventually(case, namespace.name(), SOON, || {
                let stalled = condition(&namespace, &name, "Stalled")?;
                anyhow::ensure!(stalled["reason"] == reason, "{stalled}");
                anyhow::ensure!(stalled["message"].as_str().unwrap_or_default().contains(says), "{stalled}");
                Ok(())
            })
            .unwrap();
        assert_eq!(
            namespace.kubectl(&["get", "oro", &name, "--output=jsonpath={.status.phase}"]).unwrap(),
            "Stalled"
        );
        namespace.kubectl(&["delete", "oro", &name, "--timeout=20s"]).unwrap();
    }
    assert_eq!(namespace.kubectl(&["get", "deployments,services", "--output=name"]).unwrap(), "");
}

/// A pod template that only the API server knows to be wrong: said, with verbs answered meanwhile, and gone on from once mended.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn what_the_api_server_refuses_is_said_until_it_is_mended() {
    let (cluster, namespace) = start("refused");
    let _operator = Operator::start(&cluster, &namespace);
    let stalled = |status: &str, reason: &str, says: &str| {
        cluster
            .eventually(reason, namespace.name(), SOON, || {
                let stalled = condition(&namespace, "experts", "Stalled")?;
                let told = stalled["status"] == status && stalled["reason"] == reason;
                anyhow::ensure!(told && stalled["message"].to_string().contains(says), "{stalled}");
                Ok(())
            })
            .unwrap();
    };
    // A value that Kubernetes does not take, and a field that it does not have, which it tells in other ways.
    for (field, value) in [("restartPolicy", json!("Never")), ("nodeSelectors", json!({ "a": "b" }))] {
        let template = json!({ "spec": { field: value } });
        namespace.apply(&with("workload/runtime/podTemplate", template).to_string()).unwrap();
        stalled("True", "ApplyRefused", field);
    }
    namespace.kubectl(&["annotate", "oro", "experts", "synthex.io/rollback=nothing"]).unwrap();
    cluster
        .eventually("an answer", namespace.name(), SOON, || {
            let events =
                namespace.kubectl(&["get", "events.events.k8s.io", "--output=jsonpath={..reason}"])?;
            anyhow::ensure!(events.contains("VerbRefused") && events.contains("Stalled"), "{events}");
            Ok(())
        })
        .unwrap();
    namespace.apply(&rollout().to_string()).unwrap();
    stalled("False", "AsExpected", "");
}

/// The user's mistake is not mended, and the object is deleted: stable has its replicas back before it is let go.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_rollout_that_cannot_be_followed_is_deleted_without_loss() {
    let (cluster, namespace) = start("lost");
    let _operator = Operator::start(&cluster, &namespace);
    let replicas = |wanted: &str| {
        cluster
            .eventually("stable's replicas", namespace.name(), SOON, || {
                let there = namespace.kubectl(&[
                    "get",
                    "deployment",
                    "experts",
                    "--output=jsonpath={.spec.replicas}",
                ])?;
                anyhow::ensure!(there == wanted, "{there}");
                Ok(())
            })
            .unwrap();
    };
    namespace.apply(&rollout().to_string()).unwrap();
    replicas("10");
    namespace.apply(&with("workload/runtime/config/experts", json!([])).to_string()).unwrap();
    cluster
        .eventually("the refusal", namespace.name(), SOON, || {
            let stalled = condition(&namespace, "experts", "Stalled")?;
            anyhow::ensure!(stalled["reason"] == "InvalidConfig", "{stalled}");
            Ok(())
        })
        .unwrap();
    namespace.kubectl(&["scale", "deployment", "experts", "--replicas=1"]).unwrap();
    replicas("1");
    namespace.kubectl(&["delete", "oro", "experts", "--wait=false"]).unwrap();
    replicas("10");
    // No pod runs here, so that it waits for them: it is still there.
    namespace.kubectl(&["get", "oro", "experts"]).unwrap();
    namespace
        .kubectl(&[
            "patch",
            "oro",
            "experts",
            "--type=merge",
            "--patch",
            "{\"metadata\":{\"finalizers\":null}}",
        ])
        .unwrap();
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn objects_of_others_are_not_touched() {
    let (cluster, namespace) = start("conflict");
    namespace.kubectl(&["create", "deployment", "experts", "--image=none:dev", "--replicas=0"]).unwrap();
    let before = namespace.kubectl(&["get", "deployment", "experts", "--output=json"]).unwrap();
    let _operator = Operator::start(&cluster, &namespace);
    namespace.apply(&rollout().to_string()).unwrap();
    cluster
        .eventually("the conflict", namespace.name(), SOON, || {
            let conflict = condition(&namespace, "experts", "Conflict")?;
            anyhow::ensure!(
                conflict["status"] == "True"
                    && conflict["message"].to_string().contains("Deployment experts"),
                "{conflict}"
            );
            Ok(())
        })
        .unwrap();
    let spec = |json: &str| serde_json::from_str::<Value>(json).unwrap()["spec"].clone();
    let after = namespace.kubectl(&["get", "deployment", "experts", "--output=json"]).unwrap();
    assert_eq!(spec(&before), spec(&after));
    assert_eq!(
        namespace
            .kubectl(&[
                "get",
                "services,configmaps",
                "--selector=app.kubernetes.io/managed-by=synthex-operator",
                "--output=name"
            ])
            .unwrap(),
        ""
    );
}

#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_rollout_is_deployed_once_and_drift_is_mended() {
    let (cluster, namespace) = start("deploy");
    let _operator = Operator::start(&cluster, &namespace);
    namespace.apply(&rollout().to_string()).unwrap();
    cluster
        .eventually("staging", namespace.name(), SOON, || {
            for name in
                ["experts", "experts-staging-baseline", "experts-staging-canary", "experts-staging-load"]
            {
                namespace.kubectl(&["get", "deployment", name])?;
            }
            let status = namespace.kubectl(&[
                "get",
                "oro",
                "experts",
                "--output=jsonpath={.status.stage.name} {.status.phase}",
            ])?;
            anyhow::ensure!(status == "staging Progressing", "{status}");
            Ok(())
        })
        .unwrap();
    let columns = namespace.kubectl(&["get", "oro", "experts"]).unwrap();
    assert!(columns.contains("WORST KPI") && columns.contains("3/3"), "{columns}");
    let described = namespace.kubectl(&["describe", "oro", "experts"]).unwrap();
    assert!(described.contains("StageStarted"), "{described}");
    // Somebody scales what the operator owns: it is put back.
    namespace.kubectl(&["scale", "deployment", "experts", "--replicas=3"]).unwrap();
    cluster
        .eventually("replicas put back", namespace.name(), SOON, || {
            let replicas =
                namespace.kubectl(&["get", "deployment", "experts", "--output=jsonpath={.spec.replicas}"])?;
            anyhow::ensure!(replicas == "10", "{replicas}");
            Ok(())
        })
        .unwrap();
    // What is as it should be is not written again: several reconciliations later the versions are the same.
    let generations = || {
        namespace.kubectl(&["get", "deployments,configmaps,services", "--output=jsonpath={range .items[*]}{.metadata.name}={.metadata.managedFields[?(@.manager==\"synthex-operator\")].time} {end}"]).unwrap()
    };
    let before = generations();
    for round in 0..3 {
        namespace
            .kubectl(&["annotate", "oro", "experts", &format!("test/round={round}"), "--overwrite"])
            .unwrap();
    }
    namespace.kubectl(&["annotate", "oro", "experts", "synthex.io/promote=nowhere"]).unwrap();
    cluster
        .eventually("the stale verb refused", namespace.name(), SOON, || {
            let events = namespace.kubectl(&["get", "events", "--output=jsonpath={.items[*].reason}"])?;
            anyhow::ensure!(events.contains("VerbRefused"), "{events}");
            let left =
                namespace.kubectl(&["get", "oro", "experts", "--output=jsonpath={.metadata.annotations}"])?;
            anyhow::ensure!(!left.contains("synthex.io/promote"), "{left}");
            Ok(())
        })
        .unwrap();
    assert_eq!(before, generations());
    // Deleted in mid-rollout, with no pod ever Ready: it must not hang for ever, and Delete leaves nothing.
    namespace
        .kubectl(&[
            "patch",
            "oro",
            "experts",
            "--type=merge",
            "--patch",
            r#"{"spec":{"deletionPolicy":"Delete"}}"#,
        ])
        .unwrap();
    namespace.kubectl(&["delete", "oro", "experts", "--timeout=20s"]).unwrap();
    cluster
        .eventually("nothing left", namespace.name(), SOON, || {
            let left = namespace.kubectl(&["get", "deployments,services", "--output=name"])?;
            anyhow::ensure!(left.is_empty(), "{left}");
            Ok(())
        })
        .unwrap();
}

fn condition(namespace: &Namespace, name: &str, kind: &str) -> anyhow::Result<Value> {
    let json = namespace.kubectl(&["get", "oro", name, "--output=json"])?;
    let object: Value = serde_json::from_str(&json)?;
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    Ok(conditions.into_iter().find(|condition| condition["type"] == kind).unwrap_or_default())
}

fn dry_run(namespace: &Namespace, object: &Value) -> anyhow::Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), object.to_string())?;
    namespace.kubectl(&["apply", "--dry-run=server", "--filename", &file.path().display().to_string()])
}

/// The cluster with the CRD and the RBAC of manifests/, and a namespace of its own.
fn start(prefix: &str) -> (Cluster, Namespace) {
    let cluster = Cluster::connect().unwrap();
    let root = env!("CARGO_MANIFEST_DIR");
    cluster
        .kubectl(&[
            "apply",
            "--server-side",
            "--force-conflicts",
            "--kustomize",
            &format!("{root}/manifests"),
        ])
        .unwrap();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/optimizationrollouts.synthex.io",
            "--timeout=20s",
        ])
        .unwrap();
    let namespace = cluster.namespace(prefix).unwrap();
    (cluster, namespace)
}

/// The operator's own binary, with the rights of its ServiceAccount and nobody else's. Ends with the value.
struct Operator(Child, #[expect(dead_code, reason = "removed when dropped")] tempfile::NamedTempFile);

impl Operator {
    fn start(cluster: &Cluster, namespace: &Namespace) -> Self {
        let token = cluster
            .kubectl(&["create", "token", "synthex-operator", "--namespace", "synthex-system"])
            .unwrap();
        let config =
            cluster.kubectl(&["config", "view", "--raw", "--minify", "--flatten", "--output=json"]).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["users"][0]["user"] = json!({ "token": token });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_synthex-operator"))
            .args([
                "run",
                "--listen=127.0.0.1:0",
                "--prometheus-url=http://127.0.0.1:9",
                "--namespace",
                namespace.name(),
            ])
            .env("KUBECONFIG", file.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child, file)
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
