//! The guest's side: first process, and server of the host's requests.

mod forward;
mod init;
mod jobs;
mod serve;

pub use init::init;
pub(crate) use jobs::Jobs;
pub use serve::serve;
