//! The OCI side of the result: bootstrap layer, config, manifest, and the entry in the layout's index.

use std::io::{self, Write};

use erofs_format::blob_table::BlobFeatures;
use serde_json::{Map, Value, json};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::{Digest, Hasher};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, Descriptor, Platform};
use zerocopy::IntoBytes;

use crate::blob::compression_info;
use crate::bootstrap::PublishedBlob;
use crate::ociinput::SourceImage;
use crate::{MkfsError, Options};

const MEDIA_TYPE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MEDIA_TYPE_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Block that `blob.meta` files are padded to.
const META_ALIGN: usize = 4096;

/// What goes into a manifest beside the bootstrap.
pub(crate) struct Parts<'p> {
    /// The image that was converted; `None` for a directory.
    pub(crate) source: Option<&'p SourceImage>,
    /// The blobs of the manifest, in order.
    pub(crate) blobs: &'p [(BlobRef, PublishedBlob)],
    /// For every layer of the source, whether one of the blobs is its.
    pub(crate) layer_has_blob: &'p [bool],
}

/// Hashes what passes.
struct Tee<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Stores everything and lists the image; gives the manifest.
pub(crate) fn package(
    layout: &Layout,
    bootstrap: &[u8],
    parts: &Parts<'_>,
    options: &Options,
) -> Result<BlobRef, MkfsError> {
    let (boot_layer, boot_diff_id) = bootstrap_layer(layout, bootstrap, parts.blobs)?;
    let config = config(parts, boot_diff_id, &options.platform)?;
    let platform = platform(&config, options.mark_platform);
    let config = layout.put_blob(&to_json(&config)?)?;
    let mut layers: Vec<Value> = Vec::with_capacity(parts.blobs.len() + 1);
    for (blob, published) in parts.blobs {
        let mut layer = descriptor(oci::MEDIA_TYPE_RAFS_BLOB, blob);
        layer["annotations"] = json!({ oci::ANNOTATION_RAFS_BLOB: "true" });
        if published.entry.features.get() & BlobFeatures::SEPARATED_PREFETCH_FILES.bits() != 0 {
            layer["annotations"][oci::ANNOTATION_START_BLOB] = json!("true");
        }
        layers.push(layer);
    }
    let mut layer = descriptor(MEDIA_TYPE_LAYER_GZIP, &boot_layer);
    layer["annotations"] = json!({ oci::ANNOTATION_BOOTSTRAP: "true", oci::ANNOTATION_FS_VERSION: "6" });
    layers.push(layer);
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": oci::MEDIA_TYPE_MANIFEST,
        "config": descriptor(MEDIA_TYPE_CONFIG, &config),
        "layers": layers,
    });
    if let Some(annotations) = parts.source.and_then(|source| source.annotations.as_ref()) {
        manifest["annotations"] = json!(annotations);
    }
    let manifest = layout.put_blob(&to_json(&manifest)?)?;
    let mut entry = descriptor(oci::MEDIA_TYPE_MANIFEST, &manifest);
    entry["platform"] = platform;
    let entry: Descriptor = serde_json::from_value(entry).map_err(json_error)?;
    layout.add_image(entry, options.tag.as_deref())?;
    Ok(manifest)
}

fn descriptor(media_type: &str, blob: &BlobRef) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size })
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>, MkfsError> {
    oci::canonical_json(value).map_err(json_error)
}

fn json_error(error: serde_json::Error) -> MkfsError {
    MkfsError::image("of the result", format!("its documents cannot be written: {error}"))
}

/// The last layer: a tar with the bootstrap and each blob's compression info. Gives its blob and its diff_id.
fn bootstrap_layer(
    layout: &Layout,
    bootstrap: &[u8],
    blobs: &[(BlobRef, PublishedBlob)],
) -> Result<(BlobRef, Digest), MkfsError> {
    let writer = layout.blob_writer()?;
    let write = || -> io::Result<_> {
        // No name, no time, no operating system in the header: the same bytes everywhere.
        let gzip = flate2::GzBuilder::new().mtime(0).operating_system(255);
        let gzip = gzip.write(io::BufWriter::new(writer), flate2::Compression::default());
        let mut tar = tar::Builder::new(Tee { inner: gzip, hasher: Hasher::new() });
        add(&mut tar, tar::EntryType::Directory, "image/", 0o755, &[])?;
        add(&mut tar, tar::EntryType::Regular, oci::BOOTSTRAP_PATH, 0o444, bootstrap)?;
        for (blob, published) in blobs {
            let (mut meta, header) = compression_info(&published.chunks, &published.entry);
            meta.resize(meta.len().next_multiple_of(META_ALIGN), 0);
            meta.extend_from_slice(header.as_bytes());
            let name = format!("image/{}.blob.meta", blob.digest.hex());
            add(&mut tar, tar::EntryType::Regular, &name, 0o444, &meta)?;
        }
        let Tee { inner, hasher } = tar.into_inner()?;
        let writer = inner.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok((writer, hasher.finish()))
    };
    let (writer, diff_id) =
        write().map_err(|e| MkfsError::io("write the bootstrap layer into", layout.root(), e))?;
    Ok((writer.finish()?, diff_id))
}

fn add<W: Write>(
    tar: &mut tar::Builder<W>,
    kind: tar::EntryType,
    name: &str,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(u64::try_from(content.len()).map_err(io::Error::other)?);
    tar.append_data(&mut header, name, content)
}

/// The source's config with the layers of the new image; a minimal one for a directory.
fn config(
    parts: &Parts<'_>,
    bootstrap: Digest,
    platform: &Platform,
) -> Result<Map<String, Value>, MkfsError> {
    let mut config = match parts.source {
        Some(source) => source.config.clone(),
        None => {
            let mut config = Map::new();
            config.insert("architecture".to_owned(), json!(platform.architecture));
            config.insert("os".to_owned(), json!(platform.os));
            if let Some(variant) = &platform.variant {
                config.insert("variant".to_owned(), json!(variant));
            }
            config.insert("config".to_owned(), json!({}));
            config
        }
    };
    let mut diff_ids: Vec<String> = parts.blobs.iter().map(|(blob, _)| blob.digest.to_string()).collect();
    diff_ids.push(bootstrap.to_string());
    config.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diff_ids }));
    let mut history = history(config.get("history"), parts.layer_has_blob);
    history.push(json!({ "created_by": "skimmer convert", "comment": "RAFS v6 bootstrap" }));
    config.insert("history".to_owned(), Value::Array(history));
    Ok(config)
}

/// The source's history. Steps whose layer has no blob become steps without a layer, so that steps and layers agree.
fn history(old: Option<&Value>, layer_has_blob: &[bool]) -> Vec<Value> {
    let is_empty = |step: &Value| step.get("empty_layer").and_then(Value::as_bool).unwrap_or(false);
    let mut steps = old.and_then(Value::as_array).cloned().unwrap_or_default();
    if steps.iter().filter(|step| !is_empty(step)).count() != layer_has_blob.len() {
        // No history, or one that does not fit the layers: one step per blob tells at least the truth.
        let blobs = layer_has_blob.iter().filter(|has| **has);
        return blobs
            .map(|_| json!({ "created_by": "skimmer convert", "comment": "RAFS v6 blob" }))
            .collect();
    }
    for (step, has_blob) in steps.iter_mut().filter(|step| !is_empty(step)).zip(layer_has_blob) {
        if !has_blob && let Some(step) = step.as_object_mut() {
            step.insert("empty_layer".to_owned(), json!(true));
        }
    }
    steps
}

/// The platform of an index entry, from the config.
fn platform(config: &Map<String, Value>, mark: bool) -> Value {
    let text =
        |key: &str, default: &str| config.get(key).and_then(Value::as_str).unwrap_or(default).to_owned();
    let mut platform = json!({ "architecture": text("architecture", "unknown"), "os": text("os", "linux") });
    if let Some(variant) = config.get("variant").and_then(Value::as_str) {
        platform["variant"] = json!(variant);
    }
    if mark {
        platform["os.features"] = json!([oci::OS_FEATURE_RAFS]);
    }
    platform
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_agrees_with_layers() {
        let old = json!([
            { "created_by": "base" }, { "created_by": "ENV", "empty_layer": true }, { "created_by": "RUN rm" },
            { "created_by": "COPY" },
        ]);
        let new = history(Some(&old), &[true, false, true]);
        let empty: Vec<bool> = new.iter().map(|step| step["empty_layer"] == json!(true)).collect();
        assert_eq!(empty, [false, true, true, false]);
        assert_eq!(history(Some(&old), &[true]).len(), 1);
        assert_eq!(history(None, &[true, false, true]).len(), 2);
    }
}
