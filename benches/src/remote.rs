//! Remote hits: queries whose chunks lie in another process's memory, beside Parquet at the origin.
//!
//! The data lie in an object store over HTTP on loopback that delays every answer, and a worker in a
//! process of its own holds all chunks of a mode. This process has none of them: it reads them over
//! TCP, query by query in turn with stock Parquet from the store, and with local hits in the
//! worker's shared memory, which cost nothing more to have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::record_batch::RecordBatch;
use datafusion::execution::context::SessionContext;
use datafusion::execution::object_store::ObjectStoreUrl;
use stoa_cache_manager::{PeerNetwork, TransferSettings};
use stoa_datafusion::Stoa;
use stoa_figures::document::{Remote, Sources};
use stoa_figures::{Block, Times};
use stoa_metastore::{EmbeddedMetastore, Records};
use stoa_origin::{Origin, OriginLimits, Stores};
use stoa_reader::neighbours::{Directory, ToldDirectory};
use stoa_reader::{NeighbourSettings, Neighbours, Reader, ReaderOptions};

use crate::Error;
use crate::child::{Request, Running, Task};
use crate::hot::{Asked, Plan, ask, blocks};
use crate::modes::{Mode, documents, register_parquet, register_stoa, session};
use crate::served::{Held, Store};

/// How long a worker may take to tell what it holds.
const TELL_TIMEOUT: Duration = Duration::from_secs(60);

/// What was measured, by name as in [`Remote::modes`].
#[derive(Debug, Default)]
pub struct Found {
    /// The times.
    pub times: Times,
    /// What was read from where in all measured rounds.
    pub sources: BTreeMap<String, Sources>,
    /// By mode: bytes of the worker's shared memory.
    pub worker_bytes: BTreeMap<String, u64>,
}

/// Whether a mode has a meaning here: Parquet, and Stoa with room for all chunks.
pub fn suits(mode: &Mode) -> bool {
    *mode != Mode::Memtable && mode.budget().is_none()
}

/// Runs the queries in all modes that suit, the first round unmeasured; one mode of Stoa at a time
/// where so said. Every answer of the store comes `delay_ms` late.
///
/// # Errors
/// If a worker does not get everything, a query fails, or answers otherwise in one way than in
/// another.
pub async fn measure(
    plan: Plan<'_>,
    modes: &[Mode],
    one_at_a_time: bool,
    delay_ms: u64,
) -> Result<Found, Error> {
    let modes: Vec<Mode> = modes.iter().filter(|mode| suits(mode)).cloned().collect();
    let mut serving = child(plan, Task::Store { delay_ms }, "")?;
    let store: Store = serving.answer()?;
    let mut found = Found::default();
    // The first way's answers, over all blocks.
    let mut answers = BTreeMap::new();
    for modes in blocks(&modes, one_at_a_time) {
        // Workers, and after them, to go first, what reads them.
        let mut holders = vec![];
        let mut ways = vec![];
        for mode in &modes {
            if !mode.is_stoa() {
                ways.push(Way::parquet(plan, mode, &store).await?);
                continue;
            }
            eprintln!("loading {mode} into a worker");
            let task = Task::Hold {
                cache_root: plan.cache_root.to_path_buf(),
                store: store.clone(),
            };
            let mut holder = child(plan, task, &mode.to_string())?;
            let held: Held = holder.answer()?;
            eprintln!("{} bytes after {:.1} s", held.bytes, held.load_seconds);
            holders.push(holder);
            found.worker_bytes.insert(mode.to_string(), held.bytes);
            ways.push(Way::remote(plan, mode, &store, &held).await?);
            ways.push(Way::local(plan, mode, &store, &held).await?);
        }
        let block = block(plan, &ways, &mut answers, &mut found.sources).await?;
        found.times.blocks.push(block);
    }
    Ok(found)
}

/// This program again, with a task about the plan's data.
fn child(plan: Plan<'_>, task: Task, mode: &str) -> Result<Running, Error> {
    Running::start(&Request {
        task,
        data: plan.data.clone(),
        mode: mode.to_owned(),
        partitions: plan.partitions,
        queries: vec![],
        cache: None,
    })
}

async fn block(
    plan: Plan<'_>,
    ways: &[Way],
    answers: &mut BTreeMap<u32, Vec<RecordBatch>>,
    sources: &mut BTreeMap<String, Sources>,
) -> Result<Block, Error> {
    let mut block = Block::default();
    let asked: Vec<Asked<'_>> = ways
        .iter()
        .map(|way| Asked {
            name: way.name.clone(),
            session: &way.session,
        })
        .collect();
    // The first round warms up and compares the answers; it is not measured.
    ask(plan, 0, &asked, answers, &mut block).await?;
    let before: Vec<Sources> = ways.iter().map(Way::sources).collect();
    for round in 1..=plan.iterations {
        ask(plan, round, &asked, answers, &mut block).await?;
        eprintln!("remote: round {round} of {}", plan.iterations);
    }
    for (way, before) in ways.iter().zip(before) {
        let of = sources.entry(way.name.clone()).or_default();
        *of = of.plus(&way.sources().since(&before));
    }
    Ok(block)
}

/// A session whose tables lie in the store, and a way to their bytes.
struct Way {
    name: String,
    session: SessionContext,
    /// Its own clients of the store.
    stores: Stores,
    /// Its own view of the cache.
    reader: Option<Reader>,
}

impl Way {
    /// Stock Parquet, all of it from the store.
    async fn parquet(plan: Plan<'_>, mode: &Mode, store: &Store) -> Result<Way, Error> {
        let stores = store.clients();
        let session = session(mode, plan.partitions);
        let url = ObjectStoreUrl::parse(&store.root)?;
        session.register_object_store(url.as_ref(), stores.get(&store.root)?);
        register_parquet(&session, plan.data, &store.root).await?;
        Ok(Way {
            name: mode.to_string(),
            session,
            stores,
            reader: None,
        })
    }

    /// As on a host without a worker: no chunk is here, all are in the worker's memory.
    async fn remote(plan: Plan<'_>, mode: &Mode, store: &Store, held: &Held) -> Result<Way, Error> {
        let client = PeerNetwork::new(&TransferSettings::default())?.client;
        let directory = ToldDirectory::follow(&held.addresses, client.clone());
        told(&*directory).await?;
        let neighbours = Neighbours::new(NeighbourSettings::default(), directory, Arc::new(client));
        // What such a host knows of tables comes from the metastore.
        let records = Records::new(Arc::new(EmbeddedMetastore::in_memory()));
        for document in documents(mode, plan.data, &store.root)? {
            let table = document.table.to_string();
            let version = document.version.get();
            records
                .publish_layout(&table, version, &document.to_json())
                .await?;
        }
        let stores = store.clients();
        let reader = Reader::open_among(
            &nowhere(plan),
            ReaderOptions::default(),
            Origin::new(stores.clone(), OriginLimits::default()),
            Some(neighbours),
        );
        let session = session(mode, plan.partitions);
        let stoa = Stoa::with_reader(reader.clone(), Some(records));
        register_stoa(&session, &stoa, plan.data).await?;
        Ok(Way {
            name: mode.to_string(),
            session,
            stores,
            reader: Some(reader),
        })
    }

    /// The worker's chunks as a process on its own host reads them.
    async fn local(plan: Plan<'_>, mode: &Mode, store: &Store, held: &Held) -> Result<Way, Error> {
        let stores = store.clients();
        let origin = Origin::new(stores.clone(), OriginLimits::default());
        let stoa = Stoa::open(&held.directory, origin);
        let session = session(mode, plan.partitions);
        register_stoa(&session, &stoa, plan.data).await?;
        Ok(Way {
            name: Remote::local(&mode.to_string()),
            session,
            stores,
            reader: Some(stoa.reader().clone()),
        })
    }

    /// What was read from where since the start.
    fn sources(&self) -> Sources {
        let origin = self.stores.counters();
        let chunks = self
            .reader
            .as_ref()
            .map(|reader| reader.statistics().counts());
        let chunks = chunks.unwrap_or_default();
        Sources {
            local_chunks: chunks.hits,
            local_bytes: chunks.hit_bytes,
            remote_tcp_chunks: chunks.remote_tcp,
            remote_tcp_bytes: chunks.remote_tcp_bytes,
            remote_rdma_chunks: chunks.remote_rdma,
            remote_rdma_bytes: chunks.remote_rdma_bytes,
            origin_chunks: chunks.misses,
            origin_requests: origin.requests(),
            origin_bytes: origin.bytes,
        }
    }
}

/// A cache directory that never comes to be.
fn nowhere(plan: Plan<'_>) -> PathBuf {
    let name = format!("stoa-bench-{}-nowhere", std::process::id());
    plan.cache_root.join(name)
}

/// Waits until the directory has what the worker holds, which does not change any more.
async fn told(directory: &dyn Directory) -> Result<(), Error> {
    let start = Instant::now();
    // The number of the directory that nobody told yet.
    while directory.current().generation() == 0 {
        if start.elapsed() > TELL_TIMEOUT {
            return Err(
                format!("the worker did not tell what it holds within {TELL_TIMEOUT:?}").into(),
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_hold_everything_is_measured() {
        let suiting = |name: &str| suits(&name.parse().unwrap());
        assert!(suiting("parquet") && suiting("parquet-pushdown"));
        assert!(suiting("stoa-packed") && suiting("stoa-auto-pushdown"));
        assert!(!suiting("memtable") && !suiting("stoa-auto@0.5"));
    }
}
