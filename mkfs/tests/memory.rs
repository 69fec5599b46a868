//! Memory does not grow with the size of a file. The only test of its binary, since it looks at the whole process.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write as _;

use common::{convert_input, noise};
use skimmer_mkfs::{Input, Options};

/// Peak resident memory of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_large_file_streams_through() {
    const FILE: u64 = 512 << 20;
    let source = tempfile::tempdir().unwrap();
    let mut file = std::fs::File::create(source.path().join("large")).unwrap();
    for seed in 0..FILE >> 20 {
        file.write_all(&noise(1 << 20, seed)).unwrap();
    }
    drop(file);
    let mut options = Options::default();
    options.threads = std::num::NonZeroUsize::new(4);
    let before = peak();
    let made = convert_input(Input::Directory(source.path().to_owned()), &options).unwrap();
    let grown = peak() - before;
    assert_eq!((made.report.data_bytes, made.report.blobs[0].chunks), (FILE, 512));
    // Ten chunks may be under way, each with its compressed form and the compressor's state.
    assert!(grown < 96 << 20, "{} MiB", grown >> 20);
    eprintln!("grew by {} MiB for a file of {} MiB", grown >> 20, FILE >> 20);
}
