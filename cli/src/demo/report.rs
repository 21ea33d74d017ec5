//! What the demo found, as a table and as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::config::format_bytes;
use crate::table::{Align, TextTable};

/// One query, over plain Parquet and over the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryResult {
    /// `q1` to `q22`.
    pub query: String,
    /// The times over plain Parquet.
    pub parquet: Vec<Duration>,
    /// The times over the cache.
    pub cached: Vec<Duration>,
    /// Where the answers differ, if they do.
    pub difference: Option<String>,
}

impl QueryResult {
    fn parquet_ms(&self) -> f64 {
        median_ms(&self.parquet)
    }

    fn cached_ms(&self) -> f64 {
        median_ms(&self.cached)
    }

    /// The cache's time over Parquet's: less than 1 is faster.
    fn ratio(&self) -> f64 {
        self.cached_ms() / self.parquet_ms()
    }
}

/// All that the demo found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// TPC-H's scale factor.
    pub scale: f64,
    /// Query by query.
    pub queries: Vec<QueryResult>,
    /// Shared memory that the tables hold, in bytes.
    pub memory_bytes: u64,
    /// The size of the Parquet files in bytes.
    pub parquet_bytes: u64,
    /// The share of chunks that hot queries found in shared memory, 0 to 1.
    pub hit_rate: f64,
    /// Requests to the origin while queries ran over the loaded cache.
    pub hot_origin_requests: u64,
    /// How long loading took.
    pub load: Duration,
}

impl Report {
    /// Whether all answers are equal.
    pub fn all_equal(&self) -> bool {
        self.queries.iter().all(|query| query.difference.is_none())
    }

    /// The geometric mean of the ratios.
    pub fn geomean_ratio(&self) -> f64 {
        let logs: f64 = self.queries.iter().map(|query| query.ratio().ln()).sum();
        (logs / self.queries.len().max(1) as f64).exp()
    }

    /// One object for scripts.
    pub fn to_json(&self) -> Value {
        let queries: Vec<Value> = self
            .queries
            .iter()
            .map(|query| {
                json!({
                    "query": query.query,
                    "parquet_ms": round(query.parquet_ms(), 3),
                    "cached_ms": round(query.cached_ms(), 3),
                    "ratio": round(query.ratio(), 4),
                    "equal": query.difference.is_none(),
                })
            })
            .collect();
        json!({
            "scale": self.scale,
            "queries": queries,
            "geomean_ratio": round(self.geomean_ratio(), 4),
            "memory_bytes": self.memory_bytes,
            "parquet_bytes": self.parquet_bytes,
            "hit_rate": round(self.hit_rate, 4),
            "hot_origin_requests": self.hot_origin_requests,
            "load_seconds": round(self.load.as_secs_f64(), 3),
        })
    }

    /// The table for people.
    pub fn to_text(&self) -> String {
        let mut table = TextTable::new([
            ("query", Align::Left),
            ("Parquet ms", Align::Right),
            ("cached ms", Align::Right),
            ("ratio", Align::Right),
            ("answers", Align::Left),
        ]);
        for query in &self.queries {
            table.row([
                query.query.clone(),
                format!("{:.1}", query.parquet_ms()),
                format!("{:.1}", query.cached_ms()),
                format!("{:.2}", query.ratio()),
                match &query.difference {
                    None => "equal".to_string(),
                    Some(difference) => format!("DIFFERENT: {difference}"),
                },
            ]);
        }
        let mut text = table.to_string();
        let runs = self.queries.first().map_or(0, |query| query.cached.len());
        let (verb, factor) = match self.geomean_ratio() {
            ratio if ratio <= 1.0 => ("faster", 1.0 / ratio),
            ratio => ("slower", ratio),
        };
        let lines = [
            (
                "geometric mean",
                format!(
                    "{:.2} ({factor:.1} times {verb}; medians of {runs})",
                    self.geomean_ratio()
                ),
            ),
            (
                "memory held",
                format!(
                    "{} for {} of Parquet",
                    format_bytes(self.memory_bytes),
                    format_bytes(self.parquet_bytes)
                ),
            ),
            ("loaded in", format!("{:.1} s", self.load.as_secs_f64())),
            ("hit rate", format!("{:.1} %", self.hit_rate * 100.0)),
            (
                "requests to the origin while hot",
                self.hot_origin_requests.to_string(),
            ),
        ];
        text.push('\n');
        for (name, value) in lines {
            text.push_str(&format!("{name:<33} {value}\n"));
        }
        text
    }
}

fn median_ms(times: &[Duration]) -> f64 {
    let mut sorted: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn round(value: f64, digits: i32) -> f64 {
    let factor = 10f64.powi(digits);
    (value * factor).round() / factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let ms = |values: &[u64]| values.iter().map(|v| Duration::from_millis(*v)).collect();
        let query = |name: &str, parquet: &[u64], cached: &[u64]| QueryResult {
            query: name.into(),
            parquet: ms(parquet),
            cached: ms(cached),
            difference: None,
        };
        Report {
            scale: 0.1,
            queries: vec![
                query("q1", &[40, 44, 90], &[10, 11, 12]),
                query("q2", &[20, 20, 20], &[20, 20, 21]),
            ],
            memory_bytes: 170 << 20,
            parquet_bytes: 36 << 20,
            hit_rate: 1.0,
            hot_origin_requests: 0,
            load: Duration::from_millis(2340),
        }
    }

    #[test]
    fn the_table_reads_well() {
        insta::assert_snapshot!(report().to_text(), @"
        query  Parquet ms  cached ms  ratio  answers
        q1           44.0       11.0   0.25  equal
        q2           20.0       20.0   1.00  equal

        geometric mean                    0.50 (2.0 times faster; medians of 3)
        memory held                       170 MiB for 36 MiB of Parquet
        loaded in                         2.3 s
        hit rate                          100.0 %
        requests to the origin while hot  0
        ");
    }

    #[test]
    fn the_object_has_the_documented_fields() {
        insta::assert_snapshot!(report().to_json().to_string(), @r#"{"geomean_ratio":0.5,"hit_rate":1.0,"hot_origin_requests":0,"load_seconds":2.34,"memory_bytes":178257920,"parquet_bytes":37748736,"queries":[{"cached_ms":11.0,"equal":true,"parquet_ms":44.0,"query":"q1","ratio":0.25},{"cached_ms":20.0,"equal":true,"parquet_ms":20.0,"query":"q2","ratio":1.0}],"scale":0.1}"#);
    }

    #[test]
    fn a_wrong_answer_is_shown_and_counted() {
        let mut report = report();
        report.queries[1].difference = Some("1 rows against 2".into());
        assert!(!report.all_equal());
        assert!(report.to_text().contains("DIFFERENT: 1 rows against 2"));
    }
}
