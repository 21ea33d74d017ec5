//! `CREATE EXTERNAL TABLE … STORED AS STOA LOCATION …`.

use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider, TableProviderFactory};
use datafusion::common::{DataFusionError, Result, plan_err};
use datafusion::logical_expr::CreateExternalTable;
use stoa_layout::TableName;

use crate::catalog::Tables;
use crate::embedded::Publisher;

/// Opens the table's cached state, or makes it a cached table.
///
/// A table without a layout gets version 1 of all its columns, which is loaded in the background
/// while queries read the origin.
#[derive(Debug)]
pub(crate) struct StoaTableFactory {
    tables: Arc<Tables>,
    publisher: Option<Publisher>,
}

impl StoaTableFactory {
    pub(crate) fn new(tables: Arc<Tables>, publisher: Option<Publisher>) -> Self {
        Self { tables, publisher }
    }
}

#[async_trait]
impl TableProviderFactory for StoaTableFactory {
    async fn create(
        &self,
        state: &dyn Session,
        command: &CreateExternalTable,
    ) -> Result<Arc<dyn TableProvider>> {
        let schema = command
            .name
            .schema()
            .unwrap_or(&state.config_options().catalog.default_schema)
            .to_owned();
        let external = |error| DataFusionError::External(error);
        let name = TableName::new(&schema, command.name.table())
            .map_err(|error| external(Box::new(error)))?;
        if !command.schema.fields().is_empty() {
            return plan_err!(
                "STORED AS STOA takes the schema from the Parquet files; leave out the column list"
            );
        }
        let [location] = command.locations.as_slice() else {
            return plan_err!(
                "STORED AS STOA takes one location, found {}; use a common prefix",
                command.locations.len()
            );
        };
        if let Some(table) = self.tables.open(&name).await? {
            let known = &table.table().catalog().location;
            if !same_place(known, location) {
                return plan_err!(
                    "table {name} is already laid out at {known}; to cache {location} under this \
                     name, publish a new version with `stoa layout create`"
                );
            }
            return Ok(Arc::new(table));
        }
        let publisher = match &self.publisher {
            Some(publisher) => publisher.clone(),
            None => Publisher::offline(self.tables.reader.origin().clone()),
        };
        let catalog = publisher
            .create(&name, location, &command.table_partition_cols)
            .await
            .map_err(|error| external(Box::new(error)))?;
        let fresh = self.tables.reader.remember_fresh(Arc::new(catalog));
        let table =
            crate::StoaTable::of(&self.tables.reader, &fresh, Arc::clone(&self.tables.plans))?;
        Ok(Arc::new(table))
    }
}

/// Whether two spellings name one location; what cannot be parsed is compared as text.
fn same_place(one: &str, other: &str) -> bool {
    match (
        stoa_origin::Location::parse(one),
        stoa_origin::Location::parse(other),
    ) {
        (Ok(one), Ok(other)) => one.store == other.store && one.path == other.path,
        _ => one == other,
    }
}
