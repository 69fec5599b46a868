//! What a person sees: errors with their remedy, progress bars, sizes; and JSON for programs.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use skimmer_client::ClientError;

use crate::Global;

/// Prints an error with all its causes, and what to do about it where that is known.
pub(crate) fn report(error: &anyhow::Error) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Many errors repeat their cause in their own words.
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    eprintln!("error: {text}");
    let remedy = error.chain().find_map(|cause| cause.downcast_ref::<ClientError>()?.remedy());
    if let Some(remedy) = remedy {
        eprintln!("remedy: {remedy}");
    }
}

/// Whether the reader of our output went away.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Prints `value` as one JSON document.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write the result as JSON")?;
    line(&text)
}

/// Prints one line; a reader that went away (`| head`) is an error to stop at, not a panic.
pub(crate) fn line(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to standard output")
}

/// A bar on a terminal; invisible in a pipe, with `--quiet` and with `--json`.
pub(crate) fn progress(global: &Global, what: &str) -> ProgressBar {
    if global.quiet || global.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::no_length();
    bar.set_style(style("{spinner} {msg} {bytes} ({bytes_per_sec})"));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Moves the end of `bar` by `bytes`, as more work becomes known.
pub(crate) fn add_total(bar: &ProgressBar, bytes: u64) {
    if bar.length().is_none() {
        bar.set_style(style("{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} ({bytes_per_sec}, {eta})"));
    }
    bar.set_length(bar.length().unwrap_or(0).saturating_add(bytes));
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// A size as people write it.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
