//! Which chunks are kept, fetched, left out and dropped: what a plan asks for against what is held.
//!
//! Pure: what is held, what is known of sizes and failures, and the budget arrive as arguments.

use std::collections::{HashMap, HashSet};

use stoa_layout::Form;
use stoa_shm::{ChunkKey, ChunkLocation};

/// What an entry costs beside its bytes: its lines in the index, now and in the next generation,
/// and in the segment's footer.
pub const ENTRY_OVERHEAD_BYTES: u64 = 320;

/// The tag that the index holds for a form.
pub fn form_tag(form: Form) -> u8 {
    match form {
        Form::Arrow => stoa_forms::FORM_ARROW,
        Form::Packed => stoa_forms::FORM_PACKED,
        // What this build cannot make, it keeps as it is in the file.
        _ => stoa_forms::FORM_PARQUET,
    }
}

/// What `bytes` of a chunk take from the budget.
pub fn footprint(bytes: u64) -> u64 {
    bytes
        .next_multiple_of(stoa_shm::CHUNK_ALIGN)
        .saturating_add(ENTRY_OVERHEAD_BYTES)
}

/// One chunk that a plan names, found in a table's catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The chunk.
    pub key: ChunkKey,
    /// The table that asked for it first, as a position in the list of tables.
    pub table: usize,
    /// Other tables that asked for it too.
    pub also: Vec<usize>,
    /// The file's position in that table's catalog.
    pub file: u32,
    /// The form the plan asks for.
    pub form: Form,
    /// Estimated bytes in that form.
    pub bytes: u64,
    /// Bytes to be fetched for it.
    pub compressed_bytes: u64,
    /// Bytes that it is decoded to on its way, whatever its form.
    pub decoded_bytes: u64,
}

/// Merges the lists of several tables by relative rank, so that each table gets its most wanted
/// share when not all fits. A chunk that several tables want appears once.
pub fn merge(lists: Vec<Vec<Want>>) -> Vec<Want> {
    let mut ranked: Vec<(f64, usize, Want)> = Vec::with_capacity(lists.iter().map(Vec::len).sum());
    for (table, list) in lists.into_iter().enumerate() {
        let length = list.len().max(1) as f64;
        ranked.extend(
            list.into_iter()
                .enumerate()
                .map(|(at, want)| (at as f64 / length, table, want)),
        );
    }
    // Stable: equal ranks keep the order of tables, and a table's own order always holds.
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut merged: Vec<Want> = Vec::with_capacity(ranked.len());
    let mut at: HashMap<ChunkKey, usize> = HashMap::with_capacity(ranked.len());
    for (_, table, want) in ranked {
        match at.get(&want.key) {
            Some(&first) => {
                let first = &mut merged[first];
                if first.table != table && !first.also.contains(&table) {
                    first.also.push(table);
                }
            }
            None => {
                at.insert(want.key.clone(), merged.len());
                merged.push(want);
            }
        }
    }
    merged
}

/// What is known of chunks beside the plan.
#[derive(Debug, Default)]
pub struct Known {
    /// Bytes of chunks that were encoded before, where they are not held.
    pub sizes: HashMap<ChunkKey, u64>,
    /// Chunks that could not be had, and must not be tried now.
    pub blocked: HashSet<ChunkKey>,
    /// Chunks that have no other form than parquet, though the plan asked for one.
    pub parquet_only: HashSet<ChunkKey>,
}

/// Corrects the estimates of chunks that were never encoded by those of the same table, column and
/// form that were: what a footer says of text that repeats may be many times too much.
pub fn correct_estimates(
    wants: &mut [Want],
    held: &HashMap<ChunkKey, ChunkLocation>,
    known: &Known,
) {
    let kind = |want: &Want| (want.table, want.key.column, form_tag(want.form));
    let actual = |want: &Want| {
        let location = held.get(&want.key);
        let held = location.filter(|location| location.form == form_tag(want.form));
        let held = held.map(|location| location.length);
        held.or_else(|| known.sizes.get(&want.key).copied())
    };
    let mut sums: HashMap<(usize, u32, u8), (u128, u128)> = HashMap::new();
    for want in wants.iter() {
        if let Some(actual) = actual(want) {
            let (estimated, encoded) = sums.entry(kind(want)).or_default();
            *estimated += u128::from(want.bytes);
            *encoded += u128::from(actual);
        }
    }
    for want in wants {
        let sums = sums
            .get(&kind(want))
            .filter(|(estimated, _)| *estimated > 0);
        if let Some((estimated, encoded)) = sums
            && actual(want).is_none()
        {
            let corrected = u128::from(want.bytes) * encoded / estimated;
            want.bytes = u64::try_from(corrected).unwrap_or(u64::MAX);
        }
    }
}

/// What to do about each chunk; positions are those in the list of wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Held in the wanted form: neither fetched nor copied.
    pub keep: Vec<usize>,
    /// To be fetched, most wanted first.
    pub fetch: Vec<usize>,
    /// Without room in the budget.
    pub left_out: Vec<usize>,
    /// Not to be had at the moment, and not held.
    pub blocked: Vec<usize>,
    /// Held and wanted no more, or without room.
    pub drop: Vec<ChunkKey>,
    /// Sizes of held chunks without room: to be put into [`Known::sizes`], lest they are fetched
    /// again on an estimate that says that they fit.
    pub learned: Vec<(ChunkKey, u64)>,
    /// Footprint of what is kept, protected chunks included.
    pub keep_bytes: u64,
    /// Expected footprint of what is fetched.
    pub fetch_bytes: u64,
}

/// Decides what happens to every chunk under `budget_bytes`.
///
/// Walks the wants from the most wanted on and admits what fits, so that a large chunk without
/// room does not stop the smaller ones behind it. Chunks that are held and not wanted are dropped,
/// unless `protected`: while a table's plan is unknown, nothing says that its chunks are not wanted.
pub fn decide(
    wants: &[Want],
    held: &HashMap<ChunkKey, ChunkLocation>,
    known: &Known,
    budget_bytes: u64,
    protected: &dyn Fn(&ChunkKey) -> bool,
) -> Decision {
    let mut decision = Decision::default();
    let mut stays: HashSet<&ChunkKey> = HashSet::with_capacity(held.len());
    let mut used = 0u64;
    let wanted: HashSet<&ChunkKey> = wants.iter().map(|want| &want.key).collect();
    for (key, location) in held {
        if !wanted.contains(key) && protected(key) {
            stays.insert(key);
            used = used.saturating_add(footprint(location.length));
        }
    }
    for (at, want) in wants.iter().enumerate() {
        let location = held.get(&want.key);
        let right_form = location.is_some_and(|location| {
            location.form == form_tag(want.form)
                || (location.form == stoa_forms::FORM_PARQUET
                    && known.parquet_only.contains(&want.key))
        });
        let blocked = known.blocked.contains(&want.key);
        let bytes = match location {
            // A chunk that cannot be had anew stays in the form it has.
            Some(location) if right_form || blocked => location.length,
            _ => known.sizes.get(&want.key).copied().unwrap_or(want.bytes),
        };
        if blocked && location.is_none() {
            decision.blocked.push(at);
            continue;
        }
        let footprint = footprint(bytes);
        if used.saturating_add(footprint) > budget_bytes {
            decision.left_out.push(at);
            if location.is_some() && right_form {
                decision.learned.push((want.key.clone(), bytes));
            }
            continue;
        }
        used += footprint;
        if location.is_some() {
            stays.insert(&want.key);
        }
        if right_form || blocked {
            decision.keep.push(at);
        } else {
            decision.fetch_bytes += footprint;
            decision.fetch.push(at);
        }
    }
    decision.keep_bytes = used - decision.fetch_bytes;
    decision.drop = held
        .keys()
        .filter(|key| !stays.contains(key))
        .cloned()
        .collect();
    decision
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use stoa_shm::SegmentId;

    use super::*;

    fn key(row_group: u32, column: u32) -> ChunkKey {
        ChunkKey {
            file: Arc::from(&b"file"[..]),
            row_group,
            column,
        }
    }

    fn want(row_group: u32, bytes: u64) -> Want {
        Want {
            key: key(row_group, 0),
            table: 0,
            also: vec![],
            file: 0,
            form: Form::Arrow,
            bytes,
            compressed_bytes: bytes / 3,
            decoded_bytes: bytes,
        }
    }

    fn location(length: u64, form: u8) -> ChunkLocation {
        ChunkLocation {
            segment: SegmentId(1),
            offset: 64,
            length,
            form,
            checksum: 0,
            rows: 1,
        }
    }

    fn held(chunks: &[(u32, u64)]) -> HashMap<ChunkKey, ChunkLocation> {
        chunks
            .iter()
            .map(|(rg, n)| (key(*rg, 0), location(*n, stoa_forms::FORM_ARROW)))
            .collect()
    }

    fn budget(chunks: &[u64]) -> u64 {
        chunks.iter().map(|bytes| footprint(*bytes)).sum()
    }

    /// Text that repeats takes a fraction of what the footers say: what one chunk turned out to take
    /// counts for the others of its column, and for no other column.
    #[test]
    fn estimates_follow_what_was_encoded() {
        let mut wants = [want(0, 1000), want(1, 4000), want(2, 1000), want(3, 500)];
        wants[2].key.column = 1;
        let mut known = Known::default();
        correct_estimates(&mut wants, &held(&[(0, 40)]), &known);
        let bytes = |wants: &[Want]| wants.iter().map(|want| want.bytes).collect::<Vec<_>>();
        assert_eq!(bytes(&wants), [1000, 160, 1000, 20]);
        // What had no room was encoded too; what is known stays with its own estimate.
        known.sizes.insert(key(2, 1), 3000);
        wants[0].bytes = 1000;
        let mut further = want(4, 10);
        further.key.column = 1;
        let mut wants = [wants[2].clone(), further];
        correct_estimates(&mut wants, &HashMap::new(), &known);
        assert_eq!(bytes(&wants), [1000, 30]);
    }

    #[test]
    fn held_chunks_are_kept_and_others_fetched_or_dropped() {
        let wants = [want(0, 640), want(1, 640)];
        let held = held(&[(1, 640), (7, 64)]);
        let decision = decide(&wants, &held, &Known::default(), u64::MAX, &|_| false);
        assert_eq!(decision.keep, [1]);
        assert_eq!(decision.fetch, [0]);
        assert_eq!(decision.drop, [key(7, 0)]);
        assert_eq!(decision.keep_bytes, budget(&[640]));
        assert_eq!(decision.fetch_bytes, budget(&[640]));
    }

    #[test]
    fn nothing_unplanned_is_dropped_while_a_plan_is_unknown() {
        let held = held(&[(7, 640)]);
        let decision = decide(
            &[want(0, 640)],
            &held,
            &Known::default(),
            budget(&[640]),
            &|_| true,
        );
        assert!(decision.drop.is_empty());
        assert_eq!(decision.left_out, [0]);
    }

    #[test]
    fn what_fits_is_taken_by_priority_and_small_ones_pass_a_large_one() {
        let wants = [want(0, 640), want(1, 6400), want(2, 640), want(3, 640)];
        let decision = decide(
            &wants,
            &HashMap::new(),
            &Known::default(),
            budget(&[640, 640]),
            &|_| false,
        );
        assert_eq!(decision.fetch, [0, 2]);
        assert_eq!(decision.left_out, [1, 3]);
    }

    #[test]
    fn a_more_wanted_chunk_displaces_a_held_one() {
        let wants = [want(0, 640), want(1, 640)];
        let decision = decide(
            &wants,
            &held(&[(1, 640)]),
            &Known::default(),
            budget(&[640]),
            &|_| false,
        );
        assert_eq!((decision.fetch, decision.left_out), (vec![0], vec![1]));
        assert_eq!(decision.drop, [key(1, 0)]);
    }

    #[test]
    fn sizes_found_out_before_replace_estimates() {
        let known = Known {
            sizes: [(key(0, 0), 6400)].into(),
            ..Known::default()
        };
        let decision = decide(
            &[want(0, 64), want(1, 64)],
            &HashMap::new(),
            &known,
            budget(&[640]),
            &|_| false,
        );
        assert_eq!((decision.fetch, decision.left_out), (vec![1], vec![0]));
    }

    #[test]
    fn another_form_is_fetched_and_the_old_one_stays_meanwhile() {
        let held = [(key(0, 0), location(64, stoa_forms::FORM_PARQUET))].into();
        let decision = decide(&[want(0, 640)], &held, &Known::default(), u64::MAX, &|_| {
            false
        });
        assert_eq!((decision.fetch.len(), decision.drop.len()), (1, 0));
        let known = Known {
            parquet_only: [key(0, 0)].into(),
            ..Known::default()
        };
        assert_eq!(
            decide(&[want(0, 640)], &held, &known, u64::MAX, &|_| false).keep,
            [0]
        );
    }

    #[test]
    fn blocked_chunks_are_not_tried_and_not_lost() {
        let known = Known {
            blocked: [key(0, 0), key(1, 0)].into(),
            ..Known::default()
        };
        let held = [(key(1, 0), location(64, stoa_forms::FORM_PARQUET))].into();
        let decision = decide(
            &[want(0, 64), want(1, 64)],
            &held,
            &known,
            u64::MAX,
            &|_| false,
        );
        assert_eq!((decision.blocked, decision.keep), (vec![0], vec![1]));
        assert!(decision.fetch.is_empty() && decision.drop.is_empty());
    }

    #[test]
    fn tables_share_by_relative_rank_and_shared_chunks_count_once() {
        let list = |table: usize, rgs: &[u32]| -> Vec<Want> {
            rgs.iter()
                .map(|rg| Want {
                    table,
                    ..want(*rg, 64)
                })
                .collect()
        };
        let merged = merge(vec![list(0, &[0, 1, 2, 3]), list(1, &[10, 1])]);
        let order: Vec<u32> = merged.iter().map(|want| want.key.row_group).collect();
        assert_eq!(order, [0, 10, 1, 2, 3]);
        assert_eq!((merged[2].table, merged[2].also.as_slice()), (0, &[1][..]));
    }

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_chunk_is_decided_once_and_within_the_budget(
            sizes in prop::collection::vec(1u64..5000, 1..60),
            held_of in prop::collection::vec(prop::option::of((1u64..5000, any::<bool>())), 80),
            blocked in prop::collection::vec(any::<bool>(), 60),
            budget in 0u64..200_000,
        ) {
            let wants: Vec<Want> = sizes.iter().enumerate().map(|(at, n)| want(at as u32, *n)).collect();
            let held: HashMap<ChunkKey, ChunkLocation> = held_of
                .iter()
                .enumerate()
                .filter_map(|(at, held)| {
                    let (length, arrow) = (*held)?;
                    let form = if arrow { stoa_forms::FORM_ARROW } else { stoa_forms::FORM_PARQUET };
                    Some((key(at as u32, 0), location(length, form)))
                })
                .collect();
            let known = Known {
                blocked: wants.iter().zip(&blocked).filter(|(_, b)| **b).map(|(w, _)| w.key.clone()).collect(),
                ..Known::default()
            };
            let decision = decide(&wants, &held, &known, budget, &|_| false);
            let mut decided: Vec<usize> = [&decision.keep, &decision.fetch, &decision.left_out, &decision.blocked]
                .into_iter()
                .flatten()
                .copied()
                .collect();
            decided.sort_unstable();
            prop_assert_eq!(decided, (0..wants.len()).collect::<Vec<_>>());
            prop_assert!(decision.keep_bytes + decision.fetch_bytes <= budget);
            let dropped: HashSet<&ChunkKey> = decision.drop.iter().collect();
            for at in decision.keep.iter().chain(&decision.fetch) {
                prop_assert!(!dropped.contains(&wants[*at].key));
            }
            for at in &decision.keep {
                prop_assert!(held.contains_key(&wants[*at].key));
            }
            // Decided again with the result, nothing changes any more.
            let mut settled = held.clone();
            settled.retain(|key, _| !dropped.contains(key));
            for at in &decision.fetch {
                settled.insert(wants[*at].key.clone(), location(wants[*at].bytes, stoa_forms::FORM_ARROW));
            }
            let known = Known { sizes: decision.learned.into_iter().collect(), ..known };
            let again = decide(&wants, &settled, &known, budget, &|_| false);
            prop_assert!(again.fetch.is_empty() && again.drop.is_empty(), "{:?}", again);
        }
    }
}
