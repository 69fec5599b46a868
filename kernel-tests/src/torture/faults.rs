//! Every fault of the network and of the disk, one after the other, under a reader who compares.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::testing::{Bearer, Fault, FaultServer, Login, TokenFault};
use skimmer_vm_images::disk;

use super::content::{BLOCK, block, images};
use crate::machine::{GuestDisk, GuestSpec, Machine};
use crate::skimmer::programs;

/// Of an image.
const BYTES: u64 = 2 << 20;
const BLOCKS: u64 = BYTES / 4096;
/// Of the file system with the cache, and of the memory that it lies in.
const CACHE: u64 = 96 << 20;
const SMALL: u64 = 128 << 20;
/// After which a read gives up.
const DEADLINE: Duration = Duration::from_secs(7);
/// Requests for blobs that a passing fault hits.
const PASSING: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(120);
/// After which the daemon tries the attach modes anew.
const MODES_FORGOTTEN: Duration = Duration::from_secs(11);

/// Compares blocks of a mounted image.
#[derive(Debug, Clone, clap::Args)]
pub struct Compare {
    /// The mounted file
    #[arg(long)]
    pub file: PathBuf,
    /// Its image's number, which tells its content
    #[arg(long)]
    pub number: u64,
    /// The first block
    #[arg(long)]
    pub first: u64,
    /// Blocks from one to the next
    #[arg(long)]
    pub step: u64,
}

/// What a reader saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Blocks that were right.
    pub right: u64,
    /// Blocks that were wrong.
    pub wrong: u64,
    /// Blocks that could not be read, by the error's number.
    pub errors: BTreeMap<i32, u64>,
    /// The longest read.
    pub longest_ms: u64,
}

impl Compare {
    /// Reads.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn run(&self) -> Result<Seen> {
        let file = File::open(&self.file).with_context(|| self.file.display().to_string())?;
        let mut seen = Seen::default();
        let mut buffer = vec![0; BLOCK];
        let mut number = self.first;
        while number < BLOCKS {
            let began = Instant::now();
            match file.read_exact_at(&mut buffer, number * u64::try_from(BLOCK)?) {
                Ok(()) if buffer == block(self.number, number) => seen.right += 1,
                Ok(()) => seen.wrong += 1,
                Err(error) => *seen.errors.entry(error.raw_os_error().unwrap_or(0)).or_default() += 1,
            }
            seen.longest_ms = seen.longest_ms.max(u64::try_from(began.elapsed().as_millis())?);
            number += self.step.max(1);
        }
        Ok(seen)
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut said = Vec::new();
        if self.wrong > 0 {
            said.push(format!("{} WRONG", self.wrong));
        }
        if self.right > 0 {
            said.push("right".to_owned());
        }
        for errno in self.errors.keys() {
            said.push(match *errno {
                libc::EIO => "EIO".to_owned(),
                libc::ENOSPC => "ENOSPC".to_owned(),
                other => format!("error {other}"),
            });
        }
        let (whole, tenths) = (self.longest_ms / 1000, self.longest_ms % 1000 / 100);
        write!(f, "{}, {whole}.{tenths} s", said.join(" and "))
    }
}

/// What a fault may do to a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// Nothing, even if it lasts.
    Right,
    /// An error within the deadline if it lasts, and nothing if it passes.
    Passing,
    /// An error within the deadline: the registry's answer was a definite one, or its bytes were wrong, and there is no
    /// other source.
    Error,
}

/// One fault and what came of it.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it is called.
    pub fault: &'static str,
    /// While it hits the first requests only; none for a disk's.
    pub passing: Option<Seen>,
    /// While it lasts.
    pub lasting: Seen,
    /// The whole image once it is over, without another mount.
    pub after: Seen,
    promise: Promise,
}

impl Case {
    /// Whether all is as promised.
    ///
    /// # Errors
    /// What is not.
    pub fn check(&self) -> Result<()> {
        let all = [self.passing.as_ref(), Some(&self.lasting), Some(&self.after)];
        ensure!(all.into_iter().flatten().all(|seen| seen.wrong == 0), "a wrong byte: {self:?}");
        let whole = |seen: &Seen| seen.errors.is_empty() && seen.right > 0;
        let passed = self.promise == Promise::Error || self.passing.as_ref().is_none_or(whole);
        ensure!(passed, "a fault that passed cost a read: {self:?}");
        ensure!(whole(&self.after), "it does not heal by itself: {self:?}");
        ensure!(self.promise != Promise::Right || whole(&self.lasting), "it cost a read: {self:?}");
        // The kernel asks for a page twice, and the machine is emulated.
        let bound = u64::try_from(DEADLINE.as_millis())? * 4;
        ensure!(self.lasting.longest_ms < bound, "the error came too late: {self:?}");
        Ok(())
    }
}

/// A memory file system of a bounded size; gone when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        let size = format!("size={SMALL}");
        let size = std::ffi::CString::new(size)?;
        rustix::mount::mount("tmpfs", at, "tmpfs", rustix::mount::MountFlags::empty(), size.as_c_str())?;
        Ok(Self(at.to_owned()))
    }

    /// Leaves no room: what its disk image has no block for yet cannot be written.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.0.join("ballast"))?;
        let zeros = vec![0; 1 << 16];
        loop {
            match file.write(&zeros) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("ballast"))?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn status(code: u16, headers: &[(&str, &str)]) -> Fault {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Fault::Status { code, headers, body: Vec::new() }
}

/// The network's, by name. The first ones are tried in every test run.
fn network(host: &str) -> Vec<(&'static str, Fault, Promise)> {
    let circle = format!("http://{host}/v2/image/blobs/{{digest}}");
    vec![
        ("connection reset", Fault::Drop, Promise::Passing),
        ("wrong bytes", Fault::WrongBytes, Promise::Error),
        ("body stalls", Fault::Stall(100), Promise::Passing),
        ("body cut short", Fault::Truncate(5000), Promise::Passing),
        ("redirect in a circle", Fault::Redirect { code: 307, location: circle }, Promise::Error),
        ("first byte after 1 s", Fault::SlowFirstByte(Duration::from_secs(1)), Promise::Right),
        ("first byte after 1 min", Fault::SlowFirstByte(Duration::from_secs(60)), Promise::Error),
        ("status 500", status(500, &[]), Promise::Passing),
        ("status 503, Retry-After 1", status(503, &[("retry-after", "1")]), Promise::Passing),
        ("status 429, Retry-After 1", status(429, &[("retry-after", "1")]), Promise::Passing),
        ("status 404", status(404, &[]), Promise::Error),
        ("status 403", status(403, &[]), Promise::Error),
        ("status 416 of 64 MiB", Fault::HugeErrorLength, Promise::Error),
        ("range ignored", Fault::IgnoreRange, Promise::Right),
        ("200 with the range's length", Fault::OkWithRangeLength, Promise::Error),
        ("another range", Fault::ShiftedRange, Promise::Error),
        ("range too short", Fault::ShortRange(5000), Promise::Error),
        ("range too long", Fault::OverlongRange, Promise::Error),
        ("body too long", Fault::OverlongBody, Promise::Error),
        ("no Content-Range", Fault::NoContentRange, Promise::Error),
        ("two Content-Ranges", Fault::TwoContentRanges, Promise::Error),
        ("wrong total", Fault::WrongTotal, Promise::Error),
        ("multipart", Fault::Multipart, Promise::Error),
        ("gzip encoding", Fault::GzipEncoding, Promise::Error),
    ]
}

/// How many of them are tried in every test run.
const USUAL: usize = 3;

/// The suite on one guest.
struct Suite {
    server: FaultServer,
    layouts: Vec<PathBuf>,
    machine: Machine,
    mode: String,
    next: usize,
    small: Small,
}

/// Tries every fault in a guest, or the most usual ones.
///
/// # Errors
/// Something that is not the daemon's fault.
pub fn faults(scratch: &Path, agent: &Path, (kernel, mode): (&str, &str), all: bool) -> Result<Vec<Case>> {
    let count = if all { network("").len() } else { USUAL };
    let mut layouts = Vec::new();
    // One for each way to be hit; the disk's faults and the tokens' need some more.
    images(scratch, u64::try_from(2 * count + 8)?, BYTES, |layout, _| {
        layouts.push(layout.to_owned());
        Ok(())
    })?;
    let server = FaultServer::start(Layout::open(&layouts[0])?)?;
    let port = server.host().rsplit(':').next().context("a port")?.parse()?;
    let small = Small::mount(&scratch.join("small"))?;
    let cache = scratch.join("small/cache");
    disk::solid(&cache, CACHE)?;
    let mut spec = GuestSpec::new(kernel, agent, programs()?);
    spec.disks.push(GuestDisk::new("cache", &cache, "/cache"));
    spec.ports.push(port);
    let machine = spec.boot()?;
    let mut suite = Suite { server, layouts, machine, mode: mode.to_owned(), next: 0, small };
    let config = format!(
        "root = \"/cache/skimmer\"\nsocket = \"/run/torture/d.sock\"\nkeeper_socket = \"/run/torture/k.sock\"\n\
         [containerd]\nenable = false\n[cache]\nbudget_mib = 64\n[fetch]\nread_deadline_s = {}\n",
        DEADLINE.as_secs()
    );
    suite.machine.put("/run/torture/skimmerd.toml", 0o600, config.as_bytes())?;
    let cases = {
        let daemon = "exec /bin/skimmerd --config /run/torture/skimmerd.toml 2> /run/torture/log";
        let machine = &suite.machine;
        drop(machine.start(&["sh", "-c", daemon], Duration::from_secs(3600))?);
        let answers = "until skimmer status --socket /run/torture/d.sock; do sleep 0.1; done";
        machine.check(&["sh", "-c", answers], PATIENCE)?;
        suite.all(count).with_context(|| suite.log())?
    };
    let end = ["/bin/skimmerd", "--stop-all", "--config", "/run/torture/skimmerd.toml"];
    suite.machine.check(&end, PATIENCE).with_context(|| suite.log())?;
    Ok(cases)
}

/// A mounted image.
struct Mounted {
    number: u64,
    target: String,
}

impl Suite {
    fn log(&self) -> String {
        let tail = self.machine.run(&["tail", "-n", "40", "/run/torture/log"], PATIENCE);
        tail.map_or_else(|error| error.to_string(), |tail| tail.describe())
    }

    fn all(&mut self, count: usize) -> Result<Vec<Case>> {
        let mut cases = Vec::new();
        let host = self.server.host();
        for (name, fault, promise) in network(&host).into_iter().take(count) {
            let mounted = self.mount()?;
            self.server.fault_times(fault.clone(), PASSING);
            let passing = self.compare(&mounted, 0, BLOCKS / 2)?;
            self.server.honest();
            self.umount(&mounted)?;
            let mounted = self.mount()?;
            self.server.fault(fault);
            let lasting = self.compare(&mounted, 0, BLOCKS)?;
            self.server.honest();
            cases.push(self.end(name, Some(passing), lasting, promise, &mounted)?);
        }
        cases.push(self.token()?);
        cases.push(self.full()?);
        cases.push(self.no_inodes()?);
        if count > USUAL {
            cases.push(self.failing_writes()?);
        }
        Ok(cases)
    }

    /// Tokens that were good when the image was mounted expire, and there are no new ones for a while.
    fn token(&mut self) -> Result<Case> {
        let bearer = Bearer::default();
        self.server.login(Login::Bearer(bearer.clone()));
        let mounted = self.mount()?;
        self.server.revoke_tokens();
        let passing = self.compare(&mounted, 0, BLOCKS)?;
        self.umount(&mounted)?;
        let mounted = self.mount()?;
        self.server.login(Login::Bearer(Bearer { fault: Some(TokenFault::Down), ..bearer.clone() }));
        self.server.revoke_tokens();
        let lasting = self.compare(&mounted, 0, BLOCKS)?;
        self.server.login(Login::Bearer(bearer));
        let case = self.end("token expired", Some(passing), lasting, Promise::Passing, &mounted);
        self.server.login(Login::Open);
        case
    }

    /// No block of the file system is free.
    fn full(&mut self) -> Result<Case> {
        let mounted = self.mount()?;
        // dd ends with an error, which is what it is to do.
        self.machine.run(&["sh", "-c", "dd if=/dev/zero of=/cache/ballast bs=64k; sync"], PATIENCE)?;
        let lasting = self.compare(&mounted, 0, BLOCKS / 2)?;
        self.machine.check(&["rm", "/cache/ballast"], PATIENCE)?;
        self.end("disk full", None, lasting, Promise::Error, &mounted)
    }

    /// No file can be made: what is mounted needs none.
    fn no_inodes(&mut self) -> Result<Case> {
        let mounted = self.mount()?;
        let script =
            "mkdir /cache/many; i=0; while true 2>/dev/null > /cache/many/$i; do i=$((i+1)); done; true";
        self.machine.check(&["sh", "-c", script], PATIENCE)?;
        let lasting = self.compare(&mounted, 0, BLOCKS / 2)?;
        // The daemon has forgotten by then which modes work, and finds no room to try.
        std::thread::sleep(MODES_FORGOTTEN);
        let refused = self.mount().err().context("an image was mounted without a file to be made")?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains("No space left") && refused.contains("inode"), "{refused}");
        self.machine.check(&["rm", "-r", "/cache/many"], PATIENCE)?;
        let other = self.mount()?;
        self.umount(&other)?;
        // cachefiles itself refuses to write where few inodes are free.
        let promise = if self.mode == "fscache" { Promise::Error } else { Promise::Right };
        self.end("no inodes", None, lasting, promise, &mounted)
    }

    /// Writes go to memory and fail on their way to the disk; then memory is dropped. cachefiles writes past memory: a
    /// read is told at once.
    fn failing_writes(&mut self) -> Result<Case> {
        let mounted = self.mount()?;
        // What is free in the guest has no place here, either.
        self.machine.check(&["sh", "-c", "sync; fstrim /cache"], PATIENCE)?;
        self.small.fill()?;
        let at_once = self.mode == "fscache";
        let lasting = (|| {
            let first = self.compare(&mounted, 0, BLOCKS / 2)?;
            if at_once {
                return Ok(first);
            }
            self.judged()?;
            self.drop_caches()?;
            let lasting = self.compare(&mounted, 0, 1)?;
            self.judged()?;
            Ok::<_, anyhow::Error>(lasting)
        })();
        self.small.make_room()?;
        self.drop_caches()?;
        let promise = if at_once { Promise::Error } else { Promise::Right };
        self.end("disk fails to write", None, lasting?, promise, &mounted)
    }

    /// Waits until the journal has tried to make durable what was written.
    fn judged(&self) -> Result<()> {
        std::thread::sleep(Duration::from_secs(3));
        self.machine.check(&["grep", "-q", "cannot be recorded", "/run/torture/log"], PATIENCE).map(drop)
    }

    fn drop_caches(&self) -> Result<()> {
        let script = "sync; echo 3 > /proc/sys/vm/drop_caches";
        self.machine.run(&["sh", "-c", script], PATIENCE).map(drop)
    }

    fn end(
        &self,
        fault: &'static str,
        passing: Option<Seen>,
        lasting: Seen,
        promise: Promise,
        mounted: &Mounted,
    ) -> Result<Case> {
        let after = self.compare(mounted, 0, 1)?;
        self.umount(mounted)?;
        let case = Case { fault, passing, lasting, after, promise };
        let passing = case.passing.as_ref().map_or_else(String::new, |seen| format!("{seen}; "));
        eprintln!("{}: {fault}: {passing}{}; {}", self.mode, case.lasting, case.after);
        Ok(case)
    }

    /// The next image.
    fn mount(&mut self) -> Result<Mounted> {
        let number = self.next;
        self.next += 1;
        let layout = self.layouts.get(number).context("too few images were made")?;
        self.server.serve(Layout::open(layout)?);
        let (image, target) =
            (format!("{}/image-{number}", self.server.host()), format!("/run/torture/mnt-{number}"));
        let script = format!(
            "mkdir -p {target} && exec skimmer mount {image} {target} --mode {} --no-start --quiet \
             --socket /run/torture/d.sock",
            self.mode
        );
        self.machine.check(&["sh", "-c", &script], PATIENCE)?;
        Ok(Mounted { number: u64::try_from(number)?, target })
    }

    fn umount(&self, mounted: &Mounted) -> Result<()> {
        let command = ["/bin/skimmer", "umount", &mounted.target, "--socket", "/run/torture/d.sock"];
        self.machine.check(&command, PATIENCE).map(drop)
    }

    /// What a reader sees of every `step`th block.
    fn compare(&self, mounted: &Mounted, first: u64, step: u64) -> Result<Seen> {
        let layout = self.layouts.get(usize::try_from(mounted.number)?).context("an image of ours")?;
        self.server.serve(Layout::open(layout)?);
        let (file, number) = (format!("{}/data", mounted.target), mounted.number.to_string());
        let (first, step) = (first.to_string(), step.to_string());
        let command = [
            "/bin/skimmer-agent",
            "compare",
            "--file",
            &file,
            "--number",
            &number,
            "--first",
            &first,
            "--step",
            &step,
        ];
        Ok(serde_json::from_slice(&self.machine.check(&command, PATIENCE)?)?)
    }
}
