//! What a run writes down: one JSON object per line, in the order of measuring.

use serde::{Deserialize, Serialize};

/// One line of `results.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "line", deny_unknown_fields)]
pub enum Line {
    /// The first line: what was run, where, and when.
    Run(Run),
    /// A scenario begins; its words are kept so that a report needs nothing but this file.
    Scenario(About),
    /// One measured value.
    Sample(Sample),
    /// A contender that did not take part, and why.
    Skipped(Outcome),
    /// A contender that gave a wrong result or an error; the run fails.
    Failed(Outcome),
    /// The last line of a run that was not interrupted.
    End {
        /// Seconds from the first line to this one.
        seconds: f64,
    },
}

/// The conditions of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// UTC, `2026-11-21T03:00:00Z`.
    pub date: String,
    /// Commit, with `-dirty` when the tree differs from it.
    pub revision: String,
    /// `uname -r` of this machine.
    pub kernel: String,
    /// The processor's name and the number of cores.
    pub processor: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What TCP of this machine uses for congestion control; it decides what a link with loss can carry.
    pub congestion: String,
    /// Build profile of the programs under test.
    pub profile: String,
    /// The command line that repeats the run.
    pub command: String,
    /// Whether it was a quick run: fewer rounds and cases.
    pub quick: bool,
}

/// A scenario's words.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Its name: the file's name without `.toml`.
    pub scenario: String,
    /// One line.
    pub title: String,
    /// What it does and what its conditions are.
    pub about: String,
    /// Which part of a report it belongs to: warm, cold, density or build.
    pub kind: String,
    /// The contender that ratios refer to.
    pub reference: String,
    /// Every contender, in the order of the scenario.
    pub contenders: Vec<String>,
}

/// Where a value belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The scenario.
    pub scenario: String,
    /// `host 6.18.5` or `qemu 6.12.117+deb13-cloud-amd64`.
    pub machine: String,
    /// What else tells its runs apart (the link, the image, the number of images); may be empty.
    pub case: String,
}

/// One measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Where it belongs.
    #[serde(flatten)]
    pub place: Place,
    /// Whose value it is.
    pub contender: String,
    /// From 0.
    pub round: u32,
    /// What was measured, `time` or `read p99`.
    pub metric: String,
    /// Its unit.
    pub unit: Unit,
    /// Whether more is better.
    pub better: Better,
    /// The value.
    pub value: f64,
}

/// Units of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// Bytes per second.
    BytesPerSecond,
    /// Operations per second.
    PerSecond,
    /// A number of things.
    Count,
    /// A quotient of two values of one unit.
    Ratio,
}

/// Which way a value is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
    /// A condition, not a merit: shown, never compared.
    Neither,
}

/// A contender without values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// Who.
    pub contender: String,
    /// The reason, with its remedy where there is one.
    pub why: String,
}
