//! Opening images, good and bad, and moving them between registries, layouts and archives.

#![allow(clippy::unwrap_used)] // test code, though not in a test function

mod common;

use std::io::Write as _;

use common::{
    ALL_CODECS, Shape, bootstrap_tar, descriptor, oci_descriptor, options, reference, sample, store_image,
};
use skimmer_fetcher::archive::Archive;
use skimmer_fetcher::chunk::Codec;
use skimmer_fetcher::copy::{self, CopyOptions, Images};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::image::{self, OpenOptions};
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, Flavour, Platform, RawManifest};
use skimmer_fetcher::reference::Reference;
use skimmer_fetcher::source::{BlobRef, Urgency};
use skimmer_fetcher::testing::{Fault, FaultServer};

fn opening() -> OpenOptions {
    OpenOptions {
        registry: options(),
        platform: Platform::parse("linux/amd64").unwrap(),
        ..OpenOptions::default()
    }
}

fn copying() -> CopyOptions {
    CopyOptions { registry: options(), ..CopyOptions::default() }
}

fn layout_ref(layout: &Layout, tag: &str) -> Reference {
    Reference::Layout { dir: layout.root().to_owned(), tag: Some(tag.to_owned()) }
}

#[tokio::test(flavor = "multi_thread")]
async fn good_images_open_from_everywhere() {
    let sample = sample(&ALL_CODECS);
    let tar = bootstrap_tar(&[("image/image.boot", common::BOOTSTRAP)]);
    for packing in ["", "+zstd"] {
        let shape = Shape { tar: tar.clone(), packing, ..Shape::default() };
        store_image(&sample.layout, &sample.blob, shape, Some(&format!("p{packing}")));
    }
    let path = sample.dir.path().join("img.tar");
    Archive::pack(&sample.layout, &path).unwrap();
    let server = FaultServer::start(sample.layout.clone()).unwrap();
    let archive = Reference::Archive { file: path, tag: Some("v1".into()) };
    let registry = Reference::Registry(reference(&server.host()));
    for reference in [
        layout_ref(&sample.layout, "v1"),
        layout_ref(&sample.layout, "p"),
        layout_ref(&sample.layout, "p+zstd"),
        archive,
        registry,
    ] {
        let remote = image::open(&reference, &opening()).await.unwrap();
        assert_eq!(remote.bootstrap, common::BOOTSTRAP, "{reference}");
        assert_eq!(remote.blobs, [sample.blob], "{reference}");
        let body = remote.source.read(&sample.blob, 1..5, Urgency::Demand).await.unwrap();
        assert_eq!(body.collect().await.unwrap().len(), 4, "{reference}");
    }
}

/// What containerd knows a snapshot by says which bootstrap is in it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_another_chain_id_is_refused() {
    let sample = sample(&[Codec::Zstd]);
    let tar = bootstrap_tar(&[("image/image.boot", b"another bootstrap")]);
    let unpacked = Digest::of(&tar);
    store_image(&sample.layout, &sample.blob, Shape { tar, ..Shape::default() }, Some("other"));
    let chain_id = Digest::of(format!("{} {unpacked}", sample.blob.digest).as_bytes());
    let options = OpenOptions { chain_id: Some(chain_id), config: false, ..opening() };
    let other = image::open(&layout_ref(&sample.layout, "other"), &options).await.unwrap();
    assert_eq!(other.bootstrap, b"another bootstrap");
    let error = image::open(&layout_ref(&sample.layout, "v1"), &options).await.unwrap_err().to_string();
    assert!(error.contains("chain id") && error.contains(&chain_id.to_string()), "{error}");
    // One that claims the DiffIDs of the other one.
    let lie = Shape { diff_id: Some(unpacked), ..Shape::default() };
    store_image(&sample.layout, &sample.blob, lie, Some("lie"));
    let error = image::open(&layout_ref(&sample.layout, "lie"), &options).await.unwrap_err().to_string();
    assert!(error.contains("bootstrap layer"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_are_refused_with_a_reason() {
    let sample = sample(&[Codec::Zstd]);
    let layout = &sample.layout;
    let good = || bootstrap_tar(&[("image/image.boot", common::BOOTSTRAP)]);
    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, "image/image.boot", "/etc/passwd").unwrap();
    let mut promise = good();
    // The entry says 8 GiB - 1 (the largest octal size); the checksum is made right again.
    promise[124..136].copy_from_slice(b"77777777777\0");
    let mut header = tar::Header::from_byte_slice(&promise[..512]).clone();
    header.set_cksum();
    promise[..512].copy_from_slice(header.as_bytes());
    let zeros = vec![0; 3 << 20];
    let bomb = bootstrap_tar(&[("image/image.boot", &zeros)]);

    let cases: Vec<(&str, Shape, &str)> = vec![
        ("plain", Shape { marked: false, ..Shape::default() }, "skimmer convert"),
        ("diffid", Shape { diff_id: Some(Digest::of(b"?")), ..Shape::default() }, "DiffID"),
        ("none", Shape { tar: bootstrap_tar(&[("image.boot", b"x")]), ..Shape::default() }, "no file"),
        (
            "dots",
            Shape { tar: bootstrap_tar(&[("./image/image.boot", b"x")]), ..Shape::default() },
            "no file",
        ),
        (
            "twice",
            Shape {
                tar: bootstrap_tar(&[("image/image.boot", b"x"), ("image/image.boot", b"y")]),
                ..Shape::default()
            },
            "second",
        ),
        ("link", Shape { tar: link.into_inner().unwrap(), ..Shape::default() }, "no plain file"),
        ("empty", Shape { tar: bootstrap_tar(&[("image/image.boot", b"")]), ..Shape::default() }, "0 bytes"),
        ("promise", Shape { tar: promise.clone(), ..Shape::default() }, "8589934591 bytes"),
        ("bomb", Shape { tar: bomb, ..Shape::default() }, "3145728 bytes"),
        ("kind", Shape { tar: good(), packing: "+br", ..Shape::default() }, "+br"),
        ("junk", Shape { tar: vec![7; 2000], ..Shape::default() }, "tar"),
        ("cut", Shape { tar: good()[..520].to_vec(), ..Shape::default() }, "image.boot"),
    ];
    let options = OpenOptions { max_bootstrap: 1 << 20, ..opening() };
    for (name, shape, word) in cases {
        store_image(layout, &sample.blob, shape, Some(name));
        let error = image::open(&layout_ref(layout, name), &options).await.unwrap_err().to_string();
        assert!(error.contains(word), "{name}: {error}");
        assert!(error.contains(&format!(":{name}")), "{name}: {error}");
    }
    let tree = Reference::Tree(sample.dir.path().to_owned());
    assert!(image::open(&tree, &options).await.unwrap_err().to_string().contains("skimmer convert"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_stopped_while_it_unpacks() {
    let sample = sample(&[Codec::Zstd]);
    // 300 MiB of zeros after the bootstrap, in a layer of some hundred KiB.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeros = vec![0; 1 << 20];
    for _ in 0..300 {
        encoder.write_all(&zeros).unwrap();
    }
    let packed = encoder.finish().unwrap();
    let layer = sample.layout.put_blob(&packed).unwrap();
    let raw = store_image(&sample.layout, &sample.blob, Shape::default(), None);
    let mut manifest: serde_json::Value = serde_json::from_slice(&raw.bytes).unwrap();
    manifest["layers"][1]["digest"] = layer.digest.to_string().into();
    manifest["layers"][1]["size"] = layer.size.into();
    let raw = RawManifest::new(manifest.to_string().into_bytes(), None);
    sample.layout.put_blob(&raw.bytes).unwrap();
    sample.layout.add_image(oci_descriptor(&raw), Some("bomb")).unwrap();
    let options = OpenOptions { max_bootstrap: 1 << 20, ..opening() };
    let error = image::open(&layout_ref(&sample.layout, "bomb"), &options).await.unwrap_err().to_string();
    assert!(error.contains("more than"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_documents_and_layers_are_noticed() {
    for (part, word) in [("config", "config"), ("layer", "bootstrap layer"), ("manifest", "blob")] {
        let sample = sample(&[Codec::Zstd]);
        let raw = std::fs::read(sample.layout.blob_path(&sample.manifest)).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&raw).unwrap();
        let digest = match part {
            "config" => manifest["config"]["digest"].as_str().unwrap().parse().unwrap(),
            "layer" => manifest["layers"][1]["digest"].as_str().unwrap().parse().unwrap(),
            _ => sample.manifest,
        };
        let path = sample.layout.blob_path(&digest);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = image::open(&layout_ref(&sample.layout, "v1"), &opening()).await.unwrap_err().to_string();
        assert!(error.contains(word) && error.contains(&digest.hex()), "{part}: {error}");
    }
}

/// An index with a plain and a converted image for amd64, and one for arm64.
fn store_index(layout: &Layout, blob: &BlobRef) -> (RawManifest, Vec<Digest>) {
    let plain = store_image(layout, blob, Shape { marked: false, ..Shape::default() }, None);
    let converted = store_image(layout, blob, Shape::default(), None);
    let tar = bootstrap_tar(&[("image/image.boot", b"arm")]);
    let arm = store_image(layout, blob, Shape { tar, ..Shape::default() }, None);
    let entry = |raw: &RawManifest, architecture: &str, features: &[&str]| {
        let size = u64::try_from(raw.bytes.len()).unwrap();
        let mut entry = descriptor(oci::MEDIA_TYPE_MANIFEST, &BlobRef { digest: raw.digest, size });
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        if !features.is_empty() {
            entry["platform"]["os.features"] = serde_json::json!(features);
        }
        entry
    };
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": oci::MEDIA_TYPE_INDEX,
        "manifests": [
            entry(&plain, "amd64", &[]),
            entry(&converted, "amd64", &[oci::OS_FEATURE_RAFS]),
            entry(&arm, "arm64", &[]),
        ],
    });
    let raw = RawManifest::new(oci::canonical_json(&index).unwrap(), None);
    layout.put_blob(&raw.bytes).unwrap();
    layout.add_image(oci_descriptor(&raw), Some("multi")).unwrap();
    (raw, vec![plain.digest, converted.digest, arm.digest])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_chosen_from_and_copied() {
    let sample = sample(&[Codec::Zstd]);
    let (raw, digests) = store_index(&sample.layout, &sample.blob);
    let multi = layout_ref(&sample.layout, "multi");
    assert_eq!(image::open(&multi, &opening()).await.unwrap().manifest_digest, digests[1]);
    let arm = OpenOptions { platform: Platform::parse("linux/arm64").unwrap(), ..opening() };
    assert_eq!(image::open(&multi, &arm).await.unwrap().bootstrap, b"arm");
    let other = OpenOptions { platform: Platform::parse("linux/s390x").unwrap(), ..opening() };
    let error = image::open(&multi, &other).await.unwrap_err().to_string();
    assert!(error.contains("linux/s390x") && error.contains("linux/arm64"), "{error}");

    let to = |name: &str| Reference::Layout { dir: sample.dir.path().join(name), tag: Some("x".into()) };
    let all = copy::copy(&multi, &to("all"), &copying()).await.unwrap();
    assert_eq!(all.digest, raw.digest);
    assert_eq!(image::open(&to("all"), &arm).await.unwrap().bootstrap, b"arm");
    let plain = Images::One(Platform::parse("linux/amd64").unwrap(), Flavour::Plain);
    let one = CopyOptions { images: plain, ..copying() };
    assert_eq!(copy::copy(&multi, &to("one"), &one).await.unwrap().digest, digests[0]);
    let opened = Layout::open(sample.dir.path().join("one")).unwrap();
    assert!(opened.has_blob(&sample.blob).unwrap());

    // The whole index through a real registry, when there is one.
    let Some(server) = common::DockerRegistry::start(common::Setup::default()) else { return };
    let name = reference(&server.host);
    copy::copy(&multi, &Reference::Registry(name.clone()), &copying()).await.unwrap();
    let pinned = Reference::Registry(name.with_digest(digests[2]));
    assert_eq!(image::open(&pinned, &opening()).await.unwrap().bootstrap, b"arm");
    assert_eq!(
        image::open(&Reference::Registry(name), &opening()).await.unwrap().manifest_digest,
        digests[1]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_go_both_ways() {
    let sample = sample(&ALL_CODECS);
    let archive =
        |name: &str| Reference::Archive { file: sample.dir.path().join(name), tag: Some("x".into()) };
    copy::copy(&layout_ref(&sample.layout, "v1"), &archive("a.tar"), &copying()).await.unwrap();
    copy::copy(&layout_ref(&sample.layout, "v1"), &archive("b.tar"), &copying()).await.unwrap();
    let read = |name: &str| std::fs::read(sample.dir.path().join(name)).unwrap();
    assert!(read("a.tar") == read("b.tar"), "the same image makes the same archive");
    let back = Reference::Layout { dir: sample.dir.path().join("back"), tag: None };
    let report = copy::copy(&archive("a.tar"), &back, &copying()).await.unwrap();
    assert_eq!((report.digest, report.copied), (sample.manifest, 3));
    assert_eq!(image::open(&back, &opening()).await.unwrap().bootstrap, common::BOOTSTRAP);
    let unpacked = Archive::unpack(sample.dir.path().join("a.tar"), sample.dir.path().join("un")).unwrap();
    assert!(unpacked.has_blob(&sample.blob).unwrap());
}

#[test]
fn hostile_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let index = br#"{"schemaVersion":2,"manifests":[]}"#;
    let hex = Digest::of(b"right").hex();
    let blob = format!("blobs/sha256/{hex}");
    let write = |name: &str, tar: Vec<u8>| {
        let path = dir.path().join(name);
        std::fs::write(&path, tar).unwrap();
        path
    };
    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, &blob, "/etc/passwd").unwrap();
    for (name, tar, word) in [
        ("wrong", bootstrap_tar(&[("index.json", index), (&blob, b"wrong")]), "expected"),
        ("noindex", bootstrap_tar(&[(&blob, b"right")]), "index.json"),
        ("badname", bootstrap_tar(&[("index.json", index), ("blobs/sha256/../x", b"")]), "digest"),
        ("link", link.into_inner().unwrap(), "no plain file"),
        ("junk", vec![9; 4096], "oci-archive"),
    ] {
        let path = write(name, tar);
        let out = dir.path().join(format!("{name}.out"));
        let error = Archive::unpack(&path, &out).unwrap_err().to_string();
        assert!(error.contains(word), "{name}: {error}");
    }
    assert!(!dir.path().join("x").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_transfers_go_on() {
    let sample = sample(&ALL_CODECS);
    let server = FaultServer::start(sample.layout.clone()).unwrap();
    let from = Reference::Registry(reference(&server.host()));
    let cut = sample.blob.size / 3;
    server.fault_times(Fault::Truncate(cut), 5);
    let to = Layout::create(sample.dir.path().join("to")).unwrap();
    let one_by_one = CopyOptions { parallel: 1, ..copying() };
    let report = copy::pull(&from, &to, None, &one_by_one).await.unwrap();
    assert_eq!(report.copied, 3);
    assert!(to.has_blob(&sample.blob).unwrap());
    // Resumed, not begun again: less than two blobs' worth was sent.
    assert!(server.counts().blob_bytes < 2 * sample.blob.size);

    let busy = Fault::Status { code: 503, headers: vec![("retry-after".into(), "0".into())], body: vec![] };
    server.fault_times(busy, 3);
    assert_eq!(image::open(&from, &opening()).await.unwrap().bootstrap, common::BOOTSTRAP);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_wrong_bytes_leaves_no_blob() {
    let sample = sample(&ALL_CODECS);
    let server = FaultServer::start(sample.layout.clone()).unwrap();
    server.fault(Fault::WrongBytes);
    let to = Layout::create(sample.dir.path().join("to")).unwrap();
    let from = Reference::Registry(reference(&server.host()));
    let error = copy::pull(&from, &to, Some("x"), &copying()).await.unwrap_err();
    assert!(error.to_string().contains("sha256:"), "{error}");
    assert_eq!(std::fs::read_dir(to.root().join("blobs/sha256")).unwrap().count(), 0);
    assert!(to.resolve(Some("x")).is_err());
}
