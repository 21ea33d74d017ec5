//! The walk behind: everything that is published is hashed by and by, at a bounded rate.
//!
//! A worker serves what it takes over as it is: it was verified when it was sealed. What memory has
//! lost since, the walk finds, drops and has loaded again. It goes on over processes: how far it has
//! come is left to the next worker of the directory.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use stoa_shm::{Handover, SegmentCheck, SegmentReport, VerifyReport, Walk};
use tokio::time::sleep;

use crate::metrics::add;
use crate::shared::{Shared, unix_ms};

/// Bytes that are hashed in a second: a few hundredths of what one processor can, so that loads and
/// queries keep processor and memory. 64 GiB take four minutes.
const BYTES_PER_SECOND: u64 = 256 << 20;
/// Bytes between two pauses; a larger chunk is hashed at once.
const STEP_BYTES: u64 = 8 << 20;
/// How often it is told how far the walk is.
const TELL_PERIOD: Duration = Duration::from_secs(5);
/// The first walk of a process begins no earlier, so that a short one does not begin at all.
const SETTLE: Duration = Duration::from_secs(2);

/// How long to wait for the next walk, where one is due every `interval`.
///
/// At once where the last writer did not say how it ended, or did not end in order, and where a walk
/// is under way. A clock that was set back does not put it off for longer than the interval.
pub(crate) fn next_walk(left: Option<&Handover>, interval: Duration, now_unix_ms: u64) -> Duration {
    let first = SETTLE.min(interval);
    let Some(left) = left.filter(|left| left.in_order && left.walk.began_unix_ms == 0) else {
        return first;
    };
    let since = match now_unix_ms.checked_sub(left.walk.ended_unix_ms) {
        Some(since) => Duration::from_millis(since),
        None => Duration::ZERO,
    };
    interval.saturating_sub(since).max(first)
}

/// The walk to go on with: the one that is under way, if its process ended in order, else a new one.
pub(crate) fn resumed(left: Option<&Handover>) -> Walk {
    let Some(left) = left else {
        return Walk::default();
    };
    match left.in_order {
        true => left.walk,
        false => Walk {
            ended_unix_ms: left.walk.ended_unix_ms,
            ..Walk::default()
        },
    }
}

/// How long to pause after hashing so many bytes took so long.
fn pause(bytes: u64, took: Duration) -> Duration {
    Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND as f64).saturating_sub(took)
}

/// Walks through what is published, from where the last walk stopped. Returns how much was found to
/// be damaged; it is dropped from the next publication.
pub(crate) async fn walk(shared: &Arc<Shared>) -> usize {
    let now = unix_ms();
    let segments = shared.with_store(move |store| store.begin_walk(now)).await;
    let mut to_go: u64 = segments.iter().map(|(_, bytes)| bytes).sum();
    let mut told = Instant::now();
    tell_progress(shared, to_go);
    let index_problem = shared.with_store(|store| store.check_index()).await;
    let mut found = VerifyReport {
        index_problem,
        ..VerifyReport::default()
    };
    for (segment, bytes) in segments {
        let checked = match shared.with_store(move |store| store.check(segment)).await {
            Ok(check) => Ok(hash(shared, check).await),
            Err(problem) => Err(problem),
        };
        let report = shared
            .with_store(move |store| store.checked(segment, checked))
            .await;
        found.bad_chunks.extend(report.bad_chunks);
        found.bad_catalogs.extend(report.bad_catalogs);
        to_go = to_go.saturating_sub(bytes);
        if told.elapsed() >= TELL_PERIOD {
            told = Instant::now();
            tell_progress(shared, to_go);
        }
    }
    shared
        .with_store(move |store| store.end_walk(unix_ms()))
        .await;
    tell_progress(shared, 0);
    tell(&found);
    let damaged = found.bad_chunks.len()
        + found.bad_catalogs.len()
        + usize::from(found.index_problem.is_some());
    add(&shared.counters.damaged, damaged as u64);
    damaged
}

/// Hashes a segment in steps, with pauses between them.
async fn hash(shared: &Arc<Shared>, mut check: SegmentCheck) -> SegmentReport {
    loop {
        let step = move || {
            let started = Instant::now();
            let hashed = check.step(STEP_BYTES);
            (check, hashed, started.elapsed())
        };
        let hashed;
        let took;
        (check, hashed, took) = shared.on_background(step).await;
        let Some(bytes) = hashed else {
            return check.into_report();
        };
        add(&shared.counters.verified_bytes, bytes);
        sleep(pause(bytes, took)).await;
    }
}

/// Says how many bytes are still to be hashed.
fn tell_progress(shared: &Shared, to_go: u64) {
    shared
        .counters
        .unverified_bytes
        .store(to_go, Ordering::Relaxed);
    shared.state.send_if_modified(|state| {
        let modified = state.unverified_bytes != to_go;
        state.unverified_bytes = to_go;
        modified
    });
}

/// Says what was found to be damaged, the first of each kind.
fn tell(report: &VerifyReport) {
    if let Some((key, reason)) = report.bad_chunks.first() {
        let (chunk, chunks) = (key.readable(), report.bad_chunks.len());
        tracing::warn!(chunk = %chunk, chunks, %reason, "damaged in memory, made anew");
    }
    if let Some((catalog, reason)) = report.bad_catalogs.first() {
        tracing::warn!(catalog, %reason, "damaged in memory, made anew");
    }
    if let Some(reason) = &report.index_problem {
        tracing::warn!(%reason, "the index is damaged, a new one is published");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn left(in_order: bool, began_unix_ms: u64, ended_unix_ms: u64) -> Handover {
        Handover {
            in_order,
            walk: Walk {
                next: 7,
                began_unix_ms,
                ended_unix_ms,
            },
            ..Handover::default()
        }
    }

    #[test]
    fn a_walk_is_due_when_nobody_knows_or_the_last_is_long_ago() {
        let now = 10 * 3_600_000;
        let next = |left: Option<Handover>| next_walk(left.as_ref(), HOUR, now);
        assert_eq!(next(None), SETTLE);
        assert_eq!(next(Some(left(false, 0, now))), SETTLE, "it died");
        assert_eq!(next(Some(left(true, 5, now))), SETTLE, "one is under way");
        assert_eq!(next(Some(left(true, 0, 0))), SETTLE, "there was none");
        assert_eq!(next(Some(left(true, 0, now))), HOUR);
        assert_eq!(next(Some(left(true, 0, now - 1_800_000))), HOUR / 2);
        assert_eq!(next(Some(left(true, 0, now + 99 * 3_600_000))), HOUR);
        let short = Duration::from_millis(1);
        assert_eq!(next_walk(None, short, now), short);
    }

    #[test]
    fn a_walk_goes_on_over_processes_that_end_in_order() {
        assert_eq!(resumed(None), Walk::default());
        let under_way = left(true, 5, 1);
        assert_eq!(resumed(Some(&under_way)), under_way.walk);
        let died = resumed(Some(&left(false, 5, 1)));
        assert_eq!(
            (died.next, died.began_unix_ms, died.ended_unix_ms),
            (0, 0, 1)
        );
    }

    #[test]
    fn the_rate_is_bounded() {
        assert_eq!(pause(BYTES_PER_SECOND, Duration::ZERO).as_secs(), 1);
        let slow = Duration::from_secs(2);
        assert_eq!(pause(BYTES_PER_SECOND, slow), Duration::ZERO);
    }
}
