//! One daemon at a time: who is let in, who waits, who is turned away.
//!
//! A daemon that was given work and lost its connection may still be writing. Its successor is let in only when its
//! process is dead, which a pidfd tells (a zombie counts as dead, a reused number does not count as alive).

use super::ledger::NONE;
use super::log::log;
use super::peer::{Peer, Process, refuse};
use super::{Hangup, Server};
use crate::protocol::{Refusal, Reply};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long a daemon may wait for its predecessor to finish dying.
const SUCCESSION_PATIENCE: Duration = Duration::from_secs(5);

impl Server {
    /// Takes in a new connection.
    pub(super) fn accept(&mut self) {
        let newcomer = match self.listener.accept().map(|socket| socket.map(Peer::identify)) {
            Ok(Some(Ok(Some(peer)))) => peer,
            Ok(None | Some(Ok(None))) => return,
            Ok(Some(Err(error))) | Err(error) => {
                if self.group_errors.pass() {
                    log!("a connection failed: {error}");
                }
                return;
            }
        };
        if self.peer.as_ref().is_some_and(|peer| peer.process.is_dead()) {
            self.disconnect(&Hangup::Dead);
        }
        if self.fence.as_ref().is_some_and(|fence| fence.pid == newcomer.process.pid || fence.is_dead()) {
            self.drop_fence();
        }
        match (&self.peer, &self.fence, &self.successor) {
            (None, None, _) => self.welcome(newcomer),
            (None, Some(_), None) => self.successor = Some((newcomer, Instant::now() + SUCCESSION_PATIENCE)),
            (Some(Peer { process: holder, .. }), ..) | (None, Some(holder), Some(_)) => {
                log!("refused process {}: process {} is served", newcomer.process.pid, holder.pid);
                refuse(newcomer.socket.as_fd(), Refusal::Busy(holder.pid));
            }
        }
    }

    /// Lets the waiting daemon in when its predecessor is dead, or turns it away when its time is up.
    pub(super) fn succeed(&mut self) {
        let Some((_, until)) = &self.successor else { return };
        match &self.fence {
            Some(fence) if Instant::now() >= *until => {
                let holder = fence.pid;
                log!("process {holder} closed its connection but lives on; its successor is turned away");
                if let Some((peer, _)) = self.successor.take() {
                    refuse(peer.socket.as_fd(), Refusal::Busy(holder));
                }
            }
            Some(_) => {}
            None => {
                if let Some((peer, _)) = self.successor.take() {
                    self.welcome(peer);
                }
            }
        }
    }

    /// Starts to serve a daemon: it learns what is held and is sent every access that waits.
    pub(super) fn welcome(&mut self, mut peer: Peer) {
        // Where daemons are started nothing ends yet.
        self.last = None;
        let mut names = self.files.names();
        let files = u64::try_from(names.len()).unwrap_or(u64::MAX);
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let welcome = Reply::Welcome { pid, device_held: self.device.is_some(), files };
        names.reverse();
        peer.welcome = names;
        self.events.resend_all();
        log!("serving process {}; {}", peer.process.pid, self.held());
        match peer.send(&welcome, None) {
            Ok(true) => {
                self.ledger.update(|header| {
                    (header.daemon, header.daemon_fd) = (peer.process.pid, peer.process.raw());
                });
                self.peer = Some(peer);
            }
            // A fresh socket has room; without it something is badly wrong with this peer.
            Ok(false) | Err(_) => log!("process {} is gone before its welcome", peer.process.pid),
        }
    }

    pub(super) fn process_died(&mut self) {
        if self.peer.as_ref().is_some_and(|peer| peer.process.is_dead()) {
            self.disconnect(&Hangup::Dead);
        }
        if self.fence.as_ref().is_some_and(Process::is_dead) {
            self.drop_fence();
        }
    }

    /// The last daemon may be dead or come back. First of all the ledger must not name its descriptor any more, whose
    /// number could come to mean another one.
    fn drop_fence(&mut self) {
        self.ledger.update(|header| (header.daemon, header.daemon_fd) = (NONE, NONE));
        self.fence = None;
    }

    /// Ends a connection. What was not answered waits for the next daemon, except for files that are complete.
    pub(super) fn disconnect(&mut self, hangup: &Hangup) {
        let Some(peer) = self.peer.take() else { return };
        let pid = peer.process.pid;
        match hangup {
            Hangup::Closed | Hangup::Dead => log!("process {pid} is gone; {}", self.held()),
            Hangup::Broken(error) => {
                log!("process {pid} broke the protocol: {error}");
                refuse(peer.socket.as_fd(), Refusal::Protocol);
            }
            Hangup::Failed(errno) => log!("connection of process {pid}: {errno}"),
        }
        if peer.entrusted && !peer.process.is_dead() {
            self.fence = Some(peer.process);
        } else {
            self.ledger.update(|header| (header.daemon, header.daemon_fd) = (NONE, NONE));
        }
        self.files.only_durable();
        self.answer_drained();
    }

    /// Lets accesses to complete files go on.
    pub(super) fn answer_drained(&mut self) {
        for file in self.files.draining() {
            while let Some(event) = self.events.of_file(file) {
                self.answer(event, None);
            }
        }
    }
}
