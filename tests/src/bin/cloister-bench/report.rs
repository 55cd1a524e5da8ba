// SPDX-License-Identifier: Apache-2.0
//! Figures: a table for people, JSON lines for machines.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

/// One measured figure.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// Its name, `area.what`.
    pub name: String,
    /// The value.
    pub value: f64,
    /// The value's unit; `ratio` for a comparison.
    pub unit: &'static str,
    /// What it was compared with; empty if nothing.
    pub peer: String,
    /// Under what conditions.
    pub conditions: String,
    /// The goal, as a text such as `<= 0.45`; empty if there is none.
    #[serde(skip)]
    pub goal: &'static str,
}

impl Figure {
    /// One that is compared with nothing but its goal.
    pub fn ours(
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        goal: &'static str,
        conditions: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
            peer: String::new(),
            conditions: conditions.into(),
            goal,
        }
    }
}

/// Prints each figure as it comes, and appends it to the results file.
pub struct Report {
    file: File,
    conditions: String,
    failures: usize,
}

impl Report {
    /// Starts a results file. `conditions` describes the host and is put before each figure's own.
    pub fn create(path: &Path, conditions: String) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let file = File::create(path)?;
        println!("{conditions}\n");
        println!(
            "{:<34} {:>14} {:<12} {:<10} peer",
            "figure", "value", "unit", "goal"
        );
        Ok(Self {
            file,
            conditions,
            failures: 0,
        })
    }

    /// Adds a figure.
    pub fn add(&mut self, mut figure: Figure) -> io::Result<()> {
        println!(
            "{:<34} {:>14.3} {:<12} {:<10} {}",
            figure.name, figure.value, figure.unit, figure.goal, figure.peer
        );
        figure.conditions = match figure.conditions.as_str() {
            "" => self.conditions.clone(),
            own => format!("{}; {own}", self.conditions),
        };
        let line = serde_json::to_string(&figure).map_err(io::Error::other)?;
        writeln!(self.file, "{line}")?;
        io::stdout().flush()
    }

    /// Says that a part could not be measured.
    pub fn fail(&mut self, part: &str, error: &dyn std::fmt::Display) {
        println!("{part:<34} FAILED: {error}");
        self.failures += 1;
    }

    /// How many parts could not be measured.
    pub fn failures(&self) -> usize {
        self.failures
    }
}

/// The median; zero of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5f64.to_bits());
        assert_eq!(median(&[]).to_bits(), 0f64.to_bits());
    }
}
