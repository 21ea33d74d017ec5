//! Lists of floats, in which both zeros are one.
//!
//! DataFusion 55 takes `0.0` and `-0.0` for equal wherever it compares, but tells them apart in a
//! list that is long enough to stay one: `x IN (0.0, 1.0, 2.0, 3.0)` leaves out rows that `x = 0.0`
//! finds. A scan that applies predicates itself must not say other things than one that does not;
//! so both say what SQL says.

use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Result, ScalarValue};
use datafusion::logical_expr::expr::InList;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use crate::StoaOptions;

/// Puts the other zero into lists that have one of the two.
#[derive(Debug, Default)]
pub(crate) struct BothZeros;

impl OptimizerRule for BothZeros {
    fn name(&self) -> &str {
        "stoa_both_zeros"
    }

    fn rewrite(
        &self,
        plan: LogicalPlan,
        config: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        if !StoaOptions::of(&config.options()).enabled || !has_lists(&plan)? {
            return Ok(Transformed::no(plan));
        }
        plan.transform_up_with_subqueries(|node| {
            let names = NamePreserver::new(&node);
            node.map_expressions(|expr| {
                let name = names.save(&expr);
                let expr = expr.transform_up(|expr| Ok(with_other_zeros(expr)))?;
                Ok(expr.update_data(|expr| name.restore(expr)))
            })
        })
    }
}

/// Whether there is a list in the plan that lacks a zero.
fn has_lists(plan: &LogicalPlan) -> Result<bool> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                found |= matches!(expr, Expr::InList(list) if !lacking(list).is_empty());
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(found)
}

fn with_other_zeros(expr: Expr) -> Transformed<Expr> {
    let Expr::InList(mut list) = expr else {
        return Transformed::no(expr);
    };
    let lacking = lacking(&list);
    let changed = !lacking.is_empty();
    let lacking = lacking.into_iter();
    list.list
        .extend(lacking.map(|zero| Expr::Literal(zero, None)));
    Transformed::new_transformed(Expr::InList(list), changed)
}

/// The zeros whose opposites are in the list, and which themselves are not.
fn lacking(list: &InList) -> Vec<ScalarValue> {
    let literals = list.list.iter().filter_map(|value| match value {
        Expr::Literal(value, _) => Some(value),
        _ => None,
    });
    let mut lacking = vec![];
    for value in literals.clone() {
        if let Some(other) = other_zero(value)
            && !lacking.contains(&other)
            && !literals.clone().any(|value| *value == other)
        {
            lacking.push(other);
        }
    }
    lacking
}

/// The zero of the other sign, of a zero.
fn other_zero(value: &ScalarValue) -> Option<ScalarValue> {
    match value {
        ScalarValue::Float16(Some(v)) if v.to_f32() == 0.0 => Some(ScalarValue::Float16(Some(-*v))),
        ScalarValue::Float32(Some(v)) if *v == 0.0 => Some(ScalarValue::Float32(Some(-*v))),
        ScalarValue::Float64(Some(v)) if *v == 0.0 => Some(ScalarValue::Float64(Some(-*v))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use datafusion::logical_expr::{col, in_list, lit};

    fn list(values: Vec<Expr>) -> InList {
        match in_list(col("x"), values, false) {
            Expr::InList(list) => list,
            other => panic!("{other} is no list"),
        }
    }

    #[test]
    fn a_list_lacks_the_zeros_whose_opposites_it_has() {
        let lacks = |values: Vec<Expr>| lacking(&list(values));
        let zero = |value: f64| ScalarValue::Float64(Some(value));
        assert_eq!(lacks(vec![lit(1.0), lit(0.0), lit(0.0)]), [zero(-0.0)]);
        assert_eq!(lacks(vec![lit(-0.0), lit(1.0)]), [zero(0.0)]);
        assert_eq!(lacks(vec![lit(0.0f32)]), [ScalarValue::Float32(Some(-0.0))]);
        for whole in [
            vec![lit(-0.0), lit(0.0)],
            vec![lit(1.0)],
            vec![lit(0i64)],
            vec![col("y")],
        ] {
            assert!(lacks(whole).is_empty());
        }
    }

    #[test]
    fn what_is_added_is_added_once() {
        let once = with_other_zeros(Expr::InList(list(vec![lit(0.0), lit(7.0)])));
        assert!(once.transformed);
        let twice = with_other_zeros(once.data.clone());
        assert!(!twice.transformed);
        assert_eq!(twice.data, once.data);
    }
}
