//! Every table with a published layout, as `schema.table`, in the session's default catalog.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, MemorySchemaProvider, SchemaProvider, TableProvider};
use datafusion::common::{DataFusionError, Result};
use stoa_cache_manager::Waker;
use stoa_layout::{LayoutDocument, TableCatalog, TableName};
use stoa_metastore::Records;
use stoa_reader::Reader;

use crate::clock::now_unix_ms;
use crate::table::{StoaTable, TablePlans};

/// Where tables are found: the shared memory first; the metastore, where the process has it, for
/// those that no worker has published yet.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) reader: Reader,
    pub(crate) records: Option<Records>,
    pub(crate) plans: Arc<TablePlans>,
    /// The worker in this process, if it may be at rest.
    pub(crate) waker: Option<Waker>,
    /// Names with a layout in the metastore, as of the last look.
    laid_out: RwLock<BTreeSet<TableName>>,
    /// Tables that were created `STORED AS STOA` and that the session reads as DataFusion makes
    /// them of their files, so that what it has under the name is known for one of ours.
    listed: Mutex<HashMap<TableName, Weak<dyn TableProvider>>>,
}

impl Tables {
    pub(crate) fn new(reader: Reader, records: Option<Records>) -> Self {
        Self {
            reader,
            records,
            plans: Arc::default(),
            waker: None,
            laid_out: RwLock::default(),
            listed: Mutex::default(),
        }
    }

    pub(crate) fn remember_listed(&self, name: &TableName, table: &Arc<dyn TableProvider>) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.retain(|_, table| table.strong_count() > 0);
        listed.insert(name.clone(), Arc::downgrade(table));
    }

    /// Whether that is what [`Tables::remember_listed`] was told under the name.
    pub(crate) fn is_listed(&self, name: &TableName, table: &Arc<dyn TableProvider>) -> bool {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed
            .get(name)
            .is_some_and(|known| std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(table)))
    }

    /// Looks up the names of the layouts in the metastore.
    pub(crate) async fn refresh_names(&self) {
        let Some(records) = &self.records else { return };
        match records.layout_tables().await {
            Ok(names) => {
                let names = names
                    .iter()
                    .filter_map(|name| TableName::parse(name).ok())
                    .collect();
                *self
                    .laid_out
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = names;
            }
            Err(error) => tracing::debug!(%error, "layouts not listed"),
        }
    }

    fn names(&self) -> BTreeSet<TableName> {
        let mut names = self
            .laid_out
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        names.extend(self.reader.view().table_names().cloned());
        names
    }

    /// The table, from shared memory or else read from the origin by its newest layout.
    pub(crate) async fn open(&self, name: &TableName) -> Result<Option<StoaTable>> {
        if let Some(table) = StoaTable::open_with(&self.reader, name, Arc::clone(&self.plans))? {
            if let Some(waker) = &self.waker {
                waker.table_is_read(&name.to_string());
            }
            return Ok(Some(table));
        }
        let Some(records) = &self.records else {
            return Ok(None);
        };
        let external = DataFusionError::External;
        let Some(document) = newest_layout(records, &name.to_string())
            .await
            .map_err(|error| external(Box::new(error)))?
        else {
            return Ok(None);
        };
        let document: LayoutDocument =
            serde_json::from_str(&document).map_err(|error| external(Box::new(error)))?;
        let now = now_unix_ms();
        let catalog = TableCatalog::load(self.reader.origin(), &document, now)
            .await
            .map_err(|error| external(Box::new(error)))?;
        tracing::info!(table = %name, "not in shared memory yet, reading from the origin");
        let table = self.reader.remember_fresh(Arc::new(catalog), None);
        StoaTable::of(&self.reader, &table, Arc::clone(&self.plans)).map(Some)
    }
}

async fn newest_layout(records: &Records, table: &str) -> stoa_metastore::Result<Option<String>> {
    match records.latest_layout(table).await? {
        Some(version) => records.layout(table, version).await,
        None => Ok(None),
    }
}

/// The session's default catalog, with Stoa's schemas beside its own.
#[derive(Debug)]
pub(crate) struct StoaCatalog {
    own: Arc<dyn CatalogProvider>,
    tables: Arc<Tables>,
}

impl StoaCatalog {
    pub(crate) fn new(own: Arc<dyn CatalogProvider>, tables: Arc<Tables>) -> Self {
        Self { own, tables }
    }
}

impl CatalogProvider for StoaCatalog {
    fn schema_names(&self) -> Vec<String> {
        let mut names: BTreeSet<String> = self.own.schema_names().into_iter().collect();
        names.extend(
            self.tables
                .names()
                .iter()
                .map(|name| name.schema().to_owned()),
        );
        names.into_iter().collect()
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        let own = self.own.schema(name);
        let ours = self
            .tables
            .names()
            .iter()
            .any(|table| table.schema() == name);
        if own.is_none() && !ours {
            return None;
        }
        let own = own.unwrap_or_else(|| {
            let schema: Arc<dyn SchemaProvider> = Arc::new(MemorySchemaProvider::new());
            // Registered, so that tables created in it later are found again.
            let _ = self.own.register_schema(name, Arc::clone(&schema));
            schema
        });
        let tables = Arc::clone(&self.tables);
        Some(Arc::new(StoaSchema {
            name: name.to_owned(),
            own,
            tables,
        }))
    }

    fn register_schema(
        &self,
        name: &str,
        schema: Arc<dyn SchemaProvider>,
    ) -> Result<Option<Arc<dyn SchemaProvider>>> {
        self.own.register_schema(name, schema)
    }

    fn deregister_schema(
        &self,
        name: &str,
        cascade: bool,
    ) -> Result<Option<Arc<dyn SchemaProvider>>> {
        self.own.deregister_schema(name, cascade)
    }
}

/// A schema: the session's own tables first, then Stoa's.
#[derive(Debug)]
struct StoaSchema {
    name: String,
    own: Arc<dyn SchemaProvider>,
    tables: Arc<Tables>,
}

impl StoaSchema {
    fn table_name(&self, table: &str) -> Option<TableName> {
        TableName::new(&self.name, table).ok()
    }
}

#[async_trait]
impl SchemaProvider for StoaSchema {
    fn table_names(&self) -> Vec<String> {
        let mut names: BTreeSet<String> = self.own.table_names().into_iter().collect();
        let ours = self.tables.names();
        let ours = ours.iter().filter(|name| name.schema() == self.name);
        names.extend(ours.map(|name| name.table().to_owned()));
        names.into_iter().collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        if let Some(own) = self.own.table(name).await? {
            return Ok(Some(own));
        }
        let Some(name) = self.table_name(name) else {
            return Ok(None);
        };
        let table = self.tables.open(&name).await?;
        Ok(table.map(|table| Arc::new(table) as Arc<dyn TableProvider>))
    }

    fn register_table(
        &self,
        name: String,
        table: Arc<dyn TableProvider>,
    ) -> Result<Option<Arc<dyn TableProvider>>> {
        self.own.register_table(name, table)
    }

    fn deregister_table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let own = self.own.deregister_table(name)?;
        let ours = |name: &TableName| self.tables.names().contains(name);
        if own.is_none() && self.table_name(name).is_some_and(|name| ours(&name)) {
            tracing::warn!(
                schema = self.name,
                table = name,
                "the table stays, because its layout does; Stoa::drop_table drops it"
            );
        }
        Ok(own)
    }

    fn table_exist(&self, name: &str) -> bool {
        self.own.table_exist(name)
            || self
                .table_name(name)
                .is_some_and(|name| self.tables.names().contains(&name))
    }
}
