//! One span for each miss, with its stages, to an OpenTelemetry collector.

use std::collections::HashMap;
use std::time::Instant;

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use skimmer_config::Traces as Config;

use super::{Clock, Owner};
use crate::driver::{Served, Stages};
use crate::metrics::ReadResult;

/// Sends spans.
pub(super) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Begins to send to the collector; one that is not there costs only the spans.
    pub(super) fn begin(config: &Config) -> anyhow::Result<Self> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(&config.endpoint).build()?;
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sample)));
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_service_name("skimmerd").with_attribute(version).build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(sampler)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("skimmerd");
        Ok(Self { provider, tracer })
    }

    /// Adds a request; one whose bytes were there is no miss.
    pub(super) fn add(&self, clock: &Clock, images: &[Owner], served: &Served) {
        if served.result == ReadResult::hit {
            return;
        }
        let parent = images.iter().find_map(|owner| owner.traceparent.as_deref()).map(context);
        let parent = parent.unwrap_or_default();
        let mut attributes = vec![
            KeyValue::new("skimmer.mode", served.mode.to_string()),
            KeyValue::new("skimmer.blob", served.blob.hex()),
            KeyValue::new("skimmer.offset", signed(served.range.start)),
            KeyValue::new("skimmer.length", signed(served.range.end - served.range.start)),
        ];
        attributes.extend(images.first().map(|owner| KeyValue::new("skimmer.image", owner.image.clone())));
        if let Some(stages) = &served.flight {
            attributes.push(KeyValue::new("skimmer.attempt", i64::from(stages.attempt)));
            let stored = stages.stored.end - stages.stored.start;
            attributes.push(KeyValue::new("skimmer.stored_bytes", signed(stored)));
        }
        let span = SpanBuilder::from_name("miss")
            .with_kind(SpanKind::Internal)
            .with_start_time(clock.time(served.since))
            .with_attributes(attributes);
        let mut span = self.tracer.build_with_context(span, &parent);
        if served.result == ReadResult::failed {
            span.set_status(Status::error("the read failed"));
        }
        let within = parent.with_remote_span_context(span.span_context().clone());
        for (name, from, to) in stages(served) {
            let stage = SpanBuilder::from_name(name).with_start_time(clock.time(from));
            self.tracer.build_with_context(stage, &within).end_with_timestamp(clock.time(to));
        }
        span.end_with_timestamp(clock.time(served.until));
    }

    /// Sends what is left.
    pub(super) fn end(self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!("the last traces are lost: {error}");
        }
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn context(traceparent: &str) -> Context {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier)
}

/// The stages that a miss went through, those that are known, within its own time: what was under way already when it
/// came is not its time.
fn stages(served: &Served) -> Vec<(&'static str, Instant, Instant)> {
    let Some(Stages { planned, started, first, verified, writing, written, .. }) = served.flight.clone()
    else {
        return Vec::new();
    };
    let within = |moment: Instant| moment.clamp(served.since, served.until);
    let all = [
        ("queue", Some(planned), started),
        ("fetch", started, first),
        ("verify", first, verified),
        ("write", writing, written),
    ];
    let known = all.into_iter().filter_map(|(name, from, to)| Some((name, within(from?), within(to?))));
    known.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::BlobId;
    use crate::frontend::Mode;
    use std::time::Duration;

    #[test]
    fn stages_lie_within_the_miss() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        let flight = Stages {
            planned: at(0),
            started: Some(at(1)),
            first: Some(at(20)),
            verified: Some(at(30)),
            writing: Some(at(31)),
            written: None,
            attempt: 1,
            stored: 0..10,
        };
        let blob: BlobId = "ab".repeat(32).parse().unwrap();
        let served = Served {
            mode: Mode::Fanotify,
            blob,
            range: 0..4096,
            since: at(10),
            until: at(25),
            result: ReadResult::miss,
            flight: Some(flight),
        };
        let expected = vec![("queue", at(10), at(10)), ("fetch", at(10), at(20)), ("verify", at(20), at(25))];
        assert_eq!(stages(&served), expected);
        assert!(stages(&Served { flight: None, ..served }).is_empty());
    }

    #[test]
    fn a_trace_goes_on_in_that_of_its_mount() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let context = context(&format!("00-{trace}-b7ad6b7169203331-01"));
        assert_eq!(context.span().span_context().trace_id().to_string(), trace);
        assert!(!super::context("nonsense").span().span_context().is_valid());
    }
}
