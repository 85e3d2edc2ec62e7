//! Tests of the programs against the selectors that they are made of.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::select;
use testkit::build;

use super::*;

fn any_selector() -> impl Strategy<Value = String> {
    let leaf = select(vec![
        "all()",
        "global()",
        "has(a)",
        "has(b)",
        "a == '1'",
        "a != '1'",
        "b == ''",
        "b in {'1', '2'}",
        "a in {}",
        "a not in {'2', '3'}",
        "b contains '1'",
        "a starts with '1'",
        "b ends with '2'",
    ]);
    leaf.prop_map(str::to_owned).prop_recursive(4, 24, 3, |inner| {
        let operands = prop::collection::vec(inner.clone(), 2..4);
        prop_oneof![
            operands.clone().prop_map(|operands| format!("({})", operands.join(" && "))),
            operands.prop_map(|operands| format!("({})", operands.join(" || "))),
            inner.prop_map(|operand| format!("!({operand})")),
        ]
    })
}

/// Every way to give `a` and `b` a value or none.
fn worlds() -> Vec<BTreeMap<&'static str, &'static str>> {
    let values = [None, Some(""), Some("1"), Some("2"), Some("12")];
    let pair = |a: Option<&'static str>, b: Option<&'static str>| {
        [("a", a), ("b", b)].into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    };
    values.iter().flat_map(|a| values.iter().map(move |b| pair(*a, *b))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_program_says_what_its_selector_says(text in any_selector()) {
        let selector = build::selector(&text);
        let mut names = Names::default();
        let mut program = Vec::new();
        compile(&mut names, &selector, &mut program);
        let keys = ["a", "b"].map(|key| names.acquire(key));

        let mut answers = Vec::new();
        for world in worlds() {
            let labels: model::Labels = world.iter().map(|(key, value)| (*key, *value)).collect();
            let set = names.acquire_labels(&labels);
            let known: Vec<Label> = names.labels_of(set).collect();
            let expected = selector.matches(&labels);
            prop_assert_eq!(evaluate(&names, &program, &known, |_| false), Some(expected));
            answers.push((known, expected));
        }
        // With a key unknown, whatever is said is true of all its values.
        for (known, expected) in &answers {
            for key in keys {
                let rest: Vec<Label> = known.iter().copied().filter(|label| label.key != key).collect();
                let told = evaluate(&names, &program, &rest, |unknown| unknown == key);
                prop_assert!(told.is_none_or(|told| told == *expected), "{text}: {told:?}");
            }
        }
    }

    #[test]
    fn a_match_satisfies_the_restrictions(text in any_selector()) {
        let selector = build::selector(&text);
        for world in worlds() {
            assert_sound(&selector, &world.into_iter().collect());
        }
    }

    #[test]
    fn a_program_gives_back_what_it_holds(text in any_selector()) {
        let mut names = Names::default();
        let mut program = Vec::new();
        compile(&mut names, &build::selector(&text), &mut program);
        release(&mut names, &program);
        prop_assert!(names.is_empty());
    }
}

#[test]
fn what_a_known_label_decides_needs_no_other() {
    let mut names = Names::default();
    let set = names.acquire_labels(&build::labels("a=1"));
    let labels: Vec<Label> = names.labels_of(set).collect();
    let cases = [
        ("a == '1'", Some(true)),
        ("a == '2'", Some(false)),
        ("b == '2'", None),
        ("!has(b)", None),
        ("a == '1' || has(b)", Some(true)),
        ("has(b) || a == '1'", Some(true)),
        ("a == '2' && has(b)", Some(false)),
        ("has(b) && a == '2'", Some(false)),
        ("a == '1' && has(b)", None),
        ("!(has(b) && a == '2')", Some(true)),
    ];
    for (text, expected) in cases {
        let mut program = Vec::new();
        compile(&mut names, &build::selector(text), &mut program);
        assert_eq!(evaluate(&names, &program, &labels, |_| true), expected, "{text}");
    }
}

#[test]
fn restrictions_say_what_every_match_must_satisfy() {
    type Labels<'a> = &'a [(&'a str, &'a str)];
    // `None`: matches nothing. `+` present, `-` absent, else the values.
    let cases: &[(&str, Option<Labels<'_>>)] = &[
        ("all()", Some(&[])),
        ("global()", Some(&[])),
        ("!all()", None),
        ("a == 'x'", Some(&[("a", "x")])),
        ("a in {'y', 'x'}", Some(&[("a", "x,y")])),
        ("a in {}", None),
        ("a not in {}", Some(&[])),
        ("a != 'x'", Some(&[])),
        ("!a == 'x'", Some(&[])),
        ("!a in {}", Some(&[])),
        ("a contains 'x' && b starts with 'y' && c ends with 'z'", Some(&[("a", "+"), ("b", "+"), ("c", "+")])),
        ("has(a) && !has(b)", Some(&[("a", "+"), ("b", "-")])),
        ("!!has(a)", Some(&[("a", "+")])),
        ("!(!has(a))", Some(&[])),
        ("!(has(a) && has(b))", Some(&[])),
        ("has(a) && a == 'x'", Some(&[("a", "x")])),
        ("a in {'x', 'y'} && a in {'y', 'z'}", Some(&[("a", "y")])),
        ("a == 'x' && a == 'y'", None),
        ("a == 'x' && !has(a)", None),
        ("a == 'x' || a == 'y'", Some(&[("a", "x,y")])),
        ("a == 'x' || has(a)", Some(&[("a", "+")])),
        ("a == 'x' || !has(a)", Some(&[])),
        ("a == 'x' || has(b)", Some(&[])),
        ("a == 'x' || a in {}", Some(&[("a", "x")])),
        ("a in {} || a in {}", None),
        ("(a == 'x' && has(b)) || (has(c) && a == 'y')", Some(&[("a", "x,y")])),
        ("(a == 'x' || a == 'y') && (b == 'z' || has(c))", Some(&[("a", "x,y")])),
        ("!(a == 'x') && has(b)", Some(&[("b", "+")])),
    ];
    for (text, wanted) in cases {
        let mut names = Names::default();
        let mut program = Vec::new();
        compile(&mut names, &build::selector(text), &mut program);
        let wanted = wanted.map(|labels| {
            let restriction = |(key, values): &(&str, &str)| {
                let key = names.acquire(key);
                let restriction = match *values {
                    "-" => Restriction::Absent,
                    "+" => Restriction::Present,
                    values => {
                        Restriction::OneOf(values.split(',').map(|value| names.acquire_label(key, value)).collect())
                    }
                };
                (key, restriction)
            };
            labels.iter().map(restriction).collect()
        });
        assert_eq!(restrictions(&program), wanted, "{text}");
    }
}

#[test]
fn the_matches_of_the_vectors_satisfy_the_restrictions() {
    let path = format!("{}/../../tests/vectors/selectors.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut matches = 0;
    for case in vectors["valid"].as_array().unwrap() {
        let selector = build::selector(case["selector"].as_str().unwrap());
        for evaluation in case["evaluations"].as_array().unwrap() {
            let labels = evaluation["labels"].as_object().unwrap().iter();
            let labels = labels.map(|(key, value)| (key.as_str(), value.as_str().unwrap())).collect();
            matches += u32::from(assert_sound(&selector, &labels));
        }
    }
    assert!(matches >= 50, "{matches}");
}

#[test]
fn a_hostile_selector_costs_time_in_proportion_to_its_length() {
    let alternatives: Vec<String> = (0..50_000).map(|n| format!("a == '{n}'")).collect();
    let mut names = Names::default();
    let mut program = Vec::new();
    compile(&mut names, &build::selector(&alternatives.join(" || ")), &mut program);
    let labels = restrictions(&program).unwrap();
    let [Restriction::OneOf(values)] = labels.values().collect::<Vec<_>>()[..] else { panic!("{labels:?}") };
    assert_eq!(values.len(), 50_000);
}

#[test]
fn deep_nesting_is_sound_and_needs_no_stack() {
    for (open, close) in [("(", ")"), ("!(", ")"), ("(b == 'x' || ", ")"), ("!(has(a) && ", ")")] {
        let text = format!("{}has(a){}", open.repeat(512), close.repeat(512));
        let selector = build::selector(&text);
        assert!(assert_sound(&selector, &build::labels("a")) || open.starts_with('!'), "{open}");
    }
}

/// Every restriction holds for these labels, unless the selector does not match them; returns whether it does.
fn assert_sound(selector: &Selector, labels: &model::Labels) -> bool {
    if !selector.matches(labels) {
        return false;
    }
    let mut names = Names::default();
    let mut program = Vec::new();
    compile(&mut names, selector, &mut program);
    let set = names.acquire_labels(labels);
    let known: BTreeMap<u32, u32> = names.labels_of(set).map(|Label { key, label }| (key, label)).collect();
    let Some(restrictions) = restrictions(&program) else {
        panic!("{selector} is said to match nothing but matches {labels:?}");
    };
    for (key, restriction) in restrictions {
        let holds = match (&restriction, known.get(&key)) {
            (Restriction::Absent, value) => value.is_none(),
            (Restriction::Present, value) => value.is_some(),
            (Restriction::OneOf(values), value) => value.is_some_and(|value| values.contains(value)),
        };
        assert!(holds, "{selector} matches {labels:?} against {:?} {restriction:?}", names.get(key));
    }
    true
}
