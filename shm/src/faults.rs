//! Steps of the writer at which the hazard harness kills it, and mutants that the harness must
//! catch. Without the feature `mutants` everything here is empty.

/// A moment in the writer's work that a death must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "named by the harness through their text")]
pub(crate) enum Step {
    SegmentAllocated,
    ChunkWritten,
    SegmentWritten,
    SegmentSealed,
    IndexWritten,
    IndexPublished,
    SegmentRetired,
}

/// Kills this process if the environment says so: `STOA_SHM_KILL_AT=step` or `step:times`.
#[cfg(feature = "mutants")]
pub(crate) fn reached(step: Step) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static AT: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let wanted = std::env::var("STOA_SHM_KILL_AT").ok()?;
        let (step, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((step.to_string(), AtomicU64::new(times.parse().unwrap_or(1))))
    });
    let Some((wanted, times)) = &*AT else { return };
    if *wanted == format!("{step:?}") && times.fetch_sub(1, Ordering::Relaxed) == 1 {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    }
}

#[cfg(not(feature = "mutants"))]
#[inline]
pub(crate) fn reached(_: Step) {}

/// A deliberate mistake, chosen by `STOA_SHM_MUTANT`.
#[cfg(feature = "mutants")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Writes new chunks over the memory of a retired segment, whoever maps it.
    InPlaceWrite,
    /// Publishes an index before the bytes that it names are written.
    PublishBeforeSeal,
    /// Gives a new segment the name of one that was removed.
    ReusedSegmentName,
}

#[cfg(feature = "mutants")]
impl Mutant {
    pub(crate) fn chosen() -> Option<Mutant> {
        static CHOSEN: std::sync::LazyLock<Option<Mutant>> = std::sync::LazyLock::new(|| {
            match std::env::var("STOA_SHM_MUTANT").ok()?.as_str() {
                "in-place-write" => Some(Mutant::InPlaceWrite),
                "publish-before-seal" => Some(Mutant::PublishBeforeSeal),
                "reused-segment-name" => Some(Mutant::ReusedSegmentName),
                other => panic!(
                    "STOA_SHM_MUTANT={other} is unknown: expected in-place-write, publish-before-seal or \
                     reused-segment-name"
                ),
            }
        });
        *CHOSEN
    }

    pub(crate) fn is_chosen(self) -> bool {
        Mutant::chosen() == Some(self)
    }
}
