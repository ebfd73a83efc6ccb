//! Second attempts: how many there may be, and when.
//!
//! Pure but for the random cut of a pause. The budget is what keeps retries from doubling the load on an expert that
//! is down because of its load.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use hyper::{HeaderMap, header::RETRY_AFTER};

/// Hundredths of a retry that are saved up at most.
const MOST: u32 = 10 * 100;

/// A share of an expert's calls, saved up for retries.
#[derive(Debug)]
pub(crate) struct Budget {
    percent: u32,
    /// Hundredths of a retry.
    saved: AtomicU32,
}

impl Budget {
    pub(crate) fn new(percent: u32) -> Self {
        Self { percent, saved: AtomicU32::new(if percent == 0 { 0 } else { MOST }) }
    }

    /// A call was made.
    pub(crate) fn earn(&self) {
        // Several at once may go above the bound by what they add, which is nothing to worry about.
        if self.saved.load(Ordering::Relaxed) < MOST {
            self.saved.fetch_add(self.percent, Ordering::Relaxed);
        }
    }

    /// Takes one retry, if there is one.
    pub(crate) fn spend(&self) -> bool {
        let less = |saved: u32| saved.checked_sub(100);
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

/// The pause before retry number `retry`, counted from 0: doubled each time, and cut by up to half at random, so that
/// those who failed together do not come back together.
pub(crate) fn pause(backoff: Duration, retry: u32) -> Duration {
    let random = RandomState::new().hash_one(retry) >> 11;
    let share = 1.0 - 0.5 * random as f64 / (1_u64 << 53) as f64;
    backoff.saturating_mul(1 << retry.min(16)).mul_f64(share)
}

/// How long an answer's `Retry-After` asks to wait, which may be seconds or a date. Longer than a day counts as a day.
pub(crate) fn after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse::<u32>() {
        Ok(seconds) => Duration::from_secs(seconds.into()),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(Duration::from_secs(24 * 3600)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_calls_may_be_repeated() {
        for (percent, calls, expected) in [(0, 100, 0), (10, 0, 10), (10, 1000, 110), (20, 1000, 210)] {
            let budget = Budget::new(percent);
            let mut retries = 0;
            while budget.spend() {
                retries += 1;
            }
            for _ in 0..calls {
                budget.earn();
                while budget.spend() {
                    retries += 1;
                }
            }
            assert_eq!(retries, expected, "{percent} % of {calls}");
        }
    }

    #[test]
    fn what_is_saved_up_is_bounded() {
        let budget = Budget::new(100);
        for _ in 0..100_000 {
            budget.earn();
        }
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 10);
    }

    #[test]
    fn pauses_double_and_vary_by_half() {
        for retry in 0..5 {
            let whole = Duration::from_millis(20) * 2_u32.pow(retry);
            for _ in 0..100 {
                let pause = pause(Duration::from_millis(20), retry);
                assert!(pause <= whole && pause >= whole / 2, "{pause:?} of {whole:?}");
            }
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, expected) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("4000000000", Some(86_400)),
            ("Sun, 06 Nov 1994 08:49:40 GMT", Some(3)),
            ("Sun, 06 Nov 1994 08:49:30 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().expect("a value"))]);
            assert_eq!(after(&headers, now), expected.map(Duration::from_secs), "{text:?}");
        }
        assert_eq!(after(&HeaderMap::new(), now), None);
    }
}
