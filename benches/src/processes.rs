//! Several processes at once over one cache: throughput and memory.

use std::time::Instant;

use stoa_figures::document::Processes;

use crate::Error;
use crate::child::{Passed, Request, Running, Task};
use crate::hot::Plan;
use crate::modes::{Cache, Mode};

/// Runs all queries in `count` processes with one partition each: in one of them alone, then in all
/// at once, so often as the plan has iterations.
///
/// # Errors
/// If a child fails, or the mode cannot be shared between processes.
pub async fn measure(plan: Plan<'_>, mode: &Mode, count: usize) -> Result<Processes, Error> {
    if *mode == Mode::Memtable {
        return Err("a memory table is not shared between processes".into());
    }
    let cache = match mode.is_stoa() {
        true => Some(Cache::start(mode, plan.data, plan.cache_root).await?),
        false => None,
    };
    let mut loaded = Ok(());
    if let Some(cache) = &cache {
        loaded = cache.load(mode, plan.data).await;
    }
    let measured = loaded.and_then(|()| rounds(plan, mode, count, cache.as_ref()));
    if let Some(cache) = cache {
        cache.stop().await;
    }
    measured
}

fn rounds(
    plan: Plan<'_>,
    mode: &Mode,
    count: usize,
    cache: Option<&Cache>,
) -> Result<Processes, Error> {
    let request = Request {
        task: Task::Passes,
        data: plan.data.clone(),
        mode: mode.to_string(),
        partitions: 1,
        queries: plan.queries.to_vec(),
        cache: cache.map(Cache::directory),
    };
    let mut children = vec![];
    for _ in 0..count {
        children.push(Running::start(&request)?);
    }
    for child in &mut children {
        child.answer::<Passed>()?;
    }
    let mut rounds = vec![];
    for round in 1..=plan.iterations {
        children[0].ask()?;
        let alone: Passed = children[0].answer()?;
        let start = Instant::now();
        for child in &mut children {
            child.ask()?;
        }
        for child in &mut children {
            child.answer::<Passed>()?;
        }
        rounds.push((alone.seconds, start.elapsed().as_secs_f64()));
        eprintln!(
            "{count} processes, {mode}: round {round} of {}",
            plan.iterations
        );
    }
    let cores = std::thread::available_parallelism()?.get();
    let mut found = Processes::of(count, cores, &rounds);
    for child in &children {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id()))?;
        found.pss_bytes += kilobytes(&rollup, "Pss:") * 1024;
        found.pss_shared_bytes += kilobytes(&rollup, "Pss_Shmem:") * 1024;
    }
    found.cache_bytes = cache.map_or(0, Cache::bytes);
    Ok(found)
}

/// The number behind a name in the kernel's account of a process's memory; 0 where it is not there.
fn kilobytes(rollup: &str, name: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim().split(' ').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_account() {
        let rollup = "00400000-7fff [rollup]\nRss:  9 kB\nPss:               1234 kB\n\
                      Pss_Anon:             5 kB\nPss_Shmem:          678 kB\n";
        assert_eq!(kilobytes(rollup, "Pss:"), 1234);
        assert_eq!(kilobytes(rollup, "Pss_Shmem:"), 678);
        assert_eq!(kilobytes(rollup, "Pss_File:"), 0);
    }
}
