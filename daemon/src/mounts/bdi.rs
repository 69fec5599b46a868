//! `/sys/class/bdi`: one directory per superblock.
//!
//! EROFS over files or fscache gets `erofs-N`, where N only counts up. The directory is there exactly as long as the
//! superblock is: also when it is mounted in other namespaces only, or was detached while files on it are open. That
//! makes it the proof that nobody reads a blob through it any more.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

const CLASS: &str = "/sys/class/bdi";

/// The names of the EROFS superblocks that are alive; `None` where sysfs is not mounted.
pub fn list() -> Option<BTreeSet<String>> {
    let names = std::fs::read_dir(CLASS).ok()?;
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Some(names.filter(|name| name.starts_with("erofs-")).collect())
}

/// The one name that came between two lists; `None` when it cannot be told.
pub fn added(before: Option<&BTreeSet<String>>, after: Option<&BTreeSet<String>>) -> Option<String> {
    let mut new = after?.difference(before?);
    let name = new.next()?;
    new.next().is_none().then(|| name.clone())
}

/// The readahead of a superblock, KiB.
///
/// # Errors
/// The system's answer.
pub fn read_ahead(name: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string(Path::new(CLASS).join(name).join("read_ahead_kb"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// Sets the readahead of a superblock, KiB.
///
/// # Errors
/// The system's answer.
pub fn set_read_ahead(name: &str, kib: u64) -> io::Result<()> {
    std::fs::write(Path::new(CLASS).join(name).join("read_ahead_kb"), format!("{kib}\n"))
}

/// Whether the superblock is alive.
pub fn is_alive(name: &str) -> bool {
    Path::new(CLASS).join(name).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_a_single_new_name_counts() {
        let before = set(&["erofs-1", "erofs-2"]);
        assert_eq!(added(Some(&before), Some(&set(&["erofs-2", "erofs-3"]))), Some("erofs-3".into()));
        assert_eq!(added(Some(&before), Some(&before)), None);
        assert_eq!(added(Some(&before), Some(&set(&["erofs-3", "erofs-4"]))), None);
        assert_eq!(added(None, Some(&before)), None);
    }
}
