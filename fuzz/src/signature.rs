//! What is signed, as whoever writes to a registry may have put it there.

use skimmer_fetcher::signature::claim::{self, Envelope};

/// Parses `data` as a payload of "simple signing" and as a Sigstore bundle.
pub fn run(data: &[u8]) {
    match claim::payload(data) {
        // They speak of one manifest.
        Ok(digests) => assert_eq!(digests.len(), 1),
        Err(error) => assert!(!error.is_empty() && error.len() < 1000, "{error}"),
    }
    match Envelope::of_bundle(data).and_then(|envelope| envelope.claim()) {
        Ok(digests) => assert!(digests.len() <= data.len()),
        Err(error) => assert!(!error.is_empty() && error.len() < 1000, "{error}"),
    }
}
