//! A runtime and mock experts in this process, and a client for them.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use synthex_runtime::{
    load::experts::{self, Behaviour},
    server::{Options, Patience, Server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

/// A folder that is removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("synthex-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Mock experts that answer at once, and always the same.
pub fn instant() -> Behaviour {
    Behaviour { latency: Duration::ZERO, jitter: 0.0, error_rate: 0.0, size: 100, seed: 1 }
}

pub fn slow(millis: u64) -> Behaviour {
    Behaviour { latency: Duration::from_millis(millis), ..instant() }
}

/// Serves mock experts until the test ends.
pub async fn mocks(behaviour: Behaviour) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(experts::serve(listener, behaviour));
    address
}

/// An expert that says these bytes to each request, and closes the connection if `close`.
pub async fn scripted(says: impl Into<Vec<u8>>, close: bool) -> SocketAddr {
    let says = Bytes::from(says.into());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let says = says.clone();
            tokio::spawn(async move {
                let mut request = [0; 65_536];
                while stream.read(&mut request).await.is_ok_and(|n| n > 0) {
                    if stream.write_all(&says).await.is_err() || close {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A configuration with the experts `alpha`, `beta` and `gamma` on one address; `change` makes it otherwise.
pub fn config(experts: SocketAddr, change: impl FnOnce(&mut Value)) -> Value {
    let expert = |name: &str| json!({"name": name, "url": format!("http://{experts}/{name}")});
    let mut config = json!({
        "server": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "drain": {"delay": "0s", "timeout": "10s"}},
        "experts": [expert("alpha"), expert("beta"), expert("gamma")],
        "optimizations": {"memory": {}, "connections": {}, "monitoring": {}},
    });
    change(&mut config);
    config
}

/// The switches of the three groups, on or off.
pub fn switch(config: &mut Value, memory: bool, connections: bool, monitoring: bool) {
    config["optimizations"] = json!({
        "memory": {"objectPool": {"enabled": memory}, "cacheTtl": {"enabled": memory}},
        "connections": {"unified": {"enabled": connections}},
        "monitoring": {"adaptiveSampling": {"enabled": monitoring}},
    });
}

/// A running runtime.
pub struct Running {
    pub serving: SocketAddr,
    pub admin: SocketAddr,
    pub folder: Folder,
    stop: Option<oneshot::Sender<()>>,
    pub done: JoinHandle<bool>,
}

pub async fn start(config: &Value) -> Running {
    start_with(config, Patience::default()).await
}

pub async fn start_with(config: &Value, patience: Patience) -> Running {
    let folder = Folder::new();
    let path = folder.0.join("config.yaml");
    std::fs::write(&path, config.to_string()).unwrap();
    start_at(folder, path, patience).await
}

pub async fn start_at(folder: Folder, config: PathBuf, patience: Patience) -> Running {
    let options = Options { config, instance: "test-pod".to_owned(), allocations: None, patience };
    let server = Server::start(options).await.unwrap();
    let (serving, admin) = server.addresses().unwrap();
    let (stop, stopped) = oneshot::channel();
    let done = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    Running { serving, admin, folder, stop: Some(stop), done }
}

impl Running {
    pub fn path(&self) -> PathBuf {
        self.folder.0.join("config.yaml")
    }

    /// As SIGTERM would.
    pub fn terminate(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Puts a new file in the place of the old one.
    pub fn rewrite(&self, content: &str) {
        replace(&self.path(), content);
    }

    /// Puts a configuration in force and waits until it is.
    pub async fn apply(&self, config: &Value) {
        let content = config.to_string();
        self.rewrite(&content);
        let hash = synthex_runtime::config::hash(content.as_bytes());
        eventually("the configuration is in force", async || {
            (self.config().await["hash"] == hash).then_some(())
        })
        .await;
    }

    /// What the admin port says is in force.
    pub async fn config(&self) -> Value {
        get(self.admin, "/config").await.json()
    }

    /// The value of a metric, given as `name{labels}`.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = String::from_utf8(get(self.admin, "/metrics").await.body.to_vec()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} is not in\n{text}")).parse().unwrap()
    }

    pub async fn ask(&self, query: &Value) -> Reply {
        post(self.serving, query.to_string()).await
    }
}

pub fn replace(path: &Path, content: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, content).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// Looks until there is something, for ten seconds at most.
pub async fn eventually<T>(what: &str, look: impl AsyncFn() -> Option<T>) -> T {
    for _ in 0..2_000 {
        if let Some(found) = look().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within ten seconds: {what}");
}

#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The answers without what may differ between two equal ones.
    pub fn answers(&self) -> Value {
        let mut answers = self.json()["answers"].clone();
        for answer in answers.as_array_mut().unwrap() {
            let answer = answer.as_object_mut().unwrap();
            answer.remove("durationMs").unwrap();
            answer.remove("cached").unwrap();
        }
        answers
    }
}

pub async fn get(to: SocketAddr, path: &str) -> Reply {
    try_send(to, Request::get(path).body(Full::default()).unwrap()).await.unwrap()
}

pub async fn post(to: SocketAddr, body: impl Into<Bytes>) -> Reply {
    try_post(to, body).await.unwrap()
}

pub async fn try_post(to: SocketAddr, body: impl Into<Bytes>) -> Result<Reply, String> {
    try_send(to, Request::post("/v1/queries").body(Full::new(body.into())).unwrap()).await
}

/// Sends a request on a connection of its own.
pub async fn try_send(to: SocketAddr, mut request: Request<Full<Bytes>>) -> Result<Reply, String> {
    let stream = TcpStream::connect(to).await.map_err(|e| format!("connect: {e}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    request.headers_mut().insert("host", "test".parse().unwrap());
    let reply = sender.send_request(request).await.map_err(|e| format!("send: {e:?}"))?;
    let (head, body) = reply.into_parts();
    let body = body.collect().await.map_err(|e| format!("body: {e:?}"))?.to_bytes();
    Ok(Reply { status: head.status, headers: head.headers, body })
}

pub fn query(n: usize) -> Value {
    json!({"title": format!("Question {n}"), "content": "why?", "requester": "tester"})
}

/// What the mock expert at `path` answers as `digest` to this body.
pub fn digest(path: &str, body: &str) -> String {
    let digest = Sha256::digest(format!("{path}\n{body}"));
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
