//! Fetching: batches to neighbours, replicas where one fails, and the end of every read by its
//! deadline.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use stoa_transfer::{ErrorKind, PeerAddress, Read, TransferError};

use super::decide::Source;
use super::directory::Holder;
use super::flights::{Landed, Pilot};
use super::peers::Arrived;
use super::{Inner, Neighbour, RemoteMiss, lock, permits};

/// A transport ends its reads at their deadline; one that does not is given up after this time.
const GRACE: Duration = Duration::from_millis(50);
/// A probe reads a whole chunk up to this size, and else so much of it.
const PROBE_BYTES: u64 = 1 << 20;

/// A chunk that somebody waits for.
#[derive(Debug)]
pub(super) struct Wish {
    pilot: Pilot,
    /// Who holds it and was not asked yet.
    holders: Vec<Holder>,
    origin: Option<Duration>,
    /// The state of the directory that `holders` are of.
    generation: u64,
    /// No neighbour is asked after this moment; set when the first one is.
    until: Option<Instant>,
    miss: RemoteMiss,
}

impl Wish {
    pub(super) fn new(
        pilot: Pilot,
        holders: Vec<Holder>,
        origin: Option<Duration>,
        generation: u64,
    ) -> Self {
        let miss = if holders.is_empty() {
            RemoteMiss::NotHeld
        } else {
            RemoteMiss::NotWorth
        };
        Self {
            pilot,
            holders,
            origin,
            generation,
            until: None,
            miss,
        }
    }
}

/// A wish for which a neighbour was chosen.
struct Order {
    wish: Wish,
    holder: Holder,
    _outstanding: Outstanding,
}

/// Bytes that keep a neighbour busy.
struct Outstanding {
    neighbour: Arc<Neighbour>,
    bytes: u64,
}

impl Outstanding {
    fn new(neighbour: &Arc<Neighbour>, bytes: u64) -> Self {
        neighbour.outstanding.fetch_add(bytes, Ordering::Relaxed);
        Self {
            neighbour: Arc::clone(neighbour),
            bytes,
        }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.neighbour
            .outstanding
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What a failed read says of the neighbour, and what it means for the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blame {
    /// The directory: nothing of this segment is there.
    Segment,
    /// The directory, or this one chunk.
    Chunk,
    /// The bytes: one chunk, or the neighbour if there are many.
    Bytes,
    /// The neighbour, or the way to it.
    Neighbour,
}

fn blame(error: &TransferError) -> (Blame, RemoteMiss) {
    match error.kind() {
        ErrorKind::Stale => {
            let chunk = matches!(error, TransferError::Refused { refusal, .. }
                if refusal.kind == stoa_transfer::RefusalKind::OutOfRange);
            let blame = if chunk { Blame::Chunk } else { Blame::Segment };
            (blame, RemoteMiss::Stale)
        }
        ErrorKind::TooLarge => (Blame::Chunk, RemoteMiss::Refused),
        ErrorKind::Corrupt => (Blame::Bytes, RemoteMiss::Corrupt),
        ErrorKind::Deadline => (Blame::Neighbour, RemoteMiss::Deadline),
        ErrorKind::Refused | ErrorKind::Unauthenticated | ErrorKind::Protocol => {
            (Blame::Neighbour, RemoteMiss::Refused)
        }
        _ => (Blame::Neighbour, RemoteMiss::Unreachable),
    }
}

impl Inner {
    /// Fulfils wishes: each lands, with the chunk or with the reason why it does not come.
    pub(super) async fn fulfil(self: Arc<Self>, wishes: Vec<Wish>) {
        let mut batches = FuturesUnordered::new();
        let mut wishes = wishes;
        loop {
            for (peer, orders) in self.assign(wishes) {
                batches.push(Arc::clone(&self).read(peer, orders));
            }
            match batches.next().await {
                Some(failed) => wishes = failed,
                None => return,
            }
        }
    }

    /// Chooses neighbours, all chunks of one neighbour together. What no neighbour is asked for
    /// lands here.
    fn assign(
        self: &Arc<Self>,
        wishes: Vec<Wish>,
    ) -> impl Iterator<Item = (Arc<PeerAddress>, Vec<Order>)> + use<> {
        let now = Instant::now();
        let mut orders: HashMap<String, (Arc<PeerAddress>, Vec<Order>)> = HashMap::new();
        for mut wish in wishes {
            if wish.pilot.is_abandoned() {
                continue;
            }
            let in_time = wish.until.is_none_or(|until| now < until);
            let source = if in_time {
                self.choose(&wish.holders, wish.origin, now)
            } else {
                Source::Origin
            };
            let Source::Neighbour(chosen) = source else {
                wish.pilot.land(Err(wish.miss));
                continue;
            };
            let holder = wish.holders.swap_remove(chosen);
            let neighbour = self.neighbour(&holder.peer);
            let order = Order {
                _outstanding: Outstanding::new(&neighbour, holder.length),
                wish,
                holder,
            };
            orders
                .entry(order.holder.peer.id.clone())
                .or_insert_with(|| (Arc::clone(&order.holder.peer), vec![]))
                .1
                .push(order);
        }
        orders.into_values()
    }

    /// Reads from one neighbour in one batch; returns what failed and may be had elsewhere.
    async fn read(self: Arc<Self>, peer: Arc<PeerAddress>, orders: Vec<Order>) -> Vec<Wish> {
        let neighbour = self.neighbour(&peer);
        let bytes: u64 = orders.iter().map(|order| order.holder.length).sum();
        // Own share first and always in this order. The semaphores are never closed.
        let own = permits(bytes).min(permits(self.settings.in_flight_bytes_max / 2));
        let _own = neighbour.bytes.acquire_many(own).await;
        let all = permits(bytes).min(permits(self.settings.in_flight_bytes_max));
        let _all = self.bytes.acquire_many(all).await;

        let sent = Instant::now();
        // What others asked of it before takes its time too.
        let busy = neighbour.outstanding.load(Ordering::Relaxed).max(bytes);
        let wait = self.settings.wait(busy, self.peers.expected(&peer, busy));
        let deadline = sent + wait;
        lock(&neighbour.health).asked(sent);
        let reads = orders.iter().map(|order| read_of(&order.holder)).collect();
        let mut arrivals = self.peers.submit(&peer, reads, deadline);
        let mut orders: Vec<Option<Order>> = orders.into_iter().map(Some).collect();
        let mut failed = vec![];
        let end = tokio::time::Instant::from_std(deadline + GRACE);
        while let Ok(Some((index, result))) = tokio::time::timeout_at(end, arrivals.next()).await {
            let Some(order) = orders.get_mut(index).and_then(Option::take) else {
                continue;
            };
            match result {
                Ok(arrived) => self.arrived(&neighbour, sent, order, arrived),
                Err(error) => {
                    failed.extend(self.missed(&neighbour, sent, deadline, order, &error));
                }
            }
            if orders.iter().all(Option::is_none) {
                break;
            }
        }
        drop(arrivals);
        let silent = TransferError::Deadline {
            peer: peer.id.clone(),
            waited_ms: wait.as_millis() as u64,
        };
        for order in orders.into_iter().flatten() {
            failed.extend(self.missed(&neighbour, sent, deadline, order, &silent));
        }
        failed
    }

    fn arrived(&self, neighbour: &Neighbour, sent: Instant, order: Order, arrived: Arrived) {
        lock(&neighbour.health).answered(sent);
        order.wish.pilot.land(Ok(Landed {
            arrived,
            form: order.holder.form,
        }));
    }

    /// Notes a failure. Returns the wish if another neighbour may fulfil it in time.
    fn missed(
        &self,
        neighbour: &Neighbour,
        sent: Instant,
        deadline: Instant,
        order: Order,
        error: &TransferError,
    ) -> Option<Wish> {
        let Order {
            mut wish, holder, ..
        } = order;
        let (blame, miss) = blame(error);
        tracing::debug!(peer = holder.peer.id, segment = %holder.segment, offset = holder.offset, %error, "a neighbour's chunk did not come");
        self.note(neighbour, sent, &holder, wish.generation, blame, error);
        wish.miss = miss;
        // Whoever waits has waited long enough.
        if miss == RemoteMiss::Deadline || wish.holders.is_empty() {
            wish.pilot.land(Err(miss));
            return None;
        }
        wish.until.get_or_insert(deadline);
        Some(wish)
    }

    fn note(
        &self,
        neighbour: &Neighbour,
        sent: Instant,
        holder: &Holder,
        generation: u64,
        blame: Blame,
        error: &TransferError,
    ) {
        let mut health = lock(&neighbour.health);
        let (failures, now) = (health.failures(), Instant::now());
        match blame {
            // It answered, as agreed.
            Blame::Segment | Blame::Chunk => health.answered(sent),
            Blame::Bytes => health.corrupted(sent, now),
            Blame::Neighbour => health.failed(sent, now),
        }
        if failures == 0 && health.failures() == 1 {
            tracing::warn!(peer = holder.peer.id, %error, "neighbour left for a while, reading the origin");
        }
        drop(health);
        match blame {
            Blame::Segment => self.disprove(generation, holder, None),
            Blame::Chunk | Blame::Bytes => self.disprove(generation, holder, Some(holder.offset)),
            Blame::Neighbour => {}
        }
    }

    /// Asks a neighbour for something that nobody waits for, to see how it does.
    pub(super) fn probe(self: &Arc<Self>, holder: &Holder, now: Instant) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let neighbour = self.neighbour(&holder.peer);
        let read = if holder.length <= PROBE_BYTES {
            read_of(holder)
        } else {
            Read {
                length: PROBE_BYTES,
                checksum: None,
                ..read_of(holder)
            }
        };
        let wait = self.settings.wait(read.length, None);
        let deadline = now + wait;
        lock(&neighbour.health).probed(now, deadline);
        let (inner, holder) = (Arc::clone(self), holder.clone());
        runtime.spawn(async move {
            let mut arrivals = inner.peers.submit(&holder.peer, vec![read], deadline);
            let end = tokio::time::Instant::from_std(deadline + GRACE);
            let error = match tokio::time::timeout_at(end, arrivals.next()).await {
                Ok(Some((_, Ok(_)))) => {
                    let mut health = lock(&neighbour.health);
                    if health.failures() > 0 {
                        tracing::info!(peer = holder.peer.id, "neighbour answers again");
                    }
                    health.answered(now);
                    return;
                }
                Ok(Some((_, Err(error)))) => error,
                Ok(None) | Err(_) => TransferError::Deadline {
                    peer: holder.peer.id.clone(),
                    waited_ms: wait.as_millis() as u64,
                },
            };
            tracing::debug!(peer = holder.peer.id, %error, "neighbour still fails");
            let mut health = lock(&neighbour.health);
            match blame(&error).0 {
                Blame::Segment | Blame::Chunk => health.answered(now),
                // Left for its bytes: it has to send right ones before it is asked again.
                Blame::Bytes | Blame::Neighbour => health.failed(now, Instant::now()),
            }
        });
    }
}

fn read_of(holder: &Holder) -> Read {
    Read {
        segment: holder.segment,
        offset: holder.offset,
        length: holder.length,
        checksum: Some(holder.checksum),
    }
}
