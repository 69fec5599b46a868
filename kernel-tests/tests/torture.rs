//! A short pass of what `cargo xtask torture` does at length.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::Path;

use kernel_tests::skips::{no_precontent_events, not_root, skip};
use kernel_tests::torture;

const KILLS: u32 = 20;

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
