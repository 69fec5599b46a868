//! The parts of a build and nothing else: decompress, hash, compress. What a build can at best cost.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Bytes of a chunk: the default of `skimmer convert`.
const CHUNK: usize = 1 << 20;

/// What went through.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// Bytes hashed and compressed.
    pub bytes: u64,
    /// Bytes that came out.
    pub stored: u64,
}

/// Reads the layers of the layout `source`, or the files of a tree, in chunks of 1 MiB; hashes each with SHA-256 and,
/// when `compress`, compresses it with zstd at level 3, on as many threads as there are processors.
///
/// # Errors
/// Something cannot be read or decompressed.
pub fn parts(source: &Path, compress: bool) -> Result<Parts> {
    let threads = std::thread::available_parallelism()?.get();
    let (sender, receiver) = sync_channel::<Vec<u8>>(threads * 2);
    let receiver = Arc::new(Mutex::new(receiver));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let receiver = Arc::clone(&receiver);
                scope.spawn(move || work(&receiver, compress))
            })
            .collect();
        let mut bytes = 0;
        let mut chunked = |reader: &mut dyn Read| -> Result<()> {
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                reader.take(u64::try_from(CHUNK)?).read_to_end(&mut chunk)?;
                if chunk.is_empty() {
                    return Ok(());
                }
                bytes += u64::try_from(chunk.len())?;
                sender.send(chunk).context("a worker ended")?;
            }
        };
        if source.join("oci-layout").exists() {
            for (path, kind) in layers(source)? {
                chunked(&mut *decoder(&path, &kind)?)?;
            }
        } else {
            files(source, &mut chunked)?;
        }
        drop(sender);
        let mut stored = 0;
        for worker in workers {
            stored += worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        Ok(Parts { bytes, stored })
    })
}

/// The layers of a layout's only image, decompressed, lowest first.
///
/// # Errors
/// One cannot be read.
pub fn tars(layout: &Path) -> Result<Vec<Vec<u8>>> {
    let read = |(path, kind): (PathBuf, String)| {
        let mut tar = Vec::new();
        decoder(&path, &kind)?.read_to_end(&mut tar)?;
        Ok(tar)
    };
    layers(layout)?.into_iter().map(read).collect()
}

fn work(chunks: &Mutex<Receiver<Vec<u8>>>, compress: bool) -> Result<u64> {
    let mut compressor = zstd::bulk::Compressor::new(3)?;
    let mut stored = 0;
    loop {
        let next = chunks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(chunk) = next else { return Ok(stored) };
        std::hint::black_box(Sha256::digest(&chunk));
        let out = if compress { compressor.compress(&chunk)? } else { chunk };
        stored += u64::try_from(std::hint::black_box(out).len())?;
    }
}

fn layers(layout: &Path) -> Result<Vec<(PathBuf, String)>> {
    let blob = |digest: &Value| -> Result<PathBuf> {
        let digest = digest.as_str().context("no digest")?;
        Ok(layout.join("blobs").join(digest.replace(':', "/")))
    };
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let manifest: Value = serde_json::from_slice(&fs::read(blob(&index["manifests"][0]["digest"])?)?)?;
    let layers = manifest["layers"].as_array().context("no layers")?.iter();
    layers
        .map(|layer| {
            Ok((blob(&layer["digest"])?, layer["mediaType"].as_str().unwrap_or_default().to_owned()))
        })
        .collect()
}

fn decoder(path: &Path, kind: &str) -> Result<Box<dyn Read>> {
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    Ok(match kind.rsplit('+').next() {
        Some("gzip") => Box::new(flate2::read::GzDecoder::new(std::io::BufReader::new(file))),
        Some("zstd") => Box::new(zstd::Decoder::new(file)?),
        Some(kind) if kind.ends_with(".tar") => Box::new(file),
        _ => bail!("{}: a layer of kind {kind}", path.display()),
    })
}

fn files(directory: &Path, each: &mut dyn FnMut(&mut dyn Read) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("{}", directory.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files(&entry.path(), each)?;
        } else if kind.is_file() {
            each(&mut File::open(entry.path())?)?;
        }
    }
    Ok(())
}
