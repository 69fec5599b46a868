//! The story that both attach modes must live through, from an OCI image to reads that no daemon sees.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use skimmer_vm_images::run;

use crate::fixture::{self, LATE_FILE, LATE_SIZE};
use crate::registry::{PACKAGE, Registry};
use crate::skimmer::{Node, programs};
use crate::tree::{Entry, compare, report};

/// Debian packages that the story needs on the host.
pub const PACKAGES: [&str; 4] = [PACKAGE, "umoci", "tar", "e2fsprogs"];
/// What [`Node::read`] reads at a time, in bytes.
const BLOCK: usize = 65_536;

/// Images in a registry, and what they must look like.
pub struct Stage {
    /// Where they are.
    pub registry: Registry,
    /// The hard image.
    hard: String,
    /// Images of one large file.
    late: String,
    /// Another one.
    raw: String,
    /// The hard image with blocks of its files in a start blob.
    traced: String,
    /// The hard image as another implementation unpacks it.
    oracle: Vec<Entry>,
}

impl Stage {
    /// Makes the images in `scratch`, converts them with our `skimmer` and pushes them.
    ///
    /// # Errors
    /// Something fails: the message says what.
    pub fn set(scratch: &Path) -> Result<Self> {
        let hard = scratch.join("hard");
        fixture::hard_image(&hard)?;
        let oracle = fixture::oracle(&hard, &scratch.join("bundle"))?;
        let late = scratch.join("late");
        fixture::late_image(&late, 0)?;
        let raw = scratch.join("raw");
        fixture::late_image(&raw, 1)?;
        let registry = Registry::start(&scratch.join("registry"))?;
        let stage = Stage {
            hard: registry.reference("test/hard:v1"),
            late: registry.reference("test/late:v1"),
            raw: registry.reference("test/raw:v1"),
            traced: registry.reference("test/hard:traced"),
            registry,
            oracle,
        };
        let converted = scratch.join("hard-skimmer");
        publish(&format!("oci:{}:mixed", hard.display()), &stage.hard, &converted)?;
        publish_traced(&converted, &stage.traced, scratch)?;
        publish(&format!("oci:{}:late", late.display()), &stage.late, &scratch.join("late-skimmer"))?;
        publish(&format!("oci:{}:late", raw.display()), &stage.raw, &scratch.join("raw-skimmer"))?;
        Ok(stage)
    }
}

/// Converts an image with our `skimmer` into the layout `converted`, and pushes that to a registry as `reference`.
///
/// # Errors
/// Either fails: the message says what `skimmer` said.
pub fn publish(source: &str, reference: &str, converted: &Path) -> Result<()> {
    let skimmer: PathBuf = programs()?.swap_remove(0);
    run(Command::new(&skimmer).args(["convert", source]).arg(converted))?;
    run(Command::new(&skimmer).arg("push").arg(converted).arg(reference))?;
    Ok(())
}

/// Moves a block here and there of a converted image into a start blob, and pushes that image.
fn publish_traced(converted: &Path, reference: &str, scratch: &Path) -> Result<()> {
    let skimmer: PathBuf = programs()?.swap_remove(0);
    let told = run(Command::new(&skimmer).args(["inspect", "--json"]).arg(converted))?;
    let told: Value = serde_json::from_slice(&told)?;
    let blobs = told["blobs"].as_array().context("inspect lists no blobs")?;
    let mut reads = Vec::new();
    for (number, blob) in blobs.iter().enumerate() {
        let blocks = blob["device_bytes"].as_u64().context("a blob without a size")? / 4096;
        // Every seventh block and its neighbour, and one larger run.
        let single = (0..blocks).step_by(7).map(|block| (block, 2));
        for (block, count) in single.chain([(blocks / 2, 50)]) {
            reads.push(json!({
                "at_us": reads.len(), "blob": number, "offset": block * 4096, "length": count * 4096, "took_us": 1,
            }));
        }
    }
    let ids: Vec<&Value> = blobs.iter().map(|blob| &blob["id"]).collect();
    let trace = json!({
        "version": 1, "image": reference, "bootstrap": "", "mode": "fanotify", "record": "exact", "cut": false,
        "blobs": ids, "reads": reads, "fetches": [],
    });
    let path = scratch.join("trace.json");
    std::fs::write(&path, serde_json::to_vec(&trace)?)?;
    run(Command::new(&skimmer).arg("optimize").arg("--trace").arg(&path).arg(converted).arg(reference))?;
    Ok(())
}

/// Plays the story on a node. `directory` is a place for mount points on its machine.
///
/// # Errors
/// Anything that is not as it must be.
pub fn play(stage: &mut Stage, node: &mut Node<'_>, directory: &str, mode: &str) -> Result<()> {
    let (hard, late) = (format!("{directory}/hard"), format!("{directory}/late"));

    step("the mounted image equals the unpacked one");
    node.mount(&stage.hard, &hard, mode)?;
    equal(&stage.oracle, &node.list(&hard)?, "first read")?;

    step("a second full read causes no request at all");
    wait_until_complete(node, mode)?;
    let asked = node.counter("skimmer_kernel_requests_total")?;
    ensure!(asked > 0.0, "the first read caused no request: was the image fetched on demand?");
    let served = stage.registry.requests()?.len();
    node.drop_caches()?;
    equal(&stage.oracle, &node.list(&hard)?, "second read")?;
    let asked_again = node.counter("skimmer_kernel_requests_total")? - asked;
    ensure!(asked_again == 0.0, "the second read caused {asked_again} requests to the daemon");
    let requests = stage.registry.requests()?;
    ensure!(requests.len() == served, "the second read reached the registry: {:?}", &requests[served..]);

    step("cached data is served with the daemon killed");
    node.kill_daemon()?;
    node.drop_caches()?;
    equal(&stage.oracle, &node.list(&hard)?, "read without a daemon")?;

    step("a read of what is not cached waits for the next daemon");
    node.mount(&stage.late, &late, mode)?;
    let file = format!("{late}/{LATE_FILE}");
    let content = fixture::content(fixture::late_seed(0), LATE_SIZE);
    let expect = |bytes: &[u8], block, blocks, what: &str| is_part(&content, bytes, block, blocks, what);
    let output = node.read(&file, 3, 1)?.wait()?;
    expect(&output.stdout, 3, 1, "a read with the daemon alive")?;
    node.kill_daemon()?;
    let far = LATE_SIZE / BLOCK - 100;
    let mut waiting = node.read(&file, far, 4)?;
    ensure!(
        waiting.still_runs_after(Duration::from_secs(2)),
        "a read of what is not cached ended without a daemon: {}",
        waiting.wait()?.describe()
    );
    node.start_daemon()?;
    let output = waiting.wait()?;
    ensure!(output.success(), "the waiting read failed: {}", output.describe());
    expect(&output.stdout, far, 4, "the read that waited")?;

    step("the daemon that came back serves everything");
    let output = node.read(&file, 0, LATE_SIZE / BLOCK)?.wait()?;
    expect(&output.stdout, 0, LATE_SIZE / BLOCK, "the whole file")?;
    node.drop_caches()?;
    equal(&stage.oracle, &node.list(&hard)?, "the first image, after the daemon's return")?;

    step("an image with a start blob equals the unpacked one, and its start blob comes unasked");
    let traced = format!("{directory}/traced");
    node.mount_with(&stage.traced, &traced, mode, &["--record=events"])?;
    equal(&stage.oracle, &node.list(&traced)?, "read of the image with a start blob")?;
    let recording: Value = serde_json::from_slice(&node.recording(&traced)?)?;
    let fetches = recording["fetches"].as_array().context("a recording without fetches")?;
    let start = recording["blobs"].as_array().and_then(|blobs| blobs.len().checked_sub(1));
    let ahead = |fetch: &&Value| fetch["blob"].as_u64() == start.and_then(|start| start.try_into().ok());
    ensure!(fetches.iter().filter(ahead).any(|fetch| fetch["demand"] == false), "{recording}");
    node.umount(&traced)?;

    by_others(stage, node, directory, mode)?;

    step("both mounts go away");
    node.umount(&late)?;
    node.umount(&hard)?;
    ensure!(node.list(&hard)?.len() == 1, "something is still mounted on {hard}");
    let mounts = node.status()?["mounts"].as_array().map(Vec::len);
    ensure!(mounts == Some(0), "the daemon still knows of mounts: {mounts:?}");

    step("daemon and keeper end");
    node.stop()?;
    Ok(())
}

/// Another program mounts an image that is only prepared.
fn by_others(stage: &Stage, node: &mut Node<'_>, directory: &str, mode: &str) -> Result<()> {
    step("a prepared image is mounted by a plain system call, and read on demand");
    let target = format!("{directory}/raw");
    let prepared = node.prepare(&stage.raw, mode)?;
    ensure!(prepared["mode"] == mode, "{prepared}");
    ensure!(node.prepare(&stage.raw, mode)? == prepared, "prepared twice it is another");
    node.mount_plainly(&prepared, &target)?;
    let content = fixture::content(fixture::late_seed(1), LATE_SIZE);
    let file = format!("{target}/{LATE_FILE}");
    let read = |node: &Node<'_>, block: usize, blocks: usize, what: &str| {
        let output = node.read(&file, block, blocks)?.wait()?;
        is_part(&content, &output.stdout, block, blocks, what)
    };
    read(node, 5, 2, "a read through a plain mount")?;

    step("the daemon that came back serves it too");
    node.kill_daemon()?;
    node.start_daemon()?;
    read(node, LATE_SIZE / BLOCK - 9, 9, "a read through a plain mount after the daemon's return")?;
    let listed = node.status()?["prepared"].clone();
    ensure!(listed.as_array().is_some_and(|all| all.len() == 1), "{listed}");
    ensure!(node.release(&stage.raw).is_err(), "a mounted image is released");

    step("it is released with its last mount, and cannot be mounted any more");
    node.umount_plainly(&target)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while node.status()?["prepared"] != json!([]) {
        ensure!(Instant::now() < deadline, "nobody mounts it, and it is not released");
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(node.mount_plainly(&prepared, &target).is_err(), "an image that was released is mounted");
    node.prepare(&stage.raw, mode)?;
    node.release(&stage.raw)?;
    ensure!(node.status()?["prepared"] == json!([]), "released, and still there");
    Ok(())
}

/// Fails when `bytes` are not these blocks of `content`.
fn is_part(content: &[u8], bytes: &[u8], block: usize, blocks: usize, what: &str) -> Result<()> {
    let expected = &content[block * BLOCK..(block + blocks) * BLOCK];
    ensure!(bytes.len() == expected.len(), "{what}: {} bytes of {}", bytes.len(), expected.len());
    let wrong = bytes.iter().zip(expected).position(|(a, b)| a != b);
    ensure!(wrong.is_none(), "{what}: byte {wrong:?} is wrong");
    Ok(())
}

fn step(what: &str) {
    eprintln!("  {what}");
}

/// Fails when `found` differs from `expected`, and tells in what.
///
/// # Errors
/// The differences, after `what` was done.
pub fn equal(expected: &[Entry], found: &[Entry], what: &str) -> Result<()> {
    let differences = compare(expected, found);
    ensure!(differences.is_empty(), "{what}: {} differences:\n{}", differences.len(), report(&differences));
    Ok(())
}

/// Waits until everything that the image refers to is ready. On fanotify a complete blob then loses its mark as soon as
/// its data is durable; reads raise events until then.
fn wait_until_complete(node: &Node<'_>, mode: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = node.status()?;
        let blobs = status["blobs"].as_array().context("status lists no blobs")?;
        ensure!(!blobs.is_empty(), "the daemon knows of no blob: {status}");
        let complete = |blob: &Value| {
            blob["ready_bytes"].is_u64()
                && blob["ready_bytes"] == blob["referenced_bytes"]
                && (mode != "fanotify" || blob["watched"] == false)
        };
        if blobs.iter().all(complete) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "after a full read blobs are not complete: {status}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
