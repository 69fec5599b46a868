//! A range of chunks from a source that cuts, shifts, stretches and breaks the bytes.

use std::ops::Range;

use arbitrary::{Result, Unstructured};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use skimmer_fetcher::chunk::{self, ChunkError, ChunkSpec, Codec, FetchError};
use skimmer_fetcher::source::Urgency;
use skimmer_fetcher::{BlobRef, Body, Digest, ErrorClass, Source, SourceError};

use crate::chunk::{coding, with_hex};

/// A source that hands out what it was told to, piece by piece.
struct Scripted {
    pieces: Vec<std::result::Result<Bytes, ErrorClass>>,
}

#[async_trait::async_trait]
impl Source for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }

    async fn read(
        &self,
        blob: &BlobRef,
        range: Range<u64>,
        _: Urgency,
    ) -> std::result::Result<Body, SourceError> {
        let fail = |class| SourceError::new(class, "scripted", "as told");
        let pieces: Vec<_> = self.pieces.iter().map(|piece| piece.clone().map_err(fail)).collect();
        Ok(Body::new("scripted", blob, range, None, stream::iter(pieces).boxed()))
    }

    async fn has(&self, _: &BlobRef) -> std::result::Result<bool, SourceError> {
        Ok(true)
    }
}

/// Fetches chunks that the bytes describe from a source that the bytes script.
pub fn run(data: &[u8]) {
    // Not enough bytes for a plan: nothing to do.
    let _ = fetch(Unstructured::new(data));
}

fn fetch(mut u: Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(0..=6u8)?;
    let mut specs = Vec::new();
    let mut end = u64::from(u.arbitrary::<u8>()?);
    for _ in 0..count {
        let (codec, digest) = coding(&mut u)?;
        let stored_len = u32::from(u.arbitrary::<u16>()?) % 2048;
        let len = if codec == Codec::None { stored_len } else { u.arbitrary::<u16>()?.into() };
        // Mostly in order with a hole now and then; odd plans must be refused.
        let stored_offset = match u.arbitrary::<u8>()? {
            0 => u.arbitrary()?,
            hole @ 1..32 => end.saturating_add(hole.into()),
            _ => end,
        };
        end = stored_offset.saturating_add(stored_len.into());
        specs.push(ChunkSpec { stored_offset, stored_len, len, codec, digest });
    }
    let mut pieces = Vec::new();
    for _ in 0..u.int_in_range(0..=12u8)? {
        let size = match u.arbitrary::<u8>()? {
            0 => {
                pieces.push(Err(ErrorClass::Transient));
                continue;
            }
            size @ 1..128 => usize::from(size),
            size => usize::from(size - 127) * 16,
        };
        pieces.push(Ok(Bytes::copy_from_slice(u.bytes(size.min(u.len()))?)));
    }
    // The rest comes as one piece, cut to what the range still lacks when the first byte says so.
    let exact = u.arbitrary::<bool>()?;
    let mut rest = u.take_rest();
    let sent: usize = pieces.iter().flatten().map(Bytes::len).sum();
    if let (true, Some(first)) = (exact, specs.first()) {
        let whole = usize::try_from(end.saturating_sub(first.stored_offset)).unwrap_or(usize::MAX);
        rest = &rest[..rest.len().min(whole.saturating_sub(sent))];
    }
    pieces.push(Ok(Bytes::copy_from_slice(rest)));

    let blob = BlobRef { digest: Digest::of(b"blob"), size: u64::MAX };
    let source = Scripted { pieces };
    // Digests are found out one by one: each refusal names the one that the bytes have.
    for _ in 0..=specs.len() {
        match attempt(&source, &blob, &specs) {
            Err(FetchError::Chunk { place, error: ChunkError::Digest { got, .. } }) => {
                let spec = &mut specs[place.index];
                spec.digest = with_hex(spec.digest, &got);
            }
            _ => return Ok(()),
        }
    }
    panic!("a chunk was refused again after its digest was right");
}

fn attempt(source: &Scripted, blob: &BlobRef, specs: &[ChunkSpec]) -> std::result::Result<(), FetchError> {
    let room = |spec: &ChunkSpec| vec![0x5a; usize::try_from(spec.len.next_multiple_of(4096)).unwrap_or(0)];
    let plan = specs.iter().map(|spec| (*spec, room(spec))).collect();
    let mut seen = vec![false; specs.len()];
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    let result = runtime.block_on(chunk::fetch(source, blob, plan, |index, verified| {
        assert!(!std::mem::replace(&mut seen[index], true), "chunk {index} handed over twice");
        let len = u32::try_from(verified.len()).expect("chunks are small here");
        assert_eq!(len, specs[index].len);
        let (stored_offset, stored_len, codec) = (0, len, Codec::None);
        let again = ChunkSpec { stored_offset, stored_len, codec, ..specs[index] };
        chunk::verify(&again, verified.bytes(), vec![0; verified.padded().len()])
            .expect("what is handed over has the chunk's digest");
        assert!(verified.padded()[verified.len()..].iter().all(|byte| *byte == 0));
    }));
    match &result {
        Ok(()) => assert!(seen.iter().all(|seen| *seen), "success without chunk {:?}", seen),
        Err(FetchError::Plan(_)) => assert!(seen.iter().all(|seen| !*seen), "chunks of a refused plan"),
        Err(FetchError::Chunk { place, .. }) => assert!(!seen[place.index], "a refused chunk handed over"),
        Err(FetchError::Source(_)) => {}
    }
    result
}
