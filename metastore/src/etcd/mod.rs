//! The metastore on etcd 3.4 or newer.

mod calls;
mod settings;
mod watch;

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, KeyValue, KvClient, PutOptions, TxnOp,
    WatchClient, WatchOptions,
};
use futures::StreamExt;
use tracing::debug;

use self::calls::Calls;
pub use self::settings::{EtcdSettings, Secret};
use self::watch::Watcher;
use crate::error::{Error, Result};
use crate::store::{
    ClusterIdentity, Condition, Entry, LeaseId, Listing, Metastore, Op, TXN_BYTES_MAX, Txn,
    TxnOutcome, WatchStream,
};

/// Entries fetched by one request of a listing; a page of the largest values stays below
/// [`MESSAGE_BYTES_MAX`].
const PAGE_ENTRIES: i64 = 48;
/// Keys fetched by one request of a listing without values.
const PAGE_KEYS: i64 = 1000;
/// The largest message taken from the server.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
const _: () = assert!(PAGE_ENTRIES as usize * (TXN_BYTES_MAX + 4096) < MESSAGE_BYTES_MAX);
/// How often a listing starts over when its revision is compacted between two pages.
const LIST_ATTEMPTS: u32 = 5;
/// Pings find a peer that is gone without a word. Servers refuse more than one each 5 s.
const PING_EVERY: Duration = Duration::from_secs(10);

/// A [`Metastore`] on an etcd cluster. Cheap to clone.
#[derive(Clone)]
pub struct EtcdMetastore {
    client: Client,
    kv: KvClient,
    watch: WatchClient,
    endpoints: String,
    user: String,
    timeout: Duration,
}

impl std::fmt::Debug for EtcdMetastore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdMetastore")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl EtcdMetastore {
    /// Connects, authenticates and asks once, so that a wrong address or password shows here.
    pub async fn connect(settings: EtcdSettings) -> Result<Self> {
        let valid = settings.validate()?;
        let timeout = valid.timeout;
        let endpoints = valid.endpoints.join(",");
        let user = valid
            .user
            .as_ref()
            .map_or("(none)".to_owned(), |(name, _)| name.clone());
        let mut options = ConnectOptions::new()
            .with_connect_timeout(timeout)
            .with_keep_alive(PING_EVERY, timeout.max(PING_EVERY))
            // etcd drops connections that ping while nothing is going on.
            .with_keep_alive_while_idle(false)
            // A member cut off from the others must not answer from its past, nor watch it.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = valid.user {
            options = options.with_user(name, password);
        }
        if let Some(tls) = valid.tls {
            options = options.with_tls(tls);
        }
        let calls = Calls {
            endpoints: &endpoints,
            user: &user,
            timeout,
        };
        let connect = Client::connect(valid.endpoints.clone(), Some(options));
        let client = calls.once("connect", connect).await?;
        let store = EtcdMetastore {
            kv: client
                .kv_client()
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            watch: client
                .watch_client()
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            client,
            endpoints,
            user,
            timeout,
        };
        store.identity().await?;
        Ok(store)
    }

    /// Compacts the server's history up to `revision`: an administrator's act, used by tests.
    pub async fn compact(&self, revision: i64) -> Result<()> {
        self.calls()
            .once("compact", self.kv.clone().compact(revision, None))
            .await?;
        Ok(())
    }

    fn calls(&self) -> Calls<'_> {
        Calls {
            endpoints: &self.endpoints,
            user: &self.user,
            timeout: self.timeout,
        }
    }

    async fn pages(&self, prefix: &str, keys_only: bool) -> Result<Listing> {
        for _ in 1..LIST_ATTEMPTS {
            match self.try_pages(prefix, keys_only).await {
                Err(Error::Compacted { .. }) => {
                    debug!(prefix, "compacted between pages, listing again")
                }
                other => return other,
            }
        }
        self.try_pages(prefix, keys_only).await
    }

    async fn try_pages(&self, prefix: &str, keys_only: bool) -> Result<Listing> {
        let end = prefix_end(prefix.as_bytes());
        // etcd has no empty key; its name for "from the first key on" is a zero byte.
        let mut from = if prefix.is_empty() {
            vec![0]
        } else {
            prefix.as_bytes().to_vec()
        };
        let mut listing = Listing::default();
        loop {
            let mut options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(if keys_only { PAGE_KEYS } else { PAGE_ENTRIES })
                .with_revision(listing.revision);
            if keys_only {
                options = options.with_keys_only();
            }
            let page = self
                .calls()
                .retried("list", || {
                    let (mut kv, from, options) = (self.kv.clone(), from.clone(), options.clone());
                    async move { kv.get(from, Some(options)).await }
                })
                .await?;
            if listing.revision == 0 {
                listing.revision = page.header().map_or(0, |header| header.revision());
            }
            listing
                .entries
                .extend(page.kvs().iter().filter_map(entry_of));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok(listing),
            }
        }
    }
}

#[async_trait]
impl Metastore for EtcdMetastore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let response = self
            .calls()
            .retried("get", || {
                let (mut kv, key) = (self.kv.clone(), key.to_owned());
                async move { kv.get(key, None).await }
            })
            .await?;
        Ok(response.kvs().first().and_then(entry_of))
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.pages(prefix, false).await
    }

    async fn list_keys(&self, prefix: &str) -> Result<Listing> {
        self.pages(prefix, true).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.check()?;
        let lease = txn.then.iter().find_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        let compares: Vec<Compare> = txn.when.iter().map(compare_of).collect();
        let ops: Vec<TxnOp> = txn.then.into_iter().map(op_of).collect();
        let request = etcd_client::Txn::new().when(compares).and_then(ops);
        let outcome = self
            .calls()
            .retried("txn", || {
                let (mut kv, request) = (self.kv.clone(), request.clone());
                async move { kv.txn(request).await }
            })
            .await;
        let response = match (outcome, lease) {
            (Err(Error::LeaseLost { .. }), Some(lease)) => return Err(Error::LeaseLost { lease }),
            (outcome, _) => outcome?,
        };
        Ok(TxnOutcome {
            committed: response.succeeded(),
            revision: response.header().map_or(0, |header| header.revision()),
        })
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<WatchStream> {
        let from = from_revision.max(1);
        let options = WatchOptions::new()
            .with_start_revision(from)
            .with_progress_notify()
            // Catching up after a while may be larger than a message: let the server cut it.
            .with_fragment();
        let (key, options) = if prefix.is_empty() {
            (Vec::new(), options.with_all_keys())
        } else {
            (prefix.as_bytes().to_vec(), options.with_prefix())
        };
        let mut client = self.watch.clone();
        let responses = self
            .calls()
            .once("watch", client.watch(key, Some(options)))
            .await?;
        let watcher = Watcher {
            responses,
            store: self.clone(),
            prefix: prefix.to_owned(),
            next: from,
            ready: VecDeque::new(),
            over: false,
        };
        Ok(futures::stream::unfold(watcher, Watcher::next).boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX).max(1);
        let granted = self
            .calls()
            .retried("grant lease", || {
                let mut client = self.client.lease_client();
                async move { client.grant(seconds, None).await }
            })
            .await?;
        Ok(LeaseId(granted.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        let kept = self
            .calls()
            .retried("keep alive", || {
                let mut client = self.client.lease_client();
                async move { client.keep_alive(lease.0).await.map(drop) }
            })
            .await;
        match kept {
            Err(Error::LeaseLost { .. }) => Err(Error::LeaseLost { lease }),
            other => other,
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        let revoked = self
            .calls()
            .retried("revoke lease", || {
                let mut client = self.client.lease_client();
                async move { client.revoke(lease.0).await.map(drop) }
            })
            .await;
        match revoked {
            Err(Error::LeaseLost { .. }) => Ok(()),
            other => other,
        }
    }

    async fn identity(&self) -> Result<ClusterIdentity> {
        let response = self
            .calls()
            .retried("identity", || {
                let mut kv = self.kv.clone();
                // A read of one key, linearizable: the answer's header says who and how far.
                async move {
                    kv.get(
                        crate::keys::ELECTION,
                        Some(GetOptions::new().with_keys_only()),
                    )
                    .await
                }
            })
            .await?;
        let header = response.header().ok_or(Error::Server {
            call: "identity",
            reason: "the answer has no header".to_owned(),
        })?;
        Ok(ClusterIdentity {
            cluster_id: header.cluster_id(),
            revision: header.revision(),
        })
    }
}

/// The first key after all keys with this prefix; a zero byte, for etcd, is "no end".
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// An entry of ours; keys that are no text are none.
fn entry_of(kv: &KeyValue) -> Option<Entry> {
    Some(Entry {
        key: kv.key_str().ok()?.to_owned(),
        value: kv.value().to_vec(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    })
}

fn compare_of(condition: &Condition) -> Compare {
    match condition {
        Condition::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Condition::Exists(key) => Compare::create_revision(key.as_str(), CompareOp::Greater, 0),
        Condition::CreateRevision(key, revision) => {
            Compare::create_revision(key.as_str(), CompareOp::Equal, *revision)
        }
        Condition::ModRevision(key, revision) => {
            Compare::mod_revision(key.as_str(), CompareOp::Equal, *revision)
        }
    }
}

fn op_of(op: Op) -> TxnOp {
    match op {
        Op::Put { key, value, lease } => TxnOp::put(
            key,
            value,
            lease.map(|lease| PutOptions::new().with_lease(lease.0)),
        ),
        Op::Delete { key } => TxnOp::delete(key, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_one() {
        assert_eq!(prefix_end(b"layout/"), b"layout0");
        assert_eq!(prefix_end(b"a\xff"), b"b");
        assert_eq!(prefix_end(b"\xff"), [0]);
        assert_eq!(prefix_end(b""), [0]);
    }
}
