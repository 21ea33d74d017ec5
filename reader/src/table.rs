//! A cached table as a process sees it: its catalog, with what every scan asks of a file worked out
//! once.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use parquet::file::metadata::ParquetMetaData;
use stoa_layout::{RootColumn, TableCatalog};
use stoa_origin::ObjectIdentity;

/// A table of the cache: the snapshot of its files that its layout version names.
#[derive(Debug)]
pub struct Table {
    catalog: Arc<TableCatalog>,
    files: Vec<Arc<TableFile>>,
    /// Made when somebody first asks for a file by its path.
    by_path: OnceLock<HashMap<(String, String), usize>>,
}

impl Table {
    /// Wraps a catalog.
    pub fn new(catalog: Arc<TableCatalog>) -> Self {
        let files: Vec<_> = (0..catalog.files.len())
            .map(|index| Arc::new(TableFile::new(Arc::clone(&catalog), index)))
            .collect();
        Self {
            catalog,
            files,
            by_path: OnceLock::new(),
        }
    }

    /// The catalog: names, schema, files with identities, layout.
    pub fn catalog(&self) -> &Arc<TableCatalog> {
        &self.catalog
    }

    /// The files, in the order of the catalog.
    pub fn files(&self) -> &[Arc<TableFile>] {
        &self.files
    }

    /// The file at a path of a store, whatever its content.
    pub fn file_at(&self, store: &str, path: &str) -> Option<&Arc<TableFile>> {
        let by_path = self.by_path.get_or_init(|| {
            let named = self.files.iter().enumerate().map(|(at, file)| {
                let identity = file.identity();
                ((identity.store.clone(), identity.path.clone()), at)
            });
            named.collect()
        });
        // A lookup by borrowed pair would need a wrapper type; this runs once a file and scan.
        by_path
            .get(&(store.to_owned(), path.to_owned()))
            .map(|i| &self.files[*i])
    }
}

/// A file of a table.
#[derive(Debug)]
pub struct TableFile {
    catalog: Arc<TableCatalog>,
    index: usize,
    key: OnceLock<Vec<u8>>,
    decoded_schema: OnceLock<SchemaRef>,
    /// The metadata without its claims, once one of them was found to be untrue.
    without_claims: OnceLock<Arc<ParquetMetaData>>,
}

impl TableFile {
    fn new(catalog: Arc<TableCatalog>, index: usize) -> Self {
        Self {
            catalog,
            index,
            key: OnceLock::new(),
            decoded_schema: OnceLock::new(),
            without_claims: OnceLock::new(),
        }
    }

    /// Which content of which object this is.
    pub fn identity(&self) -> &ObjectIdentity {
        &self.catalog.files[self.index].identity
    }

    /// The key of the file in the index: [`ObjectIdentity::to_key`].
    pub fn key(&self) -> &[u8] {
        self.key.get_or_init(|| self.identity().to_key())
    }

    /// Footer and page indexes.
    pub fn metadata(&self) -> &Arc<ParquetMetaData> {
        let metadata = &self.catalog.files[self.index].metadata;
        self.without_claims.get().unwrap_or(metadata)
    }

    /// Leaves out of [`TableFile::metadata`] from now on all that the footer says of values, because
    /// of what its values were found to be.
    pub fn disbelieve(&self, why: &str) {
        self.without_claims.get_or_init(|| {
            let url = self.identity().url();
            tracing::warn!(file = %url, why, "what the footer says of values is not so, and is left out");
            Arc::new(stoa_layout::without_claims(self.metadata()))
        });
    }

    /// Whether nothing that the footer says was found to be untrue.
    pub fn is_believed(&self) -> bool {
        self.without_claims.get().is_none()
    }

    /// Position in the catalog's list of files.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The table's catalog.
    pub fn catalog(&self) -> &Arc<TableCatalog> {
        &self.catalog
    }

    /// The schema of the arrays that the worker decodes this file to.
    pub fn decoded_schema(&self) -> &SchemaRef {
        let file = &self.catalog.files[self.index];
        self.decoded_schema
            .get_or_init(|| stoa_layout::decoded_schema(&file.schema))
    }

    /// The top-level columns, in the order of [`TableFile::decoded_schema`].
    pub fn roots(&self) -> &[RootColumn] {
        &self.catalog.files[self.index].roots
    }

    /// The bytes of `range`, if the catalog holds them (Bloom filters).
    pub fn extra(&self, start: u64, end: u64) -> Option<Bytes> {
        self.catalog.files[self.index]
            .extra
            .iter()
            .find_map(|(at, bytes)| {
                let from = start.checked_sub(*at)?;
                let to = end.checked_sub(*at)?;
                (to <= bytes.len() as u64 && from <= to)
                    .then(|| bytes.slice(from as usize..to as usize))
            })
    }
}
