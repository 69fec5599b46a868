//! What signatures say: of which manifests they are.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::key::Keys;
use crate::digest::Digest;

/// What a payload of "simple signing" by cosign calls itself.
const SIMPLE_TYPE: &str = "cosign container image signature";
/// The payload of an envelope with an in-toto statement.
const IN_TOTO: &str = "application/vnd.in-toto+json";
/// What a statement is about when it is the signature of an image, and not an attestation by the same key.
pub(super) const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";

/// The manifests of which this payload is a signature.
///
/// # Errors
/// It is no such payload, or one about something else.
pub fn payload(payload: &[u8]) -> Result<Vec<Digest>, String> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        image: Image,
        r#type: String,
    }
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "docker-manifest-digest")]
        digest: String,
    }
    let Payload { critical } = serde_json::from_slice(payload)
        .map_err(|error| short(&format!("payload of a signature: {error}")))?;
    if critical.r#type != SIMPLE_TYPE {
        let kind = short(&critical.r#type);
        return Err(format!("payload of a signature: its type is `{kind}`, not `{SIMPLE_TYPE}`"));
    }
    let digest = critical.image.digest.parse();
    Ok(vec![digest.map_err(|error| format!("payload of a signature: docker-manifest-digest: {error}"))?])
}

/// As much of a stranger's words as a log wants.
fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

/// The signed part of a bundle (DSSE).
#[derive(Debug)]
pub struct Envelope {
    payload_type: String,
    payload: Vec<u8>,
    signatures: Vec<Vec<u8>>,
}

impl Envelope {
    /// Takes it out of a Sigstore bundle.
    ///
    /// # Errors
    /// It is no bundle, or one that signs in another way.
    pub fn of_bundle(bundle: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Bundle {
            dsse_envelope: Option<Raw>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            payload: String,
            payload_type: String,
            signatures: Vec<Signature>,
        }
        #[derive(Deserialize)]
        struct Signature {
            sig: String,
        }
        let bad = |what: &dyn std::fmt::Display| short(&format!("Sigstore bundle: {what}"));
        let bundle: Bundle = serde_json::from_slice(bundle).map_err(|error| bad(&error))?;
        let raw = bundle.dsse_envelope.ok_or_else(|| bad(&"it has no DSSE envelope"))?;
        let decode = |field: &str, text: &str| {
            BASE64_STANDARD.decode(text).map_err(|error| bad(&format!("{field}: {error}")))
        };
        let signatures = raw.signatures.iter().map(|signature| decode("sig", &signature.sig));
        Ok(Self {
            payload: decode("payload", &raw.payload)?,
            signatures: signatures.collect::<Result<_, _>>()?,
            payload_type: raw.payload_type,
        })
    }

    /// Whether one of the keys made one of its signatures.
    pub(super) fn signed_by(&self, keys: &Keys) -> bool {
        let signed = self.signed();
        // One is usual; each costs a check by every key.
        self.signatures.iter().take(4).any(|signature| keys.signed(&signed, signature))
    }

    /// What is signed: type and payload with their lengths (DSSE's pre-authentication encoding).
    fn signed(&self) -> Vec<u8> {
        let (kind, payload) = (&self.payload_type, &self.payload);
        let mut signed = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
        signed.extend_from_slice(payload);
        signed
    }

    /// The manifests of which it is a signature.
    ///
    /// # Errors
    /// It is no statement, or one about something else.
    pub fn claim(&self) -> Result<Vec<Digest>, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Statement {
            predicate_type: String,
            subject: Vec<Subject>,
        }
        #[derive(Deserialize)]
        struct Subject {
            digest: BTreeMap<String, String>,
        }
        if self.payload_type != IN_TOTO {
            return Err(format!(
                "what was signed has the type `{}`, not `{IN_TOTO}`",
                short(&self.payload_type)
            ));
        }
        let statement: Statement = serde_json::from_slice(&self.payload)
            .map_err(|error| short(&format!("signed statement: {error}")))?;
        if statement.predicate_type != SIGN {
            return Err(format!("what was signed is no image but `{}`", short(&statement.predicate_type)));
        }
        let digests = statement.subject.iter().filter_map(|subject| subject.digest.get("sha256"));
        Ok(digests.filter_map(|hex| Digest::from_hex(hex).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The image that cosign 3.1.3 signed with the key of `tests/data/p256.pub`, in both forms.
    const SIGNED: &str = "c3faa9649a1913ee7e0448bb937d7a07f4ec751677ae5d60835c130dec285c5f";
    const PAYLOAD: &[u8] = include_bytes!("../../../fuzz/corpus/signature/payload");
    const BUNDLE: &[u8] = include_bytes!("../../../fuzz/corpus/signature/bundle");
    const SIGNATURE: &str =
        "MEUCID1zW1l8r0Krf01GBZ7OAiMKAzLMNU1niYc6d6lwo38VAiEAhEsgj15y5fBtmIfmRuB+IkJWk4+hTS/ZQjW0B2NXIJ4=";

    #[test]
    fn what_cosign_signed_is_signed_and_nothing_else_is() {
        let keys = Keys::load(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/p256.pub")]).unwrap();
        let signed = vec![Digest::from_hex(SIGNED).unwrap()];
        let signature = BASE64_STANDARD.decode(SIGNATURE).unwrap();
        assert!(keys.signed(PAYLOAD, &signature));
        assert_eq!(payload(PAYLOAD), Ok(signed.clone()));
        let envelope = Envelope::of_bundle(BUNDLE).unwrap();
        assert!(envelope.signed_by(&keys));
        assert_eq!(envelope.claim(), Ok(signed));

        for at in 0..PAYLOAD.len() {
            let mut other = PAYLOAD.to_vec();
            other[at] ^= 1;
            assert!(!keys.signed(&other, &signature), "byte {at}");
        }
        for change in [
            |envelope: &mut Envelope| envelope.payload[100] ^= 1,
            |envelope: &mut Envelope| envelope.payload_type.push('x'),
            |envelope: &mut Envelope| envelope.signatures[0][20] ^= 1,
            |envelope: &mut Envelope| envelope.signatures.clear(),
        ] {
            let mut envelope = Envelope::of_bundle(BUNDLE).unwrap();
            change(&mut envelope);
            assert!(!envelope.signed_by(&keys));
        }
    }
}
