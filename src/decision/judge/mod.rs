//! Judgement: from samples on a tick grid to evidence, and from evidence to a verdict.
//!
//! Pure: no client, no clock. The same functions run live, after a restart and on recorded samples, and give the same evidence
//! to the last bit. May use [`crate::api`] for the types of the status, and nothing else of the operator.

mod counters;
mod eprocess;
mod gauge;
mod power;
mod preflight;
mod query;
mod samples;
mod share;
mod threshold;

use serde::{Deserialize, Serialize};

use counters::Counter;

use crate::api::{self, Cause, Change, Direction, Duration, Evidence, Expect, KpiStatus, Preflight, Verdict};

pub use eprocess::{Z, alarm_at, effective_tolerance};
pub use power::pooled;
pub use preflight::{CAUTIOUS, ENOUGH_PODS, LEAST, Lesson, beginning};
pub use query::{excerpt, quote};
pub use samples::{Answer, Bucket, NativePoint, Samples, Series};

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
    /// Whether it is only shown.
    pub observe_only: bool,
    /// Its part of the false-rollback probability, relative to the others'.
    pub weight: f64,
    /// Warm-up of its own.
    pub warm_up: Option<Duration>,
    /// The benefit that was promised.
    pub expect: Option<Expect>,
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
    /// Slow requests among all, canary against baseline, on the buckets of a histogram.
    Latency {
        /// PromQL of the histogram, with `$arm`.
        histogram: String,
        /// Ratio of the two shares that is still called equal; 1 or more.
        tolerance: f64,
        /// Smallest difference of the two shares above the lower bound that matters; more than 0.
        minimum_effect: f64,
    },
    /// One value per pod, canary against baseline.
    Gauge {
        /// PromQL of one series per pod, with `$arm`.
        query: String,
        /// Which way is better.
        direction: Direction,
        /// Relative change for the worse that is still called equal; 0 or more.
        tolerance: f64,
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    /// Name of the Deployment.
    pub deployment: String,
    /// Pods that the stage gives it.
    pub pods: i32,
}

/// The two sides of a comparison, in one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arms {
    /// Namespace of the pods.
    pub namespace: String,
    /// The pods with the optimizations on.
    pub canary: Arm,
    /// The pods without. Where there are none, error ratios cannot be judged; thresholds can.
    pub baseline: Option<Arm>,
}

/// One KPI in one attempt at a stage: all that is fixed before its first sample is looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// The KPI.
    pub kpi: Kpi,
    /// The pods that are compared.
    pub arms: Arms,
    /// What was learned of the KPI; absent for a threshold.
    pub preflight: Option<Preflight>,
    /// Log evidence at which the KPI alarms, from [`alarm_at`].
    pub alarm_at: f64,
    /// Spacing of the grid, in seconds.
    pub step: i64,
    /// How long a pod that begins in mid-stage is cold, in seconds: its latency is not counted until then.
    pub warm_up: i64,
    /// Ticks of the stage's bake.
    pub bake: i64,
}

/// What could be read, besides the evidence, from the answers to one round of queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerHealth {
    /// Samples of all pods that count.
    Good,
    /// As good, with a remark for the message.
    Remark(String),
    /// An answer that tells nothing at the last tick: stale samples, or a value that is no number.
    Blind(Cause, String),
    /// Prometheus answers, but holds nothing for these pods. Says which and what to check.
    NoData(Cause, String),
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
        let with_arm = |field: &str, query: &str| match query.contains(query::ARM) {
            true => Ok(query.to_owned()),
            false => Err(format!(
                "KPI {name}: {field} must contain $arm, as in http_requests_total{{$arm}}; it is {query:?}"
            )),
        };
        let within = |field: &str, value: f64, least: f64, most: f64| match (least..=most).contains(&value) {
            true => Ok(value),
            false => Err(format!("KPI {name}: {field} must be from {least} to {most}, not {value}")),
        };
        let test = match (&api.error_ratio, &api.latency, &api.gauge, &api.threshold) {
            (Some(ratio), None, None, None) => Test::ErrorRatio {
                errors: with_arm("errorRatio.errors", &ratio.errors)?,
                total: with_arm("errorRatio.total", &ratio.total)?,
                tolerance: within("errorRatio.tolerance", ratio.tolerance, 1.0, 10.0)?,
                minimum_effect: within("errorRatio.minimumEffect", ratio.minimum_effect, 0.00001, 0.5)?,
            },
            (None, Some(latency), None, None) => Test::Latency {
                histogram: with_arm("latency.histogram", &latency.histogram)?,
                tolerance: within("latency.tolerance", latency.tolerance, 1.0, 10.0)?,
                minimum_effect: within("latency.minimumEffect", latency.minimum_effect, 0.00001, 0.5)?,
            },
            (None, None, Some(gauge), None) => Test::Gauge {
                query: with_arm("gauge.query", &gauge.query)?,
                direction: gauge.direction,
                tolerance: within("gauge.tolerance", gauge.tolerance, 0.0, 10.0)?,
            },
            (None, None, None, Some(threshold)) => {
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
            _ => {
                return Err(format!(
                    "KPI {name} must be exactly one of errorRatio, latency, gauge or threshold"
                ));
            }
        };
        if matches!(test, Test::Threshold { .. }) && api.expect.is_some() {
            return Err(format!(
                "KPI {name}: expect needs a comparison with the baseline, which a threshold is not: use errorRatio, latency or gauge"
            ));
        }
        if let Some(expect) = &api.expect {
            within("expect.change", expect.change, -1.0, 10.0)?;
        }
        Ok(Self {
            name: name.clone(),
            owner: owner.map(str::to_owned),
            required: api.required && !api.observe_only,
            observe_only: api.observe_only,
            weight: within("alphaWeight", api.alpha_weight, 0.01, 100.0)?,
            warm_up: api.warm_up,
            expect: api.expect.clone(),
            test,
        })
    }

    /// Whether the KPI is a statistical test, which spends a part of the false-rollback probability, and not an absolute bound.
    pub fn is_tested(&self) -> bool {
        !matches!(self.test, Test::Threshold { .. })
    }

    /// Its share of the false-rollback probability: its weight among those of all KPIs that are tested and may act.
    pub fn share_among<'a>(&self, all: impl Iterator<Item = &'a Self>) -> f64 {
        let spending = all.filter(|kpi| kpi.is_tested() && !kpi.observe_only);
        self.weight / spending.map(|kpi| kpi.weight).sum::<f64>().max(self.weight)
    }
}

impl Arm {
    /// Whether a pod belongs to this arm: its name is the Deployment's, then the hash of the ReplicaSet, then the pod's own
    /// suffix of five, and no more, so that neither `experts-canary-5d9c7-x2x4z` is taken for a pod of `experts`, nor one of a
    /// StatefulSet `experts-redis`. Kubernetes makes hash and suffix of these letters and digits only
    /// (k8s.io/apimachinery/pkg/util/rand), so that they form no words.
    pub fn owns(&self, pod: &str) -> bool {
        let digit = |byte| matches!(byte, b'2' | b'4'..=b'9');
        let letter =
            |byte| matches!(byte, b'b'..=b'd' | b'f'..=b'h' | b'j'..=b'n' | b'p'..=b't' | b'v'..=b'x' | b'z');
        let safe = |text: &str| text.bytes().all(|byte| digit(byte) || letter(byte));
        pod.strip_prefix(self.deployment.as_str())
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.split_once('-'))
            .is_some_and(|(hash, suffix)| {
                (1..=10).contains(&hash.len()) && suffix.len() == 5 && safe(hash) && safe(suffix)
            })
    }
}

/// By what factor the odds of a slow request may be higher in a canary that has just warmed up, and for how many warm-ups more, after
/// which the logarithm of it has fallen by a factor of e. A cold start of 1.5 times the latency that decays by e within the warm-up
/// leaves 1.16 times the latency, and odds of 1.6 in the bench's histogram.
pub const YOUNG: f64 = 1.5;
/// See [`YOUNG`].
pub const YOUNG_FOR: f64 = 3.0;

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

impl Trial {
    /// The shares of requests that are compared.
    fn shares(&self) -> Vec<share::Share> {
        let learned = self.preflight.as_ref();
        let share = |kind: usize, tolerance: f64, minimum_effect: f64| share::Share {
            tolerance,
            minimum_effect,
            spread: learned.and_then(|known| known.spread.get(kind)).copied().unwrap_or(CAUTIOUS),
            usual: learned.and_then(|known| known.shares.get(kind)).copied().unwrap_or_default(),
        };
        match self.kpi.test {
            Test::ErrorRatio { tolerance, minimum_effect, .. } => vec![share(0, tolerance, minimum_effect)],
            Test::Latency { tolerance, minimum_effect, .. } => {
                let bounds = learned.map_or(0, |known| known.bounds.len()).min(counters::KINDS);
                // Few requests lie above the last bound, so that a smaller difference matters there.
                let effect = |kind| if kind > 0 && kind + 1 == bounds { 0.4 } else { 1.0 } * minimum_effect;
                (0..bounds).map(|kind| share(kind, tolerance, effect(kind))).collect()
            }
            Test::Gauge { .. } | Test::Threshold { .. } => vec![],
        }
    }

    /// The ratio of odds that was called equal at a tick, number `fresh` of those that count, before which enough may not have been
    /// known of the pods. What is tolerated may become less in mid-stage: evidence against more was evidence against that as well.
    fn tolerated_at(&self, share: &share::Share, baseline: &Arm, tick: Tick, fresh: i64) -> f64 {
        let spread = if self.knows(tick) { share.spread } else { CAUTIOUS };
        let tolerated = self.tolerated(&share::Share { spread, ..*share }, baseline);
        match self.kpi.test {
            // A warm-up may not be long enough for all that is cold.
            Test::Latency { .. } if self.warm_up > 0 => {
                let warm_ups = ((fresh - 1) * self.step) as f64 / self.warm_up as f64;
                tolerated.max(YOUNG.powf((-warm_ups / YOUNG_FOR).exp()))
            }
            _ => tolerated,
        }
    }

    /// Whether at a tick was known what the pre-flight holds.
    fn knows(&self, tick: Tick) -> bool {
        self.preflight.as_ref().and_then(|known| known.cautious_until).is_none_or(|until| tick > until)
    }

    /// The ratio of odds that is called equal between these arms.
    fn tolerated(&self, share: &share::Share, baseline: &Arm) -> f64 {
        effective_tolerance(share.tolerance, share.spread, self.arms.canary.pods, baseline.pods)
    }

    fn gauge<'a>(&'a self, baseline: &'a Arm) -> Option<gauge::Compared<'a>> {
        match self.kpi.test {
            Test::Gauge { direction, tolerance, .. } => {
                Some(gauge::Compared { trial: self, direction, tolerance, baseline })
            }
            _ => None,
        }
    }

    /// The evidence to go on from, of a trial whose evidence began at `from`: what is known, where it belongs to this trial. The sums
    /// of a gauge are not stored, so that after a restart they are folded again from the beginning; an alarm stands.
    pub fn resumed(&self, known: Option<Evidence>, from: Tick) -> Evidence {
        let Some(known) = known else { return beginning(from) };
        let fits = match self.kpi.test {
            Test::ErrorRatio { .. } | Test::Latency { .. } => {
                known.gauge.is_none() && [0, self.shares().len()].contains(&known.shares.len())
            }
            Test::Gauge { .. } => known.gauge.as_ref().is_some_and(|gauge| gauge.sums.is_some()),
            Test::Threshold { .. } => known.gauge.is_none() && known.shares.is_empty(),
        };
        if fits && known.last_tick >= from {
            return known;
        }
        let stands = known.gauge.filter(|_| matches!(self.kpi.test, Test::Gauge { .. }));
        let gauge = stands.map(|gauge| api::GaugeEvidence { peak: gauge.peak, ..Default::default() });
        Evidence { gauge, ..beginning(from) }
    }

    /// Cuts the ticks up to `until` that this evidence has not seen into ranges for one query each: `(base, end)`, both asked for, where
    /// the base is the end of the range before. The more pods, the shorter, so that an answer stays far below the bound on its size.
    ///
    /// Before its first tick a share of requests is asked for one tick more, against which a change of the rate can be told, and a
    /// latency for one warm-up more, which shows what pods are cold when the evidence begins.
    ///
    /// Where no tick is new the last one is asked for again: it adds nothing to the evidence, but a KPI that was blind at that tick
    /// must not pass because nobody looked.
    pub fn ranges(&self, evidence: &Evidence, until: Tick) -> impl Iterator<Item = (Tick, Tick)> + use<> {
        let baseline = self.arms.baseline.as_ref().map_or(0, |arm| i64::from(arm.pods.max(1)));
        let pods = i64::from(self.arms.canary.pods.max(1)) + baseline;
        let step = self.step.max(1);
        let longest = (20_000 / pods).clamp(10, MAX_TICKS - 1);
        let before = match self.kpi.test {
            _ if !evidence.shares.is_empty() => 0,
            Test::ErrorRatio { .. } => 1,
            Test::Latency { .. } => (self.warm_up / step + 1).clamp(1, MAX_TICKS),
            Test::Gauge { .. } | Test::Threshold { .. } => 0,
        };
        let from = evidence.last_tick - before * step;
        let ticks = ((until - from) / step).max(0);
        let count = (ticks + longest - 1) / longest;
        (0..count.max(1)).map(move |chunk| {
            let end = ((chunk + 1) * longest).min(ticks);
            (from + chunk * longest * step, from + end * step)
        })
    }

    /// For how many seconds a sample stands for its pod, where the queries do not tell its time: two intervals, so that one sample
    /// before an outage is not taken for many. Counters need none: when they were last sampled is asked for.
    pub fn lookback(&self) -> Option<i64> {
        matches!(self.kpi.test, Test::Gauge { .. } | Test::Threshold { .. }).then_some(2 * self.step.max(1))
    }

    /// Folds the answers to [`Self::queries`], asked for the ticks `from` to `until`, into the evidence.
    ///
    /// `from` is the base of the first difference and is not judged itself; ticks that the evidence already holds or that are before its
    /// beginning are passed over, so that an answer that is read twice counts once. One call folds [`MAX_TICKS`] at most. Splitting a range at any tick gives the
    /// same evidence to the last bit. When an answer is missing or malformed the evidence comes back as it was, and
    /// the next call can begin at the same tick: nothing is lost by a Prometheus that was away.
    ///
    /// To start afresh, give [`beginning`].
    pub fn fold(
        &self,
        evidence: Evidence,
        answers: &[Answer],
        from: Tick,
        until: Tick,
    ) -> (Evidence, AnswerHealth) {
        let mut read = Vec::with_capacity(answers.len());
        for answer in answers {
            match answer {
                Answer::Series(series) => read.push(series.as_slice()),
                Answer::Down(why) => return (evidence, AnswerHealth::Down(why.clone())),
                Answer::Malformed(why) => return (evidence, AnswerHealth::Malformed(why.clone())),
            }
        }
        if let Some(why) = self.misread(&read) {
            let queries = self.queries();
            let query = queries.first().map(|query| quote(query)).unwrap_or_default();
            return (evidence, AnswerHealth::Malformed(format!("{why}; the query is {query}")));
        }
        let step = self.step.max(1);
        let grid = Grid { from, step, ticks: ((until - from) / step).clamp(0, MAX_TICKS) };
        match (&self.kpi.test, self.arms.baseline.as_ref(), read.as_slice()) {
            (Test::ErrorRatio { .. }, Some(baseline), &[errors, total, times]) => {
                let events = counters::plain(Counter::Event(0), errors);
                let counted: Vec<_> = events.chain(counters::plain(Counter::Total, total)).collect();
                let counters = counters::Counters { counted: &counted, times };
                share::fold(self, baseline, evidence, &counters, errors.is_empty(), grid)
            }
            (Test::Latency { .. }, Some(baseline), &[buckets, times]) => {
                let bounds = self.preflight.iter().flat_map(|preflight| &preflight.bounds);
                let bounds: Vec<f64> = bounds.filter_map(|text| text.parse().ok()).collect();
                let (counted, lacking) = counters::above(buckets, &bounds);
                let counters = counters::Counters { counted: &counted, times };
                let (evidence, health) = share::fold(self, baseline, evidence, &counters, false, grid);
                let there =
                    |series: &&&Series| series.points.last().is_some_and(|(time, _)| *time == grid.last());
                let health = match lacking.iter().find(there) {
                    Some(Series { pod, .. }) => AnswerHealth::Malformed(format!(
                        "pod {pod} has a histogram without the bucket that slow was told by before ({} s): give every pod the same \
                         buckets, or narrow the selector to histograms that have them, in {}",
                        self.preflight
                            .as_ref()
                            .map(|preflight| preflight.bounds.join(" s and "))
                            .unwrap_or_default(),
                        self.queries().first().map(|query| quote(query)).unwrap_or_default(),
                    )),
                    None => health,
                };
                (evidence, health)
            }
            (Test::Gauge { .. }, Some(baseline), &[values]) => match self.gauge(baseline) {
                Some(gauge) => gauge::fold(&gauge, evidence, values, grid),
                None => (evidence, AnswerHealth::Good),
            },
            (Test::Threshold { bound, consecutive, .. }, _, &[values, ref rest @ ..]) if rest.len() < 2 => {
                let reference = rest.first().copied().unwrap_or_default();
                threshold::fold(self, *bound, *consecutive, evidence, values, reference, grid)
            }
            (_, None, _) => (
                Evidence { last_tick: evidence.last_tick.max(grid.last()), ..evidence },
                AnswerHealth::Blind(Cause::NoBaseline, "there is no baseline to compare with".to_owned()),
            ),
            _ => (
                evidence,
                AnswerHealth::Malformed(format!(
                    "KPI {} got {} answers, not one for each of its queries",
                    self.kpi.name,
                    read.len()
                )),
            ),
        }
    }

    /// What is wrong with series that are no histogram where one is wanted, or are one where counters or values are.
    fn misread(&self, read: &[&[Series]]) -> Option<&'static str> {
        let native = |series: &Series| series.bucket.as_ref().is_some_and(|bucket| bucket.native);
        match (&self.kpi.test, read) {
            (Test::Latency { .. }, [buckets, ..]) if buckets.iter().any(|series| series.bucket.is_none()) => {
                Some(
                    "the query gives series that are no buckets of a histogram (label le): name those that end in _bucket, or a native histogram",
                )
            }
            (Test::Latency { .. }, _) => None,
            (_, read) if read.iter().any(|series| series.iter().any(native)) => Some(
                "the query gives native histograms, and counters or plain values are needed: use histogram_count(...)",
            ),
            _ => None,
        }
    }

    /// The verdict, with its reasons in words and numbers.
    ///
    /// An alarm once reached stands, also when Prometheus has gone away since. Otherwise what cannot be seen does not pass.
    pub fn judge(&self, evidence: &Evidence, health: &AnswerHealth) -> KpiStatus {
        let finding = match (&self.kpi.test, self.arms.baseline.as_ref()) {
            (Test::Threshold { bound, consecutive, .. }, _) => {
                threshold::find(*bound, *consecutive, evidence)
            }
            (_, None) => Finding::without_baseline(),
            (Test::Gauge { .. }, Some(baseline)) => match self.gauge(baseline) {
                Some(gauge) => gauge::find(&gauge, evidence),
                None => Finding::without_baseline(),
            },
            (_, Some(baseline)) => share::find(self, baseline, evidence),
        };
        let (verdict, reason, message) = match (finding.verdict, health) {
            (verdict, AnswerHealth::Good) => (verdict, finding.reason, finding.message),
            (
                verdict @ Verdict::Fail,
                AnswerHealth::Remark(why)
                | AnswerHealth::Blind(_, why)
                | AnswerHealth::NoData(_, why)
                | AnswerHealth::Down(why)
                | AnswerHealth::Malformed(why),
            )
            | (verdict, AnswerHealth::Remark(why)) => {
                (verdict, finding.reason, format!("{}; {why}", finding.message))
            }
            (_, AnswerHealth::Blind(reason, why)) => (Verdict::Inconclusive, *reason, why.clone()),
            (_, AnswerHealth::NoData(reason, why)) => (Verdict::NoData, *reason, why.clone()),
            (_, AnswerHealth::Down(why)) => (Verdict::TelemetryDown, Cause::Unreachable, why.clone()),
            (_, AnswerHealth::Malformed(why)) => (Verdict::TelemetryDown, Cause::Malformed, why.clone()),
        };
        let seconds = |ticks: f64| Duration::from_secs((ticks * self.step as f64).min(1e9).ceil() as u64);
        KpiStatus {
            name: self.kpi.name.clone(),
            owner: self.kpi.owner.clone(),
            verdict,
            reason,
            reads: String::new(),
            since: None,
            message,
            canary: finding.canary.map(rounded),
            baseline: finding.baseline.map(rounded),
            change: finding.change,
            log_evidence: finding.log_evidence.map(rounded),
            alarm_at: finding.log_evidence.map(|_| rounded(self.alarm_at)),
            tolerated: finding.tolerated.map(rounded),
            detectable: finding.detectable.map(rounded),
            doubling_found_in: finding.doubling_ticks.map(seconds),
            evidence: Some(evidence.clone()),
        }
    }

    /// What this trial can show, before it begins: the smallest detectable ratio, and the canary requests that are to come, by the
    /// rates of the pre-flight. `None` where there is nothing to foretell: a gauge, a threshold, or no traffic in the pre-flight.
    pub fn foretold(&self) -> Option<Foretold> {
        let preflight = self.preflight.as_ref()?;
        let baseline = self.arms.baseline.as_ref()?;
        let shares = self.shares();
        let share = shares.first()?;
        let seconds = (self.bake * self.step) as f64;
        let requests = |pods: i32| preflight.requests * f64::from(pods) * seconds;
        let (canary, base) = (requests(self.arms.canary.pods), requests(baseline.pods));
        if canary <= 0.0 {
            return None;
        }
        let seen = canary + base;
        let events = share.usual * seen;
        let rates = power::Rates { canary, baseline: base, share: (events + 0.5) / (seen + 1.0) };
        let r0 = self.tolerated(share, baseline);
        let needed = self.alarm_at + (shares.len() as f64).ln();
        Some(Foretold {
            requests: canary,
            wanted: (share::MINIMUM_REQUESTS / share.minimum_effect).ceil(),
            events,
            detectable: power::detectable(r0, share.minimum_effect, needed, rates),
        })
    }

    /// The status of a KPI that could not be learned of yet, or warms up still.
    pub fn waiting(kpi: &Kpi, health: &AnswerHealth) -> KpiStatus {
        let trial = Self {
            kpi: kpi.clone(),
            arms: Arms { namespace: String::new(), canary: Arm::default(), baseline: None },
            preflight: None,
            alarm_at: 0.0,
            step: 1,
            warm_up: 0,
            bake: 0,
        };
        KpiStatus { evidence: None, ..trial.judge(&Evidence::default(), health) }
    }
}

/// What a trial is expected to show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Foretold {
    /// Canary requests in the whole stage.
    pub requests: f64,
    /// Canary requests that prove the absence of harm where there are no events.
    pub wanted: f64,
    /// Events in both arms in the whole stage.
    pub events: f64,
    /// Smallest ratio that is found with a probability of 80 %.
    pub detectable: Option<f64>,
}

impl Foretold {
    /// Whether the stage will lack the evidence without which it cannot pass.
    pub fn falls_short(&self) -> bool {
        self.requests < self.wanted && self.events < 5.0
    }
}

/// Bake time counted so far, in seconds: the fewest fresh ticks of any required KPI, times the interval.
///
/// Error ratios and latencies count where there is a required one, since only they say how old a sample is; otherwise the others.
/// Where nothing is required the KPI with the most fresh ticks counts: the clock then only shows that Prometheus holds data.
pub fn observed<'a>(kpis: impl IntoIterator<Item = (&'a Kpi, &'a Evidence)>, step: i64) -> i64 {
    let (mut timed, mut untimed, mut optional): (Option<i64>, Option<i64>, i64) = (None, None, 0);
    for (kpi, Evidence { fresh_ticks, .. }) in kpis {
        let fewest = match kpi.test {
            _ if !kpi.required => {
                optional = optional.max(*fresh_ticks);
                continue;
            }
            Test::ErrorRatio { .. } | Test::Latency { .. } => &mut timed,
            Test::Gauge { .. } | Test::Threshold { .. } => &mut untimed,
        };
        *fewest = Some(fewest.map_or(*fresh_ticks, |fewest| fewest.min(*fresh_ticks)));
    }
    timed.or(untimed).unwrap_or(optional) * step
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
    reason: Cause,
    message: String,
    canary: Option<f64>,
    baseline: Option<f64>,
    change: Option<Change>,
    log_evidence: Option<f64>,
    tolerated: Option<f64>,
    detectable: Option<f64>,
    doubling_ticks: Option<f64>,
}

impl Finding {
    fn without_baseline() -> Self {
        Self {
            verdict: Verdict::Inconclusive,
            reason: Cause::NoBaseline,
            message: "there is no baseline to compare with".to_owned(),
            canary: None,
            baseline: None,
            change: None,
            log_evidence: None,
            tolerated: None,
            detectable: None,
            doubling_ticks: None,
        }
    }
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
