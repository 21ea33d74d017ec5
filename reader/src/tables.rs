//! The tables of one generation: named at once, decoded by need.
//!
//! A process that asks for one table, or for none, pays for no other: the catalog of a table of
//! many files takes longer to decode than most queries take.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use stoa_layout::{TableCatalog, TableName};
use stoa_shm::Snapshot;

use crate::Table;

/// The tables that a generation's catalogs name, and those that this process knows better.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tables {
    by_name: HashMap<TableName, Named>,
}

#[derive(Clone, Debug)]
enum Named {
    Published(Arc<Published>),
    /// What a scan of this process found at the origin.
    Fresh(Arc<Table>),
}

/// A catalog in shared memory.
#[derive(Debug)]
struct Published {
    /// Its name in the index.
    catalog: String,
    checksum: u64,
    /// Set when somebody first asked; `None` in it where the catalog cannot be read.
    decoded: OnceLock<Option<Arc<Table>>>,
}

impl Tables {
    /// The tables that `snapshot` names. What is the same as in `before` stays decoded.
    pub(crate) fn of(snapshot: &Snapshot, before: &Tables) -> Tables {
        let names = snapshot.catalogs().into_iter();
        let named = names.filter_map(|catalog| {
            let name = match TableName::parse(catalog) {
                Ok(name) => name,
                Err(error) => {
                    tracing::warn!(catalog, %error, "catalog of no table, passed over");
                    return None;
                }
            };
            let checksum = snapshot.catalog_location(catalog)?.checksum;
            let known = match before.by_name.get(&name) {
                // One that could not be read may be readable where it lies now.
                Some(Named::Published(known))
                    if known.checksum == checksum && !known.is_unreadable() =>
                {
                    Arc::clone(known)
                }
                _ => Arc::new(Published {
                    catalog: catalog.to_owned(),
                    checksum,
                    decoded: OnceLock::new(),
                }),
            };
            Some((name, Named::Published(known)))
        });
        Tables {
            by_name: named.collect(),
        }
    }

    /// These tables, with `fresh` in the place of what is published under its name.
    pub(crate) fn put_fresh(&mut self, fresh: &Arc<Table>) {
        let name = fresh.catalog().table.clone();
        self.by_name.insert(name, Named::Fresh(Arc::clone(fresh)));
    }

    /// Checksum of the catalog that is published under that name. Decodes nothing.
    pub(crate) fn checksum(&self, name: &TableName) -> Option<u64> {
        Some(self.published(name)?.checksum)
    }

    /// Whether the catalog that is published under that name was found to be no catalog.
    pub(crate) fn is_unreadable(&self, name: &TableName) -> bool {
        self.published(name)
            .is_some_and(|known| known.is_unreadable())
    }

    /// Whether `table` is what the published catalog of its name was decoded to.
    pub(crate) fn has_decoded(&self, table: &Arc<Table>) -> bool {
        let published = self.published(&table.catalog().table);
        let decoded = published.and_then(|known| known.decoded.get()?.as_ref());
        decoded.is_some_and(|decoded| Arc::ptr_eq(decoded, table))
    }

    fn published(&self, name: &TableName) -> Option<&Published> {
        match self.by_name.get(name)? {
            Named::Published(published) => Some(published),
            Named::Fresh(_) => None,
        }
    }

    /// The names, in no order. Decodes nothing.
    pub(crate) fn names(&self) -> impl Iterator<Item = &TableName> {
        self.by_name.keys()
    }

    /// The table of that name, decoded from `snapshot` if it was not before. A catalog that cannot
    /// be read is said once, and as good as none.
    pub(crate) fn get(&self, snapshot: &Snapshot, name: &TableName) -> Option<&Arc<Table>> {
        self.by_name.get(name)?.table(snapshot)
    }

    /// All tables, in no order.
    pub(crate) fn all<'a>(
        &'a self,
        snapshot: &'a Snapshot,
    ) -> impl Iterator<Item = &'a Arc<Table>> {
        self.by_name
            .values()
            .filter_map(|named| named.table(snapshot))
    }

    /// How many catalogs were decoded.
    #[cfg(test)]
    pub(crate) fn decoded(&self) -> usize {
        let published = self.by_name.values().filter(|named| match named {
            Named::Published(published) => published.decoded.get().is_some(),
            Named::Fresh(_) => false,
        });
        published.count()
    }
}

impl Named {
    fn table(&self, snapshot: &Snapshot) -> Option<&Arc<Table>> {
        match self {
            Named::Fresh(table) => Some(table),
            Named::Published(published) => published
                .decoded
                .get_or_init(|| decode(snapshot, &published.catalog, published.checksum))
                .as_ref(),
        }
    }
}

impl Published {
    fn is_unreadable(&self) -> bool {
        matches!(self.decoded.get(), Some(None))
    }
}

fn decode(snapshot: &Snapshot, catalog: &str, checksum: u64) -> Option<Arc<Table>> {
    let unreadable = |reason: &dyn std::fmt::Display| {
        tracing::warn!(catalog, %reason, "catalog unreadable, reading from the origin");
        None
    };
    // Carried over from another generation, it may lie elsewhere now, or not be there any more.
    if snapshot.catalog_location(catalog)?.checksum != checksum {
        return None;
    }
    let chunk = match snapshot.catalog(catalog) {
        Ok(chunk) => chunk?,
        Err(miss) => return unreadable(&miss),
    };
    match TableCatalog::decode(&Bytes::from_owner(chunk)) {
        Ok(catalog) => Some(Arc::new(Table::new(Arc::new(catalog)))),
        Err(error) => unreadable(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::Schema;
    use stoa_layout::{LayoutDocument, LayoutVersion};
    use stoa_origin::Origin;
    use stoa_shm::{CacheDir, CacheDirOptions, CacheWriter, IndexContents};

    fn name(text: &str) -> TableName {
        TableName::parse(text).unwrap()
    }

    fn catalog(table: &str, looked_at_unix_ms: u64) -> TableCatalog {
        let layout = LayoutDocument::new(name(table), LayoutVersion::FIRST, "file:///t/");
        TableCatalog {
            table: name(table),
            version: layout.version,
            location: layout.location.clone(),
            schema: Arc::new(Schema::empty()),
            partition_columns: vec![],
            files: vec![],
            rejected: vec![],
            looked_at_unix_ms,
            layout,
        }
    }

    fn publish(writer: &mut CacheWriter, catalogs: &[(&str, Vec<u8>)]) {
        let mut contents = IndexContents::default();
        for (table, bytes) in catalogs {
            let mut segment = writer.new_segment(1 << 16).unwrap();
            segment.append_catalog(table, bytes).unwrap();
            contents.catalogs.extend(segment.seal().unwrap().catalogs);
        }
        writer.publish(contents).unwrap();
        writer.reclaim().unwrap();
    }

    #[test]
    fn a_catalog_is_decoded_when_its_table_is_asked_for_and_once() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = CacheDir::open(scratch.path(), CacheDirOptions::default()).unwrap();
        let (mut writer, _) = CacheWriter::open(dir).unwrap();
        let (a, b) = (catalog("s.a", 1).encode(), catalog("s.b", 1).encode());
        let broken = b"no catalog".to_vec();
        publish(
            &mut writer,
            &[("s.a", a.clone()), ("s.b", b.clone()), ("s.c", broken)],
        );

        let reader = crate::Reader::open(scratch.path(), Origin::default());
        let view = reader.view();
        let decoded = |view: &crate::View| view.decoded_tables();
        let mut names: Vec<String> = view.table_names().map(TableName::to_string).collect();
        names.sort();
        assert_eq!(names, ["s.a", "s.b", "s.c"]);
        assert_eq!(decoded(&view), 0, "names need no catalog");
        let first = Arc::clone(view.table(&name("s.a")).unwrap());
        assert_eq!(decoded(&view), 1);
        assert!(view.table(&name("s.c")).is_none(), "a broken one is none");
        assert_eq!(view.tables().count(), 2);

        // The next generation keeps what is the same, wherever it lies now.
        let newer = catalog("s.b", 2).encode();
        publish(&mut writer, &[("s.b", newer), ("s.a", a)]);
        let (next, found) = reader.view_of(&name("s.a"));
        assert!(Arc::ptr_eq(&first, &found.unwrap()));
        assert_eq!(decoded(&next), 1);
        let looked_at = |view: &crate::View| {
            let table = view.table(&name("s.b")).unwrap();
            table.catalog().looked_at_unix_ms
        };
        assert_eq!((looked_at(&view), looked_at(&next)), (1, 2));
        drop(first);
    }
}
