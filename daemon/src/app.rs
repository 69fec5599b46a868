//! The daemon as a whole: what is started in which order, and how it ends.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use skimmer_keeper::client::{Command as KeeperCommand, Keeper, KeeperError, Notice, Welcome};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::Config;
use crate::control::{self, Api, Stop};
use crate::driver::{Driver, DriverConfig};
use crate::frontend::Frontends;
use crate::metrics::Metrics;
use crate::mounts::{KeeperState, Mounts, Parts};
use crate::store::Store;
use crate::store::journal::Journal;
use crate::store::records::Secrets;

/// How long a keeper that was just started may take to answer.
const KEEPER_START: Duration = Duration::from_secs(5);

/// Runs the daemon until a signal or a request ends it.
///
/// # Errors
/// What kept it from starting, or from ending well.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let store = Store::open(&config.root)?;
    for socket in [&config.socket, &config.keeper_socket] {
        make_parent(socket)?;
    }
    // First of all: a daemon that cannot be reached must not take over anything.
    let listener = control::listen(&config.socket)?;
    let runtime_dir = config.socket.parent().unwrap_or(Path::new("/run")).to_owned();
    let secrets = Secrets::open(runtime_dir.join("credentials.json"));

    let socket = config.keeper_socket.clone();
    let log = socket.with_file_name("skimmer-keeper.log");
    let keeper = tokio::task::spawn_blocking(move || reach_keeper(&socket, &log)).await?;
    let (frontends, keeper) = match keeper {
        Ok((keeper, welcome)) => {
            let state = KeeperState {
                files: welcome.files.iter().map(|file| file.label.clone()).collect(),
                device_held: welcome.device_held,
            };
            tracing::info!(pid = welcome.pid, files = state.files.len(), "connected to the keeper");
            (Frontends { keeper: Some((keeper, welcome)) }, Ok(state))
        }
        // A second daemon on the same kernel interfaces: nothing good can come of going on.
        Err(error @ KeeperError::Busy { .. }) => return Err(error.into()),
        Err(error) => {
            tracing::error!("{error}; images can only be mounted when all their chunks are cached");
            (Frontends { keeper: None }, Err(error.to_string()))
        }
    };

    let (journal, mut notices) = Journal::start().context("starting the journal thread")?;
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let runtime = tokio::runtime::Handle::current();
    let sink = Box::new(journal.clone());
    let (driver, thread) = Driver::start(driver_config(&config), frontends, sink, metrics, runtime)?;
    let parts = Parts {
        config: config.clone(),
        store,
        driver: driver.clone(),
        journal: journal.clone(),
        secrets,
        keeper,
    };
    let mounts = Mounts::new(parts);
    mounts.restore().await?;

    let (stop, stopped) = watch::channel(None);
    let hearing = {
        let mounts = Arc::clone(&mounts);
        tokio::spawn(async move {
            while let Some(notice) = notices.recv().await {
                let mounts = Arc::clone(&mounts);
                // Not in turn: a completion waits for the mount that is under way, a fault must not.
                tokio::spawn(async move { mounts.on_notice(notice).await });
            }
        })
    };
    let sweeping = tokio::spawn(Arc::clone(&mounts).sweep_forever());
    let signals = tokio::spawn(stop_on_signal(stop.clone()));
    let api = Api { mounts: Arc::clone(&mounts), registry: Arc::new(registry), stop: stop.clone() };
    tracing::info!(socket = %config.socket.display(), root = %config.root.display(), "ready");
    let mut serving = tokio::spawn(control::serve(listener, api));
    let watching = watch_thread(thread, stop.clone());

    let served = wait_for_end(&mut serving, stopped).await;
    signals.abort();
    sweeping.abort();
    // The data path first: what it still writes goes into the journal.
    let ended = driver.shutdown().await;
    let thread_result = watching.await?;
    let journal_end = journal.clone();
    tokio::task::spawn_blocking(move || journal_end.stop()).await?;
    hearing.abort();
    mounts.finish().await?;
    let _ = std::fs::remove_file(&config.socket);
    if *stop.borrow() == Some(Stop::Everything) {
        let socket = config.keeper_socket.clone();
        let stopped = tokio::task::spawn_blocking(move || stop_keeper(&socket)).await?;
        stopped.context("the keeper could not be stopped")?;
    }
    served?;
    ended?;
    thread_result?;
    tracing::info!("ended");
    Ok(())
}

/// Waits until the control server has ended after `stopped` was set. Connections that are kept open without a
/// request do not hold it up for long.
async fn wait_for_end(
    serving: &mut tokio::task::JoinHandle<std::io::Result<()>>,
    mut stopped: watch::Receiver<Option<Stop>>,
) -> anyhow::Result<()> {
    tokio::select! {
        served = &mut *serving => return Ok(served??),
        _ = stopped.wait_for(Option::is_some) => {}
    }
    match tokio::time::timeout(Duration::from_secs(2), &mut *serving).await {
        Ok(served) => Ok(served??),
        Err(_) => {
            serving.abort();
            Ok(())
        }
    }
}

type ThreadResult = Result<(), crate::driver::DriverError>;

/// Waits for the driver thread; its end ends the daemon.
fn watch_thread(
    thread: std::thread::JoinHandle<ThreadResult>,
    stop: watch::Sender<Option<Stop>>,
) -> tokio::task::JoinHandle<anyhow::Result<()>> {
    tokio::task::spawn_blocking(move || {
        let result = thread.join();
        stop.send_if_modified(|stop| stop.is_none() && stop.replace(Stop::Daemon).is_none());
        match result {
            Ok(result) => Ok(result?),
            Err(_) => anyhow::bail!("the driver thread panicked"),
        }
    })
}

async fn stop_on_signal(stop: watch::Sender<Option<Stop>>) {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    let Ok(mut interrupt) = signal(SignalKind::interrupt()) else { return };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("asked to end; mounts and keeper stay");
    stop.send_replace(Some(Stop::Daemon));
}

fn driver_config(config: &Config) -> DriverConfig {
    let mut driver = DriverConfig {
        budget_bytes: config.fetch.budget_mib << 20,
        park_limit: Duration::from_secs(config.fetch.park_s),
        ..DriverConfig::default()
    };
    driver.engine.max_attempts = config.fetch.max_attempts;
    driver.engine.read_deadline = Some(Duration::from_secs(config.fetch.read_deadline_s));
    driver
}

/// Connects to the keeper, after starting one when nobody answers.
fn reach_keeper(socket: &Path, log: &Path) -> Result<(Keeper, Welcome), KeeperError> {
    match Keeper::connect(socket) {
        Err(KeeperError::NotRunning { .. }) => {}
        other => return other,
    }
    let failed = |what: &'static str| move |source| KeeperError::Io { what, source };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(failed("opening the log for a new keeper"))?;
    let second = file.try_clone().map_err(failed("opening the log for a new keeper"))?;
    let mut child = Command::new(keeper_program())
        .arg("--detach")
        .arg("--socket")
        .arg(socket)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(second)
        .spawn()
        .map_err(failed("starting skimmer-keeper"))?;
    let deadline = Instant::now() + KEEPER_START;
    loop {
        match Keeper::connect(socket) {
            Err(KeeperError::NotRunning { path, source }) => {
                let ended = child.try_wait().ok().flatten();
                if let Some(status) = ended.filter(|status| !status.success()) {
                    let text = format!("it ended with {status}; see {}", log.display());
                    return Err(KeeperError::Io {
                        what: "starting skimmer-keeper",
                        source: std::io::Error::other(text),
                    });
                }
                if Instant::now() >= deadline {
                    return Err(KeeperError::NotRunning { path, source });
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Ends the keeper. It refuses while it watches a file.
fn stop_keeper(socket: &Path) -> anyhow::Result<()> {
    let (mut keeper, welcome) = match Keeper::connect(socket) {
        Err(KeeperError::NotRunning { .. }) => return Ok(()),
        other => other?,
    };
    if welcome.device_held {
        keeper.send(KeeperCommand::CloseDevice)?;
    }
    let stop = keeper.send(KeeperCommand::Stop)?;
    let deadline = Instant::now() + KEEPER_START;
    while Instant::now() < deadline {
        match keeper.recv() {
            Ok(Some(Notice::Done { seq, result })) if seq == stop => {
                return result.map_err(|errno| anyhow::anyhow!("it refuses: {errno}"));
            }
            Ok(Some(_)) => {}
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(KeeperError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("it did not answer within {} s", KEEPER_START.as_secs())
}

/// `skimmer-keeper` beside our own executable when it is there, else whatever PATH has.
fn keeper_program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("skimmer-keeper"))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("skimmer-keeper"))
}

fn make_parent(path: &Path) -> anyhow::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(parent)
        .with_context(|| format!("cannot create {}", parent.display()))
}
