//! Trees made of Debian packages, for images and for programs in guests, and sources of Debian packages.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::apt::{self, Archive};
use crate::cache::{self, Entry, Key};
use crate::disk;
use crate::process::run;

/// Of a system's disk; what is not written takes no room.
const SYSTEM_BYTES: u64 = 4 << 30;
/// How many systems stay in the cache.
const SYSTEMS_KEPT: usize = 2;

/// The packages that `names` need on an empty system, `name=version`, without those in `without`.
///
/// # Errors
/// The archive does not have them.
pub fn resolve(names: &[&str], without: &[String]) -> Result<Vec<String>> {
    let attempt = || {
        let mut simulate = Command::new("apt-get");
        simulate.env("LC_ALL", "C").args(["-s", "-o", "Dir::State::status=/dev/null"]);
        run(simulate.args(["-o", "APT::Install-Recommends=false", "install"]).args(names))
    };
    let plan = match attempt() {
        Ok(plan) => plan,
        // Missing or outdated package lists are the usual reason for a first failure.
        Err(first) => {
            apt::update().with_context(|| format!("after {first:#}"))?;
            attempt()?
        }
    };
    let mut found: Vec<String> = String::from_utf8_lossy(&plan)
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("Inst ")?.split(' ');
            let (name, version) = (words.next()?, words.next()?.strip_prefix('(')?);
            Some(format!("{name}={version}"))
        })
        .filter(|package| !without.contains(package))
        .collect();
    found.sort();
    Ok(found)
}

/// Fetches `packages` (as [`resolve`] gives them) and unpacks them below `root`; none of their scripts runs.
///
/// # Errors
/// A package cannot be fetched or unpacked.
pub fn unpack(packages: &[String], root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let debs = tempfile::tempdir_in(root.parent().context("a root has a parent")?)?;
    // The sandbox user cannot write into our directory; apt only warns, but at length.
    let mut download = Command::new("apt-get");
    download.args(["download", "-q", "-o", "APT::Sandbox::User=root"]);
    run(download.args(packages).current_dir(debs.path()))?;
    let mut files: Vec<PathBuf> =
        fs::read_dir(debs.path())?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for deb in files {
        apt::unpack(&deb, root)?;
        fs::remove_file(&deb)?;
    }
    Ok(())
}

/// A tree of `names` and all that they need, fit to run their programs with `chroot`; from the cache when it is there.
///
/// # Errors
/// A package cannot be fetched or unpacked.
pub fn root(names: &[&str]) -> Result<PathBuf> {
    let packages = resolve(names, &[])?;
    let mut key = Key::new("debian root");
    packages.iter().for_each(|package| key.add(package.as_bytes()));
    let entry = Entry::new("debian", &key.finish())?.get_or_make(|aside| {
        eprintln!("unpacking {} Debian packages for {} (once)", packages.len(), names.join(", "));
        let root = aside.join("root");
        unpack(&packages, &root)?;
        for directory in ["proc", "dev", "tmp", "mnt"] {
            fs::create_dir_all(root.join(directory))?;
        }
        Ok(())
    })?;
    Ok(entry.join("root"))
}

/// The files of one package without what it needs, for a program that this system's libraries are enough for; from the
/// cache when they are there.
///
/// # Errors
/// It cannot be fetched or unpacked.
pub fn alone(package: &str) -> Result<PathBuf> {
    let all = resolve(&[package], &[])?;
    let wanted = all.into_iter().find(|found| found.split('=').next() == Some(package));
    let wanted = wanted.with_context(|| format!("apt does not list {package} among what {package} needs"))?;
    let mut key = Key::new("debian package");
    key.add(wanted.as_bytes());
    let entry = Entry::new("packages", &key.finish())?
        .get_or_make(|aside| unpack(std::slice::from_ref(&wanted), &aside.join("root")))?;
    Ok(entry.join("root"))
}

/// An ext4 image of a Debian system with `names` and what they need, installed as Debian does it; from the cache when
/// it is there.
///
/// # Errors
/// We are not root, or debootstrap fails.
pub fn system(names: &[&str]) -> Result<PathBuf> {
    const SUITE: &str = "bookworm";
    apt::ensure(&["debootstrap"])?;
    let mut key = Key::new("debian system");
    for part in resolve(names, &[])?.iter().map(String::as_str).chain([SUITE, &SYSTEM_BYTES.to_string()]) {
        key.add(part.as_bytes());
    }
    let entry = Entry::new("systems", &key.finish())?.get_or_make(|aside| {
        eprintln!("installing a Debian system with {} (once, about a minute)", names.join(", "));
        let root = aside.join("root");
        run(Command::new("debootstrap")
            .args(["--variant=minbase", &format!("--include={}", names.join(",")), SUITE])
            .arg(&root)
            .arg("http://deb.debian.org/debian"))?;
        for waste in ["var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"] {
            fs::remove_dir_all(root.join(waste))?;
        }
        disk::system(&aside.join("disk"), &root, SYSTEM_BYTES)?;
        fs::remove_dir_all(&root)?;
        Ok(())
    })?;
    File::open(&entry)?.set_modified(SystemTime::now())?;
    cache::prune("systems", SYSTEMS_KEPT)?;
    Ok(entry.join("disk"))
}

/// The unpacked source of a Debian package, without Debian's patches; from the cache when it is there.
///
/// # Errors
/// It cannot be fetched or unpacked.
pub fn source(package: &str) -> Result<PathBuf> {
    let archive = Archive::sources("bookworm")?;
    let mut key = Key::new("debian source");
    key.add(package.as_bytes());
    let entry = Entry::new("sources", &key.finish())?.get_or_make(|aside| {
        let debs = aside.join("fetched");
        fs::create_dir(&debs)?;
        if archive.source(package, &debs).is_err() {
            archive.update()?;
            archive.source(package, &debs)?;
        }
        let tarball = fs::read_dir(&debs)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.to_string_lossy();
                name.contains(".orig.tar.") && !name.ends_with(".asc")
            })
            .with_context(|| format!("the source of {package} holds no .orig.tar"))?;
        let tree = aside.join("source");
        fs::create_dir(&tree)?;
        run(Command::new("tar")
            .args(["-x", "--strip-components=1", "--no-same-owner", "-C"])
            .arg(&tree)
            .arg("-f")
            .arg(tarball))?;
        fs::remove_dir_all(&debs)?;
        Ok(())
    })?;
    Ok(entry.join("source"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_come_with_what_they_need() {
        let base = resolve(&["libc6"], &[]).unwrap();
        assert!(base.iter().any(|package| package.starts_with("libc6=")), "{base:?}");
        let more = resolve(&["mawk"], &base).unwrap();
        assert!(more.iter().any(|package| package.starts_with("mawk=")), "{more:?}");
        assert!(more.iter().all(|package| !base.contains(package)));
    }
}
