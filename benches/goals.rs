//! The goals of performance.md section 7 that are measured end to end, against the floor of the same run.

use serde_json::{Map, Value, json};

use crate::results::Results;

const VARIANTS: [&str; 2] = ["legacy", "nft"];
/// Sizes of the filter table that an edit is measured at.
pub(crate) const TABLES: [usize; 3] = [100, 1_000, 10_000];

/// One goal: a statistic of a series, and what it may be at most.
struct Goal {
    id: &'static str,
    series: String,
    /// 0.5 is the median.
    quantile: f64,
    limit: Limit,
}

enum Limit {
    Fixed(f64),
    /// So many times the median of another series, and so much.
    Floor(String, f64, f64),
}

fn goals() -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut goal = |id, series: String, quantile, limit| goals.push(Goal { id, series, quantile, limit });
    for series in [1, 10, 100].iter().flat_map(|sets| ["a", "b"].map(|series| format!("member/{sets}-sets/{series}"))) {
        goal("G4", format!("{series}/put-to-member"), 0.5, Limit::Fixed(0.5));
        goal("G4", format!("{series}/put-to-member"), 0.99, Limit::Fixed(3.0));
    }
    for variant in VARIANTS {
        let factor = if variant == "legacy" { 1.3 } else { 2.0 };
        for rules in TABLES {
            let floor = Limit::Floor(format!("floor/{variant}/rewrite-chain-held-open-{rules}"), factor, 1.0);
            goal("G5", format!("edit/{variant}/{rules}/put-to-packet"), 0.5, floor);
        }
        let floor = Limit::Floor(format!("burst/{variant}/floor"), 2.0, 0.0);
        goal("G6", format!("burst/{variant}/put-to-last-in-force"), 0.5, floor);
        let floor = Limit::Floor(format!("cold/{variant}/floor"), 2.5, 0.0);
        goal("G8", format!("cold/{variant}/start-to-in-sync"), 0.5, floor);
        goal("G9", format!("warm/{variant}/start-to-in-sync"), 0.5, Limit::Fixed(1_500.0));
        goal("G9", format!("warm/{variant}/writes"), 1.0, Limit::Fixed(0.0));
        for pace in ["tenth-of-the-intervals", "default-intervals"] {
            goal("G10", format!("idle/{variant}/{pace}/share-of-a-core"), 0.5, Limit::Fixed(1.0));
        }
        let floor = Limit::Floor(format!("unused-sets/{variant}/floor-destroys"), 3.0, 0.0);
        goal("G11", format!("unused-sets/{variant}/put-to-last-gone"), 0.5, floor);
    }
    for variant in VARIANTS {
        // What the goal leaves out: rules hold the sets until their commit is through.
        let floor = Limit::Floor(format!("unused-sets/{variant}/floor-commit-and-destroys"), 1.3, 0.0);
        goal("G11 with the commit", format!("unused-sets/{variant}/put-to-last-gone"), 0.5, floor);
    }
    goal("G12", "million/one-net".to_owned(), 0.5, Limit::Floor("million/bar-one-net".to_owned(), 1.0, 0.0));
    goal("G12", "million/all".to_owned(), 0.5, Limit::Floor("million/bar-all".to_owned(), 1.0, 0.0));
    goal("G12", "million/resident-peak-over-idle".to_owned(), 1.0, Limit::Fixed(250.0));
    goals
}

/// Returns a row for each goal that was measured.
pub(crate) fn compare(results: &Results) -> Map<String, Value> {
    let rows = goals().into_iter().filter_map(|Goal { id, series, quantile, limit }| {
        let (ours, unit) = results.quantile(&series, quantile)?;
        let (floor, at_most) = match limit {
            Limit::Fixed(at_most) => (None, at_most),
            Limit::Floor(floor, factor, plus) => {
                let floor = results.median(&floor)?;
                (Some(floor), factor * floor + plus)
            }
        };
        let row = json!({
            "unit": unit,
            "ours": ours,
            "floor": floor,
            "times_floor": floor.filter(|floor| *floor > 0.0).map(|floor| ours / floor),
            "at_most": at_most,
            "met": ours <= at_most,
        });
        let statistic = match quantile {
            0.5 => "median",
            1.0 => "max",
            _ => "p99",
        };
        Some((format!("{id} {series} {statistic}"), row))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_held_against_the_floor_of_the_same_run() {
        let mut results = Results::default();
        results.record("floor/nft/rewrite-chain-held-open-100", "ms", 1.0);
        for value in [2.9, 3.1, 2.8] {
            results.record("edit/nft/100/put-to-packet", "ms", value);
        }
        results.record("edit/legacy/100/put-to-packet", "ms", 1.0);
        results.record("warm/nft/writes", "calls", 0.0);
        results.record("warm/nft/writes", "calls", 1.0);
        let rows = compare(&results);
        assert_eq!(rows.keys().collect::<Vec<_>>(), ["G5 edit/nft/100/put-to-packet median", "G9 warm/nft/writes max"]);
        let edit = &rows["G5 edit/nft/100/put-to-packet median"];
        assert_eq!((edit["at_most"].as_f64(), &edit["met"]), (Some(3.0), &json!(true)));
        assert_eq!(rows["G9 warm/nft/writes max"]["met"], false);
    }
}
