//! Metrics by Prometheus' conventions, and their text.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

/// Every name starts with it.
const PREFIX: &str = "stoa";

/// Whether a value only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows while the process lives; its name gets `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// One metric with its samples, made anew at each scrape.
///
/// The name is written without the prefix `stoa_`, the unit and `_total`, which are added:
///
/// ```
/// use stoa_control::{Metric, MetricsRegistry};
/// let metrics = MetricsRegistry::new("worker");
/// metrics.observe(|| vec![
///     Metric::counter("origin_read", "Bytes read from object stores").bytes().value(42),
///     Metric::gauge("queue_length", "Waiting requests").sample(&[("queue", "fill")], 3),
/// ]);
/// let text = metrics.prometheus_text();
/// assert!(text.contains("stoa_origin_read_bytes_total 42"));
/// assert!(text.contains("stoa_queue_length{queue=\"fill\"} 3"));
/// ```
#[derive(Clone, Debug)]
pub struct Metric {
    name: String,
    help: String,
    kind: MetricKind,
    unit: Option<Unit>,
    samples: Vec<(Vec<(String, String)>, f64)>,
}

impl Metric {
    /// A value that only grows.
    pub fn counter(name: &str, help: &str) -> Metric {
        Metric::new(name, help, MetricKind::Counter)
    }

    /// A value that goes up and down.
    pub fn gauge(name: &str, help: &str) -> Metric {
        Metric::new(name, help, MetricKind::Gauge)
    }

    fn new(name: &str, help: &str, kind: MetricKind) -> Metric {
        debug_assert!(
            is_plain_name(name),
            "metric name `{name}`: snake_case, no stoa_, no _total"
        );
        Metric {
            name: name.to_owned(),
            help: help.to_owned(),
            kind,
            unit: None,
            samples: vec![],
        }
    }

    /// Counts bytes.
    pub fn bytes(mut self) -> Metric {
        self.unit = Some(Unit::Bytes);
        self
    }

    /// Counts seconds.
    pub fn seconds(mut self) -> Metric {
        self.unit = Some(Unit::Seconds);
        self
    }

    /// Its value, without labels.
    pub fn value(self, value: impl Value) -> Metric {
        self.sample(&[], value)
    }

    /// Its value for these labels.
    pub fn sample(mut self, labels: &[(&str, &str)], value: impl Value) -> Metric {
        let labels = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        self.samples.push((labels, value.number()));
        self
    }
}

/// Numbers that a metric takes. Integers above 2^53 lose their last digits, as in Prometheus itself.
pub trait Value {
    /// As Prometheus stores it.
    fn number(self) -> f64;
}

impl Value for f64 {
    fn number(self) -> f64 {
        self
    }
}

impl Value for u64 {
    fn number(self) -> f64 {
        self as f64
    }
}

impl Value for u32 {
    fn number(self) -> f64 {
        f64::from(self)
    }
}

impl Value for usize {
    fn number(self) -> f64 {
        self as f64
    }
}

impl Value for i32 {
    fn number(self) -> f64 {
        f64::from(self)
    }
}

impl Value for bool {
    fn number(self) -> f64 {
        if self { 1.0 } else { 0.0 }
    }
}

fn is_plain_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && !name.starts_with("stoa_")
        && !["_total", "_bytes", "_seconds", "_"]
            .iter()
            .any(|end| name.ends_with(end))
}

type Observer = Box<dyn Fn() -> Vec<Metric> + Send + Sync>;

struct Observed(Observer);

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observed")
    }
}

impl Collector for Observed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in (self.0)() {
            let kind = match metric.kind {
                MetricKind::Counter => MetricType::Counter,
                MetricKind::Gauge => MetricType::Gauge,
            };
            let unit = metric.unit.as_ref();
            let mut family = encoder.encode_descriptor(&metric.name, &metric.help, unit, kind)?;
            for (labels, value) in &metric.samples {
                // Through `encode_family`, no labels would come out as `{}`.
                if labels.is_empty() {
                    encode_value(&mut family, metric.kind, *value)?;
                } else {
                    encode_value(&mut family.encode_family(labels)?, metric.kind, *value)?;
                }
            }
        }
        Ok(())
    }
}

fn encode_value(encoder: &mut MetricEncoder<'_>, kind: MetricKind, value: f64) -> fmt::Result {
    match kind {
        MetricKind::Counter => encoder.encode_counter::<NoLabelSet, f64, f64>(&value, None),
        MetricKind::Gauge => encoder.encode_gauge(&value),
    }
}

/// What `/metrics` shows. Cheap to clone, shared.
#[derive(Clone, Debug)]
pub struct MetricsRegistry {
    registry: Arc<Mutex<Registry>>,
}

impl MetricsRegistry {
    /// A registry with `stoa_build_info` and `stoa_process_start_time_seconds`.
    ///
    /// `role` is worker, coordinator or embedded.
    pub fn new(role: &str) -> MetricsRegistry {
        let metrics = MetricsRegistry {
            registry: Arc::new(Mutex::new(Registry::with_prefix(PREFIX))),
        };
        let role = role.to_owned();
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        metrics.observe(move || {
            vec![
                Metric::gauge("build_info", "Which program this is; always 1").sample(
                    &[("role", &role), ("version", env!("CARGO_PKG_VERSION"))],
                    true,
                ),
                Metric::gauge("process_start_time", "When the process started, since 1970")
                    .seconds()
                    .value(started),
            ]
        });
        metrics
    }

    /// Asks `observer` at every scrape. It must be quick and must not block.
    ///
    /// A name must come from one observer only: its samples have to stand together.
    pub fn observe(&self, observer: impl Fn() -> Vec<Metric> + Send + Sync + 'static) {
        self.register(|registry| {
            registry.register_collector(Box::new(Observed(Box::new(observer))))
        });
    }

    /// Registers metrics of `prometheus_client` itself, such as histograms.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Everything as OpenMetrics 1.0 text.
    pub fn openmetrics_text(&self) -> String {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        prometheus_client::encoding::text::encode(&mut text, &registry)
            .expect("writing to a string cannot fail");
        text
    }

    /// Everything as Prometheus text, version 0.0.4.
    pub fn prometheus_text(&self) -> String {
        prometheus_from_openmetrics(&self.openmetrics_text())
    }
}

/// In the older format a counter is described under the name of its samples, an info is a gauge,
/// and there are neither units nor an end mark.
fn prometheus_from_openmetrics(text: &str) -> String {
    let mut older = String::with_capacity(text.len());
    let mut help: Option<(&str, &str)> = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = Some(rest.split_once(' ').unwrap_or((rest, "")));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, "unknown"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((of, words)) = help.take()
                && of == name
            {
                older.push_str(&format!("# HELP {name}{suffix} {words}\n"));
            }
            older.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with("# UNIT ") && line != "# EOF" {
            older.push_str(line);
            older.push('\n');
        }
    }
    older
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> MetricsRegistry {
        let metrics = MetricsRegistry::new("worker");
        metrics.observe(|| {
            vec![
                Metric::counter("origin_requests", "Requests sent to object stores")
                    .sample(&[("kind", "get")], 12u64)
                    .sample(&[("kind", "head")], 3u64),
                Metric::counter("origin_read", "Bytes read from object stores")
                    .bytes()
                    .value(1u64 << 40),
                Metric::gauge("table_held", "Bytes of a table in shared memory")
                    .bytes()
                    .sample(&[("table", "odd\"\\\n.name")], 5u64),
            ]
        });
        metrics
    }

    #[test]
    fn names_end_in_units_and_counters_in_total() {
        let text = registry().prometheus_text();
        for line in [
            "# HELP stoa_origin_requests_total Requests sent to object stores",
            "# TYPE stoa_origin_requests_total counter",
            "stoa_origin_requests_total{kind=\"get\"} 12.0",
            "stoa_origin_requests_total{kind=\"head\"} 3.0",
            "# TYPE stoa_origin_read_bytes_total counter",
            "stoa_origin_read_bytes_total 1099511627776.0",
            "# TYPE stoa_table_held_bytes gauge",
            "stoa_table_held_bytes{table=\"odd\\\"\\\\\\n.name\"} 5.0",
            "# TYPE stoa_build_info gauge",
            "# TYPE stoa_process_start_time_seconds gauge",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(
            !text.contains("# EOF") && !text.contains("# UNIT"),
            "{text}"
        );
    }

    #[test]
    fn openmetrics_has_units_and_an_end() {
        let text = registry().openmetrics_text();
        assert!(
            text.contains(
                "# TYPE stoa_origin_read_bytes counter\n# UNIT stoa_origin_read_bytes bytes\n"
            ),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn every_described_name_has_its_samples_right_below() {
        let text = registry().prometheus_text();
        let mut described = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                described = rest.split(' ').next().unwrap().to_owned();
            } else if !line.starts_with('#') {
                assert!(
                    line.starts_with(&described),
                    "{line} stands below {described}"
                );
            }
        }
    }

    #[test]
    fn only_plain_names_are_taken() {
        for good in ["a", "origin_requests", "chunks2"] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in [
            "",
            "A",
            "2a",
            "stoa_a",
            "a_total",
            "held_bytes",
            "a-b",
            "a_",
        ] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }
}
