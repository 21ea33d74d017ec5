//! The first pass of a plan: homes for whole row groups, by one of two balancers.

use std::collections::HashMap;

use crate::nodes::Nodes;
use crate::plan::{Copies, units_by};

/// Chunks of one row group that go together; of each the same copy.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) group: u64,
    /// Which copy.
    pub(crate) ordinal: u32,
    pub(crate) bytes: u64,
    /// Where it was before.
    pub(crate) previous: Option<usize>,
    /// Where it goes; its bytes are reserved there.
    pub(crate) home: Option<usize>,
}

/// The outcome of the first pass.
#[derive(Clone, Debug)]
pub(crate) struct Homes {
    /// In the order of their first chunks.
    pub(crate) units: Vec<Unit>,
    /// The unit of each copy; `None` for those that were not admitted.
    pub(crate) of_copy: Vec<Option<u32>>,
    /// The units of each row group.
    pub(crate) of_group: HashMap<u64, Vec<u32>>,
}

impl Homes {
    /// A new unit without chunks.
    pub(crate) fn begin(&mut self, group: u64, ordinal: u32, previous: Option<usize>) -> u32 {
        let number = self.units.len() as u32;
        self.units.push(Unit {
            group,
            ordinal,
            bytes: 0,
            previous,
            home: None,
        });
        self.of_group.entry(group).or_default().push(number);
        number
    }

    /// Whether another copy of the unit's row group lives at this worker.
    fn is_taken(&self, unit: usize, node: usize) -> bool {
        let Unit { group, ordinal, .. } = self.units[unit];
        let others = self.of_group.get(&group).into_iter().flatten();
        others
            .map(|other| &self.units[*other as usize])
            .any(|other| other.ordinal != ordinal && other.home == Some(node))
    }

    fn settle(&mut self, unit: usize, node: usize, nodes: &mut Nodes) {
        let unit = &mut self.units[unit];
        unit.home = Some(node);
        nodes[node].reserved += unit.bytes;
    }
}

/// Bounded load: what is there stays, the rest follows the rendezvous, workers with far less than
/// their share draw what ranks them higher than where it is, and what is then still beyond the
/// limits of its worker goes elsewhere.
///
/// A unit is the part of a row group that was at one worker before: when a version adds a column,
/// the columns that are there stay whatever becomes of the new one.
pub(crate) fn bounded_homes(
    copies: &Copies<'_>,
    previous: &[Option<usize>],
    admitted: &[bool],
    nodes: &mut Nodes,
    load: f64,
) -> Homes {
    let mut homes = units_by(copies, admitted, |copy| previous[copy]);
    keep(&mut homes, nodes, false);
    set_limits(&homes, nodes, load);
    keep(&mut homes, nodes, true);
    settle_the_homeless(&mut homes, nodes);
    draw_to_the_hungry(&mut homes, nodes, load);
    if shed(&mut homes, nodes) {
        settle_the_homeless(&mut homes, nodes);
    }
    homes
}

/// What is there stays, as far as capacity goes, on the workers that accept new chunks or on those
/// that are gone for now and keep theirs until their grace is over.
fn keep(homes: &mut Homes, nodes: &mut Nodes, accepts_new: bool) {
    for unit in 0..homes.units.len() {
        let Unit {
            bytes, previous, ..
        } = homes.units[unit];
        if let Some(at) = previous
            && nodes[at].accepts_new == accepts_new
            && nodes[at].fits_within(bytes, u64::MAX)
        {
            homes.settle(unit, at, nodes);
        }
    }
}

/// Homes for what has none: beside the rest of its row group, or by rank, within the limits.
fn settle_the_homeless(homes: &mut Homes, nodes: &mut Nodes) {
    let mut company = most_of_each_group(homes);
    for unit in 0..homes.units.len() {
        let Unit {
            group,
            ordinal,
            bytes,
            home,
            ..
        } = homes.units[unit];
        if home.is_some() {
            continue;
        }
        let fits = |node: usize| {
            nodes[node].accepts_new
                && nodes[node].fits_within(bytes, nodes[node].limit)
                && !homes.is_taken(unit, node)
        };
        let with_its_own = company
            .get(&(group, ordinal))
            .copied()
            .filter(|node| fits(*node));
        let at = with_its_own.or_else(|| {
            nodes
                .rank(group)
                .iter()
                .map(|rank| rank.node)
                .find(|node| fits(*node))
        });
        if let Some(at) = at {
            homes.settle(unit, at, nodes);
            company.entry((group, ordinal)).or_insert(at);
        }
    }
}

/// Takes from workers beyond their limits what is wanted least, and says whether there was any.
fn shed(homes: &mut Homes, nodes: &mut Nodes) -> bool {
    let mut any = false;
    for unit in homes.units.iter_mut().rev() {
        if let Some(at) = unit.home
            && nodes[at].accepts_new
            && nodes[at].reserved > nodes[at].limit
        {
            nodes[at].reserved -= unit.bytes;
            unit.home = None;
            any = true;
        }
    }
    any
}

/// Shares in proportion to capacity, of what is not on workers that are gone. One worker is always
/// at or below its share, so a limit of the share and the largest row group can always be kept.
fn set_limits(homes: &Homes, nodes: &mut Nodes, load: f64) {
    let total: u128 = homes.units.iter().map(|unit| u128::from(unit.bytes)).sum();
    let on_the_gone: u128 = nodes.iter().map(|node| u128::from(node.reserved)).sum();
    let rest = total - on_the_gone;
    let capacity: u128 = nodes
        .iter()
        .filter(|node| node.accepts_new)
        .map(|node| u128::from(node.capacity))
        .sum();
    let mut groups: HashMap<(u64, u32), u64> = HashMap::new();
    for unit in &homes.units {
        *groups.entry((unit.group, unit.ordinal)).or_default() += unit.bytes;
    }
    let largest = groups.into_values().max().unwrap_or(0);
    for node in nodes.iter_mut() {
        if !node.accepts_new {
            node.share = node.reserved;
            node.limit = node.reserved;
        } else {
            // The share is at most the capacity: what is admitted fits into all of them together.
            let share = (rest * u128::from(node.capacity))
                .checked_div(capacity)
                .unwrap_or(0) as u64;
            let bound = ((share as f64 * load) as u64).max(share.saturating_add(largest));
            node.share = share;
            node.limit = bound.min(node.capacity);
        }
    }
}

/// The worker with the most bytes of each row group's copies, among those settled.
fn most_of_each_group(homes: &Homes) -> HashMap<(u64, u32), usize> {
    let mut most: HashMap<(u64, u32), (u64, usize)> = HashMap::new();
    for unit in &homes.units {
        if let Some(home) = unit.home {
            let entry = most
                .entry((unit.group, unit.ordinal))
                .or_insert((unit.bytes, home));
            if unit.bytes > entry.0 {
                *entry = (unit.bytes, home);
            }
        }
    }
    most.into_iter()
        .map(|(group, (_, home))| (group, home))
        .collect()
}

/// A worker that joined, or grew, gets what ranks it highest, up to its share. Bounded load alone
/// would leave it empty as long as nobody else is overloaded.
fn draw_to_the_hungry(homes: &mut Homes, nodes: &mut Nodes, load: f64) {
    let hungry: Vec<usize> = (0..nodes.len())
        .filter(|node| {
            let node = &nodes[*node];
            node.accepts_new && (node.reserved as f64) < node.share as f64 / load
        })
        .collect();
    if hungry.is_empty() {
        return;
    }
    let fullness = |reserved: u64, share: u64| reserved as f64 / share.max(1) as f64;
    for unit in 0..homes.units.len() {
        let Unit {
            group,
            bytes,
            previous,
            home,
            ..
        } = homes.units[unit];
        let Some(home) = home.filter(|home| previous == Some(*home) && nodes[*home].accepts_new)
        else {
            continue;
        };
        let here = nodes.score(group, home);
        let better = hungry
            .iter()
            .filter(|node| **node != home && !homes.is_taken(unit, **node))
            .map(|node| (nodes.score(group, *node), *node))
            .filter(|(score, node)| {
                let to = &nodes[*node];
                let after = fullness(to.reserved + bytes, to.share);
                *score > here
                    && to.fits_within(bytes, to.share)
                    && after < fullness(nodes[home].reserved, nodes[home].share)
            })
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, node)) = better {
            nodes[home].reserved -= bytes;
            homes.settle(unit, node, nodes);
        }
    }
}

/// The absolute balancer: every worker has as many row groups as the mean, rounded down or up.
pub(crate) fn absolute_homes(
    copies: &Copies<'_>,
    previous: &[Option<usize>],
    admitted: &[bool],
    nodes: &mut Nodes,
) -> Homes {
    let mut homes = units_by(copies, admitted, |copy| previous[copy]);
    let mains = main_units(&homes);
    let quotas = quotas(&homes, &mains, nodes);
    let mut counts = vec![0usize; nodes.len()];
    for &unit in &mains {
        let Unit {
            bytes, previous, ..
        } = homes.units[unit];
        if let Some(at) = previous
            && counts[at] < quotas[at]
            && nodes[at].fits_within(bytes, u64::MAX)
        {
            homes.settle(unit, at, nodes);
            counts[at] += 1;
        }
    }
    // Parts of row groups that capacity forced elsewhere stay there, and do not count.
    let mut is_main = vec![false; homes.units.len()];
    mains.iter().for_each(|unit| is_main[*unit] = true);
    for unit in (0..homes.units.len()).filter(|unit| !is_main[*unit]) {
        let Unit {
            bytes, previous, ..
        } = homes.units[unit];
        if let Some(at) = previous.filter(|at| nodes[*at].fits_within(bytes, u64::MAX)) {
            homes.settle(unit, at, nodes);
        }
    }
    for &unit in &mains {
        let Unit {
            group, bytes, home, ..
        } = homes.units[unit];
        if home.is_some() {
            continue;
        }
        let ranks = nodes.rank(group);
        let fits = |node: &usize| {
            nodes[*node].fits_within(bytes, u64::MAX) && !homes.is_taken(unit, *node)
        };
        let ranked = || ranks.iter().map(|rank| rank.node).filter(fits);
        // Where capacity forbids the balance, the balance yields.
        let at = ranked()
            .find(|node| counts[*node] < quotas[*node])
            .or_else(|| ranked().min_by_key(|node| counts[*node]));
        if let Some(at) = at {
            homes.settle(unit, at, nodes);
            counts[at] += 1;
        }
    }
    let company = most_of_each_group(&homes);
    for unit in 0..homes.units.len() {
        let Unit {
            group,
            ordinal,
            bytes,
            home,
            ..
        } = homes.units[unit];
        let at = company.get(&(group, ordinal)).copied().filter(|at| {
            nodes[*at].accepts_new
                && nodes[*at].fits_within(bytes, u64::MAX)
                && !homes.is_taken(unit, *at)
        });
        if let (None, Some(at)) = (home, at) {
            homes.settle(unit, at, nodes);
        }
    }
    homes
}

/// The unit that stands for a copy of its row group: the largest of those that were somewhere.
fn main_units(homes: &Homes) -> Vec<usize> {
    let mut main: HashMap<(u64, u32), usize> = HashMap::new();
    for (position, unit) in homes.units.iter().enumerate() {
        let best = main.entry((unit.group, unit.ordinal)).or_insert(position);
        let standing = |unit: &Unit| (unit.previous.is_some(), unit.bytes);
        if standing(unit) > standing(&homes.units[*best]) {
            *best = position;
        }
    }
    let mut mains: Vec<usize> = main.into_values().collect();
    mains.sort_unstable();
    mains
}

/// How many row groups each worker should have: the mean rounded up for those that have the most
/// already, rounded down for the others. Workers that are gone keep theirs up to the mean.
fn quotas(homes: &Homes, mains: &[usize], nodes: &Nodes) -> Vec<usize> {
    let mut kept = vec![0usize; nodes.len()];
    for &unit in mains {
        if let Some(at) = homes.units[unit].previous {
            kept[at] += 1;
        }
    }
    let mut quotas = vec![0; nodes.len()];
    let mut left = mains.len();
    let ceiling = left.div_ceil(nodes.len().max(1));
    let (mut taking, gone): (Vec<usize>, Vec<usize>) =
        (0..nodes.len()).partition(|node| nodes[*node].accepts_new);
    for node in gone {
        quotas[node] = kept[node].min(ceiling);
        left -= quotas[node].min(left);
    }
    if taking.is_empty() {
        return quotas;
    }
    taking.sort_by_key(|node| std::cmp::Reverse(kept[*node]));
    let (floor, extra) = (left / taking.len(), left % taking.len());
    for (position, node) in taking.into_iter().enumerate() {
        quotas[node] = floor + usize::from(position < extra);
    }
    quotas
}
