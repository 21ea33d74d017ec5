//! The server's end of a connection: one task understands requests, one sends the answers, and each
//! call has its own.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::task::{AbortHandle, JoinSet};

use crate::error::{Refusal, RefusalKind};
use crate::segment::{Segment, SegmentKey};
use crate::tcp::io::{Halves, Input, Output};
use crate::tcp::serve::Serving;
use crate::transport::{PeerIdentity, RESERVED_METHODS};
use crate::wire::{self, FrameHeader, FrameKind, FrameLimits, ReadRow, RequestHead};

/// Answers that wait on one connection before no more requests are read from it.
const REPLIES_MAX: usize = 16 * 1024;
/// Bytes and answers that go out together.
const RUN_BYTES: u64 = 256 << 10;
const RUN_REPLIES: usize = 256;

/// How long a client has to read a goodbye and close.
const LINGER: Duration = Duration::from_millis(200);

/// An answer that waits to be sent.
enum Reply {
    Data {
        request: u64,
        segment: Segment,
        offset: u64,
        length: u64,
    },
    Answer {
        request: u64,
        body: Bytes,
    },
    Refused {
        request: u64,
        refusal: Refusal,
    },
    /// Nothing after it.
    Goodbye(Refusal),
}

#[derive(Default)]
struct Queue {
    replies: VecDeque<Reply>,
    /// A goodbye is queued: nothing more is.
    ending: bool,
    calls: HashMap<u64, AbortHandle>,
}

/// What the tasks of a connection share.
#[derive(Default)]
struct Session {
    queue: Mutex<Queue>,
    /// Told of new replies.
    filled: Notify,
    /// Told when replies have gone.
    drained: Notify,
}

impl Session {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reply(&self, replies: impl IntoIterator<Item = Reply>) {
        let mut queue = self.queue();
        if !queue.ending {
            queue.replies.extend(replies);
            self.filled.notify_one();
        }
    }

    fn end(&self, refusal: Refusal) {
        let mut queue = self.queue();
        if !queue.ending {
            queue.ending = true;
            queue.replies.push_back(Reply::Goodbye(refusal));
            self.filled.notify_one();
        }
    }

    /// Waits until there is room for more replies.
    async fn room(&self) {
        while self.queue().replies.len() >= REPLIES_MAX {
            self.drained.notified().await;
        }
    }

    /// The next replies that go out together: many small ones, or a large one.
    async fn next_run(&self) -> Vec<Reply> {
        loop {
            let run = take_run(&mut self.queue().replies);
            if !run.is_empty() {
                self.drained.notify_one();
                return run;
            }
            self.filled.notified().await;
        }
    }

    fn take_back(&self, requests: &Range<u64>) {
        let mut queue = self.queue();
        for reply in &mut queue.replies {
            if let Reply::Data { request, .. } = reply
                && requests.contains(request)
            {
                *reply = Reply::Refused {
                    request: *request,
                    refusal: taken_back(),
                };
            }
        }
        let calls: Vec<u64> = queue
            .calls
            .keys()
            .filter(|request| requests.contains(request))
            .copied()
            .collect();
        for request in calls {
            // Whoever removes the call answers it.
            if let Some(call) = queue.calls.remove(&request) {
                call.abort();
                queue.replies.push_back(Reply::Refused {
                    request,
                    refusal: taken_back(),
                });
            }
        }
        drop(queue);
        self.filled.notify_one();
    }
}

fn taken_back() -> Refusal {
    Refusal::new(RefusalKind::Cancelled, "the request was taken back")
}

fn reply_bytes(reply: &Reply) -> u64 {
    match reply {
        Reply::Data { length, .. } => *length,
        Reply::Answer { body, .. } => body.len() as u64,
        Reply::Refused { refusal, .. } | Reply::Goodbye(refusal) => refusal.message.len() as u64,
    }
}

fn take_run(replies: &mut VecDeque<Reply>) -> Vec<Reply> {
    let mut run = Vec::new();
    let mut bytes = 0;
    while let Some(next) = replies.front() {
        bytes += reply_bytes(next);
        if !run.is_empty() && (bytes > RUN_BYTES || run.len() == RUN_REPLIES) {
            break;
        }
        run.extend(replies.pop_front());
    }
    run
}

/// Serves one connection until it ends. `stop` ends it in order.
pub(crate) async fn serve(
    serving: Arc<Serving>,
    peer: PeerIdentity,
    halves: Halves,
    stop: impl Future<Output = ()>,
) {
    let (read, write) = halves;
    let session = Arc::new(Session::default());
    let mut input = Input::new(read, |_| {});
    let mut output = Output::new(write, serving.settings.stall_timeout);
    let requests = async {
        match understand(&serving, &session, &peer, &mut input).await {
            Ok(()) => return,
            Err(Ended::Stream(error)) => {
                tracing::debug!(%peer, %error, "a connection ended in the middle of a frame");
                return;
            }
            Err(Ended::Broken(refusal)) => {
                tracing::warn!(%peer, reason = %refusal, "a client broke the protocol");
                session.end(refusal);
            }
        }
        // Unread bytes would reset the connection before the goodbye is read.
        let _ = input.skip(u64::MAX).await;
    };
    let answers = transmit(&serving, &session, &mut output);
    tokio::pin!(requests, answers, stop);
    let mut stopping = false;
    loop {
        tokio::select! {
            () = &mut requests => break,
            sent = &mut answers => {
                match sent {
                    Ok(()) => {
                        let _ = tokio::time::timeout(LINGER, &mut requests).await;
                    }
                    Err(error) => {
                        tracing::debug!(%peer, %error, "a connection ended while answers were sent");
                    }
                }
                break;
            }
            () = &mut stop, if !stopping => {
                stopping = true;
                session.end(Refusal::new(RefusalKind::Stopping, "the server is stopping"));
            }
        }
    }
    for (_, call) in session.queue().calls.drain() {
        call.abort();
    }
}

/// Why requests are no longer understood.
enum Ended {
    /// The stream broke.
    Stream(io::Error),
    /// The client broke the protocol.
    Broken(Refusal),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}

impl From<wire::WireError> for Ended {
    fn from(error: wire::WireError) -> Self {
        Self::Broken(Refusal::new(RefusalKind::Protocol, error.to_string()))
    }
}

/// Understands requests until the client closes.
async fn understand<R: Fn(usize)>(
    serving: &Arc<Serving>,
    session: &Arc<Session>,
    peer: &PeerIdentity,
    input: &mut Input<R>,
) -> Result<(), Ended> {
    let limits = serving.limits();
    let mut calls = JoinSet::new();
    while let Some(header) = input.take::<{ FrameHeader::BYTES }>().await? {
        session.room().await;
        while calls.try_join_next().is_some() {}
        match RequestHead::parse(&header, limits)? {
            RequestHead::Reads {
                first,
                rows,
                incarnation,
            } => {
                let mut body = vec![0; rows as usize * ReadRow::BYTES];
                input.fill(&mut body, usize::MAX).await?;
                session.reply(resolve(serving, limits, first, incarnation, &body)?);
            }
            RequestHead::Call {
                request,
                method,
                body_bytes,
            } => {
                let permits = serving.admit_call(body_bytes, session.queue().calls.len());
                let permit = match permits {
                    Ok(permit) => permit,
                    Err(refusal) => {
                        input.skip(body_bytes).await?;
                        session.reply([Reply::Refused { request, refusal }]);
                        continue;
                    }
                };
                // Within its limit.
                let mut body = vec![0; usize::try_from(body_bytes).unwrap_or(0)];
                input.fill(&mut body, usize::MAX).await?;
                let call = Call {
                    request,
                    method,
                    body: body.into(),
                    permit,
                };
                start_call(serving, session, peer, &mut calls, call)?;
            }
            RequestHead::Cancel { first, count } => {
                session.take_back(&(first..first + u64::from(count)));
            }
        }
    }
    Ok(())
}

/// What is to be said to the rows of a frame.
fn resolve(
    serving: &Serving,
    limits: FrameLimits,
    first: u64,
    incarnation: u64,
    body: &[u8],
) -> Result<Vec<Reply>, wire::WireError> {
    let mut last: Option<(u64, Result<Segment, Refusal>)> = None;
    let mut resolve_row = |request: u64, row: ReadRow| {
        let key = SegmentKey {
            incarnation,
            segment: row.segment,
        };
        if !(1..=limits.read_bytes_max).contains(&row.length) {
            return Err(Refusal::too_large(
                "read",
                row.length,
                limits.read_bytes_max,
            ));
        }
        let opened = match &last {
            Some((segment, opened)) if *segment == row.segment => opened.clone(),
            _ => {
                let opened = serving.segments.open(key);
                last = Some((row.segment, opened.clone()));
                opened
            }
        };
        let segment = opened?;
        if segment.range(row.offset, row.length).is_none() {
            let segment_bytes = segment.bytes().len() as u64;
            return Err(Refusal::out_of_range(
                key,
                row.offset,
                row.length,
                segment_bytes,
            ));
        }
        Ok(Reply::Data {
            request,
            segment,
            offset: row.offset,
            length: row.length,
        })
    };
    let replies = (first..).zip(wire::parse_rows(body)?);
    Ok(replies
        .map(|(request, row)| {
            resolve_row(request, row).unwrap_or_else(|refusal| Reply::Refused { request, refusal })
        })
        .collect())
}

struct Call {
    request: u64,
    method: u16,
    body: Bytes,
    /// Its body's share of the memory for calls.
    permit: OwnedSemaphorePermit,
}

fn start_call(
    serving: &Arc<Serving>,
    session: &Arc<Session>,
    peer: &PeerIdentity,
    calls: &mut JoinSet<()>,
    call: Call,
) -> Result<(), Ended> {
    let (serving, peer) = (serving.clone(), peer.clone());
    let answering = session.clone();
    let request = call.request;
    // Held while the task is entered, so that it cannot end before it is known.
    let mut queue = session.queue();
    if queue.calls.contains_key(&request) {
        return Err(Ended::Broken(Refusal::new(
            RefusalKind::Protocol,
            format!("request {request} is open already"),
        )));
    }
    let task = calls.spawn(async move {
        let handler = if call.method >= RESERVED_METHODS {
            &serving.reserved
        } else {
            &serving.calls
        };
        let answer = handler.call(&peer, call.method, call.body).await;
        drop(call.permit);
        let limit = serving.limits().call_bytes_max;
        let reply = match answer {
            Ok(body) if body.len() as u64 <= limit => Reply::Answer { request, body },
            Ok(body) => Reply::Refused {
                request,
                refusal: Refusal::too_large("answer", body.len() as u64, limit),
            },
            Err(refusal) => Reply::Refused { request, refusal },
        };
        serving.statistics.calls.fetch_add(1, Ordering::Relaxed);
        let open = answering.queue().calls.remove(&request).is_some();
        if open {
            answering.reply([reply]);
        }
    });
    queue.calls.insert(request, task);
    Ok(())
}

/// Sends answers until a goodbye.
async fn transmit(serving: &Serving, session: &Session, output: &mut Output) -> io::Result<()> {
    loop {
        let run = session.next_run().await;
        let last = send_run(serving, &run, output).await?;
        if last {
            output.finish().await;
            return Ok(());
        }
    }
}

/// Sends a run of answers; whether a goodbye was the last.
async fn send_run(serving: &Serving, run: &[Reply], output: &mut Output) -> io::Result<bool> {
    let statistics = &serving.statistics;
    let mut last = false;
    let heads: Vec<Bytes> = run
        .iter()
        .map(|reply| match reply {
            Reply::Data {
                request, length, ..
            } => Bytes::copy_from_slice(
                &FrameHeader::new(FrameKind::Data, 0, *request, *length).to_bytes(),
            ),
            Reply::Answer { request, body } => {
                let bytes = body.len() as u64;
                Bytes::copy_from_slice(
                    &FrameHeader::new(FrameKind::Answer, 0, *request, bytes).to_bytes(),
                )
            }
            Reply::Refused { request, refusal } => {
                statistics.refusals.fetch_add(1, Ordering::Relaxed);
                wire::refusal_frame(FrameKind::Refused, *request, refusal).into()
            }
            Reply::Goodbye(refusal) => {
                last = true;
                wire::refusal_frame(FrameKind::Goodbye, 0, refusal).into()
            }
        })
        .collect();
    let mut slices = Vec::with_capacity(2 * run.len());
    let (mut reads, mut bytes) = (0, 0);
    for (head, reply) in heads.iter().zip(run) {
        slices.push(IoSlice::new(head));
        match reply {
            Reply::Data {
                segment,
                offset,
                length,
                ..
            } => {
                // Inside of the segment since it was resolved.
                let range = segment.range(*offset, *length).unwrap_or_default();
                reads += 1;
                bytes += *length;
                slices.push(IoSlice::new(range));
            }
            Reply::Answer { body, .. } => slices.push(IoSlice::new(body)),
            Reply::Refused { .. } | Reply::Goodbye(_) => {}
        }
    }
    output.send(&mut slices).await?;
    statistics.reads.fetch_add(reads, Ordering::Relaxed);
    statistics.bytes.fetch_add(bytes, Ordering::Relaxed);
    Ok(last)
}
