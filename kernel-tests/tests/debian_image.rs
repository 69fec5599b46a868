//! The demo's image through both attach modes, name by name and byte by byte, against another unpacker's tree.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kernel_tests::debian_image::{self, PYTHON, TAG};
use kernel_tests::fixture::unpack;
use kernel_tests::machine::Machine;
use kernel_tests::registry::Registry;
use kernel_tests::scenario::{PACKAGES, equal, publish};
use kernel_tests::skimmer::{Node, programs};
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use kernel_tests::tree::{Entry, Kind, list};
use skimmer_vm_images::{AttachMode, apt, recipes};

/// Of the guest's cache file system: several times the image's files.
const CACHE_BYTES: u64 = 4 << 30;

#[test]
fn the_demos_image_is_the_same_in_both_modes() {
    // Root makes the image and unpacks the oracle with owners and capabilities.
    if let Some(why) = not_root() {
        return skip("the_demos_image_is_the_same_in_both_modes", &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let stage = timed("set the stage", || Stage::set(scratch.path())).unwrap();
    match no_precontent_events() {
        Some(why) => skip("the_demos_image_is_the_same_on_fanotify", &why),
        None => on_fanotify(&stage, scratch.path()),
    }
    match skimmer_vm_images::missing() {
        Some(why) => skip("the_demos_image_is_the_same_on_fscache", &why),
        None => on_fscache(&stage, scratch.path()),
    }
}

/// The image in a registry, and what it must look like.
struct Stage {
    registry: Registry,
    reference: String,
    oracle: Vec<Entry>,
}

impl Stage {
    fn set(scratch: &Path) -> Result<Self> {
        let layout = debian_image::prepare(&PYTHON)?;
        let oracle = list(&unpack(&layout, TAG, &scratch.join("bundle"))?)?;
        let bytes: u64 = oracle.iter().filter(|entry| entry.kind == Kind::File).map(|entry| entry.size).sum();
        eprintln!("  {} names, {bytes} bytes in files", oracle.len());
        // What makes this image more than a heap of files; the comparison would not miss what is not there.
        let with = |what: fn(&Entry) -> bool| oracle.iter().any(what);
        ensure!(with(|entry| entry.hard_link.is_some()), "no hard link");
        ensure!(with(|entry| entry.xattrs.contains_key("security.capability")), "no capability");
        ensure!(with(|entry| entry.kind == Kind::Symlink), "no symlink");
        ensure!(!with(|entry| entry.path == "usr/share/doc"), "the whiteout does nothing");
        let registry = Registry::start(&scratch.join("registry"))?;
        let reference = registry.reference("demo/python:v1");
        let source = format!("oci:{}:{TAG}", layout.display());
        timed("convert and push", || publish(&source, &reference, &scratch.join("converted")))?;
        Ok(Stage { registry, reference, oracle })
    }
}

fn on_fanotify(stage: &Stage, scratch: &Path) {
    let machine = Machine::host();
    let sockets = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let programs = text(programs().unwrap()[0].parent().unwrap());
    let (root, target) = (text(&scratch.join("root")), text(&scratch.join("mount")));
    let agent = env!("CARGO_BIN_EXE_skimmer-agent");
    let mut node = Node::new(&machine, &programs, agent, &text(sockets.path()), &root).unwrap();
    if let Err(error) = is_the_same(stage, &mut node, &target, "fanotify") {
        panic!("{error:#}\n{}", node.log());
    }
}

fn on_fscache(stage: &Stage, scratch: &Path) {
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    for recipe in recipes().unwrap() {
        if !recipe.attach.contains(&AttachMode::Fscache) {
            continue;
        }
        let name = recipe.name.as_str();
        let cache = scratch.join(format!("cache-{name}"));
        let machine = Machine::guest(name, agent, &cache, CACHE_BYTES, stage.registry.port()).unwrap();
        let mut node =
            Node::new(&machine, "/bin", "/bin/skimmer-agent", "/run/skimmer", "/cache/skimmer").unwrap();
        // Started here and not by the mount: emulated on a busy host it takes longer than a user would wait.
        node.start_daemon().unwrap();
        if let Err(error) = is_the_same(stage, &mut node, "/mnt/demo", "fscache") {
            panic!("{name}: {error:#}\n{}\n{}", node.log(), machine.kernel_log());
        }
    }
}

/// Mounts the image and compares all of it, read on demand.
fn is_the_same(stage: &Stage, node: &mut Node<'_>, target: &str, mode: &str) -> Result<()> {
    timed(&format!("{mode}: mount"), || node.mount(&stage.reference, target, mode))?;
    let found = timed(&format!("{mode}: read and list everything"), || node.list(target))?;
    equal(&stage.oracle, &found, mode)?;
    let asked = node.counter("skimmer_kernel_requests_total")?;
    eprintln!("  {mode}: {} names are the same, after {asked} requests of the kernel", found.len());
    ensure!(asked > 0.0, "no request reached the daemon: was the image fetched on demand?");
    node.umount(target)?;
    node.stop()
}

/// Does something and notes how long it took.
fn timed<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = action();
    let took = Duration::from_millis(u64::try_from(start.elapsed().as_millis())?);
    eprintln!("  {what}: {took:?}");
    result
}
