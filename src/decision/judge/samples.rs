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
    /// All labels in their canonical form: sorted by name, quoted.
    pub labels: String,
    /// Times on the grid, rising, each with its value as Prometheus gave it.
    pub points: Vec<(Tick, f64)>,
}

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
        let mut canonical = String::from("{");
        for (name, value) in labels {
            // Writing to a String cannot fail.
            let _ = write!(canonical, "{}{name}={value:?}", if canonical.len() > 1 { "," } else { "" });
        }
        canonical.push('}');
        Self { pod: label("pod"), instance: label("instance"), job: label("job"), labels: canonical, points }
    }

    /// The order in which series are summed, so that sums do not depend on the order of an answer.
    pub fn key(&self) -> (&str, &str, &str) {
        (&self.pod, &self.instance, &self.labels)
    }
}
