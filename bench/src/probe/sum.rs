//! Everything below a directory, read once: a digest that equal trees share.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A tree's digest and what reading it took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// Names below the root.
    pub names: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// SHA-256 over every name in order: path, kind, size, and content or target; 64 hex digits.
    pub digest: String,
    /// Seconds, hashing included.
    pub seconds: f64,
}

/// Reads everything below `root` but the names of its top that are in `without`.
///
/// # Errors
/// Something cannot be read.
pub fn sum(root: &Path, without: &[String]) -> Result<Sum> {
    let start = Instant::now();
    let mut total = Total { hash: Sha256::new(), names: 0, bytes: 0, buffer: vec![0; 1 << 20] };
    total.directory(root, Path::new(""), without)?;
    Ok(Sum {
        names: total.names,
        bytes: total.bytes,
        digest: hex::encode(total.hash.finalize()),
        seconds: start.elapsed().as_secs_f64(),
    })
}

struct Total {
    hash: Sha256,
    names: u64,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Total {
    fn directory(&mut self, root: &Path, relative: &Path, without: &[String]) -> Result<()> {
        let path = root.join(relative);
        let entries = fs::read_dir(&path).with_context(|| format!("{}", path.display()))?;
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        names.sort();
        for name in names {
            if without.iter().any(|left_out| name.as_bytes() == left_out.as_bytes()) {
                continue;
            }
            let relative = relative.join(&name);
            let path = root.join(&relative);
            let metadata = path.symlink_metadata().with_context(|| format!("{}", path.display()))?;
            self.names += 1;
            self.field(relative.as_os_str().as_bytes());
            if metadata.is_dir() {
                self.field(b"directory");
                self.directory(root, &relative, &[])?;
            } else if metadata.is_symlink() {
                self.field(b"symlink");
                self.field(fs::read_link(&path)?.as_os_str().as_bytes());
            } else if metadata.is_file() {
                self.field(b"file");
                self.file(&path)?;
            } else {
                self.field(b"special");
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> Result<()> {
        let mut file = File::open(path).with_context(|| format!("{}", path.display()))?;
        let mut length: u64 = 0;
        loop {
            let got = file.read(&mut self.buffer).with_context(|| {
                format!("{}: read of {} bytes at offset {length}", path.display(), self.buffer.len())
            })?;
            if got == 0 {
                break;
            }
            self.hash.update(&self.buffer[..got]);
            length += u64::try_from(got)?;
        }
        self.field(&length.to_le_bytes());
        self.bytes += length;
        Ok(())
    }

    fn field(&mut self, bytes: &[u8]) {
        self.hash.update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
        self.hash.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_trees_have_equal_digests_and_others_do_not() {
        let make = |content: &[u8]| {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("sub")).unwrap();
            fs::write(directory.path().join("sub/file"), content).unwrap();
            fs::write(directory.path().join("other"), b"x").unwrap();
            directory
        };
        let digest = |directory: &tempfile::TempDir| sum(directory.path(), &[]).unwrap().digest;
        let (a, b, c) = (make(b"same"), make(b"same"), make(b"sane"));
        assert_eq!(digest(&a), digest(&b));
        assert_ne!(digest(&a), digest(&c));
        let part = sum(a.path(), &["sub".to_owned()]).unwrap();
        assert_eq!((part.names, part.bytes), (1, 1));
        assert_eq!(part.digest, sum(c.path(), &["sub".to_owned()]).unwrap().digest);
    }
}
