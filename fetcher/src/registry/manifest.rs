//! Reading and writing manifests.

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};

use super::auth::Access;
use super::{Payload, Registry};
use crate::digest::Digest;
use crate::http::Use;
use crate::oci::{
    Document, MAX_MANIFEST, MEDIA_TYPE_DOCKER_INDEX, MEDIA_TYPE_DOCKER_MANIFEST, MEDIA_TYPE_INDEX,
    MEDIA_TYPE_MANIFEST, RawManifest,
};
use crate::source::{ErrorClass, SourceError};

/// The sender's idea of the digest. Never evidence, but a contradiction means a damaged reply.
const CONTENT_DIGEST: &str = "docker-content-digest";

impl Registry {
    /// Gets a manifest or index by tag, or by digest, which is then verified.
    pub async fn manifest(&self, selector: &str) -> Result<RawManifest, SourceError> {
        let what = || format!("manifest {selector}");
        let url = self.url(&format!("manifests/{selector}"))?;
        let mut call = self.call(Method::GET, url, Access::Pull, Use::Documents);
        for kind in
            [MEDIA_TYPE_MANIFEST, MEDIA_TYPE_INDEX, MEDIA_TYPE_DOCKER_MANIFEST, MEDIA_TYPE_DOCKER_INDEX]
        {
            call.headers.append(ACCEPT, HeaderValue::from_static(kind));
        }
        let response = self.send(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.unexpected(&what(), response).await);
        }
        let text = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let media_type = text(CONTENT_TYPE.as_str())
            .map(|kind| kind.split(';').next().unwrap_or_default().trim().to_owned());
        let hint = text(CONTENT_DIGEST).and_then(|hint| hint.parse::<Digest>().ok());
        let bytes = self.document(&what(), response, MAX_MANIFEST).await?;
        let manifest = RawManifest::new(bytes, media_type.as_deref());
        let wanted = selector.parse::<Digest>().ok();
        if let Some(expected) = wanted.or(hint).filter(|expected| *expected != manifest.digest) {
            let class = if wanted.is_some() { ErrorClass::Corrupt } else { ErrorClass::BadReply };
            let detail = format!("{}: the bytes are {}, not {expected}", what(), manifest.digest);
            return Err(self.error(class, detail));
        }
        Ok(manifest)
    }

    /// Gets the index of the manifests of one type that refer to another one. A registry that has no such API, or names
    /// none, has not found it.
    pub async fn referrers(&self, digest: &Digest, artifact_type: &str) -> Result<RawManifest, SourceError> {
        let what = format!("referrers of {digest}");
        let mut url = self.url(&format!("referrers/{digest}"))?;
        url.query_pairs_mut().append_pair("artifactType", artifact_type);
        let mut call = self.call(Method::GET, url, Access::Pull, Use::Documents);
        call.headers.append(ACCEPT, HeaderValue::from_static(MEDIA_TYPE_INDEX));
        let response = self.send(&call).await?;
        match response.status() {
            StatusCode::OK => {}
            // What registries from before that API say.
            StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_ACCEPTABLE => {
                let detail = format!("{what}: {}", response.status());
                return Err(self.error(ErrorClass::NotFound, detail));
            }
            _ => return Err(self.unexpected(&what, response).await),
        }
        let index =
            RawManifest::new(self.document(&what, response, MAX_MANIFEST).await?, Some(MEDIA_TYPE_INDEX));
        match index.parse() {
            Ok(Document::Index(found)) if !found.manifests().is_empty() => Ok(index),
            _ => Err(self.error(ErrorClass::NotFound, format!("{what}: none"))),
        }
    }

    /// Stores a manifest or index under its digest, and under a tag when there is one.
    pub async fn put_manifest(&self, manifest: &RawManifest, tag: Option<&str>) -> Result<(), SourceError> {
        let selector = tag.map_or_else(|| manifest.digest.to_string(), str::to_owned);
        let url = self.url(&format!("manifests/{selector}"))?;
        let payload = Payload::bytes(manifest.bytes.clone());
        let mut call = self.call(Method::PUT, url, Access::Push, Use::Documents);
        let kind = HeaderValue::try_from(manifest.media_type.as_str())
            .map_err(|error| self.error(ErrorClass::Unsupported, format!("media type: {error}")))?;
        call.headers.insert(CONTENT_TYPE, kind);
        call.payload = Some(&payload);
        let response = self.send(&call).await?;
        if response.status() != StatusCode::CREATED && response.status() != StatusCode::OK {
            return Err(self.unexpected(&format!("push of manifest {selector}"), response).await);
        }
        let stored = response.headers().get(CONTENT_DIGEST).and_then(|digest| digest.to_str().ok());
        match stored.and_then(|digest| digest.parse::<Digest>().ok()) {
            Some(stored) if stored != manifest.digest => {
                let detail = format!("push of manifest {selector}: the registry stored {stored}");
                Err(self.error(ErrorClass::BadReply, detail))
            }
            _ => Ok(()),
        }
    }
}
