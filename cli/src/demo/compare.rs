//! Whether two answers are the same, whatever the order of their rows.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use arrow::error::ArrowError;
use arrow::util::display::{ArrayFormatter, FormatOptions};

/// How far two floating-point results may lie apart, relative to the larger: sums are added up in
/// an order that depends on timing.
const TOLERANCE: f64 = 1e-9;

/// One cell: floating-point numbers stay numbers, all else is compared as text.
#[derive(Clone, Debug, PartialEq)]
enum Cell {
    Text(String),
    Float(f64),
}

/// Where two answers differ, in words; `None` when they are equal.
///
/// # Errors
/// When a value cannot be formatted.
pub fn difference(
    left: &[RecordBatch],
    right: &[RecordBatch],
) -> Result<Option<String>, ArrowError> {
    let (left, right) = (sorted(left)?, sorted(right)?);
    if left.len() != right.len() {
        return Ok(Some(format!("{} rows against {}", left.len(), right.len())));
    }
    for (index, (a, b)) in left.iter().zip(&right).enumerate() {
        let same = a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_cell(a, b));
        if !same {
            return Ok(Some(format!("sorted row {index}: {a:?} against {b:?}")));
        }
    }
    Ok(None)
}

fn same_cell(a: &Cell, b: &Cell) -> bool {
    match (a, b) {
        (Cell::Float(a), Cell::Float(b)) => {
            a == b
                || (a.is_nan() && b.is_nan())
                || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs())
        }
        (a, b) => a == b,
    }
}

fn sorted(batches: &[RecordBatch]) -> Result<Vec<Vec<Cell>>, ArrowError> {
    let mut rows = Vec::new();
    for batch in batches {
        let columns: Vec<Vec<Cell>> = batch
            .columns()
            .iter()
            .map(|column| cells(column.as_ref()))
            .collect::<Result<_, _>>()?;
        for row in 0..batch.num_rows() {
            rows.push(
                columns
                    .iter()
                    .map(|column| column[row].clone())
                    .collect::<Vec<_>>(),
            );
        }
    }
    // Floats come last and rounded in the key, so that what is within the tolerance of each other
    // lands in the same place.
    let key = |row: &Vec<Cell>| {
        let (mut texts, mut floats) = (Vec::new(), Vec::new());
        for cell in row {
            match cell {
                Cell::Text(text) => texts.push(text.clone()),
                Cell::Float(value) => floats.push(format!("{value:.6e}")),
            }
        }
        (texts, floats)
    };
    rows.sort_by_cached_key(key);
    Ok(rows)
}

fn cells(column: &dyn Array) -> Result<Vec<Cell>, ArrowError> {
    if column.data_type().is_floating() {
        let floats = cast(column, &DataType::Float64)?;
        let floats = floats.as_primitive::<Float64Type>();
        return Ok(floats
            .iter()
            .map(|value| match value {
                Some(value) => Cell::Float(value),
                None => Cell::Text("NULL".into()),
            })
            .collect());
    }
    let options = FormatOptions::default().with_null("NULL");
    let formatter = ArrayFormatter::try_new(column, &options)?;
    (0..column.len())
        .map(|row| Ok(Cell::Text(formatter.value(row).try_to_string()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray, StringViewArray};

    use super::*;

    fn batch(columns: Vec<ArrayRef>) -> RecordBatch {
        let named = columns
            .into_iter()
            .enumerate()
            .map(|(index, column)| (format!("c{index}"), column, true));
        RecordBatch::try_from_iter_with_nullable(named).unwrap()
    }

    #[test]
    fn the_order_of_rows_the_batches_and_the_string_type_do_not_matter() {
        let left = batch(vec![
            Arc::new(Int64Array::from(vec![Some(1), None, Some(3)])),
            Arc::new(StringArray::from(vec!["a", "b", "c"])),
        ]);
        let first = batch(vec![
            Arc::new(Int64Array::from(vec![Some(3)])),
            Arc::new(StringViewArray::from(vec!["c"])),
        ]);
        let second = batch(vec![
            Arc::new(Int64Array::from(vec![None, Some(1)])),
            Arc::new(StringViewArray::from(vec!["b", "a"])),
        ]);
        assert_eq!(difference(&[left], &[first, second]).unwrap(), None);
    }

    #[test]
    fn floats_may_differ_in_the_last_bits_only() {
        let floats = |values: Vec<f64>| batch(vec![Arc::new(Float64Array::from(values))]);
        let left = floats(vec![0.1 + 0.2, 1e18]);
        let right = floats(vec![1e18 * (1.0 + 1e-12), 0.3]);
        assert_eq!(
            difference(std::slice::from_ref(&left), &[right]).unwrap(),
            None
        );
        let wrong = floats(vec![0.3001, 1e18]);
        assert!(difference(&[left], &[wrong]).unwrap().is_some());
    }

    #[test]
    fn a_difference_says_where() {
        let numbers = |values: Vec<i64>| batch(vec![Arc::new(Int64Array::from(values))]);
        let said = difference(&[numbers(vec![1, 2])], &[numbers(vec![1, 3])]).unwrap();
        assert_eq!(
            said.unwrap(),
            r#"sorted row 1: [Text("2")] against [Text("3")]"#
        );
        let said = difference(&[numbers(vec![1])], &[numbers(vec![1, 1])]).unwrap();
        assert_eq!(said.unwrap(), "1 rows against 2");
        assert_eq!(difference(&[], &[numbers(vec![])]).unwrap(), None);
    }
}
