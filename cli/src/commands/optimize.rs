//! `skimmer optimize`: what a container reads at its start is put into one blob that is fetched first.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use skimmer_client::Record;
use skimmer_fetcher::Reference;
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::copy::{self, Images};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{Flavour, Platform};
use skimmer_mkfs::{Converted, Optimized, Touch};

use super::record;
use crate::{Global, image, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A converted image.
    source: String,
    /// Where the optimized image goes; it may be the layout of the source, with another tag.
    destination: String,
    /// The access trace: a recording of a mount with `--record=exact`, from the mount to when the container was ready.
    #[arg(long, value_name = "RECORDING")]
    trace: PathBuf,
    /// Tag of the result in a destination layout [default: the source's].
    #[arg(long)]
    tag: Option<String>,
    #[command(flatten)]
    registry: image::Registry,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let source = Reference::parse_source(&options.source)?;
    let destination = Reference::parse_destination(&options.destination)?;
    let recording = record::load(&options.trace)?;
    ensure!(!recording.cut, "{}: the recording was cut short; record less", options.trace.display());
    let bar = output::progress(global, "fetching");
    if recording.record != Record::Exact {
        bar.println(
            "warning: the recording is not exact: what was fetched ahead of need is missing from it, if it was read",
        );
    }
    let scratch = image::scratch(&destination)?;
    // All of the image, in a layout.
    let (layout, opened, source_tag) = match &source {
        Reference::Tree(dir) => bail!("{} is a plain directory, not an image", dir.display()),
        Reference::Layout { dir, tag } => (Layout::open(dir)?, source.clone(), tag.clone()),
        Reference::Archive { file, tag } => {
            let layout = Archive::unpack(file, scratch.path().join("source"))?;
            let opened = Reference::Layout { dir: layout.root().to_owned(), tag: tag.clone() };
            (layout, opened, tag.clone())
        }
        Reference::Registry(_) | Reference::Origin(_) => {
            let layout = Layout::create(scratch.path().join("source"))?;
            let images = Images::One(Platform::host(), Flavour::PreferConverted);
            let copying = options.registry.copy_options(&source, images, &bar)?;
            copy::pull(&source, &layout, None, &copying).await?;
            let opened = Reference::Layout { dir: layout.root().to_owned(), tag: None };
            (layout, opened, source.tag().map(str::to_owned))
        }
    };
    let remote = skimmer_fetcher::image::open(&opened, &options.registry.open_options(&opened)?).await?;
    let (target, tag) = image::output(&destination, &scratch)?;
    let mut trace = Vec::with_capacity(recording.reads.len());
    let ids: Vec<[u8; 32]> = recording.blobs.iter().map(|id| blob_id(id)).collect::<Result<_>>()?;
    for read in &recording.reads {
        let blob = ids.get(read.blob);
        let blob = *blob.with_context(|| format!("the recording has no blob number {}", read.blob))?;
        trace.push(Touch { blob, offset: read.offset, length: read.length });
    }
    bar.set_message("moving chunks");
    let mut mkfs = skimmer_mkfs::Options::default();
    mkfs.tag = tag.or(options.tag.clone()).or(source_tag);
    let (name, out) = (options.source.clone(), target.clone());
    let result = tokio::task::spawn_blocking(move || {
        let converted = Converted {
            name: &name,
            layout: &layout,
            blobs: &remote.blobs,
            bootstrap: &remote.bootstrap,
            config: &remote.config,
            annotations: remote.manifest.annotations().clone(),
        };
        skimmer_mkfs::optimize(&converted, &trace, &out, &mkfs)
    });
    let result = result.await.context("the work ended early")??;
    match &destination {
        Reference::Registry(name) => {
            bar.set_message("pushing");
            let copying = options.registry.copy_options(&destination, Images::All, &bar)?;
            copy::push(&target, result.tag.as_deref(), name, &copying).await?;
        }
        Reference::Archive { file, .. } => Archive::pack(&target, file)?,
        _ => {}
    }
    bar.finish_and_clear();
    if global.json { output::json(&result) } else { print(&result, &options, global) }
}

fn blob_id(text: &str) -> Result<[u8; 32]> {
    let digest = skimmer_fetcher::digest::Digest::from_hex(text);
    Ok(*digest.with_context(|| format!("the recording names a blob `{text}`"))?.as_bytes())
}

fn print(result: &Optimized, options: &Options, global: &Global) -> Result<()> {
    if global.quiet {
        return Ok(());
    }
    output::line(&format!("{} is now {}", options.source, options.destination))?;
    output::line(&format!("  manifest    {}", result.manifest))?;
    output::line(&format!(
        "  start blob  {} chunks, {} stored, {} on the device, of which the trace read {}",
        result.chunks,
        output::bytes(result.stored_bytes),
        output::bytes(result.device_bytes),
        output::bytes(result.read_bytes)
    ))?;
    if result.strange_reads > 0 {
        output::line(&format!(
            "  left out    {} reads of blobs that the image does not have",
            result.strange_reads
        ))?;
    }
    output::line(&format!("  took        {:.1} s", result.elapsed_seconds))
}
