//! Tier 4: whole rollouts on a real node, with real pods, a real Prometheus and real traffic, in compressed time.
//!
//! Needs a node with the operator installed (KUBECONFIG); `cargo cluster test` brings one up.

use std::{cell::Cell, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use synthex_cluster::{
    Cluster,
    story::{self, Account, Look},
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
        Ok(())
    })?;
    ensure!(killed.get(), "the operator was never killed");
    story::check_harmful(&cluster, &account)?;
    report("harmful", &account);
    for stage in ["canary", "progressive-25", "progressive-50", "progressive-100"] {
        baked(&cluster, &account, stage, 30.0, 0.0)?;
    }
    Ok(())
}

/// Nothing does harm, and Prometheus is away for two minutes in mid-canary: the rollout holds, then goes on and completes.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_harmless_rollout_holds_while_prometheus_is_away_and_completes() -> Result<()> {
    let cluster = Cluster::connect()?;
    let outage = Duration::from_secs(120);
    let away: Cell<Option<(std::time::Instant, String)>> = Cell::new(None);
    let back = Cell::new(false);
    let account = story::tell(&cluster, &story::harmless()?, |look| {
        if back.get() {
            return Ok(());
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
                        ensure!(telemetry(look) == "False", "TelemetryAvailable is {}", telemetry(look));
                        look.status("/stage/observed").to_owned()
                    }
                    true => {
                        ensure!(
                            look.status("/stage/observed") == observed,
                            "the bake clock went on: {}",
                            look.rollout["status"]
                        );
                        observed
                    }
                    false => observed,
                };
                if elapsed >= outage {
                    scale_prometheus(&cluster, 1)?;
                    back.set(true);
                } else {
                    away.set(Some((since, observed)));
                }
            }
        }
        Ok(())
    });
    if !back.get() {
        scale_prometheus(&cluster, 1)?;
    }
    let account = account?;
    ensure!(back.get(), "Prometheus was never cut");
    story::check_harmless(&cluster, &account)?;
    report("harmless, Prometheus away", &account);
    // At each end of the outage a sample counts as fresh for up to two intervals.
    baked(&cluster, &account, "canary", 30.0, 2.0 * INTERVAL)
}

/// The same once more, undisturbed.
#[test]
#[ignore = "needs a cluster: run by cargo cluster test"]
fn a_harmless_rollout_completes_again() -> Result<()> {
    let cluster = Cluster::connect()?;
    let account = story::tell(&cluster, &story::harmless()?, |_| Ok(()))?;
    story::check_harmless(&cluster, &account)?;
    report("harmless", &account);
    Ok(())
}

fn telemetry(look: &Look) -> String {
    let conditions = look.rollout["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == "TelemetryAvailable");
    found.and_then(|condition| condition["status"].as_str()).unwrap_or_default().to_owned()
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
