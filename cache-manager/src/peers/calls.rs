//! What this worker answers to others: everything it holds, and where single chunks are.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoa_shm::directory::{DirectoryBuilder, HoldingWorker};
use stoa_shm::holdings::{
    HOLDINGS_METHOD, HoldingsReply, HoldingsRequest, LOCATE_METHOD, LocateReply, LocateRequest,
    Malformed, Scope, Standing,
};
use stoa_shm::{ChunkKey, ChunkLocation};
use stoa_transfer::{CallHandler, PeerIdentity, Refusal};
use tokio::sync::{Mutex, watch};

use crate::peers::{Peers, ServedSegments};
use crate::shared::{Shared, random};
use crate::store::Located;

/// The longest that an answer waits for news.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// The shortest life of an image of what is held, while that changes all the time.
const IMAGE_AGE_MIN: Duration = Duration::from_millis(500);
/// Making images may take at most one part in so many of the time.
const IMAGE_SHARE: u32 = 10;

/// What is held, as the bytes of a directory.
struct Image {
    revision: u64,
    bytes: Bytes,
    made: Instant,
    took: Duration,
}

impl Image {
    /// For how long it is too young to be made anew.
    fn rest(&self) -> Duration {
        let age = IMAGE_AGE_MIN.max(self.took * IMAGE_SHARE);
        age.saturating_sub(self.made.elapsed())
    }
}

/// Answers the calls of other workers and of query nodes.
pub(crate) struct PeerCalls {
    shared: Arc<Shared>,
    served: Arc<ServedSegments>,
    peers: Arc<Peers>,
    /// How often what is held here has changed.
    own: watch::Receiver<u64>,
    /// Where this worker's counting of revisions begins: another one than that of the process
    /// before it.
    first_revision: u64,
    /// The newest image of each scope.
    images: [Mutex<Option<Arc<Image>>>; 2],
}

impl fmt::Debug for PeerCalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCalls")
            .field("worker", &self.peers.me)
            .finish_non_exhaustive()
    }
}

fn malformed(error: Malformed) -> Refusal {
    // Not a fault of the connection, which is as good for the next call.
    Refusal::failed(error)
}

impl PeerCalls {
    pub(crate) fn new(
        shared: Arc<Shared>,
        served: Arc<ServedSegments>,
        peers: Arc<Peers>,
        own: watch::Receiver<u64>,
    ) -> PeerCalls {
        PeerCalls {
            shared,
            served,
            peers,
            own,
            first_revision: random() | 1,
            images: Default::default(),
        }
    }

    /// The number of the state of a scope. Never 0, which stands for none.
    fn revision(&self, scope: Scope) -> u64 {
        let own = *self.own.borrow();
        let changes = match scope {
            Scope::Own => own,
            // Both only grow, so that the sum is another one after any change.
            Scope::Cluster => own.wrapping_add(*self.peers.changes.borrow()),
        };
        self.first_revision.wrapping_add(changes).max(1)
    }

    async fn holdings(&self, request: HoldingsRequest) -> Result<Bytes, Refusal> {
        if request.offset == 0 {
            let wait = Duration::from_millis(request.wait_ms.into()).min(WAIT_MAX);
            if !self.news(request.scope, request.since, wait).await {
                return Ok(Bytes::from(
                    HoldingsReply::unchanged(request.since).to_bytes(),
                ));
            }
        }
        let image = self.image(&request).await?;
        if image.revision == request.since && request.offset == 0 {
            return Ok(Bytes::from(
                HoldingsReply::unchanged(request.since).to_bytes(),
            ));
        }
        let reply = HoldingsReply::of(&request, image.revision, &image.bytes);
        Ok(Bytes::from(reply.to_bytes()))
    }

    /// Waits until the state is another one than `since`; whether it is.
    async fn news(&self, scope: Scope, since: u64, wait: Duration) -> bool {
        let (mut own, mut peers) = (self.own.clone(), self.peers.changes.subscribe());
        let news = async {
            while self.revision(scope) == since {
                let changed = tokio::select! {
                    changed = own.changed() => changed,
                    changed = peers.changed() => changed,
                };
                if changed.is_err() {
                    // The worker stops.
                    return std::future::pending().await;
                }
            }
        };
        tokio::time::timeout(wait, news).await.is_ok()
    }

    /// The image that a page is taken from: the newest, but pages behind the first, and askers in
    /// quick succession, get the one that is there.
    async fn image(&self, request: &HoldingsRequest) -> Result<Arc<Image>, Refusal> {
        let images = &self.images[usize::from(request.scope == Scope::Cluster)];
        loop {
            let mut kept = images.lock().await;
            let Some(image) = &*kept else {
                let image = Arc::new(self.make(request.scope).await?);
                return Ok(Arc::clone(kept.insert(image)));
            };
            let goes_on = request.offset > 0;
            let rest = image.rest();
            let good_enough = image.revision == self.revision(request.scope)
                || !rest.is_zero() && image.revision != request.since;
            if goes_on || good_enough {
                return Ok(Arc::clone(image));
            }
            if rest.is_zero() {
                // The next one is made in this one's place.
                *kept = None;
            } else {
                // Young, and known to the asker, who waits until another one may be made.
                drop(kept);
                tokio::time::sleep(rest).await;
            }
        }
    }

    async fn make(&self, scope: Scope) -> Result<Image, Refusal> {
        let started = Instant::now();
        // Before the content: what changes between the two is told twice rather than never.
        let revision = self.revision(scope);
        let held: Vec<(ChunkKey, ChunkLocation)> = self
            .shared
            .with_store(|store| {
                let held = store.held().iter();
                held.map(|(key, at)| (key.clone(), *at)).collect()
            })
            .await;
        let known = match scope {
            Scope::Own => vec![],
            Scope::Cluster => self.peers.known(),
        };
        let me = HoldingWorker {
            id: self.peers.me.clone(),
            incarnation: self.served.incarnation(),
            addresses: self.shared.transfer_addresses(),
        };
        let build = move || {
            let mut builder = DirectoryBuilder::new();
            let worker = builder.worker(me);
            for (key, location) in held {
                builder.chunk(worker, &key.file, key.row_group, key.column, location);
            }
            super::keeper::add_known(&mut builder, &known);
            builder.build(revision)
        };
        let bytes = tokio::task::spawn_blocking(build)
            .await
            .map_err(Refusal::failed)?
            .map_err(Refusal::failed)?;
        Ok(Image {
            revision,
            bytes: Bytes::from(bytes),
            made: Instant::now(),
            took: started.elapsed(),
        })
    }

    async fn locate(&self, request: LocateRequest) -> Result<Bytes, Refusal> {
        let board = &self.shared.board;
        // Before the store is asked: what is stored meanwhile is found there.
        let (unsettled, progress) = (!board.is_settled(), board.progress());
        let loading = board.is_loading(&request.chunks);
        let located = self
            .shared
            .with_store(move |store| store.locate(&request.chunks))
            .await
            .map_err(Refusal::failed)?;
        let standing = |(located, loading): (Located, bool)| match located {
            Located::Sealed(location) => Standing::Held(location),
            Located::Open => Standing::Loading,
            Located::Absent if loading => Standing::Loading,
            Located::Absent => Standing::Absent,
        };
        let reply = LocateReply {
            incarnation: self.served.incarnation(),
            unsettled,
            progress,
            standings: located.into_iter().zip(loading).map(standing).collect(),
        };
        Ok(Bytes::from(reply.to_bytes()))
    }
}

#[async_trait::async_trait]
impl CallHandler for PeerCalls {
    async fn call(&self, _: &PeerIdentity, method: u16, body: Bytes) -> Result<Bytes, Refusal> {
        match method {
            HOLDINGS_METHOD => {
                let request = HoldingsRequest::parse(&body).map_err(malformed)?;
                self.holdings(request).await
            }
            LOCATE_METHOD => {
                let request = LocateRequest::parse(&body).map_err(malformed)?;
                self.locate(request).await
            }
            other => Err(Refusal::unknown_method(other)),
        }
    }
}
