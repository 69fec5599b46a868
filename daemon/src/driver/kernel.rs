//! Kernel requests: in as reads of an object, out as answers, each exactly once.

use std::time::Instant;

use skimmer_cachefiles::ReadToken;
use skimmer_engine::{Input, ObjectId, ReadError, ReadId, WriteFailure};
use skimmer_keeper::client::KeeperError;
use skimmer_keeper::protocol::{Errno, EventId, FileId};

use super::device::answer_message;
use super::objects::{FileKey, engine_view};
use super::{Driver, DriverError, KEEPER, KEEPER_ROOM};
use crate::blob::{BlobId, ReadyBits};
use crate::frontend::Mode;
use crate::frontend::fanotify::{Fanotify, Told};
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
    pub(super) ticket: Ticket,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) since: Instant,
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
                        self.fail(DriverError::system("polling the keeper's socket", error));
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
            Err(error) => self.fail(DriverError::system("polling the keeper's socket for room", error)),
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

    /// Without the keeper nothing can be watched or answered any more, and misses would hang or read zeros: the
    /// driver ends, so that the daemon is started anew with another keeper. With fscache alone, and when no other process
    /// of the keeper has taken over, it goes on: it is the last holder of the device then, and its end would fail every
    /// mount.
    pub(super) fn keeper_lost(&mut self, error: &KeeperError) {
        self.waiting.fail_keeper(error);
        let must_end = |fanotify: &Fanotify| fanotify.watches_anything() || fanotify.keeper_goes_on();
        if self.fscache.is_some() && !self.fanotify.as_ref().is_some_and(must_end) {
            self.fanotify = None;
            let why = "fscache mounts go on, but fail when skimmerd ends: unmount them before that";
            return self.fault(None, &format!("{error}; {why}"));
        }
        self.fail(DriverError::KeeperLost(error.to_string()));
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
        if let Some((range, seen)) = self.proofs.get_mut(&blob)
            && offset < range.end
            && offset + len > range.start
        {
            // The kernel tries each page twice. Nobody listens any more when the proof came too late.
            let _ = seen.take().map(|seen| seen.send(()));
            return self.answer_event(event, Err(Errno::IO));
        }
        let _ = self.read(object, Ticket::Event(event), offset, len, since);
    }

    pub(super) fn read(
        &mut self,
        object: ObjectId,
        ticket: Ticket,
        offset: u64,
        len: u64,
        since: Instant,
    ) -> ReadId {
        let read = ReadId(self.next_read);
        self.next_read += 1;
        if let Some(object) = self.objects.get_mut(object) {
            object.reads += 1;
            object.asked += 1;
            self.metrics.asked_bytes.get_or_create(&object.key.mode().into()).inc_by(len);
        }
        self.reads.insert(read, Read { object, ticket, offset, len, since, turn: self.turn });
        self.input(Input::Read { read, object, offset, len });
        read
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
        let id = read;
        let Some(read) = self.reads.remove(&id) else {
            tracing::error!(read = id.0, "the engine completes a read that does not wait");
            return;
        };
        if let Some((object, waiting)) = &mut self.remade
            && *object == read.object
            && result == Err(ReadError::Removed)
        {
            if let Ticket::Message(token) = &read.ticket {
                self.device.done(token.msg_id(), id);
            }
            return waiting.push(read);
        }
        let Read { object, ticket, offset, len, since, turn } = read;
        let ticket = match ticket {
            Ticket::Message(token) => {
                self.device.done(token.msg_id(), id);
                if result == Err(ReadError::Cancelled) {
                    // The kernel has given its number to another request.
                    token.leave_pending();
                    return self.read_ended(object);
                }
                Ticket::Message(token)
            }
            event => event,
        };
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
        self.tell_served(object, (mode, offset..offset.saturating_add(len)), since, outcome);
        self.read_ended(object);
        let blob = self.objects.get(object).map(|object| object.blob);
        if let Some(blob) = blob {
            self.recordings.read(blob, offset..offset.saturating_add(len), since, took, result.is_err());
        }
        if let Err(error) = &result {
            let last = self.objects.get(object).and_then(|object| object.last_error.as_deref());
            let last = last.map_or_else(String::new, |last| format!("; last: {last}"));
            let end = offset.saturating_add(len);
            self.fault(blob, &format!("a read of bytes {offset}..{end} failed: {error}{last}"));
        }
        self.answer(ticket, result);
    }

    pub(super) fn answer(&mut self, ticket: Ticket, result: Result<(), ReadError>) {
        match ticket {
            Ticket::Event(event) => self.answer_event(event, result.map_err(deny_errno)),
            Ticket::Message(token) => answer_message(token, result),
        }
    }

    fn read_ended(&mut self, object: ObjectId) {
        if let Some(object) = self.objects.get_mut(object) {
            object.reads -= 1;
        }
    }

    /// Whether a message that came under the number of a read that waits is that read, delivered once more.
    pub(super) fn is_same(&self, read: ReadId, token: &ReadToken) -> bool {
        self.reads.get(&read).is_some_and(|read| match &read.ticket {
            Ticket::Message(known) => {
                let of = |token: &ReadToken| (token.object(), token.offset(), token.len());
                of(known) == of(token)
            }
            Ticket::Event(_) => false,
        })
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

    pub(super) fn make_object(&mut self, key: FileKey, blob: BlobId, ready: ReadyBits) -> Option<ObjectId> {
        let known = self.blobs.get(&blob)?;
        let (spec, count, piece) = (known.spec.clone(), known.width(), known.piece());
        let (chunks, set) = engine_view(&spec, &ready);
        let object = self.objects.insert(key, blob, spec, ready);
        self.input(Input::AddObject { object, chunks, ready: set });
        self.input(Input::SetSources { object, count, piece });
        if self.recordings.is_exact(blob) {
            self.input(Input::SetExact { object, exact: true });
        }
        Some(object)
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
