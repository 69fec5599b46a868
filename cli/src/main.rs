//! `skimmer`: convert, check, mount and look after images.
#![forbid(unsafe_code)]

mod commands;
mod daemon;
mod image;
mod output;
mod top;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Mount container images at once and fetch only what is read.
///
/// IMAGE is named as skopeo does: docker://HOST/NAME:TAG, oci:DIR[:TAG], oci-archive:FILE. Without a transport a
/// directory that holds an `oci-layout` file is an OCI layout, any other directory is a plain tree, HOST/NAME:TAG is a
/// registry reference, and a destination path is an OCI layout to make.
#[derive(Parser)]
#[command(name = "skimmer", version, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(clap::Args)]
struct Global {
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    json: bool,
    /// No progress bar and no remarks; errors are still printed.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Log what happens to standard error (repeat for more).
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    /// Turn an OCI image or a directory into an image that is mounted lazily.
    Convert(commands::convert::Options),
    /// Copy an image from an OCI layout or archive to a registry.
    Push(commands::copy::Push),
    /// Copy an image from a registry to an OCI layout or archive.
    Pull(commands::copy::Pull),
    /// Show what an image consists of.
    Inspect(commands::inspect::Options),
    /// Verify an image completely: its metadata, and every chunk of every blob.
    Check(commands::check::Options),
    /// Mount a converted image; starts skimmerd when none runs.
    Mount(commands::mount::Options),
    /// Take a mount away.
    Umount(commands::umount::Options),
    /// Make an image ready to be mounted by other programs, and say how.
    Prepare(commands::prepare::Prepare),
    /// Give up a prepared image that is not mounted.
    Release(commands::prepare::Release),
    /// Fetch files of a mounted image, or all of it, before they are read.
    Prefetch(commands::prefetch::Options),
    /// Read the cache again, compare it with the images' digests, and repair it.
    Scrub(commands::scrub::Options),
    /// Print what was read and fetched through a mount that was made with --record.
    Recording(commands::record::Show),
    /// Draw a recording: what was asked and fetched when, and what waited how long.
    Report(commands::record::Report),
    /// Put what a container reads at its start into one small blob that is fetched first.
    Optimize(commands::optimize::Options),
    /// Show the daemon, its mounts and its cache.
    Status(commands::status::Options),
    /// Watch the daemon at work: reads, bytes, waiting times, images.
    Top(commands::top::Options),
    /// Print or check the daemon's configuration.
    Config(commands::config::Options),
    /// Tell containerd about our snapshots.
    Containerd(commands::containerd::Options),
    /// Write manual pages and shell completions.
    #[command(hide = true)]
    Generate(commands::generate::Options),
    /// Look at kernel, cache, daemon, containerd and registry: what is missing, and what to do about it.
    Doctor(commands::doctor::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let level = match arguments.global.verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("SKIMMER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = run(arguments) => result,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        }
    });
    // A worker that is busy must not hold the terminal after an interrupt.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe had enough (`skimmer inspect | head`).
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::report(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let global = &arguments.global;
    match arguments.command {
        Command::Convert(options) => commands::convert::run(options, global).await,
        Command::Push(options) => commands::copy::push(options, global).await,
        Command::Pull(options) => commands::copy::pull(options, global).await,
        Command::Inspect(options) => commands::inspect::run(options, global).await,
        Command::Check(options) => commands::check::run(options, global).await,
        Command::Mount(options) => commands::mount::run(options, global).await,
        Command::Umount(options) => commands::umount::run(options, global).await,
        Command::Prepare(options) => commands::prepare::prepare(options, global).await,
        Command::Release(options) => commands::prepare::release(options, global).await,
        Command::Prefetch(options) => commands::prefetch::run(options, global).await,
        Command::Scrub(options) => commands::scrub::run(options, global).await,
        Command::Recording(options) => commands::record::show(options).await,
        Command::Report(options) => commands::record::report(&options, global),
        Command::Optimize(options) => commands::optimize::run(options, global).await,
        Command::Status(options) => commands::status::run(options, global).await,
        Command::Top(options) => commands::top::run(options, global).await,
        Command::Config(options) => commands::config::run(&options, global),
        Command::Containerd(options) => commands::containerd::run(&options, global),
        Command::Generate(options) => commands::generate::run(&options, Arguments::command()),
        Command::Doctor(options) => commands::doctor::run(&options, global).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
