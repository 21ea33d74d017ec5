//! Which cache directory this is, of all that ever were: a number drawn once.

use std::collections::hash_map::RandomState;
use std::fs::OpenOptions;
use std::hash::BuildHasher;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use nix::libc;

use crate::dir::{CacheDir, IDENTITY_NAME, SEALED_MODE, open_file};
use crate::error::{Error, Result};
use crate::format::{
    ENDIAN_MARK, FORMAT_MAJOR, FORMAT_MINOR, IDENTITY_MAGIC, Identity, check_preamble,
};
use crate::segment_writer::storage_error;

/// Name of the file while it is written.
const TEMP_NAME: &str = "identity.tmp";

/// The directory's incarnation; a directory without one, or with a damaged one, gets a new one. The
/// caller holds the directory's lock.
pub(crate) fn ensure(dir: &CacheDir) -> Result<u64> {
    let path = dir.path().join(IDENTITY_NAME);
    match read(dir) {
        Ok(Some(incarnation)) => return Ok(incarnation),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, "the directory gets another incarnation; other hosts look up anew what it holds");
        }
    }
    // Never 0, which stands for none.
    let incarnation = RandomState::new().hash_one(std::process::id()).max(1);
    let identity = Identity {
        magic: IDENTITY_MAGIC,
        format_major: FORMAT_MAJOR,
        format_minor: FORMAT_MINOR,
        endian_mark: ENDIAN_MARK,
        incarnation,
        ..Identity::default()
    };
    let temp = dir.path().join(TEMP_NAME);
    let write = || {
        if let Err(error) = std::fs::remove_file(&temp)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temp)?;
        file.write_all(&identity.to_bytes(0))?;
        file.set_permissions(PermissionsExt::from_mode(SEALED_MODE))?;
        drop(file);
        std::fs::rename(&temp, &path)
    };
    write().map_err(|error| storage_error(dir, "write", &path, Identity::BYTES as u64, error))?;
    Ok(incarnation)
}

/// The incarnation that the directory has; `None` if it has none yet.
fn read(dir: &CacheDir) -> Result<Option<u64>> {
    let path = dir.path().join(IDENTITY_NAME);
    let failed = |error| Error::io("read", &path, error);
    let file = match open_file(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    // One byte more than it should have shows a file that is too long.
    std::io::Read::read_to_end(
        &mut std::io::Read::take(file, Identity::BYTES as u64 + 1),
        &mut bytes,
    )
    .map_err(failed)?;
    check_preamble(&path, &bytes, IDENTITY_MAGIC, Identity::BYTES)?;
    if bytes.len() != Identity::BYTES {
        return Err(Error::corrupt(
            &path,
            format!("file is longer than {} bytes", Identity::BYTES),
        ));
    }
    let identity = Identity::read_checked(&bytes, 0)
        .filter(|identity| identity.incarnation != 0)
        .ok_or_else(|| Error::corrupt(&path, "check does not match"))?;
    Ok(Some(identity.incarnation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheDirOptions, CacheWriter};

    #[test]
    fn an_incarnation_is_kept_and_another_directory_has_another() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = scratch.path().join("cache");
        let open = || {
            let dir = CacheDir::create(&path, CacheDirOptions::default()).unwrap();
            CacheWriter::open(dir).unwrap().0.incarnation()
        };
        let first = open();
        assert_ne!(first, 0);
        assert_eq!(open(), first);
        // Made anew at the same place.
        std::fs::remove_dir_all(&path).unwrap();
        assert_ne!(open(), first);
    }

    #[test]
    fn a_damaged_incarnation_is_never_believed() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
        let mut before = ensure(&dir).unwrap();
        let path = scratch.path().join(IDENTITY_NAME);
        let bytes = std::fs::read(&path).unwrap();
        let longer = [bytes.clone(), vec![0]].concat();
        let flipped = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            bytes
        };
        let mut damaged: Vec<Vec<u8>> = (0..Identity::BYTES).map(flipped).collect();
        damaged.extend([vec![], bytes[..40].to_vec(), longer]);
        for damaged in damaged {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, &damaged).unwrap();
            assert!(read(&dir).is_err(), "{damaged:?}");
            let now = ensure(&dir).unwrap();
            assert_ne!(now, before);
            assert_eq!(ensure(&dir).unwrap(), now);
            before = now;
        }
    }
}
