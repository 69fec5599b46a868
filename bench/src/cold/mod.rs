//! Cold scenarios: first reads of images behind an emulated link.

mod contender;
mod everything;
mod misses;
mod slots;
mod start;
mod world;

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::link::Shape;
use crate::run::Bench;
use crate::scenario::Scenario;

/// The contender that does what no other can do without, and nothing else.
const PARTS: &str = "parts";

/// The scenario's table `[cold]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What is measured.
    pub measure: Measure,
    /// Links to the registry, one after the other.
    pub links: Vec<LinkSpec>,
    /// Links of quick runs instead.
    pub quick_links: Option<Vec<LinkSpec>>,
    /// Images of Debian packages, by name; `misses` makes its own.
    #[serde(default)]
    pub images: Vec<String>,
    /// Images in guests instead, which are slow.
    pub guest_images: Option<Vec<String>>,
    /// Images of quick runs instead.
    pub quick_images: Option<Vec<String>>,
    /// Chunks of 1 MiB in the file of `misses`.
    #[serde(default = "default_chunks")]
    pub chunks: u64,
    /// Reads of a round of `misses`.
    #[serde(default = "default_reads")]
    pub reads: u64,
}

fn default_chunks() -> u64 {
    512
}

fn default_reads() -> u64 {
    100
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// From asking for the image to the first right output of its program.
    Start,
    /// Reading every file of an image.
    Everything,
    /// Single blocks, each in a chunk that nobody has read.
    Misses,
}

/// A link to the registry.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpec {
    /// Mbit/s.
    pub mbit: u64,
    /// Round trip, milliseconds.
    pub rtt_ms: u64,
    /// Packets lost of 1,000.
    #[serde(default)]
    pub loss_per_mille: u32,
    /// Only these images, where all would take too long.
    pub images: Option<Vec<String>>,
}

impl LinkSpec {
    fn shape(&self) -> Shape {
        Shape {
            bits_per_second: self.mbit * 1_000_000,
            delay: Duration::from_micros(self.rtt_ms * 500),
            loss_per_mille: self.loss_per_mille,
        }
    }
}

/// Debian packages of the contenders on this machine.
pub const PACKAGES: &[&str] = &["curl", "docker-registry", "iproute2", "skopeo", "umoci"];

/// Runs all contenders of a scenario on one machine.
///
/// # Errors
/// The scenario cannot be set up, or the run was interrupted.
pub fn run(bench: &mut Bench, scenario: &Scenario, spec: &Spec, machine: &str) -> Result<()> {
    ensure!(
        scenario.custom.is_empty() || spec.measure == Measure::Start,
        "only cold scenarios that measure starts take [[custom]] contenders"
    );
    ensure!(
        spec.measure == Measure::Everything || !scenario.names().any(contender::whole),
        "only cold scenarios that measure everything take contenders that prefetch or have more slots"
    );
    let links = match &spec.quick_links {
        Some(links) if bench.quick() => links,
        _ => &spec.links,
    };
    let images = match (&spec.quick_images, &spec.guest_images) {
        (Some(images), _) if bench.quick() => images,
        (_, Some(images)) if machine != "host" => images,
        _ => &spec.images,
    };
    ensure!(!links.is_empty(), "`links` is empty");
    skimmer_vm_images::apt::ensure(PACKAGES)?;
    ensure!(spec.reads <= spec.chunks, "`reads` above `chunks` would read chunks twice");
    let mut world = world::World::new(bench, machine)?;
    match spec.measure {
        Measure::Misses => world.publish_file(bench, spec.chunks)?,
        Measure::Start | Measure::Everything => {
            ensure!(!images.is_empty(), "`images` is empty");
            for image in images {
                let wanted = |form: &str| scenario.names().any(|name| name.ends_with(form));
                let traced = machine == "host" && wanted("-traced");
                world.publish(bench, image, traced, wanted("-slots") || wanted("-slots-prefetch"))?;
            }
        }
    }
    for link in links {
        bench.check()?;
        let far = world.connect(link)?;
        match spec.measure {
            Measure::Start => start::run(bench, scenario, &world, &far)?,
            Measure::Everything => everything::run(bench, scenario, &world, &far)?,
            Measure::Misses => misses::run(bench, scenario, &world, &far, spec.reads)?,
        }
    }
    Ok(())
}
