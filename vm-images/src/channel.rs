//! The host's end of the control channel: requests out, replies back to whoever waits for them.

use std::collections::HashMap;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::protocol::{self, Frame, Reply, Request};

/// Replies that are still to come; `None` once the guest is gone.
type Waiting = Arc<Mutex<Option<HashMap<u64, Sender<Reply>>>>>;

/// One connection to one boot of a guest.
pub(crate) struct Channel {
    stream: Mutex<UnixStream>,
    waiting: Waiting,
    next: Mutex<u64>,
}

impl Channel {
    /// Starts reading from `stream`; the receiver yields the guest's greeting.
    pub(crate) fn new(stream: UnixStream) -> Result<(Self, Receiver<Reply>)> {
        let (greeting, greeted) = channel();
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::from([(0, greeting)]))));
        let mut reader = BufReader::new(stream.try_clone()?);
        let routes = Arc::clone(&waiting);
        thread::Builder::new().name("guest-channel".into()).spawn(move || {
            loop {
                match protocol::read::<Reply>(&mut reader) {
                    Ok(Some(frame)) => {
                        let route = locked(&routes).as_mut().and_then(|routes| routes.remove(&frame.id));
                        // Nobody waits any more for a request that was given up.
                        if let Some(route) = route {
                            let _ = route.send(frame.body);
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        eprintln!("guest channel: {error}");
                        break;
                    }
                }
            }
            // Dropping the senders wakes everyone who waits.
            *locked(&routes) = None;
        })?;
        Ok((Channel { stream: Mutex::new(stream), waiting, next: Mutex::new(1) }, greeted))
    }

    /// Sends a request; gives its id and where the reply will come.
    pub(crate) fn send(&self, request: Request) -> Result<(u64, Receiver<Reply>)> {
        let id = {
            let mut next = locked(&self.next);
            *next += 1;
            *next
        };
        let (sender, receiver) = channel();
        locked(&self.waiting).as_mut().context("the guest is gone")?.insert(id, sender);
        protocol::write(&mut *locked(&self.stream), &Frame { id, body: request })
            .context("cannot write to the guest")?;
        Ok((id, receiver))
    }

    /// Sends a request and waits for its reply; a refusal by the agent is an error.
    pub(crate) fn ask(&self, request: Request, timeout: Duration) -> Result<Reply> {
        let (_, receiver) = self.send(request)?;
        wait(&receiver, timeout)
    }
}

/// Waits for one reply.
pub(crate) fn wait(receiver: &Receiver<Reply>, timeout: Duration) -> Result<Reply> {
    match receiver.recv_timeout(timeout) {
        Ok(Reply::Failed(message)) => bail!("the guest's agent says: {message}"),
        Ok(reply) => Ok(reply),
        Err(RecvTimeoutError::Timeout) => bail!("no reply from the guest within {timeout:?}"),
        Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone"),
    }
}

/// A panic elsewhere leaves these maps whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Bytes;

    #[test]
    fn replies_find_their_requests_in_any_order() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (channel, _greeted) = Channel::new(host).unwrap();
        let (_, first) = channel.send(Request::PowerOff).unwrap();
        let (_, second) = channel.send(Request::PowerOff).unwrap();
        let mut reader = BufReader::new(guest.try_clone().unwrap());
        let ids: Vec<u64> =
            (0..2).map(|_| protocol::read::<Request>(&mut reader).unwrap().unwrap().id).collect();
        let mut guest = guest;
        protocol::write(&mut guest, &Frame { id: ids[1], body: Reply::Content(Bytes(vec![2])) }).unwrap();
        protocol::write(&mut guest, &Frame { id: ids[0], body: Reply::Failed("no".into()) }).unwrap();
        let patience = Duration::from_secs(20);
        assert_eq!(wait(&second, patience).unwrap(), Reply::Content(Bytes(vec![2])));
        assert!(wait(&first, patience).unwrap_err().to_string().contains("no"));
    }

    #[test]
    fn the_end_of_the_guest_wakes_those_who_wait() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (channel, greeted) = Channel::new(host).unwrap();
        let (_, reply) = channel.send(Request::PowerOff).unwrap();
        drop(guest);
        let patience = Duration::from_secs(20);
        assert!(wait(&reply, patience).unwrap_err().to_string().contains("gone"));
        assert!(wait(&greeted, patience).is_err());
        assert!(channel.send(Request::PowerOff).is_err());
    }
}
