//! Measures the judge over whole rollouts in generated traffic: how often it rolls back what is healthy, what it finds and how
//! soon, and what it costs; and the peers' rules on the same streams.
//!
//! `cargo bench --bench judgement` prints all tables; `-- --quick` a rough version in under a minute. With `-- --world NAME
//! --seed S --rollouts 1` a rollout replays, and its alarm is shown. A measurement, not a gate: it fails on nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement")]

mod cost;
mod judged;
mod peers;
mod random;
#[allow(dead_code, reason = "not all of it is needed here")]
#[path = "../worlds/rng.rs"]
mod rng;
mod rollout;
mod table;
mod world;

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use statrs::distribution::{Beta, ContinuousCDF};

use judged::KPIS;
use peers::RULES;
use rollout::{Outcome, STAGES};
use table::Table;
use world::{Harm, NONE, STANDARD, Tail, WORLDS, World};

/// Measures the judge over whole rollouts in generated traffic.
#[derive(Parser)]
struct Arguments {
    /// Healthy rollouts in each world.
    #[arg(long, default_value_t = 2000)]
    rollouts: usize,
    /// Harmful stages for each effect.
    #[arg(long, default_value_t = 300)]
    runs: usize,
    /// Only the worlds whose names begin like this, and no power.
    #[arg(long)]
    world: Option<String>,
    /// Seed of the first rollout; the next has the next number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Few rollouts: whether it runs, not what it says.
    #[arg(long)]
    quick: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Healthy rollouts that may be rolled back, as observed and as the upper end of the interval.
const OBSERVED: f64 = 0.005;
const LIMIT: f64 = 0.01;

fn main() {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        (arguments.rollouts, arguments.runs) = (arguments.rollouts.min(30), arguments.runs.min(10));
    }
    let (begun, tail) = (Instant::now(), Tail::new());
    if arguments.world.is_none() {
        cost::print(arguments.seed, if arguments.quick { 200 } else { 2000 });
    }
    healthy(&arguments, &tail);
    if arguments.world.is_none() {
        power(&arguments, &tail);
    }
    println!("\n{:.0} s", begun.elapsed().as_secs_f64());
}

fn healthy(arguments: &Arguments, tail: &Tail) {
    let count = arguments.rollouts;
    let wanted =
        |world: &&World| arguments.world.as_ref().is_none_or(|name| world.name.starts_with(name.as_str()));
    let mut ours = Table::new(&[
        "world",
        "errors",
        "latency",
        "memory",
        "any",
        "95 % limit",
        "target",
        "stages passed",
        "blind ticks",
        "s",
    ]);
    let mut theirs = Table::new(&[&["world", "ours"], &["A", "B", "C", "D", "E"][..]].concat());
    let mut alarms = vec![];
    for &world in WORLDS.iter().filter(wanted) {
        let begun = Instant::now();
        let outcomes = parallel(count, |index| rollout::healthy(world, tail, arguments.seed + index as u64));
        eprintln!("world {:?}: {:.0} s", world.name, begun.elapsed().as_secs_f64());
        let alarmed = |of: &dyn Fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| of(outcome)).count();
        let any = alarmed(&|outcome| outcome.alarms.iter().any(Option::is_some));
        let limit = upper_limit(any, count);
        let met = any as f64 <= OBSERVED * count as f64 && limit <= LIMIT;
        let passed: u32 = outcomes.iter().map(|outcome| outcome.passed.iter().sum::<u32>()).sum();
        let blind: u64 = outcomes.iter().map(|outcome| outcome.blind).sum();
        let mut row = vec![world.name.to_owned()];
        row.extend(
            (0..KPIS.len()).map(|kpi| percent(alarmed(&|outcome| outcome.alarms[kpi].is_some()), count)),
        );
        row.extend([
            percent(any, count),
            format!("{:.2} %", 100.0 * limit),
            if met { "met" } else { "MISSED" }.to_owned(),
            percent(passed as usize, count * KPIS.len() * STAGES.len()),
            blind.to_string(),
            format!("{:.0}", begun.elapsed().as_secs_f64()),
        ]);
        ours.row(&row);
        let mut row = vec![world.name.to_owned(), percent(any, count)];
        row.extend((0..RULES.len()).map(|rule| percent(alarmed(&|outcome| outcome.peers[rule]), count)));
        theirs.row(&row);
        for outcome in &outcomes {
            for (kpi, alarm) in KPIS.iter().zip(&outcome.alarms) {
                let Some((stage, tick, why)) = alarm else { continue };
                alarms.push(format!(
                    "--world {:?} --seed {}: {kpi}, stage {stage}, tick {tick}: {why}",
                    world.name, outcome.seed
                ));
            }
        }
    }
    println!(
        "\nHealthy rollouts rolled back, of {count} in each world, seeds from {} (target: {} % observed, {} % as the one-sided 95 % \
         limit of Clopper and Pearson)\n",
        arguments.seed,
        100.0 * OBSERVED,
        100.0 * LIMIT
    );
    ours.print();
    println!("\nThe same streams under the rules of the peers: rollouts with at least one alarm\n");
    theirs.print();
    legend();
    println!("\nFalse alarms, each with what replays it:\n");
    for alarm in alarms.iter().take(100) {
        println!("{alarm}");
    }
    println!("{} in all", alarms.len());
}

fn legend() {
    println!();
    for (letter, rule) in ["A", "B", "C", "D", "E"].iter().zip(RULES) {
        println!("{letter}  {rule}");
    }
}

/// Share found, the median tick of the alarm where anything is found, and the share found within 8 ticks where the notes give it.
type Noted = Option<(f64, Option<f64>, Option<f64>)>;

/// An effect: its KPI, the harm, and what the notes' table 2.3 has at 5, 50 and 500 requests per second.
const EFFECTS: [(&str, usize, Harm, [Noted; 3]); 12] = [
    (
        "errors 2x",
        0,
        Harm { errors: 2.0, ..NONE },
        [Some((0.0, None, None)), Some((0.22, Some(65.0), None)), Some((0.74, Some(31.0), None))],
    ),
    (
        "errors 5x",
        0,
        Harm { errors: 5.0, ..NONE },
        [
            Some((0.51, Some(59.0), Some(0.0))),
            Some((0.98, Some(13.0), Some(0.29))),
            Some((1.0, Some(2.0), Some(0.99))),
        ],
    ),
    (
        "errors 10x",
        0,
        Harm { errors: 10.0, ..NONE },
        [
            Some((0.93, Some(30.0), Some(0.08))),
            Some((1.0, Some(4.0), Some(0.84))),
            Some((1.0, Some(1.0), Some(1.0))),
        ],
    ),
    (
        "latency +10 %",
        1,
        Harm { latency: 1.1, ..NONE },
        [Some((0.0, None, None)), Some((0.05, None, None)), Some((0.10, None, None))],
    ),
    (
        "latency +25 %",
        1,
        Harm { latency: 1.25, ..NONE },
        [
            Some((0.43, Some(72.0), None)),
            Some((0.98, Some(16.0), Some(0.29))),
            Some((0.99, Some(1.0), Some(0.94))),
        ],
    ),
    (
        "latency 2x",
        1,
        Harm { latency: 2.0, ..NONE },
        [
            Some((1.0, Some(5.5), Some(0.85))),
            Some((1.0, Some(1.0), Some(1.0))),
            Some((1.0, Some(1.0), Some(1.0))),
        ],
    ),
    (
        "memory +25 %",
        2,
        Harm { memory: 1.25, ..NONE },
        [Some((0.53, None, None)), Some((0.57, Some(4.0), None)), Some((0.55, None, None))],
    ),
    (
        "memory 2x",
        2,
        Harm { memory: 2.0, ..NONE },
        [
            Some((1.0, Some(4.0), Some(1.0))),
            Some((1.0, Some(4.0), Some(1.0))),
            Some((1.0, Some(4.0), Some(1.0))),
        ],
    ),
    ("leak 20 %/h", 2, Harm { leak: 1.2, ..NONE }, [None, Some((0.0, None, None)), None]),
    ("leak 50 %/h", 2, Harm { leak: 1.5, ..NONE }, [None, Some((0.36, Some(116.0), None)), None]),
    ("leak 100 %/h", 2, Harm { leak: 2.0, ..NONE }, [None, Some((1.0, Some(64.0), None)), None]),
    ("leak 200 %/h", 2, Harm { leak: 3.0, ..NONE }, [None, Some((1.0, Some(32.0), None)), None]),
];

/// How far below the notes power may be, and by what factor delay may be above.
const POWER: f64 = 0.05;
const DELAY: f64 = 1.25;

fn power(arguments: &Arguments, tail: &Tail) {
    let mut ours = Table::new(&[
        "effect",
        "rps",
        "found",
        "median",
        "in 8",
        "notes: found",
        "median",
        "in 8",
        "power",
        "delay",
    ]);
    let mut theirs = Table::new(&["effect", "rps", "ours", "A", "B", "C", "D", "E"]);
    for (name, kpi, harm, noted) in EFFECTS {
        for (rps, noted) in [5.0, 50.0, 500.0].into_iter().zip(noted) {
            let world = World { rps, ..STANDARD };
            let runs = parallel(arguments.runs, |index| {
                rollout::harmful(world, tail, arguments.seed + index as u64, harm)
            });
            let found = Found::of(runs.iter().map(|(ours, _)| ours[kpi]));
            let (noted, power, delay) = match noted {
                None => (["".to_owned(), String::new(), String::new()], String::new(), String::new()),
                Some((share, median, soon)) => {
                    let verdict = |met: bool| if met { "met" } else { "MISSED" }.to_owned();
                    let delay = match (median, found.median) {
                        (Some(noted), Some(seen)) => verdict(seen <= DELAY * noted),
                        (Some(_), None) => verdict(false),
                        (None, _) => String::new(),
                    };
                    let shown = [
                        format!("{share:.2}"),
                        median.map_or(String::new(), |median| median.to_string()),
                        soon.map_or(String::new(), |soon| format!("{soon:.2}")),
                    ];
                    (shown, verdict(found.share >= share - POWER), delay)
                }
            };
            let [a, b, c] = noted;
            let soon = format!("{:.2}", found.soon);
            let median = found.median.map_or(String::new(), |median| median.to_string());
            let (label, rps) = (name.to_owned(), rps.to_string());
            let share = format!("{:.2}", found.share);
            ours.row(&[label.clone(), rps.clone(), share, median, soon, a, b, c, power, delay]);
            let mut row = vec![label, rps, found.to_string()];
            for rule in 0..RULES.len() {
                // Each rule reads one of the KPIs: the first three the errors.
                let reads = rule.saturating_sub(2) == kpi;
                let found = Found::of(runs.iter().map(|(_, peers)| peers[rule]));
                row.push(if reads { found.to_string() } else { String::new() });
            }
            theirs.row(&row);
        }
    }
    println!(
        "\nHarm in the 10 % stage with 20 pods, {} stages each, seeds from {}: share found, median tick of 15 s after the warm-up, share \
         found within 8 ticks (target: power no more than {POWER} below the notes', delay at most {DELAY} times theirs)\n",
        arguments.runs, arguments.seed
    );
    ours.print();
    println!(
        "\nThe same streams under the rules of the peers: share found (median tick). Where a rule alarms in healthy rollouts as well, \
         that is no power.\n"
    );
    theirs.print();
    legend();
}

/// What was found, and how soon.
struct Found {
    share: f64,
    median: Option<f64>,
    /// Share found within 8 ticks.
    soon: f64,
}

impl Found {
    fn of(alarms: impl Iterator<Item = Option<i64>>) -> Self {
        let alarms: Vec<Option<i64>> = alarms.collect();
        let runs = alarms.len() as f64;
        let mut ticks: Vec<i64> = alarms.into_iter().flatten().collect();
        ticks.sort_unstable();
        let at = |place: usize| ticks.get(place).map(|tick| *tick as f64);
        let (low, high) = (ticks.len().saturating_sub(1) / 2, ticks.len() / 2);
        Self {
            share: ticks.len() as f64 / runs,
            median: at(low).zip(at(high)).map(|(low, high)| 0.5 * (low + high)),
            soon: ticks.iter().filter(|tick| **tick <= 8).count() as f64 / runs,
        }
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.median {
            Some(median) => write!(f, "{:.2} ({median})", self.share),
            None => write!(f, "{:.2}", self.share),
        }
    }
}

/// The upper end of the one-sided 95 % interval of Clopper and Pearson.
fn upper_limit(events: usize, trials: usize) -> f64 {
    if events >= trials {
        return 1.0;
    }
    Beta::new(events as f64 + 1.0, (trials - events) as f64).map_or(1.0, |beta| beta.inverse_cdf(0.95))
}

fn percent(count: usize, of: usize) -> String {
    format!("{:.2} %", 100.0 * count as f64 / of as f64)
}

/// Runs numbers 0 to `count` on all processors; the results are in their order.
fn parallel<T: Send>(count: usize, run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(count)));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let result = run(index);
                    done.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
