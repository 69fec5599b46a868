//! What is done to a tree, and what it is measured by.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::contender::{Mounted, Stage};
use crate::data::{FILE, MANY, SOURCE, Source};
use crate::probe::Walk;
use crate::record::{Better, Unit};

/// One workload of a scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The case in tables.
    pub name: String,
    /// Left out of quick runs.
    #[serde(default)]
    pub long: bool,
    /// Left out in guests.
    #[serde(default)]
    pub host_only: bool,
    /// At most so many rounds; all of the scenario's when absent.
    pub rounds: Option<u32>,
    /// The page cache keeps what the last run read; otherwise it is dropped before each measurement.
    #[serde(default)]
    pub page_cache: bool,
    /// What is done.
    pub run: Action,
}

/// What is done.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Action {
    /// fio on the large file.
    Fio(Fio),
    /// `tar -cf` of the small files and the source, read by a program.
    Tar,
    /// A walk over the small files with their attributes.
    Walk,
    /// The source built through an overlay, as a container would.
    Compile,
}

/// Options of fio.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fio {
    /// `read` or `randread`.
    pub rw: String,
    /// `psync`, `mmap`, ...
    pub engine: String,
    /// MiB to read, again from the front when the file is shorter; the whole file once when absent.
    pub mib: Option<u64>,
}

/// A metric and its value.
pub(super) type Value3 = (&'static str, (f64, Unit, Better));

impl Workload {
    pub(super) fn wanted(&self, quick: bool, guest: bool) -> bool {
        !(quick && self.long || guest && self.host_only)
    }

    /// Measures one contender once.
    pub(super) fn measure(
        &self,
        stage: &Stage<'_>,
        contender: &Mounted<'_>,
        source: Source,
    ) -> Result<Vec<Value3>> {
        if !self.page_cache {
            stage.drop_caches()?;
        }
        let asked = contender.kernel_requests()?;
        let values = match &self.run {
            Action::Fio(fio) => fio.measure(stage, contender, self.page_cache),
            Action::Tar => tar(stage, contender),
            Action::Walk => {
                let walk: Walk = stage.probe(&["walk", &format!("{}/{MANY}", contender.path)])?;
                ensure!(walk.names > 0, "the walk found nothing");
                Ok(vec![time(walk.seconds)])
            }
            Action::Compile => compile(stage, contender, source),
        }?;
        ensure!(
            asked == contender.kernel_requests()?,
            "the kernel asked the daemon for data that was all there"
        );
        Ok(values)
    }
}

fn time(seconds: f64) -> Value3 {
    ("time", (seconds, Unit::Seconds, Better::Lower))
}

impl Fio {
    fn measure(&self, stage: &Stage<'_>, contender: &Mounted<'_>, page_cache: bool) -> Result<Vec<Value3>> {
        let path = stage.inside(&format!("{}/{FILE}", contender.path))?;
        let (rw, engine) = (&self.rw, &self.engine);
        let size = self.mib.map_or(String::new(), |mib| format!(" --io_size={mib}m"));
        // Its own invalidation would undo a warm page cache, and is not needed with a cold one.
        let line = format!(
            "fio --name=bench --filename='{path}' --readonly --rw={rw} --bs=4k --ioengine={engine} --direct=0 \
             --invalidate=0{size} --thread --output-format=json"
        );
        if page_cache {
            // Brings in what this workload reads, unmeasured.
            stage.tool(&line)?;
        }
        let answer: Value = serde_json::from_slice(&stage.tool(&line)?).context("fio printed no JSON")?;
        let read = &answer["jobs"][0]["read"];
        let number = |value: &Value, what: &str| {
            value.as_f64().with_context(|| format!("fio's answer has no {what}: {answer}"))
        };
        let bytes = number(&read["io_bytes"], "io_bytes")?;
        ensure!(answer["jobs"][0]["error"] == 0 && bytes > 0.0, "fio: {answer}");
        let wanted = self.mib.map(|mib| mib << 20);
        ensure!(wanted.is_none_or(|wanted| read["io_bytes"] == wanted), "fio read another amount: {answer}");
        let p99 = number(&read["clat_ns"]["percentile"]["99.000000"], "99th percentile")? / 1e9;
        Ok(vec![
            ("bandwidth", (number(&read["bw_bytes"], "bw_bytes")?, Unit::BytesPerSecond, Better::Higher)),
            ("latency p99", (p99, Unit::Seconds, Better::Lower)),
        ])
    }
}

/// GNU tar reads nothing when it writes to /dev/null itself.
fn tar(stage: &Stage<'_>, contender: &Mounted<'_>) -> Result<Vec<Value3>> {
    let path = stage.inside(&contender.path)?;
    let start = Instant::now();
    let line = format!("tar -C '{path}' -cf - $(cd '{path}' && ls -d {MANY} {SOURCE} 2>/dev/null) | wc -c");
    let answer = stage.tool(&line)?;
    let seconds = start.elapsed().as_secs_f64();
    let bytes: u64 = String::from_utf8_lossy(&answer).trim().parse().context("wc printed no number")?;
    ensure!(bytes > 10_240, "the archive has {bytes} bytes");
    Ok(vec![time(seconds)])
}

/// An upper layer in memory takes the products.
fn compile(stage: &Stage<'_>, contender: &Mounted<'_>, source: Source) -> Result<Vec<Value3>> {
    let (_, recipe) = source.recipe().context("the tree has no source to compile")?;
    let base = format!("{}/overlay", stage.work);
    let lower = format!("{}/{SOURCE}", contender.path);
    let up = format!(
        "mkdir -p '{base}' && mount -t tmpfs tmpfs '{base}' && cd '{base}' && mkdir upper work merged && \
         mount -t overlay overlay -o lowerdir='{lower}',upperdir='{base}/upper',workdir='{base}/work' '{base}/merged'"
    );
    let machine = stage.machine;
    let down = format!("umount '{base}/merged'; umount '{base}'");
    let result = machine.check(&["sh", "-c", &up], crate::contender::SHORT).and_then(|_| {
        let merged = stage.inside(&format!("{base}/merged"))?;
        let start = Instant::now();
        stage.tool(&format!("set -e; cd '{merged}'; JOBS=$(nproc); export JOBS; {recipe}"))?;
        Ok(start.elapsed().as_secs_f64())
    });
    let taken_down = machine.check(&["sh", "-c", &down], crate::contender::SHORT);
    let seconds = result?;
    taken_down?;
    Ok(vec![time(seconds)])
}
