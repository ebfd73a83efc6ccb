//! Holds the OpenAPI document to the server: every documented path, status and body is seen, and nothing else is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use common::{Reply, Running, config, eventually, get, instant, mocks, scripted, slow, start_with, try_send};
use http_body_util::Full;
use hyper::Request;
use serde_json::{Value, json};
use synthex_runtime::server::{Patience, routes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const QUERY: &str = r#"{"title":"t","content":"c","requester":"r"}"#;
const COMPLETION: &str = r#"{"model":"m"}"#;
const ASK: [(&str, &str); 2] = [("/v1/queries", QUERY), ("/v1/chat/completions", COMPLETION)];

/// The document, and what was seen of it.
struct Document {
    document: Value,
    seen: BTreeSet<(String, String, u16)>,
}

impl Document {
    /// Checks an answer: its status, its headers and its body must be documented.
    fn see(&mut self, method: &str, path: &str, reply: &Reply) {
        let operation = self.operation(method, path).clone();
        let status = reply.status.as_u16();
        let documented = &operation["responses"][status.to_string()];
        assert!(
            documented.is_object(),
            "{method} {path} answered {status}, which is not documented: {reply:?}"
        );
        for (name, header) in documented["headers"].as_object().into_iter().flatten() {
            let value = reply.header(name);
            let value = value.parse::<u64>().map_or_else(|_| value.into(), Value::from);
            self.check(&header["schema"], &value);
        }
        let kind = reply.header("content-type").split(';').next().unwrap();
        let body = &documented["content"][kind];
        assert!(
            body.is_object(),
            "{method} {path} {status} is of the kind {kind:?}, which is not documented"
        );
        let value = match kind.ends_with("json") {
            true => reply.json(),
            false => String::from_utf8(reply.body.to_vec()).unwrap().into(),
        };
        self.check(&body["schema"], &value);
        self.seen.insert((method.to_owned(), path.to_owned(), status));
    }

    fn operation(&self, method: &str, path: &str) -> &Value {
        let method = if method == "GET" { "get" } else { "post" };
        &self.document["paths"][path][method]
    }

    fn check(&self, schema: &Value, value: &Value) {
        let mut schema = schema.clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::draft202012::new(&schema).expect("a schema");
        let errors: Vec<String> = validator.iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?} in {value}");
    }

    /// The schema of what may be posted.
    fn accepts(&self, path: &str, body: &str) -> bool {
        let mut schema =
            self.operation("POST", path)["requestBody"]["content"]["application/json"]["schema"].clone();
        schema["components"] = self.document["components"].clone();
        jsonschema::draft202012::new(&schema).unwrap().is_valid(&serde_json::from_str(body).unwrap())
    }
}

/// A runtime with one expert for both ways to ask.
async fn runtime(expert: SocketAddr, patience: Patience, change: impl FnOnce(&mut Value)) -> Running {
    let config = config(expert, |config| {
        config["experts"] =
            json!([{"name": "e", "kind": "openai", "url": format!("http://{expert}"), "model": "m"}]);
        config["dispatch"]["retries"]["max"] = 0.into();
        change(config);
    });
    start_with(&config, patience).await
}

async fn post(running: &Running, path: &str, body: impl Into<Vec<u8>>) -> Reply {
    let request = Request::post(path).body(Full::new(body.into().into())).unwrap();
    try_send(running.serving, request).await.unwrap()
}

/// A reply to a request whose body does not come.
async fn unfinished(running: &Running, path: &str) -> Reply {
    let mut stream = TcpStream::connect(running.serving).await.unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.parse().unwrap(), value.parse().unwrap())
    });
    Reply { status, headers: headers.collect(), body: body.to_owned().into() }
}

#[tokio::test]
async fn the_document_and_the_server_say_the_same() {
    let good = mocks(instant()).await;
    let mut running =
        runtime(good, Patience::default(), |c| c["server"]["drain"]["delay"] = "2s".into()).await;
    let document = get(running.serving, "/openapi.json").await.json();
    let mut document = Document { document, seen: BTreeSet::new() };
    assert_eq!(document.document["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(document.document["openapi"].as_str().unwrap().starts_with("3.1."));

    let served: BTreeSet<_> =
        routes().map(|(admin, method, path)| (admin, method.to_string(), path.to_owned())).collect();
    let mut documented = BTreeSet::new();
    let mut statuses = BTreeSet::new();
    for (path, item) in document.document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(name, _)| *name != "servers") {
            documented.insert((item["servers"].is_array(), method.to_uppercase(), path.clone()));
            for status in operation["responses"].as_object().unwrap().keys() {
                statuses.insert((method.to_uppercase(), path.clone(), status.parse::<u16>().unwrap()));
            }
        }
    }
    assert_eq!(served, documented);

    // What each route answers when all is well, and to a method that does not fit.
    for (admin, method, path) in &served {
        let to = if *admin { running.admin } else { running.serving };
        let (good, bad) = match method.as_str() {
            "GET" => (Request::get(path), Request::put(path)),
            _ => (Request::post(path), Request::get(path)),
        };
        let body = ASK.iter().find(|(ask, _)| ask == path).map_or("", |(_, body)| body);
        let reply = try_send(to, good.body(Full::new(body.into())).unwrap()).await.unwrap();
        document.see(method, path, &reply);
        let reply = try_send(to, bad.body(Full::default()).unwrap()).await.unwrap();
        document.see(method, path, &reply);
        // Admin routes are nowhere else, and nothing is but what is documented.
        let other = if *admin { running.serving } else { running.admin };
        let shared = matches!(path.as_str(), "/livez" | "/readyz");
        assert_eq!(get(other, path).await.status, if shared { 200 } else { 404 }, "{path}");
    }
    for path in ["/", "/v1", "/v1/queries/", "/v1/models", "/openapi", "/admin", "//livez", "/livez%00"] {
        for to in [running.serving, running.admin] {
            let reply = get(to, path).await;
            assert_eq!(reply.status, 404, "{path}");
            document.check(&json!({"$ref": "#/components/schemas/Problem"}), &reply.json());
        }
    }

    // What may be posted is what is taken.
    for (path, body) in [
        ("/v1/queries", QUERY),
        (
            "/v1/queries",
            r#"{"title":"","content":"","requester":"","experts":["e"],"noCache":true,"metadata":{"a":[1]},"tags":[]}"#,
        ),
        ("/v1/queries", r#"{"title":"t","content":"c"}"#),
        ("/v1/queries", r#"{"title":"t","content":"c","requester":"r","more":1}"#),
        ("/v1/queries", r#"{"title":"t","content":"c","requester":"r","experts":[]}"#),
        ("/v1/queries", r#"{"title":"t","content":"c","requester":"r","experts":["e","e"]}"#),
        ("/v1/queries", r#"{"title":"t","content":"c","requester":"r","tags":[1]}"#),
        ("/v1/queries", r#"{"title":"t","content":"c","requester":"r","metadata":1}"#),
        ("/v1/queries", r#"["t","c","r"]"#),
        ("/v1/chat/completions", COMPLETION),
        ("/v1/chat/completions", r#"{"model":"m","messages":[],"stream":false}"#),
        ("/v1/chat/completions", r#"{"messages":[]}"#),
        ("/v1/chat/completions", r#"{"model":1}"#),
    ] {
        let reply = post(&running, path, body).await;
        assert_eq!(reply.status == 200, document.accepts(path, body), "{body}: {reply:?}");
        document.see("POST", path, &reply);
    }
    let reply = post(&running, "/v1/chat/completions", r#"{"model":"n"}"#).await;
    document.see("POST", "/v1/chat/completions", &reply);

    // Streams of events.
    let events =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 10\r\n\r\ndata: {}\n\n";
    let streams = runtime(scripted(events, false).await, Patience::default(), |_| {}).await;
    document.see("POST", "/v1/chat/completions", &post(&streams, "/v1/chat/completions", COMPLETION).await);

    // Every way to fail.
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let failing =
        runtime(closed, Patience::default(), |c| c["dispatch"]["breaker"]["failures"] = 4.into()).await;
    let hanging = runtime(mocks(slow(60_000)).await, Patience::default(), |c| {
        c["experts"][0]["timeout"] = "50ms".into();
    })
    .await;
    let keys = common::Folder::new();
    std::fs::write(keys.0.join("keys"), format!("name:{}", "0".repeat(64))).unwrap();
    let locked = runtime(good, Patience::default(), |c| {
        c["server"]["apiKeys"] = json!({"file": keys.0.join("keys")});
    })
    .await;
    let limited = runtime(good, Patience::default(), |c| {
        c["server"]["rateLimit"] = json!({"perSecond": 1, "burst": 1});
    })
    .await;
    let impatient =
        runtime(good, Patience { body: Duration::from_millis(50), ..Patience::default() }, |_| {}).await;
    for (path, body) in ASK {
        document.see("POST", path, &post(&failing, path, body).await);
        document.see("POST", path, &post(&hanging, path, body).await);
        document.see("POST", path, &post(&locked, path, body).await);
        document.see("POST", path, &unfinished(&impatient, path).await);
        document.see("POST", path, &post(&running, path, vec![b' '; (1 << 20) + 1]).await);
        // The bucket may have got a token back in between.
        for _ in 0..3 {
            document.see("POST", path, &post(&limited, path, body).await);
        }
    }
    for (path, body) in ASK {
        // Its breaker opens.
        for _ in 0..4 {
            document.see("POST", path, &post(&failing, path, body).await);
        }
    }

    // Too many at once, and the end.
    let crowded = Arc::new(
        runtime(mocks(slow(500)).await, Patience::default(), |c| c["server"]["maxInFlight"] = 1.into()).await,
    );
    let first = tokio::spawn({
        let crowded = crowded.clone();
        async move { post(&crowded, "/v1/queries", QUERY).await.status }
    });
    eventually("in flight", async || {
        (crowded.metric("synthex_runtime_inflight_queries").await == 1.0).then_some(())
    })
    .await;
    for (path, body) in ASK {
        let reply = post(&crowded, path, body).await;
        assert_eq!(reply.status, 503);
        document.see("POST", path, &reply);
    }
    assert_eq!(first.await.unwrap(), 200);
    running.terminate();
    let reply = eventually("not ready any more", async || {
        let reply = get(running.admin, "/readyz").await;
        (reply.status == 503).then_some(reply)
    })
    .await;
    document.see("GET", "/readyz", &reply);

    let missing: Vec<_> = statuses.difference(&document.seen).collect();
    assert!(missing.is_empty(), "documented, and never seen: {missing:?}");
}
