//! Batches of a file's hits and mixtures, in the order of its row groups.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::compute::BatchCoalescer;
use arrow::datatypes::SchemaRef;
use datafusion::common::Result;
use datafusion::physical_expr::projection::{ProjectionExprs, Projector};
use datafusion::physical_expr::utils::reassign_expr_columns;
use datafusion_datasource::morsel::Morsel;
use datafusion_datasource_parquet::ParquetFileMetrics;
use datafusion_pruning::FilePruner;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use stoa_reader::TableFile;

use super::adaptive::{Stakes, hand_on_whole, on_survivors};
use super::context::ScanContext;
use super::file_reader::CachedFileReader;
use super::filters::{Conjunct, Filters};
use super::metrics::{cached_bytes, origin_bytes};
use super::pruning::Pruner;
use super::remote::fetch_ahead;
use super::row_group::{Block, CachedRowGroup, Decoder, Failure, Keep, decode_ns};
use super::zones::BlockStatistics;

/// Blocks that are read before a filter that keeps tightening is held against zone maps again.
const PRUNE_EVERY: usize = 4;

/// Blocks without a surviving row after which other tasks get their turn.
const YIELD_EVERY: usize = 64;

/// Nanoseconds to copy a kept value from between removed ones and into a batch, roughly.
const COPY_NS: f64 = 1.0;

/// Maps the columns that the projection needs to the scan's output.
pub(crate) struct OutputMap {
    /// By position among the needed columns.
    columns: Vec<usize>,
    batch_schema: SchemaRef,
    projector: Projector,
    schema: SchemaRef,
    rename: bool,
}

impl OutputMap {
    /// `projection` is in terms of the file's decoded schema, of which `needed` are read.
    pub(crate) fn try_new(
        projection: &ProjectionExprs,
        file_schema: &SchemaRef,
        needed: &[usize],
        output_schema: SchemaRef,
    ) -> Result<Self> {
        let used = projection.column_indices();
        let (columns, file_columns): (Vec<usize>, Vec<usize>) = needed
            .iter()
            .enumerate()
            .filter(|(_, column)| used.contains(column))
            .unzip();
        let batch_schema = Arc::new(file_schema.project(&file_columns)?);
        let projector = projection
            .clone()
            .try_map_exprs(|expr| reassign_expr_columns(expr, &batch_schema))?
            .make_projector(&batch_schema)?;
        let rename = projector.output_schema() != &output_schema;
        Ok(Self {
            columns,
            batch_schema,
            projector,
            schema: output_schema,
            rename,
        })
    }

    fn map(&self, arrays: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch> {
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch =
            RecordBatch::try_new_with_options(Arc::clone(&self.batch_schema), arrays, &options)?;
        let projected = self.projector.project_batch(&batch)?;
        if !self.rename {
            return Ok(projected);
        }
        let (_, arrays, _) = projected.into_parts();
        Ok(RecordBatch::try_new_with_options(
            Arc::clone(&self.schema),
            arrays,
            &options,
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
    pub(crate) filters: Filters,
    pub(crate) pruner: Option<Pruner>,
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
        let context = &self.context;
        // A scan that may stop early does not wait for more rows than it may hand on.
        let rows = context.batch_size.min(context.limit.unwrap_or(usize::MAX));
        let coalescer = BatchCoalescer::new(Arc::clone(&self.output.schema), rows.max(1));
        let state = State {
            morsel: *self,
            active: None,
            small: coalescer,
            ready: VecDeque::new(),
            without_rows: 0,
        };
        stream::unfold(state, |mut state| async move {
            let next = state.next().await.transpose()?;
            Some((next, state))
        })
        .boxed()
    }
}

/// A row group being read.
struct Active {
    group: CachedRowGroup,
    /// The first block that is not read yet.
    block: usize,
    /// Which blocks can have matching rows; `None` if all can.
    matching: Option<Vec<bool>>,
    /// Blocks read since that was found out.
    since_pruned: usize,
    decoder: Option<Decoder>,
    /// What the output columns of a row cost to decode and to copy, in nanoseconds.
    decode_ns: f64,
    copy_ns: f64,
}

struct State {
    morsel: CachedMorsel,
    active: Option<Active>,
    /// Rows of filtered blocks, until there are enough for a batch.
    small: BatchCoalescer,
    ready: VecDeque<RecordBatch>,
    /// Blocks of which no row survived.
    without_rows: usize,
}

impl State {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(Some(self.cut(batch)));
            }
            if self.active.is_none() {
                match self.morsel.groups.pop_front() {
                    Some(group) => self.active = self.open(group).await?,
                    None if self.small.is_empty() => return Ok(None),
                    None => self.flush()?,
                }
                continue;
            }
            if self.file_is_done()? {
                continue;
            }
            match self.block().await? {
                Some((batch, _)) if batch.num_rows() == 0 => {
                    self.without_rows += 1;
                    if self.without_rows.is_multiple_of(YIELD_EVERY) {
                        tokio::task::yield_now().await;
                    }
                }
                Some((batch, whole)) => self.hand_on(batch, whole)?,
                None => self.active = None,
            }
        }
    }

    /// The first batch-sized piece of `batch`; the rest stays in front.
    fn cut(&mut self, batch: RecordBatch) -> RecordBatch {
        let rows = self.morsel.context.batch_size.max(1);
        if batch.num_rows() <= rows {
            return batch;
        }
        self.ready
            .push_front(batch.slice(rows, batch.num_rows() - rows));
        batch.slice(0, rows)
    }

    /// Puts a block's rows into the queue: in place if it is whole or most of it is there, else
    /// with those of others.
    fn hand_on(&mut self, batch: RecordBatch, whole: bool) -> Result<()> {
        if !whole && batch.num_rows() * 2 < self.morsel.context.batch_size {
            self.small.push_batch(batch)?;
            self.ready
                .extend(std::iter::from_fn(|| self.small.next_completed_batch()));
            return Ok(());
        }
        if self.morsel.context.preserve_order {
            self.flush()?;
        }
        self.ready.push_back(batch);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.small.finish_buffered_batch()?;
        self.ready
            .extend(std::iter::from_fn(|| self.small.next_completed_batch()));
        Ok(())
    }

    async fn open(&mut self, mut group: CachedRowGroup) -> Result<Option<Active>> {
        let morsel = &mut self.morsel;
        let pruned = morsel
            .pruner
            .as_mut()
            .is_some_and(|pruner| pruner.should_prune(group.index));
        if pruned {
            morsel.metrics.row_groups_pruned_dynamic_filter.add(1);
            return Ok(None);
        }
        let context = &morsel.context;
        let sources = &context.sources;
        let hits = group.hits();
        fetch_ahead(context, &morsel.file, &mut group, &mut morsel.groups);
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
        let mut active = Active {
            block: 0,
            matching: None,
            since_pruned: 0,
            decoder: None,
            decode_ns: 0.0,
            copy_ns: 0.0,
            group,
        };
        morsel.filters.follow()?;
        morsel.prepare(&mut active);
        morsel.prune_blocks(&mut active);
        if let Some(first) = active.next_block(&morsel.context) {
            active.decoder = morsel.decoder(&active.group, first)?;
        }
        Ok(Some(active))
    }

    /// The next block's surviving rows, and whether they are the block as it is; `None` after the
    /// last block.
    async fn block(&mut self) -> Result<Option<(RecordBatch, bool)>> {
        let (morsel, Some(active)) = (&mut self.morsel, &mut self.active) else {
            return Ok(None);
        };
        if morsel.filters.follow()? {
            morsel.prepare(active);
            if active.since_pruned >= PRUNE_EVERY {
                morsel.prune_blocks(active);
            }
        }
        let Some(index) = active.next_block(&morsel.context) else {
            return Ok(None);
        };
        active.since_pruned += 1;
        loop {
            let decoded = match &mut active.decoder {
                Some(decoder) => Some(decoder.block(&active.group, index).await?),
                None => None,
            };
            let decoded = active.decoder.as_ref().zip(decoded.as_ref());
            match morsel.read(active, index, decoded) {
                Ok(read) => {
                    active.block = index + 1;
                    return Ok(Some(read));
                }
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::Damaged(column)) => {
                    active.group.forget(column);
                    morsel.context.sources.origin_chunks.add(1);
                    active.decoder = morsel.decoder(&active.group, index)?;
                    morsel.prepare(active);
                }
            }
        }
    }

    /// Whether a filter that has tightened meanwhile rules out the rest of the file.
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
        self.morsel.file_pruner = None;
        self.morsel.groups.clear();
        self.active = None;
        Ok(true)
    }
}

impl Active {
    /// The next block with rows to read, counting those that zone maps leave out.
    fn next_block(&mut self, context: &ScanContext) -> Option<usize> {
        loop {
            let block = self.group.next_block(self.block)?;
            match &self.matching {
                Some(matching) if matching.get(block) == Some(&false) => {
                    context.sources.blocks_pruned.add(1);
                    self.block = block + 1;
                }
                _ => {
                    self.block = block;
                    return Some(block);
                }
            }
        }
    }
}

impl CachedMorsel {
    fn decoder(&self, group: &CachedRowGroup, first: usize) -> Result<Option<Decoder>> {
        Decoder::start(group, first, &self.file, &self.needed, &self.schema, || {
            CachedFileReader::new(
                self.context.view.clone(),
                Arc::clone(&self.file),
                origin_bytes(&self.context.metrics, self.context.partition),
                cached_bytes(&self.context.metrics, self.context.partition),
            )
            .with_fetched(group.index, group.encoded.clone())
        })
    }

    /// Works out what is the same for all blocks of a row group.
    fn prepare(&mut self, active: &mut Active) {
        let groups = std::iter::once(&active.group).chain(&self.groups);
        let rows = groups.map(|group| group.rows as u64).sum();
        self.filters.prepare(&active.group, rows);
        active.decode_ns = 0.0;
        for column in &self.output.columns {
            let data_type = self.schema.field(self.needed[*column]).data_type();
            active.decode_ns += decode_ns(active.group.chunk(*column), data_type);
        }
        active.copy_ns = COPY_NS * self.output.columns.len() as f64;
    }

    /// Holds the zone maps of a row group against the predicate as it is now.
    fn prune_blocks(&mut self, active: &mut Active) {
        active.since_pruned = 0;
        let Some(pruning) = self.pruner.as_mut().and_then(Pruner::current) else {
            return;
        };
        let chunks: Vec<_> = self
            .needed
            .iter()
            .enumerate()
            .filter_map(|(position, column)| {
                let chunk = active.group.chunk(position)?;
                Some((self.schema.field(*column).name().as_str(), chunk))
            })
            .collect();
        let statistics = BlockStatistics {
            chunks: &chunks,
            blocks: active.group.blocks(),
        };
        active.matching = statistics.matching(pruning);
    }

    /// The surviving rows of a block as output, and whether they are the block as it is.
    fn read(
        &mut self,
        active: &Active,
        index: usize,
        decoded: Option<(&Decoder, &RecordBatch)>,
    ) -> Result<(RecordBatch, bool), Failure> {
        let mut block = Block::new(&active.group, index, decoded);
        let selected = active.group.selected(index);
        let keep = self.filter(active, index, &mut block, &selected)?;
        let rows = keep.count(block.rows);
        let sources = &self.context.sources;
        sources.rows_filtered.add(selected.count(block.rows) - rows);
        if self.context.apply_predicate {
            self.metrics.pushdown_rows_matched.add(rows);
            self.metrics
                .pushdown_rows_pruned
                .add(selected.count(block.rows) - rows);
        }
        let mut arrays = Vec::with_capacity(self.output.columns.len());
        for column in self
            .output
            .columns
            .iter()
            .take(if rows == 0 { 0 } else { usize::MAX })
        {
            let (array, late) = block.kept(*column, &keep)?;
            sources.columns_late.add(usize::from(late));
            arrays.push(array);
        }
        if rows == 0 {
            let empty = RecordBatch::new_empty(Arc::clone(&self.output.schema));
            return Ok((empty, true));
        }
        let whole = !matches!(keep, Keep::Mask(_));
        Ok((self.output.map(arrays, rows)?, whole))
    }

    /// The rows that survive the filters that are worth applying, and all that are required.
    fn filter(
        &mut self,
        active: &Active,
        index: usize,
        block: &mut Block<'_>,
        selected: &Keep,
    ) -> Result<Keep, Failure> {
        let _timer = self.metrics.row_pushdown_eval_time.timer();
        let mut keep = selected.clone();
        let all = selected.count(block.rows);
        // A required conjunct has removed rows, or has not been asked about all of them.
        let mut required = false;
        let mut best = Stakes {
            removed_ns: 0.0,
            kept_ns: active.copy_ns,
        };
        for conjunct in self.filters.current() {
            let rows = keep.count(block.rows);
            if rows == 0 {
                return Ok(keep);
            }
            let stakes = conjunct.stakes(active.decode_ns, active.copy_ns);
            if !conjunct.wanted(stakes) {
                self.context.sources.filters_left_out.add(1);
                continue;
            }
            let since = Instant::now();
            let narrowed = apply(conjunct, index, block, &keep)?;
            let kept = narrowed.count(block.rows);
            conjunct.record(rows, kept, since);
            keep = narrowed;
            required |= conjunct.required && kept < all;
            if kept < rows {
                best.removed_ns = best.removed_ns.max(stakes.removed_ns);
            }
        }
        if !required && hand_on_whole(keep.count(block.rows), all, best) {
            return Ok(selected.clone());
        }
        Ok(keep)
    }
}

/// The rows of `keep` of which the conjunct is true: on packed values where the chunk can, on few
/// rows where few are left, else on the block.
fn apply(
    conjunct: &Conjunct,
    index: usize,
    block: &mut Block<'_>,
    keep: &Keep,
) -> Result<Keep, Failure> {
    if let Some(prepared) = &conjunct.prepared {
        let matching = prepared
            .evaluate(index)
            .map_err(|error| block.damaged(conjunct.columns[0], &error))?;
        return Ok(keep.and(&matching));
    }
    let rows = keep.count(block.rows);
    if !on_survivors(rows, block.rows, conjunct.value_ns(block.group)) {
        let arrays = conjunct.columns.iter().map(|column| block.whole(*column));
        let arrays = arrays.collect::<Result<Vec<_>, _>>()?;
        // Where this fails, it may be for a row that is not kept.
        if let Ok(matching) = conjunct.evaluate(arrays, block.rows) {
            return Ok(keep.and(&matching));
        }
    }
    let mut arrays = Vec::with_capacity(conjunct.columns.len());
    for column in &conjunct.columns {
        arrays.push(block.kept(*column, keep)?.0);
    }
    match conjunct.evaluate(arrays, rows) {
        Ok(matching) => Ok(keep.and_survivors(&matching, block.rows)),
        Err(error) if conjunct.required => Err(error.into()),
        // Whoever has to apply it will say what is wrong.
        Err(_) => Ok(keep.clone()),
    }
}
