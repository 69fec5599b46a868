//! The state of our standing with a registry: nothing, Basic, or Bearer tokens that are fetched and renewed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderValue, LOCATION, WWW_AUTHENTICATE};
use serde::Deserialize;
use url::Url;

use super::challenge::{self, Challenge};
use crate::credentials::{Credential, Credentials, Found, Secret};
use crate::http::{self, Clients, Use};
use crate::source::{ErrorClass, SourceError};

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reading.
    Pull,
    /// Reading and writing.
    Push,
}

impl Access {
    fn index(self) -> usize {
        usize::from(self == Self::Push)
    }

    fn actions(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "pull,push",
        }
    }
}

/// The header of one attempt, so that a refusal can be told from a refusal of an older one.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    pub(crate) header: Option<HeaderValue>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Basic,
    Bearer { serial: u64 },
}

#[derive(Clone)]
struct Token {
    header: HeaderValue,
    serial: u64,
    renew_at: Instant,
    expires_at: Instant,
}

/// Where tokens come from, remembered so that a renewal needs no failed request.
#[derive(Clone)]
struct Issuer {
    realm: Url,
    service: Option<String>,
    scopes: Vec<String>,
}

type Flight = Shared<BoxFuture<'static, Result<Token, SourceError>>>;

#[derive(Default)]
struct Slot {
    token: Option<Token>,
    issuer: Option<Issuer>,
    flight: Option<Flight>,
}

#[derive(Default)]
struct State {
    basic: Option<HeaderValue>,
    slots: [Slot; 2],
    serial: u64,
}

/// How often one request may be repeated after 401. Enough for: a stale token, a new one, and one more.
pub(crate) const MAX_ROUNDS: u32 = 3;
/// Life of a token that does not state one (distribution token spec).
const DEFAULT_LIFE: u64 = 60;
/// Longest life that is believed.
const MAX_LIFE: u64 = 24 * 3600;
/// Largest token reply that is read.
const MAX_REPLY: usize = 256 * 1024;
/// Redirects of the token endpoint to itself that are followed.
const MAX_REDIRECTS: u32 = 3;

/// Shared by all requests to one repository.
#[derive(Clone)]
pub(crate) struct Auth(Arc<Inner>);

struct Inner {
    name: String,
    host: String,
    repository: String,
    credentials: Credentials,
    clients: Arc<Clients>,
    /// Whether a password may be shown; tokens live for minutes.
    passwords: bool,
    state: Mutex<State>,
}

impl Auth {
    pub(crate) fn new(
        name: &str,
        host: &str,
        repository: &str,
        credentials: Credentials,
        clients: Arc<Clients>,
    ) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            host: host.to_owned(),
            repository: repository.to_owned(),
            credentials,
            clients,
            passwords: true,
            state: Mutex::default(),
        }))
    }

    /// For a host that hands on what it is shown, and does not look to whom.
    pub(crate) fn without_passwords(self) -> Self {
        let Inner { name, host, repository, credentials, clients, .. } = &*self.0;
        let (name, host, repository) = (name.clone(), host.clone(), repository.clone());
        let (credentials, clients) = (credentials.clone(), Arc::clone(clients));
        let state = Mutex::default();
        Self(Arc::new(Inner { name, host, repository, credentials, clients, passwords: false, state }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to show with the next request. Renews a token that is about to expire.
    pub(crate) async fn show(&self, access: Access) -> Shown {
        let now = Instant::now();
        let (old, issuer) = {
            let state = self.state();
            if let Some(header) = &state.basic {
                return Shown { header: Some(header.clone()), kind: Kind::Basic };
            }
            let slot = &state.slots[access.index()];
            (slot.token.clone().filter(|token| token.expires_at > now), slot.issuer.clone())
        };
        let token = match (old, issuer) {
            (Some(token), _) if token.renew_at > now => Some(token),
            // A failed renewal is no failure yet: the old token may serve, or the reply to none will tell.
            (old, Some(issuer)) => self.fetch(access, issuer, false).await.ok().or(old),
            (old, None) => old,
        };
        match token {
            Some(token) => Shown { header: Some(token.header), kind: Kind::Bearer { serial: token.serial } },
            None => Shown { header: None, kind: Kind::Nothing },
        }
    }

    /// Judges a 401. `Ok` means: repeat the request with what [`show`](Self::show) then gives.
    pub(crate) async fn refused(
        &self,
        access: Access,
        shown: &Shown,
        headers: &HeaderMap,
        round: u32,
    ) -> Result<(), SourceError> {
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|header| header.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let find = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        if round >= MAX_ROUNDS {
            return Err(self.denied("the registry refuses the token that it gave us", None));
        }
        if let Some(bearer) = find("bearer") {
            return self.refused_bearer(access, shown, bearer, round).await;
        }
        if find("basic").is_some() {
            return self.refused_basic(access, shown, round).await;
        }
        Err(self.denied("HTTP 401 without a Bearer or Basic challenge", None))
    }

    async fn refused_bearer(
        &self,
        access: Access,
        shown: &Shown,
        challenge: &Challenge,
        round: u32,
    ) -> Result<(), SourceError> {
        let issuer = self.issuer(access, challenge)?;
        {
            let mut state = self.state();
            state.basic = None;
            let slot = &mut state.slots[access.index()];
            slot.issuer = Some(issuer.clone());
            match (&slot.token, shown.kind) {
                // Another request has renewed it meanwhile.
                (Some(token), Kind::Bearer { serial }) if token.serial != serial => return Ok(()),
                (Some(_), Kind::Nothing | Kind::Basic) if round == 0 => return Ok(()),
                _ => slot.token = None,
            }
        }
        self.fetch(access, issuer, round > 0).await.map(drop)
    }

    async fn refused_basic(&self, access: Access, shown: &Shown, round: u32) -> Result<(), SourceError> {
        if let Kind::Bearer { .. } = shown.kind {
            // Some registries (Harbor) answer a stale token so. Without it they will show their challenge.
            let slot = &mut self.state().slots[access.index()];
            (slot.token, slot.issuer) = (None, None);
            return Ok(());
        }
        if !self.0.passwords {
            return Err(self.denied("the registry wants a password, which peers are not shown", None));
        }
        let find = |fresh| self.0.credentials.find(&self.0.host, &self.0.repository, fresh);
        let header_of = |found: &Found| match &found.credential {
            Credential::Password { user, password } => basic(user, password),
            Credential::Anonymous | Credential::IdentityToken(_) => None,
        };
        let mut found = find(round > 0).await;
        let mut header = header_of(&found);
        if round == 0 && shown.kind == Kind::Basic && header == shown.header {
            // It was good once: there may be another one by now.
            found = find(true).await;
            header = header_of(&found);
        }
        if let Credential::IdentityToken(_) = found.credential {
            return Err(
                self.denied("the registry wants a user and password, we have an identity token", None)
            );
        }
        let Some(header) = header else {
            let detail = "the registry wants a user and password, and there is none for it";
            return Err(self.denied(detail, Some(&found)));
        };
        let mut state = self.state();
        if shown.kind == Kind::Basic && shown.header.as_ref() == Some(&header) {
            state.basic = None;
            drop(state);
            return Err(self.denied("the registry refuses the user and password", Some(&found)));
        }
        state.basic = Some(header);
        Ok(())
    }

    fn denied(&self, detail: &str, found: Option<&Found>) -> SourceError {
        let problem = found.and_then(|found| found.problem.as_ref());
        let detail = match problem {
            Some(problem) => format!("{detail} ({problem})"),
            None => {
                format!("{detail}; log in with `docker login` or `podman login`, or give a user and password")
            }
        };
        SourceError::new(ErrorClass::Denied, self.0.name.as_str(), detail)
    }

    fn bad(&self, detail: impl Into<Box<str>>) -> SourceError {
        SourceError::new(ErrorClass::BadReply, self.0.name.as_str(), detail)
    }

    fn issuer(&self, access: Access, challenge: &Challenge) -> Result<Issuer, SourceError> {
        let realm = challenge.param("realm").ok_or_else(|| self.bad("the Bearer challenge has no realm"))?;
        let mut realm = Url::parse(realm).map_err(|_| self.bad("the Bearer challenge's realm is no URL"))?;
        if !realm.username().is_empty() || realm.password().is_some() || realm.host_str().is_none() {
            return Err(self.bad("the Bearer challenge's realm is no plain URL"));
        }
        realm.set_fragment(None);
        let scopes: Vec<String> = match challenge.param("scope") {
            Some(scope) => scope.split_ascii_whitespace().map(str::to_owned).collect(),
            None => vec![format!("repository:{}:{}", self.0.repository, access.actions())],
        };
        Ok(Issuer { realm, service: challenge.param("service").map(str::to_owned), scopes })
    }

    /// Gets a token; requests that want the same one wait together. The fetch is a task of its own, so that
    /// it goes on when the request that began it is dropped.
    async fn fetch(&self, access: Access, issuer: Issuer, fresh: bool) -> Result<Token, SourceError> {
        let flight = {
            let mut state = self.state();
            let slot = &mut state.slots[access.index()];
            match &slot.flight {
                Some(flight) => flight.clone(),
                None => {
                    let auth = self.clone();
                    let task = tokio::spawn(async move { auth.obtain(access, issuer, fresh).await });
                    let name = self.0.name.clone();
                    let flight = async move {
                        task.await.unwrap_or_else(|error| {
                            let detail = format!("the token request ended early: {error}");
                            Err(SourceError::new(ErrorClass::Transient, name, detail))
                        })
                    };
                    let flight = flight.boxed().shared();
                    slot.flight = Some(flight.clone());
                    flight
                }
            }
        };
        let result = flight.clone().await;
        let slot = &mut self.state().slots[access.index()];
        if slot.flight.as_ref().is_some_and(|current| current.ptr_eq(&flight)) {
            slot.flight = None;
        }
        result
    }

    /// The body of a flight: asks, and stores the token.
    async fn obtain(&self, access: Access, issuer: Issuer, fresh: bool) -> Result<Token, SourceError> {
        let find = |fresh| self.0.credentials.find(&self.0.host, &self.0.repository, fresh);
        let found = find(fresh).await;
        let mut reply = self.ask(&issuer, &found).await;
        if reply.as_ref().is_err_and(|error| error.class == ErrorClass::Denied) && !fresh {
            // What a credential program said may be too old, and somebody may have another login by now.
            let other = find(true).await;
            if other.credential != found.credential {
                reply = self.ask(&issuer, &other).await;
            }
        }
        let reply = reply?;
        let text = reply.token.filter(|token| !token.is_empty()).or(reply.access_token).unwrap_or_default();
        let header = HeaderValue::try_from(format!("Bearer {text}")).ok().filter(|_| !text.is_empty());
        let mut header = header.ok_or_else(|| self.bad("the token endpoint's reply has no usable token"))?;
        header.set_sensitive(true);
        let life = Duration::from_secs(reply.expires_in.unwrap_or(DEFAULT_LIFE).clamp(1, MAX_LIFE));
        let now = Instant::now();
        let mut state = self.state();
        state.serial += 1;
        let token =
            Token { header, serial: state.serial, renew_at: now + renew_after(life), expires_at: now + life };
        state.slots[access.index()].token = Some(token.clone());
        Ok(token)
    }

    async fn ask(&self, issuer: &Issuer, found: &Found) -> Result<Reply, SourceError> {
        let timeouts = self.0.clients.options().timeouts;
        let limit = timeouts.connect + timeouts.first_byte + timeouts.idle;
        tokio::time::timeout(limit, self.request(issuer, found)).await.unwrap_or_else(|_| {
            let detail = format!("token endpoint {} gave no answer", http::host_of(&issuer.realm));
            Err(SourceError::new(ErrorClass::Transient, self.0.name.as_str(), detail))
        })
    }

    async fn request(&self, issuer: &Issuer, found: &Found) -> Result<Reply, SourceError> {
        let mut url = issuer.realm.clone();
        let mut redirects = 0;
        loop {
            let client = self.0.clients.get(&url, Use::Documents, &self.0.name)?;
            let request = match &found.credential {
                Credential::IdentityToken(token) => client.post(url.clone()).form(&grant(issuer, token)),
                other => {
                    let mut asked = url.clone();
                    if redirects == 0 {
                        add_query(&mut asked, issuer, other);
                    }
                    let request = client.get(asked);
                    match other {
                        Credential::Password { user, password } => {
                            request.basic_auth(user, Some(password.reveal()))
                        }
                        _ => request,
                    }
                }
            };
            let response =
                request.send().await.map_err(|error| http::transport_error(&self.0.name, &url, &error))?;
            if response.status().is_redirection() {
                redirects += 1;
                url = self.same_origin(&url, response.headers(), redirects)?;
                continue;
            }
            return self.read(response, &url, found).await;
        }
    }

    /// The token endpoint may redirect only to itself: elsewhere our credentials would go along.
    fn same_origin(&self, url: &Url, headers: &HeaderMap, count: u32) -> Result<Url, SourceError> {
        let location = headers.get(LOCATION).and_then(|location| location.to_str().ok());
        let next = location.and_then(|location| url.join(location).ok());
        match next {
            Some(next) if next.origin() == url.origin() && count <= MAX_REDIRECTS => Ok(next),
            Some(_) if count > MAX_REDIRECTS => Err(self.bad("the token endpoint redirects without end")),
            Some(next) => Err(self.bad(format!(
                "the token endpoint redirects to {}, where our credentials may not go",
                http::host_of(&next)
            ))),
            None => Err(self.bad("the token endpoint redirects to nowhere")),
        }
    }

    async fn read(
        &self,
        mut response: reqwest::Response,
        url: &Url,
        found: &Found,
    ) -> Result<Reply, SourceError> {
        let host = http::host_of(url);
        let status = response.status();
        if status != StatusCode::OK {
            let after = http::retry_after(response.headers(), SystemTime::now());
            let detail = format!("token endpoint {host}: {}", http::describe(response).await);
            return Err(match super::range::status_class(status) {
                ErrorClass::Denied => self.denied(&detail, Some(found)),
                ErrorClass::Transient => {
                    SourceError::new(ErrorClass::Transient, self.0.name.as_str(), detail).retry_after(after)
                }
                _ => self.bad(detail),
            });
        }
        let mut body = Vec::new();
        while let Some(piece) =
            response.chunk().await.map_err(|error| http::transport_error(&self.0.name, url, &error))?
        {
            if body.len() + piece.len() > MAX_REPLY {
                return Err(
                    self.bad(format!("token endpoint {host}: the reply is larger than {MAX_REPLY} bytes"))
                );
            }
            body.extend_from_slice(&piece);
        }
        // The parser's message could quote the token.
        serde_json::from_slice(&body)
            .map_err(|_| self.bad(format!("token endpoint {host}: the reply is not the expected JSON")))
    }
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

fn basic(user: &str, password: &Secret) -> Option<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{}", password.reveal()));
    let mut header = HeaderValue::try_from(format!("Basic {pair}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// The form of a refresh-token grant (distribution oauth2 spec).
fn grant(issuer: &Issuer, token: &Secret) -> Vec<(&'static str, String)> {
    let mut form = vec![
        ("grant_type", "refresh_token".to_owned()),
        ("refresh_token", token.reveal().to_owned()),
        ("client_id", "skimmer".to_owned()),
        ("scope", issuer.scopes.join(" ")),
    ];
    form.extend(issuer.service.iter().map(|service| ("service", service.clone())));
    form
}

fn add_query(url: &mut Url, issuer: &Issuer, credential: &Credential) {
    let mut query = url.query_pairs_mut();
    if let Some(service) = &issuer.service {
        query.append_pair("service", service);
    }
    for scope in &issuer.scopes {
        query.append_pair("scope", scope);
    }
    if let Credential::Password { user, .. } = credential {
        query.append_pair("account", user);
    }
}

/// When to renew a token of this life: some time before its end, and not all clients at once.
fn renew_after(life: Duration) -> Duration {
    use std::hash::{BuildHasher as _, Hasher as _};
    let margin = (life / 4).min(Duration::from_secs(20));
    let jitter = (life / 10).min(Duration::from_secs(300));
    let random = std::hash::RandomState::new().build_hasher().finish() % 1000;
    life.saturating_sub(margin).saturating_sub(jitter * u32::try_from(random).unwrap_or(0) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_before_their_end() {
        for seconds in [1, 60, 300, 86_400] {
            let life = Duration::from_secs(seconds);
            let after = renew_after(life);
            assert!(after < life && after >= life / 2, "{seconds}: {after:?}");
        }
    }

    #[test]
    fn a_basic_header_is_marked_sensitive() {
        let header = basic("user", &Secret::new("pass")).unwrap();
        assert_eq!(header.as_bytes(), b"Basic dXNlcjpwYXNz");
        assert!(header.is_sensitive());
    }
}
