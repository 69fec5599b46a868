//! How the keeper is started, and why it may not start.

use std::io;
use std::path::PathBuf;

/// How to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub socket: PathBuf,
    /// The device to hold on request.
    pub device: PathBuf,
    /// For `/proc/self/oom_score_adj`.
    pub oom_score_adj: i32,
    /// Accesses that can wait at once; further ones wait in the kernel's queue.
    pub events: u16,
    /// When another keeper listens there: wait for its end instead of failing.
    pub wait: bool,
    /// Have a second process stand by. Only for a program that is nothing but a keeper: it is executed anew.
    pub standby: bool,
    /// The memory file of the program whose place this one takes.
    pub resume: Option<i32>,
}

impl Config {
    /// The defaults, listening there.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        let device = skimmer_cachefiles::device::DEVICE_PATH.into();
        Self {
            socket: socket.into(),
            device,
            oom_score_adj: -1000,
            events: 4096,
            wait: false,
            standby: false,
            resume: None,
        }
    }
}

/// Why the keeper did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another keeper has that socket.
    #[error("{}: another keeper is running there", .0.display())]
    Running(PathBuf),
    /// The socket could not be made.
    #[error("{}: {what}: {source}", path.display())]
    Socket {
        /// Socket or its lock file.
        path: PathBuf,
        /// Step.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The keeper that was waited for has ended.
    #[error("the other keeper has ended; to be started anew, with what the service manager keeps")]
    Again,
    /// What another program held cannot be taken over.
    #[error("taking over: {0}")]
    Resume(#[source] io::Error),
    /// There is no memory file.
    #[error("a memory file for what is held: {0}")]
    Ledger(#[source] io::Error),
    /// Signals could not be redirected.
    #[error("redirecting signals: {0}")]
    Signals(#[source] io::Error),
}
