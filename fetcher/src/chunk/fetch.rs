//! One range read that covers a plan of chunks; each chunk is handed over while later bytes arrive.

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt as _;
use futures_util::future::Either;
use futures_util::stream::FuturesUnordered;

use super::arriving::Arriving;
use super::{ChunkError, ChunkPlace, ChunkSpec, FetchError, Verified, fits};
use crate::cpu;
use crate::source::{BlobRef, Body, Source, Urgency};

/// Chunks at most this long are decoded on the calling task: a thread hop costs more.
const INLINE_LEN: u32 = 32 * 1024;
/// Chunks being decoded on other threads at one time. Bounds what a fast source can pile up.
const DECODING: usize = 8;

type Checked<B> = (usize, Result<Verified<B>, ChunkError>);

/// Reads the plan's chunks as one contiguous range and hands each over once it is verified.
///
/// The plan must be in stored order without overlap; stored bytes between planned chunks are skipped.
/// `on_chunk` gets the position in the plan; calls may come in another order than the plan. A chunk that
/// fails its check is left out and the others still come; the first such failure is the result. One
/// attempt: retries belong to the caller.
pub async fn fetch<B>(
    source: &dyn Source,
    blob: &BlobRef,
    plan: Vec<(ChunkSpec, B)>,
    on_chunk: impl FnMut(usize, Verified<B>) + Send,
) -> Result<(), FetchError>
where
    B: AsMut<[u8]> + AsRef<[u8]> + Send + 'static,
{
    let Some(range) = stored_range(&plan) else { return Ok(()) };
    // A plan that makes no sense is refused before anything is asked for.
    check_plan(blob, &plan)?;
    let body = source.read(blob, range, Urgency::Demand).await?;
    fetch_from(source.name(), blob, (body, Urgency::Demand), plan, on_chunk, drop).await
}

/// The stored bytes from the start of the plan's first chunk to the end of its last.
pub fn stored_range<B>(plan: &[(ChunkSpec, B)]) -> Option<std::ops::Range<u64>> {
    let (first, last) = (plan.first()?, plan.last()?);
    Some(first.0.stored_offset..last.0.stored_end())
}

/// As [`fetch`], from a body that has begun: it stands at or before the plan's first chunk and reaches its last. If
/// somebody waits for it, the last chunk is decoded while it arrives.
///
/// When the plan's last byte has come, and the body goes on, `on_rest` gets it, while chunks may still be decoded.
pub async fn fetch_from<B>(
    name: &str,
    blob: &BlobRef,
    (mut body, urgency): (Body, Urgency),
    plan: Vec<(ChunkSpec, B)>,
    mut on_chunk: impl FnMut(usize, Verified<B>) + Send,
    on_rest: impl FnOnce(Body) + Send,
) -> Result<(), FetchError>
where
    B: AsMut<[u8]> + AsRef<[u8]> + Send + 'static,
{
    check_plan(blob, &plan)?;
    let Some(range) = stored_range(&plan) else { return Ok(()) };
    if body.position() > range.start || body.position() + body.remaining() < range.end {
        let detail = format!("a body at stored byte {} cannot give bytes {range:?}", body.position());
        return Err(FetchError::Plan(detail));
    }
    let (specs, buffers): (Vec<_>, Vec<_>) = plan.into_iter().unzip();
    let mut buffers: Vec<Option<B>> = buffers.into_iter().map(Some).collect();

    let mut failure: Option<(usize, ChunkError)> = None;
    let mut finish = |(index, result): Checked<B>| match result {
        Ok(verified) => on_chunk(index, verified),
        Err(error) => {
            // The lowest position, whatever the order of arrival, so that errors can be compared.
            if failure.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
                failure = Some((index, error));
            }
        }
    };

    let blame = body.blame();
    let mut decoding = FuturesUnordered::new();
    let mut position = body.position();
    let mut index = 0;
    let mut arriving: Option<Arriving<B>> = None;
    let ended = loop {
        if index == specs.len() {
            break Ok(());
        }
        let next = {
            let piece = std::pin::pin!(body.next());
            if decoding.is_empty() {
                Either::Left(piece.await)
            } else {
                // `body.next()` loses nothing when it is dropped unfinished: it takes a piece and returns it
                // in the same poll.
                match futures_util::future::select(piece, decoding.next()).await {
                    Either::Left((piece, _)) => Either::Left(piece),
                    Either::Right((done, _)) => Either::Right(done),
                }
            }
        };
        let mut piece = match next {
            Either::Right(done) => {
                if let Some(done) = done {
                    finish(done);
                }
                continue;
            }
            Either::Left(None) => break Ok(()),
            Either::Left(Some(Err(error))) => break Err(error),
            Either::Left(Some(Ok(piece))) => piece,
        };
        while !piece.is_empty() {
            let Some(spec) = specs.get(index) else {
                body.unread(std::mem::take(&mut piece));
                break;
            };
            if position < spec.stored_offset {
                let skip = clamp(spec.stored_offset - position, piece.len());
                position += advance(&mut piece, skip);
                continue;
            }
            let Some(mut chunk) =
                arriving.take().or_else(|| Some(Arriving::new(spec, buffers[index].take()?)))
            else {
                break; // each buffer is taken once, by its own index
            };
            let wanted = clamp(spec.stored_end() - position, piece.len());
            // The last one, if somebody waits: for all others there is more to wait for, and more processors than this.
            let soon = urgency == Urgency::Demand && index + 1 == specs.len() && spec.len > INLINE_LEN;
            chunk.add(spec, piece.slice(..wanted), soon);
            while chunk.advance(spec) {
                tokio::task::yield_now().await;
            }
            position += advance(&mut piece, wanted);
            if position < spec.stored_end() {
                arriving = Some(chunk);
                continue;
            }
            if spec.len.max(spec.stored_len) <= INLINE_LEN || chunk.is_decoded(spec) {
                finish((index, chunk.check(spec)));
            } else {
                while decoding.len() >= DECODING {
                    if let Some(done) = decoding.next().await {
                        finish(done);
                    }
                }
                let (spec, at) = (*spec, index);
                decoding.push(cpu::run(move || (at, chunk.check(&spec))));
            }
            index += 1;
        }
    };
    let rest = if ended.is_ok() && body.remaining() > 0 {
        on_rest(body);
        None
    } else {
        Some(body).filter(|_| ended.is_ok())
    };
    while let Some(done) = decoding.next().await {
        finish(done);
    }
    ended?;
    if let Some(mut body) = rest {
        // The end of the reply is read too, so that its connection can be used again.
        let _ = body.next().await;
    }
    match failure {
        None => Ok(()),
        Some((index, error)) => {
            let sent = specs[index].stored_offset..specs[index].stored_end();
            // The image itself may be wrong; only bytes that do not fit it speak against who sent them.
            let culprit = blame.filter(|_| !matches!(error, ChunkError::Spec(_) | ChunkError::Buffer { .. }));
            let culprit = culprit.map(|blame| blame(sent)).filter(|name| !name.is_empty());
            let source_name = culprit.unwrap_or_else(|| name.to_owned());
            let place = ChunkPlace { source_name, blob: blob.digest, index, spec: specs[index] };
            Err(FetchError::Chunk { place: Box::new(place), error })
        }
    }
}

/// Checks that the plan can be read as one range.
fn check_plan<B: AsRef<[u8]>>(blob: &BlobRef, plan: &[(ChunkSpec, B)]) -> Result<(), FetchError> {
    let mut earliest = 0;
    for (index, (spec, buffer)) in plan.iter().enumerate() {
        fits(spec, buffer.as_ref().len())
            .map_err(|error| FetchError::Plan(format!("chunk {index}: {error}")))?;
        if spec.stored_offset < earliest {
            let detail = format!(
                "chunk {index} starts at stored byte {}, before the end {earliest} of the one before it",
                spec.stored_offset
            );
            return Err(FetchError::Plan(detail));
        }
        if spec.stored_end() > blob.size {
            let detail = format!(
                "chunk {index} ends at stored byte {}, blob {} has {}",
                spec.stored_end(),
                blob.digest,
                blob.size
            );
            return Err(FetchError::Plan(detail));
        }
        earliest = spec.stored_end();
    }
    Ok(())
}

fn clamp(bytes: u64, most: usize) -> usize {
    usize::try_from(bytes).map_or(most, |bytes| bytes.min(most))
}

/// Drops `count` bytes from the front and returns the count as an offset.
fn advance(piece: &mut Bytes, count: usize) -> u64 {
    piece.advance(count);
    u64::try_from(count).expect("usize fits in 64 bits")
}
