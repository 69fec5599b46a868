//! The programs around: the daemon, containerd, the registry of an image.

use std::path::Path;
use std::time::Duration;

use skimmer_client::{Client, StatusReport};
use skimmer_config::Config;
use skimmer_fetcher::Reference;
use skimmer_fetcher::image::find;

use super::Finding;
use crate::commands::containerd;
use crate::image;

/// How long a registry may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The configuration, and whether it can be used.
pub(super) fn configuration(path: Option<&Path>) -> (Option<Config>, Finding) {
    let name = path.unwrap_or(Path::new(skimmer_config::DEFAULT_PATH));
    match Config::load(path) {
        Ok(config) => {
            let missing = config.missing();
            let finding = match missing.first() {
                Some(remark) => {
                    let found = format!("{}: `{}`: {}", name.display(), remark.key, remark.problem);
                    Finding::missing("config", found, "`skimmer config check` tells all of it")
                }
                None if name.exists() => Finding::ok("config", format!("{} can be used", name.display())),
                None => Finding::ok("config", "there is none: the defaults hold"),
            };
            (Some(config), finding)
        }
        Err(error) => {
            (None, Finding::missing("config", error.to_string(), "mend it; `skimmer config default` helps"))
        }
    }
}

/// What a running daemon says of itself; `None` when none runs.
pub(super) async fn daemon(socket: &Path) -> (Option<StatusReport>, Vec<Finding>) {
    let status = match Client::connect(socket).await {
        Ok(client) => client.status().await.ok(),
        Err(_) => None,
    };
    let Some(status) = status else {
        return (None, vec![Finding::note("skimmerd", "does not run; `skimmer mount` starts it")]);
    };
    let found = format!("{} runs as process {}", status.version, status.pid);
    let mut findings = vec![Finding::ok("skimmerd", found)];
    findings.push(if status.keeper.connected {
        Finding::ok("keeper", format!("{} answers", status.keeper.socket.display()))
    } else {
        Finding::missing("keeper", "skimmerd has no keeper", "see skimmerd's log for what ended it")
    });
    let faults = status.mounts.iter().filter_map(|mount| Some((&mount.target, mount.fault.as_ref()?)));
    for (target, fault) in faults {
        let found = format!("{} is not served: {fault}", target.display());
        findings.push(Finding::missing("mount", found, "see skimmerd's log, or mount it anew"));
    }
    (Some(status), findings)
}

/// Whether containerd's configuration names our snapshots, and whether they are served.
pub(super) fn containerd(config: &Config, runs: bool, file: &Path) -> Finding {
    let subject = "containerd";
    if !config.containerd.enable {
        return Finding::note(subject, "`containerd.enable` is false: no snapshots are served");
    }
    if !file.exists() {
        return Finding::note(subject, format!("{} is not there: containerd is not set up", file.display()));
    }
    let socket = config.containerd_socket();
    let patch = format!("skimmer containerd config --patch {}; then restart containerd", file.display());
    match containerd::is_wired(file, config) {
        Err(error) => Finding::hint(subject, format!("{error:#}"), patch),
        Ok(false) => Finding::hint(subject, format!("{} does not name our snapshots", file.display()), patch),
        Ok(true) if runs && !socket.exists() => Finding::missing(
            subject,
            format!("{} is not there, though skimmerd runs", socket.display()),
            "see skimmerd's log",
        ),
        Ok(true) => Finding::ok(subject, format!("{} names {}", file.display(), socket.display())),
    }
}

/// Whether the node's Dragonfly daemon answers; `None` when none is wanted.
pub(super) async fn dragonfly(config: &Config) -> Option<Finding> {
    let dragonfly = config.dragonfly.source().ok().flatten()?;
    let (subject, endpoint) = ("dragonfly", &dragonfly.endpoint);
    let remedy = "start dfdaemon, or clear `dragonfly.endpoint`; until then registry and mirrors are asked";
    Some(match tokio::time::timeout(PATIENCE, dragonfly.answers()).await {
        Ok(Ok(())) => Finding::ok(subject, format!("{endpoint} answers")),
        Ok(Err(error)) => Finding::missing(subject, format!("{endpoint}: {error}"), remedy),
        Err(_) => Finding::missing(subject, format!("{endpoint}: no answer"), remedy),
    })
}

/// Whether an image's registry answers, with the credentials that there are.
pub(super) async fn registry(name: &str, options: &image::Registry) -> Finding {
    let subject = "registry";
    let tried = async {
        let reference = Reference::parse_source(name)?;
        let mut options = options.open_options(&reference)?;
        options.attempts = 1;
        let found = tokio::time::timeout(PATIENCE, find(&reference, &options)).await;
        let found = found.map_err(|_| anyhow::anyhow!("{name}: no answer in {} s", PATIENCE.as_secs()))??;
        Ok::<_, anyhow::Error>(found)
    };
    match tried.await {
        Ok(_) => Finding::ok(subject, format!("{name} is there, and a converted image")),
        Err(error) => Finding::missing(
            subject,
            format!("{error:#}"),
            "check name, network and login (docker login, podman login, --creds, --ca, --plain-http)",
        ),
    }
}
