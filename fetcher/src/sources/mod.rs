//! Several hosts that hold the same blobs, as one source.
//!
//! They are asked in their order, those in bad standing last. A host that fails is left for the next at the byte that
//! was reached; one that is slow to give a byte is raced by the next; one whose bytes turned out wrong is not asked
//! for that blob again as long as another has it.

mod health;
mod reading;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use self::reading::Reading;
use crate::digest::Digest;
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency, check_range};

pub use health::{Health, Permit};

/// How long a host that lacks a blob, or gave wrong bytes of it, is asked for it last.
const SHUNNED: Duration = Duration::from_secs(60);
/// Blobs of which that is remembered for each host.
const MOST_SHUNNED: usize = 1024;

/// One of several hosts.
pub(crate) struct Member {
    pub(crate) source: Arc<dyn Source>,
    pub(crate) health: Arc<Health>,
    shunned: Mutex<HashMap<Digest, Instant>>,
}

impl Member {
    fn name(self: &Arc<Self>) -> &str {
        self.source.name()
    }

    /// Puts a blob of this host last for a while.
    fn shun(&self, blob: &Digest) {
        let now = Instant::now();
        let mut shunned = self.shunned.lock().unwrap_or_else(PoisonError::into_inner);
        if shunned.len() >= MOST_SHUNNED {
            shunned.retain(|_, until| *until > now);
        }
        if shunned.len() < MOST_SHUNNED {
            shunned.insert(*blob, now + SHUNNED);
        }
    }

    fn is_good_for(&self, blob: &Digest) -> bool {
        let shunned = self.shunned.lock().unwrap_or_else(PoisonError::into_inner);
        shunned.get(blob).is_none_or(|until| *until <= Instant::now()) && self.health.is_good()
    }

    /// Notes that bytes of a blob were wrong.
    fn distrust(&self, blob: &Digest) {
        self.shun(blob);
        self.health.lied();
    }
}

/// Several sources of the same blobs, in order of preference. Cheap to clone.
#[derive(Clone)]
pub struct Sources {
    name: Arc<str>,
    members: Arc<[Arc<Member>]>,
}

impl Sources {
    /// Puts sources together; each with the standing of its host, which others may share.
    pub fn new(name: &str, members: impl IntoIterator<Item = (Arc<dyn Source>, Arc<Health>)>) -> Self {
        let member = |(source, health)| Arc::new(Member { source, health, shunned: Mutex::default() });
        Self { name: name.into(), members: members.into_iter().map(member).collect() }
    }

    /// The members that are to be asked for a blob, in their order, and those that are a last resort.
    fn order(&self, blob: &Digest) -> (Vec<Arc<Member>>, Vec<Arc<Member>>) {
        self.members.iter().cloned().partition(|member| member.is_good_for(blob))
    }
}

/// What a failure of every host comes to.
fn failure(name: &str, mut errors: Vec<SourceError>) -> SourceError {
    const FIRST: [ErrorClass; 3] = [ErrorClass::Transient, ErrorClass::Corrupt, ErrorClass::BadReply];
    if errors.len() == 1 {
        return errors.remove(0);
    }
    let rank =
        |error: &SourceError| FIRST.iter().position(|class| *class == error.class).unwrap_or(FIRST.len());
    let Some(first) = errors.iter().min_by_key(|error| rank(error)) else {
        return SourceError::new(ErrorClass::Unsupported, name, "it has no host to ask");
    };
    let told: Vec<_> = errors.iter().map(|error| format!("{}: {}", error.source, error.detail)).collect();
    let wait = errors.iter().filter_map(|error| error.retry_after).min();
    SourceError::new(first.class, name, told.join("; "))
        .retry_after(wait.filter(|_| first.class == ErrorClass::Transient))
}

/// Asks one host after the other until one answers.
pub(crate) async fn first<M, T, F>(
    name: &str,
    hosts: Vec<(M, Arc<Health>)>,
    called: impl Fn(&M) -> &str,
    mut ask: impl FnMut(M) -> F,
) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut errors = Vec::new();
    let (good, bad): (Vec<_>, Vec<_>) = hosts.into_iter().partition(|(_, health)| health.is_good());
    for (host, health) in good.into_iter().chain(bad) {
        match health.enter(Urgency::Demand, called(&host)).await {
            Ok(permit) => match ask(host).await {
                Ok(answer) => {
                    permit.good();
                    return Ok(answer);
                }
                Err(error) => {
                    permit.bad(&error);
                    errors.push(error);
                }
            },
            Err(error) => errors.push(error),
        }
    }
    Err(failure(name, errors))
}

#[async_trait::async_trait]
impl Source for Sources {
    fn name(&self) -> &str {
        &self.name
    }

    fn width(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX).max(1)
    }

    fn piece(&self, blob: &BlobRef) -> Option<u64> {
        self.members.iter().find_map(|member| member.source.piece(blob))
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, urgency: Urgency) -> Result<Body, SourceError> {
        check_range(&self.name, blob, &range)?;
        Reading::open(self.clone(), *blob, range, urgency).await
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        let blob = *blob;
        let lacks = |source: &str| SourceError::new(ErrorClass::NotFound, source, "it has no such blob");
        let (good, bad) = self.order(&blob.digest);
        let members =
            good.into_iter().chain(bad).map(|member| (Arc::clone(&member), Arc::clone(&member.health)));
        let found = first(&self.name, members.collect(), Member::name, |member| async move {
            if member.source.has(&blob).await? { Ok(()) } else { Err(lacks(member.source.name())) }
        });
        match found.await {
            Ok(()) => Ok(true),
            Err(error) if error.class == ErrorClass::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
