//! The judge against an independent implementation: tables that `data/judge.py` has computed with scipy and statsmodels.

#![allow(clippy::unwrap_used)] // In helpers of tests too, which Clippy does not take for tests.

use std::collections::BTreeMap;

use serde::Deserialize;
use synthex_operator::{
    api::{Change, Counts, Direction, Evidence, Preflight, ShareEvidence, StageChange, Track},
    decision::judge::{
        Answer, AnswerHealth, Arm, Arms, Kpi, Lesson, Samples, Series, Test, Tick, Trial, alarm_at,
        beginning, pooled,
    },
};

const STEP: i64 = 15;

/// A value per tick, where there is one.
type Row = Vec<Option<f64>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tables {
    gauges: Vec<GaugeCase>,
    spreads: Vec<SpreadCase>,
    gauge_spreads: Vec<GaugeSpreadCase>,
    bounds: Vec<BoundsCase>,
    share_changes: Vec<ShareCase>,
    pooled: Vec<PooledCase>,
    alarms: Vec<(f64, f64, usize, i32, f64)>,
    detectables: Vec<DetectableCase>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GaugeCase {
    name: String,
    higher_is_better: bool,
    tolerance: f64,
    preflight_pods: i32,
    spread: Vec<f64>,
    bake: i64,
    alarm_at: f64,
    canary: Vec<Row>,
    baseline: Vec<Row>,
    /// Ticks at which the evidence rises, each with its peak from then on.
    peaks: Vec<(i64, f64)>,
    change: [f64; 3],
    detectable: Option<f64>,
}

#[derive(Deserialize)]
struct SpreadCase {
    name: String,
    errors: Vec<Row>,
    total: Vec<Row>,
    pods: i32,
    spread: f64,
}

#[derive(Deserialize)]
struct GaugeSpreadCase {
    name: String,
    values: Vec<Row>,
    pods: i32,
    spread: Vec<f64>,
}

#[derive(Deserialize)]
struct BoundsCase {
    name: String,
    les: Vec<String>,
    /// For each pod the count of each bucket, the last one that of all.
    counts: Vec<Vec<f64>>,
    bounds: Vec<String>,
    /// The share of all above each bound.
    shares: Vec<f64>,
}

#[derive(Deserialize)]
struct ShareCase {
    canary: (f64, f64),
    baseline: (f64, f64),
    spread: f64,
    pods: (i32, i32),
    change: [f64; 3],
}

#[derive(Deserialize)]
struct PooledCase {
    stages: Vec<[f64; 3]>,
    overall: [f64; 3],
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DetectableCase {
    /// Per second and pod.
    requests: f64,
    share: f64,
    pods: (i32, i32),
    spread: f64,
    tolerance: f64,
    minimum_effect: f64,
    bake: i64,
    alarm_at: f64,
    detectable: f64,
}

fn tables() -> Tables {
    serde_json::from_str(include_str!("data/judge.json")).unwrap()
}

fn kpi(test: Test) -> Kpi {
    Kpi {
        name: "k".to_owned(),
        owner: None,
        required: true,
        observe_only: false,
        weight: 1.0,
        warm_up: None,
        expect: None,
        test,
    }
}

fn ratio(tolerance: f64, minimum_effect: f64) -> Kpi {
    kpi(Test::ErrorRatio {
        errors: "errors_total{$arm}".to_owned(),
        total: "requests_total{$arm}".to_owned(),
        tolerance,
        minimum_effect,
    })
}

fn gauge(direction: Direction, tolerance: f64) -> Kpi {
    kpi(Test::Gauge { query: "memory_bytes{$arm}".to_owned(), direction, tolerance })
}

fn latency() -> Kpi {
    kpi(Test::Latency {
        histogram: "seconds_bucket{$arm}".to_owned(),
        tolerance: 1.25,
        minimum_effect: 0.005,
    })
}

fn trial(kpi: Kpi, preflight: Preflight, (canary, baseline): (i32, i32), alarm_at: f64, bake: i64) -> Trial {
    let arm = |name: &str, pods| Arm { deployment: name.to_owned(), pods };
    Trial {
        kpi,
        arms: Arms {
            namespace: "shop".to_owned(),
            canary: arm("x-canary", canary),
            baseline: Some(arm("x-baseline", baseline)),
        },
        preflight: Some(preflight),
        alarm_at,
        step: STEP,
        warm_up: 0,
        bake,
    }
}

fn preflight(pods: i32, spread: Vec<f64>) -> Preflight {
    Preflight {
        kpi: "k".to_owned(),
        track: Track::Production,
        reads: String::new(),
        until: 0,
        pods,
        cautious_until: None,
        spread,
        bounds: vec![],
        native: false,
        shares: vec![],
        requests: 0.0,
    }
}

/// A digit as Kubernetes would have it in the name of a pod.
fn safe(digit: usize) -> char {
    char::from(b"2456789bcd"[digit])
}

/// One series per pod of a Deployment, with a value per row at the ticks from `first` on.
fn series(deployment: &str, rows: &[Row], le: Option<&str>, first: Tick, step: i64) -> Samples {
    let one = |(pod, row): (usize, &Row)| {
        let mut labels = BTreeMap::from([
            ("pod".to_owned(), format!("{deployment}-5d9c7-bbb{}{}", safe(pod / 10), safe(pod % 10))),
            ("instance".to_owned(), format!("10.0.0.{pod}:9090")),
            ("job".to_owned(), "pods".to_owned()),
        ]);
        labels.extend(le.map(|le| ("le".to_owned(), le.to_owned())));
        let points =
            row.iter().zip(0..).filter_map(|(value, i)| value.map(|value| (first + i * step, value)));
        Series::new(&labels, points.collect())
    };
    rows.iter().enumerate().map(one).collect()
}

#[track_caller]
fn close(what: &str, seen: f64, expected: f64, tolerance: f64) {
    assert!((seen - expected).abs() <= tolerance * expected.abs().max(1.0), "{what}: {seen}, not {expected}");
}

#[track_caller]
fn same(what: &str, Change { estimate, low, high }: Change, expected: [f64; 3], tolerance: f64) {
    for (seen, expected) in [estimate, low, high].into_iter().zip(expected) {
        close(what, seen, expected, tolerance);
    }
}

#[test]
fn gauges_give_the_evidence_of_scipy() {
    for case in tables().gauges {
        let direction =
            if case.higher_is_better { Direction::HigherIsBetter } else { Direction::LowerIsBetter };
        let pods = (case.canary.len() as i32, case.baseline.len() as i32);
        let learned = preflight(case.preflight_pods, case.spread);
        let trial = trial(gauge(direction, case.tolerance), learned, pods, case.alarm_at, case.bake);
        let answer = Answer::Series(
            [("x-canary", &case.canary), ("x-baseline", &case.baseline)]
                .into_iter()
                .flat_map(|(deployment, rows)| series(deployment, rows, None, STEP, STEP))
                .collect(),
        );
        let (mut evidence, mut expected) = (beginning(0), case.peaks.iter().peekable());
        let (mut peak, mut health) = (0.0, AnswerHealth::Good);
        for tick in 1..=case.canary[0].len() as i64 {
            let (from, until) = ((tick - 1) * STEP, tick * STEP);
            (evidence, health) = trial.fold(evidence, std::slice::from_ref(&answer), from, until);
            if let Some((_, rises)) = expected.next_if(|(at, _)| *at == tick) {
                peak = *rises;
            }
            let seen = evidence.gauge.as_ref().unwrap().peak;
            close(&format!("{} at tick {tick}", case.name), seen, peak, 1e-9);
        }
        assert!(expected.next().is_none(), "{}", case.name);
        let status = trial.judge(&evidence, &health);
        // Rounded to six digits on the way to the status; 1e-4 for the bisection of the quantile.
        same(&case.name, status.change.unwrap(), case.change, 1e-4);
        if let Some(detectable) = case.detectable {
            // Ours takes the quantile plus 0.84 for the noncentral t.
            close(&case.name, status.detectable.unwrap().ln(), detectable.ln(), 0.02);
            let (seen, exact) = (status.detectable.unwrap() - 1.0, detectable - 1.0);
            assert!((0.9..1.1).contains(&(seen / exact)), "{}: {seen}, not {exact}", case.name);
        }
    }
}

#[test]
fn the_spread_between_pods_is_that_of_the_moments() {
    for case in tables().spreads {
        let lesson = lesson(ratio(1.25, 0.001));
        let answer = |rows: &[Row]| Answer::Series(series("x", rows, None, lesson.from(), lesson.block));
        let learned = lesson.learn(&[answer(&case.errors), answer(&case.total)]).unwrap().unwrap();
        assert_eq!(learned.pods, case.pods, "{}", case.name);
        close(&case.name, learned.spread[0], case.spread, 1e-5);
    }
}

#[test]
fn the_spread_of_a_gauge_is_that_of_numpy() {
    for case in tables().gauge_spreads {
        let lesson = lesson(gauge(Direction::LowerIsBetter, 0.05));
        let answer = Answer::Series(series("x", &case.values, None, lesson.from(), lesson.block));
        let learned = lesson.learn(&[answer]).unwrap().unwrap();
        assert_eq!(learned.pods, case.pods, "{}", case.name);
        assert_eq!(learned.spread.len(), case.spread.len(), "{}", case.name);
        for (seen, expected) in learned.spread.iter().zip(&case.spread) {
            close(&case.name, seen / expected, 1.0, 1e-5);
        }
    }
}

#[test]
fn the_bounds_of_a_latency_are_those_below_the_quantiles() {
    for case in tables().bounds {
        let lesson = lesson(latency());
        let les = case.les.iter().map(String::as_str).chain(["+Inf"]).enumerate();
        let buckets = les.flat_map(|(index, le)| {
            // All that was counted, in the last block.
            let row = |counts: &Vec<f64>| [vec![Some(0.0); 10], vec![Some(counts[index])]].concat();
            let rows: Vec<Row> = case.counts.iter().map(row).collect();
            series("x", &rows, Some(le), lesson.from(), lesson.block)
        });
        let learned = lesson.learn(&[Answer::Series(buckets.collect())]).unwrap().unwrap();
        assert_eq!(learned.bounds, case.bounds, "{}", case.name);
        assert_eq!(learned.shares.len(), case.shares.len(), "{}", case.name);
        for (seen, expected) in learned.shares.iter().zip(case.shares) {
            close(&case.name, *seen, expected, 1e-6);
        }
    }
}

fn lesson(kpi: Kpi) -> Lesson {
    Lesson::over(&kpi, Track::Production, "shop", vec!["x".to_owned()], 600, 600, STEP)
}

#[test]
fn changes_of_shares_have_the_interval_of_statsmodels() {
    for case in tables().share_changes {
        let counts = |(events, total)| Counts { events, total };
        let share = ShareEvidence {
            canary: counts(case.canary),
            baseline: counts(case.baseline),
            ..ShareEvidence::default()
        };
        let evidence = Evidence { shares: vec![share], fresh_ticks: 4, ..beginning(4 * STEP) };
        let trial = trial(ratio(1.25, 0.001), preflight(20, vec![case.spread]), case.pods, 8.0, 116);
        let change = trial.judge(&evidence, &AnswerHealth::Good).change.unwrap();
        // Ours takes 1.96 for the quantile.
        same(&format!("{:?} {:?}", case.canary, case.baseline), change, case.change, 1e-4);
    }
}

#[test]
fn changes_are_pooled_as_in_a_meta_analysis() {
    for case in tables().pooled {
        let stage = |[estimate, low, high]: [f64; 3]| StageChange {
            stage: "s".to_owned(),
            track: Track::Production,
            change: Change { estimate, low, high },
        };
        let stages: Vec<StageChange> = case.stages.iter().copied().map(stage).collect();
        same(&format!("{:?}", case.stages), pooled(&stages).unwrap(), case.overall, 1e-4);
        // What is no measurement on the log scale, or certain, has no weight beside those that are.
        for odd in [[-0.4, -1.2, 0.4], [-1.0, -1.0, -1.0], [0.5, 0.5, 0.5]] {
            assert_eq!(pooled(&[stage(odd)]), None);
            let all: Vec<StageChange> = [odd].iter().chain(&case.stages).copied().map(stage).collect();
            assert_eq!(pooled(&all), pooled(&stages));
        }
    }
}

#[test]
fn alarms_spend_the_alpha_of_the_notes() {
    for (probability, share, stages, attempt, expected) in tables().alarms {
        close(
            &format!("attempt {attempt} of {stages} stages"),
            alarm_at(probability, share, stages, attempt),
            expected,
            1e-12,
        );
    }
}

#[test]
fn detectable_ratios_are_those_found_by_simulation() {
    for case in tables().detectables {
        let (shares, requests) = (vec![case.share], case.requests);
        let learned = Preflight { shares, requests, ..preflight(20, vec![case.spread]) };
        let kpi = ratio(case.tolerance, case.minimum_effect);
        let trial = trial(kpi, learned, case.pods, case.alarm_at, case.bake);
        let foretold = trial.foretold().unwrap().detectable.unwrap();
        // The normal approximation of the evidence against 2,000 simulated stages: within a tenth of the ratio.
        close(
            &format!("{} requests of {:?} pods", case.requests, case.pods),
            foretold / case.detectable,
            1.0,
            0.10,
        );
    }
}
