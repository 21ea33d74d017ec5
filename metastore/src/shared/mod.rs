//! The embedded store as all processes of a machine have it: one owns its file and answers on a
//! Unix socket beside it, the others ask that one.
//!
//! Whoever opens the store first owns it, be it a daemon or a command that looks at it for a
//! moment. When the owner ends, orderly or not, the next process that needs the store opens the
//! file itself, and what it was about goes on there. `docs/owner.md` is the contract.

mod client;
mod server;
mod socket;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use self::client::Client;
use self::server::Serving;
use crate::embedded::EmbeddedMetastore;
use crate::error::{Error, Result};
use crate::store::{
    ClusterIdentity, Entry, LeaseId, Listing, Metastore, Txn, TxnOutcome, WatchStream,
};

pub use self::client::{CALL_DEADLINE, CONNECT_DEADLINE};
pub use self::server::{CONNECTIONS_MAX, REQUEST_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX};
pub use self::socket::{PROTOCOL, SOCKET_MODE, SOCKET_NAME};
pub use self::wire::{ANSWER_BYTES_MAX, LIST_PART_BYTES};

/// How long a process tries to own the store or to reach its owner, before it says that the store
/// is busy: an owner that starts or ends is between the two for a moment.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The first and the longest pause between two such attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));
/// How many owners may end under one call before it gives up.
const OWNERS_MAX: usize = 16;

/// A [`Metastore`] in a directory that other processes of this machine use too. Cheap to clone.
///
/// Where this process owns the file, it serves the others until the last clone is dropped; where
/// another one does, calls go there. A call under which the owner ends is made again at the next
/// one: what it asked for may have happened already, which writers of records provide for (see
/// [`Metastore`]).
#[derive(Clone, Debug)]
pub struct SharedMetastore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    link: Mutex<Arc<Link>>,
    /// Held by whoever looks for the next owner.
    turn: tokio::sync::Mutex<()>,
    /// How often the store came to be another process's, or this one's.
    changes: watch::Sender<u64>,
}

/// How this process has the store at present.
#[derive(Debug)]
enum Link {
    /// It owns the file. What serves the others comes first: it is to end before the file is let go.
    Own {
        _serving: Option<Serving>,
        store: EmbeddedMetastore,
    },
    /// It asks the owner.
    Asked(Client),
}

impl Link {
    fn store(&self) -> &dyn Metastore {
        match self {
            Link::Own { store, .. } => store,
            Link::Asked(client) => client,
        }
    }
}

impl SharedMetastore {
    /// Opens or creates the store in `dir`, or connects to the process that has it open. Within a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`Error::Storage`] where the file cannot be read or written; [`Error::Busy`] where its owner
    /// lets nobody in; [`Error::OwnerSilent`] where it does not answer; [`Error::OwnerVersion`]
    /// where it speaks another version of the protocol.
    pub async fn open(dir: &Path) -> Result<Self> {
        let link = acquire(dir).await?;
        Ok(SharedMetastore {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                link: Mutex::new(Arc::new(link)),
                turn: tokio::sync::Mutex::new(()),
                changes: watch::Sender::new(0),
            }),
        })
    }

    /// Whether this process owns the file at present.
    pub fn is_owner(&self) -> bool {
        matches!(*self.inner.link(), Link::Own { .. })
    }

    /// The process that owns the file at present, where it is another one.
    pub fn owner(&self) -> Option<u32> {
        match &*self.inner.link() {
            Link::Own { .. } => None,
            Link::Asked(client) => client.pid(),
        }
    }

    /// Makes a call, at the next owner if this one ends meanwhile.
    async fn call<T, F>(&self, call: impl Fn(Arc<Link>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut owners = 0;
        loop {
            let link = self.inner.link();
            match call(Arc::clone(&link)).await {
                Err(Error::OwnerGone { .. }) if owners < OWNERS_MAX => {
                    owners += 1;
                    self.inner.next_owner(&link).await?;
                }
                other => return other,
            }
        }
    }
}

impl Inner {
    fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Owns the file, or finds its next owner, unless another call has done so meanwhile.
    async fn next_owner(&self, gone: &Arc<Link>) -> Result<()> {
        let _turn = self.turn.lock().await;
        if !Arc::ptr_eq(&self.link(), gone) {
            return Ok(());
        }
        let link = Arc::new(acquire(&self.dir).await?);
        match &*link {
            Link::Own { .. } => {
                tracing::debug!(dir = %self.dir.display(), "the owner of the state ended; this process owns it now");
            }
            Link::Asked(client) => {
                tracing::debug!(dir = %self.dir.display(), owner = client.pid(), "the owner of the state ended; another process owns it now");
            }
        }
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = link;
        self.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }
}

/// Opens the file, else connects to the process that has it open; whichever succeeds first.
async fn acquire(dir: &Path) -> Result<Link> {
    let until = Instant::now() + PATIENCE;
    let mut pause = PAUSE.0;
    loop {
        let place = dir.to_owned();
        // Off the async threads: it reads the file.
        let opened = tokio::task::spawn_blocking(move || EmbeddedMetastore::open(&place)).await;
        let opened = opened.map_err(|error| Error::Server {
            call: "open the embedded state",
            reason: error.to_string(),
        })?;
        let busy = match opened {
            Ok(store) => {
                return Ok(Link::Own {
                    _serving: Serving::start(dir, &store),
                    store,
                });
            }
            Err(busy @ Error::Busy { .. }) => busy,
            Err(error) => return Err(error),
        };
        match Client::connect(dir).await {
            Ok(client) => return Ok(Link::Asked(client)),
            // Between taking the file and listening, or between the two at its end.
            Err(Error::OwnerGone { .. }) if Instant::now() < until => {}
            Err(Error::OwnerGone { .. }) => return Err(busy),
            Err(error) => return Err(error),
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

#[async_trait]
impl Metastore for SharedMetastore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.call(|link| async move { link.store().get(key).await })
            .await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.call(|link| async move { link.store().list(prefix).await })
            .await
    }

    async fn list_keys(&self, prefix: &str) -> Result<Listing> {
        self.call(|link| async move { link.store().list_keys(prefix).await })
            .await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        let txn = &txn;
        self.call(|link| async move { link.store().txn(txn.clone()).await })
            .await
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        self.call(|link| async move { link.store().watch(prefix, from_revision).await })
            .await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        self.call(|link| async move { link.store().grant_lease(ttl).await })
            .await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.call(|link| async move { link.store().keep_alive(lease).await })
            .await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.call(|link| async move { link.store().revoke_lease(lease).await })
            .await
    }

    async fn identity(&self) -> Result<ClusterIdentity> {
        self.call(|link| async move { link.store().identity().await })
            .await
    }

    fn changes(&self) -> Option<watch::Receiver<u64>> {
        Some(self.inner.changes.subscribe())
    }
}

#[cfg(test)]
mod tests;
