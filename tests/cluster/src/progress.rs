//! Tells the user what a long step is doing and how long it took. Writes to standard error only.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A step that takes longer than this says that it is still going.
const REMINDER: Duration = Duration::from_secs(15);

/// Runs `work`, printing its name and the time it took; an error gets the name as its context.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let (done, waiting) = mpsc::channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while waiting.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                eprintln!("  ... {name}: still working ({:.0} s)", start.elapsed().as_secs_f64());
            }
        });
        let result = work();
        drop(done);
        result
    });
    let elapsed = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("  {elapsed:6.1} s  {name}"),
        Err(_) => eprintln!("  {elapsed:6.1} s  {name}: FAILED"),
    }
    result.with_context(|| format!("{name} failed"))
}

/// Asks `probe` until it gives a value, at most for `timeout`. While it has none, `probe` says in words what is missing;
/// an `Err` of the outer kind ends the wait at once.
pub fn wait<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<std::result::Result<T, String>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match probe()? {
            Ok(value) => return Ok(value),
            Err(missing) if start.elapsed() >= timeout => {
                anyhow::bail!("{what}: not within {:.0} s: {missing}", timeout.as_secs_f64())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
