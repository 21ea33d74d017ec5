//! The etcd backend keeps the contract, on real servers that the tests start and kill.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use stoa_metastore::conformance::{Harness, run_all};
use stoa_metastore::testing::{EtcdServer, TlsFiles};
use stoa_metastore::{
    Continuity, Error, ErrorKind, EtcdMetastore, EtcdSettings, FollowHealth, FollowOptions,
    Metastore, OnDiscontinuity, Op, Records, Txn,
};

struct Etcd {
    store: EtcdMetastore,
}

#[async_trait]
impl Harness for Etcd {
    async fn fresh(&self) -> Arc<dyn Metastore> {
        // One server for all cases: each begins with what the one before left removed.
        let listing = self.store.list_keys("").await.unwrap();
        for batch in listing.entries.chunks(100) {
            let then = batch.iter().map(|entry| Op::delete(&entry.key)).collect();
            self.store.txn(Txn { when: vec![], then }).await.unwrap();
        }
        Arc::new(self.store.clone())
    }

    async fn compact(&self) {
        let revision = self.store.identity().await.unwrap().revision;
        self.store.compact(revision).await.unwrap();
    }

    fn ttl_min(&self) -> Duration {
        Duration::from_secs(2)
    }
}

async fn put(store: &EtcdMetastore, key: &str, value: &str) {
    store
        .txn(Txn {
            when: vec![],
            then: vec![Op::put(key, value)],
        })
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let server = EtcdServer::start(dir.path()).await;
    run_all(&Etcd {
        store: server.connect().await,
    })
    .await;
}

fn quick() -> FollowOptions {
    FollowOptions {
        relist: Duration::from_secs(2),
        back_off_max: Duration::from_millis(300),
        ..Default::default()
    }
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work)
        .await
        .unwrap_or_else(|_| panic!("{what}, in time"))
}

/// etcd goes away under a follower and comes back: the last state stands meanwhile, calls fail
/// within their deadline, and afterwards it converges by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = EtcdServer::start(dir.path()).await;
    let settings = EtcdSettings {
        timeout_ms: 1_000,
        ..server.settings()
    };
    let store = EtcdMetastore::connect(settings.clone()).await.unwrap();
    let records = Records::new(Arc::new(store.clone()));
    let leader = records.campaign("c", Duration::from_secs(2)).await.unwrap();
    put(&store, "f/a", "1").await;
    let mut follow = records.follow_with("f/", quick());
    assert_eq!(
        within("first listing", follow.next()).await.unwrap().len(),
        1
    );

    server.kill();
    let begun = Instant::now();
    let error = store.get("f/a").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry, "{error}");
    assert!(error.to_string().contains(&server.endpoint()), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "the deadline was kept"
    );
    let mut health = follow.health();
    within(
        "the outage is noticed",
        health.wait_for(|h| matches!(h, FollowHealth::Unreachable { .. })),
    )
    .await
    .unwrap();
    // Silent for longer than its lease: the coordinator stops believing in itself.
    within("the coordinator steps back", leader.lost()).await;
    let error = EtcdMetastore::connect(settings).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry, "{error}");

    server.restart().await;
    within(
        "reconnected",
        health.wait_for(|h| *h == FollowHealth::Connected),
    )
    .await
    .unwrap();
    put(&store, "f/b", "2").await;
    let state = within("the new state", async {
        loop {
            let entries = follow.next().await.unwrap();
            if entries.len() == 2 {
                return entries;
            }
        }
    })
    .await;
    assert_eq!(state[1].value, b"2");
    within(
        "elected again",
        records.campaign("c", Duration::from_secs(2)),
    )
    .await
    .unwrap();
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy_tree(&item.path(), &target);
        } else {
            std::fs::copy(item.path(), target).unwrap();
        }
    }
}

/// etcd is restored from an older copy: the follower freezes with the state it had, says so, and
/// goes on only when told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_freezes_the_followers() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = EtcdServer::start(dir.path()).await;
    let store = server.connect().await;
    put(&store, "f/a", "old").await;
    server.kill();
    let backup = dir.path().join("backup");
    copy_tree(server.data_dir(), &backup);
    server.restart().await;
    for i in 0..5 {
        put(&store, "f/a", &format!("new {i}")).await;
    }
    let before = store.identity().await.unwrap();
    let records = Records::new(Arc::new(store.clone()));
    let mut follow = records.follow_with("f/", quick());
    assert_eq!(
        within("first listing", follow.next()).await.unwrap()[0].value,
        b"new 4"
    );
    let not_for_long = FollowOptions {
        on_discontinuity: OnDiscontinuity::FreezeFor(Duration::from_secs(2)),
        ..quick()
    };
    let mut patient = records.follow_with("f/", not_for_long);
    within("first listing", patient.next()).await.unwrap();

    server.kill();
    std::fs::remove_dir_all(server.data_dir()).unwrap();
    copy_tree(&backup, server.data_dir());
    server.restart().await;
    let mut health = follow.health();
    let frozen = within(
        "frozen",
        health.wait_for(|h| matches!(h, FollowHealth::Frozen(_))),
    )
    .await
    .unwrap()
    .clone();
    assert!(
        matches!(frozen, FollowHealth::Frozen(Continuity::WentBack { expected_at_least, found })
            if expected_at_least == before.revision && found < before.revision),
        "{frozen:?}"
    );
    // Even when the restored store has caught up in number, it is not the one that was followed.
    for i in 0..10 {
        put(&store, "f/a", &format!("other {i}")).await;
    }
    let silence = tokio::time::timeout(Duration::from_secs(5), follow.next()).await;
    assert!(
        silence.is_err(),
        "nothing is believed while frozen: {silence:?}"
    );
    assert_eq!(
        within("accepted after a while", patient.next())
            .await
            .unwrap()[0]
            .value,
        b"other 9"
    );
    follow.thaw();
    assert_eq!(
        within("thawed", follow.next()).await.unwrap()[0].value,
        b"other 9"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_passwords_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = EtcdServer::start(dir.path()).await;
    let mut admin = etcd_client::Client::connect([server.endpoint()], None)
        .await
        .unwrap();
    admin
        .user_add("root", "planted-secret", None)
        .await
        .unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();

    let login = |user: &str, password: &str| EtcdSettings {
        user: Some(user.into()),
        password: Some(password.into()),
        ..server.settings()
    };
    let store = EtcdMetastore::connect(login("root", "planted-secret"))
        .await
        .unwrap();
    put(&store, "k", "v").await;
    let mut events = store.watch("k", 1).await.unwrap();
    assert!(within("an event", events.next()).await.unwrap().is_ok());
    let lease = store.grant_lease(Duration::from_secs(5)).await.unwrap();
    store.keep_alive(lease).await.unwrap();
    assert!(!format!("{store:?}").contains("planted-secret"));

    for settings in [login("root", "wrong"), server.settings()] {
        let error = EtcdMetastore::connect(settings).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(
            error.to_string().contains("check etcd.user, etcd.password"),
            "{error}"
        );
    }
}

/// Makes an authority, a server for this host and a client of its own, and the certificate of an
/// authority that is a stranger to both. Their keys are as young as the test.
fn certificates(dir: &Path) -> (TlsFiles, PathBuf) {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };

    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let path = write(name, params.self_signed(&key).unwrap().pem());
        (Issuer::new(params, key), path)
    };
    let (issuer, ca) = authority("ca.pem");
    let (_, stranger) = authority("stranger.pem");
    let issue = |name: &str, purpose: ExtendedKeyUsagePurpose| {
        let key = KeyPair::generate().unwrap();
        let hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(hosts).unwrap();
        params.extended_key_usages = vec![purpose, ExtendedKeyUsagePurpose::ClientAuth];
        let signed = params.signed_by(&key, &issuer).unwrap();
        (
            write(&format!("{name}.pem"), signed.pem()),
            write(&format!("{name}-key.pem"), key.serialize_pem()),
        )
    };
    let (server_cert, server_key) = issue("server", ExtendedKeyUsagePurpose::ServerAuth);
    let (client_cert, client_key) = issue("client", ExtendedKeyUsagePurpose::ClientAuth);
    let files = TlsFiles {
        ca,
        server_cert,
        server_key,
        client_cert,
        client_key,
    };
    (files, stranger)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_spoken_and_strangers_are_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let keys = tempfile::tempdir().unwrap();
    let (files, stranger) = certificates(keys.path());
    let server = EtcdServer::start_tls(dir.path(), files).await;
    let store = server.connect().await;
    put(&store, "k", "v").await;
    assert_eq!(store.get("k").await.unwrap().unwrap().value, b"v");

    let good = || EtcdSettings {
        timeout_ms: 2_000,
        ..server.settings()
    };
    let named = |name: &str| EtcdSettings {
        server_name: Some(name.into()),
        ..good()
    };
    EtcdMetastore::connect(named("localhost")).await.unwrap();
    let cases = [
        (
            "a server of an unknown authority",
            EtcdSettings {
                ca_file: Some(stranger),
                ..good()
            },
        ),
        ("a server of another name", named("etcd.example")),
        (
            "a client without a certificate",
            EtcdSettings {
                cert_file: None,
                key_file: None,
                ..good()
            },
        ),
        (
            "no TLS at all",
            EtcdSettings::new([server.endpoint().replace("https", "http")]),
        ),
    ];
    for (what, settings) in cases {
        let settings = EtcdSettings {
            timeout_ms: 2_000,
            ..settings
        };
        let error = EtcdMetastore::connect(settings).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{what}: {error}");
        println!("{what}: {error}");
    }
}

/// One member of several is gone: calls that hit it are made again at another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_endpoint_among_living_ones_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let server = EtcdServer::start(dir.path()).await;
    let dead = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let settings = EtcdSettings::new([dead, server.endpoint()]);
    let store = EtcdMetastore::connect(settings).await.unwrap();
    for i in 0..40 {
        put(&store, &format!("k/{i}"), "v").await;
    }
    assert_eq!(store.list("k/").await.unwrap().entries.len(), 40);
}
