//! Build: what making an image costs, against the sum of its parts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use kernel_tests::debian_image::{self, TAG};
use kernel_tests::fixture::{self, Compression, Layout};
use serde::Deserialize;
use skimmer_vm_images::{apt, run as run_command};

use crate::contender::text;
use crate::probe;
use crate::record::{Better, Place, Unit};
use crate::run::Bench;
use crate::scenario::Scenario;

/// The scenario's table `[build]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The image of Debian packages that is built from.
    pub image: String,
    /// Forms that it is built from.
    pub inputs: Vec<Input>,
    /// Forms of quick runs instead.
    pub quick_inputs: Option<Vec<Input>>,
}

/// A form of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Its unpacked tree.
    Directory,
    /// Its unpacked tree; chunks are stored as they are.
    Uncompressed,
    /// Its layers as gzip.
    Gzip,
    /// Its layers as zstd.
    Zstd,
}

impl Input {
    fn case(self) -> &'static str {
        match self {
            Input::Directory => "directory",
            Input::Uncompressed => "directory, stored uncompressed",
            Input::Gzip => "gzip layers",
            Input::Zstd => "zstd layers",
        }
    }

    fn compression(self) -> &'static str {
        if self == Input::Uncompressed { "none" } else { "zstd" }
    }
}

/// The image in all forms.
struct Sources {
    tree: PathBuf,
    gzip: PathBuf,
    zstd: PathBuf,
    /// Bytes of files in the tree.
    bytes: u64,
}

impl Sources {
    fn path(&self, input: Input) -> &Path {
        match input {
            Input::Directory | Input::Uncompressed => &self.tree,
            Input::Gzip => &self.gzip,
            Input::Zstd => &self.zstd,
        }
    }
}

/// Runs all contenders of a scenario on one machine.
///
/// # Errors
/// The scenario cannot be set up, or the run was interrupted.
pub fn run(bench: &mut Bench, scenario: &Scenario, spec: &Spec, machine: &str) -> Result<()> {
    ensure!(machine == "host", "building is measured on the host only");
    apt::ensure(&["time", "erofs-utils", "umoci"])?;
    let base = skimmer_vm_images::cache::root()?.join("work");
    fs::create_dir_all(&base)?;
    let scratch = tempfile::Builder::new().prefix("build-").tempdir_in(&base)?;
    let sources = sources(spec, scratch.path())?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let inputs = match &spec.quick_inputs {
        Some(inputs) if bench.quick() => inputs,
        _ => &spec.inputs,
    };
    for input in inputs.iter().copied() {
        let place = Place {
            scenario: scenario.name.clone(),
            machine: format!("host {}", release.trim()),
            case: input.case().to_owned(),
        };
        let mut contenders: Vec<&str> = scenario.contenders.iter().map(String::as_str).collect();
        if matches!(input, Input::Gzip | Input::Zstd) && contenders.contains(&"mkfs.erofs") {
            bench.skipped(&place, "mkfs.erofs", "this version makes images of directories only")?;
            contenders.retain(|name| *name != "mkfs.erofs");
        }
        for round in 0..bench.rounds(scenario) {
            for name in contenders.clone() {
                bench.check()?;
                // Everything is in the page cache: a build's disk is not what is measured.
                probe::sweep(sources.path(input))?;
                let out = scratch.path().join("out");
                let outcome = build(bench, name, input, &sources, &out);
                let checked = outcome.and_then(|cost| {
                    verify(bench, name, &out)?;
                    Ok(cost)
                });
                remove(&out)?;
                match checked {
                    Ok(cost) => report(bench, (&place, name, round), sources.bytes, &cost)?,
                    Err(error) => {
                        bench.failed(&place, name, &error)?;
                        contenders.retain(|other| *other != name);
                    }
                }
            }
        }
    }
    Ok(())
}

fn sources(spec: &Spec, scratch: &Path) -> Result<Sources> {
    let gzip = debian_image::prepare(debian_image::find(&spec.image)?)?;
    let tree = fixture::unpack(&gzip, TAG, &scratch.join("unpacked"))?;
    let tars = probe::tars(&gzip)?;
    let layers: Vec<(&[u8], Compression)> =
        tars.iter().map(|tar| (tar.as_slice(), Compression::Zstd)).collect();
    let zstd = scratch.join("zstd");
    Layout::create(&zstd)?.image(TAG, &layers)?;
    let bytes = probe::sweep(&tree)?.bytes;
    Ok(Sources { tree, gzip, zstd, bytes })
}

/// What a build took.
struct Cost {
    seconds: f64,
    cpu: f64,
    peak: f64,
}

fn build(bench: &Bench, name: &str, input: Input, sources: &Sources, out: &Path) -> Result<Cost> {
    let source = sources.path(input);
    let mut arguments: Vec<String> = Vec::new();
    match name {
        "skimmer" => {
            let source = match input {
                Input::Directory | Input::Uncompressed => text(source)?,
                Input::Gzip | Input::Zstd => format!("oci:{}:{TAG}", text(source)?),
            };
            arguments.extend([text(&bench.program("skimmer"))?, "convert".into(), "--quiet".into()]);
            arguments.extend(["--compression".into(), input.compression().into(), source, text(out)?]);
        }
        "parts" => {
            arguments.extend([text(&bench.program("skimmer-probe"))?, "parts".into(), text(source)?]);
            arguments.extend(["--compression".into(), input.compression().into()]);
        }
        "mkfs.erofs" => {
            arguments.extend(["mkfs.erofs".into(), "--quiet".into()]);
            arguments.extend((input == Input::Directory).then(|| "-zlz4hc".to_owned()));
            arguments.extend([text(out)?, text(source)?]);
        }
        other => bail!("no contender {other} of builds; there are parts, skimmer and mkfs.erofs"),
    }
    // GNU time tells what the process used at most.
    let file = tempfile::NamedTempFile::new()?;
    let mut command = Command::new("time");
    command.args(["-f", "%e %U %S %M", "-o"]).arg(file.path()).args(&arguments);
    run_command(&mut command)?;
    let answer = fs::read_to_string(file.path())?;
    let numbers: Vec<f64> =
        answer.split_whitespace().map(str::parse).collect::<Result<_, _>>().context("time's answer")?;
    let [seconds, user, system, kib] = numbers[..] else { bail!("time said {answer:?}") };
    Ok(Cost { seconds, cpu: user + system, peak: kib * 1024.0 })
}

fn verify(bench: &Bench, name: &str, out: &Path) -> Result<()> {
    match name {
        "skimmer" => {
            run_command(Command::new(bench.program("skimmer")).args(["check", "--quiet"]).arg(out)).map(drop)
        }
        "mkfs.erofs" => run_command(Command::new("fsck.erofs").arg(out)).map(drop),
        _ => Ok(()),
    }
}

fn remove(out: &Path) -> Result<()> {
    if out.is_dir() {
        fs::remove_dir_all(out)?;
    } else if out.exists() {
        fs::remove_file(out)?;
    }
    Ok(())
}

fn report(
    bench: &mut Bench,
    (place, name, round): (&Place, &str, u32),
    bytes: u64,
    cost: &Cost,
) -> Result<()> {
    let speed = f64::from(u32::try_from(bytes >> 10)?) * 1024.0 / cost.seconds.max(0.01);
    bench.sample(place, name, round, "bandwidth", (speed, Unit::BytesPerSecond, Better::Higher))?;
    bench.sample(place, name, round, "cpu time", (cost.cpu, Unit::Seconds, Better::Lower))?;
    bench.sample(place, name, round, "peak memory", (cost.peak, Unit::Bytes, Better::Lower))
}
