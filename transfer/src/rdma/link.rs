//! The asking end: a link whose reads a device carries out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, stream};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::RdmaSettings;
use super::pool::ReceivePool;
use super::verbs::{
    self, CmId, Completion, CompletionQueue, Connection, DeviceName, Event, EventChannel,
    EventKind, Landing, ProtectionDomain, RemoteRange, VerbsError,
};
use super::wire::{self, Grant};
use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::memory::Block;
use crate::segment::SegmentKey;
use crate::transport::{Link, Outcomes, Read, Transport, TransportKind};

/// How long each step of connecting may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the peer may take to register segments.
const GRANT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a session lasts at most; whoever goes on opens another one.
const HOLD_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How long a peer without RDMA is believed to have none.
const WITHOUT_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests that a connection holds at most; the rest waits here.
const REQUESTS_MAX: u32 = 256;
/// Bytes of one request at most. Larger reads are several: any device takes this much, and what
/// failed is noticed in time.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Reads over RDMA; everything else, and setting up, over another transport.
#[derive(Debug)]
pub struct Rdma {
    below: Arc<dyn Transport>,
    settings: RdmaSettings,
    devices: Mutex<HashMap<DeviceName, Weak<Device>>>,
    /// Peers that said that they have no RDMA, and when they did.
    without: Mutex<HashMap<String, Instant>>,
}

/// A device of this host, as far as links share it.
#[derive(Debug)]
struct Device {
    domain: Arc<ProtectionDomain>,
    pool: ReceivePool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rdma {
    /// RDMA beside `below`; `None` where the settings do not allow it or this host has no device.
    pub fn new(settings: RdmaSettings, below: Arc<dyn Transport>) -> Option<Self> {
        if !settings.enabled || verbs::devices().is_empty() {
            return None;
        }
        Some(Self {
            below,
            settings,
            devices: Mutex::default(),
            without: Mutex::default(),
        })
    }

    fn check_known_without(&self, address: &str) -> Result<()> {
        let mut without = locked(&self.without);
        match without.get(address) {
            Some(since) if since.elapsed() < WITHOUT_TIMEOUT => Err(TransferError::Unreachable {
                peer: address.to_string(),
                reason: "it has no RDMA".to_string(),
            }),
            Some(_) => {
                without.remove(address);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The device that `id` is bound to.
    fn device(&self, id: &Arc<CmId>) -> Result<Arc<Device>, VerbsError> {
        let mut devices = locked(&self.devices);
        let name = id.device();
        if let Some(device) = name.and_then(|name| devices.get(&name)?.upgrade()) {
            return Ok(device);
        }
        let domain = ProtectionDomain::new(id)?;
        let device = Arc::new(Device {
            pool: ReceivePool::new(domain.clone(), self.settings.receive_bytes_max),
            domain,
        });
        if let Some(name) = name {
            devices.insert(name, Arc::downgrade(&device));
        }
        Ok(device)
    }

    /// Connects to the connection manager at `address` with the private data.
    pub(super) async fn connect_device(
        &self,
        address: SocketAddr,
        private_data: &[u8],
    ) -> Result<Connected, String> {
        let failed = |error: VerbsError| error.to_string();
        let events = Events::new().map_err(failed)?;
        let id = Arc::new(CmId::new(events.channel()).map_err(failed)?);
        let step_ms = i32::try_from(STEP_TIMEOUT.as_millis()).unwrap_or(i32::MAX);
        id.resolve_address(address, step_ms).map_err(failed)?;
        events.wait_for(EventKind::AddressResolved).await?;
        id.resolve_route(step_ms).map_err(failed)?;
        events.wait_for(EventKind::RouteResolved).await?;
        let device = self.device(&id).map_err(failed)?;
        let requests = device.domain.limits().requests.min(REQUESTS_MAX);
        let queue = CompletionQueue::new(&device.domain, requests).map_err(failed)?;
        let notices = queue.clone().watch().map_err(failed)?;
        let connection =
            Connection::new(id, device.domain.clone(), queue, requests).map_err(failed)?;
        connection.connect(private_data).map_err(failed)?;
        events.wait_for(EventKind::Established).await?;
        Ok(Connected {
            connection,
            notices,
            events,
            device,
            requests,
        })
    }
}

#[async_trait]
impl Transport for Rdma {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    async fn connect(&self, address: &str) -> Result<Arc<dyn Link>> {
        self.check_known_without(address)?;
        let unreachable = |reason: String| TransferError::Unreachable {
            peer: address.to_string(),
            reason,
        };
        let control = self.below.connect(address).await?;
        let opened = control
            .call(
                wire::METHOD_OPEN,
                Bytes::copy_from_slice(&wire::open_request()),
                Instant::now() + STEP_TIMEOUT,
            )
            .await;
        let opened = match opened {
            Ok(body) => {
                wire::parse_open_answer(&body).map_err(|error| TransferError::Protocol {
                    peer: address.to_string(),
                    reason: error.to_string(),
                })?
            }
            Err(error) => {
                if let TransferError::Refused { refusal, .. } = &error
                    && refusal.kind == RefusalKind::UnknownMethod
                {
                    locked(&self.without).insert(address.to_string(), Instant::now());
                }
                return Err(unreachable(format!("no session for RDMA: {error}")));
            }
        };
        let token = wire::Token([opened.token_a, opened.token_b]);
        let private_data = wire::connect_data(token);
        let hosts = tokio::net::lookup_host(address)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let mut reasons = Vec::new();
        for mut host in hosts {
            host.set_port(opened.port);
            match self.connect_device(host, &private_data).await {
                Ok(connected) => {
                    let below = (control, self.below.kind());
                    return Ok(RdmaLink::start(address, below, opened.session, connected));
                }
                Err(reason) => reasons.push(format!("{host}: {reason}")),
            }
        }
        Err(unreachable(reasons.join("; ")))
    }
}

/// The connection manager's events of one link.
#[derive(Debug)]
struct Events {
    channel: AsyncFd<Arc<EventChannel>>,
}

impl Events {
    fn new() -> Result<Self, VerbsError> {
        Ok(Self {
            channel: EventChannel::new()?.watch()?,
        })
    }

    fn channel(&self) -> &Arc<EventChannel> {
        self.channel.get_ref()
    }

    /// The next event.
    async fn next(&self) -> Result<Event, String> {
        loop {
            if let Some(event) = self.channel().next().map_err(|error| error.to_string())? {
                return Ok(event);
            }
            let mut guard = self
                .channel
                .readable()
                .await
                .map_err(|error| error.to_string())?;
            // What came since the look above would make the descriptor readable again only if it
            // had not been readable already.
            match self.channel().next().map_err(|error| error.to_string())? {
                Some(event) => return Ok(event),
                None => guard.clear_ready(),
            }
        }
    }

    /// The next event, which has to be this one.
    async fn wait_for(&self, kind: EventKind) -> Result<(), String> {
        match tokio::time::timeout(STEP_TIMEOUT, self.next()).await {
            Err(_elapsed) => Err(format!(
                "the connection manager did not report {kind:?} within {} ms",
                STEP_TIMEOUT.as_millis()
            )),
            Ok(event) => match event? {
                event if event.kind == kind => Ok(()),
                event => Err(event.describe()),
            },
        }
    }
}

/// A connection that was just made.
#[derive(Debug)]
pub(super) struct Connected {
    connection: Connection,
    notices: AsyncFd<Arc<CompletionQueue>>,
    events: Events,
    device: Arc<Device>,
    requests: u32,
}

type OutcomeSender = mpsc::UnboundedSender<(usize, Result<Block>)>;

/// A link of the transport below with a reliable connection beside it.
#[derive(Debug)]
struct RdmaLink {
    control: Arc<dyn Link>,
    /// What `control` is a link of.
    below: TransportKind,
    commands: mpsc::UnboundedSender<Command>,
    state: Arc<LinkState>,
}

#[derive(Debug)]
enum Command {
    Submit(Vec<(usize, Read)>, OutcomeSender),
    Close(String),
}

#[derive(Debug)]
struct LinkState {
    peer: String,
    /// By the device.
    received_bytes: AtomicU64,
    outstanding_bytes: AtomicU64,
    /// Why nothing more can be submitted.
    closed: Mutex<Option<String>>,
}

impl LinkState {
    fn closed_error(&self) -> TransferError {
        TransferError::Closed {
            peer: self.peer.clone(),
            reason: locked(&self.closed)
                .clone()
                .unwrap_or_else(|| "it ended".to_string()),
        }
    }
}

impl RdmaLink {
    fn start(
        address: &str,
        (control, below): (Arc<dyn Link>, TransportKind),
        session: u64,
        connected: Connected,
    ) -> Arc<dyn Link> {
        let state = Arc::new(LinkState {
            peer: address.to_string(),
            received_bytes: AtomicU64::new(0),
            outstanding_bytes: AtomicU64::new(0),
            closed: Mutex::default(),
        });
        let (commands, receiver) = mpsc::unbounded_channel();
        let engine = Engine {
            state: state.clone(),
            control: control.clone(),
            below,
            session,
            device: connected.device,
            connection: connected.connection,
            room: connected.requests as usize,
            grants: HashMap::new(),
            waiting: HashMap::new(),
            asking: FuturesUnordered::new(),
            queue: VecDeque::new(),
            running: HashMap::new(),
            requests: HashMap::new(),
            next_number: 0,
        };
        tokio::spawn(engine.run(receiver, connected.notices, connected.events));
        Arc::new(Self {
            control,
            below,
            commands,
            state,
        })
    }
}

impl Link for RdmaLink {
    fn submit(&self, reads: Vec<Read>, deadline: Instant) -> Outcomes {
        let (sender, mut outcomes) = mpsc::unbounded_channel();
        let mut by_device = Vec::with_capacity(reads.len());
        let (mut below, mut places) = (Vec::new(), Vec::new());
        for (index, read) in reads.into_iter().enumerate() {
            match read.checksum {
                // A length of zero is the other transport's to refuse.
                Some(_) if read.length > 0 => by_device.push((index, read)),
                _ => {
                    below.push(read);
                    places.push(index);
                }
            }
        }
        if !by_device.is_empty()
            && let Err(mpsc::error::SendError(Command::Submit(refused, sender))) =
                self.commands.send(Command::Submit(by_device, sender))
        {
            for (index, _) in refused {
                // The receiver is in this function.
                let _ = sender.send((index, Err(self.state.closed_error())));
            }
        }
        let outcomes = stream::poll_fn(move |context| outcomes.poll_recv(context));
        if below.is_empty() {
            return outcomes.boxed();
        }
        let kind = self.below;
        let below = self
            .control
            .submit(below, deadline)
            .map(move |(place, outcome)| {
                (places[place], outcome.map(|block| block.came_via(kind)))
            });
        stream::select(outcomes, below).boxed()
    }

    fn call(
        &self,
        method: u16,
        body: Bytes,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes>> {
        self.control.call(method, body, deadline)
    }

    fn received_bytes(&self) -> u64 {
        let by_device = self.state.received_bytes.load(Ordering::Relaxed);
        // As long as the link is open, whatever comes shows that the peer lives. Of one that ended
        // it counts whether the device ever brought anything: setting up always brings something.
        if by_device == 0 && self.is_closed() {
            return 0;
        }
        by_device + self.control.received_bytes()
    }

    fn outstanding_bytes(&self) -> u64 {
        self.state.outstanding_bytes.load(Ordering::Relaxed) + self.control.outstanding_bytes()
    }

    fn is_closed(&self) -> bool {
        locked(&self.state.closed).is_some() || self.control.is_closed()
    }

    fn close(&self, reason: &str) {
        locked(&self.state.closed).get_or_insert_with(|| reason.to_string());
        self.control.close(reason);
        // Where nobody takes it, everything has ended already.
        let _ = self.commands.send(Command::Close(reason.to_string()));
    }
}

/// A read that has no outcome yet.
#[derive(Debug)]
struct Job {
    index: usize,
    read: Read,
    sender: OutcomeSender,
}

/// A read that the device has, or has a part of.
#[derive(Debug)]
struct Running {
    job: Job,
    landing: Arc<Landing>,
    grant: Grant,
    /// Bytes of it that were asked for so far.
    asked: usize,
    /// Requests of it that have not ended.
    open: usize,
}

type Asked = BoxFuture<'static, (Vec<SegmentKey>, Result<Bytes>)>;

/// What happens on one connection. It ends with the first thing that fails, and all reads with it.
struct Engine {
    state: Arc<LinkState>,
    control: Arc<dyn Link>,
    /// What `control` is a link of.
    below: TransportKind,
    session: u64,
    device: Arc<Device>,
    connection: Connection,
    /// Requests that the connection still has room for.
    room: usize,
    grants: HashMap<SegmentKey, Grant>,
    /// Reads of segments that were asked for.
    waiting: HashMap<SegmentKey, Vec<Job>>,
    asking: FuturesUnordered<Asked>,
    /// Reads of segments that are granted.
    queue: VecDeque<Job>,
    running: HashMap<u64, Running>,
    /// Which read a request is of.
    requests: HashMap<u64, u64>,
    next_number: u64,
}

impl Engine {
    async fn run(
        mut self,
        mut commands: mpsc::UnboundedReceiver<Command>,
        notices: AsyncFd<Arc<CompletionQueue>>,
        events: Events,
    ) {
        let reason = match self.serve(&mut commands, &notices, &events).await {
            Ok(()) => "it is no longer used".to_string(),
            Err(reason) => reason,
        };
        self.end(&reason, &mut commands);
    }

    /// Carries out commands until nobody can give any more and all have ended.
    async fn serve(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        notices: &AsyncFd<Arc<CompletionQueue>>,
        events: &Events,
    ) -> Result<(), String> {
        let mut hold = self.hold();
        let mut usable = true;
        while usable || self.is_busy() {
            tokio::select! {
                command = commands.recv(), if usable => match command {
                    Some(Command::Submit(reads, sender)) => self.take(reads, &sender),
                    Some(Command::Close(reason)) => return Err(reason),
                    None => usable = false,
                },
                ready = notices.readable() => {
                    let mut ready = ready.map_err(|error| error.to_string())?;
                    // Quiet first: what ends after the look below wakes us again.
                    ready.clear_ready();
                    notices.get_ref().take_notices().map_err(|error| error.to_string())?;
                    self.complete()?;
                }
                event = events.next() => {
                    let event = event?;
                    if event.kind.is_the_end() && event.id == self.connection.name() {
                        return Err(event.describe());
                    }
                }
                Some((keys, answer)) = self.asking.next(), if !self.asking.is_empty() => {
                    self.granted(&keys, answer)?;
                }
                revoked = &mut hold => {
                    self.revoked(revoked)?;
                    hold = self.hold();
                }
            }
            self.post()?;
        }
        Ok(())
    }

    fn is_busy(&self) -> bool {
        !(self.waiting.is_empty() && self.queue.is_empty() && self.running.is_empty())
    }

    /// Waits for segments that the peer takes back. The session lasts as long as this call does.
    fn hold(&self) -> BoxFuture<'static, Result<Bytes>> {
        self.control.call(
            wire::METHOD_HOLD,
            wire::session_request(self.session, &[]).into(),
            Instant::now() + HOLD_TIMEOUT,
        )
    }

    fn revoked(&mut self, answer: Result<Bytes>) -> Result<(), String> {
        match answer {
            Ok(body) => {
                for key in wire::parse_keys(&body).map_err(|error| error.to_string())? {
                    self.grants.remove(&key);
                }
                Ok(())
            }
            Err(error) => Err(format!("the session ended: {error}")),
        }
    }

    /// Queues reads whose segments are granted, and asks for those of the others.
    fn take(&mut self, reads: Vec<(usize, Read)>, sender: &OutcomeSender) {
        let mut missing = HashSet::new();
        for (index, read) in reads {
            self.state
                .outstanding_bytes
                .fetch_add(read.length, Ordering::Relaxed);
            let job = Job {
                index,
                read,
                sender: sender.clone(),
            };
            let key = job.read.segment;
            if self.grants.contains_key(&key) {
                self.queue.push_back(job);
                continue;
            }
            let waiting = self.waiting.entry(key).or_default();
            if waiting.is_empty() {
                missing.insert(key);
            }
            waiting.push(job);
        }
        let missing: Vec<SegmentKey> = missing.into_iter().collect();
        for keys in missing.chunks(wire::KEYS_MAX as usize) {
            let keys = keys.to_vec();
            let answer = self.control.call(
                wire::METHOD_GRANT,
                wire::session_request(self.session, &keys).into(),
                Instant::now() + GRANT_TIMEOUT,
            );
            self.asking
                .push(async move { (keys, answer.await) }.boxed());
        }
    }

    fn granted(&mut self, keys: &[SegmentKey], answer: Result<Bytes>) -> Result<(), String> {
        let body = answer.map_err(|error| format!("segments cannot be had over RDMA: {error}"))?;
        let grants = wire::parse_grants(&body, keys.len()).map_err(|error| error.to_string())?;
        for (&key, grant) in keys.iter().zip(grants) {
            let jobs = self.waiting.remove(&key).unwrap_or_default();
            match grant {
                Ok(grant) => {
                    self.grants.insert(key, grant);
                    self.queue.extend(jobs);
                }
                Err(kind) => {
                    let refusal = match kind {
                        RefusalKind::UnknownSegment => Refusal::unknown_segment(key),
                        kind => Refusal::new(
                            kind,
                            format!(
                                "segment {key} is refused ({}); look up again where its bytes are",
                                kind.as_str()
                            ),
                        ),
                    };
                    for job in jobs {
                        self.refuse(job, refusal.clone());
                    }
                }
            }
        }
        Ok(())
    }

    fn refuse(&self, job: Job, refusal: Refusal) {
        let error = TransferError::Refused {
            peer: self.state.peer.clone(),
            refusal,
        };
        self.finish(job, Err(error));
    }

    fn finish(&self, job: Job, outcome: Result<Block>) {
        self.state
            .outstanding_bytes
            .fetch_sub(job.read.length, Ordering::Relaxed);
        // Whoever dropped the stream does not want it any more.
        let _ = job.sender.send((job.index, outcome));
    }

    /// Gives the device as many requests as it has room for.
    fn post(&mut self) -> Result<(), String> {
        while self.room > 0 {
            // The one that was begun last may be incomplete.
            let begun = self.next_number.checked_sub(1);
            let unfinished = begun
                .and_then(|number| self.running.get(&number).map(|running| (number, running)))
                .filter(|(_, running)| (running.asked as u64) < running.job.read.length)
                .map(|(number, _)| number);
            let number = match unfinished {
                Some(number) => number,
                None => match self.begin() {
                    Some(number) => number,
                    None => return Ok(()),
                },
            };
            let Some(running) = self.running.get_mut(&number) else {
                continue;
            };
            let left = running.job.read.length - running.asked as u64;
            let length = left.min(REQUEST_BYTES_MAX as u64);
            let request = number << 32 | (running.asked / REQUEST_BYTES_MAX) as u64;
            let remote = RemoteRange {
                address: running.grant.address + running.job.read.offset + running.asked as u64,
                key: running.grant.key,
            };
            self.connection
                .read(
                    request,
                    &running.landing,
                    running.asked,
                    length as u32,
                    remote,
                )
                .map_err(|error| error.to_string())?;
            running.asked += length as usize;
            running.open += 1;
            self.requests.insert(request, number);
            self.room -= 1;
        }
        Ok(())
    }

    /// Begins the next read of the queue: its number, or `None` where there is none.
    fn begin(&mut self) -> Option<u64> {
        loop {
            let job = self.queue.pop_front()?;
            if job.sender.is_closed() {
                self.finish(job, Err(self.state.closed_error()));
                continue;
            }
            let read = job.read;
            let Some(&grant) = self.grants.get(&read.segment) else {
                // It was taken back meanwhile: asking again tells why.
                let Job { index, sender, .. } = job;
                self.state
                    .outstanding_bytes
                    .fetch_sub(read.length, Ordering::Relaxed);
                self.take(vec![(index, read)], &sender);
                continue;
            };
            let inside = read
                .offset
                .checked_add(read.length)
                .is_some_and(|end| end <= grant.length);
            if !inside {
                let refusal =
                    Refusal::out_of_range(read.segment, read.offset, read.length, grant.length);
                self.refuse(job, refusal);
                continue;
            }
            let length = usize::try_from(read.length).ok()?;
            let Some(place) = self.device.pool.take(length) else {
                self.send_below(job);
                continue;
            };
            let number = self.next_number;
            self.next_number += 1;
            let running = Running {
                job,
                landing: Landing::new(place, length),
                grant,
                asked: 0,
                open: 0,
            };
            self.running.insert(number, running);
            return Some(number);
        }
    }

    /// Reads over the transport below what finds no registered memory here. Its deadline is kept
    /// around this link.
    fn send_below(&self, job: Job) {
        let mut outcomes = self
            .control
            .submit(vec![job.read], Instant::now() + HOLD_TIMEOUT);
        let (state, below) = (self.state.clone(), self.below);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = outcomes.next() => outcome,
                () = job.sender.closed() => None,
            };
            state
                .outstanding_bytes
                .fetch_sub(job.read.length, Ordering::Relaxed);
            if let Some((_, outcome)) = outcome {
                // Whoever dropped the stream does not want it any more.
                let outcome = outcome.map(|block| block.came_via(below));
                let _ = job.sender.send((job.index, outcome));
            }
        });
    }

    /// Ends reads whose requests have all ended.
    fn complete(&mut self) -> Result<(), String> {
        loop {
            let completions = self.connection.poll().map_err(|error| error.to_string())?;
            if completions.is_empty() {
                return Ok(());
            }
            for completion in completions {
                self.completed(completion)?;
            }
        }
    }

    fn completed(&mut self, completion: Completion) -> Result<(), String> {
        self.room += 1;
        if let Some(reason) = completion.error() {
            return Err(reason);
        }
        let Some(number) = self.requests.remove(&completion.number) else {
            return Err(format!(
                "completion of an unknown request {}",
                completion.number
            ));
        };
        let Some(running) = self.running.get_mut(&number) else {
            return Err(format!("completion of an unknown read {number}"));
        };
        running.open -= 1;
        if running.open > 0 || (running.asked as u64) < running.job.read.length {
            return Ok(());
        }
        if let Some(Running { job, landing, .. }) = self.running.remove(&number) {
            self.state
                .received_bytes
                .fetch_add(job.read.length, Ordering::Relaxed);
            let outcome = match landing.received() {
                Some(received) => Ok(self.device.pool.block(received)),
                None => return Err("a read that ended is still outstanding".to_string()),
            };
            self.finish(job, outcome);
        }
        Ok(())
    }

    /// Ends everything. What was not answered is the next path's.
    fn end(mut self, reason: &str, commands: &mut mpsc::UnboundedReceiver<Command>) {
        locked(&self.state.closed).get_or_insert_with(|| reason.to_string());
        tracing::debug!(
            peer = self.state.peer,
            reason,
            "a connection over RDMA ended"
        );
        commands.close();
        while let Ok(command) = commands.try_recv() {
            if let Command::Submit(reads, sender) = command {
                self.take(reads, &sender);
            }
        }
        self.connection.disconnect();
        let control = self.control.clone();
        let error = self.state.closed_error();
        let waiting = std::mem::take(&mut self.waiting).into_values().flatten();
        let queued = std::mem::take(&mut self.queue).into_iter();
        let jobs: Vec<Job> = waiting
            .chain(queued)
            .chain(self.running.drain().map(|(_, running)| running.job))
            .collect();
        for job in jobs {
            self.finish(job, Err(error.clone()));
        }
        drop(self);
        control.close(reason);
    }
}
