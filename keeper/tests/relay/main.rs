//! The keeper on the running kernel: real marks, real readers, daemons that die.
//!
//! Each scenario starts the built `skimmer-keeper`. Daemons that have to die are this program again, see [`worker`].

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod manager;
mod scenarios;
mod support;
mod worker;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "worker") {
        worker::main(&args[1..]);
        return ExitCode::SUCCESS;
    }
    let wanted = args.iter().find(|arg| !arg.starts_with('-'));
    let wanted = |name: &str| wanted.is_none_or(|wanted| name.contains(wanted.as_str()));
    let chosen: Vec<_> = scenarios::ALL.iter().filter(|(name, _)| wanted(name)).collect();
    if args.iter().any(|arg| arg == "--list") {
        for (name, _) in chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    println!("\nrunning {} tests", chosen.len());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for &&(name, scenario) in &chosen {
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let bench = support::Bench::new()?;
            support::bounded(|| scenario(&bench));
            Ok::<(), skimmer_fanotify::Unsupported>(())
        }));
        match result {
            Ok(Ok(())) => {
                println!("test {name} ... ok");
                passed += 1;
            }
            Ok(Err(why)) => {
                println!("test {name} ... ignored");
                skimmer_test_support::skip(&format!("relay::{name}"), &why.to_string());
                skipped += 1;
            }
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    // The line of Rust's own runner, by which `cargo xtask test` counts.
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        scenarios::ALL.len() - chosen.len(),
        start.elapsed().as_secs_f64(),
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
