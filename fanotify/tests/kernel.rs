//! The running kernel: marks, events, answers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use skimmer_fanotify::{
    AnswerError, DenyErrno, EventAccess, EventBuffer, Group, GroupError, Notification, PreAccess, Unsupported,
};
use skimmer_test_support::{scratch_dir, skip_this};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

const LEN: u64 = 1 << 20;

struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    /// Opened before the mark.
    writer: File,
    group: Group,
    buffer: EventBuffer,
    queue: Vec<PreAccess>,
}

impl Bench {
    /// A marked sparse file, or `None` where this cannot be had: the test is then counted as skipped.
    #[track_caller]
    fn new() -> Option<Self> {
        let dir = scratch_dir();
        if let Err(why) = skimmer_fanotify::probe(dir.path()) {
            skip_this(&why.to_string());
            return None;
        }
        let path = dir.path().join("blob");
        let writer = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        writer.set_len(LEN).unwrap();
        let group = Group::new(EventAccess::ReadOnly).unwrap();
        group.mark(&writer).unwrap();
        Some(Self { _dir: dir, path, writer, group, buffer: EventBuffer::new(), queue: Vec::new() })
    }

    fn read(&self, offset: u64, len: usize) -> JoinHandle<io::Result<Vec<u8>>> {
        let file = File::open(&self.path).unwrap();
        thread::spawn(move || {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        })
    }

    fn next(&mut self) -> PreAccess {
        while self.queue.is_empty() {
            let mut ready = [rustix::event::PollFd::new(&self.group, rustix::event::PollFlags::IN)];
            let minute = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut ready, Some(&minute)).unwrap(), 1, "no event");
            let queue = &mut self.queue;
            self.group
                .read(&mut self.buffer, |notification| match notification {
                    Notification::Access(access) => queue.push(access),
                    other => panic!("{other:?}"),
                })
                .unwrap();
        }
        self.queue.remove(0)
    }

    fn nothing_waits(&mut self) -> bool {
        let mut count = 0;
        self.group.read(&mut self.buffer, |_| count += 1).unwrap();
        count == 0 && self.queue.is_empty()
    }
}

fn inode(fd: impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}

#[test]
fn a_read_waits_for_its_bytes() {
    let Some(mut bench) = Bench::new() else { return };
    let reader = bench.read(8192 + 100, 4096);
    let access = bench.next();
    let range = access.range().unwrap();
    // Widened to pages.
    assert_eq!((range.offset, range.offset + range.count), (8192, 8192 + 8192));
    assert_eq!(access.pid(), i32::try_from(std::process::id()).unwrap());
    assert_eq!(inode(&access), inode(&bench.writer));
    bench.writer.write_all_at(&[0x5a; 8192], 8192).unwrap();
    assert!(!reader.is_finished());
    access.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), [0x5a; 4096]);
    assert!(bench.nothing_waits(), "the early writer is silent");
}

#[test]
fn denials_carry_the_permitted_errors() {
    let Some(mut bench) = Bench::new() else { return };
    let permitted = [
        DenyErrno::Io,
        DenyErrno::Perm,
        DenyErrno::Busy,
        DenyErrno::TextBusy,
        DenyErrno::Again,
        DenyErrno::NoSpace,
        DenyErrno::Quota,
    ];
    for errno in permitted {
        let reader = bench.read(0, 4096);
        bench.next().deny(errno).unwrap();
        assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(errno.raw()));
    }
    // ETIMEDOUT, which the kernel would refuse.
    let reader = bench.read(0, 4096);
    bench.next().deny(DenyErrno::from_raw(110)).unwrap();
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(DenyErrno::Io.raw()));
}

#[test]
fn a_dropped_token_denies() {
    let Some(mut bench) = Bench::new() else { return };
    let reader = bench.read(0, 4096);
    drop(bench.next());
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(DenyErrno::Io.raw()));
    // Not sticky: a later read asks again.
    let reader = bench.read(0, 4096);
    let access = bench.next();
    bench.writer.write_all_at(&[1; 4096], 0).unwrap();
    access.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), [1; 4096]);
}

#[test]
fn a_token_keeps_the_group_open() {
    let Some(mut bench) = Bench::new() else { return };
    let reader = bench.read(0, 4096);
    let access = bench.next();
    let Bench { group, writer, .. } = bench;
    drop(group);
    assert!(!reader.is_finished());
    writer.write_all_at(&[2; 4096], 0).unwrap();
    access.allow().unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), [2; 4096]);
}

#[test]
fn many_waiting_accesses_in_any_order() {
    let Some(mut bench) = Bench::new() else { return };
    let readers: Vec<_> = (0..40u64).map(|at| (at, bench.read(at * 16_384, 4096))).collect();
    let mut accesses: Vec<_> = readers.iter().map(|_| bench.next()).collect();
    let offsets: HashSet<u64> = accesses.iter().map(|access| access.range().unwrap().offset).collect();
    assert_eq!(offsets.len(), 40);
    accesses.reverse();
    for access in accesses {
        let at = access.range().unwrap().offset;
        let value = u8::try_from(at / 16_384).unwrap() + 1;
        bench.writer.write_all_at(&[value; 4096], at).unwrap();
        access.allow().unwrap();
    }
    for (at, reader) in readers {
        assert_eq!(reader.join().unwrap().unwrap(), [u8::try_from(at).unwrap() + 1; 4096]);
    }
}

#[test]
fn without_a_mark_nothing_waits() {
    let Some(mut bench) = Bench::new() else { return };
    let early = File::open(&bench.path).unwrap();
    bench.group.unmark(&bench.writer).unwrap();
    let mut bytes = [9; 4096];
    early.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 4096], "a hole: this is why only complete files are unmarked");
    assert!(bench.nothing_waits());
    assert!(matches!(bench.group.unmark(&bench.writer), Err(GroupError::NotMarked(_))));
}

#[test]
fn a_killed_accessor_leaves_a_harmless_token() {
    let Some(mut bench) = Bench::new() else { return };
    let mut child = std::process::Command::new("cat").arg(&bench.path).spawn().unwrap();
    let access = bench.next();
    assert_eq!(access.pid(), i32::try_from(child.id()).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    match access.allow() {
        Ok(()) | Err(AnswerError::Gone) => {}
        Err(error) => panic!("{error}"),
    }
    assert!(bench.nothing_waits());
}

#[test]
fn a_file_system_that_has_not_opted_in_is_named() {
    let shm = Path::new("/dev/shm");
    if !rustix::fs::statfs(shm).is_ok_and(|stat| stat.f_type == 0x0102_1994) {
        return skip_this("no tmpfs at /dev/shm");
    }
    match skimmer_fanotify::probe(shm).unwrap_err() {
        Unsupported::Refused { source: GroupError::FileSystem(_), .. } => {}
        Unsupported::Refused { source, .. } => skip_this(&source.to_string()),
        other => panic!("{other}"),
    }
}

#[test]
fn a_missing_directory_is_named() {
    let error = skimmer_fanotify::probe(Path::new("/no such directory")).unwrap_err().to_string();
    assert!(error.starts_with("/no such directory: "), "{error}");
}

#[test]
fn the_probe_leaves_nothing_behind() {
    let dir = scratch_dir();
    let _ = skimmer_fanotify::probe(dir.path());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
