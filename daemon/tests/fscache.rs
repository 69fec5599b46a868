//! The fscache side of the driver against a stand-in for the kernel: objects are ordinary files opened for direct
//! writes, as cachefiles does, so that what lands in them can be compared byte for byte.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Fault, Made, Memory, PATIENCE, Random, Rig, Said, blob, bytes, hasty};
use skimmer_cachefiles::testing::{FakeKernel, Reply};
use skimmer_daemon::blob::ReadyBits;
use skimmer_daemon::driver::DriverError;
use skimmer_daemon::frontend::{CookieRole, Frontends, FscacheSetup, Mode};

const VOLUME: &str = "erofs,skimmer";

struct Cache {
    rig: Rig,
    kernel: FakeKernel,
    dir: tempfile::TempDir,
}

impl Cache {
    fn new() -> Self {
        let rig = Rig::start(hasty(), Frontends::default());
        let (kernel, device) = FakeKernel::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let setup =
            FscacheSetup { dir: dir.path().to_owned(), tag: "skimmer".to_owned(), device: Some(device) };
        rig.wait(rig.handle.bind_fscache(setup)).unwrap();
        let cache = Self { rig, kernel, dir };
        assert_eq!(cache.reply(), Reply::Command("restore".to_owned()));
        cache
    }

    fn reply(&self) -> Reply {
        self.kernel.next_reply(PATIENCE).unwrap().expect("the driver does not answer")
    }

    /// A sparse cache file for the blob.
    fn file(&self, made: &Made) -> PathBuf {
        let path = self.dir.path().join(made.id().hex());
        File::create(&path).unwrap().set_len(made.spec.device_bytes).unwrap();
        path
    }

    fn expect(&self, made: &Made) {
        let role = CookieRole::Blob(made.id());
        self.rig.wait(self.rig.handle.expect_cookie(VOLUME, made.id().hex(), role)).unwrap();
    }

    fn open(&self, object: u32, made: &Made, path: &Path) {
        let msg_id = self.kernel.open(object, VOLUME, &made.id().hex(), anon(path)).unwrap();
        let size = i64::try_from(made.spec.device_bytes).unwrap();
        assert_eq!(self.reply(), Reply::Copen { msg_id, size });
    }

    /// One READ; the range of the cache file when it is answered.
    fn read(&self, object: u32, path: &Path, offset: u64, len: u64) -> Vec<u8> {
        let msg_id = self.kernel.read(object, offset, len).unwrap();
        assert_eq!(self.reply(), Reply::ReadComplete { msg_id, object_id: object });
        let mut found = vec![0xaa; usize::try_from(len).unwrap()];
        File::open(path).unwrap().read_exact_at(&mut found, offset).unwrap();
        found
    }

    fn stop(self) {
        self.rig.stop();
    }
}

/// As the kernel opens cache files.
fn anon(path: &Path) -> File {
    OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Descriptors of this process that are open on `path`.
fn descriptors(path: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter(|fd| fd.as_ref().is_ok_and(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path)))
        .count()
}

#[test]
fn every_byte_is_right_in_any_order() {
    for seed in 0..4 {
        let made = blob(seed, 60, 150_000);
        let cache = Cache::new();
        let source = Memory::new("memory", &made);
        cache.rig.add(&made, ReadyBits::new(), vec![source.clone()]);
        cache.expect(&made);
        let path = cache.file(&made);
        cache.open(1, &made, &path);
        let mut random = Random::new(seed + 99);
        let blocks = made.spec.device_bytes / 4096;
        for _ in 0..200 {
            let first = random.below(blocks);
            let len = 4096 * (1 + random.below(64)).min(blocks - first);
            let found = cache.read(1, &path, first * 4096, len);
            assert_eq!(found, made.device[bytes(first * 4096..first * 4096 + len)]);
        }
        let whole = cache.read(1, &path, 0, made.spec.device_bytes);
        assert!(whole == made.device);
        cache.rig.until("complete", || cache.rig.sink.has(&Said::Complete(Mode::Fscache, made.id())));
        let all: ReadyBits = made.spec.chunks.iter().map(|chunk| chunk.index).collect();
        assert_eq!(cache.rig.sink.ready(Mode::Fscache), all);
        // Every chunk was written once (I7), and gaps between them never.
        let written = cache.rig.metric(r#"skimmer_written_bytes_total{mode="fscache"}"#);
        assert_eq!(written, made.spec.referenced_bytes() as f64);
        let requests = source.requests();
        cache.read(1, &path, 0, made.spec.device_bytes);
        assert_eq!(source.requests(), requests);
        assert_eq!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="failed"}"#), 0.0);
        assert!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="hit"}"#) > 0.0);
        assert!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="miss"}"#) > 0.0);
        cache.stop();
    }
}

#[test]
fn what_the_file_holds_is_not_fetched_again() {
    let made = blob(7, 30, 60_000);
    let cache = Cache::new();
    let source = Memory::new("memory", &made);
    cache.rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    cache.expect(&made);
    let path = cache.file(&made);
    // Every chunk but the tenth; of that one all but its last block.
    let missing = made.spec.chunks.iter().find(|chunk| chunk.padded_len() > 8192).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for chunk in made.spec.chunks.iter() {
        let cut = if chunk == missing { 4096 } else { 0 };
        let range = chunk.start..chunk.padded_end() - cut;
        file.write_all_at(&made.device[bytes(range.clone())], range.start).unwrap();
    }
    cache.open(3, &made, &path);
    for chunk in made.spec.chunks.iter().filter(|chunk| *chunk != missing) {
        cache.read(3, &path, chunk.start, chunk.padded_len());
    }
    assert_eq!(source.requests(), 0);
    let found = cache.read(3, &path, missing.padded_end() - 4096, 4096);
    assert_eq!(found, made.device[bytes(missing.padded_end() - 4096..missing.padded_end())]);
    assert_eq!(source.requests(), 1);
    // The reader comes first: the sink may hear a moment later.
    let expected = [missing.index].into_iter().collect::<ReadyBits>();
    cache.rig.until("told", || cache.rig.sink.ready(Mode::Fscache) == expected);
    cache.stop();
}

#[test]
fn close_closes_every_descriptor_and_a_new_open_serves() {
    let made = blob(8, 20, 60_000);
    let cache = Cache::new();
    let source = Memory::new("memory", &made);
    cache.rig.add(&made, ReadyBits::new(), vec![source]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    // The kernel opened the same file again, as it does after a restore.
    cache.open(2, &made, &path);
    assert_eq!(descriptors(&path), 2);
    cache.read(2, &path, 0, 4096);
    cache.kernel.close(1).unwrap();
    cache.rig.until("one left", || descriptors(&path) == 1);
    let whole = cache.read(2, &path, 0, made.spec.device_bytes);
    assert!(whole == made.device);
    cache.kernel.close(2).unwrap();
    cache.rig.until("all closed", || descriptors(&path) == 0);
    // The next mount finds everything there.
    cache.open(5, &made, &path);
    cache.read(5, &path, 0, 4096);
    let status = cache.rig.wait(cache.rig.handle.status()).unwrap();
    assert_eq!(status.blobs[0].files[0].ready_bytes, made.spec.referenced_bytes());
    let busy = cache.rig.wait(cache.rig.handle.remove_blob(made.id()));
    assert!(matches!(busy, Err(DriverError::Busy { .. })), "{busy:?}");
    cache.kernel.close(5).unwrap();
    cache.rig.until("removable", || cache.rig.wait(cache.rig.handle.remove_blob(made.id())).is_ok());
    assert_eq!(descriptors(&path), 0);
    cache.stop();
}

#[test]
fn an_unexpected_cookie_is_refused_and_closed() {
    let made = blob(9, 3, 10_000);
    let cache = Cache::new();
    let path = cache.file(&made);
    let refused = |cookie: &str| {
        let msg_id = cache.kernel.open(9, VOLUME, cookie, anon(&path)).unwrap();
        assert_eq!(cache.reply(), Reply::Copen { msg_id, size: -i64::from(libc::ENOENT) });
        cache.rig.until("closed", || descriptors(&path) == 0);
    };
    refused("nobody");
    // Expected, but the blob was never added.
    cache.expect(&made);
    refused(&made.id().hex());
    cache.rig.until("told", || {
        let faults = cache.rig.sink.faults();
        faults.len() == 2 && faults[0].contains("\"nobody\"") && faults[1].contains("not known")
    });
    cache.stop();
}

#[test]
fn a_hole_in_a_bootstrap_is_filled_from_disk() {
    let cache = Cache::new();
    let mut bootstrap = vec![0; 2_500_123];
    Random::new(3).fill(&mut bootstrap);
    let local = cache.dir.path().join("bootstrap");
    std::fs::write(&local, &bootstrap).unwrap();
    let path = cache.dir.path().join("cache-file");
    File::create(&path).unwrap().set_len(2_500_123u64.next_multiple_of(4096)).unwrap();
    let role = CookieRole::Bootstrap { size: 2_500_123, path: local };
    cache.rig.wait(cache.rig.handle.expect_cookie(VOLUME, "boot", role)).unwrap();
    let msg_id = cache.kernel.open(4, VOLUME, "boot", anon(&path)).unwrap();
    assert_eq!(cache.reply(), Reply::Copen { msg_id, size: 2_500_123 });
    assert_eq!(cache.read(4, &path, 8192, 4096), bootstrap[8192..12288]);
    let size = 2_500_123u64.next_multiple_of(4096);
    let all = cache.read(4, &path, 0, size);
    assert!(all[..bootstrap.len()] == bootstrap && all[bootstrap.len()..].iter().all(|byte| *byte == 0));
    assert_eq!(cache.rig.metric(r#"skimmer_kernel_requests_total{mode="fscache",kind="read"}"#), 2.0);
    cache.stop();
}

#[test]
fn faults_of_sources_are_got_over() {
    let made = blob(11, 40, 100_000);
    let cache = Cache::new();
    let (bad, good) = (Memory::new("bad", &made), Memory::new("good", &made));
    bad.always(Some(Fault::Flipped));
    let hiccups = [Fault::Reset, Fault::Busy, Fault::Truncated, Fault::Panics, Fault::Reset];
    good.then([None, None, None, None].into_iter().chain(hiccups.map(Some)));
    cache.rig.add(&made, ReadyBits::new(), vec![bad.clone(), good]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    for chunk in made.spec.chunks.iter() {
        for _ in 0..10 {
            // A read may be failed for good by the panicking source; asking again must help.
            cache.read(1, &path, chunk.start, chunk.padded_len());
        }
    }
    let whole = cache.read(1, &path, 0, made.spec.device_bytes);
    assert!(whole == made.device, "a wrong byte reached the cache file");
    assert!(bad.requests() > 0);
    assert!(cache.rig.metric("skimmer_fetch_retries_total") > 0.0);
    cache.stop();
}

#[test]
fn with_bad_sources_only_nothing_is_written_and_the_read_ends() {
    for fault in [Fault::Flipped, Fault::Denied, Fault::Missing, Fault::Reset, Fault::Truncated] {
        let made = blob(12, 1, 50_000);
        let cache = Cache::new();
        let (one, two) = (Memory::new("one", &made), Memory::new("two", &made));
        one.always(Some(fault));
        two.always(Some(fault));
        cache.rig.add(&made, ReadyBits::new(), vec![one.clone(), two.clone()]);
        cache.expect(&made);
        let path = cache.file(&made);
        cache.open(1, &made, &path);
        let found = cache.read(1, &path, 0, made.spec.device_bytes);
        assert!(found.iter().all(|byte| *byte == 0), "{fault:?}: unverified bytes were written");
        assert_eq!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="failed"}"#), 1.0);
        assert!(one.requests() > 0 && two.requests() > 0, "{fault:?}: both sources are asked");
        let faults = cache.rig.sink.faults();
        assert!(faults.iter().any(|message| message.contains("failed")), "{fault:?}: {faults:?}");
        // Not sticky.
        two.always(None);
        assert!(cache.read(1, &path, 0, made.spec.device_bytes) == made.device);
        cache.stop();
    }
}

#[test]
fn a_second_image_brings_more_chunks_of_the_same_blob() {
    let made = blob(13, 40, 60_000);
    let cache = Cache::new();
    let (even, odd) = (made.only(|at| at % 2 == 0), made.only(|at| at % 2 == 1));
    let source = Memory::slow("memory", &made, Duration::from_millis(3));
    cache.rig.add(&even, ReadyBits::new(), vec![source.clone()]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    let msg_id = cache.kernel.read(1, 0, made.spec.device_bytes).unwrap();
    // In the middle of that.
    cache.rig.add(&odd, ReadyBits::new(), vec![source.clone(), source]);
    assert_eq!(cache.reply(), Reply::ReadComplete { msg_id, object_id: 1 });
    assert!(cache.read(1, &path, 0, made.spec.device_bytes) == made.device);
    cache.rig.until("complete", || cache.rig.sink.has(&Said::Complete(Mode::Fscache, made.id())));
    let wrong = blob(14, 40, 60_000);
    let mut spec = wrong.spec.clone();
    spec.id = made.id();
    let error = cache.rig.wait(cache.rig.handle.add_blob(spec, ReadyBits::new(), Vec::new()));
    assert!(matches!(error, Err(DriverError::Spec(_))), "{error:?}");
    cache.stop();
}

#[test]
fn a_blob_is_complete_without_what_only_an_unmounted_image_needed() {
    let made = blob(22, 40, 60_000);
    let cache = Cache::new();
    let (first, even) = (made.only(|at| at == 0), made.only(|at| at % 2 == 0));
    let source = Memory::new("memory", &made);
    source.always(Some(Fault::Hangs));
    let unknown = cache.rig.wait(cache.rig.handle.set_chunks(even.spec.clone()));
    assert!(matches!(unknown, Err(DriverError::UnknownBlob(_))), "{unknown:?}");
    cache.rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    // A read that waits must not be failed for it.
    let msg_id = cache.kernel.read(1, 0, 4096).unwrap();
    cache.rig.until("asked", || source.requests() > 0);
    let busy = cache.rig.wait(cache.rig.handle.set_chunks(even.spec.clone()));
    assert!(matches!(busy, Err(DriverError::Busy { .. })), "{busy:?}");
    assert_eq!(cache.kernel.waiting(), [(msg_id, 1)]);
    // That mount goes.
    cache.kernel.close(1).unwrap();
    cache.open(2, &made, &path);
    cache.rig.until("set", || cache.rig.wait(cache.rig.handle.set_chunks(even.spec.clone())).is_ok());
    source.always(None);
    for chunk in even.spec.chunks.iter() {
        let found = cache.read(2, &path, chunk.start, chunk.padded_len());
        assert_eq!(found, made.device[bytes(chunk.start..chunk.padded_end())]);
    }
    let complete =
        || cache.rig.sink.0.lock().unwrap().iter().filter(|said| matches!(said, Said::Complete(..))).count();
    cache.rig.until("complete", || complete() == 1);
    assert_eq!(
        cache.rig.sink.ready(Mode::Fscache),
        even.spec.chunks.iter().map(|chunk| chunk.index).collect()
    );
    // All that is left is there already: told at once.
    cache.rig.until("set", || cache.rig.wait(cache.rig.handle.set_chunks(first.spec.clone())).is_ok());
    cache.rig.until("complete", || complete() == 2);
    let status = cache.rig.wait(cache.rig.handle.status()).unwrap().blobs.remove(0);
    assert_eq!(status.referenced_bytes, first.spec.referenced_bytes());
    // Another mount needs all of it again; what was there is not fetched anew.
    cache.rig.add(&made, ReadyBits::new(), Vec::new());
    assert!(cache.read(2, &path, 0, made.spec.device_bytes) == made.device);
    let written = cache.rig.metric(r#"skimmer_written_bytes_total{mode="fscache"}"#);
    assert_eq!(written, made.spec.referenced_bytes() as f64);
    cache.stop();
}

#[test]
fn a_shutdown_leaves_reads_pending() {
    let made = blob(15, 4, 60_000);
    let cache = Cache::new();
    let source = Memory::new("memory", &made);
    source.always(Some(Fault::Hangs));
    cache.rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    let msg_id = cache.kernel.read(1, 0, 4096).unwrap();
    cache.rig.until("asked", || source.requests() == 1);
    let Cache { rig, kernel, dir } = cache;
    rig.stop();
    assert_eq!(kernel.waiting(), [(msg_id, 1)]);
    assert!(kernel.next_reply(Duration::ZERO).ok().flatten().is_none());
    assert_eq!(descriptors(&path), 0);
    drop(dir);
}

#[test]
fn odd_messages_are_survived() {
    let made = blob(16, 4, 60_000);
    let cache = Cache::new();
    cache.rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    cache.expect(&made);
    let mut random = Random::new(5);
    for len in [1usize, 15, 16, 31, 32, 33, 60, 900] {
        let mut message = vec![0; len];
        random.fill(&mut message);
        // No opcode that makes it an OPEN with a descriptor of this process.
        if len >= 8 {
            message[4..8].copy_from_slice(&77u32.to_ne_bytes());
        }
        cache.kernel.send_raw(&message).unwrap();
    }
    let _unknown = cache.kernel.read(4711, 0, 4096).unwrap();
    assert_eq!(cache.reply(), Reply::Command("restore".to_owned()));
    cache.kernel.close(4712).unwrap();
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    assert!(cache.read(1, &path, 0, made.spec.device_bytes) == made.device);
    // Past the end, and far past it.
    cache.read(1, &path, made.spec.device_bytes - 4096, 4096);
    let msg_id = cache.kernel.read(1, made.spec.device_bytes, 1 << 40).unwrap();
    assert_eq!(cache.reply(), Reply::ReadComplete { msg_id, object_id: 1 });
    assert!(cache.rig.metric(r#"skimmer_kernel_requests_total{mode="fscache",kind="bad"}"#) >= 9.0);
    cache.stop();
}

/// An earlier daemon was killed, and the kernel closes its descriptors only after this one has taken over.
#[test]
fn a_read_under_an_old_object_is_asked_for_again_until_it_can_be_served() {
    let restore = Reply::Command("restore".to_owned());
    let (made, slow) = (blob(20, 20, 60_000), blob(21, 4, 60_000));
    let cache = Cache::new();
    cache.rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    cache.expect(&made);
    let path = cache.file(&made);
    // Another read is being served all the while.
    let hanging = Memory::new("hanging", &slow);
    hanging.then([Some(Fault::Hangs)]);
    cache.rig.add(&slow, ReadyBits::new(), vec![hanging.clone()]);
    cache.expect(&slow);
    let slow_path = cache.file(&slow);
    cache.open(30, &slow, &slow_path);
    let held = cache.kernel.read(30, 0, 4096).unwrap();
    cache.rig.until("asked", || hanging.requests() == 1);

    let lost = cache.kernel.read(7, 8192, 12288).unwrap();
    for _ in 0..3 {
        assert_eq!(cache.reply(), restore);
        // Everything that waits comes again; the old descriptor is still there.
        cache.kernel.read_again(held, 30, 0, 4096).unwrap();
        cache.kernel.read_again(lost, 7, 8192, 12288).unwrap();
    }
    assert_eq!(cache.reply(), restore);
    cache.kernel.read_again(held, 30, 0, 4096).unwrap();
    // Now it is gone: the object is opened anew, then the read comes under its own number.
    cache.open(8, &made, &path);
    cache.kernel.read_again(lost, 8, 8192, 12288).unwrap();
    assert_eq!(cache.reply(), Reply::ReadComplete { msg_id: lost, object_id: 8 });
    let mut found = vec![0xaa; 12288];
    File::open(&path).unwrap().read_exact_at(&mut found, 8192).unwrap();
    assert_eq!(found, made.device[8192..20480]);

    // What came more than once is one read, told once.
    let status = cache.rig.wait(cache.rig.handle.status()).unwrap();
    assert_eq!(status.pending_reads, 1);
    assert_eq!(hanging.requests(), 1);
    let told = cache.rig.sink.faults();
    assert_eq!(told.iter().filter(|message| message.contains("object 7")).count(), 1, "{told:?}");
    // A reader that was killed: its number comes back with another read, and only that one is answered.
    let offset = slow.spec.chunks.last().unwrap().start;
    cache.kernel.read_again(held, 30, offset, 4096).unwrap();
    assert_eq!(cache.reply(), Reply::ReadComplete { msg_id: held, object_id: 30 });
    let mut found = vec![0xaa; 4096];
    File::open(&slow_path).unwrap().read_exact_at(&mut found, offset).unwrap();
    assert_eq!(found, slow.device[bytes(offset..offset + 4096)]);
    assert_eq!(cache.rig.wait(cache.rig.handle.status()).unwrap().pending_reads, 0);
    assert_eq!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="failed"}"#), 0.0);
    // The kernel was asked as often as it had to be.
    assert_eq!(cache.kernel.next_reply(Duration::from_millis(300)).unwrap(), None);
    cache.stop();
}

/// Reads of the device fail for a while, as they do for want of descriptors, and then go on.
#[test]
fn a_device_that_cannot_be_read_is_read_again() {
    use std::net::UdpSocket;

    struct Nothing;
    impl skimmer_cachefiles::device::CompleteRead for Nothing {
        fn complete(&self, _: std::os::fd::BorrowedFd<'_>, _: u32) -> std::io::Result<()> {
            Ok(())
        }
    }

    // Nobody listens on the other side, so that each command makes one read fail.
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (device, address) = (UdpSocket::bind("127.0.0.1:0").unwrap(), other.local_addr().unwrap());
    device.connect(address).unwrap();
    device.set_nonblocking(true).unwrap();
    let own = device.local_addr().unwrap();
    drop(other);
    let rig = Rig::start(hasty(), Frontends::default());
    let device = skimmer_cachefiles::Device::with_completion(device.into(), Box::new(Nothing));
    let dir = tempfile::tempdir().unwrap();
    let setup = FscacheSetup { dir: dir.path().to_owned(), tag: "skimmer".to_owned(), device: Some(device) };
    rig.wait(rig.handle.bind_fscache(setup)).unwrap();
    rig.until("told", || rig.sink.faults().iter().any(|message| message.contains("trying again")));
    let other = UdpSocket::bind(address).unwrap();
    rig.until("heard again", || {
        other.send_to(b"no message", own).unwrap();
        rig.metric(r#"skimmer_kernel_requests_total{mode="fscache",kind="bad"}"#) > 0.0
    });
    rig.stop();
}

#[test]
fn chunks_larger_than_memory_are_refused_and_tight_memory_is_enough() {
    let made = blob(17, 6, 3 << 20);
    let mut config = hasty();
    config.budget_bytes = 1 << 20;
    let rig = Rig::start(config, Frontends::default());
    let error = rig.wait(rig.handle.add_blob(made.spec.clone(), ReadyBits::new(), Vec::new()));
    assert!(matches!(error, Err(DriverError::ChunkTooLarge { .. })), "{error:?}");
    rig.stop();

    // Chunks of up to 3.9 MiB in 4 MiB of memory: one flies at a time, and all arrive.
    let made = blob(18, 8, 3_900_000);
    let cache = Cache::new();
    cache.rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    cache.expect(&made);
    let path = cache.file(&made);
    cache.open(1, &made, &path);
    let size = made.spec.device_bytes;
    let ids: Vec<u32> =
        (0..4).map(|n| cache.kernel.read(1, n * (size / 16384) * 4096, size / 4).unwrap()).collect();
    let mut answered: Vec<u32> = ids
        .iter()
        .map(|_| match cache.reply() {
            Reply::ReadComplete { msg_id, .. } => msg_id,
            other => panic!("{other:?}"),
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, ids);
    assert!(cache.read(1, &path, 0, size) == made.device);
    cache.stop();
}

#[test]
fn a_full_disk_fails_the_read() {
    let made = blob(19, 3, 20_000);
    let cache = Cache::new();
    cache.rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    cache.expect(&made);
    let full = Path::new("/dev/full");
    let msg_id =
        cache.kernel.open(1, VOLUME, &made.id().hex(), File::options().write(true).open(full).unwrap());
    let size = i64::try_from(made.spec.device_bytes).unwrap();
    assert_eq!(cache.reply(), Reply::Copen { msg_id: msg_id.unwrap(), size });
    let msg_id = cache.kernel.read(1, 0, 4096).unwrap();
    assert_eq!(cache.reply(), Reply::ReadComplete { msg_id, object_id: 1 });
    cache
        .rig
        .until("told", || cache.rig.sink.faults().iter().any(|message| message.contains("no space left")));
    assert_eq!(cache.rig.metric(r#"skimmer_reads_total{mode="fscache",result="failed"}"#), 1.0);
    assert!(cache.rig.metric(r#"skimmer_write_errors_total{mode="fscache"}"#) > 0.0);
    assert_eq!(cache.rig.sink.ready(Mode::Fscache), ReadyBits::new());
    cache.stop();
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for budget in [0, 4096, (1 << 20) + 1, (1 << 30) + 4096] {
        let mut config = hasty();
        config.budget_bytes = budget;
        let metrics = skimmer_daemon::metrics::Metrics::register(&mut Default::default());
        let sink = Box::new(common::Sink::default());
        let started = skimmer_daemon::driver::Driver::start(
            config,
            Frontends::default(),
            sink,
            metrics,
            runtime.handle().clone(),
        );
        assert!(matches!(started, Err(DriverError::Config(_))), "{budget}");
    }
}
