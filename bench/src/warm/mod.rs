//! Warm scenarios: reads of data that is all on this machine, side by side with native ext4.

mod machine;
mod workload;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::contender::{Mounted, NATIVE, Outcome, Stage};
use crate::data::TreeSpec;
use crate::probe::Sum;
use crate::record::Place;
use crate::run::Bench;
use crate::scenario::Scenario;

pub use workload::{Action, Fio, Workload};

/// The scenario's table `[warm]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What lies in the tree.
    pub tree: TreeSpec,
    /// Instead of `tree` in guests, which are slow.
    pub guest_tree: Option<TreeSpec>,
    /// Instead of both in quick runs.
    pub quick_tree: Option<TreeSpec>,
    /// What is done to it.
    pub workload: Vec<Workload>,
}

/// Runs all contenders of a scenario on one machine.
///
/// # Errors
/// The scenario cannot be set up, or the run was interrupted.
pub fn run(bench: &mut Bench, scenario: &Scenario, spec: &Spec, machine: &str) -> Result<()> {
    ensure!(
        scenario.reference == NATIVE && scenario.contenders.first().is_some_and(|first| first == NATIVE),
        "a warm scenario's first contender and reference is {NATIVE}: the others' content is checked against it"
    );
    let guest = machine != "host";
    let workloads: Vec<&Workload> = spec.workload.iter().filter(|w| w.wanted(bench.quick(), guest)).collect();
    let tree = match (&spec.quick_tree, &spec.guest_tree) {
        (Some(tree), _) if bench.quick() => tree,
        (_, Some(tree)) if guest => tree,
        _ => &spec.tree,
    };
    let prepared = machine::Prepared::new(bench, tree, machine)?;
    let stage = prepared.stage();
    let place = |case: &str| Place {
        scenario: scenario.name.clone(),
        machine: prepared.name.clone(),
        case: case.to_owned(),
    };
    let mut contenders = mount_all(bench, scenario, &stage, &place(""))?;
    for round in 0..bench.rounds(scenario) {
        for workload in workloads.iter().filter(|workload| workload.rounds.is_none_or(|most| round < most)) {
            let mut fallen = Vec::new();
            for contender in &contenders {
                bench.check()?;
                let here = place(&workload.name);
                match workload.measure(&stage, contender, tree.source) {
                    Ok(values) => {
                        for (metric, value) in values {
                            bench.sample(&here, &contender.name, round, metric, value)?;
                        }
                    }
                    Err(error) => {
                        bench.failed(&here, &contender.name, &error)?;
                        fallen.push(contender.name.clone());
                    }
                }
            }
            contenders.retain(|contender| !fallen.contains(&contender.name));
        }
    }
    for contender in &contenders {
        bench.check()?;
        if let Err(error) = contender.still_itself() {
            bench.failed(&place(""), &contender.name, &error)?;
        }
    }
    Ok(())
}

/// Mounts every contender and compares what it shows with native ext4.
fn mount_all<'a>(
    bench: &mut Bench,
    scenario: &Scenario,
    stage: &Stage<'a>,
    place: &Place,
) -> Result<Vec<Mounted<'a>>> {
    let mut mounted = Vec::new();
    let mut expected: Option<Arc<Sum>> = None;
    let custom = scenario.custom.iter().map(|custom| (custom.name.as_str(), Some(custom)));
    for (name, custom) in scenario.contenders.iter().map(|name| (name.as_str(), None)).chain(custom) {
        bench.check()?;
        println!("  {} {name}: setting up", place.machine);
        let outcome = match custom {
            Some(custom) => stage.mount_custom(custom),
            None => stage.mount(name),
        };
        let contender = match outcome {
            Ok(Outcome::Mounted(contender)) => contender,
            Ok(Outcome::Skipped(why)) => {
                bench.skipped(place, name, &why)?;
                continue;
            }
            Err(error) => {
                bench.failed(place, name, &error)?;
                continue;
            }
        };
        let sum = stage.sum(&contender);
        let verdict = sum.and_then(|sum| match &expected {
            None => {
                expected = Some(Arc::new(sum));
                Ok(())
            }
            Some(expected) if expected.digest == sum.digest => Ok(()),
            Some(expected) => anyhow::bail!(
                "its content is not that of {NATIVE}: {} names and {} bytes with digest {}, instead of {} names and {} bytes with digest {}",
                sum.names, sum.bytes, sum.digest, expected.names, expected.bytes, expected.digest
            ),
        });
        match verdict {
            Ok(()) => mounted.push(contender),
            Err(error) => bench.failed(place, name, &error)?,
        }
    }
    bench.check()?;
    ensure!(!mounted.is_empty(), "no contender is left");
    expected.context("nothing was read")?;
    Ok(mounted)
}
