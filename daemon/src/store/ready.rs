//! The ready map: which chunks of a blob file are durable and verified.
//!
//! A file of 512-byte sectors, little-endian. Each has its own checksum, so that a torn or lost write costs the chunks
//! of one sector and never claims a chunk.
//!
//! | sector | bytes | field |
//! |---|---|---|
//! | 0 | 0..8 | magic `SKREADY\0` |
//! | | 8..12 | version: 1 |
//! | | 16..48 | blob id |
//! | | 48..56 | size of the blob file |
//! | | 56..64 | inode of the blob file: a file that was replaced holds nothing |
//! | 1… | 0..496 | 62 words of bits: chunk `i` is bit `i % 64` of word `i / 64`, by its number in the blob |
//! | | 496..504 | first 8 bytes of the blob id |
//! | | 504..508 | number of the sector |
//! | all | 508..512 | CRC-32C of bytes 0..508 |

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::Path;

use crate::blob::{BlobId, MAX_CHUNK_INDEX, ReadyBits};

/// Bytes of a sector; what a disk writes as one.
pub const SECTOR: usize = 512;
/// Chunks in one sector.
pub const BITS_PER_SECTOR: u32 = 62 * 64;

const MAGIC: &[u8; 8] = b"SKREADY\0";
const VERSION: u32 = 1;
const CHECKED: usize = SECTOR - 4;

/// What a map belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The blob.
    pub blob: BlobId,
    /// Size of the blob file, bytes.
    pub size: u64,
    /// Inode of the blob file.
    pub inode: u64,
}

/// What a map file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The chunks that are ready.
    pub bits: ReadyBits,
    /// Whether the header is right; if not, the file has to be made anew.
    pub usable: bool,
    /// What was found wrong, for the log.
    pub damage: Option<String>,
}

/// The header sector.
pub fn header(identity: &Identity) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..8].copy_from_slice(MAGIC);
    sector[8..12].copy_from_slice(&VERSION.to_le_bytes());
    sector[16..48].copy_from_slice(identity.blob.bytes());
    sector[48..56].copy_from_slice(&identity.size.to_le_bytes());
    sector[56..64].copy_from_slice(&identity.inode.to_le_bytes());
    seal(&mut sector);
    sector
}

/// The sector (from 1) that holds a chunk.
pub fn sector_of(chunk: u32) -> u32 {
    chunk / BITS_PER_SECTOR + 1
}

/// The sectors that hold any of these chunks.
pub fn sectors_of(chunks: impl IntoIterator<Item = u32>) -> BTreeSet<u32> {
    chunks.into_iter().map(sector_of).collect()
}

/// Where a sector starts in the file.
pub fn offset_of(sector: u32) -> u64 {
    u64::from(sector) * 512
}

/// One sector of bits.
pub fn sector(blob: BlobId, number: u32, bits: &ReadyBits) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let first = usize::try_from(number.saturating_sub(1)).unwrap_or(usize::MAX).saturating_mul(62);
    for (place, word) in sector[..496].chunks_exact_mut(8).zip(bits.words().iter().skip(first)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    sector[496..504].copy_from_slice(&blob.bytes()[..8]);
    sector[504..508].copy_from_slice(&number.to_le_bytes());
    seal(&mut sector);
    sector
}

/// A whole map.
pub fn encode(identity: &Identity, bits: &ReadyBits) -> Vec<u8> {
    let mut bytes = header(identity).to_vec();
    let sectors = bits.words().len().div_ceil(62);
    for number in (1_u32..).take(sectors) {
        bytes.extend(sector(identity.blob, number, bits));
    }
    bytes
}

/// Reads a map. Nothing in it is an error: what is not certain is not ready.
pub fn decode(bytes: &[u8], identity: &Identity) -> Loaded {
    let damaged = |what: String| Loaded { damage: Some(what), ..Loaded::default() };
    let Some(first) = bytes.first_chunk::<SECTOR>() else {
        return damaged(format!("{} bytes is too short for its header", bytes.len()));
    };
    if !sealed(first) {
        return damaged("the checksum of its header is wrong".into());
    }
    if *first != header(identity) {
        return damaged("it belongs to another blob file, or has another version".into());
    }
    let (sectors, rest) = bytes.as_chunks::<SECTOR>();
    let mut words = Vec::with_capacity(sectors.len().saturating_mul(62));
    let mut lost = 0_u32;
    for (number, sector) in (0_u32..).zip(sectors).skip(1) {
        // Never written: a sector between two that were.
        let empty = sector.iter().all(|byte| *byte == 0);
        let good = sealed(sector)
            && sector[496..504] == identity.blob.bytes()[..8]
            && sector[504..508] == number.to_le_bytes();
        lost += u32::from(!good && !empty);
        for word in sector[..496].as_chunks::<8>().0 {
            words.push(if good { u64::from_le_bytes(*word) } else { 0 });
        }
    }
    let damage = (lost > 0 || !rest.is_empty()).then(|| {
        format!(
            "{lost} of its {} sectors are damaged, {} bytes at its end are half a sector",
            sectors.len(),
            rest.len()
        )
    });
    Loaded { bits: ReadyBits::from_words(words), usable: true, damage }
}

/// Reads the map file at `path`; a missing one is an unusable one without damage.
///
/// # Errors
/// Only when the system cannot read the file.
pub fn load(path: &Path, identity: &Identity) -> io::Result<Loaded> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Loaded::default()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(offset_of(sector_of(MAX_CHUNK_INDEX) + 1)).read_to_end(&mut bytes)?;
    Ok(decode(&bytes, identity))
}

fn seal(sector: &mut [u8; SECTOR]) {
    let sum = crc32c::crc32c(&sector[..CHECKED]);
    sector[CHECKED..].copy_from_slice(&sum.to_le_bytes());
}

fn sealed(sector: &[u8; SECTOR]) -> bool {
    sector[CHECKED..] == crc32c::crc32c(&sector[..CHECKED]).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { blob: BlobId::new([7; 32]), size: 1 << 20, inode: 42 }
    }

    #[test]
    fn bits_come_back_from_every_sector() {
        let bits: ReadyBits = [0, 1, 63, 64, 3967, 3968, 7935, 9000].into_iter().collect();
        let loaded = decode(&encode(&identity(), &bits), &identity());
        assert_eq!(loaded.bits.iter().collect::<Vec<_>>(), bits.iter().collect::<Vec<_>>());
        assert!(loaded.usable && loaded.damage.is_none());
        assert_eq!(sectors_of([0, 3967, 3968, 9000]), BTreeSet::from([1, 2, 3]));
    }

    #[test]
    fn any_flipped_byte_loses_chunks_and_never_adds_one() {
        let bits: ReadyBits = (0..5000).step_by(3).collect();
        let good = encode(&identity(), &bits);
        for place in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[place] ^= 0x10;
            let loaded = decode(&bad, &identity());
            assert!(loaded.damage.is_some(), "byte {place}");
            assert!(loaded.bits.iter().all(|chunk| bits.contains(chunk)), "byte {place}");
            assert_eq!(
                loaded.bits.count() == 0,
                place < SECTOR,
                "byte {place}: one bad sector costs its own chunks"
            );
            assert!(loaded.bits.count() < bits.count());
        }
    }

    #[test]
    fn any_length_is_taken() {
        let bits: ReadyBits = (0..8000).collect();
        let good = encode(&identity(), &bits);
        for length in 0..good.len() {
            let loaded = decode(&good[..length], &identity());
            assert!(loaded.bits.iter().all(|chunk| bits.contains(chunk)));
            assert_eq!(loaded.usable, length >= SECTOR);
        }
    }

    #[test]
    fn a_map_of_another_file_says_nothing() {
        let bits: ReadyBits = [1].into_iter().collect();
        for other in [
            Identity { inode: 43, ..identity() },
            Identity { size: 4096, ..identity() },
            Identity { blob: BlobId::new([8; 32]), ..identity() },
        ] {
            let loaded = decode(&encode(&identity(), &bits), &other);
            assert!(!loaded.usable && loaded.bits.count() == 0 && loaded.damage.is_some());
        }
    }

    #[test]
    fn a_sector_that_was_moved_says_nothing() {
        let bits: ReadyBits = [5].into_iter().collect();
        let mut bytes = encode(&identity(), &[BITS_PER_SECTOR].into_iter().collect());
        bytes[1024..1536].copy_from_slice(&sector(identity().blob, 1, &bits));
        let loaded = decode(&bytes, &identity());
        assert_eq!(loaded.bits.count(), 0);
        assert!(loaded.damage.is_some());
    }
}
