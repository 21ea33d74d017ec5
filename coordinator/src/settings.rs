//! Plain settings, and the clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::plan::Balancer;

/// How to coordinate. Plain data; [`CoordinatorSettings::check`] says what cannot work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoordinatorSettings {
    /// Names this candidate in the election; host and process, for example.
    pub candidate: String,
    /// How long the office stays with a coordinator that says nothing.
    pub election_ttl_ms: u64,
    /// How long a worker that is gone keeps its share.
    pub grace_ms: u64,
    /// How long to wait after a worker joined, for others that join at the same time.
    pub settle_ms: u64,
    /// Whether to give every worker the same number of row groups, instead of bytes by capacity.
    pub absolute_balancer: bool,
    /// How many times its share a worker may get, at least 1.
    pub load_max: f64,
    /// The part of each capacity that plans leave free, from 0 to below 1: catalogs, alignment,
    /// and sizes that are only estimated.
    pub reserve_ratio: f64,
    /// The first pause after a table could not be loaded; it doubles up to `retry_ms_max`.
    pub retry_ms_min: u64,
    /// The longest such pause.
    pub retry_ms_max: u64,
}

impl Default for CoordinatorSettings {
    fn default() -> CoordinatorSettings {
        CoordinatorSettings {
            candidate: format!("coordinator-{}", std::process::id()),
            election_ttl_ms: 15_000,
            grace_ms: 60_000,
            settle_ms: 1_000,
            absolute_balancer: false,
            load_max: Balancer::DEFAULT_LOAD,
            reserve_ratio: 0.02,
            retry_ms_min: 1_000,
            retry_ms_max: 60_000,
        }
    }
}

impl CoordinatorSettings {
    /// [`Error::Settings`] for what cannot work.
    pub fn check(&self) -> Result<()> {
        let wrong = |key, value: String, reason| Err(Error::Settings { key, value, reason });
        if self.candidate.is_empty() {
            return wrong(
                "candidate",
                "\"\"".into(),
                "expected a name that is not empty",
            );
        }
        if self.election_ttl_ms == 0 {
            return wrong("election_ttl_ms", "0".into(), "expected at least 1");
        }
        if !(self.load_max.is_finite() && self.load_max >= 1.0) {
            return wrong(
                "load_max",
                self.load_max.to_string(),
                "expected 1.0 or more, such as 1.25",
            );
        }
        if !(0.0..1.0).contains(&self.reserve_ratio) {
            return wrong(
                "reserve_ratio",
                self.reserve_ratio.to_string(),
                "expected 0.0 or more, and below 1.0",
            );
        }
        if self.retry_ms_min == 0 || self.retry_ms_min > self.retry_ms_max {
            return wrong(
                "retry_ms_min",
                self.retry_ms_min.to_string(),
                "expected at least 1 and at most retry_ms_max",
            );
        }
        Ok(())
    }

    pub(crate) fn balancer(&self) -> Balancer {
        if self.absolute_balancer {
            Balancer::Absolute
        } else {
            Balancer::Bounded {
                load: self.load_max,
            }
        }
    }

    pub(crate) fn election_ttl(&self) -> Duration {
        Duration::from_millis(self.election_ttl_ms)
    }
}

/// Where time comes from.
pub trait Clock: Send + Sync + std::fmt::Debug + 'static {
    /// Milliseconds since 1970, for records that people read.
    fn unix_ms(&self) -> u64;
    /// Milliseconds since some moment, never going back, for periods: a wall clock that jumps must
    /// not end a worker's grace.
    fn monotonic_ms(&self) -> u64;
}

/// The system's clocks.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose periods count from now.
    pub fn new() -> SystemClock {
        SystemClock {
            start: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    fn unix_ms(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis() as u64
    }

    fn monotonic_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_said_with_key_and_value() {
        CoordinatorSettings::default().check().unwrap();
        let message = |change: fn(&mut CoordinatorSettings)| {
            let mut settings = CoordinatorSettings::default();
            change(&mut settings);
            settings.check().unwrap_err().to_string()
        };
        assert_eq!(
            message(|s| s.load_max = 0.9),
            "setting load_max = 0.9: expected 1.0 or more, such as 1.25"
        );
        assert_eq!(
            message(|s| s.load_max = f64::NAN),
            "setting load_max = NaN: expected 1.0 or more, such as 1.25"
        );
        assert_eq!(
            message(|s| s.reserve_ratio = 1.0),
            "setting reserve_ratio = 1: expected 0.0 or more, and below 1.0"
        );
        assert_eq!(
            message(|s| s.retry_ms_min = 0),
            "setting retry_ms_min = 0: expected at least 1 and at most retry_ms_max"
        );
        assert!(message(|s| s.candidate.clear()).contains("candidate"));
        assert!(message(|s| s.election_ttl_ms = 0).contains("election_ttl_ms"));
    }
}
