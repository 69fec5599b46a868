//! Where commands run: this host or a guest, the same to a test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use skimmer_vm_images::protocol::Reply;
use skimmer_vm_images::{BootConfig, GuestRoot, Output, Pending, Vm, command, disk};

use crate::agent::Jobs;
use crate::skimmer::programs;

/// A machine that runs commands.
pub enum Machine {
    /// This one.
    Host(Host),
    /// A guest in QEMU.
    Guest(Vm),
}

/// This machine, with the agent's way of running commands.
#[derive(Default)]
pub struct Host {
    jobs: Arc<Jobs>,
    next: AtomicU64,
}

/// A command that was started.
pub enum Running<'a> {
    /// On this machine.
    Host(Receiver<Result<Output>>),
    /// In a guest.
    Guest(Pending<'a>),
}

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// A name of `kernels.toml`.
    pub kernel: String,
    /// The first process: `skimmer-agent`.
    pub agent: PathBuf,
    /// Programs that go to `/bin`.
    pub programs: Vec<PathBuf>,
    /// Disks to mount, in order.
    pub disks: Vec<GuestDisk>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// A disk with a whole system, which takes over from the agent; what is written to it is lost with the guest.
    pub system: Option<PathBuf>,
    /// Ports of the guest's loopback that lead to the same ports of ours.
    pub ports: Vec<u16>,
}

/// A disk of a guest, holding ext4.
#[derive(Debug, Clone)]
pub struct GuestDisk {
    /// At most 20 characters.
    pub name: &'static str,
    /// The raw image.
    pub path: PathBuf,
    /// Where it is mounted; made when absent.
    pub mount: String,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

impl GuestDisk {
    /// A disk that may be written.
    #[must_use]
    pub fn new(name: &'static str, path: &Path, mount: &str) -> Self {
        GuestDisk { name, path: path.to_owned(), mount: mount.to_owned(), read_only: false }
    }
}

impl GuestSpec {
    /// A guest of 2 GiB without disks.
    #[must_use]
    pub fn new(kernel: &str, agent: &Path, programs: Vec<PathBuf>) -> Self {
        GuestSpec {
            kernel: kernel.to_owned(),
            agent: agent.to_owned(),
            programs,
            disks: Vec::new(),
            memory_mib: 2048,
            system: None,
            ports: Vec::new(),
        }
    }

    /// Boots it and mounts its disks.
    ///
    /// # Errors
    /// A program is missing, or the guest does not come up.
    pub fn boot(&self) -> Result<Machine> {
        let kernel = skimmer_vm_images::prepare(&self.kernel)?;
        let mut root = GuestRoot::new(&self.agent);
        for program in &self.programs {
            root.program(program)?;
        }
        let initramfs = root.build(&kernel)?;
        let mut config = BootConfig::new(&kernel, &initramfs);
        config.memory_mib = self.memory_mib;
        if let Some(system) = &self.system {
            config.system = Some(system.clone());
            // Its services start under emulation.
            config.boot_timeout *= 4;
        }
        for disk in &self.disks {
            config = config.disk(disk.name, &disk.path, disk.read_only);
        }
        let vm = Vm::boot(&config)?;
        eprintln!("{}: up after {:?}", vm.guest().release, vm.guest().boot_time);
        for port in &self.ports {
            vm.forward(*port)?;
        }
        let devices = vm.guest().disks.clone();
        let machine = Machine::Guest(vm);
        let short = Duration::from_secs(60);
        for disk in &self.disks {
            let device = devices.get(disk.name);
            let device = device.with_context(|| format!("the guest does not see its disk {}", disk.name))?;
            machine.check(&["mkdir", "-p", &disk.mount], short)?;
            let options = if disk.read_only { "ro,noload" } else { "rw" };
            machine.check(&["mount", "-t", "ext4", "-o", options, device, &disk.mount], short)?;
        }
        Ok(machine)
    }
}

impl Machine {
    /// This machine.
    #[must_use]
    pub fn host() -> Self {
        Machine::Host(Host::default())
    }

    /// A guest of the kernel `name` with our programs in `/bin` and an empty file system of `cache_bytes`, made in the
    /// file `disk`, at `/cache`; `port` of its loopback leads to the same port of ours.
    ///
    /// # Errors
    /// A program is missing, or the guest does not come up.
    pub fn guest(name: &str, agent: &Path, disk: &Path, cache_bytes: u64, port: u16) -> Result<Self> {
        disk::empty(disk, cache_bytes)?;
        let mut spec = GuestSpec::new(name, agent, programs()?);
        spec.disks.push(GuestDisk::new("cache", disk, "/cache"));
        spec.ports.push(port);
        spec.boot()
    }

    /// Ends a guest at once: what it had not written to its disks is lost. This machine stays.
    pub fn cut_power(self) {
        if let Machine::Guest(vm) = self {
            vm.reset();
        }
    }

    /// Switches a guest off in good order; gives the last lines of its console. This machine stays.
    ///
    /// # Errors
    /// It does not go off within `timeout`.
    pub fn power_off(self, timeout: Duration) -> Result<String> {
        match self {
            Machine::Guest(vm) => vm.power_off(timeout),
            Machine::Host(_) => Ok(String::new()),
        }
    }

    /// The last lines of its kernel's log.
    #[must_use]
    pub fn kernel_log(&self) -> String {
        let output = self.run(&["sh", "-c", "dmesg | tail -n 40"], Duration::from_secs(30));
        output.map_or_else(|error| error.to_string(), |output| output.describe())
    }

    /// Starts a command; it is killed after `timeout`.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn start(&self, argv: &[&str], timeout: Duration) -> Result<Running<'_>> {
        let wanted = command(argv, timeout);
        match self {
            Machine::Guest(vm) => Ok(Running::Guest(vm.start(wanted)?)),
            Machine::Host(host) => {
                let (sender, receiver) = channel();
                let jobs = Arc::clone(&host.jobs);
                let id = host.next.fetch_add(1, Ordering::Relaxed);
                std::thread::spawn(move || {
                    // Nobody may be waiting any more.
                    let _ = sender.send(jobs.run(id, &wanted).and_then(output));
                });
                Ok(Running::Host(receiver))
            }
        }
    }

    /// Runs a command to its end, whatever that is.
    ///
    /// # Errors
    /// It cannot be started, or the guest is gone.
    pub fn run(&self, argv: &[&str], timeout: Duration) -> Result<Output> {
        self.start(argv, timeout)?.wait()
    }

    /// Runs a command that must succeed; gives its standard output.
    ///
    /// # Errors
    /// It fails: the message holds what it wrote.
    pub fn check(&self, argv: &[&str], timeout: Duration) -> Result<Vec<u8>> {
        let output = self.run(argv, timeout)?;
        if !output.success() {
            bail!("{}: {}", argv.join(" "), output.describe());
        }
        Ok(output.stdout)
    }

    /// Writes a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        match self {
            Machine::Guest(vm) => vm.put(path, mode, content),
            Machine::Host(_) => {
                if let Some(parent) = Path::new(path).parent() {
                    fs::create_dir_all(parent)?;
                }
                fs::write(path, content).with_context(|| format!("cannot write {path}"))?;
                Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
            }
        }
    }
}

impl Running<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// It could not be started, or the guest is gone.
    pub fn wait(self) -> Result<Output> {
        match self {
            // The runner ends by the command's own timeout.
            Running::Host(receiver) => receiver.recv().context("the runner ended without a word")?,
            Running::Guest(pending) => pending.wait(),
        }
    }

    /// Whether it has not ended within `time`.
    #[must_use]
    pub fn still_runs_after(&mut self, time: Duration) -> bool {
        match self {
            Running::Guest(pending) => pending.still_runs_after(time),
            Running::Host(receiver) => match receiver.recv_timeout(time) {
                Ok(result) => {
                    // Kept for `wait`.
                    let (sender, kept) = channel();
                    let _ = sender.send(result);
                    *receiver = kept;
                    false
                }
                Err(error) => error == RecvTimeoutError::Timeout,
            },
        }
    }
}

fn output(reply: Reply) -> Result<Output> {
    match reply {
        Reply::Exit { code, signal, timed_out, stdout, stderr } => {
            Ok(Output { code, signal, timed_out, stdout: stdout.0, stderr: stderr.0 })
        }
        other => bail!("a command ended with {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_runs_commands_side_by_side() {
        let host = Machine::host();
        let patience = Duration::from_secs(30);
        let mut slow =
            host.start(&["sh", "-c", "read -r line < /dev/null; sleep 0.5; echo slow"], patience).unwrap();
        assert_eq!(host.check(&["echo", "quick"], patience).unwrap(), b"quick\n");
        while slow.still_runs_after(Duration::from_millis(20)) {}
        assert_eq!(slow.wait().unwrap().stdout, b"slow\n");
        assert!(host.check(&["false"], patience).is_err());
    }
}
