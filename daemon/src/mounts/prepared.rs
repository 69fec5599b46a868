//! Images that others mount: made known and watched here, mounted by whoever likes with a plain system call.
//!
//! Over fscache the kernel asks for cookies by name, and those of an image that is not prepared are refused. Files have
//! no such lock: a blob file without its mark reads as zeros. So what is handed out are links in the runtime directory,
//! which go before the marks do and do not outlive a reboot: a mount that comes too late finds nothing.

use std::collections::HashMap;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use skimmer_client::{AttachMode, MountRequest, PrepareRequest, Prepared};

use super::attach::Plan;
use super::open::Opened;
use super::{DOMAIN, Failure, Kind, Mounts, State, mountinfo};
use crate::store::records::AttachmentRecord;

impl Mounts {
    /// Makes an image ready to be mounted by others.
    ///
    /// # Errors
    /// [`Failure`]; nothing is left behind then.
    pub async fn prepare_for_others(self: &Arc<Self>, request: PrepareRequest) -> Result<Prepared, Failure> {
        let PrepareRequest { image, mode, credentials, insecure, ca } = request;
        let request =
            MountRequest { mode, credentials, insecure, ca, ..MountRequest::new(image, PathBuf::new()) };
        let opened = self.open(&request).await?;
        let turn = self.turns.of(&opened.image.bootstrap);
        let result = {
            let _turn = turn.lock().await;
            self.make_ready(&opened, &request).await
        };
        if result.is_ok() {
            self.fill_later(&opened.specs);
        }
        drop(turn);
        self.turns.forget(&opened.image.bootstrap);
        result
    }

    /// Gives up a prepared image, named as it was or by its bootstrap.
    ///
    /// # Errors
    /// [`Failure`]: it is not prepared, or it is mounted.
    pub async fn release_prepared(&self, name: &str) -> Result<Prepared, Failure> {
        let mut state = self.state.lock().await;
        self.sweep(&mut state).await;
        let named = |prepared: &Prepared| prepared.image == name || prepared.bootstrap == name;
        let found = state.records().filter_map(|record| record.prepared.clone()).find(named);
        let prepared = found.ok_or_else(|| {
            Failure::new(Kind::NotFound, format!("{name} is not prepared"))
                .remedy("`skimmer status` lists what is")
        })?;
        if let Some(places) = in_use(&state).await?.get(&prepared.bootstrap) {
            let places: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
            let message = format!("{name} is mounted at {}", places.join(", "));
            return Err(Failure::new(Kind::Conflict, message).remedy("unmount it: it is released then"));
        }
        spend(&mut state, |record| record.bootstrap == prepared.bootstrap);
        self.release(&mut state).await?;
        Ok(prepared)
    }

    /// Prepared images, by name.
    pub fn prepared(&self) -> Vec<Prepared> {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<Prepared> = view.iter().filter_map(|record| record.prepared.clone()).collect();
        all.sort_by(|a, b| a.image.cmp(&b.image));
        all
    }

    async fn make_ready(
        self: &Arc<Self>,
        opened: &Opened,
        request: &MountRequest,
    ) -> Result<Prepared, Failure> {
        let wanted = self.wanted(request.mode);
        let bootstrap = &opened.image.bootstrap;
        // Stands where others have a target; a relative path is nobody's.
        let place = Path::new("prepared").join(bootstrap);
        let mut state = self.state.lock().await;
        self.sweep(&mut state).await;
        if state.closing {
            return Err(Failure::new(Kind::Unavailable, "skimmerd is ending"));
        }
        let mut records = state.records().filter(|record| record.bootstrap == *bootstrap);
        if let Some(prepared) = records.find_map(|record| record.prepared.clone()) {
            if wanted == AttachMode::Auto || wanted == prepared.mode {
                return Ok(prepared);
            }
            let message = format!("{} is prepared for {} already", request.image, prepared.mode);
            return Err(Failure::new(Kind::Conflict, message).remedy("release it first"));
        }
        drop(records);
        self.remember_login(request)?;
        let plan = self.prepare(&mut state, opened, wanted, request, &place).await;
        drop(state);
        let plan = match plan {
            Ok(plan) => self.prove_unseen(opened, &plan).await.map(|()| plan),
            Err(failure) => Err(failure),
        };
        let mut state = self.state.lock().await;
        let rising = state.attachments.iter().position(|a| a.rising.as_deref() == Some(&place));
        let result = match (plan, rising) {
            (Ok(plan), Some(index)) => self.hand_out(&mut state, index, opened, request, plan),
            (Ok(_), None) => Err(Failure::new(Kind::Internal, "the image was lost track of")),
            (Err(failure), _) => Err(failure),
        };
        if result.is_err() {
            self.give_up(&mut state, &place, bootstrap).await?;
        }
        result
    }

    /// Proves that the kernel asks, by a superblock that goes again. Over fscache there can be one only, and none is
    /// needed: what is not there is refused.
    async fn prove_unseen(self: &Arc<Self>, opened: &Opened, plan: &Plan) -> Result<(), Failure> {
        if plan.mode == AttachMode::Fscache {
            return Ok(());
        }
        if !plan.watched.is_empty() {
            let raised = self.raise(opened, plan.mode).await?;
            self.prove(opened, plan, &raised).await?;
        }
        self.prefetch_listed(&opened.early).await
    }

    /// Records a prepared image and says how to mount it.
    fn hand_out(
        &self,
        state: &mut State,
        index: usize,
        opened: &Opened,
        request: &MountRequest,
        plan: Plan,
    ) -> Result<Prepared, Failure> {
        let bootstrap = opened.image.bootstrap.clone();
        let (source, mut options) = if plan.mode == AttachMode::Fscache {
            ("none".to_owned(), vec![format!("fsid={bootstrap}"), format!("domain_id={DOMAIN}")])
        } else {
            self.link_files(opened)?
        };
        options.insert(0, "ro".to_owned());
        let described = self.describe(opened, request, Path::new(""), plan.mode, plan.reason);
        let prepared = Prepared {
            image: described.image,
            manifest: described.manifest,
            mode: described.mode,
            reason: described.reason,
            bootstrap: bootstrap.clone(),
            blobs: described.blobs,
            fstype: "erofs".to_owned(),
            source,
            options,
            mounted: false,
            prepared_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        };
        let attachment = &mut state.attachments[index];
        let rising = attachment.rising.take();
        attachment.record = AttachmentRecord {
            bootstrap,
            mode: prepared.mode,
            device: String::new(),
            bdi: None,
            mounts: Vec::new(),
            prepared: Some(prepared.clone()),
        };
        if let Err(failure) = self.save(state, false) {
            let attachment = &mut state.attachments[index];
            attachment.rising = rising;
            attachment.record.prepared = None;
            self.unlink_files(&prepared.bootstrap)?;
            return Err(failure);
        }
        Ok(prepared)
    }

    /// Makes the links that others mount by: the source, and an option for each blob.
    fn link_files(&self, opened: &Opened) -> Result<(String, Vec<String>), Failure> {
        let bootstrap = &opened.image.bootstrap;
        self.unlink_files(bootstrap)?;
        let dir = self.links(bootstrap);
        let make = || -> std::io::Result<(PathBuf, Vec<PathBuf>)> {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let source = dir.join("image");
            symlink(self.store.bootstrap_path(bootstrap), &source)?;
            let link = |(number, spec): (usize, &crate::blob::BlobSpec)| {
                let path = dir.join(number.to_string());
                symlink(self.store.blob_path(spec.id), &path).map(|()| path)
            };
            let devices = opened.specs.iter().enumerate().map(link).collect::<Result<_, _>>()?;
            Ok((source, devices))
        };
        let made = make().map_err(|error| cannot("make links in", &dir, &error));
        let (source, devices) = match made {
            Ok(made) => made,
            Err(failure) => {
                self.unlink_files(bootstrap)?;
                return Err(failure);
            }
        };
        let text = |path: PathBuf| {
            let text = path.to_str().filter(|text| !text.contains(','));
            let bad = || Failure::new(Kind::Internal, format!("{} cannot be a mount option", path.display()));
            text.map(str::to_owned).ok_or_else(bad)
        };
        let devices = devices.into_iter().map(|path| Ok(format!("device={}", text(path)?)));
        Ok((text(source)?, devices.collect::<Result<_, Failure>>()?))
    }

    pub(super) fn unlink_files(&self, bootstrap: &str) -> Result<(), Failure> {
        let dir = self.links(bootstrap);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(cannot("remove the links in", &dir, &error))
            }
            _ => Ok(()),
        }
    }

    /// Where an image's links are: in memory, so that they go with the marks.
    fn links(&self, bootstrap: &str) -> PathBuf {
        let runtime = self.config.socket.parent().unwrap_or(Path::new("/run/skimmer"));
        runtime.join("prepared").join(bootstrap)
    }

    /// Notes which prepared images are mounted, and drops the links of those that are so no more. They are released
    /// then like a superblock that is gone. Whether something changed, which is to be saved.
    pub(super) async fn look_after_prepared(&self, state: &mut State) -> Result<bool, Failure> {
        if state.records().all(|record| record.prepared.is_none()) {
            return Ok(false);
        }
        let used = in_use(state).await?;
        let mut changed = false;
        for attachment in &mut state.attachments {
            let Some(prepared) = &mut attachment.record.prepared else { continue };
            if used.contains_key(&prepared.bootstrap) {
                changed |= !prepared.mounted;
                prepared.mounted = true;
            } else if prepared.mounted {
                self.unlink_files(&prepared.bootstrap)?;
                tracing::info!(image = %prepared.image, "nobody mounts it any more: released");
                attachment.record.prepared = None;
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// Has these prepared images released as soon as nobody mounts them, also when nobody ever did.
pub(super) fn spend(state: &mut State, which: impl Fn(&AttachmentRecord) -> bool) {
    for attachment in state.attachments.iter_mut().filter(|attachment| which(&attachment.record)) {
        if let Some(prepared) = &mut attachment.record.prepared {
            prepared.mounted = true;
        }
    }
}

/// Where prepared images are mounted, by bootstrap, in any mount namespace.
pub(super) async fn in_use(state: &State) -> Result<HashMap<String, Vec<PathBuf>>, Failure> {
    let prepared: Vec<Prepared> = state.records().filter_map(|record| record.prepared.clone()).collect();
    let look = move || {
        let mut used: HashMap<String, Vec<PathBuf>> = HashMap::new();
        for entry in mountinfo::erofs_mounts_anywhere()? {
            let is_of = |prepared: &&Prepared| match prepared.mode {
                AttachMode::Fscache => entry.has_option("fsid", &prepared.bootstrap),
                _ => entry.source == Path::new(&prepared.source),
            };
            if let Some(prepared) = prepared.iter().find(is_of) {
                used.entry(prepared.bootstrap.clone()).or_default().push(entry.target);
            }
        }
        Ok(used)
    };
    let failed = |error: std::io::Error| {
        Failure::new(Kind::Internal, format!("cannot tell what is mounted: /proc: {error}"))
    };
    tokio::task::spawn_blocking(look).await?.map_err(failed)
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Kind::Internal, format!("cannot {what} {}: {error}", path.display()))
}
