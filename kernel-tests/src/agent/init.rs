//! The first process: file systems, modules, network; then the agent, and the orphans until it ends.

use std::convert::Infallible;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::mount::MountFlags;
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;
use skimmer_vm_images::protocol;

use super::serve;

/// The agent as a service of a whole system.
const UNIT: &str = "skimmer-agent.service";

/// Sets the guest up and stays its first process; switches it off when the agent ends.
///
/// # Errors
/// Something of the set-up fails. The kernel then panics, and with it the machine ends.
pub fn init() -> Result<()> {
    let error = match start() {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("skimmer-agent: {error:#}");
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    Err(error)
}

fn start() -> Result<Infallible> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("tmpfs", "/tmp")] {
        mount(kind, target)?;
    }
    // The kernel may have mounted it already.
    let _ = mount("devtmpfs", "/dev");
    load_modules(Path::new(protocol::MODULES))?;
    network()?;
    let options = fs::read_to_string("/proc/cmdline")?;
    if let Some(disk) = options.split_whitespace().find_map(|option| option.strip_prefix(protocol::SYSTEM)) {
        return system(disk);
    }
    let agent = Command::new("/bin/skimmer-agent")
        .arg("serve")
        .env_clear()
        .env("PATH", "/bin")
        .env("HOME", "/root")
        .env("RUST_BACKTRACE", "1")
        .spawn()
        .context("cannot start the agent")?;
    let agent = i32::try_from(agent.id())?;
    loop {
        let ended = rustix::process::wait(WaitOptions::empty())?;
        if let Some((pid, status)) = ended
            && pid.as_raw_pid() == agent
        {
            anyhow::bail!("the agent ended: {status:?}");
        }
    }
}

/// Makes the file system of a disk the root, puts the agent among its services, and becomes its first process.
fn system(disk: &str) -> Result<Infallible> {
    let device = serve::disks()?.remove(disk).with_context(|| format!("there is no disk {disk}"))?;
    let root = Path::new("/mnt");
    rustix::mount::mount(&device, root, "ext4", MountFlags::empty(), None).context("mounting the system")?;
    mount("tmpfs", "/mnt/run")?;
    let units = root.join("run/systemd/system");
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    fs::copy("/bin/skimmer-agent", root.join("run/skimmer-agent"))?;
    fs::write(units.join(UNIT), include_str!("skimmer-agent.service"))?;
    symlink(Path::new("..").join(UNIT), units.join("multi-user.target.wants").join(UNIT))?;
    for name in ["proc", "sys", "dev"] {
        rustix::mount::mount_move(Path::new("/").join(name), root.join(name))?;
    }
    std::env::set_current_dir(root)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    Err(Command::new("/sbin/init").env_clear().exec()).context("starting the system's first process")
}

fn mount(kind: &str, target: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    rustix::mount::mount(kind, target, kind, MountFlags::empty(), None)
        .with_context(|| format!("cannot mount {kind} on {target}"))
}

/// Loads all modules of a directory in the order of their names.
fn load_modules(directory: &Path) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("{}", directory.display()))?;
    let mut modules: Vec<_> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    modules.sort();
    for module in modules {
        match rustix::system::finit_module(File::open(&module)?, c"", 0) {
            // Loaded already: nothing to do.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot load {}", module.display())),
        }
    }
    Ok(())
}

/// Brings up the loopback and, when there is a card, the addresses of QEMU's user network.
fn network() -> Result<()> {
    let mut commands = vec!["ip link set lo up"];
    if Path::new("/sys/class/net/eth0").exists() {
        commands.extend([
            "ip addr add 10.0.2.15/24 dev eth0",
            "ip link set eth0 up",
            "ip route add default via 10.0.2.2",
        ]);
    }
    for command in commands {
        let status = Command::new("/bin/busybox").args(command.split(' ')).status()?;
        anyhow::ensure!(status.success(), "{command}: {status}");
    }
    Ok(())
}
