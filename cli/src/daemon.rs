//! Reaching `skimmerd`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail};
use skimmer_client::{Client, ClientError, StartOptions};

/// Where the daemon is, for commands that talk to it.
#[derive(clap::Args)]
pub(crate) struct Daemon {
    /// Control socket of skimmerd.
    #[arg(long, env = "SKIMMER_SOCKET", default_value = skimmer_client::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
}

/// How to start a daemon that does not run yet.
#[derive(clap::Args)]
pub(crate) struct Start {
    /// Cache and state of a daemon that this command starts [default: /var/lib/skimmer].
    #[arg(long)]
    pub(crate) root: Option<PathBuf>,
    /// Configuration file of a daemon that this command starts.
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// Fail when skimmerd does not run instead of starting it.
    #[arg(long)]
    pub(crate) no_start: bool,
}

impl Daemon {
    pub(crate) async fn connect(&self) -> Result<Client> {
        match Client::connect(&self.socket).await {
            Err(error @ ClientError::Unreachable { .. }) if !is_root() => {
                Err(Error::new(error).context("only root may talk to skimmerd (try sudo)"))
            }
            other => Ok(other?),
        }
    }

    pub(crate) async fn connect_or_start(&self, start: &Start) -> Result<(Client, bool)> {
        if !is_root() {
            bail!("mounting an image needs root (try sudo)");
        }
        if start.no_start {
            return Ok((self.connect().await?, false));
        }
        let mut args = Vec::new();
        for (name, path) in [("--root", &start.root), ("--config", &start.config)] {
            if let Some(path) = path {
                args.push(name.to_owned());
                args.push(utf8(&std::path::absolute(path)?)?);
            }
        }
        let socket = std::path::absolute(&self.socket).context("cannot resolve the socket's path")?;
        let options = StartOptions { socket, args, ..StartOptions::default() };
        Ok(Client::connect_or_start(&options).await?)
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `path` as text, for requests that are JSON.
pub(crate) fn utf8(path: &Path) -> Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not valid UTF-8", path.display()))?.to_owned())
}
