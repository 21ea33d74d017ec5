//! Threads for what keeps a processor busy and nobody waits for: decoding, packing, and writing into
//! shared memory.
//!
//! They run beside queries, often in the same process. Where all processors are busy, a query comes
//! first: the first query of a table that was just created should take no longer because the table
//! is being loaded. The load still gets its share, so that it ends whatever else runs.

use std::io;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// A tenth of the weight that threads usually have, as nice(2) counts.
const NICE: i32 = 10;

/// Threads that yield to others, made as they are needed.
#[derive(Debug)]
pub(crate) struct Background {
    /// Only its threads for blocking work are used; `None` while it is dropped.
    runtime: Option<Runtime>,
}

impl Background {
    /// # Errors
    /// If the system gives no more file descriptors.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .thread_name("stoa-fill")
            .on_thread_start(|| {
                if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                    tracing::debug!(%error, "a load competes with queries");
                }
            })
            .build()?;
        Ok(Self {
            runtime: Some(runtime),
        })
    }

    /// Runs `work` on such a thread, also where nobody waits for the handle.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let runtime = self.runtime.as_ref();
        runtime
            .expect("it is there until it is dropped")
            .spawn_blocking(work)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Waiting for threads is forbidden where this may be dropped: in a task.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_yields_to_others_and_is_dropped_in_a_task() {
        let background = Background::start().unwrap();
        let own = rustix::process::getpriority_process(None).unwrap();
        let priority = background.spawn(|| rustix::process::getpriority_process(None).unwrap());
        assert_eq!(priority.await.unwrap(), NICE.max(own));
        assert_eq!(rustix::process::getpriority_process(None).unwrap(), own);
        drop(background);
    }
}
