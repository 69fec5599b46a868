//! Picking up the mounts of an earlier daemon, before anything is answered.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use skimmer_client::AttachMode;
use skimmer_fetcher::source::Source;

use super::{Attachment, Failure, Kind, Mounts, State, bdi, mountinfo, open};
use crate::blob::BlobId;
use crate::frontend::FscacheSetup;
use crate::store::records::{AttachmentRecord, ImageRecord, MountsRecord};

impl Mounts {
    /// Makes the data path serve every mount that an earlier daemon left, by its `record`. A mount that cannot be
    /// served stays on record with its fault: its reads fail or wait, it can be unmounted, and the next daemon tries
    /// again. All others go on.
    ///
    /// # Errors
    /// When the root directory cannot be read or written, or when it cannot be told what is mounted.
    pub async fn restore(&self, record: MountsRecord) -> Result<(), Failure> {
        let mut state = self.state.lock().await;
        let same_boot = record.boot == self.boot;
        state.unsynced = same_boot && !record.clean;
        // Also when there is no record at all: where nothing was cached there is nothing to trim.
        if !same_boot && !record.clean {
            tracing::info!("no clean end is on record: cache files keep only what is");
            self.store.trim_cache_files()?;
        }
        let present = mountinfo::erofs_mounts().map_err(|error| {
            Failure::new(
                Kind::Internal,
                format!("cannot tell what is mounted: /proc/self/mountinfo: {error}"),
            )
        })?;
        for mut attachment in record.attachments {
            attachment.mounts.retain(|m| mountinfo::contains(&present, &attachment.device, &m.target));
            let alive = same_boot
                && (!attachment.mounts.is_empty()
                    || attachment.prepared.is_some()
                    || attachment.bdi.as_deref().is_some_and(bdi::is_alive));
            let name = attachment.bootstrap.clone();
            if !alive {
                tracing::info!(bootstrap = %name, "was unmounted meanwhile");
            } else if let Err(failure) = self.restore_one(&mut state, &attachment).await {
                tracing::error!(bootstrap = %name, "cannot serve a present mount, its reads will fail: {failure}");
                let fault = format!("not served: {failure}; restart skimmerd to try again, or unmount it");
                let image = self.store.load_image(&name).ok().flatten().unwrap_or(ImageRecord {
                    bootstrap: name,
                    sources: Vec::new(),
                    blobs: Vec::new(),
                });
                let (record, specs) = (attachment, Vec::new());
                state.attachments.push(Attachment {
                    record,
                    image,
                    specs,
                    rising: None,
                    recorder: None,
                    fault: Some(fault),
                });
            }
        }
        self.adopt_held(&mut state);
        let needs_device = state.attachments.iter().any(|a| a.record.mode == AttachMode::Fscache);
        let held = self.keeper.as_ref().is_ok_and(|keeper| keeper.device_held);
        if needs_device || held {
            let dir = self.store.fscache_dir();
            let setup = FscacheSetup { dir, tag: self.config.fscache.tag.clone(), device: None };
            match self.driver.bind_fscache(setup).await {
                Ok(()) => state.bound = true,
                Err(error) => {
                    tracing::error!("fscache mounts cannot be served: {error}");
                    for attachment in &mut state.attachments {
                        if attachment.record.mode == AttachMode::Fscache {
                            attachment.fault.get_or_insert_with(|| format!("not served: {error}"));
                        }
                    }
                }
            }
        }
        self.save(&state, false)?;
        self.release(&mut state).await
    }

    async fn restore_one(&self, state: &mut State, record: &AttachmentRecord) -> Result<(), Failure> {
        let image = self.store.load_image(&record.bootstrap)?;
        let image =
            image.ok_or_else(|| Failure::new(Kind::Internal, "the record of its image is not there"))?;
        let mut stored = HashMap::new();
        for blob in &image.blobs {
            let id: BlobId =
                blob.id.parse().map_err(|error| Failure::new(Kind::Internal, format!("{error}")))?;
            stored.insert(id, blob.stored_bytes);
        }
        let bootstrap = self.store.load_bootstrap(&record.bootstrap)?;
        let length = bootstrap.len();
        let specs = tokio::task::spawn_blocking(move || open::specs(&bootstrap, &stored)).await??;
        let sources = self.sources(&image);
        if record.mode == AttachMode::Fscache {
            self.expect_bootstrap(state, &record.bootstrap, length).await?;
        }
        for spec in &specs {
            if record.mode == AttachMode::Fscache {
                self.add_cached_blob(state, spec, sources.clone()).await?;
                continue;
            }
            let ready = self.add_file_blob(state, spec, sources.clone()).await?;
            let held = self.keeper.as_ref().is_ok_and(|keeper| keeper.files.contains(&spec.id.hex()));
            if !held && (record.mode == AttachMode::Local || spec.is_complete(&ready)) {
                continue;
            }
            if !held {
                let targets: Vec<_> = record.mounts.iter().map(|m| m.target.display().to_string()).collect();
                tracing::error!(
                    blob = %spec.id,
                    "no keeper watched this file: reads since then may have seen zeros; unmount {}",
                    targets.join(", ")
                );
            }
            let writer = self.store.open_blob(spec.id, spec.device_bytes)?;
            self.driver.watch(spec.id, writer.into()).await?;
            state.watched.insert(spec.id);
        }
        tracing::info!(bootstrap = %record.bootstrap, mode = %record.mode, mounts = record.mounts.len(), "picked up");
        if let Some(name) = &record.bdi {
            self.end_start(name);
        }
        let record = record.clone();
        state.attachments.push(Attachment {
            record,
            image,
            specs,
            rising: None,
            recorder: None,
            fault: None,
        });
        Ok(())
    }

    /// The sources of an image; those that cannot be made are left out with a log line.
    pub(super) fn sources(&self, image: &ImageRecord) -> Vec<Arc<dyn Source>> {
        let secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        let make = |record| {
            self.source_of(record, secrets.get(&record.image))
                .inspect_err(|failure| tracing::error!("source of a present mount: {failure}"))
                .ok()
        };
        image.sources.iter().filter_map(make).collect()
    }

    /// Files that the keeper watches and no record speaks of: put among those to be released. The keeper itself
    /// makes sure that nobody has such a file open before it removes the mark.
    fn adopt_held(&self, state: &mut State) {
        let files = self.keeper.as_ref().map(|keeper| keeper.files.as_slice()).unwrap_or_default();
        for label in files {
            match label.parse::<BlobId>() {
                Ok(blob) if state.uses(blob) => {}
                Ok(blob) => {
                    tracing::warn!(%blob, "the keeper watches a file that no recorded mount uses");
                    state.watched.insert(blob);
                    state.known.insert(blob);
                }
                Err(error) => tracing::warn!("the keeper watches an unknown file: {error}"),
            }
        }
    }
}
