//! What it costs to decode and check a chunk: the part of a miss that keeps a processor busy, and how much of it is
//! left when the chunk's last byte has come.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;
use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures_util::{StreamExt as _, stream};
use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec, fetch_from, verify};
use skimmer_fetcher::source::Urgency;
use skimmer_fetcher::{BlobRef, Body, Digest};

/// Bytes of a chunk: a small file's, and a whole one of the default size.
const SIZES: [u32; 2] = [16_384, 1 << 20];

/// Bytes that compress about as programs and text do: words out of a small stock in no simple order.
fn data(len: u32) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let mut out = Vec::new();
    while u32::try_from(out.len()).is_ok_and(|have| have < len) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        out.extend_from_slice(format!("{:04x} ", state % 4093 * (state % 7 + 1)).as_bytes());
    }
    out.truncate(usize::try_from(len).expect("a chunk fits in memory"));
    out
}

fn encode(codec: Codec, data: &[u8]) -> Vec<u8> {
    match codec {
        Codec::None => data.to_vec(),
        Codec::Lz4Block => lz4_flex::block::compress(data),
        Codec::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(data).and_then(|()| encoder.finish()).expect("writes to memory do not fail")
        }
        Codec::Zstd => zstd::bulk::compress(data, 3).expect("the data compresses"),
    }
}

fn chunks(c: &mut Criterion) {
    let mut group = c.benchmark_group("verify");
    for len in SIZES {
        let data = data(len);
        let sha256 = ChunkDigest::Sha256(*Digest::of(&data).as_bytes());
        let blake3 = ChunkDigest::Blake3(*blake3::hash(&data).as_bytes());
        let cases = [
            ("raw sha256", Codec::None, sha256),
            ("raw blake3", Codec::None, blake3),
            ("zstd sha256", Codec::Zstd, sha256),
            ("zstd blake3", Codec::Zstd, blake3),
            ("lz4 sha256", Codec::Lz4Block, sha256),
            ("gzip sha256", Codec::Gzip, sha256),
        ];
        for (name, codec, digest) in cases {
            let stored = encode(codec, &data);
            let stored_len = u32::try_from(stored.len()).expect("a chunk is small");
            let spec = ChunkSpec { stored_offset: 0, stored_len, len, codec, digest };
            let mut buffer = vec![0; data.len()];
            let verified = verify(&spec, &stored, &mut buffer[..]).expect("the chunk is good");
            assert!(verified.bytes() == data);
            let mut broken = stored.clone();
            broken[stored.len() / 2] ^= 1;
            assert!(verify(&spec, &broken, &mut buffer[..]).is_err(), "{name}: a broken chunk passes");
            group.throughput(Throughput::Bytes(len.into()));
            group.bench_function(BenchmarkId::new(name, len), |b| {
                b.iter(|| verify(&spec, black_box(&stored), &mut buffer[..]).is_ok());
            });
        }
    }
    group.finish();
}

/// A chunk of the default size that comes in so many pieces: from the last one to the verified chunk.
fn last_piece(c: &mut Criterion) {
    let len = SIZES[1];
    let data = data(len);
    let stored = Bytes::from(encode(Codec::Zstd, &data));
    let stored_len = u32::try_from(stored.len()).expect("a chunk is small");
    let digest = ChunkDigest::Sha256(*Digest::of(&data).as_bytes());
    let spec = ChunkSpec { stored_offset: 0, stored_len, len, codec: Codec::Zstd, digest };
    let blob = BlobRef { digest: Digest::of(&stored), size: stored_len.into() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    let mut group = c.benchmark_group("after the last piece");
    group.throughput(Throughput::Bytes(len.into()));
    for pieces in [1, 16] {
        let size = stored.len().div_ceil(pieces);
        let once = || {
            let came = Arc::new(Mutex::new(Instant::now()));
            let arriving = (0..stored.len()).step_by(size).map({
                let (stored, came) = (stored.clone(), Arc::clone(&came));
                move |at| {
                    *came.lock().expect("nothing panics") = Instant::now();
                    Ok(stored.slice(at..stored.len().min(at + size)))
                }
            });
            let arriving = stream::iter(arriving).boxed();
            let body = Body::new("memory", &blob, 0..stored_len.into(), None, arriving);
            let mut verified = 0;
            // Memory that has been used, as the daemon's is.
            let plan = vec![(spec, vec![0x55; data.len()])];
            let fetched =
                fetch_from("memory", &blob, (body, Urgency::Demand), plan, |_, _| verified += 1, drop);
            let result = runtime.block_on(fetched);
            assert!(result.is_ok() && verified == 1, "{result:?}");
            came.lock().expect("nothing panics").elapsed()
        };
        group.bench_function(BenchmarkId::new("pieces", pieces), |b| {
            b.iter_custom(|times| (0..times).map(|_| once()).sum::<Duration>());
        });
    }
    group.finish();
}

criterion_group!(benches, chunks, last_piece);
criterion_main!(benches);
