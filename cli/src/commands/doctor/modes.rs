//! The attach modes: what the daemon says of them, else what comes of trying.

use std::path::Path;

use skimmer_cachefiles::DeviceError;
use skimmer_cachefiles::probe::ProbeError;
use skimmer_client::StatusReport;

use super::{Finding, existing};

/// As a running daemon sees them. The device has one opener, and that is the daemon's keeper: its own word is all
/// there is.
pub(super) fn told(status: &StatusReport) -> Vec<Finding> {
    let finding = |mode: &skimmer_client::ModeReport| {
        let subject = mode.mode.name();
        if mode.usable {
            Finding::ok(subject, mode.reason.clone())
        } else {
            Finding::missing(subject, mode.reason.clone(), remedy(subject))
        }
    };
    status.modes.iter().map(finding).collect()
}

/// By trying them, for a cache below `root`.
pub(super) fn tried(root: &Path) -> Vec<Finding> {
    let dir = existing(root);
    let fanotify = match skimmer_fanotify::probe(dir) {
        Ok(()) => Finding::ok("fanotify", format!("events come for files in {}", dir.display())),
        Err(error) => Finding::missing("fanotify", error.to_string(), remedy("fanotify")),
    };
    vec![fscache(dir), fanotify]
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
        Err(error) => Finding::missing("fscache", error.to_string(), remedy("fscache")),
    }
}

fn remedy(mode: &str) -> &'static str {
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
