//! What containerd asks for, done on the table and on images.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::process::{Gid, Uid};

use crate::error::Kind as ErrorKind;
use crate::filter::Filter;
use crate::images::{ImageName, Images, Pull};
use crate::labels::{self, Labels, Layer};
use crate::snapshot::{Content, Kind, Snapshot};
use crate::table::Table;
use crate::turns::Turns;
use crate::usage::{self, Usage};
use crate::{Containerd, Error, api, mounts};

/// containerd's snapshots, kept in a directory.
pub struct Snapshotter {
    table: Arc<Mutex<Table>>,
    images: Arc<dyn Images>,
    containerd: Containerd,
    /// By the snapshot whose image is being mounted.
    turns: Turns,
}

/// What a snapshot is to be.
pub(crate) struct Wanted {
    pub(crate) kind: Kind,
    pub(crate) namespace: String,
    pub(crate) key: String,
    pub(crate) parent: Option<String>,
    pub(crate) labels: Labels,
    /// The W3C trace context of the request.
    pub(crate) traceparent: Option<String>,
}

impl Snapshotter {
    /// Opens the snapshots under `root` and clears what an unfinished change left.
    ///
    /// # Errors
    /// When the directory cannot be used, or a record in it is damaged.
    pub async fn open(root: &Path, images: Arc<dyn Images>, containerd: Containerd) -> Result<Self, Error> {
        let printable = root.to_str().filter(|root| !root.contains([':', ',', '\\']));
        if printable.is_none() {
            let message =
                format!("{}: a path with `:`, `,` or `\\` cannot be given to overlayfs", root.display());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let (table, leftovers) = Table::open(root)?;
        let mut removed = leftovers.removed;
        for dir in leftovers.unfinished {
            images.umount(Snapshot::image(&dir)).await?;
            removed.push(table.set_aside(&dir)?);
        }
        for dir in removed {
            delete_later(dir);
        }
        let table = Arc::new(Mutex::new(table));
        Ok(Self { table, images, containerd, turns: Turns::default() })
    }

    /// Who mounts images and keeps logins.
    pub(crate) fn images(&self) -> Arc<dyn Images> {
        Arc::clone(&self.images)
    }

    /// Whose snapshots they are.
    pub(crate) fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Makes a snapshot on top of another and says how to mount it. A layer whose data comes when it is read is
    /// committed at once; containerd learns that from [`ErrorKind::AlreadyExists`].
    pub(crate) async fn create(&self, mut wanted: Wanted) -> Result<Vec<api::Mount>, Error> {
        let login = labels::take_login(&mut wanted.labels);
        let chain_id = wanted.labels.get(labels::REF).cloned();
        let pull = Pull { login, traceparent: wanted.traceparent.take(), chain_id };
        if wanted.kind == Kind::Active
            && let Some(name) = wanted.labels.get(labels::REF).cloned()
        {
            let content = match labels::layer(&wanted.labels) {
                Layer::Blob(digest) => Some(Content::Blob { digest }),
                Layer::Bootstrap(Some(name)) => Some(Content::Image { name }),
                // containerd unpacks it; whose it is shows when it is used.
                Layer::Bootstrap(None) | Layer::Archive => None,
            };
            if let Some(content) = content {
                self.turns.take(&name, self.commit_remote(&name, &wanted, content, pull)).await?;
                let message = format!("snapshot {name} is there: its data comes when it is read");
                return Err(Error::new(ErrorKind::AlreadyExists, message));
            }
        }
        let (key, namespace) = (wanted.key.clone(), wanted.namespace.clone());
        self.on_table(move |table| {
            table.check_new(&wanted.key, wanted.parent.as_deref())?;
            let owner = owner(table, wanted.parent.as_deref(), &wanted.labels)?;
            let (id, dir) = table.make(wanted.kind, &Content::Files)?;
            let files = Snapshot::files(&dir);
            let owned = rustix::fs::chown(&files, owner.map(|(user, _)| user), owner.map(|(_, group)| group));
            if let Err(errno) = owned {
                discard(table, &dir);
                return Err(Error::io("cannot give away", &files, &errno.into()));
            }
            let put =
                table.put(record(id, wanted.key, wanted.kind, wanted.parent, Content::Files, wanted.labels));
            put.inspect_err(|_| discard(table, &dir))
        })
        .await?;
        match self.mounts(&namespace, &key).await {
            Ok(mounts) => Ok(mounts),
            Err(error) => {
                // Nobody was told of it.
                let removed = self.on_table(move |table| table.remove(&key)).await;
                match removed {
                    Ok(dir) => delete_later(dir),
                    Err(other) => tracing::warn!("taking back a snapshot that cannot be mounted: {other}"),
                }
                Err(error)
            }
        }
    }

    /// Commits the snapshot of a layer that nobody unpacks; one that is there already is a success.
    async fn commit_remote(
        &self,
        name: &str,
        wanted: &Wanted,
        content: Content,
        pull: Pull,
    ) -> Result<(), Error> {
        let (key, parent) = (name.to_owned(), wanted.parent.clone());
        let planned = content.clone();
        let made = self
            .on_table(move |table| match table.check_new(&key, parent.as_deref()) {
                Err(error) if error.kind == ErrorKind::AlreadyExists => Ok(None),
                other => other.and_then(|()| table.make(Kind::Committed, &planned).map(Some)),
            })
            .await?;
        let Some((id, dir)) = made else { return Ok(()) };
        let mounted = match &content {
            Content::Image { name } => self.images.mount(name, pull, Snapshot::image(&dir)).await,
            Content::Blob { .. } | Content::Files => Ok(()),
        };
        let is_image = matches!(content, Content::Image { .. });
        let (key, parent, labels) = (name.to_owned(), wanted.parent.clone(), wanted.labels.clone());
        let snapshot = record(id, key, Kind::Committed, parent, content, labels);
        let put = match mounted {
            Ok(()) => self.on_table(move |table| table.put(snapshot)).await,
            Err(error) => Err(error),
        };
        if put.is_err() {
            if is_image && let Err(error) = self.images.umount(Snapshot::image(&dir)).await {
                tracing::warn!("{error}");
            }
            self.on_table(move |table| {
                discard(table, &dir);
                Ok(())
            })
            .await?;
        }
        put
    }

    /// How to mount a snapshot; an image that it stands on is mounted first if it is not (after a reboot).
    pub(crate) async fn mounts(&self, namespace: &str, key: &str) -> Result<Vec<api::Mount>, Error> {
        let of = key.to_owned();
        let base = self
            .on_table(move |table| {
                let below = table.chain(&of)?;
                let base = below.into_iter().skip(1).find(|snapshot| needs_image(snapshot));
                Ok(base.map(|snapshot| (snapshot.key.clone(), table.dir(snapshot.id))))
            })
            .await?;
        if let Some((base, dir)) = base {
            self.turns.take(&base, self.raise(namespace, &base, &dir)).await?;
        }
        let key = key.to_owned();
        self.on_table(move |table| mounts::of(table, &key)).await
    }

    /// Mounts the image of a committed snapshot unless it is mounted.
    async fn raise(&self, namespace: &str, key: &str, dir: &Path) -> Result<(), Error> {
        let of = key.to_owned();
        let snapshot = self.on_table(move |table| table.get(&of).cloned()).await?;
        let name = match &snapshot.content {
            Content::Image { name } => name.clone(),
            _ => self.name_of(namespace, &snapshot).await?,
        };
        let target = Snapshot::image(dir);
        if self.images.is_mounted(&target) {
            return Ok(());
        }
        match std::fs::create_dir(&target) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("cannot make", &target, &error));
            }
            _ => {}
        }
        tracing::info!(image = %name.reference, snapshot = key, "mounting for a container");
        let chain_id = snapshot.labels.get(labels::REF).cloned();
        self.images.mount(&name, Pull { chain_id, ..Pull::default() }, target.clone()).await?;
        if snapshot.content == Content::Files {
            let content = Content::Image { name };
            let put = self.on_table(move |table| table.put(Snapshot { content, ..snapshot })).await;
            if put.is_err() {
                self.images.umount(target).await?;
            }
            return put;
        }
        Ok(())
    }

    /// The image whose bootstrap containerd unpacked into a snapshot.
    async fn name_of(&self, namespace: &str, snapshot: &Snapshot) -> Result<ImageName, Error> {
        if let Layer::Bootstrap(Some(name)) = labels::layer(&snapshot.labels) {
            return Ok(name);
        }
        let chain = snapshot.labels.get(labels::REF).ok_or_else(|| {
            let message = format!("snapshot {} has no label {}", snapshot.key, labels::REF);
            Error::new(ErrorKind::FailedPrecondition, message)
        })?;
        self.containerd.image_of(namespace, chain).await
    }

    /// Makes an active snapshot one that others can stand on, under another name.
    pub(crate) async fn commit(&self, name: String, key: String, labels: Labels) -> Result<(), Error> {
        let (of, new) = (key.clone(), name.clone());
        let dir = self
            .on_table(move |table| {
                let snapshot = active(table, &of)?;
                table.check_new(&new, None)?;
                Ok(table.dir(snapshot.id))
            })
            .await?;
        let files = Snapshot::files(&dir);
        let usage = blocking(move || usage::of(&files)).await?;
        self.on_table(move |table| {
            let mut snapshot = active(table, &key)?.clone();
            table.check_new(&name, None)?;
            snapshot.labels.extend(labels);
            let updated = SystemTime::now();
            table.put(Snapshot { key: name, kind: Kind::Committed, usage, updated, ..snapshot })
        })
        .await
    }

    /// Removes a snapshot that nothing stands on; its image is unmounted.
    pub(crate) async fn remove(&self, key: &str) -> Result<(), Error> {
        self.turns
            .take(key, async {
                let of = key.to_owned();
                let image = self
                    .on_table(move |table| {
                        table.check_leaf(&of)?;
                        let snapshot = table.get(&of)?;
                        let is_image = matches!(snapshot.content, Content::Image { .. });
                        Ok(is_image.then(|| Snapshot::image(&table.dir(snapshot.id))))
                    })
                    .await?;
                if let Some(image) = image {
                    self.images.umount(image).await?;
                }
                let of = key.to_owned();
                delete_later(self.on_table(move |table| table.remove(&of)).await?);
                Ok(())
            })
            .await
    }

    /// The containers' snapshots (and views) that stand on images, by name.
    ///
    /// # Errors
    /// When a snapshot that one stands on is missing.
    pub async fn standing_on_images(&self) -> Result<Vec<String>, Error> {
        self.on_table(|table| {
            let mut keys = Vec::new();
            for snapshot in table.all().filter(|snapshot| snapshot.kind != Kind::Committed) {
                if table.chain(&snapshot.key)?.into_iter().any(needs_image) {
                    keys.push(snapshot.key.clone());
                }
            }
            Ok(keys)
        })
        .await
    }

    /// What is recorded of a snapshot.
    pub(crate) async fn stat(&self, key: String) -> Result<Snapshot, Error> {
        self.on_table(move |table| table.get(&key).cloned()).await
    }

    /// Those that pass any of the filters; all, if there is none.
    pub(crate) async fn list(&self, filters: Vec<Filter>) -> Result<Vec<Snapshot>, Error> {
        self.on_table(move |table| {
            let passes = |snapshot: &Snapshot| {
                filters.is_empty() || filters.iter().any(|filter| filter.matches(snapshot))
            };
            Ok(table.all().filter(|snapshot| passes(snapshot)).cloned().collect())
        })
        .await
    }

    /// Changes labels: those that `fields` names, all if it names none.
    pub(crate) async fn update(
        &self,
        key: String,
        labels: Labels,
        fields: Vec<String>,
    ) -> Result<Snapshot, Error> {
        self.on_table(move |table| {
            let mut snapshot = table.get(&key)?.clone();
            if fields.is_empty() {
                snapshot.labels.clone_from(&labels);
            }
            for field in fields {
                match field.strip_prefix("labels") {
                    Some("") => snapshot.labels.clone_from(&labels),
                    Some(name) if name.starts_with('.') => {
                        let name = &name[1..];
                        match labels.get(name) {
                            Some(value) => snapshot.labels.insert(name.to_owned(), value.clone()),
                            None => snapshot.labels.remove(name),
                        };
                    }
                    _ => {
                        let message = format!("field `{field}` of a snapshot cannot be changed");
                        return Err(Error::new(ErrorKind::InvalidArgument, message));
                    }
                }
            }
            snapshot.updated = SystemTime::now();
            table.put(snapshot.clone())?;
            Ok(snapshot)
        })
        .await
    }

    /// What a snapshot takes of the disk without those below it.
    pub(crate) async fn usage(&self, key: String) -> Result<Usage, Error> {
        let (snapshot, dir) = self
            .on_table(move |table| {
                let snapshot = table.get(&key)?.clone();
                let dir = table.dir(snapshot.id);
                Ok((snapshot, dir))
            })
            .await?;
        match snapshot.content {
            Content::Blob { digest: Some(digest) } => {
                Ok(Usage { bytes: self.images.cached_bytes(&digest).await, inodes: 1 })
            }
            // The bootstrap is kept once for all snapshots of an image.
            Content::Blob { digest: None } | Content::Image { .. } => Ok(Usage::default()),
            Content::Files if snapshot.kind == Kind::Committed => Ok(snapshot.usage),
            Content::Files => blocking(move || usage::of(&Snapshot::files(&dir))).await,
        }
    }

    async fn on_table<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Table) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let table = Arc::clone(&self.table);
        blocking(move || work(&mut table.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |error: tokio::task::JoinError| Error::new(ErrorKind::Internal, error.to_string());
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// Whether its files are those of an image that has to be mounted.
fn needs_image(snapshot: &Snapshot) -> bool {
    match snapshot.content {
        Content::Image { .. } => true,
        Content::Files => matches!(labels::layer(&snapshot.labels), Layer::Bootstrap(_)),
        Content::Blob { .. } => false,
    }
}

fn active<'t>(table: &'t Table, key: &str) -> Result<&'t Snapshot, Error> {
    let snapshot = table.get(key)?;
    if snapshot.kind == Kind::Active {
        return Ok(snapshot);
    }
    let message = format!("snapshot {key} is not active: it cannot be committed");
    Err(Error::new(ErrorKind::FailedPrecondition, message))
}

/// Whose the root directory of a new snapshot is: of the root user that its labels map, else of the one below it.
fn owner(table: &Table, parent: Option<&str>, labels: &Labels) -> Result<Option<(Uid, Gid)>, Error> {
    let mapped = |label| labels.get(label).map(|map| labels::mapped_root(map)).transpose();
    if let (Some(user), Some(group)) = (mapped(labels::UIDS)?, mapped(labels::GIDS)?) {
        return Ok(Some((Uid::from_raw(user), Gid::from_raw(group))));
    }
    let Some(parent) = parent else { return Ok(None) };
    let chain = table.chain(parent)?;
    let Some(below) = chain.first() else { return Ok(None) };
    let dir = table.dir(below.id);
    let path = match below.content {
        Content::Files => Snapshot::files(&dir),
        Content::Image { .. } => Snapshot::image(&dir),
        Content::Blob { .. } => return Ok(None),
    };
    let stat = rustix::fs::stat(&path).map_err(|errno| Error::io("cannot look at", &path, &errno.into()))?;
    Ok(Some((Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))))
}

fn record(
    id: u64,
    key: String,
    kind: Kind,
    parent: Option<String>,
    content: Content,
    labels: Labels,
) -> Snapshot {
    let now = SystemTime::now();
    Snapshot { id, key, parent, kind, content, labels, created: now, updated: now, usage: Usage::default() }
}

/// Gives up a directory that has no record.
fn discard(table: &Table, dir: &Path) {
    match table.set_aside(dir) {
        Ok(removed) => delete_later(removed),
        Err(error) => tracing::warn!("{error}"),
    }
}

/// Deletes a directory that is no snapshot any more; what fails is tried again at the next start.
fn delete_later(dir: PathBuf) {
    tokio::task::spawn_blocking(move || {
        if let Err(error) = std::fs::remove_dir_all(&dir) {
            tracing::warn!("cannot delete {}: {error}", dir.display());
        }
    });
}
