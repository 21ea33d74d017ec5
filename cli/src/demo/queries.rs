//! The 22 queries of TPC-H, with the validation parameters of its specification.

use std::collections::BTreeSet;

/// One query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// 1 to 22.
    pub number: u8,
    /// Its text.
    pub sql: &'static str,
}

impl Query {
    /// `q1` to `q22`.
    pub fn name(&self) -> String {
        format!("q{}", self.number)
    }
}

macro_rules! queries {
    ($($number:literal => $file:literal),* $(,)?) => {
        [$(Query { number: $number, sql: include_str!(concat!("../../queries/", $file)) }),*]
    };
}

/// All of them, in order.
pub const QUERIES: [Query; 22] = queries! {
    1 => "q01.sql", 2 => "q02.sql", 3 => "q03.sql", 4 => "q04.sql", 5 => "q05.sql",
    6 => "q06.sql", 7 => "q07.sql", 8 => "q08.sql", 9 => "q09.sql", 10 => "q10.sql",
    11 => "q11.sql", 12 => "q12.sql", 13 => "q13.sql", 14 => "q14.sql", 15 => "q15.sql",
    16 => "q16.sql", 17 => "q17.sql", 18 => "q18.sql", 19 => "q19.sql", 20 => "q20.sql",
    21 => "q21.sql", 22 => "q22.sql",
};

/// Parses `1,6,14-16` into queries; nothing means all.
pub fn select(text: Option<&str>) -> Result<Vec<Query>, String> {
    let Some(text) = text else {
        return Ok(QUERIES.to_vec());
    };
    let mut wanted = BTreeSet::new();
    for item in text.split(',') {
        let (from, to) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| {
            text.trim()
                .trim_start_matches(['q', 'Q'])
                .parse::<u8>()
                .ok()
                .filter(|number| (1..=22).contains(number))
                .ok_or_else(|| format!("`{item}` is not a TPC-H query; expected 1 to 22"))
        };
        wanted.extend(number(from)?..=number(to)?);
    }
    Ok(QUERIES
        .into_iter()
        .filter(|query| wanted.contains(&query.number))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_selected_by_number_and_range() {
        let numbers = |text| -> Vec<u8> {
            let queries = select(Some(text)).unwrap();
            queries.iter().map(|query| query.number).collect()
        };
        assert_eq!(numbers("6,1"), [1, 6]);
        assert_eq!(numbers("14-16,q22"), [14, 15, 16, 22]);
        assert_eq!(select(None).unwrap().len(), 22);
        assert_eq!(
            select(Some("23")).unwrap_err(),
            "`23` is not a TPC-H query; expected 1 to 22"
        );
    }

    #[test]
    fn every_query_is_one_statement() {
        for query in QUERIES {
            let code: String = query
                .sql
                .lines()
                .filter(|line| !line.trim_start().starts_with("--"))
                .collect();
            let statement = code.trim().trim_end_matches(';');
            assert!(!statement.contains(';'), "{}", query.name());
            assert!(statement.to_lowercase().contains("select"));
        }
    }
}
