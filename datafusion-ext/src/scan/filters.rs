//! The predicate of a scan, conjunct by conjunct: what is applied to each block, and in which
//! order.
//!
//! Where a `FilterExec` stays above the scan, all that is filtered here is filtered early, and
//! nothing has to be: a conjunct that does not pay is left out. So is a dynamic filter: it removes
//! only rows that the operator it comes from removes too. Only where the scan has promised to apply
//! the predicate are static conjuncts required.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions, Scalar};
use arrow::buffer::BooleanBuffer;
use arrow::compute::prep_null_mask_filter;
use arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::common::cast::as_boolean_array;
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{
    BinaryExpr, Column, DynamicFilterPhysicalExpr, DynamicFilterTracking, InListExpr,
    IsNotNullExpr, IsNullExpr, LikeExpr, Literal,
};
use datafusion::physical_expr::utils::{collect_columns, reassign_expr_columns, split_conjunction};
use datafusion::physical_expr_common::physical_expr::{
    is_volatile, snapshot_generation, snapshot_physical_expr,
};
use stoa_forms::{ChunkStatistics, Comparison, Operator as Compare, Prepared};

use super::adaptive::{Observed, Stakes, Verdict};
use super::memo::{Memo, Prospect, has_keys};
use super::row_group::{CachedRowGroup, decode_ns};
use super::zeros::OneZero;

/// The longest list that is handed to a chunk as values; longer ones have a hash table already.
const IN_VALUES_MAX: usize = 256;

/// What operators above the scan do at least with a row that a dynamic filter would have removed,
/// beside asking the same as the filter: copy it into another batch, hash it.
const DOWNSTREAM_NS: f64 = 15.0;

/// What one conjunct has shown so far, shared by all files that a partition reads.
#[derive(Debug, Default)]
pub(super) struct Shown {
    observed: Mutex<Observed>,
    memo: Mutex<Option<KeptMemo>>,
}

/// A memo, and what it answers.
#[derive(Debug)]
struct KeptMemo {
    generation: u64,
    expr: Arc<dyn PhysicalExpr>,
    data_type: DataType,
    memo: Arc<Mutex<Memo>>,
}

impl Shown {
    fn observed<T>(&self, look: impl FnOnce(&mut Observed) -> T) -> T {
        // Counts stay meaningful whatever happened to another thread.
        look(&mut self.observed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The memo of a predicate on a column of this type. A conjunct is another predicate in another
    /// file where that has other values of the partition columns, or other types: each has answers
    /// of its own.
    fn memo(
        &self,
        generation: u64,
        expr: &Arc<dyn PhysicalExpr>,
        data_type: &DataType,
    ) -> Arc<Mutex<Memo>> {
        let mut kept = self.memo.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(kept)
                if kept.generation == generation
                    && kept.data_type == *data_type
                    && kept.expr.as_ref() == expr.as_ref() =>
            {
                Arc::clone(&kept.memo)
            }
            _ => {
                let memo = Arc::default();
                *kept = Some(KeptMemo {
                    generation,
                    expr: Arc::clone(expr),
                    data_type: data_type.clone(),
                    memo: Arc::clone(&memo),
                });
                memo
            }
        }
    }
}

/// A partition's experience with the conjuncts of its predicate.
#[derive(Debug, Default)]
pub(crate) struct Experience {
    /// By position of the conjunct, and of the part of a dynamic filter's current expression.
    shown: Mutex<HashMap<(usize, usize), Arc<Shown>>>,
}

impl Experience {
    fn of(&self, conjunct: usize, part: usize, generation: u64) -> Arc<Shown> {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = Arc::clone(shown.entry((conjunct, part)).or_default());
        shown.observed(|observed| observed.renew(generation));
        shown
    }
}

impl Drop for Experience {
    fn drop(&mut self) {
        let shown = self.shown.get_mut().unwrap_or_else(PoisonError::into_inner);
        for ((conjunct, part), shown) in shown {
            shown.observed(|observed| {
                tracing::debug!(conjunct, part, ?observed, "what a filter has shown");
            });
        }
    }
}

/// One conjunct as it is now.
pub(super) struct Conjunct {
    /// Over `schema`.
    expr: Arc<dyn PhysicalExpr>,
    schema: SchemaRef,
    /// The columns of `schema`, by position among the needed columns.
    pub(super) columns: Vec<usize>,
    /// Leaving it out would change the answer.
    pub(super) required: bool,
    /// A `FilterExec` above applies it again.
    pub(super) applied_again: bool,
    /// What a chunk may evaluate on its own values, of a conjunct on one column.
    comparison: Option<Comparison>,
    /// The dynamic filter that it is a part of, by position among the conjuncts of the predicate.
    dynamic: Option<usize>,
    /// That, ready for the chunk of the row group that is read.
    pub(super) prepared: Option<Prepared>,
    shown: Arc<Shown>,
    /// Where its answers are kept, if they are worth it: it is about the values of one column of
    /// integers, and costs more than comparing them with a bound.
    memo: Option<Arc<Mutex<Memo>>>,
    /// What is to be expected of that column.
    prospect: Prospect,
}

impl Conjunct {
    /// Makes `other` a part of this conjunct, if both are bounds of the same column that come and
    /// go together: a range is looked for in one go.
    fn absorb(&mut self, other: &Conjunct) -> bool {
        let [
            Some(Comparison::Compare { op, .. }),
            Some(Comparison::Compare { op: also, .. }),
        ] = [&self.comparison, &other.comparison]
        else {
            return false;
        };
        let are_range = is_lower(*op) && is_upper(*also) || is_upper(*op) && is_lower(*also);
        if !are_range || self.columns != other.columns || self.dynamic != other.dynamic {
            return false;
        }
        let both = [self.comparison.take(), other.comparison.clone()];
        self.comparison = Some(Comparison::All(both.into_iter().flatten().collect()));
        let expr = BinaryExpr::new(
            Arc::clone(&self.expr),
            Operator::And,
            Arc::clone(&other.expr),
        );
        self.expr = Arc::new(expr);
        true
    }

    /// Whether it may fail on rows that another conjunct removes: comparisons do not.
    fn may_fail(&self) -> bool {
        self.required && matches!(self.comparison, None | Some(Comparison::OnDictionary(_)))
    }

    /// The rows of which the conjunct is true, of `arrays` with `rows` rows each.
    pub(super) fn evaluate(&self, arrays: Vec<ArrayRef>, rows: usize) -> Result<BooleanBuffer> {
        // Where something panicked half-way through, nothing is remembered.
        let memo = self.memo.as_ref().map(|memo| memo.lock());
        if let (Some(Ok(mut memo)), [array]) = (memo, arrays.as_slice()) {
            let asking = Cell::new(Duration::ZERO);
            let ask = |values: ArrayRef| {
                let (rows, since) = (values.len(), Instant::now());
                let said = evaluate(&self.expr, &self.schema, vec![values], rows);
                asking.set(asking.get() + since.elapsed());
                said
            };
            if let Some(answer) = memo.rows(array, self.prospect, ask) {
                let answer = answer?;
                if answer.kept {
                    let rest = asking.get().mul_f64(1.0 - self.prospect.asked());
                    self.shown.observed(|observed| observed.invest(rest));
                }
                return Ok(answer.hits);
            }
        }
        evaluate(&self.expr, &self.schema, arrays, rows)
    }

    /// Nanoseconds to decode and to look at a row's values, roughly.
    pub(super) fn value_ns(&self, group: &CachedRowGroup) -> f64 {
        let fields = self.columns.iter().zip(self.schema.fields());
        let values = fields.map(|(column, field)| {
            let looking = match field.data_type() {
                DataType::Utf8View | DataType::BinaryView => 8.0,
                _ => 1.0,
            };
            decode_ns(group.chunk(*column), field.data_type()) + looking
        });
        values.sum()
    }

    /// What is at stake for each row: `decode_ns` is what the columns of a row cost to decode and
    /// `copy_ns` what it costs to copy them.
    pub(super) fn stakes(&self, decode_ns: f64, copy_ns: f64) -> Stakes {
        // An operator above spends about the same on a row that stays: a filter of the same predicate
        // (unless the chunk was quicker), or the join that looks up the same keys. So a filter that
        // keeps few rows stays, also when its trial fell into a busy moment.
        let again = self.shown.observed(|observed| observed.ns_a_row());
        let again = again.unwrap_or(1.0);
        let above = match (self.applied_again, &self.prepared) {
            (false, _) => again + DOWNSTREAM_NS,
            (true, Some(_)) => again.max(1.0),
            (true, None) => again,
        };
        Stakes {
            removed_ns: above + decode_ns,
            kept_ns: copy_ns,
        }
    }

    /// Whether to apply it to the next block.
    pub(super) fn wanted(&self, stakes: Stakes) -> bool {
        self.required || self.shown.observed(|observed| observed.decide(stakes)) == Verdict::Apply
    }

    /// Adds one application that began at `since`.
    pub(super) fn record(&self, rows_in: usize, kept: usize, since: Instant) {
        let nanos = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shown
            .observed(|observed| observed.record(rows_in, kept, nanos));
    }
}

fn is_lower(op: Compare) -> bool {
    matches!(op, Compare::Gt | Compare::GtEq)
}

fn is_upper(op: Compare) -> bool {
    matches!(op, Compare::Lt | Compare::LtEq)
}

fn evaluate(
    expr: &Arc<dyn PhysicalExpr>,
    schema: &SchemaRef,
    arrays: Vec<ArrayRef>,
    rows: usize,
) -> Result<BooleanBuffer> {
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    let batch = RecordBatch::try_new_with_options(Arc::clone(schema), arrays, &options)?;
    let result = expr.evaluate(&batch)?.into_array(rows)?;
    let result: &BooleanArray = as_boolean_array(&result)?;
    // A null in a predicate is no match.
    Ok(match result.null_count() {
        0 => result.values().clone(),
        _ => prep_null_mask_filter(result).values().clone(),
    })
}

/// The predicate of one file, followed as its dynamic filters tighten.
pub(crate) struct Filters {
    /// The conjuncts in terms of the file's decoded schema.
    conjuncts: Vec<Arc<dyn PhysicalExpr>>,
    file_schema: SchemaRef,
    needed: Arc<[usize]>,
    exact: bool,
    experience: Arc<Experience>,
    tracking: DynamicFilterTracking,
    current: Vec<Conjunct>,
    generation: u64,
}

impl Filters {
    /// The filters of a scan of the columns `needed` of a file.
    ///
    /// With `exact`, every row that is handed on matches the predicate's static conjuncts;
    /// without, some filter above sees to that.
    ///
    /// # Errors
    /// If the predicate is not about the file's schema.
    pub(crate) fn try_new(
        predicate: Option<&Arc<dyn PhysicalExpr>>,
        file_schema: &SchemaRef,
        needed: &Arc<[usize]>,
        exact: bool,
        experience: &Arc<Experience>,
    ) -> Result<Self> {
        let conjuncts: Vec<_> = predicate
            .map(|predicate| split_conjunction(predicate).into_iter().cloned().collect())
            .unwrap_or_default();
        // Watched before it is read, so that no change is lost in between.
        let tracking = match predicate {
            Some(predicate) => DynamicFilterTracking::classify(predicate),
            None => DynamicFilterTracking::Static,
        };
        let mut filters = Self {
            conjuncts,
            file_schema: Arc::clone(file_schema),
            needed: Arc::clone(needed),
            exact,
            experience: Arc::clone(experience),
            tracking,
            current: vec![],
            generation: 0,
        };
        filters.read()?;
        Ok(filters)
    }

    /// Takes over what dynamic filters have become; whether anything changed.
    ///
    /// # Errors
    /// If a dynamic filter has become something that is not about the file's schema.
    pub(crate) fn follow(&mut self) -> Result<bool> {
        let changed = self
            .tracking
            .watcher()
            .is_some_and(|tracker| tracker.changed());
        if changed {
            self.generation += 1;
            self.read()?;
        }
        Ok(changed)
    }

    /// Makes the conjuncts ready for the chunks of a row group, with which `rows` rows begin.
    pub(super) fn prepare(&mut self, group: &CachedRowGroup, rows: u64) {
        for conjunct in &mut self.current {
            let (comparison, [column]) = (&conjunct.comparison, conjunct.columns.as_slice()) else {
                continue;
            };
            let chunk = group.chunk(*column);
            conjunct.prepared = comparison
                .as_ref()
                .and_then(|comparison| chunk?.prepare(comparison));
            let of_memo = chunk.filter(|_| conjunct.memo.is_some());
            let keys = of_memo.and_then(|chunk| span(chunk.statistics()));
            conjunct.prospect = Prospect {
                keys: keys.unwrap_or(u64::MAX),
                rows,
            };
        }
    }

    /// The conjuncts as they are now, those first that should be applied first.
    pub(super) fn current(&mut self) -> &[Conjunct] {
        // Required ones keep their order among each other where a later one may fail on rows that
        // an earlier one removes, and come before those that are not required.
        let in_order = self.current.iter().any(Conjunct::may_fail);
        let rank = |conjunct: &Conjunct| match in_order && conjunct.required {
            true => f64::NEG_INFINITY,
            false => conjunct.shown.observed(|observed| observed.rank()),
        };
        self.current.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
        &self.current
    }

    fn read(&mut self) -> Result<()> {
        self.current.clear();
        for (position, expr) in self.conjuncts.iter().enumerate() {
            let (now, dynamic) = match current(expr)? {
                Some(now) => (now, true),
                None if DynamicFilterTracking::classify(expr).contains_dynamic_filter() => {
                    (snapshot_physical_expr(Arc::clone(expr))?, false)
                }
                None => (Arc::clone(expr), false),
            };
            let generation = snapshot_generation(expr);
            for (part, conjunct) in split_conjunction(&now).into_iter().enumerate() {
                let required = self.exact && !dynamic;
                if !required && (is_always_true(conjunct) || is_volatile(conjunct)) {
                    continue;
                }
                let Some((expr, schema, columns)) = self.over_needed(conjunct)? else {
                    continue;
                };
                let comparison = match schema.fields().as_ref() {
                    [field] if !is_volatile(&expr) => {
                        Some(comparison(&expr, &schema, field.data_type()))
                    }
                    _ => None,
                };
                let has_memo = matches!(
                    comparison,
                    Some(Comparison::In { .. } | Comparison::OnDictionary(_))
                ) && has_keys(schema.field(0).data_type());
                let shown = self.experience.of(position, part, generation);
                let memo =
                    has_memo.then(|| shown.memo(generation, &expr, schema.field(0).data_type()));
                let conjunct = Conjunct {
                    expr,
                    schema,
                    columns,
                    required,
                    applied_again: !dynamic && !self.exact,
                    comparison,
                    dynamic: dynamic.then_some(position),
                    prepared: None,
                    shown,
                    memo,
                    prospect: Prospect::default(),
                };
                let mut before = self.current.iter_mut();
                if !before.any(|before| before.absorb(&conjunct)) {
                    self.current.push(conjunct);
                }
            }
        }
        Ok(())
    }

    /// A conjunct over a schema of its own columns, with their positions among the needed ones;
    /// `None` if one of them is not read.
    #[expect(
        clippy::type_complexity,
        reason = "three values of one thing, used once"
    )]
    fn over_needed(
        &self,
        conjunct: &Arc<dyn PhysicalExpr>,
    ) -> Result<Option<(Arc<dyn PhysicalExpr>, SchemaRef, Vec<usize>)>> {
        let mut file_columns: Vec<usize> = collect_columns(conjunct)
            .iter()
            .map(Column::index)
            .collect();
        file_columns.sort_unstable();
        let positions: Option<Vec<usize>> = file_columns
            .iter()
            .map(|column| self.needed.iter().position(|needed| needed == column))
            .collect();
        let Some(columns) = positions else {
            return Ok(None);
        };
        // A dictionary of values that are never null may still be asked about null.
        let fields = file_columns
            .iter()
            .map(|column| self.file_schema.field(*column).clone().with_nullable(true));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let expr = reassign_expr_columns(Arc::clone(conjunct), &schema)?;
        Ok(Some((expr, schema, columns)))
    }
}

/// What a dynamic filter is now; `None` of other predicates.
fn current(expr: &Arc<dyn PhysicalExpr>) -> Result<Option<Arc<dyn PhysicalExpr>>> {
    if let Some(filter) = expr.downcast_ref::<OneZero>() {
        return filter.current().map(Some);
    }
    let filter = expr.downcast_ref::<DynamicFilterPhysicalExpr>();
    filter.map(DynamicFilterPhysicalExpr::current).transpose()
}

fn is_always_true(expr: &Arc<dyn PhysicalExpr>) -> bool {
    let literal = expr.downcast_ref::<Literal>();
    literal.is_some_and(|literal| literal.value() == &ScalarValue::Boolean(Some(true)))
}

/// A predicate on one column as chunks know it: by its values where it is simple, else as a
/// function that a chunk may call on its distinct values.
fn comparison(expr: &Arc<dyn PhysicalExpr>, schema: &SchemaRef, of: &DataType) -> Comparison {
    simple(expr, of).unwrap_or_else(|| {
        let (expr, schema) = (Arc::clone(expr), Arc::clone(schema));
        Comparison::OnDictionary(Arc::new(move |values: &ArrayRef| {
            let rows = values.len();
            let matches = evaluate(&expr, &schema, vec![Arc::clone(values)], rows).ok()?;
            Some(BooleanArray::new(matches, None))
        }))
    })
}

/// Whether `predicate`, over a table of this schema, is made of comparisons that chunks answer, of
/// one column each: those never fail, and a scan of cached columns applies them at no more cost
/// than a filter above it.
pub(super) fn answers(predicate: &Arc<dyn PhysicalExpr>, schema: &Schema) -> bool {
    let conjuncts = split_conjunction(predicate);
    conjuncts.into_iter().all(|conjunct| {
        let columns = collect_columns(conjunct);
        let mut columns = columns.iter();
        let (Some(column), None) = (columns.next(), columns.next()) else {
            return false;
        };
        let field = schema.fields().get(column.index());
        field.is_some_and(|field| {
            field.name() == column.name() && simple(conjunct, field.data_type()).is_some()
        })
    })
}

fn simple(expr: &Arc<dyn PhysicalExpr>, of: &DataType) -> Option<Comparison> {
    if let Some(is_null) = expr.downcast_ref::<IsNullExpr>() {
        is_null.arg().downcast_ref::<Column>()?;
        return Some(Comparison::IsNull);
    }
    if let Some(is_not_null) = expr.downcast_ref::<IsNotNullExpr>() {
        is_not_null.arg().downcast_ref::<Column>()?;
        return Some(Comparison::IsNotNull);
    }
    if let Some(list) = expr.downcast_ref::<InListExpr>() {
        list.expr().downcast_ref::<Column>()?;
        if list.negated() || list.list().is_empty() || list.list().len() > IN_VALUES_MAX {
            return None;
        }
        let values = list.list().iter().map(|value| literal_of(value, of));
        let values = ScalarValue::iter_to_array(values.collect::<Option<Vec<_>>>()?).ok()?;
        return Some(Comparison::In { values });
    }
    if let Some(like) = expr.downcast_ref::<LikeExpr>() {
        like.expr().downcast_ref::<Column>()?;
        let pattern = literal_of(like.pattern(), of)?;
        let texts = between(pattern.try_as_str()??).filter(|_| !like.case_insensitive())?;
        return Some(Comparison::Contains {
            texts,
            negated: like.negated(),
        });
    }
    let binary = expr.downcast_ref::<BinaryExpr>()?;
    let (op, value) = if binary.left().downcast_ref::<Column>().is_some() {
        (*binary.op(), literal_of(binary.right(), of)?)
    } else {
        binary.right().downcast_ref::<Column>()?;
        (binary.op().swap()?, literal_of(binary.left(), of)?)
    };
    let op = match op {
        Operator::Eq => Compare::Eq,
        Operator::NotEq => Compare::NotEq,
        Operator::Lt => Compare::Lt,
        Operator::LtEq => Compare::LtEq,
        Operator::Gt => Compare::Gt,
        Operator::GtEq => Compare::GtEq,
        _ => return None,
    };
    let value = Scalar::new(value.to_array_of_size(1).ok()?);
    Some(Comparison::Compare { op, value })
}

/// The texts that a pattern of `LIKE` has between `%`, where there is nothing else to it.
fn between(pattern: &str) -> Option<Vec<String>> {
    let texts = pattern.strip_prefix('%')?.strip_suffix('%')?;
    if texts.contains(['_', '\\']) {
        return None;
    }
    let texts = texts.split('%').filter(|text| !text.is_empty());
    let texts: Vec<String> = texts.map(str::to_owned).collect();
    (!texts.is_empty()).then_some(texts)
}

/// From the least to the largest value of a chunk of integers: as many as there can be.
fn span(statistics: &ChunkStatistics) -> Option<u64> {
    let (min, max) = (statistics.min.clone()?, statistics.max.clone()?);
    let [min, max] = [min.into_inner(), max.into_inner()].map(|bound| integer(&bound));
    Some(min?.abs_diff(max?).saturating_add(1))
}

/// The first value of an array of integers, or of what is kept as such.
fn integer(array: &ArrayRef) -> Option<i64> {
    let data = array.to_data();
    if array.is_empty() || array.is_null(0) {
        return None;
    }
    Some(match data.data_type().primitive_width()? {
        1 => data.buffer::<i8>(0)[0].into(),
        2 => data.buffer::<i16>(0)[0].into(),
        4 => data.buffer::<i32>(0)[0].into(),
        8 => data.buffer::<i64>(0)[0],
        _ => return None,
    })
}

/// The value of a literal of exactly the column's type.
fn literal_of(expr: &Arc<dyn PhysicalExpr>, of: &DataType) -> Option<ScalarValue> {
    let value = expr.downcast_ref::<Literal>()?.value();
    (&value.data_type() == of).then(|| value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, Int32Array, StringViewArray};
    use arrow::datatypes::Field;
    use datafusion::physical_expr::expressions::{binary, col, in_list, like, lit};

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("a", DataType::Int32, false),
            Field::new("b", DataType::Utf8View, true),
            Field::new("c", DataType::Int32, true),
        ]))
    }

    fn compare(column: &str, op: Operator, value: ScalarValue) -> Arc<dyn PhysicalExpr> {
        let schema = schema();
        binary(col(column, &schema).unwrap(), op, lit(value), &schema).unwrap()
    }

    fn filters(predicate: &Arc<dyn PhysicalExpr>, needed: &[usize], exact: bool) -> Filters {
        let needed: Arc<[usize]> = needed.into();
        Filters::try_new(
            Some(predicate),
            &schema(),
            &needed,
            exact,
            &Arc::new(Experience::default()),
        )
        .unwrap()
    }

    fn and(left: Arc<dyn PhysicalExpr>, right: Arc<dyn PhysicalExpr>) -> Arc<dyn PhysicalExpr> {
        binary(left, Operator::And, right, &schema()).unwrap()
    }

    #[test]
    fn conjuncts_are_told_apart_and_know_their_columns() {
        let b = ScalarValue::Utf8View(Some("x".to_owned()));
        let predicate = and(
            compare("c", Operator::Lt, 5i32.into()),
            and(
                compare("b", Operator::Eq, b),
                compare("a", Operator::GtEq, 1i32.into()),
            ),
        );
        // Column 0 is not read: its conjunct is left to whoever promised to apply it.
        let mut filters = filters(&predicate, &[1, 2], false);
        let current = filters.current();
        let columns: Vec<_> = current.iter().map(|c| c.columns.clone()).collect();
        assert_eq!(columns, [vec![1], vec![0]]);
        assert!(current.iter().all(|c| !c.required && c.applied_again));
        let Some(Comparison::Compare { op, .. }) = &current[0].comparison else {
            panic!("c < 5 is a comparison")
        };
        assert_eq!(*op, Compare::Lt);
        let values: ArrayRef = Arc::new(Int32Array::from(vec![Some(1), None, Some(9)]));
        let kept = current[0].evaluate(vec![values], 3).unwrap();
        assert_eq!(kept.iter().collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn swapped_comparisons_and_lists_are_recognised() {
        let schema = schema();
        let swapped = binary(lit(5i32), Operator::Lt, col("a", &schema).unwrap(), &schema).unwrap();
        let Some(Comparison::Compare { op, value }) = simple(&swapped, &DataType::Int32) else {
            panic!("5 < a")
        };
        assert_eq!(op, Compare::Gt);
        assert_eq!(
            value
                .into_inner()
                .as_primitive::<arrow::datatypes::Int32Type>()
                .value(0),
            5
        );
        let list = |negated| {
            let values = vec![lit(1i32), lit(ScalarValue::Int32(None)), lit(3i32)];
            in_list(col("a", &schema).unwrap(), values, &negated, &schema).unwrap()
        };
        let Some(Comparison::In { values }) = simple(&list(false), &DataType::Int32) else {
            panic!("a in (1, null, 3)")
        };
        assert_eq!((values.len(), values.null_count()), (3, 1));
        assert!(simple(&list(true), &DataType::Int32).is_none());
        // A literal of another type compares by other rules.
        assert!(simple(&swapped, &DataType::Int64).is_none());
    }

    fn is_not_like(pattern: &str, case_insensitive: bool) -> Arc<dyn PhysicalExpr> {
        let schema = schema();
        let pattern = lit(ScalarValue::Utf8View(Some(pattern.to_owned())));
        like(
            true,
            case_insensitive,
            col("b", &schema).unwrap(),
            pattern,
            &schema,
        )
        .unwrap()
    }

    #[test]
    fn a_text_anywhere_in_a_value_is_looked_for() {
        let simple = |pattern, insensitive| {
            simple(&is_not_like(pattern, insensitive), &DataType::Utf8View)
                .map(|found| format!("{found:?}"))
        };
        let found = simple("%a b%", false);
        assert_eq!(found.as_deref(), Some("not contains [\"a b\"]"));
        let found = simple("%a%%b%", false);
        assert_eq!(found.as_deref(), Some("not contains [\"a\", \"b\"]"));
        for pattern in ["a%", "%a", "%", "%%", "%%%", "a%b%", "%a_%", "%a\\%%"] {
            assert_eq!(simple(pattern, false), None, "{pattern}");
        }
        assert_eq!(simple("%a%", true), None);
    }

    #[test]
    fn what_is_not_simple_is_a_function_of_distinct_values() {
        let mut filters = filters(&is_not_like("%z_%", false), &[1], false);
        let Some(Comparison::OnDictionary(of)) = &filters.current()[0].comparison else {
            panic!("LIKE is no simple comparison")
        };
        let values: ArrayRef = Arc::new(StringViewArray::from(vec![Some("azb"), None, Some("z")]));
        let matches = of(&values).unwrap();
        assert_eq!(matches.null_count(), 0);
        assert_eq!(
            matches.values().iter().collect::<Vec<_>>(),
            [false, false, true]
        );
    }

    #[test]
    fn dynamic_filters_are_followed_and_never_required() {
        let schema = schema();
        let column = col("a", &schema).unwrap();
        let dynamic = Arc::new(DynamicFilterPhysicalExpr::new(
            vec![Arc::clone(&column)],
            lit(true),
        ));
        let predicate = and(
            compare("c", Operator::Lt, 5i32.into()),
            Arc::clone(&dynamic) as _,
        );
        let mut filters = filters(&predicate, &[0, 2], true);
        assert_eq!(filters.current().len(), 1, "true filters nothing");
        assert!(filters.current()[0].required);
        assert!(!filters.follow().unwrap());
        let bounds = and(
            compare("a", Operator::GtEq, 3i32.into()),
            compare("a", Operator::LtEq, 4i32.into()),
        );
        dynamic.update(bounds).unwrap();
        assert!(filters.follow().unwrap());
        let required: Vec<bool> = filters.current().iter().map(|c| c.required).collect();
        assert_eq!(required, [true, false], "the bounds are one conjunct");
        assert!(!filters.follow().unwrap());
    }

    #[test]
    fn what_a_join_above_does_too_is_not_held_against_its_filter() {
        let schema = schema();
        let columns = [col("a", &schema).unwrap(), col("c", &schema).unwrap()];
        let equal = binary(
            Arc::clone(&columns[0]),
            Operator::Eq,
            Arc::clone(&columns[1]),
            &schema,
        );
        let dynamic = DynamicFilterPhysicalExpr::new(columns.to_vec(), equal.unwrap());
        let predicate: Arc<dyn PhysicalExpr> = Arc::new(dynamic);
        let rows = 100_000;
        for (kept, expected) in [(rows / 100, true), (rows / 2, false)] {
            let mut filters = filters(&predicate, &[0, 2], false);
            let conjunct = &filters.current()[0];
            let record = |observed: &mut Observed| observed.record(rows, kept, 100 * rows as u64);
            conjunct.shown.observed(record);
            assert_eq!(conjunct.wanted(conjunct.stakes(5.0, 1.0)), expected);
        }
    }

    /// As with partition columns, which are literals in each file.
    #[test]
    fn what_one_file_answered_is_not_said_of_another_files_predicate() {
        let schema = schema();
        let experience = Arc::new(Experience::default());
        let needed: Arc<[usize]> = [0].into();
        let values: ArrayRef =
            Arc::new(Int32Array::from_iter_values((0..1000).map(|i| i * 7 % 10)));
        let kept = |remainder: i32| {
            let modulo = binary(
                col("a", &schema).unwrap(),
                Operator::Modulo,
                lit(10i32),
                &schema,
            );
            let predicate = binary(modulo.unwrap(), Operator::Eq, lit(remainder), &schema).unwrap();
            let mut filters =
                Filters::try_new(Some(&predicate), &schema, &needed, false, &experience).unwrap();
            let conjunct = &mut filters.current[0];
            assert!(conjunct.memo.is_some());
            conjunct.prospect = Prospect {
                keys: 10,
                rows: 1 << 20,
            };
            let kept = conjunct.evaluate(vec![Arc::clone(&values)], 1000).unwrap();
            assert_eq!(
                kept.set_indices()
                    .map(|row| row * 7 % 10)
                    .collect::<Vec<_>>(),
                [remainder as usize; 100]
            );
            Arc::clone(filters.current[0].memo.as_ref().unwrap())
        };
        let (first, second, again) = (kept(1), kept(2), kept(2));
        assert!(!Arc::ptr_eq(&first, &second));
        assert!(
            Arc::ptr_eq(&second, &again),
            "files of one predicate share what it said"
        );
    }

    #[test]
    fn two_bounds_of_a_column_are_one_conjunct() {
        let bounds = [
            compare("c", Operator::Lt, 9i32.into()),
            compare("a", Operator::Lt, 7i32.into()),
            compare("c", Operator::Lt, 8i32.into()),
            compare("c", Operator::GtEq, 3i32.into()),
        ];
        let predicate = bounds.into_iter().reduce(and).unwrap();
        let mut filters = filters(&predicate, &[0, 2], true);
        let current = filters.current();
        let columns: Vec<_> = current.iter().map(|c| c.columns.clone()).collect();
        assert_eq!(columns, [vec![1], vec![0], vec![1]]);
        let Some(Comparison::All(all)) = &current[0].comparison else {
            panic!("3 <= c < 9 is a range")
        };
        assert_eq!(all.len(), 2);
        let values: ArrayRef = Arc::new(Int32Array::from(vec![Some(2), None, Some(3), Some(9)]));
        let kept = current[0].evaluate(vec![values], 4).unwrap();
        assert_eq!(kept.iter().collect::<Vec<_>>(), [false, false, true, false]);
    }
}
