//! Recordings of what is read and fetched through a mount.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use skimmer_client::{MountRequest, Record, RecordedFetch, RecordedRead, Recording};

use super::open::Opened;
use super::{Attachment, Failure, Kind, Mounts, State, on_demand};
use crate::blob::BlobId;
use crate::frontend::Mode;

/// The recording of one superblock.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    number: u64,
    record: Record,
    image: String,
}

impl Attachment {
    pub(super) fn is_recorded_exactly(&self) -> bool {
        self.recorder.as_ref().is_some_and(|recorder| recorder.record == Record::Exact)
    }
}

impl Mounts {
    /// Begins to record if the request says so. Call it when the data path knows the blobs.
    pub(super) async fn begin_recording(
        &self,
        state: &mut State,
        opened: &Opened,
        request: &MountRequest,
        mode: Mode,
    ) -> Result<(), Failure> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let Some(record) = request.record else { return Ok(()) };
        if record == Record::Exact {
            self.check_unread(state, opened, mode).await?;
        }
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let blobs: Vec<BlobId> = opened.specs.iter().map(|spec| spec.id).collect();
        self.driver.record(number, blobs, record == Record::Exact).await?;
        if let Some(attachment) = state.attachments.last_mut() {
            attachment.recorder = Some(Recorder { number, record, image: request.image.clone() });
        }
        Ok(())
    }

    /// Refuses an exact recording that could not see every read.
    async fn check_unread(&self, state: &State, opened: &Opened, mode: Mode) -> Result<(), Failure> {
        let mut cached = 0;
        for spec in &opened.specs {
            let users = state.attachments.iter().filter(|attachment| attachment.has(spec.id));
            if users.count() > 1 {
                let message =
                    format!("blob {} is in use by another mount, whose reads would be recorded too", spec.id);
                return Err(Failure::new(Kind::Conflict, message).remedy("unmount that one first"));
            }
            let ready = self.journal.recorded(mode, spec.id).await.unwrap_or_default();
            cached += spec.ready_bytes(&ready);
        }
        if cached > 0 {
            let message =
                format!("{cached} bytes of the image are cached: the kernel reads those without being seen");
            let remedy = "record with an empty cache, for instance with another `root` in the configuration";
            return Err(Failure::new(Kind::Conflict, message).remedy(remedy));
        }
        Ok(())
    }

    pub(super) async fn end_recording(&self, attachment: &Attachment) {
        if let Some(recorder) = &attachment.recorder {
            self.end_recorder(recorder).await;
        }
    }

    pub(super) async fn end_recorder(&self, recorder: &Recorder) {
        if let Err(error) = self.driver.end_recording(recorder.number).await {
            tracing::debug!("{error}");
        }
    }

    /// What was recorded of the mount at `target` so far.
    ///
    /// # Errors
    /// [`Failure`]: nothing of ours is there, or it is not recorded.
    pub async fn recording(&self, target: &Path) -> Result<Recording, Failure> {
        let real = target.canonicalize().unwrap_or_else(|_| target.into());
        let state = self.state.lock().await;
        let found = state
            .attachments
            .iter()
            .find(|attachment| attachment.record.mounts.iter().any(|mount| mount.target == real));
        let attachment = found.ok_or_else(|| Failure::not_mounted(target))?;
        let recorder = attachment.recorder.clone().ok_or_else(|| {
            Failure::new(Kind::NotFound, format!("the mount on {} is not recorded", target.display()))
                .remedy("mount it with --record; a restart of skimmerd ends a recording")
        })?;
        let ids: Vec<BlobId> = attachment.specs.iter().map(|spec| spec.id).collect();
        let record = attachment.record.clone();
        drop(state);
        let events = self.driver.recorded(recorder.number).await?;
        let place = |blob: &BlobId| ids.iter().position(|id| id == blob);
        let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let mut reads: Vec<RecordedRead> = events
            .reads
            .iter()
            .filter_map(|read| {
                Some(RecordedRead {
                    at_us: micros(read.at),
                    blob: place(&read.blob)?,
                    offset: read.range.start,
                    length: read.range.end - read.range.start,
                    took_us: micros(read.took),
                    failed: read.failed,
                })
            })
            .collect();
        reads.sort_by_key(|read| read.at_us);
        let mut fetches: Vec<RecordedFetch> = events
            .fetches
            .iter()
            .filter_map(|fetch| {
                Some(RecordedFetch {
                    at_us: micros(fetch.at),
                    blob: place(&fetch.blob)?,
                    offset: fetch.device.start,
                    length: fetch.device.end - fetch.device.start,
                    stored_bytes: fetch.stored.end - fetch.stored.start,
                    took_us: micros(fetch.took),
                    demand: fetch.demand,
                    request: fetch.request,
                    failed: fetch.failed,
                })
            })
            .collect();
        fetches.sort_by_key(|fetch| fetch.at_us);
        Ok(Recording {
            version: 1,
            image: recorder.image,
            bootstrap: record.bootstrap,
            mode: record.mode,
            record: recorder.record,
            cut: events.cut,
            blobs: ids.iter().map(BlobId::hex).collect(),
            reads,
            fetches,
        })
    }
}

/// The file that a mode reads; `local` mounts raise nothing that could be recorded.
pub(super) fn recorded_mode(mode: skimmer_client::AttachMode) -> Mode {
    on_demand(mode).unwrap_or(Mode::Fanotify)
}
