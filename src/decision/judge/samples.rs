//! Samples as they come through the door: typed, so that no odd answer is ever compared with a number. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Tick;

/// One series of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Label `pod`; empty where there is none, as Prometheus itself has it.
    pub pod: String,
    /// Label `instance`: with the job, the scraped target.
    pub instance: String,
    /// Label `job`.
    pub job: String,
    /// All labels in their canonical form: sorted by name, quoted; without those of replicas, so that what two of them scraped is told to
    /// be the same.
    pub labels: String,
    /// Where the series is one bucket of a histogram.
    pub bucket: Option<Bucket>,
    /// Times on the grid, rising, each with its value as Prometheus gave it.
    pub points: Vec<(Tick, f64)>,
}

/// One bucket of a histogram: how many values were no larger than a bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// The bound: label `le`.
    pub le: f64,
    /// The bound as the label has it.
    pub text: String,
    /// The other labels, in their canonical form: the histogram to which the bucket belongs.
    pub histogram: String,
    /// Whether it was read from a native histogram, whose series have no label `le`.
    pub native: bool,
    /// The bound above which a native histogram counts its values apart, down to the lowest where its resolution has changed.
    pub above: f64,
}

/// A sample of a native histogram: its time, the count of all values and, by rising upper bound, each bucket: lower and upper bound, and
/// the values between them.
pub type NativePoint = (Tick, f64, Vec<(f64, f64, f64)>);

/// The series of one answer.
pub type Samples = Vec<Series>;

/// An answer of Prometheus to one range query.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A matrix, possibly empty.
    Series(Samples),
    /// Prometheus was not reached, is unwell, or did not answer in time.
    Down(String),
    /// Prometheus refused the query, or gave something that is no complete matrix. Quotes the query and says what to change.
    Malformed(String),
}

impl Series {
    /// A series from its labels and its points.
    pub fn new(labels: &BTreeMap<String, String>, points: Vec<(Tick, f64)>) -> Self {
        let label = |name| labels.get(name).cloned().unwrap_or_default();
        let bucket = labels.get("le").and_then(|text| {
            let le: f64 = text.parse().ok().filter(|le: &f64| !le.is_nan())?;
            let histogram = canonical(labels.iter().filter(|(name, _)| *name != "le"));
            Some(Bucket { le, text: text.clone(), histogram, native: false, above: f64::NEG_INFINITY })
        });
        let (pod, instance, job) = (label("pod"), label("instance"), label("job"));
        Self { pod, instance, job, labels: canonical(labels), bucket, points }
    }

    /// The buckets of a native histogram as the series of a classic one, up to `le="+Inf"`.
    pub fn of_native(labels: &BTreeMap<String, String>, points: &[NativePoint]) -> Samples {
        let mut bounds: Vec<f64> =
            points.iter().flat_map(|(_, _, buckets)| buckets.iter().map(|(_, bound, _)| *bound)).collect();
        bounds.sort_by(f64::total_cmp);
        bounds.dedup();
        bounds.retain(|bound| bound.is_finite());
        bounds.push(f64::INFINITY);
        let histogram = canonical(labels);
        let series = |le: f64| {
            let up_to = |count: f64, buckets: &[(f64, f64, f64)]| match le.is_finite() {
                true => {
                    buckets.iter().take_while(|(_, bound, _)| *bound <= le).map(|(_, _, values)| values).sum()
                }
                false => count,
            };
            let lower = |(_, _, buckets): &NativePoint| {
                buckets.iter().find(|(_, bound, _)| *bound == le).map(|(lower, ..)| *lower)
            };
            let above = points.iter().filter_map(lower).fold(f64::INFINITY, f64::min);
            let points = points.iter().map(|(time, count, buckets)| (*time, up_to(*count, buckets)));
            let text = if le.is_finite() { le.to_string() } else { "+Inf".to_owned() };
            let mut labels = labels.clone();
            labels.insert("le".to_owned(), text.clone());
            let bucket = Some(Bucket { le, text, histogram: histogram.clone(), native: true, above });
            Self { bucket, ..Self::new(&labels, points.collect()) }
        };
        bounds.into_iter().map(series).collect()
    }

    /// The order in which series are summed, so that sums do not depend on the order of an answer.
    pub fn key(&self) -> (&str, &str, &str) {
        (&self.pod, &self.instance, &self.labels)
    }
}

/// Labels by which replicas of one Prometheus tell apart what is the same (Prometheus Operator's; Mimir's and Cortex').
const REPLICA: [&str; 2] = ["prometheus_replica", "__replica__"];

fn canonical<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let mut canonical = String::from("{");
    for (name, value) in labels.into_iter().filter(|(name, _)| !REPLICA.contains(&name.as_str())) {
        // Writing to a String cannot fail.
        let _ = write!(canonical, "{}{name}={value:?}", if canonical.len() > 1 { "," } else { "" });
    }
    canonical.push('}');
    canonical
}
