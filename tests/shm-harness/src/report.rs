//! What the processes tell the conductor: lines on standard output.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a process says that it is alive.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// A line of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Alive; so many units of work since the last line.
    Beat {
        /// Generations published or chunks read.
        work: u64,
        /// Bytes checked.
        bytes: u64,
    },
    /// Wrong bytes were seen.
    Wrong {
        /// How many.
        bytes: u64,
        /// Where.
        what: String,
    },
    /// Something else that must not be.
    Violation(String),
}

impl Line {
    /// Reads a line; anything else that a process prints is a violation, such as a panic's message.
    pub fn parse(line: &str) -> Line {
        let mut words = line.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("beat"), Some(work), Some(bytes)) => Line::Beat {
                work: work.parse().unwrap_or(0),
                bytes: bytes.parse().unwrap_or(0),
            },
            (Some("wrong"), Some(bytes), Some(what)) => Line::Wrong {
                bytes: bytes.parse().unwrap_or(1),
                what: what.to_string(),
            },
            _ => Line::Violation(line.strip_prefix("violation ").unwrap_or(line).to_string()),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Beat { work, bytes } => write!(f, "beat {work} {bytes}"),
            Line::Wrong { bytes, what } => write!(f, "wrong {bytes} {what}"),
            Line::Violation(what) => write!(f, "violation {what}"),
        }
    }
}

/// Sends lines, and beats at an even pace.
#[derive(Debug)]
pub struct Reporter {
    work: u64,
    bytes: u64,
    last: Instant,
    stopped: Arc<AtomicBool>,
}

impl Reporter {
    /// Begins to report, and to watch standard input: when it ends, so should the process.
    pub fn start() -> Reporter {
        let stopped = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&stopped);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            watched.store(true, Ordering::Relaxed);
        });
        Reporter {
            work: 0,
            bytes: 0,
            last: Instant::now(),
            stopped,
        }
    }

    /// Whether the process should end.
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Counts work and bytes, and beats if it is time to.
    pub fn beat(&mut self, work: u64, bytes: u64) {
        self.work += work;
        self.bytes += bytes;
        if self.last.elapsed() >= BEAT_EVERY {
            self.flush();
        }
    }

    /// Beats now.
    pub fn flush(&mut self) {
        self.send(&Line::Beat {
            work: self.work,
            bytes: self.bytes,
        });
        (self.work, self.bytes, self.last) = (0, 0, Instant::now());
    }

    /// Sends a line.
    pub fn send(&self, line: &Line) {
        let mut out = std::io::stdout().lock();
        // The conductor is gone if this fails, and standard input has ended too.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Reports wrong bytes, if there are any.
    pub fn check(&self, wrong: usize, what: impl FnOnce() -> String) {
        if wrong > 0 {
            self.send(&Line::Wrong {
                bytes: wrong as u64,
                what: what(),
            });
        }
    }

    /// Reports something that must not be.
    pub fn violation(&self, what: impl fmt::Display) {
        self.send(&Line::Violation(what.to_string()));
    }
}
