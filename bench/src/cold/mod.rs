//! Cold scenarios: first reads of images behind an emulated link.

use anyhow::{Result, bail};
use serde::Deserialize;

use crate::run::Bench;
use crate::scenario::Scenario;

/// The scenario's table `[cold]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {}

/// Runs all contenders of a scenario on one machine.
///
/// # Errors
/// The scenario cannot be set up, or the run was interrupted.
pub fn run(_bench: &mut Bench, scenario: &Scenario, _spec: &Spec, machine: &str) -> Result<()> {
    bail!("{} on {machine}: not there yet", scenario.name)
}
