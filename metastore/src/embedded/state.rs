//! The store in memory: what a transaction does to it, decided without time or I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::store::{Condition, Entry, LeaseId, Listing, Op, Txn, WatchEvent};

/// The revision of a store that nothing was ever written to.
pub(super) const REVISION_EMPTY: i64 = 1;

/// A change that is decided but not yet applied: it can be written to disk first.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) revision: i64,
    pub(super) events: Vec<WatchEvent>,
    /// The lease that this change ends.
    ends: Option<LeaseId>,
}

/// What a transaction would do.
#[derive(Debug)]
pub(super) enum Decision {
    /// A condition does not hold.
    Refused,
    /// The conditions hold, but nothing changes.
    NoChange,
    /// The conditions hold and this is what happens.
    Change(Change),
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    expires_at: Instant,
    keys: BTreeSet<String>,
}

/// The newest events, bounded in number and bytes; what is older is compacted.
#[derive(Debug)]
struct History {
    events: VecDeque<WatchEvent>,
    bytes: usize,
    events_max: usize,
    bytes_max: usize,
    /// Events up to this revision are gone.
    compacted: i64,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) revision: i64,
    entries: BTreeMap<String, Entry>,
    leases: BTreeMap<LeaseId, Lease>,
    last_lease: i64,
    history: History,
}

impl State {
    pub(super) fn new(
        revision: i64,
        entries: Vec<Entry>,
        events_max: usize,
        bytes_max: usize,
    ) -> Self {
        State {
            revision,
            entries: entries
                .into_iter()
                .map(|entry| (entry.key.clone(), entry))
                .collect(),
            leases: BTreeMap::new(),
            // Every store that is opened begins at a revision that the one before never reached:
            // a lease of that one is never taken for one of this.
            last_lease: revision,
            history: History {
                events: VecDeque::new(),
                bytes: 0,
                events_max: events_max.max(1),
                bytes_max,
                // A new store has its whole past: there is none. Of one that was opened again, it
                // went with the process before.
                compacted: if revision == REVISION_EMPTY {
                    0
                } else {
                    revision
                },
            },
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(super) fn list(&self, prefix: &str) -> Listing {
        let entries = self
            .entries
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| entry.clone())
            .collect();
        Listing {
            entries,
            revision: self.revision,
        }
    }

    pub(super) fn decide(&self, txn: &Txn) -> Result<Decision> {
        if !txn.when.iter().all(|condition| self.holds(condition)) {
            return Ok(Decision::Refused);
        }
        let revision = self.revision + 1;
        let mut events = Vec::with_capacity(txn.then.len());
        for op in &txn.then {
            match op {
                Op::Put { key, value, lease } => {
                    if let Some(lease) = lease
                        && !self.leases.contains_key(lease)
                    {
                        return Err(Error::LeaseLost { lease: *lease });
                    }
                    let created = self
                        .entries
                        .get(key)
                        .map_or(revision, |e| e.create_revision);
                    events.push(WatchEvent::Put(Entry {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: created,
                        mod_revision: revision,
                        lease: *lease,
                    }));
                }
                Op::Delete { key } if self.entries.contains_key(key) => {
                    events.push(WatchEvent::Delete {
                        key: key.clone(),
                        revision,
                    });
                }
                Op::Delete { .. } => {}
            }
        }
        Ok(if events.is_empty() {
            Decision::NoChange
        } else {
            Decision::Change(Change {
                revision,
                events,
                ends: None,
            })
        })
    }

    fn holds(&self, condition: &Condition) -> bool {
        let entry = self.entries.get(condition.key());
        match condition {
            Condition::Absent(_) => entry.is_none(),
            Condition::Exists(_) => entry.is_some(),
            Condition::CreateRevision(_, revision) => {
                entry.is_some_and(|entry| entry.create_revision == *revision)
            }
            Condition::ModRevision(_, revision) => {
                entry.is_some_and(|entry| entry.mod_revision == *revision)
            }
        }
    }

    /// Applies what [`State::decide`] or [`State::decide_end`] gave for this very state.
    pub(super) fn apply(&mut self, change: Change) {
        if let Some(lease) = change.ends {
            self.leases.remove(&lease);
        }
        if change.events.is_empty() {
            return;
        }
        debug_assert_eq!(change.revision, self.revision + 1);
        self.revision = change.revision;
        for event in &change.events {
            let (key, old) = match event {
                WatchEvent::Put(entry) => (
                    &entry.key,
                    self.entries.insert(entry.key.clone(), entry.clone()),
                ),
                WatchEvent::Delete { key, .. } => (key, self.entries.remove(key)),
                WatchEvent::Progress { .. } => continue,
            };
            if let Some(held) = old
                .and_then(|e| e.lease)
                .and_then(|l| self.leases.get_mut(&l))
            {
                held.keys.remove(key);
            }
            if let WatchEvent::Put(Entry {
                lease: Some(lease),
                key,
                ..
            }) = event
                && let Some(holds) = self.leases.get_mut(lease)
            {
                holds.keys.insert(key.clone());
            }
        }
        self.history.push(change.events);
    }

    /// The change on disk: what outlives the process. Keys under a lease do not, so they are not
    /// written, and a key that moves under a lease is removed.
    pub(super) fn durable<'c>(&self, change: &'c Change) -> Vec<Durable<'c>> {
        let unleased = |key: &str| {
            self.entries
                .get(key)
                .is_some_and(|entry| entry.lease.is_none())
        };
        change
            .events
            .iter()
            .filter_map(|event| match event {
                WatchEvent::Put(entry) if entry.lease.is_none() => Some(Durable::Put(entry)),
                WatchEvent::Put(Entry { key, .. }) | WatchEvent::Delete { key, .. } => {
                    unleased(key).then_some(Durable::Remove(key))
                }
                WatchEvent::Progress { .. } => None,
            })
            .collect()
    }

    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> LeaseId {
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        self.leases.insert(
            id,
            Lease {
                ttl,
                expires_at: now + ttl,
                keys: BTreeSet::new(),
            },
        );
        id
    }

    pub(super) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<()> {
        match self.leases.get_mut(&id) {
            Some(lease) if lease.expires_at > now => {
                lease.expires_at = now + lease.ttl;
                Ok(())
            }
            _ => Err(Error::LeaseLost { lease: id }),
        }
    }

    /// When a lease ends unless it is kept alive; `None` if it is gone.
    pub(super) fn expires_at(&self, id: LeaseId) -> Option<Instant> {
        self.leases.get(&id).map(|lease| lease.expires_at)
    }

    pub(super) fn expired(&self, now: Instant) -> Vec<LeaseId> {
        self.leases
            .iter()
            .filter(|(_, l)| l.expires_at <= now)
            .map(|(id, _)| *id)
            .collect()
    }

    /// The change that ends a lease and removes its keys; `None` if it is gone.
    pub(super) fn decide_end(&self, id: LeaseId) -> Option<Change> {
        let lease = self.leases.get(&id)?;
        let revision = self.revision + 1;
        let events = lease
            .keys
            .iter()
            .map(|key| WatchEvent::Delete {
                key: key.clone(),
                revision,
            })
            .collect();
        Some(Change {
            revision,
            events,
            ends: Some(id),
        })
    }

    /// Up to `max` revisions' worth of events from `from` on under `prefix`, and where to go on.
    pub(super) fn since(
        &self,
        prefix: &str,
        from: i64,
        max: usize,
    ) -> Result<(Vec<WatchEvent>, i64)> {
        if from <= self.history.compacted {
            return Err(Error::Compacted {
                requested: from,
                compacted: self.history.compacted,
            });
        }
        let start = self
            .history
            .events
            .partition_point(|event| event.revision() < from);
        let mut events = Vec::new();
        let mut next = from.max(self.revision + 1);
        for event in self.history.events.range(start..) {
            // Only whole revisions, so that going on from the next one misses nothing.
            if events.len() >= max
                && events.last().map(WatchEvent::revision) != Some(event.revision())
            {
                next = event.revision();
                break;
            }
            let key = match event {
                WatchEvent::Put(entry) => &entry.key,
                WatchEvent::Delete { key, .. } => key,
                WatchEvent::Progress { .. } => continue,
            };
            if key.starts_with(prefix) {
                events.push(event.clone());
            }
        }
        Ok((events, next))
    }

    pub(super) fn compact(&mut self, revision: i64) {
        self.history.compact(revision.min(self.revision));
    }
}

/// One row to change on disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Durable<'c> {
    Put(&'c Entry),
    Remove(&'c str),
}

impl History {
    fn push(&mut self, events: Vec<WatchEvent>) {
        for event in events {
            self.bytes += weight(&event);
            self.events.push_back(event);
        }
        while self.events.len() > self.events_max || self.bytes > self.bytes_max {
            let Some(oldest) = self.events.front().map(WatchEvent::revision) else {
                break;
            };
            self.compact(oldest);
        }
    }

    /// Drops everything up to `revision`: half a revision must never be seen.
    fn compact(&mut self, revision: i64) {
        while let Some(front) = self.events.front()
            && front.revision() <= revision
        {
            self.bytes -= weight(front);
            self.events.pop_front();
        }
        self.compacted = self.compacted.max(revision);
    }
}

fn weight(event: &WatchEvent) -> usize {
    const EVENT_BYTES: usize = 128;
    match event {
        WatchEvent::Put(entry) => EVENT_BYTES + entry.key.len() + entry.value.len(),
        WatchEvent::Delete { key, .. } => EVENT_BYTES + key.len(),
        WatchEvent::Progress { .. } => EVENT_BYTES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(state: &mut State, key: &str, lease: Option<LeaseId>) {
        let then = vec![Op::Put {
            key: key.into(),
            value: b"v".to_vec(),
            lease,
        }];
        match state.decide(&Txn { when: vec![], then }).unwrap() {
            Decision::Change(change) => state.apply(change),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn history_is_bounded_and_never_starts_within_a_revision() {
        let mut state = State::new(1, vec![], 4, 1 << 20);
        let two = |a: &str, b: &str| Txn {
            when: vec![],
            then: vec![Op::put(a, "1"), Op::put(b, "2")],
        };
        for _ in 0..3 {
            match state.decide(&two("a", "b")).unwrap() {
                Decision::Change(change) => state.apply(change),
                other => panic!("{other:?}"),
            }
        }
        // Six events, four allowed: the first revision went as a whole.
        assert!(matches!(
            state.since("", 2, 100),
            Err(Error::Compacted {
                requested: 2,
                compacted: 2
            })
        ));
        let (events, next) = state.since("", 3, 100).unwrap();
        assert_eq!((events.len(), next), (4, 5));
        // A small window ends between revisions, not within one.
        let (events, next) = state.since("", 3, 1).unwrap();
        assert_eq!((events.len(), next), (2, 4));
        // One value larger than the whole history leaves it empty, not broken.
        let mut state = State::new(1, vec![], 4, 10);
        put(&mut state, "k", None);
        assert!(matches!(
            state.since("", 2, 100),
            Err(Error::Compacted { .. })
        ));
        assert_eq!(state.since("", 3, 100).unwrap(), (vec![], 3));
    }

    #[test]
    fn a_lease_ends_by_the_clock_that_is_passed() {
        let mut state = State::new(0, vec![], 100, 1 << 20);
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let lease = state.grant(second, start);
        put(&mut state, "a", Some(lease));
        put(&mut state, "b", Some(lease));
        // Put again without a lease: it lets go of the old one.
        put(&mut state, "b", None);
        state.keep_alive(lease, start + second / 2).unwrap();
        assert!(state.expired(start + second).is_empty());
        assert_eq!(state.expired(start + second * 3 / 2), [lease]);
        assert!(state.keep_alive(lease, start + second * 3 / 2).is_err());
        let change = state.decide_end(lease).unwrap();
        state.apply(change);
        assert!(state.get("a").is_none());
        assert!(state.get("b").is_some());
        assert!(state.decide_end(lease).is_none());
    }

    #[test]
    fn only_what_outlives_the_process_is_written() {
        let mut state = State::new(0, vec![], 100, 1 << 20);
        let lease = state.grant(Duration::from_secs(1), Instant::now());
        put(&mut state, "kept", None);
        let txn = Txn {
            when: vec![],
            then: vec![
                Op::put_leased("leased", "v", lease),
                Op::put_leased("kept", "v", lease),
                Op::put("new", "v"),
            ],
        };
        let Decision::Change(change) = state.decide(&txn).unwrap() else {
            panic!()
        };
        let durable = state.durable(&change);
        assert_eq!(durable.len(), 2, "{durable:?}");
        assert_eq!(durable[0], Durable::Remove("kept"));
        assert!(matches!(durable[1], Durable::Put(entry) if entry.key == "new"));
    }
}
