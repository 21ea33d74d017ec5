//! How one writer of a directory leaves it to the next.
//!
//! Hints: a directory without them is as good, only that its next writer knows less.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use nix::libc;
use serde::{Deserialize, Serialize};

use crate::dir::{CacheDir, HANDOVER_NAME, SEALED_MODE, open_file};
use crate::error::{Error, Result};
use crate::format::{
    ENDIAN_MARK, FORMAT_MAJOR, FORMAT_MINOR, HANDOVER_MAGIC, HandoverFile, check_preamble,
};
use crate::segment_writer::storage_error;
use crate::types::SegmentId;

/// Name of the file while it is written.
const TEMP_NAME: &str = "handover.tmp";
/// Where the kernel says which start of the machine this is.
const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// How a writer left its directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// Digest of the plans of which nothing was left to do; 0 where there was something.
    pub carried_out: u64,
    /// The walk through what is published.
    pub walk: Walk,
    /// Whether the writer ended in order, rather than being at work, or dead.
    pub in_order: bool,
}

/// How far the hashing of everything that is published has come, over processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    /// Segments of a smaller name are through.
    pub next: u64,
    /// When the walk began that is under way, in milliseconds since 1970; 0: none is.
    pub began_unix_ms: u64,
    /// When the last complete one ended, in milliseconds since 1970; 0: there was none.
    pub ended_unix_ms: u64,
}

impl Walk {
    /// Whether a segment is still to be walked through.
    pub fn awaits(&self, segment: SegmentId) -> bool {
        segment.0 >= self.next
    }
}

/// What is in doubt of a directory when a writer takes it over, beside the segments that no index
/// names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Nothing: what was verified when it was sealed has been in memory ever since.
    Nothing,
    /// All: the machine has ended, and a disk may not have had what the memory had.
    Everything,
}

/// What is in doubt, given what the last writer left on a directory that lies in memory or not.
pub(crate) fn doubt(left: Option<&Left>, boot_id: [u8; 16], in_memory: bool) -> Doubt {
    let same_boot = left.is_some_and(|left| left.boot_id == boot_id && boot_id != [0; 16]);
    match in_memory || same_boot {
        true => Doubt::Nothing,
        false => Doubt::Everything,
    }
}

/// A handover as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) handover: Handover,
    boot_id: [u8; 16],
}

/// Which start of the machine this is; zeros where the kernel does not say.
pub(crate) fn boot_id() -> [u8; 16] {
    std::fs::read_to_string(BOOT_ID_PATH).map_or([0; 16], |text| parse_boot_id(&text))
}

fn parse_boot_id(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => id.to_be_bytes(),
        _ => [0; 16],
    }
}

/// What the last writer left; `None` where there is nothing that can be understood.
pub(crate) fn read(dir: &CacheDir) -> Option<Left> {
    match try_read(dir) {
        Ok(left) => left,
        Err(error) => {
            tracing::debug!(%error, "how the last writer ended is not known");
            None
        }
    }
}

fn try_read(dir: &CacheDir) -> Result<Option<Left>> {
    let path = dir.path().join(HANDOVER_NAME);
    let failed = |error| Error::io("read", &path, error);
    let file = match open_file(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    // One byte more than it should have shows a file that is too long.
    file.take(HandoverFile::BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    check_preamble(&path, &bytes, HANDOVER_MAGIC, HandoverFile::BYTES)?;
    let file = HandoverFile::read_checked(&bytes, 0)
        .filter(|_| bytes.len() == HandoverFile::BYTES)
        .ok_or_else(|| Error::corrupt(&path, "check does not match"))?;
    Ok(Some(Left {
        handover: Handover {
            carried_out: file.carried_out,
            walk: Walk {
                next: file.walk_next,
                began_unix_ms: file.walk_began,
                ended_unix_ms: file.walk_ended,
            },
            in_order: file.ended == 1,
        },
        boot_id: file.boot_id,
    }))
}

/// Leaves word for the next writer. The caller holds the directory's lock.
pub(crate) fn write(dir: &CacheDir, handover: &Handover) -> Result<()> {
    let file = HandoverFile {
        magic: HANDOVER_MAGIC,
        format_major: FORMAT_MAJOR,
        format_minor: FORMAT_MINOR,
        endian_mark: ENDIAN_MARK,
        boot_id: boot_id(),
        carried_out: handover.carried_out,
        walk_next: handover.walk.next,
        walk_began: handover.walk.began_unix_ms,
        walk_ended: handover.walk.ended_unix_ms,
        ended: u8::from(handover.in_order),
        ..HandoverFile::default()
    };
    let path = dir.path().join(HANDOVER_NAME);
    let temp = dir.path().join(TEMP_NAME);
    let write = || {
        if let Err(error) = std::fs::remove_file(&temp)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut to = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temp)?;
        to.write_all(&file.to_bytes(0))?;
        to.set_permissions(PermissionsExt::from_mode(SEALED_MODE))?;
        drop(to);
        std::fs::rename(&temp, &path)
    };
    write().map_err(|error| {
        // What stands there would be taken for true by the next writer.
        let _ = std::fs::remove_file(&path);
        storage_error(dir, "write", &path, HandoverFile::BYTES as u64, error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CacheDirOptions;

    #[test]
    fn only_the_end_of_a_machine_puts_a_disk_in_doubt() {
        let (one, other) = ([1; 16], [2; 16]);
        let left = |boot_id| Left {
            handover: Handover::default(),
            boot_id,
        };
        for in_memory in [true, false] {
            assert_eq!(doubt(Some(&left(one)), one, in_memory), Doubt::Nothing);
        }
        // What is in memory cannot be of another boot.
        assert_eq!(doubt(Some(&left(one)), other, true), Doubt::Nothing);
        assert_eq!(doubt(None, one, true), Doubt::Nothing);
        assert_eq!(doubt(Some(&left(one)), other, false), Doubt::Everything);
        assert_eq!(doubt(None, one, false), Doubt::Everything);
        // A kernel that does not say which boot it is.
        let unknown = [0; 16];
        assert_eq!(
            doubt(Some(&left(unknown)), unknown, false),
            Doubt::Everything
        );
    }

    #[test]
    fn what_is_left_is_found_and_what_is_damaged_is_not_believed() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
        assert_eq!(read(&dir), None);
        let handover = Handover {
            carried_out: 7,
            walk: Walk {
                next: 9,
                began_unix_ms: 11,
                ended_unix_ms: 5,
            },
            in_order: true,
        };
        write(&dir, &handover).unwrap();
        let left = read(&dir).unwrap();
        assert_eq!((left.handover, left.boot_id), (handover, boot_id()));
        // As a death between writing and renaming leaves it.
        std::fs::write(scratch.path().join(TEMP_NAME), b"half").unwrap();
        write(&dir, &Handover::default()).unwrap();
        assert_eq!(read(&dir).unwrap().handover, Handover::default());

        let path = scratch.path().join(HANDOVER_NAME);
        let whole = std::fs::read(&path).unwrap();
        let flipped = (0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        });
        let longer = [whole.clone(), vec![0]].concat();
        for bytes in flipped.chain([vec![], whole[..60].to_vec(), longer]) {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&dir), None, "{bytes:?}");
        }
    }

    #[test]
    fn the_kernel_names_the_boot_as_a_uuid() {
        let id = parse_boot_id("0af1c2d3-0000-4000-8000-0000000000ff\n");
        assert_eq!((id[0], id[15]), (0x0a, 0xff));
        assert_eq!(parse_boot_id("none"), [0; 16]);
        assert_ne!(boot_id(), [0; 16], "Linux says it");
    }
}
