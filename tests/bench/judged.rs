//! Streams of a world through the real judge: samples as Prometheus would give them, the lesson, and one fold per tick.

use std::collections::BTreeMap;

use synthex_operator::{
    api::{Direction, Evidence, Preflight, Track, Verdict},
    decision::judge::{Answer, AnswerHealth, Arm, Arms, Kpi, Lesson, Series, Test, Tick, Trial, beginning},
};

use super::world::{BASELINE, BOUNDS, CANARY, Pod, SLOT, Scrape};

/// The KPIs, in the order of all that is counted by KPI.
pub const KPIS: [&str; 3] = ["errors", "latency", "memory"];
/// KPIs among which the probability of a false rollback is divided; as in the notes, one more than are measured.
pub const SHARES: f64 = 4.0;

pub const NAMESPACE: &str = "shop";

/// The KPIs with their defaults.
pub fn kpis() -> [Kpi; 3] {
    let kpi = |name: &str, test| Kpi {
        name: name.to_owned(),
        owner: None,
        required: true,
        observe_only: false,
        weight: 1.0,
        warm_up: None,
        expect: None,
        test,
    };
    [
        kpi(
            KPIS[0],
            Test::ErrorRatio {
                errors: "http_errors_total{$arm}".to_owned(),
                total: "http_requests_total{$arm}".to_owned(),
                tolerance: 1.25,
                minimum_effect: 0.001,
            },
        ),
        kpi(
            KPIS[1],
            Test::Latency {
                histogram: "http_request_duration_seconds_bucket{$arm}".to_owned(),
                tolerance: 1.25,
                minimum_effect: 0.005,
            },
        ),
        kpi(
            KPIS[2],
            Test::Gauge {
                query: "process_resident_memory_bytes{$arm}".to_owned(),
                direction: Direction::LowerIsBetter,
                tolerance: 0.05,
            },
        ),
    ]
}

/// What one series reads off a scrape.
type Column = fn(&Scrape, usize) -> f64;

const ERRORS: Column = |scrape, _| scrape.errors;
const REQUESTS: Column = |scrape, _| scrape.requests;
const MEMORY: Column = |scrape, _| scrape.memory;
/// Requests no slower than a bound, of all at the end.
const BUCKET: Column = |scrape, bound| scrape.requests - scrape.above.get(bound).unwrap_or(&0.0);

/// A series of a pod, without its points.
fn series(pod: &str, metric: &str, le: Option<&str>) -> Series {
    let mut labels = BTreeMap::from([
        ("__name__", metric),
        ("container", "app"),
        ("job", "pods"),
        ("namespace", NAMESPACE),
        ("pod", pod),
    ]);
    labels.extend(le.map(|le| ("le", le)));
    let mut labels: BTreeMap<String, String> =
        labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    labels.insert("instance".to_owned(), format!("{pod}:8080"));
    Series::new(&labels, vec![])
}

/// The series of one pod in one answer.
struct Columns(Vec<(&'static str, Option<&'static str>, Column, usize)>);

impl Columns {
    fn of(metric: &'static str, column: Column) -> Self {
        Self(vec![(metric, None, column, 0)])
    }

    /// The buckets of the bounds that are asked for, and of all.
    fn buckets(asked: impl Fn(&str) -> bool) -> Self {
        let metric = "http_request_duration_seconds_bucket";
        let bounds = BOUNDS.iter().enumerate().filter(|(_, bound)| asked(bound));
        let finite = bounds.map(|(index, bound)| (metric, Some(*bound), BUCKET, index));
        // As Prometheus sorts them: "+Inf" before any digit.
        let all: (&str, _, Column, _) = (metric, Some("+Inf"), BUCKET, BOUNDS.len());
        Self([all].into_iter().chain(finite).collect())
    }

    fn made(&self, pod: &str) -> impl Iterator<Item = Series> {
        self.0.iter().map(|(metric, le, ..)| series(pod, metric, *le))
    }
}

/// What was scraped of each pod at a tick; nothing of one that was not there.
pub type Scrapes = (Tick, Vec<(String, Option<Scrape>)>);

/// Samples of the pre-flight: one scrape of each pod at each end of a block.
pub struct Past {
    pub scrapes: Vec<Scrapes>,
}

/// What is learned of each KPI in the span before `until`.
pub fn learn(kpis: &[Kpi], track: Track, deployment: &str, past: &Past, until: Tick) -> Vec<Preflight> {
    let answer = |columns: &Columns| {
        let mut by_pod: BTreeMap<&str, Vec<Series>> = BTreeMap::new();
        for (time, pods) in &past.scrapes {
            for (pod, scrape) in pods {
                let Some(scrape) = scrape else { continue };
                let made = by_pod.entry(pod).or_insert_with(|| columns.made(pod).collect());
                for (series, (_, _, column, index)) in made.iter_mut().zip(&columns.0) {
                    series.points.push((*time, column(scrape, *index)));
                }
            }
        }
        Answer::Series(by_pod.into_values().flatten().collect())
    };
    let errors = Columns::of("http_errors_total", ERRORS);
    let requests = Columns::of("http_requests_total", REQUESTS);
    let answers = [
        vec![answer(&errors), answer(&requests)],
        vec![answer(&Columns::buckets(|_| true))],
        vec![answer(&Columns::of("process_resident_memory_bytes", MEMORY))],
    ];
    let learned = kpis.iter().zip(answers).map(|(kpi, answers)| {
        let lesson = Lesson::over(kpi, track, NAMESPACE, vec![deployment.to_owned()], until, 40 * SLOT, SLOT);
        lesson.learn(&answers).expect("answers").expect("requests")
    });
    learned.collect()
}

/// The answers to one round of queries of one KPI, filled anew at each tick.
struct Feed {
    columns: Vec<Columns>,
    /// Whether the last answer is the times of the one before.
    timed: bool,
    answers: Vec<Answer>,
    names: Vec<String>,
}

impl Feed {
    fn of(kpi: usize, preflight: &Preflight) -> Self {
        let (columns, timed) = match kpi {
            0 => (
                vec![
                    Columns::of("http_errors_total", ERRORS),
                    Columns::of("http_requests_total", REQUESTS),
                    Columns::of("http_requests_total", REQUESTS),
                ],
                true,
            ),
            1 => (
                vec![
                    Columns::buckets(|bound| preflight.bounds.iter().any(|frozen| frozen == bound)),
                    Columns::buckets(|_| false),
                ],
                true,
            ),
            _ => (vec![Columns::of("process_resident_memory_bytes", MEMORY)], false),
        };
        Self { columns, timed, answers: vec![], names: vec![] }
    }

    fn fill(&mut self, pods: &[&Pod], from: Tick, until: Tick) {
        if self.names.len() != pods.len() || self.names.iter().zip(pods).any(|(name, pod)| *name != pod.name)
        {
            self.names = pods.iter().map(|pod| pod.name.clone()).collect();
            let made = |columns: &Columns| pods.iter().flat_map(|pod| columns.made(&pod.name)).collect();
            self.answers = self.columns.iter().map(|columns| Answer::Series(made(columns))).collect();
        }
        let count = self.answers.len();
        for (number, (answer, columns)) in self.answers.iter_mut().zip(&self.columns).enumerate() {
            let times = self.timed && number + 1 == count;
            let Answer::Series(series) = answer else { continue };
            for (of_pod, pod) in series.chunks_mut(columns.0.len()).zip(pods) {
                for (series, (_, _, column, index)) in of_pod.iter_mut().zip(&columns.0) {
                    series.points.clear();
                    for (time, scrape) in [(from, &pod.before), (until, &pod.now)] {
                        if let Some(scrape) = scrape {
                            let value = if times { time as f64 - pod.age } else { column(scrape, *index) };
                            series.points.push((time, value));
                        }
                    }
                }
            }
        }
    }
}

/// One KPI in one stage.
pub struct Judged {
    pub trial: Trial,
    pub evidence: Evidence,
    pub health: AnswerHealth,
    /// Ticks, of which some told nothing.
    pub blind: u64,
    /// Tick of the alarm, from 1, and what was said.
    pub alarm: Option<(i64, String)>,
    feed: Feed,
    from: Tick,
    ticks: i64,
}

impl Judged {
    /// Begins at `from`, after what is asked from `asked` on to see which pods are cold.
    pub fn begin(kpi: usize, trial: Trial, asked: Tick, from: Tick) -> Self {
        let preflight = trial.preflight.as_ref().expect("learned");
        Self {
            feed: Feed::of(kpi, preflight),
            evidence: beginning(from),
            health: AnswerHealth::Good,
            blind: 0,
            alarm: None,
            trial,
            from: asked,
            ticks: 0,
        }
    }

    /// Makes the answers of a tick.
    pub fn ask(&mut self, pods: &[&Pod]) {
        self.feed.fill(pods, self.from, self.from + SLOT);
    }

    /// A tick before the evidence begins.
    pub fn warm(&mut self, pods: &[&Pod]) {
        self.ask(pods);
        self.fold();
        self.ticks = 0;
    }

    /// Folds them.
    pub fn fold(&mut self) {
        let until = self.from + SLOT;
        let evidence = std::mem::take(&mut self.evidence);
        (self.evidence, self.health) = self.trial.fold(evidence, &self.feed.answers, self.from, until);
        self.from = until;
        self.ticks += 1;
    }

    /// A tick. The verdict is asked for when the evidence has a new peak, as nothing else makes it fail.
    pub fn tick(&mut self, pods: &[&Pod]) {
        let before = peak(&self.evidence);
        self.ask(pods);
        self.fold();
        self.blind += u64::from(self.health != AnswerHealth::Good);
        if self.alarm.is_none() && peak(&self.evidence) > before {
            let status = self.trial.judge(&self.evidence, &self.health);
            if status.verdict == Verdict::Fail {
                let tolerated = status.tolerated.unwrap_or_default();
                self.alarm = Some((self.ticks, format!("tolerated {tolerated:.2}, {}", status.message)));
            }
        }
    }

    pub fn verdict(&self) -> Verdict {
        self.trial.judge(&self.evidence, &self.health).verdict
    }
}

fn peak(evidence: &Evidence) -> f64 {
    let shares = evidence.shares.iter().map(|share| share.peak);
    shares.chain(evidence.gauge.as_ref().map(|gauge| gauge.peak)).fold(0.0, f64::max)
}

/// The arms of a stage.
pub fn arms(names: [&str; 2], pods: [usize; 2]) -> Arms {
    let arm = |arm: usize| Arm { deployment: names[arm].to_owned(), pods: pods[arm] as i32 };
    Arms { namespace: NAMESPACE.to_owned(), canary: arm(CANARY), baseline: Some(arm(BASELINE)) }
}
