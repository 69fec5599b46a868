//! HTTP clients with our rules: rustls with ring, no redirects, no decompression, no proxy to ourselves.

use std::collections::HashMap;
use std::error::Error as _;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use url::Url;

use crate::source::{ErrorClass, SourceError};
use crate::sources::Health;
use crate::traffic::Traffic;

/// How long a request may make no progress. There is no limit on a whole transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timeouts {
    /// For the connection and its TLS handshake.
    pub connect: Duration,
    /// From the request to the head of the reply.
    pub first_byte: Duration,
    /// Between two pieces of a body.
    pub idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(5), first_byte: seconds(15), idle: seconds(10) }
    }
}

impl Timeouts {
    /// Short ones, for reads that a kernel request waits for.
    pub fn on_demand() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(1), first_byte: seconds(3), idle: seconds(2) }
    }
}

/// How to reach hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HttpOptions {
    /// Time limits.
    pub timeouts: Timeouts,
    /// Hosts (`host` or `host:port`) that are spoken to over plain HTTP. Loopback hosts need no entry.
    pub insecure: Vec<String>,
    /// Loopback hosts (`host` or `host:port`) that speak TLS.
    pub https: Vec<String>,
    /// PEM files with certificate authorities to trust besides the system's.
    pub extra_ca: Vec<PathBuf>,
    /// The host (`host[:port]`) that `identity` and `skip_verify` are for; neither goes with a redirect elsewhere.
    pub own_host: Option<String>,
    /// What to show the own host when it asks who we are.
    pub identity: Option<ClientCertificate>,
    /// Whether any certificate of the own host will do.
    pub skip_verify: bool,
    /// The proxy to use, instead of what the environment says.
    pub proxy: Option<Proxy>,
    /// Which HTTP to speak.
    pub version: Version,
}

/// PEM files with a certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientCertificate {
    /// The certificate, and the key when there is no file of its own.
    pub certificate: PathBuf,
    /// The key.
    pub key: Option<PathBuf>,
}

/// The URL of a proxy; it may hold a password, so it is not shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Proxy(pub String);

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxy(secret)")
    }
}

/// Which version of HTTP is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Version {
    /// HTTP/1.1 for blobs, what the server offers for the rest.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// HTTP/1.1 alone.
    #[serde(rename = "1")]
    One,
    /// HTTP/2 wherever the server offers it.
    #[serde(rename = "2")]
    Two,
}

fn lists(list: &[String], host: &str) -> bool {
    let name = split_port(host).0;
    list.iter().any(|entry| entry.eq_ignore_ascii_case(host) || entry.eq_ignore_ascii_case(name))
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit()) => {
            (name, Some(port))
        }
        _ => (host, None),
    }
}

/// Whether a `host[:port]` is this machine by its name alone.
pub fn is_loopback(host: &str) -> bool {
    let name = split_port(host).0;
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let name = name.to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `host` or `host:port` of a URL, as the lists of [`HttpOptions`] have it.
pub(crate) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

impl HttpOptions {
    /// Whether the host was marked for plain HTTP.
    pub(crate) fn is_marked_insecure(&self, host: &str) -> bool {
        lists(&self.insecure, host)
    }

    /// Whether plain HTTP to this host is allowed.
    pub fn allows_plain(&self, host: &str) -> bool {
        is_loopback(host) || self.is_marked_insecure(host)
    }

    /// The scheme to use for a registry: `https`, or `http` where it is allowed and TLS was not asked for.
    pub fn scheme(&self, host: &str) -> &'static str {
        if self.allows_plain(host) && !lists(&self.https, host) { "http" } else { "https" }
    }
}

/// Installs ring as the process's TLS provider unless one is there. Call it before any reqwest client is made.
pub fn install_tls_provider() {
    // An error means that a provider is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client builder with our defaults: no redirects, TCP_NODELAY, keep-alive, a user agent.
pub fn client() -> reqwest::ClientBuilder {
    install_tls_provider();
    reqwest::Client::builder()
        .user_agent(concat!("skimmer/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .tcp_nodelay(true)
        .tcp_keepalive(Duration::from_secs(15))
        .pool_idle_timeout(Duration::from_secs(60))
        .referer(false)
}

/// What a client is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Use {
    /// Tokens and manifests: HTTP/2 where offered.
    Documents,
    /// Blobs: HTTP/1.1, one connection for each stream, so that no stream shares another's window.
    Blobs,
}

/// HTTP clients shared by the registries that are reached in the same way, with their connections. A TLS set-up and a
/// connection pool of its own for each image would cost a daemon with hundreds of them dearly.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    clients: Arc<Mutex<HashMap<HttpOptions, Weak<Clients>>>>,
    /// How each host has been doing, by scheme, host and port.
    health: Arc<Mutex<HashMap<String, Arc<Health>>>>,
    traffic: Traffic,
}

impl Pool {
    /// What has come so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }

    /// What is known of the host of a URL. Hosts are few: what was learned of one is kept.
    pub(crate) fn health(&self, url: &Url, may_hang: bool) -> Arc<Health> {
        let host = format!("{}://{}", url.scheme(), host_of(url));
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(if may_hang { Health::of_one_that_may_hang() } else { Health::default() });
        Arc::clone(health.entry(host).or_insert_with(new))
    }

    pub(crate) fn clients(&self, options: &HttpOptions) -> Arc<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clients.get(options).and_then(Weak::upgrade) {
            return known;
        }
        clients.retain(|_, known| known.strong_count() > 0);
        let made = Arc::new(Clients::new(options.clone()));
        clients.insert(options.clone(), Arc::downgrade(&made));
        made
    }
}

/// What one client differs from another in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    kind: Use,
    tls: bool,
    loopback: bool,
    /// For the host that the options' identity is for.
    own: bool,
}

/// Clients made on first use and then kept, with their connections.
#[derive(Debug)]
pub(crate) struct Clients {
    options: HttpOptions,
    made: Mutex<HashMap<Key, reqwest::Client>>,
}

impl Clients {
    pub(crate) fn new(options: HttpOptions) -> Self {
        Self { options, made: Mutex::default() }
    }

    pub(crate) fn options(&self) -> &HttpOptions {
        &self.options
    }

    /// The client for `url`. Checks that its scheme is allowed there.
    pub(crate) fn get(&self, url: &Url, kind: Use, source: &str) -> Result<reqwest::Client, SourceError> {
        let host = host_of(url);
        let tls = match url.scheme() {
            "https" => true,
            "http" if self.options.allows_plain(&host) => false,
            "http" => {
                let detail =
                    format!("plain HTTP to {host} is not allowed; mark the host as insecure to allow it");
                return Err(SourceError::new(ErrorClass::Unsupported, source, detail));
            }
            other => {
                let detail = format!("a URL with the scheme `{other}` cannot be fetched");
                return Err(SourceError::new(ErrorClass::Unsupported, source, detail));
            }
        };
        let own = self.options.own_host.as_ref() == Some(&host);
        let key = Key { kind, tls, loopback: is_loopback(&host), own };
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = made.get(&key) {
            return Ok(client.clone());
        }
        let client =
            self.make(key).map_err(|detail| SourceError::new(ErrorClass::Unsupported, source, detail))?;
        made.insert(key, client.clone());
        Ok(client)
    }

    fn make(&self, Key { kind, tls, loopback, own }: Key) -> Result<reqwest::Client, String> {
        let proxy = match &self.options.proxy {
            // Its text may be a secret.
            Some(Proxy(url)) => Some(reqwest::Proxy::all(url).map_err(|_| "the proxy is no URL of one")?),
            None => None,
        };
        let base = || {
            let mut builder = client().connect_timeout(self.options.timeouts.connect);
            builder = match (self.options.version, kind) {
                (Version::One, _) | (Version::Auto, Use::Blobs) => builder.http1_only(),
                (Version::Auto, Use::Documents) => builder,
                // Wide enough that a far server fills the link with one stream.
                (Version::Two, _) => builder
                    .http2_initial_stream_window_size(8 << 20)
                    .http2_initial_connection_window_size(32 << 20),
            };
            match &proxy {
                Some(proxy) => builder.proxy(proxy.clone()),
                None if loopback => builder.no_proxy(),
                None => builder,
            }
        };
        if !tls {
            // Without this the system's roots would be loaded, and their absence would be an error.
            return base().tls_certs_only([]).build().map_err(|error| explain(&error));
        }
        let identity = self.options.identity.as_ref().filter(|_| own).map(identity).transpose()?;
        let base = || {
            let mut builder = base().tls_danger_accept_invalid_certs(own && self.options.skip_verify);
            if let Some(identity) = &identity {
                builder = builder.identity(identity.clone());
            }
            builder
        };
        let mut roots = Vec::new();
        for path in &self.options.extra_ca {
            let named = |problem: String| format!("certificate file {}: {problem}", path.display());
            let pem = std::fs::read(path).map_err(|error| named(error.to_string()))?;
            let found =
                reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| named(explain(&error)))?;
            if found.is_empty() {
                return Err(named("it holds no certificate in PEM form".to_owned()));
            }
            roots.extend(found);
        }
        match base().tls_certs_merge(roots.clone()).build() {
            Ok(client) => Ok(client),
            // No system roots: the given ones alone will do.
            Err(_) if !roots.is_empty() => {
                base().tls_certs_only(roots).build().map_err(|error| explain(&error))
            }
            Err(error) => Err(format!(
                "TLS cannot be set up: {}; install the package `ca-certificates` or give a CA file",
                explain(&error)
            )),
        }
    }
}

/// Reads what a client certificate names.
fn identity(files: &ClientCertificate) -> Result<reqwest::Identity, String> {
    let named = |path: &Path, problem: String| format!("client certificate {}: {problem}", path.display());
    let read = |path: &Path| std::fs::read(path).map_err(|error| named(path, error.to_string()));
    let mut pem = read(&files.certificate)?;
    if let Some(key) = &files.key {
        pem.push(b'\n');
        pem.extend(read(key)?);
    }
    reqwest::Identity::from_pem(&pem).map_err(|error| named(&files.certificate, explain(&error)))
}

/// The error and its causes in one line, without the URL, whose query may be a secret.
fn explain(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.ends_with(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
        cause = error.source();
    }
    if text.is_empty() {
        text = if error.is_timeout() { "timed out".to_owned() } else { "the request failed".to_owned() };
    }
    printable(&text, 300)
}

fn is_certificate_error(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(mut error) = cause {
        // An io::Error hides what it wraps from `source`, and they are nested here.
        while let Some(inner) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            error = inner;
        }
        if let Some(rustls::Error::InvalidCertificate(_)) = error.downcast_ref::<rustls::Error>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What a failure below HTTP means.
pub(crate) fn transport_error(source: &str, url: &Url, error: &reqwest::Error) -> SourceError {
    let (class, hint) = if is_certificate_error(error) {
        (ErrorClass::Certificate, "; give the registry's CA file if it has its own")
    } else if error.is_builder() {
        (ErrorClass::Unsupported, "")
    } else {
        (ErrorClass::Transient, "")
    };
    SourceError::new(class, source, format!("{}: {}{hint}", host_of(url), explain(error)))
}

/// Keeps at most `most` characters, and none that would move a terminal's cursor.
pub(crate) fn printable(text: &str, most: usize) -> String {
    let clean = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(most).collect()
}

/// Most bytes that are read of an error's body; its stated length is not to be believed.
const MAX_ERROR_BODY: usize = 4096;

/// A short account of an error reply. Reads a little of its body and closes the connection.
pub(crate) async fn describe(mut response: reqwest::Response) -> String {
    let status = response.status();
    let mut body = Vec::new();
    let read = async {
        while body.len() < MAX_ERROR_BODY {
            match response.chunk().await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                Ok(None) | Err(_) => break,
            }
        }
    };
    // Whatever came in time is used.
    let _ = tokio::time::timeout(Duration::from_millis(500), read).await;
    body.truncate(MAX_ERROR_BODY);
    let said = said(&body);
    if said.is_empty() { format!("HTTP {status}") } else { format!("HTTP {status}: {said}") }
}

/// The message of an OCI error document, or else the start of a text.
fn said(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Errors>(body) {
        Ok(document) => {
            let all = document.errors.iter().take(3).map(|one| format!("{} {}", one.code, one.message));
            all.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    if text.contains('<') { String::new() } else { printable(&text, 200) }
}

/// Longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

/// The time of a `Retry-After` header, in either form, at most ten minutes.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if text.bytes().all(|c| c.is_ascii_digit()) && !text.is_empty() {
        Duration::from_secs(text.parse().unwrap_or(u64::MAX))
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_schemes() {
        for host in
            ["localhost", "LOCALHOST:5000", "127.0.0.1", "127.9.9.9:1", "[::1]:5000", "[::1]", "a.localhost"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example.org", "10.0.0.1", "example.org:443", "[::2]", "127.0.0.1.example.org"]
        {
            assert!(!is_loopback(host), "{host}");
        }
        let options = HttpOptions {
            insecure: vec!["lab:5000".into(), "10.0.0.1".into()],
            https: vec!["127.0.0.1:5443".into()],
            ..HttpOptions::default()
        };
        assert_eq!(options.scheme("lab:5000"), "http");
        assert_eq!(options.scheme("lab:5001"), "https");
        assert_eq!(options.scheme("10.0.0.1:80"), "http");
        assert_eq!(options.scheme("127.0.0.1:5443"), "https");
        assert_eq!(options.scheme("localhost:5000"), "http");
        assert_eq!(options.scheme("ghcr.io"), "https");
    }

    #[test]
    fn plain_http_elsewhere_is_refused() {
        let clients = Clients::new(HttpOptions::default());
        let url = Url::parse("http://example.org/v2/").unwrap();
        let error = clients.get(&url, Use::Blobs, "test").unwrap_err();
        assert_eq!(error.class, ErrorClass::Unsupported);
        assert!(error.detail.contains("mark the host as insecure"), "{error}");
        let url = Url::parse("ftp://example.org/").unwrap();
        assert!(clients.get(&url, Use::Blobs, "test").is_err());
    }

    #[test]
    fn a_bad_ca_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, "junk").unwrap();
        let clients = Clients::new(HttpOptions { extra_ca: vec![path], ..HttpOptions::default() });
        let url = Url::parse("https://example.org/").unwrap();
        assert!(clients.get(&url, Use::Blobs, "test").unwrap_err().detail.contains("ca.pem"));
    }

    #[test]
    fn what_is_for_one_host_does_not_go_to_another() {
        let certificate = "/nonexistent/client.pem".into();
        let clients = Clients::new(HttpOptions {
            own_host: Some("a.example:8443".into()),
            identity: Some(ClientCertificate { certificate, key: None }),
            skip_verify: true,
            ..HttpOptions::default()
        });
        let get = |url: &str| clients.get(&Url::parse(url).unwrap(), Use::Blobs, "test");
        assert!(get("https://a.example:8443/v2/").unwrap_err().detail.contains("client.pem"));
        for other in ["https://a.example/v2/", "https://storage.example:8443/x"] {
            get(other).unwrap();
        }
    }

    #[test]
    fn retry_after_in_both_forms() {
        let now = httpdate::parse_http_date("Fri, 20 Nov 2026 12:00:00 GMT").unwrap();
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(parse("7"), Some(Duration::from_secs(7)));
        assert_eq!(parse("99999999999999999999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(parse("Fri, 20 Nov 2026 12:00:30 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(parse("Fri, 20 Nov 2026 11:00:00 GMT"), Some(Duration::ZERO));
        for bad in ["", "-1", "soon", "1.5"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn error_documents_are_put_in_words() {
        assert_eq!(
            said(br#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}"#),
            "BLOB_UNKNOWN blob unknown"
        );
        assert_eq!(said(b"out of\x1b[31m order\n"), "out of [31m order");
        assert_eq!(said(b"<html>login</html>"), "");
    }
}
