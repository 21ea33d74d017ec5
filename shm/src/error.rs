//! What can go wrong, and what the caller should do about it.

use std::path::{Path, PathBuf};

use crate::types::SegmentId;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a failure asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The configuration or the environment is wrong; nothing changes until somebody changes it.
    Configuration,
    /// Another process owns the cache directory.
    Busy,
    /// Memory is short: publish less, reclaim, and go on with what fits.
    Space,
    /// A file in the cache directory is not what it should be; treat what it holds as absent.
    Corrupt,
    /// The caller passed something that cannot be stored.
    Input,
    /// The operating system refused; the source says why.
    Io,
}

/// Every failure of this crate. A reader never sees most of them: for it a broken cache is a miss.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The cache directory could be changed or replaced by somebody else, or does not lie in memory.
    #[error("unsafe cache directory {path}: found {found}, expected {expected}", path = .path.display())]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
        /// What was found there.
        found: String,
        /// What is needed, and how to get it.
        expected: String,
    },
    /// Another process writes this cache.
    #[error(
        "cache directory {path} is in use by process {holder}: one directory has one worker; stop \
         that one or choose another cache.location",
        path = .path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Process id of the holder as it noted it, or "unknown".
        holder: String,
    },
    /// The directory that this process writes has no name any more.
    #[error("cache directory {problem}: it has to be opened anew")]
    Lost {
        /// What became of which path.
        problem: String,
    },
    /// There is no memory left for what was asked.
    #[error(
        "no space for {needed} bytes in {path}: {available} bytes are left under {limit}; load less \
         (cache.size) or raise that limit",
        path = .path.display()
    )]
    NoSpace {
        /// The cache directory.
        path: PathBuf,
        /// Bytes that were asked for.
        needed: u64,
        /// Bytes that were left when it failed.
        available: u64,
        /// Which limit it was: the tmpfs or a control group.
        limit: String,
    },
    /// The file has other magic bytes.
    #[error("{path} is not a cache file: found magic \"{found}\", expected \"{expected}\"", path = .path.display())]
    NotACacheFile {
        /// The file.
        path: PathBuf,
        /// The first eight bytes, as text.
        found: String,
        /// The magic of such a file.
        expected: String,
    },
    /// The file was written on a machine of the other byte order.
    #[error(
        "wrong endian in {path}: byte order mark is {found:#010x}, expected {expected:#010x}; a cache \
         directory cannot be moved between machines, remove it",
        path = .path.display()
    )]
    WrongEndian {
        /// The file.
        path: PathBuf,
        /// The mark as read.
        found: u32,
        /// The mark of this format.
        expected: u32,
    },
    /// The file was written by a newer version of Stoa.
    #[error(
        "format {found} of {path} is unsupported: this version reads {supported}; upgrade this \
         process or let its own worker rebuild the cache",
        path = .path.display()
    )]
    FormatUnsupported {
        /// The file.
        path: PathBuf,
        /// Version found, "major.minor".
        found: String,
        /// Versions this build reads.
        supported: String,
    },
    /// The file is damaged.
    #[error("corrupt cache file {path}: {problem}", path = .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What does not hold, with the numbers.
        problem: String,
    },
    /// The segment under construction has no room for the chunk; seal it and begin another.
    #[error(
        "segment full: chunk needs {needed} bytes, {remaining} are left; seal it and begin another"
    )]
    SegmentFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes left.
        remaining: u64,
    },
    /// A segment without chunks is not sealed.
    #[error("segment {segment} holds nothing: append to it before sealing, or drop it")]
    EmptySegment {
        /// The segment.
        segment: SegmentId,
    },
    /// A key or name is outside of the format's limits.
    #[error("{what} has {found} bytes, expected 1 to {largest}")]
    KeyLength {
        /// Which one.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The largest that can be stored.
        largest: usize,
    },
    /// Two entries of an index have the same key.
    #[error("{what} occurs twice in one index: expected each key once")]
    Duplicate {
        /// The key, readable.
        what: String,
    },
    /// An index would name bytes that no sealed segment holds.
    #[error(
        "cannot publish {what}: {problem}; publish only locations that a sealed segment or the recovery returned"
    )]
    Location {
        /// The key, readable.
        what: String,
        /// What does not hold, with the numbers.
        problem: String,
    },
    /// More entries than an index can hold.
    #[error("too many {what} for one index: found {found}, expected at most {largest}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// The limit.
        largest: usize,
    },
    /// Memory could not be locked.
    #[error(
        "cannot pin {bytes} bytes of the cache in memory: {source}; raise the memlock limit of the \
         worker (LimitMEMLOCK=, ulimit -l) or give it CAP_IPC_LOCK"
    )]
    Pin {
        /// Bytes of the segment that failed.
        bytes: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The access counters cannot be used.
    #[error("access counters {name}: {problem}")]
    Counters {
        /// Name of the shared-memory object.
        name: String,
        /// What failed, and what to do.
        problem: String,
    },
    /// The operating system refused an operation.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl Error {
    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::UnsafeDirectory { .. } | Error::Pin { .. } => ErrorKind::Configuration,
            Error::Locked { .. } => ErrorKind::Busy,
            Error::NoSpace { .. } => ErrorKind::Space,
            Error::NotACacheFile { .. }
            | Error::WrongEndian { .. }
            | Error::FormatUnsupported { .. }
            | Error::Corrupt { .. } => ErrorKind::Corrupt,
            Error::SegmentFull { .. }
            | Error::EmptySegment { .. }
            | Error::KeyLength { .. }
            | Error::Duplicate { .. }
            | Error::Location { .. }
            | Error::TooMany { .. } => ErrorKind::Input,
            Error::Counters { .. } | Error::Io { .. } | Error::Lost { .. } => ErrorKind::Io,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        Error::Io {
            action,
            path: path.to_path_buf(),
            source: source.into(),
        }
    }

    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Self {
        Error::Corrupt {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }
}
