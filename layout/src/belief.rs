//! What a footer says of values, as far as it can be believed.
//!
//! Readers skip row groups and pages by these claims, and answer `min`, `max` and `count` from
//! them, so that one that is wrong loses rows. Here those are taken out that writers are known to
//! get wrong, or that say nothing about the order in which a query compares:
//!
//! - bounds of floating-point numbers: writers leave NaNs out of them, and a query does not;
//! - the deprecated bounds, and bounds in a file that names no order, of everything that is not
//!   compared as a signed integer: text, binaries, unsigned integers, decimals as bytes;
//! - bounds of types without an order, and bounds of which the least is above the largest;
//! - all claims about a chunk that may have nulls of which nobody says how many: readers take that
//!   for none;
//! - Bloom filters of floating-point numbers: zeros of both signs are equal, but not to a filter;
//! - dictionary pages that start within the file's magic or behind the first data page: old writers
//!   said so of chunks without one, and a reader would take other bytes for the chunk's.
//!
//! What is left out costs reads, never rows. Nothing here looks at values: a claim that is merely
//! untrue stays. What was once decoded knows better, see the chunk's own statistics.

use std::cmp::Ordering;

use parquet::basic::{ColumnOrder, ConvertedType, LogicalType, SortOrder, Type as PhysicalType};
use parquet::file::metadata::{ColumnChunkMetaData, FileMetaData, ParquetMetaData};
use parquet::file::page_index::column_index::ColumnIndexMetaData;
use parquet::file::statistics::{Statistics, ValueStatistics};
use parquet::schema::types::ColumnDescriptor;

/// What a file starts with, before any page.
const MAGIC_BYTES: i64 = 4;

/// The metadata without what cannot be believed. What is believed once is believed again.
pub(crate) fn believable(metadata: ParquetMetaData) -> ParquetMetaData {
    let file = metadata.file_metadata();
    let none_is_zero = leaves_out_zero_nulls(file.created_by());
    let leaves: Vec<Leaf> = (0..file.schema_descr().num_columns())
        .map(|leaf| Leaf::of(file, leaf))
        .collect();
    let mut builder = metadata.into_builder();
    let mut groups = builder.take_row_groups();
    let mut pages = builder.take_column_index();
    for (number, group) in groups.iter_mut().enumerate() {
        let mut index = pages.as_mut().and_then(|pages| pages.get_mut(number));
        for (place, (chunk, leaf)) in group.columns_mut().iter_mut().zip(&leaves).enumerate() {
            let index = index.as_mut().and_then(|columns| columns.get_mut(place));
            believe_chunk(chunk, leaf, none_is_zero, index);
        }
    }
    builder
        .set_row_groups(groups)
        .set_column_index(pages)
        .build()
}

/// The metadata without anything that it says of values: of a file of which one claim was found to
/// be untrue, none is worth more.
pub fn without_claims(metadata: &ParquetMetaData) -> ParquetMetaData {
    let mut builder = metadata.clone().into_builder().set_column_index(None);
    let mut groups = builder.take_row_groups();
    for chunk in groups.iter_mut().flat_map(|group| group.columns_mut()) {
        let bare = chunk.clone().into_builder();
        let bare = bare
            .clear_statistics()
            .set_column_index_offset(None)
            .set_column_index_length(None)
            .set_bloom_filter_offset(None)
            .set_bloom_filter_length(None);
        *chunk = bare
            .build()
            .expect("a chunk without optional fields is a chunk");
    }
    builder.set_row_groups(groups).build()
}

/// Takes out of a chunk's claims, and of its pages', what cannot be believed.
fn believe_chunk(
    chunk: &mut ColumnChunkMetaData,
    leaf: &Leaf,
    none_is_zero: bool,
    index: Option<&mut ColumnIndexMetaData>,
) {
    let verdict = chunk.statistics().map_or(Verdict::AsTheyAre, |said| {
        leaf.judge(said, chunk.num_values(), none_is_zero)
    });
    let no_pages = index.is_some_and(|index| {
        let doubted = !matches!(index, ColumnIndexMetaData::NONE) && !leaf.pages_hold(index);
        if doubted {
            *index = ColumnIndexMetaData::NONE;
        }
        doubted
    });
    let no_bloom = leaf.order == Order::Floats && chunk.bloom_filter_offset().is_some();
    let pages = MAGIC_BYTES..chunk.data_page_offset();
    let dictionary = chunk.dictionary_page_offset();
    let no_dictionary = dictionary.is_some_and(|start| !pages.contains(&start));
    if verdict == Verdict::AsTheyAre && !no_pages && !no_bloom && !no_dictionary {
        return;
    }
    let mut builder = chunk.clone().into_builder();
    builder = match verdict {
        Verdict::AsTheyAre => builder,
        Verdict::Nothing => builder.clear_statistics(),
        Verdict::Instead(statistics) => builder.set_statistics(statistics),
    };
    if no_pages {
        // Whoever finds an offset reads the index anew.
        builder = builder
            .set_column_index_offset(None)
            .set_column_index_length(None);
    }
    if no_dictionary {
        builder = builder.set_dictionary_page_offset(None);
    }
    if no_bloom {
        builder = builder
            .set_bloom_filter_offset(None)
            .set_bloom_filter_length(None);
    }
    *chunk = builder
        .build()
        .expect("a chunk without optional fields is a chunk");
}

/// What becomes of a chunk's statistics.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    AsTheyAre,
    Nothing,
    Instead(Statistics),
}

/// How values of a leaf are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// As the signed integers that they are stored as, or as booleans: what every writer did, under
    /// every name.
    Signed,
    /// As unsigned integers.
    Unsigned,
    /// As unsigned bytes, one after the other.
    Bytes,
    /// As signed integers of at most so many bytes, the most significant first.
    BigEndian(usize),
    /// As floating-point numbers, of which NaN is in no bound.
    Floats,
    /// Not at all.
    None,
}

/// What the schema says of a leaf.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    order: Order,
    /// Whether the file says that its bounds are in this order.
    is_named: bool,
    /// Whether it may have nulls.
    is_optional: bool,
}

impl Leaf {
    fn of(file: &FileMetaData, place: usize) -> Leaf {
        let column = file.schema_descr().column(place);
        let orders = file.column_orders();
        let named = orders.and_then(|orders| orders.get(place));
        Leaf {
            order: Order::of(&column),
            is_named: matches!(named, Some(ColumnOrder::TYPE_DEFINED_ORDER(_))),
            is_optional: column.max_def_level() > 0,
        }
    }

    /// Whether bounds mean anything, before they are compared with each other.
    fn is_ordered(&self) -> bool {
        match self.order {
            Order::Signed => true,
            Order::Unsigned | Order::Bytes | Order::BigEndian(_) => self.is_named,
            Order::Floats | Order::None => false,
        }
    }

    fn judge(&self, said: &Statistics, values: i64, none_is_zero: bool) -> Verdict {
        let zero = (!self.is_optional || none_is_zero).then_some(0);
        let values = u64::try_from(values).unwrap_or(0);
        let Some(nulls) = said.null_count_opt().or(zero).filter(|n| *n <= values) else {
            return Verdict::Nothing;
        };
        let has_bounds = said.min_bytes_opt().is_some() || said.max_bytes_opt().is_some();
        let current = self.order == Order::Signed || !said.is_min_max_deprecated();
        let hold = current && self.is_ordered() && nulls < values && self.order.allows(said);
        if said.null_count_opt() == Some(nulls) && (hold || !has_bounds) {
            return Verdict::AsTheyAre;
        }
        Verdict::Instead(with(said, nulls, hold))
    }

    fn pages_hold(&self, index: &ColumnIndexMetaData) -> bool {
        self.is_ordered() && self.order.allows_pages(index)
    }
}

impl Order {
    fn of(column: &ColumnDescriptor) -> Order {
        let (logical, converted) = (column.logical_type_ref(), column.converted_type());
        let sort = ColumnOrder::sort_order_for_type(logical, converted, column.physical_type());
        let is_decimal =
            matches!(logical, Some(LogicalType::Decimal(_))) || converted == ConvertedType::DECIMAL;
        match (column.physical_type(), sort) {
            (PhysicalType::BOOLEAN, _) => Order::Signed,
            (PhysicalType::INT32 | PhysicalType::INT64, SortOrder::SIGNED) => Order::Signed,
            (PhysicalType::INT32 | PhysicalType::INT64, SortOrder::UNSIGNED) => Order::Unsigned,
            (PhysicalType::FLOAT | PhysicalType::DOUBLE, _) => Order::Floats,
            (PhysicalType::BYTE_ARRAY | PhysicalType::FIXED_LEN_BYTE_ARRAY, sort) => {
                match (logical, sort) {
                    (Some(LogicalType::Float16), _) => Order::Floats,
                    (_, SortOrder::SIGNED) if is_decimal => {
                        // Arrow's decimals of 128 and 256 bits.
                        let is_wide = column.type_precision() > 38;
                        Order::BigEndian(if is_wide { 32 } else { 16 })
                    }
                    (_, SortOrder::UNSIGNED) => Order::Bytes,
                    _ => Order::None,
                }
            }
            _ => Order::None,
        }
    }

    /// Whether these can be the bounds of anything.
    fn allows(self, said: &Statistics) -> bool {
        match said {
            Statistics::Int32(said) => self.integers(said.min_opt(), said.max_opt(), |v| *v as u32),
            Statistics::Int64(said) => self.integers(said.min_opt(), said.max_opt(), |v| *v as u64),
            Statistics::Boolean(said) => is_ascending(said.min_opt(), said.max_opt()),
            Statistics::ByteArray(_) | Statistics::FixedLenByteArray(_) => {
                self.bytes(said.min_bytes_opt(), said.max_bytes_opt())
            }
            Statistics::Float(_) | Statistics::Double(_) | Statistics::Int96(_) => false,
        }
    }

    fn integers<T: Ord, U: Ord>(
        self,
        min: Option<&T>,
        max: Option<&T>,
        unsigned: impl Fn(&T) -> U,
    ) -> bool {
        match self {
            Order::Unsigned => is_ascending(min.map(&unsigned), max.map(&unsigned)),
            _ => is_ascending(min, max),
        }
    }

    fn bytes(self, min: Option<&[u8]>, max: Option<&[u8]>) -> bool {
        match self {
            Order::BigEndian(most) => {
                let fits = |bound: &[u8]| (1..=most).contains(&bound.len());
                [min, max].into_iter().flatten().all(fits)
                    && min
                        .zip(max)
                        .is_none_or(|(min, max)| big_endian(min, max) != Ordering::Greater)
            }
            _ => is_ascending(min, max),
        }
    }

    /// Whether these can be the bounds of pages.
    fn allows_pages(self, index: &ColumnIndexMetaData) -> bool {
        match index {
            ColumnIndexMetaData::NONE => true,
            ColumnIndexMetaData::BOOLEAN(index) => {
                let mut pages = index.min_values_iter().zip(index.max_values_iter());
                pages.all(|(min, max)| is_ascending(min, max))
            }
            ColumnIndexMetaData::INT32(index) => {
                let mut pages = index.min_values_iter().zip(index.max_values_iter());
                pages.all(|(min, max)| self.integers(min, max, |v| *v as u32))
            }
            ColumnIndexMetaData::INT64(index) => {
                let mut pages = index.min_values_iter().zip(index.max_values_iter());
                pages.all(|(min, max)| self.integers(min, max, |v| *v as u64))
            }
            ColumnIndexMetaData::BYTE_ARRAY(index)
            | ColumnIndexMetaData::FIXED_LEN_BYTE_ARRAY(index) => {
                let mut pages = index.min_values_iter().zip(index.max_values_iter());
                pages.all(|(min, max)| self.bytes(min, max))
            }
            ColumnIndexMetaData::INT96(_)
            | ColumnIndexMetaData::FLOAT(_)
            | ColumnIndexMetaData::DOUBLE(_) => false,
        }
    }
}

/// Whether a minimum is not above a maximum, where both are known.
fn is_ascending<T: Ord>(min: Option<T>, max: Option<T>) -> bool {
    min.zip(max).is_none_or(|(min, max)| min <= max)
}

/// Compares two's complement integers of any length, the most significant byte first.
fn big_endian(a: &[u8], b: &[u8]) -> Ordering {
    let fill = |bytes: &[u8]| match bytes.first() {
        Some(first) if first & 0x80 != 0 => 0xff,
        _ => 0,
    };
    let (fill_a, fill_b) = (fill(a), fill(b));
    if fill_a != fill_b {
        // The negative one is the smaller.
        return fill_b.cmp(&fill_a);
    }
    let length = a.len().max(b.len());
    let long = |bytes: &[u8]| -> Vec<u8> {
        let mut long = vec![fill(bytes); length - bytes.len()];
        long.extend_from_slice(bytes);
        long
    };
    long(a).cmp(&long(b))
}

/// The statistics with that many nulls, and with their bounds if those `hold`.
fn with(said: &Statistics, nulls: u64, hold: bool) -> Statistics {
    let is_deprecated = hold && said.is_min_max_deprecated();
    macro_rules! with {
        ($($kind:ident)*) => {
            match said {
                $(Statistics::$kind(of) => {
                    Statistics::$kind(of_value(of, nulls, hold, is_deprecated))
                })*
            }
        };
    }
    with!(Boolean Int32 Int64 Int96 Float Double ByteArray FixedLenByteArray)
}

fn of_value<T: Clone>(
    said: &ValueStatistics<T>,
    nulls: u64,
    hold: bool,
    is_deprecated: bool,
) -> ValueStatistics<T> {
    let bound = |bound: Option<&T>| bound.filter(|_| hold).cloned();
    let (min, max) = (bound(said.min_opt()), bound(said.max_opt()));
    ValueStatistics::new(min, max, said.distinct_count(), Some(nulls), is_deprecated)
        .with_backwards_compatible_min_max(hold && said.is_min_max_backwards_compatible())
        .with_min_is_exact(hold && said.min_is_exact())
        .with_max_is_exact(hold && said.max_is_exact())
}

/// Whether a file's writer says nothing of nulls where there are none: parquet-rs before 53.1.0,
/// which DataFusion before 42.1.0 wrote with.
fn leaves_out_zero_nulls(created_by: Option<&str>) -> bool {
    let version = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.split(['.', ' ', '-']);
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    let before = |prefix: &str, fixed: (u32, u32)| {
        let rest = created_by.and_then(|by| by.strip_prefix(prefix));
        rest.and_then(version).is_some_and(|found| found < fixed)
    };
    before("parquet-rs version ", (53, 1)) || before("datafusion version ", (42, 1))
}

#[cfg(test)]
#[path = "belief_tests.rs"]
mod tests;
