//! Catalogs and wanted chunks of Parquet files written here, good ones and bad ones.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Fields, Int32Type, Schema};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::basic::Type as PhysicalType;
use parquet::data_type::{Int96, Int96Type};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, ParquetMetaDataWriter};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use proptest::prelude::*;
use stoa_origin::object_store::memory::InMemory;
use stoa_origin::object_store::{ObjectStoreExt, path::Path};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};

use crate::*;

mod odd_footers;

/// A bucket in memory, and the origin that reads it.
struct Bucket {
    store: Arc<InMemory>,
    origin: Origin,
}

impl Bucket {
    fn new() -> Bucket {
        let store = Arc::new(InMemory::new());
        let stores = Stores::new(StoreSettings::default());
        stores.register("s3://b", store.clone());
        Bucket {
            store,
            origin: Origin::new(stores, OriginLimits::default()),
        }
    }

    async fn with(files: &[(&str, Vec<u8>)]) -> Bucket {
        let bucket = Bucket::new();
        for (path, bytes) in files {
            bucket.put(path, bytes.clone()).await;
        }
        bucket
    }

    async fn put(&self, path: &str, bytes: Vec<u8>) {
        let path = Path::parse(format!("t/{path}")).unwrap();
        self.store.put(&path, bytes.into()).await.unwrap();
    }

    async fn load(&self, layout: &LayoutDocument) -> Result<TableCatalog> {
        TableCatalog::load(&self.origin, layout, 1_000).await
    }

    /// The catalog of everything, which decodes to what it was encoded from.
    async fn catalog(&self) -> TableCatalog {
        let catalog = self.load(&layout()).await.unwrap();
        let encoded = Bytes::from(catalog.encode());
        assert_eq!(TableCatalog::decode(&encoded).unwrap(), catalog);
        catalog
    }

    fn gets(&self) -> u64 {
        self.origin.counters().get_requests
    }
}

fn layout() -> LayoutDocument {
    let table = TableName::parse("s.t").unwrap();
    LayoutDocument::new(table, LayoutVersion::FIRST, "s3://b/t/")
}

fn layout_with(change: impl FnOnce(&mut LayoutDocument)) -> LayoutDocument {
    let mut layout = layout();
    change(&mut layout);
    layout
}

fn write(batch: &RecordBatch, properties: WriterProperties) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// A file of these columns, with `rows_a_group` rows in each row group.
fn file_of(columns: Vec<(&str, ArrayRef)>, rows_a_group: usize) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows_a_group));
    write(&batch, properties.build())
}

fn ints(rows: usize) -> ArrayRef {
    Arc::new(Int32Array::from_iter_values(
        (0..rows as i32).map(|i| i * 3),
    ))
}

fn longs(rows: usize) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(0..rows as i64))
}

fn texts(rows: usize, length: usize) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(
        (0..rows).map(|i| format!("{i:0length$}")),
    ))
}

/// Three row groups of two columns.
fn plain_file() -> Vec<u8> {
    file_of(vec![("id", ints(250)), ("name", texts(250, 20))], 100)
}

fn nested_batch() -> RecordBatch {
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([
        Some(vec![Some(1), None]),
        None,
        Some(vec![]),
        Some(vec![Some(4)]),
    ]);
    let strukt = StructArray::new(
        Fields::from(vec![
            Field::new("x", DataType::Int64, true),
            Field::new("y", DataType::Utf8, true),
        ]),
        vec![longs(4), texts(4, 3)],
        Some(vec![true, false, true, true].into()),
    );
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
    for row in 0..4 {
        map.keys().append_value(format!("k{row}"));
        map.values().append_option((row % 2 == 0).then_some(row));
        map.append(row != 3).unwrap();
    }
    RecordBatch::try_from_iter_with_nullable(vec![
        ("before", ints(4), false),
        ("list", Arc::new(lists) as ArrayRef, true),
        ("struct", Arc::new(strukt), true),
        ("map", Arc::new(map.finish()), true),
        ("after", Arc::new(NullArray::new(4)), true),
    ])
    .unwrap()
}

fn names(wanted: &[WantedChunk], catalog: &TableCatalog) -> Vec<String> {
    wanted
        .iter()
        .map(|wanted| {
            let chunk = wanted.chunk;
            let file = &catalog.files[chunk.file as usize];
            let name = file.root(chunk.column).unwrap().name();
            format!("{}/{}/{name}", chunk.file, chunk.row_group)
        })
        .collect()
}

// ---- catalogs of good files

#[tokio::test]
async fn a_table_of_plain_files_costs_one_request_a_file() {
    let bucket = Bucket::with(&[("b.parquet", plain_file()), ("a.parquet", plain_file())]).await;
    let catalog = bucket.catalog().await;
    let paths: Vec<&str> = catalog
        .files
        .iter()
        .map(|file| file.identity.path.as_str())
        .collect();
    assert_eq!(paths, ["t/a.parquet", "t/b.parquet"]);
    assert_eq!((catalog.rows(), catalog.looked_at_unix_ms), (500, 1_000));
    assert_eq!(catalog.table_version().to_string(), "s.t:1");
    let counters = bucket.origin.counters();
    assert_eq!(
        (
            counters.list_requests,
            counters.get_requests,
            counters.head_requests
        ),
        (1, 2, 0)
    );
    assert!(Arc::ptr_eq(
        &catalog.files[0].schema,
        &catalog.files[1].schema
    ));
    assert!(catalog.files[0].last_modified_unix_ms > 1_600_000_000_000);
}

/// Planning from the cached footer must see what it would have seen in the file.
#[tokio::test]
async fn the_cached_footer_says_what_the_file_says() {
    let bytes = plain_file();
    let bucket = Bucket::with(&[("a.parquet", bytes.clone())]).await;
    let catalog = bucket.catalog().await;
    let cached = &catalog.files[0].metadata;
    let original = ParquetMetaDataReader::new()
        .with_page_index_policy(parquet::file::metadata::PageIndexPolicy::Required)
        .parse_and_finish(&Bytes::from(bytes))
        .unwrap();
    assert_eq!(cached.column_index(), original.column_index());
    assert_eq!(cached.offset_index(), original.offset_index());
    assert!(cached.offset_index().is_some());
    assert_eq!(cached.file_metadata(), original.file_metadata());
    for (cached, original) in cached.row_groups().iter().zip(original.row_groups()) {
        assert_eq!(cached.num_rows(), original.num_rows());
        for (cached, original) in cached.columns().iter().zip(original.columns()) {
            assert_eq!(cached.statistics(), original.statistics());
            assert_eq!(cached.byte_range(), original.byte_range());
            assert_eq!(
                cached.unencoded_byte_array_data_bytes(),
                original.unencoded_byte_array_data_bytes()
            );
        }
    }
}

#[tokio::test]
async fn nested_columns_are_one_chunk_under_their_first_leaf() {
    let properties = WriterProperties::builder().build();
    let bucket = Bucket::with(&[("a.parquet", write(&nested_batch(), properties))]).await;
    let catalog = bucket.catalog().await;
    let roots: Vec<(&str, u32, u32)> = catalog
        .root_columns(0)
        .iter()
        .map(|root| (root.name(), root.first_leaf, root.leaves))
        .collect();
    assert_eq!(
        roots,
        [
            ("before", 0, 1),
            ("list", 1, 1),
            ("struct", 2, 2),
            ("map", 4, 2),
            ("after", 6, 1)
        ]
    );
    assert!(catalog.root_columns(7).is_empty());
    let wanted = wanted(&catalog).unwrap();
    let columns: Vec<u32> = wanted.iter().map(|wanted| wanted.chunk.column).collect();
    assert_eq!(columns, [0, 1, 2, 4, 6]);
    assert!(
        wanted
            .iter()
            .all(|wanted| wanted.form != Form::Parquet && wanted.rows == 4)
    );
    let file = &catalog.files[0];
    assert_eq!(file.chunk_ranges(0, 4).unwrap().len(), 2);
    assert_eq!(
        file.chunk_ranges(0, 3).unwrap_err().to_string(),
        "catalog has no chunk of s3://b/t/a.parquet at row group 0, column 3"
    );
    assert!(file.chunk_ranges(1, 0).is_err());
    assert!(!catalog.schema.field(0).is_nullable());
}

#[tokio::test]
async fn added_columns_are_nullable_and_types_widen() {
    let old = file_of(vec![("id", ints(10)), ("gone", texts(10, 2))], 100);
    let new = file_of(vec![("added", texts(10, 2)), ("id", longs(10))], 100);
    let bucket = Bucket::with(&[("1.parquet", old), ("2.parquet", new)]).await;
    let catalog = bucket.catalog().await;
    let fields: Vec<String> = catalog
        .schema
        .fields()
        .iter()
        .map(|f| format!("{} {} {}", f.name(), f.data_type(), f.is_nullable()))
        .collect();
    assert_eq!(
        fields,
        ["id Int64 false", "gone Utf8 true", "added Utf8 true"]
    );
    // Each file keeps its own type, in which its chunks are decoded.
    assert_eq!(
        *catalog.files[0].schema.field(0).data_type(),
        DataType::Int32
    );
    let wanted = wanted(&catalog).unwrap();
    assert_eq!(
        names(&wanted, &catalog),
        ["0/0/id", "1/0/id", "0/0/gone", "1/0/added"]
    );
    assert_eq!(wanted[1].chunk.column, 1);
}

#[tokio::test]
async fn types_that_do_not_fit_name_the_file() {
    let old = file_of(vec![("id", ints(10))], 100);
    let new = file_of(vec![("id", texts(10, 2))], 100);
    let bucket = Bucket::with(&[("1.parquet", old), ("2.parquet", new)]).await;
    assert_eq!(
        bucket.load(&layout()).await.unwrap_err().to_string(),
        "column \"id\" of s3://b/t/2.parquet has type Utf8, and Int32 in the files before it; \
         integers, floats, decimals and units of time widen, nothing else does: rewrite the file or \
         leave it out"
    );
}

#[tokio::test]
async fn partition_columns_come_from_paths() {
    let bucket = Bucket::with(&[
        ("y=2023/m=a%20b/1.parquet", plain_file()),
        ("y=2024/m=2/1.parquet", plain_file()),
    ])
    .await;
    let catalog = bucket.catalog().await;
    let text = DataType::Dictionary(Box::new(DataType::UInt16), Box::new(DataType::Utf8));
    assert_eq!(
        catalog.partition_columns,
        [("y".into(), text.clone()), ("m".into(), text)]
    );
    assert_eq!(catalog.files[0].partition_values, ["2023", "a b"]);
    let error = bucket
        .load(&layout_with(|layout| {
            layout.partition_columns = vec!["y".into()]
        }))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "s3://b/t/y=2023/m=a%20b/1.parquet has partition columns [y, m], expected [y] as in the \
         table's other files; move the file or name the table's partition_columns"
    );
    let error = wanted(&TableCatalog {
        layout: layout_with(|layout| layout.columns = Some(vec!["y".into()])),
        ..catalog
    });
    assert_eq!(
        error.unwrap_err().to_string(),
        "unknown column \"y\" of table s.t; it is a partition column, whose values come from the \
         files' paths: leave it out"
    );
}

#[tokio::test]
async fn a_column_in_the_files_is_no_partition_column() {
    let bucket = Bucket::with(&[("id=1/a.parquet", plain_file())]).await;
    assert!(bucket.catalog().await.partition_columns.is_empty());
    let named = layout_with(|layout| layout.partition_columns = vec!["id".into()]);
    assert_eq!(
        bucket.load(&named).await.unwrap_err().to_string(),
        "invalid layout of s.t: partition_columns = \"id\": the files have a column of that name; \
         leave it out"
    );
}

#[tokio::test]
async fn other_files_beside_the_data_are_no_data() {
    let bucket = Bucket::with(&[
        ("a.parquet", plain_file()),
        ("README.md", b"read me".to_vec()),
        ("_SUCCESS", b"x".to_vec()),
    ])
    .await;
    let catalog = bucket.catalog().await;
    assert_eq!((catalog.files.len(), catalog.rejected.len()), (1, 0));
    // Where nothing is named .parquet, everything is data.
    let bucket = Bucket::with(&[("part-0", plain_file()), ("part-1", plain_file())]).await;
    assert_eq!(bucket.catalog().await.files.len(), 2);
}

#[tokio::test]
async fn a_location_may_be_one_file() {
    let bucket = Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", plain_file())]).await;
    let one = layout_with(|layout| layout.location = "s3://b/t/a.parquet".into());
    assert_eq!(bucket.load(&one).await.unwrap().files.len(), 1);
    let none = layout_with(|layout| layout.location = "s3://b/empty/".into());
    assert_eq!(
        bucket.load(&none).await.unwrap_err().to_string(),
        "no data files at s3://b/empty/; expected Parquet files that are neither empty nor hidden"
    );
    let unknown = layout_with(|layout| layout.location = "ftp://b/t/".into());
    let error = bucket.load(&unknown).await.unwrap_err().to_string();
    assert!(
        error.starts_with("unknown store \"ftp://b\"; known are s3://b, file://…"),
        "{error}"
    );
}

#[tokio::test]
async fn bloom_filters_are_kept_with_the_footer() {
    let batch = RecordBatch::try_from_iter(vec![("id", ints(1000)), ("n", longs(1000))]).unwrap();
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(500))
        .set_column_bloom_filter_enabled("id".into(), true)
        .build();
    let bytes = write(&batch, properties);
    let bucket = Bucket::with(&[("a.parquet", bytes.clone())]).await;
    let file = &bucket.catalog().await.files[0];
    assert_eq!(file.extra.len(), 2);
    let kept: Vec<_> = file
        .extra
        .iter()
        .map(|(start, kept)| (*start, kept.len()))
        .collect();
    for (start, kept) in &file.extra {
        assert_eq!(kept[..], bytes[*start as usize..][..kept.len()]);
    }

    // Older writers do not say how long a filter is.
    let unsized_filters = with_metadata(&bytes, |chunk| chunk.set_bloom_filter_length(None));
    bucket.put("a.parquet", unsized_filters).await;
    let file = &bucket.catalog().await.files[0];
    assert_eq!(file.extra.len(), 2);
    for ((start, bytes), (kept_start, kept_length)) in file.extra.iter().zip(kept) {
        assert_eq!(*start, kept_start);
        assert!(
            bytes.len() >= kept_length,
            "{} of {kept_length}",
            bytes.len()
        );
    }
}

/// A footer larger than what is read at first takes a second request, not an error.
#[tokio::test]
async fn a_large_footer_is_read_whole() {
    let columns = (0..1500).map(|i| (format!("column_number_{i:04}"), ints(4)));
    let columns: Vec<(String, ArrayRef)> = columns.collect();
    let named = columns
        .iter()
        .map(|(name, array)| (name.as_str(), array.clone()))
        .collect();
    let bytes = file_of(named, 2);
    let bucket = Bucket::with(&[("a.parquet", bytes)]).await;
    let catalog = bucket.catalog().await;
    assert!(catalog.files[0].footer_bytes.len() > 256 << 10);
    assert_eq!(catalog.root_columns(0).len(), 1500);
    assert!(catalog.files[0].metadata.offset_index().is_some());
    assert!(bucket.gets() <= 3, "{}", bucket.gets());
    // Many footers are parsed on several cores, with the same result.
    for name in ["b.parquet", "c.parquet"] {
        bucket.put(name, plain_file()).await;
    }
    assert_eq!(bucket.catalog().await.files.len(), 3);
}

// ---- refresh

#[tokio::test]
async fn a_refresh_reads_only_what_is_new() {
    let bucket = Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", plain_file())]).await;
    let catalog = bucket.catalog().await;
    let before = bucket.origin.counters();
    assert_eq!(catalog.refresh(&bucket.origin, 2_000).await.unwrap(), None);
    let after = bucket.origin.counters();
    assert_eq!(after.get_requests, before.get_requests);
    assert_eq!(after.list_requests, before.list_requests + 1);

    bucket.put("c.parquet", plain_file()).await;
    let appended = catalog
        .refresh(&bucket.origin, 3_000)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (appended.files.len(), appended.looked_at_unix_ms),
        (3, 3_000)
    );
    assert!(Arc::ptr_eq(
        &appended.files[0].metadata,
        &catalog.files[0].metadata
    ));
    assert_eq!(bucket.gets(), before.get_requests + 1);

    bucket.put("a.parquet", plain_file()).await;
    let overwritten = appended
        .refresh(&bucket.origin, 4_000)
        .await
        .unwrap()
        .unwrap();
    assert_ne!(overwritten.files[0].identity, appended.files[0].identity);
    assert_eq!(overwritten.files[1].identity, appended.files[1].identity);
    assert_eq!(bucket.gets(), before.get_requests + 2);

    bucket.store.delete(&"t/a.parquet".into()).await.unwrap();
    let deleted = overwritten
        .refresh(&bucket.origin, 5_000)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(deleted.files.len(), 2);
}

#[tokio::test]
async fn a_rejected_file_is_not_read_again_until_it_changes() {
    let bucket = Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", vec![7; 50])]).await;
    let catalog = bucket.catalog().await;
    let gets = bucket.gets();
    assert_eq!(catalog.refresh(&bucket.origin, 2_000).await.unwrap(), None);
    bucket.put("c.parquet", plain_file()).await;
    let more = catalog
        .refresh(&bucket.origin, 2_000)
        .await
        .unwrap()
        .unwrap();
    assert_eq!((more.files.len(), &more.rejected), (2, &catalog.rejected));
    assert_eq!(bucket.gets(), gets + 1);
    bucket.put("b.parquet", plain_file()).await;
    let mended = more.refresh(&bucket.origin, 2_000).await.unwrap().unwrap();
    assert_eq!((mended.files.len(), mended.rejected.len()), (3, 0));
}

/// A change of writer: the table says so, instead of staying as it was before.
#[tokio::test]
async fn a_new_file_that_makes_no_table_with_the_others_is_rejected_until_it_does() {
    let of = |column: ArrayRef| file_of(vec![("id", column)], 100);
    let bucket = Bucket::with(&[("b.parquet", of(ints(10)))]).await;
    let catalog = bucket.catalog().await;
    bucket.put("a.parquet", of(texts(10, 2))).await;
    bucket.put("c.parquet", of(longs(10))).await;
    bucket.put("day=1/d.parquet", of(ints(10))).await;
    let refreshed = catalog.refresh(&bucket.origin, 2_000).await.unwrap();
    let refreshed = refreshed.unwrap();
    let encoded = Bytes::from(refreshed.encode());
    assert_eq!(TableCatalog::decode(&encoded).unwrap(), refreshed);
    let paths = |catalog: &TableCatalog| -> Vec<String> {
        let files = catalog.files.iter();
        files.map(|file| file.identity.path.clone()).collect()
    };
    assert_eq!(paths(&refreshed), ["t/b.parquet", "t/c.parquet"]);
    assert_eq!(*refreshed.schema.field(0).data_type(), DataType::Int64);
    let reasons = refreshed.rejected.iter();
    let reasons: Vec<&str> = reasons.map(|file| file.reason.as_str()).collect();
    assert!(
        reasons[0].starts_with("column \"id\" of s3://b/t/a.parquet has type Utf8, and Int32"),
        "{reasons:?}"
    );
    assert!(
        reasons[1].starts_with("s3://b/t/day=1/d.parquet has partition columns [day]"),
        "{reasons:?}"
    );
    assert_eq!(
        refreshed.refresh(&bucket.origin, 3_000).await.unwrap(),
        None
    );
    // The others were the odd ones: what is left is a table.
    for path in ["t/b.parquet", "t/c.parquet", "t/day=1/d.parquet"] {
        bucket.store.delete(&path.into()).await.unwrap();
    }
    let healed = refreshed.refresh(&bucket.origin, 4_000).await.unwrap();
    let healed = healed.unwrap();
    assert_eq!(paths(&healed), ["t/a.parquet"]);
    assert!(healed.rejected.is_empty(), "{:?}", healed.rejected);
    assert_eq!(*healed.schema.field(0).data_type(), DataType::Utf8);
}

#[tokio::test]
async fn a_table_of_which_nothing_can_be_read_any_more_says_so() {
    let bucket = Bucket::with(&[("a.parquet", plain_file())]).await;
    let catalog = bucket.catalog().await;
    bucket.put("a.parquet", vec![7; 50]).await;
    let broken = catalog.refresh(&bucket.origin, 2_000).await.unwrap();
    let broken = broken.unwrap();
    assert_eq!((broken.files.len(), broken.rejected.len()), (0, 1));
    assert_eq!(broken.schema, catalog.schema);
    let error = broken.check_readable().unwrap_err().to_string();
    assert!(
        error.starts_with(
            "table s.t has 1 files that cannot be read, of them s3://b/t/a.parquet: not a Parquet"
        ),
        "{error}"
    );
    bucket.put("a.parquet", plain_file()).await;
    let mended = broken.refresh(&bucket.origin, 3_000).await.unwrap();
    assert_eq!(mended.unwrap().rows(), 250);
}

#[tokio::test]
async fn a_snapshot_is_taken_as_named_while_it_is_there() {
    let bucket = Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", plain_file())]).await;
    let all = bucket.catalog().await;
    let one = layout_with(|layout| layout.files = vec![all.files[1].identity.clone()]);
    let lists = bucket.origin.counters().list_requests;
    let catalog = bucket.load(&one).await.unwrap();
    assert_eq!(catalog.files[0].identity, all.files[1].identity);
    assert_eq!(
        (catalog.files.len(), bucket.origin.counters().list_requests),
        (1, lists)
    );
    assert_eq!(catalog.snapshot(), one.files);
    assert_eq!(all.snapshot().len(), 2);
    // What it names is gone: the table is what is there now, whole.
    bucket.put("b.parquet", plain_file()).await;
    let catalog = bucket.load(&one).await.unwrap();
    assert_eq!(catalog.files.len(), 2);
    assert_ne!(catalog.files[1].identity, all.files[1].identity);
}

// ---- bad files

/// Two good files around a bad one: the reason it is rejected for.
async fn rejection(bad: Vec<u8>) -> String {
    let bucket = Bucket::with(&[
        ("a.parquet", plain_file()),
        ("bad.parquet", bad.clone()),
        ("c.parquet", plain_file()),
    ])
    .await;
    let catalog = bucket.catalog().await;
    assert_eq!(catalog.files.len(), 2);
    assert_eq!(catalog.rejected[0].url, "s3://b/t/bad.parquet");
    assert_eq!(catalog.rejected[0].identity.size, bad.len() as u64);
    wanted(&catalog).unwrap();
    catalog.rejected[0].reason.clone()
}

/// The file with other metadata, and without page indexes.
fn with_metadata(
    bytes: &[u8],
    change: impl Fn(
        parquet::file::metadata::ColumnChunkMetaDataBuilder,
    ) -> parquet::file::metadata::ColumnChunkMetaDataBuilder,
) -> Vec<u8> {
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&Bytes::copy_from_slice(bytes));
    let metadata: ParquetMetaData = metadata.unwrap();
    let mut builder = metadata.into_builder();
    let groups = builder.take_row_groups().into_iter().map(|group| {
        let mut group = group.into_builder();
        let columns = group.take_columns();
        let columns = columns.into_iter().map(|column| {
            let column = column
                .into_builder()
                .set_column_index_offset(None)
                .set_column_index_length(None)
                .set_offset_index_offset(None)
                .set_offset_index_length(None);
            change(column).build().unwrap()
        });
        group
            .set_column_metadata(columns.collect())
            .build()
            .unwrap()
    });
    let metadata = builder.set_row_groups(groups.collect()).build();
    let mut changed = bytes[..data_end(bytes)].to_vec();
    ParquetMetaDataWriter::new(&mut changed, &metadata)
        .finish()
        .unwrap();
    changed
}

fn data_end(bytes: &[u8]) -> usize {
    let length = bytes[bytes.len() - 8..][..4].try_into().unwrap();
    bytes.len() - 8 - u32::from_le_bytes(length) as usize
}

#[tokio::test]
async fn a_file_that_is_no_parquet_file_is_rejected_by_name() {
    assert_eq!(
        rejection(b"PAR1".to_vec()).await,
        "file of 4 bytes is shorter than any Parquet file (12 bytes)"
    );
    assert_eq!(
        rejection(vec![b'x'; 100]).await,
        "not a Parquet file: it ends in \"xxxx\", expected \"PAR1\""
    );
    let mut encrypted = plain_file();
    let length = encrypted.len();
    encrypted[length - 1] = b'E';
    assert_eq!(
        rejection(encrypted).await,
        "the footer is encrypted, which is not supported; write it without encryption"
    );
}

#[tokio::test]
async fn a_footer_longer_than_its_file_is_rejected_by_name() {
    let mut bytes = plain_file();
    let size = bytes.len();
    bytes[size - 8..size - 4].copy_from_slice(&(size as u32).to_le_bytes());
    assert_eq!(
        rejection(bytes.clone()).await,
        format!("Parquet footer of {size} bytes is longer than the file of {size} bytes")
    );
    bytes[size - 8..size - 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(rejection(bytes).await.contains("is longer than the file"));
}

#[tokio::test]
async fn a_garbage_footer_is_rejected_by_name() {
    let mut bytes = plain_file();
    let size = bytes.len();
    let start = data_end(&bytes);
    bytes[start..size - 8].fill(0xff);
    let reason = rejection(bytes.clone()).await;
    assert!(reason.starts_with("corrupt Parquet footer: "), "{reason}");
    bytes[start..size - 8].fill(0);
    assert_eq!(rejection(bytes).await, "corrupt Parquet footer: no schema");
}

#[tokio::test]
async fn a_chunk_past_the_end_is_rejected_by_name() {
    let good = plain_file();
    let past = with_metadata(&good, |chunk| {
        chunk
            .set_data_page_offset(1 << 40)
            .set_dictionary_page_offset(None)
    });
    let end = data_end(&past);
    let reason = rejection(past).await;
    assert!(
        reason.starts_with("chunk of row group 0, column 0 (\"id\") at 1099511627776 with ")
            && reason.ends_with(&format!(
                " bytes is not within the {end} bytes before the footer"
            )),
        "{reason}"
    );
    for (offset, length) in [(-5, 10), (4, -1), (i64::MAX, 10), (4, 1 << 40)] {
        let bad = with_metadata(&good, |chunk| {
            let chunk = chunk.set_dictionary_page_offset(None);
            let chunk = chunk.set_data_page_offset(offset);
            chunk.set_total_compressed_size(length)
        });
        let reason = rejection(bad).await;
        let expected = format!("(\"id\") at {offset} with {length} bytes is not within the ");
        assert!(reason.contains(&expected), "{reason}");
    }
    let elsewhere = with_metadata(&good, |chunk| chunk.set_file_path("other.parquet".into()));
    assert_eq!(
        rejection(elsewhere).await,
        "chunk of row group 0, column 0 (\"id\") lies in another file"
    );
    let negative = with_metadata(&good, |chunk| chunk.set_num_values(-1));
    assert!(rejection(negative).await.contains("has -1 values"));
    let absurd = with_metadata(&good, |chunk| chunk.set_total_uncompressed_size(1 << 50));
    assert!(
        rejection(absurd)
            .await
            .ends_with(" in 1125899906842624 bytes, expected at most 2^40")
    );
}

#[tokio::test]
async fn a_page_index_that_cannot_be_believed_is_left_out() {
    let good = plain_file();
    let original = ParquetMetaDataReader::new()
        .parse_and_finish(&Bytes::from(good.clone()))
        .unwrap();
    let offset = original
        .row_group(0)
        .column(0)
        .offset_index_offset()
        .unwrap() as usize;
    let mut bad = good.clone();
    bad[offset..offset + 8].fill(0xff);
    let bucket = Bucket::with(&[("a.parquet", bad)]).await;
    let catalog = bucket.catalog().await;
    let metadata = &catalog.files[0].metadata;
    assert!(metadata.offset_index().is_none() && metadata.column_index().is_none());
    assert_eq!(metadata.row_group(0).column(0).offset_index_offset(), None);
    assert_eq!(wanted(&catalog).unwrap().len(), 6);
}

#[tokio::test]
async fn a_table_of_bad_files_only_is_an_error() {
    let bucket = Bucket::with(&[("a.parquet", vec![7; 50]), ("b.parquet", vec![7; 5])]).await;
    assert_eq!(
        bucket.load(&layout()).await.unwrap_err().to_string(),
        "none of the 2 files at s3://b/t/ can be read; the first: s3://b/t/a.parquet: not a \
         Parquet file: it ends in \"\\u{7}\\u{7}\\u{7}\\u{7}\", expected \"PAR1\""
    );
}

fn int96_file() -> Vec<u8> {
    let time = Type::primitive_type_builder("time", PhysicalType::INT96)
        .build()
        .unwrap();
    let schema = Type::group_type_builder("schema")
        .with_fields(vec![Arc::new(time)])
        .build();
    let mut bytes = Vec::new();
    let properties = WriterProperties::builder().set_statistics_enabled(EnabledStatistics::None);
    let mut writer = SerializedFileWriter::new(
        &mut bytes,
        Arc::new(schema.unwrap()),
        Arc::new(properties.build()),
    )
    .unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values = [Int96::from(vec![0, 0, 2_440_588]); 3];
    column
        .typed::<Int96Type>()
        .write_batch(&values, Some(&[1; 3]), None)
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[tokio::test]
async fn int96_is_kept_as_it_is_in_the_file() {
    let bucket = Bucket::with(&[("a.parquet", int96_file())]).await;
    let catalog = bucket.catalog().await;
    let chunks = wanted(&catalog).unwrap();
    assert_eq!(chunks[0].form, Form::Parquet);
    assert_eq!(chunks[0].bytes, chunks[0].compressed_bytes);
    let size = &sizes(&catalog)[0];
    assert_eq!(size.arrow_bytes, size.parquet_bytes);
}

#[tokio::test]
async fn dictionaries_have_no_arrow_form() {
    let dictionary: DictionaryArray<Int32Type> = ["a", "b", "a"].into_iter().collect();
    let bytes = file_of(
        vec![("d", Arc::new(dictionary) as ArrayRef), ("i", ints(3))],
        10,
    );
    let bucket = Bucket::with(&[("a.parquet", bytes)]).await;
    let forms: Vec<Form> = wanted(&bucket.catalog().await)
        .unwrap()
        .iter()
        .map(|wanted| wanted.form)
        .collect();
    assert_eq!(forms, [Form::Parquet, Form::Packed]);
}

// ---- wanted chunks

async fn two_files() -> Bucket {
    let small = file_of(vec![("id", ints(100)), ("name", texts(100, 20))], 100);
    Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", small)]).await
}

async fn wanted_of(change: impl FnOnce(&mut LayoutDocument)) -> Result<Vec<String>> {
    let catalog = two_files().await.load(&layout_with(change)).await?;
    Ok(names(&wanted(&catalog)?, &catalog))
}

#[tokio::test]
async fn columns_are_wanted_in_their_order_and_whole() {
    assert_eq!(
        wanted_of(|layout| layout.columns = Some(vec!["name".into(), "id".into()]))
            .await
            .unwrap(),
        [
            "0/0/name", "0/1/name", "0/2/name", "1/0/name", "0/0/id", "0/1/id", "0/2/id", "1/0/id"
        ]
    );
    let first = |layout: &mut LayoutDocument| layout.first_columns = Some(1);
    assert_eq!(
        wanted_of(first).await.unwrap(),
        ["0/0/id", "0/1/id", "0/2/id", "1/0/id"]
    );
    let many = |layout: &mut LayoutDocument| layout.first_columns = Some(99);
    assert_eq!(wanted_of(many).await.unwrap().len(), 8);
    let full = |layout: &mut LayoutDocument| {
        layout.full_files_only = Some(3);
        layout.columns = Some(vec!["id".into()]);
    };
    assert_eq!(
        wanted_of(full).await.unwrap(),
        ["0/0/id", "0/1/id", "0/2/id"]
    );
    let parquet = layout_with(|layout| layout.form = FormChoice::Parquet);
    let catalog = two_files().await.load(&parquet).await.unwrap();
    let chunks = wanted(&catalog).unwrap();
    assert!(
        chunks
            .iter()
            .all(|c| c.form == Form::Parquet && c.bytes == c.compressed_bytes)
    );
}

#[tokio::test]
async fn an_unknown_column_is_named_with_the_nearest() {
    let column = async |name: &str| {
        let name = name.to_owned();
        wanted_of(|layout| layout.columns = Some(vec![name]))
            .await
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        column("NAMES").await,
        "unknown column \"NAMES\" of table s.t; did you mean \"name\"?"
    );
    assert_eq!(
        column("xyz").await,
        "unknown column \"xyz\" of table s.t; it has id, name"
    );
}

fn spec(path: &str, row_group: u32, column: ColumnRef) -> ChunkSpec {
    ChunkSpec {
        path: path.into(),
        row_group,
        column,
    }
}

#[tokio::test]
async fn chunks_are_wanted_in_their_order() {
    let chunks = vec![
        spec("b.parquet", 0, ColumnRef::Leaf(1)),
        spec("t/a.parquet", 2, ColumnRef::Name("id".into())),
    ];
    let wanted = wanted_of(|layout| layout.chunks = Some(chunks))
        .await
        .unwrap();
    assert_eq!(wanted, ["1/0/name", "0/2/id"]);
}

#[tokio::test]
async fn a_reference_to_what_is_not_there_says_what_is() {
    let message = async |path: &str, row_group, column| {
        let chunk = spec(path, row_group, column);
        wanted_of(|layout| layout.chunks = Some(vec![chunk]))
            .await
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message("a.parquet", 9, ColumnRef::Leaf(1)).await,
        "layout reference to file \"a.parquet\", row group 9, column 1: the largest row group is 2"
    );
    assert_eq!(
        message("a.parquet", 0, ColumnRef::Leaf(7)).await,
        "layout reference to file \"a.parquet\", row group 0, column 7: the largest column is 1"
    );
    assert_eq!(
        message("a.parquet", 0, ColumnRef::Name("nane".into())).await,
        "layout reference to file \"a.parquet\", row group 0, column \"nane\": the file has no \
         such column; did you mean \"name\"?"
    );
    assert_eq!(
        message("c.parquet", 0, ColumnRef::Leaf(0)).await,
        "layout reference to file \"c.parquet\", row group 0, column 0: none of the table's 2 \
         files; did you mean \"b.parquet\"?"
    );
}

#[tokio::test]
async fn a_leaf_within_a_nested_column_is_no_chunk() {
    let properties = WriterProperties::builder().build();
    let bucket = Bucket::with(&[("a.parquet", write(&nested_batch(), properties))]).await;
    let chunks = vec![spec("a.parquet", 0, ColumnRef::Leaf(3))];
    let catalog = bucket
        .load(&layout_with(|layout| layout.chunks = Some(chunks)))
        .await
        .unwrap();
    assert_eq!(
        wanted(&catalog).unwrap_err().to_string(),
        "layout reference to file \"a.parquet\", row group 0, column 3: it belongs to column \
         \"struct\", which is cached whole under 2"
    );
}

#[tokio::test]
async fn the_same_chunk_in_two_spellings_is_found() {
    let chunks = vec![
        spec("a.parquet", 1, ColumnRef::Leaf(1)),
        spec("t/a.parquet", 1, ColumnRef::Name("name".into())),
    ];
    assert_eq!(
        wanted_of(|layout| layout.chunks = Some(chunks))
            .await
            .unwrap_err()
            .to_string(),
        "layout names file \"t/a.parquet\", row group 1, column \"name\" twice; name it once"
    );
}

/// A layout stays valid when its files change under it: it wants less, it does not fail.
#[tokio::test]
async fn chunks_of_changed_files_are_left_out() {
    let bucket = two_files().await;
    let files: Vec<_> = bucket
        .catalog()
        .await
        .files
        .into_iter()
        .map(|file| file.identity)
        .collect();
    let layout = layout_with(|layout| {
        layout.files = files;
        layout.chunks = Some(vec![
            spec("a.parquet", 2, ColumnRef::Leaf(0)),
            spec("a.parquet", 0, ColumnRef::Leaf(0)),
            spec("b.parquet", 0, ColumnRef::Leaf(0)),
        ]);
    });
    let catalog = bucket.load(&layout).await.unwrap();
    assert_eq!(wanted(&catalog).unwrap().len(), 3);
    bucket
        .put("a.parquet", file_of(vec![("id", ints(10))], 100))
        .await;
    bucket.put("b.parquet", vec![7; 50]).await;
    let catalog = catalog
        .refresh(&bucket.origin, 2_000)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(names(&wanted(&catalog).unwrap(), &catalog), ["0/0/id"]);
}

#[tokio::test]
async fn row_groups_without_rows_need_no_cache() {
    let bucket = Bucket::with(&[("a.parquet", file_of(vec![("id", ints(0))], 100))]).await;
    let catalog = bucket.catalog().await;
    assert_eq!((catalog.rows(), wanted(&catalog).unwrap()), (0, vec![]));
}

/// Budgets are planned with the estimates, so they must not be far from what it takes.
#[tokio::test]
async fn estimates_are_near_the_real_sizes() {
    let rows = 50_000;
    let flags =
        StringArray::from_iter_values((0..rows).map(|i| if i % 3 == 0 { "R" } else { "N" }));
    let comments = texts(rows, 40);
    let sparse = Int64Array::from_iter((0..rows as i64).map(|i| (i % 2 == 0).then_some(i)));
    let decimals = Decimal128Array::from_iter_values((0..rows as i128).map(|i| i * 100))
        .with_precision_and_scale(15, 2)
        .unwrap();
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..rows as i32).map(|i| Some(vec![Some(i); 4])),
    );
    let columns: Vec<(&str, ArrayRef, u64)> = vec![
        ("int", ints(rows), 4),
        ("flag", Arc::new(flags), 16),
        ("comment", comments, 16 + 40),
        ("sparse", Arc::new(sparse), 8),
        ("decimal", Arc::new(decimals), 16),
        ("list", Arc::new(lists), 4 + 16),
        (
            "bool",
            Arc::new(BooleanArray::from_iter((0..rows).map(|i| Some(i % 5 == 0)))),
            0,
        ),
    ];
    let batch = RecordBatch::try_from_iter(
        columns
            .iter()
            .map(|(name, array, _)| (*name, array.clone())),
    );
    let bytes = write(&batch.unwrap(), WriterProperties::builder().build());
    let bucket = Bucket::with(&[("a.parquet", bytes)]).await;
    let mut catalog = bucket.catalog().await;
    catalog.layout.form = FormChoice::Arrow;
    for (size, (name, _, bytes_a_row)) in sizes(&catalog).iter().zip(&columns) {
        assert_eq!(size.column, *name);
        let least = bytes_a_row * rows as u64;
        let most = least + least / 10 + rows as u64 / 4 + 8192;
        assert!(
            (least..=most).contains(&size.arrow_bytes),
            "{size:?}, {least} to {most}"
        );
    }
    let total: u64 = sizes(&catalog).iter().map(|size| size.arrow_bytes).sum();
    assert_eq!(
        total,
        wanted(&catalog)
            .unwrap()
            .iter()
            .map(|wanted| wanted.bytes)
            .sum::<u64>()
    );
}

/// A worker knows the form of a chunk from the plan and not the budget that it was chosen by: its
/// estimate has to be the planner's all the same.
#[tokio::test]
async fn a_chunks_bytes_in_a_form_do_not_depend_on_how_it_was_chosen() {
    let rows = 20_000;
    let file = file_of(vec![("id", longs(rows)), ("text", texts(rows, 40))], 10_000);
    let catalog = Bucket::with(&[("a.parquet", file)]).await.catalog().await;
    let all = sizes(&catalog);
    let packed: u64 = all.iter().map(|size| size.packed_bytes).sum();
    let mut forms = HashSet::new();
    for budget_bytes in [0, packed / 2, packed, u64::MAX] {
        for chunk in wanted_within(&catalog, budget_bytes).unwrap() {
            let bytes = chunk_bytes(&catalog, chunk.chunk).unwrap();
            assert_eq!(bytes.of(chunk.form), chunk.bytes);
            assert_eq!(bytes.parquet, chunk.compressed_bytes);
            forms.insert(chunk.form);
        }
    }
    assert!(forms.len() > 1, "{forms:?}");
    for (file, row_group, column) in [(1, 0, 0), (0, 2, 0), (0, 0, 2)] {
        let nowhere = ChunkRef {
            file,
            row_group,
            column,
        };
        assert_eq!(chunk_bytes(&catalog, nowhere), None);
    }
}

/// A budget is filled by benefit a byte: what it leaves out is wanted behind the rest, and where it
/// is the layout's own, not at all. Columns that a layout names stay in its order.
#[tokio::test]
async fn what_a_budget_leaves_out_is_wanted_last_or_not_at_all() {
    let rows = 20_000;
    let columns = vec![("text", texts(rows, 400)), ("id", longs(rows))];
    let file = file_of(columns, 10_000);
    let mut catalog = Bucket::with(&[("a.parquet", file)]).await.catalog().await;
    let size = |name: &str| {
        let all = sizes(&catalog);
        all.into_iter().find(|size| size.column == name).unwrap()
    };
    let budget = size("id").packed_bytes + 1000;
    assert!(size("text").packed_bytes.min(size("text").parquet_bytes) > budget);
    let order = |catalog: &TableCatalog, budget| -> Vec<u32> {
        let wanted = wanted_within(catalog, budget).unwrap();
        wanted.iter().map(|wanted| wanted.chunk.column).collect()
    };
    assert_eq!(order(&catalog, u64::MAX), [0, 0, 1, 1]);
    assert_eq!(order(&catalog, budget), [1, 1, 0, 0]);
    catalog.layout.columns = Some(vec!["text".to_owned(), "id".to_owned()]);
    assert_eq!(order(&catalog, budget), [0, 0, 1, 1]);
    catalog.layout.budget_bytes = Some(budget);
    assert_eq!(order(&catalog, u64::MAX), [1, 1]);
}

// ---- encoded catalogs

#[tokio::test]
async fn decoding_shares_the_bytes() {
    let catalog = Bucket::with(&[("a.parquet", plain_file())])
        .await
        .catalog()
        .await;
    let encoded = Bytes::from(catalog.encode());
    let decoded = TableCatalog::decode(&encoded).unwrap();
    let within = encoded.as_ptr_range();
    assert!(within.contains(&decoded.files[0].footer_bytes.as_ptr()));
}

#[tokio::test]
async fn another_format_is_refused_by_its_number() {
    let json = br#"{"format": 2, "news": []}"#;
    let bytes = [&(json.len() as u32).to_le_bytes(), &json[..]].concat();
    assert_eq!(
        TableCatalog::decode(&bytes.into()).unwrap_err().to_string(),
        "catalog format 2 is not supported, expected 1; load the table again with this version"
    );
    let message = |bytes: &'static [u8]| {
        TableCatalog::decode(&Bytes::from_static(bytes))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(b"ab"),
        "corrupt catalog: 2 bytes, expected a length"
    );
    assert_eq!(
        message(b"\xff\0\0\0{}"),
        "corrupt catalog: header of 255 bytes where 2 are"
    );
    assert!(
        message(b"\x02\0\0\0{}").starts_with("corrupt catalog: header: missing field `format`")
    );
}

fn in_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(work)
}

fn encoded_catalog() -> Vec<u8> {
    static ENCODED: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    ENCODED
        .get_or_init(|| {
            in_runtime(async {
                Bucket::with(&[("a.parquet", plain_file())])
                    .await
                    .catalog()
                    .await
            })
            .encode()
        })
        .clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a file's end says, the table loads without the file, or with it.
    #[test]
    fn a_damaged_file_never_panics(
        damage in prop::collection::vec((0usize..2000, any::<u8>()), 1..8),
    ) {
        let mut bytes = plain_file();
        let size = bytes.len();
        for (back, byte) in damage {
            bytes[size - 1 - back % size] = byte;
        }
        in_runtime(async {
            let bucket = Bucket::with(&[("a.parquet", plain_file()), ("b.parquet", bytes)]).await;
            if let Ok(catalog) = bucket.load(&layout()).await {
                assert_eq!(catalog.files.len() + catalog.rejected.len(), 2);
                wanted(&catalog).unwrap();
                sizes(&catalog);
                let encoded = Bytes::from(catalog.encode());
                assert_eq!(TableCatalog::decode(&encoded).unwrap(), catalog);
            }
        });
    }

    #[test]
    fn a_damaged_catalog_never_panics(
        damage in prop::collection::vec((any::<usize>(), any::<u8>()), 0..8),
        length in any::<usize>(),
    ) {
        let mut bytes = encoded_catalog();
        for (at, byte) in damage {
            let length = bytes.len();
            bytes[at % length] = byte;
        }
        if length % 4 == 0 {
            bytes.truncate(length % (bytes.len() + 1));
        }
        if let Ok(catalog) = TableCatalog::decode(&bytes.into()) {
            sizes(&catalog);
        }
    }
}

/// The schema that all files have is shared, not carried once a file.
#[test]
fn schemas_survive_their_encoding() {
    let catalog = TableCatalog::decode(&encoded_catalog().into()).unwrap();
    let expected = Schema::new(vec![
        Field::new("id", DataType::Int32, false),
        Field::new("name", DataType::Utf8, false),
    ]);
    assert_eq!(*catalog.schema, expected);
    assert_eq!(*catalog.files[0].schema, expected);
    assert_eq!(
        *decoded_schema(&catalog.schema).field(1).data_type(),
        DataType::Utf8View
    );
}
