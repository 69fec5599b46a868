//! How far the kernel reads ahead of a reader, or around a page fault: what it asks for is fetched too.
//!
//! Little while a start blob is being read, which holds what a start asks for when it was recorded with as little; more
//! after that; most when nothing is missing any more. Files that are open keep what they have.

use std::sync::Arc;
use std::time::Duration;

use super::{Mounts, bdi};

impl Mounts {
    pub(super) fn set_read_ahead(&self, name: &str, kib: u64) {
        if kib == 0 {
            return;
        }
        if let Err(error) = bdi::set_read_ahead(name, kib) {
            tracing::info!("readahead of {name} stays as it is: {error}");
        }
    }

    /// Ends the start of a superblock after its time.
    pub(super) fn end_start_later(self: &Arc<Self>, name: &str) {
        let (mounts, name) = (Arc::clone(self), name.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(mounts.config.mount.start_s)).await;
            mounts.end_start(&name);
        });
    }

    /// From the readahead of a start to that of later times. A superblock that is gone or complete has another.
    pub(super) fn end_start(&self, name: &str) {
        let mount = &self.config.mount;
        if bdi::read_ahead(name).is_ok_and(|now| now == mount.start_read_ahead_kib) {
            self.set_read_ahead(name, mount.cold_read_ahead_kib);
        }
    }
}
