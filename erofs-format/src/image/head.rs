//! Superblocks and the place of the tables.

use alloc::vec::Vec;

use zerocopy::little_endian as le;

use crate::{
    blob_table::{self, BlobEntry},
    bytes,
    chunk_table::{self, ChunkEntry},
    device::{self, DeviceSlot},
    error::{Problem, Result, Thing},
    extended::{ExtFlags, ExtSuperBlock},
    layout::{
        BLOCK, BLOCK_BITS, DEVICE_SLOTS_OFFSET, EXT_SUPERBLOCK_OFFSET, MAX_BLOBS, MAX_CHUNK_SIZE,
        MIN_CHUNK_SIZE, SUPERBLOCK_OFFSET,
    },
    prefetch,
    superblock::{self, SuperBlock},
};

/// The parts of the head of a bootstrap, their numbers checked, their entries not.
pub(super) struct Head<'a> {
    pub(super) superblock: &'a SuperBlock,
    pub(super) extended: &'a ExtSuperBlock,
    pub(super) flags: ExtFlags,
    pub(super) slots: &'a [DeviceSlot],
    pub(super) blob_table: &'a [BlobEntry],
    pub(super) blob_table_offset: u64,
    pub(super) chunk_table: &'a [ChunkEntry],
    pub(super) prefetch: &'a [le::U32],
}

pub(super) fn parse(file: &[u8]) -> Result<Head<'_>> {
    let len = bytes::len(file);
    if len < BLOCK {
        let problem = Problem::Truncated { need: BLOCK, have: len };
        return Err(Thing::Bootstrap.error("length", 0, problem));
    }
    let superblock = bytes::read::<SuperBlock>(file, Thing::SuperBlock, "superblock", SUPERBLOCK_OFFSET)?;
    check_superblock(superblock)?;
    if !len.is_multiple_of(BLOCK) {
        let problem =
            Problem::Value { found: len, expected: "a multiple of 4096; the file may be truncated" };
        return Err(Thing::Bootstrap.error("length", 0, problem));
    }
    let blobs = u64::from(superblock.extra_devices.get());
    let slots = bytes::slice(file, Thing::SuperBlock, "extra_devices", DEVICE_SLOTS_OFFSET, blobs)?;
    let meta = u64::from(superblock.meta_blkaddr.get()) * BLOCK;
    if meta > len {
        let problem = Problem::OutOfRange { end: meta, limit: len, of: "the file" };
        return Err(Thing::SuperBlock.error("meta_blkaddr", SUPERBLOCK_OFFSET + 40, problem));
    }
    let extended = bytes::read::<ExtSuperBlock>(
        file,
        Thing::ExtSuperBlock,
        "extended superblock",
        EXT_SUPERBLOCK_OFFSET,
    )?;
    let flags = check_extended(extended)?;
    let tables = Tables { blobs, extended, len };
    tables.check()?;
    let blob_table_offset = extended.blob_table_offset.get();
    let blob_count = if tables.blob().size == 0 { 0 } else { blobs };
    Ok(Head {
        superblock,
        extended,
        flags,
        slots,
        blob_table: bytes::slice(file, Thing::ExtSuperBlock, "blob_table", blob_table_offset, blob_count)?,
        blob_table_offset,
        chunk_table: tables.slice(file, tables.chunk(), chunk_table::ENTRY_SIZE)?,
        prefetch: tables.slice(file, tables.prefetch(), prefetch::ENTRY_SIZE)?,
    })
}

fn check_superblock(sb: &SuperBlock) -> Result<()> {
    let fail = |field, at, found: u64, expected| {
        Err(Thing::SuperBlock.value(field, SUPERBLOCK_OFFSET + at, found, expected))
    };
    if sb.magic.get() != superblock::MAGIC {
        return fail("magic", 0, sb.magic.get().into(), "0xe0f5e1e2; this is no EROFS image");
    }
    let compat = sb.feature_compat.get();
    if compat & superblock::FEATURE_COMPAT_RAFS_V6 == 0 {
        let expected = "with bit 0x40000000; this is a plain EROFS image, convert it first";
        return fail("feature_compat", 8, compat.into(), expected);
    }
    if compat & superblock::FEATURE_COMPAT_SB_CHECKSUM != 0 {
        return fail("feature_compat", 8, compat.into(), "without the checksum bit 0x1");
    }
    if sb.checksum.get() != 0 {
        return fail("checksum", 4, sb.checksum.get().into(), "0");
    }
    if sb.blkszbits != BLOCK_BITS {
        let expected = "12 (4096-byte blocks); tarfs images (9) are not supported";
        return fail("blkszbits", 12, sb.blkszbits.into(), expected);
    }
    if sb.sb_extslots != 0 {
        return fail("sb_extslots", 13, sb.sb_extslots.into(), "0");
    }
    if sb.inos.get() == 0 {
        return fail("inos", 16, 0, "at least 1");
    }
    if sb.xattr_blkaddr.get() != 0 {
        return fail("xattr_blkaddr", 44, sb.xattr_blkaddr.get().into(), "0 (no shared xattrs)");
    }
    if sb.volume_name.last().is_some_and(|byte| *byte != 0) {
        return fail("volume_name", 64, sb.volume_name[15].into(), "ended by a NUL");
    }
    if sb.feature_incompat.get() != superblock::FEATURE_INCOMPAT {
        return fail("feature_incompat", 80, sb.feature_incompat.get().into(), "0xc");
    }
    if sb.u1.get() != 0 {
        return fail("u1", 84, sb.u1.get().into(), "0");
    }
    if usize::from(sb.extra_devices.get()) > MAX_BLOBS {
        return fail("extra_devices", 86, sb.extra_devices.get().into(), "at most 254");
    }
    if sb.devt_slotoff.get() != superblock::DEVT_SLOTOFF {
        return fail("devt_slotoff", 88, sb.devt_slotoff.get().into(), "11");
    }
    if sb.dirblkbits != 0 {
        return fail("dirblkbits", 90, sb.dirblkbits.into(), "0");
    }
    if let Some(byte) = sb.reserved.iter().find(|byte| **byte != 0) {
        return fail("reserved", 91, u64::from(*byte), "0 in every byte");
    }
    Ok(())
}

fn check_extended(ext: &ExtSuperBlock) -> Result<ExtFlags> {
    let bits = ext.flags.get();
    let fail = |expected| Err(Thing::ExtSuperBlock.value("flags", EXT_SUPERBLOCK_OFFSET, bits, expected));
    let Some(flags) = ExtFlags::from_bits(bits) else {
        return fail("known bits");
    };
    if flags.contains(ExtFlags::TARFS) {
        return fail("without 0x200; tarfs images are not supported");
    }
    if flags.compressor().is_none() {
        return fail("exactly one compressor");
    }
    if flags.digest().is_none() {
        return fail("exactly one digest algorithm");
    }
    if flags.contains(ExtFlags::ENCRYPTION_NONE | ExtFlags::ENCRYPTION_AES_128_XTS) {
        return fail("at most one encryption");
    }
    let size = ext.chunk_size.get();
    if !size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&size) {
        let expected = "a power of two from 4 KiB to 16 MiB";
        return Err(Thing::ExtSuperBlock.value("chunk_size", EXT_SUPERBLOCK_OFFSET + 20, size, expected));
    }
    Ok(flags)
}

/// A table as the extended superblock describes it.
#[derive(Clone, Copy)]
struct Table {
    name: &'static str,
    /// Where its offset field is in the extended superblock.
    at: u64,
    offset: u64,
    size: u64,
    entry: u64,
}

struct Tables<'a> {
    blobs: u64,
    extended: &'a ExtSuperBlock,
    len: u64,
}

impl Tables<'_> {
    fn blob(&self) -> Table {
        Table {
            name: "blob_table",
            at: 8,
            offset: self.extended.blob_table_offset.get(),
            size: self.extended.blob_table_size.get().into(),
            entry: blob_table::ENTRY_SIZE,
        }
    }

    fn chunk(&self) -> Table {
        Table {
            name: "chunk_table",
            at: 24,
            offset: self.extended.chunk_table_offset.get(),
            size: self.extended.chunk_table_size.get(),
            entry: chunk_table::ENTRY_SIZE,
        }
    }

    fn prefetch(&self) -> Table {
        Table {
            name: "prefetch_table",
            at: 40,
            offset: self.extended.prefetch_table_offset.get(),
            size: self.extended.prefetch_table_size.get().into(),
            entry: prefetch::ENTRY_SIZE,
        }
    }

    fn check(&self) -> Result<()> {
        let wanted = self.blobs * blob_table::ENTRY_SIZE;
        let found = self.blob().size;
        if found != wanted {
            let problem = Problem::Mismatch { found, expected: wanted, with: "the number of device slots" };
            return Err(Thing::ExtSuperBlock.error("blob_table_size", EXT_SUPERBLOCK_OFFSET + 16, problem));
        }
        let slots_end = DEVICE_SLOTS_OFFSET + self.blobs * device::SLOT_SIZE;
        let mut taken: Vec<(u64, u64, &'static str)> =
            Vec::from([(0, slots_end, "the superblocks and slots")]);
        for table in [self.blob(), self.chunk(), self.prefetch()] {
            let at = EXT_SUPERBLOCK_OFFSET + table.at;
            if !table.size.is_multiple_of(table.entry) {
                let expected = "a multiple of the entry size";
                return Err(Thing::ExtSuperBlock.value(table.name, at + 8, table.size, expected));
            }
            if table.size == 0 {
                continue;
            }
            let align = if table.entry == prefetch::ENTRY_SIZE { 4 } else { BLOCK };
            if !table.offset.is_multiple_of(align) {
                return Err(Thing::ExtSuperBlock.value(
                    table.name,
                    at,
                    table.offset,
                    "aligned (to 4096; prefetch: 4)",
                ));
            }
            let Some(end) = table.offset.checked_add(table.size) else {
                return Err(Thing::ExtSuperBlock.error(table.name, at, Problem::Overflow));
            };
            if end > self.len {
                let problem = Problem::OutOfRange { end, limit: self.len, of: "the file" };
                return Err(Thing::ExtSuperBlock.error(table.name, at, problem));
            }
            for (other_start, other_end, with) in &taken {
                if table.offset < *other_end && *other_start < end {
                    return Err(Thing::ExtSuperBlock.error(table.name, at, Problem::Overlap { with }));
                }
            }
            taken.push((table.offset, end, table.name));
        }
        Ok(())
    }

    fn slice<'f, T>(&self, file: &'f [u8], table: Table, entry: u64) -> Result<&'f [T]>
    where
        T: zerocopy::FromBytes + zerocopy::Immutable + zerocopy::Unaligned,
        [T]: zerocopy::KnownLayout<PointerMetadata = usize>,
    {
        let offset = if table.size == 0 { 0 } else { table.offset };
        bytes::slice(file, Thing::ExtSuperBlock, table.name, offset, table.size / entry)
    }
}
