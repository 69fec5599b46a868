//! What the service manager keeps open, should both processes of this keeper die at once.
//!
//! systemd's descriptor store (`FileDescriptorStoreMax=`, sd_notify's `FDSTORE=1`) has every descriptor but those of
//! accesses, named by its number, and the [ledger](super::ledger). The kernel knows an access by the number that its
//! descriptor had, and takes an answer to it from whoever has the group. So the next keeper puts everything back under
//! its number, something else under those of the accesses, and goes on.

use super::ledger::{Ledger, NONE};
use super::log::log;
use crate::sys;
use sd_notify::NotifyState;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

const LEDGER: &str = "ledger";
const NUMBER: &str = "fd-";

/// Handed over by the service manager.
pub(super) struct Kept {
    ledger: OwnedFd,
    numbered: Vec<(RawFd, OwnedFd)>,
}

impl Kept {
    /// Takes what there is. Only once in a process's life, and first of all. Without a ledger the rest means nothing.
    pub(super) fn take() -> Option<Self> {
        let named = sd_notify::listen_fds_with_names();
        let named = named.inspect_err(|error| log!("what the service manager kept: {error}")).ok()?;
        let (mut ledger, mut numbered) = (None, Vec::new());
        for (number, name) in named {
            let Some(fd) = sys::inherited(number) else { continue };
            match name.strip_prefix(NUMBER).and_then(|number| number.parse().ok()) {
                Some(number) => numbered.push((number, fd)),
                None if name == LEDGER => ledger = Some(fd),
                None => {}
            }
        }
        Some(Self { ledger: ledger?, numbered })
    }

    /// Opens everything under the number that the ledger has for it, to be adopted from there.
    ///
    /// # Errors
    /// It is no ledger of ours, or there is no room.
    pub(super) fn put_back(self) -> io::Result<Ledger> {
        let other = || io::Error::other("the service manager kept a memory file of another version");
        let Self { ledger, mut numbered } = self;
        let ledger = Ledger::inherited(ledger)?.ok_or_else(other)?;
        let header = ledger.header();
        let mut events = Vec::new();
        for slot in 0..usize::from(header.slots) {
            events.extend(ledger.event(slot)?);
        }
        let mut writers = HashMap::new();
        for slot in 0..usize::try_from(header.files).unwrap_or(0) {
            writers.extend(ledger.file(slot)?.map(|file| (file.file, file.writer)));
        }
        let mut meant: HashSet<RawFd> = writers.values().copied().collect();
        meant.extend([header.group, header.device]);
        numbered.retain(|(number, _)| {
            // Else it was let go, and the last keeper died before it said so.
            meant.contains(number) || {
                forget(*number);
                false
            }
        });
        // First everything out of the way.
        let taken = numbered.iter().flat_map(|(number, fd)| [*number, fd.as_raw_fd()]);
        let taken = taken.chain(events.iter().map(|event| event.fd)).chain([ledger.raw()]);
        let above = taken.max().unwrap_or(NONE).saturating_add(1);
        let moved = |fd: &dyn AsFd| rustix::io::fcntl_dupfd_cloexec(fd, above);
        let ledger_fd = moved(&ledger)?;
        let high: Vec<(RawFd, OwnedFd)> =
            numbered.into_iter().map(|(number, fd)| Ok((number, moved(&fd)?))).collect::<io::Result<_>>()?;
        drop(ledger);
        let ledger = Ledger::inherited(ledger_fd)?.ok_or_else(other)?;
        // What cannot be put back is not watched any more, or denied: the rest goes on all the same.
        let say = |number: RawFd, error: io::Error| log!("descriptor {number} is not put back: {error}");
        for (number, fd) in &high {
            leave_at(fd.as_fd(), *number).unwrap_or_else(|error| say(*number, error));
        }
        for event in events {
            // Any descriptor of the file, which nobody reads from.
            let Some(writer) = writers.get(&event.file) else { continue };
            let put = std::fs::File::open(format!("/proc/self/fd/{writer}")).and_then(|file| {
                if file.as_raw_fd() == event.fd {
                    let _ = file.into_raw_fd();
                    return Ok(());
                }
                leave_at(file.as_fd(), event.fd)
            });
            put.unwrap_or_else(|error| say(event.fd, error));
        }
        // Those of processes that are dead.
        ledger.update(|header| {
            (header.listener, header.lock) = (NONE, NONE);
            (header.standby, header.standby_fd, header.daemon, header.daemon_fd) = (NONE, NONE, NONE, NONE);
        });
        Ok(ledger)
    }
}

/// Opens `fd` under a number that is free, too.
fn leave_at(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    if sys::is_open(number) {
        log!("descriptor {number} was kept twice");
        return Ok(());
    }
    sys::duplicate_at(fd, number)
}

/// Whether there is a service manager that may keep something.
pub(super) fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Has it keep the ledger.
pub(super) fn keep_ledger(ledger: &Ledger) {
    tell(&[NotifyState::FdStore, NotifyState::FdName(LEDGER)], &[ledger.as_fd()]);
}

/// Has it keep a descriptor under its number.
pub(super) fn keep(fd: BorrowedFd<'_>) {
    if is_there() {
        let name = format!("{NUMBER}{}", fd.as_raw_fd());
        tell(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[fd]);
    }
}

/// Has it let go of a descriptor that is about to be closed.
pub(super) fn forget(number: RawFd) {
    if is_there() {
        let name = format!("{NUMBER}{number}");
        tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)], &[]);
    }
}

fn tell(state: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
    if let Err(error) = sd_notify::notify_with_fds(state, fds) {
        let what = state.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        log!("the service manager was not told {what}: {error}");
    }
}
