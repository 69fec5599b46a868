//! Signatures of images by a public key, as cosign makes them: who must have signed what, and whether one did.
//!
//! They lie beside the image, in two forms: payloads of "simple signing" at the tag `sha256-HEX.sig` (cosign's
//! `SIGNATURE_SPEC`), and Sigstore bundles that refer to it (`BUNDLE_SPEC`, what cosign 3 makes), found by the referrers
//! API or at the tag `sha256-HEX`. Certificates and transparency logs are not looked at: the key is what counts.

pub mod claim;
mod key;
mod policy;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

pub use key::{KeyError, Keys};
pub use policy::{Required, check, required};

use crate::digest::Digest;
use crate::image::{Image, ImageError};
use crate::layout::LayoutError;
use crate::oci::{self, Descriptor, Document, RawManifest};
use crate::place::{Place, Resolved};
use crate::source::{ErrorClass, SourceError};

/// Media type of a payload of "simple signing".
const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation of such a layer: the signature of the payload, in base64.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// Media type of a Sigstore bundle, up to its version.
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle";
/// The type that registries are asked for.
const BUNDLE_V03: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// Annotation of a bundle's manifest: what is signed.
const PREDICATE: &str = "dev.sigstore.bundle.predicateType";

/// Largest payload or bundle that is read.
const MAX_SIGNED: u64 = 1 << 20;
/// How many signatures of an image are looked at.
const MAX_SIGNATURES: usize = 64;

/// Fails unless one of the keys has signed the image: its manifest, or the index that its name selects.
pub(crate) async fn demand(
    place: &Place,
    image: &Image,
    resolved: &Resolved,
    keys: &Keys,
) -> Result<(), ImageError> {
    let manifest = resolved.raw.digest;
    let mut search = Search { place, image, keys, seen: 0, why: None, failure: None };
    let index = Some(resolved.top).filter(|top| *top != manifest);
    for digest in [Some(manifest), index].into_iter().flatten() {
        if search.payloads(&digest).await || search.bundles(&digest).await {
            return Ok(());
        }
    }
    if let Some(failure) = search.failure {
        return Err(failure);
    }
    let found = match (search.seen, search.why) {
        (0, None) => "it has no signature".to_owned(),
        (seen, why) => {
            let why = why.unwrap_or_else(|| "made by another key".to_owned());
            format!("none of the signatures it has ({seen}) is good: {why}")
        }
    };
    Err(ImageError::Unsigned { image: image.name.clone(), manifest, keys: keys.to_string(), found })
}

/// A look for one good signature.
struct Search<'a> {
    place: &'a Place,
    image: &'a Image,
    keys: &'a Keys,
    seen: usize,
    /// What was wrong with the last one, if it was more than the key.
    why: Option<String>,
    /// The first failure of a source, which may have a good one.
    failure: Option<ImageError>,
}

impl Search<'_> {
    /// Remembers what was wrong, in no more words than a log wants: they may be a stranger's.
    fn note(&mut self, why: &str) {
        self.why = Some(why.chars().take(300).collect());
    }

    /// Whether it goes on after another one.
    fn counts(&mut self) -> bool {
        self.seen += 1;
        if self.seen > MAX_SIGNATURES {
            self.note(&format!("more than {MAX_SIGNATURES} are not looked at"));
        }
        self.seen <= MAX_SIGNATURES
    }

    /// What is damaged or not there is no signature. A source that fails may have one; so may another place.
    fn usable<T>(&mut self, result: Result<T, ImageError>) -> Option<T> {
        let error = match result {
            Ok(usable) => return Some(usable),
            Err(error) => error,
        };
        let fails = match &error {
            ImageError::Source { error, .. } => error.class != ErrorClass::NotFound,
            ImageError::Layout { error, .. } => matches!(error, LayoutError::Io { .. }),
            _ => false,
        };
        self.note(&error.to_string());
        if fails {
            self.failure.get_or_insert(error);
        }
        None
    }

    fn layers(&mut self, raw: &RawManifest) -> Vec<Descriptor> {
        match raw.parse() {
            Ok(Document::Manifest(manifest)) => manifest.layers().clone(),
            Ok(Document::Index(_)) => Vec::new(),
            Err(error) => {
                self.note(&error.to_string());
                Vec::new()
            }
        }
    }

    async fn read(&mut self, part: &'static str, layer: &Descriptor) -> Option<Vec<u8>> {
        let blob = self.usable(self.image.blob_ref(layer))?;
        match self.image.read_small(part, &blob, MAX_SIGNED).await {
            // Whoever sent them.
            Err(error @ ImageError::Source { error: SourceError { class: ErrorClass::Corrupt, .. }, .. }) => {
                self.note(&error.to_string());
                None
            }
            result => self.usable(result),
        }
    }

    async fn payloads(&mut self, digest: &Digest) -> bool {
        let tag = format!("sha256-{}.sig", digest.hex());
        let Some(raw) = self.usable(self.place.beside(&self.image.name, &tag).await).flatten() else {
            return false;
        };
        for layer in self.layers(&raw) {
            if layer.media_type().as_ref() != SIMPLE {
                continue;
            }
            if !self.counts() {
                break;
            }
            let signature = oci::annotation(&layer, SIGNATURE).map(|text| BASE64_STANDARD.decode(text));
            let Some(Ok(signature)) = signature else {
                self.note(&format!("the annotation {SIGNATURE} is not there or no base64"));
                continue;
            };
            let Some(payload) = self.read("payload of a signature", &layer).await else { continue };
            if self.keys.signed(&payload, &signature) && self.is_of(claim::payload(&payload), digest) {
                return true;
            }
        }
        false
    }

    async fn bundles(&mut self, digest: &Digest) -> bool {
        let name = &self.image.name;
        let mut index = self.usable(self.place.referrers(name, digest, BUNDLE_V03).await).flatten();
        if index.is_none() {
            let tag = format!("sha256-{}", digest.hex());
            index = self.usable(self.place.beside(name, &tag).await).flatten();
        }
        let Some(Ok(Document::Index(index))) = index.map(|raw| raw.parse()) else { return false };
        for referrer in index.manifests() {
            let kind = referrer.artifact_type().as_ref().map(AsRef::as_ref);
            let is_other = |kind: &str| !kind.starts_with(BUNDLE);
            // Attestations need not be fetched to know that they are none.
            let attests = oci::annotation(referrer, PREDICATE).is_some_and(|about| about != claim::SIGN);
            if kind.is_some_and(is_other) || attests {
                continue;
            }
            if !self.counts() {
                break;
            }
            let Some(raw) = self.usable(self.place.child(&self.image.name, referrer).await) else {
                continue;
            };
            let layers = self.layers(&raw);
            let Some(layer) = layers.first().filter(|layer| layer.media_type().as_ref().starts_with(BUNDLE))
            else {
                continue;
            };
            let Some(bundle) = self.read("Sigstore bundle", layer).await else { continue };
            match claim::Envelope::of_bundle(&bundle) {
                Ok(envelope) => {
                    if envelope.signed_by(self.keys) && self.is_of(envelope.claim(), digest) {
                        return true;
                    }
                }
                Err(why) => self.note(&why),
            }
        }
        false
    }

    /// Whether what was signed speaks of this manifest.
    fn is_of(&mut self, claimed: Result<Vec<Digest>, String>, digest: &Digest) -> bool {
        match claimed {
            Ok(digests) if digests.contains(digest) => true,
            Ok(_) => {
                self.note("what was signed is another image");
                false
            }
            Err(why) => {
                self.note(&why);
                false
            }
        }
    }
}
