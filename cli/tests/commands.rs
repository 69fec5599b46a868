//! The program as a user runs it, without a daemon: what it makes, and what it says when something is wrong.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kernel_tests::fixture::{Compression, Layer, Layout, Meta};
use serde_json::Value;

fn skimmer(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_skimmer"))
        .args(args)
        .current_dir(dir)
        .env_remove("SKIMMER_CREDS")
        .output()
        .unwrap()
}

fn good(dir: &Path, args: &[&str]) -> String {
    let output = skimmer(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "skimmer {args:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must fail, and returns its error text.
fn bad(dir: &Path, args: &[&str]) -> String {
    let output = skimmer(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "skimmer {args:?} should fail with 1\n{stderr}");
    assert!(stderr.starts_with("error: "), "skimmer {args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

/// A directory with a converted image `img` of a small tree in it.
fn image() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/hello"), "hello\n").unwrap();
    fs::write(tree.join("big"), (0..300_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    symlink("etc/hello", tree.join("link")).unwrap();
    good(dir.path(), &["convert", "--quiet", "./tree", "./img"]);
    dir
}

fn blobs(layout: &Path) -> Vec<(u64, PathBuf)> {
    let mut blobs: Vec<_> = fs::read_dir(layout.join("blobs/sha256"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.metadata().unwrap().len(), entry.path())
        })
        .collect();
    blobs.sort();
    blobs
}

#[test]
fn a_directory_becomes_a_sound_image() {
    let dir = image();
    let check: Value = serde_json::from_str(&good(dir.path(), &["check", "--json", "./img"])).unwrap();
    assert_eq!(check["sound"], true);
    assert_eq!(check["names"], 5);
    let inspect: Value =
        serde_json::from_str(&good(dir.path(), &["inspect", "--json", "oci:./img"])).unwrap();
    assert_eq!(inspect["tree"]["files"], 2);
    assert_eq!(inspect["tree"]["file_bytes"], 1_200_006);
    assert!(good(dir.path(), &["inspect", "--dump", "./img"]).contains("superblock"));
}

#[test]
fn two_conversions_are_the_same() {
    let dir = image();
    for option in [&["--threads", "1"][..], &["--threads", "3"]] {
        let args = [&["convert", "--quiet", "./tree", "./again"], option].concat();
        good(dir.path(), &args);
        assert_eq!(blobs(&dir.path().join("img")).len(), blobs(&dir.path().join("again")).len());
        for (_, blob) in blobs(&dir.path().join("img")) {
            let again = dir.path().join("again/blobs/sha256").join(blob.file_name().unwrap());
            assert_eq!(fs::read(&blob).unwrap(), fs::read(again).unwrap());
        }
        fs::remove_dir_all(dir.path().join("again")).unwrap();
    }
}

#[test]
fn absolute_symlinks_in_a_layer_are_followed_unless_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut layer = Layer::default();
    let (directory, file) = (Meta::new(0o755), Meta::new(0o644));
    layer.directory(b"run", &directory).unwrap().directory(b"var", &directory).unwrap();
    layer.symlink(b"var/run", &Meta::new(0o777), b"/run").unwrap();
    layer.file(b"var/run/pid", &file, b"1").unwrap();
    let tar = layer.finish().unwrap();
    Layout::create(&source).unwrap().image("v1", &[(&tar, Compression::Gzip)]).unwrap();
    good(dir.path(), &["convert", "--quiet", "oci:source:v1", "./img"]);
    let check: Value = serde_json::from_str(&good(dir.path(), &["check", "--json", "./img"])).unwrap();
    assert_eq!(check["names"], 5);
    let refusing = ["convert", "--quiet", "--refuse-absolute-symlinks", "oci:source:v1", "./other"];
    let said = bad(dir.path(), &refusing);
    assert!(said.contains("var/run") && said.contains("absolute"), "{said}");
}

#[test]
fn a_changed_directory_is_converted_again_to_the_same_place() {
    let dir = image();
    fs::write(dir.path().join("tree/etc/hello"), "hello again\n").unwrap();
    good(dir.path(), &["convert", "--quiet", "./tree", "./img"]);
    let inspect: Value = serde_json::from_str(&good(dir.path(), &["inspect", "--json", "./img"])).unwrap();
    assert_eq!(inspect["tree"]["file_bytes"], 1_200_012);
}

#[test]
fn an_archive_is_an_image_too() {
    let dir = image();
    good(dir.path(), &["convert", "--quiet", "./tree", "oci-archive:img.tar"]);
    assert!(good(dir.path(), &["check", "oci-archive:img.tar"]).contains("is sound"));
}

#[test]
fn a_flipped_byte_is_found_and_named() {
    let dir = image();
    let (_, blob) = blobs(&dir.path().join("img")).pop().unwrap();
    let mut bytes = fs::read(&blob).unwrap();
    bytes[1000] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let output = skimmer(dir.path(), &["check", "./img"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let name = blob.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(name) && said.contains("chunk of"), "{said}");
}

#[test]
fn a_truncated_blob_is_found_and_named() {
    let dir = image();
    let (len, blob) = blobs(&dir.path().join("img")).pop().unwrap();
    fs::OpenOptions::new().write(true).open(&blob).unwrap().set_len(len / 2).unwrap();
    let said = bad(dir.path(), &["check", "./img"]);
    assert!(said.contains(blob.file_name().unwrap().to_str().unwrap()), "{said}");
}

#[test]
fn a_damaged_bootstrap_is_found() {
    let dir = image();
    let manifest: Value = {
        let index: Value =
            serde_json::from_str(&fs::read_to_string(dir.path().join("img/index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap().replace("sha256:", "");
        let path = dir.path().join("img/blobs/sha256").join(digest);
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let layer = manifest["layers"].as_array().unwrap().last().unwrap();
    let digest = layer["digest"].as_str().unwrap().replace("sha256:", "");
    let path = dir.path().join("img/blobs/sha256").join(&digest);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    fs::write(&path, bytes).unwrap();
    for command in ["check", "inspect"] {
        let said = bad(dir.path(), &[command, "./img"]);
        assert!(said.contains(&digest), "{said}");
    }
}

#[test]
fn wrong_names_get_the_right_one() {
    let dir = image();
    let said = bad(dir.path(), &["check", "./tree"]);
    assert!(said.contains("skimmer convert"), "{said}");
    let said = bad(dir.path(), &["mount", "./tree", "."]);
    assert!(said.contains("skimmer convert"), "{said}");
    let said = bad(dir.path(), &["check", "./nothing"]);
    assert!(said.contains("no such file"), "{said}");
    let said = bad(dir.path(), &["push", "./img", "./elsewhere"]);
    assert!(said.contains("docker://"), "{said}");
    let said = bad(dir.path(), &["mount", "./img", "./nowhere"]);
    assert!(said.contains("nowhere"), "{said}");
    let said = bad(dir.path(), &["status", "--socket", "./none.sock"]);
    assert!(said.contains("none.sock") && said.contains("remedy: "), "{said}");
}

#[test]
fn an_image_that_was_not_converted_is_refused_with_the_way_to_do_it() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |bytes: &str| skimmer_fetcher::Digest::of(bytes.as_bytes());
    let layout = dir.path().join("plain");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let put = |text: &str| fs::write(layout.join("blobs/sha256").join(digest(text).hex()), text).unwrap();
    let config =
        r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{}}"#;
    put(config);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[]}}"#,
        digest(config),
        config.len()
    );
    put(&manifest);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":{}}}]}}"#,
        digest(&manifest),
        manifest.len()
    );
    fs::write(layout.join("index.json"), index).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let said = bad(dir.path(), &["check", "./plain"]);
    assert!(said.contains("not converted") && said.contains("skimmer convert"), "{said}");
}

#[test]
fn a_configuration_is_printed_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    fs::write(&file, good(dir.path(), &["config", "default"])).unwrap();
    assert!(good(dir.path(), &["config", "check", "config.toml"]).contains("can be used"));
    fs::write(&file, "[mount]\nread_ahead = 1\n").unwrap();
    let error = bad(dir.path(), &["config", "check", "config.toml"]);
    assert!(error.contains("config.toml:2:1") && error.contains("read_ahead"), "{error}");
    fs::write(&file, "[fill]\niops = 3\n[registry]\nca = \"/nonexistent/ca.pem\"\n").unwrap();
    let output = skimmer(dir.path(), &["config", "check", "--json", "config.toml"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        (&told["problems"][0]["key"], &told["notes"][0]["key"]),
        (&"registry.ca".into(), &"fill.enable".into())
    );
    assert!(bad(dir.path(), &["config", "check", "absent.toml"]).contains("absent.toml"));
}

#[test]
fn an_image_is_optimized_by_what_recordings_say() {
    let dir = image();
    let told: Value = serde_json::from_str(&good(dir.path(), &["inspect", "--json", "./img"])).unwrap();
    let record = |name: &str, record: &str, blob: &Value, offsets: &[u64]| {
        let reads: Vec<Value> = offsets
            .iter()
            .map(|offset| serde_json::json!({"at_us": 1, "blob": 0, "offset": offset, "length": 1, "took_us": 1}))
            .collect();
        let text = serde_json::json!({
            "version": 1, "image": "img", "bootstrap": "", "mode": "fanotify", "record": record, "cut": false,
            "blobs": [blob], "reads": reads, "fetches": [],
        });
        fs::write(dir.path().join(name), text.to_string()).unwrap();
    };
    let blob = &told["blobs"][0]["id"];
    record("first", "exact", blob, &[4096]);
    record("second", "exact", blob, &[500_000, 1_100_000]);
    record("events", "events", blob, &[4096]);
    record("other", "exact", &Value::from("00".repeat(32)), &[4096]);
    let optimized = |extra: &[&str]| -> Value {
        let args = [&["optimize", "--json", "./img", "./fast"], extra].concat();
        let result = serde_json::from_str(&good(dir.path(), &args)).unwrap();
        good(dir.path(), &["check", "./fast"]);
        result
    };
    assert_eq!(optimized(&["--trace=first"])["device_bytes"], 4096);
    assert_eq!(optimized(&["--trace=first", "--trace=second"])["device_bytes"], 3 * 4096);
    let whole = &optimized(&["--trace=first", "--whole-chunks"])["device_bytes"];
    assert_eq!(whole, 1 << 20);
    // A recording of misses does not tell what else of a chunk was read.
    assert_eq!(optimized(&["--trace=events"])["device_bytes"], *whole);

    good(dir.path(), &["optimize", "--quiet", "./img", "./fast", "--trace=first"]);
    let error = bad(dir.path(), &["optimize", "./fast", "./faster", "--trace=first"]);
    assert!(error.contains("optimized already"), "{error}");
    let error = bad(dir.path(), &["optimize", "./img", "./fast", "--trace=other"]);
    assert!(error.contains("no read of the trace is of its blobs"), "{error}");
    assert!(
        bad(dir.path(), &["optimize", "./img", "./fast", "--trace=img/index.json"])
            .contains("is no recording")
    );
}

#[test]
fn doctor_names_what_is_amiss_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    // It takes connections and never answers, as a stopped dfdaemon does.
    let hung = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", hung.local_addr().unwrap());
    fs::write(dir.path().join("c.toml"), format!("[dragonfly]\nendpoint = '{endpoint}'\n")).unwrap();
    let root = dir.path().to_string_lossy().into_owned();
    let socket = dir.path().join("none.sock").to_string_lossy().into_owned();
    let args = ["--json", "doctor", "--config", "c.toml", "--root", &root, "--socket", &socket];
    let output = skimmer(dir.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |subject: &str| {
        let found = findings.as_array().unwrap().iter().find(|finding| finding["subject"] == subject);
        found.unwrap_or_else(|| panic!("nothing of {subject}: {findings:#}")).clone()
    };
    assert_eq!(of("config")["state"], "ok");
    if rustix::process::geteuid().is_root() {
        let dragonfly = of("dragonfly");
        assert_eq!(dragonfly["state"], "missing", "{dragonfly}");
        assert!(dragonfly["found"].as_str().unwrap().contains(&endpoint), "{dragonfly}");
        assert!(dragonfly["remedy"].as_str().unwrap().contains("dfdaemon"), "{dragonfly}");
    }
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("not all is well") || stderr.contains("neither attach mode"), "{stderr}");
    // In words, each finding that is missing has its remedy below it.
    let text = skimmer(dir.path(), &["doctor", "--config", "c.toml", "--root", &root, "--socket", &socket]);
    let text = String::from_utf8(text.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let missing = lines.iter().enumerate().filter(|(_, line)| line.starts_with("missing "));
    for (at, line) in missing {
        assert!(lines.get(at + 1).is_some_and(|next| next.contains("remedy: ")), "{line}");
    }
}
