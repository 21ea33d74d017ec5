//! Scans of Parquet that Stoa did not plan use what is cached of their files.

use std::sync::{Arc, Once};

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::execution_plan::replace_children_if_necessary;
use datafusion_datasource::PartitionedFile;
use datafusion_datasource::file::FileSource;
use datafusion_datasource::file_groups::FileGroup;
use datafusion_datasource::file_scan_config::{FileScanConfig, FileScanConfigBuilder};
use datafusion_datasource::source::DataSourceExec;
use datafusion_datasource_parquet::source::ParquetSource;
use stoa_reader::{Reader, View};

use crate::StoaOptions;
use crate::scan::context::resolve;
use crate::scan::{StoaSource, store_of};

/// Wraps the sources of stock Parquet scans of cached files in a [`StoaSource`].
///
/// It runs last, so that all that was pushed down stays. Files are matched by store, path, size
/// and etag or version: where a scan's listing has none, it stays as it is. So does a scan none of
/// whose files the cache knows, one with virtual columns, which only stock Parquet makes, and one
/// whose parent does not take another child. The rule fails no query.
#[derive(Debug)]
pub struct CacheParquetScans {
    reader: Reader,
}

impl CacheParquetScans {
    /// A rule that reads from `reader`.
    pub fn new(reader: Reader) -> Self {
        Self { reader }
    }
}

impl PhysicalOptimizerRule for CacheParquetScans {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        config: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let options = StoaOptions::of(config);
        if !options.enabled || !options.cache_parquet_scans {
            return Ok(plan);
        }
        let view = self.reader.view();
        Ok(wrapped(&plan, &self.reader, &view).unwrap_or(plan))
    }

    fn name(&self) -> &str {
        "stoa_cache_parquet_scans"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The plan with scans wrapped; `None` where none is.
fn wrapped(
    node: &Arc<dyn ExecutionPlan>,
    reader: &Reader,
    view: &View,
) -> Option<Arc<dyn ExecutionPlan>> {
    if node.children().is_empty() {
        return wrap(node, reader, view);
    }
    let mut changed = false;
    let children = node.children().into_iter();
    let children = children.map(|child| match wrapped(child, reader, view) {
        Some(child) => {
            changed = true;
            child
        }
        None => Arc::clone(child),
    });
    let children: Vec<_> = children.collect();
    if !changed {
        return None;
    }
    // An operator may hold its child to what it was, as one that knows by position which rows of a
    // file are deleted. It keeps that child then, and what lies under it.
    match replace_children_if_necessary(Arc::clone(node), children) {
        Ok(node) => Some(node),
        Err(error) => {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                let operator = node.name();
                tracing::warn!(operator, %error, "reads Parquet past the cache: it takes no other scan");
            });
            None
        }
    }
}

/// The scan's files divided anew, at blocks, where stock Parquet has divided them at bytes.
fn divided(config: &FileScanConfig, source: &StoaSource) -> Option<FileScanConfig> {
    let files = || config.file_groups.iter().flat_map(FileGroup::iter);
    let by_bytes = files().any(|file| file.range.is_some());
    if !by_bytes || config.preserve_order || config.output_partitioning.is_some() {
        return None;
    }
    let mut whole: Vec<PartitionedFile> = vec![];
    for file in files() {
        let range = file.range.as_ref()?;
        match whole.last_mut() {
            Some(last) if last.object_meta == file.object_meta => {
                let reached = last.range.as_mut().filter(|last| last.end == range.start)?;
                reached.end = range.end;
            }
            _ => whole.push(file.clone()),
        }
    }
    for file in &mut whole {
        let (start, end) = file.range();
        if (start, end) != (0, file.object_meta.size) {
            return None;
        }
        file.range = None;
    }
    let partitions = config.file_groups.len();
    let mut config = config.clone();
    config.file_groups = vec![FileGroup::new(whole)];
    let divided = source.divided(&config, partitions, false)?;
    // The plan above counts on the partitions that it was told.
    (divided.file_groups.len() == partitions).then_some(divided)
}

fn wrap(
    node: &Arc<dyn ExecutionPlan>,
    reader: &Reader,
    view: &View,
) -> Option<Arc<dyn ExecutionPlan>> {
    let exec = node.downcast_ref::<DataSourceExec>()?;
    let config = exec.data_source().downcast_ref::<FileScanConfig>()?;
    let parquet = config.file_source().downcast_ref::<ParquetSource>()?;
    if !parquet.table_schema().virtual_columns().is_empty() {
        return None;
    }
    let store = store_of(config);
    let mut files = config.file_groups.iter().flat_map(FileGroup::iter);
    files.find(|file| resolve(view, &store, file).is_some())?;
    let source = StoaSource::new(parquet.clone(), reader.clone());
    let (config, in_order) = match divided(config, &source) {
        Some(config) => (config, false),
        None => (config.clone(), true),
    };
    let source = source.with_rows_in_order(in_order);
    let config = FileScanConfigBuilder::from(config)
        .with_source(Arc::new(source))
        .build();
    Some(DataSourceExec::from_data_source(config))
}
