//! Taking mounts down, and letting go of what they needed once nobody can read through them any more.

use std::collections::HashSet;
use std::path::Path;

use rustix::io::Errno;
use skimmer_client::{AttachMode, Mount, ShutdownReport};

use super::{Attachment, Failure, Kind, Mounts, State, VOLUME, bdi, kernel, mountinfo, on_demand, prepared};
use crate::blob::{BlobId, BlobSpec};
use crate::driver::DriverError;
use crate::frontend::Mode;
use crate::store::held::Item;

impl Mounts {
    /// Unmounts what is mounted on `target`.
    ///
    /// # Errors
    /// [`Failure`]: nothing of ours is there, or it is busy.
    pub async fn umount(&self, target: &Path, detach: bool) -> Result<Mount, Failure> {
        // Not canonicalized through the mount itself when it does not answer: a plain comparison may do.
        let real = target.canonicalize().unwrap_or_else(|_| target.into());
        let mut state = self.state.lock().await;
        self.sweep(&mut state).await;
        let (index, place) = find(&state, &real).ok_or_else(|| Failure::not_mounted(target))?;
        let mount = self.umount_one(&mut state, index, place, detach).await?;
        self.release(&mut state).await?;
        Ok(mount)
    }

    /// Before the end: with `umount`, takes down every mount and stops the keeper too. Without it mounts and keeper
    /// stay: what is cached the kernel serves alone, other reads wait for the next daemon.
    ///
    /// # Errors
    /// [`Failure`] when a mount is busy; those before it are down then.
    pub async fn take_down(&self, umount: bool) -> Result<ShutdownReport, Failure> {
        let mut report = ShutdownReport::default();
        let mut state = self.state.lock().await;
        state.closing = true;
        let result = self.take_down_all(&mut state, umount, &mut report).await;
        // A mount that is busy keeps the daemon going.
        state.closing = result.is_ok();
        result.map(|()| report)
    }

    async fn take_down_all(
        &self,
        state: &mut State,
        umount: bool,
        report: &mut ShutdownReport,
    ) -> Result<(), Failure> {
        if umount {
            self.sweep(state).await;
            while let Some(index) = state.attachments.iter().position(|a| !a.record.mounts.is_empty()) {
                let place = state.attachments[index].record.mounts.len() - 1;
                let mount = self.umount_one(state, index, place, false).await?;
                report.unmounted.push(mount.target);
            }
            prepared::spend(state, |_| true);
            self.release(state).await?;
            report.remaining = prepared::in_use(state).await?.into_values().flatten().collect();
            let idle = state.attachments.is_empty() && state.known.is_empty() && state.watched.is_empty();
            report.idle = idle;
            report.keeper_stopped = idle && self.keeper.is_ok();
        }
        report.remaining.extend(self.list().into_iter().map(|mount| mount.target));
        Ok(())
    }

    /// Writes down how it ended. Call it when data path and journal have ended; `clean` when neither lost anything.
    ///
    /// # Errors
    /// [`Failure`] when `mounts.json` cannot be written.
    pub async fn finish(&self, clean: bool) -> Result<(), Failure> {
        let mut state = self.state.lock().await;
        state.closing = true;
        let durable = !clean || !state.unsynced || {
            // What a daemon before this one wrote last is in no journal of ours.
            let synced = self.store.sync_all();
            synced.inspect_err(|error| tracing::error!("{error}")).is_ok()
        };
        self.save(&state, clean && durable)
    }

    async fn umount_one(
        &self,
        state: &mut State,
        index: usize,
        place: usize,
        detach: bool,
    ) -> Result<Mount, Failure> {
        let record = &state.attachments[index].record;
        let mount = record.mounts[place].clone();
        let (target, device) = (mount.target.clone(), record.device.clone());
        let done = tokio::task::spawn_blocking(move || {
            // What the system call takes away is the topmost mount, whosever that is.
            if kernel::device_at(&target)? != device {
                return Ok(false);
            }
            kernel::umount(&target, detach).map(|()| true)
        })
        .await?;
        let failed = |why: &dyn std::fmt::Display| {
            Failure::new(Kind::Conflict, format!("cannot unmount {}: {why}", mount.target.display()))
        };
        match done {
            Ok(true) => {}
            Ok(false) => {
                return Err(failed(&"something else is mounted over the image").remedy("unmount that first"));
            }
            Err(Errno::BUSY) => {
                return Err(failed(&Errno::BUSY)
                    .remedy("files on it are open, or it is a working directory: end those, or detach it"));
            }
            Err(errno) => return Err(failed(&errno)),
        }
        state.attachments[index].record.mounts.remove(place);
        self.save(state, false)?;
        Ok(mount)
    }

    /// Takes note of mounts that others took down, then releases what nothing needs.
    pub(super) async fn sweep(&self, state: &mut State) {
        if let Ok(present) = mountinfo::erofs_mounts() {
            let mut changed = false;
            for attachment in &mut state.attachments {
                let record = &mut attachment.record;
                let before = record.mounts.len();
                record.mounts.retain(|mount| mountinfo::contains(&present, &record.device, &mount.target));
                changed |= record.mounts.len() != before;
            }
            if changed && let Err(failure) = self.save(state, false) {
                tracing::error!("{failure}");
            }
        }
        if let Err(failure) = self.release(state).await {
            tracing::error!("{failure}");
        }
    }

    /// Drops superblocks that are gone, then what only they needed.
    pub(super) async fn release(&self, state: &mut State) -> Result<(), Failure> {
        let changed = self.look_after_prepared(state).await?;
        let before = state.attachments.len();
        let present = mountinfo::erofs_mounts();
        let mut gone: Vec<String> = Vec::new();
        let mut shrinking: Vec<BlobId> = Vec::new();
        let mut recorded = Vec::new();
        state.attachments.retain(|attachment| {
            let record = &attachment.record;
            let alive = attachment.rising.is_some()
                || !record.mounts.is_empty()
                || record.prepared.is_some()
                || match &record.bdi {
                    Some(name) => bdi::is_alive(name),
                    // What cannot be told counts as alive.
                    None => present
                        .as_ref()
                        .map_or(true, |present| present.iter().any(|entry| entry.device == record.device)),
                };
            if !alive {
                gone.push(record.bootstrap.clone());
                shrinking.extend(attachment.specs.iter().map(|spec| spec.id));
                recorded.extend(attachment.recorder.clone());
            }
            alive
        });
        for recorder in recorded {
            self.end_recorder(&recorder).await;
        }
        if changed || state.attachments.len() != before {
            let blobs = shrinking.iter().copied().map(Item::Blob);
            blobs.chain(gone.iter().cloned().map(Item::Bootstrap)).for_each(|item| self.store.touch(&item));
            state.shrinking.extend(shrinking);
            // What is told as released nobody can mount any more.
            self.forget_cookies(state).await;
            self.save(state, false)?;
            for bootstrap in gone {
                if !state.attachments.iter().any(|a| a.record.bootstrap == bootstrap) {
                    self.store.remove_image(&bootstrap)?;
                }
            }
            self.forget_secrets(state);
        }
        self.release_unused(state).await;
        self.shrink(state).await;
        Ok(())
    }

    /// Has the kernel refused what no superblock uses, should it want to open that.
    async fn forget_cookies(&self, state: &mut State) {
        let cookies: Vec<String> =
            state.cookies.iter().filter(|cookie| !is_wanted(state, cookie)).cloned().collect();
        for cookie in cookies {
            if self.driver.forget_cookie(VOLUME, cookie.clone()).await.is_ok() {
                state.cookies.remove(&cookie);
            }
        }
    }

    /// Lets go of cookies, marks and blobs that no superblock uses. What is busy stays for the next time.
    pub(super) async fn release_unused(&self, state: &mut State) {
        self.forget_cookies(state).await;
        // The journal's descriptors go first: the keeper removes a mark only when it holds the last one.
        let files: Vec<(Mode, BlobId)> = state.tracked.iter().copied().collect();
        for (mode, blob) in
            files.into_iter().filter(|(mode, blob)| !state.uses_file(*mode, *blob)).collect::<Vec<_>>()
        {
            self.journal.untrack(mode, blob).await;
            state.tracked.remove(&(mode, blob));
        }
        let unused = |blob: &BlobId| !state.uses_file(Mode::Fanotify, *blob);
        let marks: Vec<BlobId> = state.watched.iter().copied().filter(unused).collect();
        let read = if marks.is_empty() { HashSet::new() } else { self.being_read().await };
        for blob in marks {
            // The data path would wait for the reads' end, as after a probe that got no answer, and the lock with it.
            if !read.contains(&blob) && later(blob, self.driver.unwatch(blob).await) {
                state.watched.remove(&blob);
            }
        }
        let blobs: Vec<BlobId> = state.known.iter().copied().collect();
        for blob in blobs {
            let free = !state.uses(blob) && !state.watched.contains(&blob);
            if free && later(blob, self.driver.remove_blob(blob).await) {
                state.known.remove(&blob);
                self.set_complete(blob, false);
            }
        }
    }

    /// Lets blobs become complete without what only superblocks that are gone had needed.
    async fn shrink(&self, state: &mut State) {
        let blobs: Vec<BlobId> = state.shrinking.iter().copied().collect();
        for blob in blobs {
            // A mount that could not be picked up may need more than is known.
            if state.attachments.iter().any(|attachment| attachment.may_have(blob)) {
                continue;
            }
            let specs = state.attachments.iter().flat_map(|attachment| &attachment.specs);
            let mut needed = specs.filter(|spec| spec.id == blob).cloned();
            let merged =
                needed.next().map(|first| needed.try_fold(first, |all: BlobSpec, spec| all.merged(&spec)));
            let done = match merged {
                // Nobody needs it: it goes as a whole.
                None => true,
                Some(Ok(spec)) => later(blob, self.driver.set_chunks(spec).await),
                Some(Err(error)) => {
                    tracing::warn!("{error}");
                    true
                }
            };
            if done {
                state.shrinking.remove(&blob);
            }
        }
    }

    /// The blobs whose reads wait for an answer.
    async fn being_read(&self) -> HashSet<BlobId> {
        let blobs = self.driver.status().await.map(|status| status.blobs).unwrap_or_default();
        let reads = blobs.iter().filter(|blob| blob.files.iter().any(|file| file.pending_reads > 0));
        reads.map(|blob| blob.id).collect()
    }

    /// A file is complete: when that holds for all images over it, the kernel need not ask any more, and may read far
    /// ahead.
    pub(super) async fn on_complete(&self, mode: Mode, blob: BlobId) {
        if mode == Mode::Fanotify {
            self.unwatch_complete(blob).await;
        }
        let state = self.state.lock().await;
        let over = |attachment: &&Attachment| {
            on_demand(attachment.record.mode) == Some(mode) && attachment.has(blob)
        };
        for attachment in state.attachments.iter().filter(over) {
            let Some(name) = &attachment.record.bdi else { continue };
            let mut all_there = true;
            for spec in &attachment.specs {
                let ready = self.journal.recorded(mode, spec.id).await;
                all_there &= ready.is_some_and(|ready| spec.is_complete(&ready));
            }
            if all_there {
                self.set_read_ahead(name, self.config.mount.read_ahead_kib);
            }
        }
    }

    async fn unwatch_complete(&self, blob: BlobId) {
        let mode = Mode::Fanotify;
        let mut state = self.state.lock().await;
        if !state.watched.contains(&blob) {
            return;
        }
        let Some(ready) = self.journal.recorded(mode, blob).await else { return };
        // A mount that could not be picked up may need more than is known; and an exact recording is of every read.
        let keeps = |attachment: &Attachment| {
            attachment.may_have(blob) || (attachment.has(blob) && attachment.is_recorded_exactly())
        };
        if state.attachments.iter().any(keeps) {
            return;
        }
        let mut specs = state.attachments.iter().flat_map(|attachment| &attachment.specs);
        if specs.any(|spec| spec.id == blob && !spec.is_complete(&ready)) {
            return;
        }
        match self.driver.unwatch(blob).await {
            Ok(()) => {
                state.watched.remove(&blob);
                self.set_complete(blob, true);
                tracing::info!(%blob, "complete: the kernel reads it without us from now on");
            }
            Err(error) => tracing::warn!("{error}"),
        }
    }
}

/// Whether a release is done; what is still in use is tried again with the next sweep.
fn later(blob: BlobId, result: Result<(), DriverError>) -> bool {
    match result {
        Ok(()) | Err(DriverError::UnknownBlob(_)) => true,
        Err(DriverError::Busy { .. }) => {
            tracing::debug!(%blob, "still in use; released later");
            false
        }
        Err(error) => {
            tracing::warn!("{error}");
            false
        }
    }
}

fn find(state: &State, target: &Path) -> Option<(usize, usize)> {
    state.attachments.iter().enumerate().find_map(|(index, attachment)| {
        let place = attachment.record.mounts.iter().rposition(|mount| mount.target == *target)?;
        Some((index, place))
    })
}

fn is_wanted(state: &State, cookie: &str) -> bool {
    state.attachments.iter().filter(|a| a.record.mode == AttachMode::Fscache).any(|attachment| {
        attachment.record.bootstrap == cookie || cookie.parse().is_ok_and(|blob| attachment.has(blob))
    })
}
