//! Traffic worlds: what the pods of two arms would count and show, 15 s by 15 s. Deterministic in its seed; knows no judge.
//!
//! Where the shape of the traffic is not given by the notes (section 2.1), it was chosen before anything was measured: the common
//! error rate wanders with an AR(1) of 0.98 and a standard deviation of 0.3, the common latency with 0.05; memory with 0.02.

use std::f64::consts::TAU;

use statrs::function::erf::erfc;

use super::random::{Rng, binomial};

/// Seconds between two scrapes, and between two ticks.
pub const SLOT: i64 = 15;
/// Slots of a stage of half an hour, and those of its warm-up.
pub const STAGE: i64 = 120;
pub const WARM_UP: i64 = 4;
/// Slots of the pre-flight.
pub const PREFLIGHT: i64 = 40;
/// Production pods of both arms together.
pub const PODS: usize = 20;
pub const CANARY: usize = 0;
pub const BASELINE: usize = 1;
/// The bounds of the histogram that matter, in seconds; below the first one lies the bulk.
pub const BOUNDS: [&str; 12] =
    ["0.1", "0.15", "0.2", "0.25", "0.3", "0.4", "0.5", "0.75", "1.0", "1.5", "2.5", "5.0"];

/// What the traffic of a world is like.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub name: &'static str,
    /// Requests per second of both arms together, in production.
    pub rps: f64,
    /// Whether pods differ twice as much.
    pub heavy: bool,
    /// Bursts per hour that both arms feel, and by how much errors and latency grow in one.
    pub bursts: (f64, f64, f64),
    /// Growth per hour, on the log scale, of the error rate, the latency and the memory of both arms.
    pub drift: [f64; 3],
    /// Restarts per hour of each pod, every second one as a new pod.
    pub restarts: f64,
    /// Time constant of the decay of a cold start, in seconds.
    pub cold: f64,
    /// Amplitude of the load on the log scale, and its period in hours.
    pub load: (f64, f64),
}

/// The plain world of the notes.
pub const STANDARD: World = World {
    name: "standard 50",
    rps: 50.0,
    heavy: false,
    bursts: (1.0, 5.0, 1.2),
    drift: [0.0, 0.0, 0.02],
    restarts: 0.0,
    cold: 30.0,
    load: (0.3, 24.0),
};

pub const WORLDS: [World; 12] = [
    World { name: "low", rps: 5.0, ..STANDARD },
    STANDARD,
    World { name: "high", rps: 500.0, ..STANDARD },
    World { name: "bursts", rps: 500.0, bursts: (12.0, 20.0, 2.0), ..STANDARD },
    World { name: "drift", rps: 500.0, drift: [0.7, 0.2, 0.3], ..STANDARD },
    World { name: "uneven 5", rps: 5.0, heavy: true, ..STANDARD },
    World { name: "uneven 50", heavy: true, ..STANDARD },
    World { name: "uneven 500", rps: 500.0, heavy: true, ..STANDARD },
    World { name: "restarts 50", restarts: 3.0, ..STANDARD },
    World { name: "restarts 500", rps: 500.0, restarts: 3.0, ..STANDARD },
    World { name: "cold", cold: 60.0, ..STANDARD },
    World { name: "diurnal", rps: 500.0, load: (1.0, 2.0), ..STANDARD },
];

/// How the canary is worse: factors of its error rate, latency and memory, and of its memory per hour.
#[derive(Clone, Copy, Debug)]
pub struct Harm {
    pub errors: f64,
    pub latency: f64,
    pub memory: f64,
    pub leak: f64,
}

pub const NONE: Harm = Harm { errors: 1.0, latency: 1.0, memory: 1.0, leak: 1.0 };

/// What a scrape of a pod reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scrape {
    pub requests: f64,
    pub errors: f64,
    /// Requests slower than each of [`BOUNDS`].
    pub above: [f64; BOUNDS.len()],
    pub memory: f64,
}

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    /// What the last scrape read and the one before, where they read anything.
    pub now: Option<Scrape>,
    pub before: Option<Scrape>,
    /// Seconds from a scrape to the tick after it.
    pub age: f64,
    counted: Scrape,
    /// Log factors of its traffic, error rate, latency and memory that stay.
    own: [f64; 4],
    /// Log factors of error rate, latency and memory that wander.
    wander: [f64; 3],
    /// When it began to serve, in seconds.
    born: f64,
    /// Slots until it serves.
    down: u32,
    /// Period of its garbage collection in slots, and where it stands in it.
    saw: (f64, f64),
}

/// What both arms feel.
#[derive(Clone, Copy, Debug, Default)]
struct Common {
    errors: f64,
    latency: f64,
    memory: f64,
    load: f64,
}

/// The pods of both arms, and their time.
pub struct Traffic<'a> {
    pub world: World,
    tail: &'a Tail,
    rng: Rng,
    pub slot: i64,
    pub pods: [Vec<Pod>; 2],
    names: [&'static str; 2],
    serial: u32,
    /// Begin of the harm, in seconds.
    harmed: (Harm, f64),
    wander: [f64; 2],
    phase: f64,
    burst: u32,
    common: Common,
    before: Common,
}

/// Share of requests slower than exp(x) seconds, tabulated: 98 % LN(80 ms, 0.5) and 2 % LN(600 ms, 0.6).
pub struct Tail {
    shares: Vec<f64>,
    /// Logarithms of [`BOUNDS`].
    bounds: [f64; BOUNDS.len()],
}

impl Tail {
    const LOWEST: f64 = -8.0;
    const STEP: f64 = 0.005;

    pub fn new() -> Self {
        let beyond = |x: f64, median: f64, sigma: f64| 0.5 * erfc((x - median.ln()) / sigma / 2f64.sqrt());
        let at = |i: usize| Self::LOWEST + i as f64 * Self::STEP;
        let share = |i| 0.98 * beyond(at(i), 0.08, 0.5) + 0.02 * beyond(at(i), 0.6, 0.6);
        let bounds = BOUNDS.map(|bound| bound.parse().map_or(f64::NAN, f64::ln));
        Self { shares: (0..3000).map(share).collect(), bounds }
    }

    fn beyond(&self, x: f64) -> f64 {
        let place = ((x - Self::LOWEST) / Self::STEP).clamp(0.0, self.shares.len() as f64 - 2.0);
        let (index, rest) = (place as usize, place.fract());
        self.shares[index] + rest * (self.shares[index + 1] - self.shares[index])
    }
}

/// A pod's own suffix: five of the letters and digits that Kubernetes uses.
fn suffix(serial: u32) -> String {
    const SAFE: &[u8; 27] = b"2456789bcdfghjklmnpqrstvwxz";
    (0..5).rev().map(|place| char::from(SAFE[serial as usize / 27usize.pow(place) % 27])).collect()
}

/// One step of an AR(1) with a stationary standard deviation.
fn wandered(rng: &mut Rng, value: f64, memory: f64, sd: f64) -> f64 {
    memory * value + sd * (1.0 - memory * memory).sqrt() * rng.normal()
}

impl<'a> Traffic<'a> {
    /// `pods` of each arm, the canary's cold from the start; `names` are those of the Deployments.
    pub fn new(
        world: World,
        tail: &'a Tail,
        mut rng: Rng,
        names: [&'static str; 2],
        pods: [usize; 2],
    ) -> Self {
        let (phase, wander) = (TAU * rng.f64(), [0.3 * rng.normal(), 0.05 * rng.normal()]);
        let mut traffic = Self {
            world,
            tail,
            rng,
            slot: 0,
            pods: [vec![], vec![]],
            names,
            serial: 0,
            harmed: (NONE, 0.0),
            wander,
            phase,
            burst: 0,
            common: Common::default(),
            before: Common::default(),
        };
        for arm in [CANARY, BASELINE] {
            traffic.pods[arm] = (0..pods[arm]).map(|_| traffic.pod(arm, f64::NEG_INFINITY)).collect();
        }
        traffic
    }

    fn pod(&mut self, arm: usize, born: f64) -> Pod {
        self.serial += 1;
        let heavy = self.world.heavy;
        let rng = &mut self.rng;
        let sd = if heavy { [0.3, 0.20, 0.06, 0.10] } else { [0.1, 0.10, 0.03, 0.05] };
        let (errors, latency) = if heavy { (0.50, 0.10) } else { (0.20, 0.05) };
        Pod {
            name: format!("{}-7c9d5b8f64-{}", self.names[arm], suffix(self.serial)),
            now: None,
            before: None,
            age: SLOT as f64 * rng.f64(),
            counted: Scrape::default(),
            own: sd.map(|sd| sd * rng.normal()),
            wander: [errors * rng.normal(), latency * rng.normal(), 0.02 * rng.normal()],
            born,
            down: 0,
            saw: (12.0 + 24.0 * rng.f64(), rng.f64()),
        }
    }

    /// Lets the canary begin afresh, cold and harmed.
    pub fn deploy(&mut self, harm: Harm) {
        let now = (self.slot * SLOT) as f64;
        self.harmed = (harm, now);
        for pod in &mut self.pods[CANARY] {
            (pod.born, pod.now, pod.before, pod.counted) = (now, None, None, Scrape::default());
        }
    }

    /// Lets a slot pass in which the first `serving` pods of each arm share `rps` requests per second.
    pub fn step(&mut self, serving: [usize; 2], rps: f64) {
        self.slot += 1;
        let time = (self.slot * SLOT) as f64;
        self.feel(time / 3600.0);
        let each = rps * SLOT as f64 / (serving[CANARY] + serving[BASELINE]) as f64;
        let restart = self.world.restarts * SLOT as f64 / 3600.0;
        for arm in [CANARY, BASELINE] {
            for index in 0..serving[arm] {
                if restart > 0.0 && self.rng.chance(restart) {
                    self.restart(arm, index, time);
                }
                let harm = if arm == CANARY { self.harmed } else { (NONE, 0.0) };
                self.serve(arm, index, each, harm, time);
            }
        }
    }

    /// What both arms feel in this slot.
    fn feel(&mut self, hours: f64) {
        let (rng, world) = (&mut self.rng, &self.world);
        self.wander = [wandered(rng, self.wander[0], 0.98, 0.3), wandered(rng, self.wander[1], 0.98, 0.05)];
        if self.burst > 0 {
            self.burst -= 1;
        } else if rng.chance(world.bursts.0 * SLOT as f64 / 3600.0) {
            self.burst = rng.range(4, 12) as u32;
        }
        let burst = |factor: f64| if self.burst > 0 { factor.ln() } else { 0.0 };
        let load = world.load.0 * (TAU * hours / world.load.1 + self.phase).sin();
        self.before = self.common;
        self.common = Common {
            // A loaded service fails more and is slower.
            errors: self.wander[0] + burst(world.bursts.1) + world.drift[0] * hours + load,
            latency: self.wander[1] + burst(world.bursts.2) + world.drift[1] * hours + 0.3 * load,
            memory: world.drift[2] * hours + 0.1 * load,
            load,
        };
    }

    /// A container begins again under its pod's name, or a new pod takes the place.
    fn restart(&mut self, arm: usize, index: usize, time: f64) {
        let down = if self.rng.chance(0.5) {
            self.pods[arm][index] = self.pod(arm, time);
            2
        } else {
            self.pods[arm][index].counted = Scrape::default();
            1
        };
        let pod = &mut self.pods[arm][index];
        (pod.down, pod.born) = (down, time + f64::from(down) * SLOT as f64);
    }

    fn serve(&mut self, arm: usize, index: usize, each: f64, (harm, since): (Harm, f64), time: f64) {
        let (common, before, heavy, cold) = (self.common, self.before, self.world.heavy, self.world.cold);
        let rng = &mut self.rng;
        let pod = &mut self.pods[arm][index];
        pod.before = pod.now.take();
        if pod.down > 0 {
            pod.down -= 1;
            return;
        }
        let (errors, latency) = if heavy { (0.50, 0.10) } else { (0.20, 0.05) };
        pod.wander = [
            wandered(rng, pod.wander[0], 0.8, errors),
            wandered(rng, pod.wander[1], 0.8, latency),
            wandered(rng, pod.wander[2], 0.97, 0.02),
        ];
        pod.saw.1 = (pod.saw.1 + 1.0 / pod.saw.0).fract();
        // Scraped `age` before the tick: what was counted is of this slot and of the end of the one before.
        let lag = pod.age / SLOT as f64;
        let felt = |of: fn(&Common) -> f64| of(&common) + lag * (of(&before) - of(&common));
        let cold = 1.0 + 0.5 * (-(time - pod.age - pod.born).max(0.0) / cold).exp();
        let requests = rng.poisson(each * (felt(|c| c.load) + pod.own[0]).exp());
        let error = 0.005 * harm.errors * cold * (felt(|c| c.errors) + pod.own[1] + pod.wander[0]).exp();
        pod.counted.requests += requests as f64;
        pod.counted.errors += binomial(rng, requests, error.min(0.9)) as f64;
        let slower = (harm.latency * cold).ln() + felt(|c| c.latency) + pod.own[2] + pod.wander[1];
        let (mut left, mut share) = (requests, 1.0);
        for (bound, above) in self.tail.bounds.iter().zip(&mut pod.counted.above) {
            if left == 0 {
                break;
            }
            let beyond = self.tail.beyond(bound - slower);
            left = binomial(rng, left, (beyond / share).min(1.0));
            share = beyond;
            *above += left as f64;
        }
        let hours = (time - since).max(0.0) / 3600.0;
        let grown = harm.memory.ln() + harm.leak.ln() * hours;
        pod.counted.memory =
            2e8 * (felt(|c| c.memory) + pod.own[3] + pod.wander[2] + grown).exp() * (1.0 + 0.08 * pod.saw.1);
        pod.now = Some(pod.counted);
    }
}
