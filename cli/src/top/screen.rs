//! The screen.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Gauge, Paragraph, Row, Sparkline, Table};

use super::{Rates, Sample};
use crate::output::bytes;

/// Moments that the curves go back.
const HISTORY: usize = 240;

/// What was seen so far.
#[derive(Default)]
pub(crate) struct Screen {
    fetched: VecDeque<u64>,
    misses: VecDeque<u64>,
}

impl Screen {
    /// Adds what happened last.
    pub(crate) fn add(&mut self, rates: &Rates) {
        for (history, value) in [(&mut self.fetched, rates.fetched), (&mut self.misses, rates.misses)] {
            history.push_front(whole(value));
            history.truncate(HISTORY);
        }
    }
}

/// Draws one moment.
pub(crate) fn draw(frame: &mut Frame<'_>, screen: &Screen, sample: &Sample, rates: &Rates) {
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Min(4),
        Constraint::Length(1),
    ]);
    let [head, numbers, curves, images, foot] = areas.areas(frame.area());
    title(frame, head, sample);
    let [reads, moved, own] = Layout::horizontal([Constraint::Ratio(1, 3); 3]).areas(numbers);
    let list = |frame: &mut Frame<'_>, area, title: &'static str, rows: Vec<(&'static str, String)>| {
        let lines: Vec<Line<'_>> = rows
            .into_iter()
            .map(|(name, value)| Line::from(vec![Span::raw(format!("{name:<14}")), Span::from(value).bold()]))
            .collect();
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), area);
    };
    list(
        frame,
        reads,
        "reads",
        vec![
            ("misses", format!("{:.1}/s", rates.misses)),
            ("hits", format!("{:.1}/s", rates.hits)),
            ("failed", format!("{:.0}", rates.failed)),
            ("p50", wait(rates.p50)),
            ("p99", wait(rates.p99)),
        ],
    );
    let amplification = rates.amplification.map_or_else(|| "-".to_owned(), |times| format!("{times:.2}"));
    list(
        frame,
        moved,
        "bytes",
        vec![
            ("asked", format!("{}/s", bytes(whole(rates.asked)))),
            ("fetched", format!("{}/s", bytes(whole(rates.fetched)))),
            ("requests", format!("{:.1}/s", rates.source_requests)),
            ("written", format!("{}/s", bytes(whole(rates.written)))),
            ("amplification", amplification),
        ],
    );
    let waiting: u64 = sample.status.blobs.iter().map(|blob| blob.pending_reads).sum();
    let fetches: u64 = sample.status.blobs.iter().map(|blob| blob.fetches).sum();
    list(
        frame,
        own,
        "daemon",
        vec![
            ("waiting", format!("{waiting} reads")),
            ("flights", fetches.to_string()),
            ("processor", format!("{:.0} %", rates.cpu * 100.0)),
            ("memory", bytes(whole(rates.resident))),
        ],
    );
    let [fetched, misses, buffer] = Layout::horizontal([
        Constraint::Percentage(40),
        Constraint::Percentage(35),
        Constraint::Percentage(25),
    ])
    .areas(curves);
    let curve = |frame: &mut Frame<'_>, area, title: &'static str, data: &VecDeque<u64>, color| {
        let line = Sparkline::default()
            .data(data.iter().copied())
            .direction(ratatui::widgets::RenderDirection::RightToLeft)
            .style(Style::new().fg(color))
            .block(Block::bordered().title(title));
        frame.render_widget(line, area);
    };
    curve(frame, fetched, "fetched bytes", &screen.fetched, Color::Cyan);
    curve(frame, misses, "misses", &screen.misses, Color::Yellow);
    let (used, all) = (sample.status.buffer_used_bytes, sample.status.buffer_bytes);
    let gauge = Gauge::default()
        .ratio(share(used, all))
        .label(format!("{} of {}", bytes(used), bytes(all)))
        .gauge_style(Style::new().fg(Color::Green))
        .block(Block::bordered().title("buffers"));
    frame.render_widget(gauge, buffer);
    table(frame, images, rates);
    let keys = format!("q quits; {:.1} s between the moments", rates.seconds);
    frame.render_widget(Line::from(keys).style(Style::new().add_modifier(Modifier::DIM)), foot);
}

fn title(frame: &mut Frame<'_>, area: Rect, sample: &Sample) {
    let status = &sample.status;
    let minutes = status.uptime_s / 60;
    let mut spans = vec![
        Span::from(format!("skimmerd {}", status.version)).bold(),
        Span::raw(format!(" up {}:{:02}:{:02}  ", minutes / 60, minutes % 60, status.uptime_s % 60)),
    ];
    for mode in &status.modes {
        let style = match mode.usable {
            true => Style::new().fg(Color::Green),
            false => Style::new().fg(Color::DarkGray).add_modifier(Modifier::CROSSED_OUT),
        };
        spans.extend([Span::styled(mode.mode.name(), style), Span::raw(" ")]);
    }
    if !status.keeper.connected {
        spans.push(Span::styled("no keeper ", Style::new().fg(Color::Red)));
    }
    let mounts = status.mounts.len();
    spans.push(Span::raw(format!("  {mounts} mount{}", if mounts == 1 { "" } else { "s" })));
    frame.render_widget(Line::from(spans), area);
}

fn table(frame: &mut Frame<'_>, area: Rect, rates: &Rates) {
    let head = Row::new(["image", "mode", "mounts", "cached", "", "waiting", "requests"]);
    let rows = rates.images.iter().map(|image| {
        let cached = share(image.ready, image.referenced);
        let style = match (&image.fault, image.waiting) {
            (Some(_), _) => Style::new().fg(Color::Red),
            (None, 1..) => Style::new().fg(Color::Yellow),
            (None, 0) => Style::new(),
        };
        Row::new([
            Cell::from(
                image
                    .fault
                    .as_ref()
                    .map_or_else(|| image.name.clone(), |fault| format!("{}: {fault}", image.name)),
            ),
            Cell::from(image.mode.name()),
            Cell::from(image.mounts.to_string()),
            Cell::from(format!("{} of {}", bytes(image.ready), bytes(image.referenced))),
            Cell::from(format!("{:.0} %", (cached * 100.0).floor())),
            Cell::from(image.waiting.to_string()),
            Cell::from(format!("{:.1}/s", image.reads)),
        ])
        .style(style)
    });
    let widths = [
        Constraint::Min(24),
        Constraint::Length(8),
        Constraint::Length(6),
        Constraint::Length(26),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Length(9),
    ];
    let table = Table::new(rows, widths)
        .header(head.style(Style::new().add_modifier(Modifier::BOLD)))
        .block(Block::bordered().title("images"));
    frame.render_widget(table, area);
}

/// A rate without its fraction; sizes beyond 2^53 do not come up.
fn whole(rate: f64) -> u64 {
    format!("{:.0}", rate.max(0.0)).parse().unwrap_or(u64::MAX)
}

fn share(part: u64, whole: u64) -> f64 {
    let thousandths = part.saturating_mul(1000).checked_div(whole).unwrap_or(1000).min(1000);
    f64::from(u32::try_from(thousandths).unwrap_or(1000)) / 1000.0
}

fn wait(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".to_owned(),
        Some(bound) if bound.is_infinite() => "more than 20 s".to_owned(),
        Some(bound) if bound < 0.001 => format!("{:.0} us", bound * 1e6),
        Some(bound) if bound < 1.0 => format!("{:.1} ms", bound * 1e3),
        Some(bound) => format!("{bound:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::super::sample::tests::sample;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn drawn(width: u16, height: u16) -> String {
        let (before, now) = (sample(100, 0), sample(300, 2));
        let rates = now.since(&before);
        let mut screen = Screen::default();
        screen.add(&rates);
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &screen, &now, &rates)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn everything_is_on_the_screen() {
        let text = drawn(110, 24);
        for part in [
            "skimmerd 1.2.3 up 0:01:30",
            "misses        100.0/s",
            "amplification 2.00",
            "p50           1.0 ms",
            "p99           20.0 ms",
            "16.00 MiB of 64.00 MiB",
            "registry/app:1",
            "fanotify",
            "250 B of 1000 B",
            "25 %",
            "2 reads",
        ] {
            assert!(text.contains(part), "no `{part}` in\n{text}");
        }
    }

    #[test]
    fn small_screens_do_no_harm() {
        for (width, height) in [(1, 1), (20, 5), (80, 3), (40, 40)] {
            drawn(width, height);
        }
    }
}
