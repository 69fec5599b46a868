//! Whole blobs over one connection, each chunk decompressed, hashed and written: what reading everything cannot do
//! without.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What went through.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unpacked {
    /// Bytes that came over the network.
    pub stored: u64,
    /// Bytes written, each chunk's padded to whole blocks.
    pub bytes: u64,
}

/// One line of a plan.
#[derive(Clone)]
struct Chunk {
    offset: u64,
    stored: usize,
    size: usize,
    /// Hexadecimal SHA-256 of what is in it.
    digest: String,
}

/// A chunk's stored bytes, and where it goes.
struct Work {
    stored: Vec<u8>,
    chunk: Chunk,
    place: u64,
}

/// Downloads the blobs of `plan` one after the other (lines `URL offset length size SHA-256`, ascending in each blob)
/// and writes every chunk to `into`, after decompressing (zstd) and checking it on as many threads as there are
/// processors.
///
/// # Errors
/// A server answers with anything but the blob, a chunk cannot be decompressed, or a write fails.
pub fn unpack(plan: &Path, into: &Path) -> Result<Unpacked> {
    let text = fs::read_to_string(plan).with_context(|| format!("{}", plan.display()))?;
    let blobs = blobs(&text)?;
    let file = File::create(into).with_context(|| format!("{}", into.display()))?;
    let threads = std::thread::available_parallelism()?.get();
    let (sender, receiver) = sync_channel::<Work>(threads * 8);
    let receiver = Arc::new(Mutex::new(receiver));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (receiver, file) = (Arc::clone(&receiver), &file);
                scope.spawn(move || work(&receiver, file))
            })
            .collect();
        // Theirs alone, so that sending fails when they have ended.
        drop(receiver);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().tls_certs_only([]).build()?;
        let (mut stored, mut place) = (0, 0);
        let result: Result<()> = blobs.iter().try_for_each(|(url, chunks)| {
            stored += runtime.block_on(download(&client, url, chunks, &sender, &mut place))?;
            Ok(())
        });
        drop(sender);
        // First the workers' errors: they explain the other one.
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        result?;
        Ok(Unpacked { stored, bytes: place })
    })
}

fn blobs(text: &str) -> Result<Vec<(&str, Vec<Chunk>)>> {
    let mut blobs: Vec<(&str, Vec<Chunk>)> = Vec::new();
    for line in text.lines() {
        let parts: Vec<&str> = line.split(' ').collect();
        let [url, offset, stored, size, digest] = parts[..] else {
            anyhow::bail!("line {line}: not five parts")
        };
        let (offset, stored, size) = (offset.parse()?, stored.parse()?, size.parse()?);
        let chunk = Chunk { offset, stored, size, digest: digest.to_owned() };
        match blobs.last_mut().filter(|(last, _)| *last == url) {
            Some((_, chunks)) => chunks.push(chunk),
            None => blobs.push((url, vec![chunk])),
        }
    }
    ensure!(!blobs.is_empty(), "no chunks");
    Ok(blobs)
}

async fn download(
    client: &reqwest::Client,
    url: &str,
    chunks: &[Chunk],
    sender: &SyncSender<Work>,
    place: &mut u64,
) -> Result<u64> {
    let mut answer = client.get(url).send().await?;
    ensure!(answer.status() == 200, "{url}: {}", answer.status());
    let (mut at, mut all) = (0, 0);
    let mut chunks = chunks.iter().peekable();
    let mut stored = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        all += u64::try_from(piece.len())?;
        let mut rest = &piece[..];
        while let Some(chunk) = chunks.peek() {
            // What lies between two chunks belongs to none.
            let skip = chunk.offset.saturating_sub(at).min(u64::try_from(rest.len())?);
            rest = &rest[usize::try_from(skip)?..];
            at += skip;
            let take = rest.len().min(chunk.stored - stored.len());
            stored.extend_from_slice(&rest[..take]);
            rest = &rest[take..];
            at += u64::try_from(take)?;
            if stored.len() < chunk.stored {
                break;
            }
            let next = Vec::with_capacity(chunk.stored);
            let chunk = (*chunk).clone();
            let size = chunk.size;
            let work = Work { stored: std::mem::replace(&mut stored, next), chunk, place: *place };
            *place += u64::try_from(size.next_multiple_of(4096))?;
            sender.send(work).context("the workers ended")?;
            chunks.next();
        }
        at += u64::try_from(rest.len())?;
    }
    ensure!(chunks.next().is_none(), "{url} ended after {all} bytes");
    Ok(all)
}

fn work(queue: &Mutex<Receiver<Work>>, file: &File) -> Result<()> {
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { stored, chunk: Chunk { offset, size, digest, .. }, place }) = next else {
            return Ok(());
        };
        // Stored as it is when compression does not pay.
        let bytes = if stored.len() == size { stored } else { decompressor.decompress(&stored, size)? };
        let got = hex::encode(Sha256::digest(&bytes));
        ensure!(got == digest, "the chunk at {offset} has {} bytes of digest {got}", bytes.len());
        file.write_all_at(&bytes, place)?;
    }
}
