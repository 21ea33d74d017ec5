//! Splits a file into hits, mixtures and misses, and keeps their order where it counts.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, ScalarValue};
use datafusion::physical_expr::projection::ProjectionExprs;
use datafusion::physical_expr::simplifier::PhysicalExprSimplifier;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_expr::{PhysicalExpr, ScalarFunctionExpr};
use datafusion::physical_plan::metrics::Count;
use datafusion_datasource::PartitionedFile;
use datafusion_datasource::morsel::{Morsel, MorselPlan, MorselPlanner, Morselizer};
use datafusion_datasource_parquet::{ParquetAccessPlan, ParquetFileMetrics, ParquetRowSelection};
use datafusion_physical_expr_adapter::replace_columns_with_literals;
use datafusion_pruning::FilePruner;
use stoa_reader::TableFile;

use super::context::{ScanContext, resolve};
use super::filters::Filters;
use super::pruning::{Pruner, prune};
use super::row_group::CachedRowGroup;
use super::share::{for_stock, with_plan};
use super::stream::{CachedMorsel, OutputMap};

/// Opens the files of one scan partition.
#[derive(Debug)]
pub(crate) struct StoaMorselizer {
    inner: Box<dyn Morselizer>,
    context: Arc<ScanContext>,
}

impl StoaMorselizer {
    pub(crate) fn new(inner: Box<dyn Morselizer>, context: Arc<ScanContext>) -> Self {
        Self { inner, context }
    }

    /// A file of which nothing is taken from the cache.
    fn delegate(&self, file: PartitionedFile) -> Result<Box<dyn MorselPlanner>> {
        self.inner.plan_file(file)
    }
}

impl Morselizer for StoaMorselizer {
    fn plan_file(&self, file: PartitionedFile) -> Result<Box<dyn MorselPlanner>> {
        let context = &self.context;
        let Some(table_file) = resolve(&context.view, &context.store, &file) else {
            return self.delegate(file);
        };
        let Some(scan) = FileScan::try_new(context, &file, &table_file)? else {
            count_misses(context, &table_file, None);
            return self.delegate(for_stock(file, &table_file));
        };
        let mut file_pruner = scan.file_pruner(context, &file);
        if let Some(pruner) = &mut file_pruner
            && pruner.should_prune()?
        {
            scan.metrics.files_ranges_pruned_statistics.add_pruned(1);
            return Ok(Box::new(Chain::default()));
        }
        let file_pruner = file_pruner.filter(FilePruner::is_watching);
        let plan = prune(
            context,
            &file,
            table_file.metadata(),
            &scan.schema,
            scan.predicate.as_ref(),
            &scan.metrics,
        )?;
        let mut indexes = plan.row_group_indexes();
        if context.reversed {
            indexes.reverse();
        }
        let mut runs = Runs::new(context.in_order);
        for index in indexes {
            let access = &plan.inner()[index];
            let group = CachedRowGroup::open(
                &context.view,
                &table_file,
                index,
                &scan.needed,
                &scan.schema,
                access,
            );
            match group {
                Some(group) => runs.hit(group),
                None => runs.miss(index),
            }
        }
        if runs.without_hits() {
            count_misses(context, &table_file, Some((&plan, scan.needed.len())));
            return self.delegate(for_stock(file, &table_file));
        }
        scan.metrics.files_ranges_pruned_statistics.add_matched(1);
        self.chain(file, &table_file, scan, file_pruner, &plan, runs)
    }
}

impl StoaMorselizer {
    fn chain(
        &self,
        file: PartitionedFile,
        table_file: &Arc<TableFile>,
        scan: FileScan,
        mut file_pruner: Option<FilePruner>,
        plan: &ParquetAccessPlan,
        runs: Runs,
    ) -> Result<Box<dyn MorselPlanner>> {
        let context = &self.context;
        let mut chain = Chain {
            steps: VecDeque::new(),
            concurrent: !context.in_order,
        };
        for run in runs.runs {
            match run {
                Run::Hits(groups) => {
                    let predicate = scan.predicate.as_ref();
                    let pruner = Pruner::try_new(
                        predicate.filter(|_| context.prune_row_groups),
                        &scan.schema,
                        table_file.metadata(),
                        context.max_in_list_size,
                    );
                    let filters = Filters::try_new(
                        predicate,
                        &scan.schema,
                        &scan.needed,
                        context.apply_predicate,
                        &context.experience,
                    )?;
                    chain.steps.push_back(Step::Morsel(Box::new(CachedMorsel {
                        context: Arc::clone(context),
                        file: Arc::clone(table_file),
                        groups,
                        needed: Arc::clone(&scan.needed),
                        schema: Arc::clone(&scan.schema),
                        output: Arc::clone(&scan.output),
                        filters,
                        pruner,
                        file_pruner: file_pruner.take(),
                        metrics: Arc::clone(&scan.metrics),
                    })));
                }
                Run::Misses(indexes) => {
                    let mut access = ParquetAccessPlan::new_none(plan.len());
                    for index in &indexes {
                        access.set(*index, plan.inner()[*index].clone());
                    }
                    count_misses(context, table_file, Some((&access, scan.needed.len())));
                    let part = with_plan(file.clone(), access);
                    chain
                        .steps
                        .push_back(Step::Planner(self.inner.plan_file(part)?));
                }
            }
        }
        Ok(Box::new(chain))
    }
}

/// Counts what stock Parquet is left to read: `plan` with the number of columns, or all of it.
fn count_misses(
    context: &ScanContext,
    file: &TableFile,
    plan: Option<(&ParquetAccessPlan, usize)>,
) {
    let (groups, columns) = match plan {
        Some((plan, columns)) => (plan.row_group_index_iter().count(), columns),
        None => (
            file.metadata().num_row_groups(),
            context.projection.as_ref().len(),
        ),
    };
    context.sources.row_groups_missed.add(groups);
    context.sources.origin_chunks.add(groups * columns);
    context
        .view
        .reader()
        .statistics()
        .missed((groups * columns) as u64);
}

/// What one file's schema makes of the scan.
struct FileScan {
    schema: SchemaRef,
    predicate: Option<Arc<dyn PhysicalExpr>>,
    /// The predicate before it was rewritten for the file's schema: what statistics are for.
    logical_predicate: Option<Arc<dyn PhysicalExpr>>,
    needed: Arc<[usize]>,
    output: Arc<OutputMap>,
    metrics: Arc<ParquetFileMetrics>,
}

impl FileScan {
    /// `None` where only stock Parquet can read the file as asked.
    fn try_new(
        context: &ScanContext,
        file: &PartitionedFile,
        table_file: &TableFile,
    ) -> Result<Option<Self>> {
        let beyond_us = context.encrypted
            || !context.table_schema.virtual_columns().is_empty()
            || file.arrow_schema.is_some()
            || file.extension::<ParquetRowSelection>().is_some()
            || names_input_file(&context.projection)?;
        if beyond_us {
            return Ok(None);
        }
        let schema = table_file.decoded_schema();
        let literals: HashMap<String, ScalarValue> = context
            .table_schema
            .table_partition_cols()
            .iter()
            .zip(&file.partition_values)
            .map(|(field, value)| (field.name().clone(), value.clone()))
            .collect();
        let mut projection = context.projection.clone();
        let mut predicate = context.predicate.clone();
        if !literals.is_empty() {
            projection =
                projection.try_map_exprs(|e| replace_columns_with_literals(e, &literals))?;
            predicate = predicate
                .map(|p| replace_columns_with_literals(p, &literals))
                .transpose()?;
        }
        let logical_predicate = predicate.clone();
        let logical = context.table_schema.file_schema();
        if predicate.is_some() || logical != schema {
            let adapter = context
                .adapters
                .create(Arc::clone(logical), Arc::clone(schema))?;
            let simplifier = PhysicalExprSimplifier::new(schema);
            predicate = predicate
                .map(|p| simplifier.simplify(adapter.rewrite(p)?))
                .transpose()?;
            projection = projection.try_map_exprs(|e| simplifier.simplify(adapter.rewrite(e)?))?;
        }
        let applied = predicate.as_ref().filter(|_| context.apply_predicate);
        let mut needed = BTreeSet::new();
        for expr in projection.expr_iter().chain(applied.cloned()) {
            needed.extend(collect_columns(&expr).iter().map(|column| column.index()));
        }
        // INT96 columns are coerced by session options that the cached arrays do not know.
        if needed
            .iter()
            .any(|column| table_file.roots()[*column].int96)
        {
            return Ok(None);
        }
        let needed: Arc<[usize]> = needed.into_iter().collect();
        let output_schema = Arc::new(
            context
                .projection
                .project_schema(context.table_schema.table_schema())?,
        );
        let output = OutputMap::try_new(&projection, schema, &needed, output_schema)?;
        let name = file.object_meta.location.as_ref();
        let metrics = ParquetFileMetrics::new(context.partition, name, &context.metrics);
        Ok(Some(Self {
            schema: Arc::clone(schema),
            predicate,
            logical_predicate,
            needed,
            output: Arc::new(output),
            metrics: Arc::new(metrics),
        }))
    }

    fn file_pruner(&self, context: &ScanContext, file: &PartitionedFile) -> Option<FilePruner> {
        FilePruner::try_new(
            self.logical_predicate.clone()?,
            context.table_schema.file_schema(),
            file,
            Count::new(),
        )
    }
}

/// `input_file_name()` is made a literal by stock Parquet's opener.
fn names_input_file(projection: &ProjectionExprs) -> Result<bool> {
    let mut found = false;
    for expr in projection.expr_iter() {
        expr.apply(|node| {
            found |= node
                .downcast_ref::<ScalarFunctionExpr>()
                .is_some_and(|function| function.name() == "input_file_name");
            Ok(if found {
                TreeNodeRecursion::Stop
            } else {
                TreeNodeRecursion::Continue
            })
        })?;
    }
    Ok(found)
}

/// Row groups of a file in the order of reading, hits and misses apart.
struct Runs {
    in_order: bool,
    runs: Vec<Run>,
}

enum Run {
    Hits(VecDeque<CachedRowGroup>),
    Misses(Vec<usize>),
}

impl Runs {
    fn new(in_order: bool) -> Self {
        Self {
            in_order,
            runs: vec![],
        }
    }

    /// Where order counts a run ends at each change between hit and miss; elsewhere there is one
    /// run of each.
    fn reachable(&mut self) -> impl Iterator<Item = &mut Run> {
        let only_last = if self.in_order {
            self.runs.len().saturating_sub(1)
        } else {
            0
        };
        self.runs[only_last..].iter_mut()
    }

    fn hit(&mut self, group: CachedRowGroup) {
        for run in self.reachable() {
            if let Run::Hits(groups) = run {
                groups.push_back(group);
                return;
            }
        }
        self.runs.push(Run::Hits(VecDeque::from([group])));
    }

    fn miss(&mut self, index: usize) {
        for run in self.reachable() {
            if let Run::Misses(indexes) = run {
                indexes.push(index);
                return;
            }
        }
        self.runs.push(Run::Misses(vec![index]));
    }

    fn without_hits(&self) -> bool {
        !self.runs.iter().any(|run| matches!(run, Run::Hits(_)))
    }
}

enum Step {
    Morsel(Box<dyn Morsel>),
    Planner(Box<dyn MorselPlanner>),
}

/// Plans steps one after the other, or side by side where order does not count.
///
/// A resolved planner goes to the back of DataFusion's queue; so where order counts, only one step
/// is given out at a time, and what a planner returns stays in front.
#[derive(Default)]
struct Chain {
    steps: VecDeque<Step>,
    concurrent: bool,
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("steps", &self.steps.len())
            .field("concurrent", &self.concurrent)
            .finish()
    }
}

impl MorselPlanner for Chain {
    fn plan(mut self: Box<Self>) -> Result<Option<MorselPlan>> {
        if self.concurrent {
            let mut morsels = vec![];
            let mut planners = vec![];
            for step in self.steps {
                match step {
                    Step::Morsel(morsel) => morsels.push(morsel),
                    Step::Planner(planner) => planners.push(planner),
                }
            }
            let plan = MorselPlan::new()
                .with_morsels(morsels)
                .with_planners(planners);
            return Ok(Some(plan));
        }
        match self.steps.pop_front() {
            None => Ok(None),
            Some(Step::Morsel(morsel)) => {
                let mut plan = MorselPlan::new().with_morsels(vec![morsel]);
                if !self.steps.is_empty() {
                    plan = plan.with_planners(vec![self]);
                }
                Ok(Some(plan))
            }
            Some(Step::Planner(planner)) => {
                let Some(mut plan) = planner.plan()? else {
                    return self.plan();
                };
                let morsels = plan.take_morsels();
                for ready in plan.take_ready_planners().into_iter().rev() {
                    self.steps.push_front(Step::Planner(ready));
                }
                let mut next = MorselPlan::new().with_morsels(morsels);
                match plan.take_pending_planner() {
                    Some(pending) => next.set_pending_planner(async move {
                        let resolved = pending.await?;
                        self.steps.push_front(Step::Planner(resolved));
                        Ok(self as Box<dyn MorselPlanner>)
                    }),
                    None if self.steps.is_empty() => {}
                    None => next = next.with_planners(vec![self]),
                }
                Ok(Some(next))
            }
        }
    }
}
