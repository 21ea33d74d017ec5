//! When a filter is worth applying in the scan: decided by what it has shown so far.
//!
//! Everything here is a pure function of counts and times that others measured.

use std::time::Duration;

/// Rows after which a filter has shown what it is worth: two blocks.
const TRIAL_ROWS: u64 = 2 * stoa_forms::BLOCK_ROWS as u64;

/// Rows of experience that count: what is older weighs half, and half again.
const MEMORY_ROWS: u64 = 32 * stoa_forms::BLOCK_ROWS as u64;

/// A filter that is left out is tried again on one block of so many, since data changes along a
/// table.
const RETRY_BLOCKS: u32 = 32;

/// Nanoseconds to take one value from between others, roughly.
const TAKE_NS: f64 = 6.0;

/// What a row costs, in nanoseconds, beyond the filter itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stakes {
    /// Saved by each row that the filter removes: decoding it, and what operators above would do
    /// with it.
    pub(crate) removed_ns: f64,
    /// Spent on each row that stays, because the others are taken from between.
    pub(crate) kept_ns: f64,
}

/// What one filter has done in one partition.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Observed {
    rows_in: u64,
    rows_kept: u64,
    nanos: u64,
    /// Of the next application: what later ones gain from.
    invested: u64,
    left_out: u32,
    generation: u64,
}

/// What to do with an optional filter on the next block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Apply it.
    Apply,
    /// Leave it out: it costs more than it saves.
    LeaveOut,
}

impl Observed {
    /// So much of the time of the application that is recorded next serves those to come.
    pub(crate) fn invest(&mut self, time: Duration) {
        self.invested += u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    }

    /// Adds one application.
    pub(crate) fn record(&mut self, rows_in: usize, rows_kept: usize, nanos: u64) {
        let nanos = nanos.saturating_sub(std::mem::take(&mut self.invested));
        if self.rows_in > MEMORY_ROWS {
            self.rows_in /= 2;
            self.rows_kept /= 2;
            self.nanos /= 2;
        }
        self.rows_in += rows_in as u64;
        self.rows_kept += rows_kept as u64;
        self.nanos += nanos;
    }

    /// The filter has another content: what it showed before is worth less than a trial.
    pub(crate) fn renew(&mut self, generation: u64) {
        if self.generation == generation {
            return;
        }
        self.generation = generation;
        self.left_out = 0;
        if self.rows_in >= TRIAL_ROWS {
            // Its cost stays what it was; its selectivity has one more block to show itself.
            let scale = |count: u64| count * (TRIAL_ROWS / 2) / self.rows_in.max(1);
            (self.rows_kept, self.nanos) = (scale(self.rows_kept), scale(self.nanos));
            self.rows_in = TRIAL_ROWS / 2;
        }
    }

    /// Whether to apply the filter to the next block, and counts that block if not.
    pub(crate) fn decide(&mut self, stakes: Stakes) -> Verdict {
        if self.rows_in < TRIAL_ROWS || self.gain_ns(stakes) >= 0.0 {
            self.left_out = 0;
            return Verdict::Apply;
        }
        self.left_out += 1;
        if self.left_out.is_multiple_of(RETRY_BLOCKS) {
            Verdict::Apply
        } else {
            Verdict::LeaveOut
        }
    }

    /// Nanoseconds saved by all applications so far; negative where they cost more.
    fn gain_ns(&self, stakes: Stakes) -> f64 {
        let removed = self.rows_in.saturating_sub(self.rows_kept) as f64;
        removed * stakes.removed_ns - self.rows_kept as f64 * stakes.kept_ns - self.nanos as f64
    }

    /// Nanoseconds a row, as far as known.
    pub(crate) fn ns_a_row(&self) -> Option<f64> {
        (self.rows_in > 0).then(|| self.nanos as f64 / self.rows_in as f64)
    }

    /// How early to apply the filter among others, the smallest first: cost by what it removes.
    pub(crate) fn rank(&self) -> f64 {
        if self.rows_in == 0 {
            return 0.0;
        }
        let removed = self.rows_in.saturating_sub(self.rows_kept) as f64 / self.rows_in as f64;
        self.nanos as f64 / self.rows_in as f64 / removed.max(1e-3)
    }
}

/// Whether to evaluate the next filter on surviving rows only, instead of on the whole block, of
/// which a value costs `value_ns` to decode and to look at.
pub(crate) fn on_survivors(kept: usize, rows: usize, value_ns: f64) -> bool {
    kept as f64 * (value_ns + TAKE_NS) < rows as f64 * value_ns
}

/// Whether a block of which `kept` of `rows` survive optional filters is better handed on whole.
pub(crate) fn hand_on_whole(kept: usize, rows: usize, stakes: Stakes) -> bool {
    (rows - kept) as f64 * stakes.removed_ns < kept as f64 * stakes.kept_ns
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = stoa_forms::BLOCK_ROWS;
    const STAKES: Stakes = Stakes {
        removed_ns: 10.0,
        kept_ns: 1.0,
    };

    fn after(blocks: usize, kept: usize, ns_a_row: u64) -> Observed {
        let mut observed = Observed::default();
        for _ in 0..blocks {
            observed.record(BLOCK, kept, ns_a_row * BLOCK as u64);
        }
        observed
    }

    #[test]
    fn a_filter_is_tried_before_it_is_judged() {
        assert_eq!(Observed::default().decide(STAKES), Verdict::Apply);
        assert_eq!(after(1, BLOCK, 50).decide(STAKES), Verdict::Apply);
        assert_eq!(after(2, BLOCK, 50).decide(STAKES), Verdict::LeaveOut);
    }

    #[test]
    fn a_selective_filter_stays_and_an_unselective_one_goes() {
        assert_eq!(after(100, BLOCK / 100, 2).decide(STAKES), Verdict::Apply);
        assert_eq!(after(100, BLOCK, 1).decide(STAKES), Verdict::LeaveOut);
        // Selective, but so slow that the rows would better be handed on.
        assert_eq!(
            after(100, BLOCK / 100, 40).decide(STAKES),
            Verdict::LeaveOut
        );
    }

    #[test]
    fn what_is_left_out_is_tried_again_now_and_then() {
        let mut observed = after(10, BLOCK, 5);
        let applied = (0..320).filter(|_| observed.decide(STAKES) == Verdict::Apply);
        assert_eq!(applied.count(), 10);
    }

    #[test]
    fn what_serves_later_blocks_is_not_held_against_a_filter() {
        let mut observed = Observed::default();
        for _ in 0..2 {
            let block = Duration::from_nanos(BLOCK as u64);
            observed.invest(block * 35);
            observed.record(BLOCK, 0, 40 * BLOCK as u64);
        }
        assert_eq!(observed.ns_a_row(), Some(5.0));
        assert_eq!(observed.decide(STAKES), Verdict::Apply);
    }

    #[test]
    fn a_filter_that_turns_selective_comes_back() {
        let mut observed = after(10, BLOCK, 1);
        assert_eq!(observed.decide(STAKES), Verdict::LeaveOut);
        for _ in 0..100 {
            observed.record(BLOCK, 0, BLOCK as u64);
        }
        assert_eq!(observed.decide(STAKES), Verdict::Apply);
    }

    #[test]
    fn a_tightened_filter_gets_another_trial() {
        let mut observed = after(100, BLOCK, 5);
        assert_eq!(observed.decide(STAKES), Verdict::LeaveOut);
        observed.renew(7);
        assert_eq!(observed.decide(STAKES), Verdict::Apply);
        observed.record(BLOCK, BLOCK, 5 * BLOCK as u64);
        assert_eq!(observed.decide(STAKES), Verdict::LeaveOut);
        observed.renew(7);
        assert_eq!(observed.decide(STAKES), Verdict::LeaveOut);
    }

    #[test]
    fn cheap_and_selective_filters_rank_first() {
        let selective = after(4, BLOCK / 100, 2).rank();
        let expensive = after(4, BLOCK / 100, 20).rank();
        let useless = after(4, BLOCK, 2).rank();
        assert!(selective < expensive && expensive < useless);
    }

    #[test]
    fn few_survivors_are_worth_copying_and_many_are_not() {
        assert!(!hand_on_whole(10, BLOCK, STAKES));
        assert!(hand_on_whole(BLOCK - 10, BLOCK, STAKES));
        assert!(on_survivors(10, BLOCK, 1.0) && !on_survivors(BLOCK / 2, BLOCK, 1.0));
        // What is dear to look at is worth taking half of the rows for.
        assert!(on_survivors(BLOCK / 2, BLOCK, 12.0) && !on_survivors(BLOCK, BLOCK, 100.0));
    }
}
