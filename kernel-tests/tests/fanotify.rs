//! On-demand reads through pre-content events: on this host when its kernel can, and in guests whose kernels can.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;

use kernel_tests::machine::Machine;
use kernel_tests::scenario::{PACKAGES, Stage, play};
use kernel_tests::skimmer::{Node, programs};
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use skimmer_vm_images::{AttachMode, apt, recipes};

#[test]
fn an_image_lives_on_fanotify_in_guests() {
    if let Some(why) = skimmer_vm_images::missing().or_else(not_root) {
        return skip("an_image_lives_on_fanotify_in_guests", &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut stage = Stage::set(scratch.path()).unwrap();
    for recipe in recipes().unwrap() {
        if recipe.attach.contains(&AttachMode::Fanotify) {
            let cache = scratch.path().join(format!("cache-{}", recipe.name));
            let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
            let port = stage.registry.port();
            let machine = Machine::guest(&recipe.name, agent, &cache, 1 << 30, port).unwrap();
            let mut node =
                Node::new(&machine, "/bin", "/bin/skimmer-agent", "/run/skimmer", "/cache/skimmer").unwrap();
            node.start_daemon().unwrap();
            if let Err(error) = play(&mut stage, &mut node, "/mnt", "fanotify") {
                panic!("{}: {error:#}\n{}\n{}", recipe.name, node.log(), machine.kernel_log());
            }
        }
    }
}

#[test]
fn an_image_lives_on_fanotify() {
    if let Some(why) = not_root().or_else(no_precontent_events) {
        return skip("an_image_lives_on_fanotify", &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    // The cache needs a real file system; sockets need short paths.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let mut stage = Stage::set(scratch.path()).unwrap();
    let machine = Machine::host();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let programs = text(programs().unwrap()[0].parent().unwrap());
    let (root, mounts) = (text(&scratch.path().join("root")), text(&scratch.path().join("mounts")));
    let agent = env!("CARGO_BIN_EXE_skimmer-agent");
    let mut node = Node::new(&machine, &programs, agent, &text(sockets.path()), &root).unwrap();
    if let Err(error) = play(&mut stage, &mut node, &mounts, "fanotify") {
        panic!("{error:#}\n{}", node.log());
    }
}
