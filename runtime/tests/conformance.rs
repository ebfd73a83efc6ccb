//! Baseline and optimized paths give the same answers, also while they are switched under load.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use common::{config, instant, mocks, post, query, slow, start, switch};
use serde_json::{Value, json};

const COMBINATIONS: [(bool, bool, bool); 8] = [
    (false, false, false),
    (true, false, false),
    (false, true, false),
    (false, false, true),
    (true, true, false),
    (true, false, true),
    (false, true, true),
    (true, true, true),
];

#[tokio::test]
async fn every_combination_of_switches_gives_the_same_answers() {
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
    for (memory, connections, monitoring) in COMBINATIONS {
        let running = start(&config(experts, |c| switch(c, memory, connections, monitoring))).await;
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
        assert_eq!(*same, answers, "memory {memory}, connections {connections}, monitoring {monitoring}");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switching_under_load_loses_no_request_and_mixes_no_answers() {
    let experts = mocks(slow(2)).await;
    let base = config(experts, |c| switch(c, false, false, false));
    let running = Arc::new(start(&base).await);
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
    for round in 0..24 {
        let (memory, connections, monitoring) = COMBINATIONS[(round * 5 + 1) % 8];
        let seen = sent.load(Ordering::Relaxed);
        running
            .apply(&config(experts, |c| {
                switch(c, memory, connections, monitoring);
                c["optimizations"]["memory"]["cacheTtl"]["maxEntries"] = (10 + round).into();
            }))
            .await;
        common::eventually("some queries under these switches", async || {
            (sent.load(Ordering::Relaxed) > seen + 10 || clients.iter().any(|c| c.is_finished()))
                .then_some(())
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let total = sent.load(Ordering::Relaxed) as f64;
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="ok"}"#).await, total);
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="error"}"#).await, 0.0);
    assert_eq!(running.metric("synthex_runtime_inflight_queries").await, 0.0);
    assert_eq!(running.metric(r#"synthex_runtime_config_reloads_total{result="applied"}"#).await, 24.0);
    assert!(running.metric(r#"synthex_runtime_pool_acquired_total{result="hit"}"#).await > 0.0);

    // All off at last, and the pools of before are gone with their connections.
    running.apply(&config(experts, |c| switch(c, false, false, false))).await;
    assert_eq!(running.metric("synthex_runtime_pool_objects").await, 0.0);
    common::eventually("old pools drain", async || {
        let open = running.metric(r#"synthex_runtime_upstream_connections_open{service="alpha"}"#).await;
        (open <= 10.0).then_some(())
    })
    .await;
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
