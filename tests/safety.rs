//! What a verdict leads to: the rows of the safety table that the state machine decides. Each row is a KPI's status and how long it
//! has stood, and what must and must not follow. What each odd answer of Prometheus is called is tested in `prometheus.rs` and in
//! `judge/`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::{Value, json};
use synthex_operator::{
    api::{
        Carry, Cause, Change, Counts, DeletionPolicy, Evidence, GaugeEvidence, KpiStatus,
        OptimizationRollout, OptimizationState, OptimizationStatus, Phase, Preflight, RolloutStatus,
        ShareEvidence, StageStatus, Step, Track, Verdict, What,
    },
    decision::{
        judge::{self, Test},
        machine::{self, Plan},
        render::{PROMOTED_ANNOTATION, ROLLED_BACK_ANNOTATION, Variant},
        report::worth_writing,
        resolve::{Defaults, Refusal, Rollout, resolve},
        snapshot::{Observed, Pod, Snapshot, Verb},
    },
};

const NOW: i64 = 1_000_000;

fn rollout(analysis: &Value) -> Rollout {
    let defaults = Defaults { runtime_image: "r:dev".into(), prometheus_url: "http://p:9090".into() };
    resolve(&object(analysis), &defaults).unwrap()
}

fn object(analysis: &Value) -> OptimizationRollout {
    let ratio = |name: &str, required: bool| json!({"name": name, "required": required, "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}"}});
    let promise = |on_miss: &str| {
        json!({"name": "memory", "required": false, "expect": {"change": -0.35, "onMiss": on_miss},
               "gauge": {"query": "m{$arm}"}})
    };
    let on_miss = analysis["onMiss"].as_str().unwrap_or("Warn");
    let mut analysis = analysis.clone();
    analysis.as_object_mut().unwrap().remove("onMiss");
    let spec = json!({
        "workload": {"runtime": {"replicas": 10, "config": {
            "experts": [{"name": "alpha", "kind": "http", "url": "http://alpha:8000/query"}],
        }}},
        "optimizations": [
            {"name": "memory", "kpis": [promise(on_miss)]},
            {"name": "connections", "kpis": [ratio("upstream", true)]},
            {"name": "monitoring", "kpis": [ratio("optional", false)]},
        ],
        "kpis": [ratio("errors", true), {"name": "shown", "observeOnly": true, "threshold": {"query": "q", "max": 1.0}}],
        "stages": [
            {"name": "canary", "duration": "10m", "weight": 10},
            {"name": "half", "duration": "10m", "weight": 50},
        ],
        "analysis": analysis,
    });
    let mut object = OptimizationRollout::new("experts", serde_json::from_value(spec).unwrap());
    object.metadata.namespace = Some("shop".into());
    object
}

fn ago(seconds: i64) -> Time {
    Time(Timestamp::from_second(NOW - seconds).unwrap())
}

/// A KPI that has stood like this for some seconds.
fn kpi(name: &str, owner: Option<&str>, verdict: Verdict, reason: Cause, since: i64) -> KpiStatus {
    let share = ShareEvidence {
        canary: Counts { events: 5.0, total: 9000.0 },
        baseline: Counts { events: 5.0, total: 9000.0 },
        ..Default::default()
    };
    KpiStatus {
        name: name.into(),
        owner: owner.map(str::to_owned),
        verdict,
        reason,
        reads: String::new(),
        since: Some(ago(since)),
        message: format!("{name} says so"),
        canary: Some(0.001),
        baseline: Some(0.001),
        change: None,
        log_evidence: Some(0.0),
        alarm_at: Some(8.0),
        tolerated: Some(1.5),
        detectable: None,
        doubling_found_in: None,
        evidence: Some(Evidence {
            last_tick: NOW - 30,
            fresh_ticks: 60,
            shares: vec![share],
            ..Evidence::default()
        }),
    }
}

fn healthy() -> Vec<KpiStatus> {
    vec![
        kpi("errors", None, Verdict::Pass, Cause::Judged, 600),
        kpi("shown", None, Verdict::Pass, Cause::Judged, 600),
        kpi("memory", Some("memory"), Verdict::Pass, Cause::Judged, 600),
        kpi("upstream", Some("connections"), Verdict::Pass, Cause::Judged, 600),
        kpi("optional", Some("monitoring"), Verdict::Pass, Cause::Judged, 600),
    ]
}

/// Healthy KPIs but for some.
fn but(changed: &[KpiStatus]) -> Vec<KpiStatus> {
    let mut kpis = healthy();
    for kpi in changed {
        *kpis.iter_mut().find(|known| known.name == kpi.name).unwrap() = kpi.clone();
    }
    kpis
}

/// The status of a rollout in mid-canary whose bake of 10 minutes is over.
fn status(kpis: &[KpiStatus]) -> RolloutStatus {
    let optimization = |name: &str| OptimizationStatus {
        name: name.into(),
        state: OptimizationState::Active,
        stage: "canary".into(),
        since: ago(2000),
        reason: String::new(),
        benefit: String::new(),
        config_hash: String::new(),
    };
    let mut learned = vec![];
    for (name, spread) in [("errors", 1), ("upstream", 1), ("optional", 1), ("memory", 2)] {
        learned.push(Preflight {
            kpi: name.into(),
            track: Track::Production,
            reads: String::new(),
            until: NOW - 1500,
            pods: 8,
            cautious_until: None,
            spread: vec![0.1; spread],
            bounds: vec![],
            native: false,
            shares: vec![0.001],
            requests: 50.0,
        });
    }
    RolloutStatus {
        stage: Some(StageStatus {
            name: "canary".into(),
            index: 0,
            step: Step::Observing,
            attempt: 1,
            stages: 2,
            spent: BTreeMap::new(),
            replaced: 0,
            entered_at: ago(2000),
            attempt_at: ago(2000),
            subject: String::new(),
            exposed_at: Some(ago(1600)),
            observed: Default::default(),
            blame: None,
            promoted: None,
            foretold: false,
            before: None,
        }),
        optimizations: ["memory", "connections", "monitoring"].map(optimization).into(),
        kpis: kpis.to_vec(),
        preflight: learned,
        ..RolloutStatus::default()
    }
}

fn plan(analysis: &Value, kpis: Vec<KpiStatus>, change: impl FnOnce(&mut Snapshot)) -> Plan {
    let rollout = rollout(analysis);
    let mut status = status(&kpis);
    for optimization in &mut status.optimizations {
        optimization.config_hash.clone_from(&rollout.optimization(&optimization.name).unwrap().config_hash);
    }
    let pods = |count: usize| Observed {
        replicas: count as i32,
        pods: (0..count).map(|n| Pod { name: format!("p{n}"), ready: true, ..Pod::default() }).collect(),
        ..Observed::default()
    };
    let variants = BTreeMap::from([
        (Variant::Canary, pods(1)),
        (Variant::Baseline, pods(1)),
        (Variant::Stable, pods(8)),
    ]);
    let mut snapshot = Snapshot { status, variants, ..Snapshot::default() };
    change(&mut snapshot);
    machine::step(&rollout, &snapshot, kpis, Timestamp::from_second(NOW).unwrap())
}

fn rolled_back(plan: &Plan) -> Vec<&str> {
    let off = plan.status.optimizations.iter().filter(|o| o.state == OptimizationState::RolledBack);
    off.map(|o| o.name.as_str()).collect()
}

fn stage(plan: &Plan) -> &str {
    plan.status.stage.as_ref().map_or("", |stage| &stage.name)
}

fn stalled(plan: &Plan) -> Option<&str> {
    let condition = plan.status.conditions.iter().find(|c| c.type_ == "Stalled" && c.status == "True")?;
    Some(&condition.reason)
}

fn stalled_message(status: &RolloutStatus) -> &str {
    &status.conditions.iter().find(|condition| condition.type_ == "Stalled").unwrap().message
}

/// One row: its name, the KPIs, and what follows: who is rolled back, the stage, and why it is stalled.
type Row<'a> = (&'a str, Vec<KpiStatus>, &'a [&'a str], &'a str, Option<&'a str>);

const ALL: [&str; 3] = ["memory", "connections", "monitoring"];

#[test]
fn each_row_of_the_safety_table() {
    let minutes = |count: i64| 60 * count;
    let no_data = Verdict::NoData;
    let down = Verdict::TelemetryDown;
    let unsure = Verdict::Inconclusive;
    let held = |verdict, reason, since| kpi("errors", None, verdict, reason, since);
    let optional = |verdict, reason, since| kpi("optional", Some("monitoring"), verdict, reason, since);
    let upstream = |verdict, reason, since| kpi("upstream", Some("connections"), verdict, reason, since);
    let rows: Vec<Row<'_>> = vec![
        ("all is well", healthy(), &[], "half", None),
        // Canary without traffic, baseline with: hold, then stop and say so; never promote.
        ("canary idle, at first", but(&[held(unsure, Cause::CanaryIdle, minutes(4))]), &[], "canary", None),
        (
            "canary idle, for long",
            but(&[held(unsure, Cause::CanaryIdle, minutes(6))]),
            &[],
            "canary",
            Some("NoTraffic"),
        ),
        ("nobody asks", but(&[held(unsure, Cause::Idle, minutes(20))]), &[], "canary", None),
        (
            "nobody asks for half an hour",
            but(&[held(unsure, Cause::Idle, minutes(31))]),
            &[],
            "canary",
            Some("NoTraffic"),
        ),
        // The canary's series are missing, the baseline's are not, and its pods are Ready.
        (
            "canary missing, at first",
            but(&[held(no_data, Cause::CanaryMissing, minutes(4))]),
            &[],
            "canary",
            None,
        ),
        (
            "canary missing, for long",
            but(&[held(no_data, Cause::CanaryMissing, minutes(6))]),
            &ALL,
            "canary",
            None,
        ),
        (
            "canary missing, with an owner",
            but(&[upstream(no_data, Cause::CanaryMissing, minutes(6))]),
            &["connections"],
            "canary",
            None,
        ),
        (
            "optional and missing, at first",
            but(&[optional(no_data, Cause::CanaryMissing, minutes(4))]),
            &[],
            "canary",
            None,
        ),
        (
            "optional and missing, for long",
            but(&[optional(no_data, Cause::CanaryMissing, minutes(6))]),
            &[],
            "half",
            None,
        ),
        // Both arms are missing, or Prometheus is away: never a failed check, never a rollback.
        ("both missing", but(&[held(no_data, Cause::Missing, minutes(14))]), &[], "canary", None),
        (
            "both missing, for long",
            but(&[held(no_data, Cause::Missing, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        (
            "baseline missing, for long",
            but(&[held(no_data, Cause::BaselineMissing, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        ("Prometheus away", but(&[held(down, Cause::Unreachable, minutes(14))]), &[], "canary", None),
        (
            "Prometheus away, for long",
            but(&[held(down, Cause::Unreachable, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        (
            "Prometheus away, for days",
            but(&[held(down, Cause::Unreachable, minutes(9000))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        (
            "stale samples",
            but(&[held(unsure, Cause::Stale, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        ("not a number", but(&[held(unsure, Cause::NotANumber, minutes(1))]), &[], "canary", None),
        // Several series of a pod, a partial answer, a query that is refused.
        ("malformed", but(&[held(down, Cause::Malformed, minutes(1))]), &[], "canary", None),
        (
            "malformed, for long",
            but(&[held(down, Cause::Malformed, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        (
            "the baseline is unwell",
            but(&[held(unsure, Cause::BaselineUnhealthy, minutes(1))]),
            &[],
            "canary",
            None,
        ),
        (
            "the baseline is unwell, for long",
            but(&[held(unsure, Cause::BaselineUnhealthy, minutes(16))]),
            &[],
            "canary",
            Some("TelemetryUnavailable"),
        ),
        ("too little evidence", but(&[held(unsure, Cause::NeedsEvidence, minutes(99))]), &[], "canary", None),
        ("too few pods for a gauge", but(&[held(unsure, Cause::NeedsPods, minutes(99))]), &[], "half", None),
        // Alarms.
        (
            "an owned alarm",
            but(&[upstream(Verdict::Fail, Cause::Judged, 0)]),
            &["connections"],
            "canary",
            None,
        ),
        (
            "two owners",
            but(&[upstream(Verdict::Fail, Cause::Judged, 0), optional(Verdict::Fail, Cause::Judged, 0)]),
            &["connections", "monitoring"],
            "canary",
            None,
        ),
        ("a shared alarm", but(&[held(Verdict::Fail, Cause::Judged, 0)]), &[], "canary", None),
        (
            "a shared and an owned alarm",
            but(&[held(Verdict::Fail, Cause::Judged, 0), upstream(Verdict::Fail, Cause::Judged, 0)]),
            &["connections"],
            "canary",
            None,
        ),
        (
            "a catastrophe of a twentieth of all requests",
            but(&[KpiStatus { canary: Some(0.06), ..held(Verdict::Fail, Cause::Judged, 0) }]),
            &ALL,
            "canary",
            None,
        ),
        (
            "a catastrophe of ten times the errors",
            but(&[KpiStatus { canary: Some(0.01), ..held(Verdict::Fail, Cause::Judged, 0) }]),
            &ALL,
            "canary",
            None,
        ),
        (
            "as many errors where the baseline has none, yet little more than matters",
            but(&[KpiStatus {
                canary: Some(0.009),
                baseline: Some(0.0),
                ..held(Verdict::Fail, Cause::Judged, 0)
            }]),
            &[],
            "canary",
            None,
        ),
        (
            "a KPI that is only shown",
            but(&[kpi("shown", None, Verdict::Fail, Cause::Judged, minutes(99))]),
            &[],
            "half",
            None,
        ),
    ];
    for (name, kpis, off, at, why) in rows {
        let plan = plan(&json!({}), kpis, |_| {});
        assert_eq!(rolled_back(&plan), off, "{name}");
        assert_eq!(stage(&plan), at, "{name}");
        assert_eq!(stalled(&plan), why, "{name}");
        assert_eq!(plan.status.phase == Phase::Stalled, why.is_some(), "{name}");
    }
}

#[test]
fn samples_that_pods_lack_which_are_not_ready_are_not_held_against_them() {
    let missing = kpi("errors", None, Verdict::NoData, Cause::CanaryMissing, 360);
    let plan = plan(&json!({}), but(&[missing]), |snapshot| {
        snapshot.variants.get_mut(&Variant::Canary).unwrap().pods[0].ready = false;
    });
    assert_eq!(rolled_back(&plan), Vec::<&str>::new());
    assert_eq!(stalled(&plan), Some("TelemetryUnavailable"));
}

#[test]
fn a_query_that_must_be_mended_is_said_once() {
    let malformed = |message: &str| KpiStatus {
        message: message.into(),
        ..kpi("errors", None, Verdict::TelemetryDown, Cause::Malformed, 0)
    };
    let said = |plan: &Plan| {
        let said = plan.status.decisions.iter().filter(|decision| decision.what == What::KpiUnreadable);
        said.map(|decision| decision.why.clone()).collect::<Vec<_>>()
    };
    let first = plan(&json!({}), but(&[malformed("twice `q`")]), |snapshot| {
        snapshot.status.kpis = healthy();
    });
    assert_eq!(said(&first), ["errors cannot be read, and the rollout holds: twice `q`"]);
    let since = first.status.kpis.iter().find(|kpi| kpi.name == "errors").unwrap().since.clone();
    assert_eq!(since, Some(ago(0)));
    // It comes and goes: the same is not said again.
    let again = plan(&json!({}), but(&[malformed("twice `q`")]), |snapshot| {
        snapshot.status.kpis = healthy();
        snapshot.status.decisions = first.status.decisions.clone();
    });
    assert_eq!(said(&again).len(), 1);
}

#[test]
fn a_stage_without_evidence_ends_as_the_user_wants() {
    let wanting = |canary_is_worse: bool, ticks: i64| {
        let mut kpi = kpi("errors", None, Verdict::Inconclusive, Cause::NeedsEvidence, 3000);
        let estimate = if canary_is_worse { 2.0 } else { 0.1 };
        kpi.change = Some(Change { estimate, low: -0.9, high: 9.0 });
        let mut kpis = but(&[kpi]);
        for kpi in &mut kpis {
            kpi.evidence.as_mut().unwrap().fresh_ticks = ticks;
        }
        kpis
    };
    // Policy, worse than tolerated, observed ticks of 15 s (the bake of 10 minutes has 40): who is off, the stage, why stalled.
    type Case<'a> = (&'a str, bool, i64, &'a [&'a str], &'a str, Option<&'a str>);
    let cases: Vec<Case<'_>> = vec![
        ("Hold", false, 79, &[], "canary", None),
        ("Hold", false, 80, &[], "canary", Some("EvidenceWanting")),
        ("Advance", false, 79, &[], "canary", None),
        ("Advance", false, 80, &[], "half", None),
        ("Advance", true, 80, &[], "canary", Some("EvidenceWanting")),
        ("Rollback", false, 79, &[], "canary", None),
        ("Rollback", false, 80, &ALL, "canary", None),
    ];
    for (policy, worse, ticks, off, at, why) in cases {
        let plan = plan(&json!({"onInconclusive": policy}), wanting(worse, ticks), |_| {});
        let name = format!("{policy} {worse} {ticks}");
        assert_eq!((rolled_back(&plan), stage(&plan), stalled(&plan)), (off.to_vec(), at, why), "{name}");
    }
}

#[test]
fn a_benefit_is_credited_and_a_broken_promise_told_or_punished() {
    let measured = |estimate: f64, low: f64, high: f64| {
        let memory = KpiStatus {
            change: Some(Change { estimate, low, high }),
            ..kpi("memory", Some("memory"), Verdict::Pass, Cause::Judged, 600)
        };
        let shared = KpiStatus {
            change: Some(Change { estimate: -0.1, low: -0.2, high: 0.0 }),
            ..kpi("errors", None, Verdict::Pass, Cause::Judged, 600)
        };
        but(&[memory, shared])
    };
    // Promised are 35 % less. What may still be that is no broken promise.
    for (change, on_miss, off, warned) in [
        ((-0.40, -0.42, -0.38), "Warn", vec![], false),
        ((-0.30, -0.36, -0.24), "Rollback", vec![], false),
        ((-0.20, -0.25, -0.15), "Warn", vec![], true),
        ((-0.20, -0.25, -0.15), "Rollback", vec!["memory"], false),
    ] {
        let plan = plan(&json!({"onMiss": on_miss}), measured(change.0, change.1, change.2), |_| {});
        assert_eq!(rolled_back(&plan), off, "{change:?} {on_miss}");
        let said = plan.status.decisions.iter().find(|decision| decision.what == What::Warned);
        assert_eq!(said.is_some(), warned, "{said:?}");
        if !off.is_empty() {
            assert_eq!(stage(&plan), "canary");
            continue;
        }
        assert_eq!(stage(&plan), "half");
        let benefit = |name: &str| plan.status.benefits.iter().find(|benefit| benefit.kpi == name).unwrap();
        assert_eq!(benefit("memory").optimizations, ["memory"]);
        assert!((benefit("memory").overall.estimate - change.0).abs() < 1e-9);
        // What each that is on can move is nobody's alone.
        assert_eq!(benefit("errors").optimizations, ["connections", "memory", "monitoring"]);
        let own = &plan.status.optimizations[0].benefit;
        assert!(own.starts_with(&format!("memory {:+.0} %", 100.0 * change.0)), "{own}");
        assert_eq!(plan.status.optimizations[1].benefit, "");
    }
}

#[test]
fn decisions_on_evidence_carry_their_numbers() {
    let passed = plan(&json!({}), healthy(), |_| {});
    let failed = plan(
        &json!({}),
        but(&[kpi("upstream", Some("connections"), Verdict::Fail, Cause::Judged, 0)]),
        |_| {},
    );
    for (plan, what) in [(&passed, What::StagePassed), (&failed, What::OptimizationRolledBack)] {
        let decision = plan.status.decisions.iter().find(|decision| decision.what == what).unwrap();
        let basis = decision.basis.as_ref().unwrap();
        assert_eq!((basis.stage.as_str(), basis.attempt, basis.until), ("canary", 1, NOW - 30));
        // Exposed 1,600 s ago, a warm-up of a minute, on the grid of 15 s.
        assert_eq!(basis.from, (NOW - 1540 + 14) / 15 * 15);
        assert_eq!(basis.kpis.len(), 5);
        assert_eq!(basis.on, ["connections", "memory", "monitoring"]);
    }
}

#[test]
fn what_stages_can_show_is_said_once_before_the_evidence_is_looked_at() {
    let few = |snapshot: &mut Snapshot| {
        for known in &mut snapshot.status.preflight {
            (known.shares, known.requests) = (vec![0.0], 0.01);
        }
    };
    let said =
        |plan: &Plan| plan.status.decisions.iter().filter(|decision| decision.what == What::Warned).count();
    let first = plan(&json!({}), healthy(), few);
    assert_eq!(said(&first), 1);
    let why = &first.status.decisions.iter().find(|d| d.what == What::Warned).unwrap().why;
    for part in [
        "errors in stage canary: about 6 canary requests",
        "in stage half",
        "3000 are needed to pass",
        "minimumEffect",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let again = plan(&json!({}), healthy(), |snapshot| {
        few(snapshot);
        snapshot.status.stage.as_mut().unwrap().foretold = true;
    });
    assert_eq!(said(&again), 0);
    assert_eq!(said(&plan(&json!({}), healthy(), |_| {})), 0);
}

#[test]
fn each_stage_has_its_own_attempts_and_spends_none_of_them_twice() {
    // The stage that runs and its attempt, those that the pass has left, what is exposed; the stage that follows, its attempt, and how
    // often pods have been replaced, four times so far. The pass began with two stages. A stage that takes the place of a removed one
    // restarts at once, since it has other pods.
    type Row<'a> = (&'a str, (&'a str, i32), &'a [(&'a str, i32)], i32, (&'a str, i32, i32));
    let rows: [Row<'_>; 6] = [
        ("passed", ("canary", 3), &[], 10, ("half", 1, 4)),
        ("removed", ("gone", 3), &[], 10, ("canary", 2, 5)),
        ("removed, and every other exposes more", ("gone", 3), &[], 5, ("canary", 1, 4)),
        ("passed, with both shares given", ("canary", 2), &[("gone", 3)], 10, ("half", 4, 4)),
        ("removed, with both shares given", ("gone", 7), &[("canary", 2), ("old", 3)], 10, ("canary", 9, 5)),
        ("entered again", ("canary", 1), &[("half", 2)], 10, ("half", 3, 4)),
    ];
    for (what, (name, attempt), spent, weight, expected) in rows {
        let after = plan(&json!({}), healthy(), |snapshot| {
            snapshot.status.weight.desired = weight;
            let stage = snapshot.status.stage.as_mut().unwrap();
            (stage.name, stage.attempt, stage.replaced) = (name.to_owned(), attempt, 4);
            stage.spent = spent.iter().map(|(name, attempt)| ((*name).to_owned(), *attempt)).collect();
        });
        let stage = after.status.stage.as_ref().unwrap();
        assert_eq!((stage.name.as_str(), stage.attempt, stage.replaced), expected, "{what}");
        assert_eq!(stage.stages, 2, "{what}");
    }
}

#[test]
fn a_longer_list_of_stages_takes_no_share_from_those_that_are_over() {
    let rollout = rollout(&json!({}));
    for began_with in [2, 5] {
        let mut status = status(&healthy());
        status.stage.as_mut().unwrap().stages = began_with;
        let inquiry = machine::inquiry(&rollout, &status, Timestamp::from_second(NOW).unwrap()).unwrap();
        let (trial, _) = inquiry.trials.iter().find(|(trial, _)| trial.kpi.name == "errors").unwrap();
        let share = rollout.alpha_share(&trial.kpi);
        assert_eq!(trial.alarm_at, judge::alarm_at(0.01, share, began_with as usize, 1));
    }
}

#[test]
fn a_kpi_whose_query_is_edited_is_learned_and_judged_afresh() {
    let rollout = rollout(&json!({}));
    let now = Timestamp::from_second(NOW).unwrap();
    let mut status = status(&healthy());
    let judged = |status: &RolloutStatus, name: &str| {
        let inquiry = machine::inquiry(&rollout, status, now).unwrap();
        inquiry.trials.into_iter().find(|(trial, _)| trial.kpi.name == name).map(|(_, evidence)| evidence)
    };
    assert_eq!(judged(&status, "errors").unwrap().fresh_ticks, 60);
    status.kpis[0].reads = "another".into();
    assert_eq!(judged(&status, "errors").unwrap().fresh_ticks, 0);
    assert_eq!(machine::lessons(&rollout, &status, now).len(), 0);
    status.preflight[0].reads = "another".into();
    let lessons = machine::lessons(&rollout, &status, now);
    assert_eq!(lessons.iter().map(|lesson| lesson.kpi.name.as_str()).collect::<Vec<_>>(), ["errors"]);
    assert_eq!(judged(&status, "errors"), None);
    assert_eq!(judged(&status, "upstream").unwrap().fresh_ticks, 60);
    // Another look at the same samples spends the probability once more, and where the new queries have been read this is said.
    let restarted = plan(&json!({}), healthy(), |snapshot| snapshot.status.kpis[0].reads = "another".into());
    assert_eq!(restarted.status.decisions[0].what, What::StageRestarted);
    assert_eq!(restarted.status.decisions[1].basis.as_ref().unwrap().attempt, 2);
    // What is noted of the queries that are in force fits them.
    let wanting = kpi("optional", Some("monitoring"), Verdict::NoData, Cause::CanaryMissing, 0);
    let noted = plan(&json!({}), but(&[wanting]), |_| {}).status;
    assert_eq!(judged(&noted, "upstream").unwrap().fresh_ticks, 60);
    assert!(noted.kpis.iter().all(|kpi| !kpi.reads.is_empty()));
}

#[test]
fn what_pods_of_both_arms_suffer_is_nobodys_doing() {
    let first = plan(&json!({}), healthy(), |_| {});
    let template = |variant: Variant| {
        first.targets.iter().find(|target| target.variant == variant).unwrap().template.clone()
    };
    let templates = [template(Variant::Canary), template(Variant::Baseline)];
    let well = || Pod { ready: true, ..Pod::default() };
    let killed = || Pod { oom_killed: true, restarts: 1, ..well() };
    let starting = || Pod { ready: false, ..Pod::default() };
    let stuck = |seconds| Pod { ready: false, not_ready_since: Some(ago(seconds).0), ..Pod::default() };
    let rows = [
        ("all is well", vec![well()], vec![well()], None),
        ("only the canary's was killed", vec![killed()], vec![well()], Some("killed for want of memory")),
        ("of each arm one was", vec![killed()], vec![killed()], None),
        (
            "of an arm four times as large three were",
            vec![killed(), killed(), killed(), well()],
            vec![killed()],
            None,
        ),
        ("not Ready, not yet for long", vec![stuck(119)], vec![well()], None),
        ("not Ready for long", vec![stuck(121)], vec![well()], Some("without being Ready")),
        ("the baseline's is not Ready either, though not for long", vec![stuck(121)], vec![stuck(5)], None),
        ("the baseline's has not even started", vec![stuck(121)], vec![starting()], None),
        ("there is no baseline yet", vec![stuck(121)], vec![], None),
        (
            "restarted twice more",
            vec![Pod { restarts: 3, ..well() }],
            vec![Pod { restarts: 1, ..well() }],
            Some("restarted 3 times"),
        ),
    ];
    for (what, canary, baseline, expected) in rows {
        let after = plan(&json!({}), but(&[]), |snapshot| {
            for ((variant, pods), template) in
                [(Variant::Canary, canary), (Variant::Baseline, baseline)].into_iter().zip(&templates)
            {
                let pods = pods.into_iter().map(|pod| Pod { template: template.clone(), ..pod });
                snapshot.variants.get_mut(&variant).unwrap().pods = pods.collect();
            }
        });
        let off =
            after.status.decisions.iter().find(|decision| decision.what == What::OptimizationRolledBack);
        assert_eq!(off.is_some(), expected.is_some(), "{what}: {off:?}");
        assert!(off.is_none_or(|off| off.why.contains(expected.unwrap())), "{what}: {off:?}");
    }
}

#[test]
fn a_rollout_that_cannot_be_followed_holds_answers_and_ends_without_loss() {
    let refusal = Refusal { reason: "InvalidConfig", message: "no such field".into() };
    let observed = |count: i32| Observed {
        replicas: count,
        pods: (0..count).map(|_| Pod { ready: true, ..Pod::default() }).collect(),
        ..Observed::default()
    };
    let refused = |object: &OptimizationRollout, stable: i32, deleting: Option<i64>, verbs: &[Verb]| {
        let snapshot = Snapshot {
            status: status(&healthy()),
            verbs: verbs.to_vec(),
            deleting_since: deleting.map(|seconds| ago(seconds).0),
            variants: BTreeMap::from([(Variant::Stable, observed(stable)), (Variant::Canary, observed(10))]),
            ..Snapshot::default()
        };
        machine::refuse(object, &snapshot, &refusal, Timestamp::from_second(NOW).unwrap())
    };
    let mut object = object(&json!({}));
    let held = refused(&object, 0, None, &[Verb::Abort("canary".into())]);
    assert_eq!((held.scale, held.release, held.answered.len()), (None, false, 1));
    let why = |what: What| held.status.decisions.iter().find(|d| d.what == what).map(|d| d.why.as_str());
    assert!(why(What::Stalled).unwrap().contains("until that is mended stage canary stays as it is"));
    assert_eq!(why(What::VerbRefused).unwrap().split(": ").next().unwrap(), "abort=canary is refused");
    // Stable's pods, seconds since the deletion: the replicas that it gets, and whether the object is let go.
    for (stable, seconds, scale, release) in
        [(0, 5, Some(10), false), (9, 5, Some(10), false), (10, 5, None, true), (0, 601, None, true)]
    {
        let plan = refused(&object, stable, Some(seconds), &[]);
        assert_eq!((plan.scale, plan.release), (scale, release), "{stable} after {seconds} s");
    }
    // What is to go with the object need not be put back.
    object.spec.deletion_policy = DeletionPolicy::Delete;
    assert!(refused(&object, 0, Some(5), &[]).release);
}

#[test]
fn what_the_api_server_refuses_is_said() {
    let refused =
        plan(&json!({}), healthy(), |snapshot| snapshot.refused = Some("apply: no such class".into()));
    assert_eq!(stalled(&refused), Some("ApplyRefused"));
    let said = refused.status.decisions.iter().find(|decision| decision.what == What::Stalled).unwrap();
    assert!(said.why.contains("apply: no such class"), "{}", said.why);
}

#[test]
fn numbers_in_a_message_alone_are_no_write() {
    let idle = |requests: i64, before: &RolloutStatus| {
        let idle = kpi("errors", None, Verdict::Inconclusive, Cause::CanaryIdle, 600);
        let message = format!("the canary had none of {requests} requests");
        let again = |snapshot: &mut Snapshot| {
            snapshot.status.decisions.clone_from(&before.decisions);
            snapshot.status.conditions.clone_from(&before.conditions);
        };
        plan(&json!({}), but(&[KpiStatus { message, ..idle }]), again).status
    };
    let first = idle(100, &RolloutStatus::default());
    let other =
        plan(&json!({}), but(&[kpi("errors", None, Verdict::NoData, Cause::Missing, 1000)]), |_| {}).status;
    let second = idle(140, &first);
    assert!(stalled_message(&second).contains("140 requests"));
    assert!(!worth_writing(&first, &second, 15));
    assert!(worth_writing(&first, &other, 15));
}

#[test]
fn the_last_steps_do_not_hang_in_silence() {
    for step in [Step::Promoting, Step::Restoring] {
        for (seconds, why) in [(500, None), (700, Some("ProgressDeadlineExceeded"))] {
            let plan = plan(&json!({}), vec![], |snapshot| {
                let stage = snapshot.status.stage.as_mut().unwrap();
                (stage.step, stage.attempt_at, stage.exposed_at) = (step, ago(seconds), None);
                if step == Step::Restoring {
                    snapshot
                        .status
                        .optimizations
                        .iter_mut()
                        .for_each(|o| o.state = OptimizationState::RolledBack);
                }
            });
            assert_eq!(stalled(&plan), why, "{step:?} after {seconds} s");
        }
    }
}

#[test]
fn an_object_whose_optimizations_have_their_verdicts_says_so_once() {
    let rollout = rollout(&json!({}));
    let verdict = |name: &str| format!("{name}={}", rollout.optimization(name).unwrap().config_hash);
    let mut verdicts = (vec![verdict("memory")], vec![verdict("connections"), verdict("monitoring")]);
    for (what, phase) in [(What::Completed, Phase::Completed), (What::RolledBack, Phase::RolledBack)] {
        let plan = plan(&json!({}), vec![], |snapshot| {
            snapshot.status = RolloutStatus::default();
            snapshot.variants.get_mut(&Variant::Stable).unwrap().verdicts = verdicts.clone();
        });
        let decided: Vec<_> = plan.status.decisions.iter().map(|decision| decision.what).collect();
        assert_eq!((decided, plan.status.phase), (vec![what], phase));
        let promoted = std::mem::take(&mut verdicts.0);
        verdicts.1.extend(promoted);
    }
    // A verdict on another configuration is none: it has its pass.
    let plan = plan(&json!({}), vec![], |snapshot| {
        snapshot.status = RolloutStatus::default();
        verdicts.0.push("memory=another".into());
        verdicts.1.retain(|verdict| !verdict.starts_with("memory="));
        snapshot.variants.get_mut(&Variant::Stable).unwrap().verdicts = verdicts;
    });
    assert_eq!(plan.status.decisions[0].why, "stage canary begins with memory");
}

#[test]
fn an_object_deleted_in_mid_pass_leaves_no_verdict_that_nobody_gave() {
    let plan = plan(&json!({}), healthy(), |snapshot| snapshot.deleting_since = Some(ago(1).0));
    let stable = plan.targets.iter().find(|target| target.variant == Variant::Stable).unwrap();
    let body = stable.objects.iter().find(|body| body["kind"] == "Deployment").unwrap();
    let annotations = &body["metadata"]["annotations"];
    assert_eq!(
        (&annotations[PROMOTED_ANNOTATION], &annotations[ROLLED_BACK_ANNOTATION]),
        (&json!(""), &json!(""))
    );
    assert_eq!(body["spec"]["replicas"], 10);
    assert_eq!(plan.scale, None);
}

#[test]
fn an_object_whose_template_is_refused_is_deleted_without_loss() {
    for (stable, scale) in [(0, Some(10)), (10, None)] {
        let plan = plan(&json!({}), healthy(), |snapshot| {
            snapshot.deleting_since = Some(ago(1).0);
            snapshot.refused = Some("apply: no such class".into());
            snapshot.variants.get_mut(&Variant::Stable).unwrap().replicas = stable;
        });
        assert_eq!(plan.scale, scale);
    }
}

#[test]
fn what_the_api_server_has_refused_is_known_after_a_restart() {
    let refused =
        plan(&json!({}), healthy(), |snapshot| snapshot.refused = Some("apply: no such class".into()));
    assert_eq!(machine::refused_before(&refused.status).as_deref(), Some("apply: no such class"));
    assert_eq!(machine::refused_before(&plan(&json!({}), healthy(), |_| {}).status), None);
}

#[test]
fn only_what_was_rolled_back_may_try_again() {
    for (verb, state, expected, what) in [
        ("memory", OptimizationState::RolledBack, OptimizationState::Pending, What::RetriedByUser),
        ("memory", OptimizationState::Active, OptimizationState::Active, What::VerbRefused),
        ("nobody", OptimizationState::RolledBack, OptimizationState::RolledBack, What::VerbRefused),
    ] {
        // While its KPIs lack evidence the others stay where they are.
        let wanting = kpi("errors", None, Verdict::Inconclusive, Cause::NeedsEvidence, 0);
        let plan = plan(&json!({}), but(&[wanting]), |snapshot| {
            snapshot.status.optimizations[0].state = state;
            snapshot.verbs = vec![Verb::Retry(verb.into())];
        });
        assert_eq!(plan.status.optimizations[0].state, expected, "{verb} {state:?}");
        assert!(plan.status.decisions.iter().any(|d| d.what == what), "{:?}", plan.status.decisions);
        assert_eq!(plan.answered, [Verb::Retry(verb.into())]);
    }
}

#[test]
fn the_checkpoint_of_the_bundled_kpis_is_small() {
    let spec = json!({"workload": {"runtime": {"replicas": 200, "config": {
        "experts": [{"name": "alpha", "kind": "http", "url": "http://alpha:8000/query"}]}}}});
    let object = OptimizationRollout::new("experts", serde_json::from_value(spec).unwrap());
    let defaults = Defaults { runtime_image: "r:dev".into(), prometheus_url: "http://p:9090".into() };
    let rollout = resolve(&object, &defaults).unwrap();
    let counts = || Counts { events: 123_456.0, total: 1.234_567_891_234_567_8e9 };
    let carry = || Carry { canary: counts(), baseline: counts() };
    let share = || ShareEvidence {
        log_weights: vec![-123.456_789_012_345_67; 7],
        peak: 1.234_567_890_123_456_7,
        canary: counts(),
        baseline: counts(),
        silence: 1.234_567_890_123_456_7e6,
        recent: carry(),
        latest: carry(),
        carry: Some(carry()),
    };
    let bytes: usize = rollout
        .all_kpis()
        .map(|kpi| {
            let shares = match kpi.test {
                Test::ErrorRatio { .. } => 1,
                Test::Latency { .. } => 3,
                Test::Gauge { .. } | Test::Threshold { .. } => 0,
            };
            let gauge =
                GaugeEvidence { looks: 12, peak: 1.234_567_890_123_456_7, sums: Some(Box::default()) };
            let evidence = Evidence {
                last_tick: NOW,
                fresh_ticks: 11_520,
                shares: (0..shares).map(|_| share()).collect(),
                gauge: matches!(kpi.test, Test::Gauge { .. }).then_some(gauge),
                value: Some(0.123_456_789_012_345_67),
                ..Evidence::default()
            };
            serde_json::to_string(&evidence).unwrap().len()
        })
        .sum();
    assert!(bytes <= 8 * 1024, "{bytes} bytes");
}
