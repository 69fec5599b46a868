//! The FUSE contender: libfuse's own passthrough example.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use skimmer_vm_images::cache::{Entry, Key};
use skimmer_vm_images::{apt, debian, run};

/// Compiles libfuse's `passthrough_ll` (its low-level example, the quicker one of two) if the cache does not hold it.
///
/// # Errors
/// The source or the compiler cannot be had, or it does not compile.
pub fn passthrough() -> Result<PathBuf> {
    apt::ensure(&["gcc", "libc6-dev", "libfuse3-dev", "pkg-config"])?;
    let flags = run(Command::new("pkg-config").args(["--cflags", "--libs", "fuse3"]))?;
    let flags = String::from_utf8(flags).context("pkg-config prints text")?;
    let mut key = Key::new("fuse passthrough");
    key.add(&run(Command::new("dpkg-query").args(["-W", "-f=${Version}", "libfuse3-dev"]))?);
    let directory = Entry::new("fuse", &key.finish())?.get_or_make(|aside| {
        let source = debian::source("fuse3")?.join("example/passthrough_ll.c");
        run(Command::new("gcc")
            .args(["-O2", "-D_GNU_SOURCE", "-DHAVE_UTIMENSAT", "-o"])
            .arg(aside.join("passthrough_ll"))
            .arg(source)
            .args(flags.split_whitespace()))?;
        Ok(())
    })?;
    Ok(directory.join("passthrough_ll"))
}
