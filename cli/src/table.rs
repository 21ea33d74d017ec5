//! Tables of text: aligned columns, numbers to the right.

use std::fmt;

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Texts.
    Left,
    /// Numbers.
    Right,
}

/// A table to be printed.
#[derive(Clone, Debug)]
pub struct TextTable {
    header: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl TextTable {
    /// A table with these columns.
    pub fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Align)>) -> TextTable {
        TextTable {
            header: columns
                .into_iter()
                .map(|(name, align)| (name.to_string(), align))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().collect();
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for TextTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = self
            .header
            .iter()
            .enumerate()
            .map(|(column, (name, _))| {
                let cells = self.rows.iter().map(|row| row[column].chars().count());
                cells.fold(name.chars().count(), usize::max)
            })
            .collect();
        let mut line = |cells: Vec<&str>| {
            let mut text = String::new();
            for ((cell, width), (_, align)) in cells.iter().zip(&widths).zip(&self.header) {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => text.extend([*cell, padding.as_str(), "  "]),
                    Align::Right => text.extend([padding.as_str(), *cell, "  "]),
                }
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(self.header.iter().map(|(name, _)| name.as_str()).collect())?;
        for row in &self.rows {
            line(row.iter().map(String::as_str).collect())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let mut table = TextTable::new([("table", Align::Left), ("bytes", Align::Right)]);
        table.row(["tpch.orders".into(), "7".into()]);
        table.row(["ä".into(), "123456".into()]);
        assert_eq!(
            table.to_string(),
            "table         bytes\n\
             tpch.orders       7\n\
             ä            123456\n"
        );
    }
}
