//! Baseline and optimized paths give the same answers, also while they are switched under load.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use common::{Running, config, eventually, instant, mocks, post, query, slow, start, switch};
use serde_json::{Value, json};

/// Every switch, by its group and name.
const SWITCHES: [(&str, &str); 8] = [
    ("memory", "objectPool"),
    ("memory", "cacheTtl"),
    ("memory", "evict"),
    ("memory", "batchLimit"),
    ("connections", "unified"),
    ("monitoring", "adaptiveSampling"),
    ("monitoring", "preAggregation"),
    ("monitoring", "cardinalityLimit"),
];

/// Turns on the switches whose bit is set, and off the others.
fn switches(config: &mut Value, on: u32) {
    for (i, (group, name)) in SWITCHES.into_iter().enumerate() {
        config["optimizations"][group][name] = json!({"enabled": on >> i & 1 == 1});
    }
}

/// Every on and off of each pair, beside all others off and beside all others on.
fn pairs() -> BTreeSet<u32> {
    let mut all = BTreeSet::new();
    for (i, j) in (0..SWITCHES.len()).flat_map(|j| (0..j).map(move |i| (i, j))) {
        for pair in [0, 1 << i, 1 << j, 1 << i | 1 << j] {
            let others = !(1 << i | 1 << j) & ((1 << SWITCHES.len()) - 1);
            all.extend([pair, pair | others]);
        }
    }
    all
}

#[tokio::test]
async fn every_pair_of_switches_gives_the_same_answers() {
    let experts = mocks(instant()).await;
    let long = "é\"\\\n😀".repeat(20_000);
    let bodies = [
        r#"{"title":"t","content":"c","requester":"r"}"#.to_owned(),
        r#"{"requester":"r","content":"\u00e9\u0022\n","title":"","tags":["b","a"],"experts":["gamma","alpha"]}"#.to_owned(),
        r#"{"title":"t","content":"c","requester":"r","metadata":{"z":1.00,"a":{"y":[1, 2.50, 1e400],"x":null}},"tags":[]}"#
            .to_owned(),
        json!({"title": "long", "content": long, "requester": "r", "noCache": true}).to_string(),
    ];
    let mut expected: Option<Vec<Value>> = None;
    for on in pairs() {
        let mut running = start(&config(experts, |c| {
            switches(c, on);
            c["results"] = json!({"url": format!("http://{experts}/results"), "flush": "10ms"});
            c["optimizations"]["connections"]["unified"]["http2"] =
                if on % 3 == 0 { "priorKnowledge" } else { "auto" }.into();
        }))
        .await;
        let mut answers = Vec::new();
        for body in &bodies {
            let first = post(running.serving, body.clone()).await;
            assert_eq!(first.status, 200, "{first:?}");
            assert_eq!(first.header("x-synthex-instance"), "test-pod");
            assert_eq!(first.json()["partial"], false);
            let second = post(running.serving, body.clone()).await;
            let cached = second.json()["answers"][0]["cached"].as_bool();
            assert_eq!(cached, Some(!body.contains("noCache")), "the second answer comes from the cache");
            assert_eq!(first.answers(), second.answers());
            answers.push(first.answers());
        }
        let same = expected.get_or_insert_with(|| answers.clone());
        assert_eq!(*same, answers, "switches {on:08b}");
        let asked = 2 * bodies.len();
        eventually("every result is handed on", async || {
            let sent = running.metric(r#"synthex_runtime_results_total{result="sent"}"#).await;
            (sent == asked as f64).then_some(())
        })
        .await;
        let of = r#"synthex_runtime_requester_queries_total{requester="r",outcome="ok"}"#;
        assert_eq!(running.metric(of).await, asked as f64);
        running.terminate();
    }
}

/// What the mock at `path` answers to a query of [`query`]'s shape, if it was sent exactly that.
fn digest(path: &str, query: &Value) -> String {
    let text = |field: &str| query[field].to_string();
    let body = format!(
        r#"{{"title":{},"content":{},"requester":{}}}"#,
        text("title"),
        text("content"),
        text("requester")
    );
    common::digest(path, &body)
}

/// The sum of a metric over all its series.
async fn sum(running: &Running, name: &str) -> f64 {
    let text = common::get(running.admin, "/metrics").await.body;
    let text = String::from_utf8(text.to_vec()).unwrap();
    let series = text.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
    series
        .filter(|(labels, _)| labels.starts_with('{') || labels.is_empty())
        .map(|(_, v)| v.parse::<f64>().unwrap())
        .sum()
}

/// A hundred configurations at random, under load: no error, no answer of another, every count adds up, and at the
/// end nothing is left of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn toggling_under_load_loses_nothing_and_mixes_nothing() {
    let experts = mocks(slow(2)).await;
    let toggled = |on: u32, round: u32| {
        config(experts, |c| {
            switches(c, on);
            c["results"] = json!({"url": format!("http://{experts}/results"), "flush": "20ms"});
            c["optimizations"]["memory"]["cacheTtl"]["maxEntries"] = (10 + round).into();
            let unified = &mut c["optimizations"]["connections"]["unified"];
            unified["http2"] = if on & 0x100 == 0 { "auto" } else { "priorKnowledge" }.into();
            unified["percent"] = [100, 50, 1][round as usize % 3].into();
        })
    };
    let running = Arc::new(start(&toggled(0, 0)).await);
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let (running, stop, sent) = (running.clone(), stop.clone(), sent.clone());
            tokio::spawn(async move {
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let mut query = query(n % 20);
                    query["requester"] = format!("client {client}").into();
                    query["content"] = "x".repeat((n * 997) % 30_000).into();
                    let reply = running.ask(&query).await;
                    assert_eq!(reply.status, 200, "{reply:?}");
                    let answers = reply.json()["answers"].clone();
                    for (answer, path) in
                        answers.as_array().unwrap().iter().zip(["/alpha", "/beta", "/gamma"])
                    {
                        assert_eq!(answer["answer"]["digest"], digest(path, &query), "another's answer");
                    }
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut random = 1_u32;
    for round in 1..=100 {
        // Numerical Recipes' generator: the same toggles in each run.
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let seen = sent.load(Ordering::Relaxed);
        running.apply(&toggled(random >> 16, round)).await;
        eventually("some queries under these switches", async || {
            (sent.load(Ordering::Relaxed) > seen + 4 || clients.iter().any(|c| c.is_finished())).then_some(())
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let total = sent.load(Ordering::Relaxed) as f64;
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="ok"}"#).await, total);
    assert_eq!(sum(&running, "synthex_runtime_queries_total").await, total);
    assert_eq!(sum(&running, "synthex_runtime_requester_queries_total").await, total);
    assert_eq!(running.metric("synthex_runtime_inflight_queries").await, 0.0);
    assert_eq!(running.metric(r#"synthex_runtime_config_reloads_total{result="applied"}"#).await, 100.0);
    // Each expert was asked once a query, or its answer was in the cache; each call got a connection.
    let calls = sum(&running, "synthex_runtime_upstream_requests_total").await;
    let hits = running.metric(r#"synthex_runtime_cache_requests_total{result="hit"}"#).await;
    assert_eq!(calls + hits, 3.0 * total);
    assert!(sum(&running, "synthex_runtime_upstream_acquired_total").await >= calls);
    let taken = sum(&running, "synthex_runtime_pool_acquired_total").await;
    assert!(running.metric(r#"synthex_runtime_pool_acquired_total{result="hit"}"#).await > 0.0);
    assert!(sum(&running, "synthex_runtime_pool_released_total").await <= taken);

    // All off at last: nothing of what was on is left.
    running.apply(&toggled(0, 0)).await;
    eventually("results are handed on, old pools drain", async || {
        let sent = running.metric(r#"synthex_runtime_results_total{result="sent"}"#).await;
        let open = sum(&running, "synthex_runtime_upstream_connections_open").await;
        (sent == total && open <= 30.0).then_some(())
    })
    .await;
    assert_eq!(running.metric("synthex_runtime_results_pending").await, 0.0);
    assert_eq!(running.metric("synthex_runtime_pool_objects").await, 0.0);
    assert_eq!(running.metric("synthex_runtime_pool_held_bytes").await, 0.0);
}

#[tokio::test]
async fn two_requesters_never_share_a_cached_answer() {
    let experts = mocks(instant()).await;
    for memory in [false, true] {
        let running = start(&config(experts, |c| switch(c, memory, true, true))).await;
        let mut one = query(1);
        let first = running.ask(&one).await.json();
        one["requester"] = "another".into();
        let second = running.ask(&one).await.json();
        assert_eq!(second["answers"][0]["cached"], false);
        assert_ne!(first["answers"][0]["answer"], second["answers"][0]["answer"]);
    }
}
