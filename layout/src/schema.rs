//! Schemas: one of many files, and the one a worker decodes to.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Fields, Schema, SchemaRef, TimeUnit};
use parquet::file::statistics::Statistics;

use crate::catalog::{CatalogFile, RootColumn};
use crate::error::{Error, Result};

/// The Arrow schema that a worker decodes a file to: strings and binaries at the top level become
/// views, everything else stays as it is in the file.
pub fn decoded_schema(file_schema: &Schema) -> SchemaRef {
    let fields: Fields = file_schema
        .fields()
        .iter()
        .map(|field| match decoded_type(field.data_type()) {
            Some(data_type) => Arc::new(field.as_ref().clone().with_data_type(data_type)),
            None => field.clone(),
        })
        .collect();
    Arc::new(Schema::new_with_metadata(
        fields,
        file_schema.metadata().clone(),
    ))
}

/// The view type of a string or binary type.
fn decoded_type(data_type: &DataType) -> Option<DataType> {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 => Some(DataType::Utf8View),
        DataType::Binary | DataType::LargeBinary => Some(DataType::BinaryView),
        _ => None,
    }
}

/// Whether chunks of this root column can take [`Form::Arrow`](crate::Form::Arrow).
///
/// INT96 cannot, because what it decodes to depends on the session. Dictionaries, run-end encoded
/// values, unions, list views and views within nested values cannot, because the form has no
/// layout for them.
pub fn allows_arrow(root: &RootColumn) -> bool {
    !root.int96 && has_arrow_form(root.field.data_type(), true)
}

fn has_arrow_form(data_type: &DataType, top: bool) -> bool {
    use DataType::*;
    match data_type {
        Utf8View | BinaryView => top,
        List(field) | LargeList(field) | FixedSizeList(field, _) | Map(field, _) => {
            has_arrow_form(field.data_type(), false)
        }
        Struct(fields) => fields
            .iter()
            .all(|field| has_arrow_form(field.data_type(), false)),
        Dictionary(_, _) | RunEndEncoded(_, _) | Union(_, _) | ListView(_) | LargeListView(_) => {
            false
        }
        _ => true,
    }
}

/// The schema without the metadata of itself and its columns, which differs between writers and
/// which DataFusion drops as well.
pub(crate) fn without_metadata(schema: Schema) -> Schema {
    let fields: Fields = schema
        .fields()
        .iter()
        .map(|field| match field.metadata().is_empty() {
            true => field.clone(),
            false => Arc::new(field.as_ref().clone().with_metadata(Default::default())),
        })
        .collect();
    Schema::new(fields)
}

/// The schema that all files can be read as: their columns in the order they appear, nullable if a
/// file lacks them, of a type that holds every file's values. Of columns of one name in a file it
/// has the first, which is the one that a name leads to.
pub(crate) fn merged(files: &[CatalogFile]) -> Result<SchemaRef> {
    let Some((first, rest)) = files.split_first() else {
        return Ok(Arc::new(Schema::empty()));
    };
    let mut merged: Vec<FieldRef> = named(first);
    let mut previous = &first.schema;
    for file in rest {
        // Most tables have one schema, and its files share it.
        if !Arc::ptr_eq(previous, &file.schema) {
            merged =
                merge_fields(&merged, &named(file), "").map_err(|conflict| Error::ColumnTypes {
                    column: conflict.column,
                    url: file.identity.url(),
                    found: conflict.found.to_string(),
                    expected: conflict.expected.to_string(),
                })?;
            previous = &file.schema;
        }
    }
    check_times(files, &merged)?;
    Ok(Arc::new(Schema::new(merged)))
}

/// The columns of a file that a name leads to.
fn named(file: &CatalogFile) -> Vec<FieldRef> {
    let roots = file.roots.iter().filter(|root| !root.shadowed);
    roots.map(|root| root.field.clone()).collect()
}

/// Refuses files whose footers say that a value does not fit into the finer unit of time that
/// another file of the table has.
///
/// Where a footer says nothing, a query of such a value fails; none is ever changed.
fn check_times(files: &[CatalogFile], merged: &[FieldRef]) -> Result<()> {
    // Columns of a file with the table's type, and by how much their values grow in it.
    type Finer = Vec<(RootColumn, DataType, i64)>;
    let finer = |file: &CatalogFile| -> Finer {
        let is_time = |root: &&RootColumn| {
            let data_type = root.field.data_type();
            matches!(data_type, DataType::Timestamp(..) | DataType::Duration(_))
        };
        let roots = file.roots.iter().filter(|root| !root.shadowed);
        let factors = roots.filter(is_time).filter_map(|root| {
            let known = merged.iter().find(|field| field.name() == root.name())?;
            let factor = finer_by(root.field.data_type(), known.data_type())?;
            Some((root.clone(), known.data_type().clone(), factor))
        });
        factors.collect()
    };
    let mut previous: Option<(&SchemaRef, Finer)> = None;
    for file in files {
        let columns = match previous.take() {
            Some((schema, columns)) if Arc::ptr_eq(schema, &file.schema) => columns,
            _ => finer(file),
        };
        for (root, expected, factor) in &columns {
            for group in file.metadata.row_groups() {
                let bounds = group.column(root.first_leaf as usize).statistics();
                let Some(Statistics::Int64(bounds)) = bounds else {
                    continue;
                };
                let mut bounds = [bounds.min_opt(), bounds.max_opt()].into_iter().flatten();
                if let Some(value) = bounds.find(|value| value.checked_mul(*factor).is_none()) {
                    return Err(Error::TimeRange {
                        column: root.name().to_owned(),
                        url: file.identity.url(),
                        found: root.field.data_type().to_string(),
                        expected: expected.to_string(),
                        value: *value,
                    });
                }
            }
        }
        previous = Some((&file.schema, columns));
    }
    Ok(())
}

/// By how much values of the one type of time grow when they become the other's, where they may
/// grow out of 64 bits.
fn finer_by(file: &DataType, table: &DataType) -> Option<i64> {
    use DataType::{Duration, Timestamp};
    let (from, to) = match (file, table) {
        (Timestamp(from, _), Timestamp(to, _)) | (Duration(from), Duration(to)) => (from, to),
        _ => return None,
    };
    let (from, to) = (per_second(from), per_second(to));
    (to > from).then_some(to / from)
}

fn per_second(unit: &TimeUnit) -> i64 {
    match unit {
        TimeUnit::Second => 1,
        TimeUnit::Millisecond => 1_000,
        TimeUnit::Microsecond => 1_000_000,
        TimeUnit::Nanosecond => 1_000_000_000,
    }
}

struct Conflict {
    column: String,
    expected: DataType,
    found: DataType,
}

/// Merges the fields of two structs by name.
fn merge_fields(
    known: &[FieldRef],
    new: &[FieldRef],
    parent: &str,
) -> Result<Vec<FieldRef>, Conflict> {
    let mut merged: Vec<FieldRef> = Vec::with_capacity(known.len().max(new.len()));
    for field in known {
        merged.push(
            match new.iter().find(|other| other.name() == field.name()) {
                Some(other) => merge_field(field, other, parent)?,
                None => nullable(field),
            },
        );
    }
    for field in new {
        if !known.iter().any(|other| other.name() == field.name()) {
            merged.push(nullable(field));
        }
    }
    Ok(merged)
}

fn nullable(field: &FieldRef) -> FieldRef {
    match field.is_nullable() {
        true => field.clone(),
        false => Arc::new(field.as_ref().clone().with_nullable(true)),
    }
}

fn merge_field(known: &FieldRef, new: &FieldRef, parent: &str) -> Result<FieldRef, Conflict> {
    let column = match parent {
        "" => known.name().clone(),
        parent => format!("{parent}.{}", known.name()),
    };
    let data_type = merge_types(known.data_type(), new.data_type(), &column)?;
    let is_nullable = known.is_nullable() || new.is_nullable();
    if data_type == *known.data_type() && is_nullable == known.is_nullable() {
        return Ok(known.clone());
    }
    let field = known.as_ref().clone();
    Ok(Arc::new(
        field.with_data_type(data_type).with_nullable(is_nullable),
    ))
}

fn merge_types(known: &DataType, new: &DataType, column: &str) -> Result<DataType, Conflict> {
    use DataType::*;
    if known == new {
        return Ok(known.clone());
    }
    let child = |a: &FieldRef, b: &FieldRef| -> Result<FieldRef, Conflict> {
        // Writers name the element of a list differently; the name says nothing.
        let b: FieldRef = Arc::new(Field::clone(b).with_name(a.name()));
        merge_field(a, &b, column)
    };
    Ok(match (known, new) {
        (Struct(a), Struct(b)) => Struct(merge_fields(a, b, column)?.into()),
        (List(a), List(b)) => List(child(a, b)?),
        (List(a) | LargeList(a), List(b) | LargeList(b)) => LargeList(child(a, b)?),
        (FixedSizeList(a, n), FixedSizeList(b, m)) if n == m => FixedSizeList(child(a, b)?, *n),
        (Map(a, sorted), Map(b, other)) => Map(merge_entries(a, b, column)?, *sorted && *other),
        _ => widest(known, new).ok_or_else(|| Conflict {
            column: column.to_owned(),
            expected: known.clone(),
            found: new.clone(),
        })?,
    })
}

/// Merges the entries of two maps by place: writers name keys and values differently, and the names
/// say nothing.
fn merge_entries(known: &FieldRef, new: &FieldRef, column: &str) -> Result<FieldRef, Conflict> {
    let (DataType::Struct(parts), DataType::Struct(others)) = (known.data_type(), new.data_type())
    else {
        return merge_field(known, new, column);
    };
    let others = parts
        .iter()
        .zip(others)
        .map(|(part, other)| Arc::new(Field::clone(other).with_name(part.name())) as FieldRef);
    let others = DataType::Struct(others.collect());
    let other = Field::clone(new).with_name(known.name());
    merge_field(known, &Arc::new(other.with_data_type(others)), column)
}

/// The smallest type that holds every value of both, if there is one and nothing is lost.
fn widest(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::*;
    if a == b {
        return Some(a.clone());
    }
    match (a, b) {
        (Null, other) | (other, Null) => Some(other.clone()),
        (Utf8 | LargeUtf8, Utf8 | LargeUtf8) => Some(LargeUtf8),
        (Utf8 | LargeUtf8 | Utf8View, Utf8 | LargeUtf8 | Utf8View) => Some(Utf8View),
        (Binary | LargeBinary, Binary | LargeBinary) => Some(LargeBinary),
        (Binary | LargeBinary | BinaryView, Binary | LargeBinary | BinaryView) => Some(BinaryView),
        (Dictionary(key, value), Dictionary(other_key, other_value)) => {
            let key = widest(key, other_key)?;
            Some(Dictionary(
                Box::new(key),
                Box::new(widest(value, other_value)?),
            ))
        }
        (Dictionary(_, value), other) | (other, Dictionary(_, value)) => widest(value, other),
        _ => widest_decimal(a, b)
            .or_else(|| widest_number(a, b))
            .or_else(|| widest_time(a, b)),
    }
}

/// The type with the finer unit. What has a time zone and what has none are different things.
fn widest_time(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::{Duration, Time32, Time64, Timestamp};
    let finer = |a: &TimeUnit, b: &TimeUnit| match per_second(a) > per_second(b) {
        true => *a,
        false => *b,
    };
    match (a, b) {
        (Timestamp(unit, zone), Timestamp(other_unit, other_zone)) if zone == other_zone => {
            Some(Timestamp(finer(unit, other_unit), zone.clone()))
        }
        (Duration(unit), Duration(other)) => Some(Duration(finer(unit, other))),
        (Time32(unit) | Time64(unit), Time32(other) | Time64(other)) => {
            Some(match finer(unit, other) {
                unit @ (TimeUnit::Second | TimeUnit::Millisecond) => Time32(unit),
                unit => Time64(unit),
            })
        }
        _ => None,
    }
}

/// Bits and signedness of an integer type.
fn integer(data_type: &DataType) -> Option<(u32, bool)> {
    use DataType::*;
    Some(match data_type {
        Int8 => (8, true),
        Int16 => (16, true),
        Int32 => (32, true),
        Int64 => (64, true),
        UInt8 => (8, false),
        UInt16 => (16, false),
        UInt32 => (32, false),
        UInt64 => (64, false),
        _ => return None,
    })
}

/// Bits of a float type, and the bits of the largest integers it holds exactly.
fn float(data_type: &DataType) -> Option<(u32, u32)> {
    match data_type {
        DataType::Float16 => Some((16, 8)),
        DataType::Float32 => Some((32, 16)),
        DataType::Float64 => Some((64, 32)),
        _ => None,
    }
}

fn widest_number(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::*;
    match (integer(a), integer(b), float(a), float(b)) {
        (Some((bits, signed)), Some((other_bits, other_signed)), _, _) => {
            let (bits, signed) = match (signed, other_signed) {
                (true, false) => (bits.max(other_bits * 2), true),
                (false, true) => (other_bits.max(bits * 2), true),
                _ => (bits.max(other_bits), signed),
            };
            Some(match (bits, signed) {
                (16, true) => Int16,
                (32, true) => Int32,
                (64, true) => Int64,
                (16, false) => UInt16,
                (32, false) => UInt32,
                (64, false) => UInt64,
                _ => return None,
            })
        }
        (_, _, Some((bits, _)), Some((other_bits, _))) => Some(if bits.max(other_bits) == 64 {
            Float64
        } else {
            Float32
        }),
        (Some((integer_bits, _)), _, _, Some((float_bits, _)))
        | (_, Some((integer_bits, _)), Some((float_bits, _)), _) => {
            [Float16, Float32, Float64].into_iter().find(|candidate| {
                float(candidate)
                    .is_some_and(|(bits, exact)| bits >= float_bits && exact >= integer_bits)
            })
        }
        _ => None,
    }
}

fn widest_decimal(a: &DataType, b: &DataType) -> Option<DataType> {
    use DataType::*;
    /// Bits, precision and scale.
    fn decimal(data_type: &DataType) -> Option<(u32, u8, i8)> {
        Some(match *data_type {
            Decimal32(precision, scale) => (32, precision, scale),
            Decimal64(precision, scale) => (64, precision, scale),
            Decimal128(precision, scale) => (128, precision, scale),
            Decimal256(precision, scale) => (256, precision, scale),
            _ => return None,
        })
    }
    let ((bits_a, precision_a, scale_a), (bits_b, precision_b, scale_b)) =
        (decimal(a)?, decimal(b)?);
    let scale = scale_a.max(scale_b);
    let whole = |precision: u8, scale: i8| i32::from(precision) - i32::from(scale);
    let digits = whole(precision_a, scale_a).max(whole(precision_b, scale_b)) + i32::from(scale);
    let precision = u8::try_from(digits).ok()?;
    let least = match precision {
        0..=9 => 32,
        10..=18 => 64,
        19..=38 => 128,
        39..=76 => 256,
        _ => return None,
    };
    Some(match bits_a.max(bits_b).max(least) {
        32 => Decimal32(precision, scale),
        64 => Decimal64(precision, scale),
        128 => Decimal128(precision, scale),
        _ => Decimal256(precision, scale),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use DataType::*;
    use TimeUnit::*;

    fn boxed(data_type: DataType) -> Box<DataType> {
        Box::new(data_type)
    }

    #[test]
    fn types_widen_without_loss_or_not_at_all() {
        let utc: Option<Arc<str>> = Some("UTC".into());
        for (a, b, expected) in [
            (Int32, Int64, Some(Int64)),
            (Int8, UInt8, Some(Int16)),
            (UInt32, Int8, Some(Int64)),
            (UInt16, UInt64, Some(UInt64)),
            (UInt64, Int64, None),
            (Float32, Float64, Some(Float64)),
            (Int32, Float64, Some(Float64)),
            (Int32, Float32, Some(Float64)),
            (Int16, Float32, Some(Float32)),
            (Int64, Float64, None),
            (Utf8, LargeUtf8, Some(LargeUtf8)),
            (Utf8, Utf8View, Some(Utf8View)),
            (Utf8, Binary, None),
            (Null, Date32, Some(Date32)),
            (Date32, Int32, None),
            (
                Decimal128(10, 2),
                Decimal128(12, 2),
                Some(Decimal128(12, 2)),
            ),
            (
                Decimal128(10, 2),
                Decimal128(10, 4),
                Some(Decimal128(12, 4)),
            ),
            (
                Decimal128(38, 0),
                Decimal128(38, 10),
                Some(Decimal256(48, 10)),
            ),
            (Decimal256(76, 0), Decimal256(76, 76), None),
            (
                Timestamp(Millisecond, utc.clone()),
                Timestamp(Nanosecond, utc.clone()),
                Some(Timestamp(Nanosecond, utc.clone())),
            ),
            (
                Timestamp(Microsecond, utc.clone()),
                Timestamp(Microsecond, None),
                None,
            ),
            (Timestamp(Second, None), Int64, None),
            (Timestamp(Second, None), Date32, None),
            (
                Time32(Second),
                Time32(Millisecond),
                Some(Time32(Millisecond)),
            ),
            (
                Time32(Millisecond),
                Time64(Microsecond),
                Some(Time64(Microsecond)),
            ),
            (
                Duration(Second),
                Duration(Nanosecond),
                Some(Duration(Nanosecond)),
            ),
            (Dictionary(boxed(Int8), boxed(Utf8)), Utf8, Some(Utf8)),
            (
                Dictionary(boxed(Int8), boxed(Utf8)),
                Dictionary(boxed(Int32), boxed(Utf8)),
                Some(Dictionary(boxed(Int32), boxed(Utf8))),
            ),
        ] {
            assert_eq!(widest(&a, &b), expected, "{a} {b}");
            assert_eq!(widest(&b, &a), expected, "{b} {a}");
        }
    }

    #[test]
    fn nested_fields_merge_by_name() {
        let field = |name: &str, data_type: DataType| Arc::new(Field::new(name, data_type, false));
        let known = [field(
            "s",
            Struct(vec![field("a", Int32), field("gone", Utf8)].into()),
        )];
        let new = [field(
            "s",
            Struct(vec![field("new", Utf8), field("a", Int64)].into()),
        )];
        let merged = merge_fields(&known, &new, "").ok().unwrap();
        let Struct(children) = merged[0].data_type() else {
            panic!("{merged:?}")
        };
        let shown: Vec<String> = children
            .iter()
            .map(|f| format!("{} {} {}", f.name(), f.data_type(), f.is_nullable()))
            .collect();
        assert_eq!(shown, ["a Int64 false", "gone Utf8 true", "new Utf8 true"]);

        let list = |name: &str, data_type: DataType| [field("l", List(field(name, data_type)))];
        let merged = merge_fields(&list("item", Int32), &list("element", Int64), "")
            .ok()
            .unwrap();
        assert_eq!(*merged[0].data_type(), List(field("item", Int64)));
        let conflict = merge_fields(&list("item", Int32), &list("item", Utf8), "")
            .err()
            .unwrap();
        assert_eq!(conflict.column, "l.item");

        let map = |names: [&str; 3], value: DataType| {
            let [entries, key, value_name] = names;
            let parts = Struct(vec![field(key, Utf8), field(value_name, value)].into());
            [field("m", Map(field(entries, parts), false))]
        };
        let (java, rust) = (["key_value", "key", "value"], ["entries", "keys", "values"]);
        let merged = merge_fields(&map(java, Int32), &map(rust, Int64), "").ok();
        assert_eq!(merged.unwrap(), map(java, Int64));
        let conflict = merge_fields(&map(java, Int32), &map(rust, Utf8), "").err();
        assert_eq!(conflict.unwrap().column, "m.key_value.value");
    }

    #[test]
    fn top_level_strings_are_decoded_to_views() {
        let schema = Schema::new(vec![
            Field::new("a", Utf8, true),
            Field::new("b", LargeBinary, false),
            Field::new_list("c", Field::new_list_field(Utf8, true), true),
        ]);
        let decoded = decoded_schema(&schema);
        assert_eq!(*decoded.field(0).data_type(), Utf8View);
        assert_eq!(*decoded.field(1).data_type(), BinaryView);
        assert!(!decoded.field(1).is_nullable());
        assert_eq!(decoded.field(2), schema.field(2));
    }

    #[test]
    fn the_arrow_form_is_for_types_it_has_a_layout_for() {
        let root = |data_type: DataType, int96: bool| RootColumn {
            first_leaf: 0,
            leaves: 1,
            field: Arc::new(Field::new("c", data_type, true)),
            int96,
            shadowed: false,
        };
        let list = |data_type: DataType| List(Arc::new(Field::new("item", data_type, true)));
        assert!(allows_arrow(&root(Utf8View, false)));
        assert!(allows_arrow(&root(list(Utf8), false)));
        assert!(!allows_arrow(&root(list(Utf8View), false)));
        assert!(!allows_arrow(&root(
            Dictionary(boxed(Int32), boxed(Utf8)),
            false
        )));
        assert!(!allows_arrow(&root(Int64, true)));
    }
}
