//! OCI layouts behind a URL: nginx and a real S3 server pass the table that every source passes.

#![allow(clippy::unwrap_used)] // test code, though not in a test function

mod common;

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::nginx::{Nginx, certificate};
use common::table::conforms;
use common::{ALL_CODECS, Sample, options, sample};
use skimmer_fetcher::copy::{self, CopyOptions};
use skimmer_fetcher::credentials::Secret;
use skimmer_fetcher::image::{self, ImageError, OpenOptions};
use skimmer_fetcher::origin::Origin;
use skimmer_fetcher::reference::Reference;
use skimmer_fetcher::registry::RegistryOptions;
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, Urgency};
use skimmer_test_support::{scratch_dir, tools};

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn name(text: &str) -> Reference {
    Reference::parse_source(text).unwrap()
}

fn origin(text: &str, options: &RegistryOptions) -> Origin {
    let Reference::Origin(reference) = name(text) else { panic!("{text} is no origin") };
    Origin::new(&reference, options).unwrap()
}

/// The image opens, its blobs come, and it can be pulled.
async fn serves(url: &str, sample: &Sample, options: &RegistryOptions) {
    conforms(&origin(url, options), sample).await;
    let opening = OpenOptions { registry: options.clone(), ..OpenOptions::default() };
    for tagged in [url.to_owned(), format!("{url}:v1")] {
        let remote = image::open(&name(&tagged), &opening).await.unwrap();
        assert_eq!(
            (remote.bootstrap.as_slice(), remote.manifest_digest),
            (common::BOOTSTRAP, sample.manifest)
        );
        assert_eq!(remote.reference.to_string(), tagged);
    }
    let absent = image::open(&name(&format!("{url}:none")), &opening).await.unwrap_err();
    assert!(absent.to_string().contains("no image is named `none`"), "{absent}");
    let nowhere = image::open(&name(&format!("{url}/nowhere")), &opening).await.unwrap_err();
    let ImageError::Source { error, .. } = &nowhere else { panic!("{nowhere}") };
    assert_eq!(error.class, ErrorClass::NotFound, "{nowhere}");
    // What the descriptor says of the size is held against the server.
    let lie = BlobRef { size: sample.blob.size + 5, ..sample.blob };
    let source = origin(url, options);
    assert_eq!(source.read(&lie, 5..9, Urgency::Demand).await.unwrap_err().class, ErrorClass::BadReply);

    let back = tempfile::tempdir().unwrap();
    let to = Reference::Layout { dir: back.path().join("img"), tag: Some("x".into()) };
    let copying = CopyOptions { registry: options.clone(), ..CopyOptions::default() };
    let report = copy::copy(&name(url), &to, &copying).await.unwrap();
    assert_eq!((report.digest, report.copied), (sample.manifest, 3));
    assert!(copy::copy(&to, &name(url), &copying).await.unwrap_err().to_string().contains("only read"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_web_server_over_tls() {
    let sample = sample(&ALL_CODECS);
    let dir = scratch_dir();
    let own = ["-addext", "basicConstraints=critical,CA:FALSE"];
    let Some((cert, key)) = certificate(dir.path(), "server", &own) else { return };
    copy_tree(sample.layout.root(), &dir.path().join("www/some/img"));
    let server = format!(
        "listen {{host}} ssl;\nssl_certificate {};\nssl_certificate_key {};\nroot {}/www;\n",
        cert.display(),
        key.display(),
        dir.path().display()
    );
    let Some(nginx) = Nginx::start(dir, &server) else { return };
    let mut options = options();
    options.http.extra_ca.push(cert);
    serves(&format!("https://{}/some/img", nginx.host), &sample, &options).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_web_server_without_ranges() {
    let sample = sample(&ALL_CODECS);
    let dir = scratch_dir();
    copy_tree(sample.layout.root(), &dir.path().join("www/img"));
    let server = format!("listen {{host}};\nroot {}/www;\nmax_ranges 0;\n", dir.path().display());
    let Some(nginx) = Nginx::start(dir, &server) else { return };
    conforms(&origin(&format!("http://{}/img", nginx.host), &options()), &sample).await;
    let log = nginx.log();
    let path = format!("/img/blobs/sha256/{}", sample.blob.digest.hex());
    let asked = log.lines().filter(|line| line.contains("GET") && line.contains(&path)).count();
    // Nearly everything came from one copy.
    assert!((2..=5).contains(&asked), "{log}");
}

/// versitygw over a directory.
struct S3 {
    child: Child,
    host: String,
    _dir: tempfile::TempDir,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl S3 {
    #[track_caller]
    fn start(sample: &Sample) -> Option<Self> {
        let program = tools::VERSITYGW.installed()?;
        let dir = scratch_dir();
        copy_tree(sample.layout.root(), &dir.path().join("data/bucket/some/img"));
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let host = format!("127.0.0.1:{port}");
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let mut child = Command::new(&program)
                .args(["--access", "me", "--secret", "hunter22", "--port", &host, "posix"])
                .arg(dir.path().join("data"))
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let until = Instant::now() + Duration::from_secs(30);
            while Instant::now() < until && child.try_wait().unwrap().is_none() {
                if TcpStream::connect(&host).is_ok() {
                    return Some(Self { child, host, _dir: dir });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("versitygw does not start:\n{}", std::fs::read_to_string(dir.path().join("log")).unwrap());
    }

    fn options(&self, password: &str) -> RegistryOptions {
        let option = |key: &str, value: &str| (key.to_owned(), Secret::new(value));
        RegistryOptions {
            s3: vec![
                option("endpoint", &format!("http://{}", self.host)),
                option("region", "us-east-1"),
                option("access_key_id", "me"),
                option("secret_access_key", password),
            ],
            ..options()
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_s3_server() {
    let sample = sample(&ALL_CODECS);
    let Some(server) = S3::start(&sample) else { return };
    serves("s3://bucket/some/img", &sample, &server.options("hunter22")).await;

    let wrong = origin("s3://bucket/some/img", &server.options("hunter23"));
    let error = wrong.read(&sample.blob, 0..9, Urgency::Demand).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::Denied, "{error}");
    assert!(!error.to_string().contains("hunter2"), "{error}");
    for (key, value, word) in [("colour", "red", "`colour`"), ("endpoint", "http://example.org", "insecure")]
    {
        let mut options = server.options("hunter22");
        options.s3.push((key.to_owned(), Secret::new(value)));
        let Reference::Origin(reference) = name("s3://bucket/some/img") else { panic!() };
        let error = Origin::new(&reference, &options).map(drop).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}
