//! Workers while a plan is being made: their room, their shares and their rank for a row group.

use std::ops::{Index, IndexMut};

use twox_hash::XxHash3_64;

use crate::plan::{Balancer, PlanWorker, Reason};

/// More than any worker has: 1 PiB.
const CAPACITY_BYTES_MAX: u64 = 1 << 50;

/// One worker while a plan is being made.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) capacity: u64,
    pub(crate) accepts_new: bool,
    /// Bytes of units whose home this is and that are not placed yet.
    pub(crate) reserved: u64,
    /// Bytes that are placed.
    pub(crate) load: u64,
    /// Bytes that it should have.
    pub(crate) share: u64,
    /// Bytes that it should not exceed; never above its capacity.
    pub(crate) limit: u64,
    seed: u64,
    weight: f64,
}

impl Node {
    /// Whether it has room beside what is placed, though not beside what is reserved.
    pub(crate) fn fits(&self, bytes: u64) -> bool {
        self.load.saturating_add(bytes) <= self.capacity
    }

    /// What is or will be there.
    pub(crate) fn expected(&self) -> u64 {
        self.load.saturating_add(self.reserved)
    }

    /// Whether it has room beside all that is expected, up to `limit`.
    pub(crate) fn fits_within(&self, bytes: u64, limit: u64) -> bool {
        self.expected().saturating_add(bytes) <= limit.min(self.capacity)
    }
}

/// A worker's standing for one row group; higher is better.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rank {
    pub(crate) node: usize,
    pub(crate) score: f64,
}

/// All workers of a plan, sorted by id.
#[derive(Clone, Debug)]
pub(crate) struct Nodes(Vec<Node>);

impl Nodes {
    pub(crate) fn new(workers: &[PlanWorker], balancer: Balancer) -> Nodes {
        let mut nodes: Vec<Node> = workers
            .iter()
            .map(|worker| Node {
                id: worker.id.clone(),
                // Sums over all workers stay far from overflowing, whatever they claim.
                capacity: worker.capacity_bytes.min(CAPACITY_BYTES_MAX),
                accepts_new: worker.accepts_new,
                reserved: 0,
                load: 0,
                share: 0,
                limit: 0,
                seed: XxHash3_64::oneshot(worker.id.as_bytes()),
                weight: match balancer {
                    Balancer::Bounded { .. } => worker.capacity_bytes as f64,
                    Balancer::Absolute => 1.0,
                },
            })
            .collect();
        nodes.sort_by(|a, b| a.id.cmp(&b.id));
        nodes.dedup_by(|a, b| a.id == b.id);
        Nodes(nodes)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Node> {
        self.0.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> std::slice::IterMut<'_, Node> {
        self.0.iter_mut()
    }

    pub(crate) fn position(&self, id: &str) -> Option<usize> {
        self.0
            .binary_search_by(|node| node.id.as_str().cmp(id))
            .ok()
    }

    /// A worker's score for a row group: weighted rendezvous hashing. When a worker comes or goes,
    /// the scores of all others stay; a worker wins in proportion to its weight.
    pub(crate) fn score(&self, group: u64, node: usize) -> f64 {
        let node = &self.0[node];
        let mut key = [0u8; 16];
        key[..8].copy_from_slice(&group.to_le_bytes());
        key[8..].copy_from_slice(&node.seed.to_le_bytes());
        // 53 bits, moved off 0 and 1: the logarithm is finite and not 0.
        let unit = ((XxHash3_64::oneshot(&key) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        node.weight / -unit.ln()
    }

    /// The workers that accept new chunks, best first.
    pub(crate) fn rank(&self, group: u64) -> Vec<Rank> {
        let mut ranks: Vec<Rank> = (0..self.len())
            .filter(|node| self.0[*node].accepts_new && self.0[*node].capacity > 0)
            .map(|node| Rank {
                node,
                score: self.score(group, node),
            })
            .collect();
        // The sort is stable and the nodes are in the order of their ids: ties are settled.
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        ranks
    }

    /// A place for one chunk that has no home, or whose home is full; `taken` has copies of it.
    pub(crate) fn spill(
        &self,
        bytes: u64,
        previous: Option<usize>,
        ranks: &[Rank],
        taken: &[usize],
    ) -> Option<usize> {
        let previous = previous.filter(|node| !taken.contains(node));
        let undisturbing = |node: usize| self.0[node].fits_within(bytes, u64::MAX);
        let free = |node: &usize| !taken.contains(node);
        let ranked = || ranks.iter().map(|rank| rank.node).filter(free);
        let overshoot = |node: usize| {
            let node = &self.0[node];
            node.expected() as i128 - node.share as i128
        };
        previous
            .filter(|node| undisturbing(*node))
            .or_else(|| ranked().find(|node| self.0[*node].fits_within(bytes, self.0[*node].limit)))
            // Beyond the balance, as little as possible, rather than not at all.
            .or_else(|| {
                ranked()
                    .filter(|node| undisturbing(*node))
                    .min_by_key(|node| overshoot(*node))
            })
            // Into room that is reserved for chunks that are wanted less.
            .or_else(|| previous.filter(|node| self.0[*node].fits(bytes)))
            .or_else(|| ranked().find(|node| self.0[*node].fits(bytes)))
    }

    /// Why a chunk of this size found no place.
    pub(crate) fn reason(&self, bytes: u64) -> Reason {
        let accepting = self.iter().filter(|node| node.accepts_new);
        match accepting.map(|node| node.capacity).max() {
            None => Reason::NoWorkers,
            Some(largest) if bytes > largest => Reason::TooLarge {
                largest_capacity_bytes: largest,
            },
            Some(_) => Reason::NoCapacity,
        }
    }
}

impl Index<usize> for Nodes {
    type Output = Node;

    fn index(&self, node: usize) -> &Node {
        &self.0[node]
    }
}

impl IndexMut<usize> for Nodes {
    fn index_mut(&mut self, node: usize) -> &mut Node {
        &mut self.0[node]
    }
}
