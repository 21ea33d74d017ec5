//! What runs in processes of its own: the first execution of a query in a new one, and several of
//! them at once.
//!
//! A child is this program with the command `child` and a request as JSON. It answers with lines of
//! JSON on its standard output.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use datafusion::execution::context::SessionContext;
use serde::{Deserialize, Serialize};
use stoa_datafusion::{Origin, Reader, Stoa};

use crate::Error;
use crate::modes::{Cache, Mode, register_parquet, register_stoa, run, session};
use crate::served::{Holder, Serving, Store};
use crate::suite::{Data, Query};

/// Distance of the bytes that prefaulting touches: the smallest page there is.
const PAGE_BYTES: usize = 4096;

/// What a child is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// What.
    pub task: Task,
    /// Over which data.
    pub data: Data,
    /// The mode's name.
    pub mode: String,
    /// Target partitions.
    pub partitions: usize,
    /// The queries.
    pub queries: Vec<Query>,
    /// The cache that another process runs, for modes that have one.
    pub cache: Option<PathBuf>,
}

/// The tasks of children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// The first query once, then again so often; [`Touched`].
    Touch {
        /// Executions after the first.
        hot: usize,
        /// Map all pages before.
        prefault: bool,
    },
    /// The first query once, with a cache of its own that is empty below this directory; [`Touched`].
    Cold {
        /// A tmpfs.
        cache_root: PathBuf,
    },
    /// All queries, each time a line comes on the standard input; [`Passed`] a line.
    Passes,
    /// The data as an object store over HTTP, until the standard input ends; [`Store`].
    Store {
        /// Milliseconds that every answer is delayed.
        delay_ms: u64,
    },
    /// The mode's chunks of all tables in memory that others may read over TCP, until the standard
    /// input ends; [`Held`](crate::served::Held).
    Hold {
        /// A tmpfs.
        cache_root: PathBuf,
        /// Where the tables lie.
        store: Store,
    },
}

/// Answer to [`Task::Touch`] and [`Task::Cold`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Touched {
    /// Milliseconds from nothing to registered tables.
    pub attach_ms: f64,
    /// Milliseconds that mapping all pages took.
    pub prefault_ms: f64,
    /// Milliseconds of the first execution.
    pub first_ms: f64,
    /// Milliseconds of those after it.
    pub hot_ms: Vec<f64>,
}

/// Answer to a line in [`Task::Passes`], and once before the first: the child is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Passed {
    /// Seconds of the pass.
    pub seconds: f64,
}

/// Does what a request asks, in this process.
///
/// # Errors
/// If a query fails, or the tables cannot be had.
pub async fn serve(request: &Request) -> Result<(), Error> {
    match &request.task {
        Task::Touch { hot, prefault } => answer(&touch(request, *hot, *prefault).await?),
        Task::Cold { cache_root } => {
            let mode: Mode = request.mode.parse()?;
            if !mode.is_stoa() {
                return answer(&touch(request, 0, false).await?);
            }
            let cache = Cache::start(&mode, &request.data, cache_root).await?;
            let touched = cold(request, &mode, &cache).await;
            cache.stop().await;
            answer(&touched?)
        }
        Task::Passes => passes(request).await,
        Task::Store { delay_ms } => {
            // Served as long as this lives.
            let serving = Serving::start(&request.data, *delay_ms)?;
            answer(&serving.store())?;
            until_closed().await
        }
        Task::Hold { cache_root, store } => {
            let mode: Mode = request.mode.parse()?;
            let holder = Holder::start(&mode, &request.data, store, cache_root).await?;
            let held = holder.load(&mode, &request.data, store).await;
            let served = match held.and_then(|held| answer(&held)) {
                Ok(()) => until_closed().await,
                Err(error) => Err(error),
            };
            holder.stop().await;
            served
        }
    }
}

/// Waits until nobody holds the other end of the standard input.
async fn until_closed() -> Result<(), Error> {
    let closed = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    tokio::task::spawn_blocking(closed).await??;
    Ok(())
}

fn answer<T: Serialize>(value: &T) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// The session of a request, over the cache that another process runs, and the reader of it.
async fn attach(request: &Request) -> Result<(SessionContext, Option<Reader>), Error> {
    let mode: Mode = request.mode.parse()?;
    let session = session(&mode, request.partitions);
    match &request.cache {
        Some(directory) if mode.is_stoa() => {
            let stoa = Stoa::open(directory, Origin::default());
            register_stoa(&session, &stoa, &request.data).await?;
            Ok((session, Some(stoa.reader().clone())))
        }
        _ => {
            register_parquet(&session, &request.data, &request.data.root()).await?;
            Ok((session, None))
        }
    }
}

async fn touch(request: &Request, hot: usize, prefault: bool) -> Result<Touched, Error> {
    let query = request.queries.first().ok_or("no query was asked")?;
    let mut touched = Touched::default();
    let start = Instant::now();
    let (session, reader) = attach(request).await?;
    touched.attach_ms = milliseconds(start);
    if let Some(reader) = reader.filter(|_| prefault) {
        let start = Instant::now();
        map_all(&reader);
        touched.prefault_ms = milliseconds(start);
    }
    touched.first_ms = run(&session, &query.sql).await?.1.as_secs_f64() * 1000.0;
    for _ in 0..hot {
        let (_, elapsed) = run(&session, &query.sql).await?;
        touched.hot_ms.push(elapsed.as_secs_f64() * 1000.0);
    }
    Ok(touched)
}

/// Opens every chunk of the cache and reads a byte of each of its pages, so that they are mapped.
fn map_all(reader: &Reader) {
    let view = reader.view();
    let snapshot = view.snapshot();
    for (_, entry) in snapshot.iter() {
        if let Ok(chunk) = snapshot.open_chunk(&entry) {
            for at in (0..chunk.len()).step_by(PAGE_BYTES) {
                std::hint::black_box(chunk[at]);
            }
        }
    }
}

/// The first query over tables that the cache sees for the first time: it reads the origin while
/// the cache begins to fill.
async fn cold(request: &Request, mode: &Mode, cache: &Cache) -> Result<Touched, Error> {
    let query = request.queries.first().ok_or("no query was asked")?;
    let session = session(mode, request.partitions);
    let mut touched = Touched::default();
    let start = Instant::now();
    cache.stoa().register(&session).await?;
    for table in &request.data.tables {
        let location = request.data.directory.join(table);
        let create = format!(
            "create external table {table} stored as stoa location '{}/'",
            location.display()
        );
        session.sql(&create).await?.collect().await?;
    }
    touched.attach_ms = milliseconds(start);
    touched.first_ms = run(&session, &query.sql).await?.1.as_secs_f64() * 1000.0;
    Ok(touched)
}

async fn passes(request: &Request) -> Result<(), Error> {
    let (session, _) = attach(request).await?;
    // The first pass warms up; its answer says that the child is ready.
    for line in std::iter::once(Ok(String::new())).chain(std::io::stdin().lines()) {
        line?;
        let start = Instant::now();
        for query in &request.queries {
            run(&session, &query.sql).await?;
        }
        answer(&Passed {
            seconds: start.elapsed().as_secs_f64(),
        })?;
    }
    Ok(())
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// A child that runs.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    request: String,
}

impl Running {
    /// Starts this program again with a request.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(request: &Request) -> Result<Running, Error> {
        let request = serde_json::to_string(request)?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["child", &request])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("the child has no output")?;
        Ok(Running {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
            request,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks for another answer.
    ///
    /// # Errors
    /// If the child is gone.
    pub fn ask(&mut self) -> Result<(), Error> {
        let input = self.input.as_mut().ok_or("the child takes no input")?;
        Ok(input.write_all(b"\n")?)
    }

    /// Its next answer.
    ///
    /// # Errors
    /// If it ends without one.
    pub fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T, Error> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            return Err(format!("child {status}, asked {}", self.request).into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its loop ends with its input.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}
