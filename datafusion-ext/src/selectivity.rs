//! How many rows a filter leaves, where distinct values are counted.
//!
//! DataFusion reckons that a filter with a string in it keeps a fifth of the rows, whatever it
//! asks. Cached chunks know how many distinct values their columns have, so that an equality can
//! be taken for what it is, and joins are built on the side that is small.

use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::stats::Precision;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{ColumnStatistics, Result};
use datafusion::logical_expr::Operator;
use datafusion::physical_expr::utils::split_conjunction;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::expressions::{BinaryExpr, Column, InListExpr, Literal};
use datafusion::physical_plan::filter::{FilterExec, FilterExecBuilder};
use datafusion::physical_plan::statistics::{StatisticsArgs, StatisticsContext};
use datafusion::physical_plan::{ExecutionPlan, PhysicalExpr};

use crate::StoaOptions;

/// The rule of DataFusion that first asks for estimates; this one runs before it.
pub(crate) const BEFORE: &str = "join_selection";

/// Tells filters the share of rows that they keep, in percent, from counts of distinct values.
///
/// DataFusion uses it for predicates that its interval analysis does not cover: those in which a
/// column is not a number or a time. Where nothing is known, its default stays.
#[derive(Debug, Default)]
pub struct EstimateFilters;

impl PhysicalOptimizerRule for EstimateFilters {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        config: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if !StoaOptions::of(config).enabled {
            return Ok(plan);
        }
        let unknown = f64::from(config.optimizer.default_filter_selectivity) / 100.0;
        let estimated = Arc::clone(&plan).transform_up(|node| {
            let Some(filter) = node.downcast_ref::<FilterExec>() else {
                return Ok(Transformed::no(node));
            };
            let input = filter.input().as_ref();
            // An estimate is worth no query.
            let Ok(known) = StatisticsContext::new().compute(input, &StatisticsArgs::new()) else {
                return Ok(Transformed::no(node));
            };
            let Some(share) = share(filter.predicate(), &known.column_statistics, unknown) else {
                return Ok(Transformed::no(node));
            };
            let percent = (share * 100.0).ceil().clamp(1.0, 100.0) as u8;
            let filter = FilterExecBuilder::from(filter).with_default_selectivity(percent);
            Ok(match filter.build() {
                Ok(filter) => Transformed::yes(Arc::new(filter)),
                Err(_) => Transformed::no(node),
            })
        });
        Ok(estimated.map_or(plan, |estimated| estimated.data))
    }

    fn name(&self) -> &str {
        "stoa_estimate_filters"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The share of rows for which `predicate` holds; `None` where no count of distinct values says.
///
/// Values are taken to be equally frequent, and conditions to be independent of each other. A
/// condition of which nothing is known counts as `unknown` beside others, once.
fn share(
    predicate: &Arc<dyn PhysicalExpr>,
    columns: &[ColumnStatistics],
    unknown: f64,
) -> Option<f64> {
    if let Some(list) = predicate.downcast_ref::<InListExpr>() {
        let one = of_one_value(list.expr(), columns)?;
        let share = (one * list.list().len() as f64).min(1.0);
        return Some(if list.negated() { 1.0 - share } else { share });
    }
    let binary = predicate.downcast_ref::<BinaryExpr>()?;
    match binary.op() {
        Operator::Eq if binary.right().downcast_ref::<Literal>().is_some() => {
            of_one_value(binary.left(), columns)
        }
        Operator::Eq if binary.left().downcast_ref::<Literal>().is_some() => {
            of_one_value(binary.right(), columns)
        }
        Operator::And => {
            let shares: Vec<Option<f64>> = split_conjunction(predicate)
                .into_iter()
                .map(|part| share(part, columns, unknown))
                .collect();
            let known = shares.iter().flatten().copied().reduce(|a, b| a * b)?;
            let others = shares.iter().any(Option::is_none);
            Some(if others { known * unknown } else { known })
        }
        Operator::Or => {
            let one = share(binary.left(), columns, unknown)?;
            let other = share(binary.right(), columns, unknown)?;
            Some((one + other).min(1.0))
        }
        _ => None,
    }
}

/// The share of rows that have one of a column's values; `None` where they were not counted.
fn of_one_value(column: &Arc<dyn PhysicalExpr>, columns: &[ColumnStatistics]) -> Option<f64> {
    let column = column.downcast_ref::<Column>()?;
    match columns.get(column.index())?.distinct_count {
        Precision::Exact(count) | Precision::Inexact(count) if count > 0 => {
            Some(1.0 / count as f64)
        }
        _ => None,
    }
}

/// `rules` with [`EstimateFilters`] before the first one that uses estimates; unchanged where it
/// is there already.
pub(crate) fn with_estimates(
    rules: &[Arc<dyn PhysicalOptimizerRule + Send + Sync>],
) -> Vec<Arc<dyn PhysicalOptimizerRule + Send + Sync>> {
    let own: Arc<dyn PhysicalOptimizerRule + Send + Sync> = Arc::new(EstimateFilters);
    let mut rules = rules.to_vec();
    if rules.iter().all(|rule| rule.name() != own.name()) {
        let before = rules.iter().position(|rule| rule.name() == BEFORE);
        rules.insert(before.unwrap_or(0), own);
    }
    rules
}

#[cfg(test)]
mod tests {
    use datafusion::common::ScalarValue;
    use datafusion::physical_plan::expressions::{binary, col, in_list, lit};

    use super::*;

    fn counted(distinct: &[usize]) -> Vec<ColumnStatistics> {
        let column = |count: &usize| ColumnStatistics {
            distinct_count: match count {
                0 => Precision::Absent,
                count => Precision::Inexact(*count),
            },
            ..ColumnStatistics::new_unknown()
        };
        distinct.iter().map(column).collect()
    }

    fn text(value: &str) -> Arc<dyn PhysicalExpr> {
        lit(ScalarValue::Utf8View(Some(value.to_owned())))
    }

    #[test]
    fn equalities_and_lists_are_shares_of_the_distinct_values() -> Result<()> {
        use arrow::datatypes::{DataType, Field, Schema};
        let fields = ["a", "b", "uncounted"].map(|n| Field::new(n, DataType::Utf8View, true));
        let schema = Schema::new(fields.to_vec());
        let columns = counted(&[10, 4, 0]);
        let is = |name, value| binary(col(name, &schema)?, Operator::Eq, text(value), &schema);
        let found = |predicate| share(&predicate, &columns, 0.2);
        assert_eq!(found(is("a", "x")?), Some(0.1));
        assert_eq!(found(is("uncounted", "x")?), None);
        let listed = |negated| {
            let list = vec![text("x"), text("y")];
            in_list(col("a", &schema)?, list, &negated, &schema)
        };
        assert_eq!(found(listed(false)?), Some(0.2));
        assert_eq!(found(listed(true)?), Some(0.8));
        let and = |a, b| binary(a, Operator::And, b, &schema);
        let or = |a, b| binary(a, Operator::Or, b, &schema);
        assert_eq!(found(and(is("a", "x")?, is("b", "y")?)?), Some(0.025));
        // Two conditions of which nothing is known count once.
        let dark = and(is("uncounted", "x")?, is("uncounted", "y")?)?;
        assert_eq!(found(Arc::clone(&dark)), None);
        assert_eq!(found(and(is("b", "y")?, dark)?), Some(0.05));
        assert_eq!(found(or(is("a", "x")?, is("b", "y")?)?), Some(0.35));
        assert_eq!(found(or(is("a", "x")?, is("uncounted", "y")?)?), None);
        Ok(())
    }
}
