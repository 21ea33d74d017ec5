//! What was seen of a path: counts, and estimates to decide by.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{ErrorKind, TransferError};
use crate::transport::TransportKind;

/// Weight of a new observation against all before it.
const EWMA_WEIGHT: f64 = 0.2;
/// Bytes behind the first arrival from which on their rate is worth an observation.
const RATE_BYTES_MIN: u64 = 256 << 10;
/// Shorter than this is the clock rather than the network.
const RATE_TIME_MIN: Duration = Duration::from_micros(20);

/// A path and what was seen of it.
#[derive(Clone, Debug, PartialEq)]
pub struct PathStatistics {
    /// The peer's name.
    pub peer: String,
    /// Its address on this path.
    pub address: String,
    /// How it is reached.
    pub transport: TransportKind,
    /// Open connections.
    pub connections: usize,
    /// Reads that came over it.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Calls that were answered.
    pub calls: u64,
    /// What failed, by kind.
    pub errors: BTreeMap<ErrorKind, u64>,
    /// The last failure's text.
    pub last_error: Option<String>,
    /// Estimated time from asking to the first bytes.
    pub latency: Option<Duration>,
    /// Estimated rate once bytes flow.
    pub bytes_per_second: Option<f64>,
    /// For how long the path is still left alone after failures.
    pub left_for: Option<Duration>,
}

impl PathStatistics {
    /// How long a read of `bytes` should take, once there is anything to say it by.
    pub fn expected(&self, bytes: u64) -> Option<Duration> {
        expected(self.latency, self.bytes_per_second, bytes)
    }
}

fn expected(latency: Option<Duration>, rate: Option<f64>, bytes: u64) -> Option<Duration> {
    let flow = match rate {
        Some(rate) => Duration::try_from_secs_f64(bytes as f64 / rate.max(1.0)).ok()?,
        None => Duration::ZERO,
    };
    Some(latency? + flow)
}

/// When the bytes of one submission came.
#[derive(Clone, Debug)]
pub(crate) struct Observation {
    started: Instant,
    first: Option<(Instant, u64)>,
    last: Instant,
    bytes: u64,
}

impl Observation {
    pub(crate) fn started_at(now: Instant) -> Self {
        Self {
            started: now,
            first: None,
            last: now,
            bytes: 0,
        }
    }

    pub(crate) fn arrived(&mut self, now: Instant, bytes: u64) {
        self.first.get_or_insert((now, bytes));
        self.last = now;
        self.bytes += bytes;
    }
}

/// Reads, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReadCount {
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, Default)]
struct Record {
    reads: u64,
    bytes: u64,
    /// Reads that the path's links handed to the transport below theirs.
    handed_down: BTreeMap<TransportKind, ReadCount>,
    calls: u64,
    errors: BTreeMap<ErrorKind, u64>,
    last_error: Option<String>,
    latency_seconds: Option<f64>,
    rate: Option<f64>,
}

/// Collects what is seen of one path. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder {
    record: Arc<Mutex<Record>>,
}

fn average(before: Option<f64>, now: f64) -> f64 {
    before.map_or(now, |before| before + EWMA_WEIGHT * (now - before))
}

impl Record {
    /// Takes the first arrival for latency (less what its bytes take at the known rate) and what
    /// came behind it for the rate. A single large read has only the first: its whole time less
    /// the known latency is its rate.
    fn observe(&mut self, seen: &Observation) {
        let Some((first, first_bytes)) = seen.first else {
            return;
        };
        let until_first = (first - seen.started).as_secs_f64();
        let flowed = seen.bytes - first_bytes;
        let flow_time = seen.last - first;
        if flowed >= RATE_BYTES_MIN && flow_time >= RATE_TIME_MIN {
            self.rate = Some(average(self.rate, flowed as f64 / flow_time.as_secs_f64()));
        } else if first_bytes >= RATE_BYTES_MIN {
            let known = self.latency_seconds.unwrap_or(0.0).min(until_first / 2.0);
            let time = (until_first - known).max(RATE_TIME_MIN.as_secs_f64());
            self.rate = Some(average(self.rate, first_bytes as f64 / time));
        }
        let carried = self.rate.map_or(0.0, |rate| first_bytes as f64 / rate);
        self.latency_seconds = Some(average(
            self.latency_seconds,
            (until_first - carried).max(until_first / 100.0),
        ));
    }
}

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read(&self, bytes: u64) {
        let mut record = self.lock();
        record.reads += 1;
        record.bytes += bytes;
    }

    /// Counts a read that a link of the path handed to the transport below its own.
    pub(crate) fn handed_down(&self, transport: TransportKind, bytes: u64) {
        let mut record = self.lock();
        let count = record.handed_down.entry(transport).or_default();
        count.reads += 1;
        count.bytes += bytes;
    }

    /// The reads that were handed down, by the transport that they came over.
    pub(crate) fn reads_handed_down(&self) -> BTreeMap<TransportKind, ReadCount> {
        self.lock().handed_down.clone()
    }

    pub(crate) fn failed(&self, error: &TransferError) {
        let mut record = self.lock();
        *record.errors.entry(error.kind()).or_default() += 1;
        record.last_error = Some(error.to_string());
    }

    pub(crate) fn called(&self, error: Option<&TransferError>) {
        match error {
            Some(error) => self.failed(error),
            None => self.lock().calls += 1,
        }
    }

    pub(crate) fn observed(&self, seen: &Observation) {
        self.lock().observe(seen);
    }

    /// How long a read of `bytes` should take.
    pub(crate) fn expected(&self, bytes: u64) -> Option<Duration> {
        let record = self.lock();
        expected(latency(&record), record.rate, bytes)
    }

    pub(crate) fn snapshot(
        &self,
        peer: &str,
        address: &str,
        transport: TransportKind,
    ) -> PathStatistics {
        let record = self.lock();
        PathStatistics {
            peer: peer.to_string(),
            address: address.to_string(),
            transport,
            connections: 0,
            reads: record.reads,
            bytes: record.bytes,
            calls: record.calls,
            errors: record.errors.clone(),
            last_error: record.last_error.clone(),
            latency: latency(&record),
            bytes_per_second: record.rate,
            left_for: None,
        }
    }
}

fn latency(record: &Record) -> Option<Duration> {
    Duration::try_from_secs_f64(record.latency_seconds?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path of 10 ms and 100 MB/s is recognised from batches of small reads, of large ones, and
    /// from single reads of both sizes.
    #[test]
    fn latency_and_rate_are_told_apart() {
        let (latency, rate) = (0.010, 100e6);
        let recorder = Recorder::default();
        let start = Instant::now();
        for round in 0..100_u32 {
            let sizes: &[u64] = match round % 4 {
                0 => &[4096; 100],
                1 => &[1 << 20; 8],
                2 => &[4096],
                _ => &[4 << 20],
            };
            let mut seen = Observation::started_at(start);
            let mut bytes = 0;
            for size in sizes {
                bytes += size;
                let at = latency + bytes as f64 / rate;
                seen.arrived(start + Duration::from_secs_f64(at), *size);
            }
            recorder.observed(&seen);
        }
        for bytes in [4096, 1 << 20, 64 << 20] {
            let truth = latency + bytes as f64 / rate;
            let found = recorder.expected(bytes).unwrap().as_secs_f64();
            assert!(
                (found / truth - 1.0).abs() < 0.25,
                "{bytes}: {found} against {truth}"
            );
        }
    }

    #[test]
    fn nothing_is_expected_of_a_path_that_was_never_seen() {
        assert_eq!(Recorder::default().expected(1), None);
        let recorder = Recorder::default();
        recorder.observed(&Observation::started_at(Instant::now()));
        assert_eq!(recorder.expected(1), None);
    }
}
