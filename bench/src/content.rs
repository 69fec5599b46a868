//! Deterministic file content that every block can be checked against by itself.

use std::io::{self, Write};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Four bits of entropy a byte: compresses to a little over half, as programs and libraries do.
const LETTERS: &[u8; 16] = b"etaoinshrdlu\0\x01\x7f ";

/// Fills `block` with the content of block `index` of the file `seed`.
pub fn fill(seed: u64, index: u64, block: &mut [u8; BLOCK]) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ index.wrapping_mul(0xD1B5_4A32_D192_ED03);
    for eight in block.chunks_exact_mut(8) {
        // splitmix64, public domain (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        for (byte, random) in eight.iter_mut().zip(z.to_le_bytes()) {
            *byte = LETTERS[usize::from(random & 15)];
        }
    }
}

/// Writes the first `blocks` blocks of the file `seed`.
///
/// # Errors
/// The writer's.
pub fn write(seed: u64, blocks: u64, out: &mut impl Write) -> io::Result<()> {
    let mut block = [0; BLOCK];
    for index in 0..blocks {
        fill(seed, index, &mut block);
        out.write_all(&block)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_differ_and_repeat() {
        let (mut a, mut b) = ([0; BLOCK], [0; BLOCK]);
        fill(1, 2, &mut a);
        fill(1, 2, &mut b);
        assert_eq!(a, b);
        fill(1, 3, &mut b);
        assert_ne!(a, b);
        fill(2, 2, &mut b);
        assert_ne!(a, b);
    }

    #[test]
    fn it_compresses_to_about_half() {
        let mut bytes = Vec::new();
        write(7, 64, &mut bytes).unwrap();
        let stored = zstd::bulk::compress(&bytes, 3).unwrap().len();
        assert!(stored * 10 > bytes.len() * 4 && stored * 10 < bytes.len() * 7, "{stored}");
    }
}
