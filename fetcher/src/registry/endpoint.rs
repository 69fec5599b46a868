//! One HTTP root that serves repositories: a registry, or a mirror of one.

use reqwest::header::HeaderMap;
use url::Url;

use crate::http::{self, HttpOptions};
use crate::traffic::Role;

/// Where a registry's API is, and how it is reached.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// The API's root, with a slash at its end.
    pub(crate) root: Url,
    /// `host[:port]`, for credentials and messages.
    pub(crate) host: String,
    /// The registry it is a mirror of.
    pub(crate) namespace: Option<String>,
    /// Headers for this host alone.
    pub(crate) headers: HeaderMap,
    /// How it is reached.
    pub(crate) http: HttpOptions,
    /// What it is to us.
    pub(crate) role: Role,
}

const DOCKER_HUB: [&str; 2] = ["docker.io", "registry-1.docker.io"];

impl Endpoint {
    /// The registry that a name speaks of.
    pub(crate) fn of_registry(host: &str, http: &HttpOptions) -> Result<Self, String> {
        let api_host = if host == DOCKER_HUB[0] { DOCKER_HUB[1] } else { host };
        let root = Url::parse(&format!("{}://{api_host}/v2/", http.scheme(host)))
            .map_err(|error| format!("no URL can be made of it: {error}"))?;
        let (host, http) = (host.to_owned(), http.clone());
        Ok(Self { root, host, namespace: None, headers: HeaderMap::new(), http, role: Role::Registry })
    }

    /// Keeps what is for this host alone from hosts that it redirects to. Options without such stay as they are, so
    /// that their clients are shared.
    pub(super) fn keep_to_host(&mut self) {
        if self.http.identity.is_some() || self.http.skip_verify {
            self.http.own_host = Some(http::host_of(&self.root));
        }
    }

    /// What `url` of a `hosts.toml` names, for images of `namespace`. A URL without a scheme gets the one that the
    /// options have for its host; one with a scheme is used as it is written.
    pub(crate) fn of_url(
        url: &str,
        override_path: bool,
        namespace: &str,
        http: &HttpOptions,
    ) -> Result<Self, String> {
        let mut http = http.clone();
        let whole = if url.contains("://") {
            url.to_owned()
        } else {
            let host = url.split('/').next().unwrap_or_default();
            format!("{}://{url}", http.scheme(host))
        };
        let mut root = Url::parse(&whole).map_err(|error| format!("`{url}` is no URL: {error}"))?;
        if root.host_str().is_none_or(str::is_empty) || !matches!(root.scheme(), "http" | "https") {
            return Err(format!("`{url}` is no URL with http or https and a host"));
        }
        if !root.username().is_empty() || root.password().is_some() || root.query().is_some() {
            return Err("a host's URL holds neither a user nor a query".to_owned());
        }
        let mut path = root.path().trim_end_matches('/').to_owned();
        if !override_path && !path.ends_with("/v2") {
            path.push_str("/v2");
        }
        path.push('/');
        root.set_path(&path);
        let host = http::host_of(&root);
        if root.scheme() == "http" && !http.allows_plain(&host) {
            http.insecure.push(host.clone());
        }
        let hub = DOCKER_HUB.contains(&namespace) && DOCKER_HUB.contains(&host.as_str());
        let mirrors = (host != namespace && !hub).then(|| namespace.to_owned());
        let host = if hub { DOCKER_HUB[0].to_owned() } else { host };
        let role = if mirrors.is_some() { Role::Mirror } else { Role::Registry };
        Ok(Self { root, host, namespace: mirrors, headers: HeaderMap::new(), http, role })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_and_namespaces() {
        let http = HttpOptions::default();
        let of = |url, override_path| Endpoint::of_url(url, override_path, "docker.io", &http).unwrap();
        for (url, override_path, root, namespace) in [
            ("https://mirror.example", false, "https://mirror.example/v2/", true),
            ("mirror.example:5000", false, "https://mirror.example:5000/v2/", true),
            ("http://mirror.example", false, "http://mirror.example/v2/", true),
            ("127.0.0.1:65001", false, "http://127.0.0.1:65001/v2/", true),
            ("https://m.example/cache/v2", false, "https://m.example/cache/v2/", true),
            ("https://m.example/cache/", false, "https://m.example/cache/v2/", true),
            ("https://m.example/cache", true, "https://m.example/cache/", true),
            ("https://registry-1.docker.io", false, "https://registry-1.docker.io/v2/", false),
        ] {
            let endpoint = of(url, override_path);
            assert_eq!((endpoint.root.as_str(), endpoint.namespace.is_some()), (root, namespace), "{url}");
        }
        assert_eq!(of("https://registry-1.docker.io", false).host, "docker.io");
        // A scheme that is written down is what was asked for.
        assert!(of("http://mirror.example", false).http.allows_plain("mirror.example"));
        for bad in ["ftp://a", "https://", "https://u:p@host", "https://a?b=c", "https://a b"] {
            let error = Endpoint::of_url(bad, false, "docker.io", &http).unwrap_err();
            assert!(!error.contains("u:p"), "{error}");
        }
    }
}
