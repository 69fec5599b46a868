//! An OCI image layout on disk: content-addressed blobs, and an index that names images.
//!
//! Everything here is synchronous, for the image builder as well as for the tokio side.

use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};
use crate::oci::{
    self, ANNOTATION_REF_NAME, Descriptor, Document, DocumentError, ImageIndex, MAX_MANIFEST, RawManifest,
};
use crate::source::BlobRef;

/// An open layout. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
    name: String,
}

/// Why a layout cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The file system failed.
    #[error("OCI layout: {path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The directory is not a layout.
    #[error("{path} is no OCI layout: {problem}")]
    NotALayout {
        /// The directory.
        path: PathBuf,
        /// What is missing or wrong.
        problem: String,
    },
    /// A document of the layout cannot be used.
    #[error("OCI layout {path}: {error}")]
    Document {
        /// The layout.
        path: PathBuf,
        /// What is wrong with the document.
        error: DocumentError,
    },
    /// The blob is not there.
    #[error("OCI layout {path}: blob {digest} is missing")]
    MissingBlob {
        /// The layout.
        path: PathBuf,
        /// The blob.
        digest: Digest,
    },
    /// The blob has other bytes than its name or its descriptor says.
    #[error("OCI layout {path}: blob {digest}: {problem}")]
    BadBlob {
        /// The layout.
        path: PathBuf,
        /// The blob.
        digest: Digest,
        /// Which check failed.
        problem: String,
    },
    /// The index has no image of that name, or more than one to choose from.
    #[error("OCI layout {path}: {problem}; it has: {available}")]
    NoImage {
        /// The layout.
        path: PathBuf,
        /// What was asked.
        problem: String,
        /// Names in the index.
        available: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Marker {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

const VERSION: &str = "1.0.0";
/// Largest `index.json` and `oci-layout` that are read.
const MAX_INDEX: u64 = 64 << 20;

type Result<T> = std::result::Result<T, LayoutError>;

fn at(path: &Path) -> impl FnOnce(io::Error) -> LayoutError + '_ {
    |error| LayoutError::Io { path: path.to_owned(), error }
}

fn read_capped(path: &Path, cap: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(cap + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > cap) {
        return Err(io::Error::other(format!("larger than {cap} bytes")));
    }
    Ok(bytes)
}

impl Layout {
    fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), name: format!("oci:{}", root.display()) }
    }

    /// Opens an existing layout.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        let bad = |problem: String| LayoutError::NotALayout { path: root.to_owned(), problem };
        let marker = match read_capped(&root.join("oci-layout"), 4096) {
            Ok(marker) => marker,
            Err(error) if error.kind() == io::ErrorKind::NotFound && root.is_dir() => {
                return Err(bad("it has no file `oci-layout`".to_owned()));
            }
            Err(error) => return Err(at(&root.join("oci-layout"))(error)),
        };
        let marker: Marker =
            serde_json::from_slice(&marker).map_err(|error| bad(format!("file `oci-layout`: {error}")))?;
        if !marker.version.starts_with("1.") {
            return Err(bad(format!("its version is `{}`, not {VERSION}", marker.version)));
        }
        let layout = Self::at(root);
        layout.index()?;
        Ok(layout)
    }

    /// Makes an empty layout in `root`, which must not exist or be an empty directory.
    pub fn create(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        fs::create_dir_all(root).map_err(at(root))?;
        if fs::read_dir(root).map_err(at(root))?.next().is_some() {
            return Err(LayoutError::NotALayout {
                path: root.to_owned(),
                problem: "the directory is not empty; give an empty or a new one".to_owned(),
            });
        }
        let layout = Self::at(root);
        let blobs = root.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(at(&blobs))?;
        let index = ImageIndex::default();
        layout.write_index(&index)?;
        let marker = oci::canonical_json(&Marker { version: VERSION.to_owned() })
            .expect("a struct of one string serialises");
        // Last, so that a half-made directory is not taken for a layout.
        layout.replace(&root.join("oci-layout"), &marker)?;
        Ok(layout)
    }

    /// Opens the layout in `root`, or makes one when the directory does not exist or is empty.
    pub fn open_or_create(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        if root.join("oci-layout").exists() { Self::open(root) } else { Self::create(root) }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `oci:` and the directory, for messages.
    pub(crate) fn label(&self) -> &str {
        &self.name
    }

    /// Path of a blob's file, whether it exists or not.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whether the blob is there with the right size. Its digest is not computed.
    pub fn has_blob(&self, blob: &BlobRef) -> Result<bool> {
        let path = self.blob_path(&blob.digest);
        match fs::metadata(&path) {
            Ok(meta) => Ok(meta.is_file() && meta.len() == blob.size),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Opens a blob's file after checking that it is a regular file of the stated size.
    pub fn open_blob(&self, blob: &BlobRef) -> Result<File> {
        let path = self.blob_path(&blob.digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LayoutError::MissingBlob { path: self.root.clone(), digest: blob.digest });
            }
            Err(error) => return Err(at(&path)(error)),
        };
        let meta = file.metadata().map_err(at(&path))?;
        if !meta.is_file() || meta.len() != blob.size {
            let problem = format!("{} bytes, its descriptor says {}", meta.len(), blob.size);
            return Err(self.bad_blob(&blob.digest, problem));
        }
        Ok(file)
    }

    fn bad_blob(&self, digest: &Digest, problem: String) -> LayoutError {
        LayoutError::BadBlob { path: self.root.clone(), digest: *digest, problem }
    }

    /// Reads a small blob whole and checks its digest. `cap` bounds its size.
    pub fn read_blob(&self, blob: &BlobRef, cap: u64) -> Result<Vec<u8>> {
        if blob.size > cap {
            let problem = format!("{} bytes are more than the {cap} that are read", blob.size);
            return Err(self.bad_blob(&blob.digest, problem));
        }
        let mut bytes = Vec::new();
        self.open_blob(blob)?.take(cap).read_to_end(&mut bytes).map_err(at(&self.blob_path(&blob.digest)))?;
        let got = Digest::of(&bytes);
        if got != blob.digest {
            return Err(self.bad_blob(&blob.digest, format!("its bytes are {got}")));
        }
        Ok(bytes)
    }

    /// Stores a small blob.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<BlobRef> {
        let mut writer = self.blob_writer()?;
        let path = writer.path();
        writer.write_all(bytes).map_err(at(&path))?;
        writer.finish()
    }

    /// Starts a blob of unknown digest; [`BlobWriter::finish`] names it.
    pub fn blob_writer(&self) -> Result<BlobWriter> {
        let dir = self.root.join("blobs/sha256");
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        let file = tempfile::Builder::new()
            .prefix(".partial-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(&dir)
            .map_err(at(&dir))?;
        Ok(BlobWriter { layout: self.clone(), file, hasher: Hasher::new(), written: 0 })
    }

    /// The image that a tag names in the bytes of an `index.json`, or the only one; `place` is for messages.
    pub(crate) fn choose(index: &[u8], place: &str, tag: Option<&str>) -> Result<Descriptor> {
        let path = PathBuf::from(place);
        let index = oci::parse_index(index).map_err(|error| LayoutError::NotALayout {
            path,
            problem: format!("file `index.json`: {error}"),
        })?;
        Self::at(Path::new(place)).pick(&index, tag)
    }

    /// The index of images.
    pub fn index(&self) -> Result<ImageIndex> {
        let path = self.root.join("index.json");
        let bytes = read_capped(&path, MAX_INDEX).map_err(at(&path))?;
        oci::parse_index(&bytes).map_err(|error| LayoutError::NotALayout {
            path: self.root.clone(),
            problem: format!("file `index.json`: {error}"),
        })
    }

    fn write_index(&self, index: &ImageIndex) -> Result<()> {
        let path = self.root.join("index.json");
        let bytes = oci::canonical_json(index).map_err(|error| at(&path)(io::Error::other(error)))?;
        self.replace(&path, &bytes)
    }

    /// Writes a whole file: readers see the old one or the new one.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = tempfile::Builder::new()
                .prefix(".partial-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                .tempfile_in(&self.root)?;
            file.write_all(bytes)?;
            file.as_file().sync_data()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(at(path))
    }

    /// Lists the image in the index. With a tag, it takes the name away from the image that had it;
    /// without one, it is added unless it is there.
    pub fn add_image(&self, mut descriptor: Descriptor, tag: Option<&str>) -> Result<()> {
        let mut index = self.index()?;
        let mut manifests = index.manifests().clone();
        if let Some(tag) = tag {
            manifests.retain(|entry| oci::annotation(entry, ANNOTATION_REF_NAME) != Some(tag));
            let mut annotations = descriptor.annotations().clone().unwrap_or_default();
            annotations.insert(ANNOTATION_REF_NAME.to_owned(), tag.to_owned());
            descriptor.set_annotations(Some(annotations));
        } else {
            // An image without a name takes the place of the one before it, as one with a name does: making an image
            // twice must not leave two that cannot be told apart.
            manifests.retain(|entry| oci::annotation(entry, ANNOTATION_REF_NAME).is_some());
        }
        manifests.push(descriptor);
        index.set_manifests(manifests);
        index.set_media_type(Some(oci::MediaType::ImageIndex));
        self.write_index(&index)
    }

    /// The descriptor of an image: by tag, or the only one of the index.
    pub fn resolve(&self, tag: Option<&str>) -> Result<Descriptor> {
        self.pick(&self.index()?, tag)
    }

    fn pick(&self, index: &ImageIndex, tag: Option<&str>) -> Result<Descriptor> {
        let entries = index.manifests();
        let none = |problem: String| LayoutError::NoImage {
            path: self.root.clone(),
            problem,
            available: name_all(entries),
        };
        match tag {
            Some(tag) => entries
                .iter()
                .find(|entry| {
                    let digest: &str = entry.digest().as_ref();
                    oci::annotation(entry, ANNOTATION_REF_NAME) == Some(tag) || digest == tag
                })
                .cloned()
                .ok_or_else(|| none(format!("no image is named `{tag}`"))),
            None => match entries.as_slice() {
                [only] => Ok(only.clone()),
                [] => Err(none("it holds no image".to_owned())),
                [first, rest @ ..] if rest.iter().all(|entry| entry.digest() == first.digest()) => {
                    Ok(first.clone())
                }
                _ => Err(none("it holds several images; add `:` and the name of one".to_owned())),
            },
        }
    }

    /// Reads the manifest or index that a descriptor names, with its digest verified.
    pub fn manifest(&self, descriptor: &Descriptor) -> Result<RawManifest> {
        let blob = oci::blob_ref(descriptor)
            .map_err(|error| LayoutError::Document { path: self.root.clone(), error: error.into() })?;
        let bytes = self.read_blob(&blob, MAX_MANIFEST)?;
        Ok(RawManifest::new(bytes, Some(descriptor.media_type().as_ref())))
    }

    /// Like [`manifest`](Self::manifest), parsed.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        self.manifest(descriptor)?
            .parse()
            .map_err(|error| LayoutError::Document { path: self.root.clone(), error })
    }
}

fn name_all(entries: &[Descriptor]) -> String {
    let names: Vec<_> = entries
        .iter()
        .take(20)
        .map(|entry| match oci::annotation(entry, ANNOTATION_REF_NAME) {
            Some(name) => name.to_owned(),
            None => entry.digest().to_string(),
        })
        .collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

/// A blob on its way into a layout. Dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct BlobWriter {
    layout: Layout,
    file: tempfile::NamedTempFile,
    hasher: Hasher,
    written: u64,
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher")
    }
}

impl BlobWriter {
    fn path(&self) -> PathBuf {
        self.file.path().to_owned()
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Makes the blob durable under its digest.
    pub fn finish(self) -> Result<BlobRef> {
        let blob = BlobRef { digest: self.hasher.finish(), size: self.written };
        let path = self.layout.blob_path(&blob.digest);
        self.file.as_file().sync_data().map_err(at(&path))?;
        self.file.persist(&path).map_err(|error| at(&path)(error.error))?;
        Ok(blob)
    }

    /// Like [`finish`](Self::finish), but refuses bytes that are not those of `expected`.
    pub fn finish_as(self, expected: &BlobRef) -> Result<BlobRef> {
        let got = BlobRef { digest: self.hasher.clone().finish(), size: self.written };
        if got != *expected {
            let problem = format!("expected {} bytes, got {got}", expected.size);
            return Err(self.layout.bad_blob(&expected.digest, problem));
        }
        self.finish()
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.written += u64::try_from(count).map_err(io::Error::other)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(blob: &BlobRef) -> Descriptor {
        let digest: oci_spec::image::Digest = blob.digest.to_string().parse().unwrap();
        Descriptor::new(oci::MediaType::ImageManifest, blob.size, digest)
    }

    #[test]
    fn blobs_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("img");
        let layout = Layout::open_or_create(&root).unwrap();
        let one = layout.put_blob(b"one").unwrap();
        let two = layout.put_blob(b"two").unwrap();
        assert_eq!(layout.read_blob(&one, 10).unwrap(), b"one");
        assert!(layout.read_blob(&one, 2).is_err());
        assert!(layout.has_blob(&one).unwrap());
        assert!(!layout.has_blob(&BlobRef { size: 4, ..one }).unwrap());
        assert!(layout.resolve(None).unwrap_err().to_string().contains("holds no image"));

        layout.add_image(descriptor(&one), None).unwrap();
        layout.add_image(descriptor(&one), None).unwrap();
        assert_eq!(layout.resolve(None).unwrap().size(), 3);
        layout.add_image(descriptor(&one), Some("v1")).unwrap();
        layout.add_image(descriptor(&two), Some("v1")).unwrap();
        let layout = Layout::open(&root).unwrap();
        assert_eq!(layout.index().unwrap().manifests().len(), 2);
        assert_eq!(oci::blob_ref(&layout.resolve(Some("v1")).unwrap()).unwrap(), two);
        let error = layout.resolve(None).unwrap_err().to_string();
        assert!(error.contains("several images") && error.contains("v1"), "{error}");
        assert!(layout.resolve(Some("v2")).unwrap_err().to_string().contains("`v2`"));
    }

    #[test]
    fn changed_and_missing_blobs_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let blob = layout.put_blob(b"right").unwrap();
        fs::write(layout.blob_path(&blob.digest), b"wrong").unwrap();
        let error = layout.read_blob(&blob, 100).unwrap_err().to_string();
        assert!(error.contains(&blob.digest.hex()), "{error}");
        fs::write(layout.blob_path(&blob.digest), b"longer").unwrap();
        assert!(matches!(layout.open_blob(&blob), Err(LayoutError::BadBlob { .. })));
        fs::remove_file(layout.blob_path(&blob.digest)).unwrap();
        assert!(matches!(layout.open_blob(&blob), Err(LayoutError::MissingBlob { .. })));
    }

    #[test]
    fn an_unfinished_or_wrong_blob_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let mut writer = layout.blob_writer().unwrap();
        writer.write_all(b"half").unwrap();
        drop(writer);
        let mut writer = layout.blob_writer().unwrap();
        writer.write_all(b"bytes").unwrap();
        assert!(writer.finish_as(&BlobRef { digest: Digest::of(b"other"), size: 5 }).is_err());
        assert_eq!(fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 0);
    }

    #[test]
    fn other_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(LayoutError::NotALayout { .. })));
        assert!(matches!(Layout::open(dir.path().join("none")), Err(LayoutError::Io { .. })));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(Layout::open_or_create(dir.path()), Err(LayoutError::NotALayout { .. })));
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
        assert!(Layout::open(dir.path()).unwrap_err().to_string().contains("2.0.0"));
    }
}
