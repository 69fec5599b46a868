//! Bringing one image up.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use erofs_format::Image;
use skimmer_client::{AttachMode, Mount, MountRequest, Record};

use super::failure::MAKE_ROOM;
use super::kernel::{Detached, Source};
use super::modes::Probed;
use super::open::Opened;
use super::recording::recorded_mode;
use super::{Attachment, DOMAIN, Failure, Kind, Mounts, State, VOLUME, bdi, modes, on_demand, probe};
use crate::blob::{BlobSpec, ReadyBits};
use crate::frontend::{CookieRole, FscacheSetup, Mode};
use crate::store::blobs::Claim;
use crate::store::records::AttachmentRecord;

/// How long the reason of a failed probe read may take to arrive.
const FAULT_GRACE: Duration = Duration::from_millis(50);

/// A superblock that nobody sees yet.
pub(super) struct Raised {
    mount: Arc<Detached>,
    device: String,
    bdi: Option<String>,
}

/// How a mount is going to be made.
pub(super) struct Plan {
    pub(super) mode: AttachMode,
    pub(super) reason: String,
    /// The watched blobs, and what of them is ready: what has to be proved.
    pub(super) watched: Vec<(BlobSpec, ReadyBits)>,
    /// Whether what the image lists is fetched early.
    prefetch: bool,
}

impl Mounts {
    /// Mounts an opened image on `target`. The caller holds the image's turn.
    pub(super) async fn attach(
        self: &Arc<Self>,
        opened: &Opened,
        request: &MountRequest,
        target: &Path,
    ) -> Result<Mount, Failure> {
        let wanted = self.wanted(request.mode);
        let mut state = self.state.lock().await;
        self.sweep(&mut state).await;
        check_free(&state, target)?;
        self.remember_login(request)?;
        if let Some(index) = shareable(&state, &opened.image.bootstrap, wanted) {
            if request.record.is_some() {
                let message =
                    format!("{} is mounted already: a recording begins with the first mount", request.image);
                return Err(Failure::new(Kind::Conflict, message).remedy("unmount it first"));
            }
            let record = state.attachments[index].record.clone();
            if let Some(source) = visible(&record).await? {
                return self.attach_clone(&mut state, index, source, opened, request, target).await;
            }
            let covered = format!("something else is mounted over every mount of {}", request.image);
            // The kernel allows one fscache superblock per image; over files there may be more.
            if record.mode == AttachMode::Fscache {
                return Err(Failure::new(Kind::Conflict, format!("{covered}, so there is none to share"))
                    .remedy("unmount what covers it first"));
            }
            tracing::info!("{covered}: it gets a superblock more");
        }
        let plan = self.prepare(&mut state, opened, wanted, request, target).await;
        drop(state);
        let raised = match plan {
            Ok(plan) => self.raise_and_prove(opened, &plan).await.map(|raised| (plan, raised)),
            Err(failure) => Err(failure),
        };
        let mut state = self.state.lock().await;
        let rising = state.attachments.iter().position(|a| a.rising.as_deref() == Some(target));
        let result = match (raised, rising) {
            (Ok((plan, raised)), Some(index)) => {
                let mount = self.describe(opened, request, target, plan.mode, plan.reason);
                self.show_first(&mut state, index, raised, mount).await
            }
            (Ok(_), None) => Err(Failure::new(Kind::Internal, "the mount was lost track of")),
            (Err(failure), _) => Err(failure),
        };
        if result.is_err() {
            self.give_up(&mut state, target, &opened.image.bootstrap).await?;
        }
        result
    }

    /// The mode that a request means.
    pub(super) fn wanted(&self, mode: AttachMode) -> AttachMode {
        if mode == AttachMode::Auto { self.config.mount.mode } else { mode }
    }

    /// Keeps the login that came with a request.
    pub(super) fn remember_login(&self, request: &MountRequest) -> Result<(), Failure> {
        let Some(login) = &request.credentials else { return Ok(()) };
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(secrets.put(&request.image, login.clone())?)
    }

    /// Lets go of an attachment that did not come up.
    pub(super) async fn give_up(
        &self,
        state: &mut State,
        target: &Path,
        bootstrap: &str,
    ) -> Result<(), Failure> {
        for attachment in state.attachments.iter().filter(|a| a.rising.as_deref() == Some(target)) {
            self.end_recording(attachment).await;
        }
        state.attachments.retain(|a| a.rising.as_deref() != Some(target));
        self.release_unused(state).await;
        self.forget_secrets(state);
        if !state.attachments.iter().any(|a| a.record.bootstrap == bootstrap) {
            self.store.remove_image(bootstrap)?;
        }
        Ok(())
    }

    /// Everything up to the mount itself. What it takes into use is marked as used by an attachment that is rising.
    pub(super) async fn prepare(
        &self,
        state: &mut State,
        opened: &Opened,
        wanted: AttachMode,
        request: &MountRequest,
        target: &Path,
    ) -> Result<Plan, Failure> {
        let Probed { reports, full } = self.recent_modes(state.bound).await?;
        let mode = modes::choose(wanted, &reports).map_err(|why| {
            let remedy = if full { MAKE_ROOM } else { "`skimmer doctor` explains what each mode needs" };
            Failure::new(Kind::Unavailable, why).remedy(remedy)
        })?;
        let why = modes::reason(wanted, mode, &reports);
        let is_same = |record: &AttachmentRecord| {
            record.mode == AttachMode::Fscache && record.bootstrap == opened.image.bootstrap
        };
        if mode == AttachMode::Fscache && state.records().any(is_same) {
            let message = format!(
                "{} is in use already, prepared or detached: over fscache the kernel mounts an image once",
                request.image
            );
            return Err(Failure::new(Kind::Conflict, message)
                .remedy("release it first (`skimmer release`), or bind-mount what is mounted"));
        }
        for spec in &opened.specs {
            self.clear_fault(spec.id);
            self.claim(state, spec)?;
        }
        let bootstrap = self.store.put_bootstrap(&opened.bootstrap)?;
        self.save_image(opened)?;
        state.attachments.push(Attachment {
            record: AttachmentRecord {
                bootstrap,
                mode,
                device: String::new(),
                bdi: None,
                mounts: Vec::new(),
                prepared: None,
            },
            image: opened.image.clone(),
            specs: opened.specs.clone(),
            rising: Some(target.into()),
            recorder: None,
            fault: None,
        });
        let mut plan = match mode {
            AttachMode::Fscache => {
                self.prepare_fscache(state, opened).await?;
                Plan { mode, reason: why, watched: Vec::new(), prefetch: false }
            }
            _ => self.prepare_files(state, opened, mode, why).await?,
        };
        self.begin_recording(state, opened, request, recorded_mode(mode)).await?;
        plan.prefetch = request.record != Some(Record::Exact);
        Ok(plan)
    }

    async fn raise_and_prove(self: &Arc<Self>, opened: &Opened, plan: &Plan) -> Result<Raised, Failure> {
        let raised = self.raise(opened, plan.mode).await?;
        if !plan.watched.is_empty() {
            self.prove(opened, plan, &raised).await?;
        }
        if plan.prefetch {
            // Not before: fscache files are known since the kernel opened them, and what is there proves no mark.
            self.prefetch_listed(&opened.early).await?;
        }
        if let Some(name) = &raised.bdi {
            if plan.mode != AttachMode::Fscache && plan.watched.is_empty() {
                self.set_read_ahead(name, self.config.mount.read_ahead_kib);
            } else if !plan.prefetch {
                self.set_read_ahead(name, self.config.mount.start_read_ahead_kib);
            } else if opened.early.start {
                self.set_read_ahead(name, self.config.mount.start_read_ahead_kib);
                self.end_start_later(name);
            } else {
                self.set_read_ahead(name, self.config.mount.cold_read_ahead_kib);
            }
        }
        Ok(raised)
    }

    /// Shows a superblock that has come up. Recorded first: a reader must never meet a mount that a restarted daemon
    /// would not know.
    async fn show_first(
        &self,
        state: &mut State,
        index: usize,
        raised: Raised,
        mount: Mount,
    ) -> Result<Mount, Failure> {
        if state.closing {
            return Err(Failure::new(Kind::Unavailable, "skimmerd is ending"));
        }
        let attachment = &mut state.attachments[index];
        let rising = attachment.rising.take();
        attachment.record = AttachmentRecord {
            bootstrap: mount.bootstrap.clone(),
            mode: mount.mode,
            device: raised.device,
            bdi: raised.bdi,
            mounts: vec![mount.clone()],
            prepared: None,
        };
        let shown = match self.save(state, false) {
            Ok(()) => show(raised.mount, &mount.target).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = shown {
            state.attachments[index].rising = rising;
            state.attachments[index].record.mounts.clear();
            self.save(state, false)?;
            return Err(failure);
        }
        Ok(mount)
    }

    /// A further mount of an image that is mounted.
    async fn attach_clone(
        &self,
        state: &mut State,
        index: usize,
        (clone, from): (Detached, PathBuf),
        opened: &Opened,
        request: &MountRequest,
        target: &Path,
    ) -> Result<Mount, Failure> {
        let mode = state.attachments[index].record.mode;
        let reason = format!("shares the mount of the same image on {}", from.display());
        // The name in this request may be another source of the same blobs.
        for spec in &opened.specs {
            self.driver.add_blob(spec.clone(), ReadyBits::new(), vec![Arc::clone(&opened.source)]).await?;
        }
        let mount = self.describe(opened, request, target, mode, reason);
        let attachment = &mut state.attachments[index];
        for source in &opened.image.sources {
            if !attachment.image.sources.contains(source) {
                attachment.image.sources.push(source.clone());
            }
        }
        self.store.save_image(&attachment.image)?;
        attachment.record.mounts.push(mount.clone());
        let shown = match self.save(state, false) {
            Ok(()) => show(Arc::new(clone), target).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = shown {
            state.attachments[index].record.mounts.pop();
            self.save(state, false)?;
            return Err(failure);
        }
        Ok(mount)
    }

    /// fanotify and local: blob files, their records, their watches.
    async fn prepare_files(
        &self,
        state: &mut State,
        opened: &Opened,
        wanted: AttachMode,
        why: String,
    ) -> Result<Plan, Failure> {
        let mut missing = 0_u64;
        let mut watched = Vec::new();
        for spec in &opened.specs {
            let ready = self.add_file_blob(state, spec, vec![Arc::clone(&opened.source)]).await?;
            missing += spec.referenced_bytes() - spec.ready_bytes(&ready);
            if spec.is_complete(&ready) || wanted == AttachMode::Local {
                continue;
            }
            // Opened before the mark; a writer opened later would wait for its own answer.
            let writer = self.store.open_blob(spec.id, spec.device_bytes)?;
            self.driver.watch(spec.id, writer.into()).await?;
            state.watched.insert(spec.id);
            watched.push((spec.clone(), ready));
        }
        match (wanted, missing) {
            (_, 0) => {
                let reason = "every chunk is in the cache: no event is needed".into();
                Ok(Plan { mode: AttachMode::Local, reason, watched, prefetch: false })
            }
            (AttachMode::Local, _) => {
                let message = format!("attach mode local: {missing} bytes of the image are not in the cache");
                Err(Failure::new(Kind::Conflict, message).remedy("mount it with mode auto"))
            }
            _ => Ok(Plan { mode: AttachMode::Fanotify, reason: why, watched, prefetch: false }),
        }
    }

    /// Makes the data path know a blob and what its sparse file holds.
    pub(super) async fn add_file_blob(
        &self,
        state: &mut State,
        spec: &BlobSpec,
        sources: Vec<Arc<dyn skimmer_fetcher::source::Source>>,
    ) -> Result<ReadyBits, Failure> {
        let key = (Mode::Fanotify, spec.id);
        if !state.tracked.contains(&key) {
            let data = self.store.open_blob(spec.id, spec.device_bytes)?;
            let tracked = self.store.open_record(Mode::Fanotify, spec.id, data)?;
            self.journal.track(Mode::Fanotify, tracked).await;
            state.tracked.insert(key);
        }
        let ready = self.journal.recorded(Mode::Fanotify, spec.id).await.unwrap_or_default();
        self.driver.add_blob(spec.clone(), ready.clone(), sources).await?;
        state.known.insert(spec.id);
        self.set_complete(spec.id, spec.is_complete(&ready));
        Ok(ready)
    }

    /// fscache: cache files in place before the mount, cookies that may be opened.
    async fn prepare_fscache(&self, state: &mut State, opened: &Opened) -> Result<(), Failure> {
        let name = &opened.image.bootstrap;
        if !state.bound {
            let setup = FscacheSetup {
                dir: self.store.fscache_dir(),
                tag: self.config.fscache.tag.clone(),
                device: None,
            };
            self.driver.bind_fscache(setup).await?;
            state.bound = true;
        }
        self.store.prefill_bootstrap(name, &opened.bootstrap)?;
        self.expect_bootstrap(state, name, opened.bootstrap.len()).await?;
        for spec in &opened.specs {
            self.add_cached_blob(state, spec, vec![Arc::clone(&opened.source)]).await?;
        }
        Ok(())
    }

    /// Lets the kernel open a bootstrap.
    pub(super) async fn expect_bootstrap(
        &self,
        state: &mut State,
        name: &str,
        length: usize,
    ) -> Result<(), Failure> {
        let size = u64::try_from(length).unwrap_or(u64::MAX);
        let role = CookieRole::Bootstrap { size, path: self.store.bootstrap_path(name) };
        self.driver.expect_cookie(VOLUME, name, role).await?;
        state.cookies.insert(name.to_owned());
        Ok(())
    }

    /// Makes the data path know a blob and its cache file, which is made when it is not there.
    pub(super) async fn add_cached_blob(
        &self,
        state: &mut State,
        spec: &BlobSpec,
        sources: Vec<Arc<dyn skimmer_fetcher::source::Source>>,
    ) -> Result<(), Failure> {
        let key = (Mode::Fscache, spec.id);
        if !state.tracked.contains(&key) {
            let data = self.store.precreate_cache_file(&spec.id.hex(), spec.device_bytes)?;
            let tracked = self.store.open_record(Mode::Fscache, spec.id, data)?;
            self.journal.track(Mode::Fscache, tracked).await;
            state.tracked.insert(key);
        }
        // What the sparse file of fanotify mounts holds stays known to the data path, if it was.
        let ready = self.journal.recorded(Mode::Fanotify, spec.id).await.unwrap_or_default();
        self.driver.add_blob(spec.clone(), ready, sources).await?;
        state.known.insert(spec.id);
        self.driver.expect_cookie(VOLUME, spec.id.hex(), CookieRole::Blob(spec.id)).await?;
        state.cookies.insert(spec.id.hex());
        Ok(())
    }

    /// Makes sure that what the blob's files hold may be used for this image.
    fn claim(&self, state: &State, spec: &BlobSpec) -> Result<(), Failure> {
        let Claim::Conflicts(how) = self.store.claim(spec)? else { return Ok(()) };
        if state.uses(spec.id) || state.known.contains(&spec.id) {
            let message = format!("the image contradicts a mounted image about a blob that both use: {how}");
            return Err(Failure::new(Kind::Conflict, message)
                .remedy("one of the two was tampered with: verify both with `skimmer check`"));
        }
        tracing::warn!(blob = %spec.id, "{how}: what an earlier image put into the cache is dropped");
        self.store.reset_blob(spec.id)?;
        match self.store.claim(spec)? {
            Claim::Agrees => Ok(()),
            Claim::Conflicts(how) => Err(Failure::new(Kind::Internal, how)),
        }
    }

    /// The mount system calls, on a thread of their own: an fscache mount waits for the data path.
    pub(super) async fn raise(&self, opened: &Opened, mode: AttachMode) -> Result<Raised, Failure> {
        let name = &opened.image.bootstrap;
        let source = if on_demand(mode) == Some(Mode::Fscache) {
            Source::Fscache { fsid: name.clone(), domain: DOMAIN.to_owned() }
        } else {
            let devices = opened.specs.iter().map(|spec| self.store.blob_path(spec.id)).collect();
            Source::Files { bootstrap: self.store.bootstrap_path(name), devices }
        };
        let _alone = self.raising.lock().await;
        tokio::task::spawn_blocking(move || {
            let before = bdi::list();
            let mount = Detached::mount(&source)?;
            let bdi = bdi::added(before.as_ref(), bdi::list().as_ref());
            let device = mount.device()?;
            Ok(Raised { mount: Arc::new(mount), device, bdi })
        })
        .await?
    }

    /// Reads through the new mount what is not cached yet, one chunk per watched blob, all at once.
    pub(super) async fn prove(&self, opened: &Opened, plan: &Plan, raised: &Raised) -> Result<(), Failure> {
        let watched: Vec<_> = plan.watched.iter().map(|(spec, ready)| (spec, ready)).collect();
        let damaged = |error: erofs_format::FormatError| Failure::new(Kind::BadImage, error.to_string());
        let image = Image::parse(&opened.bootstrap).map_err(damaged)?;
        let probes = probe::choose(&image, &watched).map_err(damaged)?;
        let limit = self.config.mount.probe_timeout();
        let mut reads = tokio::task::JoinSet::new();
        // Reads of another mount's proof must not meet denials of this one's.
        let denying = self.proving.lock().await;
        let mut denied = Vec::new();
        for probe in probes {
            let mount = Arc::clone(&raised.mount);
            // Where nobody else reads the blob its data need not come: that the kernel asks is the proof.
            let shared = self.state.lock().await.users(probe.blob) > 1;
            if shared {
                reads.spawn(async move {
                    tokio::task::spawn_blocking(move || probe::read(&mount, &probe))
                        .await
                        .map_err(|e| e.to_string())?
                });
            } else {
                let blob = probe.blob;
                let mut seen = self.driver.prove(blob, probe.device()).await?;
                denied.push(blob);
                reads.spawn(async move {
                    let read = tokio::task::spawn_blocking(move || probe::read(&mount, &probe)).await;
                    let outcome = read.map_err(|error| error.to_string())?;
                    // The denial came before the read's end.
                    match (seen.try_recv(), outcome) {
                        // Filled meanwhile for an earlier mount: compared with its digest, where a lost mark shows zeros.
                        (Ok(()), _) | (Err(_), Ok(())) => Ok(()),
                        (Err(_), Err(why)) => Err(why),
                    }
                });
            }
        }
        let denying = (!denied.is_empty()).then_some(denying);
        let all = async {
            while let Some(read) = reads.join_next().await {
                read.map_err(|error| error.to_string())??;
            }
            Ok(())
        };
        let result = tokio::time::timeout(limit, all).await.unwrap_or_else(|_| {
            Err(format!("a read through the new mount got no answer within {} s", limit.as_secs()))
        });
        for blob in denied {
            self.driver.end_proof(blob).await?;
        }
        drop(denying);
        match result {
            Ok(()) => Ok(()),
            Err(why) => {
                // The data path's own words come by another way, right behind the failed read.
                tokio::time::sleep(FAULT_GRACE).await;
                Err(self.unproven(why, opened))
            }
        }
    }

    fn unproven(&self, why: String, opened: &Opened) -> Failure {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let fault = opened.specs.iter().find_map(|spec| faults.get(&spec.id));
        let message = match fault {
            Some(fault) => format!("{why}: {fault}"),
            None => why,
        };
        Failure::new(Kind::Source, message)
            .remedy("nothing was mounted; check that the image's source can be reached, then try again")
    }

    pub(super) fn describe(
        &self,
        opened: &Opened,
        request: &MountRequest,
        target: &Path,
        mode: AttachMode,
        reason: String,
    ) -> Mount {
        let manifest = opened.image.sources.first().map(|source| source.manifest.clone());
        Mount {
            target: target.into(),
            image: request.image.clone(),
            manifest: manifest.unwrap_or_default(),
            mode,
            reason,
            bootstrap: opened.image.bootstrap.clone(),
            blobs: opened.specs.iter().map(|spec| spec.id.hex()).collect(),
            fault: None,
            traceparent: request.traceparent.clone(),
            mounted_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        }
    }

    /// Writes the image's record, keeping the sources of an earlier one.
    fn save_image(&self, opened: &Opened) -> Result<(), Failure> {
        let mut image = opened.image.clone();
        if let Ok(Some(earlier)) = self.store.load_image(&image.bootstrap) {
            for source in earlier.sources {
                if !image.sources.contains(&source) {
                    image.sources.push(source);
                }
            }
        }
        Ok(self.store.save_image(&image)?)
    }
}

/// A clone of one of the superblock's mounts, and of which: the first on which nothing else is mounted.
async fn visible(record: &AttachmentRecord) -> Result<Option<(Detached, PathBuf)>, Failure> {
    let (device, mounts) = (record.device.clone(), record.mounts.clone());
    let find = move || {
        mounts.into_iter().find_map(|mount| {
            let clone = Detached::clone_of(&mount.target)
                .inspect_err(|error| tracing::warn!("not shared: {error}"))
                .ok()?;
            (clone.device().ok()? == device).then_some((clone, mount.target))
        })
    };
    Ok(tokio::task::spawn_blocking(find).await?)
}

/// The attachment that a mount of this image in this mode can share.
fn shareable(state: &State, bootstrap: &str, wanted: AttachMode) -> Option<usize> {
    state.attachments.iter().position(|attachment| {
        let record = &attachment.record;
        let fits = wanted == AttachMode::Auto
            || wanted == record.mode
            || (wanted == AttachMode::Fanotify && record.mode == AttachMode::Local);
        let served = attachment.rising.is_none() && attachment.fault.is_none();
        record.bootstrap == bootstrap && fits && served && !record.mounts.is_empty()
    })
}

/// Refuses a target that is one of ours already, or is about to be.
fn check_free(state: &State, target: &Path) -> Result<(), Failure> {
    if state.closing {
        return Err(Failure::new(Kind::Unavailable, "skimmerd is ending"));
    }
    let mounted = state.records().flat_map(|record| &record.mounts).find(|mount| mount.target == target);
    let what = match mounted {
        Some(mount) => format!("{} is already mounted", mount.image),
        None if state.attachments.iter().any(|a| a.rising.as_deref() == Some(target)) => {
            "another image is just being mounted".into()
        }
        None => return Ok(()),
    };
    Err(Failure::new(Kind::Conflict, format!("{what} on {}", target.display()))
        .remedy("unmount it first, or choose another directory"))
}

/// Moves a mount to its target.
async fn show(mount: Arc<Detached>, target: &Path) -> Result<(), Failure> {
    let target = target.to_owned();
    Ok(tokio::task::spawn_blocking(move || mount.attach(&target)).await??)
}
