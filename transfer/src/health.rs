//! When a path is left alone, and for how long: a pure decider.

use std::time::{Duration, Instant};

/// How long failing paths are left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backoff {
    /// After the first failure.
    pub(crate) least: Duration,
    /// At most; doubled after each failure up to here.
    pub(crate) most: Duration,
}

/// Failures in a row of one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    failures: u32,
    left_until: Option<Instant>,
}

impl Health {
    /// The path could not be used: leaves it alone, longer each time.
    pub(crate) fn failed(&mut self, now: Instant, backoff: Backoff) {
        let factor = 1_u32 << self.failures.min(16);
        let pause = backoff.least.saturating_mul(factor).min(backoff.most);
        self.failures = self.failures.saturating_add(1);
        self.left_until = Some(now + pause);
    }

    /// The path was of use.
    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// For how long the path is still left alone.
    pub(crate) fn left_for(&self, now: Instant) -> Option<Duration> {
        let left = self.left_until?.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit_and_end_with_a_success() {
        let backoff = Backoff {
            least: Duration::from_millis(100),
            most: Duration::from_secs(1),
        };
        let now = Instant::now();
        let mut health = Health::default();
        assert_eq!(health.left_for(now), None);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            health.failed(now, backoff);
            pauses.push(health.left_for(now).unwrap().as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(health.left_for(now + Duration::from_secs(1)), None);
        health.succeeded();
        health.failed(now, backoff);
        assert_eq!(health.left_for(now).unwrap().as_millis(), 100);
    }
}
