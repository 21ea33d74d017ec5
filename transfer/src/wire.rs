//! The bytes between two hosts. `docs/transfer.md` describes them; a test compares.

/// Bytes of one read at most, whatever the settings say.
pub const READ_BYTES_MAX: u64 = 1 << 30;
/// Bytes of a call's or an answer's body at most, whatever the settings say.
pub const CALL_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a refusal's text at most.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Reads in one frame at most.
pub const READS_PER_FRAME_MAX: u32 = 4096;
