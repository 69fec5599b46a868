//! Waiting between attempts.

use std::time::Duration;

use backon::BackoffBuilder as _;

use crate::source::SourceError;

/// Waits between attempts: exponential with jitter, and never less than the server asked for.
pub(crate) struct Backoff(backon::ExponentialBackoff);

impl Backoff {
    pub(crate) fn new(attempts: usize) -> Self {
        Self(
            backon::ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(50))
                .with_max_delay(Duration::from_secs(30))
                .with_max_times(attempts.saturating_sub(1))
                .with_jitter()
                .build(),
        )
    }

    /// Waits before the next attempt, or gives the error back when there is none to make.
    pub(crate) async fn wait(&mut self, error: SourceError) -> Result<(), SourceError> {
        match self.0.next().filter(|_| error.may_pass()) {
            Some(delay) => {
                let delay = delay.max(error.retry_after.unwrap_or_default());
                tracing::info!("{error}; next attempt in {} ms", delay.as_millis());
                tokio::time::sleep(delay).await;
                Ok(())
            }
            None => Err(error),
        }
    }
}
