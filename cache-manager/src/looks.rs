//! When the worker last looked at each table's files: one small JSON file beside the index.
//!
//! A look that finds everything as it was makes no new generation, so the time in the published
//! catalog is that of the last change; this file says until when it is known to hold. It is a hint
//! for people, as `{"tpch.lineitem": milliseconds since 1970}`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// The file's name in the cache directory.
pub const LOOKS_FILE: &str = "looks.json";
/// What is read of it at most.
const LOOKS_BYTES_MAX: u64 = 4 << 20;

pub(crate) fn write(dir: &Path, looks: &BTreeMap<String, u64>) -> io::Result<()> {
    let temporary = dir.join("looks.json.new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    serde_json::to_writer(&mut file, looks)?;
    file.set_permissions(fs::Permissions::from_mode(0o440))?;
    drop(file);
    fs::rename(&temporary, dir.join(LOOKS_FILE))
}

/// When the tables of a cache directory were last looked at, by their name in the index, in
/// milliseconds since 1970. Empty where nobody wrote it, or where it cannot be read.
pub fn looks(dir: &Path) -> BTreeMap<String, u64> {
    let read = || -> io::Result<BTreeMap<String, u64>> {
        let file = fs::File::open(dir.join(LOOKS_FILE))?;
        Ok(serde_json::from_reader(io::Read::take(
            file,
            LOOKS_BYTES_MAX,
        ))?)
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(looks(dir.path()).is_empty());
        for at in [1, 2] {
            let written = BTreeMap::from([("tpch.lineitem".to_owned(), at)]);
            write(dir.path(), &written).unwrap();
            assert_eq!(looks(dir.path()), written);
        }
        fs::remove_file(dir.path().join(LOOKS_FILE)).unwrap();
        fs::write(dir.path().join(LOOKS_FILE), b"{").unwrap();
        assert!(looks(dir.path()).is_empty());
    }
}
