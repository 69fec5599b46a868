//! A repository of a registry that speaks the OCI distribution protocol.

mod auth;
mod blob;
mod challenge;
mod dragonfly;
mod endpoint;
mod hosts;
mod manifest;
mod pieces;
mod range;
mod redirect;
mod repository;
mod spool;
mod upload;

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, StatusCode};
use url::Url;

use self::auth::{Access, Auth};
use self::endpoint::Endpoint;
use self::pieces::Pieces;
use self::redirect::Targets;
use self::spool::Spools;
use crate::credentials::{Credentials, Secret};
use crate::digest::Digest;
use crate::http::{self, Clients, HttpOptions, Pool, Use};
use crate::reference::RegistryRef;
use crate::source::{ErrorClass, SourceError};
use crate::sources::Health;
use crate::traffic::Role;

pub use dragonfly::Dragonfly;
pub use repository::Repository;
pub use upload::{Payload, SentFn};

/// How to reach registries, and as whom.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// Where credentials come from.
    pub credentials: Credentials,
    /// Time limits, plain HTTP, certificate authorities.
    pub http: HttpOptions,
    /// Where clients for these are shared.
    pub pool: Pool,
    /// Directory with containerd's `HOST/hosts.toml`: mirrors, and how to reach hosts. `None` looks for none.
    pub hosts_dir: Option<PathBuf>,
    /// Where whole blobs of a server without ranges are kept while they are read; `None` for the system's place for
    /// temporary files.
    pub spool_dir: Option<PathBuf>,
    /// Options of S3, by the names that the `object_store` crate has for them (`endpoint`, `region`, …).
    pub s3: Vec<(String, Secret)>,
    /// The node's Dragonfly daemon, asked for blobs before all others.
    pub dragonfly: Option<Dragonfly>,
    /// Blobs larger than this are uploaded in pieces of this many bytes.
    pub upload_piece: u64,
}

/// Where containerd, nerdctl and others look for it.
pub const DEFAULT_HOSTS_DIR: &str = "/etc/containerd/certs.d";

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            credentials: Credentials::default(),
            http: HttpOptions::default(),
            pool: Pool::default(),
            hosts_dir: Some(DEFAULT_HOSTS_DIR.into()),
            spool_dir: None,
            s3: Vec::new(),
            dragonfly: None,
            upload_piece: 64 << 20,
        }
    }
}

/// One repository of a registry. Cheap to clone; clones share connections, tokens and redirect targets.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    /// `host/repository`, for messages.
    name: String,
    host: String,
    repository: String,
    base: Url,
    /// Whether it is a folder of plain files.
    files: bool,
    /// The registry whose content a mirror is to give (`ns`).
    namespace: Option<String>,
    /// What the host is to be sent besides, and nobody else.
    headers: HeaderMap,
    clients: Arc<Clients>,
    health: Arc<Health>,
    /// Counts the bytes of blobs that came.
    received: Arc<AtomicU64>,
    /// Of the node's Dragonfly daemon.
    pieces: Option<Pieces>,
    /// Whether that is to fetch hot blobs whole.
    prefetches: bool,
    auth: Auth,
    targets: Targets,
    upload_piece: u64,
    spools: Spools,
    /// Where whole blobs of a server without ranges are kept for a while.
    spool_dir: Option<PathBuf>,
    /// Until when the host counts as one that ignores ranges.
    no_ranges: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registry").field(&self.inner.name).finish()
    }
}

/// How long a host that ignored a range is not asked for another one.
const NO_RANGES_FOR: Duration = Duration::from_secs(60);

/// One request as it is to arrive, whatever the redirects and challenges on the way.
struct Call<'a> {
    method: Method,
    url: Url,
    headers: HeaderMap,
    payload: Option<&'a Payload>,
    access: Access,
    kind: Use,
    /// The blob whose redirect target may be remembered and used.
    blob: Option<Digest>,
    /// Longest wait for the head of the reply; `None` for the usual.
    patience: Option<Duration>,
}

impl Registry {
    /// A repository at the registry itself. No request is made yet.
    pub fn new(reference: &RegistryRef, options: &RegistryOptions) -> Result<Self, SourceError> {
        let endpoint = Endpoint::of_registry(reference.host(), &options.http)
            .map_err(|detail| SourceError::new(ErrorClass::Unsupported, reference.host(), detail))?;
        Self::at(endpoint, reference, options)
    }

    /// A folder of files on a web server, in which blobs lie as in an OCI layout.
    pub(crate) fn of_files(url: &Url, options: &RegistryOptions) -> Result<Self, SourceError> {
        let mut root = url.clone();
        root.set_path(&format!("{}/", url.path().trim_end_matches('/')));
        let host = http::host_of(url);
        let repository = url.path().trim_matches('/').to_owned();
        let name = url.as_str().trim_end_matches('/').to_owned();
        let (headers, http) = (HeaderMap::new(), options.http.clone());
        let endpoint = Endpoint { root, host, namespace: None, headers, http, role: Role::Registry };
        Ok(Self::with(name, endpoint.root.clone(), endpoint, repository, options, true))
    }

    /// A repository at one of the hosts that serve it.
    pub(crate) fn at(
        endpoint: Endpoint,
        reference: &RegistryRef,
        options: &RegistryOptions,
    ) -> Result<Self, SourceError> {
        let repository = reference.repository();
        let name = match (&endpoint.namespace, endpoint.role) {
            (_, Role::Peers) => format!("Dragonfly for {}/{repository}", endpoint.host),
            (None, _) => format!("{}/{repository}", endpoint.host),
            (Some(namespace), _) => format!("{} for {namespace}/{repository}", endpoint.host),
        };
        let base = endpoint.root.join(&format!("{repository}/")).map_err(|error| {
            let detail = format!("no URL can be made of it: {error}");
            SourceError::new(ErrorClass::Unsupported, name.as_str(), detail)
        })?;
        Ok(Self::with(name, base, endpoint, repository.to_owned(), options, false))
    }

    fn with(
        name: String,
        base: Url,
        endpoint: Endpoint,
        repository: String,
        options: &RegistryOptions,
        files: bool,
    ) -> Self {
        let Endpoint { host, namespace, headers, http, role, .. } = endpoint;
        let clients = options.pool.clients(&http);
        let health = options.pool.health(&base, role == Role::Peers);
        let received = options.pool.traffic().of(role);
        // The issuer of tokens is reached as the registry is, not by way of the peers.
        let issuers =
            if role == Role::Peers { options.pool.clients(&options.http) } else { Arc::clone(&clients) };
        let mut auth = Auth::new(&name, &host, &repository, options.credentials.clone(), issuers);
        if role == Role::Peers {
            auth = auth.without_passwords();
        }
        Self {
            inner: Arc::new(Inner {
                name,
                host,
                repository,
                base,
                files,
                namespace,
                headers,
                clients,
                health,
                received,
                pieces: (role == Role::Peers).then(Pieces::default),
                prefetches: options.dragonfly.as_ref().is_some_and(|dragonfly| dragonfly.prefetch),
                auth,
                targets: Targets::default(),
                upload_piece: options.upload_piece.max(1 << 20),
                spools: Spools::default(),
                spool_dir: options.spool_dir.clone(),
                no_ranges: Mutex::default(),
            }),
        }
    }

    /// How the host has been doing.
    pub(crate) fn health(&self) -> Arc<Health> {
        Arc::clone(&self.inner.health)
    }

    /// Host, with its port if it has one.
    pub fn host(&self) -> &str {
        &self.inner.host
    }

    /// The repository's name.
    pub fn repository(&self) -> &str {
        &self.inner.repository
    }

    fn error(&self, class: ErrorClass, detail: impl Into<Box<str>>) -> SourceError {
        SourceError::new(class, self.inner.name.as_str(), detail)
    }

    fn url(&self, path: &str) -> Result<Url, SourceError> {
        let mut url =
            self.inner.base.join(path).map_err(|error| {
                self.error(ErrorClass::Unsupported, format!("no URL for `{path}`: {error}"))
            })?;
        if let Some(namespace) = &self.inner.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    fn blob_url(&self, blob: &Digest) -> Result<Url, SourceError> {
        if self.inner.files {
            self.url(&format!("blobs/sha256/{}", blob.hex()))
        } else {
            self.url(&format!("blobs/{blob}"))
        }
    }

    fn call<'a>(&self, method: Method, url: Url, access: Access, kind: Use) -> Call<'a> {
        Call {
            method,
            url,
            headers: HeaderMap::new(),
            payload: None,
            access,
            kind,
            blob: None,
            patience: None,
        }
    }

    /// Turns a reply that is not the wanted one into an error.
    async fn unexpected(&self, what: &str, response: reqwest::Response) -> SourceError {
        let (status, after) = (response.status(), http::retry_after(response.headers(), SystemTime::now()));
        let (class, after) = match dragonfly::own_refusal(status, response.headers()) {
            Some(pause) => (ErrorClass::Transient, Some(pause)),
            None => (range::status_class(status), after),
        };
        let detail = format!("{what}: {}", http::describe(response).await);
        let after = after.filter(|_| class == ErrorClass::Transient);
        self.error(class, detail).retry_after(after)
    }

    /// The body of a small document.
    async fn document(
        &self,
        what: &str,
        mut response: reqwest::Response,
        cap: u64,
    ) -> Result<Vec<u8>, SourceError> {
        let idle = self.inner.clients.options().timeouts.idle;
        let mut bytes = Vec::new();
        loop {
            let piece = match tokio::time::timeout(idle, response.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => return Ok(bytes),
                Ok(Err(error)) => {
                    return Err(http::transport_error(&self.inner.name, response.url(), &error));
                }
                Err(_) => {
                    let detail = format!("{what}: no byte came for {} ms", idle.as_millis());
                    return Err(self.error(ErrorClass::Transient, detail));
                }
            };
            bytes.extend_from_slice(&piece);
            if u64::try_from(bytes.len()).is_ok_and(|length| length > cap) {
                let detail = format!("{what} is larger than {cap} bytes");
                return Err(self.error(ErrorClass::BadReply, detail));
            }
        }
    }

    fn ignores_ranges(&self) -> bool {
        let mut until = self.inner.no_ranges.lock().unwrap_or_else(PoisonError::into_inner);
        match *until {
            Some(time) if time > Instant::now() => true,
            _ => {
                *until = None;
                false
            }
        }
    }

    fn mark_no_ranges(&self) {
        let mut until = self.inner.no_ranges.lock().unwrap_or_else(PoisonError::into_inner);
        *until = Some(Instant::now() + NO_RANGES_FOR);
    }

    /// Sends a call: shows what the registry knows us by, answers challenges, follows redirects. The reply
    /// may have any status except a redirect or a 401 that could be answered.
    async fn send(&self, call: &Call<'_>) -> Result<reqwest::Response, SourceError> {
        let cached = call.blob.and_then(|blob| self.inner.targets.get(&blob));
        let mut from_cache = cached.is_some();
        let mut url = cached.unwrap_or_else(|| call.url.clone());
        let (mut hops, mut round) = (0, 0);
        loop {
            // Only the registry itself may see our credentials.
            let at_registry = url.origin() == self.inner.base.origin();
            let shown = if at_registry { Some(self.inner.auth.show(call.access).await) } else { None };
            let result =
                self.send_once(call, &url, shown.as_ref().and_then(|shown| shown.header.as_ref())).await;
            if from_cache && target_is_stale(&result) {
                // Its signature may have ended early: ask the registry once, then judge.
                if let Some(blob) = &call.blob {
                    self.inner.targets.drop_target(blob);
                }
                from_cache = false;
                url = call.url.clone();
                continue;
            }
            let response = result?;
            match response.status().as_u16() {
                401 => {
                    let Some(shown) = shown else { return Ok(response) };
                    self.inner.auth.refused(call.access, &shown, response.headers(), round).await?;
                    round += 1;
                }
                code @ (301 | 302 | 303 | 307 | 308) => {
                    let keeps_method = call.method == Method::GET || call.method == Method::HEAD;
                    if !keeps_method && code < 307 {
                        let detail = format!("HTTP {code} for a {} request", call.method);
                        return Err(self.error(ErrorClass::BadReply, detail));
                    }
                    hops += 1;
                    if hops > redirect::MAX_HOPS {
                        let detail = format!("more than {} redirects", redirect::MAX_HOPS);
                        return Err(self.error(ErrorClass::BadReply, detail));
                    }
                    url = self.follow(&url, &response)?;
                    // Permanent or not: what matters is how long the target's signature lives.
                    if let Some(blob) = call.blob.filter(|_| call.method == Method::GET) {
                        self.inner.targets.put(blob, url.clone());
                    }
                }
                _ => return Ok(response),
            }
        }
    }

    fn follow(&self, from: &Url, response: &reqwest::Response) -> Result<Url, SourceError> {
        let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let status = response.status();
        let location = location
            .ok_or_else(|| self.error(ErrorClass::BadReply, format!("HTTP {status} without a Location")))?;
        redirect::resolve(from, location, self.inner.clients.options())
            .map_err(|detail| self.error(ErrorClass::BadReply, detail))
    }

    async fn send_once(
        &self,
        call: &Call<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<reqwest::Response, SourceError> {
        let client = self.inner.clients.get(url, call.kind, &self.inner.name)?;
        let mut request = client
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone())
            .header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if url.origin() == self.inner.base.origin() {
            request = request.headers(self.inner.headers.clone());
        }
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        if let Some(payload) = call.payload {
            request = payload
                .attach(request)
                .await
                .map_err(|error| self.error(ErrorClass::Io, format!("{}: {error}", payload.name())))?;
        }
        let timeouts = self.inner.clients.options().timeouts;
        let patience = timeouts.connect + call.patience.unwrap_or(timeouts.first_byte);
        match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(http::transport_error(&self.inner.name, url, &error)),
            Err(_) => {
                let detail = format!("{} gave no reply in {} ms", http::host_of(url), patience.as_millis());
                Err(self.error(ErrorClass::Transient, detail))
            }
        }
    }
}

fn target_is_stale(result: &Result<reqwest::Response, SourceError>) -> bool {
    const STALE: [StatusCode; 5] = [
        StatusCode::BAD_REQUEST,
        StatusCode::UNAUTHORIZED,
        StatusCode::FORBIDDEN,
        StatusCode::NOT_FOUND,
        StatusCode::GONE,
    ];
    result.as_ref().map_or(true, |response| STALE.contains(&response.status()))
}
