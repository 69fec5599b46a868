//! From an input to an image in a layout.

use std::path::PathBuf;
use std::time::Instant;

use erofs_format::blob_table::BlobId;
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::layout::Layout;

use crate::bootstrap::{self, Plan, PublishedBlob};
use crate::dirinput::read_directory;
use crate::ociinput::{LayerStream, Selector, SourceImage};
use crate::pack::Packer;
use crate::package::{Parts, package};
use crate::progress::{Phase, Progress};
use crate::report::{BlobReport, Report};
use crate::tarinput::read_layer;
use crate::tree::Tree;
use crate::{MkfsError, Options};

/// What to convert.
#[derive(Clone, Debug)]
pub enum Input {
    /// An image in an OCI layout on disk.
    Layout {
        /// The layout.
        layout: Layout,
        /// Which of its images.
        selector: Selector,
    },
    /// A directory, packed as an image of one layer. Owners, times and everything else are taken as they are, other
    /// file systems mounted below it included. Nobody should write to it meanwhile.
    Directory(PathBuf),
}

/// Converts an image or a directory into a RAFS v6 image in `output` and lists it there.
///
/// Data is read once, layer by layer. Layers are checked against their digests. Nothing appears in the output under
/// its final name before all of the input has been read.
///
/// Rules for layers, where unpackers differ: markers act on the layers below, wherever in the tar they stand; of entries
/// with the same path the last counts; parents that are symlinks are followed inside of the image (an absolute
/// target starts at its root; the options can refuse those), and a path that climbs above the root is an error; a hard
/// link's target is looked for in the layer first, as read so far, then in the layers below it; hard links to other things than regular files become files of their own; PAX times count
/// with their nanoseconds, `SCHILY.xattr.*` records become xattrs, `LIBARCHIVE.xattr.*` and textual ACL records do not;
/// global PAX headers are skipped.
pub fn convert(
    input: Input,
    output: &Layout,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report, MkfsError> {
    let started = Instant::now();
    options.check()?;
    let mut tree = Tree::new();
    let mut packer = Packer::new(options, output)?;
    let mut layer_blobs = Vec::new();
    let source = match &input {
        Input::Directory(root) => {
            progress.phase(Phase::Directory);
            read_directory(root, Some(output.root()), &mut tree, &mut packer, options, progress)?;
            layer_blobs.push(packer.finish_layer()?);
            None
        }
        Input::Layout { layout, selector } => {
            let source = SourceImage::open(layout, selector)?;
            progress.total(source.layers.iter().map(|layer| layer.blob.size).fold(0, u64::saturating_add));
            for (index, info) in source.layers.iter().enumerate() {
                progress.phase(Phase::Layer { index, count: source.layers.len() });
                let mut stream = LayerStream::open(layout, info, progress)?;
                let name = info.blob.digest.to_string();
                read_layer(&mut stream, &name, &mut tree, &mut packer, options, progress)?;
                layer_blobs.push(packer.finish_layer()?);
                stream.finish()?;
            }
            Some(source)
        }
    };
    let mut packed = packer.finish()?;

    progress.phase(Phase::Bootstrap);
    let counts: Vec<usize> = packed.blobs.iter().map(|blob| blob.chunks.len()).collect();
    let plan = Plan::new(&tree, &packed, &counts)?;
    // What can still be refused is refused before the first blob gets its name.
    plan.prefetch(&tree, &options.prefetch)?;
    let mut blobs: Vec<(BlobRef, PublishedBlob)> = Vec::with_capacity(plan.blobs.len());
    let mut used = plan.blobs.iter().map(|blob| blob.number).peekable();
    let count = packed.blobs.len();
    for (number, blob) in std::mem::take(&mut packed.blobs).into_iter().enumerate() {
        if used.next_if_eq(&number).is_some() {
            let (blob, chunks, entry) = blob.publish()?;
            let id = BlobId(*blob.digest.as_bytes());
            blobs.push((blob, PublishedBlob { id, chunks, entry }));
        }
    }
    let bytes = bootstrap::write(&tree, &plan, &packed, &blobs, options)?;

    progress.phase(Phase::Package);
    let has_blob = |number: &Option<u32>| {
        number.is_some_and(|number| plan.blobs.iter().any(|used| u32::try_from(used.number) == Ok(number)))
    };
    let layer_has_blob: Vec<bool> = layer_blobs.iter().map(has_blob).collect();
    let parts = Parts { source: source.as_ref(), blobs: &blobs, layer_has_blob: &layer_has_blob };
    let manifest = package(output, &bytes, &parts, options)?;
    let blob_reports = blobs.iter().zip(&plan.blobs).map(|((blob, published), used)| BlobReport {
        id: published.id.to_string(),
        stored_bytes: blob.size,
        device_bytes: published.entry.uncompressed_size.get(),
        chunks: published.chunks.len(),
        referenced_chunks: used.first_use.iter().flatten().count(),
    });
    Ok(Report {
        manifest: manifest.digest.to_string(),
        tag: options.tag.clone(),
        bootstrap: Digest::of(&bytes).hex(),
        bootstrap_bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        blobs: blob_reports.collect(),
        hidden_blobs: count - blobs.len(),
        layers: layer_blobs.len(),
        tree: plan.counts,
        dedup: packed.dedup,
        data_bytes: packed.data_bytes,
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}
