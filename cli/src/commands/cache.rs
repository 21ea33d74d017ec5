//! `stoa cache verify`: every byte against its checksum.

use std::process::ExitCode;

use serde_json::json;
use stoa_shm::CacheReader;

use super::print_json;
use crate::config::format_bytes;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::progress::spinner;

/// Checks the cache directory of this machine as any reader sees it, beside a running worker.
pub async fn verify(json: bool, context: &Context) -> Result<ExitCode> {
    let location = context.config.cache.location.clone();
    if !location.is_dir() {
        return Err(Error::NotReady(format!(
            "no cache at {}; load something first, or name the directory with \
             --set cache.location=…",
            location.display()
        )));
    }
    let spinner = spinner(format!("hashing {}", location.display()));
    let report =
        tokio::task::spawn_blocking(move || CacheReader::open(location).snapshot().verify())
            .await
            .map_err(|error| Error::while_doing("the check ended early", error))?;
    spinner.finish_and_clear();
    let chunks: Vec<String> = report
        .bad_chunks
        .iter()
        .map(|(key, problem)| format!("{}: {problem}", key.readable()))
        .collect();
    let catalogs: Vec<String> = report
        .bad_catalogs
        .iter()
        .map(|(name, problem)| format!("catalog {name}: {problem}"))
        .collect();
    if json {
        print_json(&json!({
            "clean": report.is_clean(),
            "checked": report.checked,
            "bytes": report.bytes,
            "bad_chunks": chunks,
            "bad_catalogs": catalogs,
            "index_problem": report.index_problem,
        }));
    } else {
        for problem in chunks.iter().chain(&catalogs).chain(&report.index_problem) {
            println!("bad: {problem}");
        }
        println!(
            "{} chunks and catalogs, {}: {}",
            report.checked,
            format_bytes(report.bytes),
            match report.is_clean() {
                true => "all as they were written".to_string(),
                false => format!(
                    "{} are damaged; a worker drops and reloads them when it next goes through its \
                     memory (cache.scrub.interval)",
                    chunks.len() + catalogs.len() + usize::from(report.index_problem.is_some())
                ),
            }
        );
    }
    Ok(match report.is_clean() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    })
}
