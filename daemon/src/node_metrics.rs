//! What is counted when somebody asks: mounts, and what the process takes of the machine.

use std::collections::BTreeMap;
use std::fmt::Error;
use std::sync::{Arc, Weak};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use skimmer_client::AttachMode;

use crate::mounts::Mounts;

/// Looks at the mounts and at `/proc/self`.
#[derive(Debug)]
pub struct NodeMetrics(Weak<Mounts>);

impl NodeMetrics {
    /// Of these mounts.
    #[must_use]
    pub fn new(mounts: &Arc<Mounts>) -> Self {
        Self(Arc::downgrade(mounts))
    }
}

impl Collector for NodeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let mut built =
            encoder.encode_descriptor("skimmer_build_info", "The version", None, MetricType::Gauge)?;
        ConstGauge::new(1_i64).encode(built.encode_family(&version)?)?;
        if let Some(mounts) = self.0.upgrade() {
            let mut by_mode: BTreeMap<&str, i64> =
                [AttachMode::Fanotify, AttachMode::Fscache, AttachMode::Local]
                    .map(|mode| (mode.name(), 0))
                    .into();
            for mount in mounts.list() {
                *by_mode.entry(mount.mode.name()).or_default() += 1;
            }
            let what = "Mounts, by attach mode";
            let mut family = encoder.encode_descriptor("skimmer_mounts", what, None, MetricType::Gauge)?;
            for (mode, count) in by_mode {
                ConstGauge::new(count).encode(family.encode_family(&[("mode", mode)])?)?;
            }
            let prepared = i64::try_from(mounts.prepared().len()).unwrap_or(i64::MAX);
            let what = "Images that others mount";
            let family =
                encoder.encode_descriptor("skimmer_prepared_images", what, None, MetricType::Gauge)?;
            ConstGauge::new(prepared).encode(family)?;
            let cache = mounts.cache_use();
            let used = i64::try_from(cache.used_bytes()).unwrap_or(i64::MAX);
            let what = "Disk space that the cache takes";
            let family =
                encoder.encode_descriptor("skimmer_cache", what, Some(&Unit::Bytes), MetricType::Gauge)?;
            ConstGauge::new(used).encode(family)?;
            let what = "Disk space given back for the budget's sake";
            let family = encoder.encode_descriptor(
                "skimmer_evicted",
                what,
                Some(&Unit::Bytes),
                MetricType::Counter,
            )?;
            ConstCounter::new(cache.evicted_bytes()).encode(family)?;
            let what = "Bytes of blobs that came, by the kind of sender";
            let mut family = encoder.encode_descriptor(
                "skimmer_received",
                what,
                Some(&Unit::Bytes),
                MetricType::Counter,
            )?;
            for (source, bytes) in mounts.traffic() {
                ConstCounter::new(bytes).encode(family.encode_family(&[("source", source)])?)?;
            }
        }
        if let Some(own) = Own::look() {
            let what = "Processor time used";
            let family =
                encoder.encode_descriptor("process_cpu", what, Some(&Unit::Seconds), MetricType::Counter)?;
            ConstCounter::new(own.cpu_seconds).encode(family)?;
            let what = "Memory that is resident";
            let family = encoder.encode_descriptor(
                "process_resident_memory",
                what,
                Some(&Unit::Bytes),
                MetricType::Gauge,
            )?;
            ConstGauge::new(own.resident_bytes).encode(family)?;
            let what = "Open descriptors";
            let family = encoder.encode_descriptor("process_open_fds", what, None, MetricType::Gauge)?;
            ConstGauge::new(own.descriptors).encode(family)?;
        }
        Ok(())
    }
}

/// What this process takes (proc(5)).
struct Own {
    cpu_seconds: f64,
    resident_bytes: i64,
    descriptors: i64,
}

impl Own {
    fn look() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name before it may hold anything; of what follows the 12th and 13th are times of user and system.
        let times: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: u32 = times.get(11..13)?.iter().map(|time| time.parse::<u32>().unwrap_or(0)).sum();
        let per_second = u32::try_from(rustix::param::clock_ticks_per_second()).ok()?;
        let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
        let pages: i64 = statm.split_whitespace().nth(1)?.parse().ok()?;
        let page = i64::try_from(rustix::param::page_size()).ok()?;
        let descriptors = i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()?;
        Some(Self {
            cpu_seconds: f64::from(ticks) / f64::from(per_second.max(1)),
            resident_bytes: pages.saturating_mul(page),
            descriptors,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sees_itself() {
        let own = Own::look().unwrap();
        assert!(own.resident_bytes > 1 << 20 && own.descriptors > 2 && own.cpu_seconds >= 0.0);
    }
}
