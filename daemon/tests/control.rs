//! The control API over a real unix socket, on a daemon without a keeper: nothing here needs root or a kernel feature
//! beyond io_uring.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use prometheus_client::registry::Registry;
use skimmer_client::{AttachMode, Client, ClientError, MountRequest};
use skimmer_config::Config;
use skimmer_daemon::control::{self, Api, SocketError, Stop};
use skimmer_daemon::driver::{Driver, DriverConfig, DriverError, Handle};
use skimmer_daemon::frontend::Frontends;
use skimmer_daemon::metrics::Metrics;
use skimmer_daemon::mounts::{Mounts, Parts};
use skimmer_daemon::pulls::Pulls;
use skimmer_daemon::store::Store;
use skimmer_daemon::store::journal::Journal;
use skimmer_daemon::store::records::{AttachmentRecord, MountsRecord, Secrets};
use tempfile::TempDir;
use tokio::sync::watch;

struct Daemon {
    dir: TempDir,
    client: Client,
    mounts: Arc<Mounts>,
    journal: Journal,
    driver: Handle,
    thread: JoinHandle<Result<(), DriverError>>,
    stop: watch::Receiver<Option<Stop>>,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Daemon {
    async fn start(dir: TempDir) -> Self {
        skimmer_fetcher::http::install_tls_provider();
        let root = dir.path().join("root");
        let config = Config {
            root: root.clone(),
            socket: dir.path().join("d.sock"),
            keeper_socket: dir.path().join("k.sock"),
            ..Config::default()
        };
        let store = Store::open(&root).unwrap();
        let record = store.load_mounts().unwrap();
        let (journal, _notices) = Journal::start().unwrap();
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let small = DriverConfig { budget_bytes: 4 << 20, ..DriverConfig::default() };
        let runtime = tokio::runtime::Handle::current();
        let (driver, thread) =
            Driver::start(small, Frontends::default(), Box::new(journal.clone()), metrics, runtime).unwrap();
        let mounts = Mounts::new(Parts {
            config: config.clone(),
            store,
            driver: driver.clone(),
            journal: journal.clone(),
            secrets: Secrets::open(dir.path().join("credentials.json")),
            pulls: Arc::new(Pulls::open(dir.path().join("pulled.json"))),
            keeper: Err("none in this test".into()),
        });
        mounts.restore(record).await.unwrap();
        let (sender, stop) = watch::channel(None);
        let registry = Arc::new(registry);
        let check = || Err("no".to_owned());
        let api = Api { mounts: Arc::clone(&mounts), registry, snapshotter: None, check, stop: sender };
        let serving = tokio::spawn(control::serve(control::listen(&config.socket).unwrap(), api));
        let client = Client::connect(&config.socket).await.unwrap();
        Self { dir, client, mounts, journal, driver, thread, stop, serving }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    async fn end(self) -> TempDir {
        self.driver.shutdown().await.unwrap();
        self.thread.join().unwrap().unwrap();
        let clean = self.journal.stop();
        self.mounts.finish(clean).await.unwrap();
        self.serving.abort();
        let _ = self.serving.await;
        drop(self.client);
        // Connections that end by themselves hold the root's lock a little longer.
        for _ in 0..3000 {
            if Arc::strong_count(&self.mounts) == 1 {
                return self.dir;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("a connection of a server that has ended stays");
    }

    /// The status and words of a refused mount.
    async fn refused(&self, image: &str, target: &Path) -> (u16, String, Option<String>) {
        match self.client.mount(&MountRequest::new(image, target)).await {
            Err(ClientError::Api { error, status }) => (status, error.error, error.remedy),
            other => panic!("{image} on {}: {other:?}", target.display()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_what_this_node_can_and_cannot() {
    let daemon = Daemon::start(tempfile::tempdir().unwrap()).await;
    let status = daemon.client.status().await.unwrap();
    assert_eq!(status.pid, std::process::id());
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(status.root, daemon.path("root"));
    assert!(!status.keeper.connected && status.mounts.is_empty() && status.blobs.is_empty());
    let fanotify = status.modes.iter().find(|mode| mode.mode == AttachMode::Fanotify).unwrap();
    assert!(!fanotify.usable && fanotify.reason.contains("none in this test"), "{fanotify:?}");
    assert_eq!(daemon.client.mounts().await.unwrap(), []);
    let metrics = daemon.client.metrics().await.unwrap();
    assert!(
        metrics.contains("# TYPE skimmer_reads_total counter\n") && !metrics.contains("# EOF"),
        "{metrics}"
    );
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_reason_and_status() {
    let daemon = Daemon::start(tempfile::tempdir().unwrap()).await;
    let (target, file, tree) = (daemon.path("mnt"), daemon.path("file"), daemon.path("tree"));
    std::fs::create_dir(&target).unwrap();
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(&file, b"x").unwrap();

    let (status, error, _) = daemon.refused("oci:/x", Path::new("mnt")).await;
    assert!(status == 400 && error.contains("absolute"), "{error}");
    let (status, error, remedy) = daemon.refused("oci:/x", &daemon.path("nowhere")).await;
    assert!(status == 404 && error.contains("nowhere") && remedy.is_some(), "{error}");
    let (status, error, _) = daemon.refused("oci:/x", &file).await;
    assert!(status == 400 && error.contains("not a directory"), "{error}");
    let (status, error, _) = daemon.refused("oci:relative", &target).await;
    assert!(status == 400 && error.contains("relative"), "{error}");
    let (status, error, remedy) = daemon.refused(tree.to_str().unwrap(), &target).await;
    assert!(status == 400 && error.contains("plain directory"), "{error}");
    assert!(remedy.unwrap().contains("skimmer convert"));
    let (status, error, _) = daemon.refused("oci:/nonexistent/layout", &target).await;
    assert!(status == 502 && error.contains("/nonexistent/layout"), "{error}");
    let (status, error, _) = daemon.refused("UPPER CASE!", &target).await;
    assert!(status == 400 && error.contains("UPPER"), "{error}");

    match daemon.client.umount(&target, false).await {
        Err(ClientError::Api { error, status: 404 }) => assert!(error.error.contains("no image is mounted")),
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_dir(daemon.path("root/blobs")).unwrap().count(), 0, "nothing is left behind");
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_of_ours_gets_json_all_the_same() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let daemon = Daemon::start(tempfile::tempdir().unwrap()).await;
    let cases = [
        ("GET /v1/nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "404", "/v1/nothing"),
        (
            "POST /v1/mounts HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: 30\r\n\r\n{\"image\":\"a\",\"target\":\"/\",\"q\":1}",
            "400",
            "JSON",
        ),
        (
            "POST /v1/mounts HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: 32\r\n\r\n{\"image\":\"a\",\"target\":\"/\",\"q\":1} ",
            "400",
            "`q`",
        ),
        ("DELETE /v1/mounts HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "400", "target"),
    ];
    for (request, status, word) in cases {
        let mut stream = tokio::net::UnixStream::connect(daemon.path("d.sock")).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with(&format!("HTTP/1.1 {status}")), "{request}\n{reply}");
        let body = reply.split("\r\n\r\n").nth(1).unwrap();
        let error: skimmer_client::ApiError = serde_json::from_str(body).unwrap();
        assert!(error.error.contains(word), "{error}");
    }
    daemon.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_request_ends_the_server_after_its_answer() {
    let mut daemon = Daemon::start(tempfile::tempdir().unwrap()).await;
    let report = daemon.client.shutdown(true).await.unwrap();
    assert!(report.unmounted.is_empty() && report.remaining.is_empty());
    assert!(report.idle && !report.keeper_stopped, "there is none");
    assert_eq!(*daemon.stop.wait_for(Option::is_some).await.unwrap(), Some(Stop::Daemon));
    (&mut daemon.serving).await.unwrap().unwrap();
    let dir = daemon.driver.shutdown().await.map(|()| daemon.dir).unwrap();
    daemon.thread.join().unwrap().unwrap();
    assert!(daemon.journal.stop());
    daemon.mounts.finish(true).await.unwrap();
    drop(daemon.mounts);
    assert!(Store::open(&dir.path().join("root")).unwrap().load_mounts().unwrap().clean);
}

#[tokio::test]
async fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.sock");
    let first = control::listen(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(control::listen(&path), Err(SocketError::InUse(_))));
    drop(first);
    let second = control::listen(&path).unwrap();
    drop(second);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"a file").unwrap();
    assert!(matches!(control::listen(&path), Err(SocketError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}

fn this_boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

fn attachment(device: &str, bdi: &str) -> AttachmentRecord {
    AttachmentRecord {
        prepared: None,
        bootstrap: "a".repeat(64),
        mode: AttachMode::Fanotify,
        device: device.into(),
        bdi: Some(bdi.into()),
        mounts: vec![skimmer_client::Mount {
            target: "/nonexistent/target".into(),
            image: "oci:/x".into(),
            manifest: String::new(),
            mode: AttachMode::Fanotify,
            reason: String::new(),
            bootstrap: "a".repeat(64),
            blobs: vec![],
            mounted_at: 0,
            fault: None,
            traceparent: None,
        }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_mounts_that_are_gone_are_dropped_at_start() {
    let mut dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for boot in [this_boot(), "another boot".into()] {
        let store = Store::open(&root).unwrap();
        let attachments = vec![attachment("0:999999", "erofs-999999999")];
        store.save_mounts(&MountsRecord { boot, clean: false, attachments }).unwrap();
        drop(store);
        let daemon = Daemon::start(dir).await;
        assert_eq!(daemon.client.mounts().await.unwrap(), []);
        dir = daemon.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_clean_only_when_everything_is_on_record() {
    use skimmer_daemon::blob::{BlobId, ReadyBits};
    use skimmer_daemon::driver::ReadySink;
    use skimmer_daemon::frontend::Mode;
    use skimmer_daemon::store::journal::Tracked;
    let mut dir = tempfile::tempdir().unwrap();
    for (broken, untracked) in [(false, false), (true, false), (false, true), (false, false)] {
        let daemon = Daemon::start(dir).await;
        let (data, map, blob) = (daemon.path("data"), daemon.path("map"), BlobId::new([1; 32]));
        let data = std::fs::File::create(data).unwrap();
        std::fs::write(&map, b"").unwrap();
        // A map that cannot be written stands for a disk that fails.
        let map = std::fs::File::options().read(true).write(!broken).open(map).unwrap();
        let tracked = Tracked::new(blob, data, map, ReadyBits::new());
        daemon.journal.track(Mode::Fscache, tracked).await;
        if untracked {
            daemon.journal.untrack(Mode::Fscache, blob).await;
        }
        daemon.journal.ready(Mode::Fscache, blob, &[1]);
        dir = daemon.end().await;
        let store = Store::open(&dir.path().join("root")).unwrap();
        assert_eq!(store.load_mounts().unwrap().clean, !broken && !untracked, "{broken} {untracked}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_that_cannot_be_served_stay_on_record_with_their_fault() {
    // Any superblock that is alive will do: the record says that it is one of ours.
    let Some(bdi) = std::fs::read_dir("/sys/class/bdi").ok().and_then(|mut names| names.next()) else {
        return skimmer_test_support::skip_this("/sys/class/bdi is empty or not there");
    };
    let bdi = bdi.unwrap().file_name().into_string().unwrap();
    let mut dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    // What was detached and is still open has no mount to be shown, and is alive all the same.
    let record = AttachmentRecord { mounts: vec![], ..attachment("0:999999", &bdi) };
    let store = Store::open(&root).unwrap();
    let attachments = vec![record.clone()];
    store.save_mounts(&MountsRecord { boot: this_boot(), clean: false, attachments }).unwrap();
    drop(store);
    for _ in 0..2 {
        let daemon = Daemon::start(dir).await;
        dir = daemon.end().await;
        let left = Store::open(&root).unwrap().load_mounts().unwrap();
        assert_eq!(left.attachments, std::slice::from_ref(&record));
    }
}

#[test]
fn a_record_of_mounts_that_cannot_be_read_stops_the_start_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    drop(Store::open(&root).unwrap());
    std::fs::write(root.join("mounts.json"), b"not json").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_skimmerd"))
        .args([
            "--root".as_ref(),
            root.as_os_str(),
            "--socket".as_ref(),
            dir.path().join("d.sock").as_os_str(),
        ])
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && words.contains("mounts.json") && words.contains("unmount"),
        "{words}"
    );
    assert_eq!(std::fs::read(root.join("mounts.json")).unwrap(), b"not json");
}

#[tokio::test]
async fn the_openapi_document_is_what_the_server_does() {
    let daemon = Daemon::start(tempfile::tempdir().unwrap()).await;
    let written = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let written = std::fs::read_to_string(written).unwrap();
    assert_eq!(written.trim(), control::document().trim(), "run: cargo xtask docs");
    let document: serde_json::Value = serde_json::from_str(&written).unwrap();
    let http = reqwest::Client::builder().unix_socket(daemon.path("d.sock")).no_proxy().build().unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 7, "{:?}", paths.keys());
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            // Ending it comes last.
            if path == "/v1/shutdown" {
                continue;
            }
            let method: reqwest::Method = method.to_uppercase().parse().unwrap();
            let reply = http.request(method.clone(), format!("http://skimmerd{path}")).send().await.unwrap();
            let status = reply.status();
            let text = reply.text().await.unwrap();
            assert!(!text.contains("there is no such call"), "{method} {path}: {text}");
            if status.is_success() && path != "/metrics" {
                let schema = &methods[method.as_str().to_lowercase()]["responses"]["200"]["content"]["application/json"]
                    ["schema"];
                conforms(&document, schema, &serde_json::from_str(&text).unwrap(), path);
            } else if !status.is_success() {
                let schema = serde_json::json!({"$ref": "#/components/schemas/ApiError"});
                conforms(&document, &schema, &serde_json::from_str(&text).unwrap(), path);
            }
        }
    }
    // Its connections would keep the daemon.
    drop(http);
    daemon.end().await;
}

/// Whether a value has the fields that its schema wants, and no others.
fn conforms(document: &serde_json::Value, schema: &serde_json::Value, value: &serde_json::Value, at: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.strip_prefix("#").unwrap();
        return conforms(document, document.pointer(name).unwrap(), value, at);
    }
    if let Some(items) = schema.get("items") {
        for (number, item) in value.as_array().unwrap_or_else(|| panic!("{at}: {value}")).iter().enumerate() {
            conforms(document, items, item, &format!("{at}[{number}]"));
        }
    } else if let Some(properties) = schema["properties"].as_object() {
        let object = value.as_object().unwrap_or_else(|| panic!("{at}: {value}"));
        for name in schema["required"].as_array().into_iter().flatten() {
            assert!(object.contains_key(name.as_str().unwrap()), "{at}: {name} is missing in {value}");
        }
        for (name, value) in object {
            let schema = properties.get(name).unwrap_or_else(|| panic!("{at}: {name} is not described"));
            conforms(document, schema, value, &format!("{at}.{name}"));
        }
    } else if let Some(kind) = schema["type"].as_str() {
        let fits = match kind {
            "string" => value.is_string(),
            "integer" => value.is_u64(),
            "boolean" => value.is_boolean(),
            _ => true,
        };
        assert!(fits, "{at}: {value} is no {kind}");
    }
}
