//! The kind of an inode: its code in a mode and in a directory entry.

/// Kind of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileKind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Symbolic link.
    Symlink,
}

impl FileKind {
    /// All kinds, in the order of their directory entry codes, the first of which is 1.
    pub const ALL: [Self; 7] = [
        Self::Regular,
        Self::Directory,
        Self::CharDevice,
        Self::BlockDevice,
        Self::Fifo,
        Self::Socket,
        Self::Symlink,
    ];

    /// The `S_IFMT` bits of a mode.
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The kind in a mode, if its `S_IFMT` bits name one.
    pub fn from_mode(mode: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.mode_bits() == mode & 0o170_000)
    }

    /// Code in a directory entry (`EROFS_FT_*`).
    pub const fn dirent_type(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }

    /// The kind of a directory entry's code.
    pub fn from_dirent_type(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.dirent_type() == code)
    }

    /// Whether the inode holds a device number.
    pub const fn is_device(self) -> bool {
        matches!(self, Self::CharDevice | Self::BlockDevice)
    }
}

impl core::fmt::Display for FileKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Regular => "regular file",
            Self::Directory => "directory",
            Self::CharDevice => "character device",
            Self::BlockDevice => "block device",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
            Self::Symlink => "symlink",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for kind in FileKind::ALL {
            assert_eq!(FileKind::from_mode(kind.mode_bits() | 0o7777), Some(kind));
            assert_eq!(FileKind::from_dirent_type(kind.dirent_type()), Some(kind));
        }
        for code in [0, 8, 255] {
            assert_eq!(FileKind::from_dirent_type(code), None);
        }
        for mode in [0, 0o030_000, 0o170_000, 0o050_000] {
            assert_eq!(FileKind::from_mode(mode), None);
        }
    }
}
