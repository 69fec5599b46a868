//! OCI documents: manifests, indexes, and the words of converted (RAFS) images in them.

pub use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};

use serde::Serialize;

use crate::digest::{Digest, DigestError};
use crate::source::BlobRef;

/// Media type of a RAFS data blob layer.
pub const MEDIA_TYPE_RAFS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// Annotation of a RAFS data blob layer.
pub const ANNOTATION_RAFS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// Annotation of the data blob layer that is wanted first, and whole: it can be asked for before the bootstrap is read.
pub const ANNOTATION_START_BLOB: &str = "containerd.io/snapshot/skimmer-start-blob";
/// Annotation of the bootstrap layer, always the last one.
pub const ANNOTATION_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Annotation of the bootstrap layer with the RAFS version, `"6"`.
pub const ANNOTATION_FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
/// Path of the bootstrap in its layer.
pub const BOOTSTRAP_PATH: &str = "image/image.boot";
/// `os.features` entry that marks the converted manifest in an index.
pub const OS_FEATURE_RAFS: &str = "nydus.remoteimage.v1";
/// Annotation that names an image in a layout's index.
pub const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Media type of an OCI image manifest.
pub const MEDIA_TYPE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const MEDIA_TYPE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker's media type of an image manifest.
pub const MEDIA_TYPE_DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's media type of an index.
pub const MEDIA_TYPE_DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Largest manifest or index that is read, 4 MiB as the distribution spec suggests.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image config that is read, 8 MiB.
pub const MAX_CONFIG: u64 = 8 << 20;

/// Why a manifest, an index or a descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not the JSON that its media type promises.
    #[error("manifest {digest}: {error}")]
    Json {
        /// The document.
        digest: Digest,
        /// What the parser said.
        error: oci_spec::OciSpecError,
    },
    /// Neither a manifest nor an index.
    #[error("manifest {digest} has the media type `{media_type}`, which is no image manifest and no index")]
    MediaType {
        /// The document.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The index holds no manifest that was asked for.
    #[error("the index has no manifest for {wanted}; it has: {available}")]
    Platform {
        /// The platform asked for.
        wanted: String,
        /// Those that are there.
        available: String,
    },
    /// A descriptor's digest is not one that we can check.
    #[error("descriptor: {0}")]
    Digest(#[from] DigestError),
}

/// A manifest or index byte for byte, with its verified digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Its media type, from the document itself or else from whoever sent it.
    pub media_type: String,
    /// sha256 of the bytes.
    pub digest: Digest,
}

/// A parsed [`RawManifest`].
#[derive(Clone, Debug)]
pub enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// A choice of images.
    Index(Box<ImageIndex>),
}

impl RawManifest {
    /// Takes bytes whose digest is computed here. `media_type` counts when the document has none.
    pub fn new(bytes: Vec<u8>, media_type: Option<&str>) -> Self {
        #[derive(serde::Deserialize)]
        struct Kind {
            #[serde(rename = "mediaType")]
            media_type: Option<String>,
        }
        let own = serde_json::from_slice::<Kind>(&bytes).ok().and_then(|kind| kind.media_type);
        let media_type = own.or_else(|| media_type.map(str::to_owned)).unwrap_or_default();
        Self { digest: Digest::of(&bytes), bytes, media_type }
    }

    /// Parses by media type.
    pub fn parse(&self) -> Result<Document, DocumentError> {
        let json = |error| DocumentError::Json { digest: self.digest, error };
        match self.media_type.as_str() {
            MEDIA_TYPE_MANIFEST | MEDIA_TYPE_DOCKER_MANIFEST => ImageManifest::from_reader(&self.bytes[..])
                .map(|manifest| Document::Manifest(Box::new(manifest)))
                .map_err(json),
            MEDIA_TYPE_INDEX | MEDIA_TYPE_DOCKER_INDEX => {
                parse_index(&self.bytes).map(|index| Document::Index(Box::new(index))).map_err(json)
            }
            other => Err(DocumentError::MediaType {
                digest: self.digest,
                media_type: other.chars().take(100).collect(),
            }),
        }
    }
}

/// Digest and size of what a descriptor names.
pub fn blob_ref(descriptor: &Descriptor) -> Result<BlobRef, DigestError> {
    let digest: &str = descriptor.digest().as_ref();
    Ok(BlobRef { digest: digest.parse()?, size: descriptor.size() })
}

/// An annotation of a descriptor.
pub fn annotation<'a>(descriptor: &'a Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

/// Whether the manifest is of a converted image: its last layer is marked as a bootstrap.
pub fn is_converted(manifest: &ImageManifest) -> bool {
    manifest.layers().last().is_some_and(|layer| annotation(layer, ANNOTATION_BOOTSTRAP) == Some("true"))
}

/// Keys of a platform object: what the spec says, and what `oci-spec` 0.10 reads and writes instead.
const PLATFORM_KEYS: [(&str, &str); 2] = [("os.features", "os_features"), ("os.version", "os_version")];

/// Reads an index, with the platforms' `os.features`, which `oci-spec` expects under another name.
pub(crate) fn parse_index(bytes: &[u8]) -> Result<ImageIndex, oci_spec::OciSpecError> {
    let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
    let manifests = value.get_mut("manifests").and_then(serde_json::Value::as_array_mut);
    for descriptor in manifests.into_iter().flatten() {
        let Some(platform) = descriptor.get_mut("platform").and_then(serde_json::Value::as_object_mut) else {
            continue;
        };
        for (spec, ours) in PLATFORM_KEYS {
            if let Some(found) = platform.remove(spec) {
                platform.insert(ours.to_owned(), found);
            }
        }
    }
    Ok(serde_json::from_value(value)?)
}

/// Serialises with all keys sorted, so that the same document always has the same bytes and digest (maps in
/// the OCI types have no order of their own), and with the spec's names for what `oci-spec` misnames.
pub fn canonical_json<T: Serialize>(document: &T) -> serde_json::Result<Vec<u8>> {
    fn sort(value: serde_json::Value, in_platform: bool) -> serde_json::Value {
        match value {
            serde_json::Value::Object(map) => {
                let rename = |key: String| {
                    let known = PLATFORM_KEYS.iter().find(|(_, ours)| in_platform && key == *ours);
                    known.map_or(key, |(spec, _)| (*spec).to_owned())
                };
                let mut entries: Vec<_> = map.into_iter().map(|(key, value)| (rename(key), value)).collect();
                entries.sort_by(|left, right| left.0.cmp(&right.0));
                let sorted = entries.into_iter().map(|(key, value)| {
                    let value = sort(value, key == "platform");
                    (key, value)
                });
                sorted.collect()
            }
            serde_json::Value::Array(items) => items.into_iter().map(|item| sort(item, false)).collect(),
            other => other,
        }
    }
    serde_json::to_vec(&sort(serde_json::to_value(document)?, false))
}

/// The platform whose image is wanted from an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// Go's name of the architecture: `amd64`, `arm64`.
    pub architecture: String,
    /// `v7`, `v8`; without one, any.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Parses `os/architecture[/variant]`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/').map(str::to_owned);
        let (os, architecture, variant) = (parts.next()?, parts.next()?, parts.next());
        let whole = parts.next().is_none() && !os.is_empty() && !architecture.is_empty();
        (whole && variant.as_deref() != Some("")).then_some(Self { os, architecture, variant })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// Which of two manifests for one platform is wanted when an index has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The converted one if it is there.
    PreferConverted,
    /// Only the plain one.
    Plain,
}

/// Picks the manifest for `platform` from an index. An index with a single manifest without a platform is
/// taken as that manifest.
pub fn choose<'a>(
    index: &'a ImageIndex,
    platform: &Platform,
    flavour: Flavour,
) -> Result<&'a Descriptor, DocumentError> {
    if let [only] = index.manifests().as_slice()
        && only.platform().is_none()
    {
        return Ok(only);
    }
    let converted = |descriptor: &Descriptor| {
        let features = descriptor.platform().as_ref().and_then(|platform| platform.os_features().as_ref());
        features.is_some_and(|features| features.iter().any(|feature| feature == OS_FEATURE_RAFS))
    };
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_some_and(|candidate| {
            candidate.os().to_string() == platform.os
                && candidate.architecture().to_string() == platform.architecture
                && (platform.variant.is_none() || *candidate.variant() == platform.variant)
        })
    };
    let candidates: Vec<&Descriptor> = index.manifests().iter().filter(fits).collect();
    let marked = candidates.iter().find(|descriptor| converted(descriptor));
    let plain = candidates.iter().find(|descriptor| !converted(descriptor));
    let found = match flavour {
        Flavour::PreferConverted => marked.or(plain),
        Flavour::Plain => plain,
    };
    found.copied().ok_or_else(|| {
        let names = index.manifests().iter().map(|descriptor| match descriptor.platform() {
            None => "(no platform)".to_owned(),
            Some(platform) => {
                let features = if converted(descriptor) { " (converted)" } else { "" };
                format!("{}/{}{features}", platform.os(), platform.architecture())
            }
        });
        DocumentError::Platform {
            wanted: platform.to_string(),
            available: names.take(20).collect::<Vec<_>>().join(", "),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &[(&str, &str, bool)]) -> ImageIndex {
        let manifests: Vec<_> = entries
            .iter()
            .enumerate()
            .map(|(size, (os, architecture, converted))| {
                let mut platform = serde_json::json!({"os": os, "architecture": architecture});
                if *converted {
                    platform["os.features"] = serde_json::json!([OS_FEATURE_RAFS]);
                }
                serde_json::json!({
                    "mediaType": MEDIA_TYPE_MANIFEST, "digest": Digest::of(b"").to_string(),
                    "size": size, "platform": platform,
                })
            })
            .collect();
        let index =
            serde_json::json!({"schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": manifests});
        parse_index(index.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn os_features_keep_their_name() {
        let text = canonical_json(&index(&[("linux", "amd64", true)])).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(r#""os.features":["nydus.remoteimage.v1"]"#), "{text}");
        assert!(!text.contains("os_features"), "{text}");
    }

    #[test]
    fn picks_platform_and_flavour() {
        let amd64 = Platform::parse("linux/amd64").unwrap();
        let both = index(&[("linux", "arm64", false), ("linux", "amd64", false), ("linux", "amd64", true)]);
        assert_eq!(choose(&both, &amd64, Flavour::PreferConverted).unwrap().size(), 2);
        assert_eq!(choose(&both, &amd64, Flavour::Plain).unwrap().size(), 1);
        let plain = index(&[("linux", "amd64", false)]);
        assert_eq!(choose(&plain, &amd64, Flavour::PreferConverted).unwrap().size(), 0);
        let other = index(&[("windows", "amd64", false), ("linux", "s390x", true)]);
        let error = choose(&other, &amd64, Flavour::PreferConverted).unwrap_err().to_string();
        assert!(error.contains("linux/amd64") && error.contains("linux/s390x (converted)"), "{error}");
    }

    #[test]
    fn json_is_canonical() {
        let value = serde_json::json!({"b": {"z": 1, "a": [{"y": 1, "x": 2}]}, "a": 1});
        assert_eq!(canonical_json(&value).unwrap(), br#"{"a":1,"b":{"a":[{"x":2,"y":1}],"z":1}}"#);
    }

    #[test]
    fn documents_are_told_apart() {
        let raw = RawManifest::new(b"{}".to_vec(), Some("text/html"));
        assert!(matches!(raw.parse(), Err(DocumentError::MediaType { .. })));
        let raw = RawManifest::new(b"{}".to_vec(), Some(MEDIA_TYPE_MANIFEST));
        assert!(matches!(raw.parse(), Err(DocumentError::Json { .. })));
        let text = format!(r#"{{"schemaVersion":2,"mediaType":"{MEDIA_TYPE_INDEX}","manifests":[]}}"#);
        let raw = RawManifest::new(text.into_bytes(), Some(MEDIA_TYPE_MANIFEST));
        assert!(matches!(raw.parse(), Ok(Document::Index(_))));
    }
}
