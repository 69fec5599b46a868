//! `skimmer doctor`: which attach modes this machine can run, and why not the others.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;
use skimmer_cachefiles::DeviceError;
use skimmer_cachefiles::probe::ProbeError;
use skimmer_client::Client;

use crate::{Global, daemon, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the cache is or will be: its file system decides, too.
    #[arg(long, default_value = "/var/lib/skimmer")]
    root: PathBuf,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Missing,
    Note,
}

#[derive(Serialize)]
struct Finding {
    /// What was looked at; attach modes by their name.
    subject: &'static str,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, state: State::Ok, found: found.into(), remedy: None }
    }

    fn note(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, state: State::Note, found: found.into(), remedy: None }
    }

    fn missing(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject, state: State::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(crate) async fn run(options: &Options, global: &Global) -> Result<()> {
    let findings = examine(options).await;
    let lazy = findings
        .iter()
        .any(|finding| matches!(finding.subject, "fscache" | "fanotify") && finding.state == State::Ok);
    if global.json {
        output::json(&findings)?;
    } else {
        for finding in &findings {
            let state = match finding.state {
                State::Ok => "ok",
                State::Missing => "missing",
                State::Note => "note",
            };
            output::line(&format!("{state:8} {:12} {}", finding.subject, finding.found))?;
            if let Some(remedy) = &finding.remedy {
                output::line(&format!("{:21} remedy: {remedy}", ""))?;
            }
        }
    }
    if !lazy {
        bail!("this machine can run neither attach mode that fetches on demand (fscache, fanotify)");
    }
    Ok(())
}

async fn examine(options: &Options) -> Vec<Finding> {
    let uname = rustix::system::uname();
    let mut findings = vec![Finding::note("kernel", uname.release().to_string_lossy())];
    let page = rustix::param::page_size();
    findings.push(if page == 4096 {
        Finding::ok("page size", "4096 bytes")
    } else {
        let found =
            format!("{page} bytes: images have 4096-byte blocks, and fscache needs both to be the same");
        Finding::missing("page size", found, "use the fanotify attach mode, or a kernel with 4 KiB pages")
    });
    findings.push(erofs());
    if !rustix::process::geteuid().is_root() {
        findings.push(Finding::missing(
            "privilege",
            "not root: the attach modes cannot be tried",
            "run skimmer doctor as root",
        ));
        return findings;
    }
    let running = Client::connect(&options.daemon.socket).await.ok();
    let status = match &running {
        Some(client) => client.status().await.ok(),
        None => None,
    };
    match status {
        Some(status) => {
            let found = format!("{} runs as process {}", status.version, status.pid);
            findings.push(Finding::ok("skimmerd", found));
            findings.push(if status.keeper.connected {
                Finding::ok("keeper", format!("{} answers", status.keeper.socket.display()))
            } else {
                Finding::missing("keeper", "skimmerd has no keeper", "see skimmerd's log for what ended it")
            });
            // The device has one opener, and that is the daemon's keeper: its own word is all there is.
            for mode in status.modes {
                let subject = mode.mode.name();
                findings.push(if mode.usable {
                    Finding::ok(subject, mode.reason)
                } else {
                    Finding::missing(subject, mode.reason, mode_remedy(subject))
                });
            }
        }
        None => {
            findings.push(Finding::note("skimmerd", "does not run; `skimmer mount` starts it"));
            let dir = existing(&options.root);
            findings.push(fscache(dir));
            findings.push(match skimmer_fanotify::probe(dir) {
                Ok(()) => Finding::ok("fanotify", format!("events come for files in {}", dir.display())),
                Err(error) => Finding::missing("fanotify", error.to_string(), mode_remedy("fanotify")),
            });
        }
    }
    findings
}

fn erofs() -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "erofs") {
        Finding::ok("erofs", "the kernel has it")
    } else {
        Finding::missing("erofs", "not in /proc/filesystems", "load it: modprobe erofs")
    }
}

fn fscache(dir: &Path) -> Finding {
    let tried = skimmer_cachefiles::probe::erofs_fsid().and_then(|()| skimmer_cachefiles::probe::device(dir));
    match tried {
        Ok(support) if support.restore => {
            Finding::ok("fscache", "the device binds, and a daemon that dies can be succeeded")
        }
        Ok(_) => Finding::missing(
            "fscache",
            "the kernel does not know `restore`: reads would fail when the daemon dies",
            "use Linux 6.1.95, 6.8 or later",
        ),
        Err(ProbeError::Device(error @ DeviceError::Busy { .. })) => {
            Finding::missing("fscache", error.to_string(), "stop the process that has it open")
        }
        Err(error) => Finding::missing("fscache", error.to_string(), mode_remedy("fscache")),
    }
}

fn mode_remedy(mode: &str) -> &'static str {
    match mode {
        "fscache" => {
            "use a kernel from 5.19 to 7.1 with CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND, or the fanotify mode"
        }
        "fanotify" => {
            "use Linux 6.14 or later with CONFIG_FANOTIFY_ACCESS_PERMISSIONS and CONFIG_EROFS_FS_BACKED_BY_FILE, and a cache on ext4, XFS or btrfs"
        }
        _ => "use Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE",
    }
}

/// The deepest directory on the way to `path` that is there: a cache that does not exist yet will be made in it.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"))
}
