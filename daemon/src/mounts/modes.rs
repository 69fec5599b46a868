//! Which attach modes this node can run, found out by trying.

use std::path::Path;

use skimmer_client::{AttachMode, ModeReport};
use skimmer_fanotify::Unsupported;

use super::failure::is_full;
use super::kernel;
use skimmer_config::Config;

/// The cachefiles device.
pub const CACHEFILES: &str = "/dev/cachefiles";

/// What trying every mode found.
#[derive(Debug, Clone)]
pub struct Probed {
    /// A report for each mode.
    pub reports: Vec<ModeReport>,
    /// There was no room for the file to try fanotify mode with: its report says nothing about the kernel.
    pub full: bool,
}

/// Tries every mode. `keeper`: why nothing can be watched, if so. `bound`: whether the cachefiles device is ours already.
pub fn probe(config: &Config, keeper: Result<(), &str>, bound: bool) -> Probed {
    let report = |mode, found: Result<String, String>| {
        let usable = found.is_ok();
        let (Ok(reason) | Err(reason)) = found;
        ModeReport { mode, usable, reason }
    };
    let mut full = false;
    let reports = vec![
        report(AttachMode::Fscache, fscache(config, bound)),
        report(AttachMode::Fanotify, fanotify(&config.root, keeper, &mut full)),
        report(AttachMode::Local, local()),
    ];
    Probed { reports, full }
}

fn fscache(config: &Config, bound: bool) -> Result<String, String> {
    if !config.fscache.enable {
        return Err("switched off in the configuration (fscache.enable)".into());
    }
    if !bound && !Path::new(CACHEFILES).exists() {
        return Err(format!(
            "{CACHEFILES} is not there: the kernel has no cachefiles, or its module is not loaded"
        ));
    }
    skimmer_cachefiles::probe::erofs_fsid().map_err(|error| error.to_string())?;
    Ok(format!("{CACHEFILES} and erofs fsid= mounts are there"))
}

fn fanotify(root: &Path, keeper: Result<(), &str>, full: &mut bool) -> Result<String, String> {
    keeper.map_err(|why| format!("no keeper: {why}"))?;
    kernel::probe_erofs()?;
    skimmer_fanotify::probe(root).map_err(|error| {
        *full = matches!(&error, Unsupported::Io { source, .. } if is_full(source));
        error.to_string()
    })?;
    Ok(format!("a read of a marked hole in {} raised its event", root.display()))
}

fn local() -> Result<String, String> {
    kernel::probe_erofs()?;
    Ok("for images whose chunks are all in the cache; needs Linux 6.12".into())
}

/// The modes to try for a request, best first, or why there is none.
///
/// # Errors
/// A text that lists why each mode cannot be used.
pub fn choose(wanted: AttachMode, reports: &[ModeReport]) -> Result<AttachMode, String> {
    let find = |mode| reports.iter().find(|report| report.mode == mode);
    match wanted {
        AttachMode::Auto => {
            let usable = |mode: &AttachMode| find(*mode).is_some_and(|report| report.usable);
            [AttachMode::Fscache, AttachMode::Fanotify].into_iter().find(usable).ok_or_else(|| {
                let why: Vec<_> = reports
                    .iter()
                    .filter(|report| report.mode != AttachMode::Local)
                    .map(|report| format!("{}: {}", report.mode, report.reason))
                    .collect();
                format!("no attach mode works on this node: {}", why.join("; "))
            })
        }
        mode => match find(mode) {
            Some(report) if report.usable => Ok(mode),
            Some(report) => Err(format!("attach mode {mode} does not work on this node: {}", report.reason)),
            None => Err(format!("attach mode {mode} is not known")),
        },
    }
}

/// Why `mode` was taken for a request of `wanted`, in a sentence for the user.
pub fn reason(wanted: AttachMode, mode: AttachMode, reports: &[ModeReport]) -> String {
    let text = |mode| reports.iter().find(|report| report.mode == mode).map_or("", |report| &report.reason);
    if wanted == AttachMode::Auto && mode != AttachMode::Fscache {
        format!("{}; fscache cannot be used: {}", text(mode), text(AttachMode::Fscache))
    } else {
        text(mode).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(fscache: bool, fanotify: bool) -> Vec<ModeReport> {
        let report =
            |mode: AttachMode, usable| ModeReport { mode, usable, reason: format!("because of {mode}") };
        vec![
            report(AttachMode::Fscache, fscache),
            report(AttachMode::Fanotify, fanotify),
            report(AttachMode::Local, true),
        ]
    }

    #[test]
    fn auto_prefers_fscache_and_explains_when_nothing_works() {
        assert_eq!(choose(AttachMode::Auto, &reports(true, true)), Ok(AttachMode::Fscache));
        assert_eq!(choose(AttachMode::Auto, &reports(false, true)), Ok(AttachMode::Fanotify));
        let why = choose(AttachMode::Auto, &reports(false, false)).unwrap_err();
        assert!(why.contains("because of fscache") && why.contains("because of fanotify"), "{why}");
    }

    #[test]
    fn a_named_mode_is_that_or_nothing() {
        assert_eq!(choose(AttachMode::Fanotify, &reports(true, true)), Ok(AttachMode::Fanotify));
        assert_eq!(
            reason(AttachMode::Fanotify, AttachMode::Fanotify, &reports(true, true)),
            "because of fanotify"
        );
        let auto = reason(AttachMode::Auto, AttachMode::Fanotify, &reports(false, true));
        assert!(auto.contains("because of fanotify") && auto.contains("because of fscache"), "{auto}");
        let why = choose(AttachMode::Fscache, &reports(false, true)).unwrap_err();
        assert!(why.contains("because of fscache"), "{why}");
    }
}
