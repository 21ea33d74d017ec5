//! The middle of a pass: what is missing is fetched and appended, while events go on being handled.

use std::sync::Arc;
use std::time::Duration;

use stoa_layout::Form;
use tokio::time::{Instant, sleep_until};

use crate::batch::{BATCH_BYTES_MAX, Batch};
use crate::diff::{Want, footprint};
use crate::engine::{Engine, Flow};
use crate::events::Event;
use crate::failures::{Failures, Remedy};
use crate::fill::{Fill, FillContext, FillLimits, Loaded};
use crate::gather::PeerFill;
use crate::metrics::add;
use crate::pass::Pass;
use crate::settings::WorkerSettings;
use crate::store::{Published, Stored};

/// How long an interrupted load waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(2);
/// Publications may take at most one part in so many of a load's time.
const PUBLISH_SHARE: u32 = 10;

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    Completely,
    Interrupted,
    Stopped,
}

impl Engine {
    /// Loads what is missing, while events go on being handled.
    pub(crate) async fn fill(&mut self, pass: &mut Pass) -> stoa_shm::Result<Filled> {
        if pass.decision.fetch.is_empty() {
            return Ok(Filled::Completely);
        }
        let settings = &self.shared.settings;
        let limits = FillLimits {
            concurrency: settings.fill_concurrency,
            decoders: settings.decoders(),
            memory_bytes: settings.fill_memory_bytes,
            batch_bytes: BATCH_BYTES_MAX.min(settings.fill_memory_bytes / 8).max(1),
        };
        let peers = self.sources.peers.as_ref().map(|peers| PeerFill {
            peers: Arc::clone(peers),
            rivals: pass
                .tables
                .iter()
                .map(|table| Arc::clone(&table.rivals))
                .collect(),
        });
        let context = FillContext {
            origin: self.sources.origin.clone(),
            wants: Arc::clone(&pass.wants),
            catalogs: pass
                .tables
                .iter()
                .map(|table| table.catalog.clone())
                .collect(),
            limits,
            background: Arc::clone(&self.shared.background),
            peers,
        };
        let mut fill = Fill::start(context, pass.decision.fetch.clone());
        let mut expected = pass.decision.fetch_bytes;
        let mut next_publication = Instant::now() + settings.publish_interval;
        let mut drain: Option<Instant> = None;
        enum Step {
            Event(Event),
            Loaded(Option<Loaded>),
            Drained,
        }
        loop {
            let deadline = self.deadline();
            let drained = drain.unwrap_or_else(Instant::now);
            let step = tokio::select! {
                biased;
                event = self.events.next(deadline), if drain.is_none() => Step::Event(event),
                () = sleep_until(drained), if drain.is_some() => Step::Drained,
                loaded = fill.next() => Step::Loaded(loaded),
            };
            match step {
                Step::Event(event) => match self.handle(event).await {
                    Flow::Continue => {}
                    Flow::Interrupt => {
                        fill.halt();
                        drain = Some(Instant::now() + DRAIN);
                    }
                    Flow::Stop => return Ok(Filled::Stopped),
                },
                Step::Drained => return Ok(Filled::Interrupted),
                Step::Loaded(None) if drain.is_some() => return Ok(Filled::Interrupted),
                Step::Loaded(None) => return Ok(Filled::Completely),
                Step::Loaded(Some(loaded)) => {
                    let publish = Instant::now() >= next_publication;
                    let coming = batch_footprint(&pass.wants, &loaded.batch);
                    let published = self.append(pass, loaded, expected, publish).await?;
                    expected = expected.saturating_sub(coming);
                    if let Some(published) = published {
                        let pause = settings_pause(&self.shared.settings, published.took);
                        next_publication = Instant::now() + pause;
                        self.take_published(pass, published);
                    }
                    self.count(pass);
                    self.report();
                }
            }
        }
    }

    /// Appends one batch to the segments and takes notice of what failed.
    pub(crate) async fn append(
        &mut self,
        pass: &mut Pass,
        loaded: Loaded,
        expected: u64,
        publish: bool,
    ) -> stoa_shm::Result<Option<Published>> {
        let counters = &self.shared.counters;
        add(&counters.fetched_bytes, loaded.fetched_bytes);
        if let Some(from_peer) = loaded.from_peer {
            add(&counters.peer_rdma_bytes, from_peer.rdma_bytes);
            add(&counters.peer_tcp_bytes, from_peer.tcp_bytes);
        }
        let mut good = Vec::with_capacity(loaded.chunks.len());
        for (at, chunk) in loaded.chunks {
            match chunk {
                Ok(chunk) => {
                    if let Some(reason) = &chunk.fallback {
                        tracing::debug!(chunk = %pass.wants[at].key.readable(), reason, "kept as parquet");
                        add(&counters.chunks_fallen_back, 1);
                        if pass.wants[at].form != Form::Parquet {
                            self.known.parquet_only.insert(pass.wants[at].key.clone());
                        }
                    }
                    good.push((at, chunk));
                }
                Err(failed) => {
                    let want = &pass.wants[at];
                    if failed.remedy == Remedy::Refresh {
                        pass.changed.insert(loaded.batch.table);
                    }
                    fail(
                        &mut self.failures,
                        pass,
                        at,
                        want.clone(),
                        failed.remedy,
                        failed.reason,
                    );
                    add(&self.shared.counters.chunks_failed, 1);
                    self.shared.board.done(&pass.wants[at].key);
                }
            }
        }
        let wants = Arc::clone(&pass.wants);
        let (stored, published) = self
            .shared
            .with_store(move |store| {
                let mut stored = Vec::with_capacity(good.len());
                let mut expected = expected;
                for (at, chunk) in &good {
                    let outcome = store.append(&wants[*at].key, chunk, expected)?;
                    expected = expected.saturating_sub(footprint(chunk.bytes()));
                    stored.push((*at, chunk.bytes(), outcome));
                }
                let publish = publish && store.has_fresh();
                let published = if publish {
                    Some(store.publish()?)
                } else {
                    None
                };
                Ok::<_, stoa_shm::Error>((stored, published))
            })
            .await?;
        let counters = &self.shared.counters;
        for (at, bytes, outcome) in stored {
            let want = &pass.wants[at];
            self.shared.board.done(&want.key);
            match outcome {
                Stored::Yes => {
                    add(&counters.chunks_fetched, 1);
                    add(&counters.stored_bytes, bytes);
                    let (peer_chunks, peer_bytes) = match loaded.from_peer {
                        Some(_) => (1, bytes),
                        None => (0, 0),
                    };
                    add(&counters.peer_chunks, peer_chunks);
                    self.failures.forget(&want.key);
                    pass.tally.fetched(want);
                    pass.encoded_bytes += footprint(bytes);
                    for table in std::iter::once(&want.table).chain(&want.also) {
                        if let Some(slot) = self.slots.get_mut(&pass.tables[*table].name) {
                            slot.state.fetched_chunks += 1;
                            slot.state.peer_chunks += peer_chunks;
                            slot.state.peer_bytes += peer_bytes;
                        }
                    }
                }
                Stored::NoRoom => {
                    // Larger than estimated: now it is known, and the next pass decides with that.
                    tracing::debug!(chunk = %want.key.readable(), bytes, "no room for a chunk");
                    self.known.sizes.insert(want.key.clone(), bytes);
                    self.failures.forget(&want.key);
                    pass.tally.no_room(want, at, &pass.no_room);
                    pass.overflowed = true;
                }
            }
        }
        drop(loaded.memory);
        Ok(published)
    }
}

/// Takes notice that a chunk could not be had.
fn fail(
    failures: &mut Failures,
    pass: &mut Pass,
    at: usize,
    want: Want,
    remedy: Remedy,
    reason: String,
) {
    tracing::debug!(chunk = %want.key.readable(), reason, "chunk left out");
    pass.tally.left_out(&want, at, &reason);
    failures.record(
        want.key,
        remedy,
        reason,
        std::time::Instant::now(),
        pass.jitter,
    );
}

/// What a batch is expected to take from the budget.
fn batch_footprint(wants: &[Want], batch: &Batch) -> u64 {
    batch
        .wants
        .iter()
        .map(|at| footprint(wants[*at].bytes))
        .sum()
}

/// The time until the next publication: what is set, or more where publishing is slow.
fn settings_pause(settings: &WorkerSettings, took: Duration) -> Duration {
    settings.publish_interval.max(took * PUBLISH_SHARE)
}
