//! `skimmer check`: verify an image completely, on disk or in a registry.

use anyhow::{Context, Result, bail, ensure};
use erofs_format::Image;
use erofs_format::compression_info::CiHeader;
use erofs_format::{Blob, Compressor};
use indicatif::ProgressBar;
use serde::Serialize;
use skimmer_fetcher::chunk::{ChunkSpec, verify};
use skimmer_fetcher::digest::Hasher;
use skimmer_fetcher::image::{Remote, open};
use skimmer_fetcher::source::Urgency;
use skimmer_fetcher::{BlobRef, Reference, SourceError};
use skimmer_mkfs::device::chunk_spec;
use zerocopy::FromBytes;

use crate::{Global, image, output};

/// Length of the compression info header at the end of a plain blob (RAFS v6).
const CI_HEADER: u64 = 4096;
/// Faults shown per blob; the rest is counted.
const SHOWN: usize = 10;
/// Attempts at a blob whose transfer breaks off; it goes on where it stopped.
const ATTEMPTS: u32 = 6;

/// Arguments of the command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A converted image: an OCI layout, an archive, or one in a registry.
    image: String,
    #[command(flatten)]
    registry: image::Registry,
}

#[derive(Serialize)]
struct Report {
    image: String,
    manifest: String,
    names: u64,
    blobs: Vec<BlobReport>,
    sound: bool,
}

#[derive(Serialize)]
struct BlobReport {
    id: String,
    bytes: u64,
    /// Chunks whose bytes were decoded and match their digest.
    sound_chunks: u64,
    faults: Vec<String>,
    /// Faults beyond those listed.
    more_faults: u64,
}

pub(crate) async fn run(options: Options, global: &Global) -> Result<()> {
    let reference = Reference::parse_source(&options.image)?;
    let remote = open(&reference, &options.registry.open_options(&reference)?).await?;
    let named = || format!("{}: bootstrap", options.image);
    let parsed = Image::parse(&remote.bootstrap).with_context(named)?;
    let summary = parsed.check().with_context(named)?;
    let dump = erofs_format::dump(&remote.bootstrap).with_context(named)?;
    ensure!(
        dump.unaccounted() == 0 && dump.overlapping() == 0,
        "{}: {} bytes belong to nothing, {} to two things (see: skimmer inspect --dump)",
        named(),
        dump.unaccounted(),
        dump.overlapping()
    );
    let bar = output::progress(global, "checking");
    for blob in &remote.blobs {
        output::add_total(&bar, blob.size);
    }
    let mut blobs = Vec::new();
    for index in 0..parsed.blobs().len() {
        blobs.push(check_blob(&remote, &parsed, index, &bar).await?);
    }
    bar.finish_and_clear();
    let sound = blobs.iter().all(|blob| blob.faults.is_empty());
    let report = Report {
        image: remote.reference.to_string(),
        manifest: remote.manifest_digest.to_string(),
        names: summary.names,
        blobs,
        sound,
    };
    if global.json {
        output::json(&report)?;
    } else {
        print(&report, global)?;
    }
    if !sound {
        bail!("{} is damaged; convert or push it again", options.image);
    }
    Ok(())
}

fn print(report: &Report, global: &Global) -> Result<()> {
    for blob in &report.blobs {
        for fault in &blob.faults {
            output::line(&format!("blob {}: {fault}", blob.id))?;
        }
        if blob.more_faults > 0 {
            output::line(&format!("blob {}: {} more faults", blob.id, blob.more_faults))?;
        }
    }
    if report.sound && !global.quiet {
        let chunks: u64 = report.blobs.iter().map(|blob| blob.sound_chunks).sum();
        let bytes: u64 = report.blobs.iter().map(|blob| blob.bytes).sum();
        output::line(&format!(
            "{} is sound: {} names, {chunks} chunks in {} blobs ({})",
            report.image,
            report.names,
            report.blobs.len(),
            output::bytes(bytes)
        ))?;
    }
    Ok(())
}

async fn check_blob(
    remote: &Remote,
    image: &Image<'_>,
    index: usize,
    bar: &ProgressBar,
) -> Result<BlobReport> {
    let blob = &image.blobs()[index];
    let id = blob.id.to_string();
    if let Some(why) = blob.unsupported() {
        bail!("blob {id} {why}");
    }
    let layer = remote
        .blob(&id)
        .with_context(|| format!("the bootstrap refers to blob {id}, which is no layer of the manifest"))?;
    let mut specs: Vec<ChunkSpec> =
        image.chunk_map(index)?.iter().map(|chunk| chunk_spec(blob, chunk)).collect();
    specs.sort_unstable_by_key(|spec| spec.stored_offset);
    let mut walk = Walk::new(blob, &layer, specs);
    if layer.size != blob.compressed_size {
        walk.fault(format!("the manifest says {} bytes, the bootstrap {}", layer.size, blob.compressed_size));
    }
    read(remote, &layer, &mut walk, bar).await?;
    walk.finish(image, index, layer)
}

/// Streams the blob through `walk`; a transfer that breaks off goes on where it stopped.
async fn read(remote: &Remote, layer: &BlobRef, walk: &mut Walk, bar: &ProgressBar) -> Result<()> {
    let mut attempts = 0;
    let mut failed = |error: SourceError| -> Result<()> {
        attempts += 1;
        if attempts >= ATTEMPTS || !error.may_pass() {
            bail!("{error}");
        }
        Ok(())
    };
    while walk.position < layer.size {
        let mut body = match remote.source.read(layer, walk.position..layer.size, Urgency::Demand).await {
            Ok(body) => body,
            Err(error) => {
                failed(error)?;
                continue;
            }
        };
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => {
                    tokio::task::block_in_place(|| walk.take(&piece));
                    bar.inc(u64::try_from(piece.len()).unwrap_or(0));
                }
                Err(error) => {
                    failed(error)?;
                    break;
                }
            }
        }
    }
    Ok(())
}

/// One pass over the stored bytes of a blob: everything is hashed, chunks are verified, and the compression info at the
/// end is kept.
struct Walk {
    hasher: Hasher,
    position: u64,
    specs: std::vec::IntoIter<ChunkSpec>,
    current: Option<(ChunkSpec, Vec<u8>)>,
    /// Where the compression info starts, and its bytes with the header behind it.
    tail_at: u64,
    tail: Vec<u8>,
    sound: u64,
    faults: Vec<String>,
    more_faults: u64,
}

impl Walk {
    fn new(blob: &Blob, layer: &BlobRef, specs: Vec<ChunkSpec>) -> Self {
        // Without chunks there is no compression info.
        let tail_at = if blob.chunk_count == 0 { layer.size } else { blob.ci_offset };
        Self {
            hasher: Hasher::new(),
            position: 0,
            specs: specs.into_iter(),
            current: None,
            tail_at,
            tail: Vec::new(),
            sound: 0,
            faults: Vec::new(),
            more_faults: 0,
        }
    }

    fn fault(&mut self, text: String) {
        if self.faults.len() < SHOWN {
            self.faults.push(text);
        } else {
            self.more_faults += 1;
        }
    }

    /// Bytes of the blob from the present position on.
    fn take(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        let start = self.position;
        self.position += u64::try_from(piece.len()).unwrap_or(0);
        while let Some((spec, mut bytes)) =
            self.current.take().or_else(|| Some((self.specs.next()?, Vec::new())))
        {
            let have = u64::try_from(bytes.len()).unwrap_or(0);
            let stored_end = spec.stored_offset + u64::from(spec.stored_len);
            bytes.extend_from_slice(part(piece, start, spec.stored_offset + have, stored_end));
            if self.position < stored_end {
                self.current = Some((spec, bytes));
                break;
            }
            let len = usize::try_from(spec.len).unwrap_or(usize::MAX);
            match spec.check().and_then(|()| verify(&spec, &bytes, vec![0; len])) {
                Ok(_) => self.sound += 1,
                Err(error) => {
                    self.fault(format!(
                        "chunk of {} bytes at offset {}: {error}",
                        spec.stored_len, spec.stored_offset
                    ));
                }
            }
        }
        self.tail.extend_from_slice(part(piece, start, self.tail_at, u64::MAX));
    }

    fn finish(mut self, image: &Image<'_>, index: usize, layer: BlobRef) -> Result<BlobReport> {
        if let Some((spec, _)) = self.current.take() {
            self.fault(format!("it ends before its chunk at offset {}", spec.stored_offset));
        }
        let missing = self.specs.len();
        if missing > 0 {
            self.fault(format!("it ends before {missing} more chunks"));
        }
        let blob = &image.blobs()[index];
        if let Err(error) = self.compression_info(image, blob, index) {
            self.fault(format!("compression info at offset {}: {error:#}", self.tail_at));
        }
        let found = std::mem::take(&mut self.hasher).finish();
        if found != layer.digest {
            self.fault(format!("its bytes are {found}"));
        }
        Ok(BlobReport {
            id: layer.digest.hex(),
            bytes: layer.size,
            sound_chunks: self.sound,
            faults: self.faults,
            more_faults: self.more_faults,
        })
    }

    /// The blob's own index of its chunks, which other tools read, must say what the bootstrap says.
    fn compression_info(&self, image: &Image<'_>, blob: &Blob, index: usize) -> Result<()> {
        if blob.chunk_count == 0 {
            return Ok(());
        }
        let stored = usize::try_from(blob.ci_compressed_size)?;
        let header_end = stored.checked_add(usize::try_from(CI_HEADER)?).context("it is too large")?;
        let ci = self.tail.get(..stored).context("the blob ends inside of it")?;
        let header = self.tail.get(stored..header_end).context("the blob ends before its header")?;
        let header = CiHeader::read_from_bytes(header).ok().context("its header has another length")?;
        let wanted = usize::try_from(blob.ci_uncompressed_size)?;
        // V1 entries have 16 bytes, V2 entries 24; more than that belongs to blobs that are refused earlier.
        ensure!(
            blob.ci_uncompressed_size <= 24 * u64::from(blob.chunk_count),
            "{wanted} bytes are too many for {} chunks",
            blob.chunk_count
        );
        let unpacked;
        let ci = match blob.ci_compressor {
            Compressor::None => ci,
            Compressor::Zstd => {
                unpacked = zstd::bulk::decompress(ci, wanted).context("it cannot be decompressed")?;
                &unpacked
            }
            other => bail!("it is compressed with {other:?}, which no known builder does"),
        };
        image.check_blob(index, &header, ci)?;
        Ok(())
    }
}

/// What of `piece`, which starts at `start`, lies in `from..to`.
fn part(piece: &[u8], start: u64, from: u64, to: u64) -> &[u8] {
    let clamp =
        |offset: u64| usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX).min(piece.len());
    let (from, to) = (clamp(from), clamp(to));
    piece.get(from..to).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn parts_of_a_piece() {
        let piece = b"0123456789";
        assert_eq!(part(piece, 100, 102, 105), b"234");
        assert_eq!(part(piece, 100, 0, 101), b"0");
        assert_eq!(part(piece, 100, 109, u64::MAX), b"9");
        assert_eq!(part(piece, 100, 110, 120), b"");
        assert_eq!(part(piece, 100, 0, 50), b"");
    }
}
