//! Reading every file of an image, against downloading the same compressed bytes.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use erofs_format::{BlobId, Image};
use skimmer_vm_images::run as run_command;

use super::contender::{Before, Fresh, Ours, rounds};
use super::world::{Far, Published, World};
use crate::contender::{LONG, SHORT};
use crate::probe::{Sum, Unpacked};
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::Scenario;

pub(super) fn run(bench: &mut Bench, scenario: &Scenario, world: &World, far: &Far) -> Result<()> {
    for image in world.images.iter().filter(|image| far.wants(image)) {
        let case = format!("{}, {}", image.name, far.case);
        let place = Place { scenario: scenario.name.clone(), machine: world.name.clone(), case };
        rounds(
            bench,
            scenario,
            world,
            &place,
            |_| None,
            |bench, contender, at| {
                let took = match contender {
                    Some(contender) => ours(bench, world, far, image, &contender, at)?,
                    None if at.1 == super::PARTS => parts(world, far, image)?,
                    None => download(far, image)?,
                };
                report(bench, image, at, took)
            },
        )?;
    }
    Ok(())
}

fn report(bench: &mut Bench, image: &Published, at: (&Place, &str, u32), took: Duration) -> Result<()> {
    let bytes: u64 = image.blobs.iter().map(|(_, size)| size).sum();
    let (place, name, round) = at;
    let seconds = took.as_secs_f64();
    bench.sample(place, name, round, "time", (seconds, Unit::Seconds, Better::Lower))?;
    let speed = f64::from(u32::try_from(bytes >> 10)?) * 1024.0 / seconds;
    bench.sample(place, name, round, "bandwidth", (speed, Unit::BytesPerSecond, Better::Higher))
}

fn ours(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    image: &Published,
    contender: &Ours,
    at: (&Place, &str, u32),
) -> Result<Duration> {
    let mut fresh = Fresh::new(world, contender)?;
    let (point, mounted) = fresh.mount(far, image)?;
    let used = fresh.usage()?;
    let before = Before::now(far)?;
    let probe = format!("{}/skimmer-probe", world.programs);
    let start = Instant::now();
    fresh.prefetch(&point).with_context(|| fresh.log())?;
    world.machine.check(&[&probe, "sweep", &point], LONG).with_context(|| fresh.log())?;
    let took = start.elapsed();
    let (place, name, round) = at;
    let read = image.expected.as_ref().map(|expected| expected.bytes);
    let moved = before.moved(bench, far, at, read)?;
    fresh.cost(bench, at, &used, moved)?;
    let value = (mounted.as_secs_f64(), Unit::Seconds, Better::Lower);
    bench.sample(place, name, round, "mount", value)?;
    let found: Sum = serde_json::from_slice(&world.machine.check(&[&probe, "sum", &point], LONG)?)?;
    if let Some(expected) = &image.expected {
        ensure!(
            found.digest == expected.digest,
            "its content is not that of the unpacked image: {} names and {} bytes instead of {} and {}",
            found.names,
            found.bytes,
            expected.names,
            expected.bytes
        );
    }
    Ok(took)
}

/// The same compressed bytes by curl, over one connection.
fn download(far: &Far, image: &Published) -> Result<Duration> {
    let mut curl = Command::new("curl");
    curl.args(["-sSf", "-w", "%{size_download}\n"]);
    for (digest, _) in &image.blobs {
        curl.args(["-o", "/dev/null", &far.url(&image.name, digest)]);
    }
    let start = Instant::now();
    let sizes = run_command(&mut curl)?;
    let took = start.elapsed();
    let sizes = String::from_utf8_lossy(&sizes);
    let got: u64 = sizes.lines().map(|line| line.parse::<u64>().unwrap_or(0)).sum();
    let bytes: u64 = image.blobs.iter().map(|(_, size)| size).sum();
    ensure!(got == bytes, "curl got {got} bytes of {bytes}");
    Ok(took)
}

/// The same bytes over one connection, and every chunk of them decompressed, hashed and written, on all processors.
fn parts(world: &World, far: &Far, image: &Published) -> Result<Duration> {
    let bootstrap = image.bootstrap()?;
    let parsed = Image::parse(&bootstrap)?;
    let (mut plan, mut stored) = (String::new(), 0);
    for (slot, blob) in parsed.blobs().iter().enumerate() {
        let digest = format!("sha256:{}", blob.id);
        let url = far.url(&image.name, &digest);
        let mut chunks = parsed.chunk_map(slot)?;
        chunks.sort_by_key(|chunk| chunk.compressed_offset);
        for chunk in &chunks {
            let (offset, length, size) =
                (chunk.compressed_offset, chunk.compressed_size, chunk.uncompressed_size);
            // A digest is written as a blob's is.
            let digest = BlobId(chunk.digest);
            plan.push_str(&format!("{url} {offset} {length} {size} {digest}\n"));
        }
        // One of which no file is left is not asked for.
        let published = image.blobs.iter().find(|(name, _)| *name == digest && !chunks.is_empty());
        stored += published.map_or(0, |(_, size)| *size);
    }
    let directory = world.fresh();
    let (list, into) = (format!("{directory}/plan"), format!("{directory}/file"));
    world.machine.put(&list, 0o644, plan.as_bytes())?;
    let probe = format!("{}/skimmer-probe", world.programs);
    let start = Instant::now();
    let answer = world.machine.check(&[&probe, "unpack", &list, &into], LONG)?;
    let took = start.elapsed();
    let unpacked: Unpacked = serde_json::from_slice(&answer)?;
    ensure!(unpacked.stored == stored, "{} bytes came of {stored}", unpacked.stored);
    world.machine.check(&["rm", "-r", &directory], SHORT)?;
    Ok(took)
}
