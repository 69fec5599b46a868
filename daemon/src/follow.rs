//! Follows the kernel's requests, when somebody wants to know of them: traces, and the audit log.

mod audit;
mod traces;

use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime};

use anyhow::Context as _;
use skimmer_config::Config;
use tokio::sync::mpsc;

use self::audit::Audit;
use self::traces::Traces;
use crate::driver::{Follower, Served};
use crate::mounts::Mounts;

/// Requests that may wait to be written down.
const QUEUE: usize = 4096;

/// Where the data path tells its requests, and who hears them.
pub struct Following {
    served: mpsc::Receiver<Served>,
    traces: Option<Traces>,
    audit: Option<Audit>,
}

impl Following {
    /// What the configuration wants; `None` if that is nothing.
    ///
    /// # Errors
    /// When the collector's address or the audit log's file cannot be used.
    pub fn begin(config: &Config) -> anyhow::Result<Option<(Follower, Self)>> {
        let traces = (!config.traces.endpoint.is_empty()).then(|| Traces::begin(&config.traces));
        let audit = config.audit.file.as_deref().map(Audit::open);
        if traces.is_none() && audit.is_none() {
            return Ok(None);
        }
        let traces = traces.transpose().context("traces.endpoint")?;
        let audit = audit.transpose()?;
        let (follower, served) = mpsc::channel(QUEUE);
        Ok(Some((follower, Self { served, traces, audit })))
    }

    /// Writes down requests until the data path has ended.
    pub async fn run(mut self, mounts: Weak<Mounts>) {
        let clock = Clock::new();
        while let Some(served) = self.served.recv().await {
            let Some(mounts) = mounts.upgrade() else { break };
            self.one(&clock, &mounts, &served).await;
        }
        if let Some(traces) = self.traces {
            // It waits for the collector.
            let ended = tokio::task::spawn_blocking(move || traces.end()).await;
            if let Err(error) = ended {
                tracing::warn!("the last traces are lost: {error}");
            }
        }
    }

    async fn one(&mut self, clock: &Clock, mounts: &Arc<Mounts>, served: &Served) {
        let images = mounts.images_of(served.blob);
        if let Some(traces) = &self.traces {
            traces.add(clock, &images, served);
        }
        if let Some(audit) = &mut self.audit
            && let Err(error) = audit.add(clock, mounts, &images, served).await
        {
            tracing::error!("the audit log ends: {error:#}");
            self.audit = None;
        }
    }
}

/// An image that has a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The image as it was named.
    pub image: String,
    /// SHA-256 of its bootstrap.
    pub bootstrap: String,
    /// The trace context of its mount.
    pub traceparent: Option<String>,
}

/// Tells the time of day of a moment.
struct Clock {
    then: Instant,
    time: SystemTime,
}

impl Clock {
    fn new() -> Self {
        Self { then: Instant::now(), time: SystemTime::now() }
    }

    fn time(&self, moment: Instant) -> SystemTime {
        match moment.checked_duration_since(self.then) {
            Some(later) => self.time + later,
            None => self.time - self.then.duration_since(moment),
        }
    }
}
