//! Boots the guests: modules load, the kernel interfaces are there, the agent does its work.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;
use std::time::Duration;

use kernel_tests::skips::skip;
use skimmer_vm_images::{AttachMode, BootConfig, GuestRoot, Vm, command, disk, prepare, recipes};

const SHORT: Duration = Duration::from_secs(30);

#[test]
fn guests_boot_with_on_demand_modules() {
    if let Some(why) = skimmer_vm_images::missing() {
        return skip("guests_boot_with_on_demand_modules", &why);
    }
    for recipe in recipes().unwrap() {
        boots(&recipe.name);
    }
}

fn boots(name: &str) {
    let kernel = prepare(name).unwrap();
    let root = GuestRoot::new(Path::new(env!("CARGO_BIN_EXE_skimmer-agent")));
    let initramfs = root.build(&kernel).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let (cache, data) = (scratch.path().join("cache"), scratch.path().join("data"));
    disk::empty(&cache, 256 << 20).unwrap();
    let tree = scratch.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("hello"), b"from the host\n").unwrap();
    disk::from_directory(&data, &tree).unwrap();
    let config = BootConfig::new(&kernel, &initramfs).disk("cache", &cache, false).disk("data", &data, true);

    let vm = Vm::boot(&config).unwrap();
    eprintln!("{}: up after {:?}", vm.guest().release, vm.guest().boot_time);
    assert_eq!(vm.guest().release, kernel.release);
    let device = |name: &str| vm.guest().disks[name].clone();
    vm.check(&["mkdir", "/cache", "/data"], SHORT).unwrap();
    vm.check(&["mount", "-t", "ext4", &device("cache"), "/cache"], SHORT).unwrap();
    vm.check(&["mount", "-t", "ext4", "-o", "ro", &device("data"), "/data"], SHORT).unwrap();
    assert_eq!(vm.get("/data/hello", 100).unwrap(), b"from the host\n");

    if kernel.attach.contains(&AttachMode::Fscache) {
        vm.check(&["test", "-c", "/dev/cachefiles"], SHORT).unwrap();
        // With the option built in and no cache bound the mount fails for want of the cache, and the kernel says
        // nothing of an unknown or unsupported option.
        let output = vm.run(&["mount", "-t", "erofs", "none", "/mnt", "-o", "fsid=probe"], SHORT).unwrap();
        assert!(!output.success());
        let log = String::from_utf8(vm.check(&["dmesg"], SHORT).unwrap()).unwrap();
        assert!(log.contains("erofs"), "{log}");
        for complaint in ["fsid option not supported", "Unknown parameter", "nknown mount option"] {
            assert!(!log.contains(complaint), "{log}");
        }
    }

    // The agent: commands side by side, signals, files, listings.
    let sleeper = vm.start(command(&["sleep", "1000"], Duration::from_secs(1000))).unwrap();
    vm.put("/cache/file", 0o600, &[0, 1, 2, 255]).unwrap();
    assert_eq!(vm.get("/cache/file", 4).unwrap(), [0, 1, 2, 255]);
    assert!(vm.get("/cache/file", 3).unwrap_err().to_string().contains("guest"));
    let lines = vm.check(&["skimmer-agent", "treelist", "/cache"], SHORT).unwrap();
    let lines = String::from_utf8(lines).unwrap();
    let entries: Vec<kernel_tests::tree::Entry> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
    assert_eq!(paths, [".", "file", "lost+found"]);
    sleeper.signal(15).unwrap();
    assert_eq!(sleeper.wait().unwrap().signal, Some(15));
    assert!(vm.run(&["sleep", "1000"], Duration::from_millis(300)).unwrap().timed_out);
    assert!(vm.check(&["false"], SHORT).is_err());
    vm.check(&["ping", "-c", "1", "-W", "5", "10.0.2.2"], SHORT).unwrap();

    // What is synced survives a cut; what went through a power-off does too.
    vm.check(&["sync"], SHORT).unwrap();
    vm.reset();
    let vm = Vm::boot(&config).unwrap();
    vm.check(&["mkdir", "/cache"], SHORT).unwrap();
    vm.check(&["mount", "-t", "ext4", &vm.guest().disks["cache"], "/cache"], SHORT).unwrap();
    assert_eq!(vm.get("/cache/file", 4).unwrap(), [0, 1, 2, 255]);
    vm.put("/cache/second", 0o644, b"x").unwrap();
    vm.power_off(SHORT).unwrap();
    let names =
        skimmer_vm_images::run(std::process::Command::new("debugfs").args(["-R", "ls /"]).arg(&cache))
            .unwrap();
    assert!(String::from_utf8_lossy(&names).contains("second"));
}
