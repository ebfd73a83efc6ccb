//! An absolute bound on a single value: an alarm is a number of values in a row beyond it. Pure.
//!
//! A tick at which the baseline is beyond the bound as well tells nothing of the canary, and holds.

use crate::api::{Cause, Evidence, Verdict};

use super::{AnswerHealth, Bound, Finding, Grid, Series, Trial, quote};

/// Folds the values of the ticks after `grid.from`. A tick without a value, with several, or with one that is not finite tells
/// nothing: it neither breaks a run of breaches nor lengthens it.
pub(super) fn fold(
    trial: &Trial,
    bound: Bound,
    consecutive: u32,
    mut evidence: Evidence,
    values: &[Series],
    reference: &[Series],
    grid: Grid,
) -> (Evidence, AnswerHealth) {
    let ticks = read(values, grid);
    let reference = read(reference, grid);
    let limit = i32::try_from(consecutive).unwrap_or(i32::MAX);
    let unwell =
        |index: usize| matches!(reference[index], Reading::Value(value) if bound.is_broken_by(value));
    for (index, reading) in ticks.iter().enumerate().skip(1) {
        let tick = grid.tick(index);
        if tick <= evidence.last_tick {
            continue;
        }
        evidence.last_tick = tick;
        let Reading::Value(value) = *reading else { continue };
        if !value.is_finite() {
            continue;
        }
        evidence.value = Some(value);
        let broken = bound.is_broken_by(value);
        if broken && unwell(index) {
            continue;
        }
        evidence.fresh_ticks += 1;
        // An alarm once reached stands.
        if evidence.breaches < limit {
            evidence.breaches = if broken { evidence.breaches + 1 } else { 0 };
        }
    }

    let query = || quote(&trial.queries().first().cloned().unwrap_or_default());
    let last = ticks.len() - 1;
    let health = match ticks[last] {
        Reading::Several => AnswerHealth::Malformed(format!(
            "the query gives several series, and a threshold needs one: aggregate them, for example with max(...), in {}",
            query()
        )),
        Reading::Value(value) if !value.is_finite() => AnswerHealth::Blind(
            Cause::NotANumber,
            format!(
                "the value is {value}, which is no measurement (often a division by zero requests) and is passed over, in {}",
                query()
            ),
        ),
        Reading::Value(value) if bound.is_broken_by(value) && unwell(last) => AnswerHealth::Blind(
            Cause::BaselineUnhealthy,
            format!(
                "the canary's value is {value}, and the baseline's is beyond the bound as well, for {}",
                query()
            ),
        ),
        Reading::Value(_) => AnswerHealth::Good,
        Reading::Nothing => AnswerHealth::NoData(
            if matches!(reference[last], Reading::Nothing) { Cause::Missing } else { Cause::CanaryMissing },
            format!(
                "Prometheus answers, but the query gives no value from the last {} s: check the metric's name, and that the pods are \
                 scraped that often, with the labels namespace and pod, in {}",
                2 * grid.step,
                query()
            ),
        ),
    };
    (evidence, health)
}

fn read(values: &[Series], grid: Grid) -> Vec<Reading> {
    let mut ticks = vec![Reading::Nothing; grid.len()];
    for series in values {
        for &(time, value) in &series.points {
            if let Some(index) = grid.index(time) {
                ticks[index] = match ticks[index] {
                    Reading::Nothing => Reading::Value(value),
                    Reading::Value(_) | Reading::Several => Reading::Several,
                };
            }
        }
    }
    ticks
}

/// What the evidence says.
pub(super) fn find(bound: Bound, consecutive: u32, evidence: &Evidence) -> Finding {
    let breaches = evidence.breaches.max(0);
    let (word, limit) = match bound {
        Bound::Max(limit) => ("above", limit),
        Bound::Min(limit) => ("below", limit),
    };
    let value = evidence
        .value
        .map_or_else(|| "no value yet".to_owned(), |value| format!("value {}", super::rounded(value)));
    let (verdict, reason, message) = if i64::from(breaches) >= i64::from(consecutive) {
        (
            Verdict::Fail,
            Cause::Judged,
            format!("{value}; was {word} {limit} for {consecutive} values in a row"),
        )
    } else if breaches > 0 {
        (
            Verdict::Inconclusive,
            Cause::NeedsEvidence,
            format!(
                "{value}, {word} {limit}: {breaches} of {consecutive} values in a row that make an alarm"
            ),
        )
    } else if evidence.fresh_ticks < i64::from(consecutive) {
        (
            Verdict::Inconclusive,
            Cause::NeedsEvidence,
            format!("{value}, not {word} {limit}; {} of {consecutive} values seen", evidence.fresh_ticks),
        )
    } else {
        (Verdict::Pass, Cause::Judged, format!("{value}, not {word} {limit}"))
    };
    Finding {
        verdict,
        reason,
        message,
        canary: evidence.value,
        baseline: None,
        change: None,
        log_evidence: None,
        tolerated: None,
        detectable: None,
        doubling_ticks: None,
    }
}

/// What one tick holds.
#[derive(Clone, Copy)]
enum Reading {
    Nothing,
    Value(f64),
    Several,
}

impl Bound {
    /// Whether a value is beyond the bound; the bound itself is allowed.
    fn is_broken_by(self, value: f64) -> bool {
        match self {
            Self::Max(max) => value > max,
            Self::Min(min) => value < min,
        }
    }
}
