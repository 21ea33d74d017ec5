//! Hostile bytes as a packed chunk: everything a reader does returns, without a panic and without
//! reading outside of the bytes.
//!
//! The first bytes choose type, geometry and encoding; the rest is the chunk behind its header,
//! which is filled in so that the fuzzer need not guess it.
#![no_main]

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Scalar, new_null_array};
use arrow::buffer::{BooleanBuffer, Buffer};
use arrow::datatypes::{DataType, TimeUnit};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use stoa_forms::packed::{HEADER_BYTES, MAGIC, VERSION};
use stoa_forms::{BLOCK_ROWS, Comparison, Operator, PackedChunk, validate_packed};

struct Aligned(Buffer);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn types() -> Vec<DataType> {
    use DataType::*;
    vec![
        Int8,
        UInt16,
        Int32,
        Int64,
        UInt64,
        Decimal128(38, 2),
        Decimal256(76, 2),
        Timestamp(TimeUnit::Microsecond, None),
        Float32,
        Float64,
        Boolean,
        // Text that is no UTF-8 is ruled out by validation, not by readers: as bytes it is any.
        BinaryView,
        Utf8View,
        FixedSizeBinary(7),
        Null,
    ]
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first_chunk::<6>() else {
        return;
    };
    let types = types();
    let data_type = &types[usize::from(choice[0]) % types.len()];
    let rows = u64::from(u16::from_le_bytes([choice[1], choice[2]]) % 20_000);
    let mut chunk = rest.to_vec();
    chunk.resize(chunk.len().max(HEADER_BYTES).next_multiple_of(64), 0);
    if choice[3] % 8 != 7 {
        let total = chunk.len() as u64;
        chunk[..8].copy_from_slice(&MAGIC);
        chunk[8..10].copy_from_slice(&VERSION.to_le_bytes());
        chunk[10] = choice[4] % 8;
        chunk[12..16].copy_from_slice(&(BLOCK_ROWS as u32).to_le_bytes());
        chunk[16..24].copy_from_slice(&rows.to_le_bytes());
        chunk[24..28].copy_from_slice(&(rows.div_ceil(BLOCK_ROWS as u64) as u32).to_le_bytes());
        chunk[32..40].copy_from_slice(&total.to_le_bytes());
    }
    let bytes = Bytes::from_owner(Aligned(Buffer::from_slice_ref(&chunk)));
    let valid = validate_packed(bytes.clone(), data_type).is_ok();
    if data_type == &DataType::Utf8View && !valid {
        return;
    }
    let Ok(chunk) = PackedChunk::open(bytes, data_type) else {
        return;
    };
    let _ = (chunk.encoding(), chunk.statistics(), chunk.zones());
    let null = Scalar::new(new_null_array(data_type, 1));
    let _ = chunk.may_contain(&null);
    let mut comparisons = vec![
        Comparison::IsNull,
        Comparison::IsNotNull,
        Comparison::OnDictionary(Arc::new(|values: &ArrayRef| {
            Some(BooleanArray::from_iter((0..values.len()).map(|i| Some(i % 2 == 0))))
        })),
        Comparison::Contains { texts: vec![char::from(choice[5]).to_string()], negated: false },
        Comparison::Contains {
            texts: vec![char::from(choice[5]).to_string(), char::from(choice[4]).to_string()],
            negated: true,
        },
    ];
    for block in 0..chunk.blocks() {
        let rows = chunk.block_rows(block);
        let values = chunk.block(block);
        assert!(!valid || values.is_ok(), "a valid chunk has all blocks");
        let keep: BooleanBuffer = (0..rows).map(|r| r % (usize::from(choice[5]) + 2) == 1).collect();
        let kept = chunk.filtered(block, &keep);
        if let (Ok(values), Ok(kept)) = (values, kept) {
            // Looks at every byte of what was read.
            let again = arrow::compute::filter(&values, &BooleanArray::new(keep, None));
            assert_eq!(kept.len(), again.map(|a| a.len()).unwrap_or(kept.len()));
            let _ = format!("{:?}", values.slice(0, values.len().min(50)));
            if let Some(row) = (0..values.len()).find(|row| values.is_valid(*row)) {
                for op in [Operator::Eq, Operator::LtEq, Operator::Gt] {
                    let value = Scalar::new(values.slice(row, 1));
                    comparisons.push(Comparison::Compare { op, value });
                }
            }
        }
        for comparison in &comparisons {
            if let Some(prepared) = chunk.prepare(comparison) {
                let _ = prepared.evaluate(block);
            }
        }
        comparisons.truncate(4);
    }
});
