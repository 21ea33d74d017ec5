//! Dynamic filters on floats, taken for what the operators that made them mean.
//!
//! `0.0` and `-0.0` are equal in comparisons, hashes and the keys of joins, but a list tells them
//! apart bit by bit, and a list is what a join with a small side hands to its scan. Stock Parquet
//! skips row groups by it, and keeps the row with the other zero; a scan that applies it to rows
//! would lose it.

use std::fmt::{self, Display, Formatter};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::ArrayData;
use arrow::datatypes::{ArrowNativeType, ArrowPrimitiveType, DataType, Float16Type, Schema};
use arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::{ColumnarValue, Operator};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{
    BinaryExpr, DynamicFilterPhysicalExpr, InListExpr, Literal, lit,
};
use datafusion::physical_expr::utils::{conjunction, split_conjunction};
use datafusion::physical_expr_common::physical_expr::{
    snapshot_generation, snapshot_physical_expr,
};

/// A dynamic filter in whose lists both zeros are one.
#[derive(Debug)]
pub(super) struct OneZero {
    filter: Arc<dyn PhysicalExpr>,
    /// What it was, at that generation of the filter.
    known: Mutex<Option<(u64, Arc<dyn PhysicalExpr>)>>,
}

impl OneZero {
    fn new(filter: Arc<dyn PhysicalExpr>) -> Self {
        let known = Mutex::default();
        Self { filter, known }
    }

    /// The filter as it is now.
    ///
    /// # Errors
    /// If the filter has become something that does not fit its columns.
    pub(super) fn current(&self) -> Result<Arc<dyn PhysicalExpr>> {
        // Before it is read: what is newer than its number is only read once more.
        let generation = snapshot_generation(&self.filter);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, known)) = &*known
            && *of == generation
        {
            return Ok(Arc::clone(known));
        }
        let now = one_zero(&snapshot_physical_expr(Arc::clone(&self.filter))?)?;
        *known = Some((generation, Arc::clone(&now)));
        Ok(now)
    }
}

impl PartialEq for OneZero {
    fn eq(&self, other: &Self) -> bool {
        self.filter.eq(&other.filter)
    }
}

impl Eq for OneZero {}

impl Hash for OneZero {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.filter.hash(state);
    }
}

impl Display for OneZero {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.filter, f)
    }
}

impl PhysicalExpr for OneZero {
    fn data_type(&self, _: &Schema) -> Result<DataType> {
        Ok(DataType::Boolean)
    }

    fn nullable(&self, _: &Schema) -> Result<bool> {
        Ok(true)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        self.current()?.evaluate(batch)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.filter]
    }

    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn PhysicalExpr>>,
    ) -> Result<Arc<dyn PhysicalExpr>> {
        let filter = children.pop().unwrap_or_else(|| Arc::clone(&self.filter));
        Ok(Arc::new(Self::new(filter)))
    }

    fn snapshot(&self) -> Result<Option<Arc<dyn PhysicalExpr>>> {
        self.current().map(Some)
    }

    fn fmt_sql(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.filter.fmt_sql(f)
    }
}

/// The predicate, over columns of `schema`, with its dynamic filters on floats made [`OneZero`];
/// `None` where it has none. Others stay what they are.
pub(super) fn with_one_zero(
    predicate: &Arc<dyn PhysicalExpr>,
    schema: &Schema,
) -> Result<Option<Arc<dyn PhysicalExpr>>> {
    let wrapped = Arc::clone(predicate).transform_down(|node| {
        let filter = node.downcast_ref::<DynamicFilterPhysicalExpr>();
        // Whose type is not known may be a float.
        let on_floats = filter.is_some_and(|filter| {
            let mut keys = filter.children().into_iter();
            keys.any(|key| key.data_type(schema).map_or(true, |of| has_floats(&of)))
        });
        Ok(match on_floats {
            true => {
                let wrapped = Arc::new(OneZero::new(node)) as Arc<dyn PhysicalExpr>;
                Transformed::new(wrapped, true, TreeNodeRecursion::Jump)
            }
            false => Transformed::no(node),
        })
    })?;
    Ok(wrapped.transformed.then_some(wrapped.data))
}

/// Whether values of the type are floats, or have some in them.
fn has_floats(data_type: &DataType) -> bool {
    match data_type {
        DataType::Struct(fields) => fields.iter().any(|field| has_floats(field.data_type())),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _)
        | DataType::Map(field, _) => has_floats(field.data_type()),
        DataType::Dictionary(_, values) => has_floats(values),
        DataType::RunEndEncoded(_, values) => has_floats(values.data_type()),
        DataType::Union(fields, _) => fields.iter().any(|(_, f)| has_floats(f.data_type())),
        other => other.is_floating(),
    }
}

/// The filter with lists of floats in which both zeros are one. A conjunct that cannot be put so is
/// left out: nobody counts on a dynamic filter being applied.
fn one_zero(filter: &Arc<dyn PhysicalExpr>) -> Result<Arc<dyn PhysicalExpr>> {
    let conjuncts = split_conjunction(filter).into_iter();
    let conjuncts: Result<Vec<Option<_>>> = conjuncts.map(conjunct_with_one_zero).collect();
    let conjuncts: Vec<_> = conjuncts?.into_iter().flatten().collect();
    Ok(conjunction(conjuncts))
}

/// `None` where a zero lies inside a key, as in a list of structs: of two keys that differ in
/// nothing else, one is in the list and the other is not.
fn conjunct_with_one_zero(
    conjunct: &Arc<dyn PhysicalExpr>,
) -> Result<Option<Arc<dyn PhysicalExpr>>> {
    let mut inside = false;
    let rewritten = Arc::clone(conjunct).transform_up(|node| {
        let Some(list) = node.downcast_ref::<InListExpr>() else {
            return Ok(Transformed::no(node));
        };
        let literals = list
            .list()
            .iter()
            .map(|value| value.downcast_ref::<Literal>());
        let mut zero = None;
        for literal in literals {
            match literal.map(|literal| zero_in(literal.value())) {
                Some(Zero::None) => {}
                Some(Zero::Itself) => zero = literal.map(|literal| literal.value().clone()),
                Some(Zero::Inside) | None => inside = true,
            }
        }
        // No operator makes a filter of `NOT IN`.
        inside |= zero.is_some() && list.negated();
        let Some(zero) = zero.filter(|_| !inside) else {
            return Ok(Transformed::no(node));
        };
        // Compared, it is either of them.
        let is_zero = BinaryExpr::new(Arc::clone(list.expr()), Operator::Eq, lit(zero));
        let either = BinaryExpr::new(node, Operator::Or, Arc::new(is_zero));
        Ok(Transformed::yes(Arc::new(either) as _))
    })?;
    Ok((!inside).then_some(rewritten.data))
}

/// Where a value has a zero of a float.
enum Zero {
    None,
    Itself,
    Inside,
}

fn zero_in(value: &ScalarValue) -> Zero {
    let is_zero = match value {
        ScalarValue::Float16(Some(value)) => value.to_f32() == 0.0,
        ScalarValue::Float32(Some(value)) => *value == 0.0,
        ScalarValue::Float64(Some(value)) => *value == 0.0,
        other if other.is_null() || !has_floats(&other.data_type()) => false,
        other => {
            let array = other.to_array().map(|array| array.to_data());
            return match array.map_or(true, |array| any_zero(&array)) {
                true => Zero::Inside,
                false => Zero::None,
            };
        }
    };
    if is_zero { Zero::Itself } else { Zero::None }
}

/// Whether there is a zero anywhere in the array, those included that no row points to.
fn any_zero(array: &ArrayData) -> bool {
    fn any<T: ArrowNativeType>(array: &ArrayData) -> bool {
        let values = &array.buffer::<T>(0)[..array.len()];
        values.iter().any(|value| *value == T::default())
    }
    match array.data_type() {
        DataType::Float16 => any::<<Float16Type as ArrowPrimitiveType>::Native>(array),
        DataType::Float32 => any::<f32>(array),
        DataType::Float64 => any::<f64>(array),
        _ => array.child_data().iter().any(any_zero),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{ArrayRef, Float64Array, Int64Array, StructArray};
    use arrow::datatypes::Field;
    use datafusion::common::cast::as_boolean_array;
    use datafusion::physical_expr::expressions::{binary, col};

    fn schema() -> Schema {
        let both = vec![
            Arc::new(Field::new("x", DataType::Float64, true)),
            Arc::new(Field::new("k", DataType::Int64, true)),
        ];
        Schema::new(vec![
            Field::new("x", DataType::Float64, true),
            Field::new("k", DataType::Int64, true),
            Field::new("s", DataType::Struct(both.into()), true),
        ])
    }

    fn batch(x: Vec<Option<f64>>) -> RecordBatch {
        let x: ArrayRef = Arc::new(Float64Array::from(x));
        let k: ArrayRef = Arc::new(Int64Array::from_iter_values(0..x.len() as i64));
        let DataType::Struct(fields) = schema().field(2).data_type().clone() else {
            panic!("s is a struct")
        };
        let s = StructArray::new(fields, vec![Arc::clone(&x), Arc::clone(&k)], None);
        RecordBatch::try_new(Arc::new(schema()), vec![x, k, Arc::new(s)]).unwrap()
    }

    fn list(column: &str, values: ArrayRef) -> Arc<dyn PhysicalExpr> {
        let column = col(column, &schema()).unwrap();
        let list = InListExpr::try_new_from_array(column, values, false, &schema());
        Arc::new(list.unwrap())
    }

    fn dynamic(columns: &[&str]) -> Arc<DynamicFilterPhysicalExpr> {
        let columns = columns.iter().map(|column| col(column, &schema()).unwrap());
        Arc::new(DynamicFilterPhysicalExpr::new(columns.collect(), lit(true)))
    }

    fn rows(expr: &Arc<dyn PhysicalExpr>, batch: &RecordBatch) -> Vec<bool> {
        let rows = expr.evaluate(batch).unwrap();
        let rows = rows.into_array(batch.num_rows()).unwrap();
        let rows = as_boolean_array(&rows).unwrap();
        rows.iter().map(|row| row == Some(true)).collect()
    }

    #[test]
    fn a_list_with_one_zero_has_both() {
        let filter = dynamic(&["x"]);
        let predicate = Arc::clone(&filter) as Arc<dyn PhysicalExpr>;
        let wrapped = with_one_zero(&predicate, &schema()).unwrap().unwrap();
        let batch = batch(vec![
            Some(0.0),
            Some(-0.0),
            None,
            Some(2.5),
            Some(f64::NAN),
            Some(1.0),
        ]);
        assert_eq!(rows(&wrapped, &batch), [true; 6]);
        for zero in [0.0, -0.0] {
            let values: ArrayRef = Arc::new(Float64Array::from(vec![zero, f64::NAN, 2.5]));
            filter.update(list("x", values)).unwrap();
            let expected = [true, true, false, true, true, false];
            assert_eq!(rows(&wrapped, &batch), expected);
            // As a snapshot, by which row groups are pruned, and in the branch of a partition.
            let snapshot = snapshot_physical_expr(Arc::clone(&wrapped)).unwrap();
            assert!(!snapshot.is::<OneZero>());
            assert_eq!(rows(&snapshot, &batch), expected);
        }
        let values: ArrayRef = Arc::new(Float64Array::from(vec![2.5, 7.0]));
        filter.update(list("x", values)).unwrap();
        let one = wrapped.downcast_ref::<OneZero>().unwrap();
        assert!(one.current().unwrap().is::<InListExpr>(), "nothing to add");
    }

    #[test]
    fn a_list_of_keys_with_a_zero_in_them_is_left_out() {
        let filter = dynamic(&["s", "k"]);
        let predicate = Arc::clone(&filter) as Arc<dyn PhysicalExpr>;
        let wrapped = with_one_zero(&predicate, &schema()).unwrap().unwrap();
        let batch = batch(vec![Some(0.0), Some(-0.0), Some(3.0)]);
        let above = || {
            let k = col("k", &schema()).unwrap();
            binary(k, Operator::Gt, lit(0i64), &schema()).unwrap()
        };
        let keys = |rows: &[usize]| {
            let rows = rows.iter().map(|row| batch.column(2).slice(*row, 1));
            let rows: Vec<_> = rows.collect();
            let rows: Vec<_> = rows.iter().map(|row| row.as_ref()).collect();
            arrow::compute::concat(&rows).unwrap()
        };
        for (of, expected) in [
            (vec![0, 2], [false, true, true]),
            (vec![2], [false, false, true]),
        ] {
            let both = binary(list("s", keys(&of)), Operator::And, above(), &schema());
            filter.update(both.unwrap()).unwrap();
            assert_eq!(rows(&wrapped, &batch), expected, "{of:?}");
        }
    }

    #[test]
    fn filters_on_other_types_stay_what_they_are() {
        let filter = dynamic(&["k"]) as Arc<dyn PhysicalExpr>;
        assert!(with_one_zero(&filter, &schema()).unwrap().is_none());
        let mixed = binary(
            Arc::clone(&filter),
            Operator::And,
            dynamic(&["x"]) as _,
            &schema(),
        );
        let wrapped = with_one_zero(&mixed.unwrap(), &schema()).unwrap().unwrap();
        let conjuncts = split_conjunction(&wrapped);
        assert_eq!(conjuncts[0].as_ref(), filter.as_ref());
        assert!(conjuncts[1].is::<OneZero>());
    }
}
