//! A home for the binary, and children that do not outlive a test.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its part, and all of it is its own"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A home of its own, with its cache on tmpfs.
pub struct Home {
    pub directory: TempDir,
    pub shm: TempDir,
}

/// How a command ended.
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Drop for Home {
    fn drop(&mut self) {
        // The counters of a cache lie beside its directory, and are named after it.
        let _ = stoa_shm::AccessCounters::remove(self.shm.path().join("cache"));
    }
}

impl Home {
    pub fn new() -> Home {
        let private = |below: &Path| {
            tempfile::Builder::new()
                .prefix("stoa-cli-")
                .permissions(std::fs::Permissions::from_mode(0o700))
                .tempdir_in(below)
                .unwrap()
        };
        Home {
            directory: private(&std::env::temp_dir()),
            shm: private(Path::new("/dev/shm")),
        }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_stoa"));
        command.args(arguments);
        command
    }

    /// Runs it where no file can grow beyond 32 KiB, as on a disk that is full.
    pub fn cramped(&self, arguments: &[&str]) -> Ran {
        let mut command = self.program("sh");
        command
            .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_stoa"))
            .args(arguments);
        ran(command)
    }

    fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            // Nothing of the developer's own settings may reach it.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.directory.path())
            .env("STOA_CACHE__LOCATION", self.shm.path().join("cache"))
            .env("STOA_CACHE__SIZE", "256MiB")
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command
    }

    pub fn stoa(&self, arguments: &[&str]) -> Ran {
        ran(self.command(arguments))
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.stoa(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}: {}{}", ran.stdout, ran.stderr);
        ran.stdout
    }

    /// A directory with one Parquet file: `n` from 1 to `rows`, and a text.
    pub fn table(&self, name: &str, rows: u32) -> String {
        let directory = self.directory.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("0.parquet");
        let copy = format!(
            "copy (select n, 'text ' || n as t from (select unnest(range(1, {}))) as r(n)) to '{}' \
             stored as parquet",
            rows + 1,
            file.display()
        );
        // With a state and a cache of its own: those of the test are not touched.
        let other = Home::new();
        other.ok(&["sql", "-q", "-c", &copy]);
        format!("{}/", directory.display())
    }

    pub fn refused(&self, arguments: &[&str], code: i32) -> String {
        let ran = self.stoa(arguments);
        assert_eq!(
            ran.code, code,
            "{arguments:?}: {}{}",
            ran.stdout, ran.stderr
        );
        ran.stderr
    }
}

fn ran(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A child that does not outlive the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
