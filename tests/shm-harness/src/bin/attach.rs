//! What it costs a process to begin beside a large cache: the first answer of `stoa sql` over an
//! empty cache and over one of many gigabytes, in turns.
//!
//! ```text
//! cargo run -p stoa-tests-shm --bin attach -- target/debug/stoa [GiB] [chunk KiB] [runs]
//! ```
//!
//! The large cache consists of zeros, whose memory is given back once they are sealed: to every
//! process they are the same bytes, and 64 GiB of them fit anywhere. Ends with 1 where the first
//! answer takes 20 ms more by the medians, or 10 ms more of a processor by the means.

use std::error::Error;
use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{SysconfVar, sysconf};
use stoa_shm::{
    AccessCounters, CacheDir, CacheDirOptions, CacheWriter, ChunkKey, Handover, IndexContents,
    SEGMENT_BYTES,
};

/// Most that a first answer may take longer.
const WALL_MAX: Duration = Duration::from_millis(20);
/// Most that it may take more of a processor.
const CPU_MAX: Duration = Duration::from_millis(10);

/// How often the two take turns.
const TURNS: u64 = 3;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A user with a cache and a state of their own.
struct Home {
    shm: tempfile::TempDir,
    directory: tempfile::TempDir,
    binary: PathBuf,
}

impl Home {
    fn new(binary: &Path) -> Result<Home> {
        let scratch = |below: &str| {
            tempfile::Builder::new()
                .prefix("stoa-attach-")
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(below)
        };
        Ok(Home {
            shm: scratch("/dev/shm")?,
            directory: scratch("/tmp")?,
            binary: binary.to_path_buf(),
        })
    }

    fn cache(&self) -> PathBuf {
        self.shm.path().join("cache")
    }

    /// Runs one statement; returns how long that took.
    fn sql(&self, statement: &str) -> Result<Duration> {
        let started = Instant::now();
        let status = Command::new(&self.binary)
            .args(["sql", "-q", "-c", statement])
            .env_clear()
            .env("HOME", self.directory.path())
            .env("STOA_CACHE__LOCATION", self.cache())
            .env("STOA_CACHE__SIZE", "256MiB")
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        if !status.success() {
            return Err(format!("{statement} ended with {status}").into());
        }
        Ok(started.elapsed())
    }

    /// Has a process run for long enough to take the cache over, and to end in order.
    fn settle(&self) -> Result<()> {
        let mut child = Command::new(&self.binary)
            .args(["sql", "-q"])
            .env_clear()
            .env("HOME", self.directory.path())
            .env("STOA_CACHE__LOCATION", self.cache())
            .env("STOA_CACHE__SIZE", "256MiB")
            .current_dir(self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_secs(4));
        drop(child.stdin.take());
        child.wait()?;
        Ok(())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = AccessCounters::remove(self.cache());
    }
}

/// What the processes have used of the processors that have ended so far, to a tick of the clock.
fn cpu_of_children() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Behind the name, which may contain anything: state and ten numbers, this process's times, and
    // those of its children.
    let (_, behind) = stat.rsplit_once(')').ok_or("no process's times")?;
    let numbers = behind.split_whitespace().skip(13).take(2);
    let ticks = numbers
        .map(str::parse::<u64>)
        .sum::<std::result::Result<u64, _>>()?;
    let second = sysconf(SysconfVar::CLK_TCK)?.ok_or("no ticks of the clock")?;
    Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
}

/// Fills the cache with chunks of zeros that take no memory, and leaves it as its worker did.
fn fill(home: &Home, bytes: u64, chunk_bytes: u64) -> Result<usize> {
    let dir = CacheDir::create(home.cache(), CacheDirOptions::default())?;
    let (mut writer, recovery) = CacheWriter::open(dir)?;
    let left = recovery.left.unwrap_or_default();
    let zeros = vec![0; usize::try_from(chunk_bytes)?];
    let file: Arc<[u8]> = Arc::from(&b"file of zeros"[..]);
    let mut chunks = Vec::new();
    let mut filled = 0;
    while filled < bytes {
        let mut segment = writer.new_segment(SEGMENT_BYTES.max(chunk_bytes))?;
        while segment.remaining() >= chunk_bytes && filled < bytes {
            let key = ChunkKey {
                file: Arc::clone(&file),
                row_group: u32::try_from(chunks.len())?,
                column: 0,
            };
            chunks.push(segment.append(&key, 2, 1, &zeros).map(|at| (key, at))?);
            filled += chunk_bytes;
        }
        let sealed = segment.seal()?;
        let path = home.cache().join(format!("seg-{}", sealed.id));
        std::fs::set_permissions(&path, Permissions::from_mode(0o640))?;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let open = OpenOptions::new().write(true).open(&path)?;
        // Behind the header and before the footer, whole pages of zeros.
        let data = sealed.chunks.len() as u64 * chunk_bytes;
        let (from, to) = (4096, (64 + data) / 4096 * 4096);
        fallocate(&open, hole, from, i64::try_from(to)? - from)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o440))?;
    }
    let count = chunks.len();
    writer.publish(IndexContents {
        chunks,
        catalogs: vec![],
    })?;
    writer.hand_over(&Handover {
        in_order: true,
        ..left
    })?;
    Ok(count)
}

/// Runs over one cache.
#[derive(Default)]
struct Runs {
    walls: Vec<Duration>,
    cpu: Duration,
}

impl Runs {
    fn take_turn(&mut self, home: &Home, runs: u64) -> Result<()> {
        let before = cpu_of_children()?;
        for _ in 0..runs {
            self.walls.push(home.sql("select 1")?);
        }
        self.cpu += cpu_of_children()? - before;
        Ok(())
    }

    /// The median of the times, and the mean of the processor's.
    fn result(mut self) -> (Duration, Duration) {
        self.walls.sort_unstable();
        let count = self.walls.len();
        (self.walls[count / 2], self.cpu / count as u32)
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, usual: u64| -> Result<u64> {
        arguments
            .get(at)
            .map_or(Ok(usual), |text| Ok(text.parse()?))
    };
    let binary = arguments
        .first()
        .ok_or("usage: attach <path of stoa> [GiB] [chunk KiB] [runs]")?;
    let binary = Path::new(binary).canonicalize()?;
    let (gib, chunk_kib, runs) = (number(1, 64)?, number(2, 640)?, number(3, 30)?);
    let (empty, full) = (Home::new(&binary)?, Home::new(&binary)?);
    for home in [&empty, &full] {
        home.settle()?;
    }
    let chunks = fill(&full, gib << 30, chunk_kib << 10)?;
    // In turns, but several runs together: the processor's time is counted in ticks.
    let (mut of_empty, mut of_full) = (Runs::default(), Runs::default());
    for _ in 0..TURNS {
        of_empty.take_turn(&empty, runs.div_ceil(TURNS))?;
        of_full.take_turn(&full, runs.div_ceil(TURNS))?;
    }
    let (empty, full) = (of_empty.result(), of_full.result());
    let more = |full: Duration, empty: Duration| full.as_secs_f64() - empty.as_secs_f64();
    let (wall, cpu) = (more(full.0, empty.0), more(full.1, empty.1));
    println!("over nothing: {:?}, {:?} of a processor", empty.0, empty.1);
    println!(
        "over {gib} GiB in {chunks} chunks: {:?}, {:?} of a processor",
        full.0, full.1
    );
    println!("that is {:+.1} ms and {:+.1} ms", wall * 1e3, cpu * 1e3);
    Ok(wall <= WALL_MAX.as_secs_f64() && cpu <= CPU_MAX.as_secs_f64())
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("more than {WALL_MAX:?}, or {CPU_MAX:?} of a processor");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}
