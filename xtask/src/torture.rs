//! `cargo xtask torture`: long suites, each with a seed. What they find is kept in a record, of which
//! `docs/reliability.md` is made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use kernel_tests::torture::{self, Case, Kept, Outcome, Resets, Sizes};
use serde::{Deserialize, Serialize};

use crate::run;

/// What to do.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only this suite (repeatable); all when absent.
    #[arg(long)]
    suite: Vec<Suite>,
    /// Kills of the daemon in each mode.
    #[arg(long, default_value_t = 500)]
    kills: u32,
    /// Resets of a guest in each mode.
    #[arg(long, default_value_t = 100)]
    resets: u32,
    /// Decides when they come.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this mode: fanotify or fscache.
    #[arg(long)]
    mode: Option<String>,
    /// Keep what is found; `cargo xtask docs` writes docs/reliability.md of it.
    #[arg(long)]
    record: bool,
}

/// A way to make things hard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Suite {
    /// The daemon, and processes of the keeper, are killed.
    Kills,
    /// A guest is switched off.
    Resets,
    /// Network and disk fail in every way.
    Faults,
    /// More images are read than the cache may hold.
    Budget,
}

/// Guests' kernels, by mode.
const GUESTS: [(&str, &str); 2] = [("7.2", "fanotify"), ("6.12", "fscache")];
/// 10 GiB in all, of which 1 GiB may stay.
const LARGE: Sizes = Sizes { budget_mib: 1024, images: 40, image_mib: 256 };

/// What a suite found in a mode.
#[derive(Serialize, Deserialize)]
struct Entry {
    date: String,
    command: String,
    place: String,
    seconds: u64,
    /// Cells of a table's rows.
    rows: Vec<Vec<String>>,
}

/// By suite and mode.
type Record = BTreeMap<Suite, BTreeMap<String, Entry>>;

pub(crate) fn run(options: &Options) -> Result<()> {
    run::check(&mut run::cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
    let agent = run::target_dir().join("debug/skimmer-agent");
    let mut failures = Vec::new();
    for suite in [Suite::Kills, Suite::Resets, Suite::Faults, Suite::Budget] {
        if !options.suite.is_empty() && !options.suite.contains(&suite) {
            continue;
        }
        for guest in GUESTS {
            if options.mode.as_deref().is_some_and(|wanted| wanted != guest.1) {
                continue;
            }
            let scratch = tempfile::tempdir_in(run::target_dir())?;
            let began = Instant::now();
            let (place, rows, result) = one(suite, guest, options, scratch.path(), &agent)
                .with_context(|| format!("{}, {}", suite.name(), guest.1))?;
            let (seconds, place) = (began.elapsed().as_secs(), place);
            for row in &rows {
                println!("{}, {}, {place}: {}", suite.name(), guest.1, row.join(" | "));
            }
            if options.record {
                let command = suite.command(options);
                let entry = Entry { date: today()?, command, place, seconds, rows };
                let mut record = recorded()?;
                record.entry(suite).or_default().insert(guest.1.to_owned(), entry);
                let text = serde_json::to_string_pretty(&record)? + "\n";
                std::fs::write(record_file(), text).with_context(|| record_file().display().to_string())?;
            }
            failures.extend(result.err().map(|error| format!("{}, {}: {error:#}", suite.name(), guest.1)));
        }
    }
    anyhow::ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

type Found = (String, Vec<Vec<String>>, Result<()>);

fn one(suite: Suite, guest: (&str, &str), options: &Options, scratch: &Path, agent: &Path) -> Result<Found> {
    let on_host = guest.1 == "fanotify" && matches!(suite, Suite::Kills | Suite::Budget);
    let place = if on_host {
        let release = run::output(std::process::Command::new("uname").arg("-r"))?;
        format!("Linux {}", release.trim())
    } else {
        format!("Linux {}, emulated guest", guest.0)
    };
    let (rows, result) = match suite {
        Suite::Kills => {
            let (kills, seed) = (options.kills, options.seed);
            let outcome = match on_host {
                true => torture::kills_on_host(scratch, agent, kills, seed)?,
                false => torture::kills_in_guest(scratch, agent, guest, kills, seed)?,
            };
            let result = outcome.check();
            let Outcome { kills, keepers, mounts, reads, misses, wrong, errors, .. } = outcome;
            if let Some(first) = outcome.first {
                println!("the first thing that was wrong: {first}");
            }
            let counts = [u64::from(kills), keepers.into(), mounts.into(), reads, misses, wrong, errors];
            let mut row: Vec<String> = counts.iter().map(ToString::to_string).collect();
            row.extend([outcome.longest_ms, outcome.after_kill_ms].map(|time| format!("{time} ms")));
            (vec![row], result)
        }
        Suite::Resets => {
            let outcome = torture::resets(scratch, agent, guest, options.resets, options.seed)?;
            let result = outcome.check();
            let Resets { resets, ready, kept, wrong, errors } = outcome;
            let share = kept.saturating_mul(100).checked_div(ready).unwrap_or(0);
            let row = [u64::from(resets), wrong, errors].map(|count| count.to_string());
            (vec![row.into_iter().chain([format!("{share} %")]).collect()], result)
        }
        Suite::Faults => {
            let cases = torture::faults(scratch, agent, guest, true)?;
            let result = cases.iter().try_for_each(Case::check);
            let row = |case: &Case| {
                let passing = case.passing.as_ref().map_or_else(|| "–".to_owned(), ToString::to_string);
                vec![case.fault.to_owned(), passing, case.lasting.to_string(), case.after.to_string()]
            };
            (cases.iter().map(row).collect(), result)
        }
        Suite::Budget => {
            let kept = match on_host {
                true => torture::budget_on_host(scratch, agent, LARGE)?,
                false => torture::budget_in_guest(scratch, agent, guest, LARGE)?,
            };
            let result = kept.check();
            let Kept { images, bytes, wrong, errors, budget, most } = kept;
            let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
            let (images, wrong, errors) = (images.to_string(), wrong.to_string(), errors.to_string());
            (vec![vec![images, mib(bytes), wrong, errors, mib(budget), mib(most)]], result)
        }
    };
    Ok((place, rows, result))
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Self::Kills => "kills",
            Self::Resets => "resets",
            Self::Faults => "faults",
            Self::Budget => "budget",
        }
    }

    fn command(self, options: &Options) -> String {
        let how_many = match self {
            Self::Kills => format!(" --kills {} --seed {}", options.kills, options.seed),
            Self::Resets => format!(" --resets {} --seed {}", options.resets, options.seed),
            Self::Faults | Self::Budget => String::new(),
        };
        format!("cargo xtask torture --suite {}{how_many} --record", self.name())
    }

    fn heading(self) -> (&'static str, &'static str, &'static [&'static str]) {
        match self {
            Self::Kills => (
                "The daemon is killed",
                "Eight readers read at random and compare every byte, while `skimmerd` is killed (SIGKILL) at random\n\
                 instants and started again at once; before about every fourth kill one of the keeper's two processes\n\
                 is killed too. Every 20 kills another image of six is mounted, and the cache's budget has those before\n\
                 it evicted. The longest read includes the wait for the next daemon, and for those after it when that\n\
                 was killed on its way, as about half are; `after the last kill` counts from the last of these kills.",
                &[
                    "kills",
                    "keepers killed",
                    "mounts",
                    "reads",
                    "misses",
                    "wrong bytes",
                    "errors",
                    "longest read",
                    "after the last kill",
                ],
            ),
            Self::Resets => (
                "The power goes",
                "A guest is switched off at a random instant while an image is being filled. The next boot mounts the\n\
                 same image and compares all of it. Kept is what was there then, of what was ready when the daemon was\n\
                 last asked before.",
                &["resets", "wrong blocks", "errors", "kept"],
            ),
            Self::Faults => (
                "Network and disk fail",
                "Each fault hits a mounted image of which nothing is cached, in turn: the first two requests for its\n\
                 data; all of them, with a deadline of 7 s; and then it is over, and all of the image is compared\n\
                 without another mount. Of a disk that fails to write, memory is dropped before the comparison.",
                &["fault", "passing", "lasting", "afterwards"],
            ),
            Self::Budget => (
                "The cache is too small",
                "Images are mounted in turn, read whole and compared; what the cache takes on disk is looked at 20\n\
                 times a second.",
                &["images", "read", "wrong blocks", "errors", "budget", "most on disk"],
            ),
        }
    }
}

fn today() -> Result<String> {
    let date = run::output(std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    Ok(date.trim().to_owned())
}

fn record_file() -> PathBuf {
    run::workspace().join("kernel-tests/record.json")
}

fn recorded() -> Result<Record> {
    let path = record_file();
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// The text of docs/reliability.md.
pub(crate) fn document() -> Result<String> {
    let mut text =
        "# Reliability\n\nWritten by `cargo xtask docs` from what the commands below recorded.\n".to_owned();
    for (suite, modes) in recorded()? {
        let (title, story, columns) = suite.heading();
        text += &format!("\n## {title}\n\n{story}\n\n");
        for (mode, entry) in &modes {
            let Entry { date, command, place, seconds, .. } = entry;
            text += &format!("- {mode}: {place}, {date}, {seconds} s, `{command}`\n");
        }
        text += &format!("\n| mode | {} |\n|---|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        for (mode, entry) in &modes {
            for row in &entry.rows {
                text += &format!("| {mode} | {} |\n", row.join(" | "));
            }
        }
    }
    Ok(text)
}
