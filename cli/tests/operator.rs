//! What an operator meets: memory that is too small, directories that vanish, tables that cannot be
//! loaded, that have no rows, or that should go.

mod home;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};

use home::{Home, Running, json};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes a table of one column of numbers without any pattern.
fn table(directory: &Path, files: usize, groups: usize, rows: usize) {
    std::fs::create_dir_all(directory).unwrap();
    for file in 0..files {
        let mut state = 0x9e37_79b9_7f4a_7c15u64 ^ file as u64;
        let numbers = Int64Array::from_iter_values((0..groups * rows).map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 1) as i64
        }));
        let batch = RecordBatch::try_from_iter([("n", Arc::new(numbers) as ArrayRef)]).unwrap();
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(rows.max(1)))
            .set_compression(Compression::SNAPPY)
            .build();
        let out = File::create(directory.join(format!("{file}.parquet"))).unwrap();
        let mut writer = ArrowWriter::try_new(out, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

fn count(home: &Home, table: &str) -> i64 {
    let sql = format!("select count(*) as n from {table}");
    let rows = home.ok(&["sql", "-q", "--format", "json", "-c", &sql]);
    json(&rows)[0]["n"].as_i64().unwrap()
}

/// The line of a table in `stoa status`.
fn line(home: &Home, table: &str) -> Option<serde_json::Value> {
    let status = json(&home.ok(&["status", "--json"]));
    let tables = status["tables"].as_array().unwrap().clone();
    tables.into_iter().find(|line| line["table"] == table)
}

/// A small tmpfs of its own.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(bytes: u64) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={bytes},mode=0700");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "stoa-test"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success(), "this test needs root");
        Mounted(dir)
    }

    fn cache(&self) -> PathBuf {
        self.0.path().join("cache")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = stoa_shm::AccessCounters::remove(self.cache());
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
    }
}

/// A budget above what the file system has costs nothing of what it has, and the advice is not to
/// raise it further.
#[test]
#[ignore = "needs root: mounts a tmpfs"]
fn mounted_what_fits_a_small_tmpfs_is_loaded_whatever_cache_size_says() {
    let home = Home::new();
    let (small, large) = (
        home.directory.path().join("small"),
        home.directory.path().join("large"),
    );
    table(&small, 3, 8, 3_000);
    table(&large, 13, 2, 1 << 17);
    let load = |name: &str, data: &Path, tmpfs: &Mounted| {
        let location = format!("cache.location={}", tmpfs.cache().display());
        let create = ["layout", "create", name, "--form", "arrow", "--load"];
        let place = ["--location", data.to_str().unwrap()];
        let set = ["--set", &location, "--set", "cache.size=1GiB"];
        let ran = home.stoa(&[&create[..], &place, &set].concat());
        let status = json(&home.ok(&[&["status", "--json"][..], &set].concat()));
        let memory = status["memory"]["tables"].as_array().unwrap().clone();
        let held = memory.iter().find(|table| table["table"] == name).cloned();
        (ran, held.unwrap_or_default())
    };
    let (whole, held) = load("s.small", &small, &Mounted::new(64 << 20));
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    assert_eq!(held["chunks"], 24, "{held}");

    // 26 chunks of 1 MiB into 6 MiB.
    let (part, held) = load("s.large", &large, &Mounted::new(6 << 20));
    assert_eq!(part.code, 6, "{}", part.stderr);
    assert!(
        held["bytes"].as_u64().unwrap() >= 5 << 20,
        "{held}: {}",
        part.stderr
    );
    let said = "the file system's size of 6291456 bytes leaves only";
    assert!(part.stderr.contains(said), "{}", part.stderr);
    assert!(
        !part.stderr.contains("no room: raise cache.size"),
        "{}",
        part.stderr
    );
}

/// Cleaners of temporary files and logouts remove what lies in /dev/shm under a worker that runs.
#[test]
fn a_worker_makes_a_lost_index_or_directory_anew() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 2, 3, 1_000);
    let data = data.to_str().unwrap();
    home.ok(&["layout", "create", "s.t", "--location", data, "--load"]);
    let log = home.directory.path().join("worker.log");
    let mut worker = home.command(&["worker"]);
    worker.stderr(File::create(&log).unwrap());
    let _worker = Running(worker.spawn().unwrap());
    let cache = home.shm.path().join("cache");
    let log = || std::fs::read_to_string(&log).unwrap();
    let cached = || {
        let sql = "select cached_chunks as n from stoa_tables()";
        let rows = home.ok(&["sql", "-q", "--format", "json", "-c", sql]);
        let rows = (!rows.trim().is_empty()).then(|| json(&rows));
        rows.and_then(|rows| rows[0]["n"].as_i64())
    };
    let whole = |after: &str| {
        let deadline = Instant::now() + PATIENCE;
        while cached() != Some(6) {
            assert!(
                Instant::now() < deadline,
                "{after}: {:?}\n{}",
                cached(),
                log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(count(&home, "s.t"), 6_000, "{after}");
        assert!(home.ok(&["cache", "verify"]).contains("all as they were"));
    };
    whole("at first");
    let started = Instant::now();
    // It may have stood by until the last command had ended.
    while !["worker runs", "this one runs it now"]
        .iter()
        .any(|text| log().contains(text))
    {
        assert!(started.elapsed() < PATIENCE, "{}", log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // Before it has noticed, another process of this machine may take what is there for its own.
    let notices = |text: &str, times: usize| {
        let started = Instant::now();
        while log().matches(text).count() < times {
            assert!(started.elapsed() < PATIENCE, "{text}: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let index = "index is gone: the index is published anew";
    let directory = "cache is gone: it is made anew";
    std::fs::remove_file(cache.join("index")).unwrap();
    notices(index, 1);
    whole("without an index");
    std::fs::remove_dir_all(&cache).unwrap();
    notices(directory, 1);
    whole("without a directory");
    for entry in std::fs::read_dir(&cache).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("lock") {
            // The worker may be at it already.
            let _ = std::fs::remove_file(path);
        }
    }
    notices(index, 2);
    whole("without anything in it");
    // Each is said once, and then there is peace.
    let said = log();
    let times = |text: &str| said.matches(text).count();
    assert!((2..=3).contains(&times(index)), "{said}");
    assert_eq!(times(directory), 1, "{said}");
    assert_eq!(times("cannot be written"), 0, "{said}");
}

/// A session that knew the table goes on from the origin, whatever became of the cache.
#[test]
fn a_session_whose_cache_vanishes_goes_on_from_the_origin() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 1, 2, 1_000);
    let cache = home.shm.path().join("cache");
    home.ok(&[
        "layout",
        "create",
        "s.t",
        "--location",
        data.to_str().unwrap(),
        "--load",
    ]);
    // Somebody else has the state, and nobody is left to make the cache anew.
    let script = home.directory.path().join("script.sql");
    let pipe = nix::unistd::mkfifo(&script, nix::sys::stat::Mode::S_IRWXU);
    pipe.unwrap();
    let out = home.directory.path().join("out");
    let mut sql = home.command(&[
        "sql",
        "-q",
        "--format",
        "csv",
        "-f",
        script.to_str().unwrap(),
    ]);
    sql.env("STOA_ETCD__HOSTS", "127.0.0.1:1")
        .stdout(File::create(&out).unwrap());
    let mut sql = Running(sql.spawn().unwrap());
    let mut statements = File::options().write(true).open(&script).unwrap();
    let select = "select count(*) as n, sum(n % 7) > 0 from s.t;\n";
    std::io::Write::write_all(&mut statements, select.as_bytes()).unwrap();
    let answers = || {
        std::fs::read_to_string(&out)
            .unwrap()
            .matches("2000,true")
            .count()
    };
    let started = Instant::now();
    while answers() < 1 {
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(50));
    }
    std::fs::remove_dir_all(&cache).unwrap();
    std::io::Write::write_all(&mut statements, select.as_bytes()).unwrap();
    drop(statements);
    assert!(sql.0.wait().unwrap().success());
    assert_eq!(answers(), 2);
}

/// What was refused is refused again at once, with its reason, until it is put right.
#[test]
fn a_version_that_was_refused_is_tried_again_and_refused_at_once() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 1, 1, 100);
    home.ok(&[
        "layout",
        "create",
        "s.t",
        "--location",
        data.to_str().unwrap(),
    ]);
    let file = data.join("0.parquet");
    let aside = home.directory.path().join("aside");
    std::fs::rename(&file, &aside).unwrap();
    for _ in 0..2 {
        let started = Instant::now();
        let refused = home.refused(&["load", "s.t", "--timeout", "50s"], 4);
        assert!(refused.contains("s.t:1 was refused: "), "{refused}");
        assert!(refused.contains("no data files at"), "{refused}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }
    std::fs::rename(&aside, &file).unwrap();
    home.ok(&["load", "s.t"]);
    assert_eq!(line(&home, "s.t").unwrap()["state"], "in memory");
}

/// A table without rows is loaded when nothing of it is: there is nothing.
#[test]
fn a_table_without_rows_is_loaded() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 2, 1, 0);
    let data = data.to_str().unwrap();
    let created = home.stoa(&["layout", "create", "z.zero", "--location", data, "--load"]);
    assert_eq!(created.code, 0, "{}", created.stderr);
    assert!(
        created.stderr.contains("z.zero:1 is loaded: 0 chunks"),
        "{}",
        created.stderr
    );
    home.ok(&["load", "z.zero"]);
    assert_eq!(line(&home, "z.zero").unwrap()["state"], "in memory");
    assert_eq!(count(&home, "z.zero"), 0);
    let quiet = home.stoa(&["sql", "-q", "-c", "select 1"]);
    assert_eq!(quiet.stderr, "");
}

/// More room does not mend what is damaged.
#[test]
fn damaged_chunks_are_not_told_to_raise_the_size() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 1, 2, 1_000);
    let path = data.join("0.parquet");
    let reader = SerializedFileReader::new(File::open(&path).unwrap()).unwrap();
    let (start, _) = reader.metadata().row_group(1).column(0).byte_range();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[start as usize..start as usize + 64].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let create = [
        "layout",
        "create",
        "s.t",
        "--form",
        "arrow",
        "--load",
        "--location",
    ];
    let ran = home.stoa(&[&create[..], &[data.to_str().unwrap()]].concat());
    assert_eq!(ran.code, 6, "{}", ran.stderr);
    assert!(ran.stderr.contains("1 of 2 chunks"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("cache.size"), "{}", ran.stderr);
    assert!(
        ran.stderr
            .contains("The warnings say what could not be had"),
        "{}",
        ran.stderr
    );
}

/// `DROP TABLE` drops what SQL made, for this session and the next; `stoa layout drop` drops all.
#[test]
fn tables_can_be_dropped_and_made_again() {
    let home = Home::new();
    let (one, two) = (
        home.directory.path().join("one"),
        home.directory.path().join("two"),
    );
    table(&one, 1, 1, 100);
    table(&two, 1, 1, 200);
    let (one, two) = (one.to_str().unwrap(), two.to_str().unwrap());
    let create =
        |location: &str| format!("create external table x stored as stoa location '{location}'");
    let sql = |statements: &[&str]| {
        let mut arguments = vec!["sql", "-q", "--format", "json"];
        statements
            .iter()
            .for_each(|sql| arguments.extend(["-c", *sql]));
        home.stoa(&arguments)
    };
    let select = "select count(*) as n from x";
    let ran = sql(&[&create(one), select]);
    assert!(
        ran.code == 0 && ran.stdout.contains("100"),
        "{}{}",
        ran.stdout,
        ran.stderr
    );
    // In a session that did not make it.
    let ran = sql(&["drop table x", select]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert!(
        ran.stderr.contains("table 'datafusion.public.x' not found"),
        "{}",
        ran.stderr
    );
    assert_eq!(json(&home.ok(&["layout", "list", "--json"])), json("[]"));
    assert!(line(&home, "public.x").is_none());
    let gone = sql(&["drop table x"]);
    assert!(
        gone.code == 1 && gone.stderr.contains("doesn't exist"),
        "{}",
        gone.stderr
    );
    // Made again, elsewhere, and dropped by the session that made it: a script that runs twice.
    let again = create(two);
    let if_not_exists = again.replace("table x", "table if not exists x");
    for _ in 0..2 {
        let script = ["drop table if exists x", &again, &if_not_exists, select];
        let ran = sql(&script);
        assert!(
            ran.code == 0 && ran.stdout.contains("200"),
            "{}{}",
            ran.stdout,
            ran.stderr
        );
    }
    let ran = sql(&[&if_not_exists, select, "drop table x", &create(one), select]);
    assert!(
        ran.code == 0 && ran.stdout.contains("100"),
        "{}{}",
        ran.stdout,
        ran.stderr
    );
    // One that is read as the statement declares it is no other table.
    let declared = format!("{} options ('format.binary_as_string' 'true')", create(two));
    let ran = sql(&["drop table x", &declared, select, "drop table x", select]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert!(ran.stdout.contains("200"), "{}{}", ran.stdout, ran.stderr);
    assert!(
        ran.stderr.contains("table 'datafusion.public.x' not found"),
        "{}",
        ran.stderr
    );
    let ran = sql(&[&create(one)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    // Its files may be gone.
    std::fs::rename(one, home.directory.path().join("elsewhere")).unwrap();
    let ran = sql(&["drop table x"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    // What an operator published, everybody counts on.
    home.ok(&["layout", "create", "x", "--location", two, "--load"]);
    for drop in ["drop table x", "drop table if exists public.x"] {
        let ran = sql(&[drop]);
        assert_eq!(ran.code, 1, "{drop}");
        assert!(
            ran.stderr.contains("`stoa layout drop public.x` drops it"),
            "{}",
            ran.stderr
        );
    }
    assert_eq!(count(&home, "x"), 200);
    home.ok(&["layout", "drop", "x"]);
    assert!(line(&home, "public.x").is_none());
    let segments = std::fs::read_dir(home.shm.path().join("cache")).unwrap();
    let segments = segments.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("seg-")
    });
    assert_eq!(segments.count(), 0, "its memory is free");
    home.refused(&["layout", "drop", "x"], 4);
    home.refused(&["load", "x"], 4);
    let numbered = home.stoa(&["layout", "create", "x", "--location", two, "--load"]);
    assert_eq!(numbered.code, 0, "{}", numbered.stderr);
    assert!(
        !numbered.stderr.contains("public.x:1 "),
        "numbers go on: {}",
        numbered.stderr
    );
    assert_eq!(count(&home, "x"), 200);
}

/// After a reset the memory is held by nobody's wish; it can be freed without stopping anything.
#[test]
fn what_is_held_after_a_reset_is_shown_and_freed() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    table(&data, 1, 2, 1_000);
    let data = data.to_str().unwrap();
    home.ok(&["layout", "create", "s.t", "--location", data, "--load"]);
    home.ok(&["reset", "--yes"]);
    let held = line(&home, "s.t").unwrap();
    assert_eq!(
        (&held["state"], &held["chunks_done"]),
        (&json("\"held, not wanted\""), &json("2"))
    );
    assert!(home.ok(&["status"]).contains("`stoa unload TABLE` frees"));
    home.ok(&["unload", "s.t"]);
    assert!(line(&home, "s.t").is_none());
    // And its first version can be loaded again.
    home.ok(&["layout", "create", "s.t:1", "--location", data, "--load"]);
    assert_eq!(line(&home, "s.t").unwrap()["state"], "in memory");
}

/// Cron has to see what failed, whichever way the statements came.
#[test]
fn a_script_with_a_failing_statement_fails_and_runs_on() {
    let home = Home::new();
    let script = home.directory.path().join("script.sql");
    std::fs::write(
        &script,
        "select 1 as a;\nselect nonsense;\n-- a comment\nselect 3 as c\n",
    )
    .unwrap();
    let script = script.to_str().unwrap();
    let ran = home.stoa(&["sql", "-q", "--format", "csv", "-f", script]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(
        ran.stdout.contains("a\n1") && ran.stdout.contains("c\n3"),
        "{}",
        ran.stdout
    );
    assert!(ran.stderr.contains("nonsense"), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("1 of 3 statements failed"),
        "{}",
        ran.stderr
    );
    home.ok(&["sql", "-q", "-c", "-- a comment", "-c", "select 1"]);
    home.ok(&["sql", "-q", "-c", "--\nselect 1"]);
}
