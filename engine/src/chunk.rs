//! The chunk map of an object: where each referenced chunk lies on the device and in the stored blob.

use core::fmt;
use core::ops::Range;

/// Device alignment of chunks in bytes: each starts at a multiple and is zero-padded to the next.
pub const ALIGN: u64 = 4096;

/// Device offsets above this are refused, so that no sum of offsets and lengths can overflow.
const MAX_OFFSET: u64 = 1 << 62;

/// One chunk that the images refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset on the device (the uncompressed blob) in bytes, a multiple of [`ALIGN`].
    pub start: u64,
    /// Decoded length in bytes, not padded.
    pub len: u32,
    /// Offset in the stored blob in bytes.
    pub stored_start: u64,
    /// Stored (maybe compressed) length in bytes.
    pub stored_len: u32,
}

impl Chunk {
    /// End of the decoded bytes on the device, padding included.
    #[must_use]
    pub fn padded_end(&self) -> u64 {
        (self.start + u64::from(self.len)).next_multiple_of(ALIGN)
    }

    /// End of the stored bytes.
    #[must_use]
    pub fn stored_end(&self) -> u64 {
        self.stored_start + u64::from(self.stored_len)
    }
}

/// Why a chunk map cannot be taken. Positions count from 0 in the list that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// More chunks than a 32-bit index can name.
    TooMany,
    /// The chunk decodes to nothing.
    Empty {
        /// Position of the chunk.
        chunk: u32,
    },
    /// The chunk's device offset is not a multiple of [`ALIGN`].
    Unaligned {
        /// Position of the chunk.
        chunk: u32,
        /// Its device offset in bytes.
        start: u64,
    },
    /// The chunk starts before the padded end of the one before it.
    Overlap {
        /// Position of the chunk.
        chunk: u32,
        /// Its device offset in bytes.
        start: u64,
    },
    /// The chunk's device or stored end is beyond 2^62 bytes.
    TooFar {
        /// Position of the chunk.
        chunk: u32,
    },
    /// The ready set counts another number of chunks than the list.
    ReadyLength {
        /// Chunks in the list.
        chunks: u32,
        /// Chunks in the ready set.
        ready: u32,
    },
    /// A new list for a known object lacks a chunk of the old one, or has it in another place or size.
    Lost {
        /// Device offset of the chunk of the old list.
        start: u64,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooMany => write!(f, "chunk map: more than 2^32 - 1 chunks"),
            Self::Empty { chunk } => write!(f, "chunk map: chunk {chunk} has length 0"),
            Self::Unaligned { chunk, start } => {
                write!(f, "chunk map: chunk {chunk} at device offset {start} is not aligned to {ALIGN}")
            }
            Self::Overlap { chunk, start } => {
                write!(f, "chunk map: chunk {chunk} at device offset {start} overlaps the one before it")
            }
            Self::TooFar { chunk } => write!(f, "chunk map: chunk {chunk} ends beyond 2^62"),
            Self::ReadyLength { chunks, ready } => {
                write!(f, "chunk map: {chunks} chunks, but the ready set counts {ready}")
            }
            Self::Lost { start } => {
                write!(f, "chunk map: the new list changes or lacks the chunk at device offset {start}")
            }
        }
    }
}

impl core::error::Error for MapError {}

/// Checks a chunk map as [`crate::Input::AddObject`] does: sorted by device offset, aligned, not empty, no overlap.
///
/// # Errors
/// The first rule broken, with the chunk's position.
pub fn check_map(chunks: &[Chunk]) -> Result<(), MapError> {
    let mut end = 0;
    for (position, chunk) in chunks.iter().enumerate() {
        let index = u32::try_from(position).map_err(|_| MapError::TooMany)?;
        if chunk.len == 0 {
            return Err(MapError::Empty { chunk: index });
        }
        if chunk.start > MAX_OFFSET || chunk.stored_start > MAX_OFFSET {
            return Err(MapError::TooFar { chunk: index });
        }
        if !chunk.start.is_multiple_of(ALIGN) {
            return Err(MapError::Unaligned { chunk: index, start: chunk.start });
        }
        if chunk.start < end {
            return Err(MapError::Overlap { chunk: index, start: chunk.start });
        }
        end = chunk.padded_end();
    }
    u32::try_from(chunks.len()).map(|_| ()).map_err(|_| MapError::TooMany)
}

/// Device bytes of the run `chunks` of `map`, from its first byte to its padded end: the size of a flight's buffer.
/// Zero for an empty run and for one outside the map.
#[must_use]
pub fn span(map: &[Chunk], chunks: &Range<u32>) -> u64 {
    match map.get(index(chunks.start)..index(chunks.end)) {
        Some([first, .., last]) => last.padded_end() - first.start,
        Some([only]) => only.padded_end() - only.start,
        _ => 0,
    }
}

/// The chunks that hold a byte (padding included) of device range `bytes`.
pub(crate) fn lookup(map: &[Chunk], bytes: &Range<u64>) -> Range<u32> {
    let low = map.partition_point(|chunk| chunk.padded_end() <= bytes.start);
    let high = map.partition_point(|chunk| chunk.start < bytes.end).max(low);
    narrow(low)..narrow(high)
}

/// A chunk number as a position.
pub(crate) fn index(chunk: u32) -> usize {
    usize::try_from(chunk).unwrap_or(usize::MAX)
}

/// A position as a chunk number; maps were checked to fit.
pub(crate) fn narrow(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(start: u64, len: u32) -> Chunk {
        Chunk { start, len, stored_start: start, stored_len: len }
    }

    #[test]
    fn checks_name_the_chunk() {
        assert_eq!(check_map(&[]), Ok(()));
        assert_eq!(check_map(&[chunk(0, 1), chunk(4096, 5)]), Ok(()));
        assert_eq!(check_map(&[chunk(0, 0)]), Err(MapError::Empty { chunk: 0 }));
        assert_eq!(
            check_map(&[chunk(0, 1), chunk(5000, 1)]),
            Err(MapError::Unaligned { chunk: 1, start: 5000 })
        );
        assert_eq!(
            check_map(&[chunk(0, 4097), chunk(4096, 1)]),
            Err(MapError::Overlap { chunk: 1, start: 4096 })
        );
        assert_eq!(check_map(&[chunk(!4095, 1)]), Err(MapError::TooFar { chunk: 0 }));
    }

    #[test]
    fn lookup_counts_padding_and_skips_holes() {
        let map = [chunk(0, 100), chunk(8192, 4096), chunk(12288, 1)];
        assert_eq!(lookup(&map, &(0..1)), 0..1);
        assert_eq!(lookup(&map, &(4000..4096)), 0..1);
        assert_eq!(lookup(&map, &(4096..8192)), 1..1);
        assert_eq!(lookup(&map, &(4095..8193)), 0..2);
        assert_eq!(lookup(&map, &(20000..u64::MAX)), 3..3);
        assert_eq!(span(&map, &(0..3)), 16384);
        assert_eq!(span(&map, &(2..9)), 0);
    }
}
