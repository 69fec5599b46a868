//! The guest root: an initramfs with busybox, our programs with their shared libraries, and the kernel's modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Entry, Key};
use crate::kernel::Kernel;
use crate::process::run;
use crate::protocol;

/// Part of every key: raise it when the same parts must give another root.
const BUILDER: &str = "1";
/// How many guest roots stay in the cache.
const KEPT: usize = 8;

/// What goes into a guest besides the kernel's modules and busybox.
#[derive(Debug, Clone)]
pub struct GuestRoot {
    /// Path in the guest (relative to its root) to path on the host.
    programs: BTreeMap<String, PathBuf>,
    files: BTreeMap<String, Vec<u8>>,
}

impl GuestRoot {
    /// A root whose first process is `agent` (a program of the host), which must understand the argument `init`.
    #[must_use]
    pub fn new(agent: &Path) -> Self {
        let mut root = GuestRoot { programs: BTreeMap::new(), files: BTreeMap::new() };
        root.programs.insert("bin/skimmer-agent".to_owned(), agent.to_owned());
        let files: [(&str, &[u8]); 4] = [
            ("init", b"#!/bin/busybox sh\nexec /bin/skimmer-agent init\n"),
            ("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
            ("etc/group", b"root:x:0:\n"),
            ("etc/hosts", b"127.0.0.1 localhost\n"),
        ];
        root.files.extend(files.map(|(path, content)| (path.to_owned(), content.to_vec())));
        root
    }

    /// Adds a program of the host as `/bin/<its file name>`, with the shared libraries that `ldd` names.
    ///
    /// # Errors
    /// The path has no file name that is text.
    pub fn program(&mut self, path: &Path) -> Result<&mut Self> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} names no program", path.display()))?;
        self.programs.insert(format!("bin/{name}"), path.to_owned());
        Ok(self)
    }

    /// Adds a file with this content at `path` (absolute, in the guest).
    pub fn file(&mut self, path: &str, content: impl Into<Vec<u8>>) -> &mut Self {
        self.files.insert(path.trim_start_matches('/').to_owned(), content.into());
        self
    }

    /// Packs the initramfs for `kernel`, or finds it in the cache.
    ///
    /// # Errors
    /// A program is missing or not a Linux executable, or a helper (`ldd`, `strip`, `cpio`) fails.
    pub fn build(&self, kernel: &Kernel) -> Result<PathBuf> {
        let mut key = Key::new("guest root");
        key.add(BUILDER.as_bytes());
        key.add(kernel.key.as_bytes());
        for (path, content) in &self.files {
            key.add(path.as_bytes());
            key.add(content);
        }
        for (path, program) in &self.programs {
            key.add(path.as_bytes());
            key.add(
                &fs::read(program)
                    .with_context(|| format!("cannot read the program {}", program.display()))?,
            );
        }
        let directory = Entry::new("roots", &key.finish())?.get_or_make(|aside| self.make(kernel, aside))?;
        // The time of last use decides what `prune` keeps.
        File::open(&directory)?.set_modified(std::time::SystemTime::now())?;
        cache::prune("roots", KEPT)?;
        Ok(directory.join("initramfs"))
    }

    fn make(&self, kernel: &Kernel, aside: &Path) -> Result<()> {
        let tree = aside.join("tree");
        for directory in ["bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var"] {
            fs::create_dir_all(tree.join(directory))?;
        }
        symlink("bin", tree.join("sbin"))?;
        install(&kernel.busybox, &tree.join("bin/busybox"), 0o755)?;
        let applets = run(Command::new(&kernel.busybox).arg("--list"))?;
        for applet in String::from_utf8(applets)?.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", tree.join("bin").join(applet))?;
        }
        for module in &kernel.modules {
            let name = module.file_name().context("a module has a file name")?;
            install(module, &tree.join(protocol::MODULES.trim_start_matches('/')).join(name), 0o644)?;
        }
        let mut libraries = BTreeSet::new();
        for (path, program) in &self.programs {
            libraries.extend(libraries_of(program)?);
            let target = tree.join(path);
            // An applet of the same name gives way.
            let _ = fs::remove_file(&target);
            run(Command::new("strip").arg("-o").arg(&target).arg(program))?;
        }
        for library in libraries {
            let target = tree.join(library.strip_prefix("/").context("ldd gives absolute paths")?);
            install(&fs::canonicalize(&library)?, &target, 0o755)?;
        }
        for (path, content) in &self.files {
            let target = tree.join(path);
            fs::create_dir_all(target.parent().context("a file has a parent")?)?;
            fs::write(&target, content)?;
            let mode = if content.starts_with(b"#!") { 0o755 } else { 0o644 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
        pack(&tree, &aside.join("initramfs"))?;
        fs::remove_dir_all(&tree)?;
        Ok(())
    }
}

/// Packs `tree` in the kernel's format. Not compressed: under emulation copying is far quicker than unpacking.
fn pack(tree: &Path, into: &Path) -> Result<()> {
    let names = run(Command::new("find").args([".", "-mindepth", "1", "-print0"]).current_dir(tree))?;
    let mut child = Command::new("cpio")
        .args(["--quiet", "--null", "--create", "--format=newc", "--owner=+0:+0"])
        .current_dir(tree)
        .stdin(Stdio::piped())
        .stdout(File::create(into)?)
        .spawn()
        .context("cannot start cpio (Debian package cpio)")?;
    std::io::Write::write_all(&mut child.stdin.take().context("piped above")?, &names)?;
    let status = child.wait()?;
    if !status.success() {
        bail!("cpio ended with {status}");
    }
    Ok(())
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file has a parent")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} into the guest root", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// The shared libraries and the loader that `program` needs, as `ldd` names them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    // What ldd says of a static program, on either stream.
    if ["statically linked", "not a dynamic executable"]
        .iter()
        .any(|s| text.contains(s) || complaint.contains(s))
    {
        return Ok(Vec::new());
    }
    if !output.status.success() {
        bail!("ldd {} failed: {complaint}", program.display());
    }
    parse_ldd(&text).with_context(|| format!("ldd {}", program.display()))
}

fn parse_ldd(text: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.ends_with("not found") {
            bail!("a shared library is missing: {line}");
        }
        let target = line.split_once(" => ").map_or(line, |(_, target)| target);
        if let Some(path) = target.split_whitespace().next().filter(|path| path.starts_with('/')) {
            paths.push(PathBuf::from(path));
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_of_every_kind() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(text).unwrap(), expected);
        assert!(parse_ldd("\tlibzstd.so.1 => not found\n").is_err());
    }

    #[test]
    fn our_own_libraries_are_found() {
        let found = libraries_of(&std::env::current_exe().unwrap()).unwrap();
        assert!(found.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{found:?}");
    }
}
