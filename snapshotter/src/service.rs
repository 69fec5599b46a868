//! The gRPC side: messages in, messages out.

use std::sync::Arc;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::api::snapshots as wire;
use crate::api::snapshots::snapshots_server::{Snapshots, SnapshotsServer};
use crate::filter::Filter;
use crate::image_service::ImageService;
use crate::labels::Labels;
use crate::snapshot::{Kind, Snapshot};
use crate::snapshotter::{Snapshotter, Wanted};
use crate::{Error, NAMESPACE};

/// Snapshots in one message of a list.
const PAGE: usize = 100;

/// Answers containerd, and a kubelet that asks for images here, until `stop` is done, then finishes what has begun.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve(
    listener: UnixListener,
    snapshotter: Arc<Snapshotter>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let images = ImageService::new(snapshotter.containerd(), snapshotter.images())?;
    tonic::transport::Server::builder()
        .add_service(images)
        .add_service(SnapshotsServer::new(Service(snapshotter)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .map_err(|error| Error::new(crate::Kind::Internal, format!("serving containerd: {error}")))
}

struct Service(Arc<Snapshotter>);

/// Logs a refusal, in containerd's own words for it.
fn refusal(what: &str, key: &str, error: Error) -> Status {
    match error.kind {
        // Part of the ordinary course of a pull.
        crate::Kind::AlreadyExists | crate::Kind::NotFound => tracing::debug!(key, "{what}: {error}"),
        _ => tracing::warn!(key, "{what}: {error}"),
    }
    error.into()
}

impl Service {
    /// Runs work that a caller who hangs up must not cut in two.
    async fn whole<T, F>(
        &self,
        what: &'static str,
        key: &str,
        work: impl FnOnce(Arc<Snapshotter>) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let done = tokio::spawn(work(Arc::clone(&self.0))).await;
        let done = done.unwrap_or_else(|error| Err(Error::new(crate::Kind::Internal, error.to_string())));
        done.map_err(|error| refusal(what, key, error))
    }
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let from = from(&request);
        let wire::PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let wanted = wanted(Kind::Active, from, key.clone(), parent, labels);
        let mounts = self.whole("prepare", &key, |all| async move { all.create(wanted).await }).await?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let from = from(&request);
        let wire::ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let wanted = wanted(Kind::View, from, key.clone(), parent, labels);
        let mounts = self.whole("view", &key, |all| async move { all.create(wanted).await }).await?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let (namespace, key) = (namespace(&request), request.into_inner().key);
        let of = key.clone();
        let mounts =
            self.whole("mounts", &key, |all| async move { all.mounts(&namespace, &of).await }).await?;
        Ok(Response::new(wire::MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<wire::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let wire::CommitSnapshotRequest { name, key, labels, .. } = request.into_inner();
        let (of, labels) = (key.clone(), labels.into_iter().collect());
        self.whole("commit", &key, |all| async move { all.commit(name, of, labels).await }).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let of = key.clone();
        self.whole("remove", &key, |all| async move { all.remove(&of).await }).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let snapshot = self.0.stat(key.clone()).await.map_err(|error| refusal("stat", &key, error))?;
        Ok(Response::new(wire::StatSnapshotResponse { info: Some(info(snapshot)) }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let wire::UpdateSnapshotRequest { info: new, update_mask, .. } = request.into_inner();
        let wire::Info { name, labels, .. } =
            new.ok_or_else(|| Status::invalid_argument("an update needs an info"))?;
        let (of, labels) = (name.clone(), labels.into_iter().collect());
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let updated = self.whole("update", &name, |all| async move { all.update(of, labels, fields).await });
        Ok(Response::new(wire::UpdateSnapshotResponse { info: Some(info(updated.await?)) }))
    }

    type ListStream = tokio_stream::Iter<std::vec::IntoIter<Result<wire::ListSnapshotsResponse, Status>>>;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let filters: Result<Vec<Filter>, Error> = filters.iter().map(|text| Filter::parse(text)).collect();
        let refused = |error| refusal("list", "", error);
        let found = self.0.list(filters.map_err(refused)?).await.map_err(refused)?;
        let infos: Vec<wire::Info> = found.into_iter().map(info).collect();
        let pages: Vec<_> =
            infos.chunks(PAGE).map(|page| Ok(wire::ListSnapshotsResponse { info: page.to_vec() })).collect();
        Ok(Response::new(tokio_stream::iter(pages)))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let usage = self.0.usage(key.clone()).await.map_err(|error| refusal("usage", &key, error))?;
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        Ok(Response::new(wire::UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }))
    }

    async fn cleanup(&self, _request: Request<wire::CleanupRequest>) -> Result<Response<()>, Status> {
        // Nothing waits for it: what is removed is deleted at once.
        Ok(Response::new(()))
    }
}

fn metadata<T>(request: &Request<T>, name: &str) -> Option<String> {
    request.metadata().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

fn namespace<T>(request: &Request<T>) -> String {
    metadata(request, NAMESPACE).unwrap_or_else(|| "default".to_owned())
}

/// The namespace and the trace context of a request.
fn from<T>(request: &Request<T>) -> (String, Option<String>) {
    (namespace(request), metadata(request, "traceparent"))
}

fn wanted(
    kind: Kind,
    (namespace, traceparent): (String, Option<String>),
    key: String,
    parent: String,
    labels: std::collections::HashMap<String, String>,
) -> Wanted {
    let labels: Labels = labels.into_iter().collect();
    let parent = Some(parent).filter(|parent| !parent.is_empty());
    Wanted { kind, namespace, key, parent, labels, traceparent }
}

fn info(snapshot: Snapshot) -> wire::Info {
    let kind = match snapshot.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: snapshot.key,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(snapshot.created.into()),
        updated_at: Some(snapshot.updated.into()),
        labels: snapshot.labels.into_iter().collect(),
    }
}
