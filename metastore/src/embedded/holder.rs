//! Which process holds the store's file.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The process that holds the lock of a file; `None` where the system does not say, as within
/// another namespace of processes.
pub(super) fn of(path: &Path) -> Option<u32> {
    let file = std::fs::metadata(path).ok()?;
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    in_locks(&locks, file.ino())
}

/// The holder of an inode's lock in the text of `/proc/locks`. The device is not compared: on some
/// file systems it is not the one that a file's metadata has.
fn in_locks(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 4711 00:1f:42 0 EOF`; those that wait begin with `->`.
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let holder = words.nth(2)?.parse().ok()?;
        let found = words.next()?.rsplit(':').next()?;
        (found.parse() == Ok(inode)).then_some(holder)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_the_inode_is_found_and_who_waits_is_not() {
        let locks = "1: POSIX  ADVISORY  WRITE 17 00:1f:42 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 4711 08:01:421 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 4712 00:1f:42 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 99 00:1f:43 0 EOF\n";
        assert_eq!(in_locks(locks, 42), Some(4712));
        assert_eq!(in_locks(locks, 421), Some(4711));
        assert_eq!(in_locks(locks, 43), None);
        assert_eq!(in_locks("", 42), None);
    }
}
