//! One rollout told from outside, as a user sees it: through kubectl, the load generator's report and Prometheus. Changes nothing
//! but what the story says; judges nothing: the tests and the demo say what must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::paths::workspace;
use crate::progress::{step, wait};

/// Namespace of the samples.
pub const NAMESPACE: &str = "shop";
/// Name of the rollout, and of its stable Deployment and Service.
pub const ROLLOUT: &str = "experts";
/// How long a story may take.
const LIMIT: Duration = Duration::from_secs(900);

/// What a story begins with, as users have it in manifests/samples; a test may change it before it is told.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The rollout.
    pub rollout: Value,
    /// Namespace and experts, as YAML.
    pub experts: String,
    /// The traffic, as YAML.
    pub load: String,
}

impl Scene {
    /// The samples around a rollout.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn of(rollout: Value) -> Result<Self> {
        Ok(Self { rollout, experts: sample("experts.yaml")?, load: sample("load.yaml")? })
    }
}

/// What becomes of a story after a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It goes on, until the rollout has ended.
    GoesOn,
    /// It has told what it was to tell.
    Ends,
}

/// What was seen from the start of traffic to the end of the rollout.
#[derive(Debug, Default)]
pub struct Account {
    /// The rollout as it was at the end.
    pub rollout: Value,
    /// Every decision, by id.
    pub decisions: BTreeMap<i64, Decision>,
    /// The fewest Ready production pods at any look, one look a second.
    pub fewest_serving: usize,
    /// Names of all pods that were seen, with their variant.
    pub pods: BTreeMap<String, String>,
    /// The load generator's last report.
    pub load: Value,
    /// From the decision to roll back until every canary pod had the configuration without the guilty.
    pub switched_off_after: Option<Duration>,
}

/// A decision as status shows it.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Kind.
    pub what: String,
    /// Reason, with the numbers.
    pub why: String,
    /// RFC 3339.
    pub time: String,
}

/// One look at the rollout.
#[derive(Debug)]
pub struct Look {
    /// The custom resource.
    pub rollout: Value,
    /// Production pods that are Ready and not told to end.
    pub serving: usize,
}

impl Look {
    /// A field of the status as text, by JSON pointer.
    pub fn status(&self, pointer: &str) -> &str {
        self.rollout["status"].pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether the rollout has ended.
    pub fn ended(&self) -> bool {
        matches!(self.status("/phase"), "Completed" | "RolledBack")
    }
}

/// The samples as they stand.
///
/// # Errors
/// A sample cannot be read.
pub fn quickstart() -> Result<Scene> {
    let yaml = std::fs::read_to_string(workspace().join("manifests/samples/quickstart.yaml"))?;
    Scene::of(serde_saphyr::from_str(&yaml).context("manifests/samples/quickstart.yaml")?)
}

/// The quickstart without the tuning that does harm, and with one KPI more.
///
/// # Errors
/// A sample cannot be read.
pub fn harmless() -> Result<Scene> {
    let mut rollout = quickstart()?.rollout;
    let optimizations =
        rollout["spec"]["optimizations"].as_array_mut().context("the sample lists no optimizations")?;
    for optimization in optimizations {
        optimization.as_object_mut().context("an optimization is no object")?.remove("config");
    }
    // That staging is long is for benefits to be seen, which these stories do not look at.
    rollout["spec"]["stages"][0]["duration"] = json!("40s");
    // In staging the tuning would be slower as well, since all mock experts are one host there; without it nothing is.
    let latency = json!({"name": "query-latency", "latency": {
        "histogram": "synthex_runtime_query_duration_seconds_bucket{$arm}", "minimumEffect": 0.05}});
    rollout["spec"]["kpis"].as_array_mut().context("the sample lists no KPIs")?.push(latency);
    Scene::of(rollout)
}

/// Tells one rollout from a clean namespace to its end. `act` is called after each look and may disturb; what it sees is what a
/// user sees.
pub fn tell(cluster: &Cluster, scene: &Scene, mut act: impl FnMut(&Look) -> Result<Then>) -> Result<Account> {
    step("start experts, rollout and traffic", || begin(cluster, scene))?;
    let replicas =
        scene.rollout["spec"]["workload"]["runtime"]["replicas"].as_u64().unwrap_or_default() as usize;
    let mut account = Account { fewest_serving: usize::MAX, ..Account::default() };
    let mut screen = Screen::default();
    let start = Instant::now();
    loop {
        let next = Instant::now() + Duration::from_secs(1);
        let look = account.look(cluster)?;
        screen.show(&look, &account, replicas, start.elapsed());
        if look.ended() || act(&look)? == Then::Ends {
            break;
        }
        ensure!(
            start.elapsed() < LIMIT,
            "the rollout has not ended after {} s\n{}",
            LIMIT.as_secs(),
            cluster.picture(NAMESPACE)
        );
        // One look a second: the pods are sampled, not awaited.
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    account.load = load_report(cluster)?;
    Ok(account)
}

/// Experts first, then the rollout, and traffic once the stable Deployment serves, so that no failure is of the story's making.
fn begin(cluster: &Cluster, scene: &Scene) -> Result<()> {
    clean(cluster)?;
    cluster.apply(&scene.experts)?;
    cluster.rolled_out(NAMESPACE, "upstream", Duration::from_secs(60))?;
    cluster.apply(&scene.rollout.to_string())?;
    wait("the stable Deployment", Duration::from_secs(30), || {
        Ok(cluster
            .kubectl(&["-n", NAMESPACE, "get", "deployment", ROLLOUT])
            .map_err(|error| error.to_string()))
    })?;
    cluster.rolled_out(NAMESPACE, ROLLOUT, Duration::from_secs(60))?;
    cluster.apply(&scene.load)?;
    cluster.rolled_out(NAMESPACE, "load", Duration::from_secs(60))
}

/// Removes what an earlier story has left. The rollout goes first: its finalizer wants its namespace alive.
pub fn clean(cluster: &Cluster) -> Result<()> {
    let exists = cluster.kubectl(&["get", "namespace", NAMESPACE, "--ignore-not-found", "--output=name"])?;
    if exists.is_empty() {
        return Ok(());
    }
    cluster.kubectl(&["-n", NAMESPACE, "delete", "oro", "--all", "--timeout=120s"])?;
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=120s"]).map(drop)
}

/// A file of the product's samples, as users have it.
fn sample(name: &str) -> Result<String> {
    let file = workspace().join("manifests/samples").join(name);
    std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
}

/// The load generator's last report.
pub fn load_report(cluster: &Cluster) -> Result<Value> {
    let line = cluster.kubectl(&["-n", NAMESPACE, "logs", "deployment/load", "--tail=1"])?;
    serde_json::from_str(&line).with_context(|| format!("the load generator's report is no JSON: {line}"))
}

impl Account {
    fn look(&mut self, cluster: &Cluster) -> Result<Look> {
        let json =
            cluster.kubectl(&["-n", NAMESPACE, "get", "optimizationrollouts,pods", "--output=json"])?;
        let list: Value = serde_json::from_str(&json)?;
        let (mut rollout, mut serving) = (Value::Null, 0);
        for item in list["items"].as_array().into_iter().flatten() {
            if item["kind"] == "OptimizationRollout" {
                rollout = item.clone();
                continue;
            }
            let label = |name: &str| item["metadata"]["labels"][name].as_str().unwrap_or_default().to_owned();
            let name = item["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            self.pods.insert(name, label("synthex.io/variant"));
            let conditions = item["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ready = conditions
                .iter()
                .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
            if label("synthex.io/track") == "production"
                && ready
                && item["metadata"]["deletionTimestamp"].is_null()
            {
                serving += 1;
            }
        }
        self.fewest_serving = self.fewest_serving.min(serving);
        for decision in rollout["status"]["decisions"].as_array().into_iter().flatten() {
            let text = |field: &str| decision[field].as_str().unwrap_or_default().to_owned();
            let id = decision["id"].as_i64().unwrap_or_default();
            let new = self
                .decisions
                .insert(id, Decision { what: text("what"), why: text("why"), time: text("time") })
                .is_none();
            if new && decision["what"] == "OptimizationRolledBack" {
                self.switched_off_after = switched_off_after(cluster);
            }
        }
        self.rollout = rollout.clone();
        Ok(Look { rollout, serving })
    }

    /// Reasons of the decisions of a kind, in order.
    pub fn reasons(&self, what: &str) -> Vec<&str> {
        self.decisions
            .values()
            .filter(|decision| decision.what == what)
            .map(|decision| decision.why.as_str())
            .collect()
    }

    /// Names of the optimizations in a state at the end.
    pub fn optimizations(&self, state: &str) -> BTreeSet<&str> {
        let all = self.rollout["status"]["optimizations"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(|o| o["state"] == state).filter_map(|o| o["name"].as_str()).collect()
    }

    /// The stages in the order in which they were entered.
    pub fn stages(&self) -> Vec<&str> {
        self.reasons("StageStarted").into_iter().filter_map(|why| why.split(' ').nth(1)).collect()
    }

    /// Requests that failed, by the variant of the pod that failed them; `-` where none answered.
    pub fn failures(&self) -> BTreeMap<String, u64> {
        let mut failures = BTreeMap::new();
        for (instance, counts) in self.load["byInstance"].as_object().into_iter().flatten() {
            let failed = counts["failed"].as_u64().unwrap_or_default();
            if failed > 0 {
                let variant = self.pods.get(instance).cloned().unwrap_or_else(|| instance.clone());
                *failures.entry(variant).or_default() += failed;
            }
        }
        failures
    }
}

/// How long after the decision to roll back the last of the pods that ran with the guilty took a configuration without it: by
/// the event of the decision and the pods' own logs. The pods are about to be replaced, and still there since they drain.
fn switched_off_after(cluster: &Cluster) -> Option<Duration> {
    let ask = |args: &[&str]| {
        cluster.kubectl(&[&["-n", NAMESPACE], args].concat()).map_err(|error| error.to_string())
    };
    let canary = "synthex.io/variant in (canary,staging-canary)";
    let names = "--output=jsonpath={.items[*].metadata.name}";
    let event = "--output=jsonpath={.items[?(@.reason==\"OptimizationRolledBack\")].eventTime}";
    let probe = || {
        // The status is written first, the event last.
        let decided = unix_seconds(&ask(&["get", "events.events.k8s.io", event])?)
            .map_err(|error| error.to_string())?;
        let mut last: Option<f64> = None;
        for pod in ask(&["get", "pods", "--selector", canary, names])?.split_whitespace() {
            // A pod that has not started yet has never had the guilty, and has no log.
            let Ok(log) = ask(&["logs", pod, "--tail=200"]) else { continue };
            let applied = log.lines().filter(|line| line.contains("configuration applied"));
            let times = applied.filter_map(|line| unix_seconds(line.split_whitespace().next()?).ok());
            last = times.filter(|time| *time >= decided).chain(last).reduce(f64::max);
        }
        last.map(|time| Duration::from_secs_f64(time - decided))
            .ok_or_else(|| "no pod tells of it yet".to_owned())
    };
    wait("the configuration without the guilty", Duration::from_secs(4), || Ok(probe())).ok()
}

/// Unix time of an RFC 3339 time in UTC.
pub fn unix_seconds(text: &str) -> Result<f64> {
    let time: jiff::Timestamp = text.parse().with_context(|| format!("{text:?} is no time"))?;
    Ok(time.as_millisecond() as f64 / 1000.0)
}

/// Seconds of the span `from`..`to` (Unix time) for which Prometheus holds samples of a variant's pods, no two further apart than
/// `gap`: the bake as Prometheus' own timestamps tell it.
pub fn sampled_seconds(cluster: &Cluster, variant: &str, from: f64, to: f64, gap: f64) -> Result<f64> {
    let span = (to - from).ceil().max(1.0);
    let expression = format!(
        "synthex_runtime_queries_total{{namespace=\"{NAMESPACE}\",pod=~\"{ROLLOUT}-{variant}-[a-z0-9]+-[a-z0-9]+\",outcome=\"ok\"}}[{span}s]"
    );
    let matrix = cluster.query_at(&expression, to)?;
    let mut times: Vec<f64> = vec![];
    for series in matrix["data"]["result"].as_array().into_iter().flatten() {
        times.extend(
            series["values"].as_array().into_iter().flatten().filter_map(|sample| sample[0].as_f64()),
        );
    }
    times.sort_by(f64::total_cmp);
    Ok(times.windows(2).map(|pair| pair[1] - pair[0]).filter(|distance| *distance <= gap).sum())
}

/// The live picture: redrawn in a terminal, line by line elsewhere.
#[derive(Default)]
struct Screen {
    last: String,
    announced: i64,
    drawn: usize,
}

impl Screen {
    fn show(&mut self, look: &Look, account: &Account, replicas: usize, elapsed: Duration) {
        let live = std::io::stdout().is_terminal();
        let mut out = std::io::stdout().lock();
        let mut text = String::new();
        if live && self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A\x1b[J", self.drawn));
        }
        for (id, decision) in account.decisions.range(self.announced + 1..) {
            let time = decision.time.get(11..19).unwrap_or_default();
            text.push_str(&format!("{time}  {:<24} {}\n", decision.what, decision.why));
            self.announced = *id;
        }
        let state = format!(
            "{} {} {}",
            look.status("/phase"),
            look.status("/stage/name"),
            look.status("/stage/step")
        );
        let block = picture(look, &state, replicas, elapsed);
        if live {
            text.push_str(&block);
            self.drawn = block.lines().count();
        } else if state != self.last {
            text.push_str(&block);
        }
        self.last = state;
        // Nobody may be reading.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

fn picture(look: &Look, state: &str, replicas: usize, elapsed: Duration) -> String {
    let mut text = format!(
        "  [{:>4} s] {state}  weight {} (wanted {} %)  observed {}  serving {} of {replicas}\n",
        elapsed.as_secs(),
        look.status("/weight/effective"),
        look.rollout["status"]["weight"]["desired"],
        if look.status("/stage/observed").is_empty() { "-" } else { look.status("/stage/observed") },
        look.serving,
    );
    for optimization in look.rollout["status"]["optimizations"].as_array().into_iter().flatten() {
        let field = |name: &str| optimization[name].as_str().unwrap_or_default();
        text.push_str(&format!("           {:<14} {}\n", field("name"), field("state")));
    }
    for kpi in look.rollout["status"]["kpis"].as_array().into_iter().flatten() {
        let field = |name: &str| kpi[name].as_str().unwrap_or_default();
        let message: String = field("message").chars().take(120).collect();
        text.push_str(&format!("           {:<16} {:<13} {message}\n", field("name"), field("verdict")));
    }
    text
}

/// What must hold of the quickstart: exactly the harmful optimization is rolled back, in production, with its KPI's numbers; the
/// others run on all stable pods; users saw no failure but the canary's; capacity never fell.
pub fn check_harmful(cluster: &Cluster, account: &Account) -> Result<()> {
    ensure!(
        account.optimizations("RolledBack") == BTreeSet::from(["connections"]),
        "rolled back: {:?}",
        account.optimizations("RolledBack")
    );
    let reasons = account.reasons("OptimizationRolledBack");
    ensure!(reasons.len() == 1, "one rollback is wanted, there were: {reasons:?}");
    ensure!(reasons[0].starts_with("connections switched off in stage canary"), "{}", reasons[0]);
    ensure!(
        reasons[0].contains("upstream-errors") && reasons[0].contains('%'),
        "the KPI's numbers are missing: {}",
        reasons[0]
    );
    let events = cluster.kubectl(&["-n", NAMESPACE, "get", "events", "--output=json"])?;
    let events: Value = serde_json::from_str(&events)?;
    let told = events["items"].as_array().into_iter().flatten().any(|event| {
        event["reason"] == "OptimizationRolledBack"
            && event["message"].as_str().is_some_and(|text| text.contains("upstream-errors"))
    });
    ensure!(told, "no event tells of the rollback");
    for (variant, failed) in account.failures() {
        ensure!(variant == "canary", "{failed} requests failed at {variant}, which is not the canary");
    }
    check_end(cluster, account, &["memory", "monitoring"])
}

/// What must hold of a rollout that does no harm: all of it is promoted, and nothing failed.
pub fn check_harmless(cluster: &Cluster, account: &Account) -> Result<()> {
    for alarm in ["AlarmRaised", "OptimizationRolledBack"] {
        ensure!(account.reasons(alarm).is_empty(), "{alarm}: {:?}", account.reasons(alarm));
    }
    ensure!(account.failures().is_empty(), "requests failed: {:?}", account.failures());
    check_end(cluster, account, &["connections", "memory", "monitoring"])
}

fn check_end(cluster: &Cluster, account: &Account, promoted: &[&str]) -> Result<()> {
    let stages = account.stages();
    ensure!(
        stages == ["staging", "canary", "progressive-25", "progressive-50", "progressive-100"],
        "stages: {stages:?}"
    );
    ensure!(account.rollout["status"]["phase"] == "Completed", "{}", account.rollout["status"]);
    ensure!(
        account.optimizations("Promoted") == promoted.iter().copied().collect(),
        "promoted: {:?}",
        account.optimizations("Promoted")
    );
    ensure!(account.fewest_serving >= 10, "only {} pods were Ready at some moment", account.fewest_serving);
    ensure!(
        account.load["dropped"] == json!(0),
        "the load generator could not keep its rate: {}",
        account.load
    );
    cluster.kubectl(&[
        "-n",
        NAMESPACE,
        "wait",
        "--for=condition=Ready",
        &format!("oro/{ROLLOUT}"),
        "--timeout=5s",
    ])?;
    // Every stable pod says itself which switches are on.
    let pods = cluster.kubectl(&[
        "-n",
        NAMESPACE,
        "get",
        "pods",
        "--selector",
        "synthex.io/variant=stable",
        "--output=jsonpath={.items[*].metadata.name}",
    ])?;
    let pods: Vec<_> = pods.split_whitespace().collect();
    ensure!(pods.len() == 10, "stable has {} pods: {pods:?}", pods.len());
    for pod in pods {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}:9090/proxy/config");
        let config: Value = serde_json::from_str(&cluster.kubectl(&["get", "--raw", &path])?)?;
        let on = |pointer: &str| config["optimizations"].pointer(pointer) == Some(&Value::Bool(true));
        let switches = [
            ("memory", "/memory/objectPool/enabled"),
            ("memory", "/memory/cacheTtl/enabled"),
            ("connections", "/connections/unified/enabled"),
            ("monitoring", "/monitoring/adaptiveSampling/enabled"),
        ];
        for (group, pointer) in switches {
            if on(pointer) != promoted.contains(&group) {
                bail!("{pod}: {pointer} is {}, promoted are {promoted:?}", on(pointer));
            }
        }
    }
    Ok(())
}
