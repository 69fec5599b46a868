//! The machine is switched off at random instants while images are being filled.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skimmer_vm_images::{disk, run};

use super::content::{BLOCK, Random, block, images};
use super::place::Place;
use crate::machine::{GuestDisk, GuestSpec};
use crate::registry::Registry;
use crate::skimmer::programs;

/// Images that are filled in turn; those before go for the budget's sake.
const IMAGES: u64 = 4;
/// Of an image.
const BYTES: u64 = 64 << 20;
/// The cache's, MiB.
const BUDGET: u64 = 200;
/// What a reader that goes on for ever waits between two reads, so that an image is not all there too soon.
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest time from the first read to the end of power.
const LONGEST_MS: u64 = 6000;

/// Reads an image in the guest.
#[derive(Debug, Clone, clap::Args)]
pub struct Fill {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// The image
    #[arg(long)]
    pub image: String,
    /// Its number, which tells its content
    #[arg(long)]
    pub number: u64,
    /// Read all of it once, compare it, and end the daemon; else read at random for ever
    #[arg(long)]
    pub whole: bool,
}

/// What was read of a whole image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Bytes that were there when it was mounted.
    pub kept: u64,
    /// Blocks that were wrong.
    pub wrong: u64,
    /// Blocks that could not be read.
    pub errors: u64,
}

/// What came of all resets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resets {
    /// Times the power went.
    pub resets: u32,
    /// Bytes that were ready when it was last asked before a reset.
    pub ready: u64,
    /// Bytes of these that were there after it.
    pub kept: u64,
    /// Wrong blocks afterwards.
    pub wrong: u64,
    /// Blocks that could not be read afterwards.
    pub errors: u64,
}

impl Fill {
    /// Does it.
    ///
    /// # Errors
    /// The daemon does not start, or does not mount.
    pub fn run(&self) -> Result<Filled> {
        self.place.prepare(BUDGET)?;
        let (config, target) = (self.place.config(), self.place.target());
        let log = fs::File::options().create(true).append(true).open(self.place.log())?;
        let mut daemon = Command::new(self.place.programs.join("skimmerd"));
        let mut daemon = daemon.arg("--config").arg(&config).stdin(Stdio::null()).stderr(log).spawn()?;
        let result = self.read(&target);
        if result.is_ok() {
            self.skimmer(&["umount", &target.to_string_lossy()])?;
        }
        self.end(&mut daemon, &config)?;
        result.with_context(|| fs::read_to_string(self.place.log()).unwrap_or_default())
    }

    fn skimmer(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new(self.place.programs.join("skimmer"));
        run(command.args(arguments).arg("--socket").arg(self.place.socket()))
    }

    fn end(&self, daemon: &mut Child, config: &Path) -> Result<()> {
        run(Command::new(self.place.programs.join("skimmerd"))
            .arg("--stop-all")
            .arg("--config")
            .arg(config))?;
        ensure!(daemon.wait()?.success(), "skimmerd ended badly");
        Ok(())
    }

    fn read(&self, target: &Path) -> Result<Filled> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.skimmer(&["status"]) {
            if Instant::now() >= deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.skimmer(&[
            "mount",
            &self.image,
            &target.to_string_lossy(),
            "--mode",
            &self.place.mode,
            "--no-start",
        ])?;
        let kept = ready_bytes(&self.skimmer(&["status", "--json"])?)?;
        let file = fs::File::open(target.join("data"))?;
        let blocks = file.metadata()?.len() / u64::try_from(BLOCK)?;
        let mut filled = Filled { kept, wrong: 0, errors: 0 };
        let mut random = Random(kept.wrapping_add(self.number));
        let mut next = 0;
        let mut buffer = vec![0; BLOCK];
        while !self.whole || next < blocks {
            let number = if self.whole { next } else { random.below(blocks) };
            next += 1;
            match file.read_exact_at(&mut buffer, number * u64::try_from(BLOCK)?) {
                Ok(()) if buffer == block(self.number, number) => {}
                Ok(()) => filled.wrong += 1,
                Err(_) => filled.errors += 1,
            }
            if !self.whole {
                ensure!(filled.wrong + filled.errors == 0, "{filled:?}");
                std::thread::sleep(PAUSE);
            }
        }
        Ok(filled)
    }
}

/// The sum over all blobs.
fn ready_bytes(status: &[u8]) -> Result<u64> {
    let status: Value = serde_json::from_slice(status)?;
    let blobs = status["blobs"].as_array().context("no blobs")?;
    Ok(blobs.iter().filter_map(|blob| blob["ready_bytes"].as_u64()).sum())
}

/// Cuts a guest's power so many times in the middle of fills, and compares all bytes after each.
///
/// # Errors
/// Something that is not the daemon's fault, or a daemon that does not start after a reset.
pub fn resets(
    scratch: &Path,
    agent: &Path,
    (kernel, mode): (&str, &str),
    count: u32,
    seed: u64,
) -> Result<Resets> {
    let registry = Registry::start(&scratch.join("registry"))?;
    let skimmer = programs()?.swap_remove(0);
    images(scratch, IMAGES, BYTES, |layout, number| {
        let to = registry.reference(&format!("image-{number}"));
        run(Command::new(&skimmer).args(["push", "--quiet"]).arg(layout).arg(to))?;
        Ok(fs::remove_dir_all(layout)?)
    })?;
    let cache = scratch.join("cache");
    disk::empty(&cache, 1 << 30)?;
    let mut spec = GuestSpec::new(kernel, agent, programs()?);
    spec.disks.push(GuestDisk::new("cache", &cache, "/cache"));
    spec.ports.push(registry.port());
    let mut random = Random(seed);
    let mut outcome = Resets::default();
    let mut before = 0;
    for number in 0..=u64::from(count) {
        let machine = spec.boot()?;
        let fill = |number: u64, whole: bool| {
            let number = number % IMAGES;
            let mut command = vec!["/bin/skimmer-agent".to_owned(), "fill".to_owned()];
            let pairs = [
                ("--programs", "/bin".to_owned()),
                ("--directory", "/run/torture".to_owned()),
                ("--root", "/cache/skimmer".to_owned()),
                ("--mode", mode.to_owned()),
                ("--image", registry.reference(&format!("image-{number}"))),
                ("--number", number.to_string()),
            ];
            command.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
            command.extend(whole.then(|| "--whole".to_owned()));
            command
        };
        if number > 0 {
            let command = fill(number - 1, true);
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            let read: Filled = serde_json::from_slice(&machine.check(&command, PATIENCE)?)?;
            outcome.wrong += read.wrong;
            outcome.errors += read.errors;
            outcome.ready += before;
            outcome.kept += read.kept.min(before);
        }
        if number == u64::from(count) {
            break;
        }
        let command = fill(number, false);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let mut filling = machine.start(&command, PATIENCE)?;
        let wait = Duration::from_millis(1 + random.below(LONGEST_MS));
        let status = ["/bin/skimmer", "status", "--json", "--socket", "/run/torture/d.sock"];
        // Time begins when something is there to lose.
        let mut last = 0;
        let mut until = None;
        while until.is_none_or(|until| Instant::now() < until) {
            ensure!(filling.still_runs_after(Duration::from_millis(50)), "{}", filling.wait()?.describe());
            if let Ok(told) = machine.check(&status, PATIENCE) {
                last = ready_bytes(&told)?.max(last);
                if last > 0 {
                    until.get_or_insert_with(|| Instant::now() + wait);
                }
            }
        }
        before = last;
        drop(filling);
        machine.cut_power();
        outcome.resets += 1;
        eprintln!("{mode}: reset {} with {last} bytes ready", outcome.resets);
    }
    Ok(outcome)
}

impl Resets {
    /// Whether no byte was wrong.
    ///
    /// # Errors
    /// What was seen.
    pub fn check(&self) -> Result<()> {
        ensure!(self.wrong == 0 && self.errors == 0 && self.resets > 0, "{self:?}");
        Ok(())
    }
}
