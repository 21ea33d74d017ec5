//! Object stores as the field has them: other dialects of S3, stores that throttle and stumble,
//! names and listings that are odd. Stock DataFusion reads them; so does the cache, or it says why.

mod dialects;
mod keys;
mod patience;

use std::process::{Command, Stdio};
use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use stoa_origin::{Location, Origin, OriginLimits, StoreSettings, Stores};
use stoa_tests::cluster::{Ran, binary};
use stoa_tests::s3::{S3Options, S3Server};
use stoa_tests::scratch::CacheDirectory;

/// Rows of one file: `id` counts them, `v` follows from `id`.
fn parquet(ids: std::ops::Range<i64>) -> Vec<u8> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("v", DataType::Int64, false),
    ]));
    let columns: [Int64Array; 2] = [
        ids.clone().collect(),
        ids.map(|id| id * 7919 % 1_000_003).collect(),
    ];
    let columns = columns.map(|column| Arc::new(column) as _).to_vec();
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(1000));
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, Some(properties.build())).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// What `select count(*) as n, sum(v) as s` says of rows with these ids, by hand.
fn answer(ids: impl Iterator<Item = i64> + Clone) -> Value {
    let sum: i64 = ids.clone().map(|id| id * 7919 % 1_000_003).sum();
    json!([{"n": ids.count(), "s": sum}])
}

const QUERY: &str = "select count(*) as n, sum(v) as s from s3.t";

/// A store with bucket `wares`, and an embedded Stoa with a home and a cache of its own.
struct Shop {
    s3: S3Server,
    home: tempfile::TempDir,
    cache: CacheDirectory,
    _objects: tempfile::TempDir,
}

impl Shop {
    fn open() -> Shop {
        let objects = tempfile::tempdir().unwrap();
        let s3 = S3Server::start(S3Options::at(objects.path())).unwrap();
        s3.create_bucket("wares").unwrap();
        let shop = Shop {
            s3,
            home: tempfile::tempdir().unwrap(),
            cache: CacheDirectory::new().unwrap(),
            _objects: objects,
        };
        shop.configure("allow_http = true\n");
        shop
    }

    fn configure(&self, more: &str) {
        let text = format!(
            "[store.\"s3://wares\"]\nendpoint = {:?}\nregion = {:?}\naccess_key_id = {:?}\n\
             secret_access_key = {:?}\n{more}",
            self.s3.endpoint(),
            S3Server::REGION,
            self.s3.access_key(),
            self.s3.secret_key(),
        );
        std::fs::write(self.home.path().join("stoa.toml"), text).unwrap();
    }

    fn stoa(&self, arguments: &[&str]) -> Ran {
        let output = Command::new(binary().unwrap())
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.home.path())
            .env("STOA_CACHE__LOCATION", self.cache.path())
            .env("STOA_CACHE__SIZE", "64MiB")
            .env("STOA_CACHE__FRESHNESS", "snapshot")
            .current_dir(self.home.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.stoa(arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}: {ran:?}");
        ran.stdout
    }

    fn ask(&self, sql: &str) -> Value {
        let text = self.ok(&["sql", "-q", "--format", "json", "-c", sql]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{sql}: {error}: {text}"))
    }

    /// Reads of the store, in this process.
    fn origin(&self, limits: OriginLimits) -> Origin {
        let settings = StoreSettings::default()
            .with_option("s3://wares", "endpoint", self.s3.endpoint())
            .with_option("s3://wares", "region", S3Server::REGION)
            .with_option("s3://wares", "allow_http", "true")
            .with_option("s3://wares", "access_key_id", self.s3.access_key())
            .with_option("s3://wares", "secret_access_key", self.s3.secret_key());
        Origin::new(Stores::new(settings), limits)
    }

    /// Two files, one of several row groups; the ids are 0 to 999 and 0 to 3999.
    fn two_files(&self) -> Value {
        self.s3
            .put("wares", "t/0.parquet", parquet(0..1000))
            .unwrap();
        self.s3
            .put("wares", "t/1.parquet", parquet(0..4000))
            .unwrap();
        answer((0..1000).chain(0..4000))
    }
}

fn table() -> Location {
    Location::parse("s3://wares/t/").unwrap()
}
