//! Bloom filters of types whose values are kept in the file as something else, and no bounds, so that
//! only the filters decide.

use std::path::Path;
use std::sync::Arc;

use arrow::array::*;
use parquet::file::properties::EnabledStatistics;

use super::{Case, States, ask, write_file};

const ROWS: i64 = 20_000;
const DAY: i32 = 3653;

fn write(directory: &Path) {
    let keys = || (0..ROWS).map(|row| row % 500);
    let rows = || 0..ROWS;
    let decimals = |precision: u8, scale: i8| -> ArrayRef {
        let values = keys().map(|key| i128::from(key * 2 - 300) * 10_i128.pow(scale as u32));
        let values = Decimal128Array::from_iter_values(values);
        Arc::new(values.with_precision_and_scale(precision, scale).unwrap())
    };
    let floats = keys().map(|key| if key == 0 { -0.0 } else { key as f64 });
    let blobs = keys().map(|key| match key {
        0 => b"\xff\x00neg".to_vec(),
        key => format!("k{key}").into_bytes(),
    });
    let seconds = i64::from(DAY) * 86_400;
    let times = keys().map(|key| (key % 60 - seconds) * 1_000_000 + key);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(Int64Array::from_iter_values(rows()))),
        ("d9", decimals(9, 2)),
        ("d19", decimals(19, 2)),
        ("d38", decimals(38, 4)),
        (
            "i8",
            Arc::new(Int8Array::from_iter_values(
                rows().map(|r| (r % 100 - 50) as i8),
            )),
        ),
        (
            "i16",
            Arc::new(Int16Array::from_iter_values(
                keys().map(|k| (k * 3 - 700) as i16),
            )),
        ),
        (
            "u8",
            Arc::new(UInt8Array::from_iter_values(
                rows().map(|r| (r % 200) as u8),
            )),
        ),
        (
            "u16",
            Arc::new(UInt16Array::from_iter_values(
                keys().map(|k| (k * 100) as u16),
            )),
        ),
        (
            "u32",
            Arc::new(UInt32Array::from_iter_values(
                keys().map(|k| 4_000_000_000 + k as u32),
            )),
        ),
        ("f", Arc::new(Float64Array::from_iter_values(floats))),
        ("b", Arc::new(BinaryArray::from_iter_values(blobs))),
        (
            "s",
            Arc::new(StringArray::from_iter_values(
                keys().map(|k| format!("k{k}")),
            )),
        ),
        (
            "day",
            Arc::new(Date32Array::from_iter_values(
                keys().map(|k| k as i32 - DAY),
            )),
        ),
        (
            "ts",
            Arc::new(TimestampMicrosecondArray::from_iter_values(times).with_timezone("UTC")),
        ),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    write_file(&directory.join("a.parquet"), &batch, 10_000, |properties| {
        properties
            .set_statistics_enabled(EnabledStatistics::None)
            .set_bloom_filter_enabled(true)
            .set_bloom_filter_max_ndv(1000)
    });
}

const CASE: Case = Case {
    write,
    states: States::All,
    some: &["id", "d19", "i8", "s", "b"],
    asked: &[
        ("select count(*) from t where d9 = -300.00", "40"),
        ("select count(*) from t where d19 = -298.00", "40"),
        ("select count(*) from t where d38 = 698.0000", "40"),
        ("select count(*) from t where d19 = 1.00", "0"),
        ("select count(*) from t where i8 = -50", "200"),
        ("select count(*) from t where i16 = -700", "40"),
        ("select count(*) from t where u8 = 199", "100"),
        ("select count(*) from t where u16 = 49900", "40"),
        ("select count(*) from t where u32 = 4000000499", "40"),
        ("select count(*) from t where f = 0.0", "40"),
        (
            "select count(*) from t where b = arrow_cast('k7', 'Binary')",
            "40",
        ),
        (
            "select count(*) from t where b = decode('ff006e6567', 'hex')",
            "40",
        ),
        (
            "select count(*) from t where s in ('k7', 'k499', 'nothing')",
            "80",
        ),
        ("select count(*) from t where day = date '1960-01-31'", "40"),
        (
            "select count(*) from t where day = timestamp '1960-01-31T00:00:00'",
            "40",
        ),
        (
            "select count(*) from t where ts = timestamp '1960-01-01T00:00:07.000007Z'",
            "40",
        ),
        (
            "select count(*) from t where d9 = 300 or i16 in (-697, 1)",
            "80",
        ),
        (
            "select count(*) from t a join (select d19 as x, i8 as y from t where id = 1) v \
             on a.d19 = v.x and a.i8 = v.y",
            "40",
        ),
    ],
};

#[tokio::test(flavor = "multi_thread")]
async fn filters_hash_what_is_in_the_file() {
    ask(&CASE).await;
}
