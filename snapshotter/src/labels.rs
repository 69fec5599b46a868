//! Labels that decide what a snapshot is.

use std::collections::BTreeMap;

use crate::images::{ImageName, Login};
use crate::{Error, Kind};

/// Labels of a snapshot.
pub(crate) type Labels = BTreeMap<String, String>;

/// The name that the layer's snapshot will have: its chain id. Set when containerd unpacks a layer.
pub(crate) const REF: &str = "containerd.io/snapshot.ref";
/// The layer holds file data of a RAFS image.
const BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// The layer holds the bootstrap of a RAFS image.
pub(crate) const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Set by CRI and by clients that add the image's name to every layer.
const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// A login that came with the pull. Never stored.
const USER: &str = "containerd.io/snapshot/pullusername";
const SECRET: &str = "containerd.io/snapshot/pullsecret";
/// What the container's user namespace maps to, `container:host:count`.
pub(crate) const UIDS: &str = "containerd.io/snapshot/uidmapping";
/// The same for groups.
pub(crate) const GIDS: &str = "containerd.io/snapshot/gidmapping";

/// What a layer is, by its labels.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// An archive that is unpacked.
    Archive,
    /// File data that is fetched when it is read; its digest when that is known.
    Blob(Option<String>),
    /// The bootstrap that brings all files of its image; the image's name when that is known.
    Bootstrap(Option<ImageName>),
}

/// What the layer with these labels is.
pub(crate) fn layer(labels: &Labels) -> Layer {
    let set = |name| labels.get(name).is_some_and(|value| value == "true");
    if set(BOOTSTRAP) {
        let manifest = labels.get(MANIFEST).map(String::as_str);
        Layer::Bootstrap(labels.get(IMAGE).map(|image| ImageName::pinned(image, manifest)))
    } else if set(BLOB) {
        Layer::Blob(labels.get(LAYER).cloned())
    } else {
        Layer::Archive
    }
}

/// The host's number for root in a map of containerd, `CONTAINER:HOST:COUNT[,…]`.
pub(crate) fn mapped_root(map: &str) -> Result<u32, Error> {
    let entries = map.split(',').map(|entry| {
        let mut numbers = entry.split(':').map(str::parse::<u32>);
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(count)), None) => Some((inside, outside, count)),
            _ => None,
        }
    });
    let entries: Option<Vec<_>> = entries.collect();
    let root =
        entries.and_then(|entries| entries.into_iter().find(|(inside, _, count)| *inside == 0 && *count > 0));
    root.map(|(_, outside, _)| outside).ok_or_else(|| {
        let message = format!("label value {map:?} is no map CONTAINER:HOST:COUNT[,…] with root in it");
        Error::new(Kind::InvalidArgument, message)
    })
}

/// Takes the login out of the labels.
pub(crate) fn take_login(labels: &mut Labels) -> Option<Login> {
    let (username, password) = (labels.remove(USER), labels.remove(SECRET));
    Some(Login { username: username?, password: password? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn layers_are_told_apart() {
        assert_eq!(layer(&labels(&[(REF, "sha256:1")])), Layer::Archive);
        assert_eq!(layer(&labels(&[(BLOB, "false")])), Layer::Archive);
        assert_eq!(
            layer(&labels(&[(BLOB, "true"), (LAYER, "sha256:2")])),
            Layer::Blob(Some("sha256:2".into()))
        );
        assert_eq!(layer(&labels(&[(BOOTSTRAP, "true")])), Layer::Bootstrap(None));
        let all = labels(&[(BOOTSTRAP, "true"), (IMAGE, "h/n:t"), (MANIFEST, "sha256:3")]);
        let name = ImageName { reference: "h/n@sha256:3".into() };
        assert_eq!(layer(&all), Layer::Bootstrap(Some(name)));
    }

    #[test]
    fn a_login_leaves_the_labels() {
        let mut all = labels(&[(USER, "me"), (SECRET, "hush"), (REF, "x")]);
        assert_eq!(take_login(&mut all).unwrap().password, "hush");
        assert_eq!(all, labels(&[(REF, "x")]));
        let mut half = labels(&[(SECRET, "hush")]);
        assert!(take_login(&mut half).is_none() && half.is_empty());
    }
}
