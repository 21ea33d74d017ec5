//! Footers that say more, or other things, than this build knows: what the parquet crate reads is
//! read, and read as the same.

use parquet::arrow::parquet_to_arrow_schema;

use super::*;
use crate::belief::believable;
use crate::indexes::without_page_index;

const STOP: u8 = 0;
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const BYTE: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A value of Thrift's compact encoding.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Bool(bool),
    Byte(u8),
    /// Of type I16, I32 or I64.
    Number(u8, i64),
    Double([u8; 8]),
    Binary(Vec<u8>),
    /// Type of the elements, and the elements.
    List(u8, Vec<Value>),
    Struct(Vec<(i16, Value)>),
}

impl Value {
    fn read(bytes: &mut &[u8], kind: u8) -> Value {
        match kind {
            TRUE | FALSE => Value::Bool(kind == TRUE),
            BYTE => Value::Byte(byte(bytes)),
            I16 | I32 | I64 => Value::Number(kind, zigzag(bytes)),
            DOUBLE => {
                let (value, rest) = bytes.split_first_chunk().unwrap();
                *bytes = rest;
                Value::Double(*value)
            }
            BINARY => {
                let length = varint(bytes) as usize;
                let (value, rest) = bytes.split_at(length);
                *bytes = rest;
                Value::Binary(value.to_vec())
            }
            LIST => {
                let header = byte(bytes);
                let count = match header >> 4 {
                    15 => varint(bytes),
                    count => u64::from(count),
                };
                let kind = header & 0x0f;
                let elements = (0..count).map(|_| Value::read(bytes, kind));
                Value::List(kind, elements.collect())
            }
            STRUCT => {
                let (mut fields, mut id) = (Vec::new(), 0);
                loop {
                    let header = byte(bytes);
                    if header == STOP {
                        return Value::Struct(fields);
                    }
                    id = match header >> 4 {
                        0 => zigzag(bytes) as i16,
                        delta => id + i16::from(delta),
                    };
                    fields.push((id, Value::read(bytes, header & 0x0f)));
                }
            }
            kind => panic!("a value of type {kind}"),
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            // In the field's header.
            Value::Bool(_) => {}
            Value::Byte(value) => bytes.push(*value),
            Value::Number(_, value) => put_varint(bytes, ((value << 1) ^ (value >> 63)) as u64),
            Value::Double(value) => bytes.extend(value),
            Value::Binary(value) => {
                put_varint(bytes, value.len() as u64);
                bytes.extend(value);
            }
            Value::List(kind, elements) => {
                bytes.push(0xf0 | kind);
                put_varint(bytes, elements.len() as u64);
                elements.iter().for_each(|element| element.write(bytes));
            }
            Value::Struct(fields) => {
                let mut last = 0;
                for (id, value) in fields {
                    match id - last {
                        delta @ 1..=15 => bytes.push((delta as u8) << 4 | value.kind()),
                        _ => {
                            bytes.push(value.kind());
                            let id = i64::from(*id);
                            put_varint(bytes, ((id << 1) ^ (id >> 63)) as u64);
                        }
                    }
                    last = *id;
                    value.write(bytes);
                }
                bytes.push(STOP);
            }
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Value::Bool(true) => TRUE,
            Value::Bool(false) => FALSE,
            Value::Byte(_) => BYTE,
            Value::Number(kind, _) => *kind,
            Value::Double(_) => DOUBLE,
            Value::Binary(_) => BINARY,
            Value::List(_, _) => LIST,
            Value::Struct(_) => STRUCT,
        }
    }

    fn fields(&mut self) -> &mut Vec<(i16, Value)> {
        match self {
            Value::Struct(fields) => fields,
            other => panic!("{other:?} is no struct"),
        }
    }

    fn field(&mut self, id: i16) -> &mut Value {
        let found = self.fields().iter_mut().find(|(of, _)| *of == id);
        &mut found.unwrap().1
    }

    fn set(&mut self, id: i16, value: Value) {
        self.fields().retain(|(of, _)| *of != id);
        self.fields().push((id, value));
    }

    fn elements(&mut self) -> &mut Vec<Value> {
        match self {
            Value::List(_, elements) => elements,
            other => panic!("{other:?} is no list"),
        }
    }
}

fn byte(bytes: &mut &[u8]) -> u8 {
    let (first, rest) = bytes.split_first().unwrap();
    *bytes = rest;
    *first
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let next = byte(bytes);
        value |= u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return value;
        }
        shift += 7;
    }
}

fn zigzag(bytes: &mut &[u8]) -> i64 {
    let value = varint(bytes);
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// The file with another footer; data and page indexes stay where they are.
fn with_footer(file: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let end = data_end(file);
    let mut footer = Value::read(&mut &file[end..], STRUCT);
    change(&mut footer);
    let mut changed = file[..end].to_vec();
    footer.write(&mut changed);
    let length = (changed.len() - end) as u32;
    changed.extend(length.to_le_bytes());
    changed.extend(b"PAR1");
    changed
}

fn metadata_of(file: &[u8]) -> ParquetMetaData {
    let encoded = &file[data_end(file)..file.len() - 8];
    ParquetMetaDataReader::decode_metadata(encoded).unwrap()
}

/// Values of fields that no version of the format has. Booleans in lists are not among them: the
/// parser does not pass over those.
fn unknown() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<u8>().prop_map(Value::Byte),
        (I16..=I64, any::<i32>()).prop_map(|(kind, value)| Value::Number(kind, value.into())),
        any::<[u8; 8]>().prop_map(Value::Double),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::Binary),
        prop::collection::vec(any::<i32>(), 0..20).prop_map(|values| {
            let values = values
                .into_iter()
                .map(|value| Value::Number(I64, value.into()));
            Value::List(I64, values.collect())
        }),
    ];
    leaf.prop_recursive(4, 20, 4, |inner| {
        let fields = prop::collection::vec((1i16..3000, inner), 0..4);
        let strukt = fields.prop_map(Value::Struct).boxed();
        let list = prop::collection::vec(strukt.clone(), 0..20);
        prop_oneof![
            strukt,
            list.prop_map(|structs| Value::List(STRUCT, structs))
        ]
    })
}

/// Where a footer is changed.
#[derive(Clone, Copy, Debug)]
enum At {
    File,
    SchemaElement,
    LogicalType,
    RowGroup,
    Chunk,
    ChunkMetadata,
    Statistics,
    KeyValue,
    ColumnOrder,
}

const PLACES: [At; 9] = [
    At::File,
    At::SchemaElement,
    At::LogicalType,
    At::RowGroup,
    At::Chunk,
    At::ChunkMetadata,
    At::Statistics,
    At::KeyValue,
    At::ColumnOrder,
];

/// Adds an unknown field, or puts an unknown member into a union.
fn change(footer: &mut Value, at: At, which: usize, id: i16, value: Value) {
    let nth = |list: &mut Value, first: usize| -> usize {
        let count = list.elements().len() - first;
        first + which % count
    };
    let place = match at {
        At::File => footer,
        At::SchemaElement => {
            // The first element is the root.
            let schema = footer.field(2);
            let element = nth(schema, 1);
            &mut schema.elements()[element]
        }
        // Of bytes: numbers of an unknown type are nothing to Arrow.
        At::LogicalType => &mut footer.field(2).elements()[2],
        At::RowGroup | At::Chunk | At::ChunkMetadata | At::Statistics => {
            let groups = footer.field(4);
            let group = nth(groups, 0);
            let group = &mut groups.elements()[group];
            match at {
                At::RowGroup => group,
                _ => {
                    let chunks = group.field(1);
                    let chunk = nth(chunks, 0);
                    let chunk = &mut chunks.elements()[chunk];
                    match at {
                        At::Chunk => chunk,
                        At::ChunkMetadata => chunk.field(3),
                        _ => chunk.field(3).field(12),
                    }
                }
            }
        }
        At::KeyValue => {
            let pair = vec![(1, Value::Binary(b"key".to_vec()))];
            let pairs = footer.field(5).elements();
            pairs.push(Value::Struct(pair));
            pairs.last_mut().unwrap()
        }
        At::ColumnOrder => {
            let orders = footer.field(7);
            let order = nth(orders, 0);
            &mut orders.elements()[order]
        }
    };
    match at {
        At::LogicalType => {
            let members = vec![(id, Value::Struct(vec![(id, value)]))];
            place.fields().retain(|(of, _)| *of != 6);
            place.set(10, Value::Struct(members));
        }
        At::ColumnOrder => *place = Value::Struct(vec![(id, Value::Struct(vec![]))]),
        _ => place.set(id, value),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A newer writer's fields and types are passed over, as the parquet crate does.
    #[test]
    fn what_the_parquet_crate_reads_is_read_as_the_same(
        changes in prop::collection::vec(
            (prop::sample::select(PLACES.to_vec()), 0usize..8, 100i16..3000, unknown()), 1..6)
    ) {
        let odd = with_footer(&plain_file(), |footer| {
            for (at, which, id, value) in &changes {
                change(footer, *at, *which, *id, value.clone());
            }
        });
        let expected = metadata_of(&odd);
        let schema = parquet_to_arrow_schema(
            expected.file_metadata().schema_descr(),
            expected.file_metadata().key_value_metadata(),
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let catalog = runtime.block_on(async {
            Bucket::with(&[("a.parquet", odd.clone())]).await.catalog().await
        });
        prop_assert!(catalog.rejected.is_empty(), "{:?}", catalog.rejected);
        let found = &catalog.files[0];
        prop_assert_eq!(found.metadata.file_metadata(), expected.file_metadata());
        let claims = |metadata: ParquetMetaData| without_page_index(believable(metadata));
        let cached = claims(ParquetMetaData::clone(&found.metadata));
        let read = claims(expected.clone());
        prop_assert_eq!(cached.row_groups(), read.row_groups());
        prop_assert!(found.metadata.offset_index().is_some());
        let without = crate::schema::without_metadata(schema.unwrap());
        prop_assert_eq!(found.schema.as_ref(), &without);
    }
}

#[tokio::test]
async fn a_footer_without_page_indexes_is_kept_byte_by_byte() {
    let properties = WriterProperties::builder()
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_offset_index_disabled(true);
    let batch = RecordBatch::try_from_iter(vec![("id", ints(10))]).unwrap();
    let file = write(&batch, properties.build());
    let bucket = Bucket::with(&[("a.parquet", file.clone())]).await;
    let catalog = bucket.catalog().await;
    assert_eq!(catalog.files[0].footer_bytes, file[data_end(&file)..]);
}

/// Catalogs of earlier versions hold footers that were written anew, with page indexes at 0.
#[tokio::test]
async fn a_footer_that_was_written_anew_is_read_with_its_page_indexes() {
    let file = plain_file();
    let reader = ParquetMetaDataReader::new()
        .with_page_index_policy(parquet::file::metadata::PageIndexPolicy::Required);
    let original = reader.parse_and_finish(&Bytes::from(file.clone())).unwrap();
    let mut anew = Vec::new();
    ParquetMetaDataWriter::new(&mut anew, &original)
        .finish()
        .unwrap();
    let data_end = (file.len() - 8) as u64;
    let footer = crate::footer::parse(anew.into(), data_end).unwrap();
    assert_eq!(footer.metadata.offset_index(), original.offset_index());
    assert_eq!(footer.metadata.column_index(), original.column_index());
}

/// parquet-mr 1.8 wrote 0 for the dictionary page of chunks that have none.
#[tokio::test]
async fn a_dictionary_page_at_zero_is_none() {
    let properties = WriterProperties::builder().set_dictionary_enabled(false);
    let batch = RecordBatch::try_from_iter(vec![("id", ints(10)), ("name", texts(10, 5))]);
    let good = write(&batch.unwrap(), properties.build());
    let zero = with_metadata(&good, |chunk| chunk.set_dictionary_page_offset(Some(0)));
    let bucket = Bucket::with(&[("a.parquet", zero)]).await;
    let catalog = bucket.catalog().await;
    let file = &catalog.files[0];
    for (leaf, chunk) in file.metadata.row_group(0).columns().iter().enumerate() {
        let expected = metadata_of(&good).row_group(0).column(leaf).byte_range();
        assert_eq!(chunk.byte_range(), expected);
        let range = expected.0..expected.0 + expected.1;
        assert_eq!(file.chunk_ranges(0, leaf as u32).unwrap(), [range]);
    }
}

#[tokio::test]
async fn a_signed_footer_is_read_and_encrypted_columns_are_rejected_by_name() {
    // encryption_algorithm and footer_signing_key_metadata, and the signature after the footer.
    let mut signed = with_footer(&plain_file(), |footer| {
        footer.set(8, Value::Struct(vec![(1, Value::Struct(vec![]))]));
        footer.set(9, Value::Binary(b"kf".to_vec()));
    });
    let (start, end) = (data_end(&signed), signed.len() - 8);
    signed.truncate(end);
    signed.extend([7; 28]);
    signed.extend(((end + 28 - start) as u32).to_le_bytes());
    signed.extend(b"PAR1");
    let bucket = Bucket::with(&[("a.parquet", signed)]).await;
    assert_eq!(bucket.catalog().await.rows(), 250);

    let encrypted = with_footer(&plain_file(), |footer| {
        let chunk = &mut footer.field(4).elements()[0].field(1).elements()[0];
        chunk.set(8, Value::Struct(vec![(1, Value::Struct(vec![]))]));
    });
    assert_eq!(
        rejection(encrypted).await,
        "columns are encrypted, which is not supported; write them without encryption"
    );
}

/// As a join leaves behind: a name leads to the first of two columns.
#[tokio::test]
async fn of_two_columns_of_one_name_the_first_is_the_tables() {
    let twice = file_of(
        vec![
            ("id", ints(10)),
            ("value", ints(10)),
            ("value", texts(10, 5)),
            ("last", longs(10)),
        ],
        100,
    );
    let once = file_of(vec![("value", longs(10)), ("id", ints(10))], 100);
    let bucket = Bucket::with(&[("a.parquet", twice), ("b.parquet", once)]).await;
    let catalog = bucket.catalog().await;
    assert!(catalog.rejected.is_empty(), "{:?}", catalog.rejected);
    let columns = catalog.schema.fields().iter();
    let columns: Vec<String> = columns
        .map(|field| format!("{} {}", field.name(), field.data_type()))
        .collect();
    assert_eq!(columns, ["id Int32", "value Int64", "last Int64"]);
    let wanted = wanted(&catalog).unwrap();
    let leaves: Vec<(u32, u32)> = wanted
        .iter()
        .map(|wanted| (wanted.chunk.file, wanted.chunk.column))
        .collect();
    assert_eq!(leaves, [(0, 0), (1, 1), (0, 1), (1, 0), (0, 3)]);
    let value = &sizes(&catalog)[1];
    let group = catalog.files[0].metadata.row_group(0);
    let other = catalog.files[1].metadata.row_group(0);
    assert_eq!(
        value.parquet_bytes as i64,
        group.column(1).compressed_size() + other.column(0).compressed_size()
    );
}

#[tokio::test]
async fn units_of_time_widen_unless_a_footer_says_that_a_value_does_not_fit() {
    let millis = |last: i64| -> ArrayRef {
        let values = TimestampMillisecondArray::from(vec![0, last]);
        Arc::new(values.with_timezone("UTC"))
    };
    let nanos: ArrayRef = Arc::new(TimestampNanosecondArray::from(vec![1, 2]).with_timezone("UTC"));
    let nanos = file_of(vec![("ts", nanos)], 10);
    let bucket = Bucket::with(&[
        (
            "a.parquet",
            file_of(vec![("ts", millis(1_704_067_200_000))], 10),
        ),
        ("b.parquet", nanos),
    ])
    .await;
    let catalog = bucket.catalog().await;
    assert_eq!(
        catalog.schema.field(0).data_type().to_string(),
        "Timestamp(ns, \"UTC\")"
    );

    // The year 2300, which nanoseconds in 64 bits do not reach.
    let far = file_of(vec![("ts", millis(10_413_792_000_000))], 10);
    bucket.put("c.parquet", far).await;
    let error = bucket.load(&layout()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "column \"ts\" of s3://b/t/c.parquet has type Timestamp(ms, \"UTC\") and holds \
         10413792000000, which does not fit into Timestamp(ns, \"UTC\") as in the table's other \
         files; rewrite one of the files or leave it out"
    );
}

/// It would shift the places of the columns after it, where stock DataFusion looks for them in vain.
#[tokio::test]
async fn a_group_without_columns_before_others_is_rejected_by_name() {
    let schema = |text: &str| {
        let schema = parquet::schema::parser::parse_message_type(text).unwrap();
        let mut bytes = Vec::new();
        let properties = Arc::new(WriterProperties::builder().build());
        let writer = SerializedFileWriter::new(&mut bytes, Arc::new(schema), properties);
        writer.unwrap().close().unwrap();
        bytes
    };
    let before = schema("message m { required int64 a; optional group g { } required int64 b; }");
    assert_eq!(
        rejection(before).await,
        "no Arrow schema: a group without columns stands before column \"b\""
    );
    let behind = schema("message m { required int64 a; optional group g { } }");
    let bucket = Bucket::with(&[("a.parquet", behind)]).await;
    assert_eq!(bucket.catalog().await.schema.fields().len(), 1);
}
