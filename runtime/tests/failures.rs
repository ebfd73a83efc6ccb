//! Experts that fail, clients that misbehave, too much at once, and the end.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{
    config, eventually, get, instant, mocks, post, query, scripted, slow, start, start_with, switch, try_post,
};
use hyper::Request;
use serde_json::{Value, json};
use synthex_runtime::server::Patience;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

fn one(expert: SocketAddr, change: impl FnOnce(&mut Value)) -> Value {
    config(expert, |c| {
        c["experts"] =
            json!([{"name": "alpha", "url": format!("http://{expert}/alpha"), "timeout": "300ms"}]);
        change(c);
    })
}

#[tokio::test]
async fn each_way_an_expert_fails_has_its_name() {
    // A port on which nobody listens.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (expert, error, status, words) in [
        (closed, "connect", 502, "cannot connect"),
        (scripted(b"", false).await, "timeout", 504, "no answer within 300ms"),
        (scripted(b"", true).await, "connect", 502, "broke"),
        (scripted(b"nonsense\r\n\r\n", true).await, "connect", 502, "broke"),
        (scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", true).await, "connect", 502, "broke"),
        (scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", false).await, "timeout", 504, "300ms"),
        (
            scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n{", false).await,
            "invalid",
            502,
            "larger",
        ),
        (
            scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\noops", false).await,
            "invalid",
            502,
            "no JSON",
        ),
        (
            scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n\"\xff\"", false).await,
            "invalid",
            502,
            "no JSON",
        ),
        (scripted(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", false).await, "status", 502, "503"),
        (
            scripted(b"HTTP/1.1 301 Go\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", false).await,
            "status",
            502,
            "301",
        ),
    ] {
        for unified in [false, true] {
            let running = start(&one(expert, |c| switch(c, unified, unified, false))).await;
            let reply = running.ask(&query(1)).await;
            assert_eq!(reply.status, status, "{reply:?}");
            assert_eq!(reply.header("content-type"), "application/problem+json");
            assert_eq!(reply.header("x-synthex-instance"), "test-pod");
            let body = reply.json();
            assert_eq!(body["status"], status);
            assert_eq!(body["answers"][0]["error"], error, "{body}");
            assert!(body["answers"][0]["detail"].as_str().unwrap().contains(words), "{body}");
            let series =
                format!("synthex_runtime_upstream_requests_total{{service=\"alpha\",outcome=\"{error}\"}}");
            assert_eq!(running.metric(&series).await, 1.0);
            assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="error"}"#).await, 1.0);
            assert_eq!(running.metric("synthex_runtime_cache_entries").await, 0.0, "failures are not cached");
        }
    }
}

/// An expert that answers with `head`, then with `piece` for ever or for `times`, and then cuts the connection hard.
async fn flooding(head: &'static str, piece: impl Into<String>, times: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, piece) = (listener.local_addr().unwrap(), piece.into());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let piece = piece.clone();
            tokio::spawn(async move {
                let mut request = [0; 65_536];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                let _ = stream.write_all(head.as_bytes()).await;
                let pieces = piece.repeat(1 + 65_536 / piece.len().max(1));
                for _ in 0..times {
                    let piece = if times == usize::MAX { &pieces } else { &piece };
                    if stream.write_all(piece.as_bytes()).await.is_err() {
                        return;
                    }
                }
                // No time to linger: what is left unsent is thrown away, and the peer gets a reset.
                stream.set_zero_linger().unwrap();
            });
        }
    });
    address
}

#[tokio::test]
async fn floods_and_resets_of_an_expert_are_bounded_failures() {
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = format!("8000\r\n{}\r\n", "1".repeat(0x8000));
    for (head, piece, times, error, words) in [
        (CHUNKED, &*chunk, usize::MAX, "invalid", "larger"),
        (CHUNKED, "1\r\n1\r\n", 3, "connect", "broke"),
        ("HTTP/1.1 200 OK\r\n\r\n", "1", usize::MAX, "invalid", "larger"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", "1", 3, "connect", "broke"),
        ("", "HTTP/1.1 100 Continue\r\n\r\n", usize::MAX, "timeout", "300ms"),
        ("HTTP/1.1 200 OK\r\n", "x: y\r\n", usize::MAX, "connect", "broke"),
        ("", "", 0, "connect", "broke"),
    ] {
        let expert = flooding(head, piece, times).await;
        for unified in [false, true] {
            let running = start(&one(expert, |c| switch(c, false, unified, false))).await;
            let answer = running.ask(&query(1)).await.json()["answers"][0].clone();
            assert_eq!(answer["error"], error, "{answer} to {head:?} {piece:.40?}");
            assert!(answer["detail"].as_str().unwrap().contains(words), "{answer} to {head:?} {piece:.40?}");
            eventually("the connection is gone", async || {
                let open = r#"synthex_runtime_upstream_connections_open{service="alpha"}"#;
                (running.metric(open).await == 0.0).then_some(())
            })
            .await;
        }
    }
}

/// Requests that are almost right, on the wire: each is answered or cut, and the next client is served.
#[tokio::test]
async fn mutated_requests_neither_crash_nor_hang() {
    let experts = mocks(instant()).await;
    let short = Duration::from_millis(100);
    let patience = Patience { header: short, body: short, ..Patience::default() };
    let running = start_with(&config(experts, |_| {}), patience).await;
    let whole: Vec<u8> = [
        "POST /v1/queries HTTP/1.1\r\nhost: x\r\ncontent-length: 43\r\n\r\n{\"title\":\"t\",\"content\":\"c\",\"requester\":\"r\"}",
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nd\r\n{\"model\":\"m\"}\r\n0\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n",
    ]
    .concat()
    .into();
    let runner = &mut proptest::test_runner::TestRunner::deterministic();
    use proptest::{prelude::*, strategy::ValueTree};
    let change =
        (0..whole.len(), prop::sample::select(vec![0_u8, 9, 10, 13, 32, 34, 48, 57, 58, 127, 255]), 0..3);
    let changes = prop::collection::vec(change, 1..4);
    let asked = (0..300).map(|_| {
        let mut bytes = whole.clone();
        for (at, byte, what) in changes.new_tree(runner).unwrap().current() {
            match what {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, byte),
            }
            bytes.resize(whole.len(), b'\n');
        }
        bytes
    });
    let (to, asked) = (running.serving, asked.collect::<Vec<_>>());
    for some in asked.chunks(30) {
        let replies =
            futures::future::join_all(some.iter().map(async |bytes| (bytes, raw(to, bytes).await))).await;
        for (bytes, reply) in replies {
            let sane = reply.is_empty() || reply.starts_with("HTTP/1.");
            assert!(sane, "{reply:?} to {:?}", String::from_utf8_lossy(bytes));
        }
    }
    eventually("nothing in flight", async || {
        (running.metric("synthex_runtime_inflight_queries").await == 0.0).then_some(())
    })
    .await;
    assert_eq!(running.ask(&query(1)).await.status, 200);
}

/// Headers come byte by byte without end: bounded, and a failure as any other.
#[tokio::test]
async fn an_endless_header_is_cut() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let expert = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nx: ").await;
                while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
            });
        }
    });
    let running = start(&one(expert, |_| {})).await;
    assert_eq!(running.ask(&query(1)).await.json()["answers"][0]["error"], "connect");
}

#[tokio::test]
async fn an_expert_that_closes_idle_connections_costs_no_query() {
    let says = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    for unified in [false, true] {
        let running = start(&one(scripted(says, true).await, |c| switch(c, false, unified, false))).await;
        for n in 0..20 {
            let reply = running.ask(&query(n)).await;
            assert_eq!(reply.status, 200, "{reply:?}");
            // The expert closes right after its answer: the runtime must have heard of it before the next query.
            eventually("the close is noticed", async || {
                let open =
                    running.metric(r#"synthex_runtime_upstream_connections_open{service="alpha"}"#).await;
                (open == 0.0).then_some(())
            })
            .await;
        }
        let opened = r#"synthex_runtime_upstream_connections_opened_total{service="alpha"}"#;
        assert_eq!(running.metric(opened).await, 20.0);
    }
}

#[tokio::test]
async fn connections_are_used_again() {
    let experts = mocks(instant()).await;
    for unified in [false, true] {
        let running = start(&config(experts, |c| switch(c, false, unified, false))).await;
        for n in 0..20 {
            assert_eq!(running.ask(&query(n)).await.status, 200);
        }
        let mut opened = 0.0;
        for name in ["alpha", "beta", "gamma"] {
            let series = format!("synthex_runtime_upstream_connections_opened_total{{service=\"{name}\"}}");
            opened += running.metric(&series).await;
            let series = format!("synthex_runtime_upstream_acquire_seconds_count{{service=\"{name}\"}}");
            assert_eq!(running.metric(&series).await, 20.0);
        }
        assert!(opened <= 6.0, "{opened} connections for 60 calls, one after the other");
    }
}

/// An expert of the seed's kind, and a model: what they are sent, and that their answers are passed on.
#[tokio::test]
async fn each_kind_is_asked_in_its_own_way() {
    let expert = mocks(instant()).await;
    for (entry, path, body) in [
        (
            json!({"url": format!("http://{expert}/api/"), "tool": "search"}),
            "/api/tools/search",
            r#"{"title":"Question 1","content":"why?","requester":"tester"}"#,
        ),
        (
            json!({"url": format!("http://{expert}/v1"), "kind": "openai", "model": "m\"1"}),
            "/v1/chat/completions",
            r#"{"model":"m\"1","messages":[{"role":"user","content":"Question 1\n\nwhy?"}]}"#,
        ),
    ] {
        let running = start(&config(expert, |c| {
            c["experts"] = json!([entry]);
            c["experts"][0]["name"] = "alpha".into();
        }))
        .await;
        let answer = running.ask(&query(1)).await.json()["answers"][0]["answer"].clone();
        assert_eq!(answer["path"], path);
        assert_eq!(answer["digest"], common::digest(path, body));
        assert_eq!(running.ask(&query(1)).await.json()["answers"][0]["cached"], true);
    }
}

/// Counts requests, and answers the first `refused` of them with `says`.
async fn refusing(refused: usize, says: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = counted.clone();
            tokio::spawn(async move {
                let mut request = [0; 65_536];
                while stream.read(&mut request).await.is_ok_and(|n| n > 0) {
                    let says = match count.fetch_add(1, Ordering::Relaxed) < refused {
                        true => says,
                        false => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
                    };
                    stream.write_all(says.as_bytes()).await.unwrap();
                }
            });
        }
    });
    (address, count)
}

#[tokio::test]
async fn only_what_did_nothing_is_tried_again() {
    const RETRIES: &str = r#"synthex_runtime_upstream_retries_total{service="alpha"}"#;
    for (says, max, refused, status, requests) in [
        ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", 1, 1, 200, 2),
        ("HTTP/1.1 429 No\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n", 2, 2, 200, 3),
        ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", 2, 9, 502, 3),
        ("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", 0, 1, 502, 1),
        // Longer than the call may take.
        ("HTTP/1.1 503 No\r\nretry-after: 9\r\ncontent-length: 0\r\n\r\n", 1, 1, 502, 1),
        // It may have done something.
        ("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", 1, 1, 502, 1),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{", 1, 1, 502, 1),
    ] {
        let (expert, count) = refusing(refused, says).await;
        let running = start(&one(expert, |c| {
            c["experts"][0]["timeout"] = "5s".into();
            c["dispatch"] = json!({"retries": {"max": max, "backoff": "1ms"}});
        }))
        .await;
        assert_eq!(running.ask(&query(1)).await.status, status, "{says:?}");
        assert_eq!(count.load(Ordering::Relaxed), requests, "{says:?}");
        assert_eq!(running.metric(RETRIES).await, (requests - 1) as f64);
    }
}

#[tokio::test]
async fn retries_stay_within_their_budget() {
    let (expert, count) = refusing(usize::MAX, "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await;
    let running = start(&one(expert, |c| {
        c["dispatch"] = json!({"retries": {"backoff": "1ms"}, "breaker": {"enabled": false}});
    }))
    .await;
    for n in 0..100 {
        assert_eq!(running.ask(&query(n)).await.status, 502);
    }
    let requests = count.load(Ordering::Relaxed);
    assert!(
        (110..=120).contains(&requests),
        "{requests} requests for 100 queries: ten, and ten in a hundred more"
    );
}

#[tokio::test]
async fn the_breaker_leaves_a_failing_expert_alone_and_tries_it_again() {
    let (expert, count) = refusing(4, "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n").await;
    let running = start(&one(expert, |c| {
        c["dispatch"] = json!({"breaker": {"failures": 3, "openFor": "200ms"}});
    }))
    .await;
    let state = async |name: &str| {
        running.metric(&format!("synthex_runtime_breaker_state{{service=\"alpha\",state=\"{name}\"}}")).await
    };
    assert_eq!(state("closed").await, 1.0);
    for n in 0..3 {
        assert_eq!(running.ask(&query(n)).await.json()["answers"][0]["error"], "status");
    }
    assert_eq!((state("closed").await, state("open").await), (0.0, 1.0));
    let refused = running.ask(&query(3)).await;
    assert_eq!(refused.json()["answers"][0]["error"], "open", "{refused:?}");
    assert_eq!((refused.status.as_u16(), count.load(Ordering::Relaxed)), (503, 3), "nobody was asked");
    // What was learnt outlives a configuration that leaves the expert as it is.
    running
        .apply(&one(expert, |c| {
            c["dispatch"] = json!({"breaker": {"failures": 3, "openFor": "200ms"}, "deadline": "9s"});
        }))
        .await;
    // The first trial fails as well, the second does not.
    let answered = common::eventually("the breaker closes", async || {
        let reply = running.ask(&query(4)).await;
        (reply.status == 200).then_some(count.load(Ordering::Relaxed))
    });
    assert_eq!(answered.await, 5, "one trial at a time");
    assert_eq!((state("closed").await, state("open").await), (1.0, 0.0));
    assert_eq!(running.metric(r#"synthex_runtime_breaker_opened_total{service="alpha"}"#).await, 2.0);
}

#[tokio::test]
async fn an_expert_is_shown_its_credential_and_nobody_else() {
    let (sent, received) = tokio::sync::mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let expert = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 65_536];
            let n = stream.read(&mut request).await.unwrap();
            sent.send(String::from_utf8_lossy(&request[..n]).into_owned()).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
        }
    });
    let (folder, mut received) = (common::Folder::new(), received);
    let file = folder.0.join("key");
    std::fs::write(&file, "s3cret\n").unwrap();
    let running = start(&one(expert, |c| {
        c["experts"][0]["credential"] = json!({"from": {"file": file}});
    }))
    .await;
    running.ask(&query(1)).await;
    let request = received.recv().await.unwrap();
    assert!(request.contains("authorization: Bearer s3cret\r\n"), "{request}");
    assert!(!running.config().await.to_string().contains("s3cret"));

    // A file that is not there is refused with the field's name, and the old configuration stays.
    running.rewrite(
        &one(expert, |c| c["experts"][0]["credential"] = json!({"from": {"file": "/no/such"}})).to_string(),
    );
    let reason = eventually("refused", async || {
        running.config().await["rejected"]["reason"].as_str().map(str::to_owned)
    })
    .await;
    assert!(reason.contains("experts[0].credential.from") && reason.contains("/no/such"), "{reason}");
}

#[tokio::test]
async fn quorum_decides_between_partial_and_error() {
    let good = mocks(instant()).await;
    let bad = scripted(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", false).await;
    for (quorum, status, verdict) in
        [(json!(1), 200, "partial"), (json!(2), 502, "error"), (Value::Null, 502, "error")]
    {
        let running = start(&config(good, |c| {
            c["experts"] = json!([
                {"name": "good", "url": format!("http://{good}/")},
                {"name": "bad", "url": format!("http://{bad}/")},
            ]);
            if !quorum.is_null() {
                c["dispatch"] = json!({"quorum": quorum});
            }
        }))
        .await;
        let reply = running.ask(&query(1)).await;
        assert_eq!(reply.status, status);
        assert_eq!(reply.answers().as_array().unwrap().len(), 2);
        let series = format!("synthex_runtime_queries_total{{outcome=\"{verdict}\"}}");
        assert_eq!(running.metric(&series).await, 1.0);
        // Only the good one is asked: its one answer is all.
        let mut query = query(2);
        query["experts"] = json!(["good"]);
        assert_eq!(running.ask(&query).await.json()["partial"], false);
    }
}

/// One connection and 100 ms an answer: ten answers a second, and who waits longer than the acquire time-out is told.
#[tokio::test]
async fn one_connection_per_host_saturates_as_busy() {
    let expert = mocks(slow(100)).await;
    let unified = json!({"unified": {"enabled": true, "perHost": 1, "acquireTimeout": "250ms"}});
    let running = Arc::new(
        start(&one(expert, |c| {
            c["optimizations"]["connections"] = unified;
            c["experts"][0]["timeout"] = "20s".into();
        }))
        .await,
    );
    let asked = (0..8).map(|n| {
        let running = running.clone();
        tokio::spawn(async move { running.ask(&query(n)).await })
    });
    let mut ok = 0;
    for reply in futures::future::join_all(asked).await {
        let reply = reply.unwrap();
        match reply.status.as_u16() {
            200 => ok += 1,
            503 => {
                assert_eq!(reply.header("retry-after"), "1");
                assert_eq!(reply.json()["answers"][0]["error"], "busy");
            }
            other => panic!("{other}: {reply:?}"),
        }
    }
    // At 0, 100 and 200 ms a connection is free; at 300 the others have given up.
    assert!((2..=4).contains(&ok), "{ok} were answered");
    let busy = r#"synthex_runtime_upstream_requests_total{service="alpha",outcome="busy"}"#;
    assert_eq!(running.metric(busy).await, f64::from(8 - ok));
    let opened = r#"synthex_runtime_upstream_connections_opened_total{service="alpha"}"#;
    assert_eq!(running.metric(opened).await, 1.0);
}

#[tokio::test]
async fn the_baseline_waits_for_a_connection_until_the_deadline() {
    let expert = mocks(slow(50)).await;
    let running = Arc::new(
        start(&one(expert, |c| {
            c["baseline"] = json!({"perHost": 1});
            c["experts"][0]["timeout"] = "20s".into();
        }))
        .await,
    );
    let asked = (0..8).map(|n| {
        let running = running.clone();
        tokio::spawn(async move { running.ask(&query(n)).await.status })
    });
    for status in futures::future::join_all(asked).await {
        assert_eq!(status.unwrap(), 200);
    }
    running
        .apply(&one(expert, |c| {
            c["baseline"] = json!({"perHost": 1});
            c["dispatch"] = json!({"deadline": "75ms"});
        }))
        .await;
    let asked = (10..14).map(|n| {
        let running = running.clone();
        tokio::spawn(async move { running.ask(&query(n)).await.status.as_u16() })
    });
    let statuses: Vec<u16> =
        futures::future::join_all(asked).await.into_iter().map(|status| status.unwrap()).collect();
    assert!(statuses.contains(&504) && !statuses.contains(&503), "{statuses:?}");
}

#[tokio::test]
async fn too_many_queries_at_once_are_shed() {
    let expert = mocks(slow(10_000)).await;
    let running = Arc::new(
        start(&one(expert, |c| {
            c["server"]["maxInFlight"] = 1.into();
            c["experts"][0]["timeout"] = "1s".into();
        }))
        .await,
    );
    let first = {
        let running = running.clone();
        tokio::spawn(async move { running.ask(&query(1)).await.status })
    };
    eventually("the first is in flight", async || {
        (running.metric("synthex_runtime_inflight_queries").await == 1.0).then_some(())
    })
    .await;
    let second = running.ask(&query(2)).await;
    assert_eq!((second.status.as_u16(), second.header("retry-after")), (503, "1"));
    assert!(second.json()["detail"].as_str().unwrap().contains("1 queries"));
    assert_eq!(get(running.serving, "/livez").await.status, 200, "probes are never shed");
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="shed"}"#).await, 1.0);
    assert_eq!(first.await.unwrap(), 504);
}

#[tokio::test]
async fn hostile_bodies_get_clear_errors() {
    let experts = mocks(instant()).await;
    let running = start(&config(experts, |c| c["server"]["bodyLimit"] = "4KiB".into())).await;
    let nested = format!(
        r#"{{"title":"","content":"","requester":"","metadata":{{"a":{}{}}}}}"#,
        "[".repeat(1_000),
        "]".repeat(1_000)
    );
    let wrong = |field: &str, value: Value| {
        let mut query = query(1);
        query[field] = value;
        query.to_string().into_bytes()
    };
    for (body, status, words) in [
        (vec![b' '; 4097], 413, "4096 bytes"),
        (b"".to_vec(), 400, "EOF"),
        (b"{".to_vec(), 400, "line 1"),
        (b"{\"title\":\"\xff\"}".to_vec(), 400, "unicode"),
        (nested.into_bytes(), 400, "nested deeper than 64"),
        ("[".repeat(4_000).into_bytes(), 400, "query"),
        (b"{}".to_vec(), 400, "missing field `title`"),
        (wrong("surprise", 1.into()), 400, "surprise"),
        (wrong("title", 1.into()), 400, "string"),
        (wrong("experts", json!(["alpha", "nobody"])), 400, "alpha, beta, gamma"),
        (wrong("experts", json!(["alpha", "alpha"])), 400, "twice"),
        (wrong("experts", json!([])), 400, "empty"),
    ] {
        let reply = post(running.serving, body).await;
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.header("content-type"), "application/problem+json");
        assert!(
            reply.json()["detail"].as_str().unwrap().contains(words),
            "{words} is not in {:?}",
            reply.body
        );
    }
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="invalid"}"#).await, 12.0);
    assert_eq!(get(running.serving, "/nowhere").await.status, 404);
    assert_eq!(get(running.serving, "/metrics").await.status, 404, "only on the admin port");
    let wrong_method = get(running.serving, "/v1/queries").await;
    assert_eq!((wrong_method.status.as_u16(), wrong_method.header("allow")), (405, "POST"));
    let wrong_method =
        common::try_send(running.admin, Request::post("/config").body(Default::default()).unwrap());
    assert_eq!(wrong_method.await.unwrap().status, 405);
}

/// Sends bytes as they are, and gives what comes back until the runtime closes the connection.
async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut reply = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut reply)).await;
    let _ = read.expect("the runtime closes the connection");
    String::from_utf8_lossy(&reply).into_owned()
}

#[tokio::test]
async fn slow_and_broken_clients_are_cut() {
    let experts = mocks(instant()).await;
    let short = Duration::from_millis(100);
    let patience = Patience { header: short, body: short, ..Patience::default() };
    let running = start_with(&config(experts, |c| c["server"]["bodyLimit"] = "4KiB".into()), patience).await;
    let to = running.serving;
    assert_eq!(raw(to, b"").await, "", "an idle connection");
    raw(to, b"POST /v1/queries HTTP/1.1\r\nhost: x\r\n").await;
    let slow_body = raw(to, b"POST /v1/queries HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").await;
    assert!(slow_body.starts_with("HTTP/1.1 408") && slow_body.contains("100ms"), "{slow_body}");
    let chunks = format!(
        "POST /v1/queries HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{}",
        format!("400\r\n{}\r\n", "x".repeat(1024)).repeat(6)
    );
    let too_large = raw(to, chunks.as_bytes()).await;
    assert!(too_large.starts_with("HTTP/1.1 413"), "{too_large}");
    let broken =
        raw(to, b"POST /v1/queries HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n").await;
    assert!(broken.starts_with("HTTP/1.1 400"), "{broken}");
    let garbage = raw(to, b"\x16\x03\x01 no HTTP at all\r\n\r\n").await;
    assert!(garbage.starts_with("HTTP/1.1 400"), "{garbage}");
    let headers = format!("GET /livez HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    let large = raw(to, headers.as_bytes()).await;
    assert!(large.is_empty() || large.starts_with("HTTP/1.1 431"), "{large}");
    for (count, status) in [(90, "200"), (110, "431")] {
        let headers = format!("GET /livez HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(count));
        let reply = raw(to, headers.as_bytes()).await;
        assert!(reply.starts_with(&format!("HTTP/1.1 {status}")), "{count} headers: {reply}");
    }
    assert_eq!(running.ask(&query(1)).await.status, 200);
}

#[tokio::test]
async fn an_old_connection_is_closed_after_its_answer() {
    let experts = mocks(instant()).await;
    let running = start(&config(experts, |_| {})).await;
    assert_eq!(running.ask(&query(1)).await.header("connection"), "");
    let patience = Patience { age: Duration::ZERO, ..Patience::default() };
    let running = start_with(&config(experts, |_| {}), patience).await;
    assert_eq!(running.ask(&query(1)).await.header("connection"), "close");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_under_load_loses_no_query() {
    let experts = mocks(slow(30)).await;
    let mut running = start(&config(experts, |c| {
        switch(c, true, true, true);
        c["server"]["drain"]["delay"] = "300ms".into();
    }))
    .await;
    let to = running.serving;
    let (leave, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..8)
        .map(|client| {
            let (leave, answered) = (leave.clone(), answered.clone());
            tokio::spawn(async move {
                // Goes on sending, as clients do, until the load balancer has heard of it.
                for n in 0.. {
                    if leave.load(Ordering::Relaxed) {
                        return;
                    }
                    let reply = try_post(to, query(client * 100_000 + n).to_string()).await;
                    assert_eq!(reply.expect("an answer").status, 200);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let some = async |more: usize| {
        let before = answered.load(Ordering::Relaxed);
        eventually("queries are answered", async || {
            (answered.load(Ordering::Relaxed) >= before + more).then_some(())
        })
        .await;
    };
    some(50).await;
    running.terminate();
    eventually("readiness is gone", async || {
        (get(running.admin, "/readyz").await.status == 503 && get(to, "/readyz").await.status == 503)
            .then_some(())
    })
    .await;
    assert_eq!(get(to, "/livez").await.status, 200);
    some(16).await;
    // The last queries are in flight when the listener closes.
    leave.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(running.done.await.unwrap());
    assert!(TcpStream::connect(to).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_query_in_flight_when_the_listener_closes_is_answered() {
    let experts = mocks(slow(300)).await;
    let mut running = start(&config(experts, |_| {})).await;
    let to = running.serving;
    let asked = tokio::spawn(async move { post(to, query(1).to_string()).await });
    eventually("in flight", async || {
        (running.metric("synthex_runtime_inflight_queries").await == 1.0).then_some(())
    })
    .await;
    running.terminate();
    let reply = asked.await.unwrap();
    assert_eq!((reply.status.as_u16(), reply.header("connection")), (200, "close"));
    assert!(running.done.await.unwrap());
}

#[tokio::test]
async fn a_drain_ends_at_its_time_out() {
    let experts = mocks(slow(60_000)).await;
    let mut running = start(&config(experts, |c| c["server"]["drain"]["timeout"] = "50ms".into())).await;
    let to = running.serving;
    let asked = tokio::spawn(async move { try_post(to, query(1).to_string()).await });
    eventually("in flight", async || {
        (running.metric("synthex_runtime_inflight_queries").await == 1.0).then_some(())
    })
    .await;
    running.terminate();
    assert!(!running.done.await.unwrap(), "a query was cut");
    asked.abort();
}
