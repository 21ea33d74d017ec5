//! Scans of Parquet that Stoa did not plan use what is cached of their files.

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
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

fn wrap(node: &Arc<dyn ExecutionPlan>, reader: &Reader) -> Option<Arc<dyn ExecutionPlan>> {
    let exec = node.downcast_ref::<DataSourceExec>()?;
    let config = exec.data_source().downcast_ref::<FileScanConfig>()?;
    let parquet = config.file_source().downcast_ref::<ParquetSource>()?;
    let source = StoaSource::new(parquet.clone(), reader.clone());
    let config = FileScanConfigBuilder::from(config.clone())
        .with_source(Arc::new(source))
        .build();
    Some(DataSourceExec::from_data_source(config))
}
