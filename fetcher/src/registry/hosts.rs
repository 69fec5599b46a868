//! containerd's `hosts.toml`: which hosts serve a registry's images, and how each is reached.
//!
//! Source: containerd, `docs/hosts.md`. Unlike there, a file that cannot be read is an error, not a warning.

use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::endpoint::Endpoint;
use crate::http::{ClientCertificate, HttpOptions, Proxy};

/// One host and what it may be asked.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) endpoint: Endpoint,
    /// Whether tags may be looked up there.
    pub(super) resolve: bool,
    /// Whether content may be read there.
    pub(super) pull: bool,
}

/// Largest file that is read.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    capabilities: Option<Vec<String>>,
    ca: Option<Paths>,
    client: Option<Clients>,
    skip_verify: bool,
    header: toml::Table,
    override_path: bool,
    dial_timeout: Option<String>,
    proxy: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Paths {
    One(PathBuf),
    More(Vec<PathBuf>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Clients {
    One(PathBuf),
    More(Vec<Client>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Client {
    Both(PathBuf),
    Pair([PathBuf; 2]),
}

/// The directory that speaks of a registry, if one does: `HOST_PORT_`, `HOST:PORT`, `HOST`'s own, `_default`.
pub(super) fn directory(root: &Path, host: &str) -> Option<PathBuf> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !name.ends_with(':') && port.bytes().all(|c| c.is_ascii_digit()) => {
            (name, Some(port))
        }
        _ => (host, None),
    };
    let underscored = port.map(|port| format!("{name}_{port}_"));
    let names = underscored.iter().map(String::as_str).chain([host, "_default"]);
    names.map(|name| root.join(name)).find(|dir| dir.is_dir())
}

/// The hosts for `namespace`, in the order in which they are asked; the registry itself is the last.
pub(super) fn read(dir: &Path, namespace: &str, http: &HttpOptions) -> Result<Vec<Host>, String> {
    let path = dir.join("hosts.toml");
    let text = match std::fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_FILE => return Err(format!("{}: larger than 1 MiB", path.display())),
        _ => std::fs::read_to_string(&path),
    };
    match text {
        Ok(text) => {
            parse(&text, dir, namespace, http).map_err(|error| format!("{}: {error}", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut host = upstream(namespace, &certificates(dir, http)?)?;
            host.endpoint.keep_to_host();
            Ok(vec![host])
        }
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn upstream(namespace: &str, http: &HttpOptions) -> Result<Host, String> {
    Ok(Host { endpoint: Endpoint::of_registry(namespace, http)?, resolve: true, pull: true })
}

/// The older way: certificates that lie in the directory by themselves.
fn certificates(dir: &Path, http: &HttpOptions) -> Result<HttpOptions, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", dir.display());
    let mut http = http.clone();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.sort();
    let kind = |file: &PathBuf, wanted: &str| file.extension().is_some_and(|found| found == wanted);
    http.extra_ca.extend(files.iter().filter(|file| kind(file, "crt")).cloned());
    if let Some(certificate) = files.iter().find(|file| kind(file, "cert")) {
        let key = Some(certificate.with_extension("key")).filter(|key| files.contains(key));
        http.identity = Some(ClientCertificate { certificate: certificate.clone(), key });
    }
    Ok(http)
}

fn parse(text: &str, dir: &Path, namespace: &str, http: &HttpOptions) -> Result<Vec<Host>, String> {
    let mut root: toml::Table = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
        format!("line {line}: {}", error.message().replace('\n', " "))
    })?;
    let listed = match root.remove("host") {
        None => toml::Table::new(),
        Some(toml::Value::Table(hosts)) => hosts,
        Some(_) => return Err("`host` must hold tables: [host.\"https://HOST\"]".to_owned()),
    };
    let server = match root.remove("server") {
        None => None,
        Some(toml::Value::String(server)) => Some(server),
        Some(_) => return Err("`server` must be a URL in quotes".to_owned()),
    };
    let mut hosts = Vec::new();
    for (url, value) in listed {
        let place = format!("host.\"{url}\"");
        hosts.push(host(&url, value, dir, namespace, http).map_err(|error| format!("{place}: {error}"))?);
    }
    let settings = toml::Value::Table(root);
    let last = match server {
        Some(server) => {
            host(&server, settings, dir, namespace, http).map_err(|error| format!("server: {error}"))?
        }
        None => {
            let mut last = upstream(namespace, http)?;
            configure(&mut last, settings, dir)?;
            last
        }
    };
    // A server that is listed among the hosts is asked in its place there.
    if hosts.iter().all(|known| known.endpoint.root != last.endpoint.root) {
        hosts.push(last);
    }
    Ok(hosts)
}

fn host(
    url: &str,
    value: toml::Value,
    dir: &Path,
    namespace: &str,
    http: &HttpOptions,
) -> Result<Host, String> {
    let override_path = value.get("override_path").and_then(toml::Value::as_bool).unwrap_or_default();
    let endpoint = Endpoint::of_url(url, override_path, namespace, http)?;
    let mut host = Host { endpoint, resolve: true, pull: true };
    configure(&mut host, value, dir)?;
    Ok(host)
}

fn configure(host: &mut Host, value: toml::Value, dir: &Path) -> Result<(), String> {
    let settings: Settings =
        value.try_into().map_err(|error: toml::de::Error| error.message().replace('\n', " "))?;
    if let Some(capabilities) = settings.capabilities {
        (host.resolve, host.pull) = (false, false);
        for capability in capabilities {
            match capability.as_str() {
                "pull" => host.pull = true,
                "resolve" => host.resolve = true,
                // Images are pushed to the registry itself.
                "push" => {}
                other => return Err(format!("capability `{other}`; there are pull, resolve and push")),
            }
        }
    }
    let http = &mut host.endpoint.http;
    match settings.ca {
        None => {}
        Some(Paths::One(path)) => http.extra_ca.push(dir.join(path)),
        Some(Paths::More(paths)) => http.extra_ca.extend(paths.into_iter().map(|path| dir.join(path))),
    }
    let client = match settings.client {
        None => None,
        Some(Clients::One(path)) => Some(Client::Both(path)),
        Some(Clients::More(clients)) if clients.len() > 1 => {
            return Err("`client` lists several certificates; only one can be shown".to_owned());
        }
        Some(Clients::More(mut clients)) => clients.pop(),
    };
    http.identity = match client {
        None => http.identity.take(),
        Some(Client::Both(path)) => Some(ClientCertificate { certificate: dir.join(path), key: None }),
        Some(Client::Pair([certificate, key])) => {
            // containerd writes an empty key for a file that holds both.
            let key = Some(dir.join(&key)).filter(|_| !key.as_os_str().is_empty());
            Some(ClientCertificate { certificate: dir.join(certificate), key })
        }
    };
    http.skip_verify |= settings.skip_verify;
    if let Some(text) = settings.dial_timeout {
        http.timeouts.connect = crate::duration::parse(&text)
            .ok_or_else(|| format!("dial_timeout `{text}` is no time like 500ms or 3s"))?;
    }
    http.proxy = settings.proxy.map(Proxy).or(http.proxy.take());
    host.endpoint.headers = headers(settings.header)?;
    host.endpoint.keep_to_host();
    Ok(())
}

fn headers(table: toml::Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let values = match value {
            toml::Value::Array(values) => values,
            one => vec![one],
        };
        // Values may be secrets; only the name is told.
        let wrong = || format!("header `{name}` is not a text, or a list of texts, that a header can hold");
        let key = HeaderName::try_from(&name).map_err(|_| wrong())?;
        for value in values {
            let text = value.as_str().ok_or_else(wrong)?;
            let mut value = HeaderValue::try_from(text).map_err(|_| wrong())?;
            value.set_sensitive(true);
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn hosts(text: &str) -> Result<Vec<Host>, String> {
        parse(text, Path::new("/certs"), "docker.io", &HttpOptions::default())
    }

    fn roots(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.endpoint.root.as_str()).collect()
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file() {
        let found = hosts(
            r#"
server = "https://registry-1.docker.io"
[host."https://z.example"]
  capabilities = ["pull", "resolve"]
  ca = "z.pem"
[host."http://a.example:5000/v2/cache"]
  capabilities = ["pull"]
  override_path = true
  skip_verify = true
  dial_timeout = "1m1.5s"
  client = [["/c.pem", "c.key"]]
[host."http://a.example:5000/v2/cache".header]
  x-one = "1"
  x-more = ["1", "2"]
"#,
        )
        .unwrap();
        let hub = "https://registry-1.docker.io/v2/";
        assert_eq!(roots(&found), ["https://z.example/v2/", "http://a.example:5000/v2/cache/", hub]);
        let (first, second, last) = (&found[0], &found[1], &found[2]);
        assert_eq!(first.endpoint.http.extra_ca, [PathBuf::from("/certs/z.pem")]);
        assert!((first.resolve, first.pull, second.resolve, second.pull) == (true, true, false, true));
        assert_eq!(second.endpoint.http.timeouts.connect, Duration::from_millis(61_500));
        assert!(second.endpoint.http.skip_verify && !first.endpoint.http.skip_verify);
        let identity = second.endpoint.http.identity.clone().unwrap();
        let files = (PathBuf::from("/c.pem"), Some(PathBuf::from("/certs/c.key")));
        assert_eq!((identity.certificate, identity.key), files);
        assert_eq!(second.endpoint.headers.get_all("x-more").iter().count(), 2);
        assert_eq!(second.endpoint.namespace.as_deref(), Some("docker.io"));
        assert_eq!((last.endpoint.namespace.as_deref(), last.endpoint.host.as_str()), (None, "docker.io"));
        assert_eq!(roots(&hosts("").unwrap()), [hub]);
        let own = hosts("ca = ['/a', 'b']\nproxy = 'socks5://u:hunter2@p:1'").unwrap();
        assert_eq!(own[0].endpoint.http.extra_ca.len(), 2);
        assert!(!format!("{own:?}").contains("hunter2"));
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        for (text, word) in [
            ("[host.'https://a']\ncapabilities = ['fly']", "`fly`"),
            ("host = 1", "`host`"),
            ("server = 1", "`server`"),
            ("server = 'ftp://x'", "ftp://x"),
            ("\n\nx = ", "line 3"),
            ("[host.'https://a']\nskip_verify = 'yes'", "https://a"),
            ("[host.'https://a']\ndial_timeout = 'soon'", "`soon`"),
            ("[host.'https://a'.header]\n'b c' = 'd'", "`b c`"),
            ("[host.'https://a']\nclient = ['a', 'b']", "`client`"),
        ] {
            let error = hosts(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn the_directory_of_a_registry() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str| std::fs::create_dir(root.path().join(name)).unwrap();
        let found = |host: &str| {
            directory(root.path(), host).map(|dir| dir.file_name().unwrap().to_str().unwrap().to_owned())
        };
        assert_eq!(found("h:5000"), None);
        make("_default");
        assert_eq!(found("h:5000").as_deref(), Some("_default"));
        make("h:5000");
        assert_eq!(found("h:5000").as_deref(), Some("h:5000"));
        make("h_5000_");
        assert_eq!(found("h:5000").as_deref(), Some("h_5000_"));
        assert_eq!(found("h").as_deref(), Some("_default"));

        let dir = root.path().join("h_5000_");
        for name in ["a.crt", "me.cert", "me.key"] {
            std::fs::write(dir.join(name), "").unwrap();
        }
        let read = |dir: &Path| read(dir, "h:5000", &HttpOptions::default());
        let http = read(&dir).unwrap().remove(0).endpoint.http;
        assert_eq!(http.extra_ca, [dir.join("a.crt")]);
        assert_eq!(http.identity.unwrap().key, Some(dir.join("me.key")));
        std::fs::write(dir.join("hosts.toml"), "server = 5").unwrap();
        assert!(read(&dir).unwrap_err().contains("h_5000_/hosts.toml"));
    }
}
