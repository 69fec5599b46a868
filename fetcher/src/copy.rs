//! Copying images between registries, layouts and archives, byte for byte.
//!
//! Everything goes through a layout: a registry is pulled into one and pushed from one, an archive is
//! unpacked into one and packed from one. Blobs that are there already are not moved again, and every blob's
//! digest is checked on its way.

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use crate::archive::{Archive, ArchiveError};
use crate::digest::Digest;
use crate::image::ImageError;
use crate::layout::{Layout, LayoutError};
use crate::local::off_thread as run;
use crate::oci::{self, Descriptor, Document, DocumentError, Flavour, ImageManifest, Platform, RawManifest};
use crate::place::Place;
use crate::reference::{Reference, RegistryRef};
use crate::registry::{Registry, RegistryOptions, SentFn};
use crate::retry::Backoff;
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency};

/// Which images of an index are copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Images {
    /// The whole index.
    All,
    /// The one for a platform; without an index, the image itself.
    One(Platform, Flavour),
}

/// What a copy tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A blob is about to move.
    Start(BlobRef),
    /// More bytes of a blob have moved. After a retry of an upload bytes are told again.
    Bytes(Digest, u64),
    /// A blob is at its destination.
    Done(BlobRef),
    /// A blob was at its destination already.
    Skipped(BlobRef),
}

/// Receives [`Progress`], on any thread.
pub type ProgressFn = Arc<dyn Fn(Progress) + Send + Sync>;

/// How to copy.
#[derive(Clone)]
pub struct CopyOptions {
    /// How to reach registries.
    pub registry: RegistryOptions,
    /// What of an index to copy.
    pub images: Images,
    /// Blobs that move at the same time.
    pub parallel: usize,
    /// Attempts at each request that may pass.
    pub attempts: usize,
    /// Told what happens.
    pub progress: Option<ProgressFn>,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            registry: RegistryOptions::default(),
            images: Images::All,
            parallel: 4,
            attempts: 6,
            progress: None,
        }
    }
}

impl std::fmt::Debug for CopyOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyOptions")
            .field("registry", &self.registry)
            .field("images", &self.images)
            .field("parallel", &self.parallel)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

impl CopyOptions {
    fn tell(&self, progress: Progress) {
        if let Some(tell) = &self.progress {
            tell(progress);
        }
    }
}

/// What a copy did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyReport {
    /// Digest of the manifest or index that was copied.
    pub digest: Digest,
    /// Blobs moved.
    pub copied: u64,
    /// Their bytes.
    pub copied_bytes: u64,
    /// Blobs that were there already.
    pub skipped: u64,
}

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A registry or file failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layout failed.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// An archive failed.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A manifest cannot be used.
    #[error("{image}: {error}")]
    Document {
        /// The image.
        image: String,
        /// What is wrong.
        error: DocumentError,
    },
    /// The destination cannot be written.
    #[error("{0}")]
    Destination(String),
}

/// Copies an image. The destination gets the name that its reference has.
pub async fn copy(from: &Reference, to: &Reference, options: &CopyOptions) -> Result<CopyReport, CopyError> {
    match (from, to) {
        (_, Reference::Tree(dir)) => Err(CopyError::Destination(format!(
            "{} is a plain directory, which holds no image",
            dir.display()
        ))),
        (_, Reference::Origin(name)) => Err(CopyError::Destination(format!(
            "{name}: images are only read from there; make oci:DIR and copy it there with the server's own tools"
        ))),
        (_, Reference::Layout { dir, tag }) => {
            let dir = dir.clone();
            let layout = run(move || Layout::open_or_create(dir)).await?;
            pull(from, &layout, tag.as_deref(), options).await
        }
        (Reference::Layout { dir, tag }, Reference::Registry(name)) => {
            let dir = dir.clone();
            let layout = run(move || Layout::open(dir)).await?;
            push(&layout, tag.as_deref(), name, options).await
        }
        (_, Reference::Registry(name)) => {
            let (_dir, layout) = scratch().await?;
            pull(from, &layout, None, options).await?;
            let quiet = CopyOptions { images: Images::All, ..options.clone() };
            push(&layout, None, name, &quiet).await
        }
        (_, Reference::Archive { file, tag }) => {
            let (_dir, layout) = scratch().await?;
            let report = pull(from, &layout, tag.as_deref(), options).await?;
            let file = file.clone();
            run(move || Archive::pack(&layout, file)).await?;
            Ok(report)
        }
    }
}

async fn scratch() -> Result<(tempfile::TempDir, Layout), CopyError> {
    run(|| {
        let dir = tempfile::tempdir()
            .map_err(|error| CopyError::Destination(format!("temporary directory: {error}")))?;
        let layout = Layout::create(dir.path())?;
        Ok((dir, layout))
    })
    .await
}

/// All that belongs to an image: documents in the order in which they may be stored, and blobs.
struct Contents {
    top: RawManifest,
    /// Manifests below the top, children before parents.
    children: Vec<RawManifest>,
    blobs: Vec<BlobRef>,
}

/// Most manifests that one index may lead to.
const MAX_MANIFESTS: usize = 256;

async fn contents(place: &Place, from: &Reference, images: &Images) -> Result<Contents, CopyError> {
    let image = from.to_string();
    let document = |error: DocumentError| CopyError::Document { image: image.clone(), error };
    let top = match images {
        Images::All => place.top(from).await?,
        Images::One(platform, flavour) => place.manifest(from, platform, *flavour).await?.raw,
    };
    let (mut children, mut blobs, mut seen) = (Vec::new(), Vec::new(), HashSet::from([top.digest]));
    let mut waiting: Vec<Descriptor> = Vec::new();
    let mut next = Some(top.clone());
    while let Some(raw) = next.take() {
        match raw.parse().map_err(document)? {
            Document::Manifest(manifest) => add_blobs(&manifest, &mut blobs).map_err(document)?,
            Document::Index(index) => waiting.extend(index.manifests().iter().cloned()),
        }
        if raw.digest != top.digest {
            children.push(raw);
        }
        while let Some(descriptor) = waiting.pop() {
            let blob = oci::blob_ref(&descriptor).map_err(|error| document(error.into()))?;
            if seen.len() >= MAX_MANIFESTS {
                let detail = format!("{image}: the index leads to more than {MAX_MANIFESTS} manifests");
                return Err(SourceError::new(ErrorClass::Unsupported, image, detail).into());
            }
            if seen.insert(blob.digest) {
                next = Some(place.child(&image, &descriptor).await?);
                break;
            }
        }
    }
    // Found from the top down; registries want what is pointed at before what points.
    children.reverse();
    let mut known = HashSet::new();
    blobs.retain(|blob: &BlobRef| known.insert(*blob));
    Ok(Contents { top, children, blobs })
}

fn add_blobs(manifest: &ImageManifest, blobs: &mut Vec<BlobRef>) -> Result<(), DocumentError> {
    blobs.push(oci::blob_ref(manifest.config())?);
    for layer in manifest.layers() {
        // A layer with URLs of its own is not in the registry (and may not be distributed).
        if layer.urls().as_ref().is_none_or(Vec::is_empty) {
            blobs.push(oci::blob_ref(layer)?);
        }
    }
    Ok(())
}

fn descriptor_of(raw: &RawManifest) -> Result<Descriptor, CopyError> {
    let size = u64::try_from(raw.bytes.len()).expect("usize fits in 64 bits");
    let digest: oci_spec::image::Digest =
        raw.digest.to_string().parse().expect("our digests are valid OCI digests");
    Ok(Descriptor::new(oci::MediaType::from(raw.media_type.as_str()), size, digest))
}

/// Copies an image from anywhere into a layout, and names it there.
pub async fn pull(
    from: &Reference,
    to: &Layout,
    tag: Option<&str>,
    options: &CopyOptions,
) -> Result<CopyReport, CopyError> {
    let place = Place::open(from, &options.registry).await?;
    let found = retry(options, || contents(&place, from, &options.images)).await?;
    let source = place.source();
    // After a failure the others stop by themselves, so that none leaves an unfinished file behind.
    let stop = AtomicBool::new(false);
    let moved: Vec<Result<Option<u64>, CopyError>> = stream::iter(found.blobs.clone())
        .map(|blob| {
            let (source, stop) = (Arc::clone(&source), &stop);
            async move {
                let result = pull_blob(&*source, to, blob, stop, options).await;
                stop.fetch_or(result.is_err(), Ordering::Relaxed);
                result
            }
        })
        .buffer_unordered(options.parallel.max(1))
        .collect()
        .await;
    let moved = moved.into_iter().collect::<Result<Vec<_>, _>>()?;
    let (layout, top, tag) = (to.clone(), found.top.clone(), tag.map(str::to_owned));
    let children = found.children;
    run(move || {
        for raw in children.iter().chain([&top]) {
            layout.put_blob(&raw.bytes)?;
        }
        layout.add_image(descriptor_of(&top)?, tag.as_deref())?;
        Ok::<_, CopyError>(())
    })
    .await?;
    Ok(report(found.top.digest, &moved))
}

fn report(digest: Digest, moved: &[Option<u64>]) -> CopyReport {
    let sum = |values: &mut dyn Iterator<Item = u64>| values.fold(0u64, u64::saturating_add);
    CopyReport {
        digest,
        copied: sum(&mut moved.iter().flatten().map(|_| 1)),
        copied_bytes: sum(&mut moved.iter().flatten().copied()),
        skipped: sum(&mut moved.iter().filter(|moved| moved.is_none()).map(|_| 1)),
    }
}

/// Moves one blob into a layout; `None` when it was there, or when `stop` was set.
async fn pull_blob(
    source: &dyn Source,
    to: &Layout,
    blob: BlobRef,
    stop: &AtomicBool,
    options: &CopyOptions,
) -> Result<Option<u64>, CopyError> {
    if stop.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let layout = to.clone();
    if run(move || layout.has_blob(&blob)).await? {
        options.tell(Progress::Skipped(blob));
        return Ok(None);
    }
    options.tell(Progress::Start(blob));
    // A source with several hosts may have a right one behind a wrong one.
    for turn in 1..=source.width() {
        match pull_once(source, to, blob, stop, options).await {
            Err(CopyError::Layout(LayoutError::BadBlob { .. })) if turn < source.width() => {}
            other => return other,
        }
    }
    Ok(None)
}

async fn pull_once(
    source: &dyn Source,
    to: &Layout,
    blob: BlobRef,
    stop: &AtomicBool,
    options: &CopyOptions,
) -> Result<Option<u64>, CopyError> {
    let layout = to.clone();
    let mut writer = Some(run(move || layout.blob_writer()).await?);
    let mut senders = Vec::new();
    let mut at = 0;
    let mut backoff = Backoff::new(options.attempts);
    while at < blob.size {
        // An interrupted transfer goes on where it stopped.
        let before = at;
        let result = match source.read(&blob, at..blob.size, Urgency::Demand).await {
            Ok(body) => {
                senders.extend(body.blame().map(|blame| (at, blame)));
                pull_range(body, to, &blob, &mut at, &mut writer, stop, options).await
            }
            Err(error) => Err(error.into()),
        };
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if let Err(CopyError::Source(error)) = result {
            if at > before {
                backoff = Backoff::new(options.attempts);
            }
            backoff.wait(error).await?;
        } else {
            result?;
        }
    }
    if let Some(writer) = writer {
        let finished = run(move || writer.finish_as(&blob)).await;
        if let Err(error @ LayoutError::BadBlob { .. }) = &finished {
            for (from, blame) in senders {
                tracing::warn!("from {}: {error}", blame(from..blob.size));
            }
        }
        finished?;
    }
    options.tell(Progress::Done(blob));
    Ok(Some(blob.size))
}

async fn pull_range(
    mut body: Body,
    to: &Layout,
    blob: &BlobRef,
    at: &mut u64,
    writer: &mut Option<crate::layout::BlobWriter>,
    stop: &AtomicBool,
    options: &CopyOptions,
) -> Result<(), CopyError> {
    while let Some(piece) = body.next().await {
        let piece = piece?;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let count = u64::try_from(piece.len()).expect("usize fits in 64 bits");
        if let Some(mut open) = writer.take() {
            let (back, written) = run(move || {
                let written = open.write_all(&piece);
                (open, written)
            })
            .await;
            *writer = Some(back);
            written.map_err(|error| LayoutError::Io { path: to.blob_path(&blob.digest), error })?;
        }
        *at += count;
        options.tell(Progress::Bytes(blob.digest, count));
    }
    Ok(())
}

/// Copies an image from a layout to a registry, under the tag of `to`, or under its digest when that has none.
pub async fn push(
    from: &Layout,
    tag: Option<&str>,
    to: &RegistryRef,
    options: &CopyOptions,
) -> Result<CopyReport, CopyError> {
    let reference = Reference::Layout { dir: from.root().to_owned(), tag: tag.map(str::to_owned) };
    let found = contents(&Place::Layout(from.clone()), &reference, &options.images).await?;
    if let Some(digest) = to.digest().filter(|digest| **digest != found.top.digest) {
        let problem = format!("{to} asks for {digest}, the image is {}", found.top.digest);
        return Err(CopyError::Destination(problem));
    }
    let registry = Registry::new(to, &options.registry)?;
    let moved: Vec<Option<u64>> = stream::iter(found.blobs.clone())
        .map(|blob| {
            let (registry, from) = (registry.clone(), from.clone());
            async move { push_blob(&from, &registry, blob, options).await }
        })
        .buffer_unordered(options.parallel.max(1))
        .try_collect()
        .await?;
    for raw in &found.children {
        retry(options, || async { Ok(registry.put_manifest(raw, None).await?) }).await?;
    }
    retry(options, || async { Ok(registry.put_manifest(&found.top, to.tag()).await?) }).await?;
    Ok(report(found.top.digest, &moved))
}

async fn push_blob(
    from: &Layout,
    registry: &Registry,
    blob: BlobRef,
    options: &CopyOptions,
) -> Result<Option<u64>, CopyError> {
    let layout = from.clone();
    run(move || layout.open_blob(&blob)).await?;
    if !retry(options, || async { Ok(registry.needs_blob(&blob).await?) }).await? {
        options.tell(Progress::Skipped(blob));
        return Ok(None);
    }
    options.tell(Progress::Start(blob));
    let path = from.blob_path(&blob.digest);
    let sent = options
        .progress
        .clone()
        .map(|tell| -> SentFn { Arc::new(move |count| tell(Progress::Bytes(blob.digest, count))) });
    retry(options, || async { Ok(registry.put_blob(&blob, &path, sent.clone()).await?) }).await?;
    options.tell(Progress::Done(blob));
    Ok(Some(blob.size))
}

async fn retry<T, F>(options: &CopyOptions, mut attempt: impl FnMut() -> F) -> Result<T, CopyError>
where
    F: Future<Output = Result<T, CopyError>>,
{
    let mut backoff = Backoff::new(options.attempts);
    loop {
        match attempt().await {
            Err(CopyError::Source(error) | CopyError::Image(ImageError::Source { error, .. })) => {
                backoff.wait(error).await?;
            }
            other => return other,
        }
    }
}
