//! The inbox: the bare key `layout_version`, which `etcdctl put` writes.

use std::time::Duration;

use futures::StreamExt;
use stoa_metastore::{Error as StoreError, ErrorKind, InboxEntry, InboxStream, keys};

use crate::error::Result;
use crate::term::Term;
use crate::view;

/// The pause before the inbox is read again.
const READ_AGAIN: Duration = Duration::from_millis(100);

impl Term<'_> {
    pub(crate) async fn open_inbox(&mut self) {
        match self.shared.records.inbox_since(self.inbox_handled).await {
            Ok(stream) => self.inbox = Some(stream),
            Err(error) => tracing::debug!(%error, "the inbox cannot be read yet"),
        }
    }

    /// One put of the bare `layout_version` key. What cannot be handled now is read again.
    pub(crate) async fn handle_inbox(
        &mut self,
        entry: Result<InboxEntry, StoreError>,
    ) -> Result<()> {
        let handled = match entry {
            Ok(entry) => self.handle_request(entry).await,
            Err(error) => Err(error),
        };
        match handled {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::Lost | ErrorKind::Config) => {
                Err(error.into())
            }
            Err(error) => {
                tracing::debug!(%error, "reading the inbox again");
                self.inbox = None;
                tokio::time::sleep(READ_AGAIN).await;
                Ok(())
            }
        }
    }

    async fn handle_request(&mut self, entry: InboxEntry) -> Result<(), StoreError> {
        if entry.history_lost {
            let lost = "requests written to layout_version while no coordinator ran may be lost: the metastore's history was compacted";
            tracing::warn!(lost);
            self.problems.insert("inbox", lost.to_owned());
        }
        let outcome = match view::parse_request(&entry.request) {
            Ok(request) if request.unloaded => self
                .shared
                .records
                .request_unload(&request.table)
                .await
                .map(drop),
            Ok(request) => self
                .shared
                .records
                .request_load(&request.table_version())
                .await
                .map(drop),
            Err(reason) => {
                self.reject(entry.request.clone(), reason, entry.revision)
                    .await?;
                Ok(())
            }
        };
        match outcome {
            Ok(()) => {}
            Err(StoreError::StaleVersion {
                table,
                current,
                given,
            }) if current == given && self.was_handled(&table, entry.revision).await? => {}
            Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::Broken) => {
                self.reject(entry.request.clone(), error.to_string(), entry.revision)
                    .await?;
            }
            Err(error) => return Err(error),
        }
        self.shared
            .records
            .set_inbox_handled(self.leadership, entry.revision)
            .await?;
        self.inbox_handled = entry.revision;
        Ok(())
    }

    /// Whether the request for this table was written after the inbox was: then the inbox was
    /// handled before, and only that it was handled was not remembered.
    async fn was_handled(&mut self, table: &str, inbox_revision: i64) -> Result<bool, StoreError> {
        let entry = self
            .shared
            .records
            .store()
            .get(&keys::layout_version(table))
            .await?;
        Ok(entry.is_some_and(|entry| entry.mod_revision > inbox_revision))
    }
}

/// The next put; never, while the inbox is not open.
pub(crate) async fn next_of(inbox: &mut Option<InboxStream>) -> Result<InboxEntry, StoreError> {
    match inbox {
        Some(stream) => match stream.next().await {
            Some(entry) => entry,
            None => Err(StoreError::WatchEnded {
                prefix: keys::INBOX.to_owned(),
                reason: "end of stream".to_owned(),
            }),
        },
        None => std::future::pending().await,
    }
}
