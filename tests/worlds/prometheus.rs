//! A Prometheus that scrapes the pods of the fake cluster and answers range queries as the real one does: the last sample of at
//! most five minutes before each grid tick, unless a stale marker came after it. No PromQL: queries are known by their metric.

use std::collections::BTreeMap;

use synthex_operator::decision::judge::{Answer, Series};

use super::{cluster::Cluster, rng::Rng};

const LOOKBACK: i64 = 300;

/// Counters of a pod, in the order ok, error, upstream ok, upstream error.
pub type Counters = [u64; 4];

/// What was scraped from one pod.
struct Target {
    /// Seconds after the start of the container until discovery has found it.
    discovered: i64,
    phase: i64,
    samples: Vec<(i64, Counters)>,
    stale: Vec<i64>,
    gone: bool,
}

/// How Prometheus is doing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Health {
    Well,
    /// Cannot be reached, but scrapes.
    Unreachable,
    /// Is not running: neither scrapes nor answers.
    Dead,
    /// Runs and answers, but does not scrape.
    Blind,
    /// Answers what is no answer.
    Malformed,
}

pub struct Prometheus {
    pub health: Health,
    /// Seconds between two scrapes of a pod.
    pub interval: i64,
    /// Seconds until a sample can be read.
    latency: i64,
    /// Whether a counter of errors exists only from its first error on.
    lazy: bool,
    targets: BTreeMap<String, Target>,
    /// The gauge, by Deployment.
    gauges: BTreeMap<String, Vec<(i64, f64)>>,
    rng: Rng,
}

impl Prometheus {
    pub fn new(seed: u64, interval: i64) -> Self {
        Self {
            health: Health::Well,
            interval,
            latency: 1,
            lazy: seed.is_multiple_of(3),
            targets: BTreeMap::new(),
            gauges: BTreeMap::new(),
            rng: Rng::new(seed, 2),
        }
    }

    /// One second of scraping.
    pub fn tick(&mut self, cluster: &Cluster, now: i64) {
        if matches!(self.health, Health::Dead | Health::Blind) {
            return;
        }
        for name in cluster.deployments.keys() {
            let masks = cluster.masks_of(name);
            if !masks.is_empty() {
                self.gauges.entry(name.clone()).or_default().push((now, cluster.gauge(&masks)));
            }
        }
        for (name, target) in &mut self.targets {
            if !target.gone && !cluster.pods.contains_key(name) {
                target.gone = true;
                target.stale.push(now);
            }
        }
        for pod in cluster.pods.values().filter(|pod| pod.variant.has_config() && !pod.failed) {
            if pod.started.is_none() {
                continue;
            }
            let rng = &mut self.rng;
            let interval = self.interval;
            let target = self.targets.entry(pod.name.clone()).or_insert_with(|| Target {
                discovered: now + rng.range(0, 5),
                phase: rng.range(0, interval - 1),
                samples: vec![],
                stale: vec![],
                gone: false,
            });
            if now < target.discovered || (now + target.phase) % interval != 0 {
                continue;
            }
            if pod.running(now) && !cluster.down.contains(&pod.node) {
                target.samples.push((now, pod.counters));
            } else if target.samples.last().is_some_and(|(at, _)| target.stale.last() < Some(at)) {
                // A scrape that fails makes the series stale.
                target.stale.push(now);
            }
        }
    }

    /// The answer to a range query at this moment.
    pub fn range(&self, query: &str, from: i64, until: i64, step: i64, now: i64) -> Answer {
        match self.health {
            Health::Unreachable | Health::Dead => return Answer::Down("connection refused".to_owned()),
            Health::Malformed => {
                return Answer::Malformed(format!("HTTP 200 with a body that is no JSON, to {query}"));
            }
            Health::Well | Health::Blind => {}
        }
        let times = query.starts_with("timestamp(");
        let upstream = query.contains("upstream_requests_total");
        let errors_only =
            ["outcome!=\"ok\"", "outcome=~\"error|shed\"", "result=\"miss\"", "connections_opened_total"]
                .iter()
                .any(|events| query.contains(events));
        let counters = [
            "queries_total{",
            "upstream_requests_total{",
            "connections_opened_total{",
            "cache_requests_total{",
        ];
        let counted = !query.contains("sum") && counters.iter().any(|metric| query.contains(metric));
        // Shares of all queries up to each bound of the histogram; a pod's gauge is its own, and of no interest.
        let histogram = query.contains("query_duration_seconds_bucket{");
        let shares: &[(&str, f64)] = match histogram {
            true if times => &[("+Inf", 1.0)],
            true => &[("0.1", 0.5), ("0.25", 0.93), ("1.0", 0.985), ("+Inf", 1.0)],
            false => &[],
        };
        if query.contains("pool_acquired_total") {
            return Answer::Series(vec![]);
        }
        let deployments: Vec<&str> = query
            .split_once("pod=~\"(")
            .and_then(|(_, rest)| rest.split_once(')'))
            .map(|(names, _)| names.split('|').collect())
            .unwrap_or_default();
        if query.contains("world_gauge") {
            let history = deployments.first().and_then(|name| self.gauges.get(*name));
            let at = |tick: i64| {
                let history = history?;
                let end = history.partition_point(|(at, _)| *at <= tick);
                let (at, value) = history[end.checked_sub(1)?];
                (at > tick - 10).then_some((tick, value))
            };
            let points: Vec<_> = (0..=(until - from) / step).filter_map(|i| at(from + i * step)).collect();
            return Answer::Series(if points.is_empty() {
                vec![]
            } else {
                vec![Series { labels: "{}".into(), points, ..Series::default() }]
            });
        }
        let mut answer = vec![];
        for (name, target) in &self.targets {
            let Some(deployment) = name.rsplitn(3, '-').nth(2) else { continue };
            if !deployments.contains(&deployment) {
                continue;
            }
            let (good, bad) = if upstream { (2, 3) } else { (0, 1) };
            let wanted: &[usize] = match () {
                () if histogram => &[good, good, good, good][..shares.len()],
                () if !counted => &[good],
                () if errors_only => &[bad],
                () => &[good, bad],
            };
            let own = 100.0 + name.bytes().map(u64::from).sum::<u64>() as f64 % 10.0;
            let mut columns: Vec<Vec<(i64, f64)>> = vec![vec![]; wanted.len()];
            let mut tick = from;
            while tick <= until {
                let end = target.samples.partition_point(|(at, _)| *at <= tick && *at + self.latency <= now);
                if let Some((at, counters)) = end.checked_sub(1).map(|index| &target.samples[index])
                    && *at > tick - LOOKBACK
                    && !target.stale.iter().any(|stale| stale > at && *stale <= tick)
                {
                    for (number, (column, index)) in columns.iter_mut().zip(wanted).enumerate() {
                        if self.lazy && *index == bad && counters[bad] == 0 {
                            continue;
                        }
                        let value = match () {
                            () if times => *at as f64,
                            () if histogram => {
                                ((counters[good] + counters[bad]) as f64 * shares[number].1).floor()
                            }
                            () if counted => counters[*index] as f64,
                            () => own,
                        };
                        column.push((tick, value));
                    }
                }
                tick += step;
            }
            for (number, (points, index)) in columns.into_iter().zip(wanted).enumerate() {
                if points.is_empty() {
                    continue;
                }
                let mut labels = BTreeMap::from([("pod", name.clone())]);
                match () {
                    () if histogram => {
                        labels.insert("le", shares[number].0.to_owned());
                    }
                    () if counted => {
                        labels.insert("outcome", index.to_string());
                    }
                    () => {}
                }
                if histogram || counted {
                    labels.extend([("instance", format!("{name}:9090")), ("job", "pods".to_owned())]);
                }
                let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
                answer.push(Series::new(&labels, points));
            }
        }
        Answer::Series(answer)
    }
}
