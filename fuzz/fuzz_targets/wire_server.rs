//! A server against a client that sends anything: it ends the connection or answers, and every
//! frame that it sends is one that a client understands.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stoa_transfer::conformance::{Echo, Segments};
use stoa_transfer::wire::{FrameHeader, FrameLimits, Hello, ResponseHead};
use stoa_transfer::{ServerSettings, serve_over};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut stream = Hello::new(0, 0).to_bytes().to_vec();
    stream.extend(stoa_fuzz::frames(data));
    let answers = runtime.block_on(async {
        let (near, far) = tokio::io::duplex(1 << 16);
        let settings = ServerSettings {
            call_bytes_max: 1 << 20,
            ..ServerSettings::default()
        };
        let segments = Arc::new(Segments::in_memory(&[1000, 100_000]));
        let server = tokio::spawn(serve_over(settings, far, segments, Arc::new(Echo)));
        let (mut read, mut write) = tokio::io::split(near);
        let sending = async move {
            let _ = write.write_all(&stream).await;
            let _ = write.shutdown().await;
        };
        let mut answers = Vec::new();
        let receiving = read.read_to_end(&mut answers);
        let (_, received) = tokio::join!(sending, receiving);
        let _ = received;
        let _ = server.await;
        answers
    });
    let (hello, mut rest) = answers
        .split_first_chunk::<{ Hello::BYTES }>()
        .expect("a server begins with its hello");
    Hello::parse(hello).expect("a good hello");
    // The last frame may be cut where the client's end of the stream ended the server.
    while let Some((header, behind)) = rest.split_first_chunk::<{ FrameHeader::BYTES }>() {
        let head = ResponseHead::parse(header, FrameLimits::default()).expect("a good frame");
        let body_bytes = usize::try_from(head.body_bytes()).expect("a length");
        rest = behind.get(body_bytes..).unwrap_or_default();
    }
});
