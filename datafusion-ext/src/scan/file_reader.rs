//! Reads the bytes of a file's misses: from chunks cached in the parquet form and from the catalog
//! where they are there, else from the origin, from exactly the content that the catalog names.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use datafusion::common::Result;
use datafusion::physical_plan::metrics::{Count, ExecutionPlanMetricsSet};
use datafusion_datasource::PartitionedFile;
use datafusion_datasource_parquet::{DefaultParquetFileReaderFactory, ParquetFileReaderFactory};
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::ObjectStore;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use stoa_reader::{CachedChunk, TableFile, View};

use super::context::resolve;
use super::metrics::{cached_bytes, origin_bytes};

/// Makes readers for the files of cached tables, and leaves all others to the source's own factory.
#[derive(Debug)]
pub(crate) struct CachedReaderFactory {
    view: View,
    store: String,
    otherwise: Arc<dyn ParquetFileReaderFactory>,
}

impl CachedReaderFactory {
    pub(crate) fn new(
        view: View,
        store: String,
        own: Option<Arc<dyn ParquetFileReaderFactory>>,
        object_store: Arc<dyn ObjectStore>,
    ) -> Self {
        let otherwise =
            own.unwrap_or_else(|| Arc::new(DefaultParquetFileReaderFactory::new(object_store)));
        Self {
            view,
            store,
            otherwise,
        }
    }
}

impl ParquetFileReaderFactory for CachedReaderFactory {
    fn create_reader(
        &self,
        partition: usize,
        file: PartitionedFile,
        metadata_size_hint: Option<usize>,
        metrics: &ExecutionPlanMetricsSet,
    ) -> Result<Box<dyn AsyncFileReader + Send>> {
        match resolve(&self.view, &self.store, &file) {
            Some(table_file) => Ok(Box::new(CachedFileReader::new(
                self.view.clone(),
                table_file,
                origin_bytes(metrics, partition),
                cached_bytes(metrics, partition),
            ))),
            None => self
                .otherwise
                .create_reader(partition, file, metadata_size_hint, metrics),
        }
    }
}

/// Reads one file of a cached table.
#[derive(Debug)]
pub(crate) struct CachedFileReader {
    view: View,
    file: Arc<TableFile>,
    from_origin: Count,
    from_memory: Count,
    /// Column chunks that neighbours sent as they are in the file: row group, first leaf, bytes.
    fetched: Vec<(usize, u32, Bytes)>,
}

impl CachedFileReader {
    pub(crate) fn new(
        view: View,
        file: Arc<TableFile>,
        from_origin: Count,
        from_memory: Count,
    ) -> Self {
        Self {
            view,
            file,
            from_origin,
            from_memory,
            fetched: vec![],
        }
    }

    /// Takes column chunks of a row group from memory, by the ordinals of their first leaves.
    pub(crate) fn with_fetched(mut self, row_group: usize, chunks: Vec<(u32, Bytes)>) -> Self {
        let chunks = chunks.into_iter();
        self.fetched
            .extend(chunks.map(|(leaf, bytes)| (row_group, leaf, bytes)));
        self
    }

    /// A chunk in the parquet form, from a neighbour or from shared memory.
    fn chunk(&self, row_group: usize, leaf: u32) -> Option<Bytes> {
        let fetched = self
            .fetched
            .iter()
            .find(|(group, first, _)| *group == row_group && *first == leaf);
        if let Some((_, _, bytes)) = fetched {
            return Some(bytes.clone());
        }
        let id = self.view.file_id(&self.file)?;
        let data_type = arrow::datatypes::DataType::Null;
        match self.view.chunk(id, row_group as u32, leaf, &data_type) {
            Ok(CachedChunk::Parquet(bytes)) => Some(bytes),
            Ok(_) | Err(_) => None,
        }
    }

    /// The bytes of `range` if they lie inside a chunk cached in the parquet form, or in the
    /// catalog.
    fn cached(&self, range: &Range<u64>) -> Option<Bytes> {
        if let Some(bytes) = self.file.extra(range.start, range.end) {
            return Some(bytes);
        }
        let metadata = self.file.metadata();
        for (row_group, group) in metadata.row_groups().iter().enumerate() {
            for root in self.file.roots() {
                let first = group.columns().get(root.first_leaf as usize)?;
                let last = group
                    .columns()
                    .get((root.first_leaf + root.leaves - 1) as usize)?;
                let (start, _) = first.byte_range();
                let (last_start, last_length) = last.byte_range();
                let end = last_start + last_length;
                if range.start < start || range.end > end {
                    continue;
                }
                let bytes = self.chunk(row_group, root.first_leaf)?;
                let (from, to) = ((range.start - start) as usize, (range.end - start) as usize);
                return (to <= bytes.len()).then(|| bytes.slice(from..to));
            }
        }
        None
    }
}

impl AsyncFileReader for CachedFileReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        self.get_byte_ranges(vec![range])
            .map(|parts| parts.map(|mut p| p.remove(0)))
            .boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, parquet::errors::Result<Vec<Bytes>>> {
        async move {
            let mut parts: Vec<Option<Bytes>> = ranges.iter().map(|r| self.cached(r)).collect();
            let missing: Vec<Range<u64>> = ranges
                .iter()
                .zip(&parts)
                .filter(|(_, part)| part.is_none())
                .map(|(range, _)| range.clone())
                .collect();
            let memory: usize = parts.iter().flatten().map(Bytes::len).sum();
            self.from_memory.add(memory);
            if !missing.is_empty() {
                self.from_origin
                    .add(missing.iter().map(|r| (r.end - r.start) as usize).sum());
                let reader = self.view.reader();
                let (identity, started) = (self.file.identity(), Instant::now());
                let mut read = reader
                    .origin()
                    .read(identity, &missing)
                    .await
                    .map_err(|error| ParquetError::External(Box::new(error)))?
                    .into_iter();
                if let Some(neighbours) = reader.neighbours() {
                    let bytes = missing.iter().map(|range| range.end - range.start).sum();
                    neighbours.origin_answered(&identity.store, bytes, started.elapsed());
                }
                for part in parts.iter_mut().filter(|part| part.is_none()) {
                    *part = read.next();
                }
            }
            // The origin answers range by range, so nothing is left out here.
            Ok(parts.into_iter().flatten().collect())
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        let metadata = Arc::clone(self.file.metadata());
        async move { Ok(metadata) }.boxed()
    }
}
