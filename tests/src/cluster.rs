//! Coordinator and workers as real processes of the `stoa` binary, over a real etcd.
//!
//! Every process has a configuration file of its own in a temporary directory; the workers' caches
//! lie under /dev/shm. All of it goes away when the value is dropped, whatever the test did.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use stoa_metastore::{CacheVersion, WorkerState, keys};
use tempfile::TempDir;

use crate::etcd::Etcd;
use crate::process::Process;
use crate::s3::S3Server;
use crate::{Error, Result, Tried, wait};

/// How long a start, a load or an orderly stop of these small tables may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How a cluster is set up.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// How many workers.
    pub workers: usize,
    /// `cache.size` of each worker.
    pub cache_size: String,
    /// `cache.freshness`.
    pub freshness: String,
    /// `heartbeat.lease.ttl.seconds`.
    pub lease_ttl: u64,
    /// `coordinator.grace.seconds`.
    pub grace: u64,
    /// The buckets whose store is the S3 server.
    pub buckets: Vec<String>,
    /// Further lines of every configuration file, each `key = value`.
    pub more: Vec<String>,
}

impl Default for ClusterOptions {
    /// Three workers, with short leases so that deaths are noticed within a test's patience.
    fn default() -> ClusterOptions {
        ClusterOptions {
            workers: 3,
            cache_size: "64MiB".to_owned(),
            freshness: "snapshot".to_owned(),
            lease_ttl: 3,
            grace: 60,
            buckets: vec!["tpch".to_owned()],
            more: Vec::new(),
        }
    }
}

/// One worker's places.
#[derive(Debug)]
struct Node {
    id: String,
    config: PathBuf,
    cache: PathBuf,
    process: Option<Process>,
}

/// Processes of one cluster. Dropping it kills them and removes their caches.
#[derive(Debug)]
pub struct Cluster {
    binary: PathBuf,
    // Before the directories, so that the processes are gone when those are removed.
    coordinators: Vec<Option<Process>>,
    nodes: Vec<Node>,
    config: PathBuf,
    directory: TempDir,
    shm: TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.processes() {
            process.kill();
        }
        // The counters of a cache lie beside its directory, and are named after it.
        for node in &self.nodes {
            let _ = stoa_shm::AccessCounters::remove(&node.cache);
        }
    }
}

/// What a command wrote, and how it ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Cluster {
    /// Writes the configuration files; starts nothing.
    ///
    /// # Errors
    /// [`Error::Missing`] when the `stoa` binary was not built.
    pub fn new(etcd: &Etcd, s3: &S3Server, options: &ClusterOptions) -> Result<Cluster> {
        let binary = binary()?;
        let temporary = |prefix: &str, below: &Path| {
            tempfile::Builder::new()
                .prefix(prefix)
                .permissions(std::fs::Permissions::from_mode(0o700))
                .tempdir_in(below)
                .tried(|| format!("a temporary directory in {}", below.display()))
        };
        let directory = temporary("stoa-cluster-", &std::env::temp_dir())?;
        let shm = temporary("stoa-cluster-", Path::new("/dev/shm"))?;
        let shared = shared_config(etcd, s3, options);
        let write = |name: &str, lines: &[String]| {
            let path = directory.path().join(name);
            // The dotted keys come first: they belong to the root table.
            let text = format!("{}\n{shared}", lines.join("\n"));
            std::fs::write(&path, text).tried(|| path.display().to_string())?;
            Ok::<_, Error>(path)
        };
        let mut nodes = Vec::new();
        for number in 0..options.workers {
            let id = format!("worker-{number}");
            let cache = shm.path().join(&id);
            let lines = [
                format!("cache.location = {:?}", cache.display().to_string()),
                format!("cache.size = {:?}", options.cache_size),
                format!("worker.id = {id:?}"),
                "worker.host = \"127.0.0.1\"".to_owned(),
            ];
            let config = write(&format!("{id}.toml"), &lines)?;
            nodes.push(Node {
                id,
                config,
                cache,
                process: None,
            });
        }
        // Of a node without a worker: its cache directory never comes to be.
        let nowhere = shm.path().join("nowhere");
        let config = write(
            "stoa.toml",
            &[format!(
                "cache.location = {:?}",
                nowhere.display().to_string()
            )],
        )?;
        Ok(Cluster {
            binary,
            coordinators: Vec::new(),
            nodes,
            config,
            directory,
            shm,
        })
    }

    /// Starts one coordinator and all workers, and waits until they are registered.
    ///
    /// # Errors
    /// When a process ends, or is not registered in time; its log is in the error.
    pub fn start(etcd: &Etcd, s3: &S3Server, options: &ClusterOptions) -> Result<Cluster> {
        let mut cluster = Cluster::new(etcd, s3, options)?;
        cluster.start_coordinator()?;
        for number in 0..options.workers {
            cluster.start_worker(number)?;
        }
        cluster.wait_registered(etcd)?;
        Ok(cluster)
    }

    /// Waits until somebody is elected and every running worker is registered.
    ///
    /// # Errors
    /// When that does not happen in time; the logs are in the error.
    pub fn wait_registered(&mut self, etcd: &Etcd) -> Result<()> {
        wait::until("coordinator and workers", PATIENCE, || {
            for process in self.processes() {
                process
                    .expect_running()
                    .map_err(|ended| ended.to_string())?;
            }
            let there = |key: &str| match etcd.get(key) {
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err(format!("no key {key}")),
                Err(error) => Err(error.to_string()),
            };
            let running: Vec<String> = self
                .nodes
                .iter()
                .filter(|node| node.process.is_some())
                .map(|node| keys::worker(&node.id))
                .collect();
            let missing =
                there(keys::ELECTION).and_then(|()| running.iter().try_for_each(|key| there(key)));
            missing.map_err(|missing| {
                let logs: Vec<String> =
                    self.processes().map(|process| process.log_tail()).collect();
                format!("{missing}; logs: {}", logs.join("\n"))
            })
        })
    }

    /// Starts a further coordinator. Returns its number.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_coordinator(&mut self) -> Result<usize> {
        let number = self.coordinators.len();
        let name = format!("coordinator-{number}");
        let process = self.daemon(&name, "coordinator", &self.config)?;
        self.coordinators.push(Some(process));
        Ok(number)
    }

    /// Starts (or restarts) a worker; it takes over the cache directory as it is.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_worker(&mut self, number: usize) -> Result<()> {
        self.nodes[number].process = None;
        let node = &self.nodes[number];
        let process = self.daemon(&node.id, "worker", &node.config)?;
        self.nodes[number].process = Some(process);
        Ok(())
    }

    /// A coordinator's process.
    ///
    /// # Panics
    /// When it was never started.
    pub fn coordinator(&mut self, number: usize) -> &mut Process {
        self.coordinators[number]
            .as_mut()
            .unwrap_or_else(|| panic!("coordinator {number} does not run"))
    }

    /// A worker's process.
    ///
    /// # Panics
    /// When it was never started.
    pub fn worker(&mut self, number: usize) -> &mut Process {
        self.nodes[number]
            .process
            .as_mut()
            .unwrap_or_else(|| panic!("worker {number} does not run"))
    }

    /// A worker's name in the metastore.
    pub fn worker_id(&self, number: usize) -> &str {
        &self.nodes[number].id
    }

    /// A worker's cache directory.
    pub fn cache(&self, number: usize) -> &Path {
        &self.nodes[number].cache
    }

    /// A worker's configuration file: that of the processes on its host.
    pub fn worker_config(&self, number: usize) -> &Path {
        &self.nodes[number].config
    }

    /// The configuration file of a host without a worker.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Runs `stoa` with these arguments and `--config` of a host without a worker.
    ///
    /// # Errors
    /// When it cannot be started or outlives [`PATIENCE`].
    pub fn run(&self, arguments: &[&str]) -> Result<Ran> {
        self.run_at(&self.config, arguments)
    }

    /// Like [`Cluster::run`], and fails unless it ends with 0. Returns standard output.
    ///
    /// # Errors
    /// [`Error::Failed`] with what it wrote.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.ok_at(&self.config, arguments)
    }

    /// Creates a layout version, with these columns (all when empty).
    ///
    /// # Errors
    /// [`Error::Failed`] with what the command wrote.
    pub fn create_layout(&self, table: &str, location: &str, columns: &[&str]) -> Result<()> {
        let columns = columns.join(",");
        let mut arguments = vec!["layout", "create", table, "--location", location];
        if !columns.is_empty() {
            arguments.extend(["--columns", &columns]);
        }
        self.ok(&arguments).map(|_| ())
    }

    /// Loads a version and waits until the workers have it.
    ///
    /// # Errors
    /// [`Error::Failed`] with what the command wrote.
    pub fn load(&self, table_version: &str) -> Result<()> {
        self.ok(&["load", table_version]).map(|_| ())
    }

    /// Asks for a version and does not wait.
    ///
    /// # Errors
    /// [`Error::Failed`] with what the command wrote.
    pub fn request_load(&self, table_version: &str) -> Result<()> {
        self.ok(&["load", table_version, "--no-wait"]).map(|_| ())
    }

    /// What `stoa status --json` prints.
    ///
    /// # Errors
    /// When it fails or does not print JSON.
    pub fn status(&self) -> Result<Value> {
        let text = self.ok(&["status", "--json"])?;
        parse("stoa status --json", &text)
    }

    /// The rows of a query, asked by a process on the host of a worker.
    ///
    /// # Errors
    /// When it fails or does not print JSON.
    pub fn sql(&self, worker: usize, sql: &str) -> Result<Vec<Value>> {
        self.sql_at(&self.nodes[worker].config, sql)
    }

    /// The rows of a query, asked with any configuration file.
    ///
    /// # Errors
    /// When it fails or does not print JSON.
    pub fn sql_at(&self, config: &Path, sql: &str) -> Result<Vec<Value>> {
        let text = self.ok_at(config, &["sql", "-q", "--format", "json", "-c", sql])?;
        // No rows at all may print as nothing.
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        match parse(sql, &text)? {
            Value::Array(rows) => Ok(rows),
            other => Err(Error::Answer {
                what: sql.to_owned(),
                answer: other.to_string(),
            }),
        }
    }

    /// A query command to run in the background (its output goes to the log of the process).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn sql_process(&self, name: &str, worker: usize, sql: &str) -> Result<Process> {
        let mut command = self.command(
            &self.nodes[worker].config,
            &["sql", "-q", "--format", "json", "-c", sql],
        );
        command.env("RUST_LOG", "warn");
        Process::start(
            name,
            command,
            &self.directory.path().join(format!("{name}.log")),
        )
    }

    /// A command to run in the background, on a host without a worker (its output goes to the log of
    /// the process).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn background(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let command = self.command(&self.config, arguments);
        let log = self.directory.path().join(format!("{name}.log"));
        Process::start(name, command, &log)
    }

    /// What the workers report, as it stands in etcd.
    ///
    /// # Errors
    /// When etcd cannot be asked or a report cannot be read.
    pub fn states(&self, etcd: &Etcd) -> Result<Vec<WorkerState>> {
        let entries = etcd.list(keys::WORKER_STATE_PREFIX)?;
        entries
            .iter()
            .map(|entry| decode(&entry.key, &entry.value))
            .collect()
    }

    /// The plan in force of a table, as it stands in etcd.
    ///
    /// # Errors
    /// When etcd cannot be asked or the plan cannot be read.
    pub fn plan(&self, etcd: &Etcd, table: &str) -> Result<Option<CacheVersion>> {
        let entry = etcd.get(&keys::cache_version(table))?;
        entry
            .map(|entry| decode(&entry.key, &entry.value))
            .transpose()
    }

    /// Waits until a plan of this version is in force and every worker with a part in it reports
    /// it as published, completely or with reasons.
    ///
    /// # Errors
    /// [`Error::Deadline`] with the last reports.
    pub fn wait_loaded(&self, etcd: &Etcd, table: &str, version: u64) -> Result<Vec<WorkerState>> {
        let what = format!("{table}:{version} loaded");
        wait::until(&what, PATIENCE, || {
            let look = || -> Result<Result<Vec<WorkerState>, String>> {
                let states = self.states(etcd)?;
                let Some(plan) = self.plan(etcd, table)? else {
                    return Ok(Err("no plan".to_owned()));
                };
                let target = plan.target().ok();
                let done = plan.table_version == format!("{table}:{version}")
                    && plan.parts.keys().all(|worker| {
                        states.iter().any(|state| {
                            state.id == *worker
                                && state.tables.get(table).is_some_and(|t| t.current == target)
                        })
                    });
                Ok(if done {
                    Ok(states)
                } else {
                    Err(format!("plan {plan:?}, states {states:?}"))
                })
            };
            look().unwrap_or_else(|error| Err(error.to_string()))
        })
    }

    fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        self.coordinators
            .iter_mut()
            .chain(self.nodes.iter_mut().map(|node| &mut node.process))
            .flatten()
    }

    fn ok_at(&self, config: &Path, arguments: &[&str]) -> Result<String> {
        let ran = self.run_at(config, arguments)?;
        if ran.code == Some(0) {
            return Ok(ran.stdout);
        }
        Err(Error::Failed {
            what: format!("stoa {}", arguments.join(" ")),
            status: format!("{:?}", ran.code),
            output: format!("{}\n{}", ran.stdout, ran.stderr),
        })
    }

    /// Runs `stoa` with these arguments and `--config`.
    ///
    /// # Errors
    /// When it cannot be started or outlives [`PATIENCE`].
    pub fn run_at(&self, config: &Path, arguments: &[&str]) -> Result<Ran> {
        let what = || format!("stoa {}", arguments.join(" "));
        // Output goes to files rather than pipes, so that waiting with a deadline is simple.
        let out = self.scratch("out")?;
        let err = self.scratch("err")?;
        let mut command = self.command(config, arguments);
        let mut child = command
            .stdin(std::process::Stdio::null())
            .stdout(out.reopen().tried(what)?)
            .stderr(err.reopen().tried(what)?)
            .spawn()
            .tried(what)?;
        let read = |file: &tempfile::NamedTempFile| {
            std::fs::read(file.path())
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default()
        };
        let ended = wait::until(&what(), PATIENCE, || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(format!("{}\n{}", read(&out), read(&err))),
            Err(error) => Err(error.to_string()),
        });
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        Ok(Ran {
            code: ended?.code(),
            stdout: read(&out),
            stderr: read(&err),
        })
    }

    fn scratch(&self, kind: &str) -> Result<tempfile::NamedTempFile> {
        tempfile::Builder::new()
            .prefix("command-")
            .suffix(&format!(".{kind}"))
            .tempfile_in(self.directory.path())
            .tried(|| "a file for a command's output".to_owned())
    }

    fn daemon(&self, name: &str, role: &str, config: &Path) -> Result<Process> {
        let mut command = self.command(config, &[role]);
        command.env(
            "RUST_LOG",
            std::env::var("STOA_TEST_LOG").unwrap_or_else(|_| "info".to_owned()),
        );
        let log = self.directory.path().join(format!("{name}.log"));
        Process::start(name, command, &log)
    }

    fn command(&self, config: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        // Nothing of the developer's own settings may reach it.
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.directory.path())
            .env("XDG_STATE_HOME", self.directory.path().join("state"))
            .env("RUST_BACKTRACE", "1")
            .current_dir(self.directory.path())
            .args(arguments)
            .arg("--config")
            .arg(config);
        command
    }

    /// Everything that daemons and background processes have written, one after the other.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn logs(&self) -> Result<String> {
        let what = || "the logs of a cluster".to_owned();
        let mut text = String::new();
        for entry in std::fs::read_dir(self.directory.path()).tried(what)? {
            let path = entry.tried(what)?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                text.push_str(&String::from_utf8_lossy(&std::fs::read(&path).tried(what)?));
            }
        }
        Ok(text)
    }

    /// Where all of this cluster's caches lie.
    pub fn shm(&self) -> &Path {
        self.shm.path()
    }
}

/// What every process is told: where etcd and the stores are, and how patient to be.
fn shared_config(etcd: &Etcd, s3: &S3Server, options: &ClusterOptions) -> String {
    use std::fmt::Write;

    let mut text = format!(
        "cache.freshness = {:?}\n\
         etcd.hosts = {:?}\n\
         etcd.port = {}\n\
         etcd.timeout = \"2s\"\n\
         heartbeat.lease.ttl.seconds = {}\n\
         heartbeat.period.seconds = 1\n\
         coordinator.grace.seconds = {}\n",
        options.freshness,
        etcd.host(),
        etcd.port(),
        options.lease_ttl,
        options.grace,
    );
    for line in &options.more {
        let _ = writeln!(text, "{line}");
    }
    for bucket in &options.buckets {
        let _ = write!(
            text,
            "[store.\"s3://{bucket}\"]\n\
             endpoint = {:?}\n\
             region = {:?}\n\
             allow_http = true\n\
             access_key_id = {:?}\n\
             secret_access_key = {:?}\n",
            s3.endpoint(),
            S3Server::REGION,
            s3.access_key(),
            s3.secret_key(),
        );
    }
    text
}

/// The `stoa` binary: `STOA_BIN`, else the one in the target directory that this program lies in.
///
/// # Errors
/// [`Error::Missing`] when it was not built.
pub fn binary() -> Result<PathBuf> {
    let missing = |path| Error::Missing {
        program: "stoa",
        path,
        remedy: "build it first (`cargo build -p stoa-cli`), or name the binary in STOA_BIN",
    };
    let path = match std::env::var_os("STOA_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let me = std::env::current_exe().tried(|| "the path of this program".to_owned())?;
            // target/{profile}/deps/{test} or target/{profile}/{program}
            let mut place = me.parent().unwrap_or(Path::new("/"));
            if place.ends_with("deps") {
                place = place.parent().unwrap_or(Path::new("/"));
            }
            place.join("stoa")
        }
    };
    if path.is_file() {
        Ok(path)
    } else {
        Err(missing(path))
    }
}

fn parse(what: &str, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| Error::Answer {
        what: what.to_owned(),
        answer: format!("{error}: {text}"),
    })
}

fn decode<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Result<T> {
    serde_json::from_slice(value).map_err(|error| Error::Answer {
        what: key.to_owned(),
        answer: format!("{error}: {}", String::from_utf8_lossy(value)),
    })
}
