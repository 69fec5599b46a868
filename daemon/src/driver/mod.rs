//! The one thread that owns engine, ring and frontends: it turns what the kernel, the fetch tasks and the daemon say
//! into engine inputs, and does what the engine puts out.

mod allowance;
mod commands;
mod config;
mod device;
mod error;
mod flights;
mod handle;
mod kernel;
mod lost;
mod objects;
mod recording;
mod served;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use skimmer_engine::{Engine, FlightId, Input, ObjectId, Output, ReadId, Time, WriteId};
use tokio::sync::{mpsc, oneshot};

pub use config::{BlobStatus, DriverConfig, FileStatus, ReadySink, Status};
pub use error::DriverError;
pub use handle::Handle;
pub use recording::{Recorded, RecordedFetch, RecordedRead};
pub use served::{Follower, Served, Stages};

use self::allowance::Allowance;
use self::commands::Waiting;
use self::device::DeviceCare;
use self::flights::{Flight, Planned, UnderWay};
use self::handle::Command;
use self::kernel::{Parked, Read};
use self::objects::{Blob, Objects};
use self::recording::Recordings;
use crate::arena::Arena;
use crate::blob::BlobId;
use crate::fetch::{Fetched, Fetches};
use crate::frontend::fanotify::Fanotify;
use crate::frontend::fscache::{CookieKey, Fscache};
use crate::frontend::{CookieRole, Frontends};
use crate::metrics::{Metrics, Stage};
use crate::ring::{Event, For, Ring};

/// Poll token of the keeper's socket.
const KEEPER: u64 = 1;
/// Poll token of the keeper's socket when commands wait for room in it.
const KEEPER_ROOM: u64 = 3;
/// Poll token of the cachefiles device.
const DEVICE: u64 = 2;

/// Smallest and largest buffer memory: io_uring registers no buffer above 1 GiB.
const BUDGET: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;

/// Requests of the daemon that may wait for the driver.
const COMMANDS: usize = 256;

/// The data path. All of its state lives on the thread that [`Driver::start`] makes.
pub struct Driver {
    config: DriverConfig,
    engine: Engine,
    ring: Ring,
    arena: Arena,
    fetches: Fetches,
    fetched: mpsc::Receiver<Fetched>,
    commands: mpsc::Receiver<Command>,
    fanotify: Option<Fanotify>,
    fscache: Option<Fscache>,
    device: DeviceCare,
    runtime: tokio::runtime::Handle,
    sink: Box<dyn ReadySink>,
    metrics: Metrics,

    blobs: HashMap<BlobId, Blob>,
    objects: Objects,
    cookies: HashMap<CookieKey, CookieRole>,
    reads: HashMap<ReadId, Read>,
    flights: HashMap<FlightId, Flight>,
    /// Flights that wait for buffer memory or room in the cache, in the engine's order.
    planned: VecDeque<Planned>,
    allowance: Allowance,
    writes: HashMap<WriteId, UnderWay>,
    /// fanotify events whose blob is not known (again) yet.
    parked: VecDeque<Parked>,
    waiting: Waiting,
    recordings: Recordings,
    /// Accesses that are to be denied: a mount's proof that they come at all.
    proofs: HashMap<BlobId, (Range<u64>, Option<oneshot::Sender<()>>)>,

    epoch: Instant,
    /// Counts the turns of the loop: a read completed in the turn it came in was a hit.
    turn: u64,
    /// The keeper's socket is polled for room.
    room_polled: bool,
    next_read: u64,
    /// The object that is being made anew, and its reads, which are not to fail for that.
    remade: Option<(ObjectId, Vec<Read>)>,
    /// Set by a shutdown: nothing new is begun.
    stopping: bool,
    /// What keeps the driver from going on; it ends with this.
    failed: Option<DriverError>,
}

impl Driver {
    /// Starts the driver thread and returns when it serves. Fetches run on `runtime`. Join the thread after
    /// [`Handle::shutdown`]; its result tells why it ended when nobody asked it to.
    pub fn start(
        config: DriverConfig,
        frontends: Frontends,
        sink: Box<dyn ReadySink>,
        metrics: Metrics,
        runtime: tokio::runtime::Handle,
    ) -> Result<(Handle, JoinHandle<Result<(), DriverError>>), DriverError> {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let (started, outcome) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("skimmer-driver".to_owned());
        let thread = thread.spawn(move || {
            let _guard = AbortOnPanic;
            // The ring belongs to the thread that makes it, so the driver is made here.
            match Self::new(config, frontends, sink, metrics, runtime, receiver) {
                Ok(driver) => {
                    let _ = started.send(Ok(driver.ring.waker()));
                    driver.run()
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    Ok(())
                }
            }
        });
        let thread = thread.map_err(|error| DriverError::system("starting the driver thread", error))?;
        match outcome.recv() {
            Ok(Ok(waker)) => Ok((Handle { commands, waker }, thread)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(DriverError::Stopped),
        }
    }

    fn new(
        config: DriverConfig,
        frontends: Frontends,
        sink: Box<dyn ReadySink>,
        metrics: Metrics,
        runtime: tokio::runtime::Handle,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Self, DriverError> {
        let budget = config.budget_bytes;
        if !BUDGET.contains(&budget) || !budget.is_multiple_of(crate::blob::BLOCK) {
            let what = "a memory budget is a multiple of 4096 from 1 MiB to 1 GiB";
            return Err(DriverError::Config(format!("{what}, not {budget} bytes")));
        }
        let bytes = usize::try_from(budget)
            .map_err(|_| DriverError::Config("the memory budget passes the address space".to_owned()))?;
        let ring = Ring::new(config.ring_entries, bytes);
        let (mut ring, arena) = ring.map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    " (is it switched off? see sysctl kernel.io_uring_disabled)"
                }
                io::ErrorKind::Unsupported => " (skimmerd needs Linux 5.11)",
                _ => "",
            };
            DriverError::system(format!("setting up io_uring and its buffer memory{hint}"), error)
        })?;
        let mut engine_config = config.engine.clone();
        engine_config.budget_bytes = budget;
        // Two of the largest flights fit side by side, however the memory is cut up.
        engine_config.max_flight = engine_config.max_flight.min(budget / 4).max(crate::blob::BLOCK);
        let fanotify = match frontends.keeper {
            None => None,
            Some((keeper, welcome)) => {
                let fanotify = Fanotify::new(keeper, welcome, &mut ring)
                    .map_err(|error| DriverError::system("duplicating the keeper's socket", error))?;
                let poll = ring.poll(fanotify.socket().clone(), For::Reading, KEEPER);
                poll.map_err(|error| DriverError::system("polling the keeper's socket", error))?;
                Some(fanotify)
            }
        };
        // A place for every block of buffer memory that a verified chunk may hold, and for the ends of flights.
        let places = bytes / 4096 + 1024;
        let (queue, fetched) = mpsc::channel(places);
        let fetches = Fetches::new(runtime.clone(), queue, ring.waker(), metrics.clone());
        Ok(Self {
            engine: Engine::new(engine_config),
            config,
            ring,
            arena,
            fetches,
            fetched,
            commands,
            fanotify,
            fscache: None,
            device: DeviceCare::default(),
            runtime,
            sink,
            metrics,
            blobs: HashMap::new(),
            objects: Objects::default(),
            cookies: HashMap::new(),
            reads: HashMap::new(),
            flights: HashMap::new(),
            planned: VecDeque::new(),
            allowance: Allowance::default(),
            writes: HashMap::new(),
            parked: VecDeque::new(),
            waiting: Waiting::default(),
            recordings: Recordings::default(),
            proofs: HashMap::new(),
            epoch: Instant::now(),
            turn: 0,
            room_polled: false,
            next_read: 0,
            remade: None,
            stopping: false,
            failed: None,
        })
    }

    fn run(mut self) -> Result<(), DriverError> {
        let result = self.serve();
        if let Err(error) = &result {
            tracing::error!(%error, "the data path stops");
            self.sink.fault(None, &format!("the data path stops: {error}"));
        }
        self.stop();
        result
    }

    /// Until a shutdown is asked for and no write is under way any more, or something fails that a restart heals.
    fn serve(&mut self) -> Result<(), DriverError> {
        loop {
            self.turn += 1;
            self.take_commands();
            self.take_fetched();
            self.serve_parked();
            self.tend_device();
            self.input(Input::Tick);
            self.do_outputs();
            self.start_planned();
            self.settle();
            self.await_room();
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if self.stopping && self.ring.writes() == 0 {
                return Ok(());
            }
            self.ring
                .wait(self.timeout())
                .map_err(|error| DriverError::system("waiting on io_uring", error))?;
            while let Some(event) = self.ring.next_event() {
                match event {
                    Event::Woken => {}
                    Event::Ready { token: KEEPER } => self.hear_keeper(),
                    Event::Ready { token: KEEPER_ROOM } => self.keeper_has_room(),
                    Event::Ready { token: DEVICE } => self.hear_device(),
                    Event::Ready { token } => tracing::error!(token, "readiness of nothing that is polled"),
                    Event::Written { tag, len, result } => self.written(WriteId(tag), len, result),
                }
            }
        }
    }

    /// Gives back everything the kernel holds of ours; requests that wait stay with the keeper and in the kernel.
    fn stop(mut self) {
        self.fetches.cancel_all();
        self.leave_reads();
        let Self { ring, fanotify, fscache, .. } = self;
        if let Err(error) = ring.close(|_, _| {}) {
            tracing::error!(%error, "io_uring did not end cleanly");
        }
        drop((fanotify, fscache));
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.engine.handle(now, input);
    }

    fn do_outputs(&mut self) {
        let start = Instant::now();
        let mut any = false;
        while let Some(output) = self.engine.poll_output() {
            any = true;
            match output {
                Output::Fetch { flight, object, chunks, until, attempt, demand } => {
                    self.plan(flight, object, (chunks, until), (attempt, demand));
                }
                Output::CancelFlight { flight } => self.cancel(flight),
                Output::Write { write, flight, object, chunks } => self.write(write, flight, object, chunks),
                Output::Complete { read, result } => self.complete(read, result),
                Output::Release { flight } => self.release(flight),
                Output::Ready { object, chunks } => self.ready(object, chunks),
                Output::ObjectReady { object } => self.object_ready(object),
                Output::MapChanged { object } => self.map_changed(object),
                Output::ObjectRefused { object, reason } => self.object_refused(object, &reason),
            }
        }
        if any {
            self.metrics.stage(Stage::plan, start.elapsed());
        }
        let used = i64::try_from(self.arena.in_use()).unwrap_or(i64::MAX);
        self.metrics.in_flight_bytes.set(used);
        self.metrics.pending_reads.set(i64::try_from(self.reads.len()).unwrap_or(i64::MAX));
    }

    /// How long nothing will happen by itself.
    fn timeout(&self) -> Option<Duration> {
        let engine = self.engine.next_timeout().map(|due| due.since(self.now()));
        let parked = self.parked.front().map(|parked| {
            let left = self.config.park_limit.saturating_sub(parked.since.elapsed());
            // One more millisecond, so that it is over when the wait is.
            left.saturating_add(Duration::from_millis(1))
        });
        let held = self.allowance.due().filter(|_| !self.stopping);
        let due = self.device.due().into_iter().chain(held).min();
        let due = due.map(|due| due.saturating_duration_since(Instant::now()));
        engine.into_iter().chain(parked).chain(due).min()
    }

    /// Ends the driver with this error, at the end of the turn. The first one counts.
    fn fail(&mut self, error: DriverError) {
        self.failed.get_or_insert(error);
    }

    fn fault(&self, blob: Option<BlobId>, message: &str) {
        match blob {
            Some(blob) => tracing::warn!(%blob, "{message}"),
            None => tracing::warn!("{message}"),
        }
        self.sink.fault(blob, message);
    }
}

/// A driver that panicked leaves readers waiting in a process that looks alive. Ending the process is better: the
/// keeper holds what must not close, and the next daemon is sent everything that waits.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("the data path panicked; ending the process, the keeper holds what waits");
            std::process::abort();
        }
    }
}

/// What a write error means for those who wait.
fn write_failure(error: &io::Error) -> skimmer_engine::WriteFailure {
    match error.raw_os_error() {
        // Cachefiles says ENOBUFS when its limit of free space is reached.
        Some(libc::ENOSPC | libc::EDQUOT | libc::ENOBUFS) => skimmer_engine::WriteFailure::NoSpace,
        _ => skimmer_engine::WriteFailure::Io,
    }
}
