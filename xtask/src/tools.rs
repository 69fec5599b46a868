//! Programs of the Go registry for the tests, installed once into the user's cache directory.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use skimmer_test_support::tools::{ALL, GoTool};

use crate::run;

/// Installs what is missing. Without Go the tests that need it are skipped, and say so.
pub(crate) fn ensure() -> Result<()> {
    for tool in ALL {
        let path = tool
            .path()
            .context("neither XDG_CACHE_HOME nor HOME is set: no place for the tests' programs")?;
        if !path.is_file() {
            install(&tool, &path)?;
        }
    }
    Ok(())
}

fn install(tool: &GoTool, path: &Path) -> Result<()> {
    let Some(go) = ["go", "/usr/local/go/bin/go"]
        .into_iter()
        .find(|go| Command::new(go).arg("version").output().is_ok())
    else {
        eprintln!("go is not installed: tests that need {} are skipped", tool.name());
        return Ok(());
    };
    eprintln!("installing {}@{}", tool.package, tool.version);
    let dir = path.parent().context("a program lies in a directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Into a directory of its own first: a broken installation is not taken for a whole one.
    let partial = tempfile::tempdir_in(dir)?;
    let mut command = Command::new(go);
    command.args(["install", &format!("{}@{}", tool.package, tool.version)]).env("GOBIN", partial.path());
    run::check(&mut command)?;
    std::fs::rename(partial.path().join(tool.name()), path)?;
    Ok(())
}
