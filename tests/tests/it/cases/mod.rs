//! Tables as the field has them, asked in every state that the cache can be in: each state reads by
//! other code. The right answers were worked out without any statistics of the files, by programs
//! that are none of DataFusion's.

mod bounds_missing;
mod bounds_of_text;
mod bounds_of_unsigned;
mod claims_untrue;
mod dictionaries_at_zero;
mod filters_of_bloom;
mod filters_of_extremes;
mod maps_by_other_names;
mod nans;
mod nulls_uncounted;
mod texts_that_are_none;
mod types_unknown;
mod zeros_in_lists;

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::error::DataFusionError;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};
use stoa_datafusion::{Embedded, EmbeddedSettings, Stoa};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_tests::scratch::CacheDirectory;

use super::neighbours::{Neighbourhood, Worker};

/// A table `t`, what is asked of it, and what is right.
pub(super) struct Case {
    /// Writes its files into a directory.
    write: fn(&Path),
    states: States,
    /// The columns that are cached where only some are.
    some: &'static [&'static str],
    /// Statements and their answers: a line a row, values apart by commas, nothing for a null. The
    /// rows of a statement without an order of its own stand in the order of their text. A `set` has
    /// no answer, and counts for what follows.
    asked: &'static [(&'static str, &'static str)],
}

/// The states in which a case is right.
#[derive(Clone, Copy, Debug, PartialEq)]
enum States {
    All,
    /// All but as a stock table, which refuses the files.
    Ours,
    /// Those in which all values have been looked at: nothing else can know better than the footer.
    Decoded,
}

/// What of the table is in memory.
#[derive(Clone, Copy, Debug)]
enum Cached {
    All(FormChoice),
    Some(FormChoice),
}

const FORMS: [FormChoice; 4] = [
    FormChoice::Arrow,
    FormChoice::Packed,
    FormChoice::Parquet,
    FormChoice::Auto,
];

/// Settings under which a scan does its work in different ways: any two that follow each other take
/// both values of each.
fn configurations() -> [SessionConfig; 4] {
    let settings = [
        (1, 8192, false),
        (16, 97, true),
        (1, 97, true),
        (16, 8192, false),
    ];
    settings.map(|(partitions, batch, pushdown)| {
        let mut config = SessionConfig::new()
            .with_target_partitions(partitions)
            .with_batch_size(batch)
            .with_repartition_file_min_size(0);
        config.options_mut().execution.parquet.pushdown_filters = pushdown;
        config
    })
}

/// Two of them, others for each state that follows.
fn two_configurations(state: usize) -> impl Iterator<Item = SessionConfig> {
    let from = state % 2 * 2;
    configurations().into_iter().skip(from).take(2)
}

/// Asks all of a case in every state, and fails with every answer that is not right.
pub(super) async fn ask(case: &Case) {
    let files = tempfile::tempdir().unwrap();
    (case.write)(files.path());
    let location = format!("{}/", files.path().display());
    let mut wrong = vec![];
    match case.states {
        States::All | States::Ours => {
            cold(case, &location, &mut wrong).await;
            for (number, form) in FORMS.into_iter().enumerate() {
                cached(case, &location, Cached::All(form), number, &mut wrong).await;
            }
            for (number, form) in FORMS.into_iter().take(3).enumerate() {
                cached(case, &location, Cached::Some(form), number + 1, &mut wrong).await;
                beside(case, &location, form, number, &mut wrong).await;
            }
        }
        States::Decoded => {
            for (number, form) in [FormChoice::Arrow, FormChoice::Packed]
                .into_iter()
                .enumerate()
            {
                cached(case, &location, Cached::All(form), number, &mut wrong).await;
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} answers:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// In a process that can read the table, and has nobody who loads it.
async fn cold(case: &Case, location: &str, wrong: &mut Vec<String>) {
    let cache = Cache::start().await;
    let sql = format!("create external table t stored as stoa location '{location}'");
    for config in configurations() {
        let stoa = Stoa::open(&cache.directory.path(), cache.embedded.origin().clone());
        let session = SessionContext::new_with_config(config);
        stoa.register(&session).await.unwrap();
        session.sql(&sql).await.unwrap().collect().await.unwrap();
        case.compare("t", "cold", &session, wrong).await;
    }
    cache.embedded.shutdown().await;
}

/// As a table of the cache, and as a stock table over the same files.
async fn cached(
    case: &Case,
    location: &str,
    cached: Cached,
    number: usize,
    wrong: &mut Vec<String>,
) {
    let cache = Cache::start().await;
    load(&cache.embedded, location, case.columns(cached)).await;
    for config in two_configurations(number) {
        let session = cache.session(config.clone()).await;
        let state = format!("{cached:?}");
        case.compare("t", &state, &session, wrong).await;
        if case.states == States::All && matches!(cached, Cached::All(_)) {
            let session = cache.session(config).await;
            let options = ParquetReadOptions::default();
            session
                .register_parquet("stock", location, options)
                .await
                .unwrap();
            let state = format!("{cached:?}, through a stock table");
            case.compare("stock", &state, &session, wrong).await;
        }
    }
    cache.embedded.shutdown().await;
}

/// Some columns here, and all of them in the memory of a neighbour.
async fn beside(
    case: &Case,
    location: &str,
    form: FormChoice,
    number: usize,
    wrong: &mut Vec<String>,
) {
    let (here, there) = (Worker::start().await, Worker::start().await);
    load(&here.embedded, location, case.columns(Cached::Some(form))).await;
    load(&there.embedded, location, (None, form)).await;
    let both = Neighbourhood::of(vec![here, there]);
    let node = both.node(0).await;
    for config in two_configurations(number) {
        let session = SessionContext::new_with_config(config);
        let stoa = Stoa::with_reader(node.reader.clone(), None);
        stoa.register(&session).await.unwrap();
        let state = format!("{form:?} at a neighbour's");
        case.compare("t", &state, &session, wrong).await;
    }
    let counts = node.reader.statistics().counts();
    assert!(counts.remote_tcp > 0, "nothing came from the neighbour");
    both.shutdown().await;
}

impl Case {
    fn columns(&self, cached: Cached) -> (Option<&'static [&'static str]>, FormChoice) {
        match cached {
            Cached::All(form) => (None, form),
            Cached::Some(form) => (Some(self.some), form),
        }
    }

    async fn compare(
        &self,
        table: &str,
        state: &str,
        session: &SessionContext,
        wrong: &mut Vec<String>,
    ) {
        let config = session.copied_config();
        let (partitions, batch) = (config.target_partitions(), config.batch_size());
        let pushdown = config.options().execution.parquet.pushdown_filters;
        for (sql, expected) in self.asked {
            if sql.starts_with("set ") {
                session.sql(sql).await.unwrap();
                continue;
            }
            let own = sql.replace(" t ", &format!(" {table} "));
            let found = match answer(session, &own).await {
                Ok(found) => found,
                Err(error) => error.to_string(),
            };
            if found != *expected {
                wrong.push(format!(
                    "{state}, {partitions} partitions of {batch}, pushdown {pushdown}: {sql}: \
                     {found:?} instead of {expected:?}"
                ));
            }
        }
    }
}

/// A cache of its own.
struct Cache {
    embedded: Embedded,
    directory: CacheDirectory,
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
        let embedded = Embedded::start(settings).await.unwrap();
        assert!(embedded.is_owner());
        Cache {
            embedded,
            directory,
        }
    }

    async fn session(&self, config: SessionConfig) -> SessionContext {
        let session = SessionContext::new_with_config(config);
        self.embedded.stoa().register(&session).await.unwrap();
        session
    }
}

async fn load(embedded: &Embedded, location: &str, (columns, form): (Option<&[&str]>, FormChoice)) {
    let name = TableName::new("public", "t").unwrap();
    let mut document = LayoutDocument::new(name, LayoutVersion::FIRST, location);
    document.columns = columns.map(|names| names.iter().map(|n| (*n).to_owned()).collect());
    document.form = form;
    embedded.publish(&document).await.unwrap();
    embedded
        .wait_loaded(&document, Duration::from_secs(60))
        .await
        .unwrap();
}

/// The rows of an answer as text, sorted where the statement asks for no order.
async fn answer(session: &SessionContext, sql: &str) -> Result<String, DataFusionError> {
    let batches = session.sql(sql).await?.collect().await?;
    let options = FormatOptions::default();
    let mut rows = vec![];
    for batch in &batches {
        let columns = batch.columns().iter();
        let columns: Vec<_> = columns
            .map(|column| ArrayFormatter::try_new(column.as_ref(), &options))
            .collect::<Result<_, _>>()?;
        rows.extend((0..batch.num_rows()).map(|row| {
            let cells = columns.iter().map(|column| column.value(row).to_string());
            cells.collect::<Vec<_>>().join(",")
        }));
    }
    if !asks_for_order(sql) {
        rows.sort();
    }
    Ok(rows.join("\n"))
}

/// Whether an order is asked for outside of all parentheses.
fn asks_for_order(sql: &str) -> bool {
    let mut depth = 0;
    let flat: String = sql
        .chars()
        .filter(|char| {
            depth += i32::from(*char == '(') - i32::from(*char == ')');
            depth == 0
        })
        .collect();
    flat.contains("order by")
}

/// Writes a file in row groups of `row_group` rows, as a writer other than parquet-rs would.
fn write_file(
    path: &Path,
    batch: &RecordBatch,
    row_group: usize,
    change: impl FnOnce(WriterPropertiesBuilder) -> WriterPropertiesBuilder,
) {
    let properties = WriterProperties::builder()
        .set_created_by("parquet-cpp-arrow version 21.0.0".to_owned())
        .set_max_row_group_row_count(Some(row_group));
    let properties = change(properties).build();
    let mut writer = ArrowWriter::try_new(
        File::create(path).unwrap(),
        batch.schema(),
        Some(properties),
    )
    .unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}
