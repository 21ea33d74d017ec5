//! What the engine does about its directory beside loads: sees that it is still there, and knows what
//! lies in it that no plan speaks of.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use stoa_layout::TableCatalog;
use stoa_shm::CacheDirOptions;

use crate::engine::{Engine, Flow, catalog_name};
use crate::store::Repaired;

/// The name of the problem of a directory that is lost and cannot be made anew.
const PROBLEM: &str = "lost directory";

impl Engine {
    /// Makes a directory or an index anew that somebody has taken away, says so once, and has the
    /// tables loaded again. Not during a pass, which knows where everything lies.
    pub(crate) async fn look_after_directory(&mut self) -> Flow {
        let settings = &self.shared.settings;
        let options = CacheDirOptions {
            allow_non_tmpfs: settings.allow_non_tmpfs,
            group_access: settings.group_access,
        };
        let repaired = self
            .shared
            .with_store(move |store| (store.repair(options), store.incarnation()))
            .await;
        let flow = match repaired {
            (Ok(Repaired::Intact), _) => {
                self.shared.problem(PROBLEM, None);
                return Flow::Continue;
            }
            (Ok(Repaired::Published { problem, lost }), _) => {
                tracing::warn!(lost, "{problem}: the index is published anew");
                self.told_looks.clear();
                match lost {
                    0 => return Flow::Continue,
                    _ => self.begin_again(),
                }
            }
            (Ok(Repaired::Anew { problem }), incarnation) => {
                tracing::warn!("{problem}: it is made anew, and the tables are loaded again");
                self.shared.cache_incarnation.send_replace(incarnation);
                if let Some(peers) = &self.sources.peers {
                    peers.write_again();
                }
                self.told_looks.clear();
                self.begin_again()
            }
            (Err(error), _) => {
                let dir = settings.cache_dir.display();
                let text = format!(
                    "the cache directory {dir} is lost, and cannot be made anew yet: {error}"
                );
                self.shared.problem(PROBLEM, Some(text));
                return Flow::Continue;
            }
        };
        self.shared.problem(PROBLEM, None);
        match self.adopt_catalogs().await {
            Flow::Stop => Flow::Stop,
            _ => flow,
        }
    }

    /// Nothing that was carried out is any more.
    fn begin_again(&mut self) -> Flow {
        self.shown.clear();
        self.failures.clear();
        self.decided_again = 0;
        for slot in self.slots.values_mut() {
            slot.state.current = None;
            slot.state.held_bytes = 0;
            slot.counted = None;
        }
        self.wants_pass()
    }

    /// Weighs the tables in memory that no plan speaks of: those of a reset, and those that were
    /// dropped and forgotten while this worker was away.
    pub(crate) async fn weigh_unplanned(&mut self) {
        let planned: HashSet<String> = self.slots.keys().map(|name| catalog_name(name)).collect();
        let unplanned: Vec<(String, Arc<TableCatalog>)> = self
            .shown
            .iter()
            .filter(|(name, _)| !planned.contains(*name))
            .map(|(name, catalog)| (name.clone(), Arc::clone(catalog)))
            .collect();
        if unplanned.is_empty() {
            self.unplanned.clear();
            return;
        }
        let weighed = self.shared.with_store(move |store| {
            let mut of_file: HashMap<&[u8], u64> = HashMap::new();
            for (key, location) in store.held() {
                *of_file.entry(&*key.file).or_default() += location.length;
            }
            let weigh = |(name, catalog): (String, Arc<TableCatalog>)| {
                let files = catalog.files.iter().map(|file| file.identity.to_key());
                let chunks: u64 = files.filter_map(|key| of_file.get(key.as_slice())).sum();
                // Its catalog is memory too, and what queries find it by.
                let catalog = store.catalogs().get(&name).map_or(0, |at| at.length);
                (name, chunks + catalog)
            };
            unplanned.into_iter().map(weigh).collect::<BTreeMap<_, _>>()
        });
        self.unplanned = weighed.await;
    }
}
