//! A manifest or index as a registry sends it.

use skimmer_fetcher::Digest;
use skimmer_fetcher::oci::{self, Document, RawManifest};

/// Parses `data` by its own media type and by each one that a registry may claim.
pub fn run(data: &[u8]) {
    for claimed in [None, Some(oci::MEDIA_TYPE_MANIFEST), Some(oci::MEDIA_TYPE_INDEX), Some("text/html")] {
        let raw = RawManifest::new(data.to_vec(), claimed);
        assert_eq!(raw.digest, Digest::of(data));
        match raw.parse() {
            Ok(Document::Manifest(manifest)) => {
                let layers = manifest.layers();
                for descriptor in layers.iter().chain([manifest.config()]) {
                    if let Ok(blob) = oci::blob_ref(descriptor) {
                        assert_eq!(blob.digest.to_string(), descriptor.digest().to_string());
                    }
                }
                assert!(!oci::is_converted(&manifest) || !layers.is_empty());
                let bytes = oci::canonical_json(&manifest).expect("what was parsed can be written");
                let again = RawManifest::new(bytes, Some(&raw.media_type));
                assert!(matches!(again.parse(), Ok(Document::Manifest(same)) if same == manifest));
            }
            Ok(Document::Index(index)) => {
                for descriptor in index.manifests() {
                    let _ = oci::blob_ref(descriptor);
                }
                let bytes = oci::canonical_json(&index).expect("what was parsed can be written");
                let again = RawManifest::new(bytes, Some(&raw.media_type));
                assert!(matches!(again.parse(), Ok(Document::Index(same)) if same == index));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
