//! A tar file of an OCI layout (`oci-archive`), read in place or unpacked, and written.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::layout::{Layout, LayoutError};
use crate::local::{file_body, off_thread};
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency, check_range};

/// Why an archive cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file system failed, or the tar stream is damaged.
    #[error("oci-archive {path}: {error}")]
    Io {
        /// The archive.
        path: PathBuf,
        /// What was wrong.
        error: io::Error,
    },
    /// An entry of the archive cannot be used.
    #[error("oci-archive {path}: entry `{entry}`: {problem}")]
    Entry {
        /// The archive.
        path: PathBuf,
        /// The entry's name.
        entry: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The layout on the other side failed.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// An archive whose blobs are read where they lie in the tar file.
#[derive(Clone, Debug)]
pub struct Archive {
    path: PathBuf,
    name: String,
    blobs: Arc<HashMap<Digest, Range<u64>>>,
    documents: Arc<tempfile::TempDir>,
}

/// Most entries that an archive may have; a bound on memory.
const MAX_ENTRIES: usize = 1 << 20;
/// Blobs up to this size (manifests, configs) are copied out when the archive is opened.
const SMALL: u64 = crate::oci::MAX_CONFIG;
/// All that is copied out may not exceed this.
const MAX_SMALL: u64 = 256 << 20;

fn at(path: &Path) -> impl Fn(io::Error) -> ArchiveError + '_ {
    |error| ArchiveError::Io { path: path.to_owned(), error }
}

enum Entry {
    Blob(Digest),
    Index,
    Marker,
    Other,
}

fn classify(path: &Path) -> Result<Entry, String> {
    let text = path.to_str().ok_or("the name is not UTF-8")?;
    let text = text.strip_prefix("./").unwrap_or(text);
    if let Some(hex) = text.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
        return Digest::from_hex(hex).map(Entry::Blob).map_err(|error| error.to_string());
    }
    Ok(match text {
        "index.json" => Entry::Index,
        "oci-layout" => Entry::Marker,
        _ => Entry::Other,
    })
}

/// Walks the regular entries that belong to a layout; `each` gets the kind and the entry.
fn walk(
    path: &Path,
    mut each: impl FnMut(Entry, &mut tar::Entry<'_, File>) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut archive = tar::Archive::new(File::open(path).map_err(at(path))?);
    for (count, entry) in archive.entries_with_seek().map_err(at(path))?.enumerate() {
        let mut entry = entry.map_err(at(path))?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let bad = |problem: String| ArchiveError::Entry {
            path: path.to_owned(),
            entry: name.chars().take(200).collect(),
            problem,
        };
        if count >= MAX_ENTRIES {
            return Err(bad(format!("more than {MAX_ENTRIES} entries")));
        }
        let kind = classify(&entry.path().map_err(at(path))?).map_err(&bad)?;
        match kind {
            Entry::Other => {}
            _ if entry.header().entry_type() != tar::EntryType::Regular => {
                return Err(bad("it is no plain file".to_owned()));
            }
            kind => each(kind, &mut entry)?,
        }
    }
    Ok(())
}

fn read_small(path: &Path, entry: &mut tar::Entry<'_, File>, cap: u64) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    entry.take(cap + 1).read_to_end(&mut bytes).map_err(at(path))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > cap) {
        return Err(at(path)(io::Error::other(format!("a document is larger than {cap} bytes"))));
    }
    Ok(bytes)
}

impl Archive {
    /// Opens an archive: reads its table of entries and copies out its small documents.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ArchiveError> {
        let path = path.as_ref();
        let documents = tempfile::tempdir().map_err(at(path))?;
        let layout = Layout::create(documents.path())?;
        let (mut blobs, mut small) = (HashMap::new(), 0u64);
        let mut index = None;
        walk(path, |kind, entry| {
            match kind {
                Entry::Blob(digest) => {
                    let start = entry.raw_file_position();
                    let end = start.checked_add(entry.size());
                    let end = end.ok_or_else(|| at(path)(io::Error::other("an entry's size overflows")))?;
                    blobs.insert(digest, start..end);
                    if entry.size() <= SMALL && small.saturating_add(entry.size()) <= MAX_SMALL {
                        small += entry.size();
                        let bytes = read_small(path, entry, SMALL)?;
                        layout.put_blob(&bytes)?;
                    }
                }
                Entry::Index => index = Some(read_small(path, entry, MAX_SMALL)?),
                Entry::Marker | Entry::Other => {}
            }
            Ok(())
        })?;
        let index = index.ok_or_else(|| ArchiveError::Entry {
            path: path.to_owned(),
            entry: "index.json".to_owned(),
            problem: "it is missing, so this is no archive of an OCI layout".to_owned(),
        })?;
        std::fs::write(documents.path().join("index.json"), index).map_err(at(path))?;
        let layout = Layout::open(documents.path())?;
        layout.index()?;
        Ok(Self {
            path: path.to_owned(),
            name: format!("oci-archive:{}", path.display()),
            blobs: Arc::new(blobs),
            documents: Arc::new(documents),
        })
    }

    /// The archive's index, manifests and configs as a layout; large blobs are not in it.
    pub fn documents(&self) -> Result<Layout, LayoutError> {
        Layout::open(self.documents.path())
    }

    /// Unpacks the archive at `path` into a new layout in `dir`. Every blob's digest is checked.
    pub fn unpack(path: impl AsRef<Path>, dir: impl AsRef<Path>) -> Result<Layout, ArchiveError> {
        let path = path.as_ref();
        let layout = Layout::create(dir)?;
        let mut index = None;
        walk(path, |kind, entry| {
            match kind {
                Entry::Blob(digest) => {
                    let mut writer = layout.blob_writer()?;
                    let size = io::copy(entry, &mut writer).map_err(at(path))?;
                    writer.finish_as(&BlobRef { digest, size })?;
                }
                Entry::Index => index = Some(read_small(path, entry, MAX_SMALL)?),
                Entry::Marker | Entry::Other => {}
            }
            Ok(())
        })?;
        let index = index.ok_or_else(|| ArchiveError::Entry {
            path: path.to_owned(),
            entry: "index.json".to_owned(),
            problem: "it is missing, so this is no archive of an OCI layout".to_owned(),
        })?;
        std::fs::write(layout.root().join("index.json"), index).map_err(at(path))?;
        Ok(Layout::open(layout.root())?)
    }

    /// Packs a whole layout into a tar file at `path`, blobs in the order of their names. The same layout
    /// makes the same bytes.
    pub fn pack(layout: &Layout, path: impl AsRef<Path>) -> Result<(), ArchiveError> {
        let path = path.as_ref();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let write = || -> io::Result<()> {
            let file = tempfile::Builder::new()
                .prefix(".partial-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                .tempfile_in(parent)?;
            let mut tar = tar::Builder::new(io::BufWriter::new(file));
            tar.mode(tar::HeaderMode::Deterministic);
            let blobs = layout.root().join("blobs/sha256");
            let mut names: Vec<_> = std::fs::read_dir(&blobs)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<Result<_, _>>()?;
            names.retain(|name| name.to_str().is_some_and(|name| Digest::from_hex(name).is_ok()));
            names.sort();
            for name in ["oci-layout", "index.json"] {
                tar.append_path_with_name(layout.root().join(name), name)?;
            }
            for name in names {
                tar.append_path_with_name(blobs.join(&name), Path::new("blobs/sha256").join(&name))?;
            }
            let mut file = tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.flush()?;
            file.as_file().sync_data()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(at(path))
    }
}

#[async_trait::async_trait]
impl Source for Archive {
    fn name(&self) -> &str {
        &self.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        check_range(&self.name, blob, &range)?;
        let error = |class, detail: String| {
            SourceError::new(class, self.name.as_str(), detail).reading(blob, range.clone())
        };
        let Some(place) = self.blobs.get(&blob.digest) else {
            return Err(error(ErrorClass::NotFound, "the blob is not in the archive".to_owned()));
        };
        let size = place.end - place.start;
        if size != blob.size {
            return Err(error(
                ErrorClass::Corrupt,
                format!("{size} bytes, its descriptor says {}", blob.size),
            ));
        }
        let path = self.path.clone();
        let file = off_thread(move || File::open(path)).await;
        let file = file.map_err(|failed| error(ErrorClass::Io, failed.to_string()))?;
        Ok(file_body(&self.name, file, place.start, blob, range))
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        Ok(self.blobs.get(&blob.digest).is_some_and(|place| place.end - place.start == blob.size))
    }
}
