//! The QEMU process: its command line, and its end.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::protocol;
use crate::vm::BootConfig;

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Emulation: everywhere, and slow.
    Tcg,
    /// The host kernel's virtualisation; on some hosts that have the device guests hang or die.
    Kvm,
}

impl Accelerator {
    /// What `SKIMMER_VM_ACCEL` (`tcg` or `kvm`) asks for; without it emulation, which is always safe.
    ///
    /// # Errors
    /// The variable has another value.
    pub fn from_env() -> Result<Self> {
        match std::env::var("SKIMMER_VM_ACCEL").ok().as_deref() {
            None | Some("" | "tcg") => Ok(Accelerator::Tcg),
            Some("kvm") => Ok(Accelerator::Kvm),
            Some(other) => bail!("SKIMMER_VM_ACCEL={other}: must be tcg or kvm"),
        }
    }
}

/// Why guests cannot be booted on this machine, after installing what can be installed; `None` when they can.
#[must_use]
pub fn missing() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("guests are x86-64 and need programs of that architecture".to_owned());
    }
    apt::ensure(&["qemu-system-x86", "cpio", "e2fsprogs", "binutils"]).err().map(|error| format!("{error:#}"))
}

/// A running QEMU; killed when dropped.
pub(crate) struct Qemu {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Qemu {
    /// Starts the machine. It connects to the socket `control` and writes its console to `console`.
    pub(crate) fn start(
        config: &BootConfig,
        accelerator: Accelerator,
        control: &Path,
        console: &Path,
        log: &Path,
    ) -> Result<Self> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(arguments(config, accelerator, control, console)?);
        command
            .stdin(Stdio::null())
            .stdout(File::create(log)?)
            .stderr(File::options().append(true).open(log)?);
        let child =
            command.spawn().context("cannot start qemu-system-x86_64 (Debian package qemu-system-x86)")?;
        Ok(Qemu { child, ended: None })
    }

    /// How it ended, when it has.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("QEMU did not end within {timeout:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it at once, as a power cut would.
    pub(crate) fn kill(&mut self) {
        if !matches!(self.ended(), Ok(Some(_))) {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(
    config: &BootConfig,
    accelerator: Accelerator,
    control: &Path,
    console: &Path,
) -> Result<Vec<OsString>> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: OsString| arguments.extend([option.into(), value]);
    // Only the chosen accelerator: falling back to another in silence would hide why a run is slow.
    add("-accel", if accelerator == Accelerator::Tcg { "tcg,thread=multi" } else { "kvm" }.into());
    add("-cpu", "max".into());
    add("-m", config.memory_mib.to_string().into());
    add("-smp", config.cpus.to_string().into());
    add("-display", "none".into());
    add("-kernel", config.kernel.vmlinuz.clone().into());
    add("-initrd", config.initramfs.clone().into());
    // An oops ends the guest at once, so a test fails with its text rather than hanging.
    let mut append = OsString::from("console=ttyS0 quiet panic=-1 oops=panic");
    if let Some(system) = &config.system {
        // Network cards keep the names that the agent's first part gave addresses.
        append.push(format!(" net.ifnames=0 {}{}", protocol::SYSTEM, protocol::SYSTEM_DISK));
        let mut drive = option("if=none,id=system,format=raw,file=", system)?;
        drive.push(",snapshot=on");
        add("-drive", drive);
        add("-device", format!("virtio-blk-pci,drive=system,serial={}", protocol::SYSTEM_DISK).into());
    }
    add("-append", append);
    add("-chardev", option("file,id=console,path=", console)?);
    add("-serial", "chardev:console".into());
    add("-device", "virtio-serial-pci".into());
    add("-chardev", option("socket,id=agent,server=off,path=", control)?);
    add("-device", format!("virtserialport,chardev=agent,name={}", protocol::PORT).into());
    if config.network {
        add("-netdev", "user,id=net,ipv6=off".into());
        // No boot ROM: it comes in a package of its own.
        add("-device", "virtio-net-pci,netdev=net,romfile=".into());
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let mut drive = option(&format!("if=none,id=disk{index},format=raw,file="), &disk.path)?;
        // A guest is to see an error, and not to be stopped until somebody looks.
        drive.push(if disk.read_only {
            ",readonly=on"
        } else {
            ",werror=report,rerror=report,discard=unmap"
        });
        add("-drive", drive);
        add("-device", format!("virtio-blk-pci,drive=disk{index},serial={}", disk.name).into());
    }
    arguments.extend(["-nodefaults".into(), "-no-reboot".into()]);
    Ok(arguments)
}

/// `prefix` and a path, with QEMU's doubling of commas.
fn option(prefix: &str, path: &Path) -> Result<OsString> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(format!("{prefix}{}", text.replace(',', ",,")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_do_not_end_an_option() {
        assert_eq!(option("file=", Path::new("/a,b/c")).unwrap(), "file=/a,,b/c");
    }
}
