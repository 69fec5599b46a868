//! `skimmer prefetch`: fetch files of a mounted image before they are read.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use skimmer_client::PrefetchRequest;

use crate::{Global, daemon, output};

/// How long it waits while nothing comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the image is mounted.
    target: PathBuf,
    /// Paths from the image's root, directories with all that is in them [default: the whole image].
    paths: Vec<PathBuf>,
    /// Only when nobody reads, at the pace that skimmerd's configuration sets.
    #[arg(long)]
    background: bool,
    /// Return when everything is there.
    #[arg(long, short)]
    wait: bool,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let target = options.target.canonicalize();
    let target = target.with_context(|| format!("no such directory: {}", options.target.display()))?;
    let client = options.daemon.connect().await?;
    let request =
        PrefetchRequest { target, paths: options.paths, background: options.background, wait: false };
    let mut report = client.prefetch(&request).await?;
    if options.wait {
        let bar = output::progress(global, "fetching");
        output::add_total(&bar, report.missing_bytes);
        let all = report.missing_bytes;
        let mut progress = (all, Instant::now());
        // Asked again and again rather than waited for, so that the bar moves.
        while report.missing_bytes > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            report = client.prefetch(&request).await?;
            bar.set_position(all.saturating_sub(report.missing_bytes));
            if report.missing_bytes < progress.0 {
                progress = (report.missing_bytes, Instant::now());
            }
            let missing = output::bytes(report.missing_bytes);
            let seconds = PATIENCE.as_secs();
            ensure!(
                progress.1.elapsed() < PATIENCE,
                "{missing} are still to come, and nothing came in {seconds} s; see `skimmer status`"
            );
        }
        bar.finish_and_clear();
    }
    if global.json {
        return output::json(&report);
    }
    if !global.quiet {
        let (bytes, missing) = (output::bytes(report.bytes), output::bytes(report.missing_bytes));
        let rest =
            if report.missing_bytes == 0 { "all cached".to_owned() } else { format!("{missing} to come") };
        output::line(&format!("{} files, {bytes}: {rest}", report.files))?;
    }
    Ok(())
}
