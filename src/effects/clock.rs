//! The only reader of the clock.

use k8s_openapi::jiff::Timestamp;

/// The time now.
#[expect(clippy::disallowed_methods, reason = "the one place where the clock is read")]
pub fn now() -> Timestamp {
    Timestamp::now()
}
