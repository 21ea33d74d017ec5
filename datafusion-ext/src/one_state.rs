//! One statement, one state: all scans of a table in a statement are of one snapshot of its files.
//!
//! Whether the origin is looked at depends on the columns that are read, and what is published may
//! change between two scans. So what a statement reads of a table is put together before any of
//! its scans is planned, and whichever comes first decides for all of them.

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::tree_node::{Transformed, TreeNodeRecursion};
use datafusion::datasource::{DefaultTableSource, provider_as_source};
use datafusion::logical_expr::{LogicalPlan, TableScan};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use crate::table::{StatementTable, StoaTable};

/// Ties the scans of each table of Stoa in a plan to one state, which is found when the first of
/// them is planned.
///
/// It runs last, when projections and filters have reached the scans, and anew each time a plan is
/// optimized: a plan that is kept and runs again sees the state of its time.
#[derive(Debug, Default)]
pub(crate) struct OneState;

impl OptimizerRule for OneState {
    fn name(&self) -> &str {
        "stoa_one_state"
    }

    fn rewrite(
        &self,
        plan: LogicalPlan,
        _: &dyn OptimizerConfig,
    ) -> Result<Transformed<LogicalPlan>> {
        let mut tables: Vec<Read> = vec![];
        plan.apply_with_subqueries(|node| {
            if let LogicalPlan::TableScan(scan) = node
                && let Some(table) = stoa_table(scan)
            {
                let columns = table.read_columns(scan.projection.as_ref(), &scan.filters);
                match tables.iter_mut().find(|read| read.table.is_same(table)) {
                    Some(read) => {
                        read.scans += 1;
                        read.columns.extend(columns);
                    }
                    None => tables.push(Read {
                        table: table.clone(),
                        columns,
                        scans: 1,
                    }),
                }
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        // One scan is of one state by itself, unless it was tied to another plan's before.
        tables.retain(|read| read.scans > 1 || read.table.is_tied());
        if tables.is_empty() {
            return Ok(Transformed::no(plan));
        }
        let tables = tables.into_iter().map(|read| {
            let tie = StatementTable::new(read.columns);
            (read.table, Arc::new(tie))
        });
        let tables: Vec<_> = tables.collect();
        plan.transform_down_with_subqueries(|node| {
            let LogicalPlan::TableScan(mut scan) = node else {
                return Ok(Transformed::no(node));
            };
            let tied = stoa_table(&scan).and_then(|table| {
                let mut tables = tables.iter();
                let (_, tie) = tables.find(|(known, _)| known.is_same(table))?;
                Some(table.tied(Arc::clone(tie)))
            });
            Ok(match tied {
                Some(table) => {
                    scan.source = provider_as_source(Arc::new(table));
                    Transformed::yes(LogicalPlan::TableScan(scan))
                }
                None => Transformed::no(LogicalPlan::TableScan(scan)),
            })
        })
    }
}

/// What a plan reads of a table.
struct Read {
    table: StoaTable,
    columns: Vec<String>,
    scans: usize,
}

fn stoa_table(scan: &TableScan) -> Option<&StoaTable> {
    let source = scan.source.downcast_ref::<DefaultTableSource>()?;
    source.table_provider.downcast_ref::<StoaTable>()
}
