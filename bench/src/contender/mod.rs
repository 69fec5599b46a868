//! Contenders: ways to make one and the same tree readable on a machine.

mod plain;
mod skimmer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kernel_tests::machine::Machine;
use kernel_tests::skimmer::Node;
use serde::de::DeserializeOwned;

use crate::data::UNREAD;
use crate::probe::Sum;
use crate::scenario::Custom;

/// For commands that do a trifle, under emulation on a busy host.
pub const SHORT: Duration = Duration::from_secs(120);
/// For commands that read everything.
pub const LONG: Duration = Duration::from_secs(1800);
/// The file system that ratios refer to.
pub const NATIVE: &str = "ext4";

/// Where things lie on the machine of a scenario.
pub struct Stage<'a> {
    /// The machine.
    pub machine: &'a Machine,
    /// Our programs.
    pub programs: String,
    /// A folder on the machine's native file system, for mount points, caches and sockets.
    pub work: String,
    /// The tree on native ext4.
    pub tree: String,
    /// The tree as one EROFS file.
    pub flat: String,
    /// The tree as a converted image: an OCI layout.
    pub layout: String,
    /// libfuse's passthrough example.
    pub fuse: String,
    /// Root of the programs that workloads use; `/` on the host.
    pub tools: String,
}

/// A contender whose tree can be read.
pub struct Mounted<'a> {
    /// Its name in tables.
    pub name: String,
    /// Where the tree is.
    pub path: String,
    node: Option<Node<'a>>,
    _undo: Vec<Undo<'a>>,
}

/// What mounting came to.
pub enum Outcome<'a> {
    /// It can be read.
    Mounted(Mounted<'a>),
    /// This machine has no such thing: the reason.
    Skipped(String),
}

/// A shell line that takes something away again.
struct Undo<'a> {
    machine: &'a Machine,
    line: String,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        match self.machine.run(&["sh", "-c", &self.line], SHORT) {
            Ok(output) if output.success() => {}
            Ok(output) => eprintln!("left behind: {}: {}", self.line, output.describe()),
            Err(error) => eprintln!("left behind: {}: {error:#}", self.line),
        }
    }
}

impl<'a> Stage<'a> {
    /// Makes the tree readable through the contender `name`.
    ///
    /// # Errors
    /// It should work here and does not, or there is no such contender.
    pub fn mount(&self, name: &str) -> Result<Outcome<'a>> {
        match name {
            NATIVE => Ok(self.mounted(name, self.tree.clone(), None, Vec::new())),
            "erofs-loop" => self.erofs_loop(name),
            "erofs-file" => self.erofs_file(name),
            "fuse" => self.fuse(name),
            "skimmer-fscache" | "skimmer-fanotify" | "skimmer-fanotify-marked" | "skimmer-local" => {
                self.skimmer(name)
            }
            _ => bail!(
                "no contender {name}; there are ext4, erofs-loop, erofs-file, fuse, skimmer-fscache, \
                 skimmer-fanotify, skimmer-fanotify-marked and skimmer-local, and those that a scenario describes \
                 in [[custom]]"
            ),
        }
    }

    /// Makes the tree readable through a contender by command lines.
    ///
    /// # Errors
    /// Its command lines fail.
    pub fn mount_custom(&self, custom: &Custom) -> Result<Outcome<'a>> {
        for program in &custom.programs {
            if !self.machine.run(&["sh", "-c", &format!("command -v {program}")], SHORT)?.success() {
                return Ok(Outcome::Skipped(format!("{program} is not installed")));
            }
        }
        let point = self.mount_point(&custom.name)?;
        let work = format!("{}/{}.work", self.work, custom.name);
        self.machine.check(&["mkdir", "-p", &work], SHORT)?;
        let variables = format!(
            "set -e; MOUNT='{point}' TREE='{}' FLAT='{}' IMAGE='{}' WORK='{work}'; export MOUNT TREE FLAT IMAGE WORK; cd '{work}'\n",
            self.tree, self.flat, self.layout
        );
        let mut undo = Vec::new();
        for (forward, back) in [(&custom.prepare, &custom.clean), (&custom.mount, &custom.unmount)] {
            if !back.is_empty() {
                // Taken back even when only half of it was done; undone in reverse order.
                undo.insert(0, Undo { machine: self.machine, line: format!("{variables}{back}") });
            }
            if !forward.is_empty() {
                self.machine.check(&["sh", "-c", &format!("{variables}{forward}")], LONG)?;
            }
        }
        Ok(self.mounted(&custom.name, point, None, undo))
    }

    /// Runs `skimmer-probe` and reads its answer.
    ///
    /// # Errors
    /// It fails.
    pub fn probe<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let program = format!("{}/skimmer-probe", self.programs);
        let argv: Vec<&str> = std::iter::once(program.as_str()).chain(arguments.iter().copied()).collect();
        let answer = self.machine.check(&argv, LONG)?;
        serde_json::from_slice(&answer).with_context(|| format!("skimmer-probe {}", arguments.join(" ")))
    }

    /// What a contender shows: everything but what workloads never read and what a file system brings itself.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn sum(&self, contender: &Mounted<'_>) -> Result<Sum> {
        self.probe(&["sum", &contender.path, "--without", UNREAD, "--without", "lost+found"])
    }

    /// Forgets what the kernel keeps in memory of files.
    ///
    /// # Errors
    /// Not allowed.
    pub fn drop_caches(&self) -> Result<()> {
        self.probe::<()>(&["drop-caches"])
    }

    /// Runs a shell line among the workloads' programs; `path` in it must be given as [`Stage::inside`] says.
    ///
    /// # Errors
    /// It fails.
    pub fn tool(&self, line: &str) -> Result<Vec<u8>> {
        match self.tools.as_str() {
            "/" => self.machine.check(&["sh", "-c", line], LONG),
            root => {
                let line = format!("PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH; {line}");
                self.machine.check(&["chroot", root, "/bin/sh", "-c", &line], LONG)
            }
        }
    }

    /// A path of the machine as the workloads' programs see it.
    ///
    /// # Errors
    /// They cannot see it.
    pub fn inside(&self, path: &str) -> Result<String> {
        if self.tools == "/" {
            return Ok(path.to_owned());
        }
        let rest = path.strip_prefix(&self.tools);
        rest.map(str::to_owned).with_context(|| format!("{path} is not below {}", self.tools))
    }

    fn mount_point(&self, name: &str) -> Result<String> {
        let point = format!("{}/mnt/{name}", self.work);
        self.machine.check(&["mkdir", "-p", &point], SHORT)?;
        Ok(point)
    }

    fn mounted(&self, name: &str, path: String, node: Option<Node<'a>>, undo: Vec<Undo<'a>>) -> Outcome<'a> {
        Outcome::Mounted(Mounted { name: name.to_owned(), path, node, _undo: undo })
    }
}

/// Path as text for a command line.
///
/// # Errors
/// It is not UTF-8.
pub fn text(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// Our programs that go into guests.
pub fn guest_programs(programs: &Path) -> Vec<PathBuf> {
    ["skimmer", "skimmerd", "skimmer-keeper", "skimmer-probe"].map(|name| programs.join(name)).to_vec()
}
