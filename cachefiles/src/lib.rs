//! The `/dev/cachefiles` on-demand protocol: EROFS over fscache asks for file ranges, we write them into cache files.
//!
//! The kernel's side is `fs/cachefiles/` and `include/uapi/linux/cachefiles.h` (5.19 to 7.1). [`message`] decodes bytes
//! and touches nothing, [`names`] computes where the kernel keeps what, [`layout`] makes cache files before the mount,
//! [`Device`] is the descriptor, and every request becomes a token ([`OpenToken`], [`ReadToken`]) that is answered
//! exactly once. [`probe`](mod@probe) finds out whether a node can use any of it.
#![deny(unsafe_code)]

pub mod device;
pub mod layout;
pub mod message;
pub mod names;
pub mod probe;
mod sys;
#[cfg(feature = "testing")]
pub mod testing;
mod token;

pub use device::{BindOptions, Device, DeviceError, Limits, Request};
pub use layout::{Layout, LayoutError};
pub use message::{Message, MessageError};
pub use token::{AnswerError, Object, ObjectId, OpenToken, ReadToken};
