//! What the reference needs for the same work, and what we have promised.
//!
//! The reference's figures are those of performance.md 2.8, the best of each range, measured on this class of machine:
//! it is not at hand when the benchmarks run (2.7, rule 2). Live heap of the reference is Go's, which rounds every
//! object up to a size class.

use serde_json::{Map, Value, json};

use crate::goals;
use crate::results::Results;

/// One row. Figures are in the unit of the series.
struct Bar {
    name: &'static str,
    reference: Option<f64>,
    at_most: Option<f64>,
}

const fn bar(name: &'static str, reference: f64, at_most: f64) -> Bar {
    Bar { name, reference: Some(reference), at_most: Some(at_most) }
}

const fn reference(name: &'static str, reference: f64) -> Bar {
    Bar { name, reference: Some(reference), at_most: None }
}

const fn promise(name: &'static str, at_most: f64) -> Bar {
    Bar { name, reference: None, at_most: Some(at_most) }
}

const BARS: [Bar; 35] = [
    bar("graph/Snapshot200Local250kTotal10000TagPols/time", 9_400.0, 800.0),
    bar("graph/Snapshot200Local250kTotal10000TagPols/live-heap", 245.0, 60.0),
    reference("graph/Snapshot200Local250kTotal10000TagPols/resident-peak", 1_060.0),
    reference("graph/Snapshot200Local250kTotal10000TagPols/allocations", 15_000_000.0),
    reference("graph/Snapshot200Local10kTotal1000NetsetPols/time", 1_260.0),
    reference("graph/Snapshot200Local10kTotal1000NetsetPols/live-heap", 79.4),
    bar("graph/Snapshot200Local10kTotal10000NetsetPols/time", 16_900.0, 1_500.0),
    bar("graph/Snapshot200Local10kTotal10000NetsetPols/live-heap", 635.0, 120.0),
    reference("graph/Snapshot200Local10kTotal10000NetsetPols/resident-peak", 1_970.0),
    reference("graph/IsolatedCustomers1k/time", 83.0),
    reference("graph/IsolatedCustomers1k/live-heap", 5.6),
    reference("graph/IsolatedCustomers10k/time", 1_540.0),
    reference("graph/IsolatedCustomers10k/live-heap", 35.3),
    bar("graph/IsolatedCustomers100k/time", 14_200.0, 1_200.0),
    bar("graph/IsolatedCustomers100k/live-heap", 312.0, 100.0),
    reference("graph/IsolatedCustomers100k/resident-peak", 1_560.0),
    bar("label-index/WorkloadUpdate10Sels/mean", 29.0, 5.0),
    bar("label-index/WorkloadUpdate100Sels/mean", 61.0, 5.0),
    bar("label-index/WorkloadUpdate1000Sels/mean", 520.0, 5.0),
    bar("label-index/WorkloadUpdate10000Sels/mean", 13_000.0, 5.0),
    reference("label-index/ParentUpdates100/mean", 8.9),
    reference("label-index/ParentUpdates1000/mean", 13.6),
    reference("label-index/ParentUpdates10000/mean", 11.4),
    bar("label-index/ParentUpdates100000/mean", 11.0, 2.0),
    reference("label-index/SelectorUpdates100/mean", 17.0),
    reference("label-index/SelectorUpdates1000/mean", 134.0),
    reference("label-index/SelectorUpdates10000/mean", 1_600.0),
    reference("label-index/SelectorUpdates100000/mean", 22_000.0),
    promise("label-index/SelectorUpdates100000/all-match/mean", 2_000.0),
    promise("label-index/SelectorUpdates100000/all-match-first/mean", 2_000.0),
    promise("label-index/SelectorUpdates100000/none-match/mean", 10.0),
    promise("label-index/SelectorUpdates100000/none-match-first/mean", 10.0),
    promise("relabel/250k-endpoints-10k-selectors/no-set-changes/median", 10.0),
    reference("small/selector-parse", 6_500.0),
    reference("small/key-parse-four-in-turn", 650.0),
];

/// Returns ours (the median, and the minimum) beside the reference and the bar, with how many times less we need.
pub(crate) fn compare(results: &Results) -> Value {
    let rows = BARS.iter().filter_map(|Bar { name, reference, at_most }| {
        let (min, unit) = results.min(name)?;
        let median = results.median(name)?;
        let row = json!({
            "unit": unit,
            "ours": median,
            "ours_min": min,
            "reference": reference,
            "times_less_than_reference": reference.filter(|_| median > 0.0).map(|reference| reference / median),
            "at_most": at_most,
            "met": at_most.map(|at_most| median <= at_most),
        });
        Some(((*name).to_owned(), row))
    });
    // Not a bar over a figure but a figure that must not be there at all.
    let quiet = "relabel/250k-endpoints-10k-selectors/no-set-changes/allocations";
    let quiet = results
        .median(quiet)
        .map(|calls| (quiet.to_owned(), json!({ "unit": "calls", "ours": calls, "at_most": 0, "met": calls == 0.0 })));
    Value::Object(rows.chain(quiet).chain(goals::compare(results)).collect::<Map<_, _>>())
}

/// The rows as lines for people.
pub(crate) fn lines(comparisons: &Value) -> Vec<String> {
    let number = |value: &Value| match value.as_f64() {
        Some(number) if number >= 100.0 => format!("{number:.0}"),
        Some(number) => format!("{number:.2}"),
        None => "-".to_owned(),
    };
    let rows = comparisons.as_object().into_iter().flatten();
    rows.map(|(name, row)| {
        format!(
            "{name:<70} {:>10} {:<5} {}  at most {:>7} {}",
            number(&row["ours"]),
            row["unit"].as_str().unwrap_or_default(),
            if row.get("floor").is_some() {
                format!("floor {:>9} ({:>8} times it)", number(&row["floor"]), number(&row["times_floor"]))
            } else {
                let times = number(&row["times_less_than_reference"]);
                format!("reference {:>9} ({times:>8} times less)", number(&row["reference"]))
            },
            number(&row["at_most"]),
            match row["met"].as_bool() {
                Some(true) => "met",
                Some(false) => "NOT MET",
                None => "",
            },
        )
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_compared_with_what_was_measured() {
        let mut results = Results::default();
        for value in [500.0, 900.0, 700.0] {
            results.record("graph/Snapshot200Local250kTotal10000TagPols/time", "ms", value);
        }
        results.record("label-index/WorkloadUpdate10Sels/mean", "us", 5.5);
        results.record("relabel/250k-endpoints-10k-selectors/no-set-changes/allocations", "calls", 0.001);
        let comparisons = compare(&results);
        assert_eq!(comparisons.as_object().unwrap().len(), 3);
        let snapshot = &comparisons["graph/Snapshot200Local250kTotal10000TagPols/time"];
        assert_eq!((snapshot["ours"].as_f64(), snapshot["ours_min"].as_f64()), (Some(700.0), Some(500.0)));
        assert_eq!(snapshot["times_less_than_reference"].as_f64(), Some(9_400.0 / 700.0));
        assert_eq!(snapshot["met"], true);
        assert_eq!(comparisons["label-index/WorkloadUpdate10Sels/mean"]["met"], false);
        assert_eq!(comparisons["relabel/250k-endpoints-10k-selectors/no-set-changes/allocations"]["met"], false);
        let lines = lines(&comparisons);
        assert!(lines.iter().any(|line| line.contains("NOT MET")), "{lines:?}");
    }
}
