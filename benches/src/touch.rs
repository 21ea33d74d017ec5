//! First touch and cold: every time in a process of its own.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use stoa_figures::document::FirstTouch;
use stoa_figures::stats::median;
use stoa_figures::times::{ByQuery, turns};
use stoa_figures::{Block, Times};

use crate::Error;
use crate::child::{Request, Running, Task, Touched};
use crate::hot::Plan;
use crate::modes::{Cache, Mode};
use crate::suite::Data;

/// Executions after the first, of which the median is the hot time.
const HOT_EXECUTIONS: usize = 5;

/// First over hot time of every query, in new processes over a loaded cache; with and without
/// prefaulting where the mode has a cache.
///
/// # Errors
/// If a child fails, or the mode has its memory in the process (then there is no such time).
pub async fn first(plan: Plan<'_>, mode: &Mode) -> Result<Vec<(String, FirstTouch)>, Error> {
    if !mode.is_stoa() {
        let found = touches(plan, mode, None, false)?;
        return Ok(vec![(mode.to_string(), found)]);
    }
    let cache = Cache::start(mode, plan.data, plan.cache_root).await?;
    let measured = match cache.load(mode, plan.data).await {
        Ok(()) => [false, true]
            .into_iter()
            .map(|prefault| {
                let found = touches(plan, mode, Some(&cache), prefault)?;
                let prefaulted = if prefault { ", prefault" } else { "" };
                Ok((format!("{mode}{prefaulted}"), found))
            })
            .collect(),
        Err(error) => Err(error),
    };
    cache.stop().await;
    measured
}

fn touches(
    plan: Plan<'_>,
    mode: &Mode,
    cache: Option<&Cache>,
    prefault: bool,
) -> Result<FirstTouch, Error> {
    let (mut first, mut hot) = (ByQuery::new(), ByQuery::new());
    let (mut attach_ms, mut prefault_ms) = (vec![], vec![]);
    for round in 1..=plan.iterations {
        for query in plan.queries {
            let request = Request {
                task: Task::Touch {
                    hot: HOT_EXECUTIONS,
                    prefault,
                },
                data: plan.data.clone(),
                mode: mode.to_string(),
                partitions: plan.partitions,
                queries: vec![query.clone()],
                cache: cache.map(Cache::directory),
            };
            let found: Touched = Running::start(&request)?.answer()?;
            first.entry(query.number).or_default().push(found.first_ms);
            let again = median(&found.hot_ms).ok_or("no hot execution")?;
            hot.entry(query.number).or_default().push(again);
            attach_ms.push(found.attach_ms);
            prefault_ms.push(found.prefault_ms);
        }
        eprintln!("first touch, {mode}: round {round} of {}", plan.iterations);
    }
    let pages = match cache {
        Some(_) => pages(plan.cache_root)?,
        None => "4 KiB".to_owned(),
    };
    Ok(FirstTouch {
        pages,
        prefault,
        attach_ms: median(&attach_ms).unwrap_or(0.0),
        prefault_ms: median(&prefault_ms).unwrap_or(0.0),
        ..FirstTouch::of(&first, &hot)
    })
}

/// Times of every query where nothing is in memory, modes interleaved. What it takes to know the
/// tables counts: their footers are read by the query that comes first.
///
/// # Errors
/// If a child fails.
pub fn cold(plan: Plan<'_>, modes: &[Mode]) -> Result<Times, Error> {
    let mut block = Block::default();
    for round in 1..=plan.iterations {
        for query in plan.queries {
            for i in turns(modes.len(), round, query.number) {
                let mode = &modes[i];
                forget_pages(plan.data)?;
                let request = Request {
                    task: Task::Cold {
                        cache_root: plan.cache_root.to_path_buf(),
                    },
                    data: plan.data.clone(),
                    mode: mode.to_string(),
                    partitions: plan.partitions,
                    queries: vec![query.clone()],
                    cache: None,
                };
                let found: Touched = Running::start(&request)?.answer()?;
                block.push(
                    &mode.to_string(),
                    query.number,
                    found.attach_ms + found.first_ms,
                );
            }
        }
        eprintln!("cold: round {round} of {}", plan.iterations);
    }
    Ok(Times {
        blocks: vec![block],
    })
}

/// Drops the files of the data from the page cache.
fn forget_pages(data: &Data) -> Result<(), Error> {
    for table in &data.tables {
        for entry in std::fs::read_dir(data.directory.join(table))? {
            let file = File::open(entry?.path())?;
            // Pages that are not written yet stay.
            file.sync_all()?;
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(())
}

/// `huge` where the file system below `root` was mounted with huge pages, else `4 KiB`.
pub(crate) fn pages(root: &Path) -> Result<String, Error> {
    let root = root.canonicalize()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    Ok(pages_of(&root, &mounts).to_owned())
}

fn pages_of(root: &Path, mounts: &str) -> &'static str {
    let of = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, options) = (fields.next()?, fields.nth(1)?);
        root.starts_with(place)
            .then_some((place.len(), options.contains("huge=always")))
    });
    // The longest prefix is the mount that the directory lies in; the last one hides earlier ones.
    match of.max_by_key(|(length, _)| *length) {
        Some((_, true)) => "huge",
        _ => "4 KiB",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_those_of_the_innermost_mount() {
        let mounts = "/dev/vda / ext4 rw 0 0\n\
                      tmpfs /dev/shm tmpfs rw,nosuid 0 0\n\
                      stoa /mnt/stoa tmpfs rw,huge=always,size=4g 0 0\n";
        assert_eq!(pages_of(Path::new("/dev/shm"), mounts), "4 KiB");
        assert_eq!(pages_of(Path::new("/mnt/stoa/a"), mounts), "huge");
        assert_eq!(pages_of(Path::new("/mnt/other"), mounts), "4 KiB");
    }
}
