//! Which plan of each table a worker works towards: the newest wins, whatever order news comes in.

use std::collections::BTreeMap;

use stoa_metastore::{CacheVersion, PlanTarget};

/// What changed by a look at the plans in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Tables with a newer target.
    pub changed: Vec<String>,
    /// What an operator should know.
    pub problems: Vec<String>,
}

/// The newest plan seen of each table.
///
/// Plan numbers grow within a table across versions, so they alone say which plan is newer. A plan
/// that vanishes from the metastore leaves its target: only a plan that says `unloaded` drops a
/// table.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    newest: BTreeMap<String, (PlanTarget, CacheVersion)>,
}

impl Targets {
    /// Takes notice of the plans in force, in any order and as often as one likes.
    pub fn observe(&mut self, in_force: impl IntoIterator<Item = CacheVersion>) -> Observed {
        let mut observed = Observed::default();
        for plan in in_force {
            let (table, target) = match (plan.table(), plan.target()) {
                (Ok(table), Ok(target)) => (table.to_owned(), target),
                (Err(error), _) | (_, Err(error)) => {
                    observed
                        .problems
                        .push(format!("plan {} is ignored: {error}", plan.plan));
                    continue;
                }
            };
            match self.newest.get(&table) {
                Some((known, _)) if known.plan == target.plan => {}
                Some((known, _)) if known.plan > target.plan => observed.problems.push(format!(
                    "the metastore shows plan {} of {}, older than plan {} that is held here; kept",
                    target.plan, plan.table_version, known.plan
                )),
                _ => {
                    self.newest.insert(table.clone(), (target, plan));
                    observed.changed.push(table);
                }
            }
        }
        observed
    }

    /// The newest plan of every table.
    pub fn iter(&self) -> impl Iterator<Item = (&str, PlanTarget, &CacheVersion)> {
        self.newest
            .iter()
            .map(|(table, (target, plan))| (table.as_str(), *target, plan))
    }

    /// The newest plan of one table.
    pub fn get(&self, table: &str) -> Option<(PlanTarget, &CacheVersion)> {
        self.newest.get(table).map(|(target, plan)| (*target, plan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(version: u64, plan: u64) -> CacheVersion {
        CacheVersion {
            table_version: format!("tpch.lineitem:{version}"),
            plan,
            ..CacheVersion::default()
        }
    }

    #[test]
    fn the_newest_plan_wins_in_any_order() {
        let mut targets = Targets::default();
        for next in [plan(5, 9), plan(7, 11), plan(6, 10)] {
            targets.observe([next]);
        }
        let (target, _) = targets.get("tpch.lineitem").unwrap();
        assert_eq!(
            target,
            PlanTarget {
                plan: 11,
                version: 7
            }
        );
    }

    #[test]
    fn the_same_plan_again_changes_nothing() {
        let mut targets = Targets::default();
        assert_eq!(targets.observe([plan(1, 1)]).changed, ["tpch.lineitem"]);
        assert_eq!(targets.observe([plan(1, 1)]), Observed::default());
    }

    #[test]
    fn an_older_plan_is_told_and_kept_out() {
        let mut targets = Targets::default();
        targets.observe([plan(3, 8)]);
        let observed = targets.observe([plan(2, 5)]);
        assert!(observed.changed.is_empty());
        assert_eq!(
            observed.problems,
            [
                "the metastore shows plan 5 of tpch.lineitem:2, older than plan 8 that is held here; kept"
            ]
        );
    }

    #[test]
    fn going_back_to_an_earlier_version_is_a_newer_plan() {
        let mut targets = Targets::default();
        targets.observe([plan(3, 8)]);
        assert_eq!(targets.observe([plan(2, 9)]).changed.len(), 1);
    }

    #[test]
    fn a_vanished_plan_changes_nothing() {
        let mut targets = Targets::default();
        targets.observe([plan(3, 8)]);
        assert_eq!(targets.observe([]), Observed::default());
        assert!(targets.get("tpch.lineitem").is_some());
    }

    #[test]
    fn an_unreadable_plan_does_not_hide_the_others() {
        let mut targets = Targets::default();
        let broken = CacheVersion {
            table_version: "x".into(),
            plan: 2,
            ..CacheVersion::default()
        };
        let observed = targets.observe([broken, plan(1, 1)]);
        assert_eq!((observed.changed.len(), observed.problems.len()), (1, 1));
        assert!(observed.problems[0].starts_with("plan 2 is ignored: invalid table version `x`"));
    }
}
