//! Density: what one daemon with many mounted images costs.

mod images;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kernel_tests::machine::Machine;
use kernel_tests::registry::Registry;
use kernel_tests::skimmer::Node;
use serde::Deserialize;
use skimmer_client::{AttachMode, Client, MountRequest};

use crate::contender::text;
use crate::probe::{self, Latency, ReadOptions, Usage};
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::Scenario;

use images::{FILE, Images};

/// The scenario's table `[density]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Numbers of images, rising.
    pub images: Vec<u32>,
    /// Numbers of quick runs instead.
    pub quick_images: Option<Vec<u32>>,
    /// Misses to average over, with all images mounted.
    pub misses: u64,
    /// Seconds over which an idle daemon is watched.
    pub idle_seconds: u64,
}

/// Before any image is there.
const IDLE: &str = "idle";
const DAEMON: &str = "skimmerd";
const KEEPER: &str = "skimmer-keeper";

/// Runs all contenders of a scenario on one machine.
///
/// # Errors
/// The scenario cannot be set up, or the run was interrupted.
pub fn run(bench: &mut Bench, scenario: &Scenario, spec: &Spec, machine: &str) -> Result<()> {
    ensure!(machine == "host", "density is measured on the host only");
    let mut names: Vec<&str> = scenario.names().collect();
    names.sort_unstable();
    ensure!(
        names == [IDLE, KEEPER, DAEMON],
        "a density scenario's contenders are {IDLE}, {DAEMON} and {KEEPER}"
    );
    let numbers = match &spec.quick_images {
        Some(numbers) if bench.quick() => numbers,
        _ => &spec.images,
    };
    ensure!(numbers.is_sorted() && !numbers.is_empty(), "`images` must rise");
    skimmer_vm_images::apt::ensure(&["docker-registry"])?;
    let most = numbers.last().copied().unwrap_or(0);
    let base = skimmer_vm_images::cache::root()?.join("work");
    std::fs::create_dir_all(&base)?;
    let scratch = tempfile::Builder::new().prefix("density-").tempdir_in(&base)?;
    println!("  making {most} images");
    let registry = Registry::start(&scratch.path().join("registry"))?;
    let images = Images::make(bench, &registry, scratch.path(), most, spec.misses + 4)?;
    let host = Machine::host();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    for round in 0..bench.rounds(scenario) {
        bench.check()?;
        let directory = scratch.path().join(format!("round-{round}"));
        let place = |case: String| Place {
            scenario: scenario.name.clone(),
            machine: format!("host {}", release.trim()),
            case,
        };
        let mut one = Round::new(bench, &host, &images, directory)?;
        if let Err(error) = one.measure(bench, spec, numbers, round, &place) {
            bench.failed(&place(String::new()), DAEMON, &error.context(one.node.log()))?;
        }
    }
    Ok(())
}

/// One daemon from its start to its end.
struct Round<'a> {
    images: &'a Images,
    node: Node<'a>,
    client: Client,
    runtime: tokio::runtime::Runtime,
    directory: PathBuf,
    daemon: u32,
    keeper: u32,
}

impl<'a> Round<'a> {
    fn new(bench: &Bench, host: &'a Machine, images: &'a Images, directory: PathBuf) -> Result<Self> {
        let programs = bench.program("skimmer");
        let programs = text(programs.parent().context("programs have a folder")?)?;
        let (run, root) = (text(&directory.join("run"))?, text(&directory.join("cache"))?);
        let node = Node::new(host, &programs, &format!("{programs}/skimmer-agent"), &run, &root)?;
        node.start_daemon()?;
        let (daemon, keeper) = node.processes()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect(format!("{run}/skimmerd.sock")))?;
        Ok(Round { images, node, client, runtime, directory, daemon, keeper })
    }

    fn measure(
        &mut self,
        bench: &mut Bench,
        spec: &Spec,
        numbers: &[u32],
        round: u32,
        place: &dyn Fn(String) -> Place,
    ) -> Result<()> {
        let idle = [self.state(self.daemon, spec.idle_seconds)?];
        let mut mounted = 0;
        for number in numbers {
            bench.check()?;
            let here = place(if *number == 1 { "1 image".to_owned() } else { format!("{number} images") });
            let mut latencies = Vec::new();
            while mounted < *number {
                latencies.push(self.mount(mounted)?.as_secs_f64());
                mounted += 1;
                if mounted.is_multiple_of(50) {
                    bench.check()?;
                }
            }
            let latency = Latency::of(latencies);
            for (metric, seconds) in [("mount p50", latency.p50), ("mount max", latency.max)] {
                bench.sample(&here, DAEMON, round, metric, (seconds, Unit::Seconds, Better::Lower))?;
            }
            let watched = self.watched()?;
            ensure!(watched >= *number, "{watched} marked files for {number} images that are read in part");
            let marks = (f64::from(watched), Unit::Count, Better::Neither);
            bench.sample(&here, KEEPER, round, "marked files", marks)?;
            for (name, state) in [
                (IDLE, idle[0]),
                (DAEMON, self.state(self.daemon, spec.idle_seconds)?),
                (KEEPER, self.state(self.keeper, spec.idle_seconds)?),
            ] {
                state.report(bench, &here, name, round)?;
            }
            if Some(number) == numbers.last() {
                self.misses(bench, spec, &here, round)?;
            }
        }
        let start = Instant::now();
        for index in (0..mounted).rev() {
            let target = self.target(index);
            self.runtime.block_on(self.client.umount(&target, false))?;
        }
        let each = start.elapsed().as_secs_f64() / f64::from(mounted);
        let here = place(format!("{mounted} images"));
        bench.sample(&here, DAEMON, round, "umount", (each, Unit::Seconds, Better::Lower))
    }

    fn target(&self, index: u32) -> PathBuf {
        self.directory.join("mnt").join(index.to_string())
    }

    /// Mounts image `index` and reads a block of it, which is checked; gives the time of the mount.
    fn mount(&self, index: u32) -> Result<Duration> {
        let target = self.target(index);
        std::fs::create_dir_all(&target)?;
        let mut request = MountRequest::new(self.images.reference(index), &target);
        request.mode = AttachMode::Fanotify;
        let start = Instant::now();
        self.runtime.block_on(self.client.mount(&request)).with_context(|| format!("image {index}"))?;
        let took = start.elapsed();
        read(&target.join(FILE), Images::seed(index), 1, 7)?;
        Ok(took)
    }

    /// Files whose accesses the keeper sees.
    fn watched(&self) -> Result<u32> {
        let status = self.node.status()?;
        let blobs = status["blobs"].as_array().context("status lists no blobs")?;
        Ok(u32::try_from(blobs.iter().filter(|blob| blob["watched"] == true).count())?)
    }

    fn state(&self, pid: u32, seconds: u64) -> Result<State> {
        let before = probe::usage(&[pid])?;
        let start = Instant::now();
        std::thread::sleep(Duration::from_secs(seconds));
        let after = probe::usage(&[pid])?;
        let share = (after.cpu_seconds - before.cpu_seconds) / start.elapsed().as_secs_f64();
        Ok(State { usage: after, idle_cpu: share })
    }

    /// Misses in an image that nobody has read, with all others mounted.
    fn misses(&self, bench: &mut Bench, spec: &Spec, here: &Place, round: u32) -> Result<()> {
        let target = self.directory.join("misses");
        std::fs::create_dir_all(&target)?;
        let mut request = MountRequest::new(self.images.large(), &target);
        request.mode = AttachMode::Fanotify;
        self.runtime.block_on(self.client.mount(&request)).context("the image for misses")?;
        let asked = self.node.counter("skimmer_fetches_total")?;
        let before = [probe::usage(&[self.daemon])?, probe::usage(&[self.keeper])?];
        let outcome = read(&target.join(FILE), images::LARGE_SEED, spec.misses, u64::from(round) + 1);
        let after = [probe::usage(&[self.daemon])?, probe::usage(&[self.keeper])?];
        self.runtime.block_on(self.client.umount(&target, false))?;
        outcome?;
        let missed = self.node.counter("skimmer_fetches_total")? - asked;
        ensure!(missed > 0.0, "no read was a miss");
        for (index, name) in [DAEMON, KEEPER].into_iter().enumerate() {
            let cpu = (after[index].cpu_seconds - before[index].cpu_seconds) / missed;
            let switches = (after[index].switches - before[index].switches) / missed;
            bench.sample(here, name, round, "cpu time per miss", (cpu, Unit::Seconds, Better::Lower))?;
            let value = (switches, Unit::Count, Better::Lower);
            bench.sample(here, name, round, "context switches per miss", value)?;
        }
        Ok(())
    }
}

/// What a process uses while nothing is asked of it.
#[derive(Clone, Copy)]
struct State {
    usage: Usage,
    idle_cpu: f64,
}

impl State {
    fn report(&self, bench: &mut Bench, place: &Place, name: &str, round: u32) -> Result<()> {
        let values = [
            ("rss", self.usage.rss, Unit::Bytes),
            ("open files", self.usage.open_files, Unit::Count),
            ("threads", self.usage.threads, Unit::Count),
            ("idle cpu", self.idle_cpu, Unit::Ratio),
        ];
        for (metric, value, unit) in values {
            bench.sample(place, name, round, metric, (value, unit, Better::Lower))?;
        }
        Ok(())
    }
}

/// Reads and checks single blocks, each in a chunk of its own.
fn read(file: &Path, content: u64, count: u64, seed: u64) -> Result<()> {
    let options = ReadOptions {
        file: file.to_owned(),
        block: 4096,
        count: Some(count),
        random: Some(1 << 20),
        seed,
        content: Some(content),
    };
    probe::read(&options).map(drop)
}
