//! Named results and the one JSON file they end in.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bars;

/// Units that results have; `MB` is a million bytes.
const UNITS: [&str; 10] = ["s", "ms", "us", "ns", "MB", "bytes", "count", "%", "calls", "sets"];

/// Named series of measurements, in the order of their names.
#[derive(Debug, Default)]
pub(crate) struct Results {
    series: BTreeMap<String, Series>,
    ratios: BTreeMap<String, f64>,
}

#[derive(Debug)]
struct Series {
    unit: &'static str,
    values: Vec<f64>,
}

impl Results {
    /// Records one measurement of a series.
    pub(crate) fn record(&mut self, name: impl Into<String>, unit: &'static str, value: f64) {
        self.series.entry(name.into()).or_insert_with(|| Series { unit, values: Vec::new() }).values.push(value);
    }

    /// Records one duration, in milliseconds.
    pub(crate) fn time(&mut self, name: impl Into<String>, took: Duration) {
        self.record(name, "ms", took.as_secs_f64() * 1e3);
    }

    /// Records the ratio of two medians: the product of a benchmark, whatever the machine.
    pub(crate) fn ratio(&mut self, name: impl Into<String>, of: &str, to: &str) {
        if let (Some(of), Some(to)) = (self.median(of), self.median(to))
            && to > 0.0
        {
            self.ratios.insert(name.into(), of / to);
        }
    }

    /// The smallest value of a series, with its unit.
    pub(crate) fn min(&self, name: &str) -> Option<(f64, &'static str)> {
        let series = self.series.get(name)?;
        series.values.iter().copied().min_by(f64::total_cmp).map(|value| (value, series.unit))
    }

    /// The value below which this share of a series lies, with its unit.
    pub(crate) fn quantile(&self, name: &str, share: f64) -> Option<(f64, &'static str)> {
        let series = self.series.get(name)?;
        let mut values = series.values.clone();
        values.sort_by(f64::total_cmp);
        let index = ((values.len().checked_sub(1)?) as f64 * share).round() as usize;
        values.get(index).map(|value| (*value, series.unit))
    }

    pub(crate) fn median(&self, name: &str) -> Option<f64> {
        let mut values = self.series.get(name)?.values.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// Takes over what a child process measured.
    pub(crate) fn merge(&mut self, json: &Value) -> anyhow::Result<()> {
        let entries = json.as_array().ok_or_else(|| anyhow::anyhow!("expected a list of measurements"))?;
        for entry in entries {
            let (Some(name), Some(unit), Some(value)) =
                (entry["name"].as_str(), entry["unit"].as_str(), entry["value"].as_f64())
            else {
                anyhow::bail!("no measurement: {entry}");
            };
            let unit =
                UNITS.into_iter().find(|known| *known == unit).ok_or_else(|| anyhow::anyhow!("unknown unit {unit}"))?;
            self.record(name, unit, value);
        }
        Ok(())
    }

    /// What a child process prints for [`Self::merge`].
    pub(crate) fn as_measurements(&self) -> Value {
        self.series
            .iter()
            .flat_map(|(name, series)| {
                series.values.iter().map(move |value| json!({ "name": name, "unit": series.unit, "value": value }))
            })
            .collect()
    }

    /// The document that is published.
    pub(crate) fn document(&self, machine: &Value) -> Value {
        let results: BTreeMap<&str, Value> = self
            .series
            .iter()
            .map(|(name, series)| {
                let mut sorted = series.values.clone();
                sorted.sort_by(f64::total_cmp);
                let at = |share: f64| sorted.get(((sorted.len() - 1) as f64 * share).round() as usize).copied();
                let value = json!({
                    "unit": series.unit, "n": sorted.len(), "median": at(0.5), "min": at(0.0), "p99": at(0.99),
                    "max": at(1.0),
                });
                (name.as_str(), value)
            })
            .collect();
        json!({
            "schema": 2, "machine": machine, "results": results, "ratios": self.ratios,
            "comparisons": bars::compare(self),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_has_order_statistics_and_ratios_of_medians() {
        let mut results = Results::default();
        for value in [3.0, 1.0, 2.0] {
            results.record("a", "ms", value);
            results.record("b", "ms", value * 2.0);
        }
        results.ratio("b/a", "b", "a");
        results.ratio("missing", "b", "c");
        let document = results.document(&json!({}));
        assert_eq!(
            document["results"]["a"],
            json!({"unit": "ms", "n": 3, "median": 2.0, "min": 1.0, "p99": 3.0, "max": 3.0})
        );
        assert_eq!(document["ratios"], json!({"b/a": 2.0}));
    }

    #[test]
    fn measurements_of_a_child_survive_the_way_to_its_parent() {
        let mut child = Results::default();
        child.record("a", "ms", 1.5);
        let mut parent = Results::default();
        parent.merge(&child.as_measurements()).unwrap();
        assert_eq!(parent.median("a"), Some(1.5));
        assert!(parent.merge(&json!([{"name": "a", "unit": "parsec", "value": 1}])).is_err());
    }
}
