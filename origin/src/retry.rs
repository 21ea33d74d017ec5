//! When to ask again: pure decisions, with time and randomness as arguments.

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
            base: Duration::from_millis(200),
            max: Duration::from_secs(10),
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

/// The longest wait that a store may ask for; who asks for more is asked again after this.
const ASKED_WAIT_MAX: Duration = Duration::from_secs(30);

/// How often, and how long in all, one request is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience<'a> {
    /// Attempts, the first included.
    pub(crate) attempts: u32,
    /// No attempt begins later than this after the first one.
    pub(crate) time: Duration,
    pub(crate) backoff: &'a Backoff,
}

impl Patience<'_> {
    /// The wait before the next attempt after `attempt` (≥ 1) have failed within `elapsed`; `None`
    /// when it is enough. A wait that the store `asked` for comes on top of our own, so that those
    /// who were all sent away at once do not all come back at once.
    pub(crate) fn again(
        &self,
        attempt: u32,
        elapsed: Duration,
        asked: Option<Duration>,
        random: f64,
    ) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        let asked = asked.unwrap_or_default().min(ASKED_WAIT_MAX);
        let wait = asked + self.backoff.wait(attempt, random);
        (elapsed + wait <= self.time).then_some(wait)
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
    fn it_is_enough_after_the_attempts_or_the_time() {
        let backoff = Backoff::default();
        let patience = Patience {
            attempts: 3,
            time: Duration::from_secs(60),
            backoff: &backoff,
        };
        let again = |attempt, elapsed, asked: Option<u64>| {
            let (elapsed, asked) = (Duration::from_secs(elapsed), asked.map(Duration::from_secs));
            patience.again(attempt, elapsed, asked, 1.0)
        };
        assert_eq!(again(1, 0, None), Some(Duration::from_millis(200)));
        assert_eq!(again(2, 0, None), Some(Duration::from_millis(400)));
        assert_eq!(again(3, 0, None), None);
        assert_eq!(again(1, 59, None), Some(Duration::from_millis(200)));
        assert_eq!(again(1, 60, None), None);
        // What the store asks for is heeded, with our own spread on top, and within bounds.
        assert_eq!(again(1, 0, Some(1)), Some(Duration::from_millis(1200)));
        assert_eq!(again(1, 0, Some(3600)), Some(Duration::from_millis(30_200)));
        assert_eq!(again(1, 40, Some(3600)), None);
        assert_eq!(
            again(1, 0, Some(u64::MAX)),
            Some(Duration::from_millis(30_200))
        );
    }

    /// What a store that is throttling gets to see by default: more than a few hundred
    /// milliseconds of patience, and an end.
    #[test]
    fn the_default_patience_is_long_and_ends() {
        let limits = crate::OriginLimits::default();
        let spent = |random: f64| {
            let (mut elapsed, mut attempt) = (Duration::ZERO, 1);
            while let Some(wait) = limits.patience().again(attempt, elapsed, None, random) {
                elapsed += wait;
                attempt += 1;
            }
            (attempt, elapsed)
        };
        let (attempts, shortest) = spent(0.0);
        assert_eq!(attempts, limits.attempts);
        assert!(shortest >= Duration::from_secs(4), "{shortest:?}");
        assert!(spent(0.5).1 >= Duration::from_secs(20));
        assert!(spent(1.0).1 <= limits.retry_time);
    }

    #[test]
    fn randomness_stays_in_its_unit() {
        for _ in 0..1000 {
            assert!((0.0..1.0).contains(&random_unit()));
        }
    }
}
