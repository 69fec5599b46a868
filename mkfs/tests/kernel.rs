//! The running kernel and fsck.erofs judge images: mounted, an image must be what its source directory is.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    Converted, Entry, Packing, Tar, bootstrap_at, convert_input, convert_layers, manifest_at, noise,
};
use erofs_format::Image;
use erofs_format::blob_table::BlobFeatures;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::Digest as BlobDigest;
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci;
use skimmer_mkfs::{Compression, Digest, Input, Options, Pieces, Touch, device, optimize};
use skimmer_test_support::skip_this;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Why this machine cannot judge an image, if so: it mounts files as EROFS and has `fsck.erofs`.
fn cannot_judge() -> Option<String> {
    if !is_root() {
        return Some("needs root".to_owned());
    }
    // Only whether it starts: version 1.5 tells its version with a failing exit status.
    match Command::new("fsck.erofs").arg("--version").output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Some("fsck.erofs is not installed (package erofs-utils)".to_owned());
        }
        output => drop(output.unwrap()),
    }
    fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).err().map(|e| format!("the kernel has no erofs: {e}"))
}

/// A mounted image; unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).expect("our own mount");
    }
}

/// Mounts files as EROFS. An error of the kernel comes with its own words.
fn mount(dir: &Path, bootstrap: &Path, devices: &[PathBuf]) -> Result<Mounted, String> {
    let target = dir.join("mnt");
    fs::create_dir_all(&target).unwrap();
    let fs = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    let words = |fs: &OwnedFd, what: &str, e: rustix::io::Errno| {
        let mut log = [0; 4096];
        let len = rustix::io::read(fs, &mut log).unwrap_or(0);
        format!("{what}: {e}: {}", String::from_utf8_lossy(&log[..len]))
    };
    fsconfig_set_string(&fs, "source", bootstrap).map_err(|e| words(&fs, "source", e))?;
    for device in devices {
        fsconfig_set_string(&fs, "device", device).map_err(|e| words(&fs, "device", e))?;
    }
    fsconfig_create(&fs).map_err(|e| words(&fs, "create", e))?;
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
        .map_err(|e| words(&fs, "fsmount", e))?;
    move_mount(&mount, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
    Ok(Mounted(target))
}

/// `fsck.erofs` on bootstrap and devices (erofs-utils 1.5 does not know the flat form) finds nothing wrong.
fn fsck(made: &Converted, bootstrap: &Path, devices: &[PathBuf]) {
    let mut arguments = vec![bootstrap.display().to_string()];
    arguments.extend(devices.iter().map(|device| format!("--device={}", device.display())));
    let extract = made.dir.path().join("extracted");
    arguments.push(format!("--extract={}", extract.display()));
    // 3 GiB of zeros are not worth extracting; a plain check reads them all the same.
    if made.report.tree.file_bytes > 1 << 28 {
        arguments.pop();
    }
    let output = Command::new("fsck.erofs").args(&arguments).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "fsck.erofs {arguments:?}: {}: {text}", output.status);
    assert!(!text.contains("<E>"), "fsck.erofs {arguments:?}: {text}");
}

/// All that can be told about a file but its content.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    size: u64,
    nlink: u64,
    rdev: u64,
    target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(len);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn facts(path: &Path, is_root: bool) -> Facts {
    let meta = fs::symlink_metadata(path).unwrap();
    let is_file = meta.is_file();
    Facts {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: if is_root { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) },
        size: if meta.is_dir() { 0 } else { meta.size() },
        // Link counts of directories are a matter of the file system; hard links of other kinds are not kept.
        nlink: if is_file { meta.nlink() } else { 0 },
        rdev: meta.rdev(),
        target: meta.is_symlink().then(|| fs::read_link(path).unwrap()),
        xattrs: xattrs(path),
    }
}

/// Compares two trees completely, both ways. Returns the number of names.
fn compare(left: &Path, right: &Path) -> usize {
    let mut count = 0;
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let (a, b) = (left.join(&relative), right.join(&relative));
        assert_eq!(facts(&a, count == 0), facts(&b, count == 0), "{}", relative.display());
        count += 1;
        let kind = fs::symlink_metadata(&a).unwrap().file_type();
        if kind.is_dir() {
            let names = |dir: &Path| {
                let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
                let mut names: Vec<_> = entries.map(|e| (e.file_name(), e.file_type().unwrap())).collect();
                names.sort_by(|x, y| x.0.cmp(&y.0));
                names
            };
            let (ours, theirs) = (names(&a), names(&b));
            assert_eq!(ours, theirs, "{}", relative.display());
            let subdirectories = ours.iter().filter(|(_, kind)| kind.is_dir()).count();
            assert_eq!(
                fs::metadata(&b).unwrap().nlink(),
                2 + subdirectories as u64,
                "{}",
                relative.display()
            );
            todo.extend(ours.into_iter().map(|(name, _)| relative.join(name)));
        } else if kind.is_file() {
            same_content(&a, &b);
        }
        assert!(!kind.is_socket() || fs::symlink_metadata(&b).unwrap().file_type().is_socket());
    }
    count
}

fn same_content(a: &Path, b: &Path) {
    let (a_file, b_file) = (fs::File::open(a).unwrap(), fs::File::open(b).unwrap());
    let size = a_file.metadata().unwrap().len();
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let len = usize::try_from((size - at).min(1 << 20)).unwrap();
        a_file.read_exact_at(&mut x[..len], at).unwrap();
        b_file.read_exact_at(&mut y[..len], at).unwrap();
        assert!(x[..len] == y[..len], "{} at {at}", a.display());
        at += len as u64;
    }
}

fn set_mtime(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{name} on {}: {e}", path.display()));
}

/// A tree with one of everything, as the issue lists it.
fn everything(root: &Path, sparse_len: u64) {
    let dir = |name: &str| {
        let path = root.join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let file = |name: &str, content: &[u8]| {
        let path = root.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    file("empty", b"");
    for size in [1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 5 << 20] {
        file(&format!("size-{size}"), &noise(size, size as u64));
    }
    file("text", "the same line again and again\n".repeat(100_000).as_bytes());
    let path = file("setuid", b"#!");
    rustix::fs::chownat(
        CWD,
        &path,
        Some(rustix::fs::Uid::from_raw(1234)),
        Some(rustix::fs::Gid::from_raw(80_000)),
        AtFlags::empty(),
    )
    .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6711)).unwrap();
    set_xattr(&path, "security.capability", b"\x01\0\0\x02\0\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    set_mtime(&path, -5, 999_999_999);
    let acl: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x07\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x07\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let with_acl = dir("acl");
    set_xattr(&with_acl, "system.posix_acl_access", acl);
    set_xattr(&with_acl, "system.posix_acl_default", acl);
    let path = file("xattrs", b"");
    for i in 0..30 {
        set_xattr(&path, &format!("user.name{i}{}", "n".repeat(i)), &noise(i * 3, i as u64));
    }
    set_xattr(&path, "trusted.key", b"");
    for (name, kind, major, minor) in [
        ("null", FileType::CharacterDevice, 1, 3),
        ("disk", FileType::BlockDevice, 259, 70_000),
        ("fifo", FileType::Fifo, 0, 0),
        ("socket", FileType::Socket, 0, 0),
    ] {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
        set_xattr(&root.join(name), "trusted.kind", name.as_bytes());
    }
    let links = dir("links");
    for length in (1..=4095usize).filter(|n| *n < 20 || n % 128 < 2 || (3900..4095).contains(n) || *n == 4095)
    {
        std::os::unix::fs::symlink("t".repeat(length), links.join(format!("{length}"))).unwrap();
    }
    fs::hard_link(root.join("text"), root.join("links/text-again")).unwrap();
    fs::hard_link(root.join("text"), root.join("zz-text")).unwrap();
    let many = dir("many");
    for i in 0..3000 {
        fs::write(many.join(format!("{i}-{}", "m".repeat(i % 100))), i.to_string()).unwrap();
    }
    let names = dir("names");
    for name in [
        &b"!"[..],
        b"-x",
        b"+a",
        b"..a",
        b"...",
        b".-",
        b".\x01",
        b"\xff\xfe\xfd",
        b"new\nline",
        &[b'n'; 255],
    ] {
        fs::write(names.join(OsStr::from_bytes(name)), name).unwrap();
        set_mtime(&names.join(OsStr::from_bytes(name)), 1_700_000_000, 123);
    }
    for count in 0..80 {
        let path = names.join(format!("dir{count}"));
        fs::create_dir(&path).unwrap();
        for i in 0..count {
            fs::create_dir(path.join(format!("{}{i}", "s".repeat(count)))).unwrap();
        }
    }
    let mut deep = dir("deep");
    for i in 0..60 {
        deep = deep.join(format!("level{i}"));
        fs::create_dir(&deep).unwrap();
    }
    let mut sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(sparse_len).unwrap();
    for at in [0, 12_345_678, sparse_len / 3 * 2, sparse_len - 5] {
        sparse.seek(SeekFrom::Start(at)).unwrap();
        sparse.write_all(b"data!").unwrap();
    }
    drop(sparse);
    fs::File::create(root.join("hole-only")).unwrap().set_len(10 << 20).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o1751)).unwrap();
    set_xattr(root, "user.on-root", b"yes");
}

#[test]
fn a_directory_with_everything_mounts_as_it_is() {
    if let Some(why) = cannot_judge() {
        return skip_this(&why);
    }
    for (compression, digest, chunk_size, sparse_len) in [
        (Compression::Zstd { level: 3 }, Digest::Sha256, 1 << 20, 3 << 30),
        (Compression::None, Digest::Blake3, 1 << 16, 50 << 20),
    ] {
        let source = tempfile::tempdir().unwrap();
        everything(source.path(), sparse_len);
        let mut options = Options::default();
        (options.compression, options.digest, options.chunk_size) = (compression, digest, chunk_size);
        let made = convert_input(Input::Directory(source.path().to_owned()), &options).unwrap();
        made.image().check().unwrap();
        let again = convert_input(Input::Directory(source.path().to_owned()), &options).unwrap();
        assert_eq!(made.report.manifest, again.report.manifest, "two builds of the same input are identical");
        let (bootstrap, devices) = made.write_devices();
        fsck(&made, &bootstrap, &devices);
        let mounted = mount(made.dir.path(), &bootstrap, &devices).unwrap();
        let names = compare(source.path(), &mounted.0);
        assert!(names > 6000, "{names}");
        let directory = &made.report.tree;
        assert_eq!(
            directory.directories + directory.files + directory.symlinks + directory.special,
            names as u64
        );
        // statfs tells the sizes of the bootstrap and the devices, once.
        let stat = rustix::fs::statfs(&mounted.0).unwrap();
        let blocks: u64 = made.report.blobs.iter().map(|blob| blob.device_bytes / 4096).sum();
        assert_eq!(stat.f_blocks, blocks + made.report.bootstrap_bytes / 4096);
        drop(mounted);
        // The same as one flat file without devices.
        let flat = made.dir.path().join("flat");
        let mut file = fs::File::create(&flat).unwrap();
        device::flatten(&made.image(), |index| Ok(made.open_blob(index)), &mut file).unwrap();
        if let Err(e) = mount(made.dir.path(), &flat, &[]).map(|mounted| {
            same_content(&source.path().join("text"), &mounted.0.join("text"));
            same_content(&source.path().join("size-5242880"), &mounted.0.join("size-5242880"));
        }) {
            panic!("{e}");
        }
    }
}

#[test]
fn an_optimized_image_mounts_as_the_one_it_came_from() {
    if let Some(why) = cannot_judge() {
        return skip_this(&why);
    }
    for compression in [Compression::Zstd { level: 3 }, Compression::None] {
        let source = tempfile::tempdir().unwrap();
        everything(source.path(), 50 << 20);
        let mut options = Options::default();
        (options.compression, options.chunk_size) = (compression, 1 << 16);
        let made = convert_input(Input::Directory(source.path().to_owned()), &options).unwrap();
        let image = made.image();
        let blobs: Vec<BlobRef> = made
            .report
            .blobs
            .iter()
            .map(|blob| BlobRef { digest: blob.id.parse_hex(), size: blob.stored_bytes })
            .collect();
        let map = image.chunk_map(0).unwrap();
        let touch = |at: usize| {
            let chunk = &map[at];
            let length = u64::from(chunk.uncompressed_size);
            Touch { blob: image.blobs()[0].id.0, offset: chunk.uncompressed_offset, length }
        };
        // From the end to the start, one twice, one of another image, one over the edge of two chunks, and single
        // blocks here and there.
        let blob = image.blobs()[0].id.0;
        let mut trace: Vec<Touch> = (0..map.len()).step_by(7).rev().map(touch).collect();
        trace.push(trace[0]);
        trace.push(Touch { blob: [7; 32], offset: 0, length: 1 });
        let edge = map.windows(2).find(|pair| pair[0].uncompressed_size == 1 << 16).unwrap();
        trace.push(Touch { blob, offset: edge[1].uncompressed_offset - 1, length: 2 });
        let large = map.iter().filter(|chunk| chunk.uncompressed_size == 1 << 16);
        trace.extend(large.step_by(3).enumerate().map(|(count, chunk)| {
            let block = u64::try_from(count).unwrap() * 5 % 15 * 4096;
            Touch { blob, offset: chunk.uncompressed_offset + block + 100, length: 5000 }
        }));
        let manifest = manifest_at(&made.layout, &made.report.manifest);
        let config = made.layout.read_blob(&oci::blob_ref(manifest.config()).unwrap(), 1 << 20).unwrap();
        let from = skimmer_mkfs::Converted {
            name: "made",
            layout: &made.layout,
            blobs: &blobs,
            bootstrap: &made.bootstrap,
            config: &config,
            annotations: None,
        };
        let sizes = [Pieces::Blocks, Pieces::Chunks].map(|form| {
            let dir = made.dir.path().join(format!("{form:?}"));
            let output = Layout::create(&dir).unwrap();
            let optimized = optimize(&from, &trace, form, &output, &Options::default()).unwrap();
            let again = optimize(&from, &trace, form, &output, &Options::default()).unwrap();
            assert_eq!(optimized.manifest, again.manifest, "the same trace gives the same image");
            assert_eq!(optimized.strange_reads, 1);

            let bootstrap = bootstrap_at(&output, &optimized.manifest, &optimized.bootstrap);
            let image = Image::parse(&bootstrap).unwrap();
            assert_eq!(image.check().unwrap().wrong_link_counts, 0);
            let start = image.blobs().last().unwrap();
            assert_eq!(start.id.to_string(), optimized.start_blob);
            assert!(start.features.contains(BlobFeatures::SEPARATED_PREFETCH_FILES));
            let fine = form == Pieces::Blocks;
            assert_eq!(start.features.contains(BlobFeatures::FINE_INDEXES), fine);
            let first = image.chunk_map(start.index).unwrap()[0];
            assert_eq!(first.digest, map[(map.len() - 1) / 7 * 7].digest, "in the order of the trace");
            let path = dir.join("bootstrap");
            fs::write(&path, &bootstrap).unwrap();
            let devices: Vec<PathBuf> = (0..image.blobs().len())
                .map(|index| {
                    let blob = &image.blobs()[index];
                    let path = dir.join(format!("device-{index}"));
                    let mut file = fs::File::create(&path).unwrap();
                    file.set_len(blob.uncompressed_size).unwrap();
                    let reference =
                        BlobRef { digest: blob.id.to_string().parse_hex(), size: blob.compressed_size };
                    let mut stored = output.open_blob(&reference).unwrap();
                    device::expand_blob(&image, index, &mut stored, &mut file).unwrap();
                    path
                })
                .collect();
            let mounted = mount(&dir, &path, &devices).unwrap();
            compare(source.path(), &mounted.0);
            drop(mounted);

            let optimized_blobs: Vec<BlobRef> = image
                .blobs()
                .iter()
                .map(|blob| BlobRef { digest: blob.id.to_string().parse_hex(), size: blob.compressed_size })
                .collect();
            let twice = skimmer_mkfs::Converted {
                name: "optimized",
                layout: &output,
                blobs: &optimized_blobs,
                bootstrap: &bootstrap,
                config: &config,
                annotations: None,
            };
            let touch = Touch { blob: start.id.0, offset: 0, length: 1 };
            let again = optimize(&twice, &[touch], form, &output, &Options::default());
            match again {
                Ok(_) => assert!(!fine),
                Err(error) => assert!(fine && error.to_string().contains("optimized already"), "{error}"),
            }
            optimized.device_bytes
        });
        assert!(sizes[0] < sizes[1], "blocks take less than chunks: {sizes:?}");

        let output = Layout::create(made.dir.path().join("nothing")).unwrap();
        let nothing = optimize(
            &from,
            &[Touch { blob: [7; 32], offset: 0, length: 1 }],
            Pieces::Blocks,
            &output,
            &options,
        );
        assert!(nothing.unwrap_err().to_string().contains("trace"));
    }
}

trait ParseHex {
    fn parse_hex(&self) -> BlobDigest;
}

impl ParseHex for String {
    fn parse_hex(&self) -> BlobDigest {
        BlobDigest::from_hex(self).unwrap()
    }
}

#[test]
fn layers_mount_as_gnu_tar_unpacks_them() {
    if let Some(why) = cannot_judge() {
        return skip_this(&why);
    }
    let source = tempfile::tempdir().unwrap();
    let tree = source.path().join("tree");
    fs::create_dir(&tree).unwrap();
    everything(&tree, 50 << 20);
    // Sockets are left out by tar; ACLs it writes as text, which image unpackers do not read.
    fs::remove_file(tree.join("socket")).unwrap();
    fs::remove_dir(tree.join("acl")).unwrap();
    for format in ["pax", "gnu"] {
        let tar = source.path().join("layer.tar");
        let mut command = Command::new("tar");
        command.args([
            "-C",
            tree.to_str().unwrap(),
            "--sparse",
            "--format",
            format,
            "--numeric-owner",
            "-cf",
        ]);
        command.arg(&tar);
        if format == "pax" {
            command.args(["--xattrs", "--xattrs-include=*"]);
        }
        let output = command.arg(".").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let unpacked = source.path().join(format!("unpacked-{format}"));
        fs::create_dir(&unpacked).unwrap();
        let mut command = Command::new("tar");
        command.args(["-C", unpacked.to_str().unwrap(), "--numeric-owner", "-xpf"]).arg(&tar);
        if format == "pax" {
            command.args(["--xattrs", "--xattrs-include=*"]);
        }
        assert!(command.status().unwrap().success());
        let layers = [(fs::read(&tar).unwrap(), Packing::Zstd)];
        let made = convert_layers(&layers, &Options::default()).unwrap();
        let (bootstrap, devices) = made.write_devices();
        fsck(&made, &bootstrap, &devices);
        let mounted = mount(made.dir.path(), &bootstrap, &devices).unwrap();
        assert!(compare(&unpacked, &mounted.0) > 6000);
    }
}

#[test]
fn several_blobs_and_none_mount() {
    if let Some(why) = cannot_judge() {
        return skip_this(&why);
    }
    let layers: Vec<_> = (0..20u64)
        .map(|i| {
            let mut tar = Tar::default();
            tar.file(format!("f{i}"), &noise(30_000 + usize::try_from(i).unwrap() * 4096, i));
            tar.file("replaced", &i.to_le_bytes()).file(format!(".wh.f{}", i.wrapping_sub(3)), b"");
            tar.add("stamp", Entry::of(b'5').mtime(i), b"");
            (tar.end(), Packing::Gzip)
        })
        .collect();
    let made = convert_layers(&layers, &Options::default()).unwrap();
    let (bootstrap, devices) = made.write_devices();
    assert_eq!(devices.len(), 3, "only the last three layers' files are left");
    fsck(&made, &bootstrap, &devices);
    let mounted = mount(made.dir.path(), &bootstrap, &devices).unwrap();
    for i in 17..20u64 {
        let expected = noise(30_000 + usize::try_from(i).unwrap() * 4096, i);
        assert_eq!(fs::read(mounted.0.join(format!("f{i}"))).unwrap(), expected);
    }
    assert_eq!(fs::read(mounted.0.join("replaced")).unwrap(), 19u64.to_le_bytes());
    assert_eq!(fs::metadata(mounted.0.join("stamp")).unwrap().mtime(), 19);
    drop(mounted);

    let made =
        convert_layers(&[(Tar::default().dir("d").end(), Packing::Plain)], &Options::default()).unwrap();
    let (bootstrap, devices) = made.write_devices();
    assert!(devices.is_empty());
    fsck(&made, &bootstrap, &devices);
    let mounted = mount(made.dir.path(), &bootstrap, &devices).unwrap();
    assert!(mounted.0.join("d").is_dir());
}

#[test]
fn bad_directories_are_refused() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), b"content").unwrap();
    let inside = source.path().join("sub/out");
    fs::create_dir_all(source.path().join("sub")).unwrap();
    let layout = Layout::create(&inside).unwrap();
    let input = Input::Directory(source.path().to_owned());
    let error = skimmer_mkfs::convert(input, &layout, &Options::default(), &()).unwrap_err().to_string();
    assert!(error.contains("sub/out") && error.contains("inside"), "{error}");
    let missing = Input::Directory(source.path().join("missing"));
    let error = convert_input(missing, &Options::default()).map(|made| made.report).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    let file = Input::Directory(source.path().join("file"));
    assert!(convert_input(file, &Options::default()).is_err());
}

#[test]
fn a_file_that_changes_is_an_error() {
    // A thread that appends all the time: sizes and times differ between the first look and the last.
    let source = tempfile::tempdir().unwrap();
    let path = source.path().join("log");
    fs::write(&path, noise(64 << 20, 1)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut file = fs::File::options().append(true).open(&path).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                file.write_all(b"more\n").unwrap();
                std::thread::yield_now();
            }
        });
        let result = convert_input(Input::Directory(source.path().to_owned()), &Options::default());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    });
    let error = result.map(|made| made.report).unwrap_err().to_string();
    assert!(error.contains("log") && error.contains("changed"), "{error}");
}
