//! How neighbours are read.

use std::time::Duration;

/// What is expected of a neighbour that was never measured.
const UNMEASURED_BYTES_PER_SECOND: u64 = 32 << 20;

/// Bounds on reads from neighbours.
#[derive(Clone, Debug, PartialEq)]
pub struct NeighbourSettings {
    /// What a neighbour always has to answer; the time that its reads are expected to take is added,
    /// `patience` times. After that the chunk is read from the origin.
    pub deadline: Duration,
    /// How many times what is expected is waited for.
    pub patience: u32,
    /// Bytes asked of neighbours and not yet received, in the whole process; half of it of one
    /// neighbour.
    pub in_flight_bytes_max: u64,
}

impl Default for NeighbourSettings {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(1),
            patience: 3,
            in_flight_bytes_max: 256 << 20,
        }
    }
}

impl NeighbourSettings {
    /// How long to wait for `bytes` that are expected to take that long; `None`: not measured.
    pub(crate) fn wait(&self, bytes: u64, expected: Option<Duration>) -> Duration {
        let expected = expected.unwrap_or_else(|| {
            Duration::from_secs_f64(bytes as f64 / UNMEASURED_BYTES_PER_SECOND as f64)
        });
        self.deadline
            .saturating_add(expected.saturating_mul(self.patience))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_is_waited_for_several_times() {
        let settings = NeighbourSettings::default();
        let second = Duration::from_secs(1);
        assert_eq!(settings.wait(1, Some(second)), 4 * second);
        assert_eq!(settings.wait(64 << 20, None), 7 * second);
        assert_eq!(settings.wait(1, Some(Duration::MAX)), Duration::MAX);
    }
}
