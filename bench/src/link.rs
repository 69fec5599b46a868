//! A network link of a stated rate, delay and loss between this network namespace and one of its own.
//!
//! Kernels without `netem` cannot delay packets, so two TUN devices are joined by a relay in user space: a packet
//! leaves when the bytes before it have gone out at the link's rate, and arrives one delay later. The queue in front
//! of the link is finite, as a router's is; what does not fit is dropped.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use tun_rs::{DeviceBuilder, SyncDevice};

/// Largest packet of the link, in bytes: Ethernet's, so that TCP behaves as on a real one.
const MTU: u16 = 1500;
/// Room in front of the link, as time at its rate.
const QUEUE: Duration = Duration::from_millis(60);
/// Smallest room in front of the link, in bytes: a slow link must still take a burst of packets.
const QUEUE_FLOOR: u64 = 64 * 1024;

/// Rate, delay and loss of one direction; both directions have the same.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bits per second of packets, headers included.
    pub bits_per_second: u64,
    /// One-way delay: half the round trip.
    pub delay: Duration,
    /// Packets lost of 1,000, at random; the same ones in every run.
    pub loss_per_mille: u32,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mbit = self.bits_per_second / 1_000_000;
        write!(f, "{mbit} Mbit/s, {} ms round trip", (2 * self.delay).as_millis())?;
        match self.loss_per_mille {
            0 => Ok(()),
            loss => write!(f, ", {}.{} % loss", loss / 10, loss % 10),
        }
    }
}

/// A link that exists; dropping it removes its namespace and devices.
pub struct Link {
    namespace: String,
    near: Ipv4Addr,
    far: Ipv4Addr,
    to_far: Arc<Direction>,
    to_near: Arc<Direction>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Link {
    /// Makes network namespace `namespace` (it must not exist) and a link to it. Needs root. Addresses are taken from
    /// the benchmarking range 198.18.0.0/15 (RFC 2544), a subnet that no other link of this machine has.
    pub fn new(namespace: &str, shape: Shape) -> Result<Self> {
        ip(["netns", "add", namespace])?;
        // From here on a failure must take the namespace with it.
        let mut link = Self {
            namespace: namespace.to_owned(),
            near: Ipv4Addr::UNSPECIFIED,
            far: Ipv4Addr::UNSPECIFIED,
            to_far: Arc::new(Direction::default()),
            to_near: Arc::new(Direction::default()),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        let (subnet, near_device) = free_subnet()?;
        let (near, far) = (Ipv4Addr::new(198, 18, subnet, 1), Ipv4Addr::new(198, 18, subnet, 2));
        (link.near, link.far) = (near, far);
        let (near_name, far_name) = (format!("sk{subnet}near"), format!("sk{subnet}far"));
        let near_device = Arc::new(near_device);
        let far_device = Arc::new(tun(&far_name)?);
        ip(["link", "set", &far_name, "netns", namespace])?;
        let (near_text, far_text) = (near.to_string(), far.to_string());
        let mtu = MTU.to_string();
        ip(["addr", "add", &near_text, "peer", &far_text, "dev", &near_name])?;
        ip(["link", "set", &near_name, "mtu", &mtu, "up"])?;
        ip(["-n", namespace, "addr", "add", &far_text, "peer", &near_text, "dev", &far_name])?;
        ip(["-n", namespace, "link", "set", &far_name, "mtu", &mtu, "up"])?;
        ip(["-n", namespace, "link", "set", "lo", "up"])?;
        for (from, to, direction) in
            [(&near_device, &far_device, &link.to_far), (&far_device, &near_device, &link.to_near)]
        {
            let (from, to, direction) = (Arc::clone(from), Arc::clone(to), Arc::clone(direction));
            let (stop, taker) = (Arc::clone(&link.stop), Arc::clone(&direction));
            let receive = move || take_packets(&from, &taker, shape, &stop);
            let stop = Arc::clone(&link.stop);
            let send = move || deliver_packets(&to, &direction, &stop);
            link.threads.push(std::thread::Builder::new().name("link-in".into()).spawn(receive)?);
            link.threads.push(std::thread::Builder::new().name("link-out".into()).spawn(send)?);
        }
        Ok(link)
    }

    /// Address of this namespace's end.
    pub fn near(&self) -> Ipv4Addr {
        self.near
    }

    /// Address of the far end, where servers of a test listen.
    pub fn far(&self) -> Ipv4Addr {
        self.far
    }

    /// A command that runs `program` at the far end.
    pub fn at_far<S: AsRef<OsStr>>(&self, program: S) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Bytes that arrived at this end so far, headers included.
    pub fn received(&self) -> u64 {
        self.to_near.delivered.load(Ordering::Relaxed)
    }

    /// Bytes that this end sent so far, as they arrived at the far end.
    pub fn sent(&self) -> u64 {
        self.to_far.delivered.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.to_far.wake.notify_all();
        self.to_near.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A relay thread that panicked has nothing left to clean up.
            let _ = thread.join();
        }
        if let Err(error) = ip(["netns", "del", &self.namespace]) {
            eprintln!("network namespace {} is left behind: {error:#}", self.namespace);
        }
    }
}

fn ip<const N: usize>(args: [&str; N]) -> Result<()> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output();
    let output = output.context("cannot run `ip` (package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// The near device of a subnet that nothing on this machine uses.
fn free_subnet() -> Result<(u8, SyncDevice)> {
    let mut last = None;
    for subnet in 0..=u8::MAX {
        let name = format!("sk{subnet}near");
        if std::path::Path::new("/sys/class/net").join(&name).exists() {
            continue;
        }
        // Another process may have taken it meanwhile.
        match tun(&name) {
            Ok(device) => return Ok((subnet, device)),
            Err(error) => last = Some(error),
        }
        if subnet > 16 && last.is_some() {
            break;
        }
    }
    Err(last.context("every subnet for links is in use")?)
}

fn tun(name: &str) -> Result<SyncDevice> {
    let device = DeviceBuilder::new()
        .name(name)
        .inherit_enable_state()
        .build_sync()
        .with_context(|| format!("cannot make TUN device {name} (needs root and /dev/net/tun)"))?;
    device.set_nonblocking(true).context("cannot set the TUN device non-blocking")?;
    Ok(device)
}

#[derive(Default)]
struct Direction {
    queue: Mutex<VecDeque<(Instant, Vec<u8>)>>,
    wake: Condvar,
    delivered: AtomicU64,
}

/// Reads packets of `from` and queues them with the time at which they arrive at the other end.
fn take_packets(from: &SyncDevice, direction: &Direction, shape: Shape, stop: &AtomicBool) {
    let queue_bytes =
        u64::try_from(QUEUE.as_millis()).unwrap_or(u64::MAX).saturating_mul(shape.bits_per_second / 8000);
    let room = transmission(queue_bytes.max(QUEUE_FLOOR), shape.bits_per_second);
    let mut line_free = Instant::now();
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    let mut packet = vec![0_u8; usize::from(u16::MAX)];
    while !stop.load(Ordering::Relaxed) {
        if !wait(from, PollFlags::IN) {
            continue;
        }
        while let Ok(len) = from.recv(&mut packet) {
            let now = Instant::now();
            let start = line_free.max(now);
            // xorshift64 (Marsaglia 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if random % 1000 < u64::from(shape.loss_per_mille) {
                continue;
            }
            if start.duration_since(now) > room {
                continue;
            }
            line_free = start + transmission(u64::try_from(len).unwrap_or(0), shape.bits_per_second);
            let mut queue = direction.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push_back((line_free + shape.delay, packet[..len].to_vec()));
            direction.wake.notify_one();
        }
    }
}

/// Hands queued packets to `to` when their time has come.
fn deliver_packets(to: &SyncDevice, direction: &Direction, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut queue = direction.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(&(due, _)) = queue.front() else {
            // The result is the guard and whether time ran out; the loop looks again either way.
            drop(direction.wake.wait_timeout(queue, Duration::from_millis(100)));
            continue;
        };
        let now = Instant::now();
        if due > now {
            drop(queue);
            std::thread::sleep(due - now);
            continue;
        }
        let Some((_, packet)) = queue.pop_front() else { continue };
        drop(queue);
        direction.delivered.fetch_add(u64::try_from(packet.len()).unwrap_or(0), Ordering::Relaxed);
        // A device that is down or full loses the packet, as a wire would.
        let _ = to.send(&packet);
    }
}

fn transmission(bytes: u64, bits_per_second: u64) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(8_000_000_000) / bits_per_second.max(1))
}

/// Waits a moment for `events` on `device`; false when there are none.
fn wait(device: &SyncDevice, events: PollFlags) -> bool {
    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let mut fds = [PollFd::new(device, events)];
    matches!(poll(&mut fds, Some(&timeout)), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transmission_takes_the_links_time() {
        assert_eq!(transmission(1500, 12_000_000), Duration::from_millis(1));
        assert_eq!(transmission(0, 1), Duration::ZERO);
    }

    #[test]
    fn a_shape_says_what_it_is() {
        let shape =
            Shape { bits_per_second: 20_000_000, delay: Duration::from_millis(50), loss_per_mille: 10 };
        assert_eq!(shape.to_string(), "20 Mbit/s, 100 ms round trip, 1.0 % loss");
    }
}
