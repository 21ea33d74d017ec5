//! Child processes with a log each, ended by their own process id and never by name.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Error, Result, Tried, wait};

/// How many bytes of a log an error shows.
const LOG_TAIL_BYTES: usize = 4000;

/// A running (or ended) child process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with stdout and stderr appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Process> {
        let open = || -> std::io::Result<(File, File)> {
            let file = OpenOptions::new().create(true).append(true).open(log)?;
            Ok((file.try_clone()?, file))
        };
        let (out, err) = open().tried(|| format!("log of {name} at {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .tried(|| format!("starting {name} ({command:?})"))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The name given at the start.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal; nothing happens when it has ended.
    pub fn signal(&mut self, signal: Signal) {
        // `try_wait` before, so that a reaped and reused process id is never signalled.
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits until it is gone.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it outlives `limit`; it is killed then.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        let ended = self.wait(limit);
        if ended.is_err() {
            self.kill();
        }
        ended
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// [`Error::Deadline`] with the end of its log.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {} (pid {})", self.name, self.child.id());
        let log = self.log.clone();
        wait::until(&what, limit, || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(tail(&log)),
            Err(error) => Err(error.to_string()),
        })
    }

    /// The end of what it wrote to stdout and stderr.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// The whole log.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// An error that says that it ended, and how, if it has.
    ///
    /// # Errors
    /// [`Error::Failed`] with the status and the end of its log.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(Error::Failed {
                what: self.name.clone(),
                status: status.to_string(),
                output: self.log_tail(),
            }),
            Err(source) => Err(Error::Io {
                what: self.name.clone(),
                source,
            }),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The end of a file, for errors.
fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(LOG_TAIL_BYTES);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

/// A TCP port of the loopback address that was free a moment ago and that no other caller in
/// this process got.
///
/// # Errors
/// When no port is free.
pub fn free_port() -> Result<u16> {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(|broken| broken.into_inner());
    let given = given.get_or_insert_default();
    loop {
        let port = TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .tried(|| "a free port".to_owned())?
            .port();
        if given.insert(port) {
            return Ok(port);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut process = Process::start("sleep", command, &dir.path().join("log")).unwrap();
        assert!(process.is_running());
        let pid = Pid::from_raw(process.id().cast_signed());
        drop(process);
        assert!(kill(pid, None).is_err());
    }

    #[test]
    fn the_end_of_the_log_is_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo out of olives >&2; exit 3"]);
        let mut process = Process::start("cook", command, &dir.path().join("log")).unwrap();
        process.wait(Duration::from_secs(10)).unwrap();
        let text = process.expect_running().unwrap_err().to_string();
        assert!(
            text.contains("out of olives") && text.contains('3'),
            "{text}"
        );
    }
}
