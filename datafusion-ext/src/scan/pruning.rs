//! Which row groups of a file a scan has to read: stock Parquet's pruning, in its order.

use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::{Result, exec_err};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::DynamicFilterTracking;
use datafusion::physical_plan::metrics::{Count, ExecutionPlanMetricsSet, MetricBuilder};
use datafusion_datasource::PartitionedFile;
use datafusion_datasource_parquet::{
    PagePruningAccessPlanFilter, ParquetAccessPlan, ParquetFileMetrics, RowGroupAccessPlanFilter,
};
use datafusion_pruning::{PruningPredicate, PruningPredicateBuilder};
use parquet::file::metadata::ParquetMetaData;

use super::context::ScanContext;
use super::share::{Share, is_divided, row_counts};

/// The access plan of a file after pruning by range, statistics, limit and page index.
///
/// Bloom filters are left to the misses: what a hit would save by them is less than reading them.
pub(crate) fn prune(
    context: &ScanContext,
    file: &PartitionedFile,
    metadata: &ParquetMetaData,
    schema: &SchemaRef,
    predicate: Option<&Arc<dyn PhysicalExpr>>,
    file_metrics: &ParquetFileMetrics,
) -> Result<ParquetAccessPlan> {
    let groups = metadata.row_groups();
    let initial = match file.extension::<ParquetAccessPlan>() {
        Some(plan) if plan.len() != groups.len() => {
            return exec_err!(
                "access plan for {} names {} row groups, the file has {}",
                file.object_meta.location,
                plan.len(),
                groups.len()
            );
        }
        Some(plan) => plan.clone(),
        None => match file.extension::<Share>() {
            Some(share) => share.access_plan(row_counts(metadata)),
            None => ParquetAccessPlan::new_all(groups.len()),
        },
    };
    let mut filter = RowGroupAccessPlanFilter::new(initial);
    if let Some(range) = file.range.as_ref().filter(|_| !is_divided(file)) {
        filter.prune_by_range(groups, range);
    }
    let pruning = predicate.and_then(|p| {
        let errors =
            MetricBuilder::new(&context.metrics).global_counter("num_predicate_creation_errors");
        build(p, schema, context.max_in_list_size, &errors)
    });
    match &pruning {
        Some(pruning) if context.prune_row_groups => filter.prune_by_statistics(
            schema,
            metadata.file_metadata().schema_descr(),
            groups,
            pruning,
            file_metrics,
        ),
        _ => file_metrics
            .row_groups_pruned_statistics
            .add_matched(filter.remaining_row_group_count()),
    }
    if let (Some(limit), false) = (context.limit, context.preserve_order) {
        filter.prune_by_limit(limit, groups, file_metrics);
    }
    let fully_matched = filter.is_fully_matched().clone();
    let mut plan = filter.build();
    let undecided = plan
        .row_group_index_iter()
        .any(|index| !fully_matched[index]);
    if context.prune_pages
        && undecided
        && has_page_index(metadata)
        && let Some(predicate) = predicate
    {
        let pages = PagePruningAccessPlanFilter::new(predicate, Arc::clone(schema));
        if pages.filter_number() > 0 {
            plan = pages.prune_plan_with_page_index(
                plan,
                schema,
                metadata.file_metadata().schema_descr(),
                metadata,
                file_metrics,
            );
        }
    }
    Ok(plan)
}

fn has_page_index(metadata: &ParquetMetaData) -> bool {
    metadata.column_index().is_some() && metadata.offset_index().is_some()
}

fn build(
    predicate: &Arc<dyn PhysicalExpr>,
    schema: &SchemaRef,
    max_in_list_size: usize,
    errors: &Count,
) -> Option<Arc<PruningPredicate>> {
    PruningPredicateBuilder::new()
        .with_file_schema(Arc::clone(schema))
        .with_error_counter(errors)
        .with_max_in_list_size(max_in_list_size)
        .build(Arc::clone(predicate))
}

/// The predicate as statistics can answer it, rebuilt when a dynamic filter has tightened.
pub(crate) struct Pruner {
    predicate: Arc<dyn PhysicalExpr>,
    schema: SchemaRef,
    metadata: Arc<ParquetMetaData>,
    tracking: DynamicFilterTracking,
    pruning: Option<Arc<PruningPredicate>>,
    built: bool,
    max_in_list_size: usize,
    errors: Count,
    /// Counts of these checks go nowhere: the scan counts what they skip by its own metric.
    scratch: ParquetFileMetrics,
}

impl Pruner {
    /// `None` without a predicate.
    pub(crate) fn try_new(
        predicate: Option<&Arc<dyn PhysicalExpr>>,
        schema: &SchemaRef,
        metadata: &Arc<ParquetMetaData>,
        max_in_list_size: usize,
    ) -> Option<Self> {
        let predicate = predicate?;
        Some(Self {
            predicate: Arc::clone(predicate),
            schema: Arc::clone(schema),
            metadata: Arc::clone(metadata),
            tracking: DynamicFilterTracking::classify(predicate),
            pruning: None,
            built: false,
            max_in_list_size,
            errors: Count::new(),
            scratch: ParquetFileMetrics::new(0, "", &ExecutionPlanMetricsSet::new()),
        })
    }

    /// The predicate as it is now; `None` where statistics say nothing about it.
    pub(crate) fn current(&mut self) -> Option<&PruningPredicate> {
        let changed = self
            .tracking
            .watcher()
            .is_some_and(|tracker| tracker.changed());
        if changed || !self.built {
            self.pruning = build(
                &self.predicate,
                &self.schema,
                self.max_in_list_size,
                &self.errors,
            );
            self.built = true;
        }
        self.pruning.as_deref()
    }

    /// Whether a filter that may have tightened since the file was opened, as it is now, has no
    /// match in the row group by the file's statistics.
    pub(crate) fn should_prune(&mut self, row_group: usize) -> bool {
        if !matches!(self.tracking, DynamicFilterTracking::Watching(_)) || self.current().is_none()
        {
            return false;
        }
        let Some(pruning) = &self.pruning else {
            return false;
        };
        let mut plan = ParquetAccessPlan::new_none(self.metadata.num_row_groups());
        plan.scan(row_group);
        let mut filter = RowGroupAccessPlanFilter::new(plan);
        filter.prune_by_statistics(
            &self.schema,
            self.metadata.file_metadata().schema_descr(),
            self.metadata.row_groups(),
            pruning,
            &self.scratch,
        );
        filter.is_empty()
    }
}
