//! Images of several layers: what is merged, what is stored once, what is refused.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Converted, Entry, Packing, Tar, convert_layers, make_image, manifest_of, noise, pax_record};
use erofs_format::FileKind;
use skimmer_fetcher::layout::Layout;
use skimmer_fetcher::oci;
use skimmer_mkfs::{Compression, Digest, Input, Options, Selector, convert};

const MIB: usize = 1 << 20;

fn convert_plain(tars: &[Vec<u8>]) -> Converted {
    let layers: Vec<_> = tars.iter().map(|tar| (tar.clone(), Packing::Gzip)).collect();
    convert_layers(&layers, &Options::default()).unwrap()
}

fn refused(tar: &Tar) -> String {
    let layers = [(Tar::default().file("base", b"x").end(), Packing::Gzip), (tar.end(), Packing::Zstd)];
    let error = convert_layers(&layers, &Options::default()).map(|made| made.report).unwrap_err();
    error.to_string()
}

#[test]
fn metadata_of_every_kind_survives() {
    let acl =
        b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let capability = b"\x01\0\0\x02\0\x0a\0\0\0\0\0\0=\n7 a=b\n\0";
    let long = b"n".repeat(255);
    let target = b"t".repeat(4095);
    let mut tar = Tar::default();
    tar.add("f", Entry::of(b'0').mode(0o4755).owner(1000, 70000).pax("mtime", "12.345678901"), b"data")
        .add(
            "x",
            Entry::of(b'0')
                .pax("SCHILY.xattr.security.capability", capability)
                .pax("SCHILY.xattr.user.b", ""),
            b"",
        )
        .add("acl", Entry::of(b'0').pax("SCHILY.xattr.system.posix_acl_access", acl), b"")
        .add("null", Entry::of(b'3').device(1, 3), b"")
        .add("disk", Entry::of(b'4').device(259, 300_000), b"")
        .add("fifo", Entry::of(b'6').mode(0o600), b"")
        .add(&long, Entry::of(b'0'), b"long")
        .add(b"\xff\xfe!", Entry::of(b'0'), b"bytes")
        .symlink("link", &target)
        .hard_link("f2", "./f")
        .add("old", Entry::of(b'0').pax("mtime", "-1.5"), b"")
        .add("big-ids", Entry::of(b'0').pax("uid", "4294967294").pax("gid", "4000000000"), b"");
    let made = convert_plain(&[tar.end()]);
    let nodes = made.read_back();
    let get = |name: &[u8]| nodes.get(&[b"/", name].concat()).unwrap();
    let f = get(b"f");
    assert_eq!((f.mode, f.owner, f.mtime, f.nlink), (0o4755, (1000, 70000), (12, 345_678_901), 2));
    assert_eq!(f.nid, get(b"f2").nid);
    assert_eq!(get(b"x").xattrs[&b"security.capability"[..]], capability);
    assert_eq!(get(b"x").xattrs[&b"user.b"[..]], b"");
    assert_eq!(get(b"acl").xattrs[&b"system.posix_acl_access"[..]], acl);
    assert_eq!(get(b"null").kind, FileKind::CharDevice);
    assert_eq!(get(b"fifo").kind, FileKind::Fifo);
    assert_eq!(get(&long).content, b"long");
    assert_eq!(get(b"\xff\xfe!").content, b"bytes");
    assert_eq!(get(b"link").content, target);
    assert_eq!(get(b"old").mtime, (-2, 500_000_000));
    assert_eq!(get(b"big-ids").owner, (4_294_967_294, 4_000_000_000));
    let image = made.image();
    let disk = image.lookup(b"/disk").unwrap().unwrap();
    let rdev = disk.rdev.unwrap();
    assert_eq!((rdev.major, rdev.minor), (259, 300_000));
}

#[test]
fn chunks_are_stored_once_in_the_lowest_layer_that_has_them() {
    let data = noise(3 * MIB + 7, 1);
    let lower = Tar::default().file("a", &data).file("b", &data).end();
    let upper = Tar::default().file("c", &data).file("d", &noise(MIB, 2)).end();
    let only_known = Tar::default().file("e", &data[..2 * MIB]).end();
    let made = convert_plain(&[lower.clone(), upper.clone(), only_known]);
    let chunks: Vec<_> = made.report.blobs.iter().map(|blob| (blob.chunks, blob.referenced_chunks)).collect();
    assert_eq!(chunks, [(4, 4), (1, 1)], "the third layer brings nothing new and has no blob");
    assert_eq!((made.report.dedup.chunks_read, made.report.dedup.chunks_stored), (15, 5));
    assert_eq!(made.read_back()[&b"/c"[..]].content, data);
    // The history of the layer without a blob says so, that of the others does not.
    let manifest = manifest_of(&made.layout, &made.report);
    let config = oci::blob_ref(manifest.config()).unwrap();
    let config = made.layout.read_blob(&config, 1 << 20).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let empty: Vec<_> =
        config["history"].as_array().unwrap().iter().map(|h| h["empty_layer"] == true).collect();
    assert_eq!(empty, [false, false, true, false]);
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 3);
    assert_eq!(config["config"]["Healthcheck"]["Test"][0], "NONE", "unknown keys live on");

    // A layer's blob depends on it and the layers below only.
    let alone = convert_plain(std::slice::from_ref(&lower));
    assert_eq!(alone.report.blobs[0].id, made.report.blobs[0].id);
    let more = convert_plain(&[lower, upper, Tar::default().file("z", &noise(9, 9)).end()]);
    assert_eq!(more.report.blobs[1].id, made.report.blobs[1].id);
}

#[test]
fn blobs_that_upper_layers_hide_are_left_out() {
    let lower = Tar::default().file("gone", b"some bytes").end();
    let upper = Tar::default().file(".wh.gone", b"").file("here", b"other bytes").end();
    let made = convert_plain(&[lower, upper]);
    assert_eq!(made.report.blobs.len(), 1);
    assert_eq!(made.report.hidden_blobs, 1);
    assert_eq!(made.read_back().keys().map(Vec::as_slice).collect::<Vec<_>>(), [&b""[..], b"/here"]);
    assert_eq!(manifest_of(&made.layout, &made.report).layers().len(), 2);
}

#[test]
fn same_input_same_bytes_for_any_number_of_threads() {
    let mut tar = Tar::default();
    for i in 0..200u64 {
        tar.file(format!("f{i}"), &noise(usize::try_from(i * 97 % 5000).unwrap(), i % 50));
        tar.file(
            format!("text{i}"),
            format!("line {i}\n").repeat(usize::try_from(i * 10).unwrap()).as_bytes(),
        );
    }
    tar.file("big", &noise(5 * MIB, 77)).file("zero", &vec![0; 4 * MIB]);
    let layers = [
        (tar.end(), Packing::Gzip),
        (Tar::default().file("zero2", &vec![0; 3 * MIB + 5]).end(), Packing::Zstd),
    ];
    for digest in [Digest::Sha256, Digest::Blake3] {
        for compression in [Compression::None, Compression::Zstd { level: 3 }] {
            let reports = [1, 2, 7].map(|threads| {
                let mut options = Options::default();
                (options.digest, options.compression) = (digest, compression);
                options.threads = std::num::NonZeroUsize::new(threads);
                let made = convert_layers(&layers, &options).unwrap();
                made.read_back();
                (made.report.manifest.clone(), made.report.bootstrap.clone())
            });
            assert_eq!(reports[0], reports[1]);
            assert_eq!(reports[0], reports[2]);
        }
    }
}

#[test]
fn all_forms_of_sparse_files() {
    let size = 3 * MIB + 1000;
    let mut expected = vec![0; size];
    expected[MIB + 5..MIB + 15].copy_from_slice(b"0123456789");
    expected[size - 3..].copy_from_slice(b"end");
    let stored = b"0123456789end";
    let map = [(MIB + 5, 10), (size - 3, 3)];
    let mut tar = Tar::default();
    let numbers =
        map.iter().flat_map(|(start, len)| [start.to_string(), len.to_string()]).collect::<Vec<_>>();
    tar.add(
        "v0.0",
        Entry::of(b'0')
            .pax("GNU.sparse.size", size.to_string())
            .pax("GNU.sparse.numblocks", "2")
            .pax("GNU.sparse.offset", &numbers[0])
            .pax("GNU.sparse.numbytes", &numbers[1])
            .pax("GNU.sparse.offset", &numbers[2])
            .pax("GNU.sparse.numbytes", &numbers[3]),
        stored,
    );
    tar.add(
        "GNUSparseFile.0/v0.1",
        Entry::of(b'0')
            .pax("GNU.sparse.size", size.to_string())
            .pax("GNU.sparse.name", "v0.1")
            .pax("GNU.sparse.map", numbers.join(",")),
        stored,
    );
    let mut with_map = format!("2\n{}\n", numbers.join("\n")).into_bytes();
    with_map.resize(512, 0);
    with_map.extend_from_slice(stored);
    tar.add(
        "GNUSparseFile.0/v1.0",
        Entry::of(b'0')
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", "v1.0")
            .pax("GNU.sparse.realsize", size.to_string()),
        &with_map,
    );
    // The old GNU form, with a block of more ranges.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("gnu").unwrap();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(stored.len() as u64);
    let octal = |field: &mut [u8], value: usize| field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    {
        let gnu = header.as_gnu_mut().unwrap();
        octal(&mut gnu.realsize, size);
        octal(&mut gnu.sparse[0].offset, map[0].0);
        octal(&mut gnu.sparse[0].numbytes, 4);
        octal(&mut gnu.sparse[1].offset, map[0].0 + 4);
        octal(&mut gnu.sparse[1].numbytes, 6);
        gnu.set_is_extended(true);
    }
    header.set_cksum();
    let mut more = tar::GnuExtSparseHeader::new();
    octal(&mut more.sparse[0].offset, map[1].0);
    octal(&mut more.sparse[0].numbytes, map[1].1);
    tar.bytes.extend_from_slice(header.as_bytes());
    tar.bytes.extend_from_slice(more.as_bytes());
    tar.data(stored).file("after", b"after");
    let nodes = convert_plain(&[tar.end()]).read_back();
    for name in ["/v0.0", "/v0.1", "/v1.0", "/gnu"] {
        assert!(nodes[name.as_bytes()].content == expected, "{name}");
    }
    assert_eq!(nodes[&b"/after"[..]].content, b"after");
}

#[test]
fn sizes_around_chunk_and_block_edges() {
    let mut tar = Tar::default();
    let sizes: Vec<usize> =
        [0, 1, 4095, 4096, 4097].into_iter().chain([8191, 8192, 8193, 12288, 65536 + 1]).collect();
    for &size in &sizes {
        tar.file(format!("f{size}"), &noise(size, size as u64));
    }
    let mut options = Options::default();
    options.chunk_size = 4096;
    let made = convert_layers(&[(tar.end(), Packing::Plain)], &options).unwrap();
    let nodes = made.read_back();
    for &size in &sizes {
        assert_eq!(nodes[format!("/f{size}").as_bytes()].content, noise(size, size as u64));
    }
}

#[test]
fn directories_and_symlinks_around_block_edges() {
    let mut tar = Tar::default();
    for i in 0..3000 {
        tar.file(format!("many/{i:04}-{}", "x".repeat(i % 60)), b"");
    }
    for name in
        ["!", "-x", "+a", ".", "..a", ".-", ".\u{1}", "0", "..."].into_iter().filter(|name| *name != ".")
    {
        tar.file(format!("dots/{name}"), name.as_bytes());
    }
    for len in (1..4096).step_by(1) {
        if len < 40 || len % 64 < 3 || len > 3900 {
            tar.symlink(format!("s/{len}"), "t".repeat(len));
        }
    }
    for count in 0..40 {
        // Directory sizes from a few bytes to over a block, with inline tails of every length.
        for i in 0..count * 3 {
            tar.file(format!("d{count}/{}{i}", "y".repeat(count)), b"");
        }
        tar.dir(format!("d{count}/"));
    }
    let made = convert_plain(&[tar.end()]);
    let nodes = made.read_back();
    assert_eq!(nodes.keys().filter(|path| path.starts_with(b"/many/")).count(), 3000);
    assert_eq!(nodes[&b"/dots/-x"[..]].content, b"-x");
    assert_eq!(nodes[&b"/s/4000"[..]].content, "t".repeat(4000).as_bytes());
    let image = made.image();
    let last = format!("/many/2999-{}", "x".repeat(2999 % 60));
    for name in ["/dots/!", "/dots/...", "/dots/..a", "/dots/.-", "/dots/0", &last] {
        assert!(image.lookup(name.as_bytes()).unwrap().is_some(), "{name}");
    }
}

#[test]
fn hostile_entries_are_named_with_layer_and_offset() {
    let at = |tar: &Tar| tar.bytes.len();
    for (name, expected) in [
        ("../evil", "leaves the root"),
        ("a/../../evil", "leaves the root"),
        (".wh.", "whiteout"),
        (".wh...", "whiteout"),
        ("base/x", "\"base\" is not a directory"),
    ] {
        let mut tar = Tar::default();
        tar.file("good", b"good");
        let offset = at(&tar);
        tar.file(name, b"");
        let message = refused(&tar);
        assert!(message.contains(expected), "{name}: {message}");
        assert!(message.contains(&format!("\"{name}\" at tar offset {offset}")), "{message}");
        assert!(message.starts_with("layer sha256:"), "{message}");
    }
    for (make, expected) in [
        (Tar::default().symlink("l", "../..").file("l/x", b""), "leaves the root"),
        (Tar::default().symlink("l", "/../etc").file("l/passwd", b"x"), "leaves the root"),
        (Tar::default().symlink("l", "/..").hard_link("h", "l/etc/passwd"), "leaves the root"),
        (Tar::default().symlink("l", "/m").symlink("m", "/l").file("l/x", b""), "more than 40 symlinks"),
        (Tar::default().symlink("l", "l").file("l/x", b""), "more than 40 symlinks"),
        (Tar::default().hard_link("h", "../../etc/passwd"), "leaves the root"),
        (Tar::default().hard_link("h", "nothing"), "neither this layer"),
        (Tar::default().hard_link("h", "later").file("later", b""), "neither this layer"),
        (Tar::default().dir("d").hard_link("h", "d"), "directory"),
        (Tar::default().symlink("s", ""), "is empty"),
        (Tar::default().symlink("s", "t".repeat(4096)), "4096 bytes"),
        (Tar::default().file("n".repeat(256), b""), "256 bytes"),
        (Tar::default().add("d", Entry::of(b'3').device(5000, 1), b""), "major number"),
        (Tar::default().add("x", Entry::of(b'0').pax("SCHILY.xattr.foo.bar", "1"), b""), "foo.bar"),
        (Tar::default().add("v", Entry::of(b'V'), b""), "unknown tar entry type"),
        (Tar::default().file(".", b""), "must be a directory"),
        (
            Tar::default().add(
                "s",
                Entry::of(b'0').pax("GNU.sparse.map", "0,5").pax("GNU.sparse.size", "2"),
                b"12345",
            ),
            "sparse map",
        ),
        (
            Tar::default().add(
                "s",
                Entry::of(b'0').pax("GNU.sparse.map", "").pax("GNU.sparse.size", (1u64 << 62).to_string()),
                b"",
            ),
            "choose a larger chunk size",
        ),
    ]
    .map(|(tar, expected)| (tar.clone(), expected))
    {
        let message = refused(&make);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn absolute_symlinks_lead_from_the_root_of_the_image() {
    let mut lower = Tar::default();
    lower.dir("run").dir("var").symlink("var/run", "/run").symlink("etc", "/usr/./etc");
    lower.file("run/old", b"old").file("run/stays", b"stays");
    let mut upper = Tar::default();
    upper.file("var/run/pid", b"1").file("var/run/.wh.old", b"").file("etc/passwd", b"root");
    upper.hard_link("link", "var/run/stays");
    let layers = [(lower.end(), Packing::Gzip), (upper.end(), Packing::Zstd)];
    let made = convert_layers(&layers, &Options::default()).unwrap();
    let nodes = made.read_back();
    let content = |path: &str| nodes.get(path.as_bytes()).map(|node| node.content.as_slice());
    assert_eq!(content("/run/pid"), Some(&b"1"[..]));
    assert_eq!(content("/run/stays"), Some(&b"stays"[..]));
    assert_eq!(content("/link"), Some(&b"stays"[..]));
    assert_eq!(content("/run/old"), None);
    assert_eq!(content("/usr/etc/passwd"), Some(&b"root"[..]));
    // The links are still what they were.
    assert_eq!(content("/var/run"), Some(&b"/run"[..]));
    assert_eq!(content("/etc"), Some(&b"/usr/./etc"[..]));

    let mut options = Options::default();
    options.follow_absolute_symlinks = false;
    let message = convert_layers(&layers, &options).map(|made| made.report).unwrap_err().to_string();
    assert!(message.contains("\"var/run/pid\"") && message.contains("\"var/run\" -> \"/run\""), "{message}");
}

#[test]
fn damaged_streams_are_refused() {
    let mut tar = Tar::default();
    tar.file("a", &noise(3000, 1)).file("b", b"b");
    let whole = tar.end();
    let convert_one = |tar: Vec<u8>| {
        convert_layers(&[(tar, Packing::Gzip)], &Options::default())
            .map(|made| made.report)
            .unwrap_err()
            .to_string()
    };
    let message = convert_one(whole[..2000].to_vec());
    assert!(message.contains("ends in the data of \"a\""), "{message}");
    let message = convert_one(whole[..300].to_vec());
    assert!(message.contains("middle of a header"), "{message}");
    let mut bad = whole.clone();
    bad[3] ^= 1;
    let message = convert_one(bad);
    assert!(message.contains("checksum"), "{message}");
    let mut pax = Tar::default();
    pax.raw(b'x', b"x", &Entry::of(b'0'), 1 << 40, b"");
    assert!(convert_one(pax.end()).contains("PAX extended header"));
    let mut long = Tar::default();
    long.raw(b'L', b"x", &Entry::of(b'0'), 1 << 40, b"");
    assert!(convert_one(long.end()).contains("GNU long name"));
    let mut lonely = Tar::default();
    let records = pax_record(b"path", b"p");
    lonely.raw(b'x', b"x", &Entry::of(b'0'), records.len() as u64, &records);
    assert!(convert_one(lonely.bytes.clone()).contains("last in the tar"));
}

#[test]
fn gnu_long_names_and_links() {
    let name = format!("dir/{}", "n".repeat(200));
    let target = "t".repeat(300);
    let mut tar = Tar::default();
    let cstr = |text: &str| [text.as_bytes(), b"\0"].concat();
    tar.raw(b'L', b"././@LongLink", &Entry::of(b'0'), name.len() as u64 + 1, &cstr(&name));
    tar.raw(b'K', b"././@LongLink", &Entry::of(b'0'), target.len() as u64 + 1, &cstr(&target));
    tar.raw(b'2', &name.as_bytes()[..100], &Entry::of(b'2').link(&target[..100]), 0, b"");
    let nodes = convert_plain(&[tar.end()]).read_back();
    assert_eq!(nodes[format!("/{name}").as_bytes()].content, target.as_bytes());
}

#[test]
fn layers_are_checked_against_their_digests_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", &noise(100_000, 3)).end();
    let layout = make_image(&dir.path().join("in"), &[(tar.clone(), Packing::Plain), (tar, Packing::Gzip)]);
    let descriptor = layout.resolve(None).unwrap();
    let oci::Document::Manifest(manifest) = layout.document(&descriptor).unwrap() else {
        panic!("a manifest")
    };
    let blob = oci::blob_ref(&manifest.layers()[1]).unwrap();
    let path = layout.blob_path(&blob.digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4] ^= 1; // the time stamp in the gzip header: the content stays the same
    std::fs::write(&path, bytes).unwrap();
    let out = Layout::create(dir.path().join("out")).unwrap();
    let input = Input::Layout { layout: layout.clone(), selector: Selector::default() };
    let message = convert(input, &out, &Options::default(), &()).unwrap_err().to_string();
    assert!(message.contains("stored bytes") && message.contains(&blob.digest.hex()), "{message}");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("out/blobs/sha256")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_image_without_file_data_has_no_blob() {
    let made = convert_plain(&[Tar::default().dir("d/").file("d/empty", b"").symlink("l", "d").end()]);
    assert!(made.report.blobs.is_empty());
    assert_eq!(made.read_back().len(), 4);
}

#[test]
fn too_many_blobs() {
    let layers = |count: u32| -> Vec<_> {
        (0..count)
            .map(|i| (Tar::default().file(format!("{i}"), &i.to_le_bytes()).end(), Packing::Plain))
            .collect()
    };
    let made = convert_layers(&layers(254), &Options::default()).unwrap();
    assert_eq!(made.read_back()[&b"/253"[..]].content, 253u32.to_le_bytes());
    let message =
        convert_layers(&layers(255), &Options::default()).map(|made| made.report).unwrap_err().to_string();
    assert!(message.contains("255") && message.contains("254"), "{message}");
}

#[test]
fn prefetch_list() {
    let tar = Tar::default().file("usr/bin/app", b"app").file("z", b"z").end();
    let mut options = Options::default();
    options.prefetch = vec![b"/z".to_vec(), b"usr/bin".to_vec()];
    let made = convert_layers(&[(tar.clone(), Packing::Plain)], &options).unwrap();
    let image = made.image();
    image.check().unwrap();
    let nids: Vec<u64> = image.prefetch().collect();
    let nid = |path: &[u8]| image.lookup(path).unwrap().unwrap().nid;
    assert_eq!(nids, [nid(b"z"), nid(b"usr/bin")]);
    options.prefetch = vec![b"missing".to_vec()];
    let message =
        convert_layers(&[(tar, Packing::Plain)], &options).map(|made| made.report).unwrap_err().to_string();
    assert!(message.contains("missing"), "{message}");
}

#[test]
fn converted_images_and_bad_options_are_refused() {
    let made = convert_plain(&[Tar::default().file("a", b"a").end()]);
    let dir = tempfile::tempdir().unwrap();
    let out = Layout::create(dir.path().join("out")).unwrap();
    let input = Input::Layout { layout: made.layout.clone(), selector: Selector::default() };
    let message = convert(input.clone(), &out, &Options::default(), &()).unwrap_err().to_string();
    assert!(message.contains("converted already"), "{message}");
    let mut options = Options::default();
    options.chunk_size = 5000;
    assert!(convert(input.clone(), &out, &options, &()).unwrap_err().to_string().contains("5000"));
    options.chunk_size = 1 << 20;
    options.compression = Compression::Zstd { level: 99 };
    assert!(convert(input, &out, &options, &()).unwrap_err().to_string().contains("99"));
}
