//! The tree of an image under construction: an arena of inodes; directories map names to them.

use std::collections::BTreeMap;

use erofs_format::FileKind;
use erofs_format::inode::DeviceNumber;
use erofs_format::layout::MAX_NAME;
use erofs_format::xattr::{self, NameIndex};

use crate::error::EntryProblem;
use crate::options::UnsupportedXattrs;
use crate::pack::DataId;

/// Longest symlink target that a kernel can follow (`PATH_MAX` without the NUL).
pub(crate) const TARGET_MAX: usize = 4095;

/// Index of an inode in its [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct InodeId(u32);

impl InodeId {
    pub(crate) fn index(self) -> usize {
        usize::try_from(self.0).expect("usize has at least 32 bits")
    }
}

/// An extended attribute as an input gives it: full name and value.
pub(crate) type RawXattr = (Vec<u8>, Vec<u8>);

/// One extended attribute, its name cut into EROFS' prefix and the rest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub(crate) index: NameIndex,
    pub(crate) suffix: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

impl Xattr {
    /// `None` when the format has no namespace for the name.
    fn new(name: &[u8], value: Vec<u8>) -> Result<Option<Self>, EntryProblem> {
        if value.len() > xattr::MAX_VALUE {
            let reason = format!("has {} bytes, {} are allowed", value.len(), xattr::MAX_VALUE);
            return Err(EntryProblem::Xattr { name: crate::error::show(name), reason });
        }
        Ok(xattr::split_name(name).map(|(index, suffix)| Self { index, suffix: suffix.to_vec(), value }))
    }

    /// Bytes it takes behind the inode.
    fn stored_len(&self) -> u64 {
        let len = |bytes: &[u8]| u64::try_from(bytes.len()).expect("usize has at most 64 bits");
        (xattr::ENTRY_SIZE + len(&self.suffix) + len(&self.value)).next_multiple_of(4)
    }
}

/// Bytes of the xattr area of an inode; 0 without xattrs.
pub(crate) fn xattr_area(xattrs: &[Xattr]) -> u64 {
    if xattrs.is_empty() { 0 } else { xattr::HEADER_SIZE + xattrs.iter().map(Xattr::stored_len).sum::<u64>() }
}

/// Checks names and values, applies the rule for unknown namespaces, sorts. A name given twice keeps its last value.
pub(crate) fn make_xattrs(
    raw: Vec<RawXattr>,
    unsupported: UnsupportedXattrs,
) -> Result<Vec<Xattr>, EntryProblem> {
    let mut last = BTreeMap::new();
    for (name, value) in raw {
        match Xattr::new(&name, value)? {
            Some(xattr) => {
                last.insert((xattr.index, xattr.suffix), xattr.value);
            }
            None if unsupported == UnsupportedXattrs::Drop => {}
            None => {
                return Err(EntryProblem::Xattr {
                    name: crate::error::show(&name),
                    reason: "has a name that EROFS cannot hold (it knows user., trusted., security. and POSIX ACLs); \
                             leave such attributes out with the option unsupported_xattrs"
                        .to_owned(),
                });
            }
        }
    }
    let xattrs: Vec<Xattr> =
        last.into_iter().map(|((index, suffix), value)| Xattr { index, suffix, value }).collect();
    let area = xattr_area(&xattrs);
    if xattr::icount(area).is_none() {
        return Err(EntryProblem::TooLarge {
            what: "the size of all extended attributes",
            found: area,
            limit: xattr::area_size(u16::MAX),
        });
    }
    Ok(xattrs)
}

/// Owner, permissions, time and extended attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with set-id and sticky bits: `mode & 0o7777`.
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch; may be negative.
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) xattrs: Vec<Xattr>,
}

impl Meta {
    /// What a directory gets that the input uses but does not describe.
    pub(crate) fn implied_directory() -> Self {
        Self { permissions: 0o755, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: Vec::new() }
    }
}

/// Checks that the kernel's 32-bit form can hold a device number (12 and 20 bits).
pub(crate) fn device_number(major: u32, minor: u32) -> Result<DeviceNumber, EntryProblem> {
    for (what, found, limit) in
        [("the device's major number", major, 0xfff), ("the device's minor number", minor, 0xf_ffff)]
    {
        if found > limit {
            return Err(EntryProblem::TooLarge { what, found: found.into(), limit: limit.into() });
        }
    }
    Ok(DeviceNumber { major, minor })
}

/// What an inode is.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Directory(BTreeMap<Vec<u8>, InodeId>),
    Regular { size: u64, data: DataId },
    Symlink(Vec<u8>),
    Char(DeviceNumber),
    Block(DeviceNumber),
    Fifo,
    Socket,
}

impl Body {
    pub(crate) fn symlink(target: Vec<u8>) -> Result<Self, EntryProblem> {
        if target.is_empty() {
            return Err(EntryProblem::BadTarget("is empty".to_owned()));
        }
        if target.len() > TARGET_MAX {
            return Err(EntryProblem::BadTarget(format!(
                "has {} bytes, {TARGET_MAX} are allowed",
                target.len()
            )));
        }
        if target.contains(&0) {
            return Err(EntryProblem::BadTarget("holds a NUL byte".to_owned()));
        }
        Ok(Self::Symlink(target))
    }

    pub(crate) fn kind(&self) -> FileKind {
        match self {
            Self::Directory(_) => FileKind::Directory,
            Self::Regular { .. } => FileKind::Regular,
            Self::Symlink(_) => FileKind::Symlink,
            Self::Char(_) => FileKind::CharDevice,
            Self::Block(_) => FileKind::BlockDevice,
            Self::Fifo => FileKind::Fifo,
            Self::Socket => FileKind::Socket,
        }
    }
}

/// One file of any kind.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
}

/// All inodes of a build. Those that no name leads to any more stay in the arena and are not written.
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    root: InodeId,
}

impl Tree {
    /// A tree with an empty root.
    pub(crate) fn new() -> Self {
        let root = Inode { meta: Meta::implied_directory(), body: Body::Directory(BTreeMap::new()) };
        Self { inodes: vec![root], root: InodeId(0) }
    }

    pub(crate) fn root(&self) -> InodeId {
        self.root
    }

    pub(crate) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn get(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    pub(crate) fn get_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.index()]
    }

    pub(crate) fn add(&mut self, inode: Inode) -> InodeId {
        // An inode takes at least 100 bytes here: 2^32 of them do not fit in the memory of a machine of today.
        let id = InodeId(u32::try_from(self.inodes.len()).expect("fewer than 2^32 inodes fit in memory"));
        self.inodes.push(inode);
        id
    }

    /// The names in a directory; `None` when it is something else.
    pub(crate) fn children(&self, id: InodeId) -> Option<&BTreeMap<Vec<u8>, InodeId>> {
        match &self.get(id).body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(crate) fn children_mut(&mut self, id: InodeId) -> Option<&mut BTreeMap<Vec<u8>, InodeId>> {
        match &mut self.get_mut(id).body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(crate) fn child(&self, id: InodeId, name: &[u8]) -> Option<InodeId> {
        self.children(id)?.get(name).copied()
    }
}

/// Refuses what no directory entry can be called.
pub(crate) fn check_name(name: &[u8]) -> Result<(), EntryProblem> {
    if name.is_empty() {
        return Err(EntryProblem::BadName("is empty".to_owned()));
    }
    if name.len() > MAX_NAME {
        return Err(EntryProblem::BadName(format!("has {} bytes, {MAX_NAME} are allowed", name.len())));
    }
    if name == b"." || name == b".." || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(EntryProblem::BadName(format!("\"{}\" is not allowed", crate::error::show(name))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattr_names_are_cut_at_their_prefix() {
        let xattrs = make_xattrs(
            vec![
                (b"user.b".to_vec(), b"2".to_vec()),
                (b"security.capability".to_vec(), b"\0\n=".to_vec()),
                (b"system.posix_acl_access".to_vec(), b"acl".to_vec()),
                (b"user.a".to_vec(), b"1".to_vec()),
                (b"user.a".to_vec(), b"3".to_vec()),
            ],
            UnsupportedXattrs::Refuse,
        )
        .unwrap();
        let short: Vec<_> =
            xattrs.iter().map(|x| (x.index, x.suffix.as_slice(), x.value.as_slice())).collect();
        assert_eq!(
            short,
            [
                (NameIndex::User, &b"a"[..], &b"3"[..]),
                (NameIndex::User, b"b", b"2"),
                (NameIndex::PosixAclAccess, b"", b"acl"),
                (NameIndex::Security, b"capability", b"\0\n=")
            ]
        );
    }

    #[test]
    fn unknown_namespaces_are_refused_or_dropped() {
        let raw = || {
            vec![(b"system.nfs4_acl".to_vec(), Vec::new()), (b"system.posix_acl_accessX".to_vec(), vec![])]
        };
        assert!(make_xattrs(raw(), UnsupportedXattrs::Refuse).is_err());
        assert_eq!(make_xattrs(raw(), UnsupportedXattrs::Drop).unwrap(), []);
        // A prefix alone is not a name.
        assert!(make_xattrs(vec![(b"user.".to_vec(), vec![])], UnsupportedXattrs::Refuse).is_err());
    }

    #[test]
    fn xattr_limits() {
        let long = [b"user.".as_slice(), &[b'x'; 256]].concat();
        assert!(make_xattrs(vec![(long, vec![])], UnsupportedXattrs::Refuse).is_err());
        assert!(make_xattrs(vec![(b"user.v".to_vec(), vec![0; 65536])], UnsupportedXattrs::Drop).is_err());
        let many =
            |n: u8| (0..n).map(|i| (vec![b'u', b's', b'e', b'r', b'.', b'a' + i], vec![0; 65535])).collect();
        assert!(make_xattrs(many(3), UnsupportedXattrs::Refuse).is_ok());
        assert!(make_xattrs(many(4), UnsupportedXattrs::Refuse).is_err());
    }

    #[test]
    fn device_numbers() {
        assert_eq!(device_number(0xfff, 0xf_ffff).unwrap().encode(), Some(u32::MAX));
        assert!(device_number(0x1000, 0).is_err());
        assert!(device_number(0, 0x10_0000).is_err());
    }
}
