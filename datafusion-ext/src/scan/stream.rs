//! Batches of a file's hits and mixtures, in the order of its row groups.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow::compute::prep_null_mask_filter;
use arrow::datatypes::SchemaRef;
use datafusion::common::Result;
use datafusion::common::cast::as_boolean_array;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::projection::{ProjectionExprs, Projector};
use datafusion::physical_expr::utils::reassign_expr_columns;
use datafusion_datasource::morsel::Morsel;
use datafusion_datasource_parquet::ParquetFileMetrics;
use datafusion_pruning::FilePruner;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use stoa_reader::TableFile;

use super::context::ScanContext;
use super::file_reader::CachedFileReader;
use super::metrics::{cached_bytes, origin_bytes};
use super::pruning::DynamicPruner;
use super::remote::fetch_ahead;
use super::row_group::{self, ActiveRowGroup, CachedRowGroup};

/// Maps a batch of the needed columns to the scan's output.
pub(crate) struct OutputMap {
    projector: Projector,
    schema: SchemaRef,
    predicate: Option<Arc<dyn PhysicalExpr>>,
    rename: bool,
}

impl OutputMap {
    /// `projection` and `predicate` are in terms of the file's decoded schema, of which batches
    /// hold the columns of `batch_schema`.
    pub(crate) fn try_new(
        projection: &ProjectionExprs,
        predicate: Option<&Arc<dyn PhysicalExpr>>,
        batch_schema: &SchemaRef,
        output_schema: SchemaRef,
    ) -> Result<Self> {
        let projector = projection
            .clone()
            .try_map_exprs(|expr| reassign_expr_columns(expr, batch_schema))?
            .make_projector(batch_schema)?;
        let predicate = predicate
            .map(|p| reassign_expr_columns(Arc::clone(p), batch_schema))
            .transpose()?;
        let rename = projector.output_schema() != &output_schema;
        Ok(Self {
            projector,
            schema: output_schema,
            predicate,
            rename,
        })
    }

    fn map(&self, batch: RecordBatch, metrics: &ParquetFileMetrics) -> Result<RecordBatch> {
        let batch = match &self.predicate {
            None => batch,
            Some(predicate) => {
                let _timer = metrics.row_pushdown_eval_time.timer();
                let keep = predicate.evaluate(&batch)?.into_array(batch.num_rows())?;
                let keep: &BooleanArray = as_boolean_array(&keep)?;
                // A null in a predicate is no match.
                let keep = match keep.null_count() {
                    0 => keep.clone(),
                    _ => prep_null_mask_filter(keep),
                };
                let matched = keep.true_count();
                metrics.pushdown_rows_matched.add(matched);
                metrics.pushdown_rows_pruned.add(batch.num_rows() - matched);
                if matched == batch.num_rows() {
                    batch
                } else {
                    row_group::keep(&batch, &keep)?
                }
            }
        };
        let projected = self.projector.project_batch(&batch)?;
        if !self.rename {
            return Ok(projected);
        }
        let rows = RecordBatchOptions::new().with_row_count(Some(projected.num_rows()));
        let (_, arrays, _) = projected.into_parts();
        Ok(RecordBatch::try_new_with_options(
            Arc::clone(&self.schema),
            arrays,
            &rows,
        )?)
    }
}

/// The hits and mixtures of one file, ready to be streamed.
pub(crate) struct CachedMorsel {
    pub(crate) context: Arc<ScanContext>,
    pub(crate) file: Arc<TableFile>,
    pub(crate) groups: VecDeque<CachedRowGroup>,
    pub(crate) needed: Arc<[usize]>,
    pub(crate) schema: SchemaRef,
    pub(crate) output: Arc<OutputMap>,
    pub(crate) pruner: Option<DynamicPruner>,
    pub(crate) file_pruner: Option<FilePruner>,
    pub(crate) metrics: Arc<ParquetFileMetrics>,
}

impl fmt::Debug for CachedMorsel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMorsel")
            .field("file", &self.file.identity().url())
            .field("row_groups", &self.groups.len())
            .finish()
    }
}

impl Morsel for CachedMorsel {
    fn into_stream(self: Box<Self>) -> BoxStream<'static, Result<RecordBatch>> {
        let state = State {
            morsel: *self,
            active: None,
            rest: None,
        };
        stream::unfold(state, |mut state| async move {
            let next = state.next().await.transpose()?;
            Some((next, state))
        })
        .boxed()
    }
}

struct State {
    morsel: CachedMorsel,
    active: Option<ActiveRowGroup>,
    /// What is left of a block that is longer than the batch size.
    rest: Option<RecordBatch>,
}

impl State {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if let Some(rest) = self.rest.take() {
                return Ok(Some(self.cut(rest)));
            }
            let Some(active) = &mut self.active else {
                match self.morsel.groups.pop_front() {
                    None => return Ok(None),
                    Some(group) => self.active = self.open(group).await?,
                }
                continue;
            };
            let Some(batch) = active.next().await? else {
                self.active = None;
                continue;
            };
            if self.file_is_done()? {
                return Ok(None);
            }
            let batch = self.morsel.output.map(batch, &self.morsel.metrics)?;
            if batch.num_rows() > 0 {
                self.rest = Some(batch);
            }
        }
    }

    /// The next batch-sized piece of `batch`.
    fn cut(&mut self, batch: RecordBatch) -> RecordBatch {
        let rows = self.morsel.context.batch_size.max(1);
        if batch.num_rows() <= rows {
            return batch;
        }
        self.rest = Some(batch.slice(rows, batch.num_rows() - rows));
        batch.slice(0, rows)
    }

    async fn open(&mut self, mut group: CachedRowGroup) -> Result<Option<ActiveRowGroup>> {
        let morsel = &mut self.morsel;
        if morsel
            .pruner
            .as_mut()
            .is_some_and(|pruner| pruner.should_prune(group.index))
        {
            morsel.metrics.row_groups_pruned_dynamic_filter.add(1);
            return Ok(None);
        }
        let context = &morsel.context;
        let sources = &context.sources;
        let hits = group.hits();
        fetch_ahead(&context.view, &morsel.file, &mut group, &mut morsel.groups);
        let remote = group.settle().await;
        remote.count(&context.view, sources);
        let missing = group.columns() - hits - remote.chunks();
        sources.memory_chunks.add(hits);
        sources.memory_bytes.add(group.bytes as usize);
        sources.origin_chunks.add(missing);
        if missing == 0 {
            &sources.row_groups_hit
        } else {
            &sources.row_groups_mixed
        }
        .add(1);
        let statistics = morsel.context.view.reader().statistics();
        statistics.hit(hits as u64, group.bytes);
        statistics.missed(missing as u64);
        let index = group.index;
        let reader = || {
            CachedFileReader::new(
                morsel.context.view.clone(),
                Arc::clone(&morsel.file),
                origin_bytes(&morsel.context.metrics, morsel.context.partition),
                cached_bytes(&morsel.context.metrics, morsel.context.partition),
            )
            .with_fetched(index, remote.encoded)
        };
        group
            .start(&morsel.file, &morsel.needed, &morsel.schema, reader)
            .map(Some)
    }

    /// Whether a filter that has tightened meanwhile rules out the whole file.
    fn file_is_done(&mut self) -> Result<bool> {
        let Some(pruner) = &mut self.morsel.file_pruner else {
            return Ok(false);
        };
        if !pruner.should_prune()? {
            return Ok(false);
        }
        let counts = &self.morsel.metrics.files_ranges_pruned_statistics;
        counts.add_pruned(1);
        counts.subtract_matched(1);
        self.morsel.groups.clear();
        self.active = None;
        Ok(true)
    }
}
