//! A Dragonfly cluster: the real scheduler, and nodes in network namespaces with the real dfdaemon and our daemon.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use skimmer_test_support::tools::{DFDAEMON, SCHEDULER};
use skimmer_vm_images::run;

use crate::skimmer::programs;
use crate::wait::wait;

/// Debian packages that it needs.
pub const PACKAGES: [&str; 2] = ["iproute2", "util-linux"];
const PATIENCE: Duration = Duration::from_secs(60);

/// What is missing to run it, if anything.
#[must_use]
pub fn missing() -> Option<String> {
    let lacks = |path: Option<PathBuf>| !path.is_some_and(|path| path.is_file());
    (lacks(DFDAEMON.path()) || lacks(SCHEDULER.path())).then(|| {
        "dfdaemon or scheduler is missing: `cargo xtask dragonfly` builds them (40 minutes)".to_owned()
    })
}

/// A bridge with namespaces on it; gone when dropped.
pub struct Network {
    bridge: String,
    namespaces: Vec<String>,
    subnet: u8,
}

impl Network {
    /// Makes one with so many namespaces.
    ///
    /// # Errors
    /// We are not root, or `ip` fails.
    pub fn new(size: u8) -> Result<Self> {
        let pid = std::process::id();
        // From the benchmarking range (RFC 2544), other than the emulated link's half of it.
        let subnet = u8::try_from(pid % 250)?;
        let mut network = Self { bridge: format!("skdf{pid}"), namespaces: Vec::new(), subnet };
        ip(&["link", "add", &network.bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", network.host()), "dev", &network.bridge])?;
        ip(&["link", "set", &network.bridge, "up"])?;
        for number in 1..=size {
            network.add(number)?;
        }
        Ok(network)
    }

    fn add(&mut self, number: u8) -> Result<()> {
        let name = format!("{}-{number}", self.bridge);
        let (near, far) = (format!("{}n{number}", self.bridge), format!("{}f{number}", self.bridge));
        ip(&["netns", "add", &name])?;
        self.namespaces.push(name.clone());
        ip(&["link", "add", &near, "type", "veth", "peer", "name", &far])?;
        ip(&["link", "set", &far, "netns", &name])?;
        ip(&["link", "set", &near, "master", &self.bridge, "up"])?;
        let inside = |arguments: &[&str]| ip(&[&["-n", name.as_str()], arguments].concat());
        inside(&["link", "set", "lo", "up"])?;
        inside(&["addr", "add", &format!("{}/24", self.node(number)), "dev", &far])?;
        inside(&["link", "set", &far, "up"])
    }

    /// The address that all nodes reach.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.subnet, 254)
    }

    fn node(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.subnet, number)
    }

    /// A command in a namespace, from 1; only the network is another, so that mounts are seen by all.
    fn command(&self, number: u8, program: &Path) -> Command {
        let namespace = format!("/run/netns/{}-{number}", self.bridge);
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={namespace}")).arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = ip(&["netns", "del", namespace]);
        }
        let _ = ip(&["link", "del", &self.bridge]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(Command::new("ip").args(arguments)).map(drop)
}

/// A process that ends with its owner.
struct Process(Child);

impl Process {
    fn start(mut command: Command, log: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let shown = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| shown)?))
    }

    fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        Ok(rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal)?)
    }

    fn ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The scheduler.
pub struct Scheduler {
    _process: Process,
    address: SocketAddr,
}

impl Scheduler {
    /// Starts it without manager and database, its files in `directory`.
    ///
    /// # Errors
    /// It does not answer: the message has its log.
    pub fn start(network: &Network, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let host = network.host();
        let (config, log) = (directory.join("scheduler.yaml"), directory.join("log"));
        let text = format!(
            "server: {{advertiseIP: {host}, listenIP: {host}, port: 8002, logDir: {directory:?}, pluginDir: {directory:?}}}\n\
             scheduler: {{retryInterval: 50ms, retryBackToSourceLimit: 1}}\nmetrics: {{enable: false}}\n"
        );
        fs::write(&config, text)?;
        let mut command = Command::new(SCHEDULER.path().context("no cache directory")?);
        command.arg("--config").arg(&config).arg("--dynconfig").arg(directory.join("dynconfig.yaml"));
        command.arg("--console");
        let mut process = Process::start(command, &log)?;
        let address = SocketAddr::from((host, 8002));
        wait(PATIENCE, "the scheduler answers", || {
            ensure!(!process.ended(), "the scheduler ended");
            Ok(TcpStream::connect(address).is_ok())
        })
        .with_context(|| tail(&log))?;
        Ok(Self { _process: process, address })
    }
}

/// One node: dfdaemon, skimmerd and keeper in a namespace.
pub struct Node {
    number: u8,
    enter: String,
    dfdaemon: Process,
    skimmerd: Process,
    directory: PathBuf,
    sockets: tempfile::TempDir,
}

impl Node {
    /// Starts node `number`; plain HTTP leads to `registry`.
    ///
    /// # Errors
    /// A program does not answer: the message has its log.
    pub fn start(
        network: &Network,
        scheduler: &Scheduler,
        number: u8,
        registry: SocketAddr,
        directory: &Path,
    ) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let own = network.node(number);
        let config = directory.join("dfdaemon.yaml");
        let at = |name: &str| directory.join(name);
        let text = format!(
            "host: {{hostname: node{number}, ip: {own}}}\n\
             server: {{pluginDir: {:?}, cacheDir: {:?}}}\n\
             download: {{server: {{socketPath: {:?}}}, pieceTimeout: 40s, collectedPieceTimeout: 2s}}\n\
             proxy:\n  server: {{ip: 127.0.0.1, port: 4001}}\n  rules: [{{regex: 'blobs/sha256.*'}}]\n  \
             registryMirror: {{addr: \"http://{registry}\"}}\n  prefetch: false\n\
             storage: {{dir: {:?}, keep: false}}\nscheduler: {{announceInterval: 15s}}\n",
            at("plugins"),
            at("cache"),
            at("dfdaemon.sock"),
            at("storage"),
        );
        fs::write(&config, text)?;
        let dynamic = directory.join("dynconfig.yaml");
        fs::write(&dynamic, format!("scheduler: {{addr: \"\", addrs: [\"{}\"]}}\n", scheduler.address))?;
        let mut command = network.command(number, &DFDAEMON.path().context("no cache directory")?);
        command.arg("--config").arg(&config).arg("--dynconfig").arg(&dynamic);
        command.arg("--log-dir").arg(at("logs")).args(["--console", "-l", "warn"]);
        let mut dfdaemon = Process::start(command, &at("dfdaemon.log"))?;
        let healthy = || {
            let mut ask = network.command(number, Path::new("bash"));
            ask.args(["-c", "exec 3<>/dev/tcp/127.0.0.1/4003 && printf 'GET /healthy HTTP/1.0\\r\\n\\r\\n' >&3 && head -1 <&3"]);
            ask.stderr(Stdio::null())
                .output()
                .is_ok_and(|said| said.stdout.windows(4).any(|word| word == b" 200"))
        };
        wait(PATIENCE, "dfdaemon is healthy", || {
            ensure!(!dfdaemon.ended(), "dfdaemon ended");
            Ok(healthy())
        })
        .with_context(|| tail(&at("dfdaemon.log")))?;

        let sockets = tempfile::tempdir()?;
        let config = directory.join("skimmerd.toml");
        let socket = sockets.path().join("skimmerd.sock");
        let text = format!(
            "root = {:?}\nsocket = {socket:?}\nkeeper_socket = {:?}\n[registry]\ninsecure = ['{registry}']\n\
             [dragonfly]\nendpoint = 'http://127.0.0.1:4001'\n[containerd]\nenable = false\n",
            at("root"),
            sockets.path().join("keeper.sock"),
        );
        fs::write(&config, text)?;
        let program = programs()?.swap_remove(1);
        let mut command = network.command(number, &program);
        command.arg("--config").arg(&config);
        let skimmerd = Process::start(command, &at("skimmerd.log"))?;
        let enter = format!("/run/netns/{}-{number}", network.bridge);
        let directory = directory.to_owned();
        let node = Self { number, enter, dfdaemon, skimmerd, directory, sockets };
        wait(PATIENCE, "skimmerd answers", || Ok(node.skimmer(&["status"]).is_ok()))
            .with_context(|| tail(&node.directory.join("skimmerd.log")))?;
        Ok(node)
    }

    /// Runs `skimmer` on it; returns what it printed.
    ///
    /// # Errors
    /// It fails: the message has what it said.
    pub fn skimmer(&self, arguments: &[&str]) -> Result<String> {
        let program = programs()?.swap_remove(0);
        let mut command = Command::new(program);
        command.args(arguments).arg("--socket").arg(self.sockets.path().join("skimmerd.sock"));
        Ok(String::from_utf8(run(&mut command)?)?)
    }

    /// Mounts an image, writing down its use.
    ///
    /// # Errors
    /// It fails: the message has the daemon's log.
    pub fn mount(&self, image: &str) -> Result<PathBuf> {
        let target = self.directory.join(format!("mnt-{}", image.replace(['/', ':'], "-")));
        fs::create_dir_all(&target)?;
        let text = target.to_str().context("not UTF-8")?;
        self.skimmer(&["mount", image, text, "--mode", "fanotify", "--record=events", "--no-start"])
            .with_context(|| tail(&self.directory.join("skimmerd.log")))?;
        Ok(target)
    }

    /// Takes a mount away; says how long its slowest read waited.
    ///
    /// # Errors
    /// It is busy.
    pub fn umount(&self, target: &Path) -> Result<Duration> {
        let text = target.to_str().context("not UTF-8")?;
        let recording: Value = serde_json::from_str(&self.skimmer(&["recording", text])?)?;
        let reads = recording["reads"].as_array().context("no reads")?;
        let slowest = reads.iter().filter_map(|read| read["took_us"].as_u64()).max().unwrap_or(0);
        self.skimmer(&["umount", text])?;
        Ok(Duration::from_micros(slowest))
    }

    /// Bytes of blobs that came from each kind of sender: (registry, Dragonfly).
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn received(&self) -> Result<(u64, u64)> {
        let page = crate::skimmer::http_get(&self.sockets.path().join("skimmerd.sock"), "/metrics")?;
        let page = String::from_utf8(page)?;
        let of = |source: &str| {
            let name = format!("skimmer_received_bytes_total{{source=\"{source}\"}} ");
            let value = page.lines().find_map(|line| line.strip_prefix(&name));
            value.with_context(|| format!("no bytes of {source}"))?.parse::<u64>().context(name)
        };
        Ok((of("registry")?, of("dragonfly")?))
    }

    /// What its dfdaemon says it moved, by type: `REMOTE_PEER`, `BACK_TO_SOURCE`, `LOCAL_PEER`.
    ///
    /// # Errors
    /// It does not answer.
    pub fn traffic(&self, kind: &str) -> Result<u64> {
        let script =
            "exec 3<>/dev/tcp/127.0.0.1/4002 && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3";
        let mut command = Command::new("nsenter");
        let page = run(command.arg(format!("--net={}", self.enter)).args(["bash", "-c", script]))?;
        let page = String::from_utf8_lossy(&page).into_owned();
        let lines = page.lines().filter(|line| {
            line.starts_with("dragonfly_client_download_traffic") && line.contains(&format!("\"{kind}\""))
        });
        lines.filter_map(|line| line.rsplit(' ').next()).map(|value| Ok(value.parse::<u64>()?)).sum()
    }

    /// Stops its dfdaemon in its tracks, or lets it go on.
    ///
    /// # Errors
    /// It is gone.
    pub fn freeze_dfdaemon(&self, frozen: bool) -> Result<()> {
        use rustix::process::Signal;
        self.dfdaemon.signal(if frozen { Signal::STOP } else { Signal::CONT })
    }

    /// Ends daemon and keeper; nothing may be mounted any more.
    ///
    /// # Errors
    /// Something still is.
    pub fn end(mut self) -> Result<()> {
        let program = programs()?.swap_remove(1);
        run(Command::new(program)
            .arg("--stop-all")
            .arg("--config")
            .arg(self.directory.join("skimmerd.toml")))?;
        wait(PATIENCE, "skimmerd ends", || Ok(self.skimmerd.ended()))
    }

    /// The end of its logs.
    #[must_use]
    pub fn log(&self) -> String {
        let logs = ["skimmerd.log", "dfdaemon.log"].map(|name| tail(&self.directory.join(name)));
        format!("node {}:\n{}", self.number, logs.join("\n"))
    }
}

fn tail(path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    format!("{}:\n{}", path.display(), lines[lines.len().saturating_sub(40)..].join("\n"))
}
