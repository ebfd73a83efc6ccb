//! From a KPI and the arms to PromQL. Pure.

use super::{Kpi, Test, Trial};

/// What stands for the arms' matchers in a query.
pub(super) const ARM: &str = "$arm";

/// What stands for the span of a `rate()` in a query of a gauge.
const WINDOW: &str = "$window";

/// Intervals in `$window`: with the usual two scrapes per interval there are always enough samples for a rate.
const WINDOW_INTERVALS: i64 = 4;

impl Trial {
    /// The range queries, in the order in which [`Trial::fold`] takes their answers: errors, total and time of the last
    /// sample of total for an error ratio; buckets and their time for a latency (none without a baseline); the query itself
    /// for a gauge; and for a threshold the query of the canary and that of the baseline, where it can be asked.
    ///
    /// One query serves both arms; the answer is split by the name of the pod. The time of a sample is known where `total` is a
    /// selector. For any other expression Prometheus gives the time of evaluation, and its samples are always taken as fresh.
    pub fn queries(&self) -> Vec<String> {
        let arms = &self.arms;
        let of = |deployments: &[&str]| matchers(&arms.namespace, deployments);
        let canary = arms.canary.deployment.as_str();
        let Some(baseline) = arms.baseline.as_ref().map(|arm| arm.deployment.as_str()) else {
            return match &self.kpi.test {
                Test::Threshold { query, .. } => vec![query.replace(ARM, &of(&[canary]))],
                _ => vec![],
            };
        };
        let both = of(&[canary, baseline]);
        match &self.kpi.test {
            Test::ErrorRatio { errors, total, .. } => {
                let total = total.replace(ARM, &both);
                let times = timestamp(&total);
                vec![errors.replace(ARM, &both), total, times]
            }
            Test::Latency { histogram, .. } => {
                let Some(preflight) = &self.preflight else { return vec![] };
                if preflight.native {
                    let all = histogram.replace(ARM, &both);
                    let times = timestamp(&all);
                    return vec![all, times];
                }
                let wanted = preflight.bounds.iter().flat_map(|bound| forms(bound));
                let wanted: Vec<String> = wanted.chain(["+Inf".to_owned()]).map(|le| literal(&le)).collect();
                let some = format!("{both},le=~{}", quoted(&wanted.join("|")));
                let all = format!("{both},le=\"+Inf\"");
                vec![histogram.replace(ARM, &some), timestamp(&histogram.replace(ARM, &all))]
            }
            Test::Gauge { query, .. } => vec![windowed(query, self.step).replace(ARM, &both)],
            Test::Threshold { query, .. } if query.contains(ARM) => {
                vec![query.replace(ARM, &of(&[canary])), query.replace(ARM, &of(&[baseline]))]
            }
            Test::Threshold { query, .. } => vec![query.clone()],
        }
    }
}

/// The range queries of a pre-flight: errors and total, all buckets, or the gauge; nothing is learned of a threshold.
pub(super) fn lesson(kpi: &Kpi, namespace: &str, deployments: &[String], step: i64) -> Vec<String> {
    let names: Vec<&str> = deployments.iter().map(String::as_str).collect();
    let arm = matchers(namespace, &names);
    match &kpi.test {
        Test::ErrorRatio { errors, total, .. } => vec![errors.replace(ARM, &arm), total.replace(ARM, &arm)],
        Test::Latency { histogram, .. } => vec![histogram.replace(ARM, &arm)],
        Test::Gauge { query, .. } => vec![windowed(query, step).replace(ARM, &arm)],
        Test::Threshold { .. } => vec![],
    }
}

fn windowed(query: &str, step: i64) -> String {
    query.replace(WINDOW, &format!("{}s", WINDOW_INTERVALS * step))
}

fn timestamp(selector: &str) -> String {
    // On its own line, the parenthesis cannot be swallowed by a comment at the end of the user's query.
    format!("timestamp({selector}\n)")
}

/// A bound as any version of a client or a server may write it: `1` and `1.0`.
fn forms(bound: &str) -> Vec<String> {
    let mut forms = vec![bound.to_owned()];
    match bound.strip_suffix(".0") {
        Some(whole) => forms.push(whole.to_owned()),
        None if bound.bytes().all(|byte| byte.is_ascii_digit()) => forms.push(format!("{bound}.0")),
        None => {}
    }
    forms
}

/// A query as messages show it: on one line, and cut where it is too long for a status.
pub fn quote(query: &str) -> String {
    let line = query.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(600) {
        Some((end, _)) => format!("`{}…`", &line[..end]),
        None => format!("`{line}`"),
    }
}

/// A foreign text as messages show it: on one line, without control characters, 300 characters at most.
pub fn excerpt(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .filter(|c| !c.is_control())
        .take(300)
        .collect()
}

/// What follows the name of a Deployment in that of its pods: `super::Arm::owns` as a regular expression.
const HASH: &str = "[24-9b-df-hj-np-tv-xz]{1,10}-[24-9b-df-hj-np-tv-xz]{5}";

/// Label matchers for the pods of the arms.
fn matchers(namespace: &str, deployments: &[&str]) -> String {
    let deployments: Vec<String> = deployments.iter().map(|name| literal(name)).collect();
    let pods = format!("({})-{HASH}", deployments.join("|"));
    format!("namespace={},pod=~{}", quoted(namespace), quoted(&pods))
}

/// A regular expression (RE2) that matches the text and nothing else.
fn literal(text: &str) -> String {
    text.chars().flat_map(|c| r"\.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// A PromQL string.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            _ => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        api,
        decision::judge::{Arm, Arms, Bound},
    };

    fn trial(test: Test, namespace: &str, canary: &str, baseline: Option<&str>) -> Trial {
        let arm = |name: &str| Arm { deployment: name.to_owned(), pods: 1 };
        Trial {
            kpi: Kpi {
                name: "errors".to_owned(),
                owner: None,
                required: true,
                observe_only: false,
                weight: 1.0,
                warm_up: None,
                expect: None,
                test,
            },
            arms: Arms { namespace: namespace.to_owned(), canary: arm(canary), baseline: baseline.map(arm) },
            preflight: None,
            alarm_at: 8.0,
            step: 15,
            warm_up: 0,
            bake: 100,
        }
    }

    fn ratio() -> Test {
        Test::ErrorRatio {
            errors: r#"http_errors_total{$arm,code=~"5.."}"#.to_owned(),
            total: "http_requests_total{$arm} # all of them".to_owned(),
            tolerance: 1.25,
            minimum_effect: 0.001,
        }
    }

    fn latency() -> Test {
        Test::Latency { histogram: "d_bucket{$arm}".to_owned(), tolerance: 1.25, minimum_effect: 0.005 }
    }

    #[test]
    fn one_query_serves_both_arms() {
        let pods = r#"namespace="shop",pod=~"(experts-canary|experts-baseline)-[24-9b-df-hj-np-tv-xz]{1,10}-[24-9b-df-hj-np-tv-xz]{5}""#;
        assert_eq!(
            trial(ratio(), "shop", "experts-canary", Some("experts-baseline")).queries(),
            [
                format!(r#"http_errors_total{{{pods},code=~"5.."}}"#),
                format!("http_requests_total{{{pods}}} # all of them"),
                format!("timestamp(http_requests_total{{{pods}}} # all of them\n)"),
            ]
        );
        for test in [ratio(), latency()] {
            assert!(trial(test, "shop", "experts-canary", None).queries().is_empty());
        }
    }

    #[test]
    fn a_latency_reads_the_frozen_bounds_only() {
        let pods = r#"namespace="shop",pod=~"(c|b)-[24-9b-df-hj-np-tv-xz]{1,10}-[24-9b-df-hj-np-tv-xz]{5}""#;
        let learned = |native| api::Preflight {
            kpi: "errors".to_owned(),
            track: api::Track::Production,
            reads: String::new(),
            until: 0,
            pods: 0,
            cautious_until: None,
            spread: vec![],
            bounds: vec!["0.25".to_owned(), "1".to_owned()],
            native,
            shares: vec![],
            requests: 0.0,
        };
        let trial =
            |native| Trial { preflight: Some(learned(native)), ..trial(latency(), "shop", "c", Some("b")) };
        assert_eq!(
            trial(false).queries(),
            [
                format!(r#"d_bucket{{{pods},le=~"0\\.25|1|1\\.0|\\+Inf"}}"#),
                format!("timestamp(d_bucket{{{pods},le=\"+Inf\"}}\n)"),
            ]
        );
        assert_eq!(
            trial(true).queries(),
            [format!("d_bucket{{{pods}}}"), format!("timestamp(d_bucket{{{pods}}}\n)")]
        );
    }

    #[test]
    fn a_threshold_reads_each_arm_apart_and_a_gauge_both() {
        let query = "max(a{$arm}) / max(b{$arm})".to_owned();
        let threshold = Test::Threshold { query, bound: Bound::Max(1.0), consecutive: 1 };
        let pods = |arm: &str| format!(r#"namespace="shop",pod=~"({arm})-{HASH}""#);
        let of = |arm: &str| format!("max(a{{{0}}}) / max(b{{{0}}})", pods(arm));
        assert_eq!(trial(threshold.clone(), "shop", "c", Some("b")).queries(), [of("c"), of("b")]);
        assert_eq!(trial(threshold, "shop", "c", None).queries(), [of("c")]);
        let gauge = Test::Gauge {
            query: "rate(a{$arm}[$window])".to_owned(),
            direction: api::Direction::LowerIsBetter,
            tolerance: 0.05,
        };
        let both = pods("c|b");
        assert_eq!(trial(gauge, "shop", "c", Some("b")).queries(), [format!("rate(a{{{both}}}[60s])")]);
    }

    #[test]
    fn names_cannot_leave_their_string() {
        let hostile = trial(ratio(), "a\"} or up{x=\"\\", "b.c|.*", Some("d\n\"$arm"));
        let expanded = &hostile.queries()[0];
        assert_eq!(
            expanded,
            "http_errors_total{namespace=\"a\\\"} or up{x=\\\"\\\\\",pod=~\"(b\\\\.c\\\\|\\\\.\\\\*|d\\n\\\"\\\\$arm)-[24-9b-df-hj-np-tv-xz]{1,10}-[24-9b-df-hj-np-tv-xz]{5}\",code=~\"5..\"}"
        );
    }

    proptest! {
        #[test]
        fn a_quoted_text_reads_back(text in any::<String>()) {
            let quoted = quoted(&text);
            let mut inner = quoted[1..quoted.len() - 1].chars();
            let mut read = String::new();
            while let Some(c) = inner.next() {
                prop_assert!(c != '"' && c != '\n');
                read.push(match c {
                    '\\' => match inner.next() { Some('n') => '\n', Some(c) => c, None => panic!("ends in a backslash") },
                    c => c,
                });
            }
            prop_assert_eq!(read, text);
        }
    }
}
