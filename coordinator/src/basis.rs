//! What plans were made of, written down beside them for the next coordinator.
//!
//! Without it a new coordinator would have to read the footers of every table before it could place
//! another one, and would not know that a worker's capacity changed meanwhile. It is a help and no
//! more: what is missing or does not match the plan in force is found out anew.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stoa_metastore::keys::PLAN_BASIS_PREFIX;
use stoa_metastore::{CacheVersion, Leadership, Op, Records, Result, Txn, keys};

use crate::memory::Basis;

/// The value of `plan_basis/{table}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct KnownBasis {
    /// The plan that it speaks of: numbers may begin anew when a metastore is reset.
    pointer: CacheVersion,
    basis: Basis,
}

impl KnownBasis {
    /// The basis, if it is that of this plan.
    pub(crate) fn of(&self, pointer: &CacheVersion) -> Option<&Basis> {
        let believable = self.basis.correction.is_finite() && self.basis.correction > 0.0;
        (believable && self.pointer == *pointer && self.basis.plan == pointer.plan)
            .then_some(&self.basis)
    }
}

fn key(table: &str) -> String {
    format!("{PLAN_BASIS_PREFIX}{}", keys::encode(table))
}

/// Everything that earlier coordinators wrote down, by table.
pub(crate) async fn read_all(records: &Records) -> Result<BTreeMap<String, KnownBasis>> {
    let listing = records.store().list(PLAN_BASIS_PREFIX).await?;
    let known = listing.entries.iter().filter_map(|entry| {
        let table = keys::decode(entry.key.strip_prefix(PLAN_BASIS_PREFIX)?)?;
        Some((table, serde_json::from_slice(&entry.value).ok()?))
    });
    Ok(known.collect())
}

/// Writes down what a plan that is in force was made of, fenced. That somebody else was elected
/// meanwhile is no error here: the next write of a plan finds out.
pub(crate) async fn write(
    records: &Records,
    leadership: &Leadership,
    table: &str,
    pointer: &CacheVersion,
    basis: &Basis,
) -> Result<()> {
    let known = KnownBasis {
        pointer: pointer.clone(),
        basis: basis.clone(),
    };
    let value = serde_json::to_vec(&known).expect("records serialise to JSON");
    let txn = Txn {
        when: vec![leadership.fence()],
        then: vec![Op::put(key(table), value)],
    };
    records.store().txn(txn).await?;
    Ok(())
}

/// Forgets what the plan of a table was made of.
pub(crate) async fn remove(records: &Records, leadership: &Leadership, table: &str) -> Result<()> {
    let txn = Txn {
        when: vec![leadership.fence()],
        then: vec![Op::delete(key(table))],
    };
    records.store().txn(txn).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_basis_counts_for_its_own_plan_only() {
        let pointer = CacheVersion {
            table_version: "a.b:1".into(),
            plan: 3,
            ..Default::default()
        };
        let basis = Basis {
            plan: 3,
            correction: 1.5,
            ..Default::default()
        };
        let known = KnownBasis {
            pointer: pointer.clone(),
            basis,
        };
        assert!(known.of(&pointer).is_some());
        // The same number after a reset of the metastore, for another version.
        assert!(
            known
                .of(&CacheVersion {
                    table_version: "a.b:2".into(),
                    ..pointer.clone()
                })
                .is_none()
        );
        assert!(
            known
                .of(&CacheVersion {
                    plan: 4,
                    ..pointer.clone()
                })
                .is_none()
        );
        let mut broken = known.clone();
        broken.basis.correction = f64::NAN;
        assert!(broken.of(&pointer).is_none());
        let text = serde_json::to_string(&known).unwrap();
        assert_eq!(serde_json::from_str::<KnownBasis>(&text).unwrap(), known);
    }
}
