//! Builders of layers and images, and readers of results, shared by the tests.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use erofs_format::compression_info::CiHeader;
use erofs_format::{FileKind, Image};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci::{self, Document, ImageManifest};
use skimmer_mkfs::{Input, MkfsError, Options, Report, Selector, convert, device};
use zerocopy::FromBytes as _;

/// A tar under construction: ustar headers, PAX records where asked for.
#[derive(Default, Clone)]
pub struct Tar {
    pub bytes: Vec<u8>,
}

/// One entry's fields with what most tests want.
#[derive(Clone)]
pub struct Entry {
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    pub fn of(kind: u8) -> Self {
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        Self { kind, mode, uid: 0, gid: 0, mtime: 1, link: vec![], device: (0, 0), pax: vec![] }
    }

    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn link(mut self, target: impl AsRef<[u8]>) -> Self {
        self.link = target.as_ref().to_vec();
        self
    }

    pub fn device(mut self, major: u32, minor: u32) -> Self {
        self.device = (major, minor);
        self
    }

    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }
}

pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = [b" ", key, b"=", value, b"\n"].concat();
    let mut len = body.len() + 1;
    while len.to_string().len() + body.len() != len {
        len = len.to_string().len() + body.len();
    }
    [len.to_string().into_bytes(), body].concat()
}

impl Tar {
    pub fn raw(&mut self, kind: u8, name: &[u8], entry: &Entry, size: u64, content: &[u8]) -> &mut Self {
        let mut header = tar::Header::new_gnu();
        {
            let old = header.as_old_mut();
            let len = name.len().min(100);
            old.name[..len].copy_from_slice(&name[..len]);
            let len = entry.link.len().min(100);
            old.linkname[..len].copy_from_slice(&entry.link[..len]);
            old.linkflag[0] = kind;
        }
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime);
        header.set_size(size);
        header.set_device_major(entry.device.0).unwrap();
        header.set_device_minor(entry.device.1).unwrap();
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.data(content)
    }

    pub fn data(&mut self, content: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// Adds an entry; long names and links go into a PAX header.
    pub fn add(&mut self, name: impl AsRef<[u8]>, entry: Entry, content: &[u8]) -> &mut Self {
        let name = name.as_ref();
        let mut records = Vec::new();
        if name.len() > 100 {
            records.extend(pax_record(b"path", name));
        }
        if entry.link.len() > 100 {
            records.extend(pax_record(b"linkpath", &entry.link));
        }
        for (key, value) in &entry.pax {
            records.extend(pax_record(key, value));
        }
        if !records.is_empty() {
            self.raw(b'x', b"PaxHeaders/x", &Entry::of(b'0'), records.len() as u64, &records);
        }
        self.raw(entry.kind, name, &entry, content.len() as u64, content)
    }

    pub fn file(&mut self, name: impl AsRef<[u8]>, content: &[u8]) -> &mut Self {
        self.add(name, Entry::of(b'0'), content)
    }

    pub fn dir(&mut self, name: impl AsRef<[u8]>) -> &mut Self {
        self.add(name, Entry::of(b'5'), b"")
    }

    pub fn symlink(&mut self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        self.add(name, Entry::of(b'2').link(target).mode(0o777), b"")
    }

    pub fn hard_link(&mut self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> &mut Self {
        self.add(name, Entry::of(b'1').link(target), b"")
    }

    pub fn end(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

pub fn pack(tar: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => tar.to_vec(),
        Packing::Gzip => {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(tar).unwrap();
            out.finish().unwrap()
        }
        Packing::Zstd => zstd::bulk::compress(tar, 1).unwrap(),
    }
}

/// Puts an image of these tars into a new layout below `dir`.
pub fn make_image(dir: &Path, layers: &[(Vec<u8>, Packing)]) -> Layout {
    let layout = Layout::create(dir).unwrap();
    let mut diff_ids = Vec::new();
    let mut descriptors = Vec::new();
    for (tar, packing) in layers {
        let blob = layout.put_blob(&pack(tar, *packing)).unwrap();
        diff_ids.push(Digest::of(tar).to_string());
        let media_type = match packing {
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
            Packing::Gzip => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        descriptors.push(serde_json::json!(
            { "mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size }
        ));
    }
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/sh"], "Healthcheck": { "Test": ["NONE"] } },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": layers.iter().map(|_| serde_json::json!({ "created_by": "test" })).collect::<Vec<_>>(),
    });
    let config = layout.put_blob(config.to_string().as_bytes()).unwrap();
    put_manifest(&layout, &config, &descriptors);
    layout
}

pub fn put_manifest(layout: &Layout, config: &BlobRef, layers: &[serde_json::Value]) {
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": oci::MEDIA_TYPE_MANIFEST, "layers": layers,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest.to_string(), "size": config.size,
        },
        "annotations": { "org.example.key": "value" },
    });
    let manifest = layout.put_blob(manifest.to_string().as_bytes()).unwrap();
    let descriptor = serde_json::json!({
        "mediaType": oci::MEDIA_TYPE_MANIFEST, "digest": manifest.digest.to_string(), "size": manifest.size,
    });
    layout.add_image(serde_json::from_value(descriptor).unwrap(), Some("v1")).unwrap();
}

/// A converted image on disk.
pub struct Converted {
    pub dir: tempfile::TempDir,
    pub layout: Layout,
    pub report: Report,
    pub bootstrap: Vec<u8>,
}

pub fn convert_input(input: Input, options: &Options) -> Result<Converted, MkfsError> {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::create(dir.path().join("out")).unwrap();
    let report = convert(input, &layout, options, &())?;
    let bootstrap = bootstrap_of(&layout, &report);
    Ok(Converted { dir, layout, report, bootstrap })
}

/// Converts an image of these tars.
pub fn convert_layers(layers: &[(Vec<u8>, Packing)], options: &Options) -> Result<Converted, MkfsError> {
    let dir = tempfile::tempdir().unwrap();
    let layout = make_image(&dir.path().join("in"), layers);
    convert_input(Input::Layout { layout, selector: Selector::default() }, options)
}

pub fn manifest_of(layout: &Layout, report: &Report) -> ImageManifest {
    manifest_at(layout, &report.manifest)
}

pub fn manifest_at(layout: &Layout, digest: &str) -> ImageManifest {
    let descriptor = layout.resolve(Some(digest)).unwrap();
    match layout.document(&descriptor).unwrap() {
        Document::Manifest(manifest) => ImageManifest::clone(&manifest),
        Document::Index(_) => panic!("a manifest was expected"),
    }
}

/// The bootstrap out of the last layer, found as any reader would find it.
pub fn bootstrap_of(layout: &Layout, report: &Report) -> Vec<u8> {
    bootstrap_at(layout, &report.manifest, &report.bootstrap)
}

pub fn bootstrap_at(layout: &Layout, manifest: &str, bootstrap: &str) -> Vec<u8> {
    let manifest = manifest_at(layout, manifest);
    assert!(oci::is_converted(&manifest));
    let layer = oci::blob_ref(manifest.layers().last().unwrap()).unwrap();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layout.open_blob(&layer).unwrap()));
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap() == Path::new(oci::BOOTSTRAP_PATH) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            assert_eq!(Digest::of(&bytes).hex(), bootstrap);
            return bytes;
        }
    }
    panic!("the last layer has no bootstrap");
}

impl Converted {
    pub fn image(&self) -> Image<'_> {
        Image::parse(&self.bootstrap).unwrap()
    }

    pub fn open_blob(&self, index: usize) -> File {
        let blob = &self.report.blobs[index];
        let blob = BlobRef { digest: Digest::from_hex(&blob.id).unwrap(), size: blob.stored_bytes };
        self.layout.open_blob(&blob).unwrap()
    }

    /// Writes bootstrap and device files next to the layout.
    pub fn write_devices(&self) -> (PathBuf, Vec<PathBuf>) {
        let bootstrap = self.dir.path().join("bootstrap");
        std::fs::write(&bootstrap, &self.bootstrap).unwrap();
        let image = self.image();
        let devices = (0..image.blobs().len()).map(|index| {
            let path = self.dir.path().join(format!("device-{index}"));
            let mut file =
                File::options().write(true).read(true).create(true).truncate(true).open(&path).unwrap();
            file.set_len(image.blobs()[index].uncompressed_size).unwrap();
            let expanded = device::expand_blob(&image, index, &mut self.open_blob(index), &mut file).unwrap();
            assert_eq!(expanded.chunks, self.report.blobs[index].referenced_chunks as u64);
            path
        });
        (bootstrap, devices.collect())
    }

    /// Checks the image with our own reader and reads all of it back: path to node.
    pub fn read_back(&self) -> BTreeMap<Vec<u8>, Node> {
        let image = self.image();
        assert_eq!(image.check().unwrap().wrong_link_counts, 0);
        let dump = erofs_format::dump::dump(&self.bootstrap).unwrap();
        assert_eq!((dump.unaccounted(), dump.overlapping()), (0, 0));
        for (index, blob) in image.blobs().iter().enumerate() {
            let mut file = self.open_blob(index);
            file.seek(SeekFrom::Start(blob.ci_offset)).unwrap();
            let mut ci = vec![0; blob.ci_compressed_size.try_into().unwrap()];
            file.read_exact(&mut ci).unwrap();
            let mut header = Vec::new();
            file.read_to_end(&mut header).unwrap();
            let header = CiHeader::read_from_bytes(&header).unwrap();
            let checked = image.check_blob(index, &header, &ci).unwrap();
            assert_eq!(checked.chunks, self.report.blobs[index].chunks as u64);
            assert_eq!(checked.referenced, self.report.blobs[index].referenced_chunks as u64);
        }
        let devices: Vec<Vec<u8>> = (0..image.blobs().len())
            .map(|index| {
                let size = image.blobs()[index].uncompressed_size;
                let mut out = std::io::Cursor::new(vec![0; size.try_into().unwrap()]);
                device::expand_blob(&image, index, &mut self.open_blob(index), &mut out).unwrap();
                out.into_inner()
            })
            .collect();
        let mut nodes = BTreeMap::new();
        let mut todo = vec![(Vec::new(), image.root().unwrap())];
        while let Some((path, inode)) = todo.pop() {
            let xattrs = inode.xattrs().map(|x| x.unwrap());
            let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = xattrs.map(|x| (x.name(), x.value.to_vec())).collect();
            let mut content = Vec::new();
            match inode.kind {
                FileKind::Directory => {
                    for entry in inode.entries() {
                        let entry = entry.unwrap();
                        if !matches!(entry.name, b"." | b"..") {
                            let child = [path.as_slice(), b"/", entry.name].concat();
                            todo.push((child, image.inode(entry.nid).unwrap()));
                        }
                    }
                }
                FileKind::Symlink => content = inode.target().unwrap().unwrap().to_vec(),
                FileKind::Regular => {
                    for chunk in inode.chunks() {
                        let chunk = chunk.unwrap();
                        let start: usize = chunk.device_offset.try_into().unwrap();
                        let left: usize = usize::try_from(inode.size).unwrap() - content.len();
                        let len = usize::try_from(chunk.size).unwrap();
                        assert!(len <= left);
                        content.extend_from_slice(&devices[chunk.blob][start..start + len]);
                    }
                    assert_eq!(content.len() as u64, inode.size);
                }
                _ => {}
            }
            nodes.insert(
                path,
                Node {
                    kind: inode.kind,
                    mode: u32::from(inode.mode) & 0o7777,
                    owner: (inode.uid, inode.gid),
                    mtime: (inode.mtime, inode.mtime_nsec),
                    nlink: inode.nlink,
                    nid: inode.nid,
                    xattrs,
                    content,
                },
            );
        }
        nodes
    }
}

/// One file of an image as it was read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: FileKind,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub nlink: u32,
    pub nid: u64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub content: Vec<u8>,
}

/// Deterministic bytes that do not compress.
pub fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        out.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    out.truncate(len);
    out
}
