//! `skimmer config`: the daemon's configuration, printed and checked.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use skimmer_config::{Config, DEFAULT_PATH, DEFAULT_TEXT, Remark};

use crate::{Global, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Print the default configuration: every option, and what it means.
    Default,
    /// Check a configuration file, and the files that it names; exit code 1 when the daemon could not use it.
    Check {
        /// The file [default: /etc/skimmer/config.toml when it exists].
        file: Option<PathBuf>,
    },
}

/// What a check found.
#[derive(Serialize)]
struct Checked<'c> {
    /// The file; none when there is none and the defaults hold.
    file: Option<&'c Path>,
    /// Why the daemon cannot use it.
    problems: Vec<Remark>,
    /// What is set in vain.
    notes: Vec<Remark>,
}

pub(crate) fn run(options: &Options, global: &Global) -> Result<()> {
    match &options.action {
        Action::Default => output::line(DEFAULT_TEXT.trim_end()),
        Action::Check { file } => check(file.as_deref(), global),
    }
}

fn check(file: Option<&Path>, global: &Global) -> Result<()> {
    let config = Config::load(file)?;
    let default = Path::new(DEFAULT_PATH);
    let file = file.or_else(|| default.exists().then_some(default));
    let checked = Checked { file, problems: config.missing(), notes: config.idle() };
    if global.json {
        output::json(&checked)?;
    } else {
        let name =
            file.map_or_else(|| "the default configuration".to_owned(), |file| file.display().to_string());
        for (kind, remarks) in [("problem", &checked.problems), ("note", &checked.notes)] {
            for Remark { key, problem } in remarks {
                output::line(&format!("{kind}: {name}: `{key}` {problem}"))?;
            }
        }
        if checked.problems.is_empty() && !global.quiet {
            output::line(&format!("{name} can be used"))?;
        }
    }
    match checked.problems.len() {
        0 => Ok(()),
        count => bail!("{count} of the options name what cannot be used"),
    }
}
