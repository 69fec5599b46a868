//! The service over a real socket, with images that are only noted down.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::api::snapshots as wire;
use crate::api::snapshots::snapshots_client::SnapshotsClient;
use crate::{Containerd, Error, ImageName, Images, Kind, Login, Pull, Snapshotter, serve};

const REF: &str = "containerd.io/snapshot.ref";
const BLOB: &str = "containerd.io/snapshot/nydus-blob";
const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";

/// What is mounted where, and with which password.
#[derive(Default)]
struct Noted {
    mounted: Mutex<BTreeMap<PathBuf, (String, Option<String>)>>,
    /// Chain ids that mounts were to have.
    chains: Mutex<Vec<Option<String>>>,
    busy: Mutex<bool>,
    /// Image and password of pulls; whether they succeeded, at their end.
    pulls: Mutex<Vec<(String, String, Option<bool>)>>,
}

#[async_trait]
impl Images for Noted {
    async fn mount(&self, image: &ImageName, pull: Pull, target: PathBuf) -> Result<(), Error> {
        assert!(target.is_dir(), "{}", target.display());
        if image.reference.contains("broken") {
            return Err(Error::new(Kind::Unavailable, "blob sha256:ab is not at the registry"));
        }
        self.chains.lock().unwrap().push(pull.chain_id);
        let noted = (image.reference.clone(), pull.login.map(|login| login.password));
        assert!(self.mounted.lock().unwrap().insert(target, noted).is_none(), "mounted twice");
        Ok(())
    }

    async fn pulling(&self, name: &str, login: &Login) {
        self.pulls.lock().unwrap().push((name.to_owned(), login.password.clone(), None));
    }

    async fn pulled(&self, name: &str, login: &Login, succeeded: bool) {
        self.pulls.lock().unwrap().push((name.to_owned(), login.password.clone(), Some(succeeded)));
    }

    async fn umount(&self, target: PathBuf) -> Result<(), Error> {
        if *self.busy.lock().unwrap() {
            return Err(Error::new(Kind::FailedPrecondition, "files on it are open"));
        }
        self.mounted.lock().unwrap().remove(&target);
        Ok(())
    }

    fn is_mounted(&self, target: &Path) -> bool {
        self.mounted.lock().unwrap().contains_key(target)
    }

    async fn cached_bytes(&self, digest: &str) -> u64 {
        if digest == "sha256:layer" { 4096 } else { 0 }
    }
}

struct Service {
    dir: TempDir,
    images: Arc<Noted>,
    snapshotter: Arc<Snapshotter>,
    client: SnapshotsClient<Channel>,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Service {
    async fn start(dir: TempDir, images: Arc<Noted>) -> Self {
        let socket = dir.path().join("s.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let containerd = Containerd::new(dir.path().join("none.sock"));
        let root = dir.path().join("snapshots");
        let snapshotter = Snapshotter::open(&root, images.clone(), containerd).await.unwrap();
        let snapshotter = Arc::new(snapshotter);
        let (stop, stopped) = oneshot::channel();
        let stopped = async move {
            let _ = stopped.await;
        };
        let served = tokio::spawn(serve(listener, Arc::clone(&snapshotter), stopped));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let client = SnapshotsClient::new(endpoint.connect().await.unwrap());
        Self { dir, images, snapshotter, client, stop, served }
    }

    async fn restart(self) -> Self {
        let Self { dir, images, snapshotter, client, stop, served } = self;
        drop((client, snapshotter));
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
        Self::start(dir, images).await
    }

    async fn prepare(
        &mut self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<crate::api::Mount>, tonic::Status> {
        let labels: HashMap<String, String> =
            labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let snapshotter = "skimmer".into();
        let ask =
            wire::PrepareSnapshotRequest { snapshotter, key: key.into(), parent: parent.into(), labels };
        Ok(self.client.prepare(ask).await?.into_inner().mounts)
    }

    async fn commit(&mut self, name: &str, key: &str) -> Result<(), tonic::Status> {
        let (name, key) = (name.into(), key.into());
        self.client.commit(wire::CommitSnapshotRequest { name, key, ..Default::default() }).await.map(drop)
    }

    async fn remove(&mut self, key: &str) -> Result<(), tonic::Status> {
        self.client
            .remove(wire::RemoveSnapshotRequest { key: key.into(), ..Default::default() })
            .await
            .map(drop)
    }

    async fn keys(&mut self, filter: &str) -> Result<Vec<String>, tonic::Status> {
        let filters = Some(filter.to_owned()).filter(|filter| !filter.is_empty()).into_iter().collect();
        let ask = wire::ListSnapshotsRequest { filters, ..Default::default() };
        let mut pages = self.client.list(ask).await?.into_inner();
        let mut keys = Vec::new();
        while let Some(page) = pages.message().await? {
            keys.extend(page.info.into_iter().map(|info| info.name));
        }
        Ok(keys)
    }

    async fn usage(&mut self, key: &str) -> Result<(i64, i64), tonic::Status> {
        let ask = wire::UsageRequest { key: key.into(), ..Default::default() };
        let usage = self.client.usage(ask).await?.into_inner();
        Ok((usage.size, usage.inodes))
    }

    /// A lazy image of one data layer, named `name`.
    async fn pull(&mut self, name: &str) -> Result<(), tonic::Status> {
        let layer = "containerd.io/snapshot/cri.layer-digest";
        let data = [(REF, "sha256:data"), (BLOB, "true"), (layer, "sha256:layer")];
        assert_eq!(self.prepare("extract-1 data", "", &data).await.unwrap_err().code(), Code::AlreadyExists);
        let top = [
            (REF, "sha256:top"),
            (BOOTSTRAP, "true"),
            (IMAGE, name),
            ("containerd.io/snapshot/pullusername", "me"),
            ("containerd.io/snapshot/pullsecret", "hush"),
        ];
        let status = self.prepare("extract-2 top", "sha256:data", &top).await.unwrap_err();
        if status.code() == Code::AlreadyExists { Ok(()) } else { Err(status) }
    }
}

async fn service() -> Service {
    Service::start(tempfile::tempdir().unwrap(), Arc::default()).await
}

#[tokio::test]
async fn layers_are_stacked_as_overlayfs_wants_them() {
    let mut service = service().await;
    let base = service.prepare("a", "", &[]).await.unwrap();
    assert_eq!((base[0].r#type.as_str(), base[0].options[0].as_str()), ("bind", "rw"));
    std::fs::write(Path::new(&base[0].source).join("file"), vec![1; 10_000]).unwrap();
    service.commit("base", "a").await.unwrap();
    assert!(service.usage("base").await.unwrap().0 >= 10_000);
    service.prepare("b", "base", &[]).await.unwrap();
    service.commit("second", "b").await.unwrap();
    let gids = "containerd.io/snapshot/gidmapping";
    let mapped = [("containerd.io/snapshot/uidmapping", "0:1000:65536"), (gids, "1:1:9,0:2000:1")];
    let top = service.prepare("c", "second", &mapped).await.unwrap().remove(0);
    assert_eq!(top.r#type, "overlay");
    let root = service.dir.path().join("snapshots").display().to_string();
    assert_eq!(
        top.options,
        [
            "index=off".to_owned(),
            format!("workdir={root}/3/work"),
            format!("upperdir={root}/3/fs"),
            format!("lowerdir={root}/2/fs:{root}/1/fs"),
            "uidmap=0:1000:65536".to_owned(),
            "gidmap=1:1:9,0:2000:1".to_owned(),
        ]
    );
    let owner = |dir: &str| {
        let metadata = std::fs::metadata(format!("{root}/{dir}/fs")).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("3"), (1000, 2000));
    for bad in ["", "0:1", "0:1:2:3", "1:0:5", "a:b:c", "0:4294967296:1", "0:1:0"] {
        let mapped = [("containerd.io/snapshot/uidmapping", bad), (gids, "0:1:1")];
        let error = service.prepare("bad", "second", &mapped).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{bad}: {error}");
    }
    let mut service = service.restart().await;
    assert_eq!(service.keys("").await.unwrap(), ["base", "c", "second"]);
    assert_eq!(service.keys("kind==active").await.unwrap(), ["c"]);
}

#[tokio::test]
async fn a_lazy_image_needs_no_layer() {
    let mut service = service().await;
    service.pull("host/image:1").await.unwrap();
    // Again, and by another namespace: nothing is mounted twice.
    service.pull("host/image:1").await.unwrap();
    let mounted = service.images.mounted.lock().unwrap().clone();
    let (place, noted) = mounted.first_key_value().unwrap();
    assert_eq!((mounted.len(), noted), (1, &("host/image:1".into(), Some("hush".into()))));
    let found = service.keys("labels.\"containerd.io/snapshot.ref\"==sha256:top,parent==sha256:data").await;
    assert_eq!(found.unwrap(), ["sha256:top"]);
    let record = std::fs::read_to_string(place.with_file_name("snapshot.json")).unwrap();
    assert!(!record.contains("hush"), "a password is on disk");
    assert_eq!(service.usage("sha256:data").await.unwrap(), (4096, 1));

    let container = service.prepare("container", "sha256:top", &[]).await.unwrap().remove(0);
    assert!(container.options.contains(&format!("lowerdir={}", place.display())), "{container:?}");
    assert_eq!(service.snapshotter.standing_on_images().await.unwrap(), ["container"]);
    // After a reboot nothing is mounted.
    service.images.mounted.lock().unwrap().clear();
    let mut service = service.restart().await;
    let ask = wire::MountsRequest { key: "container".into(), ..Default::default() };
    service.client.mounts(ask).await.unwrap();
    assert!(service.images.is_mounted(place));
    let chain = Some("sha256:top".to_owned());
    assert_eq!(*service.images.chains.lock().unwrap(), [chain.clone(), chain]);

    assert_eq!(service.remove("sha256:top").await.unwrap_err().code(), Code::FailedPrecondition);
    service.remove("container").await.unwrap();
    *service.images.busy.lock().unwrap() = true;
    let busy = service.remove("sha256:top").await.unwrap_err();
    assert!(busy.message().contains("open") && service.images.is_mounted(place), "{busy}");
    *service.images.busy.lock().unwrap() = false;
    service.remove("sha256:top").await.unwrap();
    service.remove("sha256:data").await.unwrap();
    assert!(service.images.mounted.lock().unwrap().is_empty());
    let root = service.dir.path().join("snapshots");
    for _ in 0..500 {
        if std::fs::read_dir(&root).unwrap().count() == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("directories stay: {:?}", std::fs::read_dir(&root).unwrap().collect::<Vec<_>>());
}

/// An image says of a plain layer of another one that its data is fetched: that one does not go on without its files.
#[tokio::test]
async fn nothing_stands_on_data_without_its_bootstrap() {
    let mut service = service().await;
    service.prepare("a", "", &[]).await.unwrap();
    service.commit("sha256:base", "a").await.unwrap();
    let lie = [(REF, "sha256:second"), (BLOB, "true")];
    let known = service.prepare("b", "sha256:base", &lie).await.unwrap_err();
    assert_eq!(known.code(), Code::AlreadyExists);
    for labels in [&[][..], &[(REF, "sha256:third")]] {
        let refused = service.prepare("c", "sha256:second", labels).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().contains("without its bootstrap (sha256:second)"), "{refused}");
    }
    assert_eq!(service.keys("kind==active").await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_in_containerd_s_terms() {
    let mut service = service().await;
    let code = |result: Result<(), tonic::Status>| result.unwrap_err().code();
    assert_eq!(code(service.commit("x", "nobody").await), Code::NotFound);
    assert_eq!(code(service.remove("nobody").await), Code::NotFound);
    assert_eq!(service.usage("nobody").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(service.prepare("a", "nobody", &[]).await.unwrap_err().code(), Code::NotFound);
    service.prepare("a", "", &[]).await.unwrap();
    assert_eq!(service.prepare("a", "", &[]).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(service.prepare("b", "a", &[]).await.unwrap_err().code(), Code::InvalidArgument);
    service.commit("done", "a").await.unwrap();
    assert_eq!(code(service.commit("done", "a").await), Code::NotFound);
    assert_eq!(code(service.commit("again", "done").await), Code::FailedPrecondition);
    service.prepare("c", "done", &[]).await.unwrap();
    assert_eq!(code(service.commit("done", "c").await), Code::AlreadyExists);
    assert_eq!(code(service.remove("done").await), Code::FailedPrecondition);
    assert_eq!(service.keys("size==3").await.unwrap_err().code(), Code::InvalidArgument);
    let mask = Some(prost_types::FieldMask { paths: vec!["parent".into()] });
    let info = Some(wire::Info { name: "done".into(), ..Default::default() });
    let ask = wire::UpdateSnapshotRequest { info, update_mask: mask, ..Default::default() };
    assert_eq!(service.client.update(ask).await.unwrap_err().code(), Code::InvalidArgument);
    let ask = wire::MountsRequest { key: "done".into(), ..Default::default() };
    assert_eq!(service.client.mounts(ask).await.unwrap_err().code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn an_image_that_cannot_be_mounted_leaves_nothing() {
    let mut service = service().await;
    let error = service.pull("host/broken:1").await.unwrap_err();
    assert!(error.message().contains("sha256:ab") && error.code() == Code::Unavailable, "{error}");
    assert_eq!(service.keys("").await.unwrap(), ["sha256:data"]);
    // Without a name containerd unpacks the bootstrap, and is asked for the name when a container wants it.
    let top = [(REF, "sha256:top"), (BOOTSTRAP, "true")];
    service.prepare("extract", "sha256:data", &top).await.unwrap();
    service.commit("sha256:top", "extract").await.unwrap();
    let error = service.prepare("container", "sha256:top", &[]).await.unwrap_err();
    assert!(error.message().contains("none.sock"), "{error}");
    assert_eq!(service.keys("kind==active").await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_crash_left_is_cleared() {
    let mut service = service().await;
    service.pull("host/image:1").await.unwrap();
    // Killed between the mount and its record.
    let half = service.dir.path().join("snapshots/99");
    std::fs::create_dir_all(half.join("image")).unwrap();
    service.images.mounted.lock().unwrap().insert(half.join("image"), ("x".into(), None));
    let mut service = service.restart().await;
    assert!(!service.images.is_mounted(&half.join("image")) && !half.exists());
    assert_eq!(service.keys("").await.unwrap(), ["sha256:data", "sha256:top"]);
    // A path that overlayfs could not be given.
    let bad = service.dir.path().join("a:b");
    let opened = Snapshotter::open(&bad, service.images.clone(), Containerd::new("/x")).await;
    assert!(opened.err().unwrap().to_string().contains("overlayfs"));
}

#[tokio::test]
async fn a_pull_that_containerd_does_not_answer_leaves_no_login() {
    use crate::api::cri::{AuthConfig, ImageSpec, PullImageRequest};
    let service = service().await;
    let socket = service.dir.path().join("s.sock");
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    let mut client = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
    let mut ask = async |path: &'static str| {
        client.ready().await.unwrap();
        let auth = AuthConfig { username: "me".into(), password: "pw".into(), ..Default::default() };
        let image = Some(ImageSpec { image: "h.io/a:1".into() });
        let message = tonic::Request::new(PullImageRequest { image, auth: Some(auth) });
        let codec = tonic_prost::ProstCodec::<PullImageRequest, PullImageRequest>::default();
        client.unary(message, http::uri::PathAndQuery::from_static(path), codec).await.unwrap_err()
    };
    let error = ask("/runtime.v1.ImageService/PullImage").await;
    assert!(error.code() == Code::Unavailable && error.message().contains("containerd"), "{error}");
    let pull = |succeeded| ("h.io/a:1".to_owned(), "pw".to_owned(), succeeded);
    assert_eq!(*service.images.pulls.lock().unwrap(), [pull(None), pull(Some(false))]);
    // Nothing else is looked at.
    assert_eq!(ask("/runtime.v1.ImageService/ListImages").await.code(), Code::Unavailable);
    assert_eq!(service.images.pulls.lock().unwrap().len(), 2);
}
