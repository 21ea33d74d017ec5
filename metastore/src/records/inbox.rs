//! The inbox: the bare key `layout_version`, which `etcdctl put` writes, read as a history, so
//! that two puts in a row both count. Beside it, what of it was refused.

use futures::StreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::{Leadership, Records, decode, decode_all, encode};
use crate::error::{Error, Result};
use crate::keys;
use crate::model::Rejection;
use crate::store::{Entry, Op, WatchEvent, WatchStream};

/// The most rejections kept; older ones are removed.
pub const REJECTIONS_MAX: usize = 64;

/// One put of the inbox key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxEntry {
    /// When it was put; what to remember once it is handled.
    pub revision: i64,
    /// What was put, such as `tpch.lineitem:1`; not checked. Bytes that are no UTF-8 are replaced.
    pub request: String,
    /// Puts before this one may have been compacted away unseen.
    pub history_lost: bool,
}

impl InboxEntry {
    fn of(entry: &Entry, history_lost: bool) -> Self {
        InboxEntry {
            revision: entry.mod_revision,
            request: String::from_utf8_lossy(&entry.value).trim().to_owned(),
            history_lost,
        }
    }
}

/// Puts of the inbox key in order. An error is the last item: call [`Records::inbox_since`] again.
pub type InboxStream = BoxStream<'static, Result<InboxEntry>>;

/// The value of `inbox/handled`.
#[derive(Serialize, Deserialize)]
struct Handled {
    revision: i64,
}

impl Records {
    /// Every put of the inbox key after `revision`, those of the past first, then as they come.
    ///
    /// Where the past is compacted away, the key's present value stands for it (`history_lost`).
    pub async fn inbox_since(&self, revision: i64) -> Result<InboxStream> {
        let from = revision.max(0) + 1;
        let events = self.store.watch(keys::INBOX, from).await?;
        let start = Inbox {
            records: self.clone(),
            events: Some(events),
            after: from - 1,
        };
        Ok(futures::stream::unfold(start, Inbox::next).boxed())
    }

    /// The revision up to which the inbox was handled; 0 if it never was.
    pub async fn inbox_handled(&self) -> Result<i64> {
        let entry = self.store.get(keys::INBOX_HANDLED).await?;
        Ok(entry
            .as_ref()
            .map(decode::<Handled>)
            .transpose()?
            .map_or(0, |h| h.revision))
    }

    /// Remembers that the inbox was handled up to `revision`.
    pub async fn set_inbox_handled(&self, leadership: &Leadership, revision: i64) -> Result<()> {
        let value = encode(&Handled { revision });
        self.fenced_batches(leadership, vec![Op::put(keys::INBOX_HANDLED, value)])
            .await
    }

    /// Records that a request was refused; the newest [`REJECTIONS_MAX`] are kept.
    pub async fn reject(&self, leadership: &Leadership, rejection: &Rejection) -> Result<()> {
        let key = keys::rejection(rejection.revision);
        let kept = self.store.list_keys(keys::REJECTION_PREFIX).await?;
        // The keys are sorted by age.
        let surplus = (kept.entries.len() + 1).saturating_sub(REJECTIONS_MAX);
        let mut ops: Vec<Op> = kept
            .entries
            .iter()
            .filter(|entry| entry.key != key)
            .take(surplus)
            .map(|entry| Op::delete(&entry.key))
            .collect();
        ops.push(Op::put(key, encode(rejection)));
        self.fenced_batches(leadership, ops).await
    }

    /// The refused requests, oldest first.
    pub async fn rejections(&self) -> Result<Vec<Rejection>> {
        Ok(decode_all(
            &self.store.list(keys::REJECTION_PREFIX).await?.entries,
        ))
    }
}

struct Inbox {
    records: Records,
    /// `None` after an error: the stream is over.
    events: Option<WatchStream>,
    /// The last revision that was yielded, or where the stream began.
    after: i64,
}

impl Inbox {
    async fn next(mut self) -> Option<(Result<InboxEntry>, Self)> {
        loop {
            let events = self.events.as_mut()?;
            let ended = || Error::WatchEnded {
                prefix: keys::INBOX.to_owned(),
                reason: "end of stream".to_owned(),
            };
            match events.next().await.unwrap_or_else(|| Err(ended())) {
                // The prefix also covers `layout_version/{table}`.
                Ok(WatchEvent::Put(entry)) if entry.key == keys::INBOX => {
                    self.after = entry.mod_revision;
                    return Some((Ok(InboxEntry::of(&entry, false)), self));
                }
                Ok(_) => {}
                Err(Error::Compacted { .. }) => match self.catch_up().await {
                    Ok(Some(entry)) => return Some((Ok(entry), self)),
                    Ok(None) => {}
                    Err(error) => {
                        self.events = None;
                        return Some((Err(error), self));
                    }
                },
                Err(error) => {
                    self.events = None;
                    return Some((Err(error), self));
                }
            }
        }
    }

    /// What is left when history is gone: the present value, then the watch from there.
    async fn catch_up(&mut self) -> Result<Option<InboxEntry>> {
        let store = &self.records.store;
        let listing = store.list(keys::INBOX).await?;
        self.events = Some(store.watch(keys::INBOX, listing.revision + 1).await?);
        let present = listing
            .entries
            .iter()
            .find(|entry| entry.key == keys::INBOX);
        let news = present.filter(|entry| entry.mod_revision > self.after);
        self.after = self.after.max(listing.revision);
        Ok(news.map(|entry| InboxEntry::of(entry, true)))
    }
}
