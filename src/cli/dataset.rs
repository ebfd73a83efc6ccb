//! A recorded stage, as a file: all that its verdicts rest on. See the head of [`crate::cli`] for the format. Pure.
//!
//! What is written comes back to the last bit. What is read is checked here, once: a [`DataSet`] that was read can be judged.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    api::{self, Numbers, Preflight},
    decision::judge::{self, Answer, Arm, Arms, Bucket, Kpi, Test, Tick, Trial},
};

/// The version of the format that is written and read.
pub const VERSION: u32 = 1;
/// Largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 256 << 20;
/// Most samples that are recorded: what a file of [`MAX_BYTES`] holds.
pub const MAX_SAMPLES: usize = 10_000_000;
/// Most ticks of one KPI: two months of 15 s.
const MAX_TICKS: i64 = 350_000;
/// Longest spacing of the grid, in seconds: the longest `analysis.interval`.
const MAX_STEP: i64 = 300;
/// Most KPIs: those that a specification can hold.
const MAX_KPIS: usize = 144;
/// Most series of one query, as those of one answer of Prometheus.
const MAX_SERIES: usize = 50_000;

/// One attempt at a stage.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataSet {
    /// [`VERSION`].
    pub version: u32,
    /// Namespace and name of the rollout, for the reader.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rollout: String,
    /// Name of the stage, for the reader.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stage: String,
    /// Attempt at it, from 1.
    #[serde(default = "first")]
    pub attempt: i32,
    /// Stages over which the false-rollback probability is spent.
    #[serde(default = "one")]
    pub stages: usize,
    /// `analysis.falseRollbackProbability`.
    #[serde(default = "one_percent")]
    pub false_rollback_probability: f64,
    /// Spacing of the grid, in seconds.
    pub step: i64,
    /// Ticks of the stage's bake. Absent: those of each KPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bake: Option<i64>,
    /// The pods that are compared.
    pub arms: Arms,
    /// The KPIs.
    pub kpis: Vec<Recorded>,
}

/// One KPI.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Recorded {
    /// The optimization that alone can move it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The KPI as the custom resource has it.
    #[serde(deserialize_with = "strictly")]
    pub definition: api::Kpi,
    /// Log evidence at which it alarms. Absent: computed from what the data set says of probability, KPIs, stages and attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alarm_at: Option<f64>,
    /// What was learned of it. Absent: the cautious end of the range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preflight: Option<Preflight>,
    /// How long a pod that begins in mid-stage is cold, in seconds: its latency is not counted until then. Absent: it is not waited for.
    #[serde(default)]
    pub warm_up: i64,
    /// Unix time in seconds of the tick at which the evidence began; it is the base of the first difference and not judged itself.
    pub from: Tick,
    /// Unix time in seconds of the last tick.
    pub until: Tick,
    /// The samples, query by query, in the order of [`Trial::queries`].
    pub queries: Vec<Query>,
    /// The numbers on which the operator decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided: Option<Numbers>,
}

/// The answer to one query.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Query {
    /// The PromQL that was asked, for the reader.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub query: String,
    /// Its series.
    pub series: Vec<Series>,
}

/// One series. Of its labels there is what the judgement needs.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Series {
    /// Label `pod`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
    /// Label `instance`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instance: String,
    /// Label `job`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub job: String,
    /// Any text that tells several series of one pod apart; recorded ones have all labels here.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub labels: String,
    /// Label `le` of a bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub le: Option<String>,
    /// Any text that tells several histograms of one pod apart.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub histogram: String,
    /// Whether the bucket is one of a native histogram.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub native: bool,
    /// Its lower bound, where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// Time and value of each sample, rising, on the grid.
    #[serde(with = "samples")]
    pub samples: Vec<(Tick, f64)>,
}

/// A KPI that can be judged, with its samples.
#[derive(Clone, Debug)]
pub struct Case {
    /// The trial, as the operator has it.
    pub trial: Trial,
    /// First tick, which is not judged.
    pub from: Tick,
    /// Last tick.
    pub until: Tick,
    /// One answer for each query.
    pub answers: Vec<judge::Samples>,
    /// The numbers on which the operator decided.
    pub decided: Option<Numbers>,
}

impl DataSet {
    /// Reads a data set.
    ///
    /// # Errors
    /// Names the place and says how to mend it.
    pub fn parse(text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: Option<u32>,
        }
        ensure!(
            text.len() as u64 <= MAX_BYTES,
            "the data set is larger than {} MiB: record fewer KPIs, with --kpi",
            MAX_BYTES >> 20
        );
        // The version first: what another version means by a field is not to be guessed.
        let Versioned { version } = serde_json::from_slice(text).context("the data set is not JSON")?;
        match version {
            Some(VERSION) => {}
            Some(other) => bail!(
                "version: this plugin reads version {VERSION}, not {other}; use the plugin that wrote it"
            ),
            None => bail!("version is missing: write \"version\": {VERSION}"),
        }
        let deserializer = &mut serde_json::Deserializer::from_slice(text);
        serde_path_to_error::deserialize(deserializer)
            .map_err(|error| anyhow::anyhow!("{}: {}", error.path(), error.inner()))
    }

    /// The KPIs of these names, or all, ready to be judged.
    ///
    /// # Errors
    /// Names the place of what cannot be judged, and says how to mend it.
    pub fn cases(&self, names: &[String]) -> Result<Vec<Case>> {
        ensure!(
            (1..=MAX_STEP).contains(&self.step),
            "step must be from 1 to {MAX_STEP} seconds, not {}",
            self.step
        );
        ensure!(self.attempt >= 1, "attempt counts from 1; it is {}", self.attempt);
        ensure!((1..=1000).contains(&self.stages), "stages must be from 1 to 1000, not {}", self.stages);
        let probability = self.false_rollback_probability;
        ensure!(
            probability > 0.0 && probability <= 0.2,
            "falseRollbackProbability must be above 0 and at most 0.2, not {probability}"
        );
        ensure!(self.bake.is_none_or(|bake| bake >= 1), "bake is a number of ticks, 1 or more");
        for (place, arm) in [("canary", Some(&self.arms.canary)), ("baseline", self.arms.baseline.as_ref())] {
            let Some(arm) = arm else { continue };
            ensure!(
                arm.pods >= 1 && !arm.deployment.is_empty(),
                "arms.{place} needs a deployment and 1 or more pods"
            );
        }
        ensure!(!self.kpis.is_empty(), "kpis is empty: there is nothing to judge");
        ensure!(self.kpis.len() <= MAX_KPIS, "kpis: {} are more than {MAX_KPIS}", self.kpis.len());
        let mut resolved = vec![];
        let mut seen = BTreeSet::new();
        for (index, recorded) in self.kpis.iter().enumerate() {
            let kpi = Kpi::resolve(&recorded.definition, recorded.owner.as_deref())
                .map_err(|why| anyhow::anyhow!("kpis[{index}].definition: {why}"))?;
            ensure!(
                seen.insert(kpi.name.clone()),
                "kpis[{index}].definition.name: {} is there twice; give each KPI a name of its own",
                kpi.name
            );
            resolved.push(kpi);
        }
        for name in names {
            ensure!(
                seen.contains(name),
                "there is no KPI {name}; there are {}",
                seen.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
            );
        }
        let chosen = self.kpis.iter().zip(&resolved).enumerate();
        chosen
            .filter(|(_, (_, kpi))| names.is_empty() || names.contains(&kpi.name))
            .map(|(index, (recorded, kpi))| {
                self.case(recorded, kpi, &resolved).with_context(|| format!("kpis[{index}] ({})", kpi.name))
            })
            .collect()
    }

    fn case(&self, recorded: &Recorded, kpi: &Kpi, all: &[Kpi]) -> Result<Case> {
        let Recorded { from, until, .. } = *recorded;
        let ticks = until.checked_sub(from).unwrap_or(i64::MAX) / self.step;
        ensure!(
            until > from && (1..=MAX_TICKS).contains(&ticks) && (until - from) % self.step == 0,
            "until must be from + a whole number of steps of {} s, from 1 to {MAX_TICKS} of them",
            self.step
        );
        ensure!(
            !kpi.is_tested() || self.arms.baseline.is_some(),
            "it compares with a baseline, and arms.baseline is missing"
        );
        let alarm_at = recorded.alarm_at.unwrap_or_else(|| {
            let share = kpi.share_among(all.iter());
            judge::alarm_at(self.false_rollback_probability, share, self.stages, self.attempt)
        });
        ensure!(alarm_at.is_finite() && alarm_at > 0.0, "alarmAt must be above 0, not {alarm_at}");
        sound(kpi, recorded.preflight.as_ref())?;
        let trial = Trial {
            kpi: kpi.clone(),
            arms: self.arms.clone(),
            preflight: recorded.preflight.clone(),
            alarm_at,
            step: self.step,
            warm_up: recorded.warm_up,
            bake: self.bake.unwrap_or(ticks),
        };
        // What is before the evidence may be left out.
        let (asked, _) = trial.ranges(&judge::beginning(from), until).next().unwrap_or((from, until));
        let wanted = trial.queries().len();
        let mut answers = vec![];
        for (index, query) in recorded.queries.iter().enumerate() {
            let place = format!("queries[{index}].series");
            answers.push(self.answer(query, asked, until).with_context(|| place)?);
        }
        // The times of the samples may be left out: each is then of its own time.
        let timed = matches!(kpi.test, Test::ErrorRatio { .. } | Test::Latency { .. });
        if timed && answers.len() + 1 == wanted {
            answers.extend(answers.last().map(|total| total.iter().map(times).collect()));
        }
        let given = recorded.queries.len();
        ensure!(
            answers.len() == wanted,
            "queries: {given} are there, and there must be {}",
            expected(&kpi.test)
        );
        Ok(Case { trial, from, until, answers, decided: recorded.decided.clone() })
    }

    fn answer(&self, query: &Query, from: Tick, until: Tick) -> Result<judge::Samples> {
        ensure!(query.series.len() <= MAX_SERIES, "more than {MAX_SERIES} series");
        let (mut seen, mut buckets) = (BTreeSet::new(), BTreeSet::new());
        for (index, series) in query.series.iter().enumerate() {
            let place = || format!("[{index}] (pod {:?})", series.pod);
            let Series { pod, instance, job, labels, histogram, .. } = series;
            ensure!(
                seen.insert((pod, instance, job, labels, histogram, &series.le)),
                "{}: this series is there twice; tell series of one pod apart by labels",
                place()
            );
            if let Some(le) = &series.le {
                ensure!(
                    buckets.insert((pod, if histogram.is_empty() { instance } else { histogram }, le)),
                    "{}: this bucket of the pod is there twice; tell histograms of one pod apart by histogram",
                    place()
                );
                ensure!(
                    le.parse::<f64>().is_ok_and(|le| !le.is_nan()),
                    "{}: le must be a number or +Inf, not {le:?}",
                    place()
                );
            }
            let mut before = None;
            for (at, (time, _)) in series.samples.iter().enumerate() {
                let fault = if !(from..=until).contains(time) {
                    format!("is not from {from} to {until}")
                } else if (time - from) % self.step != 0 {
                    format!("is not on the grid of {} s that begins at {from}", self.step)
                } else if before.is_some_and(|before| before >= *time) {
                    "is not later than the one before".to_owned()
                } else {
                    before = Some(*time);
                    continue;
                };
                bail!("{}.samples[{at}]: the time {time} {fault}", place());
            }
        }
        let mut samples: judge::Samples = query.series.iter().map(judge::Series::from).collect();
        samples.sort_by(|a, b| a.key().cmp(&b.key()));
        Ok(samples)
    }
}

/// Reads a part of the custom resource as the API server does: a field that it does not have is refused, and none of those that are
/// there is lost.
fn strictly<'de, D: Deserializer<'de>>(deserializer: D) -> Result<api::Kpi, D::Error> {
    let given = serde_json::Value::deserialize(deserializer)?;
    let kpi: api::Kpi = serde_path_to_error::deserialize(&given)
        .map_err(|error| de::Error::custom(format!("{}: {}", error.path(), error.inner())))?;
    let taken = serde_json::to_value(&kpi).map_err(de::Error::custom)?;
    match unknown(&given, &taken) {
        Some(field) => Err(de::Error::custom(format!("a KPI has no field {field}"))),
        None => Ok(kpi),
    }
}

/// The first field that was given a value and is not among those that were taken.
fn unknown(given: &serde_json::Value, taken: &serde_json::Value) -> Option<String> {
    let fields = given.as_object()?;
    fields.iter().find_map(|(name, value)| match taken.get(name) {
        None if value.is_null() || *value == false => None,
        None => Some(name.clone()),
        Some(taken) => unknown(value, taken).map(|field| format!("{name}.{field}")),
    })
}

/// Whether what was learned fits the KPI.
fn sound(kpi: &Kpi, preflight: Option<&Preflight>) -> Result<()> {
    let bounds = preflight.map_or(0, |preflight| preflight.bounds.len());
    if matches!(kpi.test, Test::Latency { .. }) {
        ensure!(
            (1..=3).contains(&bounds),
            "preflight.bounds: a latency needs one to three bounds that say what slow is, such as [\"0.5\", \"1.0\"]"
        );
    }
    let Some(preflight) = preflight else { return Ok(()) };
    ensure!(
        preflight.spread.iter().all(|spread| spread.is_finite() && *spread >= 0.0),
        "preflight.spread: each is a standard deviation, 0 or more"
    );
    ensure!(
        preflight.shares.iter().all(|share| (0.0..=1.0).contains(share)),
        "preflight.shares: each is a share of all requests, from 0 to 1"
    );
    ensure!(
        preflight.bounds.iter().all(|bound| bound.parse::<f64>().is_ok_and(f64::is_finite)),
        "preflight.bounds: each is a number as the label le has it"
    );
    Ok(())
}

fn expected(test: &Test) -> &'static str {
    match test {
        Test::ErrorRatio { .. } => "two or three: errors, total, and the times of the samples of total",
        Test::Latency { .. } => "one or two: buckets, and the times of their samples",
        Test::Gauge { .. } => "one: the value of each pod",
        Test::Threshold { query, .. } if query.contains("$arm") => {
            "two: the canary's value and the baseline's (or one, without arms.baseline)"
        }
        Test::Threshold { .. } => "one: the value",
    }
}

/// A series that says of each sample that it is of its own time.
fn times(series: &judge::Series) -> judge::Series {
    let points = series.points.iter().map(|(time, _)| (*time, *time as f64)).collect();
    judge::Series { points, ..series.clone() }
}

impl From<&Series> for judge::Series {
    fn from(series: &Series) -> Self {
        let bucket = series.le.as_ref().and_then(|text| {
            // By hand, the buckets of one target are one histogram.
            let histogram = if series.histogram.is_empty() { &series.instance } else { &series.histogram };
            let (text, histogram) = (text.clone(), histogram.clone());
            let above = series.above.unwrap_or(if series.native { f64::INFINITY } else { f64::NEG_INFINITY });
            Some(Bucket { le: text.parse().ok()?, text, histogram, native: series.native, above })
        });
        Self {
            pod: series.pod.clone(),
            instance: series.instance.clone(),
            job: series.job.clone(),
            labels: series.labels.clone(),
            bucket,
            points: series.samples.clone(),
        }
    }
}

impl From<judge::Series> for Series {
    fn from(series: judge::Series) -> Self {
        let (le, histogram, native, above) = match series.bucket {
            Some(bucket) => (
                Some(bucket.text),
                bucket.histogram,
                bucket.native,
                Some(bucket.above).filter(|above| above.is_finite()),
            ),
            None => (None, String::new(), false, None),
        };
        let judge::Series { pod, instance, job, labels, points, .. } = series;
        Self { pod, instance, job, labels, le, histogram, native, above, samples: points }
    }
}

impl Case {
    /// The answers as Prometheus would give them for these ticks: series without a sample in them are not there.
    pub fn answers(&self, from: Tick, until: Tick) -> Vec<Answer> {
        let cut = |series: &judge::Series| {
            let start = series.points.partition_point(|(time, _)| *time < from);
            let end = series.points.partition_point(|(time, _)| *time <= until);
            let points = series.points[start..end].to_vec();
            (!points.is_empty()).then(|| judge::Series {
                pod: series.pod.clone(),
                instance: series.instance.clone(),
                job: series.job.clone(),
                labels: series.labels.clone(),
                bucket: series.bucket.clone(),
                points,
            })
        };
        self.answers.iter().map(|samples| Answer::Series(samples.iter().filter_map(cut).collect())).collect()
    }
}

/// The arms of a data set, in words.
pub fn compared(arms: &Arms) -> String {
    let arm =
        |arm: &Arm| format!("{} ({} pod{})", arm.deployment, arm.pods, if arm.pods == 1 { "" } else { "s" });
    match &arms.baseline {
        Some(baseline) => format!("{} against {}", arm(&arms.canary), arm(baseline)),
        None => arm(&arms.canary),
    }
}

fn first() -> i32 {
    1
}
fn one() -> usize {
    1
}
fn one_percent() -> f64 {
    0.01
}

/// Samples as `[time, value]`. JSON has no NaN and no infinity: those are strings, as Prometheus has them.
mod samples {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    use super::Tick;

    struct Value(f64);

    impl Serialize for Value {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            match self.0 {
                value if value.is_nan() => serializer.serialize_str("NaN"),
                f64::INFINITY => serializer.serialize_str("+Inf"),
                f64::NEG_INFINITY => serializer.serialize_str("-Inf"),
                value => serializer.serialize_f64(value),
            }
        }
    }

    impl<'de> Deserialize<'de> for Value {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl de::Visitor<'_> for Visitor {
                type Value = Value;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a number, or \"NaN\", \"+Inf\" or \"-Inf\"")
                }
                fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
                    Ok(Value(value))
                }
                fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
                    Ok(Value(value as f64))
                }
                fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
                    Ok(Value(value as f64))
                }
                fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                    text.parse().map(Value).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
                }
            }
            deserializer.deserialize_any(Visitor)
        }
    }

    pub(super) fn serialize<S: Serializer>(
        samples: &[(Tick, f64)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(samples.iter().map(|(time, value)| (time, Value(*value))))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(Tick, f64)>, D::Error> {
        let samples = Vec::<(Tick, Value)>::deserialize(deserializer)?;
        Ok(samples.into_iter().map(|(time, Value(value))| (time, value)).collect())
    }
}
