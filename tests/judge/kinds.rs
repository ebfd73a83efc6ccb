//! Latency, gauges, pre-flight and what a stage can show: from samples to verdicts.

use proptest::prelude::*;
use synthex_operator::{
    api::{Cause, Counts, Direction, Evidence, Preflight, Track, Verdict},
    decision::judge::{
        Answer, AnswerHealth, Arms, Bound, CAUTIOUS, Kpi, LEAST, Lesson, Samples, Series, Test, Tick, Trial,
        beginning,
    },
};

use super::{STEP, arms, counter, kpi, labelled, ratio, some, suffix, threshold, times, trial};

const BOUNDS: [&str; 4] = ["0.1", "0.25", "1.0", "+Inf"];

pub(super) fn latency() -> Kpi {
    kpi(Test::Latency { histogram: "d_bucket{$arm}".to_owned(), tolerance: 1.25, minimum_effect: 0.005 })
}

pub(super) fn gauge(direction: Direction) -> Kpi {
    kpi(Test::Gauge { query: "memory_bytes{$arm}".to_owned(), direction, tolerance: 0.05 })
}

pub(super) fn learned(pods: i32, spread: &[f64], bounds: &[&str]) -> Preflight {
    Preflight {
        kpi: "k".to_owned(),
        track: Track::Production,
        reads: String::new(),
        until: 0,
        pods,
        cautious_until: None,
        spread: spread.to_vec(),
        bounds: bounds.iter().map(|bound| (*bound).to_owned()).collect(),
        native: false,
        shares: vec![],
        requests: 0.0,
    }
}

fn with(kpi: Kpi, arms: Arms, preflight: Preflight) -> Trial {
    Trial { preflight: Some(preflight), ..trial(kpi, arms) }
}

/// Buckets of a pod's histogram; each row is one tick's new requests in each bucket, the base first.
fn histogram(pod: &str, rows: &[[u64; 4]]) -> Samples {
    let bucket = |number: usize| {
        let mut sum = 0;
        let values: Vec<_> = rows
            .iter()
            .map(|row| {
                sum += row[..=number].iter().sum::<u64>();
                Some(sum as f64)
            })
            .collect();
        let labels = [("pod", pod), ("instance", pod), ("job", "pods"), ("le", BOUNDS[number])];
        labelled(&labels, &values)
    };
    (0..BOUNDS.len()).map(bucket).collect()
}

fn inf(samples: &[Series]) -> Samples {
    samples.iter().filter(|series| series.labels.contains("+Inf")).cloned().collect()
}

fn latency_answers(samples: &[Series]) -> [Answer; 2] {
    [Answer::Series(samples.to_vec()), Answer::Series(times(&inf(samples), 1.0))]
}

/// One row per tick for canary and baseline, the same at each tick, and a base of zeros.
fn steady(canary: [u64; 4], baseline: [u64; 4], ticks: usize) -> Samples {
    let rows = |row: [u64; 4]| [vec![[0; 4]], vec![row; ticks]].concat();
    [histogram("x-baseline-5d9c7-bbb24", &rows(baseline)), histogram("x-canary-5d9c7-bbb24", &rows(canary))]
        .concat()
}

#[test]
fn a_slow_canary_is_found_at_the_bound_that_shows_it() {
    let preflight = learned(8, &[LEAST, LEAST], &["0.25", "1.0"]);
    let healthy = [600, 330, 60, 10];
    // More between the bounds, more above the upper one, and less of both.
    for (name, canary, verdict, expected) in [
        ("healthy", healthy, Verdict::Pass, "evidence"),
        ("slower", [400, 330, 260, 10], Verdict::Fail, "slower than 0.25 s: canary 27.0%"),
        ("a tail", [600, 330, 20, 50], Verdict::Fail, "slower than 1.0 s: canary 5.0%"),
        ("faster", [700, 300, 0, 0], Verdict::Pass, "evidence"),
    ] {
        let trial = with(latency(), arms(1, 1), preflight.clone());
        let samples = steady(canary, healthy, 8);
        let (evidence, health) = trial.fold(Evidence::default(), &latency_answers(&samples), 0, 8 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!((status.verdict, &health), (verdict, &AnswerHealth::Good), "{name}: {}", status.message);
        assert!(status.message.contains(expected), "{name}: {}", status.message);
        assert_eq!(evidence.fresh_ticks, 8);
        assert_eq!(evidence.shares.len(), 2);
    }
}

#[test]
fn a_restart_of_a_histogram_makes_no_slow_requests() {
    let trial = with(latency(), arms(1, 1), learned(8, &[LEAST], &["0.25"]));
    let mut samples = steady([100, 0, 0, 0], [100, 0, 0, 0], 4);
    for series in samples.iter_mut().filter(|series| series.pod.contains("canary")) {
        // Restarted before the third tick: 30 requests since, none of them slow.
        series.points[3].1 = 30.0;
        series.points[4].1 = 60.0;
    }
    let (evidence, _) = trial.fold(Evidence::default(), &latency_answers(&samples), 0, 4 * STEP);
    let canary = evidence.shares[0].canary;
    assert_eq!((canary.events, canary.total), (0.0, 100.0 + 100.0 + 30.0 + 30.0));
}

#[test]
fn a_pod_that_restarts_in_mid_stage_is_cold_for_a_warm_up() {
    let preflight = learned(8, &[LEAST], &["0.25"]);
    let trial = |warm_up| Trial { warm_up, ..with(latency(), arms(1, 1), preflight.clone()) };
    let mut samples = steady([100, 0, 0, 0], [100, 0, 0, 0], 6);
    for series in samples.iter_mut().filter(|series| series.pod.contains("canary")) {
        // Restarted before the third tick.
        let restarted = [30.0, 60.0, 90.0, 120.0];
        for (point, value) in series.points[3..].iter_mut().zip(restarted) {
            point.1 = value;
        }
    }
    let answers = latency_answers(&samples);
    for (warm_up, counted) in [(0, 320.0), (STEP, 290.0), (2 * STEP, 260.0), (600, 200.0)] {
        let (evidence, health) = trial(warm_up).fold(beginning(0), &answers, 0, 6 * STEP);
        assert_eq!((evidence.shares[0].canary.total, health), (counted, AnswerHealth::Good), "{warm_up}");
        assert_eq!(evidence.shares[0].baseline.total, 600.0);
        assert_eq!(evidence.cold.keys().collect::<Vec<_>>().len(), usize::from(warm_up == 600));
        // One tick at a time, each looked at again, it is the same.
        let mut evidence = beginning(0);
        for tick in 1..=6 {
            evidence = trial(warm_up).fold(evidence, &answers, (tick - 1) * STEP, tick * STEP).0;
            evidence = trial(warm_up).fold(evidence, &answers, tick * STEP, tick * STEP).0;
        }
        assert_eq!(evidence.shares[0].canary.total, counted, "{warm_up}");
    }
    // What began in the warm-up of the stage is seen before the evidence begins.
    let (evidence, _) = trial(3 * STEP).fold(beginning(4 * STEP), &answers, 0, 6 * STEP);
    assert_eq!(evidence.shares[0].canary.total, 30.0);
}

#[test]
fn what_is_no_histogram_is_no_latency_and_the_other_way_round() {
    let plain = [
        counter("x-baseline-5d9c7-bbb24", &some(&[0.0, 1.0])),
        counter("x-canary-5d9c7-bbb24", &some(&[0.0, 1.0])),
    ];
    let labels = [("pod".to_owned(), "x-canary-5d9c7-bbb24".to_owned())].into();
    let native =
        Series::of_native(&labels, &[(0, 1.0, vec![(0.4, 0.5, 1.0)]), (STEP, 2.0, vec![(0.4, 0.5, 2.0)])]);
    for (trial, answers, expected) in [
        (
            with(latency(), arms(1, 1), learned(8, &[LEAST], &["0.25"])),
            latency_answers(&plain).to_vec(),
            "label le",
        ),
        (trial(ratio(1.25, 0.001), arms(1, 1)), super::answers(&[], &native).to_vec(), "histogram_count"),
        (
            with(gauge(Direction::LowerIsBetter), arms(1, 1), learned(0, &[], &[])),
            vec![Answer::Series(native.clone())],
            "histogram_count",
        ),
    ] {
        let (evidence, health) = trial.fold(beginning(0), &answers, 0, STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!(
            (status.verdict, status.reason),
            (Verdict::TelemetryDown, Cause::Malformed),
            "{}",
            status.message
        );
        assert!(
            status.message.contains(expected) && status.message.contains("{namespace=\"shop\""),
            "{}",
            status.message
        );
        assert_eq!(evidence, beginning(0));
    }
}

#[test]
fn a_histogram_without_the_frozen_bucket_is_not_judged() {
    let trial = with(latency(), arms(1, 1), learned(8, &[LEAST, LEAST], &["0.25", "1.0"]));
    for lacks in ["0.25", "1.0"] {
        let mut samples = steady([600, 330, 50, 20], [600, 330, 50, 20], 8);
        samples.retain(|series| !(series.pod.contains("canary") && series.labels.contains(lacks)));
        let (evidence, health) = trial.fold(beginning(0), &latency_answers(&samples), 0, 8 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!((status.verdict, status.reason), (Verdict::TelemetryDown, Cause::Malformed), "{lacks}");
        assert!(
            status.message.contains("pod x-canary-5d9c7-bbb24 has a histogram without"),
            "{}",
            status.message
        );
        assert_eq!(evidence.shares[0].canary, Counts::default());
    }
}

#[test]
fn the_bounds_of_native_histograms_count_every_pod() {
    let pod = |number: usize| {
        let labels = [("pod".to_owned(), format!("x-baseline-5d9c7-{}", suffix(number)))].into();
        let sample = |block: i64| {
            let n = block as f64;
            let mut buckets = vec![(0.05, 0.1, 900.0 * n), (0.2, 0.25, 80.0 * n), (0.5, 1.0, 20.0 * n)];
            // One pod alone has a single request in a bucket of its own.
            if number == 0 {
                buckets.push((1.0, 2.0, 1.0));
            }
            (block * 60, buckets.iter().map(|(.., count)| count).sum(), buckets)
        };
        Series::of_native(&labels, &(0..=10).map(sample).collect::<Vec<_>>())
    };
    let samples = (0..3).flat_map(pod).collect();
    let lesson =
        Lesson::over(&latency(), Track::Production, "shop", vec!["x-baseline".to_owned()], 600, 600, STEP);
    let found = lesson.learn(&[Answer::Series(samples)]).unwrap().unwrap();
    // A tenth exceeds 0.1 s, and a fiftieth 0.25 s.
    assert_eq!((found.bounds, found.native), (vec!["0.1".to_owned(), "0.25".to_owned()], true));
}

#[test]
fn a_zero_in_the_past_teaches_nothing_of_logarithms() {
    let pod = |number: usize| {
        let mut values = vec![100.0 + number as f64; 11];
        values[4] = if number == 0 { 0.0 } else { values[4] };
        let mut series =
            labelled(&[("pod", &format!("x-baseline-5d9c7-{}", suffix(number)))], &some(&values));
        series.points.iter_mut().for_each(|point| point.0 *= 60 / STEP);
        series
    };
    let kpi = gauge(Direction::LowerIsBetter);
    let lesson = Lesson::over(&kpi, Track::Production, "shop", vec!["x-baseline".to_owned()], 600, 600, STEP);
    let found = lesson.learn(&[Answer::Series((0..9).map(pod).collect())]).unwrap().unwrap();
    assert_eq!((found.pods, found.spread[0]), (9, CAUTIOUS));
}

#[test]
fn a_native_histogram_is_judged_as_a_classic_one() {
    let preflight = Preflight { native: true, ..learned(8, &[LEAST], &["0.5"]) };
    let trial = with(latency(), arms(1, 1), preflight);
    let pod = |pod: &str, slow: f64| {
        let labels = [("pod".to_owned(), pod.to_owned()), ("instance".to_owned(), pod.to_owned())].into();
        let sample = |tick: i64| {
            let n = tick as f64;
            // Fast ones in a bucket that is empty at first, slow ones above the bound.
            (tick * STEP, 100.0 * n, vec![(0.2, 0.25, (100.0 - slow) * n), (0.5, 1.0, slow * n)])
        };
        Series::of_native(&labels, &(0..=8).map(sample).collect::<Vec<_>>())
    };
    let samples = [pod("x-baseline-5d9c7-bbb24", 5.0), pod("x-canary-5d9c7-bbb24", 40.0)].concat();
    let times = times(&inf(&samples), 1.0);
    let answers = [Answer::Series(samples), Answer::Series(times)];
    let (evidence, health) = trial.fold(beginning(0), &answers, 0, 8 * STEP);
    assert_eq!((evidence.shares[0].canary.events, evidence.shares[0].canary.total), (320.0, 800.0));
    assert_eq!(trial.judge(&evidence, &health).verdict, Verdict::Fail);
}

/// A pod whose histogram has halved its resolution has a bucket on both sides of the bound.
#[test]
fn a_native_histogram_that_cannot_tell_what_is_slow_is_named() {
    let preflight = Preflight { native: true, ..learned(8, &[LEAST], &["0.5"]) };
    let trial = with(latency(), arms(1, 1), preflight);
    let pod = |pod: &str, halved: bool| {
        let labels = [("pod".to_owned(), pod.to_owned()), ("instance".to_owned(), pod.to_owned())].into();
        let sample = |tick: i64| {
            let n = tick as f64;
            let coarse = halved && tick > 4;
            let buckets = match coarse {
                true => vec![(0.35, 0.7, 95.0 * n), (0.7, 1.4, 5.0 * n)],
                false => vec![(0.35, 0.5, 95.0 * n), (0.7, 1.0, 5.0 * n)],
            };
            (tick * STEP, 100.0 * n, buckets)
        };
        Series::of_native(&labels, &(0..=8).map(sample).collect::<Vec<_>>())
    };
    for halved in [false, true] {
        let samples = [pod("x-baseline-5d9c7-bbb24", false), pod("x-canary-5d9c7-bbb24", halved)].concat();
        let times = times(&inf(&samples), 1.0);
        let answers = [Answer::Series(samples), Answer::Series(times)];
        let (evidence, health) = trial.fold(beginning(0), &answers, 0, 8 * STEP);
        let judged = trial.judge(&evidence, &health);
        assert_ne!(judged.verdict, Verdict::Fail, "{judged:?}");
        assert_eq!(judged.reason == Cause::Malformed, halved, "{judged:?}");
        assert_eq!(judged.message.contains("x-canary-5d9c7-bbb24"), halved, "{judged:?}");
    }
}

#[test]
fn bounds_and_spread_are_learned_from_running_pods() {
    let lesson = |kpi: Kpi| {
        Lesson::over(&kpi, Track::Production, "shop", vec!["x-baseline".to_owned()], 600, 600, STEP)
    };
    assert_eq!((lesson(latency()).from(), lesson(latency()).block), (0, 60));
    let samples = |rows: [u64; 4], pods: usize| -> Samples {
        let pod = |number| {
            let mut samples = histogram(
                &format!("x-baseline-5d9c7-{}", suffix(number)),
                &[vec![[0; 4]], vec![rows; 10]].concat(),
            );
            for series in &mut samples {
                for (index, point) in series.points.iter_mut().enumerate() {
                    point.0 = index as Tick * 60;
                }
            }
            samples
        };
        (0..pods).flat_map(pod).collect()
    };
    for (name, rows, pods, bounds, learned_pods) in [
        // 40 % above 0.1, 7 % above 0.25, 2 % above 1.0.
        ("all three", [600, 330, 50, 20], 4, vec!["0.1", "0.25", "1.0"], 4),
        ("one for two of them", [600, 330, 65, 5], 4, vec!["0.1", "0.25"], 4),
        // One bound for all: the next larger one shows what is rare.
        ("one for all", [700, 295, 5, 0], 4, vec!["0.1", "0.25"], 4),
        ("nearly all exceed it", [50, 945, 5, 0], 4, vec!["0.1", "0.25"], 4),
        ("none is exceeded", [1000, 0, 0, 0], 4, vec!["0.1", "0.25"], 4),
        ("the largest there is", [0, 0, 0, 1000], 4, vec!["1.0"], 4),
        ("too few pods for a spread", [600, 330, 50, 20], 2, vec!["0.1", "0.25", "1.0"], 0),
    ] {
        let found = lesson(latency()).learn(&[Answer::Series(samples(rows, pods))]).unwrap().unwrap();
        assert_eq!(found.bounds, bounds, "{name}");
        let spread = if learned_pods > 0 { LEAST } else { CAUTIOUS };
        assert_eq!((found.pods, found.spread), (learned_pods, vec![spread; bounds.len()]), "{name}");
        assert_eq!((found.until, found.track), (600, Track::Production));
    }
    let found = lesson(latency()).learn(&[Answer::Series(samples([600, 330, 50, 20], 4))]).unwrap().unwrap();
    assert!((found.requests - 1000.0 / 60.0).abs() < 1e-3, "{found:?}");
    assert_eq!(found.shares, [0.4, 0.07, 0.02]);
    // Without a request there is no telling what is slow.
    assert_eq!(lesson(latency()).learn(&[Answer::Series(samples([0; 4], 4))]), Ok(None));
    assert_eq!(lesson(latency()).learn(&[Answer::Series(vec![])]), Ok(None));
    for (answer, health) in [
        (Answer::Down("away".to_owned()), AnswerHealth::Down("away".to_owned())),
        (Answer::Malformed("odd".to_owned()), AnswerHealth::Malformed("odd".to_owned())),
    ] {
        assert_eq!(lesson(latency()).learn(&[answer]), Err(health));
    }
}

/// Counters of pods over ten blocks of a minute: errors per block of each pod, of 10,000 requests.
fn blocks(pods: &[Vec<u64>]) -> [Answer; 2] {
    let series = |number: usize, values: Vec<f64>| {
        let mut series = counter(&format!("x-baseline-5d9c7-{}", suffix(number)), &some(&values));
        for (index, point) in series.points.iter_mut().enumerate() {
            point.0 = index as Tick * 60;
        }
        series
    };
    let sums = |row: &[u64]| {
        let grown = row.iter().scan(0, |sum, value| {
            *sum += value;
            Some(*sum as f64)
        });
        std::iter::once(0.0).chain(grown).collect::<Vec<_>>()
    };
    let errors = pods.iter().enumerate().map(|(number, row)| series(number, sums(row))).collect();
    let total = (0..pods.len()).map(|number| series(number, sums(&[10_000; 10]))).collect();
    [Answer::Series(errors), Answer::Series(total)]
}

#[test]
fn unlike_pods_widen_what_is_called_equal() {
    let lesson = Lesson::over(
        &ratio(1.25, 0.001),
        Track::Staging,
        "shop",
        vec!["x-baseline".to_owned()],
        600,
        600,
        STEP,
    );
    let learn = |pods: &[Vec<u64>]| lesson.learn(&blocks(pods)).unwrap().unwrap();
    // Rates that are alike but for counting, and none at all: the least spread.
    for rate in [0, 50] {
        let found = learn(&[vec![rate; 10], vec![rate; 10], vec![rate; 10], vec![rate; 10]]);
        assert_eq!((found.pods, found.spread[0]), (4, LEAST), "{rate}");
    }
    // Errors of 60, 100 and 140 in each block: (60-100)² and (140-100)² in 10 blocks, less what counting explains.
    let found = learn(&[vec![60; 10], vec![100; 10], vec![140; 10]]);
    let c = 2.0 / 3.0;
    let v = 100.0 * (1.0 - found.shares[0]);
    let chance = f64::sqrt(30.0 * (2.0 * v * v + v));
    let expected = f64::sqrt((10.0 * (2.0 * 1600.0 - c * 3.0 * v) - chance) / (c * 30.0 * v * v));
    assert!((found.spread[0] - expected).abs() < 1e-4, "{} {expected}", found.spread[0]);
    // Never more than the cautious end, and that where pods are too few.
    assert_eq!(learn(&[vec![1; 10], vec![100; 10], vec![900; 10]]).spread, [CAUTIOUS]);
    assert_eq!(learn(&[vec![50; 10], vec![50; 10]]).pods, 0);
    assert_eq!(learn(&[vec![50; 10], vec![50; 10]]).spread, [CAUTIOUS]);
    assert_eq!(learn(&[]).pods, 0);
}

#[test]
fn what_was_taken_cautiously_is_replaced_once_the_past_is_long_enough() {
    let over = |until: Tick| {
        Lesson::over(
            &ratio(1.25, 0.001),
            Track::Production,
            "shop",
            vec!["x-baseline".to_owned()],
            until,
            600,
            STEP,
        )
    };
    let begun = over(600).learn(&blocks(&[vec![50; 10], vec![50; 10]])).unwrap().unwrap();
    assert_eq!((begun.pods, begun.until, begun.cautious_until), (0, 600, None));
    let later = |pods: &[Vec<u64>]| {
        let lesson = Lesson { begun: Some(begun.clone()), ..over(600) };
        lesson.learn(&blocks(pods)).unwrap()
    };
    assert_eq!(later(&[vec![50; 10], vec![50; 10]]), None);
    let found = later(&[vec![50; 10], vec![50; 10], vec![50; 10]]).unwrap();
    assert_eq!((found.pods, found.until, found.cautious_until), (3, 600, Some(600)));
    // Until then it is judged as if nothing were known, and from then on as what is known has it.
    let (errors, total) = super::grown(&vec![[20, 500, 5, 500]; 8]);
    let fold = |preflight: Preflight| {
        let trial = with(ratio(1.25, 0.001), arms(1, 1), preflight);
        trial.fold(beginning(0), &super::answers(&errors, &total), 0, 8 * STEP).0.shares[0].peak
    };
    let known = learned(3, &[LEAST], &[]);
    let until = |tick: i64| Preflight { cautious_until: Some(tick * STEP), ..known.clone() };
    assert_eq!(fold(until(0)), fold(known.clone()));
    assert_eq!(fold(until(8)), fold(learned(0, &[CAUTIOUS], &[])));
    assert!(fold(until(8)) < fold(until(4)) && fold(until(4)) < fold(until(0)));
}

/// One value per pod and tick, from tick 1 on.
fn values(pods: &[(&str, Vec<f64>)]) -> Answer {
    let series = |(pod, values): &(&str, Vec<f64>)| {
        let mut points = vec![Some(values[0])];
        points.extend(some(values));
        labelled(&[("pod", pod)], &points)
    };
    Answer::Series(pods.iter().map(series).collect())
}

/// Pods of both arms with these levels, each the same at every tick but for a small wave.
fn level(canary: &[f64], baseline: &[f64], ticks: usize) -> Answer {
    let wave = |level: f64| (0..ticks).map(|tick| level * (1.0 + 0.01 * (tick as f64).sin())).collect();
    let names = |arm: &str, levels: &[f64]| -> Vec<(String, Vec<f64>)> {
        levels
            .iter()
            .enumerate()
            .map(|(n, level)| (format!("x-{arm}-5d9c7-{}", suffix(n)), wave(*level)))
            .collect()
    };
    let pods = [names("canary", canary), names("baseline", baseline)].concat();
    values(&pods.iter().map(|(name, values)| (name.as_str(), values.clone())).collect::<Vec<_>>())
}

#[test]
fn a_gauge_is_judged_by_its_pods() {
    let eight = learned(8, &[0.05, 5.0], &[]);
    let nothing = learned(0, &[], &[]);
    let base = [100.0, 104.0, 97.0, 101.0];
    let times = |factor: f64| base.map(|level| level * factor);
    let lower = Direction::LowerIsBetter;
    // Name, direction, canary, baseline, what was learned, verdict and reason.
    type Case = (&'static str, Direction, Vec<f64>, Vec<f64>, Preflight, Verdict, Cause);
    let cases: Vec<Case> = vec![
        ("equal", lower, times(1.0).into(), base.into(), eight.clone(), Verdict::Pass, Cause::Judged),
        (
            "within the tolerance",
            lower,
            times(1.04).into(),
            base.into(),
            eight.clone(),
            Verdict::Pass,
            Cause::Judged,
        ),
        ("half more", lower, times(1.5).into(), base.into(), eight.clone(), Verdict::Fail, Cause::Judged),
        ("half less", lower, times(0.5).into(), base.into(), eight.clone(), Verdict::Pass, Cause::Judged),
        (
            "half less of what should be more",
            Direction::HigherIsBetter,
            times(0.5).into(),
            base.into(),
            eight.clone(),
            Verdict::Fail,
            Cause::Judged,
        ),
        (
            "one pod, twice as much",
            lower,
            vec![205.0],
            vec![100.0],
            eight.clone(),
            Verdict::Fail,
            Cause::Judged,
        ),
        (
            "one pod, a tenth more",
            lower,
            vec![110.0],
            vec![100.0],
            eight.clone(),
            Verdict::Pass,
            Cause::Judged,
        ),
        (
            "zero is compared plainly",
            lower,
            vec![60.0, 60.0],
            vec![0.0, 0.0],
            eight,
            Verdict::Fail,
            Cause::Judged,
        ),
        (
            "a count that is always the same",
            lower,
            vec![1.0],
            vec![1.0; 6],
            nothing.clone(),
            Verdict::Pass,
            Cause::Judged,
        ),
        (
            "too few pods",
            lower,
            vec![900.0],
            vec![100.0],
            nothing.clone(),
            Verdict::Inconclusive,
            Cause::NeedsPods,
        ),
        (
            "enough pods of the baseline",
            lower,
            vec![300.0],
            vec![100.0, 104.0, 97.0, 101.0, 99.0, 103.0],
            nothing,
            Verdict::Fail,
            Cause::Judged,
        ),
    ];
    for (name, direction, canary, baseline, preflight, verdict, reason) in cases {
        let arms = arms(canary.len() as i32, baseline.len() as i32);
        let trial = with(gauge(direction), arms, preflight);
        let answers = [level(&canary, &baseline, 8)];
        let (evidence, health) = trial.fold(Evidence::default(), &answers, 0, 8 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!((status.verdict, status.reason), (verdict, reason), "{name}: {}", status.message);
        assert_eq!((evidence.fresh_ticks, &health), (8, &AnswerHealth::Good), "{name}");
        // Three samples are no mean yet.
        let (early, health) = trial.fold(Evidence::default(), &answers, 0, 3 * STEP);
        assert_eq!(trial.judge(&early, &health).verdict, Verdict::Inconclusive, "{name}");
    }
}

#[test]
fn a_leak_is_found_by_its_slope_though_the_levels_are_equal() {
    let ticks = 64;
    let leaking = |from: f64, per_hour: f64, number: usize| -> Vec<f64> {
        let noise = |tick: usize| 1.0 + 0.004 * ((tick * 7 + number * 13) as f64).sin();
        (0..ticks).map(|t| from * (per_hour * (t as f64) * STEP as f64 / 3600.0).exp() * noise(t)).collect()
    };
    let run = |growth: f64| {
        let mut pods = vec![];
        for number in 0..5 {
            // The leaking pods begin lower, so that their means are no higher.
            pods.push((format!("x-canary-5d9c7-{}", suffix(number)), leaking(85.0, growth, number)));
            pods.push((format!("x-baseline-5d9c7-{}", suffix(number)), leaking(100.0, 0.02, number + 10)));
        }
        let pods: Vec<_> = pods.iter().map(|(name, values)| (name.as_str(), values.clone())).collect();
        let trial = with(gauge(Direction::LowerIsBetter), arms(5, 5), learned(8, &[0.05, 5.0], &[]));
        let (evidence, health) = trial.fold(Evidence::default(), &[values(&pods)], 0, ticks as i64 * STEP);
        trial.judge(&evidence, &health)
    };
    assert_eq!(run(0.02).verdict, Verdict::Pass);
    assert_eq!(run(1.0).verdict, Verdict::Fail, "{}", run(1.0).message);
}

#[test]
fn pods_that_all_show_one_number_are_no_proof_that_another_never_comes() {
    let step = |at: usize, ticks: usize, from: f64, to: f64| -> Vec<f64> {
        (0..ticks).map(|tick| if tick < at { from } else { to }).collect()
    };
    // A canary pod's values, those of every baseline pod, and whether the canary is worse.
    for (name, canary, base, pods, fails) in [
        ("one waits, once", step(3, 4, 0.0, 1.0), 0.0, 9, false),
        ("one waits from the middle on", step(4, 8, 0.0, 1.0), 0.0, 9, false),
        ("one waits all the time", step(0, 4, 0.0, 1.0), 0.0, 9, true),
        ("a thread more in the middle", step(16, 32, 8.0, 9.0), 8.0, 4, false),
        ("a thread more in the middle, beside more pods", step(16, 32, 8.0, 9.0), 8.0, 10, false),
        ("five times as many threads", step(0, 8, 8.0, 40.0), 8.0, 9, true),
    ] {
        let ticks = canary.len();
        let names: Vec<_> = (0..pods).map(|number| format!("x-baseline-5d9c7-{}", suffix(number))).collect();
        let mut series = vec![("x-canary-5d9c7-bbb22", canary)];
        series.extend(names.iter().map(|name| (name.as_str(), vec![base; ticks])));
        let preflight = learned(9, &[CAUTIOUS, 0.0], &[]);
        let preflight = if base > 0.0 { learned(9, &[0.05, 0.05 * base], &[]) } else { preflight };
        let trial = Trial {
            bake: ticks as i64,
            ..with(gauge(Direction::LowerIsBetter), arms(1, pods as i32), preflight)
        };
        let (evidence, health) = trial.fold(beginning(0), &[values(&series)], 0, ticks as i64 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!(status.verdict == Verdict::Fail, fails, "{name}: {}", status.message);
    }
}

#[test]
fn a_gauge_that_should_be_high_tells_ratios_below_one() {
    let trial = with(gauge(Direction::HigherIsBetter), arms(4, 4), learned(8, &[0.05, 5.0], &[]));
    let (evidence, health) = trial.fold(beginning(0), &[level(&[100.0; 4], &[100.0; 4], 8)], 0, 8 * STEP);
    let status = trial.judge(&evidence, &health);
    assert_eq!((status.tolerated, status.doubling_found_in), (Some(0.952381), None));
    assert!(status.detectable.is_some_and(|ratio| (0.5..0.95).contains(&ratio)), "{:?}", status.detectable);
}

#[test]
fn a_tick_whose_values_cannot_be_told_apart_is_passed_over() {
    let trial = with(gauge(Direction::LowerIsBetter), arms(2, 2), learned(8, &[0.05, 5.0], &[]));
    let Answer::Series(mut samples) = level(&[160.0, 150.0], &[100.0, 104.0], 8) else { unreachable!() };
    // One pod's container starts anew at tick 3 under another label, and its old series is given once more.
    let mut old = labelled(&[("pod", "x-canary-5d9c7-bbb22"), ("id", "old")], &some(&[160.0; 4]));
    let new = samples.iter_mut().find(|series| series.pod == "x-canary-5d9c7-bbb22").unwrap();
    old.points.retain(|(time, _)| *time <= 3 * STEP);
    new.points.retain(|(time, _)| *time >= 3 * STEP);
    samples.push(old);
    let answers = [Answer::Series(samples)];
    let (whole, health) = trial.fold(beginning(0), &answers, 0, 8 * STEP);
    assert_eq!((whole.fresh_ticks, health), (7, AnswerHealth::Good));
    let (mut evidence, mut faults) = (beginning(0), vec![]);
    for tick in 1..=8 {
        let (next, health) = trial.fold(evidence, &answers, (tick - 1) * STEP, tick * STEP);
        evidence = trial.resumed(Some(next), 0);
        if matches!(health, AnswerHealth::Malformed(_)) {
            faults.push(tick);
        }
    }
    assert_eq!((evidence, faults), (whole, vec![3]));
}

#[test]
fn odd_values_of_a_gauge_have_a_name() {
    let nan = f64::NAN;
    let eight = learned(8, &[0.05, 5.0], &[]);
    let (canary, baseline) = ("x-canary-5d9c7-bbb24", "x-baseline-5d9c7-bbb24");
    let fine = vec![1.0; 8];
    let twice = Answer::Series(vec![
        labelled(&[("pod", canary), ("core", "0")], &some(&[1.0; 9])),
        labelled(&[("pod", canary), ("core", "1")], &some(&[1.0; 9])),
        labelled(&[("pod", baseline)], &some(&[1.0; 9])),
    ]);
    let podless = Answer::Series(vec![labelled(&[], &some(&[1.0; 9]))]);
    for (name, answer, verdict, reason, message) in [
        (
            "not a number, mostly",
            values(&[(canary, vec![1.0, nan, nan, nan, nan, nan, nan, nan]), (baseline, vec![nan; 8])]),
            Verdict::Inconclusive,
            Cause::NotANumber,
            "NaN or infinite",
        ),
        (
            "infinite now",
            values(&[(canary, [&fine[..7], &[f64::INFINITY]].concat()), (baseline, fine.clone())]),
            Verdict::Inconclusive,
            Cause::NotANumber,
            "NaN or infinite",
        ),
        (
            "nobody",
            Answer::Series(vec![]),
            Verdict::NoData,
            Cause::Missing,
            "no sample younger than 30 s of either",
        ),
        (
            "no canary",
            values(&[(baseline, fine.clone())]),
            Verdict::NoData,
            Cause::CanaryMissing,
            "of the canary's pods, though of the baseline's",
        ),
        (
            "no baseline",
            values(&[(canary, fine)]),
            Verdict::NoData,
            Cause::BaselineMissing,
            "of the baseline's pods, though of the canary's",
        ),
        ("two series of a pod", twice, Verdict::TelemetryDown, Cause::Malformed, "several series of one pod"),
        ("no label pod", podless, Verdict::TelemetryDown, Cause::Malformed, "without the label pod"),
    ] {
        let trial = with(gauge(Direction::LowerIsBetter), arms(1, 1), eight.clone());
        let (evidence, health) = trial.fold(Evidence::default(), &[answer], 0, 8 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!((status.verdict, status.reason), (verdict, reason), "{name}: {}", status.message);
        assert!(status.message.contains(message), "{name}: {}", status.message);
        assert!(
            status.message.contains("`memory_bytes{namespace=\"shop\",pod=~"),
            "{name}: {}",
            status.message
        );
        assert_eq!(evidence.last_tick, 8 * STEP);
    }
}

#[test]
fn after_a_restart_a_gauge_is_folded_again_from_its_beginning() {
    let trial = with(gauge(Direction::LowerIsBetter), arms(2, 2), learned(8, &[0.05, 5.0], &[]));
    let answers = [level(&[160.0, 150.0], &[100.0, 104.0], 8)];
    let from = beginning(0);
    let (whole, health) = trial.fold(from, &answers, 0, 8 * STEP);
    assert_eq!(trial.judge(&whole, &health).verdict, Verdict::Fail);
    let read: Evidence = serde_json::from_str(&serde_json::to_string(&whole).unwrap()).unwrap();
    assert_ne!(read, whole, "the sums over pods are not stored");
    let resumed = trial.resumed(Some(read), 0);
    // The alarm stands from the first moment.
    assert_eq!(trial.judge(&resumed, &AnswerHealth::Good).verdict, Verdict::Fail);
    assert_eq!(trial.fold(resumed, &answers, 0, 8 * STEP).0, whole);
    // What is in memory goes on, and what is of another kind or older than the beginning does not.
    assert_eq!(trial.resumed(Some(whole.clone()), 0), whole);
    let other = Trial { kpi: ratio(1.25, 0.001), ..trial.clone() };
    assert_eq!(other.resumed(Some(whole), 30), beginning(30));
}

#[test]
fn a_canary_that_gets_no_requests_any_more_is_idle() {
    let kpi = ratio(1.25, 0.001);
    let rows = |canary: u64, baseline: u64| {
        let row = |quiet: bool| if quiet { [0, canary, 0, baseline] } else { [1, 50, 1, 50] };
        (0..140).map(|tick| row(tick >= 100)).collect::<Vec<_>>()
    };
    for (canary, baseline, expected) in [
        (50, 50, Cause::Judged),
        (0, 50, Cause::CanaryIdle),
        (50, 0, Cause::BaselineIdle),
        // Both go quiet together: what was seen is still proof.
        (0, 0, Cause::Judged),
    ] {
        let (errors, total) = super::grown(&rows(canary, baseline));
        let trial = trial(kpi.clone(), arms(1, 1));
        let (evidence, health) =
            trial.fold(Evidence::default(), &super::answers(&errors, &total), 0, 140 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!(status.reason, expected, "{canary} {baseline}: {}", status.message);
    }
}

#[test]
fn a_bound_that_the_baseline_breaks_as_well_is_not_the_canarys_doing() {
    let trial = trial(threshold(Bound::Max(10.0), 3), arms(1, 1));
    let answer = |values: &[f64]| Answer::Series(vec![labelled(&[], &some(values))]);
    for (name, baseline, verdict, reason) in [
        ("the baseline is well", [1.0; 5], Verdict::Fail, Cause::Judged),
        ("so is the baseline's", [20.0; 5], Verdict::Inconclusive, Cause::BaselineUnhealthy),
        (
            "it was, but is no more",
            [20.0, 20.0, 20.0, 20.0, 1.0],
            Verdict::Inconclusive,
            Cause::NeedsEvidence,
        ),
    ] {
        let answers = [answer(&[1.0, 11.0, 11.0, 11.0, 11.0]), answer(&baseline)];
        let (evidence, health) = trial.fold(Evidence::default(), &answers, 0, 4 * STEP);
        let status = trial.judge(&evidence, &health);
        assert_eq!((status.verdict, status.reason), (verdict, reason), "{name}: {}", status.message);
    }
}

#[test]
fn what_a_stage_can_show_is_told_before_and_while_it_runs() {
    let rate =
        |share: f64, requests: f64| Preflight { shares: vec![share], requests, ..learned(8, &[LEAST], &[]) };
    // A day at a tenth of a request per second, an hour at one per minute, and ten minutes at 100 per second.
    for (preflight, seconds, requests, short, detectable) in [
        (rate(0.01, 0.1), 86_400, 8640.0, false, Some(2.0..3.0)),
        (rate(0.0, 1.0 / 60.0), 3600, 60.0, true, None),
        (rate(0.005, 100.0), 600, 60_000.0, false, Some(1.6..2.5)),
    ] {
        let trial = Trial { bake: seconds / STEP, ..with(ratio(1.25, 0.001), arms(1, 1), preflight) };
        let told = trial.foretold().unwrap();
        assert!((told.requests - requests).abs() <= 0.01 * requests, "{told:?}");
        assert_eq!((told.falls_short(), told.wanted), (short, 3000.0), "{told:?}");
        match (detectable, told.detectable) {
            (Some(range), Some(ratio)) => assert!(range.contains(&ratio), "{ratio}"),
            (None, found) => assert!(found.is_none_or(|ratio| ratio > 100.0), "{found:?}"),
            (Some(_), None) => panic!("{told:?}"),
        }
    }
    assert_eq!(with(ratio(1.25, 0.001), arms(1, 1), learned(0, &[CAUTIOUS], &[])).foretold(), None);

    let (errors, total) = super::grown(&vec![[5, 1000, 5, 1000]; 40]);
    let trial = Trial { bake: 400, ..with(ratio(1.25, 0.001), arms(1, 1), learned(8, &[LEAST], &[])) };
    let status = |ticks: i64| {
        let (evidence, health) =
            trial.fold(Evidence::default(), &super::answers(&errors, &total), 0, ticks * STEP);
        trial.judge(&evidence, &health)
    };
    let (early, late) = (status(4).detectable.unwrap(), status(40).detectable.unwrap());
    assert!((early - late).abs() < 0.1 * late, "{early} {late}");
    // A doubling at 5 errors a tick on each side, against a tolerance of 1.53: in tens of ticks.
    let seconds = status(40).doubling_found_in.unwrap().as_secs() as i64;
    assert!((10 * STEP..100 * STEP).contains(&seconds), "{seconds}");
    // What is tolerated is never found.
    let blind = Trial { preflight: None, ..trial };
    let (evidence, health) = blind.fold(Evidence::default(), &super::answers(&errors, &total), 0, 40 * STEP);
    assert_eq!(blind.judge(&evidence, &health).doubling_found_in, None);
}

proptest! {
    #[test]
    fn splitting_changes_no_bit_of_a_gauge_or_a_latency(
        levels in prop::collection::vec(prop::collection::vec(prop_oneof![9 => 0.5..200.0, 1 => Just(f64::NAN), 1 => Just(0.0)], 12), 4),
        rows in prop::collection::vec(prop::array::uniform4(0u64..50), 24),
        cuts in prop::collection::btree_set(1i64..12, 0..11),
    ) {
        let names = ["x-canary-5d9c7-bbb24", "x-canary-5d9c7-bbb25", "x-baseline-5d9c7-bbb24", "x-baseline-5d9c7-bbb25"];
        let pods: Vec<_> = names.iter().zip(&levels).map(|(name, values)| (*name, values.clone())).collect();
        let gauges = [values(&pods)];
        let histograms = [
            histogram(names[0], &[&[[0; 4]], &rows[..12]].concat()),
            histogram(names[2], &[&[[0; 4]], &rows[12..]].concat()),
        ]
        .concat();
        let trials = [
            (with(gauge(Direction::LowerIsBetter), arms(2, 2), learned(5, &[0.05, 1.0], &[])), gauges.to_vec()),
            (with(latency(), arms(2, 2), learned(5, &[LEAST, LEAST], &["0.25", "1.0"])), latency_answers(&histograms).to_vec()),
        ];
        for (trial, answers) in trials {
            let (whole, _) = trial.fold(beginning(0), &answers, 0, 12 * STEP);
            let (mut evidence, mut from) = (beginning(0), 0);
            for until in cuts.iter().copied().chain([12]).map(|tick| tick * STEP) {
                let part: Vec<_> = answers.iter().map(|answer| cut(answer, from, until)).collect();
                evidence = trial.fold(evidence, &part, from, until).0;
                from = until;
            }
            prop_assert_eq!(evidence, whole);
        }
    }
}

/// What Prometheus gives for a part of the range.
fn cut(answer: &Answer, from: Tick, until: Tick) -> Answer {
    let Answer::Series(series) = answer else { return answer.clone() };
    let cut = |series: &Series| Series {
        points: series.points.iter().copied().filter(|(time, _)| (from..=until).contains(time)).collect(),
        ..series.clone()
    };
    Answer::Series(series.iter().map(cut).filter(|series| !series.points.is_empty()).collect())
}
