//! Power cuts against the journal: whatever reached the disk when the power went, the ready map never names a chunk
//! whose data is not there.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::cell::RefCell;
use std::io;

use skimmer_daemon::blob::{BlobId, ReadyBits};
use skimmer_daemon::store::journal::{Disk, Tracked};
use skimmer_daemon::store::ready::{self, Identity, SECTOR};

const CHUNK: usize = 512;
const CHUNKS: u32 = 5000;

/// Small, seeded, good enough to choose with.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A file whose unsynced writes are lost, kept or torn by a power cut, each on its own.
#[derive(Default)]
struct Platter {
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl Platter {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        for (number, piece) in bytes.chunks(SECTOR).enumerate() {
            self.unsynced.push((offset + number * SECTOR, piece.to_vec()));
        }
    }

    fn sync(&mut self) {
        for (offset, piece) in std::mem::take(&mut self.unsynced) {
            put(&mut self.durable, offset, &piece);
        }
    }

    fn after_power_cut(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (offset, piece) in &self.unsynced {
            match random.below(3) {
                0 => {}
                1 => put(&mut bytes, *offset, piece),
                // Torn: a disk that does not even write sectors whole.
                _ => put(
                    &mut bytes,
                    *offset,
                    &piece[..usize::try_from(random.below(512)).unwrap().min(piece.len())],
                ),
            }
        }
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, piece: &[u8]) {
    if bytes.len() < offset + piece.len() {
        bytes.resize(offset + piece.len(), 0);
    }
    bytes[offset..offset + piece.len()].copy_from_slice(piece);
}

/// The two files of one blob, and a count of disk operations after which everything fails.
struct Machine {
    data: Platter,
    map: Platter,
    operations_left: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Which {
    Data,
    Map,
}

// A file handle only says which of the two it is; the machine itself lives beside the test.
thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(new_machine(0));
}

struct CrashDisk {
    /// Breaks the rule on purpose: the data is not synced before the map.
    skip_data_sync: bool,
}

impl Disk for CrashDisk {
    type File = Which;

    fn sync(&mut self, file: &Which) -> io::Result<()> {
        with_machine(|machine| {
            step(machine)?;
            match file {
                Which::Data if self.skip_data_sync => {}
                Which::Data => machine.data.sync(),
                Which::Map => machine.map.sync(),
            }
            Ok(())
        })
    }

    fn write_at(&mut self, file: &Which, bytes: &[u8], offset: u64) -> io::Result<()> {
        with_machine(|machine| {
            step(machine)?;
            assert!(*file == Which::Map, "the journal never writes data");
            machine.map.write(bytes, usize::try_from(offset).unwrap());
            Ok(())
        })
    }
}

fn step(machine: &mut Machine) -> io::Result<()> {
    machine.operations_left =
        machine.operations_left.checked_sub(1).ok_or_else(|| io::Error::other("power cut"))?;
    Ok(())
}

fn with_machine<T>(act: impl FnOnce(&mut Machine) -> T) -> T {
    MACHINE.with(|machine| act(&mut machine.borrow_mut()))
}

fn new_machine(operations_left: u64) -> Machine {
    let mut map = Platter::default();
    map.write(&ready::header(&identity()), 0);
    map.sync();
    Machine { data: Platter::default(), map, operations_left }
}

fn identity() -> Identity {
    Identity { blob: BlobId::new([9; 32]), size: u64::from(CHUNKS) * 512, inode: 7 }
}

fn content(chunk: u32) -> Vec<u8> {
    let byte = u8::try_from(chunk % 251).unwrap() + 1;
    vec![byte; CHUNK]
}

/// Runs one life up to a power cut; returns how many chunks the map names and whether it lied about one.
fn life(seed: u64, skip_data_sync: bool) -> (u64, bool) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let operations = random.below(40);
    with_machine(|machine| *machine = new_machine(operations));
    let mut disk = CrashDisk { skip_data_sync };
    let mut tracked = Tracked::new(identity().blob, Which::Data, Which::Map, ReadyBits::new());
    'life: for _ in 0..30 {
        for _ in 0..random.below(6) {
            let first = u32::try_from(random.below(u64::from(CHUNKS))).unwrap();
            let chunks: Vec<u32> = (first..CHUNKS.min(first + 3)).collect();
            for chunk in &chunks {
                let offset = usize::try_from(*chunk).unwrap() * CHUNK;
                with_machine(|machine| machine.data.write(&content(*chunk), offset));
            }
            tracked.wrote(&chunks);
        }
        if tracked.commit(&mut disk).is_err() {
            assert!(tracked.commit(&mut disk).is_err(), "nothing is recorded after a failure");
            break 'life;
        }
    }
    with_machine(|machine| {
        let data = machine.data.after_power_cut(&mut random);
        let map = machine.map.after_power_cut(&mut random);
        let loaded = ready::decode(&map, &identity());
        let lied = loaded.bits.iter().any(|chunk| {
            let offset = usize::try_from(chunk).unwrap() * CHUNK;
            data.get(offset..offset + CHUNK) != Some(&content(chunk)[..])
        });
        (loaded.bits.count(), lied)
    })
}

#[test]
fn the_map_is_never_ahead_of_the_data() {
    let mut named = 0;
    for seed in 0..2000 {
        let (count, lied) = life(seed, false);
        assert!(!lied, "seed {seed}: the map names a chunk that is not on disk");
        named += count;
    }
    assert!(named > 10_000, "the lives recorded hardly anything ({named}): the test tests nothing");
}

#[test]
fn the_test_sees_a_journal_that_does_not_sync_data_first() {
    assert!((0..2000).any(|seed| life(seed, true).1));
}

#[test]
fn a_file_that_failed_is_recorded_again_once_its_loss_was_made_good() {
    with_machine(|machine| *machine = new_machine(0));
    let mut disk = CrashDisk { skip_data_sync: false };
    let mut tracked = Tracked::new(identity().blob, Which::Data, Which::Map, ReadyBits::new());
    tracked.wrote(&[1]);
    assert!(tracked.commit(&mut disk).is_err());
    with_machine(|machine| machine.operations_left = 100);
    // Written before anybody knew: it may be lost as well.
    tracked.wrote(&[2]);
    assert!(tracked.commit(&mut disk).is_err());
    tracked.renew();
    tracked.wrote(&[3]);
    tracked.commit(&mut disk).unwrap();
    assert_eq!(tracked.recorded.iter().collect::<Vec<_>>(), [3]);
}

#[test]
fn a_commit_is_data_sync_then_map_then_map_sync() {
    struct Log(Vec<&'static str>);
    impl Disk for Log {
        type File = Which;
        fn sync(&mut self, file: &Which) -> io::Result<()> {
            self.0.push(if *file == Which::Data { "sync data" } else { "sync map" });
            Ok(())
        }
        fn write_at(&mut self, _: &Which, _: &[u8], _: u64) -> io::Result<()> {
            self.0.push("write map");
            Ok(())
        }
    }
    let mut log = Log(Vec::new());
    let mut tracked = Tracked::new(identity().blob, Which::Data, Which::Map, ReadyBits::new());
    tracked.wrote(&[1, 2, 3]);
    assert_eq!(tracked.commit(&mut log).unwrap(), [1, 2, 3]);
    assert_eq!(log.0, ["sync data", "write map", "sync map"]);
    tracked.wrote(&[2]);
    assert_eq!(tracked.commit(&mut log).unwrap(), [0; 0]);
    assert_eq!(log.0.len(), 3, "what is recorded is not recorded again");
    assert_eq!(tracked.recorded.count(), 3);
}
