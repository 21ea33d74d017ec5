//! Markdown tables of documents, and the files that they are kept in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::document::{Document, Remote, Sources};
use crate::stats::Interval;
use crate::times::PARQUET;

/// Which table of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// A line a mode: memory and time.
    Modes,
    /// A line a query: milliseconds by mode.
    Queries,
    /// First execution in a new process.
    FirstTouch,
    /// First execution with nothing in memory.
    Cold,
    /// Several processes at once.
    Processes,
    /// What filling the cache costs.
    Fill,
    /// Chunks in another process's memory, beside Parquet at the same origin.
    Remote,
    /// Lookup and attach among a million chunks.
    Lookup,
    /// Other engines, each beside its own scan of Parquet.
    Peers,
}

impl Section {
    /// All of them, in the order of a report.
    pub const ALL: [Section; 9] = [
        Section::Modes,
        Section::Queries,
        Section::FirstTouch,
        Section::Cold,
        Section::Processes,
        Section::Fill,
        Section::Remote,
        Section::Lookup,
        Section::Peers,
    ];

    /// As in markers: `<!-- stoa-bench tpch-1 modes -->`.
    pub fn name(self) -> &'static str {
        match self {
            Section::Modes => "modes",
            Section::Queries => "queries",
            Section::FirstTouch => "first-touch",
            Section::Cold => "cold",
            Section::Processes => "processes",
            Section::Fill => "fill",
            Section::Remote => "remote",
            Section::Lookup => "lookup",
            Section::Peers => "peers",
        }
    }

    /// The section as Markdown, of documents of the same data; empty where they have nothing of it.
    ///
    /// Of two documents that say the same, the later one wins. Other engines are in
    /// [`Section::Peers`] only, where all are together.
    pub fn markdown(self, documents: &[&Document]) -> String {
        let own = documents.iter().filter(|own| own.engine.is_none());
        let own: Vec<&Document> = own.copied().collect();
        let last = |table: fn(&Document) -> String| {
            let tables = own.iter().map(|document| table(document));
            tables.rev().find(|table| !table.is_empty())
        };
        match self {
            Section::Modes => last(modes),
            Section::Queries => last(queries),
            Section::Cold => cold(&own),
            Section::Remote => {
                last(|document| document.remote.as_ref().map_or_else(String::new, remote))
            }
            Section::FirstTouch => first_touch(&own),
            Section::Processes => processes(&own),
            Section::Fill => fill(&own),
            Section::Lookup => lookup(&own),
            Section::Peers => peers(documents),
        }
        .unwrap_or_default()
    }
}

/// All sections of a document that are not empty, under the document's title.
pub fn report(document: &Document) -> String {
    let mut text = format!("## {}\n", title(document));
    for section in Section::ALL {
        let table = section.markdown(&[document]);
        if !table.is_empty() {
            let _ = write!(text, "\n{table}");
        }
    }
    text
}

/// `TPC-H, scale 1`.
pub fn title(document: &Document) -> String {
    let suite = match document.suite.as_str() {
        "tpch" => "TPC-H",
        "clickbench" => "ClickBench's shape",
        other => other,
    };
    format!("{suite}, scale {}", document.scale)
}

/// Replaces what lies between the markers of `text` by the tables of the documents.
///
/// A table stands between `<!-- stoa-bench tpch-1 modes -->` and `<!-- stoa-bench end -->`. Those of
/// other data stay as they are.
///
/// # Errors
/// If a marker names no section, or has no end.
pub fn replace(text: &str, documents: &[Document]) -> Result<String, String> {
    const BEGIN: &str = "<!-- stoa-bench ";
    const END: &str = "<!-- stoa-bench end -->";
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(BEGIN) {
        let head = start + BEGIN.len();
        let close = rest[head..].find(" -->").map(|at| head + at);
        let close = close.ok_or("a marker `<!-- stoa-bench` is not closed by ` -->`")?;
        let marker = &rest[head..close];
        let after = close + " -->".len();
        let end = rest[after..].find(END).map(|at| after + at);
        let end = end.ok_or_else(|| format!("no `{END}` behind the marker `{marker}`"))?;
        let (id, name) = marker.split_once(' ').unwrap_or((marker, "modes"));
        let section = Section::ALL
            .into_iter()
            .find(|section| section.name() == name);
        let section = section.ok_or_else(|| {
            let known = Section::ALL.map(Section::name).join(", ");
            format!("marker `{marker}` names no table `{name}`; expected one of {known}")
        })?;
        out += &rest[..after];
        let of_data = documents.iter().filter(|document| document.id() == id);
        let table = section.markdown(&of_data.collect::<Vec<_>>());
        if table.is_empty() {
            out += &rest[after..end];
        } else {
            let _ = write!(out, "\n{table}");
        }
        out += END;
        rest = &rest[end + END.len()..];
    }
    Ok(out + rest)
}

/// Every engine's modes beside its own scan of Parquet: engines that read it at another speed are
/// compared by what they gain over that.
fn peers(documents: &[&Document]) -> Option<String> {
    let hot = documents.iter().filter(|found| !found.summary.is_empty());
    // The last one of an engine, as elsewhere.
    let engines: BTreeMap<_, _> = hot.map(|found| (found.engine.clone(), found)).collect();
    if engines.keys().all(Option::is_none) {
        return None;
    }
    let mut text = head(&[
        "engine",
        "mode",
        "memory MB",
        "× Parquet",
        "geometric mean ms",
        "time ÷ its own Parquet",
    ]);
    for (engine, document) in engines {
        let engine = engine.unwrap_or_else(|| "DataFusion".to_owned());
        for mode in &document.modes {
            let Some(found) = document.summary.get(mode) else {
                continue;
            };
            let cells = [
                engine.clone(),
                mode.clone(),
                megabytes(found.bytes),
                format!("{:.2}", found.bytes_vs_parquet),
                format!("{:.1}", found.geomean_ms),
                ratio(found.geomean_vs_parquet, found.geomean_vs_parquet_interval),
            ];
            line(&mut text, &cells);
        }
    }
    Some(text)
}

fn lookup(documents: &[&Document]) -> Option<String> {
    let of_all = documents.iter().flat_map(|document| &document.lookup);
    let by_pages: BTreeMap<_, _> = of_all.collect();
    let columns = by_pages.keys().map(|pages| format!("{pages} pages"));
    let columns = std::iter::once("ns of CPU time".to_owned()).chain(columns);
    let mut text = head(&columns.collect::<Vec<_>>());
    let all: BTreeSet<_> = by_pages.values().flat_map(|found| found.keys()).collect();
    for what in &all {
        let figures = by_pages.values().map(|found| {
            let found = found.get(*what);
            found.map_or_else(String::new, |nanos| format!("{nanos:.0}"))
        });
        let cells = std::iter::once((*what).clone()).chain(figures);
        line(&mut text, &cells.collect::<Vec<_>>());
    }
    (!all.is_empty()).then_some(text)
}

fn modes(document: &Document) -> String {
    if document.queries.is_empty() {
        return String::new();
    }
    let mut text = head(&[
        "mode",
        "memory MB",
        "× Parquet",
        "time ÷ MemTable",
        "time ÷ Parquet",
        "worst query ÷ best of the others",
        "loaded in s",
    ]);
    for mode in &document.modes {
        let Some(found) = document.summary.get(mode) else {
            continue;
        };
        let worst = match (found.worst_vs_best, found.worst_vs_best_query) {
            (Some(ratio), Some(query)) => {
                let bounds = bounds(found.worst_vs_best_interval);
                format!("{ratio:.2}{bounds} (q{query})")
            }
            _ => String::new(),
        };
        let loaded = match found.load_seconds {
            0.0 => String::new(),
            seconds => format!("{seconds:.1}"),
        };
        line(
            &mut text,
            &[
                mode.clone(),
                megabytes(found.bytes),
                format!("{:.2}", found.bytes_vs_parquet),
                ratio(
                    found.geomean_vs_memtable,
                    found.geomean_vs_memtable_interval,
                ),
                ratio(found.geomean_vs_parquet, found.geomean_vs_parquet_interval),
                worst,
                loaded,
            ],
        );
    }
    text
}

fn queries(document: &Document) -> String {
    if document.queries.is_empty() {
        return String::new();
    }
    let mut columns = vec!["query, ms".to_owned()];
    columns.extend(document.modes.iter().cloned());
    let mut text = head(&columns);
    for (query, by_mode) in &document.queries {
        let mut cells = vec![format!("q{query}")];
        for mode in &document.modes {
            cells.push(by_mode.get(mode).map_or_else(String::new, |figures| {
                let against = figures.vs_best.filter(|_| mode.starts_with("stoa"));
                let against = against.map_or_else(String::new, |r| format!(" ({:.2})", r.median));
                format!("{:.1}{against}", figures.median_ms)
            }));
        }
        line(&mut text, &cells);
    }
    let mut cells = vec!["geometric mean".to_owned()];
    cells.extend(document.modes.iter().map(|mode| {
        let found = document.summary.get(mode);
        found.map_or_else(String::new, |found| format!("{:.1}", found.geomean_ms))
    }));
    line(&mut text, &cells);
    let mut cells = vec!["memory MB".to_owned()];
    cells.extend(document.modes.iter().map(|mode| {
        let found = document.summary.get(mode);
        found.map_or_else(String::new, |found| megabytes(found.bytes))
    }));
    line(&mut text, &cells);
    text + "\nIn brackets: the time over the best of Parquet, Parquet with pushdown and MemTable.\n"
}

fn first_touch(documents: &[&Document]) -> Option<String> {
    let mut rows = BTreeMap::new();
    for document in documents {
        for (mode, found) in &document.first_touch {
            rows.insert((mode_of(mode), &found.pages, found.prefault), found);
        }
    }
    let mut text = head(&[
        "mode",
        "pages",
        "prefault",
        "memory MB",
        "first ÷ hot",
        "worst query",
        "attach ms",
        "prefault ms",
    ]);
    for ((mode, pages, prefault), found) in &rows {
        let worst = match (found.worst_query, found.worst_vs_hot) {
            (Some(query), Some(ratio)) => format!("{} (q{query})", interval(Some(ratio))),
            _ => String::new(),
        };
        line(
            &mut text,
            &[
                (*mode).to_owned(),
                (*pages).clone(),
                if *prefault { "yes" } else { "no" }.to_owned(),
                memory(documents, mode),
                interval(found.geomean_vs_hot),
                worst,
                format!("{:.1}", found.attach_ms),
                format!("{:.1}", found.prefault_ms),
            ],
        );
    }
    (!rows.is_empty()).then_some(text)
}

fn cold(documents: &[&Document]) -> Option<String> {
    let mut found = documents.iter().rev();
    let found = found.find(|document| !document.cold.is_empty())?;
    let mut text = head(&[
        "mode, cold",
        "memory MB",
        "time ÷ Parquet",
        "sum of medians, ms",
    ]);
    for (mode, found) in &found.cold {
        line(
            &mut text,
            &[
                mode.clone(),
                memory(documents, mode),
                interval(found.geomean_vs_parquet),
                format!("{:.0}", found.median_ms.values().sum::<f64>()),
            ],
        );
    }
    Some(text)
}

fn processes(documents: &[&Document]) -> Option<String> {
    let of_all = documents.iter().flat_map(|document| &document.processes);
    let rows: BTreeMap<_, _> = of_all
        .map(|(mode, found)| ((found.processes, mode), found))
        .collect();
    let mut text = head(&[
        "mode",
        "processes",
        "cores",
        "passes a second, one",
        "passes a second, all",
        "all ÷ (one × cores)",
        "shared memory MB, all (cache)",
        "private memory MB, all",
    ]);
    for ((_, mode), found) in &rows {
        let private = found.pss_bytes.saturating_sub(found.pss_shared_bytes);
        line(
            &mut text,
            &[
                (*mode).clone(),
                found.processes.to_string(),
                found.cores.to_string(),
                format!("{:.3}", found.alone_per_second),
                format!("{:.3}", found.together_per_second),
                interval(found.vs_alone_times_cores),
                format!(
                    "{} ({})",
                    megabytes(found.pss_shared_bytes),
                    megabytes(found.cache_bytes)
                ),
                megabytes(private),
            ],
        );
    }
    (!rows.is_empty()).then_some(text)
}

fn fill(documents: &[&Document]) -> Option<String> {
    let of_all = documents.iter().flat_map(|document| &document.fill);
    let rows: BTreeMap<_, _> = of_all
        .map(|(form, found)| ((form, &found.pages), found))
        .collect();
    let mut text = head(&[
        "form",
        "pages",
        "MB",
        "× Parquet",
        "decode alone, CPU ms",
        "fill, CPU ms",
        "pwrite, CPU ms",
        "rate ÷ decode's",
        "rate ÷ pwrite's",
    ]);
    for ((form, pages), found) in &rows {
        line(
            &mut text,
            &[
                (*form).clone(),
                (*pages).clone(),
                megabytes(found.bytes),
                format!(
                    "{:.2}",
                    found.bytes as f64 / found.parquet_bytes.max(1) as f64
                ),
                format!("{:.0}", found.decode_ms),
                format!("{:.0}", found.fill_ms),
                format!("{:.0}", found.pwrite_ms),
                interval(found.rate_vs_decode),
                interval(found.rate_vs_pwrite),
            ],
        );
    }
    (!rows.is_empty()).then_some(text)
}

fn remote(found: &Remote) -> String {
    let mut text = head(&[
        "mode",
        "worker's memory MB",
        "geometric mean ms",
        "times as fast as Parquet at the origin",
        "least of a query",
        "time ÷ local hits",
        "chunks a pass: local, remote, origin",
        "MB a pass: local, remote, origin",
        "requests to the origin a pass",
    ]);
    for (name, mode) in &found.modes {
        let least = match (mode.worst_vs_parquet, mode.worst_query) {
            (Some(worst), Some(query)) => format!("{} (q{query})", interval(Some(inverse(worst)))),
            _ => String::new(),
        };
        let of_cache = |text: String| {
            if name.starts_with(PARQUET) {
                String::new()
            } else {
                text
            }
        };
        line(
            &mut text,
            &[
                name.clone(),
                of_cache(megabytes(mode.bytes)),
                format!("{:.1}", mode.geomean_ms),
                interval(mode.geomean_vs_parquet.map(inverse)),
                least,
                interval(mode.geomean_vs_local),
                of_cache(a_pass(chunks(&mode.sources), mode.passes, |chunks| {
                    chunks.to_string()
                })),
                a_pass(bytes(&mode.sources), mode.passes, megabytes),
                a_pass([mode.sources.origin_requests], mode.passes, |requests| {
                    requests.to_string()
                }),
            ],
        );
    }
    let _ = writeln!(
        text,
        "\nEvery answer of the origin comes {} ms late. {}\n",
        found.origin_delay_ms,
        misses(found)
    );
    text + &remote_queries(found)
}

/// By query: milliseconds, and how many times as fast as Parquet.
fn remote_queries(found: &Remote) -> String {
    let mut columns = vec!["query, ms"];
    columns.extend(found.modes.keys().map(String::as_str));
    let mut text = head(&columns);
    let queries: BTreeSet<u32> = found
        .modes
        .values()
        .flat_map(|mode| mode.median_ms.keys().copied())
        .collect();
    for query in queries {
        let mut cells = vec![format!("q{query}")];
        cells.extend(found.modes.values().map(|mode| {
            let Some(median) = mode.median_ms.get(&query) else {
                return String::new();
            };
            let ratio = mode.vs_parquet.get(&query);
            let faster = ratio.map_or_else(String::new, |r| format!(" ({:.1}×)", 1.0 / r.median));
            format!("{median:.1}{faster}")
        }));
        line(&mut text, &cells);
    }
    text
}

/// Whether all chunks came from memory, in words.
fn misses(found: &Remote) -> String {
    let missed: Vec<String> = found
        .missed()
        .map(|(mode, chunks)| format!("{mode} ({chunks})"))
        .collect();
    match missed.is_empty() {
        true => "In the measured passes it gave no chunk to Stoa.".to_owned(),
        false => format!(
            "**Not all were hits**: in the measured passes it gave chunks to {}.",
            missed.join(", ")
        ),
    }
}

fn chunks(sources: &Sources) -> [u64; 3] {
    [
        sources.local_chunks,
        sources.remote_tcp_chunks + sources.remote_rdma_chunks,
        sources.origin_chunks,
    ]
}

fn bytes(sources: &Sources) -> [u64; 3] {
    [
        sources.local_bytes,
        sources.remote_tcp_bytes + sources.remote_rdma_bytes,
        sources.origin_bytes,
    ]
}

/// Sums over all passes as the mean of one. What is not nothing does not become it.
fn a_pass<const N: usize>(sums: [u64; N], passes: usize, shown: impl Fn(u64) -> String) -> String {
    let passes = passes.max(1) as u64;
    sums.map(|sum| match sum {
        0 => "0".to_owned(),
        _ if sum < passes => "< 1".to_owned(),
        _ => shown(sum / passes),
    })
    .join(", ")
}

/// How many times as fast, of a ratio of times.
fn inverse(ratio: Interval) -> Interval {
    Interval {
        median: 1.0 / ratio.median,
        low: 1.0 / ratio.high,
        high: 1.0 / ratio.low,
    }
}

/// The mode of a key such as `stoa-packed, prefault`.
fn mode_of(key: &str) -> &str {
    key.split(',').next().unwrap_or(key)
}

/// What a mode's tables take, which is measured with the hot times: in another document, perhaps.
fn memory(documents: &[&Document], mode: &str) -> String {
    let mut found = documents.iter().rev();
    let found = found.find_map(|document| document.summary.get(mode));
    found.map_or_else(String::new, |found| megabytes(found.bytes))
}

fn head<S: AsRef<str>>(columns: &[S]) -> String {
    let mut text = String::new();
    let names: Vec<String> = columns
        .iter()
        .map(|name| name.as_ref().to_owned())
        .collect();
    line(&mut text, &names);
    // Figures to the right, names to the left.
    let rule = names.iter().enumerate();
    let rule: Vec<String> = rule
        .map(|(i, _)| if i == 0 { "---" } else { "---:" }.to_owned())
        .collect();
    let _ = writeln!(text, "|{}|", rule.join("|"));
    text
}

fn line(text: &mut String, cells: &[String]) {
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn megabytes(bytes: u64) -> String {
    let digits = (bytes / 1_000_000).to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn interval(found: Option<Interval>) -> String {
    found.map_or_else(String::new, |found| {
        ratio(Some(found.median), Some([found.low, found.high]))
    })
}

fn ratio(median: Option<f64>, interval: Option<[f64; 2]>) -> String {
    median.map_or_else(String::new, |median| {
        format!("{median:.2}{}", bounds(interval))
    })
}

fn bounds(interval: Option<[f64; 2]>) -> String {
    interval.map_or_else(String::new, |[low, high]| format!(" [{low:.2}, {high:.2}]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{Processes, QueryFigures, Summary};
    use crate::times::{Block, Times};

    fn document() -> Document {
        let figures = QueryFigures {
            median_ms: 12.345,
            vs_best: Some(Interval {
                median: 0.5,
                low: 0.4,
                high: 0.6,
            }),
            ..QueryFigures::default()
        };
        let summary = Summary {
            bytes: 1_783_000_000,
            bytes_vs_parquet: 4.98,
            geomean_ms: 12.345,
            geomean_vs_memtable: Some(0.915),
            geomean_vs_memtable_interval: Some([0.884, 0.97]),
            ..Summary::default()
        };
        Document {
            suite: "tpch".into(),
            scale: 1.0,
            modes: vec!["stoa-arrow".into()],
            summary: BTreeMap::from([("stoa-arrow".into(), summary)]),
            queries: BTreeMap::from([(6, BTreeMap::from([("stoa-arrow".into(), figures)]))]),
            ..Document::default()
        }
    }

    #[test]
    fn tables_have_memory_beside_time() {
        let text = report(&document());
        assert!(text.starts_with("## TPC-H, scale 1\n"), "{text}");
        let expected = "| stoa-arrow | 1,783 | 4.98 | 0.92 [0.88, 0.97] |  |  |  |\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("| q6 | 12.3 (0.50) |\n"), "{text}");
        assert!(text.contains("| memory MB | 1,783 |\n"), "{text}");
        assert!(
            !text.contains("prefault"),
            "nothing was measured of it: {text}"
        );
    }

    #[test]
    fn memory_of_one_run_stands_beside_what_another_measured() {
        use crate::document::Cold;
        let cold = Document {
            cold: BTreeMap::from([("stoa-arrow".into(), Cold::default())]),
            summary: BTreeMap::new(),
            ..document()
        };
        let text = Section::Cold.markdown(&[&document(), &cold]);
        assert!(text.contains("| stoa-arrow | 1,783 |"), "{text}");
    }

    #[test]
    fn other_engines_stand_beside_ours_and_not_in_its_place() {
        let of = |mode: &str, geomean_ms| {
            let summary = Summary {
                bytes: 100_000_000,
                geomean_ms,
                geomean_vs_parquet: Some(0.25),
                ..Summary::default()
            };
            (mode.to_owned(), summary)
        };
        let other = Document {
            engine: Some("DuckDB 2".into()),
            modes: vec!["tables".into()],
            summary: BTreeMap::from([of("tables", 9.0)]),
            ..document()
        };
        let (own, found) = (document(), [&document(), &other]);
        let peers = Section::Peers.markdown(&found);
        let expected = "| DuckDB 2 | tables | 100 | 0.00 | 9.0 | 0.25 |\n";
        assert!(peers.ends_with(expected), "{peers}");
        assert!(peers.contains("| DataFusion | stoa-arrow |"), "{peers}");
        assert_eq!(
            Section::Modes.markdown(&found),
            Section::Modes.markdown(&[&own])
        );
        assert_eq!(Section::Peers.markdown(&[&own]), "");
    }

    #[test]
    fn what_was_measured_on_both_kinds_of_pages_stands_together() {
        let of = |pages: &str, nanos| Document {
            suite: "lookup".into(),
            scale: 1.0,
            lookup: BTreeMap::from([(pages.to_owned(), BTreeMap::from([("index".into(), nanos)]))]),
            ..Document::default()
        };
        let (small, huge) = (of("4 KiB", 146.4), of("huge", 142.0));
        let marked = "<!-- stoa-bench lookup-1 lookup -->\n<!-- stoa-bench end -->";
        let text = replace(marked, &[small, huge]).unwrap();
        assert!(text.contains("| 4 KiB pages | huge pages |\n"), "{text}");
        assert!(text.contains("| index | 146 | 142 |\n"), "{text}");
    }

    #[test]
    fn markers_are_filled_and_those_of_other_data_stay() {
        let text = "a\n<!-- stoa-bench tpch-1 modes -->\nold\n<!-- stoa-bench end -->\nb\n\
                    <!-- stoa-bench tpch-10 modes -->\nkept\n<!-- stoa-bench end -->\nc";
        let found = replace(text, &[document()]).unwrap();
        assert!(
            found.starts_with("a\n<!-- stoa-bench tpch-1 modes -->\n| mode |"),
            "{found}"
        );
        assert!(!found.contains("old"), "{found}");
        let kept = "<!-- stoa-bench tpch-10 modes -->\nkept\n<!-- stoa-bench end -->\nc";
        assert!(found.ends_with(kept), "{found}");
        assert_eq!(replace(&found, &[document()]).unwrap(), found);
    }

    #[test]
    fn a_wrong_marker_is_named() {
        let wrong = "<!-- stoa-bench tpch-1 speed -->\n<!-- stoa-bench end -->";
        let error = replace(wrong, &[]).unwrap_err();
        assert!(
            error.contains("no table `speed`; expected one of modes"),
            "{error}"
        );
        let error = replace("<!-- stoa-bench tpch-1 modes -->", &[]).unwrap_err();
        assert!(
            error.contains("behind the marker `tpch-1 modes`"),
            "{error}"
        );
    }

    #[test]
    fn one_copy_is_shown_beside_what_the_processes_hold() {
        let mut document = document();
        let processes = Processes {
            pss_bytes: 3_000_000_000,
            pss_shared_bytes: 1_800_000_000,
            cache_bytes: 1_783_000_000,
            ..Processes::of(4, 2, &[(1.0, 2.0)])
        };
        document.processes.insert("stoa-arrow".into(), processes);
        let text = Section::Processes.markdown(&[&document]);
        let expected = "| 1.00 [1.00, 1.00] | 1,800 (1,783) | 1,200 |\n";
        assert!(text.ends_with(expected), "{text}");
    }
    /// Two queries in two passes: five and ten times as fast with remote hits, twice that with local.
    fn with_remote(origin_chunks: u64) -> Document {
        let mut block = Block::default();
        for (query, factor) in [(1, 5.0), (2, 10.0)] {
            for slow in [1.0, 3.0] {
                block.push("parquet", query, 100.0 * slow);
                block.push("stoa-auto", query, 100.0 * slow / factor);
                block.push("stoa-auto, local", query, 50.0 * slow / factor);
            }
        }
        let of_parquet = Sources {
            origin_requests: 80,
            origin_bytes: 4_000_000,
            ..Sources::default()
        };
        let remote = Sources {
            remote_tcp_chunks: 60,
            remote_tcp_bytes: 8_000_000,
            origin_chunks,
            ..Sources::default()
        };
        let local = Sources {
            local_chunks: 60,
            local_bytes: 8_000_000,
            ..Sources::default()
        };
        let sources = [
            ("parquet", of_parquet),
            ("stoa-auto", remote),
            ("stoa-auto, local", local),
        ];
        let mut document = document();
        document.summarize_remote(
            20,
            &Times {
                blocks: vec![block],
            },
            &sources.map(|(name, of)| (name.to_owned(), of)).into(),
            &BTreeMap::from([("stoa-auto".to_owned(), 9_000_000)]),
        );
        document
    }

    #[test]
    fn remote_hits_are_shown_with_their_sources() {
        let text = Section::Remote.markdown(&[&with_remote(0)]);
        let expected = "| parquet |  | 200.0 |  |  |  |  | 0, 0, 2 | 40 |\n\
                        | stoa-auto | 9 | 28.3 | 7.07 [7.07, 7.07] | 5.00 [5.00, 5.00] (q1) | \
                        2.00 [2.00, 2.00] | 0, 30, 0 | 0, 4, 0 | 0 |\n\
                        | stoa-auto, local | 9 | 14.1 | 14.14 [14.14, 14.14] | \
                        10.00 [10.00, 10.00] (q1) |  | 30, 0, 0 | 4, 0, 0 | 0 |\n";
        assert!(text.contains(expected), "{text}");
        let expected = "comes 20 ms late. In the measured passes it gave no chunk to Stoa.";
        assert!(text.contains(expected), "{text}");
        assert!(
            text.contains("| q1 | 200.0 | 40.0 (5.0×) | 20.0 (10.0×) |\n"),
            "{text}"
        );
    }

    #[test]
    fn chunks_from_the_origin_are_said() {
        let text = Section::Remote.markdown(&[&with_remote(1)]);
        let expected =
            "**Not all were hits**: in the measured passes it gave chunks to stoa-auto (1).";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("| 0, 30, < 1 |"), "{text}");
    }
}
