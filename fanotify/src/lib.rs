//! fanotify pre-content events: the kernel asks before each read of a marked file, we fill the range and let it go on.
//!
//! The kernel's side is `include/uapi/linux/fanotify.h` and `fs/notify/fanotify/`. [`event`] decodes bytes and touches
//! nothing; [`Group`] owns the descriptor; each access becomes a [`PreAccess`] that is answered exactly once.
//!
//! Two facts shape every use. The interface **fails open**: when the last descriptor of a group closes, all waiting
//! reads return whatever the file holds, usually zeros. And events are answered by descriptor *number*, so only one
//! process may read a group.
#![deny(unsafe_code)]

pub mod event;
mod group;
mod probe;
mod sys;
mod token;

pub use event::{AccessRange, EventError};
pub use group::{EventAccess, EventBuffer, Group, GroupError, Notification};
pub use probe::{Unsupported, probe};
pub use token::{AnswerError, DenyErrno, PreAccess};
