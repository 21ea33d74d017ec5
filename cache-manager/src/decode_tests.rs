use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, DictionaryArray, Int64Array, ListArray, RecordBatch, StringArray,
    StructArray,
};
use arrow::datatypes::{Field, Int32Type, Int64Type, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader};
use parquet::file::properties::WriterProperties;
use stoa_forms::{ArrowChunk, PackedChunk};

use super::*;

const ROWS: usize = 20_000;

fn batch() -> RecordBatch {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter(
        (0..ROWS as i64).map(|i| (i % 7 != 0).then_some(i * 3)),
    ));
    let words: ArrayRef =
        Arc::new(StringArray::from_iter((0..ROWS).map(|i| {
            (i % 5 != 0).then(|| format!("word number {}", i % 1000))
        })));
    let pairs: ArrayRef = Arc::new(StructArray::from(vec![
        (
            Arc::new(Field::new("a", numbers.data_type().clone(), true)),
            Arc::clone(&numbers),
        ),
        (
            Arc::new(Field::new("b", words.data_type().clone(), true)),
            Arc::clone(&words),
        ),
    ]));
    let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..ROWS as i32).map(|i| (i % 3 != 0).then(|| (0..i % 4).map(Some).collect::<Vec<_>>())),
    ));
    let flags: DictionaryArray<Int32Type> =
        (0..ROWS).map(|i| ["A", "B"].get(i % 3).copied()).collect();
    let columns = [
        ("number", numbers),
        ("pair", pairs),
        ("word", words),
        ("list", lists),
        ("flag", Arc::new(flags) as ArrayRef),
    ];
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, array)| Field::new(*name, array.data_type().clone(), true))
        .collect();
    RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns.into_iter().map(|(_, array)| array).collect(),
    )
    .unwrap()
}

fn file() -> (Bytes, Arc<ParquetMetaData>) {
    let batch = batch();
    let mut bytes = vec![];
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(12_000))
        .build();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let bytes = Bytes::from(bytes);
    let metadata = ParquetMetaDataReader::new()
        .with_page_index_policy(PageIndexPolicy::Optional)
        .parse_and_finish(&bytes)
        .unwrap();
    (bytes, Arc::new(metadata))
}

fn fetch(file: &Bytes, decoder: &FileDecoder, row_group: u32, column: u32) -> Vec<(u64, Bytes)> {
    let group = decoder.metadata.row_group(row_group as usize);
    let leaves = decoder.leaves(column).unwrap();
    leaves
        .map(|leaf| {
            let (start, len) = group.column(leaf).byte_range();
            (start, file.slice(start as usize..(start + len) as usize))
        })
        .collect()
}

fn values(chunk: &EncodedChunk, data_type: &DataType) -> ArrayRef {
    assert_eq!(chunk.parts.len(), 1);
    let open = ArrowChunk::open(chunk.parts[0].clone(), data_type).unwrap();
    let blocks: Vec<ArrayRef> = (0..open.blocks()).map(|i| open.block(i)).collect();
    let parts: Vec<&dyn Array> = blocks.iter().map(|block| block.as_ref()).collect();
    arrow::compute::concat(&parts).unwrap()
}

#[test]
fn a_column_decodes_to_what_was_written() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let chunk = decoder
        .encode(1, 0, Form::Arrow, &fetch(&bytes, &decoder, 1, 0))
        .unwrap();
    assert_eq!((chunk.form, chunk.rows), (Form::Arrow, 8_000));
    let found = values(&chunk, &DataType::Int64);
    let expected = batch().column(0).slice(12_000, 8_000);
    assert_eq!(
        found.as_primitive::<Int64Type>(),
        expected.as_primitive::<Int64Type>()
    );
}

#[test]
fn strings_become_views() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let chunk = decoder
        .encode(0, 3, Form::Arrow, &fetch(&bytes, &decoder, 0, 3))
        .unwrap();
    let found = values(&chunk, &DataType::Utf8View);
    let batch = batch();
    let expected = batch.column(2).slice(0, 12_000);
    assert!(
        found
            .as_string_view()
            .iter()
            .eq(expected.as_string::<i32>().iter())
    );
}

#[test]
fn nested_columns_are_fetched_and_decoded_whole() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    assert_eq!(fetch(&bytes, &decoder, 0, 1).len(), 2);
    let chunk = decoder
        .encode(0, 1, Form::Arrow, &fetch(&bytes, &decoder, 0, 1))
        .unwrap();
    assert_eq!(chunk.form, Form::Arrow);
    let expected = batch().column(1).slice(0, 12_000);
    assert_eq!(&values(&chunk, expected.data_type()), &expected);
    let chunk = decoder
        .encode(0, 4, Form::Arrow, &fetch(&bytes, &decoder, 0, 4))
        .unwrap();
    let expected = batch().column(3).slice(0, 12_000);
    assert_eq!(&values(&chunk, expected.data_type()), &expected);
}

#[test]
fn the_parquet_form_is_the_bytes_of_the_file() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let fetched = fetch(&bytes, &decoder, 0, 1);
    let chunk = decoder.encode(0, 1, Form::Parquet, &fetched).unwrap();
    assert_eq!(chunk.form, Form::Parquet);
    assert_eq!(
        chunk.parts,
        fetched
            .into_iter()
            .map(|(_, bytes)| bytes)
            .collect::<Vec<_>>()
    );
    assert_eq!(chunk.fallback, None);
}

#[test]
fn a_type_without_arrow_form_falls_back_to_parquet() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let chunk = decoder
        .encode(0, 5, Form::Arrow, &fetch(&bytes, &decoder, 0, 5))
        .unwrap();
    assert_eq!(chunk.form, Form::Parquet);
    assert!(chunk.fallback.unwrap().contains("no arrow form"));
}

#[test]
fn damaged_pages_are_skipped_with_a_reason() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let mut fetched = fetch(&bytes, &decoder, 0, 0);
    let healthy = fetched[0].1.clone();
    for seed in 0..200usize {
        let mut damaged = healthy.to_vec();
        let at = seed * 7919 % damaged.len();
        damaged[at] ^= 0xa5;
        fetched[0].1 = Bytes::from(damaged);
        // Values may differ where no checksum covers them; what matters is that nothing escapes.
        match decoder.encode(0, 0, Form::Arrow, &fetched) {
            Ok(chunk) => assert_eq!(chunk.rows, 12_000),
            Err(Skipped(reason)) => assert!(!reason.is_empty()),
        }
    }
    fetched[0].1 = healthy.slice(..healthy.len() / 2);
    assert!(decoder.encode(0, 0, Form::Arrow, &fetched).is_err());
}

#[test]
fn references_out_of_bounds_are_named() {
    let (_, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let reason = |row_group, column| {
        decoder
            .encode(row_group, column, Form::Arrow, &[])
            .unwrap_err()
            .0
    };
    assert_eq!(reason(2, 0), "row group 2 is not in the file, which has 2");
    assert_eq!(reason(0, 6), "column 6 is not in the file, largest is 5");
    assert_eq!(
        reason(0, 2),
        "column 2 is not the first leaf of its root column"
    );
}

#[test]
fn panics_become_reasons() {
    assert_eq!(guarded(|| 1), Ok(1));
    let reason = guarded(|| panic!("index {} out of bounds", 3)).unwrap_err();
    assert_eq!(reason, "the parquet parser panicked: index 3 out of bounds");
}

/// What a worker packs is what it would have decoded, and says so in its form.
#[test]
fn every_column_packs_to_what_was_written() {
    let (bytes, metadata) = file();
    let decoder = FileDecoder::new(&metadata);
    let expected = batch();
    for (index, column) in [(0, 0), (2, 3), (3, 4)] {
        let chunk = decoder
            .encode(0, column, Form::Packed, &fetch(&bytes, &decoder, 0, column))
            .unwrap();
        assert_eq!(
            (chunk.form, chunk.rows, chunk.fallback.clone()),
            (Form::Packed, 12_000, None)
        );
        let expected = expected.column(index).slice(0, 12_000);
        let data_type = match expected.data_type() {
            DataType::Utf8 => DataType::Utf8View,
            other => other.clone(),
        };
        let open = PackedChunk::open(chunk.parts[0].clone(), &data_type).unwrap();
        let blocks: Vec<ArrayRef> = (0..open.blocks()).map(|b| open.block(b).unwrap()).collect();
        let parts: Vec<&dyn Array> = blocks.iter().map(|block| block.as_ref()).collect();
        let found = arrow::compute::concat(&parts).unwrap();
        let expected = arrow::compute::cast(&expected, &data_type).unwrap();
        assert_eq!(&found, &expected, "{}", open.encoding());
    }
    let flags = decoder
        .encode(0, 5, Form::Packed, &fetch(&bytes, &decoder, 0, 5))
        .unwrap();
    assert_eq!(flags.form, Form::Parquet);
    assert!(flags.fallback.unwrap().contains("Dictionary"));
}
