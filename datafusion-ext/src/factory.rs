//! `CREATE EXTERNAL TABLE … STORED AS STOA LOCATION …`.

use std::sync::Arc;

use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider, TableProviderFactory};
use datafusion::common::{DataFusionError, Result, plan_err};
use datafusion::datasource::listing::ListingTableUrl;
use datafusion::datasource::listing_table_factory::ListingTableFactory;
use datafusion::logical_expr::CreateExternalTable;
use stoa_layout::{Location, RootColumn, TableName};
use stoa_reader::Table;

use crate::catalog::Tables;
use crate::embedded::{EmbeddedError, Publisher};

/// Opens the table's cached state, or makes it a cached table.
///
/// A table without a layout gets version 1 of all its columns, which is loaded in the background
/// while queries read the origin. Where the statement or the session asks for what a cached table
/// does not have (declared columns, options of the format, an order, other files or types), the
/// table is the one that `STORED AS PARQUET` makes, and its scans use what is cached.
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
            return match is_declared(command) || reads_otherwise(table.table(), command, state) {
                true => self.listed(&name, state, command, location).await,
                false => Ok(Arc::new(table)),
            };
        }
        // Before anything is published: it may be refused.
        let declared = match is_declared(command) {
            true => Some(self.listed(&name, state, command, location).await?),
            false => None,
        };
        let publisher = match &self.publisher {
            Some(publisher) => publisher.clone(),
            None => Publisher::offline(self.tables.reader.origin().clone()),
        };
        let created = publisher
            .create(&name, location, &command.table_partition_cols)
            .await;
        let catalog = match (created, declared) {
            (Ok(_), Some(declared)) => return Ok(declared),
            // What the statement declares may make a table of files that make none by themselves.
            (Err(EmbeddedError::Layout(error)), Some(declared)) => {
                tracing::warn!(table = %name, %error, "nothing of the table is cached");
                return Ok(declared);
            }
            (Ok(catalog), None) => catalog,
            (Err(error), _) => return Err(external(Box::new(error))),
        };
        let fresh = self.tables.reader.remember_fresh(Arc::new(catalog), None);
        if reads_otherwise(&fresh, command, state) {
            return self.listed(&name, state, command, location).await;
        }
        let table =
            crate::StoaTable::of(&self.tables.reader, &fresh, Arc::clone(&self.tables.plans))?;
        Ok(Arc::new(table))
    }
}

impl StoaTableFactory {
    /// The table as DataFusion makes it of Parquet files: its scans use what is cached of them.
    async fn listed(
        &self,
        name: &TableName,
        state: &dyn Session,
        command: &CreateExternalTable,
        location: &str,
    ) -> Result<Arc<dyn TableProvider>> {
        let url = ListingTableUrl::parse(location)?.object_store();
        if state.runtime_env().object_store(&url).is_err() {
            let external = |error| DataFusionError::External(Box::new(error));
            let store = Location::parse(location).map_err(external)?.store;
            let stores = self.tables.reader.origin().stores();
            let store = stores.get(&store).map_err(external)?;
            let environment = state.runtime_env();
            environment.register_object_store(url.as_ref(), store);
        }
        let command = CreateExternalTable {
            file_type: "PARQUET".to_owned(),
            ..command.clone()
        };
        let listed = ListingTableFactory::new().create(state, &command).await?;
        self.tables.remember_listed(name, &listed);
        Ok(listed)
    }
}

/// Whether a statement says of the table what its files do not: columns, how they are read, their
/// order.
fn is_declared(command: &CreateExternalTable) -> bool {
    !command.schema.fields().is_empty()
        || !command.options.is_empty()
        || !command.order_exprs.is_empty()
}

/// Whether the session's settings make DataFusion read other files, columns or types at this place
/// than the cached table has.
fn reads_otherwise(table: &Table, command: &CreateExternalTable, state: &dyn Session) -> bool {
    let catalog = table.catalog();
    let execution = &state.config_options().execution;
    let infers = execution.listing_table_factory_infer_partitions;
    let partitions = &catalog.partition_columns;
    let partitions_differ =
        command.table_partition_cols.is_empty() && !infers && !partitions.is_empty();
    let location = Location::parse(&catalog.location).ok();
    let below = |path: &str| -> bool {
        let relative = location
            .as_ref()
            .and_then(|location| location.relative(path));
        let segments = relative.unwrap_or(path).split('/');
        segments.filter(|segment| !segment.contains('=')).count() > 1
    };
    // Whether they are read is a setting that may change after the table is made.
    let files_differ = catalog.files.iter().any(|file| below(&file.identity.path));
    let has = |is: fn(&RootColumn) -> bool| {
        let mut files = catalog.files.iter();
        files.any(|file| file.roots.iter().any(is))
    };
    let parquet = &execution.parquet;
    let types_differ = (parquet.coerce_int96.is_some() && has(|root| root.int96))
        || (parquet.binary_as_string && has(|root| is_binary(root.field.data_type())));
    partitions_differ || files_differ || types_differ
}

fn is_binary(data_type: &DataType) -> bool {
    use DataType::{Binary, BinaryView, LargeBinary};
    matches!(data_type, Binary | LargeBinary | BinaryView)
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
