//! The way of chunks to the point where they can be appended: fetched from other workers as far as
//! those have them (see `gather.rs`), or from the origin and decoded, in parallel, within bounds on
//! memory and requests.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc::UnboundedSender;
use stoa_layout::{Form, TableCatalog};
use stoa_origin::{ErrorKind, Origin};
use stoa_transfer::TransportKind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use crate::background::Background;
use crate::batch::Batch;
use crate::decode::{EncodedChunk, FileDecoder, Skipped};
use crate::diff::Want;
use crate::failures::Remedy;
use crate::gather::{PeerFill, gather};

/// A permit stands for this many bytes, so that its count fits the semaphore.
const PERMIT_BYTES: u64 = 64 << 10;
/// Results that wait to be appended, beside those in the making.
const WAITING_MAX: usize = 2;

/// Why a chunk could not be had.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) reason: String,
    pub(crate) remedy: Remedy,
}

/// One batch, fetched and encoded.
pub(crate) struct Loaded {
    /// The batch.
    pub(crate) batch: Batch,
    /// Each chunk's position in the list of wants, and what came of it.
    pub(crate) chunks: Vec<(usize, Result<EncodedChunk, Failed>)>,
    /// Bytes of chunks that were read from the origin.
    pub(crate) fetched_bytes: u64,
    /// What came of another worker, if that had the chunks.
    pub(crate) from_peer: Option<FromPeer>,
    /// Gives the memory back when it is dropped, which is when the chunks are.
    pub(crate) memory: OwnedSemaphorePermit,
}

/// Bytes of chunks that another worker gave, by how they came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FromPeer {
    /// In one-sided reads.
    pub(crate) rdma_bytes: u64,
    /// In answers over TCP.
    pub(crate) tcp_bytes: u64,
}

impl FromPeer {
    /// Counts what came `via` a transport.
    pub(crate) fn arrived(&mut self, via: Option<TransportKind>, bytes: u64) {
        match via {
            Some(TransportKind::Rdma) => self.rdma_bytes += bytes,
            // Whatever is no one-sided read is bytes that somebody sent.
            _ => self.tcp_bytes += bytes,
        }
    }
}

/// Bounds of a fill.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FillLimits {
    pub(crate) concurrency: usize,
    pub(crate) decoders: usize,
    pub(crate) memory_bytes: u64,
    /// Bytes that one batch fetches at most.
    pub(crate) batch_bytes: u64,
}

/// What all batches of one fill share.
pub(crate) struct FillContext {
    pub(crate) origin: Origin,
    pub(crate) wants: Arc<Vec<Want>>,
    /// By table, as in the wants; `None` for tables that want nothing.
    pub(crate) catalogs: Vec<Option<Arc<TableCatalog>>>,
    pub(crate) limits: FillLimits,
    pub(crate) background: Arc<Background>,
    /// The other workers, where there are any.
    pub(crate) peers: Option<PeerFill>,
}

/// A file: its table, and its position in the table's catalog.
type Place = (usize, u32);

pub(crate) struct Shared {
    pub(crate) context: FillContext,
    decoders: Mutex<HashMap<Place, Arc<OnceLock<FileDecoder>>>>,
    decoding: Semaphore,
    memory: Arc<Semaphore>,
    memory_permits: u32,
    /// Files that turned out to be other than their catalog says: not asked for again.
    gone: Mutex<HashSet<Place>>,
    /// Batches in a row that the origin failed: from a number on, no more are tried.
    failures_in_row: AtomicU32,
    /// No further batch is begun.
    halted: AtomicBool,
}

/// Batches for the origin, in their order.
pub(crate) type OriginQueue = UnboundedSender<Batch>;

/// A fill that is under way. Dropping it abandons what is in flight.
pub(crate) struct Fill {
    shared: Arc<Shared>,
    results: mpsc::Receiver<Loaded>,
    task: JoinHandle<()>,
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fill {
    /// Begins to load the wants at `fetch`, the most wanted first.
    pub(crate) fn start(context: FillContext, fetch: Vec<usize>) -> Fill {
        let limits = context.limits;
        let memory_permits =
            (limits.memory_bytes / PERMIT_BYTES).clamp(1, u64::from(u32::MAX >> 4));
        let shared = Arc::new(Shared {
            context,
            decoders: Mutex::default(),
            decoding: Semaphore::new(limits.decoders.max(1)),
            memory: Arc::new(Semaphore::new(memory_permits as usize)),
            memory_permits: memory_permits as u32,
            gone: Mutex::default(),
            failures_in_row: AtomicU32::new(0),
            halted: AtomicBool::new(false),
        });
        let (sender, results) = mpsc::channel(WAITING_MAX);
        let working = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let (queue, queued) = futures::channel::mpsc::unbounded();
            let loading = queued.map(|batch| {
                let shared = Arc::clone(&working);
                async move {
                    if shared.is_halted() {
                        return None;
                    }
                    Some(shared.load(batch).await)
                }
            });
            let from_origin = async {
                let mut loaded =
                    std::pin::pin!(loading.buffer_unordered(limits.concurrency.max(1)));
                while let Some(loaded) = loaded.next().await {
                    if let Some(loaded) = loaded
                        && sender.send(loaded).await.is_err()
                    {
                        return;
                    }
                }
            };
            let (shared, results) = (Arc::clone(&working), sender.clone());
            tokio::join!(from_origin, gather(shared, fetch, queue, results));
        });
        Fill {
            shared,
            results,
            task,
        }
    }

    /// The next batch, in any order; `None` when all are done.
    pub(crate) async fn next(&mut self) -> Option<Loaded> {
        self.results.recv().await
    }

    /// Begins no further batch; what is in flight still comes.
    pub(crate) fn halt(&self) {
        self.shared.halted.store(true, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Maps and sets that are changed by single inserts: nothing is ever half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// Waits until so much of the memory for what is on its way is free.
    pub(crate) async fn memory(&self, bytes: u64) -> OwnedSemaphorePermit {
        let permits = bytes
            .div_ceil(PERMIT_BYTES)
            .min(u64::from(self.memory_permits));
        Arc::clone(&self.memory)
            .acquire_many_owned((permits as u32).max(1))
            .await
            .expect("the semaphore is never closed")
    }

    /// Waits for a turn at what keeps a processor busy.
    pub(crate) async fn turn(&self) -> SemaphorePermit<'_> {
        self.decoding
            .acquire()
            .await
            .expect("the semaphore is never closed")
    }

    async fn load(self: &Arc<Shared>, batch: Batch) -> Loaded {
        let memory = self.memory(batch.memory_bytes()).await;
        let (chunks, fetched_bytes) = match self.fetch(&batch).await {
            Ok((fetched, bytes)) => (self.encode(&batch, fetched).await, bytes),
            Err(failed) => (
                batch
                    .wants
                    .iter()
                    .map(|want| (*want, Err(failed.clone())))
                    .collect(),
                0,
            ),
        };
        Loaded {
            batch,
            chunks,
            fetched_bytes,
            from_peer: None,
            memory,
        }
    }

    /// The bytes of every chunk of the batch: for each, start and bytes of its ranges.
    async fn fetch(&self, batch: &Batch) -> Result<(Vec<Fetched>, u64), Failed> {
        let never = |reason: String| Failed {
            reason,
            remedy: Remedy::Never,
        };
        let file = self
            .catalog(batch)
            .and_then(|catalog| catalog.files.get(batch.file as usize))
            .ok_or_else(|| never("the file is not in the table's catalog".into()))?;
        let place = (batch.table, batch.file);
        if lock(&self.gone).contains(&place) {
            return Err(Failed {
                reason: format!("object {} has changed", file.identity.url()),
                remedy: Remedy::Refresh,
            });
        }
        let failures_max = (2 * self.context.limits.concurrency).max(4) as u32;
        if self.failures_in_row.load(Ordering::Relaxed) >= failures_max {
            return Err(Failed {
                reason: format!("{failures_max} requests in a row failed, this one was not made"),
                remedy: Remedy::Retry,
            });
        }
        let mut fetched = Vec::with_capacity(batch.wants.len());
        let mut ranges = Vec::with_capacity(batch.wants.len());
        for &want in &batch.wants {
            let column = self.context.wants[want].key.column;
            match file.chunk_ranges(batch.row_group, column) {
                Ok(of_chunk) => {
                    let first = ranges.len();
                    ranges.extend(of_chunk);
                    fetched.push(Fetched {
                        want,
                        ranges: Ok(first..ranges.len()),
                        bytes: vec![],
                    });
                }
                Err(error) => fetched.push(Fetched {
                    want,
                    ranges: Err(never(error.to_string())),
                    bytes: vec![],
                }),
            }
        }
        let read = self
            .context
            .origin
            .read(&file.identity, &ranges)
            .await
            .map_err(|error| {
                let remedy = match error.kind() {
                    ErrorKind::Changed | ErrorKind::NotFound => {
                        lock(&self.gone).insert(place);
                        Remedy::Refresh
                    }
                    ErrorKind::Retry | ErrorKind::Config => {
                        self.failures_in_row.fetch_add(1, Ordering::Relaxed);
                        Remedy::Retry
                    }
                    ErrorKind::Other => Remedy::Never,
                };
                Failed {
                    reason: error.to_string(),
                    remedy,
                }
            })?;
        self.failures_in_row.store(0, Ordering::Relaxed);
        let total = read.iter().map(|bytes| bytes.len() as u64).sum();
        for chunk in &mut fetched {
            if let Ok(of_chunk) = &chunk.ranges {
                chunk.bytes = of_chunk
                    .clone()
                    .map(|range| (ranges[range].start, read[range].clone()))
                    .collect();
            }
        }
        Ok((fetched, total))
    }

    async fn encode(
        self: &Arc<Shared>,
        batch: &Batch,
        fetched: Vec<Fetched>,
    ) -> Vec<(usize, Result<EncodedChunk, Failed>)> {
        let _turn = self.turn().await;
        let wants = batch.wants.clone();
        let (shared, table, file, row_group) =
            (Arc::clone(self), batch.table, batch.file, batch.row_group);
        let background = Arc::clone(&self.context.background);
        let encoded = background
            .spawn(move || {
                let decoder = shared.decoder(table, file);
                let decoder = decoder.get_or_init(|| {
                    // Present: the fetch found it.
                    let catalog = shared.context.catalogs[table].as_ref();
                    FileDecoder::new(
                        &catalog.expect("a batch's table has a catalog").files[file as usize]
                            .metadata,
                    )
                });
                let encode = |chunk: Fetched| {
                    let want = &shared.context.wants[chunk.want];
                    let encoded = chunk.ranges.and_then(|_| {
                        encode_one(decoder, row_group, want.key.column, want.form, &chunk.bytes)
                    });
                    (chunk.want, encoded)
                };
                fetched.into_iter().map(encode).collect::<Vec<_>>()
            })
            .await;
        encoded.unwrap_or_else(|panic| {
            let failed = Failed {
                reason: format!("decoding failed: {panic}"),
                remedy: Remedy::Never,
            };
            wants
                .into_iter()
                .map(|want| (want, Err(failed.clone())))
                .collect()
        })
    }

    fn catalog(&self, batch: &Batch) -> Option<&Arc<TableCatalog>> {
        self.context.catalogs.get(batch.table)?.as_ref()
    }

    /// The file's decoder, which the first who needs it makes.
    fn decoder(&self, table: usize, file: u32) -> Arc<OnceLock<FileDecoder>> {
        Arc::clone(lock(&self.decoders).entry((table, file)).or_default())
    }
}

struct Fetched {
    want: usize,
    /// Which of the batch's ranges are this chunk's, or why it has none.
    ranges: Result<std::ops::Range<usize>, Failed>,
    bytes: Vec<(u64, Bytes)>,
}

fn encode_one(
    decoder: &FileDecoder,
    row_group: u32,
    column: u32,
    form: Form,
    fetched: &[(u64, Bytes)],
) -> Result<EncodedChunk, Failed> {
    decoder
        .encode(row_group, column, form, fetched)
        .map_err(|Skipped(reason)| Failed {
            reason,
            remedy: Remedy::Never,
        })
}
