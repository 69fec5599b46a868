//! The process: one thread, one poll loop, nothing allocated per event.

mod config;
mod events;
mod files;
mod kept;
mod ledger;
mod listener;
mod log;
mod peer;
mod present;
mod process;
mod resume;
mod standby;
mod succession;

use crate::packet::{self, Received};
use crate::protocol::{Errno, EventId, ProtocolError, Reply, Request};
pub use config::{Config, StartError};
use events::{EventTable, slot_of};
use files::{Files, Inode, Verdict};
use kept::Kept;
pub use ledger::VERSION as LEDGER_VERSION;
use ledger::{EventRecord, Ledger, NONE};
use listener::Listener;
pub use listener::owner;
use log::{Limit, log};
use peer::{Outgoing, Peer, Process};
use process::Last;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno as Sys;
use skimmer_fanotify::{
    AnswerError, DenyErrno, EventAccess, EventBuffer, Group, GroupError, Notification, PreAccess,
};
use standby::Standby;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Descriptors that are neither event nor watched file.
const RESERVED_FDS: u64 = 64;
/// Group reads, commands and sends in one turn of the loop, so that none starves the others.
const BATCH: usize = 256;
/// Names of events that are reserved in the ledger at once.
const NAMES: u64 = 1 << 16;
/// How long the loop sleeps at most when it could not start a standby.
const STANDBY_RETRY: Duration = Duration::from_secs(1);

/// The keeper's state.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    signals: OwnedFd,
    /// The error is what `Watch` answers on a kernel without the feature.
    group: Result<Group, GroupError>,
    files: Files,
    events: EventTable<PreAccess>,
    buffer: EventBuffer,
    /// What the next process of this keeper begins with.
    ledger: Rc<Ledger>,
    /// It waits for our end.
    standby: Standby,
    /// Where this program was started from, if others may be started to take over.
    program: Option<PathBuf>,
    device_path: PathBuf,
    device: Option<OwnedFd>,
    /// The daemon that is served.
    peer: Option<Peer>,
    /// The last daemon, when its connection is gone but its process is not dead yet.
    fence: Option<Process>,
    /// A daemon that waits for the fence, and until when.
    successor: Option<(Peer, Instant)>,
    denials: Limit,
    group_errors: Limit,
    /// It was told to end, but holds something: it does so when nobody else is left.
    last: Option<Last>,
    stop: bool,
}

/// Whether the loop goes on with this daemon.
type Served = Result<(), Hangup>;

/// Why a connection ends.
#[derive(Debug)]
enum Hangup {
    Closed,
    Dead,
    Broken(ProtocolError),
    Failed(Sys),
}

impl From<Sys> for Hangup {
    fn from(errno: Sys) -> Self {
        match errno {
            Sys::PIPE | Sys::CONNRESET | Sys::NOTCONN => Self::Closed,
            errno => Self::Failed(errno),
        }
    }
}

impl Server {
    /// Prepares the process and listens.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn new(config: Config) -> Result<Self, StartError> {
        if let Some(ledger) = config.resume {
            return Self::resume(config, ledger).map_err(StartError::Resume);
        }
        if kept::is_there() {
            // First of all: the end by a signal of a process that only waits would be a clean one, after which the
            // service manager lets go of everything.
            process::block_signals().map_err(StartError::Signals)?;
        }
        let kept = Kept::take();
        let is_kept = kept.is_some();
        if let Some(kept) = kept {
            match owner(&config.socket) {
                Ok(None) => return Self::resume_kept(config, kept),
                // It goes on with all of that.
                Ok(Some(_)) => drop(kept),
                Err(error) => return Err(StartError::Resume(error)),
            }
        }
        let listener = Listener::new(&config.socket, config.wait)?;
        if is_kept {
            // That one has just ended.
            return Err(StartError::Again);
        }
        let open_files = process::raise_open_files();
        let usable = open_files.saturating_sub(RESERVED_FDS);
        // An event without a descriptor to open would be denied by the kernel, so both tables together fit the limit.
        let slots =
            u16::try_from(usable / 2).unwrap_or(u16::MAX).min(config.events.clamp(32, events::SLOTS_MAX));
        let max_files = usize::try_from(usable.saturating_sub(u64::from(slots))).unwrap_or(usize::MAX);
        let group = Group::new(EventAccess::ReadOnly);
        if let Err(error) = &group {
            log!("{error}");
        }
        let ledger = Rc::new(Ledger::new().map_err(|errno| StartError::Ledger(errno.into()))?);
        let [socket, lock] = listener.raw();
        ledger.update(|header| {
            (header.listener, header.lock, header.slots) = (socket, lock, slots);
            header.group = group.as_ref().map_or(NONE, |group| group.as_fd().as_raw_fd());
        });
        let (files, events) = (Files::new(max_files, Rc::clone(&ledger)), EventTable::new(slots));
        // Last, so that what is allocated above is locked too.
        let signals = process::harden(config.oom_score_adj).map_err(StartError::Signals)?;
        kept::keep_ledger(&ledger);
        if let Ok(group) = &group {
            kept::keep(group.as_fd());
        }
        log!("listening on {}, {slots} events, {max_files} files", config.socket.display());
        Ok(Self {
            listener,
            signals,
            group,
            files,
            events,
            buffer: EventBuffer::new(),
            ledger,
            standby: Standby::Nobody,
            program: config.standby.then(standby::own_program),
            device_path: config.device,
            device: None,
            peer: None,
            fence: None,
            successor: None,
            denials: Limit::default(),
            group_errors: Limit::default(),
            last: None,
            stop: false,
        })
    }

    /// Serves until it is told to stop while nothing is held, or nobody else is left. A panic on the way is logged and survived: ending would
    /// let every waiting read through unfilled.
    pub fn run(mut self) {
        while !self.stop {
            if std::panic::catch_unwind(AssertUnwindSafe(|| self.serve())).is_err() {
                log!("survived a panic; {}", self.held());
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        self.dismiss_standby();
        log!("stopping");
    }

    fn serve(&mut self) {
        while !self.stop {
            self.keep_standby();
            match self.wait() {
                Ok(ready) => self.turn(ready),
                Err(Sys::INTR) => {}
                Err(errno) => {
                    if self.group_errors.pass() {
                        log!("poll: {errno}");
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> Result<Ready, Sys> {
        let has_room = self.events.free() >= EventBuffer::MAX_EVENTS;
        let peer = self.peer.as_ref();
        let mut peer_flags = PollFlags::empty();
        if let Some(peer) = peer {
            peer_flags.set(PollFlags::IN, peer.takes_commands());
            peer_flags.set(PollFlags::OUT, peer.full);
        }
        let watched_process = peer.map(|peer| &peer.process).or(self.fence.as_ref());
        let successor = self.successor.as_ref();
        // An absent one is stood in for by the listener with no events to wait for.
        let wanted = [
            (Some(self.listener.as_fd()), PollFlags::IN),
            (Some(self.signals.as_fd()), PollFlags::IN),
            (self.group.as_ref().ok().filter(|_| has_room).map(AsFd::as_fd), PollFlags::IN),
            (peer.map(|peer| peer.socket.as_fd()), peer_flags),
            (watched_process.map(AsFd::as_fd), PollFlags::IN),
            (successor.map(|(peer, _)| peer.socket.as_fd()), PollFlags::empty()),
            (self.standby.process().map(AsFd::as_fd), PollFlags::IN),
        ];
        let mut fds = wanted.map(|(fd, flags)| match fd {
            Some(fd) => PollFd::from_borrowed_fd(fd, flags),
            None => PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::empty()),
        });
        let timeout = successor.map(|(_, until)| until.saturating_duration_since(Instant::now()));
        let retry = (self.program.is_some() && !matches!(self.standby, Standby::Ours { .. }))
            .then_some(STANDBY_RETRY);
        // A daemon that is served is somebody.
        let last = (self.last.is_some() && self.peer.is_none()).then_some(Last::RETRY);
        let timeout = [timeout, retry, last].into_iter().flatten().min();
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        rustix::event::poll(&mut fds, timeout.as_ref())?;
        // The standby only wakes us: it is looked after before each sleep.
        let [listener, signals, group, peer, process, successor, _] = fds.map(|fd| fd.revents());
        Ok(Ready {
            listener: listener.contains(PollFlags::IN),
            signals: !signals.is_empty(),
            group: group.contains(PollFlags::IN),
            peer: !peer.is_empty(),
            process: process.contains(PollFlags::IN),
            successor: successor.intersects(PollFlags::HUP | PollFlags::ERR),
        })
    }

    /// One turn of the loop. The old daemon comes before new ones, so that its end is seen first.
    fn turn(&mut self, ready: Ready) {
        if ready.group {
            self.read_group();
        }
        if ready.peer
            && let Err(hangup) = self.serve_peer()
        {
            self.disconnect(&hangup);
        }
        if ready.process {
            self.process_died();
        }
        if ready.successor {
            self.successor = None;
        }
        self.succeed();
        if ready.listener {
            self.accept();
        }
        if let Err(hangup) = self.pump() {
            self.disconnect(&hangup);
        }
        if ready.signals {
            self.signalled();
        }
        if self.peer.is_none()
            && let Some(last) = &mut self.last
            && last.is_sure()
        {
            log!("nobody is left who could read; {}", self.held());
            self.stop = true;
        }
    }

    /// Takes accesses from the kernel into the table.
    fn read_group(&mut self) {
        let Self { group: Ok(group), files, events, ledger, buffer, denials, .. } = self else { return };
        for _ in 0..BATCH {
            if events.free() < EventBuffer::MAX_EVENTS {
                return;
            }
            let read = group.read(buffer, |notification| match notification {
                Notification::Access(token) => admit(files, events, ledger, denials, token),
                Notification::Overflow => log!("the kernel lost events: reads went through unfilled"),
                Notification::Malformed(error) => {
                    if denials.pass() {
                        log!("denied: {error}");
                    }
                }
            });
            match read {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    if self.group_errors.pass() {
                        log!("{error}: the kernel denied an access");
                    }
                    return;
                }
            }
        }
    }

    /// Reads and carries out commands.
    fn serve_peer(&mut self) -> Served {
        for _ in 0..BATCH {
            let Some(peer) = self.peer.as_mut().filter(|peer| peer.takes_commands()) else { return Ok(()) };
            let (bytes, len, fd) = match packet::receive(peer.socket.as_fd())? {
                Received::Nothing => return Ok(()),
                Received::Closed => return Err(Hangup::Closed),
                Received::Packet { bytes, len, fd } => (bytes, len, fd),
            };
            let (seq, request) = Request::decode(&bytes[..len]).map_err(Hangup::Broken)?;
            let expected = request.carries_fd();
            if expected != fd.is_some() {
                return Err(Hangup::Broken(ProtocolError::Descriptor { kind: request.name(), expected }));
            }
            self.carry_out(seq, request, fd);
        }
        Ok(())
    }

    fn carry_out(&mut self, seq: u32, request: Request, fd: Option<OwnedFd>) {
        let outcome = match request {
            Request::Answer { event, errno } => {
                let known = self.answer(event, errno.map(|errno| DenyErrno::from_raw(errno.raw())));
                if !known && let Some(peer) = &mut self.peer {
                    peer.queue(Reply::Stale { event });
                }
                return;
            }
            Request::Watch { file, label } => match (&self.group, fd) {
                (Ok(group), Some(writer)) => self.files.watch(group, file, label, writer),
                (Err(error), _) => Err(Errno::new(error.raw_os_error()).unwrap_or(Errno::IO)),
                (Ok(_), None) => Err(Errno::INVAL),
            },
            Request::Unwatch { file, complete } => match &self.group {
                Ok(group) => self.files.unwatch(group, file, complete),
                Err(_) => Err(Sys::NOENT.into()),
            },
            Request::Fill { file, offset, count, fill } => return self.files.fill(file, offset, count, fill),
            Request::OpenDevice => match self.open_device() {
                Ok(()) => {
                    if let Some(peer) = &mut self.peer {
                        peer.replies.push_back(Outgoing::Device { seq });
                    }
                    return;
                }
                Err(errno) => Err(errno),
            },
            Request::CloseDevice => {
                // Before it is closed: its number could come to mean another descriptor.
                self.ledger.update(|header| header.device = NONE);
                if let Some(device) = self.device.take() {
                    kept::forget(device.as_raw_fd());
                    log!("closed {}", self.device_path.display());
                }
                Ok(())
            }
            Request::Stop if self.holds_anything() => Err(Sys::BUSY.into()),
            Request::Stop => {
                self.stop = true;
                Ok(())
            }
        };
        if let Err(errno) = outcome {
            log!("{}: {errno}", request.name());
        }
        if let Some(peer) = &mut self.peer {
            peer.entrusted |= matches!(request, Request::Watch { .. });
            peer.queue(Reply::Done { seq, errno: outcome.err() });
        }
    }

    /// Answers an access; false when none of that name waits.
    fn answer(&mut self, event: EventId, deny: Option<DenyErrno>) -> bool {
        let Some((file, token)) = self.events.take(event) else { return false };
        let result = match deny {
            None => token.allow(),
            Some(errno) => token.deny(errno),
        };
        // That the accessor was killed meanwhile is nothing to report.
        if let Err(error @ AnswerError::Write(_)) = result
            && self.group_errors.pass()
        {
            log!("{error}");
        }
        // Answered and closed by now. A slot whose descriptor is closed waits for nothing.
        self.ledger.clear_event(slot_of(event));
        self.files.event_answered(file);
        true
    }

    fn open_device(&mut self) -> Result<(), Errno> {
        if self.device.is_none() {
            let opened = skimmer_cachefiles::device::open_fd(&self.device_path).map_err(|error| {
                log!("{error}");
                error.raw_os_error().and_then(Errno::new).unwrap_or(Errno::IO)
            })?;
            log!("opened {}", self.device_path.display());
            self.ledger.update(|header| header.device = opened.as_raw_fd());
            kept::keep(opened.as_fd());
            self.device = Some(opened);
        }
        Ok(())
    }

    /// Sends what waits for the daemon: files of the welcome, replies, then accesses.
    fn pump(&mut self) -> Served {
        let Self { peer: Some(peer), files, events, device, .. } = self else { return Ok(()) };
        peer.full = false;
        while let Some(&file) = peer.welcome.last() {
            let Some(watched) = files.get(file) else {
                return Err(Hangup::Failed(Sys::NOENT));
            };
            if !peer.send(&Reply::File { file, label: watched.label }, Some(watched.writer.as_fd()))? {
                return Ok(());
            }
            peer.welcome.pop();
        }
        while let Some(&reply) = peer.replies.front() {
            let sent = match (reply, &*device) {
                (Outgoing::Plain(reply), _) => peer.send(&reply, None)?,
                (Outgoing::Device { seq }, Some(device)) => {
                    peer.send(&Reply::Device { seq }, Some(device.as_fd()))?
                }
                // Closed again before the reply went out.
                (Outgoing::Device { seq }, None) => {
                    peer.send(&Reply::Done { seq, errno: Some(Sys::BADF.into()) }, None)?
                }
            };
            if !sent {
                return Ok(());
            }
            peer.replies.pop_front();
        }
        for _ in 0..BATCH {
            let Some(event) = events.next_unsent() else { return Ok(()) };
            let reply =
                Reply::Event { event: event.id, file: event.file, offset: event.offset, count: event.count };
            if !peer.send(&reply, None)? {
                return Ok(());
            }
            events.mark_sent();
        }
        // More is left; the next turn follows as soon as the socket takes something.
        peer.full = true;
        Ok(())
    }

    fn signalled(&mut self) {
        // One `signalfd_siginfo` of 128 bytes per signal; it starts with the number.
        let mut info = [0; 128];
        while let Ok(128) = rustix::io::read(&self.signals, &mut info[..]) {
            let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if signal == libc::SIGHUP {
                self.upgrade();
                continue;
            }
            if self.holds_anything() {
                log!(
                    "signal {signal}: ending now would give readers zeros, so this ends when no other process is left; {}",
                    self.held()
                );
                self.last.get_or_insert_default();
            } else {
                self.stop = true;
            }
        }
    }

    fn holds_anything(&self) -> bool {
        self.files.len() > 0 || self.events.len() > 0 || self.device.is_some()
    }

    fn held(&self) -> Held {
        Held { files: self.files.len(), events: self.events.len(), device: self.device.is_some() }
    }
}

/// What a log line says is held.
struct Held {
    files: usize,
    events: usize,
    device: bool,
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} files watched, {} accesses waiting", self.files, self.events)?;
        if self.device { f.write_str(", device held") } else { Ok(()) }
    }
}

/// What poll found.
#[derive(Debug, Clone, Copy)]
struct Ready {
    listener: bool,
    signals: bool,
    group: bool,
    peer: bool,
    process: bool,
    successor: bool,
}

/// Decides about one access: relay, let through or deny.
fn admit(
    files: &mut Files,
    events: &mut EventTable<PreAccess>,
    ledger: &Ledger,
    denials: &mut Limit,
    token: PreAccess,
) {
    let (inode, stat) = match Inode::of(token.as_fd()) {
        Ok(found) => found,
        Err(errno) => {
            if denials.pass() {
                log!("denied an access: fstat: {errno}");
            }
            return deny(token);
        }
    };
    match files.judge(inode) {
        Verdict::Relay(file) => {
            let whole = || (0, u64::try_from(stat.st_size).unwrap_or(0));
            let (offset, count) = token.range().map_or_else(whole, |range| (range.offset, range.count));
            if files.is_filled(file, offset, count) {
                return drop(token.allow());
            }
            files.event_added(file);
            if events.next() >= ledger.header().next_event {
                ledger.update(|header| header.next_event = events.next() + NAMES);
            }
            let fd = token.as_fd().as_raw_fd();
            if let Some(id) = events.insert(file, offset, count, token) {
                ledger.set_event(slot_of(id), &EventRecord { id: id.0, file, offset, count, fd });
            }
        }
        Verdict::Allow => drop(token.allow()),
        Verdict::Deny => {
            if denials.pass() {
                log!("denied an access by process {}: {inode:?} is not watched", token.pid());
            }
            deny(token);
        }
    }
}

fn deny(token: PreAccess) {
    drop(token.deny(DenyErrno::Io));
}
