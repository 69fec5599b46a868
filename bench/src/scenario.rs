//! Scenarios: small TOML files that say what is measured, on whom, and how often.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::record::About;
use crate::{build, cold, density, warm};

/// One file of `bench/scenarios`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without `.toml`; not part of the file.
    #[serde(skip)]
    pub name: String,
    /// One line.
    pub title: String,
    /// What it does and what its conditions are.
    pub about: String,
    /// Whether quick runs include it.
    #[serde(default)]
    pub quick: bool,
    /// Takes so long that it runs only when named.
    #[serde(default)]
    pub only_by_name: bool,
    /// Rounds of a full run.
    pub rounds: u32,
    /// Rounds of a quick run; those of a full run when absent.
    pub quick_rounds: Option<u32>,
    /// `host`, or names of `vm-images/kernels.toml`: each machine is set up once and runs all contenders that its
    /// kernel can, interleaved.
    pub machines: Vec<String>,
    /// Machines of a quick run; all when absent.
    pub quick_machines: Option<Vec<String>>,
    /// Names of built-in contenders.
    pub contenders: Vec<String>,
    /// Contenders by command lines.
    #[serde(default)]
    pub custom: Vec<Custom>,
    /// The contender that ratios refer to.
    pub reference: String,
    /// Reads of data that is all there.
    pub warm: Option<warm::Spec>,
    /// First reads, over a link.
    pub cold: Option<cold::Spec>,
    /// Many images on one daemon.
    pub density: Option<density::Spec>,
    /// Making images.
    pub build: Option<build::Spec>,
}

/// A contender that is not built in: shell command lines on the machine of the scenario. Each runs in `sh -e` with the
/// variables that the kind of the scenario documents (`MOUNT`, `TREE`, `FLAT`, `IMAGE`, `REGISTRY`, `WORK`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Custom {
    /// Its name in tables.
    pub name: String,
    /// Programs that must be found in PATH; when one is missing the contender is skipped by name.
    pub programs: Vec<String>,
    /// Done once, before the first round.
    #[serde(default)]
    pub prepare: String,
    /// Makes the tree appear at `$MOUNT`.
    pub mount: String,
    /// Undoes `mount`.
    pub unmount: String,
    /// Undoes `prepare`.
    #[serde(default)]
    pub clean: String,
}

/// The one kind of a scenario.
#[derive(Clone, Copy, Debug)]
pub enum Kind<'a> {
    /// Reads of data that is all there.
    Warm(&'a warm::Spec),
    /// First reads, over a link.
    Cold(&'a cold::Spec),
    /// Many images on one daemon.
    Density(&'a density::Spec),
    /// Making images.
    Build(&'a build::Spec),
}

impl Kind<'_> {
    /// Its name in scenario files and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Warm(_) => "warm",
            Kind::Cold(_) => "cold",
            Kind::Density(_) => "density",
            Kind::Build(_) => "build",
        }
    }
}

impl Scenario {
    /// Reads the scenario `path`.
    ///
    /// # Errors
    /// It cannot be read, or is not a scenario: the message names the line or the field.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("scenario {}", path.display()))?;
        let name =
            path.file_stem().and_then(|stem| stem.to_str()).context("a scenario's name is not text")?;
        Self::parse(name, &text).with_context(|| format!("scenario {}", path.display()))
    }

    /// Parses the text of the scenario `name`.
    ///
    /// # Errors
    /// It is not a scenario.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let mut scenario: Self = toml::from_str(text)?;
        scenario.name = name.to_owned();
        let kinds = [
            scenario.warm.is_some(),
            scenario.cold.is_some(),
            scenario.density.is_some(),
            scenario.build.is_some(),
        ];
        let kinds = kinds.iter().filter(|present| **present).count();
        ensure!(kinds == 1, "it needs exactly one of [warm], [cold], [density] and [build], and has {kinds}");
        ensure!(scenario.rounds > 0 && scenario.quick_rounds != Some(0), "it needs a round at least");
        ensure!(!scenario.machines.is_empty(), "`machines` is empty");
        let names: Vec<&str> = scenario.names().collect();
        let unique: BTreeSet<&str> = names.iter().copied().collect();
        ensure!(unique.len() == names.len(), "a contender is named twice");
        ensure!(
            unique.contains(scenario.reference.as_str()),
            "`reference` {:?} is none of its contenders",
            scenario.reference
        );
        Ok(scenario)
    }

    /// Every contender's name, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let custom = self.custom.iter().map(|custom| custom.name.as_str());
        self.contenders.iter().map(String::as_str).chain(custom)
    }

    /// What it measures.
    pub fn kind(&self) -> Kind<'_> {
        match (&self.warm, &self.cold, &self.density, &self.build) {
            (Some(spec), ..) => Kind::Warm(spec),
            (_, Some(spec), ..) => Kind::Cold(spec),
            (_, _, Some(spec), _) => Kind::Density(spec),
            (.., Some(spec)) => Kind::Build(spec),
            _ => unreachable!("`parse` lets no scenario without a kind through"),
        }
    }

    /// Its words, for the results.
    pub fn about(&self) -> About {
        About {
            scenario: self.name.clone(),
            title: self.title.clone(),
            about: self.about.clone(),
            kind: self.kind().name().to_owned(),
            reference: self.reference.clone(),
            contenders: self.names().map(str::to_owned).collect(),
        }
    }
}
