//! The report as one HTML file that needs nothing else.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::plot;
use super::table::{Page, Section};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;color:#222}\
h2{margin-top:2.5em;border-bottom:1px solid #ccc}table{border-collapse:collapse;margin:.5em 0 1em;font-size:14px}\
caption{white-space:nowrap;text-align:left;font-weight:600;padding:.4em 0}th,td{padding:.2em .8em;border-bottom:1px solid #e4e4e4;\
text-align:left;vertical-align:top}td+td{font-variant-numeric:tabular-nums}thead th{border-bottom:2px solid #999}\
.failed{color:#b00020;font-weight:600}.skipped{color:#666}svg{max-width:100%;height:auto}nav li{margin:.1em 0}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Escaped words, with `code` as such.
fn prose(text: &str) -> String {
    let mut parts = text.split('`');
    let mut html = escape(parts.next().unwrap_or_default());
    for (index, part) in parts.enumerate() {
        let tag = if index % 2 == 0 { "<code>" } else { "</code>" };
        html.push_str(tag);
        html.push_str(&escape(part));
    }
    html
}

/// The page with its plots.
pub(super) fn html(page: &Page, plots: &BTreeMap<String, String>) -> String {
    let mut text = String::new();
    let run = &page.run;
    let _ = write!(
        text,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Skimmer bench {}</title><style>{STYLE}\
         </style><h1>Skimmer bench</h1><table>",
        escape(&run.date)
    );
    for (name, value) in super::page::conditions(page) {
        let _ = write!(text, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
    }
    let _ = write!(text, "</table><p>{}</p><nav><ul>", escape(super::page::READING));
    for section in &page.sections {
        let about = &section.about;
        let (name, title) = (escape(&about.scenario), escape(&about.title));
        let _ = write!(text, "<li><a href=\"#{name}\">{name}</a>: {title}</li>");
    }
    text.push_str("</ul></nav>");
    for section in &page.sections {
        section_html(&mut text, section, plots);
    }
    text.push_str("</html>\n");
    text
}

fn section_html(text: &mut String, section: &Section, plots: &BTreeMap<String, String>) {
    let about = &section.about;
    let (name, title) = (escape(&about.scenario), escape(&about.title));
    let _ = write!(text, "<h2 id=\"{name}\">{title}</h2><p>{}</p>", prose(&about.about));
    for line in &section.failed {
        let _ = write!(text, "<p class=\"failed\">FAILED: {}</p>", escape(line));
    }
    for line in &section.skipped {
        let _ = write!(text, "<p class=\"skipped\">skipped: {}</p>", escape(line));
    }
    for (index, table) in section.tables.iter().enumerate() {
        let caption = format!("{}: {}", table.machine, table.caption(&about.reference));
        let _ = write!(text, "<table><caption>{}</caption>", escape(&caption));
        for (number, row) in table.rows().iter().enumerate() {
            text.push_str(if number == 0 { "<thead><tr>" } else { "<tr>" });
            for (column, cell) in row.iter().enumerate() {
                let tag = if number == 0 || column == 0 { "th" } else { "td" };
                let _ = write!(text, "<{tag}>{}</{tag}>", escape(cell));
            }
            text.push_str(if number == 0 { "</tr></thead>" } else { "</tr>" });
        }
        text.push_str("</table>");
        if let Some(svg) = plots.get(&plot::name(section, index)) {
            let _ = write!(text, "<figure>{svg}</figure>");
        }
    }
    let prefix = format!("{}-latency-", about.scenario);
    for (_, svg) in plots.iter().filter(|(name, _)| name.starts_with(&prefix)) {
        let _ = write!(text, "<figure>{svg}</figure>");
    }
}
