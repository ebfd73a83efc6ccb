//! Judges a data set offline: the operator's own fold, tick by tick. Pure.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::{
    dataset::{Case, DataSet, compared},
    date,
};
use crate::{
    api::{Carry, Cause, KpiStatus, Numbers, Verdict},
    decision::judge::{Test, Tick, beginning},
};

/// What a data set shows.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Namespace and name of the rollout, where the data set has them.
    pub rollout: String,
    /// Name of the stage, where the data set has it.
    pub stage: String,
    /// Attempt at it.
    pub attempt: i32,
    /// The pods that were compared, in words.
    pub compared: String,
    /// Each KPI.
    pub kpis: Vec<Judged>,
}

/// What one KPI shows.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Judged {
    /// Name of the KPI.
    pub name: String,
    /// Log evidence at which it alarms, unrounded.
    pub alarm_at: f64,
    /// The tick at which it alarmed.
    pub alarmed: Option<Tick>,
    /// Whether it is only shown.
    pub observe_only: bool,
    /// Tick by tick.
    pub ticks: Vec<Round>,
    /// What is said after the last tick, with the whole evidence.
    pub result: KpiStatus,
    /// The numbers on which the operator decided.
    pub decided: Option<Numbers>,
    /// Whether these are the same.
    pub reproduced: Option<bool>,
}

/// One tick.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Round {
    /// Unix time in seconds.
    pub tick: Tick,
    /// The same as a date.
    pub time: String,
    /// Events and requests so far, of each share of requests that is compared.
    pub counts: Vec<Carry>,
    /// The canary's value so far.
    pub canary: Option<f64>,
    /// The baseline's.
    pub baseline: Option<f64>,
    /// Values in a row beyond a threshold.
    pub breaches: i32,
    /// Log evidence so far; from the alarm on, that of the alarm.
    pub log_evidence: Option<f64>,
    /// The verdict.
    pub verdict: Verdict,
    /// Why it is what it is.
    pub reason: Cause,
}

/// Judges the KPIs of these names, or all.
///
/// # Errors
/// When the data set cannot be judged.
pub fn run(set: &DataSet, names: &[String]) -> Result<Report> {
    Ok(Report {
        rollout: set.rollout.clone(),
        stage: set.stage.clone(),
        attempt: set.attempt,
        compared: compared(&set.arms),
        kpis: set.cases(names)?.iter().map(judge).collect(),
    })
}

fn judge(case: &Case) -> Judged {
    let Case { trial, from, until, .. } = case;
    let (from, until, step) = (*from, *until, trial.step);
    let mut evidence = beginning(from);
    let mut ticks = vec![];
    let mut alarmed = None;
    let mut result = trial.judge(&evidence, &crate::decision::judge::AnswerHealth::Good);
    for tick in (1..=(until - from) / step).map(|n| from + n * step) {
        // The first range is the longest.
        let (asked, _) = trial.ranges(&evidence, tick).next().unwrap_or((tick - step, tick));
        let (next, health) = trial.fold(evidence, &case.answers(asked, tick), asked, tick);
        result = trial.judge(&next, &health);
        evidence = next;
        if result.verdict == Verdict::Fail {
            alarmed = alarmed.or(Some(tick));
        }
        let Numbers { counts, canary, baseline, log_evidence, .. } = Numbers::from(&result);
        ticks.push(Round {
            tick,
            time: date(tick),
            counts,
            canary,
            baseline,
            breaches: evidence.breaches,
            log_evidence,
            verdict: result.verdict,
            reason: result.reason,
        });
    }
    let now = Numbers::from(&result);
    let reproduced = case.decided.as_ref().map(|then| {
        // What could not be read at the moment of the decision is no other evidence.
        let verdict = if unread(then) { then.verdict } else { now.verdict };
        Numbers { from: then.from, verdict, ..now } == *then
    });
    Judged {
        name: trial.kpi.name.clone(),
        alarm_at: trial.alarm_at,
        alarmed,
        observe_only: trial.kpi.observe_only,
        ticks,
        result,
        decided: case.decided.clone(),
        reproduced,
    }
}

impl Report {
    /// Whether a KPI that may act fails.
    pub fn fails(&self) -> bool {
        self.kpis.iter().any(|kpi| !kpi.observe_only && kpi.result.verdict == Verdict::Fail)
    }

    /// As tables.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let stage = match self.stage.as_str() {
            "" => String::new(),
            stage => format!("{} stage {stage}, attempt {}: ", self.rollout, self.attempt),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{stage}{}", self.compared);
        for kpi in &self.kpis {
            let _ = writeln!(text, "\n{}\n{}", kpi.name, kpi.table());
        }
        text
    }
}

impl Judged {
    fn table(&self) -> String {
        let arm = |round: &Round, value: Option<f64>, of: fn(&Carry) -> crate::api::Counts| match &round
            .counts[..]
        {
            [] => value.map_or("-".to_owned(), |value| value.to_string()),
            counts => {
                let events: Vec<_> =
                    counts.iter().map(|counts| format!("{:.0}", of(counts).events)).collect();
                format!("{} of {:.0}", events.join(" | "), of(&counts[0]).total)
            }
        };
        let head = ["TIME", "CANARY", "BASELINE", "EVIDENCE", "ALARM AT", "VERDICT"].map(str::to_owned);
        let rows = self.ticks.iter().map(|round| {
            let (evidence, alarm) = match round.log_evidence {
                Some(evidence) => (format!("{evidence:.3}"), format!("{:.3}", self.alarm_at)),
                None => (format!("{} in a row", round.breaches), "-".to_owned()),
            };
            [
                round.time.clone(),
                arm(round, round.canary, |counts| counts.canary),
                arm(round, round.baseline, |counts| counts.baseline),
                evidence,
                alarm,
                format!("{:?} ({:?})", round.verdict, round.reason),
            ]
        });
        let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for row in &rows {
            let line: Vec<_> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let _ = writeln!(text, "  {}", line.join("  ").trim_end());
        }
        let at = self.alarmed.map(|tick| format!(" since {}", date(tick))).unwrap_or_default();
        let _ = write!(text, "  {:?}{at}: {}", self.result.verdict, self.result.message);
        match (self.reproduced, &self.decided) {
            (Some(true), then) => {
                text.push_str("\n  the operator decided on the same numbers");
                if then.as_ref().is_some_and(unread) {
                    text.push_str(", and could not read this KPI at that moment");
                }
            }
            (Some(false), Some(then)) => {
                let evidence =
                    then.log_evidence.map(|evidence| format!(", evidence {evidence}")).unwrap_or_default();
                let _ = write!(
                    text,
                    "\n  the operator decided on other numbers: {:?}{evidence}; its specification, or what Prometheus holds, has changed since",
                    then.verdict
                );
            }
            _ => {}
        }
        text
    }
}

/// Whether the operator could not read a KPI when it decided.
fn unread(then: &Numbers) -> bool {
    matches!(then.verdict, Verdict::TelemetryDown | Verdict::NoData)
}

/// What kind of test a KPI is, as the custom resource has it.
pub fn kind(test: &Test) -> &'static str {
    match test {
        Test::ErrorRatio { .. } => "errorRatio",
        Test::Latency { .. } => "latency",
        Test::Gauge { .. } => "gauge",
        Test::Threshold { .. } => "threshold",
    }
}
