//! `skimmer scrub`: read the cache again, compare it with the images' digests and repair it.

use std::time::Duration;

use anyhow::{Result, ensure};
use skimmer_client::{ScrubReport, ScrubRequest};

use crate::{Global, daemon, output};

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(200);

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Read at most so many MiB a second, 0 for no limit.
    #[arg(long, value_name = "MIB", default_value_t = 50)]
    rate: u32,
    /// Only tell what is bad.
    #[arg(long)]
    check_only: bool,
    /// Stop the scrub that runs.
    #[arg(long, conflicts_with_all = ["rate", "check_only"])]
    stop: bool,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let client = options.daemon.connect().await?;
    if options.stop {
        return show(&client.stop_scrub().await?, global);
    }
    let request = ScrubRequest { mib_per_second: options.rate.into(), check_only: options.check_only };
    let bar = output::progress(global, "reading");
    let scrub = client.scrub(&request);
    tokio::pin!(scrub);
    let report = loop {
        tokio::select! {
            report = &mut scrub => break report?,
            () = tokio::time::sleep(TICK) => {
                let report = client.scrubbed().await?;
                bar.set_message(format!("blob {} of {}", report.blobs_done.min(report.blobs), report.blobs));
                bar.set_position(report.bytes);
            }
        }
    };
    bar.finish_and_clear();
    show(&report, global)?;
    let left = report.bad.saturating_sub(report.repaired);
    ensure!(
        left == 0 && report.failed == 0,
        "{left} bad ones are left; see the failures, and skimmerd's log"
    );
    Ok(())
}

fn show(report: &ScrubReport, global: &Global) -> Result<()> {
    if global.json {
        return output::json(report);
    }
    for failure in &report.failures {
        output::line(&format!("failed: {failure}"))?;
    }
    if !global.quiet {
        let ScrubReport { bootstraps, blobs_done, chunks, bytes, bad, repaired, .. } = report;
        let bytes = output::bytes(*bytes);
        output::line(&format!(
            "{bootstraps} bootstraps, {blobs_done} blobs with {chunks} chunks, {bytes}: {bad} bad, {repaired} repaired"
        ))?;
    }
    Ok(())
}
