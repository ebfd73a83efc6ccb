//! The real programs: what a SIGTERM costs under load, and what a killed expert does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "these are tests, helpers too")]

mod common;

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use common::{Folder, config, eventually, get, mocks, query, slow, try_send};
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::timeout,
};

/// The runtime's process, its serving and its admin port.
async fn runtime(folder: &Folder, config: &Value) -> (Child, SocketAddr, SocketAddr) {
    let path = folder.0.join("config.yaml");
    std::fs::write(&path, config.to_string()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_synthex-runtime"))
        .args(["--log-format", "json", "--config"])
        .arg(path)
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = timeout(Duration::from_secs(10), async {
        loop {
            let line: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
            if line["message"] == "ready" {
                return line;
            }
        }
    })
    .await
    .expect("it starts in time");
    // Whoever logs must be read, or it would wait for room in the pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let address = |field: &str| ready[field].as_str().unwrap().parse().unwrap();
    (child, address("serving"), address("admin"))
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().expect("it runs").to_string();
    assert!(Command::new("kill").args([name, &pid]).status().await.unwrap().success());
}

/// Sends queries on one connection for as long as that lasts, and then on the next, until told to leave. The experts are
/// named, so that no slow model is waited for.
async fn client(to: SocketAddr, number: usize, leave: Arc<AtomicBool>, answered: Arc<AtomicUsize>) {
    let mut n = 0;
    while !leave.load(Ordering::Relaxed) {
        let stream = TcpStream::connect(to).await.expect("somebody listens");
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut last = false;
        while !last && !leave.load(Ordering::Relaxed) {
            n += 1;
            let mut query = query(number * 100_000 + n);
            query["experts"] = json!(["alpha", "beta", "gamma"]);
            let body = Full::<Bytes>::from(query.to_string());
            let request = Request::post("/v1/queries").header("host", "test").body(body).unwrap();
            let reply = sender.send_request(request).await.expect("an answer");
            last = reply.headers().get("connection").is_some_and(|value| value == "close");
            assert_eq!(reply.status(), 200);
            reply.collect().await.expect("a whole answer");
            answered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_loses_no_request() {
    let (experts, model) = (mocks(slow(20)).await, mocks(slow(1500)).await);
    let folder = Folder::new();
    let config = config(experts, |config| {
        common::switch(config, true, true, true);
        config["server"]["drain"]["delay"] = "500ms".into();
        let model = json!({"name": "m", "kind": "openai", "url": format!("http://{model}"), "model": "m"});
        config["experts"].as_array_mut().unwrap().push(model);
    });
    let (mut child, serving, admin) = runtime(&folder, &config).await;
    let (leave, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> =
        (0..8).map(|n| tokio::spawn(client(serving, n, leave.clone(), answered.clone()))).collect();
    let more = async |count: usize| {
        let before = answered.load(Ordering::Relaxed);
        eventually("more answers", async || {
            (answered.load(Ordering::Relaxed) >= before + count).then_some(())
        })
        .await;
    };
    more(20).await;
    // Its answer takes longer than the listener lives.
    let long = tokio::spawn(try_send(
        serving,
        Request::post("/v1/chat/completions").body(Full::from(r#"{"model":"m"}"#)).unwrap(),
    ));
    more(20).await;
    signal(&child, "-TERM").await;
    eventually("not ready any more", async || (get(admin, "/readyz").await.status == 503).then_some(()))
        .await;
    assert_eq!(get(serving, "/livez").await.status, 200);
    // Clients come for a while longer, since no load balancer hears of it at once.
    more(20).await;
    leave.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(long.await.unwrap().unwrap().status, 200);
    let ended = timeout(Duration::from_secs(10), child.wait()).await.expect("it ends in time").unwrap();
    assert!(ended.success(), "{ended}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_expert_costs_only_what_the_quorum_says() {
    for (quorum, errors) in [(2, false), (3, true)] {
        let mut experts = Vec::new();
        for _ in 0..3 {
            // A port that was free just now.
            let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_synthex-load"));
            command.args(["experts", "--latency", "5ms", "--listen", &address.to_string()]);
            experts.push((command.kill_on_drop(true).spawn().unwrap(), address));
        }
        for (_, address) in &experts {
            eventually("the expert listens", async || TcpStream::connect(address).await.ok().map(drop)).await;
        }
        let folder = Folder::new();
        let config = config(experts[0].1, |config| {
            common::switch(config, true, true, true);
            for (i, (_, address)) in experts.iter().enumerate() {
                config["experts"][i]["url"] = format!("http://{address}/").into();
            }
            config["dispatch"] = json!({"quorum": quorum, "breaker": {"openFor": "100ms"}});
        });
        let (_child, serving, admin) = runtime(&folder, &config).await;
        let (leave, killed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (leave, killed) = (leave.clone(), killed.clone());
                tokio::spawn(async move {
                    let mut statuses = [0_usize; 3];
                    for n in 0.. {
                        if leave.load(Ordering::Relaxed) {
                            break;
                        }
                        let before = !killed.load(Ordering::Relaxed);
                        let reply = common::post(serving, query(client * 100_000 + n).to_string()).await;
                        let answers = reply.json()["answers"].clone();
                        let failed =
                            answers.as_array().unwrap().iter().filter(|a| a["status"] != "ok").count();
                        assert!(failed <= 1, "only one was killed: {answers}");
                        let expected = if failed > 0 && errors { [502, 503] } else { [200, 200] };
                        assert!(expected.contains(&reply.status.as_u16()), "{reply:?}");
                        assert!(!before || failed == 0 || killed.load(Ordering::Relaxed));
                        statuses[failed + usize::from(failed > 0 && reply.status != 200)] += 1;
                    }
                    statuses
                })
            })
            .collect();
        let metric = async |outcome: &str| {
            let text = get(admin, "/metrics").await.body;
            let series = format!("synthex_runtime_queries_total{{outcome=\"{outcome}\"}} ");
            let text = String::from_utf8(text.to_vec()).unwrap();
            text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse::<usize>().unwrap()
        };
        eventually("answers", async || (metric("ok").await > 50).then_some(())).await;
        killed.store(true, Ordering::Relaxed);
        signal(&experts[1].0, "-KILL").await;
        let after = if errors { "error" } else { "partial" };
        eventually("answers without it", async || (metric(after).await > 50).then_some(())).await;
        leave.store(true, Ordering::Relaxed);
        let mut sum = [0; 3];
        for client in clients {
            let statuses = client.await.unwrap();
            sum.iter_mut().zip(statuses).for_each(|(sum, n)| *sum += n);
        }
        assert_eq!([metric("ok").await, metric("partial").await, metric("error").await], sum);
    }
}

/// An expert that answers each query with as much as it can send, and clients that ask it all at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flooding_expert_does_not_fill_the_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let expert = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let piece = format!("10000\r\n{}\r\n", "1".repeat(0x10000));
        while let Ok((mut stream, _)) = listener.accept().await {
            let piece = piece.clone();
            tokio::spawn(async move {
                assert!(stream.read(&mut [0; 65_536]).await.unwrap() > 0);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
                while stream.write_all(piece.as_bytes()).await.is_ok() {}
            });
        }
    });
    let folder = Folder::new();
    let config = config(expert, |config| config["dispatch"] = json!({"breaker": {"enabled": false}}));
    let (_child, serving, admin) = runtime(&folder, &config).await;
    for round in 0..2 {
        let asked = (0..40).map(|n| common::post(serving, query(round * 40 + n).to_string()));
        for reply in futures::future::join_all(asked).await {
            assert_eq!(reply.json()["answers"][0]["error"], "invalid", "{reply:?}");
        }
        let text = String::from_utf8(get(admin, "/metrics").await.body.to_vec()).unwrap();
        let resident = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
        let resident: f64 = resident.unwrap().parse().unwrap();
        // Three experts, each with ten connections, of which each holds 4 MiB and what it had before it grew.
        assert!(resident < 300e6, "{resident} bytes");
    }
}
