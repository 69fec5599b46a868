//! What is held, written down in a memory file as it changes: the next process of this keeper begins with it.
//!
//! | offset | what |
//! |---|---|
//! | 0 | [`Header`] |
//! | 4 KiB | one record of 64 bytes for each slot of the event table |
//! | 6 MiB | inodes that are complete, 16 bytes each |
//! | 8 MiB | one record of 256 bytes for each watched file |
//! | 4 GiB | the map of what is filled, 16 MiB for each of them |
//!
//! Every record is one `pwrite` within one page, which a kill cannot cut in two. Numbers are native endian; descriptors
//! are numbers of the table that the processes share.

use super::log::{Limit, log};
use super::present;
use crate::protocol::{FileId, LABEL_MAX, Label};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno as Sys;
use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Of this layout. A program that knows another one does not take over.
pub const VERSION: u32 = 1;
const MAGIC: u32 = u32::from_le_bytes(*b"SkmL");

const EVENTS_AT: u64 = 4 << 10;
const EVENT_LEN: usize = 64;
const COMPLETE_AT: u64 = 6 << 20;
const COMPLETE_LEN: usize = 16;
const FILES_AT: u64 = 8 << 20;
const FILE_LEN: usize = 256;
const LABEL_AT: usize = 64;
const MAPS_AT: u64 = 4 << 30;
const MAP_STRIDE: u64 = 16 << 20;
/// Words of a map that are written at once.
const MAP_WORDS: usize = 512;
/// Files beyond it would run into the maps.
pub(crate) const FILES_MAX: usize = 1 << 20;

/// No descriptor, no process.
pub(crate) const NONE: i32 = -1;

/// What there is one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) listener: RawFd,
    pub(crate) lock: RawFd,
    pub(crate) group: RawFd,
    pub(crate) device: RawFd,
    /// The process that takes over when we end, and its pidfd.
    pub(crate) standby: i32,
    pub(crate) standby_fd: RawFd,
    /// The daemon that was given something to work on, and its pidfd.
    pub(crate) daemon: i32,
    pub(crate) daemon_fd: RawFd,
    /// Slots of the event table.
    pub(crate) slots: u16,
    /// Slots of files that were ever used.
    pub(crate) files: u32,
    /// No name at or above it was given to an event.
    pub(crate) next_event: u64,
}

impl Header {
    const EMPTY: Self = Self {
        listener: NONE,
        lock: NONE,
        group: NONE,
        device: NONE,
        standby: NONE,
        standby_fd: NONE,
        daemon: NONE,
        daemon_fd: NONE,
        slots: 0,
        files: 0,
        next_event: 1,
    };
}

/// An access that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventRecord {
    pub(crate) id: u64,
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) count: u64,
    pub(crate) fd: RawFd,
}

/// A watched file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) file: FileId,
    pub(crate) label: Label,
    pub(crate) inode: [u64; 2],
    pub(crate) writer: RawFd,
    pub(crate) draining: bool,
    /// What its map stands for.
    pub(crate) mapped: u64,
}

/// The memory file.
#[derive(Debug)]
pub(crate) struct Ledger {
    fd: OwnedFd,
    header: RefCell<Header>,
    failures: RefCell<Limit>,
}

/// Packs numbers one behind the other.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put<const M: usize>(mut self, value: [u8; M]) -> Self {
        self.bytes[self.at..self.at + M].copy_from_slice(&value);
        self.at += M;
        self
    }

    fn i32(self, value: i32) -> Self {
        self.put(value.to_ne_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(value.to_ne_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(value.to_ne_bytes())
    }
}

/// Takes them apart again.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const M: usize>(&mut self) -> [u8; M] {
        let (head, rest) = self.0.split_first_chunk().map_or(([0; M], &[][..]), |(head, rest)| (*head, rest));
        self.0 = rest;
        head
    }

    fn i32(&mut self) -> i32 {
        i32::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }
}

fn place(start: u64, index: usize, len: usize) -> u64 {
    let index = u64::try_from(index).unwrap_or(u64::MAX);
    start.saturating_add(index.saturating_mul(u64::try_from(len).unwrap_or(u64::MAX)))
}

impl Ledger {
    /// An empty one.
    pub(crate) fn new() -> Result<Self, Sys> {
        let fd = rustix::fs::memfd_create("skimmer-keeper", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, place(MAPS_AT, FILES_MAX, usize::try_from(MAP_STRIDE).unwrap_or(0)))?;
        let ledger = Self { fd, header: RefCell::new(Header::EMPTY), failures: RefCell::default() };
        ledger.update(|_| {});
        Ok(ledger)
    }

    /// Another process's; `None` when it is none of this version.
    pub(crate) fn inherited(fd: OwnedFd) -> Result<Option<Self>, Sys> {
        let mut ledger = Self { fd, header: RefCell::new(Header::EMPTY), failures: RefCell::default() };
        let Some(header) = ledger.read_header()? else { return Ok(None) };
        ledger.header = RefCell::new(header);
        Ok(Some(ledger))
    }

    pub(crate) fn header(&self) -> Header {
        *self.header.borrow()
    }

    /// Changes the header.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Header)) {
        let mut header = self.header.borrow_mut();
        change(&mut header);
        let writer = Writer::<64>::new().u32(MAGIC).u32(VERSION);
        let writer = writer.i32(header.listener).i32(header.lock).i32(header.group).i32(header.device);
        let writer =
            writer.i32(header.standby).i32(header.standby_fd).i32(header.daemon).i32(header.daemon_fd);
        let writer = writer.u32(header.slots.into()).u32(header.files).u64(header.next_event);
        self.write("the header", 0, &writer.bytes);
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// A record that cannot be written down is served all the same; only a successor would not know of it.
    fn write(&self, what: &str, at: u64, bytes: &[u8]) {
        let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, bytes, at));
        if written != Ok(bytes.len()) && self.failures.borrow_mut().pass() {
            log!("{what} is not written down: {written:?}");
        }
    }

    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], Sys> {
        let mut bytes = [0; N];
        match rustix::io::retry_on_intr(|| rustix::io::pread(&self.fd, &mut bytes[..], at))? {
            length if length == N => Ok(bytes),
            _ => Err(Sys::IO),
        }
    }

    /// Reads the header again, which another process has changed.
    pub(crate) fn reload(&self) -> Result<Header, Sys> {
        let header = self.read_header()?.ok_or(Sys::PROTO)?;
        *self.header.borrow_mut() = header;
        Ok(header)
    }

    fn read_header(&self) -> Result<Option<Header>, Sys> {
        let bytes = self.read::<64>(0)?;
        let mut reader = Reader(&bytes);
        if (reader.u32(), reader.u32()) != (MAGIC, VERSION) {
            return Ok(None);
        }
        let mut number = || reader.i32();
        let [listener, lock, group, device] = [number(), number(), number(), number()];
        let [standby, standby_fd, daemon, daemon_fd] = [number(), number(), number(), number()];
        let Ok(slots) = u16::try_from(reader.u32()) else { return Ok(None) };
        let (files, next_event) = (reader.u32(), reader.u64());
        let header = Header {
            listener,
            lock,
            group,
            device,
            standby,
            standby_fd,
            daemon,
            daemon_fd,
            slots,
            files,
            next_event,
        };
        Ok(Some(header))
    }

    pub(crate) fn set_event(&self, slot: usize, event: &EventRecord) {
        let writer = Writer::<EVENT_LEN>::new().u64(event.id).u64(event.file.0).u64(event.offset);
        let writer = writer.u64(event.count).i32(event.fd);
        self.write("an access", place(EVENTS_AT, slot, EVENT_LEN), &writer.bytes);
    }

    pub(crate) fn clear_event(&self, slot: usize) {
        self.write("an answer", place(EVENTS_AT, slot, EVENT_LEN), &[0; EVENT_LEN]);
    }

    pub(crate) fn event(&self, slot: usize) -> Result<Option<EventRecord>, Sys> {
        let bytes = self.read::<EVENT_LEN>(place(EVENTS_AT, slot, EVENT_LEN))?;
        let mut reader = Reader(&bytes);
        let (id, file) = (reader.u64(), FileId(reader.u64()));
        let event = EventRecord { id, file, offset: reader.u64(), count: reader.u64(), fd: reader.i32() };
        Ok((id != 0).then_some(event))
    }

    pub(crate) fn set_complete(&self, index: usize, inode: [u64; 2]) {
        let bytes = Writer::<COMPLETE_LEN>::new().u64(inode[0]).u64(inode[1]).bytes;
        self.write("a complete file", place(COMPLETE_AT, index, COMPLETE_LEN), &bytes);
    }

    pub(crate) fn complete(&self, index: usize) -> Result<Option<[u64; 2]>, Sys> {
        let bytes = self.read::<COMPLETE_LEN>(place(COMPLETE_AT, index, COMPLETE_LEN))?;
        let mut reader = Reader(&bytes);
        let inode = [reader.u64(), reader.u64()];
        Ok((inode != [0, 0]).then_some(inode))
    }

    pub(crate) fn set_file(&self, slot: usize, file: &FileRecord) {
        let label = file.label.as_str().as_bytes();
        let writer = Writer::<FILE_LEN>::new().u32(1 + u32::from(file.draining)).i32(file.writer);
        let writer = writer.u64(file.file.0).u64(file.inode[0]).u64(file.inode[1]).u64(file.mapped);
        let mut bytes = writer.u32(u32::try_from(label.len()).unwrap_or(0)).bytes;
        bytes[LABEL_AT..LABEL_AT + label.len()].copy_from_slice(label);
        self.write("a watched file", place(FILES_AT, slot, FILE_LEN), &bytes);
    }

    /// The file is not watched any more.
    pub(crate) fn clear_file(&self, slot: usize) {
        if let Err(errno) = self.clear_map(slot)
            && self.failures.borrow_mut().pass()
        {
            log!("the map of a file stays: {errno}");
        }
        self.write("a file that is let go", place(FILES_AT, slot, FILE_LEN), &[0; FILE_LEN]);
    }

    /// Nothing is filled in the slot's file.
    pub(crate) fn clear_map(&self, slot: usize) -> Result<(), Sys> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let map = MAPS_AT + place(0, slot, 1) * MAP_STRIDE;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, hole, map, MAP_STRIDE))
    }

    pub(crate) fn file(&self, slot: usize) -> Result<Option<FileRecord>, Sys> {
        let bytes = self.read::<FILE_LEN>(place(FILES_AT, slot, FILE_LEN))?;
        let mut reader = Reader(&bytes);
        let (state, writer, file) = (reader.u32(), reader.i32(), FileId(reader.u64()));
        let (inode, mapped) = ([reader.u64(), reader.u64()], reader.u64());
        let length = usize::try_from(reader.u32()).unwrap_or(usize::MAX).min(LABEL_MAX);
        let label = std::str::from_utf8(&bytes[LABEL_AT..LABEL_AT + length]).ok().and_then(Label::new);
        Ok(match (state, label) {
            (1 | 2, Some(label)) => {
                Some(FileRecord { file, label, inode, writer, draining: state == 2, mapped })
            }
            _ => None,
        })
    }

    /// Writes down that these pages of a file are filled, or not.
    pub(crate) fn set_map(&self, slot: usize, pages: &Range<u64>, filled: bool) {
        let start = MAPS_AT + place(0, slot, 1) * MAP_STRIDE;
        let (mut word, end) = (pages.start / 64, pages.end.div_ceil(64).min(MAP_STRIDE / 8));
        while word < end {
            let count = usize::try_from(end - word).unwrap_or(MAP_WORDS).min(MAP_WORDS);
            let (at, mut all) = (start + word * 8, [0; MAP_WORDS]);
            // What cannot be read counts as not filled.
            if let Err(errno) = self.read_words(at, &mut all[..count])
                && self.failures.borrow_mut().pass()
            {
                log!("what is filled is not read: {errno}");
            }
            let old: [u64; MAP_WORDS] = all;
            present::set(&mut all[..count], word, pages, filled);
            // Memory is taken only for what was ever filled.
            if all != old {
                let mut bytes = [0; MAP_WORDS * 8];
                for (to, word) in bytes.chunks_exact_mut(8).zip(&all) {
                    to.copy_from_slice(&word.to_ne_bytes());
                }
                self.write("what is filled", at, &bytes[..count * 8]);
            }
            word += u64::try_from(count).unwrap_or(u64::MAX);
        }
    }

    fn read_words(&self, at: u64, words: &mut [u64]) -> Result<(), Sys> {
        for (index, part) in words.chunks_mut(MAP_WORDS).enumerate() {
            let bytes = self.read::<{ MAP_WORDS * 8 }>(place(at, index * MAP_WORDS, 8))?;
            for (word, bytes) in part.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = Reader(bytes).u64();
            }
        }
        Ok(())
    }

    /// A file's map.
    pub(crate) fn map(&self, slot: usize, words: &mut [u64]) -> Result<(), Sys> {
        self.read_words(MAPS_AT + place(0, slot, 1) * MAP_STRIDE, words)
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_found() {
        let ledger = Ledger::new().unwrap();
        let header = Header {
            listener: 3,
            lock: 4,
            group: NONE,
            device: 7,
            standby: 100,
            standby_fd: 8,
            daemon: 200,
            daemon_fd: 9,
            slots: u16::MAX,
            files: 1 << 20,
            next_event: u64::MAX,
        };
        ledger.update(|own| *own = header);
        let other = Ledger::inherited(ledger.fd.try_clone().unwrap()).unwrap().unwrap();
        assert_eq!(other.header(), header);
        let empty = rustix::fs::memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&empty, 4096).unwrap();
        assert!(Ledger::inherited(empty).unwrap().is_none());

        let last = usize::from(u16::MAX) - 1;
        for slot in [0, last] {
            assert_eq!(ledger.event(slot).unwrap(), None);
            let event = EventRecord { id: 1 << 50, file: FileId(0), offset: 1, count: 2, fd: 11 };
            ledger.set_event(slot, &event);
            assert_eq!(ledger.event(slot).unwrap(), Some(event));
            ledger.clear_event(slot);
            assert_eq!(ledger.event(slot).unwrap(), None);
        }
        ledger.set_complete(4095, [1, 2]);
        assert_eq!((ledger.complete(4095).unwrap(), ledger.complete(0).unwrap()), (Some([1, 2]), None));

        let label = Label::new(&"x".repeat(LABEL_MAX)).unwrap();
        for slot in [0, FILES_MAX - 1] {
            assert_eq!(ledger.file(slot).unwrap(), None);
            let file = FileRecord {
                file: FileId(5),
                label,
                inode: [6, u64::MAX],
                writer: 12,
                draining: slot == 0,
                mapped: 1 << 39,
            };
            ledger.set_file(slot, &file);
            assert_eq!(ledger.file(slot).unwrap(), Some(file));
            let mut found = vec![9; 2003];
            ledger.set_map(slot, &(3 * 64 + 1..2002 * 64), true);
            ledger.set_map(slot, &(64 * 64..64 * 64 + 63), false);
            ledger.map(slot, &mut found).unwrap();
            let mut expected = vec![u64::MAX; 2003];
            expected[..3].fill(0);
            (expected[3], expected[64], expected[2002]) = (u64::MAX - 1, 1 << 63, 0);
            assert_eq!(found, expected);
            ledger.clear_file(slot);
            assert_eq!(ledger.file(slot).unwrap(), None);
            ledger.map(slot, &mut found).unwrap();
            assert!(found.iter().all(|&word| word == 0));
        }
    }
}
