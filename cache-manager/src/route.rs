//! Where a load has a chunk from: another worker, now or after some waiting, or the origin.
//!
//! Pure: what the peers say, who may be waited for and the time arrive as arguments.
//!
//! All who are to hold a chunk by the same plan stand in one order. The first of them are chosen so
//! that each is it for an equal share of the bytes ([`shares`]): what one of them has loaded and
//! nobody has from it yet is lost when it dies, and that must not be much. Behind the first the order
//! is that of a hash of row group and worker, so that the share of one that dies is spread over the
//! others.
//!
//! The first loads a chunk, and each of the others waits for the first of those before it, the one
//! whose turn it is: not for all of them. When that one is gone or stands still, it is the turn of
//! the next, and only then does the time begin in which that one has to get further. So the one who
//! takes over, and who stood still too as long as it waited itself, is not given up together with
//! the one it waited for.
//!
//! - As long as all agree on who is gone, one of them asks the origin.
//! - Waiting only goes up the order, so nobody waits in a circle.
//! - Whoever is waited for gets further or loses its turn, so nobody waits for ever, whatever others
//!   believe.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use stoa_shm::holdings::Standing;
use stoa_shm::{ChunkKey, ChunkLocation};
use twox_hash::XxHash3_64;

/// Who takes over may not have noticed yet that it is its turn, and has to notice before it gets
/// further: it has so many times the patience.
const SUCCESSOR_PATIENCE: u32 = 2;

/// A worker's place in the order of those who want a row group; the highest loads it. Whether it is
/// the first, its hash, and its id.
pub(crate) type Rank<'a> = (bool, u64, &'a str);

/// Names a row group of a file. Row groups rather than chunks have an order of workers, so that
/// neighbouring columns stay one request to the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place(u64);

impl Place {
    pub(crate) fn of(key: &ChunkKey) -> Place {
        let mut place = [0u8; 12];
        place[..8].copy_from_slice(&XxHash3_64::oneshot(&key.file).to_le_bytes());
        place[8..].copy_from_slice(&key.row_group.to_le_bytes());
        Place(XxHash3_64::oneshot(&place))
    }
}

/// A worker's rank for a row group: the same, whoever asks.
pub(crate) fn rank(place: Place, worker: &str, is_first: bool) -> Rank<'_> {
    let hash = XxHash3_64::oneshot_with_seed(place.0, worker.as_bytes());
    (is_first, hash, worker)
}

/// Shares row groups, given with their bytes, among so many workers: for each the number of the one
/// that comes first. The same in whatever order they are given; no share is larger than the mean by
/// more than the largest row group.
pub(crate) fn shares(places: &HashMap<Place, u64>, workers: u32) -> HashMap<Place, u32> {
    let mut by_size: Vec<(Reverse<u64>, Place)> = places
        .iter()
        .map(|(place, bytes)| (Reverse(*bytes), *place))
        .collect();
    by_size.sort_unstable();
    // The one with the least so far takes the next.
    let mut least: BinaryHeap<Reverse<(u64, u32)>> =
        (0..workers).map(|n| Reverse((0, n))).collect();
    let mut shares = HashMap::with_capacity(places.len());
    for (Reverse(bytes), place) in by_size {
        let Some(Reverse((has, worker))) = least.pop() else {
            break;
        };
        shares.insert(place, worker);
        least.push(Reverse((has.saturating_add(bytes), worker)));
    }
    shares
}

/// What is known of one chunk at one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer<'a> {
    pub(crate) standing: Standing,
    /// Whether what is absent may yet come.
    pub(crate) may_come: bool,
    /// Its rank, if it is to hold the chunk too.
    pub(crate) rank: Option<Rank<'a>>,
    /// Whether the peer is asked no more, for this chunk or at all.
    pub(crate) is_out: bool,
    /// When it was last seen to have got further, with whatever it loads.
    pub(crate) progressed: Instant,
    /// Bytes that it has been asked for so far.
    pub(crate) asked_bytes: u64,
}

/// Where a chunk is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// From that one of the answers.
    Peer(usize, ChunkLocation),
    /// It is the turn of that one of the answers: ask again.
    Wait(usize),
    Origin,
}

/// Since when it is whose turn to load a row group, by the peer's number.
#[derive(Debug, Default)]
pub(crate) struct Turns(HashMap<(Place, usize), Instant>);

impl Turns {
    /// It is the turn of that peer, from now on if it was not before.
    pub(crate) fn begin(&mut self, place: Place, peer: usize, now: Instant) {
        self.0.entry((place, peer)).or_insert(now);
    }

    fn began(&self, place: Place, peer: usize) -> Option<Instant> {
        self.0.get(&(place, peer)).copied()
    }
}

/// Decides where a chunk is to be had that is wanted in this form: from the holder that was asked
/// for least, else from whoever's turn it is, else from the origin.
///
/// `own` is this worker's rank. Whoever's turn it is may stand still for `patience`.
pub(crate) fn route(
    form: u8,
    own: Rank<'_>,
    place: Place,
    answers: &[Answer<'_>],
    turns: &Turns,
    patience: Duration,
    now: Instant,
) -> Route {
    let held = answers
        .iter()
        .enumerate()
        .filter_map(|(at, answer)| match answer.standing {
            Standing::Held(location) if location.form == form && !answer.is_out => {
                Some((answer.asked_bytes, at, location))
            }
            _ => None,
        });
    if let Some((_, at, location)) = held.min_by_key(|(asked, at, _)| (*asked, *at)) {
        return Route::Peer(at, location);
    }
    let numbered = answers.iter().enumerate();
    let mut before: Vec<(Rank<'_>, usize)> = numbered
        .filter_map(|(at, answer)| Some((answer.rank.filter(|rank| *rank > own)?, at)))
        .collect();
    before.sort_unstable_by_key(|(rank, _)| Reverse(*rank));
    let mut succeeds = false;
    for (_, at) in before {
        let answer = &answers[at];
        let comes = match answer.standing {
            Standing::Loading => true,
            Standing::Absent => answer.may_come,
            // In another form: it is ours to make.
            Standing::Held(_) => false,
        };
        let patience = match succeeds {
            true => patience * SUCCESSOR_PATIENCE,
            false => patience,
        };
        let stands_still = turns.began(place, at).is_some_and(|began| {
            let since = began.max(answer.progressed);
            now.saturating_duration_since(since) >= patience
        });
        if answer.is_out || comes && stands_still {
            succeeds = true;
        } else if comes {
            return Route::Wait(at);
        }
    }
    Route::Origin
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use stoa_shm::SegmentId;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(6);

    fn key(row_group: u32, column: u32) -> ChunkKey {
        ChunkKey {
            file: Arc::from(&b"file"[..]),
            row_group,
            column,
        }
    }

    fn held(form: u8) -> Standing {
        Standing::Held(ChunkLocation {
            segment: SegmentId(1),
            offset: 64,
            length: 10,
            form,
            checksum: 0,
            rows: 1,
        })
    }

    fn answer(standing: Standing, rank: Rank<'_>, now: Instant) -> Answer<'_> {
        Answer {
            standing,
            may_come: false,
            rank: Some(rank),
            is_out: false,
            progressed: now,
            asked_bytes: 0,
        }
    }

    /// Routes for a worker with the rank 5, to whom nobody has stood still yet.
    fn routed(form: u8, answers: &[Answer<'_>]) -> Route {
        let place = Place::of(&key(0, 0));
        let now = Instant::now();
        let turns = Turns::default();
        route(
            form,
            (false, 5, "me"),
            place,
            answers,
            &turns,
            PATIENCE,
            now,
        )
    }

    #[test]
    fn a_holder_is_better_than_waiting_and_waiting_better_than_the_origin() {
        let now = Instant::now();
        let loading = answer(Standing::Loading, (false, 9, "a"), now);
        let absent = answer(Standing::Absent, (false, 8, "b"), now);
        let holder = answer(held(1), (false, 1, "c"), now);
        let is_from =
            |route: Route, expected: usize| matches!(route, Route::Peer(at, _) if at == expected);
        assert!(is_from(routed(1, &[loading, holder]), 1));
        assert_eq!(routed(1, &[absent, loading]), Route::Wait(1));
        assert_eq!(routed(1, &[absent]), Route::Origin);
        assert_eq!(routed(1, &[]), Route::Origin);
        // The holder that was asked for less.
        let busy = Answer {
            asked_bytes: 5,
            ..holder
        };
        assert!(is_from(routed(1, &[busy, holder]), 1));
        // Another form is no use, and nobody waits for it to change.
        let other_form = answer(held(1), (true, 9, "a"), now);
        assert_eq!(routed(2, &[other_form]), Route::Origin);
        let out = |answer: Answer<'static>| Answer {
            is_out: true,
            ..answer
        };
        assert_eq!(routed(1, &[out(holder), out(loading)]), Route::Origin);
    }

    #[test]
    fn only_who_goes_before_is_waited_for_and_the_first_of_them() {
        let now = Instant::now();
        let behind = |standing| Answer {
            may_come: true,
            ..answer(standing, (false, 4, "z"), now)
        };
        assert_eq!(
            routed(1, &[behind(Standing::Loading), behind(Standing::Absent)]),
            Route::Origin
        );
        // But what it holds is taken all the same.
        assert!(matches!(routed(1, &[behind(held(1))]), Route::Peer(0, _)));
        // Before us, and perhaps not aware of the plan yet.
        let unaware = Answer {
            may_come: true,
            ..answer(Standing::Absent, (false, 8, "b"), now)
        };
        assert_eq!(routed(1, &[unaware]), Route::Wait(0));
        let first = answer(Standing::Loading, (true, 6, "a"), now);
        assert_eq!(routed(1, &[unaware, first]), Route::Wait(1));
        // No rank: the plan does not give it the chunk.
        let other = Answer {
            rank: None,
            ..first
        };
        assert_eq!(routed(1, &[other]), Route::Origin);
    }

    /// The second stood still as long as the first, because it waited for it. Its time begins when
    /// the first has lost its turn.
    #[test]
    fn the_next_one_has_its_time_from_its_turn_on() {
        let start = Instant::now();
        let place = Place::of(&key(0, 0));
        let answers = [
            answer(Standing::Loading, (false, 8, "b"), start),
            answer(Standing::Loading, (false, 9, "a"), start),
        ];
        let mut turns = Turns::default();
        let mut at = |seconds: u64| {
            let now = start + Duration::from_secs(seconds);
            let route = route(1, (false, 5, "me"), place, &answers, &turns, PATIENCE, now);
            if let Route::Wait(peer) = route {
                turns.begin(place, peer, now);
            }
            route
        };
        assert_eq!(at(0), Route::Wait(1));
        assert_eq!(at(5), Route::Wait(1));
        assert_eq!(at(6), Route::Wait(0), "its turn, though it stood still");
        assert_eq!(at(17), Route::Wait(0));
        assert_eq!(at(18), Route::Origin);
    }

    /// Whole row groups go together, and when the first is gone each of the others takes over about
    /// as much as another.
    #[test]
    fn what_the_first_leaves_is_spread_over_the_others() {
        let ids = ["a", "b", "c", "d"];
        let mut seconds = [0; 4];
        for row_group in 0..4000 {
            let order = |column| {
                let place = Place::of(&key(row_group, column));
                let mut order: Vec<usize> = (0..4).collect();
                order.sort_by_key(|at| Reverse(rank(place, ids[*at], *at == 2)));
                order
            };
            assert_eq!(order(0), order(7));
            assert_eq!(order(0)[0], 2);
            seconds[order(0)[1]] += 1;
        }
        seconds[2] = 1333;
        assert!(
            seconds.iter().all(|seconds| (1180..1490).contains(seconds)),
            "{seconds:?}"
        );
    }

    /// Workers that all want one chunk, of which some are dead or hang, as each of them sees the
    /// others.
    struct Cluster {
        ids: Vec<String>,
        place: Place,
        first: usize,
        /// By viewer and peer, when the viewer notices that the peer is out; `None` for never.
        notices: Vec<Vec<Option<Duration>>>,
        /// Those who load nothing: dead, or hanging for ever while they say that they load.
        is_dead: Vec<bool>,
        /// How long the origin takes.
        origin: Duration,
    }

    /// What came of it: who asked the origin, and when each had the chunk.
    struct Outcome {
        asked_origin: Vec<usize>,
        done: Vec<Option<Duration>>,
    }

    const STEP: Duration = Duration::from_millis(100);

    impl Cluster {
        fn rank(&self, worker: usize) -> Rank<'_> {
            rank(self.place, &self.ids[worker], worker == self.first)
        }

        fn run(&self, limit: Duration) -> Outcome {
            let start = Instant::now();
            let workers = self.ids.len();
            let mut outcome = Outcome {
                asked_origin: vec![],
                done: vec![None; workers],
            };
            let mut arrives: Vec<Option<Duration>> = vec![None; workers];
            let mut turns: Vec<Turns> = (0..workers).map(|_| Turns::default()).collect();
            let mut time = Duration::ZERO;
            while time <= limit {
                for me in (0..workers).filter(|me| !self.is_dead[*me]) {
                    if outcome.done[me].is_some() {
                        continue;
                    }
                    if let Some(at) = arrives[me] {
                        outcome.done[me] = (at <= time).then_some(time);
                        continue;
                    }
                    let peers: Vec<usize> = (0..workers).filter(|peer| *peer != me).collect();
                    let answer = |peer: &usize| Answer {
                        standing: match outcome.done[*peer] {
                            Some(_) => held(1),
                            None => Standing::Loading,
                        },
                        may_come: true,
                        rank: Some(self.rank(*peer)),
                        is_out: self.notices[me][*peer].is_some_and(|at| at <= time),
                        progressed: start + outcome.done[*peer].unwrap_or_default(),
                        asked_bytes: 0,
                    };
                    let answers: Vec<Answer<'_>> = peers.iter().map(answer).collect();
                    let now = start + time;
                    match route(
                        1,
                        self.rank(me),
                        self.place,
                        &answers,
                        &turns[me],
                        PATIENCE,
                        now,
                    ) {
                        Route::Peer(..) => outcome.done[me] = Some(time),
                        Route::Wait(at) => turns[me].begin(self.place, at, now),
                        Route::Origin => {
                            outcome.asked_origin.push(me);
                            arrives[me] = Some(time + self.origin);
                        }
                    }
                }
                time += STEP;
            }
            outcome
        }
    }

    fn millis(range: std::ops::Range<u64>) -> impl Strategy<Value = Duration> {
        range.prop_map(Duration::from_millis)
    }

    proptest! {
        /// Nobody has much more to load than another, so that not much is lost with it, and all of
        /// them come to the same shares.
        #[test]
        fn shares_are_equal_for_all_who_compute_them(
            sizes in prop::collection::vec(1u64..1000, 1..60),
            workers in 1u32..9,
        ) {
            let places = || sizes.iter().enumerate().map(|(at, bytes)| {
                (Place::of(&key(at as u32, 0)), *bytes)
            });
            let shares = super::shares(&places().collect(), workers);
            let mut reversed: Vec<_> = places().collect();
            reversed.reverse();
            prop_assert_eq!(&shares, &super::shares(&reversed.into_iter().collect(), workers));
            let mut bytes = vec![0; workers as usize];
            for (place, size) in places() {
                bytes[shares[&place] as usize] += size;
            }
            let mean = sizes.iter().sum::<u64>() / u64::from(workers);
            let largest = sizes.iter().max().unwrap();
            prop_assert!(bytes.iter().all(|bytes| *bytes <= mean + largest), "{:?}", bytes);
        }

        /// Some die, and everybody notices at some time of its own: one of the others loads the
        /// chunk, and no second one.
        #[test]
        fn one_survivor_takes_over(
            is_dead in prop::collection::vec(any::<bool>(), 1..7),
            (row_group, first) in (any::<u32>(), 0usize..7),
            noticed in prop::collection::vec(millis(0..PATIENCE.as_millis() as u64), 49),
            origin in millis(0..PATIENCE.as_millis() as u64 - 500),
        ) {
            let workers = is_dead.len();
            let notices = |viewer: usize, peer: usize| is_dead[peer].then(|| noticed[viewer * 7 + peer]);
            let cluster = Cluster {
                ids: (0..workers).map(|at| format!("worker-{at}")).collect(),
                place: Place::of(&key(row_group, 0)),
                first: first % workers,
                notices: (0..workers).map(|v| (0..workers).map(|p| notices(v, p)).collect()).collect(),
                is_dead: is_dead.clone(),
                origin,
            };
            let outcome = cluster.run(PATIENCE * 4);
            let survivors = is_dead.iter().filter(|dead| !**dead).count();
            prop_assert_eq!(outcome.asked_origin.len(), survivors.min(1));
            prop_assert_eq!(outcome.done.iter().flatten().count(), survivors);
        }

        /// Each has a view of its own of who is gone, right or wrong, and some hang for ever while
        /// they say that they load: everybody has the chunk after some time all the same.
        #[test]
        fn nobody_waits_for_ever(
            is_dead in prop::collection::vec(any::<bool>(), 1..7),
            (row_group, first) in (any::<u32>(), 0usize..7),
            noticed in prop::collection::vec(prop::option::of(millis(0..60_000)), 49),
            origin in millis(0..20_000),
        ) {
            let workers = is_dead.len();
            let limit = PATIENCE * SUCCESSOR_PATIENCE * workers as u32 + origin + STEP * 3;
            let cluster = Cluster {
                ids: (0..workers).map(|at| format!("worker-{at}")).collect(),
                place: Place::of(&key(row_group, 0)),
                first: first % workers,
                notices: (0..workers).map(|v| noticed[v * 7..][..workers].to_vec()).collect(),
                is_dead: is_dead.clone(),
                origin,
            };
            let outcome = cluster.run(limit);
            for (worker, dead) in is_dead.iter().enumerate() {
                prop_assert_eq!(outcome.done[worker].is_none(), *dead, "worker {}", worker);
            }
        }
    }
}
