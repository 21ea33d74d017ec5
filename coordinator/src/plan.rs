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
//! It works in two passes. The first gives whole row groups a home and reserves room for them
//! there; the second places chunk by chunk, in priority order, and only it can leave a chunk out.

use std::collections::{BTreeMap, HashMap};

use crate::balance::{Homes, Unit, absolute_homes, bounded_homes};
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
    pub previous: &'a HashMap<usize, String>,
    /// How load is spread.
    pub balancer: Balancer,
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

/// Where everything goes. Every chunk occurs exactly once, in `assignments` or in `left_out`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Positions in [`PlanInput::chunks`] by worker, in priority order; every worker has an entry.
    pub assignments: BTreeMap<String, Vec<usize>>,
    /// What has no place, in priority order.
    pub left_out: Vec<(usize, Reason)>,
}

/// Places chunks on workers. Deterministic: equal inputs, equal plans, on every machine.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let mut nodes = Nodes::new(input.workers, input.balancer);
    let previous: Vec<Option<usize>> = (0..input.chunks.len())
        .map(|chunk| input.previous.get(&chunk).and_then(|id| nodes.position(id)))
        .collect();
    let admitted = admit(input.chunks, &previous, &nodes);
    let homes = match input.balancer {
        Balancer::Bounded { load } => bounded_homes(
            input.chunks,
            &previous,
            &admitted,
            &mut nodes,
            load.max(1.0),
        ),
        Balancer::Absolute => absolute_homes(input.chunks, &previous, &admitted, &mut nodes),
    };
    place(input.chunks, &previous, &homes, &mut nodes)
}

/// What would fit if the workers were one, by priority. What this passes over gets no home, but is
/// placed all the same should room be left in the end.
fn admit(chunks: &[PlanChunk], previous: &[Option<usize>], nodes: &Nodes) -> Vec<bool> {
    let mut kept = vec![0u64; nodes.len()];
    for (chunk, at) in chunks.iter().zip(previous) {
        if let Some(at) = at {
            kept[*at] = kept[*at].saturating_add(chunk.bytes);
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
    chunks
        .iter()
        .map(|chunk| {
            let fits = chunk.bytes <= largest && u128::from(chunk.bytes) <= room;
            if fits {
                room -= u128::from(chunk.bytes);
            }
            fits
        })
        .collect()
}

/// The second pass: chunk by chunk in priority order, home first.
fn place(
    chunks: &[PlanChunk],
    previous: &[Option<usize>],
    homes: &Homes,
    nodes: &mut Nodes,
) -> Plan {
    let mut placed: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut left_out = Vec::new();
    let mut ranks: HashMap<u64, Vec<Rank>> = HashMap::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let home = homes.of_chunk[index].and_then(|unit| homes.units[unit as usize].home);
        if let Some(home) = home {
            nodes[home].reserved -= chunk.bytes;
        }
        let at = match home {
            Some(home) if nodes[home].fits(chunk.bytes) => Some(home),
            _ => {
                let rank = ranks
                    .entry(chunk.group)
                    .or_insert_with(|| nodes.rank(chunk.group));
                nodes.spill(chunk.bytes, previous[index], rank)
            }
        };
        match at {
            Some(at) => {
                nodes[at].load += chunk.bytes;
                placed[at].push(index);
            }
            None => left_out.push((index, nodes.reason(chunk.bytes))),
        }
    }
    let assignments = nodes
        .iter()
        .map(|node| node.id.clone())
        .zip(placed)
        .collect();
    Plan {
        assignments,
        left_out,
    }
}

/// Chunks that go together, grouped for the first pass.
pub(crate) fn units_by(
    chunks: &[PlanChunk],
    admitted: &[bool],
    mut part: impl FnMut(usize) -> Option<usize>,
) -> Homes {
    let mut of_key: HashMap<(u64, Option<usize>), u32> = HashMap::new();
    let mut homes = Homes {
        units: Vec::new(),
        of_chunk: vec![None; chunks.len()],
    };
    for (index, chunk) in chunks.iter().enumerate() {
        if !admitted[index] {
            continue;
        }
        let previous = part(index);
        let unit = *of_key.entry((chunk.group, previous)).or_insert_with(|| {
            homes.units.push(Unit {
                group: chunk.group,
                bytes: 0,
                previous,
                home: None,
            });
            (homes.units.len() - 1) as u32
        });
        homes.units[unit as usize].bytes += chunk.bytes;
        homes.of_chunk[index] = Some(unit);
    }
    homes
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
