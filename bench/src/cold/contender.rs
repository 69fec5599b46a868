//! A node of ours that has nothing yet, and what it used.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel_tests::skimmer::Node;

use super::world::{Far, Published, World};
use crate::contender::SHORT;
use crate::probe::Usage;
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::Scenario;

/// A node with an empty cache and a running daemon.
pub(super) struct Fresh<'a> {
    world: &'a World,
    mode: String,
    tag: &'static str,
    prefetch: bool,
    node: Node<'a>,
    directory: String,
}

/// Counters before a measurement.
pub(super) struct Before {
    moved: u64,
    requests: usize,
}

impl Before {
    pub(super) fn now(far: &Far) -> Result<Self> {
        Ok(Before { requests: far.requests()?, moved: far.link.received() })
    }

    /// Writes down what came over the link since; `read` is what the program read, where that is known.
    pub(super) fn moved(
        &self,
        bench: &mut Bench,
        far: &Far,
        (place, contender, round): (&Place, &str, u32),
        read: Option<u64>,
    ) -> Result<u64> {
        let moved = far.link.received() - self.moved;
        let requests = far.requests()? - self.requests;
        let number = |value: u64| -> Result<f64> { Ok(f64::from(u32::try_from(value >> 10)?) * 1024.0) };
        let bytes = number(moved)?;
        bench.sample(place, contender, round, "bytes moved", (bytes, Unit::Bytes, Better::Lower))?;
        let requests = f64::from(u32::try_from(requests)?);
        bench.sample(place, contender, round, "requests", (requests, Unit::Count, Better::Lower))?;
        if let Some(read) = read {
            let share = bytes / number(read)?.max(1.0);
            let value = (share, Unit::Ratio, Better::Lower);
            bench.sample(place, contender, round, "bytes moved per byte read", value)?;
        }
        Ok(moved)
    }
}

/// A contender of ours.
#[derive(Clone, Debug)]
pub(super) struct Ours {
    /// Its attach mode.
    mode: String,
    /// The folder of its programs.
    programs: String,
    /// Which form of the images it mounts.
    tag: &'static str,
    /// Whether all of an image is asked for before it is read.
    prefetch: bool,
}

/// Tag of converted images, of those optimized by a trace of their program's start, and of those in more layers.
pub(super) const PLAIN: &str = "skimmer";
pub(super) const TRACED: &str = "traced";
pub(super) const SLOTS: &str = "slots";

/// Whether a contender is for reading all of an image only.
pub(super) fn whole(name: &str) -> bool {
    ["-slots", "-prefetch"].iter().any(|form| name.ends_with(form))
}

impl Ours {
    /// What the name of a contender stands for; nothing when it is not ours.
    pub(super) fn of(world: &World, contender: &str) -> Option<Self> {
        if let Some((_, programs)) = world.variants.iter().find(|(name, _)| name == contender) {
            let (mode, programs) = ("fanotify".to_owned(), programs.clone());
            return Some(Ours { mode, programs, tag: PLAIN, prefetch: false });
        }
        let name = contender.strip_prefix("skimmer-")?;
        let (mode, tag, prefetch) = match name.split_once('-') {
            Some((mode, "traced")) => (mode, TRACED, false),
            Some((mode, "prefetch")) => (mode, PLAIN, true),
            Some((mode, "slots")) => (mode, SLOTS, false),
            Some((mode, "slots-prefetch")) => (mode, SLOTS, true),
            _ => (name, PLAIN, false),
        };
        Some(Ours { mode: mode.to_owned(), programs: world.programs.clone(), tag, prefetch })
    }

    /// Why it cannot run on this machine.
    pub(super) fn unusable(&self, world: &World) -> Result<Option<String>> {
        let fresh = Fresh::new(world, self)?;
        let status = fresh.node.status()?;
        let modes = status["modes"].as_array().context("status lists no modes")?;
        let report = modes.iter().find(|report| report["mode"] == self.mode.as_str());
        let report = report.with_context(|| format!("skimmerd knows of no mode {}", self.mode))?;
        let why = report["reason"].as_str().unwrap_or("no reason given");
        // The place changes with each node and says nothing to a reader.
        let why = why.replace(&format!("{}/cache: ", fresh.directory), "");
        Ok((report["usable"] != true).then_some(why))
    }
}

/// Runs the contenders of a scenario in turn, round by round, each with nothing in any cache. Those of `left_out` do
/// not take part, with the reason; one that fails takes no further part.
pub(super) fn rounds(
    bench: &mut Bench,
    scenario: &Scenario,
    world: &World,
    place: &Place,
    left_out: impl Fn(&str) -> Option<String>,
    mut measure: impl FnMut(&mut Bench, Option<Ours>, (&Place, &str, u32)) -> Result<()>,
) -> Result<()> {
    let mut contenders = Vec::new();
    for name in scenario.names() {
        let why = match Ours::of(world, name) {
            Some(ours) => ours.unusable(world)?,
            None => left_out(name),
        };
        match why {
            Some(why) => bench.skipped(place, name, &why)?,
            None => contenders.push(name),
        }
    }
    for round in 0..bench.rounds(scenario) {
        for name in contenders.clone() {
            bench.check()?;
            world.forget()?;
            if let Err(error) = measure(bench, Ours::of(world, name), (place, name, round)) {
                bench.failed(place, name, &error)?;
                contenders.retain(|other| *other != name);
            }
        }
    }
    Ok(())
}

impl<'a> Fresh<'a> {
    pub(super) fn new(world: &'a World, ours: &Ours) -> Result<Self> {
        let directory = world.fresh();
        let (run, root) = (format!("{directory}/run"), format!("{directory}/cache"));
        let agent = format!("{}/skimmer-agent", world.programs);
        let mut node = Node::new(&world.machine, &ours.programs, &agent, &run, &root)?;
        node.plain_http();
        node.start_daemon()?;
        Ok(Fresh { world, mode: ours.mode.clone(), tag: ours.tag, prefetch: ours.prefetch, node, directory })
    }

    /// Mounts an image; gives the mount point and the time that took.
    pub(super) fn mount(&mut self, far: &Far, image: &Published) -> Result<(String, Duration)> {
        let point = format!("{}/mnt", self.directory);
        self.world.machine.check(&["mkdir", "-p", &point], SHORT)?;
        let reference = format!("docker://{}/{}:{}", far.registry.borrow().address(), image.name, self.tag);
        let start = Instant::now();
        self.node.mount(&reference, &point, &self.mode).with_context(|| self.node.log())?;
        Ok((point, start.elapsed()))
    }

    /// Asks for all of the image at `point` where the contender does so.
    pub(super) fn prefetch(&self, point: &str) -> Result<()> {
        if self.prefetch { self.node.prefetch(point) } else { Ok(()) }
    }

    /// Mounts a layout, runs `work` at the mount point, and gives the exact recording of what that read.
    pub(super) fn trace(&mut self, layout: &str, work: impl FnOnce(&str) -> Result<()>) -> Result<Vec<u8>> {
        let point = format!("{}/mnt", self.directory);
        self.world.machine.check(&["mkdir", "-p", &point], SHORT)?;
        self.node.mount_with(&format!("oci:{layout}"), &point, &self.mode, &["--record=exact"])?;
        work(&point)?;
        self.node.recording(&point)
    }

    /// What the daemon and the keeper use.
    pub(super) fn usage(&self) -> Result<Usage> {
        let (daemon, keeper) = self.node.processes()?;
        let (daemon, keeper) = (daemon.to_string(), keeper.to_string());
        let probe = format!("{}/skimmer-probe", self.world.programs);
        let argv = [probe.as_str(), "usage", &daemon, &keeper];
        Ok(serde_json::from_slice(&self.world.machine.check(&argv, SHORT)?)?)
    }

    /// What its daemon says went wrong.
    pub(super) fn log(&self) -> String {
        self.node.log()
    }

    /// Writes down what fetching `moved` bytes cost this machine since `before`.
    pub(super) fn cost(
        &self,
        bench: &mut Bench,
        (place, contender, round): (&Place, &str, u32),
        before: &Usage,
        moved: u64,
    ) -> Result<()> {
        let after = self.usage()?;
        let gib = f64::from(u32::try_from(moved >> 10)?) / f64::from(1 << 20);
        if gib > 0.0 {
            let cpu = (after.cpu_seconds - before.cpu_seconds) / gib;
            let value = (cpu, Unit::Seconds, Better::Lower);
            bench.sample(place, contender, round, "cpu time per GiB moved", value)?;
        }
        let value = (after.peak, Unit::Bytes, Better::Lower);
        bench.sample(place, contender, round, "peak memory", value)
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        // The node's own end unmounts; what it kept is of no more use. Failures show as what is left.
        if let Err(error) = self.node.stop() {
            eprintln!("a node does not end: {error:#}");
        }
        let _ = self.world.machine.run(&["rm", "-rf", &self.directory], SHORT);
    }
}
