//! Signatures of images: the real cosign signs in the real registry, and then whoever may lies.

#![allow(clippy::unwrap_used, reason = "test code, though not in a test function")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{DockerRegistry, Sample, Setup, Shape, options, reference, registry, sample, store_image};
use skimmer_fetcher::chunk::Codec;
use skimmer_fetcher::copy::{self, CopyOptions, Images};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::image::{self, ImageError, OpenOptions, Remote};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, RawManifest};
use skimmer_fetcher::reference::{Reference, RegistryRef};
use skimmer_fetcher::registry::Registry;
use skimmer_fetcher::signature::Keys;
use skimmer_fetcher::testing::{Fault, FaultServer};
use skimmer_test_support::tools::COSIGN;

/// cosign with a directory of keys, and an image in a registry.
struct World {
    cosign: PathBuf,
    server: DockerRegistry,
    sample: Sample,
    name: RegistryRef,
}

/// The forms in which cosign 3 signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Payload,
    Bundle,
}

const FORMS: [Form; 2] = [Form::Payload, Form::Bundle];

impl World {
    async fn start() -> Option<Self> {
        let cosign = COSIGN.installed()?;
        let server = DockerRegistry::start(Setup::default())?;
        let sample = sample(&[Codec::Zstd]);
        let name = reference(&server.host);
        copy::push(&sample.layout, Some("v1"), &name, &copying()).await.unwrap();
        let world = Self { cosign, server, sample, name };
        world.run(&["signing-config", "create", "--out", "no-services.json"]);
        Some(world)
    }

    fn dir(&self) -> &Path {
        self.sample.dir.path()
    }

    fn run(&self, arguments: &[&str]) {
        let mut cosign = Command::new(&self.cosign);
        cosign.args(arguments).current_dir(self.dir()).env("COSIGN_PASSWORD", "");
        // Nobody's trusted roots: they are fetched, and keys need none.
        cosign.env("TUF_ROOT", self.dir().join("tuf")).env("HOME", self.dir());
        let said = cosign.output().unwrap();
        assert!(said.status.success(), "cosign {arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
    }

    /// A key pair of cosign's own, or one that openssl made; gives the public key.
    fn key(&self, name: &str, openssl: &[&str]) -> PathBuf {
        if openssl.is_empty() {
            self.run(&["generate-key-pair", "--output-key-prefix", name]);
        } else {
            let private = self.dir().join("private.pem");
            let made =
                Command::new("openssl").arg("genpkey").args(openssl).arg("-out").arg(&private).output();
            let made = made.unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            self.run(&["import-key-pair", "--key", "private.pem", "--output-key-prefix", name]);
        }
        self.dir().join(format!("{name}.pub"))
    }

    fn image(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.server.host, self.name.repository())
    }

    fn sign(&self, key: &str, digest: &Digest, form: Form) {
        let key = format!("{key}.key");
        let mut arguments = vec!["sign", "--yes", "--allow-http-registry", "--key", &key];
        arguments.extend(match form {
            Form::Payload => {
                &["--use-signing-config=false", "--tlog-upload=false", "--new-bundle-format=false"][..]
            }
            Form::Bundle => &["--signing-config", "no-services.json"][..],
        });
        let image = self.image(digest);
        self.run(&[&arguments[..], &[&image]].concat());
    }

    fn registry(&self) -> Registry {
        registry(&self.server.host, &options())
    }

    async fn open(&self, keys: &[&PathBuf]) -> Result<Remote, ImageError> {
        open(&Reference::Registry(self.name.clone()), keys).await
    }

    /// Puts another image under the name; gives its manifest.
    async fn push_another(&self, bytes: &[u8]) -> Digest {
        let tar = common::bootstrap_tar(&[("image/image.boot", bytes)]);
        let raw = store_image(
            &self.sample.layout,
            &self.sample.blob,
            Shape { tar, ..Shape::default() },
            Some("v2"),
        );
        copy::push(&self.sample.layout, Some("v2"), &self.name, &copying()).await.unwrap();
        raw.digest
    }
}

fn copying() -> CopyOptions {
    CopyOptions { registry: options(), ..CopyOptions::default() }
}

async fn open(reference: &Reference, keys: &[&PathBuf]) -> Result<Remote, ImageError> {
    let files: Vec<PathBuf> = keys.iter().map(|key| (*key).clone()).collect();
    let signed_by = Some(Keys::load(&files).unwrap());
    image::open(reference, &OpenOptions { registry: options(), signed_by, ..OpenOptions::default() }).await
}

fn refusal(result: Result<Remote, ImageError>) -> String {
    match result {
        Err(error @ ImageError::Unsigned { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_signed_counts() {
    for form in FORMS {
        let Some(world) = World::start().await else { return };
        let (key, other) = (world.key("key", &[]), world.key("other", &[]));
        let said = refusal(world.open(&[&key]).await);
        assert!(said.contains("has no signature") && said.contains("key.pub"), "{form:?}: {said}");

        world.sign("other", &world.sample.manifest, form);
        let said = refusal(world.open(&[&key]).await);
        assert!(said.contains("(1)") && said.contains("another key"), "{form:?}: {said}");
        assert_eq!(world.open(&[&key, &other]).await.unwrap().bootstrap, common::BOOTSTRAP, "{form:?}");

        // One of several.
        world.sign("key", &world.sample.manifest, form);
        assert_eq!(world.open(&[&key]).await.unwrap().bootstrap, common::BOOTSTRAP, "{form:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_kinds_of_keys_are_known() {
    let Some(world) = World::start().await else { return };
    for (name, openssl) in [
        ("p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"][..]),
        ("rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"]),
    ] {
        let key = world.key(name, openssl);
        for form in FORMS {
            let digest = world.push_another(format!("{name} {form:?}").as_bytes()).await;
            refusal(open(&Reference::Registry(world.name.with_digest(digest)), &[&key]).await);
            world.sign(name, &digest, form);
            let opened = open(&Reference::Registry(world.name.with_digest(digest)), &[&key]).await;
            let opened = opened.unwrap_or_else(|error| panic!("{name} {form:?}: {error}"));
            assert_eq!(opened.manifest_digest, digest, "{name} {form:?}");
        }
    }
}

/// Whoever may write to the registry moves good signatures to an image that nobody signed.
#[tokio::test(flavor = "multi_thread")]
async fn a_signature_of_another_image_is_none() {
    let Some(world) = World::start().await else { return };
    let key = world.key("key", &[]);
    let (signed, registry) = (world.sample.manifest, world.registry());
    FORMS.iter().for_each(|form| world.sign("key", &signed, *form));
    let victim = world.push_another(b"not signed").await;
    for suffix in ["", ".sig"] {
        let raw = registry.manifest(&format!("sha256-{}{suffix}", signed.hex())).await.unwrap();
        registry.put_manifest(&raw, Some(&format!("sha256-{}{suffix}", victim.hex()))).await.unwrap();
        let said = refusal(open(&Reference::Registry(world.name.with_digest(victim)), &[&key]).await);
        assert!(said.contains("another image"), "{said}");
    }
}

/// An attestation by the same key says something about an image; it does not say that it may be run.
#[tokio::test(flavor = "multi_thread")]
async fn an_attestation_is_no_signature() {
    let Some(world) = World::start().await else { return };
    let key = world.key("key", &[]);
    std::fs::write(world.dir().join("predicate.json"), r#"{"vulnerabilities": "many"}"#).unwrap();
    let image = world.image(&world.sample.manifest);
    let attest = ["attest", "--yes", "--allow-http-registry", "--key", "key.key", "--type", "custom"];
    let with = ["--signing-config", "no-services.json", "--predicate", "predicate.json", &image];
    world.run(&[&attest[..], &with].concat());
    let said = refusal(world.open(&[&key]).await);
    assert!(said.contains("(1)") && said.contains("no image"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_of_the_index_is_one_of_its_images() {
    let Some(world) = World::start().await else { return };
    let key = world.key("key", &[]);
    let layout = &world.sample.layout;
    let (os, architecture) =
        ("linux", std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"));
    let manifest = RawManifest::new(std::fs::read(layout.blob_path(&world.sample.manifest)).unwrap(), None);
    let mut entry = serde_json::to_value(common::oci_descriptor(&manifest)).unwrap();
    entry["platform"] = serde_json::json!({ "os": os, "architecture": architecture });
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": oci::MEDIA_TYPE_INDEX, "manifests": [entry],
    });
    let index = RawManifest::new(index.to_string().into_bytes(), None);
    layout.put_blob(&index.bytes).unwrap();
    layout.add_image(common::oci_descriptor(&index), Some("multi")).unwrap();
    let images = CopyOptions { images: Images::All, ..copying() };
    copy::push(layout, Some("multi"), &world.name, &images).await.unwrap();

    refusal(world.open(&[&key]).await);
    world.sign("key", &index.digest, Form::Bundle);
    assert_eq!(world.open(&[&key]).await.unwrap().manifest_digest, world.sample.manifest);
    // Who asks for the manifest alone does not learn of the index.
    let manifest = Reference::Registry(world.name.with_digest(world.sample.manifest));
    refusal(open(&manifest, &[&key]).await);
}

/// What cosign made, served by a registry with the referrers API: without it, with it, and failing.
#[tokio::test(flavor = "multi_thread")]
async fn bundles_are_found_by_the_referrers_api() {
    let Some(world) = World::start().await else { return };
    let key = world.key("key", &[]);
    world.sign("key", &world.sample.manifest, Form::Bundle);
    let (layout, registry) = (&world.sample.layout, world.registry());
    let index = registry.manifest(&format!("sha256-{}", world.sample.manifest.hex())).await.unwrap();
    let Ok(oci::Document::Index(index)) = index.parse() else { panic!("{index:?}") };
    for referrer in index.manifests() {
        let digest = referrer.digest().to_string();
        let from = Reference::Registry(world.name.with_digest(digest.parse().unwrap()));
        let to = Reference::Layout { dir: layout.root().to_owned(), tag: Some("bundle".into()) };
        copy::copy(&from, &to, &copying()).await.unwrap();
    }
    let server = FaultServer::start(Layout::open(layout.root()).unwrap()).unwrap();
    let name = Reference::Registry(reference(&server.host()));
    refusal(open(&name, &[&key]).await);
    server.referrers(true);
    assert_eq!(open(&name, &[&key]).await.unwrap().bootstrap, common::BOOTSTRAP);

    // Each place is looked at, whatever is wrong with another one.
    server.fault(Fault::WrongBytes);
    let said = refusal(open(&name, &[&key]).await);
    assert!(said.contains("(1)") && said.contains("Sigstore bundle"), "{said}");
}

/// A mirror that is down answers none of the questions; it may have had the signature.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_down_keeps_no_signature_away() {
    let Some(world) = World::start().await else { return };
    let key = world.key("key", &[]);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hosts = world.dir().join("hosts").join(&world.server.host);
    std::fs::create_dir_all(&hosts).unwrap();
    let server = &world.server.host;
    let toml = format!("server = \"http://{server}\"\n[host.\"http://{nobody}\"]\n");
    std::fs::write(hosts.join("hosts.toml"), toml).unwrap();
    let mut options = OpenOptions { registry: options(), ..OpenOptions::default() };
    options.registry.hosts_dir = Some(world.dir().join("hosts"));
    options.signed_by = Some(Keys::load(std::slice::from_ref(&key)).unwrap());
    options.attempts = 1;
    let name = Reference::Registry(world.name.clone());
    let unknown = image::open(&name, &options).await;
    assert!(matches!(unknown, Err(ImageError::Source { .. })), "{unknown:?}");
    world.sign("key", &world.sample.manifest, Form::Bundle);
    assert_eq!(image::open(&name, &options).await.unwrap().bootstrap, common::BOOTSTRAP);
}

#[test]
fn a_file_without_a_key_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.pub");
    let said = |text: &[u8]| {
        std::fs::write(&path, text).unwrap();
        Keys::load(std::slice::from_ref(&path)).map(drop).map_err(|error| error.to_string())
    };
    assert!(said(include_bytes!("data/p256.pub")).is_ok());
    let twice = [&include_bytes!("data/p256.pub")[..], include_bytes!("data/p256.pub")].concat();
    assert!(said(&twice).is_ok());
    for (text, problem) in [
        (&b""[..], "has no `PUBLIC KEY`"),
        (b"-----BEGIN PUBLIC KEY-----\n!!!\n-----END PUBLIC KEY-----\n", "no PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "of a kind that is not known"),
        (include_bytes!("data/p521.pub"), "of a kind that is not known"),
        (include_bytes!("data/rsa1024.pub"), "of a kind that is not known"),
        // cosign would sign with it as Ed25519ph.
        (include_bytes!("data/ed25519.pub"), "of a kind that is not known"),
    ] {
        let error = said(text).unwrap_err();
        assert!(error.contains(problem) && error.contains("key.pub"), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(Keys::load(&[path]).unwrap_err().to_string().contains("key.pub"));
}
