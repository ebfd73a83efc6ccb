//! From a KPI and the arms to PromQL. Pure.

use super::{Arm, Arms, Kpi, Test};

/// What stands for the arms' matchers in a query.
pub(super) const ARM: &str = "$arm";

/// The range queries of one KPI, in the order in which [`super::fold`] takes their answers: errors, total and time of the last
/// sample of total for an error ratio (none without a baseline), the query itself for a threshold.
///
/// One query serves both arms; the answer is split by the name of the pod. The time of a sample is known where `total` is a
/// selector. For any other expression Prometheus gives the time of evaluation, and its samples are always taken as fresh.
pub fn queries(kpi: &Kpi, arms: &Arms) -> Vec<String> {
    match (&kpi.test, &arms.baseline) {
        (Test::ErrorRatio { errors, total, .. }, Some(baseline)) => {
            let matchers = matchers(&arms.namespace, &[&arms.canary, baseline]);
            let total = total.replace(ARM, &matchers);
            // On its own line, the parenthesis cannot be swallowed by a comment at the end of the user's query.
            let times = format!("timestamp({total}\n)");
            vec![errors.replace(ARM, &matchers), total, times]
        }
        (Test::ErrorRatio { .. }, None) => Vec::new(),
        (Test::Threshold { query, .. }, _) => {
            vec![query.replace(ARM, &matchers(&arms.namespace, &[&arms.canary]))]
        }
    }
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

/// Label matchers for the pods of the arms.
fn matchers(namespace: &str, arms: &[&Arm]) -> String {
    let deployments: Vec<String> = arms.iter().map(|arm| literal(&arm.deployment)).collect();
    let pods = format!("({})-[a-z0-9]+-[a-z0-9]+", deployments.join("|"));
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
    use crate::decision::judge::Bound;

    fn arms(namespace: &str, canary: &str, baseline: Option<&str>) -> Arms {
        let arm = |name: &str| Arm { deployment: name.to_owned(), pods: 1 };
        Arms { namespace: namespace.to_owned(), canary: arm(canary), baseline: baseline.map(arm) }
    }

    fn kpi(test: Test) -> Kpi {
        Kpi { name: "errors".to_owned(), owner: None, required: true, test }
    }

    fn ratio() -> Kpi {
        kpi(Test::ErrorRatio {
            errors: r#"http_errors_total{$arm,code=~"5.."}"#.to_owned(),
            total: "http_requests_total{$arm} # all of them".to_owned(),
            tolerance: 1.25,
            minimum_effect: 0.001,
        })
    }

    #[test]
    fn one_query_serves_both_arms() {
        let pods = r#"namespace="shop",pod=~"(experts-canary|experts-baseline)-[a-z0-9]+-[a-z0-9]+""#;
        assert_eq!(
            queries(&ratio(), &arms("shop", "experts-canary", Some("experts-baseline"))),
            [
                format!(r#"http_errors_total{{{pods},code=~"5.."}}"#),
                format!("http_requests_total{{{pods}}} # all of them"),
                format!("timestamp(http_requests_total{{{pods}}} # all of them\n)"),
            ]
        );
        assert!(queries(&ratio(), &arms("shop", "experts-canary", None)).is_empty());
    }

    #[test]
    fn a_threshold_reads_the_canary_only() {
        let threshold = kpi(Test::Threshold {
            query: "max(a{$arm}) / max(b{$arm})".to_owned(),
            bound: Bound::Max(1.0),
            consecutive: 1,
        });
        let pods = r#"namespace="shop",pod=~"(c)-[a-z0-9]+-[a-z0-9]+""#;
        assert_eq!(
            queries(&threshold, &arms("shop", "c", Some("b"))),
            [format!("max(a{{{pods}}}) / max(b{{{pods}}})")]
        );
    }

    #[test]
    fn names_cannot_leave_their_string() {
        let hostile = arms("a\"} or up{x=\"\\", "b.c|.*", Some("d\n\"$arm"));
        let expanded = &queries(&ratio(), &hostile)[0];
        assert_eq!(
            expanded,
            "http_errors_total{namespace=\"a\\\"} or up{x=\\\"\\\\\",pod=~\"(b\\\\.c\\\\|\\\\.\\\\*|d\\n\\\"\\\\$arm)-[a-z0-9]+-[a-z0-9]+\",code=~\"5..\"}"
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
