//! Samples in rows and columns: contenders against the cases of one metric, on one machine.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::record::{About, Better, Line, Run, Sample, Unit};
use crate::stats::{median, spread};

/// Everything that a report shows.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The conditions.
    pub run: Run,
    /// Scenario by scenario.
    pub sections: Vec<Section>,
    /// Seconds of the whole run; absent when it was cut short.
    pub seconds: Option<f64>,
}

/// One scenario.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Its words.
    pub about: About,
    /// In the order of measuring.
    pub tables: Vec<Table>,
    /// `machine, case, contender: why`.
    pub skipped: Vec<String>,
    /// As `skipped`.
    pub failed: Vec<String>,
}

/// One metric on one machine.
#[derive(Clone, Debug)]
pub struct Table {
    /// Where.
    pub machine: String,
    /// What.
    pub metric: String,
    /// The unit of absolute values.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
    /// Columns.
    pub cases: Vec<String>,
    /// Rows.
    pub contenders: Vec<String>,
    /// By contender, then case.
    pub cells: BTreeMap<(String, String), Cell>,
}

/// One contender in one case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// Median of the rounds.
    pub value: f64,
    /// [`spread`] of the rounds' values.
    pub value_spread: f64,
    /// Median over the rounds of how much better than the reference it was in the same round: above 1 is better,
    /// whichever way the metric counts. Absent where there is nothing to compare with.
    pub ratio: Option<f64>,
    /// [`spread`] of the rounds' ratios.
    pub ratio_spread: f64,
    /// Rounds.
    pub rounds: usize,
}

/// Sorts a run's lines.
pub fn page(lines: &[Line]) -> Page {
    let mut page = Page::default();
    for line in lines {
        match line {
            Line::Run(run) => page.run = run.clone(),
            Line::Scenario(about) => {
                page.sections.push(Section { about: about.clone(), ..Section::default() });
            }
            Line::End { seconds } => page.seconds = Some(*seconds),
            Line::Sample(_) => {}
            Line::Skipped(outcome) | Line::Failed(outcome) => {
                let Some(section) = page.sections.last_mut() else { continue };
                let place = [outcome.place.machine.as_str(), outcome.place.case.as_str()];
                let place: Vec<&str> = place.into_iter().filter(|part| !part.is_empty()).collect();
                let text = format!("{} ({}): {}", outcome.contender, place.join(", "), outcome.why);
                let list = match line {
                    Line::Failed(_) => &mut section.failed,
                    _ => &mut section.skipped,
                };
                if !list.contains(&text) {
                    list.push(text);
                }
            }
        }
    }
    let samples: Vec<&Sample> = lines
        .iter()
        .filter_map(|line| if let Line::Sample(sample) = line { Some(sample) } else { None })
        .collect();
    for section in &mut page.sections {
        section.tables = tables(&section.about, &samples);
    }
    page
}

fn tables(about: &About, samples: &[&Sample]) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    // Values by round, for each cell.
    let mut values: BTreeMap<(usize, &str, &str), BTreeMap<u32, f64>> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.place.scenario == about.scenario) {
        let machine = &sample.place.machine;
        let same = |table: &Table| table.machine == *machine && table.metric == sample.metric;
        let index = tables.iter().position(same).unwrap_or_else(|| {
            tables.push(Table {
                machine: machine.clone(),
                metric: sample.metric.clone(),
                unit: sample.unit,
                better: sample.better,
                cases: Vec::new(),
                contenders: Vec::new(),
                cells: BTreeMap::new(),
            });
            tables.len() - 1
        });
        let table = &mut tables[index];
        if !table.cases.contains(&sample.place.case) {
            table.cases.push(sample.place.case.clone());
        }
        if !table.contenders.contains(&sample.contender) {
            table.contenders.push(sample.contender.clone());
        }
        let cell = values.entry((index, sample.contender.as_str(), sample.place.case.as_str())).or_default();
        cell.insert(sample.round, sample.value);
    }
    for ((index, contender, case), rounds) in &values {
        let reference = values.get(&(*index, about.reference.as_str(), *case));
        let better = tables[*index].better;
        let ratios: Vec<f64> = rounds
            .iter()
            .filter_map(|(round, value)| ratio(*value, *reference?.get(round)?, better))
            .collect();
        let own: Vec<f64> = rounds.values().copied().collect();
        let cell = Cell {
            value: median(&own),
            value_spread: spread(&own),
            ratio: (!ratios.is_empty()).then(|| median(&ratios)),
            ratio_spread: spread(&ratios),
            rounds: own.len(),
        };
        tables[*index].cells.insert(((*contender).to_owned(), (*case).to_owned()), cell);
    }
    let rank = |name: &String| about.contenders.iter().position(|contender| contender == name);
    for table in &mut tables {
        table.contenders.sort_by_key(|name| rank(name).unwrap_or(usize::MAX));
    }
    tables
}

/// How much better `value` is than `reference`.
fn ratio(value: f64, reference: f64, better: Better) -> Option<f64> {
    let (above, below) = if better == Better::Lower { (reference, value) } else { (value, reference) };
    (above != 0.0 && below != 0.0).then(|| above / below)
}

/// A value with its unit, at a glance.
pub(crate) fn human(value: f64, unit: Unit) -> String {
    let scaled = |steps: &[(f64, &str)]| {
        let step = steps.iter().find(|(size, _)| value.abs() >= *size).or(steps.last());
        let (size, name) = step.copied().unwrap_or((1.0, ""));
        format!("{} {name}", digits(value / size))
    };
    let bytes = [(f64::from(1 << 30), "GiB"), (f64::from(1 << 20), "MiB"), (1024.0, "KiB"), (1.0, "B")];
    match unit {
        Unit::Seconds => scaled(&[(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]),
        Unit::Bytes => scaled(&bytes),
        Unit::BytesPerSecond => format!("{}/s", scaled(&bytes)),
        Unit::PerSecond => format!("{}/s", digits(value)),
        Unit::Count | Unit::Ratio => digits(value),
    }
}

/// Three significant digits; whole numbers whole.
fn digits(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

impl Cell {
    /// `0.97 ±2 % (812 MiB/s)`; the ratio is left out where there is none, the value where it says nothing more.
    pub(crate) fn words(&self, unit: Unit) -> String {
        let percent = |spread: f64| format!("±{:.0} %", spread * 100.0);
        let value = human(self.value, unit);
        match self.ratio {
            Some(ratio) if self.rounds > 1 => {
                format!("{} {} ({value})", digits(ratio), percent(self.ratio_spread))
            }
            Some(ratio) => format!("{} ({value})", digits(ratio)),
            None if self.rounds > 1 => format!("{value} {}", percent(self.value_spread)),
            None => value,
        }
    }
}

impl Table {
    /// `time: s, above 1 is better` and the like.
    pub(crate) fn caption(&self, reference: &str) -> String {
        let way = match self.better {
            Better::Lower => "less is better",
            Better::Higher => "more is better",
            Better::Neither => "a condition",
        };
        if self.cells.values().any(|cell| cell.ratio.is_some()) {
            format!("{}, {way}; ratio to {reference}, above 1 is better", self.metric)
        } else {
            format!("{}, {way}", self.metric)
        }
    }

    /// Rows of text: header first.
    pub(crate) fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = vec![vec![String::new()]];
        rows[0].extend(self.cases.iter().cloned());
        for contender in &self.contenders {
            let mut row = vec![contender.clone()];
            for case in &self.cases {
                let cell = self.cells.get(&(contender.clone(), case.clone()));
                row.push(cell.map_or_else(|| "–".to_owned(), |cell| cell.words(self.unit)));
            }
            rows.push(row);
        }
        rows
    }
}

/// A Markdown table: the first row is its header.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for column in 0..columns {
            let cell = row.get(column).map_or("", String::as_str);
            let _ = write!(text, "| {cell:width$} ", width = width(column));
        }
        text.push_str("|\n");
        if index == 0 {
            for column in 0..columns {
                let _ = write!(text, "|{:-<width$}", "", width = width(column) + 2);
            }
            text.push_str("|\n");
        }
    }
    text
}

/// The whole page as text, for a terminal.
pub fn text(page: &Page) -> String {
    let mut text = String::new();
    for section in &page.sections {
        let _ = writeln!(text, "\n{}: {}", section.about.scenario, section.about.title);
        for table in &section.tables {
            let _ = writeln!(text, "\n{}: {}", table.machine, table.caption(&section.about.reference));
            text.push_str(&markdown(&table.rows()));
        }
        for line in &section.skipped {
            let _ = writeln!(text, "skipped: {line}");
        }
        for line in &section.failed {
            let _ = writeln!(text, "FAILED: {line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Outcome, Place};

    fn sample(contender: &str, round: u32, value: f64) -> Line {
        let place = Place { scenario: "s".into(), machine: "host".into(), case: "tar".into() };
        let (metric, contender) = ("time".to_owned(), contender.to_owned());
        let (unit, better) = (Unit::Seconds, Better::Lower);
        Line::Sample(Sample { place, contender, round, metric, unit, better, value })
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let about = About {
            scenario: "s".into(),
            reference: "ext4".into(),
            contenders: vec!["ext4".into(), "other".into()],
            ..About::default()
        };
        let skipped = Outcome {
            place: Place { scenario: "s".into(), machine: "host".into(), case: String::new() },
            contender: "nydusd".into(),
            why: "not installed".into(),
        };
        let lines = vec![
            Line::Scenario(about),
            sample("other", 0, 4.0),
            sample("ext4", 0, 2.0),
            sample("ext4", 1, 4.0),
            sample("other", 1, 8.0),
            Line::Skipped(skipped),
        ];
        let page = page(&lines);
        let table = &page.sections[0].tables[0];
        assert_eq!(table.contenders, ["ext4", "other"]);
        let cell = table.cells[&("other".to_owned(), "tar".to_owned())];
        // Twice as slow in both rounds, although the machine was slower in one.
        assert_eq!((cell.ratio, cell.ratio_spread, cell.value), (Some(0.5), 0.0, 6.0));
        let text = text(&page);
        assert!(text.contains("0.50 ±0 % (6 s)"), "{text}");
        assert!(text.contains("skipped: nydusd (host): not installed"), "{text}");
    }

    #[test]
    fn values_are_shown_in_fitting_units() {
        assert_eq!(human(0.0123, Unit::Seconds), "12.3 ms");
        assert_eq!(human(3.5e8, Unit::BytesPerSecond), "334 MiB/s");
        assert_eq!(human(0.0, Unit::Count), "0");
        assert_eq!(human(1e-7, Unit::Seconds), "0.10 µs");
    }
}
