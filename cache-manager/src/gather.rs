//! What a load has from other workers, and what it waits for there, before it asks the origin.
//!
//! ```text
//! all that is to be fetched ── LOCATE at every peer ──┬─ somebody holds it: read it there
//!        ^                                            ├─ somebody who goes before us loads it: wait,
//!        │                                            │  and ask again
//!        └── what could not be read, what was waited for ┴─ nobody: the origin
//! ```
//!
//! Who goes before whom follows from the chunk and the ids of the workers that the plan gives it to,
//! so all of them agree without asking. Where to is decided by [`route`], which is pure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::datatypes::{DataType, Schema};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use stoa_layout::TableCatalog;
use stoa_shm::ChunkLocation;
use stoa_shm::holdings::{LOCATE_CHUNKS_MAX, LocateReply, Standing};
use stoa_transfer::{Block, ErrorKind, Read, SegmentKey};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::batch::{Batch, batches};
use crate::decode::EncodedChunk;
use crate::diff::{Want, form_tag};
use crate::fill::{FromPeer, Loaded, OriginQueue, Shared};
use crate::peers::{Peer, Peers};
use crate::resolve::{Rival, Rivals};
use crate::route::{Answer, Place, Route, Turns, rank, route};

/// How long what is waited for is left before it is asked for again.
const WAIT_PAUSE: Duration = Duration::from_millis(100);
/// The first look at all peers may take no longer than this: nothing is fetched meanwhile.
const FIRST_LOOK_MAX: Duration = Duration::from_secs(2);
/// For so long after a load began, a worker that the plan names may not have seen that plan yet.
const PLAN_GRACE: Duration = Duration::from_secs(2);
/// A worker whose turn it is may stand still for so many deadlines.
const STALL_DEADLINES: u32 = 3;
/// A peer that failed so often in a row is left out of this load.
const FAILURES_MAX: u32 = 3;
/// Chunks that are waited for and asked for again in one round.
const ROUND_CHUNKS_MAX: usize = 4096;
/// Bytes that are read from one peer in one go.
const PULL_BYTES_MAX: u64 = 16 << 20;
/// Chunks that are read from one peer in one go.
const PULL_CHUNKS_MAX: usize = 256;
/// Batches that are read from peers at the same time.
const PULLS_MAX: usize = 8;
/// A peer that sends slower than this a second is too slow to be waited for.
const PULL_RATE_MIN: u64 = 4 << 20;

/// The other workers, as a load needs them.
pub(crate) struct PeerFill {
    pub(crate) peers: Arc<Peers>,
    /// By table, as in the wants.
    pub(crate) rivals: Vec<Arc<Rivals>>,
}

/// A peer during one load.
struct Known {
    peer: Peer,
    /// Calls that failed, and goes of reads, each since the last that did not.
    failed_calls: u32,
    failed_pulls: u32,
    is_out: bool,
    incarnation: u64,
    unsettled: bool,
    progress: u64,
    progressed: Instant,
    asked_bytes: u64,
}

/// Chunks to be read from one peer in one go.
struct Pull {
    peer: usize,
    table: usize,
    chunks: Vec<(usize, ChunkLocation)>,
}

/// What came of a pull beside the chunks that were handed on.
struct Pulled {
    peer: usize,
    /// Chunks that did not come, and whether that peer may be asked for them again.
    missed: Vec<(usize, bool)>,
    /// Whether anything arrived.
    any: bool,
}

/// One load's dealings with the peers.
struct Gathering {
    shared: Arc<Shared>,
    peers: Arc<Peers>,
    rivals: Vec<Arc<Rivals>>,
    known: Vec<Known>,
    /// Peers that did not give a chunk, by want.
    refused: HashMap<usize, HashSet<usize>>,
    /// Wants that a peer said to hold and then did not.
    moved: HashSet<(usize, usize)>,
    /// What is not on its way yet, in the order of the wants.
    open: Vec<usize>,
    turns: Turns,
    began: Instant,
    results: mpsc::Sender<Loaded>,
}

/// Has the wants at `fetch` loaded: hands on what peers have, and gives `origin` the rest, at once or
/// when nobody else will have it. Ends when all of them are on one of these ways.
pub(crate) async fn gather(
    shared: Arc<Shared>,
    fetch: Vec<usize>,
    origin: OriginQueue,
    results: mpsc::Sender<Loaded>,
) {
    let known: Vec<Known> = match &shared.context.peers {
        Some(fill) => fill.peers.live().into_values().map(Known::new).collect(),
        None => vec![],
    };
    match &shared.context.peers {
        Some(fill) if !known.is_empty() => {
            let gathering = Gathering {
                peers: Arc::clone(&fill.peers),
                rivals: fill.rivals.clone(),
                shared: Arc::clone(&shared),
                known,
                refused: HashMap::new(),
                moved: HashSet::new(),
                open: fetch,
                turns: Turns::default(),
                began: Instant::now(),
                results,
            };
            gathering.run(&origin).await;
        }
        _ => queue(&shared, &fetch, &origin),
    }
}

/// Gives chunks to the origin.
fn queue(shared: &Shared, fetch: &[usize], origin: &OriginQueue) {
    let context = &shared.context;
    for batch in batches(&context.wants, fetch, context.limits.batch_bytes) {
        // The other end is gone when the load is given up.
        let _ = origin.unbounded_send(batch);
    }
}

impl Known {
    fn new(peer: Peer) -> Known {
        Known {
            peer,
            failed_calls: 0,
            failed_pulls: 0,
            is_out: false,
            incarnation: 0,
            unsettled: true,
            progress: 0,
            progressed: Instant::now(),
            asked_bytes: 0,
        }
    }

    fn call_failed(&mut self) {
        self.failed_calls += 1;
        self.judge();
    }

    fn pulled(&mut self, anything: bool) {
        self.failed_pulls = if anything { 0 } else { self.failed_pulls + 1 };
        self.judge();
    }

    fn judge(&mut self) {
        let failed = self.failed_calls.max(self.failed_pulls);
        if failed >= FAILURES_MAX && !self.is_out {
            let peer = &self.peer.address.id;
            tracing::info!(peer, "a peer is left out of this load");
            self.is_out = true;
        }
    }

    /// Takes notice of how far it is.
    fn observe(&mut self, reply: &LocateReply) {
        self.failed_calls = 0;
        self.incarnation = reply.incarnation;
        self.unsettled = reply.unsettled;
        if reply.progress != self.progress {
            self.progress = reply.progress;
            self.progressed = Instant::now();
        }
    }
}

impl Gathering {
    async fn run(mut self, origin: &OriginQueue) {
        let mut pulls: JoinSet<Pulled> = JoinSet::new();
        let mut waiting_pulls: Vec<Pull> = Vec::new();
        // Rounds do not ask for all that is waited for, but for another part of it each time.
        let mut turn = 0;
        let mut first = true;
        loop {
            if self.shared.is_halted() {
                return;
            }
            let asked = self.part_of_open(first, turn);
            turn = turn.wrapping_add(asked.len());
            if !asked.is_empty() {
                let answers = self.ask(&asked, first).await;
                first = false;
                let (new_pulls, for_origin) = self.route_all(&asked, &answers);
                queue(&self.shared, &for_origin, origin);
                waiting_pulls.extend(new_pulls);
            }
            while pulls.len() < PULLS_MAX
                && let Some(pull) = waiting_pulls.pop()
            {
                pulls.spawn(self.pull(pull));
            }
            if self.open.is_empty() && pulls.is_empty() {
                return;
            }
            tokio::select! {
                Some(pulled) = pulls.join_next(), if !pulls.is_empty() => {
                    if let Ok(pulled) = pulled {
                        self.take(pulled);
                    }
                }
                () = tokio::time::sleep(WAIT_PAUSE), if !self.open.is_empty() => {}
            }
        }
    }

    /// The chunks that this round asks for.
    fn part_of_open(&self, all: bool, turn: usize) -> Vec<usize> {
        if all || self.open.len() <= ROUND_CHUNKS_MAX {
            return self.open.clone();
        }
        let from = turn % self.open.len();
        let round = self.open[from..].iter().chain(&self.open[..from]);
        round.take(ROUND_CHUNKS_MAX).copied().collect()
    }

    fn patience(&self) -> Duration {
        self.peers.deadline * STALL_DEADLINES
    }

    /// Who else is to hold a chunk, by each of the tables that want it.
    fn rivals_of(&self, want: &Want) -> impl Iterator<Item = &Rival> {
        let tables = std::iter::once(&want.table).chain(&want.also);
        tables.filter_map(|table| self.rivals.get(*table)?.get(&want.key))
    }

    /// Where each of the chunks is at each peer; `None` for peers that did not say.
    async fn ask(&mut self, asked: &[usize], first: bool) -> Vec<Option<Vec<Standing>>> {
        let live = self.peers.live();
        for known in &mut self.known {
            known.is_out |= !live.contains_key(&known.peer.address.id);
        }
        let wait = match first {
            true => self.peers.deadline.min(FIRST_LOOK_MAX),
            false => self.peers.deadline,
        };
        let deadline = Instant::now() + wait;
        let wants = &self.shared.context.wants;
        let replies = self.known.iter().map(|known| {
            let (peers, peer) = (&self.peers, &known.peer.address);
            async move {
                if known.is_out {
                    return None;
                }
                let parts = asked.chunks(LOCATE_CHUNKS_MAX).map(|part| {
                    let keys = part.iter().map(|at| wants[*at].key.clone()).collect();
                    peers.locate(peer, keys, deadline)
                });
                let parts: Result<Vec<LocateReply>, _> =
                    join_all(parts).await.into_iter().collect();
                if let Err(error) = &parts {
                    tracing::debug!(peer = peer.id, %error, "a peer does not say what it holds");
                }
                Some(parts.ok())
            }
        });
        let replies = join_all(replies).await;
        let take = |(known, reply): (&mut Known, Option<Option<Vec<LocateReply>>>)| match reply? {
            Some(parts) => {
                let last = parts.last()?;
                known.observe(last);
                let standings = parts.into_iter().flat_map(|part| part.standings);
                Some(standings.collect())
            }
            None => {
                known.call_failed();
                None
            }
        };
        self.known.iter_mut().zip(replies).map(take).collect()
    }

    /// Decides about the chunks that were asked for; what is waited for stays open.
    fn route_all(
        &mut self,
        asked: &[usize],
        standings: &[Option<Vec<Standing>>],
    ) -> (Vec<Pull>, Vec<usize>) {
        let wants = Arc::clone(&self.shared.context.wants);
        let young = self.began.elapsed() < PLAN_GRACE;
        let (patience, now) = (self.patience(), Instant::now());
        let mut pulls: HashMap<(usize, usize), Vec<(usize, ChunkLocation)>> = HashMap::new();
        let mut for_origin = Vec::new();
        let mut settled: HashSet<usize> = HashSet::new();
        for (position, &at) in asked.iter().enumerate() {
            let want = &wants[at];
            let rivals: Vec<&Rival> = self.rivals_of(want).collect();
            let place = Place::of(&want.key);
            let goes_first = rivals.iter().any(|rival| rival.first.is_none());
            let own = rank(place, &self.peers.me, goes_first);
            let refused = self.refused.get(&at);
            let known = self.known.iter().enumerate();
            let answers: Vec<Answer<'_>> = known
                .map(|(number, known)| {
                    let id = &known.peer.address.id;
                    let said = standings[number].as_ref().map(|said| said[position]);
                    let is_rival = rivals.iter().any(|rival| rival.others.contains(id));
                    let goes_first = rivals.iter().any(|rival| rival.is_first(id));
                    Answer {
                        // Who did not say is asked again, until it is out.
                        standing: said.unwrap_or(Standing::Absent),
                        may_come: said.is_none() || known.unsettled || young,
                        rank: is_rival.then(|| rank(place, id, goes_first)),
                        is_out: known.is_out || refused.is_some_and(|by| by.contains(&number)),
                        progressed: known.progressed,
                        asked_bytes: known.asked_bytes,
                    }
                })
                .collect();
            let form = form_tag(want.form);
            match route(form, own, place, &answers, &self.turns, patience, now) {
                Route::Wait(number) => {
                    self.turns.begin(place, number, now);
                    continue;
                }
                Route::Origin => for_origin.push(at),
                Route::Peer(number, location) => {
                    self.known[number].asked_bytes += location.length;
                    let pull = pulls.entry((number, want.table)).or_default();
                    pull.push((at, location));
                }
            }
            settled.insert(at);
        }
        self.open.retain(|at| !settled.contains(at));
        let mut split = Vec::new();
        for ((peer, table), chunks) in pulls {
            for chunks in in_goes(chunks) {
                split.push(Pull {
                    peer,
                    table,
                    chunks,
                });
            }
        }
        // Taken from the end: the most wanted first.
        split.sort_by_key(|pull| std::cmp::Reverse(pull.chunks[0].0));
        (split, for_origin)
    }

    /// Reads chunks from one peer, checks them, and hands them on.
    fn pull(&self, pull: Pull) -> impl Future<Output = Pulled> + Send + use<> {
        let (shared, peers) = (Arc::clone(&self.shared), Arc::clone(&self.peers));
        let results = self.results.clone();
        let known = &self.known[pull.peer];
        let (address, incarnation) = (known.peer.address.clone(), known.incarnation);
        async move {
            let bytes: u64 = pull.chunks.iter().map(|(_, at)| at.length).sum();
            let memory = shared.memory(bytes).await;
            let reads = pull.chunks.iter().map(|(_, location)| Read {
                segment: SegmentKey {
                    incarnation,
                    segment: location.segment.0,
                },
                offset: location.offset,
                length: location.length,
                checksum: Some(location.checksum),
            });
            let time = peers.deadline + Duration::from_secs(bytes / PULL_RATE_MIN);
            let deadline = Instant::now() + time;
            let mut batch = peers.client.submit(&address, reads.collect(), deadline);
            let mut pulled = Pulled {
                peer: pull.peer,
                missed: vec![],
                any: false,
            };
            let mut blocks: Vec<(usize, ChunkLocation, Block)> = Vec::new();
            let mut from_peer = FromPeer::default();
            while let Some((number, outcome)) = batch.next().await {
                let (at, location) = pull.chunks[number];
                match outcome {
                    Ok(block) => {
                        from_peer.arrived(block.via(), block.len() as u64);
                        blocks.push((at, location, block));
                    }
                    Err(error) => {
                        tracing::debug!(peer = address.id, %error, "a peer did not give a chunk");
                        // It may have moved within that peer's memory meanwhile.
                        let again = error.kind() == ErrorKind::Stale;
                        pulled.missed.push((at, again));
                    }
                }
            }
            let turn = shared.turn().await;
            let arrived: Vec<usize> = blocks.iter().map(|(at, ..)| *at).collect();
            let (checking, wants) = (Arc::clone(&shared), Arc::clone(&shared.context.wants));
            let background = Arc::clone(&shared.context.background);
            let checked = background
                .spawn(move || {
                    let check = |(at, location, block): (usize, ChunkLocation, Block)| {
                        let want = &wants[at];
                        let catalog = checking.context.catalogs[want.table].as_deref();
                        (at, chunk_of(want, catalog, location, block))
                    };
                    blocks.into_iter().map(check).collect::<Vec<_>>()
                })
                .await;
            drop(turn);
            let mut chunks = Vec::new();
            let checked = checked.unwrap_or_else(|panic| {
                let reason = format!("checking it failed: {panic}");
                arrived
                    .into_iter()
                    .map(|at| (at, Err(reason.clone())))
                    .collect()
            });
            for (at, chunk) in checked {
                match chunk {
                    Ok(chunk) => chunks.push((at, Ok(chunk))),
                    Err(reason) => {
                        tracing::warn!(peer = address.id, reason, "a peer's chunk is not used");
                        pulled.missed.push((at, false));
                    }
                }
            }
            pulled.any = !chunks.is_empty();
            if pulled.any {
                let loaded = Loaded {
                    batch: batch_of(pull.table, &shared.context.wants, &chunks),
                    chunks,
                    fetched_bytes: 0,
                    from_peer: Some(from_peer),
                    memory,
                };
                // The other end is gone when the load is given up.
                let _ = results.send(loaded).await;
            }
            pulled
        }
    }

    fn take(&mut self, pulled: Pulled) {
        self.known[pulled.peer].pulled(pulled.any);
        for (at, again) in pulled.missed {
            // Once more where it may have moved; not for ever.
            if !again || !self.moved.insert((at, pulled.peer)) {
                self.refused.entry(at).or_default().insert(pulled.peer);
            }
            self.open.push(at);
        }
    }
}

/// Splits what is read from one peer so that no part is too large.
fn in_goes(chunks: Vec<(usize, ChunkLocation)>) -> Vec<Vec<(usize, ChunkLocation)>> {
    let mut goes: Vec<Vec<(usize, ChunkLocation)>> = Vec::new();
    let mut bytes = 0;
    for (at, location) in chunks {
        let full = goes.last().is_none_or(|go| {
            go.len() >= PULL_CHUNKS_MAX || bytes + location.length > PULL_BYTES_MAX
        });
        if full {
            goes.push(vec![]);
            bytes = 0;
        }
        bytes += location.length;
        goes.last_mut().expect("pushed above").push((at, location));
    }
    goes
}

/// The chunk that a peer sent, once its values are known to be what its form promises: readers
/// check the geometry only.
fn chunk_of(
    want: &Want,
    catalog: Option<&TableCatalog>,
    location: ChunkLocation,
    block: Block,
) -> Result<EncodedChunk, String> {
    let bytes = Bytes::from(block);
    // What is as it is in the file is decoded with every check each time it is read.
    if location.form != stoa_forms::FORM_PARQUET {
        let data_type = catalog
            .and_then(|catalog| catalog.files.get(want.file as usize))
            .and_then(|file| file.root(want.key.column))
            .map(|root| decoded_type(root.field.as_ref()))
            .ok_or("its column is not in the file")?;
        let valid = match location.form {
            stoa_forms::FORM_PACKED => stoa_forms::validate_packed(bytes.clone(), &data_type),
            _ => stoa_forms::validate(bytes.clone(), &data_type),
        };
        valid.map_err(|error| error.to_string())?;
    }
    Ok(EncodedChunk {
        form: want.form,
        rows: location.rows,
        parts: vec![bytes],
        fallback: None,
    })
}

fn decoded_type(field: &arrow::datatypes::Field) -> DataType {
    let schema = stoa_layout::decoded_schema(&Schema::new(vec![field.clone()]));
    schema.field(0).data_type().clone()
}

/// Chunks of one table as a batch, for those who count.
fn batch_of<T>(table: usize, wants: &[Want], chunks: &[(usize, T)]) -> Batch {
    let members: Vec<usize> = chunks.iter().map(|(at, _)| *at).collect();
    let first = &wants[members[0]];
    Batch {
        table,
        file: first.file,
        row_group: first.key.row_group,
        compressed_bytes: 0,
        bytes: members.iter().map(|at| wants[*at].bytes).sum(),
        decoded_bytes: 0,
        wants: members,
    }
}

#[cfg(test)]
mod tests {
    use stoa_shm::SegmentId;

    use super::*;

    #[test]
    fn what_is_read_in_one_go_is_bounded() {
        let location = |length| ChunkLocation {
            segment: SegmentId(1),
            offset: 64,
            length,
            form: 1,
            checksum: 0,
            rows: 1,
        };
        let small: Vec<_> = (0..600).map(|at| (at, location(10))).collect();
        let sizes: Vec<usize> = in_goes(small).iter().map(Vec::len).collect();
        assert_eq!(sizes, [256, 256, 88]);
        let large = [1, PULL_BYTES_MAX + 1, 2, PULL_BYTES_MAX - 2, 1];
        let large = large.iter().enumerate().map(|(at, n)| (at, location(*n)));
        let goes = in_goes(large.collect());
        let members: Vec<Vec<usize>> = goes
            .iter()
            .map(|go| go.iter().map(|(at, _)| *at).collect())
            .collect();
        assert_eq!(members, [vec![0], vec![1], vec![2, 3], vec![4]]);
    }
}
