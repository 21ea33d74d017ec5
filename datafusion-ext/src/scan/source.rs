//! The file source: stock Parquet's, re-wrapped after each of its decisions.

use std::borrow::Cow;
use std::fmt::{self, Formatter};
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::physical_expr::expressions::lit;
use datafusion::physical_expr::projection::ProjectionExprs;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_expr::{
    EquivalenceProperties, LexOrdering, PhysicalExpr, PhysicalSortExpr,
};
use datafusion::physical_plan::filter_pushdown::FilterPushdownPropagation;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use datafusion::physical_plan::{DisplayFormatType, SortOrderPushdownResult};
use datafusion_datasource::file::FileSource;
use datafusion_datasource::file_scan_config::FileScanConfig;
use datafusion_datasource::file_stream::FileOpener;
use datafusion_datasource::morsel::Morselizer;
use datafusion_datasource::{PartitionedFile, TableSchema};
use datafusion_datasource_parquet::source::ParquetSource;
use object_store::ObjectStore;
use stoa_forms::BLOCK_ROWS;
use stoa_reader::Reader;

use super::context::ScanContext;
use super::file_reader::CachedReaderFactory;
use super::filters::answers;
use super::morsel::StoaMorselizer;
use super::share;
use super::zeros::with_one_zero;

/// Stock Parquet's file source with the cached row groups read from shared memory.
///
/// Pushdown of filters, projections, orderings and limits, statistics and repartitioning are those
/// of the wrapped `ParquetSource`.
#[derive(Clone, Debug)]
pub struct StoaSource {
    inner: ParquetSource,
    reader: Reader,
    reversed: bool,
    batch_size: Option<usize>,
    applies: bool,
    in_order: bool,
}

impl StoaSource {
    /// Wraps `inner`, which reads what `reader` does not have.
    pub fn new(inner: ParquetSource, reader: Reader) -> Self {
        let reversed = reads_backwards(&inner);
        Self {
            inner,
            reader,
            reversed,
            batch_size: None,
            applies: false,
            in_order: false,
        }
    }

    /// Whether the scan applies predicates that chunks answer, so that the plan needs no filter for
    /// them, whatever `pushdown_filters` says of Parquet. To be said where all that it reads is
    /// cached; otherwise it is right too, but may be slower.
    pub(crate) fn with_predicates(mut self, applies: bool) -> Self {
        self.applies = applies;
        self
    }

    /// Whether the rows of a file come in the order of the file, also where the plan does not ask for
    /// it. To be said of scans whose parents know stock Parquet, which reads a file from front to
    /// back, and may count on it.
    pub(crate) fn with_rows_in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    /// The wrapped source.
    pub fn parquet_source(&self) -> &ParquetSource {
        &self.inner
    }

    /// `config` with its files divided at blocks, where they are cached.
    pub(crate) fn divided(
        &self,
        config: &FileScanConfig,
        partitions: usize,
        in_order: bool,
    ) -> Option<FileScanConfig> {
        let projection = self.inner.projection().into_iter();
        let mut columns: Vec<String> = projection
            .flat_map(|projection| projection.expr_iter())
            .chain(self.inner.filter())
            .flat_map(|expr| collect_columns(&expr))
            .map(|column| column.name().to_owned())
            .collect();
        columns.sort_unstable();
        columns.dedup();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let (view, store) = (self.reader.view(), store_of(config));
        let groups = share::repartition(&view, &store, config, &columns, partitions, in_order)?;
        let mut config = config.clone();
        config.file_groups = groups;
        Some(config)
    }

    /// The wrapped source, with a predicate that may be applied to rows.
    fn for_rows(&self) -> Result<Cow<'_, ParquetSource>> {
        let schema = self.table_schema().table_schema();
        let predicate = match self.inner.filter() {
            Some(predicate) => with_one_zero(&predicate, schema)?,
            None => None,
        };
        Ok(match predicate {
            Some(predicate) => Cow::Owned(self.inner.with_predicate(predicate)),
            None => Cow::Borrowed(&self.inner),
        })
    }

    fn rewrap(&self, source: Arc<dyn FileSource>) -> Arc<dyn FileSource> {
        match source.downcast_ref::<ParquetSource>() {
            Some(inner) => Arc::new(Self {
                batch_size: self.batch_size,
                applies: self.applies,
                in_order: self.in_order,
                ..Self::new(inner.clone(), self.reader.clone())
            }),
            None => source,
        }
    }
}

/// Whether sort pushdown asked for the row groups in reverse.
///
/// `ParquetSource` keeps the flag to itself, but prints it; only the order of work depends on it,
/// since the sort stays above a source that reads backwards.
fn reads_backwards(source: &ParquetSource) -> bool {
    struct Extra<'a>(&'a ParquetSource);
    impl fmt::Display for Extra<'_> {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            self.0.fmt_extra(DisplayFormatType::Default, f)
        }
    }
    // Printing builds a pruning predicate: not worth it where nothing was pushed down. The
    // predicate itself may say anything.
    source.filter().is_some()
        && Extra(&source.with_predicate(lit(true)))
            .to_string()
            .contains("reverse_row_groups=true")
}

/// The store of a scan's files, as identities name it.
pub(crate) fn store_of(config: &FileScanConfig) -> String {
    match config.object_store_url.as_str().trim_end_matches('/') {
        "file:" => "file://".to_owned(),
        store => store.to_owned(),
    }
}

impl FileSource for StoaSource {
    fn create_file_opener(
        &self,
        object_store: Arc<dyn ObjectStore>,
        base_config: &FileScanConfig,
        partition: usize,
    ) -> Result<Arc<dyn FileOpener>> {
        self.for_rows()?
            .create_file_opener(object_store, base_config, partition)
    }

    fn create_morselizer(
        &self,
        object_store: Arc<dyn ObjectStore>,
        base_config: &FileScanConfig,
        partition: usize,
    ) -> Result<Box<dyn Morselizer>> {
        let view = self.reader.view();
        let store = store_of(base_config);
        let factory = CachedReaderFactory::new(
            view.clone(),
            store.clone(),
            self.inner.parquet_file_reader_factory().cloned(),
            Arc::clone(&object_store),
        );
        let source = self.for_rows()?;
        let inner = source
            .as_ref()
            .clone()
            .with_parquet_file_reader_factory(Arc::new(factory))
            .create_morselizer(object_store, base_config, partition)?;
        let mut context = ScanContext::new(&source, base_config, partition, view, store);
        context.reversed = self.reversed;
        context.in_order |= self.in_order;
        context.batch_size = self.batch_size.unwrap_or(BLOCK_ROWS);
        Ok(Box::new(StoaMorselizer::new(inner, Arc::new(context))))
    }

    fn table_schema(&self) -> &TableSchema {
        self.inner.table_schema()
    }

    fn with_batch_size(&self, batch_size: usize) -> Arc<dyn FileSource> {
        let own = Self {
            batch_size: Some(batch_size),
            ..self.clone()
        };
        own.rewrap(self.inner.with_batch_size(batch_size))
    }

    fn filter(&self) -> Option<Arc<dyn PhysicalExpr>> {
        self.inner.filter()
    }

    fn projection(&self) -> Option<&ProjectionExprs> {
        self.inner.projection()
    }

    fn metrics(&self) -> &ExecutionPlanMetricsSet {
        self.inner.metrics()
    }

    /// "parquet": optimizers and serializers of others ask for the type by name.
    fn file_type(&self) -> &str {
        self.inner.file_type()
    }

    fn fmt_extra(&self, t: DisplayFormatType, f: &mut Formatter) -> fmt::Result {
        match t {
            DisplayFormatType::Default | DisplayFormatType::Verbose => write!(f, ", cache=stoa")?,
            DisplayFormatType::TreeRender => writeln!(f, "cache=stoa")?,
        }
        self.inner.fmt_extra(t, f)
    }

    fn supports_repartitioning(&self) -> bool {
        self.inner.supports_repartitioning()
    }

    /// Divides what is cached at blocks, so that few large row groups keep all partitions busy.
    fn repartitioned(
        &self,
        target_partitions: usize,
        repartition_file_min_size: usize,
        output_ordering: Option<LexOrdering>,
        config: &FileScanConfig,
    ) -> Result<Option<FileScanConfig>> {
        let files = || config.file_groups.iter().flat_map(|group| group.iter());
        if files().any(share::is_divided) {
            return Ok(None);
        }
        let bytes: u64 = files().map(PartitionedFile::effective_size).sum();
        if self.supports_repartitioning()
            && config.output_partitioning.is_none()
            && bytes >= repartition_file_min_size as u64
        {
            let in_order = config.preserve_order || output_ordering.is_some();
            let divided = self.divided(config, target_partitions, in_order);
            if divided.is_some() {
                return Ok(divided);
            }
        }
        let inner = &self.inner as &dyn FileSource;
        inner.repartitioned(
            target_partitions,
            repartition_file_min_size,
            output_ordering,
            config,
        )
    }

    fn try_pushdown_filters(
        &self,
        filters: Vec<Arc<dyn PhysicalExpr>>,
        config: &ConfigOptions,
    ) -> Result<FilterPushdownPropagation<Arc<dyn FileSource>>> {
        let schema = self.table_schema().file_schema();
        let applies = self.applies && filters.iter().all(|filter| answers(filter, schema));
        let inner = match applies {
            true => &self.inner.clone().with_pushdown_filters(true),
            false => &self.inner,
        };
        let mut result = inner.try_pushdown_filters(filters, config)?;
        result.updated_node = result.updated_node.map(|source| self.rewrap(source));
        Ok(result)
    }

    fn try_pushdown_sort(
        &self,
        order: &[PhysicalSortExpr],
        eq_properties: &EquivalenceProperties,
    ) -> Result<SortOrderPushdownResult<Arc<dyn FileSource>>> {
        Ok(match self.inner.try_pushdown_sort(order, eq_properties)? {
            SortOrderPushdownResult::Exact { inner } => SortOrderPushdownResult::Exact {
                inner: self.rewrap(inner),
            },
            SortOrderPushdownResult::Inexact { inner } => SortOrderPushdownResult::Inexact {
                inner: self.rewrap(inner),
            },
            SortOrderPushdownResult::Unsupported => SortOrderPushdownResult::Unsupported,
        })
    }

    fn reorder_files(&self, files: Vec<PartitionedFile>) -> Vec<PartitionedFile> {
        self.inner.reorder_files(files)
    }

    fn try_pushdown_projection(
        &self,
        projection: &ProjectionExprs,
    ) -> Result<Option<Arc<dyn FileSource>>> {
        let source = self.inner.try_pushdown_projection(projection)?;
        Ok(source.map(|source| self.rewrap(source)))
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        self.inner.apply_expressions(f)
    }
}
