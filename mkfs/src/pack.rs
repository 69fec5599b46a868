//! Cuts file data into chunks, keeps each distinct chunk once, and puts the new ones into the layer's blob.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read};
use std::sync::PoisonError;

use skimmer_fetcher::layout::Layout;

use crate::blob::{Blob, BlobWriter};
use crate::pool::{Encoded, Known, Pool, Ticket};
use crate::report::Dedup;
use crate::{MkfsError, Options};

/// Chunk indexes in all files of an image together. They take 12 bytes each here and 8 in the bootstrap, so this bounds
/// it to 256 MiB: a tar header of 512 bytes can claim a sparse file of any size.
const INDEXES_MAX: usize = 1 << 25;

/// What makes two chunks the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChunkKey {
    pub(crate) digest: [u8; 32],
    pub(crate) len: u32,
}

/// Where a chunk is: the number of the blob in build order, and its CI index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ChunkRef {
    pub(crate) blob: u32,
    pub(crate) index: u32,
    /// Blocks of the chunk in front of what is meant; 0 unless indexes are fine.
    pub(crate) skip: u16,
}

/// The chunks of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileChunks {
    /// Bytes of the file that each stands for: the image's chunk size, or less where indexes are fine.
    pub(crate) unit: u32,
    pub(crate) refs: Vec<ChunkRef>,
}

/// Names the chunks of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DataId(usize);

impl DataId {
    /// The file at this place in [`Packed::files`].
    pub(crate) fn new(index: usize) -> Self {
        Self(index)
    }
}

enum Work {
    Chunk(Ticket),
    /// The first chunk of so many zero bytes.
    FirstZero(Ticket),
    /// A chunk of so many zero bytes after the first.
    Zero(u32),
}

struct Pending {
    file: DataId,
    len: usize,
    work: Work,
}

/// Takes the data of all files of all layers, lowest layer first.
pub(crate) struct Packer<'a> {
    options: &'a Options,
    /// Where blobs go.
    layout: &'a Layout,
    pool: Pool,
    known: Known,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    pending_limit: usize,
    indexes: usize,
    files: Vec<FileChunks>,
    zeros: HashMap<u32, ChunkRef>,
    zeros_sent: HashSet<u32>,
    blobs: Vec<Blob>,
    current: Option<BlobWriter>,
    dedup: Dedup,
    data_bytes: u64,
}

/// What all layers' data became.
pub(crate) struct Packed {
    pub(crate) blobs: Vec<Blob>,
    pub(crate) files: Vec<FileChunks>,
    pub(crate) dedup: Dedup,
    pub(crate) data_bytes: u64,
}

impl Packed {
    pub(crate) fn chunks_of(&self, id: DataId) -> &FileChunks {
        &self.files[id.0]
    }
}

impl<'a> Packer<'a> {
    pub(crate) fn new(options: &'a Options, layout: &'a Layout) -> Result<Self, MkfsError> {
        let threads = options
            .threads
            .or_else(|| std::thread::available_parallelism().ok())
            .map_or(1, std::num::NonZeroUsize::get)
            .min(64);
        let known = Known::default();
        let chunk = usize_from(options.chunk_size);
        Ok(Self {
            options,
            layout,
            pool: Pool::start(options, &known, threads, 256)?,
            known,
            pending: VecDeque::new(),
            pending_bytes: 0,
            pending_limit: chunk.saturating_mul(2 * threads + 2),
            indexes: 0,
            files: Vec::new(),
            zeros: HashMap::new(),
            zeros_sent: HashSet::new(),
            blobs: Vec::new(),
            current: None,
            dedup: Dedup::default(),
            data_bytes: 0,
        })
    }

    /// Begins a file of `size` bytes.
    pub(crate) fn file(&mut self, size: u64) -> Result<FileData<'_, 'a>, MkfsError> {
        let count = size.div_ceil(self.options.chunk_size.into());
        let total = usize::try_from(count).ok().and_then(|count| self.indexes.checked_add(count));
        self.indexes = total.filter(|&total| total <= INDEXES_MAX).ok_or(MkfsError::Limit {
            what: "chunks in all files together",
            found: count.saturating_add(u64::try_from(self.indexes).unwrap_or(u64::MAX)),
            limit: u64::try_from(INDEXES_MAX).unwrap_or(u64::MAX),
            remedy: "choose a larger chunk size",
        })?;
        let id = DataId(self.files.len());
        self.files.push(FileChunks { unit: self.options.chunk_size, refs: Vec::new() });
        Ok(FileData { packer: self, id, remaining: size, buffer: Vec::new(), zeros: 0 })
    }

    fn push(&mut self, file: DataId, data: Vec<u8>) -> Result<(), MkfsError> {
        let len = data.len();
        self.make_room(len)?;
        let ticket = self.pool.submit(data)?;
        self.pending_bytes += len;
        self.pending.push_back(Pending { file, len, work: Work::Chunk(ticket) });
        Ok(())
    }

    fn push_zeros(&mut self, file: DataId, len: u32) -> Result<(), MkfsError> {
        let bytes = usize_from(len);
        self.make_room(bytes)?;
        let (len_pending, work) = if self.zeros_sent.insert(len) {
            (bytes, Work::FirstZero(self.pool.submit(vec![0; bytes])?))
        } else {
            (0, Work::Zero(len))
        };
        self.pending_bytes += len_pending;
        self.pending.push_back(Pending { file, len: len_pending, work });
        Ok(())
    }

    fn make_room(&mut self, len: usize) -> Result<(), MkfsError> {
        while self.pending.len() >= 256
            || (!self.pending.is_empty() && self.pending_bytes + len > self.pending_limit)
        {
            self.collect_one()?;
        }
        Ok(())
    }

    fn collect_one(&mut self) -> Result<(), MkfsError> {
        let Some(Pending { file, len, work }) = self.pending.pop_front() else { return Ok(()) };
        self.pending_bytes -= len;
        let place = match work {
            Work::Chunk(ticket) => self.store(&ticket.wait()?)?,
            Work::FirstZero(ticket) => {
                let encoded = ticket.wait()?;
                let place = self.store(&encoded)?;
                self.zeros.insert(encoded.key.len, place);
                place
            }
            Work::Zero(len) => {
                self.dedup.chunks_read += 1;
                self.data_bytes += u64::from(len);
                self.dedup.bytes_saved += u64::from(len);
                *self
                    .zeros
                    .get(&len)
                    .expect("the first zero chunk of a length is collected before later ones")
            }
        };
        self.files[file.0].refs.push(place);
        Ok(())
    }

    fn store(&mut self, chunk: &Encoded) -> Result<ChunkRef, MkfsError> {
        self.dedup.chunks_read += 1;
        self.data_bytes += u64::from(chunk.key.len);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&chunk.key).copied();
        if let Some(place) = known {
            self.dedup.bytes_saved += u64::from(chunk.key.len);
            return Ok(place);
        }
        let blob =
            u32::try_from(self.blobs.len()).expect("one blob per layer, and a manifest of 4 MiB at most");
        let writer = match &mut self.current {
            Some(writer) => writer,
            none => none.insert(BlobWriter::create(self.layout, self.options)?),
        };
        let place = ChunkRef { blob, index: writer.push(chunk)?, skip: 0 };
        self.dedup.chunks_stored += 1;
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(chunk.key, place);
        Ok(place)
    }

    /// Ends a layer. The number of its blob in build order; `None` when it brought no new chunk.
    pub(crate) fn finish_layer(&mut self) -> Result<Option<u32>, MkfsError> {
        while !self.pending.is_empty() {
            self.collect_one()?;
        }
        let Some(writer) = self.current.take() else { return Ok(None) };
        let number = u32::try_from(self.blobs.len()).expect("as in store");
        self.blobs.push(writer.finish()?);
        Ok(Some(number))
    }

    /// Ends the build.
    pub(crate) fn finish(mut self) -> Result<Packed, MkfsError> {
        self.finish_layer()?;
        let Self { blobs, files, dedup, data_bytes, .. } = self;
        Ok(Packed { blobs, files, dedup, data_bytes })
    }
}

/// Why data could not be taken.
#[derive(Debug)]
pub(crate) enum DataError {
    /// Reading the input failed.
    Read(io::Error),
    /// The input ended before the announced size.
    Short,
    /// Packing failed.
    Pack(MkfsError),
}

impl From<MkfsError> for DataError {
    fn from(error: MkfsError) -> Self {
        Self::Pack(error)
    }
}

/// The data of one file on its way into chunks. Exactly the announced number of bytes must come.
pub(crate) struct FileData<'p, 'a> {
    packer: &'p mut Packer<'a>,
    id: DataId,
    remaining: u64,
    /// The chunk being filled.
    buffer: Vec<u8>,
    /// Zero bytes the chunk begins with that are not in `buffer`, while `buffer` is empty.
    zeros: usize,
}

impl FileData<'_, '_> {
    fn room(&self) -> u64 {
        let chunk = usize_from(self.packer.options.chunk_size);
        u64::try_from(chunk - self.buffer.len() - self.zeros)
            .expect("a chunk has at most 16 MiB")
            .min(self.remaining)
    }

    /// Takes `len` bytes from a reader.
    pub(crate) fn read(&mut self, from: &mut dyn Read, mut len: u64) -> Result<(), DataError> {
        while len > 0 {
            let now = len.min(self.room());
            if now == 0 {
                return Err(DataError::Short);
            }
            let room = usize::try_from(self.room()).expect("at most a chunk");
            let old = std::mem::take(&mut self.zeros);
            if self.buffer.capacity() == 0 {
                self.buffer.reserve_exact(old + room);
            }
            self.buffer.resize(self.buffer.len() + old, 0);
            let before = self.buffer.len();
            self.buffer.resize(before + usize::try_from(now).expect("at most a chunk"), 0);
            read_exact(from, &mut self.buffer[before..])?;
            len -= now;
            self.took(now)?;
        }
        Ok(())
    }

    /// Takes `len` zero bytes that were not read from anywhere.
    pub(crate) fn zeros(&mut self, mut len: u64) -> Result<(), DataError> {
        while len > 0 {
            let now = len.min(self.room());
            if now == 0 {
                return Err(DataError::Short);
            }
            let bytes = usize::try_from(now).expect("at most a chunk");
            if self.buffer.is_empty() {
                self.zeros += bytes;
            } else {
                self.buffer.resize(self.buffer.len() + bytes, 0);
            }
            len -= now;
            self.took(now)?;
        }
        Ok(())
    }

    fn took(&mut self, len: u64) -> Result<(), MkfsError> {
        self.remaining -= len;
        if self.room() > 0 {
            return Ok(());
        }
        if self.buffer.is_empty() {
            let zeros = u32::try_from(std::mem::take(&mut self.zeros)).expect("at most a chunk");
            self.packer.push_zeros(self.id, zeros)
        } else {
            self.packer.push(self.id, std::mem::take(&mut self.buffer))
        }
    }

    /// Ends the file.
    pub(crate) fn finish(self) -> Result<DataId, DataError> {
        if self.remaining == 0 { Ok(self.id) } else { Err(DataError::Short) }
    }
}

fn read_exact(from: &mut dyn Read, mut buffer: &mut [u8]) -> Result<(), DataError> {
    while !buffer.is_empty() {
        match from.read(buffer) {
            Ok(0) => return Err(DataError::Short),
            Ok(n) => buffer = &mut buffer[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(DataError::Read(e)),
        }
    }
    Ok(())
}

/// u32 to usize, which has at least 32 bits on every platform with a kernel that mounts EROFS.
pub(crate) fn usize_from(value: u32) -> usize {
    usize::try_from(value).expect("usize has at least 32 bits")
}
