//! `skimmer status`: the daemon, its mounts and its cache.

use std::collections::BTreeMap;

use anyhow::Result;
use skimmer_client::StatusReport;

use crate::{Global, daemon, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    daemon: daemon::Daemon,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let status = options.daemon.connect().await?.status().await?;
    if global.json { output::json(&status) } else { print(&status) }
}

fn print(status: &StatusReport) -> Result<()> {
    output::line(&format!(
        "skimmerd {} (process {}), up {} s, cache {}",
        status.version,
        status.pid,
        status.uptime_s,
        status.root.display()
    ))?;
    let budget = match status.cache_budget_bytes {
        0 => String::new(),
        budget => format!(" of {}", output::bytes(budget)),
    };
    output::line(&format!("  disk      {}{budget}", output::bytes(status.cache_bytes)))?;
    for mode in &status.modes {
        let state = if mode.usable { "usable" } else { "not usable" };
        output::line(&format!("  {:9} {state}: {}", mode.mode, mode.reason))?;
    }
    let keeper = if status.keeper.connected { "connected" } else { "not connected" };
    output::line(&format!("  keeper    {keeper}, {}", status.keeper.socket.display()))?;
    let blobs: BTreeMap<&str, _> = status.blobs.iter().map(|blob| (blob.id.as_str(), blob)).collect();
    if status.mounts.is_empty() {
        output::line("no image is mounted")?;
    }
    for mount in &status.mounts {
        let mine = mount.blobs.iter().filter_map(|id| blobs.get(id.as_str()));
        let (ready, all) =
            mine.clone().fold((0, 0), |sum, blob| (sum.0 + blob.ready_bytes, sum.1 + blob.referenced_bytes));
        output::line(&format!("{} at {} ({})", mount.image, mount.target.display(), mount.mode))?;
        let share = ready.saturating_mul(100).checked_div(all).unwrap_or(100);
        let waiting: u64 = mine.clone().map(|blob| blob.pending_reads).sum();
        output::line(&format!(
            "  cached {} of {} ({share} %), {waiting} reads waiting",
            output::bytes(ready),
            output::bytes(all)
        ))?;
        if let Some(fault) = &mount.fault {
            output::line(&format!("  not served: {fault}"))?;
        }
        for blob in mine {
            if let Some(fault) = &blob.fault {
                output::line(&format!("  blob {}: {fault}", blob.id))?;
            }
        }
    }
    for prepared in &status.prepared {
        let state = if prepared.mounted { "mounted by others" } else { "not mounted yet" };
        output::line(&format!("{} is prepared ({}), {state}", prepared.image, prepared.mode))?;
    }
    Ok(())
}
