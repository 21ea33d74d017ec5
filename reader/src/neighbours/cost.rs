//! What a path costs, learnt from what it took.

use std::time::Duration;

/// How much of what was known before an observation is left after it.
const MEMORY: f64 = 0.9;

/// The time that a request for so many bytes takes, as a line through what was observed:
/// `latency + bytes / bandwidth`. Older observations fade, so that the line follows the path.
///
/// No clock in it: durations arrive as arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CostEstimate {
    weight: f64,
    bytes: f64,
    seconds: f64,
    bytes_bytes: f64,
    bytes_seconds: f64,
}

/// The line of a [`CostEstimate`].
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    latency_seconds: f64,
    seconds_per_byte: f64,
}

impl CostEstimate {
    /// Takes in that a request for `bytes` took `elapsed`.
    pub fn observe(&mut self, bytes: u64, elapsed: Duration) {
        let (bytes, seconds) = (bytes as f64, elapsed.as_secs_f64());
        let faded = |sum: f64, now: f64| sum * MEMORY + now;
        *self = Self {
            weight: faded(self.weight, 1.0),
            bytes: faded(self.bytes, bytes),
            seconds: faded(self.seconds, seconds),
            bytes_bytes: faded(self.bytes_bytes, bytes * bytes),
            bytes_seconds: faded(self.bytes_seconds, bytes * seconds),
        };
    }

    /// How long a request for `bytes` is expected to take; `None` before the first observation.
    pub fn expected(&self, bytes: u64) -> Option<Duration> {
        let line = self.line()?;
        let seconds = line.latency_seconds + line.seconds_per_byte * bytes as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }

    fn line(&self) -> Option<Line> {
        if self.weight == 0.0 {
            return None;
        }
        let (bytes, seconds) = (self.bytes / self.weight, self.seconds / self.weight);
        let spread = self.bytes_bytes / self.weight - bytes * bytes;
        let together = self.bytes_seconds / self.weight - bytes * seconds;
        // Neither a negative latency nor a negative time a byte means anything.
        let steepest = if bytes > 0.0 { seconds / bytes } else { 0.0 };
        let seconds_per_byte = if spread > bytes * bytes * 1e-6 {
            (together / spread).clamp(0.0, steepest)
        } else {
            // Requests of one size do not tell latency from bandwidth: half of it is each.
            steepest / 2.0
        };
        Some(Line {
            latency_seconds: seconds - seconds_per_byte * bytes,
            seconds_per_byte,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 ms and 100 MB/s.
    fn takes(bytes: u64) -> Duration {
        Duration::from_millis(10) + Duration::from_secs_f64(bytes as f64 / 1e8)
    }

    fn close(found: Option<Duration>, expected: Duration) -> bool {
        let found = found.unwrap().as_secs_f64();
        (found / expected.as_secs_f64() - 1.0).abs() < 0.01
    }

    #[test]
    fn nothing_is_expected_before_the_first_observation() {
        assert_eq!(CostEstimate::default().expected(1), None);
    }

    #[test]
    fn latency_and_bandwidth_are_told_apart() {
        let mut cost = CostEstimate::default();
        for bytes in [1_000, 5_000_000, 20_000, 700_000] {
            cost.observe(bytes, takes(bytes));
        }
        assert!(close(cost.expected(0), takes(0)));
        assert!(close(cost.expected(50_000_000), takes(50_000_000)));
    }

    #[test]
    fn requests_of_one_size_say_what_that_size_takes() {
        let mut cost = CostEstimate::default();
        for _ in 0..3 {
            cost.observe(1 << 20, Duration::from_millis(20));
        }
        assert!(close(cost.expected(1 << 20), Duration::from_millis(20)));
        assert!(close(cost.expected(2 << 20), Duration::from_millis(30)));
    }

    #[test]
    fn a_path_that_slows_down_is_expected_to_be_slow_soon() {
        let mut cost = CostEstimate::default();
        for _ in 0..100 {
            cost.observe(1000, Duration::from_millis(1));
        }
        for _ in 0..10 {
            cost.observe(1000, Duration::from_millis(100));
        }
        assert!(cost.expected(1000).unwrap() > Duration::from_millis(60));
    }

    #[test]
    fn larger_requests_that_took_less_do_not_make_time_negative() {
        let mut cost = CostEstimate::default();
        cost.observe(1_000_000, Duration::from_millis(1));
        cost.observe(10, Duration::from_millis(50));
        assert!(cost.expected(100_000_000).unwrap() >= Duration::from_millis(1));
    }
}
