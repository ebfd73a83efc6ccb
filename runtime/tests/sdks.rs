//! The runtime between public SDKs: OpenAI's as its client, MCP's as a server behind it.
//!
//! Installs both from PyPI into one virtual environment below the target directory, once. Skipped, and said so, where
//! there is no python3.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use common::{config, query, start};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    sync::Notify,
    time::timeout,
};

const PLACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sdks");

async fn run(command: &mut Command) -> String {
    command.stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
    let output = timeout(Duration::from_secs(300), command.output()).await.expect("it ends in time").unwrap();
    assert!(output.status.success(), "{command:?} failed");
    String::from_utf8(output.stdout).unwrap()
}

/// The Python that has the SDKs; none where there is no Python at all.
async fn python() -> Option<PathBuf> {
    if Command::new("python3").arg("--version").output().await.is_err() {
        eprintln!("skipped: there is no python3");
        return None;
    }
    let requirements = Path::new(PLACE).join("requirements.txt");
    let digest = Sha256::digest(std::fs::read(&requirements).unwrap());
    let folder =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sdks-{:02x}{:02x}", digest[0], digest[1]));
    let python = folder.join("bin/python");
    // Tests of this file may run at once, in one process or several.
    let locked = std::fs::File::create(folder.with_extension("lock")).unwrap();
    let locked = tokio::task::spawn_blocking(move || locked.lock().map(|()| locked)).await.unwrap().unwrap();
    let ready = folder.join("ready");
    if !ready.exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder)).await;
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"];
        run(Command::new(&python).args(install).arg(&requirements)).await;
        std::fs::write(ready, "").unwrap();
    }
    drop(locked);
    Some(python)
}

/// A model that behaves as its name says. A piece of a stream is only sent when the one before was acknowledged.
struct Model {
    acknowledged: Notify,
    limited: AtomicUsize,
}

async fn complete(State(model): State<Arc<Model>>, Json(asked): Json<Value>) -> Response {
    let limit =
        |after: &'static str| (StatusCode::TOO_MANY_REQUESTS, [("retry-after", after)]).into_response();
    let name = asked["model"].as_str().unwrap().to_owned();
    if name == "limited" || (name == "limited-once" && model.limited.fetch_add(1, Ordering::Relaxed) == 0) {
        return limit(if name == "limited" { "60" } else { "0" });
    }
    if asked["temperature"].as_f64().is_some_and(|t| t > 2.0) {
        let error = json!({"message": "too hot", "type": "invalid_request_error", "param": "temperature", "code": "hot"});
        return (StatusCode::BAD_REQUEST, Json(json!({"error": error}))).into_response();
    }
    let completion = |object: &str, choice: Value| json!({"id": "1", "object": object, "created": 1, "model": name, "choices": [choice]});
    if asked["stream"] != true {
        let message = json!({"role": "assistant", "content": asked["messages"][0]["content"]});
        let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        return Json(completion("chat.completion", choice)).into_response();
    }
    let mut events: Vec<Result<String, &str>> = ["A", "B", "C"]
        .map(|text| {
            let choice = json!({"index": 0, "delta": {"content": text}, "finish_reason": null});
            Ok(format!("data: {}\n\n", completion("chat.completion.chunk", choice)))
        })
        .into();
    events.push(if name == "broken" { Err("pulled the plug") } else { Ok("data: [DONE]\n\n".to_owned()) });
    let stream = futures::stream::unfold((0, events.into_iter()), move |(n, mut events)| {
        let model = model.clone();
        async move {
            let event = events.next()?;
            if n > 0 {
                model.acknowledged.notified().await;
            }
            Some((event.map(Bytes::from), (n + 1, events)))
        }
    });
    ([("content-type", "text/event-stream")], Body::from_stream(stream)).into_response()
}

async fn model() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let model = Arc::new(Model { acknowledged: Notify::new(), limited: AtomicUsize::new(0) });
    let acknowledge = async |State(model): State<Arc<Model>>| model.acknowledged.notify_one();
    let router = Router::new()
        .route("/v1/chat/completions", post(complete))
        .route("/acknowledge", get(acknowledge))
        .with_state(model);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openai_streams_through_the_runtime() {
    let Some(python) = python().await else { return };
    let model = model().await;
    let folder = common::Folder::new();
    let digest: String = Sha256::digest("good key").iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(folder.0.join("keys"), format!("sdk:{digest}")).unwrap();
    let running = start(&config(model, |config| {
        config["experts"] = ["echo", "broken", "limited", "limited-once"]
            .map(|name| json!({"name": name, "kind": "openai", "url": format!("http://{model}/v1"), "model": name}))
            .into_iter()
            .collect();
        config["server"]["apiKeys"] = json!({"file": folder.0.join("keys")});
    }))
    .await;
    let script = Path::new(PLACE).join("chat.py");
    let said = run(Command::new(python)
        .arg(script)
        .arg(format!("http://{}/v1", running.serving))
        .arg(format!("http://{model}/acknowledge")))
    .await;
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&said["whole"], &said["request_id"], &said["retried"]),
        (&"Hi".into(), &true.into(), &"Hi".into())
    );
    assert_eq!(said["pieces"], json!(["A", "B", "C"]));
    for (what, kind, status, code, words) in [
        (
            "unknown_model",
            "NotFoundError",
            404,
            "model_not_found",
            "there is no model \"none\"; there are: echo",
        ),
        ("wrong_key", "AuthenticationError", 401, "key", "authorization: Bearer"),
        ("refused_by_model", "BadRequestError", 400, "hot", "too hot"),
        ("limited", "RateLimitError", 429, "expert", "429"),
    ] {
        let error = &said[what];
        assert_eq!(
            (&error["kind"], &error["status"], &error["code"]),
            (&kind.into(), &status.into(), &code.into())
        );
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
    let broken = &said["broken"];
    assert_eq!(broken["kind"], "APIError", "{broken}");
    assert!(broken["message"].as_str().unwrap().contains("expert broken"), "{broken}");
}

/// The server's process, and its address. It ends with its input, and so with this test, however that ends.
async fn mcp_server(python: &Path, answers: &str) -> (Child, SocketAddr) {
    let mut child = Command::new(python)
        .arg(Path::new(PLACE).join("mcp_server.py"))
        .arg(answers)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = timeout(Duration::from_secs(60), lines.next_line()).await.expect("it starts in time").unwrap();
    let line: Value = serde_json::from_str(&line.expect("its port")).unwrap();
    let port = line["port"].as_u64().unwrap() as u16;
    (child, SocketAddr::from(([127, 0, 0, 1], port)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_mcp_server_answers_the_runtime_in_both_revisions() {
    let Some(python) = python().await else { return };
    for answers in ["json", "events"] {
        let (mut child, server) = mcp_server(&python, answers).await;
        for protocol in ["auto", "stateless", "session"] {
            let tool = |name: &str, tool: &str, argument: Option<&str>| {
                let mut expert = json!({"name": name, "kind": "mcp", "url": format!("http://{server}/mcp"),
                    "tool": tool, "protocol": protocol});
                if let Some(argument) = argument {
                    expert["argument"] = argument.into();
                }
                expert
            };
            let running = start(&config(server, |config| {
                config["experts"] = json!([
                    tool("facts", "facts", None),
                    tool("shout", "shout", Some("question")),
                    tool("fail", "fail", Some("question")),
                    tool("wrong", "add", Some("question")),
                ]);
                config["dispatch"] = json!({"quorum": 2});
            }))
            .await;
            for n in 0..2 {
                let mut query = query(n);
                query["noCache"] = true.into();
                let reply = running.ask(&query).await;
                assert_eq!(reply.status, 200, "{reply:?}");
                let reply = reply.json();
                let answers = &reply["answers"];
                assert_eq!(answers[0]["answer"], common::query(n), "{protocol}: {answers}");
                assert_eq!(answers[1]["answer"], json!({"result": "WHY?"}), "{answers}");
                for (i, words) in [(2, "out of paper"), (3, "validation error")] {
                    assert_eq!(answers[i]["error"], "status", "{answers}");
                    assert!(answers[i]["detail"].as_str().unwrap().contains(words), "{answers}");
                }
            }
        }
        child.stdin.take().unwrap().shutdown().await.unwrap();
        let ended = timeout(Duration::from_secs(10), child.wait()).await.expect("it ends with its input");
        assert!(ended.unwrap().success());
    }
}
