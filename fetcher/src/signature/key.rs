//! Public keys, from PEM files.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use webpki::RawPublicKeyEntity;
use webpki::ring::{ECDSA_P256_SHA256, ECDSA_P384_SHA256, ECDSA_P384_SHA384, RSA_PKCS1_2048_8192_SHA256};

/// What cosign signs with, by the kind of key. With Ed25519 it is Ed25519ph, which ring does not have.
const ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 4] =
    [ECDSA_P256_SHA256, ECDSA_P384_SHA256, ECDSA_P384_SHA384, RSA_PKCS1_2048_8192_SHA256];

/// How much of a file is read.
const MAX_FILE: u64 = 1 << 20;

/// A public key that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("public key {}: {problem}", path.display())]
pub struct KeyError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: String,
}

/// Public keys, any of which may have signed.
#[derive(Clone, Debug)]
pub struct Keys {
    files: Arc<[PathBuf]>,
    keys: Arc<[SubjectPublicKeyInfoDer<'static>]>,
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, file) in self.files.iter().enumerate() {
            write!(f, "{}{}", if number == 0 { "" } else { " or " }, file.display())?;
        }
        Ok(())
    }
}

impl Keys {
    /// Reads files with one `PUBLIC KEY` or more.
    ///
    /// # Errors
    /// One cannot be read, has none, or one of a kind that is not known.
    pub fn load(files: &[PathBuf]) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for path in files {
            let found = read(path).map_err(|problem| KeyError { path: path.clone(), problem })?;
            keys.extend(found);
        }
        Ok(Self { files: files.into(), keys: keys.into() })
    }

    /// Whether one of them made this signature of the message.
    pub(super) fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.keys.iter().any(|key| {
            let Ok(key) = RawPublicKeyEntity::try_from(key) else { return false };
            ALGORITHMS.iter().any(|algorithm| key.verify_signature(*algorithm, message, signature).is_ok())
        })
    }
}

fn read(path: &Path) -> Result<Vec<SubjectPublicKeyInfoDer<'static>>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err("is no file".to_owned());
    }
    let mut pem = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut pem).map_err(|error| error.to_string())?;
    let mut keys = Vec::new();
    for key in SubjectPublicKeyInfoDer::pem_slice_iter(&pem) {
        let key = key.map_err(|error| format!("no PEM: {error}"))?;
        if !is_known(&key) {
            return Err("a key of a kind that is not known; ECDSA P-256 and P-384 and RSA of 2048 to 8192 \
                        bits are"
                .to_owned());
        }
        keys.push(key);
    }
    if keys.is_empty() {
        return Err("has no `PUBLIC KEY` in PEM; `cosign public-key --key KEY` prints one".to_owned());
    }
    Ok(keys)
}

/// A `SubjectPublicKeyInfo` with RSA of 2048 bits has 294 bytes; smaller keys are refused only when they verify.
const MIN_RSA: usize = 256;

/// Whether one of the algorithms takes the key: it then only complains of the signature.
fn is_known(spki: &SubjectPublicKeyInfoDer<'_>) -> bool {
    let Ok(key) = RawPublicKeyEntity::try_from(spki) else { return false };
    ALGORITHMS.iter().any(|algorithm| {
        let said = key.verify_signature(*algorithm, b"", b"");
        let takes = matches!(said, Ok(()) | Err(webpki::Error::InvalidSignatureForPublicKey));
        let is_rsa = algorithm.public_key_alg_id() == RSA_PKCS1_2048_8192_SHA256.public_key_alg_id();
        takes && (!is_rsa || spki.as_ref().len() >= MIN_RSA)
    })
}
