//! The configuration file changes while the runtime serves.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{os::unix::fs::symlink, time::Instant};

use common::{Folder, config, eventually, instant, mocks, query, replace, start, start_at, switch};
use serde_json::{Value, json};
use synthex_runtime::server::Patience;

#[tokio::test]
async fn a_new_file_is_in_force_at_once() {
    let experts = mocks(instant()).await;
    let running = start(&config(experts, |_| {})).await;
    assert_eq!(running.config().await["generation"], 1);
    let changed = config(experts, |c| switch(c, true, true, true));
    let begun = Instant::now();
    running.apply(&changed).await;
    // The watch noticed it, not the poll of every five seconds.
    assert!(begun.elapsed().as_secs() < 4, "{:?}", begun.elapsed());
    let shown = running.config().await;
    assert_eq!(shown["generation"], 2);
    let schema = common::get(running.admin, "/schema").await;
    assert_eq!(schema.header("content-type"), "application/schema+json");
    assert_eq!(schema.json()["title"], "Config");
    assert_eq!(shown["rejected"], Value::Null);
    assert_eq!(shown["optimizations"]["connections"]["unified"]["enabled"], true);
    assert_eq!(shown["optimizations"]["connections"]["unified"]["keepAlive"], "30s");
    let hash = shown["hash"].as_str().unwrap();
    assert_eq!(running.metric(&format!("synthex_runtime_config_info{{hash=\"{hash}\"}}")).await, 1.0);
    assert_eq!(running.ask(&query(1)).await.status, 200);
}

#[tokio::test]
async fn a_bad_file_is_refused_whole_and_the_old_one_serves() {
    let experts = mocks(instant()).await;
    let good = config(experts, |_| {});
    let running = start(&good).await;
    let hash = running.config().await["hash"].clone();
    let bad: [(String, &str); 4] = [
        ("experts: [".to_owned(), "line"),
        (
            config(experts, |c| c["optimizations"]["connections"] = json!({"unified": {"perHost": 0}}))
                .to_string(),
            "perHost",
        ),
        (
            config(experts, |c| c["server"]["listen"] = "127.0.0.1:1".into()).to_string(),
            "server.listen: cannot change",
        ),
        (String::new(), "empty"),
    ];
    for (i, (content, words)) in bad.iter().enumerate() {
        running.rewrite(content);
        let shown = eventually("the file is refused", async || {
            let shown = running.config().await;
            let expected = synthex_runtime::config::hash(content.as_bytes());
            (shown["rejected"]["hash"] == expected).then_some(shown)
        })
        .await;
        assert!(shown["rejected"]["reason"].as_str().unwrap().contains(words), "{shown}");
        assert_eq!((&shown["hash"], &shown["generation"]), (&hash, &json!(1)));
        let rejected = running.metric(r#"synthex_runtime_config_reloads_total{result="rejected"}"#).await;
        assert_eq!(rejected, (i + 1) as f64);
        assert_eq!(running.ask(&query(i)).await.status, 200);
    }
    std::fs::remove_file(running.path()).unwrap();
    eventually("the missing file is told", async || {
        let shown = running.config().await;
        shown["rejected"]["reason"].as_str()?.contains("cannot be read").then_some(())
    })
    .await;
    assert_eq!(running.ask(&query(9)).await.status, 200);

    running.rewrite(&good.to_string());
    eventually("the good file clears the refusal", async || {
        running.config().await["rejected"].is_null().then_some(())
    })
    .await;
    assert_eq!(running.config().await["generation"], 1);
}

/// As the kubelet writes a ConfigMap: a new folder, and the symlink `..data` swapped.
#[tokio::test]
async fn a_swapped_symlink_is_noticed() {
    let experts = mocks(instant()).await;
    let folder = Folder::new();
    let at = |name: &str| folder.0.join(name);
    let version = |name: &str, config: &Value| {
        std::fs::create_dir(at(name)).unwrap();
        replace(&at(name).join("config.yaml"), &config.to_string());
        symlink(name, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    version("..1", &config(experts, |_| {}));
    symlink("..data/config.yaml", at("config.yaml")).unwrap();
    let path = at("config.yaml");
    let second = config(experts, |c| switch(c, false, true, false));
    version("..2", &second);
    std::fs::remove_dir_all(at("..1")).unwrap();
    let running = start_at(Folder(folder.0.clone()), path, Patience::default()).await;

    let third = config(experts, |c| switch(c, true, true, false));
    let begun = Instant::now();
    version("..3", &third);
    std::fs::remove_dir_all(at("..2")).unwrap();
    let hash = synthex_runtime::config::hash(third.to_string().as_bytes());
    eventually("the third version", async || (running.config().await["hash"] == hash).then_some(())).await;
    assert!(begun.elapsed().as_secs() < 4, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn metrics_follow_the_experts() {
    let experts = mocks(instant()).await;
    let running = start(&config(experts, |_| {})).await;
    let busy = |name: &str| {
        format!("synthex_runtime_upstream_requests_total{{service=\"{name}\",outcome=\"busy\"}}")
    };
    assert_eq!(running.metric(&busy("gamma")).await, 0.0);
    running
        .apply(&config(experts, |c| {
            c["experts"] = json!([{"name": "delta", "url": format!("http://{experts}/delta")}]);
        }))
        .await;
    assert_eq!(running.metric(&busy("delta")).await, 0.0);
    let text = common::get(running.admin, "/metrics").await;
    assert!(!String::from_utf8_lossy(&text.body).contains("gamma"));
    assert_eq!(text.header("content-type"), "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let reply = running.ask(&query(1)).await;
    assert_eq!(reply.answers().as_array().unwrap().len(), 1);
}
