//! What was asked for: counts by kind and by key, and a bounded log of requests.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

/// How many requests the log keeps.
pub const LOG_LENGTH_MAX: usize = 200_000;

/// The kinds of requests that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Reads an object or a range of it.
    Get,
    /// Asks for an object's size and etag.
    Head,
    /// Lists a prefix.
    List,
    /// Writes, copies or uploads a part of an object.
    Put,
    /// Removes objects.
    Delete,
    /// Everything else: buckets, uploads.
    Other,
}

/// One answered request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// The kind.
    pub kind: Kind,
    /// The bucket.
    pub bucket: String,
    /// The key; for a list the prefix.
    pub key: String,
    /// First and one past the last byte of a ranged read.
    pub range: Option<(u64, u64)>,
    /// Whether the request named the etag it wants.
    pub if_match: bool,
    /// The HTTP status of the answer.
    pub status: u16,
    /// Bytes of the object in the answer's body.
    pub bytes: u64,
}

/// Requests and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests, whatever their answer.
    pub requests: u64,
    /// Those answered with an error status.
    pub errors: u64,
    /// Bytes of objects in the answers.
    pub bytes: u64,
}

impl Counts {
    fn add(&mut self, access: &Access) {
        self.requests += 1;
        self.errors += u64::from(access.status >= 400);
        self.bytes += access.bytes;
    }
}

/// All counts at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// By kind.
    pub kinds: BTreeMap<Kind, Counts>,
    /// By `bucket/key` and kind.
    pub keys: BTreeMap<String, BTreeMap<Kind, Counts>>,
}

impl Snapshot {
    /// The counts of one kind.
    pub fn of(&self, kind: Kind) -> Counts {
        self.kinds.get(&kind).copied().unwrap_or_default()
    }

    /// The requests for objects' contents.
    pub fn gets(&self) -> u64 {
        self.of(Kind::Get).requests
    }

    /// The requests that read anything: contents, sizes or lists.
    pub fn reads(&self) -> u64 {
        [Kind::Get, Kind::Head, Kind::List]
            .map(|kind| self.of(kind).requests)
            .iter()
            .sum()
    }

    /// The counts of one kind over keys that contain `text` (`bucket/key`).
    pub fn on(&self, kind: Kind, text: &str) -> Counts {
        let mut sum = Counts::default();
        for (key, kinds) in &self.keys {
            if let Some(counts) = kinds.get(&kind)
                && key.contains(text)
            {
                sum.requests += counts.requests;
                sum.errors += counts.errors;
                sum.bytes += counts.bytes;
            }
        }
        sum
    }
}

#[derive(Debug, Default)]
struct Book {
    snapshot: Snapshot,
    log: VecDeque<Access>,
}

/// The counts in the making.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    book: Mutex<Book>,
}

impl Ledger {
    pub(crate) fn add(&self, access: Access) {
        let mut book = self.lock();
        book.snapshot
            .kinds
            .entry(access.kind)
            .or_default()
            .add(&access);
        let key = format!("{}/{}", access.bucket, access.key);
        let kinds = book.snapshot.keys.entry(key).or_default();
        kinds.entry(access.kind).or_default().add(&access);
        if book.log.len() == LOG_LENGTH_MAX {
            book.log.pop_front();
        }
        book.log.push_back(access);
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.lock().snapshot.clone()
    }

    pub(crate) fn log(&self) -> Vec<Access> {
        self.lock().log.iter().cloned().collect()
    }

    pub(crate) fn forget(&self) {
        *self.lock() = Book::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_by_kind_and_by_key() {
        let ledger = Ledger::default();
        let access = |key: &str, kind, status, bytes| Access {
            kind,
            bucket: "b".to_owned(),
            key: key.to_owned(),
            range: None,
            if_match: false,
            status,
            bytes,
        };
        ledger.add(access("t/1", Kind::Get, 206, 10));
        ledger.add(access("t/2", Kind::Get, 503, 0));
        ledger.add(access("t/2", Kind::Head, 200, 0));
        let snapshot = ledger.snapshot();
        assert_eq!(snapshot.gets(), 2);
        assert_eq!(snapshot.reads(), 3);
        assert_eq!(snapshot.of(Kind::Get).errors, 1);
        assert_eq!(snapshot.on(Kind::Get, "t/1").bytes, 10);
        assert_eq!(snapshot.on(Kind::Get, "b/t/").requests, 2);
        assert_eq!(ledger.log().len(), 3);
        ledger.forget();
        assert_eq!(ledger.snapshot(), Snapshot::default());
    }
}
