//! Directories of sqllogictest files, over stock Parquet and through the cache.
//!
//! What a file expects does not count here, only whether the answers are stock's: so files of
//! anybody's suite can be run. The whole file runs in one session after the other, since its
//! statements write files that later ones read.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use datafusion::execution::context::{SessionConfig, SessionContext};
use datafusion::sql::parser::{CreateExternalTable, DFParser, Statement};
use datafusion::sql::sqlparser::ast::Statement as Sql;
use sqllogictest::{DBOutput, DefaultColumnType, Record, Runner};
use stoa_layout::{FormChoice, LayoutVersion, TableName};

use super::answer::{Agreement, Answer, ask, difference, shortened};
use super::cached::{Cached, SCHEMA, Through, without_parents};
use super::report::{Finding, Tally};

/// What a file's statements may take of memory.
const CAPACITY_BYTES: u64 = 512 << 20;

/// As many as DataFusion's own suite has.
const PARTITIONS: usize = 4;

/// How to run files of statements.
#[derive(Clone, Debug)]
pub struct SltOptions {
    /// The directory that paths in the statements are relative to; becomes the process's own.
    pub from: PathBuf,
    /// The directory below it that files write to; of each file, the directory of its name there is
    /// emptied before every run.
    pub scratch: PathBuf,
    /// The ways to read that are compared with stock.
    pub through: Vec<Through>,
    /// How long one statement may take.
    pub patience: Duration,
}

/// A statement as it was asked, with what came of it.
#[derive(Clone, Debug)]
struct Asked {
    /// The file's name and the line.
    at: String,
    sql: String,
    answer: Answer,
}

/// The files below a directory, or the file itself, in order.
///
/// # Errors
/// If a directory cannot be read.
pub fn files_below(path: &Path, extension: &str) -> std::io::Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = vec![];
    for entry in std::fs::read_dir(path)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files_below(&path, extension)?);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Runs a file in a session of stock and in one for each other way, and compares.
///
/// # Errors
/// If the file cannot be parsed, or no cache can be started.
pub async fn run_file(file: &Path, options: &SltOptions) -> Result<Tally, String> {
    std::env::set_current_dir(&options.from)
        .map_err(|error| format!("{}: {error}", options.from.display()))?;
    let stock = Recorder::run(file, Through::Stock, None, options).await?;
    let mut tally = Tally::default();
    for through in &options.through {
        let cached = Arc::new(Cached::start(CAPACITY_BYTES).await?);
        let ours = Recorder::run(file, *through, Some(Arc::clone(&cached)), options).await?;
        let counts = cached.counts();
        tally.hits += counts.hits;
        tally.misses += counts.misses;
        for reason in ours.uncached {
            tally.uncached.push(format!("{through}: {reason}"));
        }
        if stock.asked.len() != ours.asked.len() {
            return Err(format!(
                "{}: {} statements ran over stock, {} through {through}",
                file.display(),
                stock.asked.len(),
                ours.asked.len()
            ));
        }
        for (stock, ours) in stock.asked.iter().zip(&ours.asked) {
            judge(stock, ours, *through, &mut tally);
        }
        if let Some(cached) = Arc::into_inner(cached) {
            cached.stop().await;
        }
    }
    Ok(tally)
}

/// Compares two answers to one statement.
fn judge(stock: &Asked, ours: &Asked, through: Through, tally: &mut Tally) {
    let statement = parse(&stock.sql);
    let both_answered = matches!(
        (&stock.answer, &ours.answer),
        (Answer::Rows(_), Answer::Rows(_))
    );
    if both_answered && is_plan(statement.as_ref()) {
        tally.plans += 1;
        return;
    }
    let agreement = Agreement {
        ordered: is_ordered(statement.as_ref()),
        exact: false,
    };
    let listed = without_own_entries(&ours.answer);
    match difference(&stock.answer, &listed, agreement) {
        None if matches!(stock.answer, Answer::Rows(_)) => tally.equal += 1,
        None => tally.refused_alike += 1,
        Some(what) => tally.findings.push(Finding {
            at: ours.at.clone(),
            through: through.to_string(),
            sql: shortened(&ours.sql, 600),
            what,
        }),
    }
}

/// The answer without rows about the cache itself: settings `stoa.…` and tables of [`SCHEMA`], which
/// lists of settings and tables have and stock's have not.
fn without_own_entries(answer: &Answer) -> Answer {
    let Answer::Rows(rows) = answer else {
        return answer.clone();
    };
    let mut rows = rows.clone();
    rows.rows
        .retain(|row| !(row.iter()).any(|cell| cell == SCHEMA || cell.starts_with("stoa.")));
    Answer::Rows(rows)
}

fn parse(sql: &str) -> Option<Statement> {
    let mut statements = DFParser::parse_sql(sql).ok()?;
    (statements.len() == 1).then(|| statements.pop_front())?
}

fn is_plan(statement: Option<&Statement>) -> bool {
    match statement {
        Some(Statement::Explain(_)) => true,
        Some(Statement::Statement(sql)) => matches!(**sql, Sql::Explain { .. }),
        _ => false,
    }
}

fn is_ordered(statement: Option<&Statement>) -> bool {
    match statement {
        Some(Statement::Statement(sql)) => match &**sql {
            Sql::Query(query) => query.order_by.is_some(),
            _ => false,
        },
        _ => false,
    }
}

/// Whether a statement may have changed files that are cached.
fn writes(statement: Option<&Statement>) -> bool {
    match statement {
        Some(Statement::CopyTo(_)) => true,
        Some(Statement::Statement(sql)) => matches!(**sql, Sql::Insert(_)),
        _ => false,
    }
}

/// The table that a statement creates over Parquet files.
fn creates(statement: Option<&Statement>) -> Option<&CreateExternalTable> {
    match statement {
        Some(Statement::CreateExternalTable(create))
            if create.file_type.eq_ignore_ascii_case("parquet") =>
        {
            Some(create)
        }
        _ => None,
    }
}

/// A session that keeps what it is asked and what it answers.
#[derive(Clone)]
struct Recorder {
    session: SessionContext,
    through: Through,
    cached: Option<Arc<Cached>>,
    options: SltOptions,
    log: Arc<Mutex<Log>>,
}

#[derive(Clone, Debug, Default)]
struct Log {
    /// Where the statement that comes next stands.
    at: String,
    asked: Vec<Asked>,
    uncached: Vec<String>,
}

/// What a runner is told of a statement that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

impl Recorder {
    async fn run(
        file: &Path,
        through: Through,
        cached: Option<Arc<Cached>>,
        options: &SltOptions,
    ) -> Result<Log, String> {
        let name = file.file_stem().unwrap_or_default();
        let scratch = options.from.join(&options.scratch).join(name);
        if scratch.exists() {
            let removed = std::fs::remove_dir_all(&scratch);
            removed.map_err(|error| format!("{}: {error}", scratch.display()))?;
        }
        std::fs::create_dir_all(&scratch)
            .map_err(|error| format!("{}: {error}", scratch.display()))?;
        let config = SessionConfig::new().with_target_partitions(PARTITIONS);
        let session = SessionContext::new_with_config(config);
        if let Some(cached) = &cached {
            let registered = cached.register(&session).await;
            registered.map_err(|error| error.to_string())?;
        }
        let recorder = Recorder {
            session,
            through,
            cached,
            options: options.clone(),
            log: Arc::default(),
        };
        let log = Arc::clone(&recorder.log);
        let mut runner = Runner::new(move || {
            let connection = recorder.clone();
            async move { Ok::<_, Refused>(connection) }
        });
        let records = sqllogictest::parse_file::<DefaultColumnType>(file)
            .map_err(|error| format!("{}: {error}", file.display()))?;
        for record in records {
            let location = match &record {
                Record::Halt { .. } => break,
                Record::Statement { loc, .. }
                | Record::Query { loc, .. }
                | Record::Let { loc, .. } => Some(loc),
                _ => None,
            };
            if let Some(location) = location {
                let file = Path::new(location.file()).file_name().unwrap_or_default();
                lock(&log).at = format!("{}:{}", file.to_string_lossy(), location.line());
            }
            // Whether it is what the file expects does not count.
            let _ = runner.run_async(record).await;
        }
        drop(runner);
        let log = lock(&log).clone();
        Ok(log)
    }

    /// Asks, and sees to it that what was made or changed is cached before anything else is asked.
    async fn ask(&self, sql: &str) -> Answer {
        let statement = parse(sql);
        let created = creates(statement.as_ref());
        let text = match created {
            Some(create) if self.through == Through::Table => {
                stored_as_stoa(&climbing_nowhere(sql, create, &self.options.from))
            }
            _ => sql.to_owned(),
        };
        let answer = ask(&self.session, &text, self.options.patience).await;
        let (mut through, mut made) = (self.through, matches!(answer, Answer::Rows(_)));
        if created.is_some() && through == Through::Table && !made {
            // One refusal is one difference, not one for each statement that asks the table.
            let as_parquet = ask(&self.session, sql, self.options.patience).await;
            made = matches!(as_parquet, Answer::Rows(_));
            through = Through::Scans(FormChoice::Auto);
        }
        let Some(cached) = self.cached.as_ref().filter(|_| made) else {
            return answer;
        };
        let loaded = match (created, through) {
            (Some(create), Through::Scans(form)) => {
                let mut loaded = Ok(());
                for location in &create.locations {
                    let place = self.options.from.join(location);
                    let partitions = &create.table_partition_cols;
                    loaded = loaded.and(cached.cover(&place, partitions, form).await);
                }
                loaded
            }
            (Some(create), Through::Table) => self.wait(cached, create).await,
            _ if writes(statement.as_ref()) => {
                cached.cover_again().await;
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(reason) = loaded {
            let mut log = lock(&self.log);
            let uncached = format!("{}: {reason}", log.at);
            log.uncached.push(uncached);
        }
        answer
    }

    async fn wait(&self, cached: &Cached, create: &CreateExternalTable) -> Result<(), String> {
        let mut parts = create.name.0.iter().rev().map(|part| {
            let text = part.to_string();
            text.strip_prefix('"')
                .and_then(|t| t.strip_suffix('"'))
                .map_or_else(|| text.to_lowercase(), str::to_owned)
        });
        let table = parts.next().unwrap_or_default();
        let options = self.session.copied_config();
        let schema = parts
            .next()
            .unwrap_or_else(|| options.options().catalog.default_schema.clone());
        let name = TableName::new(&schema, &table).map_err(|error| error.to_string())?;
        cached.wait(&name, LayoutVersion::FIRST).await
    }
}

/// The statement with absolute paths in place of those that climb with `..`, which Stoa refuses in
/// any location.
fn climbing_nowhere(sql: &str, create: &CreateExternalTable, from: &Path) -> String {
    let climbing = create.locations.iter().filter(|l| l.contains(".."));
    climbing.fold(sql.to_owned(), |sql, location| {
        let whole = without_parents(&from.join(location));
        sql.replace(&format!("'{location}'"), &format!("'{}'", whole.display()))
    })
}

/// The statement with another format.
fn stored_as_stoa(sql: &str) -> String {
    let lower = sql.to_ascii_lowercase();
    let mut text = String::new();
    let mut words = lower.split_whitespace().peekable();
    let mut at = 0;
    while let Some(word) = words.next() {
        let Some(found) = lower[at..].find(word) else {
            break;
        };
        at += found + word.len();
        if word == "as" && words.peek() == Some(&"parquet") {
            let after = at + lower[at..].find("parquet").unwrap_or(0) + "parquet".len();
            text.push_str(&sql[..at]);
            text.push_str(" STOA");
            text.push_str(&sql[after..]);
            return text;
        }
    }
    sql.to_owned()
}

fn lock(log: &Mutex<Log>) -> std::sync::MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(|broken| broken.into_inner())
}

#[async_trait::async_trait]
impl sqllogictest::AsyncDB for Recorder {
    type Error = Refused;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Refused> {
        let answer = self.ask(sql).await;
        let output = match &answer {
            Answer::Rows(rows) if rows.types.is_empty() => Ok(DBOutput::StatementComplete(0)),
            Answer::Rows(rows) => Ok(DBOutput::Rows {
                types: vec![DefaultColumnType::Any; rows.types.len()],
                rows: rows.rows.clone(),
            }),
            other => Err(Refused(other.to_string())),
        };
        let mut log = lock(&self.log);
        let at = log.at.clone();
        log.asked.push(Asked {
            at,
            sql: sql.to_owned(),
            answer,
        });
        output
    }

    async fn shutdown(&mut self) {}

    fn engine_name(&self) -> &str {
        "Datafusion"
    }

    async fn sleep(duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_format_of_a_statement_is_changed() {
        let sql = "CREATE EXTERNAL TABLE parquet_as(as_parquet int)\nSTORED AS  PARQUET\nLOCATION 'As Parquet'";
        assert_eq!(
            stored_as_stoa(sql),
            "CREATE EXTERNAL TABLE parquet_as(as_parquet int)\nSTORED AS STOA\nLOCATION 'As Parquet'"
        );
        assert_eq!(stored_as_stoa("stored as csv"), "stored as csv");
    }

    #[test]
    fn only_climbing_locations_are_made_absolute() {
        let changed = |sql: &str| {
            let statement = parse(sql);
            let create = creates(statement.as_ref()).cloned();
            create.map(|create| climbing_nowhere(sql, &create, Path::new("/a/b")))
        };
        let sql = "create external table t stored as parquet location '../c/d.parquet'";
        assert!(changed(sql).is_some_and(|sql| sql.ends_with("location '/a/c/d.parquet'")));
        let sql = "create external table t stored as parquet location 'c/d.parquet'";
        assert_eq!(changed(sql).as_deref(), Some(sql));
    }

    #[test]
    fn statements_are_told_apart() {
        let of = |sql| parse(sql);
        assert!(is_plan(of("explain select 1").as_ref()));
        assert!(is_plan(of("EXPLAIN ANALYZE select 1").as_ref()));
        assert!(is_ordered(of("select 1 order by 1").as_ref()));
        assert!(!is_ordered(
            of("select * from (select 1 order by 1)").as_ref()
        ));
        assert!(writes(of("copy (select 1) to 'a.parquet'").as_ref()));
        assert!(writes(of("insert into t values (1)").as_ref()));
        let create = of("create external table t stored as parquet location 'a'");
        assert!(creates(create.as_ref()).is_some());
        let create = of("create external table t stored as csv location 'a'");
        assert!(creates(create.as_ref()).is_none());
    }
}
