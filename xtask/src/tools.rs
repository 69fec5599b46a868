//! Programs of the Go and Rust registries for the tests, installed once into the user's cache directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use skimmer_test_support::tools::{ALL, CargoTool, DENY, DFDAEMON, DRAGONFLY, GoTool, SCHEDULER};
use skimmer_vm_images::apt;

use crate::run;

/// Installs what is missing. Without Go the tests that need it are skipped, and say so.
pub(crate) fn ensure() -> Result<()> {
    for tool in ALL {
        let path = tool.path().context(NO_PLACE)?;
        if !path.is_file() {
            install(&tool, &path)?;
        }
    }
    Ok(())
}

const NO_PLACE: &str = "neither XDG_CACHE_HOME nor HOME is set: no place for the tests' programs";

/// cargo-deny, built where it is missing.
pub(crate) fn deny() -> Result<PathBuf> {
    let path = DENY.path().context(NO_PLACE)?;
    if !path.is_file() {
        build(&DENY, &path)?;
    }
    Ok(path)
}

/// What dfdaemon is built with, besides Rust.
const DFDAEMON_NEEDS: &[&str] =
    &["clang", "cmake", "libclang-dev", "libprotobuf-dev", "make", "pkg-config", "protobuf-compiler"];

/// Builds Dragonfly's programs where they are missing: most of an hour on two processors.
pub(crate) fn dragonfly() -> Result<()> {
    let (scheduler, dfdaemon) = (SCHEDULER.path().context(NO_PLACE)?, DFDAEMON.path().context(NO_PLACE)?);
    if !scheduler.is_file() {
        build_scheduler(&scheduler)?;
    }
    if !dfdaemon.is_file() {
        apt::ensure(DFDAEMON_NEEDS)?;
        build(&DFDAEMON, &dfdaemon)?;
    }
    Ok(())
}

/// In its own module: the sums of what it needs are in there, and the proxy does not have all of them.
fn build_scheduler(path: &Path) -> Result<()> {
    let go = go().context("go is not installed")?;
    let version = format!("{DRAGONFLY}@{}", SCHEDULER.version);
    eprintln!("building {version} (some minutes)");
    let dir = path.parent().context("a program lies in a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let partial = tempfile::tempdir_in(dir)?;
    let told =
        run::output(Command::new(go).args(["mod", "download", "-json", &version]).current_dir(&partial))?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let source = told["Dir"].as_str().with_context(|| format!("go says of {version}: {told}"))?;
    let tree = partial.path().join("source");
    run::check(Command::new("cp").args(["-r", "--no-preserve=mode", source]).arg(&tree))?;
    let program = partial.path().join(SCHEDULER.name());
    let mut build = Command::new(go);
    build.args(["build", "-o"]).arg(&program).arg("./cmd/scheduler").current_dir(&tree);
    run::check(build.env("CGO_ENABLED", "0"))?;
    Ok(std::fs::rename(program, path)?)
}

fn build(tool: &CargoTool, path: &Path) -> Result<()> {
    eprintln!("building {} {} (it takes long)", tool.package, tool.version);
    let dir = path.parent().context("a program lies in a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let partial = tempfile::tempdir_in(dir)?;
    let mut command = run::cargo(&["install", tool.package, "--version", tool.version, "--locked"]);
    command.args(["--bin", tool.name, "--root"]).arg(partial.path());
    // It is to be right, not fast.
    command
        .env("CARGO_TARGET_DIR", partial.path().join("target"))
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    run::check(&mut command)?;
    std::fs::rename(partial.path().join("bin").join(tool.name), path)?;
    Ok(())
}

fn go() -> Option<&'static str> {
    ["go", "/usr/local/go/bin/go"].into_iter().find(|go| Command::new(go).arg("version").output().is_ok())
}

fn install(tool: &GoTool, path: &Path) -> Result<()> {
    let Some(go) = go() else {
        eprintln!("go is not installed: tests that need {} are skipped", tool.name());
        return Ok(());
    };
    eprintln!("installing {}@{}", tool.package, tool.version);
    let dir = path.parent().context("a program lies in a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Into a directory of its own first: a broken installation is not taken for a whole one.
    let partial = tempfile::tempdir_in(dir)?;
    let mut command = Command::new(go);
    command
        .args(["install", &format!("{}@{}", tool.package, tool.version)])
        .env("GOBIN", partial.path())
        .env("CGO_ENABLED", "0");
    run::check(&mut command)?;
    std::fs::rename(partial.path().join(tool.name()), path)?;
    Ok(())
}
