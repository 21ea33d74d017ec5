//! Results as dfbench writes them, and the comparison of modes.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::modes::Mode;
use crate::stats::{Interval, geomean, median, median_interval};

/// All times of one run, by mode and query, in milliseconds.
#[derive(Debug, Default)]
pub struct Times {
    /// Elapsed milliseconds by mode and query number; one value an iteration.
    pub elapsed: BTreeMap<Mode, BTreeMap<u8, Vec<f64>>>,
    /// Rows of the answer, by query number.
    pub rows: BTreeMap<u8, usize>,
    /// Memory held, by mode.
    pub bytes: BTreeMap<Mode, u64>,
    /// Milliseconds to attach to the cache in a new reader, by mode.
    pub attach_ms: BTreeMap<Mode, f64>,
    /// Requests to the origin while hot, by mode.
    pub hot_origin_requests: BTreeMap<Mode, u64>,
}

/// One mode against another: ratios of times, below 1 is faster.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Geometric mean over the queries, median over the iterations.
    pub geomean: Interval,
    /// The query with the largest median ratio.
    pub worst_query: u8,
    /// That ratio.
    pub worst: Interval,
    /// By query.
    pub queries: BTreeMap<u8, Interval>,
}

impl Times {
    /// The ratios of `mode` to `base`, iteration by iteration; `None` where one was not run.
    pub fn compare(&self, mode: Mode, base: Mode) -> Option<Comparison> {
        let (mode, base) = (self.elapsed.get(&mode)?, self.elapsed.get(&base)?);
        let ratios: BTreeMap<u8, Vec<f64>> = mode
            .iter()
            .filter_map(|(query, times)| {
                let other = base.get(query)?;
                Some((
                    *query,
                    times.iter().zip(other).map(|(a, b)| a / b).collect(),
                ))
            })
            .collect();
        let iterations = ratios.values().map(Vec::len).min()?;
        let means: Vec<f64> = (0..iterations)
            .filter_map(|i| geomean(&ratios.values().map(|r| r[i]).collect::<Vec<_>>()))
            .collect();
        let queries: BTreeMap<u8, Interval> = ratios
            .iter()
            .filter_map(|(q, r)| Some((*q, median_interval(r)?)))
            .collect();
        let (worst_query, worst) = queries
            .iter()
            .max_by(|a, b| a.1.median.total_cmp(&b.1.median))?;
        Some(Comparison {
            geomean: median_interval(&means)?,
            worst_query: *worst_query,
            worst: *worst,
            queries: queries.clone(),
        })
    }

    /// One mode's results in the shape that dfbench's `compare.py` reads.
    pub fn dfbench(&self, mode: Mode, context: &Value) -> Value {
        let empty = BTreeMap::new();
        let queries: Vec<Value> = self
            .elapsed
            .get(&mode)
            .unwrap_or(&empty)
            .iter()
            .map(|(query, times)| {
                let rows = self.rows.get(query).copied().unwrap_or(0);
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

    /// For every mode: bytes, and its ratios to the modes it is compared with.
    pub fn summary(&self, parquet_bytes: u64) -> Value {
        let mut summary = serde_json::Map::new();
        for mode in self.elapsed.keys() {
            let bytes = self.bytes.get(mode).copied().unwrap_or(0);
            let mut entry = json!({
                "bytes": bytes,
                "bytes_vs_parquet": bytes as f64 / parquet_bytes.max(1) as f64,
                "attach_ms": self.attach_ms.get(mode).copied().unwrap_or(0.0),
                "hot_origin_requests": self.hot_origin_requests.get(mode).copied().unwrap_or(0),
            });
            for (name, base) in [
                ("vs_memtable", Mode::Memtable),
                ("vs_parquet", Mode::Parquet),
                ("vs_parquet_pushdown", Mode::ParquetPushdown),
            ] {
                if let Some(comparison) = self.compare(*mode, base) {
                    entry[name] = json!(comparison);
                }
            }
            summary.insert(mode.name().to_owned(), entry);
        }
        Value::Object(summary)
    }

    /// The table for people: median milliseconds by query and mode, ratios below.
    pub fn table(&self) -> String {
        let modes: Vec<Mode> = self.elapsed.keys().copied().collect();
        let mut text = format!("{:>5}", "query");
        for mode in &modes {
            text += &format!("{:>18}", mode.name());
        }
        text += "\n";
        for query in self.rows.keys() {
            text += &format!("{query:>5}");
            for mode in &modes {
                let times = self.elapsed[mode]
                    .get(query)
                    .map(Vec::as_slice)
                    .unwrap_or_default();
                text += &format!("{:>15.1} ms", median(times).unwrap_or(f64::NAN));
            }
            text += "\n";
        }
        for mode in &modes {
            for base in [Mode::Memtable, Mode::Parquet, Mode::ParquetPushdown] {
                let Some(found) = self.compare(*mode, base).filter(|_| *mode != base) else {
                    continue;
                };
                text += &format!(
                    "{} / {}: geomean {:.3} [{:.3}, {:.3}], worst q{} {:.3} [{:.3}, {:.3}]\n",
                    mode.name(),
                    base.name(),
                    found.geomean.median,
                    found.geomean.low,
                    found.geomean.high,
                    found.worst_query,
                    found.worst.median,
                    found.worst.low,
                    found.worst.high,
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_paired_by_iteration() {
        let mut times = Times::default();
        // Both modes slow down together: the ratio does not.
        times.elapsed.insert(
            Mode::Parquet,
            BTreeMap::from([(1, vec![10.0, 100.0, 20.0])]),
        );
        times
            .elapsed
            .insert(Mode::Stoa, BTreeMap::from([(1, vec![5.0, 50.0, 10.0])]));
        let comparison = times.compare(Mode::Stoa, Mode::Parquet).unwrap();
        assert_eq!(
            comparison.geomean,
            Interval {
                median: 0.5,
                low: 0.5,
                high: 0.5
            }
        );
        assert_eq!(comparison.worst_query, 1);
        assert!(times.compare(Mode::Stoa, Mode::Memtable).is_none());
    }
}
