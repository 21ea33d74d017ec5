//! A cache that covers whatever files a session is about to read.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use datafusion::common::Result;
use datafusion::execution::context::SessionContext;
use stoa_datafusion::{Embedded, EmbeddedSettings};
use stoa_layout::{FormChoice, LayoutDocument, LayoutVersion, TableName};
use stoa_reader::MissCounts;
use tokio::sync::Mutex;

use crate::scratch::CacheDirectory;

/// The schema that the tables are laid out in which cover scans of other tables.
pub const SCHEMA: &str = "stoa_compare";

/// How long a load may take. A table that the coordinator or the worker refuses is told at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a session reads its Parquet files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// As DataFusion does.
    Stock,
    /// By tables `STORED AS PARQUET` whose files are cached in this form.
    Scans(FormChoice),
    /// By tables that are made `STORED AS STOA`.
    Table,
}

impl Through {
    /// Everything but stock.
    pub const CACHED: [Through; 5] = [
        Through::Scans(FormChoice::Arrow),
        Through::Scans(FormChoice::Packed),
        Through::Scans(FormChoice::Parquet),
        Through::Scans(FormChoice::Auto),
        Through::Table,
    ];
}

impl fmt::Display for Through {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Through::Stock => "stock",
            Through::Scans(form) => form.as_str(),
            Through::Table => "stoa",
        })
    }
}

/// An embedded cache of its own, with the layouts that it was given.
#[derive(Debug)]
pub struct Cached {
    embedded: Embedded,
    covered: Mutex<Vec<LayoutDocument>>,
    _directory: CacheDirectory,
}

impl Cached {
    /// A cache of at most `capacity_bytes` that looks at no file unless it is told to.
    ///
    /// # Errors
    /// If /dev/shm cannot be written.
    pub async fn start(capacity_bytes: u64) -> Result<Cached, String> {
        let directory = CacheDirectory::new().map_err(|error| error.to_string())?;
        let settings = EmbeddedSettings {
            cache_directory: directory.path(),
            capacity_bytes,
            freshness: None,
            ..EmbeddedSettings::default()
        };
        let embedded = Embedded::start(settings).await;
        Ok(Cached {
            embedded: embedded.map_err(|error| error.to_string())?,
            covered: Mutex::default(),
            _directory: directory,
        })
    }

    /// Makes a session read through the cache.
    ///
    /// # Errors
    /// If it has no default catalog.
    pub async fn register(&self, session: &SessionContext) -> Result<()> {
        self.embedded.stoa().register(session).await
    }

    /// What was read from memory and what was not, since the cache was started.
    pub fn counts(&self) -> MissCounts {
        self.embedded.reader().statistics().counts()
    }

    /// Loads the files at a place of the file system in one form, and waits for that.
    ///
    /// # Errors
    /// What the coordinator or the worker says of files that it does not take.
    pub async fn cover(
        &self,
        place: &Path,
        partition_columns: &[String],
        form: FormChoice,
    ) -> Result<(), String> {
        let mut covered = self.covered.lock().await;
        let name = format!("t{}", covered.len());
        let table = TableName::new(SCHEMA, &name).map_err(|error| error.to_string())?;
        let mut document = LayoutDocument::new(table, LayoutVersion::FIRST, location(place));
        document.partition_columns = partition_columns.to_vec();
        document.form = form;
        covered.push(document.clone());
        self.load(&document).await
    }

    /// Loads another version of everything that is covered: its files may have changed.
    pub async fn cover_again(&self) {
        let mut covered = self.covered.lock().await;
        for document in covered.iter_mut() {
            let next = LayoutVersion::new(document.version.get() + 1);
            document.version = next.unwrap_or(document.version);
            // What it does not take is read from the file, as any other miss.
            let _ = self.load(document).await;
        }
    }

    /// Publishes a layout and waits until it is in memory.
    ///
    /// # Errors
    /// What the coordinator or the worker says of files that it does not take.
    pub async fn load(&self, document: &LayoutDocument) -> Result<(), String> {
        let published = self.embedded.publish(document).await;
        published.map_err(|error| error.to_string())?;
        self.wait(&document.table, document.version).await
    }

    /// Waits until a version of a table is in memory.
    ///
    /// # Errors
    /// What the coordinator or the worker says of files that it does not take.
    pub async fn wait(&self, table: &TableName, version: LayoutVersion) -> Result<(), String> {
        let (Some(mut states), Some(records)) =
            (self.embedded.worker_state(), self.embedded.records())
        else {
            return Err("the cache is run by another process".to_owned());
        };
        let (name, request) = (table.to_string(), format!("{table}:{}", version.get()));
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let rejections = records
                .rejections()
                .await
                .map_err(|error| error.to_string())?;
            if let Some(rejection) = rejections.iter().find(|r| r.request.contains(&request)) {
                return Err(rejection.reason.clone());
            }
            let state = states.borrow_and_update().tables.get(&name).cloned();
            if let Some(state) = state {
                if let Some(error) = state.error {
                    return Err(error);
                }
                if state.current.is_some_and(|c| c.version >= version.get()) {
                    return Ok(());
                }
            }
            if tokio::time::Instant::now() > deadline {
                return Err(format!(
                    "{request} is not loaded after {} s",
                    PATIENCE.as_secs()
                ));
            }
            let tick = Duration::from_millis(20);
            let _ = tokio::time::timeout(tick, states.changed()).await;
        }
    }

    /// The embedded cache itself.
    pub fn embedded(&self) -> &Embedded {
        &self.embedded
    }

    /// Stops it; its memory is given back.
    pub async fn stop(self) {
        self.embedded.shutdown().await;
    }
}

/// A place as a layout names it: absolute, and with a `/` behind a directory. A pattern's files are
/// those of the last directory without one.
fn location(place: &Path) -> String {
    let mut whole = PathBuf::new();
    for part in without_parents(place).components() {
        if part.as_os_str().to_string_lossy().contains(['*', '?', '[']) {
            break;
        }
        whole.push(part);
    }
    let slash = if whole.is_dir() { "/" } else { "" };
    format!("{}{slash}", whole.display())
}

/// The place without `..`, which locations may not have.
pub fn without_parents(place: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for part in place.components() {
        match part {
            Component::ParentDir => drop(whole.pop()),
            other => whole.push(other),
        }
    }
    whole
}
