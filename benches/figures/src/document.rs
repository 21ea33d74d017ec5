//! What a run writes, and what tables and plots are made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stats::{Interval, geomean, median, median_interval};
use crate::times::{ByQuery, Comparison, MEMTABLE, PARQUET, Times};

/// The result of a run, as JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Versions, machine and arguments; what dfbench calls the context.
    pub context: Value,
    /// Another engine, and its version; none where the engine is ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// `tpch` or `clickbench`; `lookup` for a million chunks.
    pub suite: String,
    /// The scale of the data.
    pub scale: f64,
    /// Bytes of the Parquet files that all modes read.
    pub parquet_bytes: u64,
    /// The modes in the order of the command line.
    pub modes: Vec<String>,
    /// By mode: memory, and how it compares.
    #[serde(default)]
    pub summary: BTreeMap<String, Summary>,
    /// By query and mode, hot.
    #[serde(default)]
    pub queries: BTreeMap<u32, BTreeMap<String, QueryFigures>>,
    /// By mode: the first execution in a new process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub first_touch: BTreeMap<String, FirstTouch>,
    /// By mode: the first execution where nothing is in memory.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cold: BTreeMap<String, Cold>,
    /// By mode: several processes at once.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub processes: BTreeMap<String, Processes>,
    /// By form: what filling the cache costs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fill: BTreeMap<String, Fill>,
    /// Chunks in another process's memory, beside Parquet at the same origin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<Remote>,
    /// By pages (`4 KiB` or `huge`), then by what is looked up in: nanoseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lookup: BTreeMap<String, BTreeMap<String, f64>>,
}

/// A mode in a few figures. Ratios of times are below 1 where the mode is faster; each stands
/// beside the bounds of its 90 % interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Bytes of memory that hold the tables: of the page cache for Parquet, of the process for the
    /// memory table, of shared memory for Stoa.
    pub bytes: u64,
    /// The same over the Parquet's bytes.
    pub bytes_vs_parquet: f64,
    /// Seconds that loading the tables took; 0 where nothing is loaded.
    pub load_seconds: f64,
    /// Milliseconds that a new reader takes from nothing to the tables; 0 without the cache.
    pub attach_ms: f64,
    /// Requests to the origin while hot.
    pub hot_origin_requests: u64,
    /// The share of chunks that queries found in shared memory, 0 to 1.
    #[serde(default)]
    pub hit_rate: Option<f64>,
    /// Geometric mean over the queries of the median times, in milliseconds.
    pub geomean_ms: f64,
    /// Geometric mean of the ratios to the memory table.
    pub geomean_vs_memtable: Option<f64>,
    /// Its interval.
    pub geomean_vs_memtable_interval: Option<[f64; 2]>,
    /// Geometric mean of the ratios to Parquet.
    pub geomean_vs_parquet: Option<f64>,
    /// Its interval.
    pub geomean_vs_parquet_interval: Option<[f64; 2]>,
    /// The largest ratio of a query to the best of Parquet, Parquet with pushdown, memory table.
    pub worst_vs_best: Option<f64>,
    /// Its interval.
    pub worst_vs_best_interval: Option<[f64; 2]>,
    /// The query that it is of.
    pub worst_vs_best_query: Option<u32>,
}

/// A query in a mode.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueryFigures {
    /// Median of its times.
    pub median_ms: f64,
    /// Ratio to the memory table, paired.
    pub vs_memtable: Option<Interval>,
    /// Ratio to Parquet, paired.
    pub vs_parquet: Option<Interval>,
    /// Ratio to the best of Parquet, Parquet with pushdown, memory table, paired.
    pub vs_best: Option<Interval>,
}

/// The first execution of a query in a new process, over the second ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirstTouch {
    /// `4 KiB` or `huge`.
    pub pages: String,
    /// Whether the process mapped the pages before the query, off its path.
    pub prefault: bool,
    /// Milliseconds from a new reader to registered tables, median.
    pub attach_ms: f64,
    /// Milliseconds that mapping the pages took, median; 0 without prefault.
    pub prefault_ms: f64,
    /// Geometric mean over the queries of first over hot time, median over the processes.
    pub geomean_vs_hot: Option<Interval>,
    /// The query with the largest median ratio.
    pub worst_query: Option<u32>,
    /// That ratio.
    pub worst_vs_hot: Option<Interval>,
    /// By query: median of the first times, in milliseconds.
    pub first_ms: BTreeMap<u32, f64>,
    /// By query: median of the hot times of the same processes.
    pub hot_ms: BTreeMap<u32, f64>,
}

impl FirstTouch {
    /// Of the times of many processes, a first and a hot one of each process at the same place.
    pub fn of(first: &ByQuery, hot: &ByQuery) -> FirstTouch {
        let mut times = Times::default();
        let mut block = crate::Block::default();
        block.elapsed.insert("first".into(), first.clone());
        block.elapsed.insert("hot".into(), hot.clone());
        times.blocks.push(block);
        let comparison = times.compare("first", "hot");
        let worst = comparison.as_ref().and_then(Comparison::worst);
        FirstTouch {
            geomean_vs_hot: comparison.map(|found| found.geomean),
            worst_query: worst.map(|(query, _)| query),
            worst_vs_hot: worst.map(|(_, ratio)| ratio),
            first_ms: medians(first),
            hot_ms: medians(hot),
            ..FirstTouch::default()
        }
    }
}

/// Queries in new processes where nothing is in memory, not even the pages of the files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cold {
    /// Ratio of the times to Parquet's, cold too; geometric mean over the queries.
    pub geomean_vs_parquet: Option<Interval>,
    /// By query: median time in milliseconds.
    pub median_ms: BTreeMap<u32, f64>,
}

/// Several processes with one partition each, all queries in each, at once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Processes {
    /// How many.
    pub processes: usize,
    /// Cores that they share.
    pub cores: usize,
    /// Passes over all queries a second, of one process alone.
    pub alone_per_second: f64,
    /// The same of all of them together.
    pub together_per_second: f64,
    /// Together over alone × cores, paired by round.
    pub vs_alone_times_cores: Option<Interval>,
    /// Proportional share of all memory, summed over the processes, in bytes.
    pub pss_bytes: u64,
    /// Of it shared memory: one copy is as much as one process would have alone.
    pub pss_shared_bytes: u64,
    /// Shared memory that the cache takes, in bytes.
    pub cache_bytes: u64,
}

/// What is added to a mode's name where its chunks lie in local shared memory.
const LOCAL: &str = ", local";

/// Queries whose tables lie in an object store, from which every answer comes late, and whose chunks
/// lie in the memory of a worker that is reached over TCP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Remote {
    /// Milliseconds by which the store delays every answer.
    pub origin_delay_ms: u64,
    /// By name: `parquet` read from the store, `stoa-auto` with remote hits, `stoa-auto, local` with
    /// local ones of the same chunks.
    pub modes: BTreeMap<String, RemoteMode>,
}

/// One mode of [`Remote`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RemoteMode {
    /// Bytes of the worker's shared memory; 0 for Parquet.
    pub bytes: u64,
    /// Geometric mean over the queries of the median times, in milliseconds.
    pub geomean_ms: f64,
    /// Geometric mean of the ratios to Parquet at the origin.
    pub geomean_vs_parquet: Option<Interval>,
    /// The largest of these ratios, by query.
    pub worst_vs_parquet: Option<Interval>,
    /// The query that it is of.
    pub worst_query: Option<u32>,
    /// Geometric mean of the ratios to local hits of the same mode; none for local hits.
    pub geomean_vs_local: Option<Interval>,
    /// By query: median time in milliseconds.
    pub median_ms: BTreeMap<u32, f64>,
    /// By query: ratio to Parquet at the origin.
    pub vs_parquet: BTreeMap<u32, Interval>,
    /// Passes over all queries that were measured.
    pub passes: usize,
    /// Where the bytes came from, in these passes together.
    pub sources: Sources,
}

/// What was read from where. Of Parquet only requests and bytes of the origin are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// Chunks in shared memory of this host.
    pub local_chunks: u64,
    /// Their bytes.
    pub local_bytes: u64,
    /// Chunks of the worker's memory, over TCP.
    pub remote_tcp_chunks: u64,
    /// Their bytes.
    pub remote_tcp_bytes: u64,
    /// Chunks of the worker's memory, over RDMA.
    pub remote_rdma_chunks: u64,
    /// Their bytes.
    pub remote_rdma_bytes: u64,
    /// Chunks read from the origin.
    pub origin_chunks: u64,
    /// Requests to the origin, listings and looks at files included.
    pub origin_requests: u64,
    /// Bytes that it answered with.
    pub origin_bytes: u64,
}

/// What making chunks of a form costs, beside the parquet crate's decode of the same chunks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fill {
    /// `4 KiB` or `huge`.
    #[serde(default)]
    pub pages: String,
    /// Bytes of the chunks in this form.
    pub bytes: u64,
    /// Bytes of the chunks as they are in the files.
    pub parquet_bytes: u64,
    /// CPU milliseconds of the parquet crate's decode, median.
    pub decode_ms: f64,
    /// CPU milliseconds from the fetched bytes to a chunk in a segment, median.
    pub fill_ms: f64,
    /// CPU milliseconds of writing as many bytes to the same file system with `pwrite`, median.
    pub pwrite_ms: f64,
    /// Rate of the fill over the rate of the decode, paired.
    pub rate_vs_decode: Option<Interval>,
    /// Rate of the fill over the rate of `pwrite`, paired.
    pub rate_vs_pwrite: Option<Interval>,
}

impl Document {
    /// Fills `summary` and `queries` from hot times. What `summary` has of a mode's memory stays.
    pub fn summarize(&mut self, times: &Times) {
        for mode in &self.modes {
            let found = times.of(mode);
            let (memtable, parquet) = (times.compare(mode, MEMTABLE), times.compare(mode, PARQUET));
            let best = times.compare_to_best(mode);
            for (query, elapsed) in &found {
                let of = |comparison: &Option<Comparison>| {
                    let ratio = comparison.as_ref()?.queries.get(query);
                    ratio.copied()
                };
                let figures = QueryFigures {
                    median_ms: median(elapsed).unwrap_or(f64::NAN),
                    vs_memtable: of(&memtable),
                    vs_parquet: of(&parquet),
                    vs_best: of(&best),
                };
                let by_mode = self.queries.entry(*query).or_default();
                by_mode.insert(mode.clone(), figures);
            }
            let summary = self.summary.entry(mode.clone()).or_default();
            summary.bytes_vs_parquet = summary.bytes as f64 / self.parquet_bytes.max(1) as f64;
            let medians: Vec<f64> = medians(&found).into_values().collect();
            summary.geomean_ms = geomean(&medians).unwrap_or(0.0);
            let bounds = |interval: Interval| [interval.low, interval.high];
            let memtable = memtable.map(|found| found.geomean);
            summary.geomean_vs_memtable = memtable.map(|found| found.median);
            summary.geomean_vs_memtable_interval = memtable.map(bounds);
            let parquet = parquet.map(|found| found.geomean);
            summary.geomean_vs_parquet = parquet.map(|found| found.median);
            summary.geomean_vs_parquet_interval = parquet.map(bounds);
            let worst = best.as_ref().and_then(Comparison::worst);
            summary.worst_vs_best = worst.map(|(_, ratio)| ratio.median);
            summary.worst_vs_best_interval = worst.map(|(_, ratio)| bounds(ratio));
            summary.worst_vs_best_query = worst.map(|(query, _)| query);
        }
    }

    /// Fills `cold` from times of new processes, by mode.
    pub fn summarize_cold(&mut self, times: &Times) {
        for mode in &self.modes {
            let found = times.of(mode);
            if found.is_empty() {
                continue;
            }
            let cold = Cold {
                geomean_vs_parquet: times.compare(mode, PARQUET).map(|found| found.geomean),
                median_ms: medians(&found),
            };
            self.cold.insert(mode.clone(), cold);
        }
    }

    /// Fills `remote` from times, by name, and from what was read from where meanwhile. `worker_bytes`
    /// is what the worker of a mode holds.
    pub fn summarize_remote(
        &mut self,
        origin_delay_ms: u64,
        times: &Times,
        sources: &BTreeMap<String, Sources>,
        worker_bytes: &BTreeMap<String, u64>,
    ) {
        let mut remote = Remote {
            origin_delay_ms,
            ..Remote::default()
        };
        for (name, sources) in sources {
            let found = times.of(name);
            let parquet = times.compare(name, PARQUET).filter(|_| name != PARQUET);
            let worst = parquet.as_ref().and_then(Comparison::worst);
            let local = match name.ends_with(LOCAL) {
                true => None,
                false => times.compare(name, &Remote::local(name)),
            };
            let mode = name.strip_suffix(LOCAL).unwrap_or(name);
            let median_ms = medians(&found);
            let figures = RemoteMode {
                bytes: worker_bytes.get(mode).copied().unwrap_or(0),
                geomean_ms: geomean(&median_ms.values().copied().collect::<Vec<_>>())
                    .unwrap_or(0.0),
                geomean_vs_parquet: parquet.as_ref().map(|found| found.geomean),
                worst_vs_parquet: worst.map(|(_, ratio)| ratio),
                worst_query: worst.map(|(query, _)| query),
                geomean_vs_local: local.map(|found| found.geomean),
                median_ms,
                vs_parquet: parquet.map(|found| found.queries).unwrap_or_default(),
                passes: found.values().map(Vec::len).max().unwrap_or(0),
                sources: *sources,
            };
            remote.modes.insert(name.clone(), figures);
        }
        self.remote = Some(remote);
    }

    /// What names the data: `tpch-1`, `clickbench-0.1`.
    pub fn id(&self) -> String {
        format!("{}-{}", self.suite, self.scale)
    }
}

impl Sources {
    /// What was read since `earlier`.
    pub fn since(&self, earlier: &Sources) -> Sources {
        self.with(earlier, |now, before| now - before)
    }

    /// What was read in both.
    pub fn plus(&self, more: &Sources) -> Sources {
        self.with(more, |one, other| one + other)
    }

    fn with(&self, other: &Sources, of: impl Fn(u64, u64) -> u64) -> Sources {
        Sources {
            local_chunks: of(self.local_chunks, other.local_chunks),
            local_bytes: of(self.local_bytes, other.local_bytes),
            remote_tcp_chunks: of(self.remote_tcp_chunks, other.remote_tcp_chunks),
            remote_tcp_bytes: of(self.remote_tcp_bytes, other.remote_tcp_bytes),
            remote_rdma_chunks: of(self.remote_rdma_chunks, other.remote_rdma_chunks),
            remote_rdma_bytes: of(self.remote_rdma_bytes, other.remote_rdma_bytes),
            origin_chunks: of(self.origin_chunks, other.origin_chunks),
            origin_requests: of(self.origin_requests, other.origin_requests),
            origin_bytes: of(self.origin_bytes, other.origin_bytes),
        }
    }
}

impl Remote {
    /// The name of `mode` where its chunks lie in local shared memory.
    pub fn local(mode: &str) -> String {
        format!("{mode}{LOCAL}")
    }

    /// The modes of Stoa that did not have all chunks from memory, and how many they read from the
    /// origin. Their times are not those of hits.
    pub fn missed(&self) -> impl Iterator<Item = (&str, u64)> {
        let modes = self.modes.iter();
        modes
            .map(|(name, found)| (name.as_str(), found.sources.origin_chunks))
            .filter(|(_, chunks)| *chunks > 0)
    }
}

impl Processes {
    /// Of rounds in which one process ran a pass alone and then all of them ran one each:
    /// seconds of the two.
    pub fn of(processes: usize, cores: usize, rounds: &[(f64, f64)]) -> Processes {
        let per_second = |seconds: Vec<f64>, passes: usize| {
            median(&seconds).map_or(0.0, |seconds| passes as f64 / seconds)
        };
        let ratio = |(alone, together): &(f64, f64)| {
            let speedup = alone * processes as f64 / together;
            speedup / cores.max(1) as f64
        };
        Processes {
            processes,
            cores,
            alone_per_second: per_second(rounds.iter().map(|round| round.0).collect(), 1),
            together_per_second: per_second(
                rounds.iter().map(|round| round.1).collect(),
                processes,
            ),
            vs_alone_times_cores: median_interval(&rounds.iter().map(ratio).collect::<Vec<_>>()),
            ..Processes::default()
        }
    }
}

fn medians(times: &ByQuery) -> BTreeMap<u32, f64> {
    times
        .iter()
        .filter_map(|(query, times)| Some((*query, median(times)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn example() -> Document {
        let mut document = Document {
            suite: "tpch".into(),
            scale: 1.0,
            parquet_bytes: 1000,
            modes: [PARQUET, MEMTABLE, "stoa-packed"].map(String::from).into(),
            ..Document::default()
        };
        let mut block = crate::Block::default();
        for iteration in 1..=5 {
            let slow = f64::from(iteration);
            for (mode, factor) in [(PARQUET, 4.0), (MEMTABLE, 2.0), ("stoa-packed", 1.0)] {
                block.push(mode, 1, factor * slow);
                block.push(
                    mode,
                    2,
                    factor * slow * if mode == MEMTABLE { 0.25 } else { 1.0 },
                );
            }
        }
        for (mode, bytes) in [(PARQUET, 1000), (MEMTABLE, 5000), ("stoa-packed", 800)] {
            let summary = Summary {
                bytes,
                ..Summary::default()
            };
            document.summary.insert(mode.into(), summary);
        }
        document.summarize(&Times {
            blocks: vec![block],
        });
        document
    }

    #[test]
    fn a_summary_has_memory_beside_time() {
        let document = example();
        let packed = &document.summary["stoa-packed"];
        assert_eq!(packed.bytes_vs_parquet, 0.8);
        // q1: half the memory table's time; q2: twice.
        assert!((packed.geomean_vs_memtable.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(packed.worst_vs_best, Some(2.0));
        assert_eq!(packed.worst_vs_best_interval, Some([2.0, 2.0]));
        assert_eq!(packed.worst_vs_best_query, Some(2));
        assert_eq!(packed.geomean_vs_parquet, Some(0.25));
        assert_eq!(document.queries[&2][MEMTABLE].median_ms, 1.5);
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let mut document = example();
        let first = ByQuery::from([(1, vec![2.0, 4.0])]);
        let hot = ByQuery::from([(1, vec![1.0, 2.0])]);
        let touch = FirstTouch::of(&first, &hot);
        assert_eq!(touch.geomean_vs_hot.unwrap().median, 2.0);
        document.first_touch.insert("stoa-packed".into(), touch);
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(serde_json::from_str::<Document>(&text).unwrap(), document);
    }

    #[test]
    fn throughput_is_compared_with_one_process_on_every_core() {
        // Four passes at once on two cores take twice as long as one alone: nothing is lost.
        let found = Processes::of(4, 2, &[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]);
        assert_eq!(found.vs_alone_times_cores.unwrap().median, 1.0);
        assert_eq!(found.alone_per_second, 0.5);
        assert_eq!(found.together_per_second, 1.0);
    }
}
