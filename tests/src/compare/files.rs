//! Single Parquet files, over stock and through the cache.

use std::path::Path;
use std::time::Duration;

use datafusion::execution::context::{SessionConfig, SessionContext};

use super::answer::{Agreement, Answer, ask, difference};
use super::cached::{Cached, Through};
use super::report::{Finding, Tally};

/// Room for one file.
const CAPACITY_BYTES: u64 = 256 << 20;

/// Asks for all of a file and for each of its columns, as stock and in each way to read, with filters
/// pushed into the scan and without.
///
/// # Errors
/// If no cache can be started.
pub async fn run_file(file: &Path, ways: &[Through], patience: Duration) -> Result<Tally, String> {
    let mut tally = Tally::default();
    let place = std::path::absolute(file).map_err(|error| error.to_string())?;
    let at = file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for pushdown in [false, true] {
        let mut config = SessionConfig::new().with_target_partitions(2);
        config.options_mut().execution.parquet.pushdown_filters = pushdown;
        let stock = SessionContext::new_with_config(config.clone());
        let created = create(&stock, &place, "PARQUET", patience).await;
        let statements = statements(&stock).await;
        let mut expected = vec![];
        for (sql, _) in &statements {
            expected.push(ask(&stock, sql, patience).await);
        }
        for through in ways {
            let cached = Cached::start(CAPACITY_BYTES).await?;
            if let Through::Scans(form) = through
                && let Err(reason) = cached.cover(&place, &[], *form).await
            {
                tally.uncached.push(format!("{through}: {at}: {reason}"));
            }
            let session = SessionContext::new_with_config(config.clone());
            let registered = cached.register(&session).await;
            registered.map_err(|error| error.to_string())?;
            let format = match through {
                Through::Table => "STOA",
                _ => "PARQUET",
            };
            let ours = create(&session, &place, format, patience).await;
            let finding = |sql: &str, what: String| Finding {
                at: at.clone(),
                through: through.to_string(),
                sql: format!("{sql} (pushdown {pushdown})"),
                what,
            };
            let any = Agreement {
                ordered: false,
                exact: false,
            };
            match difference(&created, &ours, any) {
                Some(what) => {
                    tally
                        .findings
                        .push(finding("create external table t", what));
                    cached.stop().await;
                    continue;
                }
                None if matches!(created, Answer::Refused(_)) => tally.refused_alike += 1,
                None => tally.equal += 1,
            }
            if *through == Through::Table {
                let name = stoa_layout::TableName::new("public", "t");
                let name = name.map_err(|error| error.to_string())?;
                if let Err(reason) = cached.wait(&name, stoa_layout::LayoutVersion::FIRST).await {
                    tally.uncached.push(format!("{through}: {at}: {reason}"));
                }
            }
            for ((sql, agreement), stock) in statements.iter().zip(&expected) {
                let ours = ask(&session, sql, patience).await;
                match difference(stock, &ours, *agreement) {
                    Some(what) => tally.findings.push(finding(sql, what)),
                    None if matches!(stock, Answer::Rows(_)) => tally.equal += 1,
                    None => tally.refused_alike += 1,
                }
            }
            let counts = cached.counts();
            tally.hits += counts.hits;
            tally.misses += counts.misses;
            cached.stop().await;
        }
    }
    Ok(tally)
}

async fn create(
    session: &SessionContext,
    place: &Path,
    format: &str,
    patience: Duration,
) -> Answer {
    let place = place.display().to_string().replace('\'', "''");
    let sql = format!("create external table t stored as {format} location '{place}'");
    ask(session, &sql, patience).await
}

/// What is asked of a table, and how answers have to agree.
async fn statements(session: &SessionContext) -> Vec<(String, Agreement)> {
    let values = Agreement {
        ordered: false,
        exact: true,
    };
    let sums = Agreement {
        ordered: false,
        exact: false,
    };
    let sorted = Agreement {
        ordered: true,
        exact: false,
    };
    let mut asked = vec![
        ("select * from t".to_owned(), values),
        ("select count(*) from t".to_owned(), values),
        ("describe t".to_owned(), values),
    ];
    let Ok(table) = session.table("t").await else {
        return asked;
    };
    for field in table.schema().fields() {
        let column = format!("\"{}\"", field.name().replace('"', "\"\""));
        let of_column = [
            (format!("select {column} from t"), values),
            (format!("select count({column}) from t"), values),
            (
                format!("select count(*) from t where {column} is null"),
                values,
            ),
            (format!("select min({column}), max({column}) from t"), sums),
            (format!("select {column}, count(*) from t group by 1"), sums),
            (format!("select {column} from t order by 1 limit 7"), sorted),
            (
                format!("select {column} from t order by 1 desc nulls last limit 7"),
                sorted,
            ),
            (
                format!("select * from t where {column} = (select max({column}) from t)"),
                values,
            ),
            (
                format!("select count(*) from t where {column} > (select min({column}) from t)"),
                values,
            ),
            (
                format!(
                    "select count(*) from t where {column} in (select {column} from t limit 3)"
                ),
                values,
            ),
        ];
        asked.extend(of_column);
    }
    asked
}
