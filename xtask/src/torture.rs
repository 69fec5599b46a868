//! `cargo xtask torture`: long suites, each with a seed; what they find is written to docs/reliability.md.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use kernel_tests::torture::{self, Outcome};

use crate::run;

/// What to do.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Kills in each mode.
    #[arg(long, default_value_t = 500)]
    kills: u32,
    /// Decides when they come.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this mode: fanotify (on this machine) or fscache (in a guest).
    #[arg(long)]
    mode: Option<String>,
    /// Guest's kernel, for fscache.
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Write docs/reliability.md.
    #[arg(long)]
    docs: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    run::check(&mut run::cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    let agent = run::target_dir().join("debug/skimmer-agent");
    let mut rows = Vec::new();
    for mode in ["fanotify", "fscache"] {
        if options.mode.as_deref().is_some_and(|wanted| wanted != mode) {
            continue;
        }
        let scratch = tempfile::tempdir_in(run::target_dir())?;
        let began = Instant::now();
        let (outcome, place) = one(mode, options, scratch.path(), &agent).with_context(|| mode.to_owned())?;
        let seconds = began.elapsed().as_secs();
        println!("{mode}, {place}, {seconds} s: {outcome:?}");
        rows.push((mode, place, seconds, outcome));
    }
    if options.docs {
        write(options, &rows)?;
    }
    rows.iter().try_for_each(|(.., outcome)| outcome.check())
}

fn one(mode: &str, options: &Options, scratch: &Path, agent: &Path) -> Result<(Outcome, String)> {
    if mode == "fanotify" {
        let release = run::output(std::process::Command::new("uname").arg("-r"))?;
        let outcome = torture::kills_on_host(scratch, agent, options.kills, options.seed)?;
        return Ok((outcome, format!("Linux {}", release.trim())));
    }
    let guest = (options.kernel.as_str(), mode);
    let outcome = torture::kills_in_guest(scratch, agent, guest, options.kills, options.seed)?;
    Ok((outcome, format!("Linux {}, emulated guest", options.kernel)))
}

fn write(options: &Options, rows: &[(&str, String, u64, Outcome)]) -> Result<()> {
    let date = run::output(std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    let mut text = format!(
        "# Reliability\n\nWritten by `cargo xtask torture --kills {} --seed {} --docs` on {}.\n\n## The daemon is killed\n\n\
         Eight readers read at random and compare every byte, while `skimmerd` is killed (SIGKILL) at random instants and\n\
         started again at once; every 20 kills another image of six is mounted, and the cache's budget has those before it\n\
         evicted. The longest read includes the wait for the next daemon.\n\n\
         | mode | where | kills | mounts | reads | misses | wrong bytes | errors | longest read | took |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        options.kills,
        options.seed,
        date.trim()
    );
    for (mode, place, seconds, outcome) in rows {
        let Outcome { kills, mounts, reads, misses, wrong, errors, longest_ms, .. } = outcome;
        text.push_str(&format!(
            "| {mode} | {place} | {kills} | {mounts} | {reads} | {misses} | {wrong} | {errors} | {longest_ms} ms | {seconds} s |\n"
        ));
    }
    let path = run::workspace().join("docs/reliability.md");
    std::fs::write(&path, text).with_context(|| path.display().to_string())
}
