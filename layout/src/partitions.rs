//! Hive-style partition columns: `day=2024-01-01/` in a file's path.

use std::borrow::Cow;

use arrow::datatypes::DataType;
use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};

/// The type of every partition column: strings, few of them, as DataFusion infers it too.
pub(crate) fn partition_type() -> DataType {
    DataType::Dictionary(Box::new(DataType::UInt16), Box::new(DataType::Utf8))
}

/// Partition columns of a table, and their values for each file in the order given.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Partitions {
    pub(crate) columns: Vec<String>,
    pub(crate) values: Vec<Vec<String>>,
}

/// Takes the partition columns from the files' paths.
///
/// `files` are paths relative to the table's location, and URLs for messages. `given` names the
/// columns, none of them meaning that they are discovered; discovered ones that the files have as
/// columns of their own (`in_files`) are none.
///
/// # Errors
/// [`Error::PartitionColumns`] for a file whose directories name other columns than the rest.
pub(crate) fn partitions(
    files: &[(&str, String)],
    given: &[String],
    in_files: impl Fn(&str) -> bool,
) -> Result<Partitions> {
    let Some((first, _)) = files.first() else {
        return Ok(Partitions {
            columns: given.to_vec(),
            values: Vec::new(),
        });
    };
    let expected: Vec<String> = if given.is_empty() {
        keys(first).map(|(key, _)| key.to_owned()).collect()
    } else {
        given.to_vec()
    };
    let keep: Vec<bool> = expected
        .iter()
        .map(|key| !given.is_empty() || !in_files(key))
        .collect();
    let kept = |all: Vec<String>| -> Vec<String> {
        all.into_iter()
            .zip(&keep)
            .filter(|(_, keep)| **keep)
            .map(|(one, _)| one)
            .collect()
    };
    let mut values = Vec::with_capacity(files.len());
    for (path, url) in files {
        let found: Vec<(&str, &str)> = keys(path).collect();
        if !found
            .iter()
            .map(|(key, _)| *key)
            .eq(expected.iter().map(String::as_str))
        {
            let names: Vec<&str> = found.iter().map(|(key, _)| *key).collect();
            return Err(Error::PartitionColumns {
                url: url.clone(),
                found: names.join(", "),
                expected: expected.join(", "),
            });
        }
        values.push(kept(
            found.iter().map(|(_, value)| decoded(value)).collect(),
        ));
    }
    Ok(Partitions {
        columns: kept(expected),
        values,
    })
}

/// Keys and values of the directories of a path.
fn keys(path: &str) -> impl Iterator<Item = (&str, &str)> {
    let directories = path
        .rsplit_once('/')
        .map_or("", |(directories, _)| directories);
    directories
        .split('/')
        .filter_map(|directory| directory.split_once('='))
}

/// Writers escape what a path cannot hold; what does not decode is taken as it is.
fn decoded(value: &str) -> String {
    percent_decode_str(value)
        .decode_utf8()
        .unwrap_or(Cow::Borrowed(value))
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(paths: &[&'static str], given: &[&str], in_files: &[&str]) -> Result<Partitions> {
        let files: Vec<(&str, String)> =
            paths.iter().map(|p| (*p, format!("s3://b/{p}"))).collect();
        let given: Vec<String> = given.iter().map(|s| s.to_string()).collect();
        partitions(&files, &given, |name| in_files.contains(&name))
    }

    #[test]
    fn columns_are_discovered_from_directories() {
        let found = of(&["y=2024/m=1/a=b.parquet", "y=2024/m=a%20b/c"], &[], &[]).unwrap();
        assert_eq!(found.columns, ["y", "m"]);
        assert_eq!(found.values, [["2024", "1"], ["2024", "a b"]]);
        assert_eq!(
            of(&["a.parquet", "dir/b.parquet"], &[], &[])
                .unwrap()
                .columns
                .len(),
            0
        );
        assert_eq!(of(&["y=%ff/a"], &[], &[]).unwrap().values, [["%ff"]]);
    }

    #[test]
    fn a_file_elsewhere_is_named() {
        let error = of(&["y=1/a", "z=1/b"], &[], &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "s3://b/z=1/b has partition columns [z], expected [y] as in the table's other files; \
             move the file or name the table's partition_columns"
        );
        assert!(of(&["a"], &["y"], &[]).is_err());
        assert!(of(&["y=1/a"], &["y"], &["y"]).is_ok());
    }

    #[test]
    fn a_column_that_the_files_have_is_no_partition_column() {
        let found = of(&["y=1/m=2/a"], &[], &["y"]).unwrap();
        assert_eq!(found.columns, ["m"]);
        assert_eq!(found.values, [["2"]]);
    }
}
