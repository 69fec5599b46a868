//! Checksums of tar headers, which mutations would hardly ever get right.

/// Bytes of a tar block.
pub(crate) const BLOCK: usize = 512;
/// Where a header keeps its checksum.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// Puts the right checksum into a block that looks like a header.
pub(crate) fn put_checksum(block: &mut [u8]) {
    if block.get(257..262) == Some(&b"ustar"[..]) {
        block[CHECKSUM].fill(b' ');
        let sum: u32 = block.iter().copied().map(u32::from).sum();
        block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
