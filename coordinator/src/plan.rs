//! Which chunk goes to which worker: a pure function.
//!
//! The rules, strongest first:
//!
//! 1. **Capacity is never exceeded.**
//! 2. **Priority**: a chunk is left out only if it fits nowhere beside the chunks before it.
//! 3. **Stay**: a chunk stays where the previous plan had it, unless that would break the balance.
//! 4. **Together**: the chunks of one row group go to one worker, for one scan task reads them.
//! 5. **Balance**: bounded load by bytes, or the same number of row groups everywhere.
//! 6. **Rendezvous**: what is free to go anywhere goes to the worker that a weighted hash of the
//!    row group ranks highest, so that workers that come and go move about their share and no more.
//!
//! Copies of a chunk lie on different workers. The first copy of every chunk comes before the
//! second one of any: a replica never displaces what would otherwise not be cached at all.
//!
//! It works in two passes. The first gives whole row groups a home and reserves room for them
//! there; the second places chunk by chunk, in priority order, and only it can leave a chunk out.

use std::collections::{BTreeMap, HashMap};

use stoa_layout::Replicas;

use crate::balance::{Homes, absolute_homes, bounded_homes};
use crate::nodes::{Nodes, Rank};

/// A chunk that is wanted. Its position in [`PlanInput::chunks`] is its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanChunk {
    /// A hash of what should stay together: the file's identity and the row group.
    pub group: u64,
    /// What it will take, in its form.
    pub bytes: u64,
}

/// A worker that chunks can be given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanWorker {
    /// The worker's id; each may occur once.
    pub id: String,
    /// The room that is left on it for this table; also its weight.
    pub capacity_bytes: u64,
    /// Whether it may be given what it did not have before. A worker that is gone, but may come
    /// back within its grace, keeps what it has and gets nothing new.
    pub accepts_new: bool,
}

/// How load is spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Balancer {
    /// By bytes, in proportion to capacity: no worker gets more than `load` times its share (or
    /// its share and one row group more, where row groups are so large).
    Bounded {
        /// The largest load in shares; at least 1.
        load: f64,
    },
    /// By number of row groups, whatever their size: every worker within one of the mean.
    Absolute,
}

impl Balancer {
    /// The load that protocol and documentation promise.
    pub const DEFAULT_LOAD: f64 = 1.25;
}

impl Default for Balancer {
    fn default() -> Balancer {
        Balancer::Bounded {
            load: Balancer::DEFAULT_LOAD,
        }
    }
}

/// All that a plan depends on.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// What is wanted, most wanted first.
    pub chunks: &'a [PlanChunk],
    /// Who can take it, in any order.
    pub workers: &'a [PlanWorker],
    /// Where chunks are now, by their position in `chunks`; unknown workers are passed over.
    pub previous: &'a HashMap<usize, Vec<String>>,
    /// How load is spread.
    pub balancer: Balancer,
    /// On how many workers each chunk should lie.
    pub replicas: Replicas,
}

/// Why a chunk has no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// There is no worker that accepts anything.
    NoWorkers,
    /// It is larger than the whole room of every worker.
    TooLarge {
        /// The most room that a worker has for this table.
        largest_capacity_bytes: u64,
    },
    /// What is wanted more has taken the room.
    NoCapacity,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::NoWorkers => write!(f, "no worker accepts chunks"),
            Reason::TooLarge {
                largest_capacity_bytes,
            } => {
                write!(
                    f,
                    "larger than the room of every worker, at most {largest_capacity_bytes} bytes"
                )
            }
            Reason::NoCapacity => {
                write!(f, "the workers' capacity is used up by what is wanted more")
            }
        }
    }
}

/// Where everything goes. Every chunk occurs either in `left_out`, once, or in `assignments`, at
/// most once a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Positions in [`PlanInput::chunks`] by worker, in priority order; every worker has an entry.
    pub assignments: BTreeMap<String, Vec<usize>>,
    /// What has no place, in priority order.
    pub left_out: Vec<(usize, Reason)>,
    /// What has a place but fewer copies than wanted, in priority order, and how many it lacks of
    /// as many as there are workers to take them.
    pub fewer: Vec<(usize, u32)>,
}

/// Copies that one plan considers, lest a large table that is wanted on every worker of a large
/// cluster takes the coordinator's memory: beyond it there are fewer copies than wanted.
const COPIES_MAX: usize = 8 << 20;

/// The copies that are to be placed: the first ones of all chunks, then the second ones, and so on.
/// A copy's position is its priority.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copies<'a> {
    chunks: &'a [PlanChunk],
    number: usize,
}

impl<'a> Copies<'a> {
    fn new(chunks: &'a [PlanChunk], replicas: Replicas, nodes: &Nodes) -> Copies<'a> {
        let possible = nodes.len().min(COPIES_MAX / chunks.len().max(1)).max(1);
        let number = match replicas {
            Replicas::All => possible,
            Replicas::Count(count) => possible.min(count.get() as usize),
        };
        Copies { chunks, number }
    }

    pub(crate) fn len(&self) -> usize {
        self.chunks.len() * self.number
    }

    /// The chunk of a copy.
    pub(crate) fn chunk(&self, copy: usize) -> usize {
        copy % self.chunks.len()
    }

    /// Which of its chunk's copies it is.
    pub(crate) fn ordinal(&self, copy: usize) -> u32 {
        (copy / self.chunks.len()) as u32
    }

    pub(crate) fn group(&self, copy: usize) -> u64 {
        self.chunks[self.chunk(copy)].group
    }

    pub(crate) fn bytes(&self, copy: usize) -> u64 {
        self.chunks[self.chunk(copy)].bytes
    }

    /// Where each copy was. Which one of a chunk's copies lies where means nothing, so they are put
    /// in the order that looks the same every time; workers that are there come first.
    fn previous(
        &self,
        of_chunk: &HashMap<usize, Vec<String>>,
        nodes: &Nodes,
    ) -> Vec<Option<usize>> {
        let mut previous = vec![None; self.len()];
        for (chunk, workers) in of_chunk {
            let Some(group) = self.chunks.get(*chunk).map(|chunk| chunk.group) else {
                continue;
            };
            let mut at: Vec<usize> = workers.iter().filter_map(|id| nodes.position(id)).collect();
            at.sort_by(|a, b| {
                let standing = |node: usize| (nodes[node].accepts_new, nodes.score(group, node));
                let (a_new, a_score) = standing(*a);
                let (b_new, b_score) = standing(*b);
                b_new
                    .cmp(&a_new)
                    .then(b_score.total_cmp(&a_score))
                    .then(a.cmp(b))
            });
            at.dedup();
            for (ordinal, node) in at.into_iter().take(self.number).enumerate() {
                previous[ordinal * self.chunks.len() + chunk] = Some(node);
            }
        }
        previous
    }
}

/// Places chunks on workers. Deterministic: equal inputs, equal plans, on every machine.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let mut nodes = Nodes::new(input.workers, input.balancer);
    if input.replicas == Replicas::All
        && let Some(plan) = everything_everywhere(input, &nodes)
    {
        return plan;
    }
    let copies = Copies::new(input.chunks, input.replicas, &nodes);
    let previous = copies.previous(input.previous, &nodes);
    let admitted = admit(&copies, &previous, &nodes);
    let homes = match input.balancer {
        Balancer::Bounded { load } => {
            bounded_homes(&copies, &previous, &admitted, &mut nodes, load.max(1.0))
        }
        Balancer::Absolute => absolute_homes(&copies, &previous, &admitted, &mut nodes),
    };
    place(&copies, &previous, &homes, &mut nodes)
}

/// The plan where every worker has room for everything: nothing is to be balanced then. Workers
/// that are gone keep what they have. `None` where room is short.
fn everything_everywhere(input: &PlanInput<'_>, nodes: &Nodes) -> Option<Plan> {
    let total: u128 = input.chunks.iter().map(|c| u128::from(c.bytes)).sum();
    let mut taking = nodes.iter().filter(|node| node.accepts_new).peekable();
    taking.peek()?;
    if taking.any(|node| u128::from(node.capacity) < total) {
        return None;
    }
    let kept = |id: &str, capacity: u64| {
        let mut room = capacity;
        let keeps = |chunk: &usize| {
            let had = input.previous.get(chunk);
            let bytes = input.chunks[*chunk].bytes;
            let keeps = had.is_some_and(|had| had.iter().any(|w| w == id)) && bytes <= room;
            room -= if keeps { bytes } else { 0 };
            keeps
        };
        (0..input.chunks.len()).filter(keeps).collect()
    };
    let assignments = nodes.iter().map(|node| {
        let chunks = match node.accepts_new {
            true => (0..input.chunks.len()).collect(),
            false => kept(&node.id, node.capacity),
        };
        (node.id.clone(), chunks)
    });
    Some(Plan {
        assignments: assignments.collect(),
        ..Plan::default()
    })
}

/// What would fit if the workers were one, by priority. What this passes over gets no home, but is
/// placed all the same should room be left in the end.
fn admit(copies: &Copies<'_>, previous: &[Option<usize>], nodes: &Nodes) -> Vec<bool> {
    let mut kept = vec![0u64; nodes.len()];
    for (copy, at) in previous.iter().enumerate() {
        if let Some(at) = at {
            kept[*at] = kept[*at].saturating_add(copies.bytes(copy));
        }
    }
    let mut room: u128 = 0;
    for (node, kept) in nodes.iter().zip(kept) {
        let usable = if node.accepts_new {
            node.capacity
        } else {
            node.capacity.min(kept)
        };
        room += u128::from(usable);
    }
    let largest = nodes.iter().map(|node| node.capacity).max().unwrap_or(0);
    (0..copies.len())
        .map(|copy| {
            let bytes = copies.bytes(copy);
            let fits = bytes <= largest && u128::from(bytes) <= room;
            if fits {
                room -= u128::from(bytes);
            }
            fits
        })
        .collect()
}

/// The second pass: copy by copy in priority order, home first.
fn place(
    copies: &Copies<'_>,
    previous: &[Option<usize>],
    homes: &Homes,
    nodes: &mut Nodes,
) -> Plan {
    let chunks = copies.chunks;
    let mut placed: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut holders: Vec<Vec<usize>> = vec![Vec::new(); chunks.len()];
    let mut unplaced: HashMap<usize, Reason> = HashMap::new();
    let mut ranks: HashMap<u64, Vec<Rank>> = HashMap::new();
    for (copy, previous) in previous.iter().enumerate() {
        let (chunk, bytes) = (copies.chunk(copy), copies.bytes(copy));
        let home = homes.of_copy[copy].and_then(|unit| homes.units[unit as usize].home);
        if let Some(home) = home {
            nodes[home].reserved -= bytes;
        }
        let taken = &holders[chunk];
        let at = match home {
            Some(home) if nodes[home].fits(bytes) && !taken.contains(&home) => Some(home),
            _ => {
                let group = copies.group(copy);
                let rank = ranks.entry(group).or_insert_with(|| nodes.rank(group));
                nodes.spill(bytes, *previous, rank, taken)
            }
        };
        match at {
            Some(at) => {
                nodes[at].load += bytes;
                placed[at].push(chunk);
                holders[chunk].push(at);
            }
            None => drop(unplaced.entry(chunk).or_insert_with(|| nodes.reason(bytes))),
        }
    }
    // Copies came one after the other; a worker's list is by the priority of the chunks.
    placed.iter_mut().for_each(|chunks| chunks.sort_unstable());
    let taking = nodes.iter().filter(|node| node.accepts_new).count();
    let wanted = copies.number.min(taking);
    let short = |(chunk, holders): (usize, &Vec<usize>)| {
        let lacks = wanted.saturating_sub(holders.len());
        (!holders.is_empty() && lacks > 0).then_some((chunk, lacks as u32))
    };
    let fewer = holders.iter().enumerate().filter_map(short).collect();
    let left_out = (0..chunks.len())
        .filter(|chunk| holders[*chunk].is_empty())
        .filter_map(|chunk| Some((chunk, *unplaced.get(&chunk)?)))
        .collect();
    let assignments = nodes
        .iter()
        .map(|node| node.id.clone())
        .zip(placed)
        .collect();
    Plan {
        assignments,
        left_out,
        fewer,
    }
}

/// Copies that go together, grouped for the first pass.
pub(crate) fn units_by(
    copies: &Copies<'_>,
    admitted: &[bool],
    mut part: impl FnMut(usize) -> Option<usize>,
) -> Homes {
    let mut of_key: HashMap<(u64, u32, Option<usize>), u32> = HashMap::new();
    let mut homes = Homes {
        units: Vec::new(),
        of_copy: vec![None; copies.len()],
        of_group: HashMap::new(),
    };
    for copy in (0..copies.len()).filter(|copy| admitted[*copy]) {
        let (group, ordinal, previous) = (copies.group(copy), copies.ordinal(copy), part(copy));
        let unit = *of_key
            .entry((group, ordinal, previous))
            .or_insert_with(|| homes.begin(group, ordinal, previous));
        homes.units[unit as usize].bytes += copies.bytes(copy);
        homes.of_copy[copy] = Some(unit);
    }
    homes
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
