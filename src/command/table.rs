//! Aligned tables of text.

use super::printable;
use std::fmt::Write;

/// A table under construction. Numbers stand to the right of their column, words to the left.
pub struct Table {
    columns: Vec<(&'static str, Side)>,
    rows: Vec<Vec<String>>,
}

/// Which side of its column a cell stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

impl Table {
    /// A table with these column titles. A title that begins with `>` is of a column of numbers.
    pub fn new(titles: &[&'static str]) -> Self {
        let side = |title: &&'static str| match title.strip_prefix('>') {
            Some(title) => (title, Side::Right),
            None => (*title, Side::Left),
        };
        Self { columns: titles.iter().map(side).collect(), rows: Vec::new() }
    }

    /// Adds a row. What acts on a terminal is escaped.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// The titles and rows as lines.
    pub fn render(&self) -> String {
        let length = |text: &str| text.chars().count();
        let cell = |row: &[String], column: usize| row.get(column).map_or(0, |cell| length(cell));
        let widths: Vec<usize> = (0..)
            .zip(&self.columns)
            .map(|(i, (title, _))| self.rows.iter().map(|row| cell(row, i)).fold(length(title), usize::max))
            .collect();
        let mut text = String::new();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (cell, ((_, side), width)) in cells.zip(self.columns.iter().zip(&widths)) {
                let _ = match side {
                    Side::Left => write!(line, "{cell:<width$}  "),
                    Side::Right => write!(line, "{cell:>width$}  "),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        };
        line(&mut self.columns.iter().map(|(title, _)| *title));
        for row in &self.rows {
            line(&mut row.iter().map(String::as_str));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[">PID", "COMM", ">RSS"]);
        table.row(["1".into(), "init".into(), "12".into()]);
        table.row(["12345".into(), "é\n".into(), "123456".into()]);
        assert_eq!(table.render(), "  PID  COMM       RSS\n    1  init        12\n12345  é\\u{a}  123456\n");
    }
}
