//! Makes a DataFusion session read through the cache.

use std::path::Path;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::OptimizerOptions;
use datafusion::execution::SessionStateBuilder;
use datafusion::execution::context::SessionContext;
use datafusion::optimizer::OptimizerRule;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use stoa_cache_manager::Waker;
use stoa_layout::TableName;
use stoa_metastore::Records;
use stoa_origin::Origin;
use stoa_reader::Reader;

use crate::catalog::{StoaCatalog, Tables};
use crate::factory::StoaTableFactory;
use crate::footers::DoubtFooters;
use crate::functions::{SystemFunction, SystemTable};
use crate::min_max::without_min_max;
use crate::one_state::OneState;
use crate::rule::CacheParquetScans;
use crate::selectivity::with_estimates;
use crate::table::StoaTable;
use crate::zeros::BothZeros;
use crate::{StoaOptions, embedded::Publisher};

/// The side of a join that is read into one table rather than one a partition, at most: in bytes,
/// and in rows where the bytes are not known. DataFusion's own 1 MiB and 128 Ki rows are careful
/// with estimates; where scans cost little, dividing both sides is what a join takes longest for.
const BUILD_BYTES: usize = 8 << 20;
const BUILD_ROWS: usize = 1 << 20;

/// The cache as DataFusion sessions use it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stoa {
    pub(crate) tables: Arc<Tables>,
    pub(crate) publisher: Option<Publisher>,
}

impl Stoa {
    /// A query process: it needs nothing but the cache directory and, for misses, the origin.
    pub fn open(cache_directory: &Path, origin: Origin) -> Self {
        Self::with_reader(Reader::open(cache_directory, origin), None)
    }

    /// As [`Stoa::open`], with the metastore for tables that no worker has published yet, for
    /// `stoa_workers()`, and for `CREATE EXTERNAL TABLE … STORED AS STOA` to publish layouts.
    pub fn with_reader(reader: Reader, records: Option<Records>) -> Self {
        Self::beside(reader, records, None)
    }

    /// As [`Stoa::with_reader`], beside a worker that is told when a table is read.
    pub(crate) fn beside(reader: Reader, records: Option<Records>, waker: Option<Waker>) -> Self {
        let publisher = records
            .clone()
            .map(|records| Publisher::new(records, reader.origin().clone()));
        let mut tables = Tables::new(reader, records);
        tables.waker = waker;
        Self {
            tables: Arc::new(tables),
            publisher,
        }
    }

    /// The reader of this process.
    pub fn reader(&self) -> &Reader {
        &self.tables.reader
    }

    /// A table by name, to be registered under any name.
    ///
    /// # Errors
    /// If its catalog cannot be read.
    pub async fn table(&self, name: &TableName) -> Result<Option<StoaTable>> {
        self.tables.open(name).await
    }

    /// Adds to a session: every cached table as `schema.table`, `STORED AS STOA`, the settings
    /// under `stoa.`, the table functions, the rule that caches other scans of Parquet, the one that
    /// reckons with counts of distinct values, the one that ties a statement's scans of a table to
    /// one state, and the one that takes both zeros in lists of floats for one. Up to 8 MiB of a
    /// join's smaller side are read into one table, where the session has DataFusion's limit of
    /// 1 MiB. Dynamic filters of `min` and `max` are off, since those of DataFusion 55.2 lose rows.
    ///
    /// # Errors
    /// If the session has no default catalog.
    pub async fn register(&self, session: &SessionContext) -> Result<()> {
        self.tables.refresh_names().await;
        let state = session.state();
        let mut config = state.config().clone();
        if config.options().extensions.get::<StoaOptions>().is_none() {
            config
                .options_mut()
                .extensions
                .insert(StoaOptions::default());
        }
        let optimizer = &mut config.options_mut().optimizer;
        raise_join_limits(optimizer);
        // So that a session shows what holds; whatever it sets, they stay off.
        optimizer.enable_aggregate_dynamic_filter_pushdown = false;
        let factory = StoaTableFactory::new(Arc::clone(&self.tables), self.publisher.clone());
        // Those of an earlier registration read through another reader.
        let scans = CacheParquetScans::new(self.reader().clone());
        let doubts = DoubtFooters::new(self.reader().clone());
        let mut rules = without_min_max(with_estimates(state.physical_optimizers()));
        rules.retain(|rule| ![scans.name(), doubts.name()].contains(&rule.name()));
        rules.insert(0, Arc::new(doubts));
        rules.push(Arc::new(scans));
        let logical = logical_rules(state.optimizers().to_vec());
        let state = SessionStateBuilder::new_from_existing(state)
            .with_config(config)
            .with_optimizer_rules(logical)
            .with_table_factory("STOA".to_owned(), Arc::new(factory))
            .with_physical_optimizer_rules(rules)
            .build();
        let catalogs = Arc::clone(state.catalog_list());
        let default = state.config_options().catalog.default_catalog.clone();
        if let Some(own) = catalogs.catalog(&default) {
            let ours = StoaCatalog::new(own, Arc::clone(&self.tables));
            catalogs.register_catalog(default, Arc::new(ours));
        }
        *session.state_ref().write() = state;
        for shows in SystemTable::ALL {
            let tables = Arc::clone(&self.tables);
            session.register_udtf(shows.name(), Arc::new(SystemFunction { shows, tables }));
        }
        Ok(())
    }
}

type LogicalRule = Arc<dyn OptimizerRule + Send + Sync>;

/// A session's rules for logical plans, with Stoa's as the last.
fn logical_rules(mut rules: Vec<LogicalRule>) -> Vec<LogicalRule> {
    let ours: [LogicalRule; 2] = [Arc::new(BothZeros), Arc::new(OneState)];
    rules.retain(|rule| ours.iter().all(|ours| ours.name() != rule.name()));
    rules.extend(ours);
    rules
}

/// Raises the limits of joins that are DataFusion's own; what a session has set stays.
fn raise_join_limits(options: &mut OptimizerOptions) {
    let own = OptimizerOptions::default();
    let raise = |limit: &mut usize, own: usize, to: usize| {
        if *limit == own {
            *limit = to;
        }
    };
    raise(
        &mut options.hash_join_single_partition_threshold,
        own.hash_join_single_partition_threshold,
        BUILD_BYTES,
    );
    raise(
        &mut options.hash_join_single_partition_threshold_rows,
        own.hash_join_single_partition_threshold_rows,
        BUILD_ROWS,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selectivity::{BEFORE, EstimateFilters};
    use datafusion::execution::context::SessionConfig;

    #[tokio::test]
    async fn a_session_keeps_what_it_has_set_and_estimates_before_it_joins() -> Result<()> {
        let mut config = SessionConfig::new();
        let optimizer = &mut config.options_mut().optimizer;
        optimizer.hash_join_single_partition_threshold_rows = 7;
        let session = SessionContext::new_with_config(config);
        let stoa = Stoa::open(Path::new("/nonexistent"), Origin::default());
        // Twice is as good as once.
        stoa.register(&session).await?;
        stoa.register(&session).await?;
        let state = session.state();
        let optimizer = &state.config_options().optimizer;
        assert_eq!(optimizer.hash_join_single_partition_threshold, BUILD_BYTES);
        assert_eq!(optimizer.hash_join_single_partition_threshold_rows, 7);
        let scans = CacheParquetScans::new(stoa.reader().clone());
        let doubts = DoubtFooters::new(stoa.reader().clone());
        let order = [doubts.name(), EstimateFilters.name(), BEFORE, scans.name()];
        let names = state.physical_optimizers().iter().map(|rule| rule.name());
        let names: Vec<_> = names.filter(|name| order.contains(name)).collect();
        assert_eq!(names, order);
        let names = state.optimizers().iter().map(|rule| rule.name());
        let ours: Vec<_> = names.filter(|name| name.starts_with("stoa_")).collect();
        assert_eq!(ours, ["stoa_both_zeros", "stoa_one_state"]);
        Ok(())
    }
}
