//! The files being filled, as the engine knows them: one object per blob and attach mode's file.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use skimmer_engine::{Chunk, ObjectId, ReadySet};
use skimmer_fetcher::source::{BlobRef, Source};

use crate::blob::{BlobChunk, BlobId, BlobSpec, ReadyBits, SpecError};
use crate::frontend::Mode;
use crate::frontend::fscache::CookieKey;

/// A blob as the daemon made it known.
pub(super) struct Blob {
    pub(super) spec: BlobSpec,
    /// Chunks in the blob file (fanotify), and those of them that are on record.
    pub(super) ready: ReadyBits,
    pub(super) durable: ReadyBits,
    pub(super) sources: Vec<Arc<dyn Source>>,
}

impl Blob {
    /// How sources name it.
    pub(super) fn reference(&self) -> BlobRef {
        let digest = skimmer_fetcher::Digest::from_bytes(*self.spec.id.bytes());
        BlobRef { digest, size: self.spec.stored_bytes }
    }

    /// Takes up another image's view of the blob, of which `durable` is on record.
    pub(super) fn merge(
        &mut self,
        spec: &BlobSpec,
        durable: &ReadyBits,
        sources: Vec<Arc<dyn Source>>,
    ) -> Result<(), SpecError> {
        self.spec = self.spec.merged(spec)?;
        self.ready.union(durable);
        self.durable.union(durable);
        self.add_sources(sources);
        Ok(())
    }

    /// How many hosts there are to turn to.
    pub(super) fn width(&self) -> u32 {
        self.sources.iter().fold(0, |sum, source| sum.saturating_add(source.width()))
    }

    /// Stored bytes that the first source moves at once, or 0.
    pub(super) fn piece(&self) -> u64 {
        self.sources.first().and_then(|source| source.piece(&self.reference())).unwrap_or(0)
    }

    /// The source for an attempt. The engine counts them from 1; each one goes to the next host, where a source with
    /// several chooses by itself.
    pub(super) fn source(&self, attempt: u32) -> Option<Arc<dyn Source>> {
        let mut turn = attempt.saturating_sub(1) % self.width().max(1);
        for source in &self.sources {
            match turn.checked_sub(source.width()) {
                None => return Some(Arc::clone(source)),
                Some(rest) => turn = rest,
            }
        }
        self.sources.first().cloned()
    }

    pub(super) fn add_sources(&mut self, sources: Vec<Arc<dyn Source>>) {
        for source in sources {
            if self.sources.iter().all(|known| known.name() != source.name()) {
                self.sources.push(source);
            }
        }
    }
}

/// The file of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum FileKey {
    /// The sparse blob file.
    Fanotify(BlobId),
    /// The cache file that the kernel opened under this volume and cookie.
    Fscache(CookieKey),
}

impl FileKey {
    pub(super) fn mode(&self) -> Mode {
        match self {
            Self::Fanotify(_) => Mode::Fanotify,
            Self::Fscache(_) => Mode::Fscache,
        }
    }
}

/// One file that is being filled.
pub(super) struct Object {
    pub(super) key: FileKey,
    pub(super) blob: BlobId,
    /// The chunk list that the engine's chunk numbers refer to now.
    pub(super) spec: BlobSpec,
    /// The list that the engine was given and has not taken into force yet.
    pub(super) coming: Option<BlobSpec>,
    /// Its chunks that are written.
    pub(super) ready: ReadyBits,
    /// Reads that wait.
    pub(super) reads: u64,
    /// Reads since the file was watched or opened.
    pub(super) asked: u64,
    /// Flights not released.
    pub(super) flights: u64,
    /// Writes under way.
    pub(super) writes: u64,
    /// What went wrong last, for the message of a read that fails.
    pub(super) last_error: Option<String>,
}

impl Object {
    /// Chunks of the list in force, by the engine's numbers.
    pub(super) fn chunks(&self, run: &Range<u32>) -> &[BlobChunk] {
        let at = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
        self.spec.chunks.get(at(run.start)..at(run.end)).unwrap_or(&[])
    }

    /// Whether nothing of it is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.reads == 0 && self.writes == 0
    }
}

/// The chunk list of a blob in the engine's words, and which of it is ready.
pub(super) fn engine_view(spec: &BlobSpec, ready: &ReadyBits) -> (Vec<Chunk>, ReadySet) {
    let mut chunks = Vec::with_capacity(spec.chunks.len());
    let mut set = ReadySet::new(u32::try_from(spec.chunks.len()).unwrap_or(u32::MAX));
    for (position, chunk) in (0u32..).zip(spec.chunks.iter()) {
        chunks.push(Chunk {
            start: chunk.start,
            len: chunk.spec.len,
            stored_start: chunk.spec.stored_offset,
            stored_len: chunk.spec.stored_len,
        });
        if ready.contains(chunk.index) {
            set.insert(position..position + 1);
        }
    }
    (chunks, set)
}

/// All objects, by the engine's name and by their file.
#[derive(Default)]
pub(super) struct Objects {
    by_id: HashMap<ObjectId, Object>,
    by_key: HashMap<FileKey, ObjectId>,
    next: u32,
}

impl Objects {
    pub(super) fn insert(
        &mut self,
        key: FileKey,
        blob: BlobId,
        spec: BlobSpec,
        ready: ReadyBits,
    ) -> ObjectId {
        let id = ObjectId(self.next);
        // A daemon that opens four thousand million objects has long been restarted.
        self.next = self.next.wrapping_add(1);
        let object = Object {
            key: key.clone(),
            blob,
            spec,
            coming: None,
            ready,
            reads: 0,
            asked: 0,
            flights: 0,
            writes: 0,
            last_error: None,
        };
        self.by_id.insert(id, object);
        self.by_key.insert(key, id);
        id
    }

    pub(super) fn remove(&mut self, id: ObjectId) -> Option<Object> {
        let object = self.by_id.remove(&id)?;
        if self.by_key.get(&object.key) == Some(&id) {
            self.by_key.remove(&object.key);
        }
        Some(object)
    }

    pub(super) fn find(&self, key: &FileKey) -> Option<ObjectId> {
        self.by_key.get(key).copied()
    }

    pub(super) fn get(&self, id: ObjectId) -> Option<&Object> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: ObjectId) -> Option<&mut Object> {
        self.by_id.get_mut(&id)
    }

    /// The objects of one blob.
    pub(super) fn of(&self, blob: BlobId) -> Vec<ObjectId> {
        let mut ids: Vec<_> =
            self.by_id.iter().filter(|(_, object)| object.blob == blob).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Every object with its blob.
    pub(super) fn blobs(&self) -> Vec<(ObjectId, BlobId)> {
        self.by_id.iter().map(|(id, object)| (*id, object.blob)).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Object> {
        self.by_id.values()
    }
}
