//! Small runs of every kind on this host: what they write down, what they notice, and what they leave behind.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kernel_tests::skimmer::programs;
use kernel_tests::skips::{no_precontent_events, not_root, skip};
use skimmer_bench::record::{Line, Run};
use skimmer_bench::report;
use skimmer_bench::run::{Bench, Options};
use skimmer_bench::scenario::Scenario;

/// Runs of this process look for what others leave behind.
static ONE: Mutex<()> = Mutex::new(());

struct Outcome {
    result: Result<Vec<Line>, anyhow::Error>,
    lines: Vec<Line>,
    /// What benchmark runs had left when this one began.
    before: Vec<String>,
    _one: MutexGuard<'static, ()>,
}

fn skipped(test: &str) -> bool {
    match not_root().or_else(no_precontent_events) {
        Some(why) => {
            skip(test, &why);
            true
        }
        None => false,
    }
}

/// Runs a scenario in a quick run of one round; the flag interrupts it after `interrupt`.
fn run(name: &str, text: &str, interrupt: Option<Duration>) -> Outcome {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = made();
    let scenario = Scenario::parse(name, text).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let programs: PathBuf = programs().unwrap()[0].parent().unwrap().to_owned();
    let results = scratch.path().join("results");
    let options = Options {
        quick: true,
        rounds: Some(1),
        machines: None,
        programs,
        variants: Vec::new(),
        results: results.clone(),
    };
    let flag = Arc::new(AtomicBool::new(false));
    if let Some(after) = interrupt {
        let flag = Arc::clone(&flag);
        std::thread::spawn(move || {
            std::thread::sleep(after);
            flag.store(true, Ordering::Relaxed);
        });
    }
    let result = Bench::new(options, Run::default(), flag).unwrap().run(&[scenario]);
    let lines = report::read(&results.join("results.jsonl")).unwrap();
    assert!(report::write(&lines, &results).unwrap().is_file());
    let outcome = Outcome { result, lines, before, _one: one };
    outcome.nothing_is_left();
    outcome
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The mounts, loop devices, keepers and network namespaces of benchmark runs.
fn made() -> Vec<String> {
    let works = ["warm-", "cold-", "density-", "build-"]
        .map(|kind| skimmer_vm_images::cache::root().unwrap().join("work").join(kind));
    let mut made = Vec::new();
    for (program, args) in [
        ("cat", ["/proc/self/mounts"].as_slice()),
        ("losetup", &["-a"]),
        ("pgrep", &["-af", "keeper.sock"]),
        ("ip", &["netns", "list"]),
    ] {
        let text = output(program, args);
        let ours = text.lines().filter(|line| {
            line.contains(&format!("skimmer-bench-{}-", std::process::id()))
                || works.iter().any(|work| line.contains(work.to_str().unwrap()))
        });
        made.extend(ours.map(str::to_owned));
    }
    made
}

impl Outcome {
    /// Everything that a run makes is named after its work folder or after this process; what another run left, ended
    /// by force, is not this one's.
    fn nothing_is_left(&self) {
        let left: Vec<_> = made().into_iter().filter(|line| !self.before.contains(line)).collect();
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    fn samples(&self, contender: &str, metric: &str) -> Vec<f64> {
        let wanted = |line: &Line| match line {
            Line::Sample(sample) if sample.contender == contender && sample.metric == metric => {
                Some(sample.value)
            }
            _ => None,
        };
        self.lines.iter().filter_map(wanted).collect()
    }

    fn failed(&self, contender: &str) -> Option<&str> {
        self.lines.iter().find_map(|line| match line {
            Line::Failed(outcome) if outcome.contender == contender => Some(outcome.why.as_str()),
            _ => None,
        })
    }

    fn left_out(&self, contender: &str) -> Option<&str> {
        self.lines.iter().find_map(|line| match line {
            Line::Skipped(outcome) if outcome.contender == contender => Some(outcome.why.as_str()),
            _ => None,
        })
    }
}

const WARM: &str = r#"
title = "t"
about = "a"
rounds = 1
machines = ["host"]
reference = "ext4"
contenders = ["ext4", "erofs-loop", "erofs-file", "skimmer-fanotify-marked", "skimmer-fanotify", "fuse"]

[[custom]]
name = "liar"
programs = ["mount"]
prepare = "cp -a \"$TREE\" copy && printf x | dd of=copy/file.bin bs=1 seek=5000 conv=notrunc"
mount = "mount --bind copy \"$MOUNT\""
unmount = "umount \"$MOUNT\""

[[custom]]
name = "absent"
programs = ["no-such-loader"]
mount = "no-such-loader \"$MOUNT\""
unmount = "umount \"$MOUNT\""

[warm]
tree = { file_mib = 4, many = 150, unread_mib = 40 }

[[warm.workload]]
name = "read"
run = { fio = { rw = "randread", engine = "psync", mib = 1 } }

[[warm.workload]]
name = "walk"
run = "walk"
"#;

#[test]
fn a_contender_with_a_wrong_byte_fails_a_warm_run_and_an_absent_one_is_skipped() {
    if skipped("a_contender_with_a_wrong_byte_fails_a_warm_run_and_an_absent_one_is_skipped") {
        return;
    }
    let outcome = run("warm-test", WARM, None);
    assert!(outcome.failed("liar").unwrap().contains("content is not that of ext4"));
    assert!(outcome.left_out("absent").unwrap().contains("no-such-loader is not installed"));
    assert!(outcome.result.as_ref().unwrap_err().to_string().contains("failed"));
    for contender in ["ext4", "erofs-loop", "skimmer-fanotify-marked", "skimmer-fanotify", "fuse"] {
        assert!(outcome.failed(contender).is_none(), "{contender}: {:?}", outcome.failed(contender));
        assert_eq!(outcome.samples(contender, "bandwidth").len(), 1, "{contender}");
        assert!(outcome.samples(contender, "time")[0] > 0.0);
    }
    let took_part = outcome.samples("erofs-file", "time").len() == 1;
    assert_ne!(took_part, outcome.left_out("erofs-file").is_some());
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    if skipped("an_interrupted_run_leaves_nothing_behind") {
        return;
    }
    let outcome = run("warm-test", WARM, Some(Duration::from_millis(1500)));
    assert!(format!("{:#}", outcome.result.as_ref().unwrap_err()).contains("interrupted"));
    assert!(!outcome.lines.iter().any(|line| matches!(line, Line::End { .. })));
}

const COLD: &str = r#"
title = "t"
about = "a"
rounds = 1
machines = ["host"]
reference = "raw"
contenders = ["raw", "parts", "skimmer-fanotify", "skimmer-fscache"]

[cold]
measure = "misses"
chunks = 8
reads = 6
links = [{ mbit = 200, rtt_ms = 4 }]
"#;

#[test]
fn cold_misses_are_measured_beside_raw_requests() {
    if skipped("cold_misses_are_measured_beside_raw_requests") {
        return;
    }
    let outcome = run("cold-test", COLD, None);
    assert!(outcome.result.is_ok(), "{:#}", outcome.result.as_ref().unwrap_err());
    for contender in ["raw", "parts", "skimmer-fanotify"] {
        // No read can be quicker than the link.
        assert!(outcome.samples(contender, "latency p50")[0] > 0.004, "{contender}");
        let requests = outcome.samples(contender, "requests")[0];
        assert!((1.0..=12.0).contains(&requests), "{contender}: {requests} requests");
        assert!(outcome.samples(contender, "bytes moved")[0] > 1e6, "{contender}");
    }
    assert!(outcome.samples("skimmer-fanotify", "peak memory")[0] > 1e6);
}

#[test]
fn a_cold_sweep_is_measured_in_every_form() {
    if skipped("a_cold_sweep_is_measured_in_every_form") {
        return;
    }
    let text = r#"
        title = "t"
        about = "a"
        rounds = 1
        machines = ["host"]
        reference = "raw"
        contenders = ["raw", "parts", "skimmer-fanotify", "skimmer-fanotify-slots-prefetch"]
        [cold]
        measure = "everything"
        images = ["perl"]
        links = [{ mbit = 1000, rtt_ms = 1 }]
    "#;
    let outcome = run("everything-test", text, None);
    assert!(outcome.result.is_ok(), "{:#}", outcome.result.as_ref().unwrap_err());
    let moved = |contender| outcome.samples(contender, "bytes moved")[0];
    // The same tree, so about the same bytes; the contents were compared.
    let (plain, slots) = (moved("skimmer-fanotify"), moved("skimmer-fanotify-slots-prefetch"));
    assert!((0.8..1.25).contains(&(slots / plain)), "{slots} bytes instead of {plain}");
    for contender in ["raw", "parts"] {
        assert!(outcome.samples(contender, "time")[0] > 0.0, "{contender}");
    }
}

#[test]
fn one_daemon_carries_several_images() {
    if skipped("one_daemon_carries_several_images") {
        return;
    }
    let text = r#"
        title = "t"
        about = "a"
        rounds = 1
        machines = ["host"]
        reference = "idle"
        contenders = ["idle", "skimmerd", "skimmer-keeper"]
        [density]
        images = [1, 3]
        misses = 3
        idle_seconds = 1
    "#;
    let outcome = run("density-test", text, None);
    assert!(outcome.result.is_ok(), "{:#}", outcome.result.as_ref().unwrap_err());
    for contender in ["idle", "skimmerd", "skimmer-keeper"] {
        let rss = outcome.samples(contender, "rss");
        assert!(rss.len() == 2 && rss.iter().all(|rss| *rss > 1e5), "{contender}: {rss:?}");
    }
    assert_eq!(outcome.samples("skimmerd", "cpu time per miss").len(), 1);
    // Threads are one daemon's, not one image's.
    let threads = outcome.samples("skimmerd", "threads");
    assert!(threads[1] <= threads[0] + 1.0, "{threads:?}");
}

#[test]
fn scenarios_that_make_no_sense_are_refused() {
    let error = |text: &str| format!("{:#}", Scenario::parse("s", text).unwrap_err());
    assert!(error(&WARM.replace("rounds = 1", "rounds = 0")).contains("round"));
    assert!(error(&WARM.replace("reference = \"ext4\"", "reference = \"xfs\"")).contains("\"xfs\""));
    assert!(error(&WARM.replace("about =", "abuot =")).contains("abuot"));
    assert!(error(&WARM.replace("name = \"liar\"", "name = \"ext4\"")).contains("twice"));
    assert!(error("title = 1").contains("line 1"));
}

#[test]
fn the_scenarios_of_the_tree_parse() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            names.push(Scenario::read(&path).unwrap().kind().name());
        }
    }
    for kind in ["warm", "cold", "density", "build"] {
        assert!(names.contains(&kind), "{names:?}");
    }
}
