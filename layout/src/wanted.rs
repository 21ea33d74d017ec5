//! What a layout version wants cached: document and catalog put together.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::catalog::{CatalogFile, RootColumn, TableCatalog};
use crate::choice::{Choice, Why, forms_of};
use crate::document::{ChunkSpec, ColumnRef};
use crate::error::{Error, Result};
use crate::estimate::column_bytes;
use crate::form::{ChunkRef, Form};
use crate::schema::allows_arrow;

/// A chunk that a layout wants cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedChunk {
    /// Which chunk.
    pub chunk: ChunkRef,
    /// In which form.
    pub form: Form,
    /// Estimated bytes in that form.
    pub bytes: u64,
    /// Bytes in the file.
    pub compressed_bytes: u64,
    /// Rows.
    pub rows: u64,
}

/// Names this similar are offered as what was perhaps meant.
const SIMILARITY_MIN: f64 = 0.7;
/// Names that an error lists.
const NAMES_MAX: usize = 12;

/// What the catalog's layout wants cached, most wanted first: the first column in all files before
/// the second one, so that a small cache holds whole columns.
///
/// Row groups without rows need no cache and are left out.
///
/// # Errors
/// [`Error::UnknownColumn`], [`Error::Reference`] and [`Error::DuplicateChunk`] for what the layout
/// names and the table does not have. Chunks of files that have changed since the layout was
/// written, or that are rejected, are left out without an error.
pub fn wanted(catalog: &TableCatalog) -> Result<Vec<WantedChunk>, Error> {
    wanted_within(catalog, u64::MAX)
}

/// As [`wanted`], where forms that are to be chosen are chosen so that all together take at most
/// `budget_bytes`, unless the layout has a budget of its own.
///
/// # Errors
/// As [`wanted`].
pub fn wanted_within(catalog: &TableCatalog, budget_bytes: u64) -> Result<Vec<WantedChunk>> {
    catalog.layout.validate()?;
    for column in catalog.layout.forms.keys() {
        check_column(catalog, column)?;
    }
    let chosen = forms_of(catalog, budget_bytes, |_| 1.0);
    let forms: Forms = chosen.into_iter().map(|c| (c.column.clone(), c)).collect();
    match &catalog.layout.chunks {
        Some(chunks) => wanted_chunks(catalog, chunks, &forms),
        None => wanted_columns(catalog, &forms),
    }
}

/// What was chosen for each column, by its name.
type Forms = HashMap<String, Choice>;

/// What the choice of forms has left out is wanted last, unless the layout says in which order it
/// wants its columns; of a layout with a budget of its own it is not wanted at all.
fn wanted_columns(catalog: &TableCatalog, forms: &Forms) -> Result<Vec<WantedChunk>> {
    let is_left_out = |column: &&str| {
        let choice = forms.get(*column);
        choice.is_some_and(|choice| choice.why == Why::LeftOut)
    };
    let layout = &catalog.layout;
    let mut columns: Vec<&str> = match &layout.columns {
        Some(columns) => columns.iter().map(String::as_str).collect(),
        None => catalog
            .schema
            .fields()
            .iter()
            .map(|field| field.name().as_str())
            .collect(),
    };
    // Checked before the cut, so that a mistake does not wait for a larger cut.
    for column in &columns {
        check_column(catalog, column)?;
    }
    if let Some(first) = layout.first_columns {
        columns.truncate(first);
    }
    if layout.budget_bytes.is_some() {
        columns.retain(|column| !is_left_out(column));
    } else if layout.columns.is_none() {
        columns.sort_by_key(is_left_out);
    }
    let mut wanted = Vec::new();
    for column in columns {
        // Files of one schema share their roots: a name is looked for once for all of them.
        let mut found: Option<(&Arc<[RootColumn]>, Option<&RootColumn>)> = None;
        for (number, file) in catalog.files.iter().enumerate() {
            let root = match found {
                Some((roots, root)) if Arc::ptr_eq(roots, &file.roots) => root,
                _ => file.root_named(column),
            };
            found = Some((&file.roots, root));
            let Some(root) = root.filter(|_| is_full(catalog, file)) else {
                continue;
            };
            for group in 0..file.metadata.num_row_groups() {
                wanted.extend(chunk(catalog, number, group, root, forms));
            }
        }
    }
    Ok(wanted)
}

fn wanted_chunks(
    catalog: &TableCatalog,
    specs: &[ChunkSpec],
    forms: &Forms,
) -> Result<Vec<WantedChunk>> {
    let files = FilesByPath::new(catalog);
    let mut seen = HashSet::new();
    let mut wanted = Vec::with_capacity(specs.len());
    for spec in specs {
        let Some(number) = files.find(spec)? else {
            continue;
        };
        let file = &catalog.files[number];
        let root = match locate(file, spec) {
            Ok(root) => root,
            Err(_) if files.has_changed(file) => continue,
            Err(error) => return Err(error),
        };
        if !seen.insert((number, spec.row_group, root.first_leaf)) {
            return Err(Error::DuplicateChunk {
                file: spec.path.clone(),
                row_group: spec.row_group,
                column: format!("{:?}", root.name()),
            });
        }
        if is_full(catalog, file) {
            wanted.extend(chunk(catalog, number, spec.row_group as usize, root, forms));
        }
    }
    Ok(wanted)
}

fn is_full(catalog: &TableCatalog, file: &CatalogFile) -> bool {
    let groups = file.metadata.num_row_groups();
    catalog
        .layout
        .full_files_only
        .is_none_or(|full| groups == full as usize)
}

fn chunk(
    catalog: &TableCatalog,
    file: usize,
    row_group: usize,
    root: &RootColumn,
    forms: &Forms,
) -> Option<WantedChunk> {
    let group = catalog.files[file].metadata.row_group(row_group);
    let form = match allows_arrow(root) {
        true => forms
            .get(root.name())
            .map_or(Form::Parquet, |choice| choice.form),
        false => Form::Parquet,
    };
    let (bytes, _) = column_bytes(root, group);
    (group.num_rows() > 0).then_some(WantedChunk {
        chunk: ChunkRef {
            file: file as u32,
            row_group: row_group as u32,
            column: root.first_leaf,
        },
        form,
        bytes: bytes.of(form),
        compressed_bytes: bytes.parquet,
        rows: group.num_rows() as u64,
    })
}

fn check_column(catalog: &TableCatalog, column: &str) -> Result<()> {
    if catalog.schema.field_with_name(column).is_ok() {
        return Ok(());
    }
    let names: Vec<&str> = catalog
        .schema
        .fields()
        .iter()
        .map(|field| field.name().as_str())
        .collect();
    let is_partition = catalog
        .partition_columns
        .iter()
        .any(|(name, _)| name == column);
    let hint = if is_partition {
        "it is a partition column, whose values come from the files' paths: leave it out".to_owned()
    } else {
        hint(column, &names)
    };
    Err(Error::UnknownColumn {
        table: catalog.table.to_string(),
        column: column.to_owned(),
        hint,
    })
}

/// The nearest of `names`, or all of them.
fn hint(given: &str, names: &[&str]) -> String {
    let given = given.to_lowercase();
    let similar = |name: &&str| strsim::jaro_winkler(&given, &name.to_lowercase());
    let nearest = names
        .iter()
        .max_by(|a, b| similar(a).total_cmp(&similar(b)));
    match nearest.filter(|name| similar(name) >= SIMILARITY_MIN) {
        Some(name) => format!("did you mean {name:?}?"),
        None => {
            let shown: Vec<&str> = names.iter().take(NAMES_MAX).copied().collect();
            let more = if names.len() > NAMES_MAX { ", …" } else { "" };
            format!("it has {}{more}", shown.join(", "))
        }
    }
}

/// The root column that a spec names.
fn locate<'a>(file: &'a CatalogFile, spec: &ChunkSpec) -> Result<&'a RootColumn> {
    let wrong = |largest: String| Error::Reference {
        file: spec.path.clone(),
        row_group: spec.row_group,
        column: spec.column.to_string(),
        largest,
    };
    let groups = file.metadata.num_row_groups();
    if spec.row_group as usize >= groups {
        return Err(wrong(match groups {
            0 => "the file has no row groups".into(),
            groups => format!("the largest row group is {}", groups - 1),
        }));
    }
    match &spec.column {
        ColumnRef::Name(name) => file.root_named(name).ok_or_else(|| {
            let names: Vec<&str> = file.roots.iter().map(RootColumn::name).collect();
            wrong(format!(
                "the file has no such column; {}",
                hint(name, &names)
            ))
        }),
        ColumnRef::Leaf(leaf) => {
            let holder = file
                .roots
                .iter()
                .find(|root| root.leaf_range().contains(&(*leaf as usize)));
            match holder {
                Some(root) if root.first_leaf == *leaf => Ok(root),
                Some(root) => Err(wrong(format!(
                    "it belongs to column {:?}, which is cached whole under {}",
                    root.name(),
                    root.first_leaf
                ))),
                None => Err(wrong(match file.roots.last() {
                    Some(last) => format!("the largest column is {}", last.leaf_range().end - 1),
                    None => "the file has no columns".into(),
                })),
            }
        }
    }
}

/// The catalog's files by the paths that layouts use.
struct FilesByPath<'a> {
    catalog: &'a TableCatalog,
    location: stoa_origin::Location,
    by_path: HashMap<&'a str, usize>,
}

impl<'a> FilesByPath<'a> {
    fn new(catalog: &'a TableCatalog) -> Self {
        let location = catalog
            .layout
            .parsed_location()
            .unwrap_or_else(|_| unreachable!("the layout was validated"));
        let mut by_path = HashMap::new();
        for (number, file) in catalog.files.iter().enumerate() {
            let path = file.identity.path.as_str();
            by_path.insert(path, number);
            if let Some(relative) = location.relative(path).filter(|path| !path.is_empty()) {
                by_path.insert(relative, number);
            }
        }
        FilesByPath {
            catalog,
            location,
            by_path,
        }
    }

    /// The file that a spec names; `None` for one that was there and is not any more.
    fn find(&self, spec: &ChunkSpec) -> Result<Option<usize>> {
        if let Some(&number) = self.by_path.get(spec.path.as_str()) {
            return Ok(Some(number));
        }
        let is_named =
            |path: &str| path == spec.path || self.location.relative(path) == Some(&spec.path);
        let was_there = self
            .catalog
            .layout
            .files
            .iter()
            .any(|file| is_named(&file.path));
        let is_rejected = self
            .catalog
            .rejected
            .iter()
            .any(|file| is_named(&file.identity.path));
        if was_there || is_rejected {
            return Ok(None);
        }
        let mut paths: Vec<&str> = self.by_path.keys().copied().collect();
        paths.sort();
        let count = self.catalog.files.len();
        Err(Error::Reference {
            file: spec.path.clone(),
            row_group: spec.row_group,
            column: spec.column.to_string(),
            largest: format!(
                "none of the table's {count} files; {}",
                hint(&spec.path, &paths)
            ),
        })
    }

    /// Whether the layout was written for other content of this file.
    fn has_changed(&self, file: &CatalogFile) -> bool {
        let mut known = self.catalog.layout.files.iter();
        known.any(|known| known.path == file.identity.path && *known != file.identity)
    }
}
