//! A walk over a directory tree with the attributes of every name.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What a walk took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Walk {
    /// Names below the root.
    pub names: u64,
    /// Seconds.
    pub seconds: f64,
}

/// Lists every directory below `root` and asks for every name's attributes.
///
/// # Errors
/// A directory cannot be read.
pub fn walk(root: &Path) -> Result<Walk> {
    let start = Instant::now();
    let mut names = 0;
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))? {
            let entry = entry?;
            let metadata = entry.metadata().with_context(|| format!("{}", entry.path().display()))?;
            names += 1;
            if metadata.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok(Walk { names, seconds: start.elapsed().as_secs_f64() })
}
