//! The layer that holds a converted image's bootstrap: from the manifest's entry to the bytes.

use std::fs::File;
use std::io::{self, BufReader, Read};

use super::{Image, ImageError};
use crate::digest::{Digest, Hasher};
use crate::local::off_thread as run;
use crate::oci::{BOOTSTRAP_PATH, Descriptor};
use crate::source::BlobRef;

/// How a layer's tar stream is packed.
#[derive(Clone, Copy)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// The layer that holds the bootstrap, as the manifest describes it.
pub(super) struct BootstrapLayer {
    pub(super) blob: BlobRef,
    packing: Packing,
    /// The most bytes that it, and the bootstrap, may have.
    cap: u64,
}

impl BootstrapLayer {
    pub(super) const PART: &str = "bootstrap layer";

    pub(super) fn of(image: &Image, layer: &Descriptor, cap: u64) -> Result<Self, ImageError> {
        let blob = image.blob_ref(layer)?;
        let bad = |problem: String| Err(image.part(Self::PART, &blob, problem));
        let packing = match layer.media_type().as_ref() {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Packing::Plain
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Packing::Gzip,
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Packing::Zstd,
            other => {
                let shown: String = other.chars().take(100).collect();
                return bad(format!("media type `{shown}` is not that of a tar layer"));
            }
        };
        if blob.size == 0 || blob.size > cap {
            return bad(format!("{} bytes are none, or more than the {cap} that are read", blob.size));
        }
        Ok(Self { blob, packing, cap })
    }

    /// The bootstrap in the layer's verified bytes; these must have that DiffID.
    pub(super) async fn unpack(
        &self,
        image: &Image,
        file: File,
        diff_id: Option<Digest>,
    ) -> Result<Vec<u8>, ImageError> {
        let (packing, cap) = (self.packing, self.cap);
        let extracted = run(move || extract(file, packing, diff_id, cap)).await;
        extracted.map_err(|problem| image.part(Self::PART, &self.blob, problem))
    }
}

/// Counts and hashes what passes, and stops a stream that goes on too long.
struct Counted<R> {
    inner: R,
    hasher: Hasher,
    passed: u64,
    cap: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.passed = self.passed.saturating_add(u64::try_from(count).map_err(io::Error::other)?);
        if self.passed > self.cap {
            return Err(io::Error::other(format!("it unpacks to more than {} bytes", self.cap)));
        }
        Ok(count)
    }
}

/// Room for the tar headers and per-blob tables beside a bootstrap of the largest size.
const TAR_ROOM: u64 = 256 << 20;

fn extract(file: File, packing: Packing, diff_id: Option<Digest>, cap: u64) -> Result<Vec<u8>, String> {
    let file = BufReader::with_capacity(256 * 1024, file);
    let stream: Box<dyn Read> = match packing {
        Packing::Plain => Box::new(file),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Packing::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(file).map_err(|error| error.to_string())?;
            // 128 MiB: what every decoder must accept, and no more.
            decoder.window_log_max(27).map_err(|error| error.to_string())?;
            Box::new(decoder)
        }
    };
    let stream =
        Counted { inner: stream, hasher: Hasher::new(), passed: 0, cap: cap.saturating_add(TAR_ROOM) };
    let mut tar = tar::Archive::new(stream);
    let mut bootstrap = None;
    let entries = tar.entries().map_err(|error| error.to_string())?;
    for entry in entries {
        let entry = entry.map_err(|error| format!("tar: {error}"))?;
        if entry.path_bytes().as_ref() != BOOTSTRAP_PATH.as_bytes() {
            continue;
        }
        let at = entry.raw_header_position();
        if bootstrap.is_some() {
            return Err(format!("a second `{BOOTSTRAP_PATH}` at byte {at}"));
        }
        if entry.header().entry_type() != tar::EntryType::Regular {
            return Err(format!("`{BOOTSTRAP_PATH}` at byte {at} is no plain file"));
        }
        let size = entry.size();
        if size == 0 || size > cap {
            return Err(format!("`{BOOTSTRAP_PATH}` at byte {at} has {size} bytes; 1 to {cap} are read"));
        }
        // Grown as bytes come, since the header may promise what is not there.
        let mut bytes = Vec::with_capacity(usize::try_from(size.min(16 << 20)).unwrap_or(0));
        entry.take(size).read_to_end(&mut bytes).map_err(|error| format!("`{BOOTSTRAP_PATH}`: {error}"))?;
        if u64::try_from(bytes.len()) != Ok(size) {
            return Err(format!("`{BOOTSTRAP_PATH}` ends after {} of {size} bytes", bytes.len()));
        }
        bootstrap = Some(bytes);
    }
    let mut stream = tar.into_inner();
    io::copy(&mut stream, &mut io::sink()).map_err(|error| error.to_string())?;
    let got = stream.hasher.finish();
    if let Some(diff_id) = diff_id.filter(|diff_id| *diff_id != got) {
        return Err(format!("it unpacks to {got}, the config's DiffID is {diff_id}"));
    }
    bootstrap.ok_or_else(|| format!("it has no file `{BOOTSTRAP_PATH}`"))
}
