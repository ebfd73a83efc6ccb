//! Random counts.

pub use super::rng::Rng;

/// Successes among `n` trials of probability `p`. Exact: by inversion up to a mean of 10, above by transformed rejection
/// (W. Hörmann, "The generation of binomial random variates", 1993, algorithm BTRS).
pub fn binomial(rng: &mut Rng, n: u64, p: f64) -> u64 {
    if p > 0.5 {
        return n - binomial(rng, n, 1.0 - p);
    }
    if n == 0 || p <= 0.0 {
        return 0;
    }
    let count = n as f64;
    if count * p < 10.0 {
        let ratio = p / (1.0 - p);
        let mut probability = (count * (-p).ln_1p()).exp();
        let (mut left, mut k) = (rng.f64() - probability, 0.0);
        while left > 0.0 && k < count {
            probability *= ratio * (count - k) / (k + 1.0);
            k += 1.0;
            left -= probability;
        }
        return k as u64;
    }
    let ratio = p / (1.0 - p);
    let deviation = (count * p * (1.0 - p)).sqrt();
    let b = 1.15 + 2.53 * deviation;
    let a = -0.0873 + 0.0248 * b + 0.01 * p;
    let centre = count * p + 0.5;
    let alpha = (2.83 + 5.1 / b) * deviation;
    let mode = ((count + 1.0) * p).floor();
    loop {
        let (u, v) = (rng.f64() - 0.5, rng.f64());
        let room = 0.5 - u.abs();
        let k = ((2.0 * a / room + b) * u + centre).floor();
        if room >= 0.07 && v <= 0.92 - 4.2 / b {
            return k as u64;
        }
        if !(0.0..=count).contains(&k) {
            continue;
        }
        let accepted = (mode + 0.5) * ((mode + 1.0) / (ratio * (count - mode + 1.0))).ln()
            + (count + 1.0) * ((count - mode + 1.0) / (count - k + 1.0)).ln()
            + (k + 0.5) * (ratio * (count - k + 1.0) / (k + 1.0)).ln()
            + stirling(mode)
            + stirling(count - mode)
            - stirling(k)
            - stirling(count - k);
        if (v * alpha / (a / (room * room) + b)).ln() <= accepted {
            return k as u64;
        }
    }
}

/// What Stirling's formula for ln k! lacks.
fn stirling(k: f64) -> f64 {
    const SMALL: [f64; 10] = [
        0.0810614667953272,
        0.0413406959554092,
        0.0276779256849983,
        0.02079067210376509,
        0.0166446911898211,
        0.0138761288230707,
        0.0118967099458917,
        0.0104112652619720,
        0.0092554621827127,
        0.0083305634333594,
    ];
    if k < 10.0 {
        return SMALL[k as usize];
    }
    let next = k + 1.0;
    (1.0 / 12.0 - (1.0 / 360.0 - 1.0 / 1260.0 / (next * next)) / (next * next)) / next
}
