//! `skimmerd`: serves image mounts on demand.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use skimmer_client::ClientError;
use skimmer_config::Config;
use tracing_subscriber::EnvFilter;

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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("skimmerd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    if arguments.openapi {
        writeln!(std::io::stdout(), "{}", skimmer_daemon::control::document())?;
        return Ok(());
    }
    let config = arguments.config()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if arguments.stop_all {
        return runtime.block_on(stop_all(&config));
    }
    if arguments.detach {
        // Fails only for a process group's leader, which a child of ours never is.
        let _ = rustix::process::setsid();
    }
    let filter =
        EnvFilter::try_new(&config.log).map_err(|error| format!("log filter `{}`: {error}", config.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    raise_file_limit();
    skimmer_fetcher::http::install_tls_provider();
    let result = runtime.block_on(skimmer_daemon::app::run(config));
    // A thread in a system call on a mount that nobody serves any more must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result.map_err(|error| format!("{error:#}").into())
}

/// Every blob takes a few descriptors, every object of fscache one: takes what the system grants.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

async fn stop_all(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let with_remedy = |error: ClientError| match error.remedy() {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    };
    let client = skimmer_client::Client::connect(&config.socket).await.map_err(with_remedy)?;
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
