//! The node's Dragonfly daemon as one more host of a registry's blobs.
//!
//! It takes requests for blobs at its registry mirror and gets them from peers, or from the registry itself. Headers and
//! their meaning: dragonfly-client 1.5, `dragonfly-client/src/proxy/header.rs`.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::endpoint::Endpoint;
use crate::digest::Digest;
use crate::http::{self, HttpOptions, Pool, Use};
use crate::source::SourceError;
use crate::traffic::Role;

/// The registry that it is to ask, `scheme://host[:port]`, joined with the path as text.
const UPSTREAM: HeaderName = HeaderName::from_static("x-dragonfly-registry");
/// To use peers though none of its rules says so.
const PEERS: HeaderName = HeaderName::from_static("x-dragonfly-use-p2p");
/// To use them for small ranges, too: client 1.5.10 and later.
const POLICY: HeaderName = HeaderName::from_static("x-dragonfly-scheduling-policy");
/// To fetch the whole blob behind a range.
pub(super) const PREFETCH: HeaderName = HeaderName::from_static("x-dragonfly-prefetch");

/// Where the node's daemon is, and what it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dragonfly {
    /// The root of its registry mirror, `http://127.0.0.1:4001`.
    pub endpoint: Url,
    /// Whether it is to fetch the whole of a blob that is hot here.
    pub prefetch: bool,
}

impl Dragonfly {
    /// Reads the endpoint's URL.
    ///
    /// # Errors
    /// It is none, or has a path.
    pub fn new(endpoint: &str, prefetch: bool) -> Result<Self, String> {
        let url = Url::parse(endpoint).map_err(|error| format!("`{endpoint}` is no URL: {error}"))?;
        let plain = matches!(url.path(), "" | "/") && url.query().is_none() && url.username().is_empty();
        if !matches!(url.scheme(), "http" | "https") || !plain {
            return Err(format!("`{endpoint}` is not http://HOST:PORT"));
        }
        Ok(Self { endpoint: url, prefetch })
    }

    /// Whether it answers requests: one that hangs takes connections all the same. It is sent to a registry that is not
    /// there, which any reply may say.
    ///
    /// # Errors
    /// It does not.
    pub async fn answers(&self) -> Result<(), SourceError> {
        const NOBODY: HeaderValue = HeaderValue::from_static("http://127.0.0.1:1");
        let mut url = self.endpoint.clone();
        url.set_path(&format!("/v2/skimmer/blobs/{}", Digest::of(b"")));
        let http = HttpOptions { insecure: vec![http::host_of(&url)], ..HttpOptions::default() };
        let client = Pool::default().clients(&http).get(&url, Use::Documents, "Dragonfly")?;
        let reply = client.get(url.clone()).header(UPSTREAM, NOBODY).send().await;
        reply.map(drop).map_err(|error| http::transport_error("Dragonfly", &url, &error))
    }

    /// The host in front of another one.
    ///
    /// # Errors
    /// What was named cannot be put into a URL or a header.
    pub(super) fn before(&self, upstream: &Endpoint, http: &HttpOptions) -> Result<Endpoint, String> {
        let mut root = self.endpoint.clone();
        root.set_path(upstream.root.path());
        let upstream_root = upstream.root.origin().ascii_serialization();
        let value = HeaderValue::try_from(upstream_root).map_err(|error| error.to_string())?;
        let headers = HeaderMap::from_iter([
            (UPSTREAM, value),
            (PEERS, HeaderValue::from_static("true")),
            (POLICY, HeaderValue::from_static("always")),
        ]);
        let mut http = HttpOptions {
            extra_ca: http.extra_ca.clone(),
            timeouts: http.timeouts,
            ..HttpOptions::default()
        };
        if root.scheme() == "http" {
            http.insecure.push(http::host_of(&root));
        }
        // Credentials are those for the registry, which sees them in the end.
        Ok(Endpoint { root, host: upstream.host.clone(), namespace: None, headers, http, role: Role::Peers })
    }
}

/// Who failed, when a request does.
const WHO: HeaderName = HeaderName::from_static("x-dragonfly-error-type");
/// How long a daemon is left alone that will not serve us now: for want of space, or by its own rules.
const PAUSE: Duration = Duration::from_secs(30);

/// How long to leave the daemon alone after a reply that says what it has against the request, and not what the registry
/// has; `None` for other replies.
pub(super) fn own_refusal(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    match (headers.get(WHO)?.as_bytes(), status.as_u16()) {
        (b"proxy", _) | (b"dfdaemon", 507) => Some(PAUSE),
        (b"dfdaemon", _) => Some(Duration::ZERO),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_refusals_are_told_from_the_registry_s() {
        let refusal = |who: Option<&'static str>, code| {
            let headers = who.map(|who| (WHO, HeaderValue::from_static(who)));
            own_refusal(StatusCode::from_u16(code).unwrap(), &headers.into_iter().collect())
        };
        assert_eq!(refusal(Some("proxy"), 403), Some(PAUSE));
        assert_eq!(refusal(Some("dfdaemon"), 507), Some(PAUSE));
        assert_eq!(refusal(Some("dfdaemon"), 422), Some(Duration::ZERO));
        assert_eq!(refusal(Some("backend"), 403), None);
        assert_eq!(refusal(None, 403), None);
    }

    #[test]
    fn it_stands_before_the_registry() {
        let options = HttpOptions::default();
        let upstream = Endpoint::of_registry("registry.example:5000", &options).unwrap();
        let dragonfly = Dragonfly::new("http://127.0.0.1:4001", true).unwrap();
        let endpoint = dragonfly.before(&upstream, &options).unwrap();
        assert_eq!(endpoint.root.as_str(), "http://127.0.0.1:4001/v2/");
        assert_eq!(endpoint.host, "registry.example:5000");
        let header = |name: &str| endpoint.headers.get(name).unwrap().to_str().unwrap().to_owned();
        assert_eq!(header("x-dragonfly-registry"), "https://registry.example:5000");
        assert_eq!(header("x-dragonfly-scheduling-policy"), "always");
        for bad in ["127.0.0.1:4001", "ftp://a", "http://a/b", "http://u:p@a", "http://a?b=c"] {
            assert!(Dragonfly::new(bad, false).is_err(), "{bad}");
        }
    }
}
