//! One table of cases that every source must pass.

use std::collections::BTreeMap;

use skimmer_fetcher::chunk::{ChunkSpec, fetch};
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, Urgency};

use super::Sample;

/// The table.
pub(crate) async fn conforms(source: &dyn Source, sample: &Sample) {
    let all = std::fs::read(sample.layout.blob_path(&sample.blob.digest)).unwrap();
    let size = sample.blob.size;
    let name = source.name();
    assert!(source.has(&sample.blob).await.unwrap(), "{name}");
    let absent = BlobRef { digest: Digest::of(b"absent"), size: 10 };
    assert!(!source.has(&absent).await.unwrap(), "{name}");

    let ranges = [0..1, 0..size, 0..4096, 1..2, size - 1..size, size / 2..size, 4095..4097, 100..1_000_000];
    for range in ranges {
        let body = source.read(&sample.blob, range.clone(), Urgency::Demand).await.unwrap();
        assert_eq!(body.remaining(), range.end - range.start);
        let got = body.collect().await.unwrap();
        let at = |byte: u64| usize::try_from(byte).unwrap();
        assert!(got == all[at(range.start)..at(range.end)], "{name}: {range:?}");
    }
    for range in [0..0, 5..5, size..size + 1, 0..size + 1, size + 1..size + 2, u64::MAX - 1..u64::MAX] {
        let error = source.read(&sample.blob, range.clone(), Urgency::Demand).await.unwrap_err();
        assert_eq!(error.class, ErrorClass::BadRange, "{name}: {range:?}: {error}");
    }
    let error = source.read(&absent, 0..10, Urgency::Demand).await.unwrap_err();
    assert_eq!(error.class, ErrorClass::NotFound, "{name}: {error}");
    assert!(error.to_string().contains(&absent.digest.hex()), "{name}: {error}");
    // A body that is dropped half-way spoils nothing for the next.
    let mut half = source.read(&sample.blob, 0..size, Urgency::Demand).await.unwrap();
    half.next().await.unwrap().unwrap();
    drop(half);

    chunks_come(source, sample, 0..sample.chunks.len()).await;
    chunks_come(source, sample, 3..9).await;
    chunks_come(source, sample, 21..22).await;
    let plan: Vec<(ChunkSpec, Vec<u8>)> = Vec::new();
    fetch(source, &sample.blob, plan, |_, _| panic!("no chunk was asked for")).await.unwrap();
}

/// Fetches every other chunk of a run (so that gaps are skipped) and compares.
pub(crate) async fn chunks_come(source: &dyn Source, sample: &Sample, run: std::ops::Range<usize>) {
    let wanted: Vec<_> = run.step_by(2).collect();
    let plan: Vec<_> = wanted
        .iter()
        .map(|&index| {
            let spec = sample.chunks[index].0;
            (spec, vec![0xAA; usize::try_from(spec.len).unwrap().next_multiple_of(4096)])
        })
        .collect();
    let mut got = BTreeMap::new();
    fetch(source, &sample.blob, plan, |at, verified| {
        assert!(got.insert(at, verified).is_none(), "chunk {at} came twice");
    })
    .await
    .unwrap();
    assert_eq!(got.len(), wanted.len());
    for (at, verified) in got {
        let data = &sample.chunks[wanted[at]].1;
        assert!(verified.bytes() == data, "{}: chunk {}", source.name(), wanted[at]);
        assert!(verified.padded()[data.len()..].iter().all(|&byte| byte == 0));
    }
}
