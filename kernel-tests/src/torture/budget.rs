//! More images than the cache may hold are read in turn, and compared.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use skimmer_vm_images::run;

use super::content::{images, wrong_blocks};
use super::place::Place;
use crate::machine::Machine;
use crate::registry::Registry;
use crate::skimmer::programs;

/// The largest flight of the engine, bytes.
const FLIGHT: u64 = 16 << 20;
/// How often it is looked what the cache takes.
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of what.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// The budget.
    pub budget_mib: u64,
    /// Images.
    pub images: u64,
    /// Of an image.
    pub image_mib: u64,
}

/// What to do.
#[derive(Debug, Clone, clap::Args)]
pub struct Budget {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// Images, by number: `-{number}` is put behind this name
    #[arg(long)]
    pub image: String,
    /// How many there are
    #[arg(long)]
    pub images: u64,
    /// The cache's budget, MiB
    #[arg(long)]
    pub budget_mib: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Images that were mounted and read whole.
    pub images: u64,
    /// Bytes that were read and compared.
    pub bytes: u64,
    /// Blocks that were wrong.
    pub wrong: u64,
    /// Reads that failed.
    pub errors: u64,
    /// The budget, bytes.
    pub budget: u64,
    /// The most that the cache took on disk, bytes.
    pub most: u64,
}

impl Kept {
    /// Whether the budget was kept and no reader saw anything of that.
    ///
    /// # Errors
    /// What was seen.
    pub fn check(&self) -> Result<()> {
        ensure!(self.wrong == 0 && self.errors == 0, "{self:?}");
        ensure!(self.bytes > 2 * self.budget && self.most > self.budget / 4, "nothing was tried: {self:?}");
        ensure!(self.most <= self.budget + FLIGHT, "over the budget by more than a flight: {self:?}");
        Ok(())
    }
}

impl Budget {
    /// Does it.
    ///
    /// # Errors
    /// Something that is not the daemon's fault. What was read is in the outcome.
    pub fn run(&self) -> Result<Kept> {
        self.place.prepare(self.budget_mib)?;
        let (config, target) = (self.place.config(), self.place.target());
        let log = fs::File::options().create(true).append(true).open(self.place.log())?;
        let mut daemon = Command::new(self.place.programs.join("skimmerd"));
        let mut daemon = daemon.arg("--config").arg(&config).stdin(Stdio::null()).stderr(log).spawn()?;
        let (stop, most) = (AtomicBool::new(false), AtomicU64::new(0));
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    most.fetch_max(on_disk(&self.place.root), Ordering::Relaxed);
                    std::thread::sleep(LOOK);
                }
            });
            let result = self.read_all(&target);
            stop.store(true, Ordering::Relaxed);
            result
        });
        if result.is_err() {
            let _ = rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH);
        }
        run(Command::new(self.place.programs.join("skimmerd"))
            .arg("--stop-all")
            .arg("--config")
            .arg(&config))?;
        ensure!(daemon.wait()?.success(), "skimmerd ended badly");
        let kept = result.with_context(|| fs::read_to_string(self.place.log()).unwrap_or_default())?;
        Ok(Kept { budget: self.budget_mib << 20, most: most.into_inner(), ..kept })
    }

    fn read_all(&self, target: &Path) -> Result<Kept> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.skimmer(&["status"]) {
            ensure!(Instant::now() < deadline, "{error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut kept = Kept::default();
        let place = target.to_string_lossy();
        for number in 0..self.images {
            let image = format!("{}-{number}", self.image);
            self.skimmer(&["mount", &image, &place, "--mode", &self.place.mode])?;
            let file = fs::File::open(target.join("data"))?;
            let (wrong, errors) = wrong_blocks(&file, number)?;
            kept.bytes += file.metadata()?.len();
            drop(file);
            kept.wrong += wrong;
            kept.errors += errors;
            kept.images += 1;
            self.skimmer(&["umount", &place])?;
            eprintln!("{}: image {number} read", self.place.mode);
        }
        Ok(kept)
    }

    fn skimmer(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(self.place.programs.join("skimmer"));
        run(command.args(arguments).arg("--quiet").arg("--socket").arg(self.place.socket())).map(drop)
    }
}

/// Disk space of all files below. What goes away meanwhile is not counted.
fn on_disk(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => on_disk(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// Reads more images than the budget allows to keep, over fanotify on this machine.
///
/// # Errors
/// As [`Budget::run`].
pub fn budget_on_host(scratch: &Path, agent: &Path, sizes: Sizes) -> Result<Kept> {
    images(scratch, sizes.images, sizes.image_mib << 20, |_, _| Ok(()))?;
    // A socket's path has at most 107 bytes.
    let directory = tempfile::tempdir()?;
    let programs = programs()?.swap_remove(0).parent().context("programs lie somewhere")?.to_owned();
    let mut command = Command::new(agent);
    command.arg("budget").arg("--programs").arg(programs).arg("--directory").arg(directory.path());
    command.arg("--root").arg(scratch.join("root")).args(["--mode", "fanotify"]);
    command.arg("--image").arg(format!("oci:{}/image", scratch.display()));
    command.args(["--images", &sizes.images.to_string(), "--budget-mib", &sizes.budget_mib.to_string()]);
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the torture itself failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The same in a guest.
///
/// # Errors
/// As [`Budget::run`].
pub fn budget_in_guest(
    scratch: &Path,
    agent: &Path,
    (kernel, mode): (&str, &str),
    sizes: Sizes,
) -> Result<Kept> {
    let registry = Registry::start(&scratch.join("registry"))?;
    let skimmer = programs()?.swap_remove(0);
    images(scratch, sizes.images, sizes.image_mib << 20, |layout, number| {
        let to = registry.reference(&format!("image-{number}"));
        run(Command::new(&skimmer).args(["push", "--quiet"]).arg(layout).arg(to))?;
        Ok(fs::remove_dir_all(layout)?)
    })?;
    let disk = (sizes.budget_mib * 2).max(256) << 20;
    let machine = Machine::guest(kernel, agent, &scratch.join("cache"), disk, registry.port())?;
    let (count, budget) = (sizes.images.to_string(), sizes.budget_mib.to_string());
    let image = registry.reference("image");
    let command = [
        "/bin/skimmer-agent",
        "budget",
        "--programs",
        "/bin",
        "--directory",
        "/run/torture",
        "--root",
        "/cache/skimmer",
        "--mode",
        mode,
        "--image",
        &image,
        "--images",
        &count,
        "--budget-mib",
        &budget,
    ];
    let patience = PATIENCE + Duration::from_secs(2 * sizes.images * sizes.image_mib);
    Ok(serde_json::from_slice(&machine.check(&command, patience)?)?)
}
