//! The emulated link carries bytes unchanged, no faster than it may, and leaves nothing behind.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use skimmer_bench::link::{Link, Shape};

#[test]
fn carries_bytes_at_the_rate_and_delay_it_states() {
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        return skimmer_test_support::skip_this("needs root and /dev/net/tun");
    }
    let namespace = format!("skimmer-link-{}", std::process::id());
    let shape = Shape { bits_per_second: 80_000_000, delay: Duration::from_millis(5), loss_per_mille: 0 };
    let link = Link::new(&namespace, shape).unwrap();
    let far = link.far();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let payload = sent.clone();
    let (ready, listening) = std::sync::mpsc::channel();
    let path = format!("/run/netns/{namespace}");
    let server = std::thread::spawn(move || {
        let netns = std::fs::File::open(path).unwrap();
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), Some(LinkNameSpaceType::Network))
            .unwrap();
        let listener = TcpListener::bind((far, 7000)).unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&payload).unwrap();
    });
    listening.recv().unwrap();
    let start = Instant::now();
    let mut stream = TcpStream::connect((far, 7000)).unwrap();
    // A bound from below is a property of the link, not of the machine's speed: two delays for the handshake.
    assert!(start.elapsed() >= Duration::from_millis(10));
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    // 8 million bits at 80 Mbit/s take a tenth of a second, whatever the machine does.
    assert!(start.elapsed() >= Duration::from_millis(100));
    server.join().unwrap();
    assert!(got == sent, "the link changed the bytes");
    assert!(link.received() >= 1_000_000);
    drop(link);
    assert!(!std::path::Path::new("/run/netns").join(&namespace).exists());
}
