//! What the integration tests share: sample images, and the real registry.
#![allow(dead_code)] // each test binary uses a part
#![allow(clippy::unwrap_used)] // test code, though not in a test function

pub(crate) mod nginx;
pub(crate) mod table;

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};
use skimmer_fetcher::credentials::{Credentials, Secret};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::http::{HttpOptions, Timeouts};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, Descriptor, RawManifest};
use skimmer_fetcher::reference::RegistryRef;
use skimmer_fetcher::registry::{Registry, RegistryOptions};
use skimmer_fetcher::source::BlobRef;
use skimmer_test_support::skip_this;

/// Bytes that do not repeat and do not compress.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

/// Bytes that compress well.
pub(crate) fn text(length: usize, seed: u64) -> Vec<u8> {
    noise(length.div_ceil(8), seed).iter().flat_map(|byte| [byte % 16; 8]).take(length).collect()
}

pub(crate) const BOOTSTRAP: &[u8] = b"a bootstrap, as far as the fetcher knows";

/// A layout with a converted image and, in `chunks`, the map of its one data blob.
pub(crate) struct Sample {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) layout: Layout,
    pub(crate) blob: BlobRef,
    pub(crate) chunks: Vec<(ChunkSpec, Vec<u8>)>,
    pub(crate) manifest: Digest,
}

pub(crate) fn encode(codec: Codec, data: &[u8]) -> Vec<u8> {
    match codec {
        Codec::None => data.to_vec(),
        Codec::Lz4Block => lz4_flex::block::compress(data),
        Codec::Zstd => zstd::bulk::compress(data, 3).unwrap(),
        Codec::Gzip => gzip(data),
    }
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A blob of chunks of all codecs and many sizes, with some bytes between them that belong to none.
pub(crate) fn chunked(codecs: &[Codec]) -> (Vec<u8>, Vec<(ChunkSpec, Vec<u8>)>) {
    let (mut blob, mut chunks) = (Vec::new(), Vec::new());
    let sizes = [1, 100, 4096, 5000, 65_536, 70_001, 262_144, 300_000, 33_000, 1 << 20, 7];
    for (index, size) in sizes.into_iter().cycle().take(22).enumerate() {
        let codec = codecs[index % codecs.len()];
        let seed = u64::try_from(index).unwrap();
        let data = if codec == Codec::None { noise(size, seed) } else { text(size, seed) };
        let stored = encode(codec, &data);
        let digest = if index % 2 == 0 {
            ChunkDigest::Blake3(*blake3::hash(&data).as_bytes())
        } else {
            ChunkDigest::Sha256(*Digest::of(&data).as_bytes())
        };
        let spec = ChunkSpec {
            stored_offset: u64::try_from(blob.len()).unwrap(),
            stored_len: u32::try_from(stored.len()).unwrap(),
            len: u32::try_from(size).unwrap(),
            codec,
            digest,
        };
        blob.extend_from_slice(&stored);
        if index % 5 == 4 {
            blob.extend_from_slice(&[0xDD; 333]);
        }
        chunks.push((spec, data));
    }
    (blob, chunks)
}

pub(crate) fn bootstrap_tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(data.len()).unwrap());
        header.set_mode(0o444);
        // The builder would tidy the name up.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        tar.append(&header, *data).unwrap();
    }
    tar.into_inner().unwrap()
}

pub(crate) fn descriptor(kind: &str, blob: &BlobRef) -> serde_json::Value {
    serde_json::json!({"mediaType": kind, "digest": blob.digest.to_string(), "size": blob.size})
}

pub(crate) fn oci_descriptor(raw: &RawManifest) -> Descriptor {
    let size = u64::try_from(raw.bytes.len()).unwrap();
    let blob = BlobRef { digest: raw.digest, size };
    serde_json::from_value(descriptor(&raw.media_type, &blob)).unwrap()
}

/// What can be different about a converted image.
pub(crate) struct Shape {
    pub(crate) tar: Vec<u8>,
    pub(crate) diff_id: Option<Digest>,
    pub(crate) packing: &'static str,
    pub(crate) marked: bool,
}

impl Default for Shape {
    fn default() -> Self {
        let tar = bootstrap_tar(&[("image/other", b"x"), ("image/image.boot", BOOTSTRAP)]);
        Self { tar, diff_id: None, packing: "+gzip", marked: true }
    }
}

/// Stores a converted image around a data blob; gives its manifest.
pub(crate) fn store_image(layout: &Layout, blob: &BlobRef, shape: Shape, tag: Option<&str>) -> RawManifest {
    let diff_id = shape.diff_id.unwrap_or_else(|| Digest::of(&shape.tar));
    let packed = match shape.packing {
        "+gzip" => gzip(&shape.tar),
        "+zstd" => zstd::stream::encode_all(&shape.tar[..], 3).unwrap(),
        _ => shape.tar,
    };
    let layer = layout.put_blob(&packed).unwrap();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [blob.digest.to_string(), diff_id.to_string()]},
    });
    let config = layout.put_blob(config.to_string().as_bytes()).unwrap();
    let mut data = descriptor(oci::MEDIA_TYPE_RAFS_BLOB, blob);
    data["annotations"] = serde_json::json!({ (oci::ANNOTATION_RAFS_BLOB): "true" });
    let kind = format!("application/vnd.oci.image.layer.v1.tar{}", shape.packing);
    let mut bootstrap = descriptor(&kind, &layer);
    if shape.marked {
        bootstrap["annotations"] =
            serde_json::json!({ (oci::ANNOTATION_BOOTSTRAP): "true", (oci::ANNOTATION_FS_VERSION): "6" });
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": oci::MEDIA_TYPE_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [data, bootstrap],
    });
    let raw = RawManifest::new(oci::canonical_json(&manifest).unwrap(), None);
    layout.put_blob(&raw.bytes).unwrap();
    layout.add_image(oci_descriptor(&raw), tag).unwrap();
    raw
}

pub(crate) fn sample(codecs: &[Codec]) -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::create(dir.path().join("img")).unwrap();
    let (bytes, chunks) = chunked(codecs);
    let blob = layout.put_blob(&bytes).unwrap();
    let manifest = store_image(&layout, &blob, Shape::default(), Some("v1")).digest;
    Sample { dir, layout, blob, chunks, manifest }
}

pub(crate) const ALL_CODECS: [Codec; 4] = [Codec::None, Codec::Zstd, Codec::Lz4Block, Codec::Gzip];

/// Options for tests: nobody's credentials, and short waits.
pub(crate) fn options() -> RegistryOptions {
    let millis = Duration::from_millis;
    let timeouts = Timeouts { connect: millis(2000), first_byte: millis(10_000), idle: millis(5000) };
    RegistryOptions {
        credentials: Credentials::anonymous(),
        http: HttpOptions { timeouts, ..HttpOptions::default() },
        hosts_dir: None,
        ..RegistryOptions::default()
    }
}

pub(crate) fn reference(host: &str) -> RegistryRef {
    RegistryRef::parse(&format!("{host}/a/b:v1")).unwrap()
}

pub(crate) fn registry(host: &str, options: &RegistryOptions) -> Registry {
    Registry::new(&reference(host), options).unwrap()
}

/// The user of the real registry's password file.
pub(crate) const USER: &str = "skim";
/// The user's password; the colon must survive.
pub(crate) const PASSWORD: &str = "s3cret:x";
/// The password, hashed by bcrypt with the least cost.
const HTPASSWD: &str = "skim:$2b$05$ILl6SDb6rzsr4imz0AsNAOC2lQiRvzUpHsiAx0bBcTx4b.wh0Fg.a\n";

pub(crate) fn with_password(host: &str, mut options: RegistryOptions) -> RegistryOptions {
    options.credentials = options.credentials.with_password(host, USER, Secret::new(PASSWORD));
    options
}

/// Debian's docker-registry, as a child process.
pub(crate) struct DockerRegistry {
    child: Child,
    dir: tempfile::TempDir,
    pub(crate) host: String,
}

/// How to run it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Setup {
    pub(crate) htpasswd: bool,
    pub(crate) tls: bool,
    pub(crate) relative_urls: bool,
}

impl DockerRegistry {
    /// `None` when it or openssl is not installed: the test is then counted as skipped.
    #[track_caller]
    pub(crate) fn start(setup: Setup) -> Option<Self> {
        const PROGRAM: &str = "/usr/bin/docker-registry";
        if !Path::new(PROGRAM).exists() {
            skip_this(&format!("{PROGRAM} is missing (package docker-registry)"));
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        // The port may be taken between the look and the start; then another one is tried.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let host = format!("127.0.0.1:{port}");
            let config = configure(dir.path(), &host, setup)?;
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let mut child = Command::new(PROGRAM)
                .arg("serve")
                .arg(config)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            let until = Instant::now() + Duration::from_secs(60);
            while Instant::now() < until && child.try_wait().unwrap().is_none() {
                if TcpStream::connect(&host).is_ok() {
                    return Some(Self { child, dir, host });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!(
            "docker-registry does not start:\n{}",
            std::fs::read_to_string(dir.path().join("log")).unwrap()
        );
    }

    /// The certificate, which is its own authority.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn configure(dir: &Path, host: &str, setup: Setup) -> Option<PathBuf> {
    let mut config = format!(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n  relativeurls: {}\n",
        dir.join("storage").display(),
        setup.relative_urls
    );
    if setup.tls {
        let own = ["-addext", "basicConstraints=critical,CA:FALSE"];
        let (cert, key) = nginx::certificate(dir, "cert", &own)?;
        config += &format!("  tls:\n    certificate: {}\n    key: {}\n", cert.display(), key.display());
    }
    if setup.htpasswd {
        let path = dir.join("htpasswd");
        std::fs::write(&path, HTPASSWD).unwrap();
        config +=
            &format!("auth:\n  htpasswd:\n    realm: a \"quoted, realm\n    path: {}\n", path.display());
    }
    let path = dir.join("config.yml");
    std::fs::write(&path, config).unwrap();
    Some(path)
}
