//! Build: what making an image costs, against the sum of its parts.

use anyhow::{Result, bail};
use serde::Deserialize;

use crate::run::Bench;
use crate::scenario::Scenario;

/// The scenario's table `[build]`.
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
