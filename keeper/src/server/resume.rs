//! Going on where another process of this keeper ended: all its descriptors are open here under their numbers, and the
//! ledger says what they are.

use super::events::{EventTable, slot_of};
use super::files::{Files, Inode, Verdict};
use super::ledger::Ledger;
use super::listener::Listener;
use super::log::{Limit, log};
use super::peer::Process;
use super::standby::Standby;
use super::{Config, RESERVED_FDS, Server, admit, process, standby};
use crate::protocol::EventId;
use crate::sys;
use rustix::fs::OFlags;
use skimmer_fanotify::{EventAccess, EventBuffer, Group, PreAccess};
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

/// Gives each number out once.
#[derive(Default)]
struct Adoption(HashSet<RawFd>);

impl Adoption {
    fn take(&mut self, number: RawFd) -> Option<OwnedFd> {
        if self.0.contains(&number) {
            return None;
        }
        let fd = sys::inherited(number)?;
        self.0.insert(number);
        Some(fd)
    }
}

impl Server {
    /// Takes over what the ledger tells of.
    ///
    /// # Errors
    /// It is no ledger of ours. Nothing is closed then: whoever stands by goes on.
    pub(super) fn resume(config: Config, ledger: RawFd) -> io::Result<Self> {
        let mut adoption = Adoption::default();
        let missing = |what: &str| io::Error::other(format!("{what} is missing"));
        let ledger = adoption.take(ledger).ok_or_else(|| missing("the memory file"))?;
        let ledger =
            Ledger::inherited(ledger)?.ok_or_else(|| io::Error::other("a memory file of another version"))?;
        let header = ledger.header();
        let ledger = Rc::new(ledger);
        let (socket, lock) = (adoption.take(header.listener), adoption.take(header.lock));
        let socket = socket.ok_or_else(|| missing("the listening socket"))?;
        let listener = Listener::inherited(socket, lock.ok_or_else(|| missing("the lock"))?, &config.socket);
        let group = match adoption.take(header.group) {
            Some(group) => Ok(Group::inherited(group)),
            None => Group::new(EventAccess::ReadOnly),
        };
        let standby = adoption.take(header.standby_fd).map(|fd| Process::inherited(header.standby, fd));
        let device = adoption.take(header.device);
        let fence = adoption.take(header.daemon_fd).map(|fd| Process::inherited(header.daemon, fd));
        let usable = process::raise_open_files().saturating_sub(RESERVED_FDS);
        let max_files = usize::try_from(usable.saturating_sub(header.slots.into())).unwrap_or(usize::MAX);
        let files =
            Files::resume(max_files, Rc::clone(&ledger), group.as_ref().ok(), |fd| adoption.take(fd))?;
        let mut events = EventTable::new(header.slots);
        events.count_from(header.next_event);
        let signals = process::harden(config.oom_score_adj)?;
        let mut server = Self {
            listener,
            signals,
            group,
            files,
            events,
            buffer: EventBuffer::new(),
            ledger,
            standby: standby.map_or(Standby::Nobody, Standby::Outdated),
            program: config.standby.then(standby::own_program),
            device_path: config.device,
            device,
            peer: None,
            fence,
            successor: None,
            denials: Limit::default(),
            group_errors: Limit::default(),
            stop: false,
        };
        server.resume_events(&mut adoption)?;
        server.answer_drained();
        server.files.forget_all_drained();
        log!("took over; {}", server.held());
        Ok(server)
    }

    /// Accesses that wait: those that are written down, and those that the other process had no time to write down.
    fn resume_events(&mut self, adoption: &mut Adoption) -> io::Result<()> {
        let Ok(group) = &self.group else { return Ok(()) };
        for slot in 0..usize::from(self.ledger.header().slots) {
            let Some(record) = self.ledger.event(slot)? else { continue };
            let id = EventId(record.id);
            let fits = slot_of(id) == slot && self.is_event(record.fd, Some(record.file));
            let Some(fd) = fits.then(|| adoption.take(record.fd)).flatten() else {
                // Answered and closed, only not crossed out.
                self.ledger.clear_event(slot);
                continue;
            };
            let token = group.left(fd, None);
            if self.events.restore(id, record.file, record.offset, record.count, token) {
                self.files.event_added(record.file);
            }
        }
        let unknown: Vec<RawFd> = standby::open_descriptors();
        let unknown =
            unknown.into_iter().filter(|number| !self.is_own(*number) && !adoption.0.contains(number));
        let unknown: Vec<RawFd> = unknown.collect();
        for number in unknown {
            let is_event = self.is_event(number, None);
            let Some(fd) = adoption.take(number) else { continue };
            if is_event {
                // Which of its bytes are asked for is lost: all are assumed.
                let token: PreAccess = group.left(fd, None);
                admit(&mut self.files, &mut self.events, &self.ledger, &mut self.denials, token);
            }
        }
        Ok(())
    }

    /// What this program itself has opened by now.
    fn is_own(&self, number: RawFd) -> bool {
        self.signals.as_raw_fd() == number
    }

    /// Whether a descriptor came with an access to a watched file: `file`, or any. Only such are open for reading only.
    fn is_event(&self, number: RawFd, file: Option<crate::protocol::FileId>) -> bool {
        let Some((inode, flags)) = sys::borrowed(number, |fd| {
            let (inode, _) = Inode::of(fd).ok()?;
            Some((inode, rustix::fs::fcntl_getfl(fd).ok()?))
        }) else {
            return false;
        };
        let known = match file {
            Some(file) => self.files.of_inode(inode) == Some(file),
            None => self.files.judge(inode) != Verdict::Deny,
        };
        known && flags & OFlags::RWMODE == OFlags::RDONLY
    }
}
