//! An OCI layout behind a URL: on a web server (`https://HOST/PATH`) or in an S3 bucket (`s3://BUCKET/PATH`).
//!
//! What is there is what `skimmer convert … oci:DIR` makes, copied with any tool: `index.json`, and blobs under
//! `blobs/sha256/`. The index is believed as far as a registry's tag would be; all else is checked by digest.

use std::ops::Range;
use std::sync::Arc;

use crate::bucket::Bucket;
use crate::layout::Layout;
use crate::local::off_thread;
use crate::oci::{self, Descriptor, RawManifest};
use crate::reference::OriginRef;
use crate::registry::{Registry, RegistryOptions};
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency};
use crate::sources::Sources;

/// Largest `index.json` that is read.
pub(crate) const MAX_INDEX: u64 = 4 << 20;

/// A layout behind a URL. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    name: Arc<str>,
    kind: Kind,
    blobs: Sources,
}

#[derive(Clone)]
enum Kind {
    Web(Registry),
    Bucket(Bucket),
}

impl Origin {
    /// A layout behind a URL. No request is made yet.
    ///
    /// # Errors
    /// When the URL or what is configured for it cannot be used.
    pub fn new(reference: &OriginRef, options: &RegistryOptions) -> Result<Self, SourceError> {
        let name = reference.url().as_str().trim_end_matches('/');
        let (kind, source): (_, Arc<dyn Source>) = if reference.url().scheme() == "s3" {
            let bucket = Bucket::new(reference.url(), options)?;
            (Kind::Bucket(bucket.clone()), Arc::new(bucket))
        } else {
            let web = Registry::of_files(reference.url(), options)?;
            (Kind::Web(web.clone()), Arc::new(web))
        };
        let blobs = Sources::new(name, [(source, options.pool.health(reference.url(), false))]);
        Ok(Self { name: name.into(), kind, blobs })
    }

    fn error(&self, class: ErrorClass, detail: impl Into<Box<str>>) -> SourceError {
        SourceError::new(class, &*self.name, detail)
    }

    /// The manifest or index that a tag names; without one, the only image.
    pub(crate) async fn top(&self, tag: Option<&str>) -> Result<RawManifest, SourceError> {
        let index = match &self.kind {
            Kind::Web(web) => web.file("index.json", MAX_INDEX).await?,
            Kind::Bucket(bucket) => bucket.file("index.json", MAX_INDEX).await?,
        };
        let (tag, name) = (tag.map(str::to_owned), Arc::clone(&self.name));
        let chosen = off_thread(move || Layout::choose(&index, &name, tag.as_deref())).await;
        let chosen = chosen.map_err(|error| {
            let class = match &error {
                crate::layout::LayoutError::NoImage { .. } => ErrorClass::NotFound,
                _ => ErrorClass::BadReply,
            };
            self.error(class, error.to_string())
        })?;
        self.manifest(&chosen).await
    }

    /// The manifest that a descriptor names.
    pub(crate) async fn manifest(&self, descriptor: &Descriptor) -> Result<RawManifest, SourceError> {
        let blob =
            oci::blob_ref(descriptor).map_err(|error| self.error(ErrorClass::BadReply, error.to_string()))?;
        if blob.size == 0 || blob.size > MAX_INDEX {
            let detail = format!("manifest {blob}: none, or more than the {MAX_INDEX} bytes that are read");
            return Err(self.error(ErrorClass::BadReply, detail));
        }
        let bytes = self.blobs.read(&blob, 0..blob.size, Urgency::Demand).await?.collect().await?;
        let raw = RawManifest::new(bytes, Some(descriptor.media_type().as_ref()));
        if raw.digest != blob.digest {
            let detail = format!("manifest {}: the bytes are {}", blob.digest, raw.digest);
            return Err(self.error(ErrorClass::Corrupt, detail));
        }
        Ok(raw)
    }
}

#[async_trait::async_trait]
impl Source for Origin {
    fn name(&self) -> &str {
        &self.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, urgency: Urgency) -> Result<Body, SourceError> {
        self.blobs.read(blob, range, urgency).await
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        self.blobs.has(blob).await
    }
}
