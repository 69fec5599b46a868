//! A chunk whose stored bytes are arriving.

use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use sha2::Digest as _;
use tokio::sync::{Semaphore, SemaphorePermit};
use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::{ChunkDigest, ChunkError, ChunkSpec, Codec, Verified, seal, sealed, verify};

/// Chunks longer than this are decoded only when they are whole: what a decoder keeps grows with what it decodes.
const EARLY_LEN: u32 = 4 << 20;

/// As many decoders of chunks that are still arriving as there are processors.
static EARLY: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)));

/// Stored bytes that are decoded at one go: what a task may keep its thread from others for.
const STEP: usize = 64 * 1024;

/// Collects a chunk's stored bytes.
pub(super) enum Arriving<B> {
    /// Stored raw: bytes go straight to their place.
    Raw { buffer: B, filled: usize },
    /// Compressed: collected until whole, unless one piece holds all of it.
    Coded { buffer: B, stored: Bytes, more: BytesMut, early: Option<Box<Early>> },
}

impl<B: AsMut<[u8]>> Arriving<B> {
    pub(super) fn new(spec: &ChunkSpec, buffer: B) -> Self {
        match spec.codec {
            Codec::None => Self::Raw { buffer, filled: 0 },
            _ => Self::Coded { buffer, stored: Bytes::new(), more: BytesMut::new(), early: None },
        }
    }

    /// Adds the next stored bytes. The caller never gives more than the chunk has. `soon`: nothing is left to do once
    /// the chunk is there, so it is worth decoding what has come while the rest is on its way, by [`Self::advance`].
    pub(super) fn add(&mut self, spec: &ChunkSpec, piece: Bytes, soon: bool) {
        match self {
            Self::Raw { buffer, filled } => {
                let end = *filled + piece.len();
                buffer.as_mut()[*filled..end].copy_from_slice(&piece);
                *filled = end;
            }
            Self::Coded { stored, more, early, .. } => {
                if more.is_empty() {
                    // `check` has bounded the stored length by the chunk's length.
                    if u64::try_from(piece.len()) == Ok(u64::from(spec.stored_len)) {
                        *stored = piece;
                        return;
                    }
                    more.reserve(usize::try_from(spec.stored_len).unwrap_or(0));
                    *early = if soon { Early::new(spec).map(Box::new) } else { None };
                }
                // Kept even so: one decoder decides what a chunk is that this one does not like.
                more.extend_from_slice(&piece);
            }
        }
    }

    /// Decodes a step of what has come; whether there is more of it.
    pub(super) fn advance(&mut self, spec: &ChunkSpec) -> bool {
        let Self::Coded { buffer, more, early, .. } = self else { return false };
        let Some(decoder) = early else { return false };
        let end = more.len().min(decoder.fed.saturating_add(STEP));
        if decoder.feed(&more[decoder.fed..end], spec, buffer.as_mut()).is_none() {
            *early = None;
            return false;
        }
        decoder.fed = end;
        end < more.len()
    }

    /// Whether the chunk, which is whole, has been decoded on its way, and rightly so.
    pub(super) fn is_decoded(&mut self, spec: &ChunkSpec) -> bool {
        let Self::Coded { early, .. } = self else { return false };
        *early = early.take().filter(|early| early.is_whole(spec));
        early.is_some()
    }

    pub(super) fn check(mut self, spec: &ChunkSpec) -> Result<Verified<B>, ChunkError> {
        self.is_decoded(spec);
        match self {
            Self::Raw { buffer, filled } => seal(spec, buffer, filled),
            Self::Coded { buffer, early: Some(early), .. } => {
                let len = early.filled;
                sealed(spec, buffer, len, early.hasher.finish())
            }
            Self::Coded { buffer, stored, more, .. } if more.is_empty() => verify(spec, &stored, buffer),
            Self::Coded { buffer, more, .. } => verify(spec, &more, buffer),
        }
    }
}

/// Decodes and hashes a zstd chunk as far as its bytes have come. It may take odd framing around the right bytes that
/// the decoder of whole chunks refuses; what it does not take, that one is asked about.
pub(super) struct Early {
    decoder: Decoder<'static>,
    hasher: Hasher,
    /// Stored bytes that it has had.
    fed: usize,
    filled: usize,
    /// No frame is open.
    ended: bool,
    _turn: SemaphorePermit<'static>,
}

impl Early {
    /// Nothing when the chunk is not for this, or enough others are at it.
    fn new(spec: &ChunkSpec) -> Option<Self> {
        if spec.codec != Codec::Zstd || spec.len > EARLY_LEN {
            return None;
        }
        let turn = EARLY.try_acquire().ok()?;
        let mut decoder = Decoder::new().ok()?;
        // No chunk needs to look back over more than itself; a window takes memory.
        let window = spec.len.next_power_of_two().ilog2().max(10);
        decoder.set_parameter(DParameter::WindowLogMax(window)).ok()?;
        Some(Self { decoder, hasher: Hasher::of(spec.digest), fed: 0, filled: 0, ended: false, _turn: turn })
    }

    /// Decodes the next bytes behind what has been decoded into `buffer`; nothing when that fails or is too much.
    fn feed(&mut self, mut piece: &[u8], spec: &ChunkSpec, buffer: &mut [u8]) -> Option<()> {
        let room = buffer.get_mut(..usize::try_from(spec.len).ok()?)?;
        loop {
            let free = &mut room[self.filled..];
            let step = self.decoder.run_on_buffers(piece, free).ok()?;
            self.hasher.add(&free[..step.bytes_written]);
            self.filled += step.bytes_written;
            piece = &piece[step.bytes_read..];
            self.ended = step.remaining == 0;
            if piece.is_empty() && (self.ended || step.bytes_written == 0) {
                return Some(());
            }
            if step.bytes_read == 0 && step.bytes_written == 0 {
                return None;
            }
        }
    }

    /// Whether it has had the whole chunk, and what came of it has the chunk's length and digest.
    fn is_whole(&self, spec: &ChunkSpec) -> bool {
        let (ChunkDigest::Blake3(expected) | ChunkDigest::Sha256(expected)) = spec.digest;
        self.ended
            && u64::try_from(self.fed) == Ok(u64::from(spec.stored_len))
            && u64::try_from(self.filled) == Ok(u64::from(spec.len))
            && self.hasher.clone().finish() == expected
    }
}

#[derive(Clone)]
enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(sha2::Sha256),
}

impl Hasher {
    fn of(digest: ChunkDigest) -> Self {
        match digest {
            ChunkDigest::Blake3(_) => Self::Blake3(Box::default()),
            ChunkDigest::Sha256(_) => Self::Sha256(sha2::Sha256::new()),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> [u8; 32] {
        match self {
            Self::Blake3(hasher) => *hasher.finalize().as_bytes(),
            Self::Sha256(hasher) => hasher.finalize().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Text of little repetition, so that what is stored comes in several pieces.
    fn data(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            b"etaoinshrdlu \n.,"[usize::try_from(state >> 60).unwrap()]
        };
        (0..len).map(|_| next()).collect()
    }

    fn spec(stored: &[u8], data: &[u8]) -> ChunkSpec {
        ChunkSpec {
            stored_offset: 0,
            stored_len: u32::try_from(stored.len()).unwrap(),
            len: u32::try_from(data.len()).unwrap(),
            codec: Codec::Zstd,
            digest: ChunkDigest::Sha256(*crate::Digest::of(data).as_bytes()),
        }
    }

    /// Whether it was decoded on its way, and what became of it.
    fn arrive(
        spec: &ChunkSpec,
        stored: &[u8],
        piece: usize,
    ) -> (bool, Result<Verified<Vec<u8>>, ChunkError>) {
        let room = usize::try_from(spec.len.next_multiple_of(4096)).unwrap();
        let mut chunk = Arriving::new(spec, vec![0x55; room + 4096]);
        for piece in stored.chunks(piece) {
            chunk.add(spec, Bytes::copy_from_slice(piece), true);
            while chunk.advance(spec) {}
        }
        (chunk.is_decoded(spec), chunk.check(spec))
    }

    /// The tests of this crate share the turns.
    fn all_turns() -> std::sync::MutexGuard<'static, ()> {
        static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[test]
    fn a_chunk_is_decoded_while_it_arrives() {
        let _alone = all_turns();
        let data = data(300_000);
        let stored = zstd::bulk::compress(&data, 3).unwrap();
        for digest in [
            ChunkDigest::Sha256(*crate::Digest::of(&data).as_bytes()),
            ChunkDigest::Blake3(*blake3::hash(&data).as_bytes()),
        ] {
            let spec = ChunkSpec { digest, ..spec(&stored, &data) };
            for piece in [1, 1000, 65_536, stored.len() - 1] {
                let (early, result) = arrive(&spec, &stored, piece);
                let verified = result.unwrap();
                assert!(early && verified.bytes() == data, "pieces of {piece}");
                assert!(verified.padded()[data.len()..].iter().all(|byte| *byte == 0));
            }
        }
        let spec = spec(&stored, &data);
        let (early, result) = arrive(&spec, &stored, stored.len());
        assert!(!early && result.is_ok(), "one piece that holds all has nothing to wait for");
        let mut chunk = Arriving::new(&spec, vec![0; 1 << 19]);
        let (first, last) = stored.split_at(1000);
        chunk.add(&spec, Bytes::copy_from_slice(first), true);
        assert!(!chunk.advance(&spec));
        chunk.add(&spec, Bytes::copy_from_slice(last), true);
        let steps = std::iter::repeat_with(|| chunk.advance(&spec)).take_while(|more| *more).count();
        assert_eq!(steps, last.len().div_ceil(STEP) - 1, "a long piece in steps");
        assert!(chunk.check(&spec).unwrap().bytes() == data);
    }

    /// A frame with a window of its own and a checksum, that does not say how long it is.
    fn framed(data: &[u8], window_log: u32) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.include_checksum(true).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// What becomes of `stored`, which is the same whole and in pieces; `early`: whether it is decoded on its way.
    fn same(spec: &ChunkSpec, stored: &[u8], early: bool, what: &str) -> Result<(), ChunkError> {
        let whole = verify(spec, stored, vec![0x55; 1 << 17]).map(drop);
        for piece in [1, 777, 40_000] {
            let (decoded, result) = arrive(spec, stored, piece);
            assert_eq!(decoded, early, "{what}, pieces of {piece}");
            assert_eq!(result.map(drop), whole, "{what}, pieces of {piece}");
        }
        whole
    }

    #[test]
    fn what_is_wrong_is_refused_as_it_is_when_whole() {
        let _alone = all_turns();
        let data = data(100_000);
        let stored = zstd::bulk::compress(&data, 3).unwrap();
        let good = spec(&stored, &data);
        for at in (0..stored.len()).step_by(997) {
            let mut changed = stored.clone();
            changed[at] ^= 0x40;
            same(&good, &changed, false, &format!("byte {at}")).unwrap_err();
        }
        for len in [good.len - 1, good.len + 1] {
            same(&ChunkSpec { len, ..good }, &stored, false, "another size").unwrap_err();
        }
        let cut = &stored[..stored.len() - 1];
        let short = ChunkSpec { stored_len: good.stored_len - 1, ..good };
        same(&short, cut, false, "cut").unwrap_err();
        let trailing = [&stored[..], b"more"].concat();
        same(&spec(&trailing, &data), &trailing, false, "more behind it").unwrap_err();
        // Of a window that fits, so that it is the bytes that are too many.
        let bomb = framed(&vec![9; 64 << 20], 12);
        same(&ChunkSpec { len: 100_000, ..spec(&bomb, &data) }, &bomb, false, "a bomb").unwrap_err();
    }

    #[test]
    fn odd_frames_are_taken_as_they_are_when_whole() {
        let _alone = all_turns();
        let data = data(100_000);
        let (first, second) = data.split_at(33_333);
        let two =
            [zstd::bulk::compress(first, 3).unwrap(), zstd::bulk::compress(second, 3).unwrap()].concat();
        same(&spec(&two, &data), &two, true, "two frames").unwrap();
        // What it looks back over has left the decoder's window several times.
        let small = framed(&data, 10);
        same(&spec(&small, &data), &small, true, "a small window").unwrap();
        let mut changed = small;
        *changed.last_mut().unwrap() ^= 1;
        same(&spec(&changed, &data), &changed, false, "a wrong checksum").unwrap_err();
    }

    #[test]
    fn a_window_larger_than_the_chunk_waits_for_the_whole() {
        let _alone = all_turns();
        let data = data(100_000);
        let stored = framed(&data, 27);
        same(&spec(&stored, &data), &stored, false, "a large window").unwrap();
    }

    #[test]
    fn only_so_many_are_decoded_on_their_way() {
        let _alone = all_turns();
        let data = data(100_000);
        let stored = zstd::bulk::compress(&data, 3).unwrap();
        let spec = spec(&stored, &data);
        let busy: Vec<_> = std::iter::from_fn(|| Early::new(&spec)).take(10_000).collect();
        assert!(busy.len() <= std::thread::available_parallelism().unwrap().get());
        let (early, result) = arrive(&spec, &stored, 10_000);
        assert!(!early && result.unwrap().bytes() == data);
        drop(busy);
        assert!(arrive(&spec, &stored, 10_000).0);
        let long = ChunkSpec { len: EARLY_LEN + 1, ..spec };
        assert!(Early::new(&long).is_none());
    }
}
