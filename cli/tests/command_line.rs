//! The `stoa` binary as scripts see it: output, exit codes, and what one process leaves to the next.

mod home;

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use home::{Home, Running, json};

/// The demo's promise to scripts, then every command over the tables that it leaves behind.
#[test]
fn the_demo_leaves_tables_that_other_processes_use() {
    let home = Home::new();
    let report = json(&home.ok(&["demo", "--scale", "0.002", "--iterations", "1", "--json"]));
    let queries = report["queries"].as_array().unwrap();
    assert_eq!(queries.len(), 22);
    assert!(queries.iter().all(|q| q["equal"] == true), "{report}");
    assert_eq!(report["hot_origin_requests"], 0);
    assert_eq!(report["hit_rate"], 1.0);
    for field in [
        "geomean_ratio",
        "memory_bytes",
        "parquet_bytes",
        "load_seconds",
    ] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field}: {report}");
    }

    let rows = home.ok(&[
        "sql",
        "-q",
        "--format",
        "json",
        "-c",
        "select count(*) as n from tpch.orders",
    ]);
    assert_eq!(json(&rows)[0]["n"], 3000);

    // Nothing runs now, and what lies in memory is shown all the same.
    let status = json(&home.ok(&["status", "--json"]));
    assert_eq!(status["problems"].as_array().unwrap().len(), 0, "{status}");
    let lineitem = |status: &Value| {
        let tables = status["tables"].as_array().unwrap().clone();
        let found = tables.into_iter().find(|t| t["table"] == "tpch.lineitem");
        found.unwrap()
    };
    assert_eq!(lineitem(&status)["state"], "in memory");
    assert!(home.ok(&["cache", "verify"]).contains("all as they were"));

    // Fewer columns are a new version; nothing that is there is fetched again.
    let location = home.directory.path().join(".local/share/stoa");
    let location = location.join("tpch-sf0.002/lineitem/");
    home.ok(&[
        "layout",
        "create",
        "tpch.lineitem",
        "--location",
        location.to_str().unwrap(),
        "--columns",
        "l_orderkey,l_quantity",
    ]);
    let loaded = json(&home.ok(&["load", "tpch.lineitem:2", "--json"]));
    assert_eq!(loaded["tables"][0]["fetched_chunks"], 0, "{loaded}");
    assert_eq!(loaded["tables"][0]["kept_chunks"], 8, "{loaded}");

    let stale = home.refused(&["load", "tpch.lineitem:1"], 4);
    assert!(stale.contains("stale layout version of tpch.lineitem: current is 2"));
    let unknown = home.refused(&["load", "tpch.linetem"], 4);
    assert!(
        unknown.contains("the nearest is tpch.lineitem"),
        "{unknown}"
    );
    let columns = home.refused(
        &[
            "layout",
            "create",
            "tpch.lineitem",
            "--location",
            location.to_str().unwrap(),
            "--columns",
            "l_quantty",
        ],
        4,
    );
    assert!(columns.contains("\"l_quantity\""), "{columns}");

    home.ok(&["unload", "tpch.lineitem"]);
    let status = json(&home.ok(&["status", "--json"]));
    assert_eq!(lineitem(&status)["state"], "not loaded");

    // What is damaged is named as a file and a place in it, once.
    for entry in std::fs::read_dir(home.shm.path().join("cache")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("seg-") && !name.contains('.') {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle..middle + 8192.min(middle)].fill(0x5a);
            let writable = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&path, writable).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let verified = home.stoa(&["cache", "verify"]);
    assert_eq!(verified.code, 1, "{}{}", verified.stdout, verified.stderr);
    let named = verified.stdout.matches("bad: chunk {file file:///").count();
    assert!(named > 0, "{}", verified.stdout);
    assert!(!verified.stdout.contains("\\x"), "{}", verified.stdout);
    home.ok(&["reset", "--yes", "--files"]);
    assert_eq!(json(&home.ok(&["layout", "list", "--json"])), json("[]"));
}

/// A daemon without etcd runs the cache, and does for others what they ask for.
#[test]
fn a_worker_without_etcd_serves_the_commands_of_others_and_stops_on_sigterm() {
    let home = Home::new();
    let mut worker = Running(
        home.command(&["worker"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while home.stoa(&["status", "--require-ready", "1"]).code != 0 {
        assert!(Instant::now() < deadline, "the worker does not start");
        assert!(worker.0.try_wait().unwrap().is_none(), "the worker ended");
        std::thread::sleep(Duration::from_millis(100));
    }
    let table = home.table("t", 1000);
    home.ok(&["layout", "create", "a.b", "--location", &table]);
    home.ok(&["load", "a.b"]);
    let status = json(&home.ok(&["status", "--json"]));
    assert_eq!(status["tables"][0]["state"], "loaded", "{status}");
    assert_eq!(status["workers"][0]["id"], "embedded", "{status}");
    home.ok(&["load", "a.b", "--no-wait"]);
    home.ok(&["pin"]);
    home.ok(&["unpin"]);
    home.ok(&["unload", "a.b"]);
    home.ok(&["load", "a.b"]);
    home.ok(&["sql", "-q", "-c", "select * from stoa_tables()"]);
    home.ok(&["reset", "--yes", "--files"]);
    assert_eq!(json(&home.ok(&["layout", "list", "--json"])), json("[]"));
    let status = json(&home.ok(&["status", "--json"]));
    let tables = status["workers"][0]["tables"].as_object().unwrap();
    assert!(tables.values().all(|t| t["held_bytes"] == 0), "{status}");

    let pid = nix::unistd::Pid::from_raw(worker.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = worker.0.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    home.ok(&["status"]);
    home.ok(&["reset", "--yes", "--files"]);
}

/// What is wrong is said before anything starts, with the exit code of usage errors.
#[test]
fn wrong_settings_are_refused_with_the_nearest_key() {
    let home = Home::new();
    let unknown = home.refused(&["status", "--set", "cache.sise=1GiB"], 2);
    assert!(unknown.contains("the nearest known key is `cache.size`"));
    let zero = home.refused(&["worker", "--set", "cache.size=0"], 2);
    assert!(zero.contains("`cache.size` = `0` (flag --set): it must be greater than zero"));
    let unsafe_place = home.directory.path().join("cache");
    let set = format!("cache.location={}", unsafe_place.display());
    let unsafe_directory = home.refused(&["worker", "--set", &set], 2);
    assert!(
        unsafe_directory.contains("expected tmpfs"),
        "{unsafe_directory}"
    );
    let alone = home.refused(&["coordinator"], 2);
    assert!(alone.contains("needs etcd"), "{alone}");
    let unanswered = home.refused(&["--etcd", "127.0.0.1:1", "status"], 3);
    assert!(
        unanswered.contains("is etcd running there?"),
        "{unanswered}"
    );
    let scheme = home.refused(&["layout", "create", "a.b", "--location", "ftp://h/x/"], 2);
    assert!(scheme.contains("unknown store \"ftp://h\""), "{scheme}");
    let empty = home.directory.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = home.refused(
        &[
            "layout",
            "create",
            "a.b",
            "--location",
            empty.to_str().unwrap(),
        ],
        4,
    );
    assert!(empty.contains("no data files at"), "{empty}");
}

/// A planted secret must not come out anywhere, whatever is printed or logged.
#[test]
fn secrets_are_never_printed() {
    const SECRET: &str = "planted-secret-4711";
    let home = Home::new();
    let file = home.directory.path().join("stoa.toml");
    std::fs::write(
        &file,
        format!(
            "etcd.hosts = \"127.0.0.1:1\"\netcd.user = \"root\"\netcd.password = \"{SECRET}\"\n\
             etcd.timeout = \"1s\"\n[store.\"s3://b\"]\nendpoint = \"http://127.0.0.1:1\"\n\
             allow_http = true\naccess_key_id = \"key\"\nsecret_access_key = \"{SECRET}\"\n",
        ),
    )
    .unwrap();
    for arguments in [
        &["config", "check"][..],
        &["config", "check", "--json"],
        &["--log-level", "trace", "status"],
        &[
            "--log-level",
            "trace",
            "layout",
            "size",
            "--location",
            "s3://b/x/",
        ],
        &["config", "check", "--set", "etcd.password.x=1"],
    ] {
        let ran = home.stoa(arguments);
        let printed = format!("{}{}", ran.stdout, ran.stderr);
        assert!(!printed.contains(SECRET), "{arguments:?}: {printed}");
    }
    let check = home.ok(&["config", "check"]);
    assert!(check.contains("etcd.password"), "{check}");
    assert!(check.contains("<redacted>"), "{check}");
}

/// Memory that loses a bit under a running worker gives wrong answers only until its walk comes by.
#[test]
fn a_flipped_bit_is_found_and_loaded_again_by_a_running_worker() {
    let home = Home::new();
    let data = home.directory.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let copy = format!(
        "copy (select value as v from generate_series(1, 100000)) to '{}/v.parquet' stored as parquet",
        data.display()
    );
    home.ok(&["sql", "-q", "-c", &copy]);
    let location = format!("{}/", data.display());
    home.ok(&["layout", "create", "s.v", "--location", &location, "--load"]);
    let sum = || {
        let rows = home.ok(&[
            "sql",
            "-q",
            "--format",
            "json",
            "-c",
            "select sum(v) as s from s.v",
        ]);
        json(&rows)[0]["s"].clone()
    };
    assert_eq!(sum(), 5_000_050_000u64);

    let entries = std::fs::read_dir(home.shm.path().join("cache")).unwrap();
    let segments = entries.map(|entry| entry.unwrap().path()).filter(|path| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("seg-")
    });
    let largest = segments
        .max_by_key(|path| std::fs::metadata(path).unwrap().len())
        .unwrap();
    std::fs::set_permissions(&largest, std::fs::Permissions::from_mode(0o640)).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 4;
    // In place, as memory would: the file stays what readers have mapped.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&largest)
        .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0))
        .unwrap();
    let found = home.stoa(&["cache", "verify"]);
    assert_eq!(found.code, 1, "{}", found.stdout);
    assert!(found.stdout.contains("1 are damaged"), "{}", found.stdout);

    let worker = home
        .command(&["worker", "--set", "cache.scrub.interval=1s"])
        .stderr(Stdio::null())
        .spawn();
    let _worker = Running(worker.unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    while home.stoa(&["cache", "verify"]).code != 0 {
        assert!(Instant::now() < deadline, "the flip is not found");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(sum(), 5_000_050_000u64);
}

/// A layout names the file that cannot be read as well: without it queries would count the others.
#[test]
fn a_file_that_cannot_be_read_is_said_and_fails_queries_until_it_is_gone() {
    let home = Home::new();
    let files = home.directory.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for name in ["a", "b"] {
        let file = files.join(format!("{name}.parquet"));
        let copy = format!("copy (values (1), (2)) to '{}'", file.display());
        home.ok(&["sql", "--quiet", "-c", &copy]);
    }
    let broken = files.join("c.parquet");
    std::fs::write(&broken, "PAR1 and then nothing").unwrap();
    let location = format!("{}/", files.display());
    let create = ["layout", "create", "public.t", "--location", &location];
    let draft = home.stoa(&[&create[..], &["--dry-run"]].concat());
    assert_eq!(json(&draft.stdout)["files"].as_array().unwrap().len(), 3);

    let created = home.stoa(&[&create[..], &["--load"]].concat());
    assert_eq!(created.code, 0, "{}", created.stderr);
    let said = format!("warning: file://{} cannot be read: ", broken.display());
    let stderr = &created.stderr;
    assert!(stderr.contains(&said), "{stderr}");
    assert!(
        stderr.contains("queries of public.t fail until it is mended or removed"),
        "{stderr}"
    );

    let count = [
        "sql",
        "--quiet",
        "--format",
        "csv",
        "-c",
        "select count(*) from t",
    ];
    // Also where nobody ever looks again.
    for freshness in ["60s", "snapshot"] {
        let mut asked = home.command(&count);
        let asked = asked
            .env("STOA_CACHE__FRESHNESS", freshness)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&asked.stderr);
        assert_eq!(asked.status.code(), Some(1), "{stderr}");
        assert!(
            stderr.contains("1 files that cannot be read, of them file://"),
            "{stderr}"
        );
        assert!(stderr.contains("/c.parquet"), "{stderr}");
    }
    std::fs::remove_file(&broken).unwrap();
    let mut asked = home.command(&count);
    let asked = asked
        .env("STOA_CACHE__FRESHNESS", "snapshot")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "count(*)\n4\n");
}
