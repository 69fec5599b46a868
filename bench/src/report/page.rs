//! `docs/performance.md`: the same tables for readers of the repository.

use std::fmt::Write;

use super::table::{Page, Section, markdown};

/// How to read the tables.
pub(super) const READING: &str = "Every number is a median over rounds in which all contenders ran one after the other \
on the same machine. The first number of a cell is the ratio to the reference, taken round by round and turned so that \
above 1 is better, whether the metric counts time or speed; ± is half the distance between the best and the worst round, \
relative to the median; the absolute value in brackets holds for this machine only.";

/// The conditions of the run, name and value.
pub(super) fn conditions(page: &Page) -> Vec<(&'static str, String)> {
    let run = &page.run;
    let length = match page.seconds {
        Some(seconds) => format!("{:.0} min", seconds / 60.0),
        None => "cut short: what follows is not complete".to_owned(),
    };
    let mut rows = machine(page);
    rows.splice(0..0, [("date", run.date.clone()), ("revision", run.revision.clone())]);
    rows.push(("command", run.command.clone()));
    rows.push(("length", length));
    rows
}

/// What all runs of a document have in common.
fn machine(page: &Page) -> Vec<(&'static str, String)> {
    let run = &page.run;
    vec![
        ("machine", format!("{}, {} MiB, Linux {}", run.processor, run.memory_mib, run.kernel)),
        ("guests", "QEMU without hardware acceleration (TCG): only ratios mean anything there".to_owned()),
        ("links", format!("emulated in user space, TCP with {} congestion control", run.congestion)),
        ("build", format!("profile {}", run.profile)),
    ]
}

/// The document, of the last run of each scenario.
pub fn performance(pages: &[Page]) -> String {
    let mut text = String::from(
        "# Performance\n\nWritten by `cargo xtask docs` from `docs/performance/*.jsonl`, which `cargo xtask bench --docs` \
         writes, one file a scenario. No figure here is typed.\n\n",
    );
    let _ = writeln!(text, "{READING}\n");
    let rows = pages.first().map(machine).unwrap_or_default().into_iter();
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    let rows: Vec<Vec<String>> = std::iter::once(vec![String::new(), String::new()]).chain(rows).collect();
    text.push_str(&markdown(&rows));
    for page in pages {
        for section in &page.sections {
            section_markdown(&mut text, page, section);
        }
    }
    text
}

fn section_markdown(text: &mut String, page: &Page, section: &Section) {
    let (about, run) = (&section.about, &page.run);
    let _ = write!(text, "\n## {}\n\n{}\n\n", about.title, about.about.trim());
    let (name, quick) = (&about.scenario, if run.quick { " --quick" } else { "" });
    let _ = writeln!(
        text,
        "Measured {} at revision {}. Reproduce: `cargo xtask bench {name}{quick}`.",
        run.date, run.revision
    );
    for table in &section.tables {
        let _ = write!(text, "\n**{}**: {}\n\n", table.machine, table.caption(&about.reference));
        text.push_str(&markdown(&table.rows()));
    }
    for (word, lines) in [("Failed", &section.failed), ("Skipped", &section.skipped)] {
        if !lines.is_empty() {
            let _ = write!(text, "\n{word}:\n\n");
            for line in lines {
                let _ = writeln!(text, "- {}", line.lines().next().unwrap_or_default());
            }
        }
    }
}
