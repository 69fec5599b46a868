//! Going on where another process of this keeper ended: all its descriptors are open here under their numbers, and the
//! ledger says what they are.

use super::events::{EventTable, slot_of};
use super::files::{Files, Inode, Verdict};
use super::kept::{self, Kept};
use super::ledger::{Ledger, NONE};
use super::listener::Listener;
use super::log::{Limit, log};
use super::peer::Process;
use super::standby::Standby;
use super::{Config, RESERVED_FDS, Server, StartError, admit, process, standby};
use crate::protocol::EventId;
use crate::sys;
use rustix::fs::OFlags;
use skimmer_fanotify::{DenyErrno, EventAccess, EventBuffer, Group, PreAccess};
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
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
        let (socket, lock) = (adoption.take(header.listener), adoption.take(header.lock));
        let socket = socket.ok_or_else(|| missing("the listening socket"))?;
        let listener = Listener::inherited(socket, lock.ok_or_else(|| missing("the lock"))?, &config.socket);
        let mut server = Self::from_ledger(config, ledger, listener, &mut adoption)?;
        server.resume_unwritten(&mut adoption);
        server.go_on();
        Ok(server)
    }

    /// Takes over from processes that died at once.
    ///
    /// # Errors
    /// [`StartError`].
    pub(super) fn resume_kept(config: Config, kept: Kept) -> Result<Self, StartError> {
        process::raise_open_files();
        let ledger = kept.put_back().map_err(StartError::Resume)?;
        let listener = Listener::new(&config.socket, config.wait)?;
        let [socket, lock] = listener.raw();
        ledger.update(|header| (header.listener, header.lock) = (socket, lock));
        let mut adoption = Adoption(HashSet::from([socket, lock, ledger.raw()]));
        let mut server =
            Self::from_ledger(config, ledger, listener, &mut adoption).map_err(StartError::Resume)?;
        let denied = server.deny_unwritten();
        log!("both processes of the last keeper died at once; {denied} of its accesses are denied");
        server.go_on();
        Ok(server)
    }

    fn from_ledger(
        config: Config,
        ledger: Ledger,
        listener: Listener,
        adoption: &mut Adoption,
    ) -> io::Result<Self> {
        let header = ledger.header();
        let ledger = Rc::new(ledger);
        let group = match adoption.take(header.group) {
            Some(group) => Ok(Group::inherited(group)),
            None => Group::new(EventAccess::ReadOnly).inspect(|group| {
                kept::keep(group.as_fd());
                // Its number may be one that the ledger has for something that is not there.
                adoption.0.insert(group.as_fd().as_raw_fd());
            }),
        };
        let standby = adoption.take(header.standby_fd).map(|fd| Process::inherited(header.standby, fd));
        let device = adoption.take(header.device);
        ledger.update(|header| {
            header.group = group.as_ref().map_or(NONE, |group| group.as_fd().as_raw_fd());
            header.device = device.as_ref().map_or(NONE, AsRawFd::as_raw_fd);
        });
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
            last: None,
            stop: false,
        };
        server.resume_events(adoption)?;
        Ok(server)
    }

    fn go_on(&mut self) {
        self.answer_drained();
        self.files.forget_all_drained();
        log!("took over; {}", self.held());
    }

    /// Accesses that wait and are written down.
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
        Ok(())
    }

    /// Those that the other process had no time to write down, but whose descriptors are here.
    fn resume_unwritten(&mut self, adoption: &mut Adoption) {
        let Ok(group) = &self.group else { return };
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
            } else {
                // Something that was about to be closed.
                kept::forget(number);
            }
        }
    }

    /// Those whose descriptors are gone: which file they want is not known, but their numbers are low. Returns how many
    /// there were.
    fn deny_unwritten(&self) -> usize {
        let Ok(group) = &self.group else { return 0 };
        let header = self.ledger.header();
        let limit = RESERVED_FDS + u64::from(header.slots) + u64::from(header.files);
        let known: HashSet<RawFd> = self.events.tokens().map(|token| token.as_fd().as_raw_fd()).collect();
        let unknown = (0..i32::try_from(limit).unwrap_or(i32::MAX)).filter(|number| !known.contains(number));
        unknown.filter(|number| group.deny_left(*number, DenyErrno::Io)).count()
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
