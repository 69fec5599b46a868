//! Tests that cannot run on this machine say so, and are counted.

use std::process::{Command, Stdio};

pub use skimmer_test_support::skip;

/// Why this process cannot mount and mark files, or `None` when it is root.
#[must_use]
pub fn not_root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned())
}

/// Why this kernel has no pre-content events on file-backed EROFS mounts. What it reports of itself decides, not our
/// own probe: a broken probe must fail the test, not skip it.
#[must_use]
pub fn no_precontent_events() -> Option<String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 15) {
        return Some(format!("Linux {release} has no pre-content events for EROFS; 6.15 has"));
    }
    // Loads the module where there is one.
    let _ = Command::new("modprobe").arg("erofs").stderr(Stdio::null()).status();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let erofs = known.lines().any(|line| line.split_whitespace().last() == Some("erofs"));
    (!erofs).then(|| format!("Linux {release} has no EROFS"))
}
