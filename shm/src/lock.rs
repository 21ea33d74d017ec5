//! Locks of open file descriptions: they belong to the open file, so the kernel drops them when the
//! last descriptor and the last mapping of it are gone, however their processes ended.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Required by the kernel for this kind of lock.
        l_pid: 0,
    }
}

fn try_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(kind))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Takes a read lock without waiting; `false` if somebody holds a write lock.
pub(crate) fn try_read_lock(file: &File) -> io::Result<bool> {
    try_lock(file, libc::F_RDLCK)
}

/// A write lock, held until it is dropped.
#[derive(Debug)]
pub(crate) struct WriteLock(File);

impl WriteLock {
    /// Takes a write lock without waiting; gives the file back if somebody holds any lock. Needs a
    /// writable file.
    pub(crate) fn take(file: File) -> io::Result<Result<WriteLock, File>> {
        Ok(if try_lock(&file, libc::F_WRLCK)? {
            Ok(WriteLock(file))
        } else {
            Err(file)
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        // A child that this process is just starting may still have the descriptor: closing ours
        // would then not be enough.
        let _ = try_lock(&self.0, libc::F_UNLCK);
    }
}

/// Whether somebody else holds a lock on the file. Takes none, so a readable file is enough.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    let mut probe = whole_file(libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe))?;
    Ok(libc::c_int::from(probe.l_type) != libc::F_UNLCK)
}
