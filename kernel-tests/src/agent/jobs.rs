//! Commands that run for the host.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use skimmer_vm_images::protocol::{self, Bytes, Reply};

/// The commands that have not ended.
#[derive(Default)]
pub(crate) struct Jobs {
    running: Mutex<HashMap<u64, Pid>>,
}

impl Jobs {
    /// Runs a command to its end or its timeout.
    ///
    /// Its output goes to files, not pipes: a daemon that it leaves behind may keep them open for ever.
    pub(crate) fn run(&self, id: u64, command: &protocol::Command) -> Result<Reply> {
        let (program, arguments) = command.argv.split_first().context("an empty command")?;
        let mut stdin = tempfile::tempfile()?;
        stdin.write_all(&command.stdin.0)?;
        stdin.seek(SeekFrom::Start(0))?;
        let mut outputs = [tempfile::tempfile()?, tempfile::tempfile()?];
        let mut child = Command::new(program)
            .args(arguments)
            .envs(&command.env)
            .stdin(Stdio::from(stdin))
            .stdout(outputs[0].try_clone()?)
            .stderr(outputs[1].try_clone()?)
            // Its own group, so that a timeout ends its children too.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let pid = Pid::from_child(&child);
        self.running().insert(id, pid);
        let in_time = ends_within(pid, Duration::from_millis(command.timeout_ms));
        if !matches!(in_time, Ok(true)) {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
        let status = child.wait();
        self.running().remove(&id);
        let (timed_out, status) = (!in_time?, status?);
        let [stdout, stderr] = &mut outputs;
        Ok(Reply::Exit {
            code: status.code(),
            signal: status.signal(),
            timed_out,
            stdout: collect(stdout).context("standard output")?,
            stderr: collect(stderr).context("standard error")?,
        })
    }

    /// Sends a signal to a command that has not ended.
    pub(crate) fn signal(&self, id: u64, signal: i32) -> Result<()> {
        let signal = Signal::from_named_raw(signal).with_context(|| format!("no signal {signal}"))?;
        // Held while signalling, so that the process is not reaped in between.
        let running = self.running();
        let pid = running.get(&id).context("that command has ended")?;
        Ok(rustix::process::kill_process(*pid, signal)?)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<u64, Pid>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the process to end, and leaves it to be reaped.
fn ends_within(pid: Pid, timeout: Duration) -> Result<bool> {
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(timeout)?;
    let mut wanted = [PollFd::new(&process, PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| rustix::event::poll(&mut wanted, Some(&timeout)))? > 0)
}

fn collect(file: &mut std::fs::File) -> Result<Bytes> {
    let length = file.metadata()?.len();
    anyhow::ensure!(length <= protocol::MAX_OUTPUT, "{length} bytes, more than {}", protocol::MAX_OUTPUT);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(Bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn command(argv: &[&str], timeout_ms: u64) -> protocol::Command {
        let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
        protocol::Command { argv, timeout_ms, ..protocol::Command::default() }
    }

    #[test]
    fn output_code_and_input() {
        let jobs = Jobs::default();
        let mut wanted = command(&["sh", "-c", "cat; printf \"$WORD\" >&2; exit 3"], 20_000);
        wanted.stdin = Bytes(vec![0, 1, 255]);
        wanted.env.insert("WORD".into(), "err".into());
        let expected = Reply::Exit {
            code: Some(3),
            signal: None,
            timed_out: false,
            stdout: Bytes(vec![0, 1, 255]),
            stderr: Bytes(b"err".to_vec()),
        };
        assert_eq!(jobs.run(1, &wanted).unwrap(), expected);
        assert!(jobs.run(2, &command(&["skimmer-no-such-program"], 1)).is_err());
        assert!(jobs.signal(1, 9).unwrap_err().to_string().contains("ended"));
    }

    #[test]
    fn a_timeout_ends_the_whole_group_and_daemons_do_not_hold_us() {
        let jobs = Jobs::default();
        let Reply::Exit { timed_out, .. } =
            jobs.run(1, &command(&["sh", "-c", "sleep 1000; true"], 50)).unwrap()
        else {
            panic!()
        };
        assert!(timed_out);
        // The background child keeps the output open after the end of its parent.
        let reply = jobs.run(2, &command(&["sh", "-c", "sleep 5 & echo started"], 20_000)).unwrap();
        assert!(matches!(reply, Reply::Exit { timed_out: false, stdout, .. } if stdout.0 == b"started\n"));
    }

    #[test]
    fn a_signal_reaches_the_command() {
        let jobs = Arc::new(Jobs::default());
        let other = Arc::clone(&jobs);
        let runner = std::thread::spawn(move || other.run(7, &command(&["sleep", "1000"], 60_000)).unwrap());
        while jobs.signal(7, 9).is_err() {
            std::thread::yield_now();
        }
        assert!(matches!(
            runner.join().unwrap(),
            Reply::Exit { signal: Some(9), code: None, timed_out: false, .. }
        ));
    }
}
