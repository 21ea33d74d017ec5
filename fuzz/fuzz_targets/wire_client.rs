//! A client against a server that sends anything: every read and call ends, and what a read brings
//! is as long as what was asked for.

#![no_main]

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use libfuzzer_sys::fuzz_target;
use stoa_transfer::conformance::read;
use stoa_transfer::wire::Hello;
use stoa_transfer::{BlockPool, link_over};
use tokio::io::AsyncWriteExt;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut stream = Hello::new(1 << 20, 1 << 20).to_bytes().to_vec();
    stream.extend(stoa_fuzz::frames(data));
    runtime.block_on(async {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (mut far_read, mut far_write) = tokio::io::split(far);
        let pool = BlockPool::new(1 << 20);
        let serving = async {
            let sending = async {
                let _ = far_write.write_all(&stream).await;
                let _ = far_write.shutdown().await;
            };
            let mut sink = tokio::io::sink();
            let draining = tokio::io::copy(&mut far_read, &mut sink);
            let ((), _) = tokio::join!(sending, draining);
        };
        let asking = async {
            let link = link_over(near, &pool).await.expect("the hello is good");
            let deadline = Instant::now() + Duration::from_secs(5);
            let lengths = [1, 100, 1000, 4096];
            let reads = lengths.map(|length| read(1, 0, length)).to_vec();
            let outcomes = link.submit(reads, deadline);
            let dropped = link.submit(vec![read(1, 0, 77)], deadline);
            drop(dropped);
            let calls = [1, 2].map(|method| link.call(method, Bytes::from_static(b"x"), deadline));
            let reading = async {
                let mut outcomes = outcomes;
                let mut ended = 0;
                while let Some((place, outcome)) = outcomes.next().await {
                    ended += 1;
                    if let Ok(block) = outcome {
                        assert_eq!(block.len() as u64, lengths[place]);
                    }
                }
                assert_eq!(ended, lengths.len());
            };
            let calling = futures::future::join_all(calls);
            tokio::join!(reading, calling);
            drop(link);
        };
        let both = async {
            tokio::join!(serving, asking);
        };
        tokio::time::timeout(Duration::from_secs(10), both)
            .await
            .expect("every read and call ends");
    });
});
