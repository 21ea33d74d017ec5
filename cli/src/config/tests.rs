//! The errors and reports of the configuration, as people see them.

use std::path::PathBuf;
use std::time::Duration;

use super::*;

fn load(file: Option<&str>, set: &[&str], variables: &[(&str, &str)]) -> Result<Config, String> {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = machine::example();
    for (variable, text) in variables {
        machine
            .environment
            .insert((*variable).into(), (*text).into());
    }
    let path = directory.path().join("stoa.toml");
    if let Some(text) = file {
        std::fs::write(&path, text).unwrap();
    }
    let inputs = Inputs {
        file: file.map(|_| path),
        set: set.iter().map(ToString::to_string).collect(),
        flags: Vec::new(),
    };
    let place = format!("{}/", directory.path().display());
    Config::load(&inputs, &machine).map_err(|problems| problems.to_string().replace(&place, ""))
}

fn error(file: Option<&str>, set: &[&str], variables: &[(&str, &str)]) -> String {
    load(file, set, variables).unwrap_err()
}

#[test]
fn defaults_alone_are_a_valid_configuration() {
    let config = load(None, &[], &[]).unwrap();
    assert_eq!(config.cache.location, PathBuf::from("/dev/shm/stoa-1000"));
    assert_eq!(config.cache.size_bytes, 8 << 30);
    assert_eq!(config.cache.freshness, Some(Duration::from_secs(60)));
    assert_eq!(config.heartbeat.lease_ttl, Duration::from_secs(20));
    assert_eq!(config.worker.id, "node1");
    assert!(config.etcd.is_none());
    assert!(config.warnings().is_empty());
}

#[test]
fn the_later_layer_wins_and_says_so() {
    let config = load(
        Some("[cache]\nsize = \"1GiB\"\nfreshness = \"snapshot\"\n\"enabled\" = false\n"),
        &["cache.size=3GiB"],
        &[("STOA_CACHE__SIZE", "2GiB"), ("STOA_HOME", "/opt/stoa")],
    )
    .unwrap();
    assert_eq!(config.cache.size_bytes, 3 << 30);
    assert_eq!(config.cache.freshness, None);
    assert!(!config.cache.enabled);
    let source = |name: &str| config.resolved.get(name).source.clone();
    assert_eq!(source("cache.size"), Source::Flag("--set".into()));
    assert!(matches!(
        source("cache.freshness"),
        Source::File { line: 3, .. }
    ));
    assert_eq!(source("cache.pin.enabled"), Source::Default(""));
}

#[test]
fn etcd_endpoints_take_port_scheme_and_tls() {
    let etcd = |file: &str| load(Some(file), &[], &[]).unwrap().etcd.unwrap();
    let plain = etcd("etcd.hosts = [\"a\", \"b:1\", \"fe80::1\"]\netcd.port = 2380\n");
    assert_eq!(
        plain.endpoints,
        ["http://a:2380", "http://b:1", "http://[fe80::1]:2380"]
    );
    assert!(plain.tls.is_none());
    let secure = etcd("etcd.hosts = \"a\"\netcd.tls.ca = \"/ca.pem\"\n");
    assert_eq!(secure.endpoints, ["https://a:2379"]);
    assert_eq!(secure.tls.unwrap().ca, Some(PathBuf::from("/ca.pem")));
}

#[test]
fn a_location_without_a_scheme_takes_the_configured_one() {
    let machine = machine::example();
    let files = load(None, &[], &[]).unwrap();
    assert_eq!(files.location("/data/t/", &machine), "/data/t/");
    assert_eq!(files.location("./t/", &machine), "/srv/work/t/");
    assert_eq!(files.location("s3://b/t/", &machine), "s3://b/t/");
    let s3 = load(None, &["cache.storage.scheme=s3"], &[]).unwrap();
    assert_eq!(s3.location("bucket/t/", &machine), "s3://bucket/t/");
}

#[test]
fn stores_have_options_of_their_own() {
    let config = load(
        Some(
            "[store.\"s3://warm.bucket\"]\nendpoint = \"http://127.0.0.1:9000\"\nallow_http = true\n\
             secret_access_key = \"env:WARM_SECRET\"\n",
        ),
        &["store.\"s3://warm.bucket/\".region=eu-1"],
        &[("WARM_SECRET", "planted-secret")],
    )
    .unwrap();
    let store = &config.stores["s3://warm.bucket"];
    assert_eq!(store["endpoint"].reveal(), "http://127.0.0.1:9000");
    assert_eq!(store["allow_http"].reveal(), "true");
    assert_eq!(store["region"].reveal(), "eu-1");
    assert_eq!(store["secret_access_key"].reveal(), "planted-secret");
    let shown = format!(
        "{config:?}{}{}",
        report_as_text(&config.resolved),
        report_as_json(&config.resolved)
    );
    assert!(!shown.contains("planted-secret"), "{shown}");
}

#[test]
fn an_unknown_key_names_the_nearest() {
    insta::assert_snapshot!(
        error(
            Some("[cache]\nsize = \"1GiB\"\nsise = \"1GiB\"\n\n[store.\"s3://b\"]\nendpiont = \"x\"\n"),
            &["cache.freshnes=1s"],
            &[("STOA_ETCD__HOST", "a")],
        ),
        @r#"
    unknown key `cache.sise` (stoa.toml:3); the nearest known key is `cache.size`
    unknown key `store.s3://b.endpiont` (stoa.toml:6); the nearest known key is `store."s3://b".endpoint`
    unknown key `etcd.host` (environment STOA_ETCD__HOST); the nearest known key is `STOA_ETCD__HOSTS`
    unknown key `cache.freshnes` (flag --set); the nearest known key is `cache.freshness`
    "#
    );
}

#[test]
fn a_bad_value_says_key_value_and_reason() {
    insta::assert_snapshot!(
        error(
            Some(
                "cache.size = 0\ncache.verify = \"always\"\ncache.location = \"relative\"\n\
                 etcd.port = 70000\ncache.enabled = 1\nheartbeat.period.seconds = -1\n\
                 control.address = \"7510\"\ncache.freshness = 1979-05-27\n",
            ),
            &[
                "cache.size=-4GiB",
                "cache.size=lots",
                "cache.size=12KiB",
                "cache.freshness=0",
                "cache.freshness=never",
                "origin.attempts=0",
                "etcd.password=env:NOT_SET",
                "worker.id",
            ],
            &[],
        ),
        @"
    `cache.freshness` = `a date` (stoa.toml:8): expected a text, a number, true, false or a list of texts
    `--set worker.id` has no `=`; expected --set key=value
    `cache.enabled` = `1` (stoa.toml:5): expected true or false
    `cache.location` = `relative` (stoa.toml:3): expected an absolute path
    `cache.size` = `0` (stoa.toml:1): it must be greater than zero
    `cache.verify` = `always` (stoa.toml:2): expected one of off, first-touch
    `control.address` = `7510` (stoa.toml:7): expected host:port, such as 127.0.0.1:7510 or [::1]:7510
    `etcd.port` = `70000` (stoa.toml:4): it must be between 1 and 65535
    `heartbeat.period.seconds` = `-1` (stoa.toml:6): it must not be negative
    `cache.size` = `-4GiB` (flag --set): it must be greater than zero
    `cache.size` = `lots` (flag --set): expected a size such as 64GiB, 500MB or a number of bytes
    `cache.size` = `12KiB` (flag --set): it must be at least 1 MiB
    `cache.freshness` = `0` (flag --set): it must be greater than zero; `snapshot` never looks
    `cache.freshness` = `never` (flag --set): expected a number of seconds or a time such as 90s, 2m, 1h, or `snapshot`
    `origin.attempts` = `0` (flag --set): it must be greater than zero
    `etcd.password` = `<redacted>` (flag --set): the environment variable NOT_SET is not set
    "
    );
}

#[test]
fn contradictions_name_both_keys() {
    insta::assert_snapshot!(
        error(
            Some("heartbeat.period.seconds = 30\netcd.user = \"root\"\netcd.tls.key = \"/k\"\n"),
            &["http.address=0.0.0.0:9100", "origin.request.size=1GiB"],
            &[],
        ),
        @"
    `heartbeat.period.seconds` = `30s` (stoa.toml:1) contradicts `heartbeat.lease.ttl.seconds` = `20s` (default): the lease would end before it is renewed; make the period at most half of the TTL
    `etcd.user` = `root` (stoa.toml:2) contradicts `etcd.password` = `unset` (default): etcd needs both or neither
    `etcd.tls.key` = `/k` (stoa.toml:3) contradicts `etcd.tls.cert` = `unset` (default): a certificate and its private key go together
    `http.address` = `0.0.0.0:9100` (flag --set) contradicts `control.insecure` = `false` (default): other hosts could reach it in plain text without authentication; use a loopback address, or consent with control.insecure = true
    `origin.request.size` = `1 GiB` (flag --set) contradicts `origin.inflight.size` = `256 MiB` (default): a single request would exceed what may be in flight
    "
    );
}

#[test]
fn broken_toml_names_the_line() {
    insta::assert_snapshot!(
        error(Some("cache.size = \"1GiB\"\ncache.enabled = yes\n"), &[], &[]),
        @"stoa.toml:2: not valid TOML: string values must be quoted, expected literal string"
    );
}

#[test]
fn a_missing_file_is_said_only_when_it_was_named() {
    let inputs = Inputs {
        file: Some("/nowhere/stoa.toml".into()),
        ..Inputs::default()
    };
    let problems = Config::load(&inputs, &machine::example()).unwrap_err();
    insta::assert_snapshot!(
        problems.to_string(),
        @"cannot read the configuration /nowhere/stoa.toml: No such file or directory (os error 2)"
    );
    assert!(Config::load(&Inputs::default(), &machine::example()).is_ok());
}

#[test]
fn keys_of_pixels_are_accepted_with_one_warning() {
    let config = load(
        Some(
            "index.size = 1024\nindex.location = \"/mnt/ramfs/pixels.index\"\n\
             cache.read.direct = true\nlease.ttl.seconds = 40\n",
        ),
        &[],
        &[],
    )
    .unwrap();
    assert_eq!(config.heartbeat.lease_ttl, Duration::from_secs(40));
    assert_eq!(config.warnings().len(), 1);
    let place = config.resolved.file.unwrap();
    insta::assert_snapshot!(
        config.resolved.warnings[0].replace(&place.display().to_string(), "stoa.toml"),
        @"keys without a meaning here: cache.read.direct (stoa.toml:3): cached columns are always read in place; index.location (stoa.toml:2): the index lies beside the segments in cache.location; index.size (stoa.toml:1): the index sizes itself; lease.ttl.seconds (stoa.toml:4): it is called heartbeat.lease.ttl.seconds"
    );
}

#[test]
fn a_secret_file_must_be_private() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("password");
    std::fs::write(&path, "hunter2\n").unwrap();
    let set = format!("etcd.password=file:{}", path.display());
    let chmod = |mode| {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    chmod(0o644);
    let refused = error(None, &[&set, "etcd.user=root"], &[]);
    assert!(
        refused.contains("has mode 0644, others may read it; expected 0600"),
        "{refused}"
    );
    chmod(0o600);
    let config = load(None, &[&set, "etcd.user=root", "etcd.hosts=a"], &[]).unwrap();
    let etcd = config.etcd.unwrap();
    assert_eq!(etcd.password.unwrap().reveal(), "hunter2");
}

#[test]
fn the_worker_is_named_after_its_host_and_directory() {
    let two = load(None, &["cache.location=/mnt/stoa/two"], &[]).unwrap();
    assert_eq!(two.worker.id, "node1:/mnt/stoa/two");
    let named = load(None, &["worker.id=a/b c"], &[]).unwrap();
    assert_eq!(named.worker.id, "a/b c");
}

#[test]
fn memory_is_not_served_in_plain_text_without_consent() {
    let text = |set: &[&str]| load(None, set, &[]).unwrap_err().to_string();
    let open = "transfer.address=127.0.0.1:0,0.0.0.0:7420";
    let refused = text(&[open]);
    assert!(
        refused.contains("or consent with transfer.insecure = true"),
        "{refused}"
    );
    let consented = load(None, &[open, "transfer.insecure=true"], &[]).unwrap();
    assert_eq!(
        consented.transfer.addresses,
        ["127.0.0.1:0", "0.0.0.0:7420"]
    );
    assert!(consented.transfer.tls.is_none());
    let half = text(&["transfer.tls.ca=/ca.pem", "transfer.tls.cert=/node.pem"]);
    assert!(
        half.contains(
            "`transfer.tls.ca` = `/ca.pem` (flag --set) contradicts `transfer.tls.key` = `unset`"
        ),
        "{half}"
    );
    let all = [
        "transfer.tls.ca=/ca",
        "transfer.tls.cert=/cert",
        "transfer.tls.key=/key",
        open,
    ];
    assert!(load(None, &all, &[]).unwrap().transfer.tls.is_some());
}

#[test]
fn the_page_about_configuration_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        page == keys_as_markdown(),
        "docs/configuration.md differs; run `stoa config keys --markdown > docs/configuration.md`"
    );
}
