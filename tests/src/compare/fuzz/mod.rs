//! Statements over tables that are both made up, asked of the cache and of the same values in memory.
//!
//! What is right is what DataFusion answers over a copy of the tables in memory, read without
//! statistics, indexes and filters: over files stock itself errs where bounds leave out what a column
//! holds. Where the two differ, stock over the files is asked as well and its answer told; to err as
//! stock does is right where a column is not in memory.
//!
//! Everything follows from the seed but the moments at which chunks are taken away: a statement is
//! named by its world and its number there, and can be asked again alone.

mod statements;
mod tables;
mod values;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::prelude::ParquetReadOptions;
use futures::StreamExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};

use self::statements::Made;
use self::tables::{Failure, PARTITION, Table};
pub use self::values::Floats;
use super::answer::{Answer, ask, difference};
use super::cached::{Cached, SCHEMA};
use super::report::Finding;

/// Statements over one set of tables: what it costs to make and load them is shared.
pub const STATEMENTS_A_WORLD: u64 = 50;

/// What the tables of a world may take of memory.
const CAPACITY_BYTES: u64 = 64 << 20;

/// How many sessions, each with settings of its own, take turns in a world.
const SESSIONS: usize = 3;

/// What to make up.
#[derive(Clone, Debug)]
pub struct FuzzOptions {
    /// What everything follows from.
    pub seed: u64,
    /// How many statements.
    pub statements: u64,
    /// Which floating-point numbers tables hold.
    pub floats: Floats,
    /// Only this statement: the number of its world, and its number there.
    pub only: Option<(u64, u64)>,
    /// Where the tables' files are to stay; else they are removed.
    pub keep: Option<PathBuf>,
    /// How long a statement may take.
    pub patience: Duration,
    /// How many worlds at a time.
    pub at_a_time: usize,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Statements that were asked.
    pub statements: u64,
    /// Those that were refused by both.
    pub refused_alike: u64,
    /// Those that were answered as stock answers over the files and not over the values, where not
    /// all columns were cached: what is not in memory is read with the bounds that stock believes.
    pub as_stock: u64,
    /// Those that were answered differently.
    pub findings: Vec<Finding>,
    /// Column chunks that were read from memory.
    pub hits: u64,
    /// Column chunks that were read from files.
    pub misses: u64,
}

impl Outcome {
    fn add(&mut self, other: Outcome) {
        self.statements += other.statements;
        self.refused_alike += other.refused_alike;
        self.as_stock += other.as_stock;
        self.findings.extend(other.findings);
        self.hits += other.hits;
        self.misses += other.misses;
    }
}

/// Makes statements up and asks them; `tell` is given each difference when it is found, and the
/// outcome so far after each world.
///
/// # Errors
/// If files cannot be written or a cache cannot be started.
pub async fn run(
    options: &FuzzOptions,
    mut tell: impl FnMut(&Outcome, &[Finding]),
) -> Result<Outcome, Failure> {
    let worlds = match options.only {
        Some((world, _)) => world..world + 1,
        None => 0..options.statements.div_ceil(STATEMENTS_A_WORLD),
    };
    let ran = futures::stream::iter(worlds).map(|number| {
        let options = options.clone();
        tokio::spawn(async move { world(number, &options).await })
    });
    let mut ran = ran.buffer_unordered(options.at_a_time.max(1));
    let mut outcome = Outcome::default();
    while let Some(world) = ran.next().await {
        let world = world??;
        let findings = world.findings.clone();
        outcome.add(world);
        tell(&outcome, &findings);
    }
    Ok(outcome)
}

/// A generator of its own for each number, so that none depends on what came before it.
fn generator(seed: u64, world: u64, statement: u64) -> StdRng {
    let mut bytes = [0; 32];
    for (at, number) in [seed, world, statement].into_iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&number.to_le_bytes());
    }
    StdRng::from_seed(bytes)
}

/// Tables, a cache of them, and sessions that ask.
async fn world(number: u64, options: &FuzzOptions) -> Result<Outcome, Failure> {
    let mut rng = generator(options.seed, number, u64::MAX);
    let place = tempfile::Builder::new().prefix("stoa-fuzz-").tempdir()?;
    let directory = match &options.keep {
        Some(keep) => keep.join(format!("world-{number}")),
        None => place.path().to_owned(),
    };
    let mut made = vec![];
    for at in 0..rng.random_range(2..=3) {
        made.push(tables::write(
            &mut rng,
            &directory,
            &format!("t{at}"),
            options.floats,
        )?);
    }
    let cached = Arc::new(Cached::start(CAPACITY_BYTES).await?);
    let mut documents = vec![];
    for table in &made {
        let document = layout(&mut rng, table, 1)?;
        cached.load(&document).await?;
        documents.push(document);
    }
    let through_table: Vec<bool> = made.iter().map(|_| rng.random_bool(0.4)).collect();
    let mut schemas = vec![];
    for ((table, document), through_table) in made.iter().zip(&documents).zip(&through_table) {
        schemas.push(match through_table {
            false => table.declared.clone(),
            true => Some(file_schema(&cached, &document.table).await?),
        });
    }
    let configs: Vec<_> = (0..SESSIONS).map(|_| config(&mut rng)).collect();
    let mut sessions = vec![];
    for (config, min_max) in &configs {
        let session = SessionContext::new_with_config(config.clone());
        cached.register(&session).await?;
        if *min_max {
            let set = "set datafusion.optimizer.enable_aggregate_dynamic_filter_pushdown = true";
            session.sql(set).await?;
        }
        for (((table, schema), document), through_table) in made
            .iter()
            .zip(&schemas)
            .zip(&documents)
            .zip(&through_table)
        {
            if *through_table {
                let stoa = cached.embedded().stoa();
                let Some(opened) = stoa.table(&document.table).await? else {
                    return Err(format!("{} is loaded and not found", document.table).into());
                };
                session.register_table(&table.name, Arc::new(opened))?;
            } else {
                register(&session, table, schema.as_ref()).await?;
            }
        }
        sessions.push(session);
    }
    let oracle = in_memory(&made, &schemas).await?;

    let disturbed = rng.random_bool(0.5);
    let whole = !disturbed && documents.iter().all(|document| document.columns.is_none());
    let done = Arc::new(AtomicBool::new(false));
    let disturber = disturbed.then(|| {
        let (cached, done, made) = (Arc::clone(&cached), Arc::clone(&done), made.clone());
        let rng = generator(options.seed, number, u64::MAX - 1);
        tokio::spawn(async move { disturb(rng, &cached, &made, &done).await })
    });

    let statements = match options.only {
        Some((_, statement)) => statement..statement + 1,
        None => {
            let before = number * STATEMENTS_A_WORLD;
            0..STATEMENTS_A_WORLD.min(options.statements - before)
        }
    };
    let mut outcome = Outcome::default();
    for statement in statements {
        let mut rng = generator(options.seed, number, statement);
        let made_up = statements::make(&mut rng, &made);
        let at = rng.random_range(0..SESSIONS);
        let right = ask(&oracle, &made_up.sql, options.patience).await;
        let ours = ask(&sessions[at], &made_up.sql, options.patience).await;
        outcome.statements += 1;
        let Some(mut what) = difference(&right, &ours, made_up.agreement) else {
            outcome.refused_alike += u64::from(!matches!(right, Answer::Rows(_)));
            continue;
        };
        let stock = over_files(&made, &schemas, &configs[at].0, &made_up, options).await?;
        let stock_differs = difference(&stock, &ours, made_up.agreement);
        match (&right, &stock_differs) {
            // What is refused in memory and not over files was never evaluated there.
            (Answer::Refused(_), None) => continue,
            (_, None) if !whole => {
                outcome.as_stock += 1;
                continue;
            }
            (_, None) => what.push_str("\n      stock over the files answers as we do"),
            (_, Some(_)) if difference(&right, &stock, made_up.agreement).is_none() => {
                what.push_str("\n      stock over the files is right");
            }
            (_, Some(differs)) => {
                what.push_str(&format!(
                    "\n      stock over the files differs from both: {differs}"
                ));
            }
        }
        let forms = (made.iter().zip(&documents).zip(&through_table)).map(|((table, d), own)| {
            let way = if *own { "stoa" } else { "scans" };
            let parts = if table.partitioned {
                ", partitioned"
            } else {
                ""
            };
            format!("{}: {way}, {}{parts}", table.name, d.form.as_str())
        });
        outcome.findings.push(Finding {
            at: format!("{number}.{statement}"),
            through: format!(
                "{}; {}{}",
                forms.collect::<Vec<_>>().join("; "),
                settings(&configs[at]),
                if disturbed { "; disturbed" } else { "" }
            ),
            sql: made_up.sql,
            what,
        });
    }
    done.store(true, Ordering::Relaxed);
    if let Some(disturber) = disturber {
        disturber.await?;
    }
    drop(sessions);
    let counts = cached.counts();
    outcome.hits += counts.hits;
    outcome.misses += counts.misses;
    if let Some(cached) = Arc::into_inner(cached) {
        cached.stop().await;
    }
    Ok(outcome)
}

/// A layout of a table: all of its columns or some, in one form or in several.
fn layout(rng: &mut StdRng, table: &Table, version: u64) -> Result<LayoutDocument, Failure> {
    let forms = [
        FormChoice::Arrow,
        FormChoice::Packed,
        FormChoice::Parquet,
        FormChoice::Auto,
    ];
    let mut form = || *forms.choose(rng).unwrap_or(&FormChoice::Auto);
    let name = TableName::new(SCHEMA, &table.name)?;
    let location = format!("{}/", table.directory.display());
    let mut document = LayoutDocument::new(name, LayoutVersion::new(version)?, location);
    document.form = form();
    if table.partitioned {
        document.partition_columns = vec![PARTITION.to_owned()];
    }
    let several = table
        .columns
        .iter()
        .map(|column| (column.name.clone(), form()));
    let several = several.collect();
    if rng.random_bool(0.3) {
        document.forms = several;
    }
    if rng.random_bool(0.3) {
        let some = table.columns.iter().filter(|_| rng.random_bool(0.6));
        let some: Vec<_> = some.map(|column| column.name.clone()).collect();
        document.forms.retain(|name, _| some.contains(name));
        document.columns = (!some.is_empty()).then_some(some);
        if document.columns.is_none() {
            document.forms.clear();
        }
    }
    Ok(document)
}

/// Takes chunks away and brings others, again and again.
async fn disturb(mut rng: StdRng, cached: &Cached, made: &[Table], done: &AtomicBool) {
    let mut version = 1;
    while !done.load(Ordering::Relaxed) {
        let Some(table) = made.choose(&mut rng) else {
            return;
        };
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..30))).await;
        if rng.random_bool(0.3)
            && let Some(records) = cached.embedded().records()
        {
            let _ = records
                .request_unload(&format!("{SCHEMA}.{}", table.name))
                .await;
            continue;
        }
        version += 1;
        if let Ok(document) = layout(&mut rng, table, version) {
            // A version that an unload overtakes does not arrive; queries must not care.
            let loaded = cached.load(&document);
            let _ = tokio::time::timeout(Duration::from_millis(300), loaded).await;
        }
    }
}

/// Settings of a session, and whether filters of min and max are turned on after Stoa is registered.
fn config(rng: &mut StdRng) -> (SessionConfig, bool) {
    let mut config = SessionConfig::new()
        .with_target_partitions(*[1, 2, 3, 4, 7, 16].choose(rng).unwrap_or(&2))
        .with_batch_size(*[5, 97, 1_000, 8_192, 8_192].choose(rng).unwrap_or(&8_192));
    let options = config.options_mut();
    let parquet = &mut options.execution.parquet;
    parquet.pushdown_filters = rng.random_bool(0.5);
    parquet.reorder_filters = rng.random_bool(0.5);
    parquet.pruning = rng.random_bool(0.9);
    parquet.enable_page_index = rng.random_bool(0.9);
    parquet.bloom_filter_on_read = rng.random_bool(0.9);
    options.execution.collect_statistics = rng.random_bool(0.8);
    let optimizer = &mut options.optimizer;
    let dynamic = rng.random_bool(0.8);
    optimizer.enable_topk_dynamic_filter_pushdown = dynamic;
    optimizer.enable_join_dynamic_filter_pushdown = dynamic;
    optimizer.repartition_joins = rng.random_bool(0.8);
    optimizer.prefer_hash_join = rng.random_bool(0.9);
    if rng.random_bool(0.4) {
        optimizer.hash_join_single_partition_threshold = 0;
        optimizer.hash_join_single_partition_threshold_rows = 0;
    }
    let min_max = rng.random_bool(0.3);
    (config, min_max)
}

fn settings((config, min_max): &(SessionConfig, bool)) -> String {
    let options = config.options();
    let parquet = &options.execution.parquet;
    let optimizer = &options.optimizer;
    format!(
        "partitions {}, batch size {}, pushdown {}, pruning {}, page index {}, Bloom filters {}, \
         statistics {}, dynamic filters {} (min/max {min_max}), hash joins {}",
        options.execution.target_partitions,
        options.execution.batch_size,
        parquet.pushdown_filters,
        parquet.pruning,
        parquet.enable_page_index,
        parquet.bloom_filter_on_read,
        options.execution.collect_statistics,
        optimizer.enable_join_dynamic_filter_pushdown,
        optimizer.prefer_hash_join,
    )
}

/// The type that DataFusion gives partition columns of directories.
fn partition_type() -> DataType {
    DataType::Dictionary(Box::new(DataType::UInt16), Box::new(DataType::Utf8))
}

/// Registers a table as stock's; Stoa's rule caches its scans where it is registered too.
async fn register(
    session: &SessionContext,
    table: &Table,
    schema: Option<&SchemaRef>,
) -> Result<(), Failure> {
    let mut options = ParquetReadOptions::default();
    if table.partitioned {
        options = options.table_partition_cols(vec![(PARTITION.to_owned(), partition_type())]);
    }
    options.schema = schema.map(AsRef::as_ref);
    let place = format!("{}/", table.directory.display());
    session
        .register_parquet(&table.name, place, options)
        .await?;
    Ok(())
}

/// The schema that a table of the cache shows, without the partition column.
async fn file_schema(cached: &Cached, name: &TableName) -> Result<SchemaRef, Failure> {
    let table = cached.embedded().stoa().table(name).await?;
    let table = table.ok_or_else(|| format!("{name} is loaded and not found"))?;
    let schema = table.schema();
    let fields = schema.fields().iter().filter(|f| f.name() != PARTITION);
    let fields: Vec<Field> = fields.map(|field| field.as_ref().clone()).collect();
    Ok(Arc::new(Schema::new(fields)))
}

/// A session over the values themselves: read once, with nothing that could leave any out.
async fn in_memory(
    made: &[Table],
    schemas: &[Option<SchemaRef>],
) -> Result<SessionContext, Failure> {
    let mut config = SessionConfig::new().with_target_partitions(2);
    let parquet = &mut config.options_mut().execution.parquet;
    parquet.pruning = false;
    parquet.enable_page_index = false;
    parquet.bloom_filter_on_read = false;
    parquet.pushdown_filters = false;
    let files = SessionContext::new_with_config(config.clone());
    let session = SessionContext::new_with_config(config);
    for (table, schema) in made.iter().zip(schemas) {
        register(&files, table, schema.as_ref()).await?;
        let frame = files.table(&table.name).await?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        let parts = frame.collect_partitioned().await?;
        let rows: usize = parts.iter().flatten().map(|batch| batch.num_rows()).sum();
        if rows as u64 != table.rows {
            let (name, expected) = (&table.name, table.rows);
            return Err(format!("{name} has {expected} rows, and stock reads {rows}").into());
        }
        session.register_table(&table.name, Arc::new(MemTable::try_new(schema, parts)?))?;
    }
    Ok(session)
}

/// Stock's answer over the files.
async fn over_files(
    made: &[Table],
    schemas: &[Option<SchemaRef>],
    config: &SessionConfig,
    made_up: &Made,
    options: &FuzzOptions,
) -> Result<Answer, Failure> {
    let session = SessionContext::new_with_config(config.clone());
    for (table, schema) in made.iter().zip(schemas) {
        register(&session, table, schema.as_ref()).await?;
    }
    Ok(ask(&session, &made_up.sql, options.patience).await)
}

/// A statement's world and number, as they are told: `3.17`.
///
/// # Errors
/// Where the text is no such pair.
pub fn parse_only(text: &str) -> Result<(u64, u64), String> {
    let expected = || format!("expected a world and a statement as in 3.17, found {text:?}");
    let (world, statement) = text.split_once('.').ok_or_else(expected)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| expected());
    Ok((number(world)?, number(statement)?))
}

/// Whether a path can take the files of worlds.
///
/// # Errors
/// If it cannot be made.
pub fn prepare(keep: Option<&Path>) -> std::io::Result<()> {
    keep.map_or(Ok(()), std::fs::create_dir_all)
}
