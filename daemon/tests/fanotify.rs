//! The fanotify path on the running kernel: a keeper in a process of its own, sparse files it has marked, and readers
//! whose every byte is compared. Needs root, Linux 6.14 and a target directory on ext4, XFS or btrfs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Fault, Made, Memory, PATIENCE, Random, Rig, Said, blob, bytes, hasty};
use skimmer_cachefiles::testing::{FakeKernel, Reply};
use skimmer_daemon::blob::ReadyBits;
use skimmer_daemon::driver::{DriverConfig, DriverError};
use skimmer_daemon::frontend::{CookieRole, Frontends, FscacheSetup, Mode};
use skimmer_fetcher::source::Source;
use skimmer_keeper::client::Keeper;
use skimmer_test_support::{scratch_dir, skip_this};
use tempfile::TempDir;

/// Set in the environment of a process that is to be a keeper: the socket to listen on.
const KEEPER: &str = "SKIMMER_TEST_KEEPER";
/// Set in the environment of a process that is to be a daemon: socket, blob file and seed.
const DAEMON: &str = "SKIMMER_TEST_DAEMON";

/// A process made of this very program, playing another part.
struct Part(Child);

impl Part {
    fn start(test: &str, variable: &str, value: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(variable, value);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: the keeper's process, when the environment asks for one.
#[test]
fn part_keeper() {
    if let Some(socket) = std::env::var_os(KEEPER) {
        let config = skimmer_keeper::server::Config::new(PathBuf::from(socket));
        skimmer_keeper::server::Server::new(config).unwrap().run();
    }
}

/// Not a test: a daemon whose only source never answers, when the environment asks for one.
#[test]
fn part_daemon() {
    let Some(value) = std::env::var_os(DAEMON) else { return };
    let value = value.into_string().unwrap();
    let [socket, path, seed] = value.split('|').collect::<Vec<_>>().try_into().unwrap();
    let made = blob(seed.parse().unwrap(), 20, 60_000);
    let source = Memory::new("hangs", &made);
    source.always(Some(Fault::Hangs));
    let keeper = Keeper::connect(Path::new(socket)).unwrap();
    let rig = Rig::start(hasty(), Frontends { keeper: Some(keeper) });
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    rig.wait(rig.handle.watch(made.id(), writer(Path::new(path)).into())).unwrap();
    File::create(Path::new(path).with_extension("watched")).unwrap();
    rig.until("asked", || source.requests() > 0);
    File::create(Path::new(path).with_extension("asked")).unwrap();
    std::thread::sleep(PATIENCE);
}

/// Not a test: a daemon that serves well, but knows nothing of what earlier ones wrote, when the environment asks.
#[test]
fn part_good_daemon() {
    let Some(value) = std::env::var_os(GOOD_DAEMON) else { return };
    let value = value.into_string().unwrap();
    let [socket, path, seed] = value.split('|').collect::<Vec<_>>().try_into().unwrap();
    let made = blob(seed.parse().unwrap(), 200, 60_000);
    let keeper = Keeper::connect(Path::new(socket)).unwrap();
    let mut config = hasty();
    // Little at a time, so that there is always something left to be killed over.
    (config.engine.first_window, config.engine.max_window, config.engine.min_fetch) = (0, 0, 0);
    let rig = Rig::start(config, Frontends { keeper: Some(keeper) });
    let source = Memory::slow("memory", &made, Duration::from_millis(1));
    rig.add(&made, ReadyBits::new(), vec![source]);
    rig.wait(rig.handle.watch(made.id(), writer(Path::new(path)).into())).unwrap();
    File::create(Path::new(path).with_extension("watched")).unwrap();
    std::thread::sleep(PATIENCE);
}

/// The same for a daemon that serves well.
const GOOD_DAEMON: &str = "SKIMMER_TEST_GOOD_DAEMON";

struct Machine {
    keeper: Part,
    socket: PathBuf,
    dir: TempDir,
    /// Apart, and short: a socket's path has at most 107 bytes.
    _sockets: TempDir,
}

impl Machine {
    /// `None` where the kernel cannot do it: the test is then counted as skipped.
    #[track_caller]
    fn new() -> Option<Self> {
        let dir = scratch_dir();
        if let Err(why) = skimmer_fanotify::probe(dir.path()) {
            skip_this(&why.to_string());
            return None;
        }
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("keeper.sock");
        let keeper = Part::start("part_keeper", KEEPER, socket.to_str().unwrap());
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < PATIENCE, "the keeper does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        Some(Self { keeper, socket, dir, _sockets: sockets })
    }

    fn rig(&self, config: DriverConfig) -> Rig {
        let keeper = Keeper::connect(&self.socket).unwrap();
        Rig::start(config, Frontends { keeper: Some(keeper) })
    }

    /// A sparse blob file, and the descriptor to write it, opened before any mark.
    fn file(&self, made: &Made) -> (PathBuf, File) {
        let path = self.dir.path().join(made.id().hex());
        File::create_new(&path).unwrap().set_len(made.spec.device_bytes).unwrap();
        let writer = writer(&path);
        (path, writer)
    }
}

fn writer(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Reads in another thread with a descriptor opened now, after the mark; the driver never waits for its own reader.
fn read(path: &Path, offset: u64, len: u64) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = channel();
    let file = File::open(path).unwrap();
    std::thread::spawn(move || {
        let mut found = vec![0xaa; usize::try_from(len).unwrap()];
        let result = file.read_exact_at(&mut found, offset).map(|()| found);
        let _ = sender.send(result);
    });
    receiver
}

fn now<T>(receiver: &Receiver<T>) -> T {
    receiver.recv_timeout(PATIENCE).expect("a read hangs")
}

/// Forgets the file's pages, so that the next read asks the file system.
fn drop_pages(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

const REQUESTS: &str = r#"skimmer_kernel_requests_total{mode="fanotify",kind="read"}"#;

#[test]
fn every_byte_is_right_and_then_the_kernel_is_alone() {
    let Some(machine) = Machine::new() else { return };
    for seed in 20..23 {
        let made = Arc::new(blob(seed, 80, 200_000));
        let rig = machine.rig(hasty());
        let source = Memory::slow("memory", &made, Duration::from_millis(1));
        rig.add(&made, ReadyBits::new(), vec![source.clone()]);
        let (path, writer) = machine.file(&made);
        rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
        let readers: Vec<_> = (0..6)
            .map(|n| {
                let (made, path) = (Arc::clone(&made), path.clone());
                std::thread::spawn(move || {
                    let file = File::open(path).unwrap();
                    let mut random = Random::new(seed * 100 + n);
                    for _ in 0..60 {
                        let start = random.below(made.spec.device_bytes);
                        let len = (1 + random.below(300_000)).min(made.spec.device_bytes - start);
                        let mut found = vec![0xaa; usize::try_from(len).unwrap()];
                        file.read_exact_at(&mut found, start).unwrap();
                        assert!(
                            found == made.device[bytes(start..start + len)],
                            "wrong bytes at {start}+{len}"
                        );
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.join().unwrap();
        }
        assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
        rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
        // Each chunk once.
        let written = rig.metric(r#"skimmer_written_bytes_total{mode="fanotify"}"#);
        assert_eq!(written, made.spec.referenced_bytes() as f64);
        assert_eq!(rig.metric(r#"skimmer_reads_total{mode="fanotify",result="failed"}"#), 0.0);
        assert!(rig.metric(REQUESTS) > 0.0);
        assert_eq!(rig.metric("skimmer_in_flight_bytes"), 0.0);
        let all: ReadyBits = made.spec.chunks.iter().map(|chunk| chunk.index).collect();
        assert_eq!(rig.sink.ready(Mode::Fanotify), all);

        rig.wait(rig.handle.unwatch(made.id())).unwrap();
        let (requests, fetches) = (rig.metric(REQUESTS), source.requests());
        drop_pages(&path);
        assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
        assert_eq!(rig.metric(REQUESTS), requests, "a complete file still asks");
        assert_eq!(source.requests(), fetches);
        rig.wait(rig.handle.remove_blob(made.id())).unwrap();
        rig.stop();
    }
}

#[test]
fn referenced_chunks_are_enough() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(30, 40, 60_000);
    let (some, rest) = (made.only(|at| at % 3 == 0), made.only(|at| at % 3 != 0));
    let rig = machine.rig(hasty());
    rig.add(&some, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == some.device);
    rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
    // A second image over the same blob; the page cache holds the zeros that nobody refers to.
    rig.add(&rest, ReadyBits::new(), Vec::new());
    drop_pages(&path);
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
    rig.stop();
}

#[test]
fn faults_of_sources_are_got_over() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(31, 30, 100_000);
    let mut config = hasty();
    config.engine.max_attempts = 12;
    let rig = machine.rig(config);
    let (bad, good) = (Memory::new("bad", &made), Memory::new("good", &made));
    bad.always(Some(Fault::Flipped));
    good.then([Some(Fault::Reset), Some(Fault::Busy), None, Some(Fault::Truncated)]);
    rig.add(&made, ReadyBits::new(), vec![bad.clone() as Arc<dyn Source>, good]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    for chunk in made.spec.chunks.iter() {
        let found = now(&read(&path, chunk.start, chunk.padded_len())).unwrap();
        assert!(found == made.device[bytes(chunk.start..chunk.padded_end())]);
    }
    assert!(bad.requests() > 0 && rig.metric("skimmer_fetch_retries_total") > 0.0);
    rig.stop();
}

#[test]
fn with_bad_sources_only_reads_fail_and_later_ones_succeed() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(32, 10, 60_000);
    let rig = machine.rig(hasty());
    let (one, two) = (Memory::new("one", &made), Memory::new("two", &made));
    one.always(Some(Fault::Flipped));
    two.always(Some(Fault::Missing));
    rig.add(&made, ReadyBits::new(), vec![one.clone() as Arc<dyn Source>, two.clone()]);
    let (path, writer) = machine.file(&made);
    let raw = writer.try_clone().unwrap();
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let error = now(&read(&path, 0, made.spec.device_bytes)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    // Chunks that were right are in the file, and nothing else is.
    let mut found = vec![0xaa; made.device.len()];
    raw.read_exact_at(&mut found, 0).unwrap();
    for chunk in made.spec.chunks.iter() {
        let range = bytes(chunk.start..chunk.padded_end());
        let right = found[range.clone()] == made.device[range.clone()];
        assert!(
            right || found[range].iter().all(|byte| *byte == 0),
            "unverified bytes in chunk {}",
            chunk.index
        );
    }
    assert!(found != made.device);
    rig.until("told", || rig.sink.faults().iter().any(|message| message.contains("failed")));
    two.always(None);
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
    rig.stop();
}

#[test]
fn what_the_disk_lost_is_fetched_again_and_readers_wait_for_it() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(34, 40, 60_000);
    let mut config = hasty();
    // Nothing but what is asked for.
    (config.engine.first_window, config.engine.max_window, config.engine.min_fetch) = (0, 0, 0);
    let rig = machine.rig(config);
    let source = Memory::new("memory", &made);
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    let (path, writer) = machine.file(&made);
    let raw = writer.try_clone().unwrap();
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let half = made.spec.chunks[20].start;
    assert!(now(&read(&path, 0, half)).unwrap() == made.device[bytes(0..half)]);
    let requests = source.requests();

    // One waits for bytes that are on their way.
    source.always(Some(Fault::Hangs));
    let waiting = read(&path, made.spec.chunks[39].start, 4096);
    rig.until("asked", || source.requests() > requests);
    // The disk has the first ten chunks, and a hole for the rest.
    let kept: ReadyBits = made.spec.chunks[..10].iter().map(|chunk| chunk.index).collect();
    let first = made.spec.chunks[10].start;
    drop_pages(&path);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&raw, punch, first, made.spec.device_bytes - first).unwrap();
    source.always(None);
    rig.wait(rig.handle.lost(Mode::Fanotify, made.id(), kept)).unwrap();
    let last = made.spec.chunks[39].start;
    assert!(now(&waiting).unwrap() == made.device[bytes(last..last + 4096)]);
    let requests = source.requests();
    assert!(now(&read(&path, 0, first)).unwrap() == made.device[bytes(0..first)]);
    assert_eq!(source.requests(), requests, "what was kept is fetched again");
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
    rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
    rig.stop();
}

#[test]
fn a_new_driver_serves_what_the_old_one_left() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(33, 20, 60_000);
    let rig = machine.rig(hasty());
    let source = Memory::new("hangs", &made);
    source.always(Some(Fault::Hangs));
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let waiting = read(&path, 0, made.spec.device_bytes);
    rig.until("asked", || source.requests() > 0);
    rig.stop();
    let early = waiting.try_recv();
    assert!(early.is_err(), "the read ended without a daemon: {:?}", early.map(|r| r.map(|b| b.len())));

    let rig = machine.rig(hasty());
    rig.until("parked", || rig.wait(rig.handle.status()).unwrap().parked_events == 1);
    assert!(waiting.try_recv().is_err());
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    assert!(now(&waiting).unwrap() == made.device);
    // Already watched: no second mark, and our descriptor is not used.
    rig.wait(rig.handle.watch(made.id(), self::writer(&path).into())).unwrap();
    rig.wait(rig.handle.unwatch(made.id())).unwrap();
    rig.stop();
}

#[test]
fn a_killed_daemon_costs_nothing_but_time() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(34, 20, 60_000);
    let (path, _) = machine.file(&made);
    let value = format!("{}|{}|34", machine.socket.display(), path.display());
    let daemon = Part::start("part_daemon", DAEMON, &value);
    let start = Instant::now();
    let exists = |extension: &str| {
        while !path.with_extension(extension).exists() {
            assert!(start.elapsed() < PATIENCE, "the other daemon does not get to {extension}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    exists("watched");
    let waiting = read(&path, 0, made.spec.device_bytes);
    exists("asked");
    daemon.kill();
    let later = read(&path, made.spec.device_bytes - 4096, 4096);
    std::thread::sleep(Duration::from_millis(50));
    let early =
        |read: &Receiver<io::Result<Vec<u8>>>| read.try_recv().map(|result| result.map(|found| found.len()));
    assert!(
        early(&waiting).is_err() && early(&later).is_err(),
        "ended: {:?} {:?}",
        early(&waiting),
        early(&later)
    );
    let rig = machine.rig(hasty());
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    assert!(now(&waiting).unwrap() == made.device);
    assert!(now(&later).unwrap() == made.device[made.device.len() - 4096..]);
    // Its events were never raised by our own writes: those went through the descriptor from before the mark.
    rig.wait(rig.handle.unwatch(made.id())).unwrap();
    rig.stop();
}

#[test]
fn kills_under_load_never_show_a_wrong_byte() {
    let Some(machine) = Machine::new() else { return };
    let made = Arc::new(blob(40, 200, 60_000));
    let (path, raw) = machine.file(&made);
    let value = format!("{}|{}|40", machine.socket.display(), path.display());
    let watched = path.with_extension("watched");
    let begin = || {
        let daemon = Part::start("part_good_daemon", GOOD_DAEMON, &value);
        let start = Instant::now();
        while !watched.exists() {
            assert!(start.elapsed() < PATIENCE, "the daemon does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::fs::remove_file(&watched).unwrap();
        daemon
    };
    let mut daemon = begin();
    let stop = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|n| {
            let (made, path, stop) = (Arc::clone(&made), path.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let file = File::open(path).unwrap();
                let mut random = Random::new(n);
                let mut reads = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let start = random.below(made.spec.device_bytes);
                    let len = (1 + random.below(100_000)).min(made.spec.device_bytes - start);
                    let mut found = vec![0xaa; usize::try_from(len).unwrap()];
                    file.read_exact_at(&mut found, start).unwrap();
                    assert!(found == made.device[bytes(start..start + len)], "wrong bytes at {start}+{len}");
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    let mut random = Random::new(77);
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(random.below(40)));
        daemon.kill();
        daemon = begin();
    }
    stop.store(true, Ordering::Relaxed);
    let reads: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert!(reads > 0);
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
    drop(raw);
}

#[test]
fn answers_wait_for_a_keeper_that_is_slow() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(41, 1, 60_000);
    let rig = machine.rig(hasty());
    let source = Memory::slow("memory", &made, Duration::from_millis(300));
    rig.add(&made, ReadyBits::new(), vec![source]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    // More answers at once than the socket holds.
    let readers: Vec<_> = (0..600).map(|_| read(&path, 0, 4096)).collect();
    rig.until("all wait", || rig.metric(REQUESTS) >= 600.0);
    let keeper = rustix::process::Pid::from_child(&machine.keeper.0);
    rustix::process::kill_process(keeper, rustix::process::Signal::STOP).unwrap();
    rig.until("all served", || rig.wait(rig.handle.status()).unwrap().pending_reads == 0);
    rustix::process::kill_process(keeper, rustix::process::Signal::CONT).unwrap();
    for reader in readers {
        assert!(now(&reader).unwrap() == made.device[..4096]);
    }
    rig.stop();
}

#[test]
fn an_incomplete_blob_is_let_go_when_nobody_has_it_open() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(42, 20, 60_000);
    let mut config = hasty();
    (config.engine.first_window, config.engine.max_window, config.engine.min_fetch) = (0, 0, 0);
    let rig = machine.rig(config);
    let source = Memory::new("memory", &made);
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    assert!(now(&read(&path, 0, 4096)).unwrap() == made.device[..4096]);
    // The thread that read has closed its descriptor by now, or soon will.
    rig.until("unwatched", || rig.wait(rig.handle.unwatch(made.id())).is_ok());
    let first = rig.sink.ready(Mode::Fanotify);
    assert!(!made.spec.is_complete(&first));
    // The next mount goes on from there.
    rig.wait(rig.handle.watch(made.id(), self::writer(&path).into())).unwrap();
    let requests = source.requests();
    assert!(now(&read(&path, 0, 4096)).unwrap() == made.device[..4096]);
    assert_eq!(source.requests(), requests);
    assert!(now(&read(&path, 0, made.spec.device_bytes)).unwrap() == made.device);
    rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
    rig.stop();
}

#[test]
fn both_modes_serve_one_blob_from_their_own_files() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(43, 40, 60_000);
    let rig = machine.rig(hasty());
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let (kernel, device) = FakeKernel::new().unwrap();
    let setup =
        FscacheSetup { dir: machine.dir.path().to_owned(), tag: "skimmer".to_owned(), device: Some(device) };
    rig.wait(rig.handle.bind_fscache(setup)).unwrap();
    rig.wait(rig.handle.expect_cookie("erofs,skimmer", "cookie", CookieRole::Blob(made.id()))).unwrap();
    let cache = machine.dir.path().join("cache-file");
    File::create(&cache).unwrap().set_len(made.spec.device_bytes).unwrap();
    kernel.open(1, "erofs,skimmer", "cookie", File::options().write(true).open(&cache).unwrap()).unwrap();
    let waiting = read(&path, 0, made.spec.device_bytes);
    let msg_id = kernel.read(1, 0, made.spec.device_bytes).unwrap();
    while kernel.next_reply(PATIENCE).unwrap().expect("an answer")
        != (Reply::ReadComplete { msg_id, object_id: 1 })
    {}
    assert!(std::fs::read(&cache).unwrap() == made.device);
    assert!(now(&waiting).unwrap() == made.device);
    for mode in [Mode::Fanotify, Mode::Fscache] {
        rig.until("complete", || rig.sink.has(&Said::Complete(mode, made.id())));
    }
    let files = rig.wait(rig.handle.status()).unwrap().blobs.remove(0).files;
    assert_eq!(files.iter().map(|file| file.mode).collect::<Vec<_>>(), [Mode::Fscache, Mode::Fanotify]);
    assert!(files.iter().all(|file| file.ready_bytes == made.spec.referenced_bytes() && file.reads == 1));
    rig.stop();
}

#[test]
fn accesses_to_a_blob_that_never_comes_are_denied() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(35, 5, 60_000);
    let rig = machine.rig(hasty());
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    rig.stop();
    let mut config = hasty();
    config.park_limit = Duration::from_millis(50);
    let rig = machine.rig(config);
    let error = now(&read(&path, 0, 4096)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    rig.until("told", || rig.sink.faults().iter().any(|message| message.contains("not added again")));
    rig.stop();
}

#[test]
fn odd_accesses() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(36, 5, 60_000);
    let rig = machine.rig(hasty());
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    let (path, writer) = machine.file(&made);
    let unknown = rig.wait(rig.handle.watch(blob(37, 1, 5000).id(), writer.try_clone().unwrap().into()));
    assert!(matches!(unknown, Err(DriverError::UnknownBlob(_))), "{unknown:?}");
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let size = made.spec.device_bytes;
    // Cutting the file short would turn its data into zeros.
    let (sender, receiver) = channel();
    let other = self::writer(&path);
    std::thread::spawn(move || sender.send(other.set_len(4096)));
    assert_eq!(now(&receiver).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
    // Past the end there is nothing to wait for.
    let file = File::open(&path).unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut found = vec![0; 100_000];
        sender.send((file.read_at(&mut found, size), file.read_at(&mut found, size - 1), found))
    });
    let (at_end, before_end, found) = now(&receiver);
    assert_eq!((at_end.unwrap(), before_end.unwrap()), (0, 1));
    assert_eq!(found[0], made.device[made.device.len() - 1]);
    // Incomplete, and a reader has it open: the mark stays, or he would read zeros.
    let reader = File::open(&path).unwrap();
    if !made.spec.is_complete(&rig.sink.ready(Mode::Fanotify)) {
        let busy = rig.wait(rig.handle.unwatch(made.id()));
        assert!(matches!(busy, Err(DriverError::Busy { .. })), "{busy:?}");
    }
    drop(reader);
    assert!(now(&read(&path, 0, size)).unwrap() == made.device);
    rig.stop();
}

#[test]
fn prefetch_fills_without_a_reader() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(38, 300, 60_000);
    let rig = machine.rig(DriverConfig { engine: skimmer_engine::Config::default(), ..hasty() });
    let source = Memory::new("memory", &made);
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    rig.wait(rig.handle.prefetch(made.id(), 0..made.spec.device_bytes, false)).unwrap();
    rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
    assert_eq!(rig.metric(REQUESTS), 0.0);
    // Many flights, one request.
    assert!(made.spec.device_bytes > 4 << 20, "{}", made.spec.device_bytes);
    assert_eq!(source.requests(), 1);
    rig.wait(rig.handle.unwatch(made.id())).unwrap();
    assert!(std::fs::read(&path).unwrap() == made.device);
    rig.stop();
}

#[test]
fn no_more_is_written_than_is_allowed() {
    const ALLOWED: [u64; 2] = [2_500_000, 4_500_000];
    let Some(machine) = Machine::new() else { return };
    let made = blob(38, 300, 60_000);
    assert!(made.spec.device_bytes > 7_000_000, "{}", made.spec.device_bytes);
    let rig = machine.rig(DriverConfig { engine: skimmer_engine::Config::default(), ..hasty() });
    rig.add(&made, ReadyBits::new(), vec![Memory::new("memory", &made)]);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();
    let shorts = || rig.sink.0.lock().unwrap().iter().filter(|said| **said == Said::Short).count();
    for (turn, allowed) in ALLOWED.into_iter().enumerate() {
        rig.wait(rig.handle.allow(allowed)).unwrap();
        rig.wait(rig.handle.prefetch(made.id(), 0..made.spec.device_bytes, false)).unwrap();
        rig.until("short", || shorts() == turn + 1);
        let used = path.metadata().unwrap().blocks() * 512;
        assert!(used <= allowed, "{used} bytes after {allowed} were allowed");
    }
    // Nobody makes room: readers do not wait for ever.
    let end = made.spec.device_bytes - 4096;
    let found = now(&read(&path, end, 4096)).unwrap();
    assert!(found == made.device[usize::try_from(end).unwrap()..]);
    rig.until("complete", || rig.sink.has(&Said::Complete(Mode::Fanotify, made.id())));
    assert_eq!(shorts(), ALLOWED.len());
    rig.wait(rig.handle.unwatch(made.id())).unwrap();
    assert!(std::fs::read(&path).unwrap() == made.device);
    rig.stop();
}

#[test]
fn without_a_keeper_nothing_can_be_watched() {
    let made = blob(39, 1, 5000);
    let rig = Rig::start(hasty(), Frontends::default());
    rig.add(&made, ReadyBits::new(), Vec::new());
    let file = tempfile::tempfile().unwrap();
    let error = rig.wait(rig.handle.watch(made.id(), file.into())).unwrap_err();
    assert!(matches!(error, DriverError::Unavailable { mode: "fanotify", .. }), "{error:?}");
    rig.stop();
}

#[test]
fn a_dead_keeper_ends_the_driver() {
    let Some(machine) = Machine::new() else { return };
    let made = blob(45, 5, 60_000);
    let rig = machine.rig(hasty());
    let source = Memory::new("memory", &made);
    source.always(Some(Fault::Hangs));
    rig.add(&made, ReadyBits::new(), vec![source.clone()]);
    // A read over fscache waits meanwhile.
    let (kernel, device) = FakeKernel::new().unwrap();
    let setup =
        FscacheSetup { dir: machine.dir.path().to_owned(), tag: "skimmer".to_owned(), device: Some(device) };
    rig.wait(rig.handle.bind_fscache(setup)).unwrap();
    rig.wait(rig.handle.expect_cookie("erofs,skimmer", "cookie", CookieRole::Blob(made.id()))).unwrap();
    let cache = machine.dir.path().join("cache-file");
    File::create(&cache).unwrap().set_len(made.spec.device_bytes).unwrap();
    kernel.open(1, "erofs,skimmer", "cookie", File::options().write(true).open(&cache).unwrap()).unwrap();
    let msg_id = kernel.read(1, 0, 4096).unwrap();
    rig.until("asked", || source.requests() > 0);
    let (path, writer) = machine.file(&made);
    rig.wait(rig.handle.watch(made.id(), writer.into())).unwrap();

    let Machine { keeper, dir, .. } = machine;
    let handle = rig.handle.clone();
    keeper.kill();
    let (error, sink) = rig.ended();
    let DriverError::KeeperLost(_) = &error else { panic!("{error:?}") };
    let text = error.to_string();
    assert!(text.contains("skimmer-keeper") && text.contains("start skimmerd again"), "{text}");
    assert!(sink.faults().iter().any(|message| message.contains(&text)), "{:?}", sink.faults());
    // Left to the next daemon, neither completed nor failed.
    assert_eq!(kernel.waiting(), [(msg_id, 1)]);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(matches!(runtime.block_on(handle.status()), Err(DriverError::Stopped)));
    drop((path, dir));
}
