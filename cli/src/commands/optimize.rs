//! `skimmer optimize`: what a container reads at its start is put into one blob that is fetched first.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use skimmer_client::{AttachMode, Record};
use skimmer_fetcher::Reference;
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::copy::{self, Images};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{Flavour, Platform};
use skimmer_mkfs::{Converted, Optimized, Pieces, Touch};

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
    /// Starts differ a little: give more than one recording for a start blob that holds what any of them read.
    #[arg(long, value_name = "RECORDING", required = true)]
    trace: Vec<PathBuf>,
    /// Tag of the result in a destination layout [default: the source's].
    #[arg(long)]
    tag: Option<String>,
    /// Move whole chunks. The start blob is larger then, but other RAFS loaders can read the image too.
    #[arg(long)]
    whole_chunks: bool,
    #[command(flatten)]
    registry: image::Registry,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let source = Reference::parse_source(&options.source)?;
    let destination = Reference::parse_destination(&options.destination)?;
    let bar = output::progress(global, "fetching");
    let (trace, form) = traces(&options, &bar)?;
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
    bar.set_message("writing the start blob");
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
        skimmer_mkfs::optimize(&converted, &trace, form, &out, &mkfs)
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

/// The reads of all recordings, and in what pieces they may be moved.
fn traces(options: &Options, bar: &ProgressBar) -> Result<(Vec<Touch>, Pieces)> {
    let mut trace = Vec::new();
    let mut form = if options.whole_chunks { Pieces::Chunks } else { Pieces::Blocks };
    for path in &options.trace {
        let name = path.display();
        let recording = record::load(path)?;
        ensure!(!recording.cut, "{name}: the recording was cut short; record less");
        if recording.record != Record::Exact {
            form = Pieces::Chunks;
            bar.println(format!(
                "warning: {name} is not exact: what was fetched ahead of need is missing from it, if it was read; \
                 whole chunks are moved"
            ));
        } else if recording.mode == AttachMode::Fscache && form == Pieces::Blocks {
            form = Pieces::Chunks;
            bar.println(format!(
                "{name}: over fscache the kernel does not tell what else of a chunk it reads, so whole chunks are \
                 moved; record with `--mode fanotify` for a smaller start blob"
            ));
        }
        let ids: Vec<[u8; 32]> = recording.blobs.iter().map(|id| blob_id(id)).collect::<Result<_>>()?;
        for read in &recording.reads {
            let blob = ids.get(read.blob);
            let blob = *blob.with_context(|| format!("{name} has no blob number {}", read.blob))?;
            trace.push(Touch { blob, offset: read.offset, length: read.length });
        }
    }
    Ok((trace, form))
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
