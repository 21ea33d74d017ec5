//! Values of every type from small numbers: the same number is the same value in every file, so that
//! joins find partners and constants find rows.

use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::compute::cast;
use arrow::datatypes::*;
use arrow::error::ArrowError;

/// Floating-point numbers by their number: what comparisons get wrong first. The others are
/// multiples of a quarter and small, so that no order of addition loses a digit of a sum.
const FLOATS: [f64; 8] = [
    0.0,
    -0.0,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    1.0,
    -1.0,
    0.5,
];

/// Which floating-point numbers columns hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floats {
    /// Those too that are not equal to themselves, or equal to others: NaN, zeros of both signs; and
    /// infinities.
    All,
    /// Only those that compare as their bits do.
    Plain,
}

/// The types of columns that are made.
pub(super) fn types() -> Vec<DataType> {
    use DataType::*;
    let text = || Box::new(Utf8);
    vec![
        Boolean,
        Int8,
        Int16,
        Int32,
        Int64,
        UInt8,
        UInt16,
        UInt32,
        UInt64,
        Float32,
        Float64,
        Decimal128(7, 2),
        Decimal128(18, 4),
        Decimal128(30, 6),
        Decimal256(50, 3),
        Date32,
        Time64(TimeUnit::Microsecond),
        Timestamp(TimeUnit::Millisecond, None),
        Timestamp(TimeUnit::Microsecond, None),
        Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        Timestamp(TimeUnit::Nanosecond, None),
        Utf8,
        Utf8,
        LargeUtf8,
        Binary,
        FixedSizeBinary(3),
        Dictionary(Box::new(Int32), text()),
        List(Arc::new(Field::new_list_field(Int32, true))),
        List(Arc::new(Field::new_list_field(Utf8, true))),
        Struct(struct_fields()),
    ]
}

fn struct_fields() -> Fields {
    Fields::from(vec![
        Field::new("a", DataType::Int64, true),
        Field::new("b", DataType::Utf8, true),
    ])
}

/// A type that holds all values of this one, for a table whose files do not agree.
pub(super) fn wider(of: &DataType) -> Option<DataType> {
    match of {
        DataType::Int8 | DataType::Int16 => Some(DataType::Int32),
        DataType::Int32 => Some(DataType::Int64),
        DataType::Float32 => Some(DataType::Float64),
        DataType::UInt8 | DataType::UInt16 => Some(DataType::UInt32),
        _ => None,
    }
}

/// A column of these values; `None` is null.
///
/// # Errors
/// If Arrow cannot make the type, which would be a fault here.
pub(super) fn array(
    of: &DataType,
    numbers: &[Option<u64>],
    floats: Floats,
) -> Result<ArrayRef, ArrowError> {
    let each = || numbers.iter().copied();
    let array: ArrayRef = match of {
        DataType::Boolean => Arc::new(
            each()
                .map(|n| n.map(|n| n % 2 == 0))
                .collect::<BooleanArray>(),
        ),
        DataType::Float32 | DataType::Float64 => {
            let values = each()
                .map(|n| n.map(|n| float(n, floats)))
                .collect::<Float64Array>();
            cast(&values, of)?
        }
        DataType::Decimal128(precision, scale) => {
            let values = each().map(|n| n.map(|n| decimal(n, *precision)));
            let values = values.collect::<Decimal128Array>();
            Arc::new(values.with_precision_and_scale(*precision, *scale)?)
        }
        DataType::Decimal256(precision, scale) => {
            let values = each().map(|n| n.map(|n| i256::from_i128(decimal(n, 38))));
            let values = values.collect::<Decimal256Array>();
            Arc::new(values.with_precision_and_scale(*precision, *scale)?)
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Dictionary(_, _) => {
            let values = each().map(|n| n.map(text)).collect::<StringArray>();
            cast(&values, of)?
        }
        DataType::Binary => Arc::new(each().map(|n| n.map(bytes)).collect::<BinaryArray>()),
        DataType::FixedSizeBinary(size) => {
            let mut builder = FixedSizeBinaryBuilder::new(*size);
            for n in each() {
                match n {
                    Some(n) => builder.append_value(&n.to_be_bytes()[8 - *size as usize..])?,
                    None => builder.append_null(),
                }
            }
            Arc::new(builder.finish())
        }
        DataType::List(field) => {
            // As many elements as the number says, the last of them null now and then.
            let lengths = each().map(|n| n.map_or(0, |n| (n % 4) as usize));
            let elements = each()
                .flatten()
                .flat_map(|n| (0..n % 4).map(move |at| ((n + at) % 5 != 4).then_some(n + at)));
            let elements = array_of(field.data_type(), elements, floats)?;
            let nulls = NullBuffer::from(each().map(|n| n.is_some()).collect::<Vec<_>>());
            let offsets = OffsetBuffer::from_lengths(lengths);
            Arc::new(ListArray::try_new(
                Arc::clone(field),
                offsets,
                elements,
                Some(nulls),
            )?)
        }
        DataType::Struct(fields) => {
            let parts = fields.iter().enumerate().map(|(at, field)| {
                let part = each().map(|n| n.filter(|n| !(n + at as u64).is_multiple_of(6)));
                array_of(field.data_type(), part, floats)
            });
            let parts = parts.collect::<Result<Vec<_>, _>>()?;
            let nulls = NullBuffer::from(each().map(|n| n.is_some()).collect::<Vec<_>>());
            Arc::new(StructArray::try_new(fields.clone(), parts, Some(nulls))?)
        }
        _ => {
            let values = each().map(|n| n.map(|n| integer(of, n)));
            let values = values.collect::<PrimitiveArray<Decimal128Type>>();
            let values = values.with_precision_and_scale(38, 0)?;
            whole(of, &values)?
        }
    };
    Ok(array)
}

fn array_of(
    of: &DataType,
    numbers: impl Iterator<Item = Option<u64>>,
    floats: Floats,
) -> Result<ArrayRef, ArrowError> {
    array(of, &numbers.collect::<Vec<_>>(), floats)
}

/// Whole numbers as an integer, a date or a time.
fn whole(of: &DataType, values: &Decimal128Array) -> Result<ArrayRef, ArrowError> {
    match of {
        DataType::Date32 => cast(&cast(values, &DataType::Int32)?, of),
        DataType::Time64(_) | DataType::Timestamp(_, _) => {
            cast(&cast(values, &DataType::Int64)?, of)
        }
        _ => cast(values, of),
    }
}

fn float(n: u64, floats: Floats) -> f64 {
    match FLOATS.get(n as usize) {
        Some(special) if floats == Floats::All => *special,
        _ => (n as f64 - 20.0) * 0.25,
    }
}

fn decimal(n: u64, precision: u8) -> i128 {
    let largest = 10_i128.pow(u32::from(precision.min(30))) - 1;
    match n {
        0 => -largest,
        1 => largest,
        n => (i128::from(n) - 20) * 37,
    }
}

fn text(n: u64) -> String {
    match n % 6 {
        _ if n == 0 => String::new(),
        0 => format!("k{n}"),
        1 => format!("prefix-of-fourteen-{n}"),
        2 => format!("žluť{n}🐎"),
        3 => format!("{}{n}", "x".repeat((n % 50) as usize)),
        4 => format!("%_{n}"),
        _ => format!("K{n}"),
    }
}

fn bytes(n: u64) -> Vec<u8> {
    match n {
        0 => vec![],
        n => [
            &[0xff_u8, 0],
            &n.to_le_bytes()[..(n % 9) as usize],
            &n.to_be_bytes(),
        ]
        .concat(),
    }
}

/// The whole number of a type of integers, dates and times.
fn integer(of: &DataType, n: u64) -> i128 {
    let small = i128::from(n) - 20;
    let (least, largest): (i128, i128) = match of {
        DataType::Int8 => (i8::MIN.into(), i8::MAX.into()),
        DataType::Int16 => (i16::MIN.into(), i16::MAX.into()),
        DataType::Int32 => (i32::MIN.into(), i32::MAX.into()),
        DataType::Int64 => (i64::MIN.into(), i64::MAX.into()),
        DataType::UInt8 => (0, u8::MAX.into()),
        DataType::UInt16 => (0, u16::MAX.into()),
        DataType::UInt32 => (0, u32::MAX.into()),
        DataType::UInt64 => (0, u64::MAX.into()),
        DataType::Date32 => return if n == 0 { -100_000 } else { small * 13 },
        DataType::Time64(_) => return i128::from(n) * 86_399_999 % 86_400_000_000,
        DataType::Timestamp(unit, _) => {
            let a_second = match unit {
                TimeUnit::Second => 1,
                TimeUnit::Millisecond => 1_000,
                TimeUnit::Microsecond => 1_000_000,
                TimeUnit::Nanosecond => 1_000_000_000,
            };
            // Before 1970 too, and no whole seconds.
            return small * 40_000 * a_second + i128::from(n % 3);
        }
        _ => return small,
    };
    match n {
        0 => least,
        1 => largest,
        _ => small.clamp(least, largest),
    }
}

/// The value as a constant in SQL; `None` for types whose constants are not asked for.
pub(super) fn constant(of: &DataType, n: u64, plain: bool, floats: Floats) -> Option<String> {
    let of_type = |text: String| Some(format!("arrow_cast({text}, '{}')", type_name(of)));
    match of {
        DataType::Boolean => Some(n.is_multiple_of(2).to_string()),
        DataType::Float32 | DataType::Float64 => {
            let value = float(n, floats);
            if value.is_finite() && plain && !(value == 0.0 && value.is_sign_negative()) {
                return Some(format!("{value:?}"));
            }
            let name = match value {
                v if v.is_nan() => "NaN".to_owned(),
                v if v.is_infinite() => format!("{}Infinity", if v < 0.0 { "-" } else { "" }),
                v => format!("{v:?}"),
            };
            of_type(format!("'{name}'"))
        }
        DataType::Decimal128(precision, scale) => {
            let digits = decimal(n, *precision);
            of_type(format!("'{}'", decimal_text(digits, *scale)))
        }
        DataType::Decimal256(_, scale) => {
            of_type(format!("'{}'", decimal_text(decimal(n, 38), *scale)))
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(_, _) => {
            Some(format!("'{}'", text(n)))
        }
        DataType::Binary | DataType::BinaryView | DataType::LargeBinary => {
            let digits: String = bytes(n).iter().map(|byte| format!("{byte:02x}")).collect();
            Some(format!("X'{digits}'"))
        }
        DataType::FixedSizeBinary(size) => {
            let value = &n.to_be_bytes()[8 - *size as usize..];
            let digits: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            of_type(format!("X'{digits}'"))
        }
        DataType::Date32 => {
            let days = integer(of, n);
            Some(format!("arrow_cast(arrow_cast({days}, 'Int32'), 'Date32')"))
        }
        DataType::Time64(_) | DataType::Timestamp(_, _) => {
            let value = integer(of, n);
            of_type(format!("arrow_cast({value}, 'Int64')"))
        }
        _ if of.is_integer() => {
            let value = integer(of, n);
            if plain && (n > 1 || *of != DataType::Int64) {
                Some(value.to_string())
            } else {
                of_type(format!("'{value}'"))
            }
        }
        _ => None,
    }
}

fn decimal_text(digits: i128, scale: i8) -> String {
    let unit = 10_i128.pow(u32::from(scale.unsigned_abs()));
    let sign = if digits < 0 { "-" } else { "" };
    let digits = digits.abs();
    let width = usize::from(scale.unsigned_abs());
    format!("{sign}{}.{:0width$}", digits / unit, digits % unit)
}

fn type_name(of: &DataType) -> String {
    let unit = |unit: &TimeUnit| match unit {
        TimeUnit::Second => "Second",
        TimeUnit::Millisecond => "Millisecond",
        TimeUnit::Microsecond => "Microsecond",
        TimeUnit::Nanosecond => "Nanosecond",
    };
    match of {
        DataType::Timestamp(of, None) => format!("Timestamp({}, None)", unit(of)),
        DataType::Timestamp(of, Some(zone)) => {
            format!("Timestamp({}, Some(\"{zone}\"))", unit(of))
        }
        DataType::Time64(of) => format!("Time64({})", unit(of)),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_nulls_and_values() -> Result<(), ArrowError> {
        let numbers = (0..64)
            .map(|n| (n % 7 != 3).then_some(n))
            .collect::<Vec<_>>();
        for of in types() {
            let array = array(&of, &numbers, Floats::All)?;
            assert_eq!(array.data_type(), &of);
            assert_eq!(array.len(), numbers.len());
            assert_eq!(
                array.null_count(),
                numbers.iter().filter(|n| n.is_none()).count()
            );
        }
        Ok(())
    }

    /// What a constant says is what the column holds.
    #[tokio::test]
    async fn constants_are_the_values_of_their_numbers() -> Result<(), Box<dyn std::error::Error>> {
        let session = datafusion::execution::context::SessionContext::new();
        for of in types() {
            for n in [0, 1, 2, 3, 7, 20, 21, 33, 100] {
                let Some(constant) = constant(&of, n, n % 2 == 0, Floats::All) else {
                    continue;
                };
                let column = array(&of, &[Some(n)], Floats::All)?;
                let batch = RecordBatch::try_from_iter([("c", column)])?;
                let table = session.read_batch(batch)?;
                let _ = session.deregister_table("t")?;
                session.register_table("t", table.into_view())?;
                let sql = format!("select count(*) from t where c is not distinct from {constant}");
                let count = session.sql(&sql).await?.collect().await?;
                let count = count[0].column(0).as_primitive::<Int64Type>().value(0);
                assert_eq!(count, 1, "{of}: {sql}");
            }
        }
        Ok(())
    }
}
