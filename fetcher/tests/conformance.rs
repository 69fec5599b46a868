//! One table of cases that every source must pass: a layout, an archive, the fault registry when it is
//! honest, and Debian's docker-registry, plain, with a password, and over TLS.

#![allow(clippy::unwrap_used)] // test code, though not in a test function

mod common;

use common::table::{chunks_come, conforms};
use common::{ALL_CODECS, DockerRegistry, Setup, options, reference, registry, sample, with_password};
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::copy::{self, CopyOptions, Progress};
use skimmer_fetcher::image::{self, OpenOptions};
use skimmer_fetcher::reference::Reference;
use skimmer_fetcher::registry::RegistryOptions;
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, Urgency};
use skimmer_fetcher::testing::FaultServer;

#[tokio::test(flavor = "multi_thread")]
async fn layout_and_archive() {
    let sample = sample(&ALL_CODECS);
    conforms(&sample.layout, &sample).await;
    let path = sample.dir.path().join("img.tar");
    Archive::pack(&sample.layout, &path).unwrap();
    conforms(&Archive::open(&path).unwrap(), &sample).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_registry_when_honest() {
    let sample = sample(&ALL_CODECS);
    let server = FaultServer::start(sample.layout.clone()).unwrap();
    conforms(&registry(&server.host(), &options()), &sample).await;
    for request in server.take_log() {
        assert_eq!(request.accept_encoding.as_deref(), Some("identity"), "{request:?}");
        assert!(!request.authorized, "{request:?}");
    }
}

/// Pushes a sample, runs the table, opens the image, and pulls it back.
async fn round_trip(setup: Setup) {
    let Some(server) = DockerRegistry::start(setup) else { return };
    let sample = sample(&ALL_CODECS);
    let mut options: RegistryOptions = options();
    if setup.htpasswd {
        options = with_password(&server.host, options);
    }
    if setup.tls {
        options.http.https = vec![server.host.clone()];
        options.http.extra_ca = vec![server.certificate()];
    }
    // Small enough that the sample's blob goes up in pieces.
    options.upload_piece = 1 << 20;
    let copying = CopyOptions { registry: options.clone(), ..CopyOptions::default() };
    let name = reference(&server.host);

    let pushed = copy::push(&sample.layout, Some("v1"), &name, &copying).await.unwrap();
    assert_eq!((pushed.digest, pushed.copied, pushed.skipped), (sample.manifest, 3, 0), "{setup:?}");
    let again = copy::push(&sample.layout, None, &name, &copying).await.unwrap();
    assert_eq!((again.copied, again.skipped), (0, 3), "{setup:?}");

    let source = registry(&server.host, &options);
    conforms(&source, &sample).await;
    let raw = source.manifest("v1").await.unwrap();
    assert_eq!(raw.digest, sample.manifest);
    assert_eq!(source.manifest(&sample.manifest.to_string()).await.unwrap(), raw);
    assert_eq!(source.manifest("none").await.unwrap_err().class, ErrorClass::NotFound);

    let reference = Reference::Registry(name.clone());
    let opening = OpenOptions { registry: options.clone(), ..OpenOptions::default() };
    let remote = image::open(&reference, &opening).await.unwrap();
    assert_eq!(remote.bootstrap, common::BOOTSTRAP);
    assert_eq!(remote.blobs, [sample.blob]);
    assert_eq!(remote.blob(&sample.blob.digest.hex()), Some(sample.blob));
    chunks_come(&*remote.source, &sample, 0..22).await;

    let back = Reference::Layout { dir: sample.dir.path().join("back"), tag: Some("x".into()) };
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = std::sync::Arc::clone(&seen);
    let copying = CopyOptions {
        progress: Some(std::sync::Arc::new(move |progress| told.lock().unwrap().push(progress))),
        ..copying
    };
    let pulled = copy::copy(&reference, &back, &copying).await.unwrap();
    assert_eq!((pulled.digest, pulled.copied), (sample.manifest, 3));
    let bytes: u64 = seen
        .lock()
        .unwrap()
        .iter()
        .map(|progress| match progress {
            Progress::Bytes(_, count) => *count,
            _ => 0,
        })
        .sum();
    assert_eq!(bytes, pulled.copied_bytes);
    assert_eq!(image::open(&back, &opening).await.unwrap().bootstrap, common::BOOTSTRAP);

    // Taking the blob over into another repository, as far as the registry will.
    let other = skimmer_fetcher::reference::RegistryRef::parse(&format!("{}/other:v1", server.host)).unwrap();
    let other = skimmer_fetcher::registry::Registry::new(&other, &options).unwrap();
    assert!(other.needs_blob(&sample.blob).await.unwrap());
    assert!(other.mount_blob(&sample.blob, "a/b").await.unwrap());
    assert!(!other.needs_blob(&sample.blob).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_plain() {
    round_trip(Setup::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_with_password_and_relative_urls() {
    round_trip(Setup { htpasswd: true, relative_urls: true, tls: false }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_over_tls() {
    round_trip(Setup { tls: true, htpasswd: true, ..Setup::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_refuses_strangers() {
    let setup = Setup { htpasswd: true, tls: true, relative_urls: false };
    let Some(server) = DockerRegistry::start(setup) else { return };
    let mut options = options();
    options.http.https = vec![server.host.clone()];
    let unknown = registry(&server.host, &options).manifest("v1").await.unwrap_err();
    assert_eq!(unknown.class, ErrorClass::Certificate, "{unknown}");

    options.http.extra_ca = vec![server.certificate()];
    let nobody = registry(&server.host, &options).manifest("v1").await.unwrap_err();
    assert_eq!(nobody.class, ErrorClass::Denied, "{nobody}");
    assert!(nobody.to_string().contains("login"), "{nobody}");

    let wrong = skimmer_fetcher::credentials::Secret::new("wrong-password");
    options.credentials = options.credentials.with_password(&server.host, common::USER, wrong);
    let wrong = registry(&server.host, &options).manifest("v1").await.unwrap_err();
    assert_eq!(wrong.class, ErrorClass::Denied, "{wrong}");
    assert!(!wrong.to_string().contains("wrong-password"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_416_is_no_trap() {
    let Some(server) = DockerRegistry::start(Setup::default()) else { return };
    let sample = sample(&ALL_CODECS);
    let copying = CopyOptions { registry: options(), ..CopyOptions::default() };
    copy::push(&sample.layout, None, &reference(&server.host), &copying).await.unwrap();
    // A manifest that lies about the size leads past the blob's end.
    let lie = BlobRef { size: sample.blob.size + 1000, ..sample.blob };
    let error = registry(&server.host, &options())
        .read(&lie, lie.size - 10..lie.size, Urgency::Demand)
        .await
        .unwrap_err();
    assert_eq!(error.class, ErrorClass::BadRange, "{error}");
}
