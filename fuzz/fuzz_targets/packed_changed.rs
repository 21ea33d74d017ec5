//! A well-formed packed chunk with some bytes changed: it reads back, or is an error; and without
//! a change it is what was packed.
//!
//! Reaches deeper than bytes from nothing: every encoding is there, with its sections in place.
#![no_main]

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryViewArray, BooleanArray, Decimal128Array, Float64Array, Int64Array,
};
use arrow::buffer::{BooleanBuffer, Buffer};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use stoa_forms::{Comparison, Operator, PackedChunk, encode_packed, validate_packed};

struct Aligned(Buffer);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Values of one of several shapes, from a few bytes.
fn values(shape: u8, rows: usize, seed: u64) -> ArrayRef {
    let noise = |i: u64| (i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    let every = |i: &u64| seed % 3 != 0 || i % 7 != 3;
    let all = (0..rows as u64).map(|i| Some(i).filter(every));
    match shape % 8 {
        0 => Arc::new(Int64Array::from_iter(all.map(|v| v.map(|i| (noise(i) >> (seed % 60)) as i64)))),
        1 => Arc::new(Int64Array::from_iter(all.map(|v| v.map(|i| (i * 90 + noise(i) % 50) as i64)))),
        2 => Arc::new(Int64Array::from_iter(all.map(|v| v.map(|i| (noise(i / 60) >> 20) as i64)))),
        3 => Arc::new(Decimal128Array::from_iter(all.map(|v| v.map(|i| i128::from(noise(noise(i) % 20)))))),
        4 => Arc::new(Float64Array::from_iter(all.map(|v| v.map(|i| (noise(i) % 9999) as f64 / 100.0)))),
        5 => Arc::new(BinaryViewArray::from_iter(all.map(|v| v.map(|i| format!("a word {}", noise(i) % 40))))),
        6 => Arc::new(BinaryViewArray::from_iter(all.map(|v| v.map(|i| format!("some more words, of which {i} is one"))))),
        _ => Arc::new(BooleanArray::from_iter(all.map(|v| v.map(|i| noise(i) % 3 == 0)))),
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, changes)) = input.split_first_chunk::<12>() else {
        return;
    };
    let rows = usize::from(u16::from_le_bytes([choice[1], choice[2]])) % 10_000;
    let seed = u64::from_le_bytes([
        choice[4], choice[5], choice[6], choice[7], choice[8], choice[9], choice[10], choice[11],
    ]);
    let array = values(choice[0], rows, seed);
    let data_type = array.data_type().clone();
    let mut bytes = encode_packed(std::slice::from_ref(&array), &data_type).unwrap();
    let mut changed = false;
    for change in changes.as_chunks::<4>().0 {
        let at = usize::from(change[0]) << 8 | usize::from(change[1]) | usize::from(change[2] & 3) << 16;
        let at = at % bytes.len();
        bytes[at] ^= change[3];
        changed |= change[3] != 0;
    }
    let bytes = Bytes::from_owner(Aligned(Buffer::from_slice_ref(&bytes)));
    let valid = validate_packed(bytes.clone(), &data_type).is_ok();
    assert!(valid || changed);
    let Ok(chunk) = PackedChunk::open(bytes, &data_type) else {
        return;
    };
    let _ = (chunk.encoding(), chunk.statistics(), chunk.zones());
    let mut at = 0;
    for block in 0..chunk.blocks() {
        let rows = chunk.block_rows(block);
        let found = chunk.block(block);
        let keep: BooleanBuffer = (0..rows).map(|row| row % 13 == 1).collect();
        let kept = chunk.filtered(block, &keep);
        if !changed {
            let expected = array.slice(at, rows);
            assert_eq!(&found.unwrap(), &expected);
            let keep = BooleanArray::new(keep, None);
            assert_eq!(&kept.unwrap(), &arrow::compute::filter(&expected, &keep).unwrap());
        } else if let (Ok(found), Ok(kept)) = (&found, &kept) {
            let _ = format!("{:?} {:?}", found.slice(0, rows.min(40)), kept);
        }
        at += rows;
        if let Some(row) = (0..array.len()).find(|row| array.is_valid(*row)) {
            for op in [Operator::Eq, Operator::Lt, Operator::GtEq] {
                let value = arrow::array::Scalar::new(array.slice(row, 1));
                if let Some(prepared) = chunk.prepare(&Comparison::Compare { op, value }) {
                    let _ = prepared.evaluate(block);
                }
            }
        }
    }
});
