//! What the footers of files say of whole columns, and what stock DataFusion makes of it.
//!
//! The catalog's footers hold only what can be believed of each chunk. DataFusion puts the chunks of
//! a column together and passes over those that say nothing, so that the bounds of some pass for
//! those of all; and the statistics of a stock table come from the footers as they are in the files.

use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{ColumnStatistics, Result, Statistics};
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_datasource::file::FileSource;
use datafusion_datasource::file_groups::FileGroup;
use datafusion_datasource::file_scan_config::{FileScanConfig, FileScanConfigBuilder};
use datafusion_datasource::source::DataSourceExec;
use datafusion_datasource_parquet::source::ParquetSource;
use stoa_reader::{Reader, TableFile, View};

use crate::StoaOptions;
use crate::scan::{resolve, store_of};

/// Which claims every chunk of a column makes that has something to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    min: bool,
    max: bool,
    nulls: bool,
}

impl Said {
    const ALL: Said = Said {
        min: true,
        max: true,
        nulls: true,
    };

    /// What the footer says of a file's column.
    pub(crate) fn of(file: &TableFile, column: &str) -> Said {
        let mut said = Said::ALL;
        // A column that the file does not have is read as nulls; nested ones have no statistics.
        let root = file.roots().iter().find(|root| root.name() == column);
        let Some(root) = root.filter(|root| root.leaves == 1) else {
            return said;
        };
        for group in file.metadata().row_groups() {
            let statistics = group.column(root.first_leaf as usize).statistics();
            let nulls = statistics.and_then(|said| said.null_count_opt());
            said.nulls &= nulls.is_some() || group.num_rows() == 0;
            if nulls.unwrap_or(0) == group.num_rows() as u64 {
                continue;
            }
            said.min &= statistics.is_some_and(|said| said.min_bytes_opt().is_some());
            said.max &= statistics.is_some_and(|said| said.max_bytes_opt().is_some());
        }
        said
    }

    /// Takes exactness from what is not said of all values.
    pub(crate) fn restrict(self, statistics: &mut ColumnStatistics) {
        let Said { min, max, nulls } = self;
        if !min {
            statistics.min_value = std::mem::take(&mut statistics.min_value).to_inexact();
        }
        if !max {
            statistics.max_value = std::mem::take(&mut statistics.max_value).to_inexact();
        }
        if !nulls {
            statistics.null_count = std::mem::take(&mut statistics.null_count).to_inexact();
        }
    }
}

/// Takes exactness from the statistics of stock scans where the footers of files that are cached do
/// not bear them out, before the optimizer answers aggregates from them.
#[derive(Debug)]
pub struct DoubtFooters {
    reader: Reader,
}

impl DoubtFooters {
    /// A rule that knows the files of `reader`.
    pub fn new(reader: Reader) -> Self {
        Self { reader }
    }
}

impl PhysicalOptimizerRule for DoubtFooters {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        config: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let options = StoaOptions::of(config);
        if !options.enabled || !options.cache_parquet_scans {
            return Ok(plan);
        }
        let view = self.reader.view();
        plan.transform_up(|node| {
            Ok(doubted(&node, &view).map_or(Transformed::no(node), Transformed::yes))
        })
        .map(|transformed| transformed.data)
    }

    fn name(&self) -> &str {
        "stoa_doubt_footers"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The scan with what is left of its statistics; `None` where that is all of them, or where it is no
/// stock scan of Parquet.
fn doubted(node: &Arc<dyn ExecutionPlan>, view: &View) -> Option<Arc<dyn ExecutionPlan>> {
    let exec = node.downcast_ref::<DataSourceExec>()?;
    let config = exec.data_source().downcast_ref::<FileScanConfig>()?;
    let parquet = config.file_source().downcast_ref::<ParquetSource>()?;
    let columns = read_columns(parquet);
    let store = store_of(config);
    let mut whole = config.statistics();
    let mut groups = config.file_groups.clone();
    let mut any = false;
    for group in &mut groups {
        let mut of_group = group.file_statistics(None).cloned();
        let mut files = group.clone().into_inner();
        let mut any_of_group = false;
        for file in &mut files {
            let Some(known) = resolve(view, &store, file) else {
                continue;
            };
            for (position, name) in &columns {
                let said = Said::of(&known, name);
                if said == Said::ALL {
                    continue;
                }
                any_of_group = true;
                let of_file = file.statistics.as_mut().map(Arc::make_mut);
                let all = [Some(&mut whole), of_group.as_mut(), of_file];
                for statistics in all.into_iter().flatten() {
                    restrict(statistics, *position, said);
                }
            }
        }
        if any_of_group {
            *group = FileGroup::new(files);
            if let Some(statistics) = of_group {
                *group = std::mem::take(group).with_statistics(Arc::new(statistics));
            }
            any = true;
        }
    }
    any.then(|| {
        let config = FileScanConfigBuilder::from(config.clone())
            .with_file_groups(groups)
            .with_statistics(whole)
            .build();
        DataSourceExec::from_data_source(config) as Arc<dyn ExecutionPlan>
    })
}

fn restrict(statistics: &mut Statistics, column: usize, said: Said) {
    if let Some(column) = statistics.column_statistics.get_mut(column) {
        said.restrict(column);
    }
}

/// The columns of the files that a scan reads or asks about, with their positions in the table.
fn read_columns(source: &ParquetSource) -> Vec<(usize, String)> {
    let schema = source.table_schema().file_schema();
    let projection = source.projection().into_iter();
    let mut columns: Vec<(usize, String)> = projection
        .flat_map(|projection| projection.expr_iter())
        .chain(source.filter())
        .flat_map(|expr| collect_columns(&expr))
        .filter_map(|column| {
            let name = column.name().to_owned();
            Some((schema.index_of(&name).ok()?, name))
        })
        .collect();
    columns.sort_unstable();
    columns.dedup();
    columns
}
