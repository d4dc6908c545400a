//! What a section found: the same rows as text for people and as JSON for programs.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::{Map, Value, json};

/// One place of a table.
#[derive(Clone, Debug)]
pub enum Cell {
    /// A figure, and how many places after the point people see.
    Number(f64, usize),
    /// From and to.
    Range(f64, f64, usize),
    /// A word.
    Word(String),
    /// Not to be had here.
    None,
}

impl Cell {
    /// A figure that may not be there.
    #[must_use]
    pub fn maybe(value: Option<f64>, places: usize) -> Self {
        value.map_or(Self::None, |v| Self::Number(v, places))
    }

    /// A range that may not be there.
    #[must_use]
    pub fn maybe_range(value: Option<(f64, f64)>, places: usize) -> Self {
        value.map_or(Self::None, |(a, b)| Self::Range(a, b, places))
    }

    fn text(&self) -> String {
        match self {
            Self::Number(v, places) => format!("{v:.places$}"),
            Self::Range(a, b, places) => format!("{a:.places$}-{b:.places$}"),
            Self::Word(word) => word.clone(),
            Self::None => "-".to_owned(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Number(v, _) => json!(v),
            Self::Range(a, b, _) => json!([a, b]),
            Self::Word(word) => json!(word),
            Self::None => Value::Null,
        }
    }

    fn is_sound(&self) -> bool {
        match self {
            Self::Number(v, _) => v.is_finite() && *v >= 0.0,
            Self::Range(a, b, _) => a.is_finite() && b.is_finite() && a <= b,
            Self::Word(word) => !word.is_empty(),
            Self::None => true,
        }
    }
}

/// A table. The names of columns are JSON's as well: units last.
#[derive(Clone, Debug)]
pub struct Table {
    /// A name for programs.
    pub name: &'static str,
    /// What is measured against what.
    pub about: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(name: &'static str, about: impl Into<String>, columns: &[&'static str]) -> Self {
        Self {
            name,
            about: about.into(),
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// Where it has another number of cells than there are columns.
    pub fn row(&mut self, cells: Vec<Cell>) {
        assert_eq!(cells.len(), self.columns.len(), "a row of {}", self.name);
        self.rows.push(cells);
    }

    /// Whether it says something, and nothing that cannot be: a smoke test's question.
    ///
    /// # Errors
    /// Where a row is missing, is no figure, or a later quantile is less than an earlier one.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.rows.is_empty(), "{}: no rows", self.name);
        for row in &self.rows {
            let line = || row.iter().map(Cell::text).collect::<Vec<_>>().join(" | ");
            ensure!(
                row.iter().all(Cell::is_sound),
                "{}: {} in {:?}",
                self.name,
                line(),
                self.columns
            );
            // Quantiles stand beside one another, in order.
            let quantiles = self.columns.iter().zip(row).filter_map(|(name, cell)| {
                match (name.starts_with('p') || *name == "max_us", cell) {
                    (true, Cell::Number(v, _)) => Some(*v),
                    _ => None,
                }
            });
            ensure!(
                quantiles.is_sorted(),
                "{}: quantiles out of order: {}",
                self.name,
                line()
            );
        }
        Ok(())
    }

    /// For people: Markdown, aligned.
    #[must_use]
    pub fn text(&self) -> String {
        let mut lines: Vec<Vec<String>> =
            vec![self.columns.iter().map(|&c| c.to_owned()).collect()];
        lines.extend(self.rows.iter().map(|r| r.iter().map(Cell::text).collect()));
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| lines.iter().map(|l| l[i].len()).max().unwrap_or(0))
            .collect();
        let mut text = format!("### {}\n{}\n\n", self.name, self.about);
        for (n, line) in lines.iter().enumerate() {
            for (i, (cell, &width)) in line.iter().zip(&widths).enumerate() {
                let _ = if i == 0 {
                    write!(text, "| {cell:width$} ")
                } else {
                    write!(text, "| {cell:>width$} ")
                };
            }
            text.push_str("|\n");
            if n == 0 {
                for (i, &width) in widths.iter().enumerate() {
                    let dashes = "-".repeat(width + 1);
                    let _ = write!(text, "|{dashes}{}", if i == 0 { '-' } else { ':' });
                }
                text.push_str("|\n");
            }
        }
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let cells = self.columns.iter().zip(row);
                let fields = cells.map(|(&name, cell)| (name.to_owned(), cell.json()));
                Value::Object(Map::from_iter(fields))
            })
            .collect();
        json!({ "name": self.name, "about": self.about, "rows": rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(cells: Vec<Cell>) -> Table {
        let mut t = Table::new("t", "about", &["case", "p50_us", "p99_us"]);
        t.row(cells);
        t
    }

    #[test]
    fn what_cannot_be_is_noticed() {
        let word = || Cell::Word("x".into());
        let number = |v| Cell::Number(v, 1);
        table(vec![word(), number(1.0), number(2.0)])
            .check()
            .unwrap();
        table(vec![word(), number(1.0), Cell::None])
            .check()
            .unwrap();
        for bad in [number(0.5), number(f64::NAN), number(-1.0)] {
            assert!(table(vec![word(), number(1.0), bad]).check().is_err());
        }
        assert!(Table::new("t", "", &["case"]).check().is_err());
    }

    #[test]
    fn text_and_json_say_the_same() {
        let t = table(vec![
            Cell::Word("x".into()),
            Cell::Number(1.25, 1),
            Cell::Range(1.0, 2.0, 0),
        ]);
        assert!(
            t.text().contains("| x    |    1.2 |    1-2 |"),
            "{}",
            t.text()
        );
        assert_eq!(
            t.json()["rows"][0],
            json!({"case": "x", "p50_us": 1.25, "p99_us": [1.0, 2.0]})
        );
    }
}
