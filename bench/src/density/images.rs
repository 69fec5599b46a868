//! Many small images that share their lowest layer, and one large one, in a registry.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use kernel_tests::fixture::{self, Compression, Layer, Layout, Meta};
use kernel_tests::registry::Registry;
use skimmer_vm_images::run;

use crate::contender::text;
use crate::content;
use crate::run::Bench;

/// The file that every image has of its own.
pub(super) const FILE: &str = "own.bin";
/// Seed of its content.
pub(super) const LARGE_SEED: u64 = 1;
/// Blocks of a small image's own file: more than a first miss fetches, so that the image stays incomplete.
const BLOCKS: u64 = 1024;

/// Images in a registry.
pub(super) struct Images {
    references: Vec<String>,
    large: String,
}

impl Images {
    /// Makes, converts and pushes `count` images, and the large one of so many chunks.
    pub(super) fn make(
        bench: &Bench,
        registry: &Registry,
        scratch: &Path,
        count: u32,
        chunks: u64,
    ) -> Result<Self> {
        let mut base = Layer::default();
        base.file(b"base.bin", &Meta::new(0o644), &fixture::content(3, 1 << 20))?;
        let base = base.finish()?;
        let source = scratch.join("source");
        let mut layout = Layout::create(&source)?;
        for index in 0..count {
            let own = own(BLOCKS, Self::seed(index))?;
            layout.image(&index.to_string(), &[(&base, Compression::None), (&own, Compression::None)])?;
        }
        let large = own(chunks * 256, LARGE_SEED)?;
        layout.image("large", &[(&large, Compression::None)])?;
        let mut references = Vec::new();
        let tags = (0..count).map(|index| index.to_string()).chain(["large".to_owned()]);
        for tag in tags {
            bench.check()?;
            let converted = scratch.join("converted");
            let reference = registry.reference(&format!("density/{tag}:v1"));
            let original = format!("oci:{}:{tag}", text(&source)?);
            run(Command::new(bench.program("skimmer"))
                .args(["convert", "--quiet", &original])
                .arg(&converted))?;
            run(Command::new(bench.program("skimmer"))
                .args(["push", "--quiet"])
                .arg(&converted)
                .arg(&reference))?;
            std::fs::remove_dir_all(&converted)?;
            references.push(format!("docker://{reference}"));
        }
        std::fs::remove_dir_all(&source)?;
        let large = references.pop().unwrap_or_default();
        Ok(Images { references, large })
    }

    /// Seed of the content of image `index`.
    pub(super) fn seed(index: u32) -> u64 {
        1000 + u64::from(index)
    }

    /// The name of image `index`.
    pub(super) fn reference(&self, index: u32) -> String {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.references.get(index).cloned().unwrap_or_default()
    }

    /// The name of the large image.
    pub(super) fn large(&self) -> String {
        self.large.clone()
    }
}

/// A layer with one file of `blocks` blocks.
fn own(blocks: u64, seed: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    content::write(seed, blocks, &mut bytes)?;
    let mut layer = Layer::default();
    layer.file(FILE.as_bytes(), &Meta::new(0o644), &bytes)?;
    layer.finish()
}
