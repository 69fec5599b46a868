//! `skimmer convert`: an OCI image or a directory becomes an image that is mounted lazily.

use std::num::NonZeroUsize;

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::ProgressBar;
use skimmer_fetcher::Reference;
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::copy::{self, Images};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{Flavour, Platform};
use skimmer_mkfs::{Compression, Digest, Input, Phase, Report, Selector, UnsupportedXattrs};

use crate::{Global, image, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// An OCI image, or a directory to pack.
    source: String,
    /// Where the converted image goes; a path is an OCI layout to make.
    destination: String,
    /// How chunks are stored.
    #[arg(long, value_enum, default_value_t = Codec::Zstd)]
    compression: Codec,
    /// zstd's level, 1 to 22.
    #[arg(long, default_value_t = 3)]
    level: i32,
    /// Bytes per chunk: a power of two from 4096 to 16777216; K and M may be used.
    #[arg(long, default_value = "1M", value_parser = size)]
    chunk_size: u32,
    /// The hash that names chunks.
    #[arg(long, value_enum, default_value_t = Hash::Sha256)]
    digest: Hash,
    /// Threads that hash and compress [default: one per processor]; the result is the same for any number.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Which image of a multi-platform one, as OS/ARCHITECTURE[/VARIANT] [default: this machine's].
    #[arg(long, value_parser = image::platform)]
    platform: Option<Platform>,
    /// Leave out extended attributes that EROFS has no namespace for instead of refusing the image.
    #[arg(long)]
    drop_xattrs: bool,
    /// Refuse entries of a layer whose path goes through a symlink with an absolute target (var/run -> /run) instead of
    /// following it from the root of the image.
    #[arg(long)]
    refuse_absolute_symlinks: bool,
    /// Tag of the result in a destination layout [default: the source's].
    #[arg(long)]
    tag: Option<String>,
    #[command(flatten)]
    registry: image::Registry,
}

#[derive(Clone, Copy, ValueEnum)]
enum Codec {
    Zstd,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum Hash {
    Sha256,
    Blake3,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let source = Reference::parse_source(&options.source)?;
    let destination = Reference::parse_destination(&options.destination)?;
    let bar = output::progress(global, "fetching");
    let scratch = image::scratch(&destination)?;
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    let (input, source_tag) = match &source {
        Reference::Tree(dir) => (Input::Directory(dir.clone()), None),
        Reference::Layout { dir, tag } => {
            let selector = Selector { tag: tag.clone(), platform };
            (Input::Layout { layout: Layout::open(dir)?, selector }, tag.clone())
        }
        Reference::Archive { file, tag } => {
            let layout = Archive::unpack(file, scratch.path().join("source"))?;
            (Input::Layout { layout, selector: Selector { tag: tag.clone(), platform } }, tag.clone())
        }
        Reference::Registry(_) | Reference::Origin(_) => {
            let layout = Layout::create(scratch.path().join("source"))?;
            let images = Images::One(platform.clone(), Flavour::Plain);
            let copying = options.registry.copy_options(&source, images, &bar)?;
            copy::pull(&source, &layout, None, &copying).await?;
            let selector = Selector { tag: None, platform };
            (Input::Layout { layout, selector }, source.tag().map(str::to_owned))
        }
    };
    let (output, tag) = image::output(&destination, &scratch)?;
    let report = {
        let mkfs = options.mkfs(tag.or_else(|| options.tag.clone()).or(source_tag));
        let (output, bar) = (output.clone(), Bar(bar.clone()));
        tokio::task::spawn_blocking(move || skimmer_mkfs::convert(input, &output, &mkfs, &bar))
            .await
            .context("the conversion ended early")?
            // An image from a registry is converted from a work copy, which the error would name alone.
            .with_context(|| format!("converting {}", options.source))?
    };
    match &destination {
        Reference::Registry(name) => {
            bar.set_message("pushing");
            let copying = options.registry.copy_options(&destination, Images::All, &bar)?;
            copy::push(&output, report.tag.as_deref(), name, &copying).await?;
        }
        Reference::Archive { file, .. } => Archive::pack(&output, file)?,
        _ => {}
    }
    bar.finish_and_clear();
    if global.json { output::json(&report) } else { print(&report, &options, global) }
}

impl Options {
    fn mkfs(&self, tag: Option<String>) -> skimmer_mkfs::Options {
        let mut mkfs = skimmer_mkfs::Options::default();
        mkfs.compression = match self.compression {
            Codec::Zstd => Compression::Zstd { level: self.level },
            Codec::None => Compression::None,
        };
        mkfs.chunk_size = self.chunk_size;
        mkfs.digest = match self.digest {
            Hash::Sha256 => Digest::Sha256,
            Hash::Blake3 => Digest::Blake3,
        };
        mkfs.threads = self.threads;
        if self.drop_xattrs {
            mkfs.unsupported_xattrs = UnsupportedXattrs::Drop;
        }
        mkfs.follow_absolute_symlinks = !self.refuse_absolute_symlinks;
        mkfs.tag = tag;
        mkfs
    }
}

/// A conversion on a progress bar.
struct Bar(ProgressBar);

impl skimmer_mkfs::Progress for Bar {
    fn phase(&self, phase: Phase) {
        self.0.set_message(match phase {
            Phase::Layer { index, count } => format!("layer {} of {count}", index + 1),
            Phase::Bootstrap => "writing the bootstrap".to_owned(),
            Phase::Package => "writing the image".to_owned(),
            _ => "packing".to_owned(),
        });
    }

    fn total(&self, bytes: u64) {
        output::add_total(&self.0, bytes);
    }

    fn advance(&self, bytes: u64, _files: u64) {
        self.0.inc(bytes);
    }
}

fn print(report: &Report, options: &Options, global: &Global) -> Result<()> {
    if global.quiet {
        return Ok(());
    }
    let stored: u64 = report.blobs.iter().map(|blob| blob.stored_bytes).sum();
    output::line(&format!("{} is now {}", options.source, options.destination))?;
    output::line(&format!("  manifest   {}", report.manifest))?;
    output::line(&format!(
        "  contents   {} files, {} directories, {} symlinks, {} others; {}",
        report.tree.files,
        report.tree.directories,
        report.tree.symlinks,
        report.tree.special,
        output::bytes(report.tree.file_bytes)
    ))?;
    output::line(&format!("  bootstrap  {}", output::bytes(report.bootstrap_bytes)))?;
    output::line(&format!(
        "  blobs      {} with {}; {} of equal chunks saved",
        report.blobs.len(),
        output::bytes(stored),
        output::bytes(report.dedup.bytes_saved)
    ))?;
    output::line(&format!("  took       {:.1} s", report.elapsed_seconds))
}

/// A number of bytes, with an optional K or M.
fn size(text: &str) -> Result<u32, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        _ => (text, 1),
    };
    let number: u32 = digits.parse().map_err(|error| format!("`{text}` is no size: {error}"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("256k"), Ok(256 << 10));
        assert_eq!(size("1M"), Ok(1 << 20));
        assert!(size("4G").is_err() && size("").is_err() && size("M").is_err() && size("8000M").is_err());
    }
}
