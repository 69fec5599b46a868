//! Reports: what a run's lines say, as tables and plots.

mod html;
mod page;
mod plot;
mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::record::Line;

pub use page::performance;
pub use table::{Cell, Page, Section, Table, markdown, page, text};

/// Reads the lines of a run.
///
/// # Errors
/// The file cannot be read, or a line is not one of ours: the message gives its number.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let lines = text.lines().enumerate();
    lines
        .map(|(index, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), index + 1))
        })
        .collect()
}

/// Writes `report.html` and one SVG file a plot into `directory`; gives the path of the report.
///
/// # Errors
/// A file cannot be written or a plot cannot be drawn.
pub fn write(lines: &[Line], directory: &Path) -> Result<PathBuf> {
    let page = page(lines);
    let plots = plot::all(&page)?;
    for (name, svg) in &plots {
        let path = directory.join(format!("{name}.svg"));
        std::fs::write(&path, svg).with_context(|| format!("{}", path.display()))?;
    }
    let path = directory.join("report.html");
    std::fs::write(&path, html::html(&page, &plots)).with_context(|| format!("{}", path.display()))?;
    Ok(path)
}
