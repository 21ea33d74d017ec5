//! Reading into and writing from memory that is not the connection's own, with as few system calls
//! and copies as the kind of stream allows.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// The receiving half of a stream.
pub(crate) enum ReadHalf {
    /// A plain socket: reads scatter.
    Tcp(OwnedReadHalf),
    /// Anything else, such as TLS.
    Other(Box<dyn AsyncRead + Send + Unpin>),
}

/// The sending half of a stream.
pub(crate) enum WriteHalf {
    /// A plain socket.
    Tcp(OwnedWriteHalf),
    /// Anything else, such as TLS.
    Other(Box<dyn AsyncWrite + Send + Unpin>),
}

/// A stream in halves.
pub(crate) type Halves = (ReadHalf, WriteHalf);

/// A plain socket in halves.
pub(crate) fn plain(stream: TcpStream) -> Halves {
    let (read, write) = stream.into_split();
    (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
}

/// Any other stream in halves.
pub(crate) fn other(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Halves {
    let (read, write) = tokio::io::split(stream);
    (
        ReadHalf::Other(Box::new(read)),
        WriteHalf::Other(Box::new(write)),
    )
}

/// What every connection's socket gets: no waiting for more to send, and a probe of peers that
/// have fallen silent.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    const SILENCE_SECONDS: u64 = 30;
    const PROBE_SECONDS: u64 = 10;
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(SILENCE_SECONDS))
            .with_interval(Duration::from_secs(PROBE_SECONDS))
            .with_retries(3),
    )
}

/// Lets `stream` count as readable only from this many bytes on, or when it has ended: a receiver
/// that waits for a long body is not woken for each piece of it.
#[expect(unsafe_code, reason = "no safe crate of the workspace has this option")]
fn set_low_water(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while `stream` is borrowed; the kernel reads an int of the
    // given size from a pointer to one, and keeps neither.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl ReadHalf {
    /// Says how many bytes are worth being woken for; other streams than plain sockets are woken
    /// for any.
    fn worth_waking(&self, bytes: usize) -> io::Result<()> {
        match self {
            Self::Tcp(half) => set_low_water(half.as_ref(), bytes),
            Self::Other(_) => Ok(()),
        }
    }

    /// Reads into `first` and then, where the stream can, into `second`; 0 is the end. Not less
    /// than one of the two is given.
    async fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => loop {
                half.readable().await?;
                let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
                let slices = if slices[0].is_empty() {
                    &mut slices[1..]
                } else {
                    &mut slices[..]
                };
                match half.try_read_vectored(slices) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
            },
            Self::Other(half) if first.is_empty() => half.read(second).await,
            Self::Other(half) => half.read(first).await,
        }
    }
}

/// Bytes read ahead at most: enough for many small frames at once.
const AHEAD_BYTES: usize = 64 << 10;

/// While at least this much of a body is missing, less is not worth waking for. The kernel's
/// buffers hold several times as much.
const LOW_WATER_BYTES: usize = 256 << 10;

/// What has been received and not been used, before the rest of the stream.
pub(crate) struct Input<R> {
    half: ReadHalf,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    /// Told of every byte that comes.
    progress: R,
}

impl<R: Fn(usize)> Input<R> {
    pub(crate) fn new(half: ReadHalf, progress: R) -> Self {
        Self {
            half,
            ahead: vec![0; AHEAD_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            progress,
        }
    }

    fn came(&self, bytes: usize) -> io::Result<()> {
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.progress)(bytes);
        Ok(())
    }

    /// The next `N` bytes; `None` where the stream ends before the first one.
    pub(crate) async fn take<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        const { assert!(N <= AHEAD_BYTES) };
        if self.end - self.start < N {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.end - self.start < N {
            let read = self.half.read(&mut self.ahead[self.end..], &mut []).await?;
            if read == 0 && self.end == self.start {
                return Ok(None);
            }
            self.came(read)?;
            self.end += read;
        }
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.ahead[self.start..self.start + N]);
        self.start += N;
        Ok(Some(bytes))
    }

    /// Fills `target`. What is not here yet is received in place; behind it at most `ahead_max`
    /// bytes are read ahead with the same call.
    pub(crate) async fn fill(&mut self, target: &mut [u8], ahead_max: usize) -> io::Result<()> {
        let here = target.len().min(self.end - self.start);
        target[..here].copy_from_slice(&self.ahead[self.start..self.start + here]);
        self.start += here;
        let mut filled = here;
        if filled < target.len() {
            (self.start, self.end) = (0, 0);
        }
        let mut low_water = 1;
        while filled < target.len() {
            let rest = &mut target[filled..];
            let rest_bytes = rest.len();
            let worth = if rest_bytes >= LOW_WATER_BYTES {
                LOW_WATER_BYTES
            } else {
                1
            };
            if worth != low_water {
                self.half.worth_waking(worth)?;
                low_water = worth;
            }
            let read = self
                .half
                .read(rest, &mut self.ahead[..ahead_max.min(AHEAD_BYTES)])
                .await?;
            self.came(read)?;
            filled += read.min(rest_bytes);
            self.end = read.saturating_sub(rest_bytes);
        }
        if low_water != 1 {
            self.half.worth_waking(1)?;
        }
        Ok(())
    }

    /// Drops the next `bytes` bytes.
    pub(crate) async fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            if self.start == self.end {
                let read = self.half.read(&mut self.ahead, &mut []).await?;
                self.came(read)?;
                (self.start, self.end) = (0, read);
            }
            let here = (self.end - self.start) as u64;
            let dropped = here.min(bytes);
            self.start += usize::try_from(dropped).unwrap_or(0);
            bytes -= dropped;
        }
        Ok(())
    }
}

/// The sending half, with the longest time that it may stand still.
pub(crate) struct Output {
    half: WriteHalf,
    stall_timeout: Duration,
}

impl Output {
    pub(crate) fn new(half: WriteHalf, stall_timeout: Duration) -> Self {
        Self {
            half,
            stall_timeout,
        }
    }

    async fn unstalled<T>(
        stall_timeout: Duration,
        write: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        tokio::time::timeout(stall_timeout, write)
            .await
            .map_err(|_elapsed| {
                io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "the other end took nothing for {} ms",
                        stall_timeout.as_millis()
                    ),
                )
            })?
    }

    /// Sends all of `slices`.
    pub(crate) async fn send(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        // The kernel takes no more at once.
        const SLICES_MAX: usize = 1024;
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let some = &slices[..slices.len().min(SLICES_MAX)];
            let stall_timeout = self.stall_timeout;
            let written = match &mut self.half {
                WriteHalf::Tcp(half) => {
                    Self::unstalled(stall_timeout, half.write_vectored(some)).await?
                }
                WriteHalf::Other(half) => {
                    Self::unstalled(stall_timeout, half.write_vectored(some)).await?
                }
            };
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut slices, written);
        }
        if let WriteHalf::Other(half) = &mut self.half {
            Self::unstalled(self.stall_timeout, half.flush()).await?;
        }
        Ok(())
    }

    /// Ends the stream in order.
    pub(crate) async fn finish(&mut self) {
        let finish = async {
            match &mut self.half {
                WriteHalf::Tcp(half) => half.shutdown().await,
                WriteHalf::Other(half) => half.shutdown().await,
            }
        };
        // The other end may be gone already; there is nothing left to tell it.
        let _ = tokio::time::timeout(Duration::from_millis(200), finish).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the sizes of what comes at once, of headers, of bodies and of what is read ahead,
    /// the bytes are the stream's, in its order.
    #[tokio::test]
    async fn input_is_the_stream_whatever_its_pieces() {
        for (piece, ahead_max) in [(1, 40), (7, 40), (40, 0), (1000, 65536), (100_000, 40)] {
            let stream: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
            let (near, mut far) = tokio::io::duplex(piece);
            let sent = stream.clone();
            let sender = tokio::spawn(async move { far.write_all(&sent).await });
            let (read, _write) = other(near);
            let counted = std::sync::atomic::AtomicUsize::new(0);
            let mut input = Input::new(read, |bytes| {
                counted.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
            });
            let mut at = 0;
            for body in [0, 3, 4096, 70_000, 1, 100_000] {
                let header: [u8; 40] = input.take().await.unwrap().unwrap();
                assert_eq!(header, stream[at..at + 40]);
                at += 40;
                let mut bytes = vec![0; body];
                input.fill(&mut bytes, ahead_max).await.unwrap();
                assert_eq!(bytes, stream[at..at + body]);
                at += body;
                input.skip(5000).await.unwrap();
                at += 5000;
            }
            let rest = (stream.len() - at) as u64;
            input.skip(rest).await.unwrap();
            sender.await.unwrap().unwrap();
            assert!(input.take::<1>().await.unwrap().is_none());
            drop(input);
            assert_eq!(counted.into_inner(), stream.len());
        }
    }
}
