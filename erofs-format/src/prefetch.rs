//! Prefetch table: u32 nids in order of priority, directly behind the blob table; a 0 ends the list.

use zerocopy::little_endian as le;

/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 4;

/// An entry as on disk: the nid of a file or directory to fetch early.
pub type PrefetchEntry = le::U32;
