//! Our programs at work: one node's daemon, keeper and mounts, on any machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::machine::{Machine, Running};
use crate::tree::Entry;

/// For commands that talk to a process beside them, under emulation on a busy host.
const SHORT: Duration = Duration::from_secs(120);
/// For commands that read or fetch everything, under emulation.
const LONG: Duration = Duration::from_secs(300);
/// For reading and hashing the whole of a large image, under emulation.
const WHOLE: Duration = Duration::from_secs(1200);
/// The programs that a node needs besides the agent.
pub const PROGRAMS: [&str; 3] = ["skimmer", "skimmerd", "skimmer-keeper"];

/// Finds our programs in `SKIMMER_BIN_DIR`, else where cargo puts them beside the running test.
///
/// # Errors
/// One is missing: the message gives the command that builds them.
pub fn programs() -> Result<Vec<PathBuf>> {
    let directory = match std::env::var_os("SKIMMER_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        // target/debug/deps/test-0123, or another program in target/debug
        None => {
            let own = std::env::current_exe()?;
            let beside = own.parent().context("a program lies in a directory")?;
            let above = beside.parent().filter(|_| beside.ends_with("deps"));
            above.unwrap_or(beside).to_owned()
        }
    };
    let find = |name: &&str| {
        let path = directory.join(name);
        ensure!(
            path.is_file(),
            "{} is missing: cargo build -p skimmer-cli -p skimmer-daemon -p skimmer-keeper",
            path.display()
        );
        Ok(path)
    };
    PROGRAMS.iter().map(find).collect()
}

/// One node: a daemon with its own sockets and cache.
pub struct Node<'a> {
    machine: &'a Machine,
    /// Where the programs are, on that machine.
    programs: String,
    agent: String,
    directory: String,
    configuration: String,
    mounts: Vec<String>,
    plain_http: bool,
}

impl<'a> Node<'a> {
    /// Prepares a node whose sockets and configuration lie in `directory` and its cache in `root`; nothing runs yet.
    ///
    /// # Errors
    /// The configuration cannot be written.
    pub fn new(
        machine: &'a Machine,
        programs: &str,
        agent: &str,
        directory: &str,
        root: &str,
    ) -> Result<Self> {
        let configuration = format!(
            "root = {root:?}\nsocket = \"{directory}/skimmerd.sock\"\nkeeper_socket = \"{directory}/keeper.sock\"\n"
        );
        let mut node = Node {
            machine,
            configuration: String::new(),
            programs: programs.to_owned(),
            agent: agent.to_owned(),
            directory: directory.to_owned(),
            mounts: Vec::new(),
            plain_http: false,
        };
        node.configure(&configuration)?;
        Ok(node)
    }

    /// Adds to the configuration of a daemon that does not run yet.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn configure(&mut self, more: &str) -> Result<()> {
        self.configuration.push_str(more);
        let path = format!("{}/skimmerd.toml", self.directory);
        self.machine.put(&path, 0o644, self.configuration.as_bytes())
    }

    /// Registries that are not on the loopback are reached over plain HTTP from now on.
    pub fn plain_http(&mut self) {
        self.plain_http = true;
    }

    /// Mounts `image` at `target` (made when absent), which starts the daemon when none runs.
    ///
    /// # Errors
    /// The mount fails: the message holds what skimmer said.
    pub fn mount(&mut self, image: &str, target: &str, mode: &str) -> Result<()> {
        self.mount_with(image, target, mode, &[])
    }

    /// Mounts an image with further options of `skimmer mount`.
    ///
    /// # Errors
    /// It fails: the message holds what skimmer said.
    pub fn mount_with(&mut self, image: &str, target: &str, mode: &str, options: &[&str]) -> Result<()> {
        self.machine.check(&["mkdir", "-p", target], SHORT)?;
        let configuration = format!("{}/skimmerd.toml", self.directory);
        let mut arguments = vec!["mount", image, target, "--mode", mode, "--config", &configuration];
        arguments.extend(self.plain_http.then_some("--plain-http"));
        arguments.extend(options);
        self.skimmer(&arguments)?;
        self.mounts.push(target.to_owned());
        Ok(())
    }

    /// Takes a mount away.
    ///
    /// # Errors
    /// It fails: the message holds what skimmer said.
    pub fn umount(&mut self, target: &str) -> Result<()> {
        self.skimmer(&["umount", target])?;
        self.mounts.retain(|mount| mount != target);
        Ok(())
    }

    /// Prepares an image for others; returns what `skimmer prepare --json` says.
    ///
    /// # Errors
    /// It fails: the message holds what skimmer said.
    pub fn prepare(&self, image: &str, mode: &str) -> Result<Value> {
        let mut arguments = vec!["prepare", image, "--mode", mode, "--json"];
        arguments.extend(self.plain_http.then_some("--plain-http"));
        Ok(serde_json::from_slice(&self.skimmer(&arguments)?)?)
    }

    /// Gives up a prepared image.
    ///
    /// # Errors
    /// It fails: the message holds what skimmer said.
    pub fn release(&self, image: &str) -> Result<()> {
        self.skimmer(&["release", image]).map(|_| ())
    }

    /// Mounts a prepared image without our programs: by mount(8) where there is no file for it to make a loop device
    /// of, else by the bare system call.
    ///
    /// # Errors
    /// It fails: the message holds what was said.
    pub fn mount_plainly(&mut self, prepared: &Value, target: &str) -> Result<()> {
        self.machine.check(&["mkdir", "-p", target], SHORT)?;
        let text = |name: &str| prepared[name].as_str().with_context(|| format!("no {name}"));
        let options = prepared["options"].as_array().context("no options")?;
        let options: Vec<&str> = options.iter().filter_map(Value::as_str).collect();
        let (source, options) = (text("source")?, options.join(","));
        if source == "none" {
            let kind = text("fstype")?;
            self.machine.check(&["mount", "-t", kind, "-o", &options, source, target], SHORT)?;
        } else {
            self.machine.check(&[&self.agent, "mount-erofs", source, target, &options], SHORT)?;
        }
        self.mounts.push(target.to_owned());
        Ok(())
    }

    /// Unmounts what [`Self::mount_plainly`] mounted.
    ///
    /// # Errors
    /// It fails.
    pub fn umount_plainly(&mut self, target: &str) -> Result<()> {
        self.machine.check(&["umount", target], SHORT)?;
        self.mounts.retain(|mount| mount != target);
        Ok(())
    }

    /// Asks for all of a mounted image, and does not wait for it.
    ///
    /// # Errors
    /// It fails: the message holds what skimmer said.
    pub fn prefetch(&self, target: &str) -> Result<()> {
        self.skimmer(&["prefetch", target]).map(|_| ())
    }

    /// What was read and fetched through a mount that was made with `--record`, as `skimmer recording` prints it.
    ///
    /// # Errors
    /// Nothing of ours is mounted there, or it is not recorded.
    pub fn recording(&self, target: &str) -> Result<Vec<u8>> {
        self.skimmer(&["recording", target])
    }

    /// What `skimmer status --json` says.
    ///
    /// # Errors
    /// No daemon answers, or it is not JSON.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.skimmer(&["status", "--json"])?)?)
    }

    /// The daemon's metrics: series with labels to value.
    ///
    /// # Errors
    /// No daemon answers, or a line makes no sense.
    pub fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let socket = self.socket();
        let text = self.machine.check(&[&self.agent, "http", &socket, "/metrics"], SHORT)?;
        let text = String::from_utf8(text)?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| {
                let (series, value) = line.rsplit_once(' ').context("no value")?;
                Ok((series.to_owned(), value.parse()?))
            })
            .collect::<Result<_>>()
            .with_context(|| format!("metrics: {text}"))
    }

    /// The sum of all series of the counter `name`.
    ///
    /// # Errors
    /// As [`Node::metrics`], and when there is no such counter.
    pub fn counter(&self, name: &str) -> Result<f64> {
        let metrics = self.metrics()?;
        let mut matching =
            metrics.iter().filter(|(series, _)| series.split('{').next() == Some(name)).peekable();
        ensure!(matching.peek().is_some(), "no counter {name} in {metrics:?}");
        Ok(matching.map(|(_, value)| value).sum())
    }

    /// The processes of the daemon and of its keeper, of whose two the one that serves.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn processes(&self) -> Result<(u32, u32)> {
        let daemon = self.status()?["pid"].as_u64().context("status holds no pid")?;
        let lock = format!("{}/keeper.sock.lock", self.directory);
        let found = String::from_utf8(self.machine.check(&["cat", &lock], SHORT)?)?;
        let keeper =
            found.trim().parse().with_context(|| format!("which process is the keeper? {found:?}"))?;
        Ok((u32::try_from(daemon)?, keeper))
    }

    /// Starts a daemon by itself, as a service manager would, and waits until it answers.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_daemon(&self) -> Result<()> {
        let (daemon, configuration) = self.daemon();
        let line = format!(
            "exec setsid {daemon} --config {configuration} >> {}/skimmerd.log 2>&1 &",
            self.directory
        );
        self.machine.check(&["sh", "-c", &line], SHORT)?;
        let deadline = Instant::now() + SHORT;
        loop {
            match self.status() {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("skimmerd does not come up: {}", self.log()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Kills the daemon without warning and waits until it is no more.
    ///
    /// # Errors
    /// It is not there, or does not go.
    pub fn kill_daemon(&self) -> Result<()> {
        let pid = self.status()?["pid"].as_u64().context("status holds no pid")?.to_string();
        self.machine.check(&["sh", "-c", &format!("kill -KILL {pid}")], SHORT)?;
        let state = format!("/proc/{pid}/stat");
        let deadline = Instant::now() + SHORT;
        loop {
            let stat = self.machine.run(&["cat", &state], SHORT)?;
            let text = String::from_utf8_lossy(&stat.stdout).into_owned();
            // Gone, or dead and not yet reaped.
            let dead = text.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']));
            if !stat.success() || dead {
                break;
            }
            ensure!(Instant::now() < deadline, "skimmerd {pid} survives SIGKILL: {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!(self.status().is_err(), "another daemon answers after SIGKILL of {pid}");
        Ok(())
    }

    /// Ends the daemon and its keeper.
    ///
    /// # Errors
    /// One of them stays, or nothing runs.
    pub fn stop(&self) -> Result<()> {
        let (daemon, configuration) = self.daemon();
        let output = self.machine.run(&[&daemon, "--stop-all", "--config", &configuration], SHORT)?;
        ensure!(output.success() && output.stderr.is_empty(), "skimmerd --stop-all: {}", output.describe());
        // The answer comes before the end of the two processes.
        let sockets = ["skimmerd.sock", "keeper.sock"].map(|name| format!("{}/{name}", self.directory));
        let deadline = Instant::now() + SHORT;
        for socket in &sockets {
            while self
                .machine
                .run(&["sh", "-c", &format!("grep -q {socket} /proc/net/unix")], SHORT)?
                .success()
            {
                ensure!(Instant::now() < deadline, "something still listens on {socket}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    /// Lists a tree on the node's machine.
    ///
    /// # Errors
    /// Something in it cannot be read.
    pub fn list(&self, directory: &str) -> Result<Vec<Entry>> {
        let lines = self.machine.check(&[&self.agent, "treelist", directory], WHOLE)?;
        let lines = String::from_utf8(lines)?;
        lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Forgets everything that the kernel keeps in memory of files.
    ///
    /// # Errors
    /// Not allowed.
    pub fn drop_caches(&self) -> Result<()> {
        self.machine.check(&["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"], LONG).map(drop)
    }

    /// Starts reading `blocks` blocks of 64 KiB of a file from block `from`; the output is the bytes.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn read(&self, file: &str, from: usize, blocks: usize) -> Result<Running<'a>> {
        let (input, skip, count) = (format!("if={file}"), format!("skip={from}"), format!("count={blocks}"));
        self.machine.start(&["dd", &input, "bs=65536", &skip, &count], LONG)
    }

    /// The daemon's own words, for a failure's message.
    #[must_use]
    pub fn log(&self) -> String {
        let pattern = format!("tail -n 50 {d}/*.log", d = self.directory);
        let output = self.machine.run(&["sh", "-c", &pattern], SHORT);
        output.map_or_else(|error| error.to_string(), |output| output.describe())
    }

    /// The daemon's program and its configuration.
    fn daemon(&self) -> (String, String) {
        (format!("{}/skimmerd", self.programs), format!("{}/skimmerd.toml", self.directory))
    }

    fn socket(&self) -> String {
        format!("{}/skimmerd.sock", self.directory)
    }

    fn skimmer(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let (program, socket) = (format!("{}/skimmer", self.programs), self.socket());
        let argv: Vec<&str> = [&[program.as_str()], arguments, &["--socket", &socket]].concat();
        self.machine.check(&argv, LONG)
    }
}

impl Drop for Node<'_> {
    /// Unmounts and ends what still runs.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("skimmerd: {}", self.log());
        }
        // Asked without our own client, which may be what is broken.
        if self.metrics().is_ok()
            && let Err(error) = self.stop()
        {
            eprintln!("cleaning up: {error:#}");
        }
        for target in std::mem::take(&mut self.mounts) {
            // Without a daemon that is all that can be done; an unmounted target makes it fail, as it should.
            let _ = self.machine.run(&["umount", "-l", &target], SHORT);
        }
    }
}

/// The body of an answer from an HTTP server behind a unix socket.
///
/// # Errors
/// Nothing listens there, or the answer is not a success.
pub fn http_get(socket: &Path, path: &str) -> Result<Vec<u8>> {
    use std::io::{Read, Write};
    // HTTP/1.0: no chunks, and the end of the connection is the end of the body.
    let mut stream = std::os::unix::net::UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(SHORT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end =
        answer.windows(4).position(|window| window == b"\r\n\r\n").context("the answer has no header")?;
    let header = String::from_utf8_lossy(&answer[..end]).into_owned();
    if header.split(' ').nth(1) != Some("200") {
        bail!("{path}: {header}");
    }
    Ok(answer.split_off(end + 4))
}
