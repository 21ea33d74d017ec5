//! The conformance suite over every transport and wrapper.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::conformance::{self, Pair, Pairs, Segments};
use crate::{
    CallHandler, Faulty, InProcess, SegmentSource, Server, ServerSettings, Throttled, Transport,
};

struct InProcessPairs;

#[async_trait]
impl Pairs for InProcessPairs {
    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair {
        struct Stop(InProcess);
        impl Drop for Stop {
            fn drop(&mut self) {
                self.0.stop("a");
            }
        }
        let network = InProcess::default();
        network.serve("a", segments, calls);
        Pair {
            transport: Arc::new(network.clone()),
            address: "a".to_string(),
            server: Box::new(Stop(network)),
        }
    }
}

struct TcpPairs;

#[async_trait]
impl Pairs for TcpPairs {
    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair {
        let server = Server::start(ServerSettings::default(), segments, calls)
            .await
            .unwrap();
        Pair {
            transport: super::tcp(),
            address: server.address().to_string(),
            server: Box::new(server),
        }
    }
}

/// Segments in files, which the kernel sends by itself.
struct FilePairs;

#[async_trait]
impl Pairs for FilePairs {
    fn segments(&self, sizes: &[usize]) -> Segments {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        // The files live as long as they are open.
        Segments::in_files(sizes, directory.path()).unwrap()
    }

    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair {
        TcpPairs.pair(segments, calls).await
    }
}

/// The pairs of another one, with a wrapper around their transport.
struct Wrapped<P, W>(P, W);

#[async_trait]
impl<P, W> Pairs for Wrapped<P, W>
where
    P: Pairs,
    W: Fn(Arc<dyn Transport>) -> Arc<dyn Transport> + Send + Sync,
{
    async fn pair(&self, segments: Arc<dyn SegmentSource>, calls: Arc<dyn CallHandler>) -> Pair {
        let pair = self.0.pair(segments, calls).await;
        Pair {
            transport: (self.1)(pair.transport),
            ..pair
        }
    }
}

#[tokio::test]
async fn in_process_conforms() {
    conformance::all(&InProcessPairs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_conforms() {
    conformance::all(&TcpPairs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_sent_by_the_kernel_conform() {
    conformance::all(&FilePairs).await;
}

#[tokio::test]
async fn tcp_conforms_on_one_thread() {
    conformance::all(&TcpPairs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttle_conforms() {
    let throttled = |inner| -> Arc<dyn Transport> {
        Arc::new(Throttled::new(inner, Duration::from_millis(2), 400e6))
    };
    conformance::all(&Wrapped(TcpPairs, throttled)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_that_do_not_happen_conform() {
    let faultless = |inner| -> Arc<dyn Transport> { Arc::new(Faulty::new(inner, |_| None)) };
    conformance::all(&Wrapped(TcpPairs, faultless)).await;
}
