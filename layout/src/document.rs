//! Layout documents: what a layout version wants cached.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use stoa_origin::{Location, ObjectIdentity, object_path};

use crate::error::{Error, Result};
use crate::form::FormChoice;
use crate::names::{LayoutVersion, TableName, TableVersion};
use crate::replicas::Replicas;

/// What a layout version wants cached, and which files it is about: the content of a version.
///
/// ```
/// # use stoa_layout::LayoutDocument;
/// let document = LayoutDocument::from_json(
///     r#"{"table": "tpch.lineitem", "version": 1, "location": "s3://bucket/lineitem/",
///         "columns": ["l_shipdate", "l_discount"]}"#,
/// )?;
/// assert_eq!(document.table_version().to_string(), "tpch.lineitem:1");
/// # Ok::<(), stoa_layout::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutDocument {
    /// The table.
    pub table: TableName,
    /// The version of its layout.
    pub version: LayoutVersion,
    /// Where the table's files lie, a URL or an absolute path.
    pub location: String,
    /// The root columns to cache, most wanted first; none given means all, in schema order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<String>>,
    /// Only the first so many of `columns`, or of the schema's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_columns: Option<usize>,
    /// The chunks to cache, most wanted first, instead of columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Vec<ChunkSpec>>,
    /// Only files with exactly so many row groups; by default files of any size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_files_only: Option<u32>,
    /// The form of the cached chunks.
    #[serde(default)]
    pub form: FormChoice,
    /// On how many workers each chunk should lie: a number, or `"all"`; by default on one.
    #[serde(default, skip_serializing_if = "Replicas::is_one")]
    pub replicas: Replicas,
    /// The forms of single root columns, instead.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub forms: BTreeMap<String, FormChoice>,
    /// Bytes that the choice of forms fills, and the table takes at most, as far as footers tell;
    /// none given means what the workers have room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_bytes: Option<u64>,
    /// Hive-style partition columns (`day=1/` in paths), in order; none given means discovered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partition_columns: Vec<String>,
    /// The snapshot that the version names; none given means what lies there when it is loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<ObjectIdentity>,
}

/// One chunk that a layout names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkSpec {
    /// Path of the file, relative to the table's location or from the store's root.
    pub path: String,
    /// Row group in that file.
    pub row_group: u32,
    /// Root column in that file.
    pub column: ColumnRef,
}

/// A root column of a file, by name or by the ordinal of its first leaf.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ColumnRef {
    /// Ordinal of the first leaf of the column.
    Leaf(u32),
    /// Name of the root column.
    Name(String),
}

impl fmt::Display for ColumnRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ColumnRef::Leaf(leaf) => leaf.fmt(f),
            ColumnRef::Name(name) => write!(f, "{name:?}"),
        }
    }
}

impl LayoutDocument {
    /// A layout of all columns of the table at `location`.
    pub fn new(table: TableName, version: LayoutVersion, location: impl Into<String>) -> Self {
        LayoutDocument {
            table,
            version,
            location: location.into(),
            columns: None,
            first_columns: None,
            chunks: None,
            full_files_only: None,
            form: FormChoice::Auto,
            replicas: Replicas::ONE,
            forms: BTreeMap::new(),
            budget_bytes: None,
            partition_columns: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Table and version together.
    pub fn table_version(&self) -> TableVersion {
        TableVersion {
            table: self.table.clone(),
            version: self.version,
        }
    }

    /// The form that the layout asks for of a root column.
    pub fn form_of(&self, column: &str) -> FormChoice {
        self.forms.get(column).copied().unwrap_or(self.form)
    }

    /// Parses and validates a document.
    ///
    /// # Errors
    /// [`Error::InvalidDocument`] for what is no document, with line and column; else as
    /// [`validate`](Self::validate).
    pub fn from_json(json: &str) -> Result<LayoutDocument> {
        let document: LayoutDocument =
            serde_json::from_str(json).map_err(|error| Error::InvalidDocument {
                reason: error.to_string(),
            })?;
        document.validate()?;
        Ok(document)
    }

    /// The document as JSON. Equal documents give equal text.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and lists are JSON")
    }

    /// The parsed location.
    ///
    /// # Errors
    /// [`Error::Origin`] for a location that is none.
    pub fn parsed_location(&self) -> Result<Location> {
        Ok(Location::parse(&self.location)?)
    }

    /// Checks what can be checked without looking at the table.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] for values that make no sense, [`Error::DuplicateColumn`],
    /// [`Error::DuplicateChunk`], and [`Error::Origin`] for a location or path that is none.
    pub fn validate(&self) -> Result<()> {
        self.parsed_location()?;
        let invalid = |key: &'static str, value: &dyn fmt::Display, reason: &str| {
            Err(Error::InvalidLayout {
                table: self.table.to_string(),
                key,
                value: value.to_string(),
                reason: reason.into(),
            })
        };
        match (&self.columns, self.first_columns, &self.chunks) {
            (Some(_), _, Some(_)) => {
                return invalid("chunks", &"[…]", "columns are given too; give one of them");
            }
            (_, Some(first), Some(_)) => {
                return invalid(
                    "first_columns",
                    &first,
                    "chunks are given too; give one of them",
                );
            }
            (_, Some(0), _) => {
                return invalid("first_columns", &0, "expected at least 1, or leave it out");
            }
            (Some(columns), _, _) if columns.is_empty() => {
                return invalid(
                    "columns",
                    &"[]",
                    "expected at least one, or leave it out for all",
                );
            }
            (_, _, Some(chunks)) if chunks.is_empty() => {
                return invalid("chunks", &"[]", "expected at least one, or leave it out");
            }
            _ => {}
        }
        if self.full_files_only == Some(0) {
            return invalid(
                "full_files_only",
                &0,
                "expected at least 1, or leave it out",
            );
        }
        let mut seen = HashSet::new();
        for column in self.columns.iter().flatten() {
            if !seen.insert(column) {
                return Err(Error::DuplicateColumn {
                    table: self.table.to_string(),
                    column: column.clone(),
                });
            }
        }
        let mut seen = HashSet::new();
        for column in &self.partition_columns {
            if column.is_empty() || !seen.insert(column) {
                let reason = "expected different names that are not empty";
                return invalid("partition_columns", &format!("{column:?}"), reason);
            }
        }
        let mut seen = HashSet::new();
        for chunk in self.chunks.iter().flatten() {
            object_path(&chunk.path)?;
            if !seen.insert(chunk) {
                return Err(Error::DuplicateChunk {
                    file: chunk.path.clone(),
                    row_group: chunk.row_group,
                    column: chunk.column.to_string(),
                });
            }
        }
        let mut seen = HashSet::new();
        for file in &self.files {
            object_path(&file.path)?;
            if !seen.insert((&file.store, &file.path)) {
                return invalid("files", &file.url(), "it is named twice");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &str) -> Result<LayoutDocument> {
        LayoutDocument::from_json(&format!(
            r#"{{"table": "s.t", "version": 1, "location": "s3://b/t/"{fields}}}"#
        ))
    }

    fn message(fields: &str) -> String {
        parse(fields).unwrap_err().to_string()
    }

    #[test]
    fn documents_round_trip() {
        let document = parse(
            r#", "chunks": [{"path": "a.parquet", "row_group": 1, "column": "c"},
                            {"path": "a.parquet", "row_group": 1, "column": 3}],
               "form": "parquet", "full_files_only": 4, "replicas": "all", "partition_columns": ["day"],
               "files": [{"store": "s3://b", "path": "t/a.parquet", "tag": {"etag": "\"x\""},
                          "size": 7}]"#,
        )
        .unwrap();
        let chunks = document.chunks.as_ref().unwrap();
        assert_eq!(chunks[0].column, ColumnRef::Name("c".into()));
        assert_eq!(chunks[1].column, ColumnRef::Leaf(3));
        assert_eq!(
            LayoutDocument::from_json(&document.to_json()).unwrap(),
            document
        );
        assert_eq!(
            parse("").unwrap().to_json(),
            r#"{"table":"s.t","version":1,"location":"s3://b/t/","form":"auto"}"#
        );
    }

    #[test]
    fn a_key_nobody_knows_is_an_error_that_names_it() {
        let message = message(r#", "colums": ["a"]"#);
        assert!(
            message.starts_with("invalid layout document: unknown field `colums`"),
            "{message}"
        );
        assert!(message.contains("`columns`"), "{message}");
    }

    #[test]
    fn zero_and_contradictions_are_refused() {
        assert_eq!(
            message(r#", "first_columns": 0"#),
            "invalid layout of s.t: first_columns = 0: expected at least 1, or leave it out"
        );
        assert_eq!(
            message(r#", "full_files_only": 0"#),
            "invalid layout of s.t: full_files_only = 0: expected at least 1, or leave it out"
        );
        let chunk = r#""chunks": [{"path": "a", "row_group": 0, "column": 0}]"#;
        assert_eq!(
            message(&format!(r#", "columns": ["a"], {chunk}"#)),
            "invalid layout of s.t: chunks = […]: columns are given too; give one of them"
        );
        assert!(message(&format!(r#", "first_columns": 1, {chunk}"#)).contains("chunks are given"));
        assert!(
            message(r#", "replicas": 0"#).contains("a number of workers, at least 1, or \"all\"")
        );
        assert!(message(r#", "columns": []"#).contains("expected at least one"));
        assert!(message(r#", "first_columns": -1"#).contains("invalid value: integer `-1`"));
    }

    #[test]
    fn the_same_thing_twice_is_refused() {
        assert_eq!(
            message(r#", "columns": ["a", "b", "a"]"#),
            "column \"a\" is named twice in the layout of s.t; name it once"
        );
        let chunk = r#"{"path": "a", "row_group": 2, "column": "c"}"#;
        assert_eq!(
            message(&format!(r#", "chunks": [{chunk}, {chunk}]"#)),
            "layout names file \"a\", row group 2, column \"c\" twice; name it once"
        );
        let file = r#"{"store": "s3://b", "path": "t/a", "tag": {"etag": "1"}, "size": 7}"#;
        assert!(message(&format!(r#", "files": [{file}, {file}]"#)).contains("named twice"));
    }

    #[test]
    fn paths_stay_in_their_store() {
        let chunk = |path: &str| {
            message(&format!(
                r#", "chunks": [{{"path": "{path}", "row_group": 0, "column": 0}}]"#
            ))
        };
        assert_eq!(
            chunk("../a"),
            "invalid object path \"../a\": it contains \"..\"; expected a path inside its store \
             such as dir/file.parquet"
        );
        assert!(chunk("/etc/passwd").contains("it is absolute"));
        assert!(chunk(r"a\u0000").contains("NUL"));
        let file = r#"{"store": "s3://b", "path": "a/../b", "tag": {"etag": "1"}, "size": 7}"#;
        assert!(message(&format!(r#", "files": [{file}]"#)).contains("it contains \"..\""));
        let error = LayoutDocument::from_json(
            r#"{"table": "s.t", "version": 1, "location": "s3://b/t/../u"}"#,
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("it contains \"..\"")
        );
    }
}
