//! The bootstrap: the merged tree as one EROFS image.

mod place;
mod plan;
mod write;

pub(crate) use plan::Plan;
pub(crate) use write::{PublishedBlob, write};
