//! What one tick of one KPI costs.

use std::time::{Duration, Instant};

use synthex_operator::{
    api::{Preflight, Track},
    decision::judge::{Answer, AnswerHealth, Bound, Kpi, Series, Test, Trial, beginning},
};

use super::{
    judged::{self, Judged, KPIS},
    random::Rng,
    rollout::NAMES,
    table::Table,
    world::{BASELINE, CANARY, Pod, SLOT, STANDARD, Tail, Traffic, World},
};

const LIMIT_US: f64 = 50.0;
const SERVING: [usize; 2] = [20, 180];

/// Prints the time of a tick with 200 pods: fold and judge with two grid points in every series.
pub fn print(seed: u64, ticks: usize) {
    let mut table = Table::new(&["kind", "median us", "p99 us", "target"]);
    let mut row = |name: &str, mut times: Vec<Duration>| {
        times.sort_unstable();
        let at = |share: f64| times[(share * (times.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
        let met = if at(0.5) <= LIMIT_US { "met" } else { "MISSED" };
        table.row(&[name.to_owned(), format!("{:.1}", at(0.5)), format!("{:.1}", at(0.99)), met.to_owned()]);
    };
    let world = World { rps: 1000.0, ..STANDARD };
    let tail = Tail::new();
    for (index, kpi) in judged::kpis().into_iter().enumerate() {
        let mut traffic = Traffic::new(world, &tail, Rng::new(seed, 9), NAMES, SERVING);
        traffic.step(SERVING, world.rps);
        let bounds =
            if index == 1 { vec!["0.1".to_owned(), "0.2".to_owned(), "0.5".to_owned()] } else { vec![] };
        let preflight = Preflight {
            kpi: kpi.name.clone(),
            track: Track::Production,
            reads: String::new(),
            until: 0,
            pods: 200,
            cautious_until: None,
            spread: vec![0.1; 3],
            bounds,
            native: false,
            shares: vec![0.25, 0.05, 0.01],
            requests: 0.0,
        };
        let mut judged = {
            let now = traffic.slot * SLOT;
            Judged::begin(index, trial(kpi, Some(preflight)), now, now)
        };
        let times = (0..ticks).map(|_| {
            traffic.step(SERVING, world.rps);
            let [canary, baseline] = &traffic.pods;
            let pods: Vec<&Pod> = baseline.iter().chain(canary).collect();
            judged.ask(&pods);
            let begun = Instant::now();
            judged.fold();
            std::hint::black_box(judged.trial.judge(&judged.evidence, &judged.health));
            begun.elapsed()
        });
        row(KPIS[index], times.collect());
    }
    let test = Test::Threshold { query: "max(up{$arm})".to_owned(), bound: Bound::Max(1.0), consecutive: 3 };
    let [kpi, ..] = judged::kpis();
    let trial = trial(Kpi { name: "threshold".to_owned(), test, ..kpi }, None);
    let mut evidence = beginning(0);
    let times = (1..=ticks as i64).map(|tick| {
        let (from, until) = ((tick - 1) * SLOT, tick * SLOT);
        let answer =
            || Answer::Series(vec![Series { points: vec![(from, 0.5), (until, 0.6)], ..Default::default() }]);
        let answers = [answer(), answer()];
        let begun = Instant::now();
        let health: AnswerHealth;
        (evidence, health) = trial.fold(std::mem::take(&mut evidence), &answers, from, until);
        std::hint::black_box(trial.judge(&evidence, &health));
        begun.elapsed()
    });
    row("threshold", times.collect());
    println!(
        "\nOne tick of one KPI, {} pods, fold and judge (target: median of {LIMIT_US} us)\n",
        SERVING[CANARY] + SERVING[BASELINE]
    );
    table.print();
}

fn trial(kpi: Kpi, preflight: Option<Preflight>) -> Trial {
    Trial {
        kpi,
        arms: judged::arms(NAMES, SERVING),
        preflight,
        alarm_at: 8.3,
        step: SLOT,
        warm_up: 60,
        bake: 100_000,
    }
}
