//! The embedded backend keeps the contract, in memory and on disk.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use stoa_metastore::conformance::{Harness, run_all};
use stoa_metastore::{EmbeddedMetastore, Metastore};
use tempfile::TempDir;

/// Gives out embedded stores; those on disk each in a directory of their own.
#[derive(Default)]
struct Embedded {
    on_disk: bool,
    last: Mutex<Option<EmbeddedMetastore>>,
    dirs: Mutex<Vec<TempDir>>,
}

#[async_trait]
impl Harness for Embedded {
    async fn fresh(&self) -> Arc<dyn Metastore> {
        let store = if self.on_disk {
            let dir = tempfile::tempdir().unwrap();
            let store = EmbeddedMetastore::open(&dir.path().join("state")).unwrap();
            self.dirs.lock().unwrap().push(dir);
            store
        } else {
            EmbeddedMetastore::in_memory()
        };
        *self.last.lock().unwrap() = Some(store.clone());
        Arc::new(store)
    }

    async fn compact(&self) {
        let store = self.last.lock().unwrap().clone().unwrap();
        store.compact(store.identity().await.unwrap().revision);
    }

    fn ttl_min(&self) -> Duration {
        Duration::from_secs(1)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_in_memory_keeps_the_contract() {
    run_all(&Embedded::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_on_disk_keeps_the_contract() {
    run_all(&Embedded {
        on_disk: true,
        ..Default::default()
    })
    .await;
}
