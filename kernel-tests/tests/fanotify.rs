//! On-demand reads through pre-content events, on this host when its kernel can.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use kernel_tests::machine::Machine;
use kernel_tests::scenario::{PACKAGES, Stage, play};
use kernel_tests::skimmer::{Node, programs};
use kernel_tests::skips::{not_root, skip};
use skimmer_vm_images::apt;

#[test]
fn an_image_lives_on_fanotify() {
    if let Some(why) = not_root().or_else(unable) {
        return skip("an_image_lives_on_fanotify", &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    // The cache needs a real file system; sockets need short paths.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let mut stage = Stage::set(scratch.path()).unwrap();
    let machine = Machine::host();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let programs = text(programs().unwrap()[0].parent().unwrap());
    let (root, mounts) = (text(&scratch.path().join("root")), text(&scratch.path().join("mounts")));
    let agent = env!("CARGO_BIN_EXE_skimmer-agent");
    let mut node = Node::new(&machine, &programs, agent, &text(sockets.path()), &root).unwrap();
    if let Err(error) = play(&mut stage, &mut node, &mounts, "fanotify") {
        panic!("{error:#}\n{}", node.log());
    }
}

/// Why this kernel has no pre-content events on file-backed EROFS mounts. What it reports of itself decides, not our
/// own probe: a broken probe must fail the test, not skip it.
fn unable() -> Option<String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 15) {
        return Some(format!("Linux {release} has no pre-content events for EROFS; 6.15 has"));
    }
    // Loads the module where there is one.
    let _ = std::process::Command::new("modprobe").arg("erofs").stderr(std::process::Stdio::null()).status();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let erofs = known.lines().any(|line| line.split_whitespace().last() == Some("erofs"));
    (!erofs).then(|| format!("Linux {release} has no EROFS"))
}
