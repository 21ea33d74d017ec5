//! Reading the footers of a layout version, in the background.

use std::sync::Arc;

use stoa_layout::{LayoutDocument, TableCatalog};
use stoa_metastore::{Error as StoreError, Records, table_version};
use stoa_origin::Origin;
use tokio::task::JoinError;

use crate::error::{Error, Result};
use crate::sized::SizedTable;
use crate::term::Term;

/// The part of the room that estimates may be wrong by, one in so many.
const ESTIMATE_SHARE: u64 = 10;

/// A table version whose footers were read, or were not.
pub(crate) type Loaded = (String, u64, Result<SizedTable>);

impl Term<'_> {
    pub(crate) fn start_loading(&mut self, table: String, version: u64) {
        self.memory.catalog_loading(&table, version);
        let (records, origin) = (self.shared.records.clone(), self.shared.origin.clone());
        let now_ms = self.shared.clock.unix_ms();
        let look = self.memory.table(&table).is_outdated();
        let budget_bytes = self.room(&table);
        self.loads.spawn(async move {
            // A panic in a task of its own costs one table, not the term.
            let work = tokio::spawn(load(
                records,
                origin,
                table.clone(),
                version,
                look,
                now_ms,
                budget_bytes,
            ));
            let abort = AbortOnDrop(work.abort_handle());
            let sized = work.await.unwrap_or_else(|panic| {
                Err(Error::Died {
                    table_version: table_version(&table, version),
                    reason: panic.to_string(),
                })
            });
            drop(abort);
            (table, version, sized)
        });
    }

    /// What the choice of a table's forms may fill: some of the room that its workers have, because
    /// it goes by estimates. Without workers there is nothing to go by.
    fn room(&self, table: &str) -> u64 {
        if !self.memory.anybody_live() {
            return u64::MAX;
        }
        let reserve = self.shared.settings.reserve_ratio;
        let room = self.memory.room_for(table, &self.view, reserve);
        room - room / ESTIMATE_SHARE
    }

    pub(crate) fn loaded(&mut self, loaded: Result<Loaded, JoinError>) {
        match loaded {
            Ok((table, version, Ok(sized))) => {
                tracing::info!(table, version, chunks = sized.len(), "footers read");
                self.memory.catalog_loaded(&table, version, sized.forms());
                self.sized.insert((table, version), Arc::new(sized));
            }
            Ok((table, version, Err(error))) => self.failed(&table, version, &error),
            Err(error) => tracing::error!(%error, "a loading task died"),
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads the footers of the files that a layout version names, or, to `look`, of those that lie
/// at its location now.
async fn load(
    records: Records,
    origin: Origin,
    table: String,
    version: u64,
    look: bool,
    now_unix_ms: u64,
    budget_bytes: u64,
) -> Result<SizedTable> {
    let named = table_version(&table, version);
    let Some(json) = records.layout(&table, version).await? else {
        let known = records.layouts(&table).await?;
        return Err(StoreError::UnknownLayout {
            table_version: named,
            known,
        }
        .into());
    };
    let failed = |source| Error::Layout {
        table_version: named.clone(),
        source: Box::new(source),
    };
    let document = LayoutDocument::from_json(&json).map_err(failed)?;
    let found = document.table_version().to_string();
    if found != named {
        return Err(Error::OtherLayout {
            table_version: named,
            found,
        });
    }
    let mut catalog = TableCatalog::load(&origin, &document, now_unix_ms)
        .await
        .map_err(failed)?;
    // Without names in the layout, reading it is looking.
    if look
        && !document.files.is_empty()
        && let Some(newer) = catalog
            .refresh(&origin, now_unix_ms)
            .await
            .map_err(failed)?
    {
        catalog = newer;
    }
    let sized = tokio::task::spawn_blocking(move || SizedTable::new(&catalog, budget_bytes)).await;
    sized.map_err(|panic| Error::Died {
        table_version: named.clone(),
        reason: panic.to_string(),
    })?
}
