//! Numbers in tar headers: octal text, or base 256 when the first bit is set.

use crate::error::EntryProblem;

/// Reads a numeric field. Empty fields are 0.
pub(super) fn number(field: &[u8], what: &str) -> Result<i64, EntryProblem> {
    let bad = |why: &str| EntryProblem::Header(format!("{what} \"{}\" {why}", crate::error::show(field)));
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // Two's complement, big endian; the marker bit is not part of the number, the bit below it is the sign.
            let start: i64 =
                if first & 0x40 == 0 { i64::from(first & 0x3f) } else { i64::from(first & 0x3f) - 0x40 };
            rest.iter()
                .try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(i64::from(byte)))
                .ok_or_else(|| bad("does not fit in 64 bits"))
        }
        _ => {
            let text = field.split(|&byte| byte == 0).next().unwrap_or_default().trim_ascii();
            let digits = text.iter().try_fold(0i64, |value, &byte| match byte {
                b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
                _ => None,
            });
            digits.ok_or_else(|| bad("is not an octal number"))
        }
    }
}

/// Reads a numeric field that cannot be negative.
pub(super) fn unsigned(field: &[u8], what: &str) -> Result<u64, EntryProblem> {
    let value = number(field, what)?;
    u64::try_from(value).map_err(|_| EntryProblem::Header(format!("{what} {value} is negative")))
}

/// Checks a header's checksum: the sum of all bytes, those of the checksum itself taken as spaces.
pub(super) fn checksum_is_right(block: &[u8; 512]) -> bool {
    let Ok(stored) = number(&block[148..156], "checksum") else { return false };
    let sum = |value: fn(u8) -> i64| -> i64 {
        let spaces = i64::from(b' ') * 8;
        block[..148].iter().chain(&block[156..]).map(|&byte| value(byte)).sum::<i64>() + spaces
    };
    // Some old writers summed signed chars.
    stored == sum(i64::from) || stored == sum(|byte| i64::from(byte.cast_signed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0", "n").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0", "n").unwrap(), 0o644);
        assert_eq!(number(b"", "n").unwrap(), 0);
        assert_eq!(number(b"\0\0\0\0", "n").unwrap(), 0);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1], "n").unwrap(), 0x2_0000_0001);
        assert_eq!(number(&[0xff; 12], "n").unwrap(), -1);
        assert!(unsigned(&[0xff; 12], "n").is_err());
        assert!(number(b"12x4", "n").is_err());
        assert!(number(&[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "n").is_err());
    }

    #[test]
    fn checksums() {
        let mut header = tar::Header::new_ustar();
        header.set_size(5);
        header.set_cksum();
        let mut block = *header.as_bytes();
        assert!(checksum_is_right(&block));
        block[0] ^= 1;
        assert!(!checksum_is_right(&block));
    }
}
