//! Who sent the bytes of blobs, and how many.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a host is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The registry itself, or a web server.
    Registry,
    /// A mirror of it.
    Mirror,
    /// A way to the peers, which may hang when they do: never waited for long, and shown no password.
    Peers,
}

/// Bytes of blobs that came, by what sent them.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    registries: Arc<AtomicU64>,
    mirrors: Arc<AtomicU64>,
    peers: Arc<AtomicU64>,
}

impl Traffic {
    pub(crate) fn of(&self, role: Role) -> Arc<AtomicU64> {
        Arc::clone(match role {
            Role::Registry => &self.registries,
            Role::Mirror => &self.mirrors,
            Role::Peers => &self.peers,
        })
    }

    /// Each kind of sender with its bytes: registries (and web servers), mirrors, Dragonfly.
    #[must_use]
    pub fn bytes(&self) -> [(&'static str, u64); 3] {
        let bytes = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("registry", bytes(&self.registries)),
            ("mirror", bytes(&self.mirrors)),
            ("dragonfly", bytes(&self.peers)),
        ]
    }
}
