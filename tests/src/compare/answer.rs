//! What a session answers to a statement, and whether two answers are one.

use std::fmt;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::context::SessionContext;

/// Two floating-point numbers closer than this, relative to the larger, are one where they were
/// added up: a sum depends on the order of addition.
const SUM_TOLERANCE: f64 = 1e-9;

/// What came of a statement.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Its rows; none and no columns for a statement that returns nothing.
    Rows(Rows),
    /// It was refused with this message.
    Refused(String),
    /// The engine panicked with this message.
    Panicked(String),
    /// It was given up after this long.
    Late(Duration),
}

/// The rows of an answer as text.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// The types of the columns.
    pub types: Vec<DataType>,
    /// The values; floating-point ones with all their digits.
    pub rows: Vec<Vec<String>>,
}

/// How two answers have to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The order of rows counts.
    pub ordered: bool,
    /// Floating-point numbers are values of columns and agree to the last bit but those of NaN;
    /// otherwise they may be sums.
    pub exact: bool,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Rows(rows) => write!(f, "{} rows", rows.rows.len()),
            Answer::Refused(message) => write!(f, "error: {message}"),
            Answer::Panicked(message) => write!(f, "panic: {message}"),
            Answer::Late(patience) => write!(f, "no answer within {} s", patience.as_secs()),
        }
    }
}

/// Asks a session, and waits no longer than `patience`.
pub async fn ask(session: &SessionContext, sql: &str, patience: Duration) -> Answer {
    let (session, statement) = (session.clone(), sql.to_owned());
    let mut asked = tokio::spawn(async move {
        let frame = session.sql(&statement).await?;
        let schema = SchemaRef::new(frame.schema().as_arrow().clone());
        let batches = frame.collect().await?;
        text(&schema, &batches)
    });
    match tokio::time::timeout(patience, &mut asked).await {
        Ok(Ok(Ok(rows))) => Answer::Rows(rows),
        Ok(Ok(Err(error))) => Answer::Refused(error.to_string()),
        Ok(Err(error)) => Answer::Panicked(error.to_string()),
        Err(_) => {
            asked.abort();
            Answer::Late(patience)
        }
    }
}

/// The batches as text.
///
/// # Errors
/// If a type has no text.
fn text(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<Rows> {
    let options = FormatOptions::default().with_null("NULL");
    let mut rows = vec![];
    for batch in batches {
        let columns = batch.columns().iter();
        let formatters = columns.map(|column| ArrayFormatter::try_new(column.as_ref(), &options));
        let formatters = formatters.collect::<Result<Vec<_>, _>>()?;
        for row in 0..batch.num_rows() {
            let cells = formatters.iter().map(|formatter| {
                let value = formatter.value(row).try_to_string();
                value.map_err(DataFusionError::from)
            });
            rows.push(cells.collect::<Result<Vec<_>>>()?);
        }
    }
    // What was sent, not what was planned: a batch may say otherwise than its plan.
    let fields = batches.first().map_or_else(
        || schema.fields().clone(),
        |batch| batch.schema().fields().clone(),
    );
    let types = fields.iter().map(|field| field.data_type().clone());
    Ok(Rows {
        types: types.collect(),
        rows,
    })
}

/// What tells two answers apart, in words; `None` where nothing does.
///
/// Two refusals agree whatever they say, and so do two panics: what stock cannot do is not asked of
/// us.
pub fn difference(stock: &Answer, ours: &Answer, agreement: Agreement) -> Option<String> {
    match (stock, ours) {
        (Answer::Rows(stock), Answer::Rows(ours)) => stock.difference(ours, agreement),
        (Answer::Refused(_), Answer::Refused(_)) | (Answer::Panicked(_), Answer::Panicked(_)) => {
            None
        }
        // Where stock does not come to an end, neither need we.
        (Answer::Late(_), Answer::Late(_)) => None,
        _ => Some(format!("stock: {stock}\n      ours: {ours}")),
    }
}

impl Rows {
    fn difference(&self, ours: &Rows, agreement: Agreement) -> Option<String> {
        let types = |rows: &Rows| {
            let names = rows.types.iter().map(ToString::to_string);
            names.collect::<Vec<_>>().join(", ")
        };
        let same = self.types.len() == ours.types.len()
            && (self.types.iter().zip(&ours.types)).all(|(a, b)| a.equals_datatype(b));
        if !same {
            let (stock, ours) = (types(self), types(ours));
            return Some(format!("types, stock: {stock}\n      ours: {ours}"));
        }
        if self.rows.len() != ours.rows.len() {
            let (stock, ours_count) = (self.rows.len(), ours.rows.len());
            let example = self.example(ours);
            return Some(format!("{stock} rows, ours {ours_count}{example}"));
        }
        let as_they_come = first_apart(self, &self.rows, &ours.rows, agreement.exact)?;
        let sorted = |rows: &Rows| {
            let mut sorted = rows.rows.clone();
            // Sums that differ in their last digits must not sort differently.
            sorted.sort_by_cached_key(|row| {
                let cells = row.iter().zip(&rows.types);
                cells
                    .map(|(cell, of)| rounded(cell, of, agreement.exact))
                    .collect::<Vec<_>>()
            });
            sorted
        };
        match first_apart(self, &sorted(self), &sorted(ours), agreement.exact) {
            None if agreement.ordered => Some(format!("in another order: {as_they_come}")),
            None => None,
            Some(_) => Some(format!("{as_they_come}{}", self.example(ours))),
        }
    }

    /// A row that only one of the two has.
    fn example(&self, ours: &Rows) -> String {
        let key = |row: &Vec<String>| row.join(" | ");
        let only = |these: &Rows, those: &Rows| {
            let mut left = std::collections::HashMap::<String, i64>::new();
            for row in &those.rows {
                *left.entry(key(row)).or_default() += 1;
            }
            these.rows.iter().map(key).find(|row| {
                let count = left.entry(row.clone()).or_default();
                *count -= 1;
                *count < 0
            })
        };
        let mut text = String::new();
        for (whose, row) in [("stock", only(self, ours)), ("we", only(ours, self))] {
            if let Some(row) = row {
                text.push_str(&format!("\n      only {whose}: {}", shortened(&row, 400)));
            }
        }
        text
    }
}

/// The first row in which the two differ.
fn first_apart(
    of: &Rows,
    stock: &[Vec<String>],
    ours: &[Vec<String>],
    exact: bool,
) -> Option<String> {
    let (row, (stock, ours)) =
        (stock.iter().zip(ours).enumerate()).find(|(_, (stock, ours))| {
            let cells = stock.iter().zip(ours.iter()).zip(&of.types);
            !cells
                .into_iter()
                .all(|((stock, ours), of)| same(stock, ours, of, exact))
        })?;
    let (stock, ours) = (stock.join(" | "), ours.join(" | "));
    Some(format!(
        "row {row}, stock: {}\n      ours: {}",
        shortened(&stock, 400),
        shortened(&ours, 400)
    ))
}

fn same(stock: &str, ours: &str, of: &DataType, exact: bool) -> bool {
    if stock == ours || exact || !of.is_floating() {
        return stock == ours;
    }
    match (stock.parse::<f64>(), ours.parse::<f64>()) {
        (Ok(stock), Ok(ours)) if stock.is_finite() && ours.is_finite() => {
            let largest = stock.abs().max(ours.abs());
            let tolerance = match of {
                DataType::Float64 => SUM_TOLERANCE,
                DataType::Float32 => 1e-5,
                _ => 1e-2,
            };
            (stock - ours).abs() <= tolerance * largest.max(1.0)
        }
        _ => false,
    }
}

/// What to sort a value by.
fn rounded(cell: &str, of: &DataType, exact: bool) -> String {
    match cell.parse::<f64>() {
        Ok(number) if !exact && of.is_floating() && number.is_finite() => {
            let rounded = format!("{number:.5e}").parse::<f64>().unwrap_or(number);
            // No zero is less than another.
            format!("{:?}", rounded + 0.0)
        }
        _ => cell.to_owned(),
    }
}

/// At most `most` characters of a text, and whether that is all.
pub fn shortened(text: &str, most: usize) -> String {
    let text = text.replace('\n', "\\n");
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}… ({} bytes)", &text[..at], text.len()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(of: DataType, values: &[&str]) -> Answer {
        Answer::Rows(Rows {
            types: vec![of],
            rows: values
                .iter()
                .map(|value| vec![(*value).to_owned()])
                .collect(),
        })
    }

    const SUMS: Agreement = Agreement {
        ordered: false,
        exact: false,
    };
    const VALUES: Agreement = Agreement {
        ordered: false,
        exact: true,
    };

    #[test]
    fn order_counts_only_where_it_was_asked_for() {
        let (one, other) = (
            rows(DataType::Int64, &["1", "2"]),
            rows(DataType::Int64, &["2", "1"]),
        );
        assert_eq!(difference(&one, &other, VALUES), None);
        let ordered = Agreement {
            ordered: true,
            ..VALUES
        };
        assert!(difference(&one, &other, ordered).is_some());
    }

    #[test]
    fn sums_may_differ_in_their_last_digits_and_values_in_none() {
        let of = DataType::Float64;
        let (one, other) = (
            rows(of.clone(), &["0.3", "-0.0"]),
            rows(of.clone(), &["0.0", "0.30000000000000004"]),
        );
        assert_eq!(difference(&one, &other, SUMS), None);
        assert!(difference(&one, &other, VALUES).is_some());
        let zero = rows(of.clone(), &["0.0"]);
        assert!(difference(&zero, &rows(of, &["-0.0"]), VALUES).is_some());
    }

    #[test]
    fn a_lost_row_a_double_one_another_type_and_an_error_are_told() {
        let (one, text) = (
            rows(DataType::Int64, &["1", "1", "2"]),
            rows(DataType::Utf8, &["1", "1", "2"]),
        );
        let lost = difference(&one, &rows(DataType::Int64, &["1", "2"]), VALUES);
        assert!(lost.is_some_and(|lost| lost.contains("only stock: 1")));
        assert!(difference(&one, &rows(DataType::Int64, &["1", "2", "2"]), VALUES).is_some());
        assert!(difference(&one, &text, VALUES).is_some());
        let refused = Answer::Refused("no".to_owned());
        assert!(difference(&one, &refused, VALUES).is_some());
        assert!(difference(&refused, &one, VALUES).is_some());
        assert_eq!(
            difference(&refused, &Answer::Refused("never".to_owned()), VALUES),
            None
        );
        let panicked = Answer::Panicked("oh".to_owned());
        assert!(difference(&refused, &panicked, VALUES).is_some());
    }
}
