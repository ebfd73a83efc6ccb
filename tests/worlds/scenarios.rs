//! Which worlds there are: from a kind and a seed to a setup, and to what must come of it.

use serde_json::{Value, json};
use synthex_operator::{api::Mode, decision::replicas};

use super::{
    cluster::{Effect, Known, Traffic},
    prometheus::Health,
    rng::Rng,
    world::{Act, Setup},
};

/// Kinds of world.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Nothing does harm; pods are evicted, nodes go away.
    Healthy,
    /// `connections`, which has a KPI of its own, does harm.
    OwnedHarm,
    /// `memory`, which has none, does harm.
    SharedHarm,
    /// Both do.
    TwoHarms,
    /// The canary's pods crash, are killed for want of memory, or are never Ready again.
    Breaking,
    /// Prometheus is away at any time.
    Outage,
    /// The user's verbs at any time, many of them stale.
    Verbs,
    /// The user edits while the rollout runs.
    Edits,
    /// The rollout is deleted while it runs.
    Deletion,
    /// Alarms do not act.
    Observe,
    /// The canary is compared with the stable pods.
    Stable,
    /// All of it, with an operator that crashes often.
    Chaos,
    /// Objects of somebody else bear our names.
    Foreign,
}

/// What must come of a world.
#[derive(Clone, Debug, Default)]
pub struct Expect {
    /// Does harm that can be detected, and must not be promoted.
    pub harmful: Vec<String>,
    /// Must not be rolled back.
    pub kept: Vec<String>,
    /// Must come to an end.
    pub ends: bool,
    /// Kubernetes' own signals tell of no harm.
    pub no_signal: bool,
    /// The object must be gone at the end.
    pub deleted: bool,
}

/// The world of this kind and seed.
pub fn scenario(kind: Kind, seed: u64) -> (Setup, Expect) {
    let mut rng = Rng::new(seed, 100 + kind as u64);
    let canonical = seed >= 1_000_000;
    let interval = if canonical { 5 } else { rng.pick(&[2, 5, 15]) };
    let n = if canonical { 5 } else { rng.pick(&[1, 2, 3, 4, 5, 8, 10, 10, 12, 20, 40]) };
    let weights: Vec<i32> =
        [10, 25, 50, 100].into_iter().filter(|weight| !replicas::exceeds(n, *weight)).collect();
    let bake = |rng: &mut Rng| format!("{}s", if canonical { 30 } else { rng.range(4, 16) * 15 });
    let mut stages: Vec<Value> = vec![];
    if canonical || rng.chance(0.7) {
        stages.push(json!({
            "name": "staging", "duration": bake(&mut rng),
            "staging": {"replicas": rng.range(1, 3), "load": {"requestsPerSecond": 100}},
        }));
    }
    for weight in &weights {
        if (canonical && *weight >= 50) || (!canonical && rng.chance(0.8)) || *weight == 100 {
            stages.push(json!({"name": format!("p{weight}"), "duration": bake(&mut rng), "weight": weight}));
        }
    }
    let mut spec = json!({
        "workload": {"runtime": {"replicas": n, "config": {
            "experts": [{"name": "alpha", "kind": "http", "url": "http://alpha:8000/query"}]}}},
        // One KPI of each kind, and no more: a world pays for each at every tick.
        "kpis": [
            {"name": "query-errors", "errorRatio": {
                "errors": "synthex_runtime_queries_total{$arm,outcome=~\"error|shed\"}",
                "total": "synthex_runtime_queries_total{$arm}"}},
            {"name": "query-latency", "latency": {"histogram": "synthex_runtime_query_duration_seconds_bucket{$arm}"}},
        ],
        "optimizations": [
            {"name": "memory", "kpis": [
                {"name": "memory", "required": false, "gauge": {"query": "process_resident_memory_bytes{$arm}"}},
            ]},
            {"name": "connections", "kpis": [
                {"name": "upstream-errors", "errorRatio": {
                    "errors": "synthex_runtime_upstream_requests_total{$arm,outcome!=\"ok\"}",
                    "total": "synthex_runtime_upstream_requests_total{$arm}"}},
            ]},
            {"name": "monitoring", "kpis": []},
        ],
        "stages": stages,
        "analysis": {"interval": format!("{interval}s"), "warmUp": format!("{}s", rng.range(0, 2) * 10)},
    });
    let effect = Effect::none;
    let mut effects = [effect(), effect(), effect()];
    let names = ["memory", "connections", "monitoring"];
    let mut expect = Expect { ends: true, ..Expect::default() };
    let mut traffic = Traffic {
        rate: 30.0 * n as f64,
        staging_rate: 100.0,
        query_errors: rng.pick(&[0.0005, 0.002, 0.01]),
        upstream_errors: rng.pick(&[0.0005, 0.002, 0.005]),
        heterogeneity: rng.pick(&[0.0, 0.1, 0.3]),
        drift: rng.pick(&[0.0, 0.3, 0.7]),
        bursts: rng.pick(&[0.0, 0.01]),
    };
    let mut script: Vec<(i64, Act)> = vec![];
    let mut horizon = 6000;
    let (mut crashes, mut failing) = (0.0, 0.0);
    let mut foreign = vec![];
    // Far above what can be told from the unlikeness of two pods: a third of the queries and more.
    let large = |rng: &mut Rng, rate: f64| rng.range(30, 60) as f64 / 100.0 / rate;
    let arms = ["", "", "baseline", "staging-baseline"];
    let production_only = rng.chance(0.6);
    let noise = |rng: &mut Rng, script: &mut Vec<(i64, Act)>| {
        for _ in 0..rng.range(0, 4) {
            let time = rng.range(60, 1500);
            match rng.range(0, 2) {
                0 => script.push((time, Act::Evict(rng.pick(&["", "canary", "baseline", "staging-canary"])))),
                1 => script.push((time, Act::CrashPod(rng.pick(&arms)))),
                _ => {
                    let node = rng.range(0, 2) as usize;
                    script.push((time, Act::Node(node, false)));
                    script.push((time + rng.range(5, 200), Act::Node(node, true)));
                }
            }
        }
    };
    let outage = |rng: &mut Rng, script: &mut Vec<(i64, Act)>| {
        for _ in 0..rng.range(1, 3) {
            let time = rng.range(10, 1500);
            let health = rng.pick(&[Health::Unreachable, Health::Dead, Health::Blind, Health::Malformed]);
            script.push((time, Act::Telemetry(health)));
            script.push((time + rng.range(5, 500), Act::Telemetry(Health::Well)));
        }
        // Whatever overlaps, it is well in the end.
        script.push((2100, Act::Telemetry(Health::Well)));
    };
    let owned = |rng: &mut Rng, traffic: &Traffic| Effect {
        upstream: large(rng, traffic.upstream_errors),
        production_only,
        ..effect()
    };
    let shared = |rng: &mut Rng, traffic: &Traffic| Effect {
        query: large(rng, traffic.query_errors),
        production_only,
        ..effect()
    };
    let patches = [
        json!({"optimizations": {"memory": {
            "objectPool": {"enabled": true}, "cacheTtl": {"enabled": true},
            "evict": {"enabled": true}, "batchLimit": {"enabled": true}}}}),
        json!({"optimizations": {"connections": {"unified": {"enabled": true}}}}),
        json!({"optimizations": {"monitoring": {
            "adaptiveSampling": {"enabled": true}, "preAggregation": {"enabled": true},
            "cardinalityLimit": {"enabled": true}}}}),
    ];
    let keep = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let mut known: Vec<Known> = vec![];
    match kind {
        Kind::Healthy => {
            noise(&mut rng, &mut script);
            expect.no_signal = true;
            // Pods that had their troubles before they took any optimization.
            for _ in 0..rng.range(0, 8) {
                script.push((rng.range(20, 500), Act::CrashPod("")));
            }
            // One more, error counters that exist from the first error on, and a bound that is kept.
            spec["kpis"] = json!([
                {"name": "query-errors", "errorRatio": {
                    "errors": "synthex_runtime_queries_total{$arm,outcome=~\"error|shed\"}",
                    "total": "synthex_runtime_queries_total{$arm}"}},
                {"name": "gauge", "threshold": {"query": "max(world_gauge{$arm})", "max": 0.9}},
            ]);
            crashes = if rng.chance(0.3) { 0.02 } else { 0.0 };
        }
        Kind::OwnedHarm => {
            effects[1] = owned(&mut rng, &traffic);
            expect.harmful = keep(&["connections"]);
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
            if !canonical && rng.chance(0.3) {
                // It leaks, too: found by its KPI first, it must not drag the others along.
                effects[1].oom_after = rng.range(20, 60);
            }
            if !canonical && rng.chance(0.3) {
                let time = rng.range(300, 1500);
                script.push((time, Act::RemoveOptimization("connections".into())));
                script.push((time + rng.range(1, 300), Act::AddOptimization(json!({"name": "connections"}))));
            }
            if canonical {
                effects[1].production_only = true;
            }
        }
        Kind::SharedHarm => {
            effects[0] = if rng.chance(0.3) {
                spec["kpis"] = json!([
                    {"name": "gauge", "threshold": {"query": "max(world_gauge{$arm})", "max": 0.9, "consecutive": rng.range(1, 4)}},
                ]);
                Effect { gauge: 1.5, production_only, ..effect() }
            } else {
                shared(&mut rng, &traffic)
            };
            expect.harmful = keep(&["memory"]);
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
        }
        Kind::TwoHarms => {
            effects[0] = shared(&mut rng, &traffic);
            effects[1] = owned(&mut rng, &traffic);
            expect.harmful = keep(&["memory", "connections"]);
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
        }
        Kind::Breaking => {
            effects[0] = match rng.range(0, 2) {
                0 => Effect { crash: 0.05, production_only, ..effect() },
                1 => Effect { oom_after: rng.range(10, 60), production_only, ..effect() },
                _ => Effect { unready_after: rng.range(1, 60), production_only, ..effect() },
            };
            expect.harmful = keep(&["memory"]);
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
        }
        Kind::Outage => {
            outage(&mut rng, &mut script);
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
            if rng.chance(0.5) {
                effects[1] = owned(&mut rng, &traffic);
                expect.harmful = keep(&["connections"]);
                expect.kept = keep(&["monitoring"]);
            } else {
                expect.kept = keep(&names);
            }
        }
        Kind::Verbs => {
            let stage = |rng: &mut Rng| match rng.range(0, 3) {
                0 => "p50".to_owned(),
                1 => "nowhere".to_owned(),
                _ => "{stage}".to_owned(),
            };
            for _ in 0..rng.range(1, 6) {
                let time = rng.range(1, 1200);
                let act = match rng.range(0, 9) {
                    0 => Act::Verb("abort", stage(&mut rng)),
                    1 | 2 => {
                        Act::Verb("rollback", rng.pick(&["memory", "connections", "nothing"]).to_owned())
                    }
                    3 | 4 => Act::Verb("promote", stage(&mut rng)),
                    5..=7 => Act::Verb("promote", format!("force:{}", stage(&mut rng))),
                    _ => Act::Pause(true),
                };
                script.push((time, act));
            }
            script.push((1500, Act::Pause(false)));
            for stage in spec["stages"].as_array_mut().into_iter().flatten() {
                if rng.chance(0.3) {
                    stage["approval"] = json!("Required");
                }
            }
            if rng.chance(0.5) {
                outage(&mut rng, &mut script);
                // The user loses patience just then.
                let away = |(at, act): &(i64, Act)| {
                    matches!(act, Act::Telemetry(health) if *health != Health::Well).then_some(*at)
                };
                let times: Vec<i64> = script.iter().filter_map(away).collect();
                for time in times {
                    script.push((time + rng.range(1, 40), Act::Verb("promote", "force:{stage}".to_owned())));
                }
            }
            for at in 0..40 {
                script.push((1600 + at * 100, Act::Verb("promote", "{stage}".to_owned())));
            }
            if rng.chance(0.3) {
                effects[1] = owned(&mut rng, &traffic);
                expect.harmful = keep(&["connections"]);
            }
            (crashes, failing) = (0.02, 0.02);
        }
        Kind::Edits | Kind::Chaos => {
            for _ in 0..rng.range(1, 4) {
                let time = rng.range(1, 1500);
                let act = match rng.range(0, 12) {
                    0 => Act::Replicas(rng.pick(&[5, 10, 12, 20])),
                    1 => Act::Bake(rng.range(0, 4) as usize, 15),
                    2 | 3 => Act::RemoveStage(rng.range(0, 4) as usize),
                    4 => Act::Weight(rng.range(0, 4) as usize, rng.pick(&[15, 20, 40, 70])),
                    5 => Act::Base("dispatch", json!({"deadline": "20s"})),
                    6 => Act::Configure("connections".into(), object(json!({"unified": {"perHost": 20}}))),
                    7 => Act::Configure("memory".into(), object(json!({"cacheTtl": {"ttl": "10m"}}))),
                    8 => Act::RemoveOptimization(rng.pick(&names).to_owned()),
                    9 => Act::AddOptimization(
                        json!({"name": "queue", "config": {"server": {"maxInFlight": 512}}}),
                    ),
                    10 => Act::Tolerance(2.0),
                    11 => Act::Mode(Mode::Observe),
                    _ => Act::Pause(true),
                };
                script.push((time, act));
            }
            script.push((1600, Act::Pause(false)));
            script.push((1600, Act::Mode(Mode::Enforce)));
            if rng.chance(0.4) {
                effects[1] = owned(&mut rng, &traffic);
                expect.harmful = keep(&["connections"]);
            }
            if kind == Kind::Chaos {
                noise(&mut rng, &mut script);
                outage(&mut rng, &mut script);
                (crashes, failing) = (0.05, 0.03);
                for _ in 0..rng.range(0, 2) {
                    let time = rng.range(30, 1500);
                    script.push((
                        time,
                        match rng.range(0, 3) {
                            0 => Act::DeleteChild("Deployment", rng.pick(&["", "canary", "baseline"])),
                            1 => Act::DeleteChild("ConfigMap", rng.pick(&["", "canary", "baseline"])),
                            2 => Act::Scale(rng.pick(&["", "canary", "baseline"]), 1),
                            _ => Act::CrashOperator,
                        },
                    ));
                }
                if rng.chance(0.2) {
                    script.push((rng.range(30, 600), Act::Full(rng.range(10, 900))));
                }
            } else {
                crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
            }
            horizon = 9000;
        }
        Kind::Deletion => {
            spec["deletionPolicy"] = json!(rng.pick(&["Orphan", "Delete"]));
            let time = rng.range(1, 900);
            // A mistake that the API server cannot see, which the user does not mend before.
            if rng.chance(0.4) {
                script.push((time - rng.range(0, 60), Act::Base("nonsense", json!(1))));
            }
            script.push((time, Act::Delete));
            crashes = 0.02;
            expect.deleted = true;
            // With every watch event lost, only the hourly look finds it.
            horizon = 6500;
        }
        Kind::Observe => {
            spec["analysis"]["mode"] = json!("Observe");
            if rng.chance(0.5) {
                effects[1] = owned(&mut rng, &traffic);
                expect.harmful = keep(&["connections"]);
            } else {
                effects[0] = Effect { oom_after: rng.range(10, 60), production_only, ..effect() };
                expect.harmful = keep(&["memory"]);
                script.push((rng.range(100, 600), Act::Evict("canary")));
            }
            expect.kept = keep(&names);
            expect.ends = false;
            horizon = 2500;
        }
        Kind::Stable => {
            spec["comparison"] = json!("Stable");
            if rng.chance(0.5) {
                effects[1] = owned(&mut rng, &traffic);
                expect.harmful = keep(&["connections"]);
            } else {
                noise(&mut rng, &mut script);
            }
            crashes = if rng.chance(0.5) { 0.02 } else { 0.0 };
        }
        Kind::Foreign => {
            foreign = vec![rng.pick(&[
                ("Deployment", "w"),
                ("ConfigMap", "w-canary"),
                ("Service", "w"),
                ("Deployment", "w-staging-load"),
            ])];
            expect.ends = false;
            horizon = 900;
        }
    }
    if canonical {
        traffic.query_errors = 0.01;
        traffic.upstream_errors = 0.005;
        traffic.heterogeneity = 0.0;
        traffic.bursts = 0.0;
    }
    for ((name, patch), effect) in names.iter().zip(patches).zip(effects) {
        known.push(Known { name: (*name).to_owned(), patch, effect });
    }
    // The configurations to which the user may change: without harm.
    for (name, patch) in [
        (
            "connections",
            json!({"optimizations": {"connections": {"unified": {"enabled": true, "perHost": 20}}}}),
        ),
        (
            "memory",
            json!({"optimizations": {"memory": {
                "objectPool": {"enabled": true}, "cacheTtl": {"enabled": true, "ttl": "10m"},
                "evict": {"enabled": true}, "batchLimit": {"enabled": true}}}}),
        ),
        ("queue", json!({"server": {"maxInFlight": 512}})),
    ] {
        known.push(Known { name: name.to_owned(), patch, effect: effect() });
    }
    if matches!(kind, Kind::Healthy | Kind::Stable) && expect.harmful.is_empty() && kind == Kind::Stable {
        expect.kept = keep(&names);
    }
    let setup = Setup {
        seed,
        spec,
        known,
        traffic,
        scrape: if interval == 2 { 2 } else { 5 },
        lost: rng.pick(&[0.0, 0.0, 0.5, 1.0]),
        slow: rng.pick(&[0.0, 0.05]),
        failing,
        crashes,
        crash_at: None,
        script,
        horizon,
        foreign,
    };
    (setup, expect)
}

fn object(value: Value) -> synthex_operator::api::Object {
    value.as_object().cloned().unwrap_or_default()
}
