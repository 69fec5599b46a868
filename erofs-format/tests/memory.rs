//! What reading an image allocates stays below the bounds that the documentation states. One test in a process of its
//! own, so that nothing else allocates meanwhile.

mod common;

use common::{Random, mutate, synthetic, vector};
use erofs_format::{Image, dump::dump};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that `run` allocates at its peak.
fn peak<T>(run: impl FnOnce() -> T) -> usize {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    drop(run());
    ALLOCATOR.peak_usage().saturating_sub(before)
}

/// Checks the bounds of `Image::parse`, `Image::check` and `dump`.
fn within_bounds(bytes: &[u8]) {
    let len = bytes.len();
    let parse = peak(|| Image::parse(bytes));
    assert!(parse <= len / 4 + (128 << 10), "parse: {parse} for {len}");
    if let Ok(image) = Image::parse(bytes) {
        let check = peak(|| image.check());
        assert!(check <= len / 2 + (6 << 20), "check: {check} for {len}");
    }
    let dump = peak(|| dump(bytes));
    assert!(dump <= 8 * len + (4 << 20), "dump: {dump} for {len}");
}

/// Many small inodes: the most bookkeeping per byte of image.
fn many_inodes() -> Vec<u8> {
    let mut tree = synthetic::Tree::new(Vec::new());
    for i in 0..200 {
        let directory = tree.directory(0, format!("{i}"));
        for j in 0..400 {
            let mut node = synthetic::Node::from(synthetic::Content::Symlink(b"x".to_vec()));
            node.compact = true;
            node.xattrs = vec![(b"user.x".to_vec(), Vec::new())];
            tree.add(directory, format!("{j}"), node);
        }
    }
    tree.build()
}

#[test]
fn bounds_hold() {
    let vector = vector::bootstrap();
    let rich = synthetic::rich().build();
    let many = many_inodes();
    for image in [&vector, &rich, &many] {
        within_bounds(image);
    }
    let mut random = Random(42);
    for _ in 0..2000 {
        within_bounds(&mutate(&vector, 12288..13000, &mut random));
    }
    for _ in 0..200 {
        within_bounds(&mutate(&rich, 8192..40960, &mut random));
    }
    for _ in 0..5 {
        within_bounds(&mutate(&many, 4096..8192, &mut random));
    }
}
