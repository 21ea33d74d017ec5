//! Page indexes and Bloom filters beside a footer: a scan does without those that cannot be
//! believed.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use parquet::DecodeResult;
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    ColumnChunkMetaData, PageIndexPolicy, ParquetMetaData, ParquetMetaDataPushDecoder,
};
use stoa_origin::{ObjectIdentity, Origin};

use crate::belief::believable;
use crate::footer::{FOOTER_BYTES_MAX, FOOTER_TAIL_BYTES, Rejection, guarded};
use crate::thrift;

/// Bytes of Bloom filters that are kept of one file; the rest is read when it is used.
const BLOOM_BYTES_MAX: u64 = 16 << 20;
/// A Bloom filter's header, as parquet-rs estimates it too.
pub(crate) const BLOOM_HEADER_BYTES: u64 = 20;

/// Ranges of the page indexes of a chunk, as far as they are given and within the file.
fn index_ranges(chunk: &ColumnChunkMetaData, data_end: u64) -> [Option<Option<Range<u64>>>; 2] {
    let range = |offset: Option<i64>, length: Option<i32>| match (offset, length) {
        (None, None) => None,
        (Some(offset), Some(length)) => Some(within(offset, length.into(), data_end)),
        _ => Some(None),
    };
    [
        range(chunk.column_index_offset(), chunk.column_index_length()),
        range(chunk.offset_index_offset(), chunk.offset_index_length()),
    ]
}

fn within(offset: i64, length: i64, end: u64) -> Option<Range<u64>> {
    let start = u64::try_from(offset).ok()?;
    let range = start..start.checked_add(u64::try_from(length).ok()?)?;
    (range.end <= end).then_some(range)
}

/// The one range that holds all page indexes; `None` if there are none, or none to be believed.
pub(crate) fn index_range(metadata: &ParquetMetaData, data_end: u64) -> Option<Range<u64>> {
    let mut whole: Option<Range<u64>> = None;
    for chunk in metadata
        .row_groups()
        .iter()
        .flat_map(|group| group.columns())
    {
        for range in index_ranges(chunk, data_end).into_iter().flatten() {
            let range = range?;
            whole = Some(match whole {
                Some(whole) => whole.start.min(range.start)..whole.end.max(range.end),
                None => range,
            });
        }
    }
    whole.filter(|range| !range.is_empty() && range.end - range.start <= FOOTER_BYTES_MAX)
}

/// The metadata with its page indexes, as far as they are [believable]; `None` if there are none, or
/// none to be believed.
///
/// `index` is the range that [`index_range`] found before `data_end`, where the file's data ends, and
/// its bytes.
pub(crate) fn with_page_index(
    metadata: ParquetMetaData,
    index: Option<(Range<u64>, Bytes)>,
    data_end: u64,
) -> Option<ParquetMetaData> {
    let (range, bytes) = index?;
    let chunks = metadata
        .row_groups()
        .iter()
        .flat_map(|group| group.columns());
    let mut ranges = chunks
        .flat_map(|chunk| index_ranges(chunk, data_end))
        .flatten()
        .flatten();
    let walked = ranges.try_for_each(|one| {
        let (start, end) = (one.start - range.start, one.end - range.start);
        thrift::check_struct(&bytes[start as usize..end as usize])
    });
    let decoded = walked.map_err(Rejection::Corrupt).and_then(|()| {
        guarded(|| {
            let size = data_end + FOOTER_TAIL_BYTES;
            let mut decoder = ParquetMetaDataPushDecoder::try_new_with_metadata(size, metadata)?
                .with_page_index_policy(PageIndexPolicy::Optional);
            decoder.push_range(range, bytes)?;
            match decoder.try_decode()? {
                DecodeResult::Data(metadata) if pages_lie_within(&metadata, data_end) => {
                    Ok(believable(metadata))
                }
                _ => Err(ParquetError::General(
                    "page index does not fit its file".into(),
                )),
            }
        })
    });
    decoded
        .inspect_err(|reason| tracing::warn!(%reason, "page index is left out"))
        .ok()
}

/// Whether every page that the indexes name lies in the file and in its row group.
fn pages_lie_within(metadata: &ParquetMetaData, data_end: u64) -> bool {
    let Some(index) = metadata.offset_index() else {
        return true;
    };
    index.len() == metadata.num_row_groups()
        && index
            .iter()
            .zip(metadata.row_groups())
            .all(|(columns, group)| {
                columns.iter().all(|column| {
                    let mut least = 0;
                    column.page_locations().iter().all(|page| {
                        let row = page.first_row_index;
                        let ordered = (least..=group.num_rows()).contains(&row);
                        least = row;
                        ordered
                            && within(page.offset, page.compressed_page_size.into(), data_end)
                                .is_some()
                    })
                })
            })
}

/// The metadata without page indexes, and without their offsets: nobody is to look for them.
pub(crate) fn without_page_index(metadata: ParquetMetaData) -> ParquetMetaData {
    let builder = metadata.into_builder();
    let builder = builder.set_column_index(None).set_offset_index(None);
    with_chunks(builder.build(), |chunk| {
        let chunk = chunk
            .into_builder()
            .set_column_index_offset(None)
            .set_column_index_length(None)
            .set_offset_index_offset(None)
            .set_offset_index_length(None);
        let built = chunk.build();
        built.expect("a chunk without optional fields is a chunk")
    })
}

/// The metadata with each of its chunks changed.
pub(crate) fn with_chunks(
    metadata: ParquetMetaData,
    change: impl Fn(ColumnChunkMetaData) -> ColumnChunkMetaData,
) -> ParquetMetaData {
    let mut builder = metadata.into_builder();
    let groups = builder.take_row_groups().into_iter();
    let changed = groups.map(|group| {
        let mut group = group.into_builder();
        let columns = group.take_columns().into_iter().map(&change).collect();
        let group = group.set_column_metadata(columns);
        group.build().expect("as many columns as before")
    });
    let changed = changed.collect();
    builder.set_row_groups(changed).build()
}

/// Ranges of Bloom filters, and starts of those of unknown length, up to the bound.
pub(crate) fn bloom_ranges(
    metadata: &ParquetMetaData,
    data_end: u64,
) -> (Vec<Range<u64>>, Vec<u64>) {
    let (mut ranges, mut starts) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    let mut total = 0;
    for chunk in metadata
        .row_groups()
        .iter()
        .flat_map(|group| group.columns())
    {
        let Some(offset) = chunk.bloom_filter_offset() else {
            continue;
        };
        let length = chunk.bloom_filter_length();
        let Some(range) = within(offset, length.unwrap_or(1).into(), data_end) else {
            continue;
        };
        let bytes = range.end - range.start;
        if range.is_empty() || total + bytes > BLOOM_BYTES_MAX || !seen.insert(range.start) {
            continue;
        }
        total += bytes;
        match length {
            Some(_) => ranges.push(range),
            None => starts.push(range.start),
        }
    }
    (ranges, starts)
}

/// Bloom filters of older writers, whose footers do not say how long they are.
pub(crate) async fn read_unsized_blooms(
    origin: &Origin,
    object: &ObjectIdentity,
    starts: &[u64],
    headers: &[Bytes],
    data_end: u64,
) -> Result<Vec<(u64, Bytes)>, stoa_origin::Error> {
    let mut total = 0;
    let ranges: Vec<Range<u64>> = starts
        .iter()
        .zip(headers)
        .filter_map(|(&start, header)| {
            let bytes = thrift::bloom_filter_bytes(header).ok()?;
            let end = start.checked_add(BLOOM_HEADER_BYTES)?.checked_add(bytes)?;
            total += bytes;
            (total <= BLOOM_BYTES_MAX).then_some(start..end.min(data_end))
        })
        .collect();
    let bodies = origin.read(object, &ranges).await?;
    let copies = bodies.iter().map(|body| Bytes::copy_from_slice(body));
    Ok(ranges.iter().map(|range| range.start).zip(copies).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_before_they_are_added_up() {
        assert_eq!(within(4, 6, 10), Some(4..10));
        assert_eq!(within(4, 7, 10), None);
        assert_eq!(within(-1, 7, 10), None);
        assert_eq!(within(1, -7, 10), None);
        assert_eq!(
            within(i64::MAX, i64::MAX, u64::MAX),
            Some(i64::MAX as u64..u64::MAX - 1)
        );
    }
}
