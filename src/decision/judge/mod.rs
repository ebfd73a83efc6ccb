//! Judgement: from samples on a tick grid to evidence, and from evidence to a verdict.
//!
//! Pure: no client, no clock. The same functions run live, after a restart and on recorded samples, and give the same evidence
//! to the last bit. May use [`crate::api`] for the types of the status, and nothing else of the operator.

mod query;
mod ratio;
mod samples;
mod threshold;

use crate::api::{self, Evidence, KpiStatus, Verdict};

pub use query::{excerpt, queries, quote};
pub use ratio::{HETEROGENEITY, alarm_at, effective_tolerance};
pub use samples::{Answer, Samples, Series};

/// Unix time in whole seconds; on the grid it is a multiple of the analysis interval.
pub type Tick = i64;

/// Most grid ticks that one query asks for and one fold folds.
pub const MAX_TICKS: i64 = 1000;

/// A KPI as it is judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Kpi {
    /// Name from the specification.
    pub name: String,
    /// The optimization that alone can move it; `None` for a guardrail shared by all.
    pub owner: Option<String>,
    /// Whether a stage can pass only with proof from this KPI.
    pub required: bool,
    /// What is read and which answer is a regression.
    pub test: Test,
}

/// What a KPI reads and which answer is a regression.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// Errors among requests, canary against baseline, on raw counters.
    ErrorRatio {
        /// PromQL of the error counters, with `$arm`.
        errors: String,
        /// PromQL of the counters of all requests, with `$arm`.
        total: String,
        /// Ratio of the two error rates that is still called equal; 1 or more.
        tolerance: f64,
        /// Smallest difference of the two error rates that matters, as a share of requests; more than 0.
        minimum_effect: f64,
    },
    /// An absolute bound on a single value.
    Threshold {
        /// PromQL of one value, with or without `$arm`.
        query: String,
        /// The bound.
        bound: Bound,
        /// Values in a row beyond the bound that make an alarm; 1 or more.
        consecutive: u32,
    },
}

/// An absolute bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// The value must not be above this.
    Max(f64),
    /// The value must not be below this.
    Min(f64),
}

/// The pods of one side of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arm {
    /// Name of the Deployment.
    pub deployment: String,
    /// Pods that the stage gives it.
    pub pods: i32,
}

/// The two sides of a comparison, in one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arms {
    /// Namespace of the pods.
    pub namespace: String,
    /// The pods with the optimizations on.
    pub canary: Arm,
    /// The pods without. Where there are none, error ratios cannot be judged; thresholds can.
    pub baseline: Option<Arm>,
}

/// What could be read, besides the evidence, from the answers to one round of queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerHealth {
    /// Samples of all pods that count.
    Good,
    /// As good, with a remark for the message.
    Remark(String),
    /// An answer that tells nothing at the last tick: stale samples, or a value that is no number.
    Blind(String),
    /// Prometheus answers, but holds nothing for these pods. Says which and what to check.
    NoData(String),
    /// Prometheus does not answer. The evidence is unchanged.
    Down(String),
    /// Prometheus answers in a form that cannot be judged. Says what to change. The evidence is unchanged.
    Malformed(String),
}

impl Kpi {
    /// Takes a KPI from the specification; `owner` is the optimization under which it stands.
    ///
    /// # Errors
    /// Says what is wrong and how to mend it. The API server refuses the same faults, so that this is a second line of defence.
    pub fn resolve(api: &api::Kpi, owner: Option<&str>) -> Result<Self, String> {
        let name = &api.name;
        let test = match (&api.error_ratio, &api.threshold) {
            (Some(ratio), None) => {
                for (field, query) in [("errors", &ratio.errors), ("total", &ratio.total)] {
                    if !query.contains(query::ARM) {
                        return Err(format!(
                            "KPI {name}: errorRatio.{field} must contain $arm, as in http_requests_total{{$arm}}; it is {query:?}"
                        ));
                    }
                }
                if !(1.0..=10.0).contains(&ratio.tolerance) {
                    return Err(format!(
                        "KPI {name}: errorRatio.tolerance must be from 1 to 10, not {}",
                        ratio.tolerance
                    ));
                }
                if !(0.00001..=0.5).contains(&ratio.minimum_effect) {
                    return Err(format!(
                        "KPI {name}: errorRatio.minimumEffect must be from 0.00001 to 0.5, not {}",
                        ratio.minimum_effect
                    ));
                }
                Test::ErrorRatio {
                    errors: ratio.errors.clone(),
                    total: ratio.total.clone(),
                    tolerance: ratio.tolerance,
                    minimum_effect: ratio.minimum_effect,
                }
            }
            (None, Some(threshold)) => {
                let bound = match (threshold.max, threshold.min) {
                    (Some(max), None) if max.is_finite() => Bound::Max(max),
                    (None, Some(min)) if min.is_finite() => Bound::Min(min),
                    _ => return Err(format!("KPI {name}: threshold needs exactly one finite max or min")),
                };
                let consecutive = u32::try_from(threshold.consecutive).unwrap_or(0);
                if consecutive == 0 {
                    return Err(format!("KPI {name}: threshold.consecutive must be 1 or more"));
                }
                if threshold.query.trim().is_empty() {
                    return Err(format!("KPI {name}: threshold.query is empty"));
                }
                Test::Threshold { query: threshold.query.clone(), bound, consecutive }
            }
            _ => return Err(format!("KPI {name} must be exactly one of errorRatio or threshold")),
        };
        Ok(Self { name: name.clone(), owner: owner.map(str::to_owned), required: api.required, test })
    }
}

impl Arm {
    /// Whether a pod belongs to this arm: its name is the Deployment's, then the hash of the ReplicaSet, then the pod's own
    /// suffix, and no more, so that `experts-canary-5d-x` is not taken for a pod of `experts`.
    pub fn owns(&self, pod: &str) -> bool {
        let part = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        pod.strip_prefix(self.deployment.as_str())
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.split_once('-'))
            .is_some_and(|(replica_set, suffix)| part(replica_set) && part(suffix))
    }
}

/// The last tick at or before `now` (Unix seconds) whose samples have settled.
///
/// A sample bears the time at which its scrape began and can be read once the scrape has ended, so that a tick asked for at once
/// might give other evidence than the same tick in a replay. One interval is waited, 10 s (the usual scrape timeout) at most.
pub fn settled(now: i64, step: i64) -> Tick {
    let step = step.max(1);
    (now - settling(step)).div_euclid(step) * step
}

/// When the tick after [`settled`] will have settled, in Unix seconds.
pub fn settles_next(now: i64, step: i64) -> i64 {
    let step = step.max(1);
    settled(now, step) + step + settling(step)
}

fn settling(step: i64) -> i64 {
    step.min(10)
}

/// Cuts the ticks after `from`, up to `until`, into ranges for one query each: `(base, end)`, both asked for, where the base is
/// the end of the range before. The more pods, the shorter, so that an answer stays far below the bound on its size.
///
/// Where no tick is new the last one is asked for again: it adds nothing to the evidence, but a KPI that was blind at that tick
/// must not pass because nobody looked.
pub fn chunks(arms: &Arms, from: Tick, until: Tick, step: i64) -> impl Iterator<Item = (Tick, Tick)> {
    let pods =
        i64::from(arms.canary.pods.max(1)) + arms.baseline.as_ref().map_or(0, |arm| arm.pods.max(1).into());
    let step = step.max(1);
    let longest = (20_000 / pods).clamp(10, MAX_TICKS - 1);
    let ticks = ((until - from) / step).max(0);
    let count = (ticks + longest - 1) / longest;
    (0..count.max(1)).map(move |chunk| {
        let end = ((chunk + 1) * longest).min(ticks);
        (from + chunk * longest * step, from + end * step)
    })
}

/// Folds the answers to [`queries`], asked for the ticks `from` to `until`, into the evidence.
///
/// `from` is the base of the first difference and is not judged itself; ticks that the evidence already holds are passed over, so
/// that an answer that is read twice counts once. One call folds [`MAX_TICKS`] at most. Splitting a range at any tick gives the
/// same evidence to the last bit. When an answer is missing or malformed the evidence comes back as it was, and
/// the next call can begin at the same tick: nothing is lost by a Prometheus that was away.
///
/// To start afresh, give an evidence with `last_tick` and nothing else.
pub fn fold(
    kpi: &Kpi,
    arms: &Arms,
    evidence: Evidence,
    answers: &[Answer],
    from: Tick,
    until: Tick,
    step: i64,
) -> (Evidence, AnswerHealth) {
    let mut read = Vec::with_capacity(answers.len());
    for answer in answers {
        match answer {
            Answer::Series(series) => read.push(series.as_slice()),
            Answer::Down(why) => return (evidence, AnswerHealth::Down(why.clone())),
            Answer::Malformed(why) => return (evidence, AnswerHealth::Malformed(why.clone())),
        }
    }
    let step = step.max(1);
    let grid = Grid { from, step, ticks: ((until - from) / step).clamp(0, MAX_TICKS) };
    match (&kpi.test, arms.baseline.as_ref(), read.as_slice()) {
        (Test::ErrorRatio { tolerance, minimum_effect, .. }, Some(baseline), &[errors, total, times]) => {
            let ratio =
                ratio::Ratio { kpi, arms, baseline, tolerance: *tolerance, minimum_effect: *minimum_effect };
            ratio.fold(evidence, &ratio::Answers { errors, total, times }, grid)
        }
        (Test::ErrorRatio { .. }, None, _) => (
            Evidence { last_tick: evidence.last_tick.max(grid.last()), ..evidence },
            AnswerHealth::Blind("there is no baseline to compare with".to_owned()),
        ),
        (Test::Threshold { bound, consecutive, .. }, _, &[values]) => {
            threshold::fold(kpi, arms, *bound, *consecutive, evidence, values, grid)
        }
        _ => (
            evidence,
            AnswerHealth::Malformed(format!(
                "KPI {} got {} answers, not one for each of its queries",
                kpi.name,
                read.len()
            )),
        ),
    }
}

/// The verdict on one KPI, with its reasons in words and numbers. `alarm_at` is ln(1/alpha), from [`alarm_at`].
///
/// An alarm once reached stands, also when Prometheus has gone away since. Otherwise what cannot be seen does not pass.
pub fn judge(kpi: &Kpi, arms: &Arms, evidence: &Evidence, health: &AnswerHealth, alarm_at: f64) -> KpiStatus {
    let finding = match &kpi.test {
        Test::ErrorRatio { minimum_effect, .. } => ratio::find(arms, *minimum_effect, evidence, alarm_at),
        Test::Threshold { bound, consecutive, .. } => threshold::find(*bound, *consecutive, evidence),
    };
    let (verdict, message) = match (finding.verdict, health) {
        (verdict, AnswerHealth::Good) => (verdict, finding.message),
        (
            verdict @ Verdict::Fail,
            AnswerHealth::Remark(why) | AnswerHealth::Blind(why) | AnswerHealth::NoData(why),
        )
        | (verdict @ Verdict::Fail, AnswerHealth::Down(why) | AnswerHealth::Malformed(why))
        | (verdict, AnswerHealth::Remark(why)) => (verdict, format!("{}; {why}", finding.message)),
        (_, AnswerHealth::Blind(why)) => (Verdict::Inconclusive, why.clone()),
        (_, AnswerHealth::NoData(why)) => (Verdict::NoData, why.clone()),
        (_, AnswerHealth::Down(why) | AnswerHealth::Malformed(why)) => (Verdict::TelemetryDown, why.clone()),
    };
    let ratio = matches!(kpi.test, Test::ErrorRatio { .. });
    KpiStatus {
        name: kpi.name.clone(),
        owner: kpi.owner.clone(),
        verdict,
        message,
        canary: finding.canary.map(rounded),
        baseline: finding.baseline.map(rounded),
        log_evidence: ratio.then(|| rounded(ratio::log_evidence(evidence))),
        alarm_at: ratio.then(|| rounded(alarm_at)),
        evidence: Some(evidence.clone()),
    }
}

/// Bake time counted so far, in seconds: the fewest fresh ticks of any required KPI, times the interval.
///
/// Error ratios count where there is a required one, since only they say how old a sample is; otherwise thresholds. Where nothing
/// is required the KPI with the most fresh ticks counts: the clock then only shows that Prometheus holds data.
pub fn observed<'a>(kpis: impl IntoIterator<Item = (&'a Kpi, &'a Evidence)>, step: i64) -> i64 {
    let (mut ratios, mut thresholds, mut optional): (Option<i64>, Option<i64>, i64) = (None, None, 0);
    for (kpi, Evidence { fresh_ticks, .. }) in kpis {
        let fewest = match kpi.test {
            _ if !kpi.required => {
                optional = optional.max(*fresh_ticks);
                continue;
            }
            Test::ErrorRatio { .. } => &mut ratios,
            Test::Threshold { .. } => &mut thresholds,
        };
        *fewest = Some(fewest.map_or(*fresh_ticks, |fewest| fewest.min(*fresh_ticks)));
    }
    ratios.or(thresholds).unwrap_or(optional) * step
}

/// A stretch of ticks: `from`, the base, has index 0, and `ticks` ticks follow.
#[derive(Clone, Copy)]
struct Grid {
    from: Tick,
    step: i64,
    ticks: i64,
}

impl Grid {
    /// Position of a time on this stretch; `None` off the grid or outside.
    fn index(self, time: Tick) -> Option<usize> {
        let offset = time.checked_sub(self.from)?;
        (offset >= 0 && offset % self.step == 0 && offset / self.step <= self.ticks)
            .then_some((offset / self.step) as usize)
    }

    /// Positions on this stretch, the base included.
    fn len(self) -> usize {
        self.ticks as usize + 1
    }

    fn tick(self, index: usize) -> Tick {
        self.from + index as i64 * self.step
    }

    fn last(self) -> Tick {
        self.from + self.ticks * self.step
    }
}

/// What the evidence says, before the health of the answers is weighed.
struct Finding {
    verdict: Verdict,
    message: String,
    canary: Option<f64>,
    baseline: Option<f64>,
}

/// Six significant digits: enough for a reader, and a status that does not change in its last digit for nothing.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    // 12 digits after the point and no more: a smaller value is nothing to a reader.
    let digits = (5 - value.abs().log10().floor() as i32).clamp(0, 12);
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}
