//! A short pass of what `cargo xtask torture` does at length.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;

use kernel_tests::skips::{no_precontent_events, not_root, skip};
use kernel_tests::torture::{self, Case, Sizes};
use skimmer_vm_images::apt;

const KILLS: u32 = 20;
const RESETS: u32 = 2;

#[test]
fn kills_cost_no_byte_and_no_read() {
    if let Some(why) = not_root().or_else(no_precontent_events) {
        return skip("kills_cost_no_byte_and_no_read", &why);
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    let outcome = torture::kills_on_host(scratch.path(), agent, KILLS, 1).unwrap();
    println!("{outcome:?}");
    outcome.check().unwrap();
}

#[test]
fn resets_cost_no_byte() {
    if let Some(why) = skimmer_vm_images::missing() {
        return skip("resets_cost_no_byte", &why);
    }
    apt::ensure(&[kernel_tests::registry::PACKAGE]).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    for guest in [("7.2", "fanotify"), ("6.12", "fscache")] {
        let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let outcome = torture::resets(scratch.path(), agent, guest, RESETS, 1).unwrap();
        println!("{}: {outcome:?}", guest.1);
        outcome.check().unwrap();
    }
}

#[test]
fn faults_of_network_and_disk_cost_no_byte() {
    let test = "faults_of_network_and_disk_cost_no_byte";
    if let Some(why) = not_root().or_else(skimmer_vm_images::missing) {
        return skip(test, &why);
    }
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    // Side by side: most of it is waiting.
    std::thread::scope(|scope| {
        for guest in [("7.2", "fanotify"), ("6.12", "fscache")] {
            scope.spawn(move || {
                let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
                let cases = torture::faults(scratch.path(), agent, guest, false).unwrap();
                cases.iter().try_for_each(Case::check).unwrap();
            });
        }
    });
}

#[test]
fn a_small_cache_keeps_its_budget() {
    if let Some(why) = not_root().or_else(no_precontent_events) {
        return skip("a_small_cache_keeps_its_budget", &why);
    }
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_skimmer-agent"));
    let sizes = Sizes { budget_mib: 64, images: 10, image_mib: 16 };
    let kept = torture::budget_on_host(scratch.path(), agent, sizes).unwrap();
    println!("{kept:?}");
    kept.check().unwrap();
}
