//! Mounting images and taking them down again.
//!
//! One superblock per image and mode ("attachment"); more mounts of the same image are clones of it. The order of
//! bringing one up is what keeps readers safe: record what the blob files hold, make the data path know the blobs,
//! watch the files, *then* mount (the kernel decides at open whether a file raises events), prove with a read that
//! events come, write the record, show the mount.

pub mod bdi;
pub mod failure;
pub mod kernel;
pub mod modes;
pub mod mountinfo;
pub mod open;
pub mod probe;

mod attach;
mod budget;
mod early;
mod prepared;
mod readahead;
mod recording;
mod release;
mod restore;
mod scrub;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use skimmer_client::{AttachMode, BlobReport, KeeperReport, Mount, MountRequest, StatusReport};
use skimmer_fetcher::http::Pool;
use skimmer_fetcher::reference::Reference;
use tokio::sync::{Mutex, Semaphore};

use crate::blob::{BlobId, BlobSpec};
use crate::driver::Handle;
use crate::follow::Owner;
use crate::frontend::Mode;
use crate::pulls::Pulls;
use crate::store::Store;
use crate::store::journal::{Journal, Notice};
use crate::store::records::{AttachmentRecord, ImageRecord, MountsRecord, Secrets};
use skimmer_config::Config;

pub use budget::CacheUse;
pub use failure::{Failure, Kind};
use modes::Probed;
pub use scrub::Scrub;

/// How often what could not be released at once is tried again, and mounts that were taken down by others are noticed.
const SWEEP: Duration = Duration::from_secs(5);

/// How long a status request believes what an earlier one found out about the attach modes.
const MODES_STAY: Duration = Duration::from_secs(10);

/// The shared domain of all our fscache mounts.
pub const DOMAIN: &str = "skimmer";
/// The volume key that EROFS makes of it.
pub const VOLUME: &str = "erofs,skimmer";

/// What [`Mounts::new`] is given.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// The locked root.
    pub store: Store,
    /// The data path.
    pub driver: Handle,
    /// The record keeper.
    pub journal: Journal,
    /// Where logins lie.
    pub secrets: Secrets,
    /// Logins of pods' pulls.
    pub pulls: Arc<Pulls>,
    /// The keeper: its report, or why there is none.
    pub keeper: Result<KeeperState, String>,
}

/// What the keeper held when the daemon connected to it.
#[derive(Debug, Clone, Default)]
pub struct KeeperState {
    /// Labels of the files it watched: blob ids.
    pub files: Vec<String>,
    /// Whether it held the cachefiles device.
    pub device_held: bool,
}

/// All mounts of this daemon.
pub struct Mounts {
    config: Config,
    store: Store,
    driver: Handle,
    journal: Journal,
    keeper: Result<KeeperState, String>,
    boot: String,
    started: Instant,
    started_at_ms: u64,
    secrets: StdMutex<Secrets>,
    pulls: Arc<Pulls>,
    /// Held through every change, never while an image's source is waited for.
    state: Mutex<State>,
    /// HTTP clients of all images' sources.
    pool: Pool,
    /// Room for start blobs that come ahead of their bootstraps, bytes.
    ahead: Arc<Semaphore>,
    /// One mount at a time of the same image: the second is a clone of the first.
    turns: Turns,
    /// One superblock is made at a time, so that its name among all can be told.
    raising: Mutex<()>,
    /// Held while a mount's proof denies reads of a blob.
    proving: Mutex<()>,
    /// What a status request reads; a copy, so that it never waits.
    view: StdMutex<Vec<AttachmentRecord>>,
    faults: StdMutex<HashMap<BlobId, String>>,
    /// Blobs whose file holds all that mounted images refer to: the data path no longer has a file for them.
    complete: StdMutex<HashSet<BlobId>>,
    /// What status requests say about the attach modes; found out by trying, so not at each request.
    modes: StdMutex<Option<(Instant, Probed)>>,
    cache: CacheUse,
    scrub: Scrub,
}

#[derive(Default)]
struct State {
    attachments: Vec<Attachment>,
    /// Blobs that the data path knows.
    known: HashSet<BlobId>,
    /// Files that the journal has.
    tracked: HashSet<(Mode, BlobId)>,
    /// Blob files that raise events.
    watched: HashSet<BlobId>,
    /// Blobs that a superblock which is gone had needed more of, maybe.
    shrinking: HashSet<BlobId>,
    /// fscache cookies that may be opened.
    cookies: HashSet<String>,
    /// Whether the cachefiles device is ours.
    bound: bool,
    /// No mount is begun or shown any more.
    closing: bool,
    /// An earlier daemon of this boot ended without making durable what it wrote.
    unsynced: bool,
}

/// One superblock.
struct Attachment {
    record: AttachmentRecord,
    image: ImageRecord,
    specs: Vec<BlobSpec>,
    /// Set while it is brought up: the target it is meant for. It is in no record then and cannot be shared, but what it
    /// needs is in use.
    rising: Option<PathBuf>,
    /// What is written down of its use.
    recorder: Option<recording::Recorder>,
    /// Why it is not served, if so. It stays on record, so that the next daemon tries again.
    fault: Option<String>,
}

impl State {
    fn uses(&self, blob: BlobId) -> bool {
        self.attachments.iter().any(|attachment| attachment.has(blob))
    }

    /// How many superblocks use a blob, those that are being brought up included.
    fn users(&self, blob: BlobId) -> usize {
        self.attachments.iter().filter(|attachment| attachment.has(blob)).count()
    }

    /// The superblocks that are up.
    fn records(&self) -> impl Iterator<Item = &AttachmentRecord> {
        self.attachments
            .iter()
            .filter(|attachment| attachment.rising.is_none())
            .map(|attachment| &attachment.record)
    }

    /// The superblocks that are up, as shown to others: with their faults.
    fn shown(&self) -> Vec<AttachmentRecord> {
        let up = self.attachments.iter().filter(|attachment| attachment.rising.is_none());
        let with_fault = |attachment: &Attachment| {
            let mut record = attachment.record.clone();
            for mount in &mut record.mounts {
                mount.fault.clone_from(&attachment.fault);
            }
            record
        };
        up.map(with_fault).collect()
    }

    /// Whether a superblock reads the file that `mode` uses for a blob.
    fn uses_file(&self, mode: Mode, blob: BlobId) -> bool {
        self.attachments.iter().any(|attachment| attachment.file_mode() == mode && attachment.has(blob))
    }
}

impl Attachment {
    fn has(&self, blob: BlobId) -> bool {
        self.specs.iter().any(|spec| spec.id == blob) || self.may_have(blob)
    }

    /// Whether it may refer to chunks of a blob that nobody here knows of: it could not be picked up.
    fn may_have(&self, blob: BlobId) -> bool {
        if self.fault.is_none() || !self.specs.is_empty() {
            return false;
        }
        let id = blob.hex();
        let listed = |mount: &Mount| mount.blobs.is_empty() || mount.blobs.contains(&id);
        self.record.mounts.first().is_none_or(listed)
    }

    fn file_mode(&self) -> Mode {
        on_demand(self.record.mode).unwrap_or(Mode::Fanotify)
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Mounts {
    /// The state of a daemon that has no mounts yet; [`Self::restore`] brings back those of an earlier one.
    pub fn new(parts: Parts) -> Arc<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Arc::new(Self {
            config: parts.config,
            store: parts.store,
            driver: parts.driver,
            journal: parts.journal,
            keeper: parts.keeper,
            boot: boot.trim().to_owned(),
            started: Instant::now(),
            started_at_ms: now_ms(),
            secrets: StdMutex::new(parts.secrets),
            pulls: parts.pulls,
            state: Mutex::default(),
            pool: Pool::default(),
            ahead: Arc::new(Semaphore::new(usize::try_from(open::AHEAD).unwrap_or(usize::MAX))),
            turns: Turns::default(),
            raising: Mutex::default(),
            proving: Mutex::default(),
            view: StdMutex::default(),
            faults: StdMutex::default(),
            complete: StdMutex::default(),
            modes: StdMutex::default(),
            cache: CacheUse::default(),
            scrub: Scrub::default(),
        })
    }

    /// Live mounts, by target.
    pub fn list(&self) -> Vec<Mount> {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let mut mounts: Vec<Mount> = view.iter().flat_map(|attachment| attachment.mounts.clone()).collect();
        mounts.sort_by(|a, b| a.target.cmp(&b.target));
        mounts
    }

    /// The scrub of the cache.
    pub fn scrubbing(&self) -> &Scrub {
        &self.scrub
    }

    /// What the cache takes, and gave back.
    pub fn cache_use(&self) -> &CacheUse {
        &self.cache
    }

    /// Bytes of blobs that came, by what sent them.
    pub fn traffic(&self) -> [(&'static str, u64); 3] {
        self.pool.traffic().bytes()
    }

    /// The mounted and prepared images that have a blob.
    pub fn images_of(&self, blob: BlobId) -> Vec<Owner> {
        let id = blob.hex();
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let mut owners: Vec<Owner> = Vec::new();
        for record in view.iter() {
            let mounts =
                record.mounts.iter().map(|mount| (&mount.image, &mount.blobs, mount.traceparent.clone()));
            let prepared = record.prepared.iter().map(|prepared| (&prepared.image, &prepared.blobs, None));
            for (image, blobs, traceparent) in mounts.chain(prepared) {
                if blobs.contains(&id) && owners.iter().all(|owner| owner.image != *image) {
                    let (image, bootstrap) = (image.clone(), record.bootstrap.clone());
                    owners.push(Owner { image, bootstrap, traceparent });
                }
            }
        }
        owners
    }

    /// The bootstrap of a mounted image, and its blobs.
    ///
    /// # Errors
    /// It is not mounted any more, or cannot be read.
    pub async fn content_of(&self, bootstrap: &str) -> Result<(Vec<u8>, Vec<BlobSpec>), Failure> {
        let specs = {
            let state = self.state.lock().await;
            let found = state.attachments.iter().find(|attachment| attachment.record.bootstrap == bootstrap);
            let found = found.ok_or_else(|| Failure::new(Kind::NotFound, "it is not mounted any more"))?;
            found.specs.clone()
        };
        Ok((self.store.load_bootstrap(bootstrap)?, specs))
    }

    /// The whole state.
    ///
    /// # Errors
    /// When the data path has stopped.
    pub async fn status(&self) -> Result<StatusReport, Failure> {
        let status = self.driver.status().await?;
        let modes = self.recent_modes(status.fscache).await?.reports;
        let complete = self.complete.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let blobs = status.blobs.iter().map(|blob| {
            // A complete file is no longer among those that the data path serves.
            let done = blob.files.is_empty() && complete.contains(&blob.id);
            let report = BlobReport {
                id: blob.id.hex(),
                device_bytes: blob.device_bytes,
                referenced_bytes: blob.referenced_bytes,
                ready_bytes: if done { blob.referenced_bytes } else { 0 },
                fetches: 0,
                pending_reads: 0,
                reads: 0,
                watched: !blob.files.is_empty(),
                fault: faults.get(&blob.id).cloned(),
            };
            blob.files.iter().fold(report, |sum, file| BlobReport {
                ready_bytes: sum.ready_bytes.max(file.ready_bytes),
                pending_reads: sum.pending_reads + file.pending_reads,
                reads: sum.reads + file.reads,
                fetches: sum.fetches + file.flights,
                ..sum
            })
        });
        let blobs: BTreeMap<String, BlobReport> = blobs.map(|blob| (blob.id.clone(), blob)).collect();
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            started_at_ms: self.started_at_ms,
            root: self.config.root.clone(),
            modes,
            keeper: KeeperReport {
                socket: self.config.keeper_socket.clone(),
                connected: status.fanotify,
                inherited_files: self
                    .keeper
                    .as_ref()
                    .map_or(0, |keeper| u64::try_from(keeper.files.len()).unwrap_or(u64::MAX)),
            },
            buffer_bytes: status.budget_bytes,
            buffer_used_bytes: status.in_flight_bytes,
            cache_bytes: self.cache.used_bytes(),
            cache_budget_bytes: self.config.cache.budget_mib << 20,
            mounts: self.list(),
            prepared: self.prepared(),
            blobs: blobs.into_values().collect(),
        })
    }

    /// Mounts an image; returns when the mount can be used.
    ///
    /// # Errors
    /// [`Failure`]; nothing is left behind then.
    pub async fn mount(self: &Arc<Self>, request: MountRequest) -> Result<Mount, Failure> {
        let target = check_target(&request.target)?;
        let opened = self.open(&request).await?;
        let turn = self.turns.of(&opened.image.bootstrap);
        let result = {
            let _turn = turn.lock().await;
            self.attach(&opened, &request, &target).await
        };
        if result.is_ok() {
            self.fill_later(&opened.specs);
        }
        drop(turn);
        self.turns.forget(&opened.image.bootstrap);
        result
    }

    /// What the journal tells.
    pub async fn on_notice(&self, notice: Notice) {
        match notice {
            // Logged where it happened; kept for whoever asks why a read failed.
            Notice::Fault(Some(blob), message) => {
                self.faults.lock().unwrap_or_else(PoisonError::into_inner).insert(blob, message);
            }
            Notice::Fault(None, _) => {}
            Notice::Durable(blob, chunks) => {
                // A data path that has ended told the keeper all it will.
                if let Err(error) = self.driver.durable(blob, chunks).await {
                    tracing::debug!(%blob, "the keeper is not told what is durable: {error}");
                }
            }
            Notice::Lost(mode, blob, kept) => {
                if let Err(error) = self.driver.lost(mode, blob, kept).await {
                    tracing::error!(%blob, "what its file lost is not missed: {error}");
                }
            }
            Notice::Complete(mode, blob) => self.on_complete(mode, blob).await,
            Notice::Over(reply) => drop(reply),
        }
    }

    /// Runs until dropped: releases what could not be released at once, notices mounts that others took down.
    pub async fn sweep_forever(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP).await;
            let mut state = self.state.lock().await;
            self.sweep(&mut state).await;
        }
    }

    async fn recent_modes(&self, bound: bool) -> Result<Probed, Failure> {
        let recent = self.modes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match recent {
            Some((at, probed)) if at.elapsed() < MODES_STAY => Ok(probed),
            _ => self.modes(bound).await,
        }
    }

    async fn modes(&self, bound: bool) -> Result<Probed, Failure> {
        let config = self.config.clone();
        let keeper = self.keeper.as_ref().map(|_| ()).map_err(Clone::clone);
        let probed = tokio::task::spawn_blocking(move || {
            modes::probe(&config, keeper.as_ref().copied().map_err(String::as_str), bound)
        })
        .await?;
        // Room comes back without our knowing: what its want hid is tried again by whoever asks next.
        let stays = (!probed.full).then(|| (Instant::now(), probed.clone()));
        *self.modes.lock().unwrap_or_else(PoisonError::into_inner) = stays;
        Ok(probed)
    }

    fn set_complete(&self, blob: BlobId, complete: bool) {
        let mut blobs = self.complete.lock().unwrap_or_else(PoisonError::into_inner);
        if complete {
            blobs.insert(blob);
        } else {
            blobs.remove(&blob);
        }
    }

    /// Writes `mounts.json` and what status requests see.
    fn save(&self, state: &State, clean: bool) -> Result<(), Failure> {
        self.publish(state);
        let attachments = state.records().cloned().collect();
        Ok(self.store.save_mounts(&MountsRecord { boot: self.boot.clone(), clean, attachments })?)
    }

    fn publish(&self, state: &State) {
        let view = state.shown();
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }

    fn clear_fault(&self, blob: BlobId) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).remove(&blob);
    }

    /// Forgets logins of images that no superblock needs any more.
    fn forget_secrets(&self, state: &State) {
        let sources = state.attachments.iter().flat_map(|attachment| &attachment.image.sources);
        let images: HashSet<&str> = sources.map(|source| source.image.as_str()).collect();
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = secrets.retain(|image| images.contains(image)) {
            tracing::warn!("{error}");
        }
        let used: Vec<Reference> =
            images.iter().filter_map(|image| Reference::parse_source(image).ok()).collect();
        let used = used.iter().filter_map(|image| match image {
            Reference::Registry(name) => Some(name),
            _ => None,
        });
        if let Err(error) = self.pulls.retain(used) {
            tracing::warn!("{error}");
        }
    }
}

/// A lock per image.
#[derive(Default)]
struct Turns(StdMutex<HashMap<String, Arc<Mutex<()>>>>);

impl Turns {
    fn of(&self, image: &str) -> Arc<Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(turns.entry(image.to_owned()).or_default())
    }

    /// Drops the lock of an image when nobody holds or awaits it.
    fn forget(&self, image: &str) {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.get(image).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            turns.remove(image);
        }
    }
}

/// The target as the kernel will name it.
fn check_target(target: &Path) -> Result<PathBuf, Failure> {
    let bad = |kind, why: &str| {
        Failure::new(kind, format!("target {}: {why}", target.display())).remedy("name an existing directory")
    };
    if !target.is_absolute() {
        return Err(bad(Kind::BadRequest, "is not an absolute path"));
    }
    let real = target.canonicalize().map_err(|error| bad(Kind::NotFound, &error.to_string()))?;
    if !real.is_dir() {
        return Err(bad(Kind::BadRequest, "is not a directory"));
    }
    Ok(real)
}

/// The store's and data path's word for a mode that fetches on demand.
fn on_demand(mode: AttachMode) -> Option<Mode> {
    match mode {
        AttachMode::Fscache => Some(Mode::Fscache),
        AttachMode::Fanotify => Some(Mode::Fanotify),
        AttachMode::Auto | AttachMode::Local => None,
    }
}
