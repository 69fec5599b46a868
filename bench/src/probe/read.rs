//! Reads of a file block by block, each timed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::content;

/// What to read.
#[derive(Clone, Debug, clap::Args)]
pub struct ReadOptions {
    /// The file
    pub file: PathBuf,
    /// Bytes of one read
    #[arg(long, default_value_t = 4096)]
    pub block: usize,
    /// Number of reads; without it the whole file once
    #[arg(long)]
    pub count: Option<u64>,
    /// Read at random places that are this many bytes apart at least, each place once
    #[arg(long)]
    pub random: Option<u64>,
    /// Seed of the random order
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Check every block against the content of this seed; only with 4096-byte blocks
    #[arg(long)]
    pub content: Option<u64>,
}

/// What reading took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Read {
    /// Bytes read.
    pub bytes: u64,
    /// Seconds from the first read to the end of the last.
    pub seconds: f64,
    /// Reads.
    pub operations: u64,
    /// Seconds of single reads.
    pub latency: Latency,
}

/// Percentiles of latencies, in seconds, by the nearest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 90 of 100 are not above it.
    pub p90: f64,
    /// 99 of 100 are not above it.
    pub p99: f64,
    /// 999 of 1,000 are not above it.
    pub p999: f64,
    /// The largest.
    pub max: f64,
}

impl Latency {
    /// Percentiles of `values`.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = |per_mille: usize| {
            let rank = (values.len() * per_mille).div_ceil(1000);
            values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Latency { p50: rank(500), p90: rank(900), p99: rank(990), p999: rank(999), max: rank(1000) }
    }
}

/// Reads as told.
///
/// # Errors
/// A read fails or is short, or a block is not what it must be: the message gives its offset.
pub fn read(options: &ReadOptions) -> Result<Read> {
    let path = options.file.as_path();
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    let length = file.metadata()?.len();
    let block = u64::try_from(options.block)?;
    ensure!(block > 0, "a block needs a byte at least");
    ensure!(
        options.content.is_none() || options.block == content::BLOCK,
        "--content needs {}-byte blocks",
        content::BLOCK
    );
    let offsets = offsets(length, block, options);
    ensure!(!offsets.is_empty(), "{}: {length} bytes are too few for one read", path.display());
    let mut latencies = Vec::with_capacity(offsets.len());
    let mut buffer = vec![0; options.block];
    let mut expected = [0; content::BLOCK];
    let (mut bytes, mut checking) = (0, 0.0);
    let start = Instant::now();
    for offset in &offsets {
        let before = Instant::now();
        let got = read_block(&file, path, &mut buffer, *offset, length)?;
        latencies.push(before.elapsed().as_secs_f64());
        bytes += u64::try_from(got)?;
        if let Some(seed) = options.content {
            let before = Instant::now();
            content::fill(seed, offset / block, &mut expected);
            if let Some(at) = buffer[..got].iter().zip(&expected).position(|(a, b)| a != b) {
                anyhow::bail!("{}: wrong byte at offset {}", path.display(), offset + u64::try_from(at)?);
            }
            checking += before.elapsed().as_secs_f64();
        }
    }
    let seconds = start.elapsed().as_secs_f64() - checking;
    let operations = u64::try_from(latencies.len())?;
    Ok(Read { bytes, seconds, operations, latency: Latency::of(latencies) })
}

fn read_block(file: &File, path: &Path, buffer: &mut [u8], offset: u64, length: u64) -> Result<usize> {
    let want = usize::try_from(length - offset).unwrap_or(usize::MAX).min(buffer.len());
    file.read_exact_at(&mut buffer[..want], offset)
        .with_context(|| format!("{}: read of {want} bytes at offset {offset}", path.display()))?;
    Ok(want)
}

/// Where to read, in order.
fn offsets(length: u64, block: u64, options: &ReadOptions) -> Vec<u64> {
    let limit = options.count.unwrap_or(u64::MAX);
    let Some(apart) = options.random else {
        let blocks = length.div_ceil(block).min(limit);
        return (0..blocks).map(|index| index * block).collect();
    };
    let places = length / apart.max(block);
    let mut order: Vec<u64> = (0..places).collect();
    let mut state = options.seed;
    let mut random = |below: u64| {
        // Linear congruential generator (Knuth, MMIX): the upper bits are random enough for an order.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for index in (1..order.len()).rev() {
        let other = random(u64::try_from(index).unwrap_or(0) + 1);
        order.swap(index, usize::try_from(other).unwrap_or(0));
    }
    order.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    // Somewhere inside the place, on a block boundary.
    let inside = (apart.max(block) / block).max(1);
    order.into_iter().map(|place| place * apart.max(block) + random(inside) * block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(file: &Path) -> ReadOptions {
        ReadOptions { file: file.into(), block: 4096, count: None, random: None, seed: 1, content: Some(5) }
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let latency = Latency::of((1_u32..=1000).rev().map(f64::from).collect());
        assert_eq!(latency, Latency { p50: 500.0, p90: 900.0, p99: 990.0, p999: 999.0, max: 1000.0 });
        assert_eq!(Latency::of(vec![3.0]).p50, 3.0);
    }

    #[test]
    fn a_wrong_byte_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut bytes = Vec::new();
        content::write(5, 16, &mut bytes).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&options(&path)).unwrap().bytes, 65536);
        let random = ReadOptions { random: Some(8192), ..options(&path) };
        let found = read(&random).unwrap();
        assert_eq!((found.operations, found.bytes), (8, 32768));
        bytes[40_000] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = read(&options(&path)).unwrap_err().to_string();
        assert!(error.contains("offset 40000"), "{error}");
    }
}
