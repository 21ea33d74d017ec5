//! Forms of cached chunks, and references to chunks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a cached chunk is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Form {
    /// Decoded once, read in place.
    Arrow,
    /// About as small as compressed Parquet, unpacked block by block while it is read.
    Packed,
    /// The chunk's bytes as they are in the file.
    Parquet,
}

impl Form {
    /// The form's name, as in layouts and plans.
    pub fn as_str(self) -> &'static str {
        match self {
            Form::Arrow => "arrow",
            Form::Packed => "packed",
            Form::Parquet => "parquet",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Form {
    type Err = Error;

    fn from_str(text: &str) -> Result<Form> {
        match text {
            "arrow" => Ok(Form::Arrow),
            "packed" => Ok(Form::Packed),
            "parquet" => Ok(Form::Parquet),
            _ => Err(Error::UnknownForm {
                text: text.into(),
                expected: "arrow, packed, parquet",
            }),
        }
    }
}

/// Which form a layout asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FormChoice {
    /// Stoa chooses, see [`choose_forms`](crate::choose_forms).
    #[default]
    Auto,
    /// Arrow where the type allows it, else parquet.
    Arrow,
    /// Packed where the type allows it, else parquet.
    Packed,
    /// Parquet everywhere.
    Parquet,
}

impl FormChoice {
    /// The choice's name, as in layouts.
    pub fn as_str(self) -> &'static str {
        match self {
            FormChoice::Auto => "auto",
            FormChoice::Arrow => "arrow",
            FormChoice::Packed => "packed",
            FormChoice::Parquet => "parquet",
        }
    }

    /// The form that is asked for of a column that can be decoded or not; `None` where Stoa
    /// chooses.
    pub fn form(self, can_be_decoded: bool) -> Option<Form> {
        match self {
            _ if !can_be_decoded => Some(Form::Parquet),
            FormChoice::Auto => None,
            FormChoice::Arrow => Some(Form::Arrow),
            FormChoice::Packed => Some(Form::Packed),
            FormChoice::Parquet => Some(Form::Parquet),
        }
    }
}

impl fmt::Display for FormChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for FormChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<FormChoice> {
        match text {
            "auto" => Ok(FormChoice::Auto),
            "arrow" => Ok(FormChoice::Arrow),
            "packed" => Ok(FormChoice::Packed),
            "parquet" => Ok(FormChoice::Parquet),
            _ => Err(Error::UnknownForm {
                text: text.into(),
                expected: "auto, arrow, packed, parquet",
            }),
        }
    }
}

/// A chunk of a catalog: one root column of one row group of one file.
///
/// A nested column is cached whole, under the first of its leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Index into the catalog's files.
    pub file: u32,
    /// Row group in that file.
    pub row_group: u32,
    /// Leaf ordinal, in that file, of the first leaf of a root column.
    pub column: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_have_names() {
        for form in [Form::Arrow, Form::Packed, Form::Parquet] {
            assert_eq!(form.to_string().parse::<Form>().unwrap(), form);
            assert_eq!(serde_json::to_string(&form).unwrap(), format!("\"{form}\""));
        }
        for choice in [
            FormChoice::Auto,
            FormChoice::Arrow,
            FormChoice::Packed,
            FormChoice::Parquet,
        ] {
            assert_eq!(choice.to_string().parse::<FormChoice>().unwrap(), choice);
        }
        assert_eq!(
            "orc".parse::<FormChoice>().unwrap_err().to_string(),
            "unknown form \"orc\"; expected one of auto, arrow, packed, parquet"
        );
    }
}
