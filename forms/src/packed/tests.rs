use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{Buffer, MutableBuffer};
use arrow::datatypes::*;
use proptest::prelude::*;

use super::*;
use crate::Chunk;

/// Bytes at a 64-byte boundary, as they are in a segment.
pub(crate) fn aligned(bytes: &[u8]) -> Bytes {
    let mut buffer = MutableBuffer::with_capacity(bytes.len());
    buffer.extend_from_slice(bytes);
    let buffer: Buffer = buffer.into();
    struct Owned(Buffer);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Owned(buffer))
}

fn packed(array: &ArrayRef) -> PackedChunk {
    let bytes = aligned(&encode_packed(std::slice::from_ref(array), array.data_type()).unwrap());
    validate_packed(bytes.clone(), array.data_type()).unwrap();
    PackedChunk::open(bytes, array.data_type()).unwrap()
}

/// Blocks, filtered blocks and statistics of a packed array are those of the array.
fn assert_reads_back(array: &ArrayRef) {
    let chunk = packed(array);
    assert_eq!(chunk.rows(), array.len());
    let mut at = 0;
    for block in 0..chunk.blocks() {
        let rows = chunk.block_rows(block);
        let expected = array.slice(at, rows);
        let found = chunk.block(block).unwrap();
        assert_eq!(&found, &expected, "{}", chunk.encoding());
        found.to_data().validate_full().unwrap();
        for step in [1, 2, 5, 61, 700] {
            let keep = BooleanBuffer::from_iter((0..rows).map(|row| row % step == step / 2));
            let found = chunk.filtered(block, &keep).unwrap();
            let keep = BooleanArray::new(keep, None);
            let expected = arrow::compute::filter(&expected, &keep).unwrap();
            assert_eq!(&found, &expected, "{} every {step}", chunk.encoding());
        }
        at += rows;
    }
    assert_eq!(at, array.len());
    assert_eq!(chunk.statistics().null_count, array.logical_null_count());
}

fn integer_types() -> Vec<DataType> {
    use DataType::*;
    vec![
        Int8,
        Int16,
        Int32,
        Int64,
        UInt8,
        UInt16,
        UInt32,
        UInt64,
        Date32,
        Date64,
        Time32(TimeUnit::Second),
        Time64(TimeUnit::Nanosecond),
        Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        Duration(TimeUnit::Millisecond),
        Decimal32(9, 2),
        Decimal64(18, 2),
        Decimal128(38, 2),
        Decimal256(76, 2),
    ]
}

/// The values as integers of a type, cut to what it holds.
fn integers(values: &[Option<i128>], data_type: &DataType) -> ArrayRef {
    let wide = Decimal256Array::from_iter(values.iter().map(|v| v.map(i256::from_i128)));
    match data_type {
        DataType::Decimal256(p, s) => Arc::new(wide.with_precision_and_scale(*p, *s).unwrap()),
        _ => {
            let width = data_type.primitive_width().unwrap();
            let mut bytes = MutableBuffer::new(values.len() * width);
            for value in values {
                bytes.extend_from_slice(&value.unwrap_or(77).to_le_bytes()[..width]);
            }
            let nulls = NullBuffer::from_iter(values.iter().map(|v| v.is_some()));
            let nulls = Some(nulls).filter(|n| n.null_count() > 0);
            integers::array(data_type, values.len(), bytes.into(), nulls).unwrap()
        }
    }
}

fn values() -> impl Strategy<Value = Vec<Option<i128>>> {
    let value = prop_oneof![
        6 => (-40i128..60).boxed(),
        2 => any::<i32>().prop_map(i128::from).boxed(),
        1 => any::<i128>().boxed(),
        1 => prop::sample::select(vec![i128::MIN, i128::MAX, i64::MIN.into(), i64::MAX.into(), 0, -1]).boxed(),
    ];
    let some = prop::collection::vec(prop::option::weighted(0.9, value), 0..300);
    (some, prop::sample::select(vec![1usize, 1, 1, 40])).prop_map(|(values, times)| {
        let all: Vec<_> = std::iter::repeat_n(values, times).flatten().collect();
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_integers_read_back(values in values()) {
        for data_type in integer_types() {
            assert_reads_back(&integers(&values, &data_type));
        }
    }
}

#[test]
fn chunks_of_any_size_read_back() {
    for rows in [0, 1, 2, 1023, 1024, 1025, 8191, 8192, 8193, 20_000] {
        let some: ArrayRef = Arc::new(Int32Array::from_iter(
            (0..rows).map(|i| (i % 7 != 3).then_some(i * 31 % 1000)),
        ));
        assert_reads_back(&some);
        assert_reads_back(&new_null_array(&DataType::Int32, rows as usize));
        assert_reads_back(&new_null_array(&DataType::Null, rows as usize));
    }
}

#[test]
fn a_chunk_opens_in_the_form_it_has() {
    let array: ArrayRef = Arc::new(Int64Array::from_iter_values(0..10_000));
    let arrays = std::slice::from_ref(&array);
    for (form, bytes) in [
        (
            crate::FORM_ARROW,
            crate::encode_arrow(arrays, &DataType::Int64).unwrap(),
        ),
        (
            crate::FORM_PACKED,
            encode_packed(arrays, &DataType::Int64).unwrap(),
        ),
    ] {
        let chunk = Chunk::open(form, aligned(&bytes), &DataType::Int64).unwrap();
        assert_eq!(
            (chunk.form(), chunk.rows(), chunk.blocks()),
            (form, 10_000, 2)
        );
        assert_eq!(&chunk.block(1).unwrap(), &array.slice(8192, 1808));
        let statistics = chunk.statistics();
        let bound = |b: &Option<Scalar<ArrayRef>>| {
            let (array, _) = b.as_ref().unwrap().get();
            array.as_primitive::<Int64Type>().value(0)
        };
        assert!(statistics.exact);
        assert_eq!((bound(&statistics.min), bound(&statistics.max)), (0, 9999));
        let distinct = statistics.distinct.as_ref().unwrap().estimate();
        assert!((9000..11_000).contains(&distinct), "{distinct}");
        let zones = chunk.zones().unwrap();
        assert_eq!(zones.mins.as_primitive::<Int64Type>().values(), &[0, 8192]);
        assert_eq!(
            zones.maxs.as_primitive::<Int64Type>().values(),
            &[8191, 9999]
        );
        assert_eq!(zones.row_counts.values(), &[8192, 1808]);
        let scalar = |v| Scalar::new(Arc::new(Int64Array::from(vec![v])) as ArrayRef);
        assert!(chunk.may_contain(&scalar(5)) && !chunk.may_contain(&scalar(-1)));
    }
    let error = Chunk::open(3, aligned(&[]), &DataType::Int64).unwrap_err();
    assert_eq!(
        error.to_string(),
        "form 3 has no chunks to open; expected 1 (arrow) or 2 (packed)"
    );
}
