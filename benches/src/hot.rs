//! Modes interleaved in this process, everything in memory.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::RecordBatch;
use datafusion::execution::context::SessionContext;
use stoa_cli::demo::compare;
use stoa_figures::document::Summary;
use stoa_figures::times::turns;
use stoa_figures::{Block, Times};

use crate::Error;
use crate::modes::{Mode, Running, run};
use crate::suite::{Certain, Data, Query};

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The data.
    pub data: &'a Data,
    /// The queries.
    pub queries: &'a [Query],
    /// Target partitions.
    pub partitions: usize,
    /// Measured iterations, after one that is not.
    pub iterations: usize,
    /// Where caches lie.
    pub cache_root: &'a Path,
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Hot {
    /// The times.
    pub times: Times,
    /// Rows of the answer, by query.
    pub rows: BTreeMap<u32, usize>,
    /// What modes hold and how long they took to get it; no times yet.
    pub summary: BTreeMap<String, Summary>,
}

/// Groups modes into blocks that are in memory together: all of them, or, one at a time, each that
/// has memory of its own beside those that have none.
pub fn blocks(modes: &[Mode], one_at_a_time: bool) -> Vec<Vec<Mode>> {
    let (own, shared): (Vec<Mode>, Vec<Mode>) = modes.iter().cloned().partition(Mode::in_memory);
    if !one_at_a_time || own.len() < 2 {
        return vec![modes.to_vec()];
    }
    own.into_iter()
        .map(|mode| shared.iter().cloned().chain([mode]).collect())
        .collect()
}

/// Runs the queries in all modes of each block, one block after the other.
///
/// # Errors
/// If a query fails, or answers otherwise in one mode than in another.
pub async fn measure(plan: Plan<'_>, blocks: &[Vec<Mode>]) -> Result<Hot, Error> {
    let mut hot = Hot::default();
    // The first mode's answers, over all blocks.
    let mut answers: BTreeMap<u32, Vec<RecordBatch>> = BTreeMap::new();
    for modes in blocks {
        let mut running = vec![];
        for mode in modes {
            eprintln!("preparing {mode}");
            let ready = Running::start(mode, plan.data, plan.partitions, plan.cache_root).await?;
            let summary = Summary {
                bytes: ready.bytes,
                load_seconds: ready.load_seconds,
                attach_ms: ready.attach_ms,
                ..Summary::default()
            };
            hot.summary.entry(mode.to_string()).or_insert(summary);
            running.push(ready);
        }
        let measured = block(plan, &running, &mut answers, &mut hot.summary).await;
        for mode in running {
            mode.stop().await;
        }
        hot.times.blocks.push(measured?);
    }
    for (query, answer) in &answers {
        let rows = answer.iter().map(RecordBatch::num_rows).sum();
        hot.rows.insert(*query, rows);
    }
    Ok(hot)
}

async fn block(
    plan: Plan<'_>,
    running: &[Running],
    answers: &mut BTreeMap<u32, Vec<RecordBatch>>,
    summary: &mut BTreeMap<String, Summary>,
) -> Result<Block, Error> {
    let mut block = Block::default();
    let asked: Vec<Asked<'_>> = running
        .iter()
        .map(|mode| Asked {
            name: mode.mode.to_string(),
            session: mode.session(),
        })
        .collect();
    // The first round warms up and compares the answers; it is not measured.
    for round in 0..=plan.iterations {
        let before: Vec<u64> = running.iter().map(Running::origin_requests).collect();
        ask(plan, round, &asked, answers, &mut block).await?;
        if round > 0 {
            for (mode, before) in running.iter().zip(before) {
                let found = summary.entry(mode.mode.to_string()).or_default();
                found.hot_origin_requests += mode.origin_requests() - before;
                found.hit_rate = mode.hit_rate();
            }
        }
        eprintln!("round {round} of {}", plan.iterations);
    }
    Ok(block)
}

/// A session, and the name that its times go by.
pub(crate) struct Asked<'a> {
    pub(crate) name: String,
    pub(crate) session: &'a SessionContext,
}

/// Runs every query in every session, one session right after the other. Round 0 compares the
/// answers with those of the first session, and puts no times into `block`.
///
/// # Errors
/// If a query fails, or answers otherwise in one session than in another.
pub(crate) async fn ask(
    plan: Plan<'_>,
    round: usize,
    asked: &[Asked<'_>],
    answers: &mut BTreeMap<u32, Vec<RecordBatch>>,
    block: &mut Block,
) -> Result<(), Error> {
    for query in plan.queries {
        for i in turns(asked.len(), round, query.number) {
            let Asked { name, session } = &asked[i];
            let failed = |error| format!("q{} in {name}: {error}", query.number);
            let (answer, elapsed) = run(session, &query.sql).await.map_err(failed)?;
            if round > 0 {
                block.push(name, query.number, elapsed.as_secs_f64() * 1000.0);
            } else if let Some(first) = answers.get(&query.number) {
                if let Some(difference) = difference(query, first, &answer)? {
                    return Err(format!(
                        "q{}: {name} answers otherwise: {difference}",
                        query.number
                    )
                    .into());
                }
            } else {
                answers.insert(query.number, answer);
            }
        }
    }
    Ok(())
}

/// Where two answers of a query differ in what is certain of them.
fn difference(
    query: &Query,
    first: &[RecordBatch],
    second: &[RecordBatch],
) -> Result<Option<String>, Error> {
    let of = |answer: &[RecordBatch]| -> Result<Vec<RecordBatch>, Error> {
        match query.certain {
            Certain::All => Ok(answer.to_vec()),
            Certain::Columns(columns) => {
                let certain = answer.iter().map(|batch| batch.project(columns));
                Ok(certain.collect::<Result<_, _>>()?)
            }
        }
    };
    Ok(compare::difference(&of(first)?, &of(second)?)?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array};

    use super::*;

    #[test]
    fn one_at_a_time_has_parquet_in_every_block() {
        let modes: Vec<Mode> = ["parquet", "memtable", "stoa-arrow"]
            .map(|name| name.parse().unwrap())
            .into();
        let names = |one_at_a_time| -> Vec<Vec<String>> {
            let blocks = blocks(&modes, one_at_a_time).into_iter();
            blocks
                .map(|block| block.iter().map(Mode::to_string).collect())
                .collect()
        };
        assert_eq!(names(false), [["parquet", "memtable", "stoa-arrow"]]);
        assert_eq!(
            names(true),
            [["parquet", "memtable"], ["parquet", "stoa-arrow"]]
        );
    }

    #[test]
    fn only_what_is_certain_is_compared() {
        let batch = |region: i64, count: i64| {
            let column = |value| Arc::new(Int64Array::from(vec![value])) as ArrayRef;
            RecordBatch::try_from_iter([("region", column(region)), ("c", column(count))]).unwrap()
        };
        let mut query = Query {
            number: 8,
            sql: String::new(),
            certain: Certain::Columns(&[1]),
        };
        let differ = |query: &Query, a, b| difference(query, &[a], &[b]).unwrap().is_some();
        assert!(!differ(&query, batch(1, 5), batch(2, 5)));
        assert!(differ(&query, batch(1, 5), batch(1, 6)));
        query.certain = Certain::Columns(&[]);
        assert!(!differ(&query, batch(1, 5), batch(2, 6)));
        assert!(difference(&query, &[batch(1, 5)], &[]).unwrap().is_some());
        query.certain = Certain::All;
        assert!(differ(&query, batch(1, 5), batch(2, 5)));
    }
}
