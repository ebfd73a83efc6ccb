//! Whole healthy rollouts, and single stages with harm.

use synthex_operator::{
    api::{Preflight, Track, Verdict},
    decision::judge::{Trial, alarm_at},
};

use super::{
    judged::{self, Judged, KPIS, Past, SHARES},
    peers::{Peers, RULES, Slot},
    random::Rng,
    world::{BASELINE, CANARY, Harm, NONE, PODS, PREFLIGHT, Pod, SLOT, STAGE, Tail, Traffic, WARM_UP, World},
};

pub const NAMES: [&str; 2] = ["shop-canary", "shop-baseline"];
const STAGING_NAMES: [&str; 2] = ["shop-staging-canary", "shop-staging-baseline"];
/// Most requests per second in staging, whose load is generated.
const STAGING_RPS: f64 = 10.0;

/// Probability of a false rollback in a whole rollout.
pub const PROBABILITY: f64 = 0.01;

/// A stage: its name and the pods of each arm.
pub struct Stage {
    pub name: &'static str,
    pub serving: [usize; 2],
}

pub const STAGES: [Stage; 6] = [
    Stage { name: "staging", serving: [10, 10] },
    Stage { name: "5 %", serving: [1, PODS - 1] },
    Stage { name: "10 %", serving: [2, PODS - 2] },
    Stage { name: "25 %", serving: [5, PODS - 5] },
    Stage { name: "50 %", serving: [10, PODS - 10] },
    Stage { name: "95 %", serving: [PODS - 1, 1] },
];

/// An alarm: the stage, the tick in it from 1, and what was said.
pub type Alarm = (&'static str, i64, String);

/// How a whole rollout went.
#[derive(Default)]
pub struct Outcome {
    pub seed: u64,
    /// First alarm of each KPI.
    pub alarms: [Option<Alarm>; KPIS.len()],
    /// Stages that each KPI has passed.
    pub passed: [u32; KPIS.len()],
    /// Ticks of all KPIs that told nothing.
    pub blind: u64,
    /// Which of the peers' rules raised an alarm.
    pub peers: [bool; RULES.len()],
}

/// A healthy rollout through all stages. A KPI that alarms is followed no further.
pub fn healthy(world: World, tail: &Tail, seed: u64) -> Outcome {
    let mut outcome = Outcome { seed, ..Outcome::default() };
    let mut peers = Peers::default();
    let (staging, production) = STAGES.split_at(1);
    for (track, stages, names, rps) in [
        (Track::Staging, staging, STAGING_NAMES, world.rps.min(STAGING_RPS)),
        (Track::Production, production, NAMES, world.rps),
    ] {
        let (pods, share) = match track {
            Track::Staging => (staging[0].serving, 0.5),
            Track::Production => ([PODS - 1, PODS], 1.0),
        };
        let rng = Rng::new(seed, track as u64);
        let mut traffic = Traffic::new(world, tail, rng, names, pods);
        let learned = preflight(&mut traffic, track, names, pods[BASELINE], rps * share);
        for stage in stages {
            let (slots, judged) = run(&mut traffic, stage, names, rps, &learned, NONE);
            for (kpi, judged) in judged.into_iter().enumerate() {
                outcome.blind += judged.blind;
                outcome.passed[kpi] += u32::from(judged.verdict() == Verdict::Pass);
                if let (None, Some((tick, why))) = (&outcome.alarms[kpi], judged.alarm) {
                    outcome.alarms[kpi] = Some((stage.name, tick, why));
                }
            }
            peers.alarms(&slots);
        }
    }
    outcome.peers = peers.alarmed;
    outcome
}

/// The 10 % stage with a harmful canary: for each KPI and for each of the peers' rules the tick of its alarm.
pub fn harmful(
    world: World,
    tail: &Tail,
    seed: u64,
    harm: Harm,
) -> ([Option<i64>; KPIS.len()], [Option<i64>; RULES.len()]) {
    let stage = &STAGES[2];
    let mut traffic = Traffic::new(world, tail, Rng::new(seed, 2), NAMES, [stage.serving[CANARY], PODS]);
    let learned = preflight(&mut traffic, Track::Production, NAMES, PODS, world.rps);
    let (slots, judged) = run(&mut traffic, stage, NAMES, world.rps, &learned, harm);
    (judged.map(|judged| judged.alarm.map(|(tick, _)| tick)), Peers::default().alarms(&slots))
}

/// Ten minutes of the running pods, and what is learned from them.
fn preflight(
    traffic: &mut Traffic<'_>,
    track: Track,
    names: [&str; 2],
    pods: usize,
    rps: f64,
) -> Vec<Preflight> {
    let mut past = Past { scrapes: vec![] };
    // One sample a minute, and one before the first minute.
    for slot in 4..=PREFLIGHT + 4 {
        traffic.step([0, pods], rps);
        if slot % 4 == 0 {
            let scrapes = traffic.pods[BASELINE].iter().map(|pod| (pod.name.clone(), pod.now));
            past.scrapes.push((traffic.slot * SLOT, scrapes.collect()));
        }
    }
    judged::learn(&judged::kpis(), track, names[BASELINE], &past, traffic.slot * SLOT)
}

/// Half an hour of a stage.
fn run(
    traffic: &mut Traffic<'_>,
    stage: &Stage,
    names: [&str; 2],
    rps: f64,
    learned: &[Preflight],
    harm: Harm,
) -> (Vec<Slot>, [Judged; KPIS.len()]) {
    traffic.deploy(harm);
    let mut slots = vec![];
    let step = |traffic: &mut Traffic<'_>, slots: &mut Vec<Slot>| {
        traffic.step(stage.serving, rps);
        slots.push(Slot::of(&serving(traffic, stage), stage.serving));
    };
    let asked = traffic.slot * SLOT;
    let mut numbers = 0..KPIS.len();
    let mut judged = judged::kpis().map(|kpi| {
        let number = numbers.next().expect("one for each KPI");
        let trial = Trial {
            kpi,
            arms: judged::arms(names, stage.serving),
            preflight: Some(learned[number].clone()),
            alarm_at: alarm_at(PROBABILITY, 1.0 / SHARES, STAGES.len(), 1),
            step: SLOT,
            warm_up: WARM_UP * SLOT,
            bake: STAGE - WARM_UP,
        };
        Judged::begin(number, trial, asked, asked + WARM_UP * SLOT)
    });
    for slot in 0..STAGE {
        step(traffic, &mut slots);
        let pods = serving(traffic, stage);
        for judged in &mut judged {
            match slot < WARM_UP {
                true => judged.warm(&pods),
                false => judged.tick(&pods),
            }
        }
    }
    (slots, judged)
}

/// The pods that serve, the baseline's first.
fn serving<'a>(traffic: &'a Traffic<'_>, stage: &Stage) -> Vec<&'a Pod> {
    let [canary, baseline] = &traffic.pods;
    baseline[..stage.serving[BASELINE]].iter().chain(&canary[..stage.serving[CANARY]]).collect()
}
