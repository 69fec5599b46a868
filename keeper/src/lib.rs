//! The keeper: a small process that holds the kernel's descriptors for the life of the mounts.
//!
//! fanotify fails open: when the last descriptor of the group closes, waiting and later reads of unfilled ranges return
//! zeros as success. `/dev/cachefiles` fails for good when it closes. So neither may live in a process that does real
//! work. The keeper holds both, is the only reader and answerer of the fanotify group (events are answered by
//! descriptor *number*, two readers would release each other's), and relays: a daemon connects, is sent `(event, file,
//! offset, count)`, fills the range and answers. When the daemon dies its unanswered events wait for the next one.
//!
//! [`protocol`] is the wire format, [`client`] the daemon's side, [`server`] the process itself.
#![deny(unsafe_code)]

pub mod client;
pub mod lease;
mod packet;
pub mod protocol;
pub mod server;
mod sys;
