//! The specification of a rollout. Serde and schema only.

use k8s_openapi::api::core::v1::ResourceRequirements;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Duration, RolloutStatus};

/// An arbitrary JSON object, kept as the user wrote it.
pub type Object = Map<String, Value>;

/// Rolls out a set of optimizations on one workload, stage by stage, and takes back those that do harm.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "synthex.io",
    version = "v1alpha1",
    kind = "OptimizationRollout",
    plural = "optimizationrollouts",
    shortname = "oro",
    category = "synthex",
    namespaced,
    status = "RolloutStatus",
    derive = "PartialEq",
    validation = ("self.metadata.name.size() <= 29 && self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')",
        "metadata.name must be at most 29 characters, begin with a letter and use only a-z, 0-9 and '-': the names of Services and pods are derived from it"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage.name"),
    printcolumn(name = "Weight", type_ = "string", json_path = ".status.weight.effective"),
    printcolumn(name = "Active", type_ = "string", json_path = ".status.summary.active"),
    printcolumn(name = "Worst KPI", type_ = "string", json_path = ".status.summary.worstKpi"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Rolled back", type_ = "string", json_path = ".status.summary.rolledBack", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct OptimizationRolloutSpec {
    /// What is deployed.
    pub workload: Workload,

    /// The optimizations to roll out. The bundled runtime knows `memory`, `connections` and `monitoring`.
    #[serde(default = "default_optimizations")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]))]
    pub optimizations: Vec<Optimization>,

    /// The stages, in order. Weights never fall.
    #[serde(default = "default_stages")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(
        merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]),
        validation = ("self.all(s, has(s.weight) != has(s.staging))",
            "each stage has either weight (percent of production) or staging (pods under generated load), not both and not neither"),
        validation = ("!self.exists(s, has(s.weight)) || self.filter(s, has(s.weight)).map(s, s.weight).isSorted()",
            "weights must not fall from one stage to the next: list the stages in ascending order of weight"),
        validation = ("self.map(s, has(s.staging) ? 0 : 1).isSorted()", "staging stages come before the stages with a weight")
    )]
    pub stages: Vec<Stage>,

    /// Guardrails shared by all optimizations. A KPI that only one optimization can move belongs under that optimization.
    #[serde(default = "default_kpis")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]))]
    pub kpis: Vec<Kpi>,

    /// The Service, named like the rollout, that carries production traffic.
    #[serde(default)]
    pub service: ServiceSpec,

    /// Where the KPIs are read. Default: the operator's own setting.
    #[serde(default)]
    pub prometheus: PrometheusSpec,

    /// How the KPIs are judged.
    #[serde(default)]
    pub analysis: Analysis,

    /// What the canary is compared with.
    #[serde(default)]
    pub comparison: Comparison,

    /// Stops promotion. Alarms still act, since a pause must not keep harm serving.
    #[serde(default)]
    pub paused: bool,

    /// What becomes of the stable Deployment, its ConfigMap and the Service when the rollout is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// The workload that the optimizations are rolled out on.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// The bundled runtime, deployed by the operator.
    pub runtime: Runtime,
}

/// The bundled runtime.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Runtime {
    /// Image of the runtime. Default: the operator's `--runtime-image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// Pods in production. Ready capacity never falls below this by an act of the operator.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub replicas: i32,

    /// The runtime's configuration, without `optimizations`, which the rollout itself writes.
    #[schemars(schema_with = "base_config")]
    #[x_kube(validation = ("!has(self.optimizations)", "config must not contain optimizations: list them under spec.optimizations"))]
    pub config: Object,

    /// Resources of the runtime's container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,

    /// JSON merge patch (RFC 7386) laid over the pod template, for example node selectors or labels.
    #[serde(default, skip_serializing_if = "Object::is_empty")]
    #[schemars(schema_with = "free_form")]
    pub pod_template: Object,
}

/// One optimization, which can be switched on and off by itself.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Optimization {
    /// Name; `memory`, `connections` and `monitoring` are the bundled groups of switches.
    #[schemars(length(min = 1, max = 40), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,

    /// For a bundled name: overrides of its parameters. For any other name: JSON merge patch (RFC 7386) of the runtime's
    /// configuration while the optimization is on. Nulls are refused, and so are two optimizations that set the same field.
    #[serde(default, skip_serializing_if = "Object::is_empty")]
    #[schemars(schema_with = "free_form")]
    pub config: Object,

    /// KPIs that only this optimization can move: their alarm names it. Absent on a bundled name: the bundled ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = kube::core::ListMerge::Map(vec!["name".to_owned()]))]
    pub kpis: Option<Vec<Kpi>>,
}

/// One stage.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// Name of the stage.
    #[schemars(length(min = 1, max = 40), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,

    /// Bake time: how long both arms must have been observed, by Prometheus' own timestamps.
    pub duration: Duration,

    /// Percent of production traffic that the canary takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub weight: Option<i32>,

    /// Runs the two arms apart from production, under generated load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staging: Option<Staging>,

    /// Whether the next stage waits for `synthex.io/promote=<stage>`.
    #[serde(default)]
    pub approval: Approval,

    /// Canary requests that each required error ratio must have seen before the stage can pass, beyond its own minimum evidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub min_requests: Option<i64>,
}

/// The staging stage: two equal Deployments under the same generated load.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Staging {
    /// Pods in each of the two arms.
    #[serde(default = "default_staging_replicas")]
    #[schemars(range(min = 1, max = 100))]
    pub replicas: i32,

    /// JSON merge patch of the runtime's configuration in staging. Without `experts` here, bundled mock experts answer.
    #[serde(default, skip_serializing_if = "Object::is_empty")]
    #[schemars(schema_with = "free_form")]
    pub config: Object,

    /// The generated load.
    #[serde(default)]
    pub load: Load,
}

/// Load on each arm of staging.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Load {
    /// Queries per second on each arm, open loop.
    #[serde(default = "default_rate")]
    #[schemars(range(min = 1, max = 10000))]
    pub requests_per_second: i32,

    /// How long a mock expert takes to answer.
    #[serde(default = "default_expert_latency")]
    pub expert_latency: Duration,
}

/// Whether a stage is followed by the next one without being asked.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Approval {
    /// The next stage follows as soon as this one has passed.
    #[default]
    Automatic,
    /// The next stage waits for the user's word.
    Required,
}

/// A key performance indicator: what is read, and which answer is a regression.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(validation = ("[has(self.errorRatio), has(self.latency), has(self.gauge), has(self.threshold)].filter(kind, kind).size() == 1",
    "a KPI is exactly one of errorRatio, latency, gauge or threshold"))]
#[x_kube(validation = ("!has(self.expect) || !has(self.threshold)",
    "expect needs a comparison with the baseline, which a threshold is not: use errorRatio, latency or gauge"))]
#[serde(rename_all = "camelCase")]
pub struct Kpi {
    /// Name, unique in the rollout.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,

    /// Whether a stage can pass only with proof from this KPI. An optional one still alarms.
    #[serde(default = "default_true")]
    pub required: bool,

    /// Shown, but never acts: its alarm neither stops a stage nor rolls back, and it spends nothing of the false-rollback
    /// probability.
    #[serde(default, skip_serializing_if = "is_false")]
    pub observe_only: bool,

    /// Share of the false-rollback probability that this KPI gets, relative to the others. More finds harm sooner.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 0.01, max = 100))]
    pub alpha_weight: f64,

    /// Time after the pods of a stage are exposed during which this KPI is not judged. Default: `analysis.warmUp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_up: Option<Duration>,

    /// The benefit that was promised of the optimization that owns this KPI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expect>,

    /// Errors against requests, canary compared with baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_ratio: Option<ErrorRatio>,

    /// Shares of slow requests, canary compared with baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,

    /// One value per pod, canary compared with baseline, and whether it grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gauge: Option<Gauge>,

    /// An absolute bound on a single value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Threshold>,
}

/// A promised benefit, checked at the end of each stage's bake against the change that was measured.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Expect {
    /// The promised relative change of the canary's value: -0.35 for 35 % less.
    #[schemars(range(min = -1, max = 10))]
    pub change: f64,

    /// What happens when the 95 % confidence interval of the measured change falls short of the promise as a whole.
    #[serde(default)]
    pub on_miss: OnMiss,
}

/// What happens when a promised benefit is missed.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMiss {
    /// It is said in an event.
    #[default]
    Warn,
    /// The optimization that owns the KPI is switched off.
    Rollback,
}

/// Share of failed requests, judged on raw counters by a sequential test.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ErrorRatio {
    /// Selector of the error counters, with `$arm` where the arms' matchers belong: `http_errors_total{$arm}`. No rate(): raw
    /// counters, one or more series per pod.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = ("self.contains('$arm')", "the query must contain $arm, which becomes the matchers of the compared pods, as in http_errors_total{$arm}"))]
    pub errors: String,

    /// Selector of the counters of all requests, errors included.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = ("self.contains('$arm')", "the query must contain $arm, which becomes the matchers of the compared pods, as in http_requests_total{$arm}"))]
    pub total: String,

    /// Ratio of the odds of an error, canary to baseline, that is still called equal; where errors are rare, that of the error rates.
    #[serde(default = "default_tolerance")]
    #[schemars(range(min = 1, max = 10))]
    pub tolerance: f64,

    /// Smallest difference of the two error rates that matters, as a share of requests.
    #[serde(default = "default_minimum_effect")]
    #[schemars(range(min = 0.00001, max = 0.5))]
    pub minimum_effect: f64,
}

impl ErrorRatio {
    /// An error ratio with the default tolerance and minimum effect.
    pub fn new(errors: &str, total: &str) -> Self {
        Self {
            errors: errors.into(),
            total: total.into(),
            tolerance: default_tolerance(),
            minimum_effect: default_minimum_effect(),
        }
    }
}

/// Shares of requests slower than three bounds of a histogram, judged like error ratios. The bounds are frozen before the stage's
/// evidence begins: the largest ones that at least 25 %, 5 % and 1 % of the baseline's requests exceed.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    /// Selector of the histogram, with `$arm`: `http_request_duration_seconds_bucket{$arm}` for a classic histogram,
    /// `http_request_duration_seconds{$arm}` for a native one.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = ("self.contains('$arm')", "the query must contain $arm, which becomes the matchers of the compared pods, as in http_request_duration_seconds_bucket{$arm}"))]
    pub histogram: String,

    /// Ratio of the odds of a slow request, canary to baseline, that is still called equal; where they are rare, that of the shares.
    #[serde(default = "default_tolerance")]
    #[schemars(range(min = 1, max = 10))]
    pub tolerance: f64,

    /// Smallest difference of the arms' shares that matters, as a share of requests; at the last bound it is two fifths of this.
    #[serde(default = "default_slow_effect")]
    #[schemars(range(min = 0.00001, max = 0.5))]
    pub minimum_effect: f64,
}

/// One value per pod, such as memory or processor time per request.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Gauge {
    /// PromQL that gives one series per pod, with the label `pod` and with `$arm`. `$window` becomes four intervals, for `rate()`:
    /// `sum by (pod) (rate(process_cpu_seconds_total{$arm}[$window]))`.
    #[schemars(length(min = 1, max = 2048))]
    #[x_kube(validation = ("self.contains('$arm')", "the query must contain $arm, which becomes the matchers of the compared pods, as in process_resident_memory_bytes{$arm}"))]
    pub query: String,

    /// Which way is better.
    #[serde(default)]
    pub direction: Direction,

    /// Relative change for the worse that is still called equal.
    #[serde(default = "default_gauge_tolerance")]
    #[schemars(range(min = 0, max = 10))]
    pub tolerance: f64,
}

/// Which way a gauge is better.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// More is a regression: memory, processor time, open connections.
    #[default]
    LowerIsBetter,
    /// Less is a regression: hit ratio, throughput.
    HigherIsBetter,
}

impl Latency {
    /// A latency KPI with the default tolerance and minimum effect.
    pub fn new(histogram: &str) -> Self {
        Self {
            histogram: histogram.into(),
            tolerance: default_tolerance(),
            minimum_effect: default_slow_effect(),
        }
    }
}

impl Gauge {
    /// A gauge of which less is better, with the default tolerance.
    pub fn new(query: &str) -> Self {
        Self { query: query.into(), direction: Direction::default(), tolerance: default_gauge_tolerance() }
    }
}

/// An absolute bound on a single value. `$arm` becomes the matchers of the canary's pods.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[x_kube(validation = ("has(self.max) != has(self.min)", "a threshold has exactly one of max or min"))]
#[serde(rename_all = "camelCase")]
pub struct Threshold {
    /// PromQL that gives one value.
    #[schemars(length(min = 1, max = 2048))]
    pub query: String,

    /// The value must not be above this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,

    /// The value must not be below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,

    /// Samples in a row beyond the bound that make an alarm.
    #[serde(default = "default_consecutive")]
    #[schemars(range(min = 1, max = 100))]
    pub consecutive: i32,
}

/// The production Service.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Port on which the Service listens.
    #[serde(default = "default_port")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
}

/// The Prometheus that the KPIs are read from.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PrometheusSpec {
    /// Base URL. Default: the operator's `--prometheus-url`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    #[x_kube(validation = ("isURL(self) && url(self).getScheme() in ['http', 'https']", "must be an http or https URL such as http://prometheus.monitoring.svc:9090"))]
    pub url: Option<String>,

    /// How long one query may take.
    #[serde(default = "default_timeout")]
    pub timeout: Duration,
}

/// How the KPIs are judged.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    /// Whether alarms act.
    #[serde(default)]
    pub mode: Mode,

    /// Spacing of the grid on which evidence is gathered; whole seconds, no shorter than half the scrape interval.
    #[serde(default = "default_interval")]
    #[x_kube(validation = ("duration(self) >= duration('1s') && duration(self) <= duration('5m') && duration(self).getMilliseconds() % 1000 == 0", "interval must be whole seconds, from 1s to 5m"))]
    pub interval: Duration,

    /// Span of the running pods' past from which it is learned, before a stage's evidence begins, how much pods differ among
    /// themselves and what slow means.
    #[serde(default = "default_preflight")]
    #[x_kube(validation = ("duration(self) >= duration('10s') && duration(self) <= duration('24h')", "preflight must be from 10s to 24h"))]
    pub preflight: Duration,

    /// Time after the pods of a stage are exposed during which nothing is judged.
    #[serde(default = "default_warm_up")]
    pub warm_up: Duration,

    /// Probability that a rollout without harm is rolled back at all, spent over KPIs, stages and fresh starts.
    #[serde(default = "default_false_rollback")]
    #[schemars(range(min = 0.000001, max = 0.2))]
    pub false_rollback_probability: f64,

    /// What happens to a stage that still lacks evidence after twice its duration.
    #[serde(default)]
    pub on_inconclusive: OnInconclusive,

    /// How long a KPI may be unreadable before the rollout is called stalled.
    #[serde(default = "default_no_data_deadline")]
    #[x_kube(validation = ("duration(self) >= duration('30s')", "noDataDeadline must be 30s or longer"))]
    pub no_data_deadline: Duration,
}

/// What happens to a stage that still lacks evidence after twice its duration.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnInconclusive {
    /// It goes on until there is evidence, and is called stalled.
    #[default]
    Hold,
    /// It passes, if what was measured lies within the tolerance.
    Advance,
    /// The pass is rolled back.
    Rollback,
}

/// Whether alarms act.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// An alarm rolls back.
    #[default]
    Enforce,
    /// An alarm is reported and stops promotion; nothing is rolled back.
    Observe,
}

/// What the canary is compared with.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Comparison {
    /// A baseline Deployment of the canary's own age.
    #[default]
    Fresh,
    /// The stable Deployment.
    Stable,
}

/// What becomes of the stable objects when the rollout is deleted.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeletionPolicy {
    /// Stable Deployment, ConfigMap and Service stay as they are.
    #[default]
    Orphan,
    /// All goes.
    Delete,
}

impl Default for Staging {
    fn default() -> Self {
        Self { replicas: default_staging_replicas(), config: Object::new(), load: Load::default() }
    }
}

impl Default for Load {
    fn default() -> Self {
        Self { requests_per_second: default_rate(), expert_latency: default_expert_latency() }
    }
}

impl Default for ServiceSpec {
    fn default() -> Self {
        Self { port: default_port() }
    }
}

impl Default for PrometheusSpec {
    fn default() -> Self {
        Self { url: None, timeout: default_timeout() }
    }
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            interval: default_interval(),
            preflight: default_preflight(),
            warm_up: default_warm_up(),
            false_rollback_probability: default_false_rollback(),
            on_inconclusive: OnInconclusive::default(),
            no_data_deadline: default_no_data_deadline(),
        }
    }
}

fn free_form(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// Free-form, but for the one field that the rule on it must be able to see.
fn base_config(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": { "optimizations": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } }
    })
}

fn default_optimizations() -> Vec<Optimization> {
    ["memory", "connections", "monitoring"]
        .map(|name| Optimization { name: name.into(), config: Object::new(), kpis: None })
        .into()
}

/// The seed's plan: staging for 48 h, 10 % for 24 h, then 25, 50 and 100 % over three days.
fn default_stages() -> Vec<Stage> {
    let stage = |name: &str, hours: u64, weight: Option<i32>| Stage {
        name: name.into(),
        duration: Duration::from_secs(hours * 3600),
        weight,
        staging: weight.is_none().then(Staging::default),
        approval: Approval::Automatic,
        min_requests: None,
    };
    vec![
        stage("staging", 48, None),
        stage("canary", 24, Some(10)),
        stage("progressive-25", 24, Some(25)),
        stage("progressive-50", 24, Some(50)),
        stage("progressive-100", 24, Some(100)),
    ]
}

impl Kpi {
    /// The same, but optional and with a quarter of the weight: what a stage need not wait for.
    pub fn secondary(self) -> Self {
        Self { required: false, alpha_weight: 0.25, ..self }
    }

    /// A KPI with the defaults of every common field, and of no kind yet.
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), required: true, alpha_weight: default_weight(), ..Self::default() }
    }
}

/// Guardrails that every optimization can move.
fn default_kpis() -> Vec<Kpi> {
    let per_query = "sum by (pod) (rate(process_cpu_seconds_total{$arm}[$window])) / sum by (pod) (rate(synthex_runtime_queries_total{$arm}[$window]))";
    vec![
        Kpi {
            error_ratio: Some(ErrorRatio::new(
                r#"synthex_runtime_queries_total{$arm,outcome=~"error|shed"}"#,
                "synthex_runtime_queries_total{$arm}",
            )),
            ..Kpi::named("query-errors")
        },
        Kpi {
            latency: Some(Latency::new("synthex_runtime_query_duration_seconds_bucket{$arm}")),
            ..Kpi::named("query-latency")
        },
        Kpi { gauge: Some(Gauge::new(per_query)), ..Kpi::named("cpu-per-query").secondary() },
    ]
}

fn default_replicas() -> i32 {
    10
}
fn default_staging_replicas() -> i32 {
    2
}
fn default_rate() -> i32 {
    10
}
fn default_expert_latency() -> Duration {
    Duration::from_secs(1)
}
fn default_true() -> bool {
    true
}
fn default_tolerance() -> f64 {
    1.25
}
fn default_minimum_effect() -> f64 {
    0.001
}
fn default_slow_effect() -> f64 {
    0.005
}
fn default_gauge_tolerance() -> f64 {
    0.05
}
fn default_weight() -> f64 {
    1.0
}
fn default_false_rollback() -> f64 {
    0.01
}
fn default_preflight() -> Duration {
    Duration::from_secs(600)
}
fn default_no_data_deadline() -> Duration {
    Duration::from_secs(900)
}
fn is_false(value: &bool) -> bool {
    !value
}
fn default_consecutive() -> i32 {
    3
}
fn default_port() -> i32 {
    8080
}
fn default_timeout() -> Duration {
    Duration::from_secs(10)
}
fn default_interval() -> Duration {
    Duration::from_secs(15)
}
fn default_warm_up() -> Duration {
    Duration::from_secs(60)
}
