use super::*;

fn spec(codec: Codec, stored: &[u8], data: &[u8]) -> ChunkSpec {
    ChunkSpec {
        stored_offset: 0,
        stored_len: u32::try_from(stored.len()).unwrap(),
        len: u32::try_from(data.len()).unwrap(),
        codec,
        digest: ChunkDigest::Sha256(*crate::Digest::of(data).as_bytes()),
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn encode(codec: Codec, data: &[u8]) -> Vec<u8> {
    match codec {
        Codec::None => data.to_vec(),
        Codec::Lz4Block => lz4_flex::block::compress(data),
        Codec::Gzip => gzip(data),
        Codec::Zstd => zstd::bulk::compress(data, 3).unwrap(),
    }
}

const CODECS: [Codec; 4] = [Codec::None, Codec::Lz4Block, Codec::Gzip, Codec::Zstd];

#[test]
fn every_codec_decodes_and_pads() {
    let data: Vec<u8> = (0..5000u32).map(|i| u8::try_from(i % 13).unwrap()).collect();
    for codec in CODECS {
        let stored = encode(codec, &data);
        let verified = verify(&spec(codec, &stored, &data), &stored, vec![0xAA; 8192]).unwrap();
        assert_eq!(verified.bytes(), data, "{codec:?}");
        assert_eq!(verified.padded().len(), 8192);
        assert!(verified.padded()[5000..].iter().all(|&byte| byte == 0));
        let mut blake = spec(codec, &stored, &data);
        blake.digest = ChunkDigest::Blake3(*blake3::hash(&data).as_bytes());
        assert!(verify(&blake, &stored, vec![0; 5000]).is_ok());
    }
}

#[test]
fn a_chunk_that_decodes_to_another_size_is_refused() {
    let data = vec![1; 5000];
    for codec in [Codec::Lz4Block, Codec::Gzip, Codec::Zstd] {
        let stored = encode(codec, &data);
        for len in [4999, 5001] {
            let mut wrong = spec(codec, &stored, &data);
            wrong.len = len;
            let error = verify(&wrong, &stored, vec![0; 8192]).unwrap_err();
            assert!(
                matches!(error, ChunkError::Size { .. } | ChunkError::Decode { .. }),
                "{codec:?} {len}: {error}"
            );
        }
    }
}

#[test]
fn a_bomb_writes_no_byte_past_the_chunk() {
    let bomb = vec![9; 1 << 20];
    for codec in [Codec::Lz4Block, Codec::Gzip, Codec::Zstd] {
        let stored = encode(codec, &bomb);
        let spec = ChunkSpec { len: 4096, ..spec(codec, &stored, &bomb) };
        let mut buffer = vec![0x55; 8192];
        assert!(verify(&spec, &stored, &mut buffer[..]).is_err(), "{codec:?}");
        assert!(buffer[4096..].iter().all(|&byte| byte == 0x55), "{codec:?}");
    }
}

#[test]
fn changed_and_cut_bytes_are_refused() {
    let data: Vec<u8> = (0..5000u32).map(|i| u8::try_from(i * i % 251).unwrap()).collect();
    for codec in CODECS {
        let stored = encode(codec, &data);
        let spec = spec(codec, &stored, &data);
        for at in (0..stored.len()).step_by(97) {
            let mut changed = stored.clone();
            changed[at] ^= 0x40;
            if let Ok(verified) = verify(&spec, &changed, vec![0; 5000]) {
                // A header byte that carries no content (a time stamp, say) may change.
                assert_eq!(verified.bytes(), data);
            }
        }
        let cut = &stored[..stored.len() - 1];
        assert!(matches!(
            verify(&spec, cut, vec![0; 5000]),
            Err(ChunkError::Decode { .. } | ChunkError::Size { .. })
        ));
        let cut_spec = ChunkSpec { stored_len: spec.stored_len - 1, ..spec };
        assert!(verify(&cut_spec, cut, vec![0; 5000]).is_err(), "{codec:?}");
    }
}

#[test]
fn impossible_specs_and_small_buffers_are_refused() {
    let data = [3; 100];
    let good = spec(Codec::None, &data, &data);
    assert!(matches!(verify(&good, &data, vec![0; 99]), Err(ChunkError::Buffer { buffer: 99, len: 100 })));
    for bad in [
        ChunkSpec { len: 0, stored_len: 0, ..good },
        ChunkSpec { len: 99, ..good },
        ChunkSpec { codec: Codec::Zstd, stored_len: 1 << 20, ..good },
        ChunkSpec { stored_offset: u64::MAX - 10, ..good },
    ] {
        assert!(matches!(bad.check(), Err(ChunkError::Spec(_))), "{bad:?}");
    }
}
