//! What the host and the agent in the guest say to each other: one JSON object per line, over a virtio serial port.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};

/// The name of the virtio port that the agent serves.
pub const PORT: &str = "skimmer.agent";
/// On the kernel's command line, before the name of the disk whose file system becomes the root.
pub const SYSTEM: &str = "skimmer.system=";
/// That disk's name.
pub const SYSTEM_DISK: &str = "system";
/// The longest line that either side takes, in bytes.
pub const MAX_LINE: u64 = 256 << 20;
/// The most output that a command hands back per stream, in bytes; what goes beyond is an error.
pub const MAX_OUTPUT: u64 = 64 << 20;
/// Where the guest root keeps its modules, named so that their order is that of insmod.
pub const MODULES: &str = "/lib/skimmer/modules";

/// Bytes that travel as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine as _;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine as _;
        let text = String::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(text);
        bytes.map(Bytes).map_err(serde::de::Error::custom)
    }
}

/// A program to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What it reads on standard input.
    #[serde(default)]
    pub stdin: Bytes,
    /// It is killed after this time, in milliseconds.
    pub timeout_ms: u64,
}

/// From the host to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run to the end, then answer [`Reply::Exit`]. Other requests are served meanwhile.
    Run(Command),
    /// Send signal number `signal` to the process of the unfinished request `run`.
    Signal {
        /// The id of the `Run` request.
        run: u64,
        /// The signal's number.
        signal: i32,
    },
    /// Write a whole file, made or replaced, with these permission bits.
    Put {
        /// Absolute path in the guest.
        path: String,
        /// Permission bits.
        mode: u32,
        /// The content.
        content: Bytes,
    },
    /// Read a whole file of at most `limit` bytes.
    Get {
        /// Absolute path in the guest.
        path: String,
        /// The largest size taken, in bytes.
        limit: u64,
    },
    /// Carry TCP connections to `127.0.0.1:port` in the guest on to `to`.
    Forward {
        /// The port to listen on.
        port: u16,
        /// `address:port` to connect to.
        to: String,
    },
    /// Sync and switch the machine off.
    PowerOff,
}

/// From the guest to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The first line of a boot, with id 0.
    Hello {
        /// `uname -r`.
        release: String,
        /// Time since the kernel started, in milliseconds.
        uptime_ms: u64,
        /// Block devices by the serial number given to QEMU.
        disks: BTreeMap<String, String>,
    },
    /// Done, with nothing to tell.
    Done,
    /// The end of a [`Request::Run`].
    Exit {
        /// The exit code, or absent when a signal ended it.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
        /// Whether the agent killed it for its timeout.
        timed_out: bool,
        /// Standard output.
        stdout: Bytes,
        /// Standard error.
        stderr: Bytes,
    },
    /// The content of a file.
    Content(Bytes),
    /// The request failed.
    Failed(String),
}

/// A request or a reply with the id that joins them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<T> {
    /// Chosen by the host, used once per boot.
    pub id: u64,
    /// What is said.
    pub body: T,
}

/// Writes one frame as a line.
///
/// # Errors
/// Those of the stream.
pub fn write<T: Serialize>(stream: &mut impl Write, frame: &Frame<T>) -> io::Result<()> {
    let mut line = serde_json::to_vec(frame)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Reads the next frame; `None` at the end of the stream.
///
/// # Errors
/// Those of the stream; `InvalidData` for a line that is too long, cut off or not a frame.
pub fn read<T: for<'de> Deserialize<'de>>(stream: &mut impl BufRead) -> io::Result<Option<Frame<T>>> {
    let mut line = Vec::new();
    stream.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line cut off at {} bytes", line.len()),
        ));
    }
    let frame = serde_json::from_slice(&line).map_err(|error| {
        let start = String::from_utf8_lossy(&line[..line.len().min(120)]);
        io::Error::new(io::ErrorKind::InvalidData, format!("not a frame: {error}: {start}"))
    })?;
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_went() {
        let run = Request::Run(Command {
            argv: vec!["a b".into(), "\n\u{0}".into()],
            env: [("K".into(), "V".into())].into(),
            stdin: Bytes(vec![0, 255, 10, 13]),
            timeout_ms: 5,
        });
        let frames = [run, Request::Signal { run: 1, signal: 9 }, Request::PowerOff];
        let mut wire = Vec::new();
        for (id, body) in (7..).zip(frames.clone()) {
            write(&mut wire, &Frame { id, body }).unwrap();
        }
        assert_eq!(wire.iter().filter(|byte| **byte == b'\n').count(), 3);
        let mut stream = wire.as_slice();
        for (id, body) in (7..).zip(frames) {
            assert_eq!(read(&mut stream).unwrap(), Some(Frame { id, body }));
        }
        assert_eq!(read::<Request>(&mut stream).unwrap(), None);
    }

    #[test]
    fn cut_off_and_foreign_lines_are_errors() {
        assert!(read::<Request>(&mut b"{\"id\":1,".as_slice()).is_err());
        assert!(read::<Request>(&mut b"hello\n".as_slice()).is_err());
    }
}
