//! A real registry on loopback: Debian's docker-registry, with its log as a witness.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The Debian package that holds it.
pub const PACKAGE: &str = "docker-registry";
/// How long it may take to answer or to write its log.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running registry; killed when dropped.
pub struct Registry {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
    marks: u32,
}

impl Registry {
    /// Starts one that keeps its content, configuration and log in `directory`.
    ///
    /// # Errors
    /// The program is missing, ends early or does not answer.
    pub fn start(directory: &Path) -> Result<Self> {
        let mut last = None;
        // Another process may take the free port before the registry does.
        for _ in 0..3 {
            let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
            match Self::start_by(Command::new("docker-registry"), directory, directory, address) {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("tried three times")?)
    }

    /// Starts another one with the same content, that wants a user and password of the file `htpasswd`.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn behind_passwords(&self, htpasswd: &Path) -> Result<Self> {
        let content = self.log.parent().context("a log lies in a directory")?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let auth = format!("auth: {{ htpasswd: {{ realm: test, path: {htpasswd:?} }} }}\n");
        let program = Command::new("docker-registry");
        Self::start_with(program, &content.join("private"), content, address, &auth)
    }

    /// Where it keeps the bytes of the blob with that digest, 64 hexadecimal digits.
    ///
    /// # Errors
    /// It is none.
    pub fn blob(&self, hex: &str) -> Result<PathBuf> {
        let content = self.log.parent().context("a log lies in a directory")?;
        let blobs = content.join("storage/docker/registry/v2/blobs/sha256");
        Ok(blobs.join(hex.get(..2).context("no digest")?).join(hex).join("data"))
    }

    /// Starts one by `program` (docker-registry, perhaps elsewhere), to listen at `address`: its content is in
    /// `content`, its configuration and log in `directory`.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn start_by(program: Command, directory: &Path, content: &Path, address: SocketAddr) -> Result<Self> {
        Self::start_with(program, directory, content, address, "")
    }

    fn start_with(
        mut program: Command,
        directory: &Path,
        content: &Path,
        address: SocketAddr,
        more: &str,
    ) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let storage = content.join("storage");
        let configuration = format!(
            "version: 0.1\nlog: {{ level: warn }}\nstorage: {{ filesystem: {{ rootdirectory: {storage:?} }} }}\n\
             http: {{ addr: \"{address}\" }}\n{more}"
        );
        let path = directory.join("config.yml");
        fs::write(&path, configuration)?;
        let log = directory.join("log");
        let child = program
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .spawn()
            .with_context(|| format!("cannot start docker-registry (Debian package {PACKAGE})"))?;
        let mut registry = Registry { child, address, log, marks: 0 };
        let deadline = Instant::now() + PATIENCE;
        while registry.answer("/v2/").is_err() {
            if let Some(status) = registry.child.try_wait()? {
                bail!("docker-registry ended with {status}:\n{}", registry.text());
            }
            if Instant::now() >= deadline {
                bail!("docker-registry does not answer on {address}:\n{}", registry.text());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// `address:port/name`.
    #[must_use]
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Every request line of the log so far, except those of this method: when it returns, all requests that were
    /// answered before are in it.
    ///
    /// # Errors
    /// The registry does not answer or does not log.
    pub fn requests(&mut self) -> Result<Vec<String>> {
        self.marks += 1;
        let mark = format!("/v2/?mark={}-", self.marks);
        self.get(&mark)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text();
            if text.contains(&mark) {
                let requests = text.lines().filter_map(|line| line.split('"').nth(1));
                let requests =
                    requests.filter(|request| request.contains(" HTTP/") && !request.contains("?mark="));
                return Ok(requests.map(str::to_owned).collect());
            }
            if Instant::now() >= deadline {
                bail!("docker-registry wrote no line for a request:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Bytes of all answers so far.
    ///
    /// # Errors
    /// As [`Registry::requests`].
    pub fn sent_bytes(&mut self) -> Result<u64> {
        self.requests()?;
        // "GET /path HTTP/1.1" 206 4194304 …
        let sizes = self
            .text()
            .lines()
            .filter_map(|line| {
                let answer = line.split('"').nth(2).filter(|_| line.contains(" HTTP/"))?;
                answer.split_whitespace().nth(1)?.parse::<u64>().ok()
            })
            .sum();
        Ok(sizes)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn get(&self, path: &str) -> Result<()> {
        let answer = self.answer(path)?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        Ok(())
    }

    fn answer(&self, path: &str) -> Result<String> {
        let address = self.address;
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 "), "{path}: {answer}");
        Ok(answer)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_in_the_log() {
        if let Err(error) = skimmer_vm_images::apt::ensure(&[PACKAGE]) {
            return crate::skips::skip("every_request_is_in_the_log", &error.to_string());
        }
        let scratch = tempfile::tempdir().unwrap();
        let mut registry = Registry::start(scratch.path()).unwrap();
        let before = registry.requests().unwrap().len();
        registry.get("/v2/?some=thing").unwrap();
        let after = registry.requests().unwrap();
        assert_eq!(after.len(), before + 1);
        assert_eq!(after.last().unwrap(), "GET /v2/?some=thing HTTP/1.1");
        assert_eq!(registry.requests().unwrap().len(), before + 1);
        assert!(registry.sent_bytes().unwrap() > 0);
    }
}
