//! A guest from power-on to power-off.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::channel::{self, Channel};
use crate::kernel::Kernel;
use crate::protocol::{Bytes, Command, Reply, Request};
use crate::qemu::{Accelerator, Qemu};

/// What the host waits beyond the time that the agent was given: the agent reports a timeout itself.
const GRACE: Duration = Duration::from_secs(20);
/// For requests that do a trifle.
const BRIEF: Duration = Duration::from_secs(30);

/// A disk of the guest.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its serial number, by which [`Guest::disks`] finds the device; at most 20 characters.
    pub name: String,
    /// A raw image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// The machine to boot.
#[derive(Debug, Clone)]
pub struct BootConfig {
    /// What [`crate::prepare`] gave.
    pub kernel: Kernel,
    /// What [`crate::GuestRoot::build`] gave.
    pub initramfs: PathBuf,
    /// Disks, in order.
    pub disks: Vec<Disk>,
    /// A raw image whose file system becomes the root, and whose `/sbin/init` the first process. What is written to it
    /// is lost with the guest.
    pub system: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Whether there is a network card; the host's loopback is then 10.0.2.2.
    pub network: bool,
    /// The longest time from power-on to the agent's greeting.
    pub boot_timeout: Duration,
}

impl BootConfig {
    /// Two processors, 2 GiB, network, no disk.
    #[must_use]
    pub fn new(kernel: &Kernel, initramfs: &Path) -> Self {
        BootConfig {
            kernel: kernel.clone(),
            initramfs: initramfs.to_owned(),
            disks: Vec::new(),
            system: None,
            memory_mib: 2048,
            cpus: 2,
            network: true,
            boot_timeout: Duration::from_secs(90),
        }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, name: &str, path: &Path, read_only: bool) -> Self {
        self.disks.push(Disk { name: name.to_owned(), path: path.to_owned(), read_only });
        self
    }
}

/// What the guest said of itself.
#[derive(Debug, Clone)]
pub struct Guest {
    /// `uname -r`.
    pub release: String,
    /// From QEMU's start to the agent's greeting.
    pub boot_time: Duration,
    /// Device paths by [`Disk::name`].
    pub disks: BTreeMap<String, String>,
}

/// How a command in the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit code, or absent when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was killed for its timeout.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it ended with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0) && !self.timed_out
    }

    /// A line on how it ended, and what it wrote.
    #[must_use]
    pub fn describe(&self) -> String {
        let how = match (self.timed_out, self.code, self.signal) {
            (true, ..) => "killed for its timeout".to_owned(),
            (_, Some(code), _) => format!("exit code {code}"),
            (_, None, signal) => format!("signal {signal:?}"),
        };
        let (stdout, stderr) = (String::from_utf8_lossy(&self.stdout), String::from_utf8_lossy(&self.stderr));
        format!("{how}\nstdout: {}\nstderr: {}", stdout.trim_end(), stderr.trim_end())
    }
}

/// A running guest. Dropping it kills it; after a panic the end of its console is printed.
pub struct Vm {
    channel: Channel,
    qemu: Qemu,
    guest: Guest,
    // Holds the socket and the logs; dropped last.
    directory: TempDir,
}

/// A command that runs in the guest.
pub struct Pending<'a> {
    vm: &'a Vm,
    id: u64,
    shown: String,
    timeout: Duration,
    reply: Receiver<Reply>,
}

impl Vm {
    /// Boots and waits for the agent; a guest that dies early or stays silent is tried once more.
    ///
    /// # Errors
    /// QEMU does not start, or both attempts fail: the message holds the end of the console.
    pub fn boot(config: &BootConfig) -> Result<Self> {
        let accelerator = Accelerator::from_env()?;
        match Self::attempt(config, accelerator) {
            Ok(vm) => Ok(vm),
            Err(error) => {
                // Rare crashes of emulated multi-processor guests are not the guest's fault.
                eprintln!("guest {}: the first boot failed, trying once more: {error:#}", config.kernel.name);
                Self::attempt(config, accelerator).context("the second boot failed too")
            }
        }
    }

    fn attempt(config: &BootConfig, accelerator: Accelerator) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("skimmer-vm-").tempdir()?;
        let path = |name| directory.path().join(name);
        let (control, console, log) = (path("control"), path("console"), path("qemu"));
        let listener = UnixListener::bind(&control).with_context(|| {
            format!("cannot listen on {} (is TMPDIR too long a path?)", control.display())
        })?;
        listener.set_nonblocking(true)?;
        let started = Instant::now();
        let deadline = started + config.boot_timeout;
        let mut qemu = Qemu::start(config, accelerator, &control, &console, &log)?;
        let story = || format!("{}{}", tail(&log), tail(&console));

        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = qemu.ended()? {
                bail!("QEMU ended with {status}:\n{}", story());
            }
            if Instant::now() >= deadline {
                bail!("QEMU did not connect within {:?}:\n{}", config.boot_timeout, story());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(false)?;
        let (channel, greeted) = Channel::new(stream)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let greeting = channel::wait(&greeted, left);
        let greeting = greeting.with_context(|| format!("the guest did not come up:\n{}", story()))?;
        let Reply::Hello { release, disks, .. } = greeting else {
            bail!("the agent began with {greeting:?}")
        };
        let guest = Guest { release, boot_time: started.elapsed(), disks };
        Ok(Vm { channel, qemu, guest, directory })
    }

    /// What the guest said of itself.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The last lines of its console.
    #[must_use]
    pub fn console(&self) -> String {
        tail(&self.directory.path().join("console"))
    }

    /// Starts a command; others may run meanwhile.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn start(&self, command: Command) -> Result<Pending<'_>> {
        let shown = command.argv.join(" ");
        let timeout = Duration::from_millis(command.timeout_ms);
        let (id, reply) = self.channel.send(Request::Run(command)).with_context(|| self.story(&shown))?;
        Ok(Pending { vm: self, id, shown, timeout, reply })
    }

    /// Runs a command to its end, whatever that is.
    ///
    /// # Errors
    /// The guest is gone, or the program cannot be started.
    pub fn run(&self, argv: &[&str], timeout: Duration) -> Result<Output> {
        self.start(command(argv, timeout))?.wait()
    }

    /// Runs a command that must succeed, and gives its standard output.
    ///
    /// # Errors
    /// As [`Vm::run`], and when the command fails: the message holds all it wrote.
    pub fn check(&self, argv: &[&str], timeout: Duration) -> Result<Vec<u8>> {
        let output = self.run(argv, timeout)?;
        if !output.success() {
            bail!("{}", self.story(&format!("{}: {}", argv.join(" "), output.describe())));
        }
        Ok(output.stdout)
    }

    /// Writes a file in the guest.
    ///
    /// # Errors
    /// The guest is gone or the file cannot be written.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let request = Request::Put { path: path.to_owned(), mode, content: Bytes(content.to_vec()) };
        self.channel.ask(request, BRIEF).with_context(|| self.story(path)).map(drop)
    }

    /// Reads a file of at most `limit` bytes from the guest.
    ///
    /// # Errors
    /// The guest is gone, or the file is absent or larger.
    pub fn get(&self, path: &str, limit: u64) -> Result<Vec<u8>> {
        let request = Request::Get { path: path.to_owned(), limit };
        match self.channel.ask(request, BRIEF).with_context(|| self.story(path))? {
            Reply::Content(content) => Ok(content.0),
            other => bail!("the agent answered {other:?}"),
        }
    }

    /// Makes `127.0.0.1:port` in the guest lead to `127.0.0.1:port` on the host.
    ///
    /// # Errors
    /// The guest is gone or the port is taken there.
    pub fn forward(&self, port: u16) -> Result<()> {
        let request = Request::Forward { port, to: format!("10.0.2.2:{port}") };
        self.channel.ask(request, BRIEF).with_context(|| self.story("forward")).map(drop)
    }

    /// Switches the guest off in good order and waits for its end; gives the last lines of its console.
    ///
    /// # Errors
    /// It does not go off within `timeout`.
    pub fn power_off(mut self, timeout: Duration) -> Result<String> {
        self.channel.send(Request::PowerOff)?;
        let ended = self.qemu.wait(timeout);
        let status = ended.with_context(|| self.story("power off"))?;
        if !status.success() {
            bail!("{}", self.story(&format!("QEMU ended with {status}")));
        }
        Ok(self.console())
    }

    /// Cuts the power: what the guest had not written to its disks is lost.
    pub fn reset(mut self) {
        self.qemu.kill();
    }

    /// `what`, with the end of the console.
    fn story(&self, what: &str) -> String {
        format!("guest {}: {what}\n{}", self.guest.release, self.console())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.qemu.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.story("console at the failure:"));
        }
    }
}

impl Pending<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// The guest is gone, or the program could not be started.
    pub fn wait(self) -> Result<Output> {
        let reply = channel::wait(&self.reply, self.timeout + GRACE);
        match reply.with_context(|| self.vm.story(&self.shown))? {
            Reply::Exit { code, signal, timed_out, stdout, stderr } => {
                Ok(Output { code, signal, timed_out, stdout: stdout.0, stderr: stderr.0 })
            }
            other => bail!("the agent answered {other:?} to {}", self.shown),
        }
    }

    /// Whether it has not ended within `time`.
    #[must_use]
    pub fn still_runs_after(&mut self, time: Duration) -> bool {
        match self.reply.recv_timeout(time) {
            Ok(reply) => {
                // Keep it for `wait`.
                let (sender, receiver) = std::sync::mpsc::channel();
                let _ = sender.send(reply);
                self.reply = receiver;
                false
            }
            Err(error) => error == std::sync::mpsc::RecvTimeoutError::Timeout,
        }
    }

    /// Sends it a signal by number.
    ///
    /// # Errors
    /// The guest is gone, or the process has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.vm.channel.ask(Request::Signal { run: self.id, signal }, BRIEF).map(drop)
    }
}

/// A command with nothing on standard input.
#[must_use]
pub fn command(argv: &[&str], timeout: Duration) -> Command {
    Command {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        ..Command::default()
    }
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    const LINES: usize = 60;
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].iter().map(|line| format!("| {line}\n")).collect()
}
