//! Chat completions: passed through piece by piece, cancelled with their client, and every way to fail.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use common::{
    Reply, Running, config, eventually, get, instant, mocks, query, scripted, slow, start, try_send,
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

const OK: &str = r#"synthex_runtime_queries_total{outcome="ok"}"#;
const ERROR: &str = r#"synthex_runtime_queries_total{outcome="error"}"#;
const INVALID: &str = r#"synthex_runtime_queries_total{outcome="invalid"}"#;
const INFLIGHT: &str = "synthex_runtime_inflight_queries";
const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// A runtime with the models `m`, at the given addresses.
async fn runtime(experts: &[SocketAddr], change: impl FnOnce(&mut Value)) -> Running {
    start(&config(experts[0], |config| {
        let experts = experts.iter().enumerate().map(|(i, address)| {
            json!({"name": format!("e{i}"), "kind": "openai", "url": format!("http://{address}/v1"), "model": "m",
                "timeout": "300ms"})
        });
        config["experts"] = experts.collect();
        config["dispatch"] = json!({"retries": {"max": 0}});
        change(config);
    }))
    .await
}

fn chat(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post("/v1/chat/completions").body(Full::new(body.into())).unwrap()
}

async fn complete(running: &Running) -> Reply {
    try_send(running.serving, chat(r#"{"model":"m"}"#)).await.unwrap()
}

/// Sends a completion and gives the answer as it comes; dropping it closes the connection.
async fn open(running: &Running) -> Response<Incoming> {
    let stream = TcpStream::connect(running.serving).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = chat(r#"{"model":"m","stream":true}"#);
    request.headers_mut().insert("host", "test".parse().unwrap());
    sender.send_request(request).await.unwrap()
}

/// An expert that says what it is told to, when it is told; the second channel tells when its peer closes.
async fn puppet() -> (SocketAddr, mpsc::UnboundedSender<String>, mpsc::UnboundedReceiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (say, mut told) = mpsc::unbounded_channel::<String>();
    let (closed, closing) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 65_536];
            loop {
                tokio::select! {
                    read = stream.read(&mut request) => if !read.is_ok_and(|n| n > 0) { break },
                    said = told.recv() => match said {
                        Some(text) => stream.write_all(text.as_bytes()).await.unwrap(),
                        None => return,
                    },
                }
            }
            closed.send(()).unwrap();
        }
    });
    (address, say, closing)
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

async fn piece(response: &mut Response<Incoming>) -> String {
    let frame = tokio::time::timeout(Duration::from_secs(5), response.frame()).await.expect("in time");
    String::from_utf8(frame.unwrap().unwrap().into_data().unwrap().to_vec()).unwrap()
}

#[tokio::test]
async fn a_completion_is_passed_on_as_it_is() {
    let expert = mocks(instant()).await;
    let running = runtime(&[expert], |_| {}).await;
    let body = r#" {"messages": [{"role":"user","content":"é\u00e9"}], "model" : "m", "seed": 1.00} "#;
    let reply = try_send(running.serving, chat(body)).await.unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json()["path"], "/v1/chat/completions");
    assert_eq!(reply.json()["digest"], common::digest("/v1/chat/completions", body));
    assert_eq!(reply.header("content-type"), "application/json");
    assert!(!reply.header("x-request-id").is_empty());
    assert_eq!((running.metric(OK).await, running.metric(INFLIGHT).await), (1.0, 0.0));
    // The same expert answers queries as well.
    assert_eq!(running.ask(&query(1)).await.status, 200);
}

#[tokio::test]
async fn a_stream_comes_piece_by_piece() {
    let (expert, say, _closed) = puppet().await;
    let running = runtime(&[expert], |_| {}).await;
    say.send(STREAM.to_owned()).unwrap();
    let mut response = open(&running).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    for n in 0..3 {
        let event = format!("data: {n}\n\n");
        say.send(chunk(&event)).unwrap();
        assert_eq!(piece(&mut response).await, event, "each piece is there before the next is sent");
    }
    assert_eq!((running.metric(OK).await, running.metric(INFLIGHT).await), (0.0, 1.0));
    say.send("0\r\n\r\n".to_owned()).unwrap();
    assert!(response.frame().await.is_none());
    assert_eq!((running.metric(OK).await, running.metric(INFLIGHT).await), (1.0, 0.0));
    let upstream = r#"synthex_runtime_upstream_requests_total{service="e0",outcome="ok"}"#;
    assert_eq!(running.metric(upstream).await, 1.0);
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_call() {
    for head_came in [false, true] {
        let (expert, say, mut closed) = puppet().await;
        let running = runtime(&[expert], |config| config["experts"][0]["timeout"] = "1m".into()).await;
        if head_came {
            say.send(format!("{STREAM}{}", chunk("data: 1\n\n"))).unwrap();
            let mut response = open(&running).await;
            piece(&mut response).await;
        } else {
            let mut stream = TcpStream::connect(running.serving).await.unwrap();
            let request = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 13\r\n\r\n{\"model\":\"m\"}";
            stream.write_all(request.as_bytes()).await.unwrap();
            eventually("in flight", async || (running.metric(INFLIGHT).await == 1.0).then_some(())).await;
        }
        let noticed = tokio::time::timeout(Duration::from_secs(5), closed.recv()).await;
        assert!(noticed.is_ok(), "the expert is told, head came: {head_came}");
        eventually("nothing in flight", async || (running.metric(INFLIGHT).await == 0.0).then_some(())).await;
        assert_eq!(running.metric(OK).await, 0.0);
    }
}

/// An expert that sends as fast as it can, and a client that takes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_waits_for_its_client() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let expert = listener.local_addr().unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 65_536]).await.unwrap() > 0);
        stream.write_all(STREAM.as_bytes()).await.unwrap();
        let piece = chunk(&format!("data: {}\n\n", "x".repeat(64 << 10)));
        while stream.write_all(piece.as_bytes()).await.is_ok() {
            count.fetch_add(piece.len(), Ordering::Relaxed);
        }
    });
    let running = runtime(&[expert], |_| {}).await;
    let mut response = open(&running).await;
    let stalled = eventually("the expert must wait", async || {
        let before = sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
        (before > 0 && sent.load(Ordering::Relaxed) == before).then_some(before)
    })
    .await;
    // What the kernel's buffers of two loopback connections hold, and little more.
    assert!(stalled < 32 << 20, "{stalled} bytes were taken for a client that takes none");
    // A client that was slow for longer than the expert's time-out has not failed.
    for _ in 0..100 {
        assert!(piece(&mut response).await.len() > 1);
    }
}

#[tokio::test]
async fn errors_have_the_shape_that_sdks_read() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let answer =
        |status: &str, headers: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n{headers}\r\n{{}}");
    for (says, status, code, words, counted) in [
        (None, 502, "expert", "cannot connect", ERROR),
        (Some(String::new()), 504, "timeout", "300ms", ERROR),
        (Some("nonsense\r\n\r\n".to_owned()), 502, "expert", "broke", ERROR),
        (Some(answer("401 No", "")), 502, "expert", "401", ERROR),
        (Some(answer("500 No", "")), 502, "expert", "500", ERROR),
        (Some(answer("302 Go", "location: /\r\n")), 502, "expert", "302", ERROR),
        (Some(answer("429 No", "retry-after: 7\r\n")), 429, "expert", "429", ERROR),
        (Some(answer("503 No", "retry-after: 7\r\n")), 503, "expert", "503", ERROR),
    ] {
        let expert = match &says {
            Some(says) => scripted(says.clone(), says.starts_with("nonsense")).await,
            None => closed,
        };
        let running = runtime(&[expert], |_| {}).await;
        let reply = complete(&running).await;
        assert_eq!(reply.status, status, "{says:?}: {reply:?}");
        let error = reply.json()["error"].clone();
        assert_eq!(error["code"], code, "{error}");
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
        assert!(error["type"].is_string() && error["param"].is_null());
        assert_eq!(
            reply.header("retry-after"),
            if says.is_some_and(|s| s.contains("retry")) { "7" } else { "" }
        );
        assert_eq!((running.metric(counted).await, running.metric(INFLIGHT).await), (1.0, 0.0));
    }

    // What the client did wrong the expert says itself.
    let expert = scripted(
        "HTTP/1.1 400 No\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{\"e\": 42}",
        false,
    );
    let running = runtime(&[expert.await], |_| {}).await;
    let reply = complete(&running).await;
    assert_eq!((reply.status.as_u16(), reply.json()["e"].as_i64()), (400, Some(42)));
    for (body, status, words) in [
        (r#"{"model":"n"}"#.as_bytes(), 404, "\"n\""),
        (b"", 400, "EOF"),
        (b"{}", 400, "model"),
        (b"[\"m\"]", 400, "list"),
        (b"{\"model\":\"m\",\"model\":\"m\"}", 400, "duplicate"),
        (b"{\"model\":\"m\",\"x\":\"\xff\"}", 400, "UTF-8"),
        (
            format!("{{\"model\":\"m\",\"x\":{}1{}}}", "[".repeat(99), "]".repeat(99)).as_bytes(),
            400,
            "nested",
        ),
        (&[b'['; 1 << 20], 400, "nested"),
        (&[b' '; (1 << 20) + 1], 413, "1048576"),
    ] {
        let reply = try_send(running.serving, chat(body.to_vec())).await.unwrap();
        assert_eq!(reply.status, status, "{reply:?}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(words), "{reply:?}");
    }
    assert_eq!((running.metric(INVALID).await, running.metric(ERROR).await), (10.0, 0.0));
    assert_eq!(get(running.serving, "/v1/chat/completions").await.status, 405);
}

/// An error after the head can only be told in the body.
#[tokio::test]
async fn a_stream_that_breaks_off_says_so() {
    for (last, words) in [("zz\r\n", "broke"), ("", "nothing came for 300ms")] {
        let (expert, say, _closed) = puppet().await;
        let running = runtime(&[expert], |_| {}).await;
        say.send(format!("{STREAM}{}{last}", chunk("data: 1\n\n"))).unwrap();
        let response = open(&running).await;
        let text = String::from_utf8(response.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let error = text.strip_prefix("data: 1\n\n").unwrap().trim().strip_prefix("data: ").unwrap();
        let error: Value = serde_json::from_str(error).unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(words), "{error}");
        assert_eq!((running.metric(ERROR).await, running.metric(OK).await), (1.0, 0.0));
    }
    // Where the length was announced the connection breaks as well, so that half an answer is not taken for one.
    let expert = scripted("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", true).await;
    let running = runtime(&[expert], |_| {}).await;
    assert!(try_send(running.serving, chat(r#"{"model":"m"}"#)).await.is_err());
    eventually("counted", async || (running.metric(ERROR).await == 1.0).then_some(())).await;
}

#[tokio::test]
async fn a_stream_ends_with_its_deadline() {
    let (expert, say, mut closed) = puppet().await;
    let running = runtime(&[expert], |config| config["dispatch"]["streamDeadline"] = "500ms".into()).await;
    say.send(STREAM.to_owned()).unwrap();
    let told = tokio::spawn(async move {
        // Never silent, and never at its end.
        while closed.is_empty() {
            say.send(chunk("data: 1\n\n")).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        closed.recv().await
    });
    let text = open(&running).await.collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("dispatch.streamDeadline"));
    assert!(told.await.unwrap().is_some());
}

#[tokio::test]
async fn another_expert_of_the_model_stands_in() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let good = mocks(instant()).await;
    for (bad, status) in [
        (closed, 200),
        (scripted("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", false).await, 200),
        (scripted("HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n", false).await, 200),
        // It may have done something: nobody else is asked to do it again.
        (scripted("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", false).await, 502),
        (scripted("", false).await, 504),
    ] {
        let running = runtime(&[bad, good], |_| {}).await;
        assert_eq!(complete(&running).await.status, status);
    }
}

#[tokio::test]
async fn keys_and_rates_hold_for_both_ways_to_ask() {
    let expert = mocks(instant()).await;
    let folder = common::Folder::new();
    let file = folder.0.join("keys");
    let line = |name: &str, key: &str| {
        let digest: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name}:{digest}\n")
    };
    std::fs::write(&file, line("one", "key-1")).unwrap();
    let running = runtime(&[expert], |config| {
        config["server"]["apiKeys"] = json!({"file": file});
        config["server"]["rateLimit"] = json!({"perSecond": 1, "burst": 2});
    })
    .await;
    let send = async |path: &str, key: &str| {
        let body = format!(r#"{{"model":"m","title":"t","content":"c","requester":"{key}"}}"#);
        let body = if path == "/v1/queries" { body.replace(r#""model":"m","#, "") } else { body };
        let request = Request::post(path).header("authorization", format!("Bearer {key}"));
        try_send(running.serving, request.body(Full::new(body.into())).unwrap()).await.unwrap()
    };
    for path in ["/v1/queries", "/v1/chat/completions"] {
        let refused = send(path, "key-2").await;
        assert_eq!((refused.status.as_u16(), refused.header("www-authenticate")), (401, "Bearer"));
        assert!(!String::from_utf8_lossy(&refused.body).contains("key-2"));
    }
    for (path, status) in [("/v1/queries", 200), ("/v1/chat/completions", 200), ("/v1/queries", 429)] {
        let reply = send(path, "key-1").await;
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.header("retry-after"), if status == 429 { "1" } else { "" });
    }
    assert_eq!(running.metric(r#"synthex_runtime_queries_total{outcome="shed"}"#).await, 1.0);
    assert_eq!(running.metric(INVALID).await, 2.0);
    for path in ["/livez", "/readyz", "/openapi.json"] {
        assert_eq!(get(running.serving, path).await.status, 200, "{path} needs no key");
    }
    // A new key is known soon after it is in the file, and the old one is not any more.
    common::replace(&file, &line("two", "key-3"));
    eventually("the keys are read again", async || {
        (send("/v1/queries", "key-1").await.status == 401).then_some(())
    })
    .await;
    assert_eq!(send("/v1/queries", "key-3").await.status, 200);
}

#[tokio::test]
async fn completions_count_as_queries_in_flight() {
    let expert = mocks(slow(200)).await;
    let running = Arc::new(runtime(&[expert], |config| config["server"]["maxInFlight"] = 1.into()).await);
    let first = tokio::spawn({
        let running = running.clone();
        async move { complete(&running).await.status }
    });
    eventually("in flight", async || (running.metric(INFLIGHT).await == 1.0).then_some(())).await;
    let shed = complete(&running).await;
    assert_eq!((shed.status.as_u16(), shed.header("retry-after")), (503, "1"));
    assert_eq!(shed.json()["error"]["code"], "overloaded");
    assert_eq!(first.await.unwrap(), 200);
}
