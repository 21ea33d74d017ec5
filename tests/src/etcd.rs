//! A real etcd of one member on loopback, with its data in a temporary directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{Process, free_port};
use crate::{Error, Result, Tried, http, wait};

/// Debian's place for it; `STOA_ETCD` names another.
const ETCD: &str = "/usr/bin/etcd";

/// How long a start or an orderly stop may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A key as etcd keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created it.
    pub create_revision: i64,
    /// The revision that wrote it last.
    pub mod_revision: i64,
}

/// One etcd server. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct Etcd {
    directory: TempDir,
    binary: PathBuf,
    client_port: u16,
    peer_port: u16,
    process: Option<Process>,
}

impl Etcd {
    /// Starts a fresh etcd on free ports and waits until it answers.
    ///
    /// # Errors
    /// [`Error::Missing`] without an etcd binary; otherwise what its log says.
    pub fn start() -> Result<Etcd> {
        let binary = PathBuf::from(std::env::var_os("STOA_ETCD").unwrap_or_else(|| ETCD.into()));
        if !binary.exists() {
            return Err(Error::Missing {
                program: "etcd",
                path: binary,
                remedy: "install Debian's etcd-server, or name the binary in STOA_ETCD",
            });
        }
        let directory = tempfile::Builder::new()
            .prefix("stoa-etcd-")
            .tempdir()
            .tried(|| "a temporary directory for etcd".to_owned())?;
        let mut etcd = Etcd {
            directory,
            binary,
            client_port: free_port()?,
            peer_port: free_port()?,
            process: None,
        };
        etcd.restart()?;
        Ok(etcd)
    }

    /// The host that clients connect to.
    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    /// The port that clients connect to; it stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.client_port
    }

    /// The URL that clients connect to.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Starts it again over the same data and ports, after a stop or kill.
    ///
    /// # Errors
    /// When it does not answer in time; the end of its log is in the error.
    pub fn restart(&mut self) -> Result<()> {
        if let Some(process) = &mut self.process {
            process.kill();
        }
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new(&self.binary);
        command
            .env_clear()
            .arg("--name=test")
            .arg(format!("--data-dir={}", self.data().display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            .arg("--logger=zap");
        // 3.4 refuses to start on architectures it calls untested unless told which one.
        if std::env::consts::ARCH == "aarch64" {
            command.env("ETCD_UNSUPPORTED_ARCH", "arm64");
        }
        let log = self.directory.path().join("etcd.log");
        let process = self.process.insert(Process::start("etcd", command, &log)?);
        let port = self.client_port;
        wait::until("etcd's health", PATIENCE, || {
            if let Err(ended) = process.expect_running() {
                return Err(ended.to_string());
            }
            match http::get(("127.0.0.1", port), "/health") {
                Ok(answer) if answer.body.contains("\"true\"") => Ok(()),
                Ok(answer) => Err(answer.body),
                Err(error) => Err(format!("{error}; log: {}", process.log_tail())),
            }
        })
    }

    /// Ends it in order (SIGTERM); [`Etcd::restart`] brings it back.
    ///
    /// # Errors
    /// When it outlives the deadline; it is killed then.
    pub fn stop(&mut self) -> Result<()> {
        match &mut self.process {
            Some(process) => process.terminate(PATIENCE).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Ends it with SIGKILL; [`Etcd::restart`] brings it back.
    pub fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill();
        }
    }

    /// Freezes it (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::SIGSTOP);
        }
    }

    /// Lets a frozen one go on (SIGCONT).
    pub fn resume(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::SIGCONT);
        }
    }

    /// Whether the process lives (frozen counts).
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// A copy of the data of a stopped etcd, to go back to with [`Etcd::restore`].
    ///
    /// # Errors
    /// When the data cannot be copied.
    pub fn backup(&self) -> Result<TempDir> {
        let copy = tempfile::Builder::new()
            .prefix("stoa-etcd-backup-")
            .tempdir()
            .tried(|| "a temporary directory for a backup".to_owned())?;
        copy_tree(&self.data(), &copy.path().join("data"))?;
        Ok(copy)
    }

    /// Puts the data of a stopped etcd back to a backup, as an operator would; the revision goes
    /// backwards.
    ///
    /// # Errors
    /// When the data cannot be copied.
    pub fn restore(&self, backup: &TempDir) -> Result<()> {
        let data = self.data();
        std::fs::remove_dir_all(&data).tried(|| format!("removing {}", data.display()))?;
        copy_tree(&backup.path().join("data"), &data)
    }

    /// Writes a key without any condition, as `etcdctl put` does. Returns the revision.
    ///
    /// # Errors
    /// When etcd refuses or cannot be reached.
    pub fn put(&self, key: &str, value: &str) -> Result<i64> {
        let body = json!({"key": base64(key.as_bytes()), "value": base64(value.as_bytes())});
        let answer = self.call("/v3/kv/put", &body)?;
        Ok(number(&answer["header"]["revision"]))
    }

    /// Removes a key, as `etcdctl del` does.
    ///
    /// # Errors
    /// When etcd refuses or cannot be reached.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.call(
            "/v3/kv/deleterange",
            &json!({"key": base64(key.as_bytes())}),
        )
        .map(|_| ())
    }

    /// One key.
    ///
    /// # Errors
    /// When etcd refuses or cannot be reached.
    pub fn get(&self, key: &str) -> Result<Option<Entry>> {
        let answer = self.call("/v3/kv/range", &json!({"key": base64(key.as_bytes())}))?;
        Ok(entries(&answer)?.pop())
    }

    /// All keys under a prefix, by key.
    ///
    /// # Errors
    /// When etcd refuses or cannot be reached.
    pub fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        // The end of the range is the prefix with its last byte one up; all keys when empty.
        let (key, end) = if prefix.is_empty() {
            (vec![0], vec![0])
        } else {
            let mut end = prefix.as_bytes().to_vec();
            if let Some(last) = end.last_mut() {
                *last += 1;
            }
            (prefix.as_bytes().to_vec(), end)
        };
        let body = json!({"key": base64(&key), "range_end": base64(&end)});
        entries(&self.call("/v3/kv/range", &body)?)
    }

    /// Forgets the history before `revision`, so that watches from there are cancelled.
    ///
    /// # Errors
    /// When etcd refuses or cannot be reached.
    pub fn compact(&self, revision: i64) -> Result<()> {
        let body = json!({"revision": revision.to_string(), "physical": true});
        self.call("/v3/kv/compaction", &body).map(|_| ())
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// One call of the JSON gateway.
    fn call(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = http::request(
            "POST",
            ("127.0.0.1", self.client_port),
            path,
            &body.to_string(),
        )?;
        if answer.status != 200 {
            return Err(Error::Failed {
                what: format!("etcd {path}"),
                status: answer.status.to_string(),
                output: answer.body,
            });
        }
        serde_json::from_str(&answer.body).map_err(|_| Error::Answer {
            what: format!("etcd {path}"),
            answer: answer.body.clone(),
        })
    }
}

/// The entries of a range answer.
fn entries(answer: &Value) -> Result<Vec<Entry>> {
    let kvs = answer["kvs"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    kvs.iter()
        .map(|kv| {
            let text = |field: &str| {
                unbase64(kv[field].as_str().unwrap_or_default()).ok_or_else(|| Error::Answer {
                    what: "etcd range".to_owned(),
                    answer: kv.to_string(),
                })
            };
            Ok(Entry {
                key: String::from_utf8_lossy(&text("key")?).into_owned(),
                value: text("value")?,
                create_revision: number(&kv["create_revision"]),
                mod_revision: number(&kv["mod_revision"]),
            })
        })
        .collect()
}

/// 64-bit numbers come as strings in protobuf's JSON; zero is left out.
fn number(value: &Value) -> i64 {
    match value {
        Value::String(text) => text.parse().unwrap_or(0),
        Value::Number(number) => number.as_i64().unwrap_or(0),
        _ => 0,
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Base64 with padding.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - three.len()));
        for place in 0..4 {
            if place <= three.len() {
                let six = (word >> (18 - 6 * place)) & 63;
                text.push(char::from(ALPHABET[six as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

/// The bytes of Base64 text; `None` when it is something else.
fn unbase64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let six = ALPHABET.iter().position(|known| *known == byte)?;
        word = word << 6 | u32::try_from(six).ok()?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits) as u8);
            word &= (1 << bits) - 1;
        }
    }
    Some(bytes)
}

/// Copies a directory with everything in it.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let what = || format!("copying {} to {}", from.display(), to.display());
    std::fs::create_dir_all(to).tried(what)?;
    for entry in std::fs::read_dir(from).tried(what)? {
        let entry = entry.tried(what)?;
        let target = to.join(entry.file_name());
        if entry.file_type().tried(what)?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target).tried(what)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_goes_there_and_back() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
            assert_eq!(unbase64(coded).unwrap(), plain.as_bytes());
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unbase64(&base64(&all)).unwrap(), all);
        assert!(unbase64("!").is_none());
    }

    #[test]
    fn etcd_keeps_its_keys_over_kill_and_restart_and_forgets_them_on_restore() {
        let mut etcd = Etcd::start().unwrap();
        etcd.put("layout_version", "tpch.lineitem:1").unwrap();
        etcd.stop().unwrap();
        assert!(!etcd.is_running());
        let backup = etcd.backup().unwrap();
        etcd.restart().unwrap();
        let revision = etcd.put("layout_version", "tpch.lineitem:2").unwrap();
        etcd.kill();
        assert!(etcd.get("layout_version").is_err());
        etcd.restart().unwrap();
        let entry = etcd.get("layout_version").unwrap().unwrap();
        assert_eq!(entry.value, b"tpch.lineitem:2");
        assert_eq!(entry.mod_revision, revision);
        assert_eq!(etcd.list("layout").unwrap().len(), 1);
        assert_eq!(etcd.list("").unwrap().len(), 1);
        assert!(etcd.list("x").unwrap().is_empty());

        etcd.pause();
        assert!(etcd.is_running());
        etcd.resume();
        etcd.compact(revision).unwrap();
        etcd.delete("layout_version").unwrap();
        assert_eq!(etcd.get("layout_version").unwrap(), None);

        etcd.stop().unwrap();
        etcd.restore(&backup).unwrap();
        etcd.restart().unwrap();
        let entry = etcd.get("layout_version").unwrap().unwrap();
        assert_eq!(entry.value, b"tpch.lineitem:1");
        assert!(entry.mod_revision < revision);
    }
}
