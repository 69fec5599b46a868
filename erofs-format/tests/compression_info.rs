//! Compression info of whole blobs: what the rules refuse, batches, zran, and any bytes.

mod common;

use common::vector;
use erofs_format::{
    Blob, BlobFeatures, Compressor, Image,
    compression_info::{BatchContext, CiArray, CiEntry, CiFlags, CiHeader, CiV2, MAGIC, ZranContext},
};
use proptest::prelude::*;
use zerocopy::{FromZeros, IntoBytes, little_endian as le};

/// A blob with V2 chunk info.
fn blob(features: BlobFeatures, chunks: u32, ci_size: u64) -> Blob {
    let bytes = vector::bootstrap();
    let blob = Image::parse(&bytes).expect("the vector is good").blobs()[0];
    Blob {
        features: BlobFeatures::PLAIN | BlobFeatures::CHUNK_INFO_V2 | features,
        compressor: Compressor::Zstd,
        chunk_count: chunks,
        blocks: 1000,
        uncompressed_size: 1000 * 4096,
        compressed_size: 1 << 20,
        ci_offset: 1 << 19,
        ci_compressed_size: ci_size,
        ci_uncompressed_size: ci_size,
        ..blob
    }
}

fn header(blob: &Blob, contexts: u32, context_size: u64) -> CiHeader {
    let mut header = CiHeader::new_zeroed();
    header.magic = le::U32::new(MAGIC);
    header.magic2 = le::U32::new(MAGIC);
    header.features = le::U32::new(blob.features.bits());
    header.entries = le::U32::new(blob.chunk_count);
    header.ci_offset = le::U64::new(blob.ci_offset);
    header.ci_compressed_size = le::U64::new(blob.ci_compressed_size);
    header.ci_uncompressed_size = le::U64::new(blob.ci_uncompressed_size);
    header.context_offset = le::U64::new(24 * u64::from(blob.chunk_count));
    header.context_size = le::U64::new(context_size);
    header.context_count = le::U32::new(contexts);
    header
}

/// Three chunks: an ordinary one, then two of one batch.
fn batched() -> (Blob, CiHeader, Vec<CiEntry>, BatchContext) {
    let blob = blob(BlobFeatures::BATCH, 3, 3 * 24 + 40);
    let header = header(&blob, 1, 40);
    let entry = |offset, size, flags, data| CiEntry {
        uncompressed_offset: offset,
        uncompressed_size: size,
        compressed_offset: 0,
        compressed_size: 0,
        flags,
        data,
    };
    let batch = CiFlags::BATCH | CiFlags::COMPRESSED;
    let entries = vec![
        CiEntry { compressed_size: 500, ..entry(0, 5000, CiFlags::COMPRESSED, 0) },
        CiEntry { compressed_offset: 500, ..entry(8192, 100, batch, 0) },
        CiEntry { compressed_offset: 500, ..entry(12288, 200, batch, 100) },
    ];
    let mut context = BatchContext::new_zeroed();
    context.compressed_size = le::U32::new(250);
    context.uncompressed_size = le::U32::new(300);
    (blob, header, entries, context)
}

fn encode(entries: &[CiEntry], contexts: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        bytes.extend_from_slice(CiV2::encode(entry).expect("numbers in range").as_bytes());
    }
    bytes.extend_from_slice(contexts);
    bytes
}

#[test]
fn batches_are_read_and_checked() {
    let (blob, header, entries, context) = batched();
    header.check(&blob).unwrap();
    let array = CiArray::decode(&encode(&entries, context.as_bytes()), &header, &blob).unwrap();
    assert_eq!(array.entries, entries);
    assert_eq!(array.batches, [context]);
    assert!(array.zran.is_empty());

    let refused = |change: &dyn Fn(&mut Vec<CiEntry>, &mut BatchContext)| {
        let (mut entries, mut context) = (entries.clone(), context);
        change(&mut entries, &mut context);
        CiArray::decode(&encode(&entries, context.as_bytes()), &header, &blob).unwrap_err().field
    };
    assert_eq!(refused(&|entries, _| entries[1].data = 1 << 32), "context");
    assert_eq!(refused(&|entries, _| entries[1].data = 1), "context offset");
    assert_eq!(refused(&|entries, _| entries[2].data = 101), "context offset");
    assert_eq!(refused(&|entries, _| entries[2].data = 99), "context offset");
    assert_eq!(refused(&|entries, _| entries[1].compressed_offset = (1 << 19) - 100), "compressed_offset");
    assert_eq!(refused(&|_, context| context.uncompressed_size = le::U32::new(299)), "context offset");
    assert_eq!(
        refused(&|_, context| context.uncompressed_size = le::U32::new((16 << 20) + 1)),
        "uncompressed_size"
    );
    assert_eq!(refused(&|_, context| context.compressed_size = le::U32::ZERO), "compressed_size");
    assert_eq!(refused(&|entries, _| entries[0].flags |= CiFlags::ZRAN), "flags");
    assert_eq!(refused(&|entries, _| entries[0].flags |= CiFlags::ENCRYPTED), "flags");
    assert_eq!(refused(&|entries, _| entries[0].flags |= CiFlags::HAS_CRC32), "crc32");
    assert_eq!(refused(&|entries, _| entries[0].flags = CiFlags::empty()), "compressed_size");
    assert_eq!(refused(&|entries, _| entries[0].compressed_size = 0), "compressed_size");
    assert_eq!(refused(&|entries, _| entries[0].compressed_size = (1 << 19) + 1), "compressed_offset");
    assert_eq!(refused(&|entries, _| entries[0].uncompressed_offset = 4096), "uncompressed_offset");
    assert_eq!(refused(&|entries, _| entries[0].uncompressed_size = 1 << 21), "uncompressed_size");
    assert_eq!(refused(&|entries, _| entries[1].uncompressed_offset = 4096), "uncompressed_offset");
    assert_eq!(refused(&|entries, _| entries[2].uncompressed_offset = 16384), "uncompressed_offset");
}

#[test]
fn a_device_too_short_for_its_chunks_is_refused() {
    let (blob, header, entries, context) = batched();
    let blob = Blob { uncompressed_size: 12288, blocks: 3, ..blob };
    let error = CiArray::decode(&encode(&entries, context.as_bytes()), &header, &blob).unwrap_err();
    assert_eq!((error.field, error.offset), ("uncompressed_offset", 48));
}

#[test]
fn headers_bound_the_contexts() {
    let (blob, good, ..) = batched();
    let refused = |change: &dyn Fn(&mut CiHeader)| {
        let mut header = good;
        change(&mut header);
        header.check(&blob).unwrap_err().field
    };
    assert_eq!(refused(&|header| header.context_count = le::U32::new(2)), "context_size");
    assert_eq!(refused(&|header| header.context_count = le::U32::new(4)), "context_count");
    assert_eq!(refused(&|header| header.context_size = le::U64::new(41)), "context_size");
    assert_eq!(refused(&|header| header.context_offset = le::U64::new(71)), "context_offset");
    assert_eq!(refused(&|header| header.context_offset = le::U64::new(73)), "context_offset");
    assert_eq!(refused(&|header| header.context_offset = le::U64::new(u64::MAX)), "context_offset");
    let large = Blob { ci_uncompressed_size: 1 << 30, ci_compressed_size: 10, ..blob };
    assert_eq!(header(&large, 1, 40).check(&large).unwrap_err().field, "ci_uncompressed_size");
}

#[test]
fn zran_contexts_are_checked() {
    let features = BlobFeatures::ZRAN | BlobFeatures::SEPARATE;
    let blob = blob(features, 1, 24 + 40 + 100);
    let header = header(&blob, 1, 140);
    header.check(&blob).unwrap();
    let entry = CiEntry {
        uncompressed_offset: 0,
        uncompressed_size: 1000,
        compressed_offset: 10,
        compressed_size: 400,
        flags: CiFlags::ZRAN | CiFlags::COMPRESSED,
        data: 24,
    };
    let mut good = ZranContext::new_zeroed();
    good.in_offset = le::U64::new(10);
    good.in_len = le::U32::new(400);
    good.out_len = le::U32::new(1024);
    good.dict_size = le::U32::new(100);
    good.ctx_bits = 7;
    let decode = |entry: CiEntry, context: ZranContext| {
        let contexts = [context.as_bytes(), &[0; 100]].concat();
        CiArray::decode(&encode(&[entry], &contexts), &header, &blob)
    };
    assert_eq!(decode(entry, good).unwrap().zran, [good]);
    let refused = |change: &dyn Fn(&mut ZranContext)| {
        let mut context = good;
        change(&mut context);
        decode(entry, context).unwrap_err().field
    };
    assert_eq!(refused(&|context| context.ctx_bits = 8), "ctx_bits");
    assert_eq!(refused(&|context| context.dict_offset = le::U64::new(1)), "dict_offset");
    assert_eq!(refused(&|context| context.dict_offset = le::U64::new(u64::MAX)), "dict_offset");
    assert_eq!(refused(&|context| context.dict_size = le::U32::new(32769)), "dict_size");
    assert_eq!(refused(&|context| context.in_offset = le::U64::new(u64::MAX)), "in_offset");
    assert_eq!(refused(&|context| context.in_offset = le::U64::new(1 << 20)), "in_offset");
    assert_eq!(refused(&|context| context.out_len = le::U32::new(1023)), "context offset");
    assert_eq!(refused(&|context| context.out_len = le::U32::new(u32::MAX)), "out_len");
    assert_eq!(refused(&|context| context.in_len = le::U32::ZERO), "in_len");
    assert_eq!(decode(CiEntry { data: 1 << 32, ..entry }, good).unwrap_err().field, "context");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Any bytes in the entries, contexts and header of a batched blob.
    #[test]
    fn any_bytes_do_no_harm(
        changes in prop::collection::vec((0usize..112, any::<u8>()), 0..4),
        head in prop::collection::vec((0usize..64, any::<u8>()), 0..3),
        len in prop_oneof![Just(112usize), 0usize..200],
    ) {
        let (blob, header, entries, context) = batched();
        let mut bytes = encode(&entries, context.as_bytes());
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.resize(len, 0);
        let mut header = header;
        for (at, byte) in head {
            header.as_mut_bytes()[at] = byte;
        }
        // Even with a header that failed its check, decoding does no harm.
        let checked = header.check(&blob).is_ok();
        if let Ok(array) = CiArray::decode(&bytes, &header, &blob) {
            prop_assert_eq!(array.entries.len(), 3);
            prop_assert!(!checked || array.batches.len() <= 1);
        }
    }
}
