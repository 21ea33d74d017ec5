//! Catalogs from the origin: footers of many files, read in parallel.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use arrow::datatypes::SchemaRef;
use futures::{StreamExt, TryStreamExt};
use stoa_origin::{ErrorKind, ListedObject, Location, ObjectIdentity, Origin};

use crate::catalog::{CatalogFile, RejectedFile, TableCatalog};
use crate::document::LayoutDocument;
use crate::error::{Error, Result};
use crate::footer;
use crate::partitions::{Partitions, partition_type, partitions};
use crate::schema::merged;

/// Footers that are read at the same time.
const FOOTERS_AT_ONCE: usize = 16;
/// The most files of a table.
const FILES_MAX: usize = 1_000_000;
/// How often a location is looked at again because its files changed meanwhile.
const LOOKS_MAX: u32 = 3;

impl TableCatalog {
    /// Reads the footers of the files that `document` names, or of those at its location if it
    /// names none, or if what it names is there no more.
    ///
    /// Bad files do not fail it: they are in [`rejected`](TableCatalog::rejected), by name.
    /// `now_unix_ms` becomes the catalog's age.
    ///
    /// # Errors
    /// Those of the document's [`validate`](LayoutDocument::validate); [`Error::NoFiles`] and
    /// [`Error::NoReadableFiles`]; [`Error::ColumnTypes`] and [`Error::PartitionColumns`] for
    /// files that make no table together; [`Error::Restless`]; [`Error::Origin`].
    pub async fn load(
        origin: &Origin,
        document: &LayoutDocument,
        now_unix_ms: u64,
    ) -> Result<TableCatalog> {
        document.validate()?;
        let location = document.parsed_location()?;
        let look = Look {
            origin,
            document,
            location: &location,
            now_unix_ms,
        };
        if !document.files.is_empty() {
            let snapshot = document
                .files
                .iter()
                .map(|identity| ListedObject {
                    identity: identity.clone(),
                    last_modified: None,
                })
                .collect();
            match look.build(snapshot, Known::default()).await {
                // The ordinary course where files come and go; what does not work then is an error.
                Err(Error::Origin(error)) if is_change(&error) => tracing::info!(
                    table = %document.table_version(),
                    %error,
                    "the snapshot that the layout names is gone; taking the files there are now",
                ),
                result => return result,
            }
        }
        look.current(None).await
    }

    /// Looks at the location again: `None` if nothing changed, else the new catalog, for which
    /// only new and changed files were read.
    ///
    /// New files that make no table with those known are [`rejected`](TableCatalog::rejected), and
    /// so are files that can be read no more, be it all of them: else queries would go on without
    /// their rows, and nobody would be told.
    ///
    /// # Errors
    /// As [`load`](TableCatalog::load), but for those.
    pub async fn refresh(&self, origin: &Origin, now_unix_ms: u64) -> Result<Option<TableCatalog>> {
        let location = Location::parse(&self.location)?;
        let look = Look {
            origin,
            document: &self.layout,
            location: &location,
            now_unix_ms,
        };
        let listed = look.listed().await?;
        let mut found: Vec<&ObjectIdentity> = listed.iter().map(|file| &file.identity).collect();
        found.sort();
        let known = self.snapshot();
        if found.into_iter().eq(&known) {
            return Ok(None);
        }
        match look.build(listed, Known::of(self)).await {
            Err(Error::Origin(error)) if is_change(&error) => {
                look.current(Some(self)).await.map(Some)
            }
            result => result.map(Some),
        }
    }
}

fn is_change(error: &stoa_origin::Error) -> bool {
    matches!(error.kind(), ErrorKind::Changed | ErrorKind::NotFound)
}

/// What an earlier look found out about files that may still be the same.
#[derive(Default)]
struct Known<'a> {
    catalog: Option<&'a TableCatalog>,
    files: HashMap<&'a ObjectIdentity, &'a CatalogFile>,
    rejected: HashMap<&'a ObjectIdentity, &'a RejectedFile>,
}

impl<'a> Known<'a> {
    fn of(catalog: &'a TableCatalog) -> Known<'a> {
        let files = catalog.files.iter();
        let rejected = catalog.rejected.iter();
        Known {
            catalog: Some(catalog),
            files: files.map(|file| (&file.identity, file)).collect(),
            rejected: rejected.map(|file| (&file.identity, file)).collect(),
        }
    }
}

/// What a table's files make together.
struct Shape {
    schema: SchemaRef,
    partitions: Partitions,
}

/// Whether the files are to blame, each of which is good by itself.
fn is_misfit(error: &Error) -> bool {
    matches!(
        error,
        Error::ColumnTypes { .. } | Error::PartitionColumns { .. } | Error::TimeRange { .. }
    )
}

/// One look at a table.
struct Look<'a> {
    origin: &'a Origin,
    document: &'a LayoutDocument,
    location: &'a Location,
    now_unix_ms: u64,
}

impl Look<'_> {
    /// The catalog of what lies at the location now, looking again if it changes under our eyes.
    async fn current(&self, previous: Option<&TableCatalog>) -> Result<TableCatalog> {
        let mut look = 1;
        loop {
            let listed = self.listed().await?;
            let known = previous.map(Known::of).unwrap_or_default();
            match self.build(listed, known).await {
                Err(Error::Origin(source)) if is_change(&source) => {
                    if look == LOOKS_MAX {
                        return Err(Error::Restless {
                            location: self.location.url(),
                            source,
                        });
                    }
                    look += 1;
                }
                result => return result,
            }
        }
    }

    /// The data files at the location.
    async fn listed(&self) -> Result<Vec<ListedObject>> {
        let listed = self.origin.list(self.location).await?;
        let files = data_files(listed);
        if files.is_empty() {
            return Err(Error::NoFiles {
                location: self.location.url(),
            });
        }
        Ok(files)
    }

    async fn build(&self, mut listed: Vec<ListedObject>, known: Known<'_>) -> Result<TableCatalog> {
        if listed.len() > FILES_MAX {
            return Err(Error::TooManyFiles {
                location: self.location.url(),
                count: listed.len(),
                max: FILES_MAX,
            });
        }
        listed.sort_by(|a, b| a.identity.cmp(&b.identity));
        let count = listed.len();
        let looked: Vec<Result<CatalogFile, RejectedFile>> = futures::stream::iter(listed)
            .map(|listed| self.look_at(listed, &known))
            .buffered(FOOTERS_AT_ONCE)
            .try_collect()
            .await?;
        let (mut files, mut rejected) = (Vec::with_capacity(count), Vec::new());
        for file in looked {
            match file {
                Ok(file) => files.push(file),
                Err(file) => rejected.push(file),
            }
        }
        if files.is_empty() {
            return match (known.catalog, rejected.first()) {
                (Some(known), Some(_)) => Ok(TableCatalog {
                    version: self.document.version,
                    files,
                    rejected,
                    looked_at_unix_ms: self.now_unix_ms,
                    layout: self.document.clone(),
                    ..known.clone()
                }),
                (_, first) => Err(Error::NoReadableFiles {
                    location: self.location.url(),
                    count,
                    first: first
                        .map_or_else(String::new, |file| format!("{}: {}", file.url, file.reason)),
                }),
            };
        }
        share_schemas(&mut files);
        let shape = match self.shape(&files) {
            Err(error) if known.catalog.is_some() && is_misfit(&error) => {
                let misfits;
                (files, misfits) = self.fitting(files, &known);
                rejected.extend(misfits);
                rejected.sort_by(|a, b| a.identity.cmp(&b.identity));
                self.shape(&files)?
            }
            shape => shape?,
        };
        for (file, values) in files.iter_mut().zip(shape.partitions.values) {
            file.partition_values = values;
        }
        let partition_columns = shape.partitions.columns.into_iter();
        Ok(TableCatalog {
            table: self.document.table.clone(),
            version: self.document.version,
            location: self.document.location.clone(),
            schema: shape.schema,
            partition_columns: partition_columns
                .map(|name| (name, partition_type()))
                .collect(),
            files,
            rejected,
            looked_at_unix_ms: self.now_unix_ms,
            layout: self.document.clone(),
        })
    }

    fn shape(&self, files: &[CatalogFile]) -> Result<Shape> {
        let schema = merged(files)?;
        let paths: Vec<(&str, String)> = files
            .iter()
            .map(|file| (self.relative(&file.identity), file.identity.url()))
            .collect();
        let in_files = |name: &str| schema.field_with_name(name).is_ok();
        let partitions = partitions(&paths, &self.document.partition_columns, in_files)?;
        if let Some(column) = partitions.columns.iter().find(|column| in_files(column)) {
            return Err(Error::InvalidLayout {
                table: self.document.table.to_string(),
                key: "partition_columns",
                value: format!("{column:?}"),
                reason: "the files have a column of that name; leave it out".into(),
            });
        }
        Ok(Shape { schema, partitions })
    }

    /// The known files and those of the new ones that make a table with them, and the others.
    fn fitting(
        &self,
        files: Vec<CatalogFile>,
        known: &Known<'_>,
    ) -> (Vec<CatalogFile>, Vec<RejectedFile>) {
        let is_known = |file: &CatalogFile| known.files.contains_key(&file.identity);
        let (mut fitting, new): (Vec<_>, Vec<_>) = files.into_iter().partition(is_known);
        let mut misfits = Vec::new();
        for file in new {
            let (identity, url) = (file.identity.clone(), file.identity.url());
            fitting.push(file);
            let Err(error) = self.shape(&fitting) else {
                continue;
            };
            fitting.pop();
            let misfit = RejectedFile {
                url,
                reason: error.to_string(),
                misfit: true,
                identity,
            };
            if !known.rejected.contains_key(&misfit.identity) {
                self.warn_of(&misfit);
            }
            misfits.push(misfit);
        }
        fitting.sort_by(|a, b| a.identity.cmp(&b.identity));
        (fitting, misfits)
    }

    fn warn_of(&self, file: &RejectedFile) {
        tracing::warn!(
            table = %self.document.table,
            url = file.url,
            reason = file.reason,
            "file cannot be read: queries of its table fail until it is mended or removed",
        );
    }

    async fn look_at(
        &self,
        listed: ListedObject,
        known: &Known<'_>,
    ) -> Result<Result<CatalogFile, RejectedFile>> {
        let identity = listed.identity;
        if let Some(file) = known.files.get(&identity) {
            return Ok(Ok(CatalogFile::clone(file)));
        }
        let rejected = known.rejected.get(&identity);
        if let Some(file) = rejected.filter(|file| !file.misfit) {
            return Ok(Err(RejectedFile::clone(file)));
        }
        match footer::read(self.origin, &identity).await? {
            Ok((footer, extra)) => {
                for root in footer.roots.iter().filter(|root| root.shadowed) {
                    tracing::warn!(
                        table = %self.document.table,
                        url = identity.url(),
                        column = root.name(),
                        "the file has this column twice: the first is the table's",
                    );
                }
                Ok(Ok(CatalogFile {
                    identity,
                    last_modified_unix_ms: listed.last_modified.map_or(0, unix_ms),
                    partition_values: Vec::new(),
                    metadata: footer.metadata,
                    footer_bytes: footer.bytes,
                    extra,
                    schema: footer.schema,
                    roots: footer.roots,
                }))
            }
            Err(rejection) => {
                let file = RejectedFile {
                    url: identity.url(),
                    reason: rejection.to_string(),
                    misfit: false,
                    identity,
                };
                self.warn_of(&file);
                Ok(Err(file))
            }
        }
    }

    /// A file's path below the location; its whole path if it lies elsewhere.
    fn relative<'a>(&self, identity: &'a ObjectIdentity) -> &'a str {
        let here = identity.store == self.location.store;
        let relative = here
            .then(|| self.location.relative(&identity.path))
            .flatten();
        relative.unwrap_or(&identity.path)
    }
}

/// The objects that are a table's data: those named `.parquet`, or all if none is.
fn data_files(listed: Vec<ListedObject>) -> Vec<ListedObject> {
    let is_parquet = |file: &ListedObject| {
        let name = file.identity.path.as_bytes();
        let suffix = b".parquet";
        name.len() >= suffix.len() && name[name.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
    };
    if listed.iter().any(is_parquet) {
        listed.into_iter().filter(is_parquet).collect()
    } else {
        listed
    }
}

/// Lets equal schemas and columns share their memory: a table of many files mostly has one.
pub(crate) fn share_schemas(files: &mut [CatalogFile]) {
    let mut previous: Option<(SchemaRef, Arc<[crate::RootColumn]>)> = None;
    for file in files {
        match &previous {
            Some((schema, roots)) if *schema == file.schema && *roots == file.roots => {
                file.schema = schema.clone();
                file.roots = roots.clone();
            }
            _ => previous = Some((file.schema.clone(), file.roots.clone())),
        }
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
