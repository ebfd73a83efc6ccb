//! The MCP client against a server of rmcp, in both revisions, and against servers that speak it badly.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::{Running, config, query, scripted, start};
use rmcp::{
    ErrorData, ServerHandler,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, ProtocolVersion,
        ServerCapabilities, ServerConfig,
    },
    service::{RequestContext, RoleServer},
    transport::streamable_http_server::{
        StreamableHttpServerConfig, StreamableHttpService, session::local::LocalSessionManager,
    },
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

/// Tools: `echo` gives its arguments back as structured content, `text` as a text, `fail` fails.
#[derive(Clone)]
struct Tools {
    versions: &'static [ProtocolVersion],
    calls: Arc<AtomicUsize>,
}

impl ServerHandler for Tools {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
    }

    fn supported_protocol_versions(&self) -> Cow<'static, [ProtocolVersion]> {
        Cow::Borrowed(self.versions)
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let arguments = Value::Object(request.arguments.unwrap_or_default());
        match &*request.name {
            "echo" => Ok(CallToolResult::structured(arguments).into()),
            "text" => Ok(CallToolResult::success(vec![ContentBlock::text(arguments.to_string())]).into()),
            "fail" => Ok(CallToolResult::error(vec![ContentBlock::text("out of paper")]).into()),
            _ => Err(ErrorData::invalid_params("no such tool", None)),
        }
    }
}

const STATELESS: &[ProtocolVersion] = &[ProtocolVersion::V_2026_07_28];
const SESSION: &[ProtocolVersion] = &[ProtocolVersion::V_2025_06_18, ProtocolVersion::V_2025_11_25];

/// A server of rmcp, until its task is aborted.
struct Peer {
    address: SocketAddr,
    calls: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

async fn peer(versions: &'static [ProtocolVersion], json: bool) -> Peer {
    peer_on(TcpListener::bind("127.0.0.1:0").await.unwrap(), versions, json)
}

fn peer_on(listener: TcpListener, versions: &'static [ProtocolVersion], json: bool) -> Peer {
    let calls = Arc::new(AtomicUsize::new(0));
    let tools = Tools { versions, calls: calls.clone() };
    let settings = StreamableHttpServerConfig::default().with_json_response(json);
    let service = StreamableHttpService::new(
        move || Ok(tools.clone()),
        Arc::<LocalSessionManager>::default(),
        settings,
    );
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().nest_service("/mcp", service);
    let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Peer { address, calls, task }
}

/// A runtime whose only expert is a tool.
async fn runtime(server: SocketAddr, tool: &str, change: impl FnOnce(&mut Value)) -> Running {
    start(&config(server, |config| {
        config["experts"] = json!([
            {"name": "tools", "kind": "mcp", "url": format!("http://{server}/mcp"), "tool": tool, "timeout": "2s"}
        ]);
        change(&mut config["experts"][0]);
    }))
    .await
}

async fn answer(running: &Running, n: usize) -> Value {
    let mut query = query(n);
    query["noCache"] = true.into();
    running.ask(&query).await.json()["answers"][0].clone()
}

#[tokio::test]
async fn a_tool_answers_in_both_revisions() {
    for (versions, protocols) in [(STATELESS, ["auto", "stateless"]), (SESSION, ["auto", "session"])] {
        for json in [false, true] {
            let peer = peer(versions, json).await;
            for protocol in protocols {
                let running = runtime(peer.address, "echo", |e| e["protocol"] = protocol.into()).await;
                for n in 0..5 {
                    let answer = answer(&running, n).await;
                    assert_eq!(answer["answer"], query(n), "{versions:?}, {protocol}, json {json}: {answer}");
                }
                let opened = r#"synthex_runtime_upstream_connections_opened_total{service="tools"}"#;
                // One after the other: after an answer in a stream its end may come later than the next call.
                let opened = running.metric(opened).await;
                assert!(opened <= 4.0, "{versions:?}, {protocol}, json {json}: {opened} connections");
            }
            assert_eq!(peer.calls.load(Ordering::Relaxed), 10);
        }
    }
}

#[tokio::test]
async fn calls_at_once_agree_on_one_session() {
    for versions in [STATELESS, SESSION] {
        let peer = peer(versions, false).await;
        let running = runtime(peer.address, "echo", |_| {}).await;
        let answers = futures::future::join_all((0..20).map(|n| answer(&running, n))).await;
        for (n, answer) in answers.iter().enumerate() {
            assert_eq!(answer["answer"], query(n), "{answer}");
        }
    }
}

#[tokio::test]
async fn what_a_tool_may_say() {
    let peer = peer(STATELESS, true).await;
    for (tool, argument, expected) in [
        (
            "text",
            Value::Null,
            json!({"status": "ok", "answer": [{"type": "text", "text": query(1).to_string()}]}),
        ),
        ("echo", "question".into(), json!({"status": "ok", "answer": {"question": "why?"}})),
        ("fail", Value::Null, json!({"status": "error", "error": "status", "detail": "out of paper"})),
        (
            "none",
            Value::Null,
            json!({"status": "error", "error": "status", "detail": "-32602: no such tool"}),
        ),
    ] {
        let running = runtime(peer.address, tool, |expert| {
            if !argument.is_null() {
                expert["argument"] = argument;
            }
        })
        .await;
        let answer = answer(&running, 1).await;
        for (field, expected) in expected.as_object().unwrap() {
            match (field.as_str(), expected.as_str()) {
                ("detail", Some(words)) => {
                    assert!(answer[field].as_str().unwrap().contains(words), "{answer}")
                }
                ("answer", _) if tool == "text" => {
                    // The order of the arguments is the peer's.
                    let text: Value =
                        serde_json::from_str(answer[field][0]["text"].as_str().unwrap()).unwrap();
                    assert_eq!(text, query(1));
                }
                _ => assert_eq!(answer[field], *expected, "{answer}"),
            }
        }
    }
}

/// A server that restarts knows no session of before; one that is replaced may speak another revision.
#[tokio::test]
async fn a_lost_session_and_a_changed_server_cost_no_query() {
    let mut peer = peer(SESSION, false).await;
    let running = runtime(peer.address, "echo", |_| {}).await;
    assert_eq!(answer(&running, 1).await["answer"], query(1));
    for (n, versions) in [SESSION, STATELESS, SESSION].into_iter().enumerate() {
        peer.task.abort();
        let _ = (&mut peer.task).await;
        let listener =
            common::eventually("the port is free", async || TcpListener::bind(peer.address).await.ok()).await;
        peer = peer_on(listener, versions, false);
        let answer = answer(&running, n).await;
        assert_eq!(answer["answer"], query(n), "{versions:?}: {answer}");
    }
}

#[tokio::test]
async fn servers_that_speak_it_badly_get_a_clear_error() {
    let reply = |kind: &str, body: &str| {
        format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let json = |body: &str| reply("application/json", body);
    let events = |body: &str| reply("text/event-stream", body);
    let flood =
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}", "x".repeat(5 << 20));
    for (says, error, words) in [
        (json("{}"), "invalid", "no JSON-RPC response"),
        (json("[1, 2"), "invalid", "no JSON-RPC response"),
        (json(r#"{"jsonrpc":"2.0","id":99,"result":{}}"#), "invalid", "no JSON-RPC response"),
        (json(r#"{"jsonrpc":"2.0","id":0,"result":7}"#), "invalid", "not one of a tool"),
        (
            json(r#"{"jsonrpc":"2.0","id":0,"result":{"resultType":"input_required"}}"#),
            "invalid",
            "input_required",
        ),
        (
            json(r#"{"jsonrpc":"2.0","id":0,"error":{"code":-1,"message":"no"}}"#),
            "status",
            "MCP error -1: no",
        ),
        (reply("text/html", "<p>hello"), "invalid", "no JSON-RPC response"),
        (events(": nothing\n\n"), "invalid", "no JSON-RPC response"),
        (events("data: {\n\n"), "invalid", "no JSON-RPC response"),
        (
            events("data: {\"jsonrpc\":\"2.0\",\"method\":\"ping\",\"id\":0}\n\n"),
            "invalid",
            "no JSON-RPC response",
        ),
        (flood, "invalid", "larger"),
        ("HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n".to_owned(), "invalid", "no JSON-RPC response"),
        ("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".to_owned(), "status", "404"),
        ("HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n".to_owned(), "status", "401"),
        ("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".to_owned(), "status", "500"),
    ] {
        let server = scripted(says.clone(), true).await;
        let running = runtime(server, "echo", |e| e["protocol"] = "stateless".into()).await;
        let answer = answer(&running, 1).await;
        assert_eq!(answer["error"], error, "{answer} to {says:.200}");
        assert!(answer["detail"].as_str().unwrap().contains(words), "{answer} to {says:.200}");
        // No negotiation leads anywhere with such a server either.
        let running = runtime(server, "echo", |_| {}).await;
        assert_eq!(self::answer(&running, 1).await["status"], "error", "{says:.200}");
    }
}
