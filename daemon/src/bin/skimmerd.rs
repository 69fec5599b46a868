//! `skimmerd`: serves image mounts on demand.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use clap::Parser;
use skimmer_client::{Client, ClientError};
use skimmer_config::{Config, LogFormat};
use skimmer_daemon::control::Stop;
use skimmer_daemon::service::Inherited;
use skimmer_daemon::signals::Signals;
use tracing_subscriber::EnvFilter;

/// How long a daemon that starts anew may take to answer.
const RELOAD: Duration = Duration::from_secs(60);

/// Serves container image mounts on demand.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Configuration file [default: /etc/skimmer/config.toml when it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Control socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Socket of the keeper.
    #[arg(long, value_name = "PATH")]
    keeper_socket: Option<PathBuf>,
    /// Directory of cache and state.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Log filter: error, warn, info, debug, trace, or per module.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Leave the caller's session first.
    #[arg(long)]
    detach: bool,
    /// Have the running daemon unmount everything and end, and its keeper too.
    #[arg(long)]
    stop_all: bool,
    /// Have the running daemon start anew, with the configuration and the version that lie on disk; mounts stay.
    #[arg(long)]
    reload: bool,
    /// Check the configuration and end.
    #[arg(long)]
    check: bool,
    /// Print the OpenAPI document of the control API.
    #[arg(long)]
    openapi: bool,
}

impl Arguments {
    fn config(&self) -> Result<Config, Box<dyn std::error::Error>> {
        let mut config = Config::load(self.config.as_deref())?;
        for (given, option) in [
            (&self.socket, &mut config.socket),
            (&self.keeper_socket, &mut config.keeper_socket),
            (&self.root, &mut config.root),
        ] {
            if let Some(path) = given {
                *option = std::path::absolute(path)?;
            }
        }
        // A socket that was moved takes the keeper's with it: daemons in two places need two keepers.
        if let (Some(_), None) = (&self.socket, &self.keeper_socket) {
            config.keeper_socket = config.socket.with_file_name("keeper.sock");
        }
        if let Some(log) = &self.log {
            config.log.clone_from(log);
        }
        config.check(self.config.as_deref().unwrap_or("command line".as_ref()))?;
        Ok(config)
    }
}

/// What this process is, for a program that takes its place.
static OWN_PROGRAM: LazyLock<io::Result<PathBuf>> = LazyLock::new(std::env::current_exe);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let inherited = Inherited::take();
    let again: io::Result<()> = match run(&arguments, &inherited) {
        Ok(Stop::Again) => again().and_then(|mut program| {
            inherited.pass_on(&mut program)?;
            // Returns only when it fails.
            Err(program.exec())
        }),
        Ok(Stop::Daemon | Stop::Everything) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("skimmerd: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = again {
        eprintln!("skimmerd: cannot start anew: {error}");
    }
    ExitCode::FAILURE
}

/// The program that lies where ours was started from, with our arguments.
fn again() -> io::Result<Command> {
    let own = OWN_PROGRAM.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
    let mut program = Command::new(own);
    program.args(std::env::args_os().skip(1));
    Ok(program)
}

/// Whether that program would start, as it says itself: a newer one may know other options.
fn check() -> Result<(), String> {
    let mut program = again().map_err(|error| error.to_string())?;
    let shown = program.get_program().to_string_lossy().into_owned();
    // What a service manager gave is not for it.
    let checked = program.arg("--check").env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).output();
    let checked = checked.map_err(|error| format!("{shown}: {error}"))?;
    if checked.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&checked.stderr);
    let said = said.trim();
    Err(if said.is_empty() { format!("{shown} --check: {}", checked.status) } else { said.to_owned() })
}

fn run(arguments: &Arguments, inherited: &Inherited) -> Result<Stop, Box<dyn std::error::Error>> {
    let done = Ok(Stop::Daemon);
    if arguments.openapi {
        writeln!(io::stdout(), "{}", skimmer_daemon::control::document())?;
        return done;
    }
    let config = arguments.config()?;
    let filter =
        EnvFilter::try_new(&config.log).map_err(|error| format!("log filter `{}`: {error}", config.log))?;
    if arguments.check {
        return done;
    }
    LazyLock::force(&OWN_PROGRAM);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if arguments.stop_all {
        return runtime.block_on(stop_all(&config)).and(done);
    }
    if arguments.reload {
        return runtime.block_on(reload(&config)).and(done);
    }
    let signals = Signals::catch()?;
    if arguments.detach {
        // Fails only for a process group's leader, which a child of ours never is.
        let _ = rustix::process::setsid();
    }
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    raise_file_limit();
    skimmer_fetcher::http::install_tls_provider();
    let result = runtime.block_on(skimmer_daemon::app::run(config, inherited.sockets()?, &signals, check));
    // A thread in a system call on a mount that nobody serves any more must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(Stop::Again) if !signals.let_replace() => {
            tracing::info!("asked to end; nothing is started anew");
            done
        }
        other => other.map_err(|error| format!("{error:#}").into()),
    }
}

/// Every blob takes a few descriptors, every object of fscache one: takes what the system grants.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

/// Has the daemon start anew, and waits until it is there again.
async fn reload(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::connect(&config.socket).await.map_err(with_remedy)?;
    let before = client.status().await.map_err(with_remedy)?.started_at_ms;
    client.reload().await.map_err(with_remedy)?;
    let deadline = Instant::now() + RELOAD;
    loop {
        let now = match Client::connect(&config.socket).await {
            Ok(client) => client.status().await,
            Err(error) => Err(error),
        };
        match now {
            Ok(status) if status.started_at_ms != before => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(with_remedy(error).into()),
            Ok(_) if Instant::now() >= deadline => return Err("the daemon goes on as before".into()),
            Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn with_remedy(error: ClientError) -> String {
    match error.remedy() {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}

async fn stop_all(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::connect(&config.socket).await.map_err(with_remedy)?;
    let report = client.shutdown(true).await.map_err(with_remedy)?;
    for target in report.unmounted {
        println!("unmounted {}", target.display());
    }
    if report.idle {
        return Ok(());
    }
    let used: Vec<_> = report.remaining.iter().map(|target| target.display().to_string()).collect();
    let used = if used.is_empty() { "an overlay, or an open file".to_owned() } else { used.join(", ") };
    Err(format!(
        "{used} still uses an image: the keeper stays for it; end it, then start skimmerd and try again"
    )
    .into())
}
