//! What an access trace touches of an image, and in which order.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use erofs_format::layout::BLOCK;
use erofs_format::{ChunkInfo, FileKind, FormatError, Image};

use super::{Pieces, Touch};

/// Most chunk indexes that cutting finer may give one file: 512 KiB of the bootstrap, which is fetched before all else.
const FINE_INDEXES: u64 = 1 << 16;

/// Most blocks between two that are touched that are taken along: the next start's windows lie a little elsewhere.
const GAP: u16 = 3;

/// Blocks of one chunk, to be moved together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// The blob's position.
    pub(super) slot: usize,
    /// The chunk's position in the blob's map.
    pub(super) at: usize,
    pub(super) blocks: Range<u16>,
    /// The pieces of the chunk begin and end at multiples of so many blocks.
    pub(super) grain: u16,
}

/// What the reads of a trace come to.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Each block of the image at most once, in the order of the trace.
    pub(super) pieces: Vec<Piece>,
    /// Bytes asked for, each chunk's own length at most.
    pub(super) bytes: u64,
    /// Reads that are of no blob of the image.
    pub(super) strange: usize,
}

/// Blocks of a chunk; chunks have at most 16 MiB.
pub(super) fn blocks_of(chunk: &ChunkInfo) -> u16 {
    u16::try_from(u64::from(chunk.uncompressed_size).div_ceil(BLOCK))
        .expect("the image was checked: at most 4096")
}

impl Touched {
    pub(super) fn of(
        image: &Image<'_>,
        maps: &[Vec<ChunkInfo>],
        trace: &[Touch],
        form: Pieces,
    ) -> Result<Self, FormatError> {
        let grains = match form {
            Pieces::Blocks => coarse(image)?,
            Pieces::Chunks => HashMap::new(),
        };
        let slots: HashMap<[u8; 32], usize> =
            image.blobs().iter().enumerate().map(|(slot, blob)| (blob.id.0, slot)).collect();
        let mut seen: HashMap<(usize, usize), Vec<bool>> = HashMap::new();
        let mut touched = Self::default();
        for touch in trace {
            let Some(&slot) = slots.get(&touch.blob) else {
                touched.strange += 1;
                continue;
            };
            let end = touch.offset.saturating_add(touch.length);
            let map = &maps[slot];
            let stop = |chunk: &ChunkInfo| chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
            let first = map.partition_point(|chunk| stop(chunk) <= touch.offset);
            for (at, chunk) in map.iter().enumerate().skip(first) {
                let start = chunk.uncompressed_offset;
                if start >= end {
                    break;
                }
                let part = touch.offset.max(start) - start..stop(chunk).min(end) - start;
                touched.bytes = touched.bytes.saturating_add(part.end - part.start);
                let all = blocks_of(chunk);
                let grain = match form {
                    Pieces::Blocks => grains.get(&(slot, chunk.index)).map_or(1, |grain| all.min(*grain)),
                    Pieces::Chunks => all,
                };
                let block = |bytes: u64| u16::try_from(bytes / BLOCK).expect("within the chunk");
                let blocks = block(part.start) / grain * grain
                    ..block(part.end.next_multiple_of(BLOCK)).next_multiple_of(grain).min(all);
                let seen = seen.entry((slot, at)).or_insert_with(|| vec![false; all.into()]);
                for blocks in fresh(seen, blocks) {
                    touched.pieces.push(Piece { slot, at, blocks, grain });
                }
            }
        }
        touched.close_gaps(&mut seen);
        touched.widen(maps, &seen);
        Ok(touched)
    }

    /// Takes along the few blocks between two pieces of a chunk.
    fn close_gaps(&mut self, seen: &mut HashMap<(usize, usize), Vec<bool>>) {
        for piece in &mut self.pieces {
            let Some(blocks) = seen.get_mut(&(piece.slot, piece.at)) else { continue };
            let behind = &mut blocks[usize::from(piece.blocks.end)..];
            let gap = behind.iter().take_while(|seen| !**seen).count();
            // Not the rest of the chunk.
            if gap < behind.len() && gap <= usize::from(GAP) {
                behind[..gap].fill(true);
                piece.blocks.end += u16::try_from(gap).expect("at most GAP");
            }
        }
    }

    /// A chunk of which nearly all is touched moves as a whole, when the first of it does.
    fn widen(&mut self, maps: &[Vec<ChunkInfo>], seen: &HashMap<(usize, usize), Vec<bool>>) {
        let is_whole = |key: &(usize, usize)| {
            let blocks = &seen[key];
            blocks.iter().filter(|seen| **seen).count() * 8 >= blocks.len() * 7
        };
        let mut done = HashSet::new();
        self.pieces.retain_mut(|piece| {
            let key = (piece.slot, piece.at);
            if !is_whole(&key) {
                return true;
            }
            piece.blocks = 0..blocks_of(&maps[piece.slot][piece.at]);
            piece.grain = piece.blocks.end;
            done.insert(key)
        });
    }
}

/// Marks blocks as seen; gives the runs among them that were not.
fn fresh(seen: &mut [bool], blocks: Range<u16>) -> Vec<Range<u16>> {
    let mut runs: Vec<Range<u16>> = Vec::new();
    for block in blocks {
        if std::mem::replace(&mut seen[usize::from(block)], true) {
            continue;
        }
        match runs.last_mut().filter(|run| run.end == block) {
            Some(run) => run.end += 1,
            None => runs.push(block..block + 1),
        }
    }
    runs
}

/// Chunks, by slot and CI index, that may only be cut in so many blocks, because a file over them is large.
fn coarse(image: &Image<'_>) -> Result<HashMap<(usize, u32), u16>, FormatError> {
    let mut grains = HashMap::new();
    for visit in image.walk()? {
        let visit = visit?;
        let large = visit.inode.size > FINE_INDEXES * BLOCK;
        if !visit.first || visit.inode.kind != FileKind::Regular || !large {
            continue;
        }
        let blocks = visit.inode.size.div_ceil(FINE_INDEXES * BLOCK).next_power_of_two();
        let blocks = u16::try_from(blocks).unwrap_or(u16::MAX);
        for chunk in visit.inode.chunks() {
            let chunk = chunk?;
            let grain = grains.entry((chunk.blob, chunk.index)).or_insert(blocks);
            *grain = blocks.max(*grain);
        }
    }
    Ok(grains)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_fresh_once() {
        let mut seen = vec![false; 8];
        assert_eq!(fresh(&mut seen, 2..4), vec![2..4; 1]);
        assert_eq!(fresh(&mut seen, 0..8), [0..2, 4..8]);
        assert_eq!(fresh(&mut seen, 0..8), []);
    }
}
