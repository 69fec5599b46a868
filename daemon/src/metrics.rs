//! What the data path counts and times, under the prefix `skimmer_` and in base units (seconds, bytes).

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::frontend::Mode;

/// Attach mode label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModeLabel {
    /// `fanotify` or `fscache`.
    pub mode: ModeValue,
}

/// Values of the `mode` label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum ModeValue {
    /// Pre-content events.
    fanotify,
    /// Cachefiles messages.
    fscache,
}

impl From<Mode> for ModeLabel {
    fn from(mode: Mode) -> Self {
        let mode = match mode {
            Mode::Fanotify => ModeValue::fanotify,
            Mode::Fscache => ModeValue::fscache,
        };
        Self { mode }
    }
}

/// Labels of `skimmer_reads_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReadLabels {
    /// Attach mode.
    pub mode: ModeValue,
    /// How it ended.
    pub result: ReadResult,
}

/// How a kernel request for data ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum ReadResult {
    /// Its bytes were on disk already.
    hit,
    /// Its bytes were fetched for it, or were being fetched.
    miss,
    /// It was refused.
    failed,
}

/// Labels of `skimmer_kernel_requests_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Attach mode.
    pub mode: ModeValue,
    /// What the kernel asked for.
    pub kind: RequestKind,
}

/// What the kernel asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum RequestKind {
    /// Bytes of a file.
    read,
    /// An fscache object to open.
    open,
    /// An fscache object to close.
    close,
    /// A message that made no sense.
    bad,
}

/// Labels of `skimmer_stage_seconds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StageLabel {
    /// The stage.
    pub stage: Stage,
}

/// The stages of a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Stage {
    /// A planned fetch waits for buffer memory.
    wait,
    /// One request goes through the engine.
    plan,
    /// A fetch, from its start to its first verified chunk.
    fetch,
    /// A fetch, from its first verified chunk to its end: streaming, decoding and checking go on together.
    verify,
    /// One write to a cache file.
    write,
    /// A kernel request, from its delivery to its answer.
    total,
}

/// Labels of `skimmer_fetches_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FetchLabels {
    /// How it ended.
    pub result: FetchResult,
}

/// How one attempt at a fetch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum FetchResult {
    /// Every chunk arrived and was verified.
    ok,
    /// It failed.
    failed,
    /// Nobody needed it any more.
    cancelled,
}

/// The counters and timers of the data path. Clones count into the same numbers.
#[derive(Clone)]
pub struct Metrics {
    /// Kernel requests for data that were answered.
    pub reads: Family<ReadLabels, Counter>,
    /// Everything the kernel asked: zero of these between two moments means it served itself.
    pub kernel_requests: Family<RequestLabels, Counter>,
    /// Time per stage.
    pub stages: Family<StageLabel, Histogram, fn() -> Histogram>,
    /// Attempts at fetches.
    pub fetches: Family<FetchLabels, Counter>,
    /// Attempts after the first of a fetch.
    pub retries: Counter,
    /// Requests made to sources for chunks; one may serve many fetches.
    pub source_requests: Counter,
    /// Bytes the kernel asked for; with the fetched ones this gives the amplification.
    pub asked_bytes: Family<ModeLabel, Counter>,
    /// Stored (compressed) bytes asked of sources.
    pub fetched_bytes: Counter,
    /// Bytes that were verified.
    pub verified_bytes: Counter,
    /// Bytes written to cache files.
    pub written_bytes: Family<ModeLabel, Counter>,
    /// Write operations.
    pub writes: Family<ModeLabel, Counter>,
    /// Write operations that failed.
    pub write_errors: Family<ModeLabel, Counter>,
    /// Bytes of buffer memory in use.
    pub in_flight_bytes: Gauge,
    /// Kernel requests that wait.
    pub pending_reads: Gauge,
    /// Kernel requests that traces and audit log were too slow for.
    pub lost_traces: Counter,
}

fn seconds() -> Histogram {
    // 10 us to about 40 s.
    Histogram::new(exponential_buckets(10e-6, 2.0, 22))
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            reads: Family::default(),
            kernel_requests: Family::default(),
            stages: Family::new_with_constructor(seconds as fn() -> Histogram),
            fetches: Family::default(),
            retries: Counter::default(),
            source_requests: Counter::default(),
            asked_bytes: Family::default(),
            fetched_bytes: Counter::default(),
            verified_bytes: Counter::default(),
            written_bytes: Family::default(),
            writes: Family::default(),
            write_errors: Family::default(),
            in_flight_bytes: Gauge::default(),
            pending_reads: Gauge::default(),
            lost_traces: Counter::default(),
        };
        // A counter of nothing yet still shows as zero, so that a test or an alert can tell it from a missing one.
        for stage in [Stage::wait, Stage::plan, Stage::fetch, Stage::verify, Stage::write, Stage::total] {
            drop(metrics.stages.get_or_create(&StageLabel { stage }));
        }
        for result in [FetchResult::ok, FetchResult::failed, FetchResult::cancelled] {
            drop(metrics.fetches.get_or_create(&FetchLabels { result }));
        }
        for mode in [Mode::Fanotify, Mode::Fscache] {
            let label = mode.into();
            let by_mode =
                [&metrics.asked_bytes, &metrics.written_bytes, &metrics.writes, &metrics.write_errors];
            by_mode.into_iter().for_each(|family| drop(family.get_or_create(&label)));
            let ModeLabel { mode } = label;
            for kind in [RequestKind::read, RequestKind::open, RequestKind::close, RequestKind::bad] {
                drop(metrics.kernel_requests.get_or_create(&RequestLabels { mode, kind }));
            }
            for result in [ReadResult::hit, ReadResult::miss, ReadResult::failed] {
                drop(metrics.reads.get_or_create(&ReadLabels { mode, result }));
            }
        }
        let r = registry.sub_registry_with_prefix("skimmer");
        r.register("reads", "Kernel requests for data, by attach mode and result", metrics.reads.clone());
        r.register(
            "kernel_requests",
            "Requests received from the kernel, by attach mode and kind",
            metrics.kernel_requests.clone(),
        );
        r.register_with_unit(
            "stage",
            "Time spent in each stage of a miss",
            Unit::Seconds,
            metrics.stages.clone(),
        );
        r.register("fetches", "Attempts at fetches, by result", metrics.fetches.clone());
        r.register(
            "source_requests",
            "Requests made to sources for chunks; one may serve many fetches",
            metrics.source_requests.clone(),
        );
        r.register("fetch_retries", "Attempts at fetches after the first", metrics.retries.clone());
        r.register_with_unit("asked", "Bytes the kernel asked for", Unit::Bytes, metrics.asked_bytes.clone());
        r.register_with_unit(
            "fetched",
            "Stored bytes asked of sources",
            Unit::Bytes,
            metrics.fetched_bytes.clone(),
        );
        r.register_with_unit(
            "verified",
            "Bytes decoded and verified",
            Unit::Bytes,
            metrics.verified_bytes.clone(),
        );
        r.register_with_unit(
            "written",
            "Bytes written to cache files",
            Unit::Bytes,
            metrics.written_bytes.clone(),
        );
        r.register("writes", "Write operations on cache files", metrics.writes.clone());
        r.register("write_errors", "Write operations that failed", metrics.write_errors.clone());
        r.register_with_unit(
            "in_flight",
            "Buffer memory in use",
            Unit::Bytes,
            metrics.in_flight_bytes.clone(),
        );
        r.register("pending_reads", "Kernel requests that wait", metrics.pending_reads.clone());
        r.register(
            "lost_traces",
            "Kernel requests that traces and audit log were too slow for",
            metrics.lost_traces.clone(),
        );
        metrics
    }

    /// Bytes written to cache files so far, of either mode.
    pub(crate) fn written(&self) -> u64 {
        let of = |mode: Mode| self.written_bytes.get_or_create(&mode.into()).get();
        of(Mode::Fanotify).saturating_add(of(Mode::Fscache))
    }

    pub(crate) fn read_done(&self, mode: Mode, result: ReadResult, took: Duration) {
        self.reads.get_or_create(&ReadLabels { mode: ModeLabel::from(mode).mode, result }).inc();
        self.stage(Stage::total, took);
    }

    pub(crate) fn request(&self, mode: Mode, kind: RequestKind) {
        self.kernel_requests.get_or_create(&RequestLabels { mode: ModeLabel::from(mode).mode, kind }).inc();
    }

    pub(crate) fn stage(&self, stage: Stage, took: Duration) {
        self.stages.get_or_create(&StageLabel { stage }).observe(took.as_secs_f64());
    }

    pub(crate) fn fetch(&self, result: FetchResult) {
        self.fetches.get_or_create(&FetchLabels { result }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_prefix_units_and_zeros() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.request(Mode::Fanotify, RequestKind::read);
        metrics.written_bytes.get_or_create(&Mode::Fscache.into()).inc_by(4096);
        metrics.read_done(Mode::Fscache, ReadResult::miss, Duration::from_millis(3));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"skimmer_kernel_requests_total{mode="fanotify",kind="read"} 1"#,
            r#"skimmer_kernel_requests_total{mode="fscache",kind="read"} 0"#,
            r#"skimmer_written_bytes_total{mode="fscache"} 4096"#,
            r#"skimmer_reads_total{mode="fscache",result="miss"} 1"#,
            r#"skimmer_stage_seconds_count{stage="total"} 1"#,
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
    }
}
