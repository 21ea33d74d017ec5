//! The socket's place, and who may talk over it.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

/// The protocol over the socket; owner and caller must speak the same.
pub const PROTOCOL: u32 = 1;
/// The socket's name in the state directory.
pub const SOCKET_NAME: &str = "owner.sock";
/// The socket's mode.
pub const SOCKET_MODE: u32 = 0o600;

/// The directory, held open, and a short name of the socket in it: an address holds 107 bytes, and
/// a state directory may lie deeper than that.
fn short(dir: &Path) -> io::Result<(File, PathBuf)> {
    let held = File::open(dir)?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd())).join(SOCKET_NAME);
    Ok((held, name))
}

/// Listens in `dir`, in place of what an owner before this one left there. Only for the process
/// that has the store's file open: nobody else may take the name away.
pub(super) fn listen(dir: &Path) -> io::Result<UnixListener> {
    let (_held, name) = short(dir)?;
    match std::fs::remove_file(&name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&name)?;
    // The directory keeps others out until here, and the credentials of callers do after.
    std::fs::set_permissions(&name, Permissions::from_mode(SOCKET_MODE))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to whoever listens in `dir`.
pub(super) async fn connect(dir: &Path) -> io::Result<UnixStream> {
    let (_held, name) = short(dir)?;
    UnixStream::connect(&name).await
}

/// Whether a process of user `own` talks to one of user `other`: the same user's, or root's.
pub(super) fn admits(own: u32, other: u32) -> bool {
    other == own || other == 0
}

/// The user this process acts as.
pub(super) fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The process at the other end, if the kernel says which.
pub(super) fn pid_of(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_user_and_root_are_admitted() {
        assert!(admits(1000, 1000) && admits(1000, 0) && admits(0, 0));
        assert!(!admits(1000, 1001) && !admits(0, 1000));
    }

    #[tokio::test]
    async fn a_deep_directory_and_a_stale_socket_are_no_obstacle() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let stale = listen(&deep).unwrap();
        drop(stale);
        assert!(deep.join(SOCKET_NAME).exists());
        let refused = connect(&deep).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

        let listener = listen(&deep).unwrap();
        let mode = std::fs::metadata(deep.join(SOCKET_NAME)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, SOCKET_MODE);
        let stream = connect(&deep).await.unwrap();
        assert_eq!(pid_of(&stream), Some(std::process::id()));
        assert_eq!(stream.peer_cred().unwrap().uid(), own_user());
        drop(listener);
    }
}
