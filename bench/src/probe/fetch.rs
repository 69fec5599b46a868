//! Ranged requests over one connection, each followed by one direct write: what a miss cannot do without.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::Latency;

/// What O_DIRECT asks of buffers and sizes.
const ALIGN: usize = 4096;

/// Fetches the ranges that the file `ranges` lists (`offset length size`, one a line) from `url`, and writes `size`
/// bytes for each at the next place of `into`; gives the latencies of fetch and write together. Where a line has the
/// SHA-256 of a chunk, too (64 hex digits), the range is decompressed (zstd) and compared with it before the write.
///
/// # Errors
/// The server answers with anything but the range, a chunk cannot be decompressed, or a write fails.
pub fn fetch(url: &str, ranges: &Path, into: &Path) -> Result<Latency> {
    let text = fs::read_to_string(ranges).with_context(|| format!("{}", ranges.display()))?;
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    let file = File::options().create(true).truncate(true).write(true).custom_flags(direct).open(into);
    let file = file.with_context(|| format!("{}", into.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Nothing here speaks TLS, but the client wants to know with what it would.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().tls_certs_only([]).build()?;
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let (mut latencies, mut place) = (Vec::new(), 0);
    let mut room = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let mut number = || -> Result<u64> {
            words.next().context("less than three numbers")?.parse().context("not a number")
        };
        let mut numbers = || -> Result<_> { Ok((number()?, number()?, number()?)) };
        let (offset, length, bytes) = numbers().with_context(|| format!("line {line}"))?;
        let (digest, bytes) = (words.next(), usize::try_from(bytes)?);
        let size = bytes.next_multiple_of(ALIGN);
        // Alignment without unsafe: a place in the middle that begins where it must.
        room.resize(size + ALIGN, 0_u8);
        let skip = room.as_ptr().align_offset(ALIGN);
        let start = Instant::now();
        let range = format!("bytes={offset}-{}", offset + length - 1);
        let body = runtime.block_on(async {
            let answer = client.get(url).header("Range", range).send().await?;
            ensure!(answer.status() == 206, "{url}: {}", answer.status());
            Ok(answer.bytes().await?)
        })?;
        ensure!(u64::try_from(body.len())? == length, "{url}: {} bytes instead of {length}", body.len());
        let room = &mut room[skip..skip + size];
        if let Some(digest) = digest {
            // Stored as it is when compression does not pay.
            if body.len() == bytes {
                room[..bytes].copy_from_slice(&body);
            } else {
                decompressor.decompress_to_buffer(&body, &mut room[..bytes])?;
            }
            let got = hex::encode(Sha256::digest(&room[..bytes]));
            ensure!(got == digest, "the chunk at {offset} has the digest {got}");
        }
        file.write_all_at(room, place)?;
        latencies.push(start.elapsed().as_secs_f64());
        place += u64::try_from(size)?;
    }
    ensure!(!latencies.is_empty(), "no ranges");
    Ok(Latency::of(latencies))
}
