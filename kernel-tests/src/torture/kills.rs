//! The daemon is killed again and again under readers who compare every byte.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use skimmer_vm_images::run;

use super::content::{BLOCK, Random, block, images};
use super::place::Place;
use crate::machine::Machine;
use crate::registry::Registry;
use crate::skimmer::programs;

/// Readers at once.
const READERS: u64 = 8;
/// How long a daemon may take to answer again.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a reader waits between two reads, so that an image is not all there too soon.
const PAUSE: Duration = Duration::from_millis(8);

/// What to do.
#[derive(Debug, Clone, clap::Args)]
pub struct Kills {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// Kills in all
    #[arg(long)]
    pub kills: u32,
    /// Decides when and where
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Kills before the next image is mounted
    #[arg(long, default_value_t = 20)]
    pub per_image: u32,
    /// Images made by `write_tree`, by number: `-{number}` is put behind this name
    #[arg(long)]
    pub image: String,
    /// How many there are
    #[arg(long)]
    pub images: u64,
    /// The cache's budget, so that images that come again are fetched again, MiB
    #[arg(long)]
    pub budget_mib: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Daemons killed.
    pub kills: u32,
    /// Processes of the keeper killed, beside them.
    pub keepers: u32,
    /// Mounts made.
    pub mounts: u32,
    /// Reads that were compared.
    pub reads: u64,
    /// Requests of the kernel that waited for bytes, as far as daemons lived to tell.
    pub misses: u64,
    /// Reads with a wrong byte.
    pub wrong: u64,
    /// Reads that failed.
    pub errors: u64,
    /// The longest read, milliseconds.
    pub longest_ms: u64,
    /// The longest that one took after the last kill it waited through, milliseconds.
    pub after_kill_ms: u64,
    /// The first thing that was wrong, if any.
    pub first: Option<String>,
}

/// Counts of all readers.
struct Counts {
    epoch: Instant,
    /// When the last daemon was killed, microseconds after `epoch`.
    killed_us: AtomicU64,
    reads: AtomicU64,
    wrong: AtomicU64,
    errors: AtomicU64,
    longest_us: AtomicU64,
    after_kill_us: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Counts {
    fn new() -> Self {
        let zero = AtomicU64::default;
        Self {
            epoch: Instant::now(),
            killed_us: zero(),
            reads: zero(),
            wrong: zero(),
            errors: zero(),
            longest_us: zero(),
            after_kill_us: zero(),
            first: Mutex::default(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A read that began at `began` has ended now.
    fn ended(&self, began: u64) {
        let (end, killed) = (self.now(), self.killed_us.load(Ordering::Relaxed));
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.longest_us.fetch_max(end.saturating_sub(began), Ordering::Relaxed);
        if killed >= began {
            self.after_kill_us.fetch_max(end.saturating_sub(killed), Ordering::Relaxed);
        }
    }

    fn note(&self, what: String) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
    }
}

/// Starts the daemon anew whenever it is gone, as a service manager would.
struct Supervisor {
    stop: Arc<AtomicBool>,
    pid: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Supervisor {
    fn start(program: PathBuf, config: PathBuf, log: PathBuf) -> Self {
        let (stop, pid) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, current) = (Arc::clone(&stop), Arc::clone(&pid));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let log = File::options().create(true).append(true).open(&log)?;
                let mut command = Command::new(&program);
                command.arg("--config").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
                let mut child: Child = command.spawn()?;
                current.store(u64::from(child.id()), Ordering::Relaxed);
                child.wait()?;
            }
            Ok(())
        });
        Self { stop, pid, thread }
    }

    /// Whether there was one to kill.
    fn kill(&self) -> Result<bool> {
        let pid = i32::try_from(self.pid.load(Ordering::Relaxed))?;
        let pid = rustix::process::Pid::from_raw(pid).context("no daemon was started")?;
        match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            Ok(()) => Ok(true),
            // Killed before, and the next one is not there yet.
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Kills {
    /// Does it.
    ///
    /// # Errors
    /// Something that is not the daemon's fault, or a daemon that does not come back. What readers saw is in the outcome.
    pub fn run(&self) -> Result<Outcome> {
        self.place.prepare(self.budget_mib)?;
        let (config, log) = (self.place.config(), self.place.log());
        let supervisor = Supervisor::start(self.place.programs.join("skimmerd"), config.clone(), log.clone());
        let result = self.rounds(&supervisor).with_context(|| {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        });
        supervisor.stop.store(true, Ordering::Relaxed);
        let ended = self.patiently(&["--stop-all", "--config", &config.to_string_lossy()], "skimmerd");
        if result.is_err() || ended.is_err() {
            let _ = rustix::mount::unmount(self.place.target(), rustix::mount::UnmountFlags::DETACH);
            supervisor.kill()?;
        }
        supervisor.thread.join().map_err(|_| anyhow::anyhow!("the supervisor panicked"))??;
        ended?;
        result
    }

    fn rounds(&self, supervisor: &Supervisor) -> Result<Outcome> {
        let counts = Counts::new();
        let mut random = Random(self.seed);
        let (mut kills, mut keepers, mut mounts, mut misses) = (0, 0, 0, 0);
        let target = self.place.target().to_string_lossy().into_owned();
        while kills < self.kills {
            let number = u64::from(mounts) % self.images;
            let image = format!("{}-{number}", self.image);
            self.skimmer(&["mount", &image, &target, "--mode", &self.place.mode, "--no-start"])?;
            mounts += 1;
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for reader in 0..READERS {
                    let seed = random.next();
                    let (counts, stop, path) = (&counts, &stop, self.place.target().join("data"));
                    scope.spawn(move || read(&path, number, Random(seed ^ reader), counts, stop));
                }
                let result = (|| {
                    for _ in 0..self.per_image.min(self.kills - kills) {
                        std::thread::sleep(Duration::from_millis(random.below(300)));
                        if random.below(2) == 0 {
                            // Once more after it has come up; else it may be killed on the way.
                            misses += self.misses()?;
                        }
                        if random.below(4) == 0 {
                            keepers += self.kill_keeper(random.next())?;
                            std::thread::sleep(Duration::from_millis(random.below(100)));
                        }
                        if supervisor.kill()? {
                            counts.killed_us.store(counts.now(), Ordering::Relaxed);
                        }
                        kills += 1;
                    }
                    Ok::<_, anyhow::Error>(())
                })();
                stop.store(true, Ordering::Relaxed);
                result
            })?;
            self.skimmer(&["umount", &target])?;
            let counted = counts.reads.load(Ordering::Relaxed);
            let longest = Duration::from_micros(counts.longest_us.load(Ordering::Relaxed));
            eprintln!("{kills} kills, {mounts} mounts, {counted} reads, the longest took {longest:?}");
        }
        Ok(Outcome {
            kills,
            keepers,
            mounts,
            reads: counts.reads.into_inner(),
            misses,
            wrong: counts.wrong.into_inner(),
            errors: counts.errors.into_inner(),
            longest_ms: counts.longest_us.into_inner() / 1000,
            after_kill_ms: counts.after_kill_us.into_inner() / 1000,
            first: counts.first.into_inner().unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// Kills one of the keeper's processes; gives how many, none when there is only one just now: the other is on its
    /// way, and without both there is nobody to go on.
    fn kill_keeper(&self, which: u64) -> Result<u32> {
        let socket = self.place.keeper_socket();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A zombie's is empty.
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let mut arguments = line.split(|&byte| byte == 0);
            let is_keeper = arguments.next().is_some_and(|name| name.ends_with(b"skimmer-keeper"));
            if is_keeper && arguments.any(|argument| argument == socket.as_os_str().as_encoded_bytes()) {
                found.extend(rustix::process::Pid::from_raw(pid));
            }
        }
        if found.len() < 2 {
            return Ok(0);
        }
        let victim = found[usize::try_from(which % u64::try_from(found.len())?)?];
        match rustix::process::kill_process(victim, rustix::process::Signal::KILL) {
            Ok(()) => Ok(1),
            Err(rustix::io::Errno::SRCH) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What the daemon that runs counted; waits until one does.
    fn misses(&self) -> Result<u64> {
        self.skimmer(&["status"])?;
        let page = crate::skimmer::http_get(&self.place.socket(), "/metrics");
        // It may have been replaced in between; what it had counted is lost.
        let page = String::from_utf8(page.unwrap_or_default())?;
        let lines =
            page.lines().filter(|line| line.starts_with("skimmer_reads_total{") && line.contains("\"miss\""));
        Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
    }

    /// Runs `skimmer`, again and again while no daemon answers.
    fn skimmer(&self, arguments: &[&str]) -> Result<()> {
        let socket = self.place.socket();
        let mut all = arguments.to_vec();
        let socket = socket.to_string_lossy();
        all.extend(["--socket", &socket, "--quiet"]);
        self.patiently(&all, "skimmer")
    }

    fn patiently(&self, arguments: &[&str], program: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match run(Command::new(self.place.programs.join(program)).args(arguments)) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

fn read(path: &Path, image: u64, mut random: Random, counts: &Counts, stop: &AtomicBool) {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => {
            counts.errors.fetch_add(1, Ordering::Relaxed);
            return counts.note(format!("opening {}: {error}", path.display()));
        }
    };
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    let block_bytes = u64::try_from(BLOCK).unwrap_or(1);
    let mut buffer = vec![0; 8 * BLOCK];
    while !stop.load(Ordering::Relaxed) {
        let blocks = usize::try_from(1 + random.below(8)).unwrap_or(1);
        let last = (size / block_bytes).saturating_sub(u64::try_from(blocks).unwrap_or(1));
        let first = random.below(last + 1);
        let part = &mut buffer[..blocks * BLOCK];
        let began = counts.now();
        let result = file.read_exact_at(part, first * block_bytes);
        counts.ended(began);
        match result {
            Ok(()) => {
                for (number, bytes) in (first..).zip(part.chunks(BLOCK)) {
                    if bytes != block(image, number) {
                        counts.wrong.fetch_add(1, Ordering::Relaxed);
                        counts.note(format!("block {number} of image {image} is wrong"));
                    }
                }
            }
            Err(error) => {
                counts.errors.fetch_add(1, Ordering::Relaxed);
                counts.note(format!("block {first} of image {image}: {error}"));
            }
        }
        std::thread::sleep(PAUSE);
    }
}

impl Outcome {
    /// Whether no reader saw anything of the kills.
    ///
    /// # Errors
    /// What was seen.
    pub fn check(&self) -> Result<()> {
        ensure!(self.wrong == 0 && self.errors == 0, "{self:?}");
        let some_keeper = self.keepers > 0 || self.kills < 20;
        ensure!(self.reads > 0 && self.misses > 0 && some_keeper, "nothing was tried: {self:?}");
        Ok(())
    }
}

/// Images that are mounted in turn.
const IMAGES: u64 = 6;
/// Bytes of an image on the host, and in a guest, whose processor is emulated.
const SIZES: [u64; 2] = [192 << 20, 48 << 20];
/// How long a kill may take in all, and some more.
const EACH: Duration = Duration::from_secs(20);

fn told(output: &[u8]) -> Result<Outcome> {
    serde_json::from_slice(output).with_context(|| String::from_utf8_lossy(output).into_owned())
}

/// Kills the daemon on this machine, over fanotify.
///
/// # Errors
/// As [`Kills::run`].
pub fn kills_on_host(scratch: &Path, agent: &Path, kills: u32, seed: u64) -> Result<Outcome> {
    images(scratch, IMAGES, SIZES[0], |_, _| Ok(()))?;
    // A socket's path has at most 107 bytes.
    let directory = tempfile::tempdir()?;
    let programs = programs()?.swap_remove(0).parent().context("programs lie somewhere")?.to_owned();
    let mut command = Command::new(agent);
    command.arg("kills").arg("--programs").arg(programs).arg("--directory").arg(directory.path());
    command.arg("--root").arg(scratch.join("root")).args(["--mode", "fanotify"]);
    command.arg("--image").arg(format!("oci:{}/image", scratch.display()));
    command.args(numbers(SIZES[0], kills, seed)).stderr(Stdio::inherit());
    let output = command.output()?;
    ensure!(output.status.success(), "the torture itself failed: {}", output.status);
    told(&output.stdout)
}

fn numbers(size: u64, kills: u32, seed: u64) -> Vec<String> {
    let budget = ((size >> 20) * 5 / 2).to_string();
    let (kills, seed, images) = (kills.to_string(), seed.to_string(), IMAGES.to_string());
    let pairs = [("--kills", kills), ("--seed", seed), ("--images", images), ("--budget-mib", budget)];
    pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

/// Kills the daemon in a guest.
///
/// # Errors
/// As [`Kills::run`].
pub fn kills_in_guest(
    scratch: &Path,
    agent: &Path,
    (kernel, mode): (&str, &str),
    kills: u32,
    seed: u64,
) -> Result<Outcome> {
    let registry = Registry::start(&scratch.join("registry"))?;
    let skimmer = programs()?.swap_remove(0);
    images(scratch, IMAGES, SIZES[1], |layout, number| {
        let to = registry.reference(&format!("image-{number}"));
        run(Command::new(&skimmer).args(["push", "--quiet"]).arg(layout).arg(to))?;
        Ok(fs::remove_dir_all(layout)?)
    })?;
    let machine = Machine::guest(kernel, agent, &scratch.join("cache"), 2 << 30, registry.port())?;
    let image = registry.reference("image");
    let mut command =
        vec!["/bin/skimmer-agent", "kills", "--programs", "/bin", "--directory", "/run/torture"];
    command.extend(["--root", "/cache/skimmer", "--mode", mode, "--image", &image]);
    let numbers = numbers(SIZES[1], kills, seed);
    command.extend(numbers.iter().map(String::as_str));
    let output = machine.check(&command, PATIENCE + EACH * kills)?;
    told(&output)
}
