//! Simulated worlds: a deterministic, seeded simulation of a cluster, a Prometheus and an operator that runs the real core. Touches
//! no clock, network or file.
//!
//! `SYNTHEX_WORLDS=N` lives N worlds of each kind; `SYNTHEX_SEED=S` lives one seed of every kind and shows its trace.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod cluster;
mod prometheus;
mod rng;
mod scenarios;
mod world;

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use prometheus::Health;
use scenarios::{Expect, Kind, scenario};
use synthex_operator::api::{OptimizationState, Phase, What};
use world::{Act, Outcome, World};

fn count(default: u64) -> u64 {
    std::env::var("SYNTHEX_WORLDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn only() -> Option<u64> {
    std::env::var("SYNTHEX_SEED").ok().and_then(|text| text.parse().ok())
}

/// What is wrong with the end of a world, beyond what was found while it lived.
fn judged(expect: &Expect, outcome: &Outcome) -> Vec<String> {
    let mut wrong = outcome.violations.clone();
    let status = &outcome.status;
    if !outcome.gone {
        for optimization in &status.optimizations {
            let on = matches!(optimization.state, OptimizationState::Promoted);
            if on && expect.harmful.contains(&optimization.name) && !outcome.forced && !outcome.edited {
                wrong.push(format!("I3: {} does harm and is {:?}", optimization.name, optimization.state));
            }
            let off = optimization.state == OptimizationState::RolledBack;
            if off && expect.kept.contains(&optimization.name) {
                wrong.push(format!(
                    "{} does no harm and was rolled back: {}",
                    optimization.name, optimization.reason
                ));
            }
        }
    }
    let signal = |o: &&synthex_operator::api::OptimizationStatus| {
        o.state == OptimizationState::RolledBack && o.reason.starts_with("kubernetes")
    };
    if expect.no_signal
        && let Some(optimization) = status.optimizations.iter().find(signal)
    {
        wrong.push(format!("what is no harm was taken for a signal: {}", optimization.reason));
    }
    let ended = outcome.gone || matches!(status.phase, Phase::Completed | Phase::RolledBack);
    if expect.ends && !ended {
        wrong.push(format!("I7: has not ended but is {:?} {:?}", status.phase, status.stage));
    }
    if expect.deleted && !outcome.gone {
        wrong.push("the finalizer hangs".into());
    }
    wrong
}

fn tail(outcome: &Outcome) -> String {
    let shown = if only().is_some() { usize::MAX } else { 60 };
    let from = outcome.trace.len().saturating_sub(shown);
    outcome.trace[from..].join("\n")
}

/// Lives `worlds` of one kind on two threads; gives back their outcomes in the order of the seeds.
fn live(kind: Kind, worlds: u64) -> Vec<(Expect, Outcome)> {
    let seeds: Vec<u64> = match only() {
        Some(seed) => vec![seed],
        None => (0..count(worlds)).collect(),
    };
    let (next, found) = (AtomicU64::new(0), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(seed) = seeds.get(index as usize) else { break };
                    let (setup, expect) = scenario(kind, *seed);
                    let outcome = World::new(setup).run();
                    found.lock().unwrap().push((*seed, expect, outcome));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap();
    found.sort_by_key(|(seed, ..)| *seed);
    let mut failures = vec![];
    let (mut seconds, mut reconciliations, mut writes, mut statuses) = (0, 0, 0, 0);
    for (seed, expect, outcome) in &found {
        seconds += outcome.seconds;
        reconciliations += outcome.reconciliations;
        writes += outcome.writes;
        statuses += outcome.status_writes;
        let wrong = judged(expect, outcome);
        if !wrong.is_empty() {
            failures.push((*seed, wrong, tail(outcome)));
        } else if only().is_some() {
            println!("{}", tail(outcome));
        }
    }
    println!(
        "{kind:?}: {} worlds, {seconds} simulated seconds, {reconciliations} reconciliations, {writes} writes, {statuses} of them of the status",
        found.len()
    );
    for (seed, wrong, _) in failures.iter().skip(1).take(20) {
        println!("{kind:?} seed {seed}: {}", wrong.join("; "));
    }
    if let Some((seed, wrong, trace)) = failures.first() {
        panic!(
            "{} of {} worlds of kind {kind:?} are wrong; the first: SYNTHEX_SEED={seed}\n{trace}\n{}",
            failures.len(),
            found.len(),
            wrong.join("\n")
        );
    }
    found.into_iter().map(|(_, expect, outcome)| (expect, outcome)).collect()
}

#[test]
fn healthy() {
    let worlds = live(Kind::Healthy, 24);
    let false_rollbacks = worlds
        .iter()
        .filter(|(_, outcome)| {
            outcome.status.optimizations.iter().any(|o| o.state == OptimizationState::RolledBack)
        })
        .count();
    println!("{false_rollbacks} false rollbacks in {} healthy worlds", worlds.len());
    // 1 % by design; three standard deviations above it for the number of worlds.
    let n = worlds.len() as f64;
    assert!(false_rollbacks as f64 <= 0.01 * n + 3.0 * (0.01 * n).sqrt(), "{false_rollbacks} of {n}");
}

#[test]
fn owned_harm() {
    for (expect, outcome) in live(Kind::OwnedHarm, 16) {
        let whys: Vec<_> = outcome
            .decided
            .iter()
            .filter(|(what, _)| *what == What::OptimizationRolledBack)
            .map(|(_, why)| why.as_str())
            .collect();
        assert!(!whys.is_empty(), "{expect:?} {:?}", outcome.decided);
        // Once the guilty is known, what its pods still suffer is not held against the others.
        if whys[0].starts_with("connections switched off") {
            assert_eq!(whys.len(), 1, "{whys:?}\n{}", tail(&outcome));
        }
    }
}

#[test]
fn shared_harm() {
    live(Kind::SharedHarm, 14);
}

#[test]
fn two_harms() {
    live(Kind::TwoHarms, 12);
}

#[test]
fn breaking_pods() {
    live(Kind::Breaking, 16);
}

#[test]
fn outages() {
    live(Kind::Outage, 16);
}

#[test]
fn verbs() {
    live(Kind::Verbs, 20);
}

#[test]
fn edits() {
    live(Kind::Edits, 24);
}

#[test]
fn deletion() {
    live(Kind::Deletion, 16);
}

#[test]
fn observing() {
    live(Kind::Observe, 6);
}

#[test]
fn against_stable() {
    live(Kind::Stable, 12);
}

#[test]
fn chaos() {
    live(Kind::Chaos, 28);
}

#[test]
fn foreign_objects() {
    live(Kind::Foreign, 8);
}

/// I5: whichever write the operator crashes after, the same decisions follow.
#[test]
fn a_crash_after_every_write() {
    // Every write of the one with a rollback, which is the richer; every fifth of the other.
    for (kind, every) in [(Kind::OwnedHarm, 1), (Kind::Healthy, 5)] {
        let (mut setup, _) = scenario(kind, 1_000_000);
        setup.crashes = 0.0;
        setup.failing = 0.0;
        setup.slow = 0.0;
        setup.script.clear();
        let kinds = |outcome: &Outcome| outcome.decided.iter().map(|(what, _)| *what).collect::<Vec<_>>();
        let finals = |outcome: &Outcome| {
            outcome.status.optimizations.iter().map(|o| (o.name.clone(), o.state)).collect::<Vec<_>>()
        };
        let calm = World::new(setup.clone()).run();
        assert_eq!(calm.violations, Vec::<String>::new(), "{}", tail(&calm));
        let next = AtomicU64::new(1);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    loop {
                        let write = next.fetch_add(every, Ordering::Relaxed);
                        if write > calm.writes {
                            break;
                        }
                        let crashed =
                            World::new(world::Setup { crash_at: Some(write), ..setup.clone() }).run();
                        let told = format!("{kind:?}, crash after write {write}\n{}", tail(&crashed));
                        assert_eq!(crashed.violations, Vec::<String>::new(), "{told}");
                        assert_eq!(kinds(&crashed), kinds(&calm), "{told}");
                        assert_eq!(finals(&crashed), finals(&calm), "{told}");
                    }
                });
            }
        });
        println!("{kind:?}: a crash after every {every}. of {} writes", calm.writes);
    }
}

/// What lasts has its consequence, however often it is looked at, and a look alone is no write.
#[test]
fn a_long_outage_stalls_and_writes_little() {
    for health in [Health::Unreachable, Health::Blind, Health::Malformed] {
        let (mut setup, _) = scenario(Kind::Healthy, 1_000_000);
        (setup.crashes, setup.failing, setup.slow) = (0.0, 0.0, 0.0);
        setup.script.clear();
        let calm = World::new(setup.clone()).run();
        setup.script = vec![(150, Act::Telemetry(health)), (2000, Act::Telemetry(Health::Well))];
        let outcome = World::new(setup).run();
        let told = tail(&outcome);
        assert_eq!(outcome.violations, Vec::<String>::new(), "{health:?}\n{told}");
        let at = |what: What| outcome.decided.iter().position(|(decided, _)| *decided == what);
        let why = &outcome.decided[at(What::Stalled).unwrap_or_else(|| panic!("{health:?}\n{told}"))].1;
        assert!(why.starts_with("TelemetryUnavailable"), "{why}");
        assert!(at(What::Resumed) > at(What::Stalled), "{told}");
        assert_eq!(outcome.status.phase, Phase::Completed, "{told}");
        let more = outcome.status_writes.saturating_sub(calm.status_writes);
        // A checkpoint every twenty ticks, and what changes when samples end and come again.
        assert!(more <= 370 / 20 + 10, "{health:?}: {more} more status writes in 370 ticks\n{told}");
    }
}

/// I10: a seed gives the same world, to the last line of its trace.
#[test]
fn a_seed_replays() {
    for seed in 0..6 {
        let run = || World::new(scenario(Kind::Chaos, seed).0).run();
        let (one, other) = (run(), run());
        assert_eq!(one.trace_hash, other.trace_hash, "seed {seed}");
        assert_eq!(one, other, "seed {seed}");
    }
}
