use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Instant;

use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec, Verified, verify};

use super::*;
use crate::arena::Slab;

const MANY: usize = 64 * BLOCK;

fn checked(slab: Slab, fill: u8) -> Verified<Slab> {
    let stored = vec![fill; slab.len()];
    let len = u32::try_from(slab.len()).unwrap();
    let digest = ChunkDigest::Blake3(*blake3::hash(&stored).as_bytes());
    let spec = ChunkSpec { stored_offset: 0, stored_len: len, len, codec: Codec::None, digest };
    verify(&spec, &stored, slab).unwrap()
}

fn run(arena: &Arena, blocks: usize, fill: u8) -> Run {
    Run::new(checked(arena.alloc(blocks * BLOCK).unwrap(), fill))
}

fn next_written(ring: &mut Ring) -> (u64, usize, io::Result<()>) {
    loop {
        match ring.next_event() {
            Some(Event::Written { tag, len, result }) => return (tag, len, result),
            Some(_) => {}
            None => ring.wait(None).unwrap(),
        }
    }
}

#[test]
fn writes_joined_chunks_with_one_operation() {
    let (mut ring, arena) = Ring::new(8, MANY).unwrap();
    for register in [false, true] {
        let file = tempfile::tempfile().unwrap();
        let target = ring.file(Arc::new(file.try_clone().unwrap()), register);
        let (a, b) = arena.alloc(3 * BLOCK).unwrap().split_at(BLOCK).ok().unwrap();
        let mut run = Run::new(checked(a, 1));
        run.push(checked(b, 2)).unwrap();
        ring.write(run, &target, 8192, 77);
        assert_eq!(arena.in_use(), 3 * BLOCK);
        let (tag, len, result) = next_written(&mut ring);
        result.unwrap();
        assert_eq!((tag, len, arena.in_use()), (77, 3 * BLOCK, 0));
        let mut bytes = vec![9; 3 * BLOCK];
        file.read_exact_at(&mut bytes, 8192).unwrap();
        assert!(bytes[..BLOCK].iter().all(|b| *b == 1) && bytes[BLOCK..].iter().all(|b| *b == 2));
    }
}

#[test]
fn buffers_are_registered_as_they_are_used() {
    const HUGE: usize = 2 << 20;
    const MOST: usize = 8 * HUGE + 3 * BLOCK;
    let (mut ring, arena) = Ring::new(64, MOST).unwrap();
    assert_eq!(ring.registered_bytes(), 0);
    let file = tempfile::tempfile().unwrap();
    let target = ring.file(Arc::new(file.try_clone().unwrap()), true);
    let mut at = 0;
    let mut registered = Vec::new();
    // None is waited for: what the kernel reads from stays pinned when more is registered.
    for fill in 0..8u8 {
        ring.write(run(&arena, HUGE / BLOCK, fill), &target, at, u64::from(fill));
        at += u64::try_from(HUGE).unwrap();
        registered.push(ring.registered_bytes() / HUGE);
    }
    ring.write(run(&arena, 3, 8), &target, at, 8);
    // Others may lock too little memory for that: then less is registered, and the bytes are right all the same.
    let unlimited = rustix::process::geteuid().is_root();
    if unlimited {
        assert_eq!((registered, ring.registered_bytes()), (vec![1, 2, 4, 4, 8, 8, 8, 8], MOST));
    }
    for _ in 0..9 {
        next_written(&mut ring).2.unwrap();
    }
    let mut bytes = vec![0; MOST];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.chunks(HUGE).zip(0..).all(|(part, fill): (_, u8)| part.iter().all(|byte| *byte == fill)));
}

#[test]
fn more_writes_than_the_queue_holds() {
    let (mut ring, arena) = Ring::new(4, MANY).unwrap();
    let file = tempfile::tempfile().unwrap();
    let target = ring.file(Arc::new(file.try_clone().unwrap()), true);
    for block in 0..64u8 {
        ring.write(run(&arena, 1, block), &target, u64::from(block) * 4096, u64::from(block));
    }
    let mut seen: Vec<u64> = (0..64)
        .map(|_| {
            let (tag, _, result) = next_written(&mut ring);
            result.unwrap();
            tag
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..64).collect::<Vec<_>>());
    let mut bytes = vec![0; MANY];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.chunks(BLOCK).zip(0u8..).all(|(block, fill)| block.iter().all(|b| *b == fill)));
    assert_eq!((arena.in_use(), ring.writes()), (0, 0));
}

#[test]
fn errors_come_back_with_their_number() {
    let (mut ring, arena) = Ring::new(4, MANY).unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let target = ring.file(Arc::new(full), false);
    ring.write(run(&arena, 1, 0), &target, 0, 1);
    assert_eq!(next_written(&mut ring).2.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    let readonly = ring.file(Arc::new(File::open("/dev/null").unwrap()), true);
    ring.write(run(&arena, 1, 0), &readonly, 0, 2);
    assert_eq!(next_written(&mut ring).2.unwrap_err().raw_os_error(), Some(libc::EBADF));
    assert_eq!(arena.in_use(), 0);
}

#[test]
fn short_writes_go_on_at_a_whole_block() {
    assert!(matches!(progress(8192, 0, 8192), Progress::Done));
    assert!(matches!(progress(4096, 4096, 8192), Progress::Done));
    assert!(matches!(progress(4096, 0, 8192), Progress::Again(4096)));
    assert!(matches!(progress(5000, 4096, 16384), Progress::Again(8192)));
    assert!(matches!(progress(-libc::EINTR, 4096, 8192), Progress::Again(4096)));
    assert!(matches!(progress(100, 0, 8192), Progress::Failed(e) if e.kind() == io::ErrorKind::WriteZero));
    assert!(matches!(progress(0, 0, 8192), Progress::Failed(_)));
    assert!(matches!(progress(9000, 0, 8192), Progress::Failed(_)));
    assert!(matches!(progress(i32::MIN, 0, 8192), Progress::Failed(_)));
}

#[test]
fn a_short_write_of_the_kernel_is_taken_up_again() {
    // A pipe of one page takes one page at a time.
    let (mut ring, arena) = Ring::new(4, MANY).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, BLOCK).unwrap();
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        io::Read::read_to_end(&mut File::from(reader), &mut all).unwrap();
        all
    });
    let target = ring.file(Arc::new(writer), false);
    ring.write(run(&arena, 8, 5), &target, 0, 1);
    next_written(&mut ring).2.unwrap();
    drop(target);
    assert_eq!(reading.join().unwrap(), vec![5; 8 * BLOCK]);
}

#[test]
fn polls_report_once_and_wakes_are_not_lost() {
    let (mut ring, _arena) = Ring::new(4, BLOCK).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    ring.poll(Arc::new(reader), For::Reading, 5).unwrap();
    ring.wait(Some(Duration::ZERO)).unwrap();
    assert!(ring.next_event().is_none());
    rustix::io::write(&writer, b"x").unwrap();
    ring.wait(None).unwrap();
    assert!(matches!(ring.next_event(), Some(Event::Ready { token: 5 })));
    ring.wait(Some(Duration::from_millis(1))).unwrap();
    assert!(ring.next_event().is_none());
    for _ in 0..100 {
        let waker = ring.waker();
        let waking = std::thread::spawn(move || (0..50).for_each(|_| waker.wake()));
        ring.wait(None).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Woken)));
        waking.join().unwrap();
        while ring.next_event().is_some() {}
        ring.wait(Some(Duration::ZERO)).unwrap();
        while ring.next_event().is_some() {}
    }
}

#[test]
fn registered_files_leave_the_table_with_their_last_user() {
    let (mut ring, arena) = Ring::new(4, MANY).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let target = ring.file(Arc::new(writer), true);
    ring.write(run(&arena, 1, 1), &target, 0, 1);
    drop(target);
    next_written(&mut ring).2.unwrap();
    // The sweep of the next wait takes the last reference away, so the pipe ends.
    ring.wait(Some(Duration::ZERO)).unwrap();
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        io::Read::read_to_end(&mut File::from(reader), &mut all).unwrap();
        all.len()
    });
    let start = Instant::now();
    while !reading.is_finished() && start.elapsed() < Duration::from_secs(20) {
        ring.wait(Some(Duration::from_millis(5))).unwrap();
    }
    assert_eq!(reading.join().unwrap(), BLOCK);
}

#[test]
fn closing_and_dropping_wait_for_writes() {
    for close in [true, false] {
        let (mut ring, arena) = Ring::new(4, MANY).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, BLOCK).unwrap();
        ring.poll(Arc::new(reader.try_clone().unwrap()), For::Reading, 1).unwrap();
        let target = ring.file(Arc::new(writer), false);
        ring.write(run(&arena, 2, 1), &target, 0, 9);
        ring.wait(Some(Duration::ZERO)).unwrap();
        drop(target);
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut all = Vec::new();
            io::Read::read_to_end(&mut File::from(reader), &mut all).unwrap();
            all.len()
        });
        let mut outcome = None;
        if close {
            ring.close(|tag, result| outcome = Some((tag, result.is_ok()))).unwrap();
            assert_eq!(outcome, Some((9, true)));
            assert_eq!(reading.join().unwrap(), 2 * BLOCK);
        } else {
            drop(ring);
            // Dropping does not take up short writes again, but every buffer is back.
            reading.join().unwrap();
        }
        assert_eq!(arena.in_use(), 0);
    }
}
