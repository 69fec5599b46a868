//! Everything below a directory, read once and thrown away.

use std::fs::{self, DirEntry, File};
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a sweep took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sweep {
    /// Bytes read.
    pub bytes: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Reads every file below `root` in the order of `tar`, `find` and `grep -r`: that of the directory entries, each
/// directory entered where it is met; 1 MiB at a time.
///
/// # Errors
/// Something cannot be read.
pub fn sweep(root: &Path) -> Result<Sweep> {
    let start = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    let mut todo = entries(root)?;
    while let Some(entry) = todo.pop() {
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() {
            todo.append(&mut entries(&path)?);
        } else if kind.is_file() {
            let mut file = File::open(&path).with_context(|| format!("{}", path.display()))?;
            loop {
                let got = file.read(&mut buffer).with_context(|| format!("{}", path.display()))?;
                if got == 0 {
                    break;
                }
                bytes += u64::try_from(got)?;
            }
        }
    }
    Ok(Sweep { bytes, seconds: start.elapsed().as_secs_f64() })
}

/// The entries of a directory, the first one last.
fn entries(directory: &Path) -> Result<Vec<DirEntry>> {
    let read = || fs::read_dir(directory)?.collect::<std::io::Result<Vec<_>>>();
    let mut entries = read().with_context(|| format!("{}", directory.display()))?;
    entries.reverse();
    Ok(entries)
}
