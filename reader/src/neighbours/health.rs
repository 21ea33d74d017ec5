//! Whether a neighbour is asked: one that fails is left for a while, and proves itself afterwards on
//! a read that nobody waits for.

use std::time::{Duration, Instant};

/// How long a neighbour is left after its first failure; each further failure doubles it.
const LEFT_FIRST: Duration = Duration::from_millis(500);
/// How long it is left at most.
const LEFT_MAX: Duration = Duration::from_secs(30);
/// A neighbour that was expected to be too slow is measured again after this time.
const MEASURED_AGAIN: Duration = Duration::from_secs(10);
/// So many corrupt chunks in a row are the neighbour's fault and not the chunks'.
const CORRUPT_MAX: u32 = 8;

/// How a neighbour stands at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may be asked.
    Good,
    /// It failed and is left alone.
    Left,
    /// It failed, and the time of being left is over: a read that nobody waits for may try it.
    Due,
}

/// What is known of a neighbour's failures. A state machine: time arrives as an argument.
#[derive(Clone, Copy, Debug)]
pub struct Health {
    failures: u32,
    corrupt: u32,
    /// When the last failure was noted, and until when the neighbour is left for it.
    left: Option<(Instant, Instant)>,
    asked: Instant,
}

impl Health {
    /// A neighbour that was not asked yet.
    pub fn new(now: Instant) -> Self {
        Self {
            failures: 0,
            corrupt: 0,
            left: None,
            asked: now,
        }
    }

    /// How it stands.
    pub fn standing(&self, now: Instant) -> Standing {
        match self.left {
            None => Standing::Good,
            Some((_, until)) if now < until => Standing::Left,
            Some(_) => Standing::Due,
        }
    }

    /// Whether it has not been asked for so long that what was measured may no longer hold.
    pub fn is_stale(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.asked) >= MEASURED_AGAIN
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Something is asked of it.
    pub fn asked(&mut self, now: Instant) {
        self.asked = now;
    }

    /// A read that nobody waits for is sent, to be answered until `deadline`: one at a time.
    pub fn probed(&mut self, now: Instant, deadline: Instant) {
        self.asked = now;
        if let Some((_, until)) = &mut self.left {
            *until = deadline.max(*until);
        }
    }

    /// It answered a read sent at `sent`.
    pub fn answered(&mut self, sent: Instant) {
        // What was sent before the failure says nothing of the time after it.
        if self.left.is_none_or(|(noted, _)| sent > noted) {
            self.failures = 0;
            self.corrupt = 0;
            self.left = None;
        }
    }

    /// It did not answer a read sent at `sent`, or not as agreed.
    pub fn failed(&mut self, sent: Instant, now: Instant) {
        // All reads that are under way fail together: that is one failure.
        if self.left.is_some_and(|(noted, _)| sent <= noted) {
            return;
        }
        let times = 1u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let wait = LEFT_FIRST.saturating_mul(times).min(LEFT_MAX);
        self.failures = self.failures.saturating_add(1);
        self.left = Some((now, now + wait));
    }

    /// It answered a read sent at `sent` with bytes that are not the chunk's.
    pub fn corrupted(&mut self, sent: Instant, now: Instant) {
        self.corrupt = self.corrupt.saturating_add(1);
        if self.corrupt >= CORRUPT_MAX {
            self.failed(sent, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_failure_leaves_the_neighbour_for_a_while_and_more_double_it() {
        let t = Instant::now();
        let mut health = Health::new(t);
        assert_eq!(health.standing(t), Standing::Good);
        health.failed(t, t + ms(10));
        assert_eq!(health.standing(t + ms(509)), Standing::Left);
        assert_eq!(health.standing(t + ms(510)), Standing::Due);
        health.failed(t + ms(510), t + ms(520));
        assert_eq!(health.standing(t + ms(1519)), Standing::Left);
        assert_eq!(health.standing(t + ms(1520)), Standing::Due);
        let mut at = t + ms(1520);
        for _ in 0..50 {
            health.failed(at, at);
            at += LEFT_MAX;
            assert_eq!(health.standing(at), Standing::Due, "never longer than that");
        }
        health.answered(at);
        assert_eq!(health.standing(at), Standing::Good);
        assert_eq!(health.failures(), 0);
    }

    #[test]
    fn reads_that_were_under_way_together_fail_once() {
        let t = Instant::now();
        let mut health = Health::new(t);
        for chunk in 0..20 {
            health.failed(t, t + ms(chunk));
        }
        assert_eq!(health.failures(), 1);
        health.answered(t);
        assert_eq!(
            health.standing(t + ms(30)),
            Standing::Left,
            "an answer to an older read proves nothing"
        );
    }

    #[test]
    fn one_read_at_a_time_tries_a_neighbour_that_was_left() {
        let t = Instant::now();
        let mut health = Health::new(t);
        health.failed(t, t);
        let due = t + LEFT_FIRST;
        assert_eq!(health.standing(due), Standing::Due);
        health.probed(due, due + ms(300));
        assert_eq!(health.standing(due + ms(299)), Standing::Left);
        health.answered(due);
        assert_eq!(health.standing(due + ms(299)), Standing::Good);
    }

    #[test]
    fn some_corrupt_chunks_are_the_chunks_and_many_in_a_row_the_neighbour() {
        let t = Instant::now();
        let mut health = Health::new(t);
        for _ in 1..CORRUPT_MAX {
            health.corrupted(t, t);
        }
        assert_eq!(health.standing(t), Standing::Good);
        health.answered(t);
        health.corrupted(t, t);
        assert_eq!(health.standing(t), Standing::Good);
        for _ in 1..CORRUPT_MAX {
            health.corrupted(t, t);
        }
        assert_eq!(health.standing(t), Standing::Left);
    }

    #[test]
    fn what_was_measured_goes_stale_without_reads() {
        let t = Instant::now();
        let mut health = Health::new(t);
        assert!(!health.is_stale(t + ms(9_999)));
        assert!(health.is_stale(t + MEASURED_AGAIN));
        health.asked(t + MEASURED_AGAIN);
        assert!(!health.is_stale(t + MEASURED_AGAIN));
    }
}
