//! `/etc/skimmer/config.toml`: every option has a default, an unknown one is an error that names key, line and file.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skimmer_client::AttachMode;
use skimmer_fetcher::http::Version;
use skimmer_fetcher::signature::{self, Keys};
use tracing_subscriber::EnvFilter;

/// The file read when none is named and it exists.
pub const DEFAULT_PATH: &str = "/etc/skimmer/config.toml";

/// The default configuration with every option and what it means (`skimmer config default`).
pub const DEFAULT_TEXT: &str = include_str!("default.toml");

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Cache and state.
    pub root: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// The keeper's socket.
    pub keeper_socket: PathBuf,
    /// Log filter, as `tracing` reads it.
    pub log: String,
    /// The log's form.
    pub log_format: LogFormat,
    /// How much is kept.
    pub cache: Cache,
    /// How data is fetched.
    pub fetch: Fetch,
    /// What is fetched before it is read.
    pub prefetch: Prefetch,
    /// Background completion of mounted images.
    pub fill: Fill,
    /// How images are mounted.
    pub mount: Mount,
    /// How registries are reached.
    pub registry: Registry,
    /// Whose signatures images must have.
    pub signatures: Signatures,
    /// The node's Dragonfly daemon.
    pub dragonfly: Dragonfly,
    /// The fscache attach mode.
    pub fscache: Fscache,
    /// containerd's snapshots.
    pub containerd: Containerd,
    /// Where metrics are served beside the control socket.
    pub metrics: Metrics,
    /// OpenTelemetry.
    pub traces: Traces,
    /// What images read.
    pub audit: Audit,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/skimmer".into(),
            socket: skimmer_client::DEFAULT_SOCKET.into(),
            keeper_socket: "/run/skimmer/keeper.sock".into(),
            log: "info".into(),
            log_format: LogFormat::Text,
            cache: Cache::default(),
            fetch: Fetch::default(),
            prefetch: Prefetch::default(),
            fill: Fill::default(),
            mount: Mount::default(),
            registry: Registry::default(),
            signatures: Signatures::default(),
            dragonfly: Dragonfly::default(),
            fscache: Fscache::default(),
            containerd: Containerd::default(),
            metrics: Metrics::default(),
            traces: Traces::default(),
            audit: Audit::default(),
        }
    }
}

/// `[cache]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Disk space that it may take, MiB; 0 for no limit.
    pub budget_mib: u64,
    /// Share of the file system that is kept free, percent.
    pub keep_free_percent: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self { budget_mib: 0, keep_free_percent: 5 }
    }
}

/// `[fetch]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fetch {
    /// Buffer memory, MiB.
    pub budget_mib: u64,
    /// How long a read may wait for its data before it fails, seconds.
    pub read_deadline_s: u64,
    /// Attempts per fetch.
    pub max_attempts: u32,
    /// How long a read that arrived before its image was known again may wait after a restart, seconds.
    pub park_s: u64,
}

impl Default for Fetch {
    fn default() -> Self {
        Self { budget_mib: 64, read_deadline_s: 60, max_attempts: 24, park_s: 60 }
    }
}

/// `[prefetch]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prefetch {
    /// Whether what an image lists is fetched when it is mounted.
    pub listed: bool,
}

impl Default for Prefetch {
    fn default() -> Self {
        Self { listed: true }
    }
}

/// `[fill]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fill {
    /// Whether mounted images are completed in the background.
    pub enable: bool,
    /// How long after the mount that begins, seconds.
    pub delay_s: u64,
    /// How long no read may have waited before each fetch, milliseconds.
    pub quiet_ms: u64,
    /// Stored bytes a second that may be fetched, MiB; 0 for no limit.
    pub bandwidth_mib_s: u64,
    /// Fetches a second; 0 for no limit.
    pub iops: u64,
}

impl Default for Fill {
    fn default() -> Self {
        Self { enable: false, delay_s: 30, quiet_ms: 200, bandwidth_mib_s: 0, iops: 0 }
    }
}

/// `[mount]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mount {
    /// The mode of requests that say `auto`.
    pub mode: AttachMode,
    /// Readahead of mounts that have all their data, KiB; 0 leaves the kernel's.
    pub read_ahead_kib: u64,
    /// Readahead while something is missing, KiB: what the kernel reads around a fault is fetched too.
    pub cold_read_ahead_kib: u64,
    /// Readahead at the start of an image with a start blob, and of exact recordings, KiB: what such a blob holds.
    pub start_read_ahead_kib: u64,
    /// How long that start takes at most, seconds.
    pub start_s: u64,
    /// How long the probe read that proves a mount may take, seconds.
    pub probe_timeout_s: u64,
    /// How long the image's manifest and bootstrap may take to arrive, seconds.
    pub open_timeout_s: u64,
}

impl Default for Mount {
    fn default() -> Self {
        Self {
            mode: AttachMode::Auto,
            read_ahead_kib: 2048,
            cold_read_ahead_kib: 512,
            start_read_ahead_kib: 16,
            start_s: 30,
            probe_timeout_s: 30,
            open_timeout_s: 120,
        }
    }
}

impl Mount {
    /// The probe's limit.
    pub fn probe_timeout(&self) -> Duration {
        Duration::from_secs(self.probe_timeout_s)
    }

    /// The limit for resolving an image.
    pub fn open_timeout(&self) -> Duration {
        Duration::from_secs(self.open_timeout_s)
    }
}

/// `[registry]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Hosts (`host[:port]`) that may be reached without TLS, besides loopback.
    pub insecure: Vec<String>,
    /// PEM file with additional certificate authorities.
    pub ca: Option<PathBuf>,
    /// Directory of containerd's `HOST/hosts.toml`: mirrors, certificates. Empty for none.
    pub hosts_dir: PathBuf,
    /// Which HTTP is spoken.
    pub http: Version,
    /// Credential provider plugins of the kubelet.
    pub credential_providers: Option<CredentialProviders>,
    /// Options of S3, as the `object_store` crate names them.
    pub s3: BTreeMap<String, String>,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            insecure: Vec::new(),
            ca: None,
            hosts_dir: skimmer_fetcher::registry::DEFAULT_HOSTS_DIR.into(),
            http: Version::default(),
            credential_providers: None,
            s3: BTreeMap::new(),
        }
    }
}

/// `[registry.credential_providers]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialProviders {
    /// The CredentialProviderConfig (`--image-credential-provider-config`).
    pub config: PathBuf,
    /// Where the plugins are (`--image-credential-provider-bin-dir`).
    pub bin_dir: PathBuf,
}

/// `[signatures]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Signatures {
    /// Files of public keys, one of which must have signed the images whose names begin so.
    pub required: signature::Required,
}

/// `[fscache]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fscache {
    /// Whether `/dev/cachefiles` is used where it is there.
    pub enable: bool,
    /// The cache's name in the kernel.
    pub tag: String,
}

impl Default for Fscache {
    fn default() -> Self {
        Self { enable: true, tag: "skimmer".into() }
    }
}

/// `[containerd]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    /// Whether snapshots are served to it.
    pub enable: bool,
    /// Where; `containerd.sock` beside the control socket when not set.
    pub socket: Option<PathBuf>,
    /// containerd's own socket, asked for the names of images that were pulled without telling them.
    pub address: PathBuf,
}

impl Default for Containerd {
    fn default() -> Self {
        Self { enable: true, socket: None, address: "/run/containerd/containerd.sock".into() }
    }
}

/// The form of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// `[dragonfly]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dragonfly {
    /// The registry mirror of the node's dfdaemon, `http://HOST:PORT`; empty for none.
    pub endpoint: String,
    /// Whether dfdaemon is to fetch all of a blob of which a quarter was read by way of it.
    pub prefetch: bool,
}

impl Dragonfly {
    /// As sources take it.
    ///
    /// # Errors
    /// The endpoint is no such URL.
    pub fn source(&self) -> Result<Option<skimmer_fetcher::registry::Dragonfly>, String> {
        let made = || skimmer_fetcher::registry::Dragonfly::new(&self.endpoint, self.prefetch);
        (!self.endpoint.is_empty()).then(made).transpose()
    }
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address and port; only the control socket has them when not set.
    pub listen: Option<SocketAddr>,
}

/// `[traces]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Traces {
    /// The collector, `http://HOST:PORT`; empty for none.
    pub endpoint: String,
    /// Share of misses that are traced, 0 to 1.
    pub sample: f64,
}

impl Default for Traces {
    fn default() -> Self {
        Self { endpoint: String::new(), sample: 0.01 }
    }
}

/// `[audit]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Where reads are written down; nowhere when not set.
    pub file: Option<PathBuf>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key or a value of the wrong kind.
    #[error("{}:{line}:{column}: {reason}; `skimmer config default` shows every option", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1, in characters.
        column: usize,
        /// What the parser found; names the key.
        reason: String,
    },
    /// A value that cannot work.
    #[error("{}: `{key}` {reason}", path.display())]
    Value {
        /// The file, or a word for where the value came from.
        path: PathBuf,
        /// The option.
        key: &'static str,
        /// What is wrong and what is right.
        reason: String,
    },
}

impl Config {
    /// Where snapshots are served to containerd.
    pub fn containerd_socket(&self) -> PathBuf {
        let beside = || self.socket.with_file_name("containerd.sock");
        self.containerd.socket.clone().unwrap_or_else(beside)
    }

    /// Reads `path`; `None` reads [`DEFAULT_PATH`] when it exists, else gives the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming the file.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.into(), source }),
        }
    }

    /// Parses the text of `path`.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`] with the place, [`ConfigError::Value`] with the key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or(text);
            ConfigError::Syntax {
                path: path.into(),
                line: before.matches('\n').count() + 1,
                column: before.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
                reason: error.message().replace('\n', " "),
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    /// Checks the values; `path` is only named in errors.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let fail =
            |key, reason: &str| Err(ConfigError::Value { path: path.into(), key, reason: reason.into() });
        for (key, value) in
            [("root", &self.root), ("socket", &self.socket), ("keeper_socket", &self.keeper_socket)]
        {
            if !value.is_absolute() {
                return fail(
                    key,
                    &format!("is {:?}; it must be an absolute path", value.display().to_string()),
                );
            }
        }
        if self.socket == self.keeper_socket {
            return fail("keeper_socket", "is the same as `socket`; they are two sockets");
        }
        if let Err(error) = EnvFilter::try_new(&self.log) {
            return fail("log", &format!("is `{}`: {error}", self.log));
        }
        if self.containerd.enable && self.root.to_str().is_none_or(|root| root.contains([':', ',', '\\'])) {
            return fail("root", "has a `:`, `,` or `\\`, which overlayfs cannot be given in a path");
        }
        let containerd = self.containerd_socket();
        if !containerd.is_absolute() || !self.containerd.address.is_absolute() {
            return fail("containerd.socket", "and `containerd.address` must be absolute paths");
        }
        if [&self.socket, &self.keeper_socket, &self.containerd.address].contains(&&containerd) {
            return fail("containerd.socket", "is another one's socket; it needs its own");
        }
        if self.cache.budget_mib > 1 << 34 {
            return fail("cache.budget_mib", "must be at most 17179869184");
        }
        if self.cache.keep_free_percent > 90 {
            return fail("cache.keep_free_percent", "must be from 0 to 90");
        }
        if !(1..=1024).contains(&self.fetch.budget_mib) {
            return fail("fetch.budget_mib", "must be from 1 to 1024");
        }
        if self.fetch.max_attempts == 0 {
            return fail("fetch.max_attempts", "must be at least 1");
        }
        for (key, value) in [
            ("fetch.read_deadline_s", self.fetch.read_deadline_s),
            ("fetch.park_s", self.fetch.park_s),
            ("mount.probe_timeout_s", self.mount.probe_timeout_s),
            ("mount.open_timeout_s", self.mount.open_timeout_s),
        ] {
            if !(1..=86_400).contains(&value) {
                return fail(key, "must be from 1 to 86400 seconds");
            }
        }
        if self.fill.delay_s > 86_400 || self.fill.quiet_ms > 86_400_000 {
            return fail("fill.delay_s", "and `fill.quiet_ms` must be at most a day");
        }
        if self.fill.bandwidth_mib_s > 1 << 20 || self.fill.iops > 1 << 20 {
            return fail("fill.bandwidth_mib_s", "and `fill.iops` must be at most 1048576");
        }
        for (key, value) in [
            ("mount.read_ahead_kib", self.mount.read_ahead_kib),
            ("mount.cold_read_ahead_kib", self.mount.cold_read_ahead_kib),
            ("mount.start_read_ahead_kib", self.mount.start_read_ahead_kib),
        ] {
            if value > 1 << 20 {
                return fail(key, "must be at most 1048576");
            }
        }
        if self.mount.start_s > 86_400 {
            return fail("mount.start_s", "must be at most 86400 seconds");
        }
        let hosts_dir = &self.registry.hosts_dir;
        if !hosts_dir.as_os_str().is_empty() && !hosts_dir.is_absolute() {
            return fail("registry.hosts_dir", "must be an absolute path, or empty for none");
        }
        if self.mount.mode == AttachMode::Fscache && !self.fscache.enable {
            return fail("mount.mode", "is \"fscache\", which `fscache.enable` rules out");
        }
        if let Err(reason) = signature::check(&self.signatures.required) {
            return fail("signatures.required", &reason);
        }
        if let Err(reason) = self.dragonfly.source() {
            return fail("dragonfly.endpoint", &reason);
        }
        if !self.traces.endpoint.is_empty() && !self.traces.endpoint.starts_with("http://") {
            return fail("traces.endpoint", "must be `http://HOST:PORT`, or empty for none");
        }
        if !(0.0..=1.0).contains(&self.traces.sample) {
            return fail("traces.sample", "must be from 0 to 1");
        }
        if self.audit.file.as_ref().is_some_and(|file| !file.is_absolute()) {
            return fail("audit.file", "must be an absolute path");
        }
        let tag = &self.fscache.tag;
        if tag.is_empty() || tag.len() > 64 || !tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return fail("fscache.tag", "must be 1 to 64 letters, digits or `-`");
        }
        Ok(())
    }
}

/// What is wrong with a configuration beside its text: the key and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// The option.
    pub key: &'static str,
    /// What is the matter.
    pub problem: String,
}

impl Config {
    /// Files and directories that are named and cannot be used.
    pub fn missing(&self) -> Vec<Remark> {
        let mut remarks = Vec::new();
        let mut look = |key, path: &Path, read: fn(&Path) -> std::io::Result<()>| {
            if let Err(error) = read(path) {
                remarks.push(Remark { key, problem: format!("{}: {error}", path.display()) });
            }
        };
        let file: fn(&Path) -> std::io::Result<()> = |path| std::fs::read(path).map(drop);
        let directory: fn(&Path) -> std::io::Result<()> = |path| std::fs::read_dir(path).map(drop);
        if let Some(ca) = &self.registry.ca {
            look("registry.ca", ca, file);
        }
        if let Some(providers) = &self.registry.credential_providers {
            look("registry.credential_providers.config", &providers.config, file);
            look("registry.credential_providers.bin_dir", &providers.bin_dir, directory);
        }
        let hosts_dir = &self.registry.hosts_dir;
        // The default is containerd's place: it need not be there.
        if !hosts_dir.as_os_str().is_empty() && *hosts_dir != Registry::default().hosts_dir {
            look("registry.hosts_dir", hosts_dir, directory);
        }
        for files in self.signatures.required.values() {
            if let Err(error) = Keys::load(files) {
                remarks.push(Remark { key: "signatures.required", problem: error.to_string() });
            }
        }
        remarks
    }

    /// Options that are set and change nothing, or little good.
    pub fn idle(&self) -> Vec<Remark> {
        let mut remarks = Vec::new();
        let mut note = |key, problem: &str| remarks.push(Remark { key, problem: problem.to_owned() });
        let unlimited = Fill { enable: self.fill.enable, ..Fill::default() };
        if !self.fill.enable && self.fill != unlimited {
            note("fill.enable", "is false, so the other options of `fill` change nothing");
        }
        let Mount { read_ahead_kib, cold_read_ahead_kib, .. } = self.mount;
        if read_ahead_kib != 0 && cold_read_ahead_kib > read_ahead_kib {
            note(
                "mount.cold_read_ahead_kib",
                "is above `mount.read_ahead_kib`: more is fetched than asked for",
            );
        }
        remarks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/x.toml"))
    }

    #[test]
    fn the_printed_default_is_the_default() {
        assert_eq!(parse(DEFAULT_TEXT).unwrap(), Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_printed_default_names_every_option() {
        let full = Config {
            registry: Registry {
                ca: Some("/ca.pem".into()),
                credential_providers: Some(CredentialProviders { config: "/a".into(), bin_dir: "/b".into() }),
                ..Registry::default()
            },
            ..Config::default()
        };
        let toml::Value::Table(tables) = toml::Value::try_from(full).unwrap() else { panic!("not a table") };
        let mut keys = Vec::new();
        for (key, value) in &tables {
            match value {
                toml::Value::Table(inner) => keys.extend(inner.keys().cloned()),
                _ => keys.push(key.clone()),
            }
        }
        assert!(keys.len() > 10);
        for key in keys {
            assert!(
                DEFAULT_TEXT
                    .lines()
                    .any(|l| l.trim_start_matches(['#', ' ']).starts_with(&format!("{key} ="))),
                "{key} is not in the printed default"
            );
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_file_and_line() {
        let text = parse("log = \"debug\"\n\n[mount]\nread_ahead = 5\n").unwrap_err().to_string();
        assert!(text.starts_with("/etc/x.toml:4:1: ") && text.contains("`read_ahead`"), "{text}");
        let text = parse("colour = 1\n").unwrap_err().to_string();
        assert!(text.starts_with("/etc/x.toml:1:1: ") && text.contains("`colour`"), "{text}");
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_with_file_and_line() {
        let text = parse("[fetch]\nbudget_mib = \"much\"\n").unwrap_err().to_string();
        assert!(text.starts_with("/etc/x.toml:2:14: "), "{text}");
        let text = parse("[fetch\n").unwrap_err().to_string();
        assert!(text.starts_with("/etc/x.toml:1:"), "{text}");
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        for (text, key) in [
            ("root = \"var\"", "root"),
            ("socket = \"/a\"\nkeeper_socket = \"/a\"", "keeper_socket"),
            ("[fetch]\nbudget_mib = 0", "fetch.budget_mib"),
            ("[fetch]\nmax_attempts = 0", "fetch.max_attempts"),
            ("[mount]\nprobe_timeout_s = 0", "mount.probe_timeout_s"),
            ("[registry]\nhosts_dir = \"certs.d\"", "registry.hosts_dir"),
            ("[fscache]\ntag = \"a b\"", "fscache.tag"),
            ("[signatures]\nrequired = { \"docker://a\" = [] }", "signatures.required"),
            ("[signatures]\nrequired = { \"*\" = [\"key.pub\"] }", "signatures.required"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(&format!("`{key}`")) && message.contains("/etc/x.toml"), "{message}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/config.toml"), "{error}");
    }

    #[test]
    fn what_contradicts_itself_is_told() {
        let error =
            parse("[mount]\nmode = \"fscache\"\n[fscache]\nenable = false\n").unwrap_err().to_string();
        assert!(error.contains("`mount.mode`") && error.contains("`fscache.enable`"), "{error}");
        let idle =
            parse("[fill]\nbandwidth_mib_s = 5\n[mount]\ncold_read_ahead_kib = 4096\n").unwrap().idle();
        let keys: Vec<&str> = idle.iter().map(|remark| remark.key).collect();
        assert_eq!(keys, ["fill.enable", "mount.cold_read_ahead_kib"]);
        assert!(Config::default().idle().is_empty());
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let mut config = Config::default();
        config.registry.ca = Some(ca.clone());
        config.registry.hosts_dir = dir.path().join("certs.d");
        let keys = |config: &Config| config.missing().iter().map(|remark| remark.key).collect::<Vec<_>>();
        config.signatures.required.insert("*".into(), vec![dir.path().join("none.pub")]);
        assert_eq!(keys(&config), ["registry.ca", "registry.hosts_dir", "signatures.required"]);
        config.signatures = Signatures::default();
        assert!(config.missing()[0].problem.contains("ca.pem"));
        std::fs::write(ca, "").unwrap();
        std::fs::create_dir(&config.registry.hosts_dir).unwrap();
        assert!(config.missing().is_empty() && Config::default().missing().is_empty());
    }
}
