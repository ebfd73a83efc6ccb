//! Judgement, from samples to verdicts: against an independent computation, by properties, and by tables of odd samples.

mod kinds;

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::Deserialize;
use synthex_operator::{
    api::{self, Cause, Counts, Direction, Evidence, KpiStatus, Preflight, ShareEvidence, Verdict},
    decision::judge::{
        Answer, AnswerHealth, Arm, Arms, Bound, CAUTIOUS, Kpi, Samples, Series, Test, Tick, Trial, alarm_at,
        beginning, effective_tolerance, observed, settled,
    },
};

const STEP: i64 = 15;

fn arms(canary: i32, baseline: i32) -> Arms {
    let arm = |name: &str, pods| Arm { deployment: name.to_owned(), pods };
    Arms {
        namespace: "shop".to_owned(),
        canary: arm("x-canary", canary),
        baseline: Some(arm("x-baseline", baseline)),
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

fn threshold(bound: Bound, consecutive: u32) -> Kpi {
    kpi(Test::Threshold { query: "max(heap_bytes{$arm})".to_owned(), bound, consecutive })
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

/// A trial in which nothing was learned of the pods, so that the cautious spread is taken.
fn trial(kpi: Kpi, arms: Arms) -> Trial {
    Trial { kpi, arms, preflight: None, alarm_at: 8.6, step: STEP, warm_up: 0, bake: 1000 }
}

fn fold(
    kpi: &Kpi,
    arms: &Arms,
    evidence: Evidence,
    answers: &[Answer],
    from: Tick,
    until: Tick,
) -> (Evidence, AnswerHealth) {
    trial(kpi.clone(), arms.clone()).fold(evidence, answers, from, until)
}

fn judge(kpi: &Kpi, arms: &Arms, evidence: &Evidence, health: &AnswerHealth, alarm_at: f64) -> KpiStatus {
    Trial { alarm_at, ..trial(kpi.clone(), arms.clone()) }.judge(evidence, health)
}

/// A counter of one pod: a value per tick from tick 0 on, or `None` where there is no sample.
fn counter(pod: &str, values: &[Option<f64>]) -> Series {
    labelled(&[("pod", pod), ("instance", &format!("{pod}:9090")), ("job", "pods")], values)
}

/// A pod's own suffix: five of the letters and digits that Kubernetes uses.
fn suffix(number: usize) -> String {
    const SAFE: &[u8; 27] = b"2456789bcdfghjklmnpqrstvwxz";
    format!("bbb{}{}", char::from(SAFE[number / 27]), char::from(SAFE[number % 27]))
}

fn labelled(labels: &[(&str, &str)], values: &[Option<f64>]) -> Series {
    let labels: BTreeMap<_, _> =
        labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let points = values.iter().zip(0..).filter_map(|(value, tick)| value.map(|value| (tick * STEP, value)));
    Series::new(&labels, points.collect())
}

/// As `timestamp(total)` gives it for samples that are `age` seconds old at each tick.
fn times(total: &[Series], age: f64) -> Samples {
    let at = |series: &Series| series.points.iter().map(|(time, _)| (*time, *time as f64 - age)).collect();
    total.iter().map(|series| Series { points: at(series), ..series.clone() }).collect()
}

fn some(values: &[f64]) -> Vec<Option<f64>> {
    values.iter().copied().map(Some).collect()
}

fn answers(errors: &[Series], total: &[Series]) -> [Answer; 3] {
    [Answer::Series(errors.to_vec()), Answer::Series(total.to_vec()), Answer::Series(times(total, 1.0))]
}

/// Folds everything from tick 0, the base, to the last tick.
fn folded(errors: &[Series], total: &[Series], ticks: i64) -> (Evidence, AnswerHealth) {
    fold(&ratio(1.25, 0.001), &arms(1, 1), Evidence::default(), &answers(errors, total), 0, ticks * STEP)
}

fn counts(evidence: &Evidence) -> [f64; 4] {
    let ShareEvidence { canary, baseline, .. } = &evidence.shares[0];
    [canary.events, canary.total, baseline.events, baseline.total]
}

/// Evidence with these counts, as if it had been folded.
fn counted(canary: (f64, f64), baseline: (f64, f64)) -> Evidence {
    peaking(0.0, canary, baseline)
}

/// The same with a highest log evidence.
fn peaking(peak: f64, canary: (f64, f64), baseline: (f64, f64)) -> Evidence {
    let counts = |(events, total)| Counts { events, total };
    let share =
        ShareEvidence { peak, canary: counts(canary), baseline: counts(baseline), ..Default::default() };
    Evidence { shares: vec![share], ..Evidence::default() }
}

/// Counters of one pod per arm that grow as the rows say: canary errors and requests, baseline errors and requests.
fn grown(rows: &[[u64; 4]]) -> (Samples, Samples) {
    let sum = |column: usize| -> Vec<Option<f64>> {
        let mut sum = 0;
        let rest = rows.iter().map(|row| {
            sum += row[column];
            Some(sum as f64)
        });
        std::iter::once(Some(0.0)).chain(rest).collect()
    };
    (
        vec![counter("x-baseline-5d9c7-bbb24", &sum(2)), counter("x-canary-5d9c7-bbb24", &sum(0))],
        vec![counter("x-baseline-5d9c7-bbb24", &sum(3)), counter("x-canary-5d9c7-bbb24", &sum(1))],
    )
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    name: String,
    tolerance: f64,
    minimum_effect: f64,
    /// The share of events that was learned.
    usual: f64,
    canary_pods: i32,
    baseline_pods: i32,
    ticks: Vec<[u64; 4]>,
    log_evidence: Vec<f64>,
    peak: f64,
}

#[test]
fn the_evidence_is_that_of_an_independent_computation() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../data/eprocess.json")).unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let (errors, total) = grown(&case.ticks);
        let trial =
            trial(ratio(case.tolerance, case.minimum_effect), arms(case.canary_pods, case.baseline_pods));
        let preflight = kinds::learned(0, &[CAUTIOUS], &[]);
        let trial = Trial { preflight: Some(Preflight { shares: vec![case.usual], ..preflight }), ..trial };
        let mut evidence = Evidence::default();
        for (tick, expected) in (1..).zip(&case.log_evidence) {
            let (from, until) = ((tick - 1) * STEP, tick * STEP);
            let health;
            (evidence, health) = trial.fold(evidence, &answers(&errors, &total), from, until);
            assert_eq!(health, AnswerHealth::Good, "{}", case.name);
            let seen =
                Trial { alarm_at: 1e9, ..trial.clone() }.judge(&evidence, &health).log_evidence.unwrap();
            let exact = log_evidence(&evidence);
            assert!(
                (exact - expected).abs() <= 1e-9 * expected.abs().max(1.0),
                "{} at {tick}: {exact} {expected}",
                case.name
            );
            assert!((seen - exact).abs() <= 1e-5 * exact.abs().max(1.0), "{} is shown as {seen}", case.name);
        }
        assert!(
            (evidence.shares[0].peak - case.peak).abs() <= 1e-9 * case.peak.max(1.0),
            "{}: {}",
            case.name,
            evidence.shares[0].peak
        );
    }
}

fn log_evidence(evidence: &Evidence) -> f64 {
    let weights = &evidence.shares[0].log_weights;
    let highest = weights.iter().copied().fold(0.0, f64::max);
    let begun = weights.iter().map(|w| (w - highest).exp()).sum::<f64>() / weights.len() as f64;
    let to_come = 0.2 / evidence.fresh_ticks.max(1) as f64;
    highest + (begun + to_come * (-highest).exp()).ln()
}

#[test]
fn harm_that_begins_late_is_found_as_well() {
    let alarm_at = alarm_at(0.01, 0.25, 5, 1);
    let after = |healthy: usize| {
        let rows = [vec![[4, 200, 4, 200]; healthy], vec![[80, 200, 4, 200]; 60]].concat();
        let (errors, total) = grown(&rows);
        let trial = trial(ratio(1.25, 0.001), arms(10, 10));
        let answers = answers(&errors, &total);
        let mut evidence = Evidence::default();
        let alarm = (1..=rows.len()).find(|&tick| {
            let (from, until) = ((tick as i64 - 1) * STEP, tick as i64 * STEP);
            evidence = trial.fold(std::mem::take(&mut evidence), &answers, from, until).0;
            evidence.shares[0].peak >= alarm_at
        });
        alarm.expect("harm is found") - healthy
    };
    assert_eq!(after(0), 1);
    // After a day (5,760 ticks of 15 s) it is found in two ticks more: the first may be the edge of a burst, and harm that begins
    // late matters by its own size, and not by what it adds to the whole stage.
    assert_eq!(after(5760), 3);
}

#[test]
fn the_edge_of_a_burst_is_no_harm() {
    // Both arms come to fail 20 times as often; the baseline's pods are scraped a little earlier.
    let rates = |per_tick: [u64; 6]| {
        let mut sum = 0;
        per_tick.map(|errors| {
            sum += errors;
            Some(sum as f64)
        })
    };
    let peak = |canary: [u64; 6]| {
        let errors = [
            counter("x-canary-5d9c7-bbb24", &rates(canary)),
            counter("x-baseline-5d9c7-bbb24", &rates([0, 50, 50, 300, 1000, 1000])),
        ];
        let requests: Vec<_> = (0..6).map(|tick| Some(10_000.0 * f64::from(tick))).collect();
        let total =
            [counter("x-canary-5d9c7-bbb24", &requests), counter("x-baseline-5d9c7-bbb24", &requests)];
        let trial = Trial { preflight: None, ..trial(ratio(1.25, 0.001), arms(10, 10)) };
        trial.fold(beginning(0), &answers(&errors, &total), 0, 5 * STEP).0.shares[0].peak
    };
    assert!(peak([0, 50, 50, 1000, 1000, 1000]) < 4.0);
    // Harm that lasts shows in the tick after.
    assert!(peak([0, 50, 50, 2000, 4000, 4000]) > 50.0);
}

#[test]
fn alpha_is_spent_over_kpis_stages_and_attempts() {
    let alpha = |share, stages, attempt| (-alarm_at(0.01, share, stages, attempt)).exp();
    assert!((alpha(0.25, 6, 1) - 0.01 / 24.0 * 0.9).abs() < 1e-15);
    let spent: f64 = (1..10_000).map(|attempt| alpha(0.25, 6, attempt)).sum();
    assert!(spent < 0.01 / 24.0 && spent > 0.0099 / 24.0, "{spent}");
    assert_eq!(alarm_at(0.01, 1.0, 0, 0), alarm_at(0.01, 1.0, 1, 1));
}

#[test]
fn few_pods_widen_the_tolerance() {
    for (r0, tau, kc, kb, expected) in [
        (1.25, 0.1, 1, 1, (3.45 * 0.1 * 2f64.sqrt()).exp()),
        (1.25, 0.5, 10, 1, 6.1054),
        (1.25, 0.5, 1000, 1000, 1.25),
        (10.0, 0.4, 1, 1, 10.0),
        (1.25, 0.5, 0, -1, (1.725 * 2f64.sqrt()).exp()),
    ] {
        let seen = effective_tolerance(r0, tau, kc, kb);
        assert!((seen - expected).abs() < 1e-3, "{r0} {tau} {kc} {kb}: {seen}");
    }
}

#[test]
fn a_pod_belongs_to_the_deployment_of_its_whole_name() {
    let arm = |deployment: &str| Arm { deployment: deployment.to_owned(), pods: 1 };
    for pod in ["experts-5d9c7-x2x4z", "experts-76f6568854-rs4jx"] {
        assert!(arm("experts").owns(pod), "{pod}");
    }
    for pod in [
        "experts-canary-5d9c7-x2x4z",
        "experts-5d9c7",
        "experts",
        "experts-",
        "experts--",
        "experts-5d9c7-",
        "experts--x2x4z",
        "experts-5D9c7-x2x4z",
        "experts-5d9c7-x2x4z\n",
        "my-experts-5d9c7-x2x4z",
        "expertsx-5d9c7-x2x4z",
        // Of a StatefulSet, a DaemonSet and a Job whose names begin alike.
        "experts-redis-0",
        "experts-db-12",
        "experts-agent-x7k2p",
        "experts-migrate-29382-x7k2p",
        "",
    ] {
        assert!(!arm("experts").owns(pod), "{pod}");
    }
    assert!(arm("experts-canary").owns("experts-canary-5d9c7-x2x4z"));
}

#[test]
fn increases_are_counted_per_series() {
    let nan = f64::NAN;
    let b = "x-baseline-5d9c7-bbb24";
    let steady = some(&[0.0, 10.0, 20.0, 30.0]);
    let idle = some(&[0.0; 4]);
    // Name, errors of the canary, requests of the canary, and what is counted of them.
    type Values = Vec<Option<f64>>;
    let cases: &[(&str, Values, Values, [f64; 2])] = &[
        ("growth", some(&[5.0, 6.0, 8.0, 8.0]), some(&[100.0, 110.0, 120.0, 130.0]), [3.0, 30.0]),
        ("a reset counts from 0", some(&[5.0, 6.0, 2.0, 3.0]), some(&[100.0, 110.0, 7.0, 17.0]), [4.0, 27.0]),
        (
            "the first error of a lazy counter",
            vec![None, None, Some(2.0), Some(2.0)],
            steady.clone(),
            [2.0, 30.0],
        ),
        (
            "a late pod's first sample is a base",
            vec![None, Some(50.0), Some(51.0), Some(51.0)],
            vec![None, Some(500.0), Some(510.0), Some(520.0)],
            [1.0, 20.0],
        ),
        (
            "a gap of the target is a new base",
            vec![Some(1.0), None, Some(9.0), Some(10.0)],
            vec![Some(0.0), None, Some(90.0), Some(100.0)],
            [1.0, 10.0],
        ),
        (
            "not a number is no sample, and the next one a base",
            some(&[1.0, nan, 9.0, 10.0]),
            steady.clone(),
            [1.0, 30.0],
        ),
        ("nor is an infinity", some(&[1.0, f64::INFINITY, 9.0, 10.0]), steady.clone(), [1.0, 30.0]),
        ("nor a negative count", some(&[1.0, -1.0, 9.0, 10.0]), steady.clone(), [1.0, 30.0]),
        (
            "more errors than requests are all requests",
            some(&[0.0, 99.0, 99.0, 99.0]),
            steady.clone(),
            [10.0, 30.0],
        ),
        ("no errors at all", vec![None; 4], steady.clone(), [0.0, 30.0]),
    ];
    for (name, errors, total, expected) in cases {
        let errors = [counter(b, &idle), counter("x-canary-5d9c7-bbb24", errors)];
        let total = [counter(b, &steady), counter(b, &steady), counter("x-canary-5d9c7-bbb24", total)];
        let (evidence, _) = folded(&errors, &total[1..], 3);
        assert_eq!(evidence.last_tick, 3 * STEP);
        assert_eq!(counts(&evidence)[..2], *expected, "{name}");
    }
}

#[test]
fn pods_and_series_of_an_arm_are_summed_and_others_are_not() {
    let series = |pod: &str, code: &str, values: &[f64]| {
        labelled(&[("pod", pod), ("instance", pod), ("job", "j"), ("code", code)], &some(values))
    };
    let total = [
        series("x-canary-5d9c7-bbb24", "200", &[0.0, 10.0]),
        series("x-canary-5d9c7-bbb24", "500", &[0.0, 1.0]),
        series("x-canary-5d9c7-bbb25", "200", &[5.0, 25.0]),
        series("x-baseline-5d9c7-bbb24", "200", &[0.0, 7.0]),
        series("x-5d9c7-bbb24", "200", &[0.0, 1000.0]),
        series("x-canary-probe-5d9c7-bbb24", "200", &[0.0, 1000.0]),
    ];
    let (evidence, _) = folded(&[], &total, 1);
    assert_eq!(counts(&evidence), [0.0, 31.0, 0.0, 7.0]);
}

#[test]
fn a_series_of_another_target_in_the_same_pod_is_a_base_at_first() {
    let series = |instance: &str, values: &[Option<f64>]| {
        labelled(&[("pod", "x-canary-5d9c7-bbb24"), ("instance", instance), ("job", "j")], values)
    };
    let total = [
        series("1", &some(&[0.0, 10.0, 20.0])),
        // Its scrape failed at the base; what it has counted before is not of this tick.
        series("2", &[None, Some(1_000_000.0), Some(1_000_005.0)]),
        counter("x-baseline-5d9c7-bbb24", &some(&[0.0, 10.0, 20.0])),
    ];
    let (evidence, _) = folded(&[], &total, 2);
    assert_eq!(counts(&evidence), [0.0, 25.0, 0.0, 20.0]);
}

#[test]
fn stale_samples_are_no_evidence_and_stop_the_bake_clock() {
    let kpi = ratio(1.25, 0.001);
    let (errors, total) = grown(&[[1, 10, 1, 10], [0, 0, 0, 0], [0, 0, 0, 0], [4, 40, 4, 40]]);
    let mut stale = times(&total, 1.0);
    for series in &mut stale {
        series.points[2].1 = series.points[1].1 - 20.0;
        series.points[3].1 = series.points[1].1;
    }
    let answers = [Answer::Series(errors), Answer::Series(total), Answer::Series(stale)];
    let at = |tick: Tick| trial(kpi.clone(), arms(1, 1)).fold(Evidence::default(), &answers, 0, tick * STEP);
    let (evidence, health) = at(3);
    // The second tick's sample is more than two intervals old, as is the third's.
    assert_eq!((evidence.fresh_ticks, counts(&evidence)), (1, [1.0, 10.0, 1.0, 10.0]));
    let AnswerHealth::Blind(Cause::Stale, why) = &health else { panic!("{health:?}") };
    assert!(why.contains("neither the canary's nor the baseline's") && why.contains("30 s"), "{why}");
    assert_eq!(judge(&kpi, &arms(1, 1), &evidence, &health, 8.0).verdict, Verdict::Inconclusive);
    // Once samples come again, what was counted meanwhile is one larger increase.
    let (evidence, health) = at(4);
    assert_eq!((evidence.fresh_ticks, counts(&evidence)), (2, [5.0, 50.0, 5.0, 50.0]));
    assert_eq!(health, AnswerHealth::Good);
}

#[test]
fn after_a_gap_the_arms_are_compared_over_the_same_time_whichever_comes_back_first() {
    let gap_then = |rows: &[[u64; 4]], back: [i64; 2]| {
        let (errors, total) = grown(rows);
        let mut fresh = times(&total, 1.0);
        for series in &mut fresh {
            let back = back[usize::from(series.pod.contains("baseline"))];
            for (tick, sampled) in &mut series.points {
                // Samples end with the first tick and come again with the tick `back`.
                if (2..back).contains(&(*tick / STEP)) {
                    *sampled = *tick as f64 - 100.0;
                }
            }
        }
        let answers = [Answer::Series(errors), Answer::Series(total), Answer::Series(fresh)];
        let until = rows.len() as i64 * STEP;
        fold(&ratio(1.25, 0.001), &arms(1, 1), Evidence::default(), &answers, 0, until).0
    };
    let start = [3, 20, 1, 25];
    let at_once = gap_then(&[start, [0, 0, 0, 0], [0, 0, 0, 0], [9, 90, 4, 80]], [4, 4]);
    let canary_first = gap_then(&[start, [0, 0, 0, 0], [8, 80, 0, 0], [1, 10, 4, 80]], [3, 4]);
    let baseline_first = gap_then(&[start, [0, 0, 0, 0], [0, 0, 3, 70], [9, 90, 1, 10]], [4, 3]);
    for seen in [canary_first, baseline_first] {
        assert_eq!(seen.shares[0].log_weights, at_once.shares[0].log_weights);
        assert_eq!((counts(&seen), seen.fresh_ticks, seen.shares[0].carry), (counts(&at_once), 2, None));
    }
}

#[test]
fn arms_that_are_scraped_in_turn_are_compared_but_an_idle_arm_is_not() {
    let weighed = |rows: &[[u64; 4]]| {
        let (errors, total) = grown(rows);
        folded(&errors, &total, rows.len() as i64).0
    };
    let quiet = [0, 0, 0, 0];
    let together = weighed(&[quiet, [3, 20, 1, 25]]);
    for rows in [[[3, 20, 0, 0], [0, 0, 1, 25]], [[0, 0, 1, 25], [3, 20, 0, 0]]] {
        let in_turn = weighed(&rows);
        assert_eq!(in_turn.shares[0].log_weights, together.shares[0].log_weights);
        assert_eq!((in_turn.fresh_ticks, in_turn.shares[0].carry), (2, None));
    }
    // Only one tick waits: the older ones are counted, not compared.
    let idle = weighed(&[[0, 0, 9, 50], [0, 0, 1, 25], [3, 20, 0, 0]]);
    assert_eq!(idle.shares[0].log_weights, weighed(&[quiet, quiet, [3, 20, 1, 25]]).shares[0].log_weights);
    assert_eq!(counts(&idle), [3.0, 20.0, 10.0, 75.0]);
    let nothing = weighed(&[[0, 0, 1, 25], [0, 0, 0, 0], [3, 20, 0, 0]]);
    assert_eq!(nothing.shares[0].log_weights, weighed(&[quiet; 3]).shares[0].log_weights);
}

#[test]
fn a_tick_that_was_folded_is_not_folded_again() {
    let (errors, total) = grown(&[[3, 20, 1, 25], [2, 20, 1, 25], [1, 30, 0, 9]]);
    let (kpi, arms, answers) = (ratio(1.25, 0.001), arms(1, 1), answers(&errors, &total));
    let (whole, _) = fold(&kpi, &arms, Evidence::default(), &answers, 0, 3 * STEP);
    let (part, _) = fold(&kpi, &arms, Evidence::default(), &answers, 0, 2 * STEP);
    // The operator was restarted, and asks from an older checkpoint on.
    assert_eq!(fold(&kpi, &arms, part, &answers, 0, 3 * STEP).0, whole);
    assert_eq!(fold(&kpi, &arms, whole.clone(), &answers, 0, 3 * STEP).0, whole);
}

#[test]
fn a_checkpoint_that_does_not_fit_starts_afresh() {
    let (errors, total) = grown(&[[3, 20, 1, 25]]);
    for log_weights in [vec![1.0], vec![f64::NAN; 7], vec![f64::INFINITY; 7]] {
        let odd = Evidence {
            shares: vec![ShareEvidence { log_weights, ..Default::default() }],
            ..Evidence::default()
        };
        let seen = fold(&ratio(1.25, 0.001), &arms(1, 1), odd, &answers(&errors, &total), 0, STEP).0;
        assert_eq!(seen, folded(&errors, &total, 1).0);
    }
}

#[test]
fn missing_series_are_no_data_and_say_which() {
    let canary = counter("x-canary-5d9c7-bbb24", &some(&[0.0, 10.0]));
    let baseline = counter("x-baseline-5d9c7-bbb24", &some(&[0.0, 10.0]));
    for (total, expected) in [
        (vec![], "neither the canary's nor the baseline's pods"),
        (vec![baseline], "the baseline's pods, but not the canary's"),
        (vec![canary], "the canary's pods, but not the baseline's"),
    ] {
        let (evidence, health) = folded(&[], &total, 1);
        let status = judge(&ratio(1.25, 0.001), &arms(1, 1), &evidence, &health, 8.0);
        assert_eq!((status.verdict, evidence.fresh_ticks), (Verdict::NoData, 0));
        assert!(status.message.contains(expected), "{}", status.message);
        assert!(status.message.contains("labels namespace and pod"), "{}", status.message);
        assert!(status.message.contains("`requests_total{namespace=\"shop\",pod=~"), "{}", status.message);
    }
}

#[test]
fn series_that_must_not_be_summed_are_refused_while_they_last() {
    let total = |odd: Series| {
        [
            counter("x-baseline-5d9c7-bbb24", &some(&[0.0, 10.0, 20.0, 30.0])),
            counter("x-canary-5d9c7-bbb24", &some(&[0.0, 10.0, 20.0, 30.0])),
            odd,
        ]
    };
    let seen = some(&[0.0, 10.0]);
    let twin = labelled(
        &[("pod", "x-canary-5d9c7-bbb24"), ("instance", "x-canary-5d9c7-bbb24:9090"), ("job", "monitor")],
        &seen,
    );
    let podless = labelled(&[("instance", "1")], &seen);
    for (odd, expected) in
        [(twin, r#"scraped twice, by the jobs "monitor" and "pods""#), (podless, "without the label pod")]
    {
        let total = total(odd);
        let (evidence, health) = folded(&[], &total, 1);
        let AnswerHealth::Malformed(why) = &health else { panic!("{health:?}") };
        assert!(why.contains(expected) && why.contains("requests_total"), "{why}");
        assert_eq!(counts(&evidence), [0.0; 4]);
        assert_eq!(
            judge(&ratio(1.25, 0.001), &arms(1, 1), &evidence, &health, 8.0).verdict,
            Verdict::TelemetryDown
        );
        // Once they are gone, and one tick later, since a difference has two ends, judgement goes on.
        let (evidence, health) = folded(&[], &total, 3);
        assert!(matches!(health, AnswerHealth::Remark(_)), "{health:?}");
        assert_eq!(counts(&evidence), [0.0, 10.0, 0.0, 10.0]);
    }
}

#[test]
fn an_answer_that_is_none_leaves_the_evidence_as_it_was() {
    let before = Evidence { last_tick: 7 * STEP, fresh_ticks: 7, ..peaking(9.0, (9.0, 10.0), (1.0, 10.0)) };
    let kpi = ratio(1.25, 0.001);
    let empty = || Answer::Series(vec![]);
    for (odd, health) in [
        (Answer::Down("away".to_owned()), AnswerHealth::Down("away".to_owned())),
        (Answer::Malformed("odd".to_owned()), AnswerHealth::Malformed("odd".to_owned())),
    ] {
        let answers = [empty(), odd, empty()];
        assert_eq!(
            fold(&kpi, &arms(1, 1), before.clone(), &answers, 7 * STEP, 9 * STEP),
            (before.clone(), health.clone())
        );
        let unproven = Evidence { shares: counted((9.0, 10.0), (1.0, 10.0)).shares, ..before.clone() };
        assert_eq!(judge(&kpi, &arms(1, 1), &unproven, &health, 8.0).verdict, Verdict::TelemetryDown);
        // An alarm once reached stands.
        let status = judge(&kpi, &arms(1, 1), &before, &health, 8.0);
        assert_eq!(status.verdict, Verdict::Fail);
        assert!(
            status.message.ends_with("; away") || status.message.ends_with("; odd"),
            "{}",
            status.message
        );
    }
    let (evidence, health) = fold(&kpi, &arms(1, 1), before.clone(), &[empty()], 7 * STEP, 8 * STEP);
    assert_eq!(evidence, before);
    assert!(matches!(health, AnswerHealth::Malformed(_)), "{health:?}");
}

#[test]
fn without_a_baseline_a_ratio_is_inconclusive() {
    let arms = Arms { baseline: None, ..arms(1, 1) };
    let kpi = ratio(1.25, 0.001);
    assert!(trial(kpi.clone(), arms.clone()).queries().is_empty());
    let (evidence, health) = fold(&kpi, &arms, Evidence::default(), &[], 0, STEP);
    let status = judge(&kpi, &arms, &evidence, &health, 8.0);
    assert_eq!(
        (status.verdict, status.message.as_str()),
        (Verdict::Inconclusive, "there is no baseline to compare with")
    );
    assert_eq!(evidence.last_tick, STEP);
}

#[test]
fn verdicts_of_an_error_ratio() {
    let good = AnswerHealth::Good;
    let numbers = "canary 37.2% (312 of 839) against baseline 0.0% (0 of 842), evidence";
    let alarm = |peak| peaking(peak, (312.0, 839.0), (0.0, 842.0));
    let cases = [
        (alarm(12.44), Verdict::Fail, format!("{numbers} 12.4 of 8.6 needed")),
        (alarm(8.59), Verdict::Pass, format!("{numbers} 0.0 of 8.6 needed")),
        (
            counted((0.0, 839.0), (1.0, 842.0)),
            Verdict::Inconclusive,
            "canary 0.0% (0 of 839) against baseline 0.119% (1 of 842), evidence 0.0 of 8.6 needed; needs 2161 more canary \
             requests or 4 more errors on either side before it can pass"
                .to_owned(),
        ),
        (counted((0.0, 3000.0), (0.0, 1.0)), Verdict::Pass, String::new()),
        (counted((0.0, 2999.0), (0.0, 1.0)), Verdict::Inconclusive, String::new()),
        (counted((2.0, 50.0), (3.0, 50.0)), Verdict::Pass, String::new()),
        (
            counted((0.0, 0.0), (9.0, 5000.0)),
            Verdict::Inconclusive,
            "no canary pod has had a request yet; canary without requests against baseline 0.180% (9 of 5000), evidence 0.0 of \
             8.6 needed"
                .to_owned(),
        ),
        (counted((9.0, 5000.0), (0.0, 0.0)), Verdict::Inconclusive, String::new()),
        (Evidence::default(), Verdict::Inconclusive, String::new()),
    ];
    for (evidence, verdict, message) in cases {
        let status = judge(&ratio(1.25, 0.001), &arms(1, 1), &evidence, &good, 8.6);
        assert_eq!(status.verdict, verdict, "{}", status.message);
        if !message.is_empty() {
            assert_eq!(status.message, message);
        }
        assert_eq!((status.alarm_at, status.evidence), (Some(8.6), Some(evidence)));
    }
    let status = judge(&ratio(1.25, 0.001), &arms(1, 1), &counted((1.0, 3.0), (0.0, 5.0)), &good, 1.0 / 3.0);
    assert_eq!(
        (status.canary, status.baseline, status.alarm_at),
        (Some(0.333333), Some(0.0), Some(0.333333))
    );
}

#[test]
fn harm_is_found_and_stands_even_when_the_errors_stop() {
    let rows: Vec<_> = (0..40).map(|tick| if tick < 8 { [15, 40, 0, 42] } else { [0, 40, 0, 40] }).collect();
    let (errors, total) = grown(&rows);
    let (kpi, arms, alarm_at) = (ratio(1.25, 0.001), arms(1, 1), alarm_at(0.01, 0.25, 6, 1));
    let (evidence, health) = folded(&errors, &total, 40);
    let status = judge(&kpi, &arms, &evidence, &health, alarm_at);
    assert_eq!((status.verdict, &health), (Verdict::Fail, &AnswerHealth::Good), "{}", status.message);
    // A difference that does not matter is no alarm, whatever the evidence.
    let kpi = ratio(1.25, 0.5);
    let (evidence, health) = fold(&kpi, &arms, Evidence::default(), &answers(&errors, &total), 0, 40 * STEP);
    assert_eq!(evidence.shares[0].peak, 0.0);
    assert_eq!(judge(&kpi, &arms, &evidence, &health, alarm_at).verdict, Verdict::Pass);
}

#[test]
fn a_selector_of_errors_that_matches_nothing_is_remarked() {
    let (_, total) = grown(&[[0, 5000, 0, 5000]]);
    let (evidence, health) = folded(&[], &total, 1);
    let status = judge(&ratio(1.25, 0.001), &arms(1, 1), &evidence, &health, 8.6);
    assert_eq!(status.verdict, Verdict::Pass);
    assert!(status.message.contains("right unless the query is wrong: `errors_total{"), "{}", status.message);
}

#[test]
fn a_threshold_alarms_after_values_in_a_row() {
    let nan = f64::NAN;
    let value = |values: &[Option<f64>]| {
        let mut base = vec![Some(0.0)];
        base.extend_from_slice(values);
        vec![labelled(&[], &base)]
    };
    let several =
        vec![labelled(&[("pod", "a")], &some(&[1.0, 1.0])), labelled(&[("pod", "b")], &some(&[1.0, 1.0]))];
    let max = Bound::Max(10.0);
    // Values from the first tick on; the base is not judged.
    let cases: Vec<(&str, Bound, Samples, i64, Verdict, &str)> = vec![
        ("below", max, value(&some(&[9.0, 10.0, 1.0])), 3, Verdict::Pass, "value 1, not above 10"),
        (
            "two in a row",
            max,
            value(&some(&[1.0, 11.0, 12.0])),
            3,
            Verdict::Inconclusive,
            "value 12, above 10: 2 of 3 values in a row that make an alarm",
        ),
        (
            "three in a row",
            max,
            value(&some(&[11.0, 12.0, 13.5])),
            3,
            Verdict::Fail,
            "value 13.5; was above 10 for 3 values in a row",
        ),
        (
            "an alarm stands",
            max,
            value(&some(&[11.0, 12.0, 13.0, 1.0])),
            4,
            Verdict::Fail,
            "value 1; was above 10 for 3 values in a row",
        ),
        (
            "not in a row",
            max,
            value(&some(&[11.0, 12.0, 1.0, 11.0, 12.0, 2.0])),
            6,
            Verdict::Pass,
            "value 2, not above 10",
        ),
        (
            "a gap does not count",
            max,
            value(&[Some(11.0), None, Some(11.0), Some(nan), Some(12.0)]),
            5,
            Verdict::Fail,
            "",
        ),
        (
            "at least",
            Bound::Min(0.9),
            value(&some(&[0.9, 0.8, 0.7, 0.6])),
            4,
            Verdict::Fail,
            "value 0.6; was below 0.9 for 3 values in a row",
        ),
        (
            "too few",
            max,
            value(&some(&[1.0, 1.0])),
            2,
            Verdict::Inconclusive,
            "value 1, not above 10; 2 of 3 values seen",
        ),
        ("nothing", max, vec![], 1, Verdict::NoData, "Prometheus answers, but the query gives no value"),
        (
            "not a number",
            max,
            value(&some(&[1.0, 1.0, 1.0, nan])),
            4,
            Verdict::Inconclusive,
            "the value is NaN, which is no measurement",
        ),
        (
            "infinite",
            max,
            value(&some(&[1.0, 1.0, 1.0, f64::INFINITY])),
            4,
            Verdict::Inconclusive,
            "the value is inf, which is no measurement",
        ),
        (
            "several series",
            max,
            several,
            1,
            Verdict::TelemetryDown,
            "the query gives several series, and a threshold needs one",
        ),
    ];
    for (name, bound, series, ticks, verdict, message) in cases {
        let kpi = threshold(bound, 3);
        let answers = [Answer::Series(series)];
        let (evidence, health) = fold(&kpi, &arms(1, 1), Evidence::default(), &answers, 0, ticks * STEP);
        let status = judge(&kpi, &arms(1, 1), &evidence, &health, 8.6);
        assert_eq!(status.verdict, verdict, "{name}: {}", status.message);
        assert!(status.message.starts_with(message), "{name}: {}", status.message);
        assert_eq!((status.log_evidence, status.alarm_at), (None, None));
        assert_eq!(evidence.last_tick, ticks * STEP);
    }
}

#[test]
fn the_bake_clock_is_that_of_the_slowest_required_ratio() {
    let of = |kpi: &Kpi, required: bool, fresh_ticks: i64| {
        (Kpi { required, ..kpi.clone() }, Evidence { fresh_ticks, ..Evidence::default() })
    };
    let (ratio, threshold) = (ratio(1.25, 0.001), threshold(Bound::Max(1.0), 3));
    for (kpis, expected) in [
        (vec![of(&ratio, true, 9), of(&ratio, true, 7), of(&ratio, false, 1), of(&threshold, true, 2)], 7),
        (vec![of(&threshold, true, 5), of(&threshold, true, 4), of(&ratio, false, 1)], 4),
        (vec![of(&threshold, false, 5), of(&ratio, false, 6)], 6),
        (vec![], 0),
    ] {
        assert_eq!(observed(kpis.iter().map(|(kpi, evidence)| (kpi, evidence)), STEP), expected * STEP);
    }
}

#[test]
fn ticks_settle_and_are_asked_for_in_chunks() {
    assert_eq!([settled(100, 15), settled(99, 15), settled(110, 15)], [90, 75, 90]);
    assert_eq!([settled(100, 1), settled(1000, 60), settled(5, 15)], [99, 960, -15]);

    let of = |kpi: Kpi, arms: &Arms, from, until| {
        let trial = Trial { warm_up: 50, ..trial(kpi, arms.clone()) };
        trial.ranges(&beginning(from), until).collect::<Vec<_>>()
    };
    let ranges = |arms: &Arms, from, until| of(kinds::gauge(Direction::LowerIsBetter), arms, from, until);
    // What changes and what is cold when the evidence begins is seen before it.
    assert_eq!(of(ratio(1.25, 0.001), &arms(1, 1), 60, 90), [(45, 90)]);
    assert_eq!(of(kinds::latency(), &arms(1, 1), 60, 90), [(0, 90)]);
    assert_eq!(ranges(&arms(1, 1), 30, 60), [(30, 60)]);
    assert_eq!(ranges(&arms(1, 1), 30, 70), [(30, 60)]);
    assert_eq!(
        ranges(&arms(1, 1), 0, 2500 * STEP),
        [(0, 999 * STEP), (999 * STEP, 1998 * STEP), (1998 * STEP, 2500 * STEP)]
    );
    assert_eq!(
        ranges(&arms(1000, 1000), 0, 25 * STEP),
        [(0, 10 * STEP), (10 * STEP, 20 * STEP), (20 * STEP, 25 * STEP)]
    );
    // Nothing is new: the last tick is looked at again, so that a KPI that is blind stays so.
    assert_eq!(ranges(&arms(1, 1), 60, 60), [(60, 60)]);
    assert_eq!(ranges(&arms(1, 1), 60, 45), [(60, 60)]);
    let (before, _) = folded(&[], &[], 1);
    let (again, health) =
        fold(&ratio(1.25, 0.001), &arms(1, 1), before.clone(), &answers(&[], &[]), STEP, STEP);
    assert_eq!(again, before);
    assert!(matches!(health, AnswerHealth::NoData(Cause::Missing, _)));
}

#[test]
fn a_kpi_is_resolved_or_says_what_is_wrong() {
    let api = |json: serde_json::Value| -> api::Kpi { serde_json::from_value(json).unwrap() };
    let good = api(serde_json::json!({"name": "k", "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}"}}));
    let kpi = Kpi::resolve(&good, Some("memory")).unwrap();
    assert_eq!((kpi.name.as_str(), kpi.owner.as_deref(), kpi.required), ("k", Some("memory"), true));
    for (json, expected) in [
        (serde_json::json!({"name": "k"}), "exactly one of"),
        (
            serde_json::json!({"name": "k", "errorRatio": {"errors": "e", "total": "t{$arm}"}}),
            "errorRatio.errors must contain $arm",
        ),
        (
            serde_json::json!({"name": "k", "errorRatio": {"errors": "e{$arm}", "total": "t"}}),
            "errorRatio.total must contain $arm",
        ),
        (
            serde_json::json!({"name": "k", "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}", "tolerance": 0.5}}),
            "tolerance",
        ),
        (
            serde_json::json!({"name": "k", "errorRatio": {"errors": "e{$arm}", "total": "t{$arm}", "minimumEffect": 0.0}}),
            "minimumEffect",
        ),
        (serde_json::json!({"name": "k", "threshold": {"query": "q"}}), "exactly one finite max or min"),
        (
            serde_json::json!({"name": "k", "threshold": {"query": "q", "max": 1.0, "min": 0.0}}),
            "exactly one finite max or min",
        ),
        (
            serde_json::json!({"name": "k", "threshold": {"query": "q", "max": 1.0, "consecutive": -1}}),
            "consecutive",
        ),
        (serde_json::json!({"name": "k", "threshold": {"query": " ", "max": 1.0}}), "query is empty"),
    ] {
        let error = Kpi::resolve(&api(json.clone()), None).unwrap_err();
        assert!(error.contains(expected) && error.contains("KPI k"), "{json}: {error}");
    }
}

/// SplitMix64, so that the simulation is the same on every machine.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn poisson(&mut self, mean: f64) -> u64 {
        let (mut left, mut events) = ((-mean).exp(), 0);
        loop {
            left /= self.unit().max(f64::MIN_POSITIVE);
            if left >= 1.0 {
                return events;
            }
            events += 1;
        }
    }
}

#[test]
fn a_canary_at_the_edge_of_the_tolerance_seldom_alarms() {
    let mut random = Random(20_261_123);
    let (kpi, arms) = (ratio(1.25, 0.00001), arms(2, 2));
    let tolerated = effective_tolerance(1.25, CAUTIOUS, 2, 2);
    let (paths, ticks, alpha) = (1500, 150, 0.05f64);
    let mut alarms = 0;
    for _ in 0..paths {
        let mut burst = 1.0;
        let rows: Vec<_> = (0..ticks)
            .map(|_| {
                // A common rate that wanders and bursts is no evidence against the canary.
                burst = if random.unit() < 0.05 { 1.0 + 9.0 * random.unit() } else { 0.9 * burst + 0.1 };
                let (nc, nb) = (100 + (random.unit() * 400.0) as u64, 100 + (random.unit() * 400.0) as u64);
                let rate = 0.002 * burst;
                let (xc, xb) =
                    (random.poisson(rate * tolerated * nc as f64), random.poisson(rate * nb as f64));
                [xc.min(nc), nc, xb.min(nb), nb]
            })
            .collect();
        let (errors, total) = grown(&rows);
        let (evidence, _) =
            fold(&kpi, &arms, Evidence::default(), &answers(&errors, &total), 0, ticks * STEP);
        alarms += i32::from(evidence.shares[0].peak >= (1.0 / alpha).ln());
    }
    let share = f64::from(alarms) / f64::from(paths);
    // Three standard errors of a share of 0.05 in 1500 paths. And the bound is no empty one: it is within a factor of ten.
    assert!(share <= alpha + 0.017, "{share}");
    assert!(share >= alpha / 10.0, "{share}");
}

#[test]
fn nor_does_one_where_events_are_many_whatever_was_learned() {
    let mut random = Random(20_261_127);
    let tolerated = effective_tolerance(1.25, CAUTIOUS, 50, 50);
    let (paths, ticks, alpha) = (400, 60, 0.05f64);
    // What was learned is the share, or far from it on either side.
    for (usual, share) in [(0.4, 0.4), (0.1, 0.4), (0.8, 0.4), (0.4, 0.9)] {
        let preflight = Preflight { shares: vec![usual], ..kinds::learned(0, &[CAUTIOUS], &[]) };
        let trial = Trial { preflight: Some(preflight), ..trial(ratio(1.25, 0.00001), arms(50, 50)) };
        let mut alarms = 0;
        for _ in 0..paths {
            let mut arm = |n: u64, share: f64| (0..n).filter(|_| random.unit() < share).count() as u64;
            let rows: Vec<_> = (0..ticks)
                .map(|_| {
                    let (nc, nb) = (20 + arm(60, 0.5), 20 + arm(60, 0.5));
                    let odds = tolerated * share / (1.0 - share);
                    [arm(nc, odds / (1.0 + odds)), nc, arm(nb, share), nb]
                })
                .collect();
            let (errors, total) = grown(&rows);
            let mut evidence = Evidence::default();
            // The highest evidence, also where `peak` is not yet raised since a difference may be a moment's.
            let mut highest = 0.0f64;
            for tick in 1..=ticks {
                let (from, until) = ((tick - 1) * STEP, tick * STEP);
                evidence = trial.fold(evidence, &answers(&errors, &total), from, until).0;
                highest = highest.max(log_evidence(&evidence));
            }
            alarms += i32::from(highest >= (1.0 / alpha).ln());
        }
        let alarmed = f64::from(alarms) / f64::from(paths);
        // Three standard errors of a share of 0.05 in 400 paths.
        assert!(alarmed <= alpha + 0.033, "{usual} {share}: {alarmed}");
        // And the bound is no empty one.
        assert!(usual != share || alarmed >= alpha / 10.0, "{usual} {share}: {alarmed}");
    }
}

/// One pod's counters over 12 ticks: whether it is there, how it grows, where it restarts, and odd samples.
fn pod() -> impl Strategy<Value = (usize, usize, Vec<(u32, u32, u32)>)> {
    (0usize..6, 6usize..13, prop::collection::vec((0u32..40, 0u32..60, 0u32..30), 13))
}

type World = Vec<(usize, usize, Vec<(u32, u32, u32)>)>;

/// Errors, total and times of a generated world; even pods are the canary's.
fn generated(world: &World, ages: &[u32]) -> [Samples; 3] {
    let (mut errors, mut total, mut sampled) = (vec![], vec![], vec![]);
    for (number, (first, last, growth)) in world.iter().enumerate() {
        let arm = if number % 2 == 0 { "canary" } else { "baseline" };
        let name = format!("x-{arm}-5d9c7-{}", suffix(number));
        let (mut e, mut n) = (0.0, 0.0);
        let (mut es, mut ns) = (vec![], vec![]);
        for (tick, (failed, fine, odd)) in growth.iter().enumerate() {
            (e, n) =
                if *odd == 0 { (0.0, 0.0) } else { (e + f64::from(*failed), n + f64::from(failed + fine)) };
            let here = (*first..*last).contains(&tick) && *odd != 1;
            ns.push(here.then_some(if *odd == 2 { f64::NAN } else { n }));
            es.push((here && *odd != 3 && e > 0.0).then_some(if *odd == 4 { -e } else { e + 0.1 }));
        }
        errors.push(labelled(&[("pod", &name), ("instance", &name), ("job", "pods")], &es));
        // Two series with odd fractions, whose sum depends on the order in which they are taken.
        for (code, share) in [("200", 0.7), ("500", 0.3)] {
            let part: Vec<_> = ns.iter().map(|value| value.map(|value| value * share)).collect();
            total.push(labelled(
                &[("pod", &name), ("instance", &name), ("job", "pods"), ("code", code)],
                &part,
            ));
        }
    }
    for series in times(&total, 0.0) {
        let points =
            series.points.iter().map(|(t, _)| (*t, *t as f64 - f64::from(ages[(*t / STEP) as usize])));
        sampled.push(Series { points: points.collect(), ..series.clone() });
    }
    [errors, total, sampled]
}

/// What Prometheus gives for a part of the range: no series without a point.
fn part(samples: &[Samples; 3], from: Tick, until: Tick, reversed: bool) -> Vec<Answer> {
    let cut = |samples: &Samples| -> Samples {
        let mut cut: Samples = samples
            .iter()
            .map(|series| Series {
                points: series.points.iter().copied().filter(|(t, _)| (from..=until).contains(t)).collect(),
                ..series.clone()
            })
            .filter(|series| !series.points.is_empty())
            .collect();
        if reversed {
            cut.reverse();
        }
        cut
    };
    samples.iter().map(|samples| Answer::Series(cut(samples))).collect()
}

proptest! {
    #[test]
    fn splitting_the_range_changes_no_bit(
        world in prop::collection::vec(pod(), 2..6),
        ages in prop::collection::vec(0u32..40, 13),
        cuts in prop::collection::btree_set(1i64..12, 0..11),
        reversed: bool,
    ) {
        let (kpi, arms) = (ratio(1.25, 0.001), arms(3, 3));
        let samples = generated(&world, &ages);
        let (whole, _) = fold(&kpi, &arms, Evidence::default(), &part(&samples, 0, 12 * STEP, false), 0, 12 * STEP);
        let mut evidence = Evidence::default();
        let mut from = 0;
        for until in cuts.into_iter().chain([12]).map(|tick| tick * STEP) {
            // Between two parts the operator is restarted and reads its checkpoint.
            evidence = serde_json::from_str(&serde_json::to_string(&evidence).unwrap()).unwrap();
            (evidence, _) = fold(&kpi, &arms, evidence, &part(&samples, from, until, reversed), from, until);
            from = until;
        }
        let bits = |evidence: &Evidence| evidence.shares[0].log_weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&evidence), bits(&whole));
        prop_assert_eq!(evidence, whole);
    }

    #[test]
    fn splitting_changes_no_threshold_either(
        values in prop::collection::vec(prop::option::of(prop_oneof![Just(f64::NAN), 0.0..2.0]), 13),
        other in prop::collection::vec(prop::option::of(0.0..2.0), 4),
        cut in 1i64..12,
    ) {
        let (kpi, arms) = (threshold(Bound::Max(1.0), 3), arms(1, 1));
        let samples = [vec![labelled(&[("a", "1")], &values), labelled(&[("a", "2")], &other)], vec![], vec![]];
        let fold = |evidence, from, until| fold(&kpi, &arms, evidence, &part(&samples, from, until, false)[..1], from, until).0;
        let whole = fold(Evidence::default(), 0, 12 * STEP);
        prop_assert_eq!(fold(fold(Evidence::default(), 0, cut * STEP), cut * STEP, 12 * STEP), whole);
    }

    #[test]
    fn a_checkpoint_is_read_back_to_the_last_bit(
        weights in prop::collection::vec(prop::num::f64::NORMAL | prop::num::f64::ZERO | prop::num::f64::SUBNORMAL, 7),
        peak in 0.0..1e6f64,
    ) {
        let share = ShareEvidence { log_weights: weights, peak, ..Default::default() };
        let evidence = Evidence { shares: vec![share], ..Evidence::default() };
        let text: Evidence = serde_json::from_str(&serde_json::to_string(&evidence).unwrap()).unwrap();
        let value: Evidence = serde_json::from_value(serde_json::to_value(&evidence).unwrap()).unwrap();
        for read in [text, value] {
            let bits = |evidence: &Evidence| {
                let share = &evidence.shares[0];
                share.log_weights.iter().chain([&share.peak]).map(|w| w.to_bits()).collect::<Vec<_>>()
            };
            prop_assert_eq!(bits(&read), bits(&evidence));
        }
    }

    #[test]
    fn more_canary_errors_never_lower_the_evidence(
        rows in prop::collection::vec((0u64..20, 20u64..100, 0u64..20, 20u64..100), 1..20),
        at in any::<prop::sample::Index>(),
        more in 1u64..20,
        usual in prop_oneof![Just(0.0), 0.01..0.9],
    ) {
        let rows: Vec<[u64; 4]> = rows.into_iter().map(|(xc, nc, xb, nb)| [xc, nc, xb, nb]).collect();
        let mut worse = rows.clone();
        let row = &mut worse[at.index(rows.len())];
        row[0] = (row[0] + more).min(row[1]);
        let weigh = |rows: &[[u64; 4]]| {
            let (errors, total) = grown(rows);
            let preflight = Preflight { shares: vec![usual], ..kinds::learned(0, &[CAUTIOUS], &[]) };
            let trial = Trial { preflight: Some(preflight), ..trial(ratio(1.25, 0.001), arms(1, 1)) };
            trial.fold(Evidence::default(), &answers(&errors, &total), 0, rows.len() as i64 * STEP).0
        };
        let (before, after) = (weigh(&rows), weigh(&worse));
        prop_assert!(log_evidence(&after) >= log_evidence(&before) - 1e-9);
        prop_assert!(after.shares[0].peak >= before.shares[0].peak - 1e-9);
    }
}
