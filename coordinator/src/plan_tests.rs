use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn worker(id: usize, capacity_bytes: u64) -> PlanWorker {
    PlanWorker {
        id: format!("w{id}"),
        capacity_bytes,
        accepts_new: true,
    }
}

/// `columns` chunks in each of `groups` row groups, column by column as layouts order them.
fn table(groups: u64, columns: u64, bytes: impl Fn(u64, u64) -> u64) -> Vec<PlanChunk> {
    (0..columns)
        .flat_map(|column| (0..groups).map(move |group| (column, group)))
        .map(|(column, group)| PlanChunk {
            group: XxHash(group).into(),
            bytes: bytes(column, group),
        })
        .collect()
}

/// Group hashes as they come in practice: spread over all 64 bits.
struct XxHash(u64);

impl From<XxHash> for u64 {
    fn from(group: XxHash) -> u64 {
        twox_hash::XxHash3_64::oneshot(&group.0.to_le_bytes())
    }
}

fn fresh(chunks: &[PlanChunk], workers: &[PlanWorker], balancer: Balancer) -> Plan {
    copied(chunks, workers, &HashMap::new(), balancer, Replicas::ONE)
}

fn copied(
    chunks: &[PlanChunk],
    workers: &[PlanWorker],
    previous: &HashMap<usize, Vec<String>>,
    balancer: Balancer,
    replicas: Replicas,
) -> Plan {
    plan(&PlanInput {
        chunks,
        workers,
        previous,
        balancer,
        replicas,
    })
}

fn count(copies: u32) -> Replicas {
    Replicas::Count(copies.try_into().unwrap())
}

/// Everybody who has a chunk, as the next plan is told.
fn holders(plan: &Plan) -> HashMap<usize, Vec<String>> {
    let mut holders: HashMap<usize, Vec<String>> = HashMap::new();
    for (worker, chunks) in &plan.assignments {
        for chunk in chunks {
            holders.entry(*chunk).or_default().push(worker.clone());
        }
    }
    holders
}

fn again(chunks: &[PlanChunk], workers: &[PlanWorker], before: &Plan, balancer: Balancer) -> Plan {
    copied(chunks, workers, &holders(before), balancer, Replicas::ONE)
}

fn placement(plan: &Plan) -> HashMap<usize, String> {
    let of = |(worker, chunks): (&String, &Vec<usize>)| -> Vec<(usize, String)> {
        chunks
            .iter()
            .map(|chunk| (*chunk, worker.clone()))
            .collect()
    };
    plan.assignments.iter().flat_map(of).collect()
}

fn bytes_at(plan: &Plan, chunks: &[PlanChunk], worker: &str) -> u64 {
    plan.assignments[worker]
        .iter()
        .map(|chunk| chunks[*chunk].bytes)
        .sum()
}

fn moved_bytes(chunks: &[PlanChunk], before: &Plan, after: &Plan) -> u64 {
    let (before, after) = (placement(before), placement(after));
    before
        .iter()
        .filter(|(chunk, worker)| after.get(chunk) != Some(worker))
        .map(|(chunk, _)| chunks[*chunk].bytes)
        .sum()
}

fn total(chunks: &[PlanChunk]) -> u64 {
    chunks.iter().map(|chunk| chunk.bytes).sum()
}

/// What holds for every plan, whatever the input.
fn check_always(input: &PlanInput<'_>, plan: &Plan) -> Result<(), TestCaseError> {
    let mut seen: HashMap<usize, usize> = HashMap::new();
    for (worker, chunks) in &plan.assignments {
        let given = input
            .workers
            .iter()
            .find(|w| &w.id == worker)
            .expect("only workers that are there");
        prop_assert!(
            chunks.is_sorted_by(|a, b| a < b),
            "priority order is kept, and no worker has two copies"
        );
        for chunk in chunks {
            *seen.entry(*chunk).or_default() += 1;
            let had = input.previous.get(chunk);
            prop_assert!(
                given.accepts_new || had.is_some_and(|had| had.contains(worker)),
                "{} is gone",
                worker
            );
        }
        let load: u128 = chunks
            .iter()
            .map(|chunk| u128::from(input.chunks[*chunk].bytes))
            .sum();
        prop_assert!(
            load <= u128::from(given.capacity_bytes),
            "{} holds {} of {}",
            worker,
            load,
            given.capacity_bytes
        );
    }
    prop_assert_eq!(plan.assignments.len(), input.workers.len());
    let taking = input.workers.iter().filter(|w| w.accepts_new).count();
    let wanted = match input.replicas {
        Replicas::All => input.workers.len(),
        Replicas::Count(count) => count.get() as usize,
    };
    let fewer: HashMap<usize, u32> = plan.fewer.iter().copied().collect();
    for (chunk, copies) in &seen {
        prop_assert!(*copies <= wanted, "chunk {} has {} copies", chunk, copies);
        let lacks = wanted.min(taking).saturating_sub(*copies);
        prop_assert_eq!(fewer.get(chunk).copied().unwrap_or(0) as usize, lacks);
        // A copy that is missing fits on nobody who has none.
        for worker in input.workers.iter().filter(|w| lacks > 0 && w.accepts_new) {
            let load = bytes_at(plan, input.chunks, &worker.id);
            let fits = load + input.chunks[*chunk].bytes <= worker.capacity_bytes;
            prop_assert!(!fits || plan.assignments[&worker.id].contains(chunk));
        }
    }
    prop_assert_eq!(plan.fewer.len(), fewer.len());
    for (chunk, _) in &plan.left_out {
        prop_assert!(
            seen.insert(*chunk, 0).is_none(),
            "chunk {} is placed and left out",
            chunk
        );
        // What is left out fits nowhere, even in the end.
        for worker in input.workers.iter().filter(|w| w.accepts_new) {
            let load = bytes_at(plan, input.chunks, &worker.id);
            prop_assert!(load + input.chunks[*chunk].bytes > worker.capacity_bytes);
        }
    }
    prop_assert_eq!(
        seen.len(),
        input.chunks.len(),
        "every chunk is placed or left out"
    );
    Ok(())
}

/// Chunks, workers, where chunks were, balancer and copies.
type AnyInput = (
    Vec<PlanChunk>,
    Vec<PlanWorker>,
    HashMap<usize, Vec<String>>,
    Balancer,
    Replicas,
);

fn any_input() -> impl Strategy<Value = AnyInput> {
    let chunks = prop::collection::vec((0u64..12, 0u64..1000), 0..120);
    let workers = prop::collection::vec((0u64..20_000, prop::bool::weighted(0.85)), 0..7);
    let at = prop::collection::hash_set(0usize..9, 1..4);
    let previous = prop::collection::hash_map(0usize..120, at, 0..120);
    let replicas = prop_oneof![
        3 => Just(Replicas::ONE),
        3 => (2u32..9).prop_map(count),
        1 => Just(Replicas::All),
    ];
    let balancer = prop_oneof![
        Just(Balancer::default()),
        Just(Balancer::Absolute),
        Just(Balancer::Bounded { load: 1.0 })
    ];
    let all = (chunks, workers, previous, balancer, replicas);
    all.prop_map(|(chunks, workers, previous, balancer, replicas)| {
        let chunks = chunks
            .into_iter()
            .map(|(group, bytes)| PlanChunk { group, bytes })
            .collect();
        let workers = workers
            .into_iter()
            .enumerate()
            .map(|(id, (capacity, accepts_new))| PlanWorker {
                accepts_new,
                ..worker(id, capacity)
            })
            .collect();
        let previous = previous
            .into_iter()
            .map(|(chunk, ids)| (chunk, ids.iter().map(|id| format!("w{id}")).collect()))
            .collect();
        (chunks, workers, previous, balancer, replicas)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_copy_on_a_worker_of_its_own_within_capacity((chunks, workers, previous, balancer, replicas) in any_input()) {
        let input = PlanInput { chunks: &chunks, workers: &workers, previous: &previous, balancer, replicas };
        let plan = plan(&input);
        check_always(&input, &plan)?;
    }

    #[test]
    fn the_order_of_workers_does_not_matter((chunks, workers, previous, balancer, replicas) in any_input()) {
        let mut reversed = workers.clone();
        reversed.reverse();
        let plan_of = |workers: &[PlanWorker]| copied(&chunks, workers, &previous, balancer, replicas);
        prop_assert_eq!(plan_of(&workers), plan_of(&reversed));
    }

    #[test]
    fn planning_again_changes_nothing(groups in 1u64..40, columns in 1u64..5, nodes in 1usize..7, seed: u64, absolute: bool, tight in 1u64..30) {
        let chunks = table(groups, columns, |column, group| 1 + (seed ^ (column * 31 + group * 17)) % 900);
        let roomy = tight > 20;
        let capacity = total(&chunks) * if roomy { 10 * nodes as u64 + 1 } else { tight } / 10 / nodes as u64;
        let workers: Vec<_> = (0..nodes).map(|id| worker(id, capacity)).collect();
        let balancer = if absolute { Balancer::Absolute } else { Balancer::default() };
        let mut plan = fresh(&chunks, &workers, balancer);
        // Where capacity is so short that row groups had to be split, the next plans may still
        // find better ways; but they come to rest.
        for round in 0.. {
            let next = again(&chunks, &workers, &plan, balancer);
            if next == plan {
                break;
            }
            prop_assert!(!roomy && round < 6, "round {}: {:?} after {:?}", round, next, plan);
            plan = next;
        }
    }

    #[test]
    fn copies_are_spread_and_stay_and_move_little(groups in 20u64..80, columns in 1u64..4, nodes in 3usize..7, copies in 2u32..4, seed: u64, absolute: bool) {
        let chunks = table(groups, columns, |column, group| 500 + (seed ^ (column * 31 + group * 17)) % 100);
        let workers: Vec<_> = (0..=nodes).map(|id| worker(id, total(&chunks) * 2)).collect();
        let balancer = if absolute { Balancer::Absolute } else { Balancer::default() };
        let before = copied(&chunks, &workers[..nodes], &HashMap::new(), balancer, count(copies));
        prop_assert!(before.left_out.is_empty() && before.fewer.is_empty());
        let share = total(&chunks) as f64 * f64::from(copies.min(nodes as u32)) / nodes as f64;
        for worker in &workers[..nodes] {
            let load = bytes_at(&before, &chunks, &worker.id) as f64;
            prop_assert!(load <= share * 1.25 + 600.0 * columns as f64 * f64::from(copies), "{} has {} of {}", worker.id, load, share);
        }
        let again = |workers: &[PlanWorker]| copied(&chunks, workers, &holders(&before), balancer, count(copies));
        prop_assert_eq!(&again(&workers[..nodes]), &before);
        // A worker leaves: the others keep all they have, and take over what it had.
        let rest = &workers[1..nodes];
        let after = again(rest);
        let held = holders(&after);
        let possible = rest.len().min(copies as usize);
        prop_assert!((0..chunks.len()).all(|chunk| held[&chunk].len() == possible));
        let kept = |plan: &Plan, worker: &PlanWorker| {
            let now: HashSet<usize> = plan.assignments[&worker.id].iter().copied().collect();
            let had = before.assignments[&worker.id].iter();
            let (kept, lost): (Vec<usize>, Vec<usize>) = had.copied().partition(|chunk| now.contains(chunk));
            let bytes = |chunks_: &[usize]| chunks_.iter().map(|chunk| chunks[*chunk].bytes).sum::<u64>();
            (bytes(&kept), bytes(&lost))
        };
        if !absolute {
            let lost: u64 = rest.iter().map(|worker| kept(&after, worker).1).sum();
            prop_assert!(lost as f64 <= share * 0.1, "{} of a share of {} moved for nothing", lost, share);
        }
        // A worker joins: it draws at most its share, and no more than that is given up.
        let joined = again(&workers);
        prop_assert!(joined.fewer.is_empty());
        let drawn = bytes_at(&joined, &chunks, &workers[nodes].id) as f64;
        let share = total(&chunks) as f64 * f64::from(copies.min(nodes as u32 + 1)) / (nodes + 1) as f64;
        prop_assert!(drawn > share * 0.4 && drawn <= share * 1.25 + 600.0 * columns as f64 * f64::from(copies), "{} of a share of {}", drawn, share);
        if !absolute {
            let lost: u64 = workers[..nodes].iter().map(|worker| kept(&joined, worker).1).sum();
            prop_assert!(lost as f64 <= share * 1.35, "{} given up for a share of {}", lost, share);
        }
    }

    #[test]
    fn load_is_bounded(groups in 1u64..120, columns in 1u64..5, capacities in prop::collection::vec(1u64..5, 1..8), seed: u64) {
        let chunks = table(groups, columns, |column, group| 1 + (seed ^ (column * 31 + group * 17)) % 900);
        // Room enough that capacity never decides.
        let total_bytes = total(&chunks);
        let workers: Vec<_> = capacities.iter().enumerate().map(|(id, c)| worker(id, c * total_bytes * 2)).collect();
        let weights: u64 = capacities.iter().sum();
        let mut group_bytes: HashMap<u64, u64> = HashMap::new();
        for chunk in &chunks {
            *group_bytes.entry(chunk.group).or_default() += chunk.bytes;
        }
        let largest = group_bytes.values().max().copied().unwrap_or(0);
        let plan = fresh(&chunks, &workers, Balancer::default());
        prop_assert!(plan.left_out.is_empty());
        for (worker, weight) in workers.iter().zip(&capacities) {
            let share = total_bytes as f64 * *weight as f64 / weights as f64;
            let bound = (share * 1.25).max(share + largest as f64);
            let load = bytes_at(&plan, &chunks, &worker.id);
            prop_assert!(load as f64 <= bound + 1.0, "{} has {} of at most {}", worker.id, load, bound);
        }
        // Together: with room enough, no row group is split.
        let placed = placement(&plan);
        let mut homes: HashMap<u64, &String> = HashMap::new();
        for (index, chunk) in chunks.iter().enumerate() {
            prop_assert_eq!(*homes.entry(chunk.group).or_insert(&placed[&index]), &placed[&index]);
        }
    }

    #[test]
    fn only_the_chunks_of_a_worker_that_left_move(groups in 30u64..200, columns in 1u64..4, nodes in 2usize..8, leaver in 0usize..8, seed: u64, absolute: bool) {
        let chunks = table(groups, columns, |column, group| 500 + (seed ^ (column * 31 + group * 17)) % 100);
        let workers: Vec<_> = (0..nodes).map(|id| worker(id, total(&chunks) * 2)).collect();
        let balancer = if absolute { Balancer::Absolute } else { Balancer::default() };
        let before = fresh(&chunks, &workers, balancer);
        let leaver = format!("w{}", leaver % nodes);
        let rest: Vec<_> = workers.iter().filter(|w| w.id != leaver).cloned().collect();
        let after = again(&chunks, &rest, &before, balancer);
        prop_assert!(after.left_out.is_empty());
        prop_assert_eq!(moved_bytes(&chunks, &before, &after), bytes_at(&before, &chunks, &leaver));
        // And it had about 1/N of the bytes: at most the bound.
        let share = total(&chunks) as f64 / nodes as f64;
        prop_assert!(bytes_at(&before, &chunks, &leaver) as f64 <= (share * 1.25).max(share + 600.0 * columns as f64));
    }

    #[test]
    fn a_worker_that_joins_draws_about_its_share(nodes in 1usize..7, seed: u64) {
        let chunks = table(400, 2, |column, group| 500 + (seed ^ (column * 31 + group * 17)) % 100);
        let mut workers: Vec<_> = (0..nodes).map(|id| worker(id, total(&chunks) * 2)).collect();
        let before = fresh(&chunks, &workers, Balancer::default());
        workers.push(worker(nodes, total(&chunks) * 2));
        let after = again(&chunks, &workers, &before, Balancer::default());
        let share = total(&chunks) as f64 / (nodes + 1) as f64;
        let drawn = bytes_at(&after, &chunks, &format!("w{nodes}")) as f64;
        prop_assert!(drawn > share * 0.6 && drawn <= share, "{} of a share of {}", drawn, share);
        // Little moves between the others: what is beyond the new limits.
        let between = moved_bytes(&chunks, &before, &after) as f64 - drawn;
        prop_assert!(between <= share * 0.1, "{} of a share of {}", between, share);
    }

    #[test]
    fn the_absolute_balancer_is_within_one_of_the_mean(groups in 0u64..60, columns in 1u64..4, nodes in 1usize..8, leaves: bool, seed: u64) {
        let chunks = table(groups, columns, |column, group| 1 + (seed ^ (column * 31 + group * 17)) % 5000);
        let workers: Vec<_> = (0..nodes).map(|id| worker(id, total(&chunks) + 1)).collect();
        let mut plan = fresh(&chunks, &workers, Balancer::Absolute);
        let mut workers = workers;
        if leaves && nodes > 1 {
            workers.pop();
            plan = again(&chunks, &workers, &plan, Balancer::Absolute);
        }
        let mean = groups as f64 / workers.len() as f64;
        for (worker, placed) in &plan.assignments {
            let groups: HashSet<u64> = placed.iter().map(|chunk| chunks[*chunk].group).collect();
            prop_assert!((groups.len() as f64 - mean).abs() < 1.0, "{} has {} of a mean of {}", worker, groups.len(), mean);
            prop_assert_eq!(placed.len() as u64, groups.len() as u64 * columns, "row groups are whole");
        }
    }

    #[test]
    fn what_does_not_fit_is_what_is_wanted_least(groups in 1u64..40, columns in 1u64..6, nodes in 1usize..5, percent in 5u64..95) {
        // All of one size, so that only the number decides.
        let chunks = table(groups, columns, |_, _| 100);
        let capacity = total(&chunks) * percent / 100 / nodes as u64;
        let workers: Vec<_> = (0..nodes).map(|id| worker(id, capacity)).collect();
        let plan = fresh(&chunks, &workers, Balancer::default());
        let fit = (capacity / 100) as usize * nodes;
        let left_out: Vec<usize> = plan.left_out.iter().map(|(chunk, _)| *chunk).collect();
        prop_assert_eq!(left_out, (fit.min(chunks.len())..chunks.len()).collect::<Vec<_>>());
    }
}

#[test]
fn a_column_more_moves_nothing() {
    let two = table(64, 2, |_, _| 1000);
    let three = table(64, 3, |_, _| 1000);
    let workers: Vec<_> = (0..3).map(|id| worker(id, 200_000)).collect();
    let before = fresh(&two, &workers, Balancer::default());
    // The first two columns of `three` are the chunks of `two`, at the same positions.
    let after = again(&three, &workers, &before, Balancer::default());
    assert!(after.left_out.is_empty());
    assert_eq!(moved_bytes(&three, &before, &after), 0);
    // And the new column joins its row groups, all but those that the balance forbids.
    let placed = placement(&after);
    let together = (0..64)
        .filter(|group| placed[&(128 + group)] == placed[group])
        .count();
    assert!(together >= 60, "{together}");
}

#[test]
fn a_worker_in_its_grace_keeps_what_it_has_and_gets_nothing() {
    let chunks = table(60, 1, |_, _| 1000);
    let mut workers: Vec<_> = (0..3).map(|id| worker(id, 100_000)).collect();
    let before = fresh(&chunks, &workers, Balancer::default());
    workers[1].accepts_new = false;
    let after = again(&chunks, &workers, &before, Balancer::default());
    assert_eq!(after, before);
    // Another version's chunks go to the two that are there.
    let new = fresh(&chunks, &workers, Balancer::default());
    assert!(new.assignments["w1"].is_empty());
    assert!(new.left_out.is_empty());
    for id in ["w0", "w2"] {
        let load = bytes_at(&new, &chunks, id);
        assert!(load <= 37_500, "{id} has {load}");
    }
}

#[test]
fn a_worker_that_shrinks_gives_up_what_is_wanted_least() {
    let chunks = table(40, 2, |_, _| 100);
    let workers = vec![worker(0, 8_000)];
    let before = fresh(&chunks, &workers, Balancer::default());
    assert!(before.left_out.is_empty());
    let after = again(&chunks, &[worker(0, 5_000)], &before, Balancer::default());
    assert_eq!(after.assignments["w0"], (0..50).collect::<Vec<_>>());
    assert!(
        after
            .left_out
            .iter()
            .all(|(_, reason)| *reason == Reason::NoCapacity)
    );
}

#[test]
fn reasons_say_why() {
    let chunks = [
        PlanChunk {
            group: 1,
            bytes: 50,
        },
        PlanChunk {
            group: 2,
            bytes: 200,
        },
        PlanChunk {
            group: 3,
            bytes: 60,
        },
    ];
    assert_eq!(
        fresh(&chunks, &[], Balancer::default()).left_out[0],
        (0, Reason::NoWorkers)
    );
    let one = fresh(&chunks, &[worker(0, 100)], Balancer::default());
    assert_eq!(one.assignments["w0"], [0]);
    assert_eq!(
        one.left_out,
        [
            (
                1,
                Reason::TooLarge {
                    largest_capacity_bytes: 100
                }
            ),
            (2, Reason::NoCapacity)
        ]
    );
    assert_eq!(
        one.left_out[0].1.to_string(),
        "larger than the room of every worker, at most 100 bytes"
    );
    let full = fresh(&chunks, &[worker(0, 0)], Balancer::default());
    assert_eq!(full.left_out.len(), 3);
}

#[test]
fn what_is_wanted_everywhere_goes_everywhere() {
    let chunks = table(10, 3, |_, _| 100);
    let mut workers: Vec<_> = (0..4).map(|id| worker(id, 3000)).collect();
    let all = |workers: &[PlanWorker], previous: &HashMap<usize, Vec<String>>| {
        copied(
            &chunks,
            workers,
            previous,
            Balancer::default(),
            Replicas::All,
        )
    };
    let plan = all(&workers, &HashMap::new());
    assert!(plan.assignments.values().all(|chunks| chunks.len() == 30));
    assert!(plan.left_out.is_empty() && plan.fewer.is_empty());
    // One is gone for now: it keeps its copies. Another one is too small for all of them.
    workers[1].accepts_new = false;
    assert_eq!(all(&workers, &holders(&plan)), plan);
    workers[2].capacity_bytes = 1000;
    let short = all(&workers, &holders(&plan));
    assert_eq!(short.assignments["w1"].len(), 30);
    assert_eq!(short.assignments["w2"].len(), 10);
    assert!(short.left_out.is_empty());
    assert!(short.fewer.iter().all(|(_, lacks)| *lacks == 1));
    let copies: usize = short.assignments.values().map(Vec::len).sum();
    assert_eq!(copies, 100);
    assert_eq!(all(&workers, &holders(&short)), short);
}

#[test]
fn a_second_copy_never_displaces_a_first_one() {
    let chunks = table(20, 2, |_, _| 100);
    let workers: Vec<_> = (0..2).map(|id| worker(id, 2500)).collect();
    let plan = copied(
        &chunks,
        &workers,
        &HashMap::new(),
        Balancer::default(),
        count(2),
    );
    assert!(plan.left_out.is_empty());
    let twice: Vec<usize> = (0..40)
        .filter(|chunk| holders(&plan)[chunk].len() == 2)
        .collect();
    // All room is used, and what lacks its second copy is said.
    assert_eq!(twice.len(), 10);
    let lacks: Vec<usize> = (0..40).filter(|chunk| !twice.contains(chunk)).collect();
    assert_eq!(
        plan.fewer,
        lacks.iter().map(|c| (*c, 1)).collect::<Vec<_>>()
    );
}

#[test]
fn a_huge_table_is_planned_in_time() {
    // 20,000 row groups of 16 columns on 40 workers: 320,000 chunks.
    let chunks = table(20_000, 16, |column, group| 1000 + column * 100 + group % 7);
    let workers: Vec<_> = (0..40).map(|id| worker(id, total(&chunks) / 30)).collect();
    let before = std::time::Instant::now();
    let first = fresh(&chunks, &workers, Balancer::default());
    again(&chunks, &workers[1..], &first, Balancer::default());
    // Generous: this is an unoptimised build on a busy machine.
    assert!(
        before.elapsed() < std::time::Duration::from_secs(60),
        "{:?}",
        before.elapsed()
    );
    assert!(first.left_out.is_empty());
}
