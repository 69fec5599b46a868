//! Real containerds, old and new, run plain and lazy images through our snapshots, by `ctr` and by CRI.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kernel_tests::container_images::{self, ContainerImages as Stage};
use kernel_tests::containerd::{self, Containerd, Names, Version};
use kernel_tests::cri::{Cri, Pod};
use kernel_tests::debian_image::PERL;
use kernel_tests::skimmer::programs;
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use kernel_tests::wait::wait;
use serde_json::Value;
use skimmer_client::Client;
use skimmer_vm_images::{apt, run};

/// Containers of one image at once.
const MANY: usize = 50;
#[test]
fn containers_run_on_debian_s_containerd() {
    let test = "containers_run_on_debian_s_containerd";
    with(Version::Debian, Names::Told, test, |stage, daemon, containerd| {
        run_all(Version::Debian, stage, daemon, containerd)
    });
}

#[test]
fn containers_run_on_the_current_containerd() {
    let test = "containers_run_on_the_current_containerd";
    with(Version::Current, Names::Told, test, |stage, daemon, containerd| {
        run_all(Version::Current, stage, daemon, containerd)
    });
}

/// The name is asked of containerd when a container wants the image.
#[test]
fn an_image_whose_name_was_not_told_is_found() {
    let test = "an_image_whose_name_was_not_told_is_found";
    with(Version::Debian, Names::Untold, test, |stage, daemon, containerd| {
        let cri = Cri::connect(containerd.socket(), containerd.socket())?;
        cri.pull(&stage.lazy, None)?;
        ensure!(daemon.status()?["mounts"] == serde_json::json!([]), "it is mounted before it is used");
        let pod = cri.pod("one")?;
        let container = cri.container(&pod, "lazy", &stage.lazy, &["sleep", "1000000"])?;
        stage.check(0, 3, |command| Ok(String::from_utf8(cri.exec(&container, command)?)?))?;
        all_away(stage, daemon, containerd, &cri, &pod)
    });
}

/// The passwords `first` and `second` of the user `skim`, hashed by bcrypt.
const FIRST: &str = "skim:$2b$04$abcdefghijklmnopqrstuuvybHXQqehXl2NdtAhT6BAmwe6EZ8HOi\n";
const SECOND: &str = "skim:$2b$04$abcdefghijklmnopqrstuu0m4FNu/b0Ul0dVXpD5yXn5kdSneXCgS\n";

/// Only the pull has it: no file on the node, no label.
#[test]
fn the_login_of_a_pod_s_pull_outlives_it() {
    let test = "the_login_of_a_pod_s_pull_outlives_it";
    with(Version::Debian, Names::Told, test, |stage, daemon, containerd| {
        let users = daemon.root.join("htpasswd");
        fs::write(&users, FIRST)?;
        let private = stage.registry.behind_passwords(&users)?;
        let image = private.reference("perl:lazy");
        let cri = Cri::connect(containerd.socket(), &daemon.sockets.join("snapshots.sock"))?;
        for login in [None, Some(("skim", "wrong"))] {
            let refused = format!("{:#}", cri.pull(&image, login).err().context("it was let in")?);
            ensure!(refused.contains("401 Unauthorized"), "in other words than containerd's: {refused}");
        }
        let (data, hidden) = (stage.registry.blob(&stage.data)?, daemon.root.join("hidden"));
        fs::rename(&data, &hidden)?;
        let error = cri.pull(&image, Some(("skim", "first"))).err().context("an image without its data")?;
        ensure!(format!("{error:#}").contains(&format!("blob sha256:{} of the image is not at", stage.data)));
        ensure!(daemon.status()?["mounts"] == serde_json::json!([]), "it is still mounted");
        fs::rename(&hidden, &data)?;
        // containerd may be clearing what the failed pull left.
        let again = || Ok(cri.pull(&image, Some(("skim", "first"))).is_ok());
        wait(Duration::from_secs(60), "the data is back", again)?;
        let pod = cri.pod("one")?;
        let container = cri.container(&pod, "lazy", &image, &["sleep", "1000000"])?;
        let check = |first: usize| {
            stage.check(first, 6, |command| Ok(String::from_utf8(cri.exec(&container, command)?)?))
        };
        check(0).context("after the pull")?;
        daemon.stop()?;
        daemon.start()?;
        check(1).context("by the next daemon")?;
        fs::write(&users, SECOND)?;
        ensure!(cri.pull(&image, Some(("skim", "first"))).is_err(), "the registry still knows the old one");
        // containerd asks a snapshotter that was away only after a moment.
        let again = || Ok(cri.pull(&image, Some(("skim", "second"))).is_ok());
        wait(Duration::from_secs(60), "the new password is good", again)?;
        check(2).context("with another password")?;
        all_away(stage, daemon, containerd, &cri, &pod)
    });
}

fn with(
    version: Version,
    names: Names,
    test: &str,
    story: impl Fn(&Stage, &mut Daemon, &Containerd) -> Result<()>,
) {
    if let Some(why) = not_root().or_else(no_precontent_events).or_else(|| version.missing()) {
        return skip(test, &why);
    }
    apt::ensure(container_images::PACKAGES).unwrap();
    apt::ensure(&containerd::PACKAGES).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A socket's path has at most 107 bytes.
    let sockets = tempfile::tempdir().unwrap();
    let stage = Stage::set(scratch.path()).unwrap();
    let mut daemon = Daemon::new(scratch.path(), sockets.path()).unwrap();
    let play = |daemon: &mut Daemon| {
        let skimmer = programs()?.swap_remove(0);
        let config = daemon.config.clone();
        let told = (skimmer.as_path(), config.as_path());
        let directory = scratch.path().join("containerd");
        let containerd = Containerd::start(version, &directory, sockets.path(), told, &stage.pause, names)?;
        let result = story(&stage, daemon, &containerd);
        if result.is_err() {
            containerd.end_all();
        }
        result.with_context(|| containerd.log())
    };
    if let Err(error) = play(&mut daemon) {
        panic!("{error:#}\n{}", daemon.log());
    }
}

/// `skimmerd`, which can be stopped and started.
struct Daemon {
    child: Option<Child>,
    config: PathBuf,
    sockets: PathBuf,
    root: PathBuf,
    log: PathBuf,
}

impl Daemon {
    fn new(scratch: &Path, sockets: &Path) -> Result<Self> {
        let (config, root, log) =
            (scratch.join("skimmerd.toml"), scratch.join("root"), scratch.join("skimmerd.log"));
        let text = format!(
            "root = {root:?}\nsocket = {:?}\nkeeper_socket = {:?}\n[containerd]\nsocket = {:?}\naddress = {:?}\n",
            sockets.join("skimmerd.sock"),
            sockets.join("keeper.sock"),
            sockets.join("snapshots.sock"),
            sockets.join("containerd.sock"),
        );
        fs::write(&config, text)?;
        let mut daemon = Self { child: None, config, sockets: sockets.to_owned(), root, log };
        daemon.start()?;
        Ok(daemon)
    }

    fn start(&mut self) -> Result<()> {
        let program = programs()?.swap_remove(1);
        let log = fs::File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(program);
        command.arg("--config").arg(&self.config).stdin(Stdio::null()).stderr(log);
        self.child = Some(command.spawn()?);
        wait(Duration::from_secs(30), "skimmerd answers", || Ok(self.skimmer(&["status"]).is_ok()))
    }

    /// Asks it to end; mounts and keeper stay.
    fn stop(&mut self) -> Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        ensure!(child.wait()?.success(), "skimmerd ended badly");
        Ok(())
    }

    fn skimmer(&self, arguments: &[&str]) -> Result<String> {
        let program = programs()?.swap_remove(0);
        let socket = self.sockets.join("skimmerd.sock");
        let out = run(Command::new(program).args(arguments).arg("--socket").arg(socket))?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.skimmer(&["status", "--json"])?)?)
    }

    /// Stored bytes that were asked of the registry for blobs.
    fn fetched(&self) -> Result<u64> {
        let socket = self.sockets.join("skimmerd.sock");
        let (agent, socket) = (env!("CARGO_BIN_EXE_skimmer-agent"), socket.display().to_string());
        let text = String::from_utf8(run(Command::new(agent).args(["http", &socket, "/metrics"]))?)?;
        let line = text.lines().find_map(|line| line.strip_prefix("skimmer_fetched_bytes_total "));
        Ok(line.context("no metric of fetched bytes")?.parse()?)
    }

    /// Ends it and its keeper; nothing may be mounted any more.
    fn shut_down(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = self.sockets.join("skimmerd.sock");
        let report = runtime.block_on(async { Client::connect(socket).await?.shutdown(true).await })?;
        ensure!(report.unmounted.is_empty() && report.keeper_stopped, "{report:?}");
        let status = self.child.take().context("it does not run")?.wait()?;
        ensure!(status.success(), "skimmerd ended with {status}");
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After a failed test: nothing of it may stay mounted.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below =
            |place: &&str| [&self.root, &self.sockets].iter().any(|dir| Path::new(place).starts_with(dir));
        for place in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(below) {
            let _ = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
        }
        let _ = self.shut_down();
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn run_all(version: Version, stage: &Stage, daemon: &mut Daemon, containerd: &Containerd) -> Result<()> {
    let run: Vec<&str> = PERL.run.to_vec();
    // By a kubelet's calls.
    let images = match version {
        Version::Debian => containerd.socket().to_owned(),
        // As a kubelet does whose logins we are to know.
        Version::Current => daemon.sockets.join("snapshots.sock"),
    };
    let cri = Cri::connect(containerd.socket(), &images)?;
    let before = Instant::now();
    cri.pull(&stage.lazy, None)?;
    let pulled = before.elapsed();
    let pod = cri.pod("one")?;
    let container = cri.container(&pod, "lazy", &stage.lazy, &["sleep", "1000000"])?;
    let said = String::from_utf8(cri.exec(&container, &run)?)?;
    ensure!(said.contains(PERL.expect), "{said}");
    let moved = daemon.fetched()?;
    println!(
        "{version:?}: pulled in {pulled:?}; {moved} of {} stored bytes moved at the first output ({} %)",
        stage.stored,
        moved * 100 / stage.stored
    );
    ensure!(moved * 4 < stage.stored, "{moved} bytes of {} are not a small share", stage.stored);
    stage.check(0, 3, |command| Ok(String::from_utf8(cri.exec(&container, command)?)?))?;
    cri.pull(&stage.plain, None)?;
    let plain = cri.container(&pod, "plain", &stage.plain, &["sleep", "1000000"])?;
    ensure!(String::from_utf8(cri.exec(&plain, &run)?)?.contains(PERL.expect), "the plain image is wrong");
    stage.check(0, 1, |command| Ok(String::from_utf8(cri.exec(&plain, command)?)?))?;

    // By `ctr`, with images that CRI pulled; the current one's own pull is lazy too.
    let namespace = match version {
        Version::Debian => "k8s.io",
        Version::Current => {
            for image in [&stage.lazy, &stage.plain] {
                let pull = ["images", "pull", "--snapshotter", "skimmer", "--plain-http", image];
                containerd.ctr(&pull)?;
            }
            "default"
        }
    };
    let ctr = |arguments: &[&str]| {
        let mut all = vec!["--namespace", namespace];
        all.extend(arguments);
        containerd.ctr(&all)
    };
    for (image, name) in [(&stage.lazy, "once-lazy"), (&stage.plain, "once-plain")] {
        let mut command = vec!["run", "--rm", "--snapshotter", "skimmer", image, name];
        command.extend(&run);
        let said = ctr(&command)?;
        ensure!(said.contains(PERL.expect), "{name}: {said}");
    }

    if version == Version::Current {
        // In a user namespace: root in there owns the image's files and the root directory, and is nobody out here.
        let map = "0:100000:65536";
        let mut command = vec!["run", "--rm", "--snapshotter", "skimmer", "--uidmap", map, "--gidmap", map];
        command.extend(["--remap-labels", &stage.lazy, "mapped", "sh", "-ec"]);
        command.push("stat -c %u:%g / /usr/bin; echo mine > /mine; cat /mine /proc/self/uid_map");
        let said = ctr(&command)?;
        let words: Vec<&str> = said.split_whitespace().collect();
        ensure!(words == ["0:0", "0:0", "mine", "0", "100000", "65536"], "{said}");
    }

    // Many of one image, and the daemon restarted under them.
    let names: Vec<String> = (0..MANY).map(|number| format!("many-{number}")).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let parts = names.chunks(MANY.div_ceil(5));
        let started: Vec<_> = parts
            .map(|names| {
                scope.spawn(move || {
                    names.iter().try_for_each(|name| {
                        let image = stage.lazy.as_str();
                        let command =
                            ["run", "-d", "--snapshotter", "skimmer", image, name, "sleep", "1000000"];
                        ctr(&command).map(|_| ())
                    })
                })
            })
            .collect();
        started.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    println!("{version:?}: {MANY} containers started in {:?}", start.elapsed());
    let mounts = daemon.status()?["mounts"].as_array().map_or(0, Vec::len);
    ensure!(mounts == 1, "{mounts} mounts of one image");
    daemon.stop()?;
    // What is cached needs no daemon.
    let said = ctr(&["task", "exec", "--exec-id", "asleep", &names[0], run[0], "-e", "print 40 + 2"]);
    ensure!(said?.contains("42"), "nothing runs without the daemon");
    daemon.start()?;
    for (number, name) in names.iter().enumerate().step_by(7) {
        let exec = |command: &[&str]| {
            let mut all = vec!["task", "exec", "--exec-id", "check", name];
            all.extend(command);
            ctr(&all)
        };
        stage.check(1 + number % 5, 6, exec).with_context(|| name.clone())?;
        // What one writes no other sees.
        exec(&["sh", "-c", "test ! -e /mine && echo x > /mine && test -s /mine"])?;
    }
    ensure!(ctr(&["run", "--rm", "--snapshotter", "skimmer", &stage.lazy, "after", "true"]).is_ok());

    // Everything away, and nothing stays.
    std::thread::scope(|scope| {
        for names in names.chunks(MANY.div_ceil(5)) {
            scope.spawn(move || {
                for name in names {
                    let _ = ctr(&["task", "rm", "--force", name]);
                    let _ = ctr(&["container", "rm", name]);
                }
            });
        }
    });
    ensure!(ctr(&["container", "ls", "-q"])?.lines().all(|id| !id.starts_with("many-")), "containers stay");
    all_away(stage, daemon, containerd, &cri, &pod)
}

/// Removes the pod and every image, and ends the daemon: nothing may be left.
fn all_away(stage: &Stage, daemon: &mut Daemon, containerd: &Containerd, cri: &Cri, pod: &Pod) -> Result<()> {
    cri.remove_pod(pod.id())?;
    for image in [&stage.lazy, &stage.plain, &stage.pause] {
        cri.remove_image(image)?;
    }
    for namespace in ["default", "k8s.io"] {
        for image in containerd.ctr(&["--namespace", namespace, "images", "ls", "-q"])?.lines() {
            containerd.ctr(&["--namespace", namespace, "images", "rm", "--sync", image])?;
        }
    }
    let left = || -> Result<Vec<String>> {
        let names = fs::read_dir(daemon.root.join("snapshots"))?.map(|entry| Ok(entry?.file_name()));
        names.map(|name: Result<_>| Ok(name?.to_string_lossy().into_owned())).collect()
    };
    wait(Duration::from_secs(30), "no snapshot is left", || Ok(left()?.is_empty()))
        .with_context(|| format!("{:?}", left()))?;
    let status = daemon.status()?;
    ensure!(status["mounts"] == serde_json::json!([]), "{status}");
    ensure!(status["blobs"] == serde_json::json!([]), "{status}");
    daemon.shut_down()
}
