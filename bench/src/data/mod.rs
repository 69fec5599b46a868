//! What benches read: a tree with something for every workload, made once.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kernel_tests::fixture;
use serde::Deserialize;
use skimmer_vm_images::cache::{Entry, Key};
use skimmer_vm_images::{debian, run};

use crate::content;

/// Changes whenever this file makes other bytes from the same specification.
const RECIPE: &str = "1";
/// Seed of the content of [`FILE`].
pub const SEED: u64 = 1;
/// One large file, of [`content`].
pub const FILE: &str = "file.bin";
/// Small files in nested directories.
pub const MANY: &str = "many";
/// What no workload reads.
pub const UNREAD: &str = "unread.bin";
/// The source of a C project.
pub const SOURCE: &str = "source";
/// Files in one directory of [`MANY`].
const FAN_OUT: u32 = 100;

/// What a tree holds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeSpec {
    /// MiB of [`FILE`].
    pub file_mib: u64,
    /// Files below [`MANY`].
    pub many: u32,
    /// MiB of [`UNREAD`]; incompressible.
    pub unread_mib: usize,
    /// What lies in [`SOURCE`].
    #[serde(default)]
    pub source: Source,
}

/// A C project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// None.
    #[default]
    None,
    /// Lua 5.4: 60 C files.
    Lua,
    /// Linux 6.12: the long one.
    Linux,
}

impl Source {
    /// The Debian source package, and shell lines that build it in its folder with `$JOBS` jobs; they end with a check
    /// of the product.
    pub fn recipe(self) -> Option<(&'static str, &'static str)> {
        match self {
            Source::None => None,
            Source::Lua => Some((
                "lua5.4",
                "make -s -C src -j\"$JOBS\" CC=gcc MYCFLAGS=-DLUA_USE_POSIX MYLIBS= all >&2\n\
                 test \"$(src/lua -e 'print(6 * 7)')\" = 42",
            )),
            Source::Linux => {
                Some(("linux", "make -s tinyconfig >&2\nmake -s -j\"$JOBS\" vmlinux >&2\ntest -s vmlinux"))
            }
        }
    }

    /// Debian packages that [`Source::recipe`] needs.
    pub fn packages(self) -> &'static [&'static str] {
        match self {
            Source::None => &[],
            Source::Lua => &["gcc", "libc6-dev", "make"],
            Source::Linux => &["bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "perl"],
        }
    }
}

/// Makes a tree if the cache does not hold it.
///
/// # Errors
/// A file cannot be written, or a source cannot be fetched.
pub fn tree(spec: &TreeSpec) -> Result<PathBuf> {
    let mut key = Key::new("bench tree");
    key.add(RECIPE.as_bytes());
    key.add(format!("{spec:?}").as_bytes());
    let directory = Entry::new("trees", &key.finish())?.get_or_make(|aside| {
        eprintln!("making the tree of the benches (once)");
        let root = aside.join("tree");
        fs::create_dir(&root)?;
        large(&root, spec.file_mib)?;
        many(&root.join(MANY), spec.many)?;
        fs::write(root.join(UNREAD), fixture::content(2, spec.unread_mib << 20))?;
        if let Some((package, _)) = spec.source.recipe() {
            let source = debian::source(package)?;
            run(std::process::Command::new("cp").arg("-a").arg(source).arg(root.join(SOURCE)))?;
        }
        Ok(())
    })?;
    Ok(directory.join("tree"))
}

fn large(root: &Path, mib: u64) -> Result<()> {
    let path = root.join(FILE);
    let mut file = BufWriter::new(File::create(&path)?);
    content::write(SEED, mib * 256, &mut file)?;
    file.into_inner().map(drop).with_context(|| format!("{}", path.display()))
}

/// Sizes from nothing to a few blocks, as in a source tree.
fn many(root: &Path, count: u32) -> Result<()> {
    for index in 0..count {
        let directory = root.join(format!("{}/{}", index / (FAN_OUT * FAN_OUT), index / FAN_OUT % FAN_OUT));
        if index % FAN_OUT == 0 {
            fs::create_dir_all(&directory)?;
        }
        let length = usize::try_from(index.wrapping_mul(2_654_435_761) % 3000)?;
        let text = format!("file {index} of the benches\n");
        let content: Vec<u8> = text.bytes().cycle().take(length).collect();
        fs::write(directory.join(format!("{index}.txt")), content)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_what_it_was_asked_for() {
        let root = tempfile::tempdir().unwrap();
        large(root.path(), 1).unwrap();
        many(&root.path().join(MANY), 250).unwrap();
        assert_eq!(fs::metadata(root.path().join(FILE)).unwrap().len(), 1 << 20);
        let walk = crate::probe::walk(&root.path().join(MANY)).unwrap();
        assert_eq!(walk.names, 250 + 1 + 3);
    }
}
