//! Predicates on one column that a chunk may evaluate without decoding it.

use std::fmt;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowNativeTypeOp, ArrowPrimitiveType, AsArray, BooleanArray, Scalar,
    StringViewArray,
};
use arrow::buffer::BooleanBuffer;
use arrow::compute::contains;
use arrow::compute::kernels::{boolean, cmp};
use arrow::datatypes::{DataType, Float16Type, Float32Type, Float64Type};
use memchr::memmem::Finder;

/// How two values compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// Equal.
    Eq,
    /// Not equal.
    NotEq,
    /// Less.
    Lt,
    /// Less or equal.
    LtEq,
    /// Greater.
    Gt,
    /// Greater or equal.
    GtEq,
}

/// What [`Comparison::OnDictionary`] calls.
pub type OnDictionary = Arc<dyn Fn(&ArrayRef) -> Option<BooleanArray> + Send + Sync>;

/// A predicate on the values of one column, which are on its left.
///
/// It means what DataFusion means by it: floats compare in their total order, but for the two zeros,
/// which are equal; [`Comparison::In`] tells those apart. The values are of the column's type,
/// decimals of its precision and scale.
#[derive(Clone)]
pub enum Comparison {
    /// `column op value`
    Compare {
        /// How.
        op: Operator,
        /// With what; a null is true of no row.
        value: Scalar<ArrayRef>,
    },
    /// All of these, as the two bounds of a range.
    All(Vec<Comparison>),
    /// `column IN (values)`; null values are true of no row.
    In {
        /// The values, as one array.
        values: ArrayRef,
    },
    /// `column LIKE '%text%other%'`, of strings; neither that nor its opposite is true of a null.
    Contains {
        /// What to look for: at least one text, each behind the one before it.
        texts: Vec<String>,
        /// `NOT LIKE`
        negated: bool,
    },
    /// `column IS NULL`
    IsNull,
    /// `column IS NOT NULL`
    IsNotNull,
    /// Any deterministic predicate on this column alone: evaluated once on the distinct values of
    /// a chunk that has a dictionary. The values come in any order, with a null as the last one if
    /// the chunk has nulls. The result has a boolean for each; no result, or one of another
    /// length, means: evaluate it on decoded values.
    OnDictionary(OnDictionary),
}

impl fmt::Debug for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Comparison::Compare { op, value } => write!(f, "{op:?} {value:?}"),
            Comparison::All(all) => f.debug_list().entries(all).finish(),
            Comparison::In { values } => write!(f, "in {values:?}"),
            Comparison::Contains { texts, negated } => {
                let not = if *negated { "not " } else { "" };
                write!(f, "{not}contains {texts:?}")
            }
            Comparison::IsNull => f.write_str("is null"),
            Comparison::IsNotNull => f.write_str("is not null"),
            Comparison::OnDictionary(_) => f.write_str("on dictionary"),
        }
    }
}

impl Comparison {
    /// What Arrow's kernels say of some values; `None` where they cannot say it.
    pub(crate) fn of_values(&self, values: &ArrayRef) -> Option<BooleanArray> {
        match self {
            Comparison::Compare { op, value } => compare(values, *op, value),
            Comparison::All(all) => {
                let mut hits = BooleanArray::new(BooleanBuffer::new_set(values.len()), None);
                for comparison in all {
                    hits = boolean::and_kleene(&hits, &comparison.of_values(values)?).ok()?;
                }
                Some(hits)
            }
            Comparison::In { values: list } => {
                let mut hits = BooleanArray::new(BooleanBuffer::new_unset(values.len()), None);
                for at in (0..list.len()).filter(|at| list.is_valid(*at)) {
                    let value = Scalar::new(list.slice(at, 1));
                    hits = boolean::or_kleene(&hits, &cmp::eq(values, &value).ok()?).ok()?;
                }
                Some(hits)
            }
            Comparison::Contains { texts, negated } => {
                let hits = contain(values, texts)?;
                match negated {
                    false => Some(hits),
                    true => boolean::not(&hits).ok(),
                }
            }
            Comparison::IsNull => boolean::is_null(values).ok(),
            Comparison::IsNotNull => boolean::is_not_null(values).ok(),
            Comparison::OnDictionary(evaluate) => {
                evaluate(values).filter(|hits| hits.len() == values.len())
            }
        }
    }
}

fn compare(values: &ArrayRef, op: Operator, value: &Scalar<ArrayRef>) -> Option<BooleanArray> {
    let value = Scalar::new(one_zero(value.clone().into_inner()));
    let values = one_zero(Arc::clone(values));
    match op {
        Operator::Eq => cmp::eq(&values, &value),
        Operator::NotEq => cmp::neq(&values, &value),
        Operator::Lt => cmp::lt(&values, &value),
        Operator::LtEq => cmp::lt_eq(&values, &value),
        Operator::Gt => cmp::gt(&values, &value),
        Operator::GtEq => cmp::gt_eq(&values, &value),
    }
    .ok()
}

/// The values, with zeros of floats positive: Arrow's kernels order `-0.0` before `0.0`, SQL does not.
fn one_zero(values: ArrayRef) -> ArrayRef {
    fn positive<T: ArrowPrimitiveType>(values: &ArrayRef) -> ArrayRef {
        let positive = |value: T::Native| match value.is_zero() {
            true => T::Native::ZERO,
            false => value,
        };
        Arc::new(values.as_primitive::<T>().unary::<_, T>(positive))
    }
    match values.data_type() {
        DataType::Float16 => positive::<Float16Type>(&values),
        DataType::Float32 => positive::<Float32Type>(&values),
        DataType::Float64 => positive::<Float64Type>(&values),
        _ => values,
    }
}

/// The strings that have these texts in them, each behind the one before it.
fn contain(values: &ArrayRef, texts: &[String]) -> Option<BooleanArray> {
    if let [text] = texts {
        return contains(values, &StringViewArray::new_scalar(text)).ok();
    }
    let texts = InOrder::new(texts);
    let values = values.as_string_view_opt()?;
    let hits = BooleanArray::from_unary(values, |value| texts.are_in(value.as_bytes()));
    Some(hits)
}

/// Texts to be found one behind the other.
#[derive(Debug)]
pub(crate) struct InOrder(Vec<Finder<'static>>);

impl InOrder {
    pub(crate) fn new(texts: &[String]) -> Self {
        let finders = texts.iter().map(|text| Finder::new(text).into_owned());
        Self(finders.collect())
    }

    /// How many they are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The one that comes first.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn first(&self) -> &Finder<'static> {
        &self.0[0]
    }

    /// Whether all of them are in the value.
    pub(crate) fn are_in(&self, value: &[u8]) -> bool {
        let mut rest = value;
        self.0.iter().all(|finder| match finder.find(rest) {
            Some(at) => {
                rest = &rest[at + finder.needle().len()..];
                true
            }
            None => false,
        })
    }
}
