//! Strong etags of files, computed once a content.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;

use s3s::crypto::{Checksum, Md5};

/// What tells two contents of a path apart without reading them: any write changes one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Stamp {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The etags computed so far, by path.
#[derive(Debug, Default)]
pub(crate) struct Etags {
    known: Mutex<HashMap<std::path::PathBuf, (Stamp, String)>>,
}

impl Etags {
    /// The etag of the content that `file` (opened from `path`) holds: its MD5 in hexadecimal, as
    /// S3 answers for an object put in one piece. Reads the whole file the first time; blocks.
    pub(crate) fn of(&self, path: &Path, file: &File) -> std::io::Result<String> {
        let stamp = Stamp::of(&file.metadata()?);
        if let Some((known, etag)) = self.lock().get(path)
            && *known == stamp
        {
            return Ok(etag.clone());
        }
        let etag = digest(file)?;
        // A file written while it was read must not be remembered under its first stamp.
        if Stamp::of(&file.metadata()?) == stamp {
            self.lock().insert(path.to_owned(), (stamp, etag.clone()));
        }
        Ok(etag)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<std::path::PathBuf, (Stamp, String)>> {
        self.known
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }
}

fn digest(mut file: &File) -> std::io::Result<String> {
    use std::fmt::Write;

    let mut md5 = Md5::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        md5.update(&buffer[..read]);
    }
    let mut text = String::with_capacity(32);
    for byte in md5.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_of_the_same_size_has_another_etag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        let etags = Etags::default();
        std::fs::write(&path, b"one").unwrap();
        let file = File::open(&path).unwrap();
        let one = etags.of(&path, &file).unwrap();
        assert_eq!(one, "f97c5d29941bfb1b2fdab0874906ab82");
        assert_eq!(etags.of(&path, &File::open(&path).unwrap()).unwrap(), one);

        std::fs::write(dir.path().join("new"), b"two").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        let two = etags.of(&path, &File::open(&path).unwrap()).unwrap();
        assert_ne!(one, two);
        // The old handle still holds, and is named as, the old content.
        use std::io::Seek;
        let mut old = file;
        old.rewind().unwrap();
        assert_eq!(etags.of(&path, &old).unwrap(), one);
    }
}
