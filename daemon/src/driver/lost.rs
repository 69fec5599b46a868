//! Chunks that were written and did not become durable: the disk failed under them.
//!
//! After a failed sync nobody knows what of the written pages is still there. Those in memory may be right until they
//! are dropped; from then on the file has holes or old bytes where chunks were. So all that is not on record counts as
//! missing again, and readers who wait for it go on waiting.

use skimmer_engine::ReadError;
use skimmer_keeper::protocol::Fill;

use super::Driver;
use super::kernel::{Read, Ticket};
use super::objects::Object;
use crate::blob::{BlobId, ReadyBits};
use crate::frontend::Mode;

impl Driver {
    /// Only `kept` of the blob's file is there.
    pub(super) fn lost(&mut self, mode: Mode, blob: BlobId, kept: &ReadyBits) {
        // What was written until now is lost with the rest, and must not come to count after it.
        self.do_outputs();
        // Before what is left to be read is found out from it.
        if mode == Mode::Fanotify
            && let Some(known) = self.blobs.get_mut(&blob)
        {
            (known.ready, known.durable) = (kept.clone(), kept.clone());
            self.tell_anew(blob);
        }
        for object in self.objects.of(blob) {
            let Some(Object { key, asked, .. }) = self.objects.get(object) else { continue };
            let (key, asked) = (key.clone(), *asked);
            if key.mode() != mode {
                continue;
            }
            // The engine's objects only gain chunks. What it still has under way for this one is not trusted either:
            // a part of it may have been lost with the rest.
            self.remade = Some((object, Vec::new()));
            self.forget_object(&key);
            let waiting = self.remade.take().map(|(_, waiting)| waiting).unwrap_or_default();
            let remade = self.make_object(key, blob, kept.clone());
            if let Some(object) = remade.and_then(|object| self.objects.get_mut(object)) {
                object.asked = asked;
            }
            for Read { ticket, offset, len, since, .. } in waiting {
                let Some(object) = remade else {
                    self.answer(ticket, Err(ReadError::UnknownObject));
                    continue;
                };
                let message = match &ticket {
                    Ticket::Message(token) => Some(token.msg_id()),
                    Ticket::Event(_) => None,
                };
                let read = self.read(object, ticket, offset, len, since);
                if let Some(message) = message {
                    self.device.waits(message, read);
                }
            }
        }
        self.sink.renewed(mode, blob);
    }

    /// Has the keeper ask for everything but what is there.
    pub(super) fn tell_anew(&mut self, blob: BlobId) {
        if let Some(size) = self.blobs.get(&blob).map(|known| known.spec.device_bytes) {
            let whole = 0..size;
            self.tell(blob, std::slice::from_ref(&whole), Fill::Absent);
            self.tell_all(blob);
        }
    }
}
