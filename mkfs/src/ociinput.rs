//! An image in an OCI layout: the choice of its manifest, its config, and its layers as tar streams.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::{Digest, Hasher};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, Descriptor, Document, Flavour, Platform};

use crate::MkfsError;
use crate::progress::Progress;

/// Most manifests passed on the way from the index to an image: an index may list an index.
const NESTING_MAX: usize = 4;

/// Which image of a layout is meant.
#[derive(Clone, Debug)]
pub struct Selector {
    /// Its tag or digest in the index; `None` when there is only one.
    pub tag: Option<String>,
    /// The platform, when the image is for several.
    pub platform: Platform,
}

impl Default for Selector {
    /// The only image, for this machine's platform.
    fn default() -> Self {
        Self { tag: None, platform: Platform::host() }
    }
}

/// One layer as the manifest and the config describe it.
#[derive(Clone, Debug)]
pub(crate) struct LayerInfo {
    pub(crate) blob: BlobRef,
    /// sha256 of the uncompressed tar.
    pub(crate) diff_id: Digest,
}

/// An image to convert.
#[derive(Debug)]
pub(crate) struct SourceImage {
    /// The annotations of its manifest.
    pub(crate) annotations: Option<HashMap<String, String>>,
    /// The whole config: what this program does not know must live on in the new one.
    pub(crate) config: serde_json::Map<String, serde_json::Value>,
    pub(crate) layers: Vec<LayerInfo>,
}

impl SourceImage {
    pub(crate) fn open(layout: &Layout, selector: &Selector) -> Result<Self, MkfsError> {
        let tag = selector.tag.as_deref();
        let name = format!(
            "oci:{}{}",
            layout.root().display(),
            tag.map_or_else(String::new, |tag| format!(":{tag}"))
        );
        let bad = |reason: String| MkfsError::image(name.clone(), reason);
        let mut descriptor = layout.resolve(tag)?;
        let mut hops = 0;
        let manifest = loop {
            match layout.document(&descriptor)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(index) => {
                    hops += 1;
                    if hops > NESTING_MAX {
                        return Err(bad(format!("its indexes are nested more than {NESTING_MAX} deep")));
                    }
                    let chosen = oci::choose(&index, &selector.platform, Flavour::Plain);
                    descriptor = chosen.map_err(|e| bad(e.to_string()))?.clone();
                }
            }
        };
        if oci::is_converted(&manifest) {
            return Err(bad("it is converted already: its last layer is a RAFS bootstrap".to_owned()));
        }
        let blob_ref = |descriptor: &Descriptor| oci::blob_ref(descriptor).map_err(|e| bad(e.to_string()));
        let config = layout.read_blob(&blob_ref(manifest.config())?, oci::MAX_CONFIG)?;
        let config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&config)
            .map_err(|e| bad(format!("its config is not a JSON object: {e}")))?;
        let diff_ids = config.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids"));
        let diff_ids: Vec<String> =
            diff_ids.and_then(|ids| serde_json::from_value(ids.clone()).ok()).ok_or_else(|| {
                bad("its config has no list rootfs.diff_ids; this is no container image".to_owned())
            })?;
        if diff_ids.len() != manifest.layers().len() {
            return Err(bad(format!(
                "its manifest has {} layers, but its config has {} diff_ids",
                manifest.layers().len(),
                diff_ids.len()
            )));
        }
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (descriptor, diff_id) in manifest.layers().iter().zip(&diff_ids) {
            check_media_type(descriptor).map_err(&bad)?;
            let diff_id = diff_id.parse().map_err(|e| bad(format!("config, rootfs.diff_ids: {e}")))?;
            layers.push(LayerInfo { blob: blob_ref(descriptor)?, diff_id });
        }
        Ok(Self { annotations: manifest.annotations().clone(), config, layers })
    }
}

/// Takes OCI and Docker file system layers. Their compression is told by their first bytes.
fn check_media_type(descriptor: &Descriptor) -> Result<(), String> {
    let media_type = descriptor.media_type().to_string();
    let digest = descriptor.digest();
    let base = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ]
    .into_iter()
    .find_map(|base| media_type.strip_prefix(base));
    match base {
        Some("" | "+gzip" | ".gzip" | "+zstd" | ".zstd") => Ok(()),
        Some(suffix) if suffix.contains("encrypted") => {
            Err(format!("layer {digest} is encrypted ({media_type}); decrypt the image first"))
        }
        _ => Err(format!("layer {digest} has the media type {media_type}, which is no file system layer")),
    }
}

/// Counts and hashes what passes.
struct Tap<'p, R> {
    inner: R,
    hasher: Hasher,
    progress: Option<&'p dyn Progress>,
}

impl<R: Read> Read for Tap<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        if let Some(progress) = self.progress {
            progress.advance(u64::try_from(n).unwrap_or(0), 0);
        }
        Ok(n)
    }
}

type Stored<'p> = BufReader<Tap<'p, File>>;

enum Decoder<'p> {
    Plain(Stored<'p>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<Stored<'p>>>),
    Zstd(zstd::stream::read::Decoder<'static, Stored<'p>>),
}

impl Decoder<'_> {
    fn finish(self) -> io::Result<Digest> {
        let mut stored = match self {
            Self::Plain(stored) => stored,
            Self::Gzip(gzip) => gzip.into_inner(),
            Self::Zstd(zstd) => zstd.finish(),
        };
        io::copy(&mut stored, &mut io::sink())?;
        Ok(stored.into_inner().hasher.finish())
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(inner) => inner.read(buffer),
            Self::Gzip(inner) => inner.read(buffer),
            Self::Zstd(inner) => inner.read(buffer),
        }
    }
}

/// A layer's tar, decompressed. [`LayerStream::finish`] must be called after the last byte.
pub(crate) struct LayerStream<'p> {
    tar: Tap<'p, Decoder<'p>>,
    info: LayerInfo,
}

impl<'p> LayerStream<'p> {
    pub(crate) fn open(
        layout: &Layout,
        info: &LayerInfo,
        progress: &'p dyn Progress,
    ) -> Result<Self, MkfsError> {
        let file = layout.open_blob(&info.blob)?;
        let stored = Tap { inner: file, hasher: Hasher::new(), progress: Some(progress) };
        let mut stored = BufReader::with_capacity(128 << 10, stored);
        let path = layout.blob_path(&info.blob.digest);
        let fail = |e| MkfsError::io("read layer", &path, e);
        let decoder = match stored.fill_buf().map_err(fail)? {
            [0x1f, 0x8b, ..] => Decoder::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(stored))),
            // A frame, or a skippable frame in front of one.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Decoder::Zstd(zstd::stream::read::Decoder::with_buffer(stored).map_err(fail)?)
            }
            _ => Decoder::Plain(stored),
        };
        Ok(Self { tar: Tap { inner: decoder, hasher: Hasher::new(), progress: None }, info: info.clone() })
    }

    /// Checks the digests of both forms of the layer.
    pub(crate) fn finish(self) -> Result<(), MkfsError> {
        let LayerInfo { blob, diff_id } = self.info;
        let layer = blob.digest.to_string();
        let check = |what, expected: Digest, found: Digest| {
            if expected == found {
                return Ok(());
            }
            Err(MkfsError::LayerDigest {
                layer: layer.clone(),
                what,
                expected: expected.to_string(),
                found: found.to_string(),
            })
        };
        let stored = self.tar.inner.finish().map_err(|source| MkfsError::LayerRead {
            layer: layer.clone(),
            offset: blob.size,
            source,
        })?;
        check("the sha256 of its stored bytes", blob.digest, stored)?;
        check("the sha256 of its uncompressed tar (diff_id)", diff_id, self.tar.hasher.finish())
    }
}

impl Read for LayerStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tar.read(buffer)
    }
}
