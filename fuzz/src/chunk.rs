//! One chunk's stored bytes, as a hostile source may send them.

use arbitrary::{Result, Unstructured};
use skimmer_fetcher::chunk::{ChunkDigest, ChunkError, ChunkSpec, Codec, verify};

/// Largest chunk tried, in bytes.
const LARGEST: u32 = 1 << 16;
/// What lies in the buffer before, to see which bytes are written.
const MARK: u8 = 0x5a;

/// Verifies stored bytes against a spec: nothing is accepted that does not match, nothing written past the chunk.
pub fn run(data: &[u8]) {
    // Not enough bytes for a spec: nothing to do.
    let _ = one(Unstructured::new(data));
}

/// A codec and a digest to be found out.
pub(crate) fn coding(u: &mut Unstructured<'_>) -> Result<(Codec, ChunkDigest)> {
    let codec = *u.choose(&[Codec::None, Codec::Lz4Block, Codec::Gzip, Codec::Zstd])?;
    let digest = if u.arbitrary()? { ChunkDigest::Blake3([0; 32]) } else { ChunkDigest::Sha256([0; 32]) };
    Ok((codec, digest))
}

fn one(mut u: Unstructured<'_>) -> Result<()> {
    let (codec, digest) = coding(&mut u)?;
    let len = u.int_in_range(0..=LARGEST)?;
    let room = u.int_in_range(0..=LARGEST + 4096)?;
    let off = u.int_in_range(0..=15u8)?;
    let stored = u.take_rest();
    let stored_len = u32::try_from(stored.len()).unwrap_or(u32::MAX);
    let spec = ChunkSpec {
        stored_offset: 0,
        // Now and then the map states another length than what has come.
        stored_len: if off == 0 { stored_len.wrapping_add(1) } else { stored_len },
        len,
        codec,
        digest,
    };
    judge(&spec, stored, usize::try_from(room).unwrap_or(0));
    Ok(())
}

/// Verifies `stored` with the wrong digest of `spec`, and then with the one that is found to be right.
fn judge(spec: &ChunkSpec, stored: &[u8], room: usize) {
    let len = usize::try_from(spec.len).unwrap_or(usize::MAX);
    let mut buffer = vec![MARK; room];
    let error = verify(spec, stored, &mut buffer[..]).map(|_| ()).expect_err("no chunk has the digest 0");
    let untouched = buffer.get(len..).unwrap_or(&buffer);
    assert!(untouched.iter().all(|byte| *byte == MARK), "bytes written past the chunk");
    let ChunkError::Digest { got, .. } = error else {
        assert!(!error.to_string().is_empty());
        return;
    };
    let spec = ChunkSpec { digest: with_hex(spec.digest, &got), ..*spec };
    let verified = verify(&spec, stored, vec![MARK; room]).expect("decoding is the same each time");
    assert_eq!((verified.len(), verified.padded().len()), (len, room));
    assert!(verified.padded()[len..].iter().all(|byte| *byte == 0), "padding that is not zero");
    assert_eq!(verified.bytes(), &buffer[..len]);
    if spec.codec == Codec::None {
        assert_eq!(verified.bytes(), stored);
    }
}

/// The digest with the value that an error names.
pub(crate) fn with_hex(kind: ChunkDigest, hex: &str) -> ChunkDigest {
    let digest = skimmer_fetcher::Digest::from_hex(hex).expect("errors show whole digests");
    match kind {
        ChunkDigest::Blake3(_) => ChunkDigest::Blake3(*digest.as_bytes()),
        ChunkDigest::Sha256(_) => ChunkDigest::Sha256(*digest.as_bytes()),
    }
}
