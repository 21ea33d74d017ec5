//! What a table's files say about themselves.

use std::collections::HashMap;
use std::hash::Hasher;
use std::ops::Range;
use std::sync::Arc;

use arrow::datatypes::{DataType, FieldRef, SchemaRef};
use bytes::Bytes;
use parquet::file::metadata::ParquetMetaData;
use stoa_origin::ObjectIdentity;
use twox_hash::XxHash3_64;

use crate::document::LayoutDocument;
use crate::error::{Error, Result};
use crate::footer::chunk_range;
use crate::names::{LayoutVersion, TableName, TableVersion};

/// Footers and sizes of a snapshot of a table: all that planning a query over it needs.
///
/// Made by [`load`](TableCatalog::load), brought up to date by
/// [`refresh`](TableCatalog::refresh), carried by [`encode`](TableCatalog::encode).
#[derive(Clone, Debug, PartialEq)]
pub struct TableCatalog {
    /// The table.
    pub table: TableName,
    /// The layout version it was loaded for.
    pub version: LayoutVersion,
    /// Where the files lie.
    pub location: String,
    /// The files' schemas merged, types widened; without partition columns, without view types.
    pub schema: SchemaRef,
    /// Hive-style partition columns in path order, with their types.
    pub partition_columns: Vec<(String, DataType)>,
    /// The files that can be read, sorted by path.
    pub files: Vec<CatalogFile>,
    /// The files that cannot, sorted by path. Their rows are missing from `files`: whoever reads
    /// the table has to read or refuse them.
    pub rejected: Vec<RejectedFile>,
    /// When the location was last looked at, in milliseconds since 1970.
    pub looked_at_unix_ms: u64,
    /// The layout it was loaded for.
    pub layout: LayoutDocument,
}

/// One file of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct CatalogFile {
    /// Which bytes it is.
    pub identity: ObjectIdentity,
    /// When it was last written, in milliseconds since 1970; 0 if nobody said.
    pub last_modified_unix_ms: u64,
    /// Values of the table's partition columns, decoded from the path.
    pub partition_values: Vec<String>,
    /// The footer with page indexes. All offsets are those in the file.
    pub metadata: Arc<ParquetMetaData>,
    /// The footer as it is cached: page indexes, metadata and tail, byte by byte as in the file.
    pub footer_bytes: Bytes,
    /// More of the file that planning reads, by start in the file: Bloom filters.
    pub extra: Vec<(u64, Bytes)>,
    /// The file's own Arrow schema, without metadata.
    pub schema: SchemaRef,
    /// The root columns, in schema order.
    pub roots: Arc<[RootColumn]>,
}

/// A root column of a file and the leaves under it.
#[derive(Clone, Debug, PartialEq)]
pub struct RootColumn {
    /// Ordinal of its first leaf: the number of its chunks.
    pub first_leaf: u32,
    /// How many leaves it has; more than 1 if it is nested.
    pub leaves: u32,
    /// Its name and type in the file.
    pub field: FieldRef,
    /// Whether a leaf is INT96, whose decoding depends on the session.
    pub int96: bool,
    /// Whether a column before it has the same name: then no query can name it, and it is not part
    /// of the table.
    pub shadowed: bool,
}

impl RootColumn {
    /// The column's name.
    pub fn name(&self) -> &str {
        self.field.name()
    }

    /// Ordinals of its leaves.
    pub fn leaf_range(&self) -> Range<usize> {
        self.first_leaf as usize..(self.first_leaf + self.leaves) as usize
    }
}

/// A file that cannot be read as part of its table, and why.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RejectedFile {
    /// Where it is, for people.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
    /// Which bytes were looked at.
    pub identity: ObjectIdentity,
    /// Whether it only does not fit the table's other files, which may change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub misfit: bool,
}

impl TableCatalog {
    /// Table and version together.
    pub fn table_version(&self) -> TableVersion {
        TableVersion {
            table: self.table.clone(),
            version: self.version,
        }
    }

    /// Where each name stands in the schema, the first of equal ones: for looking up the columns of
    /// all files, of which there may be very many.
    pub(crate) fn places_by_name(&self) -> HashMap<&str, usize> {
        let fields = self.schema.fields().iter().enumerate().rev();
        fields
            .map(|(place, field)| (field.name().as_str(), place))
            .collect()
    }

    /// The root columns of a file, empty for a file that the catalog does not have.
    pub fn root_columns(&self, file: u32) -> &[RootColumn] {
        match self.files.get(file as usize) {
            Some(file) => &file.roots,
            None => &[],
        }
    }

    /// The files that were looked at, readable or not, sorted: what a layout document names as its
    /// snapshot.
    pub fn snapshot(&self) -> Vec<ObjectIdentity> {
        let rejected = self.rejected.iter().map(|file| &file.identity);
        let files = self.files.iter().map(|file| &file.identity);
        let mut snapshot: Vec<ObjectIdentity> = files.chain(rejected).cloned().collect();
        snapshot.sort();
        snapshot
    }

    /// Nothing, if every file can be read.
    ///
    /// # Errors
    /// [`Error::UnreadableFiles`], which names the first that cannot.
    pub fn check_readable(&self) -> Result<()> {
        let Some(first) = self.rejected.first() else {
            return Ok(());
        };
        Err(Error::UnreadableFiles {
            table: self.table.to_string(),
            count: self.rejected.len(),
            url: first.url.clone(),
            reason: first.reason.clone(),
        })
    }

    /// Names the set of files, readable or not, with their identities: catalogs with the same
    /// digest (16 hexadecimal digits) saw the same files.
    pub fn files_digest(&self) -> String {
        let mut hash = XxHash3_64::new();
        for identity in self.snapshot() {
            let key = identity.to_key();
            hash.write(&(key.len() as u64).to_le_bytes());
            hash.write(&key);
        }
        format!("{:016x}", hash.finish())
    }

    /// Rows of all files.
    pub fn rows(&self) -> u64 {
        self.files.iter().map(CatalogFile::rows).sum()
    }
}

impl CatalogFile {
    /// Rows of the file.
    pub fn rows(&self) -> u64 {
        let groups = self.metadata.row_groups();
        groups.iter().map(|group| group.num_rows() as u64).sum()
    }

    /// The root column whose first leaf is `column`.
    pub fn root(&self, column: u32) -> Option<&RootColumn> {
        let index = self
            .roots
            .binary_search_by_key(&column, |root| root.first_leaf);
        index.ok().map(|index| &self.roots[index])
    }

    /// The root column named `name`, the first of equal ones.
    pub fn root_named(&self, name: &str) -> Option<&RootColumn> {
        self.roots.iter().find(|root| root.name() == name)
    }

    /// The byte ranges of a chunk in the file, one for each leaf of its root column.
    ///
    /// # Errors
    /// [`Error::NoSuchChunk`].
    pub fn chunk_ranges(&self, row_group: u32, column: u32) -> Result<Vec<Range<u64>>> {
        let missing = || Error::NoSuchChunk {
            url: self.identity.url(),
            row_group,
            column,
        };
        let root = self.root(column).ok_or_else(missing)?;
        let group = self
            .metadata
            .row_groups()
            .get(row_group as usize)
            .ok_or_else(missing)?;
        root.leaf_range()
            .map(|leaf| chunk_range(group.column(leaf)).ok_or_else(missing))
            .collect()
    }
}
