//! What containerd knows of its images, for clients that do not tell an image's name when they pull it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::api::content::ReadContentRequest;
use crate::api::content::content_client::ContentClient;
use crate::api::images::ListImagesRequest;
use crate::api::images::images_client::ImagesClient;
use crate::error::Kind as ErrorKind;
use crate::images::ImageName;
use crate::{Error, NAMESPACE, labels};

/// How long containerd may take to answer one question.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest manifest or config read, bytes.
const MAX_BYTES: usize = 4 << 20;
/// Manifests of one index that are looked at.
const MAX_MANIFESTS: usize = 64;

/// containerd's own socket.
#[derive(Debug, Clone)]
pub struct Containerd {
    socket: PathBuf,
}

#[derive(Deserialize)]
struct Reference {
    digest: String,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

/// An index or a manifest; other fields are of no interest.
#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    manifests: Vec<Reference>,
    config: Option<Reference>,
    #[serde(default)]
    layers: Vec<Reference>,
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

impl Containerd {
    /// containerd at that socket; nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The image of a namespace whose layers have this chain id.
    ///
    /// # Errors
    /// When containerd does not answer, or has no such image.
    pub async fn image_of(&self, namespace: &str, chain: &str) -> Result<ImageName, Error> {
        let channel = self.connect().await?;
        let ask = ListImagesRequest { filters: Vec::new() };
        let images = ImagesClient::new(channel.clone())
            .list(in_namespace(ask, namespace)?)
            .await
            .map_err(|status| self.failed("listing images", &status))?;
        for image in images.into_inner().images {
            let Some(target) = image.target else { continue };
            if let Some(digest) = self.find(&channel, namespace, &target.digest, chain).await? {
                return Ok(ImageName::pinned(&image.name, Some(&digest)));
            }
        }
        let message = format!(
            "the name of the image with chain id {chain} is not known: containerd lists none in namespace \
             {namespace}; pull it again (containerd 1.7 and later tell the name when the proxy plugin has \
             exports.enable_remote_snapshot_annotations = \"true\")"
        );
        Err(Error::new(ErrorKind::FailedPrecondition, message))
    }

    /// The manifest below `target` whose layers have the chain id.
    async fn find(
        &self,
        channel: &Channel,
        namespace: &str,
        target: &str,
        chain: &str,
    ) -> Result<Option<String>, Error> {
        let mut left = vec![target.to_owned()];
        let mut seen = 0;
        while let Some(digest) = left.pop() {
            seen += 1;
            let Some(manifest) = self.read::<Manifest>(channel, namespace, &digest).await? else { continue };
            left.extend(manifest.manifests.into_iter().take(MAX_MANIFESTS).map(|manifest| manifest.digest));
            if seen > MAX_MANIFESTS {
                break;
            }
            let is_bootstrap = |layer: &Reference| layer.annotations.contains_key(labels::BOOTSTRAP);
            let is_lazy = manifest.layers.last().is_some_and(is_bootstrap);
            let Some(config) = manifest.config.filter(|_| is_lazy) else { continue };
            let Some(config) = self.read::<Config>(channel, namespace, &config.digest).await? else {
                continue;
            };
            if chain_id(&config.rootfs.diff_ids).as_deref() == Some(chain) {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    /// A JSON document of the content store; none when it is not there, or is something else.
    async fn read<T: DeserializeOwned>(
        &self,
        channel: &Channel,
        namespace: &str,
        digest: &str,
    ) -> Result<Option<T>, Error> {
        let ask = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
        let mut client = ContentClient::new(channel.clone());
        let read = async {
            let mut pieces = client.read(in_namespace(ask, namespace)?).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(piece) = pieces.next().await {
                bytes.extend_from_slice(&piece?.data);
                if bytes.len() > MAX_BYTES {
                    return Err(Status::out_of_range(format!("it has more than {MAX_BYTES} bytes")));
                }
            }
            Ok(bytes)
        };
        match read.await {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            // Manifests of other platforms are often not there.
            Err(status) if matches!(status.code(), Code::NotFound | Code::OutOfRange) => Ok(None),
            Err(status) => Err(self.failed(&format!("reading {digest}"), &status)),
        }
    }

    async fn connect(&self) -> Result<Channel, Error> {
        let connected = self.endpoint()?.timeout(PATIENCE).connect().await;
        connected.map_err(|error| self.unreachable(&error))
    }

    /// A connection for calls that take their time, as pulls do. It is made when it is used, and again when it is lost.
    pub(crate) fn patient(&self) -> Result<Channel, Error> {
        Ok(self.endpoint()?.connect_lazy())
    }

    fn endpoint(&self) -> Result<Endpoint, Error> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display()));
        Ok(endpoint.map_err(|error| self.unreachable(&error))?.connect_timeout(PATIENCE))
    }

    fn unreachable(&self, error: &dyn std::error::Error) -> Error {
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        Error::new(ErrorKind::Unavailable, format!("containerd at {}: {why}", self.socket.display()))
    }

    fn failed(&self, what: &str, status: &Status) -> Error {
        let message = format!("containerd at {}: {what}: {}", self.socket.display(), status.message());
        Error::new(ErrorKind::Unavailable, message)
    }
}

fn in_namespace<T>(message: T, namespace: &str) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let value = namespace.parse().map_err(|_| Status::invalid_argument("the namespace is not plain text"))?;
    request.metadata_mut().insert(NAMESPACE, value);
    Ok(request)
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::new(ErrorKind::Internal, status.message())
    }
}

/// The name of a stack of layers (OCI image specification, "Layer ChainID"); none for no layer.
fn chain_id(diff_ids: &[String]) -> Option<String> {
    let (first, rest) = diff_ids.split_first()?;
    Some(rest.iter().fold(first.clone(), |chain, diff| {
        format!("sha256:{}", hex::encode(Sha256::digest(format!("{chain} {diff}"))))
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let ids = |ids: &[&str]| chain_id(&ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>());
        assert_eq!(ids(&[]), None);
        assert_eq!(ids(&["sha256:a"]).unwrap(), "sha256:a");
        // printf 'sha256:a sha256:b' | sha256sum
        let two = "sha256:970a948bffa8de94d6e22d747ba8c95030e6e546909f98f54e99a13005e173a8";
        assert_eq!(ids(&["sha256:a", "sha256:b"]).unwrap(), two);
    }

    #[tokio::test]
    async fn a_containerd_that_is_not_there_is_named() {
        let error = Containerd::new("/nonexistent/c.sock").image_of("default", "sha256:a").await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/c.sock"), "{error}");
        assert_eq!(error.kind, ErrorKind::Unavailable);
    }
}
