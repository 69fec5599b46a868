//! EROFS over fscache: requests on `/dev/cachefiles`, data into cache files through the objects' anonymous descriptors.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use skimmer_cachefiles::{BindOptions, Device, DeviceError, Object, ObjectId, OpenToken, ReadToken, Request};

use super::{CookieRole, FscacheSetup};
use crate::blob::{BLOCK, BlobId, BlobSpec, ReadyBits};
use crate::ring::{Ring, WriteFile};

/// A missing bootstrap range is copied in pieces of this size.
const COPY: usize = 1 << 20;

/// A cache file's name: volume key and cookie key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct CookieKey {
    pub(crate) volume: String,
    pub(crate) cookie: String,
}

/// What the kernel asked.
pub(crate) enum Heard {
    /// An object was opened and accepted. `first` when no other open object is the same file.
    Opened { key: CookieKey, blob: Option<BlobId>, first: bool },
    /// An object was refused.
    Rejected { message: String },
    /// An object was closed. `last` when no open object is that file any more.
    Closed { key: CookieKey, last: bool },
    /// A range of a blob is missing.
    Read { key: CookieKey, token: ReadToken },
    /// A range of a bootstrap is missing; it is being filled.
    BootstrapRead { len: u64 },
    /// That read again; it is being filled already.
    Repeated,
    /// A READ under an object that is not open here. The kernel asks again after [`Fscache::restore`], once it has
    /// opened the object anew.
    Lost { msg_id: u32, message: String },
    /// A request that made no sense, or an answer that did not arrive.
    Bad { message: String },
}

struct Open {
    key: CookieKey,
    role: CookieRole,
    object: Arc<Object>,
    file: WriteFile,
}

/// The bound device and the objects that are open.
pub(crate) struct Fscache {
    device: Device,
    /// The same device, for the ring to poll.
    poll: Arc<OwnedFd>,
    runtime: tokio::runtime::Handle,
    objects: HashMap<ObjectId, Open>,
    files: HashMap<CookieKey, Vec<ObjectId>>,
    /// READs of bootstraps that are being filled, by message.
    filling: Arc<Mutex<HashSet<u32>>>,
}

fn lock(filling: &Mutex<HashSet<u32>>) -> MutexGuard<'_, HashSet<u32>> {
    // A set of numbers has no state that a panic elsewhere could have left half done.
    filling.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fscache {
    /// Binds the device; one that is bound already delivers its unanswered requests again.
    pub(crate) fn bind(
        setup: &FscacheSetup,
        device: Device,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self, DeviceError> {
        let options = BindOptions { tag: setup.tag.clone(), ..BindOptions::new(&setup.dir) };
        let taken_over = device.restore_or_bind(&options)?;
        tracing::info!(dir = %setup.dir.display(), taken_over, "cachefiles is bound");
        let poll = device.as_fd().try_clone_to_owned().map_err(DeviceError::Read)?;
        Ok(Self {
            device,
            poll: Arc::new(poll),
            runtime,
            objects: HashMap::new(),
            files: HashMap::new(),
            filling: Arc::default(),
        })
    }

    /// Has the kernel deliver every unanswered request again, those that are being served included.
    pub(crate) fn restore(&self) -> Result<(), DeviceError> {
        self.device.restore()
    }

    /// What the ring polls.
    pub(crate) fn device(&self) -> &Arc<OwnedFd> {
        &self.poll
    }

    /// Where the cache file is written: any open object of it will do.
    pub(crate) fn writer(&self, key: &CookieKey) -> Option<&WriteFile> {
        let id = self.files.get(key)?.last()?;
        self.objects.get(id).map(|open| &open.file)
    }

    /// The next request; `None` when nothing waits. `lookup` gives the role and size of a cookie, or why it is refused.
    ///
    /// An error means that reading the device failed.
    pub(crate) fn next(
        &mut self,
        ring: &mut Ring,
        lookup: impl Fn(&CookieKey) -> Result<(CookieRole, u64), String>,
    ) -> Result<Option<Heard>, DeviceError> {
        match self.device.next_request() {
            Ok(None) => Ok(None),
            Ok(Some(Request::Open(token))) => Ok(Some(self.open(ring, token, lookup))),
            Ok(Some(Request::Read(token))) => Ok(Some(self.read(token))),
            Ok(Some(Request::Close { object })) => Ok(Some(self.close(object))),
            Err(error @ DeviceError::Read(_)) => Err(error),
            Err(error @ DeviceError::UnknownObject { msg_id, .. }) => {
                Ok(Some(Heard::Lost { msg_id, message: error.to_string() }))
            }
            Err(error) => Ok(Some(Heard::Bad { message: error.to_string() })),
        }
    }

    /// The mounter waits unkillably: everything here is quick.
    fn open(
        &mut self,
        ring: &mut Ring,
        token: OpenToken,
        lookup: impl Fn(&CookieKey) -> Result<(CookieRole, u64), String>,
    ) -> Heard {
        let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
        let key = CookieKey { volume: text(token.volume_key()), cookie: text(token.cookie_key()) };
        let (role, size) = match lookup(&key) {
            Ok(found) => found,
            Err(why) => {
                let CookieKey { volume, cookie } = &key;
                let mut message = format!("fscache cookie {cookie:?} of volume {volume:?} is refused: {why}");
                if let Err(error) = token.reject(Errno::NOENT) {
                    message = format!("{message}; {error}");
                }
                return Heard::Rejected { message };
            }
        };
        let object = match token.accept(size) {
            Ok(object) => Arc::new(object),
            Err(error) => return Heard::Bad { message: error.to_string() },
        };
        let blob = match &role {
            CookieRole::Blob(blob) => Some(*blob),
            CookieRole::Bootstrap { .. } => None,
        };
        // Never registered: a reference left in the ring's table would hang the next mount of the volume.
        let file = ring.file(object.clone(), false);
        let id = object.id();
        let open = Open { key: key.clone(), role, object, file };
        if let Some(stale) = self.objects.insert(id, open) {
            self.unlist(&stale.key, id);
        }
        let ids = self.files.entry(key.clone()).or_default();
        ids.push(id);
        Heard::Opened { key, blob, first: ids.len() == 1 }
    }

    fn read(&self, token: ReadToken) -> Heard {
        let Some(open) = self.objects.get(&token.object()) else {
            // Its CLOSE was heard, and a write that is under way still holds its descriptor.
            let message = format!("a READ of object {}, which is closed here", token.object());
            let msg_id = token.msg_id();
            token.leave_pending();
            return Heard::Lost { msg_id, message };
        };
        match &open.role {
            CookieRole::Blob(_) => Heard::Read { key: open.key.clone(), token },
            CookieRole::Bootstrap { size, path } => {
                let (size, path, object) = (*size, path.clone(), Arc::clone(&open.object));
                let (len, msg_id) = (token.len(), token.msg_id());
                if !lock(&self.filling).insert(msg_id) {
                    token.leave_pending();
                    return Heard::Repeated;
                }
                let filling = Arc::clone(&self.filling);
                tracing::warn!(
                    path = %path.display(), offset = token.offset(), len,
                    "the cache file of a bootstrap has a hole; filling it"
                );
                self.runtime.spawn_blocking(move || {
                    let filled = copy_bootstrap(&path, size, &object, token.offset(), len);
                    // Held over the answer: the kernel may use the number again at once.
                    let mut filling = lock(&filling);
                    filling.remove(&msg_id);
                    let answered = match filled {
                        Ok(()) => token.complete(),
                        Err(error) => {
                            tracing::error!(path = %path.display(), %error, "a bootstrap range cannot be served");
                            token.fail()
                        }
                    };
                    if let Err(error) = answered {
                        tracing::debug!(%error, "an answer to fscache came to nothing");
                    }
                });
                Heard::BootstrapRead { len }
            }
        }
    }

    fn close(&mut self, id: ObjectId) -> Heard {
        let Some(Open { key, object, file, .. }) = self.objects.remove(&id) else {
            return Heard::Bad { message: format!("CLOSE of object {id}, which is not open here") };
        };
        // The last references, unless a write is still under way: that one ends by itself.
        drop((object, file));
        let last = self.unlist(&key, id);
        Heard::Closed { key, last }
    }

    /// Takes the object out of its file's list; whether it was the last.
    fn unlist(&mut self, key: &CookieKey, id: ObjectId) -> bool {
        let Some(ids) = self.files.get_mut(key) else { return true };
        ids.retain(|known| *known != id);
        if ids.is_empty() {
            self.files.remove(key);
            return true;
        }
        false
    }

    /// The chunks whose every block is in the cache file.
    pub(crate) fn present(&self, key: &CookieKey, spec: &BlobSpec) -> io::Result<ReadyBits> {
        let open = self.files.get(key).and_then(|ids| self.objects.get(ids.last()?));
        let ranges = open.ok_or(io::ErrorKind::NotFound)?.object.present()?;
        let mut ready = ReadyBits::new();
        let mut ranges = ranges.into_iter().peekable();
        for chunk in spec.chunks.iter() {
            // Both lists ascend, and neither overlaps itself.
            while ranges.next_if(|range| range.end <= chunk.start).is_some() {}
            if ranges
                .peek()
                .is_some_and(|range| range.start <= chunk.start && chunk.padded_end() <= range.end)
            {
                ready.insert(chunk.index);
            }
        }
        Ok(ready)
    }
}

/// Fills a range of a bootstrap's cache file from the bootstrap on local disk, whole blocks, zeros behind its end.
fn copy_bootstrap(path: &Path, size: u64, object: &Object, offset: u64, len: u64) -> io::Result<()> {
    let end = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(BLOCK));
    let limit = size.checked_next_multiple_of(BLOCK);
    let (Some(end), Some(limit)) = (end, limit) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let end = end.min(limit);
    let mut at = offset - offset % BLOCK;
    let file = File::open(path)?;
    let block = usize::try_from(BLOCK).map_err(io::Error::other)?;
    // Direct writes want memory at whole blocks.
    let mut memory = vec![0; COPY + block];
    let shift = memory.as_ptr().align_offset(block);
    let buffer = memory.get_mut(shift..shift + COPY).ok_or(io::ErrorKind::OutOfMemory)?;
    while at < end {
        let piece = usize::try_from(end - at).unwrap_or(COPY).min(COPY);
        let piece = &mut buffer[..piece];
        piece.fill(0);
        let want = usize::try_from(size.saturating_sub(at)).unwrap_or(COPY).min(piece.len());
        file.read_exact_at(&mut piece[..want], at)?;
        object.write_all_at(piece, at)?;
        at += u64::try_from(piece.len()).map_err(io::Error::other)?;
    }
    Ok(())
}
