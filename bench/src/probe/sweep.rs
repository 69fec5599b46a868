//! Everything below a directory, read once and thrown away.

use std::fs::{self, File};
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

/// Reads every file below `root`, as `tar` or a backup would: directory by directory, 1 MiB at a time.
///
/// # Errors
/// Something cannot be read.
pub fn sweep(root: &Path) -> Result<Sweep> {
    let start = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))? {
            let entry = entry?;
            let (kind, path) = (entry.file_type()?, entry.path());
            if kind.is_dir() {
                todo.push(path);
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
    }
    Ok(Sweep { bytes, seconds: start.elapsed().as_secs_f64() })
}
