//! `cargo xtask torture`: long suites, each with a seed; what they find is written to docs/reliability.md.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use kernel_tests::torture::{self, Outcome, Resets};

use crate::run;

/// What to do.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Kills of the daemon in each mode; 0 for none.
    #[arg(long, default_value_t = 500)]
    kills: u32,
    /// Resets of a guest in each mode; 0 for none.
    #[arg(long, default_value_t = 100)]
    resets: u32,
    /// Decides when they come.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this mode: fanotify or fscache.
    #[arg(long)]
    mode: Option<String>,
    /// Write docs/reliability.md.
    #[arg(long)]
    docs: bool,
}

/// Guests' kernels, by mode.
const GUESTS: [(&str, &str); 2] = [("7.2", "fanotify"), ("6.12", "fscache")];

/// A row of the report, and whether all is well.
struct Row {
    text: String,
    result: Result<()>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    run::check(&mut run::cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    let agent = run::target_dir().join("debug/skimmer-agent");
    let (mut kills, mut resets) = (Vec::new(), Vec::new());
    for guest in GUESTS {
        if options.mode.as_deref().is_some_and(|wanted| wanted != guest.1) {
            continue;
        }
        if options.kills > 0 {
            kills.push(kill(guest, options, &agent).with_context(|| format!("kills, {}", guest.1))?);
        }
        if options.resets > 0 {
            resets.push(reset(guest, options, &agent).with_context(|| format!("resets, {}", guest.1))?);
        }
    }
    if options.docs {
        write(options, &kills, &resets)?;
    }
    kills.into_iter().chain(resets).try_for_each(|row| row.result)
}

fn kill(guest: (&str, &str), options: &Options, agent: &Path) -> Result<Row> {
    let scratch = tempfile::tempdir_in(run::target_dir())?;
    let began = Instant::now();
    let (mode, count, seed) = (guest.1, options.kills, options.seed);
    let (outcome, place) = if mode == "fanotify" {
        let release = run::output(std::process::Command::new("uname").arg("-r"))?;
        let outcome = torture::kills_on_host(scratch.path(), agent, count, seed)?;
        (outcome, format!("Linux {}", release.trim()))
    } else {
        let outcome = torture::kills_in_guest(scratch.path(), agent, guest, count, seed)?;
        (outcome, format!("Linux {}, emulated guest", guest.0))
    };
    let seconds = began.elapsed().as_secs();
    println!("kills, {mode}, {place}, {seconds} s: {outcome:?}");
    let result = outcome.check();
    let Outcome { kills, keepers, mounts, reads, misses, wrong, errors, longest_ms, .. } = outcome;
    let text = format!(
        "| {mode} | {place} | {kills} | {keepers} | {mounts} | {reads} | {misses} | {wrong} | {errors} | {longest_ms} ms | {seconds} s |\n"
    );
    Ok(Row { text, result })
}

fn reset(guest: (&str, &str), options: &Options, agent: &Path) -> Result<Row> {
    let scratch = tempfile::tempdir_in(run::target_dir())?;
    let began = Instant::now();
    let outcome = torture::resets(scratch.path(), agent, guest, options.resets, options.seed)?;
    let (kernel, mode, seconds) = (guest.0, guest.1, began.elapsed().as_secs());
    println!("resets, {mode}, {seconds} s: {outcome:?}");
    let result = outcome.check();
    let Resets { resets, ready, kept, wrong, errors } = outcome;
    let share = kept.saturating_mul(100).checked_div(ready).unwrap_or(0);
    let text = format!(
        "| {mode} | Linux {kernel}, emulated | {resets} | {wrong} | {errors} | {share} % | {seconds} s |\n"
    );
    Ok(Row { text, result })
}

fn write(options: &Options, kills: &[Row], resets: &[Row]) -> Result<()> {
    let date = run::output(std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    let Options { kills: killed, resets: cut, seed, .. } = options;
    let rows = |rows: &[Row]| rows.iter().map(|row| row.text.as_str()).collect::<String>();
    let text = format!(
        "# Reliability\n\nWritten by `cargo xtask torture --kills {killed} --resets {cut} --seed {seed} --docs` on {}.\n\n\
         ## The daemon is killed\n\n\
         Eight readers read at random and compare every byte, while `skimmerd` is killed (SIGKILL) at random instants and\n\
         started again at once; before about every fourth kill one of the keeper's two processes is killed too. Every 20 kills another image of six is mounted, and the cache's budget has those before it\n\
         evicted. The longest read includes the wait for the next daemon.\n\n\
         | mode | where | kills | keepers killed | mounts | reads | misses | wrong bytes | errors | longest read | took |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n{}\n\
         ## The power goes\n\n\
         A guest is switched off at a random instant while an image is being filled. The next boot mounts the same image and\n\
         compares all of it. Kept is what was there then, of what was ready when the daemon was last asked before.\n\n\
         | mode | where | resets | wrong blocks | errors | kept | took |\n|---|---|---|---|---|---|---|\n{}",
        date.trim(),
        rows(kills),
        rows(resets)
    );
    let path = run::workspace().join("docs/reliability.md");
    std::fs::write(&path, text).with_context(|| path.display().to_string())
}
