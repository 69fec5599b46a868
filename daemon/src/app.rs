//! The daemon as a whole: what is started in which order, and how it ends.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use skimmer_keeper::client::{
    Command as KeeperCommand, Keeper, KeeperError, Notice as KeeperNotice, Welcome,
};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::containerd;
use crate::control::{self, Api, Check, Stop};
use crate::driver::{Driver, DriverConfig, DriverError};
use crate::follow::Following;
use crate::frontend::Frontends;
use crate::metrics::Metrics;
use crate::mounts::{KeeperState, Mounts, Parts};
use crate::node_metrics::NodeMetrics;
use crate::pulls::Pulls;
use crate::service::{self, Sockets};
use crate::signals::{Asked, Heard, Signals};
use crate::store::Store;
use crate::store::journal::{Journal, Notice};
use crate::store::records::Secrets;
use skimmer_config::Config;

/// How long a keeper that was just started may take to answer.
const KEEPER_START: Duration = Duration::from_secs(5);

/// How long a service manager may take to start it anew.
const KEEPER_RESTART: Duration = Duration::from_secs(10);

/// How long the last traces may take to be sent.
const FOLLOW_END: Duration = Duration::from_secs(3);

/// Runs the daemon until a signal or a request ends it; says how. `check` tells why it could not start again.
///
/// # Errors
/// What kept it from starting, or from ending well.
pub async fn run(
    config: Config,
    mut sockets: Sockets,
    signals: &Signals,
    check: Check,
) -> anyhow::Result<Stop> {
    let store = Store::open(&config.root)?;
    // Before anything is taken over: what cannot be understood must not be overwritten.
    let record = store.load_mounts()?;
    for socket in [&config.socket, &config.keeper_socket, &config.containerd_socket()] {
        make_parent(socket)?;
    }
    // First of all: a daemon that cannot be reached must not take over anything.
    let control = sockets.listen(&config.socket)?;
    let for_containerd = containerd::listen(&config, &mut sockets)?;
    let ours: Vec<PathBuf> = [Some(&control), for_containerd.as_ref()]
        .into_iter()
        .flatten()
        .filter_map(service::Socket::ours)
        .collect();
    let for_metrics = match config.metrics.listen {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.with_context(|| format!("metrics.listen: cannot listen on {address}"))?)
        }
        None => None,
    };
    let runtime_dir = config.socket.parent().unwrap_or(Path::new("/run")).to_owned();
    let secrets = Secrets::open(runtime_dir.join("credentials.json"));
    let pulls = Arc::new(Pulls::open(runtime_dir.join("pulled.json")));

    let socket = config.keeper_socket.clone();
    let log = socket.with_file_name("skimmer-keeper.log");
    let keeper = tokio::task::spawn_blocking(move || reach_keeper(&socket, &log)).await??;
    let (frontends, keeper) = match keeper {
        Reached::Keeper(keeper, welcome) => {
            let state = KeeperState {
                files: welcome.files.iter().map(|file| file.label.clone()).collect(),
                device_held: welcome.device_held,
            };
            tracing::info!(pid = welcome.pid, files = state.files.len(), "connected to the keeper");
            (Frontends { keeper: Some((keeper, welcome)) }, Ok(state))
        }
        Reached::Nobody(why) => {
            tracing::error!("{why}; fanotify mounts are not possible and present ones are not served");
            (Frontends { keeper: None }, Err(why))
        }
    };

    let (journal, mut notices) = Journal::start().context("starting the journal thread")?;
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let runtime = tokio::runtime::Handle::current();
    let sink = Box::new(journal.clone());
    let mut driver_config = driver_config(&config);
    let following = Following::begin(&config)?.map(|(follower, following)| {
        driver_config.follower = Some(follower);
        following
    });
    let (driver, thread) = Driver::start(driver_config, frontends, sink, metrics.clone(), runtime)?;
    let parts = Parts {
        config: config.clone(),
        store,
        driver: driver.clone(),
        journal: journal.clone(),
        secrets,
        pulls: Arc::clone(&pulls),
        keeper,
    };
    let mounts = Mounts::new(parts);
    let hearing = {
        let mounts = Arc::clone(&mounts);
        tokio::spawn(async move {
            while let Some(notice) = notices.recv().await {
                let mounts = Arc::clone(&mounts);
                let is_complete = matches!(notice, Notice::Complete(..));
                let dealt_with = tokio::spawn(async move { mounts.on_notice(notice).await });
                // In turn, but for a completion: it waits for the mount that is under way.
                if !is_complete && let Err(error) = dealt_with.await {
                    tracing::error!("a notice of the journal: {error}");
                }
            }
        })
    };
    mounts.restore(record).await?;

    let (stop, stopped) = watch::channel(None);
    let following = following.map(|following| tokio::spawn(following.run(Arc::downgrade(&mounts))));
    let budget = tokio::spawn(Arc::clone(&mounts).keep_budget(move || metrics.written()));
    let sweeping = tokio::spawn(Arc::clone(&mounts).sweep_forever());
    let signals = tokio::spawn(stop_on_signal(signals.listen()?, stop.clone(), check));
    let mut snapshotter = None;
    let containerd = match for_containerd {
        None => None,
        Some(socket) => {
            let snapshotter =
                Arc::clone(snapshotter.insert(containerd::snapshotter(&config, &mounts, pulls).await?));
            let mut stop = stop.subscribe();
            let stopped = async move {
                let _ = stop.wait_for(Option::is_some).await;
            };
            tracing::info!(socket = %config.containerd_socket().display(), "serving snapshots to containerd");
            Some(tokio::spawn(skimmer_snapshotter::serve(socket.listener, snapshotter, stopped)))
        }
    };
    registry.register_collector(Box::new(NodeMetrics::new(&mounts)));
    let registry = Arc::new(registry);
    let api = Api { mounts: Arc::clone(&mounts), registry, snapshotter, check, stop: stop.clone() };
    tracing::info!(socket = %config.socket.display(), root = %config.root.display(), "ready");
    let for_metrics = for_metrics.map(|listener| tokio::spawn(control::serve_metrics(listener, api.clone())));
    let mut serving = tokio::spawn(control::serve(control.listener, api));
    let watching = watch_thread(thread, stop.clone(), config.keeper_socket.clone());
    let watched = tokio::spawn(service::stay_watched(driver.clone()));
    service::ready();

    let served = wait_for_end(&mut serving, stopped.clone()).await;
    if let Some(mut containerd) = containerd {
        // What it asked for is whole; connections that it keeps open end with us.
        if let Err(error) = wait_for_end(&mut containerd, stopped).await {
            tracing::error!("{error:#}");
        }
    }
    if let Some(for_metrics) = for_metrics {
        for_metrics.abort();
    }
    let end = stop.borrow().unwrap_or(Stop::Daemon);
    match end {
        Stop::Again => service::reloading(),
        Stop::Daemon | Stop::Everything => service::stopping(),
    }
    signals.abort();
    watched.abort();
    sweeping.abort();
    budget.abort();
    // What the keeper is to serve without us.
    for (blob, chunks) in journal.flush().await {
        let _ = driver.durable(blob, chunks).await;
    }
    // The data path first: what it still writes goes into the journal.
    let ended = driver.shutdown().await;
    let thread_result = watching.await?;
    if let Some(following) = following {
        // The data path is gone: it ends with what it heard.
        let _ = tokio::time::timeout(FOLLOW_END, following).await;
    }
    let journal_end = journal.clone();
    let recorded = tokio::task::spawn_blocking(move || journal_end.stop()).await?;
    hearing.abort();
    let clean = recorded && ended.is_ok() && thread_result.is_ok();
    mounts.finish(clean).await?;
    for socket in ours {
        let _ = std::fs::remove_file(socket);
    }
    if end == Stop::Everything {
        let socket = config.keeper_socket.clone();
        let stopped = tokio::task::spawn_blocking(move || stop_keeper(&socket)).await?;
        stopped.context("the keeper could not be stopped")?;
    }
    // First the one that explains the others.
    thread_result.context("mounts stay; reads that wait go on when skimmerd runs again")?;
    ended?;
    served?;
    tracing::info!("ended");
    Ok(end)
}

/// Waits until the control server has ended after `stopped` was set. Connections that are kept open without a
/// request do not hold it up for long.
async fn wait_for_end<E: std::error::Error + Send + Sync + 'static>(
    serving: &mut tokio::task::JoinHandle<Result<(), E>>,
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

type ThreadResult = Result<(), DriverError>;

/// Waits for the driver thread; its end ends the daemon. When only its connection to the keeper ended, and another
/// process goes on with what that held, the daemon starts anew.
fn watch_thread(
    thread: std::thread::JoinHandle<ThreadResult>,
    stop: watch::Sender<Option<Stop>>,
    keeper: PathBuf,
) -> tokio::task::JoinHandle<anyhow::Result<()>> {
    tokio::task::spawn_blocking(move || {
        let result = thread.join();
        let lost = matches!(result, Ok(Err(DriverError::KeeperLost(_)))) && Keeper::connect(&keeper).is_ok();
        let how = if lost { Stop::Again } else { Stop::Daemon };
        let unasked = stop.send_if_modified(|stop| stop.is_none() && stop.replace(how).is_none());
        match result {
            Ok(Err(error)) if lost => {
                tracing::warn!("{error}; its successor has all that it held, starting anew");
                Ok(())
            }
            Ok(Err(error)) => Err(anyhow::Error::new(error).context("the data path ended")),
            Ok(Ok(())) if unasked => anyhow::bail!("the data path ended though nobody asked it to"),
            Ok(Ok(())) => Ok(()),
            Err(_) => anyhow::bail!("the driver thread panicked"),
        }
    })
}

async fn stop_on_signal(mut heard: Heard, stop: watch::Sender<Option<Stop>>, check: Check) {
    while heard.next().await == Asked::Again {
        match tokio::task::spawn_blocking(check).await {
            Ok(Ok(())) => {
                stop.send_replace(Some(Stop::Again));
                return;
            }
            Ok(Err(why)) => tracing::error!("not reloaded: {why}"),
            Err(error) => tracing::error!("not reloaded: {error}"),
        }
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
    driver.engine.fill_quiet = Duration::from_millis(config.fill.quiet_ms);
    driver.engine.fill_bandwidth = config.fill.bandwidth_mib_s << 20;
    driver.engine.fill_rate = config.fill.iops;
    driver.engine.read_deadline = Some(Duration::from_secs(config.fetch.read_deadline_s));
    driver
}

/// What came of looking for the keeper.
enum Reached {
    /// It answers.
    Keeper(Keeper, Welcome),
    /// None runs and none can be started here, for this reason: no file is watched by anybody.
    Nobody(String),
}

/// Connects to the keeper, after starting one when nobody answers.
///
/// # Errors
/// When one runs that cannot be used, or may run: going on without it would give up the mounts that it holds.
fn reach_keeper(socket: &Path, log: &Path) -> Result<Reached, KeeperError> {
    // A service manager starts it, and has what the last one held: another one would be in its way.
    let patience = std::env::var_os("NOTIFY_SOCKET").map_or(Duration::ZERO, |_| KEEPER_RESTART);
    let deadline = Instant::now() + patience;
    loop {
        match Keeper::connect(socket) {
            Err(KeeperError::NotRunning { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(KeeperError::NotRunning { .. }) => break,
            other => return other.map(|(keeper, welcome)| Reached::Keeper(keeper, welcome)),
        }
    }
    let mut child = match start_keeper(socket, log) {
        Ok(child) => child,
        Err(error) => return Ok(Reached::Nobody(format!("skimmer-keeper cannot be started: {error}"))),
    };
    let deadline = Instant::now() + KEEPER_START;
    loop {
        match Keeper::connect(socket) {
            Err(error @ KeeperError::NotRunning { .. }) => {
                let ended = child.try_wait().ok().flatten();
                if let Some(status) = ended.filter(|status| !status.success()) {
                    let why = format!("skimmer-keeper ended with {status}; see {}", log.display());
                    return Ok(Reached::Nobody(why));
                }
                if Instant::now() >= deadline {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other.map(|(keeper, welcome)| Reached::Keeper(keeper, welcome)),
        }
    }
}

fn start_keeper(socket: &Path, log: &Path) -> std::io::Result<Child> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
    let second = file.try_clone()?;
    Command::new(keeper_program())
        .arg("--detach")
        .arg("--socket")
        .arg(socket)
        // What it holds is not kept for a service that ends with us.
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(second)
        .spawn()
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
            Ok(Some(KeeperNotice::Done { seq, result })) if seq == stop => {
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn ends(result: ThreadResult, asked: bool) -> (Option<Stop>, anyhow::Result<()>) {
        let (stop, stopped) = watch::channel(asked.then_some(Stop::Everything));
        let ended =
            watch_thread(std::thread::spawn(move || result), stop, PathBuf::from("/none")).await.unwrap();
        let stop = *stopped.borrow();
        (stop, ended)
    }

    #[tokio::test]
    async fn a_data_path_that_ends_by_itself_ends_the_daemon_with_its_words() {
        let lost = || Err(DriverError::Config("the keeper is gone".into()));
        let (stop, ended) = ends(lost(), false).await;
        assert_eq!(stop, Some(Stop::Daemon));
        assert!(format!("{:#}", ended.unwrap_err()).contains("the keeper is gone"));
        let (stop, ended) = ends(Ok(()), false).await;
        assert!(stop == Some(Stop::Daemon) && ended.is_err());

        let (stop, ended) = ends(Ok(()), true).await;
        assert!(stop == Some(Stop::Everything) && ended.is_ok());
        assert!(ends(lost(), true).await.1.is_err());
    }

    #[test]
    fn only_where_no_keeper_runs_does_the_daemon_go_on_without() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, log) = (dir.path().join("k.sock"), dir.path().join("log"));
        // A keeper that hangs up on everybody: something runs there.
        let address = rustix::net::SocketAddrUnix::new(&socket).unwrap();
        let listener =
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None)
                .unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        let hangs_up = std::thread::spawn(move || drop(rustix::net::accept(&listener).unwrap()));
        assert!(reach_keeper(&socket, &log).is_err());
        hangs_up.join().unwrap();

        // Nobody there, and none can be started, because its log cannot be.
        std::fs::remove_file(&socket).unwrap();
        let Ok(Reached::Nobody(why)) = reach_keeper(&socket, &dir.path().join("no/log")) else { panic!() };
        assert!(why.contains("skimmer-keeper"), "{why}");
    }
}
