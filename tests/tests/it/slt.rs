//! The files in `slt/`: one expected output, asked of stock DataFusion and of Stoa with the cache
//! on, off, half loaded, and while it is being replaced.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use datafusion::arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use sqllogictest::{DBOutput, DefaultColumnType, Runner, strict_column_validator};
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_tests::edges::{self, EdgeTable};
use stoa_tests::scratch::CacheDirectory;
use stoa_tests::tpch;

/// A session as sqllogictest sees it.
pub(crate) struct Session(pub(crate) SessionContext);

#[async_trait::async_trait]
impl sqllogictest::AsyncDB for Session {
    type Error = datafusion::error::DataFusionError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Self::Error> {
        let frame = self.0.sql(sql).await?;
        let columns = frame.schema().fields().len();
        let batches = frame.collect().await?;
        if columns == 0 {
            return Ok(DBOutput::StatementComplete(0));
        }
        let options = FormatOptions::default().with_null("NULL");
        let mut rows = vec![];
        for batch in &batches {
            let columns = batch.columns().iter().map(|column| {
                let formatter = ArrayFormatter::try_new(column.as_ref(), &options)?;
                Ok((formatter, column.data_type().is_floating()))
            });
            let columns = columns.collect::<Result<Vec<_>, Self::Error>>()?;
            for row in 0..batch.num_rows() {
                let cells = columns.iter().map(|(formatter, floating)| {
                    cell(&formatter.value(row).to_string(), *floating)
                });
                rows.push(cells.collect());
            }
        }
        Ok(DBOutput::Rows {
            types: vec![DefaultColumnType::Any; columns],
            rows,
        })
    }

    async fn shutdown(&mut self) {}
}

/// A value as it stands in a line: an empty string visible, and floating-point numbers (not
/// decimals: those are exact) rounded to 12 digits, for their sums depend on the order of addition.
fn cell(text: &str, floating: bool) -> String {
    match text.parse::<f64>() {
        Ok(number) if floating && number.is_finite() => {
            let rounded = format!("{number:.11e}").parse::<f64>();
            rounded.unwrap_or(number).to_string()
        }
        _ if text.is_empty() => "(empty)".to_owned(),
        _ => text.replace('\n', "\\n"),
    }
}

/// The tables of one kind of session: names and where their files lie.
struct Tables {
    _directory: tempfile::TempDir,
    edges: Vec<EdgeTable>,
}

impl Tables {
    fn write() -> Tables {
        let directory = tempfile::tempdir().unwrap();
        let edges = edges::write(directory.path()).unwrap();
        Tables {
            _directory: directory,
            edges,
        }
    }

    /// Name, directory and partition columns of every table.
    fn all(&self) -> Vec<(String, PathBuf, Vec<String>)> {
        let data = tpch::data().unwrap();
        let tpch = tpch::TABLES
            .iter()
            .map(|t| (t.name.to_owned(), data.join(t.name), vec![]));
        let edges = self.edges.iter().map(|t| {
            let partitions = t
                .partition_columns
                .iter()
                .map(|(name, _)| name.clone())
                .collect();
            (format!("edge_{}", t.name), t.directory.clone(), partitions)
        });
        tpch.chain(edges).collect()
    }

    async fn stock(&self) -> SessionContext {
        let session = SessionContext::new_with_config(config());
        for (name, directory, _) in self.all() {
            let path = format!("{}/", directory.display());
            let edge = self
                .edges
                .iter()
                .find(|t| format!("edge_{}", t.name) == name);
            let mut options = ParquetReadOptions::default();
            if let Some(edge) = edge {
                options.schema = Some(&edge.schema);
                options = options.table_partition_cols(edge.partition_columns.clone());
            }
            session
                .register_parquet(&name, path, options)
                .await
                .unwrap();
        }
        session
    }
}

fn config() -> SessionConfig {
    SessionConfig::new().with_target_partitions(2)
}

/// A cache with all tables laid out in schema `public`.
struct Cache {
    embedded: Arc<Embedded>,
    _directory: CacheDirectory,
}

impl Cache {
    async fn start() -> Cache {
        let directory = CacheDirectory::new().unwrap();
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes: 512 << 20,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Arc::new(Embedded::start(settings).await.unwrap());
        Cache {
            embedded,
            _directory: directory,
        }
    }

    async fn load(&self, tables: &Tables, version: u64, change: impl Fn(&mut LayoutDocument)) {
        let mut documents = vec![];
        for (name, directory, partitions) in tables.all() {
            let name = TableName::new("public", &name).unwrap();
            let version = LayoutVersion::new(version).unwrap();
            let location = format!("{}/", directory.display());
            let mut document = LayoutDocument::new(name, version, location);
            document.partition_columns = partitions;
            change(&mut document);
            self.embedded.publish(&document).await.unwrap();
            documents.push(document);
        }
        for document in &documents {
            self.embedded
                .wait_loaded(document, Duration::from_secs(120))
                .await
                .unwrap();
        }
    }

    async fn session(&self) -> SessionContext {
        let session = SessionContext::new_with_config(config());
        self.embedded.stoa().register(&session).await.unwrap();
        session
    }
}

fn files() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("slt");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "slt"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "slt/ is empty");
    files
}

async fn check(session: &SessionContext, mode: &str) {
    for file in files() {
        let mut runner = Runner::new(|| {
            let session = session.clone();
            async move { Ok(Session(session)) }
        });
        runner.with_column_validator(strict_column_validator);
        if let Err(error) = runner.run_file_async(&file).await {
            panic!("cache {mode}: {}", error.display(false));
        }
    }
}

/// The expected output is that of stock DataFusion. `STOA_SLT_WRITE=1` writes it anew.
#[tokio::test(flavor = "multi_thread")]
async fn stock_gives_the_expected_answers() {
    let tables = Tables::write();
    let session = tables.stock().await;
    if std::env::var_os("STOA_SLT_WRITE").is_some() {
        for file in files() {
            let mut runner = Runner::new(|| {
                let session = session.clone();
                async move { Ok(Session(session)) }
            });
            runner
                .update_test_file(
                    &file,
                    " ",
                    sqllogictest::default_validator,
                    sqllogictest::default_normalizer,
                    strict_column_validator,
                )
                .await
                .unwrap();
        }
    }
    check(&session, "absent").await;
}

/// The queries of the demo and those asked here cannot drift apart.
#[test]
fn the_queries_of_the_demo_are_asked_word_by_word() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let asked = std::fs::read_to_string(root.join("slt/tpch.slt")).unwrap();
    for number in 1..=22 {
        let path = root.join(format!("../cli/queries/q{number:02}.sql"));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with("--"));
        let query = lines.collect::<Vec<_>>().join("\n");
        let query = query.trim().trim_end_matches(';');
        assert!(asked.contains(query), "{} is not asked", path.display());
    }
}

/// Everything in memory, decoded; then the same session told not to use it.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_on_and_off_gives_the_expected_answers() {
    let (tables, cache) = (Tables::write(), Cache::start().await);
    cache.load(&tables, 1, |_| ()).await;
    let session = cache.session().await;
    let asked = || cache.embedded.origin().counters().requests();
    let before = asked();
    assert!(scan_of(&session).await.contains("cache=stoa"));
    check(&session, "on").await;
    assert_eq!(asked(), before, "all of it came from memory");
    session.sql("set stoa.enabled = false").await.unwrap();
    // Stock's scan asks the store itself, past the books of the origin: the plan is what tells.
    let scan = scan_of(&session).await;
    assert!(!scan.contains("cache=stoa"), "{scan}");
    check(&session, "off").await;
}

/// How a session scans.
async fn scan_of(session: &SessionContext) -> String {
    let explain = "explain select sum(l_orderkey) from lineitem where l_tax > 0";
    let plan = session.sql(explain).await.unwrap().collect().await.unwrap();
    pretty_format_batches(&plan).unwrap().to_string()
}

/// Everything packed, and columns of one table in three forms and one left out; with the filters
/// above the scan, and in it.
#[tokio::test(flavor = "multi_thread")]
async fn the_packed_form_and_mixtures_give_the_expected_answers() {
    let (tables, cache) = (Tables::write(), Cache::start().await);
    cache
        .load(&tables, 1, |document| document.form = FormChoice::Packed)
        .await;
    let pushdown = "set datafusion.execution.parquet.pushdown_filters = true";
    let session = cache.session().await;
    check(&session, "packed").await;
    session.sql(pushdown).await.unwrap();
    check(&session, "packed, with filters in the scan").await;
    let forms = [FormChoice::Arrow, FormChoice::Packed, FormChoice::Parquet];
    cache
        .load(&tables, 2, |document| {
            if document.table.table() != "lineitem" {
                document.form = forms[document.table.table().len() % 3];
                return;
            }
            let columns = ["l_orderkey", "l_quantity", "l_shipdate", "l_returnflag"];
            let columns = columns.into_iter().chain(["l_discount", "l_comment"]);
            for (at, column) in columns.clone().enumerate() {
                document.forms.insert(column.to_owned(), forms[at % 3]);
            }
            document.columns = Some(columns.map(str::to_owned).collect());
        })
        .await;
    let session = cache.session().await;
    check(&session, "in several forms").await;
    session.sql(pushdown).await.unwrap();
    check(&session, "in several forms, with filters in the scan").await;
}

/// Every table's first columns only, and in the form of the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_half_loaded_cache_gives_the_expected_answers() {
    let (tables, cache) = (Tables::write(), Cache::start().await);
    cache
        .load(&tables, 1, |document| document.first_columns = Some(3))
        .await;
    check(&cache.session().await, "half loaded").await;
    cache
        .load(&tables, 2, |document| document.form = FormChoice::Parquet)
        .await;
    check(&cache.session().await, "in the parquet form").await;
}

/// Generation after generation is published under the queries' feet.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_is_being_replaced_gives_the_expected_answers() {
    let (tables, cache) = (Arc::new(Tables::write()), Arc::new(Cache::start().await));
    cache.load(&tables, 1, |_| ()).await;
    let done = Arc::new(AtomicBool::new(false));
    let replacing = {
        let (tables, cache, done) = (Arc::clone(&tables), Arc::clone(&cache), Arc::clone(&done));
        tokio::spawn(async move {
            let mut version = 1;
            while !done.load(Ordering::Relaxed) {
                version += 1;
                let columns = [1, 4, 2, 16][version as usize % 4];
                cache
                    .load(&tables, version, |d| d.first_columns = Some(columns))
                    .await;
            }
            version
        })
    };
    let session = cache.session().await;
    check(&session, "while it is being replaced").await;
    done.store(true, Ordering::Relaxed);
    assert!(replacing.await.unwrap() > 1);
}
