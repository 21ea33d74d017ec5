//! What lies in this machine's shared memory, whoever published it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::config::format_bytes;
use crate::context::Context;
use crate::table::{Align, TextTable};

/// What lies in a cache directory, as any query process sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// The directory.
    pub location: String,
    /// The published generation; 0 when there is none.
    pub generation: u64,
    /// Table by table.
    pub tables: Vec<MemoryTable>,
}

/// What lies of one table in a cache directory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryTable {
    /// Its name.
    pub table: String,
    /// The version published.
    pub version: u64,
    /// Its files.
    pub files: u64,
    /// Its cached chunks.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Where the files lie.
    pub location: String,
    /// When they were last looked at, in milliseconds since 1970.
    pub looked_at_unix_ms: u64,
}

/// What lies in this machine's cache directory.
pub(super) fn memory(context: &Context) -> Memory {
    let location = &context.config.cache.location;
    let reader = context.local_reader();
    let view = reader.view();
    let mut by_file: BTreeMap<&[u8], (u64, u64)> = BTreeMap::new();
    for (file, entry) in view.snapshot().iter() {
        let sum = by_file.entry(file).or_default();
        *sum = (sum.0 + 1, sum.1 + entry.length());
    }
    let looks = stoa_cache_manager::looks(location);
    let mut tables: Vec<MemoryTable> = view
        .tables()
        .map(|table| {
            let catalog = table.catalog();
            let of_files = table
                .files()
                .iter()
                .filter_map(|file| by_file.get(file.key()));
            let (chunks, bytes) = of_files.fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
            let name = catalog.table.to_string();
            let looked = looks.get(&name).copied().unwrap_or(0);
            MemoryTable {
                table: name,
                version: catalog.version.get(),
                files: catalog.files.len() as u64,
                chunks,
                bytes,
                location: catalog.location.clone(),
                looked_at_unix_ms: catalog.looked_at_unix_ms.max(looked),
            }
        })
        .collect();
    tables.sort_by(|a, b| a.table.cmp(&b.table));
    Memory {
        location: location.display().to_string(),
        generation: view.snapshot().generation(),
        tables,
    }
}

impl Memory {
    pub(super) fn to_json(&self) -> Value {
        let tables: Vec<Value> = self
            .tables
            .iter()
            .map(|table| {
                json!({
                    "table": table.table,
                    "version": table.version,
                    "files": table.files,
                    "chunks": table.chunks,
                    "bytes": table.bytes,
                    "location": table.location,
                    "looked_at_unix_ms": table.looked_at_unix_ms,
                })
            })
            .collect();
        json!({
            "location": self.location,
            "generation": self.generation,
            "tables": tables,
        })
    }

    pub(super) fn to_text(&self) -> String {
        let mut shown = TextTable::new([
            ("table", Align::Left),
            ("version", Align::Right),
            ("files", Align::Right),
            ("chunks", Align::Right),
            ("held", Align::Right),
            ("location", Align::Left),
        ]);
        for table in &self.tables {
            shown.row([
                table.table.clone(),
                table.version.to_string(),
                table.files.to_string(),
                table.chunks.to_string(),
                format_bytes(table.bytes),
                table.location.clone(),
            ]);
        }
        match shown.is_empty() {
            true => format!("{} holds no table\n", self.location),
            false => shown.to_string(),
        }
    }
}
