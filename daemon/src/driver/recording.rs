//! What was read and fetched of an image's blobs, written down on request.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::blob::BlobId;

/// Most reads, and most fetches, that one recording keeps: about 50 MiB.
const MOST: usize = 1 << 19;

/// One kernel request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedRead {
    /// Since the recording began.
    pub at: Duration,
    /// The blob.
    pub blob: BlobId,
    /// Bytes of its device.
    pub range: Range<u64>,
    /// From its delivery to its answer.
    pub took: Duration,
    /// Whether it was refused.
    pub failed: bool,
}

/// One fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedFetch {
    /// Since the recording began.
    pub at: Duration,
    /// The blob.
    pub blob: BlobId,
    /// Bytes of its device.
    pub device: Range<u64>,
    /// Bytes of it as it is stored.
    pub stored: Range<u64>,
    /// Until its last chunk was verified.
    pub took: Duration,
    /// Whether a read waited for it when it was planned.
    pub demand: bool,
    /// Whether it made a request of its own; else it went on with that of the fetch before it.
    pub request: bool,
    /// Whether it failed.
    pub failed: bool,
}

/// A recording so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Reads in the order in which they were answered.
    pub reads: Vec<RecordedRead>,
    /// Fetches in the order in which they ended.
    pub fetches: Vec<RecordedFetch>,
    /// Whether there was more than is kept.
    pub cut: bool,
}

struct Recording {
    number: u64,
    blobs: Vec<BlobId>,
    exact: bool,
    begun: Instant,
    events: Recorded,
}

/// The recordings that go on.
#[derive(Default)]
pub(super) struct Recordings {
    list: Vec<Recording>,
}

impl Recordings {
    pub(super) fn begin(&mut self, number: u64, blobs: Vec<BlobId>, exact: bool) {
        let (begun, events) = (Instant::now(), Recorded::default());
        self.list.push(Recording { number, blobs, exact, begun, events });
    }

    pub(super) fn end(&mut self, number: u64) {
        self.list.retain(|recording| recording.number != number);
    }

    pub(super) fn get(&self, number: u64) -> Option<Recorded> {
        self.list.iter().find(|recording| recording.number == number).map(|found| found.events.clone())
    }

    /// Whether any recording is about this blob.
    pub(super) fn follows(&self, blob: BlobId) -> bool {
        self.list.iter().any(|recording| recording.blobs.contains(&blob))
    }

    /// Whether exactly what is asked for is to be fetched of this blob.
    pub(super) fn is_exact(&self, blob: BlobId) -> bool {
        self.list.iter().any(|recording| recording.exact && recording.blobs.contains(&blob))
    }

    pub(super) fn read(
        &mut self,
        blob: BlobId,
        range: Range<u64>,
        since: Instant,
        took: Duration,
        failed: bool,
    ) {
        for recording in self.list.iter_mut().filter(|recording| recording.blobs.contains(&blob)) {
            let at = since.saturating_duration_since(recording.begun);
            if recording.events.reads.len() >= MOST {
                recording.events.cut = true;
                continue;
            }
            recording.events.reads.push(RecordedRead { at, blob, range: range.clone(), took, failed });
        }
    }

    pub(super) fn fetch(
        &mut self,
        blob: BlobId,
        device: Range<u64>,
        stored: Range<u64>,
        since: Instant,
        (demand, request, failed): (bool, bool, bool),
    ) {
        for recording in self.list.iter_mut().filter(|recording| recording.blobs.contains(&blob)) {
            if recording.events.fetches.len() >= MOST {
                recording.events.cut = true;
                continue;
            }
            let at = since.saturating_duration_since(recording.begun);
            let (device, stored, took) = (device.clone(), stored.clone(), since.elapsed());
            recording.events.fetches.push(RecordedFetch {
                at,
                blob,
                device,
                stored,
                took,
                demand,
                request,
                failed,
            });
        }
    }
}
