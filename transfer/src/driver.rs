//! What happens to a batch: reads wait for budget, go out in groups over a path, and those whose
//! path fails go out again over another one. `docs/transfer.md` has the states.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt, StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::client::{ClientState, PeerAddress};
use crate::error::{ErrorKind, Result, TransferError};
use crate::memory::Block;
use crate::path::{Lane, Path};
use crate::transport::{Link, Read};
use crate::wrap::passed;

/// How often one batch uses a path: once more after its link failed, because a peer that was
/// started again answers on a new one.
const TRIES_PER_PATH: u32 = 2;
/// Bytes of reads that go out over one link together, so that a large batch spreads over several.
const GROUP_BYTES: u64 = 16 << 20;
/// Reads that go out together at most.
const GROUP_READS: usize = crate::wire::READS_PER_FRAME_MAX as usize;

/// Which paths are left to try.
#[derive(Debug)]
pub(crate) struct Choice {
    paths: Vec<Arc<Path>>,
    tries: Vec<u32>,
    last_error: Option<TransferError>,
}

/// A path that was chosen, and how long to wait for its link.
pub(crate) struct Chosen {
    pub(crate) number: usize,
    pub(crate) path: Arc<Path>,
    wait_until: Instant,
}

impl Choice {
    pub(crate) fn new(paths: Vec<Arc<Path>>) -> Self {
        Self {
            tries: vec![0; paths.len()],
            paths,
            last_error: None,
        }
    }

    fn usable(&self, now: Instant) -> impl Iterator<Item = usize> {
        (0..self.paths.len()).filter(move |&number| {
            self.tries[number] < TRIES_PER_PATH && self.paths[number].left_for(now).is_none()
        })
    }

    /// The next path. While another one remains, only half of the time goes into waiting for it.
    pub(crate) fn pick(&self, peer: &str, deadline: Instant) -> Result<Chosen> {
        let now = Instant::now();
        let mut usable = self.usable(now);
        let Some(number) = usable.next() else {
            return Err(self.none_left(peer, now));
        };
        let time = deadline.saturating_duration_since(now);
        let wait = if usable.next().is_some() {
            time / 2
        } else {
            time
        };
        Ok(Chosen {
            number,
            path: self.paths[number].clone(),
            wait_until: now + wait,
        })
    }

    fn none_left(&self, peer: &str, now: Instant) -> TransferError {
        if let Some(error) = &self.last_error {
            return error.clone();
        }
        let reasons: Vec<String> = self
            .paths
            .iter()
            .map(|path| {
                let left = path.left_for(now).unwrap_or(Duration::ZERO);
                let last = path.statistics().last_error.unwrap_or_default();
                format!(
                    "{} is left alone for {} ms after: {last}",
                    path.address,
                    left.as_millis()
                )
            })
            .collect();
        TransferError::Unreachable {
            peer: format!("peer {peer}"),
            reason: if reasons.is_empty() {
                "it has no address".to_string()
            } else {
                reasons.join("; ")
            },
        }
    }

    /// A path's link failed, or could not be had.
    pub(crate) fn failed(
        &mut self,
        number: usize,
        link: Option<&Arc<dyn Link>>,
        error: &TransferError,
    ) {
        self.tries[number] += 1;
        match link {
            // A link that never brought anything says something about its path.
            Some(link) if link.received_bytes() == 0 => self.paths[number].failed(),
            Some(_) => {}
            None => self.tries[number] = TRIES_PER_PATH,
        }
        self.last_error = Some(error.clone());
    }
}

impl Chosen {
    /// The path's link.
    pub(crate) async fn link(&self, lane: Lane) -> Result<Arc<dyn Link>> {
        let started = Instant::now();
        match tokio::time::timeout_at(self.wait_until.into(), self.path.link(lane)).await {
            Ok(link) => link,
            Err(_elapsed) => Err(passed(&self.path.label(), started)),
        }
    }
}

/// Reads that went out together.
#[derive(Debug)]
struct Group {
    path_number: usize,
    path: Arc<Path>,
    link: Option<Arc<dyn Link>>,
    received_before: u64,
    failed: bool,
}

enum Event {
    Linked(usize, Arc<dyn Link>),
    Outcome(usize, usize, Result<Block>),
}

/// Carries out one batch.
pub(crate) struct Driver {
    client: Arc<ClientState>,
    peer: PeerAddress,
    reads: Vec<Read>,
    permits: Vec<Option<OwnedSemaphorePermit>>,
    deadline: Instant,
    started: Instant,
    sender: mpsc::UnboundedSender<(usize, Result<Block>)>,
    queue: VecDeque<usize>,
    choice: Choice,
    groups: Vec<Group>,
    running: SelectAll<BoxStream<'static, Event>>,
}

impl Driver {
    pub(crate) fn new(
        client: Arc<ClientState>,
        peer: PeerAddress,
        reads: Vec<Read>,
        deadline: Instant,
        sender: mpsc::UnboundedSender<(usize, Result<Block>)>,
    ) -> Self {
        Self {
            permits: reads.iter().map(|_| None).collect(),
            queue: VecDeque::with_capacity(reads.len()),
            choice: Choice::new(client.paths_to(&peer)),
            client,
            peer,
            reads,
            deadline,
            started: Instant::now(),
            sender,
            groups: Vec::new(),
            running: SelectAll::new(),
        }
    }

    pub(crate) async fn run(mut self) {
        self.admit();
        let budget = self.client.budget.clone();
        let deadline = tokio::time::sleep_until(self.deadline.into());
        tokio::pin!(deadline);
        let mut waiting = None;
        loop {
            if waiting.is_none()
                && let Some(&next) = self.queue.front()
            {
                let permits = self.client.permits(self.reads[next].length);
                waiting = Some(budget.clone().acquire_many_owned(permits).boxed());
            }
            if waiting.is_none() && self.running.is_empty() {
                return;
            }
            tokio::select! {
                biased;
                event = self.running.next(), if !self.running.is_empty() => {
                    if let Some(event) = event {
                        self.handle(event);
                    }
                }
                permit = async { waiting.as_mut().expect("guarded").await }, if waiting.is_some() => {
                    waiting = None;
                    // The budget is never closed.
                    if let Ok(permit) = permit {
                        self.send_group(permit);
                    }
                }
                () = &mut deadline, if !self.queue.is_empty() => {
                    waiting = None;
                    self.fail_queue(&passed(&format!("peer {}", self.peer.id), self.started));
                }
            }
        }
    }

    /// Queues what is within the limits and ends the rest.
    fn admit(&mut self) {
        let limit = self.client.settings.read_bytes_max;
        for index in 0..self.reads.len() {
            let length = self.reads[index].length;
            if (1..=limit).contains(&length) {
                self.queue.push_back(index);
            } else {
                let error = TransferError::TooLarge {
                    what: if length == 0 { "empty read" } else { "read" },
                    found: length,
                    limit,
                };
                self.finish(index, Err(error));
            }
        }
    }

    fn lane(&self, index: usize) -> Lane {
        if self.reads[index].length >= self.client.settings.bulk_bytes_min {
            Lane::Bulk
        } else {
            Lane::Small
        }
    }

    /// Sends the first of the queue, whose permit is here, and with it what else may go now.
    fn send_group(&mut self, permit: OwnedSemaphorePermit) {
        if Instant::now() >= self.deadline {
            let error = passed(&format!("peer {}", self.peer.id), self.started);
            return self.fail_queue(&error);
        }
        let chosen = match self.choice.pick(&self.peer.id, self.deadline) {
            Ok(chosen) => chosen,
            Err(error) => return self.fail_queue(&error),
        };
        let Some(first) = self.queue.pop_front() else {
            return;
        };
        let lane = self.lane(first);
        let mut bytes = self.reads[first].length;
        self.permits[first] = Some(permit);
        let mut members = vec![first];
        while let Some(&next) = self.queue.front() {
            let length = self.reads[next].length;
            if members.len() == GROUP_READS
                || bytes + length > GROUP_BYTES
                || self.lane(next) != lane
            {
                break;
            }
            let permits = self.client.permits(length);
            let Ok(permit) = self.client.budget.clone().try_acquire_many_owned(permits) else {
                break;
            };
            self.permits[next] = Some(permit);
            self.queue.pop_front();
            members.push(next);
            bytes += length;
        }
        let group = self.groups.len();
        self.groups.push(Group {
            path_number: chosen.number,
            path: chosen.path.clone(),
            link: None,
            received_before: 0,
            failed: false,
        });
        let reads: Vec<Read> = members.iter().map(|&index| self.reads[index]).collect();
        let deadline = self.deadline;
        let events = async move {
            match chosen.link(lane).await {
                Ok(link) => {
                    let linked = stream::iter([Event::Linked(group, link.clone())]);
                    let outcomes = link.submit(reads, deadline).map(move |(place, outcome)| {
                        Event::Outcome(group, members[place], outcome)
                    });
                    linked.chain(outcomes).boxed()
                }
                Err(error) => stream::iter(members)
                    .map(move |index| Event::Outcome(group, index, Err(error.clone())))
                    .boxed(),
            }
        };
        self.running.push(events.into_stream().flatten().boxed());
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Linked(group, link) => {
                self.groups[group].received_before = link.received_bytes();
                self.groups[group].link = Some(link);
            }
            Event::Outcome(group, index, outcome) => {
                let outcome = match outcome {
                    Err(error) => match self.path_failure(group, index, error) {
                        Some(error) => Err(error),
                        None => return,
                    },
                    Ok(block) => {
                        let path = &self.groups[group].path;
                        path.succeeded();
                        // A link may have handed the read to the transport below it.
                        let via = block.via().unwrap_or(path.transport().kind());
                        Ok(block.came_via(via))
                    }
                };
                self.finish(index, outcome);
            }
        }
    }

    /// Takes a failure that is the path's down against it and asks again elsewhere; gives the
    /// error back where that would not help.
    fn path_failure(
        &mut self,
        group: usize,
        index: usize,
        error: TransferError,
    ) -> Option<TransferError> {
        let group = &mut self.groups[group];
        let first = !std::mem::replace(&mut group.failed, true);
        if error.kind() == ErrorKind::Deadline && group.link.is_some() {
            if first && let Some(link) = &group.link {
                group.path.stalled(link, group.received_before);
            }
            return Some(error);
        }
        let elsewhere = error.is_of_the_path() || group.link.is_none();
        if first && elsewhere {
            self.choice
                .failed(group.path_number, group.link.as_ref(), &error);
        }
        if !elsewhere || Instant::now() >= self.deadline {
            return Some(error);
        }
        self.permits[index] = None;
        self.queue.push_back(index);
        None
    }

    fn fail_queue(&mut self, error: &TransferError) {
        while let Some(index) = self.queue.pop_front() {
            self.finish(index, Err(error.clone()));
        }
    }

    fn finish(&mut self, index: usize, outcome: Result<Block>) {
        self.permits[index] = None;
        // Whoever dropped the batch aborts this task as well.
        let _ = self.sender.send((index, outcome));
    }
}
