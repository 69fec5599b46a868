//! `cargo xtask bench-ab`: two revisions of Skimmer against each other.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use skimmer_bench::ab::{self, Verdict};
use skimmer_bench::record::{Better, Line, Place, Sample, Unit};
use skimmer_bench::report;
use skimmer_bench::run::{Bench, Options as BenchOptions};
use skimmer_bench::scenario::Scenario;
use skimmer_vm_images::{apt, cache};

use crate::{bench, run};

/// Programs that a revision brings.
const PROGRAMS: [&str; 3] = ["skimmer", "skimmerd", "skimmer-keeper"];
/// Counts instructions of this, where the revision has it.
const COUNTED: &str = "skimmer-instructions";
/// What it can do, and how often: enough to drown what is done once.
const WORK: [(&str, u32); 4] = [("decode", 20_000), ("plan", 4000), ("verify", 20), ("navigate", 20)];

/// What to compare.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The revision to compare the working tree with (a commit, tag or branch)
    revision: String,
    /// Rounds of each scenario: seven of each side can tell a difference from chance
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Differences of the medians up to this many percent do not count
    #[arg(long, default_value_t = 5.0)]
    threshold: f64,
    /// Only these of ab-misses, ab-everything and instructions (repeatable)
    #[arg(long)]
    scenario: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    apt::ensure(skimmer_bench::cold::PACKAGES)?;
    let wanted =
        |name: &str| options.scenario.is_empty() || options.scenario.iter().any(|other| other == name);
    let mut scenarios = Vec::new();
    for name in ["ab-everything", "ab-misses"] {
        if wanted(name) {
            let file = format!("{name}.toml");
            scenarios.push(Scenario::read(&run::workspace().join("bench/ab").join(file))?);
        }
    }
    let known = ["ab-everything", "ab-misses", "instructions"];
    if let Some(unknown) = options.scenario.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no scenario {unknown}; there are: {}", known.join(", "));
    }
    let interrupted = bench::interrupts()?;
    println!("building b: the working tree");
    let programs = bench::build(run::workspace(), &run::target_dir())?;
    let old = old_programs(&options.revision)?;
    let results = run::target_dir().join("bench").join("ab");
    let mut lines = Vec::new();
    if !scenarios.is_empty() {
        let bench = Bench::new(
            BenchOptions {
                quick: false,
                rounds: Some(options.rounds),
                machines: None,
                programs: programs.clone(),
                variants: vec![(ab::A.to_owned(), old.clone()), (ab::B.to_owned(), programs.clone())],
                results: results.clone(),
            },
            skimmer_bench::record::Run { date: bench::date()?, ..Default::default() },
            interrupted,
        )?;
        lines = bench.run(&scenarios)?;
        report::write(&lines, &results)?;
    }
    if wanted("instructions") {
        lines.extend(instructions(&old, &programs)?);
    }
    let differences = ab::compare(&lines, options.threshold / 100.0);
    println!("\na: {}, b: the working tree\n\n{}", options.revision, ab::table(&differences));
    let worse = differences.iter().filter(|difference| difference.verdict == Verdict::Regression).count();
    if worse > 0 {
        bail!("{worse} of {} metrics are worse than in {}", differences.len(), options.revision);
    }
    println!("no regression in {} metrics", differences.len());
    Ok(())
}

/// Builds a revision's programs, or finds them in the cache.
fn old_programs(revision: &str) -> Result<PathBuf> {
    let git = |args: &[&str]| run::output(Command::new("git").args(args).current_dir(run::workspace()));
    let commit = git(&["rev-parse", "--verify", &format!("{revision}^{{commit}}")])
        .with_context(|| format!("{revision} is not a revision of this repository"))?;
    let commit = commit.trim();
    let mut key = cache::Key::new("revision");
    key.add(commit.as_bytes());
    let entry = cache::Entry::new("revisions", &key.finish())?;
    let made = entry.get_or_make(|aside| {
        println!("building a: {revision} ({commit})");
        let tree = aside.join("tree");
        let checkout = Checkout { tree: tree.clone() };
        let path = tree.to_str().context("the cache's path is not UTF-8")?;
        git(&["worktree", "add", "--detach", "--force", path, commit])?;
        // One target folder for all revisions: most of what they need is the same.
        let target = cache::root()?.join("revisions-target");
        let mut build = run::cargo(&["build", "--quiet", "--release", "--bins"]);
        for package in ["skimmer-cli", "skimmer-daemon", "skimmer-keeper"] {
            build.args(["--package", package]);
        }
        run::check(build.current_dir(&tree).env("CARGO_TARGET_DIR", &target))?;
        for program in PROGRAMS {
            std::fs::copy(target.join("release").join(program), aside.join(program))?;
        }
        let mut build =
            run::cargo(&["build", "--quiet", "--release", "--package", "skimmer-bench", "--bin", COUNTED]);
        if run::output(build.current_dir(&tree).env("CARGO_TARGET_DIR", &target)).is_ok() {
            std::fs::copy(target.join("release").join(COUNTED), aside.join(COUNTED))?;
        }
        drop(checkout);
        Ok(())
    })?;
    cache::prune("revisions", 8)?;
    Ok(made)
}

/// A work tree that goes away.
struct Checkout {
    tree: PathBuf,
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let mut command = Command::new("git");
        command.args(["worktree", "remove", "--force"]).arg(&self.tree).current_dir(run::workspace());
        if let Err(error) = run::output(&mut command) {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// Instructions by callgrind: nearly the same for the same program and work, so that two counts of each are plenty.
fn instructions(old: &Path, new: &Path) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    if !old.join(COUNTED).is_file() {
        println!("skipped: instructions: revision a does not have {COUNTED}");
        return Ok(lines);
    }
    apt::ensure(&["valgrind"])?;
    for (work, repetitions) in WORK {
        for (name, programs) in [(ab::A, old), (ab::B, new)] {
            let program = programs.join(COUNTED);
            for round in 0..2 {
                let count = count(&program, work, repetitions)? - count(&program, work, 0)?;
                let (contender, unit, better) = (name.to_owned(), Unit::Count, Better::Lower);
                let place =
                    Place { scenario: "instructions".into(), machine: "host".into(), case: work.into() };
                let (metric, value) = ("instructions".to_owned(), count / f64::from(repetitions));
                lines.push(Line::Sample(Sample { place, contender, round, metric, unit, better, value }));
            }
        }
    }
    Ok(lines)
}

fn count(program: &Path, work: &str, repetitions: u32) -> Result<f64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(program);
    let output = command.args([work, &repetitions.to_string()]).output().context("cannot run valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let collected =
        text.lines().find_map(|line| line.split_once("Collected : ")).map(|(_, number)| number.trim());
    let (true, Some(number)) = (output.status.success(), collected) else {
        bail!("valgrind {} {work}: {}\n{text}", program.display(), output.status);
    };
    Ok(number.parse()?)
}
