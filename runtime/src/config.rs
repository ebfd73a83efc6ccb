//! The configuration file: its schema, its defaults, every rule it must keep, and its hash.
//!
//! Pure: bytes in, [`Config`] or [`Error`] out. No file, socket, clock or async here, since the operator compiles
//! this module alone (`default-features = false`) to judge a configuration before it deploys it.

use std::{collections::HashSet, fmt, net::SocketAddr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub mod units;

/// Largest file that is read, in bytes. A ConfigMap cannot hold more.
pub const MAX_FILE: usize = 1 << 20;

/// Most experts that one file may name. Each expert is a metric label, and label sets must stay small.
pub const MAX_EXPERTS: usize = 100;

/// Longest duration that any field takes.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// First 16 lower-case hex digits of the SHA-256 of the raw bytes of a configuration file.
///
/// The admin port reports it as `hash`, so that whoever wrote the file can tell when it is in force.
pub fn hash(file: &[u8]) -> String {
    Sha256::digest(file).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Why a configuration was refused. Its text names each field, what is wrong with it and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct Error {
    /// All that was found; never empty. A file that cannot be read as the schema says has exactly one.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, such as `experts[1].url`, or empty for the file as a whole.
    pub path: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Problem {
    /// Cuts what would fill a log: messages show what was written, however long that is.
    fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        const MOST: usize = 1_000;
        let cut = |text: String| match text.char_indices().nth(MOST) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        };
        Self { path: cut(path.into()), message: cut(message.into()) }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.path, self.message)
        }
    }
}

/// A whole configuration. One that came from [`Config::parse`] keeps every rule of this module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Ports and limits of the service itself.
    #[serde(default)]
    pub server: Server,
    /// The upstream services, 1 to [`MAX_EXPERTS`], with unique names.
    pub experts: Vec<Expert>,
    /// How a query is spread over the experts.
    #[serde(default)]
    pub dispatch: Dispatch,
    /// Where the result of each query is handed on to; absent: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub results: Option<Results>,
    /// The switches. What is absent is off: the baseline path serves.
    #[serde(default)]
    pub optimizations: Optimizations,
    /// What "off" means.
    #[serde(default)]
    pub baseline: Baseline,
    /// Trust in services whose URL begins with `https`.
    #[serde(default)]
    pub tls: Tls,
}

/// Ports and limits of the service itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Server {
    /// Address of the serving port. Read at start only.
    pub listen: SocketAddr,
    /// Address of the admin port. Read at start only.
    pub admin: SocketAddr,
    /// Queries served at once, 1 to 100,000; one more is answered 503 with `Retry-After`.
    pub max_in_flight: u32,
    /// Largest request body in bytes, 1 KiB to 64 MiB.
    #[serde(with = "units::bytes")]
    #[schemars(schema_with = "units::bytes::schema")]
    pub body_limit: u64,
    /// Where the API keys are. Absent: whoever reaches the serving port may ask. Each line is a name, a colon and the
    /// lower-case hex SHA-256 of a key; empty lines and lines that begin with `#` are skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<Source>,
    /// Bounds how often may be asked: each API key for itself, or all together where there are no keys. Absent: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// What happens on SIGTERM.
    pub drain: Drain,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8080)),
            admin: SocketAddr::from(([0, 0, 0, 0], 9090)),
            max_in_flight: 1024,
            body_limit: 1 << 20,
            api_keys: None,
            rate_limit: None,
            drain: Drain::default(),
        }
    }
}

/// Where a secret is. The configuration itself holds none, since it is shown and logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// Absolute path of a file of at most 64 KiB; it is read again every few seconds, so that it can be rotated.
    File(String),
    /// Name of an environment variable: letters, digits and `_`.
    Env(String),
}

/// A token bucket: `burst` requests at once, and `perSecond` on average. One more is answered 429 with `Retry-After`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// Requests a second on average, 1 to 1,000,000.
    pub per_second: u32,
    /// Requests at once, 1 to 1,000,000.
    pub burst: u32,
}

/// What happens on SIGTERM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Drain {
    /// How long new queries are still taken while `/readyz` already says no, so that load balancers can notice.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub delay: Duration,
    /// How long queries in flight may take after that.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub timeout: Duration,
}

impl Default for Drain {
    fn default() -> Self {
        Self { delay: Duration::from_secs(5), timeout: Duration::from_secs(25) }
    }
}

/// One upstream service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expert {
    /// Unique name: 1 to 63 lower-case letters, digits and inner hyphens. It is a metric label.
    pub name: String,
    /// The protocol that the expert speaks.
    #[serde(default)]
    pub kind: Kind,
    /// Where the expert is: `http://host[:port][/path][?query]`. For `openai` it is the base of its API, such as
    /// `http://host:8000/v1`.
    pub url: String,
    /// How long one call may take, waiting for a connection and retries included; for a streamed completion, how long
    /// its start and then each further piece may take. Above zero.
    #[serde(default = "twenty_seconds", with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub timeout: Duration,
    /// Name of the tool that is called, 1 to 128 letters, digits, `_`, `-` and `.`. `mcp` needs it; for `http` the
    /// query is then posted to `<url>/tools/<tool>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// For `mcp`: the tool's argument that gets the query's `content` as a text. Absent: the query's fields are the
    /// arguments. 1 to 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argument: Option<String>,
    /// For `mcp`: the revision that is spoken. Absent: `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// For `openai`, which needs it: the model that is asked, and the name by which `/v1/chat/completions` finds this
    /// expert; experts with the same model stand in for each other in their order. 1 to 256 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the runtime shows to the expert to be let in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<Credential>,
}

/// The protocol that an expert speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// The query is posted as JSON, and the answer is a JSON document.
    #[default]
    Http,
    /// A tool of an MCP server (streamable HTTP) is called.
    Mcp,
    /// A model behind OpenAI's chat completions API is asked.
    #[serde(rename = "openai")]
    OpenAi,
}

/// The revision of MCP that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Protocol {
    /// The server is asked once: stateless if it can, else a session.
    #[default]
    Auto,
    /// Revision 2026-07-28: each request stands for itself.
    Stateless,
    /// Revisions 2025-03-26 to 2025-11-25: `initialize` first, then its session.
    Session,
}

/// A secret that is sent to an expert.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Credential {
    /// Where the secret is; white space around it is cut off.
    pub from: Source,
    /// Header that carries it. In `authorization` it is sent as `Bearer <secret>`, in any other as it is.
    #[serde(default = "authorization")]
    pub header: String,
}

/// How a query is spread over the experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dispatch {
    /// Longest time for a query as a whole; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub deadline: Duration,
    /// Longest time for a chat completion as a whole, whose stream may well outlast `deadline`; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub stream_deadline: Duration,
    /// Answers needed for a query to count as ok, 1 to the number of experts. Absent: all that were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quorum: Option<u32>,
    /// Second attempts.
    pub retries: Retries,
    /// When an expert is left alone for a while.
    pub breaker: Breaker,
}

impl Default for Dispatch {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            stream_deadline: Duration::from_secs(300),
            quorum: None,
            retries: Retries::default(),
            breaker: Breaker::default(),
        }
    }
}

/// Second attempts, only after failures that certainly did nothing: no connection was made, or the expert answered 429
/// or 503. Its `Retry-After` is waited for, unless the call's time ends before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retries {
    /// Further attempts of one call, 0 to 5.
    pub max: u32,
    /// Retries in percent of the calls to an expert, 0 to 100, on top of ten that are always left for quiet times: an
    /// expert that is down gets little more load than one that is well. 0: none at all.
    pub budget_percent: u32,
    /// Pause before the first retry, doubled for each further one and then cut by up to half at random; 1 ms or more.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub backoff: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self { max: 1, budget_percent: 10, backoff: Duration::from_millis(25) }
    }
}

/// Leaves an expert alone that failed several times in a row, then tries it with a single call.
///
/// Failures are: no connection, no answer in time, a status of 500 or more, an answer that cannot be read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Breaker {
    /// Off: experts are always asked.
    pub enabled: bool,
    /// Failures in a row that open the breaker, 1 to 1,000.
    pub failures: u32,
    /// How long no call is made then, and after each failed trial; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub open_for: Duration,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { enabled: true, failures: 5, open_for: Duration::from_secs(5) }
    }
}

/// A collector of results, for audits and evaluations: it is posted JSON arrays of
/// `{time, requester, outcome, durationMs, response}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Results {
    /// Where batches are posted, as an expert's URL. 400, 413 and 422 refuse a batch; any other failure is tried again.
    pub url: String,
    /// Longest time that a result waits for others; above zero.
    #[serde(default = "one_second", with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub flush: Duration,
    /// How long the collector may take to answer; above zero.
    #[serde(default = "five_seconds", with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub timeout: Duration,
}

/// The switches, in the groups that the operator turns.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Optimizations {
    /// Memory held and allocated.
    pub memory: Memory,
    /// Connections to experts.
    pub connections: Connections,
    /// The runtime's own monitoring.
    pub monitoring: Monitoring,
}

/// Switches of the group `memory`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Memory {
    /// Flat, pooled query buffers.
    pub object_pool: ObjectPool,
    /// A short-lived, bounded answer cache.
    pub cache_ttl: CacheTtl,
    /// Memory is given back before the container's limit is reached.
    pub evict: Evict,
    /// Results are handed on in small batches.
    pub batch_limit: BatchLimit,
}

/// Flat query buffers that are kept for the next query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ObjectPool {
    /// Off: every query is a tree of fields, copied for each expert.
    pub enabled: bool,
    /// Buffers kept in all, 1 to 100,000.
    pub max_objects: u32,
    /// Bytes kept in all, `retainMax` to 1 GiB.
    #[serde(with = "units::bytes")]
    #[schemars(schema_with = "units::bytes::schema")]
    pub max_bytes: u64,
    /// Largest buffer kept, in bytes, 1 KiB to 1 MiB. A larger one is freed, so that the pool cannot ratchet up
    /// to the largest query ever seen.
    #[serde(with = "units::bytes")]
    #[schemars(schema_with = "units::bytes::schema")]
    pub retain_max: u64,
    /// How often half of the buffers that nobody needed since the last time are freed; 1 s or more.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub trim_every: Duration,
}

impl Default for ObjectPool {
    fn default() -> Self {
        Self {
            enabled: false,
            max_objects: 128,
            max_bytes: 2 << 20,
            retain_max: 16 << 10,
            trim_every: Duration::from_secs(30),
        }
    }
}

/// The answer cache with a short time to live and bounds on entries and bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CacheTtl {
    /// Off: answers live for `baseline.cacheTtl`, and nothing but that and a fixed cap of the process bounds them.
    pub enabled: bool,
    /// Age after which an answer is not served any more; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub ttl: Duration,
    /// Answers kept at most, 1 to 10,000,000.
    pub max_entries: u32,
    /// Bytes kept at most, keys and book-keeping included; 64 KiB to 64 GiB.
    #[serde(with = "units::bytes")]
    #[schemars(schema_with = "units::bytes::schema")]
    pub memory_limit: u64,
}

impl Default for CacheTtl {
    fn default() -> Self {
        Self { enabled: false, ttl: Duration::from_secs(1800), max_entries: 500, memory_limit: 64 << 20 }
    }
}

/// Memory is given back before the container's limit is reached: a share of the answer cache and all pooled buffers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Evict {
    /// Off: only the cache's own bounds free anything. Without a limit of the container nothing is ever evicted.
    pub enabled: bool,
    /// Share of the container's memory limit, 0.1 to 1, page cache that can be dropped not counted.
    pub threshold: f64,
    /// Share of the last ten seconds, 0.01 to 1, in which some thread waited for memory, where the kernel tells.
    pub stall: f64,
    /// Share of the cache's entries that go each time, 0.01 to 1: those that nobody asked for again, oldest first.
    pub fraction: f64,
    /// Time between two evictions, in which the allocator gives the pages back; 1 s or more.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub cooldown: Duration,
}

impl Default for Evict {
    fn default() -> Self {
        Self { enabled: false, threshold: 0.8, stall: 0.2, fraction: 0.2, cooldown: Duration::from_secs(10) }
    }
}

/// Results are handed on as they are, in batches of bounded size, and a batch that is refused is split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BatchLimit {
    /// Off: all pending results are copied and sent as one batch, which is lost when it is refused.
    pub enabled: bool,
    /// Results in one batch, 1 to 10,000.
    pub max_items: u32,
    /// Bytes of one batch, 1 KiB to 64 MiB; one result that is larger is a batch of its own.
    #[serde(with = "units::bytes")]
    #[schemars(schema_with = "units::bytes::schema")]
    pub max_bytes: u64,
}

impl Default for BatchLimit {
    fn default() -> Self {
        Self { enabled: false, max_items: 100, max_bytes: 1 << 20 }
    }
}

/// Switches of the group `connections`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Connections {
    /// One connection pool for all experts.
    pub unified: Unified,
}

/// One connection pool for all experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Unified {
    /// Off: each expert has a pool of its own, as `baseline` says.
    pub enabled: bool,
    /// Connections to one host and port at most, 1 to 10,000. An HTTP/1.1 connection carries one request at a time.
    pub per_host: u32,
    /// Connections to all hosts at most, `perHost` to 100,000.
    pub total: u32,
    /// How long an idle connection is kept; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub keep_alive: Duration,
    /// How long a request waits for a connection before it fails as `busy`; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub acquire_timeout: Duration,
    /// Who uses the pool: names of experts, `results` for the collector, or `*` for all. The others, and the requests
    /// above `percent`, go on as the baseline does, so that services can be moved one by one.
    pub services: Vec<String>,
    /// Share of those services' requests that use the pool, 0 to 100.
    pub percent: u32,
    /// Whether connections carry many requests at once.
    pub http2: Http2,
    /// How long a name's addresses are remembered, 0s to 5m. The system tells no time to live of its own; cluster
    /// DNS says 30 s.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub dns_ttl: Duration,
    /// Age after which a connection is given no more requests, so that traffic follows the experts' pods; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub max_age: Duration,
}

/// Whether connections carry many requests at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Http2 {
    /// Where TLS agrees on it.
    #[default]
    Auto,
    /// Also without TLS: every service must speak it.
    PriorKnowledge,
    /// HTTP/1.1 only.
    Never,
}

impl Default for Unified {
    fn default() -> Self {
        Self {
            enabled: false,
            per_host: 30,
            total: 100,
            keep_alive: Duration::from_secs(30),
            acquire_timeout: Duration::from_secs(1),
            services: vec!["*".to_owned()],
            percent: 100,
            http2: Http2::default(),
            dns_ttl: Duration::from_secs(30),
            max_age: Duration::from_secs(300),
        }
    }
}

/// Switches of the group `monitoring`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Monitoring {
    /// Points are recorded when something changed, not by the clock.
    pub adaptive_sampling: AdaptiveSampling,
    /// Points sum up all that was seen since the last one.
    pub pre_aggregation: PreAggregation,
    /// Label values that clients choose are bounded.
    pub cardinality_limit: CardinalityLimit,
}

/// Points are recorded when a value changed, or when a heartbeat is due.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AdaptiveSampling {
    /// Off: a point every `baseline.sampleInterval`.
    pub enabled: bool,
    /// Probe interval at the start and after a change; `min` to `probeMax`.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub base: Duration,
    /// Time after which a probe that saw a change is repeated, to confirm it; 100 ms or more.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub min: Duration,
    /// Longest probe interval: a lasting step is recorded within this plus `min`, twice at the most.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub probe_max: Duration,
    /// Longest silence of a series; `probeMax` to 290 s, since Prometheus looks back five minutes only.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub heartbeat: Duration,
    /// What is otherwise for a component.
    pub overrides: Overrides,
}

impl Default for AdaptiveSampling {
    fn default() -> Self {
        Self {
            enabled: false,
            base: Duration::from_secs(5),
            min: Duration::from_secs(1),
            probe_max: Duration::from_secs(15),
            heartbeat: Duration::from_secs(240),
            overrides: Overrides::default(),
        }
    }
}

/// What is otherwise for a component.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Overrides {
    /// Resident memory, in bytes; a change is 2 % and 256 KiB.
    pub memory: Override,
    /// Processors in use; a change is 10 % and a hundredth of a processor.
    pub cpu: Override,
    /// Bytes read and written a second; a change is 1 % and 4 KiB/s.
    pub disk: Override,
    /// Bytes received and sent a second; a change is 5 % and 1 KiB/s.
    pub network: Override,
    /// Mean seconds of a call, for each expert; a change is 10 % and a millisecond.
    pub upstream: Override,
}

impl Overrides {
    /// Each component's name and override, in the order of their declaration.
    pub fn each(&self) -> [(&'static str, &Override); 5] {
        let Self { memory, cpu, disk, network, upstream } = self;
        [("memory", memory), ("cpu", cpu), ("disk", disk), ("network", network), ("upstream", upstream)]
    }
}

/// How one component is watched. What is absent is as for all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Override {
    /// As `base` for all.
    #[serde(with = "units::duration::option", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "units::duration::schema")]
    pub base: Option<Duration>,
    /// As `probeMax` for all.
    #[serde(with = "units::duration::option", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "units::duration::schema")]
    pub probe_max: Option<Duration>,
    /// Share of the last recorded value that counts as a change, 0.001 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// Points sum up all that was seen since the last one: count, sum, least, greatest and last value, and a sketch of
/// the distribution that can be merged with those of other points and processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PreAggregation {
    /// Off: a point is the value of one look.
    pub enabled: bool,
    /// Time between two points, 1 s to 1 h; with `adaptiveSampling` a point comes when that says so.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub window: Duration,
}

impl Default for PreAggregation {
    fn default() -> Self {
        Self { enabled: false, window: Duration::from_secs(60) }
    }
}

/// Bounds the series whose label values clients choose: who asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CardinalityLimit {
    /// Off: each requester has series of its own, up to a fixed cap of the process.
    pub enabled: bool,
    /// Series at most, 10 to 20,000; requesters above it are counted together as `__other__`, with their outcomes.
    pub max_series: u32,
}

impl Default for CardinalityLimit {
    fn default() -> Self {
        Self { enabled: false, max_series: 1000 }
    }
}

/// What "off" means: the path that each optimization is compared with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Baseline {
    /// Connections of each expert's own pool, 1 to 10,000.
    pub per_host: u32,
    /// How long an idle connection of such a pool is kept; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub keep_alive: Duration,
    /// Age after which a cached answer is not served any more; above zero.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub cache_ttl: Duration,
    /// Fixed interval of the monitoring points; 1 s or more.
    #[serde(with = "units::duration")]
    #[schemars(schema_with = "units::duration::schema")]
    pub sample_interval: Duration,
}

impl Default for Baseline {
    fn default() -> Self {
        Self {
            per_host: 10,
            keep_alive: Duration::from_secs(15),
            cache_ttl: Duration::from_secs(4 * 3600),
            sample_interval: Duration::from_secs(5),
        }
    }
}

/// Trust in services whose URL begins with `https`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tls {
    /// A PEM file of authorities to trust besides the public ones. Read when a connection pool is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
}

fn one_second() -> Duration {
    Duration::from_secs(1)
}

fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

fn twenty_seconds() -> Duration {
    Duration::from_secs(20)
}

fn authorization() -> String {
    "authorization".to_owned()
}

impl Config {
    /// Reads a YAML or JSON file and checks every rule. A file with any fault is refused whole.
    pub fn parse(file: &[u8]) -> Result<Self, Error> {
        if file.len() > MAX_FILE {
            return Err(Error::one(
                "",
                format!("the file has {} bytes; at most {MAX_FILE} are read", file.len()),
            ));
        }
        if file.iter().all(u8::is_ascii_whitespace) {
            return Err(Error::one("", "the file is empty; write at least experts: [{name: …, url: …}]"));
        }
        let options = serde_saphyr::options! { with_snippet: false };
        // The YAML reader knows the line, the path tracker the field: the reader of the message wants both.
        let mut path = String::new();
        let config: Self = serde_saphyr::with_deserializer_from_slice_with_options(file, options, |reader| {
            serde_path_to_error::deserialize(reader).map_err(|error| {
                path = error.path().to_string();
                error.into_inner()
            })
        })
        .map_err(|error| {
            // The reader's advice is for programmers who call it, not for who wrote the file.
            let message = error.to_string().replace(", set DuplicateKeyPolicy in Options if acceptable", "");
            Error::one(path.trim_matches(['.', '?']), message)
        })?;
        config.validate()?;
        Ok(config)
    }

    /// What a file may say, as JSON Schema (2020-12), for editors and for checks before a deployment. Ranges and rules
    /// between fields are told in the descriptions; [`Config::parse`] holds them.
    pub fn schema() -> String {
        format!("{:#}", schemars::schema_for!(Self).as_value())
    }

    /// Checks every rule that types alone do not keep; all faults are reported at once.
    pub fn validate(&self) -> Result<(), Error> {
        let mut check = Check::default();

        let server = &self.server;
        check.range("server.maxInFlight", server.max_in_flight, 1, 100_000);
        check.size("server.bodyLimit", server.body_limit, 1 << 10, 64 << 20);
        check.at_most("server.drain.delay", server.drain.delay, LONGEST);
        check.positive("server.drain.timeout", server.drain.timeout);
        if server.listen == server.admin && server.listen.port() != 0 {
            check.fail(
                "server.admin",
                format!("{} is also server.listen; give the admin port its own", server.admin),
            );
        }

        if let Some(source) = &server.api_keys {
            check.source("server.apiKeys", source);
        }
        if let Some(rate) = &server.rate_limit {
            check.range("server.rateLimit.perSecond", rate.per_second, 1, 1_000_000);
            check.range("server.rateLimit.burst", rate.burst, 1, 1_000_000);
        }

        check.experts(&self.experts);
        check.positive("dispatch.deadline", self.dispatch.deadline);
        check.positive("dispatch.streamDeadline", self.dispatch.stream_deadline);
        let retries = &self.dispatch.retries;
        check.range("dispatch.retries.max", retries.max, 0, 5);
        check.range("dispatch.retries.budgetPercent", retries.budget_percent, 0, 100);
        check.at_least("dispatch.retries.backoff", retries.backoff, Duration::from_millis(1));
        check.at_most("dispatch.retries.backoff", retries.backoff, LONGEST);
        check.range("dispatch.breaker.failures", self.dispatch.breaker.failures, 1, 1_000);
        check.positive("dispatch.breaker.openFor", self.dispatch.breaker.open_for);
        if let Some(quorum) = self.dispatch.quorum {
            let experts = u32::try_from(self.experts.len()).unwrap_or(u32::MAX);
            if quorum == 0 || quorum > experts {
                check.fail(
                    "dispatch.quorum",
                    format!(
                        "{quorum} is outside 1 to {experts} (the number of experts); leave it out to need all"
                    ),
                );
            }
        }

        let pool = &self.optimizations.memory.object_pool;
        check.range("optimizations.memory.objectPool.maxObjects", pool.max_objects, 1, 100_000);
        check.size("optimizations.memory.objectPool.retainMax", pool.retain_max, 1 << 10, 1 << 20);
        check.size("optimizations.memory.objectPool.maxBytes", pool.max_bytes, pool.retain_max, 1 << 30);
        check.at_least("optimizations.memory.objectPool.trimEvery", pool.trim_every, Duration::from_secs(1));
        check.at_most("optimizations.memory.objectPool.trimEvery", pool.trim_every, LONGEST);
        let cache = &self.optimizations.memory.cache_ttl;
        check.positive("optimizations.memory.cacheTtl.ttl", cache.ttl);
        check.range("optimizations.memory.cacheTtl.maxEntries", cache.max_entries, 1, 10_000_000);
        check.size("optimizations.memory.cacheTtl.memoryLimit", cache.memory_limit, 64 << 10, 64 << 30);

        let evict = &self.optimizations.memory.evict;
        check.share("optimizations.memory.evict.threshold", evict.threshold, 0.1);
        check.share("optimizations.memory.evict.stall", evict.stall, 0.01);
        check.share("optimizations.memory.evict.fraction", evict.fraction, 0.01);
        check.at_least("optimizations.memory.evict.cooldown", evict.cooldown, Duration::from_secs(1));
        check.at_most("optimizations.memory.evict.cooldown", evict.cooldown, LONGEST);
        let batch = &self.optimizations.memory.batch_limit;
        check.range("optimizations.memory.batchLimit.maxItems", batch.max_items, 1, 10_000);
        check.size("optimizations.memory.batchLimit.maxBytes", batch.max_bytes, 1 << 10, 64 << 20);

        if let Some(results) = &self.results {
            if let Err(reason) = check_url(&results.url) {
                check.fail("results.url", reason);
            }
            check.positive("results.flush", results.flush);
            check.positive("results.timeout", results.timeout);
        }

        let unified = &self.optimizations.connections.unified;
        check.range("optimizations.connections.unified.perHost", unified.per_host, 1, 10_000);
        check.range("optimizations.connections.unified.total", unified.total, 1, 100_000);
        if unified.total < unified.per_host {
            check.fail(
                "optimizations.connections.unified.total",
                format!(
                    "{} is less than perHost ({}); raise total or lower perHost",
                    unified.total, unified.per_host
                ),
            );
        }
        check.positive("optimizations.connections.unified.keepAlive", unified.keep_alive);
        check.positive("optimizations.connections.unified.acquireTimeout", unified.acquire_timeout);
        for (i, service) in unified.services.iter().enumerate() {
            let known = matches!(service.as_str(), "*" | "results")
                || self.experts.iter().any(|e| e.name == *service);
            if !known {
                check.fail(
                    format!("optimizations.connections.unified.services[{i}]"),
                    format!("{service:?} is no service; write names of experts, results, or \"*\" for all"),
                );
            }
        }
        check.range("optimizations.connections.unified.percent", unified.percent, 0, 100);
        check.at_most("optimizations.connections.unified.dnsTtl", unified.dns_ttl, Duration::from_secs(300));
        check.positive("optimizations.connections.unified.maxAge", unified.max_age);

        let monitoring = &self.optimizations.monitoring;
        check.sampling(&monitoring.adaptive_sampling);
        let window = monitoring.pre_aggregation.window;
        check.at_least("optimizations.monitoring.preAggregation.window", window, Duration::from_secs(1));
        check.at_most("optimizations.monitoring.preAggregation.window", window, Duration::from_secs(3600));
        let series = monitoring.cardinality_limit.max_series;
        check.range("optimizations.monitoring.cardinalityLimit.maxSeries", series, 10, 20_000);

        check.range("baseline.perHost", self.baseline.per_host, 1, 10_000);
        check.positive("baseline.keepAlive", self.baseline.keep_alive);
        check.positive("baseline.cacheTtl", self.baseline.cache_ttl);
        check.at_least("baseline.sampleInterval", self.baseline.sample_interval, Duration::from_secs(1));
        check.at_most("baseline.sampleInterval", self.baseline.sample_interval, LONGEST);

        if check.problems.is_empty() { Ok(()) } else { Err(Error { problems: check.problems }) }
    }
}

impl Error {
    /// An error with one problem, for rules that only a running process can check.
    pub fn one(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { problems: vec![Problem::new(path, message)] }
    }
}

/// Collects what is wrong.
#[derive(Default)]
struct Check {
    problems: Vec<Problem>,
}

impl Check {
    fn fail(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::new(path, message));
    }

    fn range(&mut self, path: &str, value: u32, min: u32, max: u32) {
        if !(min..=max).contains(&value) {
            self.fail(path, format!("{value} is outside {min} to {max}"));
        }
    }

    fn size(&mut self, path: &str, value: u64, min: u64, max: u64) {
        if !(min..=max).contains(&value) {
            let [value, min, max] = [value, min, max].map(units::bytes::format);
            self.fail(path, format!("{value} is outside {min} to {max}"));
        }
    }

    fn share(&mut self, path: &str, value: f64, min: f64) {
        if !(min..=1.0).contains(&value) {
            self.fail(path, format!("{value} is outside {min} to 1; write a share such as 0.8"));
        }
    }

    fn at_least(&mut self, path: &str, value: Duration, min: Duration) {
        if value < min {
            let [value, min] = [value, min].map(units::duration::format);
            self.fail(path, format!("{value} is too short; write {min} or more"));
        }
    }

    fn at_most(&mut self, path: &str, value: Duration, max: Duration) {
        if value > max {
            let [value, max] = [value, max].map(units::duration::format);
            self.fail(path, format!("{value} is too long; write {max} or less"));
        }
    }

    fn positive(&mut self, path: &str, value: Duration) {
        if value.is_zero() {
            self.fail(path, "0s is not allowed here; write a duration above zero, such as 30s");
        }
        self.at_most(path, value, LONGEST);
    }

    fn experts(&mut self, experts: &[Expert]) {
        if experts.is_empty() {
            self.fail("experts", "the list is empty; name at least one expert");
        }
        if experts.len() > MAX_EXPERTS {
            self.fail(
                "experts",
                format!("{} experts are too many; at most {MAX_EXPERTS} can be named", experts.len()),
            );
        }
        let mut seen = HashSet::new();
        for (i, expert) in experts.iter().enumerate().take(MAX_EXPERTS) {
            let name = &expert.name;
            if !is_label(name) {
                self.fail(
                    format!("experts[{i}].name"),
                    format!(
                        "{name:?} is not a name; use 1 to 63 lower-case letters, digits and inner hyphens"
                    ),
                );
            }
            if !seen.insert(name) {
                self.fail(
                    format!("experts[{i}].name"),
                    format!("{name:?} is used twice; give each expert its own name"),
                );
            }
            if let Err(reason) = check_url(&expert.url) {
                self.fail(format!("experts[{i}].url"), reason);
            }
            self.positive(&format!("experts[{i}].timeout"), expert.timeout);
            self.kind(&format!("experts[{i}]"), expert);
            if let Some(credential) = &expert.credential {
                self.source(&format!("experts[{i}].credential.from"), &credential.from);
                self.header(&format!("experts[{i}].credential.header"), &credential.header);
            }
        }
    }

    /// What each kind needs, and what it has no use for.
    fn kind(&mut self, path: &str, expert: &Expert) {
        let (kind, needs, may) = match expert.kind {
            Kind::Http => ("http", None, &["tool"][..]),
            Kind::Mcp => ("mcp", Some("tool"), &["tool", "argument", "protocol"][..]),
            Kind::OpenAi => ("openai", Some("model"), &["model"][..]),
        };
        for (field, given) in [
            ("tool", expert.tool.is_some()),
            ("argument", expert.argument.is_some()),
            ("protocol", expert.protocol.is_some()),
            ("model", expert.model.is_some()),
        ] {
            if given && !may.contains(&field) {
                self.fail(
                    format!("{path}.{field}"),
                    format!("an expert of kind {kind} has none; leave it out"),
                );
            } else if !given && needs == Some(field) {
                self.fail(
                    format!("{path}.{field}"),
                    format!("an expert of kind {kind} needs it; name the {field}"),
                );
            }
        }
        let of_tool = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
        if let Some(tool) = &expert.tool
            && !((1..=128).contains(&tool.len()) && tool.bytes().all(of_tool))
        {
            let message = format!("{tool:?} is not a tool's name; use 1 to 128 letters, digits, _, - and .");
            self.fail(format!("{path}.tool"), message);
        }
        for (field, value, max) in [("argument", &expert.argument, 128), ("model", &expert.model, 256)] {
            if let Some(value) = value
                && (!(1..=max).contains(&value.len()) || value.chars().any(char::is_control))
            {
                let message =
                    format!("{value:?} cannot be used; write 1 to {max} bytes without control characters");
                self.fail(format!("{path}.{field}"), message);
            }
        }
        let extended = expert.kind == Kind::OpenAi || (expert.kind == Kind::Http && expert.tool.is_some());
        if extended && expert.url.contains('?') {
            self.fail(
                format!("{path}.url"),
                "a path is added to this URL, so it can have no ?query; leave it out",
            );
        }
    }

    fn source(&mut self, path: &str, source: &Source) {
        match source {
            Source::File(file) if !file.starts_with('/') || file.len() > 4096 => {
                self.fail(
                    path,
                    format!("{file:?} is not an absolute path of a file, such as /etc/secrets/key"),
                );
            }
            Source::Env(name) if !is_variable(name) => {
                let message = "this is not the name of an environment variable; use letters, digits and _ \
                               (the secret itself must not stand here)";
                self.fail(path, message);
            }
            Source::File(_) | Source::Env(_) => {}
        }
    }

    fn header(&mut self, path: &str, name: &str) {
        let of_header = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        if !((1..=64).contains(&name.len()) && name.bytes().all(of_header)) {
            self.fail(
                path,
                format!("{name:?} is not a header; use 1 to 64 lower-case letters, digits, - and _"),
            );
        }
        // What frames a request, and what the runtime writes itself.
        const OWN: [&str; 10] = [
            "accept",
            "connection",
            "content-length",
            "content-type",
            "host",
            "keep-alive",
            "te",
            "transfer-encoding",
            "upgrade",
            "x-request-id",
        ];
        if OWN.contains(&name) || name.starts_with("mcp-") {
            self.fail(
                path,
                format!("{name} is the runtime's own; use authorization, or a header such as x-api-key"),
            );
        }
    }

    fn sampling(&mut self, sampling: &AdaptiveSampling) {
        let path = |field: &str| format!("optimizations.monitoring.adaptiveSampling.{field}");
        self.at_least(&path("min"), sampling.min, Duration::from_millis(100));
        self.at_least(&path("base"), sampling.base, sampling.min);
        self.at_least(&path("probeMax"), sampling.probe_max, sampling.base);
        self.at_least(&path("heartbeat"), sampling.heartbeat, sampling.probe_max);
        self.at_most(&path("heartbeat"), sampling.heartbeat, Duration::from_secs(290));
        for (name, wanted) in sampling.overrides.each() {
            let path = |field: &str| format!("{}.{name}.{field}", path("overrides"));
            let base = wanted.base.unwrap_or(sampling.base);
            let probe_max = wanted.probe_max.unwrap_or(sampling.probe_max);
            self.at_least(&path("base"), base, sampling.min);
            self.at_least(&path("probeMax"), probe_max, base);
            self.at_most(&path("probeMax"), probe_max, sampling.heartbeat);
            self.share(&path("threshold"), wanted.threshold.unwrap_or(1.0), 0.001);
        }
    }
}

/// As Kubernetes' RFC 1123 labels.
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn is_variable(name: &str) -> bool {
    (1..=256).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// Stricter than the RFC, so that whatever passes here is also a URI for the HTTP client.
fn check_url(url: &str) -> Result<(), String> {
    // First of all, since every other message shows the URL.
    if url
        .split_once("://")
        .is_some_and(|(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or("").contains('@'))
    {
        return Err(
            "the URL holds a user name or password, which would be shown in logs; leave it out".to_owned()
        );
    }
    let example = "write http://host[:port][/path], or https";
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return Err(format!("{url:?} is not an HTTP URL; {example}"));
    };
    if url.len() > 2048 {
        return Err(format!("the URL has {} bytes; at most 2048 are taken", url.len()));
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if path.contains('#') {
        return Err(format!("{url:?}: a fragment (#…) is never sent; leave it out"));
    }
    let in_path = |b: u8| b.is_ascii_alphanumeric() || b"/?-._~!$&'()*+,;=:@%".contains(&b);
    if let Some(bad) = path.chars().find(|c| !c.is_ascii() || !in_path(*c as u8)) {
        return Err(format!("{url:?}: {bad:?} cannot stand in a path; percent-encode it"));
    }
    if authority.contains('@') {
        return Err(
            "the URL holds a user name or password, which would be shown in logs; leave it out".to_owned()
        );
    }
    let (host, port) = match authority.strip_prefix('[').and_then(|v6| v6.split_once(']')) {
        Some((host, tail)) => {
            host.parse::<std::net::Ipv6Addr>()
                .map_err(|_| format!("{url:?}: {host:?} is not an IPv6 address"))?;
            match tail.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if tail.is_empty() => (host, None),
                None => return Err(format!("{url:?}: {tail:?} after the address; {example}")),
            }
        }
        None => {
            let (host, port) =
                authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
            let of_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if host.len() > 253 || !host.bytes().all(of_name) {
                return Err(format!("{url:?}: {host:?} is not a host name; {example}"));
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err(format!("{url:?} names no host; {example}"));
    }
    if port.is_some_and(|port| !matches!(port.parse::<u16>(), Ok(1..))) {
        return Err(format!("{url:?}: the port must be a number from 1 to 65535"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutations;

    const ONE: &str = "experts: [{name: alpha, url: \"http://alpha:8000/query\"}]";

    #[test]
    fn a_file_with_one_expert_has_the_defaults() {
        let config = Config::parse(ONE.as_bytes()).expect("valid");
        assert_eq!(config.server, Server::default());
        assert_eq!(config.experts[0].timeout, Duration::from_secs(20));
        assert_eq!(config.optimizations, Optimizations::default());
        assert!(!config.optimizations.connections.unified.enabled);
        assert_eq!(config.dispatch.quorum, None);
    }

    const WHOLE: &str = r#"
            server: {listen: "0.0.0.0:8080", admin: "0.0.0.0:9090", maxInFlight: 1024, bodyLimit: 1MiB, apiKeys: {file: /keys},
                     rateLimit: {perSecond: 10, burst: 20}, drain: {delay: 5s, timeout: 25s}}
            experts:
            - {name: alpha, kind: http, url: "http://alpha:8000/query", timeout: 20s}
            - {name: beta, kind: http, url: "http://alpha:8000/api/", tool: search}
            - {name: gamma, kind: mcp, url: "http://tools:3000/mcp", tool: search, argument: query, protocol: session}
            - {name: delta, kind: openai, url: "http://llm/v1", model: some-model, credential: {from: {env: LLM_KEY}}}
            dispatch: {deadline: 30s, streamDeadline: 5m, quorum: 1, retries: {max: 1, budgetPercent: 10, backoff: 25ms},
                       breaker: {enabled: true, failures: 5, openFor: 5s}}
            results: {url: "http://audit:8000/results", flush: 1s, timeout: 5s}
            optimizations:
              memory:
                objectPool: {enabled: true, maxObjects: 128, maxBytes: 2MiB, retainMax: 16KiB, trimEvery: 30s}
                cacheTtl: {enabled: true, ttl: 30m, maxEntries: 500, memoryLimit: 64MiB}
                evict: {enabled: true, threshold: 0.8, stall: 0.2, fraction: 0.2, cooldown: 10s}
                batchLimit: {enabled: true, maxItems: 100, maxBytes: 1MiB}
              connections:
                unified: {enabled: true, perHost: 30, total: 100, keepAlive: 30s, acquireTimeout: 1s, services: [alpha, results], percent: 50, http2: priorKnowledge, dnsTtl: 30s, maxAge: 5m}
              monitoring:
                adaptiveSampling: {enabled: true, base: 5s, min: 1s, probeMax: 15s, heartbeat: 240s, overrides: {memory: {base: 10s, threshold: 0.02}, disk: {probeMax: 60s}}}
                preAggregation: {enabled: true, window: 60s}
                cardinalityLimit: {enabled: true, maxSeries: 1000}
            baseline: {perHost: 10, keepAlive: 15s, cacheTtl: 4h, sampleInterval: 5s}
            tls: {caFile: /etc/synthex/ca.pem}"#;

    #[test]
    fn the_whole_schema_is_read_and_written() {
        let file = WHOLE;
        let config = Config::parse(file.as_bytes()).expect("valid");
        assert!(config.optimizations.memory.cache_ttl.enabled);
        let again = serde_saphyr::to_string(&config).expect("writable");
        assert_eq!(Config::parse(again.as_bytes()).expect("valid again"), config);
    }

    /// Every field that is written is in the schema, and nothing else may be.
    fn covered(schema: &serde_json::Value, part: &serde_json::Value, path: &str, value: &serde_json::Value) {
        let resolve = |part: &serde_json::Value| match part["$ref"].as_str() {
            Some(to) => schema.pointer(to.trim_start_matches('#')).expect(path).clone(),
            None => part.clone(),
        };
        // An optional part is the part or null.
        let part = resolve(part["anyOf"].get(0).unwrap_or(part));
        assert!(
            part["description"].is_string() || path.is_empty() || part["type"].is_array(),
            "{path} is not told"
        );
        match value {
            serde_json::Value::Object(fields) if part["properties"].is_object() => {
                assert_eq!(part["additionalProperties"], false, "{path}");
                for (name, value) in fields {
                    let field = &part["properties"][name];
                    assert!(field.is_object(), "{path}.{name} is not in the schema");
                    covered(schema, field, &format!("{path}.{name}"), value);
                }
            }
            serde_json::Value::Array(items) => {
                for item in items.iter().filter(|item| item.is_object()) {
                    covered(schema, &part["items"], path, item);
                }
            }
            _ => {}
        }
    }

    #[test]
    fn the_schema_tells_every_field() {
        let schema: serde_json::Value = serde_json::from_str(&Config::schema()).expect("JSON");
        let config = Config::parse(WHOLE.as_bytes()).expect("valid");
        let written = serde_json::to_value(config).expect("JSON");
        covered(&schema, &schema, "", &written);
        assert_eq!(schema["required"], serde_json::json!(["experts"]));
    }

    #[test]
    fn json_is_read_too() {
        let file =
            br#"{"experts": [{"name": "alpha", "url": "http://alpha/"}], "server": {"bodyLimit": 4096}}"#;
        assert_eq!(Config::parse(file).expect("valid").server.body_limit, 4096);
    }

    /// What is refused, and the words the message must have.
    #[test]
    fn refused() {
        let optimizations = |text: &str| format!("{ONE}\noptimizations: {text}");
        let expert = |text: &str| format!("experts: [{{{text}}}]");
        for (file, words) in [
            ("".to_owned(), vec!["empty", "experts"]),
            ("experts: []".to_owned(), vec!["experts", "at least one"]),
            ("experts: {".to_owned(), vec!["experts", "line 1"]),
            ("just text".to_owned(), vec!["line"]),
            (format!("{ONE}\n{ONE}"), vec!["duplicate mapping key: experts at line 2"]),
            (format!("{ONE}\nsurprise: 1"), vec!["surprise"]),
            (format!("{ONE}\nserver: {{maxInflight: 1}}"), vec!["server", "maxInflight", "maxInFlight"]),
            (format!("{ONE}\nserver: {{maxInFlight: 0}}"), vec!["server.maxInFlight", "1 to 100000"]),
            (format!("{ONE}\nserver: {{maxInFlight: -1}}"), vec!["server.maxInFlight"]),
            (format!("{ONE}\nserver: {{bodyLimit: 10}}"), vec!["server.bodyLimit", "1KiB to 64MiB"]),
            (format!("{ONE}\nserver: {{bodyLimit: 1MB}}"), vec!["server.bodyLimit", "64MiB"]),
            (format!("{ONE}\nserver: {{listen: here}}"), vec!["server.listen"]),
            (format!("{ONE}\nserver: {{admin: \"0.0.0.0:8080\"}}"), vec!["server.admin", "its own"]),
            (
                format!("{ONE}\nserver: {{drain: {{timeout: 0s}}}}"),
                vec!["server.drain.timeout", "above zero"],
            ),
            (format!("{ONE}\nserver: {{drain: {{delay: -5s}}}}"), vec!["server.drain.delay", "negative"]),
            (format!("{ONE}\nserver: {{drain: {{delay: 5}}}}"), vec!["server.drain.delay", "unit"]),
            (format!("{ONE}\nserver: {{drain: {{delay: 999999h}}}}"), vec!["server.drain.delay", "168h"]),
            (expert("name: alpha"), vec!["experts[0]", "url"]),
            (expert("url: \"http://a\""), vec!["experts[0]", "name"]),
            (expert("name: Alpha, url: \"http://a\""), vec!["experts[0].name", "lower-case"]),
            (expert("name: alpha, kind: smtp, url: \"http://a\""), vec!["experts[0].kind", "smtp", "mcp"]),
            (expert("name: alpha, kind: mcp, url: \"http://a\""), vec!["experts[0].tool", "needs it"]),
            (expert("name: alpha, kind: openai, url: \"http://a\""), vec!["experts[0].model", "needs it"]),
            (expert("name: alpha, url: \"http://a\", model: x"), vec!["experts[0].model", "leave it out"]),
            (expert("name: alpha, url: \"http://a\", tool: a/b"), vec!["experts[0].tool", "letters"]),
            (expert("name: alpha, url: \"http://a/?b\", tool: c"), vec!["experts[0].url", "?query"]),
            (
                expert("name: alpha, url: \"http://a\", credential: {from: {file: key}}"),
                vec!["experts[0].credential.from", "absolute"],
            ),
            (
                expert("name: alpha, url: \"http://a\", credential: {from: {env: sk-123}}"),
                vec!["experts[0].credential.from", "environment variable"],
            ),
            (
                expert("name: alpha, url: \"http://a\", credential: {from: {env: K}, header: host}"),
                vec!["experts[0].credential.header", "own"],
            ),
            (
                expert("name: alpha, url: \"http://a\", credential: {secret: k}"),
                vec!["experts[0].credential", "secret", "from"],
            ),
            (format!("{ONE}\nserver: {{apiKeys: keys}}"), vec!["server.apiKeys", "keys"]),
            (format!("{ONE}\nserver: {{apiKeys: {{file: keys}}}}"), vec!["server.apiKeys", "absolute"]),
            (
                format!("{ONE}\nserver: {{rateLimit: {{perSecond: 0, burst: 1}}}}"),
                vec!["server.rateLimit.perSecond", "1 to 1000000"],
            ),
            (format!("{ONE}\ndispatch: {{streamDeadline: 0s}}"), vec!["dispatch.streamDeadline"]),
            (format!("{ONE}\ndispatch: {{retries: {{max: 6}}}}"), vec!["dispatch.retries.max", "0 to 5"]),
            (
                format!("{ONE}\ndispatch: {{retries: {{budgetPercent: 101}}}}"),
                vec!["dispatch.retries.budgetPercent"],
            ),
            (
                format!("{ONE}\ndispatch: {{retries: {{backoff: 0s}}}}"),
                vec!["dispatch.retries.backoff", "1ms"],
            ),
            (format!("{ONE}\ndispatch: {{breaker: {{failures: 0}}}}"), vec!["dispatch.breaker.failures"]),
            (format!("{ONE}\ndispatch: {{breaker: {{openFor: 0s}}}}"), vec!["dispatch.breaker.openFor"]),
            (expert("name: alpha, url: \"ftp://a\""), vec!["experts[0].url", "not an HTTP URL"]),
            (expert("name: alpha, url: \"http://\""), vec!["experts[0].url", "no host"]),
            (expert("name: alpha, url: \"http://a:0\""), vec!["experts[0].url", "port"]),
            (expert("name: alpha, url: \"http://a:99999/\""), vec!["experts[0].url", "port"]),
            (expert("name: alpha, url: \"http://me:secret@a/\""), vec!["experts[0].url", "password"]),
            (expert("name: alpha, url: \"http://a/ b\""), vec!["experts[0].url", "percent-encode"]),
            (expert("name: alpha, url: \"http://a/#b\""), vec!["experts[0].url", "fragment"]),
            (expert("name: alpha, url: \"http://[::1/\""), vec!["experts[0].url", "host"]),
            (expert("name: alpha, url: \"http://a\", timeout: 0s"), vec!["experts[0].timeout"]),
            (
                expert("name: a, url: \"http://a\"}, {name: a, url: \"http://b\""),
                vec!["experts[1].name", "used twice"],
            ),
            (format!("{ONE}\ndispatch: {{quorum: 2}}"), vec!["dispatch.quorum", "1 to 1"]),
            (format!("{ONE}\ndispatch: {{quorum: 0}}"), vec!["dispatch.quorum"]),
            (format!("{ONE}\ndispatch: {{deadline: soon}}"), vec!["dispatch.deadline", "such as"]),
            (
                optimizations("{memory: {objectPool: {enabled: maybe}}}"),
                vec!["optimizations.memory.objectPool.enabled"],
            ),
            (optimizations("{memory: {objectPool: {maxObjects: 0}}}"), vec!["objectPool.maxObjects"]),
            (
                optimizations("{memory: {objectPool: {retainMax: 1GiB}}}"),
                vec!["objectPool.retainMax", "1MiB"],
            ),
            (optimizations("{memory: {objectPool: {maxBytes: 2KiB}}}"), vec!["objectPool.maxBytes", "16KiB"]),
            (optimizations("{memory: {objectPool: {trimEvery: 0s}}}"), vec!["objectPool.trimEvery", "1s"]),
            (optimizations("{memory: {evict: {threshold: 80}}}"), vec!["evict.threshold", "0.1 to 1"]),
            (optimizations("{memory: {evict: {fraction: .nan}}}"), vec!["evict.fraction"]),
            (optimizations("{memory: {evict: {stall: 0}}}"), vec!["evict.stall"]),
            (optimizations("{memory: {evict: {cooldown: 1ms}}}"), vec!["evict.cooldown", "1s"]),
            (optimizations("{memory: {batchLimit: {maxItems: 0}}}"), vec!["batchLimit.maxItems"]),
            (optimizations("{memory: {batchLimit: {maxBytes: 1GiB}}}"), vec!["batchLimit.maxBytes", "64MiB"]),
            (format!("{ONE}\nresults: {{url: \"audit:1\"}}"), vec!["results.url", "not an HTTP URL"]),
            (format!("{ONE}\nresults: {{url: \"http://a\", flush: 0s}}"), vec!["results.flush"]),
            (optimizations("{memory: {cacheTtl: {ttl: 0s}}}"), vec!["cacheTtl.ttl"]),
            (optimizations("{memory: {cacheTtl: {maxEntries: 0}}}"), vec!["cacheTtl.maxEntries"]),
            (optimizations("{memory: {cacheTtl: {memoryLimit: 1}}}"), vec!["cacheTtl.memoryLimit"]),
            (optimizations("{memory: {objectpool: {}}}"), vec!["optimizations.memory", "objectpool"]),
            (optimizations("{turbo: {}}"), vec!["optimizations", "turbo", "connections"]),
            (optimizations("{connections: {unified: {perHost: 0}}}"), vec!["unified.perHost"]),
            (optimizations("{connections: {unified: {perHost: 200}}}"), vec!["unified.total", "200"]),
            (optimizations("{connections: {unified: {acquireTimeout: 0s}}}"), vec!["unified.acquireTimeout"]),
            (
                optimizations("{connections: {unified: {services: [beta]}}}"),
                vec!["unified.services[0]", "beta", "names of experts"],
            ),
            (optimizations("{connections: {unified: {percent: 101}}}"), vec!["unified.percent", "0 to 100"]),
            (optimizations("{connections: {unified: {http2: always}}}"), vec!["http2", "priorKnowledge"]),
            (optimizations("{connections: {unified: {dnsTtl: 1h}}}"), vec!["unified.dnsTtl", "5m"]),
            (optimizations("{connections: {unified: {maxAge: 0s}}}"), vec!["unified.maxAge"]),
            (
                optimizations("{monitoring: {adaptiveSampling: {min: 1ms}}}"),
                vec!["adaptiveSampling.min", "100ms"],
            ),
            (
                optimizations("{monitoring: {adaptiveSampling: {base: 30s}}}"),
                vec!["adaptiveSampling.probeMax", "30s"],
            ),
            (
                optimizations("{monitoring: {adaptiveSampling: {heartbeat: 5m}}}"),
                vec!["adaptiveSampling.heartbeat"],
            ),
            (
                optimizations("{monitoring: {adaptiveSampling: {overrides: {gpu: {base: 5s}}}}}"),
                vec!["adaptiveSampling.overrides", "gpu", "upstream"],
            ),
            (
                optimizations("{monitoring: {adaptiveSampling: {overrides: {memory: {base: 30s}}}}}"),
                vec!["overrides.memory.probeMax", "30s"],
            ),
            (
                optimizations("{monitoring: {adaptiveSampling: {overrides: {cpu: {threshold: 2}}}}}"),
                vec!["overrides.cpu.threshold", "0.001 to 1"],
            ),
            (
                optimizations("{monitoring: {preAggregation: {window: 2h}}}"),
                vec!["preAggregation.window", "1h"],
            ),
            (
                optimizations("{monitoring: {cardinalityLimit: {maxSeries: 1}}}"),
                vec!["cardinalityLimit.maxSeries", "10 to 20000"],
            ),
            (format!("{ONE}\nbaseline: {{sampleInterval: 10ms}}"), vec!["baseline.sampleInterval", "1s"]),
            (format!("{ONE}\nbaseline: {{perHost: 0}}"), vec!["baseline.perHost"]),
            (format!("{ONE}\n{}", "#".repeat(MAX_FILE)), vec!["at most"]),
        ] {
            let error = Config::parse(file.as_bytes()).expect_err(&file).to_string();
            for word in words {
                assert!(error.contains(word), "{word:?} is not in {error:?}, for {file:.80}");
            }
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        assert!(Config::parse(b"experts: \xff").is_err());
    }

    #[test]
    fn deep_nesting_is_refused_and_not_followed() {
        assert!(Config::parse("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let file = format!("{ONE}\nbaseline: {{perHost: 0}}\ndispatch: {{deadline: 0s}}");
        assert_eq!(Config::parse(file.as_bytes()).expect_err("two faults").problems.len(), 2);
    }

    #[test]
    fn hash_is_the_first_quarter_of_sha256() {
        assert_eq!(hash(b""), "e3b0c44298fc1c14");
        assert_eq!(hash(b"abc"), "ba7816bf8f01cfea");
    }

    #[test]
    fn the_readme_shows_what_is_taken() {
        let blocks: Vec<&str> = include_str!("../README.md").split("```yaml\n").skip(1).collect();
        assert!(blocks.len() >= 2);
        for block in blocks {
            let shown = block.split("```").next().unwrap_or_default();
            let file = if shown.contains("experts:") { shown.to_owned() } else { format!("{ONE}\n{shown}") };
            Config::parse(file.as_bytes()).unwrap_or_else(|error| panic!("{error} in\n{file}"));
        }
    }

    #[test]
    fn messages_do_not_grow_with_the_file() {
        let long = "x".repeat(MAX_FILE - 100);
        for file in [
            format!("experts: [{{name: \"{long}\", url: u}}]"),
            format!("experts: [{{name: a, url: \"ftp://{long}\"}}]"),
            format!("{ONE}\n{long}: 1"),
            format!("{ONE}\nserver: {{bodyLimit: \"{long}\"}}"),
        ] {
            let error = Config::parse(file.as_bytes()).expect_err("refused").to_string();
            assert!(error.len() < 4_000, "{} bytes", error.len());
        }
    }

    const FILES: &[&str] = &[
        ONE,
        r#"{"experts": [{"name": "a", "url": "http://[::1]:80/x?y=%20", "timeout": "1h30m", "tool": "t"}]}"#,
        "server: {listen: \"0.0.0.0:1\", bodyLimit: 1MiB, rateLimit: {perSecond: 1, burst: 2}, apiKeys: {env: K}}\n\
         experts:\n- &a {name: a, kind: openai, url: \"http://a\", model: m, credential: {from: {file: /k}}}\n\
         - {name: b, kind: mcp, url: \"http://b\", tool: t, argument: x, protocol: session}\n\
         dispatch: {deadline: 1.5s, quorum: 1, retries: {max: 2}, breaker: {enabled: false}}\n\
         optimizations: {memory: {cacheTtl: {enabled: true, ttl: 30m}}, connections: {unified: {total: 40}}}\n\
         baseline: {cacheTtl: 4h}\n",
    ];

    fn file() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            3 => mutations::of(FILES),
            1 => prop::collection::vec(any::<u8>(), 0..300),
        ]
    }

    proptest! {
        /// Whatever the bytes: a configuration that keeps every rule and can be written and read again, or an error
        /// that says something.
        #[test]
        fn any_file_is_read_or_refused(file in file()) {
            match Config::parse(&file) {
                Ok(config) => {
                    prop_assert_eq!(config.validate(), Ok(()));
                    let again = serde_saphyr::to_string(&config).expect("writable");
                    prop_assert_eq!(Config::parse(again.as_bytes()), Ok(config));
                }
                Err(error) => {
                    prop_assert!(!error.problems.is_empty());
                    prop_assert!(error.problems.iter().all(|problem| !problem.message.is_empty()));
                }
            }
        }
    }
}
