// SPDX-License-Identifier: Apache-2.0
//! Metrics of several processes as one text: what they count is added up, series by series.
//!
//! It reads what [`super::metrics`] writes: families of `# HELP`, `# TYPE` and samples, all lines of a family together. All but
//! info is added up, which is right for what the daemon's families say: so many pods, containers, bytes, calls in all.

use std::collections::HashMap;
use std::fmt::Write;

/// What is told by each process of itself alone.
const OWN: [&str; 2] = ["process_", "cloister_build"];

/// A text of metrics, taken apart.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    families: Vec<Family>,
}

#[derive(Clone, Debug, Default)]
struct Family {
    name: String,
    /// Its lines of help and type.
    head: Vec<String>,
    /// `counter`, `gauge`, `histogram`.
    kind: String,
    /// Name with labels, and value.
    samples: Vec<(String, f64)>,
}

impl Exposition {
    /// Takes a text apart. Lines that are neither of a family nor a sample are left out.
    pub fn parse(text: &str) -> Self {
        let mut families: Vec<Family> = Vec::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (Some(word @ ("HELP" | "TYPE")), Some(name)) = (words.next(), words.next()) else {
                    continue;
                };
                if families.last().is_none_or(|family| family.name != name) {
                    families.push(Family {
                        name: name.to_owned(),
                        ..Family::default()
                    });
                }
                if let Some(family) = families.last_mut() {
                    family.head.push(line.to_owned());
                    if word == "TYPE" {
                        words.next().unwrap_or_default().clone_into(&mut family.kind);
                    }
                }
            } else if let Some((series, value)) = line.rsplit_once(' ')
                && let Ok(value) = value.parse()
                && let Some(family) = families.last_mut()
            {
                family.samples.push((series.to_owned(), value));
            }
        }
        Self { families }
    }

    /// Adds what another process counts, but for what it says of itself.
    pub fn add(&mut self, other: &Self) {
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut new = Vec::new();
        for (place, family) in self.families.iter().enumerate() {
            places.insert(&family.name, place);
        }
        let mut sums = Vec::new();
        for family in &other.families {
            if OWN.iter().any(|prefix| family.name.starts_with(prefix)) {
                continue;
            }
            match places.get(family.name.as_str()) {
                Some(place) => sums.push((*place, family)),
                None => new.push(family.clone()),
            }
        }
        for (place, family) in sums {
            if let Some(mine) = self.families.get_mut(place) {
                mine.add(family);
            }
        }
        self.families.extend(new);
    }

    /// What stays so when the process has ended: what it has counted, not what was there.
    #[must_use]
    pub fn counted(&self) -> Self {
        let lasts = |family: &&Family| matches!(family.kind.as_str(), "counter" | "histogram");
        Self {
            families: self.families.iter().filter(lasts).cloned().collect(),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// The text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for family in &self.families {
            for line in &family.head {
                text.push_str(line);
                text.push('\n');
            }
            for (series, value) in &family.samples {
                // Writing to a string does not fail.
                let _ = writeln!(text, "{series} {value}");
            }
        }
        text
    }
}

impl Family {
    fn add(&mut self, other: &Self) {
        let places: HashMap<String, usize> = self
            .samples
            .iter()
            .enumerate()
            .map(|(place, (series, _))| (series.clone(), place))
            .collect();
        for (series, value) in &other.samples {
            match places.get(series).and_then(|place| self.samples.get_mut(*place)) {
                Some((_, sum)) => *sum += value,
                None => self.samples.push((series.clone(), *value)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::super::metrics::{PodState, Process};
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_text_is_itself() {
        let text = metrics().encode();
        let sorted = |text: &str| {
            let lines = text.lines().filter(|line| !line.starts_with("# EOF"));
            // 0.0 and 0 are the same.
            let mut lines: Vec<String> = lines
                .map(|line| line.strip_suffix(".0").unwrap_or(line).to_owned())
                .collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&Exposition::parse(&text).text()), sorted(&text));
    }

    #[test]
    fn what_several_count_is_added_up() {
        let (daemon, worker) = (metrics(), metrics());
        let _own = daemon.pod("cloister");
        let hosted = worker.pod("cloister");
        hosted.set(PodState::Ready);
        let _containers = (
            daemon.process(Process::Container),
            worker.process(Process::Container),
        );
        worker.operation("start", Duration::from_secs(1), None);
        worker.oom();
        let mut sum = Exposition::parse(&daemon.encode());
        let other = Exposition::parse(&worker.encode());
        sum.add(&other);
        let text = sum.text();
        for line in [
            "cloister_pods{sandboxer=\"cloister\",state=\"created\"} 1",
            "cloister_pods{sandboxer=\"cloister\",state=\"ready\"} 1",
            "cloister_containers 2",
            "cloister_containers_started_total 2",
            "cloister_operation_seconds_count{operation=\"start\",outcome=\"ok\"} 1",
            "cloister_operation_seconds_bucket{operation=\"start\",outcome=\"ok\",le=\"+Inf\"} 1",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("cloister_build_info{").count(), 1);
        let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let mut once = types.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(types.len(), once.len(), "each family is there once");

        // Of a worker that has ended, what it has counted stays.
        let mut after = Exposition::parse(&daemon.encode());
        after.add(&other.counted());
        let text = after.text();
        assert!(text.contains("cloister_oom_kills_total 1\n"), "{text}");
        assert!(text.contains("cloister_containers 1\n"), "{text}");
    }

    #[test]
    fn what_is_no_metric_is_left_out() {
        for text in ["", "\n", "a 1\n", "# TYPE\n", "# HELP a\nb x\n", "# a b c\n"] {
            assert!(!Exposition::parse(text).text().contains(['1', 'x']), "{text:?}");
        }
    }
}
