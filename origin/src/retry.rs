//! When to ask again: a pure decision, with the randomness as an argument.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// How long to wait between attempts: exponential, with full jitter.
#[derive(Clone, Debug, PartialEq)]
pub struct Backoff {
    /// Upper bound of the first wait.
    pub base: Duration,
    /// Upper bound of any wait.
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff {
            base: Duration::from_millis(100),
            max: Duration::from_secs(5),
        }
    }
}

impl Backoff {
    /// The wait before attempt `attempt + 1`, after `attempt` (≥ 1) have failed; `random` is in
    /// 0 to 1 and spreads the waits of many callers evenly between a tenth of the bound and it.
    pub fn wait(&self, attempt: u32, random: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(20);
        let bound = self.base.saturating_mul(1 << doublings).min(self.max);
        bound.mul_f64(0.1 + 0.9 * random.clamp(0.0, 1.0))
    }
}

/// A number in 0 to 1 that differs from call to call: enough to spread retries.
pub(crate) fn random_unit() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_bound_and_stay_there() {
        let backoff = Backoff {
            base: Duration::from_millis(100),
            max: Duration::from_millis(500),
        };
        let longest: Vec<u128> = (1..6).map(|n| backoff.wait(n, 1.0).as_millis()).collect();
        assert_eq!(longest, [100, 200, 400, 500, 500]);
        assert_eq!(backoff.wait(1, 0.0).as_millis(), 10);
        assert_eq!(backoff.wait(u32::MAX, 1.0).as_millis(), 500);
    }

    #[test]
    fn randomness_stays_in_its_unit() {
        for _ in 0..1000 {
            assert!((0.0..1.0).contains(&random_unit()));
        }
    }
}
