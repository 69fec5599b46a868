//! The start of a program, until it first says the right thing.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// What to start, and what it must say.
#[derive(Clone, Debug, clap::Args)]
pub struct StartOptions {
    /// The root that the program sees
    #[arg(long, default_value = "/")]
    pub root: PathBuf,
    /// What its output must contain, or the answer to --ask
    #[arg(long)]
    pub expect: String,
    /// It is a server: connect to this port of the loopback and send --request until the answer is right, then end it
    #[arg(long)]
    pub ask: Option<u16>,
    /// What is sent to --ask; \r and \n may be written so
    #[arg(long, default_value = "")]
    pub request: String,
    /// Seconds after which it has failed
    #[arg(long, default_value_t = 300)]
    pub patience: u64,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    pub command: Vec<String>,
}

/// What a start took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// Seconds to the first right output or answer.
    pub seconds: f64,
}

/// Ends a program that is still there.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself; waiting reaps it either way.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the program and waits for the right words.
///
/// # Errors
/// They do not come; the message holds what came instead.
pub fn start(options: &StartOptions) -> Result<Start> {
    let deadline = Instant::now() + Duration::from_secs(options.patience);
    let begin = Instant::now();
    let mut command = Command::new("chroot");
    command.arg(&options.root).args(&options.command);
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Ended(command.spawn().context("cannot run chroot")?);
    let seconds = match options.ask {
        Some(port) => answered(&mut child.0, port, options, begin, deadline)?,
        None => said(&mut child.0, options, begin)?,
    };
    Ok(Start { seconds })
}

/// Waits for the words in the output, then for a good end.
fn said(child: &mut Child, options: &StartOptions, begin: Instant) -> Result<f64> {
    let mut stdout = child.stdout.take().context("the program has no output")?;
    let (mut text, mut buffer, mut seconds) = (Vec::new(), [0; 4096], None);
    loop {
        let got = stdout.read(&mut buffer)?;
        if got == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..got]);
        if seconds.is_none() && contains(&text, &options.expect) {
            seconds = Some(begin.elapsed().as_secs_f64());
        }
    }
    let status = child.wait()?;
    let (Some(seconds), true) = (seconds, status.success()) else {
        bail!("{:?}: {status}\n{}\n{}", options.command, String::from_utf8_lossy(&text), complaint(child));
    };
    Ok(seconds)
}

/// Asks until the answer is right.
fn answered(
    child: &mut Child,
    port: u16,
    options: &StartOptions,
    begin: Instant,
    deadline: Instant,
) -> Result<f64> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let request = options.request.replace("\\r", "\r").replace("\\n", "\n");
    let mut last = String::from("nothing listens");
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("{:?}: {status}\n{}", options.command, complaint(child));
        }
        ensure!(Instant::now() < deadline, "{:?} does not answer on {address}: {last}", options.command);
        match ask(address, &request, &options.expect, deadline) {
            Ok(()) => return Ok(begin.elapsed().as_secs_f64()),
            Err(error) => last = format!("{error:#}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ask(address: SocketAddr, request: &str, expect: &str, deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&address, left)?;
    stream.set_read_timeout(Some(left))?;
    stream.write_all(request.as_bytes())?;
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    while text.len() < 1 << 20 {
        let got = stream.read(&mut buffer)?;
        if got == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..got]);
        if contains(&text, expect) {
            return Ok(());
        }
    }
    bail!("it answers {:?}", String::from_utf8_lossy(&text))
}

fn contains(text: &[u8], words: &str) -> bool {
    words.is_empty() || text.windows(words.len()).any(|window| window == words.as_bytes())
}

fn complaint(child: &mut Child) -> String {
    let mut text = Vec::new();
    if let Some(stderr) = child.stderr.as_mut() {
        // What cannot be read is not needed for the message.
        let _ = stderr.take(64 << 10).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
