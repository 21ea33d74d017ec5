//! Several processes of one user over one state and one cache, without etcd: one runs the cache, and
//! nobody needs to know which.

mod home;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use home::{Home, Running, json};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longer than any of these commands takes for its own work, on a machine that is busy.
const OWN_WORK: Duration = Duration::from_secs(40);

/// `stoa sql` at its prompt, fed through a pipe.
struct Prompt {
    child: Running,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Prompt {
    fn start(home: &Home) -> Prompt {
        Prompt::start_with(home, &[])
    }

    fn start_with(home: &Home, more: &[&str]) -> Prompt {
        let mut arguments = vec!["sql", "-q", "--format", "csv"];
        arguments.extend(more);
        let mut child = home
            .command(&arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let mut prompt = Prompt {
            child: Running(child),
            input,
            lines,
        };
        prompt.until("select 'started'", "started");
        prompt
    }

    fn say(&mut self, sql: &str) {
        writeln!(self.input, "{sql};").unwrap();
    }

    /// Runs a statement, and waits for a line of its answer.
    fn until(&mut self, sql: &str, expected: &str) {
        self.say(sql);
        let deadline = Instant::now() + OWN_WORK;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.trim() == expected => return,
                Ok(_) => {}
                Err(_) => panic!("{sql}: no line {expected:?} in {OWN_WORK:?}"),
            }
        }
    }

    fn signal(&mut self, signal: Signal) {
        signal_to(&mut self.child.0, signal);
    }

    fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.0.wait().unwrap();
    }
}

fn signal_to(child: &mut Child, signal: Signal) {
    assert!(child.try_wait().unwrap().is_none(), "it has ended before");
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Runs a command to its end: it succeeds, and takes no longer than its own work.
fn done(home: &Home, arguments: &[&str]) -> String {
    let started = Instant::now();
    let output = home.ok(arguments);
    assert!(started.elapsed() < OWN_WORK, "{arguments:?} waited");
    output
}

fn state_of(home: &Home, table: &str) -> String {
    let status = json(&done(home, &["status", "--json"]));
    let tables = status["tables"].as_array().unwrap();
    let found = tables.iter().find(|found| found["table"] == table);
    found.map_or("unknown".into(), |found| {
        found["state"].as_str().unwrap().into()
    })
}

fn wait_for_state(home: &Home, table: &str, expected: &str) {
    let deadline = Instant::now() + OWN_WORK;
    loop {
        let state = state_of(home, table);
        if state == expected {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{table} is {state}, not {expected}"
        );
        thread::sleep(Duration::from_millis(100));
    }
}

/// Two prompts, and a third process after the other that publishes, loads, unloads, pins and looks,
/// while the prompts create tables and query them; then the prompt that runs the cache is killed in
/// the middle, and later the other one too. Nobody is told "busy", nothing is lost, and nobody waits
/// for anything but its own work.
#[test]
fn everybody_works_at_once_and_goes_on_when_whoever_runs_the_cache_is_killed() {
    let home = Home::new();
    let tables: Vec<String> = (0..4)
        .map(|n| home.table(&format!("t{n}"), 5_000))
        .collect();
    let created = home.table("created", 5_000);
    let mut first = Prompt::start(&home);
    let mut second = Prompt::start(&home);

    let work = |from: usize| {
        for (number, location) in tables.iter().enumerate().skip(from).step_by(2) {
            let name = format!("third.t{number}");
            done(&home, &["layout", "create", &name, "--location", location]);
            done(&home, &["load", &name]);
            done(&home, &["layout", "list"]);
            done(&home, &["layout", "show", &name]);
            done(&home, &["layout", "explain", &name]);
            done(&home, &["pin"]);
            done(&home, &["unload", &name]);
            done(&home, &["unpin"]);
            let again = format!("{name}:2");
            done(
                &home,
                &["layout", "create", &again, "--location", location, "--load"],
            );
            done(&home, &["status"]);
        }
    };
    thread::scope(|scope| {
        let third = scope.spawn(|| work(0));
        let create = |name: &str| {
            format!("create external table {name} stored as stoa location '{created}'")
        };
        first.say(&create("one"));
        second.say(&create("two"));
        first.until("select count(*) from one", "5000");
        second.until("select count(*) from two", "5000");
        third.join().unwrap();
    });
    // What each prompt created is cached, by whichever runs the cache.
    wait_for_state(&home, "public.one", "loaded");
    wait_for_state(&home, "public.two", "loaded");

    thread::scope(|scope| {
        let third = scope.spawn(|| work(1));
        thread::sleep(Duration::from_millis(700));
        first.kill();
        second.until("select sum(n) from two", "12502500");
        third.join().unwrap();
    });
    for number in 0..tables.len() {
        wait_for_state(&home, &format!("third.t{number}"), "loaded");
    }
    wait_for_state(&home, "public.one", "loaded");
    let status = json(&done(&home, &["status", "--json"]));
    assert_eq!(status["problems"], json("[]"), "{status}");
    assert_eq!(status["workers"].as_array().unwrap().len(), 1, "{status}");

    second.kill();
    assert_eq!(state_of(&home, "third.t0"), "in memory");
    done(&home, &["load", "third.t0"]);
    assert!(done(&home, &["cache", "verify"]).contains("all as they were"));
}

/// Processes that load at once, with nobody there before them: each ends well, though each of them
/// may be the one that runs the cache and ends before the others are through.
#[test]
fn those_that_start_at_once_all_end_well() {
    let home = Home::new();
    let tables: Vec<String> = (0..4)
        .map(|n| home.table(&format!("t{n}"), 20_000))
        .collect();
    thread::scope(|scope| {
        for (number, location) in tables.iter().enumerate() {
            let home = &home;
            scope.spawn(move || {
                let name = format!("many.t{number}");
                done(
                    home,
                    &["layout", "create", &name, "--location", location, "--load"],
                );
            });
        }
    });
    for number in 0..tables.len() {
        assert_eq!(state_of(&home, &format!("many.t{number}")), "in memory");
    }
}

/// Whoever asked may go: what it asked for is done all the same, and the others' too.
#[test]
fn a_caller_that_is_interrupted_harms_nobodys_request() {
    let home = Home::new();
    let (one, two) = (home.table("one", 200_000), home.table("two", 200_000));
    let mut prompt = Prompt::start(&home);
    done(&home, &["layout", "create", "i.one", "--location", &one]);
    done(&home, &["layout", "create", "i.two", "--location", &two]);
    let load = |name: &str| Running(home.command(&["load", name]).spawn().unwrap());
    let (mut interrupted, mut other) = (load("i.one"), load("i.two"));
    // Either it has asked for its load by now, or it never does: both are fine for the other.
    thread::sleep(Duration::from_millis(300));
    let _ = kill(Pid::from_raw(interrupted.0.id() as i32), Signal::SIGINT);
    interrupted.0.wait().unwrap();
    assert_eq!(other.0.wait().unwrap().code(), Some(0));
    wait_for_state(&home, "i.two", "loaded");
    prompt.until("select count(*) from i.two", "200000");
    // Asked for again it is there, or loaded now.
    done(&home, &["load", "i.one"]);
}

/// The one that runs the cache is killed while it loads for itself and for another process: that one
/// takes over and ends well.
#[test]
fn a_load_goes_on_when_the_process_that_did_it_is_killed() {
    let home = Home::new();
    let (one, two) = (home.table("one", 300_000), home.table("two", 300_000));
    done(&home, &["layout", "create", "k.one", "--location", &one]);
    done(&home, &["layout", "create", "k.two", "--location", &two]);
    let mut runs = Running(home.command(&["load", "k.one"]).spawn().unwrap());
    thread::sleep(Duration::from_millis(100));
    let mut asks = Running(home.command(&["load", "k.two"]).spawn().unwrap());
    thread::sleep(Duration::from_millis(200));
    let _ = kill(Pid::from_raw(runs.0.id() as i32), Signal::SIGKILL);
    runs.0.wait().unwrap();
    let started = Instant::now();
    assert_eq!(asks.0.wait().unwrap().code(), Some(0));
    assert!(started.elapsed() < OWN_WORK);
    assert_eq!(state_of(&home, "k.two"), "in memory");
    done(&home, &["load", "k.one"]);
    assert!(done(&home, &["cache", "verify"]).contains("all as they were"));
}

/// A process that is stopped owns the state and answers nobody: it is named, and queries go on.
#[test]
fn an_owner_that_is_stopped_is_named_and_queries_go_on() {
    let home = Home::new();
    let table = home.table("t", 1_000);
    done(
        &home,
        &["layout", "create", "s.t", "--location", &table, "--load"],
    );
    let mut owner = Prompt::start(&home);
    owner.signal(Signal::SIGSTOP);
    let pid = owner.child.0.id();
    let load = home.refused(&["load", "s.t"], 3);
    assert!(
        load.contains(&format!("process {pid} owns the state")),
        "{load}"
    );
    let counted = home.stoa(&[
        "sql",
        "-q",
        "--format",
        "csv",
        "-c",
        "select count(*) from s.t",
    ]);
    assert_eq!(counted.code, 0, "{}", counted.stderr);
    assert!(counted.stdout.contains("\n1000"), "{}", counted.stdout);
    assert_eq!(
        counted.stderr.matches("WARN").count(),
        1,
        "{}",
        counted.stderr
    );
    let status = home.ok(&["status"]);
    assert!(
        status.contains(&format!("process {pid}")) && status.contains("s.t"),
        "{status}"
    );
    owner.signal(Signal::SIGCONT);
    done(&home, &["load", "s.t"]);
}

/// One state serves one cache: another directory is refused by name, not filled in its stead.
#[test]
fn a_state_is_not_mixed_with_another_cache() {
    let home = Home::new();
    let table = home.table("t", 1_000);
    let _owner = Prompt::start(&home);
    done(&home, &["layout", "create", "m.t", "--location", &table]);
    let elsewhere = home.shm.path().join("elsewhere");
    let set = format!("cache.location={}", elsewhere.display());
    let refused = home.refused(&["load", "m.t", "--set", &set], 5);
    let ours = home.shm.path().join("cache");
    for path in [&elsewhere, &ours] {
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
    }
    // A cache that is run with another state is not filled with this one's tables either.
    let other = home.directory.path().join("other-state");
    let set = format!("state.location={}", other.display());
    home.ok(&[
        "layout",
        "create",
        "m.t",
        "--location",
        &table,
        "--set",
        &set,
    ]);
    let refused = home.refused(&["load", "m.t", "--set", &set], 5);
    assert!(refused.contains("is in use by process"), "{refused}");
    let _ = stoa_shm::AccessCounters::remove(&elsewhere);
}

/// Where state or cache cannot be written, queries start all the same: one warning says why nothing
/// is cached and what to set.
#[test]
fn queries_start_where_nothing_can_be_written() {
    let home = Home::new();
    let table = home.table("t", 1_000);
    done(
        &home,
        &["layout", "create", "w.t", "--location", &table, "--load"],
    );
    let count = [
        "sql",
        "-q",
        "--format",
        "csv",
        "-c",
        "select count(*) from w.t",
    ];
    let warned = |set: &str, says: &str| {
        let mut arguments = count.to_vec();
        arguments.extend(["--set", set]);
        let ran = home.stoa(&arguments);
        assert_eq!(ran.code, 0, "{set}: {}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("\n1000"), "{set}: {}", ran.stdout);
        assert_eq!(
            ran.stderr.matches("WARN").count(),
            1,
            "{set}: {}",
            ran.stderr
        );
        assert!(ran.stderr.contains(says), "{set}: {}", ran.stderr);
        assert!(
            !ran.stderr.contains("move it away"),
            "{set}: {}",
            ran.stderr
        );
    };
    // A state that cannot be made: what lies in the cache is read.
    let file = home.directory.path().join("a file");
    std::fs::write(&file, "").unwrap();
    let state = format!("state.location={}/state", file.display());
    warned(&state, "set state.location (or XDG_STATE_HOME)");
    let status = home.ok(&["status", "--set", &state]);
    assert!(
        status.contains("state.location") && status.contains("w.t"),
        "{status}"
    );
    // A cache that cannot be made, or lies on a disk: what the state names is read from the origin.
    let nowhere = format!("cache.location={}/cache", file.display());
    warned(&nowhere, "cannot open cache directory");
    let disk = format!(
        "cache.location={}",
        home.directory.path().join("disk").display()
    );
    warned(&disk, "expected tmpfs");
    // A disk that takes no more: what is half made there does not stand in the way afterwards.
    let fresh = Home::new();
    let ran = fresh.cramped(&["sql", "-q", "-c", "select 1"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("WARN").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("metastore file"), "{}", ran.stderr);
    assert_eq!(json(&fresh.ok(&["layout", "list", "--json"])), json("[]"));
}

/// What goes wrong in the process that runs the cache is in everybody's `stoa status`, is told to
/// who waits for it, and is no line in the log of commands that have nothing to do with it.
#[test]
fn what_goes_wrong_is_told_to_whom_it_concerns() {
    let home = Home::new();
    let (cut, gone) = (home.table("cut", 1_000), home.table("gone", 1_000));
    for (name, location) in [("p.cut", &cut), ("p.gone", &gone)] {
        done(&home, &["layout", "create", name, "--location", location]);
    }
    let prompt = Prompt::start_with(&home, &["--set", "cache.freshness=500ms"]);
    done(&home, &["load", "p.cut"]);
    let file = std::path::Path::new(&cut).join("0.parquet");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..100]).unwrap();
    std::fs::remove_dir_all(&gone).unwrap();

    let refused = home.refused(&["load", "p.gone", "--timeout", "10s"], 4);
    assert!(refused.contains("no data files at"), "{refused}");
    let deadline = Instant::now() + OWN_WORK;
    loop {
        let status = json(&done(&home, &["status", "--json"]));
        let problems = status["problems"].to_string();
        if problems.contains("0.parquet") && problems.contains("p.gone:1 cannot be planned: ") {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
        thread::sleep(Duration::from_millis(200));
    }
    let silent = |home: &Home| {
        let ran = home.stoa(&["sql", "-q", "-c", "select 1"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    };
    silent(&home);
    // Nor where the command runs the cache itself.
    prompt.kill();
    silent(&home);
}
