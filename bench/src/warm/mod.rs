//! Warm scenarios: reads of data that is all on this machine, side by side with native ext4.

use anyhow::{Result, bail};
use serde::Deserialize;

use crate::run::Bench;
use crate::scenario::Scenario;

/// The scenario's table `[warm]`.
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
