//! One watch on etcd.

use std::collections::VecDeque;

use etcd_client::{EventType, WatchResponse};

use super::{EtcdMetastore, entry_of};
use crate::error::{Error, Result};
use crate::store::WatchEvent;

/// One watch; dropping it ends the call, and with it the server's side.
pub(super) struct Watcher {
    pub(super) responses: etcd_client::WatchStream,
    pub(super) store: EtcdMetastore,
    pub(super) prefix: String,
    /// The first revision not yet delivered completely.
    pub(super) next: i64,
    pub(super) ready: VecDeque<WatchEvent>,
    pub(super) over: bool,
}

impl Watcher {
    pub(super) async fn next(mut self) -> Option<(Result<WatchEvent>, Self)> {
        loop {
            if self.over {
                return None;
            }
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            let taken = match self.responses.message().await {
                Ok(Some(response)) => self.take(&response),
                Ok(None) => Err(self.ended("the server closed the stream".to_owned())),
                Err(error) => {
                    let error = self.store.calls().explain("watch", error);
                    Err(self.ended(error.to_string()))
                }
            };
            if let Err(error) = taken {
                self.over = true;
                return Some((Err(error), self));
            }
        }
    }

    fn take(&mut self, response: &WatchResponse) -> Result<()> {
        if response.compact_revision() != 0 {
            let compacted = response.compact_revision();
            return Err(Error::Compacted {
                requested: self.next,
                compacted,
            });
        }
        if response.canceled() {
            return Err(self.ended(response.cancel_reason().to_owned()));
        }
        for event in response.events() {
            let Some(entry) = event.kv().and_then(entry_of) else {
                continue;
            };
            self.next = self.next.max(entry.mod_revision);
            self.ready.push_back(match event.event_type() {
                EventType::Put => WatchEvent::Put(entry),
                EventType::Delete => WatchEvent::Delete {
                    revision: entry.mod_revision,
                    key: entry.key,
                },
            });
        }
        if response.events().is_empty()
            && !response.created()
            && let Some(header) = response.header()
        {
            self.next = self.next.max(header.revision() + 1);
            self.ready.push_back(WatchEvent::Progress {
                revision: header.revision(),
            });
        }
        Ok(())
    }

    fn ended(&self, reason: String) -> Error {
        Error::WatchEnded {
            prefix: self.prefix.clone(),
            reason,
        }
    }
}
