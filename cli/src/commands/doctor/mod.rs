//! `skimmer doctor`: what this machine can do, what keeps it from doing more, and what to do about that.

mod modes;
mod programs;
mod system;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::{Global, daemon, image, output};

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the cache is or will be: its file system decides, too [default: what the configuration says].
    #[arg(long)]
    root: Option<PathBuf>,
    /// Configuration of skimmerd [default: /etc/skimmer/config.toml when it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// containerd's configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    containerd: PathBuf,
    /// Also ask this image's registry for it.
    #[arg(long)]
    image: Option<String>,
    #[command(flatten)]
    registry: image::Registry,
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

    /// Something that is missing only for those who want it.
    fn hint(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject, state: State::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn missing(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject, state: State::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(crate) async fn run(options: &Options, global: &Global) -> Result<()> {
    let findings = examine(options).await;
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
    let is_mode = |finding: &&Finding| matches!(finding.subject, "fscache" | "fanotify");
    if !findings.iter().filter(is_mode).any(|finding| finding.state == State::Ok) {
        bail!("this machine can run neither attach mode that fetches on demand (fscache, fanotify)");
    }
    // One mode is enough, and the local one needs less than either.
    let is_optional = |finding: &Finding| matches!(finding.subject, "fscache" | "fanotify" | "local");
    let missing = findings.iter().filter(|finding| finding.state == State::Missing && !is_optional(finding));
    let subjects: Vec<&str> = missing.map(|finding| finding.subject).collect();
    if !subjects.is_empty() {
        bail!("not all is well: {}", subjects.join(", "));
    }
    Ok(())
}

async fn examine(options: &Options) -> Vec<Finding> {
    let (config, finding) = programs::configuration(options.config.as_deref());
    let config = config.unwrap_or_default();
    let (status, about_daemon) = programs::daemon(&options.daemon.socket).await;
    let running = status.as_ref().map(|status| &status.root);
    let root = options.root.as_ref().or(running).unwrap_or(&config.root);
    let mut findings = system::examine(root);
    findings.push(finding);
    if !rustix::process::geteuid().is_root() {
        findings.push(Finding::missing(
            "privilege",
            "not root: the attach modes cannot be tried",
            "run skimmer doctor as root",
        ));
        return findings;
    }
    findings.extend(about_daemon);
    findings.extend(status.as_ref().map_or_else(|| modes::tried(root), modes::told));
    findings.push(programs::containerd(&config, status.is_some(), &options.containerd));
    findings.extend(programs::dragonfly(&config).await);
    if let Some(image) = &options.image {
        findings.push(programs::registry(image, &options.registry).await);
    }
    findings
}

/// The deepest directory on the way to `path` that is there: a cache that does not exist yet will be made in it.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"))
}
