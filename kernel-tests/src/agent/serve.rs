//! The agent proper: reads requests from the virtio port, answers each in a thread of its own.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use skimmer_vm_images::protocol::{self, Bytes, Frame, Reply, Request};

use super::forward::forward;
use super::jobs::Jobs;

/// Serves requests until the host closes the port.
///
/// # Errors
/// There is no port, or it breaks.
pub fn serve() -> Result<()> {
    let port = find_port()?;
    let port =
        File::options().read(true).write(true).open(&port).with_context(|| port.display().to_string())?;
    let replies = Arc::new(Mutex::new(port.try_clone()?));
    send(&replies, 0, hello()?)?;
    let jobs = Arc::new(Jobs::default());
    let mut requests = BufReader::new(port);
    while let Some(Frame { id, body }) = protocol::read::<Request>(&mut requests)? {
        let (replies, jobs) = (Arc::clone(&replies), Arc::clone(&jobs));
        thread::Builder::new().spawn(move || {
            let reply = answer(&jobs, id, body).unwrap_or_else(|error| Reply::Failed(format!("{error:#}")));
            if let Err(error) = send(&replies, id, reply) {
                eprintln!("skimmer-agent: cannot answer: {error:#}");
            }
        })?;
    }
    Ok(())
}

fn send(port: &Mutex<File>, id: u64, body: Reply) -> Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    protocol::write(&mut *port, &Frame { id, body }).context("cannot write to the host")
}

fn answer(jobs: &Jobs, id: u64, request: Request) -> Result<Reply> {
    match request {
        Request::Run(command) => jobs.run(id, &command),
        Request::Signal { run, signal } => jobs.signal(run, signal).map(|()| Reply::Done),
        Request::Put { path, mode, content } => put(&path, mode, &content.0).map(|()| Reply::Done),
        Request::Get { path, limit } => get(&path, limit).map(|content| Reply::Content(Bytes(content))),
        Request::Forward { port, to } => forward(port, to).map(|_| Reply::Done),
        Request::PowerOff if Path::new("/run/systemd/system").exists() => {
            let status = Command::new("systemctl").args(["--no-block", "poweroff"]).status()?;
            ensure!(status.success(), "systemctl poweroff: {status}");
            Ok(Reply::Done)
        }
        Request::PowerOff => {
            rustix::fs::sync();
            rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
            Ok(Reply::Done)
        }
    }
}

fn put(path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let context = || format!("cannot write {path}");
    if let Some(parent) = Path::new(path).parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    let file = File::options().write(true).create(true).truncate(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(content)).with_context(context)
}

fn get(path: &str, limit: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
    file.take(limit.saturating_add(1))
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read {path}"))?;
    anyhow::ensure!(u64::try_from(content.len())? <= limit, "{path} is larger than {limit} bytes");
    Ok(content)
}

/// The device node of the port, found by its name.
fn find_port() -> Result<PathBuf> {
    let class = Path::new("/sys/class/virtio-ports");
    for entry in fs::read_dir(class).context("no virtio ports: is virtio_console loaded?")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == protocol::PORT {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    anyhow::bail!("no virtio port is called {}", protocol::PORT)
}

fn hello() -> Result<Reply> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let uptime = fs::read_to_string("/proc/uptime")?;
    // "12.34 5.67": seconds with two decimals.
    let hundredths: String = uptime.split_whitespace().next().unwrap_or("").split('.').collect();
    let uptime_ms = hundredths.parse::<u64>().with_context(|| format!("/proc/uptime: {uptime}"))? * 10;
    Ok(Reply::Hello { release, uptime_ms, disks: disks()? })
}

/// Block devices by the serial number given to QEMU.
pub(super) fn disks() -> Result<BTreeMap<String, String>> {
    let mut disks = BTreeMap::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
            let device = Path::new("/dev").join(entry.file_name());
            disks.insert(serial.trim_end().to_owned(), device.to_string_lossy().into_owned());
        }
    }
    Ok(disks)
}
