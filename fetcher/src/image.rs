//! Opening a converted image: from its name to a verified bootstrap and a source of its blobs.

mod bootstrap;

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::sync::Arc;

use self::bootstrap::BootstrapLayer;
use crate::archive::ArchiveError;
use crate::digest::{Digest, Hasher};
use crate::layout::LayoutError;
use crate::local::off_thread as run;
use crate::oci::{self, Descriptor, DocumentError, Flavour, ImageManifest, MAX_CONFIG, Platform};
use crate::place::{Place, Resolved};
use crate::reference::Reference;
use crate::registry::RegistryOptions;
use crate::retry::Backoff;
use crate::signature::{self, Keys};
use crate::source::{Blame, BlobRef, Body, ErrorClass, Source, SourceError, Urgency};

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// How to reach registries.
    pub registry: RegistryOptions,
    /// Which image of an index is wanted.
    pub platform: Platform,
    /// Largest bootstrap that is read, and largest bootstrap layer, in bytes.
    pub max_bootstrap: u64,
    /// Whether the image config is read, and the bootstrap layer checked against its DiffID too. The manifest's
    /// digest of the layer proves it either way.
    pub config: bool,
    /// Attempts in all, when a failure may pass.
    pub attempts: usize,
    /// The chain id (image spec) that the layers must have; the config is read for it.
    pub chain_id: Option<Digest>,
    /// Whose signature the image must have; `None` asks for none.
    pub signed_by: Option<Keys>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            registry: RegistryOptions::default(),
            platform: Platform::host(),
            max_bootstrap: 1 << 30,
            config: true,
            attempts: 5,
            chain_id: None,
            signed_by: None,
        }
    }
}

/// A converted image, open for reading.
#[derive(Clone)]
pub struct Remote {
    /// The name it was opened by.
    pub reference: Reference,
    /// Digest of the image's manifest.
    pub manifest_digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The image config, JSON as stored; empty when it was not asked for.
    pub config: Vec<u8>,
    /// The bootstrap file, verified against the manifest. Its inside is for the format's reader to check.
    pub bootstrap: Vec<u8>,
    /// The data blobs of the manifest, in its order.
    pub blobs: Vec<BlobRef>,
    /// Where the blobs' bytes come from.
    pub source: Arc<dyn Source>,
}

impl Remote {
    /// The data blob of that id (64 hexadecimal digits), with the size that the manifest states.
    pub fn blob(&self, id: &str) -> Option<BlobRef> {
        let digest = Digest::from_hex(id).ok()?;
        self.blobs.iter().find(|blob| blob.digest == digest).copied()
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote")
            .field("reference", &self.reference)
            .field("manifest_digest", &self.manifest_digest)
            .field("bootstrap_bytes", &self.bootstrap.len())
            .field("blobs", &self.blobs)
            .finish_non_exhaustive()
    }
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The source failed.
    #[error("image {image}: {error}")]
    Source {
        /// The image's name.
        image: String,
        /// What failed.
        error: SourceError,
    },
    /// The layout failed.
    #[error("image {image}: {error}")]
    Layout {
        /// The image's name.
        image: String,
        /// What failed.
        error: LayoutError,
    },
    /// The archive failed.
    #[error("image {image}: {error}")]
    Archive {
        /// The image's name.
        image: String,
        /// What failed.
        error: ArchiveError,
    },
    /// A manifest or index cannot be used.
    #[error("image {image}: {error}")]
    Document {
        /// The image's name.
        image: String,
        /// What is wrong with it.
        error: DocumentError,
    },
    /// A plain directory was named where an image is wanted.
    #[error("{0} is a plain directory, not an image; make one of it with: skimmer convert {0} IMAGE")]
    Tree(String),
    /// An image that was not converted.
    #[error(
        "image {image} (manifest {manifest}) is not converted: its last layer is not marked as a bootstrap; make a converted one with: skimmer convert {image} DESTINATION"
    )]
    NotConverted {
        /// The image's name.
        image: String,
        /// Its manifest.
        manifest: Digest,
    },
    /// An image without a signature that counts.
    #[error("image {image} (manifest {manifest}) is not signed by {keys}: {found}")]
    Unsigned {
        /// The image's name.
        image: String,
        /// Its manifest.
        manifest: Digest,
        /// Files of the keys that were to sign it.
        keys: String,
        /// What there was instead.
        found: String,
    },
    /// A layer or the config breaks a rule.
    #[error("image {image}: {part} {digest}: {problem}")]
    Part {
        /// The image's name.
        image: String,
        /// `bootstrap layer`, `config`, `data layer`.
        part: &'static str,
        /// Which one.
        digest: Digest,
        /// What is wrong, and at which byte where that is known.
        problem: String,
    },
}

/// A converted image of which the manifest is read.
pub struct Found {
    reference: Reference,
    options: OpenOptions,
    image: Image,
    manifest_digest: Digest,
    manifest: ImageManifest,
    blobs: Vec<BlobRef>,
}

/// Resolves the manifest of a converted image.
///
/// # Errors
/// The source fails, or the manifest is of no converted image.
pub async fn find(reference: &Reference, options: &OpenOptions) -> Result<Found, ImageError> {
    let place = Place::open(reference, &options.registry).await?;
    let image = Image { name: reference.to_string(), source: place.source() };
    let mut backoff = Backoff::new(options.attempts);
    let Resolved { raw, manifest, .. } = loop {
        match resolve(&place, reference, &image, options).await {
            Err(ImageError::Source { image, error }) => {
                backoff.wait(error).await.map_err(|error| ImageError::Source { image, error })?;
            }
            other => break other?,
        }
    };
    let blobs = image.data_blobs(&manifest)?;
    let (reference, options) = (reference.clone(), options.clone());
    Ok(Found { reference, options, image, manifest_digest: raw.digest, manifest, blobs })
}

async fn resolve(
    place: &Place,
    reference: &Reference,
    image: &Image,
    options: &OpenOptions,
) -> Result<Resolved, ImageError> {
    let resolved = place.manifest(reference, &options.platform, Flavour::PreferConverted).await?;
    if !oci::is_converted(&resolved.manifest) {
        let image = image.name.clone();
        return Err(ImageError::NotConverted { image, manifest: resolved.raw.digest });
    }
    if let Some(keys) = &options.signed_by {
        signature::demand(place, image, &resolved, keys).await?;
    }
    Ok(resolved)
}

impl Found {
    /// Where the blobs' bytes come from.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.image.source
    }

    /// The data blob that is wanted before all others, if the manifest names one.
    pub fn start_blob(&self) -> Option<BlobRef> {
        let is_start =
            |layer: &&Descriptor| oci::annotation(layer, oci::ANNOTATION_START_BLOB) == Some("true");
        let blob = oci::blob_ref(self.manifest.layers().iter().find(is_start)?).ok()?;
        self.blobs.contains(&blob).then_some(blob)
    }

    /// Reads config and bootstrap, and checks each against its digest.
    ///
    /// # Errors
    /// The source fails, or one of them breaks a rule.
    pub async fn open(self) -> Result<Remote, ImageError> {
        let mut backoff = Backoff::new(self.options.attempts);
        let (config, bootstrap) = loop {
            match self.parts().await {
                Err(ImageError::Source { image, error }) => {
                    backoff.wait(error).await.map_err(|error| ImageError::Source { image, error })?;
                }
                other => break other?,
            }
        };
        let Self { reference, image, manifest_digest, manifest, blobs, .. } = self;
        Ok(Remote { reference, manifest_digest, manifest, config, bootstrap, blobs, source: image.source })
    }

    async fn parts(&self) -> Result<(Vec<u8>, Vec<u8>), ImageError> {
        let Self { image, manifest, options, .. } = self;
        let config = async {
            if !options.config && options.chain_id.is_none() {
                return Ok((Vec::new(), None));
            }
            let blob = image.blob_ref(manifest.config())?;
            let config = image.read_small("config", &blob, MAX_CONFIG).await?;
            let diff_id = image.diff_id(&blob, &config, manifest.layers().len(), options.chain_id)?;
            Ok((config, Some(diff_id)))
        };
        let layer = manifest.layers().last().expect("a converted image ends with its bootstrap");
        let layer = BootstrapLayer::of(image, layer, options.max_bootstrap)?;
        // Side by side: each costs a round trip at least.
        let ((config, diff_id), file) =
            tokio::try_join!(config, image.spool(BootstrapLayer::PART, &layer.blob))?;
        Ok((config, layer.unpack(image, file, diff_id).await?))
    }
}

/// Opens a converted image: resolves its manifest, reads its config and bootstrap, and checks each against
/// its digest.
///
/// # Errors
/// As [`find`] and [`Found::open`].
pub async fn open(reference: &Reference, options: &OpenOptions) -> Result<Remote, ImageError> {
    find(reference, options).await?.open().await
}

/// What identifies layers that stand on each other: of the first its DiffID, then each time the digest of that and the
/// next DiffID.
fn chain(diff_ids: &[String]) -> String {
    let ids = diff_ids.iter().cloned();
    ids.reduce(|below, id| Digest::of(format!("{below} {id}").as_bytes()).to_string()).unwrap_or_default()
}

pub(crate) struct Image {
    pub(crate) name: String,
    source: Arc<dyn Source>,
}

impl Image {
    fn part(&self, part: &'static str, blob: &BlobRef, problem: impl Into<String>) -> ImageError {
        ImageError::Part { image: self.name.clone(), part, digest: blob.digest, problem: problem.into() }
    }

    fn failed(&self, error: SourceError) -> ImageError {
        ImageError::Source { image: self.name.clone(), error }
    }

    pub(crate) fn blob_ref(&self, descriptor: &Descriptor) -> Result<BlobRef, ImageError> {
        oci::blob_ref(descriptor)
            .map_err(|error| ImageError::Document { image: self.name.clone(), error: error.into() })
    }

    fn data_blobs(&self, manifest: &ImageManifest) -> Result<Vec<BlobRef>, ImageError> {
        let mut blobs: Vec<BlobRef> = Vec::new();
        for layer in manifest.layers() {
            if oci::annotation(layer, oci::ANNOTATION_RAFS_BLOB) != Some("true") {
                continue;
            }
            let blob = self.blob_ref(layer)?;
            match blobs.iter().find(|known| known.digest == blob.digest) {
                Some(known) if *known != blob => {
                    return Err(self.part("data layer", &blob, "it is listed twice, with different sizes"));
                }
                Some(_) => {}
                None => blobs.push(blob),
            }
        }
        Ok(blobs)
    }

    /// Reads a small blob and checks its digest.
    pub(crate) async fn read_small(
        &self,
        part: &'static str,
        blob: &BlobRef,
        cap: u64,
    ) -> Result<Vec<u8>, ImageError> {
        if blob.size == 0 || blob.size > cap {
            let problem = format!("{} bytes are none, or more than the {cap} that are read", blob.size);
            return Err(self.part(part, blob, problem));
        }
        let mut turns = self.source.width();
        loop {
            let (body, blame) = self.body(blob).await?;
            let bytes = body.collect().await.map_err(|error| self.failed(error))?;
            let got = Digest::of(&bytes);
            if got == blob.digest {
                return Ok(bytes);
            }
            self.wrong(part, blob, got, blame, &mut turns)?;
        }
    }

    /// A whole blob, and whom to tell when its bytes are wrong.
    async fn body(&self, blob: &BlobRef) -> Result<(Body, Option<Blame>), ImageError> {
        let body = self.source.read(blob, 0..blob.size, Urgency::Demand).await;
        let body = body.map_err(|error| self.failed(error))?;
        let blame = body.blame();
        Ok((body, blame))
    }

    /// Tells who sent wrong bytes; an error when there is no other host to turn to.
    fn wrong(
        &self,
        part: &'static str,
        blob: &BlobRef,
        got: Digest,
        blame: Option<Blame>,
        turns: &mut u32,
    ) -> Result<(), ImageError> {
        let sender = blame.map_or_else(|| self.source.name().to_owned(), |blame| blame(0..blob.size));
        *turns = turns.saturating_sub(1);
        if *turns == 0 {
            let detail = format!("{part} {}: its bytes are {got}", blob.digest);
            return Err(self.failed(SourceError::new(ErrorClass::Corrupt, sender, detail)));
        }
        tracing::warn!("image {}: {part} {}: its bytes from {sender} are {got}", self.name, blob.digest);
        Ok(())
    }

    /// The digest that the config gives for the unpacked bootstrap layer.
    fn diff_id(
        &self,
        blob: &BlobRef,
        config: &[u8],
        layers: usize,
        chain_id: Option<Digest>,
    ) -> Result<Digest, ImageError> {
        #[derive(serde::Deserialize)]
        struct Config {
            rootfs: RootFs,
        }
        #[derive(serde::Deserialize)]
        struct RootFs {
            diff_ids: Vec<String>,
        }
        let config: Config = serde_json::from_slice(config)
            .map_err(|error| self.part("config", blob, format!("it cannot be read: {error}")))?;
        let ids = config.rootfs.diff_ids;
        if ids.len() != layers {
            let problem = format!("{} DiffIDs for {layers} layers", ids.len());
            return Err(self.part("config", blob, problem));
        }
        let last = ids.last().map(String::as_str).unwrap_or_default();
        let last =
            last.parse().map_err(|error| self.part("config", blob, format!("last DiffID: {error}")))?;
        let found = chain(&ids);
        match chain_id {
            Some(wanted) if found != wanted.to_string() => {
                let problem = format!("its layers have the chain id {found}, not {wanted}");
                Err(self.part("config", blob, problem))
            }
            _ => Ok(last),
        }
    }

    /// Streams a blob into an unnamed file while its digest is computed.
    async fn spool(&self, part: &'static str, blob: &BlobRef) -> Result<File, ImageError> {
        let local = |error: io::Error| {
            self.failed(SourceError::new(
                ErrorClass::Io,
                "temporary file",
                format!("{part} {}: {error}", blob.digest),
            ))
        };
        let mut file = run(tempfile::tempfile).await.map_err(local)?;
        let mut turns = self.source.width();
        loop {
            let (mut body, blame) = self.body(blob).await?;
            let mut hasher = Hasher::new();
            while let Some(piece) = body.next().await {
                let piece = piece.map_err(|error| self.failed(error))?;
                let written = run(move || {
                    hasher.update(&piece);
                    file.write_all(&piece).map(|()| (file, hasher))
                });
                (file, hasher) = written.await.map_err(local)?;
            }
            let got = hasher.finish();
            file = run(move || file.seek(SeekFrom::Start(0)).map(|_| file)).await.map_err(local)?;
            if got == blob.digest {
                return Ok(file);
            }
            self.wrong(part, blob, got, blame, &mut turns)?;
        }
    }
}
