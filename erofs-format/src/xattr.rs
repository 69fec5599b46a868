//! Inline extended attributes (kernel: `struct erofs_xattr_ibody_header`, `struct erofs_xattr_entry`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// Bytes of the header of an xattr area.
pub const HEADER_SIZE: u64 = 12;
/// Bytes in front of the name of each xattr.
pub const ENTRY_SIZE: u64 = 4;
/// Longest name without its prefix, in bytes.
pub const MAX_SUFFIX: usize = 255;
/// Longest value in bytes.
pub const MAX_VALUE: usize = 65535;

/// Prefix of a name, stored as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NameIndex {
    /// `user.`
    User,
    /// `system.posix_acl_access`, the whole name.
    PosixAclAccess,
    /// `system.posix_acl_default`, the whole name.
    PosixAclDefault,
    /// `trusted.`
    Trusted,
    /// `security.`
    Security,
}

impl NameIndex {
    /// All prefixes, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::User, Self::PosixAclAccess, Self::PosixAclDefault, Self::Trusted, Self::Security];

    /// The number on disk.
    pub const fn code(self) -> u8 {
        match self {
            Self::User => 1,
            Self::PosixAclAccess => 2,
            Self::PosixAclDefault => 3,
            Self::Trusted => 4,
            Self::Security => 6,
        }
    }

    /// The prefix of a number on disk.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|index| index.code() == code)
    }

    /// The bytes in front of the suffix.
    pub const fn prefix(self) -> &'static [u8] {
        match self {
            Self::User => b"user.",
            Self::PosixAclAccess => b"system.posix_acl_access",
            Self::PosixAclDefault => b"system.posix_acl_default",
            Self::Trusted => b"trusted.",
            Self::Security => b"security.",
        }
    }

    /// Whether the prefix is the whole name, so that the suffix is empty.
    pub const fn is_whole_name(self) -> bool {
        matches!(self, Self::PosixAclAccess | Self::PosixAclDefault)
    }
}

/// Splits a full name into prefix number and suffix; `None` for names that the format cannot hold (another
/// namespace, an empty or too long suffix, a NUL).
pub fn split_name(name: &[u8]) -> Option<(NameIndex, &[u8])> {
    NameIndex::ALL.into_iter().find_map(|index| {
        let suffix = name.strip_prefix(index.prefix())?;
        let fits = if index.is_whole_name() {
            suffix.is_empty()
        } else {
            !suffix.is_empty() && suffix.len() <= MAX_SUFFIX && !suffix.contains(&0)
        };
        fits.then_some((index, suffix))
    })
}

/// Bytes of one xattr with its padding.
pub const fn entry_size(suffix_len: u8, value_len: u16) -> u64 {
    // Lossless widenings; `From` is not const.
    (ENTRY_SIZE + suffix_len as u64 + value_len as u64).next_multiple_of(4)
}

/// Value of `i_xattr_icount` for an xattr area of `area` bytes, header included; 0 bytes mean no xattrs.
/// `None` when the area is too large, not a multiple of 4, or a header alone (which the kernel refuses).
pub fn icount(area: u64) -> Option<u16> {
    match area {
        0 => Some(0),
        _ if area <= HEADER_SIZE || !area.is_multiple_of(4) => None,
        _ => u16::try_from((area - HEADER_SIZE) / 4 + 1).ok(),
    }
}

/// Bytes of the xattr area that a value of `i_xattr_icount` stands for.
pub fn area_size(icount: u16) -> u64 {
    match icount {
        0 => 0,
        _ => HEADER_SIZE + 4 * (u64::from(icount) - 1),
    }
}

/// The header of an xattr area as on disk; all zero in RAFS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    /// Bloom filter of names; 0.
    pub name_filter: le::U32,
    /// Number of shared xattrs; 0.
    pub shared_count: u8,
    /// 0.
    pub reserved: [u8; 7],
}

assert_layout!(XattrHeader, 12, { name_filter: 0, shared_count: 4, reserved: 5 });

/// What stands in front of the suffix and value of an xattr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of the suffix.
    pub name_len: u8,
    /// [`NameIndex`].
    pub name_index: u8,
    /// Bytes of the value.
    pub value_size: le::U16,
}

assert_layout!(XattrEntry, 4, { name_len: 0, name_index: 1, value_size: 2 });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(split_name(b"user.k"), Some((NameIndex::User, &b"k"[..])));
        assert_eq!(split_name(b"security.capability"), Some((NameIndex::Security, &b"capability"[..])));
        assert_eq!(split_name(b"trusted.overlay.opaque"), Some((NameIndex::Trusted, &b"overlay.opaque"[..])));
        assert_eq!(split_name(b"system.posix_acl_access"), Some((NameIndex::PosixAclAccess, &b""[..])));
        assert_eq!(split_name(b"system.posix_acl_default"), Some((NameIndex::PosixAclDefault, &b""[..])));
        for name in
            [&b"user."[..], b"user", b"system.other", b"system.posix_acl_accessx", b"btrfs.x", b"user.a\0b"]
        {
            assert_eq!(split_name(name), None);
        }
        let mut long = b"user.".to_vec();
        long.resize(5 + MAX_SUFFIX, b'x');
        assert!(split_name(&long).is_some());
        long.push(b'x');
        assert_eq!(split_name(&long), None);
        for index in NameIndex::ALL {
            assert_eq!(NameIndex::from_code(index.code()), Some(index));
        }
        for code in [0, 5, 7, 0x81] {
            assert_eq!(NameIndex::from_code(code), None);
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(entry_size(1, 1), 8);
        assert_eq!(entry_size(0, 0), 4);
        assert_eq!(entry_size(255, 65535), 65796);
        assert_eq!(icount(20), Some(3));
        assert_eq!(icount(12), None);
        assert_eq!(icount(21), None);
        assert_eq!(icount(12 + 4 * 65534), Some(65535));
        assert_eq!(icount(12 + 4 * 65535), None);
        for count in [0, 2, 3, 65535] {
            assert_eq!(icount(area_size(count)), Some(count));
        }
    }
}
