//! What is learned from running pods before any evidence is looked at: how much pods that do the same work differ, and what slow
//! means. Pure.
//!
//! Without it, different pods look like a regression: two arms of unlike pods do not have the same rate, however healthy.

use std::collections::BTreeMap;

use crate::api::{Evidence, Preflight, Track};

use super::{
    Answer, AnswerHealth, Grid, Kpi, Series, Test, Tick,
    counters::{self, Counted, Counter, increases, is_count},
    query,
    samples::Bucket,
};

/// Standard deviation of the log odds of a share between pods that do the same work, where nothing could be learned: the cautious
/// end of the range. It costs delay, where too small a value would cost false rollbacks.
pub const CAUTIOUS: f64 = 0.5;
/// The other end of the range: what is learned from a few minutes is never taken to be less.
pub const LEAST: f64 = 0.085;
/// The least spread of a gauge on the log scale, and as a share of its mean on the plain one.
pub(super) const LEAST_GAUGE: f64 = 0.05;

/// Blocks into which the span is divided; each is one measurement of each pod.
const BLOCKS: i64 = 10;
/// Blocks of a pod without which it is left out.
const ENOUGH_BLOCKS: usize = 5;
/// Pods without which nothing is learned of their differences.
pub const ENOUGH_PODS: i32 = 3;
/// Shares of the baseline's requests that are to lie above the bounds of a latency: the bulk, the slow ones and the tail.
const SLOW: [f64; counters::KINDS] = [0.25, 0.05, 0.01];

/// What is to be asked before the evidence of a KPI can begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Lesson {
    /// The KPI.
    pub kpi: Kpi,
    /// Where it is learned.
    pub track: Track,
    /// Namespace of the pods.
    pub namespace: String,
    /// Deployments whose pods have every optimization of the pass off.
    pub deployments: Vec<String>,
    /// End of the span; evidence begins here.
    pub until: Tick,
    /// Length of a block, in seconds.
    pub block: i64,
    /// Spacing of the evidence's grid, in seconds.
    pub step: i64,
    /// What was taken when the evidence began, where the pods' past was too short to learn from: its bounds stay.
    pub begun: Option<Preflight>,
    /// Pods without which their differences are not learned, while the past of more of them grows: they are learned once.
    pub enough: i32,
}

impl Lesson {
    /// A lesson from the `span` seconds before `until`.
    pub fn over(
        kpi: &Kpi,
        track: Track,
        namespace: &str,
        deployments: Vec<String>,
        until: Tick,
        span: i64,
        step: i64,
    ) -> Self {
        let block = (span / BLOCKS).max(step).max(1);
        let (kpi, namespace) = (kpi.clone(), namespace.to_owned());
        Self { kpi, track, namespace, deployments, until, block, step, begun: None, enough: 0 }
    }

    /// First tick of the span.
    pub fn from(&self) -> Tick {
        self.until - BLOCKS * self.block
    }

    /// The range queries, from [`Self::from`] to `until` by `block`.
    pub fn queries(&self) -> Vec<String> {
        query::lesson(&self.kpi, &self.namespace, &self.deployments, self.step)
    }

    /// Learns from the answers. Nothing (`Ok(None)`) while there is nothing from which to choose the bounds of a latency: they
    /// are waited for, as evidence cannot begin without them.
    ///
    /// # Errors
    /// When an answer is none.
    pub fn learn(&self, answers: &[Answer]) -> Result<Option<Preflight>, AnswerHealth> {
        let mut read = vec![];
        for answer in answers {
            match answer {
                Answer::Series(series) => read.push(series.as_slice()),
                Answer::Down(why) => return Err(AnswerHealth::Down(why.clone())),
                Answer::Malformed(why) => return Err(AnswerHealth::Malformed(why.clone())),
            }
        }
        let grid = Grid { from: self.from(), step: self.block, ticks: BLOCKS };
        let nothing = Preflight {
            kpi: self.kpi.name.clone(),
            track: self.track,
            reads: String::new(),
            until: self.until,
            pods: 0,
            cautious_until: None,
            spread: vec![],
            bounds: vec![],
            native: false,
            shares: vec![],
            requests: 0.0,
        };
        let learned = match (&self.kpi.test, read.as_slice()) {
            (Test::ErrorRatio { .. }, [errors, total]) => {
                let events = counters::plain(Counter::Event(0), errors);
                let counted: Vec<_> = events.chain(counters::plain(Counter::Total, total)).collect();
                let blocks = Blocks::of(&counted, 1, grid);
                let (pods, spread) = blocks.spread(0);
                // Frozen like the bounds of a latency, so that a replay weighs every tick as it was weighed.
                let shares = match &self.begun {
                    Some(begun) => begun.shares.clone(),
                    None => vec![blocks.share()],
                };
                let requests = blocks.requests(self.block);
                Preflight { pods, spread: vec![spread], shares, requests, ..nothing }
            }
            (Test::Latency { .. }, [buckets]) => {
                let begun = self.begun.as_ref();
                let frozen = begun.map(|begun| (begun.bounds.clone(), begun.shares.clone(), begun.native));
                let Some((bounds, shares, native)) = frozen.or_else(|| bounds(buckets, grid)) else {
                    return Ok(None);
                };
                let values: Vec<f64> = bounds.iter().filter_map(|text| text.parse().ok()).collect();
                let blocks = Blocks::of(&counters::above(buckets, &values).0, bounds.len(), grid);
                let learned: Vec<_> = (0..bounds.len()).map(|kind| blocks.spread(kind)).collect();
                let pods = learned.iter().map(|(pods, _)| *pods).min().unwrap_or_default();
                let spread = learned.into_iter().map(|(_, spread)| spread).collect();
                let requests = blocks.requests(self.block);
                Preflight { pods, spread, bounds, native, shares, requests, ..nothing }
            }
            (Test::Gauge { .. }, [values]) => {
                let (pods, spread) = gauge_spread(values, grid);
                Preflight { pods, spread, ..nothing }
            }
            _ => nothing,
        };
        let short = learned.pods < self.enough;
        Ok(match &self.begun {
            None if short => {
                let spread =
                    if matches!(self.kpi.test, Test::Gauge { .. }) { 0 } else { learned.spread.len() };
                Some(Preflight { pods: 0, spread: vec![CAUTIOUS; spread], ..learned })
            }
            None => Some(learned),
            // Nothing more was learned than before.
            Some(_) if short || learned.pods == 0 => None,
            // Evidence goes on from where it began; what is now known holds from here on.
            Some(begun) => {
                Some(Preflight { until: begun.until, cautious_until: Some(self.until), ..learned })
            }
        })
    }
}

/// What each pod has counted in each block: events of each kind and requests.
struct Blocks {
    /// By kind: rows of pods that were there in enough blocks, each a count per block where the pod has one.
    events: Vec<Vec<Vec<f64>>>,
    total: Vec<Vec<Option<f64>>>,
}

impl Blocks {
    fn of(counted: &[Counted<'_>], kinds: usize, grid: Grid) -> Self {
        let of_all = |counter| counted.iter().filter(move |series| series.counter == counter);
        let mut names: Vec<&str> = of_all(Counter::Total).map(|series| series.of.pod.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let mut blocks = Self { events: vec![vec![]; kinds], total: vec![] };
        for pod in names.into_iter().filter(|pod| !pod.is_empty()) {
            let of = |counter| of_all(counter).filter(|series| series.of.pod == pod);
            let mut up = vec![false; grid.len()];
            for (time, value) in of(Counter::Total).flat_map(Counted::points) {
                if let Some(index) = grid.index(time) {
                    up[index] |= is_count(value);
                }
            }
            let mut requests = vec![None; grid.len()];
            for series in of(Counter::Total) {
                increases(series.points(), &up, grid, |index, increase| {
                    *requests[index].get_or_insert(0.0) += increase;
                });
            }
            if requests.iter().flatten().count() < ENOUGH_BLOCKS {
                continue;
            }
            for (kind, rows) in blocks.events.iter_mut().enumerate() {
                let mut row = vec![0.0; grid.len()];
                for series in of(Counter::Event(kind)) {
                    increases(series.points(), &up, grid, |index, increase| row[index] += increase);
                }
                rows.push(row);
            }
            blocks.total.push(requests);
        }
        blocks
    }

    /// How many pods were told apart, and the standard deviation of their log odds: the variance of the counts beyond that of
    /// counting, v, divided by v². With v = n·p·(1-p) of each pod and block, p the share of all pods in that block and c = (K-1)/K:
    /// tau² = (sum (x - n·p)² - c·sum v - s) / (c·sum v²), where s² = sum (2v² + v) is the variance of that sum under counting alone:
    /// what a few counts show by chance is not taken for a difference.
    fn spread(&self, kind: usize) -> (i32, f64) {
        let pods = self.total.len();
        let requests: f64 = self.total.iter().flatten().flatten().sum();
        if (pods as i64) < i64::from(ENOUGH_PODS) || requests <= 0.0 {
            return (0, CAUTIOUS);
        }
        let c = (pods as f64 - 1.0) / pods as f64;
        let (mut squares, mut chance, mut expected, mut expected_squares) = (0.0, 0.0, 0.0, 0.0);
        for block in 0..self.total.first().map_or(0, Vec::len) {
            let there = || {
                let rows = self.total.iter().zip(&self.events[kind]);
                rows.filter_map(move |(total, events)| Some((total[block]?, events[block])))
            };
            let (n, x) = there().fold((0.0, 0.0), |(n, x), (total, events)| (n + total, x + events));
            if n <= 0.0 {
                continue;
            }
            for (total, events) in there() {
                // The variance of counting, which is also by how much the count changes with the log odds.
                let v = total * (x / n) * (1.0 - x / n);
                squares += (events - total * x / n).powi(2);
                chance += 2.0 * v * v + v;
                expected += v;
                expected_squares += v * v;
            }
        }
        let variance = match expected_squares > 0.0 {
            true => ((squares - c * expected - chance.sqrt()) / (c * expected_squares)).max(0.0),
            false => 0.0,
        };
        (i32::try_from(pods).unwrap_or(i32::MAX), super::rounded(variance.sqrt().clamp(LEAST, CAUTIOUS)))
    }

    /// Share of all requests that are events of the first kind; 0 without requests.
    fn share(&self) -> f64 {
        let total: f64 = self.total.iter().flatten().flatten().sum();
        let events: f64 = self.events[0].iter().flatten().sum();
        super::rounded((events / total.max(1.0)).min(1.0))
    }

    /// Requests per second and pod.
    fn requests(&self, block: i64) -> f64 {
        let requests = || self.total.iter().flatten().flatten();
        super::rounded(requests().sum::<f64>() / (requests().count() as f64 * block as f64).max(1.0))
    }
}

/// The largest bounds that enough requests exceed, the lower first; which shares of all requests do; and whether the histogram is a
/// native one. Where none are exceeded that often, the least bound there is. Where all are the same, since the buckets are wide, the
/// next larger bound is the upper one: what is above it is rare, and shows what the lower one cannot where most requests exceed that.
fn bounds(buckets: &[Series], grid: Grid) -> Option<(Vec<String>, Vec<f64>, bool)> {
    // By histogram: its buckets by rising bound, each with its increase.
    let mut histograms: BTreeMap<&str, Vec<(&Bucket, f64)>> = BTreeMap::new();
    for series in buckets {
        let Some(bucket) = &series.bucket else { continue };
        // Over the whole span, of pods of any age: the choice of a bound needs no spread.
        let mut sum = 0.0;
        let up = vec![false; grid.len()];
        increases(series.points.iter().copied(), &up, grid, |_, increase| sum += increase);
        histograms.entry(&bucket.histogram).or_default().push((bucket, sum));
    }
    let mut known: Vec<&Bucket> = vec![];
    for own in histograms.values_mut() {
        own.sort_by(|(a, _), (b, _)| a.le.total_cmp(&b.le));
        known.extend(own.iter().map(|(bucket, _)| *bucket));
    }
    known.sort_by(|a, b| a.le.total_cmp(&b.le));
    // A native histogram has a bucket only where it has values; a classic one counts only where it has that of the bound.
    let owners = known.chunk_by(|a, b| a.le == b.le);
    let shared = |same: &&[&Bucket]| same[0].native || same.len() == histograms.len();
    let common: Vec<&Bucket> = owners.clone().filter(shared).map(|same| same[0]).collect();
    let known = if common.len() > 1 { common } else { owners.map(|same| same[0]).collect() };
    // What lies up to a bound, in each histogram by the largest of its own buckets up to there.
    let up_to = |le: f64| -> f64 {
        let own = |own: &Vec<(&Bucket, f64)>| {
            own.iter().rev().find(|(bucket, _)| bucket.le <= le).map(|(_, sum)| *sum)
        };
        histograms.values().filter_map(own).sum()
    };
    let mut counted: Vec<(f64, &str, f64)> =
        known.into_iter().map(|bucket| (bucket.le, bucket.text.as_str(), up_to(bucket.le))).collect();
    let (_, _, all) = *counted.last().filter(|(le, _, all)| *le == f64::INFINITY && *all > 0.0)?;
    counted.pop();
    let exceeded = |share: f64| {
        let found = counted.iter().rposition(|(.., up_to)| all - up_to >= share * all);
        found.unwrap_or_default()
    };
    let mut bounds: Vec<usize> = SLOW.iter().map(|share| exceeded(*share)).collect();
    bounds.dedup();
    if let [only] = *bounds {
        bounds.push(only + 1);
    }
    let bounds = bounds.into_iter().filter_map(|index| counted.get(index));
    let (bounds, shares): (Vec<_>, Vec<_>) = bounds
        .map(|(_, text, up_to)| ((*text).to_owned(), super::rounded(((all - up_to) / all).clamp(0.0, 1.0))))
        .unzip();
    let native = buckets.iter().any(|series| series.bucket.as_ref().is_some_and(|bucket| bucket.native));
    (!bounds.is_empty()).then_some((bounds, shares, native))
}

/// How many pods were told apart, and the standard deviations between their means: of the logarithms and of the plain values.
fn gauge_spread(values: &[Series], grid: Grid) -> (i32, Vec<f64>) {
    let mut means: Vec<(Option<f64>, f64)> = vec![];
    for series in values {
        let finite = || {
            let points = series.points.iter();
            points.filter(|(time, value)| grid.index(*time).is_some() && value.is_finite()).map(|(_, v)| *v)
        };
        let n = finite().count();
        if n < ENOUGH_BLOCKS {
            continue;
        }
        let positive = finite().all(|value| value > 0.0);
        let logs = positive.then(|| finite().map(f64::ln).sum::<f64>() / n as f64);
        means.push((logs, finite().sum::<f64>() / n as f64));
    }
    if (means.len() as i64) < i64::from(ENOUGH_PODS) {
        return (0, vec![]);
    }
    let deviation = |values: &[f64]| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        (mean, (squares / (values.len() as f64 - 1.0)).sqrt())
    };
    let logs: Option<Vec<f64>> = means.iter().map(|(log, _)| *log).collect();
    let log = logs.map_or(CAUTIOUS, |logs| deviation(&logs).1.max(LEAST_GAUGE));
    let (mean, plain) = deviation(&means.iter().map(|(_, plain)| *plain).collect::<Vec<_>>());
    let plain = plain.max(LEAST_GAUGE * mean.abs());
    (i32::try_from(means.len()).unwrap_or(i32::MAX), vec![super::rounded(log), super::rounded(plain)])
}

/// Evidence that begins at a tick.
pub fn beginning(tick: Tick) -> Evidence {
    Evidence { last_tick: tick, ..Evidence::default() }
}
