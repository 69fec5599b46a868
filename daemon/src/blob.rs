//! What the daemon knows of one blob: its name, its size and the chunks that mounted images refer to.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use erofs_format::{ChunkInfo, Compressor, DigestAlgo};
use skimmer_fetcher::chunk::ChunkSpec;

/// Cache files hold, and both kernel interfaces ask for, whole blocks of this many bytes.
pub const BLOCK: u64 = 4096;

/// The highest chunk index accepted: keeps the presence bits of one blob below 8 MiB whatever an image claims.
pub const MAX_CHUNK_INDEX: u32 = (1 << 26) - 1;

/// The largest chunk accepted, in bytes; RAFS allows no larger one (chunk size bits 12 to 24).
pub const MAX_CHUNK_LEN: u32 = 1 << 24;

/// Rounds up to a whole block; `None` past the end of `u64`.
pub fn align_up(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(BLOCK)
}

/// A blob's name: the SHA-256 of the blob file, which is also the digest of its OCI layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId([u8; 32]);

/// A text that is not 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("blob id {0:?} is not 64 lower-case hex digits")]
pub struct BadBlobId(String);

impl BlobId {
    /// A blob id from the digest's bytes.
    pub const fn new(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// The digest's bytes.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hex digits.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({self})")
    }
}

impl FromStr for BlobId {
    type Err = BadBlobId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadBlobId(text.chars().take(80).collect());
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest).map_err(|_| bad())?;
        Ok(Self(digest))
    }
}

/// One chunk that some image refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobChunk {
    /// Its number in the blob's chunk table (compression information): the same in every image that uses the blob.
    pub index: u32,
    /// Its first byte on the uncompressed device; a multiple of [`BLOCK`].
    pub start: u64,
    /// Where its stored bytes lie and how to check them.
    pub spec: ChunkSpec,
}

impl BlobChunk {
    /// Bytes it takes in the cache file: its length rounded up to whole blocks.
    pub fn padded_len(&self) -> u64 {
        u64::from(self.spec.len).next_multiple_of(BLOCK)
    }

    /// The byte after its last block on the device.
    pub fn padded_end(&self) -> u64 {
        self.start + self.padded_len()
    }
}

/// Why the chunks of an image cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number in the chunk table breaks a rule.
    #[error("blob {blob}: chunk {index}: {what}")]
    Chunk {
        /// The blob.
        blob: BlobId,
        /// The chunk's number in the blob.
        index: u32,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A number of the blob as a whole breaks a rule.
    #[error("blob {blob}: {what}")]
    Blob {
        /// The blob.
        blob: BlobId,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A blob and the chunks of it that are needed ("referenced chunks").
#[derive(Debug, Clone)]
pub struct BlobSpec {
    /// Its name.
    pub id: BlobId,
    /// Size of the uncompressed device (the cache file), in bytes.
    pub device_bytes: u64,
    /// Size of the stored blob at its source, in bytes.
    pub stored_bytes: u64,
    /// The referenced chunks in device order, none overlapping another.
    pub chunks: Arc<[BlobChunk]>,
}

impl BlobSpec {
    /// The blob as one bootstrap describes it. Every number is checked again here: what the data path takes over is sound.
    pub fn new(
        id: BlobId,
        device_bytes: u64,
        stored_bytes: u64,
        chunks: &[ChunkInfo],
        compressor: Compressor,
        digest: DigestAlgo,
    ) -> Result<Self, SpecError> {
        let mut list = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let codec = if chunk.compressed { codec(compressor) } else { codec(Compressor::None) };
            let spec = ChunkSpec {
                stored_offset: chunk.compressed_offset,
                stored_len: chunk.compressed_size,
                len: chunk.uncompressed_size,
                codec,
                digest: chunk_digest(digest, chunk.digest),
            };
            list.push(BlobChunk { index: chunk.index, start: chunk.uncompressed_offset, spec });
        }
        Self::from_chunks(id, device_bytes, stored_bytes, list)
    }

    /// The blob from chunks in any order.
    pub fn from_chunks(
        id: BlobId,
        device_bytes: u64,
        stored_bytes: u64,
        mut chunks: Vec<BlobChunk>,
    ) -> Result<Self, SpecError> {
        if !device_bytes.is_multiple_of(BLOCK) {
            return Err(SpecError::Blob { blob: id, what: "device size is not a multiple of 4096" });
        }
        chunks.sort_by_key(|chunk| chunk.start);
        let mut end = 0;
        for chunk in &chunks {
            let fail = |what| Err(SpecError::Chunk { blob: id, index: chunk.index, what });
            if chunk.index > MAX_CHUNK_INDEX {
                return fail("its number is past the limit of 67108863");
            }
            if !chunk.start.is_multiple_of(BLOCK) {
                return fail("its device offset is not a multiple of 4096");
            }
            if chunk.spec.len == 0 || chunk.spec.len > MAX_CHUNK_LEN {
                return fail("its length is not between 1 byte and 16 MiB");
            }
            if chunk.spec.stored_len == 0 {
                return fail("it has no stored bytes");
            }
            if chunk.start < end {
                return fail("it overlaps the chunk before it on the device");
            }
            let len = u64::from(chunk.spec.len).next_multiple_of(BLOCK);
            end = match chunk.start.checked_add(len) {
                Some(end) if end <= device_bytes => end,
                _ => return fail("it ends past the end of the device"),
            };
            match chunk.spec.stored_offset.checked_add(u64::from(chunk.spec.stored_len)) {
                Some(stored) if stored <= stored_bytes => {}
                _ => return fail("its stored bytes end past the end of the blob"),
            }
        }
        let mut numbers: Vec<u32> = chunks.iter().map(|chunk| chunk.index).collect();
        numbers.sort_unstable();
        if let Some(pair) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(SpecError::Chunk { blob: id, index: pair[0], what: "two chunks have this number" });
        }
        Ok(Self { id, device_bytes, stored_bytes, chunks: chunks.into() })
    }

    /// This blob with the chunks of `other`, another image's view of it, added. Chunks that both name must agree.
    pub fn merged(&self, other: &Self) -> Result<Self, SpecError> {
        let blob = self.id;
        if other.id != blob {
            return Err(SpecError::Blob { blob, what: "another blob cannot be merged into it" });
        }
        if other.device_bytes != self.device_bytes || other.stored_bytes != self.stored_bytes {
            return Err(SpecError::Blob { blob, what: "two images disagree about its size" });
        }
        let known: std::collections::HashMap<u32, &BlobChunk> =
            self.chunks.iter().map(|chunk| (chunk.index, chunk)).collect();
        let mut chunks = self.chunks.to_vec();
        for chunk in other.chunks.iter() {
            match known.get(&chunk.index) {
                None => chunks.push(chunk.clone()),
                Some(mine) if *mine == chunk => {}
                Some(_) => {
                    let what = "two images disagree about it";
                    return Err(SpecError::Chunk { blob, index: chunk.index, what });
                }
            }
        }
        Self::from_chunks(blob, self.device_bytes, self.stored_bytes, chunks)
    }

    /// Bytes of the cache file that its referenced chunks take.
    pub fn referenced_bytes(&self) -> u64 {
        self.chunks.iter().map(BlobChunk::padded_len).sum()
    }

    /// Bytes of the cache file that are both referenced and in `ready`.
    pub fn ready_bytes(&self, ready: &ReadyBits) -> u64 {
        self.chunks.iter().filter(|c| ready.contains(c.index)).map(BlobChunk::padded_len).sum()
    }

    /// Whether every referenced chunk is in `ready`.
    pub fn is_complete(&self, ready: &ReadyBits) -> bool {
        self.chunks.iter().all(|chunk| ready.contains(chunk.index))
    }
}

/// The chunks of a blob file that are on disk and verified, by their number in the blob.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadyBits {
    words: Vec<u64>,
}

impl ReadyBits {
    /// No chunk at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes up `index` ([`BlobChunk::index`]). Numbers past [`MAX_CHUNK_INDEX`] are not taken: no blob has them.
    pub fn insert(&mut self, index: u32) {
        if index > MAX_CHUNK_INDEX {
            return;
        }
        let (word, bit) = place(index);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= bit;
    }

    /// Takes `index` out.
    pub fn remove(&mut self, index: u32) {
        let (word, bit) = place(index);
        if let Some(word) = self.words.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Whether `index` is in the set.
    pub fn contains(&self, index: u32) -> bool {
        let (word, bit) = place(index);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many chunks are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The numbers in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..=MAX_CHUNK_INDEX).take(self.words.len() * 64).filter(|index| self.contains(*index))
    }

    /// Adds every chunk of `other`.
    pub fn union(&mut self, other: &Self) {
        if other.words.len() > self.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// The bits as 64-bit words: chunk `i` is bit `i % 64` of word `i / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The set from such words; those past the highest chunk number are dropped.
    pub fn from_words(mut words: Vec<u64>) -> Self {
        words.truncate(place(MAX_CHUNK_INDEX).0 + 1);
        Self { words }
    }
}

impl FromIterator<u32> for ReadyBits {
    fn from_iter<I: IntoIterator<Item = u32>>(indexes: I) -> Self {
        let mut bits = Self::new();
        for index in indexes {
            bits.insert(index);
        }
        bits
    }
}

fn place(index: u32) -> (usize, u64) {
    let word = usize::try_from(index / 64).expect("a usize holds 26 bits");
    (word, 1 << (index % 64))
}

fn codec(compressor: Compressor) -> skimmer_fetcher::chunk::Codec {
    use skimmer_fetcher::chunk::Codec;
    match compressor {
        Compressor::None => Codec::None,
        Compressor::Lz4Block => Codec::Lz4Block,
        Compressor::Gzip => Codec::Gzip,
        Compressor::Zstd => Codec::Zstd,
    }
}

fn chunk_digest(algo: DigestAlgo, digest: [u8; 32]) -> skimmer_fetcher::chunk::ChunkDigest {
    use skimmer_fetcher::chunk::ChunkDigest;
    match algo {
        DigestAlgo::Blake3 => ChunkDigest::Blake3(digest),
        DigestAlgo::Sha256 => ChunkDigest::Sha256(digest),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skimmer_fetcher::chunk::{ChunkDigest, Codec};

    use super::*;

    const ID: BlobId = BlobId::new([7; 32]);

    fn chunk(index: u32, start: u64, len: u32) -> BlobChunk {
        let digest = ChunkDigest::Blake3([0; 32]);
        let stored_offset = u64::from(index) * 100;
        let spec = ChunkSpec { stored_offset, stored_len: 100, len, codec: Codec::Zstd, digest };
        BlobChunk { index, start, spec }
    }

    fn why(chunks: &[BlobChunk]) -> String {
        BlobSpec::from_chunks(ID, 40960, 1000, chunks.to_vec()).unwrap_err().to_string()
    }

    #[test]
    fn ids_are_lower_case_hex() {
        let id: BlobId = "0f".repeat(32).parse().unwrap();
        assert_eq!((id.bytes(), id.hex()), (&[15; 32], "0f".repeat(32)));
        assert_eq!(id.to_string(), id.hex());
        for bad in [String::new(), "0F".repeat(32), "0f".repeat(31), "0g".repeat(32), "0f".repeat(33)] {
            assert!(bad.parse::<BlobId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chunks_that_cannot_be_are_named() {
        let spec =
            BlobSpec::from_chunks(ID, 40960, 1000, vec![chunk(3, 8192, 4097), chunk(0, 0, 5)]).unwrap();
        assert_eq!(spec.chunks.iter().map(|chunk| chunk.index).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(spec.referenced_bytes(), 12288);
        assert!(why(&[chunk(1, 100, 5)]).contains("chunk 1: its device offset"));
        assert!(why(&[chunk(1, 0, 0)]).contains("length"));
        assert!(why(&[chunk(1, 0, MAX_CHUNK_LEN + 1)]).contains("length"));
        assert!(why(&[chunk(1, 0, 4097), chunk(2, 4096, 5)]).contains("chunk 2: it overlaps"));
        assert!(why(&[chunk(1, 36864, 4097)]).contains("past the end of the device"));
        assert!(why(&[chunk(1, u64::MAX - 4095, 1)]).contains("past the end of the device"));
        assert!(why(&[chunk(10, 0, 5)]).contains("past the end of the blob"));
        assert!(why(&[chunk(1, 0, 5), chunk(1, 4096, 5)]).contains("two chunks"));
        assert!(why(&[chunk(MAX_CHUNK_INDEX + 1, 0, 5)]).contains("limit"));
        assert!(BlobSpec::from_chunks(ID, 4097, 0, Vec::new()).is_err());
    }

    #[test]
    fn images_over_one_blob_add_up_or_disagree() {
        let spec = |chunks: &[BlobChunk]| BlobSpec::from_chunks(ID, 40960, 1000, chunks.to_vec()).unwrap();
        let (a, b, c) = (chunk(0, 0, 5), chunk(1, 4096, 5), chunk(2, 8192, 5));
        let both = spec(&[a.clone(), c.clone()]).merged(&spec(&[b.clone(), c.clone()])).unwrap();
        assert_eq!(*both.chunks, [a.clone(), b.clone(), c]);
        assert!(both.is_complete(&[0, 1, 2].into_iter().collect()));
        assert!(!both.is_complete(&[0, 2].into_iter().collect()));
        assert_eq!(both.ready_bytes(&[0, 2, 9].into_iter().collect()), 8192);
        let moved = BlobChunk { start: 12288, ..b.clone() };
        assert!(spec(std::slice::from_ref(&b)).merged(&spec(&[moved])).is_err());
        let smaller = BlobSpec::from_chunks(ID, 36864, 1000, vec![b]).unwrap();
        assert!(spec(&[a]).merged(&smaller).is_err());
    }

    proptest! {
        #[test]
        fn ready_bits_are_a_set(ops in prop::collection::vec((any::<bool>(), 0..500u32), 0..200)) {
            let (mut bits, mut model) = (ReadyBits::new(), std::collections::BTreeSet::new());
            for (insert, index) in ops {
                if insert { bits.insert(index); model.insert(index); } else { bits.remove(index); model.remove(&index); }
            }
            prop_assert_eq!(bits.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(bits.count(), u64::try_from(model.len()).unwrap());
            let copy = ReadyBits::from_words(bits.words().to_vec());
            prop_assert_eq!(&copy, &bits);
            bits.insert(u32::MAX);
            prop_assert_eq!(copy, bits);
        }
    }
}
