//! `skimmer recording` and `skimmer report`: what was read and fetched through a mount, as data and as a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use skimmer_client::{RecordedFetch, RecordedRead, Recording};

use crate::{Global, daemon, output};

/// Arguments of `skimmer recording`.
#[derive(clap::Args)]
pub(crate) struct Show {
    /// Where the image is mounted, with --record.
    target: PathBuf,
    /// Write to this file instead of standard output.
    #[arg(long, short)]
    output: Option<PathBuf>,
    #[command(flatten)]
    daemon: daemon::Daemon,
}

/// Arguments of `skimmer report`.
#[derive(clap::Args)]
pub(crate) struct Report {
    /// A recording, as `skimmer recording` writes it.
    recording: PathBuf,
    /// The HTML file to write [default: the recording's name with .html].
    #[arg(long, short)]
    output: Option<PathBuf>,
}

pub(crate) async fn show(options: Show) -> Result<()> {
    let target = options.target.canonicalize();
    let target = target.with_context(|| format!("no such directory: {}", options.target.display()))?;
    let recording = options.daemon.connect().await?.recording(&target).await?;
    match &options.output {
        None => output::json(&recording),
        Some(path) => {
            let mut text = serde_json::to_string_pretty(&recording)?;
            text.push('\n');
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        }
    }
}

/// Reads a recording from a file.
pub(crate) fn load(path: &std::path::Path) -> Result<Recording> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let recording: Recording = serde_json::from_str(&text)
        .with_context(|| format!("{} is no recording of `skimmer recording`", path.display()))?;
    ensure!(recording.version == 1, "{}: version {} is not known, only 1", path.display(), recording.version);
    Ok(recording)
}

/// What a recording comes to.
#[derive(serde::Serialize)]
struct Summary {
    image: String,
    mode: String,
    seconds: f64,
    reads: usize,
    read_bytes: u64,
    failed_reads: usize,
    waited_seconds: f64,
    longest_wait_seconds: f64,
    fetches: usize,
    requests: usize,
    stored_bytes: u64,
    device_bytes: u64,
}

#[allow(clippy::cast_precision_loss)] // microseconds of a recording: far below 2^52
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

fn summary(recording: &Recording) -> Summary {
    let (reads, fetches) = (&recording.reads, &recording.fetches);
    let ends = reads.iter().map(|read| read.at_us + read.took_us);
    let end = ends.chain(fetches.iter().map(|fetch| fetch.at_us + fetch.took_us)).max().unwrap_or(0);
    Summary {
        image: recording.image.clone(),
        mode: recording.mode.to_string(),
        seconds: seconds(end),
        reads: reads.len(),
        read_bytes: reads.iter().map(|read| read.length).sum(),
        failed_reads: reads.iter().filter(|read| read.failed).count(),
        waited_seconds: seconds(covered(reads)),
        longest_wait_seconds: seconds(reads.iter().map(|read| read.took_us).max().unwrap_or(0)),
        fetches: fetches.len(),
        requests: fetches.iter().filter(|fetch| fetch.request).count(),
        stored_bytes: fetches.iter().map(|fetch| fetch.stored_bytes).sum(),
        device_bytes: fetches.iter().map(|fetch| fetch.length).sum(),
    }
}

/// Microseconds in which at least one read waited. Reads are in the order of their beginning.
fn covered(reads: &[RecordedRead]) -> u64 {
    let (mut covered, mut until) = (0, 0);
    for read in reads {
        let end = read.at_us + read.took_us;
        covered += end.saturating_sub(read.at_us.max(until));
        until = until.max(end);
    }
    covered
}

pub(crate) fn report(options: &Report, global: &Global) -> Result<()> {
    let recording = load(&options.recording)?;
    let path = options.output.clone().unwrap_or_else(|| options.recording.with_extension("html"));
    let summary = summary(&recording);
    fs::write(&path, page(&recording, &summary))
        .with_context(|| format!("cannot write {}", path.display()))?;
    if global.json {
        return output::json(&summary);
    }
    if !global.quiet {
        output::line(&format!(
            "{}: {:.2} s; {} reads of {}, waited {:.2} s, at most {:.3} s; {} requests for {}; see {}",
            summary.image,
            summary.seconds,
            summary.reads,
            output::bytes(summary.read_bytes),
            summary.waited_seconds,
            summary.longest_wait_seconds,
            summary.requests,
            output::bytes(summary.stored_bytes),
            path.display()
        ))?;
    }
    Ok(())
}

/// Width of the plots, and height of a blob's, in pixels.
const WIDTH: u64 = 1100;
const HEIGHT: u64 = 260;

/// One plot per blob: time to the right, place on the device upwards; fetches are boxes, waits are lines.
fn page(recording: &Recording, summary: &Summary) -> String {
    let mut html = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Skimmer: a cold start</title><style>\
         body{font:15px sans-serif;margin:2em auto;max-width:1200px;color:#222}td,th{padding:2px 12px 2px 0;\
         text-align:left}svg{border:1px solid #ccc;display:block;margin:.4em 0 1.4em}.demand{fill:#d55e00}\
         .ahead{fill:#0072b2}.bad{fill:#c00}.wait{stroke:#000;stroke-width:1.6}text{font:11px sans-serif;fill:#555}\
         </style>",
    );
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = html.write_fmt(text); // writing to a string does not fail
    };
    put(format_args!("<h1>{}</h1><table>", escape(&summary.image)));
    for (name, value) in [
        ("attach mode", summary.mode.clone()),
        ("time covered", format!("{:.3} s", summary.seconds)),
        (
            "reads that came to skimmerd",
            format!("{} of {}", summary.reads, output::bytes(summary.read_bytes)),
        ),
        ("some read waited", format!("{:.3} s", summary.waited_seconds)),
        ("longest wait", format!("{:.3} s", summary.longest_wait_seconds)),
        ("reads failed", summary.failed_reads.to_string()),
        ("requests to the source", summary.requests.to_string()),
        ("fetched, as stored", output::bytes(summary.stored_bytes)),
        ("fetched, on the device", output::bytes(summary.device_bytes)),
    ] {
        put(format_args!("<tr><th>{name}</th><td>{}</td></tr>", escape(&value)));
    }
    put(format_args!(
        "</table><p>Time runs to the right, the place on the blob's device upwards. Boxes are fetches: \
         <span style=\"color:#d55e00\">orange</span> a read waited for them, <span style=\"color:#0072b2\">blue</span> \
         ahead of need, <span style=\"color:#c00\">red</span> failed. Black lines are reads that wait.</p>"
    ));
    if recording.cut {
        put(format_args!("<p><b>There was more than a recording keeps; the rest is missing.</b></p>"));
    }
    let span = recording.reads.iter().map(|read| read.at_us + read.took_us);
    let span = span.chain(recording.fetches.iter().map(|fetch| fetch.at_us + fetch.took_us)).max();
    let span = span.unwrap_or(0).max(1);
    for (index, blob) in recording.blobs.iter().enumerate() {
        let reads: Vec<&RecordedRead> = recording.reads.iter().filter(|read| read.blob == index).collect();
        let fetches: Vec<&RecordedFetch> =
            recording.fetches.iter().filter(|fetch| fetch.blob == index).collect();
        let ends = reads.iter().map(|read| read.offset + read.length);
        let end = ends.chain(fetches.iter().map(|fetch| fetch.offset + fetch.length)).max();
        let Some(end) = end.filter(|end| *end > 0) else { continue };
        let name: String = blob.chars().take(12).collect();
        put(format_args!(
            "<h3>blob {}: {} reads, {} fetches</h3><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\">",
            escape(&name),
            reads.len(),
            fetches.len()
        ));
        let x = |us: u64| scale(us, span, WIDTH);
        let y = |byte: u64| HEIGHT - scale(byte, end, HEIGHT);
        for fetch in &fetches {
            let class = match (fetch.failed, fetch.demand) {
                (true, _) => "bad",
                (_, true) => "demand",
                _ => "ahead",
            };
            let (left, top) = (x(fetch.at_us), y(fetch.offset + fetch.length));
            let width = x(fetch.at_us + fetch.took_us).saturating_sub(left).max(1);
            let height = y(fetch.offset).saturating_sub(top).max(1);
            put(format_args!(
                "<rect class=\"{class}\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" \
                 fill-opacity=\".45\"><title>{} at {:.3} s, {:.3} s, {}</title></rect>",
                output::bytes(fetch.length),
                seconds(fetch.at_us),
                seconds(fetch.took_us),
                if fetch.request { "a request of its own" } else { "on the request before it" }
            ));
        }
        for read in &reads {
            let (left, at) = (x(read.at_us), y(read.offset + read.length / 2));
            let right = x(read.at_us + read.took_us).max(left + 1);
            put(format_args!(
                "<line class=\"wait\" x1=\"{left}\" y1=\"{at}\" x2=\"{right}\" y2=\"{at}\"><title>{} at {:.3} s \
                 waited {:.3} s</title></line>",
                output::bytes(read.length),
                seconds(read.at_us),
                seconds(read.took_us)
            ));
        }
        put(format_args!(
            "<text x=\"4\" y=\"12\">{}</text><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{:.2} s</text></svg>",
            output::bytes(end),
            WIDTH - 4,
            HEIGHT - 4,
            seconds(span)
        ));
    }
    html.push_str("</html>\n");
    html
}

fn scale(value: u64, of: u64, to: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(to) / u128::from(of.max(1))).unwrap_or(to)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use skimmer_client::{AttachMode, Record};

    #[test]
    fn a_page_is_whole_and_escapes_names() {
        let read =
            |at_us, took_us| RecordedRead { at_us, blob: 0, offset: 0, length: 4096, took_us, failed: false };
        let recording = Recording {
            version: 1,
            image: "<b>".into(),
            bootstrap: String::new(),
            mode: AttachMode::Fanotify,
            record: Record::Events,
            cut: true,
            blobs: vec!["ab".into(), "unread".into()],
            reads: vec![read(0, 10), read(5, 10), read(40, 2)],
            fetches: vec![],
        };
        assert_eq!(covered(&recording.reads), 17);
        let page = page(&recording, &summary(&recording));
        assert!(page.contains("&lt;b&gt;") && !page.contains("<b>&"), "{page}");
        assert!(page.contains("blob ab") && !page.contains("unread") && page.ends_with("</html>\n"));
    }
}
