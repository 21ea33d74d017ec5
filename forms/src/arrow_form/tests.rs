use arrow::array::*;
use arrow::datatypes::*;
use proptest::prelude::*;

use super::*;

/// Bytes at a 64-byte boundary, as they are in a segment.
fn aligned(bytes: &[u8]) -> Bytes {
    let mut buffer = MutableBuffer::with_capacity(bytes.len());
    buffer.extend_from_slice(bytes);
    let buffer: Buffer = buffer.into();
    struct Owned(Buffer);
    impl AsRef<[u8]> for Owned {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
    Bytes::from_owner(Owned(buffer))
}

fn round_trip(array: &ArrayRef) -> Vec<ArrayRef> {
    let bytes = aligned(&encode_arrow(std::slice::from_ref(array), array.data_type()).unwrap());
    validate(bytes.clone(), array.data_type()).unwrap();
    let chunk = ArrowChunk::open(bytes, array.data_type()).unwrap();
    assert_eq!(chunk.rows(), array.len());
    (0..chunk.blocks())
        .map(|block| chunk.block(block))
        .collect()
}

fn assert_round_trip(array: &ArrayRef) {
    let mut at = 0;
    for block in round_trip(array) {
        assert_eq!(&block, &array.slice(at, block.len()));
        at += block.len();
    }
    assert_eq!(at, array.len());
}

fn every_type(values: &[Option<i64>]) -> Vec<ArrayRef> {
    let strings: Vec<Option<String>> = values
        .iter()
        .map(|v| v.map(|v| "x".repeat((v.unsigned_abs() % 40) as usize) + &v.to_string()))
        .collect();
    let ints: ArrayRef = Arc::new(Int64Array::from(values.to_vec()));
    let text: ArrayRef = Arc::new(StringArray::from(strings.clone()));
    let mut list = ListBuilder::new(StringBuilder::new());
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
    for (value, string) in values.iter().zip(&strings) {
        match value {
            None => {
                list.append(false);
                map.append(false).unwrap();
            }
            Some(value) => {
                for i in 0..(value.unsigned_abs() % 4) {
                    list.values()
                        .append_option((i != 2).then_some(string.as_deref()).flatten());
                    map.keys().append_value(format!("{i}"));
                    map.values().append_option((i != 1).then_some(*value));
                }
                list.append(true);
                map.append(true).unwrap();
            }
        }
    }
    let fields = Fields::from(vec![
        Field::new("a", DataType::Int64, true),
        Field::new("b", DataType::Utf8, true),
    ]);
    let nulls = NullBuffer::from(values.iter().map(Option::is_some).collect::<Vec<_>>());
    let nested = StructArray::new(fields, vec![ints.clone(), text.clone()], Some(nulls));
    let cast = |to: DataType| arrow::compute::cast(&ints, &to).unwrap();
    let fixed = FixedSizeBinaryArray::try_from_sparse_iter_with_size(
        values.iter().map(|v| v.map(|v| v.to_le_bytes())),
        8,
    )
    .unwrap();
    let wide = FixedSizeListArray::from_iter_primitive::<Int64Type, _, _>(
        values.iter().map(|v| v.map(|v| vec![Some(v), None])),
        2,
    );
    vec![
        cast(DataType::Int8),
        cast(DataType::Float64),
        cast(DataType::Boolean),
        cast(DataType::Decimal128(30, 2)),
        cast(DataType::Decimal256(60, 2)),
        cast(DataType::Timestamp(
            TimeUnit::Microsecond,
            Some("UTC".into()),
        )),
        arrow::compute::cast(&text, &DataType::Utf8View).unwrap(),
        arrow::compute::cast(&text, &DataType::LargeUtf8).unwrap(),
        arrow::compute::cast(&text, &DataType::BinaryView).unwrap(),
        Arc::new(list.finish()),
        Arc::new(map.finish()),
        Arc::new(nested),
        Arc::new(fixed),
        Arc::new(wide),
        Arc::new(NullArray::new(values.len())),
        text,
        ints,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_array_reads_back_equal(
        values in prop::collection::vec(prop::option::of(-100i64..100), 0..200),
        cut in 0usize..200,
    ) {
        for array in every_type(&values) {
            assert_round_trip(&array);
            let cut = cut.min(array.len());
            assert_round_trip(&array.slice(cut, array.len() - cut));
        }
    }

    #[test]
    fn damaged_geometry_is_an_error_and_never_a_panic(
        at in 0usize..400,
        with in any::<u8>(),
        keep in 0usize..1000,
    ) {
        let values: Vec<_> = (0..20).map(|v| (v % 3 != 0).then_some(v)).collect();
        for array in every_type(&values) {
            let mut bytes = encode_arrow(std::slice::from_ref(&array), array.data_type()).unwrap();
            let shape = shape(array.data_type());
            let geometry = HEADER_BYTES + (shape.nodes + shape.buffers) as usize * PAIR_BYTES;
            let cut = keep.min(bytes.len());
            assert!(cut == bytes.len() || ArrowChunk::open(aligned(&bytes[..cut]), array.data_type()).is_err());
            let at = at % geometry;
            bytes[at] ^= with;
            let bytes = aligned(&bytes);
            if let Ok(chunk) = ArrowChunk::open(bytes.clone(), array.data_type()) {
                let _ = chunk.rows();
                let _ = validate(bytes, array.data_type());
            }
        }
    }
}

#[test]
fn blocks_are_batches_with_memory_of_their_own() {
    let long: ArrayRef = Arc::new(StringViewArray::from_iter_values(
        (0..20_000).map(|i| format!("a string longer than twelve bytes {i}")),
    ));
    let blocks = round_trip(&long);
    assert_eq!(
        blocks.iter().map(|b| b.len()).collect::<Vec<_>>(),
        [8192, 8192, 3616]
    );
    assert_round_trip(&long);
    let whole = long.get_array_memory_size();
    let parts: usize = blocks.iter().map(|b| b.get_array_memory_size()).sum();
    assert!(parts < whole + 4096, "{parts} bytes accounted for {whole}");
}

#[test]
fn text_under_nulls_is_not_kept() {
    let text = |row: usize| format!("a string longer than twelve bytes {row:05}");
    let full = StringViewArray::from_iter_values((0..20_000).map(text));
    let (views, buffers, _) = full.into_parts();
    let nulls = NullBuffer::from((0..20_000).map(|row| row % 4 == 1).collect::<Vec<_>>());
    let covered: ArrayRef = Arc::new(StringViewArray::new(views, buffers, Some(nulls)));
    let clean: ArrayRef = Arc::new(StringViewArray::from_iter(
        (0..20_000).map(|row| (row % 4 == 1).then(|| text(row))),
    ));
    assert_eq!(&covered, &clean);
    assert_round_trip(&covered);
    let encoded = |array: &ArrayRef| encode_arrow(std::slice::from_ref(array), &DataType::Utf8View);
    assert_eq!(encoded(&covered).unwrap(), encoded(&clean).unwrap());
}

#[test]
fn arrays_point_into_the_chunk() {
    let ints: ArrayRef = Arc::new(Int32Array::from_iter_values(0..10_000));
    let bytes = aligned(&encode_arrow(std::slice::from_ref(&ints), &DataType::Int32).unwrap());
    let inside = bytes.as_ptr_range();
    let chunk = ArrowChunk::open(bytes.clone(), &DataType::Int32).unwrap();
    for block in 0..chunk.blocks() {
        let data = chunk.block(block).to_data();
        assert!(inside.contains(&data.buffers()[0].as_ptr()));
    }
}

#[test]
fn errors_name_what_was_found_and_expected() {
    let ints: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
    let bytes = encode_arrow(std::slice::from_ref(&ints), &DataType::Int32).unwrap();
    let open = |bytes: &[u8], to: &DataType| {
        ArrowChunk::open(aligned(bytes), to)
            .unwrap_err()
            .to_string()
    };
    let mut other = bytes.clone();
    other[0] = b'X';
    assert_eq!(
        open(&other, &DataType::Int32),
        "corrupt chunk: magic: found XTOAARW1, expected STOAARW1"
    );
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert_eq!(
        open(&newer, &DataType::Int32),
        "chunk format unsupported: found version 9, this build reads 2"
    );
    assert_eq!(
        open(&bytes, &DataType::Int64),
        "corrupt chunk: buffer: found 12, expected 24 bytes"
    );
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    assert!(
        ArrowChunkWriter::new(dictionary)
            .unwrap_err()
            .to_string()
            .contains("no arrow form")
    );
    let shifted = aligned(&[&[0u8; 8], &bytes[..]].concat()).slice(8..);
    assert_eq!(
        ArrowChunk::open(shifted, &DataType::Int32)
            .unwrap_err()
            .to_string(),
        "chunk is not aligned: starts 8 bytes past a 64-byte boundary"
    );
}
