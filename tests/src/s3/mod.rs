//! An S3-compatible server on loopback that is honest about contents, counts, and misbehaves on
//! request.
//!
//! `s3s` speaks the protocol and `s3s-fs` keeps the objects as plain files: `root/bucket/key`.
//! Our wrapper of the `S3` trait adds what a cache needs to be tested against:
//! - a strong etag (MD5 of the content) in GET, HEAD and LIST alike, whoever wrote the file;
//! - `If-Match` and `If-None-Match`, answered with 412 and 304;
//! - counts of requests and bytes by kind and by key, and a log of the ranges asked for;
//! - delays, error statuses, connections cut in the middle of a body, and bodies that are short;
//! - the habits of stores of other makes: etags without quotes or none, conditions that are refused
//!   or ignored, small pages, waits that are asked for.
//!
//! A test holds a [`S3Server`]; other processes reach the same switches over HTTP under
//! `/_stoa/` (no bucket can have that name), see [`admin`].

pub mod admin;
mod etags;
pub mod faults;
pub mod habits;
pub mod ledger;
mod service;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::runtime::Runtime;

pub use faults::{Effect, FaultRule};
pub use habits::{Conditions, EtagStyle, Habits};
pub use ledger::{Access, Counts, Kind, Snapshot};

use crate::{Error, Result, Tried, wait};
use etags::Etags;
use faults::Faults;
use ledger::Ledger;

/// Where the server keeps its objects, how it is reached and who may.
#[derive(Clone, Debug)]
pub struct S3Options {
    /// The directory whose subdirectories are the buckets.
    pub root: PathBuf,
    /// The address that it listens on.
    pub host: IpAddr,
    /// The port there; 0 takes a free one.
    pub port: u16,
    /// The access key that requests are signed with.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
}

impl S3Options {
    /// A free port and keys that only tests use.
    pub fn at(root: impl Into<PathBuf>) -> S3Options {
        S3Options {
            root: root.into(),
            host: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            access_key: "stoa-test".to_owned(),
            secret_key: "stoa-test-secret".to_owned(),
        }
    }
}

/// What the handle, the wrapper and the admin endpoint share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) root: PathBuf,
    pub(crate) ledger: Ledger,
    pub(crate) faults: Faults,
    pub(crate) etags: Etags,
    pub(crate) habits: habits::Current,
    temporary: AtomicU64,
}

impl Shared {
    /// Writes an object at once: readers see the old or the new content, never half of it.
    pub(crate) fn put(&self, bucket: &str, key: &str, content: &[u8]) -> std::io::Result<()> {
        let path = self.root.join(bucket).join(key);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!(".tmp.put-{number}.internal.part"));
        std::fs::write(&temporary, content)?;
        std::fs::rename(&temporary, &path)
    }
}

/// A running server. Dropping it ends it; the files stay with whoever made the directory.
#[derive(Debug)]
pub struct S3Server {
    options: S3Options,
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl S3Server {
    /// The region that clients name.
    pub const REGION: &'static str = "us-east-1";

    /// Starts a server over `options.root`, which is created when missing.
    ///
    /// # Errors
    /// When the directory or the port cannot be used.
    pub fn start(options: S3Options) -> Result<S3Server> {
        let what = || format!("S3 root {}", options.root.display());
        std::fs::create_dir_all(&options.root).tried(what)?;
        let root = options.root.canonicalize().tried(what)?;
        let shared = Arc::new(Shared {
            root,
            ledger: Ledger::default(),
            faults: Faults::default(),
            etags: Etags::default(),
            habits: habits::Current::default(),
            temporary: AtomicU64::new(0),
        });
        let mut server = S3Server {
            address: SocketAddr::new(options.host, options.port),
            options,
            shared,
            runtime: None,
        };
        server.restart()?;
        Ok(server)
    }

    /// Accepts connections again after [`S3Server::stop`], at the same address, with the same
    /// counts and faults.
    ///
    /// # Errors
    /// When the port is taken by somebody else.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let address = self.address;
        let listener = wait::until(
            &format!("listening on {address}"),
            Duration::from_secs(5),
            || TcpListener::bind(address).map_err(|error| error.to_string()),
        )?;
        let what = || format!("listening on {address}");
        listener.set_nonblocking(true).tried(what)?;
        self.address = listener.local_addr().tried(what)?;

        let files = FileSystem::new(&self.shared.root).map_err(|error| Error::Answer {
            what: format!("S3 root {}", self.shared.root.display()),
            answer: format!("{error:?}"),
        })?;
        let mut builder =
            S3ServiceBuilder::new(service::Honest::new(files, Arc::clone(&self.shared)));
        builder.set_auth(SimpleAuth::from_single(
            self.options.access_key.clone(),
            self.options.secret_key.clone(),
        ));
        let app = admin::router(Arc::clone(&self.shared), builder.build());

        // A runtime of its own, so that stopping cuts every connection at once, and so that a
        // test that blocks its own runtime does not block its store.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("stoa-s3")
            .enable_all()
            .build()
            .tried(|| "a runtime for the S3 server".to_owned())?;
        runtime.spawn(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => {
                    if let Err(error) = axum::serve(listener, app).await {
                        tracing::error!(%error, "the S3 server ended");
                    }
                }
                Err(error) => tracing::error!(%error, "the S3 server did not start"),
            }
        });
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Cuts every connection and refuses new ones: the store is gone.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Where it listens; the port stays the same over restarts.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL that S3 clients take as their endpoint (with path-style requests).
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The directory whose subdirectories are the buckets.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// The access key that requests are signed with.
    pub fn access_key(&self) -> &str {
        &self.options.access_key
    }

    /// The secret of [`S3Server::access_key`].
    pub fn secret_key(&self) -> &str {
        &self.options.secret_key
    }

    /// The variables that S3 clients read, for child processes.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", self.options.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.options.secret_key.clone()),
            ("AWS_REGION", Self::REGION.to_owned()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
    }

    /// A client of one bucket, without retries, so that a test counts what it asked for.
    ///
    /// # Errors
    /// When the name is not one of a bucket.
    pub fn object_store(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>> {
        let retries = object_store::RetryConfig {
            max_retries: 0,
            ..Default::default()
        };
        let store = AmazonS3Builder::new()
            .with_endpoint(self.endpoint())
            .with_allow_http(true)
            .with_region(Self::REGION)
            .with_access_key_id(&self.options.access_key)
            .with_secret_access_key(&self.options.secret_key)
            .with_bucket_name(bucket)
            .with_retry(retries)
            .build()
            .map_err(|error| Error::Answer {
                what: format!("a client of bucket {bucket}"),
                answer: error.to_string(),
            })?;
        Ok(Arc::new(store))
    }

    /// Makes a bucket; one that is there is kept.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn create_bucket(&self, bucket: &str) -> Result<()> {
        std::fs::create_dir_all(self.root().join(bucket)).tried(|| format!("bucket {bucket}"))
    }

    /// Writes an object at once, around the protocol and the counts.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&self, bucket: &str, key: &str, content: impl AsRef<[u8]>) -> Result<()> {
        self.shared
            .put(bucket, key, content.as_ref())
            .tried(|| format!("object {bucket}/{key}"))
    }

    /// Reads an object, around the protocol and the counts.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read(&self, bucket: &str, key: &str) -> Result<Bytes> {
        std::fs::read(self.root().join(bucket).join(key))
            .map(Bytes::from)
            .tried(|| format!("object {bucket}/{key}"))
    }

    /// Removes an object, around the protocol and the counts.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove(&self, bucket: &str, key: &str) -> Result<()> {
        std::fs::remove_file(self.root().join(bucket).join(key))
            .tried(|| format!("object {bucket}/{key}"))
    }

    /// What was asked for since the start or the last [`S3Server::forget`].
    pub fn counts(&self) -> Snapshot {
        self.shared.ledger.snapshot()
    }

    /// Every request since the start or the last [`S3Server::forget`], oldest first; beyond
    /// [`ledger::LOG_LENGTH_MAX`] the oldest are dropped.
    pub fn log(&self) -> Vec<Access> {
        self.shared.ledger.log()
    }

    /// Starts counting anew.
    pub fn forget(&self) {
        self.shared.ledger.forget();
    }

    /// Replaces the faults; an empty list ends all misbehaviour.
    pub fn set_faults(&self, rules: Vec<FaultRule>) {
        self.shared.faults.set(rules);
    }

    /// Replaces the habits; the default ones are none.
    pub fn set_habits(&self, habits: Habits) {
        self.shared.habits.set(habits);
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.stop();
    }
}
