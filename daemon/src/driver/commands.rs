//! What the daemon asks of the driver.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use skimmer_cachefiles::Device;
use skimmer_engine::{Input, ObjectId};
use skimmer_fetcher::source::Source;
use skimmer_keeper::client::KeeperError;
use skimmer_keeper::protocol::Errno;

use super::handle::{Command, Reply};
use super::objects::{Blob, FileKey, Object, engine_view};
use super::{BlobStatus, DEVICE, Driver, DriverError, FileStatus, Status};
use crate::blob::{BlobChunk, BlobId, BlobSpec, ReadyBits};
use crate::frontend::FscacheSetup;
use crate::frontend::fanotify::WatchState;
use crate::frontend::fscache::{CookieKey, Fscache};
use crate::ring::For;

/// Requests of the daemon whose answer has to wait for something.
#[derive(Default)]
pub(super) struct Waiting {
    watches: HashMap<BlobId, Vec<Reply<()>>>,
    unwatches: HashMap<BlobId, Vec<Reply<()>>>,
    device: Option<(FscacheSetup, Reply<()>)>,
    /// Answered by being dropped when the thread ends.
    shutdowns: Vec<Reply<()>>,
}

impl Waiting {
    /// Answers everything that waits for a keeper that is gone.
    pub(super) fn fail_keeper(&mut self, error: &KeeperError) {
        let replies = self.watches.drain().chain(self.unwatches.drain()).flat_map(|(_, replies)| replies);
        for reply in replies.chain(self.device.take().map(|(_, reply)| reply)) {
            let _ = reply.send(Err(no_keeper(&error.to_string())));
        }
    }
}

fn no_keeper(why: &str) -> DriverError {
    DriverError::Unavailable { mode: "fanotify", why: format!("{why} (is skimmer-keeper running?)") }
}

impl Driver {
    pub(super) fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.command(command),
                Err(tokio::sync::mpsc::error::TryRecvError::Empty) => return,
                Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => {
                    // Nobody can ask for anything any more, a shutdown included.
                    self.begin_stop();
                    return;
                }
            }
        }
    }

    fn begin_stop(&mut self) {
        if !self.stopping {
            self.stopping = true;
            self.fetches.cancel_all();
        }
    }

    fn command(&mut self, command: Command) {
        // An asker that went away does not want its answer.
        match command {
            Command::AddBlob { spec, ready, sources, reply } => {
                let _ = reply.send(self.add_blob(spec, &ready, sources));
            }
            Command::SetChunks { spec, reply } => {
                let _ = reply.send(self.set_chunks(&spec));
            }
            Command::RemoveBlob { blob, reply } => {
                let _ = reply.send(self.remove_blob(blob));
            }
            Command::Watch { blob, writer, reply } => self.watch(blob, writer, reply),
            Command::Unwatch { blob, reply } => match &self.fanotify {
                Some(fanotify) if fanotify.state(blob).is_some() => {
                    self.waiting.unwatches.entry(blob).or_default().push(reply);
                }
                _ => {
                    let _ = reply.send(Ok(()));
                }
            },
            Command::BindFscache { setup, reply } => self.bind_fscache(setup, reply),
            Command::ExpectCookie { volume, cookie, role, reply } => {
                self.cookies.insert(CookieKey { volume, cookie }, role);
                let _ = reply.send(Ok(()));
            }
            Command::ForgetCookie { volume, cookie, reply } => {
                self.cookies.remove(&CookieKey { volume, cookie });
                let _ = reply.send(Ok(()));
            }
            Command::Prefetch { blob, range, background, reply } => {
                let _ = reply.send(self.prefetch(blob, &range, background));
            }
            Command::Offer { ahead, until, reply } => {
                self.fetches.offer(ahead, until);
                let _ = reply.send(Ok(()));
            }
            Command::StopFill { blob, reply } => {
                for object in self.objects.of(blob) {
                    self.input(Input::StopFill { object });
                }
                let _ = reply.send(Ok(()));
            }
            Command::Allow { until, reply } => {
                self.allowance.give(until);
                let _ = reply.send(Ok(()));
            }
            Command::Durable { blob, chunks, reply } => {
                self.durable(blob, &chunks);
                let _ = reply.send(Ok(()));
            }
            Command::Lost { mode, blob, kept, reply } => {
                self.lost(mode, blob, &kept);
                let _ = reply.send(Ok(()));
            }
            Command::Missing { blob, ranges, reply } => {
                let _ = reply.send(self.missing(blob, &ranges));
            }
            Command::Prove { blob, range, seen, reply } => {
                self.proofs.insert(blob, (range, Some(seen)));
                let _ = reply.send(Ok(()));
            }
            Command::EndProof { blob, reply } => {
                self.proofs.remove(&blob);
                let _ = reply.send(Ok(()));
            }
            Command::Record { number, blobs, exact, reply } => {
                let _ = reply.send(self.record(number, blobs, exact));
            }
            Command::Recorded { number, reply } => {
                let _ = reply.send(self.recordings.get(number).ok_or(DriverError::NoRecording));
            }
            Command::EndRecording { number, reply } => {
                self.end_recording(number);
                let _ = reply.send(Ok(()));
            }
            Command::Status { reply } => {
                let _ = reply.send(Ok(self.status()));
            }
            Command::Shutdown { reply } => {
                self.waiting.shutdowns.push(reply);
                self.begin_stop();
            }
        }
    }

    fn add_blob(
        &mut self,
        spec: BlobSpec,
        durable: &ReadyBits,
        sources: Vec<Arc<dyn Source>>,
    ) -> Result<(), DriverError> {
        let id = spec.id;
        let largest = spec.chunks.iter().map(BlobChunk::padded_len).max().unwrap_or(0);
        if largest > self.config.budget_bytes {
            return Err(DriverError::ChunkTooLarge {
                blob: id,
                bytes: largest,
                budget: self.config.budget_bytes,
            });
        }
        match self.blobs.get_mut(&id) {
            Some(known) => known.merge(&spec, durable, sources)?,
            None => {
                let (ready, durable) = (durable.clone(), durable.clone());
                let mut blob = Blob { spec, ready, durable, sources: Vec::new() };
                blob.add_sources(sources);
                self.blobs.insert(id, blob);
            }
        }
        for object in self.objects.of(id) {
            let (count, piece) = self.blobs.get(&id).map_or((0, 0), |blob| (blob.width(), blob.piece()));
            self.input(Input::SetSources { object, count, piece });
            self.grow(object);
        }
        // An earlier daemon had it watched: its events may be waiting already.
        let key = FileKey::Fanotify(id);
        if self.objects.find(&key).is_none() && self.fanotify.as_ref().is_some_and(|f| f.state(id).is_some())
        {
            let ready = self.blobs.get(&id).map(|blob| blob.ready.clone()).unwrap_or_default();
            self.make_object(key, id, ready);
            // That one may have said more than is on record now.
            self.tell_anew(id);
        }
        Ok(())
    }

    /// Gives the engine the blob's chunk list when it has grown since the object got it.
    pub(super) fn grow(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(id) else { return };
        let Some(blob) = self.blobs.get(&object.blob) else { return };
        if object.coming.is_some() || object.spec.chunks.len() == blob.spec.chunks.len() {
            return;
        }
        if let FileKey::Fanotify(_) = object.key {
            object.ready.union(&blob.ready);
        }
        let (chunks, ready) = engine_view(&blob.spec, &object.ready);
        object.coming = Some(blob.spec.clone());
        self.input(Input::AddObject { object: id, chunks, ready });
    }

    fn set_chunks(&mut self, spec: &BlobSpec) -> Result<(), DriverError> {
        let id = spec.id;
        let known = self.blobs.get_mut(&id).ok_or(DriverError::UnknownBlob(id))?;
        if known.spec.chunks == spec.chunks {
            return Ok(());
        }
        // The two agree about every chunk that both name.
        known.spec.merged(spec)?;
        let objects = self.objects.of(id);
        // The engine's lists only grow, so its objects are made anew: that must fail nobody and lose no write.
        let quiet = |object: &Object| object.is_idle() && object.flights == 0 && object.coming.is_none();
        if !objects.iter().filter_map(|object| self.objects.get(*object)).all(quiet) {
            return Err(DriverError::Busy { blob: id, why: "it is being filled" });
        }
        known.spec = spec.clone();
        for object in objects {
            let Some(Object { key, ready, asked, .. }) = self.objects.get(object) else { continue };
            let (key, ready, asked) = (key.clone(), ready.clone(), *asked);
            self.forget_object(&key);
            let remade = self.make_object(key, id, ready);
            if let Some(object) = remade.and_then(|object| self.objects.get_mut(object)) {
                object.asked = asked;
            }
        }
        Ok(())
    }

    fn remove_blob(&mut self, blob: BlobId) -> Result<(), DriverError> {
        if self.fanotify.as_ref().is_some_and(|fanotify| fanotify.state(blob).is_some()) {
            return Err(DriverError::Busy { blob, why: "its file is watched" });
        }
        if !self.objects.of(blob).is_empty() {
            return Err(DriverError::Busy { blob, why: "the kernel has it open" });
        }
        self.blobs.remove(&blob);
        Ok(())
    }

    fn watch(&mut self, blob: BlobId, writer: OwnedFd, reply: Reply<()>) {
        match self.begin_watch(blob, writer) {
            Ok(false) => self.waiting.watches.entry(blob).or_default().push(reply),
            Ok(true) => drop(reply.send(Ok(()))),
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Asks for the mark; whether it is there already.
    fn begin_watch(&mut self, blob: BlobId, writer: OwnedFd) -> Result<bool, DriverError> {
        let known = self.blobs.get(&blob).ok_or(DriverError::UnknownBlob(blob))?;
        let fanotify = self.fanotify.as_mut().ok_or_else(|| no_keeper("no keeper is connected"))?;
        match fanotify.state(blob) {
            Some(WatchState::Watched) => Ok(true),
            Some(WatchState::Asked) => Ok(false),
            Some(WatchState::Leaving) => {
                Err(DriverError::Busy { blob, why: "its mark is just being removed" })
            }
            None => {
                let ready = known.ready.clone();
                let writer = self.ring.file(Arc::new(writer), true);
                fanotify.watch(blob, writer).map_err(|error| no_keeper(&error.to_string()))?;
                self.make_object(FileKey::Fanotify(blob), blob, ready);
                self.tell_all(blob);
                Ok(false)
            }
        }
    }

    pub(super) fn watched(&mut self, blob: BlobId, result: Result<(), Errno>) {
        if result.is_err() {
            self.forget_object(&FileKey::Fanotify(blob));
        }
        for reply in self.waiting.watches.remove(&blob).unwrap_or_default() {
            let result = result.map_err(|errno| {
                let what = format!("marking the file of blob {blob} for pre-content events");
                DriverError::system(what, std::io::Error::from_raw_os_error(errno.raw()))
            });
            let _ = reply.send(result);
        }
    }

    /// Does what had to wait for reads and writes to end.
    pub(super) fn settle(&mut self) {
        if self.waiting.unwatches.is_empty() {
            return;
        }
        let Some(fanotify) = &mut self.fanotify else { return };
        for blob in self.waiting.unwatches.keys() {
            let object = self.objects.find(&FileKey::Fanotify(*blob)).and_then(|id| self.objects.get(id));
            let idle = object.is_none_or(Object::is_idle);
            if fanotify.state(*blob) != Some(WatchState::Watched) || !idle {
                continue;
            }
            let known = self.blobs.get(blob);
            let complete = known.is_some_and(|known| known.spec.is_complete(&known.ready));
            if let Err(error) = fanotify.unwatch(*blob, complete) {
                tracing::warn!(%blob, %error, "asking for the mark to be removed");
                return;
            }
        }
    }

    pub(super) fn unwatched(&mut self, blob: BlobId, result: Result<(), Errno>) {
        let gone = self.fanotify.as_ref().is_none_or(|fanotify| fanotify.state(blob).is_none());
        if gone {
            self.forget_object(&FileKey::Fanotify(blob));
        }
        for reply in self.waiting.unwatches.remove(&blob).unwrap_or_default() {
            let result = match result {
                _ if gone => Ok(()),
                Err(errno) if errno.raw() == libc::EBUSY => {
                    Err(DriverError::Busy { blob, why: "its file is incomplete and still open or mounted" })
                }
                Err(errno) => {
                    let what = format!("removing the mark from the file of blob {blob}");
                    Err(DriverError::system(what, std::io::Error::from_raw_os_error(errno.raw())))
                }
                Ok(()) => Ok(()),
            };
            let _ = reply.send(result);
        }
    }

    fn bind_fscache(&mut self, mut setup: FscacheSetup, reply: Reply<()>) {
        let fail = |reply: Reply<()>, why: &str| {
            let _ = reply.send(Err(DriverError::Unavailable { mode: "fscache", why: why.to_owned() }));
        };
        if self.fscache.is_some() || self.waiting.device.is_some() {
            return fail(reply, "the cachefiles device is bound already");
        }
        if let Some(device) = setup.device.take() {
            let _ = reply.send(self.bind(&setup, device));
            return;
        }
        match &mut self.fanotify {
            None => fail(reply, "no keeper is connected that could hold the cachefiles device"),
            Some(keeper) => match keeper.ask_device() {
                Ok(()) => self.waiting.device = Some((setup, reply)),
                Err(error) => fail(reply, &error.to_string()),
            },
        }
    }

    pub(super) fn device_came(&mut self, device: Result<OwnedFd, Errno>) {
        let Some((setup, reply)) = self.waiting.device.take() else { return };
        let result = match device {
            Ok(device) => self.bind(&setup, Device::from_fd(device)),
            Err(errno) => {
                let hint = match errno.raw() {
                    libc::ENOENT | libc::ENODEV | libc::ENXIO => {
                        "; the kernel offers no cachefiles device: load the module (modprobe cachefiles)"
                    }
                    libc::EBUSY => "; another process has it open (cachefilesd, nydusd?): stop that one",
                    _ => "",
                };
                let why = format!("/dev/cachefiles: {errno}{hint}");
                Err(DriverError::Unavailable { mode: "fscache", why })
            }
        };
        let _ = reply.send(result);
    }

    fn bind(&mut self, setup: &FscacheSetup, device: Device) -> Result<(), DriverError> {
        let fscache = Fscache::bind(setup, device, self.runtime.clone())
            .map_err(|error| DriverError::Unavailable { mode: "fscache", why: error.to_string() })?;
        let poll = self.ring.poll(fscache.device().clone(), For::Reading, DEVICE);
        poll.map_err(|error| DriverError::system("polling /dev/cachefiles", error))?;
        self.fscache = Some(fscache);
        Ok(())
    }

    fn missing(&self, blob: BlobId, ranges: &[Range<u64>]) -> Result<(u64, u64), DriverError> {
        let known = self.blobs.get(&blob).ok_or(DriverError::UnknownBlob(blob))?;
        // Without a file the blob's own record tells.
        let ready = self.objects.of(blob).into_iter().find_map(|id| self.objects.get(id));
        let ready = ready.map_or(&known.ready, |object| &object.ready);
        let (mut bytes, mut missing) = (0, 0);
        for range in ranges {
            let first = known.spec.chunks.partition_point(|chunk| chunk.padded_end() <= range.start);
            for chunk in known.spec.chunks[first..].iter().take_while(|chunk| chunk.start < range.end) {
                bytes += chunk.padded_len();
                missing += if ready.contains(chunk.index) { 0 } else { chunk.padded_len() };
            }
        }
        Ok((bytes, missing))
    }

    fn record(&mut self, number: u64, blobs: Vec<BlobId>, exact: bool) -> Result<(), DriverError> {
        if let Some(unknown) = blobs.iter().find(|blob| !self.blobs.contains_key(blob)) {
            return Err(DriverError::UnknownBlob(*unknown));
        }
        self.recordings.begin(number, blobs, exact);
        self.follow_recordings();
        Ok(())
    }

    fn end_recording(&mut self, number: u64) {
        let blobs = self.objects.blobs().into_iter().map(|(_, blob)| blob);
        let exact: Vec<BlobId> = blobs.filter(|blob| self.recordings.is_exact(*blob)).collect();
        self.recordings.end(number);
        self.follow_recordings();
        for blob in exact {
            self.tell_all(blob);
        }
    }

    /// Tells the engine for which objects exactly what is asked for is to be fetched.
    fn follow_recordings(&mut self) {
        for (object, blob) in self.objects.blobs() {
            let exact = self.recordings.is_exact(blob);
            self.input(Input::SetExact { object, exact });
        }
    }

    fn prefetch(&mut self, blob: BlobId, range: &Range<u64>, background: bool) -> Result<(), DriverError> {
        if !self.blobs.contains_key(&blob) {
            return Err(DriverError::UnknownBlob(blob));
        }
        for object in self.objects.of(blob) {
            self.input(Input::Prefetch { object, range: range.clone(), background });
        }
        Ok(())
    }

    fn status(&self) -> Status {
        let mut blobs: Vec<BlobStatus> = self
            .blobs
            .iter()
            .map(|(id, blob)| BlobStatus {
                id: *id,
                device_bytes: blob.spec.device_bytes,
                stored_bytes: blob.spec.stored_bytes,
                referenced_bytes: blob.spec.referenced_bytes(),
                files: Vec::new(),
            })
            .collect();
        blobs.sort_unstable_by_key(|blob| blob.id);
        for object in self.objects.iter() {
            if let Ok(at) = blobs.binary_search_by_key(&object.blob, |blob| blob.id) {
                blobs[at].files.push(FileStatus {
                    mode: object.key.mode(),
                    ready_bytes: object.spec.ready_bytes(&object.ready),
                    reads: object.asked,
                    pending_reads: object.reads,
                    flights: object.flights,
                });
            }
        }
        for blob in &mut blobs {
            blob.files.sort_unstable_by_key(|file| (file.mode, file.ready_bytes));
        }
        Status {
            blobs,
            budget_bytes: self.config.budget_bytes,
            in_flight_bytes: u64::try_from(self.arena.in_use()).unwrap_or(u64::MAX),
            pending_reads: u64::try_from(self.reads.len()).unwrap_or(u64::MAX),
            parked_events: u64::try_from(self.parked.len()).unwrap_or(u64::MAX),
            fanotify: self.fanotify.is_some(),
            fscache: self.fscache.is_some(),
        }
    }
}
