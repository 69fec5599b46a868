//! The documented test vector (rafs-v6 §24): the same tree gives the same blob, device and bootstrap.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Entry, Packing, Tar, convert_layers};
use sha2::{Digest as _, Sha256};
use skimmer_mkfs::{Compression, Options};

fn tree() -> Vec<u8> {
    let mut tar = Tar::default();
    tar.add("./", Entry::of(b'5').mtime(0), b"");
    tar.add("a", Entry::of(b'0').pax("SCHILY.xattr.user.k", "v"), b"hello\n");
    tar.dir("d/").file("d/b", b"hello\n").file("d/c", &[b'z'; 5000]).symlink("l", "d/c");
    tar.end()
}

fn options() -> Options {
    let mut options = Options::default();
    options.compression = Compression::None;
    options.crc32 = false;
    options
}

#[test]
fn blob_device_and_bootstrap_are_as_documented() {
    let made = convert_layers(&[(tree(), Packing::Gzip)], &options()).unwrap();
    let [blob] = made.report.blobs.as_slice() else { panic!("one blob") };
    assert_eq!(blob.id, "930efd9e67a24468b9736255654e46a64b2e638fa3e04cf3b0211a9620c97107");
    assert_eq!((blob.stored_bytes, blob.device_bytes, blob.chunks), (9134, 12288, 2));
    let (_, devices) = made.write_devices();
    let device = Sha256::digest(std::fs::read(&devices[0]).unwrap());
    assert_eq!(hex::encode(device), "4018352c85c51a611821dcf2968e627f362c4873e41b1cf2c1171d0386db66d6");

    // The documented bootstrap counts the devices' blocks (3) in the superblock, ours its own (5).
    let mut bootstrap = made.bootstrap.clone();
    assert_eq!(bootstrap[1060], 5);
    bootstrap[1060] = 3;
    assert_eq!(bootstrap.len(), 20480);
    assert_eq!(
        hex::encode(Sha256::digest(&bootstrap)),
        "fe0f221ddc014e3499ebb28b5498d1311c6f466a4dd797dc67d7a4174053836c"
    );
}

#[test]
fn input_compression_does_not_matter() {
    let ids = [Packing::Plain, Packing::Gzip, Packing::Zstd].map(|packing| {
        let made = convert_layers(&[(tree(), packing)], &options()).unwrap();
        (made.report.bootstrap.clone(), made.report.manifest.clone())
    });
    assert_eq!(ids[0], ids[1]);
    assert_eq!(ids[0], ids[2]);
}
