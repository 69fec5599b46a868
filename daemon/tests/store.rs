//! The store on a real directory: what a restarted daemon may believe of it.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use skimmer_daemon::blob::{BlobChunk, BlobId, BlobSpec};
use skimmer_daemon::driver::ReadySink;
use skimmer_daemon::frontend::Mode;
use skimmer_daemon::store::blobs::Claim;
use skimmer_daemon::store::journal::{Journal, Notice};
use skimmer_daemon::store::{Store, StoreError};
use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};

const SIZE: u64 = 16 * 4096;

fn chunk(index: u32, start: u64, digest: u8) -> BlobChunk {
    let spec = ChunkSpec {
        stored_offset: u64::from(index) * 4096,
        stored_len: 4096,
        len: 4096,
        codec: Codec::None,
        digest: ChunkDigest::Sha256([digest; 32]),
    };
    BlobChunk { index, start, spec }
}

fn spec(chunks: Vec<BlobChunk>) -> BlobSpec {
    BlobSpec::from_chunks(BlobId::new([3; 32]), SIZE, 1 << 20, chunks).unwrap()
}

fn blob() -> BlobId {
    BlobId::new([3; 32])
}

/// Tracks the blob's file in a journal, reports these chunks as written, and ends the journal.
async fn write_and_record(store: &Store, chunks: &[u32]) -> Vec<Notice> {
    let (journal, mut notices) = Journal::start().unwrap();
    let data = store.open_blob(blob(), SIZE).unwrap();
    for chunk in chunks {
        data.write_all_at(&[1; 4096], u64::from(*chunk) * 4096).unwrap();
    }
    journal.track(Mode::Fanotify, store.open_record(Mode::Fanotify, blob(), data).unwrap()).await;
    journal.ready(Mode::Fanotify, blob(), chunks);
    journal.complete(Mode::Fanotify, blob());
    journal.flush().await;
    journal.stop();
    drop(journal);
    let mut all = Vec::new();
    while let Ok(notice) = notices.try_recv() {
        all.push(notice);
    }
    all
}

fn recorded(store: &Store) -> Vec<u32> {
    let data = store.open_blob(blob(), SIZE).unwrap();
    store.ready_of(Mode::Fanotify, blob(), data).unwrap().iter().collect()
}

#[tokio::test]
async fn what_was_recorded_is_ready_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.claim(&spec(vec![chunk(0, 0, 1), chunk(5, 5 * 4096, 1)])).unwrap();
    assert!(recorded(&store).is_empty());
    let notices = write_and_record(&store, &[0, 5]).await;
    let [Notice::Durable(durable, chunks), Notice::Complete(Mode::Fanotify, complete)] = &notices[..] else {
        panic!("{notices:?}")
    };
    assert_eq!((*durable, chunks.as_slice(), *complete), (blob(), &[0, 5][..], blob()));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(recorded(&store), vec![0, 5]);
    store.claim(&spec(vec![chunk(7, 7 * 4096, 1)])).unwrap();
    write_and_record(&store, &[7]).await;
    assert_eq!(recorded(&store), vec![0, 5, 7]);
}

#[tokio::test]
async fn a_recorded_chunk_that_is_a_hole_is_not_ready_until_it_is_written_again() {
    use rustix::fs::{FallocateFlags, fallocate};
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let two_blocks = |index: u32, start: u64| {
        let mut chunk = chunk(index, start, 1);
        chunk.spec.len = 5000;
        chunk
    };
    let chunks = vec![chunk(0, 0, 1), two_blocks(1, 4096), chunk(3, 3 * 4096, 1), two_blocks(6, 6 * 4096)];
    store.claim(&spec(chunks)).unwrap();
    let file = store.open_blob(blob(), SIZE).unwrap();
    for block in [2, 7] {
        file.write_all_at(&[1; 4096], block * 4096).unwrap();
    }
    write_and_record(&store, &[0, 1, 3, 6]).await;
    assert_eq!(recorded(&store), vec![0, 1, 3, 6]);

    // All of one chunk, and the second half of another.
    for block in [3, 7] {
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, block * 4096, 4096).unwrap();
    }
    file.sync_all().unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(recorded(&store), vec![0, 1]);

    // Written, not yet on disk: data all the same.
    write_and_record(&store, &[3]).await;
    file.write_all_at(&[1; 4096], 7 * 4096).unwrap();
    assert_eq!(recorded(&store), vec![0, 1, 3, 6]);
}

#[tokio::test]
async fn claims_that_cannot_be_read_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let image = spec(vec![chunk(0, 0, 1)]);
    store.claim(&image).unwrap();
    write_and_record(&store, &[0]).await;
    // A directory opens and cannot be read: stands for every error but "there is none".
    let (claims, aside) = (store.claims_path(blob()), dir.path().join("aside"));
    std::fs::rename(&claims, &aside).unwrap();
    std::fs::create_dir(&claims).unwrap();
    let error = store.claim(&image).unwrap_err().to_string();
    assert!(error.contains(".chunks"), "{error}");
    std::fs::remove_dir(&claims).unwrap();
    std::fs::rename(&aside, &claims).unwrap();
    assert_eq!(recorded(&store), vec![0]);
}

#[tokio::test]
async fn a_file_that_nobody_records_is_never_complete() {
    let (journal, mut notices) = Journal::start().unwrap();
    journal.ready(Mode::Fanotify, blob(), &[1]);
    journal.complete(Mode::Fanotify, blob());
    journal.flush().await;
    journal.stop();
    assert!(notices.try_recv().is_err());
}

#[tokio::test]
async fn a_blob_file_that_was_replaced_or_removed_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.claim(&spec(vec![chunk(0, 0, 1)])).unwrap();
    write_and_record(&store, &[0]).await;
    let path = store.blob_path(blob());
    std::fs::remove_file(&path).unwrap();
    assert!(recorded(&store).is_empty());

    write_and_record(&store, &[0]).await;
    let other = path.with_extension("other");
    File::create(&other).unwrap().set_len(SIZE).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert!(recorded(&store).is_empty());
}

#[tokio::test]
async fn a_damaged_map_is_made_anew_and_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.claim(&spec(vec![chunk(0, 0, 1)])).unwrap();
    write_and_record(&store, &[0]).await;
    let map = store.map_path(Mode::Fanotify, blob());
    std::fs::write(&map, b"SKREADY\0 but no more").unwrap();
    assert!(recorded(&store).is_empty());
    write_and_record(&store, &[0]).await;
    assert_eq!(recorded(&store), vec![0]);
}

#[test]
fn a_blob_file_of_another_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    drop(store.open_blob(blob(), SIZE).unwrap());
    let error = store.open_blob(blob(), SIZE + 4096).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }) && error.to_string().contains("69632"), "{error}");
}

#[tokio::test]
async fn an_image_that_disagrees_never_gets_what_another_one_filled_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let agrees = |claim: &BlobSpec| matches!(store.claim(claim).unwrap(), Claim::Agrees);
    let first = spec(vec![chunk(0, 0, 1), chunk(1, 4096, 1)]);
    assert!(agrees(&first));
    write_and_record(&store, &[0, 1]).await;

    assert!(agrees(&spec(vec![chunk(1, 4096, 1), chunk(2, 8192, 9)])), "more chunks, same story");
    assert!(!agrees(&spec(vec![chunk(1, 4096, 2)])), "another digest");
    assert!(!agrees(&spec(vec![chunk(1, 12288, 1)])), "another place");
    assert!(!agrees(&spec(vec![chunk(9, 4096, 1)])), "another chunk in the same place");
    assert!(!agrees(&spec(vec![chunk(2, 8192, 1)])), "what the second image claimed counts too");
    assert_eq!(recorded(&store), vec![0, 1], "asking changes nothing");

    let liar = spec(vec![chunk(1, 4096, 2)]);
    store.reset_blob(blob()).unwrap();
    assert!(agrees(&liar));
    assert!(recorded(&store).is_empty());
    assert!(!agrees(&first));
}

#[tokio::test]
async fn without_claims_nothing_counts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.claim(&spec(vec![chunk(0, 0, 1)])).unwrap();
    write_and_record(&store, &[0]).await;
    std::fs::write(store.claims_path(blob()), b"damaged").unwrap();
    store.claim(&spec(vec![chunk(0, 0, 1)])).unwrap();
    assert!(recorded(&store).is_empty());
}
