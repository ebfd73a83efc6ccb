//! `kubectl synthex`: records what a stage was judged by, judges it again offline, explains decisions, and puts verbs.
//!
//! May use every layer; no other layer may use it. It asks the functions that the operator uses and judges nothing by rules of its
//! own, so that what it says offline is what was decided live.
//!
//! # Data sets
//!
//! `record` writes and `backtest` reads JSON. Times are Unix seconds on a grid of `step`. By hand, this is enough:
//!
//! ```json
//! {
//!   "version": 1,
//!   "step": 15,
//!   "arms": {
//!     "namespace": "shop",
//!     "canary": {"deployment": "experts-canary", "pods": 1},
//!     "baseline": {"deployment": "experts-baseline", "pods": 1}
//!   },
//!   "kpis": [{
//!     "definition": {"name": "errors", "errorRatio": {"errors": "errors{$arm}", "total": "requests{$arm}"}},
//!     "from": 0,
//!     "until": 30,
//!     "queries": [
//!       {"series": [{"pod": "experts-canary-5d9c7-bbb24", "samples": [[0, 0], [15, 2], [30, 5]]}]},
//!       {"series": [
//!         {"pod": "experts-canary-5d9c7-bbb24", "samples": [[0, 0], [15, 100], [30, 200]]},
//!         {"pod": "experts-baseline-5d9c7-bbb24", "samples": [[0, 0], [15, 100], [30, 200]]}
//!       ]}
//!     ]
//!   }]
//! }
//! ```
//!
//! | field | meaning | default |
//! |---|---|---|
//! | `version` | 1; another version is refused | |
//! | `rollout`, `stage` | for the reader | |
//! | `attempt` | which start of the evidence this is, from 1 | 1 |
//! | `stages`, `falseRollbackProbability` | what alpha is spent over, and how much | 1, 0.01 |
//! | `step` | spacing of the grid in seconds | |
//! | `bake` | ticks of the bake; gauges look at its end, and `detectable` counts on it | those of the KPI |
//! | `arms` | `namespace`; `canary` and `baseline`, each with `deployment` and `pods`. A pod belongs to the arm whose deployment its name begins with, followed by `-`, a hash of up to ten, `-` and a suffix of five letters and digits (`24-9b-df-hj-np-tv-xz`, as Kubernetes names pods) | no baseline |
//! | `kpis[].definition`, `.owner` | the KPI as in the custom resource, and the optimization that it stands under | shared |
//! | `kpis[].warmUp` | seconds for which a pod that begins in mid-stage is left out of a latency | 0 |
//! | `kpis[].alarmAt` | log evidence at which it alarms | ln(1/alpha), computed from the KPIs, `stages`, `falseRollbackProbability`, `attempt` |
//! | `kpis[].preflight` | what was learned, as in `.status.preflight`; a latency needs its `bounds` | the cautious end of the range |
//! | `kpis[].from`, `.until` | first tick, the base of the first difference, and last | |
//! | `kpis[].queries[]` | one answer each: `errors`, `total`, times of the samples (errorRatio); buckets, times of the samples (latency); one value per pod (gauge); the canary's and the baseline's value (threshold). The times may be left out: each sample is then fresh | |
//! | `queries[].query` | the PromQL, for the reader | |
//! | `series[].pod`, `.instance`, `.job` | the labels; `pod` may be absent in a threshold only | empty |
//! | `series[].labels` | any text that tells series of one pod apart | empty |
//! | `series[].le`, `.histogram`, `.native`, `.above` | of a bucket: its bound, any text that tells histograms of one pod apart, whether it is a native one's, and then its lower bound | |
//! | `series[].samples` | `[time, value]`, rising; values that are no number as Prometheus writes them: `"NaN"`, `"+Inf"`, `"-Inf"` | |
//! | `kpis[].decided` | the numbers of `.status.decisions[].basis`, which `backtest` compares | |
//!
//! Other fields are refused, but within `preflight` and `decided`. A file is 256 MiB at most.

pub mod backtest;
pub mod cluster;
pub mod dataset;
pub mod explain;
pub mod record;

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use k8s_openapi::jiff::Timestamp;

use self::{
    cluster::Access,
    dataset::{DataSet, MAX_BYTES},
    record::{Choice, Recording},
};
use crate::{
    api::OptimizationRollout,
    decision::{judge::Tick, snapshot::Verb},
    effects::{clock, prometheus::Prometheus},
};

/// Exit code of a backtest in which a KPI fails that may act.
const FAILS: u8 = 2;
/// Largest saved resource that is read, in bytes: more than etcd holds.
const MAX_RESOURCE: u64 = 8 << 20;

/// Record, replay and explain optimization rollouts, and act on them.
///
/// Exit code: 0 fine; 1 an error; 2 a backtest in which a KPI fails that may act.
#[derive(Parser)]
#[command(name = "kubectl-synthex", bin_name = "kubectl synthex", version)]
struct Arguments {
    #[command(flatten)]
    access: Access,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Save the samples that a stage is judged by, or was, from Prometheus into a data set.
    Record(Record),
    /// Judge a data set, or a stage from Prometheus, offline and tick by tick. Exit code 2 where a KPI fails that may act.
    Backtest(Backtest),
    /// Say where a rollout stands and why each decision was taken, with the numbers to recompute it.
    Explain(Explain),
    /// Grant the approval of a stage, or skip the rest of its bake.
    Promote {
        /// Name of the rollout.
        name: String,
        /// The stage that runs.
        stage: String,
        /// Skip the rest of the bake; never past a failing KPI.
        #[arg(long)]
        force: bool,
    },
    /// End the pass, every optimization of it off.
    Abort {
        /// Name of the rollout.
        name: String,
        /// The stage that runs.
        stage: String,
    },
    /// Switch one optimization off.
    Rollback {
        /// Name of the rollout.
        name: String,
        /// The optimization.
        optimization: String,
    },
    /// Let an optimization that was rolled back have another pass.
    Retry {
        /// Name of the rollout.
        name: String,
        /// The optimization.
        optimization: String,
    },
}

/// Which rollout, and which stage of it.
#[derive(Args)]
struct Which {
    /// Name of the stage: the one that runs, or one that was decided on. Absent: the one that runs, else the last.
    #[arg(long)]
    stage: Option<String>,
    /// Attempt at it. Absent: the last.
    #[arg(long, requires = "stage")]
    attempt: Option<i32>,
    /// KPI that is wanted, as often as needed. Absent: all.
    #[arg(long = "kpi", value_name = "KPI")]
    kpis: Vec<String>,
    /// Prometheus, as this machine reaches it. Absent: spec.prometheus.url.
    #[arg(long, value_name = "URL")]
    prometheus: Option<String>,
}

#[derive(Args)]
struct Record {
    /// Name of the rollout.
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// The custom resource as saved by kubectl get -o yaml or -o json, instead of a name.
    #[arg(short, long, value_name = "FILE", conflicts_with = "name")]
    file: Option<PathBuf>,
    #[command(flatten)]
    which: Which,
    /// Where to write. Absent: standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Args)]
struct Backtest {
    /// A data set (a file, or - for standard input), or the name of a rollout whose samples are read from Prometheus.
    target: String,
    #[command(flatten)]
    which: Which,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Tabular,
}

#[derive(Args)]
struct Explain {
    /// Name of the rollout.
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// The custom resource as saved by kubectl get -o yaml or -o json, instead of a name; - for standard input.
    #[arg(short, long, value_name = "FILE", conflicts_with = "name")]
    file: Option<PathBuf>,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Textual,
}

#[derive(Clone, Copy, ValueEnum)]
enum Tabular {
    Table,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum Textual {
    Text,
    Json,
}

/// The whole program.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Where not even this can be written there is nobody to tell.
            let _ = error.print();
            // Not clap's own 2, which here is the answer of a backtest.
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kubectl-synthex: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(arguments: Arguments) -> Result<ExitCode> {
    let access = arguments.access;
    let (name, verb) = match arguments.command {
        Command::Record(record) => {
            let object = resource(&access, record.name.as_deref(), record.file.as_deref()).await?;
            let (set, _) = recorded(&object, &record.which).await?;
            match &record.output {
                None => write(io::stdout().lock(), &set)?,
                Some(path) => {
                    let file =
                        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
                    write(file, &set).with_context(|| format!("cannot write {}", path.display()))?;
                    eprintln!(
                        "{}: {} KPIs of stage {}, attempt {}",
                        path.display(),
                        set.kpis.len(),
                        set.stage,
                        set.attempt
                    );
                }
            }
            return Ok(ExitCode::SUCCESS);
        }
        Command::Backtest(backtest) => {
            let path = Path::new(&backtest.target);
            // A rollout's name has neither.
            let is_file = backtest.target == "-" || backtest.target.contains(['.', '/']) || path.is_file();
            let (set, whole) = if is_file {
                ensure!(
                    backtest.which.stage.is_none() && backtest.which.prometheus.is_none(),
                    "{} is a data set: --stage and --prometheus go with the name of a rollout",
                    backtest.target
                );
                (DataSet::parse(&bytes(path, MAX_BYTES)?).with_context(|| backtest.target.clone())?, true)
            } else {
                recorded(&access.rollout(&backtest.target).await?, &backtest.which).await?
            };
            let report = backtest::run(&set, &backtest.which.kpis)?;
            print(&match backtest.output {
                Tabular::Table => report.table(),
                Tabular::Json => json(&report)?,
            })?;
            return Ok(match (report.fails(), whole) {
                (true, _) => ExitCode::from(FAILS),
                // A verdict without a KPI that could not be read is none to go on with.
                (false, false) => ExitCode::FAILURE,
                (false, true) => ExitCode::SUCCESS,
            });
        }
        Command::Explain(explain) => {
            let object = resource(&access, explain.name.as_deref(), explain.file.as_deref()).await?;
            let rollout = match record::resolved(&object, "") {
                Ok(rollout) => Some(rollout),
                Err(error) => {
                    eprintln!("kubectl-synthex: {error:#}");
                    None
                }
            };
            let explanation = explain::explain(&object, rollout.as_ref());
            print(&match explain.output {
                Textual::Text => explanation.text(),
                Textual::Json => json(&explanation)?,
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Promote { name, stage, force: true } => (name, Verb::Promote(format!("force:{stage}"))),
        Command::Promote { name, stage, force: false } => (name, Verb::Promote(stage)),
        Command::Abort { name, stage } => (name, Verb::Abort(stage)),
        Command::Rollback { name, optimization } => (name, Verb::Rollback(optimization)),
        Command::Retry { name, optimization } => (name, Verb::Retry(optimization)),
    };
    print(&access.put(&name, &verb).await?)?;
    Ok(ExitCode::SUCCESS)
}

/// Records, and says on standard error what is to be said of it.
async fn recorded(object: &OptimizationRollout, which: &Which) -> Result<(DataSet, bool)> {
    let Some(url) = which.prometheus.clone().or_else(|| object.spec.prometheus.url.clone()) else {
        bail!(
            "neither --prometheus nor spec.prometheus.url says where Prometheus is; inside a cluster, forward its port and name it:\n  \
             kubectl port-forward -n monitoring service/prometheus 9090\n  \
             kubectl synthex ... --prometheus http://127.0.0.1:9090"
        );
    };
    let rollout = record::resolved(object, &url)?;
    let prometheus = Prometheus::new(&url, rollout.prometheus_timeout.std())?;
    let choice = Choice { stage: which.stage.as_deref(), attempt: which.attempt, kpis: &which.kpis };
    let Recording { set, remarks, whole } =
        record::record(object, &rollout, choice, &prometheus, clock::now()).await?;
    for remark in remarks {
        eprintln!("kubectl-synthex: {remark}");
    }
    Ok((set, whole))
}

/// The rollout of a name, or the one saved in a file.
async fn resource(access: &Access, name: Option<&str>, file: Option<&Path>) -> Result<OptimizationRollout> {
    match (name, file) {
        (_, Some(path)) => parse(&bytes(path, MAX_RESOURCE)?).with_context(|| path.display().to_string()),
        (Some(name), None) => access.rollout(name).await,
        (None, None) => bail!("give the name of a rollout, or a file with -f"),
    }
}

/// A custom resource as kubectl prints it.
///
/// # Errors
/// When it is none.
pub fn parse(text: &[u8]) -> Result<OptimizationRollout> {
    let text = std::str::from_utf8(text).context("is not UTF-8")?;
    match text.trim_start().starts_with('{') {
        true => {
            serde_json::from_str(text).context("is no OptimizationRollout in JSON (and not a list of them)")
        }
        false => {
            serde_saphyr::from_str(text).context("is no OptimizationRollout in YAML (and not a list of them)")
        }
    }
}

fn bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    let read = match path.to_str() {
        Some("-") => io::stdin().lock().take(most + 1).read_to_end(&mut bytes),
        _ => File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)),
    };
    read.with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(bytes.len() as u64 <= most, "{} is larger than {} MiB", path.display(), most >> 20);
    Ok(bytes)
}

fn write(to: impl io::Write, set: &DataSet) -> Result<()> {
    let mut to = io::BufWriter::new(to);
    serde_json::to_writer(&mut to, set)?;
    to.write_all(b"\n")?;
    Ok(to.flush()?)
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// To standard output; that nobody reads it to its end is no error.
fn print(text: &str) -> Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// A tick as a date, in UTC.
fn date(tick: Tick) -> String {
    Timestamp::from_second(tick).map_or_else(|_| tick.to_string(), |time| time.to_string())
}
