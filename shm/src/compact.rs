//! Which segments are worth copying together.

use crate::types::{CatalogLocation, ChunkKey, ChunkLocation, SegmentId};

/// Share of dead bytes above which a live segment is worth rewriting.
pub const DEAD_SHARE_MAX: f64 = 0.15;

/// A live segment that wastes memory, and what to copy out of it.
#[derive(Clone, Debug)]
pub struct Compaction {
    /// The segment.
    pub segment: SegmentId,
    /// Size of its file.
    pub file_bytes: u64,
    /// Bytes in it that nothing names.
    pub dead_bytes: u64,
    /// Chunks in it that are live.
    pub chunks: Vec<(ChunkKey, ChunkLocation)>,
    /// Catalogs in it that are live.
    pub catalogs: Vec<(String, CatalogLocation)>,
}

/// Whether more than `dead_share_max` of a segment's data is dead.
pub(crate) fn is_worth_compacting(data_bytes: u64, live_bytes: u64, dead_share_max: f64) -> bool {
    let dead = data_bytes.saturating_sub(live_bytes);
    dead > 0 && dead as f64 > data_bytes as f64 * dead_share_max
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_wastes_more_than_its_share_is_copied() {
        assert!(!is_worth_compacting(1000, 1000, 0.0));
        assert!(!is_worth_compacting(1000, 850, DEAD_SHARE_MAX));
        assert!(is_worth_compacting(1000, 849, DEAD_SHARE_MAX));
        assert!(!is_worth_compacting(0, 0, DEAD_SHARE_MAX));
        assert!(
            !is_worth_compacting(10, 20, DEAD_SHARE_MAX),
            "more live than data is nothing to gain"
        );
    }
}
