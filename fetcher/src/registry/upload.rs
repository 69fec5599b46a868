//! Pushing blobs.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, RequestBuilder, StatusCode};
use url::Url;

use super::auth::Access;
use super::{Call, Registry};
use crate::http::Use;
use crate::local::off_thread;
use crate::source::{BlobRef, ErrorClass, SourceError};

/// Told how many more bytes were handed to the network. After a retry bytes are told again.
pub type SentFn = Arc<dyn Fn(u64) + Send + Sync>;

/// The body of a request that may have to be sent more than once.
#[derive(Clone)]
pub struct Payload(Kind);

#[derive(Clone)]
enum Kind {
    Bytes(Bytes),
    File { path: PathBuf, offset: u64, length: u64, sent: Option<SentFn> },
}

/// Bytes read from a file at one time.
const PIECE: u64 = 256 * 1024;

impl Payload {
    /// A body in memory.
    pub fn bytes(bytes: impl Into<Bytes>) -> Self {
        Self(Kind::Bytes(bytes.into()))
    }

    /// A part of a file, read while it is sent.
    pub fn file(path: impl Into<PathBuf>, offset: u64, length: u64, sent: Option<SentFn>) -> Self {
        Self(Kind::File { path: path.into(), offset, length, sent })
    }

    pub(super) fn name(&self) -> String {
        match &self.0 {
            Kind::Bytes(_) => "request body".to_owned(),
            Kind::File { path, .. } => path.display().to_string(),
        }
    }

    /// Adds the body and its length to a request.
    pub(super) async fn attach(&self, request: RequestBuilder) -> io::Result<RequestBuilder> {
        match &self.0 {
            Kind::Bytes(bytes) => Ok(request.header(CONTENT_LENGTH, bytes.len()).body(bytes.clone())),
            Kind::File { path, offset, length, sent } => {
                let open = path.clone();
                let file = off_thread(move || File::open(open)).await?;
                let body = read_file(Arc::new(file), *offset, *length, sent.clone());
                Ok(request.header(CONTENT_LENGTH, *length).body(reqwest::Body::wrap_stream(body)))
            }
        }
    }
}

fn read_file(
    file: Arc<File>,
    offset: u64,
    length: u64,
    sent: Option<SentFn>,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    use std::os::unix::fs::FileExt as _;
    let end = offset.saturating_add(length);
    stream::try_unfold(offset, move |at| {
        let file = Arc::clone(&file);
        async move {
            if at >= end {
                return Ok(None);
            }
            let count = PIECE.min(end - at);
            let read = off_thread(move || {
                let mut bytes = vec![0; usize::try_from(count).map_err(io::Error::other)?];
                file.read_exact_at(&mut bytes, at)?;
                Ok::<_, io::Error>(Bytes::from(bytes))
            });
            let bytes = read.await?;
            Ok(Some((bytes, at + count)))
        }
    })
    .inspect_ok(move |bytes: &Bytes| {
        if let Some(sent) = &sent {
            sent(u64::try_from(bytes.len()).unwrap_or(0));
        }
    })
}

/// How long a request with a body of this size may take: a slow link at 64 KiB/s, and time for the registry
/// to check and store it.
fn patience(length: u64) -> Duration {
    Duration::from_secs(60 + length / (64 * 1024))
}

impl Registry {
    /// Whether the repository holds the blob already, asked with the right to write.
    pub async fn needs_blob(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        self.has_blob(blob, Access::Push).await.map(|has| !has)
    }

    /// Asks the registry to take the blob over from another of its repositories; `false` when it would not.
    pub async fn mount_blob(&self, blob: &BlobRef, from: &str) -> Result<bool, SourceError> {
        let mut url = self.url("blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &blob.digest.to_string()).append_pair("from", from);
        let empty = Payload::bytes(Bytes::new());
        let mut call = self.call(Method::POST, url, Access::Push, Use::Blobs);
        call.payload = Some(&empty);
        let response = self.send(&call).await?;
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // An upload was opened instead; it is not used.
                if let Ok(url) = self.location(&call.url, &response) {
                    let _ = self.send(&self.call(Method::DELETE, url, Access::Push, Use::Blobs)).await;
                }
                Ok(false)
            }
            _ => Err(self.unexpected("mount of a blob", response).await),
        }
    }

    /// Uploads a blob from a file that holds it whole. The registry checks its digest. One attempt.
    pub async fn put_blob(
        &self,
        blob: &BlobRef,
        path: impl Into<PathBuf>,
        sent: Option<SentFn>,
    ) -> Result<(), SourceError> {
        let path = path.into();
        self.upload(blob, &path, sent).await.map_err(|error| {
            let detail = format!("push: {}", error.detail).into();
            SourceError { detail, ..error }.reading(blob, 0..blob.size)
        })
    }

    async fn upload(&self, blob: &BlobRef, path: &PathBuf, sent: Option<SentFn>) -> Result<(), SourceError> {
        let empty = Payload::bytes(Bytes::new());
        let start = self.url("blobs/uploads/")?;
        let mut call = self.call(Method::POST, start, Access::Push, Use::Blobs);
        call.payload = Some(&empty);
        let response = self.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.unexpected("start of an upload", response).await);
        }
        let least = response.headers().get("oci-chunk-min-length");
        let least = least.and_then(|least| least.to_str().ok()?.parse::<u64>().ok()).unwrap_or(0);
        let mut url = self.location(&call.url, &response)?;

        let piece = self.inner.upload_piece.max(least);
        let mut offset = 0;
        if blob.size > piece {
            while offset < blob.size {
                let length = piece.min(blob.size - offset);
                url = self.patch(url, path, offset, length, sent.clone()).await?;
                offset += length;
            }
        }
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let payload = Payload::file(path, offset, blob.size - offset, sent);
        let response = self.send(&self.body_call(Method::PUT, url, &payload, blob.size)).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::OK => Ok(()),
            _ => Err(self.unexpected("end of an upload", response).await),
        }
    }

    async fn patch(
        &self,
        url: Url,
        path: &PathBuf,
        offset: u64,
        length: u64,
        sent: Option<SentFn>,
    ) -> Result<Url, SourceError> {
        let payload = Payload::file(path, offset, length, sent);
        let mut call = self.body_call(Method::PATCH, url, &payload, length);
        let range = HeaderValue::try_from(format!("{offset}-{}", offset + length - 1));
        call.headers.insert(
            CONTENT_RANGE,
            range.map_err(|error| self.error(ErrorClass::BadRange, error.to_string()))?,
        );
        let response = self.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.unexpected(&format!("upload at byte {offset}"), response).await);
        }
        self.location(&call.url, &response)
    }

    fn body_call<'a>(&self, method: Method, url: Url, payload: &'a Payload, length: u64) -> Call<'a> {
        let mut call = self.call(method, url, Access::Push, Use::Blobs);
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        call.payload = Some(payload);
        call.patience = Some(patience(length));
        call
    }

    /// Where an upload goes on; may be relative.
    fn location(&self, from: &Url, response: &reqwest::Response) -> Result<Url, SourceError> {
        if response.headers().get(LOCATION).is_none() {
            return Err(self.error(ErrorClass::BadReply, "an upload without a Location"));
        }
        self.follow(from, response)
    }
}
