//! `cargo xtask deny`: what `deny.toml` wants of every dependency, of the product's and of the fuzz targets'.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::{run, tools};

/// What a commit decides alone; advisories come from outside.
pub(crate) const OURS: &[&str] = &["bans", "licenses", "sources"];

/// Everything, advisories too.
pub(crate) fn run() -> Result<()> {
    check(&tools::deny()?, &["all"])
}

/// Runs these checks.
pub(crate) fn check(program: &Path, checks: &[&str]) -> Result<()> {
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let mut command = Command::new(program);
        command.current_dir(run::workspace()).args([
            "--log-level",
            "warn",
            "--locked",
            "--manifest-path",
            manifest,
        ]);
        command.arg("--config").arg(run::workspace().join("deny.toml")).arg("check").args(checks);
        run::check(&mut command)?;
    }
    Ok(())
}
