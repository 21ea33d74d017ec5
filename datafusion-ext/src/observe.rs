//! What a process's reads were served from, as metrics.

use stoa_control::Metric;
use stoa_reader::Reader;

/// Chunks and bytes that this process has read, by where they came from, for a registry of the
/// process's own:
///
/// ```
/// # use stoa_datafusion::{Origin, reader_metrics};
/// # use stoa_reader::Reader;
/// let reader = Reader::open("/dev/shm/stoa-1000".as_ref(), Origin::default());
/// let metrics = stoa_control::MetricsRegistry::new("engine");
/// metrics.observe(move || reader_metrics(&reader));
/// assert!(metrics.prometheus_text().contains("stoa_read_chunks_total{source=\"memory\"} 0"));
/// ```
pub fn reader_metrics(reader: &Reader) -> Vec<Metric> {
    let counts = reader.statistics().counts();
    let chunks = [
        ("memory", counts.hits),
        ("remote_tcp", counts.remote_tcp),
        ("remote_rdma", counts.remote_rdma),
        ("origin", counts.misses),
    ];
    let bytes = [
        ("memory", counts.hit_bytes),
        ("remote_tcp", counts.remote_tcp_bytes),
        ("remote_rdma", counts.remote_rdma_bytes),
        ("origin", reader.origin().counters().bytes),
    ];
    let by_source = |metric: Metric, counts: [(&str, u64); 4]| {
        counts.into_iter().fold(metric, |metric, (source, count)| {
            metric.sample(&[("source", source)], count)
        })
    };
    let failures = reader.statistics().remote_misses().fold(
        Metric::counter(
            "read_remote_failures",
            "Chunks that neighbours were asked for and that did not come, by why",
        ),
        |metric, (miss, count)| metric.sample(&[("reason", miss.as_str())], count),
    );
    vec![
        by_source(
            Metric::counter("read_chunks", "Chunks that scans read, by where from"),
            chunks,
        ),
        by_source(
            Metric::counter(
                "read",
                "Bytes of the chunks that scans read, by where from; of the origin all bytes",
            )
            .bytes(),
            bytes,
        ),
        failures,
    ]
}
