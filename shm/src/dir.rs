//! The cache directory: who may own it, and the names in it.

use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::space::Space;
use crate::types::{Generation, SegmentId};

/// Name of the current index.
pub(crate) const INDEX_NAME: &str = "index";
/// Name of the next index while it is written, and of the space reserved for it.
pub(crate) const INDEX_TEMP_NAME: &str = "index.tmp";
/// Name of the file that holds the directory's incarnation.
pub(crate) const IDENTITY_NAME: &str = "identity";
/// Name of the file that says how the last writer left the directory.
pub(crate) const HANDOVER_NAME: &str = "handover";
/// Name of the directory of what other workers hold.
pub(crate) const DIRECTORY_NAME: &str = "directory";
/// Name of the next directory while it is written.
pub(crate) const DIRECTORY_TEMP_NAME: &str = "directory.tmp";
/// Name of the file whose lock makes a process the writer.
pub(crate) const LOCK_NAME: &str = "lock";
/// Mode of everything that is complete.
pub(crate) const SEALED_MODE: u32 = 0o440;
/// Bits that let somebody else change a directory.
const OTHERS_WRITE: u32 = 0o022;

/// How a cache directory is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheDirOptions {
    /// Accept a directory that is not on tmpfs. For tests: the cache is then as slow as that disk.
    pub allow_non_tmpfs: bool,
    /// Create the directory with 0750 instead of 0700, so that its group may read the cache.
    pub group_access: bool,
}

/// A directory that is safe to keep a cache in: on tmpfs, ours, not a symbolic link, and writable
/// by nobody else.
#[derive(Clone, Debug)]
pub struct CacheDir {
    path: PathBuf,
    allow_non_tmpfs: bool,
    /// Whether it is on tmpfs: then what is in it ends with the machine.
    pub(crate) in_memory: bool,
}

impl CacheDir {
    /// Where a user's cache lies when nothing else is configured: `/dev/shm/stoa-<uid>`.
    pub fn default_path() -> PathBuf {
        PathBuf::from(format!("/dev/shm/stoa-{}", geteuid()))
    }

    /// Checks an existing directory.
    ///
    /// # Errors
    /// [`Error::UnsafeDirectory`] with what was found and what was expected.
    pub fn open(path: impl AsRef<Path>, options: CacheDirOptions) -> Result<CacheDir> {
        let path = path.as_ref();
        let metadata = std::fs::symlink_metadata(path)
            .map_err(|error| Error::io("open cache directory", path, error))?;
        check_shape(path, &metadata)?;
        check_owner(path, &metadata)?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|error| Error::io("open cache directory", path, error))?;
        let kind = fstatfs(&file)
            .map_err(|error| Error::io("inspect cache directory", path, error))?
            .filesystem_type();
        if kind != TMPFS_MAGIC && !options.allow_non_tmpfs {
            return Err(Error::UnsafeDirectory {
                path: path.to_path_buf(),
                found: format!("a file system of type {:#x}", kind.0),
                expected: "tmpfs: choose a directory below /dev/shm, or mount a tmpfs there"
                    .to_string(),
            });
        }
        // Absolute, so that neither a later chdir nor the name of the counters depends on how it
        // was spelt.
        let path = path
            .canonicalize()
            .map_err(|error| Error::io("resolve cache directory", path, error))?;
        Ok(CacheDir {
            path,
            allow_non_tmpfs: options.allow_non_tmpfs,
            in_memory: kind == TMPFS_MAGIC,
        })
    }

    /// Makes the directory if it is missing, then checks it as [`CacheDir::open`] does. Its parent
    /// must exist.
    pub fn create(path: impl AsRef<Path>, options: CacheDirOptions) -> Result<CacheDir> {
        let path = path.as_ref();
        let mode = if options.group_access { 0o750 } else { 0o700 };
        match DirBuilder::new().mode(mode).create(path) {
            // The process's umask may have taken the group's bits away.
            Ok(()) => std::fs::set_permissions(path, PermissionsExt::from_mode(mode))
                .map_err(|error| Error::io("set the mode of", path, error))?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create cache directory", path, error)),
        }
        CacheDir::open(path, options)
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How much memory may still be allocated in it, and which limit says so.
    pub fn space(&self) -> Result<Space> {
        Space::of(&self.path, !self.allow_non_tmpfs)
    }

    pub(crate) fn index_path(&self) -> PathBuf {
        self.path.join(INDEX_NAME)
    }

    pub(crate) fn index_temp_path(&self) -> PathBuf {
        self.path.join(INDEX_TEMP_NAME)
    }

    pub(crate) fn lock_path(&self) -> PathBuf {
        self.path.join(LOCK_NAME)
    }

    pub(crate) fn name_path(&self, name: Name) -> PathBuf {
        self.path.join(name.to_string())
    }

    /// Every name in the directory that is one of ours.
    pub(crate) fn names(&self) -> Result<Vec<Name>> {
        let list = || -> std::io::Result<Vec<Name>> {
            let mut names = Vec::new();
            for file in std::fs::read_dir(&self.path)? {
                if let Some(name) = file?.file_name().to_str().and_then(Name::parse) {
                    names.push(name);
                }
            }
            Ok(names)
        };
        list().map_err(|error| Error::io("list", &self.path, error))
    }
}

/// A name in a cache directory that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    /// The current index.
    Index,
    /// The next index, being written.
    IndexTemp,
    /// What other workers hold.
    Directory,
    /// The next directory, being written.
    DirectoryTemp,
    /// An index that was replaced, kept as long as a reader maps it so that its memory is seen.
    IndexRetired(Generation),
    /// A sealed segment.
    Segment(SegmentId),
    /// A segment being written.
    SegmentTemp(SegmentId),
    /// A segment that no index names, kept as long as a reader maps it so that its memory is seen.
    SegmentRetired(SegmentId),
}

impl Name {
    fn parse(name: &str) -> Option<Name> {
        // Exactly sixteen lower-case digits: each file has one name.
        let number = |digits: &str| {
            let plain = digits.len() == 16
                && digits
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            if plain {
                u64::from_str_radix(digits, 16).ok()
            } else {
                None
            }
        };
        match name {
            INDEX_NAME => return Some(Name::Index),
            INDEX_TEMP_NAME => return Some(Name::IndexTemp),
            DIRECTORY_NAME => return Some(Name::Directory),
            DIRECTORY_TEMP_NAME => return Some(Name::DirectoryTemp),
            _ => {}
        }
        if let Some(rest) = name.strip_prefix("index-") {
            return number(rest.strip_suffix(".retired")?).map(Name::IndexRetired);
        }
        let rest = name.strip_prefix("seg-")?;
        if let Some(digits) = rest.strip_suffix(".retired") {
            number(digits).map(|id| Name::SegmentRetired(SegmentId(id)))
        } else if let Some(digits) = rest.strip_suffix(".tmp") {
            number(digits).map(|id| Name::SegmentTemp(SegmentId(id)))
        } else {
            number(rest).map(|id| Name::Segment(SegmentId(id)))
        }
    }

    /// The segment that the name belongs to.
    pub(crate) fn segment(self) -> Option<SegmentId> {
        match self {
            Name::Segment(id) | Name::SegmentTemp(id) | Name::SegmentRetired(id) => Some(id),
            Name::Index
            | Name::IndexTemp
            | Name::IndexRetired(_)
            | Name::Directory
            | Name::DirectoryTemp => None,
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Name::Index => f.write_str(INDEX_NAME),
            Name::IndexTemp => f.write_str(INDEX_TEMP_NAME),
            Name::Directory => f.write_str(DIRECTORY_NAME),
            Name::DirectoryTemp => f.write_str(DIRECTORY_TEMP_NAME),
            Name::IndexRetired(generation) => write!(f, "index-{generation:016x}.retired"),
            Name::Segment(id) => write!(f, "seg-{id}"),
            Name::SegmentTemp(id) => write!(f, "seg-{id}.tmp"),
            Name::SegmentRetired(id) => write!(f, "seg-{id}.retired"),
        }
    }
}

fn check_shape(path: &Path, metadata: &Metadata) -> Result<()> {
    let unsafe_directory = |found: String, expected: &str| {
        Err(Error::UnsafeDirectory {
            path: path.to_path_buf(),
            found,
            expected: expected.to_string(),
        })
    };
    if metadata.file_type().is_symlink() {
        return unsafe_directory(
            "a symbolic link".to_string(),
            "a directory: name the one it points to",
        );
    }
    if !metadata.is_dir() {
        return unsafe_directory("a file".to_string(), "a directory");
    }
    let mode = metadata.mode() & 0o7777;
    if mode & OTHERS_WRITE != 0 {
        return unsafe_directory(
            format!("mode {mode:04o}"),
            "a mode that lets only its owner write, such as 0700 or 0750: chmod it",
        );
    }
    Ok(())
}

fn check_owner(path: &Path, metadata: &Metadata) -> Result<()> {
    let (found, expected) = (metadata.uid(), geteuid().as_raw());
    if found != expected {
        return Err(Error::UnsafeDirectory {
            path: path.to_path_buf(),
            found: format!("owner uid {found}"),
            expected: format!(
                "uid {expected}, that of this process: run as its owner or choose another directory"
            ),
        });
    }
    Ok(())
}

/// What a reader checks: nobody but the directory's owner may have put the files there. The owner
/// of a configured directory is the worker's uid, whichever that is; the owner of the default one,
/// which anybody could create first, must be the reader's.
pub(crate) fn check_for_reader(path: &Path) -> Result<()> {
    let metadata = std::fs::symlink_metadata(path)
        .map_err(|error| Error::io("open cache directory", path, error))?;
    check_shape(path, &metadata)?;
    if path == CacheDir::default_path() {
        check_owner(path, &metadata)
    } else {
        Ok(())
    }
}

/// Device and inode of a file: which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FileIdentity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl From<&Metadata> for FileIdentity {
    fn from(metadata: &Metadata) -> Self {
        FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// Opens a file of the cache for reading; never follows a link, never waits.
pub(crate) fn open_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn text(result: Result<CacheDir>, directory: &Path) -> String {
        result
            .unwrap_err()
            .to_string()
            .replace(directory.to_str().unwrap(), "DIR")
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        let id = SegmentId(0x1f);
        let names = [
            Name::Index,
            Name::IndexTemp,
            Name::Directory,
            Name::DirectoryTemp,
            Name::IndexRetired(9),
            Name::Segment(id),
            Name::SegmentTemp(id),
            Name::SegmentRetired(SegmentId(u64::MAX)),
        ];
        for name in names {
            assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
        assert_eq!(Name::Segment(id).to_string(), "seg-000000000000001f");
        for other in [
            "lock",
            "seg-1f",
            "seg-000000000000001F",
            "seg-000000000000001f.bak",
            "index-1",
            "seg-",
        ] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_unsafe_directory_is_refused_at_start() {
        let scratch = scratch();
        let path = scratch.path();
        let options = CacheDirOptions::default();

        let open = path.join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
        assert_eq!(
            text(CacheDir::open(&open, options), path),
            "unsafe cache directory DIR/open: found mode 0777, expected a mode that lets only its owner write, such \
             as 0700 or 0750: chmod it"
        );
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o770)).unwrap();
        assert!(text(CacheDir::open(&open, options), path).contains("found mode 0770"));

        let link = path.join("link");
        std::os::unix::fs::symlink(&open, &link).unwrap();
        assert_eq!(
            text(CacheDir::open(&link, options), path),
            "unsafe cache directory DIR/link: found a symbolic link, expected a directory: name the one it points to"
        );

        let file = path.join("file");
        std::fs::write(&file, b"").unwrap();
        assert_eq!(
            text(CacheDir::open(&file, options), path),
            "unsafe cache directory DIR/file: found a file, expected a directory"
        );

        let missing = path.join("missing");
        assert_eq!(
            text(CacheDir::open(&missing, options), path),
            "cannot open cache directory DIR/missing: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_directory_on_disk_is_refused_unless_allowed() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        if fstatfs(File::open(disk.path()).unwrap())
            .unwrap()
            .filesystem_type()
            == TMPFS_MAGIC
        {
            return;
        }
        let refused = CacheDir::open(disk.path(), CacheDirOptions::default())
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("found a file system of type 0x"),
            "{refused}"
        );
        assert!(
            refused.ends_with(
                "expected tmpfs: choose a directory below /dev/shm, or mount a tmpfs there"
            ),
            "{refused}"
        );
        let allowed = CacheDirOptions {
            allow_non_tmpfs: true,
            ..CacheDirOptions::default()
        };
        assert!(CacheDir::open(disk.path(), allowed).is_ok());
    }

    #[test]
    fn another_owner_is_refused() {
        let scratch = scratch();
        let theirs = scratch.path().join("theirs");
        std::fs::create_dir(&theirs).unwrap();
        std::fs::set_permissions(&theirs, PermissionsExt::from_mode(0o755)).unwrap();
        // Only root can give a directory away.
        if std::os::unix::fs::chown(&theirs, Some(12345), None).is_err() {
            return;
        }
        let refused = text(
            CacheDir::open(&theirs, CacheDirOptions::default()),
            scratch.path(),
        );
        assert_eq!(
            refused,
            format!(
                "unsafe cache directory DIR/theirs: found owner uid 12345, expected uid {}, that of this process: run \
                 as its owner or choose another directory",
                geteuid()
            )
        );
        assert!(
            check_for_reader(&theirs).is_ok(),
            "a configured directory belongs to the worker's uid"
        );
    }

    #[test]
    fn create_makes_a_private_directory_or_one_for_a_group() {
        let scratch = scratch();
        for (name, group_access, expected) in [("own", false, 0o700), ("group", true, 0o750)] {
            let path = scratch.path().join(name);
            let options = CacheDirOptions {
                group_access,
                ..CacheDirOptions::default()
            };
            CacheDir::create(&path, options).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, expected);
            CacheDir::create(&path, options).expect("an existing one is fine");
        }
        assert!(CacheDir::default_path().starts_with("/dev/shm"));
    }
}
