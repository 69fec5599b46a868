//! The place that an image's name speaks of, and the documents in it.

use std::sync::Arc;

use crate::archive::Archive;
use crate::digest::Digest;
use crate::image::ImageError;
use crate::layout::{Layout, LayoutError};
use crate::local::off_thread as run;
use crate::oci::{self, Descriptor, Document, DocumentError, Flavour, ImageManifest, Platform, RawManifest};
use crate::origin::Origin;
use crate::reference::Reference;
use crate::registry::{RegistryOptions, Repository};
use crate::source::{ErrorClass, Source, SourceError};

/// Where images are read from, by what their name says.
#[derive(Clone)]
pub(crate) enum Place {
    Registry(Repository),
    Layout(Layout),
    Archive { archive: Archive, documents: Layout },
    Origin(Origin),
}

/// What a name came to.
pub(crate) struct Resolved {
    /// The manifest of one platform.
    pub(crate) raw: RawManifest,
    /// The same, parsed.
    pub(crate) manifest: ImageManifest,
    /// What the name itself selects: that manifest, or an index that leads to it.
    pub(crate) top: Digest,
}

impl Place {
    /// Opens the place that a name speaks of.
    pub(crate) async fn open(reference: &Reference, options: &RegistryOptions) -> Result<Self, ImageError> {
        let image = reference.to_string();
        match reference {
            Reference::Tree(dir) => Err(ImageError::Tree(dir.display().to_string())),
            Reference::Registry(name) => Repository::new(name, options)
                .map(Place::Registry)
                .map_err(|error| ImageError::Source { image, error }),
            Reference::Origin(origin) => Origin::new(origin, options)
                .map(Place::Origin)
                .map_err(|error| ImageError::Source { image, error }),
            Reference::Layout { dir, .. } => {
                let dir = dir.clone();
                let opened = run(move || Layout::open(dir)).await;
                opened.map(Place::Layout).map_err(|error| ImageError::Layout { image, error })
            }
            Reference::Archive { file, .. } => {
                let file = file.clone();
                let opened = run(move || {
                    let archive = Archive::open(file)?;
                    let documents = archive.documents()?;
                    Ok(Place::Archive { archive, documents })
                });
                opened.await.map_err(|error| ImageError::Archive { image, error })
            }
        }
    }

    pub(crate) fn source(&self) -> Arc<dyn Source> {
        match self {
            Place::Registry(registry) => Arc::new(registry.clone()),
            Place::Layout(layout) => Arc::new(layout.clone()),
            Place::Archive { archive, .. } => Arc::new(archive.clone()),
            Place::Origin(origin) => Arc::new(origin.clone()),
        }
    }

    /// The manifest or index that the name itself selects.
    pub(crate) async fn top(&self, reference: &Reference) -> Result<RawManifest, ImageError> {
        let image = reference.to_string();
        match (self, reference) {
            (Place::Registry(registry), Reference::Registry(name)) => {
                registry.manifest(&name.selector()).await.map_err(|error| ImageError::Source { image, error })
            }
            (Place::Origin(origin), Reference::Origin(name)) => {
                origin.top(name.tag()).await.map_err(|error| ImageError::Source { image, error })
            }
            (
                Place::Layout(layout) | Place::Archive { documents: layout, .. },
                Reference::Layout { tag, .. } | Reference::Archive { tag, .. },
            ) => {
                let (layout, tag) = (layout.clone(), tag.clone());
                let read = run(move || layout.manifest(&layout.resolve(tag.as_deref())?)).await;
                read.map_err(|error| ImageError::Layout { image, error })
            }
            // A place is opened from its own name.
            (_, other) => Err(ImageError::Tree(other.to_string())),
        }
    }

    /// The manifest that a descriptor of an index names.
    pub(crate) async fn child(
        &self,
        image: &str,
        descriptor: &Descriptor,
    ) -> Result<RawManifest, ImageError> {
        let document = |error: DocumentError| ImageError::Document { image: image.to_owned(), error };
        let blob = oci::blob_ref(descriptor).map_err(|error| document(error.into()))?;
        match self {
            Place::Registry(registry) => registry
                .manifest(&blob.digest.to_string())
                .await
                .map_err(|error| ImageError::Source { image: image.to_owned(), error }),
            Place::Origin(origin) => origin
                .manifest(descriptor)
                .await
                .map_err(|error| ImageError::Source { image: image.to_owned(), error }),
            Place::Layout(layout) | Place::Archive { documents: layout, .. } => {
                let (layout, descriptor) = (layout.clone(), descriptor.clone());
                run(move || layout.manifest(&descriptor))
                    .await
                    .map_err(|error| ImageError::Layout { image: image.to_owned(), error })
            }
        }
    }

    /// The manifest for one platform, through an index if there is one.
    pub(crate) async fn manifest(
        &self,
        reference: &Reference,
        platform: &Platform,
        flavour: Flavour,
    ) -> Result<Resolved, ImageError> {
        let image = reference.to_string();
        let document = |error: DocumentError| ImageError::Document { image: image.clone(), error };
        let mut raw = self.top(reference).await?;
        let top = raw.digest;
        // An index may name an index; deeper nesting has no use.
        for _ in 0..3 {
            match raw.parse().map_err(document)? {
                Document::Manifest(manifest) => return Ok(Resolved { raw, manifest: *manifest, top }),
                Document::Index(index) => {
                    let chosen = oci::choose(&index, platform, flavour).map_err(document)?;
                    raw = self.child(&image, chosen).await?;
                }
            }
        }
        Err(ImageError::Part {
            image,
            part: "index",
            digest: raw.digest,
            problem: "indexes are nested too deep".to_owned(),
        })
    }

    /// What lies under another tag beside the image, if anything does.
    pub(crate) async fn beside(&self, image: &str, tag: &str) -> Result<Option<RawManifest>, ImageError> {
        match self {
            Place::Registry(registry) => none_if_absent(image, registry.manifest(tag).await),
            Place::Origin(origin) => none_if_absent(image, origin.top(Some(tag)).await),
            Place::Layout(layout) | Place::Archive { documents: layout, .. } => {
                let (layout, tag) = (layout.clone(), tag.to_owned());
                match run(move || layout.manifest(&layout.resolve(Some(&tag))?)).await {
                    Ok(raw) => Ok(Some(raw)),
                    Err(LayoutError::NoImage { .. }) => Ok(None),
                    Err(error) => Err(ImageError::Layout { image: image.to_owned(), error }),
                }
            }
        }
    }

    /// The index of the manifests that refer to one, if the place keeps such a thing itself.
    pub(crate) async fn referrers(
        &self,
        image: &str,
        digest: &Digest,
        artifact_type: &str,
    ) -> Result<Option<RawManifest>, ImageError> {
        match self {
            Place::Registry(registry) => {
                none_if_absent(image, registry.referrers(digest, artifact_type).await)
            }
            Place::Origin(_) | Place::Layout(_) | Place::Archive { .. } => Ok(None),
        }
    }
}

fn none_if_absent(
    image: &str,
    result: Result<RawManifest, SourceError>,
) -> Result<Option<RawManifest>, ImageError> {
    match result {
        Ok(raw) => Ok(Some(raw)),
        Err(error) if error.class == ErrorClass::NotFound => Ok(None),
        Err(error) => Err(ImageError::Source { image: image.to_owned(), error }),
    }
}
