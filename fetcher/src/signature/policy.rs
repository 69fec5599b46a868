//! Which images must be signed by whom.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use url::Url;

use super::key::{KeyError, Keys};
use crate::reference::{Reference, RegistryRef};

/// Whose signatures images must have: files of public keys, by the beginnings of the images' names.
pub type Required = BTreeMap<String, Vec<PathBuf>>;

/// All images.
const ALL: &str = "*";
/// What names of images on disk begin with.
const ON_DISK: [&str; 2] = ["oci:", "oci-archive:"];

/// Whether every beginning is one that names can have, and every key's path absolute.
///
/// # Errors
/// What is wrong, and what would be right.
pub fn check(required: &Required) -> Result<(), String> {
    for (begin, files) in required {
        check_begin(begin).map_err(|problem| format!("has `{begin}`, {problem}"))?;
        if let Some(file) = files.iter().find(|file| !file.is_absolute()) {
            return Err(format!("has `{}`, which is not an absolute path", file.display()));
        }
    }
    Ok(())
}

fn check_begin(begin: &str) -> Result<(), String> {
    const FORMS: &str = "which no name begins with; write HOST, HOST/REPOSITORY or the beginning of one, oci:/PATH, \
                         oci-archive:/PATH, a URL, or * for all";
    if begin == ALL {
        return Ok(());
    }
    if let Some(path) = ON_DISK.iter().find_map(|kind| begin.strip_prefix(kind)) {
        let plain: PathBuf = Path::new(path).components().collect();
        let good = path.starts_with('/')
            && !goes_up(&plain)
            && !path.contains(':')
            && plain.as_os_str().as_bytes() == path.as_bytes();
        return if path.is_empty() || good {
            Ok(())
        } else {
            Err("whose path is not absolute, has a tag, or is not written plainly".into())
        };
    }
    let same = |right: String| {
        if right == begin { Ok(()) } else { Err(format!("which no name begins with; write `{right}`")) }
    };
    if begin.contains("://") {
        let mut url = Url::parse(begin).map_err(|_| FORMS)?;
        let kind = ["http", "https", "s3"].contains(&url.scheme());
        if !kind || url.path().contains([':', '%']) || !url.username().is_empty() || url.password().is_some()
        {
            return Err(FORMS.into());
        }
        url.set_query(None);
        url.set_fragment(None);
        return same(url.as_str().trim_end_matches('/').to_owned());
    }
    // As it would be in the name of an image below it.
    let longer = format!("{begin}/{}", if begin.contains('/') { "x" } else { "x/x" });
    let below = RegistryRef::parse(&longer).map_err(|_| FORMS)?;
    let whole = name_of(&below);
    // Docker Hub's images may be named without it.
    if whole.starts_with("docker.io/") && !begin.contains("docker.io") {
        return same(RegistryRef::parse(begin).map(|image| name_of(&image)).map_err(|_| FORMS)?);
    }
    same(whole.strip_suffix(if begin.contains('/') { "/x" } else { "/x/x" }).unwrap_or(&whole).to_owned())
}

/// A repository by the one name that it has here: hosts are written in several ways.
fn name_of(image: &RegistryRef) -> String {
    let url = Url::parse(&format!("https://{}/", image.host())).ok();
    let host = match url.as_ref().and_then(|url| Some((url.host_str()?, url.port()))) {
        Some((host, None)) => host.to_owned(),
        Some((host, Some(port))) => format!("{host}:{port}"),
        None => image.host().to_ascii_lowercase(),
    };
    format!("{host}/{}", image.repository())
}

fn goes_up(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}

/// The keys that must have signed an image: those of the longest beginning that fits its name. `None` when it needs no
/// signature.
///
/// # Errors
/// A key cannot be read.
pub fn required(of: &Required, image: &Reference) -> Result<Option<Keys>, KeyError> {
    // A beginning ends where a part of the name does.
    let fits = |name: &str, begin: &str| {
        name.strip_prefix(begin).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let on_disk = |kind: &str, path: &Path, begin: &str| {
        let below = begin.strip_prefix(kind);
        // Where that is in the end is not known.
        below.is_some_and(|below| below.is_empty() || (!goes_up(path) && path.starts_with(below)))
    };
    let is_of = |begin: &str| {
        begin == ALL
            || match image {
                Reference::Registry(name) => fits(&name_of(name), begin),
                Reference::Origin(name) => fits(name.url().as_str().trim_end_matches('/'), begin),
                Reference::Layout { dir, .. } => on_disk(ON_DISK[0], dir, begin),
                Reference::Archive { file, .. } => on_disk(ON_DISK[1], file, begin),
                Reference::Tree(_) => false,
            }
    };
    let best =
        of.iter().filter(|(begin, _)| is_of(begin)).max_by_key(|(begin, _)| (*begin != ALL, begin.len()));
    match best {
        Some((_, files)) if !files.is_empty() => Keys::load(files).map(Some),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_that_fits_nothing_is_refused() {
        let said = |begin: &str| check(&Required::from([(begin.to_owned(), Vec::new())]));
        for good in [
            "*",
            "host.example",
            "host.example:5000",
            "localhost",
            "host.example/a/b",
            "docker.io/library",
            "docker.io/library/alpine",
            "oci:",
            "oci:/images",
            "oci-archive:/images",
            "s3://bucket/path",
            "https://host.example/a",
        ] {
            assert_eq!(said(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "docker://host.example",
            "host.example/*",
            "host.example/a:v1",
            "host.example/a/",
            "host.example/a@sha256:00",
            "HOST.example",
            "host.example:443",
            "index.docker.io/library",
            "alpine",
            "oci:images",
            "oci:/a/../b",
            "oci:/./a",
            "oci:/a/",
            "oci:/a:v1",
            "https://host.example/a:v1",
            "https://host.example/a?b",
            "https://me@host.example/a",
            "host.example:0443/a",
            "127.1/a",
            "https://host.example:443/a",
            "https://HOST.example/a",
            "https://host.example/a/",
            "ftp://host.example",
        ] {
            assert!(said(bad).unwrap_err().contains(&format!("`{bad}`")), "{bad}");
        }
        assert!(said("alpine").unwrap_err().contains("`docker.io/library/alpine`"));
        assert!(said("HOST.example/a").unwrap_err().contains("`host.example/a`"));
        let relative = Required::from([("*".to_owned(), vec![PathBuf::from("key.pub")])]);
        assert!(check(&relative).unwrap_err().contains("key.pub"));
    }

    #[test]
    fn the_longest_beginning_of_a_name_says_whose_signature_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, include_str!("../../tests/data/p256.pub")).unwrap();
            path
        };
        let mut of = Required::new();
        of.insert("*".into(), vec![file("all")]);
        of.insert("host.example".into(), vec![file("host")]);
        of.insert("host.example/free".into(), Vec::new());
        of.insert("docker.io/library".into(), vec![file("library")]);
        of.insert("oci:/images".into(), Vec::new());
        of.insert("oci-archive:".into(), vec![file("archives")]);
        of.insert("https://host.example".into(), Vec::new());
        check(&of).unwrap();
        let wanted = |name: &str| {
            let keys = required(&of, &Reference::parse_source(name).unwrap()).unwrap();
            keys.map(|keys| keys.to_string().rsplit('/').next().unwrap().to_owned())
        };
        let pinned = format!("docker://host.example/free/a@sha256:{}", "0".repeat(64));
        for (name, keys) in [
            ("docker://other.example/a:v1", Some("all")),
            ("docker://host.example/a/b:v1", Some("host")),
            ("docker://HOST.example:443/a/b:v1", Some("host")),
            ("docker://host.example:0443/a/b:v1", Some("host")),
            ("docker://host.example/freedom:v1", Some("host")),
            ("docker://host.example:5000/a:v1", Some("all")),
            ("docker://host.example.org/a:v1", Some("all")),
            ("docker://host.example/free:v1", None),
            (&pinned, None),
            ("docker://alpine", Some("library")),
            ("oci:/images/a", None),
            ("oci:/images/a:tag", None),
            ("oci:/images/../a", Some("all")),
            ("oci-archive:/x/../a", Some("archives")),
            ("oci:/imagesque", Some("all")),
            ("oci-archive:/images/a", Some("archives")),
            ("https://host.example/a:v1", None),
            ("https://host.example:8443/a:v1", Some("all")),
        ] {
            assert_eq!(wanted(name).as_deref(), keys, "{name}");
        }
        let nobody = required(&Required::new(), &Reference::parse_source("docker://a/b:c").unwrap());
        assert!(nobody.unwrap().is_none());
    }
}
