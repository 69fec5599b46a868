//! What the daemon counted at two moments, and what happened between them.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use skimmer_client::{AttachMode, StatusReport};

/// The daemon at one moment.
pub(crate) struct Sample {
    at: Instant,
    pub(crate) status: StatusReport,
    counters: BTreeMap<String, f64>,
}

/// What happened between two moments.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Rates {
    /// Seconds between them.
    pub(crate) seconds: f64,
    /// Requests of the kernel a second.
    pub(crate) requests: f64,
    /// Reads a second that waited for bytes.
    pub(crate) misses: f64,
    /// Reads a second whose bytes were there.
    pub(crate) hits: f64,
    /// Reads that failed, in all of the time.
    pub(crate) failed: f64,
    /// Bytes a second that the kernel asked for.
    pub(crate) asked: f64,
    /// Stored bytes a second that were asked of sources.
    pub(crate) fetched: f64,
    /// Bytes a second that were written to the cache.
    pub(crate) written: f64,
    /// Requests a second to sources.
    pub(crate) source_requests: f64,
    /// Written bytes for each byte that was asked for.
    pub(crate) amplification: Option<f64>,
    /// Seconds that half of the reads took at most; a bound of a histogram's bucket.
    pub(crate) p50: Option<f64>,
    /// The same for 99 of 100.
    pub(crate) p99: Option<f64>,
    /// Share of a processor.
    pub(crate) cpu: f64,
    /// Resident memory, bytes.
    pub(crate) resident: f64,
    /// Images with what changed of them, most active first.
    pub(crate) images: Vec<Image>,
}

/// An image and its mounts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) mode: AttachMode,
    pub(crate) mounts: usize,
    pub(crate) ready: u64,
    pub(crate) referenced: u64,
    pub(crate) waiting: u64,
    /// Requests of the kernel a second.
    pub(crate) reads: f64,
    pub(crate) fault: Option<String>,
}

impl Sample {
    /// The state, and the metrics as text.
    pub(crate) fn new(status: StatusReport, metrics: &str) -> Self {
        let counter = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        let lines = metrics.lines().filter(|line| !line.starts_with('#'));
        Self { at: Instant::now(), status, counters: lines.filter_map(counter).collect() }
    }

    /// The sum over all labels.
    fn sum(&self, name: &str) -> f64 {
        self.labelled(name, "").map(|(_, value)| value).sum()
    }

    /// Those of a family whose labels contain a text.
    fn labelled<'s>(&'s self, name: &'s str, label: &'s str) -> impl Iterator<Item = (&'s str, f64)> {
        self.counters.iter().filter_map(move |(series, value)| {
            let labels = series.strip_prefix(name)?;
            let whole = labels.is_empty() || labels.starts_with('{');
            (whole && labels.contains(label)).then_some((labels, *value))
        })
    }

    /// What happened since an earlier moment; a daemon that was restarted began at zero.
    pub(crate) fn since(&self, before: &Self) -> Rates {
        let seconds = self.at.duration_since(before.at).as_secs_f64().max(0.001);
        let restarted = self.status.started_at_ms != before.status.started_at_ms;
        let grown = |now: f64, then: f64| if restarted { now } else { (now - then).max(0.0) };
        let change = |name: &str| grown(self.sum(name), before.sum(name));
        let reads = |result: &str| {
            let count = |sample: &Self| sample.labelled("skimmer_reads_total", result).map(|(_, n)| n).sum();
            grown(count(self), count(before))
        };
        let (asked, written) = (change("skimmer_asked_bytes_total"), change("skimmer_written_bytes_total"));
        let waits = self.waits(before, restarted);
        Rates {
            seconds,
            requests: change("skimmer_kernel_requests_total") / seconds,
            misses: reads("result=\"miss\"") / seconds,
            hits: reads("result=\"hit\"") / seconds,
            failed: reads("result=\"failed\""),
            asked: asked / seconds,
            fetched: change("skimmer_fetched_bytes_total") / seconds,
            written: written / seconds,
            source_requests: change("skimmer_source_requests_total") / seconds,
            amplification: (asked > 0.0).then(|| written / asked),
            p50: quantile(&waits, 0.5),
            p99: quantile(&waits, 0.99),
            cpu: change("process_cpu_seconds_total") / seconds,
            resident: self.sum("process_resident_memory_bytes"),
            images: self.images(before, seconds, restarted),
        }
    }

    /// Reads that took at most so many seconds, added up as a histogram has them.
    fn waits(&self, before: &Self, restarted: bool) -> Vec<(f64, f64)> {
        let (family, stage) = ("skimmer_stage_seconds_bucket", "stage=\"total\"");
        let then: BTreeMap<&str, f64> = before.labelled(family, stage).collect();
        let mut waits: Vec<(f64, f64)> = self
            .labelled(family, stage)
            .filter_map(|(labels, count)| {
                let bound = labels.split("le=\"").nth(1)?.split('"').next()?;
                let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
                let earlier = if restarted { 0.0 } else { then.get(labels).copied().unwrap_or(0.0) };
                Some((bound, count - earlier))
            })
            .collect();
        waits.sort_by(|a, b| a.0.total_cmp(&b.0));
        waits
    }

    fn images(&self, before: &Self, seconds: f64, restarted: bool) -> Vec<Image> {
        let blobs: BTreeMap<&str, _> =
            self.status.blobs.iter().map(|blob| (blob.id.as_str(), blob)).collect();
        let then: BTreeMap<&str, u64> =
            before.status.blobs.iter().map(|blob| (blob.id.as_str(), blob.reads)).collect();
        let mut images: BTreeMap<(String, &str), Image> = BTreeMap::new();
        for mount in &self.status.mounts {
            let entry = images.entry((mount.image.clone(), mount.mode.name()));
            let image = entry.or_insert_with(|| {
                let mine = mount.blobs.iter().filter_map(|id| blobs.get(id.as_str()));
                let mut image = Image {
                    name: mount.image.clone(),
                    mode: mount.mode,
                    mounts: 0,
                    ready: 0,
                    referenced: 0,
                    waiting: 0,
                    reads: 0.0,
                    fault: mount.fault.clone(),
                };
                let mut reads = 0;
                for blob in mine {
                    image.ready += blob.ready_bytes;
                    image.referenced += blob.referenced_bytes;
                    image.waiting += blob.pending_reads;
                    let earlier =
                        if restarted { 0 } else { then.get(blob.id.as_str()).copied().unwrap_or(0) };
                    reads += blob.reads.saturating_sub(earlier);
                    image.fault = image.fault.take().or_else(|| blob.fault.clone());
                }
                image.reads = f64::from(u32::try_from(reads).unwrap_or(u32::MAX)) / seconds;
                image
            });
            image.mounts += 1;
        }
        let mut images: Vec<Image> = images.into_values().collect();
        images.sort_by(|a, b| {
            b.waiting.cmp(&a.waiting).then(b.reads.total_cmp(&a.reads)).then_with(|| a.name.cmp(&b.name))
        });
        images
    }
}

/// The bound of the bucket that a quantile falls into; none without a read.
fn quantile(waits: &[(f64, f64)], share: f64) -> Option<f64> {
    let all = waits.last()?.1;
    if all <= 0.0 {
        return None;
    }
    waits.iter().find(|(_, count)| *count >= share * all).map(|(bound, _)| *bound)
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;
    use serde_json::json;

    /// A daemon whose image was read so many times.
    pub(in crate::top) fn sample(reads: u64, seconds: u64) -> Sample {
        let status = json!({
            "version": "1.2.3", "pid": 7, "uptime_s": 90, "started_at_ms": 5, "root": "/cache", "modes": [],
            "keeper": {"socket": "/k", "connected": true, "inherited_files": 0},
            "buffer_bytes": 64 << 20, "buffer_used_bytes": 16 << 20,
            "mounts": [{
                "image": "registry/app:1", "target": "/mnt", "manifest": "sha256:0", "bootstrap": "0",
                "mode": "fanotify", "reason": "", "blobs": ["b"], "mounted_at": 0,
            }],
            "blobs": [{
                "id": "b", "device_bytes": 1000, "referenced_bytes": 1000, "ready_bytes": 250, "fetches": 1,
                "pending_reads": 2, "reads": reads, "watched": true,
            }],
        });
        let metrics = format!(
            "# TYPE skimmer_reads_total counter\n\
             skimmer_reads_total{{mode=\"fanotify\",result=\"miss\"}} {reads}\n\
             skimmer_reads_total{{mode=\"fanotify\",result=\"hit\"}} 3\n\
             skimmer_kernel_requests_total{{mode=\"fanotify\",kind=\"read\"}} {reads}\n\
             skimmer_asked_bytes_total{{mode=\"fanotify\"}} {}\n\
             skimmer_written_bytes_total{{mode=\"fanotify\"}} {}\n\
             skimmer_stage_seconds_bucket{{le=\"0.001\",stage=\"total\"}} {}\n\
             skimmer_stage_seconds_bucket{{le=\"0.02\",stage=\"total\"}} {reads}\n\
             skimmer_stage_seconds_bucket{{le=\"+Inf\",stage=\"total\"}} {reads}\n\
             skimmer_stage_seconds_bucket{{le=\"+Inf\",stage=\"write\"}} 1000000\n",
            reads * 4096,
            reads * 8192,
            reads / 2,
        );
        let mut sample = Sample::new(serde_json::from_value(status).unwrap(), &metrics);
        sample.at += std::time::Duration::from_secs(seconds);
        sample
    }

    #[test]
    fn rates_are_of_what_happened_between() {
        let rates = sample(300, 2).since(&sample(100, 0));
        assert!((rates.misses - 100.0).abs() < 1.0, "{rates:?}");
        assert!(rates.hits.abs() < 1e-9 && rates.failed.abs() < 1e-9);
        assert_eq!(rates.amplification, Some(2.0));
        assert_eq!((rates.p50, rates.p99), (Some(0.001), Some(0.02)));
        let image = &rates.images[0];
        assert_eq!((image.ready, image.referenced, image.waiting, image.mounts), (250, 1000, 2, 1));
        assert!((image.reads - 100.0).abs() < 1.0, "{image:?}");
    }

    #[test]
    fn a_restart_counts_from_zero_and_silence_has_no_quantile() {
        let before = sample(1000, 0);
        let mut after = sample(10, 1);
        after.status.started_at_ms += 1;
        assert!((after.since(&before).misses - 10.0).abs() < 0.5);
        let still = sample(1000, 1).since(&before);
        assert_eq!((still.p99, still.amplification), (None, None));
    }
}
