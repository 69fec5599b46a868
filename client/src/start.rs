//! Starting a daemon when none answers.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::DEFAULT_SOCKET;
use crate::client::{Client, ClientError};

/// How much of the daemon's log goes into an error.
const LOG_TAIL_BYTES: i64 = 2048;
/// How often a starting daemon is asked whether it is ready.
const POLL: Duration = Duration::from_millis(20);

/// How to reach a daemon, and how to start one.
#[derive(Debug, Clone)]
pub struct StartOptions {
    /// Its control socket.
    pub socket: PathBuf,
    /// The program; `None`: `skimmerd` beside the caller's executable, else on PATH.
    pub program: Option<PathBuf>,
    /// Further arguments (`--config`, `--root`, …).
    pub args: Vec<String>,
    /// Its log; `None`: `skimmerd.log` beside the socket.
    pub log: Option<PathBuf>,
    /// How long it may take until it answers.
    pub wait: Duration,
}

impl Default for StartOptions {
    fn default() -> Self {
        Self {
            socket: DEFAULT_SOCKET.into(),
            program: None,
            args: Vec::new(),
            log: None,
            wait: Duration::from_secs(15),
        }
    }
}

impl Client {
    /// Connects, or starts a daemon and connects to that. The daemon outlives the caller.
    /// The flag says whether one was started.
    ///
    /// # Errors
    /// [`ClientError::Start`] with the end of the daemon's log when it exits or is not ready in time.
    pub async fn connect_or_start(options: &StartOptions) -> Result<(Self, bool), ClientError> {
        match Self::connect(&options.socket).await {
            Ok(client) => return Ok((client, false)),
            Err(ClientError::Unreachable { .. }) => {}
            Err(other) => return Err(other),
        }
        let program = options.program.clone().unwrap_or_else(daemon_program);
        let log = options.log.clone().unwrap_or_else(|| options.socket.with_file_name("skimmerd.log"));
        let fail = |reason: String, log: String| ClientError::Start { program: program.clone(), reason, log };
        let (mut child, log_start) =
            spawn(&program, options, &log).map_err(|reason| fail(reason, String::new()))?;
        let deadline = Instant::now() + options.wait;
        let mut exited: Option<ExitStatus> = None;
        loop {
            match Self::connect(&options.socket).await {
                Ok(client) => return Ok((client, true)),
                // Asked again after the exit was seen: another daemon may have won the race for the lock.
                Err(_) if exited.is_some() => {
                    let status = exited.map(|status| status.to_string()).unwrap_or_default();
                    return Err(fail(format!("it ended with {status}"), tail(&log, log_start)));
                }
                Err(_) if Instant::now() >= deadline => {
                    let waited = options.wait.as_secs();
                    return Err(fail(format!("it was not ready after {waited} s"), tail(&log, log_start)));
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
            exited = child.try_wait().unwrap_or_default();
        }
    }
}

/// `skimmerd` beside the caller's executable when it is there, else whatever PATH has.
fn daemon_program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("skimmerd"))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("skimmerd"))
}

/// Starts it with its output appended to the log; returns the log's length before.
fn spawn(program: &Path, options: &StartOptions, log: &Path) -> Result<(Child, u64), String> {
    if let Some(parent) = log.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|error| format!("cannot create {}: {error}", parent.display()))?;
    }
    let cannot_log = |error: std::io::Error| format!("cannot write its log {}: {error}", log.display());
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(cannot_log)?;
    let start = file.metadata().map_err(cannot_log)?.len();
    let second = file.try_clone().map_err(cannot_log)?;
    // `--detach` makes the child leave our session itself: that takes no unsafe code here.
    let child = Command::new(program)
        .arg("--detach")
        .arg("--socket")
        .arg(&options.socket)
        .args(&options.args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(second)
        .spawn()
        .map_err(|error| format!("cannot run it: {error}"))?;
    Ok((child, start))
}

/// What was added to the log since `start`, at most [`LOG_TAIL_BYTES`] of it.
fn tail(log: &Path, start: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let added = file.metadata()?.len().saturating_sub(start);
        if added > LOG_TAIL_BYTES.unsigned_abs() {
            file.seek(SeekFrom::End(-LOG_TAIL_BYTES))?;
        } else {
            file.seek(SeekFrom::Start(start))?;
        }
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES.unsigned_abs()).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, program: &str) -> StartOptions {
        StartOptions {
            socket: dir.join("d.sock"),
            program: Some(program.into()),
            wait: Duration::from_millis(300),
            ..StartOptions::default()
        }
    }

    #[tokio::test]
    async fn a_daemon_that_ends_at_once_is_reported_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        // `ls` stands in: it knows no --detach, says so on stderr and exits with 2.
        let error = Client::connect_or_start(&options(dir.path(), "ls")).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 2") && text.contains("--detach"), "{text}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            Client::connect_or_start(&options(dir.path(), "/nonexistent/skimmerd")).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/skimmerd"), "{error}");
    }
}
