//! What can be read remotely: immutable bytes under a name that never means others.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use crate::error::Refusal;

/// The name of immutable bytes on one host.
///
/// The incarnation is drawn once when the memory that holds the segments is made; within one
/// incarnation no segment's number is used twice. So an old key never names other bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentKey {
    /// Which memory.
    pub incarnation: u64,
    /// Which segment in it.
    pub segment: u64,
}

impl fmt::Display for SegmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}/{:016x}", self.incarnation, self.segment)
    }
}

/// A shared handle on the bytes of a segment. The bytes stay what they are while a handle lives.
#[derive(Clone)]
pub struct Segment {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    file: Option<Arc<File>>,
}

impl Segment {
    /// A segment whose bytes `owner` keeps.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self {
            bytes: Arc::new(owner),
            file: None,
        }
    }

    /// The same with the file that holds exactly these bytes, from its first one on: a transport
    /// may let the kernel send from it.
    pub fn with_file(self, file: Arc<File>) -> Self {
        Self {
            file: Some(file),
            ..self
        }
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// The file that holds them, where there is one.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// The bytes of a range, where it lies inside of the segment.
    pub fn range(&self, offset: u64, length: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(length).ok()?)?;
        self.bytes().get(start..end)
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("bytes", &self.bytes().len())
            .field("file", &self.file)
            .finish()
    }
}

/// Where a server finds segments.
pub trait SegmentSource: Send + Sync + fmt::Debug {
    /// The segment of this name. It is called for every run of reads of one segment, so it should
    /// keep what it opens; it must not block for long.
    ///
    /// # Errors
    /// [`Refusal::wrong_incarnation`] where the memory is another one, [`Refusal::unknown_segment`]
    /// where it holds no such segment (any more).
    fn open(&self, key: SegmentKey) -> Result<Segment, Refusal>;
}
