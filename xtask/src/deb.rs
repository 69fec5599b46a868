//! `cargo xtask deb`: the Debian package, made by Debian's own dpkg-deb.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::run;

/// Where a unit belongs since Debian 12.
const UNITS: &str = "usr/lib/systemd/system";

/// How to make it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the package is put [default: target/debian].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Debian revision, behind the version.
    #[arg(long, default_value = "1")]
    revision: String,
    /// Pack the programs of this directory instead of building them.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let programs = match &options.programs {
        Some(programs) => programs.clone(),
        None => {
            let packages =
                ["--package", "skimmer-cli", "--package", "skimmer-daemon", "--package", "skimmer-keeper"];
            run::check(run::cargo(&["build", "--quiet", "--release", "--bins"]).args(packages))?;
            run::target_dir().join("release")
        }
    };
    let out = options.out.clone().unwrap_or_else(|| run::target_dir().join("debian"));
    fs::create_dir_all(&out)?;
    let stage = tempfile::tempdir_in(&out)?;
    let package = pack(stage.path(), &programs, &out, &options.revision)?;
    println!("{}", package.display());
    Ok(())
}

fn pack(stage: &Path, programs: &Path, out: &Path, revision: &str) -> Result<PathBuf> {
    let source = run::workspace();
    // The stage itself becomes `/`.
    fs::set_permissions(stage, fs::Permissions::from_mode(0o755))?;
    let put = |to: &str, mode: u32, bytes: &[u8]| -> Result<()> {
        let path = stage.join(to);
        fs::create_dir_all(path.parent().context("a file lies in a directory")?)?;
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    };
    for (name, to) in [("skimmer", "usr/bin"), ("skimmerd", "usr/sbin"), ("skimmer-keeper", "usr/sbin")] {
        let to = format!("{to}/{name}");
        put(&to, 0o755, &fs::read(programs.join(name))?)?;
        // Names of functions are kept, for traces; the rest of what a debugger wants is large.
        run::check(Command::new("strip").args(["--strip-debug"]).arg(stage.join(&to)))?;
    }
    for entry in fs::read_dir(source.join("packaging/systemd"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a unit has a name")?;
        put(&format!("{UNITS}/{name}"), 0o644, &fs::read(&path)?)?;
    }
    put("etc/skimmer/config.toml", 0o644, &fs::read(source.join("config/src/default.toml"))?)?;
    put("usr/share/doc/skimmer/copyright", 0o644, &fs::read(source.join("LICENSE"))?)?;
    let skimmer = programs.join("skimmer");
    let generated = tempfile::tempdir()?;
    run::check(Command::new(&skimmer).arg("generate").arg(generated.path()))?;
    for (from, to) in [
        ("man", "usr/share/man"),
        ("bash", "usr/share/bash-completion/completions"),
        ("zsh", "usr/share/zsh/vendor-completions"),
        ("fish", "usr/share/fish/vendor_completions.d"),
    ] {
        for entry in fs::read_dir(generated.path().join(from))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a file has a name")?;
            let section = path.extension().and_then(|section| section.to_str()).unwrap_or_default();
            let to = if from == "man" { format!("{to}/man{section}/{name}") } else { format!("{to}/{name}") };
            put(&to, 0o644, &fs::read(&path)?)?;
        }
    }
    for entry in fs::read_dir(source.join("packaging/man"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).context("a page has a name")?;
        put(&format!("usr/share/man/man8/{name}"), 0o644, &fs::read(&path)?)?;
    }
    let architecture = run::output(Command::new("dpkg").arg("--print-architecture"))?;
    let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
    let kib = size(stage)? / 1024;
    let control = format!(
        "Package: skimmer\nVersion: {version}\nArchitecture: {}\nMaintainer: The Skimmer developers <skimmer@localhost>\n\
         Installed-Size: {kib}\nDepends: libc6 (>= 2.36)\nRecommends: containerd | docker.io\nSection: admin\n\
         Priority: optional\nDescription: container images on demand\n \
         Mounts container images at once and fetches only what is read: a kernel-native\n \
         image loader with a daemon, a containerd snapshotter and an image converter.\n",
        architecture.trim()
    );
    put("DEBIAN/control", 0o644, control.as_bytes())?;
    put("DEBIAN/conffiles", 0o644, b"/etc/skimmer/config.toml\n")?;
    for script in ["postinst", "prerm", "postrm"] {
        put(&format!("DEBIAN/{script}"), 0o755, &fs::read(source.join("packaging/deb").join(script))?)?;
    }
    let package = out.join(format!("skimmer_{version}_{}.deb", architecture.trim()));
    run::check(
        Command::new("dpkg-deb").args(["--root-owner-group", "-Zzstd", "--build"]).arg(stage).arg(&package),
    )?;
    ensure!(package.is_file(), "dpkg-deb made no {}", package.display());
    Ok(package)
}

fn size(dir: &Path) -> Result<u64> {
    let mut all = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        all += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;

    #[test]
    fn the_package_has_what_a_node_needs_and_its_units_are_sound() {
        let out = tempfile::tempdir().unwrap();
        let stage = tempfile::tempdir().unwrap();
        let programs = run::target_dir().join("debug");
        let package = pack(stage.path(), &programs, out.path(), "1").unwrap();
        let listed = run::output(Command::new("dpkg-deb").arg("--contents").arg(&package)).unwrap();
        for path in [
            "./usr/bin/skimmer",
            "./usr/sbin/skimmerd",
            "./usr/sbin/skimmer-keeper",
            "./etc/skimmer/config.toml",
            "./usr/lib/systemd/system/skimmerd.service",
            "./usr/share/man/man1/skimmer-convert.1",
            "./usr/share/man/man8/skimmerd.8",
            "./usr/share/bash-completion/completions/skimmer",
        ] {
            assert!(listed.lines().any(|line| line.ends_with(path)), "{path} is missing:\n{listed}");
        }
        assert!(listed.lines().all(|line| line.contains("root/root")), "{listed}");
        // What systemd thinks of the units, with the programs where they will be.
        let root = out.path().join("root");
        run::check(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&root)).unwrap();
        for unit in ["skimmer-keeper.service", "skimmerd.socket", "skimmerd.service"] {
            let unit = root.join(UNITS).join(unit);
            let text = fs::read_to_string(&unit).unwrap();
            let there = text.replace("=/usr/sbin/", &format!("={}/usr/sbin/", root.display()));
            fs::write(&unit, there).unwrap();
        }
        let mut verify = Command::new("systemd-analyze");
        verify
            .arg("verify")
            .arg("--man=no")
            .env("SYSTEMD_UNIT_PATH", format!("{}:", root.join(UNITS).display()));
        let said = verify.arg(root.join(UNITS).join("skimmerd.service")).output().unwrap();
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        let ours: Vec<_> = said.lines().filter(|line| line.contains("skimmer")).collect();
        assert!(ours.is_empty(), "{ours:#?}");
    }
}
