//! What the tests of all crates share: skips that are counted, and directories on a real file system.
#![forbid(unsafe_code)]

pub mod tools;

use std::fs::File;
use std::io::Write;
use std::panic::Location;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The environment variable that names the list of skips. `cargo xtask test` sets it, and counts the list's lines.
pub const LIST: &str = "SKIMMER_SKIPS";

/// Prints `SKIPPED: <test>: <why>`, and appends the same to the file that [`LIST`] names when that is set.
///
/// # Panics
/// The file cannot be written: a skip must never be lost.
pub fn skip(test: &str, why: &str) {
    let line = line(test, why);
    eprint!("SKIPPED: {line}");
    if let Some(list) = std::env::var_os(LIST) {
        append(Path::new(&list), &line);
    }
}

/// [`skip`] for the running test, which is found by itself: it may be called from a helper.
///
/// # Panics
/// As [`skip`].
#[track_caller]
pub fn skip_this(why: &str) {
    skip(&this_test(Location::caller()), why);
}

/// A new directory on the file system of the build, `target/tmp`: `/tmp` is often a tmpfs, which has neither
/// pre-content events nor all attributes. A path in it may be too long for a socket: those belong in
/// [`tempfile::tempdir`].
///
/// # Panics
/// The directory cannot be made.
#[must_use]
pub fn scratch_dir() -> TempDir {
    let (program, parent) = (program(), "target/PROFILE/deps/PROGRAM");
    // What cargo calls CARGO_TARGET_TMPDIR, which it does not tell to unit tests.
    let target = program.ancestors().nth(3);
    let tmp = target.unwrap_or_else(|| panic!("{} is not {parent}", program.display())).join("tmp");
    let made = std::fs::create_dir_all(&tmp).and_then(|()| tempfile::tempdir_in(&tmp));
    made.unwrap_or_else(|error| panic!("cannot make a directory in {}: {error}", tmp.display()))
}

fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|error| panic!("this program has no path: {error}"))
}

/// `<program>::<test>`. The runner names each test's thread after the test; where it has only the main thread, the
/// place in the source has to do.
fn this_test(caller: &Location<'_>) -> String {
    let program = program();
    let stem = program.file_stem().unwrap_or_default().to_string_lossy();
    // Cargo's hash says nothing to anyone.
    let program = stem.rsplit_once('-').map_or(&*stem, |(name, _)| name);
    match std::thread::current().name() {
        Some(test) if test != "main" => format!("{program}::{test}"),
        _ => format!("{program} ({}:{})", caller.file(), caller.line()),
    }
}

fn line(test: &str, why: &str) -> String {
    format!("{test}: {}\n", why.trim_end().replace('\n', " "))
}

/// One write, so that the lines of tests that run at the same time do not mix.
fn append(list: &Path, line: &str) {
    let file = File::options().create(true).append(true).open(list);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|error| panic!("cannot note a skip in {}: {error}", list.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_one_line_with_the_tests_name() {
        let dir = scratch_dir();
        let list = dir.path().join("list");
        append(&list, &line(&this_test(Location::caller()), "no kernel\nno luck\n"));
        append(&list, &line("other", "why"));
        let text = std::fs::read_to_string(&list).unwrap();
        let (first, rest) = text.split_once('\n').unwrap();
        // Named by its thread, or with one test at a time by its place.
        let named = "skimmer_test_support::tests::a_skip_is_one_line_with_the_tests_name: ";
        assert!(first.starts_with(named) || first.contains(file!()), "{first}");
        assert!(first.ends_with(": no kernel no luck"), "{first}");
        assert_eq!(rest, "other: why\n");
    }

    #[test]
    fn scratch_is_where_the_program_was_built() {
        let dir = scratch_dir();
        assert!(dir.path().parent().unwrap().ends_with("tmp"));
        let target = dir.path().ancestors().nth(2).unwrap();
        assert!(program().starts_with(target), "{}", dir.path().display());
    }
}
