//! A bootstrap: parse, check, dump, chunk maps, walk, lookups, xattrs.

use std::fmt::Write as _;

use erofs_format::blob_table::BlobFeatures;
use erofs_format::{FileKind, Image, Summary, dump};

/// Names of one image that are looked up again by path: bisection must find what the walk finds.
const LOOKUPS: usize = 64;

/// Counts what is written and keeps none of it.
struct Sink(usize);

impl std::fmt::Write for Sink {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

/// Reads `bytes` as a bootstrap in every way there is.
pub fn run(bytes: &[u8]) {
    let image = match Image::parse(bytes) {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let checked = image.check();
    if let Err(error) = &checked {
        assert!(!error.to_string().is_empty());
    }
    for blob in 0..=image.blobs().len() {
        chunk_map(&image, blob, checked.is_ok());
    }
    walk(&image, checked.as_ref().ok());
    inodes(&image, bytes.len());
    assert!(image.prefetch().count() <= bytes.len() / 4);
    dumped(bytes, checked.is_ok());
}

fn chunk_map(image: &Image<'_>, number: usize, sound: bool) {
    let blob = image.blobs().get(number);
    let chunks = match image.chunk_map(number) {
        Ok(chunks) => chunks,
        Err(error) => {
            let unsupported = blob.is_none_or(|blob| blob.unsupported().is_some());
            assert!(!sound || unsupported, "a checked image without a chunk map: {error}");
            return;
        }
    };
    let blob = blob.expect("there is a map only for blobs that there are");
    let (mut device, mut stored) = (0, 0);
    for chunk in &chunks {
        assert!(chunk.uncompressed_offset.is_multiple_of(4096) && chunk.uncompressed_offset >= device);
        assert!(chunk.compressed_offset >= stored);
        assert!((1..=blob.chunk_size).contains(&chunk.uncompressed_size));
        assert!(chunk.compressed_size > 0);
        device = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
        stored = chunk.compressed_offset + u64::from(chunk.compressed_size);
        assert!(chunk.index < blob.chunk_count);
    }
    assert!(device <= blob.uncompressed_size && stored <= blob.data_size());
}

fn walk(image: &Image<'_>, summary: Option<&Summary>) {
    let Ok(mut walk) = image.walk() else {
        assert!(summary.is_none(), "a checked image that cannot be walked");
        return;
    };
    let fine = image.blobs().iter().any(|blob| blob.features.contains(BlobFeatures::FINE_INDEXES));
    let (mut names, mut paths, mut failed) = (0, Vec::new(), false);
    while let Some(visit) = walk.next() {
        let Ok(visit) = visit else {
            failed = true;
            continue;
        };
        assert!(!failed, "the walk goes on after an error");
        names += 1;
        if paths.len() < LOOKUPS {
            paths.push((walk.path().to_vec(), visit.inode.nid));
        }
        assert!(!visit.name.contains(&b'/') && visit.name != b"." && visit.name != b"..");
        if let Some(Ok(target)) = visit.inode.target().transpose() {
            assert!(!target.is_empty() && !target.contains(&0));
        }
        if summary.is_some() {
            assert!(visit.inode.xattrs().all(|xattr| xattr.is_ok_and(|xattr| !xattr.name().is_empty())));
            for chunk in visit.inode.chunks() {
                let chunk = chunk.expect("a checked image has only good chunk indexes");
                let entry = image.chunk(chunk.blob, chunk.index);
                let entry = entry.expect("a checked image knows each chunk that a file names");
                let (start, size) = (entry.uncompressed_offset.get(), entry.uncompressed_size.get());
                if fine {
                    let end = chunk.device_offset + u64::from(chunk.size);
                    assert!(start <= chunk.device_offset && end <= start + u64::from(size));
                } else {
                    assert_eq!((chunk.device_offset, chunk.size), (start, size));
                }
            }
        }
    }
    if let Some(summary) = summary {
        assert!(!failed, "a checked image whose walk fails");
        assert_eq!(names, summary.names);
        for (path, nid) in paths {
            let found = image.lookup(&path).expect("a checked image can be searched");
            assert_eq!(found.map(|inode| inode.nid), Some(nid), "{path:?}");
        }
    }
}

/// Inodes by number, whether a name leads to them or not.
fn inodes(image: &Image<'_>, len: usize) {
    let slots = u64::try_from(len / 32).unwrap_or(u64::MAX);
    let step = usize::try_from(slots / 512 + 1).unwrap_or(usize::MAX);
    for nid in (0..=slots).step_by(step).chain([1 << 59, u64::MAX / 32, u64::MAX]) {
        let Ok(inode) = image.inode(nid) else { continue };
        let directory = inode.kind == FileKind::Directory;
        let entries = inode.entries().take_while(Result::is_ok).count();
        assert!(directory || entries == 0);
        let _ = inode.lookup(b"name");
        let _ = inode.target();
        assert!(inode.xattrs().count() <= len / 4 + 1);
        assert!(inode.chunks().count() <= len / 8 + 1);
    }
}

fn dumped(bytes: &[u8], sound: bool) {
    let dump = match dump(bytes) {
        Ok(dump) => dump,
        Err(error) => {
            assert!(!sound, "a checked image that cannot be dumped: {error}");
            return;
        }
    };
    let mut sink = Sink(0);
    assert!(write!(sink, "{dump}").is_ok() && sink.0 > 0);
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if dump.overlapping() == 0 {
        let mut end = 0;
        for region in dump.regions() {
            assert_eq!(region.start, end, "the dump leaves bytes out");
            end = region.end;
        }
        assert_eq!(end, len);
    }
    assert!(dump.unaccounted() <= len);
}
