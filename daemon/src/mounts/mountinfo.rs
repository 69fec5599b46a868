//! `/proc/self/mountinfo`: which mounts are there.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One EROFS mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Device number of its files, `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// What it was mounted from, as it was named.
    pub source: PathBuf,
    /// Options of its superblock.
    pub options: String,
}

impl Entry {
    /// Whether the superblock has this option.
    pub fn has_option(&self, name: &str, value: &str) -> bool {
        self.options.split(',').any(|option| option.split_once('=') == Some((name, value)))
    }
}

/// The EROFS mounts of this process's mount namespace, oldest first.
///
/// # Errors
/// The system's answer.
pub fn erofs_mounts() -> std::io::Result<Vec<Entry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The EROFS mounts of every mount namespace that a process is in. What ends meanwhile is left out.
///
/// # Errors
/// The system's answer.
pub fn erofs_mounts_anywhere() -> std::io::Result<Vec<Entry>> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for process in std::fs::read_dir("/proc")? {
        let process = process?.path();
        let is_process = process.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit());
        let Some(namespace) = is_process.then(|| std::fs::read_link(process.join("ns/mnt")).ok()).flatten()
        else {
            continue;
        };
        // The first process of a namespace may be just ending; then the next one is asked.
        if !seen.contains(&namespace)
            && let Ok(text) = std::fs::read(process.join("mountinfo"))
        {
            seen.insert(namespace);
            all.extend(parse(&text));
        }
    }
    Ok(all)
}

/// Whether one of `entries` is device `device` at `target`.
pub fn contains(entries: &[Entry], device: &str, target: &Path) -> bool {
    entries.iter().any(|entry| entry.device == device && entry.target == target)
}

fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /target rw,noatime master:1 - ext3 /dev/root rw`
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let target = fields.nth(1)?;
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    if fields.next()? != b"erofs" {
        return None;
    }
    let (source, options) = (fields.next()?, fields.next()?);
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    Some(Entry {
        device: String::from_utf8_lossy(device).into_owned(),
        target: path(target),
        source: path(source),
        options: String::from_utf8_lossy(options).into_owned(),
    })
}

/// Blank, tab, newline and backslash are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().and_then(|digits| {
            digits.iter().try_fold(0_u8, |value, digit| {
                let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
                value.checked_mul(8)?.checked_add(digit)
            })
        });
        match octal {
            Some(byte) if *first == b'\\' => {
                out.push(byte);
                rest = &after[3..];
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erofs_lines_are_found_and_unescaped() {
        let text = b"22 1 0:20 / / rw,relatime - ext4 /dev/vda rw\n\
            45 22 0:61 / /mnt/a\\040b\\134c ro,relatime shared:3 master:1 - erofs /var/lib/x ro,user_xattr,fsid=ab\n\
            46 22 0:62 / /mnt/erofs rw - tmpfs erofs rw\n\
            short\n\n";
        let entries = parse(text);
        let entry = Entry {
            device: "0:61".into(),
            target: "/mnt/a b\\c".into(),
            source: "/var/lib/x".into(),
            options: "ro,user_xattr,fsid=ab".into(),
        };
        assert!(entry.has_option("fsid", "ab") && !entry.has_option("fsid", "a"));
        assert_eq!(entries, [entry]);
        assert!(contains(&entries, "0:61", Path::new("/mnt/a b\\c")));
        assert!(!contains(&entries, "0:62", Path::new("/mnt/erofs")));
    }

    #[test]
    fn odd_escapes_stay_as_they_are() {
        assert_eq!(unescape(b"a\\9"), b"a\\9");
        assert_eq!(unescape(b"\\777x"), b"\\777x");
        assert_eq!(unescape(b"\\"), b"\\");
    }
}
