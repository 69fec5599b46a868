//! An S3 bucket, through the `object_store` crate and our own HTTP clients.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use futures_util::StreamExt as _;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::{HttpClient, HttpConnector};
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, RetryConfig};
use url::Url;

use crate::http::{self, Clients, Timeouts, Use};
use crate::registry::RegistryOptions;
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency, check_range};

/// A folder of a bucket.
#[derive(Clone)]
pub(crate) struct Bucket {
    name: Arc<str>,
    store: Arc<dyn ObjectStore>,
    folder: Path,
    timeouts: Timeouts,
}

/// Gives the store our clients, with our certificates, time limits and rules about plain HTTP.
struct Connector {
    clients: Arc<Clients>,
    endpoint: Url,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = self.clients.get(&self.endpoint, Use::Blobs, "s3");
        let client =
            client.map_err(|error| object_store::Error::Generic { store: "S3", source: Box::new(error) })?;
        Ok(HttpClient::new(client))
    }
}

impl Bucket {
    /// A folder of a bucket, `s3://BUCKET/PATH`. Keys, region and endpoint come from the options, and else from
    /// the variables and files that the tools of AWS use.
    pub(crate) fn new(url: &Url, options: &RegistryOptions) -> Result<Self, SourceError> {
        let name = url.as_str().trim_end_matches('/');
        let unusable = |detail: String| SourceError::new(ErrorClass::Unsupported, name, detail);
        // An error of the builder may quote a value; only ours are told.
        let mut builder =
            AmazonS3Builder::from_env().with_url(format!("s3://{}", url.host_str().unwrap_or_default()));
        for (key, value) in &options.s3 {
            let known: AmazonS3ConfigKey = key
                .parse()
                .map_err(|_| unusable(format!("`{key}` is no option of S3, like `endpoint` or `region`")))?;
            builder = builder.with_config(known, value.reveal());
        }
        let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
        let endpoint = endpoint.unwrap_or_else(|| "https://s3.amazonaws.com".to_owned());
        let endpoint =
            Url::parse(&endpoint).map_err(|error| unusable(format!("the endpoint is no URL: {error}")))?;
        let clients = options.pool.clients(&options.http);
        // Says whether plain HTTP is allowed there, and whether the certificates can be used.
        clients.get(&endpoint, Use::Blobs, name)?;
        let store = builder
            .with_allow_http(endpoint.scheme() == "http")
            // Retries are the caller's, who has other sources and a deadline.
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
            .with_http_connector(Connector { clients, endpoint })
            .build()
            .map_err(|error| {
                unusable(format!("S3 cannot be set up: {}", http::printable(&error.to_string(), 300)))
            })?;
        let folder = Path::from_url_path(url.path())
            .map_err(|error| unusable(format!("the path is none of a bucket: {error}")))?;
        Ok(Self { name: name.into(), store: Arc::new(store), folder, timeouts: options.http.timeouts })
    }

    fn error(&self, error: &object_store::Error) -> SourceError {
        use object_store::Error as E;
        let class = match error {
            E::NotFound { .. } => ErrorClass::NotFound,
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => ErrorClass::Denied,
            E::NotSupported { .. } | E::NotImplemented { .. } => ErrorClass::BadReply,
            _ => ErrorClass::Transient,
        };
        SourceError::new(class, &*self.name, http::printable(&error.to_string(), 300))
    }

    fn place(&self, blob: &BlobRef) -> Path {
        self.folder.clone().join("blobs").join("sha256").join(blob.digest.hex())
    }

    /// A small object as a whole.
    pub(crate) async fn file(&self, name: &str, cap: u64) -> Result<Vec<u8>, SourceError> {
        let get = async {
            let found =
                self.store.get(&self.folder.clone().join(name)).await.map_err(|error| self.error(&error))?;
            if found.meta.size > cap {
                let detail = format!("`{name}` has {} bytes; at most {cap} are read", found.meta.size);
                return Err(SourceError::new(ErrorClass::BadReply, &*self.name, detail));
            }
            Ok(found.bytes().await.map_err(|error| self.error(&error))?.to_vec())
        };
        let limit = self.timeouts.connect + self.timeouts.first_byte + self.timeouts.idle;
        tokio::time::timeout(limit, get).await.unwrap_or_else(|_| Err(self.silent(limit)))
    }

    fn silent(&self, limit: std::time::Duration) -> SourceError {
        SourceError::new(ErrorClass::Transient, &*self.name, format!("no reply in {} ms", limit.as_millis()))
    }
}

#[async_trait::async_trait]
impl Source for Bucket {
    fn name(&self) -> &str {
        &self.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        check_range(&self.name, blob, &range)?;
        let asked = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let limit = self.timeouts.connect + self.timeouts.first_byte;
        let place = self.place(blob);
        let found = tokio::time::timeout(limit, self.store.get_opts(&place, asked)).await;
        let found = match found {
            Ok(found) => found.map_err(|error| self.error(&error)),
            Err(_) => Err(self.silent(limit)),
        };
        let found = found.map_err(|error| error.reading(blob, range.clone()))?;
        if found.meta.size != blob.size || found.range != range {
            let detail = format!(
                "it gives bytes {:?} of {}, asked were {range:?} of {}",
                found.range, found.meta.size, blob.size
            );
            return Err(SourceError::new(ErrorClass::BadReply, &*self.name, detail).reading(blob, range));
        }
        let this = self.clone();
        let pieces = found.into_stream().map(move |piece| piece.map_err(|error| this.error(&error)));
        Ok(Body::new(&*self.name, blob, range, Some(self.timeouts.idle), pieces.boxed()))
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        match self.store.head(&self.place(blob)).await {
            Ok(meta) if meta.size == blob.size => Ok(true),
            Ok(meta) => {
                let detail = format!("it has {} bytes here, its descriptor says {}", meta.size, blob.size);
                let error = SourceError::new(ErrorClass::BadReply, &*self.name, detail);
                Err(error.reading(blob, 0..blob.size))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.error(&error)),
        }
    }
}
