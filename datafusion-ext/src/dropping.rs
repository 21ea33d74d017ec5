//! `DROP TABLE` of tables that `CREATE EXTERNAL TABLE … STORED AS STOA` made.

use std::any::Any;
use std::time::{Duration, Instant};

use datafusion::common::{DataFusionError, Result, TableReference, plan_err};
use datafusion::execution::context::SessionContext;
use stoa_layout::TableName;
use stoa_metastore::LayoutsDropped;

use crate::session::Stoa;
use crate::table::StoaTable;

/// How long a dropped table may take to leave memory.
const LEAVES_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Stoa {
    /// Drops a table of Stoa's that SQL made: its layouts are forgotten, it leaves memory, and its
    /// files stay. DataFusion's own `DROP TABLE` cannot, because a schema forgets a table without
    /// waiting for anything; call this before it. Returns whether there was such a table. What a
    /// session has registered itself under that name is dropped by the session.
    ///
    /// # Errors
    /// For a table that was published with `stoa layout create`, which everybody may count on; where
    /// this process has no part in the state; and where the metastore does not answer.
    pub async fn drop_table(
        &self,
        session: &SessionContext,
        table: &TableReference,
    ) -> Result<bool> {
        let Some(name) = self.name_of(session, table) else {
            return Ok(false);
        };
        let reference = TableReference::partial(name.schema(), name.table());
        // A table whose files are gone cannot be opened, and can be dropped all the same.
        let is_ours = match session.table_provider(reference).await {
            Ok(provider) => {
                let found: &dyn Any = provider.as_ref();
                let ours = found.downcast_ref::<StoaTable>();
                let is_ours = ours.is_some_and(|ours| ours.table().catalog().table == name);
                if !is_ours && !self.tables.is_listed(&name, &provider) {
                    // The session's own, which hides ours of that name.
                    return Ok(false);
                }
                true
            }
            Err(_) => false,
        };
        let dropped = match &self.publisher {
            Some(publisher) => publisher
                .drop_table(&name)
                .await
                .map_err(|error| DataFusionError::External(Box::new(error)))?,
            None => None,
        };
        let reader = self.reader();
        match dropped {
            Some(LayoutsDropped::Dropped { .. }) => {}
            Some(LayoutsDropped::NotTheirs) => {
                return plan_err!(
                    "table {name} was published with `stoa layout create`, not with CREATE EXTERNAL \
                     TABLE, and stays; `stoa layout drop {name}` drops it for everybody"
                );
            }
            None if is_ours => {
                return plan_err!(
                    "table {name} is read from memory alone, because the state is not at hand; \
                     `stoa layout drop {name}` drops it once that is"
                );
            }
            Some(LayoutsDropped::Nothing) | None => {
                reader.forget(&name);
                if is_ours && reader.view().table(&name).is_some() {
                    return plan_err!(
                        "no layout of table {name} is published any more, but it is held in memory; \
                         `stoa unload {name}` frees it"
                    );
                }
                return Ok(false);
            }
        }
        reader.forget(&name);
        self.tables.refresh_names().await;
        let started = Instant::now();
        loop {
            let has_left = match &self.publisher {
                // Where it does not answer, this host's memory says enough.
                Some(publisher) => publisher.has_left(&name).await.unwrap_or(true),
                None => true,
            };
            if has_left && reader.view().table(&name).is_none() {
                break;
            }
            if started.elapsed() > LEAVES_WITHIN {
                tracing::warn!(
                    table = %name,
                    "the table is dropped, but still in memory: is the coordinator running?"
                );
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(true)
    }

    /// The table of ours that a reference would mean.
    fn name_of(&self, session: &SessionContext, table: &TableReference) -> Option<TableName> {
        let state = session.state();
        let defaults = &state.config_options().catalog;
        let resolved = table
            .clone()
            .resolve(&defaults.default_catalog, &defaults.default_schema);
        if *resolved.catalog != *defaults.default_catalog {
            return None;
        }
        TableName::new(&resolved.schema, &resolved.table).ok()
    }
}
