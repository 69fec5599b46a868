//! A run: scenarios one after the other, their results written down as they come.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::record::{Better, Line, Outcome, Place, Run, Sample, Unit};
use crate::scenario::{Kind, Scenario};
use crate::{build, cold, density, warm};

/// What to run, and with which programs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Quick: the scenarios marked so, with fewer rounds and machines.
    pub quick: bool,
    /// Rounds instead of those that scenarios state.
    pub rounds: Option<u32>,
    /// Machines instead of those that scenarios state.
    pub machines: Option<Vec<String>>,
    /// The folder of `skimmer`, `skimmerd`, `skimmer-keeper`, `skimmer-probe` and `skimmer-agent`.
    pub programs: PathBuf,
    /// Other builds of Skimmer by contender: name and folder of programs. They attach by fanotify.
    pub variants: Vec<(String, PathBuf)>,
    /// Where `results.jsonl` goes.
    pub results: PathBuf,
}

/// A run that goes on.
pub struct Bench {
    options: Options,
    file: File,
    lines: Vec<Line>,
    started: Instant,
    interrupted: Arc<AtomicBool>,
    failed: bool,
}

impl Bench {
    /// Begins a run. `interrupted` is set by the program's signal handler.
    ///
    /// # Errors
    /// The results cannot be written.
    pub fn new(options: Options, run: Run, interrupted: Arc<AtomicBool>) -> Result<Self> {
        let results = &options.results;
        fs::create_dir_all(results).with_context(|| format!("cannot make {}", results.display()))?;
        let path = results.join("results.jsonl");
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let started = Instant::now();
        let mut bench = Bench { options, file, lines: Vec::new(), started, interrupted, failed: false };
        bench.write(Line::Run(run))?;
        Ok(bench)
    }

    /// Runs scenarios to their end and gives every line of the results.
    ///
    /// # Errors
    /// A scenario cannot be set up, a contender gave a wrong result (after the rest has run), or the run was
    /// interrupted.
    pub fn run(mut self, scenarios: &[Scenario]) -> Result<Vec<Line>> {
        for scenario in scenarios {
            self.check()?;
            println!("== {}: {}", scenario.name, scenario.title);
            self.write(Line::Scenario(scenario.about()))?;
            let machines = match (&self.options.machines, &scenario.quick_machines) {
                (Some(machines), _) => machines,
                (None, Some(machines)) if self.options.quick => machines,
                _ => &scenario.machines,
            };
            for machine in machines.clone() {
                self.check()?;
                match scenario.kind() {
                    Kind::Warm(spec) => warm::run(&mut self, scenario, spec, &machine),
                    Kind::Cold(spec) => cold::run(&mut self, scenario, spec, &machine),
                    Kind::Density(spec) => density::run(&mut self, scenario, spec, &machine),
                    Kind::Build(spec) => build::run(&mut self, scenario, spec, &machine),
                }
                .with_context(|| format!("scenario {} on {machine}", scenario.name))?;
            }
        }
        let seconds = self.started.elapsed().as_secs_f64();
        self.write(Line::End { seconds })?;
        if self.failed {
            bail!("a contender failed: see the lines above");
        }
        Ok(self.lines)
    }

    /// Whether this is a quick run.
    pub fn quick(&self) -> bool {
        self.options.quick
    }

    /// How many rounds `scenario` gets.
    pub fn rounds(&self, scenario: &Scenario) -> u32 {
        let quick = scenario.quick_rounds.filter(|_| self.options.quick);
        self.options.rounds.or(quick).unwrap_or(scenario.rounds)
    }

    /// One of our programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.options.programs.join(name)
    }

    /// Other builds of Skimmer: contender and folder of programs.
    pub fn variants(&self) -> &[(String, PathBuf)] {
        &self.options.variants
    }

    /// Fails once the run was interrupted: to be asked between steps. Everything made so far must go when dropped.
    ///
    /// # Errors
    /// It was interrupted.
    pub fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Writes a value down.
    ///
    /// # Errors
    /// The results cannot be written.
    pub fn sample(
        &mut self,
        place: &Place,
        contender: &str,
        round: u32,
        metric: &str,
        (value, unit, better): (f64, Unit, Better),
    ) -> Result<()> {
        println!("  {} {} {contender} #{round}: {metric} {value:.6} {unit:?}", place.machine, place.case);
        let (contender, metric) = (contender.to_owned(), metric.to_owned());
        self.write(Line::Sample(Sample {
            place: place.clone(),
            contender,
            round,
            metric,
            unit,
            better,
            value,
        }))
    }

    /// Writes down that a contender does not take part.
    ///
    /// # Errors
    /// The results cannot be written.
    pub fn skipped(&mut self, place: &Place, contender: &str, why: &str) -> Result<()> {
        println!("  {} {} {contender}: skipped: {why}", place.machine, place.case);
        let (contender, why) = (contender.to_owned(), why.to_owned());
        self.write(Line::Skipped(Outcome { place: place.clone(), contender, why }))
    }

    /// Writes down that a contender gave a wrong result or none; the run goes on and fails at its end.
    ///
    /// # Errors
    /// The results cannot be written, or the run was interrupted: then that is the reason.
    pub fn failed(&mut self, place: &Place, contender: &str, why: &anyhow::Error) -> Result<()> {
        self.check()?;
        self.failed = true;
        println!("  {} {} {contender}: FAILED: {why:#}", place.machine, place.case);
        let (contender, why) = (contender.to_owned(), format!("{why:#}"));
        self.write(Line::Failed(Outcome { place: place.clone(), contender, why }))
    }

    fn write(&mut self, line: Line) -> Result<()> {
        let mut text = serde_json::to_string(&line).context("a result cannot be written as JSON")?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).context("cannot write results.jsonl")?;
        self.lines.push(line);
        Ok(())
    }
}
