//! Filters that `min` and `max` push into scans, kept off.

use std::any::Any;
use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;

/// The rule of DataFusion that pushes dynamic filters into scans.
const PUSHES: &str = "FilterPushdown(Post)";

/// The rules, of which none pushes filters of `min` and `max` into a scan, whatever a session sets.
///
/// Those of DataFusion 55.2 leave out aggregates of expressions (apache/datafusion#24816) and bounds
/// that are still null. Stock Parquet skips row groups by them, Stoa's scan would skip rows. A
/// session turns them on without knowing: `enable_dynamic_filter_pushdown` sets all kinds.
pub(crate) fn without_min_max(rules: Vec<Rule>) -> Vec<Rule> {
    let rules = rules.into_iter().map(|rule| {
        let is_ours = (rule.as_ref() as &dyn Any).is::<WithoutMinMax>();
        match rule.name() == PUSHES && !is_ours {
            true => Arc::new(WithoutMinMax(rule)) as Rule,
            false => rule,
        }
    });
    rules.collect()
}

type Rule = Arc<dyn PhysicalOptimizerRule + Send + Sync>;

/// A rule that is told that filters of `min` and `max` are off.
#[derive(Debug)]
struct WithoutMinMax(Rule);

impl PhysicalOptimizerRule for WithoutMinMax {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        config: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if !config.optimizer.enable_aggregate_dynamic_filter_pushdown {
            return self.0.optimize(plan, config);
        }
        let mut config = config.clone();
        config.optimizer.enable_aggregate_dynamic_filter_pushdown = false;
        self.0.optimize(plan, &config)
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn schema_check(&self) -> bool {
        self.0.schema_check()
    }
}
