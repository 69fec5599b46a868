//! `skimmer umount`: take mounts away.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{Global, daemon, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the images are mounted.
    #[arg(required = true)]
    targets: Vec<PathBuf>,
    /// Detach although files are open; the kernel lets go when they are closed.
    #[arg(long, short)]
    lazy: bool,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let client = options.daemon.connect().await?;
    let mut gone = Vec::new();
    for target in &options.targets {
        let absolute = std::path::absolute(target).context("cannot resolve the target's path")?;
        // What is mounted is named without symlinks and dots; a path that is gone is still worth asking for.
        let absolute = absolute.canonicalize().unwrap_or(absolute);
        gone.push(client.umount(&absolute, options.lazy).await?);
    }
    if global.json {
        return output::json(&gone);
    }
    if !global.quiet {
        for mount in gone {
            output::line(&format!("{} is no longer mounted at {}", mount.image, mount.target.display()))?;
        }
    }
    Ok(())
}
