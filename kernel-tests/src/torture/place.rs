//! Where a suite has its programs, sockets and cache, on whatever machine it runs.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

/// Given on the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct Place {
    /// Where skimmer, skimmerd and skimmer-keeper are
    #[arg(long)]
    pub programs: PathBuf,
    /// An empty directory for sockets, configuration and the mount point
    #[arg(long)]
    pub directory: PathBuf,
    /// Cache and state
    #[arg(long)]
    pub root: PathBuf,
    /// Attach mode
    #[arg(long)]
    pub mode: String,
}

impl Place {
    /// Makes the directories and writes the configuration.
    pub(super) fn prepare(&self, budget_mib: u64) -> Result<()> {
        fs::create_dir_all(self.target())?;
        let text = format!(
            "root = {:?}\nsocket = {:?}\nkeeper_socket = {:?}\n[containerd]\nenable = false\n[cache]\nbudget_mib = {budget_mib}\n",
            self.root,
            self.socket(),
            self.keeper_socket(),
        );
        Ok(fs::write(self.config(), text)?)
    }

    pub(super) fn config(&self) -> PathBuf {
        self.directory.join("skimmerd.toml")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("d.sock")
    }

    pub(super) fn keeper_socket(&self) -> PathBuf {
        self.directory.join("k.sock")
    }

    pub(super) fn target(&self) -> PathBuf {
        self.directory.join("mnt")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }
}
