//! `kubectl synthex` without a cluster: data sets, backtests, recordings from a Prometheus of wiremock, explanations.

#![allow(clippy::unwrap_used)] // In helpers of tests too, which Clippy does not take for tests.

use std::{
    collections::BTreeMap,
    process::{Command, Output},
    time::Duration,
};

use proptest::prelude::*;
use serde_json::{Value, json};
use synthex_operator::{
    api::{Cause, KpiStatus, OptimizationRollout, Step, What},
    cli::{
        self, backtest,
        dataset::{DataSet, Series},
        explain,
        record::{self, Choice},
    },
    decision::{
        judge::{self, Answer, AnswerHealth, Kpi, Samples, Trial, beginning},
        machine,
        snapshot::Snapshot,
    },
    effects::prometheus::Prometheus,
};
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate, matchers};

const STEP: i64 = 15;
const FROM: i64 = 1_700_000_010;
const PODS: [&str; 4] = [
    "experts-canary-5d9c7-bbb24",
    "experts-canary-5d9c7-bbb25",
    "experts-baseline-7f4c8-bbb24",
    "experts-baseline-7f4c8-bbb25",
];

fn data(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap()
}

fn path(name: &str) -> String {
    format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The data set that was written by hand, as the head of the module shows it.
fn by_hand() -> Value {
    json!({
        "version": 1,
        "step": 15,
        "arms": {
            "namespace": "shop",
            "canary": {"deployment": "experts-canary", "pods": 1},
            "baseline": {"deployment": "experts-baseline", "pods": 1}
        },
        "kpis": [{
            "definition": {"name": "errors", "errorRatio": {"errors": "errors{$arm}", "total": "requests{$arm}"}},
            "from": 0,
            "until": 30,
            "queries": [
                {"series": [{"pod": "experts-canary-5d9c7-bbb24", "samples": [[0, 0], [15, 2], [30, 5]]}]},
                {"series": [
                    {"pod": "experts-canary-5d9c7-bbb24", "samples": [[0, 0], [15, 100], [30, 200]]},
                    {"pod": "experts-baseline-5d9c7-bbb24", "samples": [[0, 0], [15, 100], [30, 200]]}
                ]}
            ]
        }]
    })
}

fn parsed(value: &Value) -> anyhow::Result<DataSet> {
    DataSet::parse(value.to_string().as_bytes())
}

#[test]
fn a_data_set_by_hand_gets_the_defaults() {
    let report = backtest::run(&parsed(&by_hand()).unwrap(), &[]).unwrap();
    let kpi = &report.kpis[0];
    assert_eq!(kpi.ticks.len(), 2);
    let counts = kpi.ticks[1].counts[0];
    assert_eq!((counts.canary.events, counts.canary.total), (5.0, 200.0));
    assert_eq!((counts.baseline.events, counts.baseline.total), (0.0, 200.0));
    // One KPI, one stage, the first attempt, 1 %.
    assert_eq!(kpi.alarm_at, judge::alarm_at(0.01, 1.0, 1, 1));
    // One pod in each arm, and the cautious end of the range: exp(3.45 x 0.5 x sqrt(2)).
    assert_eq!(kpi.result.tolerated, Some(11.4675));
    assert!(!report.fails());
    let table = report.table();
    assert!(table.contains("1970-01-01T00:00:30Z  5 of 200  0 of 200"), "{table}");
}

#[test]
fn the_documented_example_is_the_one_that_is_tested() {
    let source = include_str!("../src/cli/mod.rs");
    let start = source.find("//! {\n").unwrap();
    let end = source[start..].find("//! ```").unwrap();
    let text: String =
        source[start..start + end].lines().map(|line| line.trim_start_matches("//!")).collect();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), by_hand());

    let readme = include_str!("../README.md");
    let text = readme.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(serde_json::from_str::<Value>(text).unwrap(), by_hand());
}

#[test]
fn committed_data_sets_give_the_evidence_of_the_printed_formula() {
    let expected: BTreeMap<String, Vec<f64>> =
        serde_json::from_slice(&data("backtest-expected.json")).unwrap();
    for (name, fails) in [("alarm", true), ("healthy", false)] {
        let set = DataSet::parse(&data(&format!("backtest-{name}.json"))).unwrap();
        let report = backtest::run(&set, &[]).unwrap();
        assert_eq!(report.fails(), fails, "{name}");
        let errors = &report.kpis[0];
        // Shares 1 of errors and 1 of memory; what is only shown has none.
        assert_eq!(errors.alarm_at, judge::alarm_at(0.01, 0.5, 5, 1));
        let mut highest = f64::NEG_INFINITY;
        for (round, expected) in errors.ticks.iter().zip(&expected[name]) {
            highest = highest.max(*expected);
            let failed = errors.alarmed.is_some_and(|tick| tick <= round.tick);
            let expected = if failed { highest } else { *expected };
            let told = round.log_evidence.unwrap();
            assert!(
                (told - expected).abs() <= 1e-5 * expected.abs(),
                "{name} {}: {told} {expected}",
                round.time
            );
        }
        assert_eq!(errors.ticks.len(), 40);
        assert_eq!(errors.alarmed.is_some(), fails);
        let hits = &report.kpis[2];
        assert_eq!(hits.ticks.iter().map(|round| round.breaches).max(), Some(1));
        assert_eq!(hits.ticks[0].reason, Cause::NotANumber);
    }
}

#[test]
fn hostile_data_sets_are_refused_with_the_place_and_the_remedy() {
    // Place (JSON pointer) and value; what the message says.
    let cases: Vec<(&str, Value, &[&str])> = vec![
        ("/version", json!(7), &["version 1, not 7"]),
        ("/version", Value::Null, &["\"version\": 1"]),
        ("/stpe", json!(15), &["unknown field `stpe`"]),
        ("/step", json!(0), &["step must be from 1 to 300"]),
        ("/step", json!("15s"), &["step:", "expected i64"]),
        ("/attempt", json!(0), &["attempt counts from 1"]),
        ("/stages", json!(0), &["stages must be"]),
        ("/falseRollbackProbability", json!(1.0), &["falseRollbackProbability", "0.2"]),
        ("/bake", json!(0), &["bake"]),
        ("/arms/canary/pods", json!(0), &["arms.canary", "pods"]),
        ("/arms/baseline", Value::Null, &["kpis[0] (errors)", "arms.baseline is missing"]),
        ("/kpis", json!([]), &["nothing to judge"]),
        ("/kpis/-", json!("again"), &["kpis[1].definition.name: errors is there twice"]),
        ("/kpis/0/definition/errorRatio/errors", json!("errors"), &["kpis[0].definition", "$arm"]),
        ("/kpis/0/definition/errorRatio", Value::Null, &["kpis[0].definition", "exactly one of"]),
        ("/kpis/0/definition/errorRatio/tolerance", json!(0.5), &["errorRatio.tolerance", "from 1 to 10"]),
        (
            "/kpis/0/definition/errorRatio/minimumEfect",
            json!(0.01),
            &["kpis[0].definition", "no field errorRatio.minimumEfect"],
        ),
        (
            "/kpis/0/queries/1/series",
            json!([
                {"pod": "a", "labels": "code=200", "le": "+Inf", "samples": [[0, 0]]},
                {"pod": "a", "labels": "code=500", "le": "+Inf", "samples": [[0, 0]]},
            ]),
            &["[1]", "this bucket of the pod is there twice", "by histogram"],
        ),
        ("/kpis/0/alarmAt", json!(-1), &["alarmAt must be above 0"]),
        ("/kpis/0/until", json!(0), &["until must be from + a whole number of steps"]),
        ("/kpis/0/until", json!(31), &["until must be from + a whole number of steps"]),
        ("/kpis/0/until", json!(i64::MAX), &["until must be from + a whole number of steps"]),
        ("/kpis/0/from", json!(i64::MIN), &["until must be from + a whole number of steps"]),
        ("/kpis/0/queries", json!([]), &["queries: 0 are there", "two or three: errors, total"]),
        ("/kpis/0/queries/1/series/0/samples/1", json!([15]), &["kpis[0].queries[1].series[0].samples"]),
        ("/kpis/0/queries/1/series/0/samples/1", json!([15, "many"]), &["a number, or \"NaN\""]),
        (
            "/kpis/0/queries/1/series/0/samples/1",
            json!([16, 1]),
            &["series: [0]", "samples[1]", "not on the grid of 15 s"],
        ),
        ("/kpis/0/queries/1/series/0/samples/1", json!([45, 1]), &["samples[1]", "is not from -15 to 30"]),
        (
            "/kpis/0/queries/1/series/0/samples/1",
            json!([0, 1]),
            &["samples[1]", "not later than the one before"],
        ),
        (
            "/kpis/0/queries/1/series/1/pod",
            json!("experts-canary-5d9c7-bbb24"),
            &["[1]", "there twice", "labels"],
        ),
        ("/kpis/0/queries/1/series/1/le", json!("wide"), &["le must be a number or +Inf"]),
        (
            "/kpis/0/queries/1/series/1/pods",
            json!("a"),
            &["kpis[0].queries[1].series[1]", "unknown field `pods`"],
        ),
        (
            "/kpis/0/preflight",
            json!({"kpi": "errors", "track": "Production", "until": 0, "pods": 3, "spread": [-1.0]}),
            &["preflight.spread"],
        ),
        (
            "/kpis/0/definition",
            json!({"name": "slow", "latency": {"histogram": "h{$arm}"}}),
            &["kpis[0] (slow)", "preflight.bounds", "what slow is"],
        ),
    ];
    for (place, value, words) in cases {
        let mut set = by_hand();
        let (parent, name) = place.rsplit_once('/').unwrap();
        match set.pointer_mut(parent).unwrap() {
            Value::Array(list) if name == "-" => list.push(list[0].clone()),
            Value::Array(list) => list[name.parse::<usize>().unwrap()] = value.clone(),
            parent => parent[name] = value.clone(),
        }
        let refused = parsed(&set).and_then(|set| backtest::run(&set, &[])).expect_err(place);
        let message = format!("{refused:#}");
        for word in words {
            assert!(message.contains(word), "{place} = {value}: {word:?} is not in: {message}");
        }
    }
    assert!(format!("{:#}", DataSet::parse(b"errors: 3").unwrap_err()).contains("is not JSON"));
    let set = parsed(&by_hand()).unwrap();
    let unknown = backtest::run(&set, &["eror".to_owned()]).unwrap_err();
    assert_eq!(unknown.to_string(), "there is no KPI eror; there are errors");
}

/// Definitions of the four kinds.
fn definitions() -> [Value; 4] {
    [
        json!({"name": "errors", "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}"}}),
        json!({"name": "slow", "latency": {"histogram": "h{$arm}"}}),
        json!({"name": "memory", "gauge": {"query": "m{$arm}"}}),
        json!({"name": "ceiling", "threshold": {"query": "max(m{$arm})", "max": 1.0}}),
    ]
}

/// A series that some samples are missing from, counting up with resets where it is a counter.
fn series(pod: &str, le: Option<&str>, steps: &[(u8, u16)], counter: bool) -> judge::Series {
    let labels = [("pod", pod), ("instance", "10.0.0.1:9090"), ("job", "pods")];
    let labels = labels.into_iter().chain(le.map(|le| ("le", le)));
    let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut sum = 0.0;
    let mut points = vec![];
    for (index, (fate, step)) in steps.iter().enumerate() {
        sum = if *fate == 1 { 0.0 } else { sum + f64::from(*step) / 7.0 };
        let value = if counter { sum } else { f64::from(*step) / 3.0 };
        match fate {
            0 => {}
            2 => points.push((FROM + index as i64 * STEP, f64::NAN)),
            3 => points.push((FROM + index as i64 * STEP, f64::INFINITY)),
            _ => points.push((FROM + index as i64 * STEP, value)),
        }
    }
    judge::Series::new(&labels, points)
}

/// The answers to the queries of each kind.
fn answers(kind: usize, of: &[Vec<(u8, u16)>]) -> Vec<Samples> {
    let each = |le: Option<&str>, counter| -> Samples {
        PODS.iter().zip(of).map(|(pod, steps)| series(pod, le, steps, counter)).collect()
    };
    let times = |samples: &Samples| -> Samples {
        let time = |series: &judge::Series| judge::Series {
            points: series.points.iter().map(|(time, _)| (*time, *time as f64 - 3.0)).collect(),
            ..series.clone()
        };
        samples.iter().map(time).collect()
    };
    match kind {
        0 => {
            let total = each(None, true);
            let times = times(&total);
            vec![each(None, true)[..3].to_vec(), total, times]
        }
        1 => {
            let all = each(Some("+Inf"), true);
            let times = times(&all);
            let mut buckets: Samples =
                ["0.1", "0.5"].into_iter().flat_map(|le| each(Some(le), true)).collect();
            buckets.extend(all);
            buckets.sort_by(|a, b| a.key().cmp(&b.key()));
            vec![buckets, times]
        }
        2 => vec![each(None, false)],
        _ => vec![vec![series("", None, &of[0], false)], vec![series("", None, &of[2], false)]],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is written comes back, and gives the evidence that the operator's own fold gave live, in ranges of any length.
    #[test]
    fn a_data_set_gives_the_live_evidence_to_the_last_bit(
        of in prop::collection::vec(prop::collection::vec((0u8..30, 0u16..900), 41), 4),
        ranges in prop::collection::vec(1i64..9, 1..12),
    ) {
        let definitions = definitions();
        let preflight = |name: &str, spread: &[f64], bounds: &[&str]| json!({
            "kpi": name, "track": "Production", "until": FROM, "pods": 7, "spread": spread, "bounds": bounds,
        });
        let preflights = [
            preflight("errors", &[0.123_456_789_012_345_6], &[]),
            preflight("slow", &[0.2, 0.3], &["0.1", "0.5"]),
            preflight("memory", &[0.05, 1.0], &[]),
            Value::Null,
        ];
        let until = FROM + 40 * STEP;
        let arms = json!({
            "namespace": "shop",
            "canary": {"deployment": "experts-canary", "pods": 2},
            "baseline": {"deployment": "experts-baseline", "pods": 2},
        });
        let kpis: Vec<Value> = (0..4).map(|kind| {
            let queries: Vec<_> = answers(kind, &of).into_iter().map(|samples| {
                let series: Vec<Series> = samples.into_iter().map(Into::into).collect();
                json!({"series": series})
            }).collect();
            json!({
                "definition": definitions[kind], "preflight": preflights[kind], "alarmAt": 7.654_321,
                "from": FROM, "until": until, "queries": queries,
            })
        }).collect();
        let set = parsed(&json!({"version": 1, "step": STEP, "bake": 40, "arms": arms, "kpis": kpis})).unwrap();
        let written = serde_json::to_vec(&set).unwrap();
        let again = DataSet::parse(&written).unwrap();
        prop_assert_eq!(serde_json::to_vec(&again).unwrap(), written);

        let report = backtest::run(&again, &[]).unwrap();
        for kind in 0..4 {
            let trial = Trial {
                kpi: Kpi::resolve(&serde_json::from_value(definitions[kind].clone()).unwrap(), None).unwrap(),
                arms: serde_json::from_value(arms.clone()).unwrap(),
                preflight: serde_json::from_value(preflights[kind].clone()).unwrap(),
                alarm_at: 7.654_321,
                step: STEP,
                warm_up: 0,
                bake: 40,
            };
            let whole = answers(kind, &of);
            let (mut evidence, mut at, mut health) = (beginning(FROM), FROM, AnswerHealth::Good);
            for ticks in ranges.iter().cycle() {
                let end = (at + ticks * STEP).min(until);
                let cut = |series: &judge::Series| {
                    let points: Vec<_> =
                        series.points.iter().copied().filter(|(time, _)| (at..=end).contains(time)).collect();
                    (!points.is_empty()).then(|| judge::Series { points, ..series.clone() })
                };
                let answers: Vec<_> =
                    whole.iter().map(|samples| Answer::Series(samples.iter().filter_map(cut).collect())).collect();
                (evidence, health) = trial.fold(evidence, &answers, at, end);
                at = end;
                if at == until {
                    break;
                }
            }
            prop_assert!(matches!(health, AnswerHealth::Malformed(_)) || evidence.last_tick == until);
            prop_assert_eq!(report.kpis[kind].result.evidence.as_ref(), Some(&evidence));
        }
    }
}

/// A Prometheus that holds what `Store::value` says of every pod of the Deployments that are asked for.
struct Store;

impl Store {
    fn value(metric: &str, pod: &str, time: i64) -> f64 {
        let canary = pod.contains("canary");
        let age = (time - FROM + 7200) as f64;
        let rate = if pod.ends_with('a') { 3.0 } else { 4.0 };
        let requests = (rate * age).floor();
        match metric {
            "errors" => (requests * if canary && time > FROM + 300 { 0.3 } else { 0.02 }).floor(),
            "requests" => requests,
            "0.1" => (requests * 0.80).floor(),
            "0.5" => (requests * if canary { 0.96 } else { 0.97 }).floor(),
            "memory" => 1e8 + 1e6 * ((time / STEP * 37 + i64::from(canary)) % 11) as f64,
            _ => requests,
        }
    }
}

impl Respond for Store {
    fn respond(&self, request: &Request) -> ResponseTemplate {
        let body = std::str::from_utf8(&request.body).unwrap();
        let asked: BTreeMap<String, String> =
            reqwest::Url::parse(&format!("http://x/?{body}")).unwrap().query_pairs().into_owned().collect();
        let query = &asked["query"];
        let number = |name: &str| asked[name].parse::<f64>().unwrap() as i64;
        let (start, end, step) = (number("start"), number("end"), number("step"));
        let deployments = query.split("pod=~\"(").nth(1).unwrap().split(')').next().unwrap();
        let metrics: Vec<&str> = match () {
            () if query.contains("errors_total") => vec!["errors"],
            () if query.contains("seconds_bucket") && query.contains("timestamp") => vec!["+Inf"],
            () if query.contains("seconds_bucket") => vec!["0.1", "0.5", "+Inf"],
            () if query.contains("memory_bytes") => vec!["memory"],
            () => vec!["requests"],
        };
        let mut result = vec![];
        for deployment in deployments.split('|') {
            for (pod, metric) in
                ["bbb24", "bbb25"].iter().flat_map(|pod| metrics.iter().map(move |metric| (pod, metric)))
            {
                let pod = format!("{deployment}-5d9c7-{pod}");
                let value = |time: i64| match query.starts_with("timestamp") {
                    true => time as f64 - 1.0,
                    false => Self::value(metric, &pod, time),
                };
                let values: Vec<_> = (0..=(end - start) / step)
                    .map(|n| start + n * step)
                    .map(|time| json!([time, value(time).to_string()]))
                    .collect();
                let mut labels = json!({"pod": pod, "namespace": "shop"});
                if query.contains("seconds_bucket") {
                    labels["le"] = json!(metric);
                }
                result.push(json!({"metric": labels, "values": values}));
            }
        }
        ResponseTemplate::new(200)
            .set_body_json(json!({"status": "success", "data": {"resultType": "matrix", "result": result}}))
    }
}

fn rollout() -> OptimizationRollout {
    serde_json::from_value(json!({
        "apiVersion": "synthex.io/v1alpha1",
        "kind": "OptimizationRollout",
        "metadata": {"name": "experts", "namespace": "shop", "uid": "u", "generation": 1},
        "spec": {
            "workload": {"runtime": {"replicas": 4, "config": {
                "experts": [{"name": "alpha", "kind": "http", "url": "http://alpha:8000/query"}],
            }}},
            "optimizations": [
                {"name": "memory", "kpis": [{"name": "memory", "gauge": {"query": "memory_bytes{$arm}"}, "required": false}]},
                {"name": "connections", "kpis": []},
            ],
            "kpis": [
                {"name": "errors", "errorRatio": {"errors": "errors_total{$arm}", "total": "requests_total{$arm}"}},
                {"name": "slow", "latency": {"histogram": "seconds_bucket{$arm}"}},
            ],
            "stages": [
                {"name": "staging", "duration": "10m", "staging": {"replicas": 2}},
                {"name": "canary", "duration": "10m", "weight": 25},
            ],
            "prometheus": {"timeout": "5s"},
        },
        "status": {
            "observedGeneration": 1,
            "phase": "Progressing",
            "optimizations": [
                {"name": "memory", "state": "Active", "since": "2023-11-14T22:00:00Z"},
                {"name": "connections", "state": "Active", "since": "2023-11-14T22:00:00Z"},
            ],
            "stage": {
                "name": "staging", "index": 0, "step": "Observing", "attempt": 2,
                "enteredAt": "2023-11-14T22:10:00Z", "attemptAt": "2023-11-14T22:10:00Z",
                // FROM is 22:13:30, one warm-up of 60 s later.
                "exposedAt": "2023-11-14T22:12:20Z",
            },
        },
    }))
    .unwrap()
}

/// What the operator does: learns, then folds and judges tick by tick.
async fn lived(object: &mut OptimizationRollout, prometheus: &Prometheus, ticks: i64) {
    let rollout = record::resolved(object, "http://prometheus:9090").unwrap();
    let status = object.status.as_mut().unwrap();
    for tick in (1..=ticks).map(|n| FROM + n * STEP) {
        let now = k8s_openapi::jiff::Timestamp::from_second(tick + 10).unwrap();
        for lesson in machine::lessons(&rollout, status, now) {
            let mut answers = vec![];
            for query in lesson.queries() {
                answers.push(prometheus.range(&query, lesson.from(), lesson.until, lesson.block).await);
            }
            assert_eq!(machine::learn(status, &lesson, lesson.learn(&answers)), None);
        }
        let Some(inquiry) = machine::inquiry(&rollout, status, now) else { continue };
        let mut judged: Vec<KpiStatus> = vec![];
        for (trial, evidence) in inquiry.trials {
            let (from, _) = trial.ranges(&evidence, inquiry.until).next().unwrap();
            let mut answers = vec![];
            for query in trial.queries() {
                answers.push(prometheus.range(&query, from, inquiry.until, STEP).await);
            }
            let (evidence, health) = trial.fold(evidence, &answers, from, inquiry.until);
            judged.push(trial.judge(&evidence, &health));
        }
        status.kpis = judged;
    }
}

async fn store() -> (MockServer, Prometheus) {
    let server = MockServer::start().await;
    Mock::given(matchers::path("/api/v1/query_range")).respond_with(Store).mount(&server).await;
    let prometheus = Prometheus::new(&server.uri(), Duration::from_secs(5)).unwrap();
    (server, prometheus)
}

fn evidence(kpis: &[KpiStatus]) -> BTreeMap<String, (judge::Tick, Value)> {
    let told = |kpi: &KpiStatus| (kpi.evidence.as_ref().unwrap().last_tick, json!(kpi.evidence));
    kpis.iter().map(|kpi| (kpi.name.clone(), told(kpi))).collect()
}

#[tokio::test]
async fn what_is_recorded_gives_the_numbers_that_were_decided_on() {
    let (_server, prometheus) = store().await;
    let mut object = rollout();
    lived(&mut object, &prometheus, 40).await;
    let status = object.status.clone().unwrap();
    assert_eq!(status.kpis.len(), 3);
    assert_eq!(status.preflight.len(), 3);
    let now = k8s_openapi::jiff::Timestamp::from_second(FROM + 40 * STEP + 10).unwrap();
    let resolved = record::resolved(&object, "http://prometheus:9090").unwrap();

    // The stage that runs.
    let live = record::record(&object, &resolved, Choice::default(), &prometheus, now).await.unwrap();
    let report = backtest::run(&live.set, &[]).unwrap();
    assert!(live.remarks.is_empty(), "{:?}", live.remarks);
    let again: Vec<_> = report.kpis.iter().map(|kpi| kpi.result.clone()).collect();
    assert_eq!(evidence(&again), evidence(&status.kpis));
    assert!(report.fails(), "{}", report.table());

    // The same stage once the operator has decided on it, and what was learned there is gone.
    let mut snapshot = Snapshot { status: status.clone(), ..Snapshot::default() };
    for optimization in &mut snapshot.status.optimizations {
        let known = resolved.optimization(&optimization.name).unwrap();
        optimization.config_hash.clone_from(&known.config_hash);
    }
    let mut over = object.clone();
    let after = over.status.insert(machine::step(&resolved, &snapshot, status.kpis.clone(), now).status);
    after.preflight.clear();
    assert_eq!(after.stage.as_ref().map(|stage| stage.step), Some(Step::Restoring));
    let decision = after.decisions.last().unwrap();
    assert_eq!(decision.what, What::OptimizationRolledBack, "{}", decision.why);
    assert_eq!(decision.basis.as_ref().unwrap().until, FROM + 40 * STEP);
    let later = now + k8s_openapi::jiff::SignedDuration::from_hours(5);
    let choice = Choice { stage: Some("staging"), ..Choice::default() };
    let past = record::record(&over, &resolved, choice, &prometheus, later).await.unwrap();
    assert!(past.remarks.is_empty(), "{:?}", past.remarks);
    let report = backtest::run(&past.set, &[]).unwrap();
    let again: Vec<_> = report.kpis.iter().map(|kpi| kpi.result.clone()).collect();
    assert_eq!(evidence(&again), evidence(&status.kpis));
    for kpi in &report.kpis {
        assert_eq!(kpi.reproduced, Some(true), "{}: {:?} {:?}", kpi.name, kpi.decided, kpi.result);
    }

    let one = Choice { kpis: &["slow".to_owned()], ..choice };
    let past = record::record(&over, &resolved, one, &prometheus, later).await.unwrap();
    assert_eq!(past.set.kpis.iter().map(|kpi| kpi.definition.name.as_str()).collect::<Vec<_>>(), ["slow"]);

    // What cannot be compared any more says why, and what cannot be read makes the recording no whole one.
    let mut edited = over.clone();
    edited.spec.kpis[0].error_ratio.as_mut().unwrap().errors = "faults_total{$arm}".to_owned();
    let now_resolved = record::resolved(&edited, "http://prometheus:9090").unwrap();
    let past = record::record(&edited, &now_resolved, choice, &prometheus, later).await.unwrap();
    assert_eq!(past.remarks, ["errors is left out: its queries have been edited since the decision"]);
    assert!(past.whole);
    let (server, prometheus) = store().await;
    let refused = json!({"status": "error", "errorType": "execution", "error": "too many samples"});
    Mock::given(matchers::body_string_contains("memory_bytes"))
        .respond_with(ResponseTemplate::new(422).set_body_json(refused))
        .with_priority(1)
        .mount(&server)
        .await;
    let past = record::record(&over, &resolved, choice, &prometheus, later).await.unwrap();
    assert!(past.remarks.len() == 1 && past.remarks[0].contains("too many samples"), "{:?}", past.remarks);
    assert!(!past.whole);

    let other = Choice { kpis: &["slwo".to_owned()], ..choice };
    let refused = record::record(&over, &resolved, other, &prometheus, later).await.unwrap_err();
    assert_eq!(refused.to_string(), "there is no KPI slwo; there are errors, slow, memory");

    let none = Choice { stage: Some("canary"), ..Choice::default() };
    let refused = record::record(&over, &resolved, none, &prometheus, later).await.unwrap_err();
    assert!(refused.to_string().contains("stage canary is neither judged now nor among"), "{refused}");
    assert!(refused.to_string().contains("staging (attempt 2)"), "{refused}");
}

fn plugin(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubectl-synthex")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn exit_codes_tell_a_failing_kpi_from_an_error() {
    let (alarm, healthy) = (path("backtest-alarm.json"), path("backtest-healthy.json"));
    let cases: [(&[&str], i32, &str); 8] = [
        (&["backtest", &alarm], 2, ""),
        (&["backtest", &alarm, "-o", "json"], 2, ""),
        (&["backtest", &alarm, "--kpi", "memory"], 0, ""),
        (&["backtest", &healthy], 0, ""),
        (&["backtest", &healthy, "--stage", "canary"], 1, "go with the name of a rollout"),
        (&["backtest", "/no/such.json"], 1, "cannot read /no/such.json"),
        (&["backtest"], 1, "Usage: kubectl synthex backtest"),
        (&["--help"], 0, ""),
    ];
    for (arguments, code, error) in cases {
        let output = plugin(arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(error) && stderr.is_empty() == error.is_empty(), "{arguments:?}: {stderr}");
    }
    let json: Value = serde_json::from_slice(&plugin(&["backtest", &alarm, "-o", "json"]).stdout).unwrap();
    assert_eq!(json["kpis"][0]["result"]["verdict"], "Fail");
    assert_eq!(json["kpis"][0]["ticks"].as_array().unwrap().len(), 40);
}

#[test]
fn a_recording_without_prometheus_says_how_to_reach_it() {
    let output = plugin(&["record", "-f", &path("explain.json")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("kubectl port-forward"), "{}", text(&output.stderr));
}

#[test]
fn an_explanation_shows_the_numbers_and_how_they_are_made() {
    let output = plugin(&["explain", "-f", &path("explain.json")]);
    let told = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for words in [
        "shop/experts: Progressing",
        "stage canary (2 of 5), attempt 2, Observing: observed for 2m of 24h; 10 % of production traffic wanted on the canary, 10% there",
        "stage canary: it is observed for 24h",
        "the operator looks again at 2026-11-24T12:10:00Z at the latest",
        "memory: Active in stage canary since",
        "benefit: memory -38 % (-41 to -35)",
        "connections: RolledBack in stage canary since",
        "why: upstream-errors: canary 5.0% (50 of 1000) against baseline 0.2% (2 of 1000)",
        "memory: -38 % (-41 to -35) by memory",
        "query-errors (errorRatio, shared): Pass, Judged: ",
        "canary 3 of 2000, baseline 2 of 2000",
        "(attempt 2)",
        "= ln(1/alpha) = 10.0213",
        "7 2026-11-24T12:00:00Z OptimizationRolledBack",
        "evidence of stage canary, attempt 1, with connections, memory: experts-canary (1 pod) against experts-baseline (1 pod), \
         from 2026-11-24T11:30:00Z to 2026-11-24T12:00:00Z",
        "upstream-errors (errorRatio of connections): Fail",
        "canary 50 of 1000, baseline 2 of 1000",
        "tolerated ratio of odds r0 2.23684 = max(tolerance 1.25, exp(3.45 x 0.165 x sqrt(1/1 + 1/1)) = 2.2368) = 2.2368: the spread of pods decides; tau was learned from 8 pods",
        "log evidence 15.2 >= 7.1309 = ln(1/alpha) = 7.1309, alpha = 0.01",
        "kubectl synthex backtest experts -n shop --stage STAGE",
    ] {
        assert!(told.contains(words), "{words:?} is not in:\n{told}");
    }
    let json: Value =
        serde_json::from_slice(&plugin(&["explain", "-f", &path("explain.json"), "-o", "json"]).stdout)
            .unwrap();
    assert_eq!(json["decisions"][1]["kpis"][0]["alarmAt"], 7.1309);

    let object = cli::parse(&data("explain.json")).unwrap();
    let text = explain::explain(&object, None).text();
    assert!(text.contains("upstream-errors: Fail"), "without a specification that can be followed:\n{text}");
    assert!(cli::parse(b"kind: List").is_err());
}

/// Runs the plugin against an API server of wiremock.
async fn asked(server: &MockServer, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server.uri()}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "shop"}}],
    });
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-synthex"));
    command.args(arguments).arg("--kubeconfig").arg(kubeconfig);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[tokio::test]
async fn verbs_are_annotations_put_under_the_plugin_s_own_name() {
    let cases: [(&[&str], &str, &str); 5] = [
        (&["promote", "experts", "canary"], "synthex.io/promote", "canary"),
        (&["promote", "experts", "canary", "--force"], "synthex.io/promote", "force:canary"),
        (&["abort", "experts", "canary"], "synthex.io/abort", "canary"),
        (&["rollback", "experts", "memory"], "synthex.io/rollback", "memory"),
        (&["retry", "experts", "memory"], "synthex.io/retry", "memory"),
    ];
    let meta = json!({
        "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
        "metadata": {"name": "experts", "namespace": "shop", "resourceVersion": "7"},
    });
    let rollout = "/apis/synthex.io/v1alpha1/namespaces/shop/optimizationrollouts/experts";
    let reads = |meta: &Value| {
        let answer = ResponseTemplate::new(200).set_body_json(meta);
        Mock::given(matchers::method("GET")).and(matchers::path(rollout)).respond_with(answer)
    };
    for (arguments, annotation, value) in cases {
        let server = MockServer::start().await;
        reads(&meta).mount(&server).await;
        // The operator has written meanwhile: it is put once more.
        Mock::given(matchers::method("PATCH"))
            .respond_with(ResponseTemplate::new(409).set_body_json(json!({
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Conflict", "code": 409,
                "message": "the object has been modified",
            })))
            .up_to_n_times(1)
            .with_priority(1)
            .mount(&server)
            .await;
        Mock::given(matchers::method("PATCH"))
            .and(matchers::path(rollout))
            .and(matchers::query_param("fieldManager", "kubectl-synthex"))
            .and(matchers::header("content-type", "application/merge-patch+json"))
            .and(matchers::body_json(
                json!({"metadata": {"resourceVersion": "7", "annotations": {annotation: value}}}),
            ))
            .respond_with(ResponseTemplate::new(200).set_body_json(&meta))
            .expect(1)
            .mount(&server)
            .await;
        let output = asked(&server, arguments).await;
        let told = text(&output.stdout);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        assert!(told.contains(&format!("{annotation}={value}")), "{told}");
        assert!(told.contains("kubectl synthex explain experts -n shop"), "{told}");
    }
    // Another word of the same kind waits for its answer.
    let server = MockServer::start().await;
    let mut waiting = meta.clone();
    waiting["metadata"]["annotations"] = json!({"synthex.io/rollback": "connections"});
    reads(&waiting).mount(&server).await;
    let output = asked(&server, &["rollback", "experts", "memory"]).await;
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("synthex.io/rollback=connections has not been answered yet"), "{told}");
}

#[tokio::test]
async fn a_rollout_is_read_by_name_and_a_missing_one_is_an_error() {
    let server = MockServer::start().await;
    let object: Value = serde_json::from_slice(&data("explain.json")).unwrap();
    Mock::given(matchers::method("GET"))
        .and(matchers::path("/apis/synthex.io/v1alpha1/namespaces/shop/optimizationrollouts/experts"))
        .respond_with(ResponseTemplate::new(200).set_body_json(&object))
        .mount(&server)
        .await;
    Mock::given(matchers::any())
        .respond_with(ResponseTemplate::new(404).set_body_json(json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": "optimizationrollouts.synthex.io \"other\" not found",
        })))
        .with_priority(9)
        .mount(&server)
        .await;
    let output = asked(&server, &["explain", "experts"]).await;
    assert_eq!(text(&output.stdout), text(&plugin(&["explain", "-f", &path("explain.json")]).stdout));
    let output = asked(&server, &["backtest", "other", "--prometheus", "http://127.0.0.1:9"]).await;
    assert_eq!(output.status.code(), Some(1));
    let refused = "kubectl-synthex: oro/other: get: optimizationrollouts.synthex.io \"other\" not found\n";
    assert_eq!(text(&output.stderr), refused);
}
