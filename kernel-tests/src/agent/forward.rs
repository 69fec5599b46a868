//! A port of the guest's loopback that leads to the host, so that image names are the same on both.

use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

/// Listens on `127.0.0.1:port` and carries every connection on to `to`, until the process ends. Gives the port, which
/// the kernel chooses for 0.
pub(super) fn forward(port: u16, to: String) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("cannot listen on port {port}"))?;
    let port = listener.local_addr()?.port();
    thread::Builder::new().name("forward".into()).spawn(move || {
        for connection in listener.incoming() {
            match connection.and_then(|near| Ok((near, TcpStream::connect(&to)?))) {
                Ok((near, far)) => {
                    if let Err(error) = join(near, far) {
                        eprintln!("skimmer-agent: forward: {error}");
                    }
                }
                Err(error) => eprintln!("skimmer-agent: forward to {to}: {error}"),
            }
        }
    })?;
    Ok(port)
}

/// Copies both ways, each in a thread, and hands the end of either on to the other side.
fn join(near: TcpStream, far: TcpStream) -> io::Result<()> {
    let ways = [(near.try_clone()?, far.try_clone()?), (far, near)];
    for (mut from, mut to) in ways {
        thread::Builder::new().spawn(move || {
            // A broken connection is the concern of those who use it.
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn bytes_and_ends_pass_both_ways() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = server.local_addr().unwrap().to_string();
        let port = forward(0, to).unwrap();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut peer, _) = server.accept().unwrap();
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        peer.write_all(b"answer").unwrap();
        drop(peer);
        text.clear();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer");
    }
}
