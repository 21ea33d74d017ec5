//! Scans of Parquet that Stoa did not plan use what is cached of their files.

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_datasource::PartitionedFile;
use datafusion_datasource::file_groups::FileGroup;
use datafusion_datasource::file_scan_config::{FileScanConfig, FileScanConfigBuilder};
use datafusion_datasource::source::DataSourceExec;
use datafusion_datasource_parquet::source::ParquetSource;
use stoa_reader::Reader;

use crate::StoaOptions;
use crate::scan::StoaSource;

/// Wraps the source of every stock Parquet scan in a [`StoaSource`].
///
/// It runs last, so that all that was pushed down stays. Files are matched by store, path, size
/// and etag or version: where a scan's listing has none, it stays as it is.
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
        plan.transform_up(|node| {
            Ok(wrap(&node, &self.reader).map_or(Transformed::no(node), Transformed::yes))
        })
        .map(|transformed| transformed.data)
    }

    fn name(&self) -> &str {
        "stoa_cache_parquet_scans"
    }

    fn schema_check(&self) -> bool {
        true
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

fn wrap(node: &Arc<dyn ExecutionPlan>, reader: &Reader) -> Option<Arc<dyn ExecutionPlan>> {
    let exec = node.downcast_ref::<DataSourceExec>()?;
    let config = exec.data_source().downcast_ref::<FileScanConfig>()?;
    let parquet = config.file_source().downcast_ref::<ParquetSource>()?;
    let source = StoaSource::new(parquet.clone(), reader.clone());
    let config = match divided(config, &source) {
        Some(config) => config,
        None => config.clone(),
    };
    let config = FileScanConfigBuilder::from(config)
        .with_source(Arc::new(source))
        .build();
    Some(DataSourceExec::from_data_source(config))
}
