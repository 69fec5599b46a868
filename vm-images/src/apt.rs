//! Debian packages: installing what the tests need, and finding and fetching what goes into a guest.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::run;

/// Installs those of `packages` that are missing, without their recommendations.
///
/// # Errors
/// Something is missing and we are not root, or apt fails: the message gives the command to run by hand.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", missing.join(" "));
    if !rustix::process::geteuid().is_root() {
        bail!("missing Debian packages: {}; install them as root with: {by_hand}", missing.join(" "));
    }
    eprintln!("installing Debian packages: {}", missing.join(" "));
    let install = || {
        run(apt_get()
            .args(["-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "install"])
            .args(&missing))
    };
    // Missing or outdated lists are the usual reason for a first failure.
    if install().is_err() {
        update()?;
        install().with_context(|| format!("cannot install what is missing; try by hand: {by_hand}"))?;
    }
    Ok(())
}

/// Whether `package` is installed and configured.
#[must_use]
pub fn is_installed(package: &str) -> bool {
    let status = run(Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}\n", package]));
    status.is_ok_and(|text| text.starts_with(b"installed"))
}

/// Fetches the package lists.
///
/// # Errors
/// We are not root, or apt fails.
pub fn update() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the package lists are missing or old; run as root: apt-get update");
    }
    run(apt_get().args(["-q", "-o", "DPkg::Lock::Timeout=300", "update"])).map(drop)
}

/// Where packages that are not installed come from.
pub(crate) struct Archive {
    options: Vec<String>,
}

impl Archive {
    /// What this machine's apt knows; or, with a `suite`, that suite of Debian alone, with package lists of our own so
    /// that nothing of it can ever be installed here by accident.
    pub(crate) fn open(suite: Option<&str>) -> Result<Self> {
        match suite {
            Some(suite) => Self::private("deb", suite),
            None => Ok(Archive { options: Vec::new() }),
        }
    }

    /// The source packages of a suite of Debian.
    pub(crate) fn sources(suite: &str) -> Result<Self> {
        Self::private("deb-src", suite)
    }

    fn private(kind: &str, suite: &str) -> Result<Self> {
        let root = crate::cache::root()?.join("apt").join(format!("{kind}-{suite}"));
        let (lists, archives) = (root.join("lists"), root.join("archives"));
        for directory in [lists.join("partial"), archives.join("partial")] {
            std::fs::create_dir_all(&directory).with_context(|| format!("{}", directory.display()))?;
        }
        let sources = root.join("sources.list");
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        std::fs::write(
            &sources,
            format!("{kind} [signed-by={keyring}] http://deb.debian.org/debian {suite} main\n"),
        )?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", root.display()),
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Archive { options: options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect() })
    }

    fn apt_get(&self) -> Command {
        let mut command = apt_get();
        command.args(&self.options);
        command
    }

    fn apt_cache(&self) -> Command {
        let mut command = Command::new("apt-cache");
        command.env("LC_ALL", "C").args(&self.options);
        command
    }

    /// Fetches its package lists.
    pub(crate) fn update(&self) -> Result<()> {
        if self.options.is_empty() {
            return update();
        }
        run(self.apt_get().args(["-q", "update"])).map(drop)
    }

    /// The names of all packages that start with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = run(self.apt_cache().args(["pkgnames", prefix]))?;
        Ok(String::from_utf8_lossy(&text).lines().map(str::to_owned).collect())
    }

    /// The versions of `package`, newest first.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = run(self.apt_cache().args(["madison", package]))?;
        let mut versions: Vec<String> = String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .collect();
        versions
            .sort_by(|a, b| if newer(a, b) { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater });
        versions.dedup();
        Ok(versions)
    }

    /// Fetches the source of `package` into `directory`, not unpacked.
    pub(crate) fn source(&self, package: &str, directory: &Path) -> Result<()> {
        let options = ["-q", "source", "--download-only", package];
        run(self.apt_get().args(options).current_dir(directory)).map(drop)
    }

    /// The names of the packages that `package` at `version` depends on; of alternatives, the first.
    pub(crate) fn depends(&self, package: &str, version: &str) -> Result<Vec<String>> {
        let text = run(self.apt_cache().args(["show", &format!("{package}={version}")]))?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or("");
        let name = |entry: &str| entry.split_whitespace().next().map(str::to_owned);
        Ok(line.split(',').filter_map(name).collect())
    }

    /// Fetches `package` at `version` into `directory` and gives the path of the file.
    pub(crate) fn download(&self, package: &str, version: &str, directory: &Path) -> Result<PathBuf> {
        let mut command = self.apt_get();
        if rustix::process::geteuid().is_root() {
            // The sandbox user cannot write into our directory; apt only warns, but at length.
            command.args(["-o", "APT::Sandbox::User=root"]);
        }
        run(command.args(["-q", "download", &format!("{package}={version}")]).current_dir(directory))?;
        let prefix = format!("{package}_");
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&prefix) && name.ends_with(".deb") {
                return Ok(path);
            }
        }
        bail!("apt-get download {package}={version} left no file in {}", directory.display())
    }
}

/// Whether version `a` is newer than or equal to `b`, by Debian's order.
pub(crate) fn newer(a: &str, b: &str) -> bool {
    run(Command::new("dpkg").args(["--compare-versions", a, "ge", b])).is_ok()
}

/// Unpacks the files of a package under `directory`, running none of its scripts.
pub(crate) fn unpack(package: &Path, directory: &Path) -> Result<()> {
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(directory)).map(drop)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_order_is_not_text_order() {
        assert!(newer("6.1.192-2", "6.1.20-1"));
        assert!(!newer("6.12.117-1~deb12u1", "6.12.117-1"));
    }

    #[test]
    fn what_is_installed_is_left_alone() {
        assert!(is_installed("dpkg"));
        assert!(!is_installed("skimmer-no-such-package"));
        ensure(&["dpkg", "libc6"]).unwrap();
    }
}
