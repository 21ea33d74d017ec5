//! What is left of what footers say.

use std::sync::Arc;

use parquet::data_type::{ByteArray, FixedLenByteArray};
use parquet::file::metadata::RowGroupMetaData;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::SchemaDescriptor;

use super::*;

const ROWS: i64 = 10;
const OTHERS: &str = "somebody version 1.0";

/// What is left of a chunk of `column` that says `said`, in a file that names orders or not.
fn left(column: &str, said: Statistics, created_by: &str, named: bool) -> Option<Statistics> {
    let schema = parse_message_type(&format!("message m {{ {column}; }}")).unwrap();
    let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
    let chunk = ColumnChunkMetaData::builder(schema.column(0))
        .set_num_values(ROWS)
        .set_statistics(said)
        .set_bloom_filter_offset(Some(4))
        .set_bloom_filter_length(Some(8))
        .build()
        .unwrap();
    let group = RowGroupMetaData::builder(Arc::clone(&schema))
        .set_num_rows(ROWS)
        .add_column_metadata(chunk)
        .build()
        .unwrap();
    let order = ColumnOrder::TYPE_DEFINED_ORDER(SortOrder::SIGNED);
    let orders = named.then(|| vec![order]);
    let by = Some(created_by.to_owned());
    let file = FileMetaData::new(2, ROWS, by, None, schema, orders);
    let believed = believable(ParquetMetaData::new(file, vec![group]));
    assert_eq!(believable(believed.clone()), believed);
    let chunk = believed.row_group(0).column(0);
    let keeps_bloom = !column.contains("double") && !column.contains("FLOAT16");
    assert_eq!(
        chunk.bloom_filter_offset().is_some(),
        keeps_bloom,
        "{column}"
    );
    chunk.statistics().cloned()
}

fn ints(min: i32, max: i32, nulls: Option<u64>, deprecated: bool) -> Statistics {
    Statistics::int32(Some(min), Some(max), None, nulls, deprecated)
}

fn texts(min: &str, max: &str, deprecated: bool) -> Statistics {
    let bound = |text: &str| Some(ByteArray::from(text));
    Statistics::byte_array(bound(min), bound(max), None, Some(1), deprecated)
}

fn fixed(min: &[u8], max: &[u8]) -> Statistics {
    let bound = |bytes: &[u8]| Some(FixedLenByteArray::from(ByteArray::from(bytes.to_vec())));
    Statistics::fixed_len_byte_array(bound(min), bound(max), None, Some(1), false)
}

/// Whether the bounds are left; the null count is in any case.
fn holds(column: &str, said: Statistics, named: bool) -> bool {
    let left = left(column, said.clone(), OTHERS, named).unwrap();
    assert_eq!(left.null_count_opt(), said.null_count_opt(), "{column}");
    if left == said {
        return true;
    }
    assert_eq!(
        (left.min_bytes_opt(), left.max_bytes_opt()),
        (None, None),
        "{column}"
    );
    false
}

#[test]
fn signed_integers_are_ordered_in_every_file() {
    let int = "optional int32 c";
    for (deprecated, named) in [(false, true), (true, true), (true, false), (false, false)] {
        assert!(holds(int, ints(-3, 4, Some(1), deprecated), named));
        assert!(holds(
            "optional int32 c (DATE)",
            ints(-3, 4, Some(1), deprecated),
            named
        ));
    }
    assert!(!holds(int, ints(4, -3, Some(1), false), true));
    let one = Statistics::int32(None, Some(7), None, Some(1), false);
    assert!(holds(int, one, true));
}

#[test]
fn unsigned_integers_are_ordered_where_the_file_says_so() {
    let int = "optional int32 c (INTEGER(32,false))";
    assert!(holds(int, ints(3, 4, Some(1), false), true));
    // Minus three is above all that fits into 31 bits.
    assert!(holds(int, ints(4, -3, Some(1), false), true));
    assert!(!holds(int, ints(-3, 4, Some(1), false), true));
    assert!(!holds(int, ints(3, 4, Some(1), true), true));
    assert!(!holds(int, ints(3, 4, Some(1), false), false));
    let long = |min, max| Statistics::int64(Some(min), Some(max), None, Some(1), false);
    assert!(!holds("optional int64 c (UINT_64)", long(-1, 1), true));
}

#[test]
fn texts_are_ordered_where_the_file_says_so() {
    for column in ["optional binary c (STRING)", "optional binary c"] {
        assert!(holds(column, texts("az", "aé", false), true));
        assert!(!holds(column, texts("aé", "az", false), true));
        assert!(!holds(column, texts("a", "b", true), true));
        assert!(!holds(column, texts("a", "b", false), false));
    }
    let none = Statistics::byte_array(None, None, None, Some(1), false);
    assert!(holds("optional binary c (STRING)", none, false));
}

#[test]
fn decimals_as_bytes_are_ordered_as_numbers() {
    let decimal = "optional fixed_len_byte_array(2) c (DECIMAL(4,2))";
    assert!(holds(decimal, fixed(&[0xff, 0xfe], &[0, 1]), true));
    assert!(!holds(decimal, fixed(&[0, 1], &[0xff, 0xfe]), true));
    assert!(!holds(decimal, fixed(&[], &[0, 1]), true));
    assert!(!holds(decimal, fixed(&[0; 17], &[0; 17]), true));
    assert_eq!(big_endian(&[0xff], &[0xff, 0xff]), Ordering::Equal);
    assert_eq!(big_endian(&[0x80], &[0xff, 0x00]), Ordering::Greater);
    assert_eq!(big_endian(&[1, 0], &[2]), Ordering::Greater);
}

#[test]
fn what_has_no_order_or_nans_has_no_bounds() {
    let double = Statistics::double(Some(1.0), Some(2.0), None, Some(1), false);
    assert!(!holds("optional double c", double, true));
    let half = "optional fixed_len_byte_array(2) c (FLOAT16)";
    assert!(!holds(half, fixed(&[0, 1], &[0, 2]), true));
    let interval = "optional fixed_len_byte_array(12) c (INTERVAL)";
    assert!(!holds(interval, fixed(&[1; 12], &[2; 12]), true));
}

#[test]
fn unknown_nulls_are_not_none() {
    let int = "optional int32 c";
    let said = |nulls| ints(1, 2, nulls, false);
    assert_eq!(left(int, said(None), OTHERS, true), None);
    assert_eq!(left(int, said(Some(11)), OTHERS, true), None);
    let zero = Some(said(Some(0)));
    assert_eq!(left("required int32 c", said(None), OTHERS, true), zero);
    assert_eq!(
        left(int, said(None), "parquet-rs version 53.0.0", true),
        zero
    );
    assert_eq!(
        left(int, said(None), "datafusion version 42.0.0", true),
        zero
    );
    assert_eq!(
        left(int, said(None), "parquet-rs version 53.1.0", true),
        None
    );
    // Of nulls alone there are no bounds.
    assert!(!holds(int, said(Some(10)), true));
}

#[test]
fn only_versions_are_compared() {
    for by in [
        "parquet-rs version 9.9",
        "parquet-rs version 52.2.0 (build x)",
    ] {
        assert!(leaves_out_zero_nulls(Some(by)), "{by}");
    }
    for by in [
        "parquet-rs version x",
        "parquet-cpp-arrow version 5.0.0",
        "datafusion version 55.2.0",
    ] {
        assert!(!leaves_out_zero_nulls(Some(by)), "{by}");
    }
    assert!(!leaves_out_zero_nulls(None));
}

#[test]
fn a_dictionary_lies_between_the_magic_and_the_data() {
    let start = |dictionary: i64| {
        let schema = parse_message_type("message m { required int32 c; }").unwrap();
        let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
        let chunk = ColumnChunkMetaData::builder(schema.column(0))
            .set_data_page_offset(100)
            .set_dictionary_page_offset(Some(dictionary))
            .build()
            .unwrap();
        let group = RowGroupMetaData::builder(Arc::clone(&schema)).add_column_metadata(chunk);
        let file = FileMetaData::new(2, 0, None, None, schema, None);
        let metadata = ParquetMetaData::new(file, vec![group.build().unwrap()]);
        let chunk = believable(metadata).row_group(0).column(0).clone();
        chunk.dictionary_page_offset()
    };
    assert_eq!([4, 99].map(start), [Some(4), Some(99)]);
    assert_eq!([-1, 0, 3, 100, 101].map(start), [None; 5]);
}
