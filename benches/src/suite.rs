//! What is asked of which data.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoa_cli::demo::{generate as tpch, queries as tpch_queries};

use crate::clickbench;

/// A benchmark: data and queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Suite {
    /// TPC-H: eight tables, 22 queries; lineitem has 6 million rows at scale 1.
    Tpch,
    /// A table of 105 columns in the shape of ClickBench's, 43 queries; 10 million rows at scale 1.
    Clickbench,
}

/// One query of a suite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// Its number in the suite.
    pub number: u32,
    /// Its text.
    pub sql: String,
    /// What of its answer can be compared.
    #[serde(skip)]
    pub certain: Certain,
}

/// What of an answer is the same whenever the query runs: where `limit` cuts through rows that its
/// order does not tell apart, any of them may come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Certain {
    /// Everything.
    #[default]
    All,
    /// These columns, and the number of rows.
    Columns(&'static [usize]),
}

/// A suite's data, there to be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Data {
    /// The suite.
    pub suite: Suite,
    /// Its scale.
    pub scale: f64,
    /// Holds a directory of Parquet files for each table.
    pub directory: PathBuf,
    /// The tables' names.
    pub tables: Vec<String>,
    /// Bytes of all Parquet files.
    pub bytes: u64,
}

impl Data {
    /// What the tables' directories lie below.
    pub fn root(&self) -> String {
        self.directory.display().to_string()
    }

    /// Bytes of one table's Parquet files.
    ///
    /// # Errors
    /// If its directory cannot be read.
    pub fn table_bytes(&self, table: &str) -> std::io::Result<u64> {
        let files = std::fs::read_dir(self.directory.join(table))?;
        files.map(|file| Ok(file?.metadata()?.len())).sum()
    }
}

impl Suite {
    /// As on the command line and in results; the schema of its tables too.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Tpch => "tpch",
            Suite::Clickbench => "clickbench",
        }
    }

    /// The data below `path`, generated when it is not there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn prepare(
        self,
        path: &Path,
        scale: f64,
    ) -> Result<Data, Box<dyn std::error::Error + Send + Sync>> {
        let threads = std::thread::available_parallelism()?.get();
        let say = |place: &Path| {
            eprintln!(
                "generating {} scale {scale} in {}",
                self.name(),
                place.display()
            );
        };
        let (directory, tables, bytes) = match self {
            Suite::Tpch => {
                let directory = tpch::directory(path, scale);
                let found = match tpch::find(&directory, scale) {
                    Some(found) => found,
                    None => {
                        say(&directory);
                        tpch::generate(&directory, scale, threads, &|_| ())?
                    }
                };
                let tables = tpch::TABLES.iter().map(|table| table.name.to_owned());
                (directory, tables.collect(), found.bytes())
            }
            Suite::Clickbench => {
                let rows = rows(scale);
                let directory = clickbench::directory(path, rows);
                let found = match clickbench::find(&directory, rows) {
                    Some(found) => found,
                    None => {
                        say(&directory);
                        clickbench::generate(&directory, rows, threads)?
                    }
                };
                (directory, vec![clickbench::TABLE.to_owned()], found.bytes())
            }
        };
        Ok(Data {
            suite: self,
            scale,
            directory: directory.canonicalize()?,
            tables,
            bytes,
        })
    }

    /// All queries over data of that scale.
    pub fn queries(self, scale: f64) -> Vec<Query> {
        match self {
            Suite::Tpch => tpch_queries::QUERIES
                .iter()
                .map(|query| Query {
                    number: u32::from(query.number),
                    sql: query.sql.to_owned(),
                    certain: Certain::All,
                })
                .collect(),
            Suite::Clickbench => clickbench::queries(rows(scale)),
        }
    }
}

fn rows(scale: f64) -> u64 {
    ((clickbench::ROWS_AT_SCALE_ONE as f64 * scale) as u64).max(1)
}

/// Those of `queries` that `text` names, such as `1,6,14-16`; all where it is not given.
///
/// # Errors
/// If it names a query that is not there.
pub fn select(queries: Vec<Query>, text: Option<&str>) -> Result<Vec<Query>, String> {
    let Some(text) = text else {
        return Ok(queries);
    };
    let mut wanted = vec![];
    for item in text.split(',') {
        let (from, to) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| {
            let number = text
                .trim()
                .trim_start_matches(['q', 'Q'])
                .parse::<u32>()
                .ok();
            number
                .filter(|number| queries.iter().any(|query| query.number == *number))
                .ok_or_else(|| {
                    let (first, last) = (queries[0].number, queries[queries.len() - 1].number);
                    format!("`{item}` is not a query of the suite; expected {first} to {last}")
                })
        };
        wanted.extend(number(from)?..=number(to)?);
    }
    let chosen = queries.into_iter();
    Ok(chosen
        .filter(|query| wanted.contains(&query.number))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_selected_by_number_and_range() {
        let numbers = |suite: Suite, text| -> Vec<u32> {
            let queries = select(suite.queries(1.0), text).unwrap();
            queries.iter().map(|query| query.number).collect()
        };
        assert_eq!(numbers(Suite::Tpch, Some("6,1")), [1, 6]);
        assert_eq!(numbers(Suite::Tpch, Some("14-16,q22")), [14, 15, 16, 22]);
        assert_eq!(numbers(Suite::Clickbench, Some("0,42")), [0, 42]);
        assert_eq!(numbers(Suite::Clickbench, None).len(), 43);
        assert_eq!(
            select(Suite::Tpch.queries(1.0), Some("23")).unwrap_err(),
            "`23` is not a query of the suite; expected 1 to 22"
        );
    }
}
