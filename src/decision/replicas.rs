//! Replica arithmetic: how many pods each production variant gets at a weight. Pure.

use crate::api::Comparison;

/// Pods of each production variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// Pods of the stable Deployment.
    pub stable: i32,
    /// Pods of the comparison arm of the canary's age; 0 where the stable Deployment is compared.
    pub baseline: i32,
    /// Pods with the optimizations on.
    pub canary: i32,
}

impl Replicas {
    /// Divides `n` pods at `weight` percent.
    ///
    /// Below 100 the canary has ⌊weight·n⌋ pods, at least one; at 100 it has all `n`, and a hold-back of 5 % on top keeps the
    /// comparison alive. Serving pods are never fewer than `n`.
    pub fn at(n: i32, weight: i32, comparison: Comparison) -> Self {
        let canary = (n * weight / 100).max(1);
        let holdback = (n + 19) / 20;
        match comparison {
            Comparison::Fresh if weight >= 100 => Self { stable: 0, baseline: holdback, canary: n },
            Comparison::Fresh => {
                let baseline = canary.min(n - canary).max(1);
                Self { stable: (n - canary - baseline).max(0), baseline, canary }
            }
            Comparison::Stable if weight >= 100 => Self { stable: holdback, baseline: 0, canary: n },
            Comparison::Stable => Self { stable: (n - canary).max(1), baseline: 0, canary },
        }
    }

    /// The canary's share of the pods, in percent.
    pub fn effective_weight(self) -> f64 {
        100.0 * f64::from(self.canary) / f64::from(self.canary + self.baseline + self.stable)
    }
}

/// The fewest replicas at which `weight` is not exceeded more than twofold.
pub fn needed_for(weight: i32) -> i32 {
    (1..=100).find(|&n| !exceeds(n, weight)).unwrap_or(100)
}

/// Whether `n` pods can't give `weight`: the smallest canary takes more than twice of it.
pub fn exceeds(n: i32, weight: i32) -> bool {
    Replicas::at(n, weight, Comparison::Fresh).effective_weight() > 2.0 * f64::from(weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn design_table() {
        let cases: [(i32, i32, [i32; 3]); 14] = [
            (10, 10, [1, 1, 8]),
            (10, 25, [2, 2, 6]),
            (10, 50, [5, 5, 0]),
            (10, 100, [10, 1, 0]),
            (4, 10, [1, 1, 2]),
            (4, 25, [1, 1, 2]),
            (4, 50, [2, 2, 0]),
            (4, 100, [4, 1, 0]),
            (2, 10, [1, 1, 0]),
            (2, 50, [1, 1, 0]),
            (1, 10, [1, 1, 0]),
            (1, 100, [1, 1, 0]),
            (40, 100, [40, 2, 0]),
            (3, 50, [1, 1, 1]),
        ];
        for (n, w, [c, b, s]) in cases {
            assert_eq!(
                Replicas::at(n, w, Comparison::Fresh),
                Replicas { canary: c, baseline: b, stable: s },
                "N={n} w={w}"
            );
        }
    }

    #[test]
    fn capacity_never_below_n_and_both_arms_exist() {
        for n in 1..=200 {
            for w in 1..=100 {
                for comparison in [Comparison::Fresh, Comparison::Stable] {
                    let r = Replicas::at(n, w, comparison);
                    assert!(r.stable + r.baseline + r.canary >= n, "N={n} w={w} {comparison:?}");
                    assert!(r.canary >= 1 && r.stable + r.baseline >= 1, "N={n} w={w} {comparison:?}");
                }
            }
        }
    }

    #[test]
    fn needed_replicas() {
        assert_eq!(needed_for(10), 5);
        assert!(exceeds(4, 10) && !exceeds(5, 10));
        assert_eq!(needed_for(50), 1);
    }
}
