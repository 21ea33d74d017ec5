//! What all files of one scan partition share.

use std::sync::Arc;

use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::projection::ProjectionExprs;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use datafusion_datasource::file::FileSource;
use datafusion_datasource::file_scan_config::FileScanConfig;
use datafusion_datasource::{PartitionedFile, TableSchema};
use datafusion_datasource_parquet::source::ParquetSource;
use datafusion_physical_expr_adapter::{
    DefaultPhysicalExprAdapterFactory, PhysicalExprAdapterFactory,
};
use stoa_origin::{ObjectIdentity, ObjectTag};
use stoa_reader::{TableFile, View};

use super::filters::Experience;
use super::metrics::SourceMetrics;

/// The scan as its source and its configuration describe it.
#[derive(Debug)]
pub(crate) struct ScanContext {
    pub(crate) view: View,
    pub(crate) store: String,
    pub(crate) partition: usize,
    pub(crate) projection: ProjectionExprs,
    pub(crate) predicate: Option<Arc<dyn PhysicalExpr>>,
    pub(crate) table_schema: TableSchema,
    pub(crate) adapters: Arc<dyn PhysicalExprAdapterFactory>,
    pub(crate) metrics: ExecutionPlanMetricsSet,
    pub(crate) sources: SourceMetrics,
    pub(crate) batch_size: usize,
    pub(crate) limit: Option<usize>,
    pub(crate) preserve_order: bool,
    /// The rows of a file come in its order: hits and misses are not read side by side.
    pub(crate) in_order: bool,
    pub(crate) reversed: bool,
    /// Hits must apply the predicate themselves: no filter stays above the scan.
    pub(crate) apply_predicate: bool,
    pub(crate) prune_row_groups: bool,
    pub(crate) prune_pages: bool,
    pub(crate) max_in_list_size: usize,
    pub(crate) encrypted: bool,
    /// What the predicate's conjuncts have shown in this partition so far.
    pub(crate) experience: Arc<Experience>,
}

impl ScanContext {
    pub(crate) fn new(
        source: &ParquetSource,
        config: &FileScanConfig,
        partition: usize,
        view: View,
        store: String,
    ) -> Self {
        let options = source.table_parquet_options();
        let metrics = source.metrics().clone();
        Self {
            view,
            store,
            partition,
            projection: source.projection().cloned().unwrap_or_else(|| {
                ProjectionExprs::from_indices(&[], &arrow::datatypes::Schema::empty())
            }),
            predicate: source.filter(),
            table_schema: source.table_schema().clone(),
            adapters: config
                .expr_adapter_factory
                .clone()
                .unwrap_or_else(|| Arc::new(DefaultPhysicalExprAdapterFactory)),
            sources: SourceMetrics::new(&metrics, partition),
            metrics,
            batch_size: stoa_forms::BLOCK_ROWS,
            limit: config.limit,
            preserve_order: config.preserve_order,
            in_order: config.preserve_order,
            reversed: false,
            apply_predicate: options.global.pushdown_filters,
            prune_row_groups: options.global.pruning,
            prune_pages: options.global.enable_page_index,
            max_in_list_size: options.global.max_in_list_size,
            encrypted: options.crypto.file_decryption.is_some()
                || options.crypto.factory_id.is_some(),
            experience: Arc::default(),
        }
    }
}

/// The file of a cached table that a scan's file is, if it has the very same content.
///
/// Scans of Stoa's own tables carry the file with them. For others, the listing's etag or version
/// and size must be those of the catalog: a file without identity is never taken from the cache.
pub(crate) fn resolve(view: &View, store: &str, file: &PartitionedFile) -> Option<Arc<TableFile>> {
    if let Some(known) = file.extension::<Arc<TableFile>>() {
        return Some(Arc::clone(known));
    }
    let meta = &file.object_meta;
    let like = |tag| {
        let identity = ObjectIdentity {
            store: store.to_owned(),
            path: meta.location.to_string(),
            tag,
            size: meta.size,
        };
        view.file_like(&identity).cloned()
    };
    let etag = meta.e_tag.clone().map(ObjectTag::Etag);
    let version = meta.version.clone().map(ObjectTag::Version);
    etag.and_then(like).or_else(|| version.and_then(like))
}
