//! A real containerd with our snapshots: Debian's, or the current one from the Go registry.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use skimmer_test_support::tools::{CONTAINERD, CTR, SHIM};
use skimmer_vm_images::run;

/// Debian packages that hold the old one, and what runs containers for both.
pub const PACKAGES: [&str; 2] = ["containerd", "runc"];
const PATIENCE: Duration = Duration::from_secs(60);

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.6 of Debian 12, with a configuration of version 2.
    Debian,
    /// The current one, with a configuration of version 3.
    Current,
}

/// Whether pulls tell the snapshotter the image's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// As our configuration has it.
    Told,
    /// As containerd's own default is.
    Untold,
}

/// A running containerd; ended when dropped.
pub struct Containerd {
    child: Child,
    /// Its program and those beside it.
    ctr: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

impl Version {
    /// What is missing to run it, if anything.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let missing =
            |tool: &skimmer_test_support::tools::GoTool| !tool.path().is_some_and(|path| path.is_file());
        let tools = [CONTAINERD, CTR, SHIM];
        let lacks = self == Self::Current && tools.iter().any(missing);
        lacks.then(|| "containerd 2 is missing (cargo xtask test installs it with go)".to_owned())
    }

    fn program(self) -> Result<(PathBuf, PathBuf, Option<PathBuf>)> {
        match self {
            Self::Debian => Ok(("containerd".into(), "ctr".into(), None)),
            Self::Current => {
                let path =
                    |tool: skimmer_test_support::tools::GoTool| tool.path().context("no cache directory");
                let shim = path(SHIM)?.parent().map(Path::to_owned);
                Ok((path(CONTAINERD)?, path(CTR)?, shim))
            }
        }
    }
}

impl Containerd {
    /// Starts one whose content is in `directory` and whose sockets are in `sockets`; `skimmer` and the configuration
    /// of its daemon say what it is told, `pause` is the image of pods.
    ///
    /// # Errors
    /// It does not start: the message has its log.
    pub fn start(
        version: Version,
        directory: &Path,
        sockets: &Path,
        skimmer: (&Path, &Path),
        pause: &str,
        names: Names,
    ) -> Result<Self> {
        let (program, ctr, shim) = version.program()?;
        fs::create_dir_all(directory)?;
        let (file, socket, log) =
            (directory.join("config.toml"), sockets.join("containerd.sock"), directory.join("log"));
        let (number, sandbox) = match version {
            Version::Debian => (
                2,
                format!(
                    "[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = {pause:?}\n  restrict_oom_score_adj = true\n"
                ),
            ),
            Version::Current => (
                3,
                format!(
                    "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = {pause:?}\n\
                     [plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n"
                ),
            ),
        };
        let text = format!(
            "version = {number}\nroot = {:?}\nstate = {:?}\n[grpc]\n  address = {socket:?}\n[ttrpc]\n  address = {:?}\n{sandbox}",
            directory.join("root"),
            sockets.join("state"),
            sockets.join("ttrpc.sock"),
        );
        fs::write(&file, text)?;
        // What users do.
        let (skimmer, config) = skimmer;
        run(Command::new(skimmer)
            .args(["containerd", "config", "--config"])
            .arg(config)
            .arg("--patch")
            .arg(&file))?;
        if names == Names::Untold {
            let text = fs::read_to_string(&file)?;
            let told = "disable_snapshot_annotations = false";
            ensure!(text.contains(told), "no such option in\n{text}");
            fs::write(&file, text.replace(told, "disable_snapshot_annotations = true"))?;
        }
        let mut command = Command::new(program);
        if let Some(shim) = shim {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(shim).chain(std::env::split_paths(&path).collect::<Vec<_>>());
            command.env("PATH", std::env::join_paths(all)?);
        }
        let child = command
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot start containerd")?;
        let mut containerd = Self { child, ctr, socket, log };
        let deadline = Instant::now() + PATIENCE;
        while containerd.ctr(&["version"]).is_err() {
            if let Some(status) = containerd.child.try_wait()? {
                bail!("containerd ended with {status}:\n{}", containerd.log());
            }
            if Instant::now() >= deadline {
                bail!("containerd does not answer:\n{}", containerd.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(containerd)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Runs `ctr` and returns what it printed.
    ///
    /// # Errors
    /// It fails: the message has what it said.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let out = run(Command::new(&self.ctr).arg("--address").arg(&self.socket).args(arguments))?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// After a failed test: ends every container, so that none outlives it.
    pub fn end_all(&self) {
        for namespace in ["default", "k8s.io"] {
            let tasks = self.ctr(&["--namespace", namespace, "task", "ls", "-q"]).unwrap_or_default();
            for task in tasks.lines() {
                let _ = self.ctr(&["--namespace", namespace, "task", "rm", "--force", task]);
            }
        }
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // It ends its shims' connections; containers that a failed test left are the test's to end.
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
