//! Verbs and the connection manager behind safe types: the only module of this crate's RDMA that
//! has `unsafe`.
//!
//! What the types keep, so that their users need not:
//! - **Nothing is freed before what was made from it.** Each type owns what it stands on, and is
//!   destroyed first: a queue pair before its completion queue, a registration before the memory,
//!   everything of a device before the id through which the device was opened.
//! - **A device writes only to memory that nobody reads.** Memory being received into is a
//!   [`Landing`], which shows no bytes; every read that is outstanding holds a share of it until
//!   its completion was polled or the queue pair is gone. Only the last share becomes [`Received`].
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rdma_sys as sys;
use socket2::SockAddr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::segment::Segment;

/// Private data that a connection request has room for, in the port space that we use.
pub(super) const PRIVATE_DATA_BYTES_MAX: usize = 56;
/// Reads that may be under way at the peer at a time, if the devices allow as many.
const READS_UNDER_WAY: u8 = 16;
/// Time until a packet without an answer is sent again: 4.096 µs × 2^17 = 0.5 s. With
/// [`RETRIES`] a peer that vanished without a word is given up after about four seconds, a loss that
/// shows as an error of the completion.
const ACK_TIMEOUT_EXPONENT: u8 = 17;
const RETRIES: u8 = 7;
/// The options of `rdma_set_option`, which the bindings do not name.
const OPTION_ID: c_int = 0;
const OPTION_ID_ACK_TIMEOUT: c_int = 3;

/// A call into the libraries that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}{}", hint(.source))]
pub(super) struct VerbsError {
    /// Which.
    pub(super) call: &'static str,
    /// What the system says.
    pub(super) source: io::Error,
}

/// What to do about errors whose text alone does not tell.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(code) if code == nix::errno::Errno::ENOMEM as i32 => {
            " (registered memory counts as locked: raise `ulimit -l`, or give the process CAP_IPC_LOCK)"
        }
        _ => "",
    }
}

type Result<T, E = VerbsError> = std::result::Result<T, E>;

fn last(call: &'static str) -> VerbsError {
    VerbsError {
        call,
        source: io::Error::last_os_error(),
    }
}

fn code(call: &'static str, code: c_int) -> VerbsError {
    VerbsError {
        call,
        source: io::Error::from_raw_os_error(code),
    }
}

/// For calls that return -1 and set `errno`.
fn check(call: &'static str, result: c_int) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(last(call)) }
}

/// Names of the devices that there are. A kernel without RDMA has none.
pub(super) fn devices() -> Vec<String> {
    let mut count: c_int = 0;
    // SAFETY: `count` is valid for writing. The result is null or an array of that many devices.
    let list = unsafe { sys::ibv_get_device_list(&mut count) };
    if list.is_null() {
        return Vec::new();
    }
    let names = (0..usize::try_from(count).unwrap_or(0))
        .map(|index| {
            // SAFETY: `index` is below the count of the array, whose entries stay valid until it is
            // freed below; a device's name is a string that ends with a zero.
            unsafe { CStr::from_ptr(sys::ibv_get_device_name(*list.add(index))) }
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    // SAFETY: the list came from `ibv_get_device_list` and is freed once; the names were copied.
    unsafe { sys::ibv_free_device_list(list) };
    names
}

/// Lets the library close devices that were removed and that nothing of this process uses any more.
/// Some drivers' devices stay until every process has closed them. The library only looks while
/// there is another device.
pub(super) fn close_removed_devices() {
    let mut count: c_int = 0;
    // SAFETY: `count` is valid for writing. The result is null or a list of open devices, which is
    // the caller's to free; the devices stay the library's.
    unsafe {
        let list = sys::rdma_get_devices(&mut count);
        if !list.is_null() {
            sys::rdma_free_devices(list);
        }
    }
}

/// Tells when a channel's descriptor has something to read.
///
/// # Safety
/// The descriptor must stay open, and the same, while `channel` lives.
unsafe fn watch<T: AsRawFd>(call: &'static str, channel: T) -> Result<AsyncFd<T>> {
    // SAFETY: the caller's promise is what is asked for.
    unsafe { AsyncFd::register_with_interest(channel, Interest::READABLE) }.map_err(|error| {
        VerbsError {
            call,
            source: error.into(),
        }
    })
}

/// Makes reads of a descriptor return instead of waiting.
fn set_nonblocking(fd: RawFd) -> Result<()> {
    // SAFETY: the caller's channel keeps the descriptor open for the time of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_GETFL)
        .and_then(|flags| {
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl(fd, FcntlArg::F_SETFL(flags))
        })
        .map(drop)
        .map_err(|errno| VerbsError {
            call: "fcntl",
            source: errno.into(),
        })
}

/// Where the connection manager reports what happened to ids.
#[derive(Debug)]
pub(super) struct EventChannel {
    raw: NonNull<sys::rdma_event_channel>,
}

// SAFETY: librdmacm may be called from any thread, and at the same time; the channel is a descriptor.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// A channel whose events are waited for through its descriptor.
    pub(super) fn new() -> Result<Arc<Self>> {
        // SAFETY: no arguments.
        let raw = unsafe { sys::rdma_create_event_channel() };
        let channel = Self {
            raw: NonNull::new(raw).ok_or_else(|| last("rdma_create_event_channel"))?,
        };
        set_nonblocking(channel.as_raw_fd())?;
        Ok(Arc::new(channel))
    }

    /// The channel, and when it has events.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub(super) fn watch(self: Arc<Self>) -> Result<AsyncFd<Arc<Self>>> {
        // SAFETY: the descriptor is closed when the last share of the channel is dropped.
        unsafe { watch("watching the connection manager", self) }
    }

    /// The next event, if there is one now.
    pub(super) fn next(self: &Arc<Self>) -> Result<Option<Event>> {
        let mut raw: *mut sys::rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel lives as long as `self`; `raw` is valid for writing.
        if unsafe { sys::rdma_get_cm_event(self.raw.as_ptr(), &mut raw) } != 0 {
            let error = last("rdma_get_cm_event");
            return match error.source.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the call succeeded, so `raw` is an event that is ours until it is acknowledged.
        let event = unsafe { &*raw };
        let kind = EventKind::from_raw(event.event);
        let mut private_data = Vec::new();
        if matches!(kind, EventKind::ConnectRequest | EventKind::Established) {
            // SAFETY: these events are about connections, whose parameters are `conn`. Private data
            // is null or has as many bytes as the length says, until the event is acknowledged.
            let connection = unsafe { event.param.conn };
            if !connection.private_data.is_null() {
                // SAFETY: as above.
                private_data = unsafe {
                    std::slice::from_raw_parts(
                        connection.private_data.cast::<u8>(),
                        usize::from(connection.private_data_len),
                    )
                }
                .to_vec();
            }
        }
        let id = event.id;
        let status = event.status;
        // Ids cannot be destroyed before their events are acknowledged, so nothing waits with it.
        // SAFETY: the event is acknowledged once and not used afterwards.
        unsafe { sys::rdma_ack_cm_event(raw) };
        let incoming = match (kind, NonNull::new(id)) {
            (EventKind::ConnectRequest, Some(raw)) => Some(Arc::new(CmId {
                raw,
                _channel: Arc::clone(self),
            })),
            _ => None,
        };
        Ok(Some(Event {
            kind,
            status,
            id: IdName(id.addr()),
            private_data,
            incoming,
        }))
    }
}

impl AsRawFd for EventChannel {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.raw.as_ref() }.fd
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made by `rdma_create_event_channel`; all ids on it own a share of it, so they are
        // destroyed, and so are their events.
        unsafe { sys::rdma_destroy_event_channel(self.raw.as_ptr()) };
    }
}

/// What happened to an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventKind {
    AddressResolved,
    RouteResolved,
    ConnectRequest,
    Established,
    Disconnected,
    DeviceRemoval,
    Rejected,
    /// Anything else, by its number: errors while connecting, and notices.
    Other(u32),
}

impl EventKind {
    fn from_raw(raw: sys::rdma_cm_event_type::Type) -> Self {
        use sys::rdma_cm_event_type as kind;
        match raw {
            kind::RDMA_CM_EVENT_ADDR_RESOLVED => Self::AddressResolved,
            kind::RDMA_CM_EVENT_ROUTE_RESOLVED => Self::RouteResolved,
            kind::RDMA_CM_EVENT_CONNECT_REQUEST => Self::ConnectRequest,
            kind::RDMA_CM_EVENT_ESTABLISHED => Self::Established,
            kind::RDMA_CM_EVENT_DISCONNECTED => Self::Disconnected,
            kind::RDMA_CM_EVENT_DEVICE_REMOVAL => Self::DeviceRemoval,
            kind::RDMA_CM_EVENT_REJECTED => Self::Rejected,
            other => Self::Other(other),
        }
    }

    /// Whether the connection that it is about cannot be used any more.
    pub(super) fn is_the_end(self) -> bool {
        use sys::rdma_cm_event_type as kind;
        match self {
            Self::Disconnected | Self::DeviceRemoval | Self::Rejected => true,
            Self::Other(other) => matches!(
                other,
                kind::RDMA_CM_EVENT_ADDR_ERROR
                    | kind::RDMA_CM_EVENT_ROUTE_ERROR
                    | kind::RDMA_CM_EVENT_CONNECT_ERROR
                    | kind::RDMA_CM_EVENT_UNREACHABLE
            ),
            _ => false,
        }
    }
}

/// Tells ids apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct IdName(usize);

/// Something that happened to an id.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) kind: EventKind,
    /// Zero, an error number (negative), or a reason of the device.
    pub(super) status: i32,
    /// Which id it happened to.
    pub(super) id: IdName,
    /// What the peer sent with a connection request or its acceptance, zeros behind it.
    pub(super) private_data: Vec<u8>,
    /// The new id of a connection request. Dropping it rejects the request.
    pub(super) incoming: Option<Arc<CmId>>,
}

impl Event {
    /// The event in words.
    pub(super) fn describe(&self) -> String {
        let name = match self.kind {
            EventKind::Disconnected => "disconnected",
            EventKind::DeviceRemoval => "the device was removed",
            EventKind::Rejected => "the peer rejected the connection",
            EventKind::AddressResolved => "address resolved",
            EventKind::RouteResolved => "route resolved",
            EventKind::ConnectRequest => "connection request",
            EventKind::Established => "established",
            EventKind::Other(number) => {
                // SAFETY: the function returns a constant string for any number.
                let name = unsafe { CStr::from_ptr(sys::rdma_event_str(number)) };
                return format!("{} (status {})", name.to_string_lossy(), self.status);
            }
        };
        match self.status {
            0 => name.to_string(),
            status => format!("{name} (status {status})"),
        }
    }
}

/// An end of a connection, or of one to be: what the connection manager calls an id.
#[derive(Debug)]
pub(super) struct CmId {
    raw: NonNull<sys::rdma_cm_id>,
    /// Where its events arrive; it outlives them.
    _channel: Arc<EventChannel>,
}

// SAFETY: librdmacm may be called from any thread, and at the same time, as long as an id is not
// destroyed meanwhile, which ownership rules out.
unsafe impl Send for CmId {}
// SAFETY: as above.
unsafe impl Sync for CmId {}

impl CmId {
    /// A new id that reports to `channel`.
    pub(super) fn new(channel: &Arc<EventChannel>) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel lives, `raw` is valid for writing, and a context is not needed.
        let result = unsafe {
            sys::rdma_create_id(
                channel.raw.as_ptr(),
                &mut raw,
                ptr::null_mut(),
                sys::rdma_port_space::RDMA_PS_TCP,
            )
        };
        check("rdma_create_id", result)?;
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(|| last("rdma_create_id"))?,
            _channel: Arc::clone(channel),
        })
    }

    /// What events call it.
    pub(super) fn name(&self) -> IdName {
        IdName(self.raw.as_ptr().addr())
    }

    /// Listens at `address`; port 0 takes a free one.
    pub(super) fn listen(&self, address: SocketAddr, backlog: i32) -> Result<()> {
        let address = SockAddr::from(address);
        // SAFETY: the id lives; the address is valid for reading during the call, which does not
        // write to it (the parameter lacks `const` in C).
        let result =
            unsafe { sys::rdma_bind_addr(self.raw.as_ptr(), address.as_ptr().cast_mut().cast()) };
        check("rdma_bind_addr", result)?;
        // SAFETY: the id lives and is bound.
        check("rdma_listen", unsafe {
            sys::rdma_listen(self.raw.as_ptr(), backlog)
        })
    }

    /// The port of this end.
    pub(super) fn port(&self) -> u16 {
        // SAFETY: the id lives.
        u16::from_be(unsafe { sys::rdma_get_src_port(self.raw.as_ptr()) })
    }

    /// Begins to look for the device that leads to `address`.
    pub(super) fn resolve_address(&self, address: SocketAddr, timeout_ms: i32) -> Result<()> {
        let address = SockAddr::from(address);
        // SAFETY: as in `listen`; a null source lets the route decide.
        let result = unsafe {
            sys::rdma_resolve_addr(
                self.raw.as_ptr(),
                ptr::null_mut(),
                address.as_ptr().cast_mut().cast(),
                timeout_ms,
            )
        };
        check("rdma_resolve_addr", result)
    }

    /// Begins to look for the route, once the address is resolved.
    pub(super) fn resolve_route(&self, timeout_ms: i32) -> Result<()> {
        let mut exponent = ACK_TIMEOUT_EXPONENT;
        // Where this kernel lacks the option, losses are noticed later.
        // SAFETY: the option's value is one byte, valid for reading during the call.
        unsafe {
            sys::rdma_set_option(
                self.raw.as_ptr(),
                OPTION_ID,
                OPTION_ID_ACK_TIMEOUT,
                ptr::from_mut(&mut exponent).cast::<c_void>(),
                size_of::<u8>(),
            )
        };
        // SAFETY: the id lives.
        check("rdma_resolve_route", unsafe {
            sys::rdma_resolve_route(self.raw.as_ptr(), timeout_ms)
        })
    }

    /// Which device it is bound to, or `None` before that is decided.
    pub(super) fn device(&self) -> Option<DeviceName> {
        // SAFETY: the id lives.
        let context = unsafe { self.raw.as_ref() }.verbs;
        (!context.is_null()).then(|| DeviceName(context.addr()))
    }

    /// The device's context, for calls that need one.
    fn context(&self) -> Result<*mut sys::ibv_context> {
        // SAFETY: the id lives.
        let context = unsafe { self.raw.as_ref() }.verbs;
        if context.is_null() {
            return Err(VerbsError {
                call: "the id has no device",
                source: io::Error::from(io::ErrorKind::NotConnected),
            });
        }
        Ok(context)
    }

    /// Tells the peer that the connection ends.
    pub(super) fn disconnect(&self) {
        // It fails where the connection or the device is gone already, which is as well.
        // SAFETY: the id lives.
        unsafe { sys::rdma_disconnect(self.raw.as_ptr()) };
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: made by `rdma_create_id` or handed over by a connection request; destroyed once.
        // Its queue pair is gone: a `Connection` owns a share of the id and destroys it before. Its
        // events are acknowledged as soon as they are read.
        unsafe { sys::rdma_destroy_id(self.raw.as_ptr()) };
    }
}

/// Tells devices of this process apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DeviceName(usize);

/// What a device allows, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceLimits {
    /// Requests that a queue may hold.
    pub(super) requests: u32,
    /// Reads under way that this end may ask for.
    reads_asked: u8,
    /// Reads under way that this end may answer.
    reads_answered: u8,
}

/// A device as far as memory and connections on it belong together.
#[derive(Debug)]
pub(super) struct ProtectionDomain {
    raw: NonNull<sys::ibv_pd>,
    limits: DeviceLimits,
    /// Keeps the device's context open.
    anchor: Arc<CmId>,
}

// SAFETY: verbs may be called from any thread, and at the same time, as long as an object is not
// destroyed meanwhile, which ownership rules out.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A domain on the device that `id` is bound to.
    pub(super) fn new(id: &Arc<CmId>) -> Result<Arc<Self>> {
        let context = id.context()?;
        // SAFETY: a plain structure of integers, for which zeros are valid.
        let mut attributes: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open while `id` lives; the structure is valid for writing.
        let result = unsafe { sys::ibv_query_device(context, &mut attributes) };
        if result != 0 {
            return Err(code("ibv_query_device", result));
        }
        let at_most = |limit: c_int| u8::try_from(limit).unwrap_or(u8::MAX).min(READS_UNDER_WAY);
        let limits = DeviceLimits {
            requests: u32::try_from(attributes.max_qp_wr).unwrap_or(1).max(1),
            reads_asked: at_most(attributes.max_qp_init_rd_atom),
            reads_answered: at_most(attributes.max_qp_rd_atom),
        };
        // SAFETY: the context is open while `id` lives.
        let raw = unsafe { sys::ibv_alloc_pd(context) };
        Ok(Arc::new(Self {
            raw: NonNull::new(raw).ok_or_else(|| last("ibv_alloc_pd"))?,
            limits,
            anchor: Arc::clone(id),
        }))
    }

    /// What the device allows.
    pub(super) fn limits(&self) -> DeviceLimits {
        self.limits
    }

    fn register(
        self: &Arc<Self>,
        address: *mut c_void,
        length: usize,
        access: sys::ibv_access_flags,
    ) -> Result<Registration> {
        // SAFETY: the domain lives. The kernel checks that the range is mapped, and pins its pages:
        // they stay what they are even if the mapping goes away.
        let raw =
            unsafe { sys::ibv_reg_mr(self.raw.as_ptr(), address, length, access.0.cast_signed()) };
        Ok(Registration {
            raw: NonNull::new(raw).ok_or_else(|| last("ibv_reg_mr"))?,
            _domain: Arc::clone(self),
        })
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_alloc_pd`, freed once; everything on it owns a share of it, so it is
        // gone. The context is still open: `anchor` is dropped afterwards.
        unsafe { sys::ibv_dealloc_pd(self.raw.as_ptr()) };
        let _ = &self.anchor;
    }
}

/// Memory that a device knows. The device keeps its pages until this is dropped.
#[derive(Debug)]
struct Registration {
    raw: NonNull<sys::ibv_mr>,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: a registration is only read and, once, destroyed.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    fn local_key(&self) -> u32 {
        // SAFETY: the registration lives as long as `self`.
        unsafe { self.raw.as_ref() }.lkey
    }

    fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.raw.as_ref() }.rkey
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_reg_mr`, freed once. It fails where the device is gone, and then the
        // device holds nothing any more.
        unsafe { sys::ibv_dereg_mr(self.raw.as_ptr()) };
    }
}

/// A segment that peers with its key may read, and nothing else, until this is dropped.
#[derive(Debug)]
pub(super) struct SharedSegment {
    registration: Registration,
    address: u64,
    /// Dropped last: the memory outlives its registration.
    segment: Segment,
}

impl SharedSegment {
    /// Registers all bytes of a segment for reading by peers.
    pub(super) fn new(domain: &Arc<ProtectionDomain>, segment: Segment) -> Result<Self> {
        let access = sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ;
        let bytes = segment.bytes();
        // The device is given the right to read only, so the pointer is never written through.
        let address = bytes.as_ptr().cast_mut().cast::<c_void>();
        match domain.register(address, bytes.len(), access) {
            Ok(registration) => Ok(Self {
                address: address.addr() as u64,
                registration,
                segment,
            }),
            Err(error) if is_fault(&error.source) => {
                Self::through_writable_mapping(domain, segment, error)
            }
            Err(error) => Err(error),
        }
    }

    /// Kernels before 6.2 pin pages only through a mapping that could be written to. One is made
    /// for the time of registering; nothing is written.
    fn through_writable_mapping(
        domain: &Arc<ProtectionDomain>,
        segment: Segment,
        refused: VerbsError,
    ) -> Result<Self> {
        let Some(file) = segment.file() else {
            return Err(refused);
        };
        let failed = |call: &'static str| move |source: io::Error| VerbsError { call, source };
        let writable = open_writable(file).map_err(failed(
            "opening a segment for registration (this process must own its file)",
        ))?;
        let map = MmapOptions::new()
            .len(segment.bytes().len())
            .map_raw(&writable)
            .map_err(failed("mmap"))?;
        let registration = domain.register(
            map.as_mut_ptr().cast(),
            map.len(),
            sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ,
        )?;
        Ok(Self {
            address: map.as_ptr().addr() as u64,
            registration,
            segment,
        })
    }

    /// The address of the first byte, as peers have to name it.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Bytes that may be read.
    pub(super) fn length(&self) -> u64 {
        self.segment.bytes().len() as u64
    }

    /// What a peer has to show.
    pub(super) fn remote_key(&self) -> u32 {
        self.registration.remote_key()
    }
}

/// Opens a sealed file for writing. What its mode forbids, its owner allows himself for the moment of
/// opening.
fn open_writable(file: &File) -> io::Result<File> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    const OWNER_WRITES: u32 = 0o200;

    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // Two of them would take each other's mode for the file's own.
            let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
            let sealed = file.metadata()?.permissions();
            let mode = sealed.mode() | OWNER_WRITES;
            file.set_permissions(Permissions::from_mode(mode))?;
            let opened = open();
            file.set_permissions(sealed)?;
            opened
        }
        opened => opened,
    }
}

fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::EFAULT as i32)
}

/// Memory of this process that a device may write to, cut into places for reads.
#[derive(Debug)]
pub(super) struct Region {
    registration: Registration,
    /// The memory outlives its registration: fields are dropped in this order.
    map: MmapRaw,
    /// Dropped when the memory is gone.
    _guard: Box<dyn Any + Send + Sync>,
}

impl Region {
    /// `bytes` of memory, zero at first. `guard` is dropped when it is gone.
    pub(super) fn new(
        domain: &Arc<ProtectionDomain>,
        bytes: usize,
        guard: Box<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>> {
        let map = MmapMut::map_anon(bytes).map_err(|source| VerbsError {
            call: "mmap",
            source,
        })?;
        let map = MmapRaw::from(map);
        let registration = domain.register(
            map.as_mut_ptr().cast(),
            map.len(),
            sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE,
        )?;
        Ok(Arc::new(Self {
            registration,
            map,
            _guard: guard,
        }))
    }

    /// Cuts the region into places of `bytes`. It is done once, with a region that nobody else has.
    ///
    /// # Panics
    /// When the region is shared already.
    pub(super) fn cut(mut self: Arc<Self>, bytes: usize) -> Vec<Place> {
        assert!(
            Arc::get_mut(&mut self).is_some(),
            "places of a region must not overlap, so it is cut once"
        );
        (0..self.map.len() / bytes)
            .map(|index| Place {
                region: Arc::clone(&self),
                offset: index * bytes,
                bytes,
            })
            .collect()
    }
}

/// A part of a region that belongs to its owner alone.
#[derive(Debug)]
pub(super) struct Place {
    region: Arc<Region>,
    offset: usize,
    bytes: usize,
}

impl Place {
    /// How much it has room for.
    pub(super) fn capacity(&self) -> usize {
        self.bytes
    }
}

/// A place that a device may be writing to: it shows no bytes.
#[derive(Debug)]
pub(super) struct Landing {
    place: Place,
    length: usize,
}

impl Landing {
    /// Room for `length` bytes at the beginning of `place`.
    ///
    /// # Panics
    /// When the place is smaller.
    pub(super) fn new(place: Place, length: usize) -> Arc<Self> {
        assert!(length <= place.bytes, "a read must fit into its place");
        Arc::new(Self { place, length })
    }

    /// The bytes, once nothing is outstanding for them: `None` while anything is.
    pub(super) fn received(self: Arc<Self>) -> Option<Received> {
        Arc::into_inner(self).map(|landing| Received {
            place: landing.place,
            length: landing.length,
        })
    }
}

/// Bytes that have arrived, in memory that no device writes to any more.
#[derive(Debug)]
pub(super) struct Received {
    place: Place,
    length: usize,
}

impl Received {
    /// The place for another use, instead of the bytes.
    pub(super) fn into_place(self) -> Place {
        self.place
    }
}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        let start = self
            .place
            .region
            .map
            .as_ptr()
            .wrapping_add(self.place.offset);
        // SAFETY: the range lies inside of the region's mapping (`Region::cut`, `Landing::new`),
        // which lives as long as `place`, and whose bytes are initialised. Nobody writes to it: the
        // place belongs to this value alone, and each request that let the device write to it held
        // a share of the `Landing` until it had ended, of which there is none left.
        unsafe { std::slice::from_raw_parts(start, self.length) }
    }
}

/// Where a device reports that requests have ended.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    raw: NonNull<sys::ibv_cq>,
    channel: NonNull<sys::ibv_comp_channel>,
    /// Keeps the device's context open; dropped last.
    domain: Arc<ProtectionDomain>,
}

// SAFETY: as for `ProtectionDomain`.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for `ProtectionDomain`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue with room for `entries`, whose descriptor becomes readable when there are some.
    pub(super) fn new(domain: &Arc<ProtectionDomain>, entries: u32) -> Result<Arc<Self>> {
        let context = domain.anchor.context()?;
        // SAFETY: the context is open while `domain` lives.
        let channel = NonNull::new(unsafe { sys::ibv_create_comp_channel(context) })
            .ok_or_else(|| last("ibv_create_comp_channel"))?;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: the context and the channel are of the same device and live; no context is
        // needed for the events, and vector 0 always exists.
        let raw =
            unsafe { sys::ibv_create_cq(context, entries, ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(raw) = NonNull::new(raw) else {
            let error = last("ibv_create_cq");
            // SAFETY: made above, destroyed once, used by nothing.
            unsafe { sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self {
            raw,
            channel,
            domain: Arc::clone(domain),
        };
        set_nonblocking(queue.as_raw_fd())?;
        queue.arm()?;
        Ok(Arc::new(queue))
    }

    /// The queue, and when it has completions.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub(super) fn watch(self: Arc<Self>) -> Result<AsyncFd<Arc<Self>>> {
        // SAFETY: the descriptor is closed when the last share of the queue is dropped.
        unsafe { watch("watching completions", self) }
    }

    /// Asks to be told of the next completion. Completions before that are polled, not told.
    fn arm(&self) -> Result<()> {
        // SAFETY: the queue lives.
        match unsafe { sys::ibv_req_notify_cq(self.raw.as_ptr(), 0) } {
            0 => Ok(()),
            error => Err(code("ibv_req_notify_cq", error)),
        }
    }

    /// Takes what was told, so that the descriptor is quiet until there is more to poll. To be
    /// followed by polling until there is nothing.
    pub(super) fn take_notices(&self) -> Result<()> {
        loop {
            let mut queue = ptr::null_mut();
            let mut context = ptr::null_mut();
            // SAFETY: the channel lives; both pointers are valid for writing.
            let result =
                unsafe { sys::ibv_get_cq_event(self.channel.as_ptr(), &mut queue, &mut context) };
            if result != 0 {
                return self.arm();
            }
            // SAFETY: the notice is of this channel's only queue.
            unsafe { sys::ibv_ack_cq_events(self.raw.as_ptr(), 1) };
        }
    }
}

impl AsRawFd for CompletionQueue {
    fn as_raw_fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.channel.as_ref() }.fd
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: both were made in `new` and are destroyed once, the queue first. Queue pairs that
        // use it own a share of it, so they are gone; each notice was acknowledged when taken.
        unsafe {
            sys::ibv_destroy_cq(self.raw.as_ptr());
            sys::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
        let _ = &self.domain;
    }
}

/// How a read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    /// The number given to [`Connection::read`].
    pub(super) number: u64,
    /// Zero for success.
    status: u32,
}

impl Completion {
    /// Why the read failed, if it did.
    pub(super) fn error(self) -> Option<String> {
        if self.status == sys::ibv_wc_status::IBV_WC_SUCCESS {
            return None;
        }
        // SAFETY: the function returns a constant string for any number.
        let words = unsafe { CStr::from_ptr(sys::ibv_wc_status_str(self.status)) };
        Some(format!(
            "{} (completion status {})",
            words.to_string_lossy(),
            self.status
        ))
    }
}

/// A range of the peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RemoteRange {
    pub(super) address: u64,
    pub(super) key: u32,
}

/// A reliable connection. Dropping it ends what is outstanding: the device is done with all memory
/// of it afterwards.
#[derive(Debug)]
pub(super) struct Connection {
    /// Reads that the device has, with the memory that they write to.
    outstanding: HashMap<u64, Arc<Landing>>,
    queue: Arc<CompletionQueue>,
    domain: Arc<ProtectionDomain>,
    id: Arc<CmId>,
}

impl Connection {
    /// Makes the queue pair of `id`, which must be on the device of `domain`; `requests` may be
    /// outstanding in it. Completions are reported to `queue`.
    pub(super) fn new(
        id: Arc<CmId>,
        domain: Arc<ProtectionDomain>,
        queue: Arc<CompletionQueue>,
        requests: u32,
    ) -> Result<Self> {
        // SAFETY: a plain structure of integers and pointers, for which zeros are valid.
        let mut attributes: sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attributes.send_cq = queue.raw.as_ptr();
        attributes.recv_cq = queue.raw.as_ptr();
        attributes.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = requests;
        attributes.cap.max_recv_wr = 1;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_recv_sge = 1;
        // SAFETY: id, domain and queue live; the library checks that they are of one device.
        let result =
            unsafe { sys::rdma_create_qp(id.raw.as_ptr(), domain.raw.as_ptr(), &mut attributes) };
        check("rdma_create_qp", result)?;
        Ok(Self {
            outstanding: HashMap::new(),
            queue,
            domain,
            id,
        })
    }

    /// What events call its id.
    pub(super) fn name(&self) -> IdName {
        self.id.name()
    }

    fn parameters(&self, private_data: &[u8]) -> sys::rdma_conn_param {
        // SAFETY: a plain structure of integers and pointers, for which zeros are valid.
        let mut parameters: sys::rdma_conn_param = unsafe { std::mem::zeroed() };
        parameters.private_data = private_data.as_ptr().cast();
        parameters.private_data_len = u8::try_from(private_data.len()).unwrap_or(u8::MAX);
        parameters.responder_resources = self.domain.limits.reads_answered;
        parameters.initiator_depth = self.domain.limits.reads_asked;
        parameters.retry_count = RETRIES;
        parameters.rnr_retry_count = RETRIES;
        parameters
    }

    /// Asks the peer for a connection, once the route is resolved.
    ///
    /// # Panics
    /// When there are more than [`PRIVATE_DATA_BYTES_MAX`] bytes of private data.
    pub(super) fn connect(&self, private_data: &[u8]) -> Result<()> {
        assert!(private_data.len() <= PRIVATE_DATA_BYTES_MAX);
        let mut parameters = self.parameters(private_data);
        // SAFETY: the id lives and has a queue pair; the private data is valid for reading during
        // the call, which copies it.
        check("rdma_connect", unsafe {
            sys::rdma_connect(self.id.raw.as_ptr(), &mut parameters)
        })
    }

    /// Accepts the peer's request.
    pub(super) fn accept(&self) -> Result<()> {
        let mut parameters = self.parameters(&[]);
        // SAFETY: as in `connect`.
        check("rdma_accept", unsafe {
            sys::rdma_accept(self.id.raw.as_ptr(), &mut parameters)
        })
    }

    /// Asks the device to read `length` bytes of the peer's memory to `offset` of `landing`. The
    /// completion has `number`, which no other outstanding read may have.
    ///
    /// # Panics
    /// When the bytes do not fit, or the number is taken.
    pub(super) fn read(
        &mut self,
        number: u64,
        landing: &Arc<Landing>,
        offset: usize,
        length: u32,
        remote: RemoteRange,
    ) -> Result<()> {
        let end = offset.checked_add(length as usize);
        assert!(
            end.is_some_and(|end| end <= landing.length),
            "a read must stay inside of its landing"
        );
        assert!(
            !self.outstanding.contains_key(&number),
            "numbers of outstanding reads must differ"
        );
        let region = &landing.place.region;
        let mut part = sys::ibv_sge {
            addr: region.map.as_ptr().addr() as u64 + (landing.place.offset + offset) as u64,
            length,
            lkey: region.registration.local_key(),
        };
        // SAFETY: a plain structure of integers, pointers and unions of such, for which zeros are
        // valid.
        let mut request: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = number;
        request.sg_list = &mut part;
        request.num_sge = 1;
        request.opcode = sys::ibv_wr_opcode::IBV_WR_RDMA_READ;
        request.send_flags = sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
        request.wr.rdma = sys::rdma_t {
            remote_addr: remote.address,
            rkey: remote.key,
        };
        let mut refused = ptr::null_mut();
        // SAFETY: the queue pair lives (made in `new`, destroyed in `drop`). Request and part are
        // read during the call only. The memory that the device will write to stays, and is seen by
        // nobody, until the completion was polled or the queue pair is destroyed: the share of
        // `landing` in `outstanding` lives until then.
        let result =
            unsafe { sys::ibv_post_send(self.id.raw.as_ref().qp, &mut request, &mut refused) };
        if result != 0 {
            return Err(code("ibv_post_send", result));
        }
        self.outstanding.insert(number, Arc::clone(landing));
        Ok(())
    }

    /// Takes completions of reads that have ended, some at a time; none when there are none now.
    pub(super) fn poll(&mut self) -> Result<Vec<Completion>> {
        const AT_ONCE: usize = 32;
        // SAFETY: plain structures of integers, for which zeros are valid.
        let mut entries: [sys::ibv_wc; AT_ONCE] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives; as many entries as said are valid for writing.
        let count = unsafe {
            sys::ibv_poll_cq(
                self.queue.raw.as_ptr(),
                AT_ONCE as c_int,
                entries.as_mut_ptr(),
            )
        };
        let count = usize::try_from(count).map_err(|_| code("ibv_poll_cq", -count))?;
        Ok(entries[..count]
            .iter()
            .map(|entry| {
                self.outstanding.remove(&entry.wr_id);
                Completion {
                    number: entry.wr_id,
                    status: entry.status,
                }
            })
            .collect())
    }

    /// Tells the peer that the connection ends.
    pub(super) fn disconnect(&self) {
        self.id.disconnect();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: the queue pair was made in `new` and is destroyed once, before the queue and the
        // domain that it uses. The device writes to no landing of it afterwards, so `outstanding`
        // may be dropped.
        unsafe { sys::rdma_destroy_qp(self.id.raw.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host without RDMA is the usual case and no error.
    #[test]
    fn asking_for_devices_never_fails() {
        let names = devices();
        assert!(names.iter().all(|name| !name.is_empty()), "{names:?}");
    }

    /// Root may write to what it likes: `tests/rdma/guest/suite.sh` runs this as somebody else.
    #[test]
    fn the_owner_of_a_sealed_file_can_open_it_and_it_stays_sealed() {
        use std::os::unix::fs::FileExt;

        let path = std::env::temp_dir().join(format!("stoa-sealed-{}", std::process::id()));
        std::fs::write(&path, b"sealed").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let writable = open_writable(&file).unwrap();
        writable.write_all_at(b"S", 0).unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o440);
    }

    #[test]
    fn too_little_memory_to_lock_says_what_to_raise() {
        let error = code("ibv_reg_mr", nix::errno::Errno::ENOMEM as i32);
        let text = error.to_string();
        assert!(
            text.contains("ulimit -l") && text.contains("CAP_IPC_LOCK"),
            "{text}"
        );
        let other = code("ibv_reg_mr", nix::errno::Errno::EINVAL as i32).to_string();
        assert!(!other.contains("ulimit"), "{other}");
    }
}
