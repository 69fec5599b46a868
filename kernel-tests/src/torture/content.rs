//! What the images hold: each block tells which one of which image it is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use skimmer_vm_images::run;

use crate::skimmer::programs;

/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;

/// A small generator: the same numbers for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// A block of a file of an image.
pub(super) fn block(image: u64, number: u64) -> Vec<u8> {
    let mut random = Random(image.wrapping_mul(0x1_0000_0001).wrapping_add(number));
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes
}

/// Writes the one file of image `number`.
fn write_tree(directory: &Path, number: u64, bytes: u64) -> Result<()> {
    fs::create_dir_all(directory)?;
    let mut file = std::io::BufWriter::new(File::create(directory.join("data"))?);
    for index in 0..bytes / u64::try_from(BLOCK)? {
        std::io::Write::write_all(&mut file, &block(number, index))?;
    }
    std::io::Write::flush(&mut file)?;
    Ok(())
}

/// Makes images, `image-0` and so on in `scratch`, and hands each layout on.
pub(super) fn images(
    scratch: &Path,
    count: u64,
    bytes: u64,
    mut made: impl FnMut(&Path, u64) -> Result<()>,
) -> Result<()> {
    let skimmer = programs()?.swap_remove(0);
    for number in 0..count {
        let tree = scratch.join("tree");
        write_tree(&tree, number, bytes)?;
        let layout = scratch.join(format!("image-{number}"));
        run(Command::new(&skimmer).args(["convert", "--quiet"]).arg(&tree).arg(&layout))?;
        fs::remove_dir_all(tree)?;
        made(&layout, number)?;
    }
    Ok(())
}

/// Reads all of an image's file: how many of its blocks were wrong, and how many could not be read.
pub(super) fn wrong_blocks(file: &File, image: u64) -> Result<(u64, u64)> {
    let block_bytes = u64::try_from(BLOCK)?;
    let blocks = file.metadata()?.len() / block_bytes;
    // As a program reads that copies: not block by block.
    let at_once = 64;
    let mut buffer = vec![0; BLOCK * usize::try_from(at_once)?];
    let (mut wrong, mut errors) = (0, 0);
    let mut first = 0;
    while first < blocks {
        let count = at_once.min(blocks - first);
        let part = &mut buffer[..BLOCK * usize::try_from(count)?];
        match file.read_exact_at(part, first * block_bytes) {
            Ok(()) => {
                let pairs = (first..).zip(part.chunks(BLOCK));
                wrong +=
                    u64::try_from(pairs.filter(|(number, bytes)| *bytes != block(image, *number)).count())?;
            }
            Err(_) => errors += count,
        }
        first += count;
    }
    Ok((wrong, errors))
}
