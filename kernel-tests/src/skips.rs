//! Tests that cannot run on this machine say so, and are counted.

use std::fs::File;
use std::io::Write;

/// Prints `SKIPPED: <test>: <why>`, and appends the same to the file named by `SKIMMER_SKIPS` when that is set.
///
/// # Panics
/// The file cannot be written: a skip must never be lost.
pub fn skip(test: &str, why: &str) {
    let line = format!("{test}: {}\n", why.replace('\n', " "));
    eprint!("SKIPPED: {line}");
    if let Some(path) = std::env::var_os("SKIMMER_SKIPS") {
        let file = File::options().create(true).append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|error| panic!("cannot note a skip in {}: {error}", path.display()));
    }
}

/// Why this process cannot mount and mark files, or `None` when it is root.
#[must_use]
pub fn not_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned())
}
