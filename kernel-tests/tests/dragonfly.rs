//! Three nodes start the same image by way of a real Dragonfly cluster.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kernel_tests::debian_image::{self, NODE, PERL, PYTHON, Program, TAG};
use kernel_tests::dragonfly::{self, Network, Node, Scheduler};
use kernel_tests::registry::Registry;
use kernel_tests::scenario::PACKAGES;
use kernel_tests::skimmer::programs;
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use skimmer_vm_images::{apt, run};

const NODES: u8 = 3;
/// What a read would wait for a peer that hangs, if it waited for dfdaemon's own end of patience.
const HUNG: Duration = Duration::from_secs(10);

#[test]
fn three_nodes_ask_the_registry_once() {
    let test = "three_nodes_ask_the_registry_once";
    if let Some(why) = not_root().or_else(no_precontent_events).or_else(dragonfly::missing) {
        return skip(test, &why);
    }
    apt::ensure(&PACKAGES).unwrap();
    apt::ensure(&dragonfly::PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if let Err(error) = play(scratch.path()) {
        panic!("{error:#}");
    }
}

fn play(scratch: &Path) -> Result<()> {
    let network = Network::new(NODES)?;
    let address = TcpListener::bind(SocketAddr::from((network.host(), 0)))?.local_addr()?;
    let place = scratch.join("registry");
    let mut registry = Registry::start_by(Command::new("docker-registry"), &place, &place, address)?;
    for program in [&PERL, &PYTHON, &NODE] {
        let source = format!("oci:{}:{TAG}", debian_image::prepare(program)?.display());
        let (skimmer, converted) = (programs()?.swap_remove(0), scratch.join(program.name));
        run(Command::new(&skimmer).args(["convert", &source]).arg(&converted))?;
        let push = ["push", "--plain-http"];
        run(Command::new(&skimmer).args(push).arg(&converted).arg(registry.reference(program.name)))?;
    }
    let scheduler = Scheduler::start(&network, &scratch.join("scheduler"))?;
    let mut nodes = Vec::new();
    for number in 1..=NODES {
        let directory = scratch.join(format!("node{number}"));
        nodes.push(Node::start(&network, &scheduler, number, address, &directory)?);
    }
    let logs = |nodes: &[Node]| nodes.iter().map(Node::log).collect::<Vec<_>>().join("\n");

    let image = registry.reference("perl");
    let before = registry.sent_bytes()?;
    start(&nodes[0], &image, &PERL).with_context(|| logs(&nodes))?;
    let one = registry.sent_bytes()? - before;
    for node in &nodes[1..] {
        start(node, &image, &PERL).with_context(|| logs(&nodes))?;
    }
    let all = registry.sent_bytes()? - before;
    for node in &nodes {
        let (registry, peers) = node.received()?;
        println!(
            "{registry} bytes from the registry, {peers} from Dragonfly; of its own {} from peers, {} from the registry",
            node.traffic("REMOTE_PEER")?,
            node.traffic("BACK_TO_SOURCE")?
        );
    }
    for node in &nodes[1..] {
        ensure!(node.traffic("REMOTE_PEER")? > 0, "no peer sent anything\n{}", logs(&nodes));
    }
    println!("one node's start took {one} bytes from the registry, three took {all}");
    ensure!(all * 10 <= one * 12, "three nodes took {all} bytes, one {one}\n{}", logs(&nodes));

    // Another image: a daemon that others got it from hangs in the middle of the last node's start.
    let image = registry.reference("python");
    let before = registry.sent_bytes()?;
    start_in_halves(&nodes[0], &image, &PYTHON, || Ok(()))?;
    let one = registry.sent_bytes()? - before;
    start_in_halves(&nodes[1], &image, &PYTHON, || Ok(()))?;
    let slowest = start_in_halves(&nodes[2], &image, &PYTHON, || nodes[0].freeze_dfdaemon(true))?;
    nodes[0].freeze_dfdaemon(false)?;
    let all = registry.sent_bytes()? - before;
    println!(
        "one node's start took {one} bytes from the registry, three took {all} with one of the peers stopped in the \
         middle; the slowest read took {slowest:?}"
    );
    ensure!(all * 10 <= one * 12, "three nodes took {all} bytes, one {one}\n{}", logs(&nodes));
    ensure!(slowest < HUNG / 2, "a read took {slowest:?}\n{}", logs(&nodes));

    // A third one: the only daemon that has it hangs, and then one in the middle of its own node's start.
    let image = registry.reference("node");
    start(&nodes[0], &image, &NODE)?;
    nodes[0].freeze_dfdaemon(true)?;
    let slowest = start(&nodes[1], &image, &NODE)?;
    println!("with the only peer stopped, the slowest read took {slowest:?}");
    nodes[0].freeze_dfdaemon(false)?;
    ensure!(slowest < HUNG / 2, "a read took {slowest:?}\n{}", logs(&nodes));
    let slowest = start_in_halves(&nodes[2], &image, &NODE, || nodes[2].freeze_dfdaemon(true))?;
    nodes[2].freeze_dfdaemon(false)?;
    println!("with the node's own daemon stopped half way, the slowest read took {slowest:?}");
    ensure!(slowest < HUNG / 2, "a read took {slowest:?}\n{}", logs(&nodes));
    nodes.into_iter().try_for_each(Node::end)
}

/// Mounts an image on a node and runs its program; says how long its slowest read waited.
fn start(node: &Node, image: &str, program: &Program) -> Result<Duration> {
    let target = node.mount(image)?;
    let result = run_in(&target, program);
    let slowest = node.umount(&target)?;
    result.map(|()| slowest)
}

/// The same, with something between a first half and a second one.
fn start_in_halves(
    node: &Node,
    image: &str,
    program: &Program,
    between: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    let target = node.mount(image)?;
    let main = program.run[0].trim_start_matches('/');
    let first = run(Command::new("sha256sum").arg(target.join(main)));
    let result = first.and_then(|_| between()).and_then(|()| run_in(&target, program));
    let slowest = node.umount(&target)?;
    result.map(|()| slowest)
}

fn run_in(root: &Path, program: &Program) -> Result<()> {
    let said = run(Command::new("chroot").arg(root).args(program.run))?;
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(said.contains(program.expect), "{said}");
    Ok(())
}
