//! A layer's tar: converted as the only layer of an image, and the result read back.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::LazyLock;

use erofs_format::{Image, dump};
use serde_json::json;
use skimmer_fetcher::image::{self, OpenOptions};
use skimmer_fetcher::layout::{Layout, LayoutError};
use skimmer_fetcher::{BlobRef, Reference, oci};
use skimmer_mkfs::{Compression, Input, Options, Selector, convert};

use crate::tar::{BLOCK, put_checksum};

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers")
});

/// The tar with the right checksum in every block that looks like a header.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut tar = data.to_vec();
    tar.chunks_exact_mut(BLOCK).for_each(put_checksum);
    tar
}

/// An image with this layer twice, in a new layout at `dir`: markers of the upper one act on what the lower one has.
fn source(dir: &Path, tar: &[u8]) -> Result<Layout, LayoutError> {
    let layout = Layout::create(dir)?;
    let named = |media_type: &str, blob: &BlobRef| json!({ "mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size });
    let layer = layout.put_blob(tar)?;
    let diff_id = layer.digest.to_string();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [&diff_id, &diff_id] },
    });
    let config = layout.put_blob(config.to_string().as_bytes())?;
    let layer = named("application/vnd.oci.image.layer.v1.tar", &layer);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": oci::MEDIA_TYPE_MANIFEST, "layers": [&layer, &layer],
        "config": named("application/vnd.oci.image.config.v1+json", &config),
    });
    let manifest = layout.put_blob(manifest.to_string().as_bytes())?;
    let descriptor = serde_json::from_value(named(oci::MEDIA_TYPE_MANIFEST, &manifest));
    layout.add_image(descriptor.expect("a descriptor by its three fields"), None)?;
    Ok(layout)
}

/// Converts `data` as a layer. What is accepted must give an image that passes every check.
pub fn run(data: &[u8]) {
    let dir = tempfile::tempdir().expect("the directory for temporary files can be written");
    let layout = source(&dir.path().join("in"), &with_checksums(data)).expect("a layout is made");
    let output = dir.path().join("out");
    let made = Layout::create(&output).expect("an empty layout is made");
    let mut options = Options::default();
    (options.threads, options.compression) = (NonZeroUsize::new(1), Compression::Zstd { level: 1 });
    let input = Input::Layout { layout, selector: Selector::default() };
    if let Err(error) = convert(input, &made, &options, &()) {
        assert!(!error.to_string().is_empty());
        return;
    }
    let reference = Reference::Layout { dir: output, tag: None };
    let remote = RUNTIME.block_on(image::open(&reference, &OpenOptions::default()));
    let remote = remote.expect("what was converted can be opened");
    let image = Image::parse(&remote.bootstrap).expect("our images can be read");
    let summary = image.check().expect("our images pass the check");
    assert_eq!((summary.wrong_link_counts, summary.recorded_inos), (0, summary.names));
    let dump = dump(&remote.bootstrap).expect("our images can be dumped");
    assert_eq!((dump.unaccounted(), dump.overlapping()), (0, 0), "every byte is ours, once");
    for blob in image.blobs() {
        assert!(remote.blob(&blob.id.to_string()).is_some(), "blob {} is not in the manifest", blob.id);
    }
}
