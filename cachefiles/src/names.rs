//! Where the kernel keeps an object: the key hash and the encoding of keys as file names.
//!
//! The kernel's rules are in `fs/netfs/fscache_main.c`, `fscache_volume.c`, `fscache_cookie.c` and
//! `fs/cachefiles/key.c`. A pre-created file is found only under exactly the name that these give.

use std::path::PathBuf;

/// Longest cookie key; one byte more stops the kernel with a BUG.
pub const COOKIE_KEY_MAX: usize = 252;
/// Longest volume key whose directory name still fits.
pub const VOLUME_KEY_MAX: usize = 254;
/// Digits of the base-64 encoding, lowest value first.
const BASE64: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-";
/// The kernel's 32-bit golden ratio.
const GOLDEN_RATIO_32: u32 = 0x61c8_8647;

/// A key that must not be given to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty key.
    #[error("{what} is empty")]
    Empty {
        /// Which key.
        what: &'static str,
    },
    /// Key over the limit.
    #[error("{what} has {len} bytes, the kernel takes at most {max}")]
    TooLong {
        /// Which key.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A volume key is used as a directory name as it is.
    #[error(
        "volume key {key:?} holds {byte:#04x}; it becomes a directory name and may hold neither '/' nor NUL"
    )]
    VolumeByte {
        /// The key, made printable.
        key: String,
        /// The offending byte.
        byte: u8,
    },
}

/// A volume: the group of cached files of one fsid or one shared domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Volume {
    key: Box<[u8]>,
    hash: u32,
}

impl Volume {
    /// The volume with that key.
    ///
    /// # Errors
    /// [`NameError`] when the kernel would reject the key.
    pub fn new(key: impl AsRef<[u8]>) -> Result<Self, NameError> {
        let key = key.as_ref();
        check_length("volume key", key, VOLUME_KEY_MAX)?;
        if let Some(&byte) = key.iter().find(|&&byte| byte == b'/' || byte == 0) {
            return Err(NameError::VolumeByte { key: String::from_utf8_lossy(key).into(), byte });
        }
        // The kernel hashes its own form of the key: a length byte, the key, a NUL, padded to whole words.
        let length = u8::try_from(key.len());
        let length =
            length.map_err(|_| NameError::TooLong { what: "volume key", len: key.len(), max: 255 })?;
        let mut image = Vec::with_capacity(key.len() + 5);
        image.push(length);
        image.extend(key);
        image.push(0);
        Ok(Self { key: key.into(), hash: mix(0, &image) })
    }

    /// The volume that EROFS uses for a shared domain, or, without one, for an fsid.
    ///
    /// # Errors
    /// [`NameError`] when the kernel would reject the key.
    pub fn erofs(domain_or_fsid: &str) -> Result<Self, NameError> {
        Self::new(format!("erofs,{domain_or_fsid}"))
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// The kernel's hash of the key.
    #[must_use]
    pub fn hash(&self) -> u32 {
        self.hash
    }

    /// Name of its directory below `cache/`.
    #[must_use]
    pub fn directory(&self) -> Vec<u8> {
        let mut name = vec![b'I'];
        name.extend(&self.key);
        name
    }

    /// Where the object with this cookie key lies.
    ///
    /// # Errors
    /// [`NameError`] when the kernel would not survive or take the key.
    pub fn object(&self, cookie_key: impl AsRef<[u8]>) -> Result<ObjectName, NameError> {
        let key = cookie_key.as_ref();
        check_length("cookie key", key, COOKIE_KEY_MAX)?;
        let hash = mix(self.hash, key);
        Ok(ObjectName {
            volume: self.directory(),
            fanout: format!("@{:02x}", hash & 0xff),
            file: file_name(key),
            hash,
        })
    }
}

/// Where an object lies below the cache directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectName {
    /// Directory of the volume, `I` and its key.
    pub volume: Vec<u8>,
    /// Fan-out directory, `@` and two hex digits.
    pub fanout: String,
    /// File name.
    pub file: Vec<u8>,
    /// The kernel's hash of the cookie key.
    pub hash: u32,
}

impl ObjectName {
    /// The path below the cache directory: `cache/I<volume key>/@<hh>/<name>`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let mut path = PathBuf::from("cache");
        path.push(OsStr::from_bytes(&self.volume));
        path.push(&self.fanout);
        path.push(OsStr::from_bytes(&self.file));
        path
    }
}

fn check_length(what: &'static str, key: &[u8], max: usize) -> Result<(), NameError> {
    match key.len() {
        0 => Err(NameError::Empty { what }),
        len if len > max => Err(NameError::TooLong { what, len, max }),
        _ => Ok(()),
    }
}

/// The key in groups of four bytes, the last one padded with zeros.
fn groups(key: &[u8]) -> impl Iterator<Item = [u8; 4]> + Clone {
    key.chunks(4).map(|chunk| {
        let mut group = [0; 4];
        group[..chunk.len()].copy_from_slice(chunk);
        group
    })
}

/// `fscache_hash()`: the same on every architecture, since it reads little-endian words.
fn mix(salt: u32, key: &[u8]) -> u32 {
    let (mut x, mut y) = (0u32, salt);
    for group in groups(key) {
        x ^= u32::from_le_bytes(group);
        y ^= x;
        x = x.rotate_left(7).wrapping_add(y);
        y = y.rotate_left(20).wrapping_mul(9);
    }
    (y ^ x.wrapping_mul(GOLDEN_RATIO_32)).wrapping_mul(GOLDEN_RATIO_32)
}

/// `cachefiles_cook_key()`: the key itself where it is printable, else the shorter of hex words and base 64.
fn file_name(key: &[u8]) -> Vec<u8> {
    if key.iter().all(|&byte| (0x21..=0x7f).contains(&byte) && byte != b'/') {
        return [b"D", key].concat();
    }
    let big = hex_words(key, u32::from_be_bytes);
    let little = hex_words(key, u32::from_le_bytes);
    // The kernel compares lengths with one separator per word, which is the letter and the commas in between.
    let triples = key.len().div_ceil(3);
    let base64_len = 2 + 4 * triples;
    let (big_len, little_len) = (big.len() + 1, little.len() + 1);
    if big_len >= base64_len && little_len >= base64_len {
        return base64_name(key, triples);
    }
    let (letter, words) = if big_len <= little_len { ('S', big) } else { ('T', little) };
    format!("{letter}{words}").into_bytes()
}

/// Words in hex without leading zeros, zero as nothing, joined by commas.
fn hex_words(key: &[u8], word: fn([u8; 4]) -> u32) -> String {
    let mut out = String::new();
    for (index, group) in groups(key).enumerate() {
        if index > 0 {
            out.push(',');
        }
        let value = word(group);
        if value != 0 {
            out.push_str(&format!("{value:x}"));
        }
    }
    out
}

fn base64_name(key: &[u8], triples: usize) -> Vec<u8> {
    let missing = 3 * triples - key.len();
    let mut out = vec![b'E', BASE64[missing]];
    for chunk in key.chunks(3) {
        let byte = |at| u32::from(chunk.get(at).copied().unwrap_or(0));
        let mut value = byte(0) | byte(1) << 8 | byte(2) << 16;
        for _ in 0..4 {
            // Six bits index a table of 64.
            let digit = usize::try_from(value & 63).map_or(b'0', |index| BASE64[index]);
            out.push(digit);
            value >>= 6;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const H: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    /// Volume key, cookie key, path below `cache/`, both hashes: all seen on running kernels (6.1 and 6.12).
    #[test]
    fn names_that_kernels_made() {
        let sha = format!("sha256:{H}");
        let own = format!("erofs,{H}");
        let paths =
            [format!("Ierofs,d1/@88/D{H}"), format!("Ierofs,d1/@f3/D{sha}"), format!("I{own}/@0e/D{H}")];
        #[rustfmt::skip]
        let table: &[(&str, &[u8], &str, u32, u32)] = &[
            ("erofs,full.img", b"full.img", "Ierofs,full.img/@85/Dfull.img", 0xd19e6e80, 0xfde1c285),
            ("erofs,full2.img", b"full2.img", "Ierofs,full2.img/@64/Dfull2.img", 0x90dcc0ec, 0x4d79b264),
            ("erofs,dom1", b"blob.img", "Ierofs,dom1/@9b/Dblob.img", 0x0af1241f, 0x980b559b),
            ("erofs,dom1", b"bmeta.img", "Ierofs,dom1/@d4/Dbmeta.img", 0x0af1241f, 0x40f43ed4),
            ("erofs,dom1", b"bmeta2.img", "Ierofs,dom1/@86/Dbmeta2.img", 0x0af1241f, 0x3c9c6086),
            ("erofs,skimmer", b"0123456789abcdef", "Ierofs,skimmer/@34/D0123456789abcdef", 0x169566f6, 0x23e19534),
            ("erofs,skimmer", b"0123456789abcdef0", "Ierofs,skimmer/@c1/D0123456789abcdef0", 0x169566f6, 0xd7c328c1),
            ("erofs,d1", H.as_bytes(), &paths[0], 0x2e7ed010, 0x25f84288),
            ("erofs,d1", sha.as_bytes(), &paths[1], 0x2e7ed010, 0x7de467f3),
            (&own, H.as_bytes(), &paths[2], 0xb9eae041, 0x01a02e0e),
            ("erofs,dom space", b"img1", "Ierofs,dom space/@a5/Dimg1", 0x0cbd8cba, 0x074b81a5),
            ("erofs,d1", b"a/b", "Ierofs,d1/@f0/E0xZyo", 0x2e7ed010, 0x27e4cef0),
            ("erofs,d1", b"img with space", "Ierofs,d1/@41/E1FRSpwsnqQx68P1nozl60", 0x2e7ed010, 0xe2d4df41),
            ("erofs,d1", b" ", "Ierofs,d1/@63/T20", 0x2e7ed010, 0xe0c90563),
            ("erofs,d1", b"ab c", "Ierofs,d1/@7b/S61622063", 0x2e7ed010, 0x40cf837b),
            ("erofs,d1", b"\x01", "Ierofs,d1/@2e/T1", 0x2e7ed010, 0x3ab6d62e),
            ("erofs,d1", b"\x61\x62\x01\x02\x03\x04\x05", "Ierofs,d1/@fa/E2x9m02c015000", 0x2e7ed010, 0x9cf5d8fa),
            ("erofs,d", b"caf\xc3\xa9", "Ierofs,d/@48/E1z5Cp3Da0", 0xd7adcaf0, 0x86cd9b48),
        ];
        assert_eq!(table.len(), 18);
        for &(volume_key, cookie_key, path, volume_hash, cookie_hash) in table {
            let volume = Volume::new(volume_key).unwrap();
            let object = volume.object(cookie_key).unwrap();
            assert_eq!(object.path().to_str().unwrap(), format!("cache/{path}"));
            assert_eq!((volume.hash(), object.hash), (volume_hash, cookie_hash), "{path}");
        }
    }

    #[test]
    fn zero_words_vanish() {
        let volume = Volume::erofs("d1").unwrap();
        assert_eq!(volume.object([0; 9]).unwrap().file, b"S,,");
        assert_eq!(volume.object(b"\0\0\0\x01").unwrap().file, b"S1");
        assert_eq!(volume.object(b"\x01\0\0\0").unwrap().file, b"T1");
    }

    #[test]
    fn keys_that_would_hurt_are_refused() {
        let volume = Volume::erofs("d1").unwrap();
        assert!(volume.object([b'a'; 252]).is_ok());
        let error = volume.object([b'a'; 253]).unwrap_err();
        assert_eq!(error, NameError::TooLong { what: "cookie key", len: 253, max: 252 });
        assert_eq!(volume.object("").unwrap_err(), NameError::Empty { what: "cookie key" });
        assert!(Volume::new([b'a'; 254]).is_ok());
        assert!(matches!(Volume::new([b'a'; 255]), Err(NameError::TooLong { len: 255, .. })));
        assert!(matches!(Volume::new("erofs,a/b"), Err(NameError::VolumeByte { byte: b'/', .. })));
        assert!(matches!(Volume::new("a\0"), Err(NameError::VolumeByte { byte: 0, .. })));
        assert!(matches!(Volume::new(""), Err(NameError::Empty { .. })));
    }

    proptest! {
        #[test]
        fn names_are_file_names_and_differ(
            a in proptest::collection::vec(any::<u8>(), 1..COOKIE_KEY_MAX),
            b in proptest::collection::vec(any::<u8>(), 1..COOKIE_KEY_MAX),
        ) {
            let volume = Volume::erofs("d1").unwrap();
            let (one, two) = (volume.object(&a).unwrap(), volume.object(&b).unwrap());
            prop_assert!(one.file.iter().all(|&byte| byte != 0 && byte != b'/'));
            // Keys that differ only in zero bytes at the end may share a hex name; the kernel has it so.
            let trimmed = |key: &[u8]| key.iter().rposition(|&byte| byte != 0).map_or(0, |at| at + 1);
            if a[..trimmed(&a)] != b[..trimmed(&b)] {
                prop_assert_ne!(one.file, two.file);
            }
        }
    }
}
