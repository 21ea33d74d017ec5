//! Which requests to make for which ranges: a pure decision.

use std::ops::Range;

/// One request, and which of the ranges asked for it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedRange {
    /// The bytes to request.
    pub range: Range<u64>,
    /// Indices into the ranges asked for, all of which lie within `range`.
    pub members: Vec<usize>,
}

/// Merges ranges that lie within `gap_bytes` of each other, as long as a request stays within
/// `request_bytes_max`; a single range larger than that is one request of its own.
///
/// Empty ranges need no request and are in no result. The results are sorted by start.
pub fn coalesce(ranges: &[Range<u64>], gap_bytes: u64, request_bytes_max: u64) -> Vec<MergedRange> {
    let mut order: Vec<usize> = (0..ranges.len())
        .filter(|&i| ranges[i].start < ranges[i].end)
        .collect();
    order.sort_by_key(|&i| (ranges[i].start, ranges[i].end));

    let mut merged: Vec<MergedRange> = Vec::new();
    for index in order {
        let range = &ranges[index];
        if let Some(last) = merged.last_mut() {
            let end = last.range.end.max(range.end);
            let inside = range.end <= last.range.end;
            let near = range.start <= last.range.end.saturating_add(gap_bytes);
            if inside || (near && end - last.range.start <= request_bytes_max) {
                last.range.end = end;
                last.members.push(index);
                continue;
            }
        }
        merged.push(MergedRange {
            range: range.clone(),
            members: vec![index],
        });
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn requests(ranges: &[Range<u64>], gap: u64, max: u64) -> Vec<Range<u64>> {
        coalesce(ranges, gap, max)
            .into_iter()
            .map(|merged| merged.range)
            .collect()
    }

    #[test]
    fn near_ranges_are_one_request_and_far_ones_are_two() {
        assert_eq!(requests(&[0..10, 12..20], 2, 100), vec![0..20]);
        assert_eq!(requests(&[0..10, 13..20], 2, 100), vec![0..10, 13..20]);
        assert_eq!(requests(&[12..20, 0..10], 2, 100), vec![0..20]);
    }

    #[test]
    fn a_request_does_not_grow_past_its_limit() {
        assert_eq!(requests(&[0..60, 60..120], 8, 100), vec![0..60, 60..120]);
        assert_eq!(requests(&[0..500, 100..200], 8, 100), vec![0..500]);
    }

    #[test]
    fn empty_ranges_cost_nothing() {
        assert_eq!(coalesce(&[5..5, 9..9], 8, 100), vec![]);
    }

    proptest! {
        #[test]
        fn every_range_is_answered_once_and_lies_in_its_request(
            starts in prop::collection::vec((0u64..10_000, 0u64..500), 0..40),
            gap in 0u64..200,
            max in 1u64..2_000,
        ) {
            let ranges: Vec<Range<u64>> = starts.iter().map(|&(s, n)| s..s + n).collect();
            let merged = coalesce(&ranges, gap, max);
            let mut seen = vec![0; ranges.len()];
            for request in &merged {
                for &member in &request.members {
                    seen[member] += 1;
                    prop_assert!(request.range.start <= ranges[member].start);
                    prop_assert!(request.range.end >= ranges[member].end);
                }
                let largest = request.members.iter().map(|&m| ranges[m].end - ranges[m].start).max();
                let length = request.range.end - request.range.start;
                prop_assert!(length <= max.max(largest.unwrap()));
            }
            for (range, seen) in ranges.iter().zip(seen) {
                prop_assert_eq!(seen, u32::from(!range.is_empty()));
            }
        }
    }
}
