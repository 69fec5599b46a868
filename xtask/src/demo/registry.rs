//! Debian's `docker-registry` at the far end of a link.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use skimmer_bench::link::Link;

/// The port it listens on, in its own namespace.
const PORT: u16 = 5000;

/// A running registry; dropping it ends the process.
pub(crate) struct Registry {
    process: Child,
    address: SocketAddr,
}

impl Registry {
    /// Starts it at the far end of `link`, with its storage and log in `dir`.
    pub(crate) fn start(link: &Link, dir: &Path) -> Result<Self> {
        let storage = dir.join("registry");
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 0.0.0.0:{PORT}\n",
            storage.display()
        );
        std::fs::create_dir_all(&storage)?;
        std::fs::write(&config, text)?;
        let log = std::fs::File::create(dir.join("registry.log"))?;
        let process = link
            .at_far("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start docker-registry")?;
        let address = SocketAddr::from((link.far(), PORT));
        let mut registry = Self { process, address };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_err() {
            if let Some(status) = registry.process.try_wait()? {
                let log = std::fs::read_to_string(dir.join("registry.log")).unwrap_or_default();
                bail!("docker-registry ended at once ({status}):\n{log}");
            }
            if Instant::now() > deadline {
                bail!("docker-registry does not answer on {address}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// `host:port` as seen through the link.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// `host:port` as seen in the registry's own namespace, where the link's rate does not count.
    pub(crate) fn local() -> String {
        format!("127.0.0.1:{PORT}")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself; waiting reaps it either way.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
