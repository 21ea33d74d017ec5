//! What can be wrong with a layout, a table or a catalog.

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with a layout, a table or a catalog.
///
/// A single bad file is not an error: it is a [`RejectedFile`](crate::RejectedFile).
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// A text that names no table.
    #[error("invalid table name {text:?}: {reason}; expected schema.table, such as tpch.lineitem")]
    InvalidTableName {
        /// The text as given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A text that names no layout version.
    #[error(
        "invalid layout version {text:?}: {reason}; expected a number from 1, such as tpch.lineitem:1"
    )]
    InvalidVersion {
        /// The text as given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A form that does not exist.
    #[error("unknown form {text:?}; expected one of {expected}")]
    UnknownForm {
        /// The text as given.
        text: String,
        /// The forms there are.
        expected: &'static str,
    },
    /// A number of replicas that is none.
    #[error("invalid number of replicas {found:?}; expected 1, 2, … or all")]
    InvalidReplicas {
        /// The text as given.
        found: String,
    },
    /// A text that is no layout document.
    #[error("invalid layout document: {reason}")]
    InvalidDocument {
        /// What the JSON parser said, with line and column.
        reason: String,
    },
    /// A key of a layout document with a value that makes no sense, alone or beside another.
    #[error("invalid layout of {table}: {key} = {value}: {reason}")]
    InvalidLayout {
        /// The layout's table.
        table: String,
        /// The key in the document.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why it makes no sense, and what would.
        reason: String,
    },
    /// A column that the table does not have.
    #[error("unknown column {column:?} of table {table}; {hint}")]
    UnknownColumn {
        /// The table.
        table: String,
        /// The name as given.
        column: String,
        /// The nearest name, or the names there are.
        hint: String,
    },
    /// The same column named twice.
    #[error("column {column:?} is named twice in the layout of {table}; name it once")]
    DuplicateColumn {
        /// The table.
        table: String,
        /// The name.
        column: String,
    },
    /// A chunk that does not exist.
    #[error("layout reference to file {file:?}, row group {row_group}, column {column}: {largest}")]
    Reference {
        /// The file's path as given.
        file: String,
        /// The row group as given.
        row_group: u32,
        /// The column as given, a name or a leaf's ordinal.
        column: String,
        /// Which part does not exist, and the largest or nearest that does.
        largest: String,
    },
    /// The same chunk named twice.
    #[error(
        "layout names file {file:?}, row group {row_group}, column {column} twice; name it once"
    )]
    DuplicateChunk {
        /// The file's path.
        file: String,
        /// The row group.
        row_group: u32,
        /// The column's name.
        column: String,
    },
    /// Files of one table whose columns have types that cannot be read as one.
    #[error(
        "column {column:?} of {url} has type {found}, and {expected} in the files before it; \
         integers, floats, decimals and units of time widen, nothing else does: rewrite the file or \
         leave it out"
    )]
    ColumnTypes {
        /// The column, nested ones with dots.
        column: String,
        /// The file that differs.
        url: String,
        /// Its type.
        found: String,
        /// The type of the files before it.
        expected: String,
    },
    /// A time that does not fit into the finer unit that another file of the table has.
    #[error(
        "column {column:?} of {url} has type {found} and holds {value}, which does not fit into \
         {expected} as in the table's other files; rewrite one of the files or leave it out"
    )]
    TimeRange {
        /// The column.
        column: String,
        /// The file that has the value.
        url: String,
        /// Its type.
        found: String,
        /// The type of all files together.
        expected: String,
        /// A bound of the column's values, in the file's unit.
        value: i64,
    },
    /// Files of one table with different partition columns.
    #[error(
        "{url} has partition columns [{found}], expected [{expected}] as in the table's other files; move the file or name the table's partition_columns"
    )]
    PartitionColumns {
        /// The file that differs.
        url: String,
        /// Its keys.
        found: String,
        /// The table's.
        expected: String,
    },
    /// A location without files.
    #[error(
        "no data files at {location}; expected Parquet files that are neither empty nor hidden"
    )]
    NoFiles {
        /// The location.
        location: String,
    },
    /// A location with files, none of which can be read.
    #[error("none of the {count} files at {location} can be read; the first: {first}")]
    NoReadableFiles {
        /// The location.
        location: String,
        /// How many files there are.
        count: usize,
        /// The first file and what is wrong with it.
        first: String,
    },
    /// A table of which some files cannot be read: what the others hold is not the table.
    #[error("table {table} has {count} files that cannot be read, of them {url}: {reason}")]
    UnreadableFiles {
        /// The table.
        table: String,
        /// How many files cannot be read.
        count: usize,
        /// The first of them.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More files than a catalog numbers.
    #[error(
        "{location} has {count} files, a table has at most {max}; compact the files or split the table"
    )]
    TooManyFiles {
        /// The location.
        location: String,
        /// How many files there are.
        count: usize,
        /// The most there can be.
        max: usize,
    },
    /// Files that kept changing while they were read.
    #[error(
        "files at {location} changed again and again while their footers were read; the last: {source}"
    )]
    Restless {
        /// The location.
        location: String,
        /// The last change that was noticed.
        source: stoa_origin::Error,
    },
    /// A chunk that the catalog does not have; a mistake of the caller.
    #[error("catalog has no chunk of {url} at row group {row_group}, column {column}")]
    NoSuchChunk {
        /// The file.
        url: String,
        /// Row group.
        row_group: u32,
        /// First leaf of a root column.
        column: u32,
    },
    /// Bytes that are no catalog of ours.
    #[error("corrupt catalog: {reason}")]
    CorruptCatalog {
        /// What was found.
        reason: String,
    },
    /// A catalog of another format version.
    #[error(
        "catalog format {found} is not supported, expected {expected}; load the table again with this version"
    )]
    CatalogFormat {
        /// The version found.
        found: u32,
        /// The version this build reads and writes.
        expected: u32,
    },
    /// A request to the origin failed.
    #[error(transparent)]
    Origin(#[from] stoa_origin::Error),
}
