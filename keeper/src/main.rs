//! `skimmer-keeper`: see the library.
#![forbid(unsafe_code)]

use rustix::process::{Signal, kill_process};
use skimmer_keeper::server::{self, Config, Server};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "\
usage: skimmer-keeper --socket PATH [--detach] [--wait] [--reload] [--device PATH] [--events N] [--oom-score-adj N]

Holds the fanotify group and /dev/cachefiles for the life of the mounts and relays events to skimmerd.

  --socket PATH        where skimmerd connects
  --detach             leave the caller's session, so that nothing that ends it ends the keeper
  --wait               when another keeper listens there, wait for its end instead of failing
  --reload             have the keeper that listens there go on as the program that lies on disk, and end
  --device PATH        cachefiles device (default /dev/cachefiles)
  --events N           accesses that can wait at once, 32 to 65535 (default 4096)
  --oom-score-adj N    -1000 to 1000 (default -1000)
  --ledger-version     print which version of what a keeper holds this one can take over

A second process stands by and goes on when the first one dies. SIGHUP to the one that serves is what --reload sends.
SIGTERM: end, if nothing is held; else as soon as no other process is left, at the end of a shutdown.
";

fn main() -> ExitCode {
    let result = match parse(std::env::args_os().skip(1)) {
        Ok(Parsed::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Ok(Parsed::Run { config, detach }) => {
            // A program that took over was executed by another name.
            let _ = rustix::thread::set_name(c"skimmer-keeper");
            if detach {
                // Fails only for the leader of a session, which has left it already.
                let _ = rustix::process::setsid();
                let _ = std::env::set_current_dir("/");
            }
            Server::new(config).map(Server::run).map_err(|error| {
                // Somebody may go on with what this program could not take over, and execute it once more.
                std::thread::sleep(Duration::from_millis(100));
                error.to_string()
            })
        }
        Ok(Parsed::Reload(socket)) => reload(&socket),
        Err(message) => Err(format!("{message}\n{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(std::io::stderr(), "skimmer-keeper: {message}");
            ExitCode::FAILURE
        }
    }
}

enum Parsed {
    Print(String),
    Run { config: Config, detach: bool },
    Reload(PathBuf),
}

fn reload(socket: &Path) -> Result<(), String> {
    let at = socket.display();
    let keeper = server::owner(socket).map_err(|error| format!("{at}: {error}"))?;
    let keeper = keeper.ok_or_else(|| format!("{at}: no keeper listens there"))?;
    kill_process(keeper, Signal::HUP).map_err(|errno| format!("{at}: {errno}"))
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Parsed, String> {
    let mut config = Config { standby: true, ..Config::new("") };
    let (mut detach, mut reload) = (false, false);
    while let Some(arg) = args.next() {
        let name = arg.to_string_lossy().into_owned();
        let mut value = || args.next().ok_or_else(|| format!("{name} needs a value"));
        match name.as_str() {
            "--socket" => config.socket = absolute(&name, value()?)?,
            "--device" => config.device = absolute(&name, value()?)?,
            "--events" => config.events = number(&name, value()?, 32, u16::MAX)?,
            "--oom-score-adj" => config.oom_score_adj = number(&name, value()?, -1000, 1000)?,
            "--detach" => detach = true,
            "--wait" => config.wait = true,
            "--reload" => reload = true,
            "--resume" => config.resume = Some(number(&name, value()?, 3, i32::MAX)?),
            "--ledger-version" => {
                return Ok(Parsed::Print(format!("{}\n", server::LEDGER_VERSION)));
            }
            "--help" | "-h" => return Ok(Parsed::Print(USAGE.into())),
            "--version" | "-V" => {
                return Ok(Parsed::Print(format!("skimmer-keeper {}\n", env!("CARGO_PKG_VERSION"))));
            }
            _ => return Err(format!("unknown argument {name:?}")),
        }
    }
    if config.socket.as_os_str().is_empty() {
        return Err("--socket PATH is missing".into());
    }
    Ok(if reload { Parsed::Reload(config.socket) } else { Parsed::Run { config, detach } })
}

/// Paths must mean the same after leaving the working directory.
fn absolute(name: &str, value: OsString) -> Result<PathBuf, String> {
    std::path::absolute(&value).map_err(|error| format!("{name} {}: {error}", value.display()))
}

fn number<T>(name: &str, value: OsString, least: T, most: T) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    let parsed = value.to_str().and_then(|text| text.parse().ok());
    parsed
        .filter(|number| *number >= least && *number <= most)
        .ok_or_else(|| format!("{name} takes a number from {least} to {most}, not {}", value.display()))
}
