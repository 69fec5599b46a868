//! `cargo xtask test`: everything that must hold, in one command.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use skimmer_test_support::tools::DENY;
use skimmer_vm_images::apt;

use crate::{deny, docs, fuzz, run, tools};

/// Programs of Debian that the tests use as real counterparts and oracles.
const PACKAGES: &[&str] = &[
    "acl",
    "attr",
    "busybox-static",
    "containerd",
    "cpio",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "g++",
    "iproute2",
    "nginx",
    "openssl",
    "qemu-system-x86",
    "runc",
    "skopeo",
    "systemd",
    "umoci",
];

/// How to run the tests.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave out format and lint checks.
    #[arg(long)]
    no_lint: bool,
    /// Only these packages (repeatable); all when absent.
    #[arg(long, short)]
    package: Vec<String>,
}

#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    apt::ensure(PACKAGES)?;
    tools::ensure()?;
    let mut skipped = Vec::new();
    if !options.no_lint {
        step(start, "format");
        run::check(&mut run::cargo(&["fmt", "--all", "--check"]))?;
        step(start, "lints");
        let lints = ["--workspace", "--all-targets", "--", "-D", "warnings"];
        run::check(run::cargo(&["clippy", "--quiet"]).args(lints))?;
        run::check(&mut run::cargo(&["fmt", "--check", "--manifest-path", "fuzz/Cargo.toml"]))?;
        step(start, "dependencies");
        match DENY.path().filter(|path| path.is_file()) {
            Some(program) => deny::check(&program, deny::OURS)?,
            None => {
                skipped.push("dependencies: cargo-deny is missing (cargo xtask deny builds it)".to_owned())
            }
        }
    }
    step(start, "build");
    // The programs under test, where the kernel tests look for them.
    run::check(&mut run::cargo(&["build", "--quiet", "--workspace", "--bins"]))?;

    step(start, "documents");
    docs::run(&docs::Options { check: true })?;

    // Beside the tests and behind them: the machine is idle often enough.
    let fuzzing = options.package.is_empty().then(start_fuzzing).transpose()?;

    let skips = tempfile::NamedTempFile::new().context("cannot make the list of skipped tests")?;
    let mut totals = Totals::default();
    step(start, "tests");
    let mut tests = run::cargo(&["test", "--no-fail-fast"]);
    if options.package.is_empty() {
        tests.arg("--workspace");
    }
    for package in &options.package {
        tests.args(["--package", package]);
    }
    count(tests.env("SKIMMER_SKIPS", skips.path()), &mut totals)?;
    if options.package.is_empty() {
        step(start, "tests of the tests: the simulator must notice each broken invariant");
        let args = ["test", "--no-fail-fast", "--package", "skimmer-engine", "--features", "mutations"];
        count(
            run::cargo(&args).args(["--test", "mutations"]).env("SKIMMER_SKIPS", skips.path()),
            &mut totals,
        )?;
        step(start, "fuzz corpora");
        let args = ["test", "--no-fail-fast", "--manifest-path", "fuzz/Cargo.toml"];
        count(run::cargo(&args).env("CARGO_TARGET_DIR", run::target_dir()), &mut totals)?;
    }
    if let Some(fuzzing) = fuzzing {
        step(start, "fuzz targets, a minute each, which ran beside the tests");
        let output = fuzzing.wait_with_output().context("cannot wait for the fuzz targets")?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
        if output.status.success() {
            totals.passed += u64::try_from(fuzz::targets()?.len())?;
        } else {
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
            totals.failures.push(format!("fuzz targets: {}", output.status));
        }
    }

    let list = std::fs::read_to_string(skips.path()).context("cannot read the list of skipped tests")?;
    skipped.extend(list.lines().filter(|line| !line.is_empty()).map(str::to_owned));
    for reason in &skipped {
        println!("skipped: {reason}");
    }
    for failure in &totals.failures {
        println!("failed: {failure}");
    }
    println!("took {} s", start.elapsed().as_secs());
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, skipped.len());
    if totals.failed > 0 || !totals.failures.is_empty() {
        bail!("tests failed");
    }
    if totals.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// This program again, with nothing but what others leave of the processors.
fn start_fuzzing() -> Result<Child> {
    // Not this very file, which the build may have replaced.
    let own = run::target_dir().join("debug/xtask");
    let mut command = Command::new("chrt");
    command.args(["--idle", "0"]).arg(own).args(["fuzz", "--jobs", "2"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().with_context(|| format!("cannot run {command:?}"))
}

fn step(start: Instant, name: &str) {
    println!("== {name} ({} s)", start.elapsed().as_secs());
    // A lost step line must not end the run.
    let _ = std::io::stdout().flush();
}

/// Runs a `cargo test` command, shows its output, and adds up the runner's closing lines.
fn count(command: &mut Command, totals: &mut Totals) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let stdout = child.stdout.take().context("the test runner has no output")?;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot read the test runner's output")?;
        println!("{line}");
        if let Some(rest) = line.strip_prefix("test result: ") {
            totals.passed += number_before(rest, " passed");
            totals.failed += number_before(rest, " failed");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            totals.failures.push(name.to_owned());
        }
    }
    let status = child.wait().context("cannot wait for the test runner")?;
    if !status.success() && totals.failed == 0 {
        totals.failures.push(format!("{command:?}: {status}"));
    }
    Ok(())
}

fn number_before(line: &str, word: &str) -> u64 {
    let Some(end) = line.find(word) else { return 0 };
    let digits = line[..end].rsplit(' ').next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::number_before;

    #[test]
    fn reads_the_runners_closing_line() {
        let line = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(number_before(line, " passed"), 12);
        assert_eq!(number_before(line, " failed"), 3);
        assert_eq!(number_before("nothing here", " failed"), 0);
    }
}
