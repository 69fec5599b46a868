//! Images to test with: the documented vector, and a writer of larger ones.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_lossless,
    clippy::unwrap_used,
    reason = "helpers of tests, whose numbers are those of small images"
)]

pub mod synthetic;
pub mod vector;

use std::fmt::Write as _;

use erofs_format::{FileKind, Image, dump::dump};

/// Counts what is written, keeps none of it.
struct Sink(usize);

impl std::fmt::Write for Sink {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

/// Uses everything that the navigator offers on bytes that may be anything.
pub fn exercise(bytes: &[u8]) {
    let Ok(image) = Image::parse(bytes) else { return };
    let whole = image.check();
    let names = image.walk().map(|walk| walk.filter_map(Result::ok).count()).unwrap_or(0);
    assert!(names <= bytes.len() / 13 + 1, "more names than the file has room for");
    for blob in 0..=image.blobs().len() {
        if let Ok(chunks) = image.chunk_map(blob) {
            assert!(chunks.len() <= image.chunk_table().len());
        }
    }
    assert!(image.prefetch().count() <= bytes.len());
    for path in [&b"/"[..], b"/a", b"/d/b", b"/usr/link", b"/many/name-1234", b"//x/../..", b"\xff"] {
        let _ = image.lookup(path);
    }
    for nid in (0..bytes.len() as u64 / 32).step_by(7).chain([u64::MAX, 1 << 59, u64::MAX / 32]) {
        let Ok(inode) = image.inode(nid) else { continue };
        assert!(inode.entries().take(100).filter_map(Result::ok).all(|entry| !entry.name.is_empty()));
        let _ = inode.lookup(b"name-1");
        let _ = inode.target();
        let _ = inode.xattrs().count();
        assert!(inode.chunks().count() <= bytes.len() / 8);
    }
    if let Ok(dump) = dump(bytes) {
        let mut sink = Sink(0);
        write!(sink, "{dump}").unwrap();
        if dump.overlapping() == 0 {
            let mut end = 0;
            for region in dump.regions() {
                assert_eq!(region.start, end);
                end = region.end;
            }
            assert_eq!(end, bytes.len() as u64);
        }
    } else {
        assert!(whole.is_err(), "what can be checked can be dumped");
    }
}

/// Numbers that are the same in each run.
pub struct Random(pub u64);

impl Random {
    /// Next number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// A copy with some bytes changed; every other change goes to the metadata that is dense.
pub fn mutate(image: &[u8], dense: std::ops::Range<usize>, random: &mut Random) -> Vec<u8> {
    let mut copy = image.to_vec();
    for _ in 0..=random.below(4) {
        let at = if random.below(2) == 0 {
            random.below(copy.len())
        } else {
            dense.start + random.below(dense.len())
        };
        copy[at] = match random.below(4) {
            0 => 0xff,
            1 => 0,
            2 => copy[at] ^ (1 << random.below(8)),
            _ => random.below(256) as u8,
        };
    }
    if random.below(8) == 0 {
        copy.truncate(random.below(copy.len()));
    }
    copy
}

/// Path, kind, size of every name, in walk order.
pub fn listing(image: &Image<'_>) -> Vec<(Vec<u8>, FileKind, u64)> {
    let mut walk = image.walk().unwrap();
    let mut found = Vec::new();
    while let Some(visit) = walk.next() {
        let inode = visit.unwrap().inode;
        found.push((walk.path().to_vec(), inode.kind, inode.size));
    }
    found
}
