//! The circuit breaker of one expert: closed, open for a while after failures in a row, half-open with a single trial.
//!
//! Pure: the caller passes the time. Without locks, and a call to a healthy expert costs two loads.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::config;

/// What a breaker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Calls are made.
    Closed,
    /// No call is made.
    Open,
    /// One call is made, or was and has told nothing yet; all others are refused.
    HalfOpen,
}

/// The right to make one call, to be given back with its result. Given back or not, a trial blocks others for
/// `openFor` at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    Normal,
    Trial,
}

#[derive(Debug)]
pub(crate) struct Breaker {
    config: config::Breaker,
    base: Instant,
    /// Failures in a row while closed.
    failures: AtomicU32,
    /// 0: closed. Else twice the milliseconds after `base` at which the next trial is due, plus 1 if one is under way.
    until: AtomicU64,
}

impl Breaker {
    pub(crate) fn new(config: config::Breaker, now: Instant) -> Self {
        Self { config, base: now, failures: AtomicU32::new(0), until: AtomicU64::new(0) }
    }

    /// Whether this breaker does what `config` says.
    pub(crate) fn is(&self, config: &config::Breaker) -> bool {
        self.config == *config
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX / 4)
    }

    /// When the breaker that opens now lets a trial through.
    fn due(&self, now: Instant) -> u64 {
        // At most seven days: far from the end of 63 bits. Above zero, since 0 means closed.
        (self.millis(now) + self.config.open_for.as_millis() as u64).max(1) << 1
    }

    /// Whether a call may be made now; if not, how long not.
    pub(crate) fn admit(&self, now: Instant) -> Result<Pass, Duration> {
        let until = self.until.load(Ordering::Relaxed);
        if until == 0 {
            return Ok(Pass::Normal);
        }
        let left = (until >> 1).saturating_sub(self.millis(now));
        if left > 0 {
            return Err(Duration::from_millis(left));
        }
        // Whoever moves the time makes the trial.
        let trial = self.due(now) | 1;
        match self.until.compare_exchange(until, trial, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => Ok(Pass::Trial),
            Err(0) => Ok(Pass::Normal),
            Err(_) => Err(self.config.open_for),
        }
    }

    /// Notes what became of a call. The result is whether the breaker opened by it.
    pub(crate) fn record(&self, pass: Pass, ok: bool, now: Instant) -> bool {
        match (pass, ok) {
            (Pass::Normal, true) => {
                if self.failures.load(Ordering::Relaxed) != 0 {
                    self.failures.store(0, Ordering::Relaxed);
                }
                false
            }
            (Pass::Normal, false) => {
                let enough = self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= self.config.failures;
                // A call that began before the breaker opened must not open it anew.
                self.config.enabled
                    && enough
                    && self
                        .until
                        .compare_exchange(0, self.due(now), Ordering::Relaxed, Ordering::Relaxed)
                        .is_ok()
            }
            (Pass::Trial, true) => {
                self.failures.store(0, Ordering::Relaxed);
                self.until.store(0, Ordering::Relaxed);
                false
            }
            (Pass::Trial, false) => {
                self.until.store(self.due(now), Ordering::Relaxed);
                true
            }
        }
    }

    pub(crate) fn state(&self, now: Instant) -> State {
        match self.until.load(Ordering::Relaxed) {
            0 => State::Closed,
            until if until & 1 == 1 || until >> 1 <= self.millis(now) => State::HalfOpen,
            _ => State::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> (Breaker, Instant) {
        let now = Instant::now();
        let config = config::Breaker { enabled: true, failures: 3, open_for: Duration::from_secs(5) };
        (Breaker::new(config, now), now)
    }

    #[test]
    fn opens_after_failures_in_a_row_only() {
        let (breaker, now) = breaker();
        for ok in [false, false, true, false, false] {
            let pass = breaker.admit(now).expect("closed");
            assert!(!breaker.record(pass, ok, now));
        }
        assert_eq!(breaker.state(now), State::Closed);
        assert!(breaker.record(Pass::Normal, false, now));
        assert_eq!(breaker.state(now), State::Open);
        assert_eq!(breaker.admit(now), Err(Duration::from_secs(5)));
        // Late results of calls that began before change nothing.
        assert!(!breaker.record(Pass::Normal, false, now + Duration::from_secs(3)));
        breaker.record(Pass::Normal, true, now);
        assert_eq!(breaker.admit(now + Duration::from_secs(3)), Err(Duration::from_secs(2)));
    }

    #[test]
    fn one_trial_decides() {
        for ok in [true, false] {
            let (breaker, now) = breaker();
            for _ in 0..3 {
                breaker.record(Pass::Normal, false, now);
            }
            let later = now + Duration::from_secs(5);
            assert_eq!(breaker.state(later), State::HalfOpen);
            assert_eq!(breaker.admit(later), Ok(Pass::Trial));
            assert_eq!(breaker.state(later), State::HalfOpen);
            assert!(breaker.admit(later).is_err(), "one at a time");
            assert_eq!(breaker.record(Pass::Trial, ok, later), !ok);
            assert_eq!(breaker.state(later), if ok { State::Closed } else { State::Open });
            assert_eq!(breaker.admit(later).is_ok(), ok);
        }
    }

    #[test]
    fn a_trial_that_tells_nothing_is_followed_by_another() {
        let (breaker, now) = breaker();
        for _ in 0..3 {
            breaker.record(Pass::Normal, false, now);
        }
        assert_eq!(breaker.admit(now + Duration::from_secs(5)), Ok(Pass::Trial));
        assert!(breaker.admit(now + Duration::from_secs(9)).is_err());
        assert_eq!(breaker.admit(now + Duration::from_secs(10)), Ok(Pass::Trial));
    }

    #[test]
    fn switched_off_it_never_opens() {
        let now = Instant::now();
        let config = config::Breaker { enabled: false, failures: 1, open_for: Duration::from_secs(5) };
        let breaker = Breaker::new(config, now);
        for _ in 0..10 {
            assert!(!breaker.record(Pass::Normal, false, now));
            assert_eq!(breaker.admit(now), Ok(Pass::Normal));
        }
    }
}
