//! `cargo xtask demo`: a container's program starts from a real registry over a slow link, ours against
//! pull-everything-and-unpack of the original image.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kernel_tests::debian_image::{self, PYTHON, TAG};
use kernel_tests::registry::Registry;
use serde_json::Value;
use skimmer_bench::link::{Link, Shape};
use skimmer_vm_images::apt;

use crate::run;

/// The registry's port, at the far end.
const PORT: u16 = 5000;
const PACKAGES: &[&str] = &["docker-registry", "iproute2", "skopeo", "umoci"];

/// The link of the demo.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rate of the link to the registry, Mbit/s.
    #[arg(long, default_value_t = 100)]
    mbit: u64,
    /// Round trip time of the link, milliseconds.
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,
    /// Attach mode: auto, fscache or fanotify.
    #[arg(long, default_value = "auto")]
    mode: String,
}

/// What one way of starting the program cost.
struct Row {
    what: String,
    first_output: Duration,
    moved: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    apt::ensure(PACKAGES)?;
    println!("building");
    let packages = ["--package", "skimmer-cli", "--package", "skimmer-daemon", "--package", "skimmer-keeper"];
    run::check(run::cargo(&["build", "--quiet", "--bins"]).args(packages))?;
    // The programs we run get the interrupt too; what fails then goes the way of every failure, clean-up included.
    ctrlc::set_handler(|| eprintln!("interrupted, cleaning up")).context("cannot handle interrupts")?;
    let layout = debian_image::prepare(&PYTHON)?;
    let work = tempfile::Builder::new().prefix("skimmer-demo").tempdir()?;
    let shape = Shape {
        bits_per_second: options.mbit * 1_000_000,
        delay: Duration::from_millis(options.rtt_ms) / 2,
        loss_per_mille: 0,
    };
    let namespace = format!("skimmer-demo-{}", std::process::id());
    let link = Link::new(&namespace, shape)?;
    let directory = work.path().join("registry");
    let address = SocketAddr::from((link.far(), PORT));
    let registry = Registry::start_by(link.at_far("docker-registry"), &directory, &directory, address)?;
    println!("registry at {} behind {shape}", registry.address());
    let mut demo = Demo { work: work.path().to_owned(), link: &link, registry: &registry, rows: Vec::new() };
    let result = demo.all(&layout, &options.mode);
    demo.clean_up();
    result?;
    demo.print(shape);
    Ok(())
}

struct Demo<'a> {
    work: PathBuf,
    link: &'a Link,
    registry: &'a Registry,
    rows: Vec<Row>,
}

impl Demo<'_> {
    fn all(&mut self, layout: &Path, mode: &str) -> Result<()> {
        self.publish(layout)?;
        self.pull_everything()?;
        self.skimmer(mode)
    }

    fn program(name: &str) -> PathBuf {
        run::target_dir().join("debug").join(name)
    }

    fn skimmer_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(Self::program("skimmer"));
        command.args(args);
        command
    }

    fn socket(&self) -> PathBuf {
        self.work.join("run/skimmerd.sock")
    }

    /// Converts the image and pushes both forms, at the registry's side of the link.
    fn publish(&self, layout: &Path) -> Result<()> {
        // Within its own namespace the link's rate does not count.
        let local = self.registry.address();
        let converted = self.work.join("converted");
        let start = Instant::now();
        let source = format!("oci:{}:{}", layout.display(), TAG);
        let report = run::output(self.skimmer_command(&["convert", "--json", &source]).arg(&converted))?;
        let report: Value = serde_json::from_str(&report).context("convert --json printed no JSON")?;
        println!(
            "converted in {:.1} s: {} layers, {} names, bootstrap {} KiB",
            start.elapsed().as_secs_f64(),
            report["layers"],
            report["tree"]["files"],
            report["bootstrap_bytes"].as_u64().unwrap_or(0) / 1024
        );
        let original = format!("docker://{local}/demo:original");
        run::output(self.link.at_far("skopeo").args([
            "copy",
            "-q",
            "--dest-tls-verify=false",
            &source,
            &original,
        ]))?;
        let lazy = format!("docker://{local}/demo:skimmer");
        run::output(
            self.link
                .at_far(Self::program("skimmer"))
                .args(["push", "--plain-http"])
                .arg(&converted)
                .arg(&lazy),
        )?;
        Ok(())
    }

    /// What a user does today: everything comes over the link, is unpacked, then the program starts.
    fn pull_everything(&mut self) -> Result<()> {
        let bundle = self.work.join("bundle");
        let pulled = format!("{}:original", self.work.join("pulled").display());
        let (before, start) = (self.link.received(), Instant::now());
        let source = format!("docker://{}/demo:original", self.registry.address());
        let destination = format!("oci:{pulled}");
        run::output(&mut run::command(
            "skopeo",
            ["copy", "-q", "--src-tls-verify=false", &source, &destination],
        ))?;
        run::output(run::command("umoci", ["unpack", "--image", &pulled]).arg(&bundle))?;
        run_program(&bundle.join("rootfs"))?;
        self.rows.push(Row {
            what: "pull everything, unpack, start".into(),
            first_output: start.elapsed(),
            moved: Some(self.link.received() - before),
        });
        Ok(())
    }

    fn skimmer(&mut self, mode: &str) -> Result<()> {
        let mount = self.work.join("mnt");
        std::fs::create_dir(&mount)?;
        let (socket, root) = (self.socket(), self.work.join("cache"));
        let config = self.work.join("skimmerd.toml");
        let keeper = self.work.join("run/keeper.sock");
        std::fs::write(&config, format!("keeper_socket = {:?}\n", keeper.display().to_string()))?;
        let image = format!("docker://{}/demo:skimmer", self.registry.address());
        let (before, start) = (self.link.received(), Instant::now());
        let mut command = self.skimmer_command(&["mount", "--json", "--plain-http", "--mode", mode]);
        command.arg("--socket").arg(&socket).arg("--root").arg(&root).arg("--config").arg(&config);
        let report = run::output(command.arg(&image).arg(&mount))?;
        let mounted = start.elapsed();
        run_program(&mount)?;
        let (first_output, moved) = (start.elapsed(), self.link.received() - before);
        let report: Value = serde_json::from_str(&report).context("mount --json printed no JSON")?;
        let mode = report["mode"].as_str().unwrap_or("?").to_owned();
        println!(
            "mounted in {:.2} s ({mode}: {})",
            mounted.as_secs_f64(),
            report["reason"].as_str().unwrap_or("?")
        );
        self.rows.push(Row {
            what: format!("skimmer ({mode}), nothing cached"),
            first_output,
            moved: Some(moved),
        });

        // Everything the program needs is cached: the kernel must do without us.
        self.kill_daemon()?;
        let (before, start) = (self.link.received(), Instant::now());
        run_program(&mount)?;
        self.rows.push(Row {
            what: format!("skimmer ({mode}), again, daemon killed"),
            first_output: start.elapsed(),
            moved: Some(self.link.received() - before),
        });

        // A new daemon takes over; after a full read nothing is left to ask it for, page cache or not.
        self.start_daemon()?;
        let bytes = read_everything(&mount)?;
        self.kill_daemon()?;
        drop_caches()?;
        let (before, start) = (self.link.received(), Instant::now());
        ensure!(read_everything(&mount)? == bytes, "the second full read differs in length from the first");
        run_program(&mount)?;
        println!(
            "read all {} MiB again in {:.1} s, page cache dropped, daemon killed, {} bytes over the link",
            bytes >> 20,
            start.elapsed().as_secs_f64(),
            self.link.received() - before
        );
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        let text =
            run::output(self.skimmer_command(&["status", "--json"]).arg("--socket").arg(self.socket()))?;
        serde_json::from_str(&text).context("status --json printed no JSON")
    }

    /// Kills skimmerd as an accident would: no warning, no clean-up.
    fn kill_daemon(&self) -> Result<()> {
        let pid = self.status()?["pid"].as_i64().context("status names no process")?;
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(
            pid.context("status names no process")?,
            rustix::process::Signal::KILL,
        )?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.status().is_ok() {
            ensure!(Instant::now() < deadline, "skimmerd still answers after SIGKILL");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Leaves nothing behind: mounts, daemon and keeper go.
    fn clean_up(&self) {
        if !self.work.join("mnt").exists() {
            return;
        }
        // The killed daemon left its mounts; its successor knows them and can take them away.
        let outcome = self.start_daemon().and_then(|()| run::output(self.daemon().arg("--stop-all")));
        if let Err(error) = outcome {
            eprintln!("clean-up: {error:#}");
        }
    }

    fn daemon(&self) -> Command {
        let mut daemon = Command::new(Self::program("skimmerd"));
        daemon.arg("--socket").arg(self.socket()).arg("--root").arg(self.work.join("cache"));
        daemon.arg("--config").arg(self.work.join("skimmerd.toml"));
        daemon
    }

    /// Starts a daemon if none answers.
    fn start_daemon(&self) -> Result<()> {
        if self.status().is_ok() {
            return Ok(());
        }
        let log = std::fs::File::options().create(true).append(true).open(self.work.join("skimmerd.log"))?;
        let mut daemon = self.daemon();
        daemon.arg("--detach").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        daemon.spawn().context("cannot start skimmerd")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.status().is_err() {
            ensure!(Instant::now() < deadline, "skimmerd does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn print(&self, shape: Shape) {
        println!("\nTime to first output of {:?} and bytes moved, {shape}:\n", PYTHON.run.join(" "));
        println!("| {:42} | {:>14} | {:>12} | {:>7} |", "", "first output", "moved", "ratio");
        println!("|{:-<44}|{:->16}|{:->14}|{:->9}|", "", ":", ":", ":");
        let slowest = self.rows.first().map_or(1.0, |row| row.first_output.as_secs_f64());
        for row in &self.rows {
            let seconds = row.first_output.as_secs_f64();
            let moved = row.moved.map_or(String::new(), |bytes| format!("{:.2} MiB", mebibytes(bytes)));
            println!("| {:42} | {seconds:>12.2} s | {moved:>12} | {:>6.1}x |", row.what, slowest / seconds);
        }
    }
}

fn mebibytes(bytes: u64) -> f64 {
    // Two decimals are shown: whole KiB are exact enough.
    f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0
}

/// Runs the image's program in `root` and checks what it says.
fn run_program(root: &Path) -> Result<()> {
    let output = Command::new("chroot")
        .arg(root)
        .args(PYTHON.run)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .context("cannot run chroot")?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !stdout.contains(PYTHON.expect) {
        bail!(
            "{:?} in {}: {}\n{stdout}{}",
            PYTHON.run,
            root.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Reads every byte of every file below `root`; returns their number.
fn read_everything(root: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(root).with_context(|| format!("cannot read {}", root.display()))? {
        let entry = entry?;
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() {
            bytes += read_everything(&path)?;
        } else if kind.is_file() {
            let mut file = std::fs::File::open(&path)?;
            bytes += std::io::copy(&mut file, &mut std::io::sink())
                .with_context(|| format!("cannot read {}", path.display()))?;
        }
    }
    Ok(bytes)
}

fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache (needs root)")
}
