//! The cachefiles device: its requests, and what has to be tried again later when it has none to give.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use skimmer_cachefiles::{DeviceError, ReadToken};
use skimmer_engine::{Input, ReadError, ReadId};

use super::kernel::Ticket;
use super::objects::FileKey;
use super::{DEVICE, Driver, DriverError};
use crate::blob::{BlobId, ReadyBits};
use crate::frontend::fscache::{CookieKey, Heard};
use crate::frontend::{CookieRole, Mode};
use crate::metrics::RequestKind;
use crate::ring::For;

/// How long the device is left alone before it is asked again, and the least time between two `restore`s.
const PAUSE: Duration = Duration::from_millis(100);

/// What the driver remembers about the device between its requests.
#[derive(Default)]
pub(super) struct DeviceCare {
    /// Reads that wait, by the kernel's number.
    waiting: HashMap<u32, ReadId>,
    /// When to write `restore` again.
    restore_at: Option<Instant>,
    /// Messages that came under an object that is not open here, since the last `restore` and in the round before.
    lost: HashSet<u32>,
    lost_before: HashSet<u32>,
    /// When to read the device again after that failed.
    reread_at: Option<Instant>,
    /// The failure was told, and no read has succeeded since.
    told: bool,
}

impl DeviceCare {
    /// When [`Driver::tend_device`] has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        self.restore_at.into_iter().chain(self.reread_at).min()
    }

    /// This read waits under the number.
    pub(super) fn waits(&mut self, msg_id: u32, read: ReadId) {
        self.waiting.insert(msg_id, read);
    }

    /// The read under this number waits no more.
    pub(super) fn done(&mut self, msg_id: u32, read: ReadId) {
        if self.waiting.get(&msg_id) == Some(&read) {
            self.waiting.remove(&msg_id);
        }
    }
}

/// Whether the kernel has given the cache up. Anything else, such as a want of descriptors or memory, passes.
fn is_dead(error: &DeviceError) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

impl Driver {
    /// Does what is due on the device.
    pub(super) fn tend_device(&mut self) {
        let now = Instant::now();
        if self.stopping {
            // A shutdown must not be kept awake by what is due.
            (self.device.restore_at, self.device.reread_at) = (None, None);
            return;
        }
        if self.device.restore_at.is_some_and(|at| at <= now) {
            self.restore_device(now);
        }
        if self.device.reread_at.is_some_and(|at| at <= now) {
            self.device.reread_at = None;
            self.hear_device();
        }
    }

    fn restore_device(&mut self, now: Instant) {
        self.device.restore_at = None;
        let Some(fscache) = &self.fscache else { return };
        match fscache.restore() {
            // All that waits comes again, or first an OPEN of its object: what is still lost then is heard again.
            Ok(()) => self.device.lost_before = std::mem::take(&mut self.device.lost),
            Err(error) if is_dead(&error) => self.device_dead(&error),
            Err(error) => {
                tracing::warn!("{error}; trying again");
                self.device.restore_at = Some(now + PAUSE);
            }
        }
    }

    fn device_dead(&self, error: &DeviceError) {
        self.fault(None, &format!("{error}; mounts over fscache have failed, unmount them"));
    }

    pub(super) fn hear_device(&mut self) {
        while !self.stopping
            && let Some(fscache) = &mut self.fscache
        {
            let (blobs, cookies) = (&self.blobs, &self.cookies);
            let lookup = |key: &CookieKey| match cookies.get(key) {
                None => Err("no mount of ours names it".to_owned()),
                Some(role @ CookieRole::Bootstrap { size, .. }) => Ok((role.clone(), *size)),
                Some(role @ CookieRole::Blob(blob)) => match blobs.get(blob) {
                    Some(known) => Ok((role.clone(), known.spec.device_bytes)),
                    None => Err(format!("blob {blob} is not known")),
                },
            };
            match fscache.next(&mut self.ring, lookup) {
                Ok(Some(heard)) => {
                    self.device.told = false;
                    self.heard(heard);
                }
                Ok(None) => {
                    self.device.told = false;
                    let device = fscache.device().clone();
                    if let Err(error) = self.ring.poll(device, For::Reading, DEVICE) {
                        self.fail(DriverError::system("polling /dev/cachefiles", error));
                    }
                    return;
                }
                // The requests that wait are answered as they are; new ones cannot be read.
                Err(error) if is_dead(&error) => return self.device_dead(&error),
                Err(error) => {
                    if !std::mem::replace(&mut self.device.told, true) {
                        self.fault(None, &format!("{error}; trying again until it works"));
                    }
                    self.device.reread_at = Some(Instant::now() + PAUSE);
                    return;
                }
            }
        }
    }

    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Opened { key, blob, first } => {
                self.metrics.request(Mode::Fscache, RequestKind::open);
                if let Some(blob) = blob {
                    self.opened(key, blob, first);
                }
            }
            Heard::Rejected { message } => {
                self.metrics.request(Mode::Fscache, RequestKind::open);
                self.fault(None, &message);
            }
            Heard::Closed { key, last } => {
                self.metrics.request(Mode::Fscache, RequestKind::close);
                if last {
                    self.forget_object(&FileKey::Fscache(key));
                }
            }
            Heard::Read { key, token } => self.message(key, token),
            Heard::BootstrapRead { len } => {
                self.metrics.request(Mode::Fscache, RequestKind::read);
                self.metrics.asked_bytes.get_or_create(&Mode::Fscache.into()).inc_by(len);
            }
            Heard::Repeated => {}
            Heard::Lost { msg_id, message } => {
                self.metrics.request(Mode::Fscache, RequestKind::bad);
                // An earlier daemon's descriptor of the object is only now being closed by the kernel, which gives
                // the read to nobody else before it is told to.
                self.device.restore_at.get_or_insert_with(|| Instant::now() + PAUSE);
                if self.device.lost.insert(msg_id) && !self.device.lost_before.contains(&msg_id) {
                    self.fault(None, &format!("{message}; doing so until it comes"));
                }
            }
            Heard::Bad { message } => {
                self.metrics.request(Mode::Fscache, RequestKind::bad);
                self.fault(None, &message);
            }
        }
    }

    fn message(&mut self, key: CookieKey, token: ReadToken) {
        let (msg_id, offset, len) = (token.msg_id(), token.offset(), token.len());
        if let Some(known) = self.device.waiting.get(&msg_id).copied() {
            if self.is_same(known, &token) {
                // Delivered once more by a `restore`: one answer is due, and it is on its way.
                return token.leave_pending();
            }
            // That reader is gone, or it is served through a newly opened object: the old one gets no answer.
            self.input(Input::CancelRead { read: known });
            self.do_outputs();
        }
        self.metrics.request(Mode::Fscache, RequestKind::read);
        match self.objects.find(&FileKey::Fscache(key)) {
            Some(object) => {
                let read = self.read(object, Ticket::Message(token), offset, len, Instant::now());
                self.device.waits(msg_id, read);
            }
            None => answer_message(token, Err(ReadError::UnknownObject)),
        }
    }

    /// An fscache object is open: finds out what its cache file holds, unless an open one of the same file told.
    fn opened(&mut self, key: CookieKey, blob: BlobId, first: bool) {
        let name = FileKey::Fscache(key.clone());
        if !first && self.objects.find(&name).is_some() {
            return;
        }
        self.forget_object(&name);
        let (Some(fscache), Some(known)) = (&self.fscache, self.blobs.get(&blob)) else { return };
        let ready = fscache.present(&key, &known.spec).unwrap_or_else(|error| {
            let what = format!("what its cache file holds cannot be found out ({error}); it is filled anew");
            self.fault(Some(blob), &what);
            ReadyBits::new()
        });
        self.make_object(name, blob, ready);
    }
}

pub(super) fn answer_message(token: ReadToken, result: Result<(), ReadError>) {
    let answered = match result {
        Ok(()) => token.complete(),
        Err(_) => token.fail(),
    };
    if let Err(error) = answered {
        tracing::debug!(%error, "an answer to fscache came to nothing");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_io_error_is_the_end_of_the_cache() {
        let failed = |errno| DeviceError::Read(std::io::Error::from_raw_os_error(errno));
        assert!(is_dead(&failed(libc::EIO)));
        for passing in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS] {
            assert!(!is_dead(&failed(passing)), "{passing}");
        }
    }
}
