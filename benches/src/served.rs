//! What other processes serve while queries are measured: the data as an object store that answers
//! late, and a worker's memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use stoa_cache_manager::{TransferSettings, Worker, WorkerHandle, WorkerSettings};
use stoa_coordinator::{Coordinator, CoordinatorHandle, CoordinatorListeners, CoordinatorSettings};
use stoa_metastore::{EmbeddedMetastore, Records};
use stoa_origin::{Origin, OriginLimits, StoreSettings, Stores};
use stoa_tests::s3::{Effect, FaultRule, S3Options, S3Server};
use tempfile::TempDir;

use crate::Error;
use crate::modes::{LOAD_TIMEOUT, Mode, documents};
use crate::suite::Data;

/// Where the tables lie as objects, and what clients need to read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    /// The URL of the bucket: every table is a directory in it.
    pub root: String,
    /// The server.
    pub endpoint: String,
    /// The key that requests are signed with: one of tests.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
}

impl Store {
    /// Clients of the store, whose requests are counted apart from those of others.
    pub fn clients(&self) -> Stores {
        let options = [
            ("endpoint", self.endpoint.as_str()),
            ("region", S3Server::REGION),
            ("allow_http", "true"),
            ("access_key_id", &self.access_key),
            ("secret_access_key", &self.secret_key),
        ];
        let settings = options
            .iter()
            .fold(StoreSettings::default(), |settings, (key, value)| {
                settings.with_option(&self.root, key, *value)
            });
        Stores::new(settings)
    }

    /// The store as Stoa reads it.
    pub fn origin(&self) -> Origin {
        Origin::new(self.clients(), OriginLimits::default())
    }
}

/// An object store over HTTP on loopback with the data in a bucket, as long as this lives.
#[derive(Debug)]
pub struct Serving {
    server: S3Server,
    bucket: String,
    // Behind the server, which has files in it.
    _root: TempDir,
}

impl Serving {
    /// Begins to serve; every answer comes `delay_ms` late.
    ///
    /// # Errors
    /// If there is no port, or no place for the bucket.
    pub fn start(data: &Data, delay_ms: u64) -> Result<Serving, Error> {
        let root = tempfile::Builder::new().prefix("stoa-bench-").tempdir()?;
        let bucket = data.suite.name().to_owned();
        std::os::unix::fs::symlink(&data.directory, root.path().join(&bucket))?;
        let server = S3Server::start(S3Options::at(root.path()))?;
        server.set_faults(vec![FaultRule::always(Effect::DelayMs(delay_ms))]);
        Ok(Serving {
            server,
            bucket,
            _root: root,
        })
    }

    /// How it is reached.
    pub fn store(&self) -> Store {
        Store {
            root: format!("s3://{}", self.bucket),
            endpoint: self.server.endpoint(),
            access_key: self.server.access_key().to_owned(),
            secret_key: self.server.secret_key().to_owned(),
        }
    }
}

/// What a worker holds, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Its cache directory.
    pub directory: PathBuf,
    /// Where others read its memory.
    pub addresses: Vec<String>,
    /// Bytes of its shared memory.
    pub bytes: u64,
    /// Seconds that loading took.
    pub load_seconds: f64,
}

/// A worker that serves its memory over TCP on loopback, and all that it needs, in this process.
#[derive(Debug)]
pub struct Holder {
    records: Records,
    worker: WorkerHandle,
    coordinator: CoordinatorHandle,
    scratch: TempDir,
}

impl Holder {
    /// Starts it with nothing, in a directory of its own below `root`, which should be a tmpfs.
    ///
    /// # Errors
    /// If it cannot be made there.
    pub async fn start(
        mode: &Mode,
        data: &Data,
        store: &Store,
        root: &Path,
    ) -> Result<Holder, Error> {
        let scratch = tempfile::Builder::new()
            .prefix("stoa-bench-")
            .tempdir_in(root)?;
        let records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
        let origin = store.origin();
        let settings = WorkerSettings {
            freshness: None,
            transfer: Some(TransferSettings::default()),
            ..WorkerSettings::new(
                "holder",
                scratch.path().join("cache"),
                mode.capacity_bytes(data),
            )
        };
        let worker = Worker::start(settings, records.clone(), origin.clone()).await?;
        // One worker, and it is here: nobody to wait for.
        let settings = CoordinatorSettings {
            grace_ms: 0,
            settle_ms: 0,
            ..CoordinatorSettings::default()
        };
        let nowhere = CoordinatorListeners::default();
        let coordinator = Coordinator::start(settings, nowhere, records.clone(), origin).await?;
        Ok(Holder {
            records,
            worker,
            coordinator,
            scratch,
        })
    }

    /// Loads all tables from the store in the mode's form; returns when all is there.
    ///
    /// # Errors
    /// If a table cannot be loaded, or not all of it.
    pub async fn load(&self, mode: &Mode, data: &Data, store: &Store) -> Result<Held, Error> {
        let start = Instant::now();
        let documents = documents(mode, data, &store.root)?;
        let versions: Vec<String> = documents
            .iter()
            .map(|document| document.table_version().to_string())
            .collect();
        for (document, version) in documents.iter().zip(&versions) {
            let table = document.table.to_string();
            let number = document.version.get();
            self.records
                .publish_layout(&table, number, &document.to_json())
                .await?;
            self.records.request_load(version).await?;
        }
        for version in &versions {
            let left = LOAD_TIMEOUT.saturating_sub(start.elapsed());
            let ready = tokio::time::timeout(left, self.worker.wait_ready(version));
            let state = ready
                .await
                .map_err(|_| format!("{version} is not loaded after {LOAD_TIMEOUT:?}"))??;
            let missing = state.left_out;
            if missing.chunks > 0 {
                let reason = missing.reason.unwrap_or_default();
                return Err(format!(
                    "{version}: {} chunks of {} bytes are not loaded: {reason}",
                    missing.chunks, missing.bytes
                )
                .into());
            }
        }
        Ok(Held {
            directory: self.scratch.path().join("cache"),
            addresses: self.worker.transfer_addresses(),
            bytes: self.worker.state().held_bytes,
            load_seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Stops what runs, and removes what was loaded.
    pub async fn stop(self) {
        // Nobody is left to be told.
        let _ = self.coordinator.shutdown().await;
        self.worker.shutdown().await;
        // Before the directory goes, whose name they bear.
        let _ = stoa_shm::AccessCounters::remove(self.scratch.path().join("cache"));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::suite::Suite;

    #[tokio::test]
    async fn the_store_has_the_files_and_answers_late() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::create_dir(scratch.path().join("region")).unwrap();
        std::fs::write(scratch.path().join("region/part-0.parquet"), b"content").unwrap();
        let data = Data {
            suite: Suite::Tpch,
            scale: 1.0,
            directory: scratch.path().to_owned(),
            tables: vec!["region".to_owned()],
            bytes: 7,
        };
        let serving = Serving::start(&data, 50).unwrap();
        let store = serving.store();
        let clients = store.clients();
        let start = Instant::now();
        let client = clients.get(&store.root).unwrap();
        let listed = client.list_with_delimiter(Some(&"region".into())).await;
        assert!(start.elapsed() >= Duration::from_millis(50));
        let listed: BTreeMap<String, u64> = listed
            .unwrap()
            .objects
            .iter()
            .map(|object| (object.location.to_string(), object.size))
            .collect();
        let expected = BTreeMap::from([("region/part-0.parquet".to_owned(), 7)]);
        assert_eq!(listed, expected);
        assert_eq!(clients.counters().requests(), 1);
    }
}
