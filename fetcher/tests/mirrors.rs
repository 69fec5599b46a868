//! Mirrors of a registry as `hosts.toml` lists them: who is asked for what, and what a bad one costs.

#![allow(clippy::unwrap_used)] // test code, though not in a test function

mod common;

use std::time::Duration;

use common::nginx::{Nginx, certificate};
use common::{ALL_CODECS, DockerRegistry, Sample, Setup, options, reference, sample};
use skimmer_fetcher::chunk::{FetchError, fetch};
use skimmer_fetcher::copy::{self, CopyOptions};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::http::Version;
use skimmer_fetcher::image::{self, OpenOptions};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::reference::Reference;
use skimmer_fetcher::registry::{Dragonfly, RegistryOptions, Repository};
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, Urgency};
use skimmer_fetcher::testing::{Bearer, Fault, FaultServer, Login};

/// Two mirrors and the registry, all with the same image.
struct World {
    sample: Sample,
    mirrors: [FaultServer; 2],
    upstream: FaultServer,
    certs: tempfile::TempDir,
    options: RegistryOptions,
}

fn world() -> World {
    let sample = sample(&ALL_CODECS);
    let server = || FaultServer::start(sample.layout.clone()).unwrap();
    let (mirrors, upstream, certs) = ([server(), server()], server(), tempfile::tempdir().unwrap());
    let mut options = options();
    options.hosts_dir = Some(certs.path().to_owned());
    options.http.timeouts.first_byte = Duration::from_secs(5);
    let world = World { sample, mirrors, upstream, certs, options };
    let [one, two] = [world.mirrors[0].host(), world.mirrors[1].host()];
    world.write(&format!(
        "[host.'http://{one}']\ncapabilities = ['pull']\n[host.'http://{one}'.header]\nx-key = 'k'\n\
         [host.'http://{two}']\ncapabilities = ['pull', 'resolve']\n"
    ));
    world
}

impl World {
    fn write(&self, text: &str) {
        let dir = self.certs.path().join(self.upstream.host());
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    fn repository(&self) -> Repository {
        Repository::new(&reference(&self.upstream.host()), &self.options).unwrap()
    }

    /// Requests for blobs that each of the three was asked.
    fn asked(&self) -> [u64; 3] {
        [&self.mirrors[0], &self.mirrors[1], &self.upstream].map(|server| server.counts().blob_requests)
    }

    async fn fetch_all(&self, source: &dyn Source) -> Result<usize, FetchError> {
        let chunks = &self.sample.chunks;
        let plan = chunks.iter().map(|(spec, data)| (*spec, vec![0; data.len()])).collect();
        let mut came = 0;
        fetch(source, &self.sample.blob, plan, |at, verified| {
            assert!(verified.bytes() == chunks[at].1, "chunk {at} is wrong");
            came += 1;
        })
        .await?;
        Ok(came)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_in_order_and_for_what_they_may() {
    let world = world();
    let name = Reference::Registry(reference(&world.upstream.host()));
    let opening = OpenOptions { registry: world.options.clone(), ..OpenOptions::default() };
    let remote = image::open(&name, &opening).await.unwrap();
    assert_eq!(remote.bootstrap, common::BOOTSTRAP);
    assert_eq!(remote.source.width(), 3);
    // The tag was looked up at the second, which alone may be asked; blobs came from the first.
    let manifests = |server: &FaultServer| {
        server.take_log().iter().filter(|request| request.target.contains("/manifests/")).count()
    };
    assert_eq!(world.asked(), [2, 0, 0]);
    let ns = format!("?ns={}", world.upstream.host().replace(':', "%3A"));
    let log = world.mirrors[0].take_log();
    assert!(log.iter().all(|request| request.target.ends_with(&ns)), "{log:?}");
    assert_eq!((manifests(&world.mirrors[1]), manifests(&world.upstream)), (1, 0));
    assert_eq!(world.fetch_all(&*remote.source).await.unwrap(), 22);
    assert_eq!(world.asked(), [3, 0, 0]);

    // A registry that no file speaks of is asked itself.
    let other = RegistryOptions { hosts_dir: Some("/nonexistent".into()), ..world.options.clone() };
    let source = Repository::new(&reference(&world.upstream.host()), &other).unwrap();
    assert_eq!(world.fetch_all(&source).await.unwrap(), 22);
    assert_eq!(world.asked(), [3, 0, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_mirror_costs_no_more_than_a_request() {
    for fault in [
        Fault::Status { code: 404, headers: Vec::new(), body: Vec::new() },
        Fault::Status { code: 403, headers: Vec::new(), body: Vec::new() },
        Fault::Status { code: 416, headers: Vec::new(), body: Vec::new() },
        Fault::Status { code: 429, headers: vec![("retry-after".into(), "60".into())], body: Vec::new() },
        Fault::Status { code: 503, headers: Vec::new(), body: Vec::new() },
        Fault::Redirect { code: 302, location: "/v2/a/b/blobs/{digest}".into() },
        Fault::IgnoreRange,
        Fault::ShiftedRange,
        Fault::WrongTotal,
        Fault::Drop,
        Fault::Truncate(100_000),
        Fault::Stall(100_000),
        Fault::SlowFirstByte(Duration::from_secs(60)),
    ] {
        let world = world();
        world.mirrors[0].fault(fault.clone());
        let source = world.repository();
        let (first, blob) = (world.sample.chunks[3].0.stored_offset, world.sample.blob);
        let body = source.read(&blob, first..blob.size, Urgency::Demand).await;
        let bytes = body.unwrap_or_else(|error| panic!("{fault:?}: {error}")).collect().await.unwrap();
        let all = std::fs::read(world.sample.layout.blob_path(&blob.digest)).unwrap();
        assert!(bytes == all[usize::try_from(first).unwrap()..], "{fault:?}");
        assert_eq!(world.asked()[1], 1, "{fault:?}");
        assert_eq!(world.asked()[2], 0, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_mirror_is_left_for_the_next() {
    let world = world();
    world.mirrors[0].fault(Fault::WrongBytes);
    let source = world.repository();
    let error = world.fetch_all(&source).await.unwrap_err();
    assert!(error.to_string().contains(&world.mirrors[0].host()), "{error}");
    // The same again, as the engine would have it: not from the one that lied.
    assert_eq!(world.fetch_all(&source).await.unwrap(), 22);
    assert_eq!(world.asked(), [1, 1, 0]);
    // Opening an image, and pulling it, turn to the next by themselves.
    world.mirrors[1].fault(Fault::WrongBytes);
    let name = Reference::Registry(reference(&world.upstream.host()));
    let opening = OpenOptions { registry: world.options.clone(), ..OpenOptions::default() };
    assert_eq!(image::open(&name, &opening).await.unwrap().bootstrap, common::BOOTSTRAP);
    let back = tempfile::tempdir().unwrap();
    let layout = Layout::create(back.path().join("img")).unwrap();
    let copying = CopyOptions { registry: world.options.clone(), ..CopyOptions::default() };
    let report = copy::pull(&name, &layout, Some("x"), &copying).await.unwrap();
    assert_eq!((report.digest, report.copied), (world.sample.manifest, 3));

    world.upstream.fault(Fault::WrongBytes);
    let error = world.fetch_all(&source).await.unwrap_err();
    assert!(matches!(error, FetchError::Chunk { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_no_host_is_good_each_is_named() {
    let world = world();
    for server in world.mirrors.iter().chain([&world.upstream]) {
        server.fault(Fault::Status { code: 404, headers: Vec::new(), body: Vec::new() });
    }
    let source = world.repository();
    let error = source.read(&world.sample.blob, 0..10, Urgency::Demand).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::NotFound);
    for server in world.mirrors.iter().chain([&world.upstream]) {
        assert!(error.to_string().contains(&server.host()), "{error}");
    }
    let absent = BlobRef { digest: Digest::of(b"absent"), size: 10 };
    assert!(!source.has(&absent).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_followed() {
    let world = world();
    let source = world.repository();
    world.fetch_all(&source).await.unwrap();
    world.write(&format!("[host.'http://{}']\n", world.mirrors[1].host()));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    world.fetch_all(&source).await.unwrap();
    assert_eq!(world.asked(), [1, 1, 0]);
    // A broken one changes nothing, and is an error for whoever comes new.
    world.write("[host.'http://x']\ncapabilities = 'all'\n");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    world.fetch_all(&source).await.unwrap();
    assert_eq!(world.asked(), [1, 2, 0]);
    let error = Repository::new(&reference(&world.upstream.host()), &world.options).map(drop).unwrap_err();
    assert!(error.to_string().contains("hosts.toml"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registrys_password_is_not_for_mirrors() {
    let mut world = world();
    let user = ("u".to_owned(), "p".to_owned());
    let login = Login::Bearer(Bearer { password: Some(user), ..Bearer::default() });
    world.upstream.login(login.clone());
    world.mirrors[0].login(login);
    world.options.credentials = world.options.credentials.with_password(
        &world.upstream.host(),
        "u",
        skimmer_fetcher::credentials::Secret::new("p"),
    );
    world.mirrors[1].fault(Fault::Status { code: 404, headers: Vec::new(), body: Vec::new() });
    let source = world.repository();
    assert_eq!(world.fetch_all(&source).await.unwrap(), 22);
    assert!(world.mirrors.iter().all(|mirror| mirror.take_log().iter().all(|request| !request.authorized)));
    assert!(world.upstream.take_log().iter().any(|request| request.authorized));
}

#[tokio::test(flavor = "multi_thread")]
async fn dragonfly_is_asked_for_a_piece_once_until_it_has_it() {
    let mut world = world();
    let [dragonfly, other] = &world.mirrors;
    world.write("");
    world.options.dragonfly = Some(Dragonfly::new(&format!("http://{}", dragonfly.host()), false).unwrap());
    let source = world.repository();
    assert_eq!(source.piece(&world.sample.blob), Some(4 << 20));
    // It takes less than the registry is given before it is asked, too.
    dragonfly.fault_times(Fault::SlowFirstByte(Duration::from_millis(100)), 1);
    let read = |at: u64| {
        let (source, blob) = (source.clone(), world.sample.blob);
        tokio::spawn(async move {
            source.read(&blob, at..at + 100, Urgency::Demand).await.unwrap().collect().await
        })
    };
    let readers: Vec<_> = (0..8).map(|reader| read(reader * 1000)).collect();
    let mut came = Vec::new();
    for reader in readers {
        came.push(reader.await.unwrap().unwrap());
    }
    assert_eq!(dragonfly.counts().blob_requests, 8);
    assert!(dragonfly.counts().most_at_once < 8, "they did not wait for each other");
    assert_eq!(other.counts().requests, 0);
    let stored = std::fs::read(world.sample.layout.blob_path(&world.sample.blob.digest)).unwrap();
    assert!((0..).step_by(1000).zip(&came).all(|(at, bytes)| stored[at..at + 100] == bytes[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn dragonfly_is_to_fetch_a_hot_blob_whole() {
    const PIECE: u64 = 4 << 20;
    let mut world = world();
    world.write("");
    let bytes = vec![7; 6 * usize::try_from(PIECE).unwrap()];
    let blob = BlobRef { digest: Digest::of(&bytes), size: 6 * PIECE };
    std::fs::write(world.sample.layout.blob_path(&blob.digest), bytes).unwrap();
    for prefetch in [false, true] {
        let dragonfly = &world.mirrors[0];
        world.options.dragonfly =
            Some(Dragonfly::new(&format!("http://{}", dragonfly.host()), prefetch).unwrap());
        let source = world.repository();
        for at in [0, 1, 2, 5] {
            let body = source.read(&blob, at * PIECE..at * PIECE + 100, Urgency::Demand).await.unwrap();
            assert_eq!(body.collect().await.unwrap(), vec![7; 100]);
        }
        let told: Vec<bool> = dragonfly.take_log().iter().map(|request| request.prefetch).collect();
        assert_eq!(told, [false, false, prefetch, prefetch]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ranges_the_whole_blob_is_downloaded_once() {
    let world = world();
    for server in world.mirrors.iter().chain([&world.upstream]) {
        server.fault(Fault::IgnoreRange);
    }
    let source = world.repository();
    let (blob, first) = (world.sample.blob, world.sample.chunks[3].0.stored_offset);
    let all = std::fs::read(world.sample.layout.blob_path(&blob.digest)).unwrap();
    let read = async |range: std::ops::Range<u64>| {
        let body = source.read(&blob, range.clone(), Urgency::Demand).await.unwrap();
        let at = |byte: u64| usize::try_from(byte).unwrap();
        assert!(body.collect().await.unwrap() == all[at(range.start)..at(range.end)], "{range:?}");
    };
    read(first..blob.size).await;
    let asked = world.asked();
    // Each was asked for the range, and one of them for the blob; from then on nobody is asked.
    assert_eq!(asked, [2, 1, 1]);
    futures_util::future::join_all((1..20).map(|n| read(n * 1000..n * 1000 + 5000))).await;
    assert_eq!(world.asked(), asked);
    assert_eq!(world.fetch_all(&source).await.unwrap(), 22);
    // A download that breaks off is begun again, and given up after some times.
    let broken = self::world();
    for server in broken.mirrors.iter().chain([&broken.upstream]) {
        server.fault(Fault::IgnoreRange);
    }
    let source = broken.repository();
    source.read(&blob, 5..6, Urgency::Demand).await.unwrap();
    broken.mirrors[0].fault(Fault::Status { code: 503, headers: Vec::new(), body: Vec::new() });
    let other = broken.sample.manifest;
    let size = std::fs::metadata(broken.sample.layout.blob_path(&other)).unwrap().len();
    let other = BlobRef { digest: other, size };
    let error = source.read(&other, 5..6, Urgency::Demand).await.unwrap_err();
    assert!(error.to_string().contains("503"), "{error}");
}

/// nginx before a real registry: TLS, a client certificate, and HTTP/2.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_wants_a_client_certificate() {
    let Some(registry) = DockerRegistry::start(Setup::default()) else { return };
    let sample = sample(&ALL_CODECS);
    let copying = CopyOptions { registry: options(), ..CopyOptions::default() };
    copy::push(&sample.layout, Some("v1"), &reference(&registry.host), &copying).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let own = ["-addext", "basicConstraints=critical,CA:FALSE"];
    let Some((cert, key)) = certificate(dir.path(), "server", &own) else { return };
    let Some((client, client_key)) = certificate(dir.path(), "client", &[]) else { return };
    let server = format!(
        "listen {{host}} ssl http2;\nssl_certificate {};\nssl_certificate_key {};\nssl_client_certificate {};\n\
         ssl_verify_client on;\nlocation / {{ if ($http_x_key != k) {{ return 403; }} \
         proxy_pass http://{}; proxy_set_header Host $http_host; }}\n",
        cert.display(),
        key.display(),
        client.display(),
        registry.host,
    );
    let Some(nginx) = Nginx::start(dir, &server) else { return };
    let certs = tempfile::tempdir().unwrap();
    let hosts = |text: &str| {
        let dir = certs.path().join("_default");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    };
    let table = format!("[host.'https://{}']\nca = '{}'\n", nginx.host, cert.display());
    let header = format!("[host.'https://{}'.header]\nx-key = 'k'\n", nginx.host);
    let pair = format!("client = [['{}', '{}']]\n", client.display(), client_key.display());
    // A registry that is not there: everything must come from the mirror.
    let dead = reference("127.0.0.1:1");
    let mut options = RegistryOptions { hosts_dir: Some(certs.path().to_owned()), ..options() };
    let open = |options: &RegistryOptions| Repository::new(&dead, options).unwrap();

    hosts(&format!("{table}{pair}{header}"));
    for (asked, version) in [Version::Auto, Version::One, Version::Two].into_iter().enumerate() {
        options.http.version = version;
        let source = open(&options);
        assert_eq!(source.manifest("v1").await.unwrap().digest, sample.manifest);
        let bytes = source.read(&sample.blob, 5..sample.blob.size, Urgency::Demand).await.unwrap();
        let bytes = bytes.collect().await.unwrap();
        assert!(bytes == std::fs::read(sample.layout.blob_path(&sample.blob.digest)).unwrap()[5..]);
        // nginx writes its line after the last byte is out.
        let blob = loop {
            let log = nginx.log();
            let mut blobs = log.lines().filter(|line| line.contains("/blobs/"));
            if let Some(blob) = blobs.nth(asked) {
                break blob.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let spoken = if version == Version::Two { "HTTP/2.0" } else { "HTTP/1.1" };
        assert!(blob.contains(spoken), "{version:?}: {blob}");
    }
    for (text, word) in [
        (format!("{table}{header}"), "127.0.0.1"),
        (format!("{table}{pair}"), "403"),
        (format!("[host.'https://{}']\n{pair}{header}", nginx.host), "CA file"),
        (format!("{table}client = '/nonexistent/c.pem'\n{header}"), "/nonexistent/c.pem"),
    ] {
        hosts(&text);
        let error = open(&options).manifest("v1").await.unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    hosts(&format!("[host.'https://{}']\nskip_verify = true\n{pair}{header}", nginx.host));
    assert_eq!(open(&options).manifest("v1").await.unwrap().digest, sample.manifest);
}
