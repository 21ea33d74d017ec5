//! The answering end: sessions, and segments that devices read without asking again.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::RdmaSettings;
use super::verbs::{
    self, CmId, CompletionQueue, Connection, DeviceName, Event, EventChannel, EventKind, IdName,
    ProtectionDomain, SharedSegment,
};
use super::wire::{self, Grant, Token};
use crate::error::{Refusal, RefusalKind, Result, TransferError};
use crate::segment::{SegmentKey, SegmentSource};
use crate::transport::{CallHandler, PeerIdentity};

/// Sessions at a time at most.
const SESSIONS_MAX: usize = 4096;
/// Connection requests that may wait for their turn.
const BACKLOG: i32 = 128;
/// How long a token is good.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a session lasts that nobody holds.
const UNHELD_TIMEOUT: Duration = Duration::from_secs(30);
/// How often to look for sessions and segments that have to end.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// Answers the calls that set up RDMA, and lets devices of authorised peers read segments.
///
/// A segment is registered when it is first asked for, once for each device, and deregistered when
/// its source no longer opens it. Until then its memory stays, whatever its source does.
#[derive(Debug)]
pub struct RdmaServer {
    state: Arc<State>,
    /// Ends with the server.
    task: tokio::task::AbortHandle,
}

#[derive(Debug)]
struct State {
    source: Arc<dyn SegmentSource>,
    settings: RdmaSettings,
    /// Zero while there is no device to listen at.
    port: AtomicU16,
    sessions: Mutex<Sessions>,
    devices: Mutex<HashMap<DeviceName, Arc<Device>>>,
}

#[derive(Debug, Default)]
struct Sessions {
    by_number: HashMap<u64, Session>,
    /// Tokens that no connection has shown yet.
    tokens: HashMap<Token, u64>,
}

#[derive(Debug)]
struct Session {
    opened: Instant,
    token: Token,
    /// Since when nobody waits for notices.
    unheld_since: Option<Instant>,
    notices: mpsc::UnboundedSender<SegmentKey>,
    /// Taken by the call that waits.
    noticed: Option<mpsc::UnboundedReceiver<SegmentKey>>,
    connection: Option<(Connection, Arc<Device>)>,
}

/// A device of this host, with what peers may read through it.
#[derive(Debug)]
struct Device {
    anchor: IdName,
    domain: Arc<ProtectionDomain>,
    queue: Arc<CompletionQueue>,
    segments: Mutex<Segments>,
}

#[derive(Debug, Default)]
struct Segments {
    granted: HashMap<SegmentKey, SharedSegment>,
    /// Taken back, and kept until clients have been told.
    leaving: Vec<(Instant, SharedSegment)>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random() -> Result<u64, Refusal> {
    let mut bytes = [0; 8];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| Refusal::failed("the system gave no random numbers"))?;
    Ok(u64::from_ne_bytes(bytes))
}

impl RdmaServer {
    /// Lets devices read the segments of `source`, connecting at `address`, on a port of its own.
    /// `None` where the settings do not allow it or no device has this address.
    ///
    /// # Errors
    /// [`TransferError::Setup`] where there is a device and it cannot be used.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(
        address: IpAddr,
        settings: RdmaSettings,
        source: Arc<dyn SegmentSource>,
    ) -> Result<Option<Self>> {
        if !settings.enabled {
            return Ok(None);
        }
        let devices = verbs::devices();
        if devices.is_empty() {
            return Ok(None);
        }
        let setup = |error: &dyn std::fmt::Display| TransferError::Setup {
            what: format!("RDMA on {}", devices.join(", ")),
            reason: error.to_string(),
        };
        let channel = EventChannel::new().map_err(|error| setup(&error))?;
        let listener = match listen(&channel, address) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::info!(%address, %error, "no RDMA at this address");
                return Ok(None);
            }
        };
        let port = listener.port();
        let state = Arc::new(State {
            source,
            settings,
            port: AtomicU16::new(port),
            sessions: Mutex::default(),
            devices: Mutex::default(),
        });
        let events = channel.watch().map_err(|error| setup(&error))?;
        let task = tokio::spawn(serve(state.clone(), address, listener, events)).abort_handle();
        tracing::info!(%address, port, ?devices, "segments can be read over RDMA");
        Ok(Some(Self { state, task }))
    }

    /// Sessions that have a connection.
    pub fn connections(&self) -> usize {
        locked(&self.state.sessions)
            .by_number
            .values()
            .filter(|session| session.connection.is_some())
            .count()
    }

    /// Bytes that devices may read now, segments that are being taken back included.
    pub fn registered_bytes(&self) -> u64 {
        let devices: Vec<_> = locked(&self.state.devices).values().cloned().collect();
        devices
            .iter()
            .map(|device| {
                let segments = locked(&device.segments);
                segments
                    .granted
                    .values()
                    .chain(segments.leaving.iter().map(|(_, segment)| segment))
                    .map(SharedSegment::length)
                    .sum::<u64>()
            })
            .sum()
    }
}

impl Drop for RdmaServer {
    fn drop(&mut self) {
        self.task.abort();
        locked(&self.state.sessions).by_number.clear();
        locked(&self.state.devices).clear();
    }
}

/// Waits for connections at `address`, on a free port.
fn listen(channel: &Arc<EventChannel>, address: IpAddr) -> Result<CmId, verbs::VerbsError> {
    let listener = CmId::new(channel)?;
    listener.listen(SocketAddr::new(address, 0), BACKLOG)?;
    Ok(listener)
}

/// Handles the connection manager's events, and ends what has to end. Listens anew when a device
/// that went away is back.
async fn serve(
    state: Arc<State>,
    address: IpAddr,
    listener: CmId,
    events: AsyncFd<Arc<EventChannel>>,
) {
    let mut listener = Some(listener);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            ready = events.readable() => {
                let Ok(mut ready) = ready else { break };
                ready.clear_ready();
                loop {
                    match events.get_ref().next() {
                        Ok(Some(event)) => {
                            let here = listener.as_ref().map(CmId::name) == Some(event.id);
                            if here && event.kind == EventKind::DeviceRemoval {
                                tracing::warn!(
                                    %address,
                                    "the RDMA device is removed; TCP serves until one is back"
                                );
                                state.port.store(0, Ordering::Relaxed);
                                listener = None;
                            }
                            state.happened(event);
                        }
                        Ok(None) => break,
                        Err(error) => {
                            tracing::warn!(%error, "the connection manager failed; no RDMA any more");
                            return;
                        }
                    }
                }
            }
            _ = sweep.tick() => {
                state.end_old_sessions();
                if listener.is_none()
                    && let Ok(again) = listen(events.get_ref(), address)
                {
                    let port = again.port();
                    tracing::info!(%address, port, "segments can be read over RDMA again");
                    state.port.store(port, Ordering::Relaxed);
                    listener = Some(again);
                }
                let (state, gone) = (state.clone(), listener.is_none());
                // Sources may look into files, and taking segments back takes a while.
                let swept = tokio::task::spawn_blocking(move || {
                    if gone {
                        verbs::close_removed_devices();
                    }
                    state.sweep_segments();
                });
                if swept.await.is_err() {
                    break;
                }
            }
        }
    }
    drop(listener);
}

impl State {
    fn happened(&self, mut event: Event) {
        if let Some(id) = event.incoming.take() {
            let from = id.name();
            if let Err(reason) = self.accept(id, &event.private_data) {
                // The id is gone by now, which rejects the request.
                tracing::info!(?from, reason, "a connection over RDMA is rejected");
            }
            return;
        }
        if !event.kind.is_the_end() {
            return;
        }
        tracing::debug!(event = event.describe(), "a connection over RDMA ended");
        let ended = locked(&self.sessions).remove_connection(event.id);
        if event.kind == EventKind::DeviceRemoval {
            let device = ended
                .as_ref()
                .and_then(|session| session.connection.as_ref());
            let lost = device.map(|(_, device)| device.anchor);
            locked(&self.devices)
                .retain(|_, device| device.anchor != event.id && Some(device.anchor) != lost);
        }
        if let Some(Session {
            connection: Some((connection, _)),
            ..
        }) = &ended
        {
            connection.disconnect();
        }
    }

    fn accept(&self, id: Arc<CmId>, private_data: &[u8]) -> Result<(), String> {
        let token = wire::parse_connect_data(private_data).map_err(|error| error.to_string())?;
        let mut sessions = locked(&self.sessions);
        let number = sessions
            .tokens
            .remove(&Token(token))
            .ok_or("it shows no token of a session that waits for its connection")?;
        let accepted = self.device(&id).and_then(|device| {
            let connection = Connection::new(id, device.domain.clone(), device.queue.clone(), 1)?;
            connection.accept()?;
            Ok((connection, device))
        });
        match accepted {
            Ok(connection) => {
                if let Some(session) = sessions.by_number.get_mut(&number) {
                    session.connection = Some(connection);
                }
                Ok(())
            }
            Err(error) => {
                sessions.by_number.remove(&number);
                Err(error.to_string())
            }
        }
    }

    /// The device that `id` is bound to.
    fn device(&self, id: &Arc<CmId>) -> Result<Arc<Device>, verbs::VerbsError> {
        let mut devices = locked(&self.devices);
        let name = id.device();
        if let Some(device) = name.and_then(|name| devices.get(&name)) {
            return Ok(device.clone());
        }
        let domain = ProtectionDomain::new(id)?;
        let device = Arc::new(Device {
            anchor: id.name(),
            // Nothing completes here: devices answer reads by themselves.
            queue: CompletionQueue::new(&domain, 1)?,
            domain,
            segments: Mutex::default(),
        });
        if let Some(name) = name {
            devices.insert(name, device.clone());
        }
        Ok(device)
    }

    fn end_old_sessions(&self) {
        let now = Instant::now();
        let mut sessions = locked(&self.sessions);
        let old = |session: &Session| {
            let unconnected = session.connection.is_none() && now - session.opened > TOKEN_TIMEOUT;
            let unheld = session
                .unheld_since
                .is_some_and(|since| now - since > UNHELD_TIMEOUT);
            unconnected || unheld
        };
        let numbers: Vec<u64> = sessions
            .by_number
            .iter()
            .filter(|(_, session)| old(session))
            .map(|(&number, _)| number)
            .collect();
        for number in numbers {
            sessions.end(number);
        }
    }

    /// Takes back segments that the source does not open any more.
    fn sweep_segments(&self) {
        let devices: Vec<_> = locked(&self.devices).values().cloned().collect();
        for device in devices {
            let granted: Vec<SegmentKey> =
                locked(&device.segments).granted.keys().copied().collect();
            let gone: Vec<SegmentKey> = granted
                .into_iter()
                .filter(|&key| self.source.open(key).is_err())
                .collect();
            self.take_back(&device, &gone);
            let grace = self.settings.revocation_grace;
            locked(&device.segments)
                .leaving
                .retain(|(since, _)| since.elapsed() < grace);
        }
    }

    fn take_back(&self, device: &Device, keys: &[SegmentKey]) {
        if keys.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut segments = locked(&device.segments);
        for key in keys {
            if let Some(segment) = segments.granted.remove(key) {
                segments.leaving.push((now, segment));
            }
        }
        drop(segments);
        for session in locked(&self.sessions).by_number.values() {
            for key in keys {
                // A session that is ending needs no notice.
                let _ = session.notices.send(*key);
            }
        }
    }

    fn open(&self, body: &[u8]) -> Result<Bytes, Refusal> {
        wire::parse_open_request(body).map_err(protocol)?;
        let port = match self.port.load(Ordering::Relaxed) {
            0 => return Err(Refusal::failed("the RDMA device is gone")),
            port => port,
        };
        let token = Token([random()?, random()?]);
        let number = random()?;
        let mut sessions = locked(&self.sessions);
        if sessions.by_number.len() >= SESSIONS_MAX {
            return Err(Refusal::new(
                RefusalKind::Busy,
                format!("{SESSIONS_MAX} sessions over RDMA are open, which is the limit"),
            ));
        }
        let (notices, noticed) = mpsc::unbounded_channel();
        let session = Session {
            opened: Instant::now(),
            token,
            unheld_since: Some(Instant::now()),
            notices,
            noticed: Some(noticed),
            connection: None,
        };
        sessions.tokens.insert(token, number);
        sessions.by_number.insert(number, session);
        Ok(Bytes::copy_from_slice(&wire::open_answer(
            number, token, port,
        )))
    }

    fn grant(&self, body: &[u8]) -> Result<Bytes, Refusal> {
        let (number, keys) = wire::parse_session_request(body).map_err(protocol)?;
        let device = locked(&self.sessions)
            .by_number
            .get(&number)
            .and_then(|session| Some(session.connection.as_ref()?.1.clone()))
            .ok_or_else(no_session)?;
        let grants = keys
            .iter()
            .map(|&key| self.grant_one(&device, key))
            .collect::<Result<Vec<_>, Refusal>>()?;
        Ok(wire::grants(&grants).into())
    }

    /// A grant, or the source's refusal; an error where the device cannot register the segment.
    fn grant_one(
        &self,
        device: &Device,
        key: SegmentKey,
    ) -> Result<Result<Grant, RefusalKind>, Refusal> {
        let segment = match self.source.open(key) {
            Ok(segment) => segment,
            Err(refusal) => {
                self.take_back(device, &[key]);
                return Ok(Err(refusal.kind));
            }
        };
        let mut segments = locked(&device.segments);
        let shared = match segments.granted.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let bytes = segment.bytes().len();
                let shared = SharedSegment::new(&device.domain, segment).map_err(|error| {
                    tracing::warn!(%key, bytes, %error, "cannot register a segment for RDMA");
                    Refusal::failed(format!(
                        "cannot register {bytes} bytes of segment {key} for RDMA: {error}"
                    ))
                })?;
                entry.insert(shared)
            }
        };
        Ok(Ok(Grant {
            address: shared.address(),
            length: shared.length(),
            key: shared.remote_key(),
        }))
    }
}

impl Sessions {
    fn end(&mut self, number: u64) -> Option<Session> {
        let session = self.by_number.remove(&number)?;
        self.tokens.remove(&session.token);
        if let Some((connection, _)) = &session.connection {
            connection.disconnect();
        }
        Some(session)
    }

    fn remove_connection(&mut self, name: IdName) -> Option<Session> {
        let number = self.by_number.iter().find_map(|(&number, session)| {
            let (connection, _) = session.connection.as_ref()?;
            (connection.name() == name).then_some(number)
        })?;
        let session = self.by_number.remove(&number)?;
        self.tokens.remove(&session.token);
        Some(session)
    }
}

fn protocol(error: crate::wire::WireError) -> Refusal {
    Refusal::new(RefusalKind::Protocol, error.to_string())
}

fn no_session() -> Refusal {
    Refusal::new(
        RefusalKind::Failed,
        "no such session over RDMA, or it has no connection; open another one",
    )
}

/// Ends a session when the call that holds it is dropped: its client is gone.
struct Holder {
    state: Weak<State>,
    number: u64,
    noticed: Option<mpsc::UnboundedReceiver<SegmentKey>>,
    done: bool,
}

impl Drop for Holder {
    fn drop(&mut self) {
        let Some(state) = self.state.upgrade() else {
            return;
        };
        let mut sessions = locked(&state.sessions);
        if !self.done {
            sessions.end(self.number);
        } else if let Some(session) = sessions.by_number.get_mut(&self.number) {
            session.unheld_since = Some(Instant::now());
            session.noticed = self.noticed.take();
        }
    }
}

impl RdmaServer {
    /// Waits for segments that are taken back, for as long as the session lasts.
    async fn hold(&self, body: &[u8]) -> Result<Bytes, Refusal> {
        let (number, _) = wire::parse_session_request(body).map_err(protocol)?;
        let mut holder = {
            let mut sessions = locked(&self.state.sessions);
            let session = sessions.by_number.get_mut(&number).ok_or_else(no_session)?;
            let noticed = session.noticed.take().ok_or_else(no_session)?;
            session.unheld_since = None;
            Holder {
                state: Arc::downgrade(&self.state),
                number,
                noticed: Some(noticed),
                done: false,
            }
        };
        let mut keys = Vec::new();
        if let Some(noticed) = &mut holder.noticed {
            noticed.recv_many(&mut keys, wire::KEYS_MAX as usize).await;
        }
        if keys.is_empty() {
            // The sender went with the session.
            return Err(no_session());
        }
        holder.done = true;
        Ok(wire::keys(&keys).into())
    }
}

#[async_trait]
impl CallHandler for RdmaServer {
    async fn call(&self, _peer: &PeerIdentity, method: u16, body: Bytes) -> Result<Bytes, Refusal> {
        match method {
            wire::METHOD_OPEN => self.state.open(&body),
            wire::METHOD_GRANT => {
                let state = self.state.clone();
                // Registering pins the pages of whole segments.
                tokio::task::spawn_blocking(move || state.grant(&body))
                    .await
                    .unwrap_or_else(|error| Err(Refusal::failed(error)))
            }
            wire::METHOD_HOLD => self.hold(&body).await,
            method => Err(Refusal::unknown_method(method)),
        }
    }
}
