//! `skimmer generate`: manual pages and shell completions, for packages.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where `man`, `bash`, `zsh` and `fish` are made.
    directory: PathBuf,
}

pub(crate) fn run(options: &Options, mut program: Command) -> Result<()> {
    let place = |name: &str| -> Result<PathBuf> {
        let path = options.directory.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let file = clap_complete::generate_to(shell, &mut program, "skimmer", place(name)?)?;
        if shell == Shell::Bash {
            // bash looks for a file of the program's name.
            fs::rename(&file, file.with_file_name("skimmer"))?;
        }
    }
    clap_mangen::generate_to(program, place("man")?).context("cannot write the manual pages")
}
