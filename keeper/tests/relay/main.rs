//! The keeper on the running kernel: real marks, real readers, daemons that die.
//!
//! Each scenario starts the built `skimmer-keeper`. Daemons that have to die are this program again, see [`worker`].

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod scenarios;
mod support;
mod worker;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "worker") {
        worker::main(&args[1..]);
        return ExitCode::SUCCESS;
    }
    let wanted = args.iter().find(|arg| !arg.starts_with('-'));
    let mut failed = 0;
    for &(name, scenario) in scenarios::ALL {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let bench = support::Bench::new()?;
            support::bounded(|| scenario(&bench));
            Ok::<(), skimmer_fanotify::Unsupported>(())
        }));
        match result {
            Ok(Ok(())) => println!("test {name} ... ok"),
            Ok(Err(why)) => eprintln!("SKIPPED: {name}: {why}"),
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
