//! An absolute bound on a single value: an alarm is a number of values in a row beyond it. Pure.

use crate::api::{Evidence, Verdict};

use super::{AnswerHealth, Arms, Bound, Finding, Grid, Kpi, Series, queries, quote};

/// Folds the values of the ticks after `grid.from`. A tick without a value, with several, or with one that is not finite tells
/// nothing: it neither breaks a run of breaches nor lengthens it.
pub(super) fn fold(
    kpi: &Kpi,
    arms: &Arms,
    bound: Bound,
    consecutive: u32,
    mut evidence: Evidence,
    values: &[Series],
    grid: Grid,
) -> (Evidence, AnswerHealth) {
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
    let limit = i32::try_from(consecutive).unwrap_or(i32::MAX);
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
        evidence.fresh_ticks += 1;
        evidence.value = Some(value);
        // An alarm once reached stands.
        if evidence.breaches < limit {
            evidence.breaches = if bound.is_broken_by(value) { evidence.breaches + 1 } else { 0 };
        }
    }

    let query = || quote(&queries(kpi, arms).pop().unwrap_or_default());
    let health = match ticks.last() {
        Some(Reading::Several) => AnswerHealth::Malformed(format!(
            "the query gives several series, and a threshold needs one: aggregate them, for example with max(...), in {}",
            query()
        )),
        Some(Reading::Value(value)) if !value.is_finite() => AnswerHealth::Blind(format!(
            "the value is {value}, which is no measurement (often a division by zero requests) and is passed over, in {}",
            query()
        )),
        Some(Reading::Value(_)) => AnswerHealth::Good,
        Some(Reading::Nothing) | None => AnswerHealth::NoData(format!(
            "Prometheus answers, but the query gives no value: check the metric's name, and that the pods are scraped with the \
             labels namespace and pod, in {}",
            query()
        )),
    };
    (evidence, health)
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
    let (verdict, message) = if i64::from(breaches) >= i64::from(consecutive) {
        (Verdict::Fail, format!("{value}; was {word} {limit} for {consecutive} values in a row"))
    } else if breaches > 0 {
        (
            Verdict::Inconclusive,
            format!(
                "{value}, {word} {limit}: {breaches} of {consecutive} values in a row that make an alarm"
            ),
        )
    } else if evidence.fresh_ticks < i64::from(consecutive) {
        (
            Verdict::Inconclusive,
            format!("{value}, not {word} {limit}; {} of {consecutive} values seen", evidence.fresh_ticks),
        )
    } else {
        (Verdict::Pass, format!("{value}, not {word} {limit}"))
    };
    Finding { verdict, message, canary: evidence.value, baseline: None }
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
