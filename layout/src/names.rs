//! Names of tables and numbers of their layout versions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Schema of a table whose name has no dot.
const DEFAULT_SCHEMA: &str = "public";

/// The name of a table: a schema and a table, neither of them empty, neither with NUL.
///
/// ```
/// # use stoa_layout::TableName;
/// let name = TableName::parse("tpch.lineitem")?;
/// assert_eq!((name.schema(), name.table()), ("tpch", "lineitem"));
/// assert_eq!(TableName::parse("lineitem")?.to_string(), "public.lineitem");
/// # Ok::<(), stoa_layout::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableName {
    schema: String,
    table: String,
}

impl TableName {
    /// The name `schema.table`.
    ///
    /// # Errors
    /// [`Error::InvalidTableName`] for empty parts, NUL, and a schema with a dot.
    pub fn new(schema: &str, table: &str) -> Result<TableName> {
        let invalid = |reason: &str| Error::InvalidTableName {
            text: format!("{schema}.{table}"),
            reason: reason.into(),
        };
        if schema.is_empty() || table.is_empty() {
            return Err(invalid("a part of it is empty"));
        }
        if schema.contains('\0') || table.contains('\0') {
            return Err(invalid("it contains a NUL character"));
        }
        if schema.contains('.') {
            return Err(invalid("the schema contains a dot"));
        }
        Ok(TableName {
            schema: schema.into(),
            table: table.into(),
        })
    }

    /// Parses `schema.table`; the first dot splits, and without a dot the schema is `public`.
    ///
    /// # Errors
    /// [`Error::InvalidTableName`] for empty parts and NUL.
    pub fn parse(text: &str) -> Result<TableName> {
        match text.split_once('.') {
            Some((schema, table)) => TableName::new(schema, table),
            None => TableName::new(DEFAULT_SCHEMA, text),
        }
        .map_err(|error| match error {
            Error::InvalidTableName { reason, .. } => Error::InvalidTableName {
                text: text.into(),
                reason,
            },
            error => error,
        })
    }

    /// The part before the first dot.
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// The part after the first dot; may itself contain dots.
    pub fn table(&self) -> &str {
        &self.table
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

impl FromStr for TableName {
    type Err = Error;

    fn from_str(text: &str) -> Result<TableName> {
        TableName::parse(text)
    }
}

impl TryFrom<String> for TableName {
    type Error = Error;

    fn try_from(text: String) -> Result<TableName> {
        TableName::parse(&text)
    }
}

impl From<TableName> for String {
    fn from(name: TableName) -> String {
        name.to_string()
    }
}

/// The number of a layout version, from 1; larger is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct LayoutVersion(u64);

impl LayoutVersion {
    /// The first version of every table.
    pub const FIRST: LayoutVersion = LayoutVersion(1);

    /// The version with this number.
    ///
    /// # Errors
    /// [`Error::InvalidVersion`] for 0.
    pub fn new(number: u64) -> Result<LayoutVersion> {
        if number == 0 {
            return Err(Error::InvalidVersion {
                text: "0".into(),
                reason: "versions start at 1".into(),
            });
        }
        Ok(LayoutVersion(number))
    }

    /// The version's number, at least 1.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The version after this one, or `None` after the last number.
    pub fn next(self) -> Option<LayoutVersion> {
        self.0.checked_add(1).map(LayoutVersion)
    }
}

impl fmt::Display for LayoutVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LayoutVersion {
    type Err = Error;

    fn from_str(text: &str) -> Result<LayoutVersion> {
        // Digits only, so that "+1" and "01" are no second spelling of a version.
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = digits.then(|| text.parse().ok()).flatten();
        match number {
            Some(0) => LayoutVersion::new(0),
            Some(number) if !text.starts_with('0') => LayoutVersion::new(number),
            _ => Err(Error::InvalidVersion {
                text: text.into(),
                reason: "it is not a number".into(),
            }),
        }
    }
}

impl TryFrom<u64> for LayoutVersion {
    type Error = Error;

    fn try_from(number: u64) -> Result<LayoutVersion> {
        LayoutVersion::new(number)
    }
}

impl From<LayoutVersion> for u64 {
    fn from(version: LayoutVersion) -> u64 {
        version.0
    }
}

/// One layout version of one table, written `tpch.lineitem:1`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableVersion {
    /// The table.
    pub table: TableName,
    /// Its layout version.
    pub version: LayoutVersion,
}

impl fmt::Display for TableVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.table, self.version)
    }
}

impl FromStr for TableVersion {
    type Err = Error;

    /// The last colon splits, so that a table's name may contain colons.
    fn from_str(text: &str) -> Result<TableVersion> {
        let Some((table, version)) = text.rsplit_once(':') else {
            return Err(Error::InvalidVersion {
                text: text.into(),
                reason: "it has no version".into(),
            });
        };
        Ok(TableVersion {
            table: table.parse()?,
            version: version.parse()?,
        })
    }
}

impl TryFrom<String> for TableVersion {
    type Error = Error;

    fn try_from(text: String) -> Result<TableVersion> {
        text.parse()
    }
}

impl From<TableVersion> for String {
    fn from(version: TableVersion) -> String {
        version.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_of_any_characters_round_trip(
            schema in "[^.\\x00]{1,8}", table in "[^\\x00]{1,8}", version in 1u64..,
        ) {
            let version = TableVersion {
                table: TableName::new(&schema, &table).unwrap(),
                version: LayoutVersion::new(version).unwrap(),
            };
            prop_assert_eq!(version.to_string().parse::<TableVersion>().unwrap(), version.clone());
            let json = serde_json::to_string(&version).unwrap();
            prop_assert_eq!(serde_json::from_str::<TableVersion>(&json).unwrap(), version);
        }
    }

    #[test]
    fn what_is_no_table_says_why() {
        let error = |text: &str| text.parse::<TableName>().unwrap_err().to_string();
        assert_eq!(
            error("tpch."),
            "invalid table name \"tpch.\": a part of it is empty; expected schema.table, such as \
             tpch.lineitem"
        );
        assert!(error("").contains("a part of it is empty"));
        assert!(error(".x").contains("a part of it is empty"));
        assert!(error("a.b\0").contains("NUL"));
    }

    #[test]
    fn versions_have_one_spelling() {
        assert_eq!("7".parse::<LayoutVersion>().unwrap().get(), 7);
        for text in ["0", "-1", "+1", "01", "", "x", "18446744073709551616"] {
            let error = text.parse::<LayoutVersion>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("invalid layout version {text:?}: ")),
                "{error}"
            );
        }
        assert_eq!(
            "tpch.lineitem"
                .parse::<TableVersion>()
                .unwrap_err()
                .to_string(),
            "invalid layout version \"tpch.lineitem\": it has no version; expected a number from \
             1, such as tpch.lineitem:1"
        );
        assert!(serde_json::from_str::<LayoutVersion>("0").is_err());
        assert_eq!(LayoutVersion::FIRST.next().unwrap().get(), 2);
    }

    #[test]
    fn the_first_dot_and_the_last_colon_split() {
        let version: TableVersion = "a.b.c:d:12".parse().unwrap();
        assert_eq!(version.table.schema(), "a");
        assert_eq!(version.table.table(), "b.c:d");
        assert_eq!(version.version.get(), 12);
    }
}
