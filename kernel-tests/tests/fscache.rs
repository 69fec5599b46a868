//! On-demand reads over fscache, in guests whose kernels have it.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;

use kernel_tests::machine::Machine;
use kernel_tests::scenario::{PACKAGES, Stage, play};
use kernel_tests::skimmer::Node;
use kernel_tests::skips::{not_root, skip};
use skimmer_vm_images::{AttachMode, apt, recipes};

#[test]
fn an_image_lives_on_fscache() {
    // Root unpacks the oracle with its devices and owners.
    if let Some(why) = skimmer_vm_images::missing().or_else(not_root) {
        return skip("an_image_lives_on_fscache", &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut stage = Stage::set(scratch.path()).unwrap();
    for recipe in recipes().unwrap() {
        if recipe.attach.contains(&AttachMode::Fscache) {
            lives_on(&recipe.name, &mut stage, scratch.path());
        }
    }
}

fn lives_on(name: &str, stage: &mut Stage, scratch: &Path) {
    let (agent, cache) = (env!("CARGO_BIN_EXE_skimmer-agent"), scratch.join(format!("cache-{name}")));
    let machine = Machine::guest(name, Path::new(agent), &cache, 1 << 30, stage.registry.port()).unwrap();
    let mut node =
        Node::new(&machine, "/bin", "/bin/skimmer-agent", "/run/skimmer", "/cache/skimmer").unwrap();
    // Started here and not by the first mount: emulated on a busy host it takes longer than a user would wait.
    node.start_daemon().unwrap();
    if let Err(error) = play(stage, &mut node, "/mnt", "fscache") {
        panic!("{name}: {error:#}\n{}\n{}", node.log(), machine.kernel_log());
    }
}
