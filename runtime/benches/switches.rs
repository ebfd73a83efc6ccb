//! Every figure of the seed, baseline beside optimized, in one run: `cargo bench -p synthex-runtime`.
//!
//! The runtime is a process of its own, as it is in production; mocks and clients are this process. Everything shares
//! one machine, so figures are compared with those of the same run only. Some four minutes; `SYNTHEX_BENCH_SECONDS`
//! (12) is the time of each row, `SYNTHEX_BENCH_SOAK` (60) that of the long run.
//!
//! Times to live are compressed 900-fold, 4 h to 16 s and 30 min to 2 s, since the cache must be full to be measured;
//! keep-alives are compressed 20-fold in the sparse rows, where 20 queries a second stand for one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark ends at its first surprise")]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, StatusCode,
    client::conn::http1::{self, SendRequest},
    header::HOST,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use synthex_runtime::{
    load::experts::{self, Behaviour},
    virtual_time::{self, Sampled},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, sleep_until},
};

/// Experts of the fan-out rows, on so many hosts; a query asks [`ASKED`] of them.
const EXPERTS: usize = 12;
const HOSTS: usize = 4;
const ASKED: usize = 5;
/// Queries that are asked again: their answers fit into the bounded cache, which holds 500.
const REPEATED: usize = 80;

fn seconds(name: &str, default: u64) -> Duration {
    let value = std::env::var(name).ok().map(|text| text.parse().expect("a number of seconds"));
    Duration::from_secs(value.unwrap_or(default))
}

/// A random generator (SplitMix64), the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// A query of the seed's shape: twelve fields, 1 KiB of content, 3,000 requesters. `n` makes it unlike the others.
fn query(n: u64, random: &mut Random, fan_out: bool) -> String {
    let mut experts: Vec<usize> = (0..EXPERTS).collect();
    let asked: Vec<String> = (0..ASKED)
        .map(|_| format!("e{}", experts.swap_remove(random.next() as usize % experts.len())))
        .collect();
    let mut query = json!({
        "title": format!("Question {n}"),
        "content": format!("{n:016x}").repeat(64),
        "requester": format!("user-{}", random.next() % 3000),
        "tags": ["latency", "staging", "question"],
        "metadata": {
            "type": "technical", "priority": "high", "deadline": "2026-11-24T12:00:00Z",
            "createdAt": "2026-11-24T11:00:00Z", "constraint1": "no downtime", "constraint2": "one region",
            "constraint3": "stays on one page", "service": "shop", "team": "platform", "cluster": "eu-1",
            "version": "1.4.2",
        },
    });
    if fan_out {
        query["experts"] = json!(asked);
    } else {
        query["noCache"] = true.into();
    }
    query.to_string()
}

/// A folder for configurations, removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that ends with its handle.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn rss(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
    }

    /// CPU seconds of the process and its children.
    fn cpu(&self) -> f64 {
        let of = |pid: &str| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields: Vec<i64> =
                text.rsplit(") ").next().unwrap_or("").split(' ').filter_map(|f| f.parse().ok()).collect();
            // After the name and the state come parent and so on; user and system time are the 11th and 12th.
            fields.get(10).zip(fields.get(11)).map_or(0, |(user, system)| user + system)
        };
        let pid = self.0.id().to_string();
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let ticks = of(&pid) + children.split_whitespace().map(of).sum::<i64>();
        ticks as f64 / 100.0
    }
}

fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn wait_for(address: SocketAddr) {
    for _ in 0..500 {
        if TcpStream::connect(address).await.is_ok() {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("nobody listens on {address}");
}

/// The runtime under test.
struct Runtime {
    process: Process,
    serving: SocketAddr,
    admin: SocketAddr,
    file: PathBuf,
    config: Value,
    _folder: Folder,
}

impl Runtime {
    async fn start(mut config: Value) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("synthex-bench-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Folder(std::env::temp_dir().join(name));
        std::fs::create_dir_all(&folder.0).unwrap();
        let file = folder.0.join("config.yaml");
        let (serving, admin) = (free_port(), free_port());
        config["server"] = json!({"listen": serving, "admin": admin, "drain": {"delay": "0s"}});
        std::fs::write(&file, config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_synthex-runtime"));
        command.arg("--config").arg(&file).env("LOG_LEVEL", "error").stdin(Stdio::null());
        let process = Process(command.spawn().unwrap());
        wait_for(admin).await;
        Self { process, serving, admin, file, config, _folder: folder }
    }

    fn apply(&self, change: impl FnOnce(&mut Value)) {
        let mut config = self.config.clone();
        change(&mut config);
        let new = self.file.with_extension("new");
        std::fs::write(&new, config.to_string()).unwrap();
        std::fs::rename(new, &self.file).unwrap();
    }

    async fn metrics(&self) -> Metrics {
        let mut client = connect(self.admin).await;
        let request = Request::get("/metrics").header(HOST, "bench").body(Full::default()).unwrap();
        let body =
            client.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        let series = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.trim_start_matches("synthex_runtime_").to_owned(), value.parse().ok()?))
        });
        Metrics(series.collect())
    }
}

/// What `/metrics` said.
struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// The sum of a family over the series whose labels hold `label`.
    fn sum(&self, family: &str, label: &str) -> f64 {
        let of = |name: &String| {
            name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
                && name.contains(label)
        };
        self.0.iter().filter(|(name, _)| of(name)).map(|(_, value)| value).sum()
    }
}

async fn connect(to: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    sender
}

/// Sends a query on an idle connection, or a new one. `None`: it failed.
async fn ask(
    to: SocketAddr,
    path: &str,
    idle: &Mutex<Vec<SendRequest<Full<Bytes>>>>,
    body: Bytes,
) -> Option<()> {
    let mut sender = loop {
        let candidate = idle.lock().unwrap().pop();
        let Some(mut candidate) = candidate else { break connect(to).await };
        if candidate.ready().await.is_ok() {
            break candidate;
        }
    };
    let request = Request::post(path).header(HOST, "bench").body(Full::new(body)).unwrap();
    let reply = sender.send_request(request).await.ok()?;
    let ok = reply.status() == StatusCode::OK;
    reply.into_body().collect().await.ok()?;
    if !sender.is_closed() {
        idle.lock().unwrap().push(sender);
    }
    ok.then_some(())
}

fn quantile(latencies: &mut [Duration], q: f64) -> f64 {
    latencies.sort_unstable();
    let i = ((latencies.len() as f64 * q) as usize).min(latencies.len().saturating_sub(1));
    latencies.get(i).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1e3)
}

/// Mock experts on a port each.
async fn mocks(count: usize, behaviour: Behaviour) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    for _ in 0..count {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        addresses.push(listener.local_addr().unwrap());
        tokio::spawn(experts::serve(listener, behaviour.clone()));
    }
    addresses
}

fn fan_out(hosts: &[SocketAddr]) -> Value {
    let experts: Vec<Value> = (0..EXPERTS)
        .map(|i| json!({"name": format!("e{i}"), "url": format!("http://{}/e{i}", hosts[i % hosts.len()])}))
        .collect();
    json!({
        "experts": experts,
        "results": {"url": format!("http://{}/results", hosts[0])},
        "baseline": {"cacheTtl": "16s"},
        "optimizations": {"memory": {"cacheTtl": {"ttl": "2s"}}, "connections": {}, "monitoring": {}},
    })
}

/// Every switch, by its group and name; the second `unified` is with HTTP/2.
const SWITCHES: [(&str, &str); 9] = [
    ("memory", "objectPool"),
    ("memory", "cacheTtl"),
    ("memory", "evict"),
    ("memory", "batchLimit"),
    ("connections", "unified"),
    ("connections", "unified h2"),
    ("monitoring", "adaptiveSampling"),
    ("monitoring", "preAggregation"),
    ("monitoring", "cardinalityLimit"),
];

fn turn_on(config: &mut Value, (group, name): (&str, &str)) {
    let name = match name.strip_suffix(" h2") {
        Some(name) => {
            config["optimizations"][group][name]["http2"] = "priorKnowledge".into();
            name
        }
        None => name,
    };
    config["optimizations"][group][name]["enabled"] = true.into();
}

fn turn_on_all(config: &mut Value, h2: bool) {
    SWITCHES
        .into_iter()
        .filter(|(_, name)| h2 || !name.ends_with(" h2"))
        .for_each(|switch| turn_on(config, switch));
}

/// What a row of the fan-out table shows.
#[derive(Clone)]
struct Row {
    name: String,
    rss: f64,
    allocations: f64,
    cpu: f64,
    pool_hits: f64,
    reuse: f64,
    open: f64,
    acquire: f64,
    p50: f64,
    p99: f64,
    series: f64,
    hits: f64,
    failed: usize,
    look: f64,
}

/// Open loop: Poisson arrivals at `rate`, every other query one of the last [`REPEATED`] again, for `time` after a warm-up
/// of a quarter of it.
async fn row(name: &str, config: Value, rate: f64, time: Duration) -> Row {
    let runtime = Runtime::start(config).await;
    let idle = Arc::new(Mutex::new(Vec::new()));
    let latencies = Arc::new(Mutex::new(Vec::new()));
    let failed = Arc::new(AtomicU64::new(0));
    let mut random = Random(1);
    let started = tokio::time::Instant::now();
    let (warm, end) = (started + time / 4, started + time + time / 4);
    let mut arrival = started;
    let mut before = None;
    let (mut open, mut rss, mut next_look) = (Vec::new(), Vec::new(), warm);
    let mut recent: Vec<Bytes> = Vec::new();
    loop {
        arrival += Duration::from_secs_f64(-random.unit().ln() / rate);
        if arrival >= end {
            break;
        }
        sleep_until(arrival).await;
        if before.is_none() && arrival >= warm {
            before = Some(runtime.metrics().await);
        }
        if arrival >= next_look {
            open.push(runtime.metrics().await.sum("upstream_connections_open", ""));
            rss.push(runtime.process.rss());
            next_look += time / 12;
        }
        let n = random.next();
        let body = match recent.len() == REPEATED && n.is_multiple_of(2) {
            true => recent[n as usize / 2 % recent.len()].clone(),
            false => {
                let body = Bytes::from(query(n, &mut random, true));
                match recent.len() == REPEATED {
                    true => recent[n as usize / 2 % REPEATED] = body.clone(),
                    false => recent.push(body.clone()),
                }
                body
            }
        };
        let (to, idle, latencies, failed) =
            (runtime.serving, idle.clone(), latencies.clone(), failed.clone());
        let counts = arrival >= warm;
        tokio::spawn(async move {
            let answered = ask(to, "/v1/queries", &idle, body).await;
            if answered.is_none() {
                failed.fetch_add(1, Ordering::Relaxed);
            } else if counts {
                latencies.lock().unwrap().push(arrival.elapsed());
            }
        });
    }
    sleep(Duration::from_millis(300)).await;
    let (before, after) = (before.unwrap(), runtime.metrics().await);
    let more = |family: &str, label: &str| after.sum(family, label) - before.sum(family, label);
    let queries = more("queries_total", "");
    let requests = more("upstream_acquired_total", "");
    let taken = more("pool_acquired_total", "");
    let looked = more("cache_requests_total", "");
    let latencies = &mut latencies.lock().unwrap()[..];
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    Row {
        name: name.to_owned(),
        rss: mean(&rss[rss.len() * 2 / 3..]),
        allocations: more("allocator_allocations_total", "") / queries,
        cpu: more("process_cpu_seconds_total", "") / queries * 1e6,
        pool_hits: more("pool_acquired_total", "\"hit\"") / taken,
        reuse: 1.0 - more("upstream_connections_opened_total", "") / requests,
        open: mean(&open),
        acquire: more("upstream_acquire_seconds_sum", "") / requests * 1e6,
        p50: quantile(latencies, 0.5),
        p99: quantile(latencies, 0.99),
        series: after.sum("metric_series", ""),
        hits: more("cache_requests_total", "\"hit\"") / looked,
        failed: failed.load(Ordering::Relaxed) as usize,
        look: after.sum("monitor_cpu_seconds_total", "") / after.sum("monitor_probes_total", "") * 1e6,
    }
}

/// A figure of the seed: what it should be, what it is, and why if it is not.
struct Figure {
    name: &'static str,
    target: &'static str,
    baseline: String,
    optimized: String,
    change: String,
    met: bool,
    note: String,
}

fn less(
    name: &'static str,
    target: &'static str,
    most: f64,
    unit: &str,
    before: f64,
    after: f64,
    note: &str,
) -> Figure {
    let digits = if before.abs() < 10.0 { 3 } else { 1 };
    Figure {
        name,
        target,
        baseline: format!("{before:.digits$}{unit}"),
        optimized: format!("{after:.digits$}{unit}"),
        change: format!("{:+.1} %", (after / before - 1.0) * 100.0),
        met: after / before <= most,
        note: note.to_owned(),
    }
}

fn at(
    name: &'static str,
    target: &'static str,
    met: bool,
    before: String,
    after: String,
    note: &str,
) -> Figure {
    Figure {
        name,
        target,
        baseline: before,
        optimized: after,
        change: String::new(),
        met,
        note: note.to_owned(),
    }
}

const MIB: f64 = 1_048_576.0;

async fn switches(figures: &mut Vec<Figure>) {
    let time = seconds("SYNTHEX_BENCH_SECONDS", 12);
    let hosts = mocks(HOSTS, Behaviour::default()).await;
    let mut configs = vec![("baseline".to_owned(), fan_out(&hosts))];
    for switch in SWITCHES {
        let mut config = fan_out(&hosts);
        turn_on(&mut config, switch);
        configs.push((switch.1.to_owned(), config));
    }
    for (name, h2) in [("all", false), ("all h2", true)] {
        let mut config = fan_out(&hosts);
        turn_on_all(&mut config, h2);
        configs.push((name.to_owned(), config));
    }
    println!(
        "\nEach switch alone and all together: 200 queries/s (Poisson), half of them one of the last 80 again; each asks {ASKED} of \
         {EXPERTS} experts on {HOSTS} hosts, 20 ms and 2 KiB an answer; {} s each, after a quarter as warm-up.\n",
        time.as_secs()
    );
    println!(
        "{:<17} {:>7} {:>7} {:>8} {:>6} {:>6} {:>6} {:>8} {:>6} {:>6} {:>7} {:>6} {:>6}",
        "switch",
        "RSS MiB",
        "alloc/q",
        "CPU us/q",
        "pool %",
        "reuse%",
        "open",
        "acq us",
        "p50",
        "p99",
        "series",
        "hits %",
        "failed"
    );
    let mut rows: Vec<Row> = Vec::new();
    for (name, config) in configs {
        let row = row(&name, config, 200.0, time).await;
        println!(
            "{:<17} {:>7.1} {:>7.0} {:>8.0} {:>6.1} {:>6.1} {:>6.1} {:>8.1} {:>6.1} {:>6.1} {:>7.0} {:>6.1} {:>6}",
            row.name,
            row.rss / MIB,
            row.allocations,
            row.cpu,
            row.pool_hits * 100.0,
            row.reuse * 100.0,
            row.open,
            row.acquire,
            row.p50,
            row.p99,
            row.series,
            row.hits * 100.0,
            row.failed
        );
        rows.push(row);
    }
    let of = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
    let (base, all, all_h2) = (of("baseline"), of("all"), of("all h2"));
    figures.push(less(
        "memory (RSS)",
        "-35 %",
        0.65,
        " MiB",
        base.rss / MIB,
        all.rss / MIB,
        "all switches, cache full",
    ));
    figures.push(less(
        "allocations per query",
        "-70 %",
        0.30,
        "",
        base.allocations,
        all.allocations,
        "all switches; jemalloc's requests (the seed's GC collections)",
    ));
    figures.push(at(
        "pool reuse",
        ">= 80 %",
        all.pool_hits >= 0.8,
        "none".into(),
        format!("{:.1} %", all.pool_hits * 100.0),
        "all switches",
    ));
    figures.push(less("open connections, h2", "-85 %", 0.15, "", base.open, of("unified h2").open, "busy"));
    figures.push(less("open connections, h1", "stated", 1.0, "", base.open, of("unified").open, "busy"));
    figures.push(less("CPU per query", "-15 %", 0.85, " us", base.cpu, all.cpu, "all switches, HTTP/1.1"));
    figures.push(less("CPU per query, h2", "stated", 1.0, " us", base.cpu, all_h2.cpu, "all switches"));
    figures.push(less(
        "p99 of a query",
        "not worse",
        1.05,
        " ms",
        base.p99,
        all.p99,
        "all switches; mostly the mocks' 20 ms",
    ));
    figures.push(at(
        "metric series",
        "<= 1000",
        all.series <= 1000.0,
        format!("{:.0}", base.series),
        format!("{:.0}", all.series),
        "3,000 requesters",
    ));
    sparse(figures, &hosts).await;
    monitoring(figures, base.look, of("adaptiveSampling").look);
}

/// Where keep-alives matter: connections go idle between queries.
async fn sparse(figures: &mut Vec<Figure>, hosts: &[SocketAddr]) {
    let time = seconds("SYNTHEX_BENCH_SECONDS", 12);
    println!("\nSparse: 10 queries/s, keep-alives 20 times shorter (baseline 750 ms, unified 1.5 s).\n");
    println!("{:<17} {:>6} {:>6} {:>8}", "switch", "reuse%", "open", "acq us");
    let mut rows = Vec::new();
    for (name, switch) in [("baseline", None), ("unified", Some(4)), ("unified h2", Some(5))] {
        let mut config = fan_out(hosts);
        config["baseline"]["keepAlive"] = "750ms".into();
        config["optimizations"]["connections"]["unified"] = json!({"keepAlive": "1500ms"});
        if let Some(i) = switch {
            turn_on(&mut config, SWITCHES[i]);
        }
        // No repetitions: a cached answer needs no connection.
        config["baseline"]["cacheTtl"] = "1ns".into();
        let row = row(name, config, 10.0, time).await;
        println!("{:<17} {:>6.1} {:>6.1} {:>8.1}", name, row.reuse * 100.0, row.open, row.acquire);
        rows.push(row);
    }
    let [base, h1, h2] = &rows[..] else { unreachable!() };
    let share = |row: &Row| format!("{:.1} %", row.reuse * 100.0);
    figures.push(at(
        "connection reuse",
        ">= 75 %",
        h1.reuse >= 0.75 && h2.reuse >= 0.75,
        share(base),
        format!("{}, h2 {}", share(h1), share(h2)),
        "sparse, HTTP/1.1",
    ));
    figures.push(less("acquire time", "-30 %", 0.70, " us", base.acquire, h1.acquire, "sparse, HTTP/1.1"));
    figures.push(less("acquire time, h2", "-30 %", 0.70, " us", base.acquire, h2.acquire, "sparse"));
}

/// A week of virtual time over the sampler, with CPU as the looks cost in the rows above.
fn monitoring(figures: &mut Vec<Figure>, fixed_look: f64, adaptive_look: f64) {
    let [one, five, adaptive] = [Sampled::fixed(1), Sampled::fixed(5), virtual_time::adaptive()];
    println!(
        "\nMonitoring: a week of virtual time, five series (memory steady and noisy, CPU, network, disk).\n"
    );
    println!(
        "{:<12} {:>10} {:>10} {:>9} {:>9} {:>9} {:>7}",
        "sampling", "points", "looks", "p50 s", "p90 s", "max s", "missed"
    );
    for (name, s) in [("fixed 1 s", &one), ("fixed 5 s", &five), ("adaptive", &adaptive)] {
        println!(
            "{:<12} {:>10} {:>10} {:>9.0} {:>9.0} {:>9.0} {:>4}/{}",
            name,
            s.points,
            s.looks,
            s.delay(0.5),
            s.delay(0.9),
            s.delay(1.0),
            s.missed,
            s.steps
        );
    }
    let points = |s: &Sampled| s.points as f64;
    figures.push(less(
        "data points, vs 1 s",
        "-96 %",
        0.04,
        "",
        points(&one),
        points(&adaptive),
        "a week of virtual time",
    ));
    figures.push(less(
        "data points, vs 5 s",
        "-96 %",
        0.04,
        "",
        points(&five),
        points(&adaptive),
        "a week of virtual time",
    ));
    figures.push(at(
        "step detection p90",
        "<= 15 s",
        adaptive.delay(0.9) <= 15.0,
        format!("{:.0} s", five.delay(0.9)),
        format!("{:.0} s", adaptive.delay(0.9)),
        "baseline: fixed 5 s",
    ));
    let cpu = |s: &Sampled, look: f64| s.looks as f64 * look / 1e6;
    figures.push(less(
        "monitoring CPU, vs 1 s",
        "-80 %",
        0.20,
        " s",
        cpu(&one, fixed_look),
        cpu(&adaptive, adaptive_look),
        "looks x measured cost of a look",
    ));
    figures.push(less(
        "monitoring CPU, vs 5 s",
        "-80 %",
        0.20,
        " s",
        cpu(&five, fixed_look),
        cpu(&adaptive, adaptive_look),
        "looks x measured cost of a look",
    ));
}

/// Closed loop: `clients` on a connection each. Gives answers a second, p50 and p99 in milliseconds, failures.
async fn closed(to: SocketAddr, path: &'static str, clients: usize, time: Duration) -> (f64, f64, f64, u64) {
    let end = Instant::now() + time;
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            tokio::spawn(async move {
                let mut random = Random(client as u64);
                let bodies: Vec<Bytes> = (0..64).map(|n| query(n, &mut random, false).into()).collect();
                let idle = Mutex::new(Vec::new());
                let (mut latencies, mut failed) = (Vec::new(), 0);
                for body in bodies.iter().cycle() {
                    let begun = Instant::now();
                    if begun >= end {
                        break;
                    }
                    match ask(to, path, &idle, body.clone()).await {
                        Some(()) => latencies.push(begun.elapsed()),
                        None => failed += 1,
                    }
                }
                (latencies, failed)
            })
        })
        .collect();
    let (mut all, mut failed) = (Vec::new(), 0);
    for task in tasks {
        let (latencies, f) = task.await.unwrap();
        all.extend(latencies);
        failed += f;
    }
    let rate = all.len() as f64 / time.as_secs_f64();
    (rate, quantile(&mut all, 0.5), quantile(&mut all, 0.99), failed)
}

/// nginx from Debian, unpacked beside the build if it is not installed.
fn nginx() -> Option<PathBuf> {
    let installed = Path::new("/usr/sbin/nginx");
    if installed.exists() {
        return Some(installed.to_owned());
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nginx");
    let unpacked = folder.join("usr/sbin/nginx");
    if !unpacked.exists() {
        std::fs::create_dir_all(&folder).ok()?;
        let run = |command: &str, arguments: &[&str]| {
            Command::new(command)
                .args(arguments)
                .current_dir(&folder)
                .stdout(Stdio::null())
                .status()
                .ok()?
                .success()
                .then_some(())
        };
        run("apt-get", &["download", "nginx"])?;
        let package =
            std::fs::read_dir(&folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let package = package.filter(|name| name.ends_with(".deb")).max()?;
        run("dpkg", &["-x", &package, "."])?;
    }
    unpacked.exists().then_some(unpacked)
}

/// What stands between the client and the mock.
struct Passed {
    rate: f64,
    p50: f64,
    p99: f64,
    alone: f64,
    cpu: f64,
}

async fn passed(name: &str, to: SocketAddr, path: &'static str, process: Option<&Process>) -> Passed {
    let time = Duration::from_secs(3);
    closed(to, path, 8, time / 6).await;
    let (_, alone, _, failed_alone) = closed(to, path, 1, time).await;
    let before = process.map_or(0.0, Process::cpu);
    let (rate, p50, p99, failed) = closed(to, path, 32, time).await;
    let cpu = process.map_or(0.0, Process::cpu) - before;
    let cpu = cpu / (rate * time.as_secs_f64()) * 1e6;
    println!(
        "{name:<17} {alone:>9.3} {rate:>9.0} {p50:>9.2} {p99:>9.2} {:>10} {:>7}",
        if cpu > 0.0 { format!("{:.0}", 1e6 / cpu) } else { "-".to_owned() },
        failed + failed_alone
    );
    Passed { rate, p50, p99, alone, cpu }
}

async fn proxy(figures: &mut Vec<Figure>) {
    let behaviour = Behaviour { latency: Duration::ZERO, jitter: 0.0, size: 1024, ..Behaviour::default() };
    let mock = mocks(1, behaviour).await[0];
    println!(
        "\nAs a proxy: one expert that answers at once, 1.6 KiB asked, 1 KiB answered, no cache; 3 s each.\n"
    );
    println!(
        "{:<17} {:>9} {:>9} {:>9} {:>9} {:>10} {:>7}",
        "", "1: p50 ms", "32: q/s", "p50 ms", "p99 ms", "q/CPU s", "failed"
    );
    let direct = passed("direct", mock, "/e0", None).await;
    let nginx = match nginx() {
        None => None,
        Some(program) => {
            let address = free_port();
            let folder =
                Folder(std::env::temp_dir().join(format!("synthex-bench-nginx-{}", std::process::id())));
            std::fs::create_dir_all(&folder.0).unwrap();
            let at = folder.0.display();
            let config = format!(
                "daemon off; worker_processes 1; pid {at}/pid; error_log {at}/error.log;\n\
                 events {{ worker_connections 1024; }}\n\
                 http {{ access_log off; client_body_temp_path {at}; proxy_temp_path {at}; fastcgi_temp_path {at};\n\
                 uwsgi_temp_path {at}; scgi_temp_path {at}; keepalive_requests 100000000;\n\
                 upstream mock {{ server {mock}; keepalive 64; keepalive_requests 100000000; }}\n\
                 server {{ listen {address}; location / {{ proxy_pass http://mock; proxy_http_version 1.1;\n\
                 proxy_set_header Connection \"\"; }} }} }}\n"
            );
            let file = folder.0.join("nginx.conf");
            std::fs::write(&file, config).unwrap();
            let mut command = Command::new(program);
            command.arg("-c").arg(&file).arg("-p").arg(&folder.0).stderr(Stdio::null());
            let process = Process(command.spawn().unwrap());
            wait_for(address).await;
            Some(passed("nginx", address, "/e0", Some(&process)).await)
        }
    };
    let config = json!({"experts": [{"name": "e0", "url": format!("http://{mock}/e0")}], "optimizations": {"memory": {}, "connections": {}, "monitoring": {}}});
    let baseline = {
        let runtime = Runtime::start(config.clone()).await;
        passed("baseline", runtime.serving, "/v1/queries", Some(&runtime.process)).await
    };
    let mut optimized = config.clone();
    turn_on_all(&mut optimized, false);
    let runtime = Runtime::start(optimized).await;
    sleep(Duration::from_secs(1)).await;
    let rest = runtime.process.rss();
    let all = passed("all switches", runtime.serving, "/v1/queries", Some(&runtime.process)).await;
    let loaded = runtime.process.rss();

    let added = |p: &Passed| p.alone - direct.alone;
    figures.push(at(
        "added p50, 1 client",
        "<= 0.15 ms",
        added(&all) <= 0.15,
        format!("{:.3} ms", added(&baseline)),
        format!("{:.3} ms", added(&all)),
        "over the mock directly",
    ));
    if let Some(nginx) = &nginx {
        figures.push(at(
            "added p50 beside nginx",
            "<= 2x",
            added(&all) <= 2.0 * added(nginx),
            format!("{:.3} ms", added(nginx)),
            format!("{:.3} ms", added(&all)),
            "baseline: nginx",
        ));
    }
    figures.push(at(
        "requests per CPU second",
        ">= 10,000",
        1e6 / all.cpu >= 10_000.0,
        format!("{:.0}", 1e6 / baseline.cpu),
        format!("{:.0}", 1e6 / all.cpu),
        &nginx.map_or_else(String::new, |n| format!("nginx {:.0}", 1e6 / n.cpu)),
    ));
    figures.push(less(
        "p50 at 32 clients",
        "not worse",
        1.05,
        " ms",
        baseline.p50,
        all.p50,
        "clients and mock share the processors",
    ));
    figures.push(less(
        "p99 at 32 clients",
        "not worse",
        1.05,
        " ms",
        baseline.p99,
        all.p99,
        "clients and mock share the processors",
    ));
    figures.push(at(
        "requests/s at 32 clients",
        "stated",
        true,
        format!("{:.0}", baseline.rate),
        format!("{:.0}", all.rate),
        "clients and mock share the processors",
    ));
    figures.push(at(
        "memory at rest",
        "<= 15 MiB",
        rest <= 15.0 * MIB,
        String::new(),
        format!("{:.1} MiB", rest / MIB),
        "all switches",
    ));
    figures.push(at(
        "memory loaded, no cache",
        "<= 40 MiB",
        loaded <= 40.0 * MIB,
        String::new(),
        format!("{:.1} MiB", loaded / MIB),
        "all switches, 32 clients",
    ));
}

/// Load while the file changes ten times a second.
async fn reload(figures: &mut Vec<Figure>) {
    let hosts = mocks(1, Behaviour { latency: Duration::from_millis(2), ..Behaviour::default() }).await;
    let config = json!({"experts": [{"name": "e0", "url": format!("http://{}/e0", hosts[0])}], "optimizations": {"memory": {}, "connections": {}, "monitoring": {}}});
    let runtime = Arc::new(Runtime::start(config).await);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (runtime, stop) = (runtime.clone(), stop.clone());
        async move {
            let mut random = Random(2);
            while !stop.load(Ordering::Relaxed) {
                let on = random.next();
                runtime.apply(|config| {
                    for (_, switch) in SWITCHES.into_iter().enumerate().filter(|(i, _)| on >> i & 1 == 1) {
                        turn_on(config, switch);
                    }
                });
                sleep(Duration::from_millis(100)).await;
            }
        }
    });
    let (rate, .., failed) = closed(runtime.serving, "/v1/queries", 16, Duration::from_secs(8)).await;
    stop.store(true, Ordering::Relaxed);
    writer.await.unwrap();
    let applied = runtime.metrics().await.sum("config_reloads_total", "applied");
    figures.push(at(
        "failed, reload under load",
        "0",
        failed == 0,
        String::new(),
        failed.to_string(),
        &format!("{applied:.0} reloads, {:.0} requests in 8 s", rate * 8.0),
    ));
}

/// All that happens, for longer: fan-out with and without repetitions, floods of requesters, changing switches.
async fn soak(figures: &mut Vec<Figure>) {
    let time = seconds("SYNTHEX_BENCH_SOAK", 60);
    let hosts = mocks(HOSTS, Behaviour { latency: Duration::from_millis(5), ..Behaviour::default() }).await;
    let mut config = fan_out(&hosts);
    config["baseline"]["cacheTtl"] = "2s".into();
    let runtime = Arc::new(Runtime::start(config).await);
    let load = tokio::spawn({
        let to = runtime.serving;
        async move {
            let mut random = Random(3);
            let (idle, end) = (Arc::new(Mutex::new(Vec::new())), Instant::now() + time);
            let failed = Arc::new(AtomicU64::new(0));
            while Instant::now() < end {
                sleep(Duration::from_secs_f64(-random.unit().ln() / 200.0)).await;
                let n = random.next() % 20_000;
                let body = Bytes::from(query(n, &mut random, !n.is_multiple_of(3)));
                let (idle, failed) = (idle.clone(), failed.clone());
                tokio::spawn(async move {
                    if ask(to, "/v1/queries", &idle, body).await.is_none() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            failed.load(Ordering::Relaxed)
        }
    });
    let (mut random, mut early, mut late) = (Random(4), Vec::new(), Vec::new());
    let started = Instant::now();
    let mut quarter = 0;
    while started.elapsed() < time {
        // The same toggles in each quarter, so that like is compared with like.
        if started.elapsed() * 4 >= time * (quarter + 1) {
            quarter += 1;
            random = Random(4);
        }
        let on = random.next();
        runtime.apply(|config| {
            for (_, switch) in SWITCHES.into_iter().enumerate().filter(|(i, _)| on >> i & 1 == 1) {
                turn_on(config, switch);
            }
        });
        sleep(Duration::from_secs(1)).await;
        let share = started.elapsed().as_secs_f64() / time.as_secs_f64();
        if (0.25..0.5).contains(&share) {
            early.push(runtime.process.rss());
        } else if share >= 0.75 {
            late.push(runtime.process.rss());
        }
    }
    let failed = load.await.unwrap();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64 / MIB;
    figures.push(less(
        "growth in a long mixed run",
        "<= +10 %",
        1.10,
        " MiB",
        mean(&early),
        mean(&late),
        &format!(
            "{} s, a toggle each second, {failed} failed; second quarter against the last",
            time.as_secs()
        ),
    ));
}

#[tokio::main]
async fn main() {
    // Cargo runs benchmarks as tests too, to see that they build.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let mut figures = Vec::new();
    switches(&mut figures).await;
    proxy(&mut figures).await;
    reload(&mut figures).await;
    soak(&mut figures).await;
    println!(
        "\n{:<27} {:>10} {:>12} {:>22} {:>9}  {:<4} how",
        "figure", "target", "baseline", "optimized", "change", "met"
    );
    for f in figures {
        let met = if f.target == "stated" {
            "-"
        } else if f.met {
            "yes"
        } else {
            "NO"
        };
        println!(
            "{:<27} {:>10} {:>12} {:>22} {:>9}  {:<4} {}",
            f.name, f.target, f.baseline, f.optimized, f.change, met, f.note
        );
    }
}
