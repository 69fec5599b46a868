//! Kernel requests: in as reads of an object, out as answers, each exactly once.

use std::time::Instant;

use skimmer_cachefiles::ReadToken;
use skimmer_engine::{Input, ObjectId, ReadError, ReadId, WriteFailure};
use skimmer_keeper::client::KeeperError;
use skimmer_keeper::protocol::{Errno, EventId, FileId};

use super::objects::{FileKey, engine_view};
use super::{DEVICE, Driver, KEEPER, KEEPER_ROOM};
use crate::blob::{BlobId, ReadyBits};
use crate::frontend::fanotify::Told;
use crate::frontend::fscache::{CookieKey, Heard};
use crate::frontend::{CookieRole, Mode};
use crate::metrics::{ReadResult, RequestKind};
use crate::ring::For;

/// How to answer a read.
pub(super) enum Ticket {
    Event(EventId),
    Message(ReadToken),
}

/// A kernel request that waits for bytes.
pub(super) struct Read {
    object: ObjectId,
    ticket: Ticket,
    offset: u64,
    len: u64,
    since: Instant,
    turn: u64,
}

/// A fanotify event whose blob is not known (again) yet.
pub(super) struct Parked {
    event: EventId,
    file: FileId,
    offset: u64,
    count: u64,
    pub(super) since: Instant,
}

impl Driver {
    pub(super) fn hear_keeper(&mut self) {
        while !self.stopping
            && let Some(fanotify) = &mut self.fanotify
        {
            match fanotify.next() {
                Ok(Some(Told::Read { event, file, offset, count })) => {
                    self.metrics.request(Mode::Fanotify, RequestKind::read);
                    self.access(Parked { event, file, offset, count, since: Instant::now() });
                }
                Ok(Some(Told::Watched { blob, result })) => self.watched(blob, result),
                Ok(Some(Told::Unwatched { blob, result })) => self.unwatched(blob, result),
                Ok(Some(Told::Device(device))) => self.device_came(device),
                Ok(None) => {
                    let socket = fanotify.socket().clone();
                    if let Err(error) = self.ring.poll(socket, For::Reading, KEEPER) {
                        self.fault(None, &format!("the keeper's socket can no longer be polled: {error}"));
                    }
                    return;
                }
                Err(error) => return self.keeper_lost(&error),
            }
        }
    }

    /// Polls the keeper's socket for room when answers wait for it: nothing else would wake us for them.
    pub(super) fn await_room(&mut self) {
        let Some(fanotify) = &self.fanotify else { return };
        if self.room_polled || !fanotify.wants_room() {
            return;
        }
        match self.ring.poll(fanotify.socket().clone(), For::Writing, KEEPER_ROOM) {
            Ok(()) => self.room_polled = true,
            Err(error) => self.fault(None, &format!("the keeper's socket can no longer be polled: {error}")),
        }
    }

    pub(super) fn keeper_has_room(&mut self) {
        self.room_polled = false;
        if let Some(fanotify) = &mut self.fanotify
            && let Err(error) = fanotify.flush()
        {
            self.keeper_lost(&error);
        }
    }

    /// Without the keeper nothing can be watched or answered any more.
    pub(super) fn keeper_lost(&mut self, error: &KeeperError) {
        self.fanotify = None;
        self.parked.clear();
        self.waiting.fail_keeper(error);
        let remedy = "reads of incomplete blobs are not safe now: unmount the images in fanotify mode, then restart skimmerd";
        self.fault(None, &format!("{error}; {remedy}"));
    }

    /// Routes one access: to its object, or to where it waits for its blob to become known.
    fn access(&mut self, access: Parked) {
        let Some(fanotify) = &self.fanotify else { return };
        let Parked { event, file, offset, count, since } = access;
        let Some(blob) = fanotify.blob(file) else {
            if fanotify.is_finished(file) {
                self.metrics.read_done(Mode::Fanotify, ReadResult::hit, since.elapsed());
                return self.answer_event(event, Ok(()));
            }
            let why = if fanotify.is_stranger(file) { "is no blob of ours" } else { "is not watched" };
            self.fault(None, &format!("an access to file {} is denied: it {why}", file.0));
            return self.answer_event(event, Err(Errno::IO));
        };
        let Some(object) = self.objects.find(&FileKey::Fanotify(blob)) else {
            return self.parked.push_back(access);
        };
        let size = self.objects.get(object).map_or(0, |object| object.spec.device_bytes);
        if offset >= size {
            // Reading at or past the end gives nothing; there is nothing to fill.
            return self.answer_event(event, Ok(()));
        }
        if count == 0 {
            // No reader asks for nothing in the middle of a file: somebody cuts it short (truncate).
            self.fault(Some(blob), "somebody tried to truncate its cache file; denied");
            return self.answer_event(event, Err(Errno::from(rustix::io::Errno::PERM)));
        }
        let len = count.min(size - offset);
        self.read(object, Ticket::Event(event), offset, len, since);
    }

    fn read(&mut self, object: ObjectId, ticket: Ticket, offset: u64, len: u64, since: Instant) {
        let read = ReadId(self.next_read);
        self.next_read += 1;
        if let Some(object) = self.objects.get_mut(object) {
            object.reads += 1;
            object.asked += 1;
            self.metrics.asked_bytes.get_or_create(&object.key.mode().into()).inc_by(len);
        }
        self.reads.insert(read, Read { object, ticket, offset, len, since, turn: self.turn });
        self.input(Input::Read { read, object, offset, len });
    }

    /// Gives parked accesses to their blobs, and denies those that waited too long.
    pub(super) fn serve_parked(&mut self) {
        for _ in 0..self.parked.len() {
            let Some(parked) = self.parked.pop_front() else { return };
            if parked.since.elapsed() < self.config.park_limit {
                self.access(parked);
                continue;
            }
            let blob = self.fanotify.as_ref().and_then(|fanotify| fanotify.blob(parked.file));
            let waited = self.config.park_limit.as_secs_f32();
            self.fault(blob, &format!("an access is denied: its blob was not added again within {waited} s"));
            self.metrics.read_done(Mode::Fanotify, ReadResult::failed, parked.since.elapsed());
            self.answer_event(parked.event, Err(Errno::IO));
        }
    }

    pub(super) fn complete(&mut self, read: ReadId, result: Result<(), ReadError>) {
        let Some(read) = self.reads.remove(&read) else {
            tracing::error!(read = read.0, "the engine completes a read that does not wait");
            return;
        };
        let Read { object, ticket, offset, len, since, turn } = read;
        let took = since.elapsed();
        let mode = match ticket {
            Ticket::Event(_) => Mode::Fanotify,
            Ticket::Message(_) => Mode::Fscache,
        };
        let outcome = match &result {
            Err(_) => ReadResult::failed,
            // Completed as soon as the engine heard of it: the bytes were there.
            Ok(()) if self.turn <= turn + 1 => ReadResult::hit,
            Ok(()) => ReadResult::miss,
        };
        self.metrics.read_done(mode, outcome, took);
        let mut blob = None;
        if let Some(object) = self.objects.get_mut(object) {
            object.reads -= 1;
            blob = Some(object.blob);
        }
        if let Err(error) = &result {
            let last = self.objects.get(object).and_then(|object| object.last_error.as_deref());
            let last = last.map_or_else(String::new, |last| format!("; last: {last}"));
            let end = offset.saturating_add(len);
            self.fault(blob, &format!("a read of bytes {offset}..{end} failed: {error}{last}"));
        }
        match ticket {
            Ticket::Event(event) => self.answer_event(event, result.map_err(deny_errno)),
            Ticket::Message(token) => answer_message(token, result),
        }
    }

    fn answer_event(&mut self, event: EventId, result: Result<(), Errno>) {
        let Some(fanotify) = &mut self.fanotify else { return };
        if let Err(error) = fanotify.answer(event, result) {
            self.keeper_lost(&error);
        }
    }

    /// Lets go of requests without an answer: the next daemon gets them again.
    pub(super) fn leave_reads(&mut self) {
        for (_, read) in self.reads.drain() {
            if let Ticket::Message(token) = read.ticket {
                token.leave_pending();
            }
        }
        self.parked.clear();
    }

    pub(super) fn hear_device(&mut self) {
        while !self.stopping
            && let Some(fscache) = &mut self.fscache
        {
            let (blobs, cookies) = (&self.blobs, &self.cookies);
            let lookup = |key: &CookieKey| match cookies.get(key) {
                None => Err("no mount of ours names it".to_owned()),
                Some(role @ CookieRole::Bootstrap { size, .. }) => Ok((role.clone(), *size)),
                Some(role @ CookieRole::Blob(blob)) => match blobs.get(blob) {
                    Some(known) => Ok((role.clone(), known.spec.device_bytes)),
                    None => Err(format!("blob {blob} is not known")),
                },
            };
            match fscache.next(&mut self.ring, lookup) {
                Ok(Some(heard)) => self.heard(heard),
                Ok(None) => {
                    let device = fscache.device().clone();
                    if let Err(error) = self.ring.poll(device, For::Reading, DEVICE) {
                        self.fault(None, &format!("/dev/cachefiles can no longer be polled: {error}"));
                    }
                    return;
                }
                Err(error) => {
                    // The requests that wait are answered as they are; new ones cannot be read.
                    self.fault(None, &format!("{error}; mounts over fscache have failed, unmount them"));
                    return;
                }
            }
        }
    }

    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Opened { key, blob, first } => {
                self.metrics.request(Mode::Fscache, RequestKind::open);
                if let Some(blob) = blob {
                    self.opened(key, blob, first);
                }
            }
            Heard::Rejected { message } => {
                self.metrics.request(Mode::Fscache, RequestKind::open);
                self.fault(None, &message);
            }
            Heard::Closed { key, last } => {
                self.metrics.request(Mode::Fscache, RequestKind::close);
                if last {
                    self.forget_object(&FileKey::Fscache(key));
                }
            }
            Heard::Read { key, token } => {
                self.metrics.request(Mode::Fscache, RequestKind::read);
                let (offset, len) = (token.offset(), token.len());
                match self.objects.find(&FileKey::Fscache(key)) {
                    Some(object) => self.read(object, Ticket::Message(token), offset, len, Instant::now()),
                    None => answer_message(token, Err(ReadError::UnknownObject)),
                }
            }
            Heard::BootstrapRead { len } => {
                self.metrics.request(Mode::Fscache, RequestKind::read);
                self.metrics.asked_bytes.get_or_create(&Mode::Fscache.into()).inc_by(len);
            }
            Heard::Bad { message } => {
                self.metrics.request(Mode::Fscache, RequestKind::bad);
                self.fault(None, &message);
            }
        }
    }

    /// An fscache object is open: finds out what its cache file holds, unless an open one of the same file told.
    fn opened(&mut self, key: CookieKey, blob: BlobId, first: bool) {
        let name = FileKey::Fscache(key.clone());
        if !first && self.objects.find(&name).is_some() {
            return;
        }
        self.forget_object(&name);
        let (Some(fscache), Some(known)) = (&self.fscache, self.blobs.get(&blob)) else { return };
        let ready = fscache.present(&key, &known.spec).unwrap_or_else(|error| {
            let what = format!("what its cache file holds cannot be found out ({error}); it is filled anew");
            self.fault(Some(blob), &what);
            ReadyBits::new()
        });
        self.make_object(name, blob, ready);
    }

    pub(super) fn make_object(&mut self, key: FileKey, blob: BlobId, ready: ReadyBits) {
        let Some(known) = self.blobs.get(&blob) else { return };
        let (spec, sources) = (known.spec.clone(), known.sources.len());
        let (chunks, set) = engine_view(&spec, &ready);
        let object = self.objects.insert(key, blob, spec, ready);
        self.input(Input::AddObject { object, chunks, ready: set });
        let count = u32::try_from(sources).unwrap_or(u32::MAX);
        self.input(Input::SetSources { object, count });
    }

    pub(super) fn forget_object(&mut self, key: &FileKey) {
        if let Some(object) = self.objects.find(key) {
            self.input(Input::RemoveObject { object });
            // Its reads are failed and its flights cancelled before its name is free.
            self.do_outputs();
            self.objects.remove(object);
        }
    }
}

/// What an accessor gets for a read that could not be served; only numbers that fanotify lets pass.
fn deny_errno(error: ReadError) -> Errno {
    match error {
        ReadError::Write(WriteFailure::NoSpace) => Errno::from(rustix::io::Errno::NOSPC),
        _ => Errno::IO,
    }
}

fn answer_message(token: ReadToken, result: Result<(), ReadError>) {
    let answered = match result {
        Ok(()) => token.complete(),
        Err(_) => token.fail(),
    };
    if let Err(error) = answered {
        tracing::debug!(%error, "an answer to fscache came to nothing");
    }
}
