//! `cargo xtask bench`: scenarios of `bench/scenarios`, measured and reported.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use skimmer_bench::record::{Line, Run};
use skimmer_bench::report;
use skimmer_bench::run::{Bench, Options as BenchOptions};
use skimmer_bench::scenario::Scenario;
use skimmer_vm_images::apt;

use crate::{docs, run};

/// Debian packages that scenarios use on this machine.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "cpio",
    "curl",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "qemu-system-x86",
    "skopeo",
    "umoci",
];

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Names of scenarios; without any, all but those that run only by name
    scenarios: Vec<String>,
    /// The scenarios marked for it, with fewer rounds, cases and machines: about a quarter of an hour
    #[arg(long)]
    quick: bool,
    /// Only this machine: `host` or a name of vm-images/kernels.toml (repeatable)
    #[arg(long)]
    machine: Vec<String>,
    /// Rounds instead of those that scenarios state
    #[arg(long)]
    rounds: Option<u32>,
    /// Where results.jsonl, report.html and plots go [default: target/bench/DATE]
    #[arg(long)]
    results: Option<PathBuf>,
    /// Keep the results in docs/performance, a file a scenario, and write docs/performance.md from all of them
    #[arg(long)]
    docs: bool,
    /// Only tell which scenarios there are
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut scenarios = scenarios()?;
    if options.list {
        for scenario in &scenarios {
            let when = match scenario {
                scenario if scenario.only_by_name => " (only by name)",
                scenario if scenario.quick => " (quick too)",
                _ => "",
            };
            println!("{:16} {}{when}", scenario.name, scenario.title);
        }
        return Ok(());
    }
    let names: Vec<String> = scenarios.iter().map(|scenario| scenario.name.clone()).collect();
    if let Some(unknown) = options.scenarios.iter().find(|name| !names.contains(name)) {
        bail!("no scenario {unknown}; there are: {}", names.join(", "));
    }
    for machine in options.machine.iter().filter(|machine| *machine != "host") {
        skimmer_vm_images::recipe(machine)?;
    }
    if options.scenarios.is_empty() {
        scenarios.retain(|scenario| !scenario.only_by_name && (!options.quick || scenario.quick));
    } else {
        scenarios.retain(|scenario| options.scenarios.contains(&scenario.name));
    }
    apt::ensure(PACKAGES)?;
    println!("building the programs under test (profile release)");
    let programs = build(run::workspace(), &run::target_dir())?;
    let date = date()?;
    let default = || run::target_dir().join("bench").join(date.replace(':', ""));
    let results = options.results.clone().unwrap_or_else(default);
    let bench = Bench::new(
        BenchOptions {
            quick: options.quick,
            rounds: options.rounds,
            machines: (!options.machine.is_empty()).then(|| options.machine.clone()),
            programs,
            variants: Vec::new(),
            results: results.clone(),
        },
        conditions(options, date)?,
        interrupts()?,
    )?;
    let outcome = bench.run(&scenarios);
    // What was measured before a failure is worth a look too.
    let lines = report::read(&results.join("results.jsonl"))?;
    let path = report::write(&lines, &results)?;
    println!("{}", report::text(&report::page(&lines)));
    println!("report: {}", path.display());
    let lines = outcome?;
    if options.docs {
        keep(&lines)?;
    }
    Ok(())
}

/// The scenarios of the tree, by name.
pub(crate) fn scenarios() -> Result<Vec<Scenario>> {
    let directory = run::workspace().join("bench/scenarios");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&directory)
        .with_context(|| format!("{}", directory.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    paths.iter().map(|path| Scenario::read(path)).collect()
}

/// Builds the programs under test of the checkout `workspace`; gives their folder.
pub(crate) fn build(workspace: &std::path::Path, target: &std::path::Path) -> Result<PathBuf> {
    let mut command = run::cargo(&["build", "--quiet", "--release", "--bins"]);
    for package in
        ["skimmer-cli", "skimmer-daemon", "skimmer-keeper", "skimmer-bench", "skimmer-kernel-tests"]
    {
        command.args(["--package", package]);
    }
    run::check(command.current_dir(workspace).env("CARGO_TARGET_DIR", target))?;
    Ok(target.join("release"))
}

/// A flag that an interrupt, a termination or a hang-up sets. The programs that run then get the signal too or are
/// waited for, and everything that was set up is taken down.
pub(crate) fn interrupts() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    ctrlc::set_handler(move || {
        eprintln!("interrupted: taking everything down");
        set.store(true, Ordering::Relaxed);
    })
    .context("cannot handle interrupts")?;
    Ok(flag)
}

/// Now, UTC, to the second.
pub(crate) fn date() -> Result<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let text =
        run::output(Command::new("date").args(["-u", "-d", &format!("@{now}"), "+%Y-%m-%dT%H:%M:%SZ"]))?;
    Ok(text.trim().to_owned())
}

fn conditions(options: &Options, date: String) -> Result<Run> {
    let git = |args: &[&str]| run::output(Command::new("git").args(args).current_dir(run::workspace()));
    let mut revision = git(&["rev-parse", "--short=12", "HEAD"])?.trim().to_owned();
    if !git(&["status", "--porcelain", "--untracked-files=no"])?.trim().is_empty() {
        revision.push_str("-dirty");
    }
    let processor = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism()?;
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let mut command = vec!["cargo xtask bench".to_owned()];
    command.extend(options.quick.then(|| "--quick".to_owned()));
    command.extend(options.scenarios.iter().cloned());
    command.extend(options.machine.iter().map(|machine| format!("--machine {machine}")));
    command.extend(options.rounds.map(|rounds| format!("--rounds {rounds}")));
    Ok(Run {
        date,
        revision,
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        processor: format!("{}, {cores} cores", model.map_or("unknown processor", |(_, name)| name)),
        memory_mib: memory.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024,
        congestion: std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?.trim().to_owned(),
        profile: "release".to_owned(),
        command: command.join(" "),
        quick: options.quick,
    })
}

/// Makes these results the ones that the documents show: a file for each scenario that ran.
fn keep(lines: &[Line]) -> Result<()> {
    let directory = docs::results();
    std::fs::create_dir_all(&directory)?;
    let (mut name, mut of) = (None, std::collections::BTreeMap::<String, Vec<&Line>>::new());
    let run: Vec<&Line> = lines.iter().filter(|line| matches!(line, Line::Run(_))).collect();
    for line in lines {
        if let Line::Scenario(about) = line {
            name = Some(about.scenario.clone());
        }
        if let (Some(name), false) = (&name, matches!(line, Line::End { .. })) {
            of.entry(name.clone()).or_default().push(line);
        }
    }
    for (name, lines) in of {
        let mut text = String::new();
        for line in run.iter().chain(&lines) {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        let path = directory.join(format!("{name}.jsonl"));
        std::fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
    }
    docs::run(&docs::Options { check: false })
}
