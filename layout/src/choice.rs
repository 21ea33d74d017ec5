//! In which form each column is cached.
//!
//! A layout may name a form for all columns and for single ones; where it says `auto`, the form is
//! chosen here, from footers alone.
//!
//! Each form of a column takes some bytes and saves some time in every scan, compared with reading
//! the file: fetching and decoding for the decoded forms, fetching for the parquet form. What a
//! form saves, times the heat of the column, is its benefit. The budget is filled by benefit a
//! byte: columns begin uncached, and again and again the step that gains the most for the bytes it
//! adds is taken, from no form to a small one or from a small one to a larger one, until no step
//! fits. (It is the greedy algorithm for the knapsack with choices, over the convex hull of each
//! column's forms: at most one step away from the best there is.)
//!
//! A larger form that saves no more than a smaller one is never chosen, however large the budget.
//! So `auto` without a limit is what scans the fastest, not what takes the most.

use std::fmt;

use arrow::datatypes::DataType;

use crate::catalog::TableCatalog;
use crate::estimate::{FormBytes, Values, column_bytes};
use crate::form::Form;
use crate::schema::allows_arrow;

/// A column, as far as the choice of its form depends on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Name of the root column.
    pub column: String,
    /// Rows of its chunks.
    pub rows: u64,
    /// What its chunks take in each form.
    pub bytes: FormBytes,
    /// What kind of values it has.
    pub values: Values,
    /// How often it is read, compared with the other columns.
    pub heat: f64,
    /// The form that the layout asks for; `None` where it is to be chosen.
    pub asked: Option<Form>,
}

/// The form of a column, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Name of the root column.
    pub column: String,
    /// Its form.
    pub form: Form,
    /// Estimated bytes in that form.
    pub bytes: u64,
    /// Nanoseconds that a scan of the whole column saves compared with reading its file.
    pub saved_ns: f64,
    /// That, times the heat, for each byte.
    pub benefit: f64,
    /// Why it is this form.
    pub why: Why,
}

/// Why a column has the form it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The layout asks for it.
    Asked,
    /// Its type has no decoded form.
    Type,
    /// No form is read faster.
    Fastest,
    /// A form that is read faster does not fit the budget.
    Budget,
    /// It does not fit the budget in any form, and is left out if those before it stay.
    LeftOut,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Why::Asked => "asked for",
            Why::Type => "its type has no other form",
            Why::Fastest => "scans fastest",
            Why::Budget => "a faster form exceeds the budget",
            Why::LeftOut => "exceeds the budget",
        })
    }
}

/// Nanoseconds a value that a scan spends on a column, measured on one core; see
/// docs/performance.md. What fetching costs is that of local storage: elsewhere every cached form
/// saves more, by the same amount.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    /// Fetching and decoding the file.
    file: f64,
    /// Decoding the file's bytes from shared memory.
    parquet: f64,
    /// Unpacking.
    packed: f64,
    /// Streaming decoded values from memory.
    arrow: f64,
}

fn cost(values: Values) -> Cost {
    let (decode, packed, arrow) = match values {
        Values::Bits => (1.0, 0.05, 0.05),
        Values::Integers { bytes: 0..=4 } => (1.6, 0.2, 0.5),
        Values::Integers { bytes: 5..=8 } => (6.0, 0.3, 1.0),
        Values::Integers { .. } => (5.0, 0.7, 2.0),
        Values::Floats => (3.0, 1.2, 1.0),
        Values::RepeatedText => (1.5, 0.8, 1.4),
        Values::Text => (40.0, 12.0, 5.0),
        Values::Other => (10.0, 4.0, 4.0),
    };
    Cost {
        file: decode + FETCH_NS,
        parquet: decode,
        packed,
        arrow,
    }
}

/// What fetching a value's share of a file costs at least.
const FETCH_NS: f64 = 0.5;

impl Candidate {
    fn saved_ns(&self, form: Form) -> f64 {
        let cost = cost(self.values);
        let spent = match form {
            Form::Arrow => cost.arrow,
            Form::Packed => cost.packed,
            Form::Parquet => cost.parquet,
        };
        (cost.file - spent).max(0.0) * self.rows as f64
    }

    fn benefit(&self, form: Form) -> f64 {
        self.saved_ns(form) * self.heat
    }

    /// The forms worth considering, smallest first: each saves more than the one before, and less
    /// for each byte that it adds.
    fn hull(&self) -> Vec<Form> {
        let mut forms = match self.asked {
            Some(form) => vec![form],
            None if self.values == Values::Other => vec![Form::Arrow, Form::Parquet],
            None => vec![Form::Arrow, Form::Packed, Form::Parquet],
        };
        forms.sort_by_key(|form| self.bytes.of(*form));
        let mut hull: Vec<Form> = vec![];
        for form in forms {
            if hull
                .last()
                .is_some_and(|last| self.benefit(*last) >= self.benefit(form))
            {
                continue;
            }
            while let Some(last) = hull.pop() {
                let before = hull.last().copied();
                if self.gain(before, last) > self.gain(Some(last), form) {
                    hull.push(last);
                    break;
                }
            }
            hull.push(form);
        }
        hull
    }

    /// Benefit for each byte that a step adds.
    fn gain(&self, from: Option<Form>, to: Form) -> f64 {
        let benefit = self.benefit(to) - from.map_or(0.0, |from| self.benefit(from));
        benefit / self.added(from, to).max(1) as f64
    }

    fn added(&self, from: Option<Form>, to: Form) -> u64 {
        let before = from.map_or(0, |from| self.bytes.of(from));
        self.bytes.of(to).saturating_sub(before)
    }
}

/// Chooses the form of each column, in the order of `candidates`, so that all together take at most
/// `budget_bytes` as far as that is possible.
pub fn choose_forms(candidates: &[Candidate], budget_bytes: u64) -> Vec<Choice> {
    let hulls: Vec<Vec<Form>> = candidates.iter().map(Candidate::hull).collect();
    // How many forms of its hull a column has taken.
    let mut taken = vec![0usize; candidates.len()];
    let mut closed = vec![false; candidates.len()];
    let mut left = budget_bytes;
    loop {
        let steps = (0..candidates.len())
            .filter(|at| !closed[*at])
            .filter_map(|at| {
                let from = taken[at].checked_sub(1).map(|before| hulls[at][before]);
                let to = *hulls[at].get(taken[at])?;
                Some((candidates[at].gain(from, to), at, from, to))
            });
        // The first of equals: the one that the layout names first.
        let best = steps.reduce(|best, step| if step.0 > best.0 { step } else { best });
        let Some((_, at, from, to)) = best else {
            break;
        };
        let added = candidates[at].added(from, to);
        if added <= left {
            left -= added;
            taken[at] += 1;
        } else {
            closed[at] = true;
        }
    }
    let choices = candidates.iter().zip(&hulls).zip(taken);
    choices
        .map(|((candidate, hull), taken)| choice(candidate, hull, taken))
        .collect()
}

fn choice(candidate: &Candidate, hull: &[Form], taken: usize) -> Choice {
    // What is left out is planned in its smallest form: there may be room later.
    let form = hull.get(taken.saturating_sub(1)).copied();
    let form = form.unwrap_or(Form::Parquet);
    let why = match candidate.asked {
        Some(Form::Parquet) if candidate.values == Values::Other => Why::Type,
        Some(_) => Why::Asked,
        None if taken == 0 => Why::LeftOut,
        None if taken < hull.len() => Why::Budget,
        None => Why::Fastest,
    };
    let bytes = candidate.bytes.of(form);
    Choice {
        column: candidate.column.clone(),
        form,
        bytes,
        saved_ns: candidate.saved_ns(form),
        benefit: candidate.benefit(form) / bytes.max(1) as f64,
        why,
    }
}

/// The candidates of a table, in the order of its schema; every column as hot as the others unless
/// `heat` knows better.
pub fn candidates(catalog: &TableCatalog, heat: impl Fn(&str) -> f64) -> Vec<Candidate> {
    let fields = catalog.schema.fields().iter();
    let mut all: Vec<Candidate> = fields
        .map(|field| Candidate {
            column: field.name().clone(),
            rows: 0,
            bytes: FormBytes::default(),
            values: Values::of(field.data_type()),
            heat: heat(field.name()),
            asked: catalog.layout.form_of(field.name()).form(true),
        })
        .collect();
    let places = catalog.places_by_name();
    for file in &catalog.files {
        for root in file.roots.iter().filter(|root| !root.shadowed) {
            let Some(&index) = places.get(root.name()) else {
                continue;
            };
            let candidate = &mut all[index];
            if !allows_arrow(root) {
                candidate.asked = Some(Form::Parquet);
                candidate.values = Values::Other;
            }
            let (mut repeated, mut plain) = (0, 0);
            for group in file.metadata.row_groups() {
                let (bytes, values) = column_bytes(root, group);
                candidate.rows += group.num_rows() as u64;
                candidate.bytes = candidate.bytes.plus(bytes);
                match values {
                    Values::Text => plain += group.num_rows(),
                    Values::RepeatedText => repeated += group.num_rows(),
                    _ => {}
                }
            }
            if plain > repeated && is_text(root.field.data_type()) {
                candidate.values = Values::Text;
            }
        }
    }
    all
}

fn is_text(data_type: &DataType) -> bool {
    use DataType::*;
    matches!(
        data_type,
        Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView
    )
}

/// The form of each column of a catalog's table, by its layout and within `budget_bytes` or the
/// layout's own budget, in the order in which the layout wants them.
pub fn forms_of(
    catalog: &TableCatalog,
    budget_bytes: u64,
    heat: impl Fn(&str) -> f64,
) -> Vec<Choice> {
    let mut candidates = candidates(catalog, heat);
    if let Some(columns) = &catalog.layout.columns {
        let place = |candidate: &Candidate| columns.iter().position(|c| *c == candidate.column);
        candidates.retain(|candidate| place(candidate).is_some());
        candidates.sort_by_key(place);
    }
    if let Some(first) = catalog.layout.first_columns {
        candidates.truncate(first);
    }
    let budget_bytes = catalog.layout.budget_bytes.unwrap_or(budget_bytes);
    choose_forms(&candidates, budget_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(column: &str, values: Values, bytes: [u64; 3]) -> Candidate {
        let [arrow, packed, parquet] = bytes;
        Candidate {
            column: column.into(),
            rows: 1_000_000,
            bytes: FormBytes {
                arrow,
                packed,
                parquet,
            },
            values,
            heat: 1.0,
            asked: None,
        }
    }

    fn table() -> Vec<Candidate> {
        vec![
            candidate(
                "price",
                Values::Integers { bytes: 16 },
                [16_000_000, 3_000_000, 4_000_000],
            ),
            candidate(
                "comment",
                Values::Text,
                [43_000_000, 11_000_000, 13_000_000],
            ),
            candidate("flag", Values::RepeatedText, [16_000_000, 300_000, 300_000]),
        ]
    }

    fn forms(candidates: &[Candidate], budget: u64) -> Vec<(Form, Why)> {
        let choices = choose_forms(candidates, budget);
        choices
            .iter()
            .map(|choice| (choice.form, choice.why))
            .collect()
    }

    #[test]
    fn without_a_limit_every_column_has_the_form_that_scans_fastest() {
        assert_eq!(
            forms(&table(), u64::MAX),
            [
                (Form::Packed, Why::Fastest),
                (Form::Arrow, Why::Fastest),
                (Form::Packed, Why::Fastest),
            ]
        );
    }

    #[test]
    fn a_budget_is_filled_by_benefit_a_byte_and_kept() {
        let columns = table();
        for budget in [0, 1, 300_000, 3_400_000, 14_300_000, 30_000_000, 50_000_000] {
            let choices = choose_forms(&columns, budget);
            let used: u64 = choices
                .iter()
                .filter(|choice| choice.why != Why::LeftOut)
                .map(|choice| choice.bytes)
                .sum();
            assert!(used <= budget, "{used} of {budget}");
        }
        assert_eq!(
            forms(&columns, 15_000_000),
            [
                (Form::Packed, Why::Fastest),
                (Form::Packed, Why::Budget),
                (Form::Packed, Why::Fastest),
            ]
        );
        assert_eq!(forms(&columns, 3_500_000)[1], (Form::Packed, Why::LeftOut));
    }

    #[test]
    fn heat_decides_who_gets_the_room() {
        let mut columns = vec![
            candidate("a", Values::Text, [43_000_000, 11_000_000, 13_000_000]),
            candidate("b", Values::Text, [43_000_000, 11_000_000, 13_000_000]),
        ];
        columns[1].heat = 3.0;
        assert_eq!(
            forms(&columns, 54_000_000),
            [(Form::Packed, Why::Budget), (Form::Arrow, Why::Fastest)]
        );
    }

    #[test]
    fn what_is_asked_for_is_not_chosen() {
        let mut columns = table();
        columns[0].asked = Some(Form::Arrow);
        columns[1].asked = Some(Form::Parquet);
        columns[1].values = Values::Other;
        assert_eq!(
            forms(&columns, u64::MAX),
            [
                (Form::Arrow, Why::Asked),
                (Form::Parquet, Why::Type),
                (Form::Packed, Why::Fastest),
            ]
        );
    }
}
