//! Waiting for something to come to pass.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Asks again and again until it is so.
///
/// # Errors
/// It is not so within `limit`, or asking fails.
pub fn wait(limit: Duration, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        ensure!(Instant::now() < deadline, "it does not come to pass that {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
