//! A converted image whose first reads lie together: the chunks of an access trace are moved, in its order, into one
//! blob more, the start blob. All else stays where it is, so the other blobs are shared with the image it came from.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::time::Instant;

use erofs_format::blob_table::{BlobEntry, BlobFeatures, BlobId};
use erofs_format::compression_info::{CiArray, CiHeader, HEADER_SIZE};
use erofs_format::{Blob, ChunkInfo, Compressor, DigestAlgo, FileKind, FormatError, Image};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::chunk::verify;
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::layout::Layout;
use zerocopy::{FromBytes, FromZeros, little_endian as le};

use crate::blob::{BlobWriter, StoredChunk};
use crate::bootstrap::{self, Plan, PublishedBlob};
use crate::device::chunk_spec;
use crate::ociinput::SourceImage;
use crate::pack::{ChunkKey, ChunkRef, DataId, Packed, usize_from};
use crate::package::{Parts, package};
use crate::pool::Encoded;
use crate::report::Dedup;
use crate::tree::{Body, Inode, InodeId, Meta, Tree, Xattr};
use crate::{Compression, MkfsError, Options};

/// One read of an access trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Id of the blob.
    pub blob: [u8; 32],
    /// First byte on its device.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The image to optimize: a converted one, with its blobs in a layout.
pub struct Converted<'c> {
    /// Its name, for messages.
    pub name: &'c str,
    /// Where its blobs are.
    pub layout: &'c Layout,
    /// Its data blobs.
    pub blobs: &'c [BlobRef],
    /// Its bootstrap.
    pub bootstrap: &'c [u8],
    /// Its config, JSON.
    pub config: &'c [u8],
    /// The annotations of its manifest.
    pub annotations: Option<HashMap<String, String>>,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Optimized {
    /// Digest of the new manifest.
    pub manifest: String,
    /// Its tag.
    pub tag: Option<String>,
    /// sha256 of the new bootstrap.
    pub bootstrap: String,
    /// Id of the start blob.
    pub start_blob: String,
    /// Chunks in it.
    pub chunks: usize,
    /// Its size as it is stored.
    pub stored_bytes: u64,
    /// Its size on the device.
    pub device_bytes: u64,
    /// Bytes that the reads of the trace asked for, each chunk's own length at most.
    pub read_bytes: u64,
    /// Reads of the trace that are of no blob of the image.
    pub strange_reads: usize,
    /// Wall clock time.
    pub elapsed_seconds: f64,
}

/// Writes the optimized image into `output`, under the tag that `options` gives. Only that and the platform's mark are
/// taken from the options; everything else is as the image has it.
///
/// # Errors
/// When the image breaks a rule, was made by a builder whose blobs have another form, or the trace names nothing of it.
pub fn optimize(
    source: &Converted<'_>,
    trace: &[Touch],
    output: &Layout,
    options: &Options,
) -> Result<Optimized, MkfsError> {
    let started = Instant::now();
    let bad = |reason: String| MkfsError::image(source.name, reason);
    let damaged = |error: FormatError| bad(format!("its bootstrap is damaged: {error}"));
    let image = Image::parse(source.bootstrap).map_err(damaged)?;
    image.check().map_err(damaged)?;
    let mut options = options.clone();
    options.chunk_size = image.chunk_size();
    take_algorithms(&image, &mut options).map_err(&bad)?;

    let maps: Vec<Vec<ChunkInfo>> = (0..image.blobs().len())
        .map(|slot| image.chunk_map(slot).map_err(damaged))
        .collect::<Result<_, _>>()?;
    let (wanted, read_bytes, strange_reads) = first_touches(&image, &maps, trace);
    if wanted.is_empty() {
        let reason = "no read of the trace is of its blobs: was it recorded with this very image?";
        return Err(bad(reason.to_owned()));
    }

    // The start blob, in the order of the trace.
    let mut writer = BlobWriter::create(output, &options)?;
    let number = u32::try_from(image.blobs().len()).unwrap_or(u32::MAX);
    let mut moved: HashMap<(usize, u32), ChunkRef> = HashMap::new();
    let mut files = BlobFiles::new(source);
    for &(slot, at) in &wanted {
        let (blob, chunk) = (&image.blobs()[slot], &maps[slot][at]);
        let encoded = files.chunk(blob, chunk)?;
        let index = writer.push(&encoded)?;
        moved.insert((slot, chunk.index), ChunkRef { blob: number, index });
    }
    let start = writer.finish_with(BlobFeatures::SEPARATED_PREFETCH_FILES)?;

    let mut prefetch = Vec::new();
    let (tree, chunks) = read_tree(&image, &moved, &mut prefetch).map_err(damaged)?;
    options.prefetch = prefetch;
    let packed = Packed { blobs: Vec::new(), files: chunks, dedup: Dedup::default(), data_bytes: 0 };
    let mut counts: Vec<usize> = image.blobs().iter().map(|blob| usize_from(blob.chunk_count)).collect();
    counts.push(start.chunks.len());
    let plan = Plan::new(&tree, &packed, &counts, options.chunk_size)?;
    let mut blobs: Vec<(BlobRef, PublishedBlob)> = Vec::with_capacity(plan.blobs.len());
    let mut start = Some(start);
    let (mut stored_bytes, mut device_bytes, mut id) = (0, 0, String::new());
    for used in &plan.blobs {
        let Some(blob) = image.blobs().get(used.number) else {
            let Some(start) = start.take() else { continue };
            let (reference, chunks, entry) = start.publish()?;
            let published = PublishedBlob { id: BlobId(*reference.digest.as_bytes()), chunks, entry };
            (stored_bytes, device_bytes) = (reference.size, published.entry.uncompressed_size.get());
            id = published.id.to_string();
            blobs.push((reference, published));
            continue;
        };
        let (reference, chunks) = files.whole(&image, blob, output)?;
        blobs.push((reference, PublishedBlob { id: blob.id, chunks, entry: entry_of(blob) }));
    }
    let bytes = bootstrap::write(&tree, &plan, &packed, &blobs, &options)?;
    let used: HashSet<usize> = plan.blobs.iter().map(|blob| blob.number).collect();
    let (config, layer_has_blob) = history(source, image.blobs().len(), &used).map_err(&bad)?;
    let original = SourceImage { annotations: source.annotations.clone(), config, layers: Vec::new() };
    let parts = Parts { source: Some(&original), blobs: &blobs, layer_has_blob: &layer_has_blob };
    let manifest = package(output, &bytes, &parts, &options)?;
    Ok(Optimized {
        manifest: manifest.digest.to_string(),
        tag: options.tag.clone(),
        bootstrap: Digest::of(&bytes).hex(),
        start_blob: id,
        chunks: wanted.len(),
        stored_bytes,
        device_bytes,
        read_bytes,
        strange_reads,
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}

/// What the new blob has to share with the old ones.
fn take_algorithms(image: &Image<'_>, options: &mut Options) -> Result<(), String> {
    let first = image.blobs().first().ok_or("it has no data")?;
    for blob in image.blobs() {
        let plain = blob.features.difference(BlobFeatures::SEPARATED_PREFETCH_FILES) == BlobFeatures::PLAIN;
        if !plain || blob.ci_compressor != Compressor::None {
            let remedy = "was made by another builder; convert the original image with skimmer first";
            return Err(format!("blob {} {remedy}", blob.id));
        }
        if (blob.compressor, blob.digest) != (first.compressor, first.digest) {
            return Err(format!("blobs {} and {} are compressed or hashed differently", first.id, blob.id));
        }
    }
    options.compression = match first.compressor {
        Compressor::None => Compression::None,
        // The level says nothing about what is stored already.
        Compressor::Zstd => Compression::Zstd { level: 3 },
        other => {
            return Err(format!("its chunks are compressed with {other}, which this builder does not write"));
        }
    };
    options.digest = match first.digest {
        DigestAlgo::Blake3 => crate::Digest::Blake3,
        DigestAlgo::Sha256 => crate::Digest::Sha256,
    };
    Ok(())
}

/// The chunks that the trace touches, as slot and position in its map, each once, in its order; the bytes asked of
/// them; and how many reads are of no blob of the image.
fn first_touches(
    image: &Image<'_>,
    maps: &[Vec<ChunkInfo>],
    trace: &[Touch],
) -> (Vec<(usize, usize)>, u64, usize) {
    let slots: HashMap<[u8; 32], usize> =
        image.blobs().iter().enumerate().map(|(slot, blob)| (blob.id.0, slot)).collect();
    let (mut seen, mut wanted) = (HashSet::new(), Vec::new());
    let (mut bytes, mut strange) = (0_u64, 0);
    for touch in trace {
        let Some(&slot) = slots.get(&touch.blob) else {
            strange += 1;
            continue;
        };
        let end = touch.offset.saturating_add(touch.length);
        let map = &maps[slot];
        let stop = |chunk: &ChunkInfo| chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
        let first = map.partition_point(|chunk| stop(chunk) <= touch.offset);
        for (at, chunk) in map.iter().enumerate().skip(first) {
            if chunk.uncompressed_offset >= end {
                break;
            }
            let part = stop(chunk).min(end) - chunk.uncompressed_offset.max(touch.offset);
            bytes = bytes.saturating_add(part);
            if seen.insert((slot, at)) {
                wanted.push((slot, at));
            }
        }
    }
    (wanted, bytes, strange)
}

/// The stored blobs of the image.
struct BlobFiles<'s> {
    source: &'s Converted<'s>,
    open: HashMap<BlobId, std::fs::File>,
}

impl<'s> BlobFiles<'s> {
    fn new(source: &'s Converted<'s>) -> Self {
        Self { source, open: HashMap::new() }
    }

    fn reference(&self, blob: &Blob) -> Result<BlobRef, MkfsError> {
        let found = self.source.blobs.iter().find(|found| *found.digest.as_bytes() == blob.id.0);
        found.copied().ok_or_else(|| {
            MkfsError::image(self.source.name, format!("its manifest does not list blob {}", blob.id))
        })
    }

    fn read(&mut self, blob: &Blob, offset: u64, len: usize) -> Result<Vec<u8>, MkfsError> {
        let reference = self.reference(blob)?;
        let file = match self.open.entry(blob.id) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.source.layout.open_blob(&reference)?)
            }
        };
        let mut bytes = vec![0; len];
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut bytes));
        let path = self.source.layout.blob_path(&reference.digest);
        read.map(|()| bytes).map_err(|error| MkfsError::io("read", path, error))
    }

    /// One chunk as it is stored, after a look at its digest.
    fn chunk(&mut self, blob: &Blob, chunk: &ChunkInfo) -> Result<Encoded, MkfsError> {
        let spec = chunk_spec(blob, chunk);
        let stored = self.read(blob, chunk.compressed_offset, usize_from(chunk.compressed_size))?;
        let wrong = |reason: String| MkfsError::Device { blob: blob.id.to_string(), reason };
        let checked = spec.check().and_then(|()| verify(&spec, &stored, vec![0; usize_from(spec.len)]));
        let verified = checked.map_err(|error| {
            wrong(format!("chunk {} at offset {}: {error}", chunk.index, chunk.compressed_offset))
        })?;
        let key = ChunkKey { digest: chunk.digest, len: chunk.uncompressed_size };
        let crc32 = chunk.crc32.unwrap_or(0);
        Ok(if chunk.compressed {
            Encoded { key, crc32, data: Vec::new(), compressed: Some(stored) }
        } else {
            Encoded { key, crc32, data: verified.into_inner(), compressed: None }
        })
    }

    /// Puts a blob that stays into the output; gives all of its chunks.
    fn whole(
        &mut self,
        image: &Image<'_>,
        blob: &Blob,
        output: &Layout,
    ) -> Result<(BlobRef, Vec<StoredChunk>), MkfsError> {
        let reference = self.reference(blob)?;
        let wrong = |error: FormatError| MkfsError::Device {
            blob: blob.id.to_string(),
            reason: format!("compression info: {error}"),
        };
        let ci_len = usize::try_from(blob.ci_compressed_size).unwrap_or(usize::MAX);
        let array = self.read(blob, blob.ci_offset, ci_len)?;
        let header_len = usize::try_from(HEADER_SIZE).unwrap_or(usize::MAX);
        let header = self.read(blob, blob.ci_offset + blob.ci_compressed_size, header_len)?;
        let header = CiHeader::read_from_bytes(&header).map_err(|_| MkfsError::Device {
            blob: blob.id.to_string(),
            reason: "its last bytes are no header".to_owned(),
        })?;
        header.check(blob).map_err(wrong)?;
        let array = CiArray::decode(&array, &header, blob).map_err(wrong)?;
        let chunks = (0u32..).zip(&array.entries).map(|(index, entry)| {
            // Only chunks that the tree uses need a digest, and those are in the table.
            let known = image.chunk(blob.index, index);
            StoredChunk {
                digest: known.map_or([0; 32], |known| known.digest),
                device_offset: entry.uncompressed_offset,
                stored_offset: entry.compressed_offset,
                len: entry.uncompressed_size,
                stored_len: entry.compressed_size,
                crc32: known.map_or(0, |known| known.crc32.get()),
            }
        });
        let chunks = chunks.collect();
        if output.root() != self.source.layout.root() && !output.has_blob(&reference)? {
            let mut from = self.source.layout.open_blob(&reference)?;
            let mut to = output.blob_writer()?;
            let copied = io::copy(&mut from, &mut to);
            copied.map_err(|error| MkfsError::io("copy a blob into", output.root(), error))?;
            to.finish_as(&reference)?;
        }
        Ok((reference, chunks))
    }
}

/// The blob's entry in the table, id and index left out.
fn entry_of(blob: &Blob) -> BlobEntry {
    let mut entry = BlobEntry::new_zeroed();
    entry.chunk_size = le::U32::new(blob.chunk_size);
    entry.chunk_count = le::U32::new(blob.chunk_count);
    entry.compression_algo = le::U32::new(blob.compressor.code());
    entry.digest_algo = le::U32::new(blob.digest.code());
    entry.features = le::U32::new(blob.features.bits());
    entry.compressed_size = le::U64::new(blob.compressed_size);
    entry.uncompressed_size = le::U64::new(blob.uncompressed_size);
    entry.ci_compressor = le::U32::new(blob.ci_compressor.code());
    entry.ci_offset = le::U64::new(blob.ci_offset);
    entry.ci_compressed_size = le::U64::new(blob.ci_compressed_size);
    entry.ci_uncompressed_size = le::U64::new(blob.ci_uncompressed_size);
    entry
}

/// The tree of an image with its files' chunks, those that moved at their new places; and the paths of its prefetch
/// table.
fn read_tree(
    image: &Image<'_>,
    moved: &HashMap<(usize, u32), ChunkRef>,
    prefetch: &mut Vec<Vec<u8>>,
) -> Result<(Tree, Vec<Vec<ChunkRef>>), FormatError> {
    let mut tree = Tree::new();
    let mut files: Vec<Vec<ChunkRef>> = Vec::new();
    let mut ids: HashMap<u64, InodeId> = HashMap::new();
    let mut listed: HashMap<u64, Vec<u8>> = image.prefetch().map(|nid| (nid, Vec::new())).collect();
    let mut walk = image.walk()?;
    while let Some(visit) = walk.next() {
        let visit = visit?;
        let inode = visit.inode;
        if let Some(path) = listed.get_mut(&inode.nid).filter(|path| path.is_empty()) {
            *path = walk.path().to_vec();
        }
        let id = match ids.get(&inode.nid) {
            Some(id) => *id,
            None => {
                let mut xattrs = Vec::new();
                for xattr in inode.xattrs() {
                    let xattr = xattr?;
                    let (suffix, value) = (xattr.suffix.to_vec(), xattr.value.to_vec());
                    xattrs.push(Xattr { index: xattr.index, suffix, value });
                }
                xattrs.sort();
                let meta = Meta {
                    permissions: inode.mode & 0o7777,
                    uid: inode.uid,
                    gid: inode.gid,
                    mtime: inode.mtime,
                    mtime_nsec: inode.mtime_nsec,
                    xattrs,
                };
                let device = inode.rdev.unwrap_or(erofs_format::inode::DeviceNumber { major: 0, minor: 0 });
                let body = match inode.kind {
                    FileKind::Directory => Body::Directory(std::collections::BTreeMap::new()),
                    FileKind::Regular => {
                        let mut chunks = Vec::new();
                        for chunk in inode.chunks() {
                            let chunk = chunk?;
                            let stays = ChunkRef {
                                blob: u32::try_from(chunk.blob).unwrap_or(u32::MAX),
                                index: chunk.index,
                            };
                            chunks.push(moved.get(&(chunk.blob, chunk.index)).copied().unwrap_or(stays));
                        }
                        files.push(chunks);
                        Body::Regular { size: inode.size, data: DataId::new(files.len() - 1) }
                    }
                    FileKind::Symlink => Body::Symlink(inode.target()?.unwrap_or_default().to_vec()),
                    FileKind::CharDevice => Body::Char(device),
                    FileKind::BlockDevice => Body::Block(device),
                    FileKind::Fifo => Body::Fifo,
                    FileKind::Socket => Body::Socket,
                };
                let id = if visit.depth == 0 {
                    let root = tree.root();
                    *tree.get_mut(root) = Inode { meta, body };
                    root
                } else {
                    tree.add(Inode { meta, body })
                };
                ids.insert(inode.nid, id);
                id
            }
        };
        if visit.depth > 0
            && let Some(parent) = ids.get(&visit.parent)
            && let Some(children) = tree.children_mut(*parent)
        {
            children.insert(visit.name.to_vec(), id);
        }
    }
    prefetch.extend(image.prefetch().filter_map(|nid| listed.remove(&nid).filter(|path| !path.is_empty())));
    Ok((tree, files))
}

/// The config without the step of the old bootstrap and with one for the start blob, and which of its steps with a
/// layer still have a blob.
fn history(
    source: &Converted<'_>,
    blobs: usize,
    used: &HashSet<usize>,
) -> Result<(serde_json::Map<String, serde_json::Value>, Vec<bool>), String> {
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(source.config)
        .map_err(|error| format!("its config is not a JSON object: {error}"))?;
    if let Some(steps) = config.get_mut("history").and_then(serde_json::Value::as_array_mut) {
        steps.pop();
        steps.push(serde_json::json!({ "created_by": "skimmer optimize", "comment": "start blob" }));
    }
    Ok((config, (0..=blobs).map(|number| used.contains(&number)).collect()))
}
