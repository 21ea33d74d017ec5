//! Where a chunk is read from that is not in local memory: a pure function of what was measured.

use std::time::Duration;

use super::health::Standing;

/// A neighbour that holds the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// How long it is expected to take for this chunk; `None` where it was never measured.
    pub expected: Option<Duration>,
    /// How long it is expected to be busy with what was asked of it before.
    pub busy: Duration,
    /// How it stands.
    pub standing: Standing,
    /// Whether it was not asked for so long that `expected` may no longer hold.
    pub stale: bool,
}

impl Candidate {
    /// When the chunk would be here. An unmeasured neighbour counts as quick, so that it is tried.
    fn time(&self) -> Duration {
        self.busy + self.expected.unwrap_or_default()
    }
}

/// Where to read a chunk from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the candidate of that position.
    Neighbour(usize),
    /// From the object store.
    Origin,
}

/// What to do about a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where to read it from.
    pub source: Source,
    /// The candidate to ask for it as well, only to see how it does.
    pub probe: Option<usize>,
}

/// Chooses for one chunk.
///
/// A neighbour is asked where it stands well and is expected to be no slower than the `origin`
/// (`None`: not measured; a neighbour is then taken for quicker). Between several, the quicker of
/// two drawn at random is taken: load spreads over replicas, and a slow one gets little of it.
/// `draw` is a random number.
pub fn decide(candidates: &[Candidate], origin: Option<Duration>, draw: u64) -> Decision {
    let too_slow = |candidate: &Candidate| match (candidate.expected, origin) {
        (Some(_), Some(origin)) => candidate.time() > origin,
        _ => false,
    };
    let eligible: Vec<usize> = (0..candidates.len())
        .filter(|i| {
            let candidate = &candidates[*i];
            candidate.standing == Standing::Good && !too_slow(candidate)
        })
        .collect();
    let source = match two_of(&eligible, draw) {
        None => Source::Origin,
        Some((first, second)) => {
            let quicker = candidates[second].time() < candidates[first].time();
            Source::Neighbour(if quicker { second } else { first })
        }
    };
    let probe = candidates
        .iter()
        .position(|candidate| match candidate.standing {
            Standing::Due => true,
            Standing::Good => too_slow(candidate) && candidate.stale,
            Standing::Left => false,
        });
    Decision { source, probe }
}

/// Two different elements at random; twice the same where there is only one.
fn two_of(from: &[usize], draw: u64) -> Option<(usize, usize)> {
    let count = from.len() as u64;
    if count == 0 {
        return None;
    }
    let first = draw % count;
    let second = match count {
        1 => first,
        _ => (first + 1 + (draw >> 32) % (count - 1)) % count,
    };
    Some((from[first as usize], from[second as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn takes(expected: u64) -> Candidate {
        Candidate {
            expected: Some(ms(expected)),
            busy: Duration::ZERO,
            standing: Standing::Good,
            stale: false,
        }
    }

    fn unmeasured() -> Candidate {
        Candidate {
            expected: None,
            ..takes(0)
        }
    }

    /// A fixed sequence of well-mixed numbers.
    fn draws() -> impl Iterator<Item = u64> {
        (0..1000u64).map(|i| {
            let product = u128::from(i ^ 0x9E37_79B9_7F4A_7C15) * 0xD1B5_4A32_D192_ED03;
            (product ^ (product >> 64)) as u64
        })
    }

    fn source(candidates: &[Candidate], origin: Option<u64>) -> Source {
        decide(candidates, origin.map(ms), 7).source
    }

    #[test]
    fn nobody_holds_it_so_the_origin_is_asked() {
        assert_eq!(source(&[], None), Source::Origin);
    }

    #[test]
    fn the_quicker_of_neighbour_and_origin_is_asked() {
        assert_eq!(source(&[takes(5)], Some(20)), Source::Neighbour(0));
        assert_eq!(source(&[takes(30)], Some(20)), Source::Origin);
    }

    #[test]
    fn a_neighbour_busy_beyond_the_origin_is_passed_over() {
        let busy = Candidate {
            busy: ms(16),
            ..takes(5)
        };
        assert_eq!(source(&[busy], Some(20)), Source::Origin);
        assert_eq!(source(&[busy, takes(19)], Some(20)), Source::Neighbour(1));
    }

    #[test]
    fn what_was_not_measured_is_tried() {
        assert_eq!(source(&[unmeasured()], Some(1)), Source::Neighbour(0));
        assert_eq!(source(&[takes(1000)], None), Source::Neighbour(0));
        for draw in draws() {
            let chosen = decide(&[takes(5), unmeasured()], None, draw).source;
            assert_eq!(chosen, Source::Neighbour(1));
        }
    }

    #[test]
    fn a_failing_neighbour_is_left_and_then_probed() {
        let left = Candidate {
            standing: Standing::Left,
            ..takes(1)
        };
        let due = Candidate {
            standing: Standing::Due,
            ..left
        };
        for origin in [None, Some(ms(20))] {
            let decision = decide(&[left], origin, 0);
            assert_eq!(decision.source, Source::Origin);
            assert_eq!(decision.probe, None);
            let decision = decide(&[due, takes(2)], origin, 0);
            assert_eq!(decision.source, Source::Neighbour(1));
            assert_eq!(decision.probe, Some(0));
        }
    }

    #[test]
    fn a_slow_neighbour_is_measured_again_now_and_then() {
        let slow = takes(100);
        assert_eq!(decide(&[slow], Some(ms(20)), 0).probe, None);
        let stale = Candidate {
            stale: true,
            ..slow
        };
        let decision = decide(&[stale], Some(ms(20)), 0);
        assert_eq!(decision.source, Source::Origin);
        assert_eq!(decision.probe, Some(0));
        let quick = Candidate {
            stale: true,
            ..takes(1)
        };
        assert_eq!(decide(&[quick], Some(ms(20)), 0).probe, None);
    }

    #[test]
    fn equal_replicas_share_the_load_and_a_slow_one_gets_none_of_it() {
        let count = |candidates: &[Candidate]| {
            let mut counts = vec![0; candidates.len()];
            for draw in draws() {
                if let Source::Neighbour(i) = decide(candidates, None, draw).source {
                    counts[i] += 1;
                }
            }
            counts
        };
        let even = count(&[takes(5), takes(5), takes(5), takes(5)]);
        assert!(even.iter().all(|n| (200..300).contains(n)), "{even:?}");
        let uneven = count(&[takes(5), takes(50), takes(5)]);
        assert_eq!(uneven[1], 0, "two different ones are compared");
        assert!(uneven[0] > 300 && uneven[2] > 300, "{uneven:?}");
    }
}
