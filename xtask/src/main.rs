//! The project's own commands, run as `cargo xtask NAME`.
#![forbid(unsafe_code)]

mod bench;
mod bench_ab;
mod deb;
mod demo;
mod deny;
mod docs;
mod fuzz;
mod run;
mod test;
mod tools;
mod torture;

use clap::Parser;

/// Skimmer's development commands.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Run every check and test: format, lints, unit, property, simulator, real kernels on the host and in QEMU.
    Test(test::Options),
    /// Build Dragonfly's programs for the tests, once: most of an hour.
    Dragonfly,
    /// Check the dependencies: licences, sources, and known advisories, for which github.com must be reached.
    Deny,
    /// Write the parts of docs/ that the programs know best.
    Docs(docs::Options),
    /// Make the Debian package.
    Deb(deb::Options),
    /// Measure Skimmer beside what a user would pick instead, and write a report.
    Bench(bench::Options),
    /// Compare the working tree's speed with another revision's; fails on a regression.
    BenchAb(bench_ab::Options),
    /// Kill the daemon again and again under readers who compare every byte.
    Torture(torture::Options),
    /// Run the fuzz targets.
    Fuzz(fuzz::Options),
    /// Start a container's program from a registry over a slow link, ours against pull-everything.
    Demo(demo::Options),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Test(options) => test::run(&options),
        Command::Dragonfly => tools::dragonfly(),
        Command::Deny => deny::run(),
        Command::Docs(options) => docs::run(&options),
        Command::Deb(options) => deb::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::BenchAb(options) => bench_ab::run(&options),
        Command::Torture(options) => torture::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Demo(options) => demo::run(&options),
    }
}
