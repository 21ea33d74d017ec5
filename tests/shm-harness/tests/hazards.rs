//! Hazards of shared memory with real processes. `--features mutants` adds deaths at every step of
//! the writer, and the deliberate mistakes that the harness must catch.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stoa_shm::CacheReader;
use stoa_tests_shm::conductor::{BUDGET_BYTES, Outcome, Run, run};
use stoa_tests_shm::writer::Worker;

fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_shm-harness"))
}

fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("stoa-hazards-")
        .tempdir_in("/dev/shm")
        .unwrap()
}

fn harness(seconds: u64, seed: u64, mutant: Option<&str>) -> Outcome {
    let duration = Duration::from_secs(seconds);
    let outcome = run(Run {
        program: program(),
        duration,
        seed,
        mutant: mutant.map(str::to_string),
    })
    .unwrap();
    println!("seed {seed} {mutant:?} {}", outcome.summary());
    outcome
}

/// A process that holds what it read, until it is told to end.
struct Holder {
    child: Child,
    out: Lines<BufReader<ChildStdout>>,
}

impl Holder {
    fn start(role: &str, dir: &Path) -> Holder {
        let mut child = Command::new(program())
            .args([role, "--dir"])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = out.next().unwrap().unwrap();
        assert!(
            first.starts_with("holding ") && first != "holding 0",
            "{first}"
        );
        Holder { child, out }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends it and returns its last word.
    fn end(mut self) -> String {
        drop(self.child.stdin.take());
        let last = self.out.next().unwrap().unwrap();
        self.child.wait().unwrap();
        last
    }
}

/// A cache with something in it.
fn filled(dir: &Path) -> Worker {
    let (mut worker, _, _) = Worker::open(dir, 7, BUDGET_BYTES).unwrap();
    worker.replace().unwrap();
    worker
}

fn count(snapshot: &stoa_shm::Snapshot) -> String {
    format!("intact {}", snapshot.chunk_count())
}

#[test]
fn a_writer_that_never_pauses_and_readers_that_die() {
    let outcome = harness(10, 1, None);
    assert!(outcome.holds(), "{:#?}", outcome.violations);
    assert!(outcome.writer_kills > 0 && outcome.reader_kills > 0 && outcome.stops > 0);
    assert_eq!(outcome.final_retained_bytes, 0);
}

/// A reader stopped for ten generations costs memory, which is seen, and its bytes stay.
#[test]
fn a_stopped_reader_keeps_its_bytes_over_ten_generations() {
    let scratch = scratch();
    let mut worker = filled(scratch.path());
    let expected = count(&CacheReader::open(scratch.path()).snapshot());
    let holder = Holder::start("hold", scratch.path());
    holder.signal(Signal::SIGSTOP);
    // Ten generations at least, and until something that it holds is not published any more.
    let mut generations = 0;
    while generations < 10 || worker.writer().reclaim().unwrap().retained_segments == 0 {
        worker.replace().unwrap();
        worker.writer().reclaim().unwrap();
        generations += 1;
    }
    holder.signal(Signal::SIGCONT);
    assert_eq!(holder.end(), expected);
    let report = worker.writer().reclaim().unwrap();
    assert_eq!((report.retained_segments, report.retained_bytes), (0, 0));
}

#[test]
fn a_killed_reader_gives_its_memory_back() {
    let scratch = scratch();
    let mut worker = filled(scratch.path());
    let mut holder = Holder::start("hold", scratch.path());
    while worker.writer().reclaim().unwrap().retained_segments == 0 {
        worker.replace().unwrap();
    }
    holder.signal(Signal::SIGKILL);
    holder.child.wait().unwrap();
    assert_eq!(worker.writer().reclaim().unwrap().retained_bytes, 0);
}

/// The parent opens and maps, forks, and dies; the child inherits the mapping and its lock.
#[test]
fn a_forked_child_keeps_what_its_dead_parent_mapped() {
    let scratch = scratch();
    let mut worker = filled(scratch.path());
    let expected = count(&CacheReader::open(scratch.path()).snapshot());
    let mut holder = Holder::start("hold-forked", scratch.path());
    // Waiting would close it, and so tell the child to end.
    let stdin = holder.child.stdin.take();
    assert!(
        holder.child.wait().unwrap().success(),
        "the parent has exited"
    );
    let mut generations = 0;
    while generations < 10 || worker.writer().reclaim().unwrap().retained_segments == 0 {
        worker.replace().unwrap();
        generations += 1;
    }
    drop(stdin);
    let last = holder.out.next().unwrap().unwrap();
    assert_eq!(last, expected);
    // The child may need a moment to be gone after its last word.
    for _ in 0..500 {
        if worker.writer().reclaim().unwrap().retained_bytes == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("memory did not come back: {:?}", worker.writer().memory());
}

#[test]
fn a_second_worker_exits_with_a_clear_error() {
    let scratch = scratch();
    let worker = filled(scratch.path());
    let second = Command::new(program())
        .args(["writer", "--dir"])
        .arg(scratch.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8(second.stdout).unwrap();
    let expected = format!(
        "is in use by process {}: one directory has one worker",
        std::process::id()
    );
    assert!(text.contains(&expected), "{text}");
    drop(worker);
}

/// The program itself: exit codes and the summary, as a script sees them.
#[test]
fn the_program_reports_its_verdict() {
    let done = Command::new(program())
        .args(["run", "--seconds", "2", "--seed", "9"])
        .output()
        .unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{text}");
    assert!(text.contains(" wrong_bytes 0 hung 0 "), "{text}");
    let refused = Command::new(program())
        .args(["run", "--second", "2"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .starts_with("--second is unknown\nusage: ")
    );
}

#[cfg(feature = "mutants")]
mod mutants {
    use std::os::unix::process::ExitStatusExt;

    use stoa_shm::ChunkKey;
    use stoa_tests_shm::content::wrong_bytes;

    use super::*;

    /// Everything that a reader finds is right.
    fn check_all(dir: &Path) {
        let snapshot = CacheReader::open(dir).snapshot();
        for (file, entry) in snapshot.iter() {
            let key = ChunkKey {
                file: file.into(),
                row_group: entry.row_group(),
                column: entry.column(),
            };
            assert_eq!(
                wrong_bytes(&key, &snapshot.open_chunk(&entry).unwrap()),
                0,
                "{}",
                key.readable()
            );
        }
    }

    fn is_caught(mutant: &str) {
        let outcome = harness(60, 1, Some(mutant));
        assert!(outcome.wrong_bytes > 0, "{mutant} was not caught");
    }

    #[test]
    fn writing_in_place_is_caught() {
        is_caught("in-place-write");
    }

    #[test]
    fn publishing_before_sealing_is_caught() {
        is_caught("publish-before-seal");
    }

    #[test]
    fn reusing_a_segment_name_is_caught() {
        is_caught("reused-segment-name");
    }

    /// A writer killed at each of its steps leaves the old index or the new one, no wrong byte, and
    /// nothing that the next writer cannot go on from.
    #[test]
    fn a_death_at_every_step_is_survived() {
        let steps = [
            "SegmentAllocated",
            "ChunkWritten",
            "SegmentWritten",
            "SegmentSealed",
            "IndexWritten",
            "IndexPublished",
            "SegmentRetired",
        ];
        for (step, times) in steps.into_iter().flat_map(|step| [(step, 1), (step, 7)]) {
            let scratch = scratch();
            let reader = CacheReader::open(scratch.path());
            let mut writer = Command::new(program())
                .args(["writer", "--dir"])
                .arg(scratch.path())
                .env("STOA_SHM_KILL_AT", format!("{step}:{times}"))
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let stdin = writer.stdin.take();
            let status = writer.wait().unwrap();
            drop(stdin);
            assert_eq!(
                status.signal(),
                Some(Signal::SIGKILL as i32),
                "{step}:{times}: {status}"
            );

            let before = reader.snapshot().generation();
            check_all(scratch.path());
            let (mut worker, recovery, problems) =
                Worker::open(scratch.path(), 5, BUDGET_BYTES).unwrap();
            assert!(
                problems.is_empty() && recovery.dropped.is_empty(),
                "{step}:{times}: {problems:?} {recovery:?}"
            );
            // The first segment has a catalog only, which is not adopted.
            if (step, times) == ("SegmentSealed", 7) {
                assert!(
                    !recovery.adopted.is_empty(),
                    "{step}:{times}: what was sealed is kept"
                );
            }
            assert_eq!(worker.writer().generation(), before, "{step}:{times}");
            worker.republish().unwrap();
            worker.replace().unwrap();
            worker.writer().discard_unpublished();
            reader.snapshot();
            let report = worker.writer().reclaim().unwrap();
            assert_eq!(
                (report.retained_bytes, report.unpublished_bytes),
                (0, 0),
                "{step}:{times}: {report:?}"
            );
            assert_eq!(reader.snapshot().generation(), before + 2);
            check_all(scratch.path());
        }
    }
}
