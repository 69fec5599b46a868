//! The signals that end the daemon (`SIGTERM`, `SIGINT`), with none lost while one program takes the place of another in
//! the same process, and the one that starts it anew (`SIGHUP`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What came, and what it does.
#[derive(Debug, Clone)]
pub struct Signals {
    end: Arc<AtomicBool>,
    again: Arc<AtomicBool>,
    /// Nobody listens: what ends a process by default ends this one.
    at_once: Arc<AtomicBool>,
}

/// Where they come in.
#[derive(Debug)]
pub struct Heard {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// One that asked for a start anew came before.
    again: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The end.
    End,
    /// A start anew.
    Again,
}

impl Signals {
    /// Catches them from now on. Until [`Self::listen`] the process ends by one that asks for the end, and one that asks
    /// for a start anew waits.
    ///
    /// # Errors
    /// The system's.
    pub fn catch() -> io::Result<Self> {
        let signals =
            Self { end: Arc::default(), again: Arc::default(), at_once: Arc::new(AtomicBool::new(true)) };
        for number in [SIGTERM, SIGINT] {
            // Done in this order when one comes; `let_replace` looks in the other one.
            flag::register(number, Arc::clone(&signals.end))?;
            flag::register_conditional_default(number, Arc::clone(&signals.at_once))?;
        }
        flag::register(SIGHUP, Arc::clone(&signals.again))?;
        Ok(signals)
    }

    /// Listens: from now on they do nothing by themselves.
    ///
    /// # Errors
    /// The system's.
    pub fn listen(&self) -> io::Result<Heard> {
        let heard = Heard {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            again: self.again.load(Ordering::SeqCst),
        };
        self.at_once.store(false, Ordering::SeqCst);
        Ok(heard)
    }

    /// Whether another program may take the place of this one: not when the end was asked for, though too late for who
    /// listened. After this the end comes at once.
    #[must_use]
    pub fn let_replace(&self) -> bool {
        self.at_once.store(true, Ordering::SeqCst);
        !self.end.load(Ordering::SeqCst)
    }
}

impl Heard {
    /// The next one.
    pub async fn next(&mut self) -> Asked {
        if std::mem::take(&mut self.again) {
            return Asked::Again;
        }
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.hangup.recv() => Asked::Again,
        }
    }
}
