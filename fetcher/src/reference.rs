//! Names of images, after skopeo's transports.
//!
//! `docker://host/name:tag`, `oci:DIR[:TAG]` and `oci-archive:FILE[:TAG]` say what they are. Without a
//! transport, a directory with an `oci-layout` file is an OCI layout, any other directory is a tree to pack,
//! and `host/name:tag` is a registry reference. `https://…` and `s3://…` are OCI layouts behind a URL.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use url::Url;

use crate::digest::Digest;

/// What an image name means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// An image in a registry.
    Registry(RegistryRef),
    /// An image in an OCI layout directory.
    Layout {
        /// The directory.
        dir: PathBuf,
        /// The `org.opencontainers.image.ref.name` to pick; without one, the only image.
        tag: Option<String>,
    },
    /// An image in a tar file of an OCI layout.
    Archive {
        /// The tar file.
        file: PathBuf,
        /// The name to pick; without one, the only image.
        tag: Option<String>,
    },
    /// An image in an OCI layout behind a URL.
    Origin(OriginRef),
    /// A plain directory to pack.
    Tree(PathBuf),
}

/// An OCI layout behind a URL: `https://HOST/PATH[:TAG]` or `s3://BUCKET/PATH[:TAG]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OriginRef {
    url: Url,
    tag: Option<String>,
}

impl OriginRef {
    fn parse(name: &str) -> Result<Self, ReferenceError> {
        let (place, tag) = match name.rsplit_once(':') {
            // A colon of the scheme or of a port is followed by a slash.
            Some((place, tag)) if !tag.contains('/') && place.matches('/').count() > 2 => (place, Some(tag)),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_layout_tag(tag)) {
            return Err(bad(name, "the part after the last `:` is no image tag"));
        }
        let url = Url::parse(place).map_err(|error| bad(name, &format!("it is no URL: {error}")))?;
        if url.host_str().is_none_or(str::is_empty) || url.cannot_be_a_base() {
            return Err(bad(name, "the URL has no host or bucket"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad(
                "(URL)",
                "a URL must not hold a user or password; log in, or use the configuration",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(bad("(URL)", "a URL of an image has neither a query nor a fragment"));
        }
        Ok(Self { url, tag: tag.map(str::to_owned) })
    }

    /// Where the layout is.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The image's name in the layout; without one, the only image.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// `host[:port]`, or the bucket's name.
    pub fn host(&self) -> String {
        crate::http::host_of(&self.url)
    }
}

impl fmt::Display for OriginRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.url.as_str().trim_end_matches('/'))?;
        match &self.tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

/// An image in a registry: `host/repository[:tag][@digest]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryRef {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// A part breaks the grammar.
    #[error("image name `{name}`: {problem}")]
    Bad {
        /// The name as given.
        name: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// It looks like a path, and nothing is there.
    #[error(
        "image name `{0}`: no such file or directory (an image in a registry is written docker://HOST/NAME:TAG)"
    )]
    Missing(String),
}

impl RegistryRef {
    /// Parses `host/repository[:tag][@digest]`. As docker does, a name without a host means Docker Hub, and
    /// one without tag and digest means the tag `latest`.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let bad = |problem: &str| ReferenceError::Bad { name: shorten(text), problem: problem.to_owned() };
        let (name, digest) = match text.split_once('@') {
            None => (text, None),
            Some((name, digest)) => {
                let digest = digest.parse().map_err(|error| bad(&format!("{error}")))?;
                (name, Some(digest))
            }
        };
        // The last colon starts a tag unless it belongs to the host's port.
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(bad(
                "a tag has 1 to 128 letters, digits, `_`, `.` or `-` and starts with no `.` or `-`",
            ));
        }
        let (host, repository) = match name.split_once('/') {
            Some((host, rest)) if is_host_like(host) => (host.to_owned(), rest.to_owned()),
            _ => (DOCKER_HUB.to_owned(), name.to_owned()),
        };
        let host = if host == "index.docker.io" { DOCKER_HUB.to_owned() } else { host };
        let repository = if host == DOCKER_HUB && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository
        };
        if !is_host(&host) {
            return Err(bad("the part before the first `/` is no HOST[:PORT]"));
        }
        if !is_repository(&repository) {
            return Err(bad(
                "a repository has lowercase letters and digits, joined by single `.`, `_`, `__`, `-` or `/`",
            ));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Self { host, repository, tag, digest })
    }

    /// Host, with the port if one was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's name, without the host.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given or implied.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest if there is one, else the tag.
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }

    /// The same repository, pinned to `digest`.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }
}

const DOCKER_HUB: &str = "docker.io";

impl FromStr for RegistryRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Registry(name) => return write!(f, "docker://{name}"),
            Self::Origin(origin) => return write!(f, "{origin}"),
            Self::Tree(dir) => return write!(f, "{}", dir.display()),
            Self::Layout { dir, tag } => ("oci", dir, tag),
            Self::Archive { file, tag } => ("oci-archive", file, tag),
        };
        write!(f, "{transport}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(300).collect()
}

fn is_tag(text: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|c| word(c) || c == b'.' || c == b'-')
}

/// Whether the first component of a name is a host and not part of a Docker Hub repository.
fn is_host_like(text: &str) -> bool {
    text == "localhost" || text.contains(['.', ':', '[']) || text.bytes().any(|c| c.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (name, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return false };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(text), None),
        }
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
    };
    name.is_none_or(|name| name.len() <= 253 && name.split('.').all(label))
        && port.is_none_or(|port| {
            port.bytes().all(|c| c.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
        })
}

/// The repository grammar of the distribution spec.
fn is_repository(text: &str) -> bool {
    let component = |component: &str| {
        let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = component.as_bytes();
        let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else { return false };
        if !alnum(first) || !alnum(last) {
            return false;
        }
        bytes.split(|&c| alnum(c)).all(|separator| {
            matches!(separator, [] | [b'.'] | [b'_'] | [b'_', b'_']) || separator.iter().all(|&c| c == b'-')
        })
    };
    text.len() <= 255 && text.split('/').all(component)
}

/// The grammar of `org.opencontainers.image.ref.name`, wide enough for whole image names.
fn is_layout_tag(text: &str) -> bool {
    (1..=512).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._:@/+".contains(&c))
        && !text.starts_with(['-', '.', '/'])
}

fn bad(name: &str, problem: &str) -> ReferenceError {
    ReferenceError::Bad { name: shorten(name), problem: problem.to_owned() }
}

/// Splits `PATH[:TAG]` at the first colon, as skopeo does.
fn split_path(name: &str, rest: &str) -> Result<(PathBuf, Option<String>), ReferenceError> {
    let (path, tag) = match rest.split_once(':') {
        None => (rest, None),
        Some((path, tag)) => (path, Some(tag)),
    };
    if path.is_empty() {
        return Err(bad(name, "the path is missing"));
    }
    if tag.is_some_and(|tag| !is_layout_tag(tag)) {
        return Err(bad(name, "the part after the path's `:` is no image tag"));
    }
    Ok((PathBuf::from(path), tag.map(str::to_owned)))
}

/// Reads a name that has a transport; `None` when it has none.
fn with_transport(name: &str) -> Option<Result<Reference, ReferenceError>> {
    if let Some(rest) = name.strip_prefix("docker://") {
        return Some(RegistryRef::parse(rest).map(Reference::Registry));
    }
    if let Some(rest) = name.strip_prefix("oci-archive:") {
        return Some(split_path(name, rest).map(|(file, tag)| Reference::Archive { file, tag }));
    }
    if let Some(rest) = name.strip_prefix("oci:") {
        return Some(split_path(name, rest).map(|(dir, tag)| Reference::Layout { dir, tag }));
    }
    if ["https://", "http://", "s3://"].iter().any(|scheme| name.starts_with(scheme)) {
        return Some(OriginRef::parse(name).map(Reference::Origin));
    }
    // A transport of skopeo that we do not have, or a URL, deserves a better word than a parse error.
    let known = ["docker-archive:", "docker-daemon:", "containers-storage:", "dir:", "ostree:"];
    let unknown = known.iter().find(|known| name.starts_with(**known))?;
    Some(Err(bad(
        name,
        &format!(
            "`{unknown}` is not supported; use docker://HOST/NAME:TAG, oci:DIR[:TAG], oci-archive:FILE, https:// or s3://"
        ),
    )))
}

fn is_path_like(name: &str) -> bool {
    name.starts_with(['/', '.', '~']) || name.ends_with('/')
}

/// Whether a name without transport can only be meant as `host/name`.
fn has_host(name: &str) -> bool {
    name.split_once('/').is_some_and(|(host, _)| is_host_like(host) && is_host(host))
}

/// `DIR:TAG` without a transport, where DIR is an OCI layout.
fn tagged_layout(name: &str) -> Option<Reference> {
    let (dir, tag) = name.rsplit_once(':')?;
    let layout = is_layout_tag(tag) && Path::new(dir).join("oci-layout").is_file();
    layout.then(|| Reference::Layout { dir: PathBuf::from(dir), tag: Some(tag.to_owned()) })
}

impl Reference {
    /// Reads the name of an image to read. Looks at the file system when the name has no transport.
    pub fn parse_source(name: &str) -> Result<Self, ReferenceError> {
        if let Some(result) = with_transport(name) {
            return result;
        }
        if name.is_empty() {
            return Err(bad(name, "it is empty"));
        }
        let path = Path::new(name);
        if path.is_dir() {
            let dir = path.to_owned();
            return Ok(if path.join("oci-layout").is_file() {
                Self::Layout { dir, tag: None }
            } else {
                Self::Tree(dir)
            });
        }
        if let Some(layout) = tagged_layout(name) {
            return Ok(layout);
        }
        if path.exists() {
            return Err(bad(name, "it is a file; a tar file of an OCI layout is written oci-archive:FILE"));
        }
        if is_path_like(name) {
            return Err(ReferenceError::Missing(shorten(name)));
        }
        if !has_host(name) {
            return Err(bad(
                name,
                "no such directory, and no registry host; an image of Docker Hub is written docker://NAME:TAG",
            ));
        }
        RegistryRef::parse(name).map(Self::Registry)
    }

    /// `host[:port]` of the server that is asked, when one is.
    pub fn host(&self) -> Option<String> {
        match self {
            Self::Registry(name) => Some(name.host().to_owned()),
            Self::Origin(origin) => Some(origin.host()),
            Self::Layout { .. } | Self::Archive { .. } | Self::Tree(_) => None,
        }
    }

    /// The tag or name of the image in its place, if one was given.
    pub fn tag(&self) -> Option<&str> {
        match self {
            Self::Registry(name) => name.tag(),
            Self::Origin(origin) => origin.tag(),
            Self::Layout { tag, .. } | Self::Archive { tag, .. } => tag.as_deref(),
            Self::Tree(_) => None,
        }
    }

    /// Reads the name of an image to write. Without a transport, a path is an OCI layout to make.
    pub fn parse_destination(name: &str) -> Result<Self, ReferenceError> {
        if let Some(result) = with_transport(name) {
            if let Ok(Self::Origin(_)) = result {
                let way = "images are only read from there; make oci:DIR and copy it there with the server's own tools";
                return Err(bad(name, way));
            }
            return result;
        }
        if name.is_empty() {
            return Err(bad(name, "it is empty"));
        }
        let path = Path::new(name);
        if path.is_dir() {
            return Ok(Self::Layout { dir: path.to_owned(), tag: None });
        }
        if let Some(layout) = tagged_layout(name) {
            return Ok(layout);
        }
        if path.exists() {
            return Err(bad(name, "it is a file; give a directory to make, or oci-archive:FILE"));
        }
        if !is_path_like(name) && has_host(name) {
            return RegistryRef::parse(name).map(Self::Registry);
        }
        Ok(Self::Layout { dir: path.to_owned(), tag: None })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registry(text: &str) -> RegistryRef {
        RegistryRef::parse(text).unwrap()
    }

    #[test]
    fn registry_names() {
        let name = registry("ghcr.io/org/app:1.2");
        assert_eq!((name.host(), name.repository(), name.tag()), ("ghcr.io", "org/app", Some("1.2")));
        let name = registry("localhost:5000/app");
        assert_eq!((name.host(), name.repository(), name.tag()), ("localhost:5000", "app", Some("latest")));
        assert_eq!(registry("python:3").to_string(), "docker.io/library/python:3");
        assert_eq!(registry("a/b").to_string(), "docker.io/a/b:latest");
        assert_eq!(registry("index.docker.io/python").to_string(), "docker.io/library/python:latest");
        assert_eq!(registry("[::1]:5000/x").host(), "[::1]:5000");
        let digest = Digest::of(b"x");
        let pinned = registry(&format!("127.0.0.1:5000/a/b@{digest}"));
        assert_eq!((pinned.tag(), pinned.selector()), (None, digest.to_string()));
        assert_eq!(registry(&format!("h.io/a:t@{digest}")).selector(), digest.to_string());
    }

    #[test]
    fn refused_registry_names() {
        for text in [
            "",
            ":",
            "/",
            "h.io/",
            "h.io/A",
            "h.io/a//b",
            "h.io/a..b",
            "h.io/a___b",
            "h.io/-a",
            "h.io/a:",
            "h.io/a:-x",
            "h.io/a@sha256:12",
            "h.io:0/a",
            "h.io:99999/a",
            "h.io:/a",
            "[::g]/a",
            "h.io/a b",
            "h.io/../etc",
            "h..io/a",
            "h.io/a?x=1",
            "user@h.io/a",
        ] {
            assert!(RegistryRef::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn transports() {
        let parse = |text: &str| Reference::parse_source(text).unwrap();
        assert!(matches!(parse("docker://h.io/a:b"), Reference::Registry(_)));
        assert_eq!(
            parse("oci:some/dir:tag"),
            Reference::Layout { dir: "some/dir".into(), tag: Some("tag".into()) }
        );
        assert_eq!(parse("oci:/d"), Reference::Layout { dir: "/d".into(), tag: None });
        assert_eq!(parse("oci-archive:x.tar"), Reference::Archive { file: "x.tar".into(), tag: None });
        for text in ["oci:", "oci:d:", "oci-archive::t", "docker://", "dir:/x", "https://", ""] {
            assert!(Reference::parse_source(text).is_err(), "{text}");
            assert!(Reference::parse_destination(text).is_err(), "{text}");
        }
    }

    #[test]
    fn layouts_behind_urls() {
        for (text, url, tag, host) in [
            ("https://h.io/a/b", "https://h.io/a/b", None, "h.io"),
            ("https://h.io:8443/a/b/:v1.2", "https://h.io:8443/a/b/", Some("v1.2"), "h.io:8443"),
            ("https://h.io:8443", "https://h.io:8443/", None, "h.io:8443"),
            ("s3://bucket/p/img:x", "s3://bucket/p/img", Some("x"), "bucket"),
            ("s3://bucket", "s3://bucket", None, "bucket"),
        ] {
            let Ok(Reference::Origin(origin)) = Reference::parse_source(text) else { panic!("{text}") };
            assert_eq!((origin.url().as_str(), origin.tag(), &*origin.host()), (url, tag, host), "{text}");
            let again = origin.to_string();
            let Ok(Reference::Origin(same)) = Reference::parse_source(&again) else { panic!("{again}") };
            assert_eq!(same.to_string(), again);
            assert!(Reference::parse_destination(text).is_err(), "{text}");
        }
        for text in
            ["https://", "s3://", "https://h.io/a:-x", "https://h.io/a?sig=s3cret", "https://u:s3cret@h.io/a"]
        {
            let error = Reference::parse_source(text).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn names_without_transport() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::create_dir(path("tree")).unwrap();
        std::fs::create_dir(path("img")).unwrap();
        std::fs::write(path("img/oci-layout"), "{}").unwrap();
        std::fs::write(path("file"), "").unwrap();
        let source = |name: &str| Reference::parse_source(name);
        let destination = |name: &str| Reference::parse_destination(name);

        assert_eq!(source(&path("tree")), Ok(Reference::Tree(path("tree").into())));
        assert_eq!(source(&path("img")), Ok(Reference::Layout { dir: path("img").into(), tag: None }));
        let tagged = Reference::Layout { dir: path("img").into(), tag: Some("v1".into()) };
        assert_eq!(source(&path("img:v1")), Ok(tagged.clone()));
        assert_eq!(destination(&path("img:v1")), Ok(tagged));
        assert_eq!(source(&path("none")), Err(ReferenceError::Missing(path("none"))));
        assert!(source(&path("file")).unwrap_err().to_string().contains("oci-archive"));
        assert!(destination(&path("file")).is_err());
        assert_eq!(destination(&path("new")), Ok(Reference::Layout { dir: path("new").into(), tag: None }));
        assert!(matches!(source("localhost:5000/app"), Ok(Reference::Registry(_))));
        assert!(matches!(destination("localhost:5000/app:1"), Ok(Reference::Registry(_))));
        assert!(matches!(destination("out/img"), Ok(Reference::Layout { .. })));
        assert!(source("no-such-dir").unwrap_err().to_string().contains("docker://"));
    }

    proptest! {
        #[test]
        fn any_text_is_handled(text in "\\PC{0,80}") {
            let _ = RegistryRef::parse(&text);
            let _ = Reference::parse_source(&text);
            let _ = Reference::parse_destination(&text);
        }

        #[test]
        fn what_parses_displays_as_itself(
            text in "([a-z0-9.]{1,10}(:[0-9]{1,5})?/)?[a-z0-9._/-]{1,20}(:[A-Za-z0-9._-]{1,9})?(@sha256:[0-9a-f]{64})?"
        ) {
            if let Ok(name) = RegistryRef::parse(&text) {
                prop_assert_eq!(RegistryRef::parse(&name.to_string()), Ok(name.clone()));
                let reference = Reference::Registry(name);
                prop_assert_eq!(Reference::parse_source(&reference.to_string()), Ok(reference));
            }
        }

        #[test]
        fn layout_names_display_as_themselves(dir in "[a-z/._-]{1,20}", tag in proptest::option::of("[a-z0-9][a-z0-9.:/-]{0,9}")) {
            let reference = Reference::Layout { dir: dir.into(), tag };
            prop_assert_eq!(Reference::parse_source(&reference.to_string()), Ok(reference));
        }
    }
}
