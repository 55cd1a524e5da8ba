// SPDX-License-Identifier: Apache-2.0
//! What guest-bench printed on the console: `BENCH <name> <value> <unit>` and `BENCH-ERROR <part> <why>`.

use std::collections::BTreeMap;
use std::io;

use crate::report::median;

/// The figures of one or more guest runs: all values by name.
#[derive(Debug, Default)]
pub struct GuestFigures(BTreeMap<String, Vec<f64>>);

impl GuestFigures {
    /// Adds what a console shows. An error line, or a run that did not reach its end, is an error.
    pub fn add_console(&mut self, console: &str) -> io::Result<()> {
        let mut ended = false;
        for line in console.lines() {
            // The kernel may have printed a prefix of its own on the same line.
            let Some(start) = line.find("BENCH") else { continue };
            let mut words = line[start..].split_whitespace();
            match words.next() {
                Some("BENCH") => {
                    let name = words.next();
                    let value = words.next().and_then(|word| word.parse::<f64>().ok());
                    if let (Some(name), Some(value)) = (name, value) {
                        self.0.entry(name.to_owned()).or_default().push(value);
                    }
                }
                Some("BENCH-ERROR") => return Err(io::Error::other(line.to_owned())),
                Some("BENCH-END") => ended = true,
                _ => {}
            }
        }
        if ended {
            Ok(())
        } else {
            Err(io::Error::other(format!("the guest did not finish:\n{console}")))
        }
    }

    /// The median of a figure.
    pub fn median(&self, name: &str) -> io::Result<f64> {
        self.0
            .get(name)
            .map(|values| median(values))
            .ok_or_else(|| io::Error::other(format!("the guest did not report {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::GuestFigures;

    #[test]
    fn figures_errors_and_cut_runs() {
        let mut figures = GuestFigures::default();
        figures
            .add_console("x\r\nBENCH a.b 1.5 us\r\n[ 1.0] y BENCH a.b 2.5 us\nBENCH-END\n")
            .unwrap();
        assert_eq!(figures.median("a.b").unwrap().to_bits(), 2f64.to_bits());
        assert!(figures.median("c").is_err());
        assert!(figures.add_console("BENCH a.b 1 us\n").is_err());
        assert!(figures.add_console("BENCH-ERROR fs no\nBENCH-END\n").is_err());
    }
}
