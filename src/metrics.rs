//! The operator's own metrics. Label sets are closed: no object's name is a label.

use std::time::Instant;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use crate::api::{Verdict, What};

/// Counters and histograms of the operator.
pub struct Metrics {
    registry: Registry,
    failures: Family<Label, Counter>,
    judgements: Family<Label, Counter>,
    decisions: Family<Label, Counter>,
    duration: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    kind: String,
}

/// Measures one reconciliation until it is dropped.
pub struct Timer<'a> {
    metrics: &'a Metrics,
    since: Instant,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.metrics.duration.observe(self.since.elapsed().as_secs_f64());
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("synthex_operator");
        let metrics = Self {
            failures: Family::default(),
            judgements: Family::default(),
            decisions: Family::default(),
            duration: Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]),
            registry: Registry::default(),
        };
        registry.register(
            "reconcile_failures",
            "Reconciliations that failed, by kind of error",
            metrics.failures.clone(),
        );
        registry.register("judgements", "Judgements of KPIs, by verdict", metrics.judgements.clone());
        registry.register("decisions", "Decisions, by kind", metrics.decisions.clone());
        registry.register(
            "reconcile_duration_seconds",
            "How long reconciliations took",
            metrics.duration.clone(),
        );
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// Starts measuring a reconciliation.
    pub fn reconciliation(&self) -> Timer<'_> {
        Timer { metrics: self, since: Instant::now() }
    }

    /// Counts a reconciliation that failed.
    pub fn failure(&self, kind: &str) {
        self.failures.get_or_create(&Label { kind: kind.to_owned() }).inc();
    }

    /// Counts a judgement.
    pub fn judged(&self, verdict: Verdict) {
        self.judgements.get_or_create(&Label { kind: format!("{verdict:?}") }).inc();
    }

    /// Counts a decision.
    pub fn decided(&self, what: What) {
        self.decisions.get_or_create(&Label { kind: format!("{what:?}") }).inc();
    }

    /// All metrics in the text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail; were it to, an incomplete page would be answered.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
