//! Single flight: work that several callers ask for at the same time is done once.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};

/// Numbers of entries; unique in the process.
static NEXT: AtomicU64 = AtomicU64::new(0);

type Work<V> = BoxFuture<'static, V>;

/// Work in progress by key.
///
/// Work belongs to its callers together: it goes on while one of them waits, and is dropped with
/// the last of them.
pub(crate) struct Flights<K, V: Clone> {
    running: Arc<Mutex<HashMap<K, Entry<V>>>>,
}

struct Entry<V: Clone> {
    /// Tells this entry from a later one with the same key.
    number: u64,
    work: WeakShared<Work<V>>,
}

impl<K, V: Clone> Clone for Flights<K, V> {
    fn clone(&self) -> Self {
        Flights {
            running: self.running.clone(),
        }
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub(crate) fn new() -> Self {
        Flights {
            running: Arc::default(),
        }
    }

    /// The work in progress under `key`, else the work that `make` describes.
    pub(crate) fn join<F>(&self, key: K, make: impl FnOnce() -> F) -> Shared<Work<V>>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut running = lock(&self.running);
        if let Some(shared) = running.get(&key).and_then(|entry| entry.work.upgrade()) {
            return shared;
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let landing = Landing {
            running: self.running.clone(),
            key: key.clone(),
            number,
        };
        let work = make();
        let shared = async move {
            // Dropped when the work is done or abandoned, and with it the entry.
            let _landing = landing;
            work.await
        }
        .boxed()
        .shared();
        if let Some(work) = shared.downgrade() {
            running.insert(key, Entry { number, work });
        }
        shared
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.running).len()
    }
}

struct Landing<K: Eq + Hash, V: Clone> {
    running: Arc<Mutex<HashMap<K, Entry<V>>>>,
    key: K,
    number: u64,
}

impl<K: Eq + Hash, V: Clone> Drop for Landing<K, V> {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        if running
            .get(&self.key)
            .is_some_and(|entry| entry.number == self.number)
        {
            running.remove(&self.key);
        }
    }
}

/// The map is consistent between any two statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn callers_at_the_same_time_share_one_run() {
        let flights: Flights<&str, u32> = Flights::new();
        let runs = Arc::new(AtomicU32::new(0));
        let (go, wait) = oneshot::channel::<()>();
        let first = flights.join("a", {
            let runs = runs.clone();
            move || async move {
                runs.fetch_add(1, Ordering::Relaxed);
                wait.await.ok();
                7
            }
        });
        let second = flights.join("a", || async { unreachable!("it is running already") });
        go.send(()).unwrap();
        assert_eq!(futures::join!(first, second), (7, 7));
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        assert_eq!(flights.len(), 0);
        assert_eq!(flights.join("a", || async { 8 }).await, 8);
    }

    #[tokio::test]
    async fn the_first_caller_may_leave_and_the_work_goes_on() {
        let flights: Flights<u8, u32> = Flights::new();
        let first = flights.join(1, || async {
            tokio::task::yield_now().await;
            7
        });
        let second = flights.join(1, || async { unreachable!("it is running already") });
        drop(first);
        assert_eq!(second.await, 7);
    }

    #[tokio::test]
    async fn abandoned_work_leaves_nothing_behind() {
        let flights: Flights<u8, u32> = Flights::new();
        drop(flights.join(1, std::future::pending));
        assert_eq!(flights.len(), 0);
        let mut waiting = flights.join(1, std::future::pending);
        assert!((&mut waiting).now_or_never().is_none());
        drop(waiting);
        assert_eq!(flights.len(), 0);
        assert_eq!(flights.join(1, || async { 3 }).await, 3);
    }
}
