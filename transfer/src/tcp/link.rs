//! The client's end of a connection: requests go out as they come, one task receives their answers.

use std::collections::HashMap;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt, stream};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::memory::{Block, BlockPool};
use crate::tcp::io::{Halves, Input, Output, ReadHalf, WriteHalf};
use crate::transport::{Link, Outcomes, Read};
use crate::wire::{self, FrameHeader, FrameKind, FrameLimits, ReadRow, ResponseHead};

/// Calls on one connection at once; the next ones wait.
const CALLS_MAX: usize = 64;
/// Behind a body of at least this many bytes only the next header is read ahead, so that the next
/// body too is received in place.
const IN_PLACE_BYTES_MIN: usize = 64 << 10;

/// Who waits for an answer.
enum Open {
    Read {
        length: u64,
        place: usize,
        sender: mpsc::UnboundedSender<(usize, Result<Block>)>,
    },
    Call(oneshot::Sender<Result<Bytes>>),
    /// Nobody any more; the answer still comes. Holds the length of a read.
    TakenBack(Option<u64>),
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Open>,
    next: u64,
    closed: Option<TransferError>,
}

/// What the connection's tasks and its users share.
struct Shared {
    peer: String,
    limits: FrameLimits,
    pool: BlockPool,
    table: Mutex<Table>,
    outgoing: Mutex<Vec<Bytes>>,
    wake: Notify,
    /// Told when the connection is closed.
    ended: Notify,
    calls: Arc<Semaphore>,
    received_bytes: AtomicU64,
    outstanding_bytes: AtomicU64,
}

/// A connection to a peer.
pub(crate) struct TcpLink {
    shared: Arc<Shared>,
    tasks: [tokio::task::AbortHandle; 2],
}

impl std::fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TcpLink to {}", self.shared.peer)
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn protocol(&self, reason: impl Into<String>) -> TransferError {
        TransferError::Protocol {
            peer: self.peer.clone(),
            reason: reason.into(),
        }
    }

    fn send(&self, pieces: impl IntoIterator<Item = Bytes>) {
        self.outgoing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(pieces);
        self.wake.notify_one();
    }

    /// Ends everything that is open, once.
    fn close(&self, error: TransferError) {
        let open = {
            let mut table = self.table();
            table.closed.get_or_insert_with(|| error.clone());
            std::mem::take(&mut table.open)
        };
        self.ended.notify_one();
        for waiting in open.into_values() {
            match waiting {
                Open::Read {
                    length,
                    place,
                    sender,
                } => {
                    self.outstanding_bytes.fetch_sub(length, Ordering::Relaxed);
                    let _ = sender.send((place, Err(error.clone())));
                }
                Open::Call(sender) => {
                    let _ = sender.send(Err(error.clone()));
                }
                Open::TakenBack(length) => {
                    self.outstanding_bytes
                        .fetch_sub(length.unwrap_or(0), Ordering::Relaxed);
                }
            }
        }
    }

    /// Takes requests back: their answers, which still come, are dropped.
    fn take_back(&self, first: u64, count: u32) {
        let mut any = false;
        {
            let mut table = self.table();
            for request in first..first + u64::from(count) {
                if let Some(open) = table.open.get_mut(&request) {
                    any = true;
                    *open = Open::TakenBack(match open {
                        Open::Read { length, .. } => Some(*length),
                        Open::Call(_) => None,
                        Open::TakenBack(length) => *length,
                    });
                }
            }
        }
        if any {
            let header = FrameHeader {
                count,
                ..FrameHeader::new(FrameKind::Cancel, 0, first, 0)
            };
            self.send([Bytes::copy_from_slice(&header.to_bytes())]);
        }
    }

    /// Whether the bytes of `request` are wanted: checks that they were asked for.
    fn expect_data(&self, request: u64, body_bytes: u64) -> Result<bool> {
        let table = self.table();
        let (length, wanted) = match table.open.get(&request) {
            Some(Open::Read { length, .. }) => (*length, true),
            Some(Open::TakenBack(Some(length))) => (*length, false),
            _ => {
                return Err(self.protocol(format!(
                    "it sent {body_bytes} bytes for request {request}, which asked for none"
                )));
            }
        };
        if length != body_bytes {
            return Err(self.protocol(format!(
                "it sent {body_bytes} bytes for request {request}, which asked for {length}"
            )));
        }
        Ok(wanted)
    }

    /// Checks that `request` is a call.
    fn expect_answer(&self, request: u64) -> Result<()> {
        match self.table().open.get(&request) {
            Some(Open::Call(_) | Open::TakenBack(None)) => Ok(()),
            _ => Err(self.protocol(format!(
                "it answered request {request}, which is no open call"
            ))),
        }
    }

    /// The request has its answer.
    fn answered(&self, request: u64) -> Option<Open> {
        let open = self.table().open.remove(&request)?;
        if let Open::Read { length, .. } | Open::TakenBack(Some(length)) = &open {
            self.outstanding_bytes.fetch_sub(*length, Ordering::Relaxed);
        }
        Some(open)
    }

    fn refused(&self, request: u64, refusal: Refusal) -> Result<()> {
        let error = TransferError::Refused {
            peer: self.peer.clone(),
            refusal,
        };
        match self.answered(request) {
            Some(Open::Read { place, sender, .. }) => {
                let _ = sender.send((place, Err(error)));
            }
            Some(Open::Call(sender)) => {
                let _ = sender.send(Err(error));
            }
            Some(Open::TakenBack(_)) => {}
            None => {
                return Err(self.protocol(format!(
                    "it refused request {request}, which was not open: {error}"
                )));
            }
        }
        Ok(())
    }
}

/// What a peer's last words mean for everything that is open.
pub(crate) fn farewell(peer: &str, kind: RefusalKind, message: String) -> TransferError {
    let peer = peer.to_string();
    match kind {
        RefusalKind::Unauthenticated => TransferError::Unauthenticated {
            peer,
            reason: message,
        },
        RefusalKind::Protocol => TransferError::Protocol {
            peer,
            reason: format!("it says that this end broke it: {message}"),
        },
        RefusalKind::Busy => TransferError::Unreachable {
            peer,
            reason: message,
        },
        _ => TransferError::Closed {
            peer,
            reason: message,
        },
    }
}

/// Receives answers until the connection ends; says why it ended.
async fn receive(shared: &Shared, half: ReadHalf) -> TransferError {
    let mut input = Input::new(half, |bytes| {
        shared
            .received_bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
    });
    let ended = |error: std::io::Error| TransferError::Closed {
        peer: shared.peer.clone(),
        reason: match error.kind() {
            std::io::ErrorKind::UnexpectedEof => "it ended in the middle of a frame".to_string(),
            _ => error.to_string(),
        },
    };
    loop {
        let header = match input.take::<{ FrameHeader::BYTES }>().await {
            Ok(Some(header)) => header,
            Ok(None) => {
                return TransferError::Closed {
                    peer: shared.peer.clone(),
                    reason: "the peer closed it".to_string(),
                };
            }
            Err(error) => return ended(error),
        };
        let head = match ResponseHead::parse(&header, shared.limits) {
            Ok(head) => head,
            Err(error) => return shared.protocol(error.to_string()),
        };
        // Within usize: the limits are.
        let body_bytes = usize::try_from(head.body_bytes()).unwrap_or(usize::MAX);
        match head {
            ResponseHead::Data { request, .. } => {
                match shared.expect_data(request, head.body_bytes()) {
                    Err(error) => return error,
                    Ok(false) => {
                        if let Err(error) = input.skip(head.body_bytes()).await {
                            return ended(error);
                        }
                        shared.answered(request);
                        continue;
                    }
                    Ok(true) => {}
                }
                let mut block = match shared.pool.take(body_bytes) {
                    Ok(block) => block,
                    Err(error) => return ended(error),
                };
                let ahead_max = if body_bytes >= IN_PLACE_BYTES_MIN {
                    FrameHeader::BYTES
                } else {
                    usize::MAX
                };
                if let Err(error) = input.fill(block.as_mut(), ahead_max).await {
                    return ended(error);
                }
                if let Some(Open::Read { place, sender, .. }) = shared.answered(request) {
                    let _ = sender.send((place, Ok(block)));
                }
            }
            ResponseHead::Answer { request, .. } => {
                if let Err(error) = shared.expect_answer(request) {
                    return error;
                }
                let mut body = vec![0; body_bytes];
                if let Err(error) = input.fill(&mut body, usize::MAX).await {
                    return ended(error);
                }
                if let Some(Open::Call(sender)) = shared.answered(request) {
                    let _ = sender.send(Ok(body.into()));
                }
            }
            ResponseHead::Refused { request, kind, .. } => {
                let mut text = vec![0; body_bytes];
                if let Err(error) = input.fill(&mut text, usize::MAX).await {
                    return ended(error);
                }
                let refusal = Refusal::new(kind, wire::message(&text));
                if let Err(error) = shared.refused(request, refusal) {
                    return error;
                }
            }
            ResponseHead::Goodbye { kind, .. } => {
                let mut text = vec![0; body_bytes];
                if let Err(error) = input.fill(&mut text, 0).await {
                    return ended(error);
                }
                return farewell(&shared.peer, kind, wire::message(&text));
            }
        }
    }
}

/// Sends what is outgoing until the connection ends.
async fn transmit(shared: &Shared, half: WriteHalf) -> TransferError {
    // How long the server may leave requests unread is for the deadlines to say.
    const STALL_TIMEOUT: Duration = Duration::from_secs(3600);
    let mut output = Output::new(half, STALL_TIMEOUT);
    loop {
        shared.wake.notified().await;
        let pieces = std::mem::take(
            &mut *shared
                .outgoing
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        if let Err(error) = output.send(&mut slices).await {
            return TransferError::Closed {
                peer: shared.peer.clone(),
                reason: error.to_string(),
            };
        }
    }
}

/// Closes the connection when one of its tasks goes, in whatever way: a runtime that ends takes its
/// tasks with it, and whoever waits may be on another one.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.close(TransferError::Closed {
            peer: self.0.peer.clone(),
            reason: "the task that served it has ended".to_string(),
        });
    }
}

impl TcpLink {
    /// A link over a stream whose hellos were exchanged.
    pub(crate) fn start(
        peer: String,
        halves: Halves,
        limits: FrameLimits,
        pool: BlockPool,
    ) -> Self {
        let shared = Arc::new(Shared {
            peer,
            limits,
            pool,
            table: Mutex::default(),
            outgoing: Mutex::default(),
            wake: Notify::new(),
            ended: Notify::new(),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            received_bytes: AtomicU64::new(0),
            outstanding_bytes: AtomicU64::new(0),
        });
        let (read, write) = halves;
        let receiver = shared.clone();
        let receiver = tokio::spawn(async move {
            let ending = Ending(receiver);
            let error = receive(&ending.0, read).await;
            ending.0.close(error);
        });
        let transmitter = shared.clone();
        let transmitter = tokio::spawn(async move {
            let ending = Ending(transmitter);
            tokio::select! {
                error = transmit(&ending.0, write) => ending.0.close(error),
                // The half is dropped, and with it the socket.
                () = ending.0.ended.notified() => {}
            }
        });
        Self {
            shared,
            tasks: [receiver.abort_handle(), transmitter.abort_handle()],
        }
    }
}

/// The `READS` frames of `reads`, of numbers from `first` on: as few as incarnations and the limit
/// of rows allow.
fn frames(first: u64, reads: &[Read]) -> Vec<Bytes> {
    let mut request = first;
    reads
        .chunk_by(|a, b| a.segment.incarnation == b.segment.incarnation)
        .flat_map(|run| run.chunks(wire::READS_PER_FRAME_MAX as usize))
        .map(|some| {
            let rows: Vec<ReadRow> = some
                .iter()
                .map(|read| ReadRow {
                    segment: read.segment.segment,
                    offset: read.offset,
                    length: read.length,
                })
                .collect();
            let frame = wire::reads_frame(request, some[0].segment.incarnation, &rows);
            request += rows.len() as u64;
            frame.into()
        })
        .collect()
}

impl Link for TcpLink {
    fn submit(&self, reads: Vec<Read>, _deadline: Instant) -> Outcomes {
        let shared = &self.shared;
        let (sender, outcomes) = mpsc::unbounded_channel();
        let limit = shared.limits.read_bytes_max;
        let (within, over): (Vec<_>, Vec<_>) = reads
            .into_iter()
            .enumerate()
            .partition(|(_, read)| (1..=limit).contains(&read.length));
        for (place, read) in &over {
            let error = TransferError::TooLarge {
                what: "read",
                found: read.length,
                limit,
            };
            let _ = sender.send((*place, Err(error)));
        }
        let first = {
            let mut table = shared.table();
            if let Some(error) = &table.closed {
                let error = error.clone();
                let places: Vec<usize> = within.iter().map(|(place, _)| *place).collect();
                return stream::iter(places)
                    .map(move |place| (place, Err(error.clone())))
                    .chain(Received::over(outcomes))
                    .boxed();
            }
            let first = table.next;
            table.next += within.len() as u64;
            for (request, (place, read)) in (first..).zip(&within) {
                let open = Open::Read {
                    length: read.length,
                    place: *place,
                    sender: sender.clone(),
                };
                table.open.insert(request, open);
            }
            first
        };
        let bytes: u64 = within.iter().map(|(_, read)| read.length).sum();
        shared.outstanding_bytes.fetch_add(bytes, Ordering::Relaxed);
        let asked: Vec<Read> = within.iter().map(|(_, read)| *read).collect();
        shared.send(frames(first, &asked));
        Received {
            outcomes,
            taking_back: Some(TakingBack {
                shared: shared.clone(),
                first,
                count: u32::try_from(asked.len()).unwrap_or(u32::MAX),
            }),
        }
        .boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        _deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        let shared = self.shared.clone();
        async move {
            let limit = shared.limits.call_bytes_max;
            if body.len() as u64 > limit {
                return Err(TransferError::TooLarge {
                    what: "body of a call",
                    found: body.len() as u64,
                    limit,
                });
            }
            // Never closed.
            let _permit = shared.calls.clone().acquire_owned().await;
            let (sender, answer) = oneshot::channel();
            let request = {
                let mut table = shared.table();
                if let Some(error) = &table.closed {
                    return Err(error.clone());
                }
                let request = table.next;
                table.next += 1;
                table.open.insert(request, Open::Call(sender));
                request
            };
            let header = FrameHeader::new(FrameKind::Call, method, request, body.len() as u64);
            shared.send([Bytes::copy_from_slice(&header.to_bytes()), body]);
            let taking_back = TakingBack {
                shared: shared.clone(),
                first: request,
                count: 1,
            };
            let answer = answer.await.unwrap_or_else(|_dropped| {
                Err(TransferError::Closed {
                    peer: shared.peer.clone(),
                    reason: "it ended without an answer".to_string(),
                })
            });
            taking_back.not();
            answer
        }
        .boxed()
    }

    fn received_bytes(&self) -> u64 {
        self.shared.received_bytes.load(Ordering::Relaxed)
    }

    fn outstanding_bytes(&self) -> u64 {
        self.shared.outstanding_bytes.load(Ordering::Relaxed)
    }

    fn is_closed(&self) -> bool {
        self.shared.table().closed.is_some()
    }

    fn close(&self, reason: &str) {
        self.shared.close(TransferError::Closed {
            peer: self.shared.peer.clone(),
            reason: reason.to_string(),
        });
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close("it is no longer used");
    }
}

/// Takes requests back when dropped.
struct TakingBack {
    shared: Arc<Shared>,
    first: u64,
    count: u32,
}

impl TakingBack {
    /// There is nothing left to take back.
    fn not(mut self) {
        self.count = 0;
    }
}

impl Drop for TakingBack {
    fn drop(&mut self) {
        if self.count > 0 {
            self.shared.take_back(self.first, self.count);
        }
    }
}

/// Outcomes as they are received.
struct Received {
    outcomes: mpsc::UnboundedReceiver<(usize, Result<Block>)>,
    taking_back: Option<TakingBack>,
}

impl Received {
    /// Outcomes that need nothing more from the connection.
    fn over(outcomes: mpsc::UnboundedReceiver<(usize, Result<Block>)>) -> Self {
        Self {
            outcomes,
            taking_back: None,
        }
    }
}

impl Stream for Received {
    type Item = (usize, Result<Block>);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.outcomes.poll_recv(context);
        if let Poll::Ready(None) = polled
            && let Some(taking_back) = self.taking_back.take()
        {
            taking_back.not();
        }
        polled
    }
}
