//! Tier 4: whole rollouts on a real node, with real pods, a real Prometheus and real traffic, in compressed time.
//!
//! Needs a node with the operator installed (KUBECONFIG); `cargo cluster test` brings one up.

use std::{cell::Cell, collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use synthex_cluster::{
    Cluster,
    story::{self, Account, Look, Scene, Then},
};

/// The warm-up and the interval of the quickstart, in seconds.
const WARM_UP: f64 = 5.0;
const INTERVAL: f64 = 2.0;
/// The interval at which the harness's Prometheus scrapes, in seconds.
const SCRAPE: f64 = 1.0;

/// The harmful optimization goes, the others stay, although the operator is killed in the middle of a stage.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn the_harmful_optimization_alone_is_rolled_back_though_the_operator_is_killed() -> Result<()> {
    let cluster = Cluster::connect()?;
    let killed = Cell::new(false);
    let account = story::tell(&cluster, &story::quickstart()?, |look| {
        if !killed.get()
            && look.status("/stage/name") == "progressive-25"
            && look.status("/stage/step") == "Observing"
        {
            kill_operator(&cluster)?;
            killed.set(true);
        }
        Ok(Then::GoesOn)
    })?;
    ensure!(killed.get(), "the operator was never killed");
    story::check_harmful(&cluster, &account)?;
    report("harmful", &account);
    for stage in ["canary", "progressive-25", "progressive-50", "progressive-100"] {
        baked(&cluster, &account, stage, 30.0, 0.0)?;
    }
    Ok(())
}

/// Nothing does harm, and Prometheus is away for two minutes in mid-canary: the rollout holds, is `Stalled` after a minute as the user
/// wants, writes no status meanwhile, then goes on and completes.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_harmless_rollout_holds_while_prometheus_is_away_and_completes() -> Result<()> {
    let cluster = Cluster::connect()?;
    let outage = Duration::from_secs(120);
    let away: Cell<Option<(std::time::Instant, String)>> = Cell::new(None);
    let back = Cell::new(false);
    let mut versions = BTreeSet::new();
    let mut scene = story::harmless()?;
    scene.rollout["spec"]["analysis"]["noDataDeadline"] = json!("60s");
    let account = story::tell(&cluster, &scene, |look| {
        if back.get() {
            return Ok(Then::GoesOn);
        }
        let in_canary = look.status("/stage/name") == "canary" && look.status("/stage/step") == "Observing";
        match away.take() {
            None if in_canary => {
                scale_prometheus(&cluster, 0)?;
                away.set(Some((std::time::Instant::now(), String::new())));
            }
            None => {}
            Some((since, observed)) => {
                let elapsed = since.elapsed();
                ensure!(
                    in_canary,
                    "the rollout went on while Prometheus was away: {}",
                    look.rollout["status"]
                );
                // What was under way when it was cut may still arrive; after that the clock stands.
                let observed = match elapsed > Duration::from_secs(60) {
                    true if observed.is_empty() => {
                        let telemetry = condition(look, "TelemetryAvailable");
                        ensure!(telemetry["status"] == "False", "{telemetry}");
                        look.status("/stage/observed").to_owned()
                    }
                    true => {
                        ensure!(
                            look.status("/stage/observed") == observed,
                            "the bake clock went on: {}",
                            look.rollout["status"]
                        );
                        versions.insert(look.rollout["metadata"]["resourceVersion"].to_string());
                        observed
                    }
                    false => observed,
                };
                if elapsed >= outage {
                    let stalled = condition(look, "Stalled");
                    ensure!(stalled["reason"] == "TelemetryUnavailable", "{stalled}");
                    scale_prometheus(&cluster, 1)?;
                    back.set(true);
                } else {
                    away.set(Some((since, observed)));
                }
            }
        }
        Ok(Then::GoesOn)
    });
    if !back.get() {
        scale_prometheus(&cluster, 1)?;
    }
    let account = account?;
    ensure!(back.get(), "Prometheus was never cut");
    // That it is stalled, and another reason of a KPI or two, such as a refused connection after one that was cut.
    ensure!(versions.len() <= 5, "{} statuses written in a minute without samples", versions.len());
    story::check_harmless(&cluster, &account)?;
    report("harmless, Prometheus away", &account);
    // At each end of the outage a sample counts as fresh for up to two intervals.
    baked(&cluster, &account, "canary", 30.0, 2.0 * INTERVAL)
}

/// The same twice more, undisturbed: no alarm in any.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_harmless_rollout_completes_again_and_again() -> Result<()> {
    let cluster = Cluster::connect()?;
    for _ in 0..2 {
        let account = story::tell(&cluster, &story::harmless()?, |_| Ok(Then::GoesOn))?;
        story::check_harmless(&cluster, &account)?;
        report("harmless", &account);
    }
    Ok(())
}

/// Errors, latency and memory, each made worse by one optimization: the KPI that shows it names the one, and no other goes.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn each_fault_is_caught_by_the_kpi_that_shows_it() -> Result<()> {
    let cluster = Cluster::connect()?;
    // One connection per host carries ten queries a second at most. Who does not wait for it fails; who waits is late.
    let one_connection = json!({"unified": {"perHost": 1, "acquireTimeout": "1ms"}});
    let patient = json!({"unified": {"perHost": 1, "acquireTimeout": "10s"}});
    // Answers of 16 KiB, each kept for an hour where the baseline forgets them after a second.
    let hoard = json!({"cacheTtl": {"ttl": "1h", "maxEntries": 1_000_000, "memoryLimit": "256MiB"}});
    for (fault, guilty, config, rate, kpi) in [
        ("errors", "connections", one_connection, "150", "upstream-errors"),
        ("latency", "connections", patient, "60", "upstream-latency"),
        ("memory", "memory", hoard, "150", "memory"),
    ] {
        let scene = faulty(guilty, config, rate)?;
        let account = story::tell(&cluster, &scene, |look| {
            let states = look.rollout["status"]["optimizations"].as_array().cloned().unwrap_or_default();
            let caught = states.iter().any(|optimization| optimization["state"] == "RolledBack");
            Ok(if caught { Then::Ends } else { Then::GoesOn })
        })?;
        let reasons = account.reasons("OptimizationRolledBack");
        ensure!(account.optimizations("RolledBack") == BTreeSet::from([guilty]), "{fault}: {reasons:?}");
        ensure!(account.optimizations("Active").len() == 2, "{fault}: {}", account.rollout["status"]);
        // The queries that fail for it may be seen in the same look.
        let told = reasons.len() == 1
            && reasons[0].starts_with(&format!("{guilty} switched off in stage canary: "))
            && reasons[0].contains(&format!(" {kpi}: "));
        ensure!(told, "{fault}: {reasons:?}");
        let decisions = account.rollout["status"]["decisions"].as_array().cloned().unwrap_or_default();
        let basis = decisions.iter().find(|decision| decision["what"] == "OptimizationRolledBack");
        let basis = basis.map(|decision| decision["basis"].clone()).unwrap_or_default();
        let (from, until) = (basis["from"].as_i64(), basis["until"].as_i64());
        let ticks = from.zip(until).with_context(|| format!("{fault}: the decision has no basis"))?;
        println!("{fault}: caught by {kpi} {} s after its evidence began: {}", ticks.1 - ticks.0, reasons[0]);
    }
    Ok(())
}

/// One stage with a fifth of the pods, KPIs that are each owned by one optimization, and one optimization with this configuration.
fn faulty(guilty: &str, config: Value, rate: &str) -> Result<Scene> {
    let mut scene = story::quickstart()?;
    let spec = &mut scene.rollout["spec"];
    spec["stages"] = json!([{"name": "canary", "duration": "5m", "weight": 20}]);
    spec["workload"]["runtime"]["config"]["baseline"] = json!({"cacheTtl": "1s"});
    let upstream = |outcome: &str| format!("synthex_runtime_upstream_requests_total{{$arm{outcome}}}");
    let histogram = "synthex_runtime_upstream_duration_seconds_bucket{$arm}";
    spec["optimizations"] = json!([
        {"name": "memory", "kpis": [
            {"name": "memory", "gauge": {"query": "sum by (pod) (process_resident_memory_bytes{$arm})"}},
        ]},
        {"name": "connections", "kpis": [
            {"name": "upstream-errors", "errorRatio": {
                "errors": upstream(",outcome!=\"ok\""), "total": upstream(""), "minimumEffect": 0.02}},
            {"name": "upstream-latency", "latency": {"histogram": histogram, "minimumEffect": 0.02}},
        ]},
        {"name": "monitoring", "kpis": []},
    ]);
    let optimizations = spec["optimizations"].as_array_mut().context("a list was put there")?;
    for optimization in optimizations.iter_mut().filter(|optimization| optimization["name"] == guilty) {
        optimization["config"] = config.clone();
    }
    scene.load = scene.load.replace("\"150\"", &format!("{rate:?}"));
    scene.experts = scene.experts.replace("--latency, 100ms", "--latency, 100ms, --size, 16KiB");
    Ok(scene)
}

fn condition(look: &Look, kind: &str) -> Value {
    let conditions = look.rollout["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == kind).unwrap_or_default()
}

fn kill_operator(cluster: &Cluster) -> Result<()> {
    let selector = "app.kubernetes.io/name=synthex-operator";
    let args = [
        "-n",
        "synthex-system",
        "delete",
        "pod",
        "--selector",
        selector,
        "--grace-period=0",
        "--force",
        "--wait=false",
    ];
    cluster.kubectl(&args).map(drop)
}

fn scale_prometheus(cluster: &Cluster, replicas: u32) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    cluster.kubectl(&["-n", "monitoring", "scale", "deployment/prometheus", &replicas]).map(drop)
}

/// Whether Prometheus' own timestamps tell of at least `seconds` of samples of the canary between the start of a stage's evidence
/// and its end; the ends of that span fall between two scrapes.
fn baked(cluster: &Cluster, account: &Account, stage: &str, seconds: f64, slack: f64) -> Result<()> {
    let time = |what: &str, last: bool| -> Result<f64> {
        let mut found = account
            .decisions
            .values()
            .filter(|d| d.what == what && d.why.contains(&format!("stage {stage} ")));
        let decision = if last { found.next_back() } else { found.next() };
        story::unix_seconds(&decision.with_context(|| format!("no {what} of {stage}"))?.time)
    };
    // A restart of the evidence begins the bake anew.
    let from = time("StageRestarted", true).or_else(|_| time("StageStarted", false))? + WARM_UP;
    let to = time("StagePassed", true)?;
    let sampled = story::sampled_seconds(cluster, "canary", from, to, 2.0 * INTERVAL)?;
    ensure!(
        sampled + SCRAPE + slack >= seconds,
        "stage {stage} passed after {sampled:.1} s of samples, {seconds} s were asked"
    );
    println!("stage {stage}: {sampled:.1} s of samples");
    Ok(())
}

fn report(story: &str, account: &Account) {
    let load: &Value = &account.load;
    println!(
        "{story}: {} requests answered, {} failed {:?}; fewest Ready pods {}; switched off after {:?}",
        load["ok"],
        load["failed"],
        account.failures(),
        account.fewest_serving,
        account.switched_off_after
    );
}
