//! What must hold.

use crate::manager::Manager;
use crate::support::{Bench, Client, KeeperProcess, byte_at, expected, fill, read};
use rustix::process::Signal;
use skimmer_keeper::client::{Command, Keeper, KeeperError, Notice};
use skimmer_keeper::protocol::{Errno, EventId, FileId, Fill};
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const EIO: i32 = 5;
const ENOENT: i32 = 2;
const EBADF: i32 = 9;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENOSPC: i32 = 28;
const LEN: u64 = 1 << 20;

type Scenario = fn(&Bench);

pub(crate) const ALL: &[(&str, Scenario)] = &[
    ("a_read_waits_for_its_bytes", a_read_waits_for_its_bytes),
    ("both_die_and_another_goes_on", both_die_and_another_goes_on),
    ("filled_ranges_need_no_daemon", filled_ranges_need_no_daemon),
    ("what_is_not_durable_ends_with_the_daemon", what_is_not_durable_ends_with_the_daemon),
    ("denials_carry_their_error", denials_carry_their_error),
    ("a_dead_daemons_event_goes_to_the_next", a_dead_daemons_event_goes_to_the_next),
    ("a_second_daemon_is_refused", a_second_daemon_is_refused),
    ("a_successor_waits_for_a_dying_daemon", a_successor_waits_for_a_dying_daemon),
    ("nothing_ends_it_while_it_holds_something", nothing_ends_it_while_it_holds_something),
    ("an_incomplete_file_in_use_keeps_its_mark", an_incomplete_file_in_use_keeps_its_mark),
    ("a_complete_file_drains", a_complete_file_drains),
    ("what_cannot_be_watched_is_refused", what_cannot_be_watched_is_refused),
    ("strange_commands_do_no_harm", strange_commands_do_no_harm),
    ("the_device_is_held", the_device_is_held),
    ("more_readers_than_slots", more_readers_than_slots),
    ("one_keeper_per_socket", one_keeper_per_socket),
    ("killed_daemons_cost_no_byte", killed_daemons_cost_no_byte),
    ("a_standby_takes_over", a_standby_takes_over),
    ("an_upgrade_keeps_everything", an_upgrade_keeps_everything),
    ("killed_keepers_cost_no_byte", killed_keepers_cost_no_byte),
    ("with_nobody_left_readers_get_zeros", with_nobody_left_readers_get_zeros),
];

fn a_read_waits_for_its_bytes(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, welcome) = bench.connect();
    assert!(welcome.files.is_empty() && !welcome.device_held);
    let mode = std::fs::metadata(bench.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "the blob", &writer), 0);
    let reader = read(&path, 8192, 4096);
    let (event, file, offset, count) = client.event();
    assert_eq!(file, FileId(7));
    assert!(offset <= 8192 && offset + count >= 12_288, "{offset} {count}");
    fill(&writer, offset, count);
    client.allow(event);
    assert_eq!(reader.join().unwrap().unwrap(), expected(8192, 4096));

    // Complete: no mark, no event, not even for a reader from before.
    fill(&writer, 0, LEN);
    assert_eq!(client.unwatch(7, true), 0);
    let whole = usize::try_from(LEN).unwrap();
    assert_eq!(read(&path, 0, whole).join().unwrap().unwrap(), expected(0, whole));
    assert_eq!(client.unwatch(7, true), ENOENT);
    assert_eq!(client.done(Command::Stop), 0);
}

fn filled_ranges_need_no_daemon(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    fill(&writer, 0, LEN / 2);
    client.fill(7, 0, LEN / 2, Fill::Durable);
    // A name that is not watched is no harm.
    client.fill(8, 0, LEN, Fill::Durable);
    let half = usize::try_from(LEN / 2).unwrap();
    // The event of a hole shows that the keeper has read what was sent before.
    let hole = read(&path, LEN / 2, 4096);
    let (event, ..) = client.event();
    assert_eq!(read(&path, 0, half).join().unwrap().unwrap(), expected(0, half));
    drop(client);
    // Nor while there is none at all.
    assert_eq!(read(&path, 4096, 8192).join().unwrap().unwrap(), expected(4096, 8192));
    let (mut client, _) = bench.connect();
    let (again, _, offset, count) = client.event();
    assert_eq!(again, event);
    fill(&writer, offset, count);
    client.allow(again);
    assert_eq!(hole.join().unwrap().unwrap(), expected(LEN / 2, 4096));
}

/// The disk may fail under what was written, and a dead daemon does not hear of it.
fn what_is_not_durable_ends_with_the_daemon(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    fill(&writer, 0, LEN / 2);
    client.fill(7, 0, LEN / 2, Fill::Written);
    client.fill(7, 0, 8192, Fill::Durable);
    client.fill(7, 4096, 4096, Fill::Written);
    // The event of a hole shows that the keeper has read what was sent before.
    let heard = |client: &mut Client, at: u64| {
        let hole = read(&path, at, 4096);
        let (event, _, offset, count) = client.event();
        assert_eq!(offset, at);
        fill(&writer, offset, count);
        client.allow(event);
        assert_eq!(hole.join().unwrap().unwrap(), expected(at, 4096));
    };
    heard(&mut client, LEN / 2);
    let half = usize::try_from(LEN / 2).unwrap();
    assert_eq!(read(&path, 0, half).join().unwrap().unwrap(), expected(0, half));
    // What is absent after all is asked for again.
    client.fill(7, 16_384, 1, Fill::Absent);
    heard(&mut client, LEN / 4 * 3);
    heard(&mut client, 16_384);
    drop(client);
    assert_eq!(read(&path, 0, 8192).join().unwrap().unwrap(), expected(0, 8192));
    let waits = read(&path, 8192, 4096);
    thread::sleep(Duration::from_millis(100));
    assert!(!waits.is_finished());
    let (mut client, _) = bench.connect();
    let (event, _, offset, _) = client.event();
    assert_eq!(offset, 8192);
    client.allow(event);
    assert_eq!(waits.join().unwrap().unwrap(), expected(8192, 4096));
}

fn denials_carry_their_error(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    // ETIMEDOUT is not permitted and would leave the reader blocked; it becomes EIO.
    for (errno, seen) in [(ENOSPC, ENOSPC), (110, EIO)] {
        let reader = read(&path, 0, 4096);
        let (event, ..) = client.event();
        client.0.send(Command::Answer { event, result: Err(Errno::new(errno).unwrap()) }).unwrap();
        assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(seen));
    }
}

fn a_dead_daemons_event_goes_to_the_next(bench: &Bench) {
    let _keeper = bench.start(&[]);
    bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    let mut worker = bench.worker(&["hold", path.to_str().unwrap()]);
    assert_eq!(worker.line(), "watching");
    let readers = [read(&path, 0, 4096), read(&path, 65_536, 4096)];
    let mut seen: Vec<String> = (0..2).map(|_| worker.line()).collect();
    seen.sort();
    assert_eq!(seen, ["event 0", "event 65536"]);
    drop(writer);
    worker.kill();

    let (mut client, welcome) = bench.connect();
    let [held] = &welcome.files[..] else { panic!("{:?}", welcome.files) };
    assert_eq!((held.file, held.label.as_str()), (FileId(7), "the blob"));
    // This one dies too, by closing its connection without an answer.
    let first: HashSet<EventId> = (0..2).map(|_| client.event().0).collect();
    drop(client);

    let (mut client, mut welcome) = bench.connect();
    let writer = File::from(welcome.files.pop().unwrap().fd);
    let events = [client.event(), client.event()];
    assert_eq!(first, events.iter().map(|event| event.0).collect());
    for reader in &readers {
        assert!(!reader.is_finished(), "nobody has answered it");
    }
    for (event, _, offset, count) in events {
        fill(&writer, offset, count);
        client.allow(event);
    }
    for (reader, offset) in readers.into_iter().zip([0, 65_536]) {
        assert_eq!(reader.join().unwrap().unwrap(), expected(offset, 4096));
    }
}

fn a_second_daemon_is_refused(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let mut worker = bench.worker(&["connect"]);
    let line = worker.line();
    let pid = std::process::id();
    assert!(line.contains(&format!("another daemon, process {pid};")), "{line}");
    // The one that is served does not notice.
    let (_, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    // A second connection of the same process is refused as well.
    assert!(matches!(Keeper::connect(&bench.socket()), Err(KeeperError::Busy { .. })));
}

fn a_successor_waits_for_a_dying_daemon(bench: &Bench) {
    let _keeper = bench.start(&[]);
    drop(bench.connect());
    let (path, _writer) = bench.sparse("blob", LEN);
    let mut first = bench.worker(&["leave", path.to_str().unwrap()]);
    assert_eq!(first.line(), "left");
    // It lives and could still be writing: its successor waits, and is turned away in the end.
    let pid = first.pid();
    let error = Keeper::connect(&bench.socket()).unwrap_err();
    assert!(matches!(error, KeeperError::Busy { pid: holder, .. } if holder == pid), "{error}");
    // When it dies the successor is let in.
    let mut second = bench.worker(&["connect"]);
    thread::sleep(Duration::from_millis(50));
    first.kill();
    assert_eq!(second.line(), "connected");
}

fn nothing_ends_it_while_it_holds_something(bench: &Bench) {
    let mut keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    assert_eq!(client.done(Command::Stop), EBUSY);
    for signal in [Signal::TERM, Signal::INT, Signal::PIPE, Signal::IO] {
        rustix::process::kill_process(keeper.pid(), signal).unwrap();
    }
    let reader = read(&path, 0, 4096);
    let (event, _, offset, count) = client.event();
    fill(&writer, offset, count);
    client.allow(event);
    assert_eq!(reader.join().unwrap().unwrap(), expected(0, 4096));
    assert!(keeper.is_running());
    // With nothing held a signal ends it, and its socket goes too.
    fill(&writer, 0, LEN);
    assert_eq!(client.unwatch(7, true), 0);
    rustix::process::kill_process(keeper.pid(), Signal::TERM).unwrap();
    assert!(keeper.wait().success());
    assert!(!bench.socket().exists());
    assert!(matches!(Keeper::connect(&bench.socket()), Err(KeeperError::NotRunning { .. })));
}

fn an_incomplete_file_in_use_keeps_its_mark(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    let open = File::open(&path).unwrap();
    assert_eq!(client.unwatch(7, false), EBUSY);
    // The mark is still there.
    let reader = read(&path, 4096, 4096);
    let (event, _, offset, count) = client.event();
    assert_eq!(client.unwatch(7, false), EBUSY);
    fill(&writer, offset, count);
    client.allow(event);
    assert_eq!(reader.join().unwrap().unwrap(), expected(4096, 4096));
    drop(open);
    assert_eq!(client.unwatch(7, false), 0);
    // And can be watched anew, under another name.
    assert_eq!(client.watch(8, "", &writer), 0);
}

fn a_complete_file_drains(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    let readers = [read(&path, 0, 4096), read(&path, 8192, 4096)];
    let (event, ..) = client.event();
    client.event();
    fill(&writer, 0, LEN);
    assert_eq!(client.unwatch(7, true), 0);
    // Answered late, as always; the other one is not answered at all, and let through when we go.
    client.allow(event);
    drop(client);
    for (reader, offset) in readers.into_iter().zip([0, 8192]) {
        assert_eq!(reader.join().unwrap().unwrap(), expected(offset, 4096));
    }
    let (mut client, welcome) = bench.connect();
    assert!(welcome.files.is_empty());
    assert_eq!(client.done(Command::Stop), 0);
}

fn what_cannot_be_watched_is_refused(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    let (_, other) = bench.sparse("other", LEN);
    assert_eq!(client.watch(7, "", &File::open(&path).unwrap()), EBADF);
    assert_eq!(client.watch(7, "", &File::options().write(true).open("/dev/null").unwrap()), EBADF);
    assert_eq!(client.watch(7, "a", &writer), 0);
    assert_eq!(client.watch(7, "a", &writer), 0, "the same again is no error");
    assert_eq!(client.watch(8, "", &writer), EEXIST);
    assert_eq!(client.watch(7, "", &other), EEXIST);
    assert_eq!(client.watch(8, "", &other), 0);
}

fn strange_commands_do_no_harm(bench: &Bench) {
    let _keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    for event in [0, 1, 1 << 16, u64::MAX].map(EventId) {
        client.allow(event);
        assert!(matches!(client.next(), Notice::Stale { event: named } if named == event));
    }
    let reader = read(&path, 0, 4096);
    let (event, _, offset, count) = client.event();
    fill(&writer, offset, count);
    client.allow(event);
    client.allow(event);
    assert!(matches!(client.next(), Notice::Stale { event: named } if named == event));
    assert_eq!(reader.join().unwrap().unwrap(), expected(0, 4096));
    // Bytes that are no command end the connection and nothing else.
    rustix::net::send(&client.0, b"hello", rustix::net::SendFlags::NOSIGNAL).unwrap();
    let closed = loop {
        match client.0.recv() {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(error) => break error,
        }
    };
    assert!(matches!(closed, KeeperError::Closed), "{closed}");
    assert_eq!(bench.connect().1.files.len(), 1);
}

fn the_device_is_held(bench: &Bench) {
    let mut keeper = bench.start(&["--device", "/dev/zero"]);
    let (mut client, _) = bench.connect();
    for _ in 0..2 {
        let sent = client.0.send(Command::OpenDevice).unwrap();
        let Notice::Device { seq, fd } = client.next() else { panic!("no device") };
        assert_eq!(seq, sent);
        let mut byte = [1];
        rustix::io::read(&fd, &mut byte[..]).unwrap();
        assert_eq!(byte, [0]);
    }
    assert_eq!(client.done(Command::Stop), EBUSY);
    drop(client);
    let (mut client, welcome) = bench.connect();
    assert!(welcome.device_held);
    assert_eq!(client.done(Command::CloseDevice), 0);
    assert_eq!(client.done(Command::Stop), 0);
    assert!(keeper.wait().success());

    let _keeper = bench.start(&["--device", "/dev/no such device"]);
    let (mut client, _) = bench.connect();
    assert_eq!(client.done(Command::OpenDevice), ENOENT);
}

fn more_readers_than_slots(bench: &Bench) {
    let _keeper = bench.start(&["--events", "32"]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", 64 << 20);
    assert_eq!(client.watch(7, "", &writer), 0);
    let offsets: Vec<u64> = (0..400).map(|index| index * 131_072).collect();
    let readers: Vec<_> = offsets.iter().map(|&offset| read(&path, offset, 4096)).collect();
    let mut names = HashSet::new();
    for _ in &readers {
        let (event, _, offset, count) = client.event();
        assert!(names.insert(event), "no name twice");
        fill(&writer, offset, count);
        client.allow(event);
    }
    for (reader, offset) in readers.into_iter().zip(offsets) {
        assert_eq!(reader.join().unwrap().unwrap(), expected(offset, 4096));
    }
    // And with a table larger than the socket's buffer, towards a daemon that does not listen for a while.
    drop(client);
    let (mut client, _) = bench.connect();
    let offsets: Vec<u64> = (0..400).map(|index| index * 131_072 + 65_536).collect();
    let readers: Vec<_> = offsets.iter().map(|&offset| read(&path, offset, 4096)).collect();
    thread::sleep(Duration::from_millis(100));
    for _ in &readers {
        let (event, _, offset, count) = client.event();
        fill(&writer, offset, count);
        client.allow(event);
    }
    for (reader, offset) in readers.into_iter().zip(offsets) {
        assert_eq!(reader.join().unwrap().unwrap(), expected(offset, 4096));
    }
}

fn one_keeper_per_socket(bench: &Bench) {
    let _first = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let mut second = bench.start(&[]);
    assert!(!second.wait().success());
    assert!(bench.socket().exists());
    assert_eq!(client.done(Command::Stop), 0);
}

/// Daemons are killed again and again under four readers that compare every byte.
/// What is held when the server dies or executes another program: a file with a filled half, and a reader of the other.
fn goes_on(bench: &Bench, keeper: &mut KeeperProcess, end: impl FnOnce(&mut KeeperProcess)) {
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "the blob", &writer), 0);
    let (_other, unneeded) = bench.sparse("other", LEN);
    assert_eq!(client.watch(9, "", &unneeded), 0);
    fill(&writer, 0, LEN / 2);
    client.fill(7, 0, LEN / 2, Fill::Durable);
    let hole = read(&path, LEN / 2, 4096);
    let (event, ..) = client.event();
    assert_eq!(client.unwatch(9, false), 0);
    end(keeper);

    assert!(matches!(client.lost(), KeeperError::Closed));
    // Filled ranges need no daemon.
    let half = usize::try_from(LEN / 2).unwrap();
    assert_eq!(read(&path, 0, half).join().unwrap().unwrap(), expected(0, half));
    assert!(!hole.is_finished(), "nobody has answered it");
    let (mut client, mut welcome) = bench.connect();
    let held = welcome.files.pop().unwrap();
    assert!(welcome.files.is_empty());
    assert_eq!((held.file, held.label.as_str()), (FileId(7), "the blob"));
    let (again, file, offset, count) = client.event();
    assert_eq!((again, file), (event, FileId(7)));
    let writer = File::from(held.fd);
    fill(&writer, offset, count);
    client.allow(again);
    assert_eq!(hole.join().unwrap().unwrap(), expected(LEN / 2, 4096));
    // What comes after it waits too, and has another name.
    let next = read(&path, LEN / 4 * 3, 4096);
    let (later, _, offset, count) = client.event();
    assert!(later.0 > event.0);
    fill(&writer, offset, count);
    client.allow(later);
    assert_eq!(next.join().unwrap().unwrap(), expected(LEN / 4 * 3, 4096));
    drop(writer);
    drain(&mut client);
    keeper.wait_for_all();
    assert!(!bench.socket().exists());
    assert!(!bench.start(&["--reload"]).wait().success(), "nobody is there");
}

fn a_standby_takes_over(bench: &Bench) {
    let mut keeper = bench.start(&[]);
    goes_on(bench, &mut keeper, |keeper| {
        rustix::process::kill_process(keeper.pid(), Signal::KILL).unwrap();
        keeper.wait();
    });
}

fn an_upgrade_keeps_everything(bench: &Bench) {
    let mut keeper = bench.start(&[]);
    goes_on(bench, &mut keeper, |_| assert!(bench.start(&["--reload"]).wait().success()));
}

/// Both at once: only the service manager has what they held.
fn both_die_and_another_goes_on(bench: &Bench) {
    let manager = Manager::new();
    let mut keeper = bench.start_under(&manager, &[]);
    goes_on(bench, &mut keeper, |keeper| {
        // It is started while the others live, so what it was handed is old.
        let mut waits = bench.start_under(&manager, &["--wait"]);
        thread::sleep(Duration::from_millis(200));
        assert!(waits.is_running());
        keeper.kill();
        keeper.wait();
        assert!(!waits.wait().success());
        *keeper = bench.start_under(&manager, &["--wait"]);
    });
}

/// What the others here rely on would show: without the two processes the kernel lets readers through unfilled.
fn with_nobody_left_readers_get_zeros(bench: &Bench) {
    let mut keeper = bench.start(&[]);
    let (mut client, _) = bench.connect();
    let (path, writer) = bench.sparse("blob", LEN);
    assert_eq!(client.watch(7, "", &writer), 0);
    let reader = read(&path, 0, 4096);
    client.event();
    keeper.kill();
    keeper.wait_for_all();
    assert_eq!(reader.join().unwrap().unwrap(), vec![0; 4096]);
}

/// Server and standby are killed in turn and at random, while readers compare every byte.
fn killed_keepers_cost_no_byte(bench: &Bench) {
    kill_under_readers(bench, |keeper, kill| {
        let members = keeper.pair();
        // Which of them is the server changes with every kill.
        let victim = members[usize::try_from(kill).unwrap() % members.len()];
        let _ = rustix::process::kill_process(victim, Signal::KILL);
        // Else the next kill may find a pair of which one is dying.
        keeper.wait_without(victim);
        false
    });
}

fn killed_daemons_cost_no_byte(bench: &Bench) {
    kill_under_readers(bench, |_, _| true);
}

/// `kill` is called again and again; true: the daemon is to be killed.
fn kill_under_readers(bench: &Bench, mut kill: impl FnMut(&mut KeeperProcess, u64) -> bool) {
    const KILLS: u64 = 50;
    const SIZE: u64 = 256 << 20;
    const READ: usize = 16 * 1024;
    let mut keeper = bench.start(&[]);
    bench.connect();
    let (path, writer) = bench.sparse("blob", SIZE);
    drop(writer);
    let mut worker = bench.worker(&["serve", path.to_str().unwrap()]);
    assert_eq!(worker.line(), "watching");
    let done = AtomicBool::new(false);
    let (reads, wrong, errors) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 1..=4u64 {
            let (path, done, reads, wrong, errors) = (&path, &done, &reads, &wrong, &errors);
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                let mut bytes = vec![0; READ];
                let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                while !done.load(Ordering::Relaxed) {
                    // xorshift64: other offsets in each thread, the same in each run.
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let offset = state % (SIZE - u64::try_from(READ).unwrap());
                    match file.read_exact_at(&mut bytes, offset) {
                        Ok(()) => {
                            let bad = bytes.iter().zip(offset..).filter(|&(&byte, at)| byte != byte_at(at));
                            wrong.fetch_add(u64::try_from(bad.count()).unwrap(), Ordering::Relaxed);
                        }
                        Err(_) => {
                            errors.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let end = EndReaders { done: &done, keeper: &mut keeper };
        for number in 0..KILLS {
            thread::sleep(Duration::from_millis(5 + number % 7 * 5));
            if kill(end.keeper, number) {
                worker.kill();
                worker = bench.worker(&["serve", path.to_str().unwrap()]);
                assert_eq!(worker.line(), "watching");
            }
        }
        // The last worker still serves what waits when the readers are told to end.
    });
    let reads = reads.into_inner();
    eprintln!("{KILLS} kills, {reads} reads, {wrong:?} wrong bytes, {errors:?} errors");
    assert!(reads > KILLS, "the readers must have been at work");
    assert_eq!((wrong.into_inner(), errors.into_inner()), (0, 0));
    worker.kill();
    let (mut client, welcome) = bench.connect();
    assert_eq!(welcome.files.len(), 1);
    drain(&mut client);
    keeper.wait_for_all();
}

/// Tells the readers to end; when the scenario fails half way it also sets free those that wait.
struct EndReaders<'a> {
    done: &'a AtomicBool,
    keeper: &'a mut KeeperProcess,
}

impl Drop for EndReaders<'_> {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if thread::panicking() {
            self.keeper.kill();
        }
    }
}

/// The file is closed by its readers, so even incomplete it can be let go.
fn drain(client: &mut Client) {
    assert_eq!(client.unwatch(7, false), 0);
    assert_eq!(client.done(Command::Stop), 0);
}
