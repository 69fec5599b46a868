//! The workspace's dependency rule and where `unsafe` may live, checked against cargo's own view and the sources.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::collections::BTreeMap;
use std::path::Path;

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Package -> the workspace packages it may use in its product code.
const MAY_USE: &[(&str, &[&str])] = &[
    ("erofs-format", &[]),
    ("skimmer-cachefiles", &[]),
    ("skimmer-fanotify", &[]),
    ("skimmer-engine", &[]),
    ("skimmer-fetcher", &[]),
    ("skimmer-client", &[]),
    ("skimmer-config", &["skimmer-client", "skimmer-fetcher"]),
    ("skimmer-snapshotter", &[]),
    ("skimmer-keeper", &["skimmer-fanotify", "skimmer-cachefiles"]),
    ("skimmer-mkfs", &["erofs-format", "skimmer-fetcher"]),
    (
        "skimmer-daemon",
        &[
            "erofs-format",
            "skimmer-cachefiles",
            "skimmer-fanotify",
            "skimmer-engine",
            "skimmer-fetcher",
            "skimmer-keeper",
            "skimmer-client",
            "skimmer-config",
            "skimmer-snapshotter",
        ],
    ),
    (
        "skimmer-cli",
        &[
            "erofs-format",
            "skimmer-fetcher",
            "skimmer-mkfs",
            "skimmer-client",
            "skimmer-config",
            "skimmer-cachefiles",
            "skimmer-fanotify",
        ],
    ),
];

/// Outside package -> the only product packages that may use it directly.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("tokio", &["skimmer-fetcher", "skimmer-client", "skimmer-daemon", "skimmer-cli", "skimmer-snapshotter"]),
    ("tonic", &["skimmer-snapshotter"]),
    ("io-uring", &["skimmer-daemon"]),
    ("reqwest", &["skimmer-fetcher", "skimmer-client"]),
    ("axum", &["skimmer-daemon", "skimmer-fetcher"]),
];

/// Packages that are tools of the project, not the product.
const TOOLS: &[&str] =
    &["skimmer-bench", "skimmer-kernel-tests", "skimmer-test-support", "skimmer-vm-images", "xtask"];

/// The only files that may hold `unsafe` (design: "Unsafe lives only in the files that design.md names").
const UNSAFE_FILES: &[&str] =
    &["cachefiles/src/sys.rs", "fanotify/src/sys.rs", "keeper/src/sys.rs", "daemon/src/ring/sys.rs"];

/// Files that look for the word, and so have it.
const SEARCHERS: &[&str] = &["xtask/tests/dependency_rule.rs", "engine/tests/no_std.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn packages_use_only_what_the_design_allows() {
    let metadata = MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec().unwrap();
    let rule: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let members: Vec<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let mut broken = Vec::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let product = !TOOLS.contains(&name);
        if product && !rule.contains_key(name) {
            broken.push(format!("{name} is in no list of this test"));
        }
        for dependency in &package.dependencies {
            if dependency.kind != DependencyKind::Normal || !product {
                continue;
            }
            let used = dependency.name.as_str();
            if members.contains(&used) && !rule.get(name).is_some_and(|allowed| allowed.contains(&used)) {
                broken.push(format!("{name} uses {used}"));
            }
            if let Some((_, allowed)) = ONLY_IN.iter().find(|(outside, _)| *outside == used)
                && !allowed.contains(&name)
            {
                broken.push(format!("{name} uses {used}"));
            }
        }
    }
    assert!(broken.is_empty(), "the dependency rule is broken: {broken:#?}");
}

fn sources(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") && !path.ends_with(".git") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
}

/// Whether a line uses the keyword, whatever follows it, or does anything with the lint but forbid or deny it. Only
/// the declaration of a `mod sys` may allow it.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
    let declares_sys =
        code.split_whitespace().collect::<Vec<_>>().windows(2).any(|pair| pair == ["mod", "sys;"]);
    let lint = code.replace("forbid(unsafe_code)", "").replace("deny(unsafe_code)", "");
    words.any(|word| word == "unsafe") || (lint.contains("unsafe_code") && !declares_sys)
}

#[test]
fn every_form_of_unsafe_is_seen() {
    for line in [
        "    unsafe { x() }",
        "let x = unsafe{ y };",
        "pub unsafe fn f() {}",
        "unsafe impl Send for X {}",
        "unsafe extern \"C\" {",
        "pub unsafe trait T {}",
        "unsafe",
        "#[unsafe(no_mangle)]",
        "#![allow(unsafe_code)]",
        "#[allow(dead_code, unsafe_code)] mod system;",
        "#[expect(unsafe_code)] // sys",
        "    unsafe_code,",
        "unsafe { libc::syscall(1) } // mod sys;",
    ] {
        assert!(has_unsafe(line), "{line}");
    }
    for line in [
        "#![forbid(unsafe_code)]",
        "#![deny(unsafe_code)] // but for the sys file",
        "// no unsafe here",
        "#[allow(unsafe_code)] pub mod sys;",
        "let unsafely = 1;",
    ] {
        assert!(!has_unsafe(line), "{line}");
    }
}

#[test]
fn unsafe_lives_only_where_the_design_says() {
    let mut files = Vec::new();
    sources(root(), &mut files);
    assert!(files.len() > 20, "the walk found no sources");
    let (mut broken, mut named) = (Vec::new(), 0);
    for file in files {
        let relative = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        if UNSAFE_FILES.contains(&relative.as_str()) {
            named += 1;
            continue;
        }
        if SEARCHERS.contains(&relative.as_str()) {
            continue;
        }
        for (number, line) in std::fs::read_to_string(&file).unwrap().lines().enumerate() {
            if has_unsafe(line) {
                broken.push(format!("{relative}:{}", number + 1));
            }
        }
    }
    assert_eq!(named, UNSAFE_FILES.len(), "a file that may hold unsafe does not exist");
    assert!(broken.is_empty(), "unsafe outside the sys files: {broken:#?}");
}

#[test]
fn every_library_refuses_unsafe_outside_its_sys_file() {
    for package in MAY_USE.iter().map(|(name, _)| name) {
        let folder = package.strip_prefix("skimmer-").unwrap_or(package);
        let lib = root().join(folder).join("src/lib.rs");
        let entry = if lib.exists() { lib } else { root().join(folder).join("src/main.rs") };
        let text = std::fs::read_to_string(&entry).unwrap();
        assert!(
            text.contains("#![forbid(unsafe_code)]") || text.contains("#![deny(unsafe_code)]"),
            "{} neither forbids nor denies unsafe code",
            entry.display()
        );
    }
}
