//! Predicates on one column that a chunk may evaluate without decoding it.

use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Scalar};

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
/// It means what Arrow's comparison kernels mean by it: floats compare in their total order. The
/// values are of the column's type, decimals of its precision and scale.
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
    /// `column LIKE '%text%'`, of strings; neither that nor its opposite is true of a null.
    Contains {
        /// What to look for.
        text: String,
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
            Comparison::Contains { text, negated } => {
                let not = if *negated { "not " } else { "" };
                write!(f, "{not}contains {text:?}")
            }
            Comparison::IsNull => f.write_str("is null"),
            Comparison::IsNotNull => f.write_str("is not null"),
            Comparison::OnDictionary(_) => f.write_str("on dictionary"),
        }
    }
}
