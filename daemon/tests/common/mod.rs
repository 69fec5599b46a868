//! What the tests of the data path share: random blobs, sources in memory with faults, and a sink that remembers.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use prometheus_client::registry::Registry;
use skimmer_daemon::blob::{BlobChunk, BlobId, BlobSpec, ReadyBits};
use skimmer_daemon::driver::{Driver, DriverConfig, DriverError, Handle, ReadySink};
use skimmer_daemon::frontend::{Frontends, Mode};
use skimmer_daemon::metrics::Metrics;
use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};
use skimmer_fetcher::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency};

/// Nothing in these tests takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A small generator, so that a failing case can be run again from its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

/// A made-up blob: what it is stored as, and what its device must hold.
pub struct Made {
    pub spec: BlobSpec,
    pub stored: Arc<Vec<u8>>,
    pub device: Vec<u8>,
}

impl Made {
    pub fn id(&self) -> BlobId {
        self.spec.id
    }

    /// The same blob with only some of its chunks referenced; the others read as zeros.
    pub fn only(&self, keep: impl Fn(usize) -> bool) -> Made {
        let chunks: Vec<BlobChunk> =
            self.spec.chunks.iter().enumerate().filter(|(at, _)| keep(*at)).map(|(_, c)| c.clone()).collect();
        let mut device = vec![0; self.device.len()];
        for chunk in &chunks {
            let range = bytes(chunk.start..chunk.padded_end());
            device[range.clone()].copy_from_slice(&self.device[range]);
        }
        let spec =
            BlobSpec::from_chunks(self.id(), self.spec.device_bytes, self.spec.stored_bytes, chunks).unwrap();
        Made { spec, stored: Arc::clone(&self.stored), device }
    }
}

pub fn bytes(range: Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// `count` chunks of mixed sizes, some zstd, some stored as they are; device space between some of them.
pub fn blob(seed: u64, count: u32, largest: u64) -> Made {
    let mut random = Random::new(seed);
    let (mut stored, mut device, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..count {
        let len = match random.below(4) {
            0 => 1 + random.below(4096),
            1 => 4096 * (1 + random.below(largest / 4096)),
            _ => 1 + random.below(largest),
        };
        let mut data = vec![0; usize::try_from(len).unwrap()];
        random.fill(&mut data);
        let squeeze = random.below(2) == 0;
        if squeeze {
            // Mostly repetition, but no block of zeros, which would hide a wrong answer.
            let pattern: Vec<u8> = data.iter().take(37).copied().collect();
            for (at, byte) in data.iter_mut().enumerate() {
                *byte = pattern[at % pattern.len()] | 1;
            }
        }
        let packed = if squeeze { zstd::bulk::compress(&data, 3).unwrap() } else { data.clone() };
        if random.below(5) == 0 {
            device.resize(device.len() + 4096 * usize::try_from(1 + random.below(3)).unwrap(), 0);
            stored.resize(stored.len() + usize::try_from(random.below(9000)).unwrap(), 0xee);
        }
        let digest = ChunkDigest::Blake3(*blake3::hash(&data).as_bytes());
        let spec = ChunkSpec {
            stored_offset: u64::try_from(stored.len()).unwrap(),
            stored_len: u32::try_from(packed.len()).unwrap(),
            len: u32::try_from(len).unwrap(),
            codec: if squeeze { Codec::Zstd } else { Codec::None },
            digest,
        };
        chunks.push(BlobChunk { index: index * 3, start: u64::try_from(device.len()).unwrap(), spec });
        stored.extend_from_slice(&packed);
        device.extend_from_slice(&data);
        device.resize(device.len().next_multiple_of(4096), 0);
    }
    let mut id = [0; 32];
    random.fill(&mut id);
    let (device_bytes, stored_bytes) = (device.len() as u64, stored.len() as u64);
    let spec = BlobSpec::from_chunks(BlobId::new(id), device_bytes, stored_bytes, chunks).unwrap();
    Made { spec, stored: Arc::new(stored), device }
}

/// What a source does instead of answering well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Reset,
    Busy,
    Truncated,
    Flipped,
    Denied,
    Missing,
    /// Never answers.
    Hangs,
    Panics,
}

/// A source in memory.
pub struct Memory {
    name: String,
    stored: Arc<Vec<u8>>,
    /// Faults of the coming requests, then `always`.
    next: Mutex<VecDeque<Option<Fault>>>,
    always: Mutex<Option<Fault>>,
    delay: Duration,
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
}

impl Memory {
    pub fn new(name: &str, made: &Made) -> Arc<Self> {
        Self::slow(name, made, Duration::ZERO)
    }

    pub fn slow(name: &str, made: &Made, delay: Duration) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            stored: Arc::clone(&made.stored),
            next: Mutex::default(),
            always: Mutex::default(),
            delay,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    pub fn then(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.next.lock().unwrap().extend(faults);
    }

    pub fn always(&self, fault: Option<Fault>) {
        *self.always.lock().unwrap() = fault;
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

#[async_trait::async_trait]
impl Source for Memory {
    fn name(&self) -> &str {
        &self.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.delay).await;
        let fault = self.next.lock().unwrap().pop_front().unwrap_or(*self.always.lock().unwrap());
        let fail =
            |class| Err(SourceError::new(class, self.name(), "made to fail").reading(blob, range.clone()));
        let mut data = self.stored[bytes(range.clone())].to_vec();
        match fault {
            None => {}
            Some(Fault::Reset) => return fail(ErrorClass::Transient),
            Some(Fault::Busy) => {
                let wait = Some(Duration::from_millis(30));
                return fail(ErrorClass::Transient).map_err(|error: SourceError| error.retry_after(wait));
            }
            Some(Fault::Denied) => return fail(ErrorClass::Denied),
            Some(Fault::Missing) => return fail(ErrorClass::NotFound),
            Some(Fault::Hangs) => std::future::pending::<()>().await,
            Some(Fault::Panics) => panic!("made to panic"),
            Some(Fault::Truncated) => data.truncate(data.len() / 2),
            Some(Fault::Flipped) => {
                let at = data.len() / 2;
                data[at] ^= 0x40;
            }
        }
        self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        let pieces: Vec<Result<Bytes, SourceError>> =
            data.chunks(9973).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        Ok(Body::new(self.name(), blob, range, None, futures_util::stream::iter(pieces).boxed()))
    }

    async fn has(&self, _blob: &BlobRef) -> Result<bool, SourceError> {
        Ok(true)
    }
}

/// What the sink heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Ready(Mode, BlobId, Vec<u32>),
    Complete(Mode, BlobId),
    Fault(Option<BlobId>, String),
    Short,
}

#[derive(Clone, Default)]
pub struct Sink(pub Arc<Mutex<Vec<Said>>>);

impl Sink {
    pub fn ready(&self, mode: Mode) -> ReadyBits {
        let said = self.0.lock().unwrap();
        said.iter()
            .filter_map(|said| match said {
                Said::Ready(of, _, chunks) if *of == mode => Some(chunks.clone()),
                _ => None,
            })
            .flatten()
            .collect()
    }

    pub fn has(&self, wanted: &Said) -> bool {
        self.0.lock().unwrap().contains(wanted)
    }

    pub fn faults(&self) -> Vec<String> {
        let said = self.0.lock().unwrap();
        said.iter()
            .filter_map(|said| match said {
                Said::Fault(_, message) => Some(message.clone()),
                _ => None,
            })
            .collect()
    }
}

impl ReadySink for Sink {
    fn ready(&self, mode: Mode, blob: BlobId, chunks: &[u32]) {
        self.0.lock().unwrap().push(Said::Ready(mode, blob, chunks.to_vec()));
    }

    fn complete(&self, mode: Mode, blob: BlobId) {
        self.0.lock().unwrap().push(Said::Complete(mode, blob));
    }

    fn renewed(&self, _: Mode, _: BlobId) {}

    fn full(&self) {}

    fn short(&self) {
        self.0.lock().unwrap().push(Said::Short);
    }

    fn fault(&self, blob: Option<BlobId>, message: &str) {
        self.0.lock().unwrap().push(Said::Fault(blob, message.to_owned()));
    }
}

/// A driver under test.
pub struct Rig {
    pub handle: Handle,
    pub sink: Sink,
    pub metrics: Metrics,
    registry: Registry,
    thread: Option<JoinHandle<Result<(), DriverError>>>,
    runtime: tokio::runtime::Runtime,
}

/// Settings that fail fast.
pub fn hasty() -> DriverConfig {
    let mut config = DriverConfig { budget_bytes: 4 << 20, ..DriverConfig::default() };
    config.engine.max_attempts = 4;
    config.engine.backoff_base = Duration::from_millis(2);
    config.engine.backoff_cap = Duration::from_millis(20);
    config.engine.prefetch_backoff_cap = Duration::from_millis(20);
    config
}

impl Rig {
    pub fn start(config: DriverConfig, frontends: Frontends) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (sink, mut registry) = (Sink::default(), Registry::default());
        let metrics = Metrics::register(&mut registry);
        let started = Driver::start(
            config,
            frontends,
            Box::new(sink.clone()),
            metrics.clone(),
            runtime.handle().clone(),
        );
        let (handle, thread) = started.unwrap();
        Self { handle, sink, metrics, registry, thread: Some(thread), runtime }
    }

    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, future).await })
            .expect("the driver hangs")
    }

    pub fn add(&self, made: &Made, ready: ReadyBits, sources: Vec<Arc<dyn Source>>) {
        self.wait(self.handle.add_blob(made.spec.clone(), ready, sources)).unwrap();
    }

    /// The value of one line of the metrics' text.
    pub fn metric(&self, name: &str) -> f64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    /// Until `done` says so.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(
                start.elapsed() < PATIENCE,
                "still not: {what}; the sink heard {:?}",
                self.sink.0.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the driver to end by itself; why it did, and what it told.
    pub fn ended(mut self) -> (DriverError, Sink) {
        self.until("ended", || self.thread.as_ref().is_none_or(JoinHandle::is_finished));
        let result = self.thread.take().unwrap().join().unwrap();
        (result.expect_err("nobody asked the driver to end"), self.sink.clone())
    }

    pub fn stop(mut self) -> Sink {
        self.wait(self.handle.shutdown()).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
        self.sink.clone()
    }
}
