//! The metastore's words as messages, and back.

use std::path::PathBuf;

use prost::Message;
use tonic::{Code, Status};

use crate::error::{Error, Result};
use crate::store::{Condition, Entry, LeaseId, Op, Txn, TxnOutcome, WatchEvent};

/// What `proto/owner.proto` makes.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(super) mod proto {
    tonic::include_proto!("stoa.owner.v1");
}

/// A part of a listing is closed when it holds this many bytes of keys and values.
pub const LIST_PART_BYTES: usize = 512 << 10;
/// The largest message of an answer: a part, and the one value that may carry it over.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;

impl From<Entry> for proto::Entry {
    fn from(entry: Entry) -> Self {
        proto::Entry {
            key: entry.key,
            value: entry.value,
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: entry.lease.map(|lease| lease.0),
        }
    }
}

impl From<proto::Entry> for Entry {
    fn from(entry: proto::Entry) -> Self {
        Entry {
            key: entry.key,
            value: entry.value,
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: entry.lease.map(LeaseId),
        }
    }
}

impl From<Txn> for proto::Txn {
    fn from(txn: Txn) -> Self {
        use proto::condition::Holds;
        let when = txn.when.into_iter().map(|condition| {
            let (key, holds) = match condition {
                Condition::Absent(key) => (key, Holds::Absent(true)),
                Condition::Exists(key) => (key, Holds::Exists(true)),
                Condition::CreateRevision(key, at) => (key, Holds::CreateRevision(at)),
                Condition::ModRevision(key, at) => (key, Holds::ModRevision(at)),
            };
            proto::Condition {
                key,
                holds: Some(holds),
            }
        });
        let then = txn.then.into_iter().map(|op| match op {
            Op::Put { key, value, lease } => proto::Op {
                key,
                value: Some(value),
                lease: lease.map(|lease| lease.0),
            },
            Op::Delete { key } => proto::Op {
                key,
                value: None,
                lease: None,
            },
        });
        proto::Txn {
            when: when.collect(),
            then: then.collect(),
        }
    }
}

/// A transaction of a caller. One without a known condition must not happen as if it had none.
pub(super) fn txn_of(txn: proto::Txn) -> Result<Txn> {
    use proto::condition::Holds;
    let when = txn.when.into_iter().map(|condition| {
        let key = condition.key;
        Ok(match condition.holds {
            Some(Holds::Absent(_)) => Condition::Absent(key),
            Some(Holds::Exists(_)) => Condition::Exists(key),
            Some(Holds::CreateRevision(at)) => Condition::CreateRevision(key, at),
            Some(Holds::ModRevision(at)) => Condition::ModRevision(key, at),
            None => {
                return Err(Error::InvalidTxn {
                    reason: format!("the condition on `{key}` is not known here"),
                });
            }
        })
    });
    let when = when.collect::<Result<Vec<_>>>()?;
    let then = txn.then.into_iter().map(|op| match op.value {
        Some(value) => Op::Put {
            key: op.key,
            value,
            lease: op.lease.map(LeaseId),
        },
        None => Op::Delete { key: op.key },
    });
    let txn = Txn {
        when,
        then: then.collect(),
    };
    txn.check()?;
    Ok(txn)
}

impl From<TxnOutcome> for proto::TxnOutcome {
    fn from(outcome: TxnOutcome) -> Self {
        proto::TxnOutcome {
            committed: outcome.committed,
            revision: outcome.revision,
        }
    }
}

impl From<WatchEvent> for proto::WatchEvent {
    fn from(event: WatchEvent) -> Self {
        use proto::watch_event::Event;
        let event = match event {
            WatchEvent::Put(entry) => Event::Put(entry.into()),
            WatchEvent::Delete { key, revision } => {
                Event::Delete(proto::Deletion { key, revision })
            }
            WatchEvent::Progress { revision } => Event::Progress(revision),
        };
        proto::WatchEvent { event: Some(event) }
    }
}

/// An event of the owner; `None` for one of a kind that is not known here.
pub(super) fn event_of(event: proto::WatchEvent) -> Option<WatchEvent> {
    use proto::watch_event::Event;
    Some(match event.event? {
        Event::Put(entry) => WatchEvent::Put(entry.into()),
        Event::Delete(deleted) => WatchEvent::Delete {
            key: deleted.key,
            revision: deleted.revision,
        },
        Event::Progress(revision) => WatchEvent::Progress { revision },
    })
}

/// Entries in parts, in their order; one empty part where there are none.
pub(super) fn parts_of(
    entries: Vec<Entry>,
    revision: i64,
    keys_only: bool,
) -> Vec<proto::ListPart> {
    let mut parts = Vec::new();
    let (mut part, mut bytes) = (Vec::new(), 0);
    for mut entry in entries {
        if keys_only {
            entry.value = Vec::new();
        }
        bytes += entry.key.len() + entry.value.len();
        part.push(proto::Entry::from(entry));
        if bytes >= LIST_PART_BYTES {
            parts.push(std::mem::take(&mut part));
            bytes = 0;
        }
    }
    if !part.is_empty() || parts.is_empty() {
        parts.push(part);
    }
    let parts = parts.into_iter();
    parts
        .map(|entries| proto::ListPart { entries, revision })
        .collect()
}

/// What went wrong at the owner, as a status that the caller reads back.
pub(super) fn status_of(error: Error) -> Status {
    use proto::failure::Reason;
    let message = error.to_string();
    let reason = match error {
        Error::LeaseLost { lease } => Reason::LeaseLost(lease.0),
        Error::Compacted {
            requested,
            compacted,
        } => Reason::Compacted(proto::Compacted {
            requested,
            compacted,
        }),
        Error::InvalidTxn { reason } => Reason::InvalidTxn(reason),
        Error::Storage { path, reason } => Reason::Storage(proto::Storage {
            path: path.to_string_lossy().into_owned(),
            reason,
        }),
        Error::WatchEnded { prefix, reason } => {
            Reason::WatchEnded(proto::WatchEnded { prefix, reason })
        }
        other => Reason::Other(other.to_string()),
    };
    let failure = proto::Failure {
        reason: Some(reason),
    };
    Status::with_details(Code::Aborted, message, failure.encode_to_vec().into())
}

/// The owner's words; `None` where the status is the connection's and not the store's.
pub(super) fn error_of(call: &'static str, status: &Status) -> Option<Error> {
    use proto::failure::Reason;
    if status.code() != Code::Aborted || status.details().is_empty() {
        return None;
    }
    let failure = proto::Failure::decode(status.details()).ok()?;
    Some(match failure.reason {
        Some(Reason::LeaseLost(lease)) => Error::LeaseLost {
            lease: LeaseId(lease),
        },
        Some(Reason::Compacted(compacted)) => Error::Compacted {
            requested: compacted.requested,
            compacted: compacted.compacted,
        },
        Some(Reason::InvalidTxn(reason)) => Error::InvalidTxn { reason },
        Some(Reason::Storage(storage)) => Error::Storage {
            path: PathBuf::from(storage.path),
            reason: storage.reason,
        },
        Some(Reason::WatchEnded(ended)) => Error::WatchEnded {
            prefix: ended.prefix,
            reason: ended.reason,
        },
        Some(Reason::Other(reason)) => Error::Server { call, reason },
        None => Error::Server {
            call,
            reason: status.message().to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TXN_BYTES_MAX;

    fn entry(key: &str, bytes: usize) -> Entry {
        Entry {
            key: key.into(),
            value: vec![7; bytes],
            create_revision: 3,
            mod_revision: 4,
            lease: Some(LeaseId(5)),
        }
    }

    #[test]
    fn a_listing_is_cut_into_parts_that_fit_and_loses_nothing() {
        let entries = vec![
            entry("a", 10),
            entry("b", TXN_BYTES_MAX),
            entry("c", LIST_PART_BYTES),
            entry("d", 1),
        ];
        let parts = parts_of(entries.clone(), 9, false);
        assert_eq!(parts.len(), 3);
        for part in &parts {
            assert!(part.encoded_len() <= ANSWER_BYTES_MAX);
            assert_eq!(part.revision, 9);
        }
        let back: Vec<Entry> = parts
            .into_iter()
            .flat_map(|part| part.entries)
            .map(Entry::from)
            .collect();
        assert_eq!(back, entries);
        assert_eq!(parts_of(vec![], 9, false).len(), 1);
        let keys = parts_of(entries, 9, true);
        assert!(keys[0].entries.iter().all(|entry| entry.value.is_empty()));
    }

    #[test]
    fn transactions_come_back_as_they_were_and_unknown_conditions_are_refused() {
        let txn = Txn {
            when: vec![
                Condition::Absent("a".into()),
                Condition::Exists("b".into()),
                Condition::CreateRevision("c".into(), 1),
                Condition::ModRevision("d".into(), 2),
            ],
            then: vec![
                Op::put("e", "v"),
                // A value may be empty, and is still a put.
                Op::put("f", ""),
                Op::put_leased("g", "v", LeaseId(8)),
                Op::delete("h"),
            ],
        };
        let sent = proto::Txn::from(txn.clone());
        assert_eq!(txn_of(sent.clone()).unwrap(), txn);
        let mut odd = sent;
        odd.when[0].holds = None;
        assert!(matches!(txn_of(odd), Err(Error::InvalidTxn { .. })));
    }

    #[test]
    fn what_the_store_says_comes_back_and_what_the_connection_says_does_not() {
        let said = [
            Error::LeaseLost { lease: LeaseId(7) },
            Error::Compacted {
                requested: 1,
                compacted: 2,
            },
            Error::InvalidTxn { reason: "r".into() },
            Error::Storage {
                path: "/p".into(),
                reason: "r".into(),
            },
            Error::WatchEnded {
                prefix: "p".into(),
                reason: "r".into(),
            },
        ];
        for error in said {
            let (text, kind) = (error.to_string(), error.kind());
            let back = error_of("get", &status_of(error)).unwrap();
            assert_eq!((back.to_string(), back.kind()), (text, kind));
        }
        assert!(error_of("get", &Status::unavailable("transport")).is_none());
        assert!(error_of("get", &Status::new(Code::Aborted, "reset")).is_none());
    }
}
