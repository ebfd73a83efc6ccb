//! The layers of the house: `decision` is pure, `api` knows neither `decision` nor `effects`, and nothing of the operator knows the
//! plugin. Reads the sources, runs nothing.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What a pure core has no business with.
const IMPURE: [&str; 10] = [
    "kube::Client",
    "Client,",
    "Api<",
    "reqwest",
    "tokio",
    "crate::effects",
    "async fn",
    "::now()",
    "std::fs",
    "std::net::Tcp",
];

fn sources(folder: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = vec![];
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder), &mut found);
    assert!(!found.is_empty(), "src/{folder} has no sources");
    found
}

/// The lines of a source that name what is forbidden; comments may.
fn named<'a>(source: &'a str, forbidden: &'a [&str]) -> Vec<(usize, &'a str)> {
    source
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .flat_map(|(number, line)| {
            forbidden.iter().filter(move |word| line.contains(**word)).map(move |word| (number + 1, *word))
        })
        .collect()
}

fn clean(folder: &str, forbidden: &[&str]) {
    for path in sources(folder) {
        let source = fs::read_to_string(&path).unwrap();
        assert_eq!(named(&source, forbidden), [], "{}", path.display());
    }
}

#[test]
fn decision_is_pure() {
    clean("decision", &IMPURE);
}

#[test]
fn api_knows_no_other_layer() {
    clean("api", &["crate::decision", "crate::effects", "crate::controller", "kube::Client", "::now()"]);
}

/// The plugin asks the operator's functions; were it the other way round, a verdict could depend on where it is asked for.
#[test]
fn the_operator_knows_no_plugin() {
    for path in sources("").iter().filter(|path| !path.components().any(|part| part.as_os_str() == "cli")) {
        let source = fs::read_to_string(path).unwrap();
        assert_eq!(named(&source, &["crate::cli", "synthex_operator::cli"]), [], "{}", path.display());
    }
}

/// What the plugin judges and tells is made of what it was given.
#[test]
fn backtests_and_explanations_are_pure() {
    for name in ["backtest", "dataset", "explain"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/cli/{name}.rs"));
        assert_eq!(named(&fs::read_to_string(path).unwrap(), &IMPURE), [], "{name}");
    }
}

#[test]
fn what_is_forbidden_is_found() {
    let source = "/// see tokio\nuse tokio::time;\nlet now = Timestamp::now();\n    // reqwest\n";
    assert_eq!(named(source, &IMPURE), [(2, "tokio"), (3, "::now()")]);
}
