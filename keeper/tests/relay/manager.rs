//! A service manager's descriptor store, as far as a keeper can tell (sd_notify(3), sd_listen_fds(3)).

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

pub(crate) struct Manager {
    dir: tempfile::TempDir,
    store: Store,
}

impl Manager {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let store = Store::default();
        let kept = Arc::clone(&store);
        thread::spawn(move || while note(&socket, &kept) {});
        Self { dir, store }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("notify")
    }

    /// The command, started with everything that is kept.
    pub(crate) fn hand_over(&self, command: &Command) -> Command {
        let store = self.store.lock().unwrap();
        let (mut opens, mut closes) = (String::new(), String::new());
        for (place, (_, fd)) in store.iter().enumerate() {
            let copy = rustix::io::fcntl_dupfd_cloexec(fd, 300).unwrap();
            rustix::io::fcntl_setfd(&copy, FdFlags::empty()).unwrap();
            opens += &format!("exec {}<&{}; ", place + 3, copy.as_raw_fd());
            closes += &format!("exec {}<&-; ", copy.as_raw_fd());
            // Until this program ends; a child must have it.
            let _ = copy.into_raw_fd();
        }
        let names: Vec<&str> = store.iter().map(|(name, _)| name.as_str()).collect();
        let mut shell = Command::new("bash");
        shell.arg("-c").arg(format!("{opens}{closes}export LISTEN_PID=$$; exec \"$0\" \"$@\""));
        shell.arg(command.get_program()).args(command.get_args().map(OsString::from));
        shell.env("NOTIFY_SOCKET", self.socket());
        shell.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        shell
    }
}

/// Takes one message in; false when nobody can send any more.
fn note(socket: &UnixDatagram, store: &Store) -> bool {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let Ok(message) = rustix::net::recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) else {
        return false;
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let text = String::from_utf8_lossy(&bytes[..message.bytes]).into_owned();
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
    let mut store = store.lock().unwrap();
    if text.contains("FDSTOREREMOVE=1") {
        store.retain(|(known, _)| *known != name);
    } else if text.contains("FDSTORE=1") && store.iter().all(|(known, _)| *known != name) {
        store.extend(fds.pop().map(|fd| (name, fd)));
    }
    true
}
