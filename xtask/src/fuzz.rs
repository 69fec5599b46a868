//! `cargo xtask fuzz`: every fuzz target for some time, with the compiler of the project and libFuzzer.
//!
//! What was found stays in the user's cache directory and is the start of the next run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde::{Deserialize, Serialize};
use skimmer_bench::probe;

use crate::run;

/// What libFuzzer wants to know of the code it runs; only the instrumentation, so no nightly compiler is needed.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// One input may take no longer, seconds by the clock; a busy machine must not look like a hang.
const INPUT_SECONDS: u32 = 300;
/// Nor more memory, MiB.
const MEMORY_MIB: u32 = 1024;

/// What to run, and for how long.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    pub(crate) seconds: u32,
    /// Only this target (repeatable); all when absent.
    #[arg(long)]
    pub(crate) target: Vec<String>,
    /// Targets at once.
    #[arg(long, default_value_t = 1)]
    pub(crate) jobs: usize,
    /// Decides the mutations; another one for each run finds more.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u32,
    /// Add what ran to fuzz/record.json, from which docs/fuzzing.md is written.
    #[arg(long)]
    pub(crate) record: bool,
}

/// What a target has run so far.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Ran {
    /// By the clock.
    pub(crate) seconds: u64,
    /// Of a processor: beside other work, less than by the clock.
    #[serde(default)]
    pub(crate) cpu_seconds: u64,
    pub(crate) inputs: u64,
    /// Edges of its code that the last run reached.
    pub(crate) edges: u64,
    /// Inputs that broke a promise.
    pub(crate) found: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let names = targets()?;
    for wanted in &options.target {
        ensure!(names.contains(wanted), "there is no target {wanted}; there are {}", names.join(", "));
    }
    let programs = build()?;
    let chosen = names.into_iter().filter(|name| options.target.is_empty() || options.target.contains(name));
    let queue = Mutex::new(chosen.collect::<Vec<_>>().into_iter());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let Some(name) = queue.lock().ok().and_then(|mut queue| queue.next()) else { return };
                    let result = one(&programs.join(&name), &name, options).and_then(|ran| {
                        println!("fuzz {name}: {ran:?}");
                        if options.record { record(&name, ran) } else { Ok(()) }?;
                        ensure!(
                            ran.found == 0,
                            "an input broke a promise; it is in {}",
                            artifacts(&name).display()
                        );
                        Ok(())
                    });
                    if let (Err(error), Ok(mut failures)) = (result, failures.lock()) {
                        failures.push(format!("fuzz {name}: {error:#}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// The targets' names.
pub(crate) fn targets() -> Result<Vec<String>> {
    let directory = run::workspace().join("fuzz/targets");
    let files = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut names = Vec::new();
    for file in files {
        let path = file?.path();
        names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Where the programs lie.
fn build() -> Result<PathBuf> {
    let told = run::output(Command::new("rustc").arg("-vV").current_dir(run::workspace()))?;
    let host = told.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    // A named target keeps the flags away from build scripts.
    let mut command = run::cargo(&["build", "--quiet", "--release", "--bins", "--features", "libfuzzer"]);
    command.args(["--manifest-path", "fuzz/Cargo.toml", "--target", host]);
    command.env("RUSTFLAGS", COVERAGE).env("CARGO_TARGET_DIR", run::target_dir());
    run::check(&mut command)?;
    Ok(run::target_dir().join(host).join("release"))
}

fn artifacts(name: &str) -> PathBuf {
    run::workspace().join("fuzz/artifacts").join(name)
}

/// One target: from the tree's corpus and what earlier runs found.
fn one(program: &Path, name: &str, options: &Options) -> Result<Ran> {
    let cache = skimmer_vm_images::cache::root()?.with_file_name("fuzz");
    let (found, artifacts) = (cache.join(name), artifacts(name));
    for directory in [&found, &artifacts] {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    let log = cache.join(format!("{name}.log"));
    let file = File::create(&log).with_context(|| log.display().to_string())?;
    let mut command = Command::new(program);
    command.args([&found, &run::workspace().join("fuzz/corpus").join(name)]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(format!("-max_total_time={}", options.seconds));
    command.arg(format!("-timeout={INPUT_SECONDS}")).arg(format!("-rss_limit_mb={MEMORY_MIB}"));
    command.arg(format!("-seed={}", options.seed)).arg("-print_final_stats=1");
    // Targets that work on files make many of them.
    let scratch = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    command.env("TMPDIR", scratch.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
    let mut child = command.spawn().with_context(|| program.display().to_string())?;
    let pid = Pid::from_child(&child);
    // What it used can be read as long as it is not waited for.
    let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    let used = ended.map_err(Into::into).and_then(|_| probe::cpu_seconds(child.id()));
    let status = child.wait()?;
    let cpu_seconds = Duration::try_from_secs_f64(used.with_context(|| name.to_owned())?)?.as_secs();
    let text = fs::read(&log).with_context(|| log.display().to_string())?;
    let text = String::from_utf8_lossy(&text);
    let Some(inputs) = last_number(&text, "stat::number_of_executed_units:") else {
        bail!("{status}; the end of {}:\n{}", log.display(), tail(&text));
    };
    let seconds = last_number(&text, "runs in ").unwrap_or(0);
    let edges = last_number(&text, " cov: ").unwrap_or(0);
    Ok(Ran { seconds, cpu_seconds, inputs, edges, found: u64::from(!status.success()) })
}

/// The number behind the last `word`; `Done 123 runs in 60 second(s)` is libFuzzer's own closing line.
fn last_number(text: &str, word: &str) -> Option<u64> {
    let rest = text[text.rfind(word)? + word.len()..].trim_start();
    let end = rest.find(|character: char| !character.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

fn record_file() -> PathBuf {
    run::workspace().join("fuzz/record.json")
}

/// What is recorded, by target.
pub(crate) fn recorded() -> Result<BTreeMap<String, Ran>> {
    let path = record_file();
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn record(name: &str, ran: Ran) -> Result<()> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().map_err(|_| anyhow::anyhow!("another target's thread panicked"))?;
    let mut all = recorded()?;
    let before = all.entry(name.to_owned()).or_default();
    *before = Ran {
        seconds: before.seconds + ran.seconds,
        cpu_seconds: before.cpu_seconds + ran.cpu_seconds,
        inputs: before.inputs + ran.inputs,
        edges: ran.edges,
        found: before.found + ran.found,
    };
    let text = serde_json::to_string_pretty(&all)? + "\n";
    fs::write(record_file(), text).with_context(|| record_file().display().to_string())
}

#[cfg(test)]
mod tests {
    use super::last_number;

    #[test]
    fn reads_libfuzzers_closing_lines() {
        let text = "#8 pulse  cov: 12 ft: 3\n#99\tDONE   cov: 345 ft: 678\nDone 99 runs in 61 second(s)\n\
                    stat::number_of_executed_units: 99\n";
        assert_eq!(last_number(text, " cov: "), Some(345));
        assert_eq!(last_number(text, "runs in "), Some(61));
        assert_eq!(last_number(text, "stat::number_of_executed_units:"), Some(99));
        assert_eq!(last_number(text, "nothing"), None);
    }
}
