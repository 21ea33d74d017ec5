//! The conductor: starts the processes, kills them at random, and judges.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter};

use crate::content::{Random, wrong_bytes};
use crate::report::Line;

/// Readers beside the writer.
const READERS: usize = 4;
/// A process that says nothing for so long hangs.
const HANGS_AFTER: Duration = Duration::from_secs(20);
/// Memory that the cache may take.
pub const BUDGET_BYTES: u64 = 32 << 20;
/// What one step of the writer may take beyond the budget before it looks again.
const SLACK_BYTES: u64 = 4 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct Run {
    /// This program.
    pub program: PathBuf,
    /// For how long.
    pub duration: Duration,
    /// Replays the choice of victims and the work of the processes, though not their timing.
    pub seed: u64,
    /// A deliberate mistake of the writer; the run ends at the first wrong byte.
    pub mutant: Option<String>,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Generations published.
    pub publications: u64,
    /// Chunks read.
    pub reads: u64,
    /// Bytes compared by readers.
    pub checked_bytes: u64,
    /// Bytes that were not what their key says.
    pub wrong_bytes: u64,
    /// Processes that hung.
    pub hung: u64,
    /// Writers killed.
    pub writer_kills: u64,
    /// Readers killed.
    pub reader_kills: u64,
    /// Readers stopped for a while.
    pub stops: u64,
    /// Most memory seen in the directory.
    pub largest_bytes: u64,
    /// Memory in the end, with nobody reading.
    pub final_bytes: u64,
    /// Of it, still retained.
    pub final_retained_bytes: u64,
    /// The first few violations, wrong bytes included.
    pub violations: Vec<String>,
}

impl Outcome {
    /// Whether everything held.
    pub fn holds(&self) -> bool {
        self.violations.is_empty() && self.wrong_bytes == 0 && self.hung == 0
    }

    fn violation(&mut self, what: String) {
        const KEPT: usize = 20;
        if self.violations.len() < KEPT {
            self.violations.push(what);
        }
    }

    /// One line for people and scripts.
    pub fn summary(&self) -> String {
        format!(
            "publications {} reads {} checked_bytes {} wrong_bytes {} hung {} writer_kills {} reader_kills {} stops {} \
             largest_bytes {} final_bytes {} final_retained_bytes {} violations {}",
            self.publications,
            self.reads,
            self.checked_bytes,
            self.wrong_bytes,
            self.hung,
            self.writer_kills,
            self.reader_kills,
            self.stops,
            self.largest_bytes,
            self.final_bytes,
            self.final_retained_bytes,
            self.violations.len()
        )
    }
}

/// A process of the harness; place 0 is the writer.
struct Process {
    child: Child,
    /// Dropped to ask it to end.
    stdin: Option<ChildStdin>,
    started: u64,
    last_line: Instant,
    stopped_until: Option<Instant>,
}

/// Who said a line: place and start number.
type Said = (usize, u64, Line);

struct Conductor {
    run: Run,
    dir: PathBuf,
    random: Random,
    lines: (Sender<Said>, Receiver<Said>),
    starts: u64,
    outcome: Outcome,
}

/// Runs the harness in a directory of its own, which is removed afterwards.
pub fn run(run: Run) -> std::io::Result<Outcome> {
    let dir = tempfile::Builder::new()
        .prefix("stoa-harness-")
        .tempdir_in("/dev/shm")?;
    let mut conductor = Conductor {
        random: Random(run.seed),
        run,
        dir: dir.path().to_path_buf(),
        lines: channel(),
        starts: 0,
        outcome: Outcome::default(),
    };
    let mut processes = Vec::new();
    for place in 0..=READERS {
        processes.push(conductor.start(place)?);
    }
    conductor.torment(&mut processes)?;
    conductor.end(&mut processes)?;
    conductor.judge_memory();
    Ok(conductor.outcome)
}

impl Conductor {
    fn start(&mut self, place: usize) -> std::io::Result<Process> {
        self.starts += 1;
        let started = self.starts;
        let mut command = Command::new(&self.run.program);
        command
            .arg(if place == 0 { "writer" } else { "reader" })
            .arg("--dir")
            .arg(&self.dir)
            .args(["--seed", &self.random.number().to_string()])
            .args(["--budget", &BUDGET_BYTES.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(mutant) = &self.run.mutant {
            command.env("STOA_SHM_MUTANT", mutant);
        }
        let mut child = command.spawn()?;
        if let Some(out) = child.stdout.take() {
            let sender = self.lines.0.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    if sender.send((place, started, Line::parse(&line))).is_err() {
                        return;
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Ok(Process {
            child,
            stdin,
            started,
            last_line: Instant::now(),
            stopped_until: None,
        })
    }

    fn torment(&mut self, processes: &mut [Process]) -> std::io::Result<()> {
        let end = Instant::now() + self.run.duration;
        let mut next_action = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            if self.run.mutant.is_some() && self.outcome.wrong_bytes > 0 {
                break;
            }
            self.listen(processes, Duration::from_millis(10));
            self.look(processes)?;
            if Instant::now() < next_action {
                continue;
            }
            next_action = Instant::now() + Duration::from_millis(50 + self.random.below(500));
            let reader = 1 + self.random.below(READERS as u64) as usize;
            match self.random.below(10) {
                0..=3 => {
                    self.kill_and_restart(processes, 0)?;
                    self.outcome.writer_kills += 1;
                }
                4..=7 => {
                    self.kill_and_restart(processes, reader)?;
                    self.outcome.reader_kills += 1;
                }
                _ if processes[reader].stopped_until.is_none() => {
                    signal(&processes[reader].child, Signal::SIGSTOP);
                    let pause = Duration::from_millis(200 + self.random.below(1500));
                    processes[reader].stopped_until = Some(Instant::now() + pause);
                    self.outcome.stops += 1;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn kill_and_restart(&mut self, processes: &mut [Process], place: usize) -> std::io::Result<()> {
        processes[place].child.kill()?;
        let status = processes[place].child.wait()?;
        self.judge_end(place, status, true);
        processes[place] = self.start(place)?;
        Ok(())
    }

    /// Takes in what the processes say.
    fn listen(&mut self, processes: &mut [Process], wait: Duration) {
        let until = Instant::now() + wait;
        while let Ok((place, started, line)) = self
            .lines
            .1
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if let Some(process) = processes.get_mut(place)
                && process.started == started
            {
                process.last_line = Instant::now();
            }
            self.take(place, line);
        }
    }

    fn take(&mut self, place: usize, line: Line) {
        match line {
            Line::Beat { work, .. } if place == 0 => self.outcome.publications += work,
            Line::Beat { work, bytes } => {
                self.outcome.reads += work;
                self.outcome.checked_bytes += bytes;
            }
            Line::Wrong { bytes, what } => {
                self.outcome.wrong_bytes += bytes;
                self.outcome
                    .violation(format!("{}: {bytes} wrong bytes {what}", role(place)));
            }
            Line::Violation(what) => self.outcome.violation(format!("{}: {what}", role(place))),
        }
    }

    /// Looks for processes that ended or hang, and at the memory.
    fn look(&mut self, processes: &mut [Process]) -> std::io::Result<()> {
        for place in 0..processes.len() {
            let process = &mut processes[place];
            if process
                .stopped_until
                .is_some_and(|until| Instant::now() >= until)
            {
                signal(&process.child, Signal::SIGCONT);
                process.stopped_until = None;
                process.last_line = Instant::now();
            }
            if let Some(status) = process.child.try_wait()? {
                self.judge_end(place, status, false);
                self.outcome
                    .violation(format!("{} ended by itself: {status}", role(place)));
                processes[place] = self.start(place)?;
            } else if process.stopped_until.is_none() && process.last_line.elapsed() > HANGS_AFTER {
                self.outcome.hung += 1;
                self.outcome.violation(format!("{} hangs", role(place)));
                self.kill_and_restart(processes, place)?;
            }
        }
        let bytes = memory_of(&self.dir);
        self.outcome.largest_bytes = self.outcome.largest_bytes.max(bytes);
        if bytes > BUDGET_BYTES + SLACK_BYTES {
            self.outcome.violation(format!(
                "{bytes} bytes of memory, the budget is {BUDGET_BYTES}"
            ));
        }
        Ok(())
    }

    fn judge_end(&mut self, place: usize, status: ExitStatus, killed: bool) {
        let expected =
            status.success() || killed && status.signal() == Some(Signal::SIGKILL as i32);
        if !expected {
            self.outcome
                .violation(format!("{} ended with {status}", role(place)));
        }
    }

    /// Asks all processes to end, and waits for them.
    fn end(&mut self, processes: &mut [Process]) -> std::io::Result<()> {
        for process in processes.iter_mut() {
            signal(&process.child, Signal::SIGCONT);
            process.stdin = None;
        }
        let until = Instant::now() + HANGS_AFTER;
        for (place, process) in processes.iter_mut().enumerate() {
            let status = loop {
                match process.child.try_wait()? {
                    Some(status) => break status,
                    None if Instant::now() > until => {
                        self.outcome.hung += 1;
                        self.outcome
                            .violation(format!("{} does not end", role(place)));
                        process.child.kill()?;
                        break process.child.wait()?;
                    }
                    None => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            self.judge_end(place, status, false);
        }
        self.listen(processes, Duration::from_millis(200));
        if self.outcome.publications == 0 || self.outcome.reads == 0 {
            self.outcome
                .violation("nothing was published or nothing was read".to_string());
        }
        Ok(())
    }

    /// With all processes gone memory must be back within the budget, and every byte right.
    fn judge_memory(&mut self) {
        let opened =
            CacheDir::open(&self.dir, CacheDirOptions::default()).and_then(CacheWriter::open);
        let (mut writer, recovery) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                return self
                    .outcome
                    .violation(format!("cannot open the cache in the end: {error}"));
            }
        };
        for dropped in &recovery.dropped {
            self.outcome
                .violation(format!("in the end, {}: {}", dropped.what, dropped.reason));
        }
        for (key, location) in &recovery.chunks {
            match writer.read(location) {
                Ok(bytes) => {
                    let wrong = wrong_bytes(key, &bytes);
                    if wrong > 0 {
                        self.take(
                            0,
                            Line::Wrong {
                                bytes: wrong as u64,
                                what: format!("in the end in {}", key.readable()),
                            },
                        );
                    }
                }
                Err(miss) => self
                    .outcome
                    .violation(format!("in the end, {}: {miss}", key.readable())),
            }
        }
        writer.discard_unpublished();
        match writer.reclaim() {
            Ok(report) => {
                self.outcome.final_bytes = memory_of(&self.dir);
                self.outcome.final_retained_bytes = report.retained_bytes;
                if report.retained_bytes > 0 || self.outcome.final_bytes > BUDGET_BYTES {
                    self.outcome
                        .violation(format!("memory did not come back: {report:?}"));
                }
            }
            Err(error) => self
                .outcome
                .violation(format!("cannot reclaim in the end: {error}")),
        }
    }
}

fn role(place: usize) -> String {
    if place == 0 {
        "writer".to_string()
    } else {
        format!("reader {place}")
    }
}

fn signal(child: &Child, signal: Signal) {
    // It may have ended meanwhile, which `look` notices.
    let _ = kill(Pid::from_raw(child.id() as i32), signal);
}

/// Memory of all files in a directory.
fn memory_of(dir: &Path) -> u64 {
    let Ok(files) = std::fs::read_dir(dir) else {
        return 0;
    };
    files
        .filter_map(|file| Some(file.ok()?.metadata().ok()?.blocks() * 512))
        .sum()
}
