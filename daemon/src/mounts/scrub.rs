//! Scrubbing: every bootstrap and every cached chunk is read again and compared with its digest; what went bad on the
//! disk is repaired.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use skimmer_client::{ScrubReport, ScrubRequest};
use skimmer_fetcher::Digest;
use skimmer_fetcher::chunk::{Verified, fetch};
use skimmer_fetcher::source::{BlobRef, Source};

use super::budget::is_needed;
use super::{Failure, Kind, Mounts};
use crate::blob::{BlobChunk, BlobId};
use crate::frontend::Mode;
use crate::store::held::Item;
use crate::store::scrub::{Scrubbed, rewrite};

/// Failures that a report names; what goes wrong more often has one cause.
const NAMED: usize = 20;

/// The scrub that runs, or what the last one came to.
#[derive(Debug, Default)]
pub struct Scrub {
    report: Mutex<ScrubReport>,
    stop: AtomicBool,
}

impl Scrub {
    /// How far it is.
    pub fn report(&self) -> ScrubReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it after the chunk that it reads.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn change(&self, change: impl FnOnce(&mut ScrubReport)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn failed(&self, what: String) {
        tracing::error!("scrub: {what}");
        self.change(|report| {
            report.failed += 1;
            if report.failures.len() < NAMED {
                report.failures.push(what);
            }
        });
    }
}

/// Keeps reads to a rate by sleeping.
struct Pace {
    bytes_per_second: u64,
    since: Instant,
    read: u64,
}

impl Pace {
    fn count(&mut self, bytes: u64) {
        self.read += bytes;
        let nanos = u128::from(self.read) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        if self.bytes_per_second > 0 {
            std::thread::sleep(due.saturating_sub(self.since.elapsed()));
        }
    }
}

impl Mounts {
    /// Scrubs the whole cache.
    ///
    /// # Errors
    /// One runs already, or the cache cannot be listed. What goes wrong with a blob is in the report.
    pub async fn scrub(self: &Arc<Self>, request: ScrubRequest) -> Result<ScrubReport, Failure> {
        let began = Instant::now();
        let (mut blobs, mut bootstraps) = (Vec::new(), Vec::new());
        for held in self.store.held()? {
            match held.item {
                Item::Blob(blob) => blobs.push(blob),
                Item::Bootstrap(name) => bootstraps.push(name),
            }
        }
        let mut busy = false;
        self.scrub.change(|report| {
            busy = report.running;
            if !busy {
                let all = u64::try_from(blobs.len()).unwrap_or(u64::MAX);
                *report = ScrubReport { running: true, blobs: all, ..ScrubReport::default() };
            }
        });
        if busy {
            return Err(Failure::new(Kind::Conflict, "a scrub is running")
                .remedy("wait for its end, or stop it: skimmer scrub --stop"));
        }
        self.scrub.stop.store(false, Ordering::Relaxed);
        let pace =
            Pace { bytes_per_second: request.mib_per_second.saturating_mul(1 << 20), since: began, read: 0 };
        let pace = Arc::new(Mutex::new(pace));
        for name in bootstraps {
            if let Err(failure) = self.scrub_bootstrap(&name, &pace, request.check_only).await {
                self.scrub.failed(format!("bootstrap {name}: {failure}"));
            }
            if self.scrub.stop.load(Ordering::Relaxed) {
                blobs.clear();
                break;
            }
        }
        for blob in blobs {
            for mode in [Mode::Fanotify, Mode::Fscache] {
                if let Err(failure) = self.scrub_file(mode, blob, &pace, request.check_only).await {
                    self.scrub.failed(format!("blob {blob}: {failure}"));
                }
            }
            self.scrub.change(|report| report.blobs_done += 1);
            if self.scrub.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        self.scrub.change(|report| {
            report.running = false;
            report.took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        });
        Ok(self.scrub.report())
    }

    /// A bootstrap's file, and then the kernel's copy of it.
    async fn scrub_bootstrap(
        self: &Arc<Self>,
        name: &str,
        pace: &Arc<Mutex<Pace>>,
        check_only: bool,
    ) -> Result<(), Failure> {
        let (this, pace, named) = (Arc::clone(self), Arc::clone(pace), name.to_owned());
        // It may have gone since it was listed.
        if !self.store.bootstrap_path(name).exists() {
            return Ok(());
        }
        let read = move || {
            let read = this.store.scrub_bootstrap(&named);
            let bytes = read.as_ref().map_or(0, |bytes| u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            this.scrub.change(|report| {
                report.bootstraps += 1;
                report.bytes += bytes;
            });
            pace.lock().unwrap_or_else(PoisonError::into_inner).count(bytes);
            read
        };
        let right = match tokio::task::spawn_blocking(read).await? {
            Some(bytes) => bytes,
            None => {
                tracing::error!(bootstrap = name, "it went bad in the cache");
                self.scrub.change(|report| report.bad += 1);
                if check_only {
                    return Ok(());
                }
                let Some(bytes) = self.repair_bootstrap(name).await? else { return Ok(()) };
                bytes
            }
        };
        let (this, named) = (Arc::clone(self), name.to_owned());
        let compare = move || this.store.scrub_cached_bootstrap(&named, &right, !check_only);
        if tokio::task::spawn_blocking(compare).await?? {
            tracing::error!(bootstrap = name, "its cache file went bad");
            self.scrub.change(|report| {
                report.bad += 1;
                report.repaired += u64::from(!check_only);
            });
        }
        Ok(())
    }

    /// One that nothing needs goes. A mounted one is fetched and written over; gives its bytes.
    async fn repair_bootstrap(self: &Arc<Self>, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        let item = Item::Bootstrap(name.to_owned());
        let image = {
            let mut state = self.state.lock().await;
            self.release_unused(&mut state).await;
            let mounted = state.attachments.iter().find(|one| one.record.bootstrap == *name);
            let image = mounted.map(|one| one.image.clone());
            if !is_needed(&state, &item) {
                self.store.evict(&item)?;
                self.scrub.change(|report| report.repaired += 1);
                return Ok(None);
            }
            image
        };
        let sources = image.map(|image| image.sources).unwrap_or_default();
        let mut why = Failure::new(Kind::Source, "it is bad, and no source is known");
        for source in &sources {
            match self.bootstrap_of(source, name).await {
                Ok(bytes) => {
                    let (this, named) = (Arc::clone(self), name.to_owned());
                    let write = move || this.store.mend_bootstrap(&named, &bytes).map(|()| bytes);
                    let bytes = tokio::task::spawn_blocking(write).await??;
                    self.scrub.change(|report| report.repaired += 1);
                    return Ok(Some(bytes));
                }
                Err(failure) => why = failure,
            }
        }
        Err(why)
    }

    async fn scrub_file(
        self: &Arc<Self>,
        mode: Mode,
        blob: BlobId,
        pace: &Arc<Mutex<Pace>>,
        check_only: bool,
    ) -> Result<(), Failure> {
        let (this, pace) = (Arc::clone(self), Arc::clone(pace));
        let read = move || {
            let mut pace = pace.lock().unwrap_or_else(PoisonError::into_inner);
            this.store.scrub(mode, blob, |bytes| {
                this.scrub.change(|report| {
                    report.chunks += 1;
                    report.bytes += bytes;
                });
                pace.count(bytes);
                !this.scrub.stop.load(Ordering::Relaxed)
            })
        };
        let Some(found) = tokio::task::spawn_blocking(read).await?? else { return Ok(()) };
        if found.bad.is_empty() {
            return Ok(());
        }
        let count = u64::try_from(found.bad.len()).unwrap_or(u64::MAX);
        tracing::error!(%blob, path = %found.path.display(), count, "chunks went bad in the cache");
        self.scrub.change(|report| report.bad += count);
        if !check_only {
            self.repair(blob, found).await?;
        }
        Ok(())
    }

    /// A blob that nothing needs goes, and is fetched again when it is needed. In a mounted one the bad chunks are
    /// fetched and written over.
    async fn repair(&self, blob: BlobId, found: Scrubbed) -> Result<(), Failure> {
        let mut state = self.state.lock().await;
        self.release_unused(&mut state).await;
        let item = Item::Blob(blob);
        if !is_needed(&state, &item) {
            self.store.evict(&item)?;
            self.set_complete(blob, false);
            let count = u64::try_from(found.bad.len()).unwrap_or(u64::MAX);
            self.scrub.change(|report| report.repaired += count);
            return Ok(());
        }
        let images: Vec<_> =
            state.attachments.iter().filter(|one| one.has(blob)).map(|one| one.image.clone()).collect();
        drop(state);
        let sources: Vec<Arc<dyn Source>> = images.iter().flat_map(|image| self.sources(image)).collect();
        let reference = BlobRef { digest: Digest::from_bytes(*blob.bytes()), size: found.spec.stored_bytes };
        for chunk in &found.bad {
            let place = format!("bytes {}..{}", chunk.start, chunk.start + u64::from(chunk.spec.len));
            match anew(&sources, &reference, chunk).await {
                Ok(verified) => {
                    let (path, start) = (found.path.clone(), chunk.start);
                    let written =
                        tokio::task::spawn_blocking(move || rewrite(&path, start, verified.padded()));
                    match written.await? {
                        Ok(()) => self.scrub.change(|report| report.repaired += 1),
                        Err(error) => {
                            self.scrub.failed(format!("{}: {place}: {error}", found.path.display()));
                        }
                    }
                }
                Err(why) => self.scrub.failed(format!("{}: {place} are bad: {why}", found.path.display())),
            }
        }
        Ok(())
    }
}

/// A chunk from the first source that has it right.
async fn anew(
    sources: &[Arc<dyn Source>],
    blob: &BlobRef,
    chunk: &BlobChunk,
) -> Result<Verified<Vec<u8>>, String> {
    let length = usize::try_from(chunk.padded_len()).map_err(|error| error.to_string())?;
    let mut why = "no source is known".to_owned();
    for source in sources {
        let mut came = None;
        let plan = vec![(chunk.spec, vec![0; length])];
        match fetch(&**source, blob, plan, |_, verified| came = Some(verified)).await {
            Ok(()) => {
                if let Some(verified) = came {
                    return Ok(verified);
                }
            }
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}
