//! What criterion has measured, as it leaves it below `target/criterion`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::Document;

/// The document of `cargo bench -p stoa-micro`, whose caches lay on pages of this kind (`4 KiB` or
/// `huge`): nanoseconds of CPU time a lookup, or an attach.
///
/// # Errors
/// If a file cannot be read, or nothing of that benchmark is below `directory`.
pub fn lookups(directory: &Path, pages: &str) -> Result<Document, String> {
    let mut found = BTreeMap::new();
    visit(directory, &mut |measured| {
        let benchmark = read(&measured.join("benchmark.json"))?;
        let name = match (benchmark["group_id"].as_str(), &benchmark["function_id"]) {
            (Some(group), Value::String(function)) if group.starts_with("lookup_") => function,
            (Some(group), Value::Null) if group.starts_with("attach_") => "attach",
            _ => return Ok(()),
        };
        let estimates = read(&measured.join("estimates.json"))?;
        let nanos = estimates["median"]["point_estimate"].as_f64();
        let nanos = nanos.ok_or_else(|| format!("{}: no median", measured.display()))?;
        let elements = benchmark["throughput"]["Elements"].as_f64().unwrap_or(1.0);
        found.insert(name.replace('_', " "), nanos / elements);
        Ok(())
    })?;
    if found.is_empty() {
        let place = directory.display();
        return Err(format!(
            "{place} has no lookups; cargo bench -p stoa-micro makes them"
        ));
    }
    Ok(Document {
        suite: "lookup".to_owned(),
        scale: 1.0,
        lookup: BTreeMap::from([(pages.to_owned(), found)]),
        ..Document::default()
    })
}

/// Shows every directory `new` below `directory`: the results of the last run of a benchmark.
fn visit(
    directory: &Path,
    show: &mut impl FnMut(&Path) -> Result<(), String>,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if !path.is_dir() {
            continue;
        }
        if path.file_name().is_some_and(|name| name == "new") {
            show(&path)?;
        } else {
            visit(&path, show)?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value, String> {
    let failed = |error: String| format!("{}: {error}", path.display());
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, benchmark: &str, median: f64) {
        let new = directory.join("new");
        std::fs::create_dir_all(&new).unwrap();
        std::fs::write(new.join("benchmark.json"), benchmark).unwrap();
        let estimates = format!(r#"{{"median":{{"point_estimate":{median}}}}}"#);
        std::fs::write(new.join("estimates.json"), estimates).unwrap();
    }

    #[test]
    fn medians_are_divided_by_what_an_iteration_does() {
        let place = tempfile::tempdir().unwrap();
        assert!(lookups(place.path(), "huge").is_err());
        write(
            &place.path().join("lookup_1000000/index_together"),
            r#"{"group_id":"lookup_1000000","function_id":"index_together","throughput":{"Elements":100000}}"#,
            7e6,
        );
        write(
            &place.path().join("attach_1000000"),
            r#"{"group_id":"attach_1000000","function_id":null,"throughput":null}"#,
            23e3,
        );
        write(
            &place.path().join("load_row_group/pack"),
            r#"{"group_id":"load_row_group","function_id":"pack","throughput":{"Bytes":7}}"#,
            1.0,
        );
        let document = lookups(place.path(), "huge").unwrap();
        let expected = [
            ("attach".to_owned(), 23e3),
            ("index together".to_owned(), 70.0),
        ];
        assert_eq!(document.lookup["huge"], BTreeMap::from(expected));
        assert_eq!(document.id(), "lookup-1");
    }
}
