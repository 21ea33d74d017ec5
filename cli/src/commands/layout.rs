//! `stoa layout …`: what is worth caching.

use std::io::Read;

use serde_json::{Value, json};
use stoa_layout::{
    Choice, LayoutDocument, LayoutVersion, Location, TableCatalog, TableName, TableVersion,
    candidates, forms_of, sizes, wanted,
};
use stoa_metastore::Records;

use super::load::{load, request};
use super::print_json;
use super::unload::drop_tables;
use crate::args::{LayoutCommand, LayoutCreateArgs, LoadArgs};
use crate::config::format_bytes;
use crate::context::{Context, Target, now_unix_ms};
use crate::error::{Error, Result};
use crate::progress::spinner;
use crate::table::{Align, TextTable};

/// How often a publication without a named version is tried again after somebody else's.
const ATTEMPTS: u32 = 8;

/// Carries out one of the layout commands.
pub async fn layout(command: LayoutCommand, context: &Context) -> Result<()> {
    match command {
        LayoutCommand::Create(args) => create(*args, context).await,
        LayoutCommand::Show { table, json } => show(&table, json, context).await,
        LayoutCommand::List { json } => list(json, context).await,
        LayoutCommand::Drop(args) => drop_tables(args, context).await,
        LayoutCommand::Size {
            table,
            location,
            json,
        } => size(table.as_deref(), location.as_deref(), json, context).await,
        LayoutCommand::Explain {
            table,
            location,
            budget,
            json,
        } => explain(table.as_deref(), location.as_deref(), budget, json, context).await,
    }
}

async fn create(args: LayoutCreateArgs, context: &Context) -> Result<()> {
    let target = Target::parse(&args.table)?;
    // Before the origin is read: an owner elsewhere should be known at once.
    let records = match args.dry_run {
        true => None,
        false => Some(context.records().await?),
    };
    let mut document = document(&args, &target, context)?;
    let spinner = spinner(format!("reading footers of {}", document.location));
    let origin = context.origin();
    let catalog = TableCatalog::load(&origin, &document, now_unix_ms()).await;
    spinner.finish_and_clear();
    let catalog = catalog?;
    for rejected in &catalog.rejected {
        eprintln!(
            "warning: {} cannot be read: {}; queries of {} fail until it is mended or removed",
            rejected.url, rejected.reason, catalog.table
        );
    }
    if catalog.files.is_empty() {
        return Err(Error::Refused(format!(
            "no Parquet file at {}; expected at least one",
            document.location
        )));
    }
    // Names and chunks are checked against the files before anybody else sees the layout.
    let chunks = wanted(&catalog)?;
    // All of them: of what cannot be read, whoever reads the table has to know.
    document.files = catalog.snapshot();
    let Some(records) = records else {
        return print_document(&document);
    };
    publish(&mut document, &target, &records).await?;
    let version = document.table_version();
    let bytes: u64 = chunks.iter().map(|chunk| chunk.bytes).sum();
    let rows: i64 = catalog
        .files
        .iter()
        .map(|file| file.metadata.file_metadata().num_rows())
        .sum();
    if args.json {
        print_json(&json!({
            "table_version": version.to_string(),
            "files": catalog.files.len(),
            "rejected": catalog.rejected.iter().map(|rejected| json!({
                "url": rejected.url, "reason": rejected.reason,
            })).collect::<Vec<_>>(),
            "rows": rows,
            "chunks": chunks.len(),
            "bytes": bytes,
        }));
    } else {
        eprintln!(
            "{version} is published: {} files, {rows} rows; {} chunks to cache, about {}",
            catalog.files.len(),
            chunks.len(),
            format_bytes(bytes)
        );
    }
    drop(records);
    if args.load {
        let load_args = LoadArgs {
            tables: vec![version.to_string()],
            no_wait: false,
            timeout: std::time::Duration::from_secs(3600),
            json: false,
        };
        return load(load_args, context).await;
    }
    if !args.json {
        eprintln!("load it with: {} load {version}", context.command);
    }
    Ok(())
}

/// The document that the flags describe; its version is settled when it is published.
fn document(args: &LayoutCreateArgs, target: &Target, context: &Context) -> Result<LayoutDocument> {
    let version = match target {
        Target::Version(version) => version.version,
        Target::Newest(_) => LayoutVersion::FIRST,
    };
    let located = args
        .location
        .as_ref()
        .map(|location| context.config.location(location, &context.machine));
    let mut document = match (&args.document, located) {
        (Some(path), located) => {
            let text = read_document(path)?;
            let mut value: Value = serde_json::from_str(&text).map_err(|error| {
                Error::Refused(format!("{} is not JSON: {error}", path.display()))
            })?;
            if let Some(fields) = value.as_object_mut() {
                // The command line names table and version; a document of another one is a draft.
                fields.insert("table".into(), json!(target.table().to_string()));
                fields.insert("version".into(), json!(version.get()));
                fields.remove("files");
                if let Some(location) = located {
                    fields.insert("location".into(), json!(location));
                }
            }
            LayoutDocument::from_json(&value.to_string())?
        }
        (None, Some(location)) => LayoutDocument::new(target.table().clone(), version, location),
        // clap demands one of them.
        (None, None) => {
            return Err(Error::Usage("give --location or --document".into()));
        }
    };
    if !args.columns.is_empty() {
        document.columns = Some(args.columns.iter().map(|c| c.trim().to_string()).collect());
    }
    if args.first_columns.is_some() {
        document.first_columns = args.first_columns;
    }
    if args.full_files_only.is_some() {
        document.full_files_only = args.full_files_only;
    }
    for asked in &args.form {
        match &asked.column {
            None => document.form = asked.form,
            Some(column) => {
                document.forms.insert(column.clone(), asked.form);
            }
        }
    }
    if args.budget.is_some() {
        document.budget_bytes = args.budget;
    }
    if let Some(replicas) = args.replicas {
        document.replicas = replicas;
    }
    if !args.partition_columns.is_empty() {
        document.partition_columns = args.partition_columns.clone();
    }
    document.validate()?;
    Ok(document)
}

fn read_document(path: &std::path::Path) -> Result<String> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    read.map_err(|error| Error::while_doing(format!("cannot read {}", path.display()), error))
}

/// Publishes under the version named, else under the next free one.
async fn publish(document: &mut LayoutDocument, target: &Target, records: &Records) -> Result<()> {
    let table = document.table.to_string();
    for attempt in 1.. {
        if let Target::Newest(_) = target {
            document.version = LayoutVersion::new(records.next_layout(&table).await?)?;
        }
        let version = document.version.get();
        let published = records
            .publish_layout(&table, version, &document.to_json())
            .await;
        match (published, target) {
            (Ok(()), _) => break,
            // Somebody else took the number between the look and the publication.
            (
                Err(
                    stoa_metastore::Error::StaleVersion { .. }
                    | stoa_metastore::Error::Conflict { .. },
                ),
                Target::Newest(_),
            ) if attempt < ATTEMPTS => {}
            (Err(error), _) => return Err(error.into()),
        }
    }
    Ok(())
}

fn print_document(document: &LayoutDocument) -> Result<()> {
    let value = serde_json::to_value(document)
        .map_err(|error| Error::while_doing("cannot print the document", error))?;
    print_json(&value);
    Ok(())
}

/// A published document, by name and version.
async fn published(target: &Target, records: &Records) -> Result<LayoutDocument> {
    let version = target.resolve(records).await?;
    let table = version.table.to_string();
    match records.layout(&table, version.version.get()).await? {
        Some(text) => Ok(LayoutDocument::from_json(&text)?),
        None => {
            let known = records.layouts(&table).await?;
            let unknown = stoa_metastore::Error::UnknownLayout {
                table_version: version.to_string(),
                known,
            };
            Err(unknown.into())
        }
    }
}

async fn show(table: &str, json: bool, context: &Context) -> Result<()> {
    let target = Target::parse(table)?;
    let records = context.records_to_read().await?;
    let document = published(&target, &records).await?;
    if json {
        return print_document(&document);
    }
    print!("{}", describe(&document));
    Ok(())
}

fn describe(document: &LayoutDocument) -> String {
    let mut lines = vec![
        ("table", document.table_version().to_string()),
        ("location", document.location.clone()),
    ];
    match (&document.chunks, &document.columns) {
        (Some(chunks), _) => lines.push(("chunks", chunks.len().to_string())),
        (None, Some(columns)) => lines.push(("columns", columns.join(", "))),
        (None, None) => lines.push(("columns", "all".into())),
    }
    if let Some(first) = document.first_columns {
        lines.push(("of these", format!("the first {first}")));
    }
    if let Some(groups) = document.full_files_only {
        lines.push(("only files with", format!("{groups} row groups")));
    }
    lines.push(("form", document.form.to_string()));
    if !document.replicas.is_one() {
        lines.push(("replicas", document.replicas.to_string()));
    }
    let forms = document.forms.iter();
    let forms: Vec<String> = forms
        .map(|(column, form)| format!("{column} {form}"))
        .collect();
    if !forms.is_empty() {
        lines.push(("but", forms.join(", ")));
    }
    if let Some(budget) = document.budget_bytes {
        lines.push(("budget", format_bytes(budget)));
    }
    if !document.partition_columns.is_empty() {
        lines.push(("partitioned by", document.partition_columns.join(", ")));
    }
    let bytes: u64 = document.files.iter().map(|file| file.size).sum();
    lines.push((
        "files",
        match document.files.len() {
            0 => "those that lie there when it is loaded".into(),
            count => format!("{count}, {}", format_bytes(bytes)),
        },
    ));
    lines
        .into_iter()
        .map(|(name, value)| format!("{name:<16} {value}\n"))
        .collect()
}

async fn list(json: bool, context: &Context) -> Result<()> {
    let records = context.records_to_read().await?;
    let mut listed = Vec::new();
    for table in records.layout_tables().await? {
        let versions = records.layouts(&table).await?;
        let requested = records.load_request(&table).await?;
        let in_force = records.cache_version(&table).await?;
        listed.push((table, versions, requested, in_force));
    }
    if json {
        let tables: Vec<Value> = listed
            .iter()
            .map(|(table, versions, requested, in_force)| {
                json!({
                    "table": table,
                    "versions": versions,
                    "requested": requested.as_ref().filter(|r| !r.unloaded).map(|r| r.version),
                    "planned": in_force.as_ref().filter(|p| !p.unloaded).map(|p| p.version().ok()),
                })
            })
            .collect();
        print_json(&Value::Array(tables));
        return Ok(());
    }
    let mut table = TextTable::new([
        ("table", Align::Left),
        ("versions", Align::Left),
        ("requested", Align::Right),
        ("planned", Align::Right),
    ]);
    for (name, versions, requested, in_force) in listed {
        let requested = requested.filter(|r| !r.unloaded).map(|r| r.version);
        let planned = in_force
            .filter(|p| !p.unloaded)
            .and_then(|p| p.version().ok());
        let shown = |version: Option<u64>| version.map_or("-".to_string(), |v| v.to_string());
        table.row([name, ranges(&versions), shown(requested), shown(planned)]);
    }
    if table.is_empty() {
        eprintln!("no layout is published; `stoa layout create --help` shows how");
    } else {
        print!("{table}");
    }
    Ok(())
}

/// Ascending numbers, runs shortened: `1-3, 7`.
fn ranges(numbers: &[u64]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let shown: Vec<String> = runs
        .iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    shown.join(", ")
}

/// The catalog of a table with a published layout, or of files without one.
async fn catalog_of(
    table: Option<&str>,
    location: Option<&str>,
    context: &Context,
) -> Result<TableCatalog> {
    let document = match (table, location) {
        (_, Some(location)) => {
            let location = context.config.location(location, &context.machine);
            Location::parse(&location)?;
            let name = TableName::new("public", "files")?;
            LayoutDocument::new(name, LayoutVersion::FIRST, location)
        }
        (Some(table), None) => {
            let records = context.records_to_read().await?;
            published(&Target::parse(table)?, &records).await?
        }
        (None, None) => return Err(Error::Usage("give a table or --location".into())),
    };
    let spinner = spinner(format!("reading footers of {}", document.location));
    let catalog = TableCatalog::load(&context.origin(), &document, now_unix_ms()).await;
    spinner.finish_and_clear();
    Ok(catalog?)
}

async fn explain(
    table: Option<&str>,
    location: Option<&str>,
    budget: Option<u64>,
    json: bool,
    context: &Context,
) -> Result<()> {
    let mut catalog = catalog_of(table, location, context).await?;
    catalog.layout.budget_bytes = budget.or(catalog.layout.budget_bytes);
    let budget = catalog.layout.budget_bytes;
    let budget = budget.unwrap_or(context.config.cache.size_bytes);
    let choices = forms_of(&catalog, budget, |_| 1.0);
    let sizes = candidates(&catalog, |_| 1.0);
    if json {
        let columns = choices.iter().map(|choice| {
            let size = sizes.iter().find(|size| size.column == choice.column);
            json!({
                "column": choice.column,
                "form": choice.form.as_str(),
                "why": choice.why.to_string(),
                "bytes": choice.bytes,
                "arrow_bytes": size.map(|size| size.bytes.arrow),
                "packed_bytes": size.map(|size| size.bytes.packed),
                "parquet_bytes": size.map(|size| size.bytes.parquet),
                "saved_ns": choice.saved_ns,
                "benefit": choice.benefit,
            })
        });
        print_json(&json!({
            "budget_bytes": budget,
            "bytes": choices.iter().map(|choice| choice.bytes).sum::<u64>(),
            "columns": columns.collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    print!("{}", explained(&choices));
    eprintln!("chosen for a budget of {}", format_bytes(budget));
    Ok(())
}

/// The choices as a table for people.
fn explained(choices: &[Choice]) -> TextTable {
    let mut shown = TextTable::new([
        ("column", Align::Left),
        ("form", Align::Left),
        ("about", Align::Right),
        ("saves a scan", Align::Right),
        ("ns a byte", Align::Right),
        ("why", Align::Left),
    ]);
    for choice in choices {
        shown.row([
            choice.column.clone(),
            choice.form.to_string(),
            format_bytes(choice.bytes),
            format!("{:.1} ms", choice.saved_ns / 1e6),
            format!("{:.2}", choice.benefit),
            choice.why.to_string(),
        ]);
    }
    let bytes = choices.iter().map(|choice| choice.bytes).sum();
    let saved: f64 = choices.iter().map(|choice| choice.saved_ns).sum();
    shown.row([
        "all".to_string(),
        String::new(),
        format_bytes(bytes),
        format!("{:.1} ms", saved / 1e6),
        String::new(),
        String::new(),
    ]);
    shown
}

async fn size(
    table: Option<&str>,
    location: Option<&str>,
    json: bool,
    context: &Context,
) -> Result<()> {
    let catalog = catalog_of(table, location, context).await?;
    let sizes = sizes(&catalog);
    let packed: u64 = sizes.iter().map(|size| size.packed_bytes).sum();
    let parquet: u64 = sizes.iter().map(|size| size.parquet_bytes).sum();
    let arrow: u64 = sizes.iter().map(|size| size.arrow_bytes).sum();
    if json {
        let columns: Vec<Value> = sizes
            .iter()
            .map(|size| {
                json!({
                    "column": size.column,
                    "parquet_bytes": size.parquet_bytes,
                    "arrow_bytes": size.arrow_bytes,
                    "packed_bytes": size.packed_bytes,
                })
            })
            .collect();
        print_json(&json!({
            "location": catalog.layout.location,
            "files": catalog.files.len(),
            "columns": columns,
            "parquet_bytes": parquet,
            "arrow_bytes": arrow,
            "packed_bytes": packed,
        }));
        return Ok(());
    }
    let mut shown = TextTable::new([
        ("column", Align::Left),
        ("parquet", Align::Right),
        ("arrow", Align::Right),
        ("arrow/parquet", Align::Right),
        ("packed", Align::Right),
        ("packed/parquet", Align::Right),
    ]);
    let mut row = |name: &str, parquet: u64, arrow: u64, packed: u64| {
        let ratio = |bytes: u64| match parquet {
            0 => "-".into(),
            parquet => format!("{:.1}", bytes as f64 / parquet as f64),
        };
        shown.row([
            name.to_string(),
            format_bytes(parquet),
            format_bytes(arrow),
            ratio(arrow),
            format_bytes(packed),
            ratio(packed),
        ]);
    };
    for size in &sizes {
        row(
            &size.column,
            size.parquet_bytes,
            size.arrow_bytes,
            size.packed_bytes,
        );
    }
    row("all", parquet, arrow, packed);
    print!("{shown}");
    let budget = context.config.cache.size_bytes;
    if arrow > budget {
        eprintln!(
            "all columns as arrow take more than cache.size ({}); name the most wanted with \
             --columns, the rest is left out",
            format_bytes(budget)
        );
    }
    Ok(())
}

/// Publishes a document as the next version unless the newest has the same content already, and
/// asks for it to be loaded. The document's own version does not count.
pub async fn publish_or_reuse(
    mut document: LayoutDocument,
    records: &Records,
) -> Result<TableVersion> {
    let version = match same_content_published(&document, records).await? {
        Some(version) => version,
        None => {
            let target = Target::Newest(document.table.clone());
            publish(&mut document, &target, records).await?;
            document.table_version()
        }
    };
    request(records, &version).await?;
    Ok(version)
}

async fn same_content_published(
    document: &LayoutDocument,
    records: &Records,
) -> Result<Option<TableVersion>> {
    let table = document.table.to_string();
    let Some(newest) = records.latest_layout(&table).await? else {
        return Ok(None);
    };
    let Some(text) = records.layout(&table, newest).await? else {
        return Ok(None);
    };
    // What an older program published and this one cannot read is simply other content.
    let Ok(mut known) = LayoutDocument::from_json(&text) else {
        return Ok(None);
    };
    let version = known.table_version();
    known.version = document.version;
    Ok((known == *document).then_some(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_versions_are_shortened() {
        assert_eq!(ranges(&[1, 2, 3, 7, 9, 10]), "1-3, 7, 9-10");
        assert_eq!(ranges(&[]), "");
    }

    #[tokio::test]
    async fn the_same_content_is_not_published_twice() {
        let records = Records::new(std::sync::Arc::new(
            stoa_metastore::EmbeddedMetastore::in_memory(),
        ));
        let name = TableName::parse("tpch.orders").unwrap();
        let document = LayoutDocument::new(name, LayoutVersion::FIRST, "/data/orders/");
        let publish = |document: &LayoutDocument| publish_or_reuse(document.clone(), &records);
        let version = publish(&document).await.unwrap();
        assert_eq!(version.to_string(), "tpch.orders:1");
        assert_eq!(publish(&document).await.unwrap(), version);
        let mut other = document.clone();
        other.columns = Some(vec!["o_orderkey".into()]);
        let next = publish(&other).await.unwrap();
        assert_eq!(next.to_string(), "tpch.orders:2");
        // Back to the first content: a new version, as versions only increase.
        let back = publish(&document).await.unwrap();
        assert_eq!(back.to_string(), "tpch.orders:3");
    }

    #[test]
    fn a_document_is_described_for_people() {
        let document = LayoutDocument::from_json(
            r#"{"table": "tpch.lineitem", "version": 3, "location": "s3://bucket/lineitem/",
                "columns": ["l_shipdate", "l_discount"], "first_columns": 1}"#,
        )
        .unwrap();
        insta::assert_snapshot!(describe(&document), @"
        table            tpch.lineitem:3
        location         s3://bucket/lineitem/
        columns          l_shipdate, l_discount
        of these         the first 1
        form             auto
        files            those that lie there when it is loaded
        ");
    }
}
