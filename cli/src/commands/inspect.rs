//! `skimmer inspect`: what a converted image consists of.

use anyhow::{Context, Result, bail};
use erofs_format::Image;
use serde_json::{Value, json};
use skimmer_fetcher::Reference;
use skimmer_fetcher::image::{Remote, open};

use crate::{Global, image, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A converted image.
    image: String,
    /// Name every byte of the bootstrap, one region per line.
    #[arg(long)]
    dump: bool,
    #[command(flatten)]
    registry: image::Registry,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let reference = Reference::parse_source(&options.image)?;
    let remote = open(&reference, &options.registry.open_options(&reference)?).await?;
    let named = || format!("bootstrap of {}", options.image);
    if options.dump {
        let dump = erofs_format::dump(&remote.bootstrap).with_context(named)?;
        output::line(dump.to_string().trim_end())?;
        let strange = dump.unaccounted();
        if strange > 0 {
            bail!("{}: {strange} bytes belong to nothing", named());
        }
        return Ok(());
    }
    let parsed = Image::parse(&remote.bootstrap).with_context(named)?;
    let report = report(&remote, &parsed)?;
    if global.json { output::json(&report) } else { print(&report) }
}

fn report(remote: &Remote, image: &Image<'_>) -> Result<Value> {
    let summary = image.check().context("bootstrap")?;
    let mut blobs = Vec::new();
    for (index, blob) in image.blobs().iter().enumerate() {
        let chunks = image.chunk_map(index)?;
        blobs.push(json!({
            "id": blob.id.to_string(),
            "stored_bytes": blob.compressed_size,
            "device_bytes": blob.uncompressed_size,
            "compression": format!("{:?}", blob.compressor).to_lowercase(),
            "digest": format!("{:?}", blob.digest).to_lowercase(),
            "chunks": blob.chunk_count,
            "referenced_chunks": chunks.len(),
            "referenced_bytes": chunks.iter().map(|chunk| u64::from(chunk.uncompressed_size)).sum::<u64>(),
        }));
    }
    Ok(json!({
        "image": remote.reference.to_string(),
        "manifest": remote.manifest_digest.to_string(),
        "bootstrap": {
            "digest": skimmer_fetcher::Digest::of(&remote.bootstrap).to_string(),
            "bytes": remote.bootstrap.len(),
            "chunk_size": image.chunk_size(),
            "prefetch": image.prefetch().count(),
        },
        "tree": {
            "names": summary.names,
            "directories": summary.directories,
            "files": summary.files,
            "symlinks": summary.symlinks,
            "special": summary.specials,
            "xattrs": summary.xattrs,
            "file_bytes": summary.file_bytes,
        },
        "blobs": blobs,
    }))
}

fn print(report: &Value) -> Result<()> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let size = |value: &Value| output::bytes(value.as_u64().unwrap_or(0));
    let (bootstrap, tree) = (&report["bootstrap"], &report["tree"]);
    output::line(&text(&report["image"]))?;
    output::line(&format!("  manifest   {}", text(&report["manifest"])))?;
    output::line(&format!(
        "  bootstrap  {}, {}, chunks of {}",
        text(&bootstrap["digest"]),
        size(&bootstrap["bytes"]),
        size(&bootstrap["chunk_size"])
    ))?;
    output::line(&format!(
        "  contents   {} files, {} directories, {} symlinks, {} others, {} xattrs; {}",
        tree["files"],
        tree["directories"],
        tree["symlinks"],
        tree["special"],
        tree["xattrs"],
        size(&tree["file_bytes"])
    ))?;
    for blob in report["blobs"].as_array().into_iter().flatten() {
        output::line(&format!("  blob       {}", text(&blob["id"])))?;
        output::line(&format!(
            "             {} stored ({}), {} uncompressed; {} of {} chunks in use ({})",
            size(&blob["stored_bytes"]),
            text(&blob["compression"]),
            size(&blob["device_bytes"]),
            blob["referenced_chunks"],
            blob["chunks"],
            size(&blob["referenced_bytes"])
        ))?;
    }
    Ok(())
}
