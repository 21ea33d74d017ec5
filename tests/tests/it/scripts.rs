//! The scripts of sbin/ as an operator runs them, with a program in place of `stoa` that takes its
//! time.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Daemons of this program take a second to end.
const SLOW: &str = r#"#!/usr/bin/env bash
case "$1" in
status) echo "status $*" ;;
coordinator) [[ " $* " != *" --set broken "* ]] || exit 1 ;;&
coordinator | worker)
    trap 'sleep 1; exit 0' TERM
    while true; do sleep 0.05; done
    ;;
esac
"#;

fn script(name: &str, home: &Path, arguments: &[&str]) -> (Output, Duration) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../sbin")
        .join(name);
    let started = Instant::now();
    let output = Command::new(path)
        .args(arguments)
        .env("STOA_BIN", home.join("stoa"))
        .env("STOA_RUN", home.join("run"))
        .env("STOA_WORKERS", home.join("workers"))
        .output()
        .unwrap();
    (output, started.elapsed())
}

fn home(workers: usize) -> tempfile::TempDir {
    let home = tempfile::Builder::new()
        .prefix("stoa-sbin-")
        .tempdir()
        .unwrap();
    let binary = home.path().join("stoa");
    std::fs::write(&binary, SLOW).unwrap();
    std::fs::set_permissions(&binary, Permissions::from_mode(0o755)).unwrap();
    std::fs::write(home.path().join("workers"), "localhost\n".repeat(workers)).unwrap();
    home
}

/// Many hosts take no longer than one: daemons are started and stopped at once.
#[test]
fn daemons_are_started_and_stopped_at_once() {
    let home = home(6);
    let (started, took) = script("start-stoa.sh", home.path(), &["--etcd", "node1"]);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(started.status.success(), "{text}");
    assert_eq!(text.matches(" started (process ").count(), 7, "{text}");
    assert_eq!(started.stdout, b"status status --etcd node1\n");
    assert!(
        took < Duration::from_millis(3000),
        "seven times half a second: {took:?}"
    );

    let (stopped, took) = script("stop-stoa.sh", home.path(), &[]);
    let text = String::from_utf8_lossy(&stopped.stderr).into_owned();
    assert!(stopped.status.success(), "{text}");
    assert_eq!(text.matches(" stopped\n").count(), 7, "{text}");
    assert!(text.ends_with("coordinator stopped\n"), "{text}");
    assert!(
        took < Duration::from_millis(5500),
        "seven times a second: {took:?}"
    );
    let left = std::fs::read_dir(home.path().join("run")).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name());
    assert!(
        left.into_iter()
            .all(|name| name.to_string_lossy().ends_with(".log"))
    );
}

/// One that does not start, or does not end in time, is named; the others are not held up by it.
#[test]
fn one_that_fails_does_not_hold_up_the_others() {
    let home = home(2);
    let (started, _) = script("start-stoa.sh", home.path(), &["--set", "broken"]);
    let text = String::from_utf8_lossy(&started.stderr).into_owned();
    assert_eq!(started.status.code(), Some(1), "{text}");
    assert!(text.contains("error: coordinator ended at once"), "{text}");
    assert_eq!(text.matches(" started (process ").count(), 2, "{text}");
    let (stopped, _) = script("stop-stoa.sh", home.path(), &[]);
    assert!(stopped.status.success(), "{stopped:?}");
}
