//! On-demand reads over fscache, in guests whose kernels have it.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;
use std::time::Duration;

use kernel_tests::machine::Machine;
use kernel_tests::scenario::{PACKAGES, Stage, play};
use kernel_tests::skimmer::{Node, programs};
use kernel_tests::skips::{not_root, skip};
use skimmer_vm_images::{AttachMode, BootConfig, GuestRoot, Vm, apt, disk, prepare, recipes};

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
    let kernel = prepare(name).unwrap();
    let mut root = GuestRoot::new(Path::new(env!("CARGO_BIN_EXE_skimmer-agent")));
    for program in programs().unwrap() {
        root.program(&program).unwrap();
    }
    let initramfs = root.build(&kernel).unwrap();
    let cache = scratch.join(format!("cache-{name}"));
    disk::empty(&cache, 1 << 30).unwrap();
    let vm = Vm::boot(&BootConfig::new(&kernel, &initramfs).disk("cache", &cache, false)).unwrap();
    eprintln!("{}: up after {:?}", vm.guest().release, vm.guest().boot_time);
    vm.forward(stage.registry.port()).unwrap();
    let device = vm.guest().disks["cache"].clone();
    let machine = Machine::Guest(vm);
    let short = Duration::from_secs(30);
    machine.check(&["mkdir", "/cache"], short).unwrap();
    machine.check(&["mount", "-t", "ext4", &device, "/cache"], short).unwrap();
    let mut node =
        Node::new(&machine, "/bin", "/bin/skimmer-agent", "/run/skimmer", "/cache/skimmer").unwrap();
    // Started here and not by the first mount: emulated on a busy host it takes longer than a user would wait.
    node.start_daemon().unwrap();
    if let Err(error) = play(stage, &mut node, "/mnt", "fscache") {
        panic!("{name}: {error:#}\n{}\n{}", node.log(), dmesg(&machine));
    }
}

fn dmesg(machine: &Machine) -> String {
    let output = machine.run(&["sh", "-c", "dmesg | tail -n 40"], Duration::from_secs(30));
    output.map_or_else(|error| error.to_string(), |output| output.describe())
}
