//! The Debian package on whole systems: installed, used by containerd, reloaded, upgraded, removed, purged.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kernel_tests::container_images::{self, ContainerImages};
use kernel_tests::debian_image::PERL;
use kernel_tests::machine::{GuestDisk, GuestSpec, Machine};
use kernel_tests::skimmer::programs;
use kernel_tests::skips::{not_root, skip};
use kernel_tests::wait::wait;
use skimmer_vm_images::{apt, debian, disk, run};

/// What the systems have besides Debian's essential packages.
const SYSTEM: &[&str] = &["systemd-sysv", "containerd", "runc"];
/// Services start under emulation, on a busy host.
const PATIENCE: Duration = Duration::from_secs(300);
/// The worst exposure that `systemd-analyze security` may find; what needs a mount namespace cannot be had.
const EXPOSURE: f64 = 5.5;

#[test]
fn the_package_lives_on_a_system_with_fanotify() {
    lives_on("7.2", "fanotify", "the_package_lives_on_a_system_with_fanotify");
}

#[test]
fn the_package_lives_on_a_system_with_fscache() {
    lives_on("6.1", "fscache", "the_package_lives_on_a_system_with_fscache");
}

fn lives_on(kernel: &str, mode: &'static str, test: &str) {
    if let Some(why) = not_root().or_else(skimmer_vm_images::missing) {
        return skip(test, &why);
    }
    apt::ensure(container_images::PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let packages = packages(scratch.path()).unwrap();
    let images = ContainerImages::set(scratch.path()).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    let mut spec = GuestSpec::new(kernel, agent, Vec::new());
    spec.system = Some(debian::system(SYSTEM).unwrap());
    spec.ports.push(images.registry.port());
    spec.disks.push(GuestDisk { read_only: true, ..GuestDisk::new("packages", &packages, "/media") });
    let system = System { machine: spec.boot().unwrap(), images, mode };
    let container = system.play().and_then(|()| system.play_again());
    if let Err(error) = container {
        let said = system.sh("journalctl --no-pager -n 150; dmesg | tail -n 30").unwrap_or_default();
        panic!("{kernel}: {error:#}\n{said}");
    }
    system.power_off().unwrap();
}

/// A disk with two revisions of the package.
fn packages(scratch: &Path) -> Result<PathBuf> {
    let programs = programs()?.swap_remove(0).parent().context("programs lie somewhere")?.to_owned();
    let debs = scratch.join("debs");
    for revision in ["1", "2"] {
        let mut deb = Command::new(programs.join("xtask"));
        deb.args(["deb", "--revision", revision, "--programs"]).arg(&programs).arg("--out").arg(&debs);
        run(&mut deb)?;
    }
    let image = scratch.join("debs.disk");
    disk::from_directory(&image, &debs)?;
    fs::remove_dir_all(debs)?;
    Ok(image)
}

struct System {
    machine: Machine,
    images: ContainerImages,
    mode: &'static str,
}

/// A running container.
struct Container {
    pod: String,
    id: String,
}

impl System {
    /// Runs a command of the shell; gives what it printed.
    fn sh(&self, command: &str) -> Result<String> {
        let out = self.machine.check(&["sh", "-ec", command], PATIENCE)?;
        Ok(String::from_utf8_lossy(&out).trim_end().to_owned())
    }

    fn cri(&self, arguments: &[&str]) -> Result<String> {
        let mut command = vec!["/run/skimmer-agent", "cri", "/run/containerd/containerd.sock"];
        command.extend(arguments);
        Ok(String::from_utf8(self.machine.check(&command, PATIENCE)?)?)
    }

    /// What systemd knows of the daemon or the keeper.
    fn pid(&self, unit: &str) -> Result<u32> {
        let pid: u32 = self.sh(&format!("systemctl show --property MainPID --value {unit}"))?.parse()?;
        ensure!(pid > 0, "{unit} does not run");
        Ok(pid)
    }

    /// Whether a container sees right bytes, of other files each time.
    fn check(&self, container: &Container, step: usize) -> Result<()> {
        self.images.check(step, 10, |command| {
            let mut exec = vec!["exec", &container.id, "--"];
            exec.extend(command);
            self.cri(&exec)
        })
    }

    /// Both processes of the keeper at one instant, under a reader whose access no daemon is there to answer: systemd has
    /// all that they held, and the reader only waits.
    fn kill_all_keepers(&self, container: &Container) -> Result<()> {
        step("kill all of the keeper");
        let daemon = self.pid("skimmerd")?;
        // The main process only waits by now. Its clean end would make systemd let go of everything.
        self.sh("systemctl kill skimmer-keeper")?;
        self.sh(&format!("kill -STOP {daemon}"))?;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| self.check(container, 8));
            std::thread::sleep(Duration::from_secs(3));
            let all = "$(grep -lx skimmer-keeper /proc/[0-9]*/comm | cut -d/ -f3)";
            let killed = self.sh(&format!("kill -9 {all}; kill -CONT {daemon}"));
            killed.and(reader.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the reader panicked"))))
        })
        .with_context(|| self.sh("journalctl -n 60 -u skimmer-keeper -u skimmerd").unwrap_or_default())?;
        self.check(container, 9)?;
        self.sh("systemctl is-active skimmerd.service skimmer-keeper.service")?;
        self.sh("journalctl -u skimmer-keeper | grep 'died at once'").map(|line| println!("{line}"))
    }

    fn play(&self) -> Result<()> {
        step("install");
        self.sh("dpkg -i /media/skimmer_*-1_*.deb")?;
        self.sh("systemctl is-active skimmerd.service skimmerd.socket skimmer-keeper.service")?;
        let modes = self.sh("skimmer status --json")?;
        let modes: serde_json::Value = serde_json::from_str(&modes)?;
        let usable =
            modes["modes"].as_array().context("no modes")?.iter().find(|mode| mode["mode"] == self.mode);
        ensure!(usable.is_some_and(|mode| mode["usable"] == true), "{modes}");
        for unit in ["skimmerd.service", "skimmer-keeper.service"] {
            self.exposure(unit)?;
        }

        step("run a container");
        // Pods get it, and debootstrap makes none.
        self.machine.put("/etc/hosts", 0o644, b"127.0.0.1 localhost\n")?;
        let pause = &self.images.pause;
        let config =
            format!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = {pause:?}\n");
        self.machine.put("/etc/containerd/config.toml", 0o644, config.as_bytes())?;
        self.sh(
            "skimmer containerd config --patch /etc/containerd/config.toml && systemctl restart containerd",
        )?;
        let container = self.container(&["sleep", "1000000"])?;
        self.check(&container, 0)?;

        step("reload");
        let (daemon, keeper) = (self.pid("skimmerd")?, self.pid("skimmer-keeper")?);
        self.sh("echo 'log = \"debug\"' > /etc/skimmer/config.toml && systemctl reload skimmerd")?;
        ensure!(self.pid("skimmerd")? == daemon, "it is another process");
        self.check(&container, 1)?;
        self.sh("echo 'no_such_option = 1' > /etc/skimmer/config.toml")?;
        ensure!(self.sh("systemctl reload skimmerd").is_err(), "a bad configuration was taken");
        self.sh("journalctl -u skimmerd | grep -q no_such_option")?;
        self.check(&container, 2)?;
        self.sh("rm /etc/skimmer/config.toml")?;

        step("kill");
        self.sh(&format!("kill -9 {daemon}"))?;
        self.check(&container, 3)?;
        ensure!(self.pid("skimmerd")? != daemon, "it is the same process");

        step("upgrade");
        let daemon = self.pid("skimmerd")?;
        self.sh("dpkg --force-confmiss -i /media/skimmer_*-2_*.deb && test -f /etc/skimmer/config.toml")?;
        ensure!(self.pid("skimmerd")? != daemon, "the old daemon goes on");
        ensure!(self.pid("skimmer-keeper")? == keeper, "the keeper was restarted");
        let runs = self.sh(&format!("readlink /proc/{keeper}/exe"))?;
        ensure!(runs == "/usr/sbin/skimmer-keeper", "the keeper is {runs}");
        self.check(&container, 4)?;

        step("kill the keeper");
        self.sh(&format!("kill -9 {keeper}"))?;
        self.check(&container, 6)?;
        ensure!(self.pid("skimmer-keeper")? != keeper, "it is the same process");
        self.sh("systemctl reload skimmer-keeper && systemctl is-active skimmer-keeper")?;
        self.check(&container, 7)?;

        if self.mode == "fanotify" {
            self.kill_all_keepers(&container)?;
        }

        step("it cannot be removed under a container");
        self.sh("systemctl stop skimmerd.socket skimmerd.service; ! dpkg -r skimmer; systemctl start skimmerd.service")?;
        let refused = self.machine.run(&["dpkg", "-r", "skimmer"], PATIENCE)?;
        ensure!(
            !refused.success() && refused.describe().contains("containers stand on images"),
            "{}",
            refused.describe()
        );
        self.sh("systemctl is-active skimmerd.service skimmer-keeper.service")?;
        self.check(&container, 5)?;

        step("remove");
        self.cri(&["remove", &container.pod, &self.images.lazy, &self.images.pause])?;
        wait(PATIENCE, "no snapshot is left", || Ok(self.sh("ls /var/lib/skimmer/snapshots")?.is_empty()))?;
        self.sh("dpkg -r skimmer")?;
        let left = "! grep erofs /proc/mounts; ! grep -lE '^(skimmerd|skimmer-keeper)$' /proc/[0-9]*/comm; \
                    ! systemctl list-units --all --no-legend --plain 'skimmer*' | grep -v skimmer-agent; \
                    test -f /etc/skimmer/config.toml; test -d /var/lib/skimmer";
        for line in left.split("; ") {
            self.sh(line).with_context(|| line.to_owned())?;
        }

        step("purge");
        self.sh("dpkg -P skimmer; ! ls -d /etc/skimmer /var/lib/skimmer /run/skimmer")?;
        Ok(())
    }

    /// Runs a container.
    fn container(&self, command: &[&str]) -> Result<Container> {
        let said = self.cri(&[&["run", &self.images.lazy, "--"], command].concat())?;
        let (pod, id) = said.trim_end().split_once(' ').context("two ids")?;
        let container = Container { pod: pod.to_owned(), id: id.to_owned() };
        let mut exec = vec!["exec", &container.id, "--"];
        exec.extend(PERL.run);
        let said = self.cri(&exec)?;
        ensure!(said.contains(PERL.expect), "{said}");
        Ok(container)
    }

    /// After a purge.
    fn play_again(&self) -> Result<()> {
        step("install again");
        // containerd waits longer and longer before it looks for a snapshotter that was gone.
        self.sh("dpkg -i /media/skimmer_*-1_*.deb && systemctl restart containerd")?;
        // As a first process that does not say so it would not end when it is told to.
        self.container(&["sh", "-c", "trap exit TERM; sleep 1000000 & wait"]).map(drop)
    }

    /// Under a container: the keeper serves to the last, and nobody waits for it.
    fn power_off(self) -> Result<()> {
        step("power off");
        let console = self.machine.power_off(PATIENCE)?;
        // systemd tells whom it waits for, after a while.
        ensure!(!console.contains("skimmer"), "{console}");
        Ok(())
    }

    /// What `systemd-analyze` thinks of a unit's hardening.
    fn exposure(&self, unit: &str) -> Result<()> {
        let said = self.sh(&format!("systemd-analyze security --no-pager {unit}"))?;
        let line = said.lines().find(|line| line.contains("Overall exposure level")).context(said.clone())?;
        println!("{unit}: {}", line.trim_start_matches(|c: char| !c.is_ascii_alphabetic()));
        let level =
            line.rsplit(": ").next().and_then(|level| level.split(' ').next()).context(said.clone())?;
        ensure!(level.parse::<f64>()? <= EXPOSURE, "{line}");
        Ok(())
    }
}

fn step(what: &str) {
    eprintln!("  {what}");
}
