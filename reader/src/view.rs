//! The process's window on the cache directory, and one scan's view through it.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arrow::datatypes::DataType;
use bytes::Bytes;
use stoa_layout::{TableCatalog, TableName};
use stoa_origin::{ObjectIdentity, Origin};
use stoa_shm::counters::{AccessCounters, Counts};
use stoa_shm::{CacheReader, Entry, FileId, ReaderOptions, Snapshot};

use crate::neighbours::{ChunkName, Fetch, Holdings, Neighbours, RemoteMiss, Wanted};
use crate::tables::Tables;
use crate::{CachedChunk, Miss, ReadStatistics, RemoteChunk, Table, TableFile};

/// A process's access to one cache directory and to the origin. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reader {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cache: CacheReader,
    origin: Origin,
    neighbours: Option<Neighbours>,
    statistics: ReadStatistics,
    decoded: Mutex<Decoded>,
}

/// How often an idle process lets go of the generation it saw last.
const FOLLOW_PERIOD: Duration = Duration::from_secs(5);

async fn follow(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(FOLLOW_PERIOD).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        drop(Reader { shared }.view());
    }
}

/// The tables of the generation seen last. What was decoded is kept while its bytes stay the same.
#[derive(Debug, Default)]
struct Decoded {
    /// The generation itself and not its number: a directory that was made anew counts from one.
    generation: Weak<Snapshot>,
    counters: Option<Arc<AccessCounters>>,
    /// As published.
    published: Arc<Tables>,
    /// As this process sees them.
    tables: Arc<Tables>,
    fresh: HashMap<TableName, Fresh>,
    /// Of which this process has seen a state that may be newer than the one that is published.
    doubted: HashSet<TableName>,
}

/// A state of a table that this process found by itself.
#[derive(Debug)]
struct Fresh {
    table: Arc<Table>,
    over: Over,
}

/// What was published of a table when a state of it was found: the checksum of its catalog, if
/// there was one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Over(Option<u64>);

impl Decoded {
    /// What a look that began with `from` is over; `None` where something else has been published
    /// since.
    fn over(&self, name: &TableName, from: Option<&Arc<Table>>) -> Option<Over> {
        let published = Over(self.published.checksum(name));
        let same = match (from, self.fresh.get(name)) {
            (Some(from), Some(fresh)) if Arc::ptr_eq(&fresh.table, from) => {
                return Some(fresh.over);
            }
            (Some(from), _) => self.published.has_decoded(from),
            (None, _) => published.0.is_none() || self.published.is_unreadable(name),
        };
        same.then_some(published)
    }
}

impl Reader {
    /// Follows the cache in directory `cache`, which may be empty or missing: then all is a miss.
    ///
    /// Within a tokio runtime the newest generation is taken now and then, so that a process
    /// without queries does not keep the memory of old ones.
    pub fn open(cache: &Path, origin: Origin) -> Self {
        Self::open_with(cache, ReaderOptions::default(), origin)
    }

    /// As [`Reader::open`]; `options` say whether local chunks are hashed at first touch.
    pub fn open_with(cache: &Path, options: ReaderOptions, origin: Origin) -> Self {
        Self::open_among(cache, options, origin, None)
    }

    /// As [`Reader::open_with`]; what the cache lacks and `neighbours` hold is read from them.
    pub fn open_among(
        cache: &Path,
        options: ReaderOptions,
        origin: Origin,
        neighbours: Option<Neighbours>,
    ) -> Self {
        let shared = Shared {
            cache: CacheReader::open_with(cache, options),
            origin,
            neighbours,
            statistics: ReadStatistics::default(),
            decoded: Mutex::default(),
        };
        let shared = Arc::new(shared);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(follow(Arc::downgrade(&shared)));
        }
        Self { shared }
    }

    /// The cache directory.
    pub fn directory(&self) -> &Path {
        self.shared.cache.path()
    }

    /// What this process's misses are read from.
    pub fn origin(&self) -> &Origin {
        &self.shared.origin
    }

    /// The neighbours that this process reads from, if any.
    pub fn neighbours(&self) -> Option<&Neighbours> {
        self.shared.neighbours.as_ref()
    }

    /// Counts of hits and misses since the process started.
    pub fn statistics(&self) -> &ReadStatistics {
        &self.shared.statistics
    }

    /// The newest generation, and the tables in it.
    pub fn view(&self) -> View {
        let snapshot = self.shared.cache.snapshot();
        let (tables, counters) = self.tables(&snapshot);
        View {
            reader: self.clone(),
            snapshot,
            tables,
            counters,
            holdings: self.neighbours().map(Neighbours::holdings),
        }
    }

    /// The newest generation and, in it, the table of that name. A generation that was replaced
    /// before the table's catalog was read is passed over.
    pub fn view_of(&self, name: &TableName) -> (View, Option<Arc<Table>>) {
        let mut view = self.view();
        loop {
            let table = view.table(name).cloned();
            if table.is_some() || !view.tables.names().any(|named| named == name) {
                return (view, table);
            }
            let next = self.view();
            if Arc::ptr_eq(&next.snapshot, &view.snapshot) {
                return (next, None);
            }
            view = next;
        }
    }

    /// Takes `catalog` for the table's newest state until the worker publishes another; `from` is the
    /// state that the look began with, if the table was known.
    ///
    /// For a scan that found the objects changed before the worker did. Which of two looks is newer
    /// cannot be told from clocks, which may differ between processes: what is published next is
    /// taken, and doubted where its time is not later ([`Reader::is_doubted`]).
    pub fn remember_fresh(
        &self,
        catalog: Arc<TableCatalog>,
        from: Option<&Arc<Table>>,
    ) -> Arc<Table> {
        let table = Arc::new(Table::new(catalog));
        let name = table.catalog().table.clone();
        let mut decoded = self.decoded();
        decoded.doubted.remove(&name);
        match decoded.over(&name, from) {
            Some(over) => {
                let table = Arc::clone(&table);
                decoded.fresh.insert(name, Fresh { table, over });
            }
            // Another state was published during the look: it may be the same, or an older one.
            None => {
                decoded.doubted.insert(name);
            }
        }
        decoded.generation = Weak::new();
        table
    }

    /// Forgets what this process knows of a table beside what is published: it was dropped.
    pub fn forget(&self, name: &TableName) {
        let mut decoded = self.decoded();
        decoded.fresh.remove(name);
        decoded.doubted.remove(name);
        decoded.generation = Weak::new();
    }

    /// Whether the state of a table that is published may be older than one that this process has
    /// seen, so that a look has to tell. Until then the published one is what views show.
    pub fn is_doubted(&self, table: &TableName) -> bool {
        self.decoded().doubted.contains(table)
    }

    /// Takes in that a look has found the table as views show it.
    pub fn settle(&self, table: &TableName) {
        self.decoded().doubted.remove(table);
    }

    /// Whether both are the same reader, cloned.
    pub fn is_same(&self, other: &Reader) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    fn decoded(&self) -> std::sync::MutexGuard<'_, Decoded> {
        // The state is replaced whole, so that a panic elsewhere leaves nothing half done.
        self.shared
            .decoded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The tables of a generation, and the counters if there are any by now.
    fn tables(&self, snapshot: &Arc<Snapshot>) -> (Arc<Tables>, Option<Arc<AccessCounters>>) {
        let mut decoded = self.decoded();
        if std::ptr::eq(decoded.generation.as_ptr(), Arc::as_ptr(snapshot)) {
            return (Arc::clone(&decoded.tables), decoded.counters.clone());
        }
        if decoded.counters.is_none() {
            // Hints only: a cache without counters is as good.
            decoded.counters = AccessCounters::open(self.shared.cache.path())
                .ok()
                .map(Arc::new);
        }
        let published = match snapshot.generation() {
            // Without any index, as where somebody has removed the directory, nothing says that the
            // tables are gone: those that were read go on, from the origin.
            0 => Arc::clone(&decoded.published),
            _ => Arc::new(Tables::of(snapshot, &decoded.published)),
        };
        let mut doubted = vec![];
        decoded.fresh.retain(|name, fresh| {
            let stays = Over(published.checksum(name)) == fresh.over;
            let looked_at = |table: &Arc<Table>| table.catalog().looked_at_unix_ms;
            let taken = published.get(snapshot, name).filter(|_| !stays);
            if taken.is_some_and(|taken| looked_at(taken) <= looked_at(&fresh.table)) {
                doubted.push(name.clone());
            }
            stays
        });
        decoded.doubted.extend(doubted);
        decoded.tables = match decoded.fresh.is_empty() {
            true => Arc::clone(&published),
            false => {
                let mut tables = (*published).clone();
                decoded
                    .fresh
                    .values()
                    .for_each(|fresh| tables.put_fresh(&fresh.table));
                Arc::new(tables)
            }
        };
        decoded.published = published;
        decoded.generation = Arc::downgrade(snapshot);
        (Arc::clone(&decoded.tables), decoded.counters.clone())
    }
}

/// One generation of the cache, as one scan sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    reader: Reader,
    snapshot: Arc<Snapshot>,
    tables: Arc<Tables>,
    counters: Option<Arc<AccessCounters>>,
    holdings: Option<Arc<dyn Holdings>>,
}

impl View {
    /// The process's reader.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// The generation of the index.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The names of this generation's tables, in no order. Costs nothing: no catalog is decoded.
    pub fn table_names(&self) -> impl Iterator<Item = &TableName> {
        self.tables.names()
    }

    /// The tables of this generation. Decodes the catalogs of all that nobody has asked for yet.
    pub fn tables(&self) -> impl Iterator<Item = &Arc<Table>> {
        self.tables.all(&self.snapshot)
    }

    /// The table of that name. Its catalog is decoded when a process first asks for it.
    pub fn table(&self, name: &TableName) -> Option<&Arc<Table>> {
        self.tables.get(&self.snapshot, name)
    }

    /// How many catalogs were decoded.
    #[cfg(test)]
    pub(crate) fn decoded_tables(&self) -> usize {
        self.tables.decoded()
    }

    /// The file of any table that has that content, if some of it may be in memory, here or at a
    /// neighbour. Of a file that is not, no catalog is decoded.
    pub fn file_like(&self, identity: &ObjectIdentity) -> Option<&Arc<TableFile>> {
        if self.holdings.is_none() {
            self.snapshot.file(&identity.to_key())?;
        }
        self.tables()
            .filter_map(|table| table.file_at(&identity.store, &identity.path))
            .find(|file| file.identity() == identity)
    }

    /// The id in the index of a file's content, to be looked up once a file.
    pub fn file_id(&self, file: &TableFile) -> Option<FileId> {
        self.snapshot.file(file.key())
    }

    /// Names the state that this view shows: generation of the index, and state of the directory of
    /// neighbours. Equal for two views that know of the same chunks.
    pub fn state(&self) -> ViewState {
        ViewState {
            snapshot: Arc::downgrade(&self.snapshot),
            holdings: self.holdings.as_ref().map(Arc::downgrade),
        }
    }

    /// Tags of the forms, of those that this build reads, in which neighbours are known to hold that
    /// chunk; empty where none is.
    pub fn forms_around(&self, file: &TableFile, row_group: u32, column: u32) -> Vec<u8> {
        self.around()
            .map(|(neighbours, holdings)| neighbours.forms(holdings, file.key(), row_group, column))
            .unwrap_or_default()
    }

    /// The tag of the form in which the index has that chunk; `None` where it does not have it. A
    /// scan counts on it only after [`View::chunk`].
    pub fn form(&self, file: FileId, row_group: u32, column: u32) -> Option<u8> {
        let entry = self.snapshot.lookup(file, row_group, column)?;
        Some(entry.form())
    }

    /// The index entries of these columns (ordinals of first leaves) in all row groups of a file, row
    /// group by row group; `None` for what is not cached here.
    pub fn entries(&self, file: &TableFile, columns: &[u32]) -> Vec<Option<Entry>> {
        let row_groups = file.metadata().num_row_groups() as u32;
        let Some(file) = self.file_id(file) else {
            return vec![None; row_groups as usize * columns.len()];
        };
        let wanted = |row_group| {
            columns.iter().map(move |column| stoa_shm::Wanted {
                file,
                row_group,
                column: *column,
            })
        };
        let wanted: Vec<_> = (0..row_groups).flat_map(wanted).collect();
        let mut entries = vec![];
        self.snapshot.lookup_many(&wanted, &mut entries);
        entries
    }

    /// How often a chunk was opened, by all processes, as far as anybody counted.
    pub fn counts(&self, entry: &Entry) -> Counts {
        self.counters
            .as_ref()
            .map(|counters| counters.counts(entry))
            .unwrap_or_default()
    }

    /// Opens a chunk; `data_type` is what its values decode to.
    ///
    /// # Errors
    /// A [`Miss`], which means: read it from the origin.
    pub fn chunk(
        &self,
        file: FileId,
        row_group: u32,
        column: u32,
        data_type: &DataType,
    ) -> Result<CachedChunk, Miss> {
        let entry = self
            .snapshot
            .lookup(file, row_group, column)
            .ok_or(Miss::Absent)?;
        let form = entry.form();
        let bytes = self
            .snapshot
            .open_chunk(&entry)
            .map_err(|miss| match miss {
                stoa_shm::Miss::Absent => Miss::Absent,
                stoa_shm::Miss::SegmentGone => Miss::SegmentGone,
                stoa_shm::Miss::Corrupt(_) => Miss::Corrupt,
            })?;
        if let Some(counters) = &self.counters {
            counters.record(&entry, u64::from(entry.rows()));
        }
        CachedChunk::open(form, Bytes::from_owner(bytes), data_type)
    }

    /// Whether a neighbour is to be asked for a chunk: it is known to hold it, and expected to be
    /// quicker than the origin. Returns the chunk's bytes; whether they come, [`View::fetch`] tells.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Why not.
    pub fn offered(
        &self,
        file: &TableFile,
        row_group: u32,
        column: u32,
    ) -> Result<u64, RemoteMiss> {
        let (neighbours, holdings) = self.around().ok_or(RemoteMiss::NotHeld)?;
        let wanted = wanted(&Arc::from(file.key()), file, row_group, column);
        neighbours.offers(holdings, &file.identity().store, &wanted)
    }

    /// Starts to fetch chunks of a row group from neighbours: at most one batch to each, and no
    /// chunk that this process is fetching already. `columns` are leaf ordinals, as in
    /// [`View::chunk`].
    ///
    /// Must be called within a tokio runtime. Dropping what it returns gives the chunks up.
    pub fn fetch(&self, file: &TableFile, row_group: u32, columns: &[u32]) -> RemoteColumns {
        let fetch = self.around().map(|(neighbours, holdings)| {
            let key = Arc::from(file.key());
            let wanted: Vec<Wanted> = columns
                .iter()
                .map(|column| wanted(&key, file, row_group, *column))
                .collect();
            neighbours.fetch(holdings, &file.identity().store, &wanted)
        });
        RemoteColumns {
            reader: self.reader.clone(),
            columns: columns.len(),
            fetch,
        }
    }

    fn around(&self) -> Option<(&Neighbours, &Arc<dyn Holdings>)> {
        Some((self.reader.neighbours()?, self.holdings.as_ref()?))
    }
}

/// What a view showed: the generation and the directory themselves, not their numbers, which a cache
/// directory that was made anew reaches again. It keeps neither of them mapped.
#[derive(Clone, Debug)]
pub struct ViewState {
    snapshot: Weak<Snapshot>,
    holdings: Option<Weak<dyn Holdings>>,
}

impl PartialEq for ViewState {
    fn eq(&self, other: &Self) -> bool {
        let same_holdings = match (&self.holdings, &other.holdings) {
            (Some(one), Some(other)) => one.ptr_eq(other),
            (None, None) => true,
            _ => false,
        };
        self.snapshot.ptr_eq(&other.snapshot) && same_holdings
    }
}

impl Eq for ViewState {}

/// A chunk by its name, and what it would take to read it from the file instead.
fn wanted(key: &Arc<[u8]>, file: &TableFile, row_group: u32, column: u32) -> Wanted {
    let leaves = file
        .roots()
        .iter()
        .find(|root| root.first_leaf == column)
        .map_or(1, |root| root.leaves);
    let origin_bytes = file
        .metadata()
        .row_groups()
        .get(row_group as usize)
        .map_or(0, |group| {
            (column..column.saturating_add(leaves))
                .filter_map(|leaf| group.columns().get(leaf as usize))
                .map(|leaf| leaf.byte_range().1)
                .sum()
        });
    Wanted {
        name: ChunkName {
            file: Arc::clone(key),
            row_group,
            column,
        },
        origin_bytes,
    }
}

/// Chunks of a row group on their way from neighbours. Dropping it gives up what nobody else in
/// this process waits for.
#[derive(Debug)]
pub struct RemoteColumns {
    reader: Reader,
    columns: usize,
    fetch: Option<Fetch>,
}

impl RemoteColumns {
    /// What came of each column, in the order asked for; `data_types` are what they decode to. It
    /// takes at most as long as the neighbours' deadlines.
    ///
    /// A column that did not come is to be read from the origin. Failures are counted in
    /// [`Reader::statistics`]; what came is counted by whoever uses it.
    pub async fn landed(self, data_types: &[DataType]) -> Vec<Result<RemoteChunk, RemoteMiss>> {
        let Some(fetch) = self.fetch else {
            return vec![Err(RemoteMiss::NotHeld); self.columns];
        };
        let statistics = self.reader.statistics();
        let landed = fetch.landed().await.into_iter().zip(data_types);
        landed
            .map(|(fetched, data_type)| {
                let opened = fetched.and_then(|fetched| {
                    let (bytes, source) = (fetched.bytes.len() as u64, fetched.via.into());
                    let chunk = CachedChunk::open(fetched.form, fetched.bytes, data_type);
                    chunk
                        .map(|chunk| RemoteChunk {
                            chunk,
                            source,
                            bytes,
                        })
                        .map_err(|_| RemoteMiss::Unreadable)
                });
                if let Err(miss) = &opened {
                    statistics.remote_missed(*miss);
                }
                opened
            })
            .collect()
    }
}
