//! One value per pod, canary against baseline: moderated t tests on the pods' means and on their slopes. Pure.
//!
//! Pods are the replicates: a hundred samples of one pod are one measurement, since what makes it differ from another pod stays.
//! How much pods differ is taken from the pre-flight and from the baseline's pods together.

use std::f64::consts::PI;

use crate::api::{Cause, Direction, Evidence, GaugeEvidence, GaugeSums, PodSums, Verdict};

use super::{
    AnswerHealth, Finding, Grid, Series, Tick, Trial,
    counters::{BASELINE, CANARY},
    eprocess::mostly_first,
    power::{self, EIGHTY, student_quantile, student_surprise},
    preflight::LEAST_GAUGE,
    quote,
};

/// Fresh ticks at the first look at the level; each later look waits twice as long.
const FIRST_LOOK: i64 = 4;
/// Fresh ticks at the first look at the slope, but for the end of a shorter bake: before, no slope that matters is told from noise.
const FIRST_SLOPE: i64 = 32;
/// Share of a KPI's probability that the looks at the level have; those at the slope have the rest.
const LEVEL: f64 = 0.75;
/// Growth per hour beyond the baseline's that is still called equal, on the log scale.
const SLOPE_TOLERANCE: f64 = 0.10;
/// Degrees of freedom without which no test is made.
const ENOUGH: f64 = 4.0;
/// Baseline pods without which slopes are not compared.
const SLOPE_PODS: usize = 3;
/// Samples of a pod that tell of its slope as much as one that is independent, since what comes one after another hangs together.
const HANG_TOGETHER: f64 = 4.0;
/// Samples of a pod that make a mean.
const SAMPLES: f64 = 4.0;

/// A gauge that is compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Compared<'a> {
    pub(super) trial: &'a Trial,
    pub(super) direction: Direction,
    /// Relative change for the worse that is called equal.
    pub(super) tolerance: f64,
    /// Pods of the baseline.
    pub(super) baseline: &'a super::Arm,
}

/// What the pods' means say.
struct Level {
    /// Mean of the arms' pods on the scale that is compared, canary and baseline.
    means: [f64; 2],
    pods: [f64; 2],
    /// Variance between pods, and its degrees of freedom.
    variance: f64,
    df: f64,
    /// Whether the plain values are compared, since their logarithms have no meaning.
    plain: bool,
}

/// Folds the ticks after `grid.from`.
pub(super) fn fold(
    gauge: &Compared<'_>,
    mut evidence: Evidence,
    values: &[Series],
    grid: Grid,
) -> (Evidence, AnswerHealth) {
    let trial = gauge.trial;
    let query = || quote(&trial.queries().pop().unwrap_or_default());
    let mut sorted: Vec<(&Series, usize)> = vec![];
    // Ticks whose values cannot be told apart, with the reason.
    let mut void = vec![None; grid.len()];
    for series in values {
        if series.pod.is_empty() {
            for index in series.points.iter().filter_map(|(time, _)| grid.index(*time)) {
                void[index] =
                    Some("a series without the label pod: keep it in the result, as in sum by (pod) (...)");
            }
        } else if trial.arms.canary.owns(&series.pod) {
            sorted.push((series, CANARY));
        } else if gauge.baseline.owns(&series.pod) {
            sorted.push((series, BASELINE));
        }
    }
    sorted.sort_by(|(a, _), (b, _)| a.key().cmp(&b.key()));
    for pod in sorted.chunk_by(|(a, _), (b, _)| a.pod == b.pod).filter(|pod| pod.len() > 1) {
        let mut seen = vec![false; grid.len()];
        for (time, _) in pod.iter().flat_map(|(series, _)| &series.points) {
            if let Some(index) = grid.index(*time)
                && std::mem::replace(&mut seen[index], true)
            {
                void[index] = Some("several series of one pod: aggregate them, as in sum by (pod) (...)");
            }
        }
    }
    let mut seen = evidence.gauge.take().unwrap_or_default();
    let mut sums =
        seen.sums.take().unwrap_or_else(|| Box::new(GaugeSums { from: grid.from, ..GaugeSums::default() }));
    let mut next: Vec<usize> = vec![0; sorted.len()];
    let (mut present, mut finite) = ([false; 2], [false; 2]);
    for (index, void) in void.iter().enumerate().skip(1) {
        let tick = grid.tick(index);
        if tick <= evidence.last_tick {
            continue;
        }
        evidence.last_tick = tick;
        (present, finite) = ([false; 2], [false; 2]);
        let now: Vec<Option<f64>> = sorted
            .iter()
            .zip(&mut next)
            .map(|((series, arm), next)| {
                while series.points.get(*next).is_some_and(|(time, _)| *time < tick) {
                    *next += 1;
                }
                let value = series.points.get(*next).filter(|(time, _)| *time == tick)?.1;
                present[*arm] = true;
                finite[*arm] |= value.is_finite();
                Some(value)
            })
            .collect();
        if void.is_some() || !(present[CANARY] && present[BASELINE]) {
            continue;
        }
        let whole = finite[CANARY] && finite[BASELINE];
        evidence.fresh_ticks += i64::from(whole);
        let time = (tick - sums.from) as f64 / 3600.0;
        for ((series, arm), value) in sorted.iter().zip(now) {
            let Some(value) = value else { continue };
            sums.dropped.1 += 1;
            if !value.is_finite() {
                sums.dropped.0 += 1;
            } else if whole {
                match sums.pods[*arm].get_mut(&series.pod) {
                    Some(pod) => count(pod, time, value),
                    None => {
                        let mut pod = PodSums::default();
                        count(&mut pod, time, value);
                        sums.pods[*arm].insert(series.pod.clone(), pod);
                    }
                }
            }
        }
        if whole && looks(evidence.fresh_ticks, trial.bake) {
            look(gauge, &sums, tick, evidence.fresh_ticks, &mut seen);
        }
    }
    let half_dropped = 2 * sums.dropped.0 > sums.dropped.1;
    seen.sums = Some(sums);
    evidence.gauge = Some(seen);
    let missing = |reason, which: &str| {
        AnswerHealth::NoData(
            reason,
            format!(
                "Prometheus answers, but holds no sample younger than {} s of {which}: check the metric's name, and that the pods are \
                 scraped that often, with the labels namespace and pod, in {}",
                2 * grid.step,
                query()
            ),
        )
    };
    // Where no tick was new, the last one is looked at once more.
    if grid.ticks == 0 {
        let last = |arm: usize, good: fn(f64) -> bool| {
            let of_arm = sorted.iter().filter(|(_, of)| *of == arm);
            of_arm.filter_map(|(series, _)| series.points.last()).any(|(_, value)| good(*value))
        };
        let both = |good| [CANARY, BASELINE].map(|arm| last(arm, good));
        (present, finite) = (both(|_| true), both(f64::is_finite));
    }
    if let Some(fault) = void[grid.len() - 1] {
        let why = format!("the query gives {fault}; the query is {}", query());
        return (evidence, AnswerHealth::Malformed(why));
    }
    let health = match present {
        [false, false] => missing(Cause::Missing, "either the canary's or the baseline's pods"),
        [false, true] => missing(Cause::CanaryMissing, "the canary's pods, though of the baseline's"),
        [true, false] => missing(Cause::BaselineMissing, "the baseline's pods, though of the canary's"),
        [true, true] if half_dropped || !(finite[CANARY] && finite[BASELINE]) => AnswerHealth::Blind(
            Cause::NotANumber,
            format!(
                "the value of a pod is NaN or infinite, which is no measurement (often a division by zero requests) and is passed over, in {}",
                query()
            ),
        ),
        _ => AnswerHealth::Good,
    };
    (evidence, health)
}

fn count(pod: &mut PodSums, t: f64, value: f64) {
    pod.n += 1.0;
    pod.plain += value;
    pod.plain_squares += value * value;
    if value > 0.0 {
        let y = value.ln();
        pod.y += y;
        pod.yy += y * y;
        pod.t += t;
        pod.tt += t * t;
        pod.ty += t * y;
    } else {
        pod.signed = true;
    }
}

/// Whether a look is due: at 4, 8, 16 and so on fresh ticks, and at the end of the bake.
fn looks(ticks: i64, bake: i64) -> bool {
    ticks >= FIRST_LOOK
        && (ticks % FIRST_LOOK == 0 && (ticks / FIRST_LOOK).count_ones() == 1 || ticks == bake)
}

/// ln of the share of a KPI's probability that look number `q` at the level has, from 1. The first has most of it: what makes pods
/// differ stays, so that a later look at the same pods tells little that is new.
fn level_share(q: i32) -> f64 {
    (LEVEL * mostly_first(q)).ln()
}

/// The same of a look at the slope: 6/(pi² q²) of the rest, since a slope is told the better the longer it lasts.
fn slope_share(q: i32) -> f64 {
    ((1.0 - LEVEL) * 6.0 / (PI * PI * f64::from(q).powi(2))).ln()
}

fn look(gauge: &Compared<'_>, sums: &GaugeSums, tick: Tick, ticks: i64, seen: &mut GaugeEvidence) {
    seen.looks += 1;
    if let Some(level) = level(gauge, sums, tick).filter(|level| level.df >= ENOUGH) {
        let t = (worse(gauge, &level) - tolerated(gauge, &level)) / error(&level);
        if t > 0.0 {
            seen.peak = seen.peak.max(student_surprise(t, level.df) + level_share(seen.looks));
        }
    }
    // The looks before the first at the slope, less the one at the end of a short bake.
    let bake_is_short = gauge.trial.bake < FIRST_SLOPE;
    let skipped = (FIRST_SLOPE / FIRST_LOOK).ilog2() as i32 - i32::from(bake_is_short);
    if (ticks >= FIRST_SLOPE || ticks == gauge.trial.bake)
        && let Some((t, df)) = slope(gauge, sums, ticks).filter(|(t, _)| *t > 0.0)
    {
        seen.peak = seen.peak.max(student_surprise(t, df) + slope_share((seen.looks - skipped).max(1)));
    }
}

/// How much worse the canary is, on the scale that is compared.
fn worse(gauge: &Compared<'_>, level: &Level) -> f64 {
    for_the_worse(gauge, level.means[CANARY] - level.means[BASELINE])
}

/// From a difference to how much worse that is, and back.
fn for_the_worse(gauge: &Compared<'_>, difference: f64) -> f64 {
    match gauge.direction {
        Direction::LowerIsBetter => difference,
        Direction::HigherIsBetter => -difference,
    }
}

fn tolerated(gauge: &Compared<'_>, level: &Level) -> f64 {
    if level.plain { gauge.tolerance * level.means[BASELINE].abs() } else { gauge.tolerance.ln_1p() }
}

/// Standard error of the difference of the arms' means.
fn error(level: &Level) -> f64 {
    (level.variance * (1.0 / level.pods[CANARY] + 1.0 / level.pods[BASELINE])).sqrt().max(f64::MIN_POSITIVE)
}

/// The pods' means, and how much pods differ: the pre-flight's variance and that of the baseline's pods, each by its degrees of
/// freedom. It is never less than what is taken for the least of any gauge, nor than what chance leaves in the mean of a canary pod
/// that varies in itself: pods that have all shown one number so far are no proof that another never comes.
fn level(gauge: &Compared<'_>, sums: &GaugeSums, tick: Tick) -> Option<Level> {
    let plain = sums.pods.iter().flat_map(|arm| arm.values()).any(|pod| pod.signed);
    let pods = |arm: usize| sums.pods[arm].values().filter(|pod| pod.n >= SAMPLES);
    let values = |arm: usize| -> Vec<f64> { pods(arm).map(|pod| moments(pod, plain).0).collect() };
    let [canary, baseline] = [values(CANARY), values(BASELINE)];
    if canary.is_empty() || baseline.is_empty() {
        return None;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let means = [mean(&canary), mean(&baseline)];
    let squares: f64 = baseline.iter().map(|value| (value - means[BASELINE]).powi(2)).sum();
    let (spread, d0) = if gauge.trial.knows(tick) { learned(gauge.trial, plain) } else { (0.0, 0.0) };
    let df = d0 + baseline.len() as f64 - 1.0;
    let learned = if df > 0.0 { (d0 * spread * spread + squares) / df } else { 0.0 };
    let scale = if plain { means[CANARY].abs().max(means[BASELINE].abs()) } else { 1.0 };
    let least = LEAST_GAUGE * scale;
    let own = pods(CANARY).map(|pod| moments(pod, plain).1).sum::<f64>() / canary.len() as f64;
    let variance = learned.max(least * least).max(own);
    Some(Level { means, pods: [canary.len() as f64, baseline.len() as f64], variance, df, plain })
}

/// The mean of a pod's samples, and its variance if they were independent but for a common rise: a pod that grows is no pod that varies.
fn moments(pod: &PodSums, plain: bool) -> (f64, f64) {
    if plain {
        let mean = pod.plain / pod.n;
        return (mean, (pod.plain_squares / pod.n - mean * mean).max(0.0) / (pod.n - 1.0).max(1.0));
    }
    (pod.y / pod.n, line(pod).map_or(0.0, |line| line.rest / pod.n))
}

/// A straight line through the logarithms of a pod's samples.
struct Line {
    slope: f64,
    /// Spread of the times about their mean.
    across: f64,
    /// Variance of the samples about the line.
    rest: f64,
}

/// None where all samples are of one time.
fn line(pod: &PodSums) -> Option<Line> {
    let (across, along) = (pod.tt - pod.t * pod.t / pod.n, pod.ty - pod.t * pod.y / pod.n);
    let rest = (pod.yy - pod.y * pod.y / pod.n - along * along / across).max(0.0) / (pod.n - 2.0).max(1.0);
    (across > 0.0).then(|| Line { slope: along / across, across, rest })
}

/// The spread between pods that the pre-flight has learned, and its degrees of freedom: none where it has learned nothing.
fn learned(trial: &Trial, plain: bool) -> (f64, f64) {
    match &trial.preflight {
        Some(preflight) if preflight.pods > 1 => (
            preflight.spread.get(usize::from(plain)).copied().unwrap_or_default(),
            f64::from(preflight.pods) - 1.0,
        ),
        _ => (0.0, 0.0),
    }
}

/// Student's t of the difference of the pods' slopes beyond what is tolerated, with its degrees of freedom: the baseline's alone. The
/// variance is that between these, and never less than that of the slope of a canary pod in itself: where no baseline pod has
/// changed at all, a single step of the canary's is not yet a leak.
fn slope(gauge: &Compared<'_>, sums: &GaugeSums, ticks: i64) -> Option<(f64, f64)> {
    // The slope of a pod that is half as old errs by a multiple of the others': their variance would not hold for it.
    let enough = SAMPLES.max(0.5 * ticks as f64);
    // Each with its variance by the residuals, if the samples were independent.
    let slopes = |arm: usize| -> Vec<(f64, f64)> {
        let pods = sums.pods[arm].values().filter(|pod| !pod.signed && pod.n >= enough);
        pods.filter_map(line).map(|line| (line.slope, line.rest / line.across)).collect()
    };
    let [canary, baseline] = [slopes(CANARY), slopes(BASELINE)];
    if canary.is_empty() || baseline.len() < SLOPE_PODS {
        return None;
    }
    let mean = |slopes: &[(f64, f64)]| {
        let (slope, own) = slopes.iter().fold((0.0, 0.0), |(a, b), (slope, own)| (a + slope, b + own));
        (slope / slopes.len() as f64, own / slopes.len() as f64)
    };
    let df = baseline.len() as f64 - 1.0;
    let ((ours, own), (middle, _)) = (mean(&canary), mean(&baseline));
    let between = baseline.iter().map(|(slope, _)| (slope - middle).powi(2)).sum::<f64>() / df;
    let variance = between.max(HANG_TOGETHER * own);
    let error = (variance * (1.0 / canary.len() as f64 + 1.0 / baseline.len() as f64)).sqrt();
    let difference = for_the_worse(gauge, ours - middle);
    Some(((difference - SLOPE_TOLERANCE) / error.max(f64::MIN_POSITIVE), df))
}

/// What the evidence says.
pub(super) fn find(gauge: &Compared<'_>, evidence: &Evidence) -> Finding {
    let trial = gauge.trial;
    let nothing = GaugeEvidence::default();
    let seen = evidence.gauge.as_ref().unwrap_or(&nothing);
    let level = seen.sums.as_ref().and_then(|sums| level(gauge, sums, evidence.last_tick));
    let shown = |arm: usize| {
        let level = level.as_ref()?;
        Some(if level.plain { level.means[arm] } else { level.means[arm].exp() })
    };
    let (canary, baseline) = (shown(CANARY), shown(BASELINE));
    let text = |value: Option<f64>| value.map_or_else(|| "no value yet".to_owned(), power_of_ten);
    let numbers = format!(
        "canary {} against baseline {}, evidence {:.1} of {:.1} needed",
        text(canary),
        text(baseline),
        seen.peak,
        trial.alarm_at
    );
    // What the stage's pods can ever give, whatever has been seen so far.
    let df = learned(trial, false).1 + f64::from(gauge.baseline.pods) - 1.0;
    let (verdict, reason, message) = if seen.peak >= trial.alarm_at {
        (Verdict::Fail, Cause::Judged, numbers)
    } else if df < ENOUGH {
        let why = format!(
            "{numbers}; advisory only: {} baseline pods{} cannot tell a change from the difference between any two pods",
            gauge.baseline.pods,
            if learned(trial, false).1 > 0.0 { " and the pre-flight's" } else { "" }
        );
        (Verdict::Inconclusive, Cause::NeedsPods, why)
    } else if level.as_ref().is_none_or(|level| level.df < ENOUGH) || seen.looks == 0 {
        (
            Verdict::Inconclusive,
            Cause::NeedsEvidence,
            format!("{numbers}; the first look is at {FIRST_LOOK} samples of each pod"),
        )
    } else {
        (Verdict::Pass, Cause::Judged, numbers)
    };
    // The smallest change that the first look finds: beyond the tolerance by the alarm's quantile, and by the error of the estimate.
    let detectable = level.as_ref().filter(|level| level.df >= ENOUGH).and_then(|level| {
        let quantile = student_quantile(trial.alarm_at - level_share(1), level.df);
        // The noncentrality at which Student's t exceeds its quantile so often (approximated; 0.80 to 0.81 from 4 degrees on): the
        // error is itself an estimate, which matters the more the fewer the degrees of freedom.
        let spread = (1.0 + quantile * quantile / (2.0 * level.df)).sqrt();
        let away = quantile * (1.0 - 0.25 / level.df) + EIGHTY * spread;
        let beyond = for_the_worse(gauge, tolerated(gauge, level) + away * error(level));
        let ratio = if level.plain { 1.0 + beyond / level.means[BASELINE].abs() } else { beyond.exp() };
        ratio.is_finite().then_some(ratio)
    });
    Finding {
        verdict,
        reason,
        message,
        canary,
        baseline,
        change: level.as_ref().and_then(|level| change(level, seen.sums.as_deref()?)),
        log_evidence: Some(seen.peak),
        tolerated: Some(match level.as_ref().is_some_and(|level| level.plain) {
            true => 1.0 + for_the_worse(gauge, gauge.tolerance),
            false => for_the_worse(gauge, gauge.tolerance.ln_1p()).exp(),
        }),
        detectable,
        // Of what had better be high, twice as much is no harm.
        doubling_ticks: detectable.filter(|ratio| (1.0..=2.0).contains(ratio)).map(|_| FIRST_LOOK as f64),
    }
}

/// The relative change with its interval: Student's t on the pods of both arms and the pre-flight's variance.
fn change(level: &Level, sums: &GaugeSums) -> Option<crate::api::Change> {
    // The canary's own pods count as well here: an estimate wants all there is, a test must not be led by what it tests.
    let canary: Vec<f64> = sums.pods[CANARY]
        .values()
        .filter(|pod| pod.n >= SAMPLES)
        .map(|pod| moments(pod, level.plain).0)
        .collect();
    let squares: f64 = canary.iter().map(|value| (value - level.means[CANARY]).powi(2)).sum();
    let df = level.df + level.pods[CANARY] - 1.0;
    if df < 1.0 {
        return None;
    }
    let variance = (level.variance * level.df.max(0.0) + squares) / df;
    let error = (variance * (1.0 / level.pods[CANARY] + 1.0 / level.pods[BASELINE])).sqrt();
    let half = student_quantile(-0.025_f64.ln(), df) * error;
    let difference = level.means[CANARY] - level.means[BASELINE];
    if !level.plain {
        return Some(power::interval(difference, half));
    }
    let base = level.means[BASELINE].abs();
    let relative = |value: f64| super::rounded(value / base);
    (base > 0.0).then(|| crate::api::Change {
        estimate: relative(difference),
        low: relative(difference - half),
        high: relative(difference + half),
    })
}

/// A value with a prefix for its size, such as `12.3M`.
fn power_of_ten(value: f64) -> String {
    let size = value.abs();
    let (divisor, prefix) = match size {
        _ if size >= 1e9 => (1e9, "G"),
        _ if size >= 1e6 => (1e6, "M"),
        _ if size >= 1e4 => (1e3, "k"),
        _ if size >= 1.0 || size == 0.0 => (1.0, ""),
        _ if size >= 1e-3 => (1e-3, "m"),
        _ => (1e-6, "µ"),
    };
    format!("{:.4}", value / divisor).trim_end_matches('0').trim_end_matches('.').to_owned() + prefix
}
