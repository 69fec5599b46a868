//! The start blob: pieces of chunks, one behind the other in the order in which they are wanted, packed into chunks.

use std::collections::{HashMap, VecDeque};

use erofs_format::ChunkInfo;
use erofs_format::blob_table::BlobFeatures;
use erofs_format::layout::BLOCK;
use skimmer_fetcher::layout::Layout;

use super::touched::{Piece, blocks_of};
use super::{BlobFiles, Pieces};
use crate::blob::{Blob, BlobWriter};
use crate::pack::{ChunkRef, usize_from};
use crate::pool::{Known, Pool, Ticket};
use crate::{Compression, MkfsError, Options};

/// The start blob is small, and read over slow links: it is worth the time.
const LEVEL: i32 = 19;

/// Where blocks have gone: by slot and CI index, for each block of the chunk.
pub(super) type Moved = HashMap<(usize, u32), Vec<Option<ChunkRef>>>;

/// The blob under construction.
struct Start {
    pool: Pool,
    writer: BlobWriter,
    /// Its number in build order.
    number: u32,
    /// Chunks closed so far.
    closed: u32,
    /// Those that are not written yet.
    tickets: VecDeque<Ticket>,
    depth: usize,
    /// The chunk that is open.
    open: Vec<u8>,
    chunk_size: usize,
}

const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK == 4096);

impl Start {
    fn close(&mut self) -> Result<(), MkfsError> {
        if !self.open.is_empty() {
            self.tickets.push_back(self.pool.submit(std::mem::take(&mut self.open))?);
            self.closed += 1;
        }
        while self.tickets.len() > self.depth {
            self.write_one()?;
        }
        Ok(())
    }

    fn write_one(&mut self) -> Result<(), MkfsError> {
        if let Some(ticket) = self.tickets.pop_front() {
            self.writer.push(&ticket.wait()?)?;
        }
        Ok(())
    }

    /// Whole blocks that the open chunk has room for.
    fn room(&self) -> usize {
        (self.chunk_size - self.open.len().next_multiple_of(BLOCK_BYTES)) / BLOCK_BYTES
    }

    /// Puts `blocks` of a chunk's `data` into the open chunk, which has room; gives the place of the first.
    fn append(&mut self, data: &[u8], blocks: std::ops::Range<u16>) -> ChunkRef {
        self.open.resize(self.open.len().next_multiple_of(BLOCK_BYTES), 0);
        let skip = u16::try_from(self.open.len() / BLOCK_BYTES).expect("a chunk has at most 4096 blocks");
        let start = usize::from(blocks.start) * BLOCK_BYTES;
        let end = (usize::from(blocks.end) * BLOCK_BYTES).min(data.len());
        self.open.extend_from_slice(&data[start..end]);
        ChunkRef { blob: self.number, index: self.closed, skip }
    }

    fn finish(mut self, features: BlobFeatures) -> Result<Blob, MkfsError> {
        self.close()?;
        while !self.tickets.is_empty() {
            self.write_one()?;
        }
        self.writer.finish_with(features)
    }
}

/// Writes the start blob of an image of `number` blobs; gives it and where everything went.
pub(super) fn write(
    files: &mut BlobFiles<'_>,
    blobs: &[erofs_format::Blob],
    maps: &[Vec<ChunkInfo>],
    pieces: &[Piece],
    form: Pieces,
    output: &Layout,
    options: &Options,
) -> Result<(Blob, Moved), MkfsError> {
    let mut options = options.clone();
    if let Compression::Zstd { level } = &mut options.compression {
        *level = LEVEL;
    }
    let threads = options.threads.or_else(|| std::thread::available_parallelism().ok());
    let threads = threads.map_or(1, std::num::NonZeroUsize::get).min(64);
    let mut start = Start {
        pool: Pool::start(&options, &Known::default(), threads, threads)?,
        writer: BlobWriter::create(output, &options)?,
        number: u32::try_from(blobs.len()).unwrap_or(u32::MAX),
        closed: 0,
        tickets: VecDeque::new(),
        depth: threads * 2,
        open: Vec::new(),
        chunk_size: usize_from(options.chunk_size),
    };
    let mut moved = Moved::new();
    for piece in pieces {
        let chunk = &maps[piece.slot][piece.at];
        let data = files.data(&blobs[piece.slot], chunk)?;
        let places =
            moved.entry((piece.slot, chunk.index)).or_insert_with(|| vec![None; blocks_of(chunk).into()]);
        let mut rest = piece.blocks.clone();
        while !rest.is_empty() {
            let (grain, room) = (usize::from(piece.grain), start.room());
            let fit = match rest.len() {
                // The first chunk is one grain alone, so that one read takes all of it: a mount is proven by it.
                len if start.closed == 0 => len.min(grain),
                len if len <= room => len,
                // No grain is cut: an index may stand for it.
                len if len > grain => room / grain * grain,
                _ => 0,
            };
            if fit == 0 {
                start.close()?;
                continue;
            }
            let end = rest.start + u16::try_from(fit).expect("at most what is left");
            let place = start.append(&data, rest.start..end);
            for (block, skip) in (rest.start..end).zip(place.skip..) {
                places[usize::from(block)] = Some(ChunkRef { skip, ..place });
            }
            rest.start = end;
            if start.closed == 0 || form == Pieces::Chunks {
                start.close()?;
            }
        }
    }
    let features = match form {
        Pieces::Blocks => BlobFeatures::SEPARATED_PREFETCH_FILES | BlobFeatures::FINE_INDEXES,
        Pieces::Chunks => BlobFeatures::SEPARATED_PREFETCH_FILES,
    };
    Ok((start.finish(features)?, moved))
}
