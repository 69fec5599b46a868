//! Single blocks, each in a chunk that nobody has read, against one ranged request and one direct write of a chunk.

use anyhow::{Context, Result};
use erofs_format::{BlobId, Image};

use super::contender::{Before, Fresh, Ours, rounds};
use super::world::{FILE, Far, Published, World};
use crate::contender::LONG;
use crate::data::SEED;
use crate::probe::{Latency, Read};
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::Scenario;

pub(super) fn run(
    bench: &mut Bench,
    scenario: &Scenario,
    world: &World,
    far: &Far,
    reads: u64,
) -> Result<()> {
    let image = world.images.first().context("nothing was published")?;
    let place =
        Place { scenario: scenario.name.clone(), machine: world.name.clone(), case: far.case.clone() };
    rounds(
        bench,
        scenario,
        world,
        &place,
        |_| None,
        |bench, contender, at| match contender {
            Some(contender) => ours(bench, world, far, image, &contender, at, reads),
            None => raw(bench, world, far, image, at, (reads, at.1 == super::PARTS)),
        },
    )
}

fn report(bench: &mut Bench, (place, name, round): (&Place, &str, u32), latency: &Latency) -> Result<()> {
    let values = [
        ("latency p50", latency.p50),
        ("latency p90", latency.p90),
        ("latency p99", latency.p99),
        ("latency p99.9", latency.p999),
    ];
    for (metric, seconds) in values {
        bench.sample(place, name, round, metric, (seconds, Unit::Seconds, Better::Lower))?;
    }
    Ok(())
}

fn ours(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    image: &Published,
    contender: &Ours,
    at: (&Place, &str, u32),
    reads: u64,
) -> Result<()> {
    let mut fresh = Fresh::new(world, contender)?;
    let (point, _) = fresh.mount(far, image)?;
    let used = fresh.usage()?;
    let before = Before::now(far)?;
    let (probe, file) = (format!("{}/skimmer-probe", world.programs), format!("{point}/{FILE}"));
    let (count, apart) = (reads.to_string(), (1 << 20).to_string());
    let (seed, content) = (at.2.to_string(), SEED.to_string());
    let argv = [
        probe.as_str(),
        "read",
        &file,
        "--random",
        &apart,
        "--count",
        &count,
        "--seed",
        &seed,
        "--content",
        &content,
    ];
    let answer = world.machine.check(&argv, LONG).with_context(|| fresh.log())?;
    let read: Read = serde_json::from_slice(&answer)?;
    report(bench, at, &read.latency)?;
    let moved = before.moved(bench, far, at, Some(read.bytes))?;
    fresh.cost(bench, at, &used, moved)
}

/// What a miss cannot do without: the stored chunk by one ranged request over a connection that stays, and a direct
/// write of the chunk's size; with `verified` decompressed and hashed between the two.
fn raw(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    image: &Published,
    at: (&Place, &str, u32),
    (reads, verified): (u64, bool),
) -> Result<()> {
    let bootstrap = image.bootstrap()?;
    let parsed = Image::parse(&bootstrap)?;
    let chunks = parsed.chunk_map(0)?;
    let (digest, _) = image.blobs.first().context("no blob")?;
    // The same step between any two, and none twice: the random reads are as far apart on average.
    let count = chunks.len();
    let step = [7, 5, 3].into_iter().find(|step| !count.is_multiple_of(*step)).unwrap_or(1);
    let mut ranges = String::new();
    for index in 0..usize::try_from(reads)?.min(count) {
        let chunk = &chunks[index * step % count];
        let (offset, stored, size) =
            (chunk.compressed_offset, chunk.compressed_size, chunk.uncompressed_size);
        // A digest is written as a blob's is.
        let digest = if verified { format!(" {}", BlobId(chunk.digest)) } else { String::new() };
        ranges.push_str(&format!("{offset} {stored} {size}{digest}\n"));
    }
    let directory = world.fresh();
    world.machine.put(&format!("{directory}/ranges"), 0o644, ranges.as_bytes())?;
    let before = Before::now(far)?;
    let probe = format!("{}/skimmer-probe", world.programs);
    let (url, list) = (far.url(&image.name, digest), format!("{directory}/ranges"));
    let into = format!("{directory}/file");
    let answer = world.machine.check(&[&probe, "fetch", &url, &list, &into], LONG)?;
    let latency: Latency = serde_json::from_slice(&answer)?;
    report(bench, at, &latency)?;
    before.moved(bench, far, at, Some(reads * 4096))?;
    world.machine.check(&["rm", "-r", &directory], crate::contender::SHORT).map(drop)
}
