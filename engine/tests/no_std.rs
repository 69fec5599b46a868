//! The engine does no I/O: it is `no_std`, and names nothing outside of `core` and `alloc`. A build for wasm32 would
//! show the same, but that target is not part of the toolchain, so the sources are read instead.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::path::{Path, PathBuf};

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn the_sources_name_only_core_and_alloc() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 15, "sources not found in {}", root.display());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let code = line.split("//").next().unwrap();
            let place = format!("{}:{number}: {line}", file.display());
            assert!(!code.contains("std::") && !code.contains("extern crate std"), "{place}");
            assert!(!code.contains("unsafe ") && !code.contains("extern \"C\""), "{place}");
        }
    }
    let library = std::fs::read_to_string(root.join("lib.rs")).unwrap();
    assert!(library.contains("#![no_std]") && library.contains("#![forbid(unsafe_code)]"));
}

#[test]
fn there_are_no_dependencies() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let text = std::fs::read_to_string(manifest).unwrap();
    assert!(!text.lines().any(|line| line.trim() == "[dependencies]"), "the engine has no dependency");
}
