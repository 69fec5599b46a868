//! Where commands run: this host or a guest, the same to a test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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
        let kernel = skimmer_vm_images::prepare(name)?;
        let mut root = GuestRoot::new(agent);
        for program in programs()? {
            root.program(&program)?;
        }
        let initramfs = root.build(&kernel)?;
        disk::empty(disk, cache_bytes)?;
        let vm = Vm::boot(&BootConfig::new(&kernel, &initramfs).disk("cache", disk, false))?;
        eprintln!("{}: up after {:?}", vm.guest().release, vm.guest().boot_time);
        vm.forward(port)?;
        let device = vm.guest().disks.get("cache").context("the guest does not see its disk")?.clone();
        let machine = Machine::Guest(vm);
        let short = Duration::from_secs(30);
        machine.check(&["mkdir", "/cache"], short)?;
        machine.check(&["mount", "-t", "ext4", &device, "/cache"], short)?;
        Ok(machine)
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
