//! From asking for an image to the first right output of its program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernel_tests::debian_image::Program;
use skimmer_vm_images::run as run_command;

use super::contender::{Before, Fresh, Ours, rounds};
use super::world::{Far, Published, World};
use crate::contender::{LONG, SHORT};
use crate::probe::Start;
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::{Custom, Scenario};

pub(super) fn run(bench: &mut Bench, scenario: &Scenario, world: &World, far: &Far) -> Result<()> {
    for image in world.images.iter().filter(|image| far.wants(image)) {
        let program = image.program.context("an image without a program")?;
        let case = format!("{}, {}", image.name, far.case);
        let place = Place { scenario: scenario.name.clone(), machine: world.name.clone(), case };
        let left_out = |name: &str| {
            if let Some(custom) = scenario.custom.iter().find(|custom| custom.name == name) {
                return missing(world, custom);
            }
            // The download alone is this host's curl, over the same link.
            let emulated = world.guest && name != "raw";
            emulated
                .then(|| "it would measure the emulator, not the work: compare with the host's".to_owned())
        };
        rounds(bench, scenario, world, &place, left_out, |bench, contender, at| {
            let custom = scenario.custom.iter().find(|custom| custom.name == at.1);
            match (contender, custom) {
                (Some(contender), _) => ours(bench, world, far, (image, program), &contender, at),
                (None, Some(custom)) => by_lines(bench, world, far, (image, program), custom, at),
                (None, None) => pulled(bench, world, far, (image, program), at),
            }
        })?;
    }
    Ok(())
}

/// The first program of a contender by command lines that is not there.
fn missing(world: &World, custom: &Custom) -> Option<String> {
    let absent = |program: &&String| {
        let line = format!("command -v {program}");
        !world.machine.run(&["sh", "-c", &line], SHORT).is_ok_and(|output| output.success())
    };
    custom.programs.iter().find(absent).map(|program| format!("{program} is not installed"))
}

/// A contender by command lines: `mount` makes the image's root appear at `$MOUNT`.
fn by_lines(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    (image, program): (&Published, &Program),
    custom: &Custom,
    at: (&Place, &str, u32),
) -> Result<()> {
    let work = world.fresh();
    let point = format!("{work}/mnt");
    world.machine.check(&["mkdir", "-p", &point], SHORT)?;
    let variables = format!(
        "set -e; MOUNT='{point}' WORK='{work}' REGISTRY='{}' IMAGE='{}'; export MOUNT WORK REGISTRY IMAGE; cd '{work}'\n",
        far.registry.borrow().address(),
        image.name
    );
    let line = |text: &str| world.machine.check(&["sh", "-c", &format!("{variables}{text}")], LONG);
    line(&custom.prepare)?;
    let before = Before::now(far)?;
    let begin = Instant::now();
    let outcome = line(&custom.mount).and_then(|_| {
        let mounted = begin.elapsed();
        Ok((mounted, start(world, program, &point)?))
    });
    // Taken back even when only half of it was done.
    let undone = line(&custom.unmount).and_then(|_| line(&custom.clean));
    let (mounted, started) = outcome?;
    undone?;
    time(bench, at, "time", mounted + started)?;
    time(bench, at, "mount", mounted)?;
    before.moved(bench, far, at, None)?;
    world.machine.check(&["rm", "-rf", &work], SHORT).map(drop)
}

fn time(
    bench: &mut Bench,
    (place, name, round): (&Place, &str, u32),
    metric: &str,
    took: Duration,
) -> Result<()> {
    let value = (took.as_secs_f64(), Unit::Seconds, Better::Lower);
    bench.sample(place, name, round, metric, value)
}

fn ours(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    (image, program): (&Published, &Program),
    contender: &Ours,
    at: (&Place, &str, u32),
) -> Result<()> {
    let mut fresh = Fresh::new(world, contender)?;
    let used = fresh.usage()?;
    let before = Before::now(far)?;
    let (point, mounted) = fresh.mount(far, image)?;
    let started = start(world, program, &point).with_context(|| fresh.log())?;
    time(bench, at, "time", mounted + started)?;
    time(bench, at, "mount", mounted)?;
    let moved = before.moved(bench, far, at, None)?;
    fresh.cost(bench, at, &used, moved)
}

/// Starts the program with what a container runtime would give it: devices and a place for temporary files.
pub(super) fn start(world: &World, program: &Program, root: &str) -> Result<Duration> {
    let probe = format!("{}/skimmer-probe", world.programs);
    let mut argv = vec![probe.as_str(), "start", "--root", root, "--expect", program.expect];
    let port = program.ask.map(|(port, _)| port.to_string());
    if let (Some(port), Some((_, request))) = (&port, program.ask) {
        argv.extend(["--ask", port, "--request", request]);
    }
    argv.push("--");
    argv.extend(program.run);
    let up = format!("mount -o bind /dev '{root}/dev' && mount -t tmpfs tmpfs '{root}/tmp'");
    let down = format!("umount '{root}/tmp'; umount '{root}/dev'");
    let begin = Instant::now();
    world.machine.check(&["sh", "-c", &up], SHORT)?;
    let prepared = begin.elapsed();
    let answer = world.machine.check(&argv, LONG);
    world.machine.check(&["sh", "-c", &down], SHORT)?;
    let start: Start = serde_json::from_slice(&answer?)?;
    Ok(prepared + Duration::from_secs_f64(start.seconds))
}

/// What users do without us, and what bounds it.
fn pulled(
    bench: &mut Bench,
    world: &World,
    far: &Far,
    (image, program): (&Published, &Program),
    at: (&Place, &str, u32),
) -> Result<()> {
    let directory = PathBuf::from(world.fresh());
    fs::create_dir_all(&directory)?;
    let removed = Removed(directory.clone());
    let before = Before::now(far)?;
    let begin = Instant::now();
    let took = match at.1 {
        "pull-unpack" => {
            let root = pull_unpack(far, image, &directory)?;
            let pulled = begin.elapsed();
            pulled + start(world, program, &crate::contender::text(&root)?)?
        }
        "pull-stream" => {
            let mounted = pull_stream(far, image, &directory)?;
            let pulled = begin.elapsed();
            pulled + start(world, program, &crate::contender::text(&mounted.0)?)?
        }
        "raw" => {
            raw(far, image)?;
            begin.elapsed()
        }
        other => bail!("no contender {other} of cold starts"),
    };
    drop(removed);
    time(bench, at, "time", took)?;
    before.moved(bench, far, at, None).map(drop)
}

/// Removes a folder.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // What cannot be removed goes with the run's folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Unmounts an overlay.
struct Overlay(PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = run_command(Command::new("umount").arg(&self.0)) {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// skopeo and umoci: one step after the other.
fn pull_unpack(far: &Far, image: &Published, directory: &Path) -> Result<PathBuf> {
    let source = format!("docker://{}/{}:original", far.registry.borrow().address(), image.name);
    let layout = format!("{}:latest", directory.join("pulled").display());
    let destination = format!("oci:{layout}");
    run_command(Command::new("skopeo").args([
        "copy",
        "-q",
        "--src-tls-verify=false",
        &source,
        &destination,
    ]))?;
    let bundle = directory.join("bundle");
    run_command(Command::new("umoci").args(["unpack", "--image", &layout]).arg(&bundle))?;
    Ok(bundle.join("rootfs"))
}

/// Every layer at once, unpacked while it arrives, into an overlay: the best that pulling can do. Whiteouts are left
/// unpacked as they are.
fn pull_stream(far: &Far, image: &Published, directory: &Path) -> Result<Overlay> {
    let mut script = String::from("set -e -o pipefail\n");
    let mut lower = Vec::new();
    for (index, (digest, _)) in image.layers.iter().enumerate() {
        let layer = directory.join(index.to_string());
        fs::create_dir(&layer)?;
        let (url, into) = (far.url(&image.name, digest), layer.display());
        script.push_str(&format!("(curl -sSf '{url}' | tar -xz -C '{into}') & p{index}=$!\n"));
        lower.insert(0, into.to_string());
    }
    for index in 0..image.layers.len() {
        script.push_str(&format!("wait $p{index}\n"));
    }
    run_command(Command::new("bash").args(["-c", &script]))?;
    let root = directory.join("root");
    fs::create_dir(&root)?;
    let options = format!("lowerdir={}", lower.join(":"));
    run_command(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(&root))?;
    Ok(Overlay(root))
}

/// The download alone.
fn raw(far: &Far, image: &Published) -> Result<()> {
    let mut curl = Command::new("curl");
    curl.arg("-sSf");
    for (digest, _) in &image.layers {
        curl.args(["-o", "/dev/null", &far.url(&image.name, digest)]);
    }
    run_command(&mut curl).map(drop)
}
