//! What it costs to read: kernel messages, and a bootstrap's tree and chunk map.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use erofs_format::{FileKind, Image};
use skimmer_cachefiles::message::{self, Body, Message, Open};
use skimmer_fanotify::event::{self, FAN_EVENT_INFO_TYPE_RANGE, FAN_PRE_ACCESS, METADATA_VERSION};
use skimmer_fetcher::Reference;
use skimmer_fetcher::image::{self, OpenOptions};
use skimmer_fetcher::layout::Layout;
use skimmer_mkfs::{Input, Options, convert};

/// Directories of the tree, and files in each.
const DIRECTORIES: u32 = 40;
const FILES: u32 = 50;
/// Chunks of the one large file; each other file has one.
const LARGE: u32 = 500;
/// Bytes per chunk of the image.
const CHUNK: u32 = 4096;
/// Events of one buffer.
const EVENTS: usize = 32;

fn cachefiles(c: &mut Criterion) {
    let open =
        Open { volume_key: b"erofs,skimmer"[..].into(), cookie_key: [b'a'; 64].into(), fd: 9, flags: 0 };
    let mut group = c.benchmark_group("cachefiles message");
    for (name, body) in [("open", Body::Open(open)), ("read", Body::Read { offset: 1 << 30, len: 131_072 })] {
        let message = Message { msg_id: 7, object_id: 3, body };
        let bytes = message.encode().expect("the message fits");
        assert_eq!(message::decode(&bytes), Ok(message));
        group.bench_function(name, |b| b.iter(|| message::decode(black_box(&bytes))));
    }
    group.finish();
}

/// A buffer of accesses as the kernel lays them out.
fn events() -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in 0..EVENTS {
        let offset = u64::try_from(number).expect("few events") * 16_384;
        bytes.extend(48u32.to_ne_bytes());
        bytes.extend([METADATA_VERSION, 0]);
        bytes.extend(24u16.to_ne_bytes());
        bytes.extend(FAN_PRE_ACCESS.to_ne_bytes());
        bytes.extend(5i32.to_ne_bytes());
        bytes.extend(77i32.to_ne_bytes());
        bytes.extend([FAN_EVENT_INFO_TYPE_RANGE, 0]);
        bytes.extend(24u16.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(16_384u64.to_ne_bytes());
    }
    bytes
}

fn fanotify(c: &mut Criterion) {
    let bytes = events();
    let all: Vec<_> = event::decode(&bytes).map(|event| event.expect("a good event")).collect();
    assert_eq!((all.len(), all[EVENTS - 1].range.map(|range| range.count)), (EVENTS, Some(16_384)));
    let mut group = c.benchmark_group("fanotify event");
    group.throughput(Throughput::Elements(u64::try_from(EVENTS).expect("few events")));
    group.bench_function("buffer of 32", |b| {
        b.iter(|| event::decode(black_box(&bytes)).filter_map(Result::ok).map(|event| event.fd).sum::<i32>());
    });
    group.finish();
}

/// A tree of small files and one large one, packed by our own builder.
fn bootstrap(dir: &Path) -> Vec<u8> {
    let tree = dir.join("tree");
    for directory in 0..DIRECTORIES {
        let path = tree.join(format!("directory-{directory:03}"));
        std::fs::create_dir_all(&path).expect("the temporary directory can be written");
        for file in 0..FILES {
            let content = format!("file {file} of directory {directory}\n");
            std::fs::write(path.join(format!("file-{file:03}")), content).expect("a small file");
        }
    }
    let large: Vec<u8> = (0..LARGE * CHUNK / 4).flat_map(u32::to_le_bytes).collect();
    std::fs::write(tree.join("large"), large).expect("a file of some megabytes");
    let out = dir.join("image");
    let layout = Layout::create(&out).expect("an empty layout");
    let mut options = Options::default();
    (options.chunk_size, options.threads) = (CHUNK, NonZeroUsize::new(1));
    convert(Input::Directory(tree), &layout, &options, &()).expect("the tree can be packed");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    let reference = Reference::Layout { dir: out, tag: None };
    runtime.block_on(image::open(&reference, &OpenOptions::default())).expect("the image opens").bootstrap
}

fn rafs(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bytes = bootstrap(dir.path());
    let image = Image::parse(&bytes).expect("our own image");
    let names = u64::from(1 + DIRECTORIES * (1 + FILES) + 1);
    let chunks = u64::from(DIRECTORIES * FILES + LARGE);
    assert_eq!(image.check().map(|summary| (summary.names, summary.chunks)), Ok((names, chunks)));

    let mut group = c.benchmark_group("bootstrap");
    group.throughput(Throughput::Bytes(u64::try_from(bytes.len()).expect("a small file")));
    group.bench_function("parse", |b| b.iter(|| Image::parse(black_box(&bytes)).is_ok()));
    group.bench_function("parse and check", |b| {
        b.iter(|| {
            Image::parse(black_box(&bytes)).and_then(|image| image.check()).map(|summary| summary.inodes)
        });
    });

    let paths: Vec<String> = (0..DIRECTORIES * FILES)
        .step_by(97)
        .map(|at| format!("directory-{:03}/file-{:03}", at / FILES, at % FILES))
        .collect();
    let find = |path: &String| image.lookup(path.as_bytes()).ok().flatten().map(|inode| inode.kind);
    assert!(paths.iter().all(|path| find(path) == Some(FileKind::Regular)));
    group.throughput(Throughput::Elements(u64::try_from(paths.len()).expect("few paths")));
    group.bench_function("lookup", |b| b.iter(|| paths.iter().filter_map(find).count()));

    let walk = || image.walk().map_or(0, |walk| walk.filter_map(Result::ok).count());
    assert_eq!(u64::try_from(walk()), Ok(names));
    group.throughput(Throughput::Elements(names));
    group.bench_function("walk", |b| b.iter(walk));

    let map = || image.chunk_map(0).map_or(0, |chunks| chunks.len());
    assert_eq!(u64::try_from(map()), Ok(chunks));
    group.throughput(Throughput::Elements(chunks));
    group.bench_function("chunk map", |b| b.iter(map));
    group.finish();
}

criterion_group!(benches, cachefiles, fanotify, rafs);
criterion_main!(benches);
