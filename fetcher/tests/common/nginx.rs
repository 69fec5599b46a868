//! Debian's nginx, as a child process: an origin of files, or a proxy before a registry.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use skimmer_test_support::skip_this;

pub(crate) struct Nginx {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) host: String,
}

const PROGRAM: &str = "/usr/sbin/nginx";

/// A certificate of its own authority for 127.0.0.1 and its key; `None` (a counted skip) without openssl.
#[track_caller]
pub(crate) fn certificate(dir: &Path, name: &str, more: &[&str]) -> Option<(PathBuf, PathBuf)> {
    let (key, cert) = (dir.join(format!("{name}.key")), dir.join(format!("{name}.pem")));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-days", "2", "-subj", &format!("/CN={name}"), "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(more)
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output();
    match made {
        Ok(output) if output.status.success() => Some((cert, key)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            skip_this("openssl is missing (package openssl)");
            None
        }
        other => panic!("openssl cannot make a certificate: {other:?}"),
    }
}

impl Nginx {
    /// Runs one server block; `{host}` in it stands for its address. `None` (a counted skip) when it is missing.
    #[track_caller]
    pub(crate) fn start(dir: tempfile::TempDir, server: &str) -> Option<Self> {
        if !Path::new(PROGRAM).exists() {
            skip_this(&format!("{PROGRAM} is missing (package nginx)"));
            return None;
        }
        // Its workers run as another user.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let host = format!("127.0.0.1:{port}");
            let root = dir.path().display();
            let config = format!(
                "daemon off;\nworker_processes 1;\npid {root}/pid;\nerror_log {root}/error.log;\nuser root;\n\
                 events {{}}\nhttp {{\n  access_log {root}/access.log combined;\n  \
                 client_body_temp_path {root}/body;\n  proxy_temp_path {root}/proxy;\n  fastcgi_temp_path {root}/f;\n  \
                 uwsgi_temp_path {root}/u;\n  scgi_temp_path {root}/s;\n  server {{\n{}\n  }}\n}}\n",
                server.replace("{host}", &host)
            );
            let path = dir.path().join("nginx.conf");
            std::fs::write(&path, config).unwrap();
            let log = std::fs::File::create(dir.path().join("out")).unwrap();
            let mut child = Command::new(PROGRAM)
                .arg("-c")
                .arg(&path)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let until = Instant::now() + Duration::from_secs(30);
            while Instant::now() < until && child.try_wait().unwrap().is_none() {
                if TcpStream::connect(&host).is_ok() {
                    return Some(Self { child, dir, host });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            stop(&mut child);
        }
        panic!("nginx does not start:\n{}", std::fs::read_to_string(dir.path().join("out")).unwrap());
    }

    /// The lines of its log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default()
    }
}

/// Asks the master to end, so that it ends its workers; nothing is left behind.
fn stop(child: &mut Child) {
    let pid = child.id().to_string();
    let _ = Command::new("kill").args(["-TERM", &pid]).status();
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Nginx {
    fn drop(&mut self) {
        stop(&mut self.child);
    }
}
