//! `cargo xtask docs`: the parts of `docs/` that the programs themselves know best.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use skimmer_bench::report;

use crate::{fuzz, run, torture};

/// Whether to write or to compare.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fail when a file in docs/ is not what the programs say, instead of writing it.
    #[arg(long)]
    pub(crate) check: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    run::check(&mut run::cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    let mut stale = Vec::new();
    let mut documents = vec![("cli.md", cli()?), ("configuration.md", configuration()?)];
    documents.push(("performance.md", performance()?));
    documents.push(("fuzzing.md", fuzzing()?));
    documents.push(("reliability.md", torture::document()?));
    let skimmerd = run::target_dir().join("debug/skimmerd");
    documents.push(("openapi.json", run::output(Command::new(skimmerd).arg("--openapi"))?));
    for (name, text) in documents {
        let path = run::workspace().join("docs").join(name);
        if options.check {
            if fs::read_to_string(&path).unwrap_or_default() != text {
                stale.push(name);
            }
        } else {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    if !stale.is_empty() {
        bail!("docs/{} is out of date; run: cargo xtask docs", stale.join(", docs/"));
    }
    Ok(())
}

/// The last run of each scenario.
pub(crate) fn results() -> PathBuf {
    run::workspace().join("docs/performance")
}

fn performance() -> Result<String> {
    let files = fs::read_dir(results()).with_context(|| format!("{}", results().display()))?;
    let mut files: Vec<PathBuf> = files.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    let pages: Result<Vec<_>> = files.iter().map(|path| Ok(report::page(&report::read(path)?))).collect();
    Ok(report::performance(&pages?))
}

fn fuzzing() -> Result<String> {
    let recorded = fuzz::recorded()?;
    let (mut rows, mut all) = (String::new(), fuzz::Ran::default());
    for name in fuzz::targets()? {
        let ran = recorded.get(&name).copied().unwrap_or_default();
        let fuzz::Ran { seconds, cpu_seconds, inputs, edges, found } = ran;
        let (minutes, busy) = (seconds / 60, cpu_seconds / 60);
        rows.push_str(&format!("| `{name}` | {minutes} | {busy} | {inputs} | {edges} | {found} |\n"));
        all.seconds += seconds;
        all.cpu_seconds += cpu_seconds;
        all.found += found;
    }
    Ok(format!(
        "# Fuzzing\n\nWritten by `cargo xtask docs` from what `cargo xtask fuzz --record` ran so far: {} by the clock, beside \
         other work; {} of a processor's time, which the first runs did not count. {} inputs broke a promise. \
         [fuzz/](../fuzz/README.md) says what each target reads.\n\n\
         | target | minutes | processor minutes | inputs | edges reached | found |\n|---|---|---|---|---|---|\n{rows}",
        hours(all.seconds),
        hours(all.cpu_seconds),
        all.found,
    ))
}

fn hours(seconds: u64) -> String {
    format!("{} hours {} minutes", seconds / 3600, seconds / 60 % 60)
}

fn help(program: &Path, args: &[&str]) -> Result<String> {
    // The width of the terminal must not be in the document.
    let mut command = run::command(program.to_str().context("the target folder is not UTF-8")?, args);
    let text = run::output(command.env("COLUMNS", "100"))?;
    Ok(text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim().to_owned())
}

fn cli() -> Result<String> {
    let bin = |name: &str| run::target_dir().join("debug").join(name);
    let main = help(&bin("skimmer"), &["--help"])?;
    let mut text =
        format!("# Command line\n\nWritten by `cargo xtask docs`.\n\n## skimmer\n\n```\n{main}\n```\n");
    let commands = main.lines().skip_while(|line| *line != "Commands:").skip(1);
    for line in commands.take_while(|line| !line.is_empty()) {
        let Some(name) = line.strip_prefix("  ").and_then(|line| line.split(' ').next()) else { continue };
        if name.is_empty() || name == "help" {
            continue;
        }
        let help = help(&bin("skimmer"), &[name, "--help"])?;
        text.push_str(&format!("\n## skimmer {name}\n\n```\n{help}\n```\n"));
    }
    for program in ["skimmerd", "skimmer-keeper"] {
        text.push_str(&format!("\n## {program}\n\n```\n{}\n```\n", help(&bin(program), &["--help"])?));
    }
    Ok(text)
}

fn configuration() -> Result<String> {
    let defaults = help(&run::target_dir().join("debug/skimmer"), &["config", "default"])?;
    Ok(format!(
        "# Configuration\n\nWritten by `cargo xtask docs`: what `skimmer config default` prints. Every option has this \
         default; an unknown one is an error.\n\n```toml\n{defaults}\n```\n"
    ))
}
