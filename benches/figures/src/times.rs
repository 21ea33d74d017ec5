//! Times of modes that ran interleaved, and their comparison by paired ratios.

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};

use crate::stats::{Interval, geomean, median, median_interval};

/// Stock DataFusion over Parquet in the page cache: what modes of different blocks are compared by.
pub const PARQUET: &str = "parquet";
/// The same with `pushdown_filters`.
pub const PARQUET_PUSHDOWN: &str = "parquet-pushdown";
/// Decoded in the memory of the process.
pub const MEMTABLE: &str = "memtable";

/// Milliseconds by query number; one value an iteration.
pub type ByQuery = BTreeMap<u32, Vec<f64>>;

/// The numbers below `count` in the order in which modes take their turns: another one for every
/// round and query, the same in every run. What ran right before leaves caches and memory behind, and
/// that should not always be the same neighbour's.
pub fn turns(count: usize, round: usize, query: u32) -> Vec<usize> {
    let mut turns: Vec<usize> = (0..count).collect();
    turns.shuffle(&mut StdRng::seed_from_u64(
        (round as u64) << 32 | u64::from(query),
    ));
    turns
}

/// Modes that ran interleaved: their n-th times were measured seconds apart.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// Elapsed milliseconds by mode and query.
    pub elapsed: BTreeMap<String, ByQuery>,
}

impl Block {
    /// Adds a time.
    pub fn push(&mut self, mode: &str, query: u32, elapsed_ms: f64) {
        let queries = self.elapsed.entry(mode.to_owned()).or_default();
        queries.entry(query).or_default().push(elapsed_ms);
    }

    fn ratios(&self, mode: &str, base: &str) -> Option<ByQuery> {
        Some(divide(self.elapsed.get(mode)?, self.elapsed.get(base)?))
    }
}

/// All times of one run. One block where all modes fit into memory together; else one block for each
/// mode in memory, beside the modes that need none.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// In the order in which they ran.
    pub blocks: Vec<Block>,
}

/// One mode against another: ratios of times, below 1 is faster.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Geometric mean over the queries, median over the iterations.
    pub geomean: Interval,
    /// By query.
    pub queries: BTreeMap<u32, Interval>,
}

impl Comparison {
    /// Of ratios by query.
    fn of(ratios: &ByQuery) -> Option<Comparison> {
        let iterations = ratios.values().map(Vec::len).min()?;
        let means: Vec<f64> = (0..iterations)
            .filter_map(|i| geomean(&ratios.values().map(|r| r[i]).collect::<Vec<_>>()))
            .collect();
        Some(Comparison {
            geomean: median_interval(&means)?,
            queries: ratios
                .iter()
                .filter_map(|(query, r)| Some((*query, median_interval(r)?)))
                .collect(),
        })
    }

    /// The query with the largest median ratio, and that ratio.
    pub fn worst(&self) -> Option<(u32, Interval)> {
        let by_median =
            |a: &(&u32, &Interval), b: &(&u32, &Interval)| a.1.median.total_cmp(&b.1.median);
        let (query, ratio) = self.queries.iter().max_by(by_median)?;
        Some((*query, *ratio))
    }
}

impl Times {
    /// All times of a mode, over all blocks that it ran in.
    pub fn of(&self, mode: &str) -> ByQuery {
        let mut all = ByQuery::new();
        for (query, times) in self
            .blocks
            .iter()
            .filter_map(|block| block.elapsed.get(mode))
            .flatten()
        {
            all.entry(*query).or_default().extend(times);
        }
        all
    }

    /// The ratios of `mode` to `base`, iteration by iteration; `None` where one was not run.
    ///
    /// Modes that did not run in one block are compared through Parquet, which runs in every block:
    /// the ratio of their ratios to it.
    pub fn compare(&self, mode: &str, base: &str) -> Option<Comparison> {
        Comparison::of(&self.ratios(mode, base)?)
    }

    fn ratios(&self, mode: &str, base: &str) -> Option<ByQuery> {
        let shared = |base: &str| -> Option<ByQuery> {
            let found = self.blocks.iter().filter_map(|b| b.ratios(mode, base));
            found.reduce(joined)
        };
        let through_parquet = || -> Option<ByQuery> {
            let other = self.blocks.iter().filter_map(|b| b.ratios(base, PARQUET));
            Some(divide(&shared(PARQUET)?, &other.reduce(joined)?))
        };
        shared(base).or_else(through_parquet)
    }

    /// `mode` against the best, query by query, of Parquet, Parquet with pushdown and the memory
    /// table, as far as they were run; the best is the one with the smallest median.
    pub fn compare_to_best(&self, mode: &str) -> Option<Comparison> {
        let bases: Vec<(&str, ByQuery)> = [PARQUET, PARQUET_PUSHDOWN, MEMTABLE]
            .into_iter()
            .map(|base| (base, self.of(base)))
            .filter(|(_, times)| !times.is_empty())
            .collect();
        let mut ratios = ByQuery::new();
        for query in self.of(mode).into_keys() {
            let best = bases
                .iter()
                .filter_map(|(base, times)| Some((*base, median(times.get(&query)?)?)))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            if let Some((base, _)) = best
                && let Some(found) = self.ratios(mode, base)?.remove(&query)
            {
                ratios.insert(query, found);
            }
        }
        Comparison::of(&ratios)
    }

    /// One mode's results in the shape that dfbench's `compare.py` reads.
    pub fn dfbench(&self, mode: &str, context: &Value, rows: &BTreeMap<u32, usize>) -> Value {
        let queries: Vec<Value> = self
            .of(mode)
            .iter()
            .map(|(query, times)| {
                let rows = rows.get(query).copied().unwrap_or(0);
                json!({
                    "query": format!("Query {query}"),
                    "iterations": times.iter()
                        .map(|elapsed| json!({"elapsed": elapsed, "row_count": rows}))
                        .collect::<Vec<_>>(),
                    "start_time": context["start_time"],
                    "success": true,
                })
            })
            .collect();
        json!({"context": context, "queries": queries})
    }
}

fn joined(mut all: ByQuery, more: ByQuery) -> ByQuery {
    for (query, ratios) in more {
        all.entry(query).or_default().extend(ratios);
    }
    all
}

fn divide(above: &ByQuery, below: &ByQuery) -> ByQuery {
    above
        .iter()
        .filter_map(|(query, times)| {
            let other = below.get(query)?;
            let ratios = times.iter().zip(other).map(|(a, b)| a / b);
            Some((*query, ratios.collect()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    type ByMode<'a> = (&'a str, &'a [(u32, &'a [f64])]);

    fn block(modes: &[ByMode<'_>]) -> Block {
        let mut block = Block::default();
        for (mode, queries) in modes {
            for (query, times) in *queries {
                for time in *times {
                    block.push(mode, *query, *time);
                }
            }
        }
        block
    }

    fn exactly(value: f64) -> Interval {
        Interval {
            median: value,
            low: value,
            high: value,
        }
    }

    #[test]
    fn every_mode_follows_every_other() {
        let mut followed = BTreeSet::new();
        for round in 1..=15 {
            for query in 1..=22 {
                let found = turns(4, round, query);
                assert_eq!(found, turns(4, round, query));
                assert_eq!(BTreeSet::from_iter(found.clone()), (0..4).collect());
                followed.extend(found.windows(2).map(|pair| (pair[0], pair[1])));
            }
        }
        assert_eq!(followed.len(), 4 * 3);
    }

    #[test]
    fn ratios_are_paired_by_iteration() {
        // Both modes slow down together: the ratio does not.
        let times = Times {
            blocks: vec![block(&[
                (PARQUET, &[(1, &[10.0, 100.0, 20.0])]),
                ("stoa-arrow", &[(1, &[5.0, 50.0, 10.0])]),
            ])],
        };
        let comparison = times.compare("stoa-arrow", PARQUET).unwrap();
        assert_eq!(comparison.geomean, exactly(0.5));
        assert_eq!(comparison.worst(), Some((1, exactly(0.5))));
        assert!(times.compare("stoa-arrow", MEMTABLE).is_none());
    }

    #[test]
    fn modes_of_different_blocks_are_compared_through_parquet() {
        // The machine was twice as slow during the second block.
        let times = Times {
            blocks: vec![
                block(&[(PARQUET, &[(1, &[10.0; 3])]), (MEMTABLE, &[(1, &[5.0; 3])])]),
                block(&[(PARQUET, &[(1, &[20.0; 3])]), ("a", &[(1, &[8.0; 3])])]),
            ],
        };
        let comparison = times.compare("a", MEMTABLE).unwrap();
        assert!((comparison.geomean.median - 0.8).abs() < 1e-9);
        assert_eq!(times.of(PARQUET)[&1].len(), 6);
    }

    #[test]
    fn the_best_is_chosen_query_by_query() {
        let times = Times {
            blocks: vec![block(&[
                (PARQUET, &[(1, &[10.0]), (2, &[2.0])]),
                (MEMTABLE, &[(1, &[4.0]), (2, &[8.0])]),
                ("a", &[(1, &[4.0]), (2, &[3.0])]),
            ])],
        };
        let comparison = times.compare_to_best("a").unwrap();
        assert_eq!(comparison.queries[&1], exactly(1.0));
        assert_eq!(comparison.worst(), Some((2, exactly(1.5))));
    }

    #[test]
    fn dfbench_has_an_iteration_a_time() {
        let times = Times {
            blocks: vec![block(&[("a", &[(7, &[1.5, 2.5])])])],
        };
        let rows = BTreeMap::from([(7, 4)]);
        let found = times.dfbench("a", &json!({"start_time": 9}), &rows);
        assert_eq!(
            found["queries"],
            json!([{
                "query": "Query 7",
                "iterations": [{"elapsed": 1.5, "row_count": 4}, {"elapsed": 2.5, "row_count": 4}],
                "start_time": 9,
                "success": true,
            }])
        );
    }
}
