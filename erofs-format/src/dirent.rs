//! Directory entries and the blocks that hold them (kernel: `struct erofs_dirent`).
//!
//! A directory is a run of blocks. Each begins with its array of entries, the names follow in the same order without
//! terminators; unused bytes at the end of a full block are zero. Names are sorted bytewise over the whole directory,
//! `.` and `..` included, so that a reader can bisect.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::{
    kind::FileKind,
    layout::{BLOCK, BLOCK_SIZE, MAX_NAME},
};

/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 12;

/// A directory entry as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// nid of the target.
    pub nid: le::U64,
    /// Offset of the name in this block. That of the first entry also tells the number of entries.
    pub nameoff: le::U16,
    /// [`FileKind::dirent_type`].
    pub file_type: u8,
    /// 0.
    pub reserved: u8,
}

assert_layout!(Dirent, 12, { nid: 0, nameoff: 8, file_type: 10, reserved: 11 });

/// Whether a name may stand in a directory (`.` and `..` may).
pub fn is_valid_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.contains(&0) && !name.contains(&b'/')
}

/// Adds up the packed size of a directory, name by name in sorted order, `.` and `..` included.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirSize {
    full: u64,
    used: u64,
}

impl DirSize {
    /// Starts with an empty directory.
    pub const fn new() -> Self {
        Self { full: 0, used: 0 }
    }

    /// Adds a name of this length; true when it opens a new block.
    pub fn push(&mut self, name_len: usize) -> bool {
        // A longer name is an error of the caller, which `encode` reports; the size need only not overflow.
        let need = ENTRY_SIZE + u64::try_from(name_len).unwrap_or(BLOCK).min(BLOCK - ENTRY_SIZE);
        let opens = self.used == 0 || self.used + need > BLOCK;
        if opens && self.used != 0 {
            self.full += 1;
            self.used = 0;
        }
        self.used += need;
        opens
    }

    /// `i_size` of the directory so far.
    pub const fn bytes(&self) -> u64 {
        self.full * BLOCK + self.used
    }
}

/// Bytes of a directory with names of these lengths, in sorted order, `.` and `..` included.
pub fn packed_size(name_lens: impl IntoIterator<Item = usize>) -> u64 {
    let mut size = DirSize::new();
    for len in name_lens {
        size.push(len);
    }
    size.bytes()
}

/// Why a directory cannot be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A name is empty, too long, or has a `/` or NUL.
    #[error("entry {0}: the name is empty, longer than 255 bytes, or has a '/' or NUL")]
    BadName(usize),
    /// A name does not sort after the one before it.
    #[error("entry {0}: the name does not sort after the one before it")]
    NotSorted(usize),
}

/// Appends the blocks of a directory to `out`. Entries must be sorted bytewise by name, `.` and `..` included.
/// All blocks but the last are full; the last ends after its last name. `out` grows by [`packed_size`] bytes.
pub fn encode<'n>(
    entries: impl IntoIterator<Item = (&'n [u8], u64, FileKind)>,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let mut block: Vec<(&[u8], u64, FileKind)> = Vec::new();
    let mut size = DirSize::new();
    let mut last: &[u8] = b"";
    for (i, entry) in entries.into_iter().enumerate() {
        if !is_valid_name(entry.0) {
            return Err(EncodeError::BadName(i));
        }
        if i > 0 && entry.0 <= last {
            return Err(EncodeError::NotSorted(i));
        }
        last = entry.0;
        if size.push(entry.0.len()) && !block.is_empty() {
            let start = out.len();
            encode_block(&block, out);
            out.resize(start + usize::from(BLOCK_LEN), 0);
            block.clear();
        }
        block.push(entry);
    }
    encode_block(&block, out);
    Ok(())
}

const BLOCK_LEN: u16 = 4096;
const _: () = assert!(BLOCK_LEN as u32 == BLOCK_SIZE);

fn encode_block(entries: &[(&[u8], u64, FileKind)], out: &mut Vec<u8>) {
    // The packing keeps a block to 4096 bytes, so these 16-bit sums cannot wrap.
    let mut nameoff = entries.iter().fold(0u16, |sum, _| sum + 12);
    for (name, nid, kind) in entries {
        let dirent = Dirent {
            nid: le::U64::new(*nid),
            nameoff: le::U16::new(nameoff),
            file_type: kind.dirent_type(),
            reserved: 0,
        };
        out.extend_from_slice(dirent.as_bytes());
        nameoff += u16::try_from(name.len()).expect("a valid name has at most 255 bytes");
    }
    for (name, ..) in entries {
        out.extend_from_slice(name);
    }
}
